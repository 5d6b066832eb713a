"""The lock of a run in a bucket, where no kernel lets go of what a dead process held: a lease, which is renewed.

The lock is an object that is written only if there is none, and renewed, by a thread, only if it is still this
process's. Who finds one watches it: if it is renewed, its holder is alive, and the run is refused; if not for
`SECONDS`, the holder is gone, and the run is taken over. Only its own clock tells a process how long that is.

A holder that was suspended for longer ends when it finds its lease taken: at its next renewal, a quarter of `SECONDS`
after it wakes, and until then it may write.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from wavelet_jax.errors import UserError
from wavelet_jax.files import places
from wavelet_jax.parallel import processes

SECONDS = 60.0


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the lease of a run in a bucket. Raises `UserError`, with its holder, where another process renews it."""
    lease = _Lease(workdir)
    lease.take()
    try:
        yield
    finally:
        lease.release()


class _Lease:
    def __init__(self, workdir: Path):
        self._workdir, self._lock = workdir, workdir / "lock"
        self._holder = f"process {os.getpid()} on {socket.gethostname()}"
        # The second line tells this process's own write, whose answer was lost, from another's.
        self._text = f"{self._holder}\n{secrets.token_hex(16)}\n".encode()
        self._generation = places.NO_OBJECT
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        seen, since = None, 0.0
        while not self._write(places.NO_OBJECT):
            found = places.generation(self._lock)
            if found == places.NO_OBJECT:
                continue  # it was given back
            if seen is None:
                seen, since = found, time.monotonic()
                logging.warning(
                    "%s was being trained by %s: waiting up to %g s for a sign of life",
                    self._workdir,
                    self._named(),
                    SECONDS,
                )
            elif found != seen:
                raise UserError(
                    f"{self._workdir} is being trained by {self._named()}: wait for it, or use another --workdir"
                )
            elif time.monotonic() > since + SECONDS:
                places.remove_if(self._lock, found)  # of several that take over, one comes first
                continue
            time.sleep(SECONDS / 20)
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # then it runs out
            places.remove_if(self._lock, self._generation)

    def _renew(self) -> None:
        while not self._ended.wait(SECONDS / 4):
            try:
                if not self._write(self._generation):
                    print(
                        f"\nerror: {self._workdir} was taken over by {self._named()}, after this process had not been "
                        f"heard of for {SECONDS:g} s",
                        file=sys.stderr,
                    )
                    processes.end(2)
            except OSError as error:  # the bucket is out of reach: nothing can be written there either
                logging.warning("the lock of the run is not renewed yet: %s", error)

    def _write(self, expected: str) -> bool:
        generation = places.write_if(self._lock, self._text, expected)
        if generation is None and self._read() == self._text:
            generation = places.generation(self._lock)
        self._generation = generation or self._generation
        return generation is not None

    def _read(self) -> bytes:
        try:
            return places.read(self._lock)
        except FileNotFoundError:
            return b""

    def _named(self) -> str:
        return self._read().decode(errors="replace").partition("\n")[0] or "a process that has just ended"
