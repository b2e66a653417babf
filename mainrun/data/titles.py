"""The titles of one source, before a run selects a part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mainrun.errors import CorpusError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Titles:
    """All titles of a source, in the order of the source."""

    count: int
    take: Callable[[np.ndarray], list[str]]  # a function that returns the titles at the given positions
    origin: dict[str, Any]  # a description of the source as JSON values


def from_list(titles: list[str], origin: dict[str, Any]) -> Titles:
    return Titles(len(titles), lambda positions: [titles[i] for i in positions], origin)


def as_documents(texts: Iterable[str]) -> list[str]:
    """Return the texts that are not blank, without changes."""
    return [text for text in texts if text and not text.isspace()]


def as_titles(texts: Iterable[str]) -> list[str]:
    """Return the texts that are not blank, each on one line."""
    titles = []
    for text in texts:
        title = one_line(text)
        if title:
            titles.append(title)
    return titles


def check_unicode(titles: Sequence[str], where: object) -> None:
    """Raise CorpusError if a title contains half of a surrogate pair. `where` is the file of the titles."""
    for number, title in enumerate(titles, 1):
        if not title.isascii() and any("\ud800" <= c <= "\udfff" for c in title):
            raise CorpusError(
                f"{where}: title {number} is not valid Unicode: it contains half of a surrogate pair; "
                "repair or remove it"
            )


def one_line(text: str) -> str:
    """Replace the line breaks in a title with spaces, and remove spaces at the start and the end."""
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ").strip()
