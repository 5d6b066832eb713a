"""Speed of a run relative to the peak of its devices, and where the rest of the time goes."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from ml_collections import ConfigDict

LOST = ("input", "checkpoint", "validation", "compile")  # what keeps the devices from training


def matrix_parameters(config: ConfigDict, vocab_size: int) -> int:
    """Numbers that every token is multiplied with: projections, feed-forward, and the head (tied or not).

    Embeddings are looked up and norms are no products: neither counts, nor does what a position method learns. Of an
    adaptive vocabulary the head and the most frequent words' projection count: what rare words need
    beside them, or instead, depends on the text.
    """
    width, heads, kv_heads = config.model.d_model, config.model.num_heads, config.model.num_kv_heads
    attention = 2 * width * (heads + kv_heads) * config.model.head_dim
    feed_forward = (3 if config.model.activation == "swiglu" else 2) * width * config.model.d_ff
    head = width * vocab_size
    if config.model.vocabulary == "adaptive":
        head = width * (width + config.model.cutoffs[0] + len(config.model.cutoffs))
    return config.model.num_layers * (attention + feed_forward) + head


def update_flops(config: ConfigDict, vocab_size: int) -> float:
    """FLOPs that one update of the model needs: those by which model FLOPs utilization (MFU) is stated.

    6 N T for T tokens and the N of `matrix_parameters` (2 forward, 4 backward), and 12 H D per layer for every pair of
    a query and a key that it sees, L (L + 1) / 2 per window of L: two products of D, three times. As Chowdhery et al.
    (PaLM, arXiv 2204.02311, appendix B), but that they count all L^2 pairs, of which causal attention needs half. Not
    counted, since the model does not ask for it: position terms, recomputation (`model.remat`, tiles), the optimizer.
    """
    windows, length = config.train.batch_size, config.train.length
    pairs = windows * length * (length + 1) / 2
    attention = 12 * config.model.num_layers * config.model.num_heads * config.model.head_dim * pairs
    return 6.0 * matrix_parameters(config, vocab_size) * windows * length + attention


class Meter:
    """Speed of a run, and its seconds by where they go, from one line of metrics to the next.

    Measuring never blocks the loop: a thread waits for the result of every update and notes the time. Host time that
    overlaps with device work is not counted as lost.

    Args:
      tokens, flops: of one update.
      peak: FLOP/s of all devices (`devices.total_flops`).
      clock: seconds.
    """

    def __init__(self, tokens: int, flops: float, peak: float, clock: Callable[[], float] = time.perf_counter):
        self._tokens, self._flops, self._peak, self._clock = tokens, flops, peak, clock
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="meter")
        self._last: Future[float] | None = None  # when the devices were done with the last update
        self._made = clock()
        self._lost_before: dict[str, float] = dict.fromkeys(LOST, 0.0)  # in lines that are closed
        self._start_line()

    def _start_line(self) -> None:
        self._since, self._updates = self._clock(), 0
        self._lost: dict[str, float] = dict.fromkeys(LOST, 0.0)

    def compiled(self, function: Callable) -> Callable:
        """A jitted function that is compiled when it is first called, that time being counted; shapes never change."""
        program = None

        def call(*args):
            nonlocal program
            if program is None:
                with self.pause("compile"):
                    program = function.lower(*args).compile()
            return program(*args)

        return call

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """Around the making of a batch: counts what of it passes after the devices have run out of work."""
        start = self._clock()
        yield
        end = self._clock()
        if self._last is None:
            self._lost["input"] += end - start
        elif self._last.done() and self._last.exception() is None:  # the loop itself will see what went wrong
            self._lost["input"] += max(0.0, end - max(start, self._last.result()))

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Around what the devices do not train during: one of `LOST`. What is counted inside is not counted twice."""
        start, counted = self._clock(), sum(self._lost.values())
        yield
        self._lost[what] += self._clock() - start - (sum(self._lost.values()) - counted)

    def updated(self, result: jax.Array) -> None:
        """After each update was handed to the devices: one array of what it will give."""
        self._updates += 1
        self._last = self._waiting.submit(self._when, result)

    def _when(self, result: jax.Array) -> float:
        jax.block_until_ready(result)
        return self._clock()

    def line(self) -> dict[str, float]:
        """Metrics of the time since the last line; call it when all updates are done.

        tokens_per_second and mfu are of the time that is left without checkpoints, validation and compilation; the
        shares are of all of it. A checkpoint is saved after its line, and so counts in the next.
        """
        seconds = max(self._clock() - self._since, 1e-9)
        training = max(seconds - sum(self._lost.values()) + self._lost["input"], 1e-9)
        metrics = {
            "tokens_per_second": self._updates * self._tokens / training,
            "mfu": self._updates * self._flops / training / self._peak,
            **{f"{what}_share": lost / seconds for what, lost in self._lost.items()},
        }
        for what, lost in self._lost.items():
            self._lost_before[what] += lost
        self._start_line()
        return metrics

    def spent(self) -> dict[str, float]:
        """Seconds since the meter was made: those lost, by `LOST`, and the rest as "updates". Starts no new line."""
        lost = {what: self._lost_before[what] + self._lost[what] for what in LOST}
        return {"updates": max(0.0, self._clock() - self._made - sum(lost.values())), **lost}

    def close(self) -> None:
        self._waiting.shutdown(wait=False, cancel_futures=True)


def duration(seconds: float) -> str:
    """'45.2 s', '12.3 min', '3.4 h' or '12 days'."""
    for size, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if seconds < 100 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
