"""Define a trial of a study, the states of a trial, and the runs that train and score a trial."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mainrun.config import TrainConfig


class TrialState(StrEnum):
    """The state of a trial, as written to export.json.

    WAITING: The trial can train to its next rung, but has not been passed to the engine.
    RUNNING: The trial was passed to the engine, which trains the trial as soon as a worker is free.
    PAUSED: The trial has the score of a rung and waits for the other trials of its generation.
    DONE: The trial was trained to its last step.
    SHORT: The trial was a short run or a late change, and was trained to its last step.
    PRUNED: The trial was stopped at a rung because other trials of its generation had better scores.
    DIVERGED: The loss of the trial, or of one of its branches, is no longer a finite number.
    FAILED: The trial could not be trained. The attribute `reason` says why the trial failed.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    SHORT = "short"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    FAILED = "failed"

    @property
    def is_finished(self) -> bool:
        return self not in (TrialState.WAITING, TrialState.RUNNING, TrialState.PAUSED)


@dataclass(slots=True)
class Trial:
    """A trial with its parameter values, its scores so far, and its state."""

    number: int
    values: dict[str, Any]
    run_id: str = ""  # an empty string if the trial's config is not valid
    stops: tuple[int, ...] = ()  # the step of each rung, where the last rung is the end of the run
    scores: dict[int, float] = field(default_factory=dict)  # maps each rung to the score at the rung
    raw_scores: dict[int, float] = field(default_factory=dict)  # the trial's own scores, if it has branches
    state: TrialState = TrialState.WAITING
    reason: str = ""  # the reason why the trial was pruned, diverged or failed
    horizon: float = 1.0  # the share of the steps that the trial trains; below 1, the trial is a short run
    late: float = 0.0  # the share of the tokens after which the base changes to the values, or 0
    planned: int = 0  # the new tokens that the sampler `frugal` planned for the trial

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
        """Allow the trial to train to its next rung."""
        self.state = TrialState.WAITING

    def end(self, state: TrialState, reason: str) -> None:
        self.state = state
        self.reason = reason

    def add_score(self, rung: int, score: float, raw_score: float | None = None) -> None:
        """Record the score of the trial at a rung.

        The trial is done after the score of its last rung, and is paused after the score of an earlier rung.
        """
        self.scores[rung] = score
        if raw_score is not None:
            self.raw_scores[rung] = raw_score
        if rung + 1 == len(self.stops):
            is_whole = self.horizon == 1 and not self.late
            self.state = TrialState.DONE if is_whole else TrialState.SHORT
        else:
            self.state = TrialState.PAUSED


@dataclass(frozen=True, slots=True)
class TrialRuns:
    """The configs of the runs that train a trial and score its rungs."""

    cfg: TrainConfig
    stops: tuple[int, ...]
    branches: dict[int, TrainConfig]  # maps each rung to the config of the branch that scores it
