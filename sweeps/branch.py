"""Create decay branches, which are short runs that score the rungs of trials with the `wsd` schedule.

Before the learning rate decays, the loss of a run depends strongly on the current learning rate. Trials with
different learning rates therefore cannot be compared in the middle of training.

A branch is an ordinary run that has the trial's config but fewer steps. Up to the rung, a
branch has the same learning rates as its trial. After the rung, the branch trains for only a few more steps,
while its learning rate decays to the end. The steps before the decay are not trained again, because the
branch reads their results from the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan
from sweeps.space import with_values


def branch_config(cfg: TrainConfig, plan: Plan, step: int, share: float) -> TrainConfig:
    """Return the config of the branch that scores a trial at a rung.

    `step` is the training step of the rung. After the rung, the branch trains for `share * step` additional
    steps. If the trial's learning rate starts to decay before the rung, the branch's learning rate starts to
    decay at the same step. The number of steps in a branch does not depend on the start of the decay.
    """
    # A decay needs at least two steps, because its first step still has the peak learning rate.
    end = min(plan.steps, step + max(2, round(share * step)))
    decay_start = min(step, plan.decay_start)
    decay_frac = (end - decay_start) / end
    changes = {
        "max_steps": end,
        "warmup_iters": plan.warmup_steps,
        "warmup_frac": 0.0,
        "decay_frac": decay_frac,
        # If weight averaging started before the decay, the branch could not reuse the trial's steps.
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
    """Return the first step at which two plans differ, or `end` if the plans do not differ before `end`."""
    for step in range(end):
        if a.at(step) != b.at(step):
            return step
    return end


def faults(space: Mapping[str, Any], base: TrainConfig) -> Iterator[str]:
    """Yield one sentence for each reason why a study cannot use branches."""
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
    """Return all values that a config field can have in the trials of a study."""
    parameter = space.get(name)
    if parameter is None:
        return [getattr(base, name)]
    return list(getattr(parameter, "values", []))
