"""Evaluates runs past their training length: a table, extrapolation.csv, extrapolation.png and loss_by_position.png.

    python eval.py --workdir=runs/quickstart/wavelet --workdir=runs/quickstart/rope \
        --lengths=128,512,2048 --protocol=sliding_window --stride=64 --out=runs/sliding

The text is the validation text of the runs; `--validation_split=test` takes the test split of a TFDS data set, and
`--validation_files` other files. Runs remember in which folder they were trained; where the text has moved,
`--data_root` names the folder that their relative paths start from. `--sequences=100` scores 100 sequences of the
longest length, drawn from all of it.

Before it starts it says what memory and time it will take, and refuses what does not fit.
"""

from absl import flags

from wavelet_jax.commands import cli
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate, protocols
from wavelet_jax.files import places
from wavelet_jax.files.reading import user_path

WORKDIRS = flags.DEFINE_multi_string(
    "workdir", [], "directory of a run, or gs://BUCKET/RUN; once for every run to compare"
)
LENGTHS = flags.DEFINE_list("lengths", [], "lengths to evaluate at, tokens: 128,256,...")
PROTOCOL = flags.DEFINE_string("protocol", "full_length", " | ".join(protocols.PROTOCOLS))
STRIDE = flags.DEFINE_integer("stride", 0, "of sliding_window, tokens; 0 for half of each length")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "instead of the runs' eval.max_tokens")
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", None, "instead of the runs' eval.batch_tokens")
PREFILL_CHUNK = flags.DEFINE_integer("prefill_chunk", None, "instead of the runs' eval.prefill_chunk")
SEQUENCES = flags.DEFINE_integer("sequences", None, "instead of the runs' eval.sequences")
SEQUENCE_SEED = flags.DEFINE_integer("sequence_seed", None, "instead of the runs' eval.sequence_seed")
VALIDATION_SPLIT = flags.DEFINE_string("validation_split", None, "another text than the runs': data.validation_split")
VALIDATION_FILES = flags.DEFINE_string("validation_files", None, "the same: data.validation_files")
VALIDATION_TEXT_FIELD = flags.DEFINE_string("validation_text_field", None, "its data.validation_text_field")
DATA_ROOT = flags.DEFINE_string(
    "data_root", None, "folder that relative paths in the runs' config.data start from, instead of config.data.folder"
)
OUT = flags.DEFINE_string("out", None, "directory for the results, or gs://BUCKET/RESULTS")


def main() -> None:
    if not WORKDIRS.value or not LENGTHS.value or not OUT.value:
        raise UserError("eval.py needs --workdir (once or more), --lengths=128,256,... and --out")
    try:
        lengths = [int(length) for length in LENGTHS.value]
    except ValueError as error:
        raise UserError(f"--lengths takes whole numbers, not {','.join(LENGTHS.value)}") from error
    evaluate.evaluate(
        [places.at(workdir, "--workdir") for workdir in WORKDIRS.value],
        lengths=lengths,
        protocol=PROTOCOL.value,
        stride=STRIDE.value,
        out=places.at(OUT.value, "--out"),
        data_root=user_path(DATA_ROOT.value, "--data_root") if DATA_ROOT.value else None,
        changes=_given(MAX_TOKENS, BATCH_TOKENS, PREFILL_CHUNK, SEQUENCES, SEQUENCE_SEED),
        other_text=_given(VALIDATION_SPLIT, VALIDATION_FILES, VALIDATION_TEXT_FIELD),
    )


def _given(*those: flags.FlagHolder) -> dict:
    """The flags that were given, {name: value}."""
    return {flag.name: flag.value for flag in those if flag.value is not None}


if __name__ == "__main__":
    cli.run(main)
