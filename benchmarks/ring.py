"""Ring attention, what `wavelet_jax.attention.sharded` is measured against: keys and values travel, none are gathered.

In names: n devices hold T = 2 n C tokens in zig-zag order, device i the runs i ("early") and 2 n - 1 - i ("late") of C.
It is here to be timed and has no other use: causal, constant relative keys or none, the tiled backend's sweep.
"""

import dataclasses
import functools
import math

import einops
import jax
import jax.numpy as jnp
from jax import lax

from wavelet_jax.attention import tiled
from wavelet_jax.attention.call import Call
from wavelet_jax.attention.tiled import sweep
from wavelet_jax.attention.tiled.geometry import Plan
from wavelet_jax.attention.tiled.tile import Inputs
from wavelet_jax.positions.terms import Terms

EARLY, LATE = 0, 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(terms: Terms, axis: str, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Inside of `jax.shard_map` over `axis`: a device's [B, 2 C, H, D], rotated already; returns the same shape."""
    return _forward(terms, axis, query, key, value)[0]


def _visits(axis: str, tokens: int):
    """(the first turn's, a later turn's) pairs of runs that see each other, besides each run itself.

    A pair is (half of the queries, half of the keys, distance of their first tokens); a turn's are those with the keys
    of device i - turn. Every device has two pairs a turn, whatever i is.
    """
    n, i, run = lax.axis_size(axis), lax.axis_index(axis), tokens // 2

    def of_turn(turn: jax.Array):
        source = (i - turn) % n
        half = jnp.where(
            source < i, EARLY, LATE
        )  # of two early runs the lower index is the past, of two late the higher
        return (LATE, EARLY, (2 * n - 1 - i - source) * run), (half, half, jnp.abs(i - source) * run)

    return ((LATE, EARLY, (2 * n - 1 - 2 * i) * run),), of_turn


def _half(x: jax.Array, half: jax.Array | int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, half * (x.shape[1] // 2), x.shape[1] // 2, axis=1)


def _set_half(x: jax.Array, part: jax.Array, half: jax.Array | int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, half * (x.shape[1] // 2), axis=1)


def _passed_on(arrays, axis: str):
    n = lax.axis_size(axis)
    return lax.ppermute(arrays, axis, [(device, (device + 1) % n) for device in range(n)])


def _forward(terms: Terms, axis: str, query: jax.Array, key: jax.Array, value: jax.Array):
    own, of_turn = _visits(axis, query.shape[1])

    def see(state, keys, values, pair):
        queries_half, keys_half, distance = pair
        out, logsumexp = (_half(x, queries_half) for x in state)
        more = _partial(terms, _half(query, queries_half), _half(keys, keys_half), _half(values, keys_half), distance)
        total = jnp.logaddexp(logsumexp, more[1])
        out = out * jnp.exp(logsumexp - total)[..., None] + more[0] * jnp.exp(more[1] - total)[..., None]
        return _set_half(state[0], out, queries_half), _set_half(state[1], total, queries_half)

    def turn(number, carry):
        state, *travelling = carry
        travelling = _passed_on(travelling, axis)
        for pair in of_turn(number):
            state = see(state, *travelling, pair)
        return state, *travelling

    parts = [_partial(terms, *(_half(x, half) for x in (query, key, value)), 0) for half in (EARLY, LATE)]
    state = tuple(jnp.concatenate(both, axis=1) for both in zip(*parts, strict=True))
    for pair in own:
        state = see(state, key, value, pair)
    (out, logsumexp), *_ = lax.fori_loop(1, lax.axis_size(axis), turn, (state, key, value))
    out = out.astype(value.dtype)
    return out, (query, key, value, out, logsumexp)


def _backward(terms: Terms, axis: str, residuals, d_out: jax.Array):
    query, key, value, out, logsumexp = residuals
    own, of_turn = _visits(axis, query.shape[1])

    def see(gradients, keys, values, pair):
        queries_half, keys_half, distance = pair
        rows = [_half(x, queries_half) for x in (query, out, logsumexp, d_out)]
        parts = _partial_gradients(terms, *rows, _half(keys, keys_half), _half(values, keys_half), distance)
        halves = queries_half, keys_half, keys_half
        return tuple(
            _set_half(x, _half(x, half) + part, half) for x, part, half in zip(gradients, parts, halves, strict=True)
        )

    def turn(number, carry):
        d_query, *travelling = carry
        keys, values, d_key, d_value = _passed_on(travelling, axis)
        gradients = d_query, d_key, d_value
        for pair in of_turn(number):
            gradients = see(gradients, keys, values, pair)
        d_query, d_key, d_value = gradients
        return d_query, keys, values, d_key, d_value

    gradients = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    for pair in ((EARLY, EARLY, 0), (LATE, LATE, 0), *own):
        gradients = see(gradients, key, value, pair)
    d_query, d_key, d_value = gradients
    carry = lax.fori_loop(1, lax.axis_size(axis), turn, (d_query, key, value, d_key, d_value))
    d_query, _, _, d_key, d_value = carry
    d_key, d_value = _passed_on((d_key, d_value), axis)  # home
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)


attention.defvjp(_forward, _backward)


# -- one run of queries over one run of keys, by the tiled backend's sweep --------------------------------------------


def _plan(terms: Terms, query: jax.Array, distance: jax.Array | int) -> Plan:
    _, run, heads, head_dim = query.shape
    known = None if isinstance(distance, jax.Array) else distance
    call = Call(terms, run, run, heads, heads, head_dim, query.dtype, known)
    plan = Plan(tiled._choose_sizes(call), True, None, known, run, run, None, False, 1 / math.sqrt(head_dim))
    return dataclasses.replace(plan, factors=tiled.factors_of(plan, terms, call.tolerance))


def _inputs(plan: Plan, query: jax.Array, key: jax.Array, value: jax.Array) -> Inputs:
    padding = [(0, 0), (0, 0), plan.padding, (0, 0)]
    keys, values = (jnp.pad(jnp.moveaxis(x, 1, 2), padding) for x in (key, value))
    return Inputs(tiled._tile_queries(query, plan.sizes.rows, key.shape[2]), None, keys, values, None, None, None)


def _partial(terms: Terms, query: jax.Array, key: jax.Array, value: jax.Array, distance: jax.Array | int):
    """Output [B, C, H, D] and logarithm of the sum of exponentials [B, C, H] over these keys alone, float32."""
    plan, run = _plan(terms, query, distance), query.shape[1]
    out, logsumexp = sweep._forward(plan, _inputs(plan, query, key, value), jnp.asarray(distance, jnp.int32), None)
    out = einops.rearrange(out, "n b k d g u -> b (n u) (k g) d")[:, :run]
    return out, einops.rearrange(logsumexp, "n b k g u -> b (n u) (k g)")[:, :run]


def _partial_gradients(terms: Terms, query, out, logsumexp, d_out, key, value, distance):
    """What these keys add to the gradients of queries, keys and values; `out` and `logsumexp` are over all keys."""
    plan, heads = _plan(terms, query, distance), key.shape[2]
    inputs, transposed = jax.vjp(functools.partial(_inputs, plan), query, key, value)
    padding = [(0, 0), (0, -query.shape[1] % plan.sizes.rows), (0, 0)]
    logsumexp = jnp.pad(logsumexp, padding, constant_values=jnp.inf)
    logsumexp = einops.rearrange(logsumexp, "b (n u) (k g) -> n b k g u", u=plan.sizes.rows, k=heads)
    out = tiled._tile_queries(out, plan.sizes.rows, heads)
    residuals = inputs, jnp.asarray(distance, jnp.int32), None, out, logsumexp
    gradients, *_ = sweep._attend_backward(plan, residuals, tiled._tile_queries(d_out, plan.sizes.rows, heads))
    return transposed(gradients)
