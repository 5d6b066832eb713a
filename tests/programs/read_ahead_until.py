"""Reads ahead until its loop raises an error or it is interrupted: read_ahead_until.py error|interrupt."""

import contextlib
import signal
import sys
import time

from wavelet_jax.data import read_ahead


def item(number: int) -> int:
    if number:
        time.sleep(1.0)
    return number


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
items = read_ahead(item, 10**6, 2)
if sys.argv[1] == "error":
    next(items)
    print("reading", flush=True)
    raise RuntimeError("of the loop")
with contextlib.closing(items):
    next(items)
    print("reading", flush=True)
    for _ in items:
        pass
