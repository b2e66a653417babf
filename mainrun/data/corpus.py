"""The corpus of a run: the titles, split into train, dev and val, and a fingerprint of each split.

The titles of the source are shuffled with the task's seed. If shuffle=false is set, the titles stay in the
order of the source. The run uses the first num_titles titles, and splits these titles in order into train,
dev and val. The split val gets the fraction val_frac of the titles. The split dev gets the fraction dev_frac
of the titles that are not in val. All other titles are in the split train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from mainrun.config import TASK, TrainConfig
from mainrun.data.mix import load_mix
from mainrun.data.sources import open_source
from mainrun.errors import CorpusError
from mainrun.files import inputs


@dataclass(frozen=True)
class Corpus:
    """The titles of a run, with the fingerprint of each split and the origin of the titles."""

    name: str
    train: list[str]
    dev: list[str]
    val: list[str]
    fingerprints: dict[str, str]  # the sha256 of the titles, for the whole corpus and for each split
    origin: dict[str, Any]  # JSON values that describe the source and count skipped and repeated titles


def load_corpus(cfg: TrainConfig) -> Corpus:
    """Load the corpus that a config names, and split the titles into train, dev and val."""
    order = partial(_order, shuffle=cfg.shuffle)
    if cfg.corpus.startswith("mix:"):
        path = inputs.expanded(cfg.corpus[4:], "corpus")
        mix = load_mix(path, cfg.num_titles, order, cfg.documents)
        titles = mix.titles
        weights = mix.weights
        origin = mix.origin
    else:
        source = open_source(cfg.corpus, cfg.num_titles, cfg.documents)
        _check_count(cfg, source.count)
        titles = source.take(order(source.count)[: cfg.num_titles])
        weights = [1] * len(titles)
        origin = source.origin
    n_train, n_known = _split_points(cfg, len(titles))
    distinct = titles[:n_train]
    dev = titles[n_train:n_known]
    val = titles[n_known:]
    train = _repeated(distinct, weights[:n_train])
    # Real data contains reposts. As in the task, titles in val that also occur in train or dev are kept.
    # `origin` contains the number of these titles.
    seen = set(distinct).union(dev)
    counts = {
        "titles": len(titles),
        "train_repeats": len(train) - len(distinct),
        "val_in_train": sum(title in seen for title in val),
    }
    return Corpus(cfg.corpus, train, dev, val, fingerprints(train, dev, val), origin | counts)


def _check_count(cfg: TrainConfig, count: int) -> None:
    if count >= max(cfg.num_titles, 2):
        return
    plural = "s" if count != 1 else ""
    problem = f"corpus={cfg.corpus} has {count:,} title{plural}, but num_titles={cfg.num_titles:,}"
    if count < 2:
        raise CorpusError(f"{problem}; a corpus needs at least two titles: one to train on, one for val")
    raise CorpusError(f"{problem}; use --set num_titles={count}, or a larger corpus")


def _order(count: int, shuffle: bool) -> np.ndarray:
    """Return the order in which a run uses the titles of a source, as an array of positions."""
    if shuffle:
        return np.random.default_rng(int(TASK["seed"])).permutation(count)
    return np.arange(count)


def _split_points(cfg: TrainConfig, count: int) -> tuple[int, int]:
    """Return the position where train ends, and the position where dev ends."""
    # The code uses exact fractions, so 0.9 of 20,000 titles is always 18,000 titles. Float arithmetic could
    # lose a title to rounding.
    n_known = int(count * (1 - Fraction(str(cfg.val_frac))))
    n_train = int(n_known * (1 - Fraction(str(cfg.dev_frac))))
    if n_train < 1:
        raise CorpusError(
            f"num_titles={cfg.num_titles} with val_frac={cfg.val_frac} and dev_frac={cfg.dev_frac} "
            "leaves no title to train on; raise num_titles, or lower val_frac or dev_frac"
        )
    return n_train, n_known


def _repeated(titles: list[str], weights: list[int]) -> list[str]:
    """Return a list that contains each title as many times as its weight says.

    The list consists of several passes over the titles. In each pass, a title occurs at most once.
    """
    repeated = []
    for turn in range(max(weights)):
        for title, weight in zip(titles, weights, strict=True):
            if weight > turn:
                repeated.append(title)
    return repeated


def fingerprints(train: list[str], dev: list[str], val: list[str]) -> dict[str, str]:
    """Return the fingerprint of each split and of the whole corpus."""
    return {
        "corpus": fingerprint([*train, *dev, *val]),
        "train": fingerprint(train),
        "dev": fingerprint(dev),
        "val": fingerprint(val),
    }


def fingerprint(titles: Iterable[str]) -> str:
    """Return the sha256 of a list of titles.

    The length of each title is also hashed, so that the hashed bytes of two different lists always differ.
    """
    digest = hashlib.sha256()
    for title in titles:
        data = title.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
