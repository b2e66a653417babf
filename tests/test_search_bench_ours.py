"""Tests the sampler frugal on a table: its searches are those of a study, and parts can be turned off."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import searching
from search_tables import noisy, synthetic_table
from searching import FakeDatabase, Trainer

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan
from sweeps.frugal import Asked, Finished, Frugal, recipe_key
from sweeps.lanes import make_search
from sweeps.search_bench import ours
from sweeps.search_bench.ours import ABLATIONS, VARIANTS, Replay, TableSearch, Variant
from sweeps.search_bench.tables import Table
from sweeps.study import Budget


@cache
def table() -> Table:
    return synthetic_table()


@cache
def replay() -> Replay:
    return Replay(table())


def searched(variant: Variant, asks: int = 24, seed: int = 3) -> TableSearch:
    """Return a search that has asked for some runs."""
    search = TableSearch(replay(), variant, seed, 1)
    for _ in range(asks):
        assert search.ask()
        search._answer(search.trials[-1])
    return search


def asked(search: Any) -> list[tuple[Any, ...]]:
    return [(t.values, t.horizon, t.planned, t.scores, t.state) for t in search.trials]


@cache
def default_search() -> TableSearch:
    return searched(Variant())


def test_a_study_that_is_replayed_asks_for_the_same_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.database.StudyDatabase", FakeDatabase)
    monkeypatch.setattr(searching, "TRAIN_TOKENS", table().train_tokens)
    study = table().study(seed=3, lanes=2).model_copy(update={"budget": Budget(trials=24)})

    def of_run(cfg: TrainConfig) -> float | None:
        values = {name: getattr(cfg, name) for name in table().choices}
        steps = cfg.max_steps or table().points(values)[-1]
        share = steps / table().points(values)[-1]
        return noisy(values, min((0.25, 0.5, 1.0), key=lambda h: abs(h - share)), 1)

    engine = Trainer(lambda cfg, step: of_run(cfg) or 9.0, workers=2)
    engine.diverging = lambda cfg: of_run(cfg) is None
    (tmp_path / "tokens.json").write_text(json.dumps({"train_tokens": table().train_tokens}))
    driver = make_search(study, tmp_path, engine, lambda text: None, lambda: None)
    driver.run()
    assert asked(driver) == asked(default_search())
    # what the search recommends when it knows all runs is the study's best trial
    search = default_search()
    search.lanes.free = [max(search.lanes.ends)] * 2
    search._propose([search._finished(trial) for trial in search.trials])
    assert search.steps[-1][1] == recipe_key(search._full(driver.best()[0].values))


def test_a_search_repeats_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "CAP", 5.0)
    first, again = (Replay(table()).search("frugal", 1, 2).data() for _ in range(2))
    assert first.pop("cpu_seconds") > 0 and again.pop("cpu_seconds") > 0
    assert first == again
    other = replay().search("frugal", 2, 2)
    assert other.steps != first["steps"] and other.search_seed == 2


def test_tokens_are_those_that_the_lanes_have_trained() -> None:
    search = searched(Variant(lanes=3), asks=12)
    for now in (search.lanes.now, max(search.lanes.ends)):
        busy = 0
        for trial in search.trials:
            end = search.lanes.ends[trial.number]
            busy += max(0, min(now, end) - (end - trial.planned))
        assert search.spent(now) == pytest.approx(busy / table().whole)
    tokens = [tokens for tokens, _ in search.steps]
    assert tokens == sorted(tokens)


def test_the_first_recommendation_is_the_base() -> None:
    tokens, key = default_search().steps[0]
    assert key == table().key({}) and 1 <= tokens < 2.5


def test_a_search_ends_at_the_cap_or_when_regret_is_no_longer_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ours, "CAP", 9.0)
    monkeypatch.setattr(ours, "LAST_POINT", 4.0)
    monkeypatch.setattr(table(), "good", frozenset())
    search = TableSearch(replay(), Variant(), 0, 1)
    search.run()
    assert 9 <= search.spent(search.lanes.now) < 10.5
    monkeypatch.setattr(table(), "good", frozenset({table().key({})}))
    early = TableSearch(replay(), Variant(), 0, 1)
    early.run()
    assert 4 < early.spent(early.lanes.now) < 5.5
    assert search.steps[: len(early.steps)] == early.steps


def test_no_run_on_the_table_is_without_a_score() -> None:
    states = {trial.state.value for trial in searched(Variant(near_base=False), asks=40).trials}
    assert states <= {"done", "short", "diverged"}


# -- the parts that can be turned off


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_every_ablation_changes_the_search(name: str) -> None:
    assert asked(searched(ABLATIONS[name])) != asked(default_search())


def test_raw_curves_cost_the_first_part_of_a_whole_run() -> None:
    search = TableSearch(replay(), Variant(raw=True), 0, 1)
    values = table().recipes[0]
    points = table().point_tokens(values)
    assert search.new_tokens(Asked(values, 0.25)) == points[6]
    run = Asked(values, 0.5)
    plan, keys = search._chain(run)
    assert plan.tokens(plan.steps) == points[13] and len(keys) == plan.steps + 1
    search._kept.update(keys[step] for step in search.kept_steps(plan))
    # the run goes on where its first part ended
    assert search.new_tokens(Asked(values, 1.0)) == points[-1] - points[13]
    trial = search._new_trial(0, values, 0.5)
    search._answer(trial)
    assert trial.scores == {0: table().curve(values, 1)[13]}


def test_without_sharing_every_run_pays_all_of_its_tokens() -> None:
    search = searched(Variant(shared=False), asks=14)
    for trial in search.trials:
        plan = Plan(search.runs_of(trial).cfg, table().train_tokens)
        assert trial.planned == plan.tokens(plan.steps)


def test_without_drift_nothing_stands_in() -> None:
    search = searched(Variant(drifting=False))
    assert set(search.frugal.fitted_drift().values()) == {0.0}
    assert not any(option.stands_in for reason in search.reasons for option in reason.options)
    assert any(option.stands_in for reason in default_search().reasons for option in reason.options)


def test_plain_coordinates_move_one_at_a_time() -> None:
    coordinates = TableSearch(replay(), Variant(coupled=False), 0, 1).frugal.coordinates
    coupled = default_search().frugal.coordinates
    other = {**table().base, "batch_size": 2}
    assert np.count_nonzero(coordinates.encode(other)) == 1 < np.count_nonzero(coupled.encode(other))
    assert coordinates.decode(coordinates.encode(other)) == other


def test_every_variant_is_different() -> None:
    assert len(set(VARIANTS.values())) == len(VARIANTS)


# -- against Optuna


def quadratic(frugal: Frugal, seed: int) -> tuple[Any, float]:
    """Return a function with its best recipe near the base, and the score below which a recipe is good."""
    rng = np.random.default_rng(seed)
    best = rng.normal(0, 0.2, frugal.coordinates.size)
    weight = rng.uniform(0.3, 1.2, frugal.coordinates.size)
    return lambda values: float((weight * (frugal.coordinates.encode(values) - best) ** 2).sum()), 0.02


@pytest.mark.slow
def test_fewer_tokens_than_tpe_on_a_quadratic() -> None:
    from test_sweeps_frugal import SPACE, WHOLE, make

    space = {**SPACE, "decay_frac": {"low": 0.2, "high": 0.8}}

    def luck(seed: int, values: dict[str, Any], horizon: float) -> float:
        place = int(recipe_key(values)[:8], 16)
        return 0.003 * float(np.random.default_rng([seed, place, int(100 * horizon)]).normal())

    def of_frugal(seed: int) -> float:
        sampler = make(space=space, seed=seed)
        truth, limit = quadratic(sampler, seed)
        finished: list[Finished] = []
        spent = 0.0
        while spent < 60:
            proposal = sampler.ask(len(finished), finished, [], lambda run: int(WHOLE * run.horizon))
            assert proposal
            run = proposal.asked
            finished.append(Finished(run, truth(run.values) + luck(seed, run.values, run.horizon)))
            spent += run.horizon
            if truth(sampler.beliefs(finished)[0][1]) < limit:
                break
        return spent

    def of_tpe(seed: int) -> float:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        coordinates = make(space=space).coordinates
        truth, limit = quadratic(make(space=space), seed)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
        scores: dict[float, dict[str, Any]] = {}
        for number in range(60):
            trial = study.ask()
            values = {name: trial.suggest_float(name, p["low"], p["high"], log=p.get("log", False))
                      for name, p in space.items()}  # fmt: skip
            values = coordinates.decode(coordinates.encode(values if number else {}))
            found = truth(values) + luck(seed, values, 1.0)
            scores[found] = values
            study.tell(trial, found)
            if truth(scores[min(scores)]) < limit:
                return number + 1
        return 60

    seeds = range(30)
    assert np.median([of_frugal(seed) for seed in seeds]) < np.median([of_tpe(seed) for seed in seeds])
