"""Judge whether a trial is better than the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from mainrun import stats

Interval = tuple[float, float]
NO_INTERVAL = "a run diverged, so there is no interval"


def paired_difference(base: Mapping[int, float], trial: Mapping[int, float]) -> stats.Difference:
    """Compare the scores of the base with the scores of a trial, paired by seed.

    The score of a diverged run is infinity. A difference with an infinite score has no confidence interval
    and no p-value.
    """
    if all(map(math.isfinite, (*base.values(), *trial.values()))):
        return stats.difference(base, trial)
    return stats.Difference(fmean(base.values()), fmean(trial.values()), len(base), len(trial), (), None, 0)


def is_better(difference: float, interval: Interval | None, p: float, floor: float) -> bool:
    """Return whether a trial may be claimed to be better than the base.

    A claim must pass three tests. The confidence interval of the difference must be below zero, the gain must
    exceed the noise floor, and the p-value must be significant.
    """
    return interval is not None and interval[1] < 0 and -difference > floor and p < 1 - stats.LEVEL


def why_not(difference: float, interval: Interval | None, p: float, floor: float) -> str:
    """Return the reason why the study does not claim that a trial is better than the base."""
    if difference >= 0:
        return "it is not better"
    if interval is None:
        return NO_INTERVAL
    if interval[1] >= 0:
        return "its interval contains zero"
    if -difference <= floor:
        return f"the difference is within the noise floor {floor:.4f}"
    return f"p={p:.3f} after Holm's correction"
