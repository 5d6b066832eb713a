"""Loss, optimizer, initial state, train step and evaluation step: pure functions, jittable."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from wavelet_jax.model.cache import KVCache
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.model.vocabulary import AdaptiveVocabulary
from wavelet_jax.parallel.sharding import constrain, into_order, out_of_order, placed, token_order
from wavelet_jax.ranges import SEED
from wavelet_jax.training import sizes
from wavelet_jax.training.optimizer import learning_rate_schedule, make_optimizer

_HEAD = 2**31  # the head's dropout key among those of the model, which are counted from 0


@flax.struct.dataclass
class State:
    """Everything an update changes. The data position is not in it: it is step * batch_size windows."""

    step: jax.Array  # updates made, int32
    params: dict[str, Any]  # the pure tree of the decoder's parameters, float32
    opt_state: optax.OptState
    skipped: jax.Array  # of these updates, those that were not finite and so changed nothing else, int32
    skipped_in_a_row: jax.Array  # consecutive skipped updates up to now, int32


def token_losses(
    model: Decoder,
    hidden_BxTxE: jax.Array,
    targets_BxT: jax.Array,
    chunk: int,
    mesh: Mesh | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Cross entropy of every target in nats, [B, T] float32. Logits are held for `chunk` tokens at a time (0: all).

    dropout_key: the key that `Decoder.hidden` was given, for the head's own dropout; None turns it off.
    """

    def losses(hidden_targets_and_key) -> jax.Array:
        hidden, targets, key = hidden_targets_and_key
        return model.losses(hidden, targets, dropout_key=key)

    if dropout_key is not None:
        dropout_key = jax.random.fold_in(dropout_key, _HEAD)
    # Chunks are cut along time, each out of the tokens of every device (P of them along the length): all work on all.
    (batch, length), parts = targets_BxT.shape, 1 if mesh is None else mesh.shape["context"]
    steps = max(1, chunk // (batch * parts)) if chunk else length
    if steps >= length // parts:
        return losses((hidden_BxTxE, targets_BxT, dropout_key))
    padding = -(length // parts) % steps
    hidden_BxPxTxE, targets_BxPxT = (
        x.reshape(batch, parts, length // parts, *x.shape[2:]) for x in (hidden_BxTxE, targets_BxT)
    )
    if isinstance(model.embedding, AdaptiveVocabulary):
        # Tokens of rare words come last in each row, so that the tails are computed in the last chunks only.
        order_BxPxT = jnp.argsort(model.embedding.cluster_of(targets_BxPxT), axis=2)
        hidden_BxPxTxE = jnp.take_along_axis(hidden_BxPxTxE, order_BxPxT[..., None], axis=2)
        targets_BxPxT = jnp.take_along_axis(targets_BxPxT, order_BxPxT, axis=2)

    def chunks(x: jax.Array) -> jax.Array:  # [chunks, B, P, steps, ..]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 3))
        x = jnp.moveaxis(x.reshape(batch, parts, -1, steps, *x.shape[3:]), 2, 0)
        return constrain(x, mesh, None, "batch", "length", *[None] * (x.ndim - 3))

    hidden, targets = chunks(hidden_BxPxTxE), chunks(targets_BxPxT)
    keys = None if dropout_key is None else jax.random.split(dropout_key, len(targets))
    by_chunk = jax.lax.map(jax.checkpoint(losses), (hidden, targets, keys))
    losses_BxPxT = jnp.moveaxis(by_chunk, 0, 2).reshape(batch, parts, -1)[:, :, : length // parts]
    if isinstance(model.embedding, AdaptiveVocabulary):
        losses_BxPxT = jnp.take_along_axis(losses_BxPxT, jnp.argsort(order_BxPxT, axis=2), axis=2)
    return losses_BxPxT.reshape(batch, length)


def shapes(config: ConfigDict, vocab_size: int, mesh: Mesh) -> tuple[nnx.GraphDef, State]:
    """The decoder and its optimizer without their numbers: nothing is computed.

    Returns:
      graphdef: with parameters, `nnx.merge(graphdef, params)` is the decoder.
      abstract_state: shapes, dtypes and shardings of the state, for restoring a checkpoint.
    """
    graphdef = nnx.eval_shape(lambda: nnx.split(Decoder(config, vocab_size, rngs=nnx.Rngs(0)))[0])
    return graphdef, placed(mesh, jax.eval_shape(functools.partial(_make_state, config, vocab_size)))


def init(config: ConfigDict, vocab_size: int, mesh: Mesh) -> tuple[nnx.GraphDef, State, State]:
    """Builds the decoder and its optimizer, each array made where it belongs on the mesh.

    Returns:
      graphdef, abstract_state (the last): see `shapes`.
      state: the state before the first update.

    Raises:
      UserError: before anything is allocated, for a state that no device could hold (`sizes.check`), and for a seed
        that `seed_key` refuses.
    """
    sizes.check(config, vocab_size)
    graphdef, abstract_state = shapes(config, vocab_size, mesh)
    return graphdef, draw(config, vocab_size, abstract_state), abstract_state


def draw(config: ConfigDict, vocab_size: int, abstract_state: State) -> State:
    """The state before the first update, from `config.train.model_seed`, in the shardings of `shapes`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return jax.jit(functools.partial(_make_state, config, vocab_size), out_shardings=shardings)()


def _make_state(config: ConfigDict, vocab_size: int) -> State:
    params = nnx.to_pure_dict(nnx.state(Decoder(config, vocab_size, rngs=nnx.Rngs(seed_key(config)))))
    return State(jnp.int32(0), params, make_optimizer(config).init(params), jnp.int32(0), jnp.int32(0))


def seed_key(config: ConfigDict) -> jax.Array:
    """The random key of `config.train.model_seed`, from which parameters and dropout are drawn.

    Raises:
      UserError: a seed below 0 or of more than 32 bits. `jax.random.key` would drop the higher ones without a word,
        and two runs of different seeds would share their parameters.
    """
    SEED.check("train.model_seed", config.train.model_seed)
    return jax.random.key(config.train.model_seed)


def batch_shape(config: ConfigDict) -> tuple[int, ...]:
    """[A, B/A, L+1], the shape of the tokens of an update, A = train.accumulation; packed: [A, B/A, 2, L+1]."""
    parts = config.train.accumulation
    window = (2,) if config.data.packing == "documents" else ()
    return (parts, config.train.batch_size // parts, *window, config.train.length + 1)


def _unpack(config: ConfigDict, windows: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The parts of the windows that an update reads, which `data.Windows` makes, with any leading dimensions.

    Returns:
      tokens: [.., L+1]: inputs are [:-1], targets [1:].
      segment_ids: the documents of the inputs, [.., L], and None without packing: attention stays inside of each.
      counted: whether the target is of its input's document, [.., L]: the first token of a document follows from
        nothing that is seen. None without packing: all.
    """
    if config.data.packing == "none":
        return windows, None, None
    tokens, documents = windows[..., 0, :], windows[..., 1, :]
    return tokens, documents[..., :-1], documents[..., 1:] == documents[..., :-1]


def make_train_step(
    config: ConfigDict, graphdef: nnx.GraphDef, mesh: Mesh | None = None
) -> Callable[[State, jax.Array], tuple[State, dict]]:
    """One update: (state, windows of `batch_shape`, int32) -> (state, metrics).

    The mesh says how activations are divided; without one, and with several devices, the compiler sees to it.

    Where the loss or the norm of the gradient is not finite, parameters and optimizer come out as they went in, bit for
    bit, and the update is counted as skipped. Whether to go on is for `guards.Guard`.
    """
    optimizer, schedule = make_optimizer(config), learning_rate_schedule(config)
    accumulation = config.train.accumulation

    def loss_of(params, windows, key, count) -> jax.Array:
        """The part of these windows in the mean over `count` targets."""
        model = nnx.merge(graphdef, params)
        tokens, segment_ids, counted = _unpack(config, windows)
        inputs, targets = into_order(tokens[:, :-1], mesh), into_order(tokens[:, 1:], mesh)
        if segment_ids is not None:
            assert counted is not None
            segment_ids, counted = into_order(segment_ids, mesh), into_order(counted, mesh)
        positions = token_order(inputs.shape[1], mesh)
        hidden = model.hidden(inputs, positions=positions, segment_ids=segment_ids, dropout_key=key, mesh=mesh)
        losses = token_losses(model, hidden, targets, config.train.logits_chunk, mesh, dropout_key=key)
        return jnp.sum(losses, where=counted) / count

    def train_step(state: State, windows: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        # Of all parts together: parts, and devices, may differ in how many of their targets count.
        counted = _unpack(config, windows)[2]
        count = windows[..., 1:].size if counted is None else jnp.maximum(counted.sum(), 1)
        key = jax.random.fold_in(seed_key(config), state.step)

        keys = jax.random.split(key, accumulation)
        loss_and_grads = jax.value_and_grad(loss_of)
        if accumulation == 1:
            loss, grads = loss_and_grads(state.params, windows[0], keys[0], count)
        else:

            def add(total, part_and_key):
                return jax.tree.map(jnp.add, total, loss_and_grads(state.params, *part_and_key, count)), None

            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            (loss, grads), _ = jax.lax.scan(add, zeros, (windows, keys))
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            # A choice by element: it is fused into the update, where a branch would need both states in memory.
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
            )
        after = State(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "update_norm": jnp.where(finite, optax.tree.norm(updates), 0.0),
            # The optimizer's own count, which skipped updates do not move.
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "skipped": after.skipped,
            "skipped_in_a_row": after.skipped_in_a_row,
        }
        return after, metrics

    return train_step


def jit_train_step(config: ConfigDict, graphdef: nnx.GraphDef, abstract_state: State, mesh: Mesh) -> Callable:
    """`make_train_step` as it runs: the new state takes the old one's memory, and lies on the mesh as that did."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return jax.jit(make_train_step(config, graphdef, mesh), donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(
    config: ConfigDict, graphdef: nnx.GraphDef, mesh: Mesh | None = None
) -> Callable[[dict, jax.Array], jax.Array]:
    """(params, tokens [B, L+1] int32) -> the loss of every target, [B, L] float32, in nats; see `make_train_step`."""

    def eval_step(params: dict, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        inputs, targets = into_order(tokens[:, :-1], mesh), into_order(tokens[:, 1:], mesh)
        hidden = model.hidden(inputs, positions=token_order(inputs.shape[1], mesh), mesh=mesh)
        return out_of_order(token_losses(model, hidden, targets, config.train.logits_chunk, mesh), mesh)

    return eval_step


def make_chunk_step(config: ConfigDict, graphdef: nnx.GraphDef) -> Callable[..., tuple[jax.Array, KVCache]]:
    """(params, cache, tokens [B, C+1]) -> (losses [B, C], longer cache): `make_eval_step` of a part of a longer text.

    The cache holds the tokens of the text before these.
    """

    def chunk_step(params: dict, cache: KVCache, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
        model = nnx.merge(graphdef, params)
        hidden, cache = model.extend(tokens[:, :-1], cache)
        return token_losses(model, hidden, tokens[:, 1:], config.train.logits_chunk), cache

    return chunk_step


def count_parameters(params: dict) -> int:
    """Learned numbers in all."""
    return sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(params))
