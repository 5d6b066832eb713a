"""Lower bounds on the memory of a run, by formulas, so that impossible sizes are refused and not allocated.

The formulas count parameters, the optimizer's state, the tokens of a batch and the input of one layer, once over all
devices. A run needs more than that, and the compiler knows how much (`training.plan`): what is refused here cannot
run, and what is not refused may still be too large.
"""

import itertools
import math

import jax
from ml_collections import ConfigDict

from wavelet_jax.data.tokenizers import Byte
from wavelet_jax.errors import UserError
from wavelet_jax.hardware import memory
from wavelet_jax.model.decoder import make_position

_FLOAT32 = 4  # bytes
# Arrays like the parameters: they themselves, and the moments that each optimizer keeps.
_COPIES = {"adamw": 3, "nag": 2}


def parameters(config: ConfigDict, vocab_size: int) -> dict[str, int]:
    """Learned numbers of the decoder, by what they are for and the keys that decide how many there are."""
    width, d_ff, bias = config.model.d_model, config.model.d_ff, int(config.model.use_bias)
    queries = config.model.num_heads * config.model.head_dim
    keys = config.model.num_kv_heads * config.model.head_dim
    wide = 2 if config.model.activation == "swiglu" else 1  # products of the feed-forward layer that widen
    norm = width * (2 if config.model.norm == "layer" else 1)
    layers = config.model.num_layers
    method = make_position(config)
    learned = jax.tree.leaves(jax.eval_shape(lambda: method.init(jax.random.key(0))))
    positions = sum(math.prod(array.shape) for array in learned)
    attention = 2 * width * (queries + keys) + bias * (queries + 2 * keys + width)
    feed_forward = (wide + 1) * width * d_ff + bias * (wide * d_ff + width)
    return {
        "attention (model.num_layers, d_model, num_heads, head_dim)": layers * (attention + norm),
        "the feed-forward layers (model.num_layers, d_model, d_ff)": layers * (feed_forward + norm),
        "the vocabulary (model.d_model)": _vocabulary_parameters(config, vocab_size) + norm * config.model.final_norm,
        f"positions ({config.position.method}'s options)": positions * (layers if method.per_layer else 1),
    }


def _vocabulary_parameters(config: ConfigDict, vocab_size: int) -> int:
    width = config.model.d_model
    if config.model.vocabulary != "adaptive":
        return width * vocab_size * (1 if config.model.tied_head else 2)
    bounds = [0, *config.model.cutoffs, vocab_size]
    widths = [width // config.model.adaptive_factor**i for i in range(len(bounds) - 1)]
    words = sum(
        (stop - start) * narrow for (start, stop), narrow in zip(itertools.pairwise(bounds), widths, strict=True)
    )
    return words + width * sum(widths) + width * len(config.model.cutoffs)


def least_vocabulary(config: ConfigDict) -> int:
    """The fewest words that the vocabulary can have, as far as the config says it: the text is not read."""
    if config.model.vocabulary == "adaptive":
        return max(config.model.cutoffs, default=0) + 1
    return Byte.vocab_size if config.data.tokenizer == "byte" else 1


def check(config: ConfigDict, vocab_size: int | None = None) -> None:
    """Raises `UserError` where a run needs more memory than all devices of all processes have.

    Args:
      config: one whose numbers are in their ranges (`numeric_keys.check`).
      vocab_size: of the text; None before it was read: the fewest words that it can have.
    """
    parts = parameters(config, least_vocabulary(config) if vocab_size is None else vocab_size)
    count, windows = sum(parts.values()), config.train.batch_size
    state = count * _FLOAT32 * _COPIES[config.optimizer.name]
    tokens = windows * (config.train.length + 1) * _FLOAT32
    numbers = windows // config.train.accumulation * config.train.length * config.model.d_model
    batch = tokens + numbers * (2 if config.model.dtype == "bfloat16" else _FLOAT32)
    limit, owner = memory.available()
    processes = jax.process_count()  # those on one machine share what it has; then this is more than there is
    if state + batch <= limit * processes:
        return
    if state >= batch:
        most = f"most of the parameters are those of {max(parts, key=lambda part: parts[part])}"
    else:
        most = f"a batch is {windows:,} x {config.train.length:,} tokens (train.batch_size, length, accumulation)"
    several = f"{processes} x " if processes > 1 else ""
    raise UserError(
        f"this run needs at least {memory.shown(state + batch)} of memory: {memory.shown(state)} for {count:,} "
        f"parameters and the optimizer's state, {memory.shown(batch)} for tokens and activations of a batch; "
        f"{owner} has {several}{memory.shown(limit)}; {most}"
    )
