"""Windows of attention by positions alone: ALiBi's slopes and wavelets' scales as windows, without a model."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.positions.wavelet import Wavelet
from wavelet_jax.wavelets import support, wavelet_position

SHARES = (0.5, 0.9, 0.99)  # of the mass, that a window is stated for
# Wavelets whose support is longer than this are not summed up: their windows are past any text.
LONGEST = 2**24
_PART = 1024  # distances that are evaluated at a time


def alibi_window(slope: float, share: float, length: int | None = None) -> int:
    """The distance within which ALiBi's bias alone leaves `share` of the attention, tokens.

    Where all keys score the same without it, the softmax of -slope * t over t = 0 .. length - 1 is a geometric series:

        p(t) = exp(-slope t) (1 - exp(-slope)) / (1 - exp(-slope length))
        sum of p(0) .. p(t) = (1 - exp(-slope (t + 1))) / (1 - exp(-slope length))

    and the sum reaches the share at t + 1 = -log(1 - share (1 - exp(-slope length))) / slope.

    Args:
      slope: of the head, > 0.
      share: between 0 and 1.
      length: keys that the query sees; None for an endless text.

    Returns:
      The smallest t at which the sum reaches the share.
    """
    whole = 1.0 if length is None else -math.expm1(-slope * length)
    reached = -math.log1p(-share * whole) / slope
    # A share that is reached exactly must not be passed by a rounding.
    return max(0, math.ceil(reached * (1 - 1e-12)) - 1)


def alibi_band(slope: float, threshold: float) -> int:
    """The furthest distance at which ALiBi's bias alone leaves a probability of at least `threshold`, tokens.

    p(t) = (1 - exp(-slope)) exp(-slope t) in an endless text (see `alibi_window`), so
    t = log((1 - exp(-slope)) / threshold) / slope, rounded down; -1 where no distance has as much. It is the width of
    the black bands of the paper's Figure 2.
    """
    highest = -math.expm1(-slope)
    return math.floor(math.log(highest / threshold) / slope * (1 + 1e-12)) if highest >= threshold else -1


@dataclasses.dataclass(frozen=True)
class ScaleWindow:
    """The reach of a scale of a wavelet grid, all its shifts together; None: further than `LONGEST` tokens.

    Attributes:
      scale: a.
      support: the distance past which each of its wavelets is below the tolerance, tokens.
      distances: by share of `SHARES`, the distance within which the sum over t >= 0 of |p[t, j]| reaches it.
    """

    scale: float
    support: int | None
    distances: tuple[int | None, ...]


def wavelet_windows(method: Wavelet, shares: Sequence[float] = SHARES) -> list[ScaleWindow]:
    """The window of every scale of the method's grid, smallest first, on the causal side (distances t >= 0).

    The support is stated for `method.support_tolerance`. Unlike ALiBi's, these windows hide nothing: a wavelet near 0
    leaves the content's score as it is.
    """
    scales, shifts = (grid.ravel() for grid in method.grid())
    found = []
    for scale in np.unique(scales):
        its_shifts = shifts[scales == scale]
        reach = support(np.full_like(its_shifts, scale), its_shifts, method.mother, method.support_tolerance)
        if reach is None or reach > LONGEST:
            found.append(ScaleWindow(float(scale), None, (None,) * len(shares)))
            continue
        parts = [
            _heights(np.int32(first), np.full_like(its_shifts, scale), its_shifts, method.mother, method.t_sign)
            for first in range(0, reach + 1, _PART)
        ]
        mass = np.concatenate(parts)[: reach + 1]
        found.append(ScaleWindow(float(scale), reach, tuple(distance_of(mass, share) for share in shares)))
    return found


@functools.partial(jax.jit, static_argnums=(3, 4))
def _heights(first: jax.Array, scales: jax.Array, shifts: jax.Array, mother: str | Callable, t_sign: str) -> jax.Array:
    """The sum over wavelets of |p[t, j]| at the `_PART` distances from `first` on: one program for any reach."""
    distance = first + jnp.arange(_PART, dtype=jnp.int32)
    return jnp.sum(jnp.abs(wavelet_position(distance, scales, shifts, mother, t_sign)), axis=-1)


def distance_of(mass_T: np.ndarray, share: float) -> int | None:
    """The smallest distance t at which mass[0] + .. + mass[t] reaches the share of it all; None where there is none."""
    total = np.cumsum(mass_T, dtype=np.float64)
    if not total[-1] > 0:
        return None
    return int(np.argmax(total >= share * total[-1] * (1 - 1e-12)))
