"""Packed documents: windows against a loop, losses against each document alone, runs; and reading ahead."""

import json
import signal
import subprocess
import threading
import time

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from support.compilation import quick_jit
from support.packed import documents, one_layer, packed_batch
from support.project import ROOT, environment, program, run

from wavelet_jax.data import Windows, read_ahead, train_windows
from wavelet_jax.data.corpus import Corpus
from wavelet_jax.errors import UserError
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import stopping
from wavelet_jax.runs.metrics import read_metrics
from wavelet_jax.training import steps

VOCAB = 257


def pieces(packed: np.ndarray) -> list[np.ndarray]:
    """The runs of tokens of one document in a window [2, L+1], by a plain loop."""
    found = []
    for token, number in zip(*packed.tolist(), strict=True):
        if number == len(found):
            found.append([])
        assert number == len(found) - 1, "numbers of documents begin at 0 and rise by one"
        found[-1].append(token)
    return [np.array(piece, np.int32) for piece in found]


# Windows


@pytest.mark.parametrize("length", [1, 7, 64])
def test_windows_against_a_loop(length):
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 30, 40), 200, 1, 1]
    tokens, ends = documents(rng, lengths)
    of_token = [document for document, size in enumerate(lengths) for _ in range(size)]
    places = np.arange(len(tokens))
    packed, plain = Windows(tokens, length, 4, ends), Windows(tokens, length, 4)
    where = Windows(places, length, 4)  # the place of every token
    assert packed.num_windows == plain.num_windows
    batch = packed.batch(3, 2 * packed.num_windows)
    assert batch.dtype == np.int32
    assert batch.shape == (2 * packed.num_windows, 2, length + 1)
    np.testing.assert_array_equal(batch[:, 0], plain.batch(3, 2 * packed.num_windows))
    for row, at in zip(batch[:, 1], where.batch(3, 2 * packed.num_windows), strict=True):
        assert row.tolist() == [of_token[place] - of_token[at[0]] for place in at]


def test_shape_of_an_update(small_config):
    """What training expects is what windows give, packed or not."""
    rng = np.random.default_rng(0)
    tokens, ends = documents(rng, [50] * 20)
    corpus = Corpus(tokens, tokens, None, "byte", "", ends, ends)
    for packing, shape in (("none", (2, 4, 65)), ("documents", (2, 4, 2, 65))):
        config = small_config()
        config.data.packing, config.train.accumulation = packing, 2
        assert steps.batch_shape(config) == shape
        assert train_windows(config, corpus).batch(0, 8).reshape(shape).shape == shape


def test_unknown_packing(small_config):
    config = small_config()
    config.data.packing = "document"
    with pytest.raises(UserError, match=r"unknown config.data.packing 'document': did you mean 'documents'\?"):
        train_windows(config, None)


# Losses


@pytest.mark.parametrize(
    ("method", "backend"), [("wavelet", "reference"), ("wavelet", "tiled"), ("rope", "reference"), ("t5", "tiled")]
)
def test_loss_is_that_of_each_document_alone(small_config, method, backend):
    """Positions run on through the window, which a relative method cannot tell from starting anew."""
    config = one_layer(small_config, method)
    config.model.attention_backend = backend
    graphdef, state, _ = steps.init(config, VOCAB, sharding.make_mesh(config))
    eval_step = quick_jit(steps.make_eval_step(config, graphdef))
    length = config.train.length

    def losses_of(tokens: np.ndarray) -> np.ndarray:
        # Padding comes after what is scored, where a causal model cannot see it; one shape compiles once.
        padded = np.pad(tokens, (0, length + 1 - len(tokens)))
        return np.asarray(eval_step(state.params, padded[None]), np.float64)[0, : len(tokens) - 1]

    windows = packed_batch(config, [20, 31, 90, 2, 17, 5, 64, 64, 40, 33, 28], 4)
    alone = [losses_of(piece) for window in windows for piece in pieces(window)]
    assert len(alone) > 8
    expected = np.concatenate(alone).mean()
    counted = windows[:, 1, 1:] == windows[:, 1, :-1]
    across = np.stack([losses_of(window[0]) for window in windows])[counted].mean()

    _, metrics = quick_jit(steps.make_train_step(config, graphdef))(state, windows[None])
    assert float(metrics["loss"]) == pytest.approx(expected, abs=5e-6)  # a mean of float32 numbers of about 6
    assert abs(across - expected) > 1e-4  # so that it is another number where segments are lost on the way


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_gradient_stays_inside_a_document(small_config, packing):
    """Of the losses of later documents by the first one's embedded tokens: zero where they are packed."""
    config = one_layer(small_config)
    config.data.packing, config.model.tied_head = packing, False
    windows = packed_batch(config, [20, 31, 14, 200], 4)
    windows = windows[[windows[:, 1, -1].argmax()]]  # the one with three borders
    first = windows[0, 1, :-1] == 0
    assert first.sum() == 20
    tokens, segment_ids, counted = steps._unpack(config, windows if packing == "documents" else windows[:, 0])
    inputs = np.where(
        first, VOCAB + np.arange(len(first)), tokens[:, :-1]
    )  # those of the first: embedded by themselves
    graphdef, params = nnx.split(Decoder(config, VOCAB + len(first), rngs=nnx.Rngs(0)))

    def later_losses(params):
        model = nnx.merge(graphdef, params)
        losses = steps.token_losses(model, model.hidden(inputs, segment_ids=segment_ids), tokens[:, 1:], 0)
        return losses.sum(where=~first if counted is None else counted & ~first)

    gradient = quick_jit(jax.grad(later_losses))(params)["embedding"]["embedding"][VOCAB:][first]
    assert bool((gradient == 0).all()) == (packing == "documents")


def test_accumulation_over_parts_of_unequal_counts(small_config):
    """The mean is over the targets of the update, not over those of its parts."""
    states, losses = {}, {}
    for parts in (1, 4):
        config = one_layer(small_config)
        config.train.accumulation = parts
        graphdef, state, _ = steps.init(config, VOCAB, sharding.make_mesh(config))
        lengths = [2] * 80 + [300] * 2  # windows of many short documents, and of parts of long ones
        windows = packed_batch(config, lengths, 8).reshape(steps.batch_shape(config))
        states[parts], metrics = quick_jit(steps.make_train_step(config, graphdef))(state, windows)
        losses[parts] = float(metrics["loss"])
        counted = np.asarray(steps._unpack(config, windows)[2]).sum(axis=(1, 2))
    assert counted.max() > 1.2 * counted.min()
    assert losses[1] == pytest.approx(losses[4], rel=1e-6)

    def moments(state):
        return jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))

    for whole, split in zip(moments(states[1]), moments(states[4]), strict=True):
        np.testing.assert_allclose(whole, split, atol=1e-7)


def test_windows_without_a_counted_target_change_nothing(small_config):
    config = one_layer(small_config)
    config.optimizer.weight_decay = 0.0
    graphdef, state, _ = steps.init(config, VOCAB, sharding.make_mesh(config))
    windows = packed_batch(config, [1] * 1000, 8)
    after, metrics = quick_jit(steps.make_train_step(config, graphdef))(state, windows[None])
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.mark.slow
def test_packed_update_on_eight_devices():
    """Devices differ in how many of their targets count; sums over them are taken in another order, which rounds."""

    def losses(devices: int, fsdp: int, context: int) -> list[float]:
        out = run(program("packed_losses", fsdp, context), devices=devices)
        assert out.returncode == 0, out.stderr
        return [json.loads(line) for line in out.stdout.splitlines()]

    one = losses(1, 1, 1)
    for fsdp, context in ((2, 1), (2, 2)):
        np.testing.assert_allclose(losses(8, fsdp, context), one, rtol=2e-5)  # as in test_sharding.py
    assert one[-1] < one[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module")  # by which ml_collections reads the command's default config
def test_packed_run_goes_on_to_the_same_losses(small_config, tmp_path):
    """Bit for bit, with other numbers of threads and of batches made ahead."""
    from wavelet_jax.training import loop

    config = one_layer(small_config, "rope")
    config.data.document = "line"
    config.log.every, config.eval.every, config.optimizer.decay_steps = 1, 0, 20

    def losses(workdir: str, *lives: tuple[int, int, int]) -> list[tuple]:
        for config.train.steps, config.data.prefetch, config.data.threads in lives:
            with stopping.listen() as stop:
                loop.train(config, tmp_path / workdir, stop)
        return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / workdir)]

    whole, joined = losses("whole", (9, 2, 8)), losses("joined", (4, 0, 1), (9, 5, 3))
    assert [step for step, *_ in whole] == list(range(1, 10))
    assert joined == whole
    assert whole[-1][1] < whole[0][1]


# Reading ahead


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_read_ahead_is_calling_the_function(ahead):
    windows = Windows(np.arange(1001), 10, seed=0)
    for start in (0, 37):
        batches = list(read_ahead(lambda number, start=start: windows.batch(start + 4 * number, 4), 60, ahead))
        np.testing.assert_array_equal(np.concatenate(batches), windows.batch(start, 240))
    assert list(read_ahead(windows.batch, 0, ahead)) == []


def test_read_ahead_works_meanwhile_and_not_further():
    made, ready = [], threading.Event()

    def item(number: int) -> int:
        made.append(number)
        if number == 3:
            ready.set()
        return number

    items = read_ahead(item, 100, 3)
    assert next(items) == 0
    assert ready.wait(60)  # the next three come by themselves
    time.sleep(0.05)
    assert sorted(made) == [0, 1, 2, 3]
    items.close()


def test_read_ahead_raises_in_its_place():
    def item(number: int) -> int:
        if number == 5:
            raise UserError("five")
        return number

    items = read_ahead(item, 10, 4)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError) as raised:
        next(items)
    assert str(raised.value) == "five"  # the one line that a command prints
    items.close()


def ended(by: str) -> tuple[int, str, float]:
    """(exit code, stderr, seconds to the end) of a program that reads ahead, from the line that it prints."""
    child = subprocess.Popen(
        program("read_ahead_until", by),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout.readline() == "reading\n", child.stderr.read()
            begin = time.monotonic()
            if by == "interrupt":
                child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=100)
            return child.returncode, err, time.monotonic() - begin
        finally:
            child.kill()


def test_read_ahead_ends_with_the_program():
    """An error in the loop, with or without `close`: what is under way is waited for, and what is not is not begun."""
    code, err, seconds = ended("error")
    assert code == 1
    assert "RuntimeError: of the loop" in err
    assert seconds < 30


def test_read_ahead_can_be_interrupted():
    code, err, seconds = ended("interrupt")
    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    assert seconds < 30
