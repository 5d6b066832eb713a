"""The archives of WikiText: where they come from, what is checked before one is believed, and its articles.

Merity et al., Pointer Sentinel Mixture Models, arXiv 1609.07843, Table 1: tokens a split, where every line ends in one
more token (`</s>`), and the words of the train split with `</s>` and `<unk>`.
"""

import contextlib
import dataclasses
import http.client
import re
import shutil
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path

from tqdm import tqdm

from wavelet_jax.data.tokenizers import LINE_END, UNKNOWN
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.files import atomic

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # by TFDS's names, as the members have them
_ADDRESS = "https://wikitext.smerity.com/"  # of the data set's first author; the first one, on S3, is gone
_HEADING = re.compile(r" = (?!= ).* = \n")
_READ_ERRORS = (
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    UnicodeDecodeError,
    NotImplementedError,
    RuntimeError,
)


@dataclasses.dataclass(frozen=True)
class Published:
    """One archive and its published figures.

    Attributes:
      folder: the one inside of the archive.
      tokens: by split, `</s>` of every line included.
      vocabulary: words of the train split, `</s>` and `<unk>` included.
    """

    folder: str
    tokens: dict[str, int]
    vocabulary: int

    @property
    def file_name(self) -> str:
        return f"{self.folder}-v1.zip"

    def member(self, split: str) -> str:
        return f"{self.folder}/wiki.{SPLITS[split]}.tokens"


PUBLISHED = {
    "wikitext2": Published("wikitext-2", {"train": 2_088_628, "validation": 217_646, "test": 245_569}, 33_278),
    "wikitext103": Published("wikitext-103", {"train": 103_227_021, "validation": 217_646, "test": 245_569}, 267_735),
}


def published(name: str) -> Published:
    """The archive of "wikitext2" or "wikitext103". Raises `UserError` for another name."""
    if name not in PUBLISHED:
        raise unknown("configuration of wikitext", name, PUBLISHED)
    return PUBLISHED[name]


def instructions(name: str, folder: Path | str) -> str:
    """One line that says which file to put where by hand."""
    archive = published(name)
    members = ", ".join(archive.member(split) for split in SPLITS)
    return (
        f"put {archive.file_name} into {folder} (the word-level archive of Merity et al., not the raw one, with "
        f"{members} inside); the first author of the data set keeps it on his site, and many courses keep copies"
    )


def fetch(name: str, folder: Path) -> Path:
    """The archive in a folder, downloaded to there if it is not.

    Raises:
      UserError: the download failed; says what to put where by hand. Nothing of it is left.
    """
    archive = folder / published(name).file_name
    if archive.exists():
        return archive
    address = _ADDRESS + archive.name
    # The site refuses urllib's own name.
    request = urllib.request.Request(address, headers={"User-Agent": "wavelet_jax"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, atomic.replaced(archive) as partial:
            expected = int(response.headers.get("Content-Length", 0))
            with (
                open(partial, "wb") as file,
                tqdm.wrapattr(response, "read", total=expected or None, desc=archive.name, disable=None) as reading,
            ):
                shutil.copyfileobj(reading, file, 1 << 20)
            if expected and partial.stat().st_size != expected:
                raise OSError(f"it ended after {partial.stat().st_size:,} of {expected:,} bytes")
            if not zipfile.is_zipfile(partial):
                raise OSError("it is not a zip archive")
    except (OSError, http.client.HTTPException) as error:  # urllib's own are OSErrors
        raise UserError(f"cannot download {address} ({error}): {instructions(name, folder)}") from error
    return archive


def check(name: str, archive: Path) -> None:
    """Reads all of an archive and compares it with the published figures.

    Raises:
      UserError: a file that is not a complete zip archive, lacks these members, is not UTF-8, or has other numbers of
        tokens or words; says what was found and what was expected.
    """
    expected = published(name)
    with _readable(archive), zipfile.ZipFile(archive) as file:
        names = file.namelist()
    for split in SPLITS:
        if expected.member(split) not in names:
            raise UserError(
                f"{archive} has no {expected.member(split)}: expected the word-level {expected.file_name}; found "
                f"{', '.join(names[:8]) or 'nothing'}{', ..' if len(names) > 8 else ''} in it"
            )
    found, words = {}, {LINE_END, UNKNOWN}
    for split in SPLITS:
        found[split] = 0
        reading = tqdm(
            lines(name, archive, split), f"checking {split}", unit=" lines", delay=1, leave=False, disable=None
        )
        for line in reading:
            tokens = line.split()  # as the word tokenizer does
            found[split] += len(tokens) + 1
            if split == "train":
                words.update(tokens)
    differences = [
        f"{split} has {found[split]:,} tokens, expected {expected.tokens[split]:,}"
        for split in SPLITS
        if found[split] != expected.tokens[split]
    ]
    if len(words) != expected.vocabulary:
        differences.append(f"the vocabulary has {len(words):,} words, expected {expected.vocabulary:,}")
    if differences:
        raise UserError(f"{archive} is not {expected.folder} as it was published: {'; '.join(differences)}")


def lines(name: str, archive: Path, split: str) -> Iterator[str]:
    """The lines of a split, each with its "\\n". Raises `UserError` for what cannot be read."""
    with _readable(archive), zipfile.ZipFile(archive) as file, file.open(published(name).member(split)) as raw:
        yield from TextIOWrapper(raw, encoding="utf-8", newline="\n")


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Cuts the lines of a split in front of each article; put together again, articles are the split.

    An article begins with a blank line, its heading ` = Title = ` and a blank line. Text between two equal signs inside
    of an article has no blank lines around it: by this rule WikiText-2 has its 600, 60 and 60 articles.
    """
    article: list[str] = []
    for line in lines:
        article.append(line)
        if len(article) > 3 and _begins_article(article[-3:]) and any(map(str.strip, article[:-3])):
            yield "".join(article[:-3])
            article = article[-3:]
    if article:
        yield "".join(article)


def _begins_article(three: list[str]) -> bool:
    blank, heading, also_blank = three
    return not blank.strip() and not also_blank.strip() and _HEADING.fullmatch(heading) is not None


@contextlib.contextmanager
def _readable(archive: Path) -> Iterator[None]:
    """Turns an error of reading the archive into a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except _READ_ERRORS as error:
        raise UserError(
            f"cannot read {archive} as a zip archive of UTF-8 text: {error or type(error).__name__}"
        ) from error
