"""Holds the lock of a run's folder until its standard input ends: holding_a_run.py WORKDIR."""

import pathlib
import sys

from wavelet_jax.runs import directory

with directory.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
