"""Every picture: in colours that colour-blind readers can tell apart, and with its stamp."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot as plt
from matplotlib.ticker import AutoLocator, LogLocator, NullLocator, StrMethodFormatter

from wavelet_jax import discrete
from wavelet_jax.wavelets import scale_shift_grid, wavelet_position

# Okabe and Ito's palette, then marks to tell more than eight apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LONGEST_NAME = 60  # letters of a name in a picture


def extrapolation(curves: Sequence, stamp: dict[str, object], path: Path) -> None:
    """Perplexity against evaluation length, one line a method with its interval, training lengths marked."""
    figure, axes = _figure()
    for i, method in enumerate(_methods(curves)):
        rows = [curve.row() for curve in curves if curve.method == method]
        lengths = [row["length"] for row in rows]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(lengths, [row["perplexity"] for row in rows], color=colour, marker=marker, label=plain(method))
        axes.fill_between(
            lengths, [row["ci_low"] for row in rows], [row["ci_high"] for row in rows], color=colour, alpha=0.2, lw=0
        )
    _mark_training_lengths(axes, curves)
    axes.set_xscale("log", base=2)
    lengths = sorted({curve.length for curve in curves})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    _log_scale(axes, [curve.row()["perplexity"] for curve in curves])
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel(f"perplexity a {stamp['unit']}")
    axes.set_title("Perplexity past the training length")
    _finish(figure, axes, stamp, path)


def loss_by_position(curves: Sequence, stamp: dict[str, object], path: Path) -> None:
    """Mean loss against position in the block at the longest length, in bins of equal width on the log axis.

    It tells extrapolation from the early-token penalty: at any length the first tokens of a block have little context,
    and a longer block has fewer of them.
    """
    longest = max(curve.length for curve in curves)
    figure, axes = _figure()
    for i, curve in enumerate(curve for curve in curves if curve.length == longest):
        block = int(curve.positions.max()) + 1
        edges = np.unique(np.round(np.geomspace(1, block + 1, 4 * int(np.ceil(np.log2(block + 1))) + 1)))
        counts, _ = np.histogram(curve.positions + 1, edges)
        with np.errstate(invalid="ignore"):  # of a model that has diverged, inf - inf
            sums, _ = np.histogram(curve.positions + 1, edges, weights=curve.losses.astype(np.float64))
        centres = np.sqrt(edges[:-1] * (edges[1:] - 1).clip(edges[:-1]))
        seen = counts > 0
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(centres[seen], sums[seen] / counts[seen], color=colour, label=plain(curve.method))
    _mark_training_lengths(axes, curves)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(f"position in the block (tokens), blocks as evaluated at length {longest:,}")
    axes.set_ylabel(f"loss (nats a {stamp['unit']})")
    axes.set_title("Loss by position")
    _finish(figure, axes, stamp, path)


def beside_paper(pairs: Sequence, path: Path) -> None:
    """Perplexity against length in multiples of L_train, here on the left and in the paper on the right.

    `pairs` are `paper.Pair`s. One row has one colour on both sides; vertical scales differ, as models and texts do.
    """
    figure, sides = plt.subplots(1, 2, figsize=(12, 5), dpi=120, layout="constrained", sharex=True)
    for i, row in enumerate(dict.fromkeys(pair.ours.row for pair in pairs)):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        for axes, side in zip(sides, ("ours", "paper"), strict=True):
            lines = sorted((getattr(pair, side) for pair in pairs if pair.ours.row == row), key=lambda x: x.length)
            multiples = [line.length / line.train_length for line in lines]
            axes.plot(multiples, [line.perplexity for line in lines], color=colour, marker=marker, label=plain(row))
    for axes, title in zip(sides, ("here", "in the paper"), strict=True):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        _log_scale(axes, [line.perplexity for pair in pairs for line in (pair.ours, pair.paper)])
        axes.axvline(1, color="0.4", ls="--", lw=1, zorder=0)
        axes.set_xlabel("evaluation length over L_train")
        axes.set_title(f"Perplexity {title}")
        axes.grid(alpha=0.25)
    sides[0].legend(frameon=False)
    tables = ", ".join(str(table) for table in sorted({pair.paper.table for pair in pairs}))
    protocols = ", ".join(sorted({pair.ours.protocol for pair in pairs}))
    note = f"{protocols}; the paper: Oka et al., ICLR 2025, Table {tables}; other models and texts than here"
    save(figure, path, note)


def wavelets_by_scale(exponents: Sequence[int], path: Path, mother: str = "ricker") -> None:
    """psi(t / a) for a = 2^e, one line a scale: the paper's Figures 4 (e = 0 .. 4) and 5 (e = 5 .. 9)."""
    figure, axes = _figure()
    reach = 5 * 2.0 ** max(exponents)
    t = np.linspace(-reach, reach, 2001)
    scales = 2.0 ** np.asarray(exponents, np.float32)
    curves = np.asarray(wavelet_position(t, scales, np.zeros_like(scales), mother))
    for i, exponent in enumerate(exponents):
        axes.plot(t, curves[:, i], color=COLOURS[i % len(COLOURS)], label=f"$a = 2^{{{exponent}}}$")
    axes.set_xlabel("t - b (tokens)")
    axes.set_ylabel(r"$\psi((t - b) / a)$")
    axes.set_title(f"{mother.capitalize()} wavelets")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save(figure, path)


def mother_wavelets(path: Path, scale: float = 16.0) -> None:
    """The wavelets compared in section 6.3.1 at one scale, b = 0: the paper's Figure 6. Haar is Eq. (15)'s."""
    figure, axes = _figure()
    t = np.linspace(-3.5 * scale, 3.5 * scale, 2001)
    for i, mother in enumerate(("ricker", "gaussian", "morlet", "haar")):
        curve = np.asarray(wavelet_position(t, np.full(1, scale, np.float32), np.zeros(1, np.float32), mother))[:, 0]
        axes.plot(t, curve, color=COLOURS[i], label=mother.capitalize(), lw=1 if mother == "morlet" else 1.8)
    axes.set_xlabel("t (tokens)")
    axes.set_ylabel(r"$\psi(t / a)$")
    axes.set_title(f"Mother wavelets, a = {scale:g}, b = 0")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save(figure, path)


def discrete_wavelets(names: Sequence[str], path: Path, level: int = 10) -> None:
    """psi of discrete wavelets (of decomposition), a panel each: the paper's Figures 9 and 10, drawn at level 10."""
    columns = 5
    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(11, 1.7 * rows + 0.4), dpi=100, layout="constrained")
    for axes in panels.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(panels.flat, names, strict=False):
        psi = discrete.samples(name, level)
        axes.plot(np.arange(len(psi)) / 2**level, psi, color=COLOURS[0], lw=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    figure.suptitle(f"Discrete wavelets, level {level}, by PyWavelets", fontsize=11)
    save(figure, path)


def position_tables(tables: dict[str, tuple[np.ndarray, Sequence[str]]], path: Path) -> None:
    """p[t, j] as pictures, one a title: distances to the right, head dimensions downwards.

    Args:
      tables: title -> (p [T, D] for t = 0 .. T - 1, names of equal groups of dimensions from the first on, say scales).
    """
    figure, panels = plt.subplots(
        1, len(tables), figsize=(5.2 * len(tables), 4.2), dpi=100, layout="constrained", squeeze=False
    )
    for axes, (title, (table, groups)) in zip(panels[0], tables.items(), strict=True):
        height = np.max(np.abs(table))
        image = axes.imshow(table.T, aspect="auto", cmap="PuOr", vmin=-height, vmax=height, interpolation="nearest")
        size = table.shape[1] / len(groups)
        axes.set_yticks((np.arange(len(groups)) + 0.5) * size - 0.5, groups)
        axes.set_yticks(np.arange(1, len(groups)) * size - 0.5, minor=True)
        axes.grid(which="minor", axis="y", color="0.5", lw=0.5)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("t = m - n (tokens)")
        axes.set_title(title)
        figure.colorbar(image, ax=axes)
    save(figure, path)


def paper_wavelets(out: Path) -> list[Path]:
    """Draws the paper's Figures 4, 5, 6, 9 and 10, and the table p[t, j] of a smooth and of a discrete wavelet.

    Returns the files, in the folder `out`, which is made.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png" for name in (*(f"figure_{n}" for n in (4, 5, 6, 9, 10)), "position_tables")]
    wavelets_by_scale(range(0, 5), paths[0])
    wavelets_by_scale(range(5, 10), paths[1])
    mother_wavelets(paths[2])
    biorthogonal = [name for name in discrete.TABLE_4 if name.startswith(("bior", "rbio"))]
    discrete_wavelets([name for name in discrete.TABLE_4 if name not in biorthogonal], paths[3])
    discrete_wavelets(biorthogonal, paths[4])
    t = np.arange(300)
    levels, shifts = discrete.level_shift_grid(128)
    position_tables(
        {
            "Ricker": (np.asarray(wavelet_position(t, *scale_shift_grid(128))), [f"$2^{e}$" for e in range(8)]),
            "db4": (
                np.asarray(discrete.discrete_position(t, "db4", levels, shifts)),
                [f"l = {n}" for n in range(1, 9)],
            ),
        },
        paths[5],
    )
    return paths


def plain(name: str) -> str:
    """A name as text that matplotlib draws letter by letter.

    Nothing in it is mathematics, however many dollar signs it has; a leading underscore does not hide it from a legend;
    control characters are shown as escapes; of a long one the middle is left out.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    if len(shown) > _LONGEST_NAME:
        shown = f"{shown[: _LONGEST_NAME // 2]}…{shown[1 - _LONGEST_NAME // 2 :]}"
    # A zero-width space stands before an underscore: a legend leaves out what begins with one.
    return "\u200b" * shown.startswith("_") + shown.replace("$", r"\$")


def save(figure, path: Path, note: str = "") -> None:
    """Writes a picture, with a note in small print below it, and closes the figure, also after an error.

    Letters that the font lacks are drawn as boxes, without a warning.
    """
    if note:
        figure.text(0.995, -0.01, note, ha="right", va="top", fontsize=7, color="0.4", parse_math=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of glyphs, and of layouts that names leave no room
            figure.savefig(path, bbox_inches="tight", pil_kwargs={"optimize": True})
    finally:
        plt.close(figure)


def _figure():
    return plt.subplots(figsize=(7.5, 5), dpi=120, layout="constrained")


def _log_scale(axes, drawn: Sequence[float]) -> None:
    """A logarithmic axis: evenly spaced numbers where a decade is not reached, else 1, 2, 5 (or 1) of each decade.

    `drawn` are its values; where none is finite, there is nothing to scale.
    """
    if not np.isfinite(drawn).any():
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    locator = AutoLocator() if decades < 0.7 else LogLocator(subs=(1, 2, 5) if decades < 4 else (1,))
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _methods(curves: Sequence) -> list[str]:
    return list(dict.fromkeys(curve.method for curve in curves))


def _mark_training_lengths(axes, curves: Sequence) -> None:
    lengths = sorted({curve.train_length for curve in curves})
    for length in lengths:
        axes.axvline(length, color="0.4", ls="--", lw=1, zorder=0)
    label = ", ".join(f"{length:,}" for length in lengths)
    axes.plot([], [], color="0.4", ls="--", lw=1, label=f"training length ({label})")


def _finish(figure, axes, stamp: dict[str, object], path: Path) -> None:
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    stride = ", ".join(f"{stride:,}" for stride in stamp["stride"])
    note = f"{stamp['protocol']}, stride {stride}; {stamp['tokens_scored']:,} tokens scored at every length; "
    note += f"{stamp['tokenizer']} tokenizer; {stamp['interval']}"
    save(figure, path, note)
