"""Runs of version 1 of the config: `version_1/` holds the config.json and the losses of a real one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.project import ROOT

from configs import smoke
from wavelet_jax import positions
from wavelet_jax.config.upgrade import VERSION, upgrade
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate
from wavelet_jax.runs import directory, stopping
from wavelet_jax.runs.metrics import read_metrics
from wavelet_jax.training import loop

OLD = ROOT / "tests" / "runs" / "version_1"


@pytest.fixture
def config(text_files, tmp_path, monkeypatch):
    """The same run, as today's configs say it."""
    shutil.copytree(text_files, tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    config = smoke.get_config("wavelet")
    config.data.update(source="text", train_files="text/*.txt", validation_fraction=0.2, cache_dir="cache")
    config.model.num_layers = 1
    config.train.update(steps=12, model_seed=7)
    config.data.seed = 7
    config.log.every, config.checkpoint.every, config.eval.every = 1, 6, 6
    return config


def train(config, workdir: Path) -> None:
    with stopping.listen() as stop:
        loop.train(config, workdir, stop)


def test_an_old_run_goes_on_to_its_losses_and_is_evaluated(config, tmp_path):
    workdir = tmp_path / "run"
    config.train.steps = 6
    train(config, workdir)
    shutil.copy(OLD / "config.json", workdir)
    config.train.steps = 12
    train(config, workdir)
    shutil.copy(OLD / "config.json", workdir)  # an evaluation reads it too
    for ours, theirs in zip(read_metrics(workdir), read_metrics(OLD), strict=True):
        shared = {key: ours[key] for key in theirs}
        assert shared == pytest.approx(theirs, rel=1e-5)  # another processor may add up in another order
    (curve,) = evaluate.evaluate([workdir], lengths=[64], protocol="full_length", out=tmp_path / "out")
    assert np.isfinite(curve.losses).all()


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("position", "mother", "haar", r"position\.mother \(haar there, ricker here\)"),
        ("train", "seed", 8, r"data\.seed \(8 there, 7 here\), train\.model_seed \(8 there, 7 here\)"),
        ("position", "theta", 3.0, None),
        ("position", "clip_distance", 3, None),
        ("position", "d_model", 64, None),
    ],
)
def test_only_the_options_of_its_own_method_keep_a_run_from_going_on(config, tmp_path, section, key, value, said):
    tree = json.loads((OLD / "config.json").read_text())
    tree[section][key] = value
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(tree))
    if said is None:
        directory.check_config(tmp_path / "run", config)
    else:
        with pytest.raises(UserError, match=f"another config: {said}; use another"):
            directory.check_config(tmp_path / "run", config)


def test_a_run_of_another_method_is_named_by_its_method_alone(config, tmp_path):
    directory.save_config(tmp_path / "run", smoke.get_config("t5"))
    with pytest.raises(UserError, match=r"position\.method \(t5 there, wavelet here\)") as refused:
        directory.check_config(tmp_path / "run", config)
    assert "num_buckets" not in str(refused.value)
    assert "mother" not in str(refused.value)


@pytest.mark.parametrize("method", positions.METHODS)
def test_every_method_of_an_old_run_keeps_its_options(method):
    tree = json.loads((OLD / "config.json").read_text())
    before = json.dumps(tree)
    tree["position"]["method"] = method
    tree["position"]["later"] = 1  # unknown keys are for the reader to name
    after = upgrade(tree)
    tree["position"].pop("later")
    assert after["config_version"] == VERSION
    assert after["model"] == {"precision": "default", "scan_layers": "never", **tree["model"]}
    assert after["position"].keys() == {*positions.config(method), "later"}
    assert all(after["position"][key] == tree["position"][key] for key in positions.config(method))
    assert "seed" not in after["train"]
    assert upgrade(after) == after
    tree["position"]["method"] = "wavelet"
    assert json.dumps(tree) == before  # the argument is not changed
