"""How much memory there is, and what a compiled program takes of it."""

import os

import jax


def available() -> tuple[int, str]:
    """Bytes that programs can have, and what has them, in words.

    That of all devices together, since what is split over them is not known while tracing; that of the machine where
    the devices do not say (CPUs).
    """
    devices = jax.devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    if None in limits:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine"
    return sum(limits), f"{len(devices)} x {devices[0].device_kind}"


def resident() -> int:
    """Bytes of the machine's memory that this process holds now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def needed(program: jax.stages.Compiled) -> int:
    """Bytes of a compiled program's arguments, results and temporary arrays, on each of its devices."""
    analysis = program.memory_analysis()
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return kept + analysis.temp_size_in_bytes


def shown(count: int) -> str:
    """'1.3 GiB' or '12 MiB'."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
