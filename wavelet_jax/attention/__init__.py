"""Attention with a position method's `Terms`: one function, one place that chooses what computes it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from wavelet_jax import memory
from wavelet_jax.attention import decode, reference, tiled
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.positions.terms import Terms

__all__ = ["BACKENDS", "attention"]

BACKENDS = ("reference", "tiled", "decode")

# "auto" takes `tiled` from this many scores a head on (queries x keys). Forward and backward on a CPU, float32, 4 heads
# of 128, the definition takes 1.0 times as long for RoPE and 1.7 times for wavelets at 256 tokens, 1.3 and 2.7 times at
# 512, 1.8 and 3.9 times at 1,024; below 256, where they differ little, it compiles faster.
TILED_FROM = 256 * 256

# "auto" takes `decode` for up to this many queries over more keys: a step of a decoding, or a few drafted tokens.
DECODE_UP_TO = 16

# "auto" raises where `reference` alone can carry a call, and its arrays of queries x keys would need more than this
# share of the memory; less than the floor is never refused. The caller may want the rest, and a gradient needs more.
REFERENCE_SHARE = 0.25
REFERENCE_FLOOR = 2**28  # bytes


def attention(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    terms: Terms,
    *,
    causal: bool = True,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    backend: str = "auto",
    far_tolerance: float | None = None,
) -> jax.Array:
    """Attention whose scores hold a position method's terms.

    Args:
      query_BxTxHxD: [B, T, H, D], any float dtype.
      key_BxSxKxD, value_BxSxKxD: [B, S, K, D]; K divides H, and head h reads key head h // (H / K) (grouped queries).
      terms: from `positions.make(...).terms(params)`.
      causal: a query sees keys at its own position and before.
      query_positions, key_positions: integers in tokens, [T] and [S], or [B, T] and [B, S]; or a scalar, the first of
        consecutive positions (traced, say, in a loop over chunks); 0, 1, 2, .. where left out, which takes T = S.
        With a cache, give the global positions; unfilled slots whose positions lie after every query's are then
        hidden by the causal mask. "tiled" and "decode" take consecutive positions only: scalars, or arrays that are
        not traced.
      segment_ids: [B, T] (with T = S), or the pair ([B, T], [B, S]): a query sees keys of its own segment only.
      window: a query sees keys at distance less than this only (on both sides where not causal).
      dropout_rate, dropout_key: dropout on the attention probabilities.
      backend: "auto" or one of `BACKENDS`: "reference" is the definition, with memory quadratic in length, "tiled"
        computes the same in linear memory, and "decode" is for few queries. "auto" takes "decode" for up to
        `DECODE_UP_TO` queries over more keys, and "tiled" for long sequences, where they can.
      far_tolerance: of "tiled" and "decode": no entry of a constant `relative_keys` is wrong by more than this; None
        for `tiled.FAR_TOLERANCE` of the query's dtype.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key. Sums are float32; "tiled" and "decode"
      round the softmax weights to the value's dtype for their product with it.

    Raises:
      UserError: shapes that do not fit, an unknown backend, what a named backend cannot carry, or what "auto" could
        compute in quadratic memory only, and more of it than `REFERENCE_SHARE`.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise unknown("attention backend", backend, ("auto", *BACKENDS))
    _check_shapes(query_BxTxHxD, key_BxSxKxD, value_BxSxKxD)
    (batch, num_queries, num_heads, _), (_, num_keys, num_kv_heads, _) = query_BxTxHxD.shape, key_BxSxKxD.shape
    if (query_positions is None or key_positions is None) and num_queries != num_keys:
        raise UserError(
            f"{num_queries} queries and {num_keys} keys have no distances of themselves: "
            "give query_positions and key_positions"
        )
    if not 0 <= dropout_rate < 1:
        raise UserError(f"attention's dropout_rate must be at least 0 and below 1, not {dropout_rate}")
    if dropout_rate > 0 and dropout_key is None:
        raise UserError("attention dropout needs a dropout_key")
    if window is not None and window < 1:
        raise UserError(f"attention's window must be at least 1 (a query's own position), not {window}")
    if far_tolerance is not None and not far_tolerance > 0:
        raise UserError(f"far_tolerance must be above 0, not {far_tolerance}")
    query_positions, query_start = _positions("query_positions", query_positions, batch, num_queries)
    key_positions, key_start = _positions("key_positions", key_positions, batch, num_keys)
    if segment_ids is not None:
        segment_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        query_segments, key_segments = segment_ids
        if query_segments.shape != (batch, num_queries) or key_segments.shape != (batch, num_keys):
            raise UserError(
                f"segment_ids must be [B, T] = ({batch}, {num_queries}) with T = S, or a pair of that and "
                f"[B, S] = ({batch}, {num_keys}), not {query_segments.shape} and {key_segments.shape}"
            )
    consecutive = query_start is not None and key_start is not None
    chosen, obstacles = _choose(backend, num_queries, num_keys, consecutive, dropout_rate)

    if terms.rotate is not None:
        with jax.named_scope("rotate"):
            query_BxTxHxD = terms.rotate(query_BxTxHxD, query_positions)
            key_BxSxKxD = terms.rotate(key_BxSxKxD, key_positions)

    match chosen:
        case "tiled" | "decode":
            compute = tiled.attention if chosen == "tiled" else decode.attention
            return compute(
                query_BxTxHxD,
                key_BxSxKxD,
                value_BxSxKxD,
                terms,
                offset=query_start - key_start,
                causal=causal,
                segment_ids=segment_ids,
                window=window,
                far_tolerance=far_tolerance,
            )
        case "reference":
            distance = query_positions[..., :, None] - key_positions[..., None, :]  # [T, S] or [B, T, S]
            if obstacles and backend == "auto":
                _check_memory(reference.array_shapes(batch, num_heads, terms, distance.shape), obstacles)
            visible = distance >= 0 if causal else jnp.ones_like(distance, bool)
            if window is not None:
                visible &= jnp.abs(distance) < window
            if segment_ids is not None:
                visible = visible & (segment_ids[0][:, :, None] == segment_ids[1][:, None, :])
            group = num_heads // num_kv_heads
            return reference.attention(
                query_BxTxHxD,
                jnp.repeat(key_BxSxKxD, group, axis=2),
                jnp.repeat(value_BxSxKxD, group, axis=2),
                terms,
                distance,
                visible,
                dropout_rate=dropout_rate,
                dropout_key=dropout_key,
            )


def _positions(
    name: str, positions: jax.Array | int | None, batch: int, length: int
) -> tuple[jax.Array, int | jax.Array | None]:
    """Positions [length] or [B, length], and the first of them where they are known to be consecutive, or else None.

    In int32: unsigned positions would have no negative distances.
    """
    positions = 0 if positions is None else positions
    traced = isinstance(positions, jax.core.Tracer)
    positions = positions if traced else np.asarray(positions)
    if positions.shape not in ((), (length,), (batch, length)) or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise UserError(
            f"{name} must be integers of shape ({length},) or ({batch}, {length}), or one integer, the first of "
            f"consecutive positions, not {positions.dtype} of shape {positions.shape}"
        )
    positions = positions.astype(jnp.int32)
    if traced and positions.ndim:
        return positions, None
    if positions.ndim == 0:
        start = positions if traced else int(positions)
        return start + jnp.arange(length, dtype=jnp.int32), start
    start = int(positions.flat[0]) if positions.size else 0
    if (positions == np.arange(start, start + length)).all():
        return jnp.arange(start, start + length, dtype=jnp.int32), start
    return jnp.asarray(positions), None


def _choose(
    backend: str, num_queries: int, num_keys: int, consecutive: bool, dropout_rate: float
) -> tuple[str, list[str]]:
    """The backend of a call, and what keeps it from all others but "reference".

    Raises `UserError` for what a named one cannot carry.
    """
    obstacles = []
    if not consecutive:
        obstacles.append("consecutive positions (leave them out, give scalars, or give arrays that are not traced)")
    if dropout_rate > 0:
        obstacles.append("no attention dropout")
    if backend in ("tiled", "decode") and obstacles:
        raise UserError(f"the {backend} backend needs {' and '.join(obstacles)}: use backend='reference'")
    if backend != "auto":
        return backend, obstacles
    scores = num_queries * num_keys
    if obstacles:
        chosen, reason = "reference", f"others need {' and '.join(obstacles)}"
    elif num_queries <= DECODE_UP_TO and num_queries < num_keys:
        chosen, reason = "decode", f"at most {DECODE_UP_TO} queries"
    elif scores < TILED_FROM:
        chosen, reason = "reference", f"fewer than {TILED_FROM} scores a head"
    else:
        chosen, reason = "tiled", f"at least {TILED_FROM} scores a head: linear memory"
    _say_once(f"attention backend: {chosen} ({reason})")
    return chosen, obstacles


def _check_memory(shapes: list[tuple[int, ...]], obstacles: list[str]) -> None:
    """Raises `UserError` where float32 arrays of these shapes need more than `REFERENCE_SHARE` of the memory."""
    count = sum(4 * math.prod(shape) for shape in shapes)
    if count <= REFERENCE_FLOOR:
        return
    limit, owner = memory.available()
    if count > REFERENCE_SHARE * limit:
        raise UserError(
            f"only the reference backend can compute this, in arrays of queries x keys, "
            f"{', '.join(str(list(shape)) for shape in shapes)} in float32: {memory.shown(count)}, more than "
            f"{REFERENCE_SHARE:.0%} of the {memory.shown(limit)} of {owner}. The backends of linear memory need "
            f"{' and '.join(obstacles)}; backend='reference' computes it as it is"
        )


@functools.cache
def _say_once(message: str) -> None:
    logging.info(message)


def _check_shapes(query_BxTxHxD: jax.Array, key_BxSxKxD: jax.Array, value_BxSxKxD: jax.Array) -> None:
    shapes = f"query {query_BxTxHxD.shape}, key {key_BxSxKxD.shape}, value {value_BxSxKxD.shape}"
    if not query_BxTxHxD.ndim == key_BxSxKxD.ndim == value_BxSxKxD.ndim == 4:
        raise UserError(f"attention takes [batch, length, heads, head_dim]: {shapes}")
    if key_BxSxKxD.shape != value_BxSxKxD.shape or (query_BxTxHxD.shape[0], query_BxTxHxD.shape[3]) != (
        key_BxSxKxD.shape[0],
        key_BxSxKxD.shape[3],
    ):
        raise UserError(f"batch and head_dim must agree, and key and value be of one shape: {shapes}")
    if query_BxTxHxD.shape[2] % key_BxSxKxD.shape[2]:
        raise UserError(f"key heads must divide query heads: {shapes}")
