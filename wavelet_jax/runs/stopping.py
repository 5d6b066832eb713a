"""SIGTERM and SIGINT: the update is finished, the state saved, and the process ends with 143 or 130, 128 + the signal.

Before there is anything to save, a signal ends the process at once, and so does a second one at any time. Signals are
taken by a thread of their own: Python runs handlers in the main thread, which may sit in a compilation, or in a
collective whose other side has gone, for minutes.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """The state of stopping; made by `listen`. `signum` is the signal that came, or 0."""

    def __init__(self):
        self.signum = 0
        self._heard = 0  # by this process alone
        self._held = False
        self._agree = None  # of several processes, made when it is first needed
        self._answer = None

    def requested(self) -> bool:
        """Whether to stop after the update that has just been made; call it in every process after every update.

        After the first call, a signal no longer ends the process but makes the next call return True. Several processes
        decide together and asynchronously, so the answer is that of the update before, and no device waits for it.
        """
        if not self._held:
            _install()  # again: jax.distributed.initialize takes SIGTERM for itself
            self._held = True
        if jax.process_count() > 1:
            self._agree = self._agree or _make_agree()
            before, self._answer = self._answer, self._agree(self._heard)
            self.signum = int(before) if before is not None else 0
        else:
            self.signum = self._heard
        return bool(self.signum)

    def released(self, done: str) -> None:
        """To be called when all is saved: leaves, saying what is `done`, if a signal came; else it no longer waits."""
        self._held = False
        if signum := self.signum or self._heard:
            print(f"{_name(signum)}: {done}", file=sys.stderr)
            raise SystemExit(128 + signum)

    def _came(self, signum: int) -> None:
        if self._heard or not self._held:
            why = "a second signal" if self._heard else "there is nothing to save; the same command starts again"
            print(f"\n{_name(signum)}: {why}", file=sys.stderr, flush=True)
            os._exit(128 + signum)  # as a kill, which every file of a run has to stand anyway
        self._heard = signum


class NoStop(Stop):
    """For a run that signals end as they end any other program."""

    def requested(self) -> bool:
        """False."""
        return False

    def released(self, done: str) -> None:
        """Does nothing."""


@contextlib.contextmanager
def listen() -> Iterator[Stop]:
    """Takes SIGTERM and SIGINT inside the block. For the main thread."""
    stop = Stop()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as set_wakeup_fd wants it

    def take_signals() -> None:
        while number := os.read(reading, 1):
            if number[0] in SIGNALS:
                stop._came(number[0])

    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    threading.Thread(target=take_signals, name="signals", daemon=True).start()
    woken_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _install()
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None: one that is not of Python
        signal.set_wakeup_fd(woken_before)
        os.close(writing)  # ends the thread


def _install() -> None:
    """Python's own C handler then writes the number of a signal into the pipe, whatever the main thread is doing."""
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: None)


def _make_agree():
    """agree(signum) -> the largest of all processes' signals, an array that is not waited for."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec("all"))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))

    def agree(signum: int) -> jax.Array:
        mine = np.full(jax.local_device_count(), signum, np.int32)
        return largest(jax.make_array_from_process_local_data(sharding, mine))

    return agree


def _name(signum: int) -> str:
    return signal.Signals(signum).name
