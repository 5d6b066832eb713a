"""Several processes that run one program: how they find one another, and which of them speaks.

Every process of a run does the same, on the devices of all of them together; process 0 alone prints, logs and writes
what is written once. Call `start` before anything asks JAX for its devices.
"""

import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from wavelet_jax.errors import UserError

_PATIENCE = 5.0  # seconds that a process that is done waits for its own threads


def count(environment: Mapping[str, str]) -> int:
    """Processes of the run that this environment is one of: of SLURM's srun, Open MPI's mpirun, or a GKE TPU slice.

    A batch script's own shell, or a single interactive task, counts one. A TPU VM's metadata server alone knows its
    pod: there --distributed is given.
    """

    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    tpu_hosts = len(hosts) * _number(environment, "MEGASCALE_NUM_SLICES")
    return max(tpu_hosts, _number(environment, "SLURM_STEP_NUM_TASKS"), _number(environment, "OMPI_COMM_WORLD_SIZE"))


def shares_gpus(environment: Mapping[str, str]) -> bool:
    """Whether the process of this environment sees GPUs of others too: several run on a node, and it sees several.

    SLURM tells each task how many there are, and on how many nodes: they all decide alike.
    """
    tasks, nodes = _number(environment, "SLURM_STEP_NUM_TASKS"), _number(environment, "SLURM_STEP_NUM_NODES")
    beside_others = tasks > nodes or _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") > 1
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return beside_others and (visible is None or "," in visible)


def _number(environment: Mapping[str, str], name: str) -> int:
    return int(environment[name]) if environment.get(name, "").isdecimal() else 1


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, distributed: bool | None) -> None:
    """Joins the other processes, if there are any.

    Of the GPUs that it sees a process takes all, or, where others see them too, the one of its number on the node.

    Args:
      coordinator, num_processes, process_id: HOST:PORT of process 0, how many there are and which this is; or all None.
      distributed: whether to join the cluster that JAX finds; None: where the environment counts several processes.

    Raises:
      UserError: what does not go together, or processes that do not come.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if not (count(os.environ) > 1 if distributed is None else distributed):
            return
        arguments = {}
    else:
        if distributed is not None:
            raise UserError("--distributed asks the environment: leave it out beside --coordinator")
        if missing:
            raise UserError(f"--coordinator, --num_processes and --process_id go together: --{missing[0]} is missing")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator is HOST:PORT of process 0, not {coordinator}")
        if num_processes < 1:
            raise UserError(f"--num_processes must be at least 1, not {num_processes}")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id must be 0 to {num_processes - 1}, one each, not {process_id}")
        arguments = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    # JAX alone would take one GPU a process wherever SLURM or Open MPI count them; an empty list takes all.
    if not shares_gpus(os.environ) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        arguments["local_device_ids"] = []
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the processes of this run did not find one another ({reason}): --coordinator=HOST:PORT, --num_processes "
            "and --process_id say what the environment does not, and --nodistributed runs this process alone"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that prints, logs and writes."""
    return jax.process_index() == 0


def check_same(values: Mapping[str, Any]) -> None:
    """Raises `UserError`, in every process, where what JSON has of these values is not the same in all; names which."""
    if jax.process_count() == 1:
        return
    everyones = [json.loads(said) for said in _gather(json.dumps(values))]
    differing = {}  # {name: the value in process 0, in another, and which that is}
    for number, theirs in enumerate(everyones):
        for name in theirs.keys() | everyones[0].keys():
            ours, other = everyones[0].get(name, "absent"), theirs.get(name, "absent")
            if other != ours:
                differing.setdefault(name, f"{name} ({ours} in process 0, {other} in process {number})")
    if differing:
        raise UserError(
            f"the processes of this run differ: {', '.join(differing[name] for name in sorted(differing))}; "
            "start all with the same arguments, and give them the same text"
        )


def _gather(text: str) -> list[str]:
    """What each process has said, by their numbers, in all of them."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - data.size)))  # one shape for all
    return [row[:size].tobytes().decode() for row, size in zip(padded, sizes, strict=True)]


def end(code: int) -> NoReturn:
    """Leaves at once with an exit code, after an error.

    An ordinary end would wait: for threads of a save that failed, which wait for it for ever, and for other processes,
    which wait for this one. Those are told by the coordinator that it is gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave(code: int | str | None) -> NoReturn:
    """Leaves with an exit code when all is done: with the other processes, and within `_PATIENCE` after them.

    A save that failed on the way may have left threads that never end.
    """
    if isinstance(code, str):  # as `sys.exit` takes it
        print(code, file=sys.stderr)
        code = 1
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    at_last = threading.Timer(_PATIENCE, end, (code or 0,))
    at_last.daemon = True
    at_last.start()
    sys.exit(code)
