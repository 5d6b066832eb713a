"""Low-rank factors of a constant table of relative keys: what makes a relative term cheap away from the diagonal.

A table P[t] of vectors (wavelets, say) has few independent columns near t = 0, is smooth further out, and nothing past
its support. For queries in tiles of U rows, row u of a tile and a key s tokens before the tile's first row lie
t = u + s apart, and with few terms r

    near:  P[t, :]     = sum over c of near[t, c] project[:, c]                     (any t of the near zone)
    far:   P[u + s, :] = sum over r of basis[s, r] (sum over c of rows[u, r, c] project[:, c])

so that a far tile of keys costs R more head dimensions, with one small product per query for all of them. Everything
here is NumPy in float64, done while tracing, and depends on the table's numbers only, never on who made it.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable

import numpy as np

# A rank above this costs more than it saves: the near form then serves the whole support.
MAX_FAR_RANK = 48
_PROBES = 16  # columns that the range finder draws beyond the largest rank
_SAMPLED_ROWS = 16  # rows u of a tile that a rank is sought on at first


@dataclasses.dataclass(frozen=True, eq=False)
class Near:
    """P[t] of the distances in a block's local band as `rows @ project^T`, from the highest down, float32.

    Attributes:
      rows: [n, c], or [H, n, D] where heads have tables that share too little.
      project: [D, c], or [H, D, c]; None: c is D, and the rows are P itself.
    """

    rows: np.ndarray
    project: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Far:
    """P[u + s] = sum over r of basis[s, r] rows[u, r, :] project^T for the key tiles of one side, float32.

    Attributes:
      basis: [tiles, V, R]: tile 0 is the one beside the local band; its V keys stand in the order of their positions.
      rows: [U, R, c], or [H, U, R, c].
      project: [D, c], or [H, D, c].
    """

    basis: np.ndarray
    rows: np.ndarray
    project: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """Low-rank factors of a constant table, for one choice of tile sizes.

    Attributes:
      reach_in_tiles: key tiles (before, after) the local tile that the term reaches; it is below the tolerance beyond.
      near: the local band of a block of rows; None where the table has no low rank away from it (a step function).
      far: for the key tiles (before, after) the local tile, and for the keys of the local tile (before, after) the band
        of a block; None where there are none.
    """

    reach_in_tiles: tuple[int, int]
    near: Near | None
    far: tuple[Far | None, Far | None, Far | None, Far | None]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a table is cut, tokens.

    Attributes:
      span: the lowest and the highest distance that matters. The table should extend U + V past both, so that what it
        is smooth in continues; where it ends, its outermost entry is repeated.
      rows: U, queries of a tile.
      block: rows that share a local band; divides U.
      before, after: keys of a local band before its block's first row and after its last; after None: causal.
      keys: V, keys of a tile away from the bands.
      tolerance: the largest error of an entry of P.
    """

    span: tuple[int, int]
    rows: int
    block: int
    before: int
    after: int | None
    keys: int
    tolerance: float


def factor(table: np.ndarray, first: int, cut: Cut) -> Factors:
    """Factors of a table for queries in tiles, with local bands for a block of them at a time.

    Args:
      table: [n, D] or [H, n, D]: P at the distances first, first - 1, .., first - n + 1.
      first: tokens.
      cut: how.
    """
    digest = hashlib.sha256(np.ascontiguousarray(table).data).digest()
    return _factor(_Hashed(table, digest), first, cut)


class _Hashed:
    """An array that a cache can hold: equal if the digests are."""

    def __init__(self, array: np.ndarray, digest: bytes):
        self.array, self.digest = array, digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.digest == other.digest and self.array.shape == other.array.shape


@functools.lru_cache(maxsize=64)
def _factor(hashed: _Hashed, first: int, cut: Cut) -> Factors:
    table = np.asarray(hashed.array, np.float64)
    per_head = table.ndim == 3
    flat = np.moveaxis(table, -2, 0).reshape(table.shape[-2], -1)  # [n, D] or [n, H * D]

    def entries(highest: int, lowest: int) -> np.ndarray:
        """[.., D] of the distances highest, highest - 1, .., lowest."""
        return flat[np.clip(first - np.arange(highest, lowest - 1, -1), 0, len(flat) - 1)]

    reach = _reach_in_tiles(flat, first, cut)

    def unflatten(columns: np.ndarray) -> np.ndarray:
        """[D, c] or [H, D, c] of [D or H * D, c]."""
        return columns.reshape(*((table.shape[0], table.shape[2]) if per_head else table.shape[1:]), -1)

    sides: list[Far | None] = []
    for side, own_rows, shape in _far_shapes(reach, cut):
        outwards = np.arange(math.prod(shape))
        distances = cut.before + 1 + outwards if side == 0 else -(own_rows + (cut.after or 0)) - outwards
        if not distances.size:
            sides.append(None)
            continue
        separated = _separate(entries, distances, own_rows, cut.tolerance)
        if separated is None:
            return Factors(reach, None, (None, None, None, None))
        basis, coefficients, project = separated
        basis = basis.reshape(*shape, -1)
        if side == 0:
            basis = basis[:, ::-1]  # key positions rise within a tile, and their distances fall
        sides.append(Far(_single(basis), _single(coefficients), _single(unflatten(project))))

    zone = entries(cut.before + cut.block - 1, 0 if cut.after is None else -(cut.after + cut.block))
    inner, project = _truncate(zone, cut.tolerance)
    if inner.shape[1] < table.shape[-1]:
        near = Near(_single(inner), _single(unflatten(project)))
    else:
        near = Near(_single(np.moveaxis(unflatten(zone.T), -1, -2)), None)
    before, after, inside_before, inside_after = sides
    return Factors(reach, near, (before, after, inside_before, inside_after))


def _reach_in_tiles(flat: np.ndarray, first: int, cut: Cut) -> tuple[int, int]:
    """Key tiles, before and after the local tile, that hold a pair of query and key within the support."""
    past = np.flatnonzero(np.max(np.abs(flat), axis=1) > cut.tolerance)
    furthest = min(cut.span[1], first - int(past[0])) if past.size else 0
    nearest = max(cut.span[0], first - int(past[-1])) if past.size else 0
    tiles_before = max(0, -(-(furthest - cut.before) // cut.keys))
    tiles_after = 0 if cut.after is None else max(0, -(-(-nearest - cut.after) // cut.keys))
    return tiles_before, tiles_after


def _far_shapes(reach: tuple[int, int], cut: Cut) -> tuple[tuple[int, int, tuple[int, int]], ...]:
    """(side, rows, (tiles, keys of a tile)) of the four parts in the order of `Factors.far`."""
    in_tile = cut.rows - cut.block  # keys of the local tile before, or after, the band of its last, or first, block
    return (
        (0, cut.rows, (reach[0], cut.keys)),
        (1, cut.rows, (reach[1], cut.keys)),
        (0, cut.block, (1, in_tile)),
        (1, cut.block, (1, 0 if cut.after is None else in_tile)),
    )


def _separate(entries, distances: np.ndarray, rows: int, tolerance: float) -> tuple[np.ndarray, ...] | None:
    """(basis [s, R], coefficients [U, R, c], project [D, c]) of P[u + s] within the tolerance; None: no small rank.

    Args:
      entries: (highest, lowest) -> [highest - lowest + 1, D], P from the highest distance down.
      distances: s, consecutive, ordered from the local band outwards.
    """
    # The columns first: few are left away from the diagonal. The two steps share the tolerance.
    low, high = int(distances.min()), int(distances.max())
    values, project = _truncate(entries(high + rows - 1, low)[::-1], tolerance / 4)  # values[i] is of low + i
    if values.shape[1] > MAX_FAR_RANK:  # and the far rank is not smaller
        return None
    step = 1 if distances[0] == low else -1

    def shifted(u: int) -> np.ndarray:  # [s, c]: P[u + s] in the order of `distances`
        return values[u : u + len(distances)][::step]

    def error(basis: np.ndarray, rows: Iterable[int]) -> float:
        """The largest error of an entry where those rows are projected on the columns of `basis`."""
        return max(np.max(np.abs((x - basis @ (basis.T @ x)) @ project.T)) for x in map(shifted, rows))

    # Range finder (Halko, Martinsson, Tropp, arXiv 0909.4061): smooth functions show their whole range in a few rows u.
    # Where the other rows show that it was not all, more rows are drawn.
    sampled = 0
    while sampled < rows:
        sampled = min(rows, max(_SAMPLED_ROWS, 4 * sampled))
        drawn_rows = np.unique(np.linspace(0, rows - 1, sampled).astype(int))
        generator = np.random.default_rng(0)  # any draw serves, and one draw keeps programs equal from run to run
        width = min(MAX_FAR_RANK + _PROBES, len(distances))
        drawn = sum(shifted(u) @ generator.standard_normal((values.shape[1], width)) for u in drawn_rows)
        orthonormal, _ = np.linalg.qr(drawn)

        within = np.stack([orthonormal.T @ shifted(u) for u in range(rows)])  # [U, width, c]
        by_column = np.moveaxis(within, 1, 0).reshape(width, -1)
        order = np.linalg.eigh(by_column @ by_column.T)[1][:, ::-1]  # the directions that carry most come first
        basis = orthonormal @ order
        rank = _least(lambda kept: error(basis[:, :kept], drawn_rows) <= tolerance * 3 / 4, width)  # noqa: B023
        if rank > MAX_FAR_RANK:
            return None
        if error(basis[:, :rank], range(rows)) <= tolerance * 3 / 4:
            return basis[:, :rank], np.einsum("wr,uwc->urc", order[:, :rank], within), project
    return None


def _truncate(matrix: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(left [n, c], right [m, c]) of the least c with every entry of matrix - left @ right^T within the tolerance."""
    # Right singular vectors by the small Gram matrix: they are orthonormal whatever it lost, and the error is measured.
    right = np.linalg.eigh(matrix.T @ matrix)[1][:, ::-1]
    left = matrix @ right
    rank = _least(lambda c: np.max(np.abs(matrix - left[:, :c] @ right[:, :c].T)) <= tolerance, right.shape[1])
    return left[:, :rank], right[:, :rank]


def _least(enough, most: int) -> int:
    """The least count from 1 to `most` that is enough, by bisection; `most` is taken to be."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _single(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)
