"""Mix several sources into one corpus: `mix:PATH.toml`.

    [[source]]
    path = "mine.txt"      # a path relative to the TOML file; or set corpus = "hn", for example
    ratio = 3              # the source's share of num_titles, relative to the other ratios (default 1)
    weight = 2             # how many times each title of the source occurs in an epoch (default 1)

The titles of each source are ordered as in a run that uses only this source. The mix takes the first titles
of each source in this order. A title that is already in the mix is skipped, so all titles of a mix are
distinct. The titles of the sources are spread evenly over the mix. Train, dev and val therefore each contain
the sources in the given ratios. Weights affect only train, because each title occurs once in dev and val.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class MixSource:
    """One [[source]] table in the TOML file of a mix."""

    where: str  # the TOML file and the number of the table, for error messages
    corpus: str
    ratio: Fraction
    weight: int


@dataclass
class Mix:
    """The ordered titles of a mix, with the weight of each title."""

    titles: list[str]
    weights: list[int]
    origin: dict[str, Any] = field(default_factory=dict)


def load_mix(path: Path, wanted: int, order: Callable[[int], np.ndarray]) -> Mix:
    """Load a mix that contains `wanted` titles.

    `order(n)` returns the order in which a run uses the n titles of a source.
    """
    sources = _read(path)
    shares = _shares([source.ratio for source in sources], wanted)
    ratio_sum = sum(source.ratio for source in sources)
    placed: list[tuple[Fraction, int, str]] = []
    seen: set[str] = set()
    origins = []
    for i, (source, share) in enumerate(zip(sources, shares, strict=True)):
        if share == 0:
            raise CorpusError(
                f"{source.where} ({source.corpus}): the source gets no title of num_titles={wanted}, "
                "because its ratio is too small; raise the ratio or num_titles"
            )
        # A synthetic source generates `wanted` titles, which is sufficient even if another source contains
        # some of the same titles.
        titles = open_source(source.corpus, wanted)
        fresh = _unseen(titles, order(titles.count), share, wanted, seen)
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
        origins.append(
            titles.origin
            | {
                "source": source.corpus,
                "ratio": float(source.ratio),
                "weight": source.weight,
                "titles": share,
            }
        )
    placed.sort(key=lambda entry: entry[:2])
    return Mix(
        titles=[title for _, _, title in placed],
        weights=[sources[i].weight for _, i, _ in placed],
        origin={"kind": "mix", "path": str(path), "sources": origins},
    )


def _unseen(titles: Titles, order: np.ndarray, share: int, batch: int, seen: set[str]) -> list[str]:
    """Return the first `share` titles of a source that are not in `seen`, and add these titles to `seen`."""
    fresh: list[str] = []
    for start in range(0, titles.count, batch):
        for title in titles.take(order[start : start + batch]):
            if len(fresh) == share:
                return fresh
            if title not in seen:
                seen.add(title)
                fresh.append(title)
    return fresh


# -- the TOML file


def _read(path: Path) -> list[MixSource]:
    text = decode(read_bytes(path, "a TOML file with [[source]] tables"), path)
    try:
        tables = inputs.parse_toml(text).get("source")
    except inputs.BadInput as e:
        raise CorpusError(f"{path} is not valid TOML: {e}") from None
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise CorpusError(
            f"{path} names no sources; write [[source]] tables with path (or corpus), ratio and weight"
        )
    if len(tables) > MAX_SOURCES:
        raise CorpusError(f"{path} has {len(tables):,} sources; write at most {MAX_SOURCES:,}")
    return [_mix_source(path, number, table) for number, table in enumerate(tables, 1)]


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
