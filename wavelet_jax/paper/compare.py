"""Our numbers beside the paper's, row by row: a table, comparison.csv and comparison.png.

    python -m wavelet_jax.paper --results=runs/table1_small --out=runs/table1_small/paper

`--results` names folders that a comparison of `train.py` or `eval.py --out` has written; runs of `configs/paper/` carry
the names of the paper's rows. A run trained on another length than the paper's is set beside the row of the paper whose
lengths are the same multiples of L_train. The paper's figures (Oka et al., ICLR 2025, arXiv 2502.02004, Tables 1 to 4)
are in `results.csv` beside this file.
"""

import csv
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from wavelet_jax.commands import terminal
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.files import reading, results
from wavelet_jax.runs import directory

WRITTEN = ("comparison.csv", "comparison.png")
FILE = Path(__file__).with_name("results.csv")


@dataclasses.dataclass(frozen=True)
class Published:
    """One figure of the paper. `note` is empty, or says what is doubtful about it."""

    table: int
    row: str
    protocol: str
    train_length: int
    length: int
    perplexity: float
    note: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """One line of an extrapolation.csv; ci_low and ci_high bound the perplexity.

    Where two runs of one name were evaluated together, `row` has the end of a run's folder in brackets after the name.
    """

    row: str
    protocol: str
    train_length: int
    length: int
    perplexity: float
    ci_low: float
    ci_high: float

    @property
    def name(self) -> str:
        """The row without its brackets: what the paper may call it."""
        return self.row.split(" (")[0]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same row at the same multiple of L_train, here and in the paper."""

    ours: Measured
    paper: Published

    def line(self) -> dict[str, object]:
        """The line of comparison.csv."""
        theirs = dataclasses.asdict(self.paper)
        ours = dataclasses.asdict(self.ours)
        paper = {f"paper_{name}": theirs[name] for name in ("train_length", "length", "perplexity", "note")}
        return {"table": self.paper.table, **ours, **paper}


def published() -> list[Published]:
    """Every figure of Tables 1 to 4."""
    return _read(FILE, Published)


def measured(folder: Path) -> list[Measured]:
    """The lines of an evaluation.

    Raises:
      UserError: no extrapolation.csv there, or one without lines, without a column, or with a line that is damaged.
    """
    file = folder / "extrapolation.csv"
    if not file.is_file():
        raise UserError(f"{folder} has no extrapolation.csv: name a folder that a comparison or eval.py --out wrote")
    return _read(file, Measured, {"row": "method"})


def match(ours: Iterable[Measured], paper: Iterable[Published]) -> list[Pair]:
    """Sets every line beside the paper's line of the same name and protocol at the same multiple of L_train.

    Of several rows of the paper that would do (two training lengths, say), the one that answers most lengths is taken,
    then the one whose L_train is nearest. Lines without a counterpart are left out.
    """
    theirs = {}
    for line in paper:
        theirs.setdefault((line.row, line.protocol), {}).setdefault((line.table, line.train_length), []).append(line)
    pairs = []
    for (_, protocol, train_length), lines in _grouped(ours, lambda x: (x.row, x.protocol, x.train_length)).items():
        candidates = []
        for (_, paper_length), rows in theirs.get((lines[0].name, protocol), {}).items():
            found = [
                Pair(line, x) for line in lines for x in rows if line.length * paper_length == x.length * train_length
            ]
            candidates.append((len(found), -abs(paper_length - train_length), found))
        pairs += max(candidates, key=lambda x: x[:2])[2] if candidates else []
    return pairs


def order(pairs: Sequence[Pair]) -> tuple[int, int, int]:
    """Counts of pairs of rows at one length: (in the paper's order, in the other, undecided: our intervals overlap)."""
    same = other = undecided = 0
    for a, b in itertools.combinations(pairs, 2):
        if a.ours.ci_low <= b.ours.ci_high and b.ours.ci_low <= a.ours.ci_high:
            undecided += 1
        elif (a.ours.perplexity < b.ours.perplexity) == (a.paper.perplexity < b.paper.perplexity):
            same += 1
        else:
            other += 1
    return same, other, undecided


def report(pairs: Sequence[Pair]) -> str:
    """Perplexities here and in the paper, each also over its row's own at L_train, and how far the orders agree."""
    parts = []
    grouped = _grouped(pairs, lambda x: (x.paper.table, x.ours.protocol, x.ours.train_length, x.paper.train_length))
    for (table, protocol, train_length, paper_length), group in sorted(grouped.items()):
        by_length = dict(sorted(_grouped(group, lambda x: x.ours.length).items()))
        head = [f"{length:,} ({same[0].paper.length:,})" for length, same in by_length.items()]
        lines = [["length here (paper)", *head]]
        for row, mine in _grouped(group, lambda x: x.ours.row).items():
            at = {pair.ours.length: pair for pair in mine}
            lines.append([row, *(_cell(at.get(length), at.get(train_length)) for length in by_length)])
        names = ("pairs in the paper's order", "pairs in the other", "pairs whose intervals overlap")
        for name, counts in zip(names, zip(*map(order, by_length.values()), strict=True), strict=True):
            lines.append([name, *map(str, counts)])
        for name, side in (("lowest here", "ours"), ("lowest in the paper", "paper")):
            lowest = (min((getattr(x, side) for x in same), key=lambda x: x.perplexity) for same in by_length.values())
            lines.append([name, *(x.row for x in lowest)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        parts.append(
            f"Table {table}, {protocol}; L_train {train_length:,} here, {paper_length:,} in the paper. Perplexity here "
            "| the paper's, in brackets over the row's own at L_train:"
        )
        for first, *rest in lines:
            cells = (f"{cell:>{width + 2}}" for cell, width in zip(rest, widths[1:], strict=True))
            parts.append(f"{first:{widths[0]}}" + "".join(cells))
        parts.append("")
    return "\n".join(parts[:-1])


def _cell(pair: Pair | None, at_training: Pair | None) -> str:
    if pair is None:
        return "-"
    mark = "?" if pair.paper.note else ""
    if at_training is None:
        return f"{pair.ours.perplexity:.2f} | {pair.paper.perplexity:.2f}{mark}"
    ours, paper = (
        pair.ours.perplexity / at_training.ours.perplexity,
        pair.paper.perplexity / at_training.paper.perplexity,
    )
    return f"{pair.ours.perplexity:.2f} [{ours:.2f}] | {pair.paper.perplexity:.2f}{mark} [{paper:.2f}]"


def write(pairs: Sequence[Pair], out: Path) -> list[str]:
    """Writes comparison.csv and comparison.png into `out`; see `results.write` for what is returned."""
    lines = [pair.line() for pair in pairs]

    def table(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)

    def picture(path: Path) -> None:
        from wavelet_jax.figures import extrapolation

        extrapolation.beside_paper(pairs, path)

    return results.write(out, {"comparison.csv": table}, {"comparison.png": picture})


def _read(file: Path, of: type, renamed: dict[str, str] | None = None) -> list:
    """The lines of a CSV file as dataclasses, whose fields are its columns."""
    columns = {
        field.name: ((renamed or {}).get(field.name, field.name), cast(Any, field.type))
        for field in dataclasses.fields(of)
    }
    lines = []
    with file.open(encoding="utf-8-sig", newline="") as stream:  # some programs put a byte order mark before the header
        reader = csv.DictReader(stream)
        try:
            missing = [column for column, _ in columns.values() if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{file} has no column {', '.join(missing)}: is it an extrapolation.csv?")
            for line in reader:
                values = {name: kind(line[column]) for name, (column, kind) in columns.items()}
                if not all(isinstance(value, str) or value > 0 for value in values.values()):
                    raise ValueError("a number that cannot be")
                lines.append(of(**values))
        except UserError:
            raise
        except UnicodeDecodeError:
            raise UserError(f"{file} is not a text file in UTF-8: save it as CSV in UTF-8") from None
        except (TypeError, ValueError, csv.Error):
            place = f"line {reader.reader.line_num}"  # its own is that of the last line that it could read
            raise UserError(f"{file}, {place}: cut short, or no number above 0 where one belongs") from None
    if not lines:
        raise UserError(f"{file} has no lines: evaluate again")
    return lines


def _grouped(items: Iterable, key) -> dict:
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _together(folders: Iterable[Path]) -> list[Measured]:
    """The lines of several evaluations, of which no two are of the same row, protocol and lengths."""
    of = {}
    for folder in folders:
        for line in measured(folder):
            key = line.row, line.protocol, line.train_length, line.length
            if key in of:
                raise UserError(f"{of[key][0]} and {folder} both have {line.row} at {line.length:,} tokens: name one")
            of[key] = folder, line
    return [line for _, line in of.values()]


def _without_counterpart(line: Measured, paper: Sequence[Published]) -> UserError:
    theirs = [x for x in paper if x.row == line.name]
    if not theirs:
        return unknown("row of the paper's tables", line.name, dict.fromkeys(x.row for x in paper))
    lengths = _grouped(theirs, lambda x: f"{x.protocol} of L_train {x.train_length:,}")
    found = (f"{kind} at {', '.join(f'{x.length:,}' for x in same)}" for kind, same in lengths.items())
    return UserError(
        f"the paper has no {line.name} by {line.protocol} at {line.length:,} tokens with L_train "
        f"{line.train_length:,}, nor at the same multiples: it has {'; '.join(found)}"
    )


def _stamp(folder: Path) -> str:
    """The stamp of an evaluation in one line; empty if it has none."""
    stamp = folder / "stamp.json"
    if not stamp.is_file():
        return ""
    try:
        says = reading.read_json(stamp)
        return f"{folder}: {says['tokens_scored']:,} tokens scored, {says['tokenizer']} tokenizer"
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{stamp} is damaged: evaluate again, or remove it") from None


def compare(folders: Sequence[Path], out: Path | None = None) -> None:
    """Prints the results in `folders` beside the paper's; with `out`, also writes comparison.csv and comparison.png.

    Raises:
      UserError: before anything is printed, where a folder has no results or the paper has no counterpart to any.
    """
    if out:
        directory.check_folder(out)
    ours, paper = _together(folders), published()
    pairs = match(ours, paper)
    if not pairs:
        raise _without_counterpart(ours[0], paper)
    stamps = [line for folder in folders if (line := _stamp(folder))]
    print(*stamps, report(pairs), sep="\n")
    left_out = dict.fromkeys(x.row for x in ours if x.row not in {pair.ours.row for pair in pairs})
    if left_out:
        print(f"\nwithout a counterpart in the paper: {', '.join(left_out)}")
    if out:
        failures = write(pairs, out)
        print("\nwritten:", *(out / name for name in WRITTEN if (out / name).exists()), sep="\n  ")
        results.check_drawn(failures, out)
    else:
        terminal.check()
