"""Trains a run, or several one after another and compares them.

    python train.py                                                           the quickstart comparison
    python train.py --config=configs/wikitext2.py:rope --workdir=runs/rope    one run
    python train.py ... --config.train.steps=2000                             any key of wavelet_jax/config/default.py
    python train.py ... --compile_only --topology=v5e:16x16                   memory and time (training/plan.py)
    python train.py ... --profile_steps=100:105                               a trace (runs/profiling.py)

A run that was stopped goes on when the same command is given again, to the same losses.

Exit codes: 0 when all is done; 2 for what a user can mend, said in one line (bad input, a loss that is not finite, no
room on the disk for the last checkpoint, another process of the run that is gone); 143 after SIGTERM and 130 after
SIGINT, when the update that ran is finished and saved. A second signal ends the process at once, with the same code.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from wavelet_jax.commands import cli
from wavelet_jax.config import numeric_keys
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate
from wavelet_jax.files import places
from wavelet_jax.files.reading import user_path
from wavelet_jax.runs import stopping
from wavelet_jax.studies import compare
from wavelet_jax.training import checks, loop, plan, sizes

CONFIG = config_flags.DEFINE_config_file(
    "config", str(Path(__file__).parent / "configs" / "quickstart.py"), "what to train: FILE.py[:variant]"
)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "START:STOP, updates to trace into WORKDIR/profile")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "compile the train step, say what it takes, and do no more")
TOPOLOGY = flags.DEFINE_string("topology", None, "with --compile_only: a TPU slice to compile for, such as v5e:16x16")
UTILIZATION = flags.DEFINE_float(
    "utilization", 0.4, "with --compile_only: of the devices' peak, for the time's estimate"
)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "with --compile_only: instead of what the config's tokenizer says"
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the run, or gs://BUCKET/RUN; runs/ and the config file's name if left out"
)


def main() -> None:
    config = CONFIG.value
    variants = cli.variants(config, "config")
    trained = list(variants.values()) or [config]
    numeric_keys.check(config, "compare")  # of a comparison the rest of the config itself is not used
    for each in trained:
        checks.check(each)
        evaluate.check_settings(each)
        each.data.folder = str(user_path(each.data.folder, "config.data.folder") if each.data.folder else Path.cwd())
    for flag in (TOPOLOGY, VOCAB_SIZE, UTILIZATION):
        if not COMPILE_ONLY.value and flag.present:
            raise UserError(f"--{flag.name} goes with --compile_only")
    if COMPILE_ONLY.value:
        if PROFILE_STEPS.value is not None:
            raise UserError("--profile_steps traces a run, which --compile_only does not make")
        plan.show(trained, topology=TOPOLOGY.value, vocab_size=VOCAB_SIZE.value, utilization=UTILIZATION.value)
        return
    for each in trained:
        sizes.check(each)
    workdir = Path("runs") / cli.config_file("config").stem
    if WORKDIR.value is not None:
        workdir = places.at(WORKDIR.value, "--workdir")
    with stopping.listen() as stop:
        if variants:
            compare.compare(config, variants, workdir, stop, PROFILE_STEPS.value)
        else:
            loop.train(config, workdir, stop, PROFILE_STEPS.value)


if __name__ == "__main__":
    cli.run(main)
