"""Fixtures of several test files: a small corpus made on the spot, and configs of a model of seconds."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: workers of the test run share the cores
os.environ["TRITON_INTERPRET"] = "1"  # before triton, where it is installed: its kernels then run in NumPy

from pathlib import Path

import numpy as np
import pytest

from configs import smoke


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> Path:
    """A folder of 60 small documents with enough regularity for a loss to fall."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["wavelet", "of", "a", "scale", "and", "shift", "is", "position", "long", "context", "naïve"]
    for i in range(60):
        lines = (" ".join(rng.choice(words, size=12)) for _ in range(12))
        (folder / f"{i:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def small_config(text_files, tmp_path_factory):
    """small_config(method) is configs/smoke.py on the small corpus, with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")

    def make(method: str = "wavelet"):
        config = smoke.get_config(method)
        config.data.update(source="text", train_files=str(text_files / "*.txt"), cache_dir=str(cache))
        config.data.validation_fraction = 0.2
        return config

    return make
