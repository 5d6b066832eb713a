"""Several processes that run one program: how they find one another, and which of them speaks.

Every process of a run does the same, on the devices of all of them together; process 0 alone prints, logs and writes
what is written once. Call `start` before anything asks JAX for its devices.
"""

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import jax
import numpy as np
from jax._src import distributed  # orbax too reads the client here; there is no public name for it
from jax.experimental import multihost_utils

from wavelet_jax.errors import UserError
from wavelet_jax.parallel import peers

JOIN_TIMEOUT, PEER_TIMEOUT = 300.0, 60.0  # seconds; see `start`
_PATIENCE = 5.0  # seconds that a process that is done waits for its own threads
_LATER = 60.0  # seconds after which JAX would end a process, with a stack dump, when we have not
_LONG = 7 * 24 * 3600 * 1000  # ms; that a process is gone is found out by its silence
_watch: peers.Watch | None = None


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


def start(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    distributed: bool | None,
    join_timeout: float = JOIN_TIMEOUT,
    peer_timeout: float = PEER_TIMEOUT,
) -> None:
    """Joins the other processes, if there are any, and watches them from then on.

    Of the GPUs that it sees a process takes all, or, where others see them too, the one of its number on the node.

    A process that does not come, or that is gone later, ends this one with one line and code 2: see `peers`. Where JAX
    finds the processes in the environment, a process 0 that is killed still ends the others by JAX's own C++ error.

    Args:
      coordinator, num_processes, process_id: HOST:PORT of process 0, how many there are and which this is; or all None.
      distributed: whether to join the cluster that JAX finds; None: where the environment counts several processes.
      join_timeout: seconds within which all processes must have come.
      peer_timeout: seconds without a sign of life after which another process is taken for gone.

    Raises:
      UserError: what does not go together, or processes that did not find one another.
    """
    arguments = _arguments(coordinator, num_processes, process_id, distributed)
    if arguments is None:
        return
    for name, value in (("join_timeout", join_timeout), ("peer_timeout", peer_timeout)):
        if not 1 <= value < math.inf:
            raise UserError(f"--{name} must be at least 1 second, not {value:g}")
    # Of an address that JAX finds in the environment nothing is known before it connects.
    if coordinator and process_id:
        arguments["coordinator_address"] = peers.relay(coordinator)
    missing = f"not all processes of this run came within {join_timeout:g} s; --join_timeout waits longer"
    try:
        with peers.in_time(join_timeout, lambda: _give_up(missing)):
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=math.ceil(join_timeout + _LATER),
                heartbeat_timeout_seconds=math.ceil(peer_timeout + _LATER),
            )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the processes of this run did not find one another ({reason}): --coordinator=HOST:PORT, --num_processes "
            "and --process_id say what the environment does not, and --nodistributed runs this process alone"
        ) from error
    _watch_others(peer_timeout)


def _arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None, distributed: bool | None
) -> dict[str, Any] | None:
    """Those of `jax.distributed.initialize`; None for a process that is alone."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if not (count(os.environ) > 1 if distributed is None else distributed):
            return None
        arguments = {}
    else:
        if distributed is not None:
            raise UserError("--distributed asks the environment: leave it out beside --coordinator")
        if coordinator is None or num_processes is None or process_id is None:
            raise UserError(f"--coordinator, --num_processes and --process_id go together: --{missing[0]} is missing")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator is HOST:PORT of process 0, not {coordinator}")
        if num_processes < 1:
            raise UserError(f"--num_processes must be at least 1, not {num_processes}")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id must be 0 to {num_processes - 1}, one each, not {process_id}")
        arguments = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    # JAX alone would take one GPU per process wherever SLURM or Open MPI count them; an empty list takes all.
    if not shares_gpus(os.environ) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        arguments["local_device_ids"] = []
    return arguments


def _watch_others(patience: float) -> None:
    global _watch
    state: Any = distributed.global_state
    if state.num_processes > 1:
        _watch = peers.Watch(state.client, state.process_id, state.num_processes, patience, _give_up)
        _watch.start()


def _give_up(why: str) -> NoReturn:
    _leave_at_last(2)
    print(f"\nerror: {why}", file=sys.stderr)
    _exit(2)


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
    """The answers of all processes, by their numbers; the same in each of them."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - data.size)))  # one shape for all
    return [row[:size].tobytes().decode() for row, size in zip(padded, sizes, strict=True)]


def end(code: int) -> NoReturn:
    """Leaves at once with an exit code, after an error.

    An ordinary end would wait: for threads of a save that failed, which wait for it for ever, and for other processes,
    which wait for this one; they are informed.
    """
    if _watch is not None:
        _watch.say_ended()
    _exit(code)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_verdict() -> None:
    """After an error of JAX: if another process is gone, exits with code 2 and one line; otherwise returns."""
    if _watch is not None:
        _watch.wait()


def leave(code: int | str | None) -> NoReturn:
    """Leaves with an exit code when all is done: with the other processes, and within `_PATIENCE` after them.

    A save that failed on the way may have left threads that never end.
    """
    if isinstance(code, str):  # as `sys.exit` takes it
        print(code, file=sys.stderr)
        code = 1
    if _watch is not None:
        with contextlib.suppress(Exception):
            cast(Any, distributed.global_state.client).wait_at_barrier("wavelet_jax/leave", _LONG)
        _watch.close()
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    sys.stdout.flush()  # before, since whoever reads it may take his time
    _leave_at_last(code or 0)
    sys.exit(code)


def _leave_at_last(code: int) -> None:
    """Ends the process after `_PATIENCE`, whatever it waits for then."""
    timer = threading.Timer(_PATIENCE, os._exit, (code,))
    timer.daemon = True
    timer.start()
