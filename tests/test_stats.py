"""The arithmetic of the report, against tables, formulas written out, and simulated seeds."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest

from mainrun import stats


@pytest.mark.parametrize(
    ("p", "df", "table"),  # any printed table of Student's t
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 4, 2.7764), (0.975, 10, 2.2281), (0.975, 30, 2.0423),
        (0.975, 120, 1.9799), (0.95, 5, 2.0150), (0.995, 3, 5.8409), (0.9, 7, 1.4149), (0.5, 3, 0.0), (0.025, 2, -4.3027),
    ],
)  # fmt: skip
def test_quantiles_are_the_tables(p: float, df: float, table: float) -> None:
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


def test_seeds_that_pair_are_paired() -> None:
    a, b = {1: 2.0, 2: 2.2, 3: 2.4, 9: 7.0}, {3: 2.31, 1: 1.9, 2: 2.09}
    found = stats.difference(a, b)
    apart = [-0.1, -0.11, -0.09]
    half = 4.302653 * stdev(apart) / math.sqrt(3)
    assert found.seeds == (1, 2, 3) and found.paired
    assert found.mean == pytest.approx(-0.1)
    assert found.interval == pytest.approx((-0.1 - half, -0.1 + half), abs=1e-6)
    assert found.a == pytest.approx(2.2) and found.b == pytest.approx(2.1)  # of the same seeds, so that b - a is what is said


def test_seeds_that_do_not_pair_are_compared_by_welch() -> None:
    a, b = {1: 10.0, 2: 12.0, 3: 14.0}, {4: 20.0, 5: 20.5, 6: 21.0, 7: 21.5}
    found = stats.difference(a, b)
    va, vb = stdev(a.values()) ** 2 / 3, stdev(b.values()) ** 2 / 4
    df = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    assert not found.paired and found.df == pytest.approx(df)
    half = stats.t_quantile(0.975, df) * math.sqrt(va + vb)
    assert found.interval == pytest.approx((8.75 - half, 8.75 + half))


@pytest.mark.parametrize(("a", "b"), [({1: 1.0}, {1: 0.5}), ({1: 1.0, 2: 1.1}, {1: 0.5}), ({1: 1.0}, {2: 0.5, 3: 0.4})])
def test_a_single_run_has_no_interval(a: dict[int, float], b: dict[int, float]) -> None:
    found = stats.difference(a, b)
    assert found.interval is None and found.p is None


def test_an_interval_holds_the_truth_in_95_of_100_cases() -> None:
    rng, hits, n = random.Random(7), 0, 800
    for _ in range(n):
        a, b = ({s: rng.gauss(mean, sd) for s in seeds} for mean, sd, seeds in ((1.0, 0.1, range(3)), (0.8, 0.3, range(3, 8))))
        low, high = stats.difference(a, b).interval or (0, 0)
        hits += low <= -0.2 <= high
    assert 0.93 < hits / n < 0.97


def test_two_equal_runs_are_closer_than_the_floor_in_95_of_100_cases() -> None:
    rng, hits, n = random.Random(8), 0, 800
    for _ in range(n):
        found = stats.noise([[rng.gauss(0, 1) for _ in range(3)], [rng.gauss(5, 1) for _ in range(4)], [9.0]])
        assert found is not None and found.df == 5
        hits += abs(rng.gauss(0, 1) - rng.gauss(0, 1)) < found.floor
    assert 0.93 < hits / n < 0.97


def test_the_floor_needs_two_seeds() -> None:
    assert stats.noise([[1.0], [2.0]]) is None
    pooled = stats.noise([[1.0, 2.0], [5.0, 5.5, 6.0]])
    assert pooled is not None and pooled.sd == pytest.approx(math.sqrt((0.5 + 0.5) / 3))


def test_holm_is_holms() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


def test_p_and_interval_agree() -> None:
    rng = random.Random(3)
    for _ in range(200):
        found = stats.difference({i: rng.gauss(0, 1) for i in range(4)}, {i: rng.gauss(0.8, 1) for i in range(4)})
        assert found.p is not None and found.interval is not None
        assert (found.p < 0.05) == (found.interval[0] > 0 or found.interval[1] < 0)


def test_rank_correlation() -> None:
    assert stats.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert stats.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert stats.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.948683, abs=1e-6)
    assert stats.spearman([1, 1, 1], [1, 2, 3]) is None


def test_a_mean_of_one_has_no_spread() -> None:
    assert stats.Mean((1.5,)).sd is None and stats.Mean((1.5,)).half is None
    three = stats.Mean((1.0, 2.0, 3.0))
    assert three.mean == fmean((1, 2, 3)) and three.sd == 1.0 and three.half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
