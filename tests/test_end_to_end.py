"""The commands as a user types them: train, stop, go on, evaluate, and every kind of bad input."""

import csv
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from wavelet_jax import runs


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
    metrics = runs.read_metrics(workdir)
    assert [line["step"] for line in metrics] == sorted({line["step"] for line in metrics})
    return {line["step"]: tuple(line.get(name) for name in kept) for line in metrics}


@pytest.fixture(scope="module")
def whole_runs(data_flags, tmp_path_factory):
    """Undisturbed runs of two methods, trained by the comparison command, and the folder of its results."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--config.compare.methods=('wavelet', 'rope')", "--config.log.every=1", *data_flags]
    out = run("train.py", f"--config={ROOT}/configs/smoke.py", f"--workdir={folder}", *flags)
    return folder, out


def test_comparison_trains_evaluates_and_draws(whole_runs):
    folder, out = whole_runs
    for method in ("wavelet", "rope"):
        metrics = runs.read_metrics(folder / method)
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
    assert (folder / "extrapolation.png").stat().st_size > 10_000
    assert (folder / "loss_by_position.png").stat().st_size > 10_000


@pytest.mark.parametrize("method", ["wavelet", pytest.param("rope", marks=pytest.mark.slow)])
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
        while not any(line["step"] >= 12 for line in runs.read_metrics(tmp_path)):
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


@pytest.mark.parametrize("protocol", ["non_overlapping", "sliding_window"])
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
        "unknown position method 'alib': did you mean 'alibi'?": [
            smoke,
            "--config.position.method=alib",
            *data_flags,
        ],
        'Did you mean "theta"': [f"{smoke}:rope", "--config.position.teta=3", *data_flags],
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
            "--config.compare.methods=('wavelet', 'aliby')",
            *data_flags,
        ],
        "compare.methods names a method twice": [smoke, "--config.compare.methods=('rope', 'rope')", *data_flags],
        "length 1000000 is longer than the validation text": [
            smoke,
            "--config.compare.methods=('rope', 'wavelet')",
            "--config.compare.lengths=(64, 1000000)",
            *data_flags,
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
    line = refused("train.py", *flags, "--config.train.seed=3")
    assert "position.method (wavelet there, alibi here), train.seed (0 there, 3 here)" in line
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_damaged_and_finished_runs(whole_runs, data_flags, tmp_path):
    smoke = [f"--config={ROOT}/configs/smoke.py:wavelet", *data_flags]
    finished = f"--workdir={whole_runs[0] / 'wavelet'}"
    assert "is at update 40 already, past train.steps 30" in refused(
        "train.py", *smoke, finished, "--config.train.steps=30"
    )
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "is no folder" in refused("train.py", *smoke, f"--workdir={place}")
        assert "is no folder" in refused("eval.py", finished, "--lengths=64", f"--out={place}")
    (tmp_path / "config.json").write_text('{"train": ')
    assert "config.json is damaged" in refused("train.py", *smoke, f"--workdir={tmp_path}")


def test_a_loss_that_is_not_finite_stops_the_run(data_flags, tmp_path):
    smoke = [f"--config={ROOT}/configs/smoke.py:wavelet", "--config.checkpoint.every=1", *data_flags]
    process = start("train.py", *smoke, "--config.optimizer.learning_rate=1e30", f"--workdir={tmp_path}")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    stopped_at = int(re.search(r"error: update (\d+): loss \S+, gradient norm", err).group(1))
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(saved) == stopped_at - 1


def test_bad_evaluation_input(whole_runs, data_flags, tmp_path):
    trained = f"--workdir={whole_runs[0] / 'wavelet'}"
    empty = tmp_path / "empty"
    runs.save_config(empty, runs.load_config(whole_runs[0] / "wavelet"))
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
