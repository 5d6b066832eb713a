"""Text to token streams to windows: `load_corpus(config)` gives a `Corpus`, `train_windows` draws from it."""

from wavelet_jax.data.corpus import Corpus, check_files, load_corpus
from wavelet_jax.data.windows import PACKINGS, Windows, check_packing, read_ahead, train_windows

__all__ = [
    "PACKINGS",
    "Corpus",
    "Windows",
    "check_files",
    "check_packing",
    "load_corpus",
    "read_ahead",
    "train_windows",
]
