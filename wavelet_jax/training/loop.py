"""Training one run, from wherever its directory stands to its last update."""

import contextlib
import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from wavelet_jax.data import Windows, load_corpus, read_ahead, train_windows
from wavelet_jax.errors import UserError
from wavelet_jax.hardware import devices
from wavelet_jax.parallel import processes, sharding
from wavelet_jax.runs import checkpoint, directory, guards, profiling, stopping, throughput
from wavelet_jax.runs.metrics import MetricsLog
from wavelet_jax.training import steps


def train(config: ConfigDict, workdir: Path, stop: stopping.Stop, profile_steps: str | None = None) -> None:
    """One run, from wherever its directory stands to `config.train.steps` updates, or to a signal."""
    mesh = sharding.make_mesh(config)
    sharding.check_batch(config, mesh)
    check(workdir, config)
    profile = profiling.Profile(workdir / "profile", profile_steps, config.train.steps)
    corpus = load_corpus(config)
    directory.check_processes(config, corpus.fingerprint)
    windows = train_windows(config, corpus)
    validation = Windows(corpus.validation, config.train.length, seed=0)  # the same ones for every run, never packed
    graphdef, state, abstract_state = steps.init(config, corpus.tokenizer.vocab_size, mesh)
    train_step = steps.jit_train_step(config, graphdef, abstract_state, mesh)
    # Every process sees all losses of a validation batch.
    eval_step = jax.jit(steps.make_eval_step(config, graphdef, mesh), out_shardings=sharding.everywhere(mesh))

    # Nothing has been written so far: what is wrong with the config or the text shows above.
    with contextlib.ExitStack() as stack:
        stack.enter_context(directory.locked(workdir))
        state, position = checkpoint.restore(workdir, abstract_state, fingerprint=corpus.fingerprint) or (state, 0)
        first = int(state.step)
        if first > config.train.steps:
            raise UserError(f"{workdir} is at update {first} already, past train.steps {config.train.steps}")
        profile.skip_before(first)
        manager = stack.enter_context(checkpoint.open_manager(workdir, config))
        log = stack.enter_context(contextlib.closing(MetricsLog(workdir, first)))
        guard = stack.enter_context(guards.Guard(config, workdir, log))
        if processes.is_first():
            directory.save_config(workdir, config)
            print(
                f"{workdir}: {directory.label(config)}, {steps.count_parameters(state.params):,} parameters, "
                f"{windows.num_windows:,} windows of {config.train.length} ({corpus.tokenizer.name}), "
                f"updates {first:,} to {config.train.steps:,}",
                file=sys.stderr,
            )

        size, start = config.train.batch_size, position

        def batch(number: int) -> jax.Array:
            """Of the update that comes after `number` others."""
            shape = steps.batch_shape(config)
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
            desc=f"{directory.label(config):>14}",
            disable=not processes.is_first(),
            mininterval=directory.PROGRESS_INTERVAL,
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
                    checkpoint.save(manager, step, state, windows=position, fingerprint=corpus.fingerprint)
            if stopping_here:
                break
        checkpoint.wait(manager, int(state.step))
    stop.released(f"{workdir} is saved at update {int(state.step):,}; the same command goes on")


def check(workdir: Path, config: ConfigDict) -> None:
    """Raises `UserError` where the directory is not one in which this run can begin or go on. Writes nothing."""
    directory.check_config(workdir, config)
    checkpoint.check_whole(workdir)


def _validate(config: ConfigDict, eval_step, params, validation: Windows, mesh) -> float:
    """Mean loss over the same `config.eval.windows` validation windows each time, or all where there are fewer."""
    count, size = min(config.eval.windows, validation.num_windows), config.train.batch_size
    shape = (size, config.train.length + 1)
    # Batches are whole, for the mesh; windows past `count` are not counted.
    batches = (sharding.load_batch(validation.batch, start, shape, mesh) for start in range(0, count, size))
    losses = [np.asarray(eval_step(params, batch)) for batch in batches]
    return float(np.concatenate(losses)[:count].mean(dtype=np.float64))
