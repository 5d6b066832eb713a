"""What the benchmarks share: timing in turn, ratios with their spread, the facts of the machine, JSON.

Times of one case drift with whatever else the machine does, by more than the differences that we look for. So every
case runs once a round, in an order that is shuffled each round, and cases are compared round by round: a slow minute is
slow for both sides of a ratio. Quote medians with quartiles.
"""

import gc
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from wavelet_jax.errors import UserError, unknown
from wavelet_jax.files import atomic
from wavelet_jax.runs import directory

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "x-transformers")  # whose versions are kept, where installed
QUARTILES = (0.25, 0.5, 0.75)


def in_turn(cases: Mapping[str, Callable[[], None]], rounds: int, warmups: int = 2) -> dict[str, np.ndarray]:
    """Seconds of every case, float64 [rounds], measured in turn.

    Args:
      cases: what to time; a call returns when its work is done (`jax.block_until_ready`), not when it is queued.
      rounds: times that every case is run, once each in an order that is shuffled anew (by a fixed seed).
      warmups: calls of every case before the first round, not counted: compiling, caches, the allocator.

    Raises:
      UserError: no case, no round, or a negative number of warm-ups.
    """
    if not cases:
        raise UserError("there is no case to measure")
    directory.check_least({"rounds": (rounds, 1), "warmups": (warmups, 0)})
    names = list(cases)
    times = {name: np.empty(rounds) for name in names}
    with _progress("warm-up", warmups * len(names)) as progress:
        for name in names * warmups:
            cases[name]()
            progress.update()
    order = np.random.default_rng(0)
    gc.disable()  # else a collection is the time of whichever case it falls into
    try:
        with _progress("rounds", rounds * len(names)) as progress:
            for i in range(rounds):
                gc.collect()
                for name in order.permutation(names).tolist():
                    start = time.perf_counter()
                    cases[name]()
                    times[name][i] = time.perf_counter() - start
                    progress.update()
    finally:
        gc.enable()
    return times


def ratios(times: Mapping[str, np.ndarray], base: str) -> dict[str, tuple[float, float, float]]:
    """{case: (lower quartile, median, upper quartile)} of its time over the base's time in the same round.

    The median of ratios is not the ratio of medians. Raises `UserError` where `base` was not measured.
    """
    if base not in times:
        raise unknown("case", base, times)
    return {name: quartiles(seconds / times[base]) for name, seconds in times.items()}


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of numbers [N]."""
    low, middle, high = np.quantile(values, QUARTILES)
    return float(low), float(middle), float(high)


def environment() -> dict[str, Any]:
    """What a time cannot be read without: device, CPU, threads, versions, date (UTC), command; all fit for JSON."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cpu": _cpu(),
        "threads": threads(),
        "load_average": os.getloadavg()[0],  # over the last minute: about 0 on a quiet machine
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def threads() -> int:
    """Cores that this process may use, which is how many threads XLA's CPU runtime takes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes JSON, whole or not at all; arrays become lists. Raises `UserError` where the folder cannot be made."""
    directory.check_folder(path.parent)
    with atomic.replaced(path) as partial:
        partial.write_text(json.dumps(results, indent=1, default=_plain, allow_nan=False) + "\n")


def _progress(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"{what:>8}", mininterval=directory.PROGRESS_INTERVAL, leave=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def _cpu() -> str:
    """The processor's model, as Linux says it, or what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
