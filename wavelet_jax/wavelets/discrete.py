"""Discrete wavelets as position vectors (A.14, Table 4): PyWavelets' samples, looked up by distance.

The paper takes "8 levels of {1, 2, .., 8} instead of the 8-pattern scale parameters", shifts 0 .. 15, and the values
that PyWavelets computes; how a relative position t, a shift b and a level l pick a value is not stated. `wavefun(l)`
returns psi in steps of 2^-l over its support [0, N - 1], N the length of the filters: 2^l (N - 1) steps. Readings:

  sampling="level"  one value per token as they come, p[t, j] = wavefun(l_j)[t - b_j], and 0 outside. The default:
                    supports double from level to level, so that levels do stand in the place of scales.
  sampling="fine"   Eq. (11) with a = 2^l: psi((t - b) / 2^l), read off wavefun(12). Level 0, a = 1, exists here only.
                    The cascade of level l stands a few tokens to the left of that (the mean of phi: 0.6 for db2, 6 for
                    db32, 30 for dmey), and is coarse at the first levels.
  (not offered)     the level as resolution only, one token per unit of psi's own x. All levels would be nearly one
  column,
                    a = 1, and rbio1.1, which is the Haar wavelet, would share the fate of fixed-scale Haar (Table 3:
                    299 at 2,512 tokens); Table 4 has it at 18.98, near the 18.17 of Haar with its eight scales.

  origin="start"    the first value stands at t = b, as psi's x begins at 0: the whole wavelet lies b tokens away and
                    more.
  origin="centre"   the middle of the support stands at t = b, as a Ricker's does; a causal model sees the later half.

  t_sign="m-n"      t = m - n, the distance itself.
  t_sign="n-m"      the wavelet mirrored and t = n - m, as footnote 8 says of Haar: p is read at m - n + b, so that the
                    shift moves it towards the future and a causal model misses its first b tokens. (Not mirrored, it
                    would miss all.)

Heights are psi's own, not divided by sqrt(a), as in Eq. (11): up to 2.3, but 6 for bior2.2 and 96 for bior3.1 at
level 8, whose cascades do not converge. bior and rbio: the wavelet of decomposition, as in the paper.

Table 4 speaks for the defaults. rbio1.1 ends 271 tokens away, within L_train = 512, and extrapolates; db2, db4,
rbio1.3 have lobes past 512, which no training has seen, and fail there; and where the near tokens see only a long,
nearly silent beginning (db16, db32, bior6.8), perplexities are those of no position method at all: 21.1 to 21.2 at
512 and 38 to 47 at 2,512 tokens, beside 21.53 and 48.48 of Table 1's NoPE. (That coif1, coif4, coif16, sym8 and dmey
are worse than none, to 113 at 512, no reading here explains.)

Pure functions; PyWavelets is imported where it is first needed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wavelet_jax.errors import UserError, unknown
from wavelet_jax.integers import as_int32
from wavelet_jax.ranges import Range
from wavelet_jax.wavelets.continuous import T_SIGNS, num_shifts

# The wavelets of Table 4, in its order.
TABLE_4 = (
    *("db2", "db4", "db8", "db16", "db32", "sym2", "sym4", "sym8"),
    *("coif1", "coif2", "coif4", "coif8", "coif16", "dmey"),
    *("bior1.3", "bior2.2", "bior2.6", "bior3.1", "bior3.5", "bior3.9", "bior4.4", "bior5.5", "bior6.8"),
    *("rbio1.1", "rbio1.3", "rbio2.2", "rbio2.6"),
)
SAMPLINGS = ("level", "fine")
ORIGINS = ("start", "centre")
MAX_LEVEL = 12  # 2^12 (N - 1) numbers: 413,696 for the longest filters; and the level of "fine"


@functools.cache
def samples(wavelet: str, level: int, sampling: str = "level") -> np.ndarray:
    """psi of one level, one value per token: float64 [n], zeros at both ends; n is 2^level (N - 1), or 1 or 2 more.

    Args:
      wavelet: a name of `pywt.wavelist(kind="discrete")`.
      level: 1 .. 12, or 0 .. 12 where `sampling` is "fine".
      sampling: "level" or "fine", as said above.

    Raises:
      UserError: an unknown wavelet or sampling, or a level that does not exist.
    """
    import pywt

    names = pywt.wavelist(kind="discrete")
    if wavelet not in names:
        raise unknown("discrete wavelet", wavelet, names)
    if sampling not in SAMPLINGS:
        raise unknown("sampling", sampling, SAMPLINGS)
    lowest = 1 if sampling == "level" else 0
    if not lowest <= level <= MAX_LEVEL:
        raise UserError(f"sampling {sampling!r} has levels {lowest} to {MAX_LEVEL}, not {level}")
    # wavefun gives phi, psi, x; of biorthogonal wavelets first those of decomposition, then those of reconstruction.
    psi = pywt.Wavelet(wavelet).wavefun(level if sampling == "level" else MAX_LEVEL)[1]
    return psi if sampling == "level" else psi[:: 2 ** (MAX_LEVEL - level)]


def filter_length(wavelet: str) -> int:
    """N: psi lives on [0, N - 1], in units of 2^level tokens."""
    import pywt

    return pywt.Wavelet(wavelet).dec_len


def level_shift_grid(head_dim: int, num_levels: int = 8, first_level: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The (level, shift) pairs in the place of Eq. (13)'s: {l .. l + s - 1} x {0 .. d/s - 1}, one per head dimension.

    Args:
      head_dim: d, the size of one head.
      num_levels: s, which must divide d.
      first_level: l; the paper takes 1.

    Returns:
      (levels[d], shifts[d]), int32, level by level.

    Raises:
      UserError: s does not divide d, or no wavelet has the first level.
    """
    shifts = num_shifts(head_dim, num_levels, "levels")
    Range(0, MAX_LEVEL, whole=True).check("first_level", first_level)
    levels, shifts = np.meshgrid(first_level + np.arange(num_levels), np.arange(shifts), indexing="ij")
    return levels.ravel().astype(np.int32), shifts.ravel().astype(np.int32)


class _Columns(NamedTuple):
    """The samples of all columns, each level's once and with a zero on both sides, and where a column finds its own."""

    values: np.ndarray  # float32
    start: np.ndarray  # [D] int32: the zero before the column's samples
    length: np.ndarray  # [D] int32: the samples
    origin: np.ndarray  # [D] int32: the sample at t = b


@functools.cache
def _columns(wavelet: str, levels: tuple[int, ...], sampling: str, origin: str) -> _Columns:
    if origin not in ORIGINS:
        raise unknown("origin", origin, ORIGINS)
    tables = {level: samples(wavelet, level, sampling) for level in dict.fromkeys(levels)}
    widths = [len(table) + 2 for table in tables.values()]
    start = dict(zip(tables, np.cumsum(widths) - widths, strict=True))
    middle = {level: (filter_length(wavelet) - 1) * 2**level // 2 for level in tables}
    return _Columns(
        values=np.concatenate([np.pad(table, 1) for table in tables.values()]).astype(np.float32),
        start=np.array([start[level] for level in levels], np.int32),
        length=np.array([len(tables[level]) for level in levels], np.int32),
        origin=np.array([middle[level] if origin == "centre" else 0 for level in levels], np.int32),
    )


def discrete_position(
    distance: ArrayLike,
    wavelet: str,
    levels: np.ndarray,
    shifts: np.ndarray,
    *,
    sampling: str = "level",
    origin: str = "start",
    t_sign: str = "m-n",
) -> jax.Array:
    """The relative position vectors p[t, j] of A.14 for every distance.

    Args:
      distance: integers of any shape [...]: query position m minus key position n, tokens; any int32 but -2^31.
      wavelet, sampling, origin, t_sign: as said above.
      levels, shifts: [D] integers.

    Returns:
      [..., D] float32.

    Raises:
      UserError: an unknown name, a level that does not exist, levels and shifts of different or wrong shapes, or
        distances, levels or shifts that are not integers, or distances past int32 (traced ones wrap around).
    """
    if t_sign not in T_SIGNS:
        raise unknown("t_sign", t_sign, T_SIGNS)
    levels, shifts = np.asarray(levels), np.asarray(shifts)
    if not (np.issubdtype(levels.dtype, np.integer) and np.issubdtype(shifts.dtype, np.integer)):
        raise UserError(f"levels and shifts must be integers, not {levels.dtype} and {shifts.dtype}")
    shifts = shifts.astype(np.int32)
    if levels.shape != shifts.shape or levels.ndim != 1:
        raise UserError(f"levels {levels.shape} and shifts {shifts.shape} must have one shape, [D]")
    distance = jnp.asarray(as_int32("distances of discrete wavelets", distance))
    columns = _columns(wavelet, tuple(levels.tolist()), sampling, origin)
    ahead = columns.origin + (-shifts if t_sign == "m-n" else shifts)
    # Of one rank with the distances: JAX can be told to promote none.
    ahead, length, start = (
        jnp.asarray(x, jnp.int32).reshape((1,) * distance.ndim + (-1,)) for x in (ahead, columns.length, columns.start)
    )
    # A sum past int32 wraps to the other end of it, which is as far outside of the samples.
    index = jnp.clip(distance[..., None] + ahead, -1, length)
    return jnp.asarray(columns.values).at[start + 1 + index].get(mode="promise_in_bounds")


def support(
    wavelet: str,
    levels: np.ndarray,
    shifts: np.ndarray,
    *,
    sampling: str = "level",
    origin: str = "start",
    t_sign: str = "m-n",
) -> int:
    """The distance, tokens, past which every column is 0: 16,143 for db32 with levels 1 .. 8 and shifts 0 .. 15."""
    columns = _columns(wavelet, tuple(np.asarray(levels).tolist()), sampling, origin)
    behind = (np.asarray(shifts) if t_sign == "m-n" else -np.asarray(shifts)) - columns.origin
    return int(np.max(np.maximum(np.abs(behind), np.abs(behind + columns.length - 1))))
