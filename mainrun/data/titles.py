"""The titles of one source, before a run selects some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Titles:
    """All titles of a source, in the order of the source."""

    count: int
    take: Callable[[np.ndarray], list[str]]  # a function that returns the titles at the given positions
    origin: dict[str, Any]  # where the titles come from, as JSON values; `kind` is the kind of source


def from_list(titles: list[str], origin: dict[str, Any]) -> Titles:
    return Titles(len(titles), lambda positions: [titles[i] for i in positions], origin)


def one_line(text: str) -> str:
    """Replace line breaks by spaces, and remove surrounding spaces."""
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ").strip()
