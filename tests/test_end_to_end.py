"""The commands as a user types them: train, stop, go on, evaluate, and every kind of bad input."""

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support.project import ROOT, environment, program

from wavelet_jax.runs import checkpoint, directory
from wavelet_jax.runs.metrics import read_metrics


@pytest.fixture(scope="module")
def data_flags(text_files, tmp_path_factory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return [
        "--config.data.source=text",
        f"--config.data.train_files={text_files}/*.txt",
        "--config.data.validation_fraction=0.2",
        f"--config.data.cache_dir={cache}",
    ]


def start(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: str, *arguments: object) -> str:
    process = start(script, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def refused(script: str, *arguments: object) -> str:
    """Runs a command that must end with code 2 and say why in one line of stderr; returns the line."""
    process = start(script, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, (process.returncode, out, err)
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def losses(workdir) -> dict[int, tuple]:
    """What must not change when a run is cut in pieces."""
    kept = ("loss", "validation_loss", "grad_norm", "learning_rate")
    metrics = read_metrics(workdir)
    assert [line["step"] for line in metrics] == sorted({line["step"] for line in metrics})
    return {line["step"]: tuple(line.get(name) for name in kept) for line in metrics}


@pytest.fixture(scope="module")
def whole_runs(data_flags, tmp_path_factory):
    """Undisturbed runs of two methods, trained by the comparison command, and the folder of its results."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--config.compare.variants=('wavelet', 'rope')", "--config.log.every=1", *data_flags]
    process = start("train.py", f"--config={ROOT}/configs/smoke.py", f"--workdir={folder}", *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out, err


def test_comparison_trains_evaluates_and_draws(whole_runs):
    folder, out, err = whole_runs
    for method in ("wavelet", "rope"):
        metrics = read_metrics(folder / method)
        assert [line["step"] for line in metrics] == list(range(1, 41))
        assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
        assert {line["step"] for line in metrics if "validation_loss" in line} == {20, 40}
        assert sorted(int(path.name) for path in (folder / method / "checkpoints").iterdir()) == [20, 40]
        assert list((folder / method / "tensorboard").iterdir())
    with (folder / "extrapolation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], int(row["length"])) for row in rows] == [
        (method, length) for method in ("wavelet", "rope") for length in (64, 128, 256)
    ]
    assert {row["tokens_scored"] for row in rows} == {"4096"}
    assert all(float(row["ci_low"]) < float(row["perplexity"]) < float(row["ci_high"]) for row in rows)
    assert f"{float(rows[0]['perplexity']):.3f}" in out
    # Said once each: what both are evaluated by at 256 tokens, which is compiled first, and trained by at 64.
    assert re.findall(r"^attention backend: (\w+) \(decode needs", err, re.MULTILINE) == ["tiled", "reference"]
    assert (folder / "extrapolation.png").stat().st_size > 10_000
    assert (folder / "loss_by_position.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wavelet", "rope"])
def test_stop_and_go_on_equals_not_stopping(whole_runs, data_flags, tmp_path, method):
    config = f"--config={ROOT}/configs/smoke.py:{method}"
    flags = [config, f"--workdir={tmp_path}", "--config.log.every=1", *data_flags]
    run("train.py", *flags, "--config.train.steps=23")
    run("train.py", *flags)
    whole, joined = losses(whole_runs[0] / method), losses(tmp_path)
    assert joined.pop(23)[1] is not None  # the shorter run ended with a validation of its own
    del whole[23]
    assert joined == whole


def test_killed_run_goes_on_to_the_same_losses(whole_runs, data_flags, tmp_path):
    flags = [f"--config={ROOT}/configs/smoke.py:wavelet", f"--workdir={tmp_path}", "--config.log.every=1"]
    flags += ["--config.checkpoint.every=5", *data_flags]
    process = start("train.py", *flags)
    try:
        deadline = time.monotonic() + 200
        while not any(line["step"] >= 12 for line in read_metrics(tmp_path)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # what a kill in the middle of a line leaves
    run("train.py", *flags)
    assert losses(tmp_path) == losses(whole_runs[0] / "wavelet")


def wait_for(process: subprocess.Popen, happened) -> None:
    """Returns when `happened()`; fails where the process ends before it."""
    deadline = time.monotonic() + 200
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupted(process: subprocess.Popen, signum: int, happened) -> list[str]:
    """Sends a signal when `happened()`, checks the exit code, and returns the lines of stderr."""
    wait_for(process, happened)
    process.send_signal(signum)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signum, err
    return err.splitlines()


def logged(workdir, step: int):
    return lambda: any(line["step"] >= step for line in read_metrics(workdir))


def test_signals_save_and_the_same_command_goes_on(whole_runs, data_flags, tmp_path):
    """SIGTERM ends a whole comparison in its first run, SIGINT the run that goes on: no loss differs in the end."""
    workdir = tmp_path / "wavelet"
    flags = ["--config.log.every=1", *data_flags]
    both = [f"--config={ROOT}/configs/smoke.py", "--config.compare.variants=('wavelet', 'rope')"]
    one = [f"--config={ROOT}/configs/smoke.py:wavelet", f"--workdir={workdir}", *flags]
    lives = [
        (start("train.py", *both, f"--workdir={tmp_path}", *flags), signal.SIGTERM, logged(workdir, 5)),
        (lambda: start("train.py", *one), signal.SIGINT, logged(workdir, 23)),
    ]
    for process, signum, happened in lives:
        process = process() if callable(process) else process
        last = interrupted(process, signum, happened)[-1]
        said = re.fullmatch(rf"{signum.name}: (.*) is saved at update (\d+); the same command resumes the run", last)
        assert said.group(1) == str(workdir)
        assert int(said.group(2)) == checkpoint.latest_step(workdir) == read_metrics(workdir)[-1]["step"]
    assert not (tmp_path / "rope").exists()
    run("train.py", *one)
    assert losses(workdir) == losses(whole_runs[0] / "wavelet")


def test_a_signal_before_the_first_update_ends_at_once(data_flags, tmp_path):
    flags = [f"--config={ROOT}/configs/smoke.py:rope", f"--workdir={tmp_path}/run", *data_flags]
    process = start("train.py", *flags, "--config.train.steps=100000")
    lines = interrupted(process, signal.SIGTERM, (tmp_path / "run" / "config.json").exists)
    assert lines[-1] == "SIGTERM: there is nothing to save; the same command starts again"
    assert checkpoint.latest_step(tmp_path / "run") is None


def test_a_second_signal_ends_at_once():
    """Also where the main thread is stuck."""
    command, pipes = program("stuck_after_a_signal"), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
        assert process.stderr.read() == "\nSIGTERM: a second signal\n"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(whole_runs, data_flags, tmp_path):
    workdir = tmp_path / "wavelet"
    shutil.copytree(whole_runs[0] / "wavelet", workdir)
    (array_file, *_) = (workdir / "checkpoints" / "40" / "state" / "ocdbt.process_0" / "d").iterdir()
    data = bytearray(array_file.read_bytes())
    data[len(data) // 2] ^= 1
    array_file.write_bytes(data)
    process = start(
        "train.py",
        f"--config={ROOT}/configs/smoke.py:wavelet",
        f"--workdir={workdir}",
        *data_flags,
        "--config.log.every=1",
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (warning,) = (line for line in err.splitlines() if " is damaged" in line)
    assert f"checkpoints/40 is damaged (state/ocdbt.process_0/d/{array_file.name} is not as it was written)" in warning
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["20", "40", "damaged-40"]
    assert losses(workdir) == losses(whole_runs[0] / "wavelet")


@pytest.mark.slow
def test_twenty_kills_change_no_loss(whole_runs, data_flags, tmp_path):
    """SIGKILL at random moments of start, updates and saves, of which there is one after every update."""
    flags = [f"--config={ROOT}/configs/smoke.py:wavelet", f"--workdir={tmp_path}", "--config.log.every=1"]
    flags += ["--config.checkpoint.every=1", *data_flags]
    rng = np.random.default_rng(int(time.time()))
    at, cut_short = [], set()
    for number in range(20):
        before = max((line["step"] for line in read_metrics(tmp_path)), default=0)
        process = start("train.py", *flags)
        try:
            if number % 5:  # while it trains: some 2 updates further each time, with some milliseconds on top
                wait_for(process, logged(tmp_path, min(before + int(rng.integers(1, 4)), 39)))
                time.sleep(rng.uniform(0, 0.1))
            else:  # while it starts
                time.sleep(rng.uniform(0, 8))
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        at.append(checkpoint.latest_step(tmp_path))
        cut_short |= {(path.name, path.stat().st_ino) for path in (tmp_path / "checkpoints").glob("*tmp")}
    run("train.py", *flags)
    differing = sum(losses(tmp_path)[step] != loss for step, loss in losses(whole_runs[0] / "wavelet").items())
    print(f"20 kills, {len(cut_short)} of them during a save; newest checkpoints {at}; differing losses: {differing}")
    assert losses(tmp_path) == losses(whole_runs[0] / "wavelet")
    assert not list((tmp_path / "checkpoints").glob("damaged*"))


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(whole_runs, data_flags, tmp_path):
    """On a file system of its own that holds a few checkpoints, and is then filled by something else."""
    disk, copied = tmp_path / "disk", tmp_path / "copied"
    disk.mkdir()
    flags = [f"--config={ROOT}/configs/smoke.py:wavelet", f"--workdir={disk}/run", "--config.log.every=1", *data_flags]
    train = [sys.executable, str(ROOT / "train.py"), *flags]
    command = " ".join(map(shlex.quote, train))
    script = f"""
        mount -t tmpfs -o size=2m tmpfs {disk} || exit 77
        {command} --config.train.steps=20 || exit 1
        head -c $(($(df --output=avail -B1 {disk} | tail -1) - 100000)) /dev/zero > {disk}/filler
        {command} --config.checkpoint.every=10
        echo ended $?
        cp -r {disk}/run {copied}
        rm {disk}/filler
        {command} || exit 1
        cp -r {disk}/run {copied}-after
    """
    out = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if out.returncode == 77 or "unshare" in out.stderr:
        pytest.skip("no file system can be mounted here")
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "ended 2", out.stderr
    said = [line for line in out.stderr.splitlines() if "could not be written" in line]
    assert "the checkpoint of update 30 could not be written" in said[0] or "metrics of update" in said[0]
    assert any(
        "error: the checkpoint of update 40 could not be written" in line and "No space left" in line for line in said
    )
    assert checkpoint.latest_step(copied) == 20
    assert losses(tmp_path / "copied-after") == losses(whole_runs[0] / "wavelet")


@pytest.mark.parametrize("protocol", [pytest.param("non_overlapping", marks=pytest.mark.slow), "sliding_window"])
def test_eval_command(whole_runs, tmp_path, protocol):
    workdirs = [f"--workdir={whole_runs[0] / method}" for method in ("wavelet", "rope")]
    stride = ["--stride=16"] if protocol == "sliding_window" else []
    out = run("eval.py", *workdirs, "--lengths=32,64,100", f"--protocol={protocol}", *stride, f"--out={tmp_path}/out")
    with (tmp_path / "out" / "extrapolation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["protocol"] for row in rows} == {protocol}
    assert {row["tokens_scored"] for row in rows} == {"4000"}
    expected = {"16"} if stride else {"32", "64"}
    assert {row["stride"] for row in rows} == expected
    assert protocol in out


def test_bad_training_input(data_flags, tmp_path, text_files):
    smoke = f"--config={ROOT}/configs/smoke.py"
    short = text_files / "00.txt"
    cases = {
        "unknown position method 'ropee': did you mean 'rope'?": [f"{smoke}:ropee", *data_flags],
        "position.method: the method is chosen by the variant": [
            smoke,
            "--config.position.method=alibi",
            *data_flags,
        ],
        "theta is an option of rope, transformer_xl, sinusoidal, not of wavelet": [
            smoke,
            "--config.position.theta=3",
            *data_flags,
        ],
        "--config.position.mother is set for all variants, but rope have no such key": [
            smoke,
            "--config.compare.variants=('wavelet', 'rope')",
            "--config.position.mother=haar",
            *data_flags,
        ],
        "unknown config key 'position.teta': did you mean 'position.theta'?": [
            f"{smoke}:rope",
            "--config.position.teta=3",
            *data_flags,
        ],
        "unknown mother wavelet 'riker': did you mean 'ricker'?": [
            smoke,
            "--config.position.mother=riker",
            *data_flags,
        ],
        "8 scales cannot fill a head of 12 dimensions evenly": [smoke, "--config.model.head_dim=12", *data_flags],
        "unknown model.attention_backend 'refrence': did you mean 'reference'?": [
            smoke,
            "--config.model.attention_backend=refrence",
            *data_flags,
        ],
        "log.every must be at least 1, not 0": [smoke, "--config.log.every=0", *data_flags],
        "config.train.steps=many": [smoke, "--config.train.steps=many", *data_flags],
        "unknown position method 'aliby': did you mean 'alibi'?": [
            smoke,
            "--config.compare.variants=('wavelet', 'aliby')",
            *data_flags,
        ],
        "eval.bootstrap_seed must be at least 0, not -1": [
            smoke,
            "--config.compare.variants=('rope', 'wavelet')",
            "--config.eval.bootstrap_seed=-1",
            *data_flags,
        ],
        "compare.variants names a variant twice": [smoke, "--config.compare.variants=('rope', 'rope')", *data_flags],
        "length 1000000 is longer than the validation text": [
            smoke,
            "--config.compare.variants=('rope', 'wavelet')",
            "--config.compare.lengths=(64, 1000000)",
            *data_flags,
        ],
        # The wavelets of smoke.py itself, which is not trained here, could not have such heads.
        "length 1000001 is longer than the validation text": [
            smoke,
            "--config.compare.variants=('rope', 'alibi')",
            "--config.model.head_dim=6",
            "--config.compare.lengths=(64, 1000001)",
            *data_flags,
        ],
        "unknown variant of configs/paper/table1.py 'wavelet_riker': did you mean 'wavelet_ricker'?": [
            f"--config={ROOT}/configs/paper/table1.py:wavelet_riker"
        ],
        "train.batch_size 8 must be a multiple of 3": [smoke, "--config.train.accumulation=3", *data_flags],
        "smoke.pie": [f"--config={ROOT}/configs/smoke.pie", *data_flags],
        "unexpected arguments now": [smoke, *data_flags, "now"],
        "no-such": [smoke, *data_flags, f"--config.data.train_files={tmp_path}/no-such-*.txt"],
        "config.data.validation_f": [smoke, *data_flags, f"--config.data.train_files={short}"],
        "config.train.length": [smoke, *data_flags, "--config.train.length=100000"],
    }
    for said, arguments in cases.items():
        assert said in refused("train.py", *arguments, f"--workdir={tmp_path}/run"), said
        assert not (tmp_path / "run").exists(), said


def test_workdir_of_another_config_is_left_alone(whole_runs, data_flags):
    workdir = whole_runs[0] / "wavelet"
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    flags = [f"--config={ROOT}/configs/smoke.py:alibi", f"--workdir={workdir}", *data_flags]
    line = refused("train.py", *flags, "--config.train.model_seed=3")
    assert "position.method (wavelet there, alibi here), train.model_seed (0 there, 3 here)" in line
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_damaged_and_finished_runs(whole_runs, data_flags, tmp_path):
    smoke = [f"--config={ROOT}/configs/smoke.py:wavelet", *data_flags]
    finished = f"--workdir={whole_runs[0] / 'wavelet'}"
    assert "is at update 40 already, past train.steps 30" in refused(
        "train.py", *smoke, finished, "--config.train.steps=30"
    )
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "is not a folder" in refused("train.py", *smoke, f"--workdir={place}")
        assert "is not a folder" in refused("eval.py", finished, "--lengths=64", f"--out={place}")
    (tmp_path / "config.json").write_text('{"train": ')
    assert "config.json is damaged" in refused("train.py", *smoke, f"--workdir={tmp_path}")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(data_flags, tmp_path):
    smoke = [f"--config={ROOT}/configs/smoke.py:wavelet", "--config.checkpoint.every=1", *data_flags]
    process = start("train.py", *smoke, "--config.optimizer.learning_rate=1e30", f"--workdir={tmp_path}")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    stopped_at = int(re.search(r"error: update (\d+): loss \S+, gradient norm", err).group(1))
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(saved) == stopped_at - 1
    last = read_metrics(tmp_path)[-1]
    assert last["step"] == stopped_at
    assert last["loss"] is None or last["grad_norm"] is None


@pytest.mark.slow
def test_skipped_updates_are_counted_over_lives(data_flags, tmp_path):
    """Update 1 makes parameters of 1e30; all after it are not finite."""
    flags = [f"--config={ROOT}/configs/smoke.py:wavelet", "--config.optimizer.learning_rate=1e30", *data_flags]
    flags += ["--config.log.every=3", "--config.eval.every=0", f"--workdir={tmp_path}"]
    run("train.py", *flags, "--config.train.skip_nonfinite=9", "--config.train.steps=4")
    assert [(line["step"], line["skipped"]) for line in read_metrics(tmp_path)] == [(3, 2), (4, 3)]
    process = start("train.py", *flags, "--config.train.skip_nonfinite=5")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert re.search(r"error: update 7: loss \S+, gradient norm (nan|inf), after 5 such updates in a row", err), err
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 4, 6, 7]


def test_bad_evaluation_input(whole_runs, data_flags, tmp_path):
    trained = f"--workdir={whole_runs[0] / 'wavelet'}"
    empty = tmp_path / "empty"
    directory.save_config(empty, directory.load_config(whole_runs[0] / "wavelet"))
    learned = tmp_path / "learned"
    smoke = [f"--config={ROOT}/configs/smoke.py:learned", "--config.train.steps=1", "--config.eval.every=0"]
    run("train.py", *smoke, f"--workdir={learned}", *data_flags)
    cases = {
        "length 1000000 is longer than the validation text": [trained, "--lengths=64,1000000"],
        "--lengths takes whole numbers, not 64,many": [trained, "--lengths=64,many"],
        "lengths must be positive whole numbers: 0, 64": [trained, "--lengths=64,0"],
        "unknown protocol 'full_lenght': did you mean 'full_length'?": [
            trained,
            "--lengths=64",
            "--protocol=full_lenght",
        ],
        "a stride goes with the sliding_window protocol": [trained, "--lengths=64", "--stride=8"],
        "stride 100 must be 1 to the shortest length, 64": [
            trained,
            "--lengths=64,128",
            "--protocol=sliding_window",
            "--stride=100",
        ],
        "holds no run": [f"--workdir={tmp_path}/nothing", "--lengths=64"],
        "has no checkpoint to evaluate": [f"--workdir={empty}", "--lengths=64"],
        "past the learned table of 256": [f"--workdir={learned}", "--lengths=64,512"],
        "eval.py needs": [trained],
    }
    for said, arguments in cases.items():
        assert said in refused("eval.py", *arguments, f"--out={tmp_path}/out"), said
        assert not (tmp_path / "out").exists(), said
