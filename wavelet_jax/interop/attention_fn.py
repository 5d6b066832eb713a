"""Shared by both `PositionAttention`s: from the arguments that Flax's attention modules pass to those of `attention()`.

A Flax attention module knows masks, and no positions; a position method needs positions, and in linear memory no dense
masks. What the one cannot say to the other is refused here, never guessed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from wavelet_jax.attention import attention
from wavelet_jax.attention.arguments import dropout_of
from wavelet_jax.attention.common import Array
from wavelet_jax.errors import UserError
from wavelet_jax.positions.terms import Params, PositionMethod, Terms


def attend(
    method: PositionMethod,
    params: Params,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool,
    window: int | None,
    backend: str,
    mask: Any,
    input_positions: jax.Array | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    broadcast_dropout: bool,
    dtype: jax.typing.DTypeLike | None,
    sow_weights: bool,
) -> jax.Array:
    """Attention with a method's terms, as a Flax module asks for it.

    Args:
      method, params: the position method, and its parameters.
      query, key, value: [batch.., T, H, D] and [batch.., S, K, D], any number of batch axes, none too.
      causal, window, backend: as in `wavelet_jax.attention.attention`.
      mask: broadcastable to [batch.., H, T, S], of any dtype; 0 hides a key.
      input_positions: [batch.., T] or [T], tokens; with T = S those of the keys too, otherwise the keys are slots of a
        cache: 0, 1, 2, .. None: 0, 1, 2, .. for T = S; for the one query of a causal module that decodes, the last
        slot that the mask shows to any row, which is the module's cache index as long as some row sees its own token.
      dropout_rate, dropout_key: dropout on the attention probabilities; a rate of 0 is none.
      broadcast_dropout: what the module says of it; ours drops every weight by itself.
      dtype: queries, keys and values are cast to it; None: left as they are.
      sow_weights: whether the module asks for the weights.

    Returns:
      [batch.., T, H, D] in the value's dtype (after the cast); zeros for a query that sees no key.

    Raises:
      UserError: what cannot be carried, in one line that says what can.
    """
    terms = terms_of(method, params)
    if sow_weights:
        raise UserError("sow_weights: attention with positions does not keep its weights; leave it out")
    dropout_rate = dropout_of(dropout_rate, dropout_key)
    if dropout_rate > 0 and broadcast_dropout:
        raise UserError(
            "attention dropout is not broadcast over batch and heads: give the module broadcast_dropout=False"
        )

    batch, num_queries, num_keys = query.shape[:-3], query.shape[-3], key.shape[-3]
    query_BxTxHxD, key_BxSxKxD, value_BxSxKxD = (
        _one_batch_axis(x if dtype is None else x.astype(dtype), batch, 3) for x in (query, key, value)
    )
    if mask is not None:
        mask = _one_batch_axis(mask.astype(bool), batch, 3)
        if mask.shape[1:3] != (1, 1) and backend != "reference":
            raise UserError(
                "a mask that differs by head or query needs the full score matrix: give PositionAttention "
                "backend='reference' (memory quadratic in length), or say it by its causal and window, and a padding "
                "mask [batch.., 1, 1, S]"
            )
    query_positions, key_positions = _positions(
        input_positions, mask, batch, (num_queries, num_keys), causal=causal, backend=backend
    )
    out_BxTxHxD = attention(
        query_BxTxHxD,
        key_BxSxKxD,
        value_BxSxKxD,
        terms,
        causal=causal,
        query_positions=query_positions,
        key_positions=key_positions,
        window=window,
        mask=mask,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        backend=backend,
    )
    return out_BxTxHxD.reshape(*batch, *out_BxTxHxD.shape[1:])


def _positions(
    input_positions: Array | None,
    mask_BxHxTxS: jax.Array | None,
    batch: tuple[int, ...],
    shape: tuple[int, int],
    *,
    causal: bool,
    backend: str,
) -> tuple[Array | int | None, Array | int | None]:
    """`query_positions` and `key_positions` of `attention()` for (T, S) = `shape`; see `attend`."""
    num_queries, num_keys = shape
    if input_positions is not None:
        if not isinstance(input_positions, Tracer):
            # NumPy stays a constant under jit, so that attention() sees whether positions are consecutive.
            input_positions = np.asarray(input_positions)
        elif num_queries > 1 and backend == "auto":
            raise UserError(
                "input_positions that are traced may have gaps, which needs the full score matrix: give NumPy ones, or "
                "PositionAttention backend='reference' (memory quadratic in length)"
            )
        query_positions = _one_batch_axis(input_positions, batch, 1)
        if len(query_positions) == 1:  # the same for all rows
            query_positions = query_positions[0]
        if query_positions.shape == (1,) == (num_queries,):  # also a traced one is consecutive
            query_positions = query_positions[0]
        return query_positions, query_positions if num_queries == num_keys else 0
    if num_queries == num_keys:
        return None, None
    if not (causal and num_queries == 1 and mask_BxHxTxS is not None):
        raise UserError(
            f"the positions of {num_queries} queries and {num_keys} keys cannot be inferred: decoding with the "
            "module's cache needs PositionAttention(.., causal=True), and cross-attention needs Flax's own attention_fn"
        )
    return _last_visible(mask_BxHxTxS, num_keys), 0


def terms_of(method: PositionMethod, params: Params) -> Terms:
    """The method's terms. Raises `UserError` for one that adds to the token embedding."""
    terms = method.terms(params)
    if terms.embed is not None:
        raise UserError(
            f"{type(method).__name__} adds its positions to the token embedding, which an attention_fn never sees: add "
            "method.terms(params).embed(positions) there, and keep Flax's own attention_fn"
        )
    return terms


def _one_batch_axis(x: Any, batch: tuple[int, ...], rest: int) -> Any:
    """[batch.., + `rest` axes] -> [B, + `rest` axes]; [1, + `rest` axes] where all the batch shares it."""
    shape = (1,) * (len(batch) + rest - x.ndim) + x.shape
    lead, own = shape[: len(shape) - rest], shape[len(shape) - rest :]
    if len(lead) != len(batch) or any(have not in (1, want) for have, want in zip(lead, batch, strict=True)):
        raise UserError(f"a mask or positions of shape {x.shape} do not go with queries of batch {batch}")
    if math.prod(lead) == 1:
        return x.reshape(1, *own)
    numpy = np if isinstance(x, np.ndarray) else jnp
    return numpy.broadcast_to(x, (*batch, *own)).reshape(-1, *own)


def _last_visible(mask_BxHx1xS: jax.Array, num_keys: int) -> jax.Array:
    """The last key that any row or head sees, int32.

    Flax's modules do not pass the index of their cache on, but they hide the slots after it.
    """
    seen_S = jnp.any(mask_BxHx1xS, axis=(0, 1, 2))
    return jnp.max(jnp.where(seen_S, jnp.arange(num_keys, dtype=jnp.int32), -1))
