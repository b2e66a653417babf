"""Define the interface between the driver and an engine.

The driver sends tasks, and the engine returns outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Task:
    """A request to train a run up to a step, or to the end of the run.

    A run that was started before is resumed from its run directory.
    """

    preset: str
    sets: tuple[str, ...]  # settings in the form KEY=VALUE that override the preset
    out: Path  # the folder that contains the run directories
    store: Path  # the folder of the store, which all runs of a study share
    until: int  # the step to stop at, or 0 to train to the end of the run
    threads: int = field(default=1, compare=False)
    keep: tuple[int, ...] = field(default=(), compare=False)  # the steps whose states are kept in the store


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task, which says how the task ended."""

    ok: bool
    diverged: bool = False
    refused: bool = False  # True if the worker reported invalid or damaged input (exit code 2)
    reason: str = ""


class Engine(Protocol):
    """The interface of an engine, which trains tasks in worker processes.

    The engine `local` starts its workers on this machine. The engine `ray` starts its workers on a Ray
    cluster.
    """

    workers: int

    def train(self, task: Task) -> Outcome:
        """Train a task and return its outcome.

        This method blocks until the task ends. If a worker dies, the engine starts the task again. The driver
        calls this method from several threads at the same time, one thread per worker.
        """

    def close(self) -> None:
        """Stop all workers immediately. Each worker saves a checkpoint before it ends."""
