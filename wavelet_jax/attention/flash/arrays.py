"""Inputs of the flash kernels (plain arrays, tiled at absolute positions), and the custom_vjp around a kernel.

`tiled` cuts keys relative to every query tile, by slices at any key. A kernel loads whole tiles at multiples of their
size, so here queries and keys are cut at absolute positions (keys get padding in front, up to V - 1, so that the
position of query 0 begins a tile). The distances of tile j of keys from tile i of queries then depend on the difference
of their numbers only, and the constants of `factors` serve as they do in `tiled`. All that depends on the position
method is made outside of the kernel, in ordinary JAX. For query row m and key n (padded indices), n's tile j:

    score[m, n] = (query[m] . key[n] + far[m] . basis[b, n % V]) scale    far tiles: `Layout.basis_tile` gives b
                = query[m] . key[n] scale + near[m, n - start]            tiles of the local band, from key `start` on
                = query[m] . key[n] scale                                 beyond, or for methods without relative keys

`near` holds the causal mask. Gradients by near and far go back to the queries through what made them (Eq. 10's q . p).

In names: B batch, H = K x G heads, N tiles of U query rows, J tiles of V keys, D head_dim, W keys of a local band,
R columns of the far form.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from wavelet_jax.attention import common, tiled
from wavelet_jax.attention.call import Call, unsupported_by_tiles
from wavelet_jax.attention.common import SAVED_RESIDUALS
from wavelet_jax.attention.relative import factors
from wavelet_jax.attention.tiled.geometry import Geometry, TileSizes
from wavelet_jax.attention.tiled.skew import skew

# A hidden score. Finite, so that a difference of two of them is not NaN, and with room below for what is added to it.
MASKED = -1e30

# Bytes of near scores to have at once, as far as taking the key heads in parts allows: with their gradients and copies
# on the way they need about five times that. Sequences that are so long keep a chip busy with one head.
NEAR_BYTES = 2**27

# Columns of the far form come in multiples of this: the least that matrix units of GPUs sum over in bfloat16.
FAR_COLUMNS = 16

# Position scores hold constants of float32 quality: accelerators would cut the operands of these small products.
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The numbers of a kernel, all known while tracing. Its methods take tile numbers that may be traced.

    Attributes:
      rows, keys: U and V; V divides U.
      row_tiles, key_tiles: N and J.
      group: G, query heads per key head: head h reads key head h // G.
      origin: the tile of keys that begins at the position of query 0; may lie outside of 0 .. J - 1.
      band: key tiles of the local band (before, after) those at the query tile's own positions.
      reach: key tiles of the far form (before, after) the local band.
      first_key, end_key: the keys that are no padding, as padded indices.
      ragged: whether a query (that is not padding) may see a key that is padding unless the kernel hides it.
      causal: a query sees keys at its own position and before: none past its tile's local band.
      scale: 1 / sqrt(D).
    """

    rows: int
    keys: int
    row_tiles: int
    key_tiles: int
    group: int
    origin: int
    band: tuple[int, int]
    reach: tuple[int, int]
    first_key: int
    end_key: int
    ragged: bool
    causal: bool
    scale: float

    @property
    def own_tiles(self) -> int:
        """Key tiles at the positions of one query tile."""
        return self.rows // self.keys

    @property
    def band_tiles(self) -> int:
        """W / V."""
        return self.band[0] + self.own_tiles + self.band[1]

    def own(self, i: int | jax.Array) -> int | jax.Array:
        """The tile of keys that begins where query tile i does; may lie outside of 0 .. J - 1."""
        return self.origin + i * self.own_tiles

    def band_start(self, i: int | jax.Array) -> int | jax.Array:
        """The first tile of keys of query tile i's local band; may lie outside of 0 .. J - 1."""
        return self.own(i) - self.band[0]

    def end(self, i: int | jax.Array) -> int | jax.Array:
        """Query tile i sees key tiles 0 .. end(i) - 1 at most; from 0 to J."""
        if not self.causal:
            return self.key_tiles
        end = self.own(i) + self.own_tiles
        if isinstance(end, int):
            return min(max(end, 0), self.key_tiles)
        return jnp.clip(end, 0, self.key_tiles)

    def first_row_tile(self, j: int | jax.Array) -> int | jax.Array:
        """The first query tile that sees key tile j; may lie outside of 0 .. N - 1."""
        return _floor_divide(j - self.origin, self.own_tiles) if self.causal else 0

    def near_row_tiles(self, j: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first and the last query tile whose local band holds key tile j, or those next to them in 0 .. N - 1."""
        first, last = (
            jnp.clip(_floor_divide(j - self.origin + shift, self.own_tiles), 0, self.row_tiles - 1)
            for shift in (-self.band[1], self.band[0])
        )
        return first, last

    def basis_tile(self, i: int | jax.Array, j: int | jax.Array) -> int | jax.Array:
        """The tile of the basis for query tile i and key tile j; meaningful where `is_far` holds."""
        away = j - self.band_start(i)
        past = away - self.band_tiles
        if isinstance(past, int):
            return self.reach[0] + (away if past < 0 else past)
        return self.reach[0] + jnp.where(past < 0, away, past)

    def is_near(self, i: int | jax.Array, j: int | jax.Array) -> bool | jax.Array:
        """Whether key tile j lies in the local band of query tile i: where near scores and the causal mask are."""
        away = j - self.band_start(i)
        return (away >= 0) & (away < self.band_tiles)

    def is_far(self, i: int | jax.Array, j: int | jax.Array) -> bool | jax.Array:
        """Whether the far form reaches key tile j from query tile i."""
        away = j - self.band_start(i)
        past = away - self.band_tiles
        return ((away >= -self.reach[0]) & (away < 0)) | ((past >= 0) & (past < self.reach[1]))


def _floor_divide(x: int | jax.Array, n: int) -> int | jax.Array:
    """x // n in operations that kernels have at compile time (`//` on a traced x asks for the device's kind)."""
    if isinstance(x, int) or n == 1:
        return x // n if isinstance(x, int) else x
    n = x.dtype.type(n)  # with jax_enable_x64 a Python integer is int64
    remainder = lax.rem(x, n)
    return lax.div(x - jnp.where(remainder < 0, remainder + n, remainder), n)


class Arrays(NamedTuple):
    """Arrays that a kernel reads and has gradients for; near or far is None if the terms have no such part."""

    query_BxHxTxD: jax.Array  # T = N U, padded at the end
    key_BxKxSxD: jax.Array  # S = J V, padded in front and at the end
    value_BxKxSxD: jax.Array
    near_BxHxTxW: jax.Array | None  # float32, scaled, `MASKED` where causality hides the key
    far_BxHxTxR: jax.Array | None  # the query's dtype, not scaled


class Kernel(NamedTuple):
    """A flash kernel: two pure functions.

    forward(layout, basis, arrays, out_dtype) -> (out_BxHxTxD, logsumexp_BxHxT float32). A row that sees no key has
    zeros, and +inf (so that its weights exp(score - logsumexp) are 0).

    backward(layout, basis, arrays, out, logsumexp, d_out) -> `Arrays` of gradients, float32 or the array's own dtype.
    Here `out` is float32.
    Gradients by near and far tiles that no key tile meets are 0, and so are those by near scores that are hidden.
    """

    forward: Callable
    backward: Callable


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """All of a call that is known while tracing.

    Attributes:
      layout: the kernel's numbers.
      queries: T before padding.
      constants: factors of the relative keys; None where there are none.
      basis: [sum(layout.reach), V, R] float32, tiles by rising key position, V keys likewise; None: no far tiles.
    """

    layout: Layout
    queries: int
    constants: factors.Factors | None
    basis: np.ndarray | None


def unsupported_by_kernels(call: Call, sizes: TileSizes) -> list[str]:
    """Reasons why kernels on these arrays do not support a call; empty if they do."""
    terms, found = call.terms, unsupported_by_tiles(call)
    if isinstance(call.offset, jax.Array):
        found.append("positions that are known while tracing")
    if call.segment_ids is not None:
        found.append("no segment_ids or padding mask")
    if call.window is not None:
        found.append("no window")
    if call.varies:
        found.append("jax.shard_map(.., check_vma=False): kernels do not say along which axes their results vary")
    if terms.bias is not None:
        found.append("a position method without a bias")
    if terms.relative_values is not None:
        found.append("a position method without relative values")
    if terms.relative_keys is not None and isinstance(call.offset, int):
        constants = tiled.factors_of(_geometry(call, sizes), terms, call.tolerance)
        if constants is None:
            found.append("relative keys that are constant, and of bounded reach")
        elif constants.near is None:
            found.append(f"relative keys that are smooth past {sizes.band} tokens (no step functions)")
    return found


def prepare(call: Call, sizes: TileSizes) -> Prepared:
    """Layout and constants of a call that is not `unsupported_by_kernels`; V must divide U and the band."""
    if sizes.rows % sizes.keys or sizes.band % sizes.keys:
        raise ValueError(f"rows {sizes.rows} and band {sizes.band} must be multiples of keys {sizes.keys}")
    geometry = _geometry(call, sizes)
    constants = None if call.terms.relative_keys is None else tiled.factors_of(geometry, call.terms, call.tolerance)
    before = 0 if constants is None else sizes.band
    after = 0 if call.causal else before
    V, offset = sizes.keys, geometry.offset
    assert offset is not None
    front = -offset % V
    end_key = front + call.keys
    key_tiles = -(-end_key // V)
    hidden_end = end_key == key_tiles * V or (call.causal and offset + call.queries <= call.keys)
    basis, reach = None, (0, 0)
    if constants is not None:
        reach, basis = constants.reach_in_tiles, _basis(constants.far[:2])
    layout = Layout(
        rows=sizes.rows,
        keys=V,
        row_tiles=-(-call.queries // sizes.rows),
        key_tiles=key_tiles,
        group=call.heads // call.kv_heads,
        origin=(offset + front) // V,
        band=(before // V, after // V),
        reach=reach,
        first_key=front,
        end_key=end_key,
        ragged=front > 0 or not hidden_end,
        causal=call.causal,
        scale=1 / math.sqrt(call.head_dim),
    )
    return Prepared(layout, call.queries, constants, basis)


def attend_by(
    kernel: Kernel,
    prepared: Prepared,
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    call: Call,
) -> jax.Array:
    """A kernel's attention [B, T, H, D] in the value's dtype, of queries and keys that are already rotated."""
    content, position = common.with_biases(
        query_BxTxHxD,
        call.terms.content_bias,
        call.terms.position_bias,
        has_relative_keys=call.terms.relative_keys is not None,
    )
    inputs = content.astype(query_BxTxHxD.dtype), position, key_BxSxKxD, value_BxSxKxD
    parts = _parts(prepared, query_BxTxHxD.shape[0], key_BxSxKxD.shape[2])
    if parts == 1:
        out_BxHxTxD: Any = _attend(kernel, prepared, *inputs)
    else:

        def split(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(*x.shape[:2], parts, -1, x.shape[-1]), 2, 0)

        out = lax.map(lambda part: _attend(kernel, prepared, *part), jax.tree.map(split, inputs))
        out_BxHxTxD = jnp.moveaxis(out, 0, 1).reshape(out.shape[1], -1, *out.shape[3:])
    return jnp.moveaxis(out_BxHxTxD, 1, 2)[:, : prepared.queries]


def _parts(prepared: Prepared, batch: int, kv_heads: int) -> int:
    """Parts of the key heads (and of their query heads) to take one after the other; see `NEAR_BYTES`."""
    layout, constants = prepared.layout, prepared.constants
    if constants is None:
        return 1
    assert constants.near is not None, "not a supported call"
    if constants.near.rows.ndim == 3:  # tables by head are not cut
        return 1
    a_head = 4 * batch * layout.group * layout.row_tiles * layout.rows * layout.band_tiles * layout.keys
    enough = (
        parts for parts in range(1, kv_heads) if kv_heads % parts == 0 and a_head * kv_heads <= parts * NEAR_BYTES
    )
    return next(enough, kv_heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel: Kernel, prepared: Prepared, content, position, key, value) -> Any:
    """[B, H, T, D], padded. Only the inputs, the output and its logsumexp wait for the backward pass: the near scores,
    several times as large as the queries, are recomputed there.
    """
    return _run(kernel, prepared, value.dtype, content, position, key, value)[0]


def _run(kernel: Kernel, prepared: Prepared, out_dtype: jnp.dtype, *inputs) -> tuple[jax.Array, jax.Array]:
    with jax.named_scope("prepare"):
        arrays = arrays_of(prepared, *inputs)
    with jax.named_scope("flash"):
        return kernel.forward(prepared.layout, prepared.basis, arrays, out_dtype)


def _attend_forward(kernel: Kernel, prepared: Prepared, *inputs):
    # The output waits unrounded: see `sweep`.
    out, logsumexp = checkpoint_name(_run(kernel, prepared, jnp.float32, *inputs), SAVED_RESIDUALS)
    return out.astype(inputs[-1].dtype), (inputs, out, logsumexp)


def _attend_backward(kernel: Kernel, prepared: Prepared, residuals: tuple, d_out: jax.Array) -> tuple:
    inputs, out, logsumexp = residuals
    with jax.named_scope("prepare"):
        arrays = arrays_of(prepared, *inputs)
    with jax.named_scope("flash"):
        d_arrays = kernel.backward(prepared.layout, prepared.basis, arrays, out, logsumexp, d_out)
    with jax.named_scope("prepare"):
        # What made the arrays is linear, so this keeps nothing of them. In float32 the parts of a query's gradient are
        # added before they are rounded to its dtype.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
        _, pull = jax.vjp(functools.partial(arrays_of, prepared), *wide)
        d_inputs = pull(jax.tree.map(lambda d: d.astype(jnp.float32), d_arrays))
    return tuple(jax.tree.map(lambda d, x: d.astype(x.dtype), d_inputs, inputs))


_attend.defvjp(_attend_forward, _attend_backward)


def arrays_of(
    prepared: Prepared,
    content_BxTxHxD: jax.Array,
    position_BxTxHxD: jax.Array | None,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
) -> Arrays:
    """The kernel's arrays; `content` holds the content bias, `position` the position bias (None: the same queries)."""
    layout, constants = prepared.layout, prepared.constants

    def head_major(x: jax.Array, before: int, length: int) -> jax.Array:
        x = jnp.moveaxis(x, 2, 1)
        return jnp.pad(x, [(0, 0), (0, 0), (before, length - before - x.shape[2]), (0, 0)])

    length = layout.row_tiles * layout.rows
    query = head_major(content_BxTxHxD, 0, length)
    key, value = (head_major(x, layout.first_key, layout.key_tiles * layout.keys) for x in (key_BxSxKxD, value_BxSxKxD))
    if constants is None:
        return Arrays(query, key, value, None, None)
    assert constants.near is not None, "not a supported call"
    position = query if position_BxTxHxD is None else head_major(position_BxTxHxD, 0, length)
    position_BxHxNxUxD = position.reshape(*position.shape[:2], layout.row_tiles, layout.rows, -1)
    return Arrays(
        query,
        key,
        value,
        _near(layout, constants.near, position_BxHxNxUxD),
        _far(constants.far[:2], position_BxHxNxUxD, content_BxTxHxD.dtype),
    )


def _near(layout: Layout, near: factors.Near, position_BxHxNxUxD: jax.Array) -> jax.Array:
    """[B, H, T, W] float32: the scores of every row with the distances of its tile's band, skewed to keys."""
    width = layout.band_tiles * layout.keys
    columns = position_BxHxNxUxD if near.project is None else _project(position_BxHxNxUxD, near.project)
    G = _einsum(f"bhnuc,{_heads(near.rows)}ec->bhnue", columns, near.rows) * layout.scale
    # Where causal, the rows end at distance 0; what comes after is hidden.
    return skew(G, width, MASKED).reshape(*G.shape[:2], layout.row_tiles * layout.rows, width)


def _far(
    sides: tuple[factors.Far | None, factors.Far | None], position_BxHxNxUxD: jax.Array, dtype: jnp.dtype
) -> jax.Array | None:
    """[B, H, T, R]: queries in the far coordinates of both sides, one after the other, and zeros up to R columns.

    The basis is orthonormal, so that rounding these costs what rounding the queries does.
    """
    parts = [
        _einsum(
            f"bhnuc,{'h' if far.rows.ndim == 4 else ''}urc->bhnur", _project(position_BxHxNxUxD, far.project), far.rows
        )
        for far in sides
        if far is not None
    ]
    if not parts:
        return None
    x = jnp.concatenate(parts, axis=-1)
    x = jnp.pad(x, [(0, 0)] * 4 + [(0, -x.shape[-1] % FAR_COLUMNS)])
    return x.reshape(*x.shape[:2], -1, x.shape[-1]).astype(dtype)


def _basis(sides: tuple[factors.Far | None, factors.Far | None]) -> np.ndarray | None:
    """[tiles, V, R] for `_far`'s coordinates: a side's tiles are zero in the other's columns."""
    ranks = [0 if far is None else far.basis.shape[-1] for far in sides]
    columns = -(-sum(ranks) // FAR_COLUMNS) * FAR_COLUMNS
    parts = []
    for side, far in enumerate(sides):
        if far is not None:
            outwards = far.basis[::-1] if side == 0 else far.basis
            left = 0 if side == 0 else ranks[0]
            parts.append(np.pad(outwards, [(0, 0), (0, 0), (left, columns - left - ranks[side])]))
    return np.concatenate(parts) if parts else None


def _project(position_BxHxNxUxD: jax.Array, matrix: np.ndarray) -> jax.Array:
    return _einsum(f"bhnud,{_heads(matrix)}dc->bhnuc", position_BxHxNxUxD, matrix)


def _heads(array: np.ndarray) -> str:
    return "h" if array.ndim == 3 else ""


def _geometry(call: Call, sizes: TileSizes) -> Geometry:
    offset = call.clamped_offset
    assert isinstance(offset, int), "not a supported call: its offset is traced"
    return Geometry(sizes=sizes, causal=call.causal, window=None, offset=offset, queries=call.queries, keys=call.keys)
