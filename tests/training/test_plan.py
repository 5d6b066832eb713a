"""The plan of a run: its bytes against sums of ours, its advice tried out, and the command."""

import os
import re
import subprocess
import sys

import jax
import pytest
from support.project import ROOT

from configs import smoke
from configs.paper import llama2
from wavelet_jax import positions
from wavelet_jax.errors import UserError
from wavelet_jax.hardware import devices, memory
from wavelet_jax.parallel import sharding
from wavelet_jax.training import plan, steps

GiB = 2**30


def run(*arguments: str, count: int = 1, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", **environment}
    command = [sys.executable, str(ROOT / "train.py"), "--compile_only", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The bytes of arrays are not changed by XLA's optimizations of small programs, which take half of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def planned():
    """A config, its mesh and its usage on one device."""
    config = smoke.get_config("nope")
    config.model.num_layers = 1
    config.train.update(length=128, batch_size=16, logits_chunk=0)
    mesh = sharding.make_mesh(config)
    return config, mesh, plan.compiled(config, 257, mesh)


def test_bytes_on_one_device(planned):
    config, mesh, usage = planned
    _, abstract_state = steps.shapes(config, 257, mesh)
    count = steps.count_parameters(abstract_state.params)
    assert (usage.count, usage.parameters) == (count, 4 * count)
    counters = 2 * 4  # of Adam's bias correction and of the schedule
    assert usage.optimizer == 8 * count + counters
    tokens, counts, metrics = 4 * 16 * 129, 3 * 4, 7 * 4  # updates, those skipped, those skipped in a row
    # Results are pointers beside their arrays, 8 bytes each.
    results = len(jax.tree.leaves(abstract_state)) + 7
    assert tokens + counts + metrics <= usage.other <= tokens + counts + metrics + 8 * (results + 2)
    logits = 4 * 16 * 128 * 257
    assert 2 * logits < usage.temporaries < 100 * logits, "float32 logits and their gradient are there at once"
    assert usage.total == usage.parameters + usage.optimizer + usage.other + usage.temporaries + usage.program


def test_the_table_says_whether_it_fits(planned):
    config, mesh, usage = planned
    text = plan.table(config, 257, mesh, usage, usage.total, "here", 0.5)
    assert "it fits" in text
    assert "257 words), 16 windows of 128 tokens per update" in text
    text = plan.table(config, 257, mesh, usage, usage.total - 2**20, "here", 0.5)
    assert "does not fit: over by 1 MiB" in text


def test_time_is_flops_over_peak(planned, monkeypatch):
    config, mesh, usage = planned
    monkeypatch.setattr(devices, "peak_flops", lambda dtype: (2e9, "a test's"))
    # N: 4 x 32 x 32 and 3 x 32 x 64 in the layer, and the head; 16 windows of 128.
    flops = 6 * (4 * 32 * 32 + 3 * 32 * 64 + 257 * 32) * 16 * 128 + 12 * 32 * 16 * 128 * 129 / 2
    text = plan.table(config, 257, mesh, usage, None, "here", 0.25)
    assert f"{flops:.2e}" in text
    assert f"{flops / 5e8:.3g}  estimated, at 25% of 0.002 TFLOP/s per device (a test's)" in text
    assert f"40 updates would take {40 * flops / 5e8:.3g} s" in text


def test_advice_is_tried(planned):
    """The last line's flags, set anew, give the bytes that the line says, and those fit."""
    config, _, usage = planned
    limit = round(0.88 * usage.total)
    lines = list(plan.remedies(config, 257, usage, limit))
    assert len(lines) == 2
    assert re.match(r"--config.train.logits_chunk=1024: \d+ MiB per device, does not fit \(compiled, \d+ s\)", lines[0])
    flags, said = re.fullmatch(r"(.*): (\d+ MiB) per device, fits \(compiled, \d+ s\)", lines[1]).groups()
    assert flags == "--config.train.logits_chunk=1024 --config.model.remat=block"
    again = config.copy_and_resolve_references()
    again.train.logits_chunk = 1024
    again.model.remat = "block"
    total = plan.compiled(again, 257, sharding.make_mesh(again)).total
    assert said == memory.shown(total)
    assert total <= limit


def test_where_no_change_helps_more_devices_are_estimated(planned):
    config, mesh, _ = planned
    config = config.copy_and_resolve_references()
    config.train.accumulation = 4  # so that a device has 4 windows at a time
    usage = plan.Usage(0, 8 * GiB, 16 * GiB, 0, 8 * GiB, 0, 0.0, 0.0)
    # 24 / n of state and 8 / n of the rest, as long as there are windows for all.
    assert plan.more_chips(config, mesh, usage, 8 * GiB).startswith("4 devices")
    assert plan.more_chips(config, mesh, usage, 9 * GiB // 2).startswith("16 devices")  # 24 / 16 + 8 / 4
    assert "up to 64 times as many devices along mesh.fsdp would not" in plan.more_chips(config, mesh, usage, 2 * GiB)


def test_what_the_compiler_says_when_it_finds_no_room():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity "
        "by 4.75G."
    )
    assert plan.needed_by(message) == 20.5 * GiB
    assert plan.needed_by("INTERNAL: no such thing") is None


def test_vocabulary():
    config = smoke.get_config()
    assert plan.vocabulary(config) == 257
    assert plan.vocabulary(llama2.get_config("wavelet")) == 32000
    config.data.update(tokenizer="word", vocab_size=0)
    with pytest.raises(UserError, match=r"leaves the size of the word vocabulary to the text.*give --vocab_size"):
        plan.vocabulary(config)


def test_the_command_on_a_mesh_of_eight_devices(tmp_path):
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]
    flags = [f"--workdir={tmp_path}/run", f"--config.data.cache_dir={tmp_path}/cache", "--config.model.d_model=256"]
    ran = run(f"--config={ROOT}/configs/smoke.py:rope", *mesh, *flags, count=8)
    assert ran.returncode == 0, ran.stderr
    assert "8 x cpu, mesh data 1 x fsdp 4 x context 1 x tensor 2" in ran.stdout
    # In two layers 4 projections of 256 x 32 and 3 of 256 x 64, split 8 ways, as is the embedding; 5 norms are whole.
    held = 4 * ((2 * (4 * 256 * 32 + 3 * 256 * 64) + 257 * 256) // 8 + 5 * 256)
    assert re.search(rf"parameters +{held / 2**20:,.0f} MiB", ran.stdout)
    assert "it fits" in ran.stdout
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nocompile_only", "--topology=v5e:2x2"], "--topology goes with --compile_only"),
        (["--config.mesh.data=3"], "takes 3 devices; there are 1"),
    ],
)
def test_bad_flags_are_one_line(arguments, said, tmp_path):
    ran = run(f"--config={ROOT}/configs/smoke.py:rope", f"--workdir={tmp_path}/run", *arguments)
    assert ran.returncode == 2
    [line] = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("utilization", 0.0, "--utilization must be above 0 and at most 1, not 0.0"),
        ("utilization", 40.0, "at most 1, not 40.0"),
        *(("utilization", value, f"at most 1, not {value}") for value in (-1.0, 1e9, float("nan"), float("inf"))),
        ("vocab_size", -1, "--vocab_size must be at least 1, not -1"),
        ("vocab_size", 0, "--vocab_size must be at least 1, not 0"),
    ],
)
def test_bad_values(flag, value, said):
    with pytest.raises(UserError, match=said):
        plan.show([smoke.get_config()], **{flag: value})


def test_a_batch_that_cannot_be_cut_is_refused():
    config = smoke.get_config()
    config.train.accumulation = 3
    with pytest.raises(
        UserError, match=r"train.batch_size 8 must be a multiple of 3: train.accumulation 3 x mesh data 1"
    ):
        sharding.check_batch(config, sharding.make_mesh(config))


@pytest.mark.parametrize("method", positions.METHODS)
@pytest.mark.parametrize(("suffix", "length"), [("", 4096), ("_32k", 32768)])
def test_every_variant_of_the_paper_s_config_builds_its_shapes(method, suffix, length):
    config = llama2.get_config(method + suffix)
    assert (config.position.method, config.train.length) == (method, length)
    assert "max_positions" not in config.position or config.position.max_positions == length
    config.model.num_layers = 1
    config.mesh.tensor = 1
    _, abstract_state = steps.shapes(config, 32000, sharding.make_mesh(config))
    assert abstract_state.params["head"]["kernel"].shape == (4096, 32000)


@pytest.mark.parametrize("name", ["", "v5e", "v5e:16x16x3", "v5e:", "v6e:2x2x1", "16x16", "v5p:4x4x4 "])
def test_names_that_no_slice_has(name):
    with pytest.raises(UserError, match=f"--topology={name} is not a slice .*there are v5e:16x16, v5p:4x4x4"):
        devices.topology(name)


def test_without_libtpu_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu: pip install 'wavelet-jax\[tpu\]'"):
        devices.topology("v5e:2x2")


@pytest.mark.slow
def test_the_command_for_a_pod_that_is_not_there(tmp_path):
    """Through the TPU's own compiler, which needs libtpu (the extra `tpu`) and no TPU."""
    pytest.importorskip("libtpu")
    config = [f"--config={ROOT}/configs/smoke.py:wavelet", "--config.model.dtype=bfloat16", f"--workdir={tmp_path}/run"]
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    ran = run(*config, *mesh, "--topology=v5e:2x2")
    assert ran.returncode == 0, ran.stderr
    assert "v5e:2x2: 4 x TPU v5 lite, mesh data 1 x fsdp 2 x context 1 x tensor 2" in ran.stdout
    assert "at 40% of 197 TFLOP/s per device" in ran.stdout
    assert "it fits" in ran.stdout

    # Logits of 2^24 tokens at once are far more than a chip holds: in chunks it fits.
    large = ["--config.train.batch_size=4096", "--config.train.length=4096", "--config.train.logits_chunk=0"]
    ran = run(*config, *mesh, *large, "--topology=v5e:2x2")
    assert ran.returncode == 0, ran.stderr
    assert "does not fit: over by" in ran.stdout
    assert re.search(r"train.logits_chunk=2048.*: .* per device, ", ran.stdout)
    assert not list(tmp_path.iterdir())

    ran = run(*config, "--topology=v5e:many")
    assert ran.returncode == 2
    assert "error: --topology=v5e:many is not a slice" in ran.stderr
