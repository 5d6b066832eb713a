"""How much memory there is, and what a compiled program takes of it."""

import os
import resource
import sys

import jax


def available() -> tuple[int, str]:
    """Bytes that programs can have, and what has them, in words.

    That of all devices of this process together, since what is split over them is not known while tracing; that of the
    machine where the devices do not say (CPUs).
    """
    if not _devices_say():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine"
    devices = jax.local_devices()
    return sum(device.memory_stats()["bytes_limit"] for device in devices), f"{len(devices)} x {devices[0].device_kind}"


def in_use() -> int:
    """Bytes of the memory of `available` that this process holds now; 0 where the system does not say."""
    if _devices_say():
        return sum(device.memory_stats().get("bytes_in_use", 0) for device in jax.local_devices())
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak() -> int:
    """The most bytes of the memory of `available` that this process has held."""
    if _devices_say():
        return sum(device.memory_stats().get("peak_bytes_in_use", 0) for device in jax.local_devices())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def kept(count: int) -> int:
    """Bytes that an allocator may hold beside large arrays of this many bytes, made again after they were freed.

    In a machine's memory as many again: glibc does not fit an aligned array into the hole that one of its size left
    (seen with caches of 512 MiB: a second one raised what the process held by 0.5 GiB, and later ones did not).
    """
    return 0 if _devices_say() else count


def _devices_say() -> bool:
    return all("bytes_limit" in (device.memory_stats() or {}) for device in jax.local_devices())


def needed(program: jax.stages.Compiled) -> int:
    """Bytes of the arguments, results and temporary arrays of a program, on all devices of this process together."""
    analysis = program.memory_analysis()
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return (kept + analysis.temp_size_in_bytes) * jax.local_device_count()


def shown(count: int) -> str:
    """'1.3 GiB' or '12 MiB'."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
