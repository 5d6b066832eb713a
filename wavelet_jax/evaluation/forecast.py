"""Forecast of an evaluation's memory and time, printed before it starts; too much memory is refused before that."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from wavelet_jax.data import Corpus
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import prefill
from wavelet_jax.evaluation.prefill import Pace, Program
from wavelet_jax.hardware import memory
from wavelet_jax.parallel import processes, sharding
from wavelet_jax.runs import checkpoint, directory, throughput
from wavelet_jax.training import steps


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one length: a number of batches [batch_size, length] of blocks."""

    batches: int
    batch_size: int
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch_size, self.length


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One run to evaluate, without its parameters. Made by `prepare`.

    Attributes:
      label: the method, for people.
      work: by evaluated length.
      programs: by shape; those not there yet are compiled when they are needed.
      pace: from `timed`.
      bytes: the most memory that it takes, with what the process held when it was prepared.
    """

    label: str
    config: ConfigDict
    workdir: Path
    corpus: Corpus
    graphdef: nnx.GraphDef
    abstract_params: dict
    mesh: Mesh
    work: dict[int, Work]
    programs: dict[tuple[int, int], Program]
    pace: Pace | None = None
    bytes: int = 0

    def program(self, length: int) -> Program:
        """The compiled program that scores an evaluated length."""
        shape = self.work[length].shape
        if shape not in self.programs:
            self.programs[shape] = prefill.build(
                self.config, self.graphdef, self.abstract_params, self.mesh, batch_size=shape[0], length=shape[1]
            )
        return self.programs[shape]

    def load(self) -> tuple[dict, int]:
        """The parameters of the newest sound checkpoint, and its update."""
        return checkpoint.restore_params(self.workdir, self.abstract_params, fingerprint=self.corpus.fingerprint)

    def scoring_seconds(self, length: int) -> float:
        """Expected of a length, once its program is compiled."""
        work = self.work[length]
        ranges = prefill.chunks(work.length, prefill.chunk_of(self.config, work.length))
        assert self.pace is not None, "not timed"
        return work.batches * sum(self.pace.seconds(*each, work.batch_size) for each in ranges)

    def seconds(self) -> float:
        """Expected of all lengths, compiling what is not compiled yet."""
        missing = len({work.shape for work in self.work.values()} - self.programs.keys())
        build = np.mean([program.build_seconds for program in self.programs.values()])
        return missing * float(build) + sum(map(self.scoring_seconds, self.work))


def prepare(config: ConfigDict, workdir: Path, label: str, corpus: Corpus, work: dict[int, Work]) -> Job:
    """Compiles the program of the longest blocks, and sees that its memory is there. Computes nothing.

    Raises:
      UserError: the longest program needs more memory than there is.
    """
    config.mesh.update(data=1, fsdp=-1, context=1, tensor=1)  # the devices here, whatever the run was trained on
    mesh = sharding.make_mesh(config)
    graphdef, abstract_state = steps.shapes(config, corpus.tokenizer.vocab_size, mesh)
    job = Job(label, config, workdir, corpus, graphdef, abstract_state.params, mesh, work, programs={})

    longest = job.program(max(work))
    # The cache is made once for timing and once for scoring.
    needed = memory.in_use() + memory.needed(longest.step) + memory.kept(longest.cache_bytes)
    limit, owner = memory.available()
    if needed > limit:
        raise UserError(
            f"{label} at length {longest.length:,} would take {memory.shown(needed)} of memory, in batches of "
            f"{longest.batch_size} read {longest.chunk:,} tokens at a time, and {owner} has {memory.shown(limit)}: "
            "lower --lengths, eval.prefill_chunk or eval.batch_tokens"
        )
    return dataclasses.replace(job, bytes=needed)


def timed(job: Job) -> Job:
    """The job with its pace: of the longest blocks, and where those are read whole, of the shortest too."""
    params, _ = job.load()
    longest = job.program(max(job.work))

    def measure(program: Program) -> Pace:
        text = job.corpus.validation[: program.length + 1].astype(np.int32)
        return program.measure(params, np.broadcast_to(text, (program.batch_size, len(text))))

    pace = measure(longest)
    if longest.chunk == longest.length > job.work[min(job.work)].length:
        # Whole blocks show their mean seconds per token; two lengths, how those grow.
        shortest = job.program(min(job.work))
        short = measure(shortest)
        growth = 2 * (pace.base - short.base) / (longest.length - shortest.length)
        pace = Pace(short.base - growth * shortest.length / 2, growth)
    # Timing it took what scoring will take, and an allocator holds more than a program's arrays.
    return dataclasses.replace(job, pace=pace, bytes=max(job.bytes, memory.peak()))


@contextlib.contextmanager
def progress(job: Job, length: int, title: str) -> Iterator[Callable[[int, int], object]]:
    """A bar of the expected time; yields `done(start, stop)`, to be called as `Program.losses` does."""
    batch_size, pace = job.work[length].batch_size, job.pace
    assert pace is not None, "not timed"
    with tqdm(
        total=job.scoring_seconds(length),
        desc=title,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        smoothing=0,  # what remains is of the time, so the mean rate tells it best
        leave=False,
        disable=not processes.is_first(),
        mininterval=directory.PROGRESS_INTERVAL,
        miniters=0,  # one chunk may take longer than many before it
    ) as bar:
        yield lambda start, stop: bar.update(pace.seconds(start, stop, batch_size))


def table(jobs: Sequence[Job], num_targets: int) -> str:
    """The forecast of every run and of all, as text."""
    limit, owner = memory.available()
    names = max(24, *(len(job.label) + 1 for job in jobs))
    lines = [f"forecast, {num_targets:,} tokens scored at every length:"]
    for job in jobs:
        longest = max(work.length for work in job.work.values())
        lines.append(
            f"  {job.label:{names}}{throughput.duration(job.seconds()):>12}  {memory.shown(job.bytes)} at {longest:,}"
        )
    most = memory.shown(max(job.bytes for job in jobs))
    total = throughput.duration(sum(job.seconds() for job in jobs))
    lines.append(f"  in all {total}, at most {most} of the {memory.shown(limit)} of {owner}")
    return "\n".join(lines)
