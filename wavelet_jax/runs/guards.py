"""Guards of a run that trains: updates that are not finite, and updates that take far too long."""

import collections
import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from wavelet_jax.errors import UserError
from wavelet_jax.runs import checkpoint
from wavelet_jax.runs.metrics import MetricsLog

_REMEMBERED = 32  # updates whose median an update is held to
_NEEDED = 8  # of them, before any is called slow


class Guard:
    """Checks each update one step late, so that the host never blocks the device.

    An update that is not finite has changed nothing but its counters (`training.make_train_step`), so a state that is
    saved or validated before it was looked at is a good one all the same.
    """

    def __init__(self, config: ConfigDict, workdir: Path, log: MetricsLog):
        self._config, self._workdir, self._log = config, workdir, log
        self._unseen: dict[int, dict[str, jax.Array]] = {}
        self._watch = _Watch(config.log.slow_update, config.log.slow_seconds)

    def __enter__(self) -> "Guard":
        self._watch.start()
        return self

    def __exit__(self, *_) -> None:
        self._watch.close()

    def made(self, step: int, metrics: dict[str, jax.Array], *, look: bool) -> None:
        """Takes an update that has been dispatched, and looks at the one before; with `look` at this one too.

        Raises:
          UserError: more than `train.skip_nonfinite` updates in a row were not finite; the last of them is in the log.
        """
        self._unseen[step] = metrics
        while len(self._unseen) > (0 if look else 1):
            number = min(self._unseen)
            seen = self._unseen.pop(number)
            in_a_row = int(seen["skipped_in_a_row"])  # waits for the update
            self._watch.ended(number)
            if in_a_row > self._config.train.skip_nonfinite:
                self._stop(number, seen, in_a_row)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what takes its time between two updates."""
        self._watch.pause()
        yield
        self._watch.resume()

    def _stop(self, step: int, metrics: dict[str, jax.Array], in_a_row: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._log.write(step, values)
        skipped = f", after {in_a_row - 1} such updates in a row that were skipped" if in_a_row > 1 else ""
        any_saved = checkpoint.any_saved(self._workdir)
        saved = f"the checkpoints in {self._workdir} are from" if any_saved else "no checkpoint was saved"
        raise UserError(
            f"update {step}: loss {values['loss']}, gradient norm {values['grad_norm']}{skipped}; {saved} before it: a "
            "lower optimizer.learning_rate may help, in a new workdir, or a larger train.skip_nonfinite, in this one"
        )


class _Watch:
    """A thread that warns, once, when an update takes `factor` times the median of those before and `least` seconds.

    The first update of a process is not counted: it is compiled. It warns once, and again only after an update of usual
    speed.
    """

    def __init__(self, factor: float, least: float, clock: Callable[[], float] = time.monotonic):
        self._factor, self._least, self._clock = factor, least, clock
        self._durations = collections.deque(maxlen=_REMEMBERED)
        self._step, self._since = None, None  # the update that runs, and since when; None while nothing is timed
        self._told = False
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        if self._factor:
            self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def ended(self, step: int) -> None:
        with self._lock:
            now = self._clock()
            if self._since is not None:
                slow = self._tell_if_slow(now)
                self._told = self._told and slow
                self._durations.append(now - self._since)
            self._step, self._since = step + 1, now

    def pause(self) -> None:
        with self._lock:
            self._since = None

    def resume(self) -> None:
        with self._lock:
            self._since = self._clock()

    def _run(self) -> None:
        while not self._closed.wait(max(0.02, min(1.0, self._least / 4))):
            self.look()

    def look(self) -> None:
        """Warns if the update that runs is slow by now."""
        with self._lock:
            self._tell_if_slow(self._clock())

    def _tell_if_slow(self, now: float) -> bool:
        if not self._factor or self._since is None or len(self._durations) < _NEEDED:
            return False
        median, taken = statistics.median(self._durations), now - self._since
        if taken <= max(self._factor * median, self._least):
            return False
        if not self._told:
            self._told = True
            logging.warning(
                "update %d has taken %.1f s so far, and the median is %.3f s: a slow or hung device, host or disk "
                "(seen by process %d of %d, on %s)",
                self._step,
                taken,
                median,
                jax.process_index(),
                jax.process_count(),
                socket.gethostname(),
            )
        return True
