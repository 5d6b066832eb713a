"""The devices that programs run on, or are compiled for without being there: how fast they are, how much they hold."""

import contextlib
import contextvars
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.errors import UserError
from wavelet_jax.hardware import memory

# FLOP/s of dense products in bfloat16, by `device_kind`: of one JAX device, as its maker's data sheet has it.
PEAK_FLOPS = {
    # docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x. A TPU7x chip (2,307 TFLOP/s) is two JAX devices.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    # NVIDIA's data sheets of each; where they quote sparse products, half of that.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}

# Bytes that a TPU's compiler lets a program have, of the 32, 16, 95, 32 and 96 GiB of a device: from the message of
# libtpu 0.0.42.1 to a program that is too large.
TPU_MEMORY = {
    "TPU v4": int(30.75 * 2**30),
    "TPU v5 lite": int(15.75 * 2**30),
    "TPU v5": int(95.74 * 2**30),
    "TPU v5p": int(95.74 * 2**30),
    "TPU v6 lite": int(31.25 * 2**30),
    "TPU7x": int(94.75 * 2**30),
}

# Device files of TPUs (two drivers), NVIDIA's GPUs and AMD's.
_ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")

# What libtpu is told of the machine that it compiles on: to look for no TPU there, which takes minutes of questions to
# Google's metadata server and gives warnings, and to leave the lock of a TPU that is there to those that compute on it.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_target: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiled_for(devices: list[Any]) -> Iterator[None]:
    """Traces and compiles what is inside for these devices, which need not exist (see `topology`)."""
    token = _target.set(devices)
    try:
        yield
    finally:
        _target.reset(token)


def current() -> list[Any]:
    """The devices that programs are for: those of `compiled_for`, or all that JAX has."""
    return _target.get() or jax.devices()


def platform() -> str:
    """The kind of the devices: cpu, gpu or tpu."""
    target = _target.get()
    return jax.default_backend() if target is None else target[0].platform


def count() -> int:
    """The number of devices."""
    target = _target.get()
    return jax.device_count() if target is None else len(target)


def topology(name: str) -> list[Any]:
    """The devices of a TPU slice that is not there, to compile for: "v5e:16x16", "v5p:4x4x4".

    Call it before anything asks JAX for its devices: JAX is set to leave the devices of this machine alone.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """

    def no_slice(reason: str) -> UserError:
        return UserError(f"--topology={name} is not a slice ({reason}): there are v5e:16x16, v5p:4x4x4")

    # libtpu takes an empty name for another device, and a third dimension where chips lie in a plane.
    if not re.fullmatch(r"v[56]e:\d+x\d+|(?!v[56]e)\w+:\d+(x\d+)*", name):
        raise no_slice("not a generation and its chips, v5e and v6e in two dimensions")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology needs the TPU's compiler, libtpu: pip install 'wavelet-jax[tpu]'")
    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    # Jobs on a v4 see its two cores as one device; libtpu's own choice here would be two.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except (RuntimeError, ValueError) as error:
        raise no_slice(" ".join(str(error).split())) from error


def limit(device: Any) -> int | None:
    """Bytes of a device that a program can have: of its share where several share a memory; None where not known."""
    if device.platform == "tpu" and device.device_kind in TPU_MEMORY:
        return TPU_MEMORY[device.device_kind]
    if device.platform == "cpu":
        return memory.available()[0] // jax.local_device_count()
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is not there has no statistics
        return None


def matrix_product(dtype: str, size: int) -> tuple[Callable[[], None], float]:
    """A product of two square matrices on the first device, to be timed.

    Returns:
      run: computes it once, and returns when it is done.
      flops: of one product.
    """
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32), dtype)
    product = jax.jit(jnp.dot)
    return lambda: jax.block_until_ready(product(matrix, matrix)), 2.0 * size**3


@functools.cache
def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s of one of the `current` devices at its best, and where the number is from, in words.

    That of `PEAK_FLOPS`, in bfloat16 whatever the dtype; on a device that is not listed there, what the quickest of a
    few products of `dtype` reaches (a quarter of a second, once a process).
    """
    kind = current()[0].device_kind
    if kind in PEAK_FLOPS:
        return PEAK_FLOPS[kind], f"{kind}, bfloat16"
    run, flops = matrix_product(dtype, 1024 if platform() == "cpu" else 8192)
    run()
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return flops / min(seconds), f"{kind}, a product of {dtype} matrices measured"


def total_flops(dtype: str) -> float:
    """FLOP/s of all devices together at their best. A machine's CPU is one, however many devices JAX makes of it."""
    copies = jax.process_count() if platform() == "cpu" else count()
    return copies * peak_flops(dtype)[0]


def has_accelerator(files: Path = Path("/dev")) -> bool:
    """Whether this machine has an accelerator that JAX may compute on, without asking JAX, which would take it."""
    allowed = os.environ.get("JAX_PLATFORMS", "").split(",")
    return allowed != ["cpu"] and any(any(files.glob(pattern)) for pattern in _ACCELERATORS)
