"""Wavelets of relative distance: continuous ones (paper, Eqs. 11-15), and discrete ones of PyWavelets (`discrete`)."""

from wavelet_jax.wavelets.continuous import (
    MOTHERS,
    T_SIGNS,
    gaussian,
    haar,
    haar_standard,
    morlet,
    num_shifts,
    ricker,
    scale_shift_grid,
    support,
    wavelet,
    wavelet_position,
)

__all__ = [
    "MOTHERS",
    "T_SIGNS",
    "gaussian",
    "haar",
    "haar_standard",
    "morlet",
    "num_shifts",
    "ricker",
    "scale_shift_grid",
    "support",
    "wavelet",
    "wavelet_position",
]
