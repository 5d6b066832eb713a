"""What of a text could not be taken as it stands: counted while it is read, and told when all of it was."""

REPLACEMENT = "\ufffd"  # what bytes that are not UTF-8 are read as


class Notes:
    """Counts of what was replaced or left out, by kind and file."""

    def __init__(self):
        self._found = {}  # {(what it is, with {count} and {first}): [count, where the first is]}

    def add(self, what: str, place: str, count: int = 1) -> None:
        """Counts `count` more of `what`, a sentence with "{count}" and "{first}" in it; the first is at `place`."""
        self._found.setdefault(what, [0, place])[0] += count

    def lines(self) -> list[str]:
        """A sentence for each kind and file."""
        return [
            what.replace("{count}", f"{count:,}").replace("{first}", first)
            for what, (count, first) in self._found.items()
        ]


def count_replaced(text: bytes) -> int:
    """How many U+FFFD `text.decode("utf-8", "replace")` has that are not in the text itself."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace").count(REPLACEMENT) - text.count(REPLACEMENT.encode())
    return 0
