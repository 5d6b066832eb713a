"""The key-value cache of a decoder."""

import dataclasses

import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens that a decoder has read, for `Decoder.extend`. A pytree.

    Attributes:
      keys, values: for each layer [B, S, K, D] in the model's dtype, of which the first `filled` slots count.
      filled: tokens read so far, int32; a Python integer outside of jit lets attention plan its tiles by it.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    filled: jax.Array | np.integer | int

    @property
    def room(self) -> int:
        """Slots, S."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; also of a cache of `jax.ShapeDtypeStruct`."""
        return sum(array.size * array.dtype.itemsize for array in (*self.keys, *self.values))

    def at(self, filled: jax.Array | np.integer | int) -> "KVCache":
        """The same slots, of which the first `filled` count: tokens from there on are read next, and overwritten."""
        return dataclasses.replace(self, filled=filled)
