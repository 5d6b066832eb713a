"""Output that cannot be written: the commands end as they would have, with all their files."""

import csv
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.project import ROOT, program, run

from wavelet_jax.commands import terminal
from wavelet_jax.errors import UserError
from wavelet_jax.runs import checkpoint
from wavelet_jax.runs.metrics import read_metrics

BROKEN = {
    "a full disk": "{command} > /dev/full 2>&1",
    "closed descriptors": "{command} <&- >&- 2>&-",
    "a reader that has left": "{{ {command}; echo $? > {code}; }} 2>&1 | true; exit $(cat {code})",
}


@pytest.fixture(scope="module")
def train(text_files, tmp_path_factory):
    """train(workdir) is the command of a run of seconds."""
    cache = tmp_path_factory.mktemp("cache")
    keys = ["train.steps=4", "log.every=1", "checkpoint.every=2", "eval.every=0", "data.source=text"]
    keys += [f"data.train_files={text_files}/*.txt", "data.validation_fraction=0.2", f"data.cache_dir={cache}"]
    flags = [f"--config={ROOT}/configs/smoke.py:rope", *(f"--config.{key}" for key in keys)]
    return lambda workdir: f"{sys.executable} {ROOT}/train.py {' '.join(flags)} --workdir={workdir}".replace("*", "'*'")


def shell(line: str) -> subprocess.CompletedProcess:
    return run(["bash", "-c", line], timeout=200)


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    out = shell(train(workdir))
    assert out.returncode == 0, out.stderr
    assert out.stderr.count("updates 0 to 4") == 1
    return workdir


def saved(command: str, folder: Path, broken: str) -> Path:
    """Runs a training whose output is broken; returns its directory."""
    out = shell(BROKEN[broken].format(command=command, code=folder / "code"))
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
    assert checkpoint.latest_step(folder / "run") == len(losses(folder / "run")) == 4
    return folder / "run"


def test_a_run_whose_reader_leaves_trains_and_saves(train, tmp_path):
    saved(train(tmp_path / "run"), tmp_path, "a reader that has left")


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_a_run_whose_output_is_lost_has_the_same_losses(train, whole, tmp_path, broken):
    assert losses(saved(train(tmp_path / "run"), tmp_path, broken)) == losses(whole)


@pytest.mark.slow
def test_an_evaluation_whose_table_is_lost_writes_its_files(whole, tmp_path):
    command = f"{sys.executable} {ROOT}/eval.py --workdir={whole} --lengths=64 --max_tokens=256 --out={tmp_path}/out"
    out = shell(f"{command} > /dev/full")
    assert out.returncode == 0, out.stderr
    with (tmp_path / "out" / "extrapolation.csv").open() as file:
        assert [row["length"] for row in csv.DictReader(file)] == ["64"]


@pytest.mark.parametrize("broken", BROKEN)
def test_an_error_whose_line_is_lost_has_its_exit_code(tmp_path, broken):
    line = BROKEN[broken].format(command=shlex.join(program("load_no_run")), code=tmp_path / "code")
    assert shell(line).returncode == 2


@pytest.mark.parametrize(("broken", "code"), list(zip(BROKEN, (2, 0, 0), strict=True)))
def test_a_command_that_has_nothing_but_its_output_says_that_it_is_lost(tmp_path, broken, code):
    """A closed descriptor is asked for, and a reader that has left has read what it wanted."""
    line = BROKEN[broken].replace(" 2>&1", "", 1) if broken == "a full disk" else BROKEN[broken]
    out = shell(line.format(command=shlex.join(program("print_and_check")), code=tmp_path / "code"))
    assert out.returncode == code
    assert ("error: the output could not be written (No space left on device)" in out.stderr) == bool(code)


def test_a_stream_that_fails_goes_on_when_it_can():
    reading, writing = os.pipe()
    raw = terminal._Forgiving(writing)
    stream = io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True)
    print("before", file=stream)
    assert os.read(reading, 100) == b"before\n"
    os.close(reading)
    print("lost", file=stream)
    assert raw.lost is None  # its reader has left
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), writing)
    print("lost", file=stream)
    assert raw.lost.strerror == "No space left on device"
    reading, again = os.pipe()
    os.dup2(again, writing)
    print("after", file=stream)
    assert os.read(reading, 100) == b"after\n"
    for descriptor in (reading, again, writing):
        os.close(descriptor)


def test_a_pipe_that_another_program_made_non_blocking_loses_nothing():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = "from wavelet_jax.commands import terminal; terminal.protect(); print('x' * 2_000_000); print('end')"
    with (
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=writing) as process,
        open(reading, "rb") as read,
    ):
        os.close(writing)
        assert read.read() == b"x" * 2_000_000 + b"\nend\n"
    assert process.returncode == 0


def test_names_that_the_terminal_has_no_letters_for():
    code = "from wavelet_jax.commands import terminal; terminal.protect(); print('naïve')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout == "na\\xefve\n"


def test_streams_that_are_not_the_process_s_own_are_left_alone(capsys):
    before = sys.stdout, sys.stderr
    terminal.protect()
    assert (sys.stdout, sys.stderr) == before
    terminal.check()


def test_what_is_lost_is_an_error_where_it_is_asked_for(monkeypatch):
    with open("/dev/full", "wb") as full:
        raw = terminal._Forgiving(full.fileno())
        raw.write(b"x")
        monkeypatch.setitem(terminal._raw, "stdout", raw)
        with pytest.raises(UserError, match="could not be written"):
            terminal.check()
