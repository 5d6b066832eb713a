"""Attention in other people's programs: their meshes and the settings of JAX that they run under.

Most of what can go wrong there is an error while tracing, so nothing is compiled here but what has to be: the meshes
have no devices. `test_several_devices_give_what_one_gives` computes, in a process of its own.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from support.calls import EVERYWHERE, use_small_tiles
from support.compilation import quick_jit
from support.project import ROOT, environment

from wavelet_jax.attention import attention
from wavelet_jax.attention.flash import tpu
from wavelet_jax.errors import UserError
from wavelet_jax.positions import METHODS, make

slow = pytest.mark.slow
B, T, H, K, D = 4, 40, 4, 2, 8
SOME = ("wavelet", "rope", "shaw", "transformer_xl")
OTHERS = tuple(name for name in METHODS if name not in SOME)
OPTIONS = {
    "plain": {},
    "window": {"window": 9},
    "segments": {"segment_ids": True},
    "bidirectional": {"causal": False},
    "chunk": {"query_positions": True, "key_positions": 0},  # a traced first position
    "padding": {"mask": True},
}
MOSTLY_SLOW = ["segments", *(pytest.param(how, marks=slow) for how in OPTIONS if how != "segments")]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)


def plain_shape(shape, dtype, axes=()) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def gradients(name: str, backend: str, how: str, dtype="float32", shape=plain_shape):
    """(the gradient function of a method's parameters, queries, keys and values; its arguments by `shape`)."""
    method = make(name, num_heads=H, head_dim=D)
    arguments = [
        jax.tree.map(lambda x: shape(x.shape, x.dtype), jax.eval_shape(method.init, jax.random.key(0))),
        *(shape((B, T, heads, D), dtype, ("batch", None, "heads")) for heads in (H, K, K)),
        shape((B, T), "int32", ("batch",)),
        shape((), "int32"),
        shape((B, 1, 1, T), "bool", ("batch",)),
    ]

    def loss(params, query, key, value, segments, first, padding):
        given = dict(zip(("segment_ids", "query_positions", "mask"), (segments, first, padding), strict=True))
        chosen = {key: given[key] if value is True else value for key, value in OPTIONS[how].items()}
        terms = method.terms(params)
        out = attention(query, key, value, terms.without_embedding(), backend=backend, **chosen)
        assert out.shape == query.shape
        assert out.dtype == value.dtype
        return jnp.sum(out.astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2, 3)), arguments


@pytest.mark.parametrize("how", MOSTLY_SLOW)
@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", METHODS)
def test_traces_where_nothing_is_promoted(name, backend, how):
    """Under `jax_numpy_rank_promotion="raise"` and strict dtype promotion, also with bfloat16."""
    for dtype in ("float32", "bfloat16"):
        function, arguments = gradients(name, backend, how, dtype)
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            found = jax.eval_shape(function, *arguments)
        described = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (found, tuple(arguments[:4]))]
        assert described[0] == described[1]


@pytest.mark.parametrize("name", METHODS)
def test_terms_trace_where_nothing_is_promoted(name):
    """What a method does outside of attention too: vectors for scores of one's own, and embeddings."""
    method = make(name, num_heads=H, head_dim=D)
    positions = jax.ShapeDtypeStruct((T,), "int32")
    batches = jax.ShapeDtypeStruct((B, T), "int32")

    def everything(params, positions, distances):
        terms = method.terms(params)
        functions = (terms.embed, terms.relative_keys, terms.relative_values, terms.bias)
        return [function(at) for function in functions if function for at in (positions, distances)]

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        params = jax.eval_shape(method.init, jax.random.key(0))
        found = jax.eval_shape(everything, params, positions, batches)
    assert {x.dtype for x in found} <= {jnp.dtype("float32")}


def sharded_gradients(mesh: AbstractMesh, name: str, backend: str, how: str, sharded: str):
    """`gradients` with batch, heads of queries, and heads of keys and values on axes of the mesh as `sharded` names."""

    def shape(shape, dtype, axes=()):
        heads = sharded == "batch and heads" or (sharded == "heads of queries" and shape[2:3] == (H,))
        kept = {"batch": "batch" in sharded, "heads": heads, None: False}
        spec = PartitionSpec(*(axis if kept[axis] else None for axis in axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    return gradients(name, backend, how, shape=shape)


EXPLICIT = [
    pytest.param(how, sharded, marks=[] if how in ("segments", "chunk") and sharded == "batch and heads" else slow)
    for how in OPTIONS
    for sharded in ("batch", "batch and heads", "heads of queries", "nothing")
]


@pytest.mark.parametrize(("how", "sharded"), EXPLICIT)
@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", METHODS)
def test_traces_on_an_explicit_mesh(name, backend, how, sharded):
    """`jax.make_mesh`'s default, with and without `jax.set_mesh`: every gradient comes back as its argument lies."""
    mesh = AbstractMesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Explicit,) * 2)
    function, arguments = sharded_gradients(mesh, name, backend, how, sharded)
    for context in (mesh, AbstractMesh((), ())):
        with jax.sharding.use_abstract_mesh(context):
            found = jax.eval_shape(function, *arguments)
        for gradient, argument in zip(jax.tree.leaves(found), jax.tree.leaves(arguments[:4]), strict=True):
            assert gradient.sharding.is_equivalent_to(argument.sharding, argument.ndim)


@pytest.mark.parametrize("how", MOSTLY_SLOW)
@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", METHODS)
def test_traces_in_shard_map(name, backend, how):
    """With its default, `check_vma=True`, over all axes of a mesh of Auto or Explicit ones, set or not."""
    batch = PartitionSpec("batch")
    specs = PartitionSpec(), batch, batch, batch, batch, PartitionSpec(), batch

    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = AbstractMesh((2, 2), ("batch", "other"), axis_types=(kind,) * 2)
        explicit = kind == AxisType.Explicit
        function, arguments = sharded_gradients(mesh, name, backend, how, "batch" if explicit else "nothing")
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[:4])
        for context in (mesh, AbstractMesh((), ())):
            with jax.sharding.use_abstract_mesh(context):
                found = jax.eval_shape(mapped, *arguments)
            assert [x.shape for x in jax.tree.leaves(found)] == [x.shape for x in jax.tree.leaves(arguments[:4])]


def test_kernels_ask_for_an_unchecked_shard_map():
    mesh = AbstractMesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    function, arguments = gradients("wavelet", "pallas_tpu", "plain")
    batch = PartitionSpec("batch")
    specs = PartitionSpec(), batch, batch, batch, batch, PartitionSpec(), batch
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[:4])
    with tpu.interpreted(), pytest.raises(UserError, match=r"pallas_tpu backend needs .*check_vma=False"):
        jax.eval_shape(mapped, *arguments)


@pytest.mark.parametrize("names", [SOME, pytest.param(OTHERS, marks=slow)], ids=["some", "others"])
def test_several_devices_give_what_one_gives(names):
    """Gradients over four devices, by `shard_map` and on Explicit meshes, and a train step under `set_mesh`."""
    command = [sys.executable, str(ROOT / "tests" / "programs" / "caller_cases.py"), *names]
    out = subprocess.run(command, cwd=ROOT, env=environment(devices=4), capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    errors = {line["case"]: line["error"] for line in map(json.loads, out.stdout.splitlines())}
    assert len(errors) == 2 * len(names) + 1
    # Sums of some hundred float32 numbers near 1 in another order.
    assert {case: error for case, error in errors.items() if not error < 1e-5} == {}


SETTINGS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "x64": lambda: jax.enable_x64(True),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", ["wavelet", *(pytest.param(name, marks=slow) for name in ("transformer_xl", "t5"))])
def test_settings_change_no_number(name, backend, setting):
    """Masked rows, far tiles and learned tables under a setting give what they give without it, to the last bit."""
    method = make(name, num_heads=H, head_dim=D)
    params = method.init(jax.random.key(1))
    arrays = [jax.random.normal(jax.random.key(i), (1, T, heads, D)) for i, heads in enumerate((H, K, K))]
    hidden = jnp.arange(T)[None] < 3  # padding at the start: the first queries see nothing

    def loss(params, arrays):
        mask = ~hidden[:, None, None]
        return jnp.sum(jnp.sin(attention(*arrays, method.terms(params), mask=mask, backend=backend)))

    def run():
        return jax.tree.map(np.asarray, quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, arrays))

    wanted = run()
    with SETTINGS[setting]():
        found = run()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "decode"])
@pytest.mark.parametrize("name", ["wavelet", "transformer_xl", "t5"])
def test_products_keep_their_precision(name, backend):
    """`jax_default_matmul_precision` is for products that state none: all of these do, forward and backward."""
    function, arguments = gradients(name, backend, "plain")
    with jax.default_matmul_precision("bfloat16"):
        lowered = jax.jit(function).lower(*arguments).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 4
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []
