"""Windows of a token stream in a shuffled order that is a pure function of (seed, number)."""

import numpy as np

from wavelet_jax.errors import UserError


class Windows:
    """An endless stream of windows, numbered from 0; every epoch visits each window once, in an order of its own.

    Window i of the text is tokens[i * length : i * length + length + 1]: inputs are [:-1], targets [1:], so every
    token but the first is a target once an epoch (and fewer than `length` at the end of the stream, never).

    Attributes: num_windows, windows in an epoch; length, input tokens a window.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int):
        """Takes a 1-D token stream of any integer dtype, which may be memory-mapped, and a seed >= 0.

        Raises:
          UserError: the stream is shorter than one window; length below 1; a negative seed.
        """
        if length < 1:
            raise UserError(f"a window holds at least 1 token, not {length}: set config.train.length")
        if seed < 0:
            raise UserError(f"the seed of the shuffle must be 0 or more, not {seed}: set config.train.seed")
        if len(tokens) < length + 1:
            raise UserError(
                f"the text has {len(tokens)} tokens, and a window of {length} needs {length + 1}: lower "
                "config.train.length, or give more text (config.data.train_files, config.data.validation_files, "
                "config.data.validation_fraction)"
            )
        import grain  # takes over a second to import, and only training and validation need it

        self.length = length
        self.num_windows = (len(tokens) - 1) // length
        self._tokens = tokens
        # Grain hashes the seed, then adds the epoch's number to it: seeds 0 and 1 share no epoch's order.
        self._order = grain.MapDataset.range(self.num_windows).seed(seed).shuffle().repeat()

    def batch(self, start: int, size: int) -> np.ndarray:
        """Windows number start .. start + size - 1 of the stream: int32 [size, length + 1].

        The same numbers give the same windows whatever the batch size, so `start` is the whole state of the data,
        and a process of several takes its share by its own `start` and `size`.
        """
        order = np.array([self._order[number] for number in range(start, start + size)], np.int64)
        return self._tokens[order[:, None] * self.length + np.arange(self.length + 1)].astype(np.int32)
