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
from wavelet_jax.attention.common import einsum

# The name, for the policies of `jax.checkpoint`, of what a forward pass makes that the backward pass cannot do without:
# the output and the logarithm of its sums. Where these are saved, no score is computed a third time.
KEPT = "attention"


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
    """Queries in every form that scores are made of; without `far`, `near` and `position` may be None."""

    query: jax.Array  # [.., D, G, U]
    position: jax.Array | None  # [.., D, G, U], for the product with a learned table; None: there is none
    near: jax.Array | None  # [.., W, G, U]: position scores of the W keys of the local band of a row's block
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
    key_everywhere: bool  # relative keys are a table over all distances
    scale: float

    @property
    def after(self) -> int:
        """Keys of a local band after its block's last row."""
        return 0 if self.causal else self.tiles.band

    @property
    def overhang(self) -> int:
        """Tokens that a tile that holds a key may stick out by, on either side."""
        return max(self.tiles.band + self.tiles.rows + self.after, self.tiles.keys)

    def has_outer(self, side: int) -> bool:
        """Whether any query tile sees key tiles outside its local tile, before it (side 0) or after it (side 1).

        A loop over none is left out of the program: its slices, which never run, would still have to fit into the
        padded keys.
        """
        reach = self.tiles.band if side == 0 else self.after
        if (side == 1 and self.causal) or (self.window is not None and self.window - 1 <= reach):
            return False
        if self.offset is None:
            return True
        if side == 0:  # the local tile of the last rows leaves most keys before it
            return self.offset + (self.row_tiles - 1) * self.tiles.rows > reach
        return self.keys > self.offset + self.tiles.rows + reach

    @property
    def row_tiles(self) -> int:
        return -(-self.queries // self.tiles.rows)

    @property
    def padding(self) -> tuple[int, int]:
        """Keys added (before, after), so that no tile that holds a key sticks out."""
        if self.offset is None:
            return self.overhang, self.overhang
        # The local tiles of the first rows and of the last, and tiles outwards, which end anywhere.
        last = self.offset + self.row_tiles * self.tiles.rows
        before, after = self.tiles.band - self.offset, last + self.after - self.keys
        if self.has_outer(0):
            before = max(before, self.tiles.keys)
        if self.has_outer(1):
            after = max(after, self.tiles.keys)
        return min(max(before, 0), self.overhang), min(max(after, 0), self.overhang)


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
    return offset + (plan.queries + plan.tiles.rows) + plan.overhang


def split_heads(array: jax.Array | np.ndarray, with_heads: int, num_kv_heads: int) -> jax.Array:
    """[H, ..] -> [K, G, ..] where the array has `with_heads` axes; the others serve all heads as they are."""
    if array.ndim != with_heads:
        return jnp.asarray(array)
    return jnp.reshape(array, (num_kv_heads, array.shape[0] // num_kv_heads, *array.shape[1:]))


def rows_of(plan: Plan, query_BxKxDxGxU: jax.Array, position_BxKxDxGxU: jax.Array | None) -> Rows:
    """All forms of a tile's queries; those that constant factors make are float32, also of bfloat16 queries."""
    position = query_BxKxDxGxU if position_BxKxDxGxU is None else position_BxKxDxGxU
    if plan.constants is None or plan.key_everywhere:
        return Rows(query_BxKxDxGxU, position if plan.key_everywhere else None, None, ())

    def blocks(x: jax.Array) -> jax.Array:  # [.., U] -> [.., U / block, block]
        return x.reshape(*x.shape[:-1], -1, plan.tiles.block)

    def far_coordinates(far: factors.Far, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:-1], -1, far.rows.shape[0])
        return join(einsum("bkcgiu,urc->bkrgiu", x, far.rows))

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], -1)

    near = plan.constants.near
    x, *xs = _products(position, [form and form.project for form in (near, *plan.constants.far)])
    x = position if x is None else x
    fill = [(0, 0)] * (near.rows.ndim - 2) + [(0, int(plan.causal)), (0, 0)]  # a distance more: what `skew` wants
    table = split_heads(np.pad(near.rows, fill), 3, position.shape[1])
    G = einsum(f"bkcgiu,{letters(table)}->bkgiue", blocks(x), table)
    width = plan.tiles.band + plan.tiles.block + plan.after
    scores = jnp.moveaxis(skew(G, width, -jnp.inf, near.rows.shape[-2]), -1, 2)  # [b, k, W, g, i, u]
    far = tuple(far and far_coordinates(far, x) for far, x in zip(plan.constants.far, xs, strict=True))
    return Rows(query_BxKxDxGxU, None, join(scores), far)


def _products(x_BxKxDxGxU: jax.Array, matrices: list[np.ndarray | None]) -> list[jax.Array | None]:
    """[B, K, c, G, U] float32 with each matrix, [D, c] or [H, D, c]; None for None."""
    given = [matrix for matrix in matrices if matrix is not None]
    if not given:
        return matrices
    matrix = split_heads(np.concatenate(given, axis=-1), 3, x_BxKxDxGxU.shape[1])
    if matrix.ndim == 2:  # a product for each key head: neither what goes in nor what comes out is transposed
        matrix = jnp.broadcast_to(matrix, (x_BxKxDxGxU.shape[1], *matrix.shape))
    product = einsum(f"bkdgu,{'kdc' if matrix.ndim == 3 else 'kgdc'}->bkcgu", x_BxKxDxGxU, matrix)
    ends = np.cumsum([matrix.shape[-1] for matrix in given])
    parts = iter(jnp.split(product, ends[:-1], axis=2))
    return [None if matrix is None else next(parts) for matrix in matrices]


# -- one tile -----------------------------------------------------------------------------------------------------


def skew(G: jax.Array, width: int, after: float = 0.0, available: int | None = None) -> jax.Array:
    """[.., U, n] by distance -> [.., U, V] by key: out[u, v] = G[u, U - 1 - u + v], `after` where n ends before, or
    `available` of the n do.

    Read row by row with one column less, the same numbers stand shifted by one a row: no gather. What is read past the
    end of a row is of the next one, and hidden. With n = V + 1 nothing is copied before.
    """
    *lead, rows, count = G.shape
    available, columns = available or count, max(count, width + 1)
    G = jnp.pad(G, [(0, 0)] * (G.ndim - 1) + [(0, columns - count)])
    flat = G.reshape(*lead, rows * columns)[..., rows - 1 : columns * rows - 1]
    by_key = flat.reshape(*lead, rows, columns - 1)[..., :width]
    column = np.arange(rows - 1, -1, -1)[:, None] + np.arange(width)
    return by_key if column.max() < available else jnp.where(column < available, by_key, after)


def unskew(x: jax.Array) -> jax.Array:
    """The transpose of `skew`: [.., U, V] by key -> [.., U, U + V] by distance, zeros where no key has it."""
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


class Far(NamedTuple):
    """A far basis for a tile of keys."""

    basis: jax.Array  # [V, R]
    coordinates: int  # which of `Rows.far` goes with it


class View(NamedTuple):
    """What one tile of keys is to one tile of queries: slices of the inputs; None where the terms have no such part."""

    keys: Keys  # V of the S
    table: jax.Array | None  # [n, D] or [K, G, n, D], relative keys of the tile's distances, falling by one
    far: tuple[Far, ...]
    near_value: jax.Array | None  # [n, D] or [K, G, n, D]
    bias: jax.Array | None  # [K, G, n]
    visible: jax.Array | None  # broadcastable to [B, K, V, G, U]; None: all are


def view_of(plan: Plan, inputs: Inputs, keys: Keys, tile: Tile, offset: jax.Array, row_segments, key_segments) -> View:
    def slices(array: jax.Array | None, axis: int) -> jax.Array | None:
        start = tile.start + plan.padding[0]
        return None if array is None else lax.dynamic_slice_in_dim(array, start, tile.width, axis)

    def rows(table: jax.Array | None, axis: int = -2) -> jax.Array | None:
        start, count = table_start(plan, tile, offset), _num_distances(plan, tile)
        return None if table is None else lax.dynamic_slice_in_dim(table, start, count, axis)

    has_table = inputs.key_table is not None and tile.relative
    hides = band_start(plan, tile) is not None or has_table or inputs.bias_table is not None
    return View(
        keys=Keys(*(slices(x, axis) for x, axis in zip(keys, (2, 3, 2, 3), strict=True))),
        table=rows(inputs.key_table) if has_table else None,
        far=_far_of(plan, tile),
        near_value=rows(inputs.value_table),
        bias=rows(inputs.bias_table, -1),
        visible=_visible(plan, tile, row_segments, slices(key_segments, 1), hides),
    )


def _far_of(plan: Plan, tile: Tile) -> tuple[Far, ...]:
    if plan.constants is None or plan.key_everywhere or not tile.relative:
        return ()
    far = plan.constants.far
    if tile.side is not None:
        basis = lax.dynamic_index_in_dim(jnp.asarray(far[tile.side].basis), tile.order, keepdims=False)
        return (Far(basis, tile.side),)
    # What lies in the local tile on either side of the block's own band.
    before, after = tile.row, 0 if plan.causal else plan.tiles.rows - tile.row - tile.rows
    parts = []
    if before:
        parts.append(Far(np.pad(far[2].basis[0, -before:], [(0, tile.width - before), (0, 0)]), 2))
    if after:
        parts.append(Far(np.pad(far[3].basis[0, :after], [(tile.width - after, 0), (0, 0)]), 3))
    return tuple(parts)


def _num_distances(plan: Plan, tile: Tile) -> int:
    """n, distances of a tile: U + V - 1 occur, and one more makes the skew; in a causal local tile, those from 0 on."""
    return tile.width + (0 if plan.causal and tile.side is None else tile.rows)


def table_start(plan: Plan, tile: Tile, offset: jax.Array) -> jax.Array:
    """The row of a table over all distances at which a tile's begin."""
    return first_distance(plan, offset) - (tile.first + tile.rows - 1)


def _visible(plan: Plan, tile: Tile, row_segments, key_segments, hides: bool) -> jax.Array | None:
    """What is hidden in a tile beyond what the near forms hide; None where that is nothing."""
    key = jnp.arange(tile.width, dtype=jnp.int32).reshape(1, 1, -1, 1, 1)
    row = jnp.arange(tile.rows, dtype=jnp.int32).reshape(1, 1, 1, 1, -1)
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


def by_key(G: jax.Array, tile: Tile, after: float) -> jax.Array:
    """[.., G, U or 1, n] by distance -> [.., V, G, U] by key; causal local tiles have `after` past the query."""
    G = jnp.broadcast_to(G, (*G.shape[:-2], tile.rows, G.shape[-1]))
    return jnp.moveaxis(skew(G, tile.width, after), -1, -3)


def by_distance(plan: Plan, x: jax.Array, tile: Tile) -> jax.Array:
    """[.., V, G, U] by key -> [.., G, U, n] by distance: the transpose of `by_key`."""
    return unskew(jnp.moveaxis(x, -3, -1))[..., : _num_distances(plan, tile)]


def letters(table: jax.Array) -> str:
    return "kgec" if table.ndim == 4 else "ec"


def band_start(plan: Plan, tile: Tile) -> int | None:
    """Where in a tile the band begins that `Rows.near` is for; None where it has none."""
    return tile.row if tile.side is None and plan.constants is not None and not plan.key_everywhere else None


def scores_of(plan: Plan, row: Rows, view: View, tile: Tile) -> jax.Array:
    """Scores [B, K, V, G, U] in float32, not scaled, -inf where hidden."""
    scores = einsum("bkvd,bkdgu->bkvgu", with_far(view.keys.key, view), query_with_far(row, view))
    if (start := band_start(plan, tile)) is not None:
        band = lax.slice_in_dim(scores, start, start + row.near.shape[2], axis=2)
        scores = lax.dynamic_update_slice_in_dim(scores, band + row.near, start, axis=2)
    if view.table is not None:
        G = einsum(f"bkcgu,{letters(view.table)}->bkgue", row.position, view.table)
        scores += by_key(G, tile, -jnp.inf)
    if view.bias is not None:
        bias = view.bias[None, :, :, None, :].astype(jnp.float32)
        scores += by_key(bias, tile, -jnp.inf)
    return scores if view.visible is None else jnp.where(view.visible, scores, -jnp.inf)


def with_far(key: jax.Array, view: View, axis: int = 3) -> jax.Array:
    """Keys [B, K, V, D] with the far bases as more head dimensions: `axis`, 2 where they are transposed."""
    bases = (far.basis if axis == 3 else far.basis.T for far in view.far)
    far = (jnp.broadcast_to(x, (*key.shape[:2], *x.shape)).astype(key.dtype) for x in bases)
    return jnp.concatenate([key, *far], axis=axis)


def query_with_far(row: Rows, view: View) -> jax.Array:
    """The queries that go with them, [B, K, D + R, G, U]."""
    far = (row.far[far.coordinates].astype(row.query.dtype) for far in view.far)
    return jnp.concatenate([row.query, *far], axis=2)
