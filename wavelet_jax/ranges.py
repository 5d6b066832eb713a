"""Ranges of numbers that a user gives: what is allowed, and the one line that says so where a value is not."""

import dataclasses
import math
import numbers
from typing import Any

import numpy as np

from wavelet_jax.errors import UserError

_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, both included. NaN and infinities are in no range, and neither is a bool.

    Attributes:
      least, most: the bounds.
      whole: integers only.
      above: `least` itself is not allowed.
      below: `most` itself is not allowed, and neither is a value that float32 rounds to it.
    """

    least: float
    most: float = _FLOAT32_MAX
    whole: bool = False
    above: bool = False
    below: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises `UserError` where `value` is not in the range; `name` says what the value is of."""
        kind: Any = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UserError(f"{name} must be a {'whole ' * self.whole}number, not {value!r}")
        if not (self._above_least(value) and self._below_most(value)):
            raise UserError(f"{name} must be {self._allowed(value)}, not {value}")

    def _above_least(self, value: float) -> bool:
        return self.least < value if self.above else self.least <= value

    def _below_most(self, value: float) -> bool:
        if not self.below or not value <= self.most:  # NaN fails every comparison
            return value <= self.most
        return float(np.float32(value)) < self.most

    def _allowed(self, value: float) -> str:
        """The bounds in words; an upper bound that only keeps a number in its type is left out where it is kept."""
        low = f"{'above' if self.above else 'at least'} {self.least:g}"
        if value == math.inf and not self.below:
            return f"{low} and finite"
        if self.below:
            return f"{low} and below {self.most:g}"
        high = f"{self.most}" if self.whole else f"{self.most:g}"
        return f"{low} and at most {high}" if value > self.most else low


AMOUNT = Range(0)  # of anything that is measured
FRACTION = Range(0, 1, below=True)
COUNT = Range(1, _INT32_MAX, whole=True)  # of what there has to be at least one of; counters are int32
COUNT_OR_NONE = Range(0, _INT32_MAX, whole=True)
# JAX without 64-bit types takes 32 bits of a seed and drops the others: runs whose seeds are equal modulo 2^32 would
# share their parameters and dropout. Larger seeds are refused and not made use of: a run that was trained with one
# would go on with other dropout, and nothing would say so.
SEED = Range(0, 2**32 - 1, whole=True)
# Sizes far past those of any model, up to which tables by head dimension are made without thinking of memory.
HEADS = Range(1, 2**20, whole=True)


def check_options(name: str, method: object, **options: Range) -> None:
    """Raises `UserError` for the first field of a position method that is not in its range.

    Args:
      name: what the method is called in `positions.METHODS`, for the message.
      method: its dataclass, whose `num_heads` and `head_dim` are checked too.
      **options: ranges of further fields.
    """
    for option, allowed in {"num_heads": HEADS, "head_dim": HEADS, **options}.items():
        allowed.check(f"{name}'s {option}", getattr(method, option))
