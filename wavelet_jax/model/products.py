"""Shared by the blocks and the vocabularies of the decoder."""

import jax
from flax import nnx
from ml_collections import ConfigDict


def precision_of(config: ConfigDict) -> str:
    """`config.model.precision` of a float32 model; in bfloat16 only the head's gradients are float32, and not exact."""
    return config.model.precision if config.model.dtype == "float32" else "default"


def dropout(layer: nnx.Dropout, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Dropout of `x` by `key`; `x` itself if the key is None."""
    return layer(x, deterministic=key is None, rngs=key)
