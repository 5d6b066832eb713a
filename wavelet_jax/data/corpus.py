"""From documents to two token streams, train and validation, kept in a cache of memory-mapped files.

A folder of the cache is named by a hash of everything it was made from: every byte of the source files, the
tokenizer, the split. It appears under that name by one rename, when all of it is on the disk.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import logging

from wavelet_jax.data import file_digests, sources, tfds_sets, tokenizers
from wavelet_jax.data.notes import Notes
from wavelet_jax.errors import UserError
from wavelet_jax.files import atomic, locks
from wavelet_jax.files.reading import read_json, user_path
from wavelet_jax.parallel import processes

_FORMAT = 2  # raise it when other code would make other tokens of the same text
_TMP = ".tmp-"
_CHUNK = 1 << 20  # characters that are tokenized as one piece of work
_FILES = ("train.bin", "validation.bin", "train.ends", "validation.ends", "tokenizer.json")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised text.

    Attributes:
      train, validation: token ids [N], uint16 or uint32, read-only and memory-mapped.
      tokenizer: has `name` (such as "byte", "word 33278", "bpe 4096"), `vocab_size`, `encode(text)`, `decode(ids)`.
      unit: what a token is: "byte", "word" or "BPE token".
      fingerprint: a hex digest of the streams, the ends of documents and the tokenizer; equal exactly where they are.
      train_ends, validation_ends: where each document ends in its stream: the number of tokens up to and with its
        last one, ascending int64, read-only and memory-mapped.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: tokenizers.Tokenizer
    unit: str
    fingerprint: str
    train_ends: np.ndarray
    validation_ends: np.ndarray


def load_corpus(config) -> Corpus:
    """The corpus that `config.data` describes: from the cache where it is there, else made and put there.

    Safe in several processes at once: one builds, the others wait for it. A build that ends early, killed or by an
    error, leaves no corpus behind.

    Raises:
      UserError: one line for an unknown name, missing or unreadable files, text that leaves a split empty, the same
        file in both splits, a cache folder that cannot be written.
    """
    sources.check(config)
    tokenizer = tokenizers.specification(config)
    if not config.data.cache_dir:
        raise UserError("config.data.cache_dir is empty: name a folder for the tokenized text")
    cache = user_path(config.data.cache_dir, "config.data.cache_dir", config.data.folder).absolute()
    with file_digests.kept(cache) as sha256:
        return _load(config, cache, tokenizer, sha256)


def check_files(config) -> None:
    """Checks what `config.data` names, without reading text.

    Raises:
      MissingFile: a file is not there.
      UserError: see `load_corpus`.
    """
    sources.check(config)
    tokenizers.specification(config)
    sources.find_files(config)


def _load(config, cache: Path, tokenizer: list, sha256: Callable[[str | Path], str]) -> Corpus:
    """The same, with the cache folder, what `tokenizers.specification` said, and what reads the digest of a file."""
    files = sources.find_files(config)
    if not files["validation"] and not 0 < config.data.validation_fraction < 1:
        raise UserError(
            f"config.data.validation_fraction is {config.data.validation_fraction}: set it between 0 and 1, or name "
            f"config.data.validation_{_kind(config)}"
        )
    digests = {split: sources.digests(names, sha256) for split, names in files.items()}
    if not sources.is_tfds(config):  # whose splits may share a file, and share no example
        _check_overlap(files, digests)
    made_from = {
        "format": _FORMAT,
        "documents": _document_keys(config),
        "split": "files" if files["validation"] else config.data.validation_fraction,
        "tokenizer": tokenizer,
        **digests,
    }
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    corpus = _open(config, cache / key, sha256)
    if corpus is not None:
        return corpus
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{key}.lock", wait=True) as held:
            _remove_leftovers(cache, key if held else None)
            corpus = _open(config, cache / key, sha256)  # another process may have made it while this one waited
            return corpus or _build(config, cache, key, files, digests, sha256)
    except OSError as error:  # those of reading the text are `UserError`s by now
        raise UserError(f"cannot write the token cache ({error}): set config.data.cache_dir elsewhere") from error


def in_validation(document: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: decided by its content alone.

    So it is the same on every machine, equal documents are on one side, and a larger fraction only adds documents.
    """
    digest = hashlib.blake2b(document.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _document_keys(config) -> list[str]:
    """The keys that decide how files become documents, and which of them are read."""
    match config.data.source:
        case "python":
            return ["text", "file"]
        case "text":
            return ["text", config.data.document]
        case "jsonl":
            fields = [config.data.text_field, config.data.validation_text_field]
            kind = "jsonl" if config.data.missing_text == "error" else "jsonl, missing texts skipped"
            return [kind, *filter(None, fields)]
        case _:
            splits = [config.data.train_split, config.data.validation_split]
            return ["tfds", tfds_sets.full_name(config), config.data.text_field, *splits]


def _check_overlap(files: dict[str, list[str]], digests: dict[str, list[str]]) -> None:
    """Raises `UserError` where a file, under whatever name, is in both splits."""
    trained_on = dict(zip(digests["train"], files["train"], strict=True))
    for file, digest in zip(files["validation"], digests["validation"], strict=True):
        if digest in trained_on and os.path.getsize(file):
            same = "" if trained_on[digest] == file else f" (it equals {trained_on[digest]})"
            raise UserError(
                f"{file}{same} is in both splits: take it out of config.data.train_files or "
                "config.data.validation_files"
            )


def _documents(config, files: dict[str, list[str]], label: str, notes: Notes) -> Iterator[tuple[str, str]]:
    """(split, document) for every document, train before validation where both have files."""
    for document in sources.documents(config, "train", files["train"], label, notes):
        held_out = not files["validation"] and in_validation(document, config.data.validation_fraction)
        yield "validation" if held_out else "train", document
    if files["validation"]:
        for document in sources.documents(config, "validation", files["validation"], label, notes):
            yield "validation", document


def _build(
    config,
    cache: Path,
    key: str,
    files: dict[str, list[str]],
    digests: dict[str, list[str]],
    sha256: Callable[[str | Path], str],
) -> Corpus:
    """Makes the corpus in a temporary folder and moves it into place."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}{_TMP}", dir=cache))
    try:
        made = temporary / "new"
        made.mkdir()
        _write(config, made, files, sha256)
        if {split: sources.digests(names, sha256) for split, names in files.items()} != digests:
            raise UserError("the files of config.data changed while they were read: start again")
        corpus = _open(config, made, sha256)  # its maps stay whatever happens to the name
        if corpus is None:
            raise OSError(errno.EIO, "what was written reads back otherwise", str(cache))
        with contextlib.suppress(FileNotFoundError):
            os.rename(cache / key, temporary / "damaged")
        try:
            os.rename(made, cache / key)
        except OSError as error:
            # Only where locks do not work: another process was first, with the same tokens.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        return corpus
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(config, folder: Path, files: dict[str, list[str]], sha256: Callable[[str | Path], str]) -> None:
    """Writes `_FILES` and, last, meta.json, document by document."""

    def train_documents() -> Iterator[str]:
        every = _documents(config, files, f"{config.data.tokenizer} vocabulary", Notes())
        return (document for split, document in every if split == "train")

    tokenizer, notes = tokenizers.train(config, train_documents), Notes()
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    end = [] if tokenizer.end is None else [np.array([tokenizer.end], dtype)]
    documents, tokens = {"train": 0, "validation": 0}, {"train": 0, "validation": 0}
    with contextlib.ExitStack() as stack:
        streams, ends = (
            {split: stack.enter_context(open(folder / f"{split}.{kind}", "wb")) for split in tokens}
            for kind in ("bin", "ends")
        )
        every = _documents(config, files, f"{config.data.tokenizer} tokens", notes)
        for split, ids in stack.enter_context(contextlib.closing(_encoded(config, tokenizer, every))):
            for part in (ids, *end):
                streams[split].write(part.data)
                tokens[split] += len(part)
            ends[split].write(tokens[split].to_bytes(8, "little"))
            documents[split] += 1
        for stream in (*streams.values(), *ends.values()):
            _flush(stream)
    _check_splits(config, documents, files, notes)
    with open(folder / "tokenizer.json", "w", encoding="utf-8") as file:
        file.write(tokenizer.dump())
        _flush(file)
    meta = {"tokenizer": tokenizer.name, "dtype": dtype.str, "documents": documents, "tokens": tokens}
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        fingerprint = _fingerprint(folder, dtype.str, sha256)
        json.dump({**meta, "notes": notes.lines(), "fingerprint": fingerprint}, file, indent=1)
        _flush(file)


def _encoded(
    config, tokenizer: tokenizers.Tokenizer, documents: Iterable[tuple[str, str]]
) -> Generator[tuple[str, np.ndarray], None, None]:
    """(split, ids) of every (split, document), in their order, encoded on `config.data.threads` threads.

    BPE and SentencePiece leave Python's lock while they work; bytes and words hold it, and gain only that of reading.
    """
    threads = config.data.threads
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    waiting = collections.deque()
    try:
        for chunk in _chunks(documents):
            waiting.append(pool.submit(lambda chunk: [(split, tokenizer.encode(text)) for split, text in chunk], chunk))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Neighbouring documents, `_CHUNK` characters or a little more: one line is too little work for a thread."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document[1])
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _flush(file) -> None:
    """On the disk before the rename, or a power cut could leave a whole name on half a file."""
    file.flush()
    os.fsync(file.fileno())


def _check_splits(config, documents: dict[str, int], files: dict[str, list[str]], notes: Notes) -> None:
    """Raises `UserError` where a split has no document."""
    total = sum(documents.values())
    left_out = "".join(f"; {note}" for note in notes.lines())
    for split in ("train", "validation"):
        if files[split] and not (documents[split] if files["validation"] else total):
            raise UserError(
                f"config.data.{split}_{_kind(config)} holds no text: {len(files[split])} files, all of them blank"
                f"{left_out}"
            )
        if not documents[split]:
            smaller = "a smaller config.data.document" if config.data.source == "text" else "more documents"
            raise UserError(
                f"the {split} split is empty: none of {total} documents falls into it by config.data."
                f"validation_fraction {config.data.validation_fraction}: change it, name "
                f"config.data.validation_{_kind(config)}, or give {smaller}{left_out}"
            )


def _kind(config) -> str:
    """The ends of the keys of the two splits: config.data.train_files, config.data.train_split."""
    return "split" if sources.is_tfds(config) else "files"


def _fingerprint(folder: Path, dtype: str, sha256: Callable[[str | Path], str]) -> str:
    """The digest of the streams, the ends and the tokenizer, from the files."""
    digest = hashlib.sha256(dtype.encode())
    for name in _FILES:
        digest.update(bytes.fromhex(sha256(folder / name)))
    return digest.hexdigest()


def _open(config, folder: Path, sha256: Callable[[str | Path], str]) -> Corpus | None:
    """The corpus in a folder of the cache; None where there is none, or (with a warning) a damaged one."""
    if not folder.exists():
        return None
    try:
        meta = read_json(folder / "meta.json")
        # Finds what a size cannot show.
        if _fingerprint(folder, str(meta["dtype"]), sha256) != meta["fingerprint"]:
            raise ValueError("its files are not those that were written")
        tokenizer = tokenizers.restore(config, (folder / "tokenizer.json").read_text(encoding="utf-8"))
        splits = "train", "validation"
        train, validation = (np.memmap(folder / f"{split}.bin", meta["dtype"], "r") for split in splits)
        ends = [np.memmap(folder / f"{split}.ends", "<i8", "r") for split in splits]
        for note in meta.get("notes", []):  # corpora of earlier versions have none
            if processes.is_first():
                _warn_once(note)
        return Corpus(train, validation, tokenizer, tokenizer.unit, meta["fingerprint"], *ends)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.warning("the token cache %s is damaged (%s): it is built again", folder, error)
        return None


@functools.cache
def _warn_once(note: str) -> None:
    """Several runs of one command read the same corpus."""
    logging.warning("%s", note)


def _remove_leftovers(cache: Path, held_key: str | None) -> None:
    """Removes the folders of builds that were killed: those whose lock is free, or held by this process."""
    for folder in cache.glob(f".*{_TMP}*"):
        owner = folder.name.split(_TMP)[0][1:]
        lock = contextlib.nullcontext(True) if owner == held_key else _locked(cache / f".{owner}.lock", wait=False)
        with lock as held:
            if held:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds the lock of a file, which the kernel drops when its holder dies; False where it cannot be had."""
    with atomic.open_kept(path, "ab") as file:
        held = locks.lock(file)
        if held is False and wait:
            logging.info("another process tokenizes this corpus: waiting for it")
            held = locks.lock(file, wait=True)
        yield held is True  # without locks several may build, and the first rename wins
