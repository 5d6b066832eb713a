"""Attention alone: every backend and method against RoPE, plain attention, the paper's own forms, and PyTorch.

    python benchmarks/attention.py                                              tiles on a CPU, 1,024 to 4,096
    python benchmarks/attention.py --lengths=16384 --baselines= --rounds=5      as long as the definition never gets
    python benchmarks/attention.py --backends=triton_gpu,cudnn --dtype=bfloat16 --lengths=4096,32768 --baselines=plain

Causal, one sequence; queries, keys, values and the cotangent are random. At each length all cases take turns in one
process, every one once a round (benchmarks/measure.py): ratios are medians over rounds [quartiles]. Shares of FLOP/s
and of bytes/s are those of plain attention's arithmetic, and of reading and writing each array once, in what a large
matrix product and a large copy reach on the same device. Peak memory is that of a process for each case: the four
arrays, and what running it adds. The command keeps freed memory from the operating system for all sides
(wavelet_jax/commands/cli.py): fresh pages cost more than small differences.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch has to find room on the same accelerator
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks import baselines, measure
from wavelet_jax import positions
from wavelet_jax.attention import BACKENDS, attention
from wavelet_jax.commands import cli
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.files.reading import user_path
from wavelet_jax.hardware import devices, memory
from wavelet_jax.runs import directory

PASSES = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16", "float16")
BASELINES = (*baselines.JAX, *baselines.TORCH)
QUADRATIC = ("plain", "tip 2", "torch tip 2", "torch flex")  # several [H, L, L] arrays at a time
BASE = "rope"

LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048", "4096"], "tokens")
HEADS = flags.DEFINE_integer("heads", 4, "heads of queries, keys and values")
HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "size of a head")
DTYPE = flags.DEFINE_string("dtype", "float32", " | ".join(DTYPES))
BACKEND_NAMES = flags.DEFINE_list("backends", ["tiled"], "of wavelet_jax.attention.BACKENDS")
METHODS = flags.DEFINE_list("methods", ["wavelet"], "position methods; rope, what they are set against, is added")
BASELINE_NAMES = flags.DEFINE_list("baselines", list(BASELINES), ", ".join(BASELINES) + "; empty: none")
PASS_NAMES = flags.DEFINE_list("passes", list(PASSES), " | ".join(PASSES))
ROUNDS = flags.DEFINE_integer("rounds", 15, "turns of every case")
MEMORY = flags.DEFINE_bool("memory", True, "measure the peak memory of our cases too, a process for each")
OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "results" / "attention.json"), "the results; .png beside")
ONE = flags.DEFINE_string("one", "", "used by the command itself: print the peak memory of this one case, in bytes")


def main() -> None:
    out = user_path(OUT.value, "--out")
    _check(out)
    if ONE.value:
        print(json.dumps({"peak_bytes": _peak(ONE.value, int(LENGTHS.value[0]), PASS_NAMES.value[0])}))
        return
    results = {
        "environment": measure.environment(),
        "shape": {"heads": HEADS.value, "head_dim": HEAD_DIM.value, "dtype": DTYPE.value, "batch": 1},
        "ceilings": ceilings(DTYPE.value),
        "rows": [],
    }
    for length in map(int, LENGTHS.value):
        for name in PASS_NAMES.value:
            results["rows"] += _measure(length, name)
            print(table(results, length, name), flush=True)
            measure.write_results(out, results)  # what there is so far
    add_exponents(results["rows"])
    measure.write_results(out, results)
    draw(results, out.with_suffix(".png"))
    print(f"{out}, {out.with_suffix('.png')}")


def _measure(length: int, name: str) -> list[dict]:
    """The rows of one length and pass: a case each."""
    backward = name != PASSES[0]
    cases, rows = {}, []
    for case in _names():
        try:
            cases[case] = _make(case, length, backward)
        except UserError as error:
            rows.append({"case": case, "length": length, "pass": name, "left_out": str(error)})
    times = measure.in_turn(cases, ROUNDS.value)
    del cases  # frees their arrays before the processes below
    for case, seconds in times.items():
        backend = case.split()[0]
        base = f"{backend} {BASE}" if backend in BACKEND_NAMES.value else f"{BACKEND_NAMES.value[0]} {BASE}"
        row = {"case": case, "length": length, "pass": name, "seconds": measure.quartiles(seconds)}
        row["base"], row["over_base"] = base, measure.ratios(times, base)[case]
        row["flops_per_second"] = flops(length, backward) / float(np.median(seconds))
        row["bytes_per_second"] = least_bytes(length, backward) / float(np.median(seconds))
        row["seconds_in_rounds"] = seconds
        if MEMORY.value and backend in BACKEND_NAMES.value:
            row["peak_bytes"] = _peak_of_a_process(case, length, name)
        rows.append(row)
    return rows


def _names() -> list[str]:
    methods = dict.fromkeys([BASE, *METHODS.value])
    return [f"{backend} {method}" for backend in BACKEND_NAMES.value for method in methods] + BASELINE_NAMES.value


def _make(case: str, length: int, backward: bool):
    """Runs the case once. Raises `UserError` with the reason where it cannot be had here."""
    heads, head_dim = HEADS.value, HEAD_DIM.value
    one = 4 * heads * length**2  # bytes of a float32 array of scores
    needed = {"tip 1": 3 * 4 * head_dim * length**2}.get(case, 6 * one if case in QUADRATIC else 0)
    available = memory.available()[0]
    if needed > available / 2:
        raise UserError(f"needs about {memory.shown(needed)} of {memory.shown(available)}")
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((1, length, heads, head_dim), np.float32) for _ in range(4)]
    if case in baselines.TORCH:
        if backward and case in baselines.FORWARD_ONLY:
            raise UserError("has no backward pass on a CPU")
        if jax.default_backend() != "cpu":
            raise UserError("PyTorch is compared on a CPU only")
        try:
            import torch
        except ImportError:
            raise UserError("PyTorch is not installed: pip install -e '.[bench]'") from None
        torch.set_num_threads(measure.threads())
        return baselines.torch_case(baselines.TORCH[case], arrays, backward, DTYPE.value)
    function = baselines.JAX[case] if case in baselines.JAX else _ours(*case.split())
    return baselines.jax_case(function, [array.astype(jnp.dtype(DTYPE.value)) for array in arrays], backward)[0]


def _ours(backend: str, name: str):
    method = positions.make(name, num_heads=HEADS.value, head_dim=HEAD_DIM.value)
    terms = method.terms(method.init(jax.random.key(0))).without_embedding()
    return lambda query, key, value: attention(query, key, value, terms, backend=backend)


def flops(length: int, backward: bool) -> float:
    """Of causal attention without positions: 2 products of [L, D] and [D, L], and 5 more backward, half of each."""
    return (7 if backward else 2) * HEADS.value * length**2 * HEAD_DIM.value


def least_bytes(length: int, backward: bool) -> int:
    """What must go between memory and device: query, key, value, output; backward a gradient of each as well."""
    array = length * HEADS.value * HEAD_DIM.value * jnp.dtype(DTYPE.value).itemsize
    return (8 if backward else 4) * array


def ceilings(dtype: str) -> dict[str, float]:
    """What this device reaches in this process: a large matrix product (FLOP/s), a large copy (bytes/s, both ways)."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    product, product_flops = devices.matrix_product(dtype, size)
    vector = jnp.ones(2**26, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    times = measure.in_turn(
        {
            "product": product,
            "copy": lambda: jax.block_until_ready(copy(vector)),
        },
        9,
    )
    product_seconds, copy_seconds = (float(np.median(times[name])) for name in ("product", "copy"))
    return {"flops_per_second": product_flops / product_seconds, "bytes_per_second": 2 * vector.nbytes / copy_seconds}


# -- memory -----------------------------------------------------------------------------------------------------------


def _peak_of_a_process(case: str, length: int, name: str) -> int:
    given = {"heads": HEADS.value, "head_dim": HEAD_DIM.value, "dtype": DTYPE.value, "out": OUT.value}
    given |= {"one": case, "lengths": length, "passes": name, "backends": ",".join(BACKEND_NAMES.value)}
    command = [sys.executable, __file__, *(f"--{flag}={value}" for flag, value in given.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the process of {case} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"]


def _peak(case: str, length: int, name: str) -> int:
    """Bytes of the four arrays that the case is given, and of all that running it once adds at its height."""
    given = 4 * length * HEADS.value * HEAD_DIM.value * jnp.dtype(DTYPE.value).itemsize
    run = _make(case, length, name != PASSES[0])
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        before = stats["bytes_in_use"]
        run()
        return given + jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] - before
    # What compiling has freed would otherwise be there already, and running seem to need less than it does.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew, from what is there now
    except OSError as error:
        raise UserError(f"peak memory is read from Linux's /proc, which fails here ({error}): --nomemory") from None
    before = _status("VmRSS")
    run()
    return given + _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


# -- results ----------------------------------------------------------------------------------------------------------


def add_exponents(rows: list[dict]) -> None:
    """By how much time and memory grow with length from the length before, as exponents of L, into the rows."""
    before = {}
    for row in rows:
        if "seconds" not in row:
            continue
        key = row["case"], row["pass"]
        if key in before:
            shorter = before[key]
            step = np.log(row["length"] / shorter["length"])
            row["time_exponent"] = float(np.log(row["seconds"][1] / shorter["seconds"][1]) / step)
            if min(row.get("peak_bytes", 0), shorter.get("peak_bytes", 0)) > 0:
                row["memory_exponent"] = float(np.log(row["peak_bytes"] / shorter["peak_bytes"]) / step)
        before[key] = row


def table(results: dict, length: int, name: str) -> str:
    """The rows of one length and pass, as text."""
    rows = [row for row in results["rows"] if (row["length"], row["pass"]) == (length, name)]
    peaks = results["ceilings"]
    header = f"{'':22}{'ms':>9}  {'over RoPE':>22}  {'of FLOP/s':>9}  {'of bytes/s':>10}  {'peak MiB':>9}"
    lines = [f"\n{length:,} tokens, {name}", header]
    for row in rows:
        if "left_out" in row:
            lines.append(f"{row['case']:22}left out: {row['left_out']}")
            continue
        low, middle, high = row["over_base"]
        memory_ = f"{row['peak_bytes'] / 2**20:9,.0f}" if "peak_bytes" in row else ""
        ratio = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
        arithmetic, traffic = (row[rate] / peaks[rate] for rate in ("flops_per_second", "bytes_per_second"))
        shares = f"{arithmetic:9.0%}  {traffic:10.1%}"
        lines.append(f"{row['case']:22}{1e3 * row['seconds'][1]:9,.1f}  {ratio:>22}  {shares}  {memory_}")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Ratio to RoPE, time, and memory, by length."""
    from matplotlib import pyplot as plt

    fields = {"over_base": "time over RoPE's", "seconds": "seconds", "peak_bytes": "peak bytes"}
    shown = [(field, label) for field, label in fields.items() if any(field in row for row in results["rows"])]
    passes = list(dict.fromkeys(row["pass"] for row in results["rows"]))
    figure, axes = plt.subplots(len(passes), len(shown), figsize=(4.3 * len(shown), 3.6 * len(passes)), squeeze=False)
    names = list(dict.fromkeys(row["case"] for row in results["rows"]))
    for line, name in zip(axes, passes, strict=True):
        for ax, (field, label) in zip(line, shown, strict=True):
            for i, case in enumerate(names):
                rows = [r for r in results["rows"] if (r["case"], r["pass"]) == (case, name) and field in r]
                if not rows:
                    continue
                lengths, values = [r["length"] for r in rows], [np.atleast_1d(r[field]) for r in rows]
                style = {"color": f"C{i}", "marker": "o", "markersize": 4, "label": case}
                middle = np.array([value[len(value) // 2] for value in values])
                low, high = (np.array([value[end] for value in values]) for end in (0, -1))
                ax.errorbar(lengths, middle, yerr=[middle - low, high - middle], capsize=2, **style)
            ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title=name)
            ticks = sorted({row["length"] for row in results["rows"]})
            ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    environment = results["environment"]
    stamp = f"{environment['device']}, {environment['cpu']}, {environment['threads']} threads, {environment['date']}"
    figure.text(0.99, 0.005, stamp, ha="right", fontsize=7, color="gray")
    figure.tight_layout(rect=(0, 0.02, 1, 0.93))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _check(out: Path) -> None:
    directory.check_folder(out.parent)
    try:
        lengths = [int(length) for length in LENGTHS.value]
    except ValueError:
        raise UserError(f"--lengths takes whole numbers, not {','.join(LENGTHS.value)}") from None
    directory.check_least(
        {
            "shortest of --lengths": (min(lengths, default=0), 1),
            "--heads": (HEADS.value, 1),
            "--head_dim": (HEAD_DIM.value, 1),
            "--rounds": (ROUNDS.value, 1),
        }
    )
    for what, names, allowed in (
        ("dtype", [DTYPE.value], DTYPES),
        ("backend", BACKEND_NAMES.value or [""], BACKENDS),
        ("position method", METHODS.value, positions.METHODS),
        ("baseline", BASELINE_NAMES.value, BASELINES),
        ("pass", PASS_NAMES.value or [""], PASSES),
    ):
        for name in names:
            if name not in allowed:
                raise unknown(what, name, allowed)


if __name__ == "__main__":
    cli.run(main)
