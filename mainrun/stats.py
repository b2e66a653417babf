"""What a few seeds can say: a mean with its interval, a difference, the noise floor, Holm's correction. Plain arithmetic, no scipy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) of Student's distribution."""
    if math.isinf(t):
        return float(t > 0)
    tail = 0.5 * _beta(df / 2, 0.5, df / (df + t * t))
    return 1 - tail if t > 0 else tail


def t_quantile(p: float, df: float) -> float:
    """The t below which a share p lies: bisection, since the way there is monotone."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly the mirrored one is fast
        return 1 - _beta(b, a, 1 - x)
    front = (
        math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
        / a
    )
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value


@dataclass(frozen=True)
class Mean:
    """Of the runs of one recipe. With one run there is no spread, and no interval."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def half(self) -> float | None:
        """Half the width of the interval of the mean."""
        n = len(self.values)
        return t_quantile((1 + LEVEL) / 2, n - 1) * stdev(self.values) / math.sqrt(n) if n > 1 else None


@dataclass(frozen=True)
class Difference:
    """b - a, and what backs it: over the seeds that both have where at least two are, else over all of each (Welch)."""

    a: float
    b: float
    n_a: int
    n_b: int
    seeds: tuple[int, ...]  # that pair; empty: unpaired
    error: float | None  # standard error; None: one of them has a single run
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
        half = t_quantile((1 + LEVEL) / 2, self.df) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float | None:
        """Two-sided, against no difference."""
        if self.error is None:
            return None
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * t_cdf(-abs(self.mean) / self.error, self.df)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """a and b: seed -> score. Neither is empty."""
    common = tuple(sorted(a.keys() & b.keys()))
    if len(common) > 1:
        apart = [b[seed] - a[seed] for seed in common]
        error = stdev(apart) / math.sqrt(len(common))
        means = fmean(a[seed] for seed in common), fmean(b[seed] for seed in common)
        return Difference(*means, len(common), len(common), common, error, len(common) - 1)
    n_a, n_b = len(a), len(b)
    means = fmean(a.values()), fmean(b.values())
    if min(n_a, n_b) < 2:
        return Difference(*means, n_a, n_b, (), None, 0)
    v_a, v_b = (stdev(x.values()) ** 2 / len(x) for x in (a, b))
    if v_a + v_b == 0:
        return Difference(*means, n_a, n_b, (), 0.0, n_a + n_b - 2)
    df = (v_a + v_b) ** 2 / (v_a**2 / (n_a - 1) + v_b**2 / (n_b - 1))  # Welch, Satterthwaite
    return Difference(*means, n_a, n_b, (), math.sqrt(v_a + v_b), df)


@dataclass(frozen=True)
class Noise:
    """What a seed alone does: the spread inside recipes, pooled."""

    sd: float
    df: int

    @property
    def floor(self) -> float:
        """Two single runs of one recipe are closer than this in 95 of 100 cases: no smaller difference is worth a claim."""
        return t_quantile((1 + LEVEL) / 2, self.df) * math.sqrt(2) * self.sd


def noise(groups: Iterable[Sequence[float]]) -> Noise | None:
    """None: no recipe was run with two seeds."""
    several = [g for g in groups if len(g) > 1]
    df = sum(len(g) - 1 for g in several)
    return Noise(math.sqrt(sum(stdev(g) ** 2 * (len(g) - 1) for g in several) / df), df) if df else None


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: that any of them is a false alarm is as unlikely as one alone."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = worst
    return adjusted


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; ties share their mean rank. None where one of them has a single rank."""
    x, y = _ranks(a), _ranks(b)
    mx, my = fmean(x), fmean(y)
    norm = math.sqrt(sum((v - mx) ** 2 for v in x) * sum((v - my) ** 2 for v in y))
    return sum((v - mx) * (w - my) for v, w in zip(x, y, strict=True)) / norm if norm else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {v: ordered.index(v) for v in set(values)}
    return [first[v] + (ordered.count(v) - 1) / 2 for v in values]
