"""Titles to token ids and back, the cached token streams, and the batch of each step.

Two tokenizers, both lossless and both the same on every machine: byte-level BPE (`tokenizers`) and unigram (`sentencepiece`;
the unigram trainer of `tokenizers` is not deterministic). Ids 0, 1, 2 are <pad> <eos> <unk>; no title ever encodes to one of them,
so the <eos> ids of a stream are its title boundaries. The few characters that a model cannot spell are written `\\x{HEX}`.

Streams are kept in the cache as memory-mapped arrays with checksums. A damaged entry is built again, with a warning; where the
cache cannot be written (read-only, full disk) the streams stay in memory, with a warning.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from mainrun.core.hardware import cores
from mainrun.errors import ConfigError, CorpusError, RunError, UsageError

if TYPE_CHECKING:
    pass


PAD, EOS, UNK = 0, 1, 2
SPECIALS = ("<pad>", "<eos>", "<unk>")
FORMAT = 2  # of the cache and of tokenizer.json: raise it when either, or the ids themselves, change
LEAST = 300  # the smallest vocab_size of a config: room for special tokens, bytes and something to learn
LIBRARY = {"bpe": "tokenizers", "unigram": "sentencepiece"}
DAMAGED = "restore tokenizer.json, or start the run again with --fresh"

# sentencepiece's own signs: it gives the first back as a space, and leaves a title with the second out of the fit
UNIGRAM_UNSAFE = frozenset("\u2581\u2585")
ESCAPE_ALPHABET = "\\x{}0123456789abcdef"
ESCAPED = re.compile(r"\\x\{([0-9a-f]{1,6})\}")


class Tokenizer:
    """A fitted vocabulary. `model` is what its library loads: JSON text (bpe) or a serialised sentencepiece model (unigram)."""

    PAD, EOS, UNK = PAD, EOS, UNK

    def __init__(self, kind: str, vocab_size: int, model: bytes) -> None:
        self.kind = kind
        self.vocab_size = vocab_size
        self.model = model

    def encode(self, titles: Sequence[str]) -> np.ndarray:
        """One flat stream, an <eos> after each title."""
        texts = _escape(titles, self._unsafe)
        if self.kind == "bpe":
            rows: Iterable[list[int]] = (
                e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)
            )
        else:
            rows = self._library.encode(texts, out_type=int, num_threads=cores())
        return np.fromiter(itertools.chain.from_iterable(_closed(rows)), dtype=self.dtype)

    def titles(self, stream: np.ndarray | Sequence[int]) -> list[str]:
        """The titles of a stream; the last one needs no <eos>."""
        ids = np.asarray(stream, dtype=np.int64)
        rows = [row[row > UNK].tolist() for row in np.split(ids, np.flatnonzero(ids == EOS) + 1)]
        if len(ids) == 0 or ids[-1] == EOS:
            rows.pop()
        if not rows:
            return []
        texts = self._library.decode_batch(rows) if self.kind == "bpe" else self._library.decode(rows)
        return [ESCAPED.sub(_unescape, text) for text in texts]

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """The text of one title (several: one a line)."""
        return "\n".join(self.titles(ids))

    @property
    def dtype(self) -> Any:
        return np.uint16 if self.vocab_size < 2**16 else np.uint32

    def to_json(self) -> str:
        """The whole tokenizer as the text of tokenizer.json."""
        model: Any = json.loads(self.model) if self.kind == "bpe" else base64.b64encode(self.model).decode()
        table = {"format": FORMAT, "kind": self.kind, "vocab_size": self.vocab_size, "model": model}
        return json.dumps(table, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        try:
            table = json.loads(text)
            kind, size, model = table["kind"], table["vocab_size"], table["model"]
            if table["format"] != FORMAT or kind not in LIBRARY or type(size) is not int:
                raise ValueError(f"format {table['format']!r}, kind {kind!r}")
            raw = _dump(model) if kind == "bpe" else base64.b64decode(model, validate=True)
            if not model:
                raise ValueError("no model")
        except (ValueError, TypeError, KeyError) as e:  # binascii.Error is a ValueError
            raise RunError(f"tokenizer.json is damaged or of another version ({e}); {DAMAGED}") from None
        return cls(kind, size, raw)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def _library(self) -> Any:
        """Loaded on first use: a run that finds its streams in the cache may never need it."""
        if self.kind == "bpe":
            return _load_bpe(self.model)
        import sentencepiece

        try:
            loaded = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as e:
            raise RunError(f"tokenizer.json holds no sentencepiece model ({e}); {DAMAGED}") from None
        return loaded

    @cached_property
    def _unsafe(self) -> Callable[[str], bool]:
        """Whether the model cannot spell a character."""
        if self.kind == "unigram":
            return UNIGRAM_UNSAFE.__contains__
        vocab = self._library.get_vocab()
        known = {byte for byte, sign in enumerate(_byte_signs()) if sign in vocab}
        return lambda char: not known.issuperset(char.encode())


def fit(kind: str, titles: Sequence[str], vocab_size: int) -> Tokenizer:
    """A vocabulary of exactly `vocab_size`, special tokens and bytes included."""
    if vocab_size < LEAST:
        raise ConfigError(
            f"vocab_size={vocab_size:,} has no room for 3 special tokens and 256 bytes; --set vocab_size={LEAST} or more"
        )
    return {"bpe": _fit_bpe, "unigram": _fit_unigram}[kind](titles, vocab_size)


def _fit_bpe(titles: Sequence[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    # Each title gets one space in front, so that a first word is the same token as a later one; the decoder takes it off again.
    # (ByteLevel's own add_prefix_space does not, and does it only where there is none: not lossless.)
    library = Library(models.BPE(unk_token=SPECIALS[UNK]))
    library.normalizer = normalizers.Prepend(" ")
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    # Only bytes that occur get a token (as in the public baseline); the others are escaped, so what an escape needs is always there.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=list(ESCAPE_ALPHABET),
        show_progress=False,
    )
    library.train_from_iterator(_escape(titles, lambda char: False), trainer, length=len(titles))
    found = library.get_vocab_size()
    if found != vocab_size:
        raise _vocabulary_error(vocab_size, found)
    return Tokenizer("bpe", found, _dump(json.loads(library.to_str())))


def _fit_unigram(titles: Sequence[str], vocab_size: int) -> Tokenizer:
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
            input_sentence_size=0,  # all of them
            shuffle_input_sentence=False,
            max_sentence_length=2**30,  # a longer title would be left out without a word
            num_threads=16,  # on every machine: how the sums are split decides their last bits, and so the vocabulary
            # the candidates at the start: ten for each that stays give a shorter text than more, and a quicker fit
            seed_sentencepiece_size=max(10_000, 10 * vocab_size),
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = str(e)
        if most := re.search(r"value <= (\d+)", reason):
            raise _vocabulary_error(vocab_size, int(most[1])) from None
        if need := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
            raise ConfigError(
                f"vocab_size={vocab_size:,} is too small for tokenizer=unigram on these titles: special tokens, bytes and characters "
                f"take {int(need[1]):,}; use more, like --set vocab_size={int(need[1]) + 100}, or --set tokenizer=bpe"
            ) from None
        raise CorpusError(
            f"tokenizer=unigram cannot be fitted on these {len(titles):,} titles ({reason}); give more text"
        ) from None
    return Tokenizer("unigram", vocab_size, model.getvalue())


def _vocabulary_error(asked: int, most: int) -> ConfigError:
    fix = f"--set vocab_size={most}, or " if most >= LEAST else f"the least is {LEAST}: "
    got = f"vocab_size={asked:,} is larger than the text allows: these titles give at most {most:,} tokens"
    return ConfigError(f"{got}; {fix}raise num_titles (val_frac and dev_frac take from it)")


def _load_bpe(model: bytes) -> Any:
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(model.decode())
    except Exception as e:  # the library raises nothing narrower
        raise RunError(f"tokenizer.json holds no BPE model ({e}); {DAMAGED}") from None
    library.encode_special_tokens = True  # "<eos>" inside a title is text
    return library


def _byte_signs() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = itertools.count(256)
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def _escape(titles: Sequence[str], unsafe: Callable[[str], bool]) -> list[str]:
    """Unsafe characters as \\x{HEX}; so a literal "\\x{" has its backslash written that way too."""
    text = "".join(titles)
    chars = set(text)
    if lone := next((char for char in chars if "\ud800" <= char <= "\udfff"), ""):
        title = next(title for title in titles if lone in title)
        raise UsageError(
            f"title {title!r} is not Unicode text: it holds half of a surrogate pair; write it in UTF-8"
        )
    table = {ord(char): f"\\x{{{ord(char):x}}}" for char in chars if unsafe(char)}
    if not table and "\\x{" not in text:
        return list(titles)
    return [title.replace("\\x{", "\\x{5c}x{").translate(table) for title in titles]


def _unescape(match: re.Match[str]) -> str:
    code = int(match[1], 16)
    return (
        chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else match[0]
    )  # a sampled title may hold anything


def _closed(rows: Iterable[list[int]]) -> Iterator[list[int]]:
    for row in rows:
        row.append(EOS)
        yield row


def _dump(table: Any) -> bytes:
    return json.dumps(table, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
