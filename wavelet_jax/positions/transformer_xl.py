"""Transformer-XL's relative positions (Dai et al., arXiv 1901.02860, section 3.3)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.angles import angle
from wavelet_jax.errors import UserError
from wavelet_jax.positions.rope import THETA, frequencies
from wavelet_jax.positions.terms import Params, Terms
from wavelet_jax.ranges import COUNT_OR_NONE, check_options


def sinusoid(positions: jax.Array, dim: int, theta: float = 10000.0) -> jax.Array:
    """[..., dim] float32: the sines of all frequencies theta^(-2i/dim), then their cosines (dim even)."""
    angles = angle(positions, frequencies(dim, theta))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@dataclasses.dataclass(frozen=True)
class TransformerXL:
    """score = ((q + u) . k + (q + v) . W_r R[t]) / sqrt(D): R a sinusoid of the distance; W_r, u, v learned per layer.

    Attributes:
      theta: base of the sinusoid's frequencies.
      d_model: width of the sinusoid; 0 for num_heads * head_dim.
    """

    num_heads: int
    head_dim: int
    theta: float = 10000.0
    d_model: int = 0
    per_layer: ClassVar[bool] = True

    def __post_init__(self):
        check_options("transformer_xl", self, theta=THETA, d_model=COUNT_OR_NONE)
        object.__setattr__(self, "d_model", self.d_model or self.num_heads * self.head_dim)
        if self.d_model % 2:
            raise UserError(f"transformer_xl's sinusoid has pairs: d_model {self.d_model} must be even")

    def init(self, key: jax.Array) -> Params:
        heads = (self.num_heads, self.head_dim)
        projection_key, content_key, position_key = jax.random.split(key, 3)
        return {  # N(0, 0.02), as in the authors' code; the projection by its fan-in, so that p has unit size
            "projection": jax.random.normal(projection_key, (self.d_model, *heads)) * np.sqrt(2 / self.d_model),
            "content_bias": 0.02 * jax.random.normal(content_key, heads),
            "position_bias": 0.02 * jax.random.normal(position_key, heads),
        }

    def terms(self, params: Params) -> Terms:
        def relative_keys(distance: jax.Array) -> jax.Array:
            waves = sinusoid(distance, self.d_model, self.theta)
            return jnp.einsum("...e,ehd->h...d", waves, params["projection"], precision="highest")

        return Terms(
            relative_keys=relative_keys,
            content_bias=params["content_bias"],
            position_bias=params["position_bias"],
            num_heads=self.num_heads,
            head_dim=self.head_dim,
        )
