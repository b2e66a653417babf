"""A cache for the token streams of runs.

A cache entry contains the tokenizer, one memory-mapped array per split, and a checksum. If an entry is
damaged, mainrun rebuilds the entry and prints a warning. If the cache is read-only or the disk is full,
mainrun keeps the token streams in memory and prints a warning.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
import time
import unicodedata
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mainrun.config import TrainConfig
from mainrun.core.hardware import cache_dir
from mainrun.data import foreign
from mainrun.data.corpus import Corpus
from mainrun.data.tokenizer import (
    EOS,
    FOREIGN_FORMAT,
    FORMAT,
    LIBRARY,
    MARKED_FORMAT,
    MIN_VOCAB_SIZE,
    SPECIALS,
    Tokenizer,
    VocabularyError,
    fit,
)
from mainrun.errors import ConfigError, RunError, UsageError
from mainrun.files import inputs
from mainrun.files.hashing import compact_json

SPLITS = ("train", "dev", "val")
PUBLISH_ATTEMPTS = 10  # a write is repeated if another process changes the entry at the same time
FEW_TITLES = 20_000  # a tokenizer is fitted on this number of titles within seconds
ABANDONED = 86_400  # a temporary folder counts as abandoned if it is older than this many seconds


@dataclass(frozen=True)
class TokenData:
    """The tokenizer of a run and the token stream of each split."""

    tokenizer: Tokenizer
    splits: dict[str, np.ndarray]  # the token stream of each split that contains titles
    chars: dict[str, int]  # the number of characters in each split, with "<eos>" after each title
    bytes: dict[str, int]  # the number of UTF-8 bytes in each split, with a newline after each title
    digest: str  # a hash of the tokenizer and all token streams


def prepare(cfg: TrainConfig, corpus: Corpus) -> TokenData:
    """Return the tokenizer and the token streams of a config, from the cache if possible.

    The tokenizer is never fitted on the titles of dev.
    """
    tokenizer = None
    if cfg.tokenizer.startswith(foreign.PREFIX):
        tokenizer = _foreign_tokenizer(cfg)
    entry = cache_dir() / "tokens" / _key(cfg, corpus, tokenizer)
    cached = _load(entry)
    if cached is not None:
        return cached
    try:
        data = _build(cfg, corpus, tokenizer)
    except VocabularyError as e:
        raise ConfigError("\n".join([str(e), *_next_faults(cfg, corpus, e.largest)])) from None
    return _store(entry, data)


def _next_faults(cfg: TrainConfig, corpus: Corpus, vocab_size: int) -> list[str]:
    """Return what the run would be refused for next, with the largest vocabulary that the titles allow."""
    from mainrun.data.lengths import too_short

    if vocab_size < MIN_VOCAB_SIZE or len(corpus.train) > FEW_TITLES:
        return []
    smaller = cfg.model_copy(update={"vocab_size": vocab_size})
    try:
        data = _build(smaller, corpus)
    except UsageError:  # the library did not keep its word about the largest vocabulary
        return []
    return [f"with vocab_size={vocab_size:,}, {fault}" for fault in too_short(smaller, data.splits)]


def _foreign_tokenizer(cfg: TrainConfig) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(foreign.folder_of(cfg.tokenizer))
    if tokenizer.vocab_size != cfg.vocab_size:
        raise ConfigError(
            f"vocab_size={cfg.vocab_size:,} does not fit tokenizer={cfg.tokenizer}, which has "
            f"{tokenizer.vocab_size:,} ids; use --set vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _key(cfg: TrainConfig, corpus: Corpus, tokenizer: Tokenizer | None = None) -> str:
    """Return the name of the cache entry, which is a hash of everything that affects the token streams.

    tokenizer: the tokenizer of a checkpoint. Its content matters, and its folder does not.
    """
    fingerprints = {split: corpus.fingerprints[split] for split in SPLITS}
    parts: list[Any]
    if tokenizer is None:
        library = importlib.metadata.version(LIBRARY[cfg.tokenizer])
        parts = [FORMAT, fingerprints, cfg.tokenizer, cfg.tokenizer_fit, cfg.vocab_size, library]
        if cfg.case != "kept":
            # which letters are capitals depends on Python's version of Unicode
            parts = [*parts, MARKED_FORMAT, cfg.case, unicodedata.unidata_version]
    else:
        library = importlib.metadata.version(LIBRARY[tokenizer.kind])
        parts = [FOREIGN_FORMAT, fingerprints, tokenizer.digest, library]
    return hashlib.sha256(compact_json(parts)).hexdigest()


def _build(cfg: TrainConfig, corpus: Corpus, tokenizer: Tokenizer | None = None) -> TokenData:
    if tokenizer is None:
        fitted_on = corpus.train
        if cfg.tokenizer_fit == "train+val":
            fitted_on = corpus.train + corpus.val
        tokenizer = fit(cfg.tokenizer, fitted_on, cfg.vocab_size, cfg.case)
    splits: dict[str, np.ndarray] = {}
    chars: dict[str, int] = {}
    n_bytes: dict[str, int] = {}
    for split in SPLITS:
        titles: list[str] = getattr(corpus, split)
        if not titles:
            continue
        stream = tokenizer.encode(titles)
        assert np.count_nonzero(stream == EOS) == len(titles), "a title contains the token <eos>"
        splits[split] = stream
        chars[split] = sum(map(len, titles)) + len(SPECIALS[EOS]) * len(titles)
        n_bytes[split] = len("\n".join(titles).encode()) + 1
    return TokenData(tokenizer, splits, chars, n_bytes, _digest(tokenizer, splits, chars, n_bytes))


def _digest(
    tokenizer: Tokenizer, splits: dict[str, np.ndarray], chars: dict[str, int], n_bytes: dict[str, int]
) -> str:
    streams = {}
    for split, stream in splits.items():
        content = np.ascontiguousarray(stream).data
        streams[split] = [stream.dtype.str, hashlib.sha256(content).hexdigest()]
    return hashlib.sha256(compact_json([tokenizer.digest, streams, chars, n_bytes])).hexdigest()


# -- cache entries


def _load(entry: Path, *, warn: bool = True) -> TokenData | None:
    """Return a cache entry, or None if the entry does not exist or is damaged."""
    # Check whether the entry exists before reading the entry. A check after a failed read would be too late,
    # because another process could have published an intact entry in the meantime.
    if not os.path.lexists(entry):
        return None
    try:
        return _read(entry)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        RecursionError,
        RunError,
    ) as e:
        if warn:
            warnings.warn(f"the cached tokens {entry} are damaged ({e}); they are rebuilt", stacklevel=3)
        return None


def _read(entry: Path) -> TokenData:
    """Read a cache entry, and verify the checksum of the entry."""
    for file in entry.iterdir():
        fault = inputs.not_a_file(file)  # opening a named pipe could block forever
        if fault:
            raise ValueError(f"{file.name} {fault}")
    meta = json.loads((entry / "meta.json").read_bytes())
    tokenizer = Tokenizer.from_json((entry / "tokenizer.json").read_text(encoding="utf-8"))
    splits: dict[str, np.ndarray] = {}
    for split in SPLITS:
        if split in meta["chars"]:
            splits[split] = np.load(entry / f"{split}.npy", mmap_mode="r")
    if any(stream.ndim != 1 for stream in splits.values()):
        raise ValueError("a stream has more than one dimension")
    if meta["digest"] != _digest(tokenizer, splits, meta["chars"], meta["bytes"]):
        raise ValueError("its checksum differs")
    return TokenData(tokenizer, splits, meta["chars"], meta["bytes"], meta["digest"])


def _store(entry: Path, data: TokenData) -> TokenData:
    """Write a cache entry atomically, and return the data in the entry.

    If another process has already written the entry, return the data of the existing entry. Both processes
    write identical data.
    """
    temporary: Path | None = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(entry.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f"{entry.name[:16]}.", suffix=".tmp", dir=entry.parent))
        fresh = temporary / "fresh"
        fresh.mkdir()
        (fresh / "tokenizer.json").write_text(data.tokenizer.to_json(), encoding="utf-8")
        for split, stream in data.splits.items():
            np.save(fresh / f"{split}.npy", stream)
        meta = {"chars": data.chars, "bytes": data.bytes, "digest": data.digest}
        (fresh / "meta.json").write_bytes(compact_json(meta))
        first = _publish(fresh, entry)
    except OSError as e:
        warnings.warn(f"tokens are not cached in {entry.parent} ({e}); they stay in memory", stacklevel=3)
        return data
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return first or _load(entry, warn=False) or data


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders that killed processes have left behind."""
    for temporary in folder.glob("*.tmp"):
        with suppress(OSError):  # another process may be removing the same folder
            if time.time() - temporary.stat().st_mtime > ABANDONED:
                shutil.rmtree(temporary)


def _publish(fresh: Path, entry: Path) -> TokenData | None:
    """Move a finished entry to its final path, or return the data of an intact entry that already exists."""
    for attempt in itertools.count():
        try:
            fresh.rename(entry)
            return None
        except OSError:
            if attempt == PUBLISH_ATTEMPTS:
                raise
        first = _load(entry, warn=False)
        if first is not None:
            return first
        aside = fresh.with_name(f"aside-{attempt}")
        try:
            entry.rename(aside)
        except FileNotFoundError:  # another process is replacing the damaged entry
            continue
        # Between the check and the rename, another process may have replaced the damaged entry with an intact
        # entry.
        if _load(aside, warn=False) is not None:
            with suppress(OSError):  # another process may have published an entry in the meantime
                aside.rename(entry)
    return None
