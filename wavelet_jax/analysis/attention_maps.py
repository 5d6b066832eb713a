"""Attention probabilities of a trained model at any length, block of rows by block of rows.

A block of queries meets all keys so far through the decoder's key-value cache, as the decoder itself does when it reads
a long text in chunks. Of its probabilities two things are kept: the largest of every cell of a picture, and the sums
by distance. So a text of L tokens takes the memory of its cache and of a block, and never an L x L matrix.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from wavelet_jax.analysis.windows import distance_of
from wavelet_jax.attention import decode
from wavelet_jax.attention.call import Call
from wavelet_jax.attention.tiled.skew import unskew
from wavelet_jax.errors import UserError
from wavelet_jax.hardware import memory
from wavelet_jax.model.cache import KVCache
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.parallel import sharding

# Scores [H, T, S] of a layer's block, all heads: 128 MiB in float32. A few arrays of that size live at once.
_SCORES = 2**25


@dataclasses.dataclass(frozen=True, eq=False)
class Maps:
    """Attention of one model on one text.

    Attributes:
      layers, heads: which ones, counted from 0.
      length: L, tokens.
      cell: queries, and keys, of a cell.
      highest: [layers, heads, C, C] float32, C = ceil(L / cell): the largest probability in each cell, row of queries
        by column of keys.
      first_counted: the first query that `mass` counts.
      mass: [layers, heads, L] float64: by distance, the mean over counted queries of the probability there; sums to 1.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    length: int
    cell: int
    highest: np.ndarray
    first_counted: int
    mass: np.ndarray

    def distances(self, share: float) -> np.ndarray:
        """[layers, heads] int: the smallest distance within which a share of the attention lies, tokens."""
        by_head = self.mass.reshape(-1, self.length)
        found = [distance_of(mass, share) for mass in by_head]
        return np.array(found).reshape(self.mass.shape[:2])


def probabilities(
    model: Decoder, layer: int, query_BxTxHxD: jax.Array, key_BxSxKxD: jax.Array, start: Any
) -> jax.Array:
    """The softmax of a layer's scores, [B, H, T, S] float32; 0 for keys after their query.

    Args:
      query_BxTxHxD: from `queries_of`: not rotated, at positions start, start + 1, ..
      key_BxSxKxD: the layer's keys in the cache: not rotated, at positions 0, 1, ..
    """
    terms = model.terms(layer)
    (batch, queries, heads, head_dim), keys = query_BxTxHxD.shape, key_BxSxKxD.shape[1]
    query_BxTxHxD = terms.rotated(query_BxTxHxD, terms.turns_of(start + jnp.arange(queries, dtype=jnp.int32)))
    key_BxSxKxD = terms.rotated(key_BxSxKxD, terms.turns_of(jnp.arange(keys, dtype=jnp.int32)))
    call = Call(terms, queries, keys, heads, key_BxSxKxD.shape[2], head_dim, query_BxTxHxD.dtype, offset=start)
    weights_BxKxGxTxS = decode.probabilities(query_BxTxHxD, key_BxSxKxD, call)
    return weights_BxKxGxTxS.reshape(batch, heads, queries, keys)


def make_block_step(graphdef: nnx.GraphDef, layers: Sequence[int], heads: Sequence[int], cell: int) -> Callable:
    """(params, cache, tokens [1, T], first counted) -> (longer cache, highest, mass).

    The cache holds the tokens before these, as many as `start`.
    highest: [layers, heads, ceil(T / cell), ceil(S / cell)], the largest probability of each cell.
    mass: [layers, heads, T + S], column e the sum over counted queries of the probability at distance start + T-1 - e.
    """
    chosen = np.array(heads)

    def block_step(params: dict, cache: KVCache, tokens: jax.Array, first_counted: jax.Array):
        model, start = nnx.merge(graphdef, params), cache.filled
        queries, cache = queries_of(model, tokens, cache)
        counted_Tx1 = (start + jnp.arange(tokens.shape[1]) >= first_counted)[:, None]
        highest, mass = [], []
        for layer in layers:
            weights_HxTxS = probabilities(model, layer, queries[layer], cache.keys[layer], start)[0, chosen]
            highest.append(cells(weights_HxTxS, cell))
            mass.append(jnp.sum(unskew(jnp.where(counted_Tx1, weights_HxTxS, 0)), axis=-2))
        return cache, jnp.stack(highest), jnp.stack(mass)

    return block_step


def queries_of(model: Decoder, tokens_BxT: jax.Array, cache: KVCache) -> tuple[list[jax.Array], KVCache]:
    """Each layer's queries [B, T, H, D] before any rotation, and the longer cache: reads as `Decoder.extend` does."""
    x_BxTxE, queries, slots = model.embed(tokens_BxT, cache.filled), [], []
    for layer in range(model.num_layers):
        block = model.block(layer)
        queries.append(block.project(x_BxTxE)[0])
        x_BxTxE, new = block(
            x_BxTxE, model.position, query_positions=cache.filled, key_positions=0, slots=cache.of_layer(layer)
        )
        slots.append(new)
    return queries, cache.with_layers(slots).at(cache.filled + tokens_BxT.shape[1])


def cells(weights_HxTxS: jax.Array, cell: int) -> jax.Array:
    """The largest of every `cell` x `cell` entries, which are at least 0: [H, ceil(T / cell), ceil(S / cell)]."""
    heads, rows, columns = weights_HxTxS.shape
    padded = jnp.pad(weights_HxTxS, ((0, 0), (0, -rows % cell), (0, -columns % cell)))
    return jnp.max(padded.reshape(heads, -(-rows // cell), cell, -(-columns // cell), cell), axis=(2, 4))


def blocks(length: int, num_heads: int, cell: int) -> list[tuple[int, int]]:
    """(start, stop) of the blocks of queries: whole cells, with at most `_SCORES` scores per layer.

    The last one may be shorter. One row of cells is the least.
    """
    rows = max(cell, _SCORES // (num_heads * length) // cell * cell)
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The compiled steps over a text of one length. Made by `build`.

    Attributes:
      steps: by the number of rows of a block.
      cache: shapes of the cache.
      bytes: what they take of memory, with the process as it is and what is kept on the host.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    length: int
    cell: int
    blocks: list[tuple[int, int]]
    steps: dict[int, jax.stages.Compiled]
    cache: KVCache
    bytes: int


def build(
    graphdef: nnx.GraphDef,
    abstract_params: dict,
    mesh: Mesh,
    *,
    num_heads: int,
    layers: Sequence[int],
    heads: Sequence[int],
    length: int,
    pixels: int,
) -> Program:
    """Compiles the steps of a text of `length` tokens, for maps of at most `pixels` cells per side. Computes nothing.

    Raises:
      UserError: they need more memory than there is.
    """
    cell = -(-length // pixels)
    everywhere = sharding.everywhere(mesh)

    def described(leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    cache = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_cache(1, length), abstract_params)
    cache = jax.tree.map(described, cache)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    parts = blocks(length, num_heads, cell)
    step = jax.jit(
        make_block_step(graphdef, layers, heads, cell),
        donate_argnums=1,
        out_shardings=(jax.tree.map(lambda _: everywhere, cache), everywhere, everywhere),
    )
    steps = {}
    for rows in {stop - start for start, stop in parts}:
        tokens = jax.ShapeDtypeStruct((1, rows), jnp.int32)
        steps[rows] = step.lower(abstract_params, cache, tokens, number).compile()
    cells_a_side = -(-length // cell)
    on_host = len(layers) * len(heads) * (8 * length + 4 * cells_a_side**2)
    needed = memory.in_use() + max(map(memory.needed, steps.values())) + memory.kept(cache.nbytes) + on_host
    limit, owner = memory.available()
    if needed > limit:
        raise UserError(
            f"attention at length {length:,} would take {memory.shown(needed)} of memory, and {owner} has "
            f"{memory.shown(limit)}: choose a lower --length, or fewer --layers and --heads"
        )
    return Program(tuple(layers), tuple(heads), length, cell, parts, steps, cache, needed)


def measure(
    program: Program,
    params: dict,
    tokens: np.ndarray,
    *,
    first_counted: int,
    done: Callable[[int], object] = lambda rows: None,
) -> Maps:
    """Reads a text and keeps its maps.

    Args:
      tokens: [L] ids.
      first_counted: `Maps.mass` is of the queries from this one on. Early queries see few keys, which would shorten
        every distance.
      done: called with the number of rows after each block.
    """
    length, cell = program.length, program.cell
    shape = (len(program.layers), len(program.heads))
    side = -(-length // cell)
    highest, mass = np.zeros((*shape, side, side), np.float32), np.zeros((*shape, length))
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), program.cache)
    ids = np.asarray(tokens, np.int32)[None]
    for start, stop in program.blocks:
        step = program.steps[stop - start]
        cache, block, sums = step(params, cache, ids[:, start:stop], np.int32(first_counted))
        highest[:, :, start // cell : -(-stop // cell)] = np.asarray(block)
        # Columns go from distance stop - 1 down; those below 0 have no key.
        mass[:, :, :stop] += np.asarray(sums, np.float64)[:, :, :stop][:, :, ::-1]
        done(stop - start)
    mass /= length - first_counted
    return Maps(program.layers, program.heads, length, cell, highest, first_counted, mass)
