"""Attention with a position method's `Terms`: one function, one place that chooses what computes it."""

import jax
import jax.numpy as jnp

from wavelet_jax.attention import reference
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.positions.terms import Terms

__all__ = ["BACKENDS", "attention"]

BACKENDS = ("reference",)


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
) -> jax.Array:
    """Attention whose scores hold a position method's terms.

    Args:
      query_BxTxHxD: [B, T, H, D], any float dtype.
      key_BxSxKxD, value_BxSxKxD: [B, S, K, D]; K divides H, and head h reads key head h // (H / K) (grouped queries).
      terms: from `positions.make(...).terms(params)`.
      causal: a query sees keys at its own position and before.
      query_positions, key_positions: integers in tokens, [T] and [S], or [B, T] and [B, S]; 0, 1, 2, .. where
        left out, which takes T = S. With a cache, give the global positions; unfilled slots whose positions
        lie after every query's are then hidden by the causal mask.
      segment_ids: [B, T] (with T = S), or the pair ([B, T], [B, S]): a query sees keys of its own segment only.
      window: a query sees keys at distance less than this only (on both sides where not causal).
      dropout_rate, dropout_key: dropout on the attention probabilities.
      backend: "auto" or one of `BACKENDS`.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.

    Raises:
      UserError: shapes that do not fit, an unknown backend, or what a named backend cannot carry.
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
    query_positions = _positions("query_positions", query_positions, batch, num_queries)
    key_positions = _positions("key_positions", key_positions, batch, num_keys)

    if terms.rotate is not None:
        with jax.named_scope("rotate"):
            query_BxTxHxD = terms.rotate(query_BxTxHxD, query_positions)
            key_BxSxKxD = terms.rotate(key_BxSxKxD, key_positions)

    distance = query_positions[..., :, None] - key_positions[..., None, :]  # [T, S] or [B, T, S]
    visible = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        visible &= jnp.abs(distance) < window
    if segment_ids is not None:
        query_segments, key_segments = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        if query_segments.shape != (batch, num_queries) or key_segments.shape != (batch, num_keys):
            raise UserError(
                f"segment_ids must be [B, T] = ({batch}, {num_queries}) with T = S, or a pair of that and "
                f"[B, S] = ({batch}, {num_keys}), not {query_segments.shape} and {key_segments.shape}"
            )
        visible = visible & (query_segments[:, :, None] == key_segments[:, None, :])

    match backend:
        case "auto" | "reference":
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


def _positions(name: str, positions: jax.Array | None, batch: int, length: int) -> jax.Array:
    """int32 positions [length] or [B, length]; unsigned ones would have no negative distances."""
    positions = jnp.arange(length) if positions is None else jnp.asarray(positions)
    if positions.shape not in ((length,), (batch, length)) or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise UserError(
            f"{name} must be integers of shape ({length},) or ({batch}, {length}), "
            f"not {positions.dtype} of shape {positions.shape}"
        )
    return positions.astype(jnp.int32)


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
