"""The search space: what may be searched, what is refused and with which words, and a trial's config from its values."""

from __future__ import annotations

import math
from typing import Any

import pytest
from searching import FIELDS, TRAIN_TOKENS, make_study

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError
from mainrun.plan.plan import Plan
from sweeps.space import (
    DERIVED,
    NOT_SEARCHABLE,
    Choice,
    Range,
    active_parameters,
    faults,
    searchable_names,
    trial_config,
    with_values,
)

LR: dict[str, Any] = {"low": 1e-3, "high": 0.1}
OPS = [
    {"name": "set_lr", "value": 0.01, "trigger": {"budget_frac": 0.5}},
    {"name": "set_dropout", "value": 0.1, "trigger": {"budget_frac": 0.75}},
]
OPTIMIZERS = {"values": ["adamw", "sgd"]}


def base(**fields: Any) -> TrainConfig:
    return from_dict(FIELDS | {"preset": "baseline"} | fields)


def parameter(data: dict[str, Any]) -> Range | Choice:
    return Choice(**data) if "values" in data else Range(**data)


def wrong(space: dict[str, dict[str, Any]], **fields: Any) -> list[str]:
    return list(
        faults({name: parameter(data) for name, data in space.items()}, base(optimizer="adamw", **fields))
    )


# -- what must be held still


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("seed", "a seed is drawn, not chosen: a study that may choose it fits noise"),
        ("epochs", "the epochs are the task's budget"),
        ("max_steps", "the steps are the task's budget"),
        ("corpus", "the data is the task's"),
        ("num_titles", "the data is the task's"),
        ("shuffle", "the data is the task's"),
        ("val_frac", "the data is the task's"),
        ("dev_frac", "the data is the task's"),
        ("tokenizer_fit", "the data is the task's"),
        ("official_geometry", "the geometry of the evaluation is the task's"),
        ("device", "the machine is the study's, under [set] or threads"),
        ("threads", "the machine is the study's, under [set] or threads"),
        ("compile", "the machine is the study's, under [set] or threads"),
        ("attention", "the machine is the study's, under [set] or threads"),
        ("dtype", "the machine is the study's, under [set] or threads"),
    ],
)
def test_what_a_comparison_holds_still_is_never_searched(name: str, reason: str) -> None:
    """One word on each, and none on its values."""
    assert wrong({name: {"values": ["anything"]}}) == [f"space.{name}: {reason}; remove it."]
    assert NOT_SEARCHABLE[name] == reason


def test_nothing_else_is_held_still() -> None:
    assert len(NOT_SEARCHABLE) == 15


@pytest.mark.parametrize(
    "name", ["log_every", "eval_per_epoch", "eval_interval", "checkpoint_every", "preset"]
)
def test_what_changes_nothing_that_is_trained_is_not_searched(name: str) -> None:
    assert wrong({name: {"values": [1, 2]}}) == [f"space.{name} changes nothing that is trained; remove it."]


# -- what is refused


@pytest.mark.parametrize(
    ("space", "said"),
    [
        # names
        pytest.param({}, ["space is empty; write at least one [space.FIELD]."], id="empty"),
        pytest.param({"lr": LR}, [], id="a field"),
        pytest.param({"timescale": {"low": 1.0, "high": 2.0}}, [], id="a derived one"),
        pytest.param(
            {"dropuot": LR},
            [
                "space.dropuot is no config field (did you mean 'dropout'?); `mainrun presets --fields` lists them."
            ],
            id="misspelt",
        ),
        pytest.param(
            {"timescales": LR},
            ["space.timescales is no config field (did you mean 'timescale'?)"],
            id="a derived one, misspelt",
        ),
        pytest.param({"qqqq": LR}, ["space.qqqq is no config field; `mainrun"], id="like no field"),
        pytest.param({"lr.high": LR}, ["space.lr.high is no config field"], id="a path below a plain field"),
        pytest.param(
            {"growth": {"values": [1, 2]}},
            ["space.growth: name what of the schedule, like growth.ops.0.trigger."],
            id="growth whole",
        ),
        pytest.param(
            {"timescale": {"low": 1.0, "high": 2.0}, "weight_decay": {"low": 0.1, "high": 0.2}},
            ["space.timescale stands for weight_decay, which is in the space too; keep one of them."],
            id="a derived one beside what it stands for",
        ),
        # choices
        pytest.param({"dropout": {"values": [0.1, 0.2]}}, [], id="values"),
        pytest.param({"dropout": {"values": [0.1]}}, [], id="one value"),
        pytest.param(
            {"dropout": {"values": []}},
            ["space.dropout.values is empty; write at least two values."],
            id="no values",
        ),
        pytest.param(
            {"dropout": {"values": [0.1, 0.2, 0.1]}},
            ["space.dropout.values=[0.1, 0.2, 0.1] has one of them twice; keep each once."],
            id="twice",
        ),
        pytest.param({"n_kv_head": {"values": [1, 2]}}, [], id="whole numbers"),
        pytest.param({"bias": {"values": [True, False]}}, [], id="true or false"),
        pytest.param({"optimizer": OPTIMIZERS}, [], id="texts"),
        pytest.param(
            {"dropout": {"values": [0.1, None]}},
            ["space.dropout.values holds None; write numbers, texts, true or false."],
            id="none",
        ),
        pytest.param(
            {"dropout": {"values": [[1], 0.1]}},
            ["space.dropout.values holds [1]; write numbers"],
            id="a list",
        ),
        pytest.param(
            {"dropout": {"values": [0.1, 7.0, 8.0]}},
            ["space.dropout: 7.0 is no value of it: dropout=7.0"],
            id="the first that no config takes",
        ),
        pytest.param(
            {"optimizer": {"values": ["adamw", "adam"]}},
            ["space.optimizer: 'adam' is no value of it"],
            id="a text that no config takes",
        ),
        # ranges
        pytest.param({"dropout": {"low": 0.0, "high": 0.9}}, [], id="a range"),
        pytest.param(
            {"dropout": {"low": 0.0, "high": 1.0}},
            ["space.dropout: 1.0 is no value of it: dropout=1.0"],
            id="high that no config takes",
        ),
        pytest.param(
            {"dropout": {"low": -0.5, "high": 0.5}},
            ["space.dropout: -0.5 is no value of it"],
            id="low that no config takes",
        ),
        pytest.param(
            {"lr": {"low": 0.2, "high": 0.1}}, ["space.lr: low=0.2 > high=0.1; swap them."], id="swapped"
        ),
        pytest.param(
            {"lr": {"low": 0.1, "high": 0.1}},
            ["space.lr: low and high are both 0.1, there is nothing to search; write it under [set]."],
            id="a point",
        ),
        pytest.param(
            {"lr": {"low": math.nan, "high": 0.1}},
            ["space.lr: low=nan high=0.1 are no numbers; write finite ones."],
            id="NaN",
        ),
        pytest.param(
            {"lr": {"low": 0.1, "high": math.inf}},
            ["space.lr: low=0.1 high=inf are no numbers; write finite ones."],
            id="infinite",
        ),
        pytest.param({"lr": {"low": 1e-3, "high": 0.1, "log": True}}, [], id="by its logarithm"),
        pytest.param(
            {"dropout": {"low": 0, "high": 0.1, "log": True}},
            ["space.dropout: log=true with low=0; a logarithm needs low > 0."],
            id="log of 0",
        ),
        pytest.param(
            {"dropout": {"low": -0.1, "high": 0.1, "log": True}},
            ["space.dropout: log=true with low=-0.1; a logarithm needs low > 0."],
            id="log below 0",
        ),
        # steps
        pytest.param({"dropout": {"low": 0.0, "high": 0.4, "step": 0.4}}, [], id="one step"),
        pytest.param(
            {"dropout": {"low": 0.0, "high": 0.4, "step": 0.5}},
            [
                "space.dropout: step=0.5 is wider than from low=0 to high=0.4; write a smaller step, or values."
            ],
            id="a step that is too wide",
        ),
        pytest.param(
            {"dropout": {"low": 0.2, "high": 0.4, "step": 0.5}},
            [
                "space.dropout: step=0.5 is wider than from low=0.2 to high=0.4; write a smaller step, or values."
            ],
            id="a step wider than a range above 0",
        ),
        pytest.param(
            {"dropout": {"low": 0.0, "high": 0.4, "step": 0.0}},
            ["space.dropout: step=0; write a step above 0, and no log."],
            id="step 0",
        ),
        pytest.param(
            {"dropout": {"low": 0.0, "high": 0.4, "step": -0.1}},
            ["space.dropout: step=-0.1; write a step above 0"],
            id="a negative step",
        ),
        pytest.param(
            {"lr": {"low": 0.1, "high": 0.4, "step": 0.1, "log": True}},
            ["space.lr: step=0.1 with log=true; write a step above 0, and no log."],
            id="a step of a logarithm",
        ),
        pytest.param(
            {"lr": {"low": 0.1, "high": 0.4, "step": 0.5, "log": True}},
            ["space.lr: step=0.5 with log=true"],
            id="a wide step of a logarithm",
        ),
        pytest.param(
            {"lr": {"low": 0.4, "high": 0.1, "step": 0.5}},
            ["space.lr: low=0.4 > high=0.1"],
            id="a step of a swapped range",
        ),
        # times
        pytest.param({"timescale": {"values": [0.5, 2]}}, [], id="times"),
        pytest.param(
            {"timescale": {"values": [0.0, 1.0]}},
            ["space.timescale is a time; its values must be above 0."],
            id="no time",
        ),
        pytest.param(
            {"timescale": {"values": [1.0, -1.0]}}, ["space.timescale is a time"], id="a negative time"
        ),
        pytest.param(
            {"timescale": {"values": [1.0, "a"]}}, ["space.timescale is a time"], id="a text for a time"
        ),
        pytest.param(
            {"timescale": {"low": 0.0, "high": 1.0}}, ["space.timescale is a time"], id="times from 0 on"
        ),
    ],
)
def test_what_is_wrong_with_a_space(space: dict[str, Any], said: list[str]) -> None:
    """One sentence for each fault; a whole one where it ends with a full stop."""
    found = wrong(space)
    assert len(found) == len(said), found
    for text, part in zip(found, said, strict=True):
        assert text == part if part.endswith(".") and not part.endswith("trigger.") else text.startswith(part)


def test_every_fault_of_a_space_is_named() -> None:
    """In the order of the space; a parameter that has a fault of its own does not hide the next one."""
    found = wrong(
        {
            "seed": {"values": [1]},
            "nothing": LR,
            "log_every": LR,
            "lr": {"low": 0.2, "high": 0.1, "log": True, "step": 0.1},
            "dropout": {"values": []},
        }
    )
    assert [text.split(" ")[0].rstrip(":") for text in found] == [
        "space.seed", "space.nothing", "space.log_every", "space.lr", "space.lr", "space.dropout.values",
    ]  # fmt: skip


def test_values_that_only_disagree_with_another_field_are_left_to_the_trials() -> None:
    """The space may settle it. What names the field itself is a fault of its values."""
    drops = {"rdrop": 1.0, "dropout": 0.0, "attn_dropout": 0.1}
    assert wrong({"attn_dropout": {"values": [0.0, 0.1]}}, **drops) == []
    (text,) = wrong({"rdrop": {"values": [0.0, 1.0]}}, dropout=0.0)
    assert text.startswith("space.rdrop: 1.0 is no value of it: rdrop=1.0 without any dropout")
    (text,) = wrong({"ema": {"values": [0.0, 0.9]}}, swa=0.5)
    assert text.startswith("space.ema: 0.9 is no value of it: ema=0.9 and swa=0.5 are both on")


def test_a_schedule_that_does_not_go_with_a_value_is_left_to_the_trials() -> None:
    """The message names the field, but it is the schedule that is at fault."""
    growth = {"version": 2, "ops": [{"name": "set_batch_size", "value": 12, "trigger": {"budget_frac": 0.5}}]}
    with pytest.raises(ConfigError, match=r"^growth: ops\[0\] .*grad_accum"):
        with_values(base(growth=growth), {"grad_accum": 8})
    assert wrong({"grad_accum": {"values": [1, 8]}}, growth=growth) == []


# -- conditions


@pytest.mark.parametrize(
    ("when", "more", "said"),
    [
        pytest.param({"optimizer": ["sgd"]}, {"optimizer": OPTIMIZERS}, [], id="a value of the parent"),
        pytest.param({"optimizer": ["adamw"]}, {}, [], id="the base's own value"),
        pytest.param({"optimizer": ["sgd", "adamw"]}, {}, [], id="the base's own value among others"),
        pytest.param(
            {"optimizer": ["sgd"]},
            {},
            [
                "optimizer is 'adamw' in every trial, never one of ['sgd']; search it too, or remove space.momentum."
            ],
            id="never in the base",
        ),
        pytest.param(
            {"optimizre": ["sgd"]},
            {},
            ["optimizre is no config field (did you mean 'optimizer'?); name one that is."],
            id="misspelt",
        ),
        pytest.param(
            {"optimizer": ["muon"]},
            {"optimizer": OPTIMIZERS},
            ["optimizer is never 'muon'; its values: ['adamw', 'sgd']."],
            id="never",
        ),
        pytest.param(
            {"optimizer": ["sgd", "muon"]},
            {"optimizer": OPTIMIZERS},
            ["optimizer is never 'muon'"],
            id="one of two never",
        ),
        pytest.param(
            {"optimizer": ["muon", "lion"]},
            {"optimizer": OPTIMIZERS},
            ["optimizer is never 'muon'"],
            id="two never",
        ),
        pytest.param(
            {"optimizer": []},
            {"optimizer": OPTIMIZERS},
            ["optimizer has no value for which it holds; list at least one."],
            id="no value",
        ),
        pytest.param(
            {"lr": [0.01]},
            {"lr": LR},
            ["lr is a range; a condition needs a parameter with values."],
            id="a range",
        ),
        pytest.param(
            {"optimizer": ["sgd"]},
            {"optimizer": OPTIMIZERS | {"when": {"bias": [True]}}, "bias": {"values": [True, False]}},
            ["optimizer is conditional itself; let space.momentum depend on what optimizer depends on."],
            id="conditional itself",
        ),
        pytest.param(
            {"optimizer": ["muon"], "lr": [0.1]},
            {"optimizer": OPTIMIZERS, "lr": LR},
            ["optimizer is never 'muon'", "lr is a range"],
            id="two of them",
        ),
    ],
)
def test_what_is_wrong_with_a_condition(
    when: dict[str, list[Any]], more: dict[str, Any], said: list[str]
) -> None:
    found = wrong({"momentum": {"low": 0.1, "high": 0.9, "when": when}} | more)
    assert len(found) == len(said), found
    for text, part in zip(found, said, strict=True):
        assert text.startswith("space.momentum.when: " + part)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"optimizer": "sgd"}, {"optimizer", "momentum", "lr"}),
        ({"optimizer": "adamw"}, {"optimizer", "beta2", "lr"}),
        ({}, {"optimizer", "beta2", "lr"}),
        ({"optimizer": "muon"}, {"optimizer", "lr"}),
        ({"optimizer": "sgd", "schedule": "wsd"}, {"optimizer", "momentum", "both", "lr"}),
    ],
    ids=["sgd", "adamw", "the base", "muon", "two conditions"],
)
def test_the_parameters_whose_conditions_hold(values: dict[str, Any], names: set[str]) -> None:
    """Of the base where the space has no value; all conditions of a parameter."""
    space = {
        "optimizer": Choice(values=["adamw", "sgd", "muon"]),
        "momentum": Range(low=0.1, high=0.9, when={"optimizer": ["sgd"]}),
        "beta2": Range(low=0.9, high=0.99, when={"optimizer": ["adamw"]}),
        "both": Range(low=0.1, high=0.2, when={"optimizer": ["sgd"], "schedule": ["wsd"]}),
        "lr": Range(low=0.1, high=0.2),
    }
    found = active_parameters(space, values, base(optimizer="adamw"))
    assert set(found) == names and all(found[name] is space[name] for name in names)
    assert list(found) == [name for name in space if name in names]


# -- paths into the schedule of growth


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("growth.ops.0.value", ""),
        ("growth.ops.1.trigger.budget_frac", ""),
        ("growth.ops.2.value", "the preset's schedule has no '2' in ops; there: 0..1"),
        ("growth.ops.x.value", "the preset's schedule has no 'x' in ops; there: 0..1"),
        ("growth.ops.-1.value", "the preset's schedule has no '-1' in ops; there: 0..1"),
        ("growth.op.0", "the preset's schedule has no 'op' in growth; there: "),
        ("growth.ops.0.value.more", "the preset's schedule has no 'more' in ops.0.value; there: nothing"),
        (
            "growth.ops.0.trigger.step",
            "the preset's schedule has no 'step' in ops.0.trigger; there: budget_frac",
        ),
    ],
)
def test_a_path_leads_to_something_in_the_schedule(name: str, said: str) -> None:
    values = {"low": 0.01, "high": 0.02} if name.endswith("value") else {"low": 0.55, "high": 0.9}
    found = wrong({name: values}, growth={"version": 2, "ops": OPS})
    assert len(found) == bool(said)
    assert all(text.startswith(f"space.{name}: {said}") and text.endswith(".") for text in found)


def test_a_path_into_no_schedule_says_what_there_is() -> None:
    (text,) = wrong({"growth.ops.0.value": {"low": 0.01, "high": 0.02}})
    assert text.startswith(
        "space.growth.ops.0.value: the preset's schedule has no '0' in ops; there: nothing"
    )


def test_a_value_that_the_schedule_does_not_take_is_named() -> None:
    (text,) = wrong({"growth.ops.0.value": {"values": [0.01, -5.0]}}, growth={"version": 2, "ops": OPS})
    assert text.startswith("space.growth.ops.0.value: -5.0 is no value of it: growth: ops[0]")


# -- a trial's config


def test_known_fields_are_those_of_the_config_and_the_derived_ones() -> None:
    assert searchable_names() == [*TrainConfig.model_fields, "timescale"]
    assert DERIVED == {"timescale": "weight_decay"}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lr": 0.05},
        {"lr": 0.05, "optimizer": "sgd", "momentum": 0.5},
        {"frozen": [0]},
        {"attn_dropout": 0.2},
    ],
    ids=str,
)
def test_a_config_from_its_values(values: dict[str, Any]) -> None:
    """All other fields stay, the preset too."""
    start = base(optimizer="adamw", dropout=0.1)
    found = with_values(start, values)
    expected = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    assert found == start.model_copy(update=expected)
    assert found.preset == "baseline" and with_values(start, {}) == start


def test_a_path_changes_the_schedule_alone() -> None:
    start = base(growth={"version": 2, "ops": OPS})
    found = with_values(
        start, {"growth.ops.0.value": 0.02, "growth.ops.1.trigger.budget_frac": 0.8, "lr": 0.05}
    )
    ops = found.growth.data()["ops"]
    assert (ops[0]["value"], ops[1]["trigger"]) == (0.02, {"budget_frac": 0.8})
    assert (ops[1]["value"], ops[0]["trigger"]) == (0.1, {"budget_frac": 0.5})
    assert found.lr == 0.05 and start.growth.data()["ops"][0]["value"] == 0.01
    assert with_values(start, {"lr": 0.05}).growth == start.growth


def test_an_item_of_a_list_in_the_schedule_is_changed_in_place() -> None:
    ops = [{"name": "stack_layers", "value": [0, 0], "init": "identity", "trigger": {"budget_frac": 0.5}}]
    start = base(growth={"version": 2, "ops": ops}, n_layer=1)
    found = with_values(start, {"growth.ops.0.trigger.budget_frac": 0.25})
    assert found.growth.data()["ops"][0]["trigger"] == {"budget_frac": 0.25}
    assert with_values(start, {"growth.ops.0.value.1": 0}).growth == start.growth
    with pytest.raises(ConfigError):
        with_values(start, {"growth.ops.0.value.1": 7})


def test_values_that_do_not_go_together_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="grad_accum=8 does not divide batch_size=12"):
        with_values(base(), {"batch_size": 12, "grad_accum": 8})


@pytest.mark.parametrize(("lr", "timescale"), [(0.01, 2.0), (0.02, 2), (0.01, 0.5)])
def test_a_timescale_is_the_weight_decay_that_forgets_in_it(lr: float, timescale: float) -> None:
    """1 / (lr * timescale * steps), of the trial's own rate and steps."""
    start = base(batch_size=16)
    found = trial_config(start, {"lr": lr, "timescale": timescale}, TRAIN_TOKENS)
    steps = Plan(start, TRAIN_TOKENS).steps
    assert steps == 5
    assert found == start.model_copy(update={"lr": lr, "weight_decay": 1 / (lr * timescale * steps)})


def test_a_timescale_counts_the_steps_of_the_trial() -> None:
    found = trial_config(
        base(optimizer="adamw"), {"timescale": 2.0, "batch_size": 16, "lr": 0.1}, TRAIN_TOKENS
    )
    assert found.weight_decay == pytest.approx(1 / (0.1 * 2 * 5))


def test_without_a_timescale_nothing_is_derived() -> None:
    assert trial_config(base(), {"lr": 0.05}, None) == with_values(base(), {"lr": 0.05})


# -- how a parameter may be written


@pytest.mark.parametrize(
    ("written", "ok"),
    [
        ({"low": 0.1, "high": 0.2}, True),
        ({"low": 1, "high": 2, "step": 1, "log": False, "when": {"bias": [True]}}, True),
        ({"values": [1, "a", True, 0.5], "when": {"bias": [True]}}, True),
        ({"low": 0.1}, False),
        ({"high": 0.1}, False),
        ({"low": 0.1, "high": 0.2, "steps": 0.1}, False),
        ({"low": "0.1", "high": 0.2}, False),
        ({"low": 0.1, "high": 0.2, "log": "yes"}, False),
        ({"low": 0.1, "high": 0.2, "log": 1}, False),
        ({"low": 0.1, "high": 0.2, "values": [0.1]}, False),
        ({"values": "ab"}, False),
        ({"values": ["a"], "log": True}, False),
        ({"values": ["a"], "when": {"bias": True}}, False),
    ],
    ids=str,
)
def test_how_a_parameter_is_written(written: dict[str, Any], ok: bool) -> None:
    space = {"lr": written}
    if ok and "values" not in written and isinstance(written["low"], float):
        assert make_study(space=space).space["lr"] == Range(**written)
        return
    kind = Choice if "values" in written and "low" not in written else Range
    if ok:
        assert kind(**written).model_dump(exclude_unset=True) == written
        return
    with pytest.raises(ValueError, match="validation error"):
        kind(**written)


def test_a_parameter_is_a_value() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Range(low=1, high=2).low = 0
    with pytest.raises(ValueError, match="frozen"):
        Choice(values=[1]).values = []
