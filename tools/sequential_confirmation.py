"""Simulate the sequential confirmation: false claims, power, and cost against the fixed design.

    python tools/sequential_confirmation.py [--studies 2000] [--pairs 8]

No model is trained. The score of a run is a constant plus noise, and the decisions are those of a study. A
floor is the noise floor that the fixed design expects for five seeds, 1.76 standard deviations of a score. R
is the cost of a run. The tables are in Markdown.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mainrun import stats
from sweeps.sequential import SequentialTest
from sweeps.verdict import is_better, paired_difference

SEEDS = 5  # the seeds of the fixed design, for the noise floor and for each recipe
FLOOR = stats.t_quantile(0.975, SEEDS - 1) * math.sqrt(2 / SEEDS)
SHARED = 1 / 3  # the share of the variance that runs with the same seed have in common (docs/log/search.md)

Draw = Callable[[np.random.Generator, int], np.ndarray]  # draws noise with the standard deviation 1


def normal(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal(count)


def heavy(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_t(3, count) / math.sqrt(3)


def skewed(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.exponential(1, count) - 1


def quiet(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal(count) / 3


NOISES: dict[str, tuple[Draw, Draw]] = {  # the noise of the base, and of the trials
    "normal": (normal, normal),
    "heavy tails (t, 3 df)": (heavy, heavy),
    "skewed (exponential)": (skewed, skewed),
    "skewed in the trials alone": (normal, skewed),
    "the same, with a third of the noise in the base": (quiet, skewed),
}


@dataclass(frozen=True)
class Result:
    """The result of one simulated study."""

    claims: bool
    cost: int  # in runs


def draw_scores(
    rng: np.random.Generator, draws: tuple[Draw, Draw], gains: Sequence[float], seeds: int, shared: float
) -> np.ndarray:
    """Draw the scores of the base and of each trial, one row per recipe and one column per seed."""
    base, trial = draws
    common = math.sqrt(shared) * base(rng, seeds)
    own = math.sqrt(1 - shared)
    return np.array([common + own * base(rng, seeds), *(common + own * trial(rng, seeds) - g for g in gains)])


def sequential(scores: np.ndarray, noise: Sequence[float]) -> Result:
    """Confirm the trials pair by pair. `noise` has the scores for a floor of its own, if it is needed."""
    test = SequentialTest(range(1, len(scores)), scores.shape[1])
    cost = 0
    while test.open:
        if test.needs_floor:
            cost += len(noise)
            test.add_noise(noise)
            continue
        pairs = test.next_pairs
        rows = {
            number: {seed: float(scores[number, seed]) for seed in pairs} for number in range(len(scores))
        }
        cost += len(pairs) * (1 + len(test.open))
        test.add_pairs(rows[0], rows)
    return Result(any(candidate.outcome == "claimed" for candidate in test.candidates), cost)


def fixed(scores: np.ndarray, noise: Sequence[float]) -> Result:
    """Confirm the trials with a fixed number of seeds."""
    measured = stats.noise([noise])
    assert measured is not None
    floor = measured.floor / math.sqrt(SEEDS)
    base, *trials = (dict(enumerate(map(float, row[:SEEDS]))) for row in scores)
    differences = [paired_difference(base, trial) for trial in trials]
    p_values = stats.holm([1.0 if difference.p is None else difference.p for difference in differences])
    claims = False
    for difference, p in zip(differences, p_values, strict=True):
        claims |= is_better(difference.mean, difference.interval, p, floor)
    return Result(claims, SEEDS * (2 + len(trials)))


def simulate(
    design: Callable[[np.ndarray, Sequence[float]], Result],
    gains: Sequence[float],
    studies: int,
    seeds: int,
    draws: tuple[Draw, Draw] = NOISES["normal"],
    shared: float = 0.0,
) -> list[Result]:
    results = []
    for number in range(studies):
        rng = np.random.default_rng([number, len(gains)])
        scores = draw_scores(rng, draws, gains, seeds, shared)
        noise = [float(score) for score in draws[0](rng, SEEDS)]
        results.append(design(scores, noise))
    return results


def share(results: Sequence[Result]) -> str:
    return f"{100 * statistics.fmean(result.claims for result in results):.1f}%"


def show_false_claims(studies: int, pairs: int) -> None:
    print(f"\nStudies without a real difference that claim one, of {studies:,}:\n")
    print("| noise | trials | pairs | fixed | median R | mean R |")
    print("|---|--:|--:|--:|--:|--:|")
    for noise, draws in NOISES.items():
        for best in (1, 3):
            null = [0.0] * best
            tested = simulate(sequential, null, studies, pairs, draws)
            costs = [result.cost for result in tested]
            today = share(simulate(fixed, null, studies, SEEDS, draws))
            print(
                f"| {noise} | {best} | {share(tested)} | {today} "
                f"| {statistics.median(costs):g} | {statistics.fmean(costs):.1f} |"
            )


def show_costs(studies: int, pairs: int) -> None:
    print(f"\nOne trial with a true difference, over {studies:,} studies (claimed; median R, mean R):\n")
    print("| shared variance | floors | pairs: claimed | median R | mean R | fixed: claimed | R |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for shared in (0.0, SHARED):
        for floors in (0, 0.5, 1, 2, 4):
            gains = [floors * FLOOR]
            tested = simulate(sequential, gains, studies, pairs, shared=shared)
            today = simulate(fixed, gains, studies, SEEDS, shared=shared)
            costs = [result.cost for result in tested]
            print(
                f"| {shared:.2f} | {floors:g} | {share(tested)} | {statistics.median(costs):g} "
                f"| {statistics.fmean(costs):.1f} | {share(today)} | {today[0].cost} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate the sequential confirmation.")
    parser.add_argument("--studies", type=int, default=2000, help="number of simulated studies per row")
    parser.add_argument("--pairs", type=int, default=8, help="maximum number of pairs")
    options = parser.parse_args()
    show_false_claims(options.studies, options.pairs)
    show_costs(options.studies, options.pairs)


if __name__ == "__main__":
    main()
