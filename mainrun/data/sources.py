"""The kinds of sources that titles come from.

    synthetic             titles from the seeded grammar of synthetic.py; needs no network
    hn, hn-2025           the dataset of the task on the Hugging Face hub, at two pinned revisions; see hub.py
    file:PATH[#COLUMN]    a local file; see title_files.py

To add a kind, write a function that returns its `Titles` and add a row to SOURCES. corpus.py selects,
orders and splits the titles; mix.py combines several sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mainrun.data import hub, title_files
from mainrun.data.titles import Titles, from_list
from mainrun.errors import CorpusError, nearest

MIX = "mix:PATH.toml"  # how a mix of sources is written; mix.py reads it


@dataclass(frozen=True)
class Source:
    """A kind of source. The config field `corpus` names it, and may add an argument after a colon.

    `open` is called with the name, the argument and the number of titles that the run wants.
    """

    syntax: str  # how the source is written in `corpus`
    kind: str  # the `kind` in the origin of its titles
    fixed: bool  # whether the same `corpus` gives the same titles everywhere; a guard flags other data
    open: Callable[[str, str, int], Titles]


def _synthetic(name: str, argument: str, wanted: int) -> Titles:
    from mainrun.data import synthetic

    # The grammar produces any number of titles, so the source has as many as are wanted.
    return from_list(synthetic.titles(wanted), {"kind": "synthetic", "seed": synthetic.SEED})


SOURCES = {
    "synthetic": Source("synthetic", "synthetic", True, _synthetic),
    "hn": Source("hn", "hub", True, hub.open_titles),
    "hn-2025": Source("hn-2025", "hub", True, hub.open_titles),
    "file": Source("file:PATH[#COLUMN]", "file", False, title_files.open_titles),
}


def open_source(corpus: str, wanted: int) -> Titles:
    """Open the source that `corpus` names. `wanted` is the number of titles that the run will use."""
    name, _, argument = corpus.partition(":")
    source = SOURCES.get(name)
    if source is None or (":" in source.syntax and not argument):
        names = [key for key, known in SOURCES.items() if ":" not in known.syntax]
        raise CorpusError(
            f"corpus={corpus!r} is not known{nearest(corpus, names)}; "
            f"allowed: {', '.join(syntaxes())} or {MIX}"
        )
    return source.open(name, argument, wanted)


def is_source(corpus: str) -> bool:
    """Return whether `corpus` is written like one of the sources, or like a mix of them."""
    name, _, argument = corpus.partition(":")
    if name == MIX.partition(":")[0]:
        return bool(argument)
    return name in SOURCES and bool(argument) == (":" in SOURCES[name].syntax)


def kind(corpus: str) -> str:
    """Return the `kind` in the origin of a corpus."""
    name = corpus.partition(":")[0]
    return SOURCES[name].kind if name in SOURCES else name


def is_fixed(corpus: str) -> bool:
    """Return whether the same `corpus` gives the same titles everywhere."""
    name = corpus.partition(":")[0]
    return name in SOURCES and SOURCES[name].fixed


def syntaxes() -> list[str]:
    """Return how each source is written in `corpus`."""
    return [source.syntax for source in SOURCES.values()]
