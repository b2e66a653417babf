"""What a search has found, and for how many tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trace:
    """The recommendations of a search."""

    method: str
    table: str
    search_seed: int
    train_seed: int
    steps: list[tuple[float, str | None]]  # after this many whole runs, this recipe is recommended
    cpu_seconds: float
