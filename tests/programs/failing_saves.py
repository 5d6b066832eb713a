"""Saves five checkpoints, of which the third and the fourth find the disk full: failing_saves.py WORKDIR."""

import pathlib
import resource
import sys

from support.states import FINGERPRINT, make_state, restore, same

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.runs import checkpoint

workdir, (soft, hard) = pathlib.Path(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)
with checkpoint.open_manager(workdir, smoke.get_config()) as manager:
    for step in (1, 2, 3, 4, 5):
        # The kernel refuses writes past 2 kB, as a full disk would refuse them.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if step in (3, 4) else soft, hard))
        checkpoint.save(manager, step, make_state(step), windows=8 * step, fingerprint=FINGERPRINT)
        try:
            if step != 3:
                checkpoint.wait(manager, step)
        except UserError as error:
            print(error, file=sys.stderr)
            assert same(restore(workdir)[0], make_state(2))
        print(sorted(path.name for path in (workdir / "checkpoints").iterdir() if "tmp" not in path.name))
assert same(restore(workdir)[0], make_state(5))
