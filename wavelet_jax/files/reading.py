"""Paths that users name, and JSON files that users or a crash may have damaged: what is wrong with one is one line."""

import json
import os
from pathlib import Path
from typing import Any

from wavelet_jax.errors import UserError, check_local


class MissingFile(UserError):
    """A file or folder that a config names is not there."""


def user_path(text: str, name: str, folder: str = "") -> Path:
    """The path that a user means by `text`: a leading `~` or `~user` is that home folder, as in a shell.

    Args:
      text: as the user wrote it.
      name: of the flag or key, for errors.
      folder: where a relative path starts; empty: in the current folder.

    Raises:
      UserError: `text` is empty, is an address such as gs://bucket/run, or holds a zero byte; the home folder is not
        known.
    """
    check_local(text)
    if not text:
        raise UserError(f"{name} is empty")
    if "\0" in text:
        raise UserError(f"{name} is {text!r}, and no path can have a zero byte")
    expanded = os.path.expanduser(text)
    # With an empty HOME, Python takes "~/runs" for "/runs".
    own_unknown = text.split("/")[0] == "~" and os.environ.get("HOME") == ""
    if text.startswith("~") and (expanded.startswith("~") or own_unknown):
        raise UserError(
            f"{name} is {text!r}, and the home folder that ~ stands for is not known: write the whole path, set HOME, "
            f"or write ./{text} for a file or folder of that name"
        )
    return Path(folder) / expanded


def parse_json(text: str | bytes, place: str) -> Any:
    """The JSON value in a text. Raises `UserError` "PLACE is not JSON (REASON)" for whatever is none."""
    try:
        # Some editors put a byte order mark first. JSON in UTF-16, which `json` would take, is none of our files.
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # of the syntax, the encoding, or a number with thousands of digits
        reason = str(error)
    raise UserError(f"{place} is not JSON ({reason})")


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises `UserError` where it holds none, and OSError where it cannot be read."""
    return parse_json(path.read_bytes(), str(path))
