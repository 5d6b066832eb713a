"""Protocols, scoring, intervals and what evaluation writes."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.compilation import quick_jit
from support.results import curves_and_stamp

from configs import default
from wavelet_jax.data import load_corpus
from wavelet_jax.data.corpus import in_validation
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate, protocols, scored_text
from wavelet_jax.evaluation.protocols import Block, plan_blocks
from wavelet_jax.figures import extrapolation, style
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import checkpoint, directory
from wavelet_jax.training import steps


def test_full_length_blocks():
    blocks = plan_blocks(10, 4, "full_length", stride=4, train_length=2)
    assert blocks == [Block(0, 0, 4), Block(4, 4, 8), Block(8, 8, 10)]


def test_non_overlapping_blocks_are_of_the_training_length():
    blocks = plan_blocks(10, 5, "non_overlapping", stride=2, train_length=2)
    assert [(block.start, block.stop) for block in blocks] == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10)]
    assert plan_blocks(8, 2, "non_overlapping", stride=2, train_length=4) == plan_blocks(
        8, 2, "full_length", stride=2, train_length=4
    )


def test_sliding_window_scores_new_tokens_only():
    blocks = plan_blocks(10, 4, "sliding_window", stride=2, train_length=2)
    assert blocks == [Block(0, 0, 2), Block(0, 2, 4), Block(2, 4, 6), Block(4, 6, 8), Block(6, 8, 10)]


@given(
    num_targets=st.integers(1, 200),
    length=st.integers(1, 50),
    stride_of=st.floats(0, 1),
    train_length=st.integers(1, 60),
    protocol=st.sampled_from(protocols.PROTOCOLS),
)
def test_every_target_is_scored_once_with_no_more_context_than_the_protocol_gives(
    num_targets, length, stride_of, train_length, protocol
):
    stride = 1 + round(stride_of * (length - 1))
    blocks = plan_blocks(num_targets, length, protocol, stride=stride, train_length=train_length)
    scored = [target for block in blocks for target in range(block.first_scored, block.stop)]
    assert scored == list(range(num_targets))
    longest = min(length, train_length) if protocol == "non_overlapping" else length
    assert all(0 <= block.start <= block.first_scored and block.stop - block.start <= longest for block in blocks)
    if protocol == "sliding_window":  # all the context that fits
        assert all(block.start == max(0, block.stop - length) for block in blocks)


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS)
@pytest.mark.parametrize("batch_tokens", [1, 12, 1000])
def test_losses_land_on_their_targets(protocol, batch_tokens):
    tokens = np.arange(1000, 1024)
    seen = []

    def losses_of(batch):  # the "loss" tells the target and the context it was scored with
        seen.append(batch.shape)
        return 2 * batch[:, 1:] + np.arange(batch.shape[1] - 1) / 100

    blocks = plan_blocks(23, 6, protocol, stride=4, train_length=5)
    losses, positions = protocols.score(losses_of, tokens, blocks, batch_tokens=batch_tokens)
    place = [i - block.start for block in blocks for i in range(block.first_scored, block.stop)]
    np.testing.assert_array_equal(positions, place)
    np.testing.assert_allclose(losses, 2 * tokens[1:] + np.array(place) / 100, rtol=1e-6)
    assert len(set(seen)) == 1  # one shape, one compilation


def test_bootstrap_interval():
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 1.0, 40_000).astype(np.float32)
    low, high = protocols.bootstrap_interval(losses, 100, resamples=2000, seed=0)
    # Of independent losses the mean's standard error is 1 / sqrt(40,000) = 0.005.
    assert low < losses.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.005, rel=0.15)
    assert (low, high) == protocols.bootstrap_interval(losses, 100, resamples=2000, seed=0)
    # Losses that agree within stretches of 100 carry a hundredth of the information.
    dependent = np.repeat(losses[:400], 100)
    wide = protocols.bootstrap_interval(dependent, 100, resamples=2000, seed=0)
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_what_is_written(tmp_path):
    curves, stamp = curves_and_stamp()
    evaluate.write(curves, stamp, tmp_path / "new" / "folder")
    with (tmp_path / "new" / "folder" / "extrapolation.csv").open() as file:
        rows = list(csv.DictReader(file))
    header = "method,protocol,train_length,length,stride,tokens_scored,loss,perplexity,ci_low,ci_high"
    assert ",".join(rows[0]) == header
    assert [(row["method"], row["length"]) for row in rows] == [
        ("wavelet", "64"),
        ("wavelet", "256"),
        ("rope", "64"),
        ("rope", "256"),
    ]
    for row, curve in zip(rows, curves, strict=True):
        assert float(row["loss"]) == pytest.approx(curve.losses.mean(dtype=np.float64))
        assert float(row["perplexity"]) == pytest.approx(np.exp(float(row["loss"])))
        assert float(row["ci_low"]) == pytest.approx(np.e)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(evaluate.WRITTEN)


def test_figures_show_their_curves(tmp_path):
    from matplotlib import image

    curves, stamp = curves_and_stamp()
    for draw in (extrapolation.extrapolation, extrapolation.loss_by_position):
        draw(curves, stamp, tmp_path / "a.png")
        picture = image.imread(tmp_path / "a.png")[..., :3]
        assert picture.shape[0] > 400
        assert picture.shape[1] > 600
        coloured = np.ptp(picture, axis=-1) > 0.3  # the lines; axes and text are grey
        assert coloured.sum() > 500


@pytest.fixture
def lines_of(monkeypatch, tmp_path):
    """`lines_of(draw, curves, stamp)`: the points of every line that is drawn, by its label."""

    def lines_of(draw, curves, stamp) -> dict[str, list]:
        figures = []
        monkeypatch.setattr(style, "save", lambda figure, path, note: figures.append(figure))
        draw(curves, stamp, tmp_path / "a.png")
        return {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].get_lines()}

    return lines_of


def test_loss_by_position_draws_the_mean_loss_of_each_place(lines_of):
    """Of losses that are the logarithm of the place, each line is that logarithm; places one by one are exact."""
    curves, stamp = curves_and_stamp()
    longest = max(curve.length for curve in curves)
    curves = [
        dataclasses.replace(curve, losses=(np.log(curve.positions + 1.0) + i).astype(np.float32))
        for i, curve in enumerate(curves)
    ]
    drawn = lines_of(extrapolation.loss_by_position, curves, stamp)
    for i, curve in enumerate(curves):
        if curve.length == longest:
            x, y = np.transpose(drawn[style.plain(curve.method)])
            assert x[0] == 1
            assert x[-1] > 0.8 * (curve.positions.max() + 1)
            assert (np.diff(x) > 0).all()
            np.testing.assert_allclose(y[:4], np.log([1, 2, 3, 4]) + i, rtol=0, atol=1e-6)
            # A bin spans a factor of 2^(1/4), R = 0.17 of logarithm: its mean is within R^2 / 8 of that of its middle.
            np.testing.assert_allclose(y, np.log(x) + i, rtol=0, atol=5e-3)


def test_a_figure_draws_the_numbers_of_its_table(lines_of):
    curves, stamp = curves_and_stamp()
    drawn = lines_of(extrapolation.extrapolation, curves, stamp)
    for method in {curve.method for curve in curves}:
        rows = [curve.row() for curve in curves if curve.method == method]
        assert drawn[style.plain(method)] == [[row["length"], row["perplexity"]] for row in rows]


def test_table_has_every_number():
    curves, stamp = curves_and_stamp()
    table = evaluate.table(curves, stamp)
    for curve in curves:
        assert f"{curve.row()['perplexity']:.3f}" in table
    assert "full_length" in table
    assert "1,024 tokens scored" in table
    assert "byte tokenizer" in table


@pytest.mark.parametrize(
    ("available", "limit", "longest", "expected"),
    [(1000, 0, 256, 768), (1000, 600, 256, 512), (1000, 100, 256, 256), (256, 0, 256, 256)],
)
def test_scored_tokens_are_whole_blocks_of_the_longest_length(available, limit, longest, expected):
    config = default.get_config()
    config.eval.max_tokens = limit
    assert evaluate._num_targets(config, available, longest) == expected


def test_runs_of_one_method_are_told_apart():
    configs = [default.get_config(method) for method in ("wavelet", "wavelet", "rope")]
    assert evaluate.labels(configs[1:], [Path("a/wavelet"), Path("a/rope")]) == ["wavelet", "rope"]
    labels = evaluate.labels(configs, [Path("a/wavelet"), Path("b/wavelet"), Path("b/rope")])
    assert labels == ["wavelet (a/wavelet)", "wavelet (b/wavelet)", "rope"]
    configs[0].compare.label = "rope_theta5e5"
    assert evaluate.labels(configs[:2], [Path("a/wavelet"), Path("b/wavelet")]) == ["rope_theta5e5", "wavelet"]


def test_length_past_the_validation_text_is_refused():
    with pytest.raises(UserError, match="length 256 is longer than the validation text, which has 255 tokens to score"):
        evaluate._num_targets(default.get_config(), 255, 256)


# Drawn sequences


def test_drawn_sequences_are_stretches_of_the_stream_and_share_no_token():
    stream = np.arange(1000, 1500)
    text = scored_text.draw(stream, 20, 9, seed=3)
    sequences = text.tokens.reshape(20, 10)
    assert (text.count, text.length, text.num_targets) == (20, 9, 180)
    assert (np.diff(sequences, axis=1) == 1).all()
    assert len(set(text.tokens)) == 200
    assert (np.diff(sequences[:, 0]) > 0).all()
    assert set(text.tokens) <= set(stream)
    assert text.description == "20 sequences of 9 targets, drawn by seed 3 from 50"


def test_drawn_sequences_are_those_of_the_seed():
    stream = np.arange(501)
    firsts = [tuple(scored_text.draw(stream, 10, 9, seed=seed).tokens[::10]) for seed in (0, 0, 1, 2)]
    assert firsts[0] == firsts[1]
    assert len(set(firsts)) == 3
    drawn = np.concatenate([scored_text.draw(stream, 10, 9, seed=seed).tokens[::10] for seed in range(200)])
    assert set(drawn) == set(range(0, 500, 10))  # each of the 50, first and last too
    # Of 2,000 draws each is expected 40 times, give or take a binomial's 5.7: five of them.
    assert np.abs(np.unique(drawn, return_counts=True)[1] - 40).max() < 5 * 5.7
    assert scored_text.draw(stream, 50, 9, seed=0).tokens.tolist() == list(range(500))


def test_draw_is_as_it_always_was():
    """Where this fails, NumPy draws otherwise: figures of drawn sequences no longer compare with older ones."""
    firsts = scored_text.draw(np.arange(501), 10, 9, seed=0).tokens[::10]
    assert (firsts // 10).tolist() == [0, 1, 3, 8, 11, 13, 21, 26, 34, 40]


def test_more_sequences_than_there_are_are_refused():
    message = "has 501 tokens, which hold 50 sequences of 9 targets, and eval.sequences is 51"
    with pytest.raises(UserError, match=message):
        scored_text.draw(np.arange(501), 51, 9, seed=0)


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS)
@pytest.mark.parametrize("length", [3, 5, 12])
def test_sequences_are_scored_each_on_its_own(protocol, length):
    """At every length the same targets, none with context of another sequence, in batches over several of them."""
    text = scored_text.draw(np.arange(100, 400), 7, 12, seed=0)
    sequences = text.tokens.reshape(7, 13)
    first_of = {token: sequence[0] for sequence in sequences for token in sequence}

    def losses_of(batch):  # the target; every token that a row reads must be of its first one's sequence
        for row in batch:
            read = row[: np.count_nonzero(row)]
            assert len({first_of[token] for token in read}) <= 1
        return batch[:, 1:].astype(np.float32)

    blocks = protocols.plan_text(text, length, protocol, stride=2, train_length=4)
    losses, positions = protocols.score(losses_of, text.tokens, blocks, batch_tokens=30)
    np.testing.assert_array_equal(losses, sequences[:, 1:].ravel())
    assert positions.max() == {"non_overlapping": min(length, 4)}.get(protocol, length) - 1


def test_one_sequence_is_the_head_of_the_stream():
    text = scored_text.head(np.arange(100), 24)
    assert text.tokens.tolist() == list(range(25))
    for protocol in protocols.PROTOCOLS:
        options = {"stride": 3, "train_length": 4}
        assert protocols.plan_text(text, 8, protocol, **options) == plan_blocks(24, 8, protocol, **options)


def test_a_run_is_scored_on_sequences_of_another_text(small_config, text_files, tmp_path):
    """The losses are those of the model on the drawn sequences, each in a batch of its own tokens alone."""
    config = small_config("nope")
    config.model.num_layers = 1
    config.data.validation_files = str(text_files / "0*.txt")
    config.data.train_files = str(text_files / "[1-4]*.txt")
    corpus, mesh = load_corpus(config), sharding.make_mesh(config)
    graphdef, shapes = steps.shapes(config, corpus.tokenizer.vocab_size, mesh)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), shapes)
    directory.save_config(tmp_path / "run", config)
    with checkpoint.open_manager(tmp_path / "run", config) as manager:
        checkpoint.save(manager, int(state.step), state, windows=0, fingerprint=corpus.fingerprint)
    other = {"validation_files": str(text_files / "5*.txt")}
    curves = evaluate.evaluate(
        [tmp_path / "run"],
        lengths=[32],
        protocol="full_length",
        out=tmp_path / "out",
        changes={"sequences": 3, "sequence_seed": 5},
        other_text=other,
    )
    config.data.update(other)
    drawn = scored_text.draw(load_corpus(config).validation, 3, 32, seed=5).tokens.reshape(3, 33).astype(np.int32)
    eval_step = quick_jit(steps.make_eval_step(config, graphdef, mesh))
    # Losses of about 6 nats from float32 logits, compiled in another way.
    np.testing.assert_allclose(curves[0].losses, np.ravel(eval_step(state.params, drawn)), rtol=0, atol=1e-4)
    stamp = json.loads((tmp_path / "out" / "stamp.json").read_text())
    assert stamp["text"].startswith("3 sequences of 32 targets, drawn by seed 5 from ")
    assert stamp["text"].endswith(f"validation_files={other['validation_files']}")
    assert "3 stretches of 32 tokens" in stamp["interval"]
    assert stamp["corpus"] == corpus.fingerprint


def test_another_text_that_changes_the_tokenizer_is_refused(small_config, text_files, tmp_path):
    """Without files of its own the validation text was part of the train files, whose words are the vocabulary."""
    config = small_config()
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "c.txt").write_text("four")
    config.data.update(
        train_files=str(tmp_path / "[ab].txt"), tokenizer="word", validation_fraction=0.5, document="line"
    )
    config.data.validation_fraction = next(  # one that holds out one of the two
        fraction for fraction in np.linspace(0.01, 0.99, 99) if _held_out(fraction) == 1
    )
    corpus = load_corpus(config)
    with pytest.raises(UserError, match=r"config.data.validation_files='.*c.txt' would change the train text"):
        scored_text.with_other_text(config, corpus, {"validation_files": str(tmp_path / "c.txt")})
    assert scored_text.with_other_text(config, corpus, {}) is corpus


def _held_out(fraction: float) -> int:
    return sum(in_validation(text, fraction) for text in ("one two", "three"))
