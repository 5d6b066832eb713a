"""The key-value cache of a decoder."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens that a decoder has read, for `Decoder.extend`. A pytree.

    Attributes:
      keys, values: for each layer [B, S, K, D] in the model's dtype, of which the first `filled` slots count: a tuple,
        or [layers, B, S, K, D] of a model that scans over its layers.
      filled: tokens read so far, int32; a Python integer outside of jit lets attention plan its tiles by it.
    """

    keys: tuple[jax.Array, ...] | jax.Array
    values: tuple[jax.Array, ...] | jax.Array
    filled: jax.Array | np.integer | int

    @property
    def room(self) -> int:
        """Slots, S."""
        return self.keys[0].shape[1] if isinstance(self.keys, tuple) else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; also of a cache of `jax.ShapeDtypeStruct`."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves((self.keys, self.values)))

    def at(self, filled: jax.Array | np.integer | int) -> "KVCache":
        """The same slots, of which the first `filled` count: tokens from there on are read next, and overwritten."""
        return dataclasses.replace(self, filled=filled)

    def of_layer(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, [B, S, K, D]."""
        return self.keys[layer], self.values[layer]

    def with_layers(self, slots: Sequence[tuple[jax.Array, jax.Array]]) -> "KVCache":
        """The same tokens with other keys and values, those of each layer in turn."""
        keys, values = zip(*slots, strict=True)
        if not isinstance(self.keys, tuple):
            keys, values = jnp.stack(keys), jnp.stack(values)
        return dataclasses.replace(self, keys=keys, values=values)
