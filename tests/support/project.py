"""The project's folder, and processes started in it."""

import os
import socket
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(*, devices: int | None = None, **variables: str) -> dict[str, str]:
    """The environment of a process that imports the project and the tests' support from wherever it is started.

    Args:
      devices: virtual CPU devices.
      **variables: more of the environment.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    flags = {} if devices is None else {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return {**os.environ, "PYTHONPATH": path, **flags, **variables}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
