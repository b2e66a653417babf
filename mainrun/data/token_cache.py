"""mainrun.data.token_cache"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mainrun.config import TrainConfig
from mainrun.errors import RunError
from mainrun.files import inputs

if TYPE_CHECKING:
    from mainrun.data.sources import Corpus

from mainrun.data.tokenizer import EOS, FORMAT, LIBRARY, SPECIALS, Tokenizer, _dump, fit

SPLITS = ("train", "dev", "val")
PUBLISH_ATTEMPTS = 10  # each failure means that another process has just changed the entry


# -- token streams and their cache


@dataclass(frozen=True)
class TokenData:
    tokenizer: Tokenizer
    splits: dict[str, np.ndarray]  # train, val, and dev when it is not empty
    chars: dict[str, int]  # of the titles joined and closed by "<eos>"
    bytes: dict[str, int]  # of the titles in UTF-8, one a line
    digest: str  # of the tokenizer and of every stream


def prepare(cfg: TrainConfig, corpus: Corpus) -> TokenData:
    """The tokenizer and the streams of a config, from the cache or fitted now (dev titles never enter the fit)."""
    from mainrun.core.hardware import cache_dir

    entry = cache_dir() / "tokens" / _key(cfg, corpus)
    found = _load(entry)
    if found is None:
        found = _store(entry, _build(cfg, corpus))
    return found


def _key(cfg: TrainConfig, corpus: Corpus) -> str:
    splits = {split: corpus.fingerprints[split] for split in SPLITS}
    library = importlib.metadata.version(LIBRARY[cfg.tokenizer])
    return hashlib.sha256(
        _dump([FORMAT, splits, cfg.tokenizer, cfg.tokenizer_fit, cfg.vocab_size, library])
    ).hexdigest()


def _build(cfg: TrainConfig, corpus: Corpus) -> TokenData:
    tokenizer = fit(
        cfg.tokenizer,
        corpus.train + corpus.val if cfg.tokenizer_fit == "train+val" else corpus.train,
        cfg.vocab_size,
    )
    titles = {split: found for split in SPLITS if (found := getattr(corpus, split))}
    splits = {split: tokenizer.encode(found) for split, found in titles.items()}
    for split, found in titles.items():
        assert np.count_nonzero(splits[split] == EOS) == len(found), "a title holds an <eos> id"
    chars = {split: sum(map(len, found)) + len(SPECIALS[EOS]) * len(found) for split, found in titles.items()}
    size = {split: len("\n".join(found).encode()) + 1 for split, found in titles.items()}
    return TokenData(tokenizer, splits, chars, size, _digest(tokenizer, splits, chars, size))


def _digest(
    tokenizer: Tokenizer, splits: dict[str, np.ndarray], chars: dict[str, int], size: dict[str, int]
) -> str:
    streams = {
        split: [stream.dtype.str, hashlib.sha256(np.ascontiguousarray(stream).data).hexdigest()]
        for split, stream in splits.items()
    }
    return hashlib.sha256(_dump([tokenizer.digest, streams, chars, size])).hexdigest()


def _load(entry: Path, *, warn: bool = True) -> TokenData | None:
    """A cache entry; None when there is none, or when it is not what was written."""
    # Look before reading: after a failed read, an entry that exists may be a good one that another process has just published.
    if not os.path.lexists(entry):
        return None
    try:
        for file in entry.iterdir():
            fault = inputs.not_a_file(file)  # to open a pipe would wait for a writer
            if fault:
                raise ValueError(f"{file.name} {fault}")
        meta = json.loads((entry / "meta.json").read_bytes())
        tokenizer = Tokenizer.from_json((entry / "tokenizer.json").read_text(encoding="utf-8"))
        splits = {
            split: np.load(entry / f"{split}.npy", mmap_mode="r")
            for split in SPLITS
            if split in meta["chars"]
        }
        if any(stream.ndim != 1 for stream in splits.values()):
            raise ValueError("a stream has more than one dimension")
        if meta["digest"] != _digest(tokenizer, splits, meta["chars"], meta["bytes"]):
            raise ValueError("its checksum differs")
        return TokenData(tokenizer, splits, meta["chars"], meta["bytes"], meta["digest"])
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
            warnings.warn(f"cached tokens {entry} are damaged ({e}); they are built again", stacklevel=3)
        return None


def _store(entry: Path, data: TokenData) -> TokenData:
    """Write an entry in one rename. A process that comes second takes the entry of the first, which holds the same."""
    temp: Path | None = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(entry.parent)
        temp = Path(tempfile.mkdtemp(prefix=f"{entry.name[:16]}.", suffix=".tmp", dir=entry.parent))
        fresh = temp / "fresh"
        fresh.mkdir()
        (fresh / "tokenizer.json").write_text(data.tokenizer.to_json(), encoding="utf-8")
        for split, stream in data.splits.items():
            np.save(fresh / f"{split}.npy", stream)
        (fresh / "meta.json").write_bytes(
            _dump({"chars": data.chars, "bytes": data.bytes, "digest": data.digest})
        )
        first = _publish(fresh, entry)
    except OSError as e:
        warnings.warn(f"tokens are not cached in {entry.parent} ({e}); they stay in memory", stacklevel=3)
        return data
    finally:
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)
    return first or _load(entry, warn=False) or data


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders of killed processes. A day is longer than any process takes to write one."""
    for temp in folder.glob("*.tmp"):
        with suppress(OSError):  # another process has finished with it, and removes it too
            if time.time() - temp.stat().st_mtime > 86_400:
                shutil.rmtree(temp)


def _publish(fresh: Path, entry: Path) -> TokenData | None:
    """Move a finished entry into place; return the intact entry of another process instead, if that came first."""
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
        except FileNotFoundError:  # another process has moved it aside, and is about to publish its own
            continue
        # Between the check and the rename, another process may have replaced the damaged entry by an intact one.
        if _load(aside, warn=False) is not None:
            with suppress(OSError):  # a third process has published meanwhile
                aside.rename(entry)
    return None
