"""Statistics for recipes that are trained with a few seeds each.

scipy is imported inside the functions that need it, so that `import mainrun.stats` is fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

LEVEL = 0.95  # the confidence level of all intervals


def t_cdf(t: float, df: float) -> float:
    """Return P(T <= t) for Student's t distribution with `df` degrees of freedom."""
    from scipy.special import stdtr

    return float(stdtr(df, t))


def t_quantile(p: float, df: float) -> float:
    """Return the t for which P(T <= t) = p in Student's t distribution with `df` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, p))


def _half_width(error: float, df: float) -> float:
    """Return half the width of the confidence interval of an estimate, given its standard error."""
    return t_quantile((1 + LEVEL) / 2, df) * error


@dataclass(frozen=True)
class Mean:
    """The mean score of a recipe over its seeds.

    With a single score, the standard deviation and the interval are None.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def sd(self) -> float | None:
        """The standard deviation of the scores over the seeds."""
        if len(self.values) < 2:
            return None
        return stdev(self.values)

    @property
    def half_width(self) -> float | None:
        """Half the width of the confidence interval of the mean."""
        n = len(self.values)
        if n < 2:
            return None
        return _half_width(stdev(self.values) / math.sqrt(n), n - 1)


@dataclass(frozen=True)
class Difference:
    """The difference b - a of the mean scores of two recipes.

    If the recipes have at least two seeds in common, the difference is paired over these seeds. Otherwise it
    is unpaired over all seeds, with Welch's method.
    """

    a: float
    b: float
    n_a: int
    n_b: int
    seeds: tuple[int, ...]  # the common seeds of a paired difference, or () if it is unpaired
    error: float | None  # the standard error, or None if a recipe in an unpaired difference has a single run
    df: float

    @property
    def mean(self) -> float:
        return self.b - self.a

    @property
    def paired(self) -> bool:
        return bool(self.seeds)

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.error is None:
            return None
        half = _half_width(self.error, self.df)
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float | None:
        """The two-sided p-value of the hypothesis that the recipes do not differ."""
        if self.error is None:
            return None
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * t_cdf(-abs(self.mean) / self.error, self.df)


# scipy's t-tests are not used here, because they do not return the standard error that Difference needs.
def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Compare two recipes. Each argument maps seeds to scores and must not be empty."""
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
    """Compare two recipes with Welch's method, which allows for different standard deviations."""
    n_a = len(a)
    n_b = len(b)
    if min(n_a, n_b) < 2:
        return Difference(fmean(a), fmean(b), n_a, n_b, (), None, 0)
    v_a = variance(a) / n_a
    v_b = variance(b) / n_b
    df = n_a + n_b - 2.0
    if v_a + v_b > 0:
        df = (v_a + v_b) ** 2 / (v_a**2 / (n_a - 1) + v_b**2 / (n_b - 1))  # Welch-Satterthwaite
    return Difference(fmean(a), fmean(b), n_a, n_b, (), math.sqrt(v_a + v_b), df)


@dataclass(frozen=True)
class Noise:
    """The pooled standard deviation of scores within recipes, which only the seeds cause."""

    sd: float
    df: int

    @property
    def floor(self) -> float:
        """The difference that two single runs of one recipe stay below in 95% of cases."""
        return _half_width(math.sqrt(2) * self.sd, self.df)


def noise(groups: Iterable[Sequence[float]]) -> Noise | None:
    """Pool the standard deviations of groups of scores. Each group has the scores of one recipe.

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


# scipy has no Holm correction. Its function false_discovery_control bounds a different error rate.
def holm(ps: Sequence[float]) -> list[float]:
    """Return the p-values adjusted with Holm's method, in the order of the argument."""
    ascending = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, i in enumerate(ascending):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation of two samples. Tied values share their mean rank.

    Return None if all values of a sample are equal, because the correlation is then undefined.
    """
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)
