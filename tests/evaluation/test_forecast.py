"""Long blocks in chunks through the cache, and what is said of memory and time before they are read."""

import dataclasses
import mmap
import time

import jax
import numpy as np
import pytest

from configs import default
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate, forecast, prefill
from wavelet_jax.evaluation.prefill import Pace, Program
from wavelet_jax.hardware import memory
from wavelet_jax.model.cache import KVCache
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import checkpoint, directory
from wavelet_jax.training import steps

VOCAB = 257


def build(config, batch_size: int, length: int, chunk: int, params=None) -> Program:
    config.eval.prefill_chunk = chunk
    mesh = sharding.make_mesh(config)
    graphdef, abstract_state = steps.shapes(config, VOCAB, mesh)
    return prefill.build(config, graphdef, abstract_state.params, mesh, batch_size=batch_size, length=length)


def tokens(batch_size: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (batch_size, length + 1)).astype(np.int32)


@pytest.mark.parametrize("method", ["wavelet", "learned", "transformer_xl"])
def test_losses_in_chunks_equal_those_at_once(small_config, method):
    """60 tokens in chunks of 16: the last one is read from 44 on. A learned table has no row past the last token."""
    config = small_config(method)
    default.set_position(config, max_positions=60)
    params = steps.init(config, VOCAB, sharding.make_mesh(config))[1].params
    ids, seen = tokens(2, 60), []
    whole = build(config, 2, 60, chunk=0).losses(params, ids, lambda *_: None)
    chunked = build(config, 2, 60, chunk=16).losses(params, ids, lambda *each: seen.append(each))
    # Losses of about 6 nats from float32 logits.
    np.testing.assert_allclose(chunked, whole, rtol=0, atol=1e-5)
    assert seen == [(0, 16), (16, 32), (32, 48), (44, 60)]


@pytest.mark.parametrize(("length", "chunk"), [(60, 16), (64, 16), (16, 16), (17, 16), (5, 1)])
def test_chunks_are_whole_and_leave_nothing_out(length, chunk):
    parts = prefill.chunks(length, chunk)
    assert {place for part in parts for place in range(*part)} == set(range(length))
    assert all(stop - start == chunk for start, stop in parts)
    assert len(parts) == -(-length // chunk)


def test_memory_is_that_of_a_chunk_beside_the_cache(small_config):
    """16,384 tokens read 256 at a time take a chunk's activations, not all tokens', and a copy of a layer's keys and
    values, padded; the cache is an argument, updated in place.

    The model is so small that a tile of attention weighs as much as 16,384 activations: the chunk is one whose tiles
    are small too.
    """
    length, chunk, cache = 16384, 256, 2 * 2 * 16384 * 2 * 16 * 4
    config = small_config("wavelet")
    config.train.logits_chunk = 256
    whole, chunked = (build(config, 1, length, read).step.memory_analysis() for read in (length, chunk))
    assert chunked.alias_size_in_bytes >= cache
    assert chunked.argument_size_in_bytes < cache + 2**20
    assert chunked.temp_size_in_bytes < 0.3 * whole.temp_size_in_bytes
    program = build(config, 1, length, chunk)
    assert program.cache_bytes == cache
    needed = memory.needed(program.step)
    assert cache < needed < cache + chunked.temp_size_in_bytes + 2**20


# -- time -----------------------------------------------------------------------------------------------------------


def test_pace_adds_up_however_a_block_is_cut():
    pace = Pace(base=3.0, growth=0.5)
    assert pace.seconds(0, 10) == 10 * 3 + 0.5 * 10 * 10 / 2
    assert pace.seconds(0, 10, 4) == pytest.approx(4 * (pace.seconds(0, 7) + pace.seconds(7, 10)))


class Clock:
    """A machine that takes base + growth * (tokens before) seconds a token, and a step on it."""

    def __init__(self, pace: Pace):
        self.pace, self.now = pace, 0.0

    def whole(self, params, tokens):
        self.now += self.pace.seconds(0, tokens.shape[1] - 1, len(tokens))
        return np.zeros((len(tokens), tokens.shape[1] - 1))

    def chunk(self, params, cache, tokens):
        start, stop = int(cache.filled), int(cache.filled) + tokens.shape[1] - 1
        self.now += self.pace.seconds(start, stop, len(tokens))
        return np.zeros((len(tokens), tokens.shape[1] - 1)), cache.at(stop)


def test_the_pace_of_a_machine_is_found(monkeypatch, small_config):
    """From two chunks of a long block, or from whole blocks of two lengths; and the forecast is what the work takes."""
    machine = Pace(base=1e-4, growth=3e-8)
    clock = Clock(machine)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

    def program(config, graphdef, params, mesh, *, batch_size, length):
        chunk = prefill.chunk_of(config, length)
        if chunk == length:
            return Program(batch_size, length, chunk, clock.whole, None, 0, 7.0)
        return Program(batch_size, length, chunk, clock.chunk, lambda: KVCache((), (), 0), 0, 7.0)

    monkeypatch.setattr(prefill, "build", program)
    monkeypatch.setattr(memory, "needed", lambda _: 0)
    monkeypatch.setattr(forecast.Job, "load", lambda _: ({}, 5))
    work = {64: forecast.Work(8, 4, 64), 256: forecast.Work(8, 1, 256), 1000: forecast.Work(2, 1, 1000)}
    for prefill_chunk in (0, 100):
        config = small_config()
        config.eval.prefill_chunk = prefill_chunk
        job = forecast.timed(forecast.prepare(config, None, "wavelet", _corpus(), work))
        assert job.pace.base == pytest.approx(machine.base)
        assert job.pace.growth == pytest.approx(machine.growth)
        # Programs that are there are not compiled again when the work begins.
        compiled = 2 if prefill_chunk == 0 else 1
        assert len(job.programs) == compiled
        expected = job.seconds() - 7.0 * (3 - compiled)
        begin = clock.now
        for length, each in work.items():
            parts = []
            for _ in range(each.batches):
                job.program(length).losses({}, tokens(*each.shape), lambda *part, parts=parts: parts.append(part))
            told = sum(job.pace.seconds(*part, each.batch_size) for part in parts)  # what the bar is told
            assert told == pytest.approx(job.scoring_seconds(length))
        assert clock.now - begin == pytest.approx(expected)


@dataclasses.dataclass
class _Tokenizer:
    vocab_size: int = VOCAB


def _corpus():
    from wavelet_jax.data import Corpus

    stream = np.arange(5000, dtype=np.uint16) % VOCAB
    return Corpus(stream, stream, _Tokenizer(), "byte", "a" * 12, *2 * [np.array([len(stream)])])


def test_more_memory_than_there_is_is_refused_before_anything_is_read(monkeypatch, small_config, tmp_path):
    config = small_config()
    config.eval.prefill_chunk = 32
    monkeypatch.setattr(memory, "available", lambda: (2**20, "this machine"))
    message = (
        r"wavelet at length 128 would take .* of memory, in batches of 2 read 32 tokens at a time, and this machine "
        r"has 1 MiB: lower --lengths, eval.prefill_chunk or eval.batch_tokens"
    )
    work = {128: forecast.Work(4, 2, 128)}
    with pytest.raises(UserError, match=message):  # not that tmp_path has no checkpoint
        forecast.prepare(config, tmp_path, "wavelet", _corpus(), work)


def test_table_tells_memory_and_time_of_each_and_of_all(small_config):
    jobs = []
    for label, base in (("wavelet", 0.01), ("rope", 0.02)):
        program = Program(1, 1000, 1000, None, None, 0, 0.0)
        job = forecast.Job(
            label, small_config(), None, None, None, {}, None, {1000: forecast.Work(60, 1, 1000)}, {(1, 1000): program}
        )
        jobs.append(dataclasses.replace(job, pace=Pace(base, 0.0), bytes=3 * 2**29))
    lines = forecast.table(jobs, 60_000).splitlines()
    assert "60,000 tokens scored" in lines[0]
    assert lines[1].split() == ["wavelet", "10", "min", "1.5", "GiB", "at", "1,000"]
    assert lines[2].split()[:3] == ["rope", "20", "min"]
    assert lines[3].strip().startswith("in all 30 min, at most 1.5 GiB of the ")


def test_memory_of_this_process():
    before = memory.in_use()
    # 64 MiB, touched; from the system, as an allocator may reuse what another test has freed.
    block = np.frombuffer(mmap.mmap(-1, 2**26), np.uint8)
    block[:] = 1
    assert memory.in_use() > before + 2**25
    assert memory.available()[0] > memory.peak() >= memory.in_use() - 2**20 > 0
    assert block.sum() == 2**26


# -- what is read -----------------------------------------------------------------------------------------------------


def test_parameters_come_back_without_the_optimizer(small_config, tmp_path):
    config = small_config()
    mesh = sharding.make_mesh(config)
    _, state, abstract_state = steps.init(config, VOCAB, mesh)
    state = dataclasses.replace(state, step=np.int32(3) + 0 * state.step)
    with checkpoint.open_manager(tmp_path, config) as manager:
        checkpoint.save(manager, int(state.step), state, windows=8, fingerprint="f")
    params, step = checkpoint.restore_params(tmp_path, abstract_state.params, fingerprint="f")
    with pytest.raises(UserError, match="another text or tokenizer"):
        checkpoint.restore_params(tmp_path, abstract_state.params, fingerprint="g")
    assert step == 3
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_a_run_of_an_earlier_version_is_told(small_config, tmp_path):
    config = small_config()
    with config.unlocked():
        del config.eval.prefill_chunk
    directory.save_config(tmp_path / "run", config)
    options = {"lengths": [64], "protocol": "full_length", "out": tmp_path / "out"}
    with pytest.raises(UserError, match=r"is of an earlier version, without eval.prefill_chunk"):
        evaluate.evaluate([tmp_path / "run"], **options)
    # A change goes before what the run says, and is checked as that is.
    with pytest.raises(UserError, match=r"eval.prefill_chunk must be at least 0, not -1"):
        evaluate.evaluate([tmp_path / "run"], **options, changes={"prefill_chunk": -1})
