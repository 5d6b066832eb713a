"""Attention by its definition: the full score matrix, memory quadratic in length. Other backends are held to it."""

import functools
import math

import jax
import jax.numpy as jnp

from wavelet_jax.attention import common
from wavelet_jax.positions.terms import Terms

# Float32 products are not cut to the shorter formats that accelerators take by default.
_einsum = functools.partial(common.einsum, precision="highest")


def attention(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    terms: Terms,
    distance: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention as `Terms` writes it (Eq. 10 for the wavelet), scores and softmax in float32.

    Args:
      query_BxTxHxD, key_BxSxKxD, value_BxSxKxD: queries and keys rotated already; K divides H.
      terms: what the position method adds.
      distance: query position minus key position, [T, S] or [B, T, S], int32.
      causal, window: as in `wavelet_jax.attention.attention`.
      segment_ids: ([B, T], [B, S]) or None.
      mask: bool [B or 1, H or 1, T or 1, S or 1] or None; False hides a key.
      dropout_rate, dropout_key: dropout on the attention probabilities.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """

    def attend(query, key, value, added, distance, segment_ids, mask, dropout_key):
        visible = _visible(distance, causal, window, segment_ids, mask)
        return _attend(query, key, value, added, visible, distance.ndim == 3, dropout_rate, dropout_key)

    added = common.evaluate(terms, distance)
    arrays = query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, added, distance, segment_ids, mask, dropout_key
    return common.in_auto_mode(attend, *arrays)


def _visible(distance: jax.Array, causal: bool, window: int | None, segment_ids, mask) -> jax.Array:
    """Which keys a query sees, bool, broadcastable to [B, H, T, S]."""
    distance = distance.reshape(-1, 1, *distance.shape[-2:])  # [B or 1, 1, T, S]
    visible = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        visible &= jnp.abs(distance) < window
    if segment_ids is not None:
        query_segments, key_segments = segment_ids
        visible = visible & (query_segments[:, None, :, None] == key_segments[:, None, None, :])
    return visible if mask is None else visible & mask


def _attend(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    added: common.Added,
    visible: jax.Array,
    by_batch: bool,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """`attention` with what the terms add as arrays, [.., T, S, D], or [.., B, T, S, D] where `by_batch`."""
    group = query_BxTxHxD.shape[2] // key_BxSxKxD.shape[2]
    key_BxSxHxD, value_BxSxHxD = (jnp.repeat(x, group, axis=2) for x in (key_BxSxKxD, value_BxSxKxD))
    batch = "b" if by_batch else ""

    def letters(vectors: jax.Array) -> str:
        """The einsum letters of vectors [..distance.., D] or [H, ..distance.., D]."""
        return ("h" if vectors.ndim == by_batch + 4 else "") + batch + "tsd"

    with jax.named_scope("scores"):
        query = common.plus_bias(query_BxTxHxD, added.content_bias)
        scores_BxHxTxS = _einsum("bthd,bshd->bhts", query, key_BxSxHxD)
        if added.relative_keys is not None:
            query = common.plus_bias(query_BxTxHxD, added.position_bias)
            scores_BxHxTxS += _einsum(f"bthd,{letters(added.relative_keys)}->bhts", query, added.relative_keys)
        scores_BxHxTxS /= math.sqrt(query.shape[-1])
        if added.bias is not None:  # [H, T, S] or [H, B, T, S]
            bias = jnp.moveaxis(added.bias, 1, 0) if by_batch else added.bias[None]
            scores_BxHxTxS += bias.astype(jnp.float32)

    with jax.named_scope("softmax"):
        scores_BxHxTxS = jnp.where(visible, scores_BxHxTxS, -jnp.inf)
        # A query that sees nothing has a row of -inf only; 0 for its maximum and 1 for its sum keep NaN out.
        highest = jax.lax.stop_gradient(jnp.max(scores_BxHxTxS, axis=-1, keepdims=True))
        weights = jnp.exp(scores_BxHxTxS - jnp.where(jnp.isfinite(highest), highest, 0))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights /= jnp.where(total > 0, total, 1)
        if dropout_rate > 0:
            kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
            weights = jnp.where(kept, weights / (1 - dropout_rate), 0)

    with jax.named_scope("values"):
        out_BxTxHxD = _einsum("bhts,bshd->bthd", weights, value_BxSxHxD)
        if added.relative_values is not None:
            out_BxTxHxD += _einsum(f"bhts,{letters(added.relative_values)}->bthd", weights, added.relative_values)
    return out_BxTxHxD.astype(value_BxSxKxD.dtype)


def array_shapes(batch: int, num_heads: int, terms: Terms, distance_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the float32 arrays of queries x keys that `attention` makes: scores, weights, and the terms' own."""
    scores = (batch, num_heads, *distance_shape[-2:])
    distance = jax.ShapeDtypeStruct(distance_shape, jnp.int32)
    functions = (terms.relative_keys, terms.bias, terms.relative_values)
    return [scores, scores, *(jax.eval_shape(function, distance).shape for function in functions if function)]
