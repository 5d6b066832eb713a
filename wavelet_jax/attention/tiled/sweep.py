"""The sweep of query tiles over key tiles: the online softmax, and its derivative from recomputed scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from wavelet_jax.attention.common import SAVED_RESIDUALS, einsum
from wavelet_jax.attention.tiled.geometry import Plan, Tile, band_start, table_start
from wavelet_jax.attention.tiled.skew import by_distance, by_key
from wavelet_jax.attention.tiled.tile import (
    Inputs,
    KeyBlock,
    QueryForms,
    View,
    einsum_axes,
    query_forms,
    scores_of,
    view_of,
    with_far,
)
from wavelet_jax.errors import UserError

FIRST_ONLY = (
    "the backends of tiles have first derivatives in reverse mode, and no jax.grad of jax.grad and no jax.jvp: take "
    "second derivatives by jax.hessian, or jax.jvp of jax.grad, or name backend='reference' or 'decode'"
)


@jax.custom_jvp
def _transposed_once(arrays):
    """Arrays as they are. Reverse-mode differentiation of what a derivative is made of is refused here.

    Its loops have lengths that are not known while tracing, which JAX differentiates in forward mode only.
    """
    return arrays


@_transposed_once.defjvp
def _transposed_once_jvp(primals, tangents):
    return primals[0], jax.tree.map(_forward_only.bind, tangents[0])


def _refuse_transpose(_, __):
    raise UserError(FIRST_ONLY)


_forward_only = Primitive("forward_only")
_forward_only.def_impl(lambda x: x)
_forward_only.def_abstract_eval(lambda x: x)
ad.deflinear2(_forward_only, _refuse_transpose)
batching.defvectorized(_forward_only)
mlir.register_lowering(_forward_only, lambda _, x: [x])


def _sweep(plan: Plan, position: jax.Array, visit, shared, own, carry):
    """Goes through the tiles of keys that the query tile at `position` may see: shared, carry = visit(shared, own,
    carry, tile) for each.

    `position` is the index of the key at the position of the tile's first row. `own` is read and `carry` written row by
    row: they are pytrees of arrays [.., U]. The local tile comes first, a block of rows at a time: it holds the row's
    own key, so that an online softmax begins with a finite maximum wherever there is one.
    """
    rows, block, band, keys = plan.sizes.rows, plan.sizes.block, plan.sizes.band, plan.sizes.keys
    blocks = []
    for row in range(0, rows, block):

        def of_block(x, row=row):
            return lax.slice_in_dim(x, row, row + block, axis=-1)

        width = band + (row + block if plan.causal else rows + plan.after)
        local = Tile(position - band, width, band + row, row, block, None, 0, True)
        shared, part = visit(shared, jax.tree.map(of_block, own), jax.tree.map(of_block, carry), local)
        blocks.append(part)
    carry = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *blocks)

    for side in filter(plan.has_outer, (0, 1)):
        if side == 0:
            # Tile n holds the `keys` keys that end where the local tile, or tile n - 1, begins.
            inner, reach = position - band, band

            def tile(order, relative):
                outwards = band + (order + 1) * keys
                return Tile(position - outwards, keys, outwards, 0, rows, 0, order, relative)
        else:
            inner, reach = plan.keys - (position + rows + plan.after), plan.after

            def tile(order, relative):
                outwards = rows + plan.after + order * keys
                return Tile(position + outwards, keys, -outwards, 0, rows, 1, order, relative)

        def visit_nth(relative, order, state, tile=tile):
            return visit(state[0], own, state[1], tile(order, relative))

        # `inner` keys lie on this side of the local tile (more than there are, where it lies past the other end).
        first, last = jnp.maximum((inner - plan.keys) // keys, 0), -(-inner // keys)
        if plan.window is not None:
            last = jnp.minimum(last, max(0, -(-(plan.window - 1 - reach) // keys)))
        state = shared, carry
        if plan.factors is not None:  # and thus a reach that is known
            middle = jnp.clip(plan.factors.reach_in_tiles[side], first, jnp.maximum(last, first))
            if plan.factors.reach_in_tiles[side]:
                state = lax.fori_loop(first, middle, functools.partial(visit_nth, True), state)
            first = middle
        relative = plan.factors is None
        shared, carry = lax.fori_loop(first, last, functools.partial(visit_nth, relative), state)
    return shared, carry


def _transposed(x_BxKxSxD: jax.Array) -> jax.Array:
    # Made as it is: where XLA lets a product of bfloat16 take it transposed instead, it has none for CPUs and fails.
    return lax.optimization_barrier(jnp.swapaxes(x_BxKxSxD, 2, 3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_tiles(plan: Plan, inputs: Inputs, offset: jax.Array, segments: tuple | None) -> Any:
    """Attention [N, B, K, D, G, U] in the value's dtype.

    `segments` are those of the query tiles, [N, B, U], and of the padded keys, [B, S]; or None.
    """
    return _forward(plan, inputs, offset, segments)[0].astype(inputs.value_BxKxSxD.dtype)


def _forward(plan: Plan, inputs: Inputs, offset: jax.Array, segments: tuple | None):
    """`attend_tiles` in float32, and each row's logsumexp (+inf if the row sees nothing)."""
    row_segments, key_segments = segments or (None, None)
    keys = KeyBlock(inputs.key_BxKxSxD, None, None, _transposed(inputs.value_BxKxSxD))

    def query_tile(_, xs):
        index, own_segments, *queries = xs
        own = query_forms(plan, *queries), own_segments

        def visit(_, own, carry, tile):
            row, own_segments = own
            highest, total, out = carry  # [B, K, G, U], the same, [B, K, D, G, U]
            view = view_of(plan, inputs, keys, tile, offset, own_segments, key_segments)
            with jax.named_scope("scores"):
                scores = scores_of(plan, row, view, tile)
            with jax.named_scope("softmax"):
                raised = jnp.maximum(highest, jnp.max(scores, axis=2))
                # A row that has seen nothing has a maximum of -inf; 0 in its place keeps NaN out.
                finite = jnp.where(jnp.isfinite(raised), raised, 0)
                weights = jnp.exp((scores - finite[:, :, None]) * plan.scale)
                kept = jnp.exp((highest - finite) * plan.scale)
                total = total * kept + jnp.sum(weights, axis=2)
            with jax.named_scope("values"):
                out = out * kept[:, :, None]
                value = view.keys.value_transposed
                assert value is not None
                out += einsum("bkdv,bkvgu->bkdgu", value, weights.astype(value.dtype))
                if view.near_value is not None:
                    G = by_distance(plan, weights, tile)
                    out += einsum(f"bkgue,{einsum_axes(view.near_value)}->bkcgu", G, view.near_value)
            return None, (raised, total, out)

        batch, kv_heads, _, *group_rows = queries[0].shape
        none = jnp.zeros_like(queries[0], jnp.float32, shape=(batch, kv_heads, *group_rows))
        start = none - jnp.inf, none, jnp.zeros_like(queries[0], jnp.float32)
        highest, total, out = _sweep(plan, offset + index * plan.sizes.rows, visit, None, own, start)[1]
        out /= jnp.where(total > 0, total, 1)[:, :, None]
        logsumexp = jnp.where(total > 0, highest * plan.scale + jnp.log(total), jnp.inf)
        return None, (out, logsumexp)

    tiles = jnp.arange(inputs.query_NxBxKxDxGxU.shape[0])
    xs = tiles, row_segments, inputs.query_NxBxKxDxGxU, inputs.position_NxBxKxDxGxU
    out, logsumexp = lax.scan(query_tile, None, xs)[1]
    return out, logsumexp


def _attend_forward(plan: Plan, inputs: Inputs, offset: jax.Array, segments: tuple | None):
    out, logsumexp = checkpoint_name(_transposed_once(_forward(plan, inputs, offset, segments)), SAVED_RESIDUALS)
    # The residual is the float32 output. Rounding it to bfloat16 first would bias delta = sum(dO * O), and so the
    # derivatives of all of a row's scores; where position vectors are nearly equal for hundreds of keys the bias
    # accumulates, and the error of the queries' gradient is 2.8e-3 instead of 2.4e-3 (scales 2^2..2^9, 1,300 tokens).
    return out.astype(inputs.value_BxKxSxD.dtype), (inputs, offset, segments, out, logsumexp)


def _attend_backward(plan: Plan, residuals: tuple, out_gradient: jax.Array) -> tuple:
    """Gradients of all inputs in one sweep, from recomputed scores (Dao et al., arXiv 2205.14135, Alg. 4)."""
    inputs, offset, segments, out, logsumexp = residuals
    row_segments, key_segments = segments or (None, None)
    keys = KeyBlock(inputs.key_BxKxSxD, _transposed(inputs.key_BxKxSxD), inputs.value_BxKxSxD, None)

    def query_tile(d: Inputs, xs: tuple) -> tuple[Inputs, tuple]:
        index, own_segments, d_out, out, logsumexp, *queries = xs
        row = query_forms(plan, *queries)
        with jax.named_scope("delta"):
            delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=2)

        def visit(d: Inputs, own: tuple, d_row: QueryForms, tile: Tile) -> tuple[Inputs, QueryForms]:
            row, own_segments, d_out, delta, logsumexp = own
            by_row = tuple(jnp.moveaxis(x, 2, -1) for x in (row.query, d_out))  # [B, K, G, U, D]
            view = view_of(plan, inputs, keys, tile, offset, own_segments, key_segments)
            weights, d_scores = _recomputed(plan, row, view, tile, d_out, delta, logsumexp)
            d = _add_keys_and_values(plan, d, view, tile, weights, d_scores, *by_row)
            d_row = _add_queries(d_row, row, view, d_scores)
            return _add_tables(plan, d, d_row, row, view, tile, offset, weights, d_scores, d_out)

        own = row, own_segments, d_out, delta, logsumexp
        d, d_row = _sweep(plan, offset + index * plan.sizes.rows, visit, d, own, _zeros(row))
        with jax.named_scope("queries"):  # the forms of queries are linear in them; in float32, whatever their dtype
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), queries)
            d_queries = jax.vjp(functools.partial(query_forms, plan), *wide)[1](d_row)
        return d, jax.tree.map(lambda d, x: d.astype(x.dtype), d_queries, tuple(queries))

    # Gradients that many query tiles add to are carried; those of the queries come tile by tile. All in float32, and
    # rounded to the inputs' dtype once, at the end.
    tiles = jnp.arange(inputs.query_NxBxKxDxGxU.shape[0])
    queries = inputs.query_NxBxKxDxGxU, inputs.position_NxBxKxDxGxU
    others = inputs._replace(query_NxBxKxDxGxU=None, position_NxBxKxDxGxU=None)
    xs = tiles, row_segments, out_gradient, out, logsumexp, *queries
    d, d_queries = lax.scan(query_tile, _zeros(others), xs)
    d = jax.tree.map(lambda d, x: d.astype(x.dtype), d, others)
    d = d._replace(query_NxBxKxDxGxU=d_queries[0], position_NxBxKxDxGxU=d_queries[1])
    return _transposed_once(d), None, None


def _zeros(arrays):
    return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), arrays)


def _add(gradient: jax.Array, part: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    """Adds `part` to a slice of a gradient."""
    old = lax.dynamic_slice_in_dim(gradient, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(gradient, old + part, start, axis)


def _recomputed(
    plan: Plan,
    row: QueryForms,
    view: View,
    tile: Tile,
    d_out: jax.Array,
    delta: jax.Array,
    logsumexp: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The weights of a tile, and the gradient by its scores, [B, K, V, G, U] float32 both."""
    assert view.keys.value is not None
    with jax.named_scope("weights"):
        weights = jnp.exp(scores_of(plan, row, view, tile) * plan.scale - logsumexp[:, :, None])
        d_weights = einsum("bkvd,bkdgu->bkvgu", view.keys.value, d_out)
        if view.near_value is not None:
            G = einsum(f"bkcgu,{einsum_axes(view.near_value)}->bkgue", d_out, view.near_value)
            d_weights += by_key(G, tile, 0.0)
        return weights, weights * (d_weights - delta[:, :, None]) * plan.scale


def _add_keys_and_values(
    plan: Plan,
    d: Inputs,
    view: View,
    tile: Tile,
    weights: jax.Array,
    d_scores: jax.Array,
    query_BxKxGxUxD: jax.Array,
    d_out_BxKxGxUxD: jax.Array,
) -> Inputs:
    with jax.named_scope("keys_and_values"):
        start = tile.start + plan.padding[0]
        d_key = einsum("bkvgu,bkgud->bkvd", d_scores.astype(view.keys.key.dtype), query_BxKxGxUxD)
        d_value = einsum("bkvgu,bkgud->bkvd", weights.astype(d_out_BxKxGxUxD.dtype), d_out_BxKxGxUxD)
        return d._replace(
            key_BxKxSxD=_add(d.key_BxKxSxD, d_key, start, 2), value_BxKxSxD=_add(d.value_BxKxSxD, d_value, start, 2)
        )


def _add_queries(d_row: QueryForms, row: QueryForms, view: View, d_scores: jax.Array) -> QueryForms:
    assert view.keys.key_transposed is not None
    with jax.named_scope("queries"):
        extended = with_far(view.keys.key_transposed, view, axis=2)
        parts = einsum("bkdv,bkvgu->bkdgu", extended, d_scores.astype(view.keys.key.dtype))
        d_far: list[Any] = list(d_row.far)
        end = row.query.shape[2]
        d_row = d_row._replace(query=d_row.query + parts[:, :, :end])
        for far in view.far:
            start, end = end, end + far.basis.shape[1]
            d_far[far.coordinates] += parts[:, :, start:end]
        return d_row._replace(far=tuple(d_far))


def _add_tables(
    plan: Plan,
    d: Inputs,
    d_row: QueryForms,
    row: QueryForms,
    view: View,
    tile: Tile,
    offset: jax.Array,
    weights: jax.Array,
    d_scores: jax.Array,
    d_out: jax.Array,
) -> tuple[Inputs, QueryForms]:
    """Gradients by near scores and by tables over all distances, and those of the queries through them."""
    with jax.named_scope("tables"):
        if (start := band_start(plan, tile)) is not None:
            assert row.near is not None
            near = lax.slice_in_dim(d_scores, start, start + row.near.shape[2], axis=2)
            d_row = d_row._replace(near=near)  # which no other tile has
        if view.table is not None:
            assert d.key_table is not None
            assert row.position is not None
            assert d_row.position is not None
            axes, G = einsum_axes(view.table), by_distance(plan, d_scores, tile)
            d_row = d_row._replace(position=d_row.position + einsum(f"bkgue,{axes}->bkcgu", G, view.table))
            part = einsum(f"bkgue,bkcgu->{axes}", G, row.position)
            d = d._replace(key_table=_add(d.key_table, part, table_start(plan, tile, offset), -2))
        if d.value_table is not None:
            assert view.near_value is not None
            axes = einsum_axes(view.near_value)
            part = einsum(f"bkgue,bkcgu->{axes}", by_distance(plan, weights, tile), d_out)
            d = d._replace(value_table=_add(d.value_table, part, table_start(plan, tile, offset), -2))
        if d.bias_table is not None:
            part = jnp.sum(by_distance(plan, d_scores, tile), axis=(0, 3))
            d = d._replace(bias_table=_add(d.bias_table, part, table_start(plan, tile, offset), -1))
    return d, d_row


attend_tiles.defvjp(_attend_forward, _attend_backward)
