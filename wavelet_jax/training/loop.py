"""Training one run, from wherever its directory stands to its last update."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from wavelet_jax.data import Corpus, Windows, load_corpus, read_ahead, train_windows
from wavelet_jax.errors import UserError
from wavelet_jax.files import places
from wavelet_jax.hardware import devices
from wavelet_jax.parallel import processes, sharding
from wavelet_jax.runs import checkpoint, directory, guards, profiling, sessions, stopping, throughput
from wavelet_jax.runs.metrics import MetricsLog, WeightsAndBiases
from wavelet_jax.training import checks, evaluators, initial, sizes, steps


def train(
    config: ConfigDict, workdir: str | Path, stop: stopping.Stop | None = None, profile_steps: str | None = None
) -> None:
    """Trains a run to `config.train.steps` updates, or to a signal. The same call again resumes it.

    Args:
      config: as `wavelet_jax/config/default.py` makes it. An empty `config.data.folder` is set to the current folder.
      workdir: the run's directory, made if need be; gs://BUCKET/RUN for one in a bucket.
      stop: from `stopping.listen()`; None: signals do what they do in any program.
      profile_steps: "START:STOP", updates to trace into WORKDIR/profile.

    Raises:
      UserError: before anything is written, for a config or a directory that cannot be trained; later, for a loss that
        is not finite, or a last checkpoint that could not be written.
      SystemExit: after a signal, when the state is saved.
    """
    began, workdir, stop = time.monotonic(), places.given(workdir), stop or stopping.NoStop()
    config.data.folder = config.data.folder or str(Path.cwd())
    checks.check(config)
    sizes.check(config)
    mesh = sharding.make_mesh(config)
    sharding.check_batch(config, mesh)
    check(workdir, config)
    profile = profiling.Profile(workdir / "profile", profile_steps, config.train.steps)
    corpus = load_corpus(config)
    directory.check_processes(config, corpus.fingerprint)
    windows = train_windows(config, corpus)
    sizes.check(config, corpus.tokenizer.vocab_size)
    graphdef, abstract_state = steps.shapes(config, corpus.tokenizer.vocab_size, mesh)
    train_step = steps.jit_train_step(config, graphdef, abstract_state, mesh)
    evaluators.make(config, corpus, graphdef, mesh)  # raises for a text that is too short

    # Nothing has been written so far: what is wrong with the config or the text shows above.
    with contextlib.ExitStack() as stack:
        stack.enter_context(directory.locked(workdir))
        state, position = initial.state(config, workdir, abstract_state, corpus, mesh)
        first = int(state.step)
        if first > config.train.steps:
            raise UserError(f"{workdir} is at update {first} already, past train.steps {config.train.steps}")
        profile.skip_before(first)
        tools = _Tools(
            manager=stack.enter_context(checkpoint.open_manager(workdir, config)),
            log=(log := stack.enter_context(contextlib.closing(_metrics_log(config, workdir, first)))),
            guard=stack.enter_context(guards.Guard(config, workdir, log)),
            batches=stack.enter_context(contextlib.closing(_batches(config, windows, first, position, mesh))),
            profile=stack.enter_context(contextlib.closing(profile)),
            meter=stack.enter_context(contextlib.closing(_meter(config, corpus))),
            sessions=stack.enter_context(contextlib.closing(_sessions(config, workdir, first, began))),
            evaluators=evaluators.make(config, corpus, graphdef, mesh),
        )
        if processes.is_first():
            directory.save_config(workdir, config)
            _announce(config, workdir, state, corpus, windows)
        state = _updates(config, state, position, train_step, tools, stop, corpus.fingerprint)
        _finish(tools, int(state.step))
    stop.released(f"{workdir} is saved at update {int(state.step):,}; the same command resumes the run")


def check(workdir: Path, config: ConfigDict) -> None:
    """Raises `UserError` if the directory is not one in which this run can begin or resume. Writes nothing."""
    directory.check_config(workdir, config)
    checkpoint.check_whole(workdir)


@dataclasses.dataclass(frozen=True)
class _Tools:
    """Everything that the loop uses beside the state."""

    manager: ocp.CheckpointManager
    log: MetricsLog
    guard: guards.Guard
    batches: Generator[jax.Array, None, None]
    profile: profiling.Profile
    meter: throughput.Meter
    sessions: sessions.Sessions
    evaluators: dict[str, evaluators.Evaluator]


def _updates(
    config: ConfigDict,
    state: steps.State,
    position: int,
    train_step: Callable[[steps.State, jax.Array], tuple[steps.State, dict[str, jax.Array]]],
    tools: _Tools,
    stop: stopping.Stop,
    fingerprint: str,
) -> steps.State:
    """Makes the updates that are left, and what is due after each; the last state, which is being saved."""
    guard, meter, profile = tools.guard, tools.meter, tools.profile
    train_step = meter.compiled(train_step)
    for evaluator in tools.evaluators.values():
        evaluator.compiled_by(meter)
    tools.sessions.note(int(state.step), meter.spent())  # a kill before the first line costs time too
    progress = _progress(config, int(state.step))
    for step in progress:
        profile.before(step)
        with meter.input():
            tokens = next(tools.batches)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = train_step(state, tokens)
        meter.updated(metrics["loss"])
        profile.after(step, metrics["loss"])
        position += config.train.batch_size

        last, stopping_here = step == config.train.steps, stop.requested()
        due = evaluators.due(config, tools.evaluators, step)
        save = last or stopping_here or step % config.checkpoint.every == 0
        record = bool(due) or last or step % config.log.every == 0
        guard.made(step, metrics, look=save or record)
        if record:
            line = {name: float(value) for name, value in jax.device_get(metrics).items()}
            for name in due:
                with guard.paused(), meter.pause("validation"):
                    line |= tools.evaluators[name].run(state.params)
            line |= meter.line()
            tools.sessions.note(step, meter.spent())
            line |= tools.sessions.account().columns()
            tools.log.write(step, line)
            shown = {"loss": f"{line['loss']:.3f}", "tok/s": f"{line['tokens_per_second']:,.0f}"}
            progress.set_postfix(shown, refresh=False)
        if save:
            with guard.paused(), meter.pause("checkpoint"):
                checkpoint.save(tools.manager, step, state, windows=position, fingerprint=fingerprint)
            tools.sessions.note(step, meter.spent())
        if stopping_here:
            break
    return state


def _finish(tools: _Tools, step: int) -> None:
    """Waits for the last checkpoint, and says where the time of the run went."""
    with tools.meter.pause("checkpoint"):
        checkpoint.wait(tools.manager, step)
    tools.sessions.note(step, tools.meter.spent())
    account = tools.sessions.account()
    if processes.is_first() and account.sessions:  # none: a finished run of an earlier version
        print(account.line(), file=sys.stderr)


def _batches(
    config: ConfigDict, windows: Windows, first: int, position: int, mesh: Mesh
) -> Generator[jax.Array, None, None]:
    """The batches of the updates after `first`, on the devices, from window `position` on; read ahead."""
    size, shape = config.train.batch_size, steps.batch_shape(config)

    def batch(number: int) -> jax.Array:
        return sharding.load_batch(windows.batch, position + number * size, shape, mesh, leading=1)

    return read_ahead(batch, config.train.steps - first, config.data.prefetch)


def _metrics_log(config: ConfigDict, workdir: Path, first: int) -> MetricsLog:
    more = [lambda: WeightsAndBiases(workdir, config)] if config.log.wandb else []
    return MetricsLog(workdir, first, more)


def _meter(config: ConfigDict, corpus: Corpus) -> throughput.Meter:
    return throughput.Meter(
        config.train.batch_size * config.train.length,
        throughput.update_flops(config, corpus.tokenizer.vocab_size),
        devices.total_flops(config.model.dtype),
    )


def _sessions(config: ConfigDict, workdir: Path, first: int, began: float) -> sessions.Sessions:
    return sessions.Sessions(workdir, first, began, idle=first == config.train.steps)


def _announce(config: ConfigDict, workdir: Path, state: steps.State, corpus: Corpus, windows: Windows) -> None:
    print(
        f"{workdir}: {directory.label(config)}, {steps.count_parameters(state.params):,} parameters, "
        f"{windows.num_windows:,} windows of {config.train.length} ({corpus.tokenizer.name}), "
        f"updates {int(state.step):,} to {config.train.steps:,}",
        file=sys.stderr,
    )


def _progress(config: ConfigDict, first: int) -> tqdm:
    """The numbers of the updates after `first`, with a progress bar of the first process."""
    return tqdm(
        range(first + 1, config.train.steps + 1),
        initial=first,
        total=config.train.steps,
        desc=f"{directory.label(config):>14}",
        disable=not processes.is_first(),
        mininterval=directory.PROGRESS_INTERVAL,
    )
