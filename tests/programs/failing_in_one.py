"""One of two processes that save three checkpoints; number 1 cannot write the second: PORT NUMBER WORKDIR."""

import resource
import sys
from pathlib import Path

import jax
from support.states import FINGERPRINT, make_state, over_processes

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.runs import checkpoint

jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
workdir, mine = Path(sys.argv[3]), int(sys.argv[2])

config = smoke.get_config()
config.checkpoint.timeout, checkpoint._PATIENCE = 5, 1.0
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with checkpoint.open_manager(workdir, config) as manager:
    for step in (1, 2, 3):
        if mine == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if step == 2 else soft, hard))
        checkpoint.save(manager, step, over_processes(make_state(step)), windows=8 * step, fingerprint=FINGERPRINT)
        try:
            checkpoint.wait(manager, step)
        except UserError as error:
            print(error, file=sys.stderr)
