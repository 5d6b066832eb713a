"""The range of every numeric key of a config: one table, checked before anything is read, computed or written.

The options of position methods, `config.position.*`, are checked by the methods themselves, which can be made without a
config. What depends on several keys, on the devices or on the text is checked where it is known (`training.checks`,
`sharding`, `data`).
"""

from ml_collections import ConfigDict

from wavelet_jax.errors import UserError
from wavelet_jax.ranges import AMOUNT, COUNT, COUNT_OR_NONE, FRACTION, HEADS, SEED, Range

_THREADS = 1024  # far more than any machine makes use of; each one holds a piece of the text, or a batch
_LAYERS = 10_000  # each one is traced and compiled on its own

RANGES: dict[str, Range] = {
    "data.validation_fraction": Range(0, 1),  # 0 and 1 are for runs with a validation text of their own
    "data.vocab_size": COUNT_OR_NONE,  # what a tokenizer can do with it is for `data.tokenizers.specification`
    "data.seed": SEED,
    "data.threads": Range(1, _THREADS, whole=True),
    "data.prefetch": Range(0, _THREADS, whole=True),
    "model.num_layers": Range(1, _LAYERS, whole=True),
    "model.d_model": COUNT,
    "model.num_heads": HEADS,
    "model.num_kv_heads": HEADS,
    "model.head_dim": HEADS,
    "model.d_ff": COUNT,
    "model.adaptive_factor": COUNT,
    "model.adaptive_dropout": FRACTION,
    "model.dropout": FRACTION,
    "model.attention_dropout": FRACTION,
    "model.activation_dropout": FRACTION,
    "train.steps": COUNT,
    "train.model_seed": SEED,
    "train.length": COUNT,
    "train.batch_size": COUNT,
    "train.accumulation": COUNT,
    "train.logits_chunk": COUNT_OR_NONE,
    "train.skip_nonfinite": COUNT_OR_NONE,
    "optimizer.learning_rate": AMOUNT,
    "optimizer.warmup_steps": COUNT_OR_NONE,
    "optimizer.warmup_start": AMOUNT,
    "optimizer.decay_steps": COUNT_OR_NONE,
    "optimizer.final_fraction": AMOUNT,
    "optimizer.b1": FRACTION,
    "optimizer.b2": FRACTION,
    "optimizer.eps": AMOUNT,
    "optimizer.weight_decay": AMOUNT,
    "optimizer.momentum": FRACTION,
    "optimizer.clip_norm": AMOUNT,
    "log.every": COUNT,
    "log.slow_update": AMOUNT,
    "log.slow_seconds": AMOUNT,
    "checkpoint.every": COUNT,
    "checkpoint.keep": COUNT,
    "checkpoint.timeout": COUNT,
    "eval.every": COUNT_OR_NONE,
    "eval.windows": COUNT,
    "eval.max_tokens": COUNT_OR_NONE,
    "eval.sequences": COUNT_OR_NONE,
    "eval.sequence_seed": SEED,
    "eval.batch_tokens": COUNT,
    "eval.prefill_chunk": COUNT_OR_NONE,
    "eval.resamples": Range(1, 1_000_000, whole=True),  # more would not change an interval's third digit
    "eval.bootstrap_seed": SEED,
    "evaluators.*.every": COUNT_OR_NONE,  # checked by `training.evaluators`, whose names are the user's
    "evaluators.*.windows": COUNT,
    "evaluators.*.length": COUNT,
    "mesh.data": Range(-1, 2**31 - 1, whole=True),  # 0 is refused with the whole mesh, by `sharding.mesh_shape`
    "mesh.fsdp": Range(-1, 2**31 - 1, whole=True),
    "mesh.context": Range(-1, 2**31 - 1, whole=True),
    "mesh.tensor": Range(-1, 2**31 - 1, whole=True),
}
# Of keys that hold several numbers, the range of each of them.
EACH: dict[str, Range] = {"model.cutoffs": COUNT, "compare.lengths": COUNT}


def check(config: ConfigDict, *sections: str) -> None:
    """Raises `UserError` for the first number of a config that is of another kind, or out of its range.

    Args:
      config: with the sections of `wavelet_jax/config/default.py`.
      *sections: those to check, such as "eval"; none named: all.
    """
    for key, allowed in (*RANGES.items(), *EACH.items()):
        section, name = key.split(".", 1)
        if "*" in name or (sections and section not in sections):
            continue
        values = config[section][name]
        if key in RANGES:
            allowed.check(key, values)
            continue
        if not isinstance(values, tuple | list):
            raise UserError(f"{key} must be numbers in brackets, such as (128, 256), not {values!r}")
        for value in values:
            allowed.check(f"each of {key}", value)
