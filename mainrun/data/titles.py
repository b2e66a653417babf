"""The titles of one source, before a run selects some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Titles:
    """The titles of a source in the order of the source."""

    count: int
    take: Callable[[np.ndarray], list[str]]  # returns the titles at an array of positions
    origin: dict[str, Any]  # JSON: where the titles come from; `kind` names the kind of source


def from_list(titles: list[str], origin: dict[str, Any]) -> Titles:
    return Titles(len(titles), lambda positions: [titles[i] for i in positions], origin)


def one_line(text: str) -> str:
    """Return the text without surrounding spaces and with spaces in place of line breaks."""
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ").strip()
