"""cuDNN's flash attention, by `jax.nn.dot_product_attention`, for methods that add nothing to the scores (RoPE, NoPE).

Its gradients are added by atomics, and so differ from run to run in the last bits, unless XLA is told otherwise
(`DETERMINISTIC`). "auto" takes it only then: a run that continues from a checkpoint repeats its losses bit for bit.
"""

import os
import re
from typing import Literal

import jax
import jax.numpy as jnp

from wavelet_jax.attention.call import Call
from wavelet_jax.attention.flash import gpu

DETERMINISTIC = "XLA_FLAGS=--xla_gpu_deterministic_ops=true"

DTYPES = ("float16", "bfloat16")


def unsupported(call: Call) -> list[str]:
    """Reasons why cuDNN does not support a call; empty if it does."""
    capability = gpu.gpu_capability()
    if capability is None or capability < (8, 0):
        return [f"an NVIDIA GPU of compute capability 8.0 or more (this process runs on {jax.default_backend()})"]
    return unsupported_on(call, max_head_dim=256 if capability >= (9, 0) else 128)


def unsupported_on(call: Call, max_head_dim: int) -> list[str]:
    """`unsupported` on a GPU whose cuDNN takes heads up to that size."""
    terms, found = call.terms, []
    if jnp.dtype(call.dtype).name not in DTYPES:
        found.append(f"queries in {' or '.join(DTYPES)}")
    if call.head_dim % 8 or call.head_dim > max_head_dim:
        found.append(f"a head size that is a multiple of 8, at most {max_head_dim}")
    fields = ("relative_keys", "relative_values", "bias", "content_bias", "position_bias")
    if any(getattr(terms, field) is not None for field in fields):
        found.append("a position method that adds nothing to scores or values")
    # Its causal mask counts both sides from 0; without a mask it never asks for positions.
    if call.causal and not (isinstance(call.offset, int) and call.offset == 0):
        found.append("queries and keys at the same known positions, or causal=False")
    if call.window is not None:
        found.append("no window")
    if call.segment_ids is not None:
        found.append("no segment_ids or padding mask")
    if call.dropout_rate:
        found.append("no attention dropout")
    return found


def attend(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    call: Call,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Softmax attention of a supported call, of queries and keys that are already rotated.

    Keys and values are taken in the queries' dtype. Returns [B, T, H, D] in the value's.
    """
    query, key, value = (x.astype(call.dtype) for x in (query_BxTxHxD, key_BxSxKxD, value_BxSxKxD))
    out = jax.nn.dot_product_attention(query, key, value, is_causal=call.causal, implementation=implementation)
    return out.astype(value_BxSxKxD.dtype)


def is_deterministic() -> bool:
    """Whether XLA was told to take no GPU operation whose result differs from run to run."""
    flags = re.findall(
        r"--xla_gpu_(?:deterministic|exclude_nondeterministic)_ops(?:=(\w+))?", os.environ.get("XLA_FLAGS", "")
    )
    return any(value.lower() in ("", "true", "1") for value in flags)
