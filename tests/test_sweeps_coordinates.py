"""Tests the coordinates of recipes: they can be inverted, and the base is the origin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from searching import make_study

from sweeps.coordinates import Coordinates
from sweeps.study import built_in_names, read_study

TOKENS = 66_000


def make(space: dict[str, Any], **fields: Any) -> Coordinates:
    study = make_study(fields, space=space)
    return Coordinates(study.space, study.base(), TOKENS)


RATES = {
    "lr": {"low": 1e-3, "high": 0.1, "log": True},
    "weight_decay": {"low": 0.01, "high": 1.0, "log": True},
    "batch_size": {"values": [4, 8, 16]},
    "dropout": {"low": 0.0, "high": 0.3},
}


@pytest.mark.parametrize("name", built_in_names())
def test_every_recipe_of_a_built_in_study_can_be_decoded(name: str) -> None:
    study = read_study(name)
    coordinates = Coordinates(study.space, study.base(), TOKENS)
    assert not coordinates.encode({}).any()
    rng = np.random.default_rng(0)
    for point in rng.random((100, len(study.space))):
        values = coordinates.at(point)
        assert coordinates.decode(coordinates.encode(values)) == values


def test_a_condition_that_does_not_hold_leaves_the_parameter_out() -> None:
    space = {
        "optimizer": {"values": ["adamw", "sgd"]},
        "momentum": {"low": 0.5, "high": 0.99, "when": {"optimizer": ["sgd"]}},
    }
    coordinates = make(space)
    with_momentum = {"optimizer": "sgd", "momentum": coordinates.by_name["momentum"].lattice[3]}
    assert coordinates.decode(coordinates.encode(with_momentum)) == with_momentum
    without = coordinates.encode({"optimizer": "adamw"})
    assert coordinates.decode(without) == {"optimizer": "adamw"}
    assert not without.any()


def test_the_learning_rate_moves_only_its_own_coordinate() -> None:
    """At a fixed batch and a fixed time constant of weight decay."""
    coordinates = make(RATES, lr=0.01, weight_decay=0.1)
    a = {"lr": 0.01, "weight_decay": 0.1, "batch_size": 8, "dropout": 0.1}
    b = a | {"lr": 0.02, "weight_decay": 0.05}
    moved = coordinates.encode(b) - coordinates.encode(a)
    place = coordinates.slices["lr"].start
    assert moved[place] == pytest.approx(math.log(2) / math.log(100))
    assert np.delete(moved, place) == pytest.approx(0)


def test_four_times_the_batch_matches_twice_the_learning_rate() -> None:
    coordinates = make(RATES, lr=0.01, weight_decay=0.1, batch_size=4)
    a = coordinates.encode({"lr": 0.01, "weight_decay": 0.1, "batch_size": 4})
    # four times the batch means a quarter of the steps, so the time constant needs twice the decay
    b = coordinates.encode({"lr": 0.02, "weight_decay": 0.2, "batch_size": 16})
    moved = b - a
    assert moved[coordinates.slices["batch_size"]] == pytest.approx(1)
    assert moved[coordinates.slices["lr"]] == pytest.approx(0)
    assert moved[coordinates.slices["weight_decay"]] == pytest.approx(0)


def test_momentum_is_part_of_the_learning_rate_of_sgd() -> None:
    space = {"lr": RATES["lr"], "momentum": {"low": 0.5, "high": 0.99}}
    for optimizer, change in (("sgd", math.log(2)), ("muon", 0.0)):
        coordinates = make(space, optimizer=optimizer, lr=0.01, momentum=0.9)
        a = coordinates.encode({"lr": 0.01, "momentum": 0.9})
        b = coordinates.encode({"lr": 0.01, "momentum": 0.95})
        moved = b - a
        assert moved[coordinates.slices["lr"]] == pytest.approx(change / math.log(100))
        assert moved[coordinates.slices["momentum"]] == pytest.approx(math.log(2) / math.log(50))


def test_a_range_has_129_numbers_with_four_digits() -> None:
    lattice = make(RATES).by_name["lr"].lattice
    assert len(lattice) == 129 and (lattice[0], lattice[-1]) == (1e-3, 0.1)
    assert all(float(f"{value:.4g}") == value for value in lattice)
    ratios = np.diff(np.log(lattice))
    assert ratios == pytest.approx(math.log(100) / 128, rel=0.02)


def test_choices_without_an_order_have_a_coordinate_each() -> None:
    coordinates = make({"mlp": {"values": ["gelu", "relu2", "swiglu"]}}, mlp="gelu")
    assert coordinates.size == 2
    points = {text: coordinates.encode({"mlp": text}) for text in ("gelu", "relu2", "swiglu")}
    assert not points["gelu"].any()
    assert points["relu2"].tolist() == [0.71, 0] and points["swiglu"].tolist() == [0, 0.71]
    assert coordinates.decode(np.array([0.1, 0.3])) == {"mlp": "gelu"}
    assert coordinates.decode(np.array([0.5, 0.4])) == {"mlp": "relu2"}


def test_the_base_of_a_timescale_is_its_own_time_constant() -> None:
    space = {"timescale": {"low": 0.01, "high": 10.0, "log": True}}
    study = make_study({"lr": 0.01, "weight_decay": 0.1}, space=space)
    coordinates = Coordinates(study.space, study.base(), TOKENS)
    steps = TOKENS // 128
    assert coordinates.encode({"timescale": 1 / (0.01 * 0.1 * steps)}) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "parameter", "scale"),
    [
        ("batch_size", {"values": [4, 8, 16]}, "log"),
        ("batch_size", {"values": [4, 8, 12]}, "linear"),
        ("weight_decay", {"values": [0.0, 0.1, 0.5]}, "linear"),
        ("dropout", {"low": 0.0, "high": 0.3}, "linear"),
        ("lr", {"low": 1e-3, "high": 0.1, "log": True}, "log"),
        ("ema", {"values": [0.0, 0.9, 0.99]}, "near one"),
        ("beta1", {"low": 0.8, "high": 0.95}, "near one"),
        ("beta2", {"low": 0.9, "high": 0.999}, "near one"),
        ("momentum", {"low": 0.85, "high": 0.98}, "near one"),
        ("mlp", {"values": ["gelu", "relu2"]}, "text"),
    ],
)
def test_the_scale_follows_from_the_field_and_its_values(
    name: str, parameter: dict[str, Any], scale: str
) -> None:
    assert make({name: parameter}).by_name[name].scale == scale


def test_a_range_with_steps_has_only_these_numbers() -> None:
    lattice = make({"dropout": {"low": 0.0, "high": 0.3, "step": 0.1}}).by_name["dropout"].lattice
    assert lattice == pytest.approx([0.0, 0.1, 0.2, 0.3]) and lattice[-1] == 0.3
    assert make({"batch_size": {"low": 4, "high": 16}}).by_name["batch_size"].lattice == [*range(4, 17)]
