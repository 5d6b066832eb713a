"""The logged metrics of a run: metrics.jsonl and TensorBoard event files, written and read."""

import contextlib
import json
import math
import time
from pathlib import Path

from absl import logging

from wavelet_jax.errors import UserError
from wavelet_jax.files import atomic, reading
from wavelet_jax.parallel import processes

_FLUSH_INTERVAL = 10  # seconds between flushes of the TensorBoard file to the disk


class MetricsLog:
    """metrics.jsonl and TensorBoard event files of a run that may have been killed at any moment.

    Of several processes the first writes; in the others nothing happens.

    On a full disk, lines of metrics.jsonl wait for the next write, and those of TensorBoard are lost.

    Args:
      workdir: the run's directory.
      step: where the run goes on; what an earlier life logged past it is dropped, since it will be logged again.
    """

    def __init__(self, workdir: Path, step: int):
        self._silent = not processes.is_first()
        if self._silent:
            return
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        self._events = _Events(workdir / "tensorboard", first_step=step + 1)
        with atomic.replaced(self._path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = atomic.open_kept(self._path, "ab")  # says how much it has written, on a full disk too
        self._waiting = b""
        self._warned = False

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line, on disk when this returns as far as a killed process is concerned.

        What is not finite becomes null: JSON has no number for it.
        """
        if self._silent:
            return
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._waiting += (json.dumps({"step": step, **dict.fromkeys(metrics), **finite}) + "\n").encode()
        try:
            self._write_waiting()
            self._events.write(step, finite)
        except OSError as error:
            if not self._warned:
                logging.warning("the metrics of update %d could not be written yet (%s): the run goes on", step, error)
            self._warned = True

    def _write_waiting(self) -> None:
        while self._waiting:  # a line may get on the disk in two parts, never twice
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        """Raises OSError where lines are still waiting for room on the disk."""
        if self._silent:
            return
        with self._file:
            with contextlib.suppress(OSError):
                self._events.close()
            try:
                self._write_waiting()
            except OSError as error:
                raise OSError(
                    error.errno, f"the last lines could not be written ({error.strerror})", str(self._path)
                ) from error


class _Events:
    """A TensorBoard event file, written in the thread that calls: tensorboardX's own would die on a full disk.

    Args:
      first_step: what earlier files of the folder say of it and later steps no longer counts.
    """

    def __init__(self, folder: Path, first_step: int):
        # Takes two seconds to import, and bad input should not wait for it.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        atomic.make_folder(folder)
        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
        if time.monotonic() > self._flushed + _FLUSH_INTERVAL:
            self._flushed = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The logged steps of a run, in order; a last line that a kill cut short is left out.

    Raises:
      UserError: a line is not a JSON object with its step.
    """
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [_metrics_of(line, f"{path}, line {number}") for number, line in numbered]


def _metrics_of(line: bytes, place: str) -> dict[str, float]:
    try:
        metrics = reading.parse_json(line, place)
    except UserError as error:
        raise UserError(f"{error}: mend or remove the line") from error
    if not isinstance(metrics, dict) or type(metrics.get("step")) is not int:
        raise UserError(f'{place} is not a JSON object with a whole number "step": mend or remove the line')
    return metrics
