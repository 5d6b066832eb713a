"""Lowers a jitted gradient of the Triton backend for CUDA, without a GPU, and prints how many kernels it launches."""

import jax
import jax.numpy as jnp

from wavelet_jax import positions
from wavelet_jax.attention import attention
from wavelet_jax.attention.flash import gpu

gpu.gpu_capability = lambda: (9, 0)
terms = positions.make("wavelet", num_heads=2, head_dim=64).terms({})
query = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)


def run(*arrays):
    return jax.vjp(lambda *x: attention(*x, terms, backend="triton_gpu"), *arrays)[1](arrays[0])


lowered = jax.jit(run).trace(query, query, query).lower(lowering_platforms=("cuda",))
print(lowered.as_text().count("@triton_kernel_call"))
