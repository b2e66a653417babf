"""Mix several sources into one corpus: `mix:PATH.toml`.

    [[source]]
    path = "mine.txt"      # a path relative to the TOML file; or set corpus = "hn", for example
    ratio = 3              # the source's share of num_titles, relative to the other ratios (default 1)
    weight = 2             # how many times each title of the source occurs in an epoch (default 1)

The titles of each source are ordered as in a run that uses only this source. The mix takes the first titles
of each source in this order. A title that is already in the mix is skipped, so all titles of a mix are
distinct. The titles of the sources are spread evenly over the mix. Train, dev and val therefore each contain
the sources in the given ratios. Weights affect only train, because each title occurs once in dev and val.

With `by = "characters"` at the top of the file, the ratios apply to characters instead of titles. Every
prefix of the mix then contains the sources in the given ratios, up to the length of one title per source.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mainrun.data.sources import open_source, syntaxes
from mainrun.data.title_files import decode, read_bytes
from mainrun.data.titles import Titles
from mainrun.errors import CorpusError, nearest
from mainrun.files import inputs

MAX_SOURCES = 1000
MAX_WEIGHT = 1000
KEYS = ("path", "corpus", "ratio", "weight")
UNITS = ("texts", "characters")  # what the ratios of a mix can count
BATCH = 10_000  # the number of titles that are read at a time

Order = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class MixSource:
    """One [[source]] table in the TOML file of a mix."""

    where: str  # the TOML file and the number of the table, for error messages
    corpus: str
    ratio: Fraction
    weight: int


Open = Callable[[MixSource], Titles]


@dataclass
class Mix:
    """The ordered titles of a mix, with the weight of each title."""

    titles: list[str]
    weights: list[int]
    origin: dict[str, Any] = field(default_factory=dict)


def load_mix(path: Path, wanted: int, order: Order, documents: bool = False) -> Mix:
    """Load a mix that contains `wanted` titles.

    `order(n)` returns the order in which a run uses the n titles of a source.
    documents: whether the titles keep their line breaks and blanks.
    """
    by, sources = _read(path)

    def open_titles(source: MixSource) -> Titles:
        # A synthetic source generates `wanted` titles, which is sufficient even if another source contains
        # some of the same titles.
        return open_source(source.corpus, wanted, documents)

    if by == "characters":
        return _mix_by_characters(path, sources, wanted, order, open_titles)
    return _mix_by_texts(path, sources, wanted, order, open_titles)


# -- by texts


def _mix_by_texts(
    path: Path, sources: Sequence[MixSource], wanted: int, order: Order, open_titles: Open
) -> Mix:
    """Give each source its share of the titles, and spread the titles of each source evenly."""
    shares = _shares([source.ratio for source in sources], wanted)
    ratio_sum = sum(source.ratio for source in sources)
    placed: list[tuple[Fraction, int, str]] = []
    seen: set[str] = set()
    origins = []
    for i, (source, share) in enumerate(zip(sources, shares, strict=True)):
        if share == 0:
            raise _no_title(source, wanted)
        titles = open_titles(source)
        fresh = list(itertools.islice(_unseen(titles, order(titles.count), wanted, seen), share))
        if len(fresh) < share:
            largest = int(Fraction(len(fresh) * ratio_sum) / source.ratio)
            raise CorpusError(
                f"{source.where} ({source.corpus}): the source has {len(fresh):,} titles that no earlier "
                f"source has, but its ratio requires {share:,}; "
                f"lower the ratio, or use --set num_titles={largest}"
            )
        # Title k of a source with n titles gets the relative position (2k + 1) / 2n in the mix, so that the
        # titles of each source are spread evenly.
        for k, title in enumerate(fresh):
            placed.append((Fraction(2 * k + 1, 2 * share), i, title))
        origins.append(_origin(source, titles, share))
    placed.sort(key=lambda entry: entry[:2])
    return Mix(
        titles=[title for _, _, title in placed],
        weights=[sources[i].weight for _, i, _ in placed],
        origin={"kind": "mix", "path": str(path), "sources": origins},
    )


def _no_title(source: MixSource, wanted: int) -> CorpusError:
    return CorpusError(
        f"{source.where} ({source.corpus}): the source gets no title of num_titles={wanted}, "
        "because its ratio is too small; raise the ratio or num_titles"
    )


def _origin(source: MixSource, titles: Titles, share: int) -> dict[str, Any]:
    return titles.origin | {
        "source": source.corpus,
        "ratio": float(source.ratio),
        "weight": source.weight,
        "titles": share,
    }


def _unseen(titles: Titles, order: np.ndarray, batch: int, seen: set[str]) -> Iterator[str]:
    """Yield the titles of a source that are not in `seen`, and add these titles to `seen`."""
    for start in range(0, titles.count, batch):
        for title in titles.take(order[start : start + batch]):
            if title not in seen:
                seen.add(title)
                yield title


def _shares(ratios: Sequence[Fraction], wanted: int) -> list[int]:
    """Divide `wanted` titles among the sources in proportion to the ratios.

    The shares with the largest fractional parts are rounded up, and all other shares are rounded down.
    """
    total = sum(ratios)
    exact = [ratio * wanted / total for ratio in ratios]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: wanted - sum(shares)]:
        shares[i] += 1
    return shares


# -- by characters


def _mix_by_characters(
    path: Path, sources: Sequence[MixSource], wanted: int, order: Order, open_titles: Open
) -> Mix:
    """Take each title from the source whose number of characters, divided by its ratio, is smallest."""
    opened = [open_titles(source) for source in sources]
    seen: set[str] = set()
    streams = [_unseen(titles, order(titles.count), BATCH, seen) for titles in opened]
    costs = _costs([source.ratio for source in sources])
    chars = [0] * len(sources)
    counts = [0] * len(sources)
    titles: list[str] = []
    weights: list[int] = []
    queue = [(0, i) for i in range(len(sources))]  # of equal sources, the first comes first
    while len(titles) < wanted:
        _, i = queue[0]
        title = next(streams[i], None)
        if title is None:
            raise _runs_out(sources[i], counts[i], len(titles), wanted)
        titles.append(title)
        weights.append(sources[i].weight)
        counts[i] += 1
        chars[i] += len(title)
        heapq.heapreplace(queue, (chars[i] * costs[i], i))
    origins = []
    for i, source in enumerate(sources):
        if counts[i] == 0:
            raise _no_title(source, wanted)
        origins.append(_origin(source, opened[i], counts[i]) | {"characters": chars[i]})
    origin = {"kind": "mix", "path": str(path), "by": "characters", "sources": origins}
    return Mix(titles, weights, origin)


def _costs(ratios: Sequence[Fraction]) -> list[int]:
    """Return whole numbers that are proportional to 1 / ratio."""
    common = math.lcm(*(ratio.numerator for ratio in ratios))
    return [common // ratio.numerator * ratio.denominator for ratio in ratios]


def _runs_out(source: MixSource, count: int, placed: int, wanted: int) -> CorpusError:
    fix = f"lower its ratio, or use --set num_titles={placed}"
    if placed < 2:
        fix = "use a larger source"
    return CorpusError(
        f"{source.where} ({source.corpus}): the source has no more texts after {count:,}, when {placed:,} of "
        f"num_titles={wanted:,} texts were placed; {fix}"
    )


# -- the TOML file


def _read(path: Path) -> tuple[str, list[MixSource]]:
    """Return what the ratios of a mix count, and the sources of the mix."""
    text = decode(read_bytes(path, "a TOML file with [[source]] tables"), path)
    try:
        document = inputs.parse_toml(text)
    except inputs.BadInput as e:
        raise CorpusError(f"{path} is not valid TOML: {e}") from None
    tables = document.get("source")
    by = document.get("by", "texts")
    if by not in UNITS:
        suggestion = nearest(by, UNITS) if isinstance(by, str) else ""
        raise CorpusError(
            f"{path}: by = {inputs.shown(by, 80)} is not allowed{suggestion}; use one of: {', '.join(UNITS)}"
        )
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise CorpusError(
            f"{path} names no sources; write [[source]] tables with path (or corpus), ratio and weight"
        )
    if len(tables) > MAX_SOURCES:
        raise CorpusError(f"{path} has {len(tables):,} sources; write at most {MAX_SOURCES:,}")
    return by, [_mix_source(path, number, table) for number, table in enumerate(tables, 1)]


def _mix_source(path: Path, number: int, table: dict[str, Any]) -> MixSource:
    where = f"{path}, source {number}"
    for key in table:
        if key not in KEYS:
            raise CorpusError(
                f"{where}: unknown key {inputs.shown(key, 80)}{nearest(key, KEYS)}; "
                f"allowed: {', '.join(KEYS)}"
            )
    ratio = table.get("ratio", 1)
    weight = table.get("weight", 1)
    corpus = _corpus(where, path, table)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < float("inf"):
        raise CorpusError(f"{where}: the ratio must be a number above 0, got {inputs.shown(ratio)}")
    if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= MAX_WEIGHT:
        raise CorpusError(
            f"{where}: the weight says how many times each title occurs in an epoch, and must be a whole "
            f"number from 1 to {MAX_WEIGHT}, got {inputs.shown(weight)}"
        )
    return MixSource(where, corpus, Fraction(str(ratio)), weight)


def _corpus(where: str, path: Path, table: dict[str, Any]) -> str:
    """Return the `corpus` value of a [[source]] table. A path is relative to the TOML file's folder."""
    if ("path" in table) == ("corpus" in table):
        given = "both path and corpus" if "path" in table else "neither path nor corpus"
        raise CorpusError(f"{where}: got {given}; set exactly one of them")
    corpus = table.get("corpus", f"file:{table.get('path')}")
    kind, _, argument = str(corpus).partition(":")
    if kind == "mix" or not isinstance(corpus, str):
        raise CorpusError(
            f"{where}: {inputs.shown(corpus)} cannot be part of a mix; use one of {', '.join(syntaxes())}"
        )
    if kind == "file":
        return f"file:{path.parent / inputs.expanded(argument, 'path')}"
    return corpus
