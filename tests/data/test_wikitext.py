"""WikiText as a TFDS data set, on small archives of the true layout: the stream of the files, and every bad archive."""

import io
import re
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.corpora import make_config
from support.project import ROOT

from wavelet_jax.data import load_corpus, tfds_sets
from wavelet_jax.data.wikitext import archives, builder
from wavelet_jax.errors import UserError

# Eight articles; a line of the first looks like a heading, and has no blank lines around it.
TRAIN = """ \n = First <unk> = \n \n one two , one\n \n = = Part = = \n \n three = four = five \n = Played , W = \n"""
TRAIN += """ \n = Second = \n \n naïve 猫 three \n"""
TRAIN += "".join(f" \n = N{number} = \n \n" for number in range(6))  # enough that no other order can pass for theirs
VALIDATION = " \n = Third = \n \n one <unk> \n"
TEST = " \n = Fourth = \n \n two \n \n"
# By hand: words of each line and one more for its end.
TOKENS = {
    "train": 1 + 5 + 1 + 5 + 1 + 6 + 1 + 6 + 6 + 1 + 4 + 1 + 4 + 6 * (1 + 4 + 1),
    "validation": 1 + 4 + 1 + 3,
    "test": 1 + 4 + 1 + 2 + 1,
}
WORDS = 22  # N0 .. N5 = First <unk> one two , Part three four five Played W Second naïve 猫 </s>
NAMES = ["wikitext-2/wiki.train.tokens", "wikitext-2/wiki.valid.tokens", "wikitext-2/wiki.test.tokens"]


def pack(path: Path, texts=(TRAIN, VALIDATION, TEST), names=NAMES, compression=zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as file:
        file.mkdir("wikitext-2")
        for name, text in zip(names, texts, strict=True):
            file.writestr(name, text)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The small text's figures in place of the published ones; and no network."""
    figures = archives.Published("wikitext-2", TOKENS, WORDS)
    monkeypatch.setitem(archives.PUBLISHED, "wikitext2", figures)

    def refuse(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def archive(tmp_path) -> Path:
    return pack(tmp_path / "elsewhere" / "any name.zip")


def load(tmp_path, **keys):
    return load_corpus(make_config(tmp_path / "cache", tokenizer="word", **keys))


def test_published_figures():
    """Merity et al., Table 1; the validation and the test text of both are the same but for `<unk>`."""
    other = archives.published("wikitext103")
    assert other.tokens == {"train": 103_227_021, "validation": 217_646, "test": 245_569}
    assert other.vocabulary == 267_735
    assert other.file_name == "wikitext-103-v1.zip"
    assert other.member("validation") == "wikitext-103/wiki.valid.tokens"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_same_stream_as_the_files(archive, tmp_path, split):
    """To the token, with the same ids; but in documents, which are articles."""
    folder = builder.prepare("wikitext2", tmp_path / "tfds", archive)
    assert folder == tmp_path / "tfds" / "wikitext" / "wikitext2" / "1.0.0"
    files = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    plain = load(tmp_path, train_files=tmp_path / "train", validation_files=tmp_path / split)
    ours = load(tmp_path, source="tfds:wikitext/wikitext2", tfds_dir=tmp_path / "tfds", validation_split=split)
    assert ours.train.tolist() == plain.train.tolist()
    assert ours.validation.tolist() == plain.validation.tolist()
    assert ours.tokenizer.words == plain.tokenizer.words
    assert len(ours.tokenizer.words) == WORDS
    assert ours.tokenizer.decode(ours.train).split() == TRAIN.split()
    assert len(ours.train) == TOKENS["train"]
    assert ours.train_ends.tolist() == [32, 42, 48, 54, 60, 66, 72, 78]
    assert plain.train_ends.tolist() == [TOKENS["train"]]


PARTS = [" \n", "\n", " = A = \n", " = = B = = \n", " text = x = \n", " = A = \n \n", "end"]


@example(" \n \n = A = \n \n")
@given(st.lists(st.sampled_from(PARTS), max_size=30).map("".join))
def test_articles_put_together_are_the_text(text):
    cut = list(archives.articles(io.StringIO(text, newline="\n")))
    assert "".join(cut) == text
    assert all(map(str.strip, cut)) or not text.strip()  # a blank document would be left out of the stream
    assert all(re.match(r" ?\n = A = \n", article) for article in cut[1:])


def test_manual_folder_of_tfds(tmp_path):
    """Both ways: by the command, and by the builder as TFDS would use it, which checks the archive too."""
    pack(tmp_path / "downloads" / "manual" / "wikitext-2-v1.zip")
    made = builder.Wikitext(config="wikitext2", data_dir=tmp_path, file_format="array_record")
    made.download_and_prepare()
    assert made.info.splits["train"].num_examples == 8
    archives.PUBLISHED["wikitext2"] = archives.published("wikitext103")
    assert builder.prepare("wikitext2", tmp_path) == Path(made.data_path)  # it is there: nothing is read or checked
    pack(tmp_path / "other" / "downloads" / "manual" / "wikitext-103-v1.zip")
    with pytest.raises(UserError, match=r"has no wikitext-103/wiki.train.tokens"):
        builder.Wikitext(config="wikitext2", data_dir=tmp_path / "other").download_and_prepare()


class Response(io.BytesIO):
    headers = {}  # noqa: RUF012 - as urllib has it


def test_download(archive, tmp_path, monkeypatch):
    content, asked = archive.read_bytes(), []
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, **_: (asked.append(request), Response(content))[1])
    monkeypatch.setattr(Response, "headers", {"Content-Length": str(len(content))})
    builder.prepare("wikitext2", tmp_path / "tfds")
    assert (tmp_path / "tfds" / "downloads" / "manual" / "wikitext-2-v1.zip").read_bytes() == content
    assert (tmp_path / "tfds" / "wikitext" / "wikitext2" / "1.0.0" / "dataset_info.json").exists()
    assert [request.full_url for request in asked] == ["https://wikitext.smerity.com/wikitext-2-v1.zip"]
    assert not asked[0].get_header("User-agent").startswith("Python")


def test_failed_download_says_what_to_put_where(tmp_path, monkeypatch):
    put = (
        r"put wikitext-2-v1.zip into .*tfds/downloads/manual \(the word-level archive .* not the raw one, with "
        r"wikitext-2/wiki.train.tokens, wikitext-2/wiki.valid.tokens, wikitext-2/wiki.test.tokens inside\)"
    )
    with pytest.raises(UserError, match=r"cannot download .*no network here.*: " + put) as raised:
        builder.prepare("wikitext2", tmp_path / "tfds")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "tfds").exists()
    for headers, said in (({"Content-Length": "8"}, "it ended after 4 of 8 bytes"), ({}, "it is not a zip archive")):
        monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(b"half"))
        monkeypatch.setattr(Response, "headers", headers)
        with pytest.raises(UserError, match=rf"{said}\): " + put):
            builder.prepare("wikitext2", tmp_path / "tfds")
    assert not [path for path in (tmp_path / "tfds").rglob("*") if path.is_file()]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def flip(path: Path) -> None:
    content = path.read_bytes()
    place = content.index("naïve".encode())  # stored as it is
    path.write_bytes(content[:place] + b"m" + content[place + 1 :])


BAD = {
    "truncated": ({}, cut, ["cannot read", "as a zip archive", "not a zip file"]),
    "no zip": ({}, lambda path: path.write_bytes(b"<html>"), ["cannot read", "not a zip file"]),
    "not there": ({}, Path.unlink, ["cannot read", "No such file"]),
    "damaged": ({"compression": zipfile.ZIP_STORED}, flip, ["cannot read", "Bad CRC-32", "wiki.train.tokens"]),
    "raw": (
        {"names": [name.replace("tokens", "raw") for name in NAMES]},
        None,
        ["has no wikitext-2/wiki.train.tokens: expected the word-level wikitext-2-v1.zip", "found", "wiki.train.raw"],
    ),
    "one missing": ({"names": NAMES[:2], "texts": (TRAIN, VALIDATION)}, None, ["has no wikitext-2/wiki.test.tokens"]),
    "empty": ({"names": [], "texts": []}, None, ["has no wikitext-2/wiki.train.tokens"]),
    "not UTF-8": ({"texts": (TRAIN, b"caf\xe9", TEST)}, None, ["cannot read", "UTF-8", "can't decode byte 0xe9"]),
    "a line more": (
        {"texts": (TRAIN, VALIDATION, TEST + "\n")},
        None,
        ["is not wikitext-2 as it was published: test has 10 tokens, expected 9"],
    ),
    "splits changed": (
        {"texts": (VALIDATION, TRAIN, TEST)},
        None,
        ["train has 9 tokens, expected 78; validation has 78 tokens, expected 9", "has 5 words, expected 22"],
    ),
    "another vocabulary": (
        {"texts": (TRAIN.replace("猫", "naïve"), VALIDATION, TEST)},
        None,
        ["published: the vocabulary has 21 words, expected 22"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_archives_are_refused(tmp_path, case):
    """In one line, with what was found and what was expected, and nothing is left in the folder of data sets."""
    options, damage, fragments = BAD[case]
    archive = pack(tmp_path / "bad.zip", **options)
    if damage:
        damage(archive)
    with pytest.raises(UserError) as raised:
        builder.prepare("wikitext2", tmp_path / "tfds", archive)
    message = str(raised.value)
    assert "\n" not in message
    assert str(archive) in message
    for fragment in fragments:
        assert fragment in message, message
    assert not (tmp_path / "tfds").exists()


def test_command_of_the_error(tmp_path):
    """What the error of a data set that is not prepared tells to type, with an archive that is not WikiText-103."""
    with pytest.raises(
        UserError, match=r"tfds:wikitext/wikitext103 is not prepared .*: prepare it once with: "
    ) as raised:
        load(tmp_path, source="tfds:wikitext/wikitext103", tfds_dir=tmp_path / "my data")
    command = shlex.split(str(raised.value).split("once with: ")[1])
    assert command[:3] == ["python", "-m", "wavelet_jax.data.wikitext"]
    archive = pack(tmp_path / "wrong.zip")
    done = subprocess.run(
        [sys.executable, *command[1:], f"--archive={archive}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: .*wrong.zip has no wikitext-103/wiki.train.tokens: .*\n", done.stderr), done.stderr
    assert not (tmp_path / "my data").exists()


@pytest.mark.parametrize("name", ["wikitext", "wikitext/wikitext3", "wikitext/103"])
def test_configurations_are_named(tmp_path, name):
    assert tfds_sets.OWN["wikitext"] == tuple(archives.PUBLISHED)
    with pytest.raises(UserError, match=r"allowed are tfds:wikitext/wikitext2, tfds:wikitext/wikitext103"):
        load(tmp_path, source=f"tfds:{name}", tfds_dir=tmp_path)
    with pytest.raises(UserError, match=r"unknown configuration of wikitext 'wikitext3': did you mean"):
        builder.prepare("wikitext3", tmp_path)
