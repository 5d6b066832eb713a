"""Random arrays."""

import numpy as np


def normal(seed: int, *shape: int, dtype=np.float32) -> np.ndarray:
    """Standard normal numbers, drawn in float64."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)
