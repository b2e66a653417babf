"""A decay branch: the trial's recipe with an earlier end, which scores a rung."""

from __future__ import annotations

from typing import Any

import pytest
from searching import make_study

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan
from sweeps import branch

TRAIN_TOKENS = 100 * 128 + 1  # 100 steps
WSD = {"schedule": "wsd", "warmup_frac": 0.1, "decay_frac": 0.3}


def make(**fields: Any) -> tuple[TrainConfig, Plan]:
    cfg = make_study(WSD | fields).base()
    return cfg, Plan(cfg, TRAIN_TOKENS)


@pytest.mark.parametrize(
    ("fields", "step", "share", "end", "falls"),
    [
        pytest.param({}, 40, 0.25, 50, 40, id="before the trial's fall"),
        pytest.param({}, 40, 0.1, 44, 40, id="a shorter branch"),
        pytest.param({}, 40, 0.01, 42, 40, id="two steps at least"),
        pytest.param({}, 10, 0.25, 12, 10, id="half a step is rounded to the even number"),
        pytest.param({}, 30, 0.25, 38, 30, id="half a step is rounded up to the even number"),
        pytest.param({}, 70, 0.2, 84, 70, id="where the trial's fall begins"),
        pytest.param({}, 80, 0.1, 88, 70, id="behind the beginning of the trial's fall"),
        pytest.param({}, 96, 0.5, 100, 70, id="never longer than the trial"),
        pytest.param({"decay_frac": 0.9}, 40, 0.25, 50, 10, id="a trial that falls after its warm-up"),
        pytest.param({"decay_frac": 0.0}, 40, 0.25, 50, 40, id="a trial that never falls"),
        pytest.param({"warmup_frac": 0.0, "warmup_iters": 5}, 40, 0.25, 50, 40, id="a warm-up in steps"),
        pytest.param({"warmup_frac": 0.0}, 40, 0.25, 50, 40, id="no warm-up"),
    ],
)
def test_a_branch_ends_a_little_behind_its_rung(
    fields: dict[str, Any], step: int, share: float, end: int, falls: int
) -> None:
    """It has the trial's steps up to its own fall, and the whole fall after them."""
    cfg, plan = make(**fields)
    short = branch.branch_config(cfg, plan, step, share)
    other = Plan(short, TRAIN_TOKENS)
    assert (short.max_steps, other.steps, other.decay_start) == (end, end, falls)
    assert other.warmup_steps == plan.warmup_steps and short.warmup_frac == 0.0
    assert [other.at(at) for at in range(falls)] == [plan.at(at) for at in range(falls)]
    rates = [other.at(at).lr for at in range(falls, end)]
    assert (
        rates == sorted(rates, reverse=True) and rates[0] == cfg.lr and rates[-1] < 2 * cfg.lr / (end - falls)
    )


def test_nothing_else_of_the_trial_changes() -> None:
    cfg, plan = make(dropout=0.1, weight_decay=0.2, seed=5, decay_shape="sqrt", min_lr_frac=0.1)
    short = branch.branch_config(cfg, plan, 40, 0.25)
    changed = {name for name in TrainConfig.model_fields if getattr(short, name) != getattr(cfg, name)}
    assert changed == {"max_steps", "warmup_frac", "warmup_iters", "decay_frac"}
    assert short.decay_frac == pytest.approx(0.2) and short.warmup_iters == 10


@pytest.mark.parametrize(
    ("swa", "step", "expected"),
    [
        pytest.param(0.0, 40, 0.0, id="no average"),
        pytest.param(0.1, 40, 0.1, id="shorter than the fall"),
        pytest.param(0.5, 40, 0.2, id="it begins with the fall"),
        pytest.param(0.5, 80, 18 / 88, id="the trial's own fall has begun"),
    ],
)
def test_an_average_begins_in_the_fall(swa: float, step: int, expected: float) -> None:
    """One that began before would be another trunk."""
    cfg, plan = make(swa=swa)
    short = branch.branch_config(cfg, plan, step, 0.1 if step == 80 else 0.25)
    assert short.swa == pytest.approx(expected)
    assert Plan(short, TRAIN_TOKENS).swa_start >= min(step, plan.decay_start) or not swa


def test_a_branch_that_leaves_its_trunk_too_early_is_a_bug() -> None:
    """Here the plan is that of another trial."""
    cfg, plan = make()
    other = make(lr=cfg.lr * 2)[0]
    with pytest.raises(AssertionError, match="the branch at 40 parts from its trunk at 0, not at 40"):
        branch.branch_config(other, plan, 40, 0.25)


# -- which studies can be scored on branches

GROWS = {"ops": [{"name": "set_lr", "value": 0.01, "trigger": {"budget_frac": 0.5}}]}


def faults(fields: dict[str, Any], space: dict[str, Any]) -> list[str]:
    study = make_study(fields, space=space)
    return list(branch.faults(study.space, study.base()))


RATE = {"lr": {"values": [0.01, 0.02]}}
SCHEDULES = {"schedule": {"values": ["wsd", "cosine", "constant"]}}
DECAYS = {"wd_schedule": {"values": ["constant", "linear", "cosine"]}}
PATH = {"growth.ops.0.value": {"values": [0.01, 0.02]}}


@pytest.mark.parametrize(
    ("fields", "space", "said"),
    [
        pytest.param(WSD, RATE, [], id="wsd, constant weight decay, no growth"),
        pytest.param(WSD, {"schedule": {"values": ["wsd"]}}, [], id="wsd in the space alone"),
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
            WSD | {"wd_schedule": "linear"}, RATE, ["wd_schedule='linear'"], id="weight decay that falls"
        ),
        pytest.param(
            WSD, RATE | DECAYS, ["wd_schedule='linear'"], id="weight decay that falls, in the space"
        ),
        pytest.param(WSD | {"growth": GROWS}, RATE, ["growth"], id="growth"),
        pytest.param(WSD | {"growth": GROWS}, PATH, ["growth"], id="growth in the space"),
        pytest.param(
            WSD | {"schedule": "cosine", "wd_schedule": "cosine", "growth": GROWS},
            RATE,
            ["schedule='cosine'", "wd_schedule='cosine'", "growth"],
            id="all of them",
        ),
    ],
)
def test_all_trials_of_a_rung_can_be_scored_on_branches_or_none(
    fields: dict[str, Any], space: dict[str, Any], said: list[str]
) -> None:
    found = faults(fields, space)
    assert len(found) == len(said)
    for text, part in zip(found, said, strict=True):
        assert (
            text.startswith('rungs.score="branch" with ' + part)
            and 'write score = "raw" under [rungs], or ' in text
        )


def test_growth_in_the_space_alone_is_a_fault_too() -> None:
    """A space is judged beside its base, whose schedule may be empty."""
    study = make_study(WSD | {"growth": GROWS}, space=RATE | PATH)
    plain = make_study(WSD).base()
    assert [text.split(",")[0] for text in branch.faults(study.space, plain)] == [
        'rungs.score="branch" with growth'
    ]
