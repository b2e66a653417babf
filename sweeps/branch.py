"""Decay branches: what a rung would score, had the run been planned to end about there.

Before the rate has fallen a loss is not what the same steps could come to; how far it is off depends on the rate and on whose fall has
begun, and short rungs flatter high rates, which are ahead early. So a rung of a `wsd` trial can be scored on an ordinary run of its own,
the trial's recipe with an earlier end: the same warm-up, the peak rate as far as the trial itself has it, then the trial's own fall,
whole, to a step a little behind the rung. The steps before the fall are the trunk's, from the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan
from sweeps.space import changed


def of(cfg: TrainConfig, plan: Plan, step: int, share: float) -> TrainConfig:
    """The branch of a trial at a rung. A trial whose own fall begins before the rung parts there: at a rung all have had as many steps."""
    end = min(
        plan.steps, step + max(2, round(share * step))
    )  # the first step of a fall has the peak rate still
    falls = min(step, plan.decay_start)
    swa = min(cfg.swa, (end - falls) / end)  # an average that began before would be another trunk
    steps: dict[str, Any] = {
        "warmup_iters": plan.warmup_steps,
        "warmup_frac": 0.0,
        "decay_frac": (end - falls) / end,
    }
    found = changed(cfg, {"max_steps": end, "swa": swa, **steps})
    short = Plan(found, plan.train_tokens)
    same = next((at for at in range(end) if short.at(at) != plan.at(at)), end)
    assert short.steps == end and same >= min(falls, plan.swa_start), (
        f"the branch at {step} parts from its trunk at {same}, not at {falls}"
    )
    return found


def faults(space: Mapping[str, Any], base: TrainConfig) -> Iterator[str]:
    """Why the trials of a study cannot be scored on branches: all of a rung are, or none is."""

    def all_of(name: str) -> list[Any]:
        parameter = space.get(name)
        return list(getattr(parameter, "values", [])) if parameter else [getattr(base, name)]

    instead = 'write score = "raw" under [rungs], or'
    if odd := [value for value in all_of("schedule") if value != "wsd"]:
        yield f'rungs.score="branch" with schedule={odd[0]!r}: only wsd has a trunk to branch from; {instead} keep schedule at wsd.'
    if odd := [value for value in all_of("wd_schedule") if value != "constant"]:
        yield (
            f'rungs.score="branch" with wd_schedule={odd[0]!r}: weight decay that falls over the whole run makes a branch another run '
            f"from its first step on; {instead} keep wd_schedule at constant."
        )
    if base.growth.ops or any(name.split(".")[0] == "growth" for name in space):
        yield f'rungs.score="branch" with growth, which is laid out over the whole run; {instead} remove it.'
