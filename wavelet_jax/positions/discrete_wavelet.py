"""Discrete wavelets: Table 4's variant of the paper's method (A.14). The mathematics is in `discrete`."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax

from wavelet_jax.errors import unknown
from wavelet_jax.positions.terms import Params, Terms
from wavelet_jax.ranges import HEADS, Range, check_options
from wavelet_jax.wavelets import T_SIGNS, discrete


@dataclasses.dataclass(frozen=True)
class DiscreteWavelet:
    """score += q . p[t], Eq. (10), where p is looked up among PyWavelets' samples; one fixed table for all heads.

    The samples are no smooth function of t, and at the paper's levels they reach far: 2^8 (N - 1) tokens and the shift,
    783 for db2, 15,631 for dmey, 16,143 for db32, 24,335 for coif16. `attention.tiled` computes them as exactly as the
    smooth wavelets, in memory linear in length, but by the near form over all of that: a second product per tile, as
    for learned tables. Kernels refuse them where they reach past a band.

    Attributes:
      wavelet: a discrete wavelet of PyWavelets: db1 .. db38, sym2 .., coif1 .., dmey, bior1.1 .., rbio1.1 .., haar.
      num_levels, first_level: levels in the place of scales; see `discrete.level_shift_grid`.
      sampling: "level" or "fine"; origin: "start" or "centre"; t_sign: "m-n" or "n-m"; see `discrete` for the readings.
    """

    num_heads: int
    head_dim: int
    wavelet: str = "db2"
    num_levels: int = 8
    first_level: int = 1
    sampling: str = "level"
    origin: str = "start"
    t_sign: str = "m-n"
    per_layer: ClassVar[bool] = False

    def __post_init__(self):
        levels = Range(0, discrete.MAX_LEVEL, whole=True)
        check_options("discrete_wavelet", self, num_levels=HEADS, first_level=levels)
        if self.t_sign not in T_SIGNS:
            raise unknown("t_sign", self.t_sign, T_SIGNS)
        discrete.support(**self._columns())  # raises for a wavelet or level that does not exist

    def _columns(self) -> dict[str, Any]:
        levels, shifts = discrete.level_shift_grid(self.head_dim, self.num_levels, self.first_level)
        reading = {"sampling": self.sampling, "origin": self.origin, "t_sign": self.t_sign}
        return {"wavelet": self.wavelet, "levels": levels, "shifts": shifts, **reading}

    def init(self, key: jax.Array) -> Params:
        return {}

    def terms(self, params: Params) -> Terms:
        columns = self._columns()
        relative_keys = functools.partial(discrete.discrete_position, **columns)
        return Terms(
            relative_keys=relative_keys,
            support=discrete.support(**columns),
            num_heads=self.num_heads,
            head_dim=self.head_dim,
        )
