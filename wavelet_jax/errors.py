"""Errors that a user can mend: one line that says what was wrong and what is allowed."""

import difflib
import os
import re
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints its message as one line and exits with code 2."""


def unknown(kind: str, name: object, allowed: Iterable[str]) -> UserError:
    """A `UserError` for `name`, which is no `kind` (say "position method"), with the nearest of `allowed`."""
    names = list(allowed)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}allowed are {', '.join(names) or 'none'}")


def check_local(folder: str | os.PathLike) -> None:
    """Raises `UserError` for an address such as gs://bucket/run, which would be made as a folder named "gs:"."""
    if address := re.fullmatch(r"(\w+):/+(.*)", str(folder)):  # a Path has lost a slash
        raise UserError(f"{address[1]}://{address[2]} is an address: mount it and give the folder")
