"""Products with parameters: what their gradients are summed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from wavelet_jax.model.products import product


@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_kernel_gradients_are_float32_sums(out_dtype):
    """A cotangent of 1 + 2^-7 over 1,001 tokens sums to 1008.8203125, which bfloat16 would round to 1008."""
    x, kernel = jnp.ones((1001, 2), jnp.bfloat16), jnp.zeros((2, 3), jnp.float32)
    cotangent = jnp.full((1001, 3), 1 + 2**-7, out_dtype or jnp.bfloat16)
    _, pull = jax.vjp(lambda x, kernel: product(x, kernel, "default", out_dtype), x, kernel)
    x_gradient, kernel_gradient = pull(cotangent)
    assert kernel_gradient.dtype == jnp.float32
    np.testing.assert_array_equal(kernel_gradient, 1001 * (1 + 2**-7))
    assert x_gradient.dtype == jnp.bfloat16


def test_a_product_of_one_dtype_is_a_plain_dot():
    x, kernel = (np.random.default_rng(0).normal(size=size).astype(np.float32) for size in ((5, 7), (7, 3)))
    np.testing.assert_array_equal(
        product(x, kernel, "highest"), lax.dot(jnp.asarray(x), jnp.asarray(kernel), precision="highest")
    )
