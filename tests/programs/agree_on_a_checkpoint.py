"""One of two processes, which loads what both can read and stops with the other: PORT NUMBER WORKDIR."""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from support.states import FINGERPRINT, abstract, flip, make_state, over_processes

from configs import smoke
from wavelet_jax.runs import checkpoint, stopping

jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
workdir, mine = Path(sys.argv[3]), int(sys.argv[2])


def shards_are(state, step):
    for leaf, whole in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole)[shard.index])


with checkpoint.open_manager(workdir, smoke.get_config()) as manager:
    for step in (20, 40):
        checkpoint.save(manager, step, over_processes(make_state(step)), windows=8 * step, fingerprint=FINGERPRINT)
    checkpoint.wait(manager, 40)
target = abstract(over_processes(make_state(0)))
state, windows = checkpoint.restore(workdir, target, fingerprint=FINGERPRINT)
shards_are(state, 40)
if mine == 1:
    flip(next((workdir / "checkpoints" / "40" / "state" / "ocdbt.process_1" / "d").iterdir()), 0.5, 4)
jax.experimental.multihost_utils.sync_global_devices("damaged")
state, windows = checkpoint.restore(workdir, target, fingerprint=FINGERPRINT)
shards_are(state, 20)
assert windows == 160

add = jax.jit(lambda x: x + 1)
with stopping.listen() as stop:
    for step in range(1, 1000):
        state = jax.tree.map(add, state)
        if mine == 1 and step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        if stop.requested():
            break
    print(step, flush=True)
    jax.experimental.multihost_utils.sync_global_devices("done")
    stop.released("done")
