"""Digests of files, kept from one start to the next: reading a large text to see that it is the same takes minutes."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from wavelet_jax.errors import UserError
from wavelet_jax.files import atomic
from wavelet_jax.files.reading import read_json

_NAME = ".digests.json"
_AT_REST = 10  # seconds; file systems tell changes apart that are some milliseconds, at worst two seconds, apart


@contextlib.contextmanager
def kept(cache: Path) -> Iterator[Callable[[str | Path], str]]:
    """Yields sha256(path) -> hex digest of a file's bytes, which reads the file where it must, and raises OSError.

    A digest from an earlier start is believed where size, inode and both times of the last change are those of when it
    was taken: whatever writes to a file moves its ctime, which nothing can set back. Only files at rest are kept, or a
    second change within the clock's step would go unseen. What the disk itself loses shows in none of these.

    Args:
      cache: the folder that holds the kept ones, in a file; they are kept where it is there and can be written.
    """
    try:
        known = read_json(cache / _NAME)
    except (OSError, UserError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    fresh = {}

    def sha256(path: str | Path) -> str:
        name, now = os.path.abspath(path), time.time()
        with open(path, "rb") as file:
            state = _state(file.fileno())
            match known.get(name):
                case [str(digest), *then] if then == state:
                    return digest
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            newest = max(state[-2:]) / 1e9
            if _state(file.fileno()) == state and newest < now - _AT_REST:
                known[name] = fresh[name] = [digest, *state]
        return digest

    try:
        yield sha256
    finally:
        if fresh and cache.is_dir():
            with contextlib.suppress(OSError):
                still_there = {name: entry for name, entry in known.items() if os.path.exists(name)}
                with atomic.replaced(cache / _NAME) as partial:  # of several processes the last one's are kept
                    partial.write_text(json.dumps(still_there, indent=0), encoding="utf-8")


def _state(descriptor: int) -> list[int]:
    """`stat` of a file that is opened first: on a network file system opening it is what brings that up to date."""
    found = os.fstat(descriptor)
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
