"""Evaluators: their periods, their windows, and what a wrong section is answered with."""

import re

import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from wavelet_jax.data import Windows, load_corpus
from wavelet_jax.errors import UserError
from wavelet_jax.parallel import sharding
from wavelet_jax.runs.metrics import read_metrics
from wavelet_jax.training import checks, evaluators, loop, steps


@pytest.fixture
def config(small_config):
    config = small_config("rope")
    config.model.num_layers = 1
    config.train.update(steps=7, batch_size=4)
    config.log.every, config.eval.every, config.eval.windows = 100, 3, 5
    return config


def test_each_has_its_own_period_and_length(config, tmp_path):
    config.evaluators.long = ConfigDict({"type": "loss", "every": 2, "windows": 3, "length": 96})
    config.evaluators.off = ConfigDict({"type": "loss", "every": 0, "windows": 3, "length": 96})
    loop.train(config, tmp_path / "run")
    lines = {line["step"]: {key for key in line if key.endswith("_loss")} for line in read_metrics(tmp_path / "run")}
    both = {"validation_loss", "long_loss"}
    assert lines == {2: {"long_loss"}, 3: {"validation_loss"}, 4: {"long_loss"}, 6: both, 7: both}


def test_the_loss_is_that_of_the_first_windows(config):
    """Five windows of a validation text in batches of four, against the losses of each window by itself."""
    corpus, mesh = load_corpus(config), sharding.make_mesh(config)
    graphdef, state, _ = steps.init(config, corpus.tokenizer.vocab_size, mesh)
    made = evaluators.make(config, corpus, graphdef, mesh)
    windows = Windows(corpus.validation, config.train.length, seed=0)
    model = nnx.merge(graphdef, state.params)
    losses = []
    for number in range(5):
        tokens = windows.batch(number, 1)
        logits = np.asarray(model(tokens[:, :-1]), np.float64)
        peak = logits.max(-1, keepdims=True)
        total = peak[..., 0] + np.log(np.exp(logits - peak).sum(-1))
        losses.append(total - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0])
    (loss,) = made["validation"].run(state.params).values()
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"type": "los"}, "unknown evaluators.mine.type 'los': did you mean 'loss'? allowed are loss"),
        ({"every": 3}, "evaluators.mine must be a section with a type, one of loss"),
        ({"type": "loss", "window": 3}, "unknown key of evaluators.mine 'window': did you mean 'windows'? allowed are"),
        ({"type": "loss", "every": 3}, "evaluators.mine has no windows, length: an evaluator of type loss needs them"),
        ({"every": -1}, "evaluators.mine.every must be at least 0, not -1"),
        ({"every": 1.5}, "evaluators.mine.every must be a whole number, not 1.5"),
        ({"windows": 0}, "evaluators.mine.windows must be at least 1, not 0"),
        ({"length": float("nan")}, "evaluators.mine.length must be a whole number, not nan"),
        (3, "evaluators.mine must be a section with a type"),
    ],
)
def test_a_wrong_section_is_one_line(config, section, said):
    whole = {"type": "loss", "every": 2, "windows": 3, "length": 96}
    if isinstance(section, dict):
        kept = {} if "type" in section or section == {"every": 3} else whole
        section = ConfigDict(kept | section)
    config.evaluators.mine = section
    with pytest.raises(UserError, match=re.escape(said)):
        checks.check(config)


def test_a_text_that_is_too_short_is_refused_before_anything_is_written(config, tmp_path):
    config.evaluators.long = ConfigDict({"type": "loss", "every": 2, "windows": 3, "length": 10**6})
    with pytest.raises(UserError, match="a window of 1000000 needs 1000001"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
