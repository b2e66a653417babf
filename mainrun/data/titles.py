"""The titles of one source, before a run selects a part of them."""

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
    origin: dict[str, Any]  # a description of the source as JSON values


def from_list(titles: list[str], origin: dict[str, Any]) -> Titles:
    return Titles(len(titles), lambda positions: [titles[i] for i in positions], origin)


def one_line(text: str) -> str:
    """Replace the line breaks in a title with spaces, and remove spaces at the start and the end."""
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ").strip()
