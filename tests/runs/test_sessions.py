"""Where the time of a run went over its sessions: sums by hand, and a run that is killed and goes on."""

import json
import os
import re
import signal

import pytest
from programs import killed_at
from support.project import program, run

from wavelet_jax.runs import checkpoint, sessions, throughput
from wavelet_jax.runs.metrics import read_metrics
from wavelet_jax.runs.sessions import Session
from wavelet_jax.training import loop

SPENT = {"updates": 0.0, **dict.fromkeys(throughput.LOST, 0.0)}


def session(number: int, first: int, last: int, updating: float, **more: float) -> Session:
    parts = {"starting": 0.0, "saving": 0.0, "validating": 0.0, "waiting": 0.0} | more
    return Session(number, 1e9, first, last, updating + sum(parts.values()), updating=updating, **parts)


def test_an_uninterrupted_run_loses_what_is_no_update():
    sums = sessions.account([session(1, 0, 40, 80.0, starting=10.0, saving=5.0, validating=3.0, waiting=2.0)])
    assert (sums.seconds, sums.counting, sums.lost, sums.updates_redone) == (100.0, 80.0, 0.0, 0)
    assert sums.columns() == {"run_seconds": 100.0, "goodput": 0.8, "updates_redone": 0}
    assert sums.line() == (
        "goodput 80%: 80 s of updates that count in 1.67 min over 1 session; no update redone; 10 s to start, 5 s to "
        "save, 3 s to validate, 2 s waiting for input"
    )


def test_updates_past_the_checkpoint_are_lost():
    """Killed at 12, of which 10 were saved, at 2 s an update; the second session makes 10 at 1 s."""
    killed, second = session(1, 0, 12, 24.0, starting=6.0), session(2, 10, 20, 10.0, saving=10.0)
    sums = sessions.account([killed, second])
    assert (sums.updates_redone, sums.counting, sums.lost, sums.seconds) == (2, 20.0 + 10.0, 4.0, 50.0)
    assert sums.goodput == 0.6
    assert "over 2 sessions; 2 updates redone (4 s); 6 s to start, 10 s to save" in sums.line()
    assert sessions.account([killed]).updates_redone == 0, "nobody has gone back yet"
    assert "; 1 update redone (2 s); " in sessions.account([session(1, 0, 11, 22.0), session(2, 10, 11, 1.0)]).line()


def test_a_later_session_may_go_back_further():
    """Of two sessions, where the checkpoint of 10 is damaged: 5 of 12 updates count, none of 4, and 15 of 15."""
    sums = sessions.account([session(1, 0, 12, 12.0), session(2, 10, 14, 8.0), session(3, 5, 20, 15.0)])
    assert (sums.updates_redone, sums.counting, sums.lost) == (7 + 4, 5.0 + 15.0, 7.0 + 8.0)


def test_updates_that_nobody_has_noted_are_not_guessed():
    """Between 10 and 30 a version trained that keeps no account, and a session was killed while it started."""
    sums = sessions.account([session(1, 0, 10, 10.0), session(2, 30, 30, 0.0, starting=10.0), session(3, 30, 40, 20.0)])
    assert (sums.updates_redone, sums.counting, sums.seconds) == (0, 30.0, 40.0)
    empty = sessions.account([])
    assert (empty.sessions, empty.goodput, empty.updates_redone) == (0, 0.0, 0)


def test_every_noted_line_brings_the_file_up_to_now(tmp_path):
    now = 100.0
    log = sessions.Sessions(tmp_path, 5, began=90.0, idle=False, clock=lambda: now)
    log.note(5, SPENT)
    now = 130.0
    log.note(8, SPENT | {"updates": 12.0, "compile": 4.0, "checkpoint": 3.0, "validation": 2.0, "input": 1.0})
    log.close()
    first, second = map(json.loads, (tmp_path / "sessions.jsonl").read_text().splitlines())
    assert (first["first_step"], first["last_step"], first["seconds"], first["starting"]) == (5, 5, 10.0, 10.0)
    (kept,) = sessions.read(tmp_path)
    assert kept == Session(**second)
    # Of 40 s, 22 are the meter's: 18 passed before it was made, and 4 in compilation.
    assert (kept.seconds, kept.starting, kept.updating) == (40.0, 22.0, 12.0)
    assert (kept.saving, kept.validating, kept.waiting) == (3.0, 2.0, 1.0)
    again = sessions.Sessions(tmp_path, 8, began=now, idle=False, clock=lambda: now)
    again.note(8, SPENT)
    again.close()
    assert [each.session for each in sessions.read(tmp_path)] == [1, 2]
    assert len((tmp_path / "sessions.jsonl").read_text().splitlines()) == 2, "a line for each session that has ended"


def test_an_idle_session_is_none(tmp_path):
    log = sessions.Sessions(tmp_path, 5, began=0.0, idle=True)
    log.note(5, SPENT)
    log.close()
    assert log.account().sessions == 0
    assert not list(tmp_path.iterdir())


def line_of(each: Session) -> bytes:
    return json.dumps(vars(each)).encode() + b"\n"


def test_a_torn_last_line_is_left_out(tmp_path, caplog):
    path, whole = tmp_path / "sessions.jsonl", session(1, 0, 4, 4.0)
    path.write_bytes(line_of(whole) + line_of(session(1, 0, 5, 5.0))[:-20])
    assert sessions.read(tmp_path) == [whole]
    assert not caplog.messages
    log = sessions.Sessions(tmp_path, 3, began=0.0, idle=False, clock=lambda: 1.0)
    log.note(3, SPENT)
    log.close()
    assert [(each.first_step, each.last_step) for each in sessions.read(tmp_path)] == [(0, 4), (3, 3)]
    assert not caplog.messages, "the torn line is gone"


@pytest.mark.parametrize(
    "damage", [b"[]", b"\xff\x00", b'{"session": 2}', line_of(session(2, 7, 3, 1.0)).strip(), b"null"]
)
def test_a_damaged_line_does_not_stop_a_run(tmp_path, caplog, damage):
    first, third = session(1, 0, 4, 4.0), session(3, 4, 6, 2.0)
    (tmp_path / "sessions.jsonl").write_bytes(line_of(first) + damage + b"\n" + line_of(third))
    assert sessions.read(tmp_path) == [first, third]
    (said,) = caplog.messages
    assert said.endswith("sessions.jsonl: damaged lines are left out of the account: 2")


class Full:
    """A file on a disk that has room for half of the second line, and then for all."""

    def __init__(self):
        self.content, self.lines = b"", 0

    def write(self, data: bytes) -> int:
        self.lines += 1
        if self.lines == 3:
            raise OSError("no room")
        written = data[: len(data) // 2] if self.lines == 2 else data
        self.content += written
        return len(written)


def test_a_full_disk_costs_no_line_that_comes_later(tmp_path):
    log = sessions.Sessions(tmp_path, 0, began=0.0, idle=False, clock=lambda: 9.0)
    log.close()
    log._file = full = Full()
    for step in (1, 2, 3, 4):
        log.note(step, SPENT)
        (tmp_path / "sessions.jsonl").write_bytes(full.content)
        (kept,) = sessions.read(tmp_path)
        assert kept.last_step == (1, 1, 1, 4)[step - 1]


# -- runs -------------------------------------------------------------------------------------------------------------


def said_of(err: str) -> re.Match | None:
    """Sessions, updates redone and their share of time, in the line at the end of a run."""
    return re.search(r"^goodput \d+%: .* over (\d+) sessions?; (no|\d+) updates? redone", err, re.MULTILINE)


def test_a_killed_run_that_goes_on_knows_what_it_lost(text_files, tmp_path, capsys):
    """Killed in update 13; what it had logged past its checkpoint is what the next session makes again."""
    workdir, files, cache = tmp_path / "run", f"{text_files}/*.txt", str(tmp_path / "cache")
    out = run(program("killed_at", 13, workdir, files, cache))
    assert out.returncode == -signal.SIGKILL, out.stderr
    before, saved = read_metrics(workdir), checkpoint.latest_step(workdir)
    assert before[-1]["step"] == 12
    assert saved in (5, 10)  # that of 10 was being written
    lost = 12 - saved
    loop.train(killed_at.make_config(files, cache), workdir)
    metrics = read_metrics(workdir)
    assert metrics[:saved] == before[:saved]
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert [line["updates_redone"] for line in metrics] == [0] * saved + [lost] * (20 - saved)
    seconds = [line["run_seconds"] for line in metrics]
    assert seconds == sorted(seconds)
    assert seconds[saved] > before[-1]["run_seconds"], "the killed session's time past its checkpoint is in it"
    assert all(0 < line["goodput"] < 1 for line in metrics)
    said = said_of(capsys.readouterr().err)
    assert said.groups() == ("2", str(lost))
    first, second = sessions.read(workdir)
    assert [(each.first_step, each.last_step) for each in (first, second)] == [(0, 12), (saved, 20)]
    # Independently: an update counts where the last session that made it is one that was not undone.
    counting = first.updating * saved / 12 + second.updating
    account = sessions.account([first, second])
    assert account.goodput == pytest.approx(counting / (first.seconds + second.seconds))
    parts = ("starting", "updating", "saving", "validating", "waiting")
    for each in (first, second):
        assert sum(getattr(each, part) for part in parts) == pytest.approx(each.seconds, abs=0.05)

    # A finished run makes no updates and is no session; it says the same again.
    content = (workdir / "sessions.jsonl").read_bytes()
    loop.train(killed_at.make_config(files, cache), workdir)
    assert (workdir / "sessions.jsonl").read_bytes() == content
    assert said_of(capsys.readouterr().err).group(0) == said.group(0)
    assert read_metrics(workdir) == metrics


def test_a_run_of_a_version_without_the_account_goes_on(text_files, tmp_path, capsys):
    """Its numbers begin with the session that has them; finished, it has none to say."""
    config = killed_at.make_config(f"{text_files}/*.txt", str(tmp_path / "cache"))
    workdir = tmp_path / "run"
    config.train.steps = 4
    loop.train(config, workdir)
    os.remove(workdir / "sessions.jsonl")
    capsys.readouterr()
    loop.train(config, workdir)
    assert said_of(capsys.readouterr().err) is None
    config.train.steps = 6
    loop.train(config, workdir)
    assert said_of(capsys.readouterr().err).groups() == ("1", "no")
    (only,) = sessions.read(workdir)
    assert (only.first_step, only.last_step) == (4, 6)
    assert [line["updates_redone"] for line in read_metrics(workdir)] == [0] * 6
