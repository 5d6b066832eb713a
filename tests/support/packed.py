"""Packed documents, for tests and the programs that they start."""

import numpy as np

from wavelet_jax.data import Windows


def documents(rng: np.random.Generator, lengths) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, ends) of documents of these lengths, each closed by 256."""
    texts = [np.append(rng.integers(0, 256, length - 1), 256) for length in lengths]
    return np.concatenate(texts).astype(np.uint16), np.cumsum(lengths)


def one_layer(small_config, method: str = "wavelet"):
    """A packed run's config that compiles fast."""
    config = small_config(method)
    config.data.packing, config.model.num_layers = "documents", 1
    return config


def packed_batch(config, lengths, size: int) -> np.ndarray:
    tokens, ends = documents(np.random.default_rng(1), lengths)
    windows = Windows(tokens, config.train.length, 0, ends)
    return windows.batch(0, size)
