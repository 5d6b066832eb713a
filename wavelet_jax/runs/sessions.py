"""Where the time of a run went, over all its sessions: sessions.jsonl, and the goodput that follows from it.

A session is one call of `training.loop.train` that has updates to make. Its line in sessions.jsonl is written again,
further on, at each logged update and each checkpoint, so a kill loses what came after. Updates past the checkpoint that
a later session began at are made again: they were lost.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging

from wavelet_jax.errors import UserError
from wavelet_jax.files import places, reading
from wavelet_jax.parallel import processes
from wavelet_jax.runs.throughput import duration

NAME = "sessions.jsonl"


@dataclasses.dataclass(frozen=True)
class Session:
    """A session as it was at one moment: the last one that is known of it.

    Args:
      session: its number, from 1.
      start: when it began, seconds since 1970 by the machine's clock. That may jump, and no sum depends on it.
      first_step: the update that it began after.
      last_step: the last update that it has made.
      seconds: since it began, by a clock that does not jump.
      starting: of them, before the first update, and for compilation.
      updating: of them, in updates.
      saving: of them, in which updates waited for checkpoints.
      validating: of them, in validation.
      waiting: of them, in which the devices waited for input.
    """

    session: int
    start: float
    first_step: int
    last_step: int
    seconds: float
    starting: float
    updating: float
    saving: float
    validating: float
    waiting: float


@dataclasses.dataclass(frozen=True)
class Account:
    """The sums over sessions; all in seconds, but for the two counts.

    Args:
      sessions: how many.
      seconds: of all sessions. The time between them is not counted.
      counting: in updates that are part of the run's state.
      lost: in updates that were made again, or will be.
      updates_redone: how many those are.
      starting: see `Session`, as for the three that follow.
    """

    sessions: int
    seconds: float
    counting: float
    lost: float
    updates_redone: int
    starting: float
    saving: float
    validating: float
    waiting: float

    @property
    def goodput(self) -> float:
        """The share of all time that went into updates that count."""
        return self.counting / self.seconds if self.seconds else 0.0

    def columns(self) -> dict[str, float]:
        """The numbers of it that stand in a line of metrics."""
        return {"run_seconds": self.seconds, "goodput": self.goodput, "updates_redone": self.updates_redone}

    def line(self) -> str:
        """One line for a person."""
        redone = "1 update" if self.updates_redone == 1 else f"{self.updates_redone:,} updates"
        again = f"{redone} redone ({duration(self.lost)})" if self.updates_redone else "no update redone"
        return (
            f"goodput {100 * self.goodput:.0f}%: {duration(self.counting)} of updates that count in "
            f"{duration(self.seconds)} over {self.sessions:,} session{'s' * (self.sessions != 1)}; {again}; "
            f"{duration(self.starting)} to start, {duration(self.saving)} to save, {duration(self.validating)} to "
            f"validate, {duration(self.waiting)} waiting for input"
        )


def account(sessions: Sequence[Session]) -> Account:
    """The sums over the sessions of a run, in the order in which they were.

    Of a session, the updates count up to the earliest update that a later session began after: later ones may go back
    further, where a checkpoint is damaged. All updates of one session are taken to last equally long.
    """
    kept, counting, lost = math.inf, 0.0, 0
    for each in reversed(sessions):
        made = each.last_step - each.first_step
        still = max(0, min(each.last_step, kept) - each.first_step)
        counting += each.updating * still / made if made else 0.0
        lost += int(made - still)
        kept = min(kept, each.first_step)
    return Account(
        sessions=len(sessions),
        seconds=sum(each.seconds for each in sessions),
        counting=counting,
        lost=sum(each.updating for each in sessions if each.last_step > each.first_step) - counting,
        updates_redone=lost,
        starting=sum(each.starting for each in sessions),
        saving=sum(each.saving for each in sessions),
        validating=sum(each.validating for each in sessions),
        waiting=sum(each.waiting for each in sessions),
    )


def read(workdir: Path) -> list[Session]:
    """The sessions of a run in order; none where it has no sessions.jsonl, as runs of earlier versions.

    A last line that a kill cut short is left out. So is, with a warning, any other that is damaged: a run is not
    stopped for the sake of its account.
    """
    path = workdir / NAME
    lines = places.read(path).split(b"\n")[:-1] if path.exists() else []
    found, damaged = {}, []
    for number, line in enumerate(lines, start=1):
        session = _session_of(line)
        if session is not None:
            found[session.session] = session  # further on than the line before it
        elif line.strip():
            damaged.append(number)
    if damaged:
        logging.warning("%s: damaged lines are left out of the account: %s", path, ", ".join(map(str, damaged)))
    return list(found.values())


def _session_of(line: bytes) -> Session | None:
    with contextlib.suppress(UserError):
        values = reading.parse_json(line, "it")
        fields = {field.name: field.type for field in dataclasses.fields(Session)}
        if isinstance(values, dict) and values.keys() >= fields.keys():
            values = {name: values[name] for name in fields}  # later versions may say more
            kinds = {int: (int,), float: (int, float)}
            sound = all(type(values[name]) in kinds[kind] for name, kind in fields.items())
            if sound and 0 <= values["first_step"] <= values["last_step"]:
                return Session(**values)
    return None


class Sessions:
    """The sessions of a run that is being trained, this one included. Of several processes the first reads and writes.

    Args:
      workdir: the run's directory.
      step: the update after which this session begins.
      began: when it did, by `clock`.
      idle: there is no update to make: nothing is written, and this session is not one.
      clock: seconds; it must not jump.
    """

    def __init__(
        self, workdir: Path, step: int, began: float, *, idle: bool, clock: Callable[[], float] = time.monotonic
    ):
        self._step, self._began, self._clock = step, began, clock
        self._start = time.time() - (clock() - began)
        self._past = read(workdir) if processes.is_first() else []
        self._number = 1 + max((each.session for each in self._past), default=0)
        self._this: list[Session] = []
        self._file, self._torn = None, False
        if idle or not processes.is_first():
            return
        # At first a line a session, and none that is torn.
        self._file = places.open_log(workdir / NAME, "".join(map(_line_of, self._past)).encode())

    def note(self, step: int, spent: Mapping[str, float]) -> None:
        """Brings the account up to now, in memory and on the disk.

        On a full disk the line is lost, and the next one says all that it would have said.

        Args:
          step: the last update that is made.
          spent: seconds since the first update could begin, by what they went into (`throughput.Meter.spent`).
        """
        if self._file is None:
            return
        seconds = self._clock() - self._began
        this = Session(
            session=self._number,
            start=self._start,
            first_step=self._step,
            last_step=step,
            seconds=seconds,
            starting=max(0.0, seconds - sum(spent.values())) + spent["compile"],
            updating=spent["updates"],
            saving=spent["checkpoint"],
            validating=spent["validation"],
            waiting=spent["input"],
        )
        self._this = [this]
        line = b"\n" * self._torn + _line_of(this).encode()
        self._torn = True
        with contextlib.suppress(OSError):
            self._torn = self._file.write(line) < len(line)

    def account(self) -> Account:
        """Of all sessions, as of the last `note`."""
        return account([*self._past, *self._this])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _line_of(session: Session) -> str:
    return json.dumps(dataclasses.asdict(session)) + "\n"
