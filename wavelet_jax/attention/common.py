"""Shared by the backends: products of stated types, the softmax, visibility, biases, and the caller's mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding

from wavelet_jax.positions.terms import Terms

Array = jax.Array | np.ndarray  # constants are NumPy's


def in_auto_mode(function: Callable[..., jax.Array], query: jax.Array, *others) -> jax.Array:
    """`function(query, *others)` with XLA dividing the work, also where the caller's mesh has Explicit axes.

    On Explicit axes (the default of `jax.make_mesh`) every intermediate has a stated sharding, and an operation whose
    sharding is ambiguous is an error: splitting grouped heads, cutting tiles, adding a table to the scores of a shard.
    None of that is the caller's business, so only what goes in and out has such a type. Without Explicit axes the
    function is called as it is.

    Args:
      function: returns one array of the query's shape.
      query: its sharding is the result's.
      *others: arrays, or trees of them; closures must hold none that is traced.
    """
    sharding = jax.typeof(query).sharding
    mesh = sharding.mesh
    explicit = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )
    if not explicit:
        return function(query, *others)
    with jax.sharding.use_abstract_mesh(mesh):
        out = NamedSharding(mesh, sharding.spec)
        return jax.jit(jax.sharding.auto_axes(function, axes=explicit, out_sharding=out))(query, *others)


def vary_together(*arrays):
    """The same arrays (trees of them), each varying over all manual mesh axes that any of them varies over.

    Inside `jax.shard_map` JAX tracks the axes along which a value may differ between devices, and the carry of a loop
    must keep one such type. Where an array was the same on all devices its gradient is summed over them, by the
    transpose of `lax.pcast`.
    """
    axes = frozenset().union(*(varying_axes(x) for x in jax.tree.leaves(arrays)))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes along which JAX knows that an array may differ: none outside of a checked `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


# checkpoint_name of the residuals of a forward pass (output and logsumexp). A remat policy that saves this name avoids
# running the forward sweep again in the backward pass.
SAVED_RESIDUALS = "attention_residuals"


class Added(NamedTuple):
    """The additions of a position method to attention, as arrays: its functions at known distances. None: nothing."""

    relative_keys: jax.Array | None  # [..distances.., D] or [H, ..distances.., D]
    relative_values: jax.Array | None  # the same
    content_bias: jax.Array | None  # [H, D]
    position_bias: jax.Array | None  # [H, D]
    bias: jax.Array | None  # [H, ..distances..]


def evaluate(terms: Terms, distances: jax.Array, *, relative_keys: bool = True) -> Added:
    """The terms at these distances, int32 [...]; without `relative_keys` where they come in another form."""

    def at(function: Callable | None) -> jax.Array | None:
        return None if function is None else function(distances)

    return Added(
        at(terms.relative_keys) if relative_keys else None,
        at(terms.relative_values),
        terms.content_bias,
        terms.position_bias,
        at(terms.bias),
    )


def visible(
    distance: jax.Array, *, causal: bool, window: int | None, others: Sequence[jax.Array] = ()
) -> jax.Array | None:
    """Which keys a query sees, bool, of the shape that distances and other conditions broadcast to; None: all.

    Args:
      distance: query position minus key position, int32.
      causal, window: as in `wavelet_jax.attention.attention`.
      others: further conditions, bool.
    """
    conditions = []
    if causal:
        conditions.append(distance >= 0)
    if window is not None:
        conditions.append(jnp.abs(distance) < window)
    conditions.extend(others)
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def softmax(scores: jax.Array, visible: jax.Array | None) -> jax.Array:
    """Softmax over the last axis of float32 scores; a row in which nothing is visible is all zeros."""
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    # A query that sees nothing has a row of -inf only; 0 for its maximum and 1 for its sum keep NaN out.
    highest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(highest), highest, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def split_heads(array: Array, with_heads: int, num_kv_heads: int) -> jax.Array:
    """[H, ..] -> [K, G, ..] for arrays of `with_heads` axes; others serve all heads and stay as they are."""
    if array.ndim != with_heads:
        return jnp.asarray(array)
    return jnp.reshape(array, (num_kv_heads, array.shape[0] // num_kv_heads, *array.shape[1:]))


def with_biases(
    query_BxTxHxD: jax.Array,
    content_bias: jax.Array | None,
    position_bias: jax.Array | None,
    *,
    has_relative_keys: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Queries for the products with keys and with relative keys; None in place of the second if it equals the first."""
    content = plus_bias(query_BxTxHxD, content_bias)
    if not has_relative_keys or (content_bias is None and position_bias is None):
        return content, None
    return content, plus_bias(query_BxTxHxD, position_bias)


def einsum(letters: str, x: Array, y: Array) -> jax.Array:
    """A product accumulated in float32, whatever the types of its operands; they are taken in the wider of both.

    Float32 operands are not cut to the shorter formats that accelerators take by default (bfloat16, TF32).
    """
    dtype = _wider(x, y)
    return jnp.einsum(
        letters, x.astype(dtype), y.astype(dtype), precision="highest", preferred_element_type=jnp.float32
    )


def plus_bias(x_BxTxHxD: jax.Array, bias_HxD: jax.Array | None) -> jax.Array:
    """Queries with a bias for each head and dimension, in the wider of both types; as they are without one."""
    if bias_HxD is None:
        return x_BxTxHxD
    dtype = _wider(x_BxTxHxD, bias_HxD)
    return x_BxTxHxD.astype(dtype) + bias_HxD.astype(dtype)[None, None]


def _wider(x: Array, y: Array) -> jnp.dtype:
    """The type in which both fit, by JAX's own rules, also where the caller has those rules forbidden."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(x.dtype, y.dtype)
