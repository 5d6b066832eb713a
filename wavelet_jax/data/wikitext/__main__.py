"""Prepares WikiText for `data.source=tfds:wikitext/..`: gets the archive, checks it, writes ArrayRecord files.

    python -m wavelet_jax.data.wikitext --name=wikitext103 --tfds_dir=DIR [--archive=wikitext-103-v1.zip]

The archive is that of --archive, or of DIR/downloads/manual, or is downloaded to there. What is not the published text,
by its numbers of tokens and words, is refused, and nothing is prepared.
"""

from absl import flags

from wavelet_jax.commands import cli
from wavelet_jax.data.wikitext import archives
from wavelet_jax.errors import UserError
from wavelet_jax.files.reading import user_path

NAME = flags.DEFINE_string("name", None, " | ".join(archives.PUBLISHED))
TFDS_DIR = flags.DEFINE_string("tfds_dir", None, "where to prepare it: config.data.tfds_dir of the runs")
ARCHIVE = flags.DEFINE_string("archive", None, "the zip file; left out: TFDS_DIR/downloads/manual, or the network")


def main() -> None:
    if not NAME.value or not TFDS_DIR.value:
        raise UserError(f"--name ({' or '.join(archives.PUBLISHED)}) and --tfds_dir are needed")
    tfds_dir = user_path(TFDS_DIR.value, "--tfds_dir").absolute()
    archive = user_path(ARCHIVE.value, "--archive") if ARCHIVE.value else None
    from wavelet_jax.data.wikitext import builder  # TFDS takes seconds to import, and bad input should not wait

    print(builder.prepare(NAME.value, tfds_dir, archive))


if __name__ == "__main__":
    cli.run(main)
