"""Fit tokenizers, and convert titles to token ids and back.

There are two kinds of tokenizers that mainrun fits: byte-level BPE and unigram. Byte-level BPE uses the
library `tokenizers`. Unigram uses the library `sentencepiece`, because the unigram trainer in `tokenizers` is
not deterministic. The third kind, `hf`, is the tokenizer of a checkpoint; see foreign.py. All kinds are
lossless and give the same ids on every machine.

The ids 0, 1 and 2 belong to the special tokens <pad>, <eos> and <unk>. The text of a title is never encoded
as a special token, so each <eos> in a token stream marks the end of a title. A character that the model of a
fitted tokenizer cannot represent is written as `\\x{HEX}`. With `case=marked`, a fitted tokenizer writes the
capitals of words as signs; see capitals.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mainrun.core.hardware import cores
from mainrun.data import capitals, foreign
from mainrun.errors import ConfigError, CorpusError, RunError, UsageError
from mainrun.files.hashing import compact_json

PAD, EOS, UNK = 0, 1, 2
SPECIALS = ("<pad>", "<eos>", "<unk>")
FORMAT = 2  # increase this version when the ids, tokenizer.json or the cache format change
MIN_VOCAB_SIZE = 300  # enough tokens for the special tokens, all bytes and some learned tokens
FOREIGN_FORMAT = 3  # likewise for tokenizers of checkpoints
MARKED_FORMAT = 4  # likewise for tokenizers with case=marked
LIBRARY = {"bpe": "tokenizers", "unigram": "sentencepiece", "hf": "tokenizers"}
DAMAGED = "restore tokenizer.json, or start the run again with --fresh"

# Characters with a special meaning in sentencepiece. The decoder of sentencepiece turns U+2581 into a space.
# The trainer of sentencepiece skips titles that contain U+2585.
UNIGRAM_UNSAFE = frozenset("\u2581\u2585")
ESCAPE_ALPHABET = "\\x{}0123456789abcdef"
ESCAPED = re.compile(r"\\x\{([0-9a-f]{1,6})\}")


class VocabularyError(ConfigError):
    """The titles allow only a smaller vocabulary. `largest` is the size of the largest one."""

    def __init__(self, message: str, largest: int) -> None:
        super().__init__(message)
        self.largest = largest


class Tokenizer:
    """A fitted tokenizer, or the tokenizer of a checkpoint.

    `model` contains the model in the format of the tokenizer's library. A bpe model is JSON text. A unigram
    model is a serialized sentencepiece model. An hf model is the content of the checkpoint's tokenizer.json.

    `special_ids` are the ids of <pad>, <eos> and <unk> in `model`. In a fitted tokenizer, these are 0, 1 and
    2. `vocab_size` is the number of ids, which may exceed the number of tokens of a checkpoint's tokenizer.
    `case` is the config field: kept or marked.
    """

    PAD, EOS, UNK = PAD, EOS, UNK

    def __init__(
        self,
        kind: str,
        vocab_size: int,
        model: bytes,
        special_ids: foreign.Ids = (PAD, EOS, UNK),
        case: str = "kept",
    ) -> None:
        self.kind = kind
        self.vocab_size = vocab_size
        self.model = model
        self.special_ids = special_ids
        self.case = case

    def encode(self, titles: Sequence[str]) -> np.ndarray:
        """Return the token ids of all titles as one flat array, with an <eos> after each title."""
        ids: Iterable[list[int]]
        if self.kind == "hf":
            _check_unicode(set("".join(titles)), titles)
            ids = self._library.encode(titles)
        elif self.kind == "bpe":
            texts = _escape(self.marked(titles), self._is_unsafe)
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
            ids = (encoding.ids for encoding in encodings)
        else:
            texts = _escape(self.marked(titles), self._is_unsafe)
            ids = self._library.encode(texts, out_type=int, num_threads=cores())
        return np.fromiter(itertools.chain.from_iterable(_with_eos(ids)), dtype=self.dtype)

    def marked(self, titles: Sequence[str]) -> Sequence[str]:
        """Return the titles as the model sees them. Only case=marked changes them, by signs for capitals."""
        return _mark(titles) if self.case == "marked" else titles

    def titles(self, stream: np.ndarray | Sequence[int]) -> list[str]:
        """Return the titles in a token stream. The stream may end without an <eos> after the last title."""
        ids = np.asarray(stream, dtype=np.int64)
        parts = np.split(ids, np.flatnonzero(ids == EOS) + 1)
        if len(ids) == 0 or ids[-1] == EOS:
            parts.pop()
        if not parts:
            return []
        text_ids = [part[part > UNK].tolist() for part in parts]
        if self.kind == "hf":
            return self._library.decode(text_ids)
        if self.kind == "bpe":
            texts = self._library.decode_batch(text_ids)
        else:
            texts = self._library.decode(text_ids)
        texts = [ESCAPED.sub(_unescape, text) for text in texts]
        if self.case == "marked":
            # Titles are escaped twice: before the capitals are marked, and before the library gets them.
            return [ESCAPED.sub(_unescape, capitals.restore(text)) for text in texts]
        return texts

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Return the text of a token stream, with one title per line."""
        return "\n".join(self.titles(ids))

    @property
    def dtype(self) -> Any:
        return np.uint16 if self.vocab_size < 2**16 else np.uint32

    def to_json(self) -> str:
        """Return the tokenizer as the JSON text that is saved in tokenizer.json."""
        table: dict[str, Any] = {"format": FORMAT, "kind": self.kind, "vocab_size": self.vocab_size}
        if self.kind == "bpe":
            table["model"] = json.loads(self.model)
        elif self.kind == "unigram":
            table["model"] = base64.b64encode(self.model).decode()
        else:
            table["format"] = FOREIGN_FORMAT
            table["special_ids"] = self.special_ids
            table["model"] = self.model.decode()  # a string, which keeps the exact content of the file
        if self.case != "kept":
            table |= {"format": MARKED_FORMAT, "case": self.case}
        return compact_json(table).decode()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Create a tokenizer from the folder of a checkpoint. Raise ConfigError if it cannot be used."""
        checkpoint = foreign.read_checkpoint(folder)
        return cls("hf", checkpoint.rows, checkpoint.content, checkpoint.ids)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Create a tokenizer from the text of a tokenizer.json file of a run."""
        try:
            table = json.loads(text)
            kind = table["kind"]
            size = table["vocab_size"]
            model = table["model"]
            case = table.get("case", "kept")
            expected = _format_of(kind, case)
            if table["format"] != expected or kind not in LIBRARY or type(size) is not int:
                raise ValueError(f"format {table['format']!r}, kind {kind!r}")
            if not model:
                raise ValueError("no model")
            if kind == "hf":
                return cls(kind, size, model.encode(), _special_ids(table["special_ids"], size))
            raw = compact_json(model) if kind == "bpe" else base64.b64decode(model, validate=True)
        except (ValueError, TypeError, KeyError, AttributeError) as e:  # binascii.Error is a ValueError
            raise RunError(f"tokenizer.json is damaged or has another version ({e}); {DAMAGED}") from None
        return cls(kind, size, raw, case=case)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def _library(self) -> Any:
        """The library's tokenizer object, which is loaded on first use."""
        if self.kind == "hf":
            return _load_foreign(self.model, self.special_ids, self.vocab_size)
        return _load_bpe(self.model) if self.kind == "bpe" else _load_unigram(self.model)

    @cached_property
    def _is_unsafe(self) -> Callable[[str], bool]:
        """A function that returns True if the model cannot represent a given character."""
        if self.kind == "unigram":
            return UNIGRAM_UNSAFE.__contains__
        vocab = self._library.get_vocab()
        known = {byte for byte, sign in enumerate(foreign.byte_signs()) if sign in vocab}
        return lambda char: not known.issuperset(char.encode())


# -- fitting and loading


def fit(kind: str, titles: Sequence[str], vocab_size: int, case: str = "kept") -> Tokenizer:
    """Fit a tokenizer that has exactly `vocab_size` tokens, including the special tokens and the bytes."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={vocab_size:,} is too small for 3 special tokens and 256 bytes; "
            f"use --set vocab_size={MIN_VOCAB_SIZE} or more"
        )
    if case == "marked":
        titles = _mark(titles)
    model = _fit_bpe(titles, vocab_size) if kind == "bpe" else _fit_unigram(titles, vocab_size)
    return Tokenizer(kind, vocab_size, model, case=case)


def _fit_bpe(titles: Sequence[str], vocab_size: int) -> bytes:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    # Each title gets a leading space, so that a word is encoded as the same token at the start and in the
    # middle of a title. The decoder removes the leading space. The option add_prefix_space of ByteLevel is
    # not suitable, because it adds no space to a title that already starts with a space, and the decoder does
    # not remove the added space.
    library = Library(models.BPE(unk_token=SPECIALS[UNK]))
    library.normalizer = normalizers.Prepend(" ")
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    # As in the public baseline, only bytes that occur in the titles get a token. All other bytes are written
    # as escapes, so the alphabet always includes the characters of an escape.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=list(ESCAPE_ALPHABET),
        show_progress=False,
    )
    library.train_from_iterator(_escape(titles, lambda char: False), trainer, length=len(titles))
    fitted_size = library.get_vocab_size()
    if fitted_size != vocab_size:
        raise _vocabulary_error(vocab_size, fitted_size)
    return compact_json(json.loads(library.to_str()))


def _fit_unigram(titles: Sequence[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_escape(titles, UNIGRAM_UNSAFE.__contains__)),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            pad_piece=SPECIALS[PAD],
            eos_piece=SPECIALS[EOS],
            unk_piece=SPECIALS[UNK],
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            input_sentence_size=0,  # fit on all titles
            shuffle_input_sentence=False,
            max_sentence_length=2**30,  # sentencepiece silently skips titles that are longer
            # The number of threads must be the same on every machine. A different number of threads would
            # round sums differently and could select different tokens.
            num_threads=16,
            # More than ten seed candidates per token would make fitting slower and encoded titles longer.
            seed_sentencepiece_size=max(10_000, 10 * vocab_size),
            minloglevel=2,
        )
    except RuntimeError as e:
        raise _unigram_error(str(e), len(titles), vocab_size) from None
    return model.getvalue()


def _unigram_error(reason: str, n_titles: int, vocab_size: int) -> Exception:
    """Convert an error message of sentencepiece's trainer to an error that says how to fix the problem."""
    too_large = re.search(r"value <= (\d+)", reason)
    if too_large:
        return _vocabulary_error(vocab_size, int(too_large[1]))
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason)
    if too_small:
        required = int(too_small[1])
        return ConfigError(
            f"vocab_size={vocab_size:,} is too small for tokenizer=unigram on these titles: special tokens, "
            f"bytes and characters take {required:,}; use --set vocab_size={required + 100}, for example, "
            "or --set tokenizer=bpe"
        )
    return CorpusError(
        f"tokenizer=unigram cannot be fitted on these {n_titles:,} titles ({reason}); use more titles"
    )


def _vocabulary_error(wanted: int, largest: int) -> VocabularyError:
    problem = (
        f"vocab_size={wanted:,} is larger than the text allows: these titles give at most {largest:,} tokens"
    )
    if largest >= MIN_VOCAB_SIZE:
        fix = f"use --set vocab_size={largest}, or "
    else:
        fix = f"the minimum is {MIN_VOCAB_SIZE}, so "
    return VocabularyError(f"{problem}; {fix}raise num_titles, or lower val_frac or dev_frac", largest)


def _load_bpe(model: bytes) -> Any:
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(model.decode())
    except Exception as e:  # the library `tokenizers` raises plain Exception objects
        raise RunError(f"tokenizer.json contains no BPE model ({e}); {DAMAGED}") from None
    library.encode_special_tokens = True  # encode "<eos>" inside a title as plain text
    return library


def _load_unigram(model: bytes) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
        raise RunError(f"tokenizer.json contains no sentencepiece model ({e}); {DAMAGED}") from None


def _load_foreign(model: bytes, special_ids: foreign.Ids, size: int) -> foreign.Codec:
    try:
        return foreign.Codec(model, special_ids, size)
    except foreign.BadTokenizer as e:
        raise UsageError(f"the checkpoint's tokenizer.json {e}") from None


def _format_of(kind: str, case: str) -> int:
    """Return the version of tokenizer.json. Raise ValueError if no version has this kind and case."""
    formats = {"kept": FORMAT, "marked": MARKED_FORMAT}
    if kind == "hf":
        formats = {"kept": FOREIGN_FORMAT}
    if case not in formats:
        raise ValueError(f"kind {kind!r}, case {case!r}")
    return formats[case]


def _special_ids(value: Any, size: int) -> foreign.Ids:
    """Return the special ids in the tokenizer.json of a run. Raise ValueError if they are invalid."""
    pad, eos, unk = value
    if not all(type(number) is int for number in value):
        raise ValueError(f"special_ids {value!r}")
    foreign.permutation((pad, eos, unk), size)  # raises ValueError if the ids do not fit
    return pad, eos, unk


# -- capitals, escapes and streams


def _mark(titles: Sequence[str]) -> list[str]:
    """Write capitals as signs. A sign in a title is replaced with an escape."""
    return [capitals.mark(title) for title in _escape(titles, capitals.SIGNS.__contains__)]


def _escape(titles: Sequence[str], is_unsafe: Callable[[str], bool]) -> list[str]:
    """Replace unsafe characters with escapes of the form \\x{HEX}.

    If a title contains the characters "\\x{", the backslash is also replaced with an escape.
    """
    text = "".join(titles)
    chars = set(text)
    _check_unicode(chars, titles)
    escapes = {ord(char): f"\\x{{{ord(char):x}}}" for char in chars if is_unsafe(char)}
    if not escapes and "\\x{" not in text:
        return list(titles)
    return [title.replace("\\x{", "\\x{5c}x{").translate(escapes) for title in titles]


def _check_unicode(chars: Iterable[str], titles: Sequence[str]) -> None:
    """Raise UsageError if one of the characters in the titles is half of a surrogate pair."""
    for char in chars:
        if "\ud800" <= char <= "\udfff":
            title = next(title for title in titles if char in title)
            raise UsageError(
                f"title {title!r} is not Unicode: it contains half of a surrogate pair; write it in UTF-8"
            )


def _unescape(match: re.Match[str]) -> str:
    """Return the character that an escape represents, or the escape itself if the escape is invalid."""
    code = int(match[1], 16)
    is_character = code < 0x110000 and not 0xD800 <= code < 0xE000
    return chr(code) if is_character else match[0]


def _with_eos(titles: Iterable[list[int]]) -> Iterator[list[int]]:
    """Append the id of <eos> to the token ids of each title."""
    for ids in titles:
        ids.append(EOS)
        yield ids
