"""Statistics for comparing recipes that are each trained with a few seeds.

scipy is imported inside the functions that need it, so that `import mainrun.stats` is fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

LEVEL = 0.95  # the confidence level of all confidence intervals


def t_cdf(t: float, df: float) -> float:
    """Return P(T <= t) for Student's t distribution with `df` degrees of freedom."""
    from scipy.special import stdtr

    return float(stdtr(df, t))


def t_quantile(p: float, df: float) -> float:
    """Return the t for which P(T <= t) = p in Student's t distribution with `df` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, p))


def _half_width(error: float, df: float, level: float = LEVEL) -> float:
    """Return half the width of an estimate's confidence interval, given the estimate's standard error."""
    return t_quantile((1 + level) / 2, df) * error


@dataclass(frozen=True)
class Mean:
    """The mean score of a recipe over its seeds.

    If there is only one score, the standard deviation and the confidence interval are None.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def sd(self) -> float | None:
        """The standard deviation of the recipe's scores over the seeds."""
        if len(self.values) < 2:
            return None
        return stdev(self.values)

    @property
    def half_width(self) -> float | None:
        """Half the width of the mean's confidence interval."""
        n = len(self.values)
        if n < 2:
            return None
        return _half_width(stdev(self.values) / math.sqrt(n), n - 1)


@dataclass(frozen=True)
class Difference:
    """The difference b - a between the mean scores of two recipes.

    If the recipes have at least two seeds in common, the scores are compared in pairs with the same seed.
    Otherwise, the scores of all seeds are compared with Welch's method.
    """

    a: float
    b: float
    n_a: int
    n_b: int
    seeds: tuple[int, ...]  # the seeds of a paired difference; empty if the difference is unpaired
    error: float | None  # the standard error of the difference, or None if unknown
    df: float

    @property
    def mean(self) -> float:
        return self.b - self.a

    @property
    def paired(self) -> bool:
        return bool(self.seeds)

    @property
    def interval(self) -> tuple[float, float] | None:
        return self.interval_of(LEVEL)

    def interval_of(self, level: float) -> tuple[float, float] | None:
        """Return the confidence interval of the difference for a confidence level."""
        if self.error is None:
            return None
        half = _half_width(self.error, self.df, level)
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float | None:
        """The two-sided p-value for the hypothesis that the two recipes have the same mean score."""
        return self.p_of(0.0)

    def p_of(self, value: float) -> float | None:
        """Return the two-sided p-value for the hypothesis that the true difference is `value`."""
        if self.error is None:
            return None
        distance = abs(self.mean - value)
        if self.error == 0:
            return float(distance == 0)
        return 2 * t_cdf(-distance / self.error, self.df)


# The code does not use scipy's t-tests, because scipy's t-tests do not return the standard error.
def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Compare two recipes. Each argument maps the seeds of a recipe to scores, and must not be empty."""
    common = tuple(sorted(a.keys() & b.keys()))
    if len(common) > 1:
        return _paired(a, b, common)
    return _unpaired(tuple(a.values()), tuple(b.values()))


def _paired(a: Mapping[int, float], b: Mapping[int, float], seeds: tuple[int, ...]) -> Difference:
    n = len(seeds)
    mean_a = fmean(a[seed] for seed in seeds)
    mean_b = fmean(b[seed] for seed in seeds)
    error = stdev(b[seed] - a[seed] for seed in seeds) / math.sqrt(n)
    return Difference(mean_a, mean_b, n, n, seeds, error, n - 1)


def _unpaired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two recipes with Welch's method, which does not assume equal standard deviations."""
    n_a = len(a)
    n_b = len(b)
    if min(n_a, n_b) < 2:
        return Difference(fmean(a), fmean(b), n_a, n_b, (), None, 0)
    v_a = variance(a) / n_a
    v_b = variance(b) / n_b
    df = n_a + n_b - 2.0
    if v_a + v_b > 0:
        df = (v_a + v_b) ** 2 / (v_a**2 / (n_a - 1) + v_b**2 / (n_b - 1))  # the Welch-Satterthwaite equation
    return Difference(fmean(a), fmean(b), n_a, n_b, (), math.sqrt(v_a + v_b), df)


@dataclass(frozen=True)
class Noise:
    """The pooled standard deviation of scores from runs that differ only in the seed."""

    sd: float
    df: int

    @property
    def floor(self) -> float:
        """In 95% of cases, the scores of two runs of the same recipe differ by less than this number."""
        return _half_width(math.sqrt(2) * self.sd, self.df)


def noise(groups: Iterable[Sequence[float]]) -> Noise | None:
    """Pool the standard deviations of several groups of scores. Each group has the scores of one recipe.

    Return None if no group has at least two scores.
    """
    squares = 0.0
    df = 0
    for group in groups:
        if len(group) > 1:
            squares += variance(group) * (len(group) - 1)
            df += len(group) - 1
    if df == 0:
        return None
    return Noise(math.sqrt(squares / df), df)


# scipy does not implement Holm's method, which controls the family-wise error rate. The function
# false_discovery_control in scipy controls the false discovery rate instead.
def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p-values with Holm's method. Return them in the same order."""
    ascending = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, i in enumerate(ascending):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def holm_levels(ps: Sequence[float]) -> list[float]:
    """Return a confidence level for each claim, so that the intervals agree with Holm's method.

    The interval of a claim excludes the value that the claim tests if and only if the claim's adjusted
    p-value is below 1 - LEVEL.
    """
    levels = [0.0] * len(ps)
    remaining = len(ps)  # the number of claims that are not proved by smaller p-values
    for i in sorted(range(len(ps)), key=lambda i: ps[i]):
        levels[i] = 1 - (1 - LEVEL) / remaining
        if remaining * ps[i] < 1 - LEVEL:
            remaining -= 1
    return levels


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation of two samples. Equal values get the mean of their ranks.

    If all values of a sample are equal, the correlation is undefined and the function returns None.
    """
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


def frontier(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the positions of all points with a lower score than every point that costs the same or less.

    The positions are sorted by cost. Lower scores are better. Of equal points, only the first one counts.
    """
    best = math.inf
    positions = []
    for position in sorted(range(len(costs)), key=lambda i: (costs[i], scores[i], i)):
        if scores[position] < best:
            best = scores[position]
            positions.append(position)
    return positions
