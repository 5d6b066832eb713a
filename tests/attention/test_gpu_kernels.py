"""The GPU backends on a machine without a GPU: the Triton kernels in Triton's interpreter against dense attention in
float64, what the compiler makes of them for Ampere and Hopper, and what each backend refuses.

What needs triton is skipped where it is not installed (`pip install -e '.[kernels]'`).
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.arrays import normal
from support.compilation import quick_jit
from support.project import ROOT
from support.tolerances import FLOAT32

from wavelet_jax import positions
from wavelet_jax.attention import attention, choose
from wavelet_jax.attention.call import FAR_TOLERANCE, Call
from wavelet_jax.attention.flash import cudnn, gpu
from wavelet_jax.attention.flash.arrays import prepare
from wavelet_jax.attention.flash.gpu import Blocks, Launch, Sizes
from wavelet_jax.attention.tiled.geometry import TileSizes
from wavelet_jax.errors import UserError

slow = pytest.mark.slow
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


# -- the kernels in Triton's interpreter ----------------------------------------------------------------------------

# So small that short sequences have tiles of all kinds, and blocks that are parts of tiles.
SMALL = TileSizes(rows=32, block=32, band=32, keys=32)
BLOCKS = (Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1))


def interpret(launch: Launch) -> list[jax.Array]:
    """Runs a launch in Triton's interpreter, on the CPU. Outputs begin as NaN: all of them must be written."""
    import torch

    def run(*arrays):
        inputs = [torch.from_numpy(np.array(x)) for x in arrays]
        outputs = [torch.full(x.shape, math.nan, dtype=getattr(torch, np.dtype(x.dtype).name)) for x in launch.outputs]
        from wavelet_jax.attention.flash import gpu_kernels

        kernel = getattr(gpu_kernels, launch.kernel)
        kernel[(launch.programs,)](*inputs, *launch.counts.values(), *outputs, **launch.constants)
        return [x.numpy() for x in outputs]

    return jax.pure_callback(run, launch.outputs, *launch.arrays)


@pytest.fixture
def interpreted(monkeypatch):
    """`attention(backend="triton_gpu")` in the interpreter, in tiles of a few tokens."""
    pytest.importorskip("triton", minversion="3.8")  # before, its interpreter fails with NumPy 2.4
    pytest.importorskip("torch")
    sizes = {(90, size, 256): Sizes(SMALL, *BLOCKS) for size in (2, 4)}
    monkeypatch.setattr(gpu, "SIZES", sizes)
    with gpu.launching(interpret, 90):
        yield


def dense(query, key, value, cotangent, table, visible) -> dict[str, np.ndarray]:
    """Attention and its gradients in float64 for one batch entry, from Eq. (10) and the chain rule.

    Args:
      query, cotangent: [T, H, D]; key, value: [S, K, D].
      table: relative keys, [T, S, D], or None.
      visible: [T, S].
    """
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    H, D = query.shape[1:]
    S, K, _ = key.shape
    of = np.arange(H) * K // H  # the key head of each query head
    scores = np.einsum("thd,shd->hts", query, key[:, of])
    if table is not None:
        scores += np.einsum("thd,tsd->hts", query, table)
    scores = np.where(visible, scores / math.sqrt(D), -np.inf)
    highest = np.max(scores, axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    out = np.einsum("hts,shd->thd", weights, value[:, of])
    d_weights = np.einsum("thd,shd->hts", cotangent, value[:, of])
    d_scores = weights * (d_weights - np.sum(weights * d_weights, axis=-1, keepdims=True)) / math.sqrt(D)
    d_query = np.einsum("hts,shd->thd", d_scores, key[:, of])
    if table is not None:
        d_query += np.einsum("hts,tsd->thd", d_scores, table)
    by_head = np.einsum("hts,thd->shd", d_scores, query), np.einsum("hts,thd->shd", weights, cotangent)
    d_key, d_value = (x.reshape(S, K, H // K, D).sum(axis=2) for x in by_head)
    return {"out": out, "query": d_query, "key": d_key, "value": d_value}


# (T, S, position of query 0, causal, head_dim, dtype, wavelets): wavelets of scales 2^0 .. 2^3, whose support of 40
# tokens ends within the sequences, so that runs of all five kinds occur.
CASES = {
    "causal": (150, 150, 0, True, 16, "float32", True),
    "bidirectional": (190, 140, -20, False, 16, "float32", True),
    "chunk of a cache": (70, 230, 150, True, 16, "float16", True),
    "plain": (100, 100, 0, True, 16, "float16", False),
}
SLOW_CASES = {
    "padded heads": (100, 100, 0, True, 40, "float32", True),
    "plain, bidirectional": (70, 110, 0, False, 16, "float32", False),
    "plain, unaligned cache": (50, 130, 73, True, 16, "float32", False),
    "bidirectional, both ends far": (64, 260, 100, False, 16, "float16", True),
    "before all keys": (40, 40, -50, True, 16, "float32", True),
    "queries before some keys": (60, 60, -25, True, 16, "float32", True),
    "after all keys": (40, 70, 2**31 - 60, True, 16, "float32", True),
}
# float16 has 11 bits: 5e-4 of a weight's size, and sums of a few such errors.
TOLERANCE = {"float32": FLOAT32, "float16": 2e-3}


@needs_triton
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=slow) for case in SLOW_CASES)])
def test_kernels_equal_float64(case, interpreted):
    T, S, offset, causal, D, dtype, wavelets = (CASES | SLOW_CASES)[case]
    H, K = 2, 1
    options = {"num_scales": 4} if wavelets else {}
    terms = positions.make("wavelet" if wavelets else "nope", num_heads=H, head_dim=D, **options).terms({})
    query, cotangent = (normal(seed, 1, T, H, D, dtype=dtype) for seed in (0, 3))
    key, value = (normal(seed, 1, S, K, D, dtype=dtype) for seed in (1, 2))

    @quick_jit
    def run(query, key, value):
        def output(*arrays):
            places = {"query_positions": offset, "key_positions": 0}
            return attention(*arrays, terms, causal=causal, backend="triton_gpu", **places)

        out, pull = jax.vjp(output, query, key, value)
        return dict(zip(("out", "query", "key", "value"), (out, *pull(cotangent)), strict=True))

    distance = offset + np.arange(T)[:, None] - np.arange(S)
    table = None
    if wavelets:
        scales, shifts = oracle.grid(D, 4)
        occurring, where = np.unique(distance, return_inverse=True)
        vectors = np.stack([oracle.wavelet_vector(int(t), scales, shifts) for t in occurring])
        table = vectors[where].reshape(T, S, D)
    expected = dense(query[0], key[0], value[0], cotangent[0], table, (distance >= 0) | (not causal))
    for name, got in run(query, key, value).items():
        wanted = expected[name]
        error = np.max(np.abs(np.float64(got[0]) - wanted)) / max(np.max(np.abs(wanted)), 1e-3)
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e} of its size"


def test_cases_have_runs_of_all_kinds():
    """Else the test above would pass without the far form: tiles before, within and after the wavelets' reach."""
    seen = set()
    for T, S, offset, causal, D, dtype, wavelets in CASES.values():
        terms = positions.make("wavelet", num_heads=2, head_dim=D, num_scales=4).terms({})
        if wavelets:
            call = Call(terms, T, S, 2, 1, D, jnp.dtype(dtype), offset, causal=causal)
            layout = prepare(call, SMALL).layout
            for i in range(layout.row_tiles):
                for j in range(layout.end(i)):
                    kind = "near" if layout.is_near(i, j) else "far" if layout.is_far(i, j) else "plain"
                    seen.add((kind, "after" if j > layout.own(i) else "before"))
    assert seen >= {(kind, side) for kind in ("far", "plain") for side in ("before", "after")} | {("near", "before")}


def test_a_mapped_axis_is_more_batch():
    """Of all arrays or of some, and of two axes at once. A callback has no rule of its own for it either."""

    def alone(arrays, z):
        def run(x, z):
            assert x.ndim == z.ndim == 2
            return np.cumsum(x, axis=1) * z

        x, nothing = arrays
        return jax.pure_callback(run, jax.ShapeDtypeStruct(x.shape, x.dtype), x, z), nothing

    x, z = normal(0, 3, 4, 2, 5), normal(1, 4, 2, 5)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(alone, in_axes=((0, None), None))((x[:, 0], None), z[0])
    folded = gpu.folding(alone)
    some = jax.vmap(folded, in_axes=((0, None), None))
    out, nothing = quick_jit(jax.vmap(some, in_axes=((1, None), 0)))((x, None), z)
    assert nothing is None
    np.testing.assert_allclose(out, np.cumsum(x, axis=3).swapaxes(0, 1) * z[:, None], rtol=1e-6)


def test_launches_of_a_mapped_call_are_those_of_a_larger_batch():
    launches = []

    def stand_in(launch: Launch) -> list[jax.Array]:
        launches.append((launch.kernel, launch.arrays[0].shape[0], launch.programs))
        return jax.pure_callback(
            lambda *_: [np.zeros(x.shape, x.dtype) for x in launch.outputs], launch.outputs, *launch.arrays
        )

    terms = positions.make("wavelet", num_heads=2, head_dim=16).terms({})

    def gradients(*x):
        return jax.vjp(lambda *x: attention(*x, terms, backend="triton_gpu"), *x)[1](x[0])

    def launched(function, *shape: int) -> set:
        launches.clear()
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        out = jax.eval_shape(function, x, x, x)
        assert [x.shape for x in out] == [shape] * 3
        return set(launches)

    with gpu.launching(stand_in, 90):
        wanted = launched(gradients, 6, 100, 2, 16)
        assert {name for name, *_ in wanted} == {"forward", "query_gradients", "key_gradients"}
        # It is traced with its own batch too, which nothing computes.
        assert launched(jax.vmap(gradients), 3, 2, 100, 2, 16) >= wanted


# -- the compiler -----------------------------------------------------------------------------------------------------


def test_sizes_fit_together():
    for (arch, _, _), sizes in gpu.SIZES.items():
        assert arch in gpu.CAPABILITIES.values()
        assert sizes.tiles.rows % sizes.tiles.keys == 0
        assert sizes.tiles.band % sizes.tiles.keys == 0
        for blocks in sizes[1:]:
            assert sizes.tiles.rows % blocks.rows == 0
            assert sizes.tiles.keys % blocks.keys == 0
    for arch in gpu.CAPABILITIES.values():
        for dtype in gpu.DTYPES:
            for head_dim in (1, 16, 64, 65, 128, 256):
                assert gpu._sizes(arch, jnp.dtype(dtype), head_dim)


def outside(*command: str) -> str:
    """Standard output of a Python process in which triton compiles, and does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# Bytes of registers that a thread may spill, loads and stores of the whole program: float32 products in three parts
# hold their operands several times.
MOST_SPILLS = {"bfloat16": 0, "float32": 1024}


@slow
@needs_triton
@pytest.mark.parametrize("dtype", MOST_SPILLS)
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_kernels_fit_the_gpu(arch, dtype):
    """For heads of 128; `python tests/programs/gpu_resources.py` says it of every entry of the table."""
    from programs import gpu_resources

    said = outside("tests/programs/gpu_resources.py", f"--arch={arch}", f"--dtype={dtype}", "--head_dim=128")
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["kernel"] for row in rows] == ["forward", "query_gradients", "key_gradients"]
    for row in rows:
        assert row["spills"] <= MOST_SPILLS[dtype], row
        assert row["shared"] <= gpu_resources.SHARED_LIMIT[arch], row
        assert row["wgmma" if (arch, dtype) == (90, "bfloat16") else "mma"] > 0, row  # on matrix units


@slow
@needs_triton
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin (no GPU)")
def test_a_jitted_program_for_cuda_holds_the_three_kernels():
    pytest.importorskip("jax_triton")
    assert outside("-W", "error", "tests/programs/lower_for_cuda.py").split() == ["3"]


# -- who takes a call ---------------------------------------------------------------------------------------------


def call_of(name: str, options=None, **changes) -> Call:
    method = positions.make(name, num_heads=4, head_dim=64, **(options or {}))
    call = Call(method.terms(method.init(jax.random.key(0))), 1024, 1024, 4, 2, 64, jnp.dtype("bfloat16"), 0)
    return dataclasses.replace(call, **changes)


@pytest.fixture
def on_hopper(monkeypatch):
    """As on a GPU with everything installed; nothing may be computed."""
    monkeypatch.setattr(gpu, "gpu_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.mark.parametrize("backend", ["triton_gpu", "cudnn"])
def test_refused_without_a_gpu(backend):
    x = normal(0, 1, 32, 2, 16, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=f"the {backend} backend needs an NVIDIA GPU .*runs on cpu.*backend='auto'"):
        attention(x, x, x, positions.make("nope", num_heads=2, head_dim=16).terms({}), backend=backend)


def test_triton_says_what_it_cannot_carry(on_hopper, monkeypatch):
    def needs(*arguments, **changes) -> str:
        return " and ".join(gpu.unsupported(call_of(*arguments, **changes)))

    assert needs("wavelet") == needs("rope") == needs("wavelet", head_dim=48) == ""
    assert "float16 or bfloat16 or float32" in needs("rope", dtype=jnp.dtype("float64"))
    assert "at most 256" in needs("rope", head_dim=264)
    assert "without a bias" in needs("alibi")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert needs("wavelet") == "triton and jax_triton (pip install 'wavelet-jax[cuda]')"
    monkeypatch.setattr(gpu, "gpu_capability", lambda: (8, 6))  # a third less shared memory than 8.0
    assert "8.0 or 9.0 (this process runs on a GPU of 8.6)" in needs("wavelet")


def test_cudnn_says_what_it_cannot_carry(on_hopper, monkeypatch):
    def needs(*arguments, **changes) -> str:
        return " and ".join(cudnn.unsupported(call_of(*arguments, **changes)))

    assert needs("rope") == needs("nope") == needs("rope", head_dim=256) == ""
    assert needs("rope", causal=False, offset=-5) == needs("rope", causal=False, offset=None) == ""
    for method in ("wavelet", "alibi", "shaw", "transformer_xl", "t5"):
        assert "adds nothing to scores" in needs(method)
    assert "float16 or bfloat16" in needs("rope", dtype=jnp.dtype("float32"))
    assert "multiple of 8" in needs("rope", head_dim=36)
    assert "same known positions" in needs("rope", offset=3)
    assert "no window and no segment_ids or padding mask and no attention dropout" in needs(
        "rope", window=5, segment_ids=(jnp.zeros((1, 1), jnp.int32),) * 2, dropout_rate=0.5
    )
    monkeypatch.setattr(gpu, "gpu_capability", lambda: (8, 0))
    assert "at most 128" in needs("rope", head_dim=256)


def test_auto_on_a_gpu(on_hopper, monkeypatch):
    def chosen(*arguments, **changes) -> str:
        return choose.choose("auto", call_of(*arguments, **changes), batch=1)

    assert chosen("wavelet") == "triton_gpu"
    assert chosen("wavelet", segment_ids=(jnp.zeros((1, 1), jnp.int32),) * 2) == "tiled"
    assert chosen("rope") == "triton_gpu"  # cuDNN's gradients would differ from run to run
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1 --xla_gpu_deterministic_ops=true")
    assert chosen("rope") == "cudnn"
    assert chosen("wavelet") == chosen("rope", dtype=jnp.dtype("float32")) == "triton_gpu"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    assert chosen("rope") == "triton_gpu"
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert chosen("wavelet") == "tiled"
    mesh, inside = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), []

    def one_share(x):
        inside.append(chosen("wavelet"))
        return x

    everything = jax.sharding.PartitionSpec()
    jax.eval_shape(jax.shard_map(one_share, mesh=mesh, in_specs=everything, out_specs=everything), jnp.zeros(1))
    assert inside == ["triton_gpu"]


@pytest.mark.parametrize("causal", [True, False])
def test_cudnns_wrapper_means_the_same(causal):
    """By XLA's implementation of the same function, which takes float32 too: groups of heads, mask, scale."""
    call = call_of("rope", queries=60, keys=60, dtype=jnp.dtype("float32"), causal=causal)
    query, key, value = normal(0, 2, 60, 4, 64), normal(1, 2, 60, 2, 64), normal(2, 2, 60, 2, 64)
    wanted = attention(query, key, value, positions.make("nope", num_heads=4, head_dim=64).terms({}), causal=causal)
    got = cudnn.attend(query, key, value, call, implementation="xla")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=FLOAT32)


def test_same_tolerance_as_tiled(on_hopper):
    """No entry of the table is wrong by more than `tiled` allows: the kernels read the same constants."""
    call = call_of("wavelet")
    made = prepare(call, gpu._tiles(call))
    far = made.constants.far[0]
    table = np.einsum("isr,urc,dc->iusd", far.basis[:, ::-1], far.rows, far.project)
    tiles, before = gpu._tiles(call), gpu._tiles(call).band
    distance = np.arange(tiles.rows)[:, None] + before + 1 + np.arange(len(far.basis) * tiles.keys)
    exact = np.asarray(call.terms.relative_keys(jnp.asarray(distance, jnp.int32)))
    exact = exact.reshape(tiles.rows, len(far.basis), tiles.keys, -1).swapaxes(0, 1)
    np.testing.assert_allclose(table, exact, rtol=0, atol=FAR_TOLERANCE["bfloat16"])
