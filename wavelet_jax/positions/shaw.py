"""Relative position representations (Shaw, Uszkoreit, Vaswani, arXiv 1803.02155)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from wavelet_jax.integers import as_int32
from wavelet_jax.positions.terms import Params, Terms
from wavelet_jax.ranges import Range, check_options

CLIP_DISTANCE = Range(1, 2**30 - 1, whole=True)  # the table's 2 k + 1 rows are counted by int32


@dataclasses.dataclass(frozen=True)
class Shaw:
    """A learned vector per distance, clipped to [-clip_distance, clip_distance], shared by the heads of a layer.

    Attributes:
      clip_distance: k, tokens; farther keys share the vector of distance k.
      values: also add a learned vector to the values (Shaw's Eq. 3); the key side is always there (Eq. 4).
    """

    num_heads: int
    head_dim: int
    clip_distance: int = 64
    values: bool = False
    per_layer: ClassVar[bool] = True

    def __post_init__(self):
        check_options("shaw", self, clip_distance=CLIP_DISTANCE)

    def init(self, key: jax.Array) -> Params:
        shape = (2 * self.clip_distance + 1, self.head_dim)
        names = ("keys", "values") if self.values else ("keys",)
        # The scale of Xavier's rule for such a table.
        scale = (2 / sum(shape)) ** 0.5
        return {
            name: scale * jax.random.normal(each, shape)
            for name, each in zip(names, jax.random.split(key, len(names)), strict=True)
        }

    def terms(self, params: Params) -> Terms:
        def lookup(name: str):
            def vectors(distance: jax.Array) -> jax.Array:
                clipped = jnp.clip(as_int32("distances", distance), -self.clip_distance, self.clip_distance)
                return jnp.asarray(params[name])[clipped + self.clip_distance]

            return vectors

        return Terms(
            relative_keys=lookup("keys"),
            relative_values=lookup("values") if self.values else None,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
        )
