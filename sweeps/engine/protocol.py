"""Define the interface between the driver and an engine.

The driver sends tasks, and the engine returns outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Task:
    """A request to train a run up to a step, or to its end.

    If the run was started before, it resumes in its run directory.
    """

    preset: str
    sets: tuple[str, ...]  # settings as KEY=VALUE that change the preset
    out: Path  # the folder of the run directories
    store: Path  # the store that all runs of a study share
    until: int  # the step to stop at, or 0 to train to the end
    threads: int = field(default=1, compare=False)


@dataclass(frozen=True)
class Outcome:
    """How a task ended."""

    ok: bool
    diverged: bool = False
    refused: bool = False  # the worker exited with code 2 because its input is wrong or damaged
    reason: str = ""


class Engine(Protocol):
    """Train tasks in worker processes, either on this machine (`local`) or on a Ray cluster (`ray`)."""

    workers: int

    def train(self, task: Task) -> Outcome:
        """Train a task and return its outcome.

        The method blocks until the task ends. If a worker dies, the task is retried. The driver calls the
        method from `workers` threads at the same time.
        """

    def close(self) -> None:
        """Stop all workers immediately. Their progress is saved in checkpoints."""
