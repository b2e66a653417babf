"""Define a trial of a study, its states, and the runs that train and score it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mainrun.config import TrainConfig


class TrialState(StrEnum):
    """The state of a trial. The values are written to export.json.

    WAITING: The trial can train to its next rung, but it is not with the engine yet.
    RUNNING: The engine trains the trial as soon as a worker is free.
    PAUSED: The trial has the score of a rung and waits for the other scores of its generation.
    DONE: The trial was trained to its last step.
    PRUNED: The trial was stopped at a rung because others of its generation scored better.
    DIVERGED: The loss of the trial, or of one of its branches, is no longer a finite number.
    FAILED: The trial could not be trained. Its `reason` says why.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    FAILED = "failed"

    @property
    def is_finished(self) -> bool:
        return self in (TrialState.DONE, TrialState.PRUNED, TrialState.DIVERGED, TrialState.FAILED)


@dataclass(slots=True)
class Trial:
    """The values that a trial sets in the config, its scores so far, and its state."""

    number: int
    values: dict[str, Any]
    run_id: str = ""  # empty if the values do not form a valid config
    stops: tuple[int, ...] = ()  # the step of each rung; the last step is the end of the run
    scores: dict[int, float] = field(default_factory=dict)  # rung -> score
    raw_scores: dict[int, float] = field(default_factory=dict)  # rung -> score without the branch
    state: TrialState = TrialState.WAITING
    reason: str = ""  # why the trial was pruned, diverged or failed

    @property
    def is_finished(self) -> bool:
        return self.state.is_finished

    @property
    def rung(self) -> int:
        """The index of the last rung with a score, or -1 if no rung has a score."""
        return max(self.scores, default=-1)

    def start(self) -> None:
        self.state = TrialState.RUNNING

    def promote(self) -> None:
        """Let the trial train to its next rung."""
        self.state = TrialState.WAITING

    def end(self, state: TrialState, reason: str) -> None:
        self.state = state
        self.reason = reason

    def add_score(self, rung: int, score: float, raw_score: float | None = None) -> None:
        """Record the score of a rung.

        The score of the last rung completes the trial. The score of an earlier rung pauses the trial.
        """
        self.scores[rung] = score
        if raw_score is not None:
            self.raw_scores[rung] = raw_score
        if rung + 1 == len(self.stops):
            self.state = TrialState.DONE
        else:
            self.state = TrialState.PAUSED


@dataclass(frozen=True, slots=True)
class TrialRuns:
    """The configs of the runs that train a trial and score its rungs."""

    cfg: TrainConfig
    stops: tuple[int, ...]
    branches: dict[int, TrainConfig]  # rung -> config of the branch that scores the rung
