"""Tests of the sequential confirmation: its exact level, its decisions, and its cost."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.special import stdtr

from mainrun import stats
from sweeps.sequential import FIRST_LOOK, SequentialTest, chance_of, nominal_p

TOOL = Path(__file__).parents[1] / "tools" / "sequential_confirmation.py"
BASE = (2.0, 2.1, 2.2, 2.3, 2.05, 2.15, 2.25, 2.35)


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sequential_confirmation", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of a class by name
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def decide(
    *gains: Sequence[float], base: Sequence[float] = BASE, maximum: int = 8, noise: Sequence[float] = ()
) -> SequentialTest:
    """Confirm trials whose scores are those of the base, each reduced by a gain."""
    test = SequentialTest(range(1, len(gains) + 1), maximum)
    while test.open:
        if test.needs_floor:
            assert noise, "these scores need no floor of their own"
            test.add_noise(noise)
            continue
        pairs = test.next_pairs
        scores = {c.trial: {n: base[n] - gains[c.trial - 1][n] for n in pairs} for c in test.open}
        test.add_pairs({n: base[n] for n in pairs}, scores)
    return test


def outcomes(test: SequentialTest) -> list[tuple[str, int]]:
    return [(candidate.outcome, candidate.pairs) for candidate in test.candidates]


# -- the level


@pytest.mark.parametrize("maximum", [4, 8, 20])
def test_the_level_holds_over_all_looks(maximum: int) -> None:
    """The chance that the smallest p-value of all looks is significant is counted in random differences."""
    draws = np.random.default_rng(maximum).standard_normal((40_000, maximum))
    counts = np.arange(1, maximum + 1)
    sums = draws.cumsum(axis=1)
    squares = (draws**2).cumsum(axis=1)
    rest = np.maximum(squares - sums**2 / counts, 1e-300)
    t = np.abs(sums) / np.sqrt(counts * rest / np.maximum(1, counts - 1))
    looks = range(FIRST_LOOK, maximum + 1)
    p = np.array([2 * stdtr(n - 1, -t[:, n - 1]) for n in looks]).min(axis=0)
    for nominal in (nominal_p(maximum), 0.001, 0.1):
        chance = chance_of(nominal, maximum)
        error = math.sqrt(chance * (1 - chance) / len(draws))
        assert abs((p <= nominal).mean() - chance) < 4 * error
    assert chance_of(nominal_p(maximum), maximum) == pytest.approx(1 - stats.LEVEL)


def test_a_single_look_needs_no_correction() -> None:
    for maximum in (2, 3):
        assert chance_of(0.03, maximum) == 0.03
        assert nominal_p(maximum) == pytest.approx(0.05)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("maximum", [2, 4, 8])
def test_the_adjusted_p_value_grows_with_the_p_value(maximum: int) -> None:
    ps = [0.0, 1e-300, 1e-15, 1e-9, 1e-4, 0.01, 0.3, 0.9, 1 - 1e-12, math.nextafter(1, 0), 1.0]
    chances = [chance_of(p, maximum) for p in ps]
    looks = max(1, maximum - FIRST_LOOK + 1)
    assert chances == pytest.approx(sorted(chances), rel=1e-12, abs=0)
    assert chances[0] == 0 and chances[-1] == 1
    assert all(p <= chance <= p * looks for p, chance in zip(ps, chances, strict=True))


# -- false claims and costs


def simulate(gains: Sequence[float], studies: int, noise: str = "normal") -> tuple[float, float]:
    """Return the share of simulated studies that claim a gain, and the median cost in runs."""
    results = tool.simulate(tool.sequential, gains, studies, seeds=8, draws=tool.NOISES[noise])
    claims = statistics.fmean(result.claims for result in results)
    return claims, statistics.median(result.cost for result in results)


def test_at_most_five_percent_of_null_studies_claim_a_gain() -> None:
    """A claim is one-sided, so that at most half of the level is expected."""
    claims, cost = simulate([0.0], studies=2000)
    assert 0 < claims <= 0.025
    assert cost <= 6, "without a difference, the study stops early"


@pytest.mark.slow
@pytest.mark.parametrize("noise", list(tool.NOISES)[:4])
@pytest.mark.parametrize("best", [1, 3])
def test_null_studies_with_other_noise_claim_as_rarely(noise: str, best: int) -> None:
    """The last noise of the tool breaks the level, as it does with a fixed number of seeds."""
    claims, _ = simulate([0.0] * best, studies=2000, noise=noise)
    assert claims <= 0.05


def test_a_difference_of_two_floors_costs_at_most_eight_runs() -> None:
    claims, cost = simulate([2 * tool.FLOOR], studies=200)
    assert cost <= 8 and claims > 0.95
    today = tool.simulate(tool.fixed, [2 * tool.FLOOR], 1, seeds=8)
    assert today[0].cost == 15


# -- the decisions


CLEAR = (0.9, 0.91, 0.89)
SMALL = (0.2, 0.21, 0.19, 0.2, 0.2, 0.2, 0.2, 0.2)  # below the noise floor of three pairs


def test_a_clear_gain_is_claimed_after_three_pairs() -> None:
    test = decide(CLEAR)
    (candidate,) = test.candidates
    assert outcomes(test) == [("claimed", 3)] and candidate.stopped == "it is claimed"
    low, high = stats.difference(test.base, candidate.scores).interval_of(1 - nominal_p(8)) or (0, 0)
    assert candidate.interval == pytest.approx((low, high)) and high < 0
    assert candidate.p == pytest.approx(chance_of(candidate.smallest_p, 8))


@pytest.mark.parametrize("gains", [(-0.1, -0.11), (0.0, 0.0), (0.02, -0.03)], ids=["worse", "equal", "mixed"])
def test_a_hopeless_trial_is_given_up_after_two_pairs(gains: tuple[float, ...]) -> None:
    assert outcomes(decide(gains)) == [("futile", 2)]


def test_an_uncertain_trial_gets_the_maximum() -> None:
    test = decide((0.1, 0.02, 0.1, 0.02, 0.1, 0.02, 0.1, 0.02), base=(2.0,) * 8)
    assert test.candidates[0].outcome in ("claimed", "maximum") and test.candidates[0].pairs > 3
    short = decide((0.1, 0.02, 0.1, 0.02), base=(2.0,) * 4, maximum=4)
    assert outcomes(short) == [("maximum", 4)]


def test_a_gain_within_the_floor_goes_on() -> None:
    """The base has a large noise between seeds, so that more pairs are needed to exceed it."""
    (candidate,) = decide(SMALL).candidates
    assert candidate.outcome == "claimed" and candidate.pairs > 3
    assert candidate.floor < candidate.gain


def test_a_trial_is_overtaken_by_a_claim_with_a_larger_gain() -> None:
    test = decide(CLEAR, SMALL)
    assert outcomes(test) == [("claimed", 3), ("overtaken", 3)]


def test_a_better_trial_goes_on_after_a_claim() -> None:
    """The second trial has the larger gain, but its differences vary more."""
    test = decide((0.6, 0.61, 0.59), (0.7, 1.3, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9), base=(2.0,) * 8)
    assert outcomes(test)[0] == ("claimed", 3)
    assert outcomes(test)[1][0] == "claimed" and outcomes(test)[1][1] > 3


def test_a_trial_that_diverges_is_given_up_and_does_not_count_as_noise() -> None:
    test = decide((0.9, -math.inf), CLEAR)
    assert outcomes(test) == [("diverged", 2), ("claimed", 3)]
    assert test.noise().df == 4 and math.isfinite(test.noise().floor)
    assert decide((0.9, 0.91), base=(2.0, math.inf)).candidates[0].outcome == "diverged"


def test_a_floor_of_its_own_is_needed_only_with_few_degrees_of_freedom() -> None:
    """Two pairs have two degrees of freedom. A third pair adds two."""
    quiet = (2.0, 2.001)
    test = SequentialTest([1], maximum=2)
    test.add_pairs(dict(enumerate(quiet)), {1: {0: 1.0, 1: 1.001001}})
    assert test.needs_floor and not test.next_pairs and test.open
    test.add_noise([2.0, 2.001, 1.999])
    assert outcomes(test) == [("claimed", 2)] and test.noise().df == 5
    loud = decide((1.0, 1.000001), base=quiet, maximum=2, noise=[2.0, 4.0, 0.0])
    assert outcomes(loud) == [("maximum", 2)]
    assert not decide((1.0, 1.0001, 1.0), maximum=3).noise_scores
    assert not decide((0.1, -0.1), maximum=2).noise_scores, "nothing would be claimed"


def test_without_trials_nothing_is_trained() -> None:
    test = SequentialTest([], 8)
    assert not test.open and not test.next_pairs and test.p_values() == []
    assert test.summary()["pairs"] == 0
