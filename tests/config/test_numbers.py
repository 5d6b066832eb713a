"""Every numeric key of every config and every numeric flag, with -1, 0, 10^9, NaN, infinity and a word for its value.

What is right for each stands in `EXPECTED`: None where a run may begin with it, or else a part of the line that refuses
it. A numeric key that is added to a config and not to `EXPECTED` fails here.
"""

import importlib
import math

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx
from ml_collections import ConfigDict, config_flags
from support.project import ROOT

from configs import default, smoke
from configs.paper import llama2, table1, table3, table4
from wavelet_jax import positions, ranges
from wavelet_jax.analysis import receptive_field, report
from wavelet_jax.commands import cli
from wavelet_jax.config import keys, numeric_keys
from wavelet_jax.data import Windows, tokenizers
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate
from wavelet_jax.hardware import memory
from wavelet_jax.model import decoder
from wavelet_jax.parallel import sharding
from wavelet_jax.positions import rope, transformer_xl
from wavelet_jax.runs import directory
from wavelet_jax.training import checks, optimizer, plan, sizes, steps
from wavelet_jax.wavelets import continuous

VALUES = ("-1", "0", "1000000000", "nan", "inf", "word")

# Parts of the lines that refuse a value, in which {key} and {value} stand for those.
LEAST_0 = "{key} must be at least 0, not {value}"
LEAST_1 = "{key} must be at least 1, not {value}"
FINITE = "{key} must be at least 0 and finite, not inf"
FRACTION = "{key} must be at least 0 and below 1, not {value}"
TOO_LARGE = "this run needs at least"  # memory
NO_INT = "{key}={value}: it takes a whole number"
NO_FLOAT = "{key}={value}: it takes a number"
# NaN, infinity and a word for a whole number.
NOT_WHOLE = (NO_INT, NO_INT, NO_INT)

POSITIVE = (LEAST_1, LEAST_1, None, *NOT_WHOLE)
NOT_NEGATIVE = (LEAST_0, None, None, *NOT_WHOLE)
SIZE = (LEAST_1, LEAST_1, TOO_LARGE, *NOT_WHOLE)
HEADS = (LEAST_1, LEAST_1, "{key} must be at least 1 and at most 1048576, not {value}", *NOT_WHOLE)
AMOUNT = (LEAST_0, None, None, LEAST_0, FINITE, NO_FLOAT)
BELOW_1 = (FRACTION, None, FRACTION, FRACTION, FRACTION, NO_FLOAT)
MANY_DEVICES = "devices; there are 1"

EXPECTED = {
    # 0 is refused by `load_corpus` where there is no validation text; see tests/test_data.py.
    "data.validation_fraction": (
        *(LEAST_0, None, "{key} must be at least 0 and at most 1, not {value}", LEAST_0),
        *(FINITE, NO_FLOAT),
    ),
    "data.vocab_size": NOT_NEGATIVE,
    "data.seed": NOT_NEGATIVE,
    "data.threads": (LEAST_1, LEAST_1, "{key} must be at least 1 and at most 1024, not {value}", *NOT_WHOLE),
    "data.prefetch": (LEAST_0, None, "{key} must be at least 0 and at most 1024, not {value}", *NOT_WHOLE),
    "model.num_layers": (LEAST_1, LEAST_1, "{key} must be at least 1 and at most 10000, not {value}", *NOT_WHOLE),
    "model.d_model": SIZE,
    "model.num_heads": HEADS,
    "model.num_kv_heads": HEADS,
    "model.head_dim": HEADS,
    "model.d_ff": SIZE,
    "model.cutoffs": (
        *("each of {key} must be at least 1, not {value}", "each of {key} must be at least 1, not {value}", None),
        *("each of {key} must be a whole number, not '{value}'",) * 3,
    ),
    "model.adaptive_factor": POSITIVE,  # 10^9 is refused where the vocabulary is adaptive; see `IN_SOME`
    "model.adaptive_dropout": BELOW_1,
    "model.dropout": BELOW_1,
    "model.attention_dropout": BELOW_1,
    "model.activation_dropout": BELOW_1,
    "position.num_scales": (
        *("num_scales must be at least 1, not -1", "num_scales must be at least 1, not 0"),
        *("num_scales must be at least 1 and at most 1048576, not {value}", *NOT_WHOLE),
    ),
    "position.first_exponent": (
        *(None, None, "first_exponent must be at least -60 and at most 127, not {value}", *NOT_WHOLE),
    ),
    "position.scales": ("must both be [head_dim]",) * 5 + ("scales must be numbers",),  # of one number
    "position.shifts": ("must both be [head_dim]",) * 5 + ("shifts must be numbers",),
    "position.support_tolerance": (
        *("support_tolerance must be at least 0 and below 1, not -1.0", None),
        *("support_tolerance must be at least 0 and below 1, not {value}",) * 3,
        NO_FLOAT,
    ),
    "position.num_levels": (
        *("num_levels must be at least 1, not -1", "num_levels must be at least 1, not 0"),
        *("num_levels must be at least 1 and at most 1048576, not {value}", *NOT_WHOLE),
    ),
    "position.first_level": (
        *("first_level must be at least 0, not -1", "sampling 'level' has levels 1 to 12, not 0"),
        *("first_level must be at least 0 and at most 12, not {value}", *NOT_WHOLE),
    ),
    "position.theta": (
        *("theta must be at least 1, not -1.0", "theta must be at least 1, not 0.0", None),
        *("theta must be at least 1, not nan", "theta must be at least 1 and finite, not inf", NO_FLOAT),
    ),
    "position.clip_distance": (
        *("clip_distance must be at least 1, not -1", "clip_distance must be at least 1, not 0"),
        *(TOO_LARGE, *NOT_WHOLE),
    ),
    "position.num_buckets": (
        *("num_buckets must be at least 1, not -1", "num_buckets must be at least 1, not 0"),
        *("max_distance 128 must be past the 500000000 distances", *NOT_WHOLE),
    ),
    "position.max_distance": (
        *("max_distance must be at least 1, not -1", "max_distance must be at least 1, not 0", None, *NOT_WHOLE),
    ),
    "position.max_positions": (
        *("max_positions must be at least 1, not -1", "max_positions must be at least 1, not 0"),
        *(TOO_LARGE, *NOT_WHOLE),
    ),
    "train.steps": POSITIVE,
    "train.model_seed": NOT_NEGATIVE,
    "train.length": SIZE,
    "train.batch_size": SIZE,
    "train.accumulation": (LEAST_1, LEAST_1, "must be a multiple of 1000000000: {key}", *NOT_WHOLE),
    "train.logits_chunk": NOT_NEGATIVE,
    "train.skip_nonfinite": NOT_NEGATIVE,
    "optimizer.learning_rate": AMOUNT,
    "optimizer.warmup_steps": (LEAST_0, None, "must be past {key} {value}", *NOT_WHOLE),
    "optimizer.warmup_start": AMOUNT,
    "optimizer.decay_steps": (LEAST_0, "must be past optimizer.warmup_steps", None, *NOT_WHOLE),
    "optimizer.final_fraction": AMOUNT,
    "optimizer.b1": BELOW_1,
    "optimizer.b2": BELOW_1,
    "optimizer.eps": AMOUNT,
    "optimizer.weight_decay": AMOUNT,
    "optimizer.momentum": BELOW_1,
    "optimizer.clip_norm": AMOUNT,
    "log.every": POSITIVE,
    "log.slow_update": AMOUNT,
    "log.slow_seconds": AMOUNT,
    "checkpoint.every": POSITIVE,
    "checkpoint.keep": POSITIVE,
    "checkpoint.timeout": POSITIVE,
    "eval.every": NOT_NEGATIVE,
    "eval.windows": POSITIVE,
    "eval.max_tokens": NOT_NEGATIVE,
    "eval.sequences": NOT_NEGATIVE,  # more than the text has are refused when it has been read
    "eval.sequence_seed": NOT_NEGATIVE,
    "eval.batch_tokens": POSITIVE,
    "eval.prefill_chunk": NOT_NEGATIVE,
    "eval.resamples": (LEAST_1, LEAST_1, "{key} must be at least 1 and at most 1000000, not {value}", *NOT_WHOLE),
    "eval.bootstrap_seed": NOT_NEGATIVE,
    "mesh.data": (None, "mesh sizes must be positive", MANY_DEVICES, *NOT_WHOLE),
    "mesh.fsdp": ("with -1 at most once", "mesh sizes must be positive", MANY_DEVICES, *NOT_WHOLE),
    "mesh.context": ("with -1 at most once", "mesh sizes must be positive", MANY_DEVICES, *NOT_WHOLE),
    "mesh.tensor": ("with -1 at most once", "mesh sizes must be positive", MANY_DEVICES, *NOT_WHOLE),
    "compare.lengths": (
        *("each of {key} must be at least 1, not {value}", "each of {key} must be at least 1, not {value}", None),
        *("each of {key} must be a whole number, not '{value}'",) * 3,
    ),
}
# A method that reads the option, where the default, the wavelet, does not.
READ_BY = {
    **dict.fromkeys(("position.num_levels", "position.first_level"), "discrete_wavelet"),
    "position.theta": "rope",
    "position.clip_distance": "shaw",
    **dict.fromkeys(("position.num_buckets", "position.max_distance"), "t5"),
    "position.max_positions": "learned",
}
# Where another config says otherwise, by the reason: which configs, and {(key, value): whether it is refused}.
IN_SOME = (
    (
        lambda config: config.optimizer.schedule == "constant",
        {("optimizer.warmup_steps", "1000000000"): False, ("optimizer.decay_steps", "0"): False},
    ),
    (
        lambda config: config.model.vocabulary == "adaptive",
        {("model.adaptive_factor", "1000000000"): True, ("model.cutoffs", "1000000000"): True},
    ),
    (lambda config: config.mesh.data != -1, {(f"mesh.{axis}", "-1"): True for axis in ("data", "fsdp", "context")}),
    (lambda config: config.mesh.tensor == -1, {("mesh.tensor", "-1"): False}),
)
CONFIGS = {
    **{name: importlib.import_module(f"configs.{name}") for name in ("default", "smoke", "quickstart", "wikitext2")},
    **{"table1": table1, "table3": table3, "table4": table4, "llama2": llama2},
}
VARIANTS = [
    *(("default", "wavelet"), ("smoke", "wavelet"), ("quickstart", "wavelet"), ("wikitext2", "wavelet")),
    *(("table1", "wavelet_ricker"), ("table1", "small_wavelet_ricker"), ("table1", "nope_1024")),
    *(
        ("table3", "ricker_2^0..2^7"),
        ("table3", "small_ricker_2^0..2^3"),
        ("table4", "rbio1.1"),
        ("table4", "small_db2"),
    ),
    *(("llama2", "wavelet"), ("llama2", "1b_wavelet"), ("llama2", "10m_wavelet"), ("llama2", "small_wavelet")),
]


@pytest.fixture(autouse=True)
def a_machine(monkeypatch):
    """What is too large does not depend on the machine that runs the tests."""
    monkeypatch.setattr(memory, "available", lambda: (2**38, "this machine"))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numeric_keys_of(config: ConfigDict) -> set[str]:
    """Keys that hold a number, or several: every tuple of a config does, but compare.variants.

    The version of a config is not the user's to set; evaluators are in test_evaluators.py.
    """
    return {
        key
        for key, value in keys.json_values(config).items()
        if key not in ("compare.variants", "config_version")
        and not key.startswith("evaluators.")
        and (is_number(value) or isinstance(value, list))
    }


def refuse(config: ConfigDict) -> None:
    """All that train.py does before it looks at the text."""
    checks.check(config)
    sizes.check(config)
    sharding.check_batch(config, sharding.make_mesh(config))


def is_refused(config: ConfigDict) -> bool:
    try:
        refuse(config)
    except UserError:
        return True
    return False


def parsed(monkeypatch, *arguments: str, method: str = "wavelet") -> ConfigDict:
    """The config of a command line, parsed as the commands do it."""
    values = flags.FlagValues()
    argv = ["train.py", f"--config={ROOT}/configs/default.py:{method}", *arguments]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    monkeypatch.setattr(flags, "FLAGS", values)
    cli._parse(argv)
    return values.config


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_table_has_every_numeric_key_of_every_config(name, variant):
    config = CONFIGS[name].get_config(variant)
    assert numeric_keys_of(config) == {key for key in EXPECTED if key in keys.flatten(config)}


def test_the_table_has_no_other_keys():
    by_method = (keys.flatten(default.get_config(method)) for method in positions.METHODS)
    assert set(EXPECTED) <= set().union(*by_method)


def test_every_file_of_configs_is_tried():
    stems = {path.stem for path in (ROOT / "configs").rglob("*.py")}
    assert stems == set(CONFIGS) == {name for name, _ in VARIANTS}


def test_every_numeric_key_has_a_range_or_is_checked_by_a_method():
    options = {f"position.{option}" for name in positions.METHODS for option in positions.options(name)}
    stated = {key for key in (*numeric_keys.RANGES, *numeric_keys.EACH) if "*" not in key}
    assert stated | {key for key in EXPECTED if key in options} == set(EXPECTED)


@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections calls it
@pytest.mark.parametrize("key", EXPECTED)
def test_what_is_accepted_and_what_is_refused_with_which_line(key, monkeypatch):
    kind = type(keys.json_values(default.get_config(READ_BY.get(key, "wavelet")))[key])
    for value, expected in zip(VALUES, EXPECTED[key], strict=True):
        given = f"({value},)" if kind is list and value not in ("nan", "inf", "word") else value
        try:
            config = parsed(monkeypatch, f"--config.{key}={given}", method=READ_BY.get(key, "wavelet"))
            refuse(config)
        except UserError as error:
            said = str(error)
            assert "\n" not in said
            shown = value if kind is not float or value in ("nan", "inf", "word") else f"{float(value)}"
            assert expected is not None, (value, said)
            assert expected.format(key=key, value=shown) in said, value
        else:
            assert expected is None, f"{key}={value} was accepted"


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_other_configs_refuse_the_same(name, variant):
    config = CONFIGS[name].get_config(variant)
    refuse(config)
    for key, expected in EXPECTED.items():
        if key not in keys.flatten(config):
            continue
        section, option = key.split(".")
        kept = config[section][option]
        for value, refused in zip(VALUES, expected, strict=True):
            refused = refused is not None
            for holds, others in IN_SOME:
                if holds(config):
                    refused = others.get((key, value), refused)
            if (isinstance(kept, int) and value in ("nan", "inf", "word")) or value == "word":
                continue  # what a config's types refuse, whatever the config
            number = float(value) if isinstance(kept, float) or value in ("nan", "inf") else int(value)
            config[section][option] = (number,) if isinstance(kept, tuple) else number
            assert is_refused(config) == refused, (key, value)
        with config.ignore_type():
            config[section][option] = kept
    refuse(config)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.steps", math.nan, "train.steps must be a whole number, not nan"),
        ("train.steps", 2.0, "train.steps must be a whole number, not 2.0"),
        ("train.steps", True, "train.steps must be a whole number, not True"),
        ("train.steps", None, "train.steps must be a whole number, not None"),
        ("eval.resamples", "word", "eval.resamples must be a whole number, not 'word'"),
        ("optimizer.eps", [1.0], "optimizer.eps must be a number, not [1.0]"),
        ("compare.lengths", 5, "compare.lengths must be numbers in brackets, such as (128, 256), not 5"),
    ],
)
def test_a_saved_config_may_hold_anything(key, value, said):
    """config.json can be edited, and JSON knows NaN: kinds are checked, not only what flags let through."""
    config = default.get_config()
    section, option = key.split(".")
    with config.ignore_type(), config.unlocked():
        config[section][option] = value
    with pytest.raises(UserError) as raised:
        numeric_keys.check(config)
    assert str(raised.value) == said


def test_sections_are_checked_alone():
    config = default.get_config()
    config.train.steps = 0
    config.compare.lengths = (0,)
    numeric_keys.check(config, "eval", "model")
    with pytest.raises(UserError, match=r"^train\.steps must be at least 1, not 0$"):
        numeric_keys.check(config)
    with pytest.raises(UserError, match=r"^each of compare\.lengths must be at least 1, not 0$"):
        numeric_keys.check(config, "compare")


# Numbers at the edge of their type


@pytest.mark.parametrize("key", ["train.steps", "eval.max_tokens", "checkpoint.timeout", "optimizer.warmup_steps"])
def test_counts_are_int32(key):
    config = default.get_config()
    config.optimizer.schedule = "constant"
    config.update_from_flattened_dict({key: 2**31 - 1})
    checks.check(config)
    config.update_from_flattened_dict({key: 2**31})
    with pytest.raises(UserError, match=rf"{key} must be at least . and at most 2147483647, not 2147483648"):
        checks.check(config)


def test_what_float32_rounds_to_the_bound_is_past_it():
    """Adam's 1 - b1^t would be 0 in float32, and the first update NaN; 1e39 is infinite there."""
    ranges.FRACTION.check("b1", 1 - 2**-24)  # the last float32 below 1
    for value in (1 - 2**-26, 1.0):
        with pytest.raises(UserError, match="b1 must be at least 0 and below 1, not"):
            ranges.FRACTION.check("b1", value)
    with pytest.raises(UserError, match=r"eps must be at least 0 and at most 3\.40282e\+38, not 1e\+39"):
        ranges.AMOUNT.check("eps", 1e39)
    with pytest.raises(UserError, match="share must be above 0 and below 1, not 0"):
        ranges.Range(0, 1, above=True, below=True).check("share", 0)


# Position methods made without a config


@pytest.mark.parametrize("name", positions.METHODS)
@pytest.mark.parametrize("value", [-1, 0, 10**9, math.nan, math.inf, "word", 2.0, None, True])
def test_methods_refuse_heads_that_are_none(name, value):
    for option in ("num_heads", "head_dim"):
        with pytest.raises(UserError, match=f"^{name}'s {option} must be"):
            positions.make(name, **{"num_heads": 2, "head_dim": 16, option: value})


@pytest.mark.parametrize("name", positions.METHODS)
def test_methods_refuse_numbers_that_are_none(name):
    """Every numeric option of every method, so that none can be added without its range."""
    for option, default_value in positions.options(name).items():
        if not is_number(default_value):
            continue
        for value in (-100, math.nan, math.inf, 10**10, 10**400, "word", None):
            if (option, value) == ("theta", 10**10):
                continue  # a base as good as any
            with pytest.raises(UserError, match=rf"^{name}'s {option} must be"):
                positions.make(name, num_heads=2, head_dim=16, **{option: value})


@pytest.mark.parametrize("name", ["rope", "sinusoidal", "transformer_xl"])
def test_theta_is_checked_wherever_it_is_read(name):
    for theta in (0.99, 0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match=rf"^{name}'s theta must be at least 1"):
            positions.make(name, num_heads=2, head_dim=16, theta=theta)
    assert positions.make(name, num_heads=2, head_dim=16, theta=1).theta == 1


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 10**400])
def test_functions_behind_the_methods_refuse_the_same(value):
    with pytest.raises(UserError, match=r"^theta must be at least 1"):
        rope.rotate(np.ones((1, 4, 1, 8), np.float32), np.arange(4), theta=value)
    with pytest.raises(UserError, match=r"^theta must be at least 1"):
        transformer_xl.sinusoid(np.arange(4), 8, theta=value)
    with pytest.raises(UserError, match=r"^the tolerance of a support must be at least 0 and below 1"):
        continuous.support(np.ones(4), np.zeros(4), tolerance=value)
    assert continuous.support(np.ones(4), np.zeros(4), tolerance=0) is None


def test_t5_at_the_longest_distance_there_is():
    method = positions.make("t5", num_heads=2, head_dim=16, max_distance=2**31 - 1)
    bias = method.terms(method.init(jax.random.key(0))).bias(np.int32([0, 1, 2**31 - 1]))
    assert np.isfinite(np.asarray(bias)).all()


def test_a_level_past_int32_is_not_the_level_that_it_wraps_to():
    with pytest.raises(UserError, match=r"first_level must be at least 0 and at most 12, not 4294967297"):
        positions.make("discrete_wavelet", num_heads=2, head_dim=16, first_level=2**32 + 1)


# Seeds


@pytest.mark.parametrize("key", [key for key in EXPECTED if key.endswith("seed")])
@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 10**30])
def test_seeds_of_more_than_32_bits_are_refused(key, seed):
    config = default.get_config()
    config.update_from_flattened_dict({key: 2**32 - 1})
    checks.check(config)
    config.update_from_flattened_dict({key: seed})
    with pytest.raises(UserError, match=rf"^{key} must be at least 0( and at most 4294967295)?, not {seed}$"):
        checks.check(config)


def test_no_two_seeds_share_parameters_dropout_or_windows():
    """Seeds equal modulo 2^32 would: the ones that JAX cannot tell apart are refused wherever a seed is used."""
    config = default.get_config()
    seeds = (0, 1, 2**31, 2**32 - 1)
    keys = []
    for config.train.model_seed in seeds:
        keys.append(tuple(np.asarray(jax.random.key_data(steps.seed_key(config))).tolist()))
    assert len(set(keys)) == len(seeds)
    tokens = np.arange(1000, dtype=np.uint16)
    wide = (*seeds, 2**32, 2**32 + 1, 2**63 - 1)  # the order of windows takes more than JAX does
    orders = {Windows(tokens, 10, seed).batch(0, 50).tobytes() for seed in wide}
    assert len(orders) == len(wide)
    for seed in (-1, 2**63, math.nan):
        with pytest.raises(UserError, match=r"config\.data\.seed, must be"):
            Windows(tokens, 10, seed)
    for seed in (2**32, 2**32 + 1, -1):
        config.train.model_seed = seed
        with pytest.raises(UserError, match=r"train\.model_seed must be"):
            steps.seed_key(config)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
def test_what_a_seed_draws_is_as_it_always_was(seed):
    """The keys of `nnx.Rngs(seed)`, of which the decoder draws one for each array, and `jax.random.key(seed)`."""
    config = default.get_config()
    config.train.model_seed = seed
    key = steps.seed_key(config)
    assert key == jax.random.key(seed)
    ours, before = nnx.Rngs(key), nnx.Rngs(seed)
    for _ in range(3):
        assert ours.params() == before.params()


# Memory


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
@pytest.mark.parametrize("method", [None, "transformer_xl", "shaw", "learned"])
def test_parameters_are_counted_as_they_are_made(name, variant, method):
    config = CONFIGS[name].get_config(variant)
    config.model.num_layers = 2  # shapes of many layers take long
    if method:
        config.position = ConfigDict(positions.config(method))
    for config.model.use_bias, config.model.final_norm in ((False, True), (True, False)):
        shapes = nnx.eval_shape(lambda: decoder.Decoder(config, 70_000, rngs=nnx.Rngs(0)))
        count = steps.count_parameters(nnx.to_pure_dict(nnx.state(shapes)))
        assert sum(sizes.parameters(config, 70_000).values()) == count


@pytest.mark.parametrize("optimizer", optimizer.OPTIMIZERS)
def test_the_state_is_counted_as_it_is_made(small_config, optimizer):
    config = small_config()
    config.optimizer.name = optimizer
    _, abstract_state = steps.shapes(config, 257, sharding.make_mesh(config))
    made = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))
    counted = 4 * sizes._COPIES[optimizer] * sum(sizes.parameters(config, 257).values())
    assert counted <= made <= counted + 100  # counters and learning rates


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"model.d_ff": 10**9}, r"most of the parameters are those of the feed-forward layers \(model.num_layers"),
        ({"model.d_model": 10**9}, r"most of the parameters are those of the feed-forward layers"),
        ({"model.num_heads": 2**20}, r"most of the parameters are those of attention"),
        ({"train.length": 10**9}, r"a batch is 32 x 1,000,000,000 tokens \(train.batch_size, length, accumulation\)"),
    ],
)
def test_what_cannot_fit_is_refused_in_one_line_that_says_what_it_takes(changes, most):
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    pattern = (
        r"^this run needs at least .* GiB of memory: .* for .* parameters and the optimizer's state, .* for tokens "
    )
    with pytest.raises(UserError, match=rf"{pattern}.*; this machine has 256\.0 GiB; {most}"):
        sizes.check(config)


def test_a_table_of_positions_that_cannot_fit_is_refused():
    config = default.get_config("learned")
    config.position.max_positions = 10**9
    with pytest.raises(UserError, match=r"most of the parameters are those of positions \(learned's options\)"):
        sizes.check(config)


def test_the_vocabulary_of_the_text_counts_when_it_is_known(small_config, monkeypatch):
    """Before anything is allocated: the machine here has less than the state."""
    config = small_config()
    needed = 4 * 3 * sum(sizes.parameters(config, 10**6).values())
    monkeypatch.setattr(memory, "available", lambda: (needed, "this machine"))
    sizes.check(config)
    with pytest.raises(UserError, match=r"most of the parameters are those of the vocabulary \(model\.d_model\)"):
        steps.init(config, 10**6, sharding.make_mesh(config))


def test_what_fits_is_never_refused(monkeypatch):
    """The bound is below what the compiler says of the same run, and processes add their memories."""
    config = smoke.get_config("nope")
    config.model.num_layers = 1
    usage = plan.compiled(config, 257, sharding.make_mesh(config))
    monkeypatch.setattr(memory, "available", lambda: (usage.total, "this machine"))
    sizes.check(config, 257)
    monkeypatch.setattr(memory, "available", lambda: (usage.parameters, "this machine"))
    with pytest.raises(UserError, match="this machine has"):
        sizes.check(config, 257)
    monkeypatch.setattr(jax, "process_count", lambda: 8)
    sizes.check(config, 257)


# Flags of the commands that are numbers


@pytest.mark.parametrize(
    ("tokenizer", "size", "said"),
    [
        ("word", 1, "a word vocabulary needs 2 or more"),
        ("word", 10**9, None),  # all words
        ("bpe", 0, "bpe needs a size to train, 257 (all bytes and the end of a document) to 10,000,000"),
        ("bpe", 10**9, "bpe needs a size to train"),  # the library would abort the process
        ("bpe", 10**7, None),
        ("byte", 10**9, None),  # which has 257
    ],
)
def test_sizes_of_vocabularies(tokenizer, size, said):
    config = default.get_config()
    config.data.update(tokenizer=tokenizer, vocab_size=size)
    if said is None:
        assert tokenizers.specification(config)
    else:
        with pytest.raises(UserError) as raised:
            tokenizers.specification(config)
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("lengths", "stride", "said"),
    [
        ([-1], 0, "lengths must be positive whole numbers: -1"),
        ([0], 0, "lengths must be positive whole numbers: 0"),
        ([math.nan], 0, "lengths must be positive whole numbers: nan"),
        ([math.inf], 0, "lengths must be positive whole numbers: inf"),
        (["word"], 0, "lengths must be positive whole numbers: word"),
        ([10**9], 0, "length 1000000000 is longer than the validation text"),
        ([64], -1, "stride -1 must be 1 to the shortest length, 64"),
        ([64], 10**9, "stride 1000000000 must be 1 to the shortest length, 64"),
    ],
)
def test_lengths_and_strides_of_an_evaluation(small_config, tmp_path, lengths, stride, said):
    with pytest.raises(UserError) as raised:
        evaluate.check([small_config()], [tmp_path], lengths=lengths, protocol="sliding_window", stride=stride)
    assert said in str(raised.value)


@pytest.mark.parametrize("key", ["max_tokens", "batch_tokens", "prefill_chunk", "sequences", "sequence_seed"])
def test_what_eval_py_changes_of_a_run_is_held_to_the_same_table(small_config, tmp_path, key):
    """Flags are whole numbers for absl; what it lets through goes into the run's config."""
    expected = EXPECTED[f"eval.{key}"]
    for value, said in zip((-1, 0, 2**63), (*expected[:2], "{key} must be at least"), strict=True):
        config = small_config()
        config.eval.update({key: value})
        if said is None:
            evaluate.check([config], [tmp_path], lengths=[64], protocol="full_length")
        else:
            with pytest.raises(UserError) as raised:
                evaluate.check([config], [tmp_path], lengths=[64], protocol="full_length")
            assert said.format(key=f"eval.{key}", value=value) in str(raised.value)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        *((("length", value, f"--length must be at least 2, not {value}")) for value in (-1, 0, 1, math.nan)),
        ("length", 10**9, "length 1000000000 is longer than the validation text"),
        ("texts", -1, "--texts must be at least 0, not -1"),
        *((("pixels", value, f"--pixels must be at least 16, not {value}")) for value in (-1, 0)),
        *(("thresholds", [value], f"--threshold {value:g} must be a probability") for value in (-1, 0, 1e9)),
        *(("thresholds", [value], f"--threshold {value:g} must be a probability") for value in (math.nan, math.inf)),
        *(("layers", [value], f"--layers {value}: allowed are 0 to 1") for value in (-1, 10**9)),
        *(("heads", [value], f"--heads {value}: allowed are 0 to 1") for value in (-1, 10**9)),
        # Accepted, up to what comes next.
        *((flag, 10**9, "has no checkpoint to look into") for flag in ("texts", "pixels")),
        *((flag, [0], "has no checkpoint to look into") for flag in ("layers", "heads")),
        ("texts", 0, "has no checkpoint to look into"),
    ],
)
def test_numbers_of_an_analysis(small_config, tmp_path, flag, value, said):
    directory.save_config(tmp_path / "run", small_config())
    given = {"length": 64, "layers": None, "heads": None, "thresholds": [0.001], "texts": 2, "pixels": 64}
    with pytest.raises(UserError) as raised:
        report.analyse([tmp_path / "run"], labels=False, out=tmp_path / "out", **given | {flag: value})
    assert said in str(raised.value)


def test_more_texts_than_there_are_are_all_of_them():
    """In no more memory than those take."""
    assert receptive_field.texts(1000, 100, 10**9) == list(range(900))
    assert receptive_field.texts(1000, 100, 3) == [0, 449, 899]


def test_benchmarks_take_counts():
    for value in (0, -1, math.nan, "word"):
        with pytest.raises(UserError, match=r"^--rounds must be"):
            directory.check_least({"--rounds": (value, 1)})
    directory.check_least({"--rounds": (10**9, 1)})
