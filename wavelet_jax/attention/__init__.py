"""Attention with a position method's `Terms`: one function, and the backends that compute it. See README.md here."""

from wavelet_jax.attention import sharded
from wavelet_jax.attention.api import attention
from wavelet_jax.attention.choose import BACKENDS as _BACKENDS
from wavelet_jax.attention.common import SAVED_RESIDUALS

BACKENDS = tuple(_BACKENDS)

__all__ = ["BACKENDS", "SAVED_RESIDUALS", "attention", "sharded"]
