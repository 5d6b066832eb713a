"""A trace of some updates, for XProf or TensorBoard's profile plugin: `tensorboard --logdir=WORKDIR/profile`."""

import re
from pathlib import Path

import jax
from absl import logging

from wavelet_jax.errors import UserError
from wavelet_jax.files import places


def _parse(text: str, last: int) -> tuple[int, int]:
    """The updates START and STOP of "START:STOP", both traced. Raises `UserError` where a run of `last` has no such."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise UserError(f"--profile_steps takes START:STOP, the first and the last update to trace, not {text!r}")
    start, stop = map(int, match.groups())
    if not 1 <= start <= stop <= last:
        raise UserError(f"--profile_steps={text} must be START:STOP with 1 <= START <= STOP <= train.steps {last}")
    return start, stop


class Profile:
    """Starts and stops the trace of a run of `last` updates.

    Labels of the trace are the `jax.named_scope`s of the model and the train step: embedding, block_0/attention,
    block_0/feed_forward (of layers that are scanned: blocks/attention, blocks/feed_forward), head, loss, optimizer.

    Args:
      folder: where the trace is written; made then.
      steps: "START:STOP", the first and the last update to trace; None for no trace.

    Raises:
      UserError: steps that are not a range FIRST:LAST, or that a run of `last` updates never reaches.
    """

    def __init__(self, folder: Path, steps: str | None, last: int):
        self._folder, self._running = folder, False
        self._steps = _parse(steps, last) if steps is not None else None

    def skip_before(self, first: int) -> None:
        """For a run that has made `first` updates: past the start of the trace there is none, which is reported.

        The command that a scheduler gives once more is the one that began the trace.
        """
        if self._steps and self._steps[0] <= first:
            start, self._steps = self._steps[0], None
            logging.warning(
                "no trace: --profile_steps starts at update %d, and this run resumes after %d", start, first
            )

    def before(self, step: int) -> None:
        """Before the input of an update is read."""
        if self._steps and step == self._steps[0]:
            places.refuse_links(self._folder)
            self._mirror = places.Mirror(self._folder)
            jax.profiler.start_trace(self._mirror.local)
            self._running = True

    def after(self, step: int, result: jax.Array) -> None:
        """After an update was handed to the devices; waits for `result`, of the last one that is traced."""
        if self._steps and step == self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is running: also of a run that ends early."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._mirror.close()
