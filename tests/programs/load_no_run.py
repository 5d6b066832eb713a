"""A command that is given the folder of a run that is not there."""

from pathlib import Path

from wavelet_jax.commands import cli
from wavelet_jax.runs import directory

cli.run(lambda: directory.load_config(Path("nothing")))
