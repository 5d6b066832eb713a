"""Checkpoints by orbax: parameters, optimizer, step, and the data position (windows read, one integer)."""

from pathlib import Path

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from wavelet_jax.errors import UserError
from wavelet_jax.training import State


def open_manager(workdir: Path, config: ConfigDict, *, read_only: bool = False) -> ocp.CheckpointManager:
    """The run's checkpoints: saved in the background, each whole or not there, the newest `checkpoint.keep` kept."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else config.checkpoint.keep, create=not read_only
    )
    return ocp.CheckpointManager(_folder(workdir), options=options)


def latest_step(workdir: Path) -> int | None:
    """The update of the newest checkpoint, or None. Writes nothing."""
    if not _folder(workdir).is_dir():
        return None
    with ocp.CheckpointManager(_folder(workdir), options=ocp.CheckpointManagerOptions(create=False)) as manager:
        return manager.latest_step()


def _folder(workdir: Path) -> Path:
    return (workdir / "checkpoints").absolute()


def save(manager: ocp.CheckpointManager, state: State, *, windows: int, fingerprint: str) -> None:
    """Saves the state after `windows` windows of the corpus with this fingerprint, under its step."""
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"windows": windows, "fingerprint": fingerprint}),
        ),
    )


def restore(manager: ocp.CheckpointManager, abstract_state: State, *, fingerprint: str) -> tuple[State, int] | None:
    """The newest checkpoint's state, laid out as `abstract_state` says, and its data position; None if there is none.

    Raises:
      UserError: the corpus is not the one that the run has read.
    """
    step = manager.latest_step()
    if step is None:
        return None
    data = _restore_data(manager, step, fingerprint)
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))).state
    return state, data["windows"]


def restore_params(manager: ocp.CheckpointManager, abstract_params: dict, *, fingerprint: str) -> tuple[dict, int]:
    """The parameters alone of the newest checkpoint, of which there is one, and its step; see `restore`.

    The optimizer's moments, twice as large, are not read.
    """
    step = manager.latest_step()
    _restore_data(manager, step, fingerprint)
    item = {"params": abstract_params}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(state=args)).state["params"], step


def _restore_data(manager: ocp.CheckpointManager, step: int, fingerprint: str) -> dict:
    """What is saved beside the state; restored first: with another vocabulary the shapes of the state would not fit."""
    data = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data
    if data["fingerprint"] != fingerprint:
        raise UserError(
            f"{manager.directory} was trained on another text or tokenizer than the config gives now (corpus "
            f"{data['fingerprint'][:12]}, not {fingerprint[:12]}): bring it back, or use a new workdir"
        )
    return data
