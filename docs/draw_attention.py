"""Draws the pictures of docs/attention.md and prints its ranks and errors: python docs/draw_attention.py

About a minute on one core. Pictures go to docs/images/attention_table.png, attention_tiles.png.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Polygon, Rectangle

from wavelet_jax import positions
from wavelet_jax.attention import attention, tiled
from wavelet_jax.attention.relative import factors
from wavelet_jax.attention.tiled.geometry import Plan, TileSizes
from wavelet_jax.attention.tiled.tile import query_forms
from wavelet_jax.figures.style import COLORS
from wavelet_jax.positions import Terms

IMAGES = Path(__file__).parent / "images"
LENGTH, HEAD_DIM = 4096, 128
TOLERANCES = (1e-3, 1e-4, 1e-6)
PLAIN, FAR, NEAR = "#DDDDDD", COLORS[5], COLORS[1]


def wavelet_terms(first_exponent: int = 0) -> Terms:
    return positions.make("wavelet", num_heads=1, head_dim=HEAD_DIM, first_exponent=first_exponent).terms({})


def table_of(terms: Terms, count: int) -> np.ndarray:
    """P[t], t = 0 .. count - 1: [count, D], float64."""
    return np.asarray(terms.relative_keys(jnp.arange(count)), np.float64)


def plan_of(terms: Terms, tolerance: float) -> Plan:
    """The plan that `tiled` has for LENGTH queries and keys, with its factors."""
    plan = Plan(tiled.TILES["constant keys"], True, None, 0, LENGTH, LENGTH, None, False, 1 / math.sqrt(HEAD_DIM))
    return dataclasses.replace(plan, factors=tiled.factors_of(plan, terms, tolerance))


def ranks(found: factors.Factors) -> tuple[int, int, int]:
    """(columns of the near form, those of the far form, key tiles that it reaches)."""
    return found.near.rows.shape[-1], found.far[0].basis.shape[-1], found.reach_in_tiles[0]


# -- pictures -----------------------------------------------------------------------------------------------------


def draw_table(terms: Terms, tiles: TileSizes, path: Path) -> None:
    """The table with its support, and how fast the singular values of its zones fall."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), dpi=110, layout="constrained")
    distance = np.unique(np.geomspace(1, LENGTH, 400).astype(int)) - 1
    table = table_of(terms, LENGTH)
    mesh = left.pcolormesh(
        np.arange(HEAD_DIM + 1), np.append(distance, LENGTH) + 1, table[distance], cmap="RdBu", vmin=-1, vmax=1
    )
    figure.colorbar(mesh, ax=left, label="P[t, j]", pad=0.01)
    left.set_yscale("log", base=2)
    left.invert_yaxis()
    ticks = [2**n for n in range(0, 13, 2)]
    left.set_yticks(np.array(ticks) + 1, [f"{tick:,}" for tick in ticks])
    left.axhline(terms.support + 1, color="black", lw=1.2)
    left.text(2, terms.support * 1.15, f"support: |P| < 1e-4 past t = {terms.support}", va="top", fontsize=9)
    left.axhline(tiles.band + 1, color="black", lw=1, ls="--")
    left.text(2, tiles.band * 1.12, f"far form from t = {tiles.band + 1}", va="top", fontsize=9)
    left.set_xlabel("head dimension j: scales 2^0 .. 2^7, 16 shifts each")
    left.set_ylabel("distance t (tokens; axis: log of t + 1)")
    left.set_title("The table: dense near 0, smooth further out, then nothing")

    first, reach = tiles.band + 1, 2 * tiles.keys
    zone = np.arange(first, first + reach)
    rows = np.linspace(0, tiles.rows - 1, 32).astype(int)  # smooth functions show their range in a few rows u
    whole = table_of(terms, first + reach + tiles.rows)
    curves = {
        f"near zone, t < {tiles.band + tiles.block}: [t, j]": whole[: tiles.band + tiles.block],
        "far zone: [t, j]": whole[first:],
        "far zone as tiles see it: [s, (u, j)], t = s + u": np.concatenate([whole[zone + u] for u in rows], axis=1),
    }
    for (label, matrix), color, marker in zip(curves.items(), COLORS, "os^", strict=False):
        values = np.linalg.svd(matrix, compute_uv=False)[:64]
        right.plot(np.arange(1, len(values) + 1), values / values[0], color=color, marker=marker, ms=3, label=label)
    right.set_yscale("log")
    right.set_ylim(1e-8, 2)
    right.set_xlim(0, 64)
    right.set_xlabel(f"number of the singular value (of {HEAD_DIM} columns j)")
    right.set_ylabel("singular value, the first is 1")
    right.set_title("Its rank: small near 0, tiny away from it")
    right.grid(alpha=0.25)
    right.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def draw_tiles(plan: Plan, path: Path) -> None:
    """Which form serves which pair of query and key, in the sizes that `tiled` takes for LENGTH tokens."""
    tiles, reached = plan.sizes, plan.factors.tiles[0]
    figure, axes = plt.subplots(figsize=(7, 6), dpi=110, layout="constrained")

    def box(key: int, query: int, width: int, height: int, **look) -> None:
        start = max(key, 0)
        axes.add_patch(Rectangle((start, query), key + width - start, height, **look))

    for position in range(0, LENGTH, tiles.rows):
        for n in range(-(-max(position - tiles.band, 0) // tiles.keys)):
            key = position - tiles.band - (n + 1) * tiles.keys
            box(key, position, tiles.keys, tiles.rows, fc=FAR if n < reached else PLAIN, ec="white", lw=1)
        for row in range(0, tiles.rows, tiles.block):
            query = position + row
            box(position - tiles.band, query, row, tiles.block, fc=FAR, ec="none")
            box(query - tiles.band, query, tiles.band + tiles.block, tiles.block, fc=NEAR, ec="none")
        axes.axhline(position, color="black", lw=0.8)
    axes.add_patch(Polygon([(0, 0), (LENGTH, 0), (LENGTH, LENGTH)], fc="white", ec="black", lw=0.8, alpha=0.75))
    axes.set_xlim(0, LENGTH)
    axes.set_ylim(LENGTH, 0)
    ticks = np.arange(0, LENGTH + 1, tiles.rows)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("key (position, tokens)")
    axes.set_ylabel("query (position, tokens)")
    axes.set_aspect("equal")
    rank = plan.factors.far[0].basis.shape[-1]
    axes.set_title(
        f"TileSizes: {tiles.rows:,} queries, blocks of {tiles.block} with a band of {tiles.band}, {tiles.keys} keys"
    )
    axes.legend(
        handles=[
            Patch(fc=NEAR, label="near scores, made once a tile"),
            Patch(fc=FAR, label=f"far: {rank} more columns beside the {HEAD_DIM} of a key"),
            Patch(fc=PLAIN, label="plain: past the support"),
            Patch(fc="white", ec="black", label="hidden by causality"),
        ],
        loc="upper right",
        framealpha=1,
    )
    figure.savefig(path)
    plt.close(figure)


# -- numbers ------------------------------------------------------------------------------------------------------


def print_ranks() -> None:
    print("grid, tolerance: support at 1e-4, near columns, far columns, far key tiles")
    for first_exponent in (0, 2):
        terms = wavelet_terms(first_exponent)
        for tolerance in TOLERANCES:
            near, far, reached = ranks(plan_of(terms, tolerance).factors)
            print(f"  2^{first_exponent}.., {tolerance:g}: {terms.support}, {near}, {far}, {reached}")


def errors_of_scores(plan: Plan, table: np.ndarray, query_TxD: np.ndarray) -> tuple[float, float]:
    """The largest error of q . p / sqrt(D) by the near and by the far form, float32, in the last tile of queries."""
    tiles = plan.sizes
    last_DxU = jnp.asarray(query_TxD[-tiles.rows :]).T
    made = query_forms(plan, last_DxU[None, None, :, None], None)
    near = np.asarray(made.near[0, 0, :, 0], np.float64)  # [W, U]
    far_RxU = made.far[0][0, 0, :, 0]
    first = LENGTH - tiles.rows
    exact_UxT = query_TxD[first:].astype(np.float64) @ table.T

    row, column = np.arange(tiles.rows), np.arange(tiles.band + tiles.block)[:, None]
    distance = row - (row // tiles.block * tiles.block - tiles.band + column)  # [W, U]
    wanted = exact_UxT[row, np.maximum(distance, 0)]
    near_error = np.max(np.abs(near - wanted), where=distance >= 0, initial=0)
    far_error = 0.0
    for n, basis in enumerate(plan.factors.far[0].basis):
        found = np.asarray(jnp.asarray(basis) @ far_RxU, np.float64)  # [V, U]
        distance = row + tiles.band + (n + 1) * tiles.keys - np.arange(tiles.keys)[:, None]
        far_error = max(far_error, np.max(np.abs(found - exact_UxT[row, distance])))
    return near_error * plan.scale, far_error * plan.scale


def print_errors() -> None:
    """Against float64: standard normal queries, keys and values, one head of 128, LENGTH tokens, causal.

    Scores and outputs of the definition in 64 rows of every 512 (its table of 64 x 4,096 distances takes 128 MB).
    """
    terms, rng = wavelet_terms(), np.random.default_rng(0)
    query, key, value = (rng.standard_normal((LENGTH, HEAD_DIM)).astype(np.float32) for _ in range(3))
    table = table_of(terms, LENGTH)  # of float32 numbers, which all forms are given
    starts = range(448, LENGTH, 512)
    rows = np.concatenate([np.arange(start, start + 64) for start in starts])
    distance = rows[:, None] - np.arange(LENGTH)

    def scores(dtype: type) -> np.ndarray:
        q, k, p = (np.asarray(x, dtype) for x in (query[rows], key, table))
        position = np.take_along_axis(q @ p.T, np.maximum(distance, 0), 1)
        return np.where(distance >= 0, (q @ k.T + position) / np.sqrt(dtype(HEAD_DIM)), -np.inf)

    exact = scores(np.float64)
    error = np.abs(scores(np.float32)[distance >= 0] - exact[distance >= 0])
    print(f"scores as defined, in float32: largest error {error.max():.1e}, rms {np.sqrt(np.mean(error**2)):.1e}")
    largest = np.max(np.sum(np.abs(query), axis=1)) / math.sqrt(HEAD_DIM)
    for tolerance in TOLERANCES:
        near, far = errors_of_scores(plan_of(terms, tolerance), table, query)
        print(f"  tolerance {tolerance:g}: near scores {near:.1e}, far {far:.1e}; bound {tolerance * largest:.1e}")

    weights = np.exp(exact - exact.max(axis=1, keepdims=True))
    wanted = weights @ value.astype(np.float64) / weights.sum(axis=1, keepdims=True)
    arrays = [jnp.asarray(x)[None, :, None] for x in (query, key, value)]

    @jax.jit
    def by_definition(start: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(arrays[0], start, 64, 1)
        return attention(part, *arrays[1:], terms, query_positions=start, key_positions=0, backend="reference")

    outputs = {"reference": np.concatenate([by_definition(jnp.int32(start))[0, :, 0] for start in starts])}
    for tolerance in TOLERANCES:
        compute = jax.jit(functools.partial(attention, terms=terms, backend="tiled", far_tolerance=tolerance))
        outputs[f"tiled, tolerance {tolerance:g}"] = np.asarray(compute(*arrays))[0, rows, 0]
    for name, out in outputs.items():
        error = np.asarray(out, np.float64) - wanted
        print(f"output, {name}: largest error {np.abs(error).max():.1e}, rms {np.sqrt(np.mean(error**2)):.1e}")


def main() -> None:
    terms = wavelet_terms()
    plan = plan_of(terms, tiled.FAR_TOLERANCE["float32"])
    draw_table(terms, plan.sizes, IMAGES / "attention_table.png")
    draw_tiles(plan, IMAGES / "attention_tiles.png")
    print_ranks()
    print_errors()


if __name__ == "__main__":
    main()
