"""Every row of the paper's Tables 3 and 4: its wavelets in float32, through every backend, and its configs."""

import functools
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle, tolerances
from support.arrays import normal
from support.calls import EVERYWHERE, use_small_tiles
from support.compilation import quick_jit

from configs.paper import table3, table4
from wavelet_jax.attention import attention
from wavelet_jax.errors import UserError
from wavelet_jax.model.decoder import make_position
from wavelet_jax.positions import make
from wavelet_jax.wavelets import scale_shift_grid, wavelet_position

# Those of calls whose scores are sums of 48 products: here they are of 3 D = 384, and add up to the same size, so that
# roundings are sqrt(8) times as large.
OUTPUT, GRADIENT = tolerances.OUTPUT * 8**0.5, tolerances.GRADIENT * 8**0.5


@functools.cache
def jitted(mother: str):
    return quick_jit(functools.partial(wavelet_position, mother=mother))


# --- Table 3's grids in float32 --------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [False, True])
def test_x_is_exact_at_powers_of_two(constant):
    """(t - b) / a loses nothing at any scale up to 2^126, for scales of a program's arguments and of its constants.

    1 / 2^127 is subnormal: hardware that takes it for 0 takes x for 0 too. All wavelets are flat there to 2^-190.
    """
    exponents = np.arange(128)
    scales, shifts = 2.0 ** exponents.astype(np.float32), np.resize(np.float32([0, 1, 15, 127]), 128)
    distances = np.array([*range(-20, 140), 511, 2511, 100_003, 2**24 - 1], np.int32)
    identity = functools.partial(wavelet_position, mother=lambda x: x)
    if constant:
        x = quick_jit(functools.partial(identity, scales=scales, shifts=shifts))(distances)
    else:
        x = quick_jit(identity)(distances, scales, shifts)
    exact = (distances[:, None] - np.float64(shifts)) / np.float64(scales)
    np.testing.assert_array_equal(x[:, :-1], exact[:, :-1])
    assert ((x[:, -1] == exact[:, -1]) | (x[:, -1] == 0)).all()


@pytest.mark.parametrize("mother", ["ricker", "gaussian"])
@pytest.mark.parametrize("scales", table3.GRIDS)
def test_grids_are_the_slow_loops(scales, mother):
    """VALUE of tests/test_wavelets.py; where a is far past t, exactly 1 and nothing else."""
    grid = scale_shift_grid(128, *table3.GRIDS[scales])
    distances = np.array([*range(-3, 20), 64, 127, 128, 255, 511, 512, 1011, 2511], np.int32)
    ours = np.asarray(jitted(mother)(distances, *grid))
    slow = np.array([oracle.wavelet_vector(int(t), *np.float64(grid), mother) for t in distances])
    np.testing.assert_allclose(ours, slow, rtol=0, atol=5e-7)
    assert (ours[:, grid[0] >= 2.0**30] == 1).all()
    assert np.isfinite(ours).all()


# --- Through attention -----------------------------------------------------------------------------------------


def agrees_with_the_slow_loop(backend: str, method: str, options: dict, *, T: int, S: int, first: int, traced: bool):
    """Output, and gradients by queries, keys and values along a random direction, against float64 loops.

    Queries stand at first, first + 1, .. and keys at 0, 1, ..; `first` is known while tracing, or traced.
    """
    H, D = 2, 128
    position = make(method, num_heads=H, head_dim=D, **options)
    shapes = {"query": (1, T, H, D), "key": (1, S, 1, D), "value": (1, S, 1, D)}
    arrays = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    weights = normal(3, 1, T, H, D)

    def loss(arrays, first):
        places = {"query_positions": first, "key_positions": 0}
        q, k, v = (arrays[name] for name in shapes)  # jit sorts the names
        out = attention(q, k, v, position.terms({}), backend=backend, **places)
        return jnp.sum(out * weights), out

    gradient = jax.grad(loss, has_aux=True)
    if traced:
        gradients, out = quick_jit(gradient)(arrays, np.int32(first))
    else:
        gradients, out = quick_jit(lambda arrays: gradient(arrays, first))(arrays)

    def slow(arrays) -> np.ndarray:
        places = {"query_positions": [first + np.arange(T)], "key_positions": [np.arange(S)]}
        return oracle.attention(*arrays.values(), method, options, **places)

    np.testing.assert_allclose(out, slow(arrays), rtol=0, atol=OUTPUT)
    step, rng = 2e-6, np.random.default_rng(4)
    direction = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    ahead, behind = (
        np.sum(slow({name: np.float64(x) + sign * step * direction[name] for name, x in arrays.items()}) * weights)
        for sign in (1, -1)
    )
    along = sum(np.sum(np.float64(gradients[name]) * direction[name]) for name in shapes)
    norm = np.sqrt(sum(np.sum(np.square(each, dtype=np.float64)) for each in gradients.values()))
    assert abs(along - (ahead - behind) / (2 * step)) <= GRADIENT * norm + 1e-7


@pytest.fixture
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)


def quick_and_slow(quick: list[tuple], *axes) -> list:
    """All combinations, of which only the quick ones run by default."""
    return [*quick, *(pytest.param(*each, marks=pytest.mark.slow) for each in product(*axes) if each not in quick)]


@pytest.mark.parametrize(
    ("mother", "scales", "backend", "traced"),
    quick_and_slow(
        [("ricker", "2^0..2^127", "tiled", False), ("gaussian", "2^7", "decode", True)],
        *(("ricker", "gaussian"), table3.GRIDS, EVERYWHERE, (False, True)),
    ),
)
def test_grids_through_attention(mother, scales, backend, traced, small_tiles):
    count, exponent = table3.GRIDS[scales]
    options = {"mother": mother, "num_scales": count, "first_exponent": exponent}
    agrees_with_the_slow_loop(backend, "wavelet", options, T=6, S=20, first=14, traced=traced)


@pytest.mark.parametrize(
    ("wavelet", "backend", "traced"),
    quick_and_slow(
        [("coif16", "tiled", True)], ("db32", "coif16", "dmey", "bior1.3", "bior3.1"), EVERYWHERE, (False, True)
    ),
)
def test_wide_supports_through_attention(wavelet, backend, traced, small_tiles):
    """Queries far from their keys, within the support: factors would be of tens of thousands of distances."""
    first = {"coif16": 12_150, "bior1.3": 500, "bior3.1": 300}.get(wavelet, 8_000)
    agrees_with_the_slow_loop(backend, "discrete_wavelet", {"wavelet": wavelet}, T=4, S=9, first=first, traced=traced)


# --- The tables' configs ---------------------------------------------------------------------------------------


def exponents_of(scales: str) -> list[int]:
    """[0, 1, .., 7] of "2^0..2^7"."""
    first, _, last = (end.removeprefix("2^") for end in scales.partition(".."))
    return list(range(int(first), int(last or first) + 1))


@pytest.mark.parametrize("row", table3.ROWS)
def test_rows_of_table_3_are_their_names(row):
    mother, scales = row.split("_")
    position = make_position(table3.get_config(row))
    assert position.mother == {"haar": "haar_standard"}.get(mother, mother)
    pairs = list(zip(*map(np.ndarray.tolist, position.grid()), strict=True))
    if row == "haar_2^0":
        assert sorted(pairs) == sorted([(1.0, float(b)) for b in range(16)] * 8)
    else:
        exponents = exponents_of(scales)
        assert set(pairs) == {(2.0**e, float(b)) for e in exponents for b in range(128 // len(exponents))}
        assert len(set(pairs)) == 128
    assert table3.get_config(row).compare.label == row


@pytest.mark.parametrize("row", table3.ROWS)
def test_small_rows_of_table_3_keep_their_scales(row):
    """A quarter of the paper's 128 wavelets each: of its shifts, or else of its scales."""
    mother, scales = row.split("_")
    config = table3.get_config(f"small_{row}")
    pairs = list(zip(*map(np.ndarray.tolist, make_position(config).grid()), strict=True))
    assert len(pairs) == config.model.head_dim == 32
    exponents = exponents_of(scales)
    if row == "haar_2^0":
        assert sorted(pairs) == sorted([(1.0, float(b)) for b in range(4)] * 8)
    else:
        exponents = exponents[:: -(-len(exponents) // 32)]
        assert set(pairs) == {(2.0**e, float(b)) for e in exponents for b in range(32 // len(exponents))}
        assert len(set(pairs)) == 32
    other = table3.get_config(f"small_{row}_n-m")
    assert (other.position.t_sign, other.position.mother) == ("n-m", mother)
    assert other.compare.label == f"{row}_n-m"


def test_fixed_scale_haar_of_the_other_sign_sees_two_distances():
    """As configs/paper/table3.py says; with m - n it tells 16 distances apart."""
    for variant, count in (("haar_2^0_n-m", 2), ("haar_2^0", 16), ("haar_2^0_shifts0..127", 128)):
        table = np.asarray(quick_jit(make_position(table3.get_config(variant)).terms({}).relative_keys)(np.arange(200)))
        assert np.flatnonzero(np.abs(table).max(axis=1)).tolist() == list(range(count))
        assert len(np.unique(table[:count], axis=0)) == count


def test_rows_of_table_4_are_their_names():
    for row in table4.ROWS:
        for size in ("", "small_"):
            config = table4.get_config(f"{size}{row}_fine_centre_n-m")
            assert config.compare.label == f"{row}_fine_centre_n-m"
            position = config.position
            assert (position.wavelet, position.sampling, position.origin) == (row, "fine", "centre")
            assert (position.t_sign, position.num_levels, position.first_level) == ("n-m", 8, 1)
    plain = make_position(table4.get_config("sym4"))
    assert (plain.sampling, plain.origin, plain.t_sign, plain.head_dim) == ("level", "start", "m-n", 128)


@pytest.mark.parametrize("table", [table3, table4])
def test_without_a_row_rows_are_compared(table):
    assert table.get_config().compare.variants == table.ROWS
    small = table.get_config("small").compare.variants
    assert len(small) >= 5
    for variant in (*table.ROWS, *small):
        one = table.get_config(variant)
        assert one.compare.variants == ()
        assert one.compare.label == variant.removeprefix("small_") in table.ROWS
        assert one.train.length == (128 if variant in small else 512)
    with pytest.raises(UserError, match=r"unknown row of Table \d 'db22': "):
        table.get_config("db22")
