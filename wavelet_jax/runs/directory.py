"""A run's directory beside its checkpoints: the config it was made with, its metrics, and its lock."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from wavelet_jax.config import saved
from wavelet_jax.config.keys import json_values
from wavelet_jax.errors import UserError
from wavelet_jax.files import atomic, locks, places, reading
from wavelet_jax.parallel import processes
from wavelet_jax.ranges import Range
from wavelet_jax.runs import leases

# Seconds between updates of a progress bar; in a log file every update is a line.
PROGRESS_INTERVAL = 1 if os.isatty(2) else 30
# All that a run writes, except for what wandb keeps of it in wandb/, which has links of its own.
WRITTEN = ("config.json", "metrics.jsonl", "sessions.jsonl", "lock", "tensorboard", "checkpoints", "profile")

# Keys that may change when a run resumes. None affects the objective: mesh and memory options only change the order of
# summation and the dropout masks; the text is known by its fingerprint, wherever its files are; a run that
# skip_nonfinite stopped may be allowed to continue.
FREE_KEYS = ("train.steps", "log.", "checkpoint.", "eval.", "evaluators.", "mesh.", "compare.")
FREE_KEYS += ("model.precision", "model.remat", "model.scan_layers", "model.attention_backend")
FREE_KEYS += ("train.logits_chunk", "train.accumulation", "train.skip_nonfinite")
FREE_KEYS += ("data.cache_dir", "data.tfds_dir", "data.threads", "data.prefetch")
FREE_KEYS += ("data.train_files", "data.validation_files", "data.tokenizer_file", "data.missing_text", "data.folder")


def check_config(workdir: Path, config: ConfigDict) -> None:
    """Raises `UserError` where `workdir` is not a folder, or holds a run whose config differs past `FREE_KEYS`."""
    check_folder(workdir)
    if not (workdir / "config.json").exists():
        return
    there, here = json_values(load_config(workdir)), json_values(config)
    changed = [
        f"{key} ({there.get(key, 'absent')} there, {here.get(key, 'absent')} here)"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not key.startswith(FREE_KEYS)
    ]
    if there.get("position.method") != here["position.method"]:  # whose options are other keys
        changed = [line for line in changed if not line.startswith("position.") or line.startswith("position.method ")]
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
    shared = {key: value for key, value in json_values(config).items() if not key.startswith(own)}
    processes.check_same({**shared, "the corpus": fingerprint[:12]})


def save_config(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` the run of this config; `check_config` comes first."""
    places.write(workdir / "config.json", (config.to_json_best_effort(indent=2) + "\n").encode())


def label(config: ConfigDict) -> str:
    """The name of a run in tables and figures."""
    return config.compare.label or config.position.method


def check_folder(folder: Path) -> None:
    """Raises `UserError` where a folder neither is there nor can be made, or cannot be written; or a bucket is not."""
    places.check(folder)
    if places.in_bucket(folder):
        return
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "is not a folder" if not existing.is_dir() else "cannot be written"
        raise UserError(f"{folder} cannot be used: {existing} {reason}")


def check_least(values: dict[str, tuple[float, float]]) -> None:
    """Raises `UserError` for the first of {name: (value, least allowed)} that is too small, or not a finite number."""
    for name, (value, least) in values.items():
        Range(least).check(name, value)


def load_config(workdir: Path) -> saved.SavedConfig:
    """The config that a run was made with. A key that it lacks is a `UserError` when it is read.

    Raises:
      UserError: there is no run, or its config.json is damaged.
    """
    places.check(workdir)
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json): train one with train.py --workdir={workdir}")
    try:
        return saved.of_tree(reading.parse_json(places.read(path), "it"), path)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or use a new workdir") from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other trainers out of `workdir`, which is made; the kernel lets go when this process ends in any way.

    Of several processes of one run the first does it for all. File systems without locks are let through; in a bucket
    the lock is a lease (`leases`).

    Raises:
      UserError: another process is training there; names it.
    """
    if not processes.is_first():
        yield
        return
    if places.in_bucket(workdir):
        with leases.held(workdir):
            yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with atomic.open_kept(workdir / "lock", "a+") as file:
        if locks.lock(file) is False:
            file.seek(0)
            holder = file.read().strip() or "a process that has just started"
            raise UserError(f"{workdir} is being trained by {holder}: wait for it, or use another --workdir")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
