"""Angles of integer positions, right at any position an int32 can hold.

`position * frequency` in float32 is wrong by 0.004 radians at position 100,000 and by whole turns at
2^31; in bfloat16 it is wrong by radians at a few thousand. An integer product that wraps around at 2^32 is
exact, and 2^32 can stand for one full turn: so the angle is counted in units of 2^-32 turns.
"""

import jax
import jax.numpy as jnp
import numpy as np

_UNITS_A_RADIAN = 2.0**32 / (2 * np.pi)


def angle(positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """`positions * frequencies` in radians, reduced to [-pi, pi] where the positions are integers.

    Args:
      positions: any shape [...]. Integers in (-2^31, 2^31) give angles within 5e-7 radians of the exact
        ones; floating-point positions are multiplied in float32 and not reduced.
      frequencies: [F] constants (not traced), radians a position, |frequency| < 2 pi, in float64.

    Returns:
      [..., F] float32.
    """
    positions = jnp.asarray(positions)[..., None]
    frequencies = np.asarray(frequencies, np.float64)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        return positions.astype(jnp.float32) * frequencies.astype(np.float32)
    units = frequencies * _UNITS_A_RADIAN
    whole = np.round(units)
    # |fraction| <= 1/2, so a float32 product with a position is wrong by 2^6 units of 2^-32 turns at most.
    fraction = (units - whole).astype(np.float32)
    wrapped = positions.astype(jnp.uint32) * (whole % 2.0**32).astype(np.uint32)
    correction = jnp.round(positions.astype(jnp.float32) * fraction).astype(jnp.int32)
    turns = jax.lax.bitcast_convert_type(wrapped, jnp.int32) + correction  # wraps, as angles do
    return turns.astype(jnp.float32) * np.float32(1 / _UNITS_A_RADIAN)
