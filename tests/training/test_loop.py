"""The training loop as a function: from a notebook, from a wheel, from the parameters of another run."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from support.project import ROOT

from wavelet_jax.errors import UserError
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import checkpoint, directory, stopping
from wavelet_jax.runs.metrics import read_metrics
from wavelet_jax.training import loop, steps


@pytest.fixture
def config(small_config):
    return prepared(small_config)


def prepared(small_config, method: str = "wavelet", **model):
    config = small_config(method)
    config.model.update(num_layers=1, **model)
    config.train.update(steps=3, batch_size=4)
    config.log.every, config.eval.every, config.checkpoint.every = 1, 0, 3
    return config


def params_of(workdir, config) -> dict[str, np.ndarray]:
    mesh = sharding.make_mesh(config)
    abstract = steps.shapes(config, 257, mesh)[1].params
    params, _ = checkpoint.restore_params(workdir, abstract, fingerprint=None)
    return {sharding.path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def drawn(config) -> dict[str, np.ndarray]:
    _, state, _ = steps.init(config, 257, sharding.make_mesh(config))
    return {
        sharding.path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }


class GuardFromTheThird(stopping.NoStop):
    """Disallows implicit transfers, in every thread, when two updates and what they compile are done."""

    def __init__(self):
        super().__init__()
        self.updates = 0

    def requested(self) -> bool:
        self.updates += 1
        if self.updates == 3:  # before the metrics and the checkpoint of the third
            jax.config.update("jax_transfer_guard", "disallow")
        return False


def test_updates_move_nothing_between_host_and_devices_by_themselves(config, tmp_path):
    """Batches are put on the devices, and metrics are fetched, by calls that say so."""
    config.train.steps, config.eval.every, config.checkpoint.every = 6, 1, 2
    try:
        loop.train(config, tmp_path / "run", GuardFromTheThird())
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
        jax.numpy.zeros(3) + np.ones(3)  # the guard guards, on a CPU too


def test_a_run_that_resumes_holds_one_state(config, tmp_path, monkeypatch):
    """Nothing is drawn where a checkpoint is restored: two states may not fit."""
    config.train.steps = 2
    loop.train(config, tmp_path / "run")
    monkeypatch.setattr(steps, "draw", lambda *arguments: pytest.fail("a second state was drawn"))
    config.train.steps = 3
    loop.train(config, tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run")][-1] == 3


def test_norms_are_those_of_parameters_and_updates(config, tmp_path):
    """The last update's, from parameters saved before and after it."""
    config.train.steps = 2
    loop.train(config, tmp_path / "run")
    before = params_of(tmp_path / "run", config)
    config.train.steps = 3
    loop.train(config, tmp_path / "run")
    after = params_of(tmp_path / "run", config)
    line = read_metrics(tmp_path / "run")[-1]

    def norm(arrays) -> float:
        return float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in arrays)))

    assert line["param_norm"] == pytest.approx(norm(after.values()), rel=1e-6)
    # A difference of parameters has lost the digits that adding an update to them rounds away.
    assert line["update_norm"] == pytest.approx(norm(after[path] - before[path] for path in after), rel=1e-3)


# -- the parameters of another run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(small_config, tmp_path_factory):
    """(directory, config) of a finished wavelet run."""
    workdir, config = tmp_path_factory.mktemp("other") / "run", prepared(small_config)
    loop.train(config, workdir)
    return workdir, config


@pytest.mark.parametrize("method", ["wavelet", "t5", "rope"])
def test_a_run_begins_with_the_parameters_of_another(other, small_config, tmp_path, method, caplog):
    """Of another length and position method too, whose own parameters are drawn from the seed."""
    workdir, theirs = other
    config = prepared(small_config, method)
    config.train.update(init_from=str(workdir), length=32, model_seed=5)
    config.optimizer.update(learning_rate=1e-30, weight_decay=0.0)  # updates that round away
    loop.train(config, tmp_path / "run")
    ours, expected, fresh = params_of(tmp_path / "run", config), params_of(workdir, theirs), drawn(config)
    assert expected.keys() <= ours.keys()
    for path, array in ours.items():
        np.testing.assert_allclose(array, expected[path] if path in expected else fresh[path], rtol=1e-6, atol=1e-20)
    assert set(ours) - set(expected) == ({"position/bias"} if method == "t5" else set())
    (said,) = (record.getMessage() for record in caplog.records if "parameters are those of" in record.getMessage())
    assert f"{workdir} at update 3" in said
    assert ("drawn afresh: position/bias" in said) == (method == "t5")


def test_a_checkpoint_of_its_own_goes_before_another_run(other, config, tmp_path):
    config.train.update(init_from=str(other[0]), model_seed=5)
    config.train.steps = 2
    loop.train(config, tmp_path / "run")
    config.train.steps = 3
    loop.train(config, tmp_path / "run")
    config.train.init_from = str(other[0])
    loop.train(config, tmp_path / "whole")
    cut, whole = (read_metrics(tmp_path / name) for name in ("run", "whole"))
    assert [line["loss"] for line in cut] == [line["loss"] for line in whole]


@pytest.mark.parametrize(("first", "then"), [("never", "always"), ("always", "never")])
def test_a_checkpoint_of_one_form_of_layers_is_read_by_the_other(config, tmp_path, first, then):
    """Resumed with the optimizer's moments, started from by another run, and evaluated."""
    config.model.update(num_layers=3, scan_layers=first)
    config.train.steps = 4
    loop.train(config, tmp_path / "whole")
    config.train.steps = 2
    loop.train(config, tmp_path / "run")
    config.model.scan_layers, config.train.steps = then, 4
    loop.train(config, tmp_path / "run")
    cut, whole = (np.array([line["loss"] for line in read_metrics(tmp_path / name)]) for name in ("run", "whole"))
    assert len(cut) == 4
    np.testing.assert_allclose(cut, whole, rtol=1e-5)
    assert (cut[:2] == whole[:2]).all()

    params = params_of(tmp_path / "run", config)
    other = prepared_like(config, scan_layers=first)
    for path, array in layers_apart(params_of(tmp_path / "run", other)).items():
        np.testing.assert_array_equal(array, layers_apart(params)[path])
    other.train.init_from = str(tmp_path / "run")
    other.train.steps = 1
    loop.train(other, tmp_path / "from_it")
    assert abs(read_metrics(tmp_path / "from_it")[0]["loss"] - cut[-1]) < abs(whole[0] - cut[-1])


def prepared_like(config, **model):
    copy = config.copy_and_resolve_references()
    copy.model.update(model)
    return copy


def layers_apart(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by path, those of a stack under the paths that they have in a list."""
    apart = {}
    for path, array in params.items():
        if path.startswith("layers/"):
            apart |= {f"blocks/{layer}/{path.removeprefix('layers/')}": array[layer] for layer in range(len(array))}
        else:
            apart[path] = array
    return apart


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.d_ff": 96}, r"is another model: blocks/0/\w+/kernel is \[\d+, \d+\] there and .* here"),
        ({"model.num_layers": 2}, r"is another model: blocks/1/.* is absent there and .* here"),
        ({"model.use_bias": True}, r"is another model: .*bias is absent there"),
        (
            {"data.tokenizer": "word"},
            r"has another tokenizer \(byte, vocab_size 0\) than this run \(word, vocab_size 0\)",
        ),
    ],
)
def test_another_model_is_refused_before_anything_is_trained(other, config, tmp_path, changes, said):
    config.train.init_from = str(other[0])
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=said):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_is_none_is_named(config, tmp_path):
    config.train.init_from = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"nothing holds no run \(no config.json\)"):
        loop.train(config, tmp_path / "run")
    directory.save_config(tmp_path / "untrained", config)
    config.train.init_from = str(tmp_path / "untrained")
    with pytest.raises(UserError, match="untrained has no checkpoint"):
        loop.train(config, tmp_path / "run")


# -- from a wheel ----------------------------------------------------------------------------------------------------


def test_a_wheel_trains(tmp_path, text_files):
    """Built from this checkout, unpacked elsewhere, and used without it."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"  # a build leaves files in the folder that it builds
    shutil.copytree(ROOT / "wavelet_jax", source / "wavelet_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True, cwd=tmp_path)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    shutil.copy(ROOT / "tests" / "programs" / "train_two_updates.py", tmp_path)
    variables = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "train_two_updates.py", f"{text_files}/*.txt"]
    out = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == f"{site}/wavelet_jax/__init__.py"
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [2]
