"""Tests decay branches: a branch has its trial's config with an earlier end, and gives a rung its score."""

from __future__ import annotations

from typing import Any

import pytest
from searching import make_study

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan
from sweeps import branch

TRAIN_TOKENS = 100 * 128 + 1  # enough tokens for 100 steps
WSD = {"schedule": "wsd", "warmup_frac": 0.1, "decay_frac": 0.3}


def make(**fields: Any) -> tuple[TrainConfig, Plan]:
    cfg = make_study(WSD | fields).base()
    return cfg, Plan(cfg, TRAIN_TOKENS)


@pytest.mark.parametrize(
    ("fields", "step", "share", "end", "decay_start"),
    [
        pytest.param({}, 40, 0.25, 50, 40, id="before the trial's decay"),
        pytest.param({}, 40, 0.1, 44, 40, id="a shorter branch"),
        pytest.param({}, 40, 0.01, 42, 40, id="at least two steps"),
        pytest.param({}, 10, 0.25, 12, 10, id="half a step is rounded to the even number"),
        pytest.param({}, 30, 0.25, 38, 30, id="half a step is rounded up to the even number"),
        pytest.param({}, 70, 0.2, 84, 70, id="at the start of the trial's decay"),
        pytest.param({}, 80, 0.1, 88, 70, id="after the start of the trial's decay"),
        pytest.param({}, 96, 0.5, 100, 70, id="never longer than the trial"),
        pytest.param({"decay_frac": 0.9}, 40, 0.25, 50, 10, id="a trial that decays after its warm-up"),
        pytest.param({"decay_frac": 0.0}, 40, 0.25, 50, 40, id="a trial that never decays"),
        pytest.param({"warmup_frac": 0.0, "warmup_iters": 5}, 40, 0.25, 50, 40, id="a warm-up in steps"),
        pytest.param({"warmup_frac": 0.0}, 40, 0.25, 50, 40, id="no warm-up"),
    ],
)
def test_a_branch_ends_shortly_after_its_rung(
    fields: dict[str, Any], step: int, share: float, end: int, decay_start: int
) -> None:
    """A branch has the same steps as its trial until the decay starts, and ends with the decay."""
    cfg, plan = make(**fields)
    branch_cfg = branch.branch_config(cfg, plan, step, share)
    branch_plan = Plan(branch_cfg, TRAIN_TOKENS)
    assert (branch_cfg.max_steps, branch_plan.steps, branch_plan.decay_start) == (end, end, decay_start)
    assert branch_plan.warmup_steps == plan.warmup_steps and branch_cfg.warmup_frac == 0.0
    shared = range(decay_start)
    assert [branch_plan.at(i) for i in shared] == [plan.at(i) for i in shared]
    rates = [branch_plan.at(i).lr for i in range(decay_start, end)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == cfg.lr and rates[-1] < 2 * cfg.lr / (end - decay_start)


def test_all_other_fields_of_the_trial_are_unchanged() -> None:
    cfg, plan = make(dropout=0.1, weight_decay=0.2, seed=5, decay_shape="sqrt", min_lr_frac=0.1)
    branch_cfg = branch.branch_config(cfg, plan, 40, 0.25)
    changed = {name for name in TrainConfig.model_fields if getattr(branch_cfg, name) != getattr(cfg, name)}
    assert changed == {"max_steps", "warmup_frac", "warmup_iters", "decay_frac"}
    assert branch_cfg.decay_frac == pytest.approx(0.2) and branch_cfg.warmup_iters == 10


@pytest.mark.parametrize(
    ("swa", "step", "expected"),
    [
        pytest.param(0.0, 40, 0.0, id="no averaging"),
        pytest.param(0.1, 40, 0.1, id="shorter than the decay"),
        pytest.param(0.5, 40, 0.2, id="cut to the decay"),
        pytest.param(0.5, 80, 18 / 88, id="after the start of the trial's decay"),
    ],
)
def test_weight_averaging_starts_in_the_decay(swa: float, step: int, expected: float) -> None:
    """If averaging started earlier, the branch would share fewer steps with its trial."""
    cfg, plan = make(swa=swa)
    branch_cfg = branch.branch_config(cfg, plan, step, 0.1 if step == 80 else 0.25)
    assert branch_cfg.swa == pytest.approx(expected)
    assert Plan(branch_cfg, TRAIN_TOKENS).swa_start >= min(step, plan.decay_start) or not swa


def test_a_branch_that_shares_too_few_steps_is_a_bug() -> None:
    """The config and the plan belong to different trials, which share no steps."""
    cfg, plan = make()
    other = make(lr=cfg.lr * 2)[0]
    with pytest.raises(AssertionError, match="the branch at step 40 shares 0 steps with its trial, not 40"):
        branch.branch_config(other, plan, 40, 0.25)


# -- studies that cannot have branches

GROWS = {"ops": [{"name": "set_lr", "value": 0.01, "trigger": {"budget_frac": 0.5}}]}


def list_faults(fields: dict[str, Any], space: dict[str, Any]) -> list[str]:
    study = make_study(fields, space=space)
    return list(branch.faults(study.space, study.base()))


RATE = {"lr": {"values": [0.01, 0.02]}}
SCHEDULES = {"schedule": {"values": ["wsd", "cosine", "constant"]}}
DECAYS = {"wd_schedule": {"values": ["constant", "linear", "cosine"]}}
PATH = {"growth.ops.0.value": {"values": [0.01, 0.02]}}


@pytest.mark.parametrize(
    ("fields", "space", "messages"),
    [
        pytest.param(WSD, RATE, [], id="wsd, constant weight decay, no growth"),
        pytest.param(WSD, {"schedule": {"values": ["wsd"]}}, [], id="wsd only in the space"),
        pytest.param(
            WSD | {"schedule": "cosine"},
            {"schedule": {"values": ["wsd"]}},
            [],
            id="the space decides, not the base",
        ),
        pytest.param(WSD | {"schedule": "cosine"}, RATE, ["schedule='cosine'"], id="another schedule"),
        pytest.param(WSD | {"schedule": "constant"}, RATE, ["schedule='constant'"], id="no schedule"),
        pytest.param(WSD, RATE | SCHEDULES, ["schedule='cosine'"], id="another schedule in the space"),
        pytest.param(
            WSD | {"wd_schedule": "linear"}, RATE, ["wd_schedule='linear'"], id="falling weight decay"
        ),
        pytest.param(WSD, RATE | DECAYS, ["wd_schedule='linear'"], id="falling weight decay in the space"),
        pytest.param(WSD | {"growth": GROWS}, RATE, ["growth"], id="growth"),
        pytest.param(WSD | {"growth": GROWS}, PATH, ["growth"], id="growth in the space"),
        pytest.param(
            WSD | {"schedule": "cosine", "wd_schedule": "cosine", "growth": GROWS},
            RATE,
            ["schedule='cosine'", "wd_schedule='cosine'", "growth"],
            id="all faults",
        ),
    ],
)
def test_branches_need_a_constant_phase_in_every_trial(
    fields: dict[str, Any], space: dict[str, Any], messages: list[str]
) -> None:
    faults = list_faults(fields, space)
    assert len(faults) == len(messages)
    for fault, message in zip(faults, messages, strict=True):
        assert fault.startswith('rungs.score="branch" with ' + message)
        assert 'write score = "raw" under [rungs], or ' in fault


def test_growth_only_in_the_space_is_a_fault() -> None:
    """The base config may have an empty growth schedule."""
    study = make_study(WSD | {"growth": GROWS}, space=RATE | PATH)
    plain = make_study(WSD).base()
    assert [text.split(",")[0] for text in branch.faults(study.space, plain)] == [
        'rungs.score="branch" with growth'
    ]
