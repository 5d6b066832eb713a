"""Wavelet positions: scalar mother wavelets, the (scale, shift) grid, and p[t, j] of Eq. (14).

Oka, Hasegawa, Nishida, Saito, "Wavelet-based Positional Representation for Long Context" (ICLR 2025,
arXiv 2502.02004), section 5; equation numbers are the paper's. Everything here is a pure function that works
under jit, vmap and grad, and needs nothing of this package but `angles`, `concrete`, `errors` and `integers`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wavelet_jax.angles import angle, int32_or_float
from wavelet_jax.concrete import concretely
from wavelet_jax.errors import UserError, unknown

# exp(-x^2 / 2) is 0 past here in float32 and in float64. Clipping keeps x^2 finite: (1 - inf) * 0 is NaN.
_FAR = 40.0


def ricker(x: jax.Array) -> jax.Array:
    """Ricker ("Mexican hat") wavelet, Eq. (12): (1 - x^2) exp(-x^2 / 2), elementwise."""
    x = jnp.clip(x, -_FAR, _FAR)
    return (1 - x * x) * jnp.exp(-x * x / 2)


def gaussian(x: jax.Array) -> jax.Array:
    """Gaussian, section 6.3.1: exp(-x^2), elementwise."""
    x = jnp.clip(x, -_FAR, _FAR)
    return jnp.exp(-x * x)


def morlet(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Morlet wavelet, section 6.3.1: exp(-x^2) cos(scale * x), elementwise.

    The scale stretches the envelope and not the cosine: with x = (t - b) / a the cosine is cos(t - b).
    """
    return gaussian(x) * jnp.cos(scale * x)


def haar(x: jax.Array) -> jax.Array:
    """Haar wavelet as the paper prints it, Eq. (15), elementwise: +1 on [-0.5, 0), -1 on [-1, -0.5), 0 elsewhere.

    It is zero for x >= 0, so with t = m - n >= 0 its support is t in [b - a, b) only. Under a causal mask
    use it with `t_sign="n-m"`, or use `haar_standard`. A step: its derivative is 0 wherever there is one.
    """
    return jnp.where((x >= -1) & (x < 0), jnp.where(x >= -0.5, 1.0, -1.0), 0.0).astype(jnp.result_type(x, float))


def haar_standard(x: jax.Array) -> jax.Array:
    """The textbook Haar wavelet, causal for t = m - n: +1 on [0, 0.5), -1 on [0.5, 1), 0 elsewhere; elementwise."""
    return jnp.where((x >= 0) & (x < 1), jnp.where(x < 0.5, 1.0, -1.0), 0.0).astype(jnp.result_type(x, float))


Mother = Callable[..., jax.Array]  # psi(x) of scaled and shifted t, elementwise; Morlet: psi(x, scale)
MOTHERS: dict[str, Mother] = {
    "ricker": ricker,
    "gaussian": gaussian,
    "morlet": morlet,
    "haar": haar,
    "haar_standard": haar_standard,
}
T_SIGNS = ("m-n", "n-m")


def wavelet(t: ArrayLike, scale: ArrayLike, shift: ArrayLike, mother: str | Mother = "ricker") -> jax.Array:
    """One value psi((t - b) / a), Eq. (11); the height is not divided by sqrt(a), unlike in Eq. (2).

    Args:
      t: scalar, integer (any int32 but -2^31) or floating-point.
      scale: scalar a > 0, from 2^-60 to 2^127. x is exact for powers of two and whole shifts, but that hardware
        without subnormal numbers takes it for 0 at 2^127 (1/a is one): both are far inside of psi's flat top.
      shift: scalar b.
      mother: one of `MOTHERS`, or a scalar function psi(x).

    Returns:
      A float32 scalar (float64 if the scale or shift is). Differentiable in scale and shift.

    Raises:
      UserError: unknown name of a mother wavelet; t that is not a number, or is past int32 (a traced one wraps around).
    """
    if not callable(mother) and mother not in MOTHERS:
        raise unknown("mother wavelet", mother, MOTHERS)
    t = jnp.asarray(int32_or_float(t))
    dtype = jnp.result_type(scale, shift, jnp.float32)
    scale, shift = jnp.asarray(scale, dtype), jnp.asarray(shift, dtype)
    if jnp.issubdtype(t.dtype, jnp.integer):
        # float32 holds integers to 2^24 only. Both parts of t are exact, and t near b cancels exactly. `rem` has
        # the sign of t: a small negative t must not become -4096 + 4095, which loses a fractional shift's digits.
        low = jax.lax.rem(t, jnp.int32(4096))
        offset = ((t - low).astype(dtype) - shift) + low.astype(dtype)
    else:
        offset = t.astype(dtype) - shift
    x = offset / scale
    if mother == "morlet":  # cos(t - b) from the reduced angle of t: scale * x would lose it far away
        cosine = jnp.cos(angle(t, np.ones(1))[0].astype(dtype) - shift)
        return gaussian(x) * cosine
    return (mother if callable(mother) else MOTHERS[mother])(x)


def num_shifts(head_dim: int, count: int, kind: str) -> int:
    """d/s, the shifts of a grid: how many per head of d dimensions has for each of s scales (or levels: `kind`).

    Raises:
      UserError: s does not divide d.
    """
    if count < 1 or head_dim < 1 or head_dim % count:
        divisors = [s for s in range(1, max(head_dim, 0) + 1) if head_dim % s == 0]
        near = min(divisors, key=lambda s: (abs(s - count), s)) if divisors else None
        otherwise = ", or give scales and shifts yourself" if kind == "scales" else ""
        raise UserError(
            f"{count} {kind} cannot fill a head of {head_dim} dimensions evenly: "
            f"set num_{kind} to one of {divisors} (nearest {near}){otherwise}"
        )
    return head_dim // count


def scale_shift_grid(head_dim: int, num_scales: int = 8, first_exponent: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The (scale, shift) pairs of Eq. (13): {2^e .. 2^(e+s-1)} x {0 .. d/s - 1}, one pair per head dimension.

    Args:
      head_dim: d, the size of one head.
      num_scales: s, which must divide d.
      first_exponent: e; the paper takes 0, and 2 in its long-context runs (section 7).

    Returns:
      (scales[d], shifts[d]) in float32, scale by scale. Their order only permutes query dimensions.

    Raises:
      UserError: s does not divide d, or a scale is past float32.
    """
    shifts = np.arange(num_shifts(head_dim, num_scales, "scales"))
    if not -60 <= first_exponent <= 128 - num_scales:
        raise UserError(
            f"first_exponent {first_exponent} with {num_scales} scales leaves float32: "
            f"allowed are -60 to {128 - num_scales}"
        )
    exponents = np.arange(first_exponent, first_exponent + num_scales)
    scale_grid, shift_grid = np.meshgrid(2.0**exponents, shifts, indexing="ij")
    return scale_grid.ravel().astype(np.float32), shift_grid.ravel().astype(np.float32)


def wavelet_position(
    distance: ArrayLike,
    scales: ArrayLike,
    shifts: ArrayLike,
    mother: str | Mother = "ricker",
    t_sign: str = "m-n",
) -> jax.Array:
    """The relative position vectors p[t, j] = psi((t - b_j) / a_j), Eq. (14), for every distance.

    Args:
      distance: integers of any shape [...]: query position m minus key position n, tokens.
      scales: a, [D], or [H, D] where heads have grids of their own.
      shifts: b, of the same shape.
      mother: one of `MOTHERS`, or a scalar function psi(x).
      t_sign: "m-n" (Eq. 14: a wavelet's centre lies b tokens in the past) or "n-m" (footnote 8 and tip 2
        of A.6: b tokens in the future, so that a causal model sees one flank only).

    Returns:
      [..., D], or [H, ..., D], float32. Differentiable in scales and shifts.

    Raises:
      UserError: unknown mother or sign; scales and shifts of different or wrong shapes; distances that are not
        numbers, or are past int32 (traced ones wrap around).
    """
    if t_sign not in T_SIGNS:
        raise unknown("t_sign", t_sign, T_SIGNS)
    if np.shape(scales) != np.shape(shifts) or np.ndim(scales) not in (1, 2):
        raise UserError(f"scales {np.shape(scales)} and shifts {np.shape(shifts)} must have one shape: [D] or [H, D]")
    distance = jnp.asarray(int32_or_float(distance))  # an unsigned distance has no negative
    t = distance if t_sign == "m-n" else -distance
    position = functools.partial(wavelet, mother=mother)
    position = jax.vmap(position, in_axes=(None, 0, 0))  # over head dimensions
    position = jax.vmap(position, in_axes=(0, None, None))  # over distances
    if np.ndim(scales) == 2:
        position = jax.vmap(position, in_axes=(None, 0, 0))  # over heads
    vectors = position(t.reshape(-1), jnp.asarray(scales), jnp.asarray(shifts))
    return vectors.reshape(*vectors.shape[:-2], *distance.shape, vectors.shape[-1])


@functools.cache
def _reach(mother: str | Mother, tolerance: float) -> float:
    """The largest |x| at which |psi(x)| is at least `tolerance`, to 1e-3; infinite where that is still so at +-40."""
    x = np.linspace(-_FAR, _FAR, 80_001)
    # A Morlet's envelope is the Gaussian, whatever its scale.
    psi = mother if callable(mother) else gaussian if mother == "morlet" else MOTHERS[mother]
    with concretely():
        heights = np.abs(np.asarray(jax.vmap(psi)(jnp.asarray(x, jnp.float32))))
    if max(heights[0], heights[-1]) >= tolerance:
        return np.inf
    return float(np.max(np.abs(x), where=heights >= tolerance, initial=0.0)) + 1e-3


def support(
    scales: np.ndarray, shifts: np.ndarray, mother: str | Mother = "ricker", tolerance: float = 1e-4
) -> int | None:
    """The distance past which every wavelet of the grid stays below `tolerance`.

    Args:
      scales, shifts: [D], the grid, in tokens.
      mother: one of `MOTHERS`, or a function like them.
      tolerance: a value of |psi|.

    Returns:
      A count of tokens (652 for Ricker at 1e-4 with scales 2^0..2^7 and shifts 0..15), or None where it is
      past any int32 distance.

    Raises:
      UserError: a tolerance below 0, or one that all wavelets are below everywhere: 1 and more.
    """
    if not 0 <= tolerance < 1:
        raise UserError(f"the tolerance of a support must be at least 0 and below 1, not {tolerance}")
    scales, shifts = np.asarray(scales, np.float64), np.asarray(shifts, np.float64)
    furthest = np.max(np.abs(shifts) + scales * _reach(mother, tolerance))
    return int(np.ceil(furthest)) if furthest < 2**31 else None
