"""Checkpoints by orbax: parameters, optimizer, step, and the data position (windows read, one integer).

A checkpoint is saved in the background, in a temporary folder. When every process has written its part, checksums of
all files are added (`checksums`), and one rename makes it a checkpoint: it is there with its checksums or not at all.
It is read only after all its files were found as they were written. One that is damaged is named and set aside, renamed
to damaged-N, and the one before it used.

In a bucket nothing can be renamed: a checkpoint is written in its place, and is one when its checksums are there, which
come last. orbax's own mark comes after them, and a run that resumes adds it where a kill came between.

A run that has saved nothing yet has an empty file, none-yet, in its folder of checkpoints. A folder with neither it nor
a checkpoint is one that somebody has emptied, and the run is not started over (`check_whole`).
"""

import contextlib
import functools
import logging as std_logging
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from wavelet_jax.errors import UserError
from wavelet_jax.files import places
from wavelet_jax.model import layers
from wavelet_jax.parallel import peers, processes
from wavelet_jax.parallel.sharding import path_of, placed
from wavelet_jax.runs import checksums, directory
from wavelet_jax.runs.metrics import read_metrics

_UNFINISHED = ".orbax-checkpoint-tmp"  # orbax's suffix of a folder that a save has not committed yet
_COMMITTED = "commit_success.txt"  # orbax's mark of a checkpoint in a bucket
_DAMAGED = "damaged-"
_NONE_YET = "none-yet"
_PATIENCE = 30.0  # seconds that the run waits for a save before it says so


def check_whole(workdir: Path) -> None:
    """Raises `UserError` where a part of a run is gone without which it would silently start over. Writes nothing.

    A run makes checkpoints/none-yet, then config.json, then lines of metrics.jsonl. So these cannot come about by a
    kill at any moment, and are refused:
      - `checkpoints` is not a folder;
      - there is no config.json, and there are checkpoints or logged updates;
      - there is a config.json, and `checkpoints` is missing or empty.
    A run that was killed before its first checkpoint is whole: it starts over.
    """
    folder = _folder(workdir)
    places.refuse_links(*(workdir / name for name in directory.WRITTEN))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: move it away, or use another --workdir")
    there = set(places.names(folder))
    logged = read_metrics(workdir)
    if not (workdir / "config.json").exists():
        if (there - {_NONE_YET}) or logged:
            what = f"has {len(logged)} logged lines" if logged else "has checkpoints"
            raise UserError(f"{workdir} {what} but no config.json: bring it back, or use another --workdir")
    elif not there:
        raise UserError(
            f"the checkpoints of {workdir} are gone: bring them back, use another --workdir, or remove config.json and "
            "metrics.jsonl to train from the start"
        )


@contextlib.contextmanager
def open_manager(workdir: Path, config: ConfigDict) -> Iterator[ocp.CheckpointManager]:
    """Saves the run's checkpoints in the background, and keeps the newest `checkpoint.keep`; comes after `restore`."""
    folder = _folder(workdir)

    def add_checksums() -> None:
        """Called in process 0 when all processes have written and the folder waits for its name."""
        # The last by its update: one that failed may still be there.
        checksums.write(max(_unfinished(folder), key=lambda path: int(path.name.split(".")[0])))

    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoint.keep,
        lightweight_initialize=True,
        async_options=ocp.AsyncOptions(config.checkpoint.timeout, post_finalization_callback=add_checksums),
    )
    _one_line_a_failure()
    if processes.is_first():  # a folder that cannot be written shows before the training
        places.make(folder)
        places.touch(folder / _NONE_YET)
        _count(folder)
    with ocp.CheckpointManager(folder, options=options) as manager:
        try:
            yield manager
        finally:  # whatever ends the run, what is under way is finished
            if failure := _settle(manager):
                logging.warning("%s", failure)


def latest_step(workdir: Path) -> int | None:
    """The update of the newest checkpoint, sound or not, or None. Writes nothing."""
    return max(_steps(_folder(workdir)), default=None)


def any_saved(workdir: Path) -> bool:
    """Whether a checkpoint is there, sound or not, or is being written."""
    folder = _folder(workdir)
    return any(name != _NONE_YET for name in places.names(folder))


def save(manager: ocp.CheckpointManager, step: int, state: Any, *, windows: int, fingerprint: str) -> None:
    """Saves a state, any pytree of arrays, after `windows` windows of the corpus with this fingerprint, under `step`.

    Returns when the state has been copied; it is written in the background. A save that fails, this one or the one
    before, is a warning: the run is worth more than a checkpoint, and the next save tries again.
    """
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave({"windows": windows, "fingerprint": fingerprint}),
    )
    failures = [_settle(manager)]
    try:
        with _told_if_long(step):
            manager.save(step, args=args)
    except Exception as error:
        failures.append(_failed(manager, step, error))
    for failure in filter(None, failures):
        logging.warning("%s: the run continues", failure)


def wait(manager: ocp.CheckpointManager, step: int) -> None:
    """Waits for what is written in the background. Raises `UserError` if there is then no checkpoint of `step`."""
    failure = _settle(manager)
    if step not in _steps(places.given(manager.directory)):
        failure = failure or f"the checkpoint of update {step} could not be written"
        raise UserError(f"{failure}; make room, and give the same command again")
    if failure:
        logging.warning("%s", failure)


def restore(workdir: Path, abstract_state: Any, *, fingerprint: str) -> tuple[Any, int] | None:
    """The newest sound checkpoint's state, laid out as `abstract_state` says, and its data position; None if none was.

    Damaged checkpoints newer than it are set aside, and what a killed save has left is removed.

    Raises:
      UserError: the corpus is not the one that the run has read; the checkpoint's arrays are not those of
        `abstract_state`; there are checkpoints, none of them intact (all are left in place).
    """
    folder = _folder(workdir)
    step, damaged = _newest_sound(folder)
    if processes.is_first():
        for unfinished in _unfinished(folder, but=[step, *damaged]):
            places.remove(unfinished)
        if step is not None:
            _mark(folder / str(step))
        for number in damaged:
            _set_aside(folder / str(number))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(
            "wavelet_jax.runs.checkpoint.restore"
        )  # the folder is as they all will see it
    if step is None:
        return None
    data = _restore_data(folder / str(step), fingerprint)
    saved_as = _saved_form(folder / str(step), abstract_state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / str(step) / "state", saved_as)
    return _in_form_of(abstract_state, restored), data["windows"]


def restore_params(workdir: Path, abstract_params: dict, *, fingerprint: str | None) -> tuple[dict, int]:
    """The parameters alone of the newest sound checkpoint, and its step. Writes nothing; otherwise see `restore`.

    The optimizer's moments, twice as large, are read for their checksums and not loaded. With a fingerprint of None
    the run may have read any corpus.
    """
    folder = _folder(workdir)
    step, _ = _newest_sound(folder)
    if step is None:
        raise UserError(f"{workdir} has no checkpoint: train it first")
    if fingerprint is not None:
        _restore_data(folder / str(step), fingerprint)
    item = _saved_form(folder / str(step), {"params": abstract_params})
    # `partial_restore` leaves out the rest of the state, and would also leave out parameters that only one side has.
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / str(step) / "state", args=args)
    return _in_form_of({"params": abstract_params}, restored)["params"], step


def _folder(workdir: Path) -> Path:
    folder = workdir / "checkpoints"
    return folder if places.in_bucket(folder) else folder.absolute()


def _numbers(folder: Path) -> list[int]:
    return [int(name) for name in places.names(folder) if re.fullmatch(r"0|[1-9]\d*", name)]


def _steps(folder: Path) -> list[int]:
    """Updates that have a checkpoint, sound or not."""
    numbers, marks = _numbers(folder), (checksums.NAME, _COMMITTED)
    if not places.in_bucket(folder):
        return numbers
    return [number for number in numbers if any((folder / str(number) / mark).exists() for mark in marks)]


def _unfinished(folder: Path, but: Collection[int | None] = ()) -> list[Path]:
    """Remains of saves that were not committed; in a bucket also those of removals, except for `but`."""
    if not places.in_bucket(folder):
        return list(folder.glob(f"*{_UNFINISHED}*"))
    candidates = [folder / str(number) for number in _numbers(folder) if number not in but]
    return [path for path in candidates if not (path / _COMMITTED).exists()]


def _mark(checkpoint: Path) -> None:
    """Gives a sound checkpoint in a bucket orbax's mark, without which orbax would neither count nor remove it."""
    if places.in_bucket(checkpoint) and not (checkpoint / _COMMITTED).exists():
        places.write(checkpoint / _COMMITTED, b"")


def _count(folder: Path) -> None:
    """Removes the marker of a run without a checkpoint, once there is one."""
    if (folder / _NONE_YET).exists() and _steps(folder):
        (folder / _NONE_YET).unlink(missing_ok=True)


def _newest_sound(folder: Path) -> tuple[int | None, list[int]]:
    """The update of the newest checkpoint whose files are as they were written, and those of the newer, damaged ones.

    The first is None where there has been no checkpoint. Process 0 reads the files, and all have its answer.
    """
    reasons, sound, failed = {}, None, False
    if processes.is_first():
        for step in sorted(_steps(folder), reverse=True):
            reasons[step] = checksums.damage(folder / str(step))
            if reasons[step] is None:
                sound = step
                del reasons[step]
                break
        aside = sorted(name for name in places.names(folder) if name.startswith(_DAMAGED))
        failed = sound is None and bool(reasons or aside)
    if jax.process_count() > 1:
        answer = np.array([-1 if sound is None else sound, failed])
        answer = multihost_utils.broadcast_one_to_all(answer)
        sound, failed = None if answer[0] < 0 else int(answer[0]), bool(answer[1])
    if failed:
        tried = [f"{step} ({reason})" for step, reason in reasons.items()]
        tried += [f"{name} (set aside before)" for name in aside] if processes.is_first() else ["see process 0"]
        raise UserError(
            f"no checkpoint in {folder} can be read: {', '.join(tried)}; restore one, or use a new workdir "
            f"(one that was saved before there were checksums: `write` in wavelet_jax/runs/checksums.py vouches for it)"
        )
    for step, reason in reasons.items():
        _warn_once(f"the checkpoint {folder / str(step)} is damaged ({reason}): the one of update {sound} is used")
    return sound, list(reasons)


@functools.cache
def _warn_once(message: str) -> None:
    """An evaluation looks at a run's checkpoints twice."""
    logging.warning("%s", message)


def _set_aside(checkpoint: Path) -> None:
    """Renames a checkpoint to a name that is none, damaged-N, or damaged-N-2 and on where that is taken."""
    names = [f"{_DAMAGED}{checkpoint.name}"]
    while (checkpoint.parent / names[-1]).exists():
        names.append(f"{names[0]}-{len(names) + 1}")
    places.move(checkpoint, checkpoint.parent / names[-1], first=_COMMITTED)


def _restore_data(checkpoint: Path, fingerprint: str) -> dict:
    """The data saved beside the state, restored first: with another vocabulary the state's shapes would not fit."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        data = checkpointer.restore(checkpoint / "data", args=ocp.args.JsonRestore())
    if data["fingerprint"] != fingerprint:
        raise UserError(
            f"{checkpoint.parent} was trained on another text or tokenizer than the config gives now (corpus "
            f"{data['fingerprint'][:12]}, not {fingerprint[:12]}): restore it, or use a new workdir"
        )
    return data


def _saved_form(checkpoint: Path, abstract: Any) -> Any:
    """The tree `abstract`, or where the checkpoint has that one, `layers.other_form` of it.

    Only the top-level parts of the state that the tree has are compared.

    Raises:
      UserError: the checkpoint does not hold exactly its arrays, by path, dtype and shape.
    """
    state: Any = checkpoint / "state"  # the handler's own kind of path, to a type checker

    def arrays(tree: Any) -> dict[str, str]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {path_of(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}

    wanted = arrays(abstract)
    parts = {path.split("/")[0] for path in wanted}
    stored = arrays(ocp.PyTreeCheckpointHandler().metadata(state).tree)
    stored = {path: array for path, array in stored.items() if path.split("/")[0] in parts}
    if stored == wanted:
        return abstract
    other = jax.eval_shape(layers.other_form, abstract)
    if stored == arrays(other):
        return placed(jax.tree.leaves(abstract)[0].sharding.mesh, other)
    differing = [path for path in wanted | stored if wanted.get(path) != stored.get(path)]
    first = differing[0]
    raise UserError(
        f"{checkpoint} does not fit the model of the config: {first} is {stored.get(first, 'absent')} in the "
        f"checkpoint and {wanted.get(first, 'absent')} in the model (arrays that differ: {len(differing):,}): "
        "restore the config.json that the run was trained with"
    )


def _in_form_of(abstract: Any, restored: Any) -> Any:
    """A restored tree, which is in the form of `_saved_form`, in that of `abstract`."""
    if jax.tree.structure(restored) == jax.tree.structure(abstract):
        return restored
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(layers.other_form, out_shardings=shardings)(restored)


def _settle(manager: ocp.CheckpointManager) -> str | None:
    """Waits for the save in the background; what failed, or None."""
    step = manager.latest_step()  # counts the one under way
    try:
        with _told_if_long(step):
            manager.wait_until_finished()
        if processes.is_first():
            _count(places.given(manager.directory))
        return None
    except Exception as error:
        return _failed(manager, step, error)


def _told_if_long(step: int | None) -> contextlib.AbstractContextManager[None]:
    """Warns when what is inside, which waits for the save of this update, takes `_PATIENCE`: the whole run waits."""
    message = "the run has waited for the checkpoint of update %s for %g s: a slow disk, or a process that failed"
    return peers.in_time(_PATIENCE, functools.partial(logging.warning, message, step, _PATIENCE))


def _failed(manager: ocp.CheckpointManager, step: int | None, error: BaseException) -> str:
    """Removes what a failed save has written, on a disk that may be full, and says what failed."""
    folder = places.given(manager.directory)
    if processes.is_first():
        with contextlib.suppress(OSError):
            for unfinished in _unfinished(folder):
                places.remove(unfinished)
    manager.reload()  # it counts the failed one as saved, and those that were to go for it as gone
    kept = max(_steps(folder), default=None)
    newest = "there is none before it" if kept is None else f"the newest is that of update {kept}"
    while _timed_out(error) and error.__context__:  # a process that has failed waits for the others all the same
        error = error.__context__
    if _timed_out(error):
        reason = "not done within checkpoint.timeout: the disk is slow, or another process failed or is slow"
    else:  # TensorStore names the array, the database and the file before it comes to the point
        reason = " ".join(str(error).split()).rsplit('": ', 1)[-1][:200] or type(error).__name__
    return f"the checkpoint of update {step} could not be written ({reason}); {newest}"


def _timed_out(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or "DEADLINE_EXCEEDED" in str(error)


@functools.cache
def _one_line_a_failure() -> None:
    """Leaves it to `save` and `wait` to tell of a save that fails: orbax adds tracebacks of every array and thread."""

    def is_ours(record: std_logging.LogRecord) -> bool:
        from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname or "orbax" in record.getMessage()
        return record.levelno < std_logging.ERROR or not from_orbax

    logging.get_absl_logger().addFilter(is_ours)
    std_logging.getLogger("asyncio").addFilter(is_ours)  # "Task exception was never retrieved"
    show = sys.unraisablehook

    def show_others(unraisable) -> None:
        # TensorStore answers to an event loop that orbax closed at the first failure.
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = show_others
