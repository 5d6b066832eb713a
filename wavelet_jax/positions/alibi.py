"""ALiBi (Press, Smith, Lewis, "Train Short, Test Long", arXiv 2108.12409): a linear penalty on distance."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.integers import as_int32
from wavelet_jax.positions.terms import Params, Terms
from wavelet_jax.ranges import check_options


def slopes(num_heads: int) -> np.ndarray:
    """Slopes [H], float32: 2^(-8h/H), h = 1 .. H, where H is a power of two (1/2 .. 1/256 for 8 heads).

    For other H: those of the power of two below it, then every second one of the power of two above it, as in
    the authors' code.
    """
    below = 2 ** int(np.log2(num_heads))
    geometric = 2.0 ** (-8 * np.arange(1, below + 1) / below)
    between = 2.0 ** (-8 * np.arange(1, 2 * below + 1, 2) / (2 * below))
    return np.concatenate([geometric, between])[:num_heads].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ALiBi:
    """score -= slope_h * |distance|, after the division by sqrt(D)."""

    num_heads: int
    head_dim: int
    per_layer: ClassVar[bool] = False

    def __post_init__(self):
        check_options("alibi", self)

    def init(self, key: jax.Array) -> Params:
        return {}

    def terms(self, params: Params) -> Terms:
        def bias(distance: jax.Array) -> jax.Array:
            return -jnp.multiply.outer(
                slopes(self.num_heads), jnp.abs(as_int32("distances", distance)).astype(jnp.float32)
            )

        return Terms(bias=bias, num_heads=self.num_heads, head_dim=self.head_dim)
