"""The scored text: the head of the validation stream or sequences drawn from it, of the run's text or another."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from wavelet_jax.data import Corpus, load_corpus
from wavelet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """Sequences that are scored each on its own: no context crosses from one to the next.

    Attributes:
      tokens: `count` sequences of `length` + 1 tokens, one after another: target i of a sequence is its token i + 1.
      count: of sequences.
      length: targets of each.
      description: of the stamp.
    """

    tokens: np.ndarray
    count: int
    length: int
    description: str

    @property
    def num_targets(self) -> int:
        return self.count * self.length


def head(stream: np.ndarray, num_targets: int) -> ScoredText:
    """The first `num_targets` targets of a stream, as one sequence."""
    return ScoredText(stream[: num_targets + 1], 1, num_targets, f"the first {num_targets:,} targets")


def draw(stream: np.ndarray, count: int, length: int, *, seed: int) -> ScoredText:
    """`count` different stretches of `length` + 1 tokens of a stream, at random, in their order.

    They are drawn from the stretches that the stream is cut into from its first token on, so that no token is in two,
    and may begin and end inside of a document: few documents are as long as the lengths that matter. The same seed and
    length draw the same ones from the same stream.

    Raises:
      UserError: the stream has fewer of them.
    """
    there = len(stream) // (length + 1)
    if count > there:
        raise UserError(
            f"the validation text has {len(stream):,} tokens, which hold {there:,} sequences of {length:,} targets, "
            f"and eval.sequences is {count}: lower it or the longest length, or give more text"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(there, count, replace=False))
    tokens = stream[: there * (length + 1)].reshape(there, length + 1)[chosen].reshape(-1)
    description = f"{count:,} sequences of {length:,} targets, drawn by seed {seed} from {there:,}"
    return ScoredText(tokens, count, length, description)


def with_other_text(config: ConfigDict, corpus: Corpus, text: Mapping[str, str] | None) -> Corpus:
    """The corpus of a run with another validation text, in tokens of the run's own tokenizer.

    Args:
      config: of the run.
      corpus: what it names; its fingerprint stays, by which the run's checkpoints know it.
      text: keys of `config.data` that name the other text, such as {"validation_split": "test"}; none: the corpus.

    Raises:
      UserError: the other text leaves the run another train text or tokenizer; and those of `load_corpus`.
    """
    if not text:
        return corpus
    changed = config.copy_and_resolve_references()
    changed.data.update(text)
    other = load_corpus(changed)
    if other.tokenizer.dump() != corpus.tokenizer.dump():
        named = ", ".join(f"config.data.{key}={value!r}" for key, value in text.items())
        raise UserError(f"{named} would change the train text, and so the tokenizer that the run was trained with")
    return dataclasses.replace(corpus, validation=other.validation, validation_ends=other.validation_ends)
