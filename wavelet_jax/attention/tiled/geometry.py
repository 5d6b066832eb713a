"""Geometry of tiles: their sizes, padding, the tiles that a query tile sees, and the keys that are hidden in one.

Only integers and positions are here; `tile` has the arrays. The letters are in ../README.md.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wavelet_jax.attention import common
from wavelet_jax.attention.relative import factors


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Sizes of tiles, tokens.

    Attributes:
      rows: U, queries of a tile.
      block: queries that share one local band; divides U. Smaller blocks waste less work on hidden entries.
      band: keys of a local band beside the block's own.
      keys: V, keys of a tile outside the local band.
    """

    rows: int
    block: int
    band: int
    keys: int


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
    """The tiles of a call: everything that is known while tracing and does not depend on the position method.

    Attributes:
      sizes: of the tiles.
      causal, window: as in `wavelet_jax.attention.attention`.
      offset: position of query 0 minus that of key 0; None if it is traced.
      queries, keys: T and S.
    """

    sizes: TileSizes
    causal: bool
    window: int | None
    offset: int | None
    queries: int
    keys: int

    @property
    def after(self) -> int:
        """Keys of a local band after its block's last row."""
        return 0 if self.causal else self.sizes.band

    @property
    def overhang(self) -> int:
        """Upper bound on how many tokens a tile with at least one key can extend past either end of the keys."""
        return max(self.sizes.band + self.sizes.rows + self.after, self.sizes.keys)

    def has_outer(self, side: int) -> bool:
        """Whether any query tile sees key tiles outside its local tile, before it (side 0) or after it (side 1).

        An empty loop is left out of the program: its slices, which never run, would still have to fit into the
        padded keys.
        """
        reach = self.sizes.band if side == 0 else self.after
        if (side == 1 and self.causal) or (self.window is not None and self.window - 1 <= reach):
            return False
        if self.offset is None:
            return True
        if side == 0:  # the local tile of the last rows leaves most keys before it
            return self.offset + (self.row_tiles - 1) * self.sizes.rows > reach
        return self.keys > self.offset + self.sizes.rows + reach

    @property
    def row_tiles(self) -> int:
        """N, query tiles."""
        return -(-self.queries // self.sizes.rows)

    @property
    def padding(self) -> tuple[int, int]:
        """Keys added (before, after), so that no tile with at least one key extends past them."""
        if self.offset is None:
            return self.overhang, self.overhang
        # The local tiles of the first rows and of the last, and tiles outwards, which end anywhere.
        last = self.offset + self.row_tiles * self.sizes.rows
        before, after = self.sizes.band - self.offset, last + self.after - self.keys
        if self.has_outer(0):
            before = max(before, self.sizes.keys)
        if self.has_outer(1):
            after = max(after, self.sizes.keys)
        return min(max(before, 0), self.overhang), min(max(after, 0), self.overhang)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan(Geometry):
    """A geometry, and the form in which relative keys come into the scores.

    Attributes:
      factors: of constant relative keys; None if there are none.
      key_everywhere: relative keys are a table over all distances.
      scale: of the scores, 1 / sqrt(D).
    """

    factors: factors.Factors | None
    key_everywhere: bool
    scale: float


class Tile(NamedTuple):
    """One tile of keys as a query tile, or a block of its rows, sees it."""

    start: jax.Array  # index of its first key, before padding; it may stick out on either side
    width: int  # V
    first: jax.Array | int  # distance of the first of the rows from the tile's first key
    row: int  # the first of the rows, counted in the query tile
    rows: int  # U, or those of a block
    side: int | None  # 0: keys before the local tile; 1: keys after it; None: the local tile itself
    order: jax.Array | int  # 0, 1, .. outwards
    relative: bool  # whether the constant table of relative keys reaches it


def first_distance(plan: Geometry, offset: int | jax.Array) -> int | jax.Array:
    """Distance of row 0 of the tables over all distances: no tile that holds a key has a higher one."""
    return offset + (plan.queries + plan.sizes.rows) + plan.overhang


def num_distances(plan: Plan, tile: Tile) -> int:
    """n, distances of a tile: U + V - 1 occur, and one more makes the skew; in a causal local tile, those from 0 on."""
    return tile.width + (0 if plan.causal and tile.side is None else tile.rows)


def table_start(plan: Plan, tile: Tile, offset: jax.Array) -> jax.Array | int:
    """The row of a table over all distances at which a tile's begin."""
    return first_distance(plan, offset) - (tile.first + tile.rows - 1)


def band_start(plan: Plan, tile: Tile) -> int | None:
    """The index in a tile at which the band of `QueryForms.near` begins; None if the tile has none."""
    return tile.row if tile.side is None and plan.factors is not None and not plan.key_everywhere else None


def visible(
    plan: Plan, tile: Tile, row_segments: jax.Array | None, key_segments: jax.Array | None, hides: bool
) -> jax.Array | None:
    """Which keys of a tile are seen, broadcastable to [B, K, V, G, U]; None: all that the near forms do not hide.

    Args:
      row_segments, key_segments: [B, U] and [B, V], or None.
      hides: whether a near form hides what comes after a query.
    """
    key = jnp.arange(tile.width, dtype=jnp.int32).reshape(1, 1, -1, 1, 1)
    row = jnp.arange(tile.rows, dtype=jnp.int32).reshape(1, 1, 1, 1, -1)
    distance = tile.first + row - key
    others = []
    if not _all_keys_exist(plan, tile):
        others.append((tile.start + key >= 0) & (tile.start + key < plan.keys))
    if row_segments is not None and key_segments is not None:
        others.append((row_segments[:, None, :] == key_segments[:, :, None])[:, None, :, None])
    causal = tile.side is None and plan.causal and not hides
    return common.visible(distance, causal=causal, window=plan.window, others=others)


def _all_keys_exist(plan: Plan, tile: Tile) -> bool:
    """Whether it is known that a tile that holds a key holds no padding (or in rows only that are padding too)."""
    rows, keys = plan.sizes.rows, plan.sizes.keys
    if plan.offset is None or not plan.causal or plan.offset + plan.queries > plan.keys:
        return False
    if tile.side is None:
        return plan.offset >= plan.sizes.band
    return rows % keys == 0 and (plan.offset - plan.sizes.band) % keys == 0
