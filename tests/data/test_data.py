"""Data: exact tokens on small texts, the split, the cache through every accident, windows, and bad input."""

import concurrent.futures
import gzip
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from support.corpora import END, byte_ids, folders, make_config
from support.project import environment, program

from wavelet_jax.data import Windows, corpus, file_digests, load_corpus, notes, sources, tokenizers
from wavelet_jax.errors import UserError
from wavelet_jax.files import locks as file_locks

# Twelve documents of one line each; which of them are validation at a fraction of 0.3 was written down once.
WORDS = ["quick", "brown", "lazy", "red", "grey", "sly"]
LINES = [f"document {number}: the {word} fox" for number, word in enumerate(2 * WORDS)]
HELD_OUT = {0, 2, 3, 7, 8, 9, 11}


@pytest.fixture
def load(tmp_path):
    """`load(key=value, ..)`: a corpus by those keys of config.data, with the cache in tmp_path/cache."""
    return lambda cache_dir=tmp_path / "cache", **keys: load_corpus(make_config(cache_dir, **keys))


@pytest.fixture
def write(tmp_path):
    """`write(name, text)`: a file under tmp_path, packed as its name says."""

    def write(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(text if isinstance(text, bytes) else text.encode()))
        return path

    return write


@pytest.fixture
def lines(write):
    """A file of `LINES`, for `document="line"`."""
    return write("lines.txt", "\n".join(LINES) + "\n")


@pytest.fixture
def builds(monkeypatch):
    """A list with one entry for every corpus that was built and not taken from the cache."""
    built, write = [], corpus._write
    monkeypatch.setattr(corpus, "_write", lambda *arguments: (built.append(1), write(*arguments))[1])
    return built


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that were logged, as a user reads them."""
    said = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
    return said


# Tokens


def test_bytes(load, write):
    loaded = load(train_files=write("train.txt", "aé\r\n\n"), validation_files=write("validation.txt", "Z"))
    assert loaded.train.tolist() == [97, 0xC3, 0xA9, 13, 10, 10, END]
    assert loaded.validation.tolist() == [90, END]
    assert (loaded.tokenizer.name, loaded.tokenizer.vocab_size, loaded.unit) == ("byte", 257, "byte")
    assert loaded.tokenizer.decode(loaded.train) == "aé\r\n\n<|endoftext|>"
    for stream in (loaded.train, loaded.validation):
        assert isinstance(stream, np.memmap)
        assert stream.dtype == np.uint16
        assert not stream.flags.writeable


def test_words_follow_wikitext(load, write):
    """Every line ends in </s>, blank ones too; ids by count, then by the word; train alone gives the vocabulary."""
    train = write("train.txt", " \n = Title = \n \n the cat saw <unk> the\u2028dog\n\n")
    validation = write("validation.txt", "the bird saw\nTitle")
    loaded = load(train_files=train, validation_files=validation, tokenizer="word")
    assert loaded.tokenizer.words == ["</s>", "=", "the", "<unk>", "Title", "cat", "dog", "saw"]
    assert loaded.train.tolist() == [0, 1, 4, 1, 0, 0, 2, 5, 7, 3, 2, 6, 0, 0]
    assert loaded.validation.tolist() == [2, 3, 7, 0, 4, 0]
    assert (loaded.tokenizer.name, loaded.tokenizer.vocab_size, loaded.unit) == ("word 8", 8, "word")
    assert loaded.tokenizer.decode(loaded.validation) == "the <unk> saw\nTitle\n"
    assert loaded.tokenizer.encode("").tolist() == []


def test_words_always_have_unknown_and_line_end(load, write):
    loaded = load(
        train_files=write("train.txt", "b b b a a c d"), validation_files=write("v.txt", "b zzz"), tokenizer="word"
    )
    assert loaded.tokenizer.words == ["b", "a", "</s>", "c", "d", "<unk>"]
    assert loaded.validation.tolist() == [0, 5, 2]


def test_word_vocabulary_is_cut(load, write):
    """The rare words are read as <unk>, which takes their place in the order too."""
    keys = {"train_files": write("train.txt", "b b b a a c d e f"), "validation_files": write("v.txt", "x")}
    loaded = load(tokenizer="word", vocab_size=4, **keys)
    assert loaded.tokenizer.words == ["<unk>", "b", "a", "</s>"]
    assert loaded.train.tolist() == [1, 1, 1, 2, 2, 0, 0, 0, 0, 3]
    assert loaded.tokenizer.name == "word 4"
    assert load(tokenizer="word", vocab_size=100, **keys).tokenizer.vocab_size == 8


def test_words_past_16_bits(load, write):
    words = [f"w{number}" for number in range(70_000)]
    loaded = load(
        train_files=write("train.txt", " ".join(words)), validation_files=write("v.txt", words[-1]), tokenizer="word"
    )
    assert loaded.train.dtype == np.uint32
    assert loaded.tokenizer.decode(loaded.train[:-1]).split(" ") == words
    assert loaded.tokenizer.decode(loaded.validation[:1]) == words[-1]


TALES = "Die Katze saß auf der Matte — 猫 🐈\u200d⬛.\n\n    def f(x):\n\treturn  x\n<|endoftext|> " * 30


def test_bpe(load, write):
    """Any text comes back, one that looks like the end token too; merges make it shorter; training is repeatable."""
    keys = {"train_files": write("train.txt", TALES), "validation_files": write("v.txt", "neu: ñ \x01 \u2028\r\n")}
    loaded = load(tokenizer="bpe", vocab_size=300, **keys)
    tokenizer = loaded.tokenizer
    assert (tokenizer.name, tokenizer.vocab_size, loaded.unit) == ("bpe 300", 300, "BPE token")
    assert loaded.train[-1] == 299
    assert loaded.train[:-1].max() < 299
    assert tokenizer.decode(loaded.train) == TALES + "<|endoftext|>"
    assert tokenizer.decode(loaded.validation[:-1]) == "neu: ñ \x01 \u2028\r\n"
    assert len(loaded.train) < 0.75 * len(TALES.encode())
    assert tokenizer.encode("").tolist() == []
    shutil.rmtree(keys["train_files"].parent / "cache")
    again = load(tokenizer="bpe", vocab_size=300, **keys)
    assert again.fingerprint == loaded.fingerprint
    assert again.train.tolist() == loaded.train.tolist()


def test_bpe_is_trained_on_the_train_split_only(load, write):
    text = write("train.txt", "abab " * 50)
    one = load(train_files=text, validation_files=write("v.txt", "x"), tokenizer="bpe", vocab_size=400)
    other = load(train_files=text, validation_files=write("v.txt", "zyx zyx " * 50), tokenizer="bpe", vocab_size=400)
    assert one.tokenizer.dump() == other.tokenizer.dump()
    assert one.tokenizer.vocab_size < 270  # the text has no more pairs to merge


@pytest.mark.parametrize("piece", [1, 7])
def test_bpe_pieces_change_no_token(load, write, monkeypatch, piece):
    loaded = load(
        train_files=write("t.txt", TALES), validation_files=write("v.txt", "x"), tokenizer="bpe", vocab_size=300
    )
    text = " \n = a =  \n\n b c\nd\n e  f \t g\n\nhe's  'x\n"
    whole = loaded.tokenizer.encode(TALES + text).tolist()
    monkeypatch.setattr(tokenizers.BPE, "_PIECE", piece)
    assert len(list(tokenizers.BPE._pieces(TALES + text))) > 100
    assert loaded.tokenizer.encode(TALES + text).tolist() == whole


def merged_alone(text: str) -> list[str]:
    """The words of GPT-2's rule, by the library."""
    return [text[start:end] for _, (start, end) in tokenizers.BPE._BYTE_LEVEL.pre_tokenize_str(text)]


def test_bpe_is_never_handed_a_huge_word(monkeypatch):
    """Learning takes the square of a word's length: 80,000 letters took three seconds, and 4 MB did not end."""
    handed, pieces_of = [], tokenizers.BPE._pieces

    def recorded(text: str):
        for piece in pieces_of(text):
            handed.append(piece)
            yield piece

    monkeypatch.setattr(tokenizers.BPE, "_pieces", staticmethod(recorded))
    rng = np.random.default_rng(0)
    huge = rng.choice(np.frombuffer(b"abcdefgh", np.uint8), 4096).tobytes().decode() * 1024  # 4 MB
    text = f"a cat, and {huge} sat{' ' * 5000}on it"
    tokenizer = tokenizers.BPE.train([text], 300)
    assert "".join(handed) == text
    assert max(map(len, handed)) <= tokenizers.BPE._PIECE + tokenizers.BPE._WORD
    lengths = [len(word) for piece in handed for word in merged_alone(piece)]
    assert max(lengths) == tokenizers.BPE._WORD == 1024
    assert sum(length**2 for length in lengths) <= 1024 * len(text)  # the work is linear in the text
    trained = handed.copy()
    handed.clear()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert handed == trained


@pytest.mark.parametrize("seed", range(4))
def test_bpe_of_long_stretches_without_blanks_is_as_it_always_was(monkeypatch, seed):
    """Only words that are too long change, whatever stands around them and wherever the text is cut."""
    rng = np.random.default_rng(seed)
    model = tokenizers.BPE.train(
        ["the cat's on the mat, don't we're 12 naïve 日本語 == [[x]]\n\n\n  foo\t\tbaz! "], 330
    )
    word = 20
    long = tokenizers.BPE._LONG.pattern.replace(f"{tokenizers.BPE._WORD}", f"{word}")
    monkeypatch.setattr(tokenizers.BPE, "_WORD", word)
    monkeypatch.setattr(tokenizers.BPE, "_LONG", re.compile(long))
    parts = ["a", "re", "'", "'re", "'s", "don't", " ", "  ", "\n", "\n\n", "\t", "1", "..", "!", "é", "日", "\u2028"]
    parts += ["\x1c", "\x85", "\u00a0", "\r\n", "🙂", "\u0301", "=" * 19, "b" * 20, " " * 15]
    cut = unchanged = 0
    for _ in range(400):
        monkeypatch.setattr(tokenizers.BPE, "_PIECE", int(rng.choice([1, 30, 90, 200])))
        likely = rng.choice([0.1, 1, 3], len(parts))
        text = "".join(rng.choice(parts, rng.integers(10, 300), p=likely / likely.sum()))
        pieces = list(tokenizers.BPE._pieces(text))
        assert "".join(pieces) == text
        assert max(len(found) for piece in pieces for found in merged_alone(piece)) <= word
        if max(map(len, merged_alone(text))) > word:
            cut += 1
        elif tokenizers.BPE._LONG.search(text):
            unchanged += 1
            assert model.encode(text).tolist() == model._model.encode(text).ids
    assert min(cut, unchanged) > 20


@pytest.mark.parametrize("tokenizer", ["byte", "word", "sentencepiece"])
def test_other_tokenizers_read_a_huge_word(load, write, piece_model, tokenizer):
    """One line without a blank."""
    text = "abcdefgh" * (1 << 17)
    keys = {"tokenizer_file": piece_model} if tokenizer == "sentencepiece" else {}
    keys |= {"train_files": write("t.txt", text), "validation_files": write("v.txt", "x")}
    loaded = load(tokenizer=tokenizer, **keys)
    assert loaded.tokenizer.decode(loaded.train).startswith(text)


@pytest.mark.parametrize(("name", "size"), [("byte", 0), ("word", 0), ("bpe", 280)])
def test_tokenizer_comes_back_from_the_cache(load, lines, builds, name, size):
    keys = {"train_files": lines, "document": "line", "tokenizer": name, "vocab_size": size}
    first, second = load(**keys), load(**keys)
    assert len(builds) == 1
    assert second.tokenizer.name == first.tokenizer.name
    assert second.fingerprint == first.fingerprint
    text = "the quick fox\n"
    assert second.tokenizer.encode(text).tolist() == first.tokenizer.encode(text).tolist()
    assert second.tokenizer.decode(second.tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory) -> Path:
    """A small SentencePiece model with Llama's options: BPE, bytes for what is not in it, text left as it is."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(LINES) * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_sentencepiece(load, write, piece_model):
    """The library's own ids, `</s>` after each document and nowhere else, and any text comes back."""
    import sentencepiece

    strange = "  two  blanks\n\n\ttab, naïve 猫 🐈 </s> <s> <unk> \x01 \u2028 end "
    keys = {"train_files": write("train.txt", LINES[0] + "\n" + LINES[1]), "validation_files": write("v.txt", strange)}
    loaded = load(tokenizer="sentencepiece", tokenizer_file=piece_model, document="line", **keys)
    library = sentencepiece.SentencePieceProcessor(model_file=str(piece_model))
    expected = [[*library.encode(line), library.eos_id()] for line in LINES[:2]]
    assert loaded.train.tolist() == [*expected[0], *expected[1]]
    assert loaded.train_ends.tolist() == np.cumsum([len(line) for line in expected]).tolist()
    assert len(loaded.train) < 0.75 * len(LINES[0] + LINES[1])
    tokenizer = loaded.tokenizer
    assert (tokenizer.name, tokenizer.vocab_size, loaded.unit) == ("sentencepiece 340", 340, "token")
    assert tokenizer.decode(loaded.train) == f"{LINES[0]}</s>{LINES[1]}</s>"
    whole = load(tokenizer="sentencepiece", tokenizer_file=piece_model, **keys)
    assert whole.validation.tolist().count(library.eos_id()) == 1
    assert library.unk_id() not in whole.validation.tolist()
    assert tokenizer.decode(whole.validation) == strange + "</s>"
    assert tokenizer.encode("").tolist() == []


def test_sentencepiece_model_is_known_by_its_content(load, lines, builds, piece_model, tmp_path):
    """Wherever it lies it is the same; another is another corpus; and what is kept needs the file no more."""
    keys = {"train_files": lines, "document": "line", "tokenizer": "sentencepiece"}
    first = load(tokenizer_file=piece_model, **keys)
    moved = tmp_path / "moved.model"
    moved.write_bytes(piece_model.read_bytes())
    again = load(tokenizer_file=moved, vocab_size=340, **keys)
    assert len(builds) == 1
    assert again.fingerprint == first.fingerprint
    other = tmp_path / "other.model"
    # A field that the library does not know, which changes the file and nothing else.
    other.write_bytes(piece_model.read_bytes() + b"\xf8\x7f\x01")
    assert load(tokenizer_file=other, **keys).fingerprint != first.fingerprint
    assert len(builds) == 2
    kept = tokenizers.restore(make_config(tmp_path, tokenizer="sentencepiece"), first.tokenizer.dump())
    assert kept.encode(LINES[3]).tolist() == first.tokenizer.encode(LINES[3]).tolist()
    with pytest.raises(
        UserError, match=r"config.data.vocab_size is 341, and config.data.tokenizer_file has 340 pieces"
    ):
        load(tokenizer_file=piece_model, vocab_size=341, **keys)


def test_sentencepiece_is_an_extra(load, lines, piece_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"pip install 'wavelet-jax\[sentencepiece\]'"):
        load(train_files=lines, document="line", tokenizer="sentencepiece", tokenizer_file=piece_model)


# Sources


def test_python_source(load):
    """The standard library: much text, none of it a test or a package; train and validation share no module."""
    loaded = load(source="python", validation_fraction=0.05)
    assert len(loaded.train) > 4_000_000
    assert 0.01 < len(loaded.validation) / len(loaded.train) < 0.15
    text = {split: loaded.tokenizer.decode(getattr(loaded, split)[:20_000]) for split in ("train", "validation")}
    assert "import " in text["train"]
    assert "import " in text["validation"]
    files = sources.find_files(make_config(Path("cache"), source="python"))["train"]
    folders = {part for file in files for part in Path(file).parts[len(Path(os.__file__).parts) - 1 : -1]}
    assert {"asyncio", "json", "email"} <= folders
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"}


def test_python_files_are_those_of_every_distribution(tmp_path):
    ours = ["abc.py", "json/__init__.py", "json/decoder.py", "json.py", "xml/dom/minidom.py"]
    others = """sitecustomize.py _sysconfigdata_.py config-3.11/a.py site-packages/x.py dist-packages/x.py
        test/x.py unittest/test/x.py a/tests/x.py idlelib/x.py lib2to3/x.py json/__pycache__/x.py json/a.txt my/x.py"""
    for name in (*ours, *others.split()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    assert sources.python_files(str(tmp_path)) == [
        str(tmp_path / name) for name in sorted(ours, key=lambda n: n.split("/"))
    ]


def test_undecodable_bytes_are_replaced(load, write):
    loaded = load(train_files=write("a.txt", b"caf\xe9\n"), validation_files=write("b.txt", b"\xef\xbb\xbfbom"))
    assert loaded.train.tolist() == byte_ids("caf\ufffd\n")
    assert loaded.validation.tolist() == byte_ids("bom")


def latin(text: str) -> bytes:
    return text.encode("latin-1")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("document", sources.DOCUMENTS)
def test_undecodable_bytes_are_counted_and_named(load, write, warnings, document, suffix):
    """Each file's, with the first line; U+FFFD that stands in the text itself is not counted. And again next time."""
    text = b"fine\n\n" + "\ufffd\n".encode() + latin("caf\xe9 \xe9\n") + b"\xe2\x82\n\n" + latin("na\xefve")
    keys = {
        "train_files": write(f"t.txt{suffix}", text),
        "validation_files": write("v.txt", "\ufeffgood \ufffd"),
        "document": document,
    }
    for _ in range(2):
        corpus._warn_once.cache_clear()
        loaded = load(**keys)
        assert warnings == [
            f"{keys['train_files']} is not UTF-8 throughout: U+FFFD stands for bytes that are not, 4 times, first in "
            "line 4; if it is in another encoding, convert it, for example with iconv"
        ]
        warnings.clear()
    tokens = loaded.tokenizer.decode(loaded.train).replace("<|endoftext|>", "")
    assert tokens.replace("\n", "") == text.decode("utf-8", "replace").replace("\n", "")


def test_undecodable_bytes_are_counted_as_they_are_decoded():
    """Against the decoder of the whole text."""
    rng = np.random.default_rng(0)
    parts = [
        b"a",
        b"\n",
        b"\xe9",
        b"\xe2\x82",
        b"\xe2\x82\xac",
        b"\xf0\x9f",
        b"\xef\xbf\xbd",
        b"\xef\xbf",
        b"\xed\xa0\x80",
        b"\xc0",
    ]
    for _ in range(300):
        text = b"".join(parts[i] for i in rng.integers(len(parts), size=40))
        expected = text.decode("utf-8", "replace").count("\ufffd") - text.count(b"\xef\xbf\xbd")
        assert sum(map(notes.count_replaced, io.BytesIO(text))) == expected


def test_a_utf_16_file_is_not_text(load, write):
    with pytest.raises(UserError, match=r"is not text .it holds zero bytes.*UTF-8"):
        load(train_files=write("t.txt", "naïve".encode("utf-16")))


def test_unusual_characters_are_text(load, write, warnings):
    """Zero bytes past the beginning, lone "\\r", U+2028, a mark of byte order inside: as they are."""
    text = "a" * 9000 + "\0b\rc\u2028d\ufeffe\r\n"
    loaded = load(train_files=write("t.txt", text), validation_files=write("v.txt", "v"), document="line")
    assert loaded.train.tolist() == byte_ids(text[:-2])
    assert warnings == []


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_packed_files_that_are_empty_or_cut(load, write, tmp_path, suffix):
    """An empty stream is no text; an empty or cut file is damaged."""
    keys = {"validation_files": write("v.txt", "v")}
    with pytest.raises(UserError, match="holds no text: 1 files, all of them blank"):
        load(train_files=write(f"t.txt{suffix}", b""), **keys)
    packed = write(f"t.txt{suffix}", "text" * 1000).read_bytes()
    for cut in (packed[:-10], packed[: len(packed) // 2], packed[:5]):
        (tmp_path / f"cut.txt{suffix}").write_bytes(cut)
        with pytest.raises(UserError, match=rf"cannot read .*cut\.txt\{suffix}: "):
            load(train_files=tmp_path / f"cut.txt{suffix}", **keys)


def test_folders_in_the_place_of_files(load, lines, tmp_path):
    keys = {"train_files": lines, "document": "line"}
    with pytest.raises(UserError, match=r"cannot read config\.data\.tokenizer_file: .*Is a directory"):
        load(tokenizer="sentencepiece", tokenizer_file=tmp_path, **keys)
    with pytest.raises(UserError, match=r"matches no file \(it is a folder"):
        load(**keys | {"train_files": tmp_path})
    with pytest.raises(UserError, match=r"matches no file \(it is a folder"):
        load(validation_files=tmp_path, **keys)


def test_files_globs_and_packed_files(load, write):
    """Sorted by path whatever the order of the patterns, each file once, hidden behind .gz and .xz or not."""
    write("in/b.txt.gz", "packed")
    write("in/a.txt", "plain")
    write("in/c[1].txt.xz", "xz")
    write("in/blank.txt", " \n")
    folder = write("v.txt", "v").parent
    patterns = f"{folder}/in/c[1].txt.xz, {folder}/in/*.txt,{folder}/in/*,,{folder}/**/a.txt"
    assert load(train_files=patterns, validation_files=folder / "v.txt").train.tolist() == byte_ids(
        "plain", "packed", "xz"
    )


def test_home_folder(write, monkeypatch):
    path = write("v.txt", "v")
    monkeypatch.setenv("HOME", str(path.parent))
    files = {"train_files": write("t.txt", "t"), "validation_files": "~/v.txt"}
    assert load_corpus(make_config(Path("~/tokens"), **files)).validation.tolist() == byte_ids("v")
    assert (path.parent / "tokens").is_dir()


@pytest.mark.parametrize(
    ("document", "documents"),
    [
        ("file", ["a\nb\n\n \nc\u2028d\r\n\n"]),
        ("line", ["a", "b", "c\u2028d"]),
        ("paragraph", ["a\nb", "c\u2028d"]),
    ],
)
def test_documents_of_text(load, write, document, documents):
    text = write("train.txt", "a\nb\n\n \nc\u2028d\r\n\n")
    loaded = load(train_files=text, validation_files=write("v.txt", "v"), document=document)
    assert loaded.train.tolist() == byte_ids(*documents)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_json_lines(load, write, suffix):
    records = [{"id": 1, "text": "eins\nzwei"}, {"text": ""}, {"text": "drei \ud83d"}]
    text = "\n\n".join(json.dumps(record) for record in records)
    loaded = load(
        source="jsonl",
        train_files=write(f"train.jsonl{suffix}", text),
        validation_files=write("v.jsonl", '{"text": "v"}'),
        document="line",
    )
    assert loaded.train.tolist() == byte_ids("eins\nzwei", "drei ?")


@pytest.mark.parametrize("record", ['{"text": null}', '{"id": 3}'])
def test_records_without_a_text_are_an_error_or_skipped_and_counted(load, write, warnings, record):
    lines = ['{"text": "a"}', record, "", '{"text": ""}', record, '{"text": "b", "id": null}']
    keys = {
        "source": "jsonl",
        "train_files": write("t.jsonl.gz", "\n".join(lines)),
        "validation_files": write("v.jsonl", '{"text": "v"}'),
    }
    with pytest.raises(
        UserError, match=r"t\.jsonl\.gz line 2: .*config\.data\.missing_text='skip' leaves records"
    ) as raised:
        load(**keys)
    assert "another of" not in str(raised.value)  # no other field would help
    loaded = load(missing_text="skip", **keys)
    assert loaded.train.tolist() == byte_ids("a", "b")
    assert warnings == [
        f"{keys['train_files']}: 2 records without a text in field 'text' were skipped, the first in line 2 "
        "(config.data.missing_text is 'skip')"
    ]


def test_skipping_hides_nothing_else(load, write):
    """A field of another kind is still an error, and so is a name that no record has."""
    keys = {"source": "jsonl", "missing_text": "skip", "validation_files": write("v.jsonl", '{"text": "v"}')}
    with pytest.raises(UserError, match=r"line 1: field 'text' is int, not text"):
        load(train_files=write("t.jsonl", '{"text": 3}'), **keys)
    keys["train_files"] = write("t.jsonl", '{"text": "a"}\n{"text": "b"}')
    with pytest.raises(UserError, match=r"holds no text: .*: 2 records without a text in field 'txt' were skipped"):
        load(text_field="txt", validation_text_field="text", **keys)
    with pytest.raises(UserError, match=r"'skip' goes with JSON lines, not with config\.data\.source 'text'"):
        load(**keys | {"source": "text"})
    with pytest.raises(UserError, match=r"unknown config\.data\.missing_text 'skp': did you mean 'skip'\?"):
        load(**keys | {"missing_text": "skp"})


def test_skipping_is_another_corpus_and_no_skipping_the_same_as_ever(load, write, builds):
    record = '{"text": "a"}'
    keys = {
        "source": "jsonl",
        "train_files": write("t.jsonl", record),
        "validation_files": write("v.jsonl", '{"text": "v"}'),
    }
    assert load(**keys).fingerprint == load(missing_text="skip", **keys).fingerprint
    assert corpus._document_keys(make_config("cache", **keys)) == ["jsonl", "text"]  # the caches that there are
    assert len(builds) == 2


def test_halves_of_surrogate_pairs_are_counted(load, write, warnings):
    text = '{"text": "ok \\ud83d\\ude00"}\n{"text": "\\ud800 \\udc00x"}'
    train = write("t.jsonl", text)
    loaded = load(source="jsonl", train_files=train, validation_files=write("v.jsonl", '{"text": "v"}'))
    assert loaded.train.tolist() == byte_ids("ok \U0001f600", "? ?x")
    assert warnings == [f"{train}: 2 halves of surrogate pairs are read as '?', the first in line 2"]


def test_published_layouts_of_json_lines(load, write):
    """RedPajama's sample (a file a source, "text" and "meta") to train on, CodeParrot's "content" to evaluate on."""
    for name, text in (("arxiv", "\\section{One}"), ("c4", "two"), ("cc_2019-30", "drei\n")):
        record = {"text": text, "meta": {"url": "u", "timestamp": "t", "language": "en"}, "red_pajama_subset": name}
        write(f"sample/{name}_sample.jsonl", json.dumps(record) + "\n")
    record = {"repo_name": "a/b", "path": "c.py", "copies": "1", "size": "7", "content": "print()\n", "license": "mit"}
    record |= {"hash": 3, "line_mean": 7.0, "line_max": 7, "alpha_frac": 0.7, "autogenerated": False}
    valid = write("valid/file-000000000054.json.gz", json.dumps(record) + "\n")
    loaded = load(
        source="jsonl",
        train_files=valid.parent.parent / "sample/*_sample.jsonl",
        validation_files=valid.parent / "file-*.json.gz",
        validation_text_field="content",
    )
    assert loaded.train.tolist() == byte_ids("\\section{One}", "two", "drei\n")
    assert loaded.validation.tolist() == byte_ids("print()\n")


def test_another_field_is_another_corpus(load, write, builds):
    record = json.dumps({"text": "a", "content": "b"})
    keys = {
        "source": "jsonl",
        "train_files": write("t.jsonl", '{"text": "t"}'),
        "validation_files": write("v.jsonl", record),
    }
    read = [load(validation_text_field=field, **keys).validation.tolist() for field in ("", "content", "text")]
    assert read == [byte_ids("a"), byte_ids("b"), byte_ids("a")]


# The split


def test_split_is_as_it_always_was():
    """The assignment of given contents. Where this fails, validation numbers no longer compare with older ones."""
    assert {number for number, line in enumerate(LINES) if corpus.in_validation(line, 0.3)} == HELD_OUT
    assert corpus.in_validation("naïve 猫", 0.5) is True


def test_split_fraction_and_nesting():
    documents = [f"text {number}" for number in range(5000)]
    small, large = ({d for d in documents if corpus.in_validation(d, fraction)} for fraction in (0.05, 0.2))
    assert small < large
    assert abs(len(small) - 250) < 60
    assert abs(len(large) - 1000) < 120


def test_split_goes_by_content_alone(load, write, lines):
    """Other files, another order: the same documents are held out; equal documents are on one side."""
    loaded = load(train_files=lines, document="line")
    assert loaded.train.tolist() == byte_ids(*(line for n, line in enumerate(LINES) if n not in HELD_OUT))
    assert loaded.validation.tolist() == byte_ids(*(line for n, line in enumerate(LINES) if n in HELD_OUT))
    for number, line in enumerate(reversed(LINES + LINES)):
        write(f"many/{number:02}.txt", line)
    scattered = load(train_files=lines.parent / "many/*.txt")
    parts = [
        set(scattered.tokenizer.decode(part).split("<|endoftext|>")) - {""}
        for part in (scattered.train, scattered.validation)
    ]
    assert parts[1] == {LINES[number] for number in HELD_OUT}
    assert not parts[0] & parts[1]
    assert len(scattered.validation) == 2 * len(loaded.validation)


# The cache


def test_cache_is_used_again(load, lines, builds, warnings, tmp_path):
    first = load(train_files=lines, document="line")
    os.utime(lines, (1, 1))
    moved = lines.rename(tmp_path / "moved.txt")
    second = load(train_files=moved, document="line")
    assert len(builds) == 1
    assert second.fingerprint == first.fingerprint
    assert second.train.tolist() == first.train.tolist()
    assert isinstance(second.train, np.memmap)
    assert not warnings
    whole, temporary = folders(tmp_path / "cache")
    assert (len(whole), temporary) == (1, [])  # nothing else is left


def test_changed_text_is_never_taken_for_the_old(load, write, builds):
    path, other = write("t.txt", "abcd"), write("v.txt", "v")
    before = os.stat(path)
    first = load(train_files=path, validation_files=other)
    path.write_text("abcx")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = load(train_files=path, validation_files=other)
    assert second.train.tolist() == byte_ids("abcx")
    assert second.fingerprint != first.fingerprint
    assert first.train.tolist() == byte_ids("abcd")
    path.write_text("abcd")
    assert load(train_files=path, validation_files=other).fingerprint == first.fingerprint
    assert len(builds) == 2


def test_fingerprint_is_that_of_the_tokens(load, write, lines, builds):
    """Equal where the tokens are, however the text was packed; another where tokens, tokenizer or split differ."""
    plain = load(train_files=lines, document="line")
    packed = load(train_files=write("packed.txt.gz", lines.read_bytes()), document="line")
    assert packed.fingerprint == plain.fingerprint
    others = [
        load(train_files=lines, document="line", validation_fraction=0.5),
        load(train_files=lines, document="line", tokenizer="word"),
        load(train_files=lines, document="line", tokenizer="word", vocab_size=10),
        load(train_files=lines, document="line", tokenizer="bpe", vocab_size=270),
        load(train_files=lines, document="line", tokenizer="bpe", vocab_size=280),
        load(train_files=lines, validation_files=write("v.txt", "v"), document="line"),
        load(train_files=lines, validation_files=write("v.txt", "v"), document="file"),
    ]
    assert len({plain.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)
    assert len(builds) == 2 + len(others)


@pytest.fixture
def readings(monkeypatch):
    """A list with one entry for every file whose digest was made by reading it; all files count as at rest."""
    read, digest = [], file_digests.hashlib.file_digest
    monkeypatch.setattr(file_digests.hashlib, "file_digest", lambda *arguments: (read.append(1), digest(*arguments))[1])
    monkeypatch.setattr(file_digests, "_AT_REST", -1)
    return read


def test_digests_of_files_at_rest_are_kept(load, lines, builds, readings, monkeypatch):
    """Neither the text nor the tokens are read again, unless they are not at rest."""
    first = load(train_files=lines, document="line")
    load(train_files=lines, document="line")
    del readings[:]
    again = load(train_files=lines, document="line")
    assert not readings
    assert again.fingerprint == first.fingerprint
    monkeypatch.setattr(file_digests, "_AT_REST", 1000)
    for name in (*lines.parent.glob("cache/.digests.json"),):
        name.unlink()
    for _ in range(2):
        load(train_files=lines, document="line")
    assert len(readings) == 2 * 6  # the text and five files of tokens
    assert len(builds) == 1


def test_changes_of_files_at_rest_are_seen(load, write, builds, warnings, readings, tmp_path):
    """Of the same size and with its times set back; and one that took the place of another."""
    path, other = write("t.txt", "abcd"), write("v.txt", "v")
    keys = {"train_files": path, "validation_files": other}
    for _ in range(2):
        load(**keys)
    before = os.stat(path)
    time.sleep(0.05)  # more than the clock's step
    path.write_text("abcx")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(**keys).train.tolist() == byte_ids("abcx")
    replacement = write("new.txt", "abcy")
    os.utime(replacement, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(replacement, path)
    assert load(**keys).train.tolist() == byte_ids("abcy")
    assert len(builds) == 3
    (tmp_path / "cache" / ".digests.json").write_text('{"a": ')
    assert load(**keys).train.tolist() == byte_ids("abcy")
    tokens = next(
        folder for folder in folders(tmp_path / "cache")[0] if (folder / "train.bin").read_bytes()[6] == ord("y")
    )
    time.sleep(0.05)
    damage_byte(tokens)
    assert load(**keys).validation.tolist() == byte_ids("v")
    assert "is damaged" in warnings[0]


def damage_cut(folder):
    with open(folder / "train.bin", "r+b") as file:
        file.truncate(10)


def damage_byte(folder):
    with open(folder / "validation.bin", "r+b") as file:
        file.write(b"?")


def damage_meta(folder):
    (folder / "meta.json").write_text('{"dtype": "<u')


def damage_meta_keys(folder):
    (folder / "meta.json").write_text("[]")


def damage_missing(folder):
    (folder / "validation.bin").unlink()


def damage_ends(folder):
    with open(folder / "train.ends", "r+b") as file:
        file.write(b"?")


def damage_all(folder):
    for path in folder.iterdir():
        path.unlink()


def damage_file(folder):
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")


@pytest.mark.parametrize(
    "damage",
    [
        damage_cut,
        damage_byte,
        damage_meta,
        damage_meta_keys,
        damage_missing,
        damage_ends,
        damage_all,
        damage_file,
    ],
)
def test_damaged_cache_is_rebuilt(load, lines, builds, warnings, tmp_path, damage):
    keys = {"train_files": lines, "document": "line"}
    whole = load(**keys)
    expected = whole.train.tolist()
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    damage(folder)
    mended = load(**keys)
    assert mended.train.tolist() == expected
    assert mended.fingerprint == whole.fingerprint
    assert any("is damaged" in line and str(folder) in line and "\n" not in line for line in warnings)
    warnings.clear()
    load(**keys)
    assert len(builds) == 2
    assert not warnings


def test_killed_build_is_recovered(load, lines, tmp_path):
    """SIGKILL in the middle of tokenising: no corpus is there, the next run builds it and removes what was left."""
    config = make_config(tmp_path / "cache", train_files=lines, document="line")
    command = program("build_slowly", json.dumps(config.to_dict()))
    child = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    with child:
        try:
            assert child.stdout.readline() == "in the middle\n"
            whole, temporary = folders(tmp_path / "cache")
            assert not whole
            assert len(temporary) == 1
            # Another corpus may be built meanwhile, and leaves this one alone.
            load(train_files=lines, document="line", tokenizer="word")
            assert temporary[0].is_dir()
        finally:
            child.kill()
    loaded = load(train_files=lines, document="line")
    assert loaded.validation.tolist() == byte_ids(*(LINES[number] for number in sorted(HELD_OUT)))
    whole, temporary = folders(tmp_path / "cache")
    assert len(whole) == 2
    assert not temporary


def test_leftovers_of_other_corpora_go_with_the_next_build(load, lines, tmp_path):
    left = tmp_path / "cache" / f".{'0' * 32}.tmp-abc"
    (left / "new").mkdir(parents=True)
    load(train_files=lines, document="line")
    assert not left.exists()


def test_failed_build_leaves_nothing(load, lines, tmp_path, monkeypatch):
    def fail(self, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizers.Byte, "encode", fail)
        with pytest.raises(KeyboardInterrupt):
            load(train_files=lines, document="line")
    assert folders(tmp_path / "cache") == ([], [])
    assert len(load(train_files=lines, document="line").train) > 0


def test_text_that_changes_during_the_build_is_not_kept(load, lines, tmp_path, monkeypatch):
    encode = tokenizers.Byte.encode

    def change(self, text):
        lines.write_text("something else\n" * 20)
        return encode(self, text)

    monkeypatch.setattr(tokenizers.Byte, "encode", change)
    with pytest.raises(UserError, match=r"changed while they were read"):
        load(train_files=lines, document="line")
    assert folders(tmp_path / "cache") == ([], [])


@pytest.mark.parametrize("locks", [True, False])
def test_several_builders_at_once(load, lines, builds, monkeypatch, locks):
    """With locks one builds for all; on a file system without them each does, and every result is whole."""
    if not locks:

        def refuse(file, operation):
            raise OSError("no locks here")

        monkeypatch.setattr(file_locks.fcntl, "flock", refuse)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(load, train_files=lines, document="line") for _ in range(8)]
        loaded = [run.result() for run in runs]
    assert len({one.fingerprint for one in loaded}) == 1
    assert len({one.train.tobytes() for one in loaded}) == 1
    assert 1 <= len(builds) <= (1 if locks else 8)


def test_ends_of_documents_are_kept(load, lines, write):
    """By bytes, and by words, whose stream does not show them; from the cache too."""
    texts = [line for number, line in enumerate(LINES) if number not in HELD_OUT]
    for tokenizer, tokens_in in (("byte", lambda text: len(text) + 1), ("word", lambda text: len(text.split()) + 1)):
        for _ in range(2):
            loaded = load(train_files=lines, document="line", tokenizer=tokenizer)
            assert loaded.train_ends.tolist() == np.cumsum([tokens_in(text) for text in texts]).tolist()
            assert loaded.train_ends[-1] == len(loaded.train)
            assert loaded.validation_ends[-1] == len(loaded.validation)
            assert len(loaded.validation_ends) == len(HELD_OUT)
            assert isinstance(loaded.train_ends, np.memmap)
            assert loaded.train_ends.dtype == np.int64
    whole = load(train_files=write("t.txt", "a\nb"), validation_files=write("v.txt", "v"), tokenizer="word")
    cut = load(
        train_files=write("t.txt", "a\nb"), validation_files=write("v.txt", "v"), tokenizer="word", document="line"
    )
    assert whole.train.tolist() == cut.train.tolist()
    assert whole.fingerprint != cut.fingerprint  # packed, they would be other windows


def test_threads_and_chunks_change_no_token(load, lines, monkeypatch, tmp_path):
    """However documents are shared out, they come in their order."""
    monkeypatch.setattr(corpus, "_CHUNK", 40)  # two documents
    encode = tokenizers.Byte.encode

    def slower_at_first(self, text):
        time.sleep(0.001 * (12 - int(re.search(r"\d+", text)[0])))
        return encode(self, text)

    monkeypatch.setattr(tokenizers.Byte, "encode", slower_at_first)
    for threads in (1, 8):
        loaded = load(train_files=lines, document="line", threads=threads, cache_dir=tmp_path / str(threads))
        assert loaded.train.tolist() == byte_ids(*(line for n, line in enumerate(LINES) if n not in HELD_OUT))


def test_nothing_is_printed_away_from_a_terminal(load, lines, capfd):
    load(train_files=lines, document="line", tokenizer="bpe", vocab_size=280)
    assert capfd.readouterr() == ("", "")


# Windows

TOKENS = np.arange(1000, 1103, dtype=np.uint16)  # 103 tokens: 10 windows of 10, two tokens over


def numbers(windows: Windows, start: int, size: int) -> list[int]:
    return ((windows.batch(start, size)[:, 0] - 1000) // windows.length).tolist()


def test_windows_are_slices_of_the_text():
    windows = Windows(TOKENS, 10, seed=0)
    assert windows.num_windows == 10
    batch = windows.batch(3, 20)
    assert batch.dtype == np.int32
    assert batch.shape == (20, 11)
    for row, number in zip(batch, numbers(windows, 3, 20), strict=True):
        assert row.tolist() == TOKENS[number * 10 : number * 10 + 11].tolist()


@pytest.mark.parametrize(("tokens", "windows"), [(11, 1), (20, 1), (21, 2), (101, 10)])
def test_number_of_windows(tokens, windows):
    assert Windows(TOKENS[:tokens], 10, seed=0).num_windows == windows


def test_every_token_is_a_target_once_an_epoch():
    targets = Windows(TOKENS[:101], 10, seed=5).batch(0, 10)[:, 1:]
    assert sorted(targets.ravel().tolist()) == TOKENS[1:101].tolist()


def test_epochs():
    """Each visits every window once, in an order of its own, and none in that of another seed's epoch."""
    orders = [numbers(Windows(TOKENS, 10, seed), 10 * epoch, 10) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_order_is_a_pure_function_of_seed_and_number():
    whole = numbers(Windows(TOKENS, 10, seed=7), 0, 40)
    windows = Windows(TOKENS, 10, seed=7)
    for size in (1, 3, 8):  # batches over the end of an epoch, asked for from the last to the first
        parts = [numbers(windows, start, size) for start in reversed(range(0, 40 - 40 % size, size))]
        assert [number for part in reversed(parts) for number in part] == whole[: 40 - 40 % size]
    shares = [numbers(windows, 16 + 4 * process, 4) for process in range(2)]
    assert shares[0] + shares[1] == whole[16:24]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("size", [8, 40, 200])
@pytest.mark.parametrize("packed", [False, True])
def test_processes_together_read_what_one_reads(processes, size, packed):
    """The first 1,000 windows, over several epochs: each process takes its share of every batch, in any split."""
    tokens = np.arange(3103)  # 310 windows
    ends = np.array([3, 50, 51, 1703, 3103]) if packed else None
    one = Windows(tokens, 10, 3, ends)
    expected = np.concatenate([one.batch(number, 1) for number in range(1000)])
    share = size // processes
    each = [Windows(tokens, 10, 3, ends) for _ in range(processes)]
    read = [each[p].batch(start + p * share, share) for start in range(0, 1000, size) for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(read), expected)


def test_two_epochs_read_every_window_twice():
    tokens = np.arange(5 * 997 + 1)
    read = Windows(tokens, 5, seed=9).batch(0, 2 * 997)[:, 0] // 5
    assert (np.bincount(read) == np.full(997, 2)).all()


def test_order_is_as_it_always_was():
    """Where this fails, Grain shuffles otherwise: a run can no longer be continued with the data it would have seen."""
    assert numbers(Windows(TOKENS, 10, seed=0), 0, 20) == [1, 2, 4, 5, 9, 7, 8, 6, 0, 3, 9, 6, 1, 8, 2, 0, 3, 5, 4, 7]
    assert numbers(Windows(TOKENS, 10, seed=2**40 + 1), 0, 10) == [2, 1, 5, 3, 4, 6, 8, 9, 7, 0]


def test_windows_of_a_corpus(load, lines):
    loaded = load(train_files=lines, document="line")
    batch = Windows(loaded.train, 16, seed=0).batch(0, 4)
    assert batch.dtype == np.int32
    assert all(loaded.train.tobytes().find(row.astype(np.uint16).tobytes()) >= 0 for row in batch)


@pytest.mark.parametrize(
    ("tokens", "length", "seed", "message"),
    [
        (10, 10, 0, "the text has 10 tokens, and a window of 10 needs 11: lower config.train.length"),
        (0, 1, 0, "the text has 0 tokens"),
        (50, 0, 0, "at least 1 token, not 0: set config.train.length"),
        (50, 5, -1, "config.data.seed, must be at least 0, not -1"),
    ],
)
def test_bad_windows(tokens, length, seed, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Windows(TOKENS[:tokens], length, seed)


# Bad input

FILES = {
    "good.txt": "\n".join(LINES),
    "copy.txt": "\n".join(LINES),
    "one.txt": "one document",
    "blank.txt": " \n\n",
    "binary.txt": b"PK\0\0",
    "empty": b"",
    "cut.txt.gz": b"",
    "not.txt.gz": b"",
    "not.txt.xz": b"",
    "one.jsonl": '{"text": "b"}\n',
    "field.jsonl": '{"text": "a"}\n\n{"txt": "b", "id": 3}\n',
    "type.jsonl": '{"text": 3}\n',
    "list.jsonl": '["text"]\n',
    "syntax.jsonl": '{"text": "a"}\nplain text\n',
}


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ({"source": "txt"}, ["unknown config.data.source 'txt'", "did you mean 'text'?"]),
        ({"document": "lines"}, ["unknown config.data.document 'lines'", "did you mean 'line'?"]),
        ({"tokenizer": "bytes"}, ["unknown config.data.tokenizer 'bytes'", "did you mean 'byte'?"]),
        ({"tokenizer": "bpe"}, ["config.data.vocab_size is 0", "257"]),
        ({"tokenizer": "bpe", "vocab_size": 256}, ["config.data.vocab_size is 256", "257"]),
        ({"tokenizer": "word", "vocab_size": 1}, ["config.data.vocab_size is 1", "2 or more"]),
        ({"tokenizer": "word", "vocab_size": -5}, ["config.data.vocab_size is -5"]),
        ({"tokenizer": "sentencepiece"}, ["config.data.tokenizer_file is empty", "tokenizer.model"]),
        (
            {"tokenizer": "sentencepiece", "tokenizer_file": "no.model"},
            ["cannot read config.data.tokenizer_file", "no.model"],
        ),
        ({"tokenizer": "sentencepiece", "tokenizer_file": "good.txt"}, ["good.txt is not a SentencePiece model"]),
        (
            {"tokenizer": "sentencepiece", "tokenizer_file": "empty"},
            ["empty is not a SentencePiece model"],
        ),
        ({"cache_dir": ""}, ["config.data.cache_dir is empty"]),
        ({"cache_dir": "gs://bucket/cache"}, ["gs://bucket/cache is an address: mount it and give the folder"]),
        ({"cache_dir": "good.txt"}, ["cannot write the token cache", "config.data.cache_dir"]),
        ({"validation_fraction": 0.0}, ["config.data.validation_fraction is 0.0", "config.data.validation_files"]),
        ({"validation_fraction": 1.0}, ["config.data.validation_fraction is 1.0"]),
        ({"train_files": ""}, ["'text'", "config.data.train_files is empty"]),
        ({"train_files": " , "}, ["config.data.train_files is empty"]),
        ({"train_files": "no/*.txt"}, ["config.data.train_files: 'no/*.txt' matches no file"]),
        ({"validation_files": "no.txt"}, ["config.data.validation_files: 'no.txt' matches no file"]),
        ({"train_files": "folder/"}, ["'folder/' matches no file", "did you mean 'folder/*'?"]),
        ({"source": "python"}, ["config.data.source is 'python'", "config.data.train_files"]),
        ({"validation_files": "good.txt"}, ["good.txt is in both splits", "config.data.train_files"]),
        ({"validation_files": "copy.txt"}, ["copy.txt (it equals", "is in both splits"]),
        ({"train_files": "blank.txt"}, ["config.data.train_files holds no text", "1 files"]),
        ({"validation_files": "blank.txt"}, ["config.data.validation_files holds no text"]),
        ({"train_files": "blank.txt", "validation_files": "one.txt"}, ["config.data.train_files holds no text"]),
        (
            {"train_files": "one.txt", "validation_fraction": 0.001},
            [
                "the validation split is empty: none of 1 documents",
                "config.data.validation_fraction 0.001",
                "config.data.validation_files",
                "a smaller config.data.document",
            ],
        ),
        ({"train_files": "one.txt"}, ["the train split is empty: none of 1 documents"]),
        ({"train_files": "one.txt", "tokenizer": "word"}, ["the train split is empty"]),
        ({"train_files": "one.txt", "tokenizer": "bpe", "vocab_size": 300}, ["the train split is empty"]),
        ({"source": "jsonl", "train_files": "one.jsonl"}, ["the validation split is empty", "more documents"]),
        ({"train_files": "binary.txt"}, ["binary.txt is not text", "zero bytes"]),
        ({"train_files": "cut.txt.gz"}, ["cannot read", "cut.txt.gz", "end-of-stream marker"]),
        ({"train_files": "not.txt.gz"}, ["cannot read", "not.txt.gz", "Not a gzipped file"]),
        ({"train_files": "not.txt.xz"}, ["cannot read", "not.txt.xz", "not supported"]),
        (
            {"source": "jsonl", "train_files": "field.jsonl"},
            ["field.jsonl line 3: unknown config.data.text_field 'text': did you mean 'txt'? allowed are txt, id"],
        ),
        (
            {"source": "jsonl", "train_files": "type.jsonl"},
            ["type.jsonl line 1", "is int, not text: set config.data.text_field"],
        ),
        (
            {"source": "jsonl", "train_files": "list.jsonl"},
            ["list.jsonl line 1", "is a JSON list", "config.data.text_field"],
        ),
        ({"source": "jsonl", "train_files": "syntax.jsonl"}, ["syntax.jsonl line 2 is not JSON", "config.data.source"]),
        ({"validation_text_field": "b"}, ["config.data.validation_text_field is 'b', which goes with JSON lines"]),
        (
            {"source": "jsonl", "train_files": "one.jsonl", "validation_text_field": "content"},
            ["JSON lines in config.data.validation_files: name files there, or leave it empty"],
        ),
        (
            {
                "source": "jsonl",
                "train_files": "one.jsonl",
                "validation_files": "field.jsonl",
                "validation_text_field": "ext",
            },
            ["field.jsonl line 1: unknown config.data.validation_text_field 'ext': did you mean 'text'?"],
        ),
    ],
)
def test_bad_input(write, tmp_path, monkeypatch, keys, fragments):
    """One line that says what was found and which key to change, and no corpus or temporary folder left."""
    for name, content in FILES.items():
        write(name, content)
    write("folder/a.txt", "a")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-10])
    (tmp_path / "not.txt.gz").write_bytes(b"plain text")
    (tmp_path / "not.txt.xz").write_bytes(b"plain text")
    monkeypatch.chdir(tmp_path)
    keys = {"train_files": "good.txt", "cache_dir": "cache"} | keys
    config = make_config(tmp_path, **keys)
    with pytest.raises(UserError) as raised:
        load_corpus(config)
    message = str(raised.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert not Path("cache").exists() or folders(Path("cache")) == ([], [])


def test_unreadable_cache_folder(load, lines, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"cannot write the token cache .*: set config.data.cache_dir elsewhere"):
        load(train_files=lines, document="line")


def test_no_python_sources(tmp_path):
    with pytest.raises(UserError, match=r"no Python sources in .*: set config.data.source to 'text'"):
        sources.python_files(str(tmp_path))
