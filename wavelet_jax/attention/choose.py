"""Which backend computes a call: the one that is named, or the first one that supports it and is worth it."""

import functools
import logging
import math
from types import ModuleType

from wavelet_jax.attention import decode, reference, tiled
from wavelet_jax.attention.call import Call, would_replicate
from wavelet_jax.attention.flash import cudnn, gpu, tpu
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.hardware import memory

# By name, a module with unsupported(call) -> reasons, empty if the call is supported, and
# attend(query, key, value, call) -> output.
BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "tiled": tiled,
    "decode": decode,
    "pallas_tpu": tpu,
    "triton_gpu": gpu,
    "cudnn": cudnn,
}

# "auto" takes the first of these that supports the call and is worth it, or else the reference.
PREFERRED = ("decode", "pallas_tpu", "cudnn", "triton_gpu", "tiled")

# "auto" takes `tiled` from this many scores a head on (queries x keys). Forward and backward on a CPU, float32, 4 heads
# of 128, the reference takes 1.0 times as long for RoPE and 1.7 times for wavelets at 256 tokens, 1.3 and 2.7 times at
# 512, 1.8 and 3.9 times at 1,024; below 256, where they differ little, it compiles faster.
MIN_TILED_SCORES = 256 * 256

# "auto" takes `decode` for up to this many queries over more keys: a step of a decoding, or a few drafted tokens.
MAX_DECODE_QUERIES = 16

# If only `reference` supports a call, and its arrays of queries x keys would exceed this fraction of the memory (and
# the floor below), "auto" raises before it runs out of memory: the caller may want the rest, and gradients need more.
REFERENCE_SHARE = 0.25
REFERENCE_FLOOR = 2**28  # bytes


def choose(backend: str, call: Call, batch: int) -> str:
    """The name of the backend of a call: the one that is named, or that of "auto", which logs each choice once.

    Raises:
      UserError: an unknown name, what a named backend does not support, or what "auto" could compute only in more
        quadratic memory than `REFERENCE_SHARE` allows.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise unknown("attention backend", backend, ("auto", *BACKENDS))
    if call.mask is not None and backend != "reference":
        raise UserError(
            "a mask that differs by head or query needs the full score matrix: name backend='reference' "
            "(memory quadratic in length), or say it by causal, window, segment_ids and a padding mask [B, 1, 1, S]"
        )
    if not (isinstance(call.queries, int) and isinstance(call.keys, int)) and backend != "reference":
        raise UserError(
            f"lengths {call.queries} and {call.keys} are symbolic, which only the reference backend supports: name "
            "backend='reference' (memory quadratic in length), or export a program for each length"
        )
    if backend != "auto":
        if reasons := BACKENDS[backend].unsupported(call):
            raise UserError(f"the {backend} backend needs {' and '.join(reasons)}: use backend='auto'")
        return backend
    passed = []
    for name in PREFERRED:
        reasons = BACKENDS[name].unsupported(call) or _reservations(name, call)
        if not reasons:
            break
        passed.append(f"{name} needs {' and '.join(reasons)}")
    else:
        name = "reference"
        _check_memory(call, batch)
    _log_once(f"attention backend: {name}" + (f" ({'; '.join(passed)})" if passed else ""))
    return name


def _reservations(name: str, call: Call) -> list[str]:
    """Reasons why "auto" passes over a backend that supports the call."""
    if name == "decode":
        few = call.queries <= MAX_DECODE_QUERIES and call.queries < call.keys
        return [] if few else [f"at most {MAX_DECODE_QUERIES} queries over more keys"]
    found = []
    if name == "cudnn" and not cudnn.is_deterministic():
        found.append(f"{cudnn.DETERMINISTIC} to repeat its gradients")
    if name in ("pallas_tpu", "triton_gpu") and would_replicate():
        found.append("shard_map on several devices, each of which would do the work of all")
    if call.queries * call.keys < MIN_TILED_SCORES:
        found.append(f"at least {MIN_TILED_SCORES} scores a head to be worth it")
    return found


def _check_memory(call: Call, batch: int) -> None:
    """Raises `UserError` if the reference's float32 arrays need more than `REFERENCE_SHARE` of the memory."""
    shapes = reference.array_shapes(call, batch)
    # Symbolic sizes (a batch in jax.export) are at least 1.
    count = sum(4 * math.prod(size if isinstance(size, int) else 1 for size in shape) for shape in shapes)
    reasons = tiled.unsupported(call)  # the backend of linear memory that supports most
    if count <= REFERENCE_FLOOR or not reasons:
        return
    limit, owner = memory.available()
    if count > REFERENCE_SHARE * limit:
        raise UserError(
            f"only the reference backend can compute this, in arrays of queries x keys, "
            f"{', '.join(str(list(shape)) for shape in shapes)} in float32: {memory.shown(count)}, more than "
            f"{REFERENCE_SHARE:.0%} of the {memory.shown(limit)} of {owner}. The backends of linear memory need "
            f"{' and '.join(reasons)}; backend='reference' computes it as it is"
        )


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger("wavelet_jax.attention").info(message)
