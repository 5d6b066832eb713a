"""Looks into runs: attention maps, receptive fields and gradients; or draws what needs no run.

    python -m wavelet_jax.analysis --workdir=runs/quickstart/alibi --workdir=runs/quickstart/wavelet \
        --length=1012 --layers=3 --out=runs/look
    python -m wavelet_jax.analysis --figures --out=runs/figures

The first writes attention_map_layerN_THRESHOLD.png (one panel per head and run), receptive_field.csv and .png,
gradient.csv and .png, and stamp.json; at any length, in the memory of the key-value cache and of a block of queries.
The second draws the paper's pictures that no trained model is needed for.
"""

from absl import flags

from wavelet_jax.analysis import report
from wavelet_jax.commands import cli
from wavelet_jax.errors import UserError
from wavelet_jax.files.reading import user_path
from wavelet_jax.runs import directory

WORKDIRS = flags.DEFINE_multi_string("workdir", [], "directory of a run; once for every run to show side by side")
LENGTH = flags.DEFINE_integer("length", 1012, "of the text, tokens; 1012 as in the paper's Figures 2, 3, 7 and 8")
LAYERS = flags.DEFINE_list("layers", [], "which, counted from 0: 0,3; all if left out")
HEADS = flags.DEFINE_list("heads", [], "which, counted from 0; all if left out")
THRESHOLD = flags.DEFINE_list("threshold", ["0.001"], "probabilities from which a map is black; a picture for each")
LABELS = flags.DEFINE_bool("labels", False, f"write the tokens beside maps; up to --length={report.LABELLED}")
TEXTS = flags.DEFINE_integer("texts", 16, "that gradients are averaged over; 0: no gradients")
PIXELS = flags.DEFINE_integer("pixels", 256, "cells per side of a map at most; each shows its largest probability")
FIGURES = flags.DEFINE_bool("figures", False, "draw what needs no run, instead")
DATA_ROOT = flags.DEFINE_string(
    "data_root", None, "folder that relative paths in the runs' config.data start from; left out: this one"
)
OUT = flags.DEFINE_string("out", None, "directory for the results")


def main() -> None:
    if not OUT.value or bool(WORKDIRS.value) == FIGURES.value:
        raise UserError("python -m wavelet_jax.analysis needs --out, and --workdir (once or more) or --figures")
    out = user_path(OUT.value, "--out")
    if FIGURES.value:
        directory.check_folder(out)
        from wavelet_jax.analysis import pictures  # matplotlib takes a second to import, and bad input should not wait

        print("written:", *pictures.without_a_run(out), sep="\n  ")
        return
    report.analyse(
        [user_path(workdir, "--workdir") for workdir in WORKDIRS.value],
        length=LENGTH.value,
        layers=_numbers(LAYERS, int),
        heads=_numbers(HEADS, int),
        thresholds=_numbers(THRESHOLD, float) or [],
        labels=LABELS.value,
        texts=TEXTS.value,
        pixels=PIXELS.value,
        out=out,
        data_root=user_path(DATA_ROOT.value, "--data_root") if DATA_ROOT.value else None,
    )


def _numbers(flag: flags.FlagHolder, kind: type) -> list | None:
    """The flag's list of numbers; None where it is empty."""
    try:
        return [kind(value) for value in flag.value] or None
    except ValueError as error:
        raise UserError(f"--{flag.name} takes numbers, not {','.join(flag.value)}") from error


if __name__ == "__main__":
    cli.run(main)
