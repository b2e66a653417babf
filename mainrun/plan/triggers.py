"""Decide when an op fires, by comparing the trigger of the op with the progress of the run.

An op fires as soon as any condition of its trigger is met:

    loss_below    the loss of the last evaluation, in nats per token, is below the value
    wait_iters    the given number of steps has passed since the last op, or since the start of the run
    plateau       since the last op, the best loss of the last `evals` evaluations has improved on the best
                  earlier loss by less than the fraction `rel`
    step          the given number of steps has been trained
    tokens        the given number of tokens has been trained
    budget_frac   the given fraction of the run's tokens has been trained

A trigger that has only the conditions `step`, `tokens` and `budget_frac` is called static. An op with a
static trigger fires at a step that is known before the run. Other triggers are checked after each evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Trigger:
    """The conditions of an op. The op fires when any condition is met."""

    loss_below: float | None = None
    wait_iters: int | None = None
    step: int | None = None
    tokens: int | None = None
    budget_frac: float | None = None
    plateau: tuple[int, float] | None = None  # (number of evaluations, minimum relative improvement)

    @property
    def conditions(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def static(self) -> bool:
        """Whether the step at which the op fires is known before the run."""
        return self.conditions.keys() <= {"step", "tokens", "budget_frac"}

    def data(self) -> dict[str, Any]:
        """Return the trigger in the format of a schedule file."""
        conditions = self.conditions
        if self.plateau is not None:
            evals, rel = self.plateau
            conditions["plateau"] = {"evals": evals, "rel": rel}
        if len(conditions) == 1:
            return conditions
        return {"any": [{name: value} for name, value in conditions.items()]}

    def __str__(self) -> str:
        words = {
            "loss_below": "loss < {:g}",
            "wait_iters": "a wait of {:,}",
            "step": "step {:,}",
            "tokens": "{:,} tokens",
            "budget_frac": "{:g} of the budget",
            "plateau": "plateau of {0[0]} evaluations",
        }
        return " or ".join(words[name].format(value) for name, value in self.conditions.items())


class Facts(NamedTuple):
    """The progress of a run after an evaluation, which decides whether a trigger fires."""

    step: int  # number of steps trained
    last: int  # the step at which the last op fired, or 0 if no op has fired
    tokens: int  # number of tokens trained
    budget: int  # number of tokens in the whole run
    losses: Sequence[tuple[int, float]] = ()  # the step and the loss of each evaluation, in order


def due(trigger: Trigger, facts: Facts) -> str | None:
    """Return the reason why a trigger fires, or None if it does not fire."""
    loss = facts.losses[-1][1] if facts.losses else None
    if trigger.loss_below is not None and loss is not None and loss < trigger.loss_below:
        return f"loss {loss:.4f} < {trigger.loss_below:g}"
    waited = facts.step - facts.last
    if trigger.wait_iters is not None and waited >= trigger.wait_iters:
        return f"{waited:,} steps since the last op >= {trigger.wait_iters:,}"
    if trigger.step is not None and facts.step >= trigger.step:
        return f"step {facts.step:,} >= {trigger.step:,}"
    if trigger.tokens is not None and facts.tokens >= trigger.tokens:
        return f"{facts.tokens:,} tokens >= {trigger.tokens:,}"
    if trigger.budget_frac is not None and facts.tokens >= trigger.budget_frac * facts.budget:
        return f"{facts.tokens:,} tokens >= {trigger.budget_frac:g} of the budget"
    if trigger.plateau is not None:
        return _plateau(*trigger.plateau, facts)
    return None


def _plateau(evals: int, rel: float, facts: Facts) -> str | None:
    losses = [loss for step, loss in facts.losses if step > facts.last]
    if len(losses) <= evals:
        return None
    before = min(losses[:-evals])
    now = min(losses[-evals:])
    if now > before * (1 - rel):
        return f"plateau: best loss {now:.4f} in the last {evals} evaluations, {before:.4f} before"
    return None
