"""The logged metrics of a run: metrics.jsonl, TensorBoard and Weights & Biases, and metrics.jsonl read back."""

import contextlib
import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import logging
from ml_collections import ConfigDict

from wavelet_jax.errors import UserError
from wavelet_jax.files import places, reading
from wavelet_jax.parallel import processes

_FLUSH_INTERVAL = 10  # seconds between flushes of the TensorBoard file to the disk
_UPLOAD_INTERVAL = 60  # the same to a bucket, where the whole file is written each time


class Writer(Protocol):
    """A place that metrics are written to."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of an update, all finite. Raises OSError where they cannot be written now."""
        ...

    def close(self) -> None:
        """Finishes what is being written. Raises OSError where lines are lost."""
        ...


class MetricsLog:
    """The metrics of a run that may have been killed at any moment: metrics.jsonl, TensorBoard, and other writers.

    Of several processes the first writes; in the others nothing happens.

    Args:
      workdir: the run's directory.
      step: the update after which the run resumes; what an earlier session logged past it is dropped.
      more: functions that make further writers.
    """

    def __init__(self, workdir: Path, step: int, more: Sequence[Callable[[], Writer]] = ()):
        self._warned = False
        self._lines, self._others = None, []
        if not processes.is_first():
            return
        with contextlib.ExitStack() as opened:  # one that cannot be opened closes those before it
            self._lines = opened.enter_context(contextlib.closing(JsonLines(workdir, step)))
            for make in (lambda: TensorBoard(workdir / "tensorboard", first_step=step + 1), *more):
                self._others.append(opened.enter_context(contextlib.closing(make())))
            opened.pop_all()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one line; it is on the disk when this returns, as far as a killed process is concerned.

        What is not finite becomes null in metrics.jsonl, since JSON has no number for it, and is left out elsewhere.
        On a full disk, lines of metrics.jsonl wait for the next write, and those of the others are lost.
        """
        if self._lines is None:
            return
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        try:
            self._lines.write(step, dict.fromkeys(metrics) | finite)
            for writer in self._others:
                writer.write(step, finite)
        except OSError as error:
            if not self._warned:
                logging.warning("the metrics of update %d are not written yet (%s): the run continues", step, error)
            self._warned = True

    def close(self) -> None:
        """Raises OSError if lines of metrics.jsonl are still waiting for room on the disk."""
        if self._lines is None:
            return
        for writer in self._others:
            with contextlib.suppress(OSError):
                writer.close()
        self._lines.close()


class JsonLines:
    """metrics.jsonl, a JSON object per line, continued after an update; see `MetricsLog`."""

    def __init__(self, workdir: Path, step: int):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        self._file = places.open_log(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._waiting = b""

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Appends a line after those that are waiting."""
        self._waiting += (json.dumps({"step": step, **metrics}) + "\n").encode()
        self._write_waiting()

    def _write_waiting(self) -> None:
        while self._waiting:  # a line may get on the disk in two parts, never twice
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        """Raises OSError if lines are still waiting for room on the disk."""
        with self._file:
            try:
                self._write_waiting()
            except OSError as error:
                raise OSError(
                    error.errno, f"the last lines could not be written ({error.strerror})", str(self._path)
                ) from error


class TensorBoard:
    """A TensorBoard event file, written in the thread that calls: tensorboardX's own would die on a full disk.

    Args:
      first_step: what earlier files of the folder say of it and later steps no longer counts.
    """

    def __init__(self, folder: Path, first_step: int):
        # Takes two seconds to import, and bad input should not wait for it.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2 as generated

        event_pb2: Any = generated  # protobuf adds its names when it is imported
        places.make(folder)
        self._mirror = places.Mirror(folder)
        self._interval = _UPLOAD_INTERVAL if places.in_bucket(folder) else _FLUSH_INTERVAL
        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(str(self._mirror.local / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """See `Writer`; the file is flushed every few seconds."""
        for name, value in metrics.items():
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
        if time.monotonic() > self._flushed + self._interval:
            self._flushed = time.monotonic()
            self._writer.flush()
            self._mirror.upload()

    def close(self) -> None:
        """See `Writer`."""
        self._writer.close()
        self._mirror.close()


class WeightsAndBiases:
    """A run in Weights & Biases, in the project `config.log.wandb`.

    WANDB_MODE=offline keeps it in WORKDIR/wandb, or in ./wandb for a run in a bucket. A run that resumes continues the
    same one, known by the run's directory.
    """

    def __init__(self, workdir: Path, config: ConfigDict):
        import wandb

        identity = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=config.log.wandb,
            id=identity,
            resume="allow",
            name=str(workdir),
            dir=None if places.in_bucket(workdir) else workdir,
            config=json.loads(config.to_json()),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """See `Writer`."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """See `Writer`."""
        self._run.finish()


def check(config: ConfigDict) -> None:
    """Raises `UserError` if Weights & Biases is asked for and not installed."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("config.log.wandb needs wandb: pip install 'wavelet-jax[wandb]', or leave the key empty")


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The logged steps of a run, in order; a last line that a kill cut short is left out.

    Raises:
      UserError: a line is not a JSON object with its step.
    """
    path = workdir / "metrics.jsonl"
    lines = places.read(path).split(b"\n")[:-1] if path.exists() else []
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
