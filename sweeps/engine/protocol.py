"""Who trains: `local` subprocesses, or those of a `ray` cluster. An engine takes a task, sees that it is done, and says how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Task:
    """Train a config up to a step: in a run directory where it may have begun, with a store that others use too."""

    preset: str
    sets: tuple[str, ...]
    out: Path
    store: Path
    until: int  # 0: to the end
    threads: int = field(default=1, compare=False)


@dataclass(frozen=True)
class Outcome:
    ok: bool
    diverged: bool = False
    refused: bool = False  # the worker exited with 2: its input is wrong or damaged
    why: str = ""


class Engine(Protocol):
    workers: int

    def train(self, task: Task) -> Outcome:
        """Blocks until it is done, whatever happens to the worker on the way. Called from `workers` threads."""

    def close(self) -> None:
        """End all workers now; what they had is in their checkpoints."""
