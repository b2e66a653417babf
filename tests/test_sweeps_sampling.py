"""Tests that the values of a trial depend only on the study and on earlier scores."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from searching import SPACE, make_study

from sweeps.sampling import TrialSampler, distribution, trial_seed
from sweeps.space import Choice, Range

MIXED: dict[str, Any] = {
    "momentum": {"low": 0.5, "high": 0.9, "when": {"optimizer": ["sgd"]}},
    "lr": {"low": 1e-3, "high": 0.1, "log": True},
    "optimizer": {"values": ["adamw", "sgd"]},
}


def make(name: str = "random", space: Mapping[str, Any] = SPACE, **sampler: Any) -> TrialSampler:
    study = make_study(space=dict(space), sampler={"name": name} | sampler)
    return TrialSampler(study.sampler, study.space, study.base())


# -- seeds


@pytest.mark.parametrize(
    ("seed", "number", "expected"),
    [(0, 1, 1639893669), (0, 2, 929522719), (1, 1, 2774215632), (7, 100, 2986614715)],
    ids=str,
)
def test_the_seed_of_a_trial_never_changes(seed: int, number: int, expected: int) -> None:
    """A study that is resumed with a later version of mainrun samples the same trials."""
    assert trial_seed(seed, number) == expected


def test_every_trial_of_every_study_has_another_seed() -> None:
    seeds = [trial_seed(seed, number) for seed in range(5) for number in range(10)]
    assert len({*seeds}) == 50 and all(0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) > 2**31, "all bits are used"


# -- ask


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes", "random", "qmc"])
def test_trial_0_is_the_base(name: str) -> None:
    sampler = make(name)
    assert sampler.ask(0) == {}
    assert sampler.optuna_study.trials == [] and sampler.open_trials == {}


@pytest.mark.parametrize("name", ["tpe", "cmaes", "random"])
def test_the_same_study_samples_the_same_values(name: str) -> None:
    """A study with another seed samples other values."""

    def ask(seed: int) -> list[dict[str, Any]]:
        sampler = make(name, MIXED, startup=2, seed=seed)
        return [sampler.ask(number) for number in range(1, 4)]

    values = ask(0)
    assert ask(0) == values != ask(1)
    assert len({str(each) for each in values}) == 3


def test_random_values_depend_only_on_the_trial_number() -> None:
    """The random sampler keeps no trials in memory, because a study may have a million of them."""
    sampler = make("random", MIXED)
    for number in (1, 2, 3):
        sampler.ask(number)
    late = make("random", MIXED)
    assert late.ask(3) == sampler.ask(3) and sampler.open_trials == {} and sampler.optuna_study.trials == []
    sampler.tell(3, {0: 1.0}, True)
    assert sampler.optuna_study.trials == []


def test_other_samplers_keep_their_trials() -> None:
    sampler = make("tpe")
    values = [sampler.ask(number) for number in (1, 2)]
    assert sorted(sampler.open_trials) == [1, 2]
    assert [trial.params for trial in sampler.optuna_study.trials] == values


def test_values_are_in_the_space() -> None:
    space = MIXED | {"n_layer": {"low": 1, "high": 9, "step": 2}, "dropout": {"low": 0.0, "high": 0.3}}
    seen = [make("random", space).ask(number) for number in range(1, 60)]
    assert all(1e-3 <= values["lr"] <= 0.1 and 0 <= values["dropout"] <= 0.3 for values in seen)
    assert {values["optimizer"] for values in seen} == {"adamw", "sgd"}
    assert {values["n_layer"] for values in seen} == {1, 3, 5, 7, 9}
    assert sum(values["lr"] < 0.01 for values in seen) > 15, "a logarithmic range"


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_a_conditional_parameter_is_sampled_if_its_condition_is_true(base: str) -> None:
    """A parameter is sampled after those in its condition, whatever their order in the file.

    The condition is tested against the values of the trial, not those of the base config.
    """
    study = make_study({"optimizer": base}, space=MIXED, sampler={"name": "random"})
    sampler = TrialSampler(study.sampler, study.space, study.base())
    seen = [sampler.ask(number) for number in range(1, 30)]
    assert {values["optimizer"] for values in seen} == {"adamw", "sgd"}
    assert all(("momentum" in values) == (values["optimizer"] == "sgd") for values in seen)


def test_a_condition_can_depend_on_the_base() -> None:
    space = {"lr": SPACE["lr"], "momentum": {"low": 0.5, "high": 0.9, "when": {"optimizer": ["adamw"]}}}
    assert set(make("random", space).ask(1)) == {"lr", "momentum"}


@pytest.mark.parametrize(
    ("space", "cells"),
    [
        ({"lr": {"values": [0.01, 0.02]}, "optimizer": {"values": ["adamw", "sgd"]}}, 4),
        ({"n_layer": {"low": 1, "high": 5, "step": 2}, "lr": {"values": [0.01, 0.02]}}, 6),
        ({"dropout": {"low": 0.0, "high": 0.3, "step": 0.1}}, 4),
    ],
    ids=["choices", "whole numbers", "fractions"],
)
def test_a_grid_samples_every_cell_once(space: dict[str, Any], cells: int) -> None:
    sampler = make("grid", space)
    seen = [sampler.ask(0), *(sampler.ask(number) for number in range(1, cells + 1))][1:]
    assert len({tuple(sorted(values.items())) for values in seen}) == cells
    for name, parameter in space.items():
        allowed = parameter.get("values") or [parameter["low"] + i * parameter["step"] for i in range(cells)]
        for values in seen:
            value = values[name]
            assert value in allowed or any(value == pytest.approx(cell) for cell in allowed)


def test_the_seed_of_the_study_decides_the_order_of_a_grid() -> None:
    space = {"n_layer": {"low": 1, "high": 20, "step": 1}}

    def order(seed: int) -> list[int]:
        sampler = make("grid", space, seed=seed)
        return [sampler.ask(number)["n_layer"] for number in range(1, 21)]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(1, 21))


def test_the_trials_of_qmc_are_points_of_one_sequence() -> None:
    """If the range is cut into sixteen equal parts, each part has one of sixteen scrambled Sobol points."""
    sampler = make("qmc", {"dropout": {"low": 0.0, "high": 0.8}})
    # The first point is random, because Optuna does not know the search space before the first trial.
    sampler.ask(1)
    sampler.tell(1, {0: 1.0}, True)
    values = []
    for number in range(2, 18):
        values.append(sampler.ask(number)["dropout"])
        sampler.tell(number, {0: 1.0}, True)
    assert sorted(math.floor(value / 0.05) for value in values) == list(range(16))
    again = make("qmc", {"dropout": {"low": 0.0, "high": 0.8}}, seed=5)
    again.ask(1)
    again.tell(1, {0: 1.0}, True)
    assert again.ask(2)["dropout"] != values[0]


@pytest.mark.parametrize(
    ("name", "class_name", "expected"),
    [
        ("tpe", "TPESampler", {"multivariate": True, "group": True, "seed": True, "n_startup_trials": 3}),
        ("gp", "GPSampler", {"seed": True, "n_startup_trials": 3}),
        ("cmaes", "CmaEsSampler", {"seed": True, "n_startup_trials": 3}),
        ("qmc", "QMCSampler", {"seed": 9, "scramble": True, "warn_asynchronous_seeding": False}),
        ("random", "RandomSampler", {"seed": True}),
    ],
)
def test_the_settings_of_a_study_reach_its_sampler(
    monkeypatch: pytest.MonkeyPatch, name: str, class_name: str, expected: dict[str, Any]
) -> None:
    """An expected seed of True stands for the trial's seed. A conditional space needs `group=True` in TPE."""
    sampler = make(name, MIXED, seed=9, startup=3)
    seen: list[dict[str, Any]] = []

    def make_sampler(**keys: Any) -> Any:
        seen.append(keys)
        return sampler_class(**keys)

    sampler_class = getattr(optuna.samplers, class_name)
    monkeypatch.setattr(optuna.samplers, class_name, make_sampler)
    sampler._sampler(5)
    seed = trial_seed(sampler.settings.seed, 5)
    assert seen == [
        {key: seed if value is True and key == "seed" else value for key, value in expected.items()}
    ]


def test_a_space_without_conditions_needs_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `group=True`, TPE would model the parameters independently."""
    samplers = make("tpe"), make("tpe", MIXED)
    seen: list[Any] = []
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda **keys: seen.append(keys["group"]))
    for sampler in samplers:
        sampler._sampler(1)
    assert seen == [False, True]


def test_the_sampler_learns_after_its_startup() -> None:
    """TPE gets closer to the best value than random sampling."""

    def distances(name: str) -> list[float]:
        sampler = make(name, {"dropout": {"low": 0.0, "high": 0.9}}, startup=4)
        values = []
        for number in range(1, 25):
            values.append(sampler.ask(number)["dropout"])
            sampler.tell(number, {0: abs(values[-1] - 0.2)}, True)
        return [abs(value - 0.2) for value in values[12:]]

    assert sum(distances("tpe")) < 0.6 * sum(distances("random"))


# -- tell


def report(
    *results: tuple[Mapping[int, float], bool],
) -> list[tuple[TrialState, float | None, dict[int, float]]]:
    """Report the scores of trials 1, 2, ... by rung, and return the states and scores that Optuna stores."""
    sampler = make("tpe")
    for number in range(len(results) + 1):
        sampler.ask(number)
    sampler.tell(0, {0: 3.0}, True)
    for number, (scores, finished) in enumerate(results, 1):
        sampler.tell(number, scores, finished)
    return [(trial.state, trial.value, trial.intermediate_values) for trial in sampler.optuna_study.trials]


DONE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        pytest.param([({0: 2.0}, True)], [(DONE, 2.0, {0: 2.0})], id="done"),
        pytest.param(
            [({0: 4.0, 1: 2.0}, True)],
            [(DONE, 2.0, {0: 4.0, 1: 2.0})],
            id="done after a rung: the final score counts",
        ),
        pytest.param([({1: 2.0, 0: 4.0}, True)], [(DONE, 2.0, {0: 4.0, 1: 2.0})], id="unordered"),
        pytest.param([({0: 4.0}, False)], [(PRUNED, 4.0, {0: 4.0})], id="pruned"),
        pytest.param(
            [({0: 4.0, 1: 5.0}, False)], [(PRUNED, 5.0, {0: 4.0, 1: 5.0})], id="pruned at the second rung"
        ),
        pytest.param(
            [({}, False)], [(DONE, 4.5, {})], id="diverged: 1.5 times the worst score, which is the base's"
        ),
        pytest.param(
            [({0: 8.0}, True), ({}, False)],
            [(DONE, 8.0, {0: 8.0}), (DONE, 12.0, {})],
            id="diverged: worse than the worst trial",
        ),
        pytest.param(
            [({0: 1.0}, True), ({}, False)],
            [(DONE, 1.0, {0: 1.0}), (DONE, 4.5, {})],
            id="a better score does not replace the worst",
        ),
        pytest.param(
            [({0: 8.0, 1: 1.0}, True), ({}, False)],
            [(DONE, 1.0, {0: 8.0, 1: 1.0}), (DONE, 12.0, {})],
            id="the worst score of any rung",
        ),
        pytest.param(
            [({}, False), ({0: 8.0}, True)],
            [(DONE, 4.5, {}), (DONE, 8.0, {0: 8.0})],
            id="later scores do not count",
        ),
    ],
)
def test_the_scores_of_a_trial_are_reported(results: list[Any], expected: list[Any]) -> None:
    assert report(*results) == expected


def test_a_trial_that_diverges_first_gets_a_bad_score() -> None:
    sampler = make("tpe")
    sampler.ask(1)
    sampler.tell(1, {}, False)
    assert [trial.value for trial in sampler.optuna_study.trials] == [150.0]


def test_a_trial_is_reported_once() -> None:
    sampler = make("tpe")
    sampler.ask(1)
    sampler.tell(1, {0: 1.0}, True)
    sampler.tell(1, {0: 2.0}, True)
    assert sampler.open_trials == {} and [trial.value for trial in sampler.optuna_study.trials] == [1.0]


def test_smaller_is_better() -> None:
    assert make("tpe").optuna_study.direction == optuna.study.StudyDirection.MINIMIZE


# -- the distribution of a parameter

D = optuna.distributions


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (Choice(values=["a", "b"]), D.CategoricalDistribution(["a", "b"])),
        (Choice(values=[1, 2]), D.CategoricalDistribution([1, 2])),
        (Range(low=1, high=9), D.IntDistribution(1, 9)),
        (Range(low=1, high=9, step=2), D.IntDistribution(1, 9, step=2)),
        (Range(low=1, high=9, log=True), D.IntDistribution(1, 9, log=True)),
        (Range(low=1.0, high=9), D.FloatDistribution(1.0, 9.0)),
        (Range(low=1, high=9.0), D.FloatDistribution(1.0, 9.0)),
        (Range(low=1, high=9, step=0.5), D.FloatDistribution(1.0, 9.0, step=0.5)),
        (Range(low=0.1, high=0.9, step=0.2), D.FloatDistribution(0.1, 0.9, step=0.2)),
        (Range(low=0.1, high=0.9, log=True), D.FloatDistribution(0.1, 0.9, log=True)),
        (Range(low=0.1, high=0.9), D.FloatDistribution(0.1, 0.9)),
    ],
    ids=str,
)
def test_the_distribution_of_a_parameter(parameter: Any, expected: Any) -> None:
    result = distribution(parameter)
    assert type(result) is type(expected) and result == expected


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        ({"low": 1, "high": 5, "step": 2}, [1, 3, 5]),
        ({"low": 1, "high": 6, "step": 2}, [1, 3, 5]),
        ({"low": 0.0, "high": 0.3, "step": 0.1}, [0.0, 0.1, 0.2, 0.3]),
        ({"low": 0.05, "high": 0.3, "step": 0.1}, [0.05, 0.15, 0.25]),
        ({"low": 0.05, "high": 0.4, "step": 0.1}, [0.05, 0.15, 0.25, 0.35]),
        ({"values": [0.2, 0.1]}, [0.1, 0.2]),
    ],
    ids=str,
)
def test_the_cells_of_a_grid(parameter: dict[str, Any], values: list[float]) -> None:
    """The cells start at `low`, and include `high` if a step ends there. Optuna accepts every cell."""
    name = "n_layer" if isinstance(values[0], int) else "dropout"
    sampler = make("grid", {name: parameter})
    seen = sorted(sampler.ask(number)[name] for number in range(1, len(values) + 1))
    assert seen == pytest.approx(values)
    domain = sampler.distributions[name]
    assert all(domain._contains(domain.to_internal_repr(value)) for value in seen)


def test_only_messages_of_optuna_are_silenced() -> None:
    """Optuna's warnings about experimental samplers are hidden, because they do not help users.

    Other warnings are shown.
    """
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make("tpe", MIXED).ask(1)
        warnings.warn("the disk is nearly full", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["the disk is nearly full"]
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


def test_optuna_is_not_imported_early() -> None:
    """Importing Optuna takes a second, and `mainrun sweep --help` does not need Optuna."""
    code = "import sys, sweeps.sampling; print('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
