"""A comparison: several runs trained one after another, then evaluated together."""

from pathlib import Path

from ml_collections import ConfigDict

from wavelet_jax.evaluation import evaluate
from wavelet_jax.runs import stopping
from wavelet_jax.training import loop


def compare(
    config: ConfigDict, variants: dict[str, ConfigDict], workdir: Path, stop: stopping.Stop, profile_steps: str | None
) -> None:
    """Trains every variant in turn, each in a folder of its name, then evaluates them together."""
    configs, workdirs = list(variants.values()), [workdir / name for name in variants]
    lengths, protocol = config.compare.lengths, config.compare.protocol
    for each, folder in zip(configs, workdirs, strict=True):
        loop.check(folder, each)
    evaluate.check_memory(configs, workdirs, lengths=lengths, protocol=protocol)  # rather now than after the training
    for each, folder in zip(configs, workdirs, strict=True):
        loop.train(each, folder, stop, profile_steps)
    evaluate.evaluate(workdirs, lengths=lengths, protocol=protocol, out=workdir)
