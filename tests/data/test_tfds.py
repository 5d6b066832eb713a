"""TFDS data sets as text: exact tokens, splits, versions, the cache, and every kind of bad input."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from support.corpora import byte_ids, folders, make_config

from wavelet_jax.data import corpus, load_corpus
from wavelet_jax.errors import UserError

TEXTS = {
    "train": [f"book {number}: naïve 猫\n" for number in range(30)] + [" \n", "", b"caf\xe9"],
    "validation": ["first", "second", "third"],
    "test": ["unseen"],
}


class Shelf(tfds.core.GeneratorBasedBuilder):
    """A small data set of texts, a title and a number each."""

    VERSION = tfds.core.Version("1.9.0")
    SUPPORTED_VERSIONS = [tfds.core.Version("1.10.0")]  # noqa: RUF012 - as TFDS reads it

    def _info(self):
        features = {"book_text": tfds.features.Text(), "title": np.str_, "label": np.int64, "words": np.array([1])}
        features["words"] = tfds.features.Tensor(shape=(2,), dtype=np.str_)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(texts) for split, texts in self._texts().items()}

    def _texts(self):
        return TEXTS

    def _generate_examples(self, texts):
        for number, text in enumerate(texts):
            words = ["a", "b"]
            yield number, {"book_text": text, "title": f"title {number}", "label": number, "words": words}


class Tongues(Shelf):
    """The same in configurations, with a train split only."""

    VERSION = tfds.core.Version("0.1.0")
    SUPPORTED_VERSIONS = []  # noqa: RUF012
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("de", "en")]  # noqa: RUF012

    def _texts(self):
        return {"train": [f"{self.builder_config.name} {number}" for number in range(40)]}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder with shelf/1.9.0, tongues/de/0.1.0 and tongues/en/0.1.0."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare(Shelf, folder)
    for config in ("de", "en"):
        prepare(Tongues, folder, config=config)
    return folder


def prepare(builder, folder: Path, file_format: str = "array_record", **options) -> None:
    builder(data_dir=str(folder), file_format=file_format, **options).download_and_prepare()


@pytest.fixture
def load(shelf, tmp_path):
    """`load(source, key=value, ..)`: a corpus of the prepared data sets, with a cache in tmp_path."""

    def load(source="tfds:shelf", cache_dir=tmp_path / "cache", **keys):
        keys = {"tfds_dir": shelf, "text_field": "book_text"} | keys
        return load_corpus(make_config(cache_dir, source=source, **keys))

    return load


def texts_of(stream, tokenizer) -> list[str]:
    *texts, last = tokenizer.decode(stream).split("<|endoftext|>")
    assert last == ""
    return texts


def test_tokens_in_the_order_of_the_data_set(load, shelf):
    """Every document of the split once, as the data set's own random access gives them; blank ones are left out."""
    loaded = load()
    source = tfds.builder_from_directory(shelf / "shelf" / "1.9.0").as_data_source("train")
    expected = [source[number]["book_text"].decode("utf-8", "replace") for number in range(len(source))]
    assert loaded.train.tolist() == byte_ids(*(text for text in expected if text.strip()))
    assert "caf\ufffd" in expected
    assert set(expected) == {*TEXTS["train"][:-1], "caf\ufffd"}
    assert sorted(texts_of(loaded.validation, loaded.tokenizer)) == ["first", "second", "third"]
    assert len(loaded.train_ends) == 31


def test_bytes_that_are_not_utf_8_are_counted(load, shelf, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: warnings.append(message % values))
    corpus._warn_once.cache_clear()
    load()
    source = tfds.builder_from_directory(shelf / "shelf" / "1.9.0").as_data_source("train")
    (first,) = (number for number in range(len(source)) if source[number]["book_text"] == b"caf\xe9")
    assert warnings == [
        "tfds:shelf, split 'train', is not UTF-8 throughout: U+FFFD stands for bytes that are not, 1 times, first in "
        f"example {first}"
    ]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_threads_change_nothing(load, tmp_path, tokenizer):
    one, many = (
        load(threads=threads, cache_dir=tmp_path / f"{threads}", tokenizer=tokenizer, vocab_size=280)
        for threads in (1, 100)
    )
    assert one.fingerprint == many.fingerprint


def test_cache_is_used_again_wherever_the_data_set_lies(load, shelf, tmp_path, monkeypatch):
    first = load()
    moved = tmp_path / "moved"
    shutil.copytree(shelf, moved)
    monkeypatch.setattr(corpus, "_write", None)
    assert load(tfds_dir=moved).fingerprint == first.fingerprint
    assert load("tfds:shelf:1.9.0").fingerprint == first.fingerprint


def test_changed_data_set_is_never_taken_for_the_old(load, tmp_path, monkeypatch):
    """Of the same name, version and sizes."""
    read = []
    for number, word in enumerate(("first", "other")):
        monkeypatch.setitem(TEXTS, "validation", [word, "second", "third"])
        prepare(Shelf, tmp_path / str(number))
        loaded = load(tfds_dir=tmp_path / str(number))
        read.append(set(texts_of(loaded.validation, loaded.tokenizer)))
    assert read == [{"first", "second", "third"}, {"other", "second", "third"}]


def test_newest_version_unless_one_is_named(load, tmp_path, monkeypatch):
    prepare(Shelf, tmp_path)
    monkeypatch.setitem(TEXTS, "test", ["of 1.10.0"])
    prepare(Shelf, tmp_path, version="1.10.0")
    keys = {"tfds_dir": tmp_path, "validation_split": "test"}
    assert load(**keys).validation.tolist() == byte_ids("of 1.10.0")
    assert load("tfds:shelf:1.9.0", **keys).validation.tolist() == byte_ids("unseen")


def test_splits_and_their_parts(load):
    whole = texts_of(load().train, load().tokenizer)
    parts = load(train_split="train[:75%]", validation_split="train[75%:]")
    train, validation = (texts_of(stream, parts.tokenizer) for stream in (parts.train, parts.validation))
    assert train + validation == whole
    assert abs(len(train) - 24) <= 1
    joined = load(train_split="train+test")
    assert texts_of(joined.train, joined.tokenizer) == [*whole, "unseen"]


def test_train_split_alone_is_divided_by_content(load):
    loaded = load("tfds:tongues/en", validation_split="")
    held_out = {text for number in range(40) if corpus.in_validation(text := f"en {number}", 0.3)}
    assert set(texts_of(loaded.validation, loaded.tokenizer)) == held_out
    assert set(texts_of(loaded.train, loaded.tokenizer)) == {f"en {number}" for number in range(40)} - held_out


def test_configurations_are_data_sets_of_their_own(load):
    german, english = (load(f"tfds:tongues/{name}", validation_split="") for name in ("de", "en"))
    assert german.tokenizer.decode(german.train[:2]) == "de"
    assert english.tokenizer.decode(english.train[:2]) == "en"


def test_command_of_the_error_prepares_the_data_set(load, tmp_path):
    folder = tmp_path / "new folder"
    with pytest.raises(UserError, match=r"tfds:shelf is not prepared in config.data.tfds_dir .*new folder") as raised:
        load(tfds_dir=folder)
    exec(re.search(r'python -c "(.*)"$', str(raised.value))[1])
    assert load(tfds_dir=folder).validation.size > 0


@pytest.mark.parametrize(
    ("source", "keys", "fragments"),
    [
        ("tfds:shelv", {}, ["unknown TFDS data set 'shelv': did you mean 'tfds:shelf'?", "shelf, tongues"]),
        ("tfds:pg91", {}, ["unknown TFDS data set 'pg91': did you mean 'tfds:pg19'?"]),
        ("tfds:qqqqqqqqq", {}, ["unknown TFDS data set 'qqqqqqqqq': TFDS has none of that name"]),
        ("tfds:", {}, ["'tfds:' does not name a TFDS data set", "tfds:wiki40b/en"]),
        ("tfds:a/b/c", {}, ["does not name a TFDS data set"]),
        ("tfd:pg19", {}, ["unknown config.data.source 'tfd:pg19'", "allowed are python, text, jsonl, tfds:NAME"]),
        *(
            (f"tfds:{name}", {}, [f"tfds:{name} is not prepared", f"tfds.builder('{name}', data_dir='", "array_record"])
            for name in ("pg19", "wiki40b/en", "lm1b")
        ),
        ("tfds:shelf:2.0.0", {}, ["tfds:shelf:2.0.0 is not prepared", "tfds.builder('shelf:2.0.0'"]),
        ("tfds:tongues", {}, ["comes in configurations, and de, en are prepared", "'tfds:tongues/de'"]),
        ("tfds:tongues/fr", {}, ["tfds:tongues/fr is not prepared", "tfds.builder('tongues/fr'"]),
        ("tfds:shelf", {"tfds_dir": ""}, ["config.data.tfds_dir is empty"]),
        ("tfds:shelf", {"tfds_dir": "gs://bucket/tfds"}, ["gs://bucket/tfds is an address: mount it"]),
        ("tfds:shelf", {"train_files": "a.txt"}, ["which reads no other files", "config.data.train_files"]),
        ("tfds:shelf", {"text_field": "text"}, ["unknown config.data.text_field 'text': did you mean 'book_text'?"]),
        ("tfds:shelf", {"text_field": "label"}, ["feature 'label' is", "not text: set config.data.text_field"]),
        ("tfds:shelf", {"text_field": "words"}, ["feature 'words' is Tensor, not text"]),
        ("tfds:shelf", {"train_split": "trian"}, ["unknown config.data.train_split 'trian': did you mean 'train'?"]),
        (
            "tfds:tongues/de",
            {},
            ["unknown config.data.validation_split 'validation'", "allowed are train", "empty to take documents out"],
        ),
        ("tfds:shelf", {"train_split": "train[:"}, ["config.data.train_split 'train[:' is not a split of shelf/1.9.0"]),
        ("tfds:shelf", {"train_split": "test[:10%]"}, ["config.data.train_split 'test[:10%]' holds no example"]),
        ("tfds:shelf", {"validation_split": "train[90%:]"}, ["is in both splits", "'train[90%:]'"]),
        ("tfds:shelf", {"train_split": "train+validation"}, ["is in both splits"]),
        ("tfds:tongues/de", {"validation_split": "", "validation_fraction": 0.0}, ["config.data.validation_split"]),
    ],
)
def test_bad_input(load, tmp_path, source, keys, fragments):
    with pytest.raises(UserError) as raised:
        load(source, **({"text_field": "book_text"} | keys))
    message = str(raised.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message
    assert not (tmp_path / "cache").exists() or folders(tmp_path / "cache") == ([], [])


def test_other_file_formats_are_refused(load, shelf, tmp_path):
    """A folder that says tfrecord, which is what TFDS prepares if not told otherwise."""
    shutil.copytree(shelf, tmp_path / "tfds")
    description = tmp_path / "tfds" / "shelf" / "1.9.0" / "dataset_info.json"
    text = description.read_text()
    assert "array_record" in text
    description.write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"is prepared as tfrecord, not as array_record: remove it, then prepare it"):
        load(tfds_dir=tmp_path / "tfds")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dataset_info.json", "cannot be opened as a TFDS data set"),
        ("features.json", "cannot be opened as a TFDS data set"),
        ("shelf-train.array_record-00000-of-00001", "cannot read"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "changed"])
def test_damaged_data_set(load, shelf, tmp_path, name, message, damage):
    shutil.copytree(shelf, tmp_path / "tfds")
    file = tmp_path / "tfds" / "shelf" / "1.9.0" / name
    content = file.read_bytes()
    changed = content[:100] + bytes(byte ^ 1 for byte in content[100:200]) + content[200:]
    file.write_bytes({"cut": content[: len(content) // 2], "changed": changed}.get(damage, b""))
    if damage == "removed":
        file.unlink()
        if name == "dataset_info.json":
            message = "is not prepared"
    with pytest.raises(UserError, match=message) as raised:
        load(tfds_dir=tmp_path / "tfds")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists() or folders(tmp_path / "cache") == ([], [])
