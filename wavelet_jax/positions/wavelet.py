"""Wavelet positions: the paper's method (Oka et al., ICLR 2025, section 5). The mathematics is in `wavelets`."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.errors import UserError, unknown
from wavelet_jax.positions.terms import Params, Terms
from wavelet_jax.ranges import HEADS, Range, check_options
from wavelet_jax.wavelets import MOTHERS, T_SIGNS, scale_shift_grid, support, wavelet_position


@dataclasses.dataclass(frozen=True)
class Wavelet:
    """score += q . p[t], Eq. (10): one fixed table for all heads and layers, neither learned nor clipped.

    Attributes:
      mother: one of `wavelets.MOTHERS`.
      num_scales, first_exponent: the grid of Eq. (13); see `wavelets.scale_shift_grid`.
      scales, shifts: a grid of your own instead, [D] or [H, D] (any array or nested sequence); empty for Eq. (13).
      t_sign: "m-n" (Eq. 14) or "n-m" (footnote 8); see `wavelets.wavelet_position`.
      trainable: train scales (as their binary logarithms, which keeps them positive) and shifts from that start.
      support_tolerance: what `Terms.support` is stated for; |psi| at most 1.
    """

    num_heads: int
    head_dim: int
    mother: str = "ricker"
    num_scales: int = 8
    first_exponent: int = 0
    scales: tuple[Any, ...] = ()
    shifts: tuple[Any, ...] = ()
    t_sign: str = "m-n"
    trainable: bool = False
    support_tolerance: float = 1e-4
    per_layer: ClassVar[bool] = False

    def __post_init__(self):
        exponents = Range(-60, 127, whole=True)  # as `scale_shift_grid` has them for one scale
        # All of a wavelet is below a tolerance of 1.
        tolerance = Range(0, 1, below=True)
        check_options("wavelet", self, num_scales=HEADS, first_exponent=exponents, support_tolerance=tolerance)
        if not callable(self.mother) and self.mother not in MOTHERS:
            raise unknown("mother wavelet", self.mother, MOTHERS)
        if self.t_sign not in T_SIGNS:
            raise unknown("t_sign", self.t_sign, T_SIGNS)
        for name in ("scales", "shifts"):  # tuples, so that a method stays hashable and a jit constant
            try:
                with np.errstate(over="ignore"):  # past float32 is infinite, and refused below
                    array = np.asarray(getattr(self, name), np.float32)
            except (ValueError, TypeError):
                raise UserError(f"{name} must be numbers of shape [head_dim] or [num_heads, head_dim]") from None
            object.__setattr__(self, name, tuple(tuple(row) if np.ndim(row) else row for row in array.tolist()))
        scales, shifts = self.grid()
        if scales.shape != shifts.shape or scales.shape not in ((self.head_dim,), (self.num_heads, self.head_dim)):
            raise UserError(
                f"scales {scales.shape} and shifts {shifts.shape} must both be [head_dim] = ({self.head_dim},) "
                f"or [num_heads, head_dim] = ({self.num_heads}, {self.head_dim})"
            )
        if not (np.isfinite(scales).all() and (scales > 0).all() and np.isfinite(shifts).all()):
            raise UserError("scales must be positive and finite, shifts finite, in float32")

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """(scales, shifts), [D] or [H, D] each, float32: the ones given, or else Eq. (13)'s."""
        if not self.scales and not self.shifts:
            return scale_shift_grid(self.head_dim, self.num_scales, self.first_exponent)
        return np.asarray(self.scales, np.float32), np.asarray(self.shifts, np.float32)

    def init(self, key: jax.Array) -> Params:
        if not self.trainable:
            return {}
        scales, shifts = self.grid()
        return {"log2_scales": jnp.log2(scales), "shifts": jnp.asarray(shifts)}

    def terms(self, params: Params) -> Terms:
        if self.trainable:
            scales, shifts, reach = jnp.exp2(params["log2_scales"]), params["shifts"], None
        else:
            scales, shifts = self.grid()
            reach = support(scales, shifts, self.mother, self.support_tolerance)
        relative_keys = functools.partial(
            wavelet_position, scales=scales, shifts=shifts, mother=self.mother, t_sign=self.t_sign
        )
        return Terms(relative_keys=relative_keys, support=reach, num_heads=self.num_heads, head_dim=self.head_dim)
