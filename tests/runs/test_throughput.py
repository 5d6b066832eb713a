"""What the sums of a run say: FLOPs against a count of the program's products, seconds against a clock of ours."""

import re
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import compilation

from configs import smoke
from configs.paper import llama2
from wavelet_jax.errors import UserError
from wavelet_jax.hardware import devices
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import profiling, throughput
from wavelet_jax.training import steps


def products(jaxpr) -> int:
    """FLOPs of all matrix products of a jaxpr: two for each term of each sum. Loops are not expected."""
    total = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("scan", "while"), equation.primitive
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            terms = np.prod([equation.invars[0].aval.shape[axis] for axis in summed], dtype=int)
            total += 2 * int(terms) * equation.outvars[0].aval.size
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "relu", "tied_head": False},
        {"num_heads": 6, "num_kv_heads": 2, "num_layers": 1},
    ],
)
def test_model_flops_are_the_products_of_the_train_step(changes):
    """With no loop and no position term all products are the model's; the definition computes the hidden half too."""
    config = smoke.get_config("nope")
    config.model.update(attention_backend="reference", **changes)
    config.train.update(length=24, batch_size=3, logits_chunk=0)
    vocab_size = 50
    graphdef, abstract_state = steps.shapes(config, vocab_size, sharding.make_mesh(config))
    tokens = jax.ShapeDtypeStruct((1, 3, 25), jnp.int32)
    step = jax.make_jaxpr(steps.make_train_step(config, graphdef))(abstract_state, tokens)
    a_pair = 12 * config.model.num_layers * config.model.num_heads * config.model.head_dim
    hidden = 3 * (24 * 24 - 24 * 25 // 2)
    assert products(step.jaxpr) == throughput.update_flops(config, vocab_size) + a_pair * hidden


def test_parameters_of_llama_2_7b():
    """6,738,415,616 is what Meta's model of this shape has. Norms and looked-up embeddings are no products."""
    config = llama2.get_config("wavelet")
    counts = []
    for layers in (1, 2):  # the others are alike, and 32 take long
        config.model.num_layers = layers
        _, abstract_state = steps.shapes(config, 32000, sharding.make_mesh(config))
        counts.append(steps.count_parameters(abstract_state.params))
    count = counts[0] + 31 * (counts[1] - counts[0])
    assert count == 6_738_415_616
    config.model.num_layers = 32
    assert throughput.matrix_parameters(config, 32000) == count - 32000 * 4096 - (2 * 32 + 1) * 4096


class Result:
    """An array that is not there yet."""

    def __init__(self):
        self.there = threading.Event()

    def block_until_ready(self):
        assert self.there.wait(10)
        return self


def test_seconds_go_where_they_went():
    now = 0.0
    meter = throughput.Meter(tokens=100, flops=50.0, peak=10.0, clock=lambda: now)
    results = []

    def update():
        results.append(Result())
        meter.updated(results[-1])

    def done():
        for result in results:
            result.there.set()
        assert meter._last.exception(timeout=60) is None

    function = SimpleNamespace(lower=lambda *args: SimpleNamespace(compile=compile_in_3))

    def compile_in_3():
        nonlocal now
        now += 3
        return lambda x: x + 1

    step = meter.compiled(function)
    with meter.input():
        now = 2.0  # nothing runs yet: lost
    assert step(1) == 2
    update()
    with meter.input():
        now = 7.0
        done()
        now = 9.0  # two seconds of the four are lost
    assert step(2) == 3, "compiled once"
    update()
    with meter.input():
        now = 10.0  # the devices are busy
    update()
    now = 14.0
    done()
    with meter.pause("validation"):
        now = 15.0
        meter.compiled(function)(0)
        now += 2
    now = 20.0
    line = meter.line()
    assert {name: line[f"{name}_share"] * 20 for name in throughput.LOST} == {
        "input": 4,
        "checkpoint": 0,
        "validation": 3,
        "compile": 6,
    }
    assert meter.spent() == {"updates": 7, "input": 4, "checkpoint": 0, "validation": 3, "compile": 6}
    assert line["tokens_per_second"] == pytest.approx(3 * 100 / 11)
    assert line["mfu"] == pytest.approx(3 * 50 / 11 / 10)

    with meter.pause("checkpoint"):
        now = 21.0
    assert meter.spent() == {"updates": 7, "input": 4, "checkpoint": 1, "validation": 3, "compile": 6}
    with meter.input():
        now = 22.0  # since the checkpoint nothing runs
    update()
    now = 24.0
    done()
    line = meter.line()
    assert (line["checkpoint_share"], line["input_share"], line["compile_share"]) == (0.25, 0.25, 0)
    assert line["tokens_per_second"] == pytest.approx(100 / 3)
    meter.close()


def test_an_update_that_fails_is_the_loop_s_to_see():
    class Broken:
        def block_until_ready(self):
            raise RuntimeError("no memory")

    meter = throughput.Meter(tokens=1, flops=1.0, peak=1.0)
    meter.updated(Broken())
    assert meter._last.exception(timeout=60) is not None
    with meter.input():
        pass
    assert meter.line()["input_share"] == 0
    meter.close()


def test_peaks(monkeypatch):
    devices.peak_flops.cache_clear()
    measured, said = devices.peak_flops("float32")
    assert "measured" in said
    run, flops = devices.matrix_product("float32", 1024)
    run()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    assert flops == 2 * 1024**3
    # Of the same order, on a machine with other work.
    assert flops / min(seconds) / 20 < measured < 100 * flops / min(seconds)
    assert devices.total_flops("float32") == measured, "a machine's CPU is one"

    devices.peak_flops.cache_clear()
    chip = SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")
    with devices.compiled_for([chip] * 4):
        assert devices.platform() == "tpu"
        assert devices.total_flops("bfloat16") == 4 * 197e12
    devices.peak_flops.cache_clear()
    assert devices.count() == jax.device_count()


# -- labels and traces ------------------------------------------------------------------------------------------------

LABELS = ("embedding", "block_0/attention", "block_0/feed_forward", "final_norm", "head", "loss", "optimizer")


@pytest.fixture(scope="module")
def program():
    """The compiled train step of the smoke model, with its state and a batch."""
    config = smoke.get_config("wavelet")
    config.model.num_layers = 1
    config.train.update(length=32, batch_size=4)
    mesh = sharding.make_mesh(config)
    graphdef, abstract_state = steps.shapes(config, 257, mesh)
    state = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding), abstract_state)
    tokens = jax.device_put(np.zeros((1, 4, 33), np.int32), sharding.batch_sharding(mesh, leading=1))
    lowered = steps.jit_train_step(config, graphdef, abstract_state, mesh).lower(state, tokens)
    return lowered.compile(compilation.OPTIONS), state, tokens


def test_the_compiled_step_has_the_labels_of_its_parts(program):
    instructions = [line for line in program[0].as_text().splitlines() if "op_name=" in line]
    found = [re.search(r'op_name="([^"]*)"', line).group(1) for line in instructions]
    names = [re.sub(r"jit\(one_layer\)/|jvp\(|\)", "", name) for name in found]
    # of jit(train_step)/transpose(jvp(block_0))/jit(one_layer)/attention/..
    for label in LABELS:
        assert any(label in name for name in names), label
    for label in LABELS[:-1]:
        assert any(f"transpose({label}" in name for name in names), f"the gradient of {label}"
    products = [
        name for line, name in zip(instructions, names, strict=True) if re.search(r"= \S+ (dot|convolution)\(", line)
    ]
    assert len(products) >= 3 * (4 + 3 + 2 + 1), "projections, feed-forward, attention, head: forward and 2 backward"
    assert all(any(label in name for label in ("block_", "head")) for name in products), products


def test_a_trace_holds_the_labels(program, tmp_path):
    step, state, tokens = program
    profile = profiling.Profile(tmp_path / "profile", "2:3", last=3)
    profile.skip_before(first=0)
    for number in (1, 2, 3):
        profile.before(number)
        state, metrics = step(state, tokens)
        profile.after(number, metrics["loss"])
        assert (tmp_path / "profile").exists() == (number == 3)
    profile.close()
    [trace] = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    content = trace.read_bytes()
    for label in LABELS:
        assert re.search(label.replace("/", r"\)*/(jit\(one_layer\)/)?").encode(), content), label


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("5", "START:STOP, the first and the last update to trace, not '5'"),
        ("a:b", "not 'a:b'"),
        ("0:3", "1 <= START <= STOP <= train.steps 40"),
        ("5:4", "1 <= START"),
        ("39:41", "train.steps 40"),
    ],
)
def test_bad_profile_steps(steps, said, tmp_path):
    with pytest.raises(UserError, match=said):
        profiling.Profile(tmp_path, steps, last=40)


def test_a_run_past_the_start_of_its_trace_is_told_and_goes_on(tmp_path, caplog):
    profile = profiling.Profile(tmp_path / "profile", "5:6", last=40)
    profile.skip_before(first=4)
    assert not caplog.messages
    profile.skip_before(first=5)
    assert caplog.messages == ["no trace: --profile_steps starts at update 5, and this run resumes after 5"]
    for step in (5, 6):
        profile.before(step)
        profile.after(step, jax.numpy.zeros(()))
    assert not (tmp_path / "profile").exists()
