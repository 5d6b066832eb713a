"""Figures of wavelets and of tables of position vectors, as in the paper."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wavelet_jax.figures import style
from wavelet_jax.wavelets import discrete, scale_shift_grid, wavelet_position


def wavelets_by_scale(exponents: Sequence[int], path: Path, mother: str = "ricker") -> None:
    """psi(t / a) for a = 2^e, one line per scale: the paper's Figures 4 (e = 0 .. 4) and 5 (e = 5 .. 9)."""
    figure, axes = style.new_figure()
    reach = 5 * 2.0 ** max(exponents)
    t = np.linspace(-reach, reach, 2001)
    scales = 2.0 ** np.asarray(exponents, np.float32)
    curves = np.asarray(wavelet_position(t, scales, np.zeros_like(scales), mother))
    for i, exponent in enumerate(exponents):
        axes.plot(t, curves[:, i], color=style.COLORS[i % len(style.COLORS)], label=f"$a = 2^{{{exponent}}}$")
    axes.set_xlabel("t - b (tokens)")
    axes.set_ylabel(r"$\psi((t - b) / a)$")
    axes.set_title(f"{mother.capitalize()} wavelets")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    style.save(figure, path)


def mother_wavelets(path: Path, scale: float = 16.0) -> None:
    """The wavelets compared in section 6.3.1 at one scale, b = 0: the paper's Figure 6. Haar is Eq. (15)'s."""
    figure, axes = style.new_figure()
    t = np.linspace(-3.5 * scale, 3.5 * scale, 2001)
    for i, mother in enumerate(("ricker", "gaussian", "morlet", "haar")):
        curve = np.asarray(wavelet_position(t, np.full(1, scale, np.float32), np.zeros(1, np.float32), mother))[:, 0]
        axes.plot(t, curve, color=style.COLORS[i], label=mother.capitalize(), lw=1 if mother == "morlet" else 1.8)
    axes.set_xlabel("t (tokens)")
    axes.set_ylabel(r"$\psi(t / a)$")
    axes.set_title(f"Mother wavelets, a = {scale:g}, b = 0")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    style.save(figure, path)


def discrete_wavelets(names: Sequence[str], path: Path, level: int = 10) -> None:
    """psi of discrete wavelets (of decomposition), a panel each: the paper's Figures 9 and 10, drawn at level 10."""
    columns = 5
    rows = -(-len(names) // columns)
    figure, panels = style.plt.subplots(rows, columns, figsize=(11, 1.7 * rows + 0.4), dpi=100, layout="constrained")
    for axes in panels.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(panels.flat, names, strict=False):
        psi = discrete.samples(name, level)
        axes.plot(np.arange(len(psi)) / 2**level, psi, color=style.COLORS[0], lw=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    figure.suptitle(f"Discrete wavelets, level {level}, by PyWavelets", fontsize=11)
    style.save(figure, path)


def position_tables(tables: dict[str, tuple[np.ndarray, Sequence[str]]], path: Path) -> None:
    """p[t, j] as pictures, one a title: distances to the right, head dimensions downwards.

    Args:
      tables: title -> (p [T, D] for t = 0 .. T - 1, names of equal groups of dimensions from the first on, say scales).
    """
    figure, panels = style.plt.subplots(
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
    style.save(figure, path)


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
