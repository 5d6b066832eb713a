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

import einops
import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.attention import common, constants, factors
from wavelet_jax.attention.call import Call, consecutive_only
from wavelet_jax.attention.sweep import FIRST_ONLY, attend
from wavelet_jax.attention.tiles import Inputs, Plan, Tiles, first_distance, split_heads
from wavelet_jax.errors import UserError
from wavelet_jax.positions.terms import Terms

# No entry of a constant table is wrong by more than this. In float32 scores that is below the rounding of their
# own sums of D products; bfloat16 rounds queries and keys by 4e-3 of their size, float16 by 5e-4.
FAR_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-4}


# By what the terms add to scores. Measured on two cores, float32, 4 heads of 128, forward and backward: XLA shares out
# one matrix product at a time among threads, so products must be large (tiles of 128 take 1.6 times as long as these),
# while smaller blocks and bands of constant keys leave less to compute densely and raise the far rank (bands of 128 and
# 32 cost wavelets 5% more at 2,048).
TILES = {
    "nothing": Tiles(rows=1024, block=256, band=0, keys=512),
    "constant keys": Tiles(rows=1024, block=128, band=64, keys=512),
    "tables": Tiles(rows=512, block=256, band=0, keys=512),
}

# Factors go from the local band to the furthest distance that matters: the furthest that there is, or at a traced
# offset, all of the support. Where that is this much past the lengths themselves (queries at position 2^30 over keys at
# 0, scales of 2^20), they would cost seconds, or gigabytes, for short sequences: the near form serves everywhere.
FURTHEST_FACTORS = 2**14

# Further than any table: distances that a traced offset may have, tokens.
_FAR_AWAY = 2**29


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
    tiles: Tiles | None = None,
) -> jax.Array:
    """Softmax attention as `Terms` writes it, scores and softmax in float32; positions are consecutive on both sides.

    Args:
      query_BxTxHxD, key_BxSxKxD, value_BxSxKxD: queries and keys rotated already; K divides H.
      terms: what the position method adds.
      offset: position of the first query less that of the first key; an int, or a traced int32 scalar (constant
        tables whose support is past `FURTHEST_FACTORS` then go by the near form everywhere).
      causal, window: as in `wavelet_jax.attention.attention`.
      segment_ids: ([B, T], [B, S]) or None.
      far_tolerance: no entry of a constant relative_keys is wrong by more than this; None for `FAR_TOLERANCE`.
      tiles: other sizes than `TILES` names.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """
    (_, num_queries, _, head_dim), num_keys = query_BxTxHxD.shape, key_BxSxKxD.shape[1]
    if tiles is None:
        tiles = _choose_tiles(num_queries, num_keys, terms)
    if far_tolerance is None:
        far_tolerance = default_tolerance(query_BxTxHxD.dtype)
    if causal:  # all keys later than all queries are hidden, however much later: keeps int32 sums below from wrapping
        known = not isinstance(offset, jax.Array)
        offset = max(offset, -num_queries) if known else jnp.maximum(offset, -num_queries)
    plan = Plan(
        tiles=tiles,
        causal=causal,
        window=window,
        offset=None if isinstance(offset, jax.Array) else int(offset),
        queries=num_queries,
        keys=num_keys,
        constants=None,
        key_everywhere=False,
        scale=1 / math.sqrt(head_dim),
    )
    with jax.named_scope("tables"):
        constant = constants_of(plan, terms, far_tolerance)
        separable = constant is not None and constant.near is not None
        plan = dataclasses.replace(
            plan, constants=constant, key_everywhere=terms.relative_keys is not None and not separable
        )
        added = common.evaluate(terms, _distances(plan, offset), relative_keys=plan.key_everywhere)
    # With constant factors too: they are of the queries with the position bias.
    has_relative_keys = terms.relative_keys is not None
    arrays = query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, added, jnp.asarray(offset, jnp.int32), segment_ids
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
    """`attention` with everything known of it in a plan, and what the terms add as tables over all distances."""
    batch, num_queries, num_kv_heads, rows = *query_BxTxHxD.shape[:2], key_BxSxKxD.shape[2], plan.tiles.rows
    content, position = common.plus_bias(query_BxTxHxD, added.content_bias), None
    if has_relative_keys and (added.content_bias is not None or added.position_bias is not None):
        position = common.plus_bias(query_BxTxHxD, added.position_bias)
    pad = [(0, 0), (0, 0), plan.padding, (0, 0)]

    def by_kv_head(table: jax.Array | None, with_heads: int) -> jax.Array | None:
        return None if table is None else split_heads(table, with_heads, num_kv_heads)

    inputs = Inputs(
        _cut(content, rows, num_kv_heads),
        None if position is None else _cut(position, rows, num_kv_heads),
        jnp.pad(jnp.moveaxis(key_BxSxKxD, 1, 2), pad),
        jnp.pad(jnp.moveaxis(value_BxSxKxD, 1, 2), pad),
        by_kv_head(added.relative_keys, 3),
        by_kv_head(added.relative_values, 3),
        None if added.bias is None else by_kv_head(added.bias, 2) / plan.scale,
    )
    if segment_ids is not None:
        query_segments, key_segments = segment_ids
        query_segments = jnp.pad(query_segments, [(0, 0), (0, -num_queries % rows)]).reshape(batch, -1, rows)
        segment_ids = jnp.moveaxis(query_segments, 1, 0), jnp.pad(key_segments, [(0, 0), plan.padding])
    inputs, segment_ids, _ = common.vary_together(inputs, segment_ids, offset)
    try:
        out_NxBxKxDxGxU = attend(plan, inputs, offset, segment_ids)
    except (TypeError, NotImplementedError) as error:
        if "custom_vjp function" in str(error) or "custom_lin" in str(error):  # JAX's words for a jvp
            raise UserError(FIRST_ONLY) from None
        raise
    out = einops.rearrange(out_NxBxKxDxGxU, "n b k d g u -> b (n u) (k g) d")
    return out[:, :num_queries]


def obstacles(call: Call) -> list[str]:
    """What the call would need to be for these tiles to carry it; empty where they do."""
    return consecutive_only(call)


def default_tolerance(dtype: jnp.dtype) -> float:
    return FAR_TOLERANCE.get(jnp.dtype(dtype).name, FAR_TOLERANCE["float32"])


def _choose_tiles(num_queries: int, num_keys: int, terms: Terms) -> Tiles:
    kind = "nothing"
    if terms.relative_keys is not None or terms.relative_values is not None or terms.bias is not None:
        constant = constants.are_known(terms)
        kind = "constant keys" if constant else "tables"
    tiles = TILES[kind]

    def shorter(size: int, length: int) -> int:  # no tile is much longer than what it has to hold
        return min(size, -(-length // 8) * 8)

    block = shorter(tiles.block, num_queries)
    # Tiles of as many rows each as come out even, so that the last one holds little padding.
    count = -(-num_queries // tiles.rows)
    rows = -(-num_queries // (count * block)) * block
    return Tiles(rows, block, shorter(tiles.band, num_keys), shorter(tiles.keys, num_keys))


# -- what comes from the terms ------------------------------------------------------------------------------------


def _span(plan: Plan, offset: int) -> tuple[int, int]:
    """The lowest and the highest distance of a query and a key that it may see."""
    lowest, highest = offset - (plan.keys - 1), offset + plan.queries - 1
    if plan.causal:
        lowest = max(lowest, 0)
    if plan.window is not None:
        lowest, highest = max(lowest, 1 - plan.window), min(highest, plan.window - 1)
    return lowest, max(lowest, highest)


def _distances(plan: Plan, offset: int | jax.Array) -> jax.Array:
    """Distances of the tables over all distances, falling by one, int32 [n].

    Distances that only padding has are replaced by ones that a query and a key do have: no method is asked for more.
    """
    first = first_distance(plan, offset)
    count = plan.queries + 2 * plan.tiles.rows + plan.keys + 2 * plan.overhang
    lowest, highest = offset - (plan.keys - 1), offset + plan.queries - 1
    if plan.causal:
        if plan.offset is None:
            lowest, highest = jnp.maximum(lowest, 0), jnp.maximum(highest, 0)
        else:  # down to distance 0, and at least one tile
            lowest, highest = max(lowest, 0), max(highest, 0)
            count = max(min(count, first + 1), plan.overhang + plan.tiles.rows)
    if plan.offset is not None:  # in int64: those of padding may be past int32 (and wrap, to be clipped, if traced)
        return jnp.asarray(np.clip(first - np.arange(count), lowest, highest), jnp.int32)
    return jnp.clip(first - jnp.arange(count, dtype=jnp.int32), lowest, highest)


def constants_of(plan: Plan, terms: Terms, tolerance: float) -> factors.Factors | None:
    """Factors of a constant `relative_keys`; None where there is none, it is learned, or its reach is not known."""
    if not constants.are_known(terms):
        return None
    margin = plan.tiles.rows + plan.overhang  # tiles hold distances that no query and key have
    lowest, highest = (-_FAR_AWAY, _FAR_AWAY) if plan.offset is None else _span(plan, plan.offset)
    reach = constants.reach(terms, tolerance, margin)
    if reach is not None:
        lowest, highest = int(np.clip(lowest, -reach, reach)), int(np.clip(highest, -reach, reach))
    if max(highest, -lowest) > plan.queries + plan.keys + FURTHEST_FACTORS:
        return None
    table = constants.evaluate(terms, highest + margin, lowest - margin)
    return factors.factor(
        table,
        highest + margin,
        span=(lowest, highest),
        rows=plan.tiles.rows,
        block=plan.tiles.block,
        before=plan.tiles.band,
        after=None if plan.causal else plan.after,
        keys=plan.tiles.keys,
        tolerance=tolerance,
    )


def _cut(x_BxTxHxD: jax.Array, rows: int, num_kv_heads: int) -> jax.Array:
    """Queries in tiles: [N, B, K, D, G, U], the last one padded."""
    x = jnp.pad(x_BxTxHxD, [(0, 0), (0, -x_BxTxHxD.shape[1] % rows), (0, 0), (0, 0)])
    return einops.rearrange(x, "b (n u) (k g) d -> n b k d g u", u=rows, k=num_kv_heads)
