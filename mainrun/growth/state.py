"""What a state must hold so that a growing run can continue from it.

Operators are imported only by runs that grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from mainrun.config import from_dict
from mainrun.core.optimizers import Optimizers, ParamSchedule
from mainrun.plan.ops import Op
from mainrun.plan.plan import Plan
from mainrun.store.rundir import RowLog
from mainrun.train import State

Row = dict[str, Any]
FIGURES = ("params", "active", "flops")  # what growth adds to the rows of scores; flops: so far


def ops_applied(plan: Plan, step: int) -> int:
    """Return how many operations the state after a step has seen.

    It is kept before those that act right there.
    """
    return sum(segment.first < step for segment in plan.segments[1:])


def growth_state(plan: Plan, applied: int, schedules: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the growth state after `applied` operations; empty if the config has none."""
    if not plan.cfg.growth.ops:
        return {}
    config = plan.segments[applied].cfg.model_dump(mode="json")
    return {"fired": list(plan.fired), "applied": applied, "config": config, "marks": schedules}


def growth_state_at(plan: Plan, step: int, saved: dict[str, Any]) -> dict[str, Any]:
    """Return what this plan says about a saved state. Another run with another schedule may have saved it."""
    return growth_state(plan, ops_applied(plan, step), saved.get("marks", {}))


def load_state(
    state: State, tensors: dict[str, Tensor], step: int, tokens: int, growth: dict[str, Any] | None
) -> None:
    """Load a state, after rebuilding the model that it belongs to."""
    if growth:
        rebuild_model(state, growth)
    state.growth_state = growth or {}
    state.load(tensors, step, tokens)


def rebuild_model(state: State, growth: dict[str, Any]) -> None:
    """Replace config, model and optimisers by those that a growth state describes."""
    from mainrun.growth.operators import empty_model

    cfg = from_dict(growth["config"])
    model = empty_model(state.model, cfg)
    schedules = {name: ParamSchedule(*values) for name, values in growth["marks"].items()}
    state.replace_model(cfg, model, Optimizers(cfg, model, schedules))


class Controller(Protocol):
    """What a session asks about growth. `Growth` (growth/controller.py) and `NoGrowth` answer."""

    plan: Plan  # what is known about the run so far
    state: State
    journal: RowLog | None  # growth.jsonl

    @property
    def pending_op(self) -> Op | None:
        """The operation that acts before the next step, if there is one."""

    def restore(self) -> None:
        """Follow a state that was just built or loaded."""

    def observe_scores(self, rows: Iterable[Row]) -> None:
        """Remember the scores that decide when an operation fires."""

    def decide(self) -> bool:
        """Fire the operations that waited for the latest score. Return True if the plan changed."""

    def act(self, evaluate: Callable[[], list[Row]]) -> bool:
        """Carry out every operation that is due. Return True if the model was replaced."""

    def figures(self, step: int) -> Row:
        """Return what a row of scores says about the size of the model."""

    def look_back(self) -> list[str]:
        """Return what the user should know after a step."""

    def compiled(self, seconds: float) -> None:
        """Log how long the first step after an operation compiled."""

    def close(self) -> None:
        """Close the journal."""


class NoGrowth:
    """The controller of a run that does not grow."""

    journal: RowLog | None = None

    def __init__(self, plan: Plan, state: State) -> None:
        self.plan = plan
        self.state = state

    @property
    def pending_op(self) -> Op | None:
        return None

    def restore(self) -> None: ...

    def observe_scores(self, rows: Iterable[Row]) -> None: ...

    def decide(self) -> bool:
        return False

    def act(self, evaluate: Callable[[], list[Row]]) -> bool:
        return False

    def figures(self, step: int) -> Row:
        return {}

    def look_back(self) -> list[str]:
        return []

    def compiled(self, seconds: float) -> None: ...

    def close(self) -> None: ...
