"""Flash attention for TPUs in Pallas, forward and backward, with wavelets in the scores; `prepared` has the plan.

Scores live in the chip's vector memory only, one tile of queries and keys at a time, with an online softmax (Dao et
al., arXiv 2205.14135). The backward pass has them again from the logarithm of their sums: one kernel goes along a row
of tiles for the gradients of queries, near scores and far coordinates, and one along a column for keys and values.
Grouped queries read their keys by index; nothing is repeated in memory.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wavelet_jax.attention.call import Call
from wavelet_jax.attention.flash.arrays import (
    MASKED,
    Arrays,
    Kernel,
    Layout,
    attend_by,
    prepare,
    unsupported_by_kernels,
)
from wavelet_jax.attention.tiled.geometry import TileSizes
from wavelet_jax.hardware import devices

# Tiles with relative keys, and without. Chosen by counting, not by a clock: no TPU was available. A step of the grid
# has a fixed cost of some tenths of a microsecond, as long as the products of a 256 x 256 tile with D = 128 take on a
# TPU v5e, so plain tiles are larger; but near scores are rows + band float32 numbers per query and head in main memory,
# which 256 holds to 2 KB.
TILES = (TileSizes(rows=256, block=256, band=256, keys=256), TileSizes(rows=512, block=512, band=0, keys=512))

LANES = 128  # of a vector register: lengths of tiles are multiples of it
DTYPES = ("float32", "bfloat16")
MAX_HEAD_DIM = 256

_interpret: contextvars.ContextVar[bool] = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Functions traced inside run the kernels in Pallas' interpreter, on any device: slow, for tests."""
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def unsupported(call: Call) -> list[str]:
    """Reasons why this backend does not support a call; empty if it does."""
    if devices.platform() != "tpu" and not _interpret.get():
        return [f"a TPU (this program is for a {devices.platform()})"]
    found = []
    if jnp.dtype(call.dtype).name not in DTYPES:
        found.append(f"queries in {' or '.join(DTYPES)}")
    if call.head_dim > MAX_HEAD_DIM:
        found.append(f"a head size of at most {MAX_HEAD_DIM}")
    return found + unsupported_by_kernels(call, _sizes(call))


def attend(query_BxTxHxD: jax.Array, key_BxSxKxD: jax.Array, value_BxSxKxD: jax.Array, call: Call) -> jax.Array:
    """Softmax attention as `Terms` states it, of a supported call; scores and softmax in float32.

    Args:
      query_BxTxHxD, key_BxSxKxD, value_BxSxKxD: queries and keys rotated already; K divides H.
      call: what they are, and what the position method adds.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """
    with jax.named_scope("tables"):
        prepared = prepare(call, _sizes(call))
    return attend_by(_kernel(_interpret.get()), prepared, query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, call)


def _sizes(call: Call) -> TileSizes:
    sizes = TILES[0 if call.terms.relative_keys is not None else 1]
    rows = min(sizes.rows, -(-call.queries // LANES) * LANES)  # no longer than the queries need
    return TileSizes(rows, rows, sizes.band, min(sizes.keys, rows))


@functools.cache
def _kernel(interpret: bool) -> Kernel:
    return Kernel(functools.partial(_forward, interpret), functools.partial(_backward, interpret))


# -- one tile -----------------------------------------------------------------------------------------------------


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The sum over axis contract[0] of a and contract[1] of b, in float32; float32 operands are not cut to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _visit(layout: Layout, i: jax.Array, j: jax.Array, refs: dict, near: Callable, step: Callable) -> None:
    """Calls step(scores [U, V], kind) where query tile i sees key tile j; near() is the tile's near scores."""

    def scores(kind: str) -> jax.Array:
        x = _dot(refs["query"][...], refs["key"][...], (1, 1))
        if kind == "far":
            x += _dot(refs["far"][...], refs["basis"][...], (1, 1))
        x *= layout.scale
        if kind == "near" and "near" in refs:
            x += near()
        elif kind == "near" and layout.causal:
            x = jnp.where(_iota(x, 0) - _iota(x, 1) >= (j - layout.own(i)) * layout.keys, x, MASKED)
        if layout.ragged:  # on all tiles: a branch for those at the ends would double the kernel's code
            key = j * layout.keys + _iota(x, 1)
            x = jnp.where((key >= layout.first_key) & (key < layout.end_key), x, MASKED)
        return x

    is_seen, is_near, is_far = j < layout.end(i), layout.is_near(i, j), layout.is_far(i, j)
    pl.when(is_seen & is_near)(lambda: step(scores("near"), "near"))
    if "far" in refs:
        pl.when(is_seen & is_far)(lambda: step(scores("far"), "far"))
        is_near |= is_far
    pl.when(is_seen & ~is_near)(lambda: step(scores("plain"), "plain"))


def _iota(x: jax.Array, axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, axis)


# Numbers of rows stand one below the other beside scores, and one after the other in memory.
def _as_row(column_Ux1: jax.Array) -> jax.Array:
    return jnp.broadcast_to(column_Ux1, (column_Ux1.shape[0], LANES)).T[:1]


def _as_column(row_1xU: jax.Array) -> jax.Array:
    return jnp.broadcast_to(row_1xU, (LANES, row_1xU.shape[1])).T[:, :1]


# -- along a row of tiles: the output, and the gradients of what belongs to queries ---------------------------------


def _forward(
    interpret: bool, layout: Layout, basis: np.ndarray | None, arrays: Arrays, out_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    def kernel(refs, out, logsumexp, highest, total, sums):
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def _():
            highest[...] = jnp.full_like(highest, MASKED)
            total[...] = jnp.zeros_like(total)
            sums[...] = jnp.zeros_like(sums)

        def step(scores, kind):
            before = highest[...]
            raised = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            # Hidden scores weigh 1 in a row that has seen nothing yet; what it sees first takes that to 0.
            weights, kept = jnp.exp(scores - raised), jnp.exp(before - raised)
            value = refs["value"][...]
            highest[...] = raised
            total[...] = total[...] * kept + jnp.sum(weights, axis=1, keepdims=True)
            sums[...] = sums[...] * kept + _dot(weights.astype(value.dtype), value, (1, 0))

        _visit(layout, i, j, refs, functools.partial(_from_band, layout, i, j, refs), step)

        @pl.when(j == layout.key_tiles - 1)
        def _():
            sees = highest[...] > MASKED / 2
            divisor = jnp.where(sees, total[...], 1)
            out[...] = jnp.where(sees, sums[...] / divisor, 0).astype(out.dtype)
            logsumexp[...] = _as_row(jnp.where(sees, highest[...] + jnp.log(divisor), jnp.inf))

    batch, heads, length, dim = arrays.query_BxHxTxD.shape
    inputs, specs = _row_inputs(layout, basis, arrays)
    out, logsumexp = _call(
        interpret,
        kernel,
        "flash_forward",
        (batch, heads, layout.row_tiles, layout.key_tiles),
        inputs,
        specs,
        (specs["query"], _per_row(layout)),
        (
            jax.ShapeDtypeStruct((batch, heads, length, dim), out_dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ),
        cost=_cost(layout, arrays, 2),
        scratch=tuple(pltpu.VMEM((layout.rows, columns), jnp.float32) for columns in (1, 1, dim)),
    )
    return out, logsumexp[:, :, 0]


def _backward(
    interpret: bool,
    layout: Layout,
    basis: np.ndarray | None,
    arrays: Arrays,
    out_BxHxTxD: jax.Array,
    logsumexp_BxHxT: jax.Array,
    d_out_BxHxTxD: jax.Array,
) -> Arrays:
    """Gradients, float32."""
    delta_BxHxT = jnp.sum(out_BxHxTxD * d_out_BxHxTxD.astype(jnp.float32), axis=-1)
    results = {
        "d_out": d_out_BxHxTxD,
        "logsumexp": logsumexp_BxHxT[:, :, None],
        "delta": delta_BxHxT[:, :, None],
    }
    d_rows = _backward_rows(interpret, layout, basis, arrays, results)
    d_key, d_value = _backward_columns(interpret, layout, basis, arrays, results)
    return Arrays(d_rows["query"], d_key, d_value, d_rows.get("near"), d_rows.get("far"))


def _d_scores(refs: dict, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(softmax weights, gradients by scores) of a tile."""
    weights = jnp.exp(scores - _as_column(refs["logsumexp"][...]))
    d_weights = _dot(refs["d_out"][...], refs["value"][...], (1, 1))
    return weights, weights * (d_weights - _as_column(refs["delta"][...]))


def _backward_rows(interpret: bool, layout: Layout, basis, arrays: Arrays, results: dict) -> dict[str, jax.Array]:
    """Gradients of queries, near scores and far coordinates."""

    def kernel(refs, d):
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def _():
            for ref in d.values():
                ref[...] = jnp.zeros_like(ref)

        def step(scores, kind):
            _, d_scores = _d_scores(refs, scores)
            key = refs["key"][...]
            d_products = (d_scores * layout.scale).astype(key.dtype)
            d["query"][...] += _dot(d_products, key, (1, 0))
            if kind == "far":
                d["far"][...] += _dot(d_products, refs["basis"][...], (1, 0))
            if kind == "near" and "near" in d:
                d["near"][:, _in_band(layout, i, j)] = d_scores

        _visit(layout, i, j, refs, functools.partial(_from_band, layout, i, j, refs), step)

    inputs, specs = _row_inputs(layout, basis, arrays)
    of_queries = {"query": arrays.query_BxHxTxD, "near": arrays.near_BxHxTxW, "far": arrays.far_BxHxTxR}
    of_queries = {name: array for name, array in of_queries.items() if array is not None}
    batch, heads = arrays.query_BxHxTxD.shape[:2]
    return _call(
        interpret,
        kernel,
        "flash_backward_rows",
        (batch, heads, layout.row_tiles, layout.key_tiles),
        inputs | results,
        specs | {"d_out": specs["query"], "logsumexp": _per_row(layout), "delta": _per_row(layout)},
        ({name: specs[name] for name in of_queries},),
        ({name: jax.ShapeDtypeStruct(array.shape, jnp.float32) for name, array in of_queries.items()},),
        cost=_cost(layout, arrays, 3),
    )[0]


def _row_inputs(layout: Layout, basis: np.ndarray | None, arrays: Arrays) -> tuple[dict, dict]:
    """(inputs, their blocks) on a grid of (batch, head, query tile, key tile)."""
    dim = arrays.query_BxHxTxD.shape[-1]

    def last_seen(i, j):  # what is not seen is not loaded either: the block stays that of the step before
        return jnp.minimum(j, jnp.maximum(layout.end(i) - 1, 0))

    def per_query(columns):
        return pl.BlockSpec((None, None, layout.rows, columns), lambda b, h, i, j: (b, h, i, 0))

    per_key = pl.BlockSpec(
        (None, None, layout.keys, dim), lambda b, h, i, j: (b, lax.div(h, np.int32(layout.group)), last_seen(i, j), 0)
    )
    inputs = {"query": arrays.query_BxHxTxD, "key": arrays.key_BxKxSxD, "value": arrays.value_BxKxSxD}
    specs = {"query": per_query(dim), "key": per_key, "value": per_key}
    if arrays.near_BxHxTxW is not None:
        inputs["near"] = arrays.near_BxHxTxW
        specs["near"] = per_query(arrays.near_BxHxTxW.shape[-1])
    if arrays.far_BxHxTxR is not None:
        assert basis is not None
        inputs |= {"far": arrays.far_BxHxTxR, "basis": jnp.asarray(basis, arrays.far_BxHxTxR.dtype)}
        specs["far"] = per_query(basis.shape[-1])
        specs["basis"] = _basis_block(layout, basis, lambda b, h, i, j: (i, j))
    return inputs, specs


def _per_row(layout: Layout) -> pl.BlockSpec:
    """The block of one number per query, [B, H, 1, T]."""
    return pl.BlockSpec((None, None, 1, layout.rows), lambda b, h, i, j: (b, h, 0, i))


def _basis_block(layout: Layout, basis: np.ndarray, tiles_of: Callable) -> pl.BlockSpec:
    def index(*grid):
        return jnp.clip(layout.basis_tile(*tiles_of(*grid)), 0, len(basis) - 1), 0, 0

    return pl.BlockSpec((None, *basis.shape[1:]), index)


def _in_band(layout: Layout, i: jax.Array, j: jax.Array):
    """The columns of key tile j in the local band of query tile i."""
    return pl.ds(pl.multiple_of((j - layout.band_start(i)) * layout.keys, layout.keys), layout.keys)


def _from_band(layout: Layout, i: jax.Array, j: jax.Array, refs: dict) -> jax.Array:
    return refs["near"][:, _in_band(layout, i, j)]


# -- along a column of tiles: the gradients of keys and values ------------------------------------------------------


def _backward_columns(interpret: bool, layout: Layout, basis, arrays: Arrays, results: dict) -> tuple:
    """Gradients of keys and values, from all query tiles of all heads of a group."""

    def kernel(refs, d_key, d_value):
        j, i = pl.program_id(2), pl.program_id(4)

        @pl.when((pl.program_id(3) == 0) & (i == 0))
        def _():
            d_key[...] = jnp.zeros_like(d_key)
            d_value[...] = jnp.zeros_like(d_value)

        def step(scores, kind):
            query, d_out = refs["query"][...], refs["d_out"][...]
            weights, d_scores = _d_scores(refs, scores)
            d_value[...] += _dot(weights.astype(d_out.dtype), d_out, (0, 0))
            d_key[...] += _dot((d_scores * layout.scale).astype(query.dtype), query, (0, 0))

        _visit(layout, i, j, refs, lambda: refs["near"][...], step)

    batch, kv_heads, length, dim = arrays.key_BxKxSxD.shape

    def head(k, g):
        return k * layout.group + g

    def seeing(i, j):  # query tiles before the first that sees key tile j are not loaded
        return jnp.clip(i, layout.first_row_tile(j), layout.row_tiles - 1)

    def per_query(columns):
        return pl.BlockSpec((None, None, layout.rows, columns), lambda b, k, j, g, i: (b, head(k, g), seeing(i, j), 0))

    def near_block(b, k, j, g, i):  # nor are near scores beside the band
        low, high = layout.near_row_tiles(j)
        i = jnp.clip(i, low, high)
        return b, head(k, g), i, jnp.clip(j - layout.band_start(i), 0, layout.band_tiles - 1)

    per_key = pl.BlockSpec((None, None, layout.keys, dim), lambda b, k, j, g, i: (b, k, j, 0))
    per_row = pl.BlockSpec((None, None, 1, layout.rows), lambda b, k, j, g, i: (b, head(k, g), 0, seeing(i, j)))
    inputs, _ = _row_inputs(layout, basis, arrays)
    specs = {"query": per_query(dim), "key": per_key, "value": per_key}
    specs |= {"d_out": per_query(dim), "logsumexp": per_row, "delta": per_row}
    if "near" in inputs:
        specs["near"] = pl.BlockSpec((None, None, layout.rows, layout.keys), near_block)
    if "far" in inputs:
        specs["far"] = per_query(basis.shape[-1])
        specs["basis"] = _basis_block(layout, basis, lambda b, k, j, g, i: (i, j))
    return _call(
        interpret,
        kernel,
        "flash_backward_columns",
        (batch, kv_heads, layout.key_tiles, layout.group, layout.row_tiles),
        inputs | results,
        specs,
        (per_key, per_key),
        (jax.ShapeDtypeStruct((batch, kv_heads, length, dim), jnp.float32),) * 2,
        cost=_cost(layout, arrays, 4),
    )


def _call(
    interpret: bool,
    kernel: Callable,
    name: str,
    grid: tuple[int, ...],
    inputs: dict,
    specs: dict,
    out_specs: tuple,
    out_shape: tuple,
    *,
    cost: pl.CostEstimate,
    scratch: tuple = (),
):
    """`pl.pallas_call` with inputs by name; the first three axes of a grid are independent."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[{name: specs[name] for name in inputs}],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)),
        interpret=interpret,
        name=name,
    )(inputs)


def _cost(layout: Layout, arrays: Arrays, products: int) -> pl.CostEstimate:
    """A kernel's cost, which XLA cannot see: `products` of a tile's scores with D columns; keys come for every row."""
    batch, heads, _, dim = arrays.query_BxHxTxD.shape
    scores = batch * heads * layout.rows * layout.keys * sum(int(layout.end(i)) for i in range(layout.row_tiles))
    read = sum(int(array.nbytes) for array in arrays if array is not None)
    return pl.CostEstimate(
        flops=2 * scores * dim * products,
        transcendentals=scores,
        bytes_accessed=read + 2 * scores // layout.rows * dim * arrays.key_BxKxSxD.dtype.itemsize,
    )
