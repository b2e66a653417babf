"""Measure how many tokens searches need until they recommend a good recipe, and compare methods.

All tokens are in whole runs. A recipe is good if its mean score is within one sigma of the best known one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mainrun import stats
from sweeps.frugal import recipe_key

if TYPE_CHECKING:
    from sweeps.search_bench.tables import Table

CAP = 60.0  # a search that has not reached a good recipe by then counts as this many whole runs
POINTS = (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 40.0)  # at which regret is measured
LAST_POINT = POINTS[-1]
AREA_END = 24.0
AREA_STEPS = 240
DRAWS = 10_000  # of the bootstrap
THIRD = 1 / 3
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Trace:
    """One search: its recommendation after each run."""

    method: str
    table: str
    search_seed: int
    train_seed: int
    steps: list[tuple[float, str | None]]  # tokens so far, and the key of the recommended recipe
    cpu_seconds: float

    def data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Trace:
        return cls(**{**data, "steps": [(tokens, key) for tokens, key in data["steps"]]})


@dataclass(frozen=True)
class Quality:
    """What a table says about recipes, by key."""

    regret: dict[str, float]  # in sigma
    good: frozenset[str]
    base: float  # the regret of the base, which counts before the first recommendation

    @classmethod
    def of(cls, table: Table) -> Quality:
        """Return the quality of all recipes. A recipe without a finite mean counts as the worst one."""
        means = {recipe_key(values): float(table.mean(values)) for values in table.recipes}
        worst = max(mean for mean in means.values() if math.isfinite(mean))
        regret = {}
        for key, mean in means.items():
            finite = mean if math.isfinite(mean) else worst
            regret[key] = (finite - table.best_known) / table.sigma
        return cls(regret, table.good, regret[recipe_key(table.base)])


def tokens_until_good(trace: Trace, good: frozenset[str]) -> float:
    """Return the tokens at the first good recommendation, or the cap."""
    for tokens, key in trace.steps:
        if key in good:
            return min(tokens, CAP)
    return CAP


def regrets(trace: Trace, quality: Quality, at: np.ndarray) -> np.ndarray:
    """Return the regret of what a search recommends after each number of tokens."""
    named = [(tokens, quality.regret[key]) for tokens, key in trace.steps if key is not None]
    values = np.array([quality.base, *(regret for _, regret in named)])
    return values[np.searchsorted([tokens for tokens, _ in named], at, side="right")]


@dataclass(frozen=True)
class Summary:
    """The searches of one method."""

    method: str
    searches: int
    reached: float  # the share of searches that reach a good recipe
    tokens: tuple[float, float, float]  # the quartiles of the tokens until then
    mean: float  # the restricted mean of these tokens
    regrets: dict[float, tuple[float, float, float]]  # the quartiles of the regret, by tokens
    area: float  # under the curve of the median regret
    cpu_seconds: float  # the median of a search


def _quartiles(values: Any) -> tuple[float, float, float]:
    low, median, high = (float(x) for x in np.quantile(values, QUARTILES))
    return low, median, high


def summarize(method: str, traces: Sequence[Trace], quality: Quality) -> Summary:
    tokens = np.array([tokens_until_good(trace, quality.good) for trace in traces])
    at_points = np.array([regrets(trace, quality, np.array(POINTS)) for trace in traces])
    grid = (np.arange(AREA_STEPS) + 0.5) * AREA_END / AREA_STEPS
    medians = np.median([regrets(trace, quality, grid) for trace in traces], axis=0)
    return Summary(
        method=method,
        searches=len(traces),
        reached=float((tokens < CAP).mean()),
        tokens=_quartiles(tokens),
        mean=float(tokens.mean()),
        regrets={point: _quartiles(at_points[:, i]) for i, point in enumerate(POINTS)},
        area=float(medians.mean() * AREA_END),
        cpu_seconds=float(np.median([trace.cpu_seconds for trace in traces])),
    )


# -- comparisons


@dataclass(frozen=True)
class Comparison:
    """The ratio of the restricted means of our method and a rival."""

    rival: str
    ratio: float
    interval: tuple[float, float]  # 95%
    corrected: tuple[float, float]  # the interval that decides whether the methods differ
    upper: float  # the upper end that decides whether the ratio is at most a third

    @property
    def verdict(self) -> str:
        """Say how the tokens of our method compare with those of the rival."""
        if self.upper <= THIRD:
            return "at most a third"
        if self.corrected[1] < 1:
            return "fewer"
        return "more" if self.corrected[0] > 1 else "not told apart"


def by_search_seed(traces: Sequence[Trace], good: frozenset[str]) -> dict[int, dict[int, float]]:
    """Return the tokens until a good recommendation, by search seed and training seed."""
    tokens: dict[int, dict[int, float]] = {}
    for trace in traces:
        tokens.setdefault(trace.search_seed, {})[trace.train_seed] = tokens_until_good(trace, good)
    return tokens


def ratios(ours: Sequence[Trace], rival: Sequence[Trace], good: frozenset[str]) -> tuple[float, np.ndarray]:
    """Return the ratio of the restricted means, and its paired bootstrap draws.

    Search seeds are drawn, each together with all of its training seeds. The two training seeds are too few
    to be drawn themselves, so the interval holds for these training seeds.
    """
    a = by_search_seed(ours, good)
    b = by_search_seed(rival, good)
    pairs = []
    for seed in sorted(a.keys() & b.keys()):
        both = sorted(a[seed].keys() & b[seed].keys())
        if both:
            pairs.append([np.mean([tokens[seed][train] for train in both]) for tokens in (a, b)])
    means = np.array(pairs)
    count = len(means)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS) @ means
    total = means.sum(0)
    return float(total[0] / total[1]), drawn[:, 0] / drawn[:, 1]


def interval(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = (float(x) for x in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
    return low, high


def p_value(draws: np.ndarray, bound: float) -> float:
    """Return the two-sided p-value of the claim that a ratio is below a bound."""
    return min(1.0, 2 * (1 + int((draws > bound).sum())) / (1 + len(draws)))


def compare(
    ours: Sequence[Trace], rivals: Mapping[str, Sequence[Trace]], good: frozenset[str]
) -> list[Comparison]:
    """Compare our method with every rival. The claims are corrected with Holm's method over the rivals."""
    drawn = {name: ratios(ours, traces, good) for name, traces in rivals.items()}
    third = [p_value(draws, THIRD) for _, draws in drawn.values()]
    apart = [min(p_value(draws, 1.0), p_value(-draws, -1.0)) for _, draws in drawn.values()]
    levels = zip(stats.holm_levels(third), stats.holm_levels(apart), strict=True)
    rows = []
    for (name, (ratio, draws)), (level_of_third, level) in zip(drawn.items(), levels, strict=True):
        ends = interval(draws, stats.LEVEL)
        upper = interval(draws, level_of_third)[1]
        rows.append(Comparison(name, ratio, ends, interval(draws, level), upper))
    return rows
