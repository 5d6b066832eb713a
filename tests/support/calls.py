"""Calls of attention that several test files make."""

from wavelet_jax.attention import BACKENDS

# Backends that support every call on every device, and so every test of attention; test_kernels.py and
# test_gpu_kernels.py have the others.
EVERYWHERE = tuple(name for name in BACKENDS if name not in ("pallas_tpu", "triton_gpu", "cudnn"))
