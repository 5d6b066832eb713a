"""Reads finished or unfinished runs and writes their attention maps, receptive fields and gradients, with a stamp."""

import csv
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from wavelet_jax.analysis import attention_maps, receptive_field
from wavelet_jax.data import Corpus
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate
from wavelet_jax.files import results
from wavelet_jax.hardware import memory
from wavelet_jax.model.decoder import make_position
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import checkpoint, directory
from wavelet_jax.training import steps

LABELLED = 64  # tokens of a map that may be labelled: more labels would lie on each other


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One run to analyse, compiled, without its parameters."""

    label: str
    config: ConfigDict
    workdir: Path
    abstract_params: dict
    program: attention_maps.Program
    gradient: jax.stages.Compiled | None  # (params, tokens [1, L+1]) -> [1, L]; None: not asked for


def analyse(
    workdirs: Sequence[Path],
    *,
    length: int,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    thresholds: Sequence[float],
    labels: bool,
    texts: int,
    pixels: int,
    out: Path,
    data_root: Path | None = None,
) -> list[Path]:
    """Writes the attention maps, receptive fields and gradients of runs.

    Args:
      workdirs: directories of runs that read the same corpus with the same tokenizer.
      length: tokens of the text, the first of the validation stream.
      layers, heads: which ones, counted from 0; None: all.
      thresholds: one picture per layer and threshold.
      labels: whether to write the tokens beside a map.
      texts: that the gradient is averaged over; 0: no gradient.
      pixels: cells per side of a map, at most.
      out: the folder for the results.
      data_root: the folder that relative paths in the runs' `config.data` start from; None: the current one.

    Returns:
      What was written.

    Raises:
      UserError: before anything is computed or written, for what cannot be done.
    """
    configs = evaluate.load_configs(workdirs, data_root)
    directory.check_folder(out)
    _check_options(length, thresholds, labels, texts, pixels)
    layers = _chosen("layers", layers, [config.model.num_layers for config in configs])
    heads = _chosen("heads", heads, [config.model.num_heads for config in configs])
    # Also lengths past a learned table or the text, and runs that do not compare.
    corpus, _ = evaluate.check(configs, workdirs, lengths=[length], protocol="full_length")
    for workdir in workdirs:
        if checkpoint.latest_step(workdir) is None:
            raise UserError(f"{workdir} has no checkpoint to look into: train it first")

    names = evaluate.labels(configs, workdirs)
    jobs = [
        _prepare(name, config, workdir, corpus, layers, heads, length, pixels, texts)
        for name, config, workdir in zip(names, configs, workdirs, strict=True)
    ]
    first_counted = length // 2  # each counted query then has at least half of the text before it
    starts = receptive_field.texts(len(corpus.validation), length, texts) if texts else []
    maps, rows, gradients, updates = {}, [], {}, {}
    for job in jobs:
        params, updates[job.label] = checkpoint.restore_params(
            job.workdir, job.abstract_params, fingerprint=corpus.fingerprint
        )
        _print_forecast(job, length)
        # After a block, the bar's estimate of what remains is good: all blocks meet all keys, seen or hidden.
        with _bar(length, f"{job.label} at {length:,}: maps", "token") as bar:
            text = corpus.validation[:length]
            maps[job.label] = attention_maps.measure(
                job.program, params, text, first_counted=first_counted, done=bar.update
            )
        rows += receptive_field.rows(job.label, make_position(job.config), maps[job.label])
        if starts:
            with _bar(len(starts), f"{job.label} at {length:,}: gradients", "text") as bar:
                assert job.gradient is not None
                gradient = functools.partial(job.gradient, params)
                gradients[job.label] = receptive_field.cumulative_gradient(
                    gradient, corpus.validation, length, starts, done=bar.update
                )
    stamp = {
        "length": length,
        "text": f"tokens 0 to {length - 1} of the validation stream",
        "layers": layers,
        "heads": heads,
        "thresholds": list(thresholds),
        "cell": f"{jobs[0].program.cell} x {jobs[0].program.cell} queries and keys",
        "receptive_field": f"mean over queries {first_counted} to {length - 1}",
        "gradient": f"of the loss of the last target, mean over {len(starts)} texts" if starts else "not asked for",
        "tokenizer": corpus.tokenizer.name,
        "corpus": corpus.fingerprint,
        "runs": {name: str(workdir) for name, workdir in zip(names, workdirs, strict=True)},
        "updates": updates,
        "train_lengths": {job.label: job.config.train.length for job in jobs},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    shown = _token_labels(corpus, length) if labels else None
    print(table(rows, stamp))
    print(f"\nmost memory held: {memory.shown(memory.peak())}")
    written, failures = _write(maps, rows, gradients, stamp, shown, out)
    print("\nwritten:", *written, sep="\n  ")
    results.check_drawn(failures, out)
    return written


def _check_options(length: int, thresholds: Sequence[float], labels: bool, texts: int, pixels: int) -> None:
    directory.check_least({"--length": (length, 2), "--texts": (texts, 0), "--pixels": (pixels, 16)})
    for threshold in thresholds:
        if not 0 < threshold < 1:
            raise UserError(f"--threshold {threshold:g} must be a probability, between 0 and 1")
    if labels and length > LABELLED:
        raise UserError(f"--labels needs a --length of at most {LABELLED}, not {length}")


def _print_forecast(job: Job, length: int) -> None:
    program, (limit, owner) = job.program, memory.available()
    print(
        f"{job.label}: {length:,} tokens, {len(program.blocks)} blocks of {program.blocks[0][1]:,} queries, "
        f"at least {memory.shown(program.bytes)} of the {memory.shown(limit)} of {owner}",  # allocators hold more
        file=sys.stderr,
    )


def table(rows: Sequence[dict[str, Any]], stamp: dict[str, Any]) -> str:
    """Measured distances by model, layer and head, as text."""
    names = max(24, *(len(row["method"]) + 1 for row in rows))
    lines = [
        f"distance (tokens) that holds 50 / 90 / 99% of the attention, {stamp['receptive_field']}, "
        f"length {stamp['length']:,}",
        f"{'model':{names}}{'layer':>6}{'head':>6}{'50%':>9}{'90%':>9}{'99%':>9}",
    ]
    for row in rows:
        if row["kind"] == "measured":
            reached = "".join(f"{row[column]:>9,}" for column in receptive_field.DISTANCES)
            lines.append(f"{row['method']:{names}}{row['layer']:>6}{row['head']:>6}{reached}")
    return "\n".join(lines)


def _chosen(name: str, chosen: Sequence[int] | None, counts: Sequence[int]) -> tuple[int, ...]:
    """The layers or heads to look at, ascending; `counts`: how many there are in each run."""
    fewest = min(counts)
    if chosen is None and len(set(counts)) > 1:
        raise UserError(f"these runs have different numbers of {name}: name some of 0 to {fewest - 1} by --{name}")
    chosen = range(fewest) if chosen is None else sorted(set(chosen))
    wrong = [each for each in chosen if not 0 <= each < fewest]
    if wrong:
        raise UserError(f"--{name} {', '.join(map(str, wrong))}: allowed are 0 to {fewest - 1}")
    return tuple(chosen)


def _prepare(
    label: str,
    config: ConfigDict,
    workdir: Path,
    corpus: Corpus,
    layers: Sequence[int],
    heads: Sequence[int],
    length: int,
    pixels: int,
    texts: int,
) -> Job:
    """Compiles what a run needs, and sees that its memory is there."""
    config.mesh.update(data=1, fsdp=-1, context=1, tensor=1)  # the devices here, whatever the run was trained on
    mesh = sharding.make_mesh(config)
    graphdef, abstract_state = steps.shapes(config, corpus.tokenizer.vocab_size, mesh)
    params = abstract_state.params
    program = attention_maps.build(
        graphdef,
        params,
        mesh,
        num_heads=config.model.num_heads,
        layers=layers,
        heads=heads,
        length=length,
        pixels=pixels,
    )
    gradient = None
    if texts:
        compute = jax.jit(
            receptive_field.make_gradient(graphdef, config.model.d_model), out_shardings=sharding.everywhere(mesh)
        )
        gradient = compute.lower(params, jax.ShapeDtypeStruct((1, length + 1), jnp.int32)).compile()
        needed, (limit, owner) = memory.in_use() + memory.needed(gradient), memory.available()
        if needed > limit:
            raise UserError(
                f"gradients at length {length:,} would take {memory.shown(needed)} of memory, and {owner} has "
                f"{memory.shown(limit)}: choose a lower --length, or --texts=0"
            )
    return Job(label, config, workdir, params, program, gradient)


def _bar(total: int, title: str, unit: str) -> tqdm:
    return tqdm(total=total, desc=title, unit=unit, leave=False, mininterval=directory.PROGRESS_INTERVAL, miniters=0)


def _token_labels(corpus: Corpus, length: int) -> list[str]:
    """The text of each token, with white space made visible."""
    visible = str.maketrans({" ": "␣", "\n": "\\n", "\t": "\\t", "\r": "\\r"})
    return [
        corpus.tokenizer.decode(np.array([token])).translate(visible) for token in corpus.validation[:length].tolist()
    ]


def _write(
    maps: dict[str, attention_maps.Maps],
    rows: Sequence[dict[str, Any]],
    gradients: dict[str, np.ndarray],
    stamp: dict[str, Any],
    tokens: Sequence[str] | None,
    out: Path,
) -> tuple[list[Path], list[str]]:
    """All of one analysis, or what was there before: what was written, and what `results.write` returns."""
    columns = receptive_field.COLUMNS
    by_head = ([row[column] for column in columns] for row in rows)
    files = {"receptive_field.csv": lambda path: _write_csv(path, columns, by_head)}
    if gradients:
        by_distance = zip(range(stamp["length"]), *gradients.values(), strict=True)
        files["gradient.csv"] = lambda path: _write_csv(path, ("distance", *gradients), by_distance)
    files["stamp.json"] = lambda path: path.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    drawn = _pictures(maps, rows, gradients, stamp, tokens)
    failures = results.write(out, files, drawn)
    return [out / name for name in sorted((*files, *drawn)) if (out / name).exists()], failures


def _write_csv(path: Path, columns: Iterable[str], lines: Iterable[Iterable[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(lines)


def _pictures(
    maps: dict[str, attention_maps.Maps],
    rows: Sequence[dict[str, Any]],
    gradients: dict[str, np.ndarray],
    stamp: dict[str, Any],
    tokens: Sequence[str] | None,
) -> dict[str, Callable[[Path], None]]:
    """By the file's name, what draws a picture of the analysis."""

    def draw(name: str, *arguments: object, **options: object) -> Callable[[Path], None]:
        def drawn(path: Path) -> None:
            from wavelet_jax.analysis import pictures

            getattr(pictures, name)(*arguments, path, **options)

        return drawn

    updates = ", ".join(f"{name} at update {step:,}" for name, step in stamp["updates"].items())
    note = f"{stamp['text']}; {stamp['tokenizer']} tokenizer; {updates}"
    cells = f"cells of {stamp['cell']}; {note}"
    found = {
        f"attention_map_layer{layer}_{threshold:g}.png": draw(
            "attention_map", maps, layer, threshold, note=cells, tokens=tokens
        )
        for layer in stamp["layers"]
        for threshold in stamp["thresholds"]
    }
    described = f"{stamp['receptive_field']}; {note}"
    found["receptive_field.png"] = draw("receptive_field", rows, stamp["length"], note=described)
    if gradients:
        described = f"{stamp['gradient']} of {stamp['length']:,} tokens; {stamp['tokenizer']} tokenizer; {updates}"
        found["gradient.png"] = draw("gradient", gradients, list(stamp["train_lengths"].values()), note=described)
    return found
