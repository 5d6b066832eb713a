"""The optimizer of a config and its learning rate schedule."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from wavelet_jax.errors import UserError, unknown
from wavelet_jax.parallel.sharding import STACKED, path_of
from wavelet_jax.training.nag import nag

SCHEDULES = ("cosine", "linear", "constant")


OPTIMIZERS = ("adamw", "nag")


def learning_rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Learning rate of every update: linear warm-up, then what `config.optimizer.schedule` says."""
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    decay_steps = config.optimizer.decay_steps - warmup
    if config.optimizer.schedule != "constant" and decay_steps < 1:
        raise UserError(
            f"optimizer.decay_steps {config.optimizer.decay_steps} (train.steps where not set) must be past "
            f"optimizer.warmup_steps {warmup}"
        )
    match config.optimizer.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.optimizer.final_fraction)
        case "linear":
            after = optax.linear_schedule(peak, peak * config.optimizer.final_fraction, decay_steps)
        case "constant":
            after = optax.constant_schedule(peak)
        case other:
            raise unknown("optimizer.schedule", other, SCHEDULES)
    # Where no start is given, the first update counts as 1 of the warm-up: an update at learning rate 0 would be lost.
    start = config.optimizer.warmup_start or peak / (warmup + 1)

    def rising(step: Any) -> jax.Array:
        # optax's would add a small start to the peak's negative, and round it away.
        return start + (peak - start) * step / warmup

    return optax.join_schedules([rising, after], [warmup]) if warmup else after


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) or NAG (`training.nag`), with clipping by the global norm."""

    def decayed(params):
        def is_matrix(key_path, leaf) -> bool:
            path = path_of(key_path)
            axes = leaf.ndim - 1 if STACKED.search(path) else leaf.ndim
            return axes >= 2 and "position" not in path.split("/")

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    schedule = learning_rate_schedule(config)
    match config.optimizer.name:
        case "adamw":
            optimizer = optax.adamw(
                schedule,
                b1=config.optimizer.b1,
                b2=config.optimizer.b2,
                eps=config.optimizer.eps,
                weight_decay=config.optimizer.weight_decay,
                mask=decayed,
            )
        case "nag":
            if not 0 <= config.optimizer.momentum < 1:
                raise UserError(f"optimizer.momentum must be at least 0 and below 1, not {config.optimizer.momentum}")
            optimizer = nag(schedule, config.optimizer.momentum)
        case other:
            raise unknown("optimizer.name", other, OPTIMIZERS)
    clip_norm = config.optimizer.clip_norm
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer
