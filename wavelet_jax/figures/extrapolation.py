"""Figures of perplexity and loss past the training length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import StrMethodFormatter

from wavelet_jax.figures import style


def extrapolation(curves: Sequence, stamp: dict[str, Any], path: Path) -> None:
    """Perplexity against evaluation length, one line per method with its interval, training lengths marked."""
    figure, axes = style.new_figure()
    for i, method in enumerate(_methods(curves)):
        rows = [curve.row() for curve in curves if curve.method == method]
        lengths = [row["length"] for row in rows]
        color, marker = style.COLORS[i % len(style.COLORS)], style.MARKERS[i % len(style.MARKERS)]
        axes.plot(lengths, [row["perplexity"] for row in rows], color=color, marker=marker, label=style.plain(method))
        axes.fill_between(
            lengths, [row["ci_low"] for row in rows], [row["ci_high"] for row in rows], color=color, alpha=0.2, lw=0
        )
    _mark_training_lengths(axes, curves)
    axes.set_xscale("log", base=2)
    lengths = sorted({curve.length for curve in curves})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    style.log_scale(axes, [curve.row()["perplexity"] for curve in curves])
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel(f"perplexity per {stamp['unit']}")
    axes.set_title("Perplexity past the training length")
    _finish(figure, axes, stamp, path)


def loss_by_position(curves: Sequence, stamp: dict[str, Any], path: Path) -> None:
    """Mean loss against position in the block at the longest length, in bins of equal width on the log axis.

    It tells extrapolation from the early-token penalty: at any length the first tokens of a block have little context,
    and a longer block has fewer of them.
    """
    longest = max(curve.length for curve in curves)
    figure, axes = style.new_figure()
    for i, curve in enumerate(curve for curve in curves if curve.length == longest):
        block = int(curve.positions.max()) + 1
        edges = np.unique(np.round(np.geomspace(1, block + 1, 4 * int(np.ceil(np.log2(block + 1))) + 1)))
        counts, _ = np.histogram(curve.positions + 1, edges)
        with np.errstate(invalid="ignore"):  # of a model that has diverged, inf - inf
            sums, _ = np.histogram(curve.positions + 1, edges, weights=curve.losses.astype(np.float64))
        centres = np.sqrt(edges[:-1] * (edges[1:] - 1).clip(edges[:-1]))
        seen = counts > 0
        color = style.COLORS[i % len(style.COLORS)]
        axes.plot(centres[seen], sums[seen] / counts[seen], color=color, label=style.plain(curve.method))
    _mark_training_lengths(axes, curves)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(f"position in the block (tokens), blocks as evaluated at length {longest:,}")
    axes.set_ylabel(f"loss (nats per {stamp['unit']})")
    axes.set_title("Loss by position")
    _finish(figure, axes, stamp, path)


def beside_paper(pairs: Sequence, path: Path) -> None:
    """Perplexity against length in multiples of L_train, here on the left and in the paper on the right.

    `pairs` are `paper.Pair`s. One row has one color on both sides; vertical scales differ, as models and texts do.
    """
    figure, sides = style.plt.subplots(1, 2, figsize=(12, 5), dpi=120, layout="constrained", sharex=True)
    for i, row in enumerate(dict.fromkeys(pair.ours.row for pair in pairs)):
        color, marker = style.COLORS[i % len(style.COLORS)], style.MARKERS[i // len(style.COLORS) % len(style.MARKERS)]
        for axes, side in zip(sides, ("ours", "paper"), strict=True):
            lines = sorted((getattr(pair, side) for pair in pairs if pair.ours.row == row), key=lambda x: x.length)
            multiples = [line.length / line.train_length for line in lines]
            axes.plot(
                multiples, [line.perplexity for line in lines], color=color, marker=marker, label=style.plain(row)
            )
    for axes, title in zip(sides, ("here", "in the paper"), strict=True):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        style.log_scale(axes, [line.perplexity for pair in pairs for line in (pair.ours, pair.paper)])
        axes.axvline(1, color="0.4", ls="--", lw=1, zorder=0)
        axes.set_xlabel("evaluation length over L_train")
        axes.set_title(f"Perplexity {title}")
        axes.grid(alpha=0.25)
    sides[0].legend(frameon=False)
    tables = ", ".join(str(table) for table in sorted({pair.paper.table for pair in pairs}))
    protocols = ", ".join(sorted({pair.ours.protocol for pair in pairs}))
    note = f"{protocols}; the paper: Oka et al., ICLR 2025, Table {tables}; other models and texts than here"
    style.save(figure, path, note)


def _methods(curves: Sequence) -> list[str]:
    return list(dict.fromkeys(curve.method for curve in curves))


def _mark_training_lengths(axes, curves: Sequence) -> None:
    lengths = sorted({curve.train_length for curve in curves})
    for length in lengths:
        axes.axvline(length, color="0.4", ls="--", lw=1, zorder=0)
    label = ", ".join(f"{length:,}" for length in lengths)
    axes.plot([], [], color="0.4", ls="--", lw=1, label=f"training length ({label})")


def _finish(figure, axes, stamp: dict[str, Any], path: Path) -> None:
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    stride = ", ".join(f"{stride:,}" for stride in stamp["stride"])
    note = f"{stamp['protocol']}, stride {stride}; {stamp['tokens_scored']:,} tokens scored at every length; "
    note += f"{stamp['tokenizer']} tokenizer; {stamp['interval']}"
    style.save(figure, path, note)
