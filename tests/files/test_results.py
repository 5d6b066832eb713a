"""Whatever a run is called and whatever happens to a picture: the numbers are written, and names look as they are."""

import csv
import dataclasses
import re
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from support.results import PAPER, as_measured, curves_and_stamp, fake_maps, lines_of, write_evaluation

from configs import default
from wavelet_jax import positions
from wavelet_jax.analysis import pictures, receptive_field, report
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate, protocols
from wavelet_jax.figures import extrapolation, style
from wavelet_jax.files import results
from wavelet_jax.hardware import memory
from wavelet_jax.paper import __main__ as paper_command
from wavelet_jax.paper import compare

NAMES = (
    r"$\frac{1$",
    "$x$",
    r"\$5 and $6$",
    "_hidden",
    "_child0",
    "a,\"b\";'c'",
    "% & # ^ {} ~ \\",
    "naïve ψ 波 😀",
    "x" * 300,
    "%s {name} <b>",
)


def named_curves(*names: str):
    curves, stamp = curves_and_stamp()
    return [dataclasses.replace(curve, method=name) for name in names for curve in curves[:2]], stamp


@pytest.fixture
def seen(monkeypatch):
    """seen(draw) is the set of texts of the picture that `draw(path)` draws, as SVG has them."""
    texts = set()

    def save(figure, path: Path, note: str = "") -> None:
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            svg = path.with_suffix(".svg")
            plain_save(figure, svg, note)
        for element in xml.etree.ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text"):
            texts.add("".join(element.itertext()).replace("\u200b", ""))

    def plain_save(figure, path: Path, note: str) -> None:
        monkeypatch.setattr(figure, "savefig", lambda path, **_: type(figure).savefig(figure, path))
        real_save(figure, path, note)

    def draw_and_look(draw, path: Path) -> set[str]:
        texts.clear()
        draw(path)
        return set(texts)

    real_save = style.save
    monkeypatch.setattr(style, "save", save)
    return draw_and_look


def test_names_are_drawn_letter_by_letter(seen, tmp_path):
    """In every picture that shows the name of a run; warnings, of a glyph that is missing say, would be errors here."""
    shown = [name if len(name) < 60 else "x" * 30 + "…" + "x" * 29 for name in NAMES]
    curves, stamp = named_curves(*NAMES)
    alibi = positions.make("alibi", num_heads=2, head_dim=16)
    rows = [row for name in NAMES for row in receptive_field.rows(name, alibi, fake_maps())]
    line = compare.match([as_measured(lines_of(1, 512)[0])], PAPER)[0]
    pairs = [dataclasses.replace(line, ours=dataclasses.replace(line.ours, row=name)) for name in NAMES]
    maps = {name: fake_maps() for name in NAMES}
    gradients = {name: np.linspace(0.5, 1, 64) for name in NAMES}
    for draw, texts in (
        (lambda path: extrapolation.extrapolation(curves, stamp, path), shown),
        (lambda path: extrapolation.loss_by_position(curves, stamp, path), shown),
        (lambda path: extrapolation.beside_paper(pairs, path), shown),
        (lambda path: pictures.attention_map(maps, 3, 0.01, path, note=""), [f"{name}, head 0" for name in shown]),
        (lambda path: pictures.receptive_field(rows, 64, path, note=NAMES[0]), [*shown, NAMES[0]]),
        (lambda path: pictures.gradient(gradients, [16], path, note=NAMES[3]), [*shown, NAMES[3]]),
        (
            lambda path: pictures.attention_map({NAMES[0]: fake_maps()}, 3, 0.01, path, note=""),
            [f"Attention of layer 3 ({NAMES[0]}): 0.01 and more in black"],
        ),
    ):
        assert set(texts) - seen(draw, tmp_path / "a.png") == set()


def test_what_does_not_show_is_escaped():
    assert style.plain("a\nb\x07\ud800") == r"a\nb\x07\ud800"
    assert style.plain("rope_theta5e5") == "rope_theta5e5"


@pytest.mark.parametrize("losses", [np.nan, np.inf, 1000.0])
def test_curves_that_are_not_finite_are_drawn(tmp_path, losses):
    """A model that has diverged: its perplexity is not a number, or more than a number can be."""
    curves, stamp = curves_and_stamp()
    curves = [
        dataclasses.replace(curve, losses=np.full_like(curve.losses, losses), ci_loss=(losses, losses))
        for curve in curves
    ]
    assert evaluate.write(curves, stamp, tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(evaluate.WRITTEN)


def test_names_come_back_from_a_csv_file(tmp_path):
    names = [*NAMES, "two\nlines\r\n", "'", '"', '""', " ", ",", "é"]
    curves, stamp = named_curves(*names)
    evaluate.write(curves, stamp, tmp_path)
    with (tmp_path / "extrapolation.csv").open(encoding="utf-8", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == [name for name in names for _ in range(2)]
    assert [line.row for line in compare.measured(tmp_path)] == [name for name in names for _ in range(2)]


def broken(*_, **__) -> None:
    raise ValueError("no\nfont")


def test_a_picture_that_fails_costs_no_number(tmp_path, monkeypatch):
    curves, stamp = curves_and_stamp()
    (tmp_path / "extrapolation.png").write_text("of an earlier evaluation")
    monkeypatch.setattr(extrapolation, "extrapolation", broken)
    failures = evaluate.write(curves, stamp, tmp_path)
    assert failures == ["extrapolation.png could not be drawn (no font)"]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == set(evaluate.WRITTEN) - {"extrapolation.png"}
    with pytest.raises(UserError, match=r"^extrapolation.png could not be drawn \(no font\); the numbers are written"):
        results.check_drawn(failures, tmp_path)
    results.check_drawn([], tmp_path)


def test_a_comparison_with_the_paper_is_written_without_its_picture(tmp_path, monkeypatch, capsys):
    folder = write_evaluation(tmp_path / "ours", [as_measured(line) for line in lines_of(1, 512)[:3]])
    monkeypatch.setattr(paper_command, "RESULTS", SimpleNamespace(value=[str(folder)]))
    monkeypatch.setattr(paper_command, "OUT", SimpleNamespace(value=str(tmp_path / "out")))
    monkeypatch.setattr(extrapolation, "beside_paper", broken)
    with pytest.raises(UserError, match=r"comparison.png could not be drawn"):
        paper_command.main()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["comparison.csv"]
    assert capsys.readouterr().out.endswith(f"written:\n  {tmp_path}/out/comparison.csv\n")


def test_an_analysis_is_written_without_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "attention_map", broken)
    maps = {"rope": fake_maps()}
    rows = receptive_field.rows("rope", positions.make("rope", num_heads=2, head_dim=16), maps["rope"])
    stamp = {"updates": {"rope": 3}, "text": "", "tokenizer": "byte", "cell": "1", "layers": [3], "thresholds": [0.01]}
    stamp |= {"receptive_field": "", "length": 64, "gradient": "", "train_lengths": {"rope": 16}}
    written, failures = report._write(maps, rows, {"rope": np.linspace(0.5, 1, 64)}, stamp, None, tmp_path)
    assert failures == ["attention_map_layer3_0.01.png could not be drawn (no font)"]
    names = ["gradient.csv", "gradient.png", "receptive_field.csv", "receptive_field.png", "stamp.json"]
    assert [path.name for path in written] == sorted(path.name for path in tmp_path.iterdir()) == names


# Settings of an evaluation, before a comparison is trained


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eval.bootstrap_seed": -1}, "eval.bootstrap_seed must be at least 0, not -1"),
        ({"eval.sequence_seed": -1}, "eval.sequence_seed must be at least 0, not -1"),
        ({"eval.resamples": 10**9}, "eval.resamples must be at least 1 and at most 1000000, not 1000000000"),
        ({"eval.resamples": 0}, "eval.resamples must be at least 1, not 0"),
        ({"eval.max_tokens": -1}, "eval.max_tokens must be at least 0, not -1"),
        ({"eval.batch_tokens": 0}, "eval.batch_tokens must be at least 1, not 0"),
        ({"eval.prefill_chunk": -1}, "eval.prefill_chunk must be at least 0, not -1"),
        ({"optimizer.warmup_steps": -1}, "optimizer.warmup_steps must be at least 0, not -1"),
        ({"train.length": 0}, "train.length must be at least 1, not 0"),
        ({"eval.sequences": -1}, "eval.sequences must be at least 0, not -1"),
        ({"compare.label": "two\nlines"}, r"compare.label must be printable text on one line, not 'two\nlines'"),
        ({"compare.label": "\x1b[31m"}, r"compare.label must be printable text on one line, not '\x1b[31m'"),
        ({"compare.label": " "}, "compare.label must be printable text on one line, not ' '"),
    ],
)
def test_settings_are_checked_before_anything_is_trained(small_config, tmp_path, change, said):
    config = small_config()
    config.update_from_flattened_dict(change)
    for check in (
        lambda: evaluate.check_settings(config),
        lambda: evaluate.check([config], [tmp_path / "new"], lengths=[64], protocol="full_length"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
            check()


def test_labels_of_any_letters_are_taken():
    config = default.get_config()
    for name in NAMES:
        config.compare.label = name
        evaluate.check_settings(config)


def test_memory_is_looked_at_before_anything_is_trained(small_config, tmp_path, monkeypatch):
    config = small_config("nope")
    before = config.to_json()
    options = {"lengths": [64, 32], "protocol": "full_length"}
    evaluate.check_memory([config], [tmp_path / "new"], **options)
    monkeypatch.setattr(memory, "available", lambda: (2**20, "this machine"))
    with pytest.raises(UserError, match=r"nope at length 64 would take .* of memory"):
        evaluate.check_memory([config], [tmp_path / "new"], **options)
    assert config.to_json() == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("at_once", [1, 7, 50, 10**9])
def test_resamples_are_drawn_in_parts_of_bounded_memory(monkeypatch, at_once):
    """The same draws as all at once, in the words of the definition."""
    losses = np.random.default_rng(1).normal(3, 1, 1000).astype(np.float32)
    means = losses.reshape(50, 20).mean(axis=1, dtype=np.float64)
    drawn = np.random.default_rng(5).integers(50, size=(300, 50))
    expected = np.percentile(means[drawn].mean(axis=1), (2.5, 97.5))
    monkeypatch.setattr(protocols, "_DRAWN_AT_ONCE", at_once)
    assert protocols.bootstrap_interval(losses, 20, resamples=300, seed=5) == tuple(expected)


def test_equal_names_are_told_apart_or_refused(tmp_path):
    configs = [default.get_config("rope") for _ in range(3)]
    found = evaluate.labels(configs[:2], [tmp_path / "a\nb", tmp_path / "$c"])
    assert found == [r"rope (a\nb)", "rope ($c)"]
    configs[2].compare.label = "rope (a)"
    with pytest.raises(UserError, match=re.escape("two runs are called 'rope (a)': give one another compare.label")):
        evaluate.labels(configs, [tmp_path / "a", tmp_path / "b", tmp_path / "c"])
