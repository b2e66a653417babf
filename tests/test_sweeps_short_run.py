"""Tests short runs: a short run is its recipe with fewer steps, and shares the trunk of the whole run."""

from __future__ import annotations

import pytest
from searching import make_study

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan
from sweeps.short_run import short_run

TRAIN_TOKENS = 100 * 128 + 1  # enough tokens for 100 steps
WSD = {"schedule": "wsd", "warmup_frac": 0.1, "decay_frac": 0.4}


def make(**fields: float) -> tuple[TrainConfig, Plan]:
    cfg = make_study(WSD | fields).base()
    return cfg, Plan(cfg, TRAIN_TOKENS)


@pytest.mark.parametrize(
    ("horizon", "steps", "decay_start"), [(0.25, 25, 15), (0.5, 50, 30), (0.501, 51, 31)]
)
def test_a_short_run_shares_the_trunk_of_the_whole_run(horizon: float, steps: int, decay_start: int) -> None:
    cfg, plan = make()
    short = Plan(short_run(cfg, plan, horizon), TRAIN_TOKENS)
    assert (short.steps, short.warmup_steps, short.decay_start) == (steps, 10, decay_start)
    assert [short.at(step) for step in range(decay_start)] == [plan.at(step) for step in range(decay_start)]
    assert short.at(steps - 1).lr < plan.at(steps - 1).lr


def test_the_horizon_1_is_the_recipe_itself() -> None:
    cfg, plan = make()
    assert short_run(cfg, plan, 1) is cfg


def test_all_other_fields_are_unchanged() -> None:
    cfg, plan = make(dropout=0.1, weight_decay=0.2, seed=5, min_lr_frac=0.1, swa=0.6)
    short = short_run(cfg, plan, 0.5)
    changed = {name for name in TrainConfig.model_fields if getattr(short, name) != getattr(cfg, name)}
    assert changed == {"max_steps", "warmup_frac", "warmup_iters", "swa"}
    assert short.swa == cfg.decay_frac  # averaging that starts before the decay would end the shared trunk
