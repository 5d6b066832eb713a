"""One of two processes, which waits for the other: wait_for_others.py COORDINATOR NUMBER JOIN_TIMEOUT."""

import sys
import time

from wavelet_jax.commands import terminal
from wavelet_jax.parallel import processes

terminal.protect()
processes.start(sys.argv[1], 2, int(sys.argv[2]), None, join_timeout=float(sys.argv[3]), peer_timeout=8)
print("up", flush=True)
time.sleep(600)
