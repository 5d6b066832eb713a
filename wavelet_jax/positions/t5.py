"""T5's relative bias (Raffel et al., arXiv 1910.10683, section 2.1): a learned scalar per head and distance bucket."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.errors import UserError
from wavelet_jax.integers import as_int32
from wavelet_jax.positions.terms import Params, Terms
from wavelet_jax.ranges import COUNT, check_options


def buckets(
    distance: jax.Array, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
) -> jax.Array:
    """T5's bucket of every distance (query position - key position), int32 in [0, num_buckets).

    Half of the buckets hold one distance each, the others logarithmically growing ranges up to `max_distance`;
    all beyond share the last. Causal: keys after the query share bucket 0. Bidirectional: keys after the query
    have the upper half of the buckets to themselves.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    # Bucket exact + i begins at exact * (max_distance / exact)^(i / (side - exact)); the rounding guards the
    # edges that are whole numbers.
    growth = (max_distance / exact) ** (np.arange(1, side - exact) / (side - exact))
    edges = np.concatenate([np.arange(1, exact + 1), np.ceil(np.round(exact * growth, 9))]).astype(np.int32)
    distance = jnp.asarray(as_int32("distances", distance))
    length = jnp.abs(distance) if bidirectional else jnp.maximum(distance, 0)
    bucket = jnp.searchsorted(edges, length, side="right", method="compare_all").astype(jnp.int32)
    return bucket + jnp.where(distance < 0, side, 0) if bidirectional else bucket


@dataclasses.dataclass(frozen=True)
class T5:
    """score += bias[bucket(distance), head], one table for all layers.

    T5 itself does not divide the scores by sqrt(D); here every method does.

    Attributes:
      num_buckets, max_distance, bidirectional: the bucket rule, see `buckets`.
    """

    num_heads: int
    head_dim: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    per_layer: ClassVar[bool] = False

    def __post_init__(self):
        check_options("t5", self, num_buckets=COUNT, max_distance=COUNT)  # distances are int32
        least = 4 if self.bidirectional else 2
        if self.num_buckets < least or self.num_buckets % least:
            raise UserError(f"t5's num_buckets must be a multiple of {least}, not {self.num_buckets}")
        exact = self.num_buckets // least
        if self.max_distance <= exact:
            raise UserError(
                f"t5's max_distance {self.max_distance} must be past the {exact} distances with buckets of their own"
            )

    def init(self, key: jax.Array) -> Params:
        return {"bias": 0.02 * jax.random.normal(key, (self.num_buckets, self.num_heads))}

    def terms(self, params: Params) -> Terms:
        def bias(distance: jax.Array) -> jax.Array:
            bucket = buckets(distance, self.num_buckets, self.max_distance, self.bidirectional)
            return jnp.moveaxis(jnp.asarray(params["bias"])[bucket], -1, 0)

        return Terms(bias=bias, num_heads=self.num_heads, head_dim=self.head_dim)
