"""Attention with a position method's `Terms`: one function, one place that chooses what computes it."""

import functools
import logging
import math

import jax

from wavelet_jax.attention import common, cudnn, decode, pallas_tpu, reference, tiled, triton_gpu
from wavelet_jax.attention.arguments import (
    arrays_of,
    check_causal,
    check_terms,
    dropout_of,
    hide,
    mask_of,
    positions_of,
    segments_of,
    tolerance_of,
    window_of,
)
from wavelet_jax.attention.call import Call, is_repeated
from wavelet_jax.attention.tiles import KEPT
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.hardware import memory
from wavelet_jax.positions.terms import Terms

__all__ = ["BACKENDS", "KEPT", "attention"]

# What a backend would need a call to be, and is not; empty where it carries the call.
OBSTACLES = {
    "reference": lambda call: [],
    "tiled": tiled.obstacles,
    "decode": decode.obstacles,
    "pallas_tpu": pallas_tpu.obstacles,
    "triton_gpu": triton_gpu.obstacles,
    "cudnn": cudnn.obstacles,
}
BACKENDS = tuple(OBSTACLES)

# "auto" takes the first of these that carries the call and is worth it, or else the definition.
PREFERRED = ("decode", "pallas_tpu", "cudnn", "triton_gpu", "tiled")

# "auto" takes `tiled` from this many scores a head on (queries x keys). Forward and backward on a CPU, float32, 4 heads
# of 128, the definition takes 1.0 times as long for RoPE and 1.7 times for wavelets at 256 tokens, 1.3 and 2.7 times at
# 512, 1.8 and 3.9 times at 1,024; below 256, where they differ little, it compiles faster.
TILED_FROM = 256 * 256

# "auto" takes `decode` for up to this many queries over more keys: a step of a decoding, or a few drafted tokens.
DECODE_UP_TO = 16

# "auto" raises where `reference` alone can carry a call, and its arrays of queries x keys would need more than this
# share of the memory; less than the floor is never refused. The caller may want the rest, and a gradient needs more.
REFERENCE_SHARE = 0.25
REFERENCE_FLOOR = 2**28  # bytes


def attention(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    terms: Terms,
    *,
    causal: bool = True,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    backend: str = "auto",
    far_tolerance: float | None = None,
) -> jax.Array:
    """Attention whose scores hold a position method's terms.

    Args:
      query_BxTxHxD: [B, T, H, D], float32, bfloat16 or float16 (NumPy's float64 too where JAX takes it for float32).
      key_BxSxKxD, value_BxSxKxD: [B, S, K, D], likewise; K divides H, and head h reads key head h // (H / K) (grouped
        queries). The three dtypes may differ (a cache in bfloat16, say): a product of two is of the wider one.
      terms: from `positions.make(...).terms(params)`, made for H heads of size D. The terms of methods that add to the
        token embedding (sinusoidal, learned) are passed as `terms.without_embedding()`, once the embedding has them.
      causal: a query sees keys at its own position and before.
      query_positions, key_positions: integers in tokens, [T] and [S], or [B, T] and [B, S]; or a scalar, the first of
        consecutive positions (traced, say, in a loop over chunks); 0, 1, 2, .. where left out, which takes T = S. They
        and their distances must fit into int32; traced ones that do not fit wrap around, unseen.
        With a cache, give the global positions; unfilled slots whose positions lie after every query's are then
        hidden by the causal mask. "tiled" and "decode" take consecutive positions only: scalars, or arrays that are
        not traced.
      segment_ids: integers [B, T] (with T = S), or the pair (a tuple) of [B, T] and [B, S]: a query sees keys of its
        own segment only.
      window: a query sees keys at distance less than this only (on both sides where not causal).
      mask: bool, broadcastable to [B, H, T, S]: False hides a key, beside what the arguments above hide. One of shape
        [B, 1, 1, S], the same for all heads and queries, is padding, and goes as segments do: "reference", "tiled" and
        "decode" carry it. Any other is carried by "reference" alone, and only where that is named: "auto" is there for
        linear memory, and refuses.
      dropout_rate, dropout_key: dropout on the attention probabilities; the rate is a number that is not traced.
      backend: "auto" or one of `BACKENDS`: "reference" is the definition, with memory quadratic in length; "tiled"
        computes the same in linear memory, "decode" is for few queries, "pallas_tpu" and "triton_gpu" are kernels, and
        "cudnn" is NVIDIA's, for methods that add nothing to the scores. "auto" takes "decode" for up to `DECODE_UP_TO`
        queries over more keys, and one of the others for long sequences, where they can. The batch may be symbolic
        (`jax.export`); lengths may be for "reference" only.
      far_tolerance: of all but "reference": no entry of a constant `relative_keys` is wrong by more than this; None for
        `tiled.FAR_TOLERANCE` of the query's dtype.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key. Sums are float32; all but "reference" round
      the softmax weights to the value's dtype for their product with it. "reference" and "decode" have all derivatives.
      The others have first derivatives of their own, in reverse mode; "tiled" also has second ones, as forward mode
      over reverse (`jax.hessian`, or `jax.jvp` of `jax.grad`). `jax.jvp` alone and `jax.grad` of `jax.grad` are refused
      (`jax.jvp` with `jax.jit` by JAX itself: it "can't apply forward-mode autodiff").

    Raises:
      UserError: arguments of a wrong kind, dtype or shape, a method made for other heads, terms that add to the token
        embedding, positions past int32, an unknown backend, what a named backend cannot carry, or what "auto" could
        compute in quadratic memory only, and more of it than `REFERENCE_SHARE`.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise unknown("attention backend", backend, ("auto", *BACKENDS))
    query_BxTxHxD, key_BxSxKxD, value_BxSxKxD = arrays_of(query_BxTxHxD, key_BxSxKxD, value_BxSxKxD)
    (batch, num_queries, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = query_BxTxHxD.shape, key_BxSxKxD.shape
    check_terms(terms, query_BxTxHxD.shape)
    dropout_rate = dropout_of(dropout_rate, dropout_key)
    check_causal(causal)
    window, far_tolerance = window_of(window), tolerance_of(far_tolerance)
    query_positions, query_start, key_positions, key_start = positions_of(
        query_positions, key_positions, batch, num_queries, num_keys
    )
    segment_ids = segments_of(segment_ids, batch, num_queries, num_keys)
    if mask is not None:
        mask = mask_of(mask, (batch, num_heads, num_queries, num_keys))
        if mask.shape[1:3] == (1, 1):
            segment_ids, mask = hide(mask[:, 0, 0], segment_ids, (batch, num_queries, num_keys)), None
        elif backend != "reference":
            raise UserError(
                "a mask that differs by head or query needs the full score matrix: name backend='reference' "
                "(memory quadratic in length), or say it by causal, window, segment_ids and a padding mask [B, 1, 1, S]"
            )
    consecutive = query_start is not None and key_start is not None
    call = Call(
        terms=terms,
        queries=num_queries,
        keys=num_keys,
        heads=num_heads,
        kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=query_BxTxHxD.dtype,
        offset=query_start - key_start if consecutive else None,
        causal=causal,
        window=window,
        segments=segment_ids is not None,
        dropout=dropout_rate > 0,
        varies=bool(common.varying_axes(query_BxTxHxD)),
        far_tolerance=far_tolerance,
    )
    chosen = _choose(backend, call)

    if terms.rotate is not None:
        with jax.named_scope("rotate"):
            query_BxTxHxD = terms.rotate(query_BxTxHxD, query_positions)
            key_BxSxKxD = terms.rotate(key_BxSxKxD, key_positions)

    match chosen:
        case "cudnn":
            return cudnn.attention(query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, call)
        case "triton_gpu":
            return triton_gpu.attention(query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, call)
        case "pallas_tpu":
            return pallas_tpu.attention(query_BxTxHxD, key_BxSxKxD, value_BxSxKxD, call)
        case "tiled" | "decode":
            compute = tiled.attention if chosen == "tiled" else decode.attention
            return compute(
                query_BxTxHxD,
                key_BxSxKxD,
                value_BxSxKxD,
                terms,
                offset=call.offset,
                causal=causal,
                segment_ids=segment_ids,
                window=window,
                far_tolerance=far_tolerance,
            )
        case "reference":
            distance = query_positions[..., :, None] - key_positions[..., None, :]  # [T, S] or [B, T, S]
            if backend == "auto":
                _check_memory(reference.array_shapes(batch, num_heads, terms, distance.shape), call)
            return reference.attention(
                query_BxTxHxD,
                key_BxSxKxD,
                value_BxSxKxD,
                terms,
                distance,
                causal=causal,
                window=window,
                segment_ids=segment_ids,
                mask=mask,
                dropout_rate=dropout_rate,
                dropout_key=dropout_key,
            )


def _choose(backend: str, call: Call) -> str:
    """The backend of a call; raises `UserError` for what a named one cannot carry."""
    if not (isinstance(call.queries, int) and isinstance(call.keys, int)) and backend != "reference":
        raise UserError(
            f"lengths {call.queries} and {call.keys} are symbolic, which the reference backend alone carries: name "
            "backend='reference' (memory quadratic in length), or export a program for each length"
        )
    if backend != "auto":
        if found := OBSTACLES[backend](call):
            raise UserError(f"the {backend} backend needs {' and '.join(found)}: use backend='auto'")
        return backend
    passed = []
    for name in PREFERRED:
        found = OBSTACLES[name](call) or _reservations(name, call)
        if not found:
            break
        passed.append(f"{name} needs {' and '.join(found)}")
    else:
        name = "reference"
    _say_once(f"attention backend: {name}" + (f" ({'; '.join(passed)})" if passed else ""))
    return name


def _reservations(name: str, call: Call) -> list[str]:
    """What "auto" asks for where a backend can carry the call."""
    if name == "decode":
        few = call.queries <= DECODE_UP_TO and call.queries < call.keys
        return [] if few else [f"at most {DECODE_UP_TO} queries over more keys"]
    found = []
    if name == "cudnn" and not cudnn.is_deterministic():
        found.append(f"{cudnn.DETERMINISTIC} to repeat its gradients")
    if name in ("pallas_tpu", "triton_gpu") and is_repeated():
        found.append("shard_map on several devices, each of which would do the work of all")
    if call.queries * call.keys < TILED_FROM:
        found.append(f"at least {TILED_FROM} scores a head to be worth it")
    return found


def _check_memory(shapes: list[tuple[int, ...]], call: Call) -> None:
    """Raises `UserError` where float32 arrays of these shapes need more than `REFERENCE_SHARE` of the memory."""
    # Symbolic sizes (a batch in jax.export) are at least 1.
    count = sum(4 * math.prod(size if isinstance(size, int) else 1 for size in shape) for shape in shapes)
    obstacles = tiled.obstacles(call)  # the backend of linear memory that carries most
    if count <= REFERENCE_FLOOR or not obstacles:
        return
    limit, owner = memory.available()
    if count > REFERENCE_SHARE * limit:
        raise UserError(
            f"only the reference backend can compute this, in arrays of queries x keys, "
            f"{', '.join(str(list(shape)) for shape in shapes)} in float32: {memory.shown(count)}, more than "
            f"{REFERENCE_SHARE:.0%} of the {memory.shown(limit)} of {owner}. The backends of linear memory need "
            f"{' and '.join(obstacles)}; backend='reference' computes it as it is"
        )


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).info(message)
