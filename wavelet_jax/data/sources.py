"""Sources of text: the files or the TFDS data set that `config.data` names, read as a stream of documents."""

import contextlib
import glob
import gzip
import io
import itertools
import lzma
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from wavelet_jax.data import tfds_sets
from wavelet_jax.data.notes import REPLACEMENT, Notes, count_replaced
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.files.reading import MissingFile, parse_json, user_path

SOURCES = ("python", "text", "jsonl")  # and "tfds:NAME"
DOCUMENTS = ("file", "line", "paragraph")
MISSING_TEXTS = ("error", "skip")
_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)  # gzip's own error is an OSError

# Parts of the standard library that distributions package apart or drop, and parts that are tables, not code.
_LEFT_OUT = {"idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "distutils", "encodings", "pydoc_data"}
_LEFT_OUT_FOLDERS = {"test", "tests", "__pycache__", "site-packages", "dist-packages"}


def check(config) -> None:
    """Raises `UserError` where the source or the kind of document is not known, or a key goes with another source."""
    if config.data.source not in SOURCES and not is_tfds(config):
        raise unknown("config.data.source", config.data.source, (*SOURCES, tfds_sets.PREFIX + "NAME"))
    if config.data.document not in DOCUMENTS:
        raise unknown("config.data.document", config.data.document, DOCUMENTS)
    if config.data.missing_text not in MISSING_TEXTS:
        raise unknown("config.data.missing_text", config.data.missing_text, MISSING_TEXTS)
    if config.data.missing_text == "skip" and config.data.source != "jsonl":
        raise UserError(
            "config.data.missing_text 'skip' goes with JSON lines, not with config.data.source "
            f"{config.data.source!r}: leave it at 'error'"
        )
    if config.data.validation_text_field and not (config.data.source == "jsonl" and config.data.validation_files):
        raise UserError(
            f"config.data.validation_text_field is {config.data.validation_text_field!r}, which goes with JSON lines "
            "in config.data.validation_files: name files there, or leave it empty"
        )


def is_tfds(config) -> bool:
    """Whether the text is a TFDS data set, which comes in splits."""
    return config.data.source.startswith(tfds_sets.PREFIX)


def find_files(config) -> dict[str, list[str]]:
    """The files of the "train" and of the "validation" text, each sorted by path and each file once.

    Without validation files (the list is empty) the train files are those of both splits. Those of TFDS are as read.

    Raises:
      UserError: nothing named, a name that matches no file, or files named for a source that reads none; and those of
        `tfds_sets.find_files`.
    """
    if is_tfds(config):
        return tfds_sets.find_files(config)
    if config.data.source == "python":
        if config.data.train_files or config.data.validation_files:
            raise UserError(
                "config.data.source is 'python', which reads no other files: set it to 'text' or 'jsonl', or leave "
                "config.data.train_files and config.data.validation_files empty"
            )
        return {"train": python_files(sysconfig.get_path("stdlib")), "validation": []}
    train = _expand(config, "train_files")
    if not train:
        raise UserError(
            f"config.data.source is {config.data.source!r} and config.data.train_files is empty: "
            "name files there, comma-separated paths or globs"
        )
    return {"train": train, "validation": _expand(config, "validation_files")}


def python_files(stdlib: str) -> list[str]:
    """The .py files of a standard library, in an order that is the same on every machine.

    Only modules that every distribution of this Python has: no installed packages, no tests, no build settings.
    """
    found = []
    for folder, folders, names in os.walk(stdlib):
        top = folder == stdlib
        folders[:] = [name for name in folders if name not in _LEFT_OUT_FOLDERS and (not top or _is_library(name))]
        found += [
            os.path.relpath(os.path.join(folder, name), stdlib)
            for name in names
            if name.endswith(".py") and (not top or _is_library(name[:-3]))
        ]
    if not found:
        raise UserError(
            f"no Python sources in {stdlib}: set config.data.source to 'text' and config.data.train_files to your text"
        )
    return [os.path.join(stdlib, name) for name in sorted(found, key=lambda name: name.split(os.sep))]


def _is_library(module: str) -> bool:
    return module in sys.stdlib_module_names and module not in _LEFT_OUT


def _expand(config, name: str) -> list[str]:
    """The files that the comma-separated paths or globs of `config.data[name]` match, sorted."""
    patterns, key = config.data[name], f"config.data.{name}"
    files = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        path = os.path.abspath(user_path(pattern, key, config.data.folder))
        # A file may have glob characters in its name.
        found = [path] if os.path.isfile(path) else filter(os.path.isfile, glob.glob(path, recursive=True))
        found = set(found)
        if not found:
            folder = f" (it is a folder: did you mean '{pattern.rstrip('/')}/*'?)" if os.path.isdir(path) else ""
            where = f" in {config.data.folder}" if config.data.folder and not os.path.isabs(pattern) else ""
            raise MissingFile(f"{key}: {pattern!r} matches no file{where}{folder}")
        files |= found
    return sorted(files)


def digests(files: Iterable[str], sha256: Callable[[str], str]) -> list[str]:
    """For each file, the SHA-256 of its bytes as they are on disk and how they will be unpacked."""
    result = []
    for file in files:
        with _readable(file):
            result.append(sha256(file) + _compression(file))
    return result


def documents(config, split: str, files: list[str], label: str, notes: Notes) -> Iterator[str]:
    """The documents of a split, whose files these are, in their order, without those that hold no text.

    A Python source and (by default) a text file is one document; `config.data.document` may make it the line or the
    paragraph (up to a blank line), which then come without their last line end. A JSON line is one document, and so is
    an example of TFDS. Line ends are "\\n" and a "\\r" is text. Bytes that are not UTF-8 become U+FFFD, halves of
    surrogate pairs in JSON "?", and JSON lines without a text are left out where `config.data.missing_text` is "skip":
    all of that is counted in `notes`. `label` goes before the progress bar.

    Raises:
      UserError: a file that cannot be read, holds no text but binary data, or has a line that is not as it should be.
    """
    if is_tfds(config):
        yield from tfds_sets.documents(config, split, label, notes)
        return
    total = sum(os.path.getsize(file) for file in files)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=1, leave=False, disable=None) as bar:
        for file in files:
            before, replaced = bar.n, False
            with _readable(file), open(file, "rb") as raw, _unpack(file, raw) as text:
                for document in _split(config, split, file, text, notes):
                    bar.update(before + raw.tell() - bar.n)
                    replaced = replaced or REPLACEMENT in document
                    if document.strip():
                        yield document
            if replaced:
                _note_replaced(file, notes)


def _note_replaced(file: str, notes: Notes) -> None:
    """Notes how many U+FFFD stand for bytes that are not UTF-8; the file may also hold the character itself.

    Every line is decoded on its own, with the same result: no character of UTF-8 goes over a line end.
    """
    what = (
        "{file} is not UTF-8 throughout: U+FFFD stands for bytes that are not, {count} times, first in line "
        "{first}; if it is in another encoding, convert it, for example with iconv"
    )
    with _readable(file), open(file, "rb") as raw:
        compression = _compression(file)
        for number, line in enumerate(_COMPRESSED[compression](raw, "rb") if compression else raw, start=1):
            if count := count_replaced(line):
                notes.add(what, file, str(number), count)


def _compression(file: str) -> str:
    suffix = os.path.splitext(file)[1]
    return suffix if suffix in _COMPRESSED else ""


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    """Turns an error of reading `file` into a `UserError` that names it."""
    try:
        yield
    except _READ_ERRORS as error:
        raise UserError(f"cannot read {file}: {error or type(error).__name__}") from error


def _unpack(file: str, raw: io.BufferedReader) -> io.TextIOWrapper:
    compression = _compression(file)
    stream = _COMPRESSED[compression](raw, "rb") if compression else raw
    if b"\0" in stream.peek(8192)[:8192]:
        raise UserError(f"{file} is not text (it holds zero bytes): plain, .gz and .xz files in UTF-8 can be read")
    # newline="\n" leaves the text as it is; str.splitlines would also cut at U+2028 and the like.
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="\n")


def _split(config, split: str, file: str, text: io.TextIOWrapper, notes: Notes) -> Iterator[str]:
    """The documents of one open file of a split."""
    if config.data.source == "jsonl":
        field, key = config.data.text_field, "config.data.text_field"
        if split == "validation" and config.data.validation_text_field:
            field, key = config.data.validation_text_field, "config.data.validation_text_field"
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            record = _json_record(line, field, key, f"{file} line {number}")
            if config.data.missing_text == "skip" and record.get(field) is None:
                notes.add(
                    f"{{file}}: {{count}} records without a text in field {field!r} were skipped, the first in line "
                    "{first} (config.data.missing_text is 'skip')",
                    file,
                    str(number),
                )
                continue
            document = _json_text(record, field, key, f"{file} line {number}")
            # JSON can escape half of a surrogate pair, which UTF-8 cannot hold.
            if halves := len(re.findall("[\ud800-\udfff]", document)):
                notes.add(
                    "{file}: {count} halves of surrogate pairs are read as '?', the first in line {first}",
                    file,
                    str(number),
                    halves,
                )
                document = document.encode("utf-8", "replace").decode("utf-8")
            yield document
    elif config.data.source == "python" or config.data.document == "file":
        yield text.read()
    elif config.data.document == "line":
        yield from (line.rstrip("\r\n") for line in text)
    else:
        for blank, lines in itertools.groupby(text, key=lambda line: not line.strip()):
            if not blank:
                yield "".join(lines).rstrip("\r\n")


def _json_record(line: str, field: str, key: str, place: str) -> dict:
    """The object of one JSON line; the field, the key that named it and `place` are for errors."""
    try:
        record = parse_json(line, place)
    except UserError as error:
        raise UserError(f"{error}: set config.data.source to 'text' for plain text") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{place} is a JSON {type(record).__name__}, not an object with its text in field {field!r} ({key})"
        )
    return record


def _json_text(record: dict, field: str, key: str, place: str) -> str:
    """The text in a field of the object of a JSON line; errors as `_json_record`'s."""
    skip = "config.data.missing_text='skip' leaves records without a text out"
    if field not in record:
        raise UserError(f"{place}: {unknown(key, field, record)}; {skip}")
    if record[field] is None:
        raise UserError(f"{place}: field {field!r} ({key}) is null, not text: {skip}")
    if not isinstance(record[field], str):
        raise UserError(
            f"{place}: field {field!r} is {type(record[field]).__name__}, not text: set {key} to "
            f"another of {', '.join(record)}"
        )
    return record[field]
