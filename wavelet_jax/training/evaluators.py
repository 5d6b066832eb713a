"""Evaluators: what is measured of a model now and then while it trains.

`config.evaluators.NAME` is a section with `type`, one of `TYPES`; `every`, the updates from one measurement to the
next (0: never; the last update always counts); and the options of the type. The numbers go into the run's metrics with
NAME before them. Another kind of evaluator is a class like `Loss`, and a line in `TYPES`.
"""

from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from wavelet_jax.config import numeric_keys
from wavelet_jax.data import Corpus, Windows
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.parallel import sharding
from wavelet_jax.runs.throughput import Meter
from wavelet_jax.training import steps


class Evaluator(Protocol):
    """One entry of `config.evaluators`, ready to run."""

    OPTIONS: tuple[str, ...]  # keys of its section beside `type` and `every`

    def __init__(
        self, name: str, section: ConfigDict, config: ConfigDict, corpus: Corpus, graphdef: nnx.GraphDef, mesh: Mesh
    ): ...

    def compiled_by(self, meter: Meter) -> None:
        """Lets the run's meter count the time that compiling takes."""
        ...

    def run(self, params: dict[str, Any]) -> dict[str, float]:
        """The metrics of a model with these parameters. Called in every process of a run at the same update."""
        ...


class Loss:
    """NAME_loss: the mean loss over the first windows of the validation text, nats per token.

    The windows are the same each time and for every run with the same text, and never packed.

    Options:
      windows: how many; all, where there are fewer.
      length: tokens of a window.
    """

    OPTIONS = ("windows", "length")

    def __init__(
        self, name: str, section: ConfigDict, config: ConfigDict, corpus: Corpus, graphdef: nnx.GraphDef, mesh: Mesh
    ):
        self._metric, self._mesh = f"{name}_loss", mesh
        self._windows = Windows(corpus.validation, section.length, seed=0)
        self._count = min(section.windows, self._windows.num_windows)
        self._batch_size = config.train.batch_size
        # Every process sees all losses of a batch.
        self._step = jax.jit(steps.make_eval_step(config, graphdef, mesh), out_shardings=sharding.everywhere(mesh))

    def compiled_by(self, meter: Meter) -> None:
        """See `Evaluator`."""
        self._step = meter.compiled(self._step)

    def run(self, params: dict[str, Any]) -> dict[str, float]:
        """See `Evaluator`."""
        shape = (self._batch_size, self._windows.length + 1)
        # Batches are whole, for the mesh; windows past the count are not counted.
        starts = range(0, self._count, self._batch_size)
        batches = (sharding.load_batch(self._windows.batch, start, shape, self._mesh) for start in starts)
        losses = [jax.device_get(self._step(params, batch)) for batch in batches]
        return {self._metric: float(np.concatenate(losses)[: self._count].mean(dtype=np.float64))}


TYPES: dict[str, Any] = {"loss": Loss}  # each makes an `Evaluator`


def check(config: ConfigDict) -> None:
    """Raises `UserError` for a section of `config.evaluators` that is none, and for its first wrong key or number."""
    for name, section in config.evaluators.items():
        place = f"evaluators.{name}"
        if not isinstance(section, ConfigDict) or "type" not in section:
            raise UserError(f"{place} must be a section with a type, one of {', '.join(TYPES)}")
        if section.type not in TYPES:
            raise unknown(f"{place}.type", section.type, TYPES)
        allowed = ("type", "every", *TYPES[section.type].OPTIONS)
        for key in section:
            if key not in allowed:
                raise unknown(f"key of {place}", key, allowed)
        if missing := [key for key in allowed if key not in section]:
            raise UserError(f"{place} has no {', '.join(missing)}: an evaluator of type {section.type} needs them")
        for key in allowed[1:]:
            numeric_keys.RANGES[f"evaluators.*.{key}"].check(f"{place}.{key}", section[key])


def make(config: ConfigDict, corpus: Corpus, graphdef: nnx.GraphDef, mesh: Mesh) -> dict[str, Evaluator]:
    """The evaluators of a config by name, without those that never run.

    Raises:
      UserError: what `check` raises, and a validation text that is too short.
    """
    check(config)
    return {
        name: TYPES[section.type](name, section, config, corpus, graphdef, mesh)
        for name, section in config.evaluators.items()
        if section.every
    }


def due(config: ConfigDict, evaluators: dict[str, Evaluator], step: int) -> list[str]:
    """The names of those that run after this update."""
    last = step == config.train.steps
    return [name for name in evaluators if last or step % config.evaluators[name].every == 0]
