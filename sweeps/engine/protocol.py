"""The interface between the driver and an engine: tasks, their outcomes, and what an engine does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Task:
    """Train a run up to a step, or to its end. A run that was started before resumes in its run directory."""

    preset: str
    sets: tuple[str, ...]  # KEY=VALUE texts that change the preset
    out: Path  # the folder of the run directories
    store: Path  # the store that all runs of a study share
    until: int  # the step to stop at; 0: train to the end
    threads: int = field(default=1, compare=False)


@dataclass(frozen=True)
class Outcome:
    """How a task ended."""

    ok: bool
    diverged: bool = False
    refused: bool = False  # the worker exited with code 2: its input is wrong or damaged
    reason: str = ""


class Engine(Protocol):
    """Trains tasks in worker processes: on this machine (`local`) or on a Ray cluster (`ray`)."""

    workers: int

    def train(self, task: Task) -> Outcome:
        """Train a task and return its outcome.

        Blocks, retries when a worker dies, and is called from `workers` threads.
        """

    def close(self) -> None:
        """Stop all workers now. Their progress is in their checkpoints."""
