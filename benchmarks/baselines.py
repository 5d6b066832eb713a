"""What attention with wavelets is measured against: the paper's own two forms, plain attention, and PyTorch's.

All take queries, keys and values, and are causal. They are here to be timed and have no other use.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.attention.tiled.skew import skew
from wavelet_jax.positions.rope import frequencies
from wavelet_jax.wavelets import scale_shift_grid, wavelet_position

# -- JAX: [B, L, H, D] ------------------------------------------------------------------------------------------------


def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention without positions, as JAX has it."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def tip_1(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Tip 1 of A.6: the table [L, L, D] of all pairs, dotted with the queries."""
    length, head_dim = query.shape[1], query.shape[3]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    table = wavelet_position(distance, *scale_shift_grid(head_dim)).astype(query.dtype)
    return _softmax(query, key, value, jnp.einsum("bthd,tsd->bhts", query, table))


def tip_2(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Tip 2 of A.6: the queries times the table [L, D] of all distances, moved to where each distance is a key's.

    By padding and reshaping, which is faster than the scatter that the paper describes.
    """
    length, head_dim = query.shape[1], query.shape[3]
    table = wavelet_position(jnp.arange(length - 1, -1, -1), *scale_shift_grid(head_dim)).astype(query.dtype)
    return _softmax(query, key, value, skew(jnp.einsum("bthd,ed->bhte", query, table), length))


def _softmax(query: jax.Array, key: jax.Array, value: jax.Array, position_BxHxTxS: jax.Array) -> jax.Array:
    length = query.shape[1]
    scores = (jnp.einsum("bthd,bshd->bhts", query, key) + position_BxHxTxS) / math.sqrt(query.shape[3])
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)


JAX = {"plain": plain, "tip 1": tip_1, "tip 2": tip_2}

# -- PyTorch: [B, H, L, D] --------------------------------------------------------------------------------------------


def torch_sdpa(length: int, head_dim: int) -> Callable:
    """`scaled_dot_product_attention` with RoPE, whose cosines and sines are made beforehand."""
    import torch

    angles = np.arange(length)[:, None] * frequencies(head_dim)
    cos, sin = (torch.tensor(f(angles), dtype=torch.float32) for f in (np.cos, np.sin))

    def rotate(x):
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def run(query, key, value):
        rotated = rotate(query), rotate(key)
        return torch.nn.functional.scaled_dot_product_attention(*rotated, value, is_causal=True)

    return run


def torch_tip_2(length: int, head_dim: int) -> Callable:
    """`tip_2` in PyTorch."""
    import torch

    table, hidden = _torch_table(length, head_dim), torch.ones(length, length).triu(1).bool()

    def run(query, key, value):
        scores = query @ key.mT + _torch_skew(query @ table.to(query.dtype).mT)
        scores = (scores / math.sqrt(head_dim)).masked_fill(hidden, -math.inf)
        return scores.softmax(-1) @ value

    return run


def torch_flex(length: int, head_dim: int) -> Callable:
    """`flex_attention`, compiled: the queries' products with the table [L, D], read by distance in a score_mod."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    table = _torch_table(length, head_dim)
    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention)

    def run(query, key, value):
        relative = (query @ table.to(query.dtype).mT).flip(-1) / math.sqrt(head_dim)  # [B, H, L, distance]

        def score_mod(score, b, h, q, k):
            return score + relative[b, h, q, torch.abs(q - k)]

        return compiled(query, key, value, score_mod=score_mod, block_mask=causal)

    return run


def _torch_table(length: int, head_dim: int):
    """P of the distances L - 1, .., 0."""
    import torch

    return torch.tensor(np.array(wavelet_position(np.arange(length - 1, -1, -1), *scale_shift_grid(head_dim))))


def _torch_skew(products):
    """[.., L, L] by distance -> [.., L, L] by key; see `wavelet_jax.attention.tiled.tile.skew`."""
    import torch

    *lead, length, _ = products.shape
    padded = torch.nn.functional.pad(products, (0, length)).reshape(*lead, -1)
    return padded[..., : length * (2 * length - 1)].reshape(*lead, length, -1)[..., length - 1 :]


TORCH = {"torch sdpa": torch_sdpa, "torch tip 2": torch_tip_2, "torch flex": torch_flex}
FORWARD_ONLY = ("torch flex",)  # PyTorch has no backward pass of it on a CPU


def jax_case(function: Callable, arrays: list[np.ndarray], backward: bool) -> tuple[Callable[[], None], Callable]:
    """(runs it once, its compiled program) for queries, keys, values and a cotangent [B, L, H, D]."""
    query, key, value, cotangent = (jnp.asarray(array) for array in arrays)
    run = function
    if backward:

        def run(query, key, value):
            out, pull = jax.vjp(function, query, key, value)
            return out, pull(cotangent.astype(out.dtype))

    program = jax.jit(run).lower(query, key, value).compile()
    return functools.partial(_wait, program, query, key, value), program


def _wait(program: Callable, *arrays: jax.Array) -> None:
    jax.block_until_ready(program(*arrays))


def torch_case(make: Callable, arrays: list[np.ndarray], backward: bool, dtype: str) -> Callable[[], None]:
    """Runs it once."""
    import torch

    query, key, value, cotangent = (
        torch.tensor(np.moveaxis(array, 1, 2).copy()).to(getattr(torch, dtype)) for array in arrays
    )
    run = make(query.shape[2], query.shape[3])

    def once() -> None:
        if not backward:
            with torch.no_grad():
                run(query, key, value)
            return
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        run(*inputs).backward(cotangent)

    return once
