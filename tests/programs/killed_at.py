"""Trains a run; kills itself in an update, before it is logged: killed_at.py UPDATE WORKDIR FILES CACHE."""

import os
import signal
import sys

from configs import smoke
from wavelet_jax.runs import stopping
from wavelet_jax.training import loop


class Kill(stopping.NoStop):
    """SIGKILL after so many updates of this process."""

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def requested(self) -> bool:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def make_config(files: str, cache: str):
    """A run of 20 updates that logs each and saves every fifth."""
    config = smoke.get_config("rope")
    config.data.update(source="text", train_files=files, cache_dir=cache, validation_fraction=0.2)
    config.model.num_layers = 1
    config.train.update(steps=20, batch_size=4)
    config.log.every, config.checkpoint.every, config.eval.every = 1, 5, 0
    return config


if __name__ == "__main__":
    loop.train(make_config(sys.argv[3], sys.argv[4]), sys.argv[2], Kill(int(sys.argv[1])))
