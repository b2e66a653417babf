"""Compares mainrun.stats with printed tables, explicit formulas, SciPy and simulated seeds."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError
from statistics import fmean, stdev
from typing import Any

import pytest
from scipy import stats as reference

from mainrun import stats


@pytest.mark.parametrize(
    ("p", "df", "table"),  # `table` has values from a printed table of Student's t
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 4, 2.7764), (0.975, 10, 2.2281), (0.975, 30, 2.0423),
        (0.975, 120, 1.9799), (0.95, 5, 2.0150), (0.995, 3, 5.8409), (0.9, 7, 1.4149), (0.5, 3, 0.0),
        (0.025, 2, -4.3027),
    ],
)  # fmt: skip
def test_quantiles_match_a_printed_table(p: float, df: float, table: float) -> None:
    assert stats.t_quantile(p, df) == pytest.approx(table, abs=6e-5)
    assert stats.t_cdf(stats.t_quantile(p, df), df) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("df", [1, 2, 2.7, 5, 33])
@pytest.mark.parametrize("t", [-3.0, -0.4, 0.7, 2.5, 8.0])
def test_the_distribution_is_the_integral_of_its_density(t: float, df: float) -> None:
    c = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    n = 20_000
    width = abs(t) / n
    area = sum(c * (1 + ((i + 0.5) * width) ** 2 / df) ** (-(df + 1) / 2) for i in range(n)) * width
    assert stats.t_cdf(t, df) == pytest.approx(0.5 + math.copysign(area, t), abs=1e-8)


def test_common_seeds_are_compared_in_pairs() -> None:
    a, b = {1: 2.0, 2: 2.2, 3: 2.4, 9: 7.0}, {3: 2.31, 1: 1.9, 2: 2.09}
    result = stats.difference(a, b)
    differences = [-0.1, -0.11, -0.09]
    half = 4.302653 * stdev(differences) / math.sqrt(3)
    assert result.seeds == (1, 2, 3) and result.paired
    assert result.mean == pytest.approx(-0.1)
    assert result.interval == pytest.approx((-0.1 - half, -0.1 + half), abs=1e-6)
    # The means are taken over the common seeds, so b - a is the mean of the paired differences.
    assert result.a == pytest.approx(2.2) and result.b == pytest.approx(2.1)


def test_distinct_seeds_are_compared_by_welchs_test() -> None:
    a, b = {1: 10.0, 2: 12.0, 3: 14.0}, {4: 20.0, 5: 20.5, 6: 21.0, 7: 21.5}
    result = stats.difference(a, b)
    va, vb = stdev(a.values()) ** 2 / 3, stdev(b.values()) ** 2 / 4
    df = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    assert not result.paired and result.df == pytest.approx(df)
    half = stats.t_quantile(0.975, df) * math.sqrt(va + vb)
    assert result.interval == pytest.approx((8.75 - half, 8.75 + half))


@pytest.mark.parametrize(
    ("a", "b"), [({1: 1.0}, {1: 0.5}), ({1: 1.0, 2: 1.1}, {1: 0.5}), ({1: 1.0}, {2: 0.5, 3: 0.4})]
)
def test_a_single_run_has_no_interval(a: dict[int, float], b: dict[int, float]) -> None:
    result = stats.difference(a, b)
    assert result.interval is None and result.p is None


def test_an_interval_contains_the_true_difference_in_95_of_100_cases() -> None:
    rng, hits, n = random.Random(7), 0, 800
    for _ in range(n):
        a, b = (
            {s: rng.gauss(mean, sd) for s in seeds}
            for mean, sd, seeds in ((1.0, 0.1, range(3)), (0.8, 0.3, range(3, 8)))
        )
        low, high = stats.difference(a, b).interval or (0, 0)
        hits += low <= -0.2 <= high
    assert 0.93 < hits / n < 0.97


def test_two_runs_of_one_recipe_differ_by_less_than_the_floor_in_95_of_100_cases() -> None:
    rng, hits, n = random.Random(8), 0, 800
    for _ in range(n):
        result = stats.noise(
            [[rng.gauss(0, 1) for _ in range(3)], [rng.gauss(5, 1) for _ in range(4)], [9.0]]
        )
        assert result is not None and result.df == 5
        hits += abs(rng.gauss(0, 1) - rng.gauss(0, 1)) < result.floor
    assert 0.93 < hits / n < 0.97


def test_the_noise_floor_needs_two_seeds() -> None:
    assert stats.noise([[1.0], [2.0]]) is None
    pooled = stats.noise([[1.0, 2.0], [5.0, 5.5, 6.0]])
    assert pooled is not None and pooled.sd == pytest.approx(math.sqrt((0.5 + 0.5) / 3))


def test_holms_correction() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


def test_p_and_interval_agree() -> None:
    rng = random.Random(3)
    for _ in range(200):
        result = stats.difference(
            {i: rng.gauss(0, 1) for i in range(4)}, {i: rng.gauss(0.8, 1) for i in range(4)}
        )
        assert result.p is not None and result.interval is not None
        assert (result.p < 0.05) == (result.interval[0] > 0 or result.interval[1] < 0)


def test_rank_correlation() -> None:
    assert stats.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert stats.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert stats.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.948683, abs=1e-6)
    assert stats.spearman([1, 1, 1], [1, 2, 3]) is None


def test_the_mean_of_one_run_has_no_spread() -> None:
    assert stats.Mean((1.5,)).sd is None and stats.Mean((1.5,)).half_width is None
    three = stats.Mean((1.0, 2.0, 3.0))
    assert (
        three.mean == fmean((1, 2, 3))
        and three.sd == 1.0
        and three.half_width == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    )


# -- against scipy, and edge cases


@pytest.mark.parametrize("df", [1, 1.5, 2, 3, 7.3, 40, 1e4])
@pytest.mark.parametrize("t", [-1e6, -37.0, -2.0, -1e-9, 0.0, 1e-9, 0.3, 1.0, 12.0, 1e6])
def test_the_distribution_matches_scipy(t: float, df: float) -> None:
    assert stats.t_cdf(t, df) == pytest.approx(float(reference.t.cdf(t, df)), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("df", [1, 1.5, 2, 3, 7.3, 40, 1e4])
@pytest.mark.parametrize("p", [1e-6, 0.025, 0.3, 0.5, 0.7, 0.9, 0.975, 0.9999])
def test_the_quantiles_match_scipy(p: float, df: float) -> None:
    assert stats.t_quantile(p, df) == pytest.approx(float(reference.t.ppf(p, df)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("t", "p"), [(math.inf, 1.0), (-math.inf, 0.0)])
@pytest.mark.parametrize("df", [1, 5])
def test_the_distribution_at_infinity(t: float, p: float, df: int) -> None:
    assert stats.t_cdf(t, df) == p


def test_the_level_is_95_percent() -> None:
    assert stats.LEVEL == 0.95


@pytest.mark.parametrize("values", [(1.0, 4.0), (1.0, 1.0), (2.0, 3.0, 7.0, 7.5), (-1e6, 1e6, 3.0)])
def test_the_interval_of_a_mean_matches_scipy(values: tuple[float, ...]) -> None:
    score = stats.Mean(values)
    assert score.mean == fmean(values) and score.sd == stdev(values)
    error = float(reference.sem(values))
    assert score.half_width == pytest.approx(float(reference.t.ppf(0.975, len(values) - 1)) * error, rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "kind"),
    [
        ({1: 2.0, 2: 2.5}, {1: 1.0, 2: 1.75}, "paired"),
        ({1: 2.0, 2: 2.5, 3: 2.0, 4: 9.0}, {1: 1.0, 2: 1.75, 3: 2.25, 5: 0.0}, "paired"),
        ({1: 2.0, 2: 2.5}, {2: 1.75, 3: 1.0}, "welch"),  # one common seed is not enough for a paired test
        ({1: 2.0, 2: 2.5, 3: 4.0}, {4: 1.75, 5: 1.0}, "welch"),
        ({1: 2.0, 2: 2.0}, {3: 1.75, 4: 1.0, 5: 1.5}, "welch"),
        ({1: 3.0, 2: 3.5, 3: 3.25}, {4: 1.0, 5: 1.0}, "welch"),
        ({1: 3.0, 2: 3.5}, {3: 1.0, 4: 1.5}, "welch"),  # both recipes have the same standard deviation
    ],
)
@pytest.mark.filterwarnings("ignore:Precision loss")
def test_differences_match_scipy(a: dict[int, float], b: dict[int, float], kind: str) -> None:
    got = stats.difference(a, b)
    common = sorted(a.keys() & b.keys())
    if kind == "paired":
        sample = [a[s] for s in common], [b[s] for s in common]
        expected: Any = reference.ttest_rel(sample[1], sample[0])
        assert got.seeds == tuple(common)
        assert (got.n_a, got.n_b) == (len(common), len(common))
    else:
        sample = list(a.values()), list(b.values())
        expected = reference.ttest_ind(sample[1], sample[0], equal_var=False)
        assert got.seeds == ()
        assert (got.n_a, got.n_b) == (len(a), len(b))
    interval = expected.confidence_interval(0.95)
    assert got.paired == (kind == "paired")
    assert (got.a, got.b) == (fmean(sample[0]), fmean(sample[1]))
    assert got.mean == got.b - got.a
    assert got.df == pytest.approx(float(expected.df), rel=1e-12)
    assert got.p == pytest.approx(float(expected.pvalue), rel=1e-9)
    assert got.interval == pytest.approx((float(interval.low), float(interval.high)), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "p", "interval", "df"),
    [
        ({1: 2.0, 2: 3.0}, {1: 1.5, 2: 2.5}, 0.0, (-0.5, -0.5), 1),  # both seeds have the same difference
        ({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0}, 1.0, (0.0, 0.0), 1),
        # All scores of each recipe are equal.
        ({1: 2.0, 2: 2.0}, {3: 1.5, 4: 1.5, 5: 1.5}, 0.0, (-0.5, -0.5), 3),
        ({1: 2.0, 2: 2.0}, {3: 2.0, 4: 2.0, 5: 2.0}, 1.0, (0.0, 0.0), 3),
    ],
)
def test_differences_of_runs_without_spread(
    a: dict[int, float], b: dict[int, float], p: float, interval: tuple[float, float], df: int
) -> None:
    got = stats.difference(a, b)
    assert (got.error, got.p, got.interval, got.df) == (0.0, p, interval, df)


@pytest.mark.parametrize(
    ("a", "b", "counts"),
    [
        ({1: 1.0}, {1: 0.5}, (1, 1)),
        ({1: 1.0, 2: 1.5}, {1: 0.5}, (2, 1)),
        ({1: 1.0}, {2: 0.5, 3: 0.5}, (1, 2)),
    ],
)
def test_a_difference_with_a_single_run_is_a_difference_of_means(
    a: dict[int, float], b: dict[int, float], counts: tuple[int, int]
) -> None:
    got = stats.difference(a, b)
    assert got == stats.Difference(fmean(a.values()), fmean(b.values()), *counts, (), None, 0)
    assert (got.interval, got.p, got.paired) == (None, None, False)


def test_results_are_immutable() -> None:
    for result, field in (
        (stats.Mean((1.0,)), "values"),
        (stats.difference({1: 1.0}, {1: 2.0}), "a"),
        (stats.Noise(1.0, 2), "sd"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(result, field, None)


@pytest.mark.parametrize(
    ("groups", "sd", "df"),
    [
        ([[1.0, 2.0]], math.sqrt(0.5), 1),
        ([[1.0, 2.0], [9.0]], math.sqrt(0.5), 1),  # a single run has no standard deviation
        ([[1.0, 2.0], [7.0, 7.0]], 0.5, 2),
        ([[1.0, 2.0], [5.0, 5.5, 6.0], []], math.sqrt(1 / 3), 3),
        ([[3.0, 3.0]], 0.0, 1),
        ([[0.0, 2.0, 4.0, 6.0], [1.0, 2.0]], math.sqrt(20.5 / 4), 4),
    ],
)
def test_noise_is_the_pooled_spread_within_recipes(groups: list[list[float]], sd: float, df: int) -> None:
    pooled = stats.noise(groups)
    assert pooled is not None
    assert (pooled.sd, pooled.df) == (pytest.approx(sd, rel=1e-12), df)
    assert pooled.floor == pytest.approx(float(reference.t.ppf(0.975, df)) * math.sqrt(2) * sd, rel=1e-9)


@pytest.mark.parametrize("groups", [[], [[]], [[1.0]], [[1.0], [2.0], []]])
def test_noise_is_unknown_without_two_runs_of_one_recipe(groups: list[list[float]]) -> None:
    assert stats.noise(groups) is None


@pytest.mark.parametrize(
    ("ps", "adjusted"),
    [
        ([], []),
        ([0.2], [0.2]),
        ([0.0], [0.0]),
        ([1.0], [1.0]),
        ([0.01, 0.02], [0.02, 0.02]),
        ([0.02, 0.01], [0.02, 0.02]),
        ([0.03, 0.02, 0.01], [0.04, 0.04, 0.03]),
        ([0.01, 0.01, 0.01], [0.03, 0.03, 0.03]),  # all p-values are equal
        ([0.001, 0.04, 0.03, 0.2], [0.004, 0.09, 0.09, 0.2]),
        ([0.5, 0.4, 0.9], [1.0, 1.0, 1.0]),  # adjusted p-values are at most 1
        ([0.0, 0.9, 0.5], [0.0, 1.0, 1.0]),
        # An adjusted p-value is never below that of a smaller p-value.
        ([0.012, 0.011, 0.05], [0.033, 0.033, 0.05]),
    ],
)
def test_holms_correction_matches_results_by_hand(ps: list[float], adjusted: list[float]) -> None:
    assert stats.holm(ps) == pytest.approx(adjusted, rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1, 2, 3], [3, 1, 2]),
        ([1, 2], [2, 1]),
        ([1, 1, 2, 3], [4, 5, 5, 5]),
        ([5, 5, 5, 1, 2], [1, 2, 2, 9, 9]),
        ([0.1, -3, 1e9, math.inf], [1, 2, 4, 3]),
        ([7, 7, 7, 7, 1], [1, 2, 3, 4, 5]),
    ],
)
def test_rank_correlation_matches_scipy(a: list[float], b: list[float]) -> None:
    assert stats.spearman(a, b) == pytest.approx(float(reference.spearmanr(a, b).statistic), rel=1e-12)
    assert stats.spearman(b, a) == pytest.approx(stats.spearman(a, b), rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [([1], [2]), ([1, 1], [1, 2]), ([1, 2], [3, 3]), ([4, 4], [4, 4])])
def test_a_constant_sample_has_no_rank_correlation(a: list[float], b: list[float]) -> None:
    assert stats.spearman(a, b) is None


def test_importing_the_module_does_not_load_scipy() -> None:
    code = "import sys, mainrun.stats; print('scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("costs", "scores", "expected"),
    [
        ([], [], []),
        ([3, 1, 2], [1.0, 3.0, 2.0], [1, 2, 0]),
        ([1, 2, 3], [2.0, 2.5, 1.0], [0, 2]),  # the second point costs more and scores worse
        ([1, 2], [2.0, 2.0], [0]),  # a higher cost needs a better score
        ([1, 1], [2.0, 1.0], [1]),
        ([0, 0, 0], [1.0, 1.0, 2.0], [0]),
    ],
)
def test_the_frontier_has_the_points_that_no_cheaper_point_beats(
    costs: list[float], scores: list[float], expected: list[int]
) -> None:
    assert stats.frontier(costs, scores) == expected


def test_the_levels_of_intervals_follow_holms_method() -> None:
    assert stats.holm_levels([]) == []
    assert stats.holm_levels([0.5]) == pytest.approx([0.95])
    levels = stats.holm_levels([0.04, 0.001, 0.02])
    assert levels == pytest.approx([0.95, 1 - 0.05 / 3, 0.975]), "each claim is proved in turn"
    levels = stats.holm_levels([0.04, 0.02, 0.03])
    assert levels == pytest.approx([1 - 0.05 / 3] * 3), "the smallest p-value is above 0.05 / 3"


def test_an_interval_excludes_a_value_if_its_adjusted_p_value_is_small() -> None:
    rng = random.Random(5)
    proved = 0
    for _ in range(300):
        changes = []
        for _ in range(3):
            a = {seed: rng.gauss(0, 1) for seed in range(4)}
            changes.append(stats.difference(a, {seed: a[seed] + rng.gauss(1.5, 1) for seed in a}))
        value = rng.choice([0.0, 0.5])
        ps = [change.p_of(value) or 0.0 for change in changes]
        for change, p, level in zip(changes, stats.holm(ps), stats.holm_levels(ps), strict=True):
            low, high = change.interval_of(level) or (0, 0)
            assert (p < 0.05) == (not low <= value <= high)
            proved += p < 0.05
    assert 100 < proved < 800


def test_the_p_value_of_another_value_matches_scipy() -> None:
    a, b = {1: 2.0, 2: 2.2, 3: 2.4}, {1: 1.9, 2: 2.09, 3: 2.31}
    expected = reference.ttest_1samp([b[seed] - a[seed] for seed in a], -0.08)
    assert stats.difference(a, b).p_of(-0.08) == pytest.approx(expected.pvalue)
