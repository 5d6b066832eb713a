"""The benchmarks' measuring, held to fake cases, and a tiny run. Times of ours are not checked: here they are noise."""

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import compilation
from support.arrays import normal
from support.compilation import quick_jit
from support.project import ROOT

from benchmarks import baselines, measure, steps
from configs import default, quickstart
from wavelet_jax.attention import attention
from wavelet_jax.errors import UserError
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.positions import make


def fake_cases(calls: list[str]) -> dict:
    return {name: lambda name=name: calls.append(name) for name in ("a", "b", "c", "d")}


def test_every_case_runs_once_a_round_after_its_warmups():
    calls = []
    times = measure.in_turn(fake_cases(calls), rounds=8, warmups=3)
    assert sorted(calls[:12]) == sorted("abcd" * 3)
    turns = [tuple(calls[start : start + 4]) for start in range(12, len(calls), 4)]
    assert len(turns) == 8
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len(set(turns)) > 4, "the order must change: else a case always follows the same one"
    assert {name: seconds.shape for name, seconds in times.items()} == dict.fromkeys("abcd", (8,))


def test_time_goes_to_the_case_that_took_it():
    times = measure.in_turn({"still": lambda: None, "sleeps": lambda: time.sleep(0.02)}, rounds=3, warmups=0)
    assert (times["sleeps"] >= 0.02).all()
    assert times["still"].min() < 0.02


def test_ratios_are_taken_round_by_round():
    # A machine that gets slower: each round's ratio is 2, 3, 4, while the ratio of medians is 30 / 100.
    times = {"base": np.array([1.0, 100.0, 1000.0]), "case": np.array([2.0, 300.0, 4000.0])}
    assert measure.ratios(times, "base") == {"base": (1.0, 1.0, 1.0), "case": (2.5, 3.0, 3.5)}
    with pytest.raises(UserError, match="did you mean 'base'"):
        measure.ratios(times, "bass")


@pytest.mark.parametrize(
    ("cases", "rounds", "said"), [({}, 1, "no case"), ({"a": lambda: None}, 0, "rounds must be at least 1, not 0")]
)
def test_nothing_to_measure_is_said(cases, rounds, said):
    with pytest.raises(UserError, match=said):
        measure.in_turn(cases, rounds)


def test_results_come_back_from_their_file(tmp_path):
    path = tmp_path / "new" / "results.json"
    times = np.array([0.5, 0.25])
    measure.write_results(path, {"environment": measure.environment(), "times": {"a": times, "n": np.float32(2)}})
    back = json.loads(path.read_text())
    assert back["times"] == {"a": [0.5, 0.25], "n": 2.0}
    assert back["environment"].keys() >= {"device", "cpu", "threads", "versions", "date", "command"}
    assert back["environment"]["versions"].keys() >= {"jax", "jaxlib", "flax", "numpy"}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def small_shape(method: str):
    """The quickstart model's kind, small; float32."""
    config = quickstart.get_config(method)
    config.model.update(num_layers=2, d_model=24, num_heads=4, num_kv_heads=4, head_dim=8, d_ff=40)
    config.train.update(length=12, batch_size=2)
    return config


def random_params(config) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder of 11 words with every parameter drawn from N(0, 1/fan_in), norms' scales from N(1, 0.04)."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, 11, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(leaf) -> jax.Array:
        mean, std = (1, 0.2) if leaf.ndim == 1 else (0, leaf.shape[0] ** -0.5)
        return jnp.asarray(rng.normal(mean, std, leaf.shape), jnp.float32)

    return graphdef, jax.tree.map(draw, params)


def test_without_attention_no_token_sees_another_and_every_projection_is_still_used():
    """What is cut out for the share is attention and nothing else."""
    graphdef, params = random_params(small_shape("nope"))
    tokens = np.arange(12)[None] % 11
    changed = np.where(np.arange(12) == 3, 7, tokens)

    def logits(params, tokens):
        return nnx.merge(graphdef, params)(tokens)

    def seen_by(logits) -> list[int]:
        compiled = quick_jit(logits)
        return np.flatnonzero(np.abs(compiled(params, tokens) - compiled(params, changed)).max(axis=-1)[0]).tolist()

    with steps.without_attention():
        assert seen_by(lambda params, tokens: logits(params, tokens)) == [3]
        grads = quick_jit(jax.grad(lambda params: jnp.sin(logits(params, tokens)).sum()))(params)
    for path, grad in nnx.to_flat_state(grads):
        assert np.abs(grad[...]).max() > 0, path
    assert seen_by(lambda params, tokens: logits(params, tokens)) == list(range(3, 12)), "attention is back afterwards"


@pytest.mark.filterwarnings("ignore")  # of imports that are not ours
@pytest.mark.parametrize("method", steps.X_TRANSFORMERS_METHODS)
def test_x_transformers_computes_the_same(method):
    """With our parameters x-transformers gives our logits: both steps are of one arithmetic, the ratio is fair."""
    pytest.importorskip("x_transformers")
    torch = pytest.importorskip("torch")
    config = small_shape(method)
    default.set_position(config, layout="interleaved")  # theirs
    graphdef, params = random_params(config)
    decoder = nnx.merge(graphdef, params)
    network = steps.x_transformers_network(config, method, 11)
    # Their norms learn what is added to a scale of 1.
    state = {
        "token_emb.emb.weight": decoder.embedding.embedding[...],
        "attn_layers.final_norm.g": decoder.final_norm.scale[...] - 1,
    }
    for i, block in enumerate(decoder.blocks):
        attend, feed = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        state |= {
            f"{attend}.0.0.g": block.attention_norm.scale[...] - 1,
            f"{attend}.1.to_q.weight": block.query.kernel[...].T,
            f"{attend}.1.to_k.weight": block.key.kernel[...].T,
            f"{attend}.1.to_v.weight": block.value.kernel[...].T,
            f"{attend}.1.to_out.weight": block.out.kernel[...].T,
            f"{feed}.0.0.g": block.feed_forward_norm.scale[...] - 1,
            f"{feed}.1.ff.0.proj.weight": np.concatenate([block.up.kernel[...], block.gate.kernel[...]], axis=1).T,
            f"{feed}.1.ff.2.weight": block.down.kernel[...].T,
        }
    named = dict(network.named_parameters())
    assert named.keys() == state.keys()  # they have no parameter more: no bias, no positions
    tokens = np.random.default_rng(1).integers(11, size=(2, 12))
    with torch.no_grad():
        for name, value in state.items():
            assert named[name].shape == value.shape
            named[name].copy_(torch.from_numpy(np.array(value)))
        theirs = network(torch.from_numpy(tokens)).numpy()
    ours = quick_jit(lambda params: nnx.merge(graphdef, params)(tokens))(params)
    # Of logits of size 1 to 5. Ours adds 1e-6 to the mean square under a norm's root (0.04 or more here: 1e-5 of it);
    # theirs does not. The rest is float32 in sums of 40.
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_without_x_transformers_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "x_transformers" else object())
    assert steps.x_transformers_obstacle() == "x_transformers not installed (pip install -e '.[bench]')"


BY_COMPILER = (pytest.mark.slow, pytest.mark.filterwarnings("ignore"))  # of PyTorch, which warns of itself


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("plain", "nope"),
        ("tip 1", "wavelet"),
        ("tip 2", "wavelet"),
        ("torch sdpa", "rope"),
        ("torch tip 2", "wavelet"),
        pytest.param("torch flex", "wavelet", marks=BY_COMPILER),
    ],
)
def test_baselines_compute_the_same(name, method):
    """What attention is measured against is attention: else its times mean nothing."""
    length, heads, head_dim = 20, 2, 16
    arrays = [normal(seed, 1, length, heads, head_dim) for seed in range(3)]
    terms = make(method, num_heads=heads, head_dim=head_dim).terms({})
    if name in baselines.JAX:
        theirs = quick_jit(baselines.JAX[name])(*arrays)
    else:
        torch = pytest.importorskip("torch")
        with torch.no_grad():
            run = baselines.TORCH[name](length, head_dim)
            theirs = run(*(torch.from_numpy(x).transpose(1, 2) for x in arrays)).transpose(1, 2).numpy()
    np.testing.assert_allclose(theirs, attention(*arrays, terms, backend="reference"), rtol=0, atol=5e-6)


def run_script(*arguments: str, name: str = "train_step.py") -> subprocess.CompletedProcess:
    # Compiled without optimizations: what is tested here is that all fits together, and no time of it is read.
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *arguments],
        env={**os.environ, "XLA_FLAGS": compilation.FLAGS},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_train_step_from_flags_to_files(tmp_path):
    out = tmp_path / "tiny.json"
    shape = ("--layers=1", "--d_model=16", "--heads=2", "--head_dim=8", "--length=8", "--batch=2")
    ran = run_script(*shape, "--methods=wavelet", "--x_transformers=", "--rounds=1", f"--out={out}")
    assert ran.returncode == 0, ran.stderr
    assert "x-transformers is left out: not asked for" in ran.stdout
    results = json.loads(out.read_text())
    names = ["wavelet", "nope", "no attention"]
    assert list(results["seconds_in_rounds"]) == list(results["parameters"]) == list(results["summary"]) == names
    # 257 embeddings of 16, two norms and the last, four projections, three of the feed-forward (8/3 of 16, up to 48).
    assert set(results["parameters"].values()) == {257 * 16 + 3 * 16 + 4 * 16 * 16 + 3 * 16 * 48}
    [wavelet], [nope], [cut] = (results["seconds_in_rounds"][name] for name in names)
    summary = results["summary"]
    assert summary["wavelet"]["tokens_per_second"] == pytest.approx([16 / wavelet] * 3)
    assert summary["wavelet"]["position_share"] == pytest.approx([1 - nope / wavelet] * 3)
    assert summary["wavelet"]["attention_share"] == pytest.approx([1 - cut / wavelet] * 3)
    assert summary["nope"]["position_share"] == [0, 0, 0]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods=wavlet"], "unknown method of --methods 'wavlet': did you mean 'wavelet'?"),
        (["--x_transformers=t5"], "unknown method of --x_transformers 't5': allowed are rope, alibi, nope"),
        (["--methods=rope", "--head_dim=7"], "rope rotates pairs of dimensions: head_dim 7 must be even"),
        (["--length=0", "--out=results.json"], "--length must be at least 1, not 0"),
        (["--out=results.txt"], "--out takes the name of a .json file, not results.txt"),
    ],
)
def test_bad_flags_are_one_line(arguments, said):
    ran = run_script(*arguments)
    assert ran.returncode == 2
    [line] = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.slow
def test_attention_from_flags_to_files(tmp_path):
    out = tmp_path / "tiny.json"
    shape = ("--lengths=32", "--heads=1", "--head_dim=16", "--passes=forward+backward", "--rounds=1", "--nomemory")
    ran = run_script(*shape, "--baselines=plain", f"--out={out}", name="attention.py")
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["tiled rope", "tiled wavelet", "plain"]
    for row in rows:  # seven products of [32, 32] and [32, 16], half of each; eight arrays of [32, 16] in float32
        seconds = row["seconds"][1]
        assert row["flops_per_second"] == pytest.approx(7 * 32 * 32 * 16 / seconds)
        assert row["bytes_per_second"] == pytest.approx(8 * 32 * 16 * 4 / seconds)
    assert "of bytes/s" in ran.stdout
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_bad_flags_of_attention_are_one_line():
    ran = run_script("--backends=tilde", name="attention.py")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: unknown backend 'tilde': did you mean 'tiled'? allowed are reference")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.slow
def test_gathered_and_in_a_ring_are_what_one_device_computes(tmp_path):
    shape = ("--devices=4", "--length=256", "--heads=2", "--head_dim=16", "--rounds=1")
    ran = run_script(*shape, f"--out={tmp_path / 'sharded.json'}", name="sharded.py")
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "sharded.json").read_text())["rows"]
    errors = [row["largest_error"] for row in rows if row["case"] != "one device"]
    assert len(errors) == 4
    assert max(errors) < 2e-5  # outputs and gradients of size 1 to 10, in float32

    ran = run_script("--methods=alibi", name="sharded.py")
    assert ran.returncode == 2
    assert ran.stderr == "error: the ring carries rotations and constant relative keys, not alibi\n"
