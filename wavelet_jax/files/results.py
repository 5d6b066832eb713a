"""Writing results into a folder: numbers first, then pictures. A picture that cannot be drawn costs no number."""

from collections.abc import Callable, Mapping
from pathlib import Path

from wavelet_jax.errors import UserError
from wavelet_jax.files import places


def write(
    out: Path, numbers: Mapping[str, Callable[[Path], object]], pictures: Mapping[str, Callable[[Path], object]]
) -> list[str]:
    """Writes files into `out`, all at once.

    A picture that fails, for whatever reason, is left out, and so is one of its name that an earlier evaluation drew.

    Args:
      out: the folder, which is made.
      numbers: by the file's name, what writes it to a path.
      pictures: by the file's name, what draws it. Matplotlib takes a second to import: these do it, and nothing before.

    Returns:
      One line for each picture that could not be drawn.
    """
    failures = {}
    with places.written_together(out) as partial:
        for name, write_file in numbers.items():
            write_file(partial / name)
        for name, draw in pictures.items():
            try:
                draw(partial / name)
            except Exception as error:  # of matplotlib, a font, memory or the disk: nothing may cost the numbers
                (partial / name).unlink(missing_ok=True)
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                failures[name] = f"{name} could not be drawn ({reason})"
    for name in failures:
        if (out / name).exists():
            places.remove(out / name)
    return list(failures.values())


def check_drawn(failures: list[str], out: Path) -> None:
    """Raises `UserError` where pictures failed, for exit code 2; comes when all else is done."""
    if failures:
        raise UserError(f"{'; '.join(failures)}; the numbers are written, in {out}")
