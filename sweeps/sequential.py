"""Decide after each pair of runs whether a trial is better than the base.

A pair is a run of the trial and a run of the base with the same seed. A decision after a number of pairs is
a look. With several looks, a p-value is small by chance more often than with one. A trial's p-value is
therefore the chance that the smallest p-value of all looks up to the maximum is as small without a real
difference. The chance is computed exactly, for normal noise of unknown size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import beta, stdtr, stdtrit

from mainrun import stats
from sweeps.verdict import Interval, is_better, paired_difference

FIRST_PAIRS = 2  # the number of pairs before the first decision
FIRST_LOOK = 3  # with two pairs, Student's t has one degree of freedom, so almost no gain is significant
FEWEST_DF = 4  # with fewer degrees of freedom, the noise floor needs runs of its own
FUTILE = 0.1  # a trial is given up if the chance of a claim is lower
NODES = 129
STOPPED = {
    "claimed": "it is claimed",
    "futile": "a claim after the last pair is unlikely",
    "overtaken": "another trial is claimed with a larger gain",
    "diverged": "a run diverged",
    "maximum": "it was the last pair",
}
_points, _weights = np.polynomial.legendre.leggauss(48)


# -- the exact level


@lru_cache(maxsize=4096)
def chance_of(p: float, maximum: int) -> float:
    """Return the chance that a p-value of at most `p` occurs at any look, without a real difference.

    Let r be the sum of n differences, divided by the root of their sum of squares. Without a real difference,
    the next r is r cos(a) + sin(a), and the density of the angle a is proportional to cos(a) ** (n - 1). The
    chance to cross the bound later is therefore a function of n and r alone. It is computed backwards.
    """
    first = min(FIRST_LOOK, maximum)
    if p <= 0 or p >= 1 or first == maximum:
        return min(1.0, max(0.0, p))
    nodes = _nodes(_bound_of_r(p, maximum))
    chances = np.zeros(NODES)
    for n in range(maximum - 1, first - 1, -1):
        later = (nodes, chances)
        nodes = _nodes(_bound_of_r(p, n))
        chances = _chances(n, nodes, _bound_of_r(p, n + 1), *later)
    # At the first look, r is sqrt(n) sin(b), and the density of b is proportional to cos(b) ** (n - 2).
    half = math.asin(nodes[-1] / math.sqrt(first)) / 2
    angles = half * (1 + _points)
    density = np.cos(angles) ** (first - 2) / beta((first - 1) / 2, 0.5)
    later_chance = (
        2 * half * float(_weights @ (density * np.interp(math.sqrt(first) * np.sin(angles), nodes, chances)))
    )
    return min(1.0, p + later_chance, p * (maximum - first + 1))


def _bound_of_r(p: float, n: int) -> float:
    t = stdtrit(n - 1, 1 - p / 2) if p > 1e-9 else -stdtrit(n - 1, p / 2)
    return math.sqrt(n) * float(t) / math.hypot(t, math.sqrt(n - 1))


def _nodes(bound: float) -> np.ndarray:
    """Return values of r between 0 and the bound. The chance is the same for r and -r."""
    return bound * np.sin(np.linspace(0, math.pi / 2, NODES))


def _chances(
    n: int, r: np.ndarray, bound: float, later_r: np.ndarray, later_chances: np.ndarray
) -> np.ndarray:
    """Return the chance to cross a bound after n pairs, at the next look or later, for each value of r."""
    right = math.pi / 2
    turn = np.arctan(r)  # r cos(a) + sin(a) = sqrt(1 + r * r) sin(a + turn)
    height = np.sqrt(1 + r * r)
    edge = np.arcsin(np.minimum(1, bound / height))
    # The next r is above the bound from `up` to `down`, and below minus the bound from `low` to `high`.
    up, down, low, high = (
        np.clip(angle - turn, -right, right) for angle in (edge, math.pi - edge, edge - math.pi, -edge)
    )

    def below(angle: np.ndarray) -> np.ndarray:
        return stdtr(n, math.sqrt(n) * np.tan(angle))

    total: np.ndarray = below(down) - below(up) + below(high) - below(low)
    for start, end in ((np.full_like(r, -right), low), (high, up), (down, np.full_like(r, right))):
        half = (end - start)[:, None] / 2
        angles = (start + end)[:, None] / 2 + half * _points
        density = np.cos(angles) ** (n - 1) / beta(n / 2, 0.5)
        reached = np.abs(height[:, None] * np.sin(angles + turn[:, None]))
        later = np.interp(reached, later_r, later_chances)
        total += (half * _weights * density * later).sum(axis=1)
    return total


@lru_cache
def nominal_p(maximum: int) -> float:
    """Return the p-value that a single look must reach, so that the level holds over all looks."""
    level = 1 - stats.LEVEL
    lowest = level / maximum
    return float(brentq(lambda p: chance_of(p, maximum) - level, lowest, level, rtol=1e-8))


# -- the decisions


@dataclass
class Candidate:
    """A trial that is compared with the base. `outcome` is a key of STOPPED, or empty."""

    trial: int
    maximum: int  # number of pairs
    scores: dict[int, float] = field(default_factory=dict)  # by seed
    difference: stats.Difference | None = None
    smallest_p: float = 1.0  # of all looks so far
    interval: Interval | None = None
    floor: float = math.inf  # the noise floor of a mean over the pairs
    outcome: str = ""

    @property
    def pairs(self) -> int:
        return len(self.scores)

    @property
    def stopped(self) -> str:
        """The reason why the trial gets no further pairs."""
        return STOPPED[self.outcome]

    @property
    def p(self) -> float:
        """The p-value, adjusted for the looks."""
        return chance_of(self.smallest_p, self.maximum)

    @property
    def gain(self) -> float:
        return -self.difference.mean if self.difference else -math.inf


class SequentialTest:
    """Compares trials with the base, pair by pair. All decisions follow from the scores alone."""

    def __init__(self, trials: Sequence[int], maximum: int) -> None:
        self.maximum = maximum
        self.candidates = [Candidate(trial, maximum) for trial in trials]
        self.base: dict[int, float] = {}  # the scores of the base, by seed
        self.noise_scores: list[float] = []  # scores of the base with other seeds
        self.needs_floor = False  # whether a claim depends on a floor with more degrees of freedom

    @property
    def open(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if not candidate.outcome]

    @property
    def next_pairs(self) -> range:
        """The numbers of the pairs that are trained next, counted from 0."""
        if not self.open or self.needs_floor:
            return range(0)
        used = len(self.base)
        return range(used, max(FIRST_PAIRS, used + 1))

    def add_pairs(self, base: Mapping[int, float], scores: Mapping[int, Mapping[int, float]]) -> None:
        """Add scores by seed, of the base and of each open trial, and decide which trials remain open."""
        self.base.update(base)
        for candidate in self.open:
            candidate.scores.update(scores[candidate.trial])
        self._decide()

    def add_noise(self, scores: Sequence[float]) -> None:
        """Add scores of the base with seeds that no pair has."""
        self.noise_scores = list(scores)
        self.needs_floor = False
        self._decide()

    def noise(self) -> stats.Noise:
        """Pool the noise between seeds of the base and of all trials. Trials that diverged do not count."""
        base = [*self.base.values(), *self.noise_scores]
        if not all(map(math.isfinite, base)):
            return stats.Noise(math.inf, 1)
        groups = [base]
        for candidate in self.candidates:
            scores = list(candidate.scores.values())
            if all(map(math.isfinite, scores)):
                groups.append(scores)
        return stats.noise(groups) or stats.Noise(math.inf, 1)

    def p_values(self) -> list[float]:
        """Return the p-value of each trial, adjusted for the looks and by Holm's method."""
        return stats.holm([candidate.p for candidate in self.candidates])

    def summary(self) -> dict[str, Any]:
        return {
            "pairs": len(self.base),
            "maximum": self.maximum,
            "level": stats.LEVEL,
            "nominal_p": nominal_p(self.maximum),
        }

    def describe(self) -> str:
        """Describe the state of each trial in one line."""
        states = [f"trial {c.trial} {'goes on' if not c.outcome else c.outcome}" for c in self.candidates]
        return f"{len(self.base)} of at most {self.maximum} pairs: {', '.join(states)}"

    def _decide(self) -> None:
        noise = self.noise()
        for candidate in self.open:
            self._measure(candidate, noise)
        better = self._better()
        is_last = len(self.base) == self.maximum
        if better and noise.df < FEWEST_DF and not self.noise_scores:
            self.needs_floor = is_last  # before the last pair, another pair is cheaper than a floor
            better = []
        if self.needs_floor:
            return
        for candidate in better:
            candidate.outcome = "claimed"
        claimed = [candidate.gain for candidate in self.candidates if candidate.outcome == "claimed"]
        for candidate in self.open:
            candidate.outcome = self._reason_to_stop(candidate, noise, max(claimed, default=-math.inf))

    def _measure(self, candidate: Candidate, noise: stats.Noise) -> None:
        candidate.difference = difference = paired_difference(self.base, candidate.scores)
        candidate.floor = noise.floor / math.sqrt(candidate.pairs)
        candidate.interval = None
        if difference.p is None or candidate.pairs < min(FIRST_LOOK, self.maximum):
            return
        candidate.smallest_p = min(candidate.smallest_p, difference.p)
        candidate.interval = difference.interval_of(1 - nominal_p(self.maximum))

    def _better(self) -> list[Candidate]:
        """Return the open trials that may be claimed, whatever the degrees of freedom of the floor."""
        if not any(candidate.interval and candidate.interval[1] < 0 for candidate in self.open):
            return []  # p-values are slow to compute
        better = []
        for candidate, p in zip(self.candidates, self.p_values(), strict=True):
            if not candidate.outcome and is_better(-candidate.gain, candidate.interval, p, candidate.floor):
                better.append(candidate)
        return better

    def _reason_to_stop(self, candidate: Candidate, noise: stats.Noise, claimed: float) -> str:
        """Return why an open trial gets no further pairs, or "" if it goes on."""
        assert candidate.difference is not None
        if candidate.difference.error is None:
            return "diverged"
        if len(self.base) == self.maximum:
            return "maximum"
        if candidate.gain <= claimed:
            return "overtaken"
        return "futile" if self.chance_of_claim(candidate, noise) < FUTILE else ""

    def chance_of_claim(self, candidate: Candidate, noise: stats.Noise) -> float:
        """Estimate the chance that an open trial is claimed after the last pair, from its pairs so far."""
        assert candidate.difference is not None and candidate.difference.error is not None
        n = candidate.pairs
        spread = candidate.difference.error * math.sqrt(n)
        t = stats.t_quantile(1 - nominal_p(self.maximum) / 2, self.maximum - 1)
        needed = max(t * spread, noise.floor) / math.sqrt(self.maximum)
        deviation = spread * math.sqrt(1 / n - 1 / self.maximum)
        if deviation == 0:
            return float(candidate.gain > needed)
        return stats.t_cdf((candidate.gain - needed) / deviation, n - 1)
