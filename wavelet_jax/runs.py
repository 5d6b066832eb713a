"""What a run's directory holds beside its checkpoints: the config it was made with, its metrics, and its lock."""

import contextlib
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from wavelet_jax import atomic, files, processes, saved_config
from wavelet_jax.errors import UserError, check_local
from wavelet_jax.ranges import Range

# Seconds between updates of a progress bar; in a log file every update is a line.
PROGRESS_INTERVAL = 1 if os.isatty(2) else 30
WRITTEN = ("config.json", "metrics.jsonl", "lock", "tensorboard", "checkpoints", "profile")  # all that a run writes
_FLUSH_INTERVAL = 10  # seconds between flushes of the TensorBoard file to the disk

# What may differ when a run goes on: none of these changes what is trained. Another mesh, and what trades time for
# memory there, adds up in another order and draws other dropout masks; the text itself is known by its fingerprint,
# wherever its files lie; a run that skip_nonfinite stopped may be let on.
FREE_KEYS = ("train.steps", "log.", "checkpoint.", "eval.", "mesh.", "compare.")
FREE_KEYS += ("model.remat", "model.attention_backend", "train.logits_chunk", "train.accumulation")
FREE_KEYS += ("train.skip_nonfinite", "data.cache_dir", "data.tfds_dir", "data.threads", "data.prefetch")
FREE_KEYS += ("data.train_files", "data.validation_files", "data.tokenizer_file", "data.missing_text", "data.folder")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"train.steps": 1000, ..}, values as JSON has them (lists for tuples)."""
    tree = json.loads(config.to_json())
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def check_config(workdir: Path, config: ConfigDict) -> None:
    """Raises `UserError` where `workdir` is not a folder, or holds a run whose config differs past `FREE_KEYS`."""
    check_folder(workdir)
    if not (workdir / "config.json").exists():
        return
    there, here = flatten(load_config(workdir)), flatten(config)
    changed = [
        f"{key} ({there.get(key, 'absent')} there, {here.get(key, 'absent')} here)"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not key.startswith(FREE_KEYS)
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run with another config: {', '.join(changed)}; "
            "use another --workdir, or the same config to continue that run"
        )


def check_processes(config: ConfigDict, fingerprint: str) -> None:
    """Raises `UserError`, in every process, where those of this run differ in the config or in the corpus.

    How a host comes by the corpus is its own.
    """
    own = tuple(key for key in FREE_KEYS if key.startswith("data."))
    shared = {key: value for key, value in flatten(config).items() if not key.startswith(own)}
    processes.check_same({**shared, "the corpus": fingerprint[:12]})


def save_config(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` the run of this config; `check_config` comes first."""
    workdir.mkdir(parents=True, exist_ok=True)
    with atomic.replaced(workdir / "config.json") as partial:
        partial.write_text(config.to_json_best_effort(indent=2) + "\n")


def label(config: ConfigDict) -> str:
    """What tables and figures call a run."""
    return config.compare.label or config.position.method


def check_folder(folder: Path) -> None:
    """Raises `UserError` where a folder neither is there nor can be made, or cannot be written."""
    check_local(folder)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "is not a folder" if not existing.is_dir() else "cannot be written"
        raise UserError(f"{folder} cannot be used: {existing} {reason}")


def check_least(values: dict[str, tuple[float, float]]) -> None:
    """Raises `UserError` for the first of {name: (value, least allowed)} that is too small, or not a finite number."""
    for name, (value, least) in values.items():
        Range(least).check(name, value)


def load_config(workdir: Path) -> saved_config.SavedConfig:
    """The config that a run was made with. A key that it lacks is a `UserError` when it is read.

    Raises:
      UserError: there is no run, or its config.json is damaged.
    """
    check_local(workdir)
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json): train one with train.py --workdir={workdir}")
    try:
        return saved_config.of_tree(files.parse_json(path.read_bytes(), "it"), path)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}): bring it back, or use a new workdir") from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other trainers out of `workdir`, which is made; the kernel lets go when this process ends in any way.

    Of several processes of one run the first does it for all. File systems without locks are let through.

    Raises:
      UserError: another process is training there; names it.
    """
    if not processes.is_first():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with atomic.open_kept(workdir / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "a process that has just started"
            raise UserError(f"{workdir} is being trained by {holder}: wait for it, or use another --workdir") from error
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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
        metrics = files.parse_json(line, place)
    except UserError as error:
        raise UserError(f"{error}: mend or remove the line") from error
    if not isinstance(metrics, dict) or type(metrics.get("step")) is not int:
        raise UserError(f'{place} is not a JSON object with a whole number "step": mend or remove the line')
    return metrics
