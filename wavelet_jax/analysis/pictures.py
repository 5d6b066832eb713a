"""Pictures of the analysis, in the colors of `figures.style`, which color-blind readers can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.ticker import StrMethodFormatter

from wavelet_jax.analysis import rope_as_wavelet, windows
from wavelet_jax.analysis.attention_maps import Maps
from wavelet_jax.analysis.receptive_field import DISTANCES
from wavelet_jax.figures import style, wavelets
from wavelet_jax.figures.style import COLORS, MARKERS, plt  # after matplotlib has been told to write files only
from wavelet_jax.files import atomic
from wavelet_jax.positions.alibi import slopes

# Keys after the query, which it cannot see; below the threshold (the paper's yellow, paler); the threshold or more.
HIDDEN, BELOW, ABOVE = "white", "#F5E9A8", "black"


def attention_map(
    maps: Mapping[str, Maps],
    layer: int,
    threshold: float,
    path: Path,
    *,
    note: str,
    tokens: Sequence[str] | None = None,
) -> None:
    """Draws where a layer attends, as in the paper's Figures 2, 3, 7 and 8: a row per head, a column per model.

    A cell of the picture is black where any probability in it reaches the threshold.

    Args:
      maps: by the model's name; all of the same length, heads and cells.
      layer: one of `Maps.layers`.
      note: a line below the panels.
      tokens: labels of queries and keys, for maps of single tokens.
    """
    first = next(iter(maps.values()))
    heads, side = first.heads, first.highest.shape[-1]
    inches = max(2.2, 0.13 * len(tokens)) if tokens else 2.2
    shape = (len(heads), len(maps)) if len(maps) > 1 else (-(-len(heads) // 4), min(4, len(heads)))
    figure, grid = plt.subplots(
        *shape,
        figsize=((inches + 0.1) * shape[1] + 0.8, (inches + 0.25) * shape[0] + 0.9),
        dpi=96,
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat:
        axes.set_visible(False)
    places = [(name, j) for j in range(len(heads)) for name in maps]
    for axes, (name, j) in zip(grid.flat, places, strict=False):
        axes.set_visible(True)
        shown = classes(maps[name], layer, j, threshold)
        edge = first.cell * side
        axes.imshow(
            shown,
            cmap=ListedColormap([HIDDEN, BELOW, ABOVE]),
            vmin=0,
            vmax=2,
            interpolation="nearest",
            extent=(0, edge, edge, 0),
        )
        axes.set_title(f"{style.plain(name)}, head {heads[j]}" if len(maps) > 1 else f"head {heads[j]}", fontsize=9)
        if tokens:
            places_of = np.arange(len(tokens)) + 0.5
            upright = 0 if max(map(len, tokens)) <= 2 else 90
            axes.set_xticks(places_of, tokens, rotation=upright, fontsize=7, family="monospace", parse_math=False)
            axes.set_yticks(places_of, tokens, fontsize=7, family="monospace", parse_math=False)
        else:
            axes.set_xticks([0, first.length // 2, first.length])
            axes.set_yticks([0, first.length // 2, first.length])
            axes.tick_params(labelsize=7)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if len(maps) > 1:
            axes.label_outer()
    figure.supxlabel("key (position, tokens)", fontsize=9)
    figure.supylabel("query (position, tokens)", fontsize=9)
    names = style.plain(next(iter(maps))) if len(maps) == 1 else f"{len(maps)} models"
    figure.suptitle(f"Attention of layer {layer} ({names}): {threshold:g} and more in black", fontsize=10)
    style.save(figure, path, note)


def classes(maps: Maps, layer: int, head: int, threshold: float) -> np.ndarray:
    """0, 1 or 2 a cell: hidden by causality, below the threshold, or not; [C, C]. `head` counts in `maps.heads`."""
    highest = maps.highest[maps.layers.index(layer), head]
    cell = np.arange(len(highest))
    return np.where(cell[:, None] < cell, 0, np.where(highest >= threshold, 2, 1))


def receptive_field(rows: Sequence[Mapping[str, Any]], length: int, path: Path, *, note: str) -> None:
    """Distances that hold 50, 90 and 99% of each head's attention, a panel per model, and windows by positions alone.

    Args:
      rows: of `receptive_field.rows`, of one or more models.
    """
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, grid = plt.subplots(
        1, len(names), figsize=(3.9 * len(names) + 0.5, 4.4), dpi=120, layout="constrained", sharey=True, squeeze=False
    )

    def draw(axes, place: float, row: Mapping[str, Any], color: str, filled: bool) -> None:
        # t = 0 has a place on the log axis too.
        values = [row[key] + 1 for key in DISTANCES if row[key] != ""]
        axes.plot([place] * len(values), values, color=color, lw=1, alpha=0.6, zorder=1)
        for value, marker in zip(values, MARKERS, strict=False):
            axes.plot(place, value, marker, ms=5, color=color, mfc=color if filled else "white", zorder=2)

    for axes, name in zip(grid[0], names, strict=True):
        of_kind = {
            kind: [row for row in rows if row["method"] == name and row["kind"] == kind]
            for kind in ("measured", "alibi_window", "wavelet_scale")
        }
        ticks, labels, place = [], [], 0.0
        for layer in dict.fromkeys(row["layer"] for row in of_kind["measured"]):
            heads = [row for row in of_kind["measured"] if row["layer"] == layer]
            for row in heads:
                draw(axes, place, row, COLORS[0], True)
                for window in of_kind["alibi_window"]:
                    if window["head"] == row["head"]:
                        draw(axes, place + 0.35, window, COLORS[1], False)
                place += 1
            ticks.append(place - (len(heads) + 1) / 2)
            labels.append(f"layer {layer}")
            axes.axvline(place - 0.3, color="0.85", lw=0.8, zorder=0)
            place += 0.4
        if of_kind["wavelet_scale"]:
            for row in of_kind["wavelet_scale"]:
                draw(axes, place, row, COLORS[2], False)
                place += 0.5
            ticks.append(place - 0.25 * (len(of_kind["wavelet_scale"]) + 1))
            labels.append("scales")
        axes.axhline(length, color="0.4", ls="--", lw=1, zorder=0)
        axes.set_xticks(ticks, labels, fontsize=8)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_title(style.plain(name), fontsize=10)
        axes.grid(axis="y", alpha=0.25)
        for share, marker in zip(windows.SHARES, MARKERS, strict=False):
            axes.plot([], [], marker, color="0.3", ms=5, label=f"{share:.0%} within")
        axes.plot([], [], "s", color=COLORS[0], label="heads, measured")
        if of_kind["alibi_window"]:
            axes.plot([], [], "s", color=COLORS[1], mfc="white", label="by the slope alone")
        if of_kind["wavelet_scale"]:
            axes.plot([], [], "s", color=COLORS[2], mfc="white", label="|ψ| of each scale")
        axes.plot([], [], color="0.4", ls="--", lw=1, label=f"the text ({length:,})")
        axes.legend(frameon=False, fontsize=7, loc="upper left")
    grid[0][0].set_ylim(0.8, 16 * length)
    grid[0][0].set_ylabel("distance + 1 (tokens)")
    figure.suptitle("How far heads look", fontsize=11)
    style.save(figure, path, note)


def gradient(curves: Mapping[str, np.ndarray], train_length: Sequence[int], path: Path, *, note: str) -> None:
    """Cumulative normalized gradient (Chi et al.) against the distance from the last token, one line per model."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6), dpi=110, layout="constrained")
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot(np.arange(1, len(curve) + 1), curve, color=COLORS[i % len(COLORS)], label=style.plain(name))
    for n, each in enumerate(sorted(set(train_length))):
        label = "training length" if n == 0 else None
        axes.axvline(each, color="0.4", ls="--", lw=1, zorder=0, label=label)
    axes.axhline(0.99, color="0.4", ls=":", lw=1, zorder=0, label="99%")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tokens counted, from the last one backwards")
    axes.set_ylabel("share of the gradient's norm")
    axes.set_title("What the last prediction depends on")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    style.save(figure, path, note)


# -- without a trained model ----------------------------------------------------------------------------------------


def rope_wavelets(path: Path, d: int = 64) -> None:
    """psi and psi' of Eq. (7) at two positions, and where RoPE's matrix samples them."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 5.4), dpi=110, layout="constrained", sharex=True, sharey=True)
    t = np.linspace(-0.25, 2.25, 2001)
    for column, m in zip(grid.T, (3, 20), strict=True):
        k = rope_as_wavelet.turns(m)
        delta = rope_as_wavelet.delta(rope_as_wavelet.rotation_angles(m, d), k)
        for axes, function, name in zip(
            column, (rope_as_wavelet.psi, rope_as_wavelet.psi_odd), ("ψ (even rows)", "ψ' (odd rows)"), strict=True
        ):
            for low, high in ((-0.25, 0), (0, 1), (1, 2), (2, 2.25)):  # it jumps between these
                piece = t[(t >= low) & (t < high)]
                axes.plot(piece, function(piece, k), color=COLORS[0], lw=1.2)
            for places, marker, color, label in (
                (delta, MARKERS[0], COLORS[1], "t = δ(j): column j"),
                (1 + delta, MARKERS[1], COLORS[2], "t = 1 + δ(j): column j + 1"),
            ):
                axes.plot(places, function(places, k), marker, ms=4, color=color, label=label)
            axes.set_title(f"{name}, position m = {m}: k = {k}", fontsize=9)
            axes.grid(alpha=0.25)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    for axes in grid[1]:
        axes.set_xlabel("t")
    figure.suptitle(f"RoPE's Haar-like wavelets: one point a pair of dimensions in each half (d = {d})", fontsize=11)
    style.save(figure, path)


def rope_matrices(path: Path, m: int = 20, d: int = 16) -> None:
    """RoPE's matrix, the wavelet matrix, their difference, and the matrix of the Fourier transform."""
    angles = rope_as_wavelet.rotation_angles(m, d)
    rope = rope_as_wavelet.rotations(angles)
    wavelet = rope_as_wavelet.wavelet_matrix(angles, rope_as_wavelet.turns(m))
    difference = np.abs(wavelet - rope)
    figure, grid = plt.subplots(1, 4, figsize=(13, 3.7), dpi=110, layout="constrained")
    panels = (
        (rope, "RoPE, Eq. (6) and (17)"),
        (wavelet, "wavelets evaluated, Eq. (8)"),
        (None, f"|difference|, at most {difference.max():.0e}"),
        (np.real(rope_as_wavelet.dft_matrix(d)) * np.sqrt(d), "Fourier transform, real part"),
    )
    for axes, (matrix, title) in zip(grid, panels, strict=True):
        if matrix is None:
            image = axes.imshow(np.log10(np.maximum(difference, 1e-18)), cmap="cividis", vmin=-18, vmax=-14)
            figure.colorbar(image, ax=axes, shrink=0.75, label="log10")
        else:
            image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("head dimension t")
        axes.set_xticks(range(0, d, 4))
        axes.set_yticks(range(0, d, 4))
    grid[0].set_ylabel("row j")
    figure.colorbar(image, ax=grid[3], shrink=0.75)
    figure.suptitle(f"Position m = {m}, d = {d}, float64", fontsize=11)
    style.save(figure, path)


def alibi_windows(path: Path, num_heads: int = 8) -> None:
    """ALiBi's softmax over equal keys, a line per head, with the distances that hold 90% of it: section 4's windows."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), dpi=90, layout="constrained")
    t, places = np.arange(2048), np.arange(num_heads)
    for head, slope in enumerate(slopes(num_heads).tolist()):
        probability = -np.expm1(-slope) * np.exp(-slope * t)
        left.plot(t + 1, probability, color=COLORS[head % len(COLORS)], label=f"1/{1 / slope:g}")
    left.axhline(1e-3, color="0.4", ls="--", lw=1, label="0.001, as in Figure 2")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_ylim(1e-6, 1)
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    left.set_xlabel("distance + 1 (tokens)")
    left.set_ylabel("probability")
    left.set_title("Softmax of the bias alone", fontsize=10)
    left.legend(title="slope", fontsize=7, title_fontsize=8, frameon=False)
    for n, share in enumerate(windows.SHARES):
        reached = [windows.alibi_window(slope, share) + 1 for slope in slopes(num_heads).tolist()]
        right.plot(places, reached, MARKERS[n] + "-", color=COLORS[n], label=f"{share:.0%} of the mass within")
    bands = [windows.alibi_band(slope, 1e-3) + 1 for slope in slopes(num_heads).tolist()]
    right.plot(places, bands, "kX--", label="at least 0.001 up to")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    right.set_xticks(places, [f"1/{1 / slope:g}" for slope in slopes(num_heads).tolist()], fontsize=8)
    right.set_xlabel("slope of the head")
    right.set_ylabel("distance + 1 (tokens)")
    right.set_title("Windows", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    style.save(figure, path)


def without_a_run(out: Path) -> list[Path]:
    """Draws the pictures that no trained model is needed for into a folder, and says which."""
    drawn = {
        "rope_wavelets.png": rope_wavelets,
        "rope_matrices.png": rope_matrices,
        "alibi_windows.png": alibi_windows,
    }
    with atomic.written_together(out) as partial:
        for name, draw in drawn.items():
            draw(partial / name)
        names = [path.name for path in wavelets.paper_wavelets(partial)]
    return [out / name for name in (*names, *drawn)]
