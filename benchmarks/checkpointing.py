"""What a checkpoint costs a run: updates with a save in the background, with one that is waited for, and without.

    python benchmarks/checkpointing.py                                                    the quickstart model
    python benchmarks/checkpointing.py --every=20 --rounds=10 --folder=/mnt/shared/tmp    a checkpoint every 20 updates

A case is `--every` updates of one model, the cases take turns (benchmarks/measure.py), and quoted are medians of ratios
over rounds [quartiles]. All three end with every update made and every checkpoint on the disk with its checksums, so a
save in the background counts as free only as far as it is over when the updates are. Beside them stand the seconds of
reading a checkpoint's checksums, what a restart pays.
"""

import contextlib
import itertools
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import flags

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ and configs/ are not installed

from benchmarks import measure
from configs import quickstart
from wavelet_jax.commands import cli
from wavelet_jax.data.tokenizers import Byte
from wavelet_jax.files.reading import user_path
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import checkpoint, checksums, directory
from wavelet_jax.training import steps

EVERY = flags.DEFINE_integer("every", 50, "updates between two checkpoints")
ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of every case")
FOLDER = flags.DEFINE_string(
    "folder", None, "where checkpoints are written and removed; a temporary folder if left out"
)
OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "results" / "checkpointing.json"), "the results")

WITHOUT, BACKGROUND, WAITED = "without", "in the background", "waited for"


def main() -> None:
    directory.check_least({"--every": (EVERY.value, 1), "--rounds": (ROUNDS.value, 1)})
    environment = measure.environment()  # first, so that its load average is that of others
    config = quickstart.get_config("wavelet")
    mesh = sharding.make_mesh(config)
    graphdef, state, _ = steps.init(config, Byte.vocab_size, mesh)
    train_step = jax.jit(steps.make_train_step(config, graphdef), donate_argnums=0)
    shape = (1, config.train.batch_size, config.train.length + 1)
    tokens = np.random.default_rng(0).integers(Byte.vocab_size, size=shape).astype(np.int32)
    tokens = jax.device_put(tokens, sharding.batch_sharding(mesh, leading=1))

    with contextlib.ExitStack() as stack:
        folder = user_path(FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory()), "--folder")
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        manager = stack.enter_context(checkpoint.open_manager(workdir, config))

        def case(name: str) -> None:
            nonlocal state
            step = int(state.step)
            if name != WITHOUT:
                checkpoint.save(manager, int(state.step), state, windows=0, fingerprint="")
            if name == WAITED:
                checkpoint.wait(manager, step)
            for _ in range(EVERY.value):
                state, _ = train_step(state, tokens)
            jax.block_until_ready(state)
            if name == BACKGROUND:
                checkpoint.wait(manager, step)

        cases = {name: lambda name=name: case(name) for name in (WITHOUT, BACKGROUND, WAITED)}
        times = measure.in_turn(cases, ROUNDS.value)
        newest = workdir / "checkpoints" / str(checkpoint.latest_step(workdir))
        size = sum(path.stat().st_size for path in newest.rglob("*"))
        reading = measure.in_turn({"checksums": lambda: checksums.damage(newest)}, ROUNDS.value)["checksums"]

    ratios = measure.ratios(times, WITHOUT)
    results = {
        "environment": environment,
        "every": EVERY.value,
        "parameters": steps.count_parameters(state.params),
        "checkpoint_bytes": size,
        "seconds": times,
        "ratios": ratios,
        "checksums_seconds": measure.quartiles(reading),
    }
    measure.write_results(user_path(OUT.value, "--out"), results)
    print(f"{EVERY.value} updates, {results['parameters']:,} parameters, checkpoints of {size / 1e6:.1f} MB")
    for name, (low, median, high) in itertools.islice(ratios.items(), 1, None):
        print(f"  a checkpoint {name:18} {median:.3f} [{low:.3f}, {high:.3f}] of the time without")
    print(f"  its checksums are read in {np.median(reading) * 1e3:.1f} ms; {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
