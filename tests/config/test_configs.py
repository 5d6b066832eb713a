"""Every key is read, every read key is there, and every config builds its model's shapes."""

import ast
import dataclasses
import importlib
import re

import pytest
from flax import nnx
from support.project import ROOT

from configs import default
from wavelet_jax import positions
from wavelet_jax.config import keys, numeric_keys
from wavelet_jax.errors import UserError
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.runs import directory
from wavelet_jax.training import optimizer, sizes, steps

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def read_keys() -> set[str]:
    """Every `config.section.key` and `config.section["key"]` in the code: functions take the whole config for this."""
    keys = set()
    for path in [ROOT / "train.py", ROOT / "eval.py", *(ROOT / "wavelet_jax").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                match = re.fullmatch(r"(?:.*\.)?_?configs?(?:\[0\])?\.(\w+)\.(\w+)", ast.unparse(node))
                if match:
                    keys.add(".".join(match.groups()))
    return keys


def test_every_key_is_read_and_every_read_key_is_there():
    there = set(keys.json_values(default.get_config()))
    options = {f"position.{option}" for option in default.get_config().position}  # read by the method's class
    read = {key for key in read_keys() if not key.endswith((".update", ".get", ".items", ".unlock"))} | options
    read.add("config_version")  # by `upgrade`, in a saved config
    read |= {"eval.every", "eval.windows"}  # by references of evaluators.validation
    there -= {key for key in there if key.startswith("evaluators.")}  # read section by section, see test_evaluators.py
    assert read - there == set(), "read, but not in wavelet_jax/config/default.py"
    assert there - read == set(), "in wavelet_jax/config/default.py, but nothing reads them"


def test_the_code_never_supplies_a_default():
    for path in [ROOT / "train.py", ROOT / "eval.py", *(ROOT / "wavelet_jax").rglob("*.py")]:
        assert not re.search(r"config(\.\w+)*\.get\(|getattr\(config", path.read_text()), path


def test_every_key_has_a_comment():
    source = (ROOT / "wavelet_jax" / "config" / "default.py").read_text()
    for line in source.splitlines():
        assigned = re.match(
            r"    (data|model|position|train|optimizer|log|checkpoint|eval|mesh|compare)\.(\w+) = ", line
        )
        assert not assigned or "  # " in line, line


@pytest.mark.parametrize("method", positions.METHODS)
def test_a_config_has_the_options_of_its_method_and_no_others(method):
    own = {option: value for option, value in positions.options(method).items() if option != "d_model"}
    assert default.get_config(method).position.to_dict() == {"method": method, **own}


@pytest.mark.parametrize("method", positions.METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_builds_its_shapes(name, method):
    config = importlib.import_module(f"configs.{name}").get_config(method)
    assert config.position.method == method
    assert config.compare.variants == ()
    shapes = nnx.eval_shape(lambda: Decoder(config, 1000, rngs=nnx.Rngs(0)))
    count = steps.count_parameters(nnx.to_pure_dict(nnx.state(shapes)))
    assert count == sum(sizes.parameters(config, 1000).values())
    optimizer.make_optimizer(config)


@pytest.mark.parametrize("name", ["quickstart", "wikitext2"])
def test_without_a_variant_the_main_methods_are_compared(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert config.compare.variants == ("wavelet", "rope", "alibi")
    assert config.compare.lengths[-1] == 16 * config.train.length


@pytest.mark.parametrize("name", CONFIGS)
def test_docstrings_give_the_command(name):
    """A command that reads this file, by default or by its name, with a variant that there is."""
    module = importlib.import_module(f"configs.{name}")
    commands = re.findall(r"^    (python train\.py.*)$", module.__doc__, re.MULTILINE)
    assert commands
    for command in commands:
        named = re.search(r"--config=configs/(\w+)\.py(?::(\w+))?", command)
        assert (named[1] if named else "quickstart") == name
        if named and named[2] and named[2] != "METHOD":
            assert module.get_config(named[2]).position.method == named[2]


def test_decay_follows_the_number_of_steps_and_not_the_other_way():
    config = default.get_config()
    config.train.steps = 77
    assert config.optimizer.decay_steps == 77
    config.optimizer.decay_steps = 50
    assert config.train.steps == 77


def test_saved_config_comes_back(tmp_path):
    config = default.get_config()
    config.position.scales = ((1.0, 2.0), (3.0, 4.0))
    directory.save_config(tmp_path / "run", config)
    again = directory.load_config(tmp_path / "run")
    assert keys.json_values(again) == keys.json_values(config)
    assert again.compare.lengths == config.compare.lengths
    directory.check_config(tmp_path / "run", config)  # the same config: the run goes on


def test_method_options_are_plain_values():
    """Options have to fit in a config: no option's default is an object of ours."""
    for method in positions.METHODS.values():
        for field in dataclasses.fields(method):
            if field.name not in ("num_heads", "head_dim"):
                assert isinstance(field.default, (bool, int, float, str, tuple)), (method, field.name)


def test_importing_the_package_is_light():
    """`import wavelet_jax` and its mathematics load jax and no more: no flax, orbax, grain, matplotlib, pywt."""
    import subprocess
    import sys

    code = (
        "import sys, wavelet_jax, wavelet_jax.wavelets, wavelet_jax.positions, wavelet_jax.attention;"
        "print([m for m in ('flax', 'orbax', 'grain', 'matplotlib', 'ml_collections', 'pywt') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.length", 0, "train.length must be at least 1, not 0"),
        ("optimizer.warmup_steps", -1, "optimizer.warmup_steps must be at least 0, not -1"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate must be at least 0, not nan"),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate must be at least 0 and finite, not inf"),
        ("optimizer.weight_decay", -0.1, "optimizer.weight_decay must be at least 0, not -0.1"),
        ("optimizer.b2", 1.0, "optimizer.b2 must be at least 0 and below 1, not 1.0"),
    ],
)
def test_numbers_that_train_nothing_are_refused(key, value, said):
    config = default.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        numeric_keys.check(config)


def test_a_run_goes_on_with_what_fewer_devices_need_and_nothing_else(tmp_path):
    config = default.get_config()
    directory.save_config(tmp_path, config)
    config.update_from_flattened_dict({"mesh.fsdp": 4, "model.remat": "block", "train.accumulation": 2})
    config.update_from_flattened_dict({"train.logits_chunk": 64, "model.attention_backend": "tiled"})
    directory.check_config(tmp_path, config)
    config.train.batch_size *= 2
    with pytest.raises(UserError, match=r"another config: train\.batch_size"):
        directory.check_config(tmp_path, config)
