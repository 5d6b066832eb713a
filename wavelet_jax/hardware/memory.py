"""The memory of this machine, and the part of it that a compiled program needs."""

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax

ROOT = Path("/")  # where proc and sys are
ADDRESS_SPACE = "this process (ulimit -v)"


def available() -> tuple[int, str]:
    """Bytes that programs can have, and what has them, in words.

    That of all devices of this process together, since what is split over them is not known while tracing; the least
    of `limits` where the devices do not say (CPUs).
    """
    if not _devices_say():
        return min(limits())
    devices = jax.local_devices()
    return sum(device.memory_stats()["bytes_limit"] for device in devices), f"{len(devices)} x {devices[0].device_kind}"


def limits() -> list[tuple[int, str]]:
    """All that bounds the memory of this process beside its devices: (bytes, what has them, in words).

    The machine; the control groups of a container, version 1 and 2, with the groups that they are in; and the limit of
    the process's own address space. A limit that cannot be read, or is none, is left out.
    """
    found = [(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine")]
    for file in _control_group_files():
        count = _number_in(file)
        if count:
            found.append((count, f"the control group of this process (/{file.relative_to(ROOT)})"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found.append((soft, ADDRESS_SPACE))
    return found


def _control_group_files() -> Iterator[Path]:
    """The files that may hold a limit of memory, of the process's groups and of all groups around them.

    /proc/self/cgroup names the process's group in each hierarchy, /proc/self/mountinfo where a hierarchy is mounted and
    which of its groups is the root of the mount: in a container often the container's own (man 7 cgroups).
    """
    groups = {}  # {"memory" for version 1, "" for version 2: the process's group}
    for line in _lines(ROOT / "proc/self/cgroup"):
        if len(parts := line.split(":", 2)) == 3:
            groups |= dict.fromkeys(parts[1].split(","), parts[2])
    for line in _lines(ROOT / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mount, kind = before.split(), after.split()
        if len(mount) < 5 or not kind:
            continue
        if kind[0] == "cgroup2":
            group, name = groups.get(""), "memory.max"
        elif kind[0] == "cgroup" and "memory" in kind[-1].split(","):
            group, name = groups.get("memory"), "memory.limit_in_bytes"
        else:
            continue
        top, point = (_unescaped(field) for field in mount[3:5])
        folder = ROOT / point.lstrip("/")
        yield folder / name
        with contextlib.suppress(ValueError):  # a group that is not below the root of the mount cannot be seen
            below = PurePosixPath(group or "/").relative_to(top)
            for part in below.parts if ".." not in below.parts else ():
                folder /= part
                yield folder / name


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _number_in(file: Path) -> int | None:
    """The positive whole number in a file; None if it holds anything else."""
    text = "".join(_lines(file)).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) else None


def _unescaped(field: str) -> str:
    """A path of /proc/self/mountinfo, which has blanks and backslashes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def in_use() -> int:
    """Bytes of the memory of `available` that this process holds now; 0 where the system does not say.

    Of a limited address space, all that is mapped counts, as it does for the limit; otherwise what lies in memory.
    """
    if _devices_say():
        return sum(device.memory_stats().get("bytes_in_use", 0) for device in jax.local_devices())
    pages = "".join(_lines(ROOT / "proc/self/statm")).split()
    column = 0 if available()[1] == ADDRESS_SPACE else 1
    return int(pages[column]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > column else 0


def peak() -> int:
    """The most bytes of the memory of `available` that this process has held; counted as by `in_use`."""
    if _devices_say():
        return sum(device.memory_stats().get("peak_bytes_in_use", 0) for device in jax.local_devices())
    if available()[1] == ADDRESS_SPACE:
        for line in _lines(ROOT / "proc/self/status"):
            if line.startswith("VmPeak:"):
                return int(line.split()[1]) * 1024
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
    analysis: Any = program.memory_analysis()
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return (kept + analysis.temp_size_in_bytes) * jax.local_device_count()


def shown(count: int) -> str:
    """'1.3 GiB' or '12 MiB'."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
