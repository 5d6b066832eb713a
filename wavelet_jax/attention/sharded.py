"""Attention over a mesh of devices: batch, heads and length are split, and every distance is of global positions.

Inside of `jax.shard_map` each device calls the ordinary backends, kernels too, on its own rows, heads and tokens.
Along the length, keys and values are gathered once a layer and again in its backward pass (so that no layer keeps
them), and their gradients are summed where they belong. Queries stay where they are, as two runs of consecutive
positions in `zigzag` order, by which a causal mask leaves each device the same work. A run is a call whose first
position is traced: the tiled backend visits only keys that it may see, and beyond the wavelets' support adds nothing.

In names: n devices along the length, T = 2 n C tokens in 2 n runs of C; B, H and K are those of one device inside.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from wavelet_jax.attention.api import attention as attention_of_one
from wavelet_jax.attention.arguments import check_terms
from wavelet_jax.attention.common import SAVED_RESIDUALS
from wavelet_jax.errors import UserError
from wavelet_jax.integers import as_int32
from wavelet_jax.positions.terms import Params, Terms


def zigzag(length: int, shards: int) -> np.ndarray:
    """The order in which a sequence lies over `shards` devices: int32 [length], the positions of the tokens in turn.

    Device i of n holds runs i and 2 n - 1 - i of 2 n: one early and one late, whose queries see 2 n + 1 runs of keys
    together, whatever i is ("The Llama 3 Herd of Models", arXiv 2407.21783, section 3.3.2). With one shard it is
    0, 1, 2, ..

    Raises:
      UserError: the length is not a multiple of 2 n.
    """
    if shards == 1:
        return np.arange(length, dtype=np.int32)
    if length % (2 * shards):
        below = length - length % (2 * shards)
        raise UserError(
            f"a length of {length} cannot be split over {shards} devices: it must be a multiple of {2 * shards} "
            f"(two runs per device), such as {f'{below} or ' if below else ''}{below + 2 * shards}"
        )
    runs = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([runs[:shards], runs[: shards - 1 : -1]], axis=1).reshape(-1)


def attention(
    query_BxTxHxD: jax.Array,
    key_BxTxKxD: jax.Array,
    value_BxTxKxD: jax.Array,
    terms_of: Callable[[Params], Terms],
    params: Params,
    positions: np.ndarray | jax.Array,
    *,
    mesh: Mesh | AbstractMesh,
    batch_axes: tuple[str, ...] = (),
    head_axis: str | None = None,
    length_axis: str | None = None,
    causal: bool = True,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """`wavelet_jax.attention.attention` of queries and keys of the same tokens, divided over all devices of a mesh.

    Args:
      query_BxTxHxD, key_BxTxKxD, value_BxTxKxD: global arrays inside of `jax.jit`; K divides H.
      terms_of: gives the `Terms` of the parameters, such as a position method's `terms`; called on each device, since
        `Terms` is not a pytree.
      params: what it is given, whole on each device; their gradients are summed over the mesh.
      positions: [T] or [B, T] of the tokens in the order in which they lie. NumPy positions [T] that come to two
        consecutive runs per device, such as `zigzag`'s, go to every backend that takes a traced first position; any
        others to "reference".
      mesh: its axes are divided as the next three say; an axis that none names repeats the work.
      batch_axes: axes that B is divided over.
      head_axis: axis that H and K are divided over.
      length_axis: axis that T is divided over.
      causal, window, backend: as in `wavelet_jax.attention.attention`.
      segment_ids: [B, T], in the order of the tokens.

    Returns:
      [B, T, H, D] in the value's dtype, divided as the queries are.

    Raises:
      UserError: a size that its axes do not divide, with those that would do, and what `attention` raises.
    """
    shards = mesh.shape[length_axis] if length_axis else 1
    _check(query_BxTxHxD.shape, key_BxTxKxD.shape, mesh, batch_axes, head_axis, shards)
    runs = _runs(positions, shards)
    by_token = PartitionSpec(batch_axes or None, length_axis)
    by_head = PartitionSpec(batch_axes or None, length_axis, head_axis)
    by_position = PartitionSpec(length_axis) if positions.ndim == 1 else by_token
    # Without a length to divide, NumPy positions stay what they are: constants by which attention plans its tiles.
    constant = shards == 1 and not isinstance(positions, Tracer)
    options = {"causal": causal, "window": window, "backend": backend}

    def on_device(params, query, key, value, given_positions: Any, segments) -> jax.Array:
        terms = terms_of(params)
        check_terms(terms, query_BxTxHxD.shape)  # of all devices, before a device takes its own
        if head_axis is not None and mesh.shape[head_axis] > 1:
            terms = _of_heads(terms, lax.axis_index(head_axis) * query.shape[2], query.shape[2])
        own: Any = positions if constant else given_positions
        if length_axis is None or shards == 1:
            return attention_of_one(
                query, key, value, terms, query_positions=own, key_positions=own, segment_ids=segments, **options
            )
        turns = terms.turns_of(own)
        query, key = terms.rotated(query, turns), terms.rotated(key, turns)  # before keys are gathered: each its own
        return _over_length(query, key, value, terms.without_rotation(), own, segments, runs, length_axis, options)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), by_head, by_head, by_head, by_position, by_token),
        out_specs=by_head,
        check_vma=False,  # kernels do not say along which axes their results vary
    )(params, query_BxTxHxD, key_BxTxKxD, value_BxTxKxD, jnp.asarray(as_int32("positions", positions)), segment_ids)


def _over_length(
    query_BxTxHxD: jax.Array,
    key_BxTxKxD: jax.Array,
    value_BxTxKxD: jax.Array,
    terms: Terms,
    positions: jax.Array,
    segments_BxT: jax.Array | None,
    runs: np.ndarray | None,
    axis: str,
    options: dict,
) -> jax.Array:
    """A device's queries over the keys of all devices along `axis`; T is the device's own 2 C tokens.

    Args:
      positions: [T] or [B, T], the device's own.
      runs: the first positions of the 2 n runs as they lie over the devices; None: positions are in no such runs.
    """

    def gathered(x: jax.Array, along: int = 1) -> jax.Array:
        x = lax.all_gather(x, axis, axis=along, tiled=True)
        if runs is None:
            return x
        cut = jnp.split(x, len(runs), axis=along)
        return jnp.concatenate([cut[run] for run in np.argsort(runs)], axis=along)  # by rising position

    # Of the forward pass only this device's own arrays wait for the backward pass, with what backends keep to have
    # their weights again: keys and values are gathered a second time there.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SAVED_RESIDUALS))
    def attend(query, key, value, positions, segments):
        with jax.named_scope("gather"):
            key, value = gathered(key), gathered(value)
            key_segments = None if segments is None else gathered(segments)

            key_positions = gathered(positions, positions.ndim - 1) if runs is None else int(runs.min())

        def of_queries(query, query_positions, query_segments):
            return attention_of_one(
                query,
                key,
                value,
                terms,
                query_positions=query_positions,
                key_positions=key_positions,
                segment_ids=None if key_segments is None else (query_segments, key_segments),
                **options,
            )

        if runs is None:
            return of_queries(query, positions, segments)

        def halves(x: jax.Array) -> jax.Array:
            return jnp.stack(jnp.split(x, 2, axis=1))

        # One after the other by a loop: one program, and the memory of one.
        starts = positions[:: positions.shape[0] // 2]
        xs = halves(query), starts, None if segments is None else halves(segments)
        return jnp.concatenate(list(lax.map(lambda x: of_queries(*x), xs)), axis=1)

    return attend(query_BxTxHxD, key_BxTxKxD, value_BxTxKxD, positions, segments_BxT)


def _runs(positions: np.ndarray | jax.Array, shards: int) -> np.ndarray | None:
    """The first positions of the 2 n runs of tokens, [2 n], where positions are known to be such runs, without gaps."""
    if isinstance(positions, Tracer) or positions.ndim != 1 or len(positions) % (2 * shards):
        return None
    runs = np.asarray(positions).reshape(2 * shards, -1)
    risen = np.sort(runs[:, 0])[:, None] + np.arange(runs.shape[1])
    consecutive = (risen.reshape(-1) == risen[0, 0] + np.arange(risen.size)).all()
    return runs[:, 0] if consecutive and (runs == runs[:, :1] + np.arange(runs.shape[1])).all() else None


def _of_heads(terms: Terms, first: jax.Array, heads: int) -> Terms:
    """The terms of heads first .. first + heads - 1, where a field has one entry per head.

    `first` is traced, and with it a constant table by head (a wavelet grid of one's own for each head), which backends
    then treat as a learned one: the same numbers in more time.
    """

    def take(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else lax.dynamic_slice_in_dim(jnp.asarray(x), first, heads, axis=0)

    def vectors(function):
        def of_heads(distance):
            x = function(distance)
            return take(x) if x.ndim == jnp.ndim(distance) + 2 else x

        return function and of_heads

    bias = terms.bias
    return dataclasses.replace(
        terms,
        relative_keys=vectors(terms.relative_keys),
        relative_values=vectors(terms.relative_values),
        content_bias=take(terms.content_bias),
        position_bias=take(terms.position_bias),
        bias=bias and (lambda distance: take(bias(distance))),
        num_heads=heads,
    )


def _check(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    batch_axes: tuple[str, ...],
    head_axis: str | None,
    shards: int,
) -> None:
    batch, length = query_shape[:2]
    rows = int(np.prod([mesh.shape[axis] for axis in batch_axes], dtype=int))
    if batch % rows:
        raise UserError(f"a batch of {batch} cannot be split over {rows} devices ({' x '.join(batch_axes)})")
    if key_shape[1] != length:
        raise UserError(f"over a mesh, queries and keys are of the same tokens, not of {length} and {key_shape[1]}")
    parts = mesh.shape[head_axis] if head_axis else 1
    if key_shape[2] % parts:
        raise UserError(
            f"{key_shape[2]} key heads cannot be split over {parts} devices ({head_axis}): {divisors(key_shape[2])} can"
        )
    zigzag(length, shards)


def divisors(count: int) -> str:
    """ "1, 2, 3 or 6": the sizes that divide a count."""
    *others, last = [str(size) for size in range(1, count + 1) if count % size == 0]
    return f"{', '.join(others)} or {last}" if others else last
