"""Attention of few queries over many keys, as in decoding from a key-value cache: one product with all scores at once.

Scores [T, S] come from the cached layout [B, S, K, D], grouped queries and no repeated key heads. Positions are
consecutive, so distances fall along a row of scores and rise down a column: what depends on them is evaluated once for
T + S distances, [n], and skewed to [T, S]. A constant table of relative keys (wavelets that are not trained) is not
evaluated at all: its numbers within the support are in the program, times the queries they are a band of scores, and
the band is added at its place. Its arithmetic is the same whatever S is.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wavelet_jax.attention import common, constants, factors
from wavelet_jax.attention.call import Call, consecutive_only
from wavelet_jax.attention.tiled import FURTHEST_FACTORS, default_tolerance
from wavelet_jax.attention.tiles import skew, split_heads, unskew
from wavelet_jax.positions.terms import Terms

# As in the definition. Decoding waits for memory, so full precision costs nothing.
_einsum = functools.partial(common.einsum, precision="highest")


def obstacles(call: Call) -> list[str]:
    """What the call would need to be for this backend to carry it; empty where it does."""
    return consecutive_only(call)


def attention(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    terms: Terms,
    *,
    offset: int | jax.Array,
    causal: bool = True,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    far_tolerance: float | None = None,
) -> jax.Array:
    """Softmax attention as `Terms` writes it, scores and softmax in float32; positions are consecutive on both sides.

    Args:
      query_BxTxHxD, key_BxSxKxD, value_BxSxKxD: queries and keys rotated already; K divides H. Memory is that of
        scores [B, H, T, S]: T should be small.
      terms: what the position method adds.
      offset: position of the first query less that of the first key; an int, or a traced int32 scalar.
      causal, window: as in `wavelet_jax.attention.attention`.
      segment_ids: ([B, T], [B, S]) or None.
      far_tolerance: no entry of a constant relative_keys is wrong by more than this; None for `tiled.FAR_TOLERANCE`.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """
    added, band, offset, window = _prepare(query_BxTxHxD, key_BxSxKxD, terms, offset, causal, window, far_tolerance)

    def attend(query, key, value, added, offset, segment_ids):
        (batch, T, H, D), K = query.shape, key.shape[2]
        weights = _weights(query, key, added, band, offset, causal, window, segment_ids)
        with jax.named_scope("values"):
            out_BxTxKxGxD = _einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
            if added.relative_values is not None:
                table, heads = _by_kv_head(added.relative_values, 3, K)
                out_BxTxKxGxD += _einsum(f"bkgte,{heads}ed->btkgd", unskew(weights), table)
        return out_BxTxKxGxD.reshape(batch, T, H, D).astype(value.dtype)

    return common.in_auto_mode(attend, query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, added, offset, segment_ids)


def probabilities(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    terms: Terms,
    *,
    offset: int | jax.Array,
    causal: bool = True,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    far_tolerance: float | None = None,
) -> jax.Array:
    """The weights that `attention` gives the values, [B, K, H/K, T, S] float32; its arguments, without the values.

    Rows sum to 1, or to 0 for a query that sees no key.
    """
    added, band, offset, window = _prepare(query_BxTxHxD, key_BxSxKxD, terms, offset, causal, window, far_tolerance)
    return _weights(query_BxTxHxD, key_BxSxKxD, added, band, offset, causal, window, segment_ids)


class _Band(NamedTuple):
    """A constant `relative_keys` within its support."""

    near: factors.Near
    furthest: int  # the distance of its first row


def _prepare(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    terms: Terms,
    offset: int | jax.Array,
    causal: bool,
    window: int | None,
    far_tolerance: float | None,
) -> tuple[common.Added, _Band | None, jax.Array, int | None]:
    """(what the terms add at all distances, or their band; the offset, int32; the window, None where it hides nothing).

    `relative_keys` are in the band where there is one, and else among what is added.
    """
    T, S = query_BxTxHxD.shape[1], key_BxSxKxD.shape[1]
    if far_tolerance is None:
        far_tolerance = default_tolerance(query_BxTxHxD.dtype)
    if window is not None and not isinstance(offset, jax.Array) and max(offset + T, S - offset) <= window:
        window = None
    offset = _clamped(offset, T, causal)
    band = _near(terms, T + S, causal, far_tolerance)
    added = common.evaluate(terms, _distances(T, S, offset, causal), relative_keys=band is None)
    return added, band, offset, window


def _weights(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    added: common.Added,
    band: _Band | None,
    offset: jax.Array,
    causal: bool,
    window: int | None,
    segment_ids: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """The softmax weights, [B, K, G, T, S] float32."""
    (batch, T, H, D), (_, S, K, _) = query_BxTxHxD.shape, key_BxSxKxD.shape

    def grouped(bias_HxD: jax.Array | None) -> jax.Array:
        return common.plus_bias(query_BxTxHxD, bias_HxD).reshape(batch, T, K, H // K, D)

    with jax.named_scope("scores"):
        scores_BxKxGxTxS = _einsum("btkgd,bskd->bkgts", grouped(added.content_bias), key_BxSxKxD)
        if added.relative_keys is not None:
            table, heads = _by_kv_head(added.relative_keys, 3, K)
            G = _einsum(f"btkgd,{heads}ed->bkgte", grouped(added.position_bias), table)
            scores_BxKxGxTxS += skew(G, S)
        if band is not None:
            query = grouped(added.position_bias)
            if band.near.project is not None:
                project, heads = _by_kv_head(band.near.project, 3, K)
                query = _einsum(f"btkgd,{heads}dc->btkgc", query, project)
            rows, heads = _by_kv_head(band.near.rows, 3, K)
            G = _einsum(f"btkgc,{heads}ec->bkgte", query, rows)
            scores_BxKxGxTxS = _add_band(scores_BxKxGxTxS, G, band.furthest, offset)
        scores_BxKxGxTxS /= math.sqrt(D)
        if added.bias is not None:
            bias, _ = _by_kv_head(added.bias.astype(jnp.float32), 2, K)  # [K, G, n]
            scores_BxKxGxTxS += skew(jnp.broadcast_to(bias[..., None, :], (*bias.shape[:2], T, T + S)), S)[None]

    with jax.named_scope("softmax"):
        visible = _visible(T, S, offset, causal, window, segment_ids)
        if visible is not None:
            scores_BxKxGxTxS = jnp.where(visible, scores_BxKxGxTxS, -jnp.inf)
        # A query that sees nothing has a row of -inf only; 0 for its maximum and 1 for its sum keep NaN out.
        highest = lax.stop_gradient(jnp.max(scores_BxKxGxTxS, axis=-1, keepdims=True))
        weights = jnp.exp(scores_BxKxGxTxS - jnp.where(jnp.isfinite(highest), highest, 0))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return weights / jnp.where(total > 0, total, 1)


def _by_kv_head(table: jax.Array, with_heads: int, num_kv_heads: int) -> tuple[jax.Array, str]:
    """[K, G, ..] or [..], and the einsum letters of its heads."""
    return split_heads(table, with_heads, num_kv_heads), "kg" if table.ndim == with_heads else ""


def _clamped(offset: int | jax.Array, T: int, causal: bool) -> jax.Array:
    """The offset, int32. All keys later than all queries are hidden, however much later: keeps sums from wrapping."""
    return jnp.asarray(jnp.maximum(offset, -T) if causal else offset, jnp.int32)


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
    if not constants.are_known(terms):
        return None
    reach = constants.reach(terms, tolerance, margin=1)
    if reach is None or reach > length + FURTHEST_FACTORS:
        return None
    table = constants.evaluate(terms, reach, -1 if causal else -reach - 1)
    past = np.flatnonzero(np.max(np.abs(table), axis=-1).reshape(-1, table.shape[-2]).max(axis=0) > tolerance)
    highest, lowest = (reach - int(past[0]), reach - int(past[-1])) if past.size else (0, 0)
    highest, lowest = max(highest, 0), 0 if causal else min(lowest, 0)
    # The near form of a tile of one row, with all of the support in its local band.
    after = None if causal else -lowest
    plan = {"rows": 1, "block": 1, "before": highest, "after": after, "keys": 1}
    return _Band(factors.factor(table, reach, span=(lowest, highest), tolerance=tolerance, **plan).near, highest)


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
    conditions = []
    if causal:
        conditions.append(distance >= 0)
    if window is not None:
        conditions.append(jnp.abs(distance) < window)
    if segment_ids is not None:
        conditions.append((segment_ids[0][:, :, None] == segment_ids[1][:, None, :])[:, None, None])
    return functools.reduce(jnp.logical_and, conditions) if conditions else None
