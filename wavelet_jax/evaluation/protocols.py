"""Evaluation protocols: which blocks are read and scored, the scoring itself, and bootstrap intervals."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from wavelet_jax.errors import unknown
from wavelet_jax.evaluation.scored_text import ScoredText

PROTOCOLS = ("full_length", "non_overlapping", "sliding_window")


_DRAWN_AT_ONCE = 2**20  # stretches


@dataclasses.dataclass(frozen=True)
class Block:
    """One forward pass: tokens [start, stop) are read, and the targets of tokens [first_scored, stop) are scored."""

    start: int
    first_scored: int
    stop: int


def plan_blocks(num_targets: int, length: int, protocol: str, *, stride: int, train_length: int) -> list[Block]:
    """The blocks by which a protocol covers targets 0 .. num_targets - 1, each once (paper, section 6.1).

    Args:
      num_targets: M.
      length: L, tokens.
      protocol: "full_length": blocks of L, attention over the whole block. "non_overlapping": sequences of L, cut
        in blocks of the training length, each scored alone. "sliding_window": windows of L moved by the stride,
        only the new tokens scored; the first windows are shorter.
      stride: of the sliding window, 1 .. L.
      train_length: L_train.
    """
    match protocol:
        case "full_length":
            cuts = range(0, num_targets, length)
            return [Block(cut, cut, min(cut + length, num_targets)) for cut in cuts]
        case "non_overlapping":
            return [
                Block(cut, cut, min(cut + train_length, whole.stop))
                for whole in plan_blocks(num_targets, length, "full_length", stride=length, train_length=train_length)
                for cut in range(whole.start, whole.stop, train_length)
            ]
        case "sliding_window":
            stops = [min(cut + stride, num_targets) for cut in range(0, num_targets, stride)]
            return [Block(max(0, stop - length), first, stop) for first, stop in zip([0, *stops], stops, strict=False)]
    raise unknown("protocol", protocol, PROTOCOLS)


def plan_text(text: ScoredText, length: int, protocol: str, *, stride: int, train_length: int) -> list[Block]:
    """`plan_blocks` of every sequence of a text, as places in all its tokens."""
    blocks = plan_blocks(text.length, length, protocol, stride=stride, train_length=train_length)
    starts = range(0, text.count * (text.length + 1), text.length + 1)
    return [
        Block(start + block.start, start + block.first_scored, start + block.stop)
        for start in starts
        for block in blocks
    ]


def batch_shape(blocks: Sequence[Block], batch_tokens: int) -> tuple[int, int]:
    """(B, L) of the batches that blocks are scored in: L is that of the longest, L times B at most `batch_tokens`."""
    longest = max(block.stop - block.start for block in blocks)
    return max(1, min(batch_tokens // longest, len(blocks))), longest


def score(
    losses_of: Callable[[np.ndarray], jax.Array | np.ndarray],
    tokens: np.ndarray,
    blocks: Sequence[Block],
    *,
    batch_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores every target of the blocks.

    Args:
      losses_of: tokens [B, L+1] -> the loss of every target, [B, L], in nats; always called with one shape.
      tokens: the stream, or the sequences of a `ScoredText`.
      blocks: from `plan_blocks` or `plan_text`.
      batch_tokens: L times B is at most this, or B is 1.

    Returns:
      Losses [M] float32 and places in their blocks [M] int32, in the order of the blocks, which is that of the tokens.
    """
    losses, positions = [], []
    batch_size, longest = batch_shape(blocks, batch_tokens)
    for first in range(0, len(blocks), batch_size):
        batch = blocks[first : first + batch_size]
        # Padding comes after what is scored, where a causal model cannot see it.
        padded = np.zeros((batch_size, longest + 1), np.int32)
        for row, block in zip(padded, batch, strict=False):
            row[: block.stop - block.start + 1] = tokens[block.start : block.stop + 1]
        by_position = np.asarray(losses_of(padded))
        for row, block in zip(by_position, batch, strict=False):
            scored = slice(block.first_scored - block.start, block.stop - block.start)
            losses.append(row[scored].copy())  # not all of the batch
            positions.append(np.arange(scored.start, scored.stop, dtype=np.int32))
    return np.concatenate(losses).astype(np.float32), np.concatenate(positions)


def bootstrap_interval(losses: np.ndarray, unit: int, *, resamples: int, seed: int) -> tuple[float, float]:
    """95% interval of the mean loss, resampling whole stretches of `unit` neighbouring tokens with replacement.

    Neighbouring losses depend on each other; stretches of the longest length hardly do. With the same seed the same
    stretches are drawn for every method and length, so that intervals move together.
    """
    means = losses[: len(losses) // unit * unit].reshape(-1, unit).mean(axis=1, dtype=np.float64)
    rng, found = np.random.default_rng(seed), []
    at_once = max(1, _DRAWN_AT_ONCE // len(means))  # rows of one draw, in parts: the same numbers in less memory
    for first in range(0, resamples, at_once):
        drawn = rng.integers(len(means), size=(min(at_once, resamples - first), len(means)))
        found.append(means[drawn].mean(axis=1))
    low, high = np.percentile(np.concatenate(found), (2.5, 97.5))
    return float(low), float(high)
