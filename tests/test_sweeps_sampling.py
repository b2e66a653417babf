"""Which values a trial gets: decided by the study and by the results so far, and by nothing else."""

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
    return TrialSampler(study, study.base())


# -- one seed for every trial


@pytest.mark.parametrize(
    ("seed", "number", "expected"),
    [(0, 1, 1639893669), (0, 2, 929522719), (1, 1, 2774215632), (7, 100, 2986614715)],
    ids=str,
)
def test_the_seed_of_a_trial_is_for_ever(seed: int, number: int, expected: int) -> None:
    """A study that goes on with another version asks for the same trials."""
    assert trial_seed(make_study(sampler={"name": "random", "seed": seed}), number) == expected


def test_every_trial_and_every_study_has_a_seed_of_its_own() -> None:
    studies = [make_study(sampler={"seed": seed}) for seed in range(5)]
    seeds = [trial_seed(study, number) for study in studies for number in range(10)]
    assert len({*seeds}) == 50 and all(0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) > 2**31, "all of the bits are used"


# -- what is asked


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes", "random", "qmc"])
def test_trial_0_is_the_base(name: str) -> None:
    asker = make(name)
    assert asker.ask(0) == {}
    assert asker.optuna_study.trials == [] and asker.open_trials == {}


@pytest.mark.parametrize("name", ["tpe", "cmaes", "random"])
def test_the_same_study_asks_for_the_same_values(name: str) -> None:
    """And a study with another seed for others."""

    def ask(seed: int) -> list[dict[str, Any]]:
        asker = make(name, MIXED, startup=2, seed=seed)
        return [asker.ask(number) for number in range(1, 4)]

    values = ask(0)
    assert ask(0) == values != ask(1)
    assert len({str(each) for each in values}) == 3


def test_random_values_depend_on_the_number_alone() -> None:
    """Nothing is kept of them, so that a study may have a million."""
    asker = make("random", MIXED)
    for number in (1, 2, 3):
        asker.ask(number)
    late = make("random", MIXED)
    assert late.ask(3) == asker.ask(3) and asker.open_trials == {} and asker.optuna_study.trials == []
    asker.tell(3, {0: 1.0}, True)
    assert asker.optuna_study.trials == []


def test_other_samplers_keep_what_they_asked() -> None:
    asker = make("tpe")
    values = [asker.ask(number) for number in (1, 2)]
    assert sorted(asker.open_trials) == [1, 2]
    assert [trial.params for trial in asker.optuna_study.trials] == values


def test_values_lie_in_their_space() -> None:
    space = MIXED | {"n_layer": {"low": 1, "high": 9, "step": 2}, "dropout": {"low": 0.0, "high": 0.3}}
    seen = [make("random", space).ask(number) for number in range(1, 60)]
    assert all(1e-3 <= values["lr"] <= 0.1 and 0 <= values["dropout"] <= 0.3 for values in seen)
    assert {values["optimizer"] for values in seen} == {"adamw", "sgd"}
    assert {values["n_layer"] for values in seen} == {1, 3, 5, 7, 9}
    assert sum(values["lr"] < 0.01 for values in seen) > 15, "by its logarithm"


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_a_conditional_parameter_is_asked_where_its_condition_holds(base: str) -> None:
    """After the parameters that it depends on, wherever it stands in the file.

    The values of the trial count, not those of the base.
    """
    study = make_study({"optimizer": base}, space=MIXED, sampler={"name": "random"})
    asker = TrialSampler(study, study.base())
    seen = [asker.ask(number) for number in range(1, 30)]
    assert {values["optimizer"] for values in seen} == {"adamw", "sgd"}
    assert all(("momentum" in values) == (values["optimizer"] == "sgd") for values in seen)


def test_a_condition_on_the_base_is_asked_too() -> None:
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
def test_a_grid_asks_for_every_cell_once(space: dict[str, Any], cells: int) -> None:
    asker = make("grid", space)
    seen = [asker.ask(0), *(asker.ask(number) for number in range(1, cells + 1))][1:]
    assert len({tuple(sorted(values.items())) for values in seen}) == cells
    for name, parameter in space.items():
        allowed = parameter.get("values") or [parameter["low"] + i * parameter["step"] for i in range(cells)]
        assert all(any(value == pytest.approx(one) if not isinstance(one, str) else value == one for one in allowed)
                   for value in (values[name] for values in seen))  # fmt: skip


def test_the_order_of_a_grid_is_that_of_the_studys_seed() -> None:
    space = {"n_layer": {"low": 1, "high": 20, "step": 1}}

    def order(seed: int) -> list[int]:
        asker = make("grid", space, seed=seed)
        return [asker.ask(number)["n_layer"] for number in range(1, 21)]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(1, 21))


def test_a_sequence_has_one_seed_and_every_trial_its_place_in_it() -> None:
    """Sixteen points of a scrambled Sobol sequence, of which each sixteenth of the range holds one."""
    asker = make("qmc", {"dropout": {"low": 0.0, "high": 0.8}})
    asker.ask(1)  # the first one is drawn at random, since no space is known yet
    asker.tell(1, {0: 1.0}, True)
    values = []
    for number in range(2, 18):
        values.append(asker.ask(number)["dropout"])
        asker.tell(number, {0: 1.0}, True)
    assert sorted(math.floor(value / 0.05) for value in values) == list(range(16))
    again = make("qmc", {"dropout": {"low": 0.0, "high": 0.8}}, seed=5)
    again.ask(1)
    again.tell(1, {0: 1.0}, True)
    assert again.ask(2)["dropout"] != values[0]


@pytest.mark.parametrize(
    ("name", "made", "expected"),
    [
        ("tpe", "TPESampler", {"multivariate": True, "group": True, "seed": True, "n_startup_trials": 3}),
        ("gp", "GPSampler", {"seed": True, "n_startup_trials": 3}),
        ("cmaes", "CmaEsSampler", {"seed": True, "n_startup_trials": 3}),
        ("qmc", "QMCSampler", {"seed": 9, "scramble": True, "warn_asynchronous_seeding": False}),
        ("random", "RandomSampler", {"seed": True}),
    ],
)
def test_the_settings_of_a_study_reach_its_sampler(
    monkeypatch: pytest.MonkeyPatch, name: str, made: str, expected: dict[str, Any]
) -> None:
    """True: the seed of the trial. A conditional space needs TPE's groups."""
    asker = make(name, MIXED, seed=9, startup=3)
    seen: list[dict[str, Any]] = []

    def make_sampler(**keys: Any) -> Any:
        seen.append(keys)
        return sampler(**keys)

    sampler = getattr(optuna.samplers, made)
    monkeypatch.setattr(optuna.samplers, made, make_sampler)
    asker._sampler(5)
    own = trial_seed(asker.study, 5)
    assert seen == [
        {key: own if value is True and key == "seed" else value for key, value in expected.items()}
    ]


def test_a_space_without_conditions_needs_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups TPE would model the parameters of such a space one by one."""
    askers = make("tpe"), make("tpe", MIXED)
    seen: list[Any] = []
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda **keys: seen.append(keys["group"]))
    for asker in askers:
        asker._sampler(1)
    assert seen == [False, True]


def test_the_sampler_learns_after_its_startup() -> None:
    """TPE comes closer to the best value; random values do not."""

    def values_of(name: str) -> list[float]:
        asker = make(name, {"dropout": {"low": 0.0, "high": 0.9}}, startup=4)
        found = []
        for number in range(1, 25):
            found.append(asker.ask(number)["dropout"])
            asker.tell(number, {0: abs(found[-1] - 0.2)}, True)
        return [abs(value - 0.2) for value in found[12:]]

    assert sum(values_of("tpe")) < 0.6 * sum(values_of("random"))


# -- what is told


def told(
    *results: tuple[Mapping[int, float], bool],
) -> list[tuple[TrialState, float | None, dict[int, float]]]:
    """What the sampler knows of trials 1, 2, ... with these scores by rung."""
    asker = make("tpe")
    for number in range(len(results) + 1):
        asker.ask(number)
    asker.tell(0, {0: 3.0}, True)
    for number, (scores, finished) in enumerate(results, 1):
        asker.tell(number, scores, finished)
    return [(trial.state, trial.value, trial.intermediate_values) for trial in asker.optuna_study.trials]


DONE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED


@pytest.mark.parametrize(
    ("results", "known"),
    [
        pytest.param([({0: 2.0}, True)], [(DONE, 2.0, {0: 2.0})], id="done"),
        pytest.param(
            [({0: 4.0, 1: 2.0}, True)],
            [(DONE, 2.0, {0: 4.0, 1: 2.0})],
            id="done after a rung: the end counts",
        ),
        pytest.param([({1: 2.0, 0: 4.0}, True)], [(DONE, 2.0, {0: 4.0, 1: 2.0})], id="in no order"),
        pytest.param([({0: 4.0}, False)], [(PRUNED, 4.0, {0: 4.0})], id="pruned"),
        pytest.param(
            [({0: 4.0, 1: 5.0}, False)], [(PRUNED, 5.0, {0: 4.0, 1: 5.0})], id="pruned at the second rung"
        ),
        pytest.param(
            [({}, False)], [(DONE, 4.5, {})], id="diverged: half as bad again as the worst, the base"
        ),
        pytest.param(
            [({0: 8.0}, True), ({}, False)],
            [(DONE, 8.0, {0: 8.0}), (DONE, 12.0, {})],
            id="worse than the worst",
        ),
        pytest.param(
            [({0: 1.0}, True), ({}, False)], [(DONE, 1.0, {0: 1.0}), (DONE, 4.5, {})], id="the worst stays"
        ),
        pytest.param(
            [({0: 8.0, 1: 1.0}, True), ({}, False)],
            [(DONE, 1.0, {0: 8.0, 1: 1.0}), (DONE, 12.0, {})],
            id="at any rung",
        ),
        pytest.param(
            [({}, False), ({0: 8.0}, True)], [(DONE, 4.5, {}), (DONE, 8.0, {0: 8.0})], id="the worst so far"
        ),
    ],
)
def test_the_sampler_hears_how_every_trial_ended(results: list[Any], known: list[Any]) -> None:
    assert told(*results) == known


def test_before_any_score_a_trial_that_diverges_is_very_bad() -> None:
    asker = make("tpe")
    asker.ask(1)
    asker.tell(1, {}, False)
    assert [trial.value for trial in asker.optuna_study.trials] == [150.0]


def test_a_trial_is_told_once() -> None:
    asker = make("tpe")
    asker.ask(1)
    asker.tell(1, {0: 1.0}, True)
    asker.tell(1, {0: 2.0}, True)
    assert asker.open_trials == {} and [trial.value for trial in asker.optuna_study.trials] == [1.0]


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
    found = distribution(parameter)
    assert type(found) is type(expected) and found == expected


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
    """From low on in steps, high included where a step ends there. Optuna takes each of them."""
    name = "n_layer" if isinstance(values[0], int) else "dropout"
    asker = make("grid", {name: parameter})
    seen = sorted(asker.ask(number)[name] for number in range(1, len(values) + 1))
    assert seen == pytest.approx(values)
    domain = asker.distributions[name]
    assert all(domain._contains(domain.to_internal_repr(value)) for value in seen)


def test_only_optunas_own_chatter_is_silenced() -> None:
    """Its experimental samplers are our choice; other warnings are the user's."""
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make("tpe", MIXED).ask(1)
        warnings.warn("the disk is nearly full", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["the disk is nearly full"]
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


def test_optuna_is_imported_where_it_is_used() -> None:
    """It takes a second, and `mainrun sweep --help` does not need it."""
    code = "import sys, sweeps.sampling; print('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
