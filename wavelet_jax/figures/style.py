"""Every picture: in colors that color-blind readers can tell apart, and with its stamp."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot as plt
from matplotlib.ticker import AutoLocator, LogLocator, NullLocator, StrMethodFormatter

# Okabe and Ito's palette, then marks to tell more than eight apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LONGEST_NAME = 60  # letters of a name in a picture


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


def new_figure():
    return plt.subplots(figsize=(7.5, 5), dpi=120, layout="constrained")


def log_scale(axes, drawn: Sequence[float]) -> None:
    """A logarithmic axis: evenly spaced numbers where a decade is not reached, else 1, 2, 5 (or 1) of each decade.

    `drawn` are its values; if no value is finite, nothing is scaled.
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
