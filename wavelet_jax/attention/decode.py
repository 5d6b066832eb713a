"""Attention of few queries over many keys, as in decoding from a key-value cache: one product with all scores at once.

Scores [T, S] come from the cached layout [B, S, K, D], grouped queries and no repeated key heads. Positions are
consecutive, so distances fall along a row of scores and rise down a column: what depends on them is evaluated once for
T + S distances, [n], and skewed to [T, S]. A constant table of relative keys (wavelets that are not trained) is not
evaluated at all: its numbers within the support are in the program, times the queries they are a band of scores, and
the band is added at its place. Its arithmetic is the same whatever S is.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wavelet_jax.attention import common
from wavelet_jax.attention.call import Call, unsupported_by_tiles
from wavelet_jax.attention.common import einsum, split_heads
from wavelet_jax.attention.relative import factors, tables
from wavelet_jax.attention.tiled.skew import skew, unskew
from wavelet_jax.positions.terms import Terms


def unsupported(call: Call) -> list[str]:
    """Reasons why this backend does not support a call; empty if it does."""
    return unsupported_by_tiles(call)


def attend(query_BxTxHxD: jax.Array, key_BxSxKxD: jax.Array, value_BxSxKxD: jax.Array, call: Call) -> jax.Array:
    """Softmax attention as `Terms` states it, scores and softmax in float32; positions are consecutive on both sides.

    Args:
      query_BxTxHxD, key_BxSxKxD, value_BxSxKxD: queries and keys already rotated; K divides H. Memory is that of
        scores [B, H, T, S]: T should be small.
      call: one with an offset, an int or a traced int32 scalar.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """
    added, band, offset, window = _prepare(call)

    def compute(query, key, value, added, offset, segment_ids):
        (batch, T, H, D), K = query.shape, key.shape[2]
        weights = _weights(query, key, added, band, offset, call.causal, window, segment_ids)
        with jax.named_scope("values"):
            out_BxTxKxGxD = einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
            if added.relative_values is not None:
                table, heads = _by_kv_head(added.relative_values, 3, K)
                out_BxTxKxGxD += einsum(f"bkgte,{heads}ed->btkgd", unskew(weights), table)
        return out_BxTxKxGxD.reshape(batch, T, H, D).astype(value.dtype)

    return common.in_auto_mode(compute, query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, added, offset, call.segment_ids)


def probabilities(query_BxTxHxD: jax.Array, key_BxSxKxD: jax.Array, call: Call) -> jax.Array:
    """The weights that `attend` gives the values, [B, K, H/K, T, S] float32.

    Rows sum to 1, or to 0 for a query that sees no key.
    """
    added, band, offset, window = _prepare(call)
    return _weights(query_BxTxHxD, key_BxSxKxD, added, band, offset, call.causal, window, call.segment_ids)


class _Band(NamedTuple):
    """A constant `relative_keys` within its support."""

    near: factors.Near
    furthest: int  # the distance of its first row


def _prepare(call: Call) -> tuple[common.Added, _Band | None, jax.Array, int | None]:
    """(what the terms add at all distances, or their band; the offset, int32; the window, None if it hides nothing).

    `relative_keys` are in the band if there is one, and otherwise among what is added.
    """
    T, S, window = call.queries, call.keys, call.window
    known = call.offset
    if window is not None and isinstance(known, int) and max(known + T, S - known) <= window:
        window = None
    offset = jnp.asarray(call.clamped_offset, jnp.int32)
    band = _near(call.terms, T + S, call.causal, call.tolerance)
    added = common.evaluate(call.terms, _distances(T, S, offset, call.causal), relative_keys=band is None)
    return added, band, offset, window


def _weights(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    added: common.Added,
    band: _Band | None,
    offset: jax.Array,
    causal: bool,
    window: int | None,
    segment_ids: tuple[common.Array, common.Array] | None,
) -> jax.Array:
    """The softmax weights, [B, K, G, T, S] float32."""
    (batch, T, H, D), (_, S, K, _) = query_BxTxHxD.shape, key_BxSxKxD.shape

    def grouped(bias_HxD: jax.Array | None) -> jax.Array:
        return common.plus_bias(query_BxTxHxD, bias_HxD).reshape(batch, T, K, H // K, D)

    with jax.named_scope("scores"):
        scores_BxKxGxTxS = einsum("btkgd,bskd->bkgts", grouped(added.content_bias), key_BxSxKxD)
        if added.relative_keys is not None:
            table, heads = _by_kv_head(added.relative_keys, 3, K)
            G = einsum(f"btkgd,{heads}ed->bkgte", grouped(added.position_bias), table)
            scores_BxKxGxTxS += skew(G, S)
        if band is not None:
            query = grouped(added.position_bias)
            if band.near.project is not None:
                project, heads = _by_kv_head(band.near.project, 3, K)
                query = einsum(f"btkgd,{heads}dc->btkgc", query, project)
            rows, heads = _by_kv_head(band.near.rows, 3, K)
            G = einsum(f"btkgc,{heads}ec->bkgte", query, rows)
            scores_BxKxGxTxS = _add_band(scores_BxKxGxTxS, G, band.furthest, offset)
        scores_BxKxGxTxS /= math.sqrt(D)
        if added.bias is not None:
            bias, _ = _by_kv_head(added.bias.astype(jnp.float32), 2, K)  # [K, G, n]
            scores_BxKxGxTxS += skew(jnp.broadcast_to(bias[..., None, :], (*bias.shape[:2], T, T + S)), S)[None]

    with jax.named_scope("softmax"):
        return common.softmax(scores_BxKxGxTxS, _visible(T, S, offset, causal, window, segment_ids))


def _by_kv_head(table: common.Array, with_heads: int, num_kv_heads: int) -> tuple[jax.Array, str]:
    """[K, G, ..] or [..], and the einsum letters of its heads."""
    return split_heads(table, with_heads, num_kv_heads), "kg" if table.ndim == with_heads else ""


def _distances(T: int, S: int, offset: jax.Array, causal: bool) -> jax.Array:
    """The distances of all queries and keys, falling by one: int32 [T + S], one more than occur, for `skew`.

    Distances that only hidden pairs have, and the one more, are replaced by ones that a query and a key do have: no
    method is asked for more.
    """
    lowest, highest = offset - (S - 1), offset + (T - 1)
    if causal:
        lowest, highest = jnp.maximum(lowest, 0), jnp.maximum(highest, 0)
    return jnp.clip(offset + (T - 1) - jnp.arange(T + S, dtype=jnp.int32), lowest, highest)


def _near(terms: Terms, length: int, causal: bool, tolerance: float) -> _Band | None:
    """The band of a constant relative_keys; None where it is learned, or where its support is much past the length.

    It does not depend on the offset, so that one program serves every step of a decoding.
    """
    if not tables.are_known(terms):
        return None
    reach = tables.support_at(terms, tolerance, margin=1)
    if reach is None or reach > length + tables.MAX_FACTOR_DISTANCE:
        return None
    table = tables.evaluate(terms, reach, -1 if causal else -reach - 1)
    past = np.flatnonzero(np.max(np.abs(table), axis=-1).reshape(-1, table.shape[-2]).max(axis=0) > tolerance)
    highest, lowest = (reach - int(past[0]), reach - int(past[-1])) if past.size else (0, 0)
    highest, lowest = max(highest, 0), 0 if causal else min(lowest, 0)
    # The near form of a tile of one row, with all of the support in its local band.
    after = None if causal else -lowest
    cut = factors.Cut(span=(lowest, highest), rows=1, block=1, before=highest, after=after, keys=1, tolerance=tolerance)
    near = factors.factor(table, reach, cut).near
    assert near is not None, "without far tiles there is a near form"
    return _Band(near, highest)


def _add_band(scores: jax.Array, band: jax.Array, first: int, offset: jax.Array) -> jax.Array:
    """Adds [.., T, n] by distance (first, first - 1, ..) to scores [.., T, S] by key; what has no key is dropped."""
    *lead, T, n = band.shape
    S, none = scores.shape[-1], [(0, 0)] * len(lead)
    width = n + T - 1
    by_key = skew(jnp.pad(band, [*none, (0, 0), (T - 1, T)]), width)  # row t moved to the right by t
    # Column j is key j + start, which may be before the first key or after the last: all of it then, at most.
    start = jnp.clip(offset, first - width, first + S) - first
    kept = min(width, S)
    place = jnp.clip(start, 0, S - kept)
    by_key = jnp.pad(by_key, [*none, (0, 0), (kept, kept)])
    by_key = lax.dynamic_slice_in_dim(by_key, place - start + kept, kept, -1)
    here = lax.dynamic_slice_in_dim(scores, place, kept, -1) + by_key
    return lax.dynamic_update_slice_in_dim(scores, here, place, -1)


def _visible(T: int, S: int, offset: jax.Array, causal: bool, window: int | None, segment_ids) -> jax.Array | None:
    """Which keys a query sees, broadcastable to [B, K, G, T, S]; None: all."""
    query, key = (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
    distance = offset + (query[:, None] - key[None])[None, None, None]
    same = []
    if segment_ids is not None:
        same.append((segment_ids[0][:, :, None] == segment_ids[1][:, None, :])[:, None, None])
    return common.visible(distance, causal=causal, window=window, others=same)
