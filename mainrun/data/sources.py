"""The kinds of sources that a corpus can take titles from.

    synthetic             titles that the seeded grammar in synthetic.py generates
    hn, hn-2025           two pinned revisions of the task's dataset on the Hugging Face hub; see hub.py
    file:PATH[#COLUMN]    a local file; see title_files.py
    hub:OWNER/NAME@COMMIT[/GLOB]#COLUMN
                          parquet files of any dataset on the Hugging Face hub; see hub_dataset.py

To add a kind of source, write a function that returns a `Titles` object, and add a row to SOURCES. The module
corpus.py selects, orders and splits the titles. The module mix.py combines several sources into one corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mainrun.data import hub, hub_dataset, title_files
from mainrun.data.titles import Titles, from_list
from mainrun.errors import CorpusError, nearest

MIX = "mix:PATH.toml"  # the syntax of the config field `corpus` for a mix of sources


@dataclass(frozen=True)
class Source:
    """A kind of source. The config field `corpus` contains the name of a source and, if needed, an argument.

    The arguments of the function `open` are the name of the source, the argument in `corpus`, and the number
    of titles that the run will use. The function `open_documents` has the same arguments, and returns the
    texts with their line breaks and blanks. It is None if the source consists of titles.
    """

    syntax: str  # how a user writes the source in `corpus`
    kind: str  # the name of this kind of source in the files of a run
    fixed: bool  # True if the source provides the same titles on every machine
    open: Callable[[str, str, int], Titles]
    open_documents: Callable[[str, str, int], Titles] | None = None


def _synthetic(name: str, argument: str, wanted: int) -> Titles:
    from mainrun.data import synthetic

    # The grammar can generate any number of titles, so the source generates exactly as many titles as the run
    # uses.
    return from_list(synthetic.titles(wanted), {"kind": "synthetic", "seed": synthetic.SEED})


SOURCES = {
    "synthetic": Source("synthetic", "synthetic", True, _synthetic),
    "hn": Source("hn", "hub", True, hub.open_titles),
    "hn-2025": Source("hn-2025", "hub", True, hub.open_titles),
    "file": Source("file:PATH[#COLUMN]", "file", False, title_files.open_titles, title_files.open_documents),
    "hub": Source(hub_dataset.SYNTAX, "dataset", True, hub_dataset.open_titles, hub_dataset.open_documents),
}


def open_source(corpus: str, wanted: int, documents: bool = False) -> Titles:
    """Open the source that a corpus names. `wanted` is the number of titles that the run will use.

    documents: whether the texts keep their line breaks and blanks.
    """
    name, _, argument = corpus.partition(":")
    source = SOURCES.get(name)
    if source is None or (":" in source.syntax and not argument):
        names = [key for key, known in SOURCES.items() if ":" not in known.syntax]
        raise CorpusError(
            f"corpus={corpus!r} is unknown{nearest(corpus, names)}; allowed: {', '.join(syntaxes())} or {MIX}"
        )
    if not documents:
        return source.open(name, argument, wanted)
    if source.open_documents is None:
        raise CorpusError(
            f"documents=true cannot be combined with corpus={corpus}, which consists of titles; "
            "set documents=false, or use another source"
        )
    return source.open_documents(name, argument, wanted)


def is_source(corpus: str) -> bool:
    """Return whether a value of the config field `corpus` has the syntax of a source or of a mix."""
    name, _, argument = corpus.partition(":")
    if name == MIX.partition(":")[0]:
        return bool(argument)
    return name in SOURCES and bool(argument) == (":" in SOURCES[name].syntax)


def has_documents(corpus: str) -> bool:
    """Return whether the texts of a corpus can keep their line breaks and blanks."""
    source = SOURCES.get(corpus.partition(":")[0])
    return source is None or source.open_documents is not None


def kind(corpus: str) -> str:
    """Return the kind of source of a corpus, such as "file" or "hub"."""
    name = corpus.partition(":")[0]
    return SOURCES[name].kind if name in SOURCES else name


def is_fixed(corpus: str) -> bool:
    """Return whether a corpus has the same titles on every machine."""
    name = corpus.partition(":")[0]
    return name in SOURCES and SOURCES[name].fixed


def syntaxes() -> list[str]:
    """Return the syntax of each kind of source."""
    return [source.syntax for source in SOURCES.values()]
