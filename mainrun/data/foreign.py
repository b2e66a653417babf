"""Read the tokenizers of Hugging Face checkpoints: `tokenizer=hf:DIR`.

The file tokenizer.json is used as it is, except that nothing in it may change a text. An NFC normaliser is
dropped, and any other normaliser is refused. Only byte-level BPE with a token for each byte is accepted.

A run uses the ids 0, 1 and 2 for <pad>, <eos> and <unk>, and a checkpoint uses other ids. `permutation`
converts the ids of one side to the ids of the other side.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mainrun.errors import ConfigError
from mainrun.files import inputs

if TYPE_CHECKING:
    import numpy as np

PREFIX = "hf:"
FILE = "tokenizer.json"
ENDOFTEXT = "<|endoftext|>"
COPY_AGAIN = "copy the file from the checkpoint again"
KEEPS_TEXT = ("ByteLevel", "Digits", "Punctuation", "Split")  # pre-tokenizers that can keep the whole text
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
Ids = tuple[int, int, int]


class BadTokenizer(ValueError):
    """Raised if a tokenizer cannot be used. The message is a phrase that follows the name of the file."""


class Checkpoint(NamedTuple):
    """The tokenizer of a checkpoint's folder."""

    content: bytes  # the content of tokenizer.json
    ids: Ids  # the ids of pad, eos and unk in the file
    rows: int  # the number of rows of the embedding


# -- what import and export use


def special_ids(folder: Path) -> Ids:
    """Return the ids of pad, eos and unk in the tokenizer.json of a folder.

    Pad and unk are ids without a token, where the vocabulary has such ids.
    """
    return read_checkpoint(folder).ids


def permutation(ids: Ids, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays: one maps the ids of a run to the ids of the file, the other maps them back.

    The id 0 is exchanged with the file's pad, then 1 with its eos, and then 2 with its unk.
    """
    import numpy as np

    if len(set(ids)) != 3 or min(ids) < 0 or max(ids) >= size:
        raise ValueError(f"got the ids {ids}; pad, eos and unk need three different ids below {size:,}")
    to_file = np.arange(size)
    for ours, theirs in enumerate(ids):
        place = int(np.flatnonzero(to_file == theirs)[0])
        to_file[[ours, place]] = to_file[[place, ours]]
    return to_file, np.argsort(to_file)


def folder_of(tokenizer: str) -> Path:
    """Return the folder that a value of the config field `tokenizer` names."""
    folder = tokenizer.removeprefix(PREFIX)
    if not folder:
        raise ConfigError(f"tokenizer={tokenizer} names no folder; set tokenizer=hf:DIR")
    return inputs.expanded(folder, "tokenizer")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the tokenizer in a folder. Raise ConfigError if mainrun cannot use the tokenizer."""
    path = folder / FILE
    content = _read(path)
    rows = _rows(folder / "config.json")
    own_eos = _own_eos(folder)
    try:
        vocabulary = Vocabulary(content)
        rows = max(rows, vocabulary.size)
        ids = vocabulary.special_ids(own_eos, rows)
    except BadTokenizer as e:
        raise ConfigError(f"{path} {e}") from None
    return Checkpoint(content, ids, rows)


# -- the vocabulary


class Codec:
    """Convert texts to the ids of a run and back. Raise BadTokenizer if the tokenizer cannot be used.

    The library `tokenizers` encodes the texts. The codec itself decodes them, by joining the bytes of the
    tokens, because the decoder in a tokenizer.json may change blanks.
    """

    def __init__(self, content: bytes, ids: Ids, rows: int) -> None:
        vocabulary = Vocabulary(content)
        self._library = vocabulary.library(ids)
        to_file, self._from_file = permutation(ids, rows)
        table = vocabulary.token_bytes(rows)
        self._bytes = [table[number] for number in to_file]

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False):
            yield self._from_file[encoding.ids].tolist()

    def decode(self, texts: Iterable[list[int]]) -> list[str]:
        """Return the texts. A sampled text may contain invalid UTF-8, which is decoded to U+FFFD."""
        decoded = []
        for ids in texts:
            data = b"".join([self._bytes[number] for number in ids])
            decoded.append(data.decode(errors="replace"))
        return decoded


class Vocabulary:
    """The content of a tokenizer.json. The methods raise BadTokenizer if the tokenizer cannot be used."""

    def __init__(self, content: bytes) -> None:
        self.table = _parsed(content)
        self.model = self.table["model"]
        self.tokens: dict[str, int] = self.model["vocab"]
        self.added: list[dict[str, Any]] = self.table.get("added_tokens") or []
        self._check_normalizer()
        self._check_pre_tokenizer()
        self._check_model()
        self._check_added()
        self.ids = {token["content"]: token["id"] for token in self.added} | self.tokens
        self.size = max(self.ids.values()) + 1  # the smallest number of rows

    def special_ids(self, own_eos: str, rows: int) -> Ids:
        """Choose the ids of pad, eos and unk.

        own_eos: the text of the tokenizer's own eos, for a vocabulary without <|endoftext|>.
        """
        text = ENDOFTEXT
        if ENDOFTEXT not in self.ids:
            text = own_eos
        if text not in self.ids:
            raise BadTokenizer(
                f"has no token {ENDOFTEXT}, and its folder names no other token as eos_token; "
                "set eos_token in tokenizer_config.json to the token that ends a text"
            )
        if text in self._mergeable:
            raise BadTokenizer(
                f"can encode a part of a text as its eos token {text!r}; use another tokenizer"
            )
        eos = self.ids[text]
        used = set(self.ids.values())
        spare = [number for number in range(rows) if number not in used]
        specials = []
        for token in self.added:
            if token.get("special") and token["id"] != eos and token["content"] not in self._mergeable:
                specials.append(token["id"])
        spare += sorted(specials, reverse=True)
        if len(spare) < 2:
            raise BadTokenizer(
                "has no ids to spare for <pad> and <unk>: both need an id without a token, or a special "
                f"token other than {text}; use a checkpoint whose config.json has a larger vocab_size"
            )
        return spare[0], eos, spare[1]

    @cached_property
    def _mergeable(self) -> set[str]:
        """The tokens that an ordinary text can be encoded with."""
        if self.model.get("ignore_merges"):
            return set(self.tokens)
        mergeable = set(byte_signs())
        for merge in self.model["merges"]:
            mergeable.add(merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge))
        return mergeable

    def library(self, ids: Ids) -> Any:
        """Return the tokenizer as an object of the library `tokenizers` that leaves texts unchanged."""
        from tokenizers import Tokenizer as Library

        added = []
        for token in self.added:
            # a special token inside a text is encoded as text
            special = bool(token.get("special")) or token["id"] in ids
            added.append(token | {"special": special})
        table = self.table | {"added_tokens": added}
        # the last three would cut texts or add tokens
        table |= {"normalizer": None, "truncation": None, "padding": None, "post_processor": None}
        try:
            library = Library.from_str(json.dumps(table))
        except Exception as e:  # the library `tokenizers` raises plain Exception objects
            raise BadTokenizer(f"cannot be read by the library `tokenizers` ({e}); {COPY_AGAIN}") from None
        for token in added:
            number = library.token_to_id(token["content"])
            if number != token["id"]:
                raise BadTokenizer(
                    f"gives the token {token['content']!r} the id {token['id']}, but the library "
                    f"`tokenizers` reads the id {number}; number the added tokens without gaps"
                )
        library.encode_special_tokens = True
        return library

    def token_bytes(self, rows: int) -> list[bytes]:
        """Return the bytes of each id. An id without a token has none."""
        values = {sign: byte for byte, sign in enumerate(byte_signs())}
        table = [b""] * rows
        for token in self.added:
            table[token["id"]] = token["content"].encode()
        for text, number in self.tokens.items():
            if values.keys() >= set(text):
                table[number] = bytes(values[sign] for sign in text)
            else:
                table[number] = text.encode()
        return table

    # -- checks

    def _check_normalizer(self) -> None:
        for part in _parts(self.table.get("normalizer"), "normalizers"):
            kind = part.get("type")
            if kind != "NFC":
                raise BadTokenizer(
                    f"has the normaliser {inputs.shown(kind)}, which changes texts; "
                    "use a tokenizer without a normaliser, or with NFC"
                )

    def _check_pre_tokenizer(self) -> None:
        parts = _parts(self.table.get("pre_tokenizer"), "pretokenizers")
        kinds = [part.get("type") for part in parts]
        if kinds.count("ByteLevel") != 1:
            raise BadTokenizer("is not byte-level: it needs one pre-tokenizer ByteLevel; use byte-level BPE")
        for kind, part in zip(kinds, parts, strict=True):
            if kind not in KEEPS_TEXT or part.get("behavior") == "Removed":
                raise BadTokenizer(
                    f"has the pre-tokenizer {inputs.shown(kind)}, which may drop a part of a text; "
                    f"allowed: {', '.join(KEEPS_TEXT)}, without the behavior Removed"
                )
            if kind == "ByteLevel" and part.get("add_prefix_space", True):
                raise BadTokenizer(
                    "adds a space before each text, so a text would not be restored; "
                    "set add_prefix_space to false"
                )

    def _check_model(self) -> None:
        for name in AFFIXES:
            if self.model.get(name):
                raise BadTokenizer(f"has {name}={self.model[name]!r}; use byte-level BPE without it")
        if self.model.get("dropout"):
            raise BadTokenizer(f"has dropout={self.model['dropout']}, so its ids are random; set it to null")
        missing = [byte for byte, sign in enumerate(byte_signs()) if sign not in self.tokens]
        if missing:
            raise BadTokenizer(
                f"has no token for {len(missing)} of the 256 bytes, such as 0x{missing[0]:02x}; "
                "use byte-level BPE with all bytes"
            )

    def _check_added(self) -> None:
        for token in self.added:
            text = token["content"]
            if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
                raise BadTokenizer(
                    f"has the token {text!r}, which removes the blanks beside it; "
                    "set lstrip and rstrip to false"
                )
            if self.tokens.get(text, token["id"]) != token["id"]:
                raise BadTokenizer(f"gives the token {text!r} two ids; {COPY_AGAIN}")


def byte_signs() -> list[str]:
    """Return the printable characters that represent the 256 byte values in a byte-level vocabulary."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = itertools.count(256)
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def _parsed(content: bytes) -> dict[str, Any]:
    """Return the JSON object in a tokenizer.json, after a check of the types that `Vocabulary` relies on."""
    try:
        table = json.loads(content.decode())
    except (ValueError, RecursionError) as e:
        raise BadTokenizer(f"is not valid JSON ({inputs.parser_message(e)}); {COPY_AGAIN}") from None
    if not isinstance(table, dict) or not isinstance(table.get("model"), dict):
        raise BadTokenizer(f"contains no tokenizer; {COPY_AGAIN}")
    model = table["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise BadTokenizer(f"is a tokenizer of type {inputs.shown(kind)}; use byte-level BPE")
    vocabulary = model.get("vocab")
    merges = model.get("merges")
    added = table.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise BadTokenizer(f"has no vocab or no merges; {COPY_AGAIN}")
    if not all(isinstance(merge, str) or _is_pair(merge) for merge in merges):
        raise BadTokenizer(f"has a merge that is not a pair of tokens; {COPY_AGAIN}")
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise BadTokenizer(f"has an added token without a text; {COPY_AGAIN}")
    numbers = [*vocabulary.values(), *(token.get("id") for token in added)]
    if not numbers or not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise BadTokenizer(f"has a token whose id is not a whole number; {COPY_AGAIN}")
    return table


def _is_pair(merge: Any) -> bool:
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)


def _parts(value: Any, key: str) -> list[dict[str, Any]]:
    """Return the parts of a normaliser or a pre-tokenizer, which may be a sequence of parts."""
    if value is None:
        return []
    if not isinstance(value, dict):
        raise BadTokenizer(f"has {inputs.shown(value, 80)} where an object is required; {COPY_AGAIN}")
    if value.get("type") != "Sequence":
        return [value]
    parts = []
    for part in value.get(key) or []:
        parts += _parts(part, key)
    return parts


# -- files of the folder


def _rows(path: Path) -> int:
    """Return the number of rows of the embedding that config.json states, or 0."""
    rows = _optional_json(path).get("vocab_size", 0)
    if type(rows) is not int or not 0 <= rows < 2**31:
        raise ConfigError(f"{path}: vocab_size must be a whole number, got {inputs.shown(rows)}")
    return rows


def _own_eos(folder: Path) -> str:
    """Return the text of the token that the folder calls eos_token, or an empty string."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        eos = _optional_json(folder / name).get("eos_token")
        if isinstance(eos, dict):
            eos = eos.get("content")
        if isinstance(eos, str) and eos:
            return eos
    return ""


def _optional_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty object if the file does not exist."""
    if not path.exists():
        return {}
    try:
        table = json.loads(_read(path))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid JSON ({inputs.parser_message(e)}); {COPY_AGAIN}") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path} contains no JSON object; {COPY_AGAIN}")
    return table


def _read(path: Path) -> bytes:
    why = inputs.not_a_file(path)
    if why:
        reason = why.partition(";")[0]  # without its advice
        raise ConfigError(
            f"tokenizer file {path} {reason}; set tokenizer=hf:DIR to a folder that contains a {FILE}"
        )
    try:
        content = path.read_bytes()
    except OSError as e:
        raise inputs.refusal(e) from None
    if not content:
        raise ConfigError(f"{path} is empty; {COPY_AGAIN}")
    return content
