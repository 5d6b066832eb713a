"""The layers of a decoder one after the other: a list of blocks, or a scan over one block with stacked parameters.

A list is compiled layer by layer, and may run faster; a scan is compiled once, whatever the depth. Parameters are
"blocks/0/..", "blocks/1/.." in a list, and "layers/..", with an axis of layers in front, in a stack: `other_form` turns
one into the other.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.core import Tracer
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

Module = TypeVar("Module", bound=nnx.Module)
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


def of_stack(stack: Module, layer: int) -> Module:
    """One block of a stack, or one part of it, counted from 0."""
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
    graphdef, state = nnx.split(blocks if isinstance(blocks, Block) else blocks[0])

    def one_layer(state: nnx.State, x_BxTxE, slots, dropout_key, *shared):
        return run(nnx.merge(graphdef, state), x_BxTxE, slots, dropout_key, *shared)

    if remat != "none":  # XLA does not look across the iterations of a scan for what was computed before
        one_layer = jax.checkpoint(one_layer, policy=REMATS[remat], prevent_cse=not scanned)
    if scanned:
        return _scan(one_layer, state, x_BxTxE, cache, dropout_keys, shared, first_slot)
    if traced:  # one function of the program, which all layers call
        one_layer = jax.jit(one_layer)
    states = _taken_apart(state) if isinstance(blocks, Block) else (nnx.split(block)[1] for block in blocks)
    slots = []
    for layer, state in enumerate(states):
        with jax.named_scope(f"block_{layer}"):
            x_BxTxE, new = one_layer(
                state,
                x_BxTxE,
                None if cache is None else cache.of_layer(layer),
                None if dropout_keys is None else dropout_keys[layer],
                *shared,
            )
        slots.append(new)
    return x_BxTxE, None if cache is None else cache.with_layers(slots)


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

    stacks: Any = None if cache is None else (cache.keys, cache.values)
    with jax.named_scope("blocks"):
        (x_BxTxE, stacks), _ = lax.scan(step, (x_BxTxE, stacks), (jnp.arange(_depth(states)), states, dropout_keys))
    if cache is None:
        return x_BxTxE, None
    keys, values = stacks
    return x_BxTxE, KVCache(keys, values, cache.filled)


# -- trees of parameters ----------------------------------------------------------------------------------------------


def other_form(tree: Any) -> Any:
    """A tree of arrays that holds parameters (alone, or with the optimizer's moments), with lists of blocks stacked, or
    stacks as lists."""

    def convert(x: Any) -> Any:
        if _has(x, "blocks"):
            in_order = [x["blocks"][layer] for layer in sorted(x["blocks"], key=int)]
            return _without(x, "blocks") | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)}
        if _has(x, "layers"):
            return _without(x, "layers") | {"blocks": dict(enumerate(_taken_apart(x["layers"])))}
        return x

    return jax.tree.map(convert, tree, is_leaf=lambda x: _has(x, "blocks") or _has(x, "layers"))


def _taken_apart(stack: Any) -> Iterator[Any]:
    """The trees of the layers of a stacked tree, one after another."""
    for layer in range(_depth(stack)):
        yield jax.tree.map(lambda x: x[layer], stack)  # noqa: B023  # used at once


def _depth(stack: Any) -> int:
    return len(jax.tree.leaves(stack)[0])


def _has(x: Any, name: str) -> bool:
    return isinstance(x, dict) and name in x


def _without(x: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in x.items() if key != name}
