"""Absolute positions added to the token embedding, and no positions at all."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from wavelet_jax.angles import angle
from wavelet_jax.errors import UserError
from wavelet_jax.positions.rope import THETA, frequencies
from wavelet_jax.positions.terms import Params, Terms
from wavelet_jax.ranges import COUNT, COUNT_OR_NONE, check_options


@dataclasses.dataclass(frozen=True)
class NoPE:
    """No positional information but the causal mask (Haviv et al., arXiv 2203.16634)."""

    num_heads: int
    head_dim: int
    per_layer: ClassVar[bool] = False

    def __post_init__(self):
        check_options("nope", self)

    def init(self, key: jax.Array) -> Params:
        return {}

    def terms(self, params: Params) -> Terms:
        return Terms(num_heads=self.num_heads, head_dim=self.head_dim)


@dataclasses.dataclass(frozen=True)
class Sinusoidal:
    """PE(pos, 2i) = sin(pos theta^(-2i/d)), PE(pos, 2i+1) = cos(..) (Vaswani et al., arXiv 1706.03762, section 3.5).

    Attributes: theta, the base; d_model, the width of the embedding (0 for num_heads * head_dim).
    """

    num_heads: int
    head_dim: int
    theta: float = 10000.0
    d_model: int = 0
    per_layer: ClassVar[bool] = False

    def __post_init__(self):
        check_options("sinusoidal", self, theta=THETA, d_model=COUNT_OR_NONE)
        object.__setattr__(self, "d_model", self.d_model or self.num_heads * self.head_dim)
        if self.d_model % 2:
            raise UserError(f"sinusoidal positions come in pairs: d_model {self.d_model} must be even")

    def init(self, key: jax.Array) -> Params:
        return {}

    def terms(self, params: Params) -> Terms:
        def embed(positions: jax.Array) -> jax.Array:
            angles = angle(positions, frequencies(self.d_model, self.theta))
            waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
            return waves.reshape(*angles.shape[:-1], self.d_model)

        return Terms(embed=embed, num_heads=self.num_heads, head_dim=self.head_dim)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A learned vector per position, as in GPT-2; it has nothing to say past its table, and refuses.

    Attributes: max_positions, rows of the table; d_model, the width (0 for num_heads * head_dim).
    """

    num_heads: int
    head_dim: int
    max_positions: int = 2048
    d_model: int = 0
    per_layer: ClassVar[bool] = False

    def __post_init__(self):
        check_options("learned", self, max_positions=COUNT, d_model=COUNT_OR_NONE)
        object.__setattr__(self, "d_model", self.d_model or self.num_heads * self.head_dim)

    def init(self, key: jax.Array) -> Params:
        return {"table": 0.02 * jax.random.normal(key, (self.max_positions, self.d_model))}

    def terms(self, params: Params) -> Terms:
        def embed(positions: jax.Array) -> jax.Array:
            if not isinstance(positions, Tracer):
                low, high = (int(each(positions)) if np.size(positions) else 0 for each in (np.min, np.max))
                if low < 0:
                    raise UserError(f"learned positions start at 0: there is no row for position {low}")
                check_positions(high + 1, self.max_positions)
            # A traced position cannot be checked: NaN is loud where a clamped index, or a negative one that counts
            # from the end, would be silently wrong.
            row = jnp.where(positions < 0, self.max_positions, positions)
            return jnp.take(params["table"], row, axis=0, mode="fill", fill_value=jnp.nan)

        return Terms(embed=embed, max_positions=self.max_positions, num_heads=self.num_heads, head_dim=self.head_dim)


def check_positions(length: int, max_positions: int | None) -> None:
    """Raises `UserError` where positions 0 .. length - 1 go past a method's table."""
    if max_positions is not None and length > max_positions:
        raise UserError(
            f"positions up to {length - 1} are past the learned table of {max_positions}: "
            f"train with position.max_positions of at least {length}, or use another position method"
        )
