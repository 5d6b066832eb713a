"""train.py with a short lease, killed at a moment of a save: train_in_a_bucket.py SECONDS MOMENT FLAGS...

MOMENT is `never`; `before`, when the files of the checkpoint of update 10 are written and its checksums are not; or
`after`, when these are too, and orbax's mark is not.
"""

import os
import signal
import sys

import train
from wavelet_jax.commands import cli
from wavelet_jax.runs import checksums, leases

leases.SECONDS, moment = float(sys.argv[1]), sys.argv[2]
sys.argv[1:] = sys.argv[3:]
write = checksums.write


def killed(folder):
    if folder.name != "10" or moment == "never":
        write(folder)
        return
    if moment == "after":
        write(folder)
    os.kill(os.getpid(), signal.SIGKILL)


checksums.write = killed
cli.run(train.main)
