"""Wavelets and angles against float64 loops, PyWavelets, hand-derived gradients and exact arithmetic."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle

from wavelet_jax import positions
from wavelet_jax.angles import angle
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.wavelets import continuous

MOTHERS = tuple(continuous.MOTHERS)
SMOOTH = ("ricker", "gaussian", "morlet")
FURTHEST = 2**31 - 1

# x = (t - b) / a takes three float32 roundings (2^-24 each, relative), and |x psi'(x)| <= 1.22 for every mother, so
# they move psi by 2.2e-7; squaring, exp and the product add a few roundings of values of size 1.
VALUE = 5e-7
# A Morlet's cosine also carries the angle's error, 6e-7 (see test_angle_is_exact), and the rounding of the difference
# between that angle, in [-pi, pi], and b: for shifts up to 15 that is 1.1e-6.
VALUE_MORLET = VALUE + 6e-7 + 2.0**-24 * (np.pi + 15)
# The same roundings, on derivatives of up to 3 (psi'' of the Ricker), in units of 1 / a.
GRADIENT = 2e-6


def value_tolerance(mother: str) -> float:
    return {"morlet": VALUE_MORLET, "haar": 0.0, "haar_standard": 0.0}.get(mother, VALUE)


@functools.cache
def jitted(mother: str, t_sign: str = "m-n"):
    return jax.jit(functools.partial(continuous.wavelet_position, mother=mother, t_sign=t_sign))


def slow_table(distances, scales, shifts, mother: str, t_sign: str = "m-n") -> np.ndarray:
    """[N, D] float64, by loops over Python floats."""
    sign = 1 if t_sign == "m-n" else -1
    return np.array(
        [oracle.wavelet_vector(sign * int(t), np.float64(scales), np.float64(shifts), mother) for t in distances]
    )


# --- The mother wavelets ---------------------------------------------------------------------------------------


def test_golden_values_of_the_mothers():
    """By hand: (1 - x^2) e^(-x^2/2), e^(-x^2), e^(-x^2) cos(a x), and Eq. (15)'s steps."""
    x = jnp.array([0.0, 1.0, 2.0, -2.0])
    np.testing.assert_allclose(continuous.ricker(x), [1, 0, -0.40600585, -0.40600585], rtol=0, atol=VALUE)
    np.testing.assert_allclose(continuous.gaussian(x), [1, 0.36787944, 0.01831564, 0.01831564], rtol=0, atol=VALUE)
    np.testing.assert_allclose(
        continuous.morlet(x, 2.0), [1, -0.15309187, -0.01197186, -0.01197186], rtol=0, atol=VALUE_MORLET
    )
    steps = jnp.array([-1.001, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(continuous.haar(steps), [0, -1, -1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(continuous.haar_standard(steps), [0, 0, 0, 0, 0, 1, 1, -1, -1, 0])


def test_golden_values_of_the_position():
    """p[t] of Eq. (14) at t = 3 with (a, b) = (1, 0), (1, 1), (2, 0), (2, 1): x = 3, 2, 1.5, 1."""
    scales, shifts = continuous.scale_shift_grid(4, num_scales=2)
    expected = [-8 * math.exp(-4.5), -3 * math.exp(-2), -1.25 * math.exp(-1.125), 0]
    np.testing.assert_allclose(continuous.wavelet_position(3, scales, shifts), expected, rtol=0, atol=VALUE)
    # ... and on the other side, x = -3, -4, -1.5, -2.
    expected = [-8 * math.exp(-4.5), -15 * math.exp(-8), -1.25 * math.exp(-1.125), -3 * math.exp(-2)]
    for distance, t_sign in ((-3, "m-n"), (3, "n-m")):
        ours = continuous.wavelet_position(distance, scales, shifts, t_sign=t_sign)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=VALUE)


def test_ricker_is_pywavelets_mexh():
    psi, x = pywt.ContinuousWavelet("mexh").wavefun(length=401)
    constant = 2 / (math.sqrt(3) * math.pi**0.25)
    np.testing.assert_allclose(constant * continuous.ricker(jnp.float32(x)), psi, rtol=0, atol=VALUE)


@pytest.mark.parametrize("order", [1, 2])
def test_gaussian_derivatives_are_pywavelets_gaus(order):
    """gausP is the P-th derivative of exp(-x^2), normed to unit energy: so ours are proportional to it."""
    psi, x = pywt.ContinuousWavelet(f"gaus{order}").wavefun(length=401)
    derivative = continuous.gaussian
    for _ in range(order):
        derivative = jax.grad(derivative)
    ours = np.asarray(jax.vmap(derivative)(jnp.float32(x)), np.float64)
    energy = math.sqrt(np.sum(ours**2) * (x[1] - x[0]))
    sign = np.sign(ours @ psi)
    # 401 points integrate a Gaussian's energy to more digits than float32 holds; PyWavelets prints its constants
    # from closed forms.
    np.testing.assert_allclose(sign * ours / energy, psi, rtol=0, atol=GRADIENT)


def test_morlet_is_pywavelets_morl():
    """morl(x) = exp(-x^2 / 2) cos(5 x): ours at x / sqrt(2) with scale 5 sqrt(2)."""
    psi, x = pywt.ContinuousWavelet("morl").wavefun(length=401)
    ours = continuous.morlet(jnp.float32(x / math.sqrt(2)), jnp.float32(5 * math.sqrt(2)))
    # The cosine's argument reaches 40, where float32 steps by 4e-6; the envelope there is nothing, and
    # max |5 x exp(-x^2 / 2)| = 3 leaves 3 * 3 roundings of 2^-24.
    np.testing.assert_allclose(ours, psi, rtol=0, atol=VALUE_MORLET)


def test_haar_standard_is_pywavelets_haar():
    """PyWavelets gives the wavelet's 64 equal steps over [0, 1), and a zero at both ends."""
    _, psi, _ = pywt.Wavelet("haar").wavefun(level=6)
    assert psi.shape == (66,)
    middles = (jnp.arange(64) + 0.5) / 64
    np.testing.assert_allclose(continuous.haar_standard(middles), psi[1:-1], rtol=0, atol=1e-12)


def test_haar_mirrored_is_haar_standard():
    """Footnote 8: Eq. (15) on the causal side is the ordinary Haar; the mirror image of -x, but for its edges."""
    x = jnp.arange(-2, 2, 1 / 64) + 1 / 128
    np.testing.assert_array_equal(continuous.haar(-x), continuous.haar_standard(x))


# --- The grid --------------------------------------------------------------------------------------------------


def test_the_128_pairs_of_equation_13():
    scales, shifts = continuous.scale_shift_grid(128)
    assert scales.shape == shifts.shape == (128,)
    assert scales.dtype == shifts.dtype == np.float32
    expected = {(2.0**e, float(b)) for e in range(8) for b in range(16)}
    assert len(expected) == 128
    assert set(zip(scales.tolist(), shifts.tolist(), strict=True)) == expected


def test_the_long_context_grid():
    """Section 7: scales 2^2 .. 2^9, shifts 0 .. 15."""
    scales, shifts = continuous.scale_shift_grid(128, first_exponent=2)
    assert sorted(set(scales.tolist())) == [4, 8, 16, 32, 64, 128, 256, 512]
    assert sorted(set(shifts.tolist())) == list(range(16))


@pytest.mark.parametrize(("head_dim", "num_scales"), [(8, 8), (16, 8), (64, 8), (96, 8), (6, 3), (5, 1), (1, 1)])
def test_other_head_sizes(head_dim, num_scales):
    scales, shifts = continuous.scale_shift_grid(head_dim, num_scales, -2)
    slow_scales, slow_shifts = oracle.grid(head_dim, num_scales, -2)
    np.testing.assert_array_equal(scales, slow_scales)
    np.testing.assert_array_equal(shifts, slow_shifts)


@pytest.mark.parametrize("first_exponent", [-60, 120])
def test_scales_to_the_ends_of_float32(first_exponent):
    scales, _ = continuous.scale_shift_grid(8, first_exponent=first_exponent)
    np.testing.assert_array_equal(np.log2(scales.astype(np.float64)), np.arange(first_exponent, first_exponent + 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 8), r"8 scales cannot fill a head of 100 .*set num_scales to one of \[1, 2, 4, 5, 10, .*nearest 10"),
        ((12, 8), r"nearest 6"),
        ((4, 8), r"nearest 4"),
        ((8, 0), r"0 scales .*nearest 1"),
        ((0, 8), r"cannot fill a head of 0"),
        ((128, 8, 121), r"first_exponent 121 with 8 scales .*allowed are -60 to 120"),
        ((128, 8, -61), r"first_exponent -61"),
    ],
)
def test_grids_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        continuous.scale_shift_grid(*arguments)


# --- p[t, j] ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_sign", continuous.T_SIGNS)
@pytest.mark.parametrize("mother", MOTHERS)
def test_positions_are_the_slow_loops(mother, t_sign):
    """Eq. (14) over Eq. (13)'s grid. Scales and shifts are whole, so x is exact and the Haar's steps are too."""
    distances = np.concatenate([np.arange(-20, 150), [-700, 255, 256, 640, 1500, 2047]]).astype(np.int32)
    scales, shifts = continuous.scale_shift_grid(32, num_scales=8)
    ours = jitted(mother, t_sign)(distances, scales, shifts)
    assert ours.dtype == jnp.float32
    slow = slow_table(distances, scales, shifts, mother, t_sign)
    assert np.abs(slow).max() > 0.9
    np.testing.assert_allclose(ours, slow, rtol=0, atol=value_tolerance(mother))


@pytest.mark.parametrize("mother", SMOOTH)
def test_any_scale_and_shift(mother):
    """Fractional ones too, small negative t included, where -4096 + 4095 would lose the shift's digits."""
    rng = np.random.default_rng(0)
    scales, shifts = np.exp(rng.uniform(-1, 5, 64)).astype(np.float32), rng.uniform(-9, 9, 64).astype(np.float32)
    distances = np.array([*range(-12, 12), -4097, -4095, 4095, 4096, 4097, 100])
    ours = jitted(mother)(distances, scales, shifts)
    np.testing.assert_allclose(
        ours, slow_table(distances, scales, shifts, mother), rtol=0, atol=value_tolerance(mother)
    )


@pytest.mark.parametrize("mother", MOTHERS)
def test_the_height_does_not_fall_with_the_scale(mother):
    """Eq. (11) has no 1 / sqrt(a), unlike Eq. (2): at its centre (or inside its step) every wavelet is 1."""
    scales = 2.0 ** np.arange(0, 24, dtype=np.float32)
    x = {"haar": -0.25, "haar_standard": 0.25}.get(mother, 0.0)
    heights = jax.vmap(functools.partial(continuous.wavelet, mother=mother))(scales * x, scales, jnp.zeros(24))
    np.testing.assert_array_equal(heights, 1)


@pytest.mark.parametrize("mother", SMOOTH)
def test_distances_to_the_end_of_int32(mother):
    """Finite and right, with scales from one token to the end of float32, on both sides."""
    distances = np.array(
        [*(FURTHEST - k for k in (0, 1, 7, 127, 128)), 2**30 + 1, 2**24 + 1, 2**24 - 1, 1_000_003, 100_001, 65_537]
    )
    distances = np.concatenate([distances, -distances]).astype(np.int32)
    scales = (2.0 ** np.array([-60, 0, 7, 16, 20, 24, 28, 30, 31, 32, 40, 64, 120, 127])).astype(np.float32)
    shifts = np.resize([0, 15, 3.5, -2], scales.shape).astype(np.float32)
    slow = slow_table(distances, scales, shifts, mother)
    assert ((np.abs(slow) > 0.01) & (np.abs(slow) < 0.99)).sum() > 20  # not only zeros and ones
    for t_sign, sign in (("m-n", 1), ("n-m", -1)):
        ours = jitted(mother, t_sign)(sign * distances, scales, shifts)
        np.testing.assert_allclose(ours, slow, rtol=0, atol=value_tolerance(mother))


@pytest.mark.parametrize("mother", ["haar", "haar_standard"])
def test_haar_to_the_end_of_int32(mother):
    """Scales that keep x off the steps by more than its rounding."""
    distances = np.array([FURTHEST, -FURTHEST, 2**30 + 7, -(2**30) - 7, 123_456_789, -123_456_789], np.int32)
    scales = (1.3 * 2.0 ** np.array([-60, 0, 10, 24, 28, 29, 30, 31, 32, 40, 120])).astype(np.float32)
    slow = slow_table(distances, scales, np.zeros(len(scales)), mother)
    assert {-1.0, 0.0, 1.0} == set(slow.ravel().tolist())
    np.testing.assert_array_equal(jitted(mother)(distances, scales, np.zeros_like(scales)), slow)


def test_far_centres_are_exact():
    """t - b cancels exactly near b, as far out as float32 holds b: no digit of the distance to the centre is lost."""
    near = np.arange(-6, 7)
    for centre in (2**30, -(2**30), 2**24, 40_960, 4_096):
        ours = jitted("ricker")(centre + near, np.ones(1, np.float32), np.full(1, centre, np.float32))[:, 0]
        np.testing.assert_allclose(ours, slow_table(near, [1.0], [0.0], "ricker")[:, 0], rtol=0, atol=VALUE)


@given(
    t=st.lists(st.integers(-FURTHEST, FURTHEST) | st.integers(-300, 300), min_size=16, max_size=16),
    exponents=st.lists(st.floats(-8, 40), min_size=4, max_size=4),
    shifts=st.lists(st.floats(-15, 15, width=32), min_size=4, max_size=4),
    mother=st.sampled_from(SMOOTH),
    t_sign=st.sampled_from(continuous.T_SIGNS),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_distance(t, exponents, shifts, mother, t_sign):
    distances, scales, shifts = np.int32(t), np.exp2(exponents).astype(np.float32), np.float32(shifts)
    ours = jitted(mother, t_sign)(distances, scales, shifts)
    np.testing.assert_allclose(
        ours, slow_table(distances, scales, shifts, mother, t_sign), rtol=0, atol=value_tolerance(mother)
    )


def test_shapes():
    """Distances of any shape; [D] or [H, D] grids; heads lead."""
    rng = np.random.default_rng(1)
    scales, shifts = rng.uniform(1, 9, (3, 5)), rng.uniform(0, 4, (3, 5))
    for shape in ((), (4,), (2, 4), (2, 3, 4)):
        distance = rng.integers(-9, 9, shape)
        per_head = jitted("ricker")(distance, scales, shifts)
        assert per_head.shape == (3, *shape, 5)
        for h in range(3):
            one = jitted("ricker")(distance, scales[h], shifts[h])
            assert one.shape == (*shape, 5)
            flat = slow_table(np.ravel(distance), scales[h], shifts[h], "ricker").reshape(one.shape)
            np.testing.assert_allclose(one, flat, rtol=0, atol=VALUE)
            np.testing.assert_allclose(per_head[h], flat, rtol=0, atol=VALUE)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("t_sign", continuous.T_SIGNS)
def test_narrow_and_unsigned_distances(dtype, t_sign):
    """An unsigned distance has no negative; an int8 has no 4096."""
    distance = np.arange(20, dtype=dtype)
    scales, shifts = continuous.scale_shift_grid(8, 4)
    ours = jitted("ricker", t_sign)(distance, scales, shifts)
    np.testing.assert_allclose(ours, slow_table(distance, scales, shifts, "ricker", t_sign), rtol=0, atol=VALUE)


def test_a_mother_of_ones_own():
    def lorentzian(x):
        return 1 / (1 + x * x)

    ours = continuous.wavelet_position(np.arange(5), np.full(2, 2.0), np.array([0.0, 1.0]), mother=lorentzian)
    slow = [[1 / (1 + (t / 2) ** 2), 1 / (1 + ((t - 1) / 2) ** 2)] for t in range(5)]
    np.testing.assert_allclose(ours, slow, rtol=0, atol=VALUE)


def test_float64_where_asked():
    """With 64-bit mode on and float64 scales the whole path is float64 (the angle of a Morlet's cosine is float32)."""
    with jax.enable_x64(True):
        for mother in ("ricker", "gaussian"):
            ours = continuous.wavelet_position(np.arange(-30, 90), np.full(3, 7.3), np.array([0.1, 2.7, 5]), mother)
            assert ours.dtype == jnp.float64
            slow = slow_table(range(-30, 90), np.full(3, 7.3), [0.1, 2.7, 5], mother)
            np.testing.assert_allclose(ours, slow, rtol=0, atol=1e-15)


def test_vmap_and_jit_change_nothing():
    scales, shifts = continuous.scale_shift_grid(16)
    distance = np.arange(-8, 40).reshape(6, 8)
    eager = continuous.wavelet_position(distance, scales, shifts)
    mapped = jax.vmap(jitted("ricker"), in_axes=(0, None, None))(distance, scales, shifts)
    np.testing.assert_allclose(mapped, eager, rtol=0, atol=VALUE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mother": "rickr"}, r"unknown mother wavelet 'rickr': did you mean 'ricker'\? allowed are ricker, gaussian"),
        ({"mother": "zzz"}, r"unknown mother wavelet 'zzz': allowed are"),
        ({"t_sign": "m+n"}, r"unknown t_sign 'm\+n': did you mean 'm-n'\? allowed are m-n, n-m"),
        ({"scales": np.ones(3)}, r"scales \(3,\) and shifts \(4,\) must have one shape: \[D\] or \[H, D\]"),
        ({"scales": np.ones((1, 1, 4)), "shifts": np.ones((1, 1, 4))}, r"must have one shape"),
        ({"scales": 1.0, "shifts": 0.0}, r"must have one shape"),
    ],
)
def test_positions_refused(change, message):
    arguments = {"distance": np.arange(3), "scales": np.ones(4), "shifts": np.zeros(4), **change}
    with pytest.raises(UserError, match=message):
        continuous.wavelet_position(**arguments)


def test_user_errors_are_value_errors_and_name_what_is_near():
    assert issubclass(UserError, ValueError)
    assert str(unknown("fruit", "aple", ["pear", "apple"])) == (
        "unknown fruit 'aple': did you mean 'apple'? allowed are pear, apple"
    )
    assert str(unknown("fruit", "xyz", [])) == "unknown fruit 'xyz': allowed are none"


# --- Gradients with respect to scales and shifts ---------------------------------------------------------------


@pytest.mark.parametrize("mother", SMOOTH)
def test_the_oracles_gradients_are_finite_differences(mother):
    """Holds the formulas that the next tests use to central differences in float64 (truncation about step^2)."""
    step = 1e-5
    for t, scale, shift in [(3, 2.0, 0.5), (-7, 5.5, 1.25), (0, 0.7, -0.3), (40, 32.0, 15.0)]:
        by_scale = (oracle.psi(mother, t, scale + step, shift) - oracle.psi(mother, t, scale - step, shift)) / 2 / step
        by_shift = (oracle.psi(mother, t, scale, shift + step) - oracle.psi(mother, t, scale, shift - step)) / 2 / step
        np.testing.assert_allclose(
            oracle.psi_gradient(mother, t, scale, shift), (by_scale, by_shift), rtol=0, atol=1e-8
        )


def gradients(mother: str, distances, scales, shifts):
    """d p[t, j] / d a_j and / d b_j, each [N, D], by jax.grad of the scalar function."""
    one = jax.grad(functools.partial(continuous.wavelet, mother=mother), argnums=(1, 2))
    over_dims = jax.vmap(one, in_axes=(None, 0, 0))
    return jax.jit(jax.vmap(over_dims, in_axes=(0, None, None)))(distances, scales, shifts)


@pytest.mark.parametrize("mother", MOTHERS)
def test_gradients_by_scale_and_shift(mother):
    rng = np.random.default_rng(2)
    scales, shifts = np.exp2(rng.uniform(-2, 7, 24)).astype(np.float32), rng.uniform(-5, 15, 24).astype(np.float32)
    distances = np.array([*range(-10, 30), 100, 300, -300, 5000], np.int32)
    by_scale, by_shift = gradients(mother, distances, scales, shifts)
    slow = np.array(
        [
            [oracle.psi_gradient(mother, int(t), a, b) for a, b in zip(*np.float64((scales, shifts)), strict=True)]
            for t in distances
        ]
    )
    # In units of 1 / a; the Morlet's own cosine has slope 1, that is, a units of 1 / a.
    unit = 1 / np.minimum(scales, 1) if mother == "morlet" else 1 / scales
    assert (np.abs(by_scale - slow[..., 0]) <= GRADIENT * unit).all()
    assert (np.abs(by_shift - slow[..., 1]) <= GRADIENT * unit).all()
    assert (np.abs(slow).max() > 0.1) == (mother in SMOOTH)


@pytest.mark.parametrize("mother", MOTHERS)
def test_gradients_are_finite_everywhere(mother):
    distances = np.array([0, 1, -1, 41, FURTHEST, -FURTHEST], np.int32)
    scales = (2.0 ** np.array([-60, -10, 0, 7, 31, 64, 120, 127])).astype(np.float32)
    for gradient in gradients(mother, distances, scales, np.ones_like(scales)):
        assert np.isfinite(gradient).all()


def test_gradients_of_a_grid_for_each_head():
    """A reverse pass through [H, N, D] against the sum of the oracle's formulas."""
    rng = np.random.default_rng(3)
    heads, dims, distances = 3, 8, np.arange(-5, 25)
    scales = np.exp2(rng.uniform(0, 4, (heads, dims))).astype(np.float32)
    shifts = rng.uniform(0, 6, (heads, dims)).astype(np.float32)
    cotangent = rng.normal(size=(heads, len(distances), dims))

    def loss(scales, shifts):
        return jnp.sum(jnp.float32(cotangent) * continuous.wavelet_position(distances, scales, shifts, t_sign="n-m"))

    ours = jax.jit(jax.grad(loss, argnums=(0, 1)))(scales, shifts)
    slow = np.zeros((2, heads, dims))
    for h in range(heads):
        for i, t in enumerate(distances):
            for j in range(dims):
                formulas = oracle.psi_gradient("ricker", -int(t), float(scales[h, j]), float(shifts[h, j]))
                slow[:, h, j] += cotangent[h, i, j] * np.array(formulas)
    # A sum of 30 terms, each within GRADIENT / a (a >= 1) times a cotangent of about 1; their errors do not conspire.
    np.testing.assert_allclose(ours, slow, rtol=0, atol=GRADIENT * 6)


@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_of_the_trainable_method(per_head):
    """`Wavelet(trainable=True)` trains log2(a) and b: d/d log2(a) = a ln(2) d/da."""
    rng = np.random.default_rng(4)
    shape = (2, 8) if per_head else (8,)
    scales, shifts = np.exp2(rng.uniform(0, 4, shape)), rng.uniform(0, 6, shape)
    method = positions.make("wavelet", num_heads=2, head_dim=8, scales=scales, shifts=shifts, trainable=True)
    params = method.init(jax.random.key(0))
    np.testing.assert_allclose(params["log2_scales"], np.log2(np.float32(scales)), rtol=0, atol=GRADIENT)
    np.testing.assert_array_equal(params["shifts"], np.float32(shifts))
    distances = np.arange(-5, 25)

    def table(params):
        return method.terms(params).relative_keys(distances)

    jacobian = jax.jit(jax.jacrev(table))(params)
    for index in np.ndindex(shape):
        a, b = 2.0 ** np.float64(params["log2_scales"][index]), np.float64(params["shifts"][index])
        formulas = np.array([oracle.psi_gradient("ricker", int(t), a, b) for t in distances])
        for name, slow in (("log2_scales", formulas[:, 0] * a * math.log(2)), ("shifts", formulas[:, 1])):
            out = (index[0], slice(None), index[1]) if per_head else (slice(None), index[0])
            np.testing.assert_allclose(jacobian[name][(*out, *index)], slow, rtol=0, atol=GRADIENT)


# --- support() -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("mother", MOTHERS)
def test_support_by_brute_force(mother, tolerance):
    """Nothing past it reaches the tolerance, on either side; and it is not much further than need be."""
    scales, shifts = continuous.scale_shift_grid(24, num_scales=6)
    ours = continuous.support(scales, shifts, mother, tolerance)
    distances = np.arange(-400, 401)
    heights = np.abs(slow_table(distances, scales, shifts, mother)).max(axis=1)
    reach = np.abs(distances[heights >= tolerance]).max()
    # A Haar ends at b + a on one side and is asked for both; a Morlet's cosine is near 0 at some distances.
    slack = {"haar": 5, "haar_standard": 3, "morlet": 5}.get(mother, 1)
    assert reach <= ours <= reach + slack


def test_support_golden_values():
    assert continuous.support(*continuous.scale_shift_grid(128)) == 652
    assert continuous.support(*continuous.scale_shift_grid(128, first_exponent=2)) == 2563


def test_support_of_heads_and_of_what_has_none():
    scales, shifts = np.array([[1.0, 2.0], [64.0, 1.0]]), np.array([[0.0, 1.0], [2.0, 3.0]])
    assert continuous.support(scales, shifts) == continuous.support(scales[1], shifts[1])
    assert continuous.support(*continuous.scale_shift_grid(8, first_exponent=40)) is None
    assert continuous.support([1.0], [0.0], lambda x: 1 / (1 + x * x)) is None  # 6e-4 at the end of the search


def test_support_while_tracing():
    """It is a constant of the grid, and may be asked for inside jit."""

    def f(x):
        return x + continuous.support(*continuous.scale_shift_grid(128, first_exponent=1), tolerance=1e-3)

    assert jax.jit(f)(0) == f(0)


# --- Angles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_angle_is_exact(theta):
    """Within 6e-7 radians of exact arithmetic at any int32 position, and for any frequency below 2 pi.

    In units of 2^-32 turns: 3 * 2^6 for the float32 product by the fractional part, 2^6 for the sum in float32; then
    pi times the rounding of the unit itself (2.8e-8), and the last product's (1.2e-7): 5.8e-7 in all.
    """
    rng = np.random.default_rng(5)
    unit = 2 * np.pi / 2**32
    frequencies = np.concatenate(
        [
            theta ** (-np.arange(0, 64) / 64),
            [1.0, 6.283, -0.5],
            (rng.integers(1, 2**32 - 2, 16) + 0.499) * unit,  # the fractional part at its largest
            rng.uniform(0, 6.28, 16),
        ]
    )
    places = [0, 1, -1, 4095, 100_000, 2**24 + 1, 2**30, FURTHEST, FURTHEST - 1, -FURTHEST]
    places = np.array([*places, *rng.integers(-FURTHEST, FURTHEST, 20)], np.int32)
    angles = np.asarray(jax.jit(lambda positions: angle(positions, frequencies))(places))
    assert angles.shape == (len(places), len(frequencies))
    assert angles.dtype == np.float32
    assert np.abs(angles).max() <= np.float32(np.pi)
    worst = max(
        oracle.angle_error(float(angles[i, j]), int(places[i]), float(frequencies[j]))
        for i, j in np.ndindex(angles.shape)
    )
    assert worst <= 6e-7


def test_angle_of_other_types():
    """Any integer dtype and shape; floating-point positions are multiplied as they are."""
    frequencies = np.array([1.0, 0.01])
    angle_of = jax.jit(lambda positions: angle(positions, frequencies))
    for dtype in (np.int8, np.uint8, np.int16, np.uint32, np.int32):
        angles = np.asarray(angle_of(np.array([[0, 3], [100, 7]], dtype)))
        assert angles.shape == (2, 2, 2)
        assert oracle.angle_error(float(angles[1, 0, 0]), 100, 1.0) <= 6e-7
    floating = angle_of(jnp.array([2.5, -40.0]))  # two float32 roundings: of the frequency and of the product
    np.testing.assert_allclose(floating, [[2.5, 0.025], [-40, -0.4]], rtol=2e-7)
    negative = np.asarray(angle_of(np.array([[-100, -3], [0, 1]], np.int8)))
    assert oracle.angle_error(float(negative[0, 0, 0]), -100, 1.0) <= 6e-7
