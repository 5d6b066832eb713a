"""Attention in tiles with an online softmax: memory linear in length, forward and backward, for every field of `Terms`.

Queries go in tiles of U rows. A tile sees its local band of keys (around its own positions) as one tile, then tiles
of V keys outwards on both sides, or before it only where causal. Tiles are cut relative to the query tile, so the
distances in the n-th tile outwards are the same for every query tile, at any position. They come in by two forms:

    near:  G[u, e] = q[u] . P[e] for all distances e of the tile, then a skew (row u shifted by u) to [U, V]. No gather.
    far:   q_far[u] . basis[v], a few more head dimensions; see `factors`.

A constant table of relative keys (wavelets that are not trained) is near in the local band, far within its support,
and nothing beyond. Learned tables, relative values and biases are near everywhere: tables over all distances, linear in
length, made outside of the custom derivative, so that JAX itself takes their gradients on to the parameters.
"""

import dataclasses
import functools
import math
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.attention import common
from wavelet_jax.attention.call import Call, unsupported_by_tiles
from wavelet_jax.attention.common import split_heads
from wavelet_jax.attention.relative import factors, tables
from wavelet_jax.attention.tiled.geometry import Geometry, Plan, TileSizes, first_distance
from wavelet_jax.attention.tiled.sweep import FIRST_ONLY, attend_tiles
from wavelet_jax.attention.tiled.tile import Inputs
from wavelet_jax.errors import UserError
from wavelet_jax.positions.terms import Terms

# By what the terms add to scores. Measured on two cores, float32, 4 heads of 128, forward and backward: XLA shares out
# one matrix product at a time among threads, so products must be large (tiles of 128 take 1.6 times as long as these),
# while smaller blocks and bands of constant keys leave less to compute densely and raise the far rank (bands of 128 and
# 32 cost wavelets 5% more at 2,048).
TILES = {
    "nothing": TileSizes(rows=1024, block=256, band=0, keys=512),
    "constant keys": TileSizes(rows=1024, block=128, band=64, keys=512),
    "tables": TileSizes(rows=512, block=256, band=0, keys=512),
}

# Stand-in for an unknown (traced) offset, tokens: larger than any supported table.
_FAR_AWAY = 2**29


def unsupported(call: Call) -> list[str]:
    """Reasons why this backend does not support a call; empty if it does."""
    return unsupported_by_tiles(call)


def attend(query_BxTxHxD: jax.Array, key_BxSxKxD: jax.Array, value_BxSxKxD: jax.Array, call: Call) -> jax.Array:
    """Softmax attention as `Terms` states it, scores and softmax in float32; positions are consecutive on both sides.

    Args:
      query_BxTxHxD, key_BxSxKxD, value_BxSxKxD: queries and keys already rotated; K divides H.
      call: one with an offset, an int or a traced int32 scalar (constant tables whose support is past
        `tables.MAX_FACTOR_DISTANCE` then use the near form everywhere).

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """
    terms, offset = call.terms, call.clamped_offset
    geometry = Geometry(
        sizes=_choose_sizes(call),
        causal=call.causal,
        window=call.window,
        offset=None if isinstance(offset, jax.Array) else int(offset),
        queries=call.queries,
        keys=call.keys,
    )
    has_relative_keys = terms.relative_keys is not None
    with jax.named_scope("tables"):
        constant = factors_of(geometry, terms, call.tolerance)
        separable = constant is not None and constant.near is not None
        plan = Plan(
            **{field.name: getattr(geometry, field.name) for field in dataclasses.fields(geometry)},
            factors=constant,
            key_everywhere=has_relative_keys and not separable,
            scale=1 / math.sqrt(call.head_dim),
        )
        added = common.evaluate(terms, _distances(geometry, offset), relative_keys=plan.key_everywhere)
    # Also with constant factors: they are of the queries with the position bias.
    arrays = query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, added, jnp.asarray(offset, jnp.int32), call.segment_ids
    return common.in_auto_mode(functools.partial(_in_tiles, plan, has_relative_keys), *arrays)


def _in_tiles(
    plan: Plan,
    has_relative_keys: bool,
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    added: common.Added,
    offset: jax.Array,
    segment_ids: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """`attend` with all that is known while tracing in a plan, and what the terms add as tables over all distances."""
    batch, num_queries, num_kv_heads, rows = *query_BxTxHxD.shape[:2], key_BxSxKxD.shape[2], plan.sizes.rows
    content, position = common.with_biases(
        query_BxTxHxD, added.content_bias, added.position_bias, has_relative_keys=has_relative_keys
    )
    pad = [(0, 0), (0, 0), plan.padding, (0, 0)]

    def by_kv_head(table: jax.Array | None, with_heads: int) -> jax.Array | None:
        return None if table is None else split_heads(table, with_heads, num_kv_heads)

    inputs = Inputs(
        _tile_queries(content, rows, num_kv_heads),
        None if position is None else _tile_queries(position, rows, num_kv_heads),
        jnp.pad(jnp.moveaxis(key_BxSxKxD, 1, 2), pad),
        jnp.pad(jnp.moveaxis(value_BxSxKxD, 1, 2), pad),
        by_kv_head(added.relative_keys, 3),
        by_kv_head(added.relative_values, 3),
        None if added.bias is None else split_heads(added.bias, 2, num_kv_heads) / plan.scale,
    )
    if segment_ids is not None:
        query_segments, key_segments = segment_ids
        query_tiles = jnp.pad(query_segments, [(0, 0), (0, -num_queries % rows)]).reshape(batch, -1, rows)
        segment_ids = jnp.moveaxis(query_tiles, 1, 0), jnp.pad(key_segments, [(0, 0), plan.padding])
    inputs, segment_ids, _ = common.vary_together(inputs, segment_ids, offset)
    try:
        out_NxBxKxDxGxU: Any = attend_tiles(plan, inputs, offset, segment_ids)
    except (TypeError, NotImplementedError) as error:
        if "custom_vjp function" in str(error) or "custom_lin" in str(error):  # JAX's words for a jvp
            raise UserError(FIRST_ONLY) from None
        raise
    out = einops.rearrange(out_NxBxKxDxGxU, "n b k d g u -> b (n u) (k g) d")
    return out[:, :num_queries]


def _choose_sizes(call: Call) -> TileSizes:
    """The sizes of `TILES` for a call's terms, no tile being much longer than what it has to hold."""
    terms, num_queries, num_keys = call.terms, call.queries, call.keys
    kind = "nothing"
    if terms.relative_keys is not None or terms.relative_values is not None or terms.bias is not None:
        constant = tables.are_known(terms)
        kind = "constant keys" if constant else "tables"
    tiles = TILES[kind]

    def shorter(size: int, length: int) -> int:
        return min(size, -(-length // 8) * 8)

    block = shorter(tiles.block, num_queries)
    # Tiles of as many rows each as come out even, so that the last one holds little padding.
    count = -(-num_queries // tiles.rows)
    rows = -(-num_queries // (count * block)) * block
    return TileSizes(rows, block, shorter(tiles.band, num_keys), shorter(tiles.keys, num_keys))


# -- what comes from the terms ------------------------------------------------------------------------------------


def _span(geometry: Geometry, offset: int) -> tuple[int, int]:
    """The lowest and the highest distance of a query and a key that it may see."""
    lowest, highest = offset - (geometry.keys - 1), offset + geometry.queries - 1
    if geometry.causal:
        lowest = max(lowest, 0)
    if geometry.window is not None:
        lowest, highest = max(lowest, 1 - geometry.window), min(highest, geometry.window - 1)
    return lowest, max(lowest, highest)


def _distances(geometry: Geometry, offset: int | jax.Array) -> jax.Array:
    """Distances of the tables over all distances, falling by one, int32 [n].

    Distances that only padding has are replaced by ones that a query and a key do have: no method is asked for more.
    """
    first = first_distance(geometry, offset)
    count = geometry.queries + 2 * geometry.sizes.rows + geometry.keys + 2 * geometry.overhang
    lowest, highest = offset - (geometry.keys - 1), offset + geometry.queries - 1
    if geometry.causal:
        if geometry.offset is None:
            lowest, highest = jnp.maximum(lowest, 0), jnp.maximum(highest, 0)
        else:  # down to distance 0, and at least one tile
            lowest, highest = max(lowest, 0), max(highest, 0)
            count = max(min(count, int(first) + 1), geometry.overhang + geometry.sizes.rows)
    if geometry.offset is not None:  # in int64: those of padding may be past int32 (and wrap, to be clipped, if traced)
        return jnp.asarray(np.clip(first - np.arange(count), lowest, highest), jnp.int32)
    return jnp.clip(first - jnp.arange(count, dtype=jnp.int32), lowest, highest)


def factors_of(geometry: Geometry, terms: Terms, tolerance: float) -> factors.Factors | None:
    """Factors of a constant `relative_keys`; None where there is none, it is learned, or its reach is not known."""
    if not tables.are_known(terms):
        return None
    margin = geometry.sizes.rows + geometry.overhang  # tiles hold distances that no query and key have
    lowest, highest = (-_FAR_AWAY, _FAR_AWAY) if geometry.offset is None else _span(geometry, geometry.offset)
    reach = tables.support_at(terms, tolerance, margin)
    if reach is not None:
        lowest, highest = int(np.clip(lowest, -reach, reach)), int(np.clip(highest, -reach, reach))
    if max(highest, -lowest) > geometry.queries + geometry.keys + tables.MAX_FACTOR_DISTANCE:
        return None
    table = tables.evaluate(terms, highest + margin, lowest - margin)
    cut = factors.Cut(
        span=(lowest, highest),
        rows=geometry.sizes.rows,
        block=geometry.sizes.block,
        before=geometry.sizes.band,
        after=None if geometry.causal else geometry.after,
        keys=geometry.sizes.keys,
        tolerance=tolerance,
    )
    return factors.factor(table, highest + margin, cut)


def _tile_queries(x_BxTxHxD: jax.Array, rows: int, num_kv_heads: int) -> jax.Array:
    """Queries in tiles: [N, B, K, D, G, U], the last one padded."""
    x = jnp.pad(x_BxTxHxD, [(0, 0), (0, -x_BxTxHxD.shape[1] % rows), (0, 0), (0, 0)])
    return einops.rearrange(x, "b (n u) (k g) d -> n b k d g u", u=rows, k=num_kv_heads)
