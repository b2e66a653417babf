"""The growth state: the part of a saved state from which a run rebuilds a grown model.

This module imports the growth operators only if a run grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from mainrun.config import from_dict
from mainrun.core.optimizers import Optimizers, ParamSchedule
from mainrun.core.parameters import is_base
from mainrun.plan.ops import Op
from mainrun.plan.plan import Plan
from mainrun.store.rundir import RowLog
from mainrun.train import GPT, State

Row = dict[str, Any]
FIGURES = ("params", "active", "flops")  # growth adds these fields to each row of scores


def ops_applied(plan: Plan, step: int) -> int:
    """Return the number of operations that have changed the saved state of a step.

    The state is saved before the operations that fire after this step.
    """
    return sum(segment.first < step for segment in plan.segments[1:])


def growth_state(plan: Plan, applied: int, schedules: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the growth state after `applied` operations, or {} if the config has no operations."""
    if not plan.cfg.growth.ops:
        return {}
    config = plan.segments[applied].cfg.model_dump(mode="json")
    return {"fired": list(plan.fired), "applied": applied, "config": config, "marks": schedules}


def growth_state_at(plan: Plan, step: int, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the growth state at a step of a plan.

    saved: the growth state of a node, which a run with another growth schedule may have written.
    """
    return growth_state(plan, ops_applied(plan, step), saved.get("marks", {}))


def load_state(
    state: State, tensors: dict[str, Tensor], step: int, tokens: int, growth: dict[str, Any] | None
) -> None:
    """Rebuild the model that a saved state belongs to, and load the saved tensors."""
    if growth:
        rebuild_model(state, growth)
    state.growth_state = growth or {}
    state.load(tensors, step, tokens)


def rebuild_model(state: State, growth: dict[str, Any]) -> None:
    """Rebuild the config, the model and the optimizers from a growth state."""
    from mainrun.growth.operators import empty_model

    cfg = from_dict(growth["config"])
    old = single_model(state)
    model = empty_model(old, cfg)
    if cfg.base_frozen:
        copy_base(old, model)
    schedules = {name: ParamSchedule(*values) for name, values in growth["marks"].items()}
    state.replace_model(cfg, model, Optimizers(cfg, model, schedules))


def single_model(state: State) -> GPT:
    """Return the model of a run that grows, which has no members because `TrainConfig` refuses both."""
    assert isinstance(state.model, GPT)
    return state.model


def copy_base(old: GPT, new: GPT) -> None:
    """Copy the base of a model, which no saved state contains if the base is frozen."""
    base = {name: p for name, p in old.named_parameters() if is_base(name)}
    with torch.no_grad():
        for name, p in new.named_parameters():
            if is_base(name):
                p.copy_(base[name])


class Controller(Protocol):
    """The growth methods that a session calls. `Growth` and `NoGrowth` implement this protocol."""

    plan: Plan  # the plan with all decisions so far
    state: State
    journal: RowLog | None  # the log growth.jsonl, or None if this process does not write growth.jsonl

    @property
    def pending_op(self) -> Op | None:
        """The operation that is due before the next step, or None if no operation is due."""

    def restore(self) -> None:
        """Adapt the controller to a state that was just built or loaded."""

    def observe_scores(self, rows: Iterable[Row]) -> None:
        """Remember the scores that trigger operations."""

    def decide(self) -> bool:
        """Fire the operations whose triggers are met. Return True if the plan changed."""

    def act(self, evaluate: Callable[[], list[Row]]) -> bool:
        """Carry out all operations that are due. Return True if the model was replaced."""

    def figures(self, step: int) -> Row:
        """Return the model size and the total FLOPs after a step, to log with the scores of the step."""

    def look_back(self) -> list[str]:
        """Return messages for the user about operations in recent steps."""

    def compiled(self, seconds: float) -> None:
        """Log how long the compilation after an operation took."""

    def close(self) -> None:
        """Close the log growth.jsonl."""


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
