"""Tests the metrics of the search benchmark: tokens until a good recommendation, regrets, and claims."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sweeps.frugal import recipe_key
from sweeps.search_bench.metrics import (
    CAP,
    Quality,
    Trace,
    compare,
    p_value,
    ratios,
    regrets,
    summarize,
    tokens_until_good,
)

GOOD = frozenset({"good"})
QUALITY = Quality({"good": 0.5, "base": 4.0, "bad": 9.0}, GOOD, 4.0)


def trace(*steps: tuple[float, str | None], search: int = 0, train: int = 1, seconds: float = 1.0) -> Trace:
    return Trace("x", "A", search, train, list(steps), seconds)


def searches(rng: np.random.Generator, mean: float, count: int = 100) -> list[Trace]:
    """Return searches that become good after random numbers of tokens."""
    tokens = rng.gamma(4, mean / 4, size=(count, 2))
    return [trace((tokens[s, t], "good"), search=s, train=t + 1) for s in range(count) for t in range(2)]


def verdicts(ours: Sequence[Trace], rivals: dict[str, Sequence[Trace]]) -> list[str]:
    return [row.verdict for row in compare(ours, rivals, GOOD)]


def test_a_trace_survives_json() -> None:
    whole = trace((1.0, "base"), (2.5, None))
    assert Trace.from_data(json.loads(json.dumps(whole.data()))) == whole


def test_tokens_are_counted_until_the_own_recommendation_is_good() -> None:
    assert tokens_until_good(trace((1, "base"), (3, "good"), (5, "bad")), GOOD) == 3
    assert tokens_until_good(trace((1, "base")), GOOD) == CAP
    assert tokens_until_good(trace((61, "good")), GOOD) == CAP


def test_the_base_counts_before_the_first_recommendation() -> None:
    row = trace((1, "bad"), (3, None), (6, "good"))
    assert regrets(row, QUALITY, np.array([0.5, 1, 5.9, 6, 40])).tolist() == [4, 9, 9, 0.5, 0.5]


def test_a_recipe_that_diverged_counts_as_the_worst_one() -> None:
    recipes = [{"lr": lr} for lr in (1, 2, 3)]
    means = dict(zip(map(recipe_key, recipes), (1.0, 1.5, math.inf), strict=True))
    table: Any = SimpleNamespace(
        recipes=recipes,
        base=recipes[1],
        best_known=1.0,
        sigma=0.1,
        good=frozenset(),
        mean=lambda values: means[recipe_key(values)],
    )
    quality = Quality.of(table)
    assert list(quality.regret.values()) == [0, pytest.approx(5), pytest.approx(5)]
    assert quality.base == quality.regret[recipe_key(recipes[1])]


def test_the_summary_of_known_searches() -> None:
    rows = [trace((1, "base"), (tokens, "good"), seconds=tokens) for tokens in (4, 8, 12, 100)]
    found = summarize("x", rows, QUALITY)
    assert (found.searches, found.reached, found.mean) == (4, 0.75, (4 + 8 + 12 + 60) / 4)
    assert found.tokens == (7, 10, 24)
    assert found.regrets[2.0] == (4, 4, 4) and found.regrets[40.0] == (0.5, 0.5, 1.375)
    # the median is that of the base until 8 R, between the two until 12 R, and good afterwards
    assert found.area == pytest.approx(8 * 4 + 4 * 2.25 + 12 * 0.5)
    assert found.cpu_seconds == 10


def test_searches_are_paired_by_both_seeds() -> None:
    ours = [trace((10, "good"), search=s, train=t) for s in range(4) for t in (1, 2)]
    rival = [trace((20 + 10 * s, "good"), search=s, train=1) for s in (1, 2)]
    ratio, draws = ratios(ours, rival, GOOD)
    assert ratio == pytest.approx(20 / (30 + 40))
    assert len(draws) == 10_000 and set(draws.round(4)) == {0.25, 0.2857, 0.3333}


def test_both_training_seeds_are_drawn_together() -> None:
    """If a search with training seed 2 takes what it saves with training seed 1, nothing is random."""
    ours = [trace((10 + s * (3 - 2 * t), "good"), search=s, train=t) for s in range(8) for t in (1, 2)]
    _, draws = ratios(ours, [trace((30, "good"), search=s, train=t) for s in range(8) for t in (1, 2)], GOOD)
    assert np.allclose(draws, 1 / 3)


def test_the_interval_covers_the_true_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.search_bench.metrics.DRAWS", 1000)
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        (row,) = compare(searches(rng, 10, 40), {"rival": searches(rng, 15, 40)}, GOOD)
        hits += row.interval[0] < 2 / 3 < row.interval[1]
    assert 52 <= hits <= 60


def test_identical_methods_claim_nothing() -> None:
    """No resample claims a third. The level is 95%, so one of 20 resamples may tell the methods apart."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found += verdicts(searches(rng, 12), {"identical": searches(rng, 12)})
    assert "at most a third" not in found and found.count("not told apart") >= 19
    same = searches(np.random.default_rng(0), 12)
    assert compare(same, {"same": same}, GOOD)[0].interval == (1, 1)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(2, "fewer"), (4.5, "at most a third"), (0.5, "more"), (3, "fewer")]
)
def test_a_slower_rival_is_told_apart(factor: float, verdict: str) -> None:
    rng = np.random.default_rng(0)
    rivals = {"same": searches(rng, 8), "other": searches(rng, 8 * factor)}
    found = compare(searches(rng, 8), rivals, GOOD)
    assert [row.verdict for row in found] == ["not told apart", verdict]


def test_more_rivals_need_stronger_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third that holds against one rival alone does not hold among many rivals that are no worse."""
    monkeypatch.setattr("sweeps.search_bench.metrics.DRAWS", 1000)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        ours = searches(rng, 8)
        rival = searches(rng, 26)
        if verdicts(ours, {"rival": rival}) == ["at most a third"]:
            others = {str(n): searches(rng, 8) for n in range(15)}
            if verdicts(ours, {"rival": rival, **others})[0] == "fewer":
                return
    pytest.fail("the correction never mattered")


def test_the_p_value_counts_both_sides() -> None:
    draws = np.linspace(0, 1, 9999)
    assert p_value(draws, 2.0) == 2 / 10_000
    assert p_value(draws, 0.9) == pytest.approx(0.2, abs=1e-3)
    assert p_value(draws, 0.1) == 1
