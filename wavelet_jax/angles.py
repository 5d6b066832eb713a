"""Angles of integer positions, right at any position an int32 can hold.

`position * frequency` in float32 is wrong by 0.004 radians at position 100,000 and by whole turns at
2^31; in bfloat16 it is wrong by radians at a few thousand. An integer product that wraps around at 2^32 is
exact, and 2^32 can stand for one full turn: so the angle is counted in units of 2^-32 turns.
"""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.integers import as_int32

_TURN = 2 * Fraction("3.14159265358979323846264338327950288419716939937510")  # radians


def angle(positions: jax.typing.ArrayLike, frequencies: np.ndarray) -> jax.Array:
    """`positions * frequencies` in radians, reduced to [-pi, pi] where the positions are integers.

    Args:
      positions: any shape [...]. Integers in (-2^31, 2^31) give angles within 6e-7 radians of the exact
        ones; floating-point positions are multiplied in float32 and not reduced.
      frequencies: [F] constants (not traced), radians per position, |frequency| < 2 pi, in float64.

    Returns:
      [..., F] float32.

    Raises:
      UserError: positions that are not numbers, or are past int32 (traced ones wrap around).
    """
    positions = jnp.asarray(int32_or_float(positions))[..., None]
    frequencies = np.asarray(frequencies, np.float64)
    along_last = (1,) * (positions.ndim - 1) + (-1,)  # of one rank with the positions: JAX can be told to promote none
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        return positions.astype(jnp.float32) * frequencies.astype(np.float32).reshape(along_last)
    whole, fraction = (units.reshape(along_last) for units in _units(tuple(frequencies.tolist())))
    wrapped = positions.astype(jnp.uint32) * whole
    # |fraction| <= 1/2, so this float32 product is wrong by 3 * 2^6 units of 2^-32 turns at most.
    correction = jnp.round(positions.astype(jnp.float32) * fraction).astype(jnp.int32)
    turns = jax.lax.bitcast_convert_type(wrapped, jnp.int32) + correction  # wraps, as angles do
    return turns.astype(jnp.float32) * np.float32(_TURN / 2**32)


def int32_or_float(positions: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """Positions or distances as int32, or as they are where they are floating-point."""
    if isinstance(positions, list | tuple):
        positions = np.asarray(positions)
    dtype = getattr(positions, "dtype", None)
    is_float = isinstance(positions, float) if dtype is None else jnp.issubdtype(dtype, jnp.floating)
    return positions if is_float else as_int32("positions and distances", positions)


@functools.cache
def _units(frequencies: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in units of 2^-32 turns per position: the nearest whole ones (uint32) and the rest (float32).

    Exact before that rounding: float64 would be wrong by 2^-20 units, times 2^31 positions.
    """
    units = [Fraction(frequency) * 2**32 / _TURN for frequency in frequencies]
    whole = [round(unit) for unit in units]
    fraction = [float(unit - nearest) for unit, nearest in zip(units, whole, strict=True)]
    return np.array([nearest % 2**32 for nearest in whole], np.uint32), np.array(fraction, np.float32)
