"""Faults of a text that were worked around: counted while it is read, and reported at the end."""

import dataclasses

REPLACEMENT = "\ufffd"  # what bytes that are not UTF-8 are read as


@dataclasses.dataclass
class _Count:
    count: int
    first: str  # where the first is, in the first file
    file: str
    files: set[str]


class Notes:
    """Counts of what was replaced or left out, by kind."""

    def __init__(self):
        self._found: dict[str, _Count] = {}

    def add(self, what: str, file: str, place: str, count: int = 1) -> None:
        """Counts `count` more of a kind.

        Args:
          what: the kind, a sentence with "{file}", "{count}" and "{first}" in it.
          file: where it was found.
          place: where the first of it is in the file.
        """
        found = self._found.setdefault(what, _Count(0, place, file, set()))
        found.count += count
        found.files.add(file)

    def lines(self) -> list[str]:
        """A sentence for each kind, which names the first file, however many there are."""
        return [
            what.replace("{count}", f"{found.count:,}")
            .replace("{first}", found.first)
            .replace("{file}", found.file + _others(len(found.files) - 1))
            for what, found in self._found.items()
        ]


def _others(files: int) -> str:
    return f" and {files:,} more file{'s' * (files > 1)}" if files else ""


def count_replaced(text: bytes) -> int:
    """Number of U+FFFD `text.decode("utf-8", "replace")` has that are not in the text itself."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace").count(REPLACEMENT) - text.count(REPLACEMENT.encode())
    return 0
