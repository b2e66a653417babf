"""Tests the sampler frugal: what it asks for, depending on the scores and on the costs of runs."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from searching import make_study

from sweeps.coordinates import Coordinates
from sweeps.frugal import Asked, Finished, Frugal, NewTokens, Proposal, expected_improvement, recipe_key
from sweeps.sampling import SamplerSettings
from sweeps.surrogate import Surrogate

TOKENS = 66_000
WHOLE = 7 * TOKENS
SPACE: dict[str, Any] = {
    "lr": {"low": 1e-3, "high": 0.1, "log": True},
    "weight_decay": {"low": 0.01, "high": 1.0, "log": True},
    "dropout": {"low": 0.0, "high": 0.3},
    "beta2": {"low": 0.9, "high": 0.999},
    "decay_frac": {"values": [0.2, 0.4, 0.6, 0.8]},
}

Score = Callable[[Asked], float | None]


def make(
    space: dict[str, Any] = SPACE, horizons: tuple[float, ...] = (0.25, 0.5, 1.0), **settings: Any
) -> Frugal:
    study = make_study({"schedule": "wsd", "dropout": 0.1, "decay_frac": 0.4}, space=space)
    coordinates = Coordinates(study.space, study.base(), TOKENS)
    return Frugal(SamplerSettings(name="frugal", **settings), coordinates, horizons, WHOLE, 7)


def every_token(asked: Asked) -> int:
    return int(WHOLE * asked.horizon)


def search(
    sampler: Frugal, score: Score, asks: int, cost: NewTokens = every_token
) -> tuple[list[Finished], list[Proposal]]:
    finished: list[Finished] = []
    proposals: list[Proposal] = []
    for number in range(asks):
        proposal = sampler.ask(number, finished, [], cost)
        assert proposal is not None
        proposals.append(proposal)
        finished.append(Finished(proposal.asked, score(proposal.asked)))
    return finished, proposals


def quadratic(sampler: Frugal, seed: int = 0, noise: float = 0.003) -> Score:
    """Return a score whose best recipe is not the base, and is the same at all horizons."""
    rng = np.random.default_rng(seed)
    best = rng.normal(0, 0.25, sampler.coordinates.size)
    weight = rng.uniform(0.3, 1.2, sampler.coordinates.size)

    def score(asked: Asked) -> float:
        z = sampler.coordinates.encode(asked.values)
        luck = np.random.default_rng([seed, int(recipe_key(asked.values)[:8], 16), int(100 * asked.horizon)])
        return float(
            1.7 - 0.1 * math.log2(asked.horizon) + (weight * (z - best) ** 2).sum() + noise * luck.normal()
        )

    return score


def test_the_first_design_starts_with_the_base_at_each_horizon() -> None:
    design = make(startup=6).first_design()
    assert [(run.values, run.horizon) for run in design[:3]] == [({}, 1.0), ({}, 0.5), ({}, 0.25)]
    assert len(design) == 9 and {run.horizon for run in design[3:]} == {0.25}
    assert len({run.key for run in design}) == 9
    other = make(startup=6, seed=1).first_design()
    assert other[:3] == design[:3] and not {run.key for run in other[3:]} & {run.key for run in design[3:]}


def test_half_of_the_first_design_is_near_the_base() -> None:
    sampler = make(startup=40)
    distances = [
        float(np.linalg.norm(sampler.coordinates.encode(run.values))) for run in sampler.first_design()[3:]
    ]
    assert np.mean(distances[:20]) < 0.7 * np.mean(distances[20:])


def test_the_same_scores_give_the_same_runs() -> None:
    first, again = make(), make()
    score = quadratic(first)
    assert [p.asked for p in search(first, score, 18)[1]] == [p.asked for p in search(again, score, 18)[1]]
    other = make(seed=1)
    assert [p.asked for p in search(other, score, 18)[1]] != [p.asked for p in search(make(), score, 18)[1]]


def test_no_run_is_asked_for_twice() -> None:
    sampler = make()
    finished, _ = search(sampler, quadratic(sampler), 40)
    assert max(Counter(run.asked.key for run in finished).values()) == 1


def test_short_runs_that_rank_well_replace_whole_runs() -> None:
    """The best recipe is found while less than a third of the tokens go to whole runs."""
    sampler = make(startup=8)
    finished, _ = search(sampler, quadratic(sampler, noise=0.0), 18)
    cost = Counter[float]()
    for run in finished:
        cost[run.asked.horizon] += run.asked.horizon
    assert cost[1.0] < cost.total() / 3
    assert finished[-1].score is not None and finished[0].score is not None
    assert finished[-1].asked.horizon == 1 and finished[-1].score < finished[0].score - 0.01


def test_the_sampler_turns_to_whole_runs_if_short_runs_are_useless() -> None:
    """The scores of short runs are random, and short runs cost as much as whole runs."""
    sampler = make(startup=6)
    rng = np.random.default_rng(0)
    real = quadratic(sampler)

    def score(asked: Asked) -> float | None:
        return real(asked) if asked.horizon == 1 else 1.9 + 0.3 * rng.random()

    _, proposals = search(sampler, score, 40, lambda asked: WHOLE)
    late = [p.asked.horizon for p in proposals[9 + 10 :]]
    assert late.count(1.0) > 0.8 * len(late)


def test_runs_that_diverge_leave_a_finite_surrogate() -> None:
    """Five of twenty runs diverge, and they have nothing in common."""
    sampler = make()
    real = quadratic(sampler)
    numbers = iter(range(20))
    finished, proposals = search(sampler, lambda asked: None if next(numbers) % 4 == 3 else real(asked), 20)
    assert sum(run.score is None for run in finished) == 5
    assert all(math.isfinite(p.reason.improvement) for p in proposals if p.reason.phase == "search")
    assert sampler.theta is not None and np.isfinite(sampler.theta).all()


def test_a_region_in_which_runs_diverge_is_avoided() -> None:
    sampler = make(startup=16)
    real = quadratic(sampler)
    finished, _ = search(sampler, lambda asked: None if asked.values.get("lr", 0) > 0.02 else real(asked), 32)
    diverged = [run.score is None for run in finished]
    assert sum(diverged[:19]) >= 4 and sum(diverged[19:]) <= 2


def test_if_every_run_diverges_the_sampler_stops() -> None:
    sampler = make(startup=2)
    finished = [Finished(run, None) for run in sampler.first_design()]
    assert sampler.ask(len(finished), finished, [], every_token) is None


def test_runs_that_cannot_be_asked_for_are_passed_over() -> None:
    sampler = make(startup=4)
    score = quadratic(sampler)
    finished: list[Finished] = []
    for number in range(14):
        proposal = sampler.ask(
            number, finished, [], lambda asked: None if asked.horizon == 0.25 else every_token(asked)
        )
        if proposal is None:
            break
        assert proposal.asked.horizon != 0.25
        finished.append(Finished(proposal.asked, score(proposal.asked)))
    assert len(finished) == 14


def test_expensive_runs_are_asked_for_less() -> None:
    """The same scores, but a whole run is almost free because its trunk is there."""
    cheap, plain = make(startup=6), make(startup=6)
    score = quadratic(plain)
    shares = []
    for sampler, cost in ((cheap, lambda a: 1 if a.horizon == 1 else every_token(a)), (plain, every_token)):
        finished, _ = search(sampler, score, 18, cost)
        shares.append(sum(run.asked.horizon == 1 for run in finished))
    assert shares[0] > 2 * shares[1]


def test_the_best_recipe_is_that_with_the_lowest_prediction() -> None:
    sampler = make()
    finished, _ = search(sampler, quadratic(sampler), 40)
    beliefs = sampler.beliefs(finished)
    whole = [run for run in finished if run.asked.horizon == 1]
    assert len(beliefs) == len(whole) and [b for b, _ in beliefs] == sorted(b for b, _ in beliefs)
    truth = quadratic(sampler, noise=0.0)
    best, base = (truth(Asked(values, 1.0)) for values in (beliefs[0][1], {}))
    assert best is not None and base is not None and best < base - 0.015


def test_the_drift_is_expected_where_it_is_known() -> None:
    """The best rates fall as the horizon grows, the best batch and dropout grow, other fields stay."""
    rate = {"low": 1e-3, "high": 0.1, "log": True}
    space = {"lr": rate, "lr_aux": rate, "batch_size": {"values": [4, 8, 16]}, "beta2": SPACE["beta2"]}
    space["dropout"] = SPACE["dropout"]
    sampler = make(space)
    drift = sampler.drift()
    span = math.log(100)
    expected = {
        "lr": -3 * 0.22 / span,
        "lr_aux": -3 * 0.15 / span,
        "batch_size": 3 * 0.31 / math.log(4),
        "dropout": 3 * 0.025 / 0.3,
        "beta2": 0.0,
    }
    for name, mean in expected.items():
        place = sampler.coordinates.slices[name]
        assert drift.mean[place] == pytest.approx(mean), name
        assert drift.deviation[place] == pytest.approx(abs(mean) or 0.05)
    linear = make({"lr": {"low": 1e-3, "high": 0.1}}).drift()
    assert linear.mean.tolist() == [0.0] and linear.deviation.tolist() == [0.05]
    assert Frugal(sampler.settings, make().coordinates, (1.0,), WHOLE, 1).drift().mean[0] == 0  # dropout


def test_the_fitted_drift_is_shown_per_doubling_on_the_scale_of_the_field() -> None:
    sampler = make({"mlp": {"values": ["gelu", "relu2", "swiglu"]}, "lr": SPACE["lr"]})
    assert sampler.fitted_drift() == {}
    sampler.theta = np.array([0.0, 0.0, 0.0, 0.7, 0.8, -0.3, 0.0, 0.0, 0.0])
    assert sampler.coordinates.slices["lr"] == slice(2, 3)
    assert sampler.fitted_drift() == {"lr": pytest.approx(-0.3 * math.log(100) / 3)}


def test_a_run_that_diverged_counts_as_worse_than_the_worst() -> None:
    """It is above the worst run of its horizon by half of the range."""
    sampler = make(startup=6)
    design = sampler.first_design()
    values: list[float | None] = [1.5, 1.6, 1.7, 1.8, None, 1.9, 2.1, None, 1.75]
    finished = [Finished(run, score) for run, score in zip(design, values, strict=True)]
    scores = sampler._scores(finished)
    assert scores is not None
    scale, runs, y = scores
    assert len(runs.p) == 9 and y.mean() == pytest.approx(0) and y.std() == pytest.approx(1)
    quarter = (0.25, 0.0)
    bent = [scale.bend.apply(2.1 + 0.5 * 0.4, quarter), scale.bend.apply(2.1, quarter)]
    assert (y[[4, 6]] * scale.deviation + scale.mean).tolist() == pytest.approx(bent)
    assert y[4] == y[7] and sampler.beliefs(finished)[0][1] == {}
    only_base = [Finished(run, 1.5 if i else None) for i, run in enumerate(design)]
    assert sampler.beliefs(only_base) == []


def test_the_whole_space_is_tried() -> None:
    """Otherwise, a search whose base is far from the best recipe would take long."""
    sampler = make()
    finished, _ = search(sampler, quadratic(sampler), 12)
    scores = sampler._scores(finished)
    assert scores is not None
    model = Surrogate(scores[1], scores[2], sampler.theta if sampler.theta is not None else np.zeros(13))
    candidates = sampler._candidates(model, np.random.default_rng(0), {})
    rates = [values["lr"] for values in candidates.values()]
    shares = np.histogram(np.log10(rates), bins=8, range=(-3, -1))[0] / len(rates)
    assert shares.min() > 0.02


def late_search(asks: int) -> list[Finished]:
    """Search without short runs, where late changes score like whole runs at half of the cost."""
    sampler = make(startup=6, late=0.5, horizons=(1.0,))
    real = quadratic(sampler)

    def cost(asked: Asked) -> int | None:
        if asked.late and asked.values.get("decay_frac", 0.4) > 0.5:
            return None
        return WHOLE // 2 if asked.late else WHOLE

    return search(sampler, lambda asked: real(Asked(asked.values, 1.0)), asks, cost)[0]


@pytest.mark.parametrize("is_similar", [True, False])
def test_late_changes_are_worth_more_if_they_score_like_whole_runs(is_similar: bool) -> None:
    """Their scores are those of the whole runs, or those of another world."""
    space = {name: parameter for name, parameter in SPACE.items() if name != "decay_frac"}
    sampler = make(space, startup=14, late=0.5, horizons=(1.0,), seed=2)
    whole, other = quadratic(sampler, seed=2), quadratic(sampler, seed=3)
    design = sampler.first_design()
    finished = [Finished(run, whole(run)) for run in design]
    for run in design[1:]:
        late = Asked(run.values, 1.0, 0.5)
        finished.append(Finished(late, whole(run) if is_similar else other(run)))
    proposal = sampler.ask(len(finished), finished, [], lambda asked: int(WHOLE * (1 - asked.late)))
    assert proposal is not None
    worth = {option.asked.late: option.value for option in proposal.reason.options}
    ratio = worth[0.5] / worth[0.0]
    assert ratio == pytest.approx(2, abs=0.1) if is_similar else ratio < 1


def test_late_changes_are_not_predictions_and_not_whole_runs() -> None:
    finished = late_search(30)
    sampler = make(startup=6, late=0.5, horizons=(1.0,))
    late = {recipe_key(run.asked.values) for run in finished if run.asked.late}
    whole = [recipe_key(run.asked.values) for run in finished if run.asked.kind == (1.0, 0.0)]
    believed = [recipe_key(values) for _, values in sampler.beliefs(finished)]
    assert sorted(believed) == sorted(whole) and late - set(whole)


def test_a_recipe_with_a_long_decay_is_tried_late_with_a_shorter_one() -> None:
    sampler = make(late=0.5)
    sampler.theta = np.zeros(13)
    recipe = sampler.coordinates.decode(np.full(5, 0.1)) | {"decay_frac": 0.8}
    runs = sampler._runs_about(recipe)
    assert runs[-1] == Asked(recipe | {"decay_frac": 0.4}, 1.0, 0.5)
    recipe["decay_frac"] = 0.2
    assert sampler._runs_about(recipe)[-1] == Asked(recipe, 1.0, 0.5)
    assert not any(run.late for run in runs[:-1])


def test_the_bias_of_the_base_is_zero() -> None:
    """The late change to the base is the base, so its score is known from the whole run."""
    sampler = make(startup=2, late=0.5)
    finished = [Finished(run, 2.0 + i) for i, run in enumerate(sampler.first_design())]
    scores = sampler._scores(finished)
    assert scores is not None
    _, runs, y = scores
    assert runs.late is not None and runs.late.tolist() == [0.0] * 5 + [1.0]
    assert y[-1] == y[0] and not runs.z[-1].any()
    plain = make(startup=2)._scores(finished)
    assert plain is not None and plain[1].late is None and len(plain[2]) == 5
    decays_early = make(startup=2, late=0.7)._scores(finished)  # the base decays over the last four tenths
    assert decays_early is not None and len(decays_early[2]) == 5


def test_the_expected_improvement_equals_that_of_samples() -> None:
    mean, deviation = np.array([0.3, -0.2]), np.array([0.5, 0.1])
    draws = mean + deviation * np.random.default_rng(0).normal(size=(200_000, 2))
    sampled = np.maximum(0.1 - draws, 0).mean(0)
    assert expected_improvement(mean, deviation, 0.1) == pytest.approx(sampled, abs=2e-3)


def test_importing_the_sampler_loads_neither_torch_nor_optuna() -> None:
    code = "import sys, sweeps.frugal; assert not {'torch', 'optuna'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_ask_takes_less_than_a_second() -> None:
    """The limits are 0.2 s at 60 results and 1 s at 300, and three times as much on a busy machine."""
    sampler = make()
    score = quadratic(sampler)
    rng = np.random.default_rng(0)
    for count, limit in ((60, 0.6), (300, 3.0)):
        runs = [
            Asked(sampler.coordinates.at(point), float(rng.choice([0.25, 0.5, 1.0])))
            for point in rng.random((count, len(sampler.coordinates.axes)))
        ]
        finished = [Finished(run, score(run)) for run in runs]
        sampler.ask(count, finished, [], every_token)  # the first fit makes more iterations
        started = time.process_time()
        sampler.ask(count, finished, [], every_token)
        assert time.process_time() - started < limit
