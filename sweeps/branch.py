"""Create decay branches, which are short runs that score the rungs of a `wsd` trial.

Before the learning rate has decayed, the loss of a run depends on the rate. At an early step, high rates look
better than they are, so trials with different rates cannot be compared.

A branch is an ordinary run with the trial's config and fewer steps. It has the same warm-up as the trial, and
the same peak rate up to the rung. Then its learning rate decays completely, and the branch ends shortly after
the rung. The branch and the trial share the steps before the decay through the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan
from sweeps.space import with_values


def branch_config(cfg: TrainConfig, plan: Plan, step: int, share: float) -> TrainConfig:
    """Return the config of the branch that scores a trial at a rung.

    After the rung, the branch trains for additional steps. Their number is `share` times the number of steps
    before the rung. If the trial's decay starts before the rung, the decay of the branch starts at the same
    step. All branches of a rung therefore have the same number of steps.
    """
    # The first step of a decay still has the peak rate, so the decay needs at least two steps.
    end = min(plan.steps, step + max(2, round(share * step)))
    decay_start = min(step, plan.decay_start)
    decay_frac = (end - decay_start) / end
    changes = {
        "max_steps": end,
        "warmup_iters": plan.warmup_steps,
        "warmup_frac": 0.0,
        "decay_frac": decay_frac,
        # If weight averaging started before the decay, the branch could not share the trial's steps.
        "swa": min(cfg.swa, decay_frac),
    }
    branch = with_values(cfg, changes)
    branch_plan = Plan(branch, plan.train_tokens)
    shared = _shared_steps(branch_plan, plan, end)
    assert branch_plan.steps == end and shared >= min(decay_start, plan.swa_start), (
        f"the branch at step {step} shares {shared} steps with its trial, not {decay_start}"
    )
    return branch


def _shared_steps(a: Plan, b: Plan, end: int) -> int:
    """Return the number of steps before the first difference between two plans, at most `end`."""
    for step in range(end):
        if a.at(step) != b.at(step):
            return step
    return end


def faults(space: Mapping[str, Any], base: TrainConfig) -> Iterator[str]:
    """Yield the reasons why a study cannot score its rungs on branches."""
    instead = 'write score = "raw" under [rungs], or'
    for value in _possible_values("schedule", space, base):
        if value != "wsd":
            yield (
                f'rungs.score="branch" with schedule={value!r}: only wsd has a constant phase '
                f"to branch from; {instead} keep schedule at wsd."
            )
            break
    for value in _possible_values("wd_schedule", space, base):
        if value != "constant":
            yield (
                f'rungs.score="branch" with wd_schedule={value!r}: if weight decay falls over the whole run, '
                "a branch shares no steps with its trial; "
                f"{instead} keep wd_schedule at constant."
            )
            break
    if base.growth.ops or any(name.split(".")[0] == "growth" for name in space):
        yield (
            'rungs.score="branch" with growth, which is scheduled over the whole run; '
            f"{instead} remove growth."
        )


def _possible_values(name: str, space: Mapping[str, Any], base: TrainConfig) -> list[Any]:
    """Return all values that a field can have in a trial."""
    parameter = space.get(name)
    if parameter is None:
        return [getattr(base, name)]
    return list(getattr(parameter, "values", []))
