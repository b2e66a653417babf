"""Statistics over a few seeds: mean and interval, difference of two recipes, noise floor, Holm, Spearman.

scipy is imported inside the functions that need it, so that `import mainrun.stats` stays light.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

LEVEL = 0.95  # confidence level of every interval


def t_cdf(t: float, df: float) -> float:
    """Return P(T <= t) of Student's t distribution."""
    from scipy.special import stdtr

    return float(stdtr(df, t))


def t_quantile(p: float, df: float) -> float:
    """Return the t with P(T <= t) = p."""
    from scipy.special import stdtrit

    return float(stdtrit(df, p))


def _half_width(error: float, df: float) -> float:
    """Return half the width of the interval around an estimate with this standard error."""
    return t_quantile((1 + LEVEL) / 2, df) * error


@dataclass(frozen=True)
class Mean:
    """The mean score of a recipe over its seeds. A single run has neither a spread nor an interval."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation over the seeds."""
        if len(self.values) < 2:
            return None
        return stdev(self.values)

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval of the mean."""
        n = len(self.values)
        if n < 2:
            return None
        return _half_width(stdev(self.values) / math.sqrt(n), n - 1)


@dataclass(frozen=True)
class Difference:
    """The difference b - a of two recipes.

    It is paired over the common seeds if there are at least two, else unpaired (Welch) over all seeds.
    """

    a: float
    b: float
    n_a: int
    n_b: int
    seeds: tuple[int, ...]  # the common seeds of a paired difference; empty if unpaired
    error: float | None  # standard error; None if one of the recipes has a single run
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
        """Two-sided p-value of the hypothesis that the recipes do not differ."""
        if self.error is None:
            return None
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * t_cdf(-abs(self.mean) / self.error, self.df)


# By hand: Difference needs the standard error, which scipy's t-tests do not return.
def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Compare two recipes. Each maps a seed to a score, and neither is empty."""
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
    """Welch's test: the recipes may have different spreads."""
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
    """The spread that the seed alone causes: the standard deviation within recipes, pooled."""

    sd: float
    df: int

    @property
    def floor(self) -> float:
        """Two single runs of one recipe differ by less than this in 95 of 100 cases."""
        return _half_width(math.sqrt(2) * self.sd, self.df)


def noise(groups: Iterable[Sequence[float]]) -> Noise | None:
    """Pool the spread of groups of scores, one group per recipe. None if no group has two scores."""
    squares = 0.0
    df = 0
    for group in groups:
        if len(group) > 1:
            squares += variance(group) * (len(group) - 1)
            df += len(group) - 1
    if df == 0:
        return None
    return Noise(math.sqrt(squares / df), df)


# By hand: scipy has no Holm correction (scipy.stats.false_discovery_control bounds another error rate).
def holm(ps: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm's method, in the given order."""
    ascending = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, i in enumerate(ascending):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return the rank correlation of two samples; tied values share their mean rank.

    None if a sample has a single distinct value: its ranks have no variance.
    """
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)
