"""Joins a job of SLURM as the only task of its node and as one of eight; prints the GPUs that JAX then takes."""

import os

import jax

from wavelet_jax.parallel import processes

for os.environ["SLURM_STEP_NUM_TASKS"] in ("1", "8"):
    processes.start(None, None, None, True)
    print(jax.config._read("jax_cuda_visible_devices"))
    jax.distributed.shutdown()
