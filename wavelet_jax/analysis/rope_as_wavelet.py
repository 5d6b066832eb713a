"""RoPE as a wavelet transform along the head dimension: the paper's section 3 and appendices A.1 to A.4, in float64.

For one position m, RoPE multiplies a query or key of d numbers by a matrix of d/2 rotations. The paper reads its rows
as a wavelet of one scale, shifted along the d numbers. Here are that wavelet, its shifts and the matrix made of them;
tests/test_analysis.py shows that it is RoPE's. `docs/rope_as_wavelet.md` says what the argument needs.

Positions are whole numbers m >= 0; a head has d numbers, d even, counted from 0. Equation numbers are the paper's.
"""

import math

import numpy as np

from wavelet_jax.errors import UserError


def rotation_angles(m: int, d: int, theta: float = 10000.0) -> np.ndarray:
    """m theta_i, i = 1 .. d/2, with theta_i = theta^(-2(i-1)/d): RoPE's angles at position m, radians, [d/2]."""
    if d < 2 or d % 2:
        raise UserError(f"RoPE rotates pairs: d {d} must be even and at least 2")
    if m < 0:
        raise UserError(f"position {m} must be at least 0")
    return m * theta ** (-np.arange(0, d, 2) / d)


def rotations(angles: np.ndarray) -> np.ndarray:
    """Blocks [[cos, -sin], [sin, cos]] along the diagonal, [d, d] for [d/2] angles: Eq. (6) and (17).

    The interleaved layout: dimensions 2i and 2i + 1 are a pair.
    """
    angles = np.asarray(angles, np.float64)
    matrix = np.zeros((2 * len(angles), 2 * len(angles)))
    even = 2 * np.arange(len(angles))
    matrix[even, even], matrix[even, even + 1] = np.cos(angles), -np.sin(angles)
    matrix[even + 1, even], matrix[even + 1, even + 1] = np.sin(angles), np.cos(angles)
    return matrix


def turns(m: int) -> int:
    """k of A.2: the smallest natural number with m < 2 k pi."""
    return math.floor(m / (2 * math.pi)) + 1


def f(t: np.ndarray, k: int) -> np.ndarray:
    """f(t) of A.2: 2 k pi t on [0, 1) and 2 k pi (t - 1) on [1, 2), radians. Depends on m, through k."""
    t = np.asarray(t, np.float64)
    return 2 * math.pi * k * np.where(t < 1, t, t - 1)


def psi(t: np.ndarray, k: int) -> np.ndarray:
    """The Haar-like wavelet of Eq. (7): cos f(t) on [0, 1), -sin f(t) on [1, 2), 0 elsewhere."""
    t, angle = np.asarray(t, np.float64), f(t, k)
    return np.where((t >= 0) & (t < 2), np.where(t < 1, np.cos(angle), -np.sin(angle)), 0.0)


def psi_odd(t: np.ndarray, k: int) -> np.ndarray:
    """The other wavelet of Eq. (7), psi', for odd rows: sin f(t) on [0, 1), cos f(t) on [1, 2), 0 elsewhere."""
    t, angle = np.asarray(t, np.float64), f(t, k)
    return np.where((t >= 0) & (t < 2), np.where(t < 1, np.sin(angle), np.cos(angle)), 0.0)


def delta(angles: np.ndarray, k: int) -> np.ndarray:
    """delta(j) of A.2 for j = 0, 2, .. d - 2, from RoPE's angles [d/2]: m theta_(j/2 + 1) / (2 k pi), in [0, 1).

    They are chosen so that f(delta(j)) = m theta_(j/2 + 1), RoPE's angle.
    """
    return np.asarray(angles, np.float64) / (2 * math.pi * k)


def wavelet_matrix(angles: np.ndarray, k: int) -> np.ndarray:
    """The wavelet matrix of Eq. (8), [d, d]: row j holds the wavelet of scale 1 and shift b_j at t = 0 .. d - 1.

    Even rows are psi(t - b_j), b_j = j - delta(j); the row after each is psi'(t - b_j). With RoPE's angles at position
    m and k = turns(m) it is RoPE's matrix. It is made by evaluating the wavelets at all d^2 arguments: that all but two
    of a row's entries are 0 is what comes out.

    Args:
      angles: [d/2], radians, from 0 and below 2 k pi: `rotation_angles(m, d)`, or any others.
      k: `turns(m)`.

    Returns:
      float64, each entry within about 2 k pi (d + 1) 2^-53 of exact: t - b_j is rounded to 2^-53 (d + 1). An angle so
      close to 2 k pi may fall on the other side of a jump; no whole m below 10^7 does, with d up to 128.

    Raises:
      UserError: an angle outside [0, 2 k pi).
    """
    angles = np.asarray(angles, np.float64)
    if np.any(angles < 0) or np.any(angles >= 2 * math.pi * k):
        raise UserError(f"the construction needs angles from 0 and below 2 k pi, with k = {k}")
    shifts = 2 * np.arange(len(angles)) - delta(angles, k)
    t = np.arange(2 * len(angles)) - shifts[:, None]  # [d/2, d]
    return np.stack([psi(t, k), psi_odd(t, k)], axis=1).reshape(2 * len(angles), -1)


def haar_matrix(d: int) -> np.ndarray:
    """A.3's Haar matrix [d, d], Eq. (24): blocks [[1, -1], [1, 1]] / sqrt(2), each a wavelet row and a scaling row.

    As printed, the last scaling row has a minus sign, which would make it equal to the wavelet row above it.
    """
    if d < 2 or d % 2:
        raise UserError(f"the Haar matrix has blocks of 2: d {d} must be even and at least 2")
    return np.kron(np.eye(d // 2), np.array([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2))


def dft_matrix(d: int) -> np.ndarray:
    """The unitary matrix of the discrete Fourier transform, [d, d] complex: exp(-2 pi i j n / d) / sqrt(d); for A.4."""
    n = np.arange(d)
    return np.exp(-2j * np.pi * np.outer(n, n) / d) / math.sqrt(d)


def entries_by_row(matrix: np.ndarray, tolerance: float = 1e-12) -> np.ndarray:
    """Number of entries of each row that are larger than the tolerance, [rows].

    No order of rows and columns and no factors of them change these counts. RoPE has at most 2 in every row, at
    neighbouring dimensions; the Fourier transform has d, so for d > 2 the one is not the other in any order (A.4).
    """
    return np.sum(np.abs(matrix) > tolerance, axis=1)
