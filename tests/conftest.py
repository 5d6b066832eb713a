"""What several test files need: a small corpus made on the spot, and configs of a model of seconds."""

import os
import socket
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: workers of the test run share the cores
os.environ["TRITON_INTERPRET"] = "1"  # before triton, where it is installed: its kernels then run in NumPy

import numpy as np
import pytest
from quick_compile import quick_jit as quick_jit

from configs import smoke
from wavelet_jax.attention import BACKENDS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))

# Backends that carry every call on every device, and so every test of attention; tests/test_kernels.py and
# tests/test_gpu_kernels.py have the others.
EVERYWHERE = tuple(name for name in BACKENDS if name not in ("pallas_tpu", "triton_gpu", "cudnn"))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


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
