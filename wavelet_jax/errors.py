"""Errors that a user can mend: one line that says what was wrong and what is allowed."""

import difflib
import os
import re
import traceback
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints its message as one line and exits with code 2."""


def unknown(kind: str, name: object, allowed: Iterable[str]) -> UserError:
    """A `UserError` for `name`, which is not a `kind` (say "position method"), with the nearest of `allowed`."""
    names = list(allowed)
    near = nearest(name, names)
    hint = f"did you mean {near!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}allowed are {', '.join(names) or 'none'}")


def nearest(name: object, names: Iterable[str]) -> str | None:
    """The name most like the given one; None if none is like it."""
    return next(iter(difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)), None)


def one_line(error: Exception) -> str:
    """The message of an error on one line; for an OSError, the file and the fault."""
    if not isinstance(error, OSError) or error.strerror is None:
        said = " ".join(line.strip() for line in str(error).splitlines())
    else:
        files = " -> ".join(
            os.fsdecode(file) for file in (error.filename, error.filename2) if isinstance(file, str | bytes)
        )
        said = f"{files}: {error.strerror}" if files else error.strerror
    if isinstance(error, OSError) and not error.filename and error.__traceback__:  # the line of code is all there is
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{said or type(error).__name__} (in {frame.name}, {frame.filename}:{frame.lineno})"
    return said


def check_local(folder: str | os.PathLike) -> None:
    """Raises `UserError` for an address such as gs://bucket/run, which would be made as a folder named "gs:"."""
    if address := re.fullmatch(r"(\w+):/+(.*)", str(folder)):  # a Path has lost a slash
        raise UserError(f"{address[1]}://{address[2]} is an address: mount it and give the folder")
