"""Directories of runs and of results: parts that are gone, what cannot be written, symbolic links, kills."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.project import ROOT, environment, program

from configs import smoke
from wavelet_jax.errors import UserError, one_line
from wavelet_jax.files import atomic
from wavelet_jax.runs import checkpoint, directory, profiling
from wavelet_jax.runs.metrics import MetricsLog, read_metrics


@pytest.fixture
def workdir(tmp_path) -> Path:
    """What a run leaves that has made 40 updates and saved two checkpoints."""
    workdir = tmp_path / "run"
    directory.save_config(workdir, smoke.get_config())
    (workdir / "metrics.jsonl").write_text('{"step": 20, "loss": 3.0}\n{"step": 40, "loss": 2.0}\n')
    (workdir / "lock").write_text("")
    (workdir / "tensorboard").mkdir()
    for step in (20, 40):
        (workdir / "checkpoints" / str(step) / "state").mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "state" / "array").write_text("0")
    checkpoint.check_whole(workdir)
    return workdir


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(workdir: Path, said: str) -> None:
    before = everything(workdir)
    with pytest.raises(UserError, match=said):
        checkpoint.check_whole(workdir)
    assert everything(workdir) == before


# -- a part of a run is gone ------------------------------------------------------------------------------------------


def test_a_run_without_its_checkpoints_is_not_begun_anew(workdir):
    for path in (workdir / "checkpoints").iterdir():
        shutil.rmtree(path)
    refused(workdir, "the checkpoints of .* are gone: bring them back")
    (workdir / "checkpoints").rmdir()
    refused(workdir, "the checkpoints of .* are gone: bring them back")
    (workdir / "checkpoints").write_text("")
    refused(workdir, "checkpoints is not a folder")
    (workdir / "checkpoints").unlink()
    (workdir / "metrics.jsonl").unlink()
    refused(workdir, "the checkpoints of .* are gone: bring them back")
    (workdir / "config.json").unlink()  # as the message says
    checkpoint.check_whole(workdir)


def test_a_run_without_its_config_is_not_begun_anew(workdir):
    (workdir / "config.json").unlink()
    refused(workdir, r"has 2 logged lines but no config.json: bring it back")
    (workdir / "metrics.jsonl").unlink()
    refused(workdir, r"has checkpoints but no config.json: bring it back")


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    """At each moment of a start: what is on disk is a whole run."""
    workdir = tmp_path / "run"
    checkpoint.check_whole(workdir)
    with directory.locked(workdir):
        checkpoint.check_whole(workdir)
        with checkpoint.open_manager(workdir, smoke.get_config()):
            checkpoint.check_whole(workdir)
            log = MetricsLog(workdir, 0)
            checkpoint.check_whole(workdir)
            directory.save_config(workdir, smoke.get_config())
            checkpoint.check_whole(workdir)
            for step in range(1, 100):  # every save has failed: there is nothing that could be lost
                log.write(step, {"loss": 1.0})
            checkpoint.check_whole(workdir)
            assert not checkpoint.any_saved(workdir)
            log.close()


# -- what cannot be written -------------------------------------------------------------------------------------------


def flags(text_files, tmp_path, *more: str) -> list[str]:
    keys = ["train.steps=4", "log.every=1", "checkpoint.every=2", "eval.every=0", "data.source=text"]
    keys += [f"data.train_files={text_files}/*.txt", "data.validation_fraction=0.2", f"data.cache_dir={tmp_path}/cache"]
    keys = [f"--config.{key}" for key in (*keys, *more)]
    return [f"{ROOT}/train.py", f"--config={ROOT}/configs/smoke.py:rope", *keys, f"--workdir={tmp_path}/run"]


def ended(command: list[str]) -> tuple[int, str]:
    """The exit code and stderr; one that does not end within two minutes fails."""
    command = [sys.executable, *command]
    out = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    return out.returncode, out.stderr


def test_saves_that_cannot_make_their_folder_end_the_run(text_files, tmp_path):
    """Threads of orbax would wait for them for ever; then the same command starts over."""
    code, said = ended([*program("without_folders")[1:], *flags(text_files, tmp_path)])
    last = said.splitlines()[-1]
    assert code == 2, said
    assert last.startswith("error: the checkpoint of update 4 could not be written (")
    assert "Disk quota exceeded" in last
    assert "there is none before it" in last
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["none-yet"]
    assert len(read_metrics(tmp_path / "run")) == 4
    checkpoint.check_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["run", "checkpoints"])
def test_folders_that_cannot_be_written_are_refused_at_the_start(text_files, tmp_path, where):
    """`chattr +i`, which binds the superuser too."""
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    folder = workdir if where == "run" else workdir / where
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", folder], check=False).returncode:
        pytest.skip("no folder can be made immutable here")
    try:
        code, said = ended(flags(text_files, tmp_path))
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert code == 2, said
    reasons = (f"{workdir} cannot be used: {workdir} cannot be written", f"{folder}/none-yet: Operation not permitted")
    assert said.splitlines()[-1] == f"error: {reasons[where != 'run']}"
    assert not (workdir / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_ends_the_run(text_files, tmp_path):
    """By `chattr +i` when the first updates are logged."""
    workdir = tmp_path / "run"
    command = [sys.executable, *flags(text_files, tmp_path, "train.steps=1500", "checkpoint.every=500")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not read_metrics(workdir):
            assert process.poll() is None
        folder = workdir / "checkpoints"
        if not shutil.which("chattr") or subprocess.run(["chattr", "+i", folder], check=False).returncode:
            process.kill()
            pytest.skip("no folder can be made immutable here")
        try:
            _, said = process.communicate(timeout=200)
        finally:
            subprocess.run(["chattr", "-i", folder], check=True)
            process.kill()
    assert process.returncode == 2, said
    assert said.splitlines()[-1].startswith("error: the checkpoint of update 1500 could not be written (")


def test_an_error_of_the_system_names_its_file(tmp_path):
    with pytest.raises(OSError, match="No such file") as raised:
        os.replace(tmp_path / "a", tmp_path / "b")
    assert one_line(raised.value) == f"{tmp_path}/a -> {tmp_path}/b: No such file or directory"
    assert one_line(UserError("two\n  lines")) == "two lines"
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left") as raised:
        file.write(b"x")  # which file it was is not in it
    assert one_line(raised.value).startswith(
        f"No space left on device (in {sys._getframe().f_code.co_name}, {__file__}:"
    )


# -- symbolic links ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*directory.WRITTEN, "checkpoints/20", "checkpoints/20/state/array", "tensorboard/events"]
)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_a_run_is_named(workdir, tmp_path, name, dangling):
    elsewhere, path = tmp_path / "elsewhere", workdir / name
    if path.exists():
        shutil.move(path, elsewhere)
    if dangling:
        elsewhere = tmp_path / "nothing"
    path.symlink_to(elsewhere)
    refused(workdir, f"^{path} is a symbolic link, to {elsewhere}: what is written there would go elsewhere")


def test_a_workdir_may_be_a_link(workdir, tmp_path):
    (tmp_path / "link").symlink_to(workdir)
    checkpoint.check_whole(tmp_path / "link")
    with directory.locked(tmp_path / "link"):
        MetricsLog(tmp_path / "link", 40).close()


def test_nothing_is_written_through_a_link(workdir, tmp_path):
    """Also one that comes after the check: every way in which a run writes."""
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    for name in ("lock", "metrics.jsonl", "sessions.jsonl", "config.json", "tensorboard", "checkpoints", "profile"):
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(victim if "." in name or name == "lock" else folder)
    with pytest.raises(UserError, match="lock is a symbolic link"), directory.locked(workdir):
        pass
    with pytest.raises(UserError, match="tensorboard is a symbolic link"):
        MetricsLog(workdir, 0)
    with (
        pytest.raises(UserError, match="checkpoints is a symbolic link"),
        checkpoint.open_manager(workdir, smoke.get_config()),
    ):
        pass
    with pytest.raises(UserError, match="profile is a symbolic link"):
        profiling.Profile(workdir / "profile", "1:1", 1).before(1)
    directory.save_config(workdir, smoke.get_config())  # replaces the link
    assert victim.read_text() == "precious"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: os.link(__file__, path)])
def test_only_a_file_of_its_own_is_kept_open(tmp_path, make):
    """A pipe would wait for a reader; a second name of a file is as good as a link."""
    try:
        make(tmp_path / "lock")
    except OSError:
        pytest.skip("not here: another file system")
    with pytest.raises((UserError, IsADirectoryError)), atomic.open_kept(tmp_path / "lock", "a+"):
        pass


# -- results, together ------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_results_come_together_or_not_at_all(tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("precious")
    with pytest.raises(FileNotFoundError), atomic.written_together(out) as partial:
        shutil.copy(victim, partial / "a") and (partial / "none" / "b").write_text("")
    assert names(out) == []
    (out / "a").symlink_to(victim)
    with atomic.written_together(out) as partial:
        (partial / "a").write_text("1")
        (partial / "b").write_text("2")
        assert "a" not in {path.name for path in out.iterdir() if not path.is_symlink()}
    assert names(out) == ["a", "b"]
    assert not (out / "a").is_symlink()
    assert victim.read_text() == "precious"


def test_what_a_kill_leaves_is_removed_and_what_lives_is_not(tmp_path):
    command = program("holding_a_partial_file", tmp_path)
    pipes = {"env": environment(), "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as killed, subprocess.Popen(command, cwd=ROOT, **pipes) as alive:
        assert killed.stdout.readline() == alive.stdout.readline() == "ready\n"
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert len(names(tmp_path)) == 2
        assert all(name.startswith(".partial-") for name in names(tmp_path))
        with atomic.replaced(tmp_path / "a") as partial:
            partial.write_text("whole")
            assert len(names(tmp_path)) == 2  # its own, and the living one's
        assert (tmp_path / "a").read_text() == "whole"
        assert len(names(tmp_path)) == 2
        alive.communicate("")
    assert alive.returncode == 0
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "half"
