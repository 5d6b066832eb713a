"""Attention in tiles with an online softmax: memory linear in length, forward and backward, for every field of `Terms`.

Queries go in tiles of U rows. A tile sees its local band of keys (around its own positions) as one tile, then key tiles
of V keys outwards on both sides, or before it only where causal; tiles are cut relative to the query tile, so the distances
in the n-th tile outwards are the same for every query tile, whatever its position. Distances enter a tile in one of two ways:

    near:  G[u, e] = q[u] . P[e] for all distances e of the tile, then a skew (row u shifted by u) to [U, V]. No gather.
    far:   q_far[u] . basis[v], a few more head dimensions; see `factors`.

A constant table of relative keys (wavelets that are not trained) is near in the local band, far within its support, and
nothing beyond. Learned tables, relative values and biases are near everywhere: tables over all distances, linear in length,
made outside of the custom derivative, so that JAX itself takes their gradients on to the parameters.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wavelet_jax.attention import factors
from wavelet_jax.positions.terms import Terms

# Products are accumulated in float32, whatever the dtype of their operands.
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

# No entry of a constant table is wrong by more than this. In float32 scores that is below the rounding of their
# own sums of D products; bfloat16 rounds queries and keys by 4e-3 of their size.
FAR_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of tiles, tokens. Attributes: rows, U; band, keys of the local band beside the tile's own; keys, V."""

    rows: int
    band: int
    keys: int


# (from this many keys on, tiles with relative keys, tiles without), the last that applies; measured on a 2-core CPU.
TILES = (
    (0, Tiles(128, 128, 256), Tiles(128, 0, 256)),
    (1024, Tiles(256, 128, 512), Tiles(256, 0, 512)),
)


# Distances of a traced offset are not known: anything up to here, tokens.
_FAR_AWAY = 2**29


class _Inputs(NamedTuple):
    """What the custom derivative sees; a field that the terms do not need is None. N query tiles, H = K heads x G."""

    query_NxBxKxGxUxD: jax.Array  # with the content bias
    near_NxBxKxGxUxC: jax.Array | None  # queries with the position bias, projected for the near form
    far_NxBxKxGxUxR: tuple[jax.Array | None, jax.Array | None]  # the same for the far form, before and after
    key_BxKxSxD: jax.Array  # padded on both sides, as is the value
    value_BxKxSxD: jax.Array
    key_table: jax.Array | None  # [n, C] or [K, G, n, C], distances falling; None with constants
    value_table: jax.Array | None  # [n, D] or [K, G, n, D]
    bias_table: jax.Array | None  # [K, G, n]


class _Tile(NamedTuple):
    """One tile of keys as a query tile sees it."""

    start: jax.Array | int  # index of its first key, before padding; it may stick out on either side
    width: int  # V
    first: jax.Array | int  # distance of the query tile's first row from the tile's first key
    side: int | None  # 0 before, 1 after, None the local band
    order: jax.Array | int  # 0, 1, .. outwards
    relative: bool  # whether the constant table of relative keys reaches it


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """All that is known while tracing."""

    tiles: Tiles
    causal: bool
    window: int | None
    offset: int | None  # position of query 0 less that of key 0; None where it is traced
    queries: int  # T
    keys: int  # S
    constants: factors.Factors | None
    key_everywhere: bool  # relative keys are a learned table
    scale: float

    @property
    def after(self) -> int:
        """Keys of the local band after the tile's last row."""
        return 0 if self.causal else self.tiles.band

    @property
    def band(self) -> int:
        """Keys of the local band."""
        return self.tiles.band + self.tiles.rows + self.after

    @property
    def padding(self) -> int:
        """Keys added on both sides, so that no tile that holds a key sticks out."""
        return max(self.band, self.tiles.keys)


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
        tables of unbounded support then go by the near form everywhere).
      causal, window: as in `wavelet_jax.attention.attention`.
      segment_ids: ([B, T], [B, S]) or None.
      far_tolerance: no entry of a constant relative_keys is wrong by more than this; None for `FAR_TOLERANCE`.
      tiles: other sizes than `TILES` names.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """
    (batch, num_queries, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = query_BxTxHxD.shape, key_BxSxKxD.shape
    if tiles is None:
        tiles = _choose_tiles(num_queries, num_keys, terms)
    if far_tolerance is None:
        far_tolerance = FAR_TOLERANCE["bfloat16" if query_BxTxHxD.dtype in (jnp.bfloat16, jnp.float16) else "float32"]
    plan = _Plan(
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
        constants = _constants(plan, terms, far_tolerance)
        plan = dataclasses.replace(
            plan, constants=constants, key_everywhere=terms.relative_keys is not None and constants is None
        )
        by_kv_head = functools.partial(_split_heads, num_kv_heads=num_kv_heads)
        distances = _distances(plan, offset)
        key_table = by_kv_head(terms.relative_keys(distances), 3) if plan.key_everywhere else None
        value_table = by_kv_head(terms.relative_values(distances), 3) if terms.relative_values is not None else None
        bias_table = by_kv_head(terms.bias(distances), 2) if terms.bias is not None else None

    with jax.named_scope("tile_queries"):
        cut = functools.partial(_cut, rows=tiles.rows, num_kv_heads=num_kv_heads)
        content = query_BxTxHxD if terms.content_bias is None else query_BxTxHxD + terms.content_bias
        query = cut(content)
        near, far = None, (None, None)
        if terms.relative_keys is not None:
            position = query if terms.position_bias is None else cut(query_BxTxHxD + terms.position_bias)
            near, far = _project(position, constants, num_kv_heads)

    pad = [(0, 0), (0, 0), (plan.padding, plan.padding), (0, 0)]
    inputs = _Inputs(
        query,
        near,
        far,
        jnp.pad(jnp.moveaxis(key_BxSxKxD, 1, 2), pad),
        jnp.pad(jnp.moveaxis(value_BxSxKxD, 1, 2), pad),
        key_table,
        value_table,
        bias_table,
    )
    if segment_ids is not None:
        query_segments, key_segments = segment_ids
        row_padding = query.shape[0] * tiles.rows - num_queries
        query_segments = jnp.pad(query_segments, [(0, 0), (0, row_padding)]).reshape(batch, -1, tiles.rows)
        segment_ids = jnp.moveaxis(query_segments, 1, 0), jnp.pad(key_segments, [(0, 0), (plan.padding,) * 2])
    out_NxBxKxGxUxD = _attend(plan, inputs, jnp.asarray(offset, jnp.int32), segment_ids)
    out = jnp.moveaxis(out_NxBxKxGxUxD, (0, 4), (1, 2))  # [B, N, U, K, G, D]
    return out.reshape(batch, -1, num_heads, head_dim)[:, :num_queries]


def _choose_tiles(num_queries: int, num_keys: int, terms: Terms) -> Tiles:
    relative = terms.relative_keys is not None
    tiles = [row[1 if relative else 2] for row in TILES if num_keys >= row[0]][-1]

    def shorter(size: int, length: int) -> int:  # no tile is much longer than what it has to hold
        return min(size, -(-length // 8) * 8)

    return Tiles(shorter(tiles.rows, num_queries), shorter(tiles.band, num_keys), shorter(tiles.keys, num_keys))


# -- what comes from the terms ------------------------------------------------------------------------------------


def _span(plan: _Plan, offset: int) -> tuple[int, int]:
    """The lowest and the highest distance of a query and a key that it may see."""
    lowest, highest = offset - (plan.keys - 1), offset + plan.queries - 1
    if plan.causal:
        lowest = max(lowest, 0)
    if plan.window is not None:
        lowest, highest = max(lowest, 1 - plan.window), min(highest, plan.window - 1)
    return lowest, max(lowest, highest)


def _first_distance(plan: _Plan, offset: int | jax.Array) -> int | jax.Array:
    """Distance of row 0 of the tables over all distances: no tile that holds a key has a higher one."""
    return offset + (plan.queries + plan.tiles.rows) + plan.padding


def _distances(plan: _Plan, offset: int | jax.Array) -> jax.Array:
    """Distances of the tables over all distances, falling by one, int32 [n].

    Distances that only padding has are replaced by ones that a query and a key do have: no method is asked for more.
    """
    first = _first_distance(plan, offset)
    count = plan.queries + 2 * plan.tiles.rows + plan.keys + 2 * plan.padding
    lowest, highest = offset - (plan.keys - 1), offset + plan.queries - 1
    if plan.causal:
        lowest, highest = jnp.maximum(lowest, 0), jnp.maximum(highest, 0)
        if plan.offset is not None:  # down to distance 0, and at least one tile
            count = max(min(count, first + 1), plan.padding + plan.tiles.rows)
    return jnp.clip(first - jnp.arange(count, dtype=jnp.int32), lowest, highest)


def _constants(plan: _Plan, terms: Terms, tolerance: float) -> factors.Factors | None:
    """Factors of a constant `relative_keys`; None where there is none, it is learned, or its reach is not known."""
    if terms.relative_keys is None or _evaluate(terms, 0, 0) is None:
        return None
    margin = plan.tiles.rows + plan.padding  # tiles hold distances that no query and key have
    lowest, highest = (-_FAR_AWAY, _FAR_AWAY) if plan.offset is None else _span(plan, plan.offset)
    if terms.support is not None:
        # The support is stated for the method's own tolerance: see that the table is down to ours at twice as far.
        reach = 2 * terms.support
        ends = _evaluate(terms, reach + margin, reach), _evaluate(terms, -reach, -reach - margin)
        if max(np.max(np.abs(end)) for end in ends) <= tolerance:
            lowest, highest = int(np.clip(lowest, -reach, reach)), int(np.clip(highest, -reach, reach))
    if highest - lowest > _FAR_AWAY:
        return None
    table = _evaluate(terms, highest + margin, lowest - margin)
    return factors.factor(
        table,
        highest + margin,
        span=(lowest, highest),
        rows=plan.tiles.rows,
        before=plan.tiles.band,
        after=None if plan.causal else plan.after,
        keys=plan.tiles.keys,
        tolerance=tolerance,
    )


def _evaluate(terms: Terms, highest: int, lowest: int) -> np.ndarray | None:
    """relative_keys of the distances highest, highest - 1, .., lowest as an array; None where it is traced."""
    with jax.ensure_compile_time_eval():
        table = terms.relative_keys(jnp.arange(highest, lowest - 1, -1, dtype=jnp.int32))
    return None if isinstance(table, jax.core.Tracer) else np.asarray(table)


def _project(
    query_NxBxKxGxUxD: jax.Array, constants: factors.Factors | None, num_kv_heads: int
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """Queries in the coordinates of the near form, and of the far form on both sides."""
    if constants is None:
        return query_NxBxKxGxUxD, (None, None)

    def project(matrix: np.ndarray) -> jax.Array:  # in float32, also of bfloat16 queries
        heads = "kg" if matrix.ndim == 3 else ""
        return _einsum(f"nbkgud,{heads}dc->nbkguc", query_NxBxKxGxUxD, _split_heads(matrix, 3, num_kv_heads))

    near = query_NxBxKxGxUxD if constants.near.project is None else project(constants.near.project)
    far = [
        None if side is None else _einsum("nbkguc,urc->nbkgur", project(side.project), side.rows)
        for side in constants.far
    ]
    return near, (far[0], far[1])


def _split_heads(array: jax.Array | np.ndarray, with_heads: int, num_kv_heads: int) -> jax.Array:
    """[H, ..] -> [K, G, ..] where the array has `with_heads` axes; the others serve all heads as they are."""
    if array.ndim != with_heads:
        return jnp.asarray(array)
    return jnp.reshape(array, (num_kv_heads, array.shape[0] // num_kv_heads, *array.shape[1:]))


def _cut(x_BxTxHxD: jax.Array, rows: int, num_kv_heads: int) -> jax.Array:
    """Queries in tiles: [N, B, K, G, U, D], the last one padded."""
    batch, length, heads, dim = x_BxTxHxD.shape
    count = -(-length // rows)
    x = jnp.pad(x_BxTxHxD, [(0, 0), (0, count * rows - length), (0, 0), (0, 0)])
    x = x.reshape(batch, count, rows, num_kv_heads, heads // num_kv_heads, dim)
    return jnp.moveaxis(x, (1, 2), (0, 4))


# -- one tile -----------------------------------------------------------------------------------------------------


def _skew(G: jax.Array, width: int) -> jax.Array:
    """[.., U, U + V] by distance -> [.., U, V] by key: out[u, v] = G[u, U - 1 - u + v].

    Read row by row with one column less, the same numbers stand shifted by one a row: no gather.
    """
    *lead, rows, columns = G.shape
    flat = G.reshape(*lead, rows * columns)[..., : rows * (columns - 1)]
    return flat.reshape(*lead, rows, columns - 1)[..., rows - 1 : rows - 1 + width]


def _unskew(x: jax.Array) -> jax.Array:
    """The transpose of `_skew`: [.., U, V] by key -> [.., U, U + V] by distance, zeros where no key has it."""
    *lead, rows, width = x.shape
    none = [(0, 0)] * len(lead)
    x = jnp.pad(x, [*none, (0, 0), (rows - 1, 0)]).reshape(*lead, rows * (rows + width - 1))
    return jnp.pad(x, [*none, (0, rows)]).reshape(*lead, rows, rows + width)


class _View(NamedTuple):
    """What one tile of keys is to one tile of queries: slices of the inputs; None where the terms have no such part."""

    key: jax.Array  # [B, K, V, D]
    value: jax.Array  # [B, K, V, D]
    near: jax.Array | None  # [n, C] or [K, G, n, C], distances of the tile falling by one
    far: jax.Array | None  # [V, R]
    near_value: jax.Array | None  # [n, D] or [K, G, n, D]
    bias: jax.Array | None  # [K, G, n]
    visible: jax.Array | None  # broadcastable to [B, K, G, U, V]; None: all are


def _distances_in(plan: _Plan, tile: _Tile) -> int:
    """n, distances of a tile: U + V - 1 occur, and one more makes the skew; in a causal local band, those from 0 on."""
    return tile.width + (0 if plan.causal and tile.side is None else plan.tiles.rows)


def _view(plan: _Plan, inputs: _Inputs, tile: _Tile, offset: jax.Array, row_segments, key_segments) -> _View:
    def keys(array: jax.Array, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, tile.start + plan.padding, tile.width, axis)

    def rows(table: jax.Array | None, axis: int = -2) -> jax.Array | None:
        start = _table_start(plan, tile, offset)
        return None if table is None else lax.dynamic_slice_in_dim(table, start, _distances_in(plan, tile), axis)

    near, far = rows(inputs.key_table), None
    if plan.constants is not None and tile.relative:
        if tile.side is not None and (side := plan.constants.far[tile.side]) is not None:
            far = lax.dynamic_index_in_dim(jnp.asarray(side.basis), tile.order, keepdims=False)
        else:
            table = _split_heads(plan.constants.near.rows, 3, inputs.query_NxBxKxGxUxD.shape[2])
            start = plan.constants.near.first - (tile.first + plan.tiles.rows - 1)
            near = lax.dynamic_slice_in_dim(table, start, _distances_in(plan, tile), -2)
    by_distance = near is not None or inputs.bias_table is not None
    return _View(
        key=keys(inputs.key_BxKxSxD, 2),
        value=keys(inputs.value_BxKxSxD, 2),
        near=near,
        far=far,
        near_value=rows(inputs.value_table),
        bias=rows(inputs.bias_table, -1),
        visible=_visible(
            plan, tile, row_segments, None if key_segments is None else keys(key_segments, 1), by_distance
        ),
    )


def _table_start(plan: _Plan, tile: _Tile, offset: jax.Array) -> jax.Array:
    """The row of a table over all distances at which a tile's begin."""
    return _first_distance(plan, offset) - (tile.first + plan.tiles.rows - 1)


def _visible(plan: _Plan, tile: _Tile, row_segments, key_segments, by_distance: bool) -> jax.Array | None:
    """What is hidden in a tile beyond what `_position_scores` hides; None where that is nothing."""
    row, key = jnp.arange(plan.tiles.rows)[:, None], jnp.arange(tile.width)
    distance = tile.first + row - key
    conditions = []
    if tile.side is None and plan.causal and not by_distance:
        conditions.append(distance >= 0)
    if plan.window is not None:
        conditions.append(jnp.abs(distance) < plan.window)
    if not _all_keys_exist(plan, tile):
        conditions.append((tile.start + key >= 0) & (tile.start + key < plan.keys))
    if key_segments is not None:
        conditions.append((row_segments[:, :, None] == key_segments[:, None, :])[:, None, None])
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _all_keys_exist(plan: _Plan, tile: _Tile) -> bool:
    """Whether it is known that a tile that holds a key holds no padding (or in rows only that are padding too)."""
    rows, keys = plan.tiles.rows, plan.tiles.keys
    if plan.offset is None or not plan.causal or plan.offset + plan.queries > plan.keys:
        return False
    if tile.side is None:
        return plan.offset >= plan.tiles.band
    return rows % keys == 0 and (plan.offset - plan.tiles.band) % keys == 0


def _position_scores(plan: _Plan, near_queries: jax.Array | None, view: _View, tile: _Tile) -> jax.Array | None:
    """The near form of relative keys, and the bias: [B, K, G, U, V]; -inf after the query in a causal local band."""
    G = None
    if view.near is not None:
        G = _einsum(f"bkguc,{_letters(view.near)}->bkgue", near_queries, view.near) * plan.scale
    if view.bias is not None:
        bias = view.bias[None, :, :, None, :].astype(jnp.float32)
        G = bias if G is None else G + bias
    return None if G is None else _by_key(plan, G, tile, -jnp.inf)


def _by_key(plan: _Plan, by_distance: jax.Array, tile: _Tile, after: float) -> jax.Array:
    """[.., U or 1, n] by distance -> [.., U, V] by key; `after` for keys after the query in a causal local band."""
    *lead, _, available = by_distance.shape
    missing = tile.width + plan.tiles.rows - available
    padded = jnp.pad(by_distance, [(0, 0)] * (by_distance.ndim - 1) + [(0, missing)], constant_values=after)
    return _skew(jnp.broadcast_to(padded, (*lead, plan.tiles.rows, padded.shape[-1])), tile.width)


def _by_distance(plan: _Plan, by_key: jax.Array, tile: _Tile) -> jax.Array:
    """[.., U, V] by key -> [.., U, n] by distance: the transpose of `_by_key`."""
    return _unskew(by_key)[..., : _distances_in(plan, tile)]


def _letters(table: jax.Array) -> str:
    return "kgec" if table.ndim == 4 else "ec"


def _scores(plan: _Plan, row: _Inputs, view: _View, tile: _Tile) -> jax.Array:
    """Scores [B, K, G, U, V] in float32, -inf where hidden."""
    scores = _einsum("bkgud,bkvd->bkguv", row.query_NxBxKxGxUxD, view.key)
    if view.far is not None:
        far = row.far_NxBxKxGxUxR[tile.side]
        scores += _einsum("bkgur,vr->bkguv", far, view.far)
    scores *= plan.scale
    position = _position_scores(plan, row.near_NxBxKxGxUxC, view, tile)
    if position is not None:
        scores += position
    return scores if view.visible is None else jnp.where(view.visible, scores, -jnp.inf)


# -- all tiles ----------------------------------------------------------------------------------------------------


def _sweep(plan: _Plan, position: jax.Array, visit, carry):
    """Carries `visit(carry, tile)` through the tiles of keys that the query tile at `position` may see.

    `position` is the index of the key at the position of the tile's first row. The local band comes first: it holds
    the row's own key, so that an online softmax begins with a finite maximum wherever there is one.
    """
    rows, band, keys = plan.tiles.rows, plan.tiles.band, plan.tiles.keys
    carry = visit(carry, _Tile(position - band, plan.band, band, None, 0, plan.constants is not None))
    for side in (0,) if plan.causal else (0, 1):
        if side == 0:
            # Tile n holds the `keys` keys that end where the local band, or tile n - 1, begins.
            inner, reach = position - band, band

            def tile(order, relative):
                outwards = band + (order + 1) * keys
                return _Tile(position - outwards, keys, outwards, 0, order, relative)
        else:
            inner, reach = plan.keys - (position + rows + plan.after), plan.after

            def tile(order, relative):
                outwards = rows + plan.after + order * keys
                return _Tile(position + outwards, keys, -outwards, 1, order, relative)

        # `inner` keys lie on this side of the band (more than there are, where the band lies past the other end).
        first, last = jnp.maximum((inner - plan.keys) // keys, 0), -(-inner // keys)
        if plan.window is not None:
            last = jnp.minimum(last, max(0, -(-(plan.window - 1 - reach) // keys)))
        reached = 0 if plan.constants is None else plan.constants.tiles[side]
        middle = jnp.clip(reached, first, jnp.maximum(last, first))
        if reached:
            carry = lax.fori_loop(first, middle, lambda n, c, tile=tile: visit(c, tile(n, True)), carry)
        carry = lax.fori_loop(middle, last, lambda n, c, tile=tile: visit(c, tile(n, False)), carry)
    return carry


def _rows(inputs: _Inputs) -> tuple:
    return inputs.query_NxBxKxGxUxD, inputs.near_NxBxKxGxUxC, inputs.far_NxBxKxGxUxR


def _row(inputs: _Inputs, rows: tuple) -> _Inputs:
    """The inputs as one query tile sees them: its own slice of each array of queries."""
    query, near, far = rows
    return inputs._replace(query_NxBxKxGxUxD=query, near_NxBxKxGxUxC=near, far_NxBxKxGxUxR=far)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, inputs: _Inputs, offset: jax.Array, segments: tuple | None) -> jax.Array:
    """[N, B, K, G, U, D] in the value's dtype; `segments` are those of the query tiles [N, B, U], and [B, S] padded."""
    return _forward(plan, inputs, offset, segments)[0]


def _forward(plan: _Plan, inputs: _Inputs, offset: jax.Array, segments: tuple | None):
    """Also the logarithm of the sum of exponentials of every row's scores, +inf where it sees nothing."""
    row_segments, key_segments = segments or (None, None)

    def query_tile(_, xs):
        index, rows, own_segments = xs
        row = _row(inputs, rows)

        def visit(carry, tile):
            highest, total, out = carry
            view = _view(plan, inputs, tile, offset, own_segments, key_segments)
            with jax.named_scope("scores"):
                scores = _scores(plan, row, view, tile)
            with jax.named_scope("softmax"):
                raised = jnp.maximum(highest, jnp.max(scores, axis=-1))
                # A row that has seen nothing has a maximum of -inf; 0 in its place keeps NaN out.
                finite = jnp.where(jnp.isfinite(raised), raised, 0)
                weights = jnp.exp(scores - finite[..., None])
                kept = jnp.exp(highest - finite)
                total = total * kept + jnp.sum(weights, axis=-1)
            with jax.named_scope("values"):
                out = out * kept[..., None]
                out += _einsum("bkguv,bkvd->bkgud", weights.astype(view.value.dtype), view.value)
                if view.near_value is not None:
                    by_distance = _by_distance(plan, weights, tile)
                    out += _einsum(f"bkgue,{_letters(view.near_value)}->bkguc", by_distance, view.near_value)
            return raised, total, out

        shape = row.query_NxBxKxGxUxD.shape
        start = jnp.full(shape[:-1], -jnp.inf), jnp.zeros(shape[:-1]), jnp.zeros(shape)
        highest, total, out = _sweep(plan, offset + index * plan.tiles.rows, visit, start)
        out /= jnp.where(total > 0, total, 1)[..., None]
        logsumexp = jnp.where(total > 0, highest + jnp.log(total), jnp.inf)
        return None, (out.astype(inputs.value_BxKxSxD.dtype), logsumexp)

    tiles = jnp.arange(inputs.query_NxBxKxGxUxD.shape[0])
    return lax.scan(query_tile, None, (tiles, _rows(inputs), row_segments))[1]


def _attend_forward(plan: _Plan, inputs: _Inputs, offset: jax.Array, segments: tuple | None):
    out, logsumexp = _forward(plan, inputs, offset, segments)
    return out, (inputs, offset, segments, out, logsumexp)


def _attend_backward(plan: _Plan, residuals: tuple, out_gradient: jax.Array) -> tuple:
    """Gradients of all inputs in one sweep, from scores computed again (Dao et al., arXiv 2205.14135, Alg. 4)."""
    inputs, offset, segments, out, logsumexp = residuals
    row_segments, key_segments = segments or (None, None)

    def add(gradient: jax.Array | None, part: jax.Array, start: jax.Array, axis: int) -> jax.Array:
        """Adds `part` to a slice of a gradient."""
        old = lax.dynamic_slice_in_dim(gradient, start, part.shape[axis], axis)
        return lax.dynamic_update_slice_in_dim(gradient, old + part, start, axis)

    def query_tile(whole, xs):
        index, rows, own_segments, d_out, out, logsumexp = xs
        row = _row(inputs, rows)
        with jax.named_scope("delta"):
            delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

        def visit(carry, tile):
            d, (d_query, d_near, d_far) = carry
            view = _view(plan, inputs, tile, offset, own_segments, key_segments)
            with jax.named_scope("weights"):
                weights = jnp.exp(_scores(plan, row, view, tile) - logsumexp[..., None])
                d_weights = _einsum("bkgud,bkvd->bkguv", d_out, view.value)
                if view.near_value is not None:
                    letters = _letters(view.near_value)
                    by_distance = _einsum(f"bkguc,{letters}->bkgue", d_out, view.near_value)
                    d_weights += _by_key(plan, by_distance, tile, 0.0)
                d_scores = weights * (d_weights - delta[..., None])
                d_products = d_scores * plan.scale
            with jax.named_scope("keys_and_values"):
                start, rounded = tile.start + plan.padding, d_products.astype(view.key.dtype)
                d_key = _einsum("bkguv,bkgud->bkvd", rounded, row.query_NxBxKxGxUxD)
                d_value = _einsum("bkguv,bkgud->bkvd", weights.astype(d_out.dtype), d_out)
                d = d._replace(
                    key_BxKxSxD=add(d.key_BxKxSxD, d_key, start, 2),
                    value_BxKxSxD=add(d.value_BxKxSxD, d_value, start, 2),
                )
            with jax.named_scope("queries"):
                d_query += _einsum("bkguv,bkvd->bkgud", rounded, view.key)
                if view.far is not None:
                    part = _einsum("bkguv,vr->bkgur", d_products, view.far)
                    d_far = tuple(x + part if side == tile.side else x for side, x in enumerate(d_far))
            with jax.named_scope("tables"):
                if view.near is not None or view.bias is not None:
                    by_distance = _by_distance(plan, d_scores, tile)
                if view.near is not None:
                    letters = _letters(view.near)
                    d_near += _einsum(f"bkgue,{letters}->bkguc", by_distance, view.near) * plan.scale
                if d.key_table is not None:
                    part = _einsum(f"bkgue,bkguc->{letters}", by_distance, row.near_NxBxKxGxUxC) * plan.scale
                    d = d._replace(key_table=add(d.key_table, part, _table_start(plan, tile, offset), -2))
                if d.value_table is not None:
                    letters = _letters(view.near_value)
                    part = _einsum(f"bkgue,bkguc->{letters}", _by_distance(plan, weights, tile), d_out)
                    d = d._replace(value_table=add(d.value_table, part, _table_start(plan, tile, offset), -2))
                if d.bias_table is not None:
                    part = jnp.sum(by_distance, axis=(0, 3))
                    d = d._replace(bias_table=add(d.bias_table, part, _table_start(plan, tile, offset), -1))
            return d, (d_query, d_near, d_far)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), rows)
        whole, d_rows = _sweep(plan, offset + index * plan.tiles.rows, visit, (whole, zeros))
        return whole, jax.tree.map(lambda d, x: d.astype(x.dtype), d_rows, rows)

    # Gradients that many query tiles add to are carried, in float32; those of the queries come tile by tile.
    shared = _row(inputs, (None, None, (None, None)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shared)
    tiles = jnp.arange(inputs.query_NxBxKxGxUxD.shape[0])
    xs = tiles, _rows(inputs), row_segments, out_gradient, out, logsumexp
    d_shared, d_rows = lax.scan(query_tile, zeros, xs)
    return _row(jax.tree.map(lambda d, x: d.astype(x.dtype), d_shared, shared), d_rows), None, None


_attend.defvjp(_attend_forward, _attend_backward)
