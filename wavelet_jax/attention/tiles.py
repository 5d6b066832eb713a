"""One tile of keys for one tile of queries: what it sees of the inputs, its scores, and the two ways to order them.

In names: N query tiles of U rows, B batch, H = K key heads x G, D head_dim, V keys of a tile, e distances of a tile,
C columns of a near table, R columns of a far basis.

Scores stand as [V, G, U], keys before rows, and every array of a row as [D, G, U]: then each product of the sweep,
forward and backward, has its operands in the order of memory that a matrix product wants, with keys and values
transposed once for all tiles and no scores ever. They are not scaled: the exponential is, which saves a pass.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wavelet_jax.attention import factors

# Products are accumulated in float32, whatever the dtype of their operands.
einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of tiles, tokens.

    Attributes:
      rows: U, queries of a tile.
      block: queries that a local band is for; they divide U, and their bands are where less is hidden and dense.
      band: keys of a local band beside the block's own.
      keys: V.
    """

    rows: int
    block: int
    band: int
    keys: int


class Inputs(NamedTuple):
    """What the custom derivative sees; a field that the terms do not need is None. N query tiles, H = K heads x G."""

    query_NxBxKxDxGxU: jax.Array  # with the content bias
    position_NxBxKxDxGxU: jax.Array | None  # with the position bias; None: the same queries
    key_BxKxSxD: jax.Array  # padded on both sides, as is the value
    value_BxKxSxD: jax.Array
    key_table: jax.Array | None  # [n, C] or [K, G, n, C], distances falling; None with constants
    value_table: jax.Array | None  # [n, D] or [K, G, n, D]
    bias_table: jax.Array | None  # [K, G, n], divided by the scale of the scores


class Rows(NamedTuple):
    """Queries in every form that scores are made of."""

    query: jax.Array  # [.., D, G, U]
    near: jax.Array | None  # [.., C, G, U], for the products with near tables
    far: tuple[jax.Array | None, ...]  # [.., R, G, U], for the far bases in the order of `Factors.far`


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
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
        """Keys of a local band after its block's last row."""
        return 0 if self.causal else self.tiles.band

    @property
    def padding(self) -> int:
        """Keys added on both sides, so that no tile that holds a key sticks out."""
        return max(self.tiles.band + self.tiles.rows + self.after, self.tiles.keys)


class Tile(NamedTuple):
    """One tile of keys as a query tile, or a block of its rows, sees it."""

    start: jax.Array | int  # index of its first key, before padding; it may stick out on either side
    width: int  # V
    first: jax.Array | int  # distance of the first of the rows from the tile's first key
    row: int  # the first of the rows, counted in the query tile
    rows: int  # U, or those of a block
    side: int | None  # 0 before, 1 after, None the local tile: the bands of all blocks before the last row, or of all
    order: jax.Array | int  # 0, 1, .. outwards
    relative: bool  # whether the constant table of relative keys reaches it


def first_distance(plan: Plan, offset: int | jax.Array) -> int | jax.Array:
    """Distance of row 0 of the tables over all distances: no tile that holds a key has a higher one."""
    return offset + (plan.queries + plan.tiles.rows) + plan.padding


def split_heads(array: jax.Array | np.ndarray, with_heads: int, num_kv_heads: int) -> jax.Array:
    """[H, ..] -> [K, G, ..] where the array has `with_heads` axes; the others serve all heads as they are."""
    if array.ndim != with_heads:
        return jnp.asarray(array)
    return jnp.reshape(array, (num_kv_heads, array.shape[0] // num_kv_heads, *array.shape[1:]))


def rows_of(plan: Plan, query_NxBxKxDxGxU: jax.Array, position_NxBxKxDxGxU: jax.Array | None) -> Rows:
    """All forms of the queries; those in the coordinates of constant factors are float32, also of bfloat16 queries."""
    position = query_NxBxKxDxGxU if position_NxBxKxDxGxU is None else position_NxBxKxDxGxU
    if plan.constants is None:
        return Rows(query_NxBxKxDxGxU, position if plan.key_everywhere else None, ())

    def project(matrix: np.ndarray) -> jax.Array:
        heads = "kg" if matrix.ndim == 3 else ""
        return einsum(f"nbkdgu,{heads}dc->nbkcgu", position, split_heads(matrix, 3, position.shape[2]))

    def project_far(far: factors.Far) -> jax.Array:
        x = project(far.project)
        by_block = x.reshape(*x.shape[:-1], -1, far.rows.shape[0])
        out = einsum("nbkcgiu,urc->nbkrgiu", by_block, far.rows)
        return out.reshape(*out.shape[:-2], -1)

    near = position if plan.constants.near.project is None else project(plan.constants.near.project)
    return Rows(query_NxBxKxDxGxU, near, tuple(None if far is None else project_far(far) for far in plan.constants.far))


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


class Keys(NamedTuple):
    """Keys and values as a sweep reads them, padded; the transposed ones, [B, K, D, S], where it needs them."""

    key: jax.Array  # [B, K, S, D]
    key_transposed: jax.Array | None
    value: jax.Array | None  # [B, K, S, D]
    value_transposed: jax.Array | None


class Part(NamedTuple):
    """Relative keys of some keys of a tile, in one of the two forms."""

    start: int  # the first of its keys, counted in the tile
    width: int
    near: jax.Array | None = None  # [n, C] or [K, G, n, C], distances falling by one
    far: jax.Array | None = None  # [V, R]
    coordinates: int = 0  # which of `Rows.far` goes with it


class View(NamedTuple):
    """What one tile of keys is to one tile of queries: slices of the inputs; None where the terms have no such part."""

    keys: Keys  # V of the S
    parts: tuple[Part, ...]
    near_value: jax.Array | None  # [n, D] or [K, G, n, D]
    bias: jax.Array | None  # [K, G, n]
    visible: jax.Array | None  # broadcastable to [B, K, V, G, U]; None: all are


def view_of(plan: Plan, inputs: Inputs, keys: Keys, tile: Tile, offset: jax.Array, row_segments, key_segments) -> View:
    def slices(array: jax.Array | None, axis: int) -> jax.Array | None:
        start = tile.start + plan.padding
        return None if array is None else lax.dynamic_slice_in_dim(array, start, tile.width, axis)

    def rows(table: jax.Array | None, axis: int = -2) -> jax.Array | None:
        start, count = table_start(plan, tile, offset), _num_distances(plan, tile, tile.width)
        return None if table is None else lax.dynamic_slice_in_dim(table, start, count, axis)

    if inputs.key_table is not None:
        parts = (Part(0, tile.width, near=rows(inputs.key_table)),)
    elif plan.constants is not None and tile.relative:
        parts = _constant_parts(plan, tile, num_kv_heads=inputs.query_NxBxKxDxGxU.shape[2])
    else:
        parts = ()
    hides = any(part.near is not None for part in parts) or inputs.bias_table is not None
    return View(
        keys=Keys(*(slices(x, axis) for x, axis in zip(keys, (2, 3, 2, 3), strict=True))),
        parts=parts,
        near_value=rows(inputs.value_table),
        bias=rows(inputs.bias_table, -1),
        visible=_visible(plan, tile, row_segments, slices(key_segments, 1), hides),
    )


def _constant_parts(plan: Plan, tile: Tile, num_kv_heads: int) -> tuple[Part, ...]:
    far, near = plan.constants.far, plan.constants.near
    if tile.side is not None and far[tile.side] is not None:
        basis = lax.dynamic_index_in_dim(jnp.asarray(far[tile.side].basis), tile.order, keepdims=False)
        return (Part(0, tile.width, far=basis, coordinates=tile.side),)
    before = after = 0  # keys of the local tile on either side of the block's own band, where they have a far form
    if tile.side is None:
        before = tile.row if far[2] is not None else 0
        after = plan.tiles.rows - tile.row - tile.rows if far[3] is not None else 0
    width = tile.width - before - after
    table = split_heads(near.rows, 3, num_kv_heads)
    start = near.first - (tile.first - before + tile.rows - 1)
    parts = [Part(before, width, near=lax.dynamic_slice_in_dim(table, start, _num_distances(plan, tile, width), -2))]
    if before:
        parts.insert(0, Part(0, before, far=far[2].basis[0, -before:], coordinates=2))
    if after:
        parts.append(Part(before + width, after, far=far[3].basis[0, :after], coordinates=3))
    return tuple(parts)


def _num_distances(plan: Plan, tile: Tile, width: int) -> int:
    """n, distances of the last `width` keys of a tile: U + V - 1 occur, and one more makes the skew; in a causal local
    tile, those from 0 on.
    """
    return width + (0 if plan.causal and tile.side is None else tile.rows)


def table_start(plan: Plan, tile: Tile, offset: jax.Array) -> jax.Array:
    """The row of a table over all distances at which a tile's begin."""
    return first_distance(plan, offset) - (tile.first + tile.rows - 1)


def _visible(plan: Plan, tile: Tile, row_segments, key_segments, hides: bool) -> jax.Array | None:
    """What is hidden in a tile beyond what the near forms hide; None where that is nothing."""
    key, row = jnp.arange(tile.width)[:, None, None], jnp.arange(tile.rows)  # [V, 1, 1] and [U]
    distance = tile.first + row - key
    conditions = []
    if tile.side is None and plan.causal and not hides:
        conditions.append(distance >= 0)
    if plan.window is not None:
        conditions.append(jnp.abs(distance) < plan.window)
    if not _all_keys_exist(plan, tile):
        conditions.append((tile.start + key >= 0) & (tile.start + key < plan.keys))
    if key_segments is not None:
        conditions.append((row_segments[:, None, :] == key_segments[:, :, None])[:, None, :, None])
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _all_keys_exist(plan: Plan, tile: Tile) -> bool:
    """Whether it is known that a tile that holds a key holds no padding (or in rows only that are padding too)."""
    rows, keys = plan.tiles.rows, plan.tiles.keys
    if plan.offset is None or not plan.causal or plan.offset + plan.queries > plan.keys:
        return False
    if tile.side is None:
        return plan.offset >= plan.tiles.band
    return rows % keys == 0 and (plan.offset - plan.tiles.band) % keys == 0


def by_key(G: jax.Array, tile: Tile, width: int, after: float) -> jax.Array:
    """[.., G, U or 1, n] by distance -> [.., V, G, U] by key, of the last `width` keys of a tile or all of them.

    `after` goes to keys after the query in a causal local tile.
    """
    *lead, _, available = G.shape
    padded = jnp.pad(G, [(0, 0)] * (G.ndim - 1) + [(0, width + tile.rows - available)], constant_values=after)
    return jnp.moveaxis(_skew(jnp.broadcast_to(padded, (*lead, tile.rows, padded.shape[-1])), width), -1, -3)


def by_distance(plan: Plan, x: jax.Array, tile: Tile) -> jax.Array:
    """[.., V, G, U] by key -> [.., G, U, n] by distance: the transpose of `by_key`."""
    return _unskew(jnp.moveaxis(x, -3, -1))[..., : _num_distances(plan, tile, x.shape[-3])]


def letters(table: jax.Array) -> str:
    return "kgec" if table.ndim == 4 else "ec"


def scores_of(plan: Plan, row: Rows, view: View, tile: Tile) -> jax.Array:
    """Scores [B, K, V, G, U] in float32, not scaled, -inf where hidden."""
    scores = einsum("bkvd,bkdgu->bkvgu", view.keys.key, row.query)
    position = []
    for part in view.parts:
        if part.far is not None:
            position.append(einsum("vr,bkrgu->bkvgu", part.far, row.far[part.coordinates]))
        else:
            G = einsum(f"bkcgu,{letters(part.near)}->bkgue", row.near, part.near)
            position.append(by_key(G, tile, part.width, -jnp.inf))
    if position:
        scores += position[0] if len(position) == 1 else jnp.concatenate(position, axis=2)
    if view.bias is not None:
        bias = view.bias[None, :, :, None, :].astype(jnp.float32)
        scores += by_key(bias, tile, tile.width, -jnp.inf)
    return scores if view.visible is None else jnp.where(view.visible, scores, -jnp.inf)
