"""Tests the search space: the messages about its faults, and the config of a trial with given values."""

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


def list_faults(space: dict[str, dict[str, Any]], **fields: Any) -> list[str]:
    return list(
        faults({name: parameter(data) for name, data in space.items()}, base(optimizer="adamw", **fields))
    )


# -- fields that cannot be searched


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("seed", "the seed is not a hyperparameter, and a search over seeds would fit noise"),
        ("epochs", "the number of epochs is fixed by the task"),
        ("max_steps", "the number of steps is fixed by the task"),
        ("corpus", "the data is fixed by the task"),
        ("num_titles", "the data is fixed by the task"),
        ("shuffle", "the data is fixed by the task"),
        ("val_frac", "the data is fixed by the task"),
        ("dev_frac", "the data is fixed by the task"),
        ("documents", "the data is fixed by the task"),
        ("tokenizer_fit", "the data is fixed by the task"),
        ("start", "runs from trained weights are not compared with runs from random weights"),
        ("official_geometry", "the geometry of the evaluation is fixed by the task"),
        ("device", "the machine is the same for all trials; set it under [set] or with threads"),
        ("threads", "the machine is the same for all trials; set it under [set] or with threads"),
        ("compile", "the machine is the same for all trials; set it under [set] or with threads"),
        ("attention", "the machine is the same for all trials; set it under [set] or with threads"),
        ("dtype", "the machine is the same for all trials; set it under [set] or with threads"),
    ],
)
def test_fields_that_must_be_equal_in_all_trials_are_refused(name: str, reason: str) -> None:
    """The fields are refused without a check of their values."""
    assert list_faults({name: {"values": ["anything"]}}) == [f"space.{name}: {reason}; remove it."]
    assert NOT_SEARCHABLE[name] == reason


def test_all_other_fields_can_be_searched() -> None:
    assert len(NOT_SEARCHABLE) == 17


@pytest.mark.parametrize(
    "name", ["log_every", "eval_per_epoch", "eval_interval", "checkpoint_every", "token_scores", "preset"]
)
def test_fields_without_an_effect_are_refused(name: str) -> None:
    assert list_faults({name: {"values": [1, 2]}}) == [
        f"space.{name} has no effect on the training; remove it."
    ]


# -- faults


@pytest.mark.parametrize(
    ("space", "messages"),
    [
        # names
        pytest.param({}, ["space is empty; write at least one [space.FIELD]."], id="empty"),
        pytest.param({"lr": LR}, [], id="a field"),
        pytest.param({"timescale": {"low": 1.0, "high": 2.0}}, [], id="a derived parameter"),
        pytest.param(
            {"dropuot": LR},
            [
                "space.dropuot is not a config field (did you mean 'dropout'?); "
                "`mainrun presets --fields` lists them."
            ],
            id="misspelt",
        ),
        pytest.param(
            {"timescales": LR},
            ["space.timescales is not a config field (did you mean 'timescale'?)"],
            id="a derived parameter, misspelt",
        ),
        pytest.param({"qqqq": LR}, ["space.qqqq is not a config field; `mainrun"], id="unlike any field"),
        pytest.param(
            {"lr.high": LR}, ["space.lr.high is not a config field"], id="a path below a plain field"
        ),
        pytest.param(
            {"growth": {"values": [1, 2]}},
            ["space.growth: name a value of the schedule, such as growth.ops.0.trigger."],
            id="the whole schedule",
        ),
        pytest.param(
            {"timescale": {"low": 1.0, "high": 2.0}, "weight_decay": {"low": 0.1, "high": 0.2}},
            ["space.timescale sets weight_decay, which is also in the space; keep one of them."],
            id="a derived parameter with the field that it sets",
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
            ["space.dropout.values=[0.1, 0.2, 0.1] has a value twice; keep each value once."],
            id="twice",
        ),
        pytest.param({"n_kv_head": {"values": [1, 2]}}, [], id="whole numbers"),
        pytest.param({"bias": {"values": [True, False]}}, [], id="true or false"),
        pytest.param({"optimizer": OPTIMIZERS}, [], id="strings"),
        pytest.param(
            {"dropout": {"values": [0.1, None]}},
            ["space.dropout.values contains None; write numbers, strings, true or false."],
            id="none",
        ),
        pytest.param(
            {"dropout": {"values": [[1], 0.1]}},
            ["space.dropout.values contains [1]; write numbers"],
            id="a list",
        ),
        pytest.param(
            {"dropout": {"values": [0.1, 7.0, 8.0]}},
            ["space.dropout: 7.0 is not allowed: dropout=7.0"],
            id="only the first invalid value",
        ),
        pytest.param(
            {"optimizer": {"values": ["adamw", "adam"]}},
            ["space.optimizer: 'adam' is not allowed"],
            id="an invalid string",
        ),
        # ranges
        pytest.param({"dropout": {"low": 0.0, "high": 0.9}}, [], id="a range"),
        pytest.param(
            {"dropout": {"low": 0.0, "high": 1.0}},
            ["space.dropout: 1.0 is not allowed: dropout=1.0"],
            id="an invalid high",
        ),
        pytest.param(
            {"dropout": {"low": -0.5, "high": 0.5}},
            ["space.dropout: -0.5 is not allowed"],
            id="an invalid low",
        ),
        pytest.param(
            {"lr": {"low": 0.2, "high": 0.1}}, ["space.lr: low=0.2 > high=0.1; swap them."], id="swapped"
        ),
        pytest.param(
            {"lr": {"low": 0.1, "high": 0.1}},
            ["space.lr: low and high are both 0.1: there is nothing to search; write it under [set]."],
            id="a point",
        ),
        pytest.param(
            {"lr": {"low": math.nan, "high": 0.1}},
            ["space.lr: low=nan high=0.1 must be finite numbers."],
            id="NaN",
        ),
        pytest.param(
            {"lr": {"low": 0.1, "high": math.inf}},
            ["space.lr: low=0.1 high=inf must be finite numbers."],
            id="infinite",
        ),
        pytest.param({"lr": {"low": 1e-3, "high": 0.1, "log": True}}, [], id="a logarithmic range"),
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
                "space.dropout: step=0.5 is larger than the range from low=0 to high=0.4; "
                "write a smaller step, or values."
            ],
            id="a step that is too large",
        ),
        pytest.param(
            {"dropout": {"low": 0.2, "high": 0.4, "step": 0.5}},
            [
                "space.dropout: step=0.5 is larger than the range from low=0.2 to high=0.4; "
                "write a smaller step, or values."
            ],
            id="a step that is too large for a range above 0",
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
            id="a large step of a logarithm",
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
            id="a time of 0",
        ),
        pytest.param(
            {"timescale": {"values": [1.0, -1.0]}}, ["space.timescale is a time"], id="a negative time"
        ),
        pytest.param(
            {"timescale": {"values": [1.0, "a"]}}, ["space.timescale is a time"], id="a string as a time"
        ),
        pytest.param(
            {"timescale": {"low": 0.0, "high": 1.0}}, ["space.timescale is a time"], id="a range from 0"
        ),
    ],
)
def test_the_faults_of_a_space(space: dict[str, Any], messages: list[str]) -> None:
    """Each fault gives one message.

    An expected message without a full stop is only the start of a message.
    """
    faults = list_faults(space)
    assert len(faults) == len(messages), faults
    for fault, message in zip(faults, messages, strict=True):
        if message.endswith(".") and not message.endswith("trigger."):
            assert fault == message
        else:
            assert fault.startswith(message)


def test_every_fault_of_a_space_is_named() -> None:
    """Faults are listed in the order of the fields in the space."""
    faults = list_faults(
        {
            "seed": {"values": [1]},
            "nothing": LR,
            "log_every": LR,
            "lr": {"low": 0.2, "high": 0.1, "log": True, "step": 0.1},
            "dropout": {"values": []},
        }
    )
    assert [text.split(" ")[0].rstrip(":") for text in faults] == [
        "space.seed", "space.nothing", "space.log_every", "space.lr", "space.lr", "space.dropout.values",
    ]  # fmt: skip


def test_values_that_conflict_with_another_field_are_not_faults() -> None:
    """Other fields of the space may resolve a conflict between two fields.

    An error that names the searched field itself is a fault of its values.
    """
    drops = {"rdrop": 1.0, "dropout": 0.0, "attn_dropout": 0.1}
    assert list_faults({"attn_dropout": {"values": [0.0, 0.1]}}, **drops) == []
    (text,) = list_faults({"rdrop": {"values": [0.0, 1.0]}}, dropout=0.0)
    assert text.startswith("space.rdrop: 1.0 is not allowed: rdrop=1.0 needs dropout")
    (text,) = list_faults({"ema": {"values": [0.0, 0.9]}}, swa=0.5)
    assert text.startswith("space.ema: 0.9 is not allowed: ema=0.9 and swa=0.5 are both on")


def test_values_are_tried_under_their_condition() -> None:
    """The base has the value that excludes them, but no trial has both."""
    space = {"swa": {"values": [0.5, 0.0]}, "ema": {"values": [0.0, 0.9], "when": {"swa": [0.0]}}}
    assert list_faults(space, swa=0.5) == []
    space["ema"]["when"] = {"swa": [0.5, 0.0]}
    (text,) = list_faults(space, swa=0.5)
    assert text.startswith("space.ema: 0.9 is not allowed: ema=0.9 and swa=0.5 are both on")


def test_values_that_conflict_with_the_growth_schedule_are_not_faults() -> None:
    """The error message names the field, but the growth schedule causes the error."""
    growth = {"version": 2, "ops": [{"name": "set_batch_size", "value": 12, "trigger": {"budget_frac": 0.5}}]}
    with pytest.raises(ConfigError, match=r"^growth: ops\[0\] .*grad_accum"):
        with_values(base(growth=growth), {"grad_accum": 8})
    assert list_faults({"grad_accum": {"values": [1, 8]}}, growth=growth) == []


# -- conditions


@pytest.mark.parametrize(
    ("when", "others", "messages"),
    [
        pytest.param(
            {"optimizer": ["sgd"]}, {"optimizer": OPTIMIZERS}, [], id="a value of the other parameter"
        ),
        pytest.param({"optimizer": ["adamw"]}, {}, [], id="the base's own value"),
        pytest.param({"optimizer": ["sgd", "adamw"]}, {}, [], id="the base's own value among others"),
        pytest.param(
            {"optimizer": ["sgd"]},
            {},
            [
                "optimizer is 'adamw' in every trial, never one of ['sgd']; "
                "search optimizer too, or remove space.momentum."
            ],
            id="never with this base",
        ),
        pytest.param(
            {"optimizre": ["sgd"]},
            {},
            ["optimizre is not a config field (did you mean 'optimizer'?); name a field."],
            id="misspelt",
        ),
        pytest.param(
            {"optimizer": ["muon"]},
            {"optimizer": OPTIMIZERS},
            ["optimizer is never 'muon'; its values are ['adamw', 'sgd']."],
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
            ["optimizer has no values, so the condition is never met; write at least one value."],
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
            ["optimizer also has a condition; give space.momentum the condition of optimizer instead."],
            id="a conditional parameter",
        ),
        pytest.param(
            {"optimizer": ["muon"], "lr": [0.1]},
            {"optimizer": OPTIMIZERS, "lr": LR},
            ["optimizer is never 'muon'", "lr is a range"],
            id="two faults",
        ),
    ],
)
def test_the_faults_of_a_condition(
    when: dict[str, list[Any]], others: dict[str, Any], messages: list[str]
) -> None:
    faults = list_faults({"momentum": {"low": 0.1, "high": 0.9, "when": when}} | others)
    assert len(faults) == len(messages), faults
    for fault, message in zip(faults, messages, strict=True):
        assert fault.startswith("space.momentum.when: " + message)


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
def test_the_parameters_whose_conditions_are_true(values: dict[str, Any], names: set[str]) -> None:
    """A field that is not in the space has the value of the base config.

    All conditions of a parameter must be true.
    """
    space = {
        "optimizer": Choice(values=["adamw", "sgd", "muon"]),
        "momentum": Range(low=0.1, high=0.9, when={"optimizer": ["sgd"]}),
        "beta2": Range(low=0.9, high=0.99, when={"optimizer": ["adamw"]}),
        "both": Range(low=0.1, high=0.2, when={"optimizer": ["sgd"], "schedule": ["wsd"]}),
        "lr": Range(low=0.1, high=0.2),
    }
    active = active_parameters(space, values, base(optimizer="adamw"))
    assert set(active) == names and all(active[name] is space[name] for name in names)
    assert list(active) == [name for name in space if name in names]


# -- paths into the growth schedule


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("growth.ops.0.value", ""),
        ("growth.ops.1.trigger.budget_frac", ""),
        ("growth.ops.2.value", "the preset's schedule has no '2' in ops; allowed: 0..1"),
        ("growth.ops.x.value", "the preset's schedule has no 'x' in ops; allowed: 0..1"),
        ("growth.ops.-1.value", "the preset's schedule has no '-1' in ops; allowed: 0..1"),
        ("growth.op.0", "the preset's schedule has no 'op' in growth; allowed: "),
        ("growth.ops.0.value.more", "the preset's schedule has no 'more' in ops.0.value; allowed: nothing"),
        (
            "growth.ops.0.trigger.step",
            "the preset's schedule has no 'step' in ops.0.trigger; allowed: budget_frac",
        ),
    ],
)
def test_a_path_must_exist_in_the_schedule(name: str, message: str) -> None:
    values = {"low": 0.01, "high": 0.02} if name.endswith("value") else {"low": 0.55, "high": 0.9}
    faults = list_faults({name: values}, growth={"version": 2, "ops": OPS})
    assert len(faults) == bool(message)
    assert all(fault.startswith(f"space.{name}: {message}") and fault.endswith(".") for fault in faults)


def test_a_path_into_an_empty_schedule_is_refused() -> None:
    (text,) = list_faults({"growth.ops.0.value": {"low": 0.01, "high": 0.02}})
    assert text.startswith(
        "space.growth.ops.0.value: the preset's schedule has no '0' in ops; allowed: nothing"
    )


def test_a_value_that_the_schedule_does_not_allow_is_named() -> None:
    (text,) = list_faults({"growth.ops.0.value": {"values": [0.01, -5.0]}}, growth={"version": 2, "ops": OPS})
    assert text.startswith("space.growth.ops.0.value: -5.0 is not allowed: growth: ops[0]")


# -- the config of a trial


def test_config_fields_and_derived_parameters_can_be_searched() -> None:
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
    """Fields that are not searched keep their values, including the preset."""
    start = base(optimizer="adamw", dropout=0.1)
    cfg = with_values(start, values)
    expected = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    assert cfg == start.model_copy(update=expected)
    assert cfg.preset == "baseline" and with_values(start, {}) == start


def test_a_path_changes_only_its_value_of_the_schedule() -> None:
    start = base(growth={"version": 2, "ops": OPS})
    cfg = with_values(
        start, {"growth.ops.0.value": 0.02, "growth.ops.1.trigger.budget_frac": 0.8, "lr": 0.05}
    )
    ops = cfg.growth.data()["ops"]
    assert (ops[0]["value"], ops[1]["trigger"]) == (0.02, {"budget_frac": 0.8})
    assert (ops[1]["value"], ops[0]["trigger"]) == (0.1, {"budget_frac": 0.5})
    assert cfg.lr == 0.05 and start.growth.data()["ops"][0]["value"] == 0.01
    assert with_values(start, {"lr": 0.05}).growth == start.growth


def test_a_path_can_lead_into_a_list() -> None:
    ops = [{"name": "stack_layers", "value": [0, 0], "init": "identity", "trigger": {"budget_frac": 0.5}}]
    start = base(growth={"version": 2, "ops": ops}, n_layer=1)
    cfg = with_values(start, {"growth.ops.0.trigger.budget_frac": 0.25})
    assert cfg.growth.data()["ops"][0]["trigger"] == {"budget_frac": 0.25}
    assert with_values(start, {"growth.ops.0.value.1": 0}).growth == start.growth
    with pytest.raises(ConfigError):
        with_values(start, {"growth.ops.0.value.1": 7})


def test_values_without_a_valid_config_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="grad_accum=8 does not divide batch_size=12"):
        with_values(base(), {"batch_size": 12, "grad_accum": 8})


@pytest.mark.parametrize(("lr", "timescale"), [(0.01, 2.0), (0.02, 2), (0.01, 0.5)])
def test_a_timescale_sets_the_weight_decay(lr: float, timescale: float) -> None:
    """The weight decay is 1 / (lr * timescale * steps), with the learning rate and the steps of the trial."""
    start = base(batch_size=16)
    cfg = trial_config(start, {"lr": lr, "timescale": timescale}, TRAIN_TOKENS)
    steps = Plan(start, TRAIN_TOKENS).steps
    assert steps == 5
    assert cfg == start.model_copy(update={"lr": lr, "weight_decay": 1 / (lr * timescale * steps)})


def test_a_timescale_counts_the_steps_of_the_trial() -> None:
    cfg = trial_config(base(optimizer="adamw"), {"timescale": 2.0, "batch_size": 16, "lr": 0.1}, TRAIN_TOKENS)
    assert cfg.weight_decay == pytest.approx(1 / (0.1 * 2 * 5))


def test_a_timescale_leaves_a_second_weight_decay_that_is_set() -> None:
    for second in (None, 0.25):
        cfg = trial_config(base(weight_decay_aux=second), {"timescale": 2.0}, TRAIN_TOKENS)
        assert cfg.weight_decay > 0 and cfg.weight_decay_aux == second


def test_without_a_timescale_the_weight_decay_is_unchanged() -> None:
    assert trial_config(base(), {"lr": 0.05}, None) == with_values(base(), {"lr": 0.05})


# -- the syntax of a parameter


@pytest.mark.parametrize(
    ("data", "valid"),
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
def test_the_syntax_of_a_parameter(data: dict[str, Any], valid: bool) -> None:
    if valid and "values" not in data and isinstance(data["low"], float):
        assert make_study(space={"lr": data}).space["lr"] == Range(**data)
        return
    kind = Choice if "values" in data and "low" not in data else Range
    if valid:
        assert kind(**data).model_dump(exclude_unset=True) == data
        return
    with pytest.raises(ValueError, match="validation error"):
        kind(**data)


def test_a_parameter_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Range(low=1, high=2).low = 0
    with pytest.raises(ValueError, match="frozen"):
        Choice(values=[1]).values = []
