"""Waits for a signal that asks it to stop, and then does not stop."""

import time

from wavelet_jax.runs import stopping

with stopping.listen() as stop:
    assert not stop.requested()
    print("ready", flush=True)
    while not stop.requested():
        pass
    print("stopping", flush=True)
    time.sleep(1000)
