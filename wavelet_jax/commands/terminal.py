"""The commands' terminal output, which may be lost without ending a run.

A run of days is worth more than its progress bar, and output can fail at any time: the reader of a pipe leaves, the
disk under a log file fills up, a terminal is closed. `protect` puts a raw stream that never fails below `sys.stdout`
and `sys.stderr`. Everything above it (print, tqdm, logging, warnings, tracebacks, the flush at exit) then keeps
working, and is seen again as soon as the output can be written again.
"""

import contextlib
import errno
import io
import logging
import os
import select
import sys
from typing import Any

from absl import logging as absl_logging

from wavelet_jax.errors import UserError

_DESCRIPTORS = {"stdout": 1, "stderr": 2}
_raw: dict[str, "_Forgiving"] = {}  # by name, once they are protected


class _Forgiving(io.RawIOBase):
    """Writes to a file descriptor; what cannot be written is dropped. `lost` is the first error, or None.

    A reader that left before the end (EPIPE, as `| head` does) has what it wanted, so this is not an error.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.lost: OSError | None = None

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another program made the pipe non-blocking, and it is full: wait as usual
            select.select([], [self._descriptor], [])
            return 0
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.lost = self.lost or error
            return len(data)


def protect() -> None:
    """Makes `sys.stdout` and `sys.stderr` drop what cannot be written, and opens closed descriptors on /dev/null.

    A descriptor left closed would be given to the next file that is opened, and messages of C++ libraries would be
    written into it. Streams that are not those of the process, such as pytest's, are left alone.
    """
    for descriptor in (0, *_DESCRIPTORS.values()):  # in this order: open() takes the lowest that is free
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in _DESCRIPTORS.items():
        if name not in _raw and _is_on(stream := getattr(sys, name), descriptor):
            _raw[name] = _Forgiving(descriptor)
            setattr(sys, name, _text(stream, _raw[name]))
            for handler in (*logging.root.handlers, absl_logging.get_absl_handler().python_handler):
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    handler.setStream(getattr(sys, name))  # it has kept the one of its import


def check() -> None:
    """Raises `UserError` where standard output lost something; for commands that have no other result."""
    sys.stdout.flush()
    if "stdout" in _raw and (error := _raw["stdout"].lost):
        raise UserError(f"the output could not be written ({error.strerror})")


def _is_on(stream: io.TextIOBase | None, descriptor: int) -> bool:
    """Whether a stream of `sys` writes to this descriptor; None is one whose descriptor was closed."""
    try:
        return stream is None or stream.fileno() == descriptor
    except (OSError, AttributeError):  # one that has no descriptor
        return False


def _text(before: io.TextIOWrapper | None, raw: _Forgiving) -> io.TextIOWrapper:
    """A text stream on `raw` that encodes and flushes as the one before it did.

    Characters that the encoding lacks, of a name in a table under LANG=C, are written as escapes.
    """
    flushed: dict[str, Any] = {"line_buffering": True}
    if before is not None:
        with contextlib.suppress(OSError):
            before.flush()
        flushed = {"line_buffering": before.line_buffering, "write_through": before.write_through}
    encoding = before.encoding if before is not None else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", **flushed)
