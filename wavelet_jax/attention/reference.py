"""The reference: attention with the full score matrix, in quadratic memory. Other backends are tested against it."""

import math

import jax
import jax.numpy as jnp

from wavelet_jax.attention import common
from wavelet_jax.attention.call import Call
from wavelet_jax.attention.common import einsum


def unsupported(call: Call) -> list[str]:
    """Reasons why this backend does not support a call: none, ever."""
    return []


def attend(query_BxTxHxD: jax.Array, key_BxSxKxD: jax.Array, value_BxSxKxD: jax.Array, call: Call) -> jax.Array:
    """Softmax attention as `Terms` states it (Eq. 10 for the wavelet), scores and softmax in float32.

    Args:
      query_BxTxHxD, key_BxSxKxD, value_BxSxKxD: queries and keys already rotated; K divides H.
      call: with the positions of queries and keys.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """

    def compute(query, key, value, added, distance, segment_ids, mask, dropout_key):
        visible = _visible(distance, call.causal, call.window, segment_ids, mask)
        return _attend(query, key, value, added, visible, distance.ndim == 3, call.dropout_rate, dropout_key)

    if call.offset is None:
        query_positions, key_positions = (jnp.asarray(positions) for positions in _positions(call))
    else:  # not from arrays that are known, of which XLA would make one constant of queries x keys
        query_positions = call.offset + jnp.arange(call.queries, dtype=jnp.int32)
        key_positions = jnp.arange(call.keys, dtype=jnp.int32)
    distance = query_positions[..., :, None] - key_positions[..., None, :]  # [T, S] or [B, T, S]
    added = common.evaluate(call.terms, distance)
    arrays = query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, added, distance, call.segment_ids, call.mask, call.dropout_key
    return common.in_auto_mode(compute, *arrays)


def _positions(call: Call) -> tuple[common.Array, common.Array]:
    assert call.query_positions is not None
    assert call.key_positions is not None
    return call.query_positions, call.key_positions


def _visible(distance: jax.Array, causal: bool, window: int | None, segment_ids, mask) -> jax.Array | None:
    """Which keys a query sees, bool, broadcastable to [B, H, T, S]; None: all."""
    distance = distance.reshape(-1, 1, *distance.shape[-2:])  # [B or 1, 1, T, S]
    others = [] if mask is None else [mask]
    if segment_ids is not None:
        query_segments, key_segments = segment_ids
        others = [query_segments[:, None, :, None] == key_segments[:, None, None, :], *others]
    return common.visible(distance, causal=causal, window=window, others=others)


def _attend(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    added: common.Added,
    visible: jax.Array | None,
    by_batch: bool,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """`attend` with what the terms add as arrays, [.., T, S, D], or [.., B, T, S, D] where `by_batch`."""
    group = query_BxTxHxD.shape[2] // key_BxSxKxD.shape[2]
    key_BxSxHxD, value_BxSxHxD = (jnp.repeat(x, group, axis=2) for x in (key_BxSxKxD, value_BxSxKxD))
    batch = "b" if by_batch else ""

    def einsum_axes(vectors: jax.Array) -> str:
        """The einsum letters of vectors [..distance.., D] or [H, ..distance.., D]."""
        return ("h" if vectors.ndim == by_batch + 4 else "") + batch + "tsd"

    with jax.named_scope("scores"):
        query = common.plus_bias(query_BxTxHxD, added.content_bias)
        scores_BxHxTxS = einsum("bthd,bshd->bhts", query, key_BxSxHxD)
        if added.relative_keys is not None:
            query = common.plus_bias(query_BxTxHxD, added.position_bias)
            scores_BxHxTxS += einsum(f"bthd,{einsum_axes(added.relative_keys)}->bhts", query, added.relative_keys)
        scores_BxHxTxS /= math.sqrt(query.shape[-1])
        if added.bias is not None:  # [H, T, S] or [H, B, T, S]
            bias = jnp.moveaxis(added.bias, 1, 0) if by_batch else added.bias[None]
            scores_BxHxTxS += bias.astype(jnp.float32)

    with jax.named_scope("softmax"):
        weights = common.softmax(scores_BxHxTxS, visible)
        if dropout_rate > 0:
            assert dropout_key is not None
            kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
            weights = jnp.where(kept, weights / (1 - dropout_rate), 0)

    with jax.named_scope("values"):
        out_BxTxHxD = einsum("bhts,bshd->bthd", weights, value_BxSxHxD)
        if added.relative_values is not None:
            out_BxTxHxD += einsum(f"bhts,{einsum_axes(added.relative_values)}->bthd", weights, added.relative_values)
    return out_BxTxHxD.astype(value_BxSxKxD.dtype)


def array_shapes(call: Call, batch: int) -> list[tuple[int, ...]]:
    """Shapes of the float32 arrays of queries x keys that `attend` makes: scores, weights, and the terms' own."""
    scores = (batch, call.heads, call.queries, call.keys)
    by_batch = max(positions.ndim for positions in _positions(call)) == 2
    distance = jax.ShapeDtypeStruct(scores[:1] * by_batch + scores[2:], jnp.int32)
    functions = (call.terms.relative_keys, call.terms.bias, call.terms.relative_values)
    return [scores, scores, *(jax.eval_shape(function, distance).shape for function in functions if function)]
