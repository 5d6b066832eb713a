"""Checks of a config before any text is read, since tokenizing may take long."""

from ml_collections import ConfigDict

from wavelet_jax.config import numeric_keys
from wavelet_jax.data import check_packing
from wavelet_jax.model import decoder, vocabulary
from wavelet_jax.runs import metrics
from wavelet_jax.training import evaluators, optimizer, sizes


def check(config: ConfigDict) -> None:
    """Raises `UserError` for what no device and no text could make right. Asks JAX for no device.

    That is a number out of its range, an unknown name, sizes that do not divide one another, an option that the
    position method refuses, or a learning rate that cannot be scheduled.
    """
    numeric_keys.check(config)
    check_packing(config)
    decoder.check(config)
    evaluators.check(config)
    metrics.check(config)
    if config.model.vocabulary == "adaptive":
        vocabulary.clusters(config, sizes.least_vocabulary(config))
    decoder.make_position(config)
    optimizer.make_optimizer(config)
