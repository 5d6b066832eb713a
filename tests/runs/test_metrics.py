"""Where metrics are written to, beside metrics.jsonl: TensorBoard, Weights & Biases."""

import importlib.util
import subprocess
import sys

import pytest
from support.project import ROOT, environment

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.runs.metrics import MetricsLog, read_metrics
from wavelet_jax.training import checks


def test_weights_and_biases_keeps_a_run_offline(text_files, tmp_path):
    """In two sessions, which are one run there."""
    pytest.importorskip("wandb")
    workdir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT}/configs/smoke.py:nope", f"--workdir={workdir}"]
    command += ["--config.data.source=text", f"--config.data.train_files={text_files}/*.txt"]
    command += [f"--config.data.cache_dir={tmp_path}/cache", "--config.data.validation_fraction=0.2"]
    command += ["--config.log.wandb=positions", "--config.log.every=1"]
    for steps in (2, 3):
        variables = environment(WANDB_MODE="offline", HOME=str(tmp_path))
        out = subprocess.run(
            [*command, f"--config.train.steps={steps}"], env=variables, capture_output=True, text=True, check=False
        )
        assert out.returncode == 0, out.stderr
    first, second = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name  # the identity of the run is in it
    for file, steps in ((first, (1, 2)), (second, (3,))):
        content = file.read_bytes()
        assert b"positions" in content
        for line in read_metrics(workdir):
            assert (repr(line["loss"]).encode() in content) == (line["step"] in steps)


def test_without_weights_and_biases_it_is_said_what_to_install(monkeypatch):
    config = smoke.get_config()
    config.log.wandb = "positions"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config.log.wandb needs wandb: pip install 'wavelet-jax\[wandb\]'"):
        checks.check(config)
    config.log.wandb = ""
    checks.check(config)


class Failing:
    """A writer whose disk is full from the second line on."""

    def __init__(self):
        self.written = []

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self.written:
            raise OSError("no room")
        self.written.append((step, metrics))

    def close(self) -> None:
        raise OSError("no room")


def test_a_writer_that_fails_costs_the_others_nothing(tmp_path, caplog):
    writer = Failing()
    log = MetricsLog(tmp_path, 0, [lambda: writer])
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step, "grad_norm": float("nan")})
    log.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 0.5, 1 / 3]
    assert writer.written == [(1, {"loss": 1.0})]
    assert len(caplog.records) == 1


def test_a_writer_that_cannot_be_made_closes_those_before_it(tmp_path):
    def none():
        raise UserError("no such writer")

    with pytest.raises(UserError, match="no such writer"):
        MetricsLog(tmp_path, 0, [none])
    MetricsLog(tmp_path, 0).close()
