"""Flash kernels: the arrays they read, and the kernels themselves, against the definition and float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.calls import (
    assert_same,
    float64_wavelet,
    inputs,
    per_head_grids,
    ricker_table,
    value_and_gradients,
)
from support.compilation import quick_jit
from support.tolerances import FLOAT32

from wavelet_jax import positions
from wavelet_jax.attention import attention
from wavelet_jax.attention.call import Call
from wavelet_jax.attention.choose import MIN_TILED_SCORES
from wavelet_jax.attention.flash import arrays as flash_arrays
from wavelet_jax.attention.flash import tpu
from wavelet_jax.attention.flash.arrays import _parts, arrays_of, prepare, unsupported_by_kernels
from wavelet_jax.attention.tiled.geometry import TileSizes
from wavelet_jax.errors import UserError

slow = pytest.mark.slow
SMALL = TileSizes(rows=32, block=32, band=16, keys=16)  # so that short sequences have tiles of all kinds


# -- the arrays that kernels read ---------------------------------------------------------------------------------

ARRAYS = {
    "causal": {"T": 70, "S": 70},
    "bidirectional": {"T": 70, "S": 85, "offset": -13, "causal": False},
    "chunk of a cache": {"T": 45, "S": 101, "offset": 37},
    "before all keys": {"T": 40, "S": 40, "offset": -50},
    "after all keys": {"T": 40, "S": 40, "offset": 2**31 - 60},
    "heads": {
        "T": 70,
        "S": 70,
        "scales": tuple(2.0 ** np.linspace(0, 5, 64).reshape(4, 16)),
        "shifts": np.ones((4, 16)),
    },
}


DEFAULT_ARRAYS = ("causal", "bidirectional", "chunk of a cache", "after all keys")


@pytest.mark.parametrize(
    "case", [name if name in DEFAULT_ARRAYS else pytest.param(name, marks=slow) for name in ARRAYS]
)
def test_arrays_hold_every_position_score_once(case):
    """Put together as `prepared` writes it, they are q . p[m - n] / sqrt(D), summed in float64 (Eq. 10)."""
    options = {"offset": 0, "causal": True} | ARRAYS[case]
    T, S, offset, causal = (options.pop(name) for name in ("T", "S", "offset", "causal"))
    terms = positions.make("wavelet", num_heads=4, head_dim=16, **options).terms({})
    call = Call(terms, T, S, 4, 2, 16, jnp.float32, offset, causal=causal)
    assert unsupported_by_kernels(call, SMALL) == []
    made = prepare(call, SMALL)
    layout, U, V = made.layout, SMALL.rows, SMALL.keys
    query, key = normal(0, 1, T, 4, 16), normal(1, 1, S, 2, 16)
    arrays = jax.tree.map(np.asarray, quick_jit(functools.partial(arrays_of, made))(query, None, key, key))
    np.testing.assert_array_equal(arrays.key_BxKxSxD[:, :, layout.first_key : layout.end_key], key.swapaxes(1, 2))

    scores = np.zeros((4, layout.row_tiles * U, layout.key_tiles * V))
    reached = np.zeros(scores.shape[1:], bool)
    for i in range(layout.row_tiles):
        rows = slice(i * U, (i + 1) * U)
        for j in range(layout.end(i)):
            keys = slice(j * V, (j + 1) * V)
            reached[rows, keys] = True
            assert not (layout.is_near(i, j) and layout.is_far(i, j))
            if layout.is_near(i, j):
                start = (j - layout.band_start(i)) * V
                scores[:, rows, keys] = arrays.near_BxHxTxW[0, :, rows, start : start + V]
            elif layout.is_far(i, j):
                far = np.float64(arrays.far_BxHxTxR[0, :, rows])
                scores[:, rows, keys] = far @ made.basis[layout.basis_tile(i, j)].T * layout.scale
    scores, reached = (x[..., :T, layout.first_key : layout.end_key] for x in (scores, reached))

    distance = offset + np.arange(T)[:, None] - np.arange(S)
    visible = (distance >= 0) | (not causal)
    table = np.float64(quick_jit(terms.relative_keys)(np.int32(distance)))
    heads = "h" if table.ndim == 4 else ""
    exact = np.einsum(f"thd,{heads}tsd->hts", np.float64(query[0]), table) / 4
    assert reached[visible].all()
    assert (scores[:, reached & ~visible] < -1e29).all()
    # |q|_1 / sqrt(D) times the tolerance of an entry, and float32's roundings of the entries and of their product.
    np.testing.assert_allclose(scores[:, visible], exact[:, visible], rtol=0, atol=8e-6)
    if case in ("causal", "bidirectional", "chunk of a cache"):
        assert np.abs(exact[:, visible]).max() > 0.5


def test_arrays_know_what_they_cannot_carry():
    def needs(name: str, options=None, **changes) -> str:
        method = positions.make(name, num_heads=4, head_dim=16, **(options or {}))
        found = []

        def traced(params):  # what is learned is traced
            call = Call(method.terms(params), 90, 90, 4, 2, 16, jnp.float32, 0)
            found.extend(unsupported_by_kernels(dataclasses.replace(call, **changes), SMALL))

        jax.eval_shape(traced, method.init(jax.random.key(0)))
        return " and ".join(found)

    assert needs("wavelet") == needs("rope") == needs("nope") == ""
    assert "consecutive positions" in needs("rope", offset=None)
    assert "no attention dropout and no segment_ids or padding mask and no window" in needs(
        "rope", dropout_rate=0.5, segment_ids=(jnp.zeros((1, 1), jnp.int32),) * 2, window=3
    )
    assert "without a bias" in needs("alibi")
    assert "constant" in needs("wavelet", {"trainable": True})
    assert "constant" in needs("transformer_xl")
    assert "without relative values" in needs("shaw", {"values": True})
    assert "no step functions" in needs("wavelet", {"mother": "haar_standard"}, queries=9000, keys=9000)


# -- the TPU kernel, in Pallas' interpreter -----------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tpu, "TILES", (SMALL, TileSizes(rows=32, block=32, band=0, keys=16)))


def by_kernel(method, *arrays, **options) -> dict:
    with tpu.interpreted():
        return value_and_gradients("pallas_tpu", method, {}, *arrays, **options)


SITUATIONS = {
    "causal": {"T": 70, "S": 70},
    "bidirectional": {"T": 70, "S": 85, "causal": False, "query_positions": 0, "key_positions": 13},
    "chunk of a cache": {"T": 45, "S": 101, "query_positions": 37, "key_positions": 0},
    "after all keys": {"T": 20, "S": 40, "query_positions": 2**31 - 60, "key_positions": 0},
}
METHODS = {
    "wavelet": {},
    "wavelet heads": per_head_grids(),
    "wavelet morlet": {"mother": "morlet", "t_sign": "n-m"},
    "rope": {},
    "nope": {},
}
PAIRS = [("wavelet", "causal"), ("wavelet", "bidirectional"), ("rope", "chunk of a cache")]
SLOW_PAIRS = [(name, situation) for name in METHODS for situation in SITUATIONS if (name, situation) not in PAIRS]


@pytest.mark.parametrize(("name", "situation"), [*PAIRS, *(pytest.param(*pair, marks=slow) for pair in SLOW_PAIRS)])
def test_equals_the_definition(name, situation, small_tiles):
    """Output and all gradients, grouped heads, lengths that no tile divides."""
    method = positions.make(name.split()[0], num_heads=4, head_dim=32, **METHODS[name])
    options = dict(SITUATIONS[situation])
    arrays = inputs(options.pop("T"), options.pop("S"))
    expected = value_and_gradients("reference", method, {}, *arrays, **options)
    assert_same(by_kernel(method, *arrays, **options), expected, FLOAT32)


@slow
def test_64_bit_mode(small_tiles):
    method, arrays = positions.make("wavelet", num_heads=4, head_dim=32), inputs(70, 70)
    expected = by_kernel(method, *arrays)
    with jax.enable_x64(True):
        assert_same(by_kernel(method, *arrays), expected, FLOAT32)


def test_a_part_of_the_heads_at_a_time(small_tiles, monkeypatch):
    """Where near scores are large; the numbers are the same."""
    method = positions.make("wavelet", num_heads=4, head_dim=32)
    arrays = inputs(40, 40)
    expected = value_and_gradients("reference", method, {}, *arrays)
    monkeypatch.setattr(flash_arrays, "NEAR_BYTES", 2**10)
    call = Call(method.terms({}), 40, 40, 4, 2, 32, jnp.float32, 0)
    assert _parts(prepare(call, SMALL), 2, 2) == 2
    assert_same(by_kernel(method, *arrays), expected, FLOAT32)


def distance_from(exact: dict, found: dict) -> dict:
    """Root mean square of the error over that of the values."""
    return {
        name: np.linalg.norm(np.asarray(found[name], np.float64) - wanted) / np.linalg.norm(wanted)
        for name, wanted in exact.items()
    }


@slow
@pytest.mark.parametrize("first_exponent", [0, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float64_with_the_shipped_tiles(dtype, first_exponent):
    """Near, far and plain tiles of their real sizes, as near to float64 as what sums and rounds alike.

    - float32: twice the definition's error, as in test_tiled.py: the far form adds its own.
    - bfloat16: that of plain attention in bfloat16, against its own float64.
    """
    L = 1300
    method = positions.make("wavelet", num_heads=2, head_dim=128, first_exponent=first_exponent)
    arrays = inputs(L, L, H=2, K=2, D=128, B=1, dtype=dtype)
    exact, factor = float64_wavelet(*arrays, ricker_table(L, first_exponent)), 1.1
    if dtype == jnp.float32:
        usual, factor = distance_from(exact, value_and_gradients("reference", method, {}, *arrays)), 2
    else:
        out, pull = jax.vjp(functools.partial(jax.nn.dot_product_attention, is_causal=True), *arrays[:3])
        plain = dict(zip(("out", "query", "key", "value"), (out, *pull(arrays[3])), strict=True))
        usual = distance_from(float64_wavelet(*arrays, np.zeros((L, 128))), plain)
    found = by_kernel(method, *arrays)
    for name, error in distance_from(exact, found).items():
        assert found[name].dtype == dtype
        assert error <= factor * usual[name], f"{name}: {error:.1e} from float64; {usual[name]:.1e} is usual"


def test_bfloat16(small_tiles):
    """Within what rounding to bfloat16 (2^-9 of a number) does to queries, weights, products and results."""
    method = positions.make("wavelet", num_heads=4, head_dim=32)
    arrays = inputs(70, 70, dtype=jnp.bfloat16)
    found = by_kernel(method, *arrays)
    assert all(array.dtype == jnp.bfloat16 for array in found.values())
    wide = value_and_gradients("reference", method, {}, *(x.astype(jnp.float32) for x in arrays))
    assert_same(found, wide, 4 * 2.0**-9)


def test_queries_that_see_nothing_are_zero(small_tiles):
    """The first 21 queries come before all keys; so does a whole tile of them."""
    method = positions.make("wavelet", num_heads=4, head_dim=32)
    found = by_kernel(method, *inputs(70, 70), query_positions=0, key_positions=40)
    assert all(np.isfinite(array).all() for array in found.values())
    for name in "out", "query":
        assert not np.any(found[name][:, :40])
    assert np.any(found["out"][:, 40:] != 0, axis=-1).all()
    assert not np.any(found["value"][:, 30:])  # keys that no query has reached


def test_causal_at_tile_borders(small_tiles):
    """The output at m has a gradient by all values up to m, and of exactly zero by keys and values after m."""
    query, key, value, cotangent = inputs(70, 70, B=1)
    terms = positions.make("wavelet", num_heads=4, head_dim=32).terms({})

    @quick_jit
    def gradients(row):
        _, pull = jax.vjp(lambda k, v: attention(query, k, v, terms, backend="pallas_tpu"), key, value)
        return pull(jnp.where(jnp.arange(70)[:, None, None] == row, cotangent, 0))

    with tpu.interpreted():
        for row in (0, 15, 16, 31, 32, 33, 47, 48, 69):
            by_key, by_value = (np.any(np.asarray(gradient)[0] != 0, axis=(1, 2)) for gradient in gradients(row))
            assert by_value[: row + 1].all()
            assert not by_value[row + 1 :].any()
            assert not by_key[row + 1 :].any()


# -- the choice ---------------------------------------------------------------------------------------------------


def test_named_kernels_refuse_what_they_cannot_carry():
    query, key, value, _ = inputs(40, 40)

    def call(name="rope", query=query, **options):
        terms = positions.make(name, num_heads=4, head_dim=query.shape[-1]).terms({})
        attention(query, key.astype(query.dtype), value, terms, backend="pallas_tpu", **options)

    with pytest.raises(UserError, match=r"the pallas_tpu backend needs a TPU \(this program is for a cpu\)"):
        call()
    with tpu.interpreted():
        with pytest.raises(UserError, match="needs a position method without a bias: use backend='auto'"):
            call("alibi")
        with pytest.raises(UserError, match="needs no segment_ids or padding mask and no window"):
            call(segment_ids=np.zeros((2, 40), int), window=3)
        with pytest.raises(UserError, match="needs queries in float32 or bfloat16"):
            call(query=query.astype(jnp.float16))


def test_auto_takes_the_kernel_on_a_tpu_only(monkeypatch):
    calls = []
    monkeypatch.setattr(tpu, "attend", lambda query, *_: calls.append(query.shape) or query)
    L = int(MIN_TILED_SCORES**0.5)
    query, key, value, _ = inputs(L, L, H=1, K=1, D=16, B=1)
    terms = positions.make("nope", num_heads=1, head_dim=16).terms({})
    attention(query, key, value, terms)
    assert not calls
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    attention(query, key, value, terms, window=5)
    attention(query[:, 1:], key[:, 1:], value[:, 1:], terms)
    assert not calls
    attention(query, key, value, terms)
    assert calls == [(1, L, 1, 16)]


# -- the real compiler --------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("chip", ["v5e:2x2"])
@pytest.mark.parametrize(("name", "causal"), [("wavelet", True), ("wavelet", False), ("rope", True)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_compiles_for_a_tpu(dtype, name, causal, chip, monkeypatch):
    """Forward and backward through the TPU's own compiler, which needs libtpu (the extra `tpu`) and no TPU."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(chip, "tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    L, H, K, D = 8192, 4, 2, 128
    terms = positions.make(name, num_heads=H, head_dim=D).terms({})

    def run(query, key, value, cotangent):
        def output(query, key, value):
            call = Call(terms, L, L, H, K, D, query.dtype, 0, causal=causal)
            return tpu.attention(query, key, value, call)

        out, pull = jax.vjp(output, query, key, value)
        return out, pull(cotangent)

    shapes = [jax.ShapeDtypeStruct((1, L, heads, D), dtype, sharding=place) for heads in (H, K, K, H)]
    program = jax.jit(run).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
    assert program.as_text().count("flash_") >= 3
    # Near scores [H, L, W] in float32 are the largest arrays, and are there about five times: as scores and as
    # gradients, by key and by distance.
    width = 512 if causal else 768
    assert program.memory_analysis().temp_size_in_bytes < 6 * 4 * H * L * width < 4 * H * L * L
