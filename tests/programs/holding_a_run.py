"""Holds the lock of a run until its standard input ends: holding_a_run.py WORKDIR [SECONDS of a lease]."""

import sys

from wavelet_jax.files import places
from wavelet_jax.runs import directory, leases

leases.SECONDS = float(sys.argv[2]) if len(sys.argv) > 2 else leases.SECONDS
with directory.locked(places.given(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
