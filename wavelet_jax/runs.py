"""What a run's directory holds beside its checkpoints: the config it was made with, and its metrics."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wavelet_jax.errors import UserError

# Seconds between updates of a progress bar; in a log file every update is a line.
PROGRESS_INTERVAL = 1 if sys.stderr.isatty() else 30

# What may differ when a run goes on: none of these changes what is trained (another mesh adds up in another order; the
# text itself is known by its fingerprint, wherever its files lie).
FREE_KEYS = ("train.steps", "log.", "checkpoint.", "eval.", "mesh.", "compare.")
FREE_KEYS += ("data.cache_dir", "data.tfds_dir", "data.threads", "data.prefetch")
FREE_KEYS += ("data.train_files", "data.validation_files")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"train.steps": 1000, ..}, values as JSON has them (lists for tuples)."""
    tree = json.loads(config.to_json())
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def check_config(workdir: Path, config: ConfigDict) -> None:
    """Raises `UserError` where `workdir` holds a run whose config differs in more than `FREE_KEYS`, or is no folder."""
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


def save_config(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` the run of this config; `check_config` comes first."""
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / "config.json.partial"
    partial.write_text(config.to_json_best_effort(indent=2) + "\n")
    os.replace(partial, workdir / "config.json")


def check_folder(folder: Path) -> None:
    """Raises `UserError` where a folder neither is there nor can be made, or cannot be written."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "is no folder" if not existing.is_dir() else "cannot be written"
        raise UserError(f"{folder} cannot be used: {existing} {reason}")


def check_least(values: dict[str, tuple[int, int]]) -> None:
    """Raises `UserError` for the first of {name: (value, least allowed)} that is too small."""
    for name, (value, least) in values.items():
        if value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")


def load_config(workdir: Path) -> ConfigDict:
    """The config that a run was made with. Raises `UserError` where there is no run."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json): train one with train.py --workdir={workdir}")
    try:
        tree = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): bring it back, or use a new workdir") from error
    for keys in tree.values():
        keys.update({key: tuple(value) for key, value in keys.items() if isinstance(value, list)})
    return ConfigDict(tree)


class MetricsLog:
    """metrics.jsonl and TensorBoard event files of a run that may have been killed at any moment.

    Args:
      workdir: the run's directory.
      step: where the run goes on; what an earlier life logged past it is dropped, since it will be logged again.
    """

    def __init__(self, workdir: Path, step: int):
        from tensorboardX import SummaryWriter  # takes two seconds to import, and bad input should not wait for it

        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        partial = path.with_suffix(".jsonl.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line, on disk when this returns as far as a killed process is concerned."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The logged steps of a run, in order; a last line that a kill cut short is left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} has a line that is not JSON ({error}): mend or remove it") from error
