"""The layers of a decoder one after the other: a list of blocks, or a scan over one block with stacked parameters.

A list is compiled layer by layer, and may run faster; a scan is compiled once, whatever the depth. Parameters are
"blocks/0/..", "blocks/1/.." in a list, and "layers/..", with an axis of layers in front, in a stack: `other_form` turns
one into the other.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from wavelet_jax.attention import SAVED_RESIDUALS
from wavelet_jax.model.block import Block
from wavelet_jax.model.cache import KVCache

SCANS = ("auto", "always", "never")
# "auto" scans from this many layers on: a program of fewer compiles in a minute as a list too.
LEAST_SCANNED = 8

# What the layers keep of a forward pass, beside their inputs, for the backward pass, which computes the rest again.
_KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names(SAVED_RESIDUALS)
_KEEP_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable  # products with parameters, and not scores
REMATS = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(_KEEP_DOTS, _KEEP_ATTENTION),
    "attention": _KEEP_ATTENTION,
    "block": jax.checkpoint_policies.nothing_saveable,
}

Slots = tuple[jax.Array, jax.Array]  # keys and values of one layer, [B, S, K, D]


def are_scanned(config: ConfigDict) -> bool:
    """Whether the layers of this model are scanned, by `config.model.scan_layers`."""
    if config.model.scan_layers == "auto":
        return config.model.num_layers >= LEAST_SCANNED
    return config.model.scan_layers == "always"


def stacked(make: Callable[..., Block], count: int, rngs: nnx.Rngs) -> Block:
    """A block whose parameters are those of `count` blocks, [count, ..]; `make(rngs=..)` gives one.

    They are drawn from the keys that the blocks of a list would draw from.
    """
    stream, graphdefs = rngs.params, []

    def draw(drawn: jax.Array, _) -> tuple[jax.Array, nnx.State]:
        own = nnx.Rngs(params=stream.key[...])
        own.params.count[...] = drawn
        graphdef, state = nnx.split(make(rngs=own))
        graphdefs.append(graphdef)
        return own.params.count[...], state

    stream.count[...], states = lax.scan(draw, stream.count[...], length=count)
    return nnx.merge(graphdefs[0], states)


def of_stack(stack: Block, layer: int) -> Block:
    """One block of a stack, counted from 0."""
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[layer], state))


def apply(
    run: Callable[..., tuple[jax.Array, Slots]],
    blocks: list[Block] | Block,
    x_BxTxE: jax.Array,
    cache: KVCache | None,
    dropout_keys: jax.Array | None,
    shared: Any,
    *,
    first_slot: Any,
    remat: str,
) -> tuple[jax.Array, KVCache | None]:
    """The layers in turn: the output of the last one, and the cache with what each has written to its slots.

    While a program is traced, `run` is traced once, and is one function of the program: what it computes while tracing
    and the constants that it closes over are there once, whatever the depth. Outside of a trace a stack is taken apart,
    as a scan would be compiled at each call.

    Args:
      run: (block, x, slots, dropout key, *shared) -> x and the keys and values that were attended to, which are the
        slots where there are some.
      blocks: a list of layers, or a stack of them.
      x_BxTxE: the input of the first.
      cache: of all layers; None: no slots.
      dropout_keys: [layers]; None: no dropout.
      shared: further arguments of `run`, trees of arrays.
      first_slot: where a cache is written, the slot of the first of these tokens.
      remat: one of `REMATS`: what the backward pass finds of a layer.
    """
    traced = isinstance(x_BxTxE, Tracer)
    scanned = isinstance(blocks, Block) and traced
    graphdef = nnx.split(blocks if isinstance(blocks, Block) else blocks[0])[0]

    def one_layer(state: nnx.State, x_BxTxE, slots, dropout_key, *shared):
        return run(nnx.merge(graphdef, state), x_BxTxE, slots, dropout_key, *shared)

    if remat != "none":  # XLA does not look across the iterations of a scan for what was computed before
        one_layer = jax.checkpoint(one_layer, policy=REMATS[remat], prevent_cse=not scanned)
    if scanned:
        return _scan(one_layer, nnx.split(blocks)[1], x_BxTxE, cache, dropout_keys, shared, first_slot)
    if traced:  # one function of the program, which all layers call
        one_layer = jax.jit(one_layer)
    count, slots = _depth(blocks), []
    for layer in range(count):
        block = of_stack(blocks, layer) if isinstance(blocks, Block) else blocks[layer]
        with jax.named_scope(f"block_{layer}"):
            x_BxTxE, new = one_layer(
                nnx.split(block)[1],
                x_BxTxE,
                None if cache is None else cache.of_layer(layer),
                None if dropout_keys is None else dropout_keys[layer],
                *shared,
            )
        slots.append(new)
    return x_BxTxE, None if cache is None else cache.with_layers(slots)


def _depth(blocks: list[Block] | Block) -> int:
    return len(jax.tree.leaves(nnx.split(blocks)[1])[0]) if isinstance(blocks, Block) else len(blocks)


def _scan(
    one_layer: Callable[..., tuple[jax.Array, Slots]],
    states: nnx.State,
    x_BxTxE: jax.Array,
    cache: KVCache | None,
    dropout_keys: jax.Array | None,
    shared: Any,
    first_slot: Any,
) -> tuple[jax.Array, KVCache | None]:
    """`apply` as a loop of the program."""

    def step(carry, layer_and_more):
        x_BxTxE, stacks = carry
        layer, state, dropout_key = layer_and_more
        slots = None if stacks is None else tuple(stack[layer] for stack in stacks)
        x_BxTxE, written = one_layer(state, x_BxTxE, slots, dropout_key, *shared)
        if stacks is not None:
            # Carried, and written where these tokens are only: the loop then changes the cache in its place.
            new = (lax.dynamic_slice_in_dim(x, first_slot, x_BxTxE.shape[1], axis=1)[None] for x in written)
            stacks = tuple(
                lax.dynamic_update_slice(stack, x, (layer, 0, first_slot, 0, 0))
                for stack, x in zip(stacks, new, strict=True)
            )
        return (x_BxTxE, stacks), None

    count = len(jax.tree.leaves(states)[0])
    stacks: Any = None if cache is None else (cache.keys, cache.values)
    with jax.named_scope("blocks"):
        (x_BxTxE, stacks), _ = lax.scan(step, (x_BxTxE, stacks), (jnp.arange(count), states, dropout_keys))
    if cache is None:
        return x_BxTxE, None
    keys, values = stacks
    return x_BxTxE, KVCache(keys, values, cache.filled)


# -- trees of parameters ----------------------------------------------------------------------------------------------


def other_form(tree: Any) -> Any:
    """A tree that holds parameters (alone, or with the optimizer's moments), with lists of blocks stacked, or stacks
    as lists. Its leaves are arrays, or `jax.ShapeDtypeStruct`s, whose shardings are kept."""

    def convert(x: Any) -> Any:
        if _is_listed(x):
            layers = [x["blocks"][layer] for layer in sorted(x["blocks"], key=int)]
            return _without(x, "blocks") | {"layers": jax.tree.map(_stack, *layers)}
        if _is_stacked(x):
            count = jax.tree.leaves(x["layers"])[0].shape[0]
            layers = (jax.tree.map(functools.partial(_take, layer), x["layers"]) for layer in range(count))
            return _without(x, "layers") | {"blocks": dict(enumerate(layers))}
        return x

    return jax.tree.map(convert, tree, is_leaf=lambda x: _is_listed(x) or _is_stacked(x))


def _is_listed(x: Any) -> bool:
    return isinstance(x, dict) and "blocks" in x


def _is_stacked(x: Any) -> bool:
    return isinstance(x, dict) and "layers" in x


def _without(x: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in x.items() if key != name}


def _stack(*leaves: Any) -> Any:
    if not isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jnp.stack(leaves)
    return _struct(leaves[0], (len(leaves), *leaves[0].shape), lambda spec: (None, *spec))


def _take(layer: int, leaf: Any) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf[layer]
    return _struct(leaf, leaf.shape[1:], lambda spec: spec[1:])


def _struct(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...], spec_of: Callable) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec_of(tuple(sharding.spec))))
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
