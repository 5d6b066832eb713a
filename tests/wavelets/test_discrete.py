"""Discrete wavelets against their filters' cascade, closed forms, their own mathematics, and float64 lookups."""

import jax
import numpy as np
import pytest
import pywt
from support import oracle
from support.compilation import quick_jit

from wavelet_jax.errors import UserError
from wavelet_jax.positions import make
from wavelet_jax.wavelets import discrete

FURTHEST = 2**31 - 1
LEVELS = range(1, 9)  # the paper's
ORTHOGONAL = [name for name in discrete.TABLE_4 if not name.startswith(("bior", "rbio"))]
BIORTHOGONAL = [name for name in discrete.TABLE_4 if name not in ORTHOGONAL]
# p is float32: half a step of 2^-23 relative to values of up to 4.
VALUE = 2.4e-7


# --- The samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["haar", *discrete.TABLE_4])
def test_samples_are_the_cascade_of_the_filters(name):
    """In float64, at every level of the paper: one value a step, the zero at x = 0 first, and zeros only after."""
    for level in LEVELS:
        ours, slow = discrete.samples(name, level), oracle.discrete_samples(name, level)
        assert ours.dtype == np.float64
        assert 2**level * (discrete.filter_length(name) - 1) <= len(ours) <= len(slow) + discrete.filter_length(name)
        np.testing.assert_allclose(ours[: len(slow)], slow, rtol=0, atol=1e-12)
        assert (ours[len(slow) :] == 0).all()
        assert ours[0] == ours[-1] == 0


def test_golden_samples():
    """Haar by hand; db2's first level from Daubechies' closed form of its filter, times 2^(1/2)."""
    for name in ("haar", "db1", "rbio1.1", "bior1.1"):
        np.testing.assert_allclose(discrete.samples(name, 2), [0, 1, 1, -1, -1, 0], rtol=0, atol=1e-12)
    root = np.sqrt(3)
    expected = [0, (1 - root) / 4, -(3 - root) / 4, (3 + root) / 4, -(1 + root) / 4]
    np.testing.assert_allclose(discrete.samples("db2", 1)[:5], expected, rtol=0, atol=1e-10)


def test_fine_samples_meet_closed_forms():
    """db2's psi at 1, 3/2 and 2, from phi(1) = (1 + sqrt 3)/2, phi(2) = (1 - sqrt 3)/2 and the two-scale relation.

    The cascade at 2^-12 is off by a step: psi is of Hoelder exponent 0.55 (Daubechies, Ten Lectures), and (2^-12)^0.55
    is 0.01.
    """
    root = np.sqrt(3)
    phi = {1: (1 + root) / 2, 2: (1 - root) / 2}
    high = np.array([1 - root, -(3 - root), 3 + root, -(1 + root)]) / 4  # sqrt 2 times the filter
    psi = {x: sum(high[k] * phi.get(2 * x - k, 0) for k in range(4)) for x in (1, 1.5, 2)}
    for level in (2, 5):
        fine = discrete.samples("db2", level, "fine")
        for x, value in psi.items():
            assert abs(fine[int(x * 2**level)] - value) < 0.02


@pytest.mark.parametrize("name", ["db2", "db8", "coif2", "dmey", "bior4.4", "rbio2.2"])
def test_the_two_samplings_are_one_function(name):
    """wavefun(8)[k] is psi at (k - 1 + m) / 2^8, m the mean of phi (and of the low-pass filter).

    The cascade's error falls with psi's smoothness; db2's, the least smooth of these, is off by (2^-8)^0.55 = 0.05.
    """
    low = pywt.Wavelet(name).dec_lo[::-1]
    mean = np.arange(len(low)) @ low / np.sum(low)
    level, fine = discrete.samples(name, 8), discrete.samples(name, 8, "fine")
    expected = np.interp(np.arange(len(level)) - 1 + mean, np.arange(len(fine)), fine, 0, 0)
    np.testing.assert_allclose(level, expected, rtol=0, atol=0.05)
    assert np.max(np.abs(level)) > 1


def test_haar_is_the_same_in_both_samplings():
    for level in LEVELS:
        both = discrete.samples("haar", level), discrete.samples("haar", level, "fine")
        length = min(map(len, both))
        np.testing.assert_allclose(both[0][:length], both[1][:length], rtol=0, atol=1e-12)


def vanishing_moments(name: str) -> int:
    """Of the wavelet of decomposition: N of dbN, symN and biorN.M, 2N of coifN; M of rbioN.M, which has the filters of
    biorN.M exchanged. dmey has all, but is cut off.
    """
    if name == "dmey":
        return 1
    family = name.rstrip("0123456789.")
    first, _, last = name.removeprefix(family).partition(".")
    return {"coif": 2 * int(first), "rbio": int(last or 0)}.get(family, int(first))


# How far PyWavelets' filters are from what they stand for: printed to 12 digits, or cut off after 62 numbers.
FILTERS = dict.fromkeys(discrete.TABLE_4, 1e-10) | {"dmey": 1e-2}


@pytest.mark.parametrize("name", discrete.TABLE_4)
def test_zero_mean_and_vanishing_moments(name):
    """sum of k^p psi[k] = 0 for p below the number of vanishing moments, at every level; and not for the next p.

    In units of the sum of |k^p psi[k]|, with k from -1 to 1 over the support.
    """
    moments = vanishing_moments(name)
    for level in LEVELS:
        psi = discrete.samples(name, level)
        x = np.linspace(-1, 1, len(psi))
        left = [abs(np.sum(x**p * psi)) / np.sum(np.abs(x**p * psi)) for p in range(4)]
        assert max(left[:moments]) <= FILTERS[name]
        assert name == "dmey" or moments >= 4 or left[moments] > 1e-3


def shifted(psi: np.ndarray, by: int, length: int) -> np.ndarray:
    out = np.zeros(length)
    out[by : by + len(psi)] = psi
    return out


@pytest.mark.parametrize("name", discrete.TABLE_4)
def test_samples_of_levels_and_even_shifts_are_orthogonal(name):
    """Level l shifted by multiples of 2^l, all levels together: <psi, psi'> = 2^l where they are one, or else 0.

    That is the orthonormal basis of sequences that a filter bank builds; of biorthogonal wavelets, those of
    decomposition against those of reconstruction.
    """
    levels = (1, 2, 3)
    base = {level: discrete.samples(name, level) for level in levels}
    other = base
    if name in BIORTHOGONAL:
        other = {level: pywt.Wavelet(name).wavefun(level)[3] for level in levels}
    shifts = [(level, by) for level in levels for by in range(0, 24, 2**level)]
    length = 24 + max(map(len, base.values()))
    ours = np.stack([shifted(base[level], by, length) for level, by in shifts])
    theirs = np.stack([shifted(other[level], by, length) for level, by in shifts])
    expected = np.diag([2.0**level for level, _ in shifts])
    np.testing.assert_allclose(ours @ theirs.T, expected, rtol=0, atol=FILTERS[name] * 2**3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("db99", 1), r"unknown discrete wavelet 'db99': did you mean 'db9'\? allowed are bior1\.1, .*sym2"),
        (("mexh", 1), r"unknown discrete wavelet 'mexh'"),
        (("db2", 1, "coarse"), r"unknown sampling 'coarse': .*allowed are level, fine"),
        (("db2", 0), r"sampling 'level' has levels 1 to 12, not 0"),
        (("db2", 13, "fine"), r"sampling 'fine' has levels 0 to 12, not 13"),
    ],
)
def test_samples_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        discrete.samples(*arguments)


# --- p[t, j] ---------------------------------------------------------------------------------------------------


def test_the_128_pairs_of_the_paper():
    levels, shifts = discrete.level_shift_grid(128)
    assert sorted(zip(levels.tolist(), shifts.tolist(), strict=True)) == [
        (level, b) for level in LEVELS for b in range(16)
    ]
    with pytest.raises(UserError, match=r"8 levels cannot fill a head of 20 .*set num_levels to one of .*nearest 10"):
        discrete.level_shift_grid(20)


READINGS = [
    {},
    {"t_sign": "n-m"},
    {"origin": "centre"},
    {"origin": "centre", "t_sign": "n-m"},
    {"sampling": "fine", "first_level": 0},
    {"sampling": "fine", "origin": "centre", "t_sign": "n-m", "first_level": 0},
]
DISTANCES = np.array(
    [*range(-40, 200), *range(203, 1600, 5), -5000, 784, 6000, 24336, FURTHEST, -FURTHEST, FURTHEST - 9], np.int32
)


def lookup(**options):
    return quick_jit(make("discrete_wavelet", num_heads=1, head_dim=16, **options).terms({}).relative_keys)


@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("name", ["db2", "rbio1.1", "coif16", "bior1.3"])
def test_positions_are_the_slow_lookups(name, reading):
    options = {"wavelet": name, "num_levels": 4, **reading}
    ours = np.asarray(lookup(**options)(DISTANCES))
    assert ours.dtype == np.float32
    slow = np.array([oracle.discrete_vector(int(t), 16, **options) for t in DISTANCES])
    assert (np.abs(slow) > 0.1).any(axis=0).all()  # every column is met
    np.testing.assert_allclose(ours, slow, rtol=0, atol=VALUE)


def test_eight_levels_to_the_end_of_their_support():
    """coif16 reaches 24,335 tokens; past 2^8 95 + 15 there is nothing, and before it there is."""
    terms = make("discrete_wavelet", num_heads=1, head_dim=128, wavelet="coif16").terms({})
    assert terms.support == 95 * 2**8 + 15
    distances = np.array([0, 1, 15, 16, 500, 5000, 12_160, 20_000, 24_200, 24_335, 24_336, 30_000])
    slow = np.array([oracle.discrete_vector(int(t), 128, "coif16") for t in distances])
    np.testing.assert_allclose(terms.relative_keys(distances), slow, rtol=0, atol=VALUE)
    assert np.abs(slow[-5]).max() > 0
    assert not slow[-2:].any()


@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("name", ["db2", "haar", "bior3.1"])
def test_support_by_brute_force(name, reading):
    """Nothing past it on either side, and not much further than need be: PyWavelets ends with a few zeros."""
    options = {"wavelet": name, "num_levels": 4, **reading}
    method = make("discrete_wavelet", num_heads=1, head_dim=16, **options)
    distances = np.arange(-900, 901)
    seen = np.abs(distances[np.abs(lookup(**options)(distances)).max(axis=1) > 0])
    assert seen.max() <= method.terms({}).support <= seen.max() + 2 ** (method.first_level + 4)


def test_of_any_integer_type_shape_and_transform():
    distance = np.arange(0, 120).reshape(4, 30)
    position = lookup(wavelet="db4")
    expected = np.asarray(position(distance))
    assert expected.shape == (4, 30, 16)
    for dtype in (np.int8, np.uint32):
        np.testing.assert_array_equal(position(distance.astype(dtype)), expected)
    eager = make("discrete_wavelet", num_heads=1, head_dim=16, wavelet="db4").terms({}).relative_keys
    np.testing.assert_array_equal(jax.jit(jax.vmap(eager))(distance), expected)
    np.testing.assert_array_equal(eager(7), expected[0, 7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t_sign": "m+n"}, r"unknown t_sign 'm\+n'"),
        ({"origin": "center"}, r"unknown origin 'center': did you mean 'centre'\?"),
        ({"levels": np.ones(3, int)}, r"levels \(3,\) and shifts \(4,\) must have one shape, \[D\]"),
        ({"levels": np.ones((1, 4), int), "shifts": np.ones((1, 4), int)}, r"must have one shape"),
        ({"distance": np.arange(3.0)}, r"must be integers, not float64"),
    ],
)
def test_positions_refused(change, message):
    arguments = {"distance": np.arange(3), "wavelet": "db2", "levels": np.ones(4, int), "shifts": np.zeros(4, int)}
    with pytest.raises(UserError, match=message):
        discrete.discrete_position(**{**arguments, **change})
