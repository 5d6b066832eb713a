"""The TFDS builder of WikiText: an example is an article, in the order of the archive.

Articles, because lines would be 1.8 million records, most of them too short to pack, and because a blank line is no
document but a `</s>` of the stream; put together again, articles are the text to the byte, so that the word tokenizer
makes the same tokens of them as of the archive's files. And `data.packing=documents` then keeps attention in articles.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from wavelet_jax.data.wikitext import archives

_CITATION = """@inproceedings{merity2017pointer,
  title={Pointer Sentinel Mixture Models},
  author={Stephen Merity and Caiming Xiong and James Bradbury and Richard Socher},
  booktitle={International Conference on Learning Representations},
  year={2017}
}"""


class Wikitext(tfds.core.GeneratorBasedBuilder):
    """Good and featured articles of Wikipedia, tokenized into words, rare ones as `<unk>`.

    Attributes:
      checked_archive: an archive that has been through `archives.check`; None: that of the manual folder, checked here.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Articles in their order."}  # noqa: RUF012 - as TFDS reads it
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=f"{each.folder}, word level, {each.vocabulary:,} words")
        for name, each in archives.PUBLISHED.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Needed only where the download fails: " + "; or ".join(
        archives.instructions(name, "manual_dir") for name in archives.PUBLISHED
    )
    checked_archive: Path | None = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Articles of Wikipedia at word level, with lines and the blank ones between them.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            homepage="https://arxiv.org/abs/1609.07843",
            citation=_CITATION,
            license="Creative Commons Attribution-ShareAlike 3.0",
            disable_shuffling=True,  # TFDS would order examples by a hash: another stream of text
        )

    @property
    def _name(self) -> str:
        assert self.builder_config is not None
        return self.builder_config.name

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        name, archive = self._name, self.checked_archive
        if archive is None:
            try:
                folder = dl_manager.manual_dir
            except AssertionError:  # it is not there, or empty
                folder = dl_manager.download_dir / "manual"
            archive = archives.fetch(name, Path(folder))
            archives.check(name, archive)
        return {split: self._generate_examples(archive, split) for split in archives.SPLITS}

    def _generate_examples(self, archive: Path, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        lines = archives.lines(self._name, archive, split)
        for number, text in enumerate(archives.articles(lines)):
            yield number, {"text": text}


def prepare(name: str, tfds_dir: Path, archive: Path | None = None) -> Path:
    """Prepares "wikitext2" or "wikitext103" in `tfds_dir`, as ArrayRecord files; does nothing where it is there.

    Args:
      archive: the zip file; None: that of `tfds_dir`/downloads/manual, downloaded to there if it is not.

    Returns:
      The folder of the prepared data set.

    Raises:
      UserError: an unknown name, an archive that cannot be had or is not as published. Nothing is prepared then.
    """
    archives.published(name)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = Wikitext(config=name, data_dir=tfds_dir, file_format="array_record")
    if not builder.data_path.exists():
        archive = archive or archives.fetch(name, tfds_dir / "downloads" / "manual")
        archives.check(name, archive)  # here and not by TFDS, which would have begun to write by then
        builder.checked_archive = archive
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Path(builder.data_path)
