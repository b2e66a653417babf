"""The corpus of a run: titles in order, split into train, dev and val, with fingerprints that identify them.

Order: a permutation of all titles by the task's seed or, with shuffle=false, the order of the source. The
run uses the first num_titles. Split: val is the last val_frac of them, dev the last dev_frac of the rest,
and train the remainder.
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
    """The titles of a run."""

    name: str
    train: list[str]
    dev: list[str]
    val: list[str]
    fingerprints: dict[str, str]  # corpus, train, dev, val: sha256 of the ordered titles
    origin: dict[str, Any]  # JSON: where the titles come from and what was skipped


def load_corpus(cfg: TrainConfig) -> Corpus:
    """Load and split the titles of a config."""
    order = partial(_order, shuffle=cfg.shuffle)
    if cfg.corpus.startswith("mix:"):
        mix = load_mix(inputs.expanded(cfg.corpus[4:], "corpus"), cfg.num_titles, order)
        titles = mix.titles
        weights = mix.weights
        origin = mix.origin
    else:
        source = open_source(cfg.corpus, cfg.num_titles)
        _check_count(cfg, source.count)
        titles = source.take(order(source.count)[: cfg.num_titles])
        weights = [1] * len(titles)
        origin = source.origin
    n_train, n_known = _split_points(cfg, len(titles))
    distinct = titles[:n_train]
    dev = titles[n_train:n_known]
    val = titles[n_known:]
    train = _repeated(distinct, weights[:n_train])
    # Real data contains reposts, and the task leaves them in val. The origin says how many there are.
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
    problem = f"corpus={cfg.corpus} has {count:,} title{plural}, num_titles={cfg.num_titles:,} were asked for"
    if count < 2:
        raise CorpusError(f"{problem}; a corpus needs at least two: one to train on, one for val")
    raise CorpusError(f"{problem}; use --set num_titles={count}, or a larger corpus")


def _order(count: int, shuffle: bool) -> np.ndarray:
    """Return the order in which a run uses the titles of a source."""
    if shuffle:
        return np.random.default_rng(int(TASK["seed"])).permutation(count)
    return np.arange(count)


def _split_points(cfg: TrainConfig, count: int) -> tuple[int, int]:
    """Return the end of train and the end of dev."""
    # Fractions are exact: 0.9 of 20,000 is 18,000, whatever the floats give.
    n_known = int(count * (1 - Fraction(str(cfg.val_frac))))
    n_train = int(n_known * (1 - Fraction(str(cfg.dev_frac))))
    if n_train < 1:
        raise CorpusError(
            f"num_titles={cfg.num_titles} with val_frac={cfg.val_frac} and dev_frac={cfg.dev_frac} "
            "leaves no title to train on; raise num_titles, or lower val_frac or dev_frac"
        )
    return n_train, n_known


def _repeated(titles: list[str], weights: list[int]) -> list[str]:
    """Repeat each title as often as its weight says. Repeats are one pass over all titles apart."""
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
    """Return the sha256 of the titles, each after its length, so that no two lists have the same bytes."""
    digest = hashlib.sha256()
    for title in titles:
        data = title.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
