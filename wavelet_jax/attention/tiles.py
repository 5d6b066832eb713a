"""One tile of keys for one tile of queries: what it sees of the inputs, its scores, and the two ways to order them.

In names: N query tiles of U rows, B batch, H = K key heads x G, D head_dim, V keys of a tile, e distances of a tile,
C columns of a near table, R columns of a far basis.
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
    """Sizes of tiles, tokens. Attributes: rows, U; band, keys of the local band beside the tile's own; keys, V."""

    rows: int
    band: int
    keys: int


class Inputs(NamedTuple):
    """What the custom derivative sees; a field that the terms do not need is None. N query tiles, H = K heads x G."""

    query_NxBxKxGxUxD: jax.Array  # with the content bias
    position_NxBxKxGxUxD: jax.Array | None  # with the position bias; None: the same queries
    key_BxKxSxD: jax.Array  # padded on both sides, as is the value
    value_BxKxSxD: jax.Array
    key_table: jax.Array | None  # [n, C] or [K, G, n, C], distances falling; None with constants
    value_table: jax.Array | None  # [n, D] or [K, G, n, D]
    bias_table: jax.Array | None  # [K, G, n]


class Rows(NamedTuple):
    """Queries in every form that scores are made of."""

    query: jax.Array  # [.., U, D]
    near: jax.Array | None  # [.., U, C], for the products with near tables
    far: tuple[jax.Array | None, jax.Array | None]  # [.., U, R], for the far bases before and after


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


class Tile(NamedTuple):
    """One tile of keys as a query tile sees it."""

    start: jax.Array | int  # index of its first key, before padding; it may stick out on either side
    width: int  # V
    first: jax.Array | int  # distance of the query tile's first row from the tile's first key
    side: int | None  # 0 before, 1 after, None the local band
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


def rows_of(plan: Plan, query_NxBxKxGxUxD: jax.Array, position_NxBxKxGxUxD: jax.Array | None) -> Rows:
    """All forms of the queries; those in the coordinates of constant factors are float32, also of bfloat16 queries."""
    position = query_NxBxKxGxUxD if position_NxBxKxGxUxD is None else position_NxBxKxGxUxD
    if plan.constants is None:
        return Rows(query_NxBxKxGxUxD, position if plan.key_everywhere else None, (None, None))

    def project(matrix: np.ndarray) -> jax.Array:
        heads = "kg" if matrix.ndim == 3 else ""
        return einsum(f"nbkgud,{heads}dc->nbkguc", position, split_heads(matrix, 3, position.shape[2]))

    near = position if plan.constants.near.project is None else project(plan.constants.near.project)
    before, after = (
        None if far is None else einsum("nbkguc,urc->nbkgur", project(far.project), far.rows)
        for far in plan.constants.far
    )
    return Rows(query_NxBxKxGxUxD, near, (before, after))


# -- one tile -----------------------------------------------------------------------------------------------------


def skew(G: jax.Array, width: int) -> jax.Array:
    """[.., U, U + V] by distance -> [.., U, V] by key: out[u, v] = G[u, U - 1 - u + v].

    Read row by row with one column less, the same numbers stand shifted by one a row: no gather.
    """
    *lead, rows, columns = G.shape
    flat = G.reshape(*lead, rows * columns)[..., : rows * (columns - 1)]
    return flat.reshape(*lead, rows, columns - 1)[..., rows - 1 : rows - 1 + width]


def unskew(x: jax.Array) -> jax.Array:
    """The transpose of `skew`: [.., U, V] by key -> [.., U, U + V] by distance, zeros where no key has it."""
    *lead, rows, width = x.shape
    none = [(0, 0)] * len(lead)
    x = jnp.pad(x, [*none, (0, 0), (rows - 1, 0)]).reshape(*lead, rows * (rows + width - 1))
    return jnp.pad(x, [*none, (0, rows)]).reshape(*lead, rows, rows + width)


class View(NamedTuple):
    """What one tile of keys is to one tile of queries: slices of the inputs; None where the terms have no such part."""

    key: jax.Array  # [B, K, V, D]
    value: jax.Array  # [B, K, V, D]
    near: jax.Array | None  # [n, C] or [K, G, n, C], distances of the tile falling by one
    far: jax.Array | None  # [V, R]
    near_value: jax.Array | None  # [n, D] or [K, G, n, D]
    bias: jax.Array | None  # [K, G, n]
    visible: jax.Array | None  # broadcastable to [B, K, G, U, V]; None: all are


def _distances_in(plan: Plan, tile: Tile) -> int:
    """n, distances of a tile: U + V - 1 occur, and one more makes the skew; in a causal local band, those from 0 on."""
    return tile.width + (0 if plan.causal and tile.side is None else plan.tiles.rows)


def view_of(plan: Plan, inputs: Inputs, tile: Tile, offset: jax.Array, row_segments, key_segments) -> View:
    def keys(array: jax.Array, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, tile.start + plan.padding, tile.width, axis)

    def rows(table: jax.Array | None, axis: int = -2) -> jax.Array | None:
        start = table_start(plan, tile, offset)
        return None if table is None else lax.dynamic_slice_in_dim(table, start, _distances_in(plan, tile), axis)

    near, far = rows(inputs.key_table), None
    if plan.constants is not None and tile.relative:
        if tile.side is not None and (side := plan.constants.far[tile.side]) is not None:
            far = lax.dynamic_index_in_dim(jnp.asarray(side.basis), tile.order, keepdims=False)
        else:
            table = split_heads(plan.constants.near.rows, 3, inputs.query_NxBxKxGxUxD.shape[2])
            start = plan.constants.near.first - (tile.first + plan.tiles.rows - 1)
            near = lax.dynamic_slice_in_dim(table, start, _distances_in(plan, tile), -2)
    has_near = near is not None or inputs.bias_table is not None
    return View(
        key=keys(inputs.key_BxKxSxD, 2),
        value=keys(inputs.value_BxKxSxD, 2),
        near=near,
        far=far,
        near_value=rows(inputs.value_table),
        bias=rows(inputs.bias_table, -1),
        visible=_visible(plan, tile, row_segments, None if key_segments is None else keys(key_segments, 1), has_near),
    )


def table_start(plan: Plan, tile: Tile, offset: jax.Array) -> jax.Array:
    """The row of a table over all distances at which a tile's begin."""
    return first_distance(plan, offset) - (tile.first + plan.tiles.rows - 1)


def _visible(plan: Plan, tile: Tile, row_segments, key_segments, has_near: bool) -> jax.Array | None:
    """What is hidden in a tile beyond what `_position_scores` hides; None where that is nothing."""
    row, key = jnp.arange(plan.tiles.rows)[:, None], jnp.arange(tile.width)
    distance = tile.first + row - key
    conditions = []
    if tile.side is None and plan.causal and not has_near:
        conditions.append(distance >= 0)
    if plan.window is not None:
        conditions.append(jnp.abs(distance) < plan.window)
    if not _all_keys_exist(plan, tile):
        conditions.append((tile.start + key >= 0) & (tile.start + key < plan.keys))
    if key_segments is not None:
        conditions.append((row_segments[:, :, None] == key_segments[:, None, :])[:, None, None])
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _all_keys_exist(plan: Plan, tile: Tile) -> bool:
    """Whether it is known that a tile that holds a key holds no padding (or in rows only that are padding too)."""
    rows, keys = plan.tiles.rows, plan.tiles.keys
    if plan.offset is None or not plan.causal or plan.offset + plan.queries > plan.keys:
        return False
    if tile.side is None:
        return plan.offset >= plan.tiles.band
    return rows % keys == 0 and (plan.offset - plan.tiles.band) % keys == 0


def _position_scores(plan: Plan, near_queries: jax.Array | None, view: View, tile: Tile) -> jax.Array | None:
    """The near form of relative keys, and the bias: [B, K, G, U, V]; -inf after the query in a causal local band."""
    G = None
    if view.near is not None:
        G = einsum(f"bkguc,{letters(view.near)}->bkgue", near_queries, view.near) * plan.scale
    if view.bias is not None:
        bias = view.bias[None, :, :, None, :].astype(jnp.float32)
        G = bias if G is None else G + bias
    return None if G is None else by_key(plan, G, tile, -jnp.inf)


def by_key(plan: Plan, G: jax.Array, tile: Tile, after: float) -> jax.Array:
    """[.., U or 1, n] by distance -> [.., U, V] by key; `after` for keys after the query in a causal local band."""
    *lead, _, available = G.shape
    missing = tile.width + plan.tiles.rows - available
    padded = jnp.pad(G, [(0, 0)] * (G.ndim - 1) + [(0, missing)], constant_values=after)
    return skew(jnp.broadcast_to(padded, (*lead, plan.tiles.rows, padded.shape[-1])), tile.width)


def by_distance(plan: Plan, x: jax.Array, tile: Tile) -> jax.Array:
    """[.., U, V] by key -> [.., U, n] by distance: the transpose of `by_key`."""
    return unskew(x)[..., : _distances_in(plan, tile)]


def letters(table: jax.Array) -> str:
    return "kgec" if table.ndim == 4 else "ec"


def scores_of(plan: Plan, row: Rows, view: View, tile: Tile) -> jax.Array:
    """Scores [B, K, G, U, V] in float32, -inf where hidden."""
    scores = einsum("bkgud,bkvd->bkguv", row.query, view.key)
    if view.far is not None:
        scores += einsum("bkgur,vr->bkguv", row.far[tile.side], view.far)
    scores *= plan.scale
    position = _position_scores(plan, row.near, view, tile)
    if position is not None:
        scores += position
    return scores if view.visible is None else jnp.where(view.visible, scores, -jnp.inf)
