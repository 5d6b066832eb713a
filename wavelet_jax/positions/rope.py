"""Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864): queries and keys rotated by position."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.angles import angle
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.positions.terms import Params, Terms
from wavelet_jax.ranges import Range, check_options

LAYOUTS = ("half_split", "interleaved")
THETA = Range(1)  # frequencies are then at most 1 radian per position, as `angle` wants them below 2 pi


def frequencies(dim: int, theta: float = 10000.0) -> np.ndarray:
    """theta^(-2i / dim), i = 0 .. dim/2 - 1: radians per position, float64. Raises `UserError` for a theta below 1."""
    THETA.check("theta", theta)
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def rotate(x_BxTxHxD: jax.Array, positions: jax.Array, theta: float = 10000.0, layout: str = "half_split") -> jax.Array:
    """Rotates each pair of head dimensions i by position * theta^(-2i/D), in float32; the dtype of x is kept.

    Args:
      x_BxTxHxD: queries or keys [B, T, H, D].
      positions: [T] or [B, T], tokens. Integers keep the angle exact at any distance.
      layout: which dimensions make pair i. "half_split": (i, i + D/2), as in GPT-NeoX and Hugging Face Llama.
        "interleaved": (2i, 2i + 1), as in RoFormer, GPT-J and Meta's Llama. Weights trained with one are wrong
        with the other.

    Raises:
      UserError: unknown layout, or a theta below 1.
    """
    if layout not in LAYOUTS:
        raise unknown("RoPE layout", layout, LAYOUTS)
    angles = angle(positions, frequencies(x_BxTxHxD.shape[-1], theta))[..., None, :]  # [.., T, 1, D/2]
    angles = angles.reshape((1,) * (x_BxTxHxD.ndim - angles.ndim) + angles.shape)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x = x_BxTxHxD.astype(jnp.float32)
    if layout == "half_split":
        first, second = jnp.split(x, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
    return rotated.astype(x_BxTxHxD.dtype)


@dataclasses.dataclass(frozen=True)
class RoPE:
    """RoPE. Attributes: theta, the base (the paper compares 1e4 and 5e5); layout, see `rotate`."""

    num_heads: int
    head_dim: int
    theta: float = 10000.0
    layout: str = "half_split"
    per_layer: ClassVar[bool] = False

    def __post_init__(self):
        check_options("rope", self, theta=THETA)
        if self.layout not in LAYOUTS:
            raise unknown("RoPE layout", self.layout, LAYOUTS)
        if self.head_dim % 2:
            raise UserError(f"rope rotates pairs of dimensions: head_dim {self.head_dim} must be even")

    def init(self, key: jax.Array) -> Params:
        return {}

    def terms(self, params: Params) -> Terms:
        return Terms(
            rotate=lambda x, positions: rotate(x, positions, self.theta, self.layout),
            num_heads=self.num_heads,
            head_dim=self.head_dim,
        )
