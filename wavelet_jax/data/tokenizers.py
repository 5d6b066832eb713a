"""Tokenizers: bytes, words by the WikiText convention, byte-level BPE, SentencePiece: small classes, alike outside.

name: the stamp on figures; unit: what a token is; vocab_size; end: the id after each document, None for none;
encode(text) -> ids, without the end; decode(ids) -> text; dump() -> what `restore` needs to make it again.
"""

import base64
import collections
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tokenizers

from wavelet_jax.errors import UserError, unknown
from wavelet_jax.files.reading import MissingFile, user_path

TOKENIZERS = ("byte", "word", "bpe", "sentencepiece")
END = "<|endoftext|>"  # how the end of a document looks when decoded; the same letters in a text are plain text
UNKNOWN, LINE_END = "<unk>", "</s>"
# The library allocates all of a BPE vocabulary at once, 70 bytes per token, and aborts the process where it cannot.
_MAX_BPE = 10_000_000


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned dtype for ids, little-endian as in the cache's files: uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class Byte:
    """The bytes of UTF-8 text, and 256 for the end of a document."""

    name, unit, vocab_size, end = "byte", "byte", 257, 256
    _PIECES = (*(bytes([value]) for value in range(256)), END.encode())

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(id_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray) -> str:
        return b"".join(self._PIECES[i] for i in ids).decode("utf-8", "replace")

    def dump(self) -> str:
        return "{}"


class Word:
    """Words between white space, `</s>` at each line end (of blank lines too), `<unk>` for words not in the list.

    That is the convention of WikiText (Merity et al., arXiv 1609.07843): nothing marks the end of a document.
    """

    unit, end = "word", None

    def __init__(self, words: list[str]):
        self.words, self.vocab_size, self.name = words, len(words), f"word {len(words)}"
        self._ids = {word: i for i, word in enumerate(words)}
        self._dtype = id_dtype(len(words))

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "Word":
        """Takes the words of documents, most frequent first and equal ones by the word itself.

        vocab_size: how many to keep, with `<unk>` and `</s>`, which always are; 0 keeps all.
        """
        counts = collections.Counter({UNKNOWN: 0, LINE_END: 0})
        for document in documents:
            counts.update(itertools.chain.from_iterable(map(cls._words_of, cls._lines(document))))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        if vocab_size and len(ranked) > vocab_size:
            words = [word for word in ranked if word not in (UNKNOWN, LINE_END)]
            kept, left_out = words[: vocab_size - 2], words[vocab_size - 2 :]
            counts[UNKNOWN] += sum(counts[word] for word in left_out)  # what they will be read as
            ranked = sorted([UNKNOWN, LINE_END, *kept], key=lambda word: (-counts[word], word))
        return cls(ranked)

    @staticmethod
    def _lines(text: str) -> list[str]:
        lines = text.split("\n")
        return lines if lines[-1] else lines[:-1]  # a last line end closes a line, it does not open one

    @staticmethod
    def _words_of(line: str) -> list[str]:
        return [*line.split(), LINE_END]

    def encode(self, text: str) -> np.ndarray:
        unknown_id, ids = self._ids[UNKNOWN], self._ids
        words = itertools.chain.from_iterable(map(self._words_of, self._lines(text)))
        return np.fromiter((ids.get(word, unknown_id) for word in words), self._dtype)  # no list of a whole corpus

    def decode(self, ids: np.ndarray) -> str:
        words = (self.words[i] for i in ids)
        return re.sub(" ?\n ?", "\n", " ".join("\n" if word == LINE_END else word for word in words))

    def dump(self) -> str:
        return json.dumps(self.words)


class BPE:
    """Byte-level byte-pair encoding (as GPT-2's), and one id past its own for the end of a document.

    The end is not a token of the `tokenizers` model, so that no text can be mistaken for it.

    A word, in the sense of GPT-2's rule for what is merged together, that is longer than 1,024 characters is read as
    several, each of 1,024 but the last: learning merges takes time that grows with the square of a word's length. Such
    words are runs of one kind (letters, digits, signs or white space) as no ordinary text has them: the longest of the
    Python standard library has 80 characters.
    """

    unit = "BPE token"
    _PIECE = 1 << 16  # characters; the library needs some hundred bytes of memory for each it encodes at once
    _BREAK = re.compile(r"(?<=\S)[ \n](?=\S)")
    _WORD = 1024  # characters
    # Found in every text with a longer word, of which the first character may be a space. It is tried at the start of a
    # stretch alone, so that the search is linear.
    _LONG = re.compile(rf"(?<![^ \n\t\r])[^ \n\t\r]{{{_WORD}}}|(?<!\s)\s{{{_WORD}}}")
    _BYTE_LEVEL = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    def __init__(self, model: tokenizers.Tokenizer):
        self._model, self.end = model, model.get_vocab_size()
        self.vocab_size = self.end + 1
        self.name = f"bpe {self.vocab_size}"
        self._dtype = id_dtype(self.vocab_size)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "BPE":
        """Learns up to `vocab_size` - 257 merges of pairs that occur at least twice in documents."""
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer, model.decoder = cls._BYTE_LEVEL, tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=sorted(cls._BYTE_LEVEL.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(itertools.chain.from_iterable(map(cls._pieces, documents)), trainer)
        return cls(model)

    @classmethod
    def _pieces(cls, text: str) -> Iterator[str]:
        """Cuts a long text where it changes no token: in front of a lone space or line end, where one ends anyway.

        Words longer than `_WORD` are cut too, and change.
        """
        if cls._LONG.search(text):
            yield from cls._pieces_of_long_words(text)
            return
        start = 0
        while cut := cls._BREAK.search(text, start + cls._PIECE):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    @classmethod
    def _pieces_of_long_words(cls, text: str) -> Iterator[str]:
        """`_pieces` of a text that may have words longer than `_WORD`: found window by window, by the library's rule.

        The rule looks at no character before a word, and at few after it: where it is cut, a word must not end in white
        space, which goes another way in front of other text, and must lie before the last two characters of the window,
        of which the next ones may make a contraction ('re).
        """
        start, size = 0, max(cls._PIECE, 4 * cls._WORD)
        while start < len(text):
            window = text[start : start + size]
            words = [span for _, span in cls._BYTE_LEVEL.pre_tokenize_str(window)]
            whole = start + size >= len(text)
            first, safe = 0, 0  # of the next piece; where it may end
            for begin, end in words if whole else words[:-1]:
                if end - begin > cls._WORD:
                    yield window[first : begin + cls._WORD]
                    yield from cls._cut(window[begin + cls._WORD : end])
                    first = safe = end
                elif end <= len(window) - 2 and not window[end - 1].isspace():
                    safe = end
            if whole:
                yield window[first:]
                return
            if safe > first:
                yield window[first:safe]
            elif not first:  # white space at most, and then a word that continues after the window
                begin = words[-1][0]
                safe = begin + (len(window) - begin) // cls._WORD * cls._WORD
                yield window[: begin + cls._WORD]
                yield from cls._cut(window[begin + cls._WORD : safe])
            start += safe

    @classmethod
    def _cut(cls, word: str) -> Iterator[str]:
        """The rest of a long word, in pieces of `_WORD` and a last one."""
        return (word[start : start + cls._WORD] for start in range(0, len(word), cls._WORD))

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate([np.array(self._model.encode(piece).ids, self._dtype) for piece in self._pieces(text)])

    def decode(self, ids: np.ndarray) -> str:
        parts, part = [], []
        for i in (*map(int, ids), self.end):
            if i == self.end:
                parts.append(self._model.decode(part))
                part = []
            else:
                part.append(i)
        return END.join(parts)

    def dump(self) -> str:
        return self._model.to_str()


class SentencePiece:
    """A SentencePiece model, such as Llama's tokenizer.model; it comes trained.

    Its own `</s>` ends each document, and no `<s>` begins one. A text that spells either is plain text. `decode` gives
    text back as the model normalizes it: Llama's leaves it alone; others may drop white space, or know no bytes and
    have U+2047 for a letter that they never saw.
    """

    unit = "token"

    def __init__(self, model: bytes, origin: str):
        """Takes the bytes of a model's file, and what errors call it.

        Raises:
          UserError: no such model, one without an end of a document, or the package is missing.
        """
        try:
            import sentencepiece  # an extra of its own; the other tokenizers do without
        except ImportError as error:
            raise UserError(
                "config.data.tokenizer 'sentencepiece' needs a package more: pip install 'wavelet-jax[sentencepiece]'"
            ) from error
        try:
            if not model:  # which the library takes for "no model yet"
                raise ValueError("it is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{origin} is not a SentencePiece model: {' '.join(str(error).split())}") from error
        self._bytes, self.vocab_size, self.end = model, self._model.get_piece_size(), self._model.eos_id()
        if self.end < 0:
            raise UserError(f"{origin} has no end of a document (</s>)")
        self.name = f"sentencepiece {self.vocab_size}"
        self._dtype = id_dtype(self.vocab_size)

    @classmethod
    def of(cls, config) -> "SentencePiece":
        """The model of `config.data.tokenizer_file`. Raises `UserError` for one that cannot be had."""
        if not config.data.tokenizer_file:
            raise UserError(
                "config.data.tokenizer is 'sentencepiece' and config.data.tokenizer_file is empty: name a model's file "
                "there, such as Llama's tokenizer.model"
            )
        path = user_path(config.data.tokenizer_file, "config.data.tokenizer_file", config.data.folder)
        try:
            with open(path, "rb") as file:
                return cls(file.read(), f"config.data.tokenizer_file {path}")
        except OSError as error:
            raise MissingFile(f"cannot read config.data.tokenizer_file: {error}") from error

    @property
    def digest(self) -> str:
        return hashlib.sha256(self._bytes).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text), self._dtype)

    def decode(self, ids: np.ndarray) -> str:
        parts = [[]]
        for i in map(int, ids):
            if i == self.end:
                parts.append([])
            else:
                parts[-1].append(i)
        return self._model.id_to_piece(self.end).join(map(self._model.decode, parts))

    def dump(self) -> str:
        return base64.b64encode(self._bytes).decode()


Tokenizer = Byte | Word | BPE | SentencePiece


def specification(config) -> list:
    """What, beside the text, decides which tokens come out: a JSON value.

    Raises:
      UserError: unknown tokenizer, a `config.data.vocab_size` that it cannot have, or a model that cannot be read.
    """
    name, size = config.data.tokenizer, config.data.vocab_size
    match name:
        case "byte":
            return [name]
        case "word":
            if size < 0 or 0 < size < 2:
                raise UserError(
                    f"config.data.vocab_size is {size}: a word vocabulary needs 2 or more ({UNKNOWN} and {LINE_END} "
                    "are in it), or 0 for all words"
                )
            return [name, size]
        case "bpe":
            if not 257 <= size <= _MAX_BPE:
                raise UserError(
                    f"config.data.vocab_size is {size}: bpe needs a size to train, 257 (all bytes and the end of a "
                    f"document) to {_MAX_BPE:,}, such as 4096"
                )
            return [name, size, tokenizers.__version__, BPE._WORD]  # another version may learn other merges
        case "sentencepiece":
            model = SentencePiece.of(config)
            if size not in (0, model.vocab_size):
                raise UserError(
                    f"config.data.vocab_size is {size}, and config.data.tokenizer_file has {model.vocab_size} pieces: "
                    "set it to that, or to 0"
                )
            return [name, model.digest]
        case _:
            raise unknown("config.data.tokenizer", name, TOKENIZERS)


def train(config, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of `config.data.tokenizer`, made from documents; they are called for where it needs them."""
    match config.data.tokenizer:
        case "word":
            return Word.train(documents(), config.data.vocab_size)
        case "bpe":
            return BPE.train(documents(), config.data.vocab_size)
        case "sentencepiece":
            return SentencePiece.of(config)
        case _:
            return Byte()


def restore(config, dumped: str) -> Tokenizer:
    """The tokenizer of `config.data.tokenizer` from its `dump()`."""
    match config.data.tokenizer:
        case "word":
            return Word(json.loads(dumped))
        case "bpe":
            return BPE(tokenizers.Tokenizer.from_str(dumped))
        case "sentencepiece":
            return SentencePiece(base64.b64decode(dumped), "the kept tokenizer")
        case _:
            return Byte()
