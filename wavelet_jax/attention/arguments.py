"""The arguments of attention(): each is checked and brought into the one form that backends take."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from wavelet_jax.attention import common
from wavelet_jax.attention.call import Call, check_heads
from wavelet_jax.errors import UserError
from wavelet_jax.integers import HIGHEST, as_int32, check_range, shown
from wavelet_jax.positions.terms import Terms

# Sums are float32, which would be less than float64 asks for; integers and shorter floats would round the output.
DTYPES = ("float32", "bfloat16", "float16")


def canonical(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    terms: Terms,
    *,
    causal: bool,
    query_positions: common.Array | int | None,
    key_positions: common.Array | int | None,
    segment_ids: common.Array | tuple[common.Array, common.Array] | None,
    window: int | None,
    mask: jax.Array | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    far_tolerance: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array, Call]:
    """Queries, keys and values, and the call that backends take; raises `UserError` for what is wrong.

    The arguments are those of `wavelet_jax.attention.attention`. A mask that is padding becomes segments.
    """
    query, key, value = arrays_of(query_BxTxHxD, key_BxSxKxD, value_BxSxKxD)
    (batch, num_queries, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = query.shape, key.shape
    check_terms(terms, query.shape)
    dropout_rate = dropout_of(dropout_rate, dropout_key)
    check_causal(causal)
    window, far_tolerance = window_of(window), tolerance_of(far_tolerance)
    query_positions, query_start, key_positions, key_start = positions_of(
        query_positions, key_positions, batch, num_queries, num_keys
    )
    segments = segments_of(segment_ids, batch, num_queries, num_keys)
    if mask is not None:
        mask = mask_of(mask, (batch, num_heads, num_queries, num_keys))
        if mask.shape[1:3] == (1, 1):
            segments, mask = hide(mask[:, 0, 0], segments, (batch, num_queries, num_keys)), None
    call = Call(
        terms=terms,
        queries=num_queries,
        keys=num_keys,
        heads=num_heads,
        kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=query.dtype,
        offset=None if query_start is None or key_start is None else query_start - key_start,
        causal=causal,
        window=window,
        query_positions=query_positions,
        key_positions=key_positions,
        segment_ids=segments,
        mask=mask,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        far_tolerance=far_tolerance,
        varies=bool(common.varying_axes(query)),
    )
    return query, key, value, call


def arrays_of(query_BxTxHxD: jax.Array, key_BxSxKxD: jax.Array, value_BxSxKxD: jax.Array) -> list[jax.Array]:
    """Queries, keys and values, in the dtypes that JAX takes them in.

    Raises `UserError` for what is not an array of `DTYPES`, or arrays that do not fit together.
    """
    arrays = {"query": query_BxTxHxD, "key": key_BxSxKxD, "value": value_BxSxKxD}
    for name, array in arrays.items():
        _check_is_array(f"attention's {name}", array)
        if (dtype := _dtype_name(array)) not in DTYPES:
            raise UserError(f"attention takes {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, and {name} is {dtype}: cast it")
    query, key, value = (array.shape for array in arrays.values())
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if not len(query) == len(key) == len(value) == 4:
        raise UserError(f"attention takes [batch, length, heads, head_dim]: {shapes}")
    if 0 in query + key + value:
        raise UserError(f"attention takes at least one of batch, queries, keys, heads and dimensions: {shapes}")
    if key != value or (query[0], query[3]) != (key[0], key[3]):
        raise UserError(f"batch and head_dim must agree, and key and value be of one shape: {shapes}")
    if query[2] % key[2]:
        raise UserError(f"key heads must divide query heads: {shapes}")
    return [array if array.dtype == _dtype_name(array) else jnp.asarray(array) for array in arrays.values()]


def _dtype_name(array: jax.Array) -> str:
    """The dtype as JAX takes it: a NumPy float64 is float32 unless jax_enable_x64 is set."""
    try:
        return jnp.result_type(array).name
    except TypeError:  # an array of objects or strings
        return str(array.dtype)


def check_terms(terms: Terms, query_shape: tuple[int, ...]) -> None:
    """Raises `UserError` for what is not `Terms`, for terms of other heads, or terms that add to the embedding."""
    if not isinstance(terms, Terms):
        given = f"not {shown(terms)}"
        if callable(getattr(terms, "terms", None)):
            given = f"not the method itself: give {type(terms).__name__}'s .terms(params)"
        raise UserError(f"attention takes Terms, which method.terms(params) makes, {given}")
    if terms.embed is not None:
        raise UserError(
            "these terms add positions to the token embedding, which attention never sees: "
            "add terms.embed(positions) there, and give attention terms.without_embedding()"
        )
    try:
        check_heads(terms, *query_shape[2:])
    except UserError as error:
        if terms.num_heads == query_shape[1]:
            raise UserError(f"{error}: arrays must be [batch, length, heads, head_dim], not heads first") from None
        raise


def dropout_of(rate: float, key: Any) -> float:
    """The dropout rate as a Python float. Raises `UserError` for one that cannot be, or that has no key."""
    rate = _number("attention's dropout_rate", rate, "a number from 0 to below 1")
    if not 0 <= rate < 1:
        raise UserError(f"attention's dropout_rate must be at least 0 and below 1, not {rate}")
    if rate > 0 and key is None:
        raise UserError("attention dropout needs a dropout_key")
    if rate > 0 and not (hasattr(key, "dtype") and _is_key(key)):
        raise UserError(f"attention's dropout_key must be one key, such as jax.random.key(0), not {shown(key)}")
    return float(rate)


def _is_key(key: jax.Array) -> bool:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape == ()
    return key.dtype == jnp.uint32 and key.ndim == 1


def check_causal(causal: bool) -> None:
    """Raises `UserError` where `causal` is not a bool that is known while tracing."""
    if not isinstance(causal, bool | np.bool_):
        traced = "a traced " if isinstance(causal, Tracer) else ""
        raise UserError(f"attention's causal must be True or False, not {traced}{shown(causal)}")


def window_of(window: int | None) -> int | None:
    """The window as a Python integer; None where it hides nothing."""
    if window is None:
        return None
    if not isinstance(window, numbers.Integral) or isinstance(window, bool) or window < 1:
        allowed = "an integer of at least 1 (a query's own position)"
        raise UserError(f"attention's window must be {allowed}, not {shown(window)}")
    return None if window > HIGHEST else int(window)  # a short NumPy one would overflow


def tolerance_of(tolerance: float | None) -> float | None:
    """far_tolerance as a Python float, or None."""
    if tolerance is None:
        return None
    number = _number("far_tolerance", tolerance, "a number above 0")
    if not 0 < number < math.inf:
        raise UserError(f"far_tolerance must be a number above 0, not {number!r}")
    return float(number)


def _number(name: str, value: Any, allowed: str) -> Any:
    """A Python number; one in an array that is not traced is taken out."""
    if isinstance(value, Tracer):
        raise UserError(f"{name} must be {allowed}, known while tracing, not a traced {shown(value)}")
    if isinstance(value, jax.Array | np.ndarray) and value.shape == ():
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UserError(f"{name} must be {allowed}, not {shown(value)}")
    return value


def positions_of(
    query: Any, key: Any, batch: int, num_queries: int, num_keys: int
) -> tuple[common.Array, int | jax.Array | None, common.Array, int | jax.Array | None]:
    """Positions of queries and of keys, int32, each with the first of them (None: not known to be consecutive).

    Raises:
      UserError: what is not integers of a fitting shape, left out where T is not S, or past int32 (also where a
        distance is, of positions that are not traced).
    """
    if (query is None or key is None) and num_queries != num_keys:
        raise UserError(
            f"with {num_queries} queries and {num_keys} keys the positions cannot be inferred: "
            "give query_positions and key_positions"
        )
    query, query_start = _positions("query_positions", query, batch, num_queries)
    key, key_start = _positions("key_positions", key, batch, num_keys)
    queries, keys = _range(query, query_start), _range(key, key_start)
    if queries is not None and keys is not None:
        check_range("distances (query_positions - key_positions)", queries[0] - keys[1], queries[1] - keys[0])
    return _array(query, query_start), query_start, _array(key, key_start), key_start


# Positions [length] or [B, length], or of consecutive ones the count.
_Positions = np.ndarray | jax.Array | int


def _positions(name: str, positions: Any, batch: int, length: int) -> tuple[_Positions, int | jax.Array | None]:
    """Positions [length] or [B, length] and None; or where they are known to be consecutive, their count and the first.

    In int32: unsigned positions would have no negative distances.
    """
    positions = 0 if positions is None else positions
    dtype, shape = getattr(positions, "dtype", None), getattr(positions, "shape", ())
    is_integer = type(positions) is int if dtype is None else jnp.issubdtype(dtype, jnp.integer)
    if shape not in ((), (length,), (batch, length)) or not is_integer:
        raise UserError(
            f"{name} must be integers of shape ({length},) or ({batch}, {length}), or one integer, the first of "
            f"consecutive positions, not {shown(positions)}"
        )
    positions = as_int32(name, positions)
    traced = isinstance(positions, Tracer)
    if traced:
        return (length, positions) if positions.ndim == 0 else (positions, None)
    positions = np.asarray(positions)
    start = int(positions.flat[0])
    if positions.ndim == 0:
        if isinstance(length, int):
            check_range(f"{name} of {length} tokens from {start} on", start, start + length - 1)
        return length, start
    if (positions == np.arange(start, start + length)).all():
        return length, start
    return positions, None


def _range(positions: Any, start: int | jax.Array | None) -> tuple[int, int] | None:
    """The lowest and the highest position; None where they are not known."""
    if start is not None:
        return (start, start + positions - 1) if isinstance(start, int) and isinstance(positions, int) else None
    return None if isinstance(positions, Tracer) else (int(positions.min()), int(positions.max()))


def _array(positions: Any, start: int | jax.Array | None) -> common.Array:
    """Positions as an array: NumPy's if they are known, so that a method can make constants of them."""
    if start is None:
        return positions
    if isinstance(start, int) and isinstance(positions, int):
        return np.arange(start, start + positions, dtype=np.int32)
    return start + jnp.arange(positions, dtype=jnp.int32)


def segments_of(
    segment_ids: common.Array | tuple[common.Array, common.Array] | None, batch: int, num_queries: int, num_keys: int
) -> tuple[common.Array, common.Array] | None:
    """The pair of segment ids of queries [B, T] and keys [B, S], int32."""
    if segment_ids is None:
        return None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    for ids in pair:
        _check_is_array("segment_ids", ids, "integers, one array or a pair (a tuple) of two")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise UserError(f"segment_ids must be integers, not {ids.dtype}")
    shapes = [tuple(ids.shape) for ids in pair]
    if shapes != [(batch, num_queries), (batch, num_keys)]:
        raise UserError(
            f"segment_ids must be [B, T] = ({batch}, {num_queries}) with T = S, or a pair of that and "
            f"[B, S] = ({batch}, {num_keys}), not {' and '.join(map(str, shapes))}"
        )
    query_ids, key_ids = (as_int32("segment_ids", ids) for ids in pair)
    return query_ids, key_ids


def mask_of(mask: jax.Array, scores: tuple[int, int, int, int]) -> jax.Array:
    """The mask with four axes, each of length 1 or as in the scores [B, H, T, S]."""
    _check_is_array("attention's mask", mask)
    shape = (1,) * (4 - mask.ndim) + mask.shape
    fits = len(shape) == 4 and all(have in (1, want) for have, want in zip(shape, scores, strict=True))
    if mask.dtype != bool or not fits:
        raise UserError(
            f"attention's mask must be bool (True: visible), broadcastable to [B, H, T, S] = {scores}, "
            f"not {mask.dtype} of shape {mask.shape}"
        )
    return mask.reshape(shape)


def hide(
    kept: jax.Array, segment_ids: tuple[common.Array, common.Array] | None, sizes: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """Segment ids ([B, T], [B, S]) by which no query sees a key where `kept`, [B or 1, S or 1], is False."""
    batch, num_queries, num_keys = sizes
    kept = jnp.broadcast_to(kept, (batch, num_keys))
    if segment_ids is None:
        return jnp.zeros((batch, num_queries), jnp.int32), jnp.where(kept, 0, 1).astype(jnp.int32)
    query_segments, key_segments = (jnp.asarray(ids) for ids in segment_ids)
    # A segment that no query is in; were the largest id 2^31 - 1, it would wrap to -2^31, still no id in use.
    return query_segments, jnp.where(kept, key_segments, jnp.max(query_segments, initial=0) + 1)


def _check_is_array(name: str, array: Any, what: str = "") -> None:
    if not isinstance(array, jax.Array | np.ndarray | np.generic):
        raise UserError(f"{name} must be an array{f' of {what}' if what else ''}, not {shown(array)}")
