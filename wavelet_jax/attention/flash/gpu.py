"""Flash attention for NVIDIA GPUs (Ampere and Hopper) in Triton, with wavelets in the scores; `prepared` has the plan.

Here is what a launch needs: sizes, counts, and the arrays in shapes that the kernels take. The kernels themselves are
in `gpu_kernels`, which is imported, with triton and jax-triton, only where this backend computes. Forward keeps an
online softmax (Dao et al., arXiv 2205.14135) and the logarithm of its sums; backward has the scores again from that, in
one kernel along rows for what belongs to queries, and one along keys for keys and values.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.attention.call import Call
from wavelet_jax.attention.flash.arrays import Arrays, Kernel, Layout, attend_by, prepare, unsupported_by_kernels
from wavelet_jax.attention.tiled.geometry import TileSizes


class Blocks(NamedTuple):
    """Sizes of one kernel: rows and keys of a block divide U and V; warps of a program; stages of its pipelines."""

    rows: int
    keys: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """All sizes of one case; `tiles.band` is for relative keys, and 0 without."""

    tiles: TileSizes
    forward: Blocks
    query_gradients: Blocks
    key_gradients: Blocks


_128, _64 = TileSizes(rows=128, block=128, band=64, keys=64), TileSizes(rows=64, block=64, band=64, keys=64)

# (compute capability, bytes of a number, head_dim at most): sizes. Chosen by what the compiler says of registers,
# spills and shared memory, not by a clock: no GPU was available. `tests/gpu_resources.py` prints that of every entry.
# Causal with wavelets of 2^0 .. 2^7, 16-bit numbers spill nothing; float32 spills tens of bytes for heads of 64, and
# up to some kilobytes for 256. Bands are as narrow as tiles allow: near scores are rows + band float32 numbers per
# query and head.
SIZES = {
    (80, 2, 64): Sizes(_128, Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 2), Blocks(32, 64, 4, 2)),
    (80, 2, 128): Sizes(_128, Blocks(128, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    (80, 2, 256): Sizes(_64, Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 1)),
    (80, 4, 64): Sizes(_64, Blocks(64, 32, 8, 2), Blocks(32, 16, 8, 2), Blocks(32, 32, 8, 2)),
    (80, 4, 128): Sizes(_64, Blocks(32, 32, 8, 2), Blocks(32, 16, 8, 2), Blocks(16, 32, 8, 2)),
    (80, 4, 256): Sizes(_64, Blocks(16, 16, 8, 2), Blocks(16, 16, 8, 2), Blocks(16, 16, 8, 2)),
    (90, 2, 64): Sizes(_128, Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2)),
    (90, 2, 128): Sizes(_128, Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 64, 8, 2)),
    (90, 2, 256): Sizes(_64, Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 1)),
    (90, 4, 64): Sizes(_64, Blocks(64, 32, 8, 2), Blocks(32, 16, 8, 2), Blocks(32, 32, 8, 2)),
    (90, 4, 128): Sizes(_64, Blocks(32, 32, 8, 2), Blocks(32, 16, 8, 2), Blocks(16, 32, 8, 2)),
    (90, 4, 256): Sizes(_64, Blocks(16, 16, 8, 2), Blocks(16, 16, 8, 2), Blocks(16, 16, 8, 2)),
}
# The most stages where a far form has so many columns (after padding), whose tiles take shared memory too; 1 for more.
MOST_STAGES = {16: 3, 32: 2}

CAPABILITIES = {(8, 0): 80, (9, 0): 90}

# Bytes of a number, and how the kernels multiply two of them. float32 goes as three products of its halves in tf32,
# which leaves errors of float32's own size: tf32 alone would leave 1e-3, and IEEE products do not run on matrix units.
DTYPES = {"float16": (2, "tf32"), "bfloat16": (2, "tf32"), "float32": (4, "tf32x3")}

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256  # others in between are padded to a power of two


class Launch(NamedTuple):
    """One launch of a kernel of `gpu_kernels`, which takes arrays, counts, outputs and constants, in this order."""

    kernel: str
    arrays: Sequence[jax.Array]
    counts: dict[str, int]
    outputs: Sequence[jax.ShapeDtypeStruct]
    constants: dict[str, int | float | bool | str]
    programs: int
    warps: int
    stages: int
    capability: int


Launcher = Callable[[Launch], Sequence[jax.Array]]

_elsewhere: contextvars.ContextVar[tuple[Launcher, int] | None] = contextvars.ContextVar("elsewhere", default=None)


@contextlib.contextmanager
def launching(launcher: Launcher, capability: int) -> Iterator[None]:
    """Functions traced inside hand their launches, sized for that capability, to `launcher`: tests without a GPU."""
    token = _elsewhere.set((launcher, capability))
    try:
        yield
    finally:
        _elsewhere.reset(token)


def unsupported(call: Call) -> list[str]:
    """Reasons why this backend does not support a call; empty if it does."""
    if _elsewhere.get() is None:
        capability = gpu_capability()
        if capability not in CAPABILITIES:
            this = jax.default_backend() if capability is None else f"a GPU of {capability[0]}.{capability[1]}"
            return [f"an NVIDIA GPU of compute capability 8.0 or 9.0 (this process runs on {this})"]
        missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
        if missing:
            return [f"{' and '.join(missing)} (pip install 'wavelet-jax[cuda]')"]
    found = []
    if jnp.dtype(call.dtype).name not in DTYPES:
        found.append(f"queries in {' or '.join(DTYPES)}")
    if call.head_dim > MAX_HEAD_DIM:
        found.append(f"a head size of at most {MAX_HEAD_DIM}")
    return found or unsupported_by_kernels(call, _tiles(call))


def gpu_capability() -> tuple[int, int] | None:
    """The compute capability of the NVIDIA GPU that JAX computes on; None where it computes on something else."""
    if jax.default_backend() != "gpu":
        return None
    numbers = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and all(n.isdigit() for n in numbers) else None


def attend(query_BxTxHxD: jax.Array, key_BxSxKxD: jax.Array, value_BxSxKxD: jax.Array, call: Call) -> jax.Array:
    """Softmax attention as `Terms` states it, of a supported call; scores and softmax in float32.

    Args:
      query_BxTxHxD, key_BxSxKxD, value_BxSxKxD: queries and keys rotated already; K divides H.
      call: what they are, and what the position method adds.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key.
    """
    launcher, _ = _elsewhere.get() or (_by_jax_triton, None)
    with jax.named_scope("tables"):
        prepared = prepare(call, _tiles(call))
    query, key, value = (x.astype(call.dtype) for x in (query_BxTxHxD, key_BxSxKxD, value_BxSxKxD))
    out = attend_by(_kernel(launcher, _capability()), prepared, query, key, value, call)
    return out.astype(value_BxSxKxD.dtype)


def _capability() -> int:
    if (elsewhere := _elsewhere.get()) is not None:
        return elsewhere[1]
    capability = gpu_capability()
    assert capability is not None, "not a supported call: there is no GPU"
    return CAPABILITIES[capability]


def _tiles(call: Call) -> TileSizes:
    tiles = _sizes(_capability(), call.dtype, call.head_dim).tiles
    return tiles if call.terms.relative_keys is not None else dataclasses.replace(tiles, band=0)


def _sizes(capability: int, dtype: jnp.dtype, head_dim: int) -> Sizes:
    size = DTYPES[jnp.dtype(dtype).name][0]
    return next(sizes for (c, s, d), sizes in SIZES.items() if (c, s) == (capability, size) and head_dim <= d)


@functools.cache
def _kernel(launcher: Launcher, capability: int) -> Kernel:
    def forward(layout: Layout, basis: np.ndarray | None, arrays: Arrays, out_dtype: jnp.dtype):
        return folding(lambda arrays: _forward(launcher, capability, layout, basis, arrays, out_dtype))(arrays)

    def backward(layout: Layout, basis: np.ndarray | None, *arrays):
        return folding(functools.partial(_backward, launcher, capability, layout, basis))(*arrays)

    return Kernel(forward, backward)


def folding(function: Callable) -> Callable:
    """A function of arrays [B, ..] to arrays [B, ..] that `jax.vmap` takes, by a larger B: launches have no rule."""
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def mapped(size: int, is_mapped: tuple, *arrays):
        def fold(x: jax.Array, is_mapped: bool) -> jax.Array:  # the mapped axis comes first
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = call(*jax.tree.map(fold, arrays, tuple(is_mapped)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return call


def _by_jax_triton(launch: Launch) -> Sequence[jax.Array]:
    import jax_triton  # pyright: ignore[reportMissingImports]  # in the extra `cuda`

    from wavelet_jax.attention.flash import gpu_kernels

    return jax_triton.triton_call(
        *launch.arrays,
        *launch.counts.values(),
        kernel=getattr(gpu_kernels, launch.kernel),
        out_shape=launch.outputs,
        grid=(launch.programs,),
        name=launch.kernel,
        num_warps=launch.warps,
        num_stages=launch.stages,
        compute_capability=launch.capability,
        **launch.constants,
    )


# -- the kernel's two functions -----------------------------------------------------------------------------------


def _forward(
    launcher: Launcher,
    capability: int,
    layout: Layout,
    basis: np.ndarray | None,
    arrays: Arrays,
    out_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    blocks = _sizes(capability, arrays.query_BxHxTxD.dtype, arrays.query_BxHxTxD.shape[3]).forward
    inputs = _inputs(basis, arrays)
    out, logsumexp = launcher(
        Launch(
            kernel="forward",
            arrays=inputs,
            counts=_counts(layout),
            outputs=[_like(inputs[0], out_dtype), _by_row(arrays)],
            constants=_constants(layout, inputs, arrays, blocks),
            programs=math.prod(arrays.query_BxHxTxD.shape[:3]) // blocks.rows,
            warps=blocks.warps,
            stages=_stages(inputs, arrays, blocks),
            capability=capability,
        )
    )
    return out[..., : arrays.query_BxHxTxD.shape[3]], logsumexp


def _backward(
    launcher: Launcher,
    capability: int,
    layout: Layout,
    basis: np.ndarray | None,
    arrays: Arrays,
    out_BxHxTxD: jax.Array,
    logsumexp_BxHxT: jax.Array,
    d_out_BxHxTxD: jax.Array,
) -> Arrays:
    head_dim = arrays.query_BxHxTxD.shape[3]
    sizes = _sizes(capability, arrays.query_BxHxTxD.dtype, head_dim)
    inputs = _inputs(basis, arrays)
    query, key, value, near, far, _ = inputs
    delta_BxHxT = jnp.sum(d_out_BxHxTxD.astype(jnp.float32) * out_BxHxTxD, axis=-1)
    read = [*inputs, _widen(d_out_BxHxTxD, query.shape[3]), logsumexp_BxHxT, delta_BxHxT]

    def run(kernel: str, blocks: Blocks, outputs: list, programs: int) -> Sequence[jax.Array]:
        constants = _constants(layout, inputs, arrays, blocks)
        sized = (programs, blocks.warps, _stages(inputs, arrays, blocks), capability)
        return launcher(Launch(kernel, read, _counts(layout), outputs, constants, *sized))

    blocks, none = sizes.query_gradients, jax.ShapeDtypeStruct((1,), jnp.float32)
    d_query, d_near, d_far = run(
        "query_gradients",
        blocks,
        [
            _like(query, jnp.float32),
            none if arrays.near_BxHxTxW is None else _like(near, jnp.float32),
            none if arrays.far_BxHxTxR is None else _like(far, jnp.float32),
        ],
        math.prod(query.shape[:3]) // blocks.rows,
    )
    blocks = sizes.key_gradients
    d_key, d_value = run(
        "key_gradients",
        blocks,
        [_like(key, key.dtype), _like(value, value.dtype)],
        math.prod(key.shape[:3]) // blocks.keys,
    )
    return Arrays(
        d_query[..., :head_dim],
        d_key[..., :head_dim],
        d_value[..., :head_dim],
        None if arrays.near_BxHxTxW is None else d_near,
        None if arrays.far_BxHxTxR is None else d_far[..., : arrays.far_BxHxTxR.shape[3]],
    )


def _inputs(basis: np.ndarray | None, arrays: Arrays) -> list[jax.Array]:
    """query, key, value, near, far, basis as the kernels take them; where the terms have no such part, the query."""
    query, key, value, near, far = arrays
    columns = _power_of_two(query.shape[3])
    query, key, value = (_widen(x, columns) for x in (query, key, value))
    if far is None:
        return [query, key, value, query if near is None else near, query, query]
    assert near is not None
    assert basis is not None
    columns = _power_of_two(far.shape[3])
    flat = jnp.asarray(basis.reshape(-1, basis.shape[2]), far.dtype)
    return [query, key, value, near, _widen(far, columns), _widen(flat, columns)]


def _counts(layout: Layout) -> dict[str, int]:
    """The kernels' token counts; the origin no further out than where all is plain, which keeps sums in int32."""
    rows, keys = layout.row_tiles * layout.rows, layout.key_tiles * layout.keys
    before, (far_before, far_after) = layout.band[0] * layout.keys, (n * layout.keys for n in layout.reach)
    lowest, highest = -(rows + layout.band_tiles * layout.keys + far_after), keys + before + far_before
    return {
        "row_length": rows,
        "key_length": keys,
        "group": layout.group,
        "origin": min(max(layout.origin * layout.keys, lowest), highest),
        "band_before": before,
        "far_before": far_before,
        "far_after": far_after,
        "first_key": layout.first_key,
        "end_key": layout.end_key,
    }


def _constants(layout: Layout, inputs: list[jax.Array], arrays: Arrays, blocks: Blocks) -> dict:
    has_far = arrays.far_BxHxTxR is not None
    return {
        "D": inputs[0].shape[3],
        "U": layout.rows,
        "W": layout.band_tiles * layout.keys,
        "R": inputs[4].shape[3] if has_far else MIN_HEAD_DIM,
        "SCALE": layout.scale,
        "CAUSAL": layout.causal,
        "RAGGED": layout.ragged,
        "HAS_NEAR": arrays.near_BxHxTxW is not None,
        "HAS_FAR": has_far,
        "PRECISION": DTYPES[inputs[0].dtype.name][1],
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.keys,
    }


def _stages(inputs: list[jax.Array], arrays: Arrays, blocks: Blocks) -> int:
    columns = MIN_HEAD_DIM if arrays.far_BxHxTxR is None else inputs[4].shape[3]
    return min(blocks.stages, MOST_STAGES.get(columns, 1))


def _power_of_two(columns: int) -> int:
    return max(MIN_HEAD_DIM, 1 << (columns - 1).bit_length())


def _widen(x: jax.Array, columns: int) -> jax.Array:
    return x if x.shape[-1] == columns else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])


def _like(x: jax.Array, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype)


def _by_row(arrays: Arrays) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(arrays.query_BxHxTxD.shape[:3], jnp.float32)
