"""One tile of keys for one tile of queries: what it sees of the inputs, and its scores. The letters: ../README.md.

Scores are [V, G, U], keys before rows, and every array of a row is [D, G, U]: then each product of the sweep, forward
and backward, has its operands in the order of memory that a matrix product wants, with keys and values transposed once
for all tiles and no scores ever. They are not scaled: the exponential is, which saves a pass.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wavelet_jax.attention.common import Array, einsum, split_heads
from wavelet_jax.attention.relative import factors
from wavelet_jax.attention.tiled.geometry import Plan, Tile, band_start, num_distances, table_start, visible
from wavelet_jax.attention.tiled.skew import by_key, skew


class Inputs(NamedTuple):
    """Inputs of the custom derivative; a field that the terms do not need is None."""

    query_NxBxKxDxGxU: jax.Array  # with the content bias
    position_NxBxKxDxGxU: jax.Array | None  # with the position bias; None: the same queries
    key_BxKxSxD: jax.Array  # padded on both sides, as is the value
    value_BxKxSxD: jax.Array
    key_table: jax.Array | None  # [n, C] or [K, G, n, C], distances falling; None with constants
    value_table: jax.Array | None  # [n, D] or [K, G, n, D]
    bias_table: jax.Array | None  # [K, G, n], divided by the scale of the scores


class QueryForms(NamedTuple):
    """Queries in every form that scores are made of; without `far`, `near` and `position` may be None."""

    query: jax.Array  # [.., D, G, U]
    position: jax.Array | None  # [.., D, G, U], for the product with a learned table; None: there is none
    near: jax.Array | None  # [.., W, G, U]: position scores of the W keys of the local band of a row's block
    far: tuple[jax.Array | None, ...]  # [.., R, G, U], for the far bases in the order of `Factors.far`


def query_forms(plan: Plan, query_BxKxDxGxU: jax.Array, position_BxKxDxGxU: jax.Array | None) -> QueryForms:
    """All forms of a tile's queries; those that constant factors make are float32, also of bfloat16 queries."""
    position = query_BxKxDxGxU if position_BxKxDxGxU is None else position_BxKxDxGxU
    if plan.factors is None or plan.key_everywhere:
        return QueryForms(query_BxKxDxGxU, position if plan.key_everywhere else None, None, ())

    def blocks(x: jax.Array) -> jax.Array:  # [.., U] -> [.., U / block, block]
        return x.reshape(*x.shape[:-1], -1, plan.sizes.block)

    def far_coordinates(far: factors.Far, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:-1], -1, far.rows.shape[0])
        return join(einsum("bkcgiu,urc->bkrgiu", x, far.rows))

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], -1)

    near = plan.factors.near
    assert near is not None
    x, *xs = _products(position, [form and form.project for form in (near, *plan.factors.far)])
    x = position if x is None else x
    fill = [(0, 0)] * (near.rows.ndim - 2) + [(0, int(plan.causal)), (0, 0)]  # a distance more: what `skew` wants
    table = split_heads(np.pad(near.rows, fill), 3, position.shape[1])
    G = einsum(f"bkcgiu,{einsum_axes(table)}->bkgiue", blocks(x), table)
    width = plan.sizes.band + plan.sizes.block + plan.after
    scores = jnp.moveaxis(skew(G, width, -jnp.inf, near.rows.shape[-2]), -1, 2)  # [b, k, W, g, i, u]
    far = tuple(
        None if far is None or x is None else far_coordinates(far, x)
        for far, x in zip(plan.factors.far, xs, strict=True)
    )
    return QueryForms(query_BxKxDxGxU, None, join(scores), far)


def _products(x_BxKxDxGxU: jax.Array, matrices: list[np.ndarray | None]) -> Sequence[jax.Array | None]:
    """[B, K, c, G, U] float32 with each matrix, [D, c] or [H, D, c]; None for None."""
    given = [matrix for matrix in matrices if matrix is not None]
    if not given:
        return [None] * len(matrices)
    matrix = split_heads(np.concatenate(given, axis=-1), 3, x_BxKxDxGxU.shape[1])
    if matrix.ndim == 2:  # a product for each key head: neither what goes in nor what comes out is transposed
        matrix = jnp.broadcast_to(matrix, (x_BxKxDxGxU.shape[1], *matrix.shape))
    product = einsum(f"bkdgu,{'kdc' if matrix.ndim == 3 else 'kgdc'}->bkcgu", x_BxKxDxGxU, matrix)
    ends = np.cumsum([matrix.shape[-1] for matrix in given])
    parts = iter(jnp.split(product, ends[:-1], axis=2))
    return [None if matrix is None else next(parts) for matrix in matrices]


class KeyBlock(NamedTuple):
    """Keys and values as a sweep reads them, padded; the transposed ones, [B, K, D, S], where it needs them."""

    key: jax.Array  # [B, K, S, D]
    key_transposed: jax.Array | None
    value: jax.Array | None  # [B, K, S, D]
    value_transposed: jax.Array | None


class Far(NamedTuple):
    """A far basis for a tile of keys."""

    basis: Array  # [V, R]
    coordinates: int  # which of `QueryForms.far` goes with it


class View(NamedTuple):
    """The slices of the inputs for one tile of keys and one of queries; None if the terms have no such part."""

    keys: KeyBlock  # V of the S
    table: jax.Array | None  # [n, D] or [K, G, n, D], relative keys of the tile's distances, falling by one
    far: tuple[Far, ...]
    near_value: jax.Array | None  # [n, D] or [K, G, n, D]
    bias: jax.Array | None  # [K, G, n]
    visible: jax.Array | None  # broadcastable to [B, K, V, G, U]; None: all are


def view_of(
    plan: Plan,
    inputs: Inputs,
    keys: KeyBlock,
    tile: Tile,
    offset: jax.Array,
    row_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> View:
    """The slices of the inputs that a tile needs; `row_segments` [B, U] are its own, `key_segments` of all keys."""

    def slices(array: jax.Array | None, axis: int) -> Any:
        start = tile.start + plan.padding[0]
        return None if array is None else lax.dynamic_slice_in_dim(array, start, tile.width, axis)

    def rows(table: jax.Array | None, axis: int = -2) -> jax.Array | None:
        start, count = table_start(plan, tile, offset), num_distances(plan, tile)
        return None if table is None else lax.dynamic_slice_in_dim(table, start, count, axis)

    has_table = inputs.key_table is not None and tile.relative
    hides = band_start(plan, tile) is not None or has_table or inputs.bias_table is not None
    return View(
        keys=KeyBlock(*(slices(x, axis) for x, axis in zip(keys, (2, 3, 2, 3), strict=True))),
        table=rows(inputs.key_table) if has_table else None,
        far=_far_of(plan, tile),
        near_value=rows(inputs.value_table),
        bias=rows(inputs.bias_table, -1),
        visible=visible(plan, tile, row_segments, slices(key_segments, 1), hides),
    )


def _far_of(plan: Plan, tile: Tile) -> tuple[Far, ...]:
    if plan.factors is None or plan.key_everywhere or not tile.relative:
        return ()

    def basis_of(side: int) -> np.ndarray:
        far = plan.factors and plan.factors.far[side]
        assert far is not None
        return far.basis

    if tile.side is not None:
        basis = lax.dynamic_index_in_dim(jnp.asarray(basis_of(tile.side)), tile.order, keepdims=False)
        return (Far(basis, tile.side),)
    # What lies in the local tile on either side of the block's own band.
    before, after = tile.row, 0 if plan.causal else plan.sizes.rows - tile.row - tile.rows
    parts = []
    if before:
        parts.append(Far(np.pad(basis_of(2)[0, -before:], [(0, tile.width - before), (0, 0)]), 2))
    if after:
        parts.append(Far(np.pad(basis_of(3)[0, :after], [(tile.width - after, 0), (0, 0)]), 3))
    return tuple(parts)


def einsum_axes(table: Array) -> str:
    """The einsum axes of a table [n, c] or [K, G, n, c]."""
    return "kgec" if table.ndim == 4 else "ec"


def scores_of(plan: Plan, row: QueryForms, view: View, tile: Tile) -> jax.Array:
    """Scores [B, K, V, G, U] in float32, not scaled, -inf where hidden."""
    scores = einsum("bkvd,bkdgu->bkvgu", with_far(view.keys.key, view), query_with_far(row, view))
    if (start := band_start(plan, tile)) is not None:
        assert row.near is not None
        band = lax.slice_in_dim(scores, start, start + row.near.shape[2], axis=2)
        scores = lax.dynamic_update_slice_in_dim(scores, band + row.near, start, axis=2)
    if view.table is not None:
        assert row.position is not None
        G = einsum(f"bkcgu,{einsum_axes(view.table)}->bkgue", row.position, view.table)
        scores += by_key(G, tile, -jnp.inf)
    if view.bias is not None:
        bias = view.bias[None, :, :, None, :].astype(jnp.float32)
        scores += by_key(bias, tile, -jnp.inf)
    return scores if view.visible is None else jnp.where(view.visible, scores, -jnp.inf)


def with_far(key: jax.Array, view: View, axis: int = 3) -> jax.Array:
    """Keys [B, K, V, D] with the far bases as more head dimensions: `axis`, 2 where they are transposed."""
    bases = (far.basis if axis == 3 else far.basis.T for far in view.far)
    far = (jnp.broadcast_to(x, (*key.shape[:2], *x.shape)).astype(key.dtype) for x in bases)
    return jnp.concatenate([key, *far], axis=axis)


def query_with_far(row: QueryForms, view: View) -> jax.Array:
    """The queries that go with them, [B, K, D + R, G, U]."""

    def coordinates(far: Far) -> jax.Array:
        x = row.far[far.coordinates]
        assert x is not None
        return x.astype(row.query.dtype)

    return jnp.concatenate([row.query, *map(coordinates, view.far)], axis=2)
