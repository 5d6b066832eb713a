"""Trains a run, or several methods one after another and compares them.

    python train.py                                                              the quickstart comparison
    python train.py --config=configs/wikitext2.py:rope --workdir=runs/rope       one run
    python train.py ... --config.train.steps=2000                                any key of configs/default.py
    python train.py ... --compile_only --topology=v5e:16x16                      what it will take (wavelet_jax/plan.py)
    python train.py ... --profile_steps=100:105                                  a trace (wavelet_jax/profiling.py)

A run that was stopped goes on when the same command is given again, to the same losses.
"""

import contextlib
import math
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from wavelet_jax import checkpoint, cli, devices, evaluation, plan, profiling, runs, sharding, throughput, training
from wavelet_jax.data import Windows, load_corpus
from wavelet_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", str(Path(__file__).parent / "configs" / "quickstart.py"), "what to train: FILE.py[:variant]"
)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "START:STOP, updates to trace into WORKDIR/profile")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; runs/ and the config file's name if left out")


def train(config: ConfigDict, workdir: Path) -> None:
    """One run, from wherever its directory stands to `config.train.steps` updates."""
    mesh = sharding.make_mesh(config)
    sharding.check_batch(config, mesh)
    runs.check_config(workdir, config)
    profile = profiling.Profile(workdir / "profile", PROFILE_STEPS.value, config.train.steps)
    corpus = load_corpus(config)
    windows = Windows(corpus.train, config.train.length, config.train.seed)
    validation = Windows(corpus.validation, config.train.length, seed=0)  # the same ones for every run
    graphdef, state, abstract_state = training.init(config, corpus.tokenizer.vocab_size, mesh)
    train_step = training.jit_train_step(config, graphdef, abstract_state)
    eval_step = jax.jit(training.make_eval_step(config, graphdef))

    # Nothing has been written so far: what is wrong with the config or the text shows above.
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoint.open_manager(workdir, config))
        state, position = checkpoint.restore(manager, abstract_state, fingerprint=corpus.fingerprint) or (state, 0)
        first = int(state.step)
        if first > config.train.steps:
            raise UserError(f"{workdir} is at update {first} already, past train.steps {config.train.steps}")
        profile.check(first)
        runs.save_config(workdir, config)
        log = stack.enter_context(contextlib.closing(runs.MetricsLog(workdir, first)))
        print(
            f"{workdir}: {config.position.method}, {training.count_parameters(state.params):,} parameters, "
            f"{windows.num_windows:,} windows of {config.train.length} ({corpus.tokenizer.name}), "
            f"updates {first:,} to {config.train.steps:,}",
            file=sys.stderr,
        )

        size, parts = config.train.batch_size, config.train.accumulation
        batch_sharding = sharding.batch_sharding(mesh, leading=1)
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
            desc=f"{config.position.method:>14}",
            mininterval=runs.PROGRESS_INTERVAL,
        )
        for step in progress:
            profile.before(step)
            with meter.input():
                tokens = windows.batch(position, size).reshape(parts, size // parts, -1)
                tokens = jax.device_put(tokens, batch_sharding)
            state, metrics = train_step(state, tokens)
            meter.updated(metrics["loss"])
            profile.after(step, metrics["loss"])
            position += size

            last = step == config.train.steps
            validate = config.eval.every > 0 and (last or step % config.eval.every == 0)
            save = last or step % config.checkpoint.every == 0
            if save or validate or step % config.log.every == 0:
                metrics = {name: float(value) for name, value in metrics.items()}
                if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
                    raise UserError(
                        f"update {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; the checkpoints "
                        f"in {workdir} are from before it: a lower optimizer.learning_rate may help, in a new workdir"
                    )
            if validate or last or step % config.log.every == 0:
                if validate:
                    with meter.pause("validation"):
                        metrics["validation_loss"] = _validate(config, eval_step, state.params, validation, mesh)
                metrics |= meter.line()
                log.write(step, metrics)
                shown = {"loss": f"{metrics['loss']:.3f}", "tok/s": f"{metrics['tokens_per_second']:,.0f}"}
                progress.set_postfix(shown, refresh=False)
            if save:
                with meter.pause("checkpoint"):
                    checkpoint.save(manager, state, windows=position, fingerprint=corpus.fingerprint)


def compare(config: ConfigDict, workdir: Path) -> None:
    """Trains every method of `config.compare.methods` in turn, then evaluates them together."""
    methods = config.compare.methods
    if not all(isinstance(method, str) for method in methods):
        raise UserError(f"compare.methods must be names of methods, not {methods}")
    if len(set(methods)) < len(methods):
        raise UserError(f"compare.methods names a method twice: {', '.join(methods)}")
    configs, workdirs = [], [workdir / method for method in methods]
    for method in methods:
        configs.append(config.copy_and_resolve_references())
        configs[-1].position.method = method
        configs[-1].compare.methods = ()
    lengths, protocol = config.compare.lengths, config.compare.protocol
    evaluation.check(configs, workdirs, lengths=lengths, protocol=protocol)  # rather now than after the training
    for each, directory in zip(configs, workdirs, strict=True):
        runs.check_config(directory, each)
    for each, directory in zip(configs, workdirs, strict=True):
        train(each, directory)
    evaluation.evaluate(workdirs, lengths=lengths, protocol=protocol, out=workdir)


def main() -> None:
    config = CONFIG.value
    _check_counts(config)
    plan.check_flags()
    if plan.COMPILE_ONLY.value:
        plan.main(config)
        return
    filename = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = Path(WORKDIR.value or Path("runs") / filename.stem)
    if config.compare.methods:
        compare(config, workdir)
    else:
        train(config, workdir)


def _validate(config: ConfigDict, eval_step, params, validation: Windows, mesh) -> float:
    """Mean loss over the same `config.eval.windows` validation windows each time, or all where there are fewer."""
    count, size = min(config.eval.windows, validation.num_windows), config.train.batch_size
    place = sharding.batch_sharding(mesh)
    # Batches are whole, for the mesh; windows past `count` are not counted.
    batches = [validation.batch(start, size) for start in range(0, count, size)]
    losses = [np.asarray(eval_step(params, jax.device_put(batch, place))) for batch in batches]
    return float(np.concatenate(losses)[:count].mean(dtype=np.float64))


def _check_counts(config: ConfigDict) -> None:
    runs.check_least(
        {
            "train.steps": (config.train.steps, 1),
            "train.batch_size": (config.train.batch_size, 1),
            "train.accumulation": (config.train.accumulation, 1),
            "train.logits_chunk": (config.train.logits_chunk, 0),
            "optimizer.clip_norm": (config.optimizer.clip_norm, 0),
            "log.every": (config.log.every, 1),
            "checkpoint.every": (config.checkpoint.every, 1),
            "checkpoint.keep": (config.checkpoint.keep, 1),
            "eval.every": (config.eval.every, 0),
            "eval.windows": (config.eval.windows, 1),
        }
    )


if __name__ == "__main__":
    cli.run(main)
