"""The project's folder, and processes started in it."""

import os
import socket
import subprocess
import sys
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


def program(name: str, *arguments: object) -> list[str]:
    """The command that starts a program of tests/programs."""
    return [sys.executable, str(ROOT / "tests" / "programs" / f"{name}.py"), *map(str, arguments)]


def run(command: list[str], *, devices: int | None = None, **options) -> subprocess.CompletedProcess:
    """Runs a command in the project's folder, in `environment`; what it says is captured as text."""
    options = {"cwd": ROOT, "env": environment(devices=devices), "text": True, "check": False} | options
    return subprocess.run(command, capture_output=True, **options)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
