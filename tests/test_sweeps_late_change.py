"""Tests late changes: runs of the base that change to a recipe, and share the steps before the change."""

from __future__ import annotations

from typing import Any

import pytest
from searching import make_study

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError
from mainrun.files.hashing import sha256_json
from mainrun.plan.plan import Plan
from mainrun.store.lineage import chain
from sweeps.late_change import late_change
from sweeps.space import with_values

TRAIN_TOKENS = 10 * 128 + 1
BASE: dict[str, Any] = {
    "schedule": "wsd",
    "epochs": 20,
    "warmup_frac": 0.1,
    "decay_frac": 0.3,
    "lr": 0.01,
    "weight_decay": 0.1,
    "dropout": 0.0,
    "batch_size": 4,
}
RECIPE: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2, "dropout": 0.2, "decay_frac": 0.4}


def plan_of(cfg: TrainConfig) -> Plan:
    return Plan(cfg, TRAIN_TOKENS)


def make(share: float = 0.5, base: dict[str, Any] | None = None, **values: Any) -> tuple[Plan, Plan, Plan]:
    """Return the plans of the base, of the recipe's whole run, and of the late change."""
    cfg = make_study(BASE | (base or {})).base()
    whole, recipe = plan_of(cfg), plan_of(with_values(cfg, values))
    return whole, recipe, plan_of(late_change(whole, recipe, share))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.6])
@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_the_base_is_trained_before_the_change_and_the_recipe_after_it(share: float, batch_size: int) -> None:
    base, recipe, late = make(share, **RECIPE, batch_size=batch_size)
    first = round(share * base.steps)
    assert late.segments[-1].first == first
    assert chain("0" * 64, late)[: first + 1] == chain("0" * 64, with_late_decay(base))[: first + 1]
    decay = recipe.steps - recipe.decay_start
    assert late.steps - late.decay_start == decay and late.decay_start >= first
    after = [recipe.at(recipe.steps - left)._asdict() for left in range(decay, 0, -1)]
    assert [late.at(late.steps - left)._asdict() for left in range(decay, 0, -1)] == after
    assert abs(late.tokens(late.steps) - base.tokens(base.steps)) < 128


def with_late_decay(plan: Plan) -> Plan:
    """Return the plan of the base with the shortest decay, which no late change precedes."""
    return plan_of(with_values(plan.cfg, {"decay_frac": 0.01}))


def test_only_the_fields_that_differ_are_changed() -> None:
    _, _, late = make(lr=0.03, min_lr_frac=0.1)
    assert [op.name for op in late.cfg.growth.ops] == ["set_lr"]
    base = make_study(BASE).base()
    changed = {name for name in TrainConfig.model_fields if getattr(late.cfg, name) != getattr(base, name)}
    assert changed == {"growth", "min_lr_frac", "warmup_frac", "warmup_iters"}


def test_the_weights_are_averaged_only_after_the_change() -> None:
    _, _, late = make(base={"swa": 0.7}, lr=0.03)
    assert late.swa_start >= late.segments[-1].first


@pytest.mark.parametrize(
    ("base", "values", "message"),
    [
        ({}, {"lr": 0.03, "decay_frac": 0.6}, "decay_frac=0.6 begins to decay before the change"),
        ({}, {"decay_frac": 0.4}, "differs from the base only from the decay on"),
        ({"warmup_iters": 200, "warmup_frac": 0.0}, {"lr": 0.03}, "warm-up of 200 steps reaches the change"),
    ],
)
def test_a_recipe_without_a_late_change_is_refused(
    base: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(base=base, **values)


SPACE: dict[str, Any] = {"lr": {"low": 1e-3, "high": 0.1, "log": True}}
OP: dict[str, Any] = {"name": "set_lr", "value": 0.01, "trigger": {"step": 5}}


@pytest.mark.parametrize(
    ("late", "fields", "space", "message"),
    [
        (0.0, {}, {}, "sampler.late=0.0 is not allowed"),
        (1.0, {}, {}, "sampler.late=1.0 is not allowed"),
        (0.5, {}, {"beta2": {"low": 0.9, "high": 0.999}}, "space.beta2: a run cannot change beta2 halfway"),
        (0.5, {}, {"schedule": {"values": ["wsd", "cosine"]}}, "a run cannot change schedule halfway"),
        (0.5, {"growth": {"version": 2, "ops": [OP]}}, {}, "sampler.late=0.5 with growth in the base"),
        (0.5, {"max_steps": 50}, {}, "sampler.late=0.5 with max_steps"),
        (0.5, {"schedule": "cosine"}, {}, "with schedule='cosine': only wsd"),
        (0.5, {"warmup_frac": 0.5}, {}, "sampler.late=0.5 with warmup_frac=0.5"),
        (0.5, {"decay_frac": 0.6}, {}, "write a share of at most 0.4"),
        (0.7, {}, {"decay_frac": {"values": [0.4, 0.6]}}, "write a share of at most 0.6"),
        (0.7, {}, {"decay_frac": {"low": 0.4, "high": 0.6}}, "write a share of at most 0.6"),
    ],
)
def test_a_study_that_cannot_change_late_is_refused(
    late: float, fields: dict[str, Any], space: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match="cannot be searched") as error:
        make_study(
            BASE | fields,
            space=SPACE | space,
            sampler={"name": "frugal", "late": late, "horizons": [1.0]},
        )
    assert message in str(error.value)
    fixes = ("remove sampler.late", "write a ", "greater than 0", "less than 1")
    assert any(fix in str(error.value) for fix in fixes)


def test_fields_with_an_op_and_fields_of_the_decay_are_allowed() -> None:
    space = SPACE | {
        "timescale": {"low": 0.01, "high": 1.0, "log": True},
        "dropout": {"low": 0.0, "high": 0.3},
        "batch_size": {"values": [2, 4, 8]},
        "decay_frac": {"values": [0.2, 0.8]},
        "min_lr_frac": {"low": 0.0, "high": 0.2},
    }
    study = make_study(BASE, space=space, sampler={"name": "frugal", "late": 0.5})
    assert study.sampler.late == 0.5


def test_other_samplers_have_no_late_changes() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.late with sampler\.name='tpe': only frugal reads it"):
        make_study(sampler={"name": "tpe", "late": 0.5})


def test_the_digest_of_a_study_without_late_changes_is_that_of_earlier_versions() -> None:
    plain = make_study(BASE, sampler={"name": "frugal"})
    late = make_study(BASE, sampler={"name": "frugal", "late": 0.5})
    assert plain.digest != late.digest
    data = plain.model_dump(exclude=plain.FREE, mode="json")
    assert "late" in data["sampler"]
    data["sampler"] = {k: v for k, v in data["sampler"].items() if k not in ("late", "generation")}
    assert plain.digest == sha256_json(data)
