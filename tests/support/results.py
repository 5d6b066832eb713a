"""Results of evaluations and analyses, made up, and lines of the paper's tables as if they were ours."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np

from wavelet_jax.analysis import attention_maps
from wavelet_jax.evaluation.evaluate import COLUMNS, Curve
from wavelet_jax.paper import compare

PAPER = compare.published()


def as_measured(line: compare.Published, *, divide: int = 1, spread: float = 1.0, **changes) -> compare.Measured:
    """A line of the paper as if it were ours, of a model whose lengths are `divide` times shorter."""
    perplexity = changes.pop("perplexity", line.perplexity)
    values = {"row": line.row, "protocol": line.protocol, "perplexity": perplexity, **changes}
    lengths = {"train_length": line.train_length // divide, "length": line.length // divide}
    return compare.Measured(**values, **lengths, ci_low=perplexity / spread, ci_high=perplexity * spread)


def lines_of(table: int, train_length: int, protocol: str = "full_length") -> list[compare.Published]:
    wanted = (table, train_length, protocol)
    return [x for x in PAPER if (x.table, x.train_length, x.protocol) == wanted]


def write_evaluation(folder: Path, lines: list[compare.Measured]) -> Path:
    """An extrapolation.csv and its stamp, as an evaluation leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "extrapolation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for line in lines:
            values = dataclasses.asdict(line)
            writer.writerow({"method": values.pop("row"), "stride": 1, "tokens_scored": 9, "loss": 1.0, **values})
    (folder / "stamp.json").write_text(json.dumps({"tokens_scored": 9, "tokenizer": "word 5", "unit": "word"}))
    return folder


def curves_and_stamp():
    rng = np.random.default_rng(0)
    curves = [
        Curve(
            method,
            "full_length",
            64,
            length,
            length,
            (np.log(3) + rng.normal(0, 0.1, 1024)).astype(np.float32),
            np.tile(np.arange(length, dtype=np.int32), 1024 // length),
            (1.0, 1.2),
        )
        for method in ("wavelet", "rope")
        for length in (64, 256)
    ]
    stamp = {
        "protocol": "full_length",
        "stride": [64, 256],
        "tokens_scored": 1024,
        "tokenizer": "byte",
        "unit": "byte",
        "interval": "95%",
    }
    return curves, stamp


def fake_maps(length: int = 64) -> attention_maps.Maps:
    """Two heads: a band of 8 tokens, and the first token at any distance."""
    band = np.tril(np.ones((length, length))) - np.tril(np.ones((length, length)), -8)
    sink = np.zeros((length, length))
    sink[:, 0] = 1
    highest = np.stack([0.05 * band, 0.002 * sink])[None].astype(np.float32)
    mass = np.zeros((1, 2, length))
    mass[0, 0, :8], mass[0, 1, length - 1] = 1 / 8, 1
    return attention_maps.Maps((3,), (0, 1), length, 1, highest, 0, mass)
