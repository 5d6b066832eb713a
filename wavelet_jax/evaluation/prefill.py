"""Losses of blocks of any length in the memory of a chunk: long ones are read through the key-value cache.

A compiled `Program` serves every batch of one shape. It is compiled from shapes alone, so that its memory is known
before anything is computed; `measure` times a little of it, so that the time of the rest is.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from wavelet_jax.model.cache import KVCache
from wavelet_jax.parallel import sharding
from wavelet_jax.training import steps

_PROBE = 4  # chunks read before the deeper one of the two that `measure` times


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds that a token takes: `base`, and `growth` for each token before it in its block (attention)."""

    base: float
    growth: float

    def seconds(self, start: int, stop: int, batch_size: int = 1) -> float:
        """Seconds for tokens start .. stop - 1 of every block of a batch."""
        return batch_size * (stop - start) * (self.base + self.growth * (start + stop) / 2)


def chunks(length: int, chunk: int) -> list[tuple[int, int]]:
    """(start, stop) of the chunks of a block, all whole: the last one begins earlier where they do not divide it.

    Its first tokens are then read again, to the same keys, values and losses.
    """
    starts = [*range(0, length - chunk, chunk), length - chunk]
    return [(start, start + chunk) for start in starts]


def chunk_of(config: ConfigDict, length: int) -> int:
    """Tokens of a block of this length that are read at a time."""
    return min(length, config.eval.prefill_chunk or length)


@dataclasses.dataclass(frozen=True)
class Program:
    """Losses of batches [B, T+1] of tokens. Made by `build`.

    Attributes:
      batch_size, length: B, T.
      chunk: tokens read at a time, at most T.
      step: the compiled `training.make_eval_step` where the chunk is T, else `training.make_chunk_step`.
      empty_cache: makes an empty cache; None if the chunk is T.
      cache_bytes: size of the cache, on all devices of this process together.
      build_seconds: what tracing and compiling took.
    """

    batch_size: int
    length: int
    chunk: int
    step: jax.stages.Compiled
    empty_cache: Callable[[], KVCache] | None
    cache_bytes: int
    build_seconds: float

    def losses(self, params: dict, tokens_BxT1: np.ndarray, done: Callable[[int, int], object]) -> np.ndarray:
        """Losses [B, T] in nats; `done(start, stop)` is called after each of `chunks`."""
        if self.empty_cache is None:
            losses = np.asarray(self.step(params, tokens_BxT1))
            done(0, self.length)
            return losses
        losses = np.zeros((self.batch_size, self.length), np.float32)
        cache = self.empty_cache()
        for start, stop in chunks(self.length, self.chunk):
            losses[:, start:stop], cache = self._chunk(params, cache.at(np.int32(start)), tokens_BxT1)
            done(start, stop)
        return losses

    def measure(self, params: dict, tokens_BxT1: np.ndarray) -> Pace:
        """The pace of a whole block, timed, or of a long one, from a chunk at its beginning and one further in."""

        def seconds_of(run: Callable[[], object]) -> float:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

        if self.empty_cache is None:
            # The first run also touches fresh memory.
            runs = [seconds_of(lambda: self.losses(params, tokens_BxT1, lambda start, stop: None)) for _ in range(2)]
            return Pace(min(runs) / (self.batch_size * self.length), 0.0)
        cache = self.empty_cache()
        deep = min(_PROBE * self.chunk, self.length - self.chunk)

        def read(start: int) -> None:
            nonlocal cache
            _, cache = self._chunk(params, cache.at(np.int32(start)), tokens_BxT1)

        read(0)
        shallow, further = (seconds_of(lambda start=start: read(start)) for start in (0, deep))
        tokens = self.batch_size * self.chunk
        growth = max(0.0, further - shallow) / (tokens * deep)
        return Pace(shallow / tokens - growth * self.chunk / 2, growth)

    def _chunk(self, params: dict, cache: KVCache, tokens_BxT1: np.ndarray) -> tuple[np.ndarray, KVCache]:
        start = int(cache.filled)
        losses, cache = self.step(params, cache, tokens_BxT1[:, start : start + self.chunk + 1])
        return np.asarray(losses), cache


def build(
    config: ConfigDict, graphdef: nnx.GraphDef, abstract_params: dict, mesh: Mesh, *, batch_size: int, length: int
) -> Program:
    """Compiles the program of batches of `batch_size` blocks of `length` tokens. Nothing is computed.

    Blocks longer than `config.eval.prefill_chunk` (0: none are) are read in chunks of it.
    """
    begin = time.perf_counter()
    chunk = chunk_of(config, length)
    # Every process sees all losses. The cache is whole on each device too: a single long block has no batch to split,
    # and maybe fewer heads than devices.
    everywhere = sharding.everywhere(mesh)
    tokens = jax.ShapeDtypeStruct((batch_size, chunk + 1), jnp.int32)
    if chunk == length:
        # Where its blocks come out even over the devices, each computes its share; else what the compiler makes of it.
        divided = mesh if batch_size % sharding.batch_devices(mesh) == 0 else None
        eval_step = jax.jit(steps.make_eval_step(config, graphdef, divided), out_shardings=everywhere)
        step = eval_step.lower(abstract_params, tokens).compile()
        return Program(batch_size, length, chunk, step, None, 0, time.perf_counter() - begin)

    shapes = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_cache(batch_size, length), abstract_params)
    cache = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)
    chunk_step = jax.jit(
        steps.make_chunk_step(config, graphdef), donate_argnums=1, out_shardings=(everywhere, everywhere)
    )
    step = chunk_step.lower(abstract_params, cache, tokens).compile()

    def empty_cache() -> KVCache:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=everywhere), shapes)

    cache_bytes = shapes.nbytes * mesh.local_mesh.size
    return Program(batch_size, length, chunk, step, empty_cache, cache_bytes, time.perf_counter() - begin)
