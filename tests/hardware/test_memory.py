"""How much memory there is: the machine's, or less in a container or under a limit of the process."""

import os
import resource
import subprocess
from pathlib import Path

import pytest
from support.project import ROOT, environment, program

from wavelet_jax.hardware import memory

GIB = 2**30
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
V1_NONE = "9223372036854771712"  # what version 1 says where there is no limit


@pytest.fixture
def system(tmp_path, monkeypatch):
    """`system(files)`: proc and sys as {path: text} says, and nothing else there."""
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(files: dict[str, str | bytes]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def v2(group: str = "/", top: str = "/", point: str = "/sys/fs/cgroup") -> dict[str, str]:
    """A machine with version 2 alone."""
    return {
        "proc/self/cgroup": f"0::{group}\n",
        "proc/self/mountinfo": "23 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"31 23 0:28 {top} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
    }


def v1(group: str = "/", top: str = "/") -> dict[str, str]:
    """A machine with a hierarchy of version 1 for each controller, and an empty one of version 2."""
    return {
        "proc/self/cgroup": f"9:name=systemd:/\n5:cpu,cpuacct:/elsewhere\n4:memory:{group}\n0::/\n",
        "proc/self/mountinfo": f"32 31 0:29 {top} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:7 - cgroup cgroup rw,memory\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n",
    }


@pytest.mark.parametrize(
    ("files", "expected", "where"),
    [
        # Version 2, as a container with a namespace of its own sees it: it is the root.
        (v2() | {"sys/fs/cgroup/memory.max": "1073741824\n"}, GIB, "/sys/fs/cgroup/memory.max"),
        # A service of a machine: its group, and the slice that it is in, of which the smaller one holds.
        (
            v2("/system.slice/train.service") | {"sys/fs/cgroup/system.slice/train.service/memory.max": "1073741824"},
            GIB,
            "/sys/fs/cgroup/system.slice/train.service/memory.max",
        ),
        (
            v2("/a.slice/b.slice/c.scope")
            | {
                "sys/fs/cgroup/a.slice/memory.max": "3221225472\n",
                "sys/fs/cgroup/a.slice/b.slice/memory.max": "2147483648\n",
                "sys/fs/cgroup/a.slice/b.slice/c.scope/memory.max": "max\n",
            },
            2 * GIB,
            "/sys/fs/cgroup/a.slice/b.slice/memory.max",
        ),
        # A container without a namespace: the mount's root is the container's group.
        (v2("/docker/ab12", "/docker/ab12") | {"sys/fs/cgroup/memory.max": "1073741824"}, GIB, "/memory.max"),
        (
            v2("/docker/ab12/job", "/docker/ab12") | {"sys/fs/cgroup/job/memory.max": "1073741824"},
            GIB,
            "/sys/fs/cgroup/job/memory.max",
        ),
        # A group outside of the namespace, of which there is nothing to see but the root.
        (v2("/../../other") | {"sys/fs/cgroup/memory.max": "1073741824"}, GIB, "/sys/fs/cgroup/memory.max"),
        (v2("/elsewhere", "/docker/ab12") | {"sys/fs/cgroup/memory.max": "1073741824"}, GIB, "/memory.max"),
        # Blanks in paths.
        (
            v2("/my jobs", point="/control\\040groups") | {"control groups/my jobs/memory.max": "1073741824"},
            GIB,
            "/control groups/my jobs/memory.max",
        ),
        # Version 1.
        (
            v1() | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n"},
            GIB,
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        ),
        (
            v1("/docker/ab12/step")
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE,
                "sys/fs/cgroup/memory/docker/memory.limit_in_bytes": V1_NONE,
                "sys/fs/cgroup/memory/docker/ab12/memory.limit_in_bytes": "1073741824\n",
                "sys/fs/cgroup/memory/docker/ab12/step/memory.limit_in_bytes": "2147483648\n",
            },
            GIB,
            "/sys/fs/cgroup/memory/docker/ab12/memory.limit_in_bytes",
        ),
        (
            v1("/slurm/job_1", "/slurm/job_1") | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824"},
            GIB,
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        ),
        # Limits of other controllers' groups are not of memory.
        (v1() | {"sys/fs/cgroup/cpu/elsewhere/memory.limit_in_bytes": "1073741824"}, MACHINE, "this machine"),
        # Both: the memory is counted by version 1.
        (v1("/a") | {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1073741824"}, GIB, "/memory/a/"),
        # None, or none that can be read.
        ({}, MACHINE, "this machine"),
        (v2() | {"sys/fs/cgroup/memory.max": "max\n"}, MACHINE, "this machine"),
        (v1() | {"sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE}, MACHINE, "this machine"),
        (v2(), MACHINE, "this machine"),
        (v2() | {"sys/fs/cgroup/memory.max": str(2**62)}, MACHINE, "this machine"),
        *(
            (v2() | {"sys/fs/cgroup/memory.max": text}, MACHINE, "this machine")
            for text in ("", "-1", "0", "1 GiB", "²")
        ),
        (v2() | {"sys/fs/cgroup/memory.max": b"\xff\xfe\0"}, MACHINE, "this machine"),
        (
            {"proc/self/cgroup": "garbage\n:::\n", "proc/self/mountinfo": " - \n1 2\n - cgroup2"},
            MACHINE,
            "this machine",
        ),
        ({"proc/self/cgroup": b"\xff\0", "proc/self/mountinfo": b"\xff - \xfe"}, MACHINE, "this machine"),
    ],
)
def test_the_least_of_all_limits_and_whose_it_is(system, files, expected, where):
    system(files)
    count, owner = memory.available()
    assert count == expected
    assert where in owner
    assert owner == "this machine" or owner.startswith("the control group of this process (/")


def test_what_cannot_be_read_is_left_out(system, tmp_path):
    system(v2("/a"))
    (tmp_path / "sys/fs/cgroup/memory.max").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/a").mkdir()
    (tmp_path / "sys/fs/cgroup/a/memory.max").symlink_to("nowhere")
    assert memory.available() == (MACHINE, "this machine")
    (tmp_path / "proc/self/mountinfo").unlink()
    (tmp_path / "proc/self/mountinfo").mkdir()
    assert memory.available() == (MACHINE, "this machine")


def test_address_space_counts_what_is_mapped(system, monkeypatch):
    """The limit is of all that is mapped, so that is what the process uses of it."""
    page = os.sysconf("SC_PAGE_SIZE")
    system({"proc/self/statm": "5000 300 200 1 0 400 0\n", "proc/self/status": "Name:\tx\nVmPeak:\t   6000 kB\n"})
    assert memory.in_use() == 300 * page
    monkeypatch.setattr(resource, "getrlimit", lambda _: (GIB, GIB))
    assert memory.available() == (GIB, "this process (ulimit -v)")
    assert memory.in_use() == 5000 * page
    assert memory.peak() == 6000 * 1024


def test_in_use_is_0_where_the_system_does_not_say(system):
    system({})
    assert memory.in_use() == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_process_under_ulimit():
    """A real one: what cannot be allocated is refused by name before it is tried."""
    limit = min(8 * GIB, MACHINE) // 1024 * 1024
    ran = subprocess.run(
        ["bash", "-c", f'ulimit -v {limit // 1024}; exec "$@"', "bash", *program("check_sizes")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=environment(JAX_PLATFORMS="cpu"),
    )
    available, mapped, refused = ran.stdout.splitlines()
    assert available == f"{limit} this process (ulimit -v)"
    assert mapped == "True"
    assert refused.startswith("this run needs at least 9.0 GiB of memory")
    assert f"this process (ulimit -v) has {memory.shown(limit)}" in refused
