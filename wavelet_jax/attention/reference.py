"""Attention by its definition: the full score matrix, memory quadratic in length. Other backends are held to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.positions.terms import Terms

# Products are accumulated in float32, whatever the dtype of their operands, and float32 ones are not cut to the shorter
# formats that accelerators take by default.
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")


def attention(
    query_BxTxHxD: jax.Array,
    key_BxSxHxD: jax.Array,
    value_BxSxHxD: jax.Array,
    terms: Terms,
    distance: jax.Array,
    visible: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention as `Terms` writes it (Eq. 10 for the wavelet), scores and softmax in float32.

    Args:
      query_BxTxHxD, key_BxSxHxD: rotated already; keys and values repeated to all heads.
      value_BxSxHxD: values.
      terms: what the position method adds.
      distance: query position minus key position, [T, S] or [B, T, S], int32.
      visible: which keys a query may see, broadcastable to [B, H, T, S].
      dropout_rate, dropout_key: dropout on the attention probabilities.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """
    batch = "b" if distance.ndim == 3 else ""

    def by_distance(vectors: jax.Array) -> str:
        """The einsum letters of vectors [..distance.., D] or [H, ..distance.., D]."""
        return ("h" if vectors.ndim == distance.ndim + 2 else "") + batch + "tsd"

    with jax.named_scope("scores"):
        query = query_BxTxHxD if terms.content_bias is None else query_BxTxHxD + terms.content_bias
        scores_BxHxTxS = _einsum("bthd,bshd->bhts", query, key_BxSxHxD)
        if terms.relative_keys is not None:
            query = query_BxTxHxD if terms.position_bias is None else query_BxTxHxD + terms.position_bias
            vectors = terms.relative_keys(distance)
            scores_BxHxTxS += _einsum(f"bthd,{by_distance(vectors)}->bhts", query, vectors)
        scores_BxHxTxS /= np.sqrt(query.shape[-1])
        if terms.bias is not None:
            bias = terms.bias(distance)  # [H, T, S] or [H, B, T, S]
            scores_BxHxTxS += jnp.moveaxis(bias, 1, 0) if batch else bias

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
        if terms.relative_values is not None:
            vectors = terms.relative_values(distance)
            out_BxTxHxD += _einsum(f"bhts,{by_distance(vectors)}->bthd", weights, vectors)
    return out_BxTxHxD.astype(value_BxSxHxD.dtype)


def array_shapes(batch: int, num_heads: int, terms: Terms, distance_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the float32 arrays of queries x keys that `attention` makes: scores, weights, and the terms' own."""
    scores = (batch, num_heads, *distance_shape[-2:])
    distance = jax.ShapeDtypeStruct(distance_shape, jnp.int32)
    functions = (terms.relative_keys, terms.bias, terms.relative_values)
    return [scores, scores, *(jax.eval_shape(function, distance).shape for function in functions if function)]
