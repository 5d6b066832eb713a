"""Text to token streams to windows: `load_corpus(config)` gives a `Corpus`, `Windows` draws from one of its streams."""

from wavelet_jax.data.corpus import Corpus, load_corpus
from wavelet_jax.data.windows import Windows

__all__ = ["Corpus", "Windows", "load_corpus"]
