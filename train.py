"""Trains a run, or several one after another and compares them.

    python train.py                                                              the quickstart comparison
    python train.py --config=configs/wikitext2.py:rope --workdir=runs/rope       one run
    python train.py ... --config.train.steps=2000                                any key of configs/default.py
    python train.py ... --compile_only --topology=v5e:16x16                      what it will take (wavelet_jax/plan.py)
    python train.py ... --profile_steps=100:105                                  a trace (wavelet_jax/profiling.py)

A run that was stopped goes on when the same command is given again, to the same losses.

Exit codes: 0 when all is done; 2 for what a user can mend, said in one line (bad input, a loss that is not finite, no
room on the disk for the last checkpoint, another process of the run that is gone); 143 after SIGTERM and 130 after
SIGINT, when the update that ran is finished and saved. A second signal ends the process at once, with the same code.
"""

import contextlib
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from wavelet_jax import (
    checkpoint,
    checks,
    cli,
    devices,
    evaluation,
    guards,
    numeric_keys,
    plan,
    processes,
    profiling,
    runs,
    sharding,
    sizes,
    stopping,
    throughput,
    training,
)
from wavelet_jax.data import Windows, load_corpus, read_ahead, train_windows
from wavelet_jax.errors import UserError
from wavelet_jax.files import user_path

CONFIG = config_flags.DEFINE_config_file(
    "config", str(Path(__file__).parent / "configs" / "quickstart.py"), "what to train: FILE.py[:variant]"
)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "START:STOP, updates to trace into WORKDIR/profile")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; runs/ and the config file's name if left out")


def train(config: ConfigDict, workdir: Path, stop: stopping.Stop, profile_steps: str | None = None) -> None:
    """One run, from wherever its directory stands to `config.train.steps` updates, or to a signal."""
    mesh = sharding.make_mesh(config)
    sharding.check_batch(config, mesh)
    check(workdir, config)
    profile = profiling.Profile(workdir / "profile", profile_steps, config.train.steps)
    corpus = load_corpus(config)
    runs.check_processes(config, corpus.fingerprint)
    windows = train_windows(config, corpus)
    validation = Windows(corpus.validation, config.train.length, seed=0)  # the same ones for every run, never packed
    graphdef, state, abstract_state = training.init(config, corpus.tokenizer.vocab_size, mesh)
    train_step = training.jit_train_step(config, graphdef, abstract_state, mesh)
    # Every process sees all losses of a validation batch.
    eval_step = jax.jit(training.make_eval_step(config, graphdef, mesh), out_shardings=sharding.everywhere(mesh))

    # Nothing has been written so far: what is wrong with the config or the text shows above.
    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.locked(workdir))
        state, position = checkpoint.restore(workdir, abstract_state, fingerprint=corpus.fingerprint) or (state, 0)
        first = int(state.step)
        if first > config.train.steps:
            raise UserError(f"{workdir} is at update {first} already, past train.steps {config.train.steps}")
        profile.skip_before(first)
        manager = stack.enter_context(checkpoint.open_manager(workdir, config))
        log = stack.enter_context(contextlib.closing(runs.MetricsLog(workdir, first)))
        guard = stack.enter_context(guards.Guard(config, workdir, log))
        if processes.is_first():
            runs.save_config(workdir, config)
            print(
                f"{workdir}: {runs.label(config)}, {training.count_parameters(state.params):,} parameters, "
                f"{windows.num_windows:,} windows of {config.train.length} ({corpus.tokenizer.name}), "
                f"updates {first:,} to {config.train.steps:,}",
                file=sys.stderr,
            )

        size, start = config.train.batch_size, position

        def batch(number: int) -> jax.Array:
            """Of the update that comes after `number` others."""
            shape = training.batch_shape(config)
            return sharding.load_batch(windows.batch, start + number * size, shape, mesh, leading=1)

        batches = read_ahead(batch, config.train.steps - first, config.data.prefetch)
        stack.enter_context(contextlib.closing(batches))
        stack.enter_context(contextlib.closing(profile))
        meter = throughput.Meter(
            size * config.train.length,
            throughput.update_flops(config, corpus.tokenizer.vocab_size),
            devices.total_flops(config.model.dtype),
        )
        stack.enter_context(contextlib.closing(meter))
        train_step, eval_step = meter.compiled(train_step), meter.compiled(eval_step)
        progress = tqdm(
            range(first + 1, config.train.steps + 1),
            initial=first,
            total=config.train.steps,
            desc=f"{runs.label(config):>14}",
            disable=not processes.is_first(),
            mininterval=runs.PROGRESS_INTERVAL,
        )
        for step in progress:
            profile.before(step)
            with meter.input():
                tokens = next(batches)
            state, metrics = train_step(state, tokens)
            meter.updated(metrics["loss"])
            profile.after(step, metrics["loss"])
            position += size

            last = step == config.train.steps
            stopping_here = stop.requested()
            validate = config.eval.every > 0 and (last or step % config.eval.every == 0)
            save = last or stopping_here or step % config.checkpoint.every == 0
            record = validate or last or step % config.log.every == 0
            guard.made(step, metrics, look=save or record)
            if record:
                metrics = {name: float(value) for name, value in metrics.items()}
                if validate:
                    with guard.paused(), meter.pause("validation"):
                        metrics["validation_loss"] = _validate(config, eval_step, state.params, validation, mesh)
                metrics |= meter.line()
                log.write(step, metrics)
                shown = {"loss": f"{metrics['loss']:.3f}", "tok/s": f"{metrics['tokens_per_second']:,.0f}"}
                progress.set_postfix(shown, refresh=False)
            if save:
                with guard.paused(), meter.pause("checkpoint"):
                    checkpoint.save(manager, state, windows=position, fingerprint=corpus.fingerprint)
            if stopping_here:
                break
        checkpoint.wait(manager, int(state.step))
    stop.released(f"{workdir} is saved at update {int(state.step):,}; the same command goes on")


def check(workdir: Path, config: ConfigDict) -> None:
    """Raises `UserError` where the directory is not one in which this run can begin or go on. Writes nothing."""
    runs.check_config(workdir, config)
    checkpoint.check_whole(workdir)


def compare(
    config: ConfigDict, variants: dict[str, ConfigDict], workdir: Path, stop: stopping.Stop, profile_steps: str | None
) -> None:
    """Trains every variant in turn, each in a folder of its name, then evaluates them together."""
    configs, workdirs = list(variants.values()), [workdir / name for name in variants]
    lengths, protocol = config.compare.lengths, config.compare.protocol
    for each, directory in zip(configs, workdirs, strict=True):
        check(directory, each)
    evaluation.check_memory(configs, workdirs, lengths=lengths, protocol=protocol)  # rather now than after the training
    for each, directory in zip(configs, workdirs, strict=True):
        train(each, directory, stop, profile_steps)
    evaluation.evaluate(workdirs, lengths=lengths, protocol=protocol, out=workdir)


def main() -> None:
    config = CONFIG.value
    variants = cli.variants(config, "config")
    trained = list(variants.values()) or [config]
    numeric_keys.check(config, "compare")  # of a comparison the rest of the config itself is not used
    for each in trained:
        checks.check(each)
        evaluation.check_settings(each)
        each.data.folder = str(user_path(each.data.folder, "config.data.folder") if each.data.folder else Path.cwd())
    plan.check_flags()
    if plan.COMPILE_ONLY.value:
        if PROFILE_STEPS.value is not None:
            raise UserError("--profile_steps traces a run, which --compile_only does not make")
        plan.main(trained)
        return
    for each in trained:
        sizes.check(each)
    workdir = Path("runs") / cli.config_file("config").stem
    if WORKDIR.value is not None:
        workdir = user_path(WORKDIR.value, "--workdir")
    with stopping.listen() as stop:
        if variants:
            compare(config, variants, workdir, stop, PROFILE_STEPS.value)
        else:
            train(config, workdir, stop, PROFILE_STEPS.value)


def _validate(config: ConfigDict, eval_step, params, validation: Windows, mesh) -> float:
    """Mean loss over the same `config.eval.windows` validation windows each time, or all where there are fewer."""
    count, size = min(config.eval.windows, validation.num_windows), config.train.batch_size
    shape = (size, config.train.length + 1)
    # Batches are whole, for the mesh; windows past `count` are not counted.
    batches = (sharding.load_batch(validation.batch, start, shape, mesh) for start in range(0, count, size))
    losses = [np.asarray(eval_step(params, batch)) for batch in batches]
    return float(np.concatenate(losses)[:count].mean(dtype=np.float64))


if __name__ == "__main__":
    cli.run(main)
