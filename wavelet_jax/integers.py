"""Positions, distances and ids of segments as int32, refused where they do not fit."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from wavelet_jax.errors import UserError

LOWEST, HIGHEST = -(2**31), 2**31 - 1  # of int32


def as_int32(name: str, values: Any) -> np.ndarray | jax.Array:
    """Integers of any integer dtype as int32, of the same shape.

    Args:
      name: what the values are, for the message.
      values: a Python integer or nested sequence, a NumPy array (which stays one), or a JAX array. Traced values are
        converted as they are: what does not fit into int32 (a uint32, or an int64 under `jax_enable_x64`) wraps around.

    Raises:
      UserError: not integers, or a value that int32 does not hold.
    """
    if isinstance(values, list | tuple):
        values = np.asarray(values)
    if isinstance(values, bool) or not (isinstance(values, numbers.Integral) or hasattr(values, "dtype")):
        raise UserError(f"{name} must be integers, not {shown(values)}")
    if isinstance(values, numbers.Integral):
        check_range(name, int(values), int(values))
        return np.asarray(values, np.int32)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise UserError(f"{name} must be integers, not {values.dtype}")
    if isinstance(values, Tracer):
        return values.astype(jnp.int32)
    holds = jnp.iinfo(values.dtype)
    if np.size(values) and (holds.min < LOWEST or holds.max > HIGHEST):
        check_range(name, int(np.min(values)), int(np.max(values)))
    return values.astype(np.int32)


def check_range(name: str, low: int, high: int) -> None:
    """Raises `UserError` where low or high is past int32."""
    for value in (low, high):
        if not LOWEST <= value <= HIGHEST:
            raise UserError(f"{name} must be integers from -2^31 to 2^31 - 1 (int32), not {value}")


def shown(value: Any) -> str:
    """A wrong argument in a few words: its kind, and its value if that is short."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
