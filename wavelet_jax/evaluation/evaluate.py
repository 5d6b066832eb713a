"""Loss far past the training length: three protocols, the same scored tokens, intervals, a stamp on every number.

The validation stream is cut to M tokens, a multiple of the longest length, or sequences of that length are drawn from
it (`scored_text.py`). Every protocol scores each of the M targets exactly once at every length, so that curves compare
like with like.
"""

import csv
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from wavelet_jax.config import numeric_keys, saved
from wavelet_jax.data import Corpus, check_files, load_corpus
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.evaluation import forecast, scored_text
from wavelet_jax.evaluation.protocols import PROTOCOLS, Block, batch_shape, bootstrap_interval, plan_text, score
from wavelet_jax.evaluation.scored_text import ScoredText
from wavelet_jax.files import results
from wavelet_jax.files.reading import MissingFile
from wavelet_jax.model.decoder import make_position
from wavelet_jax.parallel import processes
from wavelet_jax.positions.absolute import check_positions
from wavelet_jax.runs import checkpoint, directory

COLUMNS = (
    "method",
    "protocol",
    "train_length",
    "length",
    "stride",
    "tokens_scored",
    "loss",
    "perplexity",
    "ci_low",
    "ci_high",
)
WRITTEN = ("extrapolation.csv", "extrapolation.png", "loss_by_position.png", "stamp.json")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One method at one length: for target i of the stream, its loss in nats and its place in its block."""

    method: str
    protocol: str
    train_length: int
    length: int
    stride: int
    losses: np.ndarray  # [M] float32
    positions: np.ndarray  # [M] int32
    ci_loss: tuple[float, float]  # 95% interval of the mean loss

    def row(self) -> dict[str, Any]:
        """The line of extrapolation.csv; ci_low and ci_high bound the perplexity."""
        loss = float(self.losses.mean(dtype=np.float64))
        with np.errstate(over="ignore"):  # inf is right for a model that has diverged
            perplexity, low, high = (float(np.exp(bound)) for bound in (loss, *self.ci_loss))
        values = (self.method, self.protocol, self.train_length, self.length, self.stride, len(self.losses))
        return dict(zip(COLUMNS, (*values, loss, perplexity, low, high), strict=True))


def evaluate(
    workdirs: Sequence[Path],
    *,
    lengths: Sequence[int],
    protocol: str,
    out: Path,
    stride: int = 0,
    changes: Mapping[str, int] | None = None,
    other_text: Mapping[str, str] | None = None,
    data_root: Path | None = None,
) -> list[Curve]:
    """Evaluates finished or unfinished runs, and writes the table, extrapolation.csv, stamp.json and both figures.

    Of several processes, all compute and the first writes; those that were started differently are refused.

    Args:
      workdirs: directories of runs that read the same corpus with the same tokenizer.
      lengths: tokens.
      protocol: one of `PROTOCOLS`.
      out: where the results go.
      stride: of the sliding window, tokens; 0 for half of each length.
      changes: values of keys of `config.eval` instead of the runs' own.
      other_text: values of keys of `config.data` that name another validation text, read by the runs' tokenizer.
      data_root: the folder that relative paths in the runs' `config.data` start from; None: the one they remember.

    Raises:
      UserError: before anything is computed or written, for what cannot be evaluated.
    """
    configs = load_configs(workdirs, data_root)
    for config in configs:
        config.eval.update(changes or {})
    lengths = sorted(set(lengths))
    directory.check_folder(out)
    corpus, text = check(configs, workdirs, lengths=lengths, protocol=protocol, stride=stride, other_text=other_text)
    processes.check_same(
        {"the runs": labels(configs, workdirs), "lengths": lengths, "protocol": protocol, "stride": stride}
    )
    for config in configs:
        directory.check_processes(config, corpus.fingerprint)
    # At least ten stretches to draw from, or the sequences.
    unit = text.length if text.count > 1 else min(max(lengths), text.num_targets // 10) or 1
    for workdir in workdirs:
        if checkpoint.latest_step(workdir) is None:
            raise UserError(f"{workdir} has no checkpoint to evaluate: train it first")

    jobs, strides, blocks_of = _plan(configs, workdirs, corpus, text, lengths, protocol, stride)
    jobs = [forecast.timed(job) for job in jobs]  # after the memory of all of them has been seen to be there
    if processes.is_first():
        print(forecast.table(jobs, text.num_targets), file=sys.stderr)

    curves = [curve for job in jobs for curve in _curves(job, text, protocol, strides, blocks_of, unit)]
    stretches = f"{text.num_targets // unit} stretches of {unit} tokens"
    stamp = {
        "protocol": protocol,
        "lengths": lengths,
        "stride": sorted({curve.stride for curve in curves}),
        "tokens_scored": text.num_targets,
        "text": text.description + "".join(f", {key}={value}" for key, value in (other_text or {}).items()),
        "tokenizer": corpus.tokenizer.name,
        "unit": corpus.unit,
        "corpus": corpus.fingerprint,
        "interval": f"95%, {configs[0].eval.resamples} resamples of {stretches}",
        "runs": [str(workdir) for workdir in workdirs],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if processes.is_first():
        print(table(curves, stamp), f"scored: {stamp['text']}", sep="\n")
        failures = write(curves, stamp, out)
        print("\nwritten:", *(out / name for name in WRITTEN if (out / name).exists()), sep="\n  ")
        results.check_drawn(failures, out)
    return curves


def _curves(
    job: forecast.Job,
    text: ScoredText,
    protocol: str,
    strides: Mapping[tuple[Path, int], int],
    blocks_of: Mapping[tuple[Path, int], list[Block]],
    unit: int,
) -> Iterator[Curve]:
    """Scores the text by one run, at every length of the job; `unit`: tokens of a stretch that is resampled."""
    config = job.config
    params, step = job.load()
    for length in job.work:
        losses_of = functools.partial(job.program(length).losses, params)
        with forecast.progress(job, length, f"{job.label} (update {step:,}) at {length:,}") as done:
            losses, positions = score(
                functools.partial(losses_of, done=done),
                text.tokens,
                blocks_of[job.workdir, length],
                batch_tokens=config.eval.batch_tokens,
            )
        interval = bootstrap_interval(losses, unit, resamples=config.eval.resamples, seed=config.eval.bootstrap_seed)
        stride = strides[job.workdir, length]
        yield Curve(job.label, protocol, config.train.length, length, stride, losses, positions, interval)


def load_configs(workdirs: Sequence[Path], data_root: Path | None) -> list[ConfigDict]:
    """The configs of runs, to be evaluated. Keys that this version does not have are named in a warning.

    Relative paths in `config.data` start from `data_root`, or else from the folder in which the run was trained.

    Raises:
      UserError: a config is not there or damaged; a file of its text is not there, and what to do about it.
    """
    configs: list[ConfigDict] = [directory.load_config(workdir) for workdir in workdirs]
    for config, workdir in zip(configs, workdirs, strict=True):
        if data_root is not None:
            config.data.folder = str(data_root.absolute())
        try:
            check_files(config)
        except MissingFile as error:
            raise MissingFile(
                f"{error}; that is what {workdir / 'config.json'} says: for relative paths, --data_root=DIR names the "
                "folder that they are in now; absolute ones are changed there"
            ) from error
        if unread := saved.unread(config):
            logging.warning(
                "%s has keys that this version does not read: %s", workdir / "config.json", ", ".join(unread)
            )
    return configs


def write(curves: Sequence[Curve], stamp: dict[str, Any], out: Path) -> list[str]:
    """Writes `WRITTEN` into `out`; see `results.write` for what is returned."""

    def numbers(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(curve.row() for curve in curves)

    def extrapolation(path: Path) -> None:
        from wavelet_jax.figures import extrapolation

        extrapolation.extrapolation(curves, stamp, path)

    def loss_by_position(path: Path) -> None:
        from wavelet_jax.figures import extrapolation

        extrapolation.loss_by_position(curves, stamp, path)

    return results.write(
        out,
        {
            "extrapolation.csv": numbers,
            "stamp.json": lambda path: path.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8"),
        },
        {"extrapolation.png": extrapolation, "loss_by_position.png": loss_by_position},
    )


def table(curves: Sequence[Curve], stamp: dict[str, Any]) -> str:
    """Perplexity by method and length with its interval, as text."""
    lengths = sorted({curve.length for curve in curves})
    names = max(24, *(len(curve.method) + 1 for curve in curves))
    width = 26  # of two spaces and hundreds with their interval
    lines = [
        f"perplexity per {stamp['unit']} [95% interval] by length; {stamp['protocol']}, "
        f"{stamp['tokens_scored']:,} tokens scored at every length, {stamp['tokenizer']} tokenizer",
        f"{'method':{names}}{'L_train':>8}" + "".join(f"{length:>{width},}" for length in lengths),
    ]
    for method in dict.fromkeys(curve.method for curve in curves):
        rows = {curve.length: curve.row() for curve in curves if curve.method == method}
        cells = (f"{row['perplexity']:.3f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]" for row in rows.values())
        train_length = next(iter(rows.values()))["train_length"]
        lines.append(f"{method:{names}}{train_length:>8,}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def check(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[Path],
    *,
    lengths: Sequence[int],
    protocol: str,
    stride: int = 0,
    other_text: Mapping[str, str] | None = None,
) -> tuple[Corpus, ScoredText]:
    """Checks everything that can be known before anything is trained or computed.

    Returns:
      The runs' corpus, with the other validation text where there is one, and what is scored of it.

    Raises:
      UserError: lengths, protocol or stride that make no sense, positions past a table, texts that differ or are short.
    """
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if not lengths or not all(isinstance(length, int) and length > 0 for length in lengths):
        raise UserError(f"lengths must be positive whole numbers: {', '.join(map(str, lengths)) or 'none given'}")
    if stride and protocol != "sliding_window":
        raise UserError(f"a stride goes with the sliding_window protocol, not with {protocol}")
    if stride < 0 or stride > min(lengths):
        raise UserError(
            f"stride {stride} must be 1 to the shortest length, {min(lengths)}, or tokens would be left out"
        )
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise UserError(f"a run is named twice: {', '.join(map(str, workdirs))}")
    for config, workdir in zip(configs, workdirs, strict=True):
        check_settings(config)
        longest = min(max(lengths), config.train.length) if protocol == "non_overlapping" else max(lengths)
        method = make_position(config)
        try:
            check_positions(longest, method.terms(method.init(jax.random.key(0))).max_positions)
        except UserError as error:
            raise UserError(f"{workdir} cannot be evaluated at length {longest}: {error}") from error
    labels(configs, workdirs)  # raises where two would be the same
    corpora = [load_corpus(config) for config in configs]
    if len({corpus.fingerprint for corpus in corpora}) > 1:
        read = (f"{path} ({corpus.tokenizer.name})" for path, corpus in zip(workdirs, corpora, strict=True))
        raise UserError(
            f"these runs read different texts or tokenizers, so their losses do not compare: {', '.join(read)}"
        )
    corpus = scored_text.with_other_text(configs[0], corpora[0], other_text)
    if configs[0].eval.sequences:
        count, seed = configs[0].eval.sequences, configs[0].eval.sequence_seed
        return corpus, scored_text.draw(corpus.validation, count, max(lengths), seed=seed)
    num_targets = _num_targets(configs[0], len(corpus.validation) - 1, max(lengths))
    return corpus, scored_text.head(corpus.validation, num_targets)


def check_settings(config: ConfigDict) -> None:
    """Raises `UserError` for the first key of a run's own that no evaluation could use."""
    numeric_keys.check(config, "model", "optimizer", "eval")
    numeric_keys.RANGES["train.length"].check("train.length", config.train.length)
    label = config.compare.label
    if not label.isprintable() or (label and not label.strip()):
        raise UserError(f"compare.label must be printable text on one line, not {label!r}")


def check_memory(
    configs: Sequence[ConfigDict], workdirs: Sequence[Path], *, lengths: Sequence[int], protocol: str
) -> None:
    """Checks memory, which `check` does not: compiles the longest program of every run, which may not be trained yet.

    Raises:
      UserError: one of them needs more memory than there is; and what `check` raises.
    """
    corpus, text = check(configs, workdirs, lengths=lengths, protocol=protocol)
    copies = [config.copy_and_resolve_references() for config in configs]  # an evaluation has a mesh of its own
    _plan(copies, workdirs, corpus, text, sorted(set(lengths)), protocol, 0)


def _plan(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[Path],
    corpus: Corpus,
    text: ScoredText,
    lengths: Sequence[int],
    protocol: str,
    stride: int,
) -> tuple[list[forecast.Job], dict[tuple[Path, int], int], dict[tuple[Path, int], list[Block]]]:
    """The jobs of the runs, whose memory is there; strides and blocks by run and length."""
    jobs, strides, blocks_of = [], {}, {}
    for config, workdir, label in zip(configs, workdirs, labels(configs, workdirs), strict=True):
        work = {}
        for length in lengths:
            moved = strides[workdir, length] = _stride(config, protocol, length, stride)
            blocks = plan_text(text, length, protocol, stride=moved, train_length=config.train.length)
            batch_size, longest = batch_shape(blocks, config.eval.batch_tokens)
            work[length] = forecast.Work(-(-len(blocks) // batch_size), batch_size, longest)
            blocks_of[workdir, length] = blocks
        jobs.append(forecast.prepare(config, workdir, label, corpus, work))
    return jobs, strides, blocks_of


def _stride(config: ConfigDict, protocol: str, length: int, stride: int) -> int:
    """Tokens from one block to the next."""
    match protocol:
        case "full_length":
            return length
        case "non_overlapping":
            return min(length, config.train.length)
        case _:
            return stride or max(1, length // 2)


def _num_targets(config: ConfigDict, available: int, longest: int) -> int:
    limit = config.eval.max_tokens or available
    num_targets = min(available, limit) // longest * longest
    if available < longest:
        raise UserError(f"length {longest} is longer than the validation text, which has {available} tokens to score")
    return num_targets or longest  # one block, where the limit is below the longest length


def labels(configs: Sequence[ConfigDict], workdirs: Sequence[Path]) -> list[str]:
    """Labels for tables and plots; duplicates get the shortest path suffix that tells them apart.

    Raises:
      UserError: two runs would have the same name all the same.
    """
    names = [directory.label(config) for config in configs]
    parts = [workdir.resolve().parts for workdir in workdirs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    ends = (_printable("/".join(part[-depth:])) for part in parts)
    found = [f"{name} ({end})" if names.count(name) > 1 else name for name, end in zip(names, ends, strict=True)]
    if same := [name for name in found if found.count(name) > 1]:
        raise UserError(f"two runs are called {same[0]!r}: give one another compare.label")
    return found


def _printable(name: str) -> str:
    """A folder's name with escapes for what does not show, such as line ends."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
