"""Packed documents: windows against a loop, losses against each document alone, runs; and reading ahead."""

import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import optax
import pytest
from conftest import ROOT
from flax import nnx

from wavelet_jax import runs, sharding, training
from wavelet_jax.data import Windows, read_ahead, train_windows
from wavelet_jax.data.corpus import Corpus
from wavelet_jax.errors import UserError

VOCAB = 257


def documents(rng: np.random.Generator, lengths) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, ends) of documents of these lengths, each closed by 256."""
    texts = [np.append(rng.integers(0, 256, length - 1), 256) for length in lengths]
    return np.concatenate(texts).astype(np.uint16), np.cumsum(lengths)


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
        assert training.batch_shape(config) == shape
        assert train_windows(config, corpus).batch(0, 8).reshape(shape).shape == shape


def test_unknown_packing(small_config):
    config = small_config()
    config.data.packing = "document"
    with pytest.raises(UserError, match=r"unknown config.data.packing 'document': did you mean 'documents'\?"):
        train_windows(config, None)


# Losses


def packed_batch(config, lengths, size: int) -> np.ndarray:
    tokens, ends = documents(np.random.default_rng(1), lengths)
    windows = Windows(tokens, config.train.length, 0, ends)
    return windows.batch(0, size)


@pytest.mark.parametrize(
    ("method", "backend"),
    [("wavelet", "reference"), ("wavelet", "tiled"), ("rope", "reference"), ("alibi", "tiled"), ("t5", "reference")],
)
def test_loss_is_that_of_each_document_alone(small_config, method, backend):
    """Positions run on through the window, which a relative method cannot tell from starting anew."""
    config = small_config(method)
    config.data.packing, config.model.attention_backend = "documents", backend
    graphdef, state, _ = training.init(config, VOCAB, sharding.make_mesh(config))
    windows = packed_batch(config, [20, 31, 90, 2, 17, 5, 64, 64, 40, 33, 28], 4)
    alone = [piece for window in windows for piece in pieces(window)]
    assert len(alone) > 8

    config.data.packing = "none"
    eval_step = jax.jit(training.make_eval_step(config, graphdef))
    losses = []
    for piece in alone:
        # Padding comes after what is scored, where a causal model cannot see it; one shape compiles once.
        padded = np.pad(piece, (0, config.train.length + 1 - len(piece)))
        losses += np.asarray(eval_step(state.params, padded[None]))[0, : len(piece) - 1].tolist()
    expected = np.mean(losses, dtype=np.float64)
    _, plain = jax.jit(training.make_train_step(config, graphdef))(state, windows[None, :, 0])

    config.data.packing = "documents"
    _, metrics = jax.jit(training.make_train_step(config, graphdef))(state, windows[None])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=2e-6)  # 240 float32 numbers of about 6
    assert abs(float(plain["loss"]) - expected) > 1e-3  # without segments it is another number


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_gradient_stays_inside_a_document(small_config, packing):
    """Of the losses of later documents by the first one's embedded tokens: zero where they are packed."""
    config = small_config()
    config.data.packing = packing
    windows = packed_batch(config, [20, 31, 14, 200], 1)
    tokens, segment_ids, counted = training._unpack(config, windows)
    first = windows[0, 1, :-1] == 0
    graphdef, params = nnx.split(training.Decoder(config, VOCAB, rngs=nnx.Rngs(0)))

    def later_losses(table):
        model = nnx.merge(graphdef, params)
        model.embedding.embedding[...] = table
        # Tokens of the first document get rows of their own, which the head does not read.
        own = np.where(first, 257 + np.arange(len(first)), tokens[0, :-1])
        hidden = model.hidden(own[None], segment_ids=segment_ids)
        model.embedding.embedding[...] = jax.lax.stop_gradient(table[:257])
        losses = training.token_losses(model, hidden, tokens[:, 1:], 0)
        return losses.sum(where=~first if counted is None else counted & ~first)

    rows = np.random.default_rng(0).normal(size=(257 + len(first), config.model.d_model)).astype(np.float32)
    gradient = jax.grad(later_losses)(rows)[257:][first]
    assert bool((gradient == 0).all()) == (packing == "documents")


def test_accumulation_over_parts_of_unequal_counts(small_config):
    """The mean is over the targets of the update, not over those of its parts."""
    states, losses = {}, {}
    for parts in (1, 4):
        config = small_config()
        config.data.packing, config.train.accumulation = "documents", parts
        graphdef, state, _ = training.init(config, VOCAB, sharding.make_mesh(config))
        lengths = [2] * 80 + [300] * 2  # windows of many short documents, and of parts of long ones
        windows = packed_batch(config, lengths, 8).reshape(training.batch_shape(config))
        states[parts], metrics = jax.jit(training.make_train_step(config, graphdef))(state, windows)
        losses[parts] = float(metrics["loss"])
        counted = np.asarray(training._unpack(config, windows)[2]).sum(axis=(1, 2))
    assert counted.max() > 1.2 * counted.min()
    assert losses[1] == pytest.approx(losses[4], rel=1e-6)

    def moments(state):
        return jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))

    for whole, split in zip(moments(states[1]), moments(states[4]), strict=True):
        np.testing.assert_allclose(whole, split, atol=1e-7)


def test_windows_without_a_counted_target_change_nothing(small_config):
    config = small_config()
    config.data.packing = "documents"
    config.optimizer.weight_decay = 0.0
    graphdef, state, _ = training.init(config, VOCAB, sharding.make_mesh(config))
    windows = packed_batch(config, [1] * 1000, 8)
    after, metrics = jax.jit(training.make_train_step(config, graphdef))(state, windows[None])
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_packed_run_goes_on_to_the_same_losses(text_files, tmp_path):
    """Bit for bit, with other numbers of threads and of batches made ahead."""

    def losses(workdir: str, *steps_and_flags) -> list[tuple]:
        for steps, *flags in steps_and_flags:
            command = [sys.executable, ROOT / "train.py", f"--config={ROOT}/configs/smoke.py:wavelet"]
            command += ["--config.data.source=text", f"--config.data.train_files={text_files}/*.txt"]
            command += ["--config.data.document=line", "--config.data.packing=documents"]
            command += [f"--config.data.cache_dir={tmp_path}/cache", f"--workdir={tmp_path}/{workdir}"]
            command += ["--config.log.every=1", "--config.eval.every=0", "--config.optimizer.decay_steps=40"]
            subprocess.run([*command, f"--config.train.steps={steps}", *flags], check=True, capture_output=True)
        return [(line["step"], line["loss"], line["grad_norm"]) for line in runs.read_metrics(tmp_path / workdir)]

    whole = losses("whole", (14,))
    joined = losses(
        "joined", (6, "--config.data.prefetch=0"), (14, "--config.data.prefetch=5", "--config.data.threads=1")
    )
    assert [step for step, *_ in whole] == list(range(1, 15))
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
    with pytest.raises(UserError, match=r"^five$"):
        next(items)
    items.close()


def ended(program: str, interrupt: bool) -> tuple[int, str, float]:
    """(exit code, stderr, seconds to the end) of a program that reads ahead, from the line that it prints."""
    program = "import contextlib, time\nfrom wavelet_jax.data import read_ahead\n" + textwrap.dedent(program)
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with child:
        try:
            assert child.stdout.readline() == "reading\n", child.stderr.read()
            begin = time.monotonic()
            if interrupt:
                child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=100)
            return child.returncode, err, time.monotonic() - begin
        finally:
            child.kill()


def test_read_ahead_ends_with_the_program():
    """An error in the loop, with or without `close`: what is under way is waited for, and what is not is not begun."""
    program = """
        items = read_ahead(lambda number: time.sleep(1.0 if number else 0) or number, 10**6, 2)
        next(items)
        print("reading", flush=True)
        raise RuntimeError("of the loop")
    """
    code, err, seconds = ended(program, interrupt=False)
    assert code == 1
    assert "RuntimeError: of the loop" in err
    assert seconds < 30


def test_read_ahead_can_be_interrupted():
    program = """
        with contextlib.closing(read_ahead(lambda number: time.sleep(1.0 if number else 0) or number, 10**6, 2)) as items:
            next(items)
            print("reading", flush=True)
            for item in items:
                pass
    """
    code, err, seconds = ended(program, interrupt=True)
    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    assert seconds < 30
