"""Shared by the blocks and the vocabularies of the decoder: products with parameters, norms and dropout."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from ml_collections import ConfigDict


class Linear(nnx.Linear):
    """`flax.nnx.Linear` by `product`: parameters are float32, and what is computed is in `config.model.dtype`."""

    def __init__(self, config: ConfigDict, size: int, to_size: int, **options: Any):
        dtype, precision = jnp.dtype(config.model.dtype), precision_of(config)
        super().__init__(size, to_size, dtype=dtype, precision=precision, **options)

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = product(x.astype(self.dtype), self.kernel[...], self.precision)
        if self.bias is None:
            return y
        # Added in float32, or its gradient would be a sum over tokens in bfloat16.
        return (y + self.bias[...]).astype(self.dtype)


def product(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, out_dtype: Any = None) -> jax.Array:
    """x [.., E] times a kernel [E, F], which is rounded to the dtype of x; in `out_dtype`, by default that of x.

    The gradient of the kernel is a sum over all tokens, of every device: it is accumulated, and summed over devices, in
    the kernel's own dtype, float32, and not in the bfloat16 of x.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if x.dtype == kernel.dtype:
        return jnp.dot(x, kernel, precision=precision, preferred_element_type=out_dtype)
    return _rounding_product(x, kernel, precision, jnp.dtype(out_dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rounding_product(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, out_dtype: jnp.dtype) -> jax.Array:
    return jnp.dot(x, kernel.astype(x.dtype), precision=precision, preferred_element_type=out_dtype)


def _forward(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, out_dtype: jnp.dtype):
    return _rounding_product(x, kernel, precision, out_dtype), (x, kernel)


def _backward(
    precision: lax.PrecisionLike, out_dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
):
    x, kernel = saved
    tokens = tuple(range(x.ndim - 1))
    x_gradient = jnp.dot(gradient, kernel.astype(x.dtype).T, precision=precision, preferred_element_type=gradient.dtype)
    kernel_gradient = lax.dot_general(
        x, gradient, ((tokens, tokens), ((), ())), precision=precision, preferred_element_type=kernel.dtype
    )
    return x_gradient.astype(x.dtype), kernel_gradient


_rounding_product.defvjp(_forward, _backward)


def precision_of(config: ConfigDict) -> str:
    """`config.model.precision` of a float32 model; "default" in bfloat16, where each product has a bfloat16 factor."""
    return config.model.precision if config.model.dtype == "float32" else "default"


def normed(norm: nnx.RMSNorm | nnx.LayerNorm, x: jax.Array) -> jax.Array:
    """x normed in the dtype of `norm`, and rounded to that of x.

    That is float32, or the gradients of its parameters would be sums over tokens in bfloat16.
    """
    return norm(x).astype(x.dtype)


def dropout(layer: nnx.Dropout, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Dropout of `x` by `key`; `x` itself if the key is None."""
    return layer(x, deterministic=key is None, rngs=key)
