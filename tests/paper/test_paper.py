import csv
import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.image
import pytest
from support.results import PAPER, as_measured, lines_of, write_evaluation

from wavelet_jax.errors import UserError
from wavelet_jax.paper import __main__ as paper_command
from wavelet_jax.paper import compare


@pytest.mark.parametrize(
    ("table", "row", "protocol", "train_length", "length", "perplexity"),
    [
        (1, "wavelet_ricker", "full_length", 512, 2512, 17.99),
        (1, "alibi", "full_length", 1024, 5024, 17.88),
        (1, "rope_theta1e4", "non_overlapping", 512, 128, 23.82),
        (2, "wavelet_ricker_a2^2..2^9", "non_overlapping", 4096, 32768, 8.6),
        (3, "gaussian_2^0..2^15", "full_length", 512, 2512, 17.77),
        (3, "haar_2^0", "full_length", 512, 2512, 299.26),
        (4, "coif16", "full_length", 512, 1012, 132.14),
    ],
)
def test_the_papers_figures(table, row, protocol, train_length, length, perplexity):
    """Read off the paper once more, one by one."""
    assert [
        x.perplexity
        for x in PAPER
        if (x.table, x.row, x.protocol, x.train_length, x.length) == (table, row, protocol, train_length, length)
    ] == [perplexity]


def test_no_figure_stands_twice_and_none_is_missing():
    assert [sum(x.table == table for x in PAPER) for table in (1, 2, 3, 4)] == [144, 8, 138, 162]
    assert len({(x.table, x.row, x.protocol, x.train_length, x.length) for x in PAPER}) == len(PAPER)
    assert [x.row for x in PAPER if x.note] == ["gaussian_2^0..2^3"]


@pytest.mark.parametrize(("train_length", "divide"), [(512, 1), (512, 4), (1024, 1), (1024, 4)])
def test_a_smaller_model_meets_the_same_multiples_of_its_length(train_length, divide):
    lines = lines_of(1, train_length)
    pairs = compare.match([as_measured(x, divide=divide) for x in lines], PAPER)
    assert [pair.paper for pair in pairs] == lines


def test_what_the_paper_has_not_is_left_out():
    ours = as_measured(lines_of(1, 512)[0])
    others = [{"row": "t5"}, {"protocol": "sliding_window"}, {"length": 513}, {"train_length": 500}]
    assert compare.match([dataclasses.replace(ours, **change) for change in others], PAPER) == []


def test_orders_agree_or_not_or_are_not_decided():
    lines = [x for x in lines_of(1, 512) if x.length == 2512]
    exact = compare.match([as_measured(x) for x in lines], PAPER)
    all_pairs = len(lines) * (len(lines) - 1) // 2
    assert compare.order(exact) == (all_pairs, 0, 0)
    reversed_ = compare.match([as_measured(x, perplexity=1000 / x.perplexity) for x in lines], PAPER)
    assert compare.order(reversed_) == (0, all_pairs, 0)
    wide = compare.match([as_measured(x, spread=100.0) for x in lines], PAPER)
    assert compare.order(wide) == (0, 0, all_pairs)


def test_the_report_has_both_numbers_and_what_they_are_over_the_training_length():
    lines = [
        x for x in lines_of(3, 512) if x.row in ("ricker_2^0..2^7", "gaussian_2^0..2^3") and x.length in (256, 512)
    ]
    ours = [as_measured(x, divide=4, perplexity={256: 30.0, 512: 20.0}[x.length]) for x in lines]
    said = compare.report(compare.match(ours, PAPER))
    assert "Table 3, full_length; L_train 128 here, 512 in the paper" in said
    assert "30.00 [1.50] | 20.82 [1.08]" in said
    assert "30.00 [1.50] | 29.96? [1.55]" in said  # what looks misprinted is marked
    assert "128 (512)" in said


def test_the_command(tmp_path):
    """Of two folders: the table, the CSV file, a picture with something in it."""
    ours = [as_measured(x, divide=4, spread=1.01) for x in lines_of(1, 512)]
    first = write_evaluation(tmp_path / "first", ours[:20])
    second = write_evaluation(tmp_path / "second", [*ours[20:], dataclasses.replace(ours[0], row="t5")])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "wavelet_jax.paper", f"--results={first}", f"--results={second}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without a counterpart in the paper: t5" in done.stdout
    assert f"{first}: 9 tokens scored, word 5 tokenizer" in done.stdout
    with (out / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(ours)
    assert all(float(x["perplexity"]) == float(x["paper_perplexity"]) for x in lines)
    assert (
        len({tuple(pixel) for pixel in matplotlib.image.imread(out / "comparison.png")[::4, ::4].reshape(-1, 4)}) > 10
    )


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no extrapolation\.csv: name a folder that a comparison"):
        compare.measured(tmp_path)
    (tmp_path / "extrapolation.csv").write_text("method,length\nrope,5\n")
    with pytest.raises(UserError, match="has no column protocol, train_length"):
        compare.measured(tmp_path)
    folder = write_evaluation(tmp_path / "other", [as_measured(lines_of(1, 512)[0], row="rope_theta1e5")])
    done = subprocess.run(
        [sys.executable, "-m", "wavelet_jax.paper", f"--results={folder}"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown row of the paper's tables 'rope_theta1e5': did you mean 'rope_theta" in done.stderr
    good = (folder / "extrapolation.csv").read_text()
    header, line = good.splitlines()
    for content, said in (
        (f"{header}\n{line[:30]}", "extrapolation.csv, line 2: cut short, or no number"),
        (good.replace("full_length", "full_length,x"), "line 2: cut short, or no number"),
        (header, "extrapolation.csv has no lines"),
    ):
        (folder / "extrapolation.csv").write_text(content)
        with pytest.raises(UserError, match=said):
            compare.measured(folder)
    done = subprocess.run([sys.executable, "-m", "wavelet_jax.paper"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--results=DIR" in done.stderr


def test_two_runs_of_one_row_stay_two():
    line = lines_of(1, 512)[0]
    pairs = compare.match([as_measured(line, row=f"nope ({end})") for end in ("a", "b")], PAPER)
    assert [(pair.ours.row, pair.paper) for pair in pairs] == [("nope (a)", line), ("nope (b)", line)]
    assert "nope (b)" in compare.report(pairs)


def run_main(monkeypatch, *folders) -> None:
    monkeypatch.setattr(paper_command, "RESULTS", SimpleNamespace(value=[str(folder) for folder in folders]))
    monkeypatch.setattr(paper_command, "OUT", SimpleNamespace(value=None))
    paper_command.main()


def test_what_cannot_be_set_beside_the_paper_says_why(tmp_path, monkeypatch):
    line = next(x for x in PAPER if x.row == "alibi" and x.protocol == "full_length")
    twice = [write_evaluation(tmp_path / name, [as_measured(line)]) for name in ("a", "b")]
    with pytest.raises(UserError, match=f"a and .*b both have alibi at {line.length:,} tokens: name one"):
        run_main(monkeypatch, *twice)
    other = write_evaluation(tmp_path / "c", [dataclasses.replace(as_measured(line), protocol="sliding_window")])
    with pytest.raises(
        UserError, match=r"the paper has no alibi by sliding_window at .*: it has .*full_length of L_train 512 at 128, "
    ):
        run_main(monkeypatch, other)
    (twice[0] / "stamp.json").write_text("{}")
    with pytest.raises(UserError, match=r"stamp\.json is damaged"):
        run_main(monkeypatch, twice[0])
