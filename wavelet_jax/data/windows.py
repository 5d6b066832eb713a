"""Windows of a token stream in a shuffled order that is a pure function of (seed, number), and reading them ahead."""

from collections.abc import Callable, Generator
from typing import Any, TypeVar

import numpy as np

from wavelet_jax.errors import UserError, unknown
from wavelet_jax.ranges import Range

PACKINGS = ("none", "documents")
_SEED = Range(0, 2**63 - 1, whole=True)  # Grain tells all of them apart
Item = TypeVar("Item")


class Windows:
    """An endless stream of windows, numbered from 0; every epoch visits each window once, in an order of its own.

    Window i of the text is tokens[i * length : i * length + length + 1]: inputs are [:-1], targets [1:], so every
    token but the first is a target once an epoch (and fewer than `length` at the end of the stream, never).

    With the ends of documents, each token also comes with the number of its document, counted from the window's first;
    `training.make_train_step` keeps attention inside of each. Windows are full, and no text is left out or repeated: a
    document that does not end with its window continues in another, without what came before.

    Attributes: num_windows, windows in an epoch; length, input tokens per window.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int, ends: np.ndarray | None = None):
        """Takes a 1-D token stream of any integer dtype, which may be memory-mapped, and a seed from 0 to 2^63 - 1.

        ends: to pack documents: for each, the number of tokens up to and with its last one, ascending, int64 (of
          another dtype a memory-mapped array would be copied whole).

        Raises:
          UserError: the stream is shorter than one window; length below 1; a seed out of its range.
        """
        if length < 1:
            raise UserError(f"a window holds at least 1 token, not {length}: set config.train.length")
        _SEED.check("the seed of the shuffle, config.data.seed,", seed)
        if len(tokens) < length + 1:
            raise UserError(
                f"the text has {len(tokens)} tokens, and a window of {length} needs {length + 1}: lower "
                "config.train.length, or give more text (config.data.train_files, config.data.validation_files, "
                "config.data.validation_fraction)"
            )
        import grain  # takes over a second to import, and only training and validation need it

        self.length = length
        self.num_windows = (len(tokens) - 1) // length
        self._tokens, self._ends = tokens, ends
        # Grain hashes the seed, then adds the epoch's number to it: seeds 0 and 1 share no epoch's order.
        self._order = grain.MapDataset.range(self.num_windows).seed(seed).shuffle().repeat()

    def batch(self, start: int, size: int) -> np.ndarray:
        """Windows number start .. start + size - 1 of the stream: int32 [size, length + 1], or [size, 2, length + 1].

        In the second, packed form [:, 0] are tokens and [:, 1] the numbers of their documents.

        The same numbers give the same windows whatever the batch size, so `start` is the whole state of the data,
        and a process of several takes its share by its own `start` and `size`.
        """
        order = np.array([self._order[number] for number in range(start, start + size)], np.int64)
        places = order[:, None] * self.length + np.arange(self.length + 1)
        tokens = self._tokens[places].astype(np.int32)
        if self._ends is None:
            return tokens
        documents = np.searchsorted(self._ends, places, side="right")
        return np.stack([tokens, (documents - documents[:, :1]).astype(np.int32)], axis=1)


def train_windows(config, corpus) -> Windows:
    """The windows that a run trains on. Raises `UserError` as `Windows` does, and for an unknown packing."""
    check_packing(config)
    ends = corpus.train_ends if config.data.packing == "documents" else None
    return Windows(corpus.train, config.train.length, config.data.seed, ends)


def check_packing(config) -> None:
    """Raises `UserError` where `config.data.packing` is not known."""
    if config.data.packing not in PACKINGS:
        raise unknown("config.data.packing", config.data.packing, PACKINGS)


def read_ahead(item_of: Callable[[int], Item], count: int, ahead: int) -> Generator[Item, None, None]:
    """item_of(0), item_of(1), .. item_of(count - 1), in this order, made on Grain's threads before they are asked for.

    What is made is that of calling the function here, so nothing of it belongs to a run's state. An error of the
    function is raised where its item would have come. `close()` the iterator, as `contextlib.closing` does, to drop
    what is under way; closed or not, the end of the program waits for no more than `ahead` calls.

    Args:
      item_of: a pure function, called on several threads at once; its results are not None.
      count: items in all.
      ahead: how many are made before they are asked for, each on a thread of its own; 0: none, and no threads.
    """
    import grain

    items = grain.MapDataset.range(count).map(item_of)
    reading: Any = iter(items.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)))
    return reading
