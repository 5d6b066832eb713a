"""Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864): queries and keys rotated by position."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from wavelet_jax.angles import angle, int32_or_float
from wavelet_jax.concrete import concretely
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.positions.terms import Params, Terms
from wavelet_jax.ranges import Range, check_options

LAYOUTS = ("half_split", "interleaved")
# Known positions whose cosines and sines take more than this are left to the program: constants are in its text too.
_MOST_BYTES = 2**26
THETA = Range(1)  # frequencies are then at most 1 radian per position, as `angle` wants them below 2 pi


def frequencies(dim: int, theta: float = 10000.0) -> np.ndarray:
    """theta^(-2i / dim), i = 0 .. dim/2 - 1: radians per position, float64. Raises `UserError` for a theta below 1."""
    THETA.check("theta", theta)
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def rotate(x_BxTxHxD: jax.Array, positions: ArrayLike, theta: float = 10000.0, layout: str = "half_split") -> jax.Array:
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
    return _turned(x_BxTxHxD, waves(positions, x_BxTxHxD.shape[-1], theta), layout)


def _turned(x_BxTxHxD: jax.Array, waves: tuple[jax.Array, jax.Array], layout: str) -> jax.Array:
    """`rotate` by the cosines and sines of the angles."""
    cos, sin = (
        wave[..., None, :].reshape((1,) * (x_BxTxHxD.ndim - wave.ndim - 1) + (*wave.shape[:-1], 1, wave.shape[-1]))
        for wave in waves
    )
    x = x_BxTxHxD.astype(jnp.float32)
    if layout == "half_split":
        first, second = jnp.split(x, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
    return rotated.astype(x_BxTxHxD.dtype)


def waves(positions: ArrayLike, dim: int, theta: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the angles of positions [.., T], [.., T, D/2] float32 for D = dim; see `rotate`.

    They are constants of the program where the positions are known.
    """
    if isinstance(positions, Tracer) or np.size(positions) * dim * 4 > _MOST_BYTES:
        angles = angle(positions, frequencies(dim, theta))
        return jnp.cos(angles), jnp.sin(angles)
    known = np.asarray(int32_or_float(positions))
    return _constant_waves(known.tobytes(), known.dtype.str, known.shape, dim, theta)()


@functools.lru_cache(maxsize=16)
def _constant_waves(
    positions: bytes, dtype: str, shape: tuple[int, ...], dim: int, theta: float
) -> Callable[[], tuple[jax.Array, jax.Array]]:
    """A function of a program, which gives `waves` of the positions in these bytes.

    It is one function for queries, keys and all layers, so that a program holds these numbers once.
    """
    with concretely():
        angles = angle(np.frombuffer(positions, dtype).reshape(shape), frequencies(dim, theta))
        constants = np.asarray(jnp.cos(angles)), np.asarray(jnp.sin(angles))
    return jax.jit(lambda: jax.tree.map(jnp.asarray, constants))


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
            rotate=lambda x, waves: _turned(x, waves, self.layout),
            turns=lambda positions: waves(positions, self.head_dim, self.theta),
            num_heads=self.num_heads,
            head_dim=self.head_dim,
        )
