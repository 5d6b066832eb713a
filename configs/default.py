"""One small model on the Python standard library's sources, with every key at its default.

    python train.py --config=configs/default.py:wavelet --workdir=DIR

Every key, with what it means, is in wavelet_jax/config/default.py. The other files in this folder change some of them.
Variants: any position method.
"""

from wavelet_jax.config.default import get_config, set_position

__all__ = ["get_config", "set_position"]
