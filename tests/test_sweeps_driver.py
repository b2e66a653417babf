"""Tests which trials the driver chooses, how far it trains them, which it promotes, and what they cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY
from searching import (
    STEPS,
    TRAIN_TOKENS,
    FakeDatabase,
    ScriptedSampler,
    Trainer,
    eval_row,
    make_search,
    make_study,
    step_row,
    write_rows,
    write_run,
)

from mainrun.config import TrainConfig
from mainrun.data.corpus import load_corpus
from mainrun.errors import DiskFull, Interrupted, MainrunError, RunError, UsageError
from mainrun.plan.recipes import load
from sweeps import database, driver
from sweeps.driver import Search
from sweeps.engine.protocol import Outcome, Task
from sweeps.ledger import Ledger
from sweeps.sampling import TrialSampler
from sweeps.study import set_arguments
from sweeps.trial import Trial, TrialState

RUNGS = {"at": [0.4], "keep": 0.5}  # every trial has one rung, at step 4 of 10
TOKENS = 128 * STEPS  # the number of tokens that one trial trains on
WSD = {"schedule": "wsd", "warmup_frac": 0.1, "decay_frac": 0.3}


@pytest.fixture(autouse=True)
def databases(monkeypatch: pytest.MonkeyPatch) -> list[FakeDatabase]:
    """Return the databases that the studies of a test write to."""
    created: list[FakeDatabase] = []

    def create(*arguments: Any) -> FakeDatabase:
        created.append(FakeDatabase(*arguments))
        return created[-1]

    monkeypatch.setattr(database, "StudyDatabase", create)
    return created


class Prepared:
    """A study whose trials get the given scores.

    A trial has either one score, or one score for each rung and one for the end.
    """

    def __init__(
        self,
        folder: Path,
        scores: Sequence[float | Sequence[float]],
        values: Mapping[int, dict[str, Any]] | None = None,
        workers: int = 1,
        fields: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        generation = keys.pop("generation", len(scores))
        keys = {
            "budget": {"trials": len(scores)},
            "rungs": RUNGS,
            "sampler": {"name": "random", "generation": generation},
        } | keys
        self.scores = scores
        self.trainer = Trainer(self.score, workers)
        self.search = make_search(folder, make_study(fields, **keys), self.trainer)
        prepared = dict(values or {})
        self.sampler = ScriptedSampler(lambda number: prepared.get(number, {"lr": 0.01 + 0.001 * number}))
        self.search.sampler = self.sampler

    @property
    def trials(self) -> list[Trial]:
        return self.search.trials

    def score(self, cfg: TrainConfig, step: int) -> float:
        number = self.search.owners[cfg.run_id]
        given = self.scores[number]
        if isinstance(given, int | float):
            return given
        stops = self.trials[number].stops
        return given[stops.index(step)] if step in stops else 99.0

    def run(self) -> list[str]:
        self.search.run()
        return [trial.state for trial in self.trials]

    def tasks(self) -> list[tuple[int, int]]:
        """Return the trial number and the last step of each task.

        A last step of 0 means the end of the run.
        """
        pairs = zip(self.trainer.trained, self.trainer.tasks, strict=True)
        return [(self.search.owners[cfg.run_id], task.until) for cfg, task in pairs]


def states(letters: str) -> list[str]:
    """Return the states that a string such as "dpxf" abbreviates."""
    return [{"d": "done", "p": "pruned", "x": "diverged", "f": "failed"}[letter] for letter in letters]


# -- promotion depends on the scores


@pytest.mark.parametrize(
    ("scores", "keep", "after"),
    [
        pytest.param([1, 2, 3, 4], 0.5, "ddpp", id="the better half"),
        pytest.param([4, 3, 2, 1], 0.5, "dpdd", id="the better half, and trial 0"),
        pytest.param([2, 4, 1, 3], 0.5, "dpdp", id="unordered"),
        pytest.param([9, 1, 2, 3], 0.25, "ddpp", id="trial 0 is kept in addition to the others"),
        pytest.param([1, 1, 1, 1], 0.5, "ddpp", id="a tie is broken by the lower number"),
        pytest.param([5, 2, 1, 2], 0.5, "dddp", id="a tie at the edge"),
        pytest.param([5, 4, 3, 2], 0.01, "dppd", id="at least one is promoted"),
        pytest.param([1, 2, 3, 4], 0.01, "dppp", id="at least one is promoted: trial 0"),
        pytest.param([4, 3, 2, 1], 1.0, "dddd", id="all are promoted"),
        pytest.param([3, 2, 1], 0.5, "ddd", id="1.5 is rounded to 2"),
        pytest.param([5, 4, 3, 2, 1], 0.5, "dppdd", id="2.5 is rounded to 2"),
        pytest.param([3, 2, 1], 0.49, "dpd", id="1.47 is rounded to 1"),
        pytest.param([3, 2, 1], 0.51, "ddd", id="1.53 is rounded to 2"),
        pytest.param([7], 0.5, "d", id="a single trial"),
        pytest.param([-1, -2, -3, 0], 0.5, "dddp", id="negative scores"),
    ],
)
def test_the_best_of_a_generation_are_promoted(
    tmp_path: Path, scores: list[float], keep: float, after: str
) -> None:
    study = Prepared(tmp_path, [float(score) for score in scores], rungs=RUNGS | {"keep": keep})
    assert study.run() == states(after)
    count = len(scores)
    promoted = [number for number, until in study.tasks()[count:] if until == 0]
    assert study.tasks()[:count] == [(number, 4) for number in range(count)]
    assert promoted == [number for number, letter in enumerate(after) if letter == "d"]
    order = sorted(range(count), key=lambda number: (scores[number], number))
    for place, number in enumerate(order, 1):
        trial = study.trials[number]
        assert trial.reason == ("" if trial.state == "done" else f"place {place} of {count} at step 4")
        assert trial.scores == (
            {0: scores[number], 1: scores[number]} if trial.state == "done" else {0: scores[number]}
        )


def test_the_scores_of_the_current_rung_decide(tmp_path: Path) -> None:
    """The best trial at the first rung can be pruned at the second."""
    scores = [(9.0, 9.0, 9.0), (1.0, 5.0, 5.0), (2.0, 1.0, 7.0), (3.0, 2.0, 1.0), (4.0, 0.0, 0.0)]
    study = Prepared(tmp_path, scores, rungs={"at": [0.4, 0.6], "keep": 0.6})
    assert study.run() == states("dpddp")
    assert (
        study.trials[1].reason == "place 3 of 4 at step 6"
        and study.trials[4].reason == "place 4 of 5 at step 4"
    )
    assert [trial.stops for trial in study.trials] == [(4, 6, 10)] * 5
    assert study.tasks()[5:] == [(0, 6), (1, 6), (2, 6), (3, 6), (0, 0), (2, 0), (3, 0)]
    assert study.trials[3].scores == {0: 3.0, 1: 2.0, 2: 1.0}


def test_generations_are_not_compared_with_each_other(tmp_path: Path) -> None:
    """The worst trial of a good generation is pruned, even if it beats the best trial of a bad generation."""
    study = Prepared(tmp_path, [9.0, 5.0, 6.0, 1.0, 2.0, 3.0], generation=3)
    assert study.run() == states("dddddp")
    study = Prepared(
        tmp_path / "b", [9.0, 5.0, 6.0, 1.0, 2.0, 3.0], generation=3, rungs=RUNGS | {"keep": 0.4}
    )
    assert study.run() == states("ddpdpp")


def test_a_generation_is_promoted_once_all_its_trials_have_scores(tmp_path: Path) -> None:
    """The trial with the best score is the last to finish."""
    study = Prepared(tmp_path, [9.0, 3.0, 2.0, 1.0], workers=3, rungs=RUNGS | {"keep": 0.25})
    train = study.trainer.train

    def slowly(task: Task) -> Outcome:
        if load(task.preset, list(task.sets))[0].lr == 0.013:
            time.sleep(0.1)
        return train(task)

    study.trainer.train = slowly
    assert study.run() == states("dppd")
    assert sorted(study.tasks()[:4]) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_diverged_trials_are_not_ranked(tmp_path: Path) -> None:
    """`keep` is a share of the trials that reached the rung."""
    study = Prepared(tmp_path, [9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    notes: list[str] = []
    study.search.note = notes.append
    study.trainer.diverging = lambda cfg: cfg.lr in (0.011, 0.015)
    assert study.run() == states("dxddpx")
    assert study.trials[4].reason == "place 3 of 4 at step 4"
    assert study.trials[1].reason == "the loss is inf" and study.trials[1].scores == {}
    assert notes == ["trial 1 diverged: the loss is inf", "trial 5 diverged: the loss is inf"]


def test_a_generation_can_diverge_completely(tmp_path: Path) -> None:
    """If all trials of a generation diverge, the next generation is still promoted."""
    study = Prepared(tmp_path, [9.0, 8.0, 3.0, 2.0, 1.0, 4.0], generation=2, rungs=RUNGS | {"keep": 0.5})
    study.trainer.diverging = lambda cfg: study.search.owners[cfg.run_id] < 2
    assert study.run() == states("xxpddp")


def test_a_trial_that_cannot_be_trained_fails_with_its_reason(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [9.0, 1.0, 2.0])
    notes: list[str] = []
    study.search.note = notes.append
    study.trainer.failing = lambda cfg: cfg.lr == 0.011
    assert study.run() == states("dfd")
    assert study.trials[1].reason == "no such corpus" and notes == ["trial 1 failed: no such corpus"]


def test_without_rungs_every_trial_is_trained_to_its_end(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [3.0, 2.0, 1.0], rungs=None)
    assert study.run() == states("ddd")
    assert study.tasks() == [(0, 0), (1, 0), (2, 0)]
    assert [trial.stops for trial in study.trials] == [(10,)] * 3


def test_val_decides_nothing(tmp_path: Path) -> None:
    """Val scores in the opposite order do not change the search."""
    for number, val in enumerate([1.0, -1.0]):
        study = Prepared(tmp_path / str(number), [4.0, 3.0, 2.0, 1.0])
        study.trainer.val = lambda cfg, step, val=val, study=study: val * study.score(cfg, step)
        assert study.run() == states("dpdd")
        assert [trial.scores[0] for trial in study.trials] == [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("score", ["NaN", "Infinity", "1e999"])
def test_a_score_that_is_not_finite_is_damage(tmp_path: Path, score: str) -> None:
    """No trainer writes a NaN or infinite score, so the study treats the file as damaged.

    The study ends with an error that names the file, and promotes no trial.
    """
    study = Prepared(tmp_path, [4.0, 3.0, 2.0, 1.0])
    train = study.trainer.train

    def damage(task: Task) -> Outcome:
        outcome = train(task)
        file = task.out / study.trainer.trained[-1].run_id / "metrics.jsonl"
        file.write_text(file.read_text().replace('"full": 2.0', f'"full": {score}'))
        return outcome

    study.trainer.train = damage
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged: line \d+ has full = "):
        study.run()
    assert not any(trial.is_finished for trial in study.trials)


@pytest.mark.parametrize(
    ("objective", "more"), [("dev/full", 0.0), ("dev/official", 10.0)], ids=["full", "official"]
)
def test_trials_are_compared_by_the_objective(tmp_path: Path, objective: str, more: float) -> None:
    study = Prepared(tmp_path, [2.0, 1.0], objective=objective)
    study.run()
    assert [trial.scores[0] for trial in study.trials] == [2.0 + more, 1.0 + more]


# -- the steps of the rungs


@pytest.mark.parametrize(
    ("at", "stops"),
    [
        ([0.4], (4, 10)),
        ([0.41], (6, 10)),
        ([0.39], (4, 10)),
        ([0.01], (1, 10)),
        ([0.1], (1, 10)),
        ([0.11], (2, 10)),
        ([0.2, 0.6], (2, 6, 10)),
        ([0.3, 0.4, 0.8], (4, 8, 10)),
        ([0.81], (10,)),
        ([0.99], (10,)),
        ([0.4, 0.99], (4, 10)),
    ],
    ids=str,
)
def test_a_rung_is_at_the_next_evaluation(tmp_path: Path, at: list[float], stops: tuple[int, ...]) -> None:
    """The runs are evaluated after steps 1, 2, 4, 6, 8 and 10.

    Rungs that fall on the same step count as one, and the last stop is the end of the run.
    """
    study = Prepared(tmp_path, [1.0, 2.0], rungs=RUNGS | {"at": at})
    study.search.ask()
    assert [trial.stops for trial in study.trials] == [stops, stops]


# -- generations


def test_the_sampler_is_called_in_the_order_of_the_trial_numbers(tmp_path: Path) -> None:
    """A generation is sampled from the scores of all earlier generations except the previous one."""
    study = Prepared(
        tmp_path, [9.0, 3.0, 2.0, 1.0, 5.0, 4.0, 8.0, 7.0], generation=2, rungs=RUNGS | {"keep": 0.5}
    )
    study.trainer.diverging = lambda cfg: cfg.lr == 0.014
    study.run()
    asks = [[("ask", 2 * g), ("ask", 2 * g + 1)] for g in range(4)]
    tells = [
        [("tell", 0, {0: 9.0, 1: 9.0}, True), ("tell", 1, {0: 3.0, 1: 3.0}, True)],
        [("tell", 2, {0: 2.0}, False), ("tell", 3, {0: 1.0, 1: 1.0}, True)],
        [("tell", 4, {}, False), ("tell", 5, {0: 4.0, 1: 4.0}, True)],
    ]
    expected = [*asks[0], *asks[1], *tells[0], *asks[2], *tells[1], *asks[3], *tells[2]]
    assert study.sampler.calls == expected


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_do_not_change_the_calls_of_the_sampler(tmp_path: Path, workers: int) -> None:
    scores = [9.0, 3.0, 2.0, 1.0, 5.0, 4.0, 8.0, 7.0, 6.0]
    study = Prepared(tmp_path, scores, generation=3, workers=workers)
    assert study.run() == states("ddddpdpdd")
    assert [call[1] for call in study.sampler.calls] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 3, 4, 5]


def test_the_values_come_from_the_sampler_of_the_study(tmp_path: Path) -> None:
    study = make_study()
    search = make_search(tmp_path, study, Trainer(lambda cfg, step: cfg.lr))
    search.run()
    sampler = TrialSampler(study.sampler, study.space, study.base())
    assert [trial.values for trial in search.trials] == [sampler.ask(number) for number in range(6)]
    assert len({trial.run_id for trial in search.trials}) == 6


def test_the_runs_of_a_trial_cannot_be_changed(tmp_path: Path) -> None:
    runs = Prepared(tmp_path, [1.0]).search._make_runs({})
    with pytest.raises(AttributeError):
        runs.stops = ()


def test_a_generation_waits_for_the_one_before_the_last(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [1.0] * 9, generation=3)
    search = study.search
    assert search.ask() and search.ask()
    assert not search.ask() and len(search.trials) == 6
    for trial in search.generation(0)[:2]:
        trial.state = TrialState.PRUNED
    assert not search.ask()
    search.trials[2].state = TrialState.FAILED
    assert search.ask() and len(search.trials) == 9
    assert [trial.number for trial in search.generation(1)] == [3, 4, 5]
    assert search.generation(3) == []


# -- budgets


@pytest.mark.parametrize(
    ("budget", "rungs", "count"),
    [
        ({"trials": 1}, None, 1),
        ({"trials": 3}, None, 3),
        ({"trials": 7}, None, 7),
        ({"trials": 1}, RUNGS, 3),
        ({"trials": 3}, RUNGS, 3),
        ({"trials": 4}, RUNGS, 6),
        ({"trials": 7}, RUNGS, 9),
        # six trials are sampled before the scores of the first three are reported
        ({"tokens": 1}, None, 6),
        ({"tokens": 3 * TOKENS}, None, 6),
        ({"tokens": 3 * TOKENS + 1}, None, 9),
        ({"tokens": 6 * TOKENS}, None, 9),
        ({"tokens": 6 * TOKENS + 1}, None, 12),
        ({"tokens": 6 * TOKENS + 1, "trials": 8}, None, 8),
        ({"tokens": 3 * TOKENS, "trials": 8}, None, 6),
        ({"minutes": 1e-9}, None, 0),
        ({"minutes": 1e-9, "trials": 5}, None, 0),
        ({"minutes": 1e9, "trials": 5}, None, 5),
    ],
    ids=str,
)
def test_a_budget_ends_the_study(tmp_path: Path, budget: dict[str, float], rungs: Any, count: int) -> None:
    study = Prepared(tmp_path, [1.0] * 20, generation=3, budget=budget, rungs=rungs)
    study.run()
    assert len(study.trials) == count
    assert study.search.remaining_trials() == 0 and all(trial.is_finished for trial in study.trials)


@pytest.mark.parametrize(("share", "count"), [(1.0, 6), (1.0001, 9)])
def test_a_budget_of_flops_ends_the_study(tmp_path: Path, share: float, count: int) -> None:
    first = Prepared(tmp_path / "first", [1.0], rungs=None)
    first.run()
    flops = first.search.cost_of(first.trials[0]).flops
    assert flops > 0
    study = Prepared(
        tmp_path / "second", [1.0] * 20, generation=3, budget={"flops": share * 3 * flops}, rungs=None
    )
    study.run()
    assert len(study.trials) == count and study.search.remaining_trials() == 0


@pytest.mark.parametrize(("seconds", "remaining"), [(0.0, 50), (119.0, 50), (120.0, 0), (121.0, 0)])
def test_minutes_count_from_the_start_of_this_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, remaining: int
) -> None:
    study = Prepared(tmp_path, [1.0], budget={"trials": 50, "minutes": 2.0}, rungs=None)
    monkeypatch.setattr(time, "monotonic", lambda: study.search.start_time + seconds)
    assert study.search.remaining_trials() == remaining


def test_a_budget_without_trials_does_not_limit_them(tmp_path: Path) -> None:
    assert Prepared(tmp_path, [1.0], budget={"tokens": 1e12}).search.remaining_trials() == 1_000_000


@pytest.mark.parametrize(
    ("space", "budget", "count"),
    [
        ({"lr": {"values": [0.01, 0.02, 0.03]}}, 50, 4),
        ({"lr": {"values": [0.01, 0.02, 0.03]}, "dropout": {"values": [0.0, 0.1]}}, 50, 7),
        ({"lr": {"values": [0.01, 0.02, 0.03]}, "dropout": {"low": 0.0, "high": 0.3, "step": 0.1}}, 50, 13),
        ({"lr": {"values": [0.01, 0.02, 0.03]}}, 2, 2),
    ],
    ids=str,
)
def test_a_grid_ends_with_its_last_cell(
    tmp_path: Path, space: dict[str, Any], budget: int, count: int
) -> None:
    """Trial 0 is the base config, which is not a cell of the grid."""
    sampler = {"name": "grid", "generation": 3}
    study = Prepared(
        tmp_path, [1.0] * 20, space=space, budget={"trials": budget}, sampler=sampler, rungs=None
    )
    study.run()
    assert len(study.trials) == count and study.search.remaining_trials() == 0


def test_a_budget_below_the_number_of_written_trials_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "StudyDatabase", lambda *arguments: FakeDatabase(*arguments, written=4))
    study = Prepared(tmp_path, [1.0] * 3, rungs=None)
    with pytest.raises(
        UsageError, match="has 4 trials, but the budget allows only 3; a budget can only grow"
    ):
        study.run()
    assert not study.trainer.tasks
    assert Prepared(tmp_path / "b", [1.0] * 4, rungs=None).run() == states("dddd")


# -- trials and their runs


def test_values_without_a_valid_config_fail_without_a_run(tmp_path: Path) -> None:
    values = {1: {"batch_size": 12, "grad_accum": 8}, 2: {"lr": 0.02}}
    study = Prepared(tmp_path, [1.0, 1.0, 1.0], values=values, rungs=None)
    assert study.run() == states("dfd")
    failed = study.trials[1]
    assert "grad_accum=8 does not divide batch_size=12" in failed.reason
    assert (failed.run_id, failed.stops, failed.scores, failed.rung) == ("", (), {}, -1)
    assert study.search.cost_of(failed) == Ledger()
    assert "" not in study.search.owners and failed not in study.search.best(9)


def test_the_config_of_a_trial_is_the_base_with_its_values(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [1.0, 1.0], values={1: {"lr": 0.05, "timescale": 2.0}})
    study.run()
    base, changed = (study.search.runs_of(trial).cfg for trial in study.trials)
    assert base == study.search.base and study.trials[0].values == {}
    assert changed == base.model_copy(update={"lr": 0.05, "weight_decay": 1 / (0.05 * 2.0 * STEPS)})
    assert [trial.run_id for trial in study.trials] == [base.run_id, changed.run_id]


def test_a_task_names_the_run_completely(tmp_path: Path) -> None:
    study = Prepared(tmp_path / "s", [2.0, 1.0], threads=3)
    study.run()
    first, last = study.trainer.tasks[0], study.trainer.tasks[-1]
    assert (first.preset, first.out, first.store) == (
        "baseline",
        tmp_path / "s" / "runs",
        tmp_path / "s" / "runs" / ".store",
    )
    assert (first.threads, first.until, last.until) == (3, 4, 0)
    assert load("baseline", list(first.sets))[0] == study.search.base


@pytest.mark.parametrize(
    ("status", "summary", "until", "needs_worker"),
    [
        pytest.param({}, False, 4, True, id="not started"),
        pytest.param({"state": "interrupted", "step": 4}, False, 4, False, id="at its rung"),
        pytest.param({"state": "interrupted", "step": 6}, False, 4, False, id="beyond its rung"),
        pytest.param({"state": "interrupted", "step": 3}, False, 4, True, id="before its rung"),
        pytest.param({"state": "interrupted", "step": 6}, False, 0, True, id="before its end"),
        pytest.param({"state": "interrupted"}, False, 1, True, id="at an unknown step"),
        pytest.param({"state": "running", "step": 6}, False, 4, True, id="not stopped"),
        pytest.param({"state": "done", "step": 10}, True, 0, False, id="at its end"),
        pytest.param({"state": "done", "step": 10}, True, 4, False, id="at its end, wanted at a rung"),
        pytest.param({"state": "done", "step": 10}, False, 0, True, id="done, but without a summary"),
        pytest.param({"state": "interrupted", "step": 4}, True, 6, True, id="a summary, but not done"),
    ],
)
def test_a_run_that_is_far_enough_needs_no_worker(
    tmp_path: Path, status: dict[str, Any], summary: bool, until: int, needs_worker: bool
) -> None:
    study = Prepared(tmp_path, [1.0])
    search = study.search
    search.ask()
    folder = write_run(search.runs_dir / search.base.run_id, search.base, 10, study.score).path
    (folder / "status.json").write_text(json.dumps(status))
    if not summary:
        (folder / "summary.json").unlink()
    assert search.train(search.base, until) == Outcome(True)
    assert [task.until for task in study.trainer.tasks] == [until] * needs_worker


def test_a_run_is_trained_to_its_end_by_default(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [1.0])
    study.search.ask()
    study.search.train(study.search.base)
    assert [task.until for task in study.trainer.tasks] == [0]


def test_a_run_of_another_config_in_its_place_is_refused(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [1.0])
    search = study.search
    search.ask()
    other = search.base.model_copy(update={"lr": 0.5})
    write_run(search.runs_dir / search.base.run_id, other, 10, lambda cfg, step: 1.0)
    with pytest.raises(RunError, match=r"contains a run with another config: lr=0\.5"):
        search.train(search.base)


def test_a_score_is_read_by_step_and_split(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [1.0])
    search = study.search
    folder = search.runs_dir / search.base.run_id
    folder.mkdir(parents=True)
    rows = [
        eval_row("dev", 2, 7.0),
        step_row(4),
        eval_row("val", 4, 1.0),
        eval_row("dev", 4, 3.0),
        eval_row("dev", 4, 2.0),
        eval_row("val", 4, 0.5),
    ]
    write_rows(folder, [*rows, eval_row("dev", 6, 5.0)])
    assert search.run_score(search.base, 4) == 2.0, "the last one counts if the run was resumed"
    assert search.run_score(search.base, 2) == 7.0
    with pytest.raises(
        RunError, match=rf"{folder} has no score of dev at step 8, because its metrics\.jsonl was changed"
    ):
        search.run_score(search.base, 8)


# -- the loop


def test_the_database_gets_every_trial_once_and_in_order(
    tmp_path: Path, databases: list[FakeDatabase]
) -> None:
    study = Prepared(tmp_path, [9.0, 1.0, 2.0, 3.0, 2.0, 1.0], generation=3)
    ticks: list[int] = []
    study.search.tick = lambda: ticks.append(len(databases[0].rows))
    study.run()
    rows = databases[0].rows
    assert [(number, state) for number, state, _, _ in rows] == [(t.number, t.state) for t in study.trials]
    assert rows[5][2] == {0: 1.0, 1: 1.0} and rows[5][3]["trained"] == 10
    assert ticks[0] == 0 and ticks[-1] == 6


def test_an_error_ends_the_workers(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [1.0, 2.0])

    def full(task: Task) -> Outcome:
        raise DiskFull("no space left")

    study.trainer.train = full
    with pytest.raises(DiskFull):
        study.run()
    assert study.trainer.closed


def test_workers_are_kept_for_the_confirmation(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [1.0, 2.0])
    study.run()
    assert not study.trainer.closed


def test_a_restarted_driver_trains_nothing_twice(tmp_path: Path) -> None:
    scores = [9.0, 1.0, 2.0, 3.0, 2.0, 1.0]
    first = Prepared(tmp_path, scores, generation=3)
    first.run()
    again = Prepared(tmp_path, scores, generation=3)
    again.run()
    assert not again.trainer.tasks
    assert again.trials == first.trials


def test_configs_of_written_trials_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs take most of a trial's memory, and a study may have a million trials.

    Each config is created only once before it is dropped.
    """
    study = Prepared(tmp_path, [3.0, 2.0, 1.0, 3.0, 2.0, 1.0], generation=3, rungs=RUNGS | {"keep": 0.4})
    created: list[dict[str, Any]] = []
    make_runs = Search._make_runs

    def count(self: Search, values: dict[str, Any], *length: float) -> Any:
        created.append(values)
        return make_runs(self, values, *length)

    monkeypatch.setattr(Search, "_make_runs", count)
    assert study.run() == states("dpdppd")
    assert len(created) == 6 and study.search._runs == {}
    assert study.search.runs_of(study.trials[1]).cfg.run_id == study.trials[1].run_id


def test_the_driver_calls_tick_twice_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress display is updated even if no task ends."""
    options: list[dict[str, Any]] = []

    def watch(futures: Any, **keywords: Any) -> Any:
        options.append(keywords)
        return futures_wait(futures, **keywords)

    futures_wait = driver.wait
    monkeypatch.setattr(driver, "wait", watch)
    Prepared(tmp_path, [1.0, 2.0]).run()
    assert options
    assert all(option == {"timeout": 0.5, "return_when": FIRST_COMPLETED} for option in options)


# -- costs


def cost(study: Prepared, number: int) -> Ledger:
    return study.search.cost_of(study.trials[number])


def steps(ledger: Ledger) -> tuple[int, int, int, int, int]:
    return ledger.asked, ledger.trained, ledger.reused, ledger.wasted, ledger.branch


def test_all_steps_of_a_pruned_trial_are_wasted(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [4.0, 3.0, 2.0, 1.0])
    study.trainer.reused = 3
    study.run()
    assert [trial.state for trial in study.trials] == states("dpdd")
    assert steps(cost(study, 2)) == (10, 7, 3, 0, 0)
    assert steps(cost(study, 1)) == (4, 1, 3, 1, 0)
    assert cost(study, 1).tokens == 128 and cost(study, 1).seconds == 0.5


@pytest.mark.parametrize("letter", ["x", "f"])
def test_all_steps_of_a_diverged_or_failed_trial_are_wasted(tmp_path: Path, letter: str) -> None:
    study = Prepared(tmp_path, [1.0, 2.0])
    train = study.trainer.train
    ends = {"x": Outcome(False, diverged=True, reason="inf"), "f": Outcome(False, reason="failed")}

    def end(task: Task) -> Outcome:
        outcome = train(task)
        return ends[letter] if study.trainer.trained[-1].lr == 0.011 else outcome

    study.trainer.train = end
    assert study.run() == states("d" + letter)
    assert steps(cost(study, 1)) == (4, 4, 0, 4, 0)


def test_the_cost_of_a_finished_trial_is_read_once(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [1.0])
    search = study.search
    search.ask()
    trial = study.trials[0]
    folder = write_run(search.runs_dir / trial.run_id, search.base, 4, study.score, done=False).path
    trial.state = TrialState.PAUSED
    assert search.cost_of(trial).trained == 4
    write_rows(folder, [step_row(step) for step in range(1, 8)])
    assert search.cost_of(trial).trained == 7, "the trial is not finished yet"
    trial.state = TrialState.DONE
    assert search.cost_of(trial).trained == 7
    (folder / "metrics.jsonl").unlink()
    assert search.cost_of(trial).trained == 7


SAME = {"lr": 0.05}


@pytest.mark.parametrize(
    ("scores", "state", "expected"),
    [
        pytest.param({0: 1.0, 1: 1.0}, TrialState.DONE, (10, 0, 10, 0, 0), id="to its end"),
        pytest.param({0: 1.0}, TrialState.PRUNED, (4, 0, 4, 0, 0), id="up to its rung"),
        pytest.param({}, TrialState.DIVERGED, (0, 0, 0, 0, 0), id="without a score"),
    ],
)
def test_a_run_of_an_earlier_trial_costs_nothing_again(
    tmp_path: Path, scores: dict[int, float], state: TrialState, expected: tuple[int, ...]
) -> None:
    study = Prepared(tmp_path, [1.0] * 3, values={1: SAME, 2: SAME})
    search = study.search
    search.ask()
    first, second = study.trials[1:]
    assert first.run_id == second.run_id and search.owners[first.run_id] == 1
    write_run(search.runs_dir / first.run_id, search.runs_of(first).cfg, 10, study.score)
    first.scores, first.state = {0: 1.0, 1: 1.0}, TrialState.DONE
    second.scores, second.state = scores, state
    assert steps(search.cost_of(first)) == (10, 10, 0, 0, 0)
    assert steps(search.cost_of(second)) == expected
    assert search.cost_of(second).tokens == 0 and search.cost_of(second).flops == 0.0


def test_lost_steps_are_not_reused_by_a_trial_that_shares_the_run(tmp_path: Path) -> None:
    """Three steps were trained twice because a worker died.

    Only the trial that owns the run pays for them.
    """
    study = Prepared(tmp_path, [1.0] * 3, values={1: SAME, 2: SAME})
    search = study.search
    search.ask()
    first, second = study.trials[1:]
    folder = write_run(search.runs_dir / first.run_id, search.runs_of(first).cfg, 10, study.score).path
    (folder / "env.json").write_text(json.dumps({"carried": {"checkpoint": 4, "wasted": 3, "resumed": 1}}))
    for trial in (first, second):
        trial.scores, trial.state = {0: 1.0, 1: 1.0}, TrialState.DONE
    assert steps(search.cost_of(first)) == (13, 13, 0, 3, 0)
    assert steps(search.cost_of(second)) == (10, 0, 10, 0, 0)


# -- branches


def branched(folder: Path, scores: Sequence[float], keep: float = 0.5, **keys: Any) -> Prepared:
    """Create a study in which the branch of every odd trial has ten times the score of the trial."""
    study = Prepared(
        folder,
        scores,
        fields=WSD,
        rungs={"at": [0.4], "keep": keep, "score": "branch", "branch": 0.5},
        **keys,
    )

    def score(cfg: TrainConfig, step: int) -> float:
        number = study.search.owners[cfg.run_id]
        return study.scores[number] * (10 if cfg.max_steps and number % 2 else 1)

    study.trainer.score = score
    return study


def test_a_branch_scores_its_rung_and_the_raw_score_is_kept(tmp_path: Path) -> None:
    study = branched(tmp_path, [9.0, 1.0, 2.0, 3.0])
    assert study.run() == states("dpdp")
    assert [trial.scores[0] for trial in study.trials] == [9.0, 10.0, 2.0, 30.0]
    assert [trial.raw_scores for trial in study.trials] == [{0: 9.0}, {0: 1.0}, {0: 2.0}, {0: 3.0}]
    assert study.trials[2].scores == {0: 2.0, 1: 2.0}, "the end needs no branch"
    assert study.trials[1].reason == "place 3 of 4 at step 4"


def test_a_branch_is_trained_after_its_trial(tmp_path: Path) -> None:
    study = branched(tmp_path, [2.0, 1.0])
    study.run()
    trained = [
        (cfg.lr, cfg.max_steps, task.until)
        for cfg, task in zip(study.trainer.trained, study.trainer.tasks, strict=True)
    ]
    rates = study.search.base.lr, 0.011
    assert trained[:4] == [(rates[0], 0, 4), (rates[0], 6, 0), (rates[1], 0, 4), (rates[1], 6, 0)]
    assert trained[4:] == [(rates[0], 0, 0)]
    assert study.search._make_runs({}).branches[0].max_steps == 6


def test_every_rung_but_the_end_has_a_branch(tmp_path: Path) -> None:
    rungs = {"at": [0.2, 0.4, 0.6], "score": "branch", "branch": 0.5}
    runs = Prepared(tmp_path, [1.0], fields=WSD, rungs=rungs).search._make_runs({})
    assert runs.stops == (2, 4, 6, 10)
    assert {rung: cfg.max_steps for rung, cfg in runs.branches.items()} == {0: 4, 1: 6, 2: 9}


def test_a_study_has_no_branches_by_default(tmp_path: Path) -> None:
    assert Prepared(tmp_path, [1.0], fields=WSD).search._make_runs({}).branches == {}


def test_the_steps_of_branches_are_counted(tmp_path: Path) -> None:
    study = branched(tmp_path, [9.0, 1.0, 2.0, 3.0])
    study.run()
    assert steps(cost(study, 0)) == (16, 16, 0, 0, 6)
    assert steps(cost(study, 1)) == (10, 10, 0, 10, 6)


def test_a_branch_that_was_not_started_costs_nothing(tmp_path: Path) -> None:
    """The trial is pruned at the first of two rungs."""
    rungs = {"at": [0.4, 0.6], "keep": 0.5, "score": "branch", "branch": 0.5}
    study = Prepared(tmp_path, [1.0, 2.0], fields=WSD, rungs=rungs)
    study.trainer.score = lambda cfg, step: cfg.lr if cfg.lr == 0.011 else 0.0
    assert study.run() == states("dp")
    assert steps(cost(study, 1)) == (10, 10, 0, 10, 6)
    assert steps(cost(study, 0)) == (10 + 6 + 9, 25, 0, 0, 15)


def test_a_branch_that_diverges_ends_its_trial(tmp_path: Path) -> None:
    study = branched(tmp_path, [2.0, 1.0])
    study.trainer.diverging = lambda cfg: bool(cfg.max_steps) and cfg.lr == 0.011
    assert study.run() == states("dx")
    assert study.trials[1].scores == {} and study.trials[1].raw_scores == {}
    assert steps(cost(study, 1)) == (10, 10, 0, 10, 6), (
        "the trial pays for the branch although it gave no score"
    )


def test_a_trial_that_diverges_starts_no_branch(tmp_path: Path) -> None:
    study = branched(tmp_path, [2.0, 1.0])
    study.trainer.diverging = lambda cfg: cfg.lr == 0.011
    assert study.run() == states("dx")
    assert [cfg.max_steps for cfg in study.trainer.trained if cfg.lr == 0.011] == [0]
    assert steps(cost(study, 1)) == (4, 4, 0, 4, 0)


@pytest.mark.parametrize(
    ("keep", "wasted", "expected"),
    [
        pytest.param(0.5, 0, (8, 4, 4, 4, 0), id="pruned at its rung"),
        pytest.param(1.0, 0, (16, 10, 6, 0, 0), id="trained to its end"),
        pytest.param(1.0, 3, (16, 10, 6, 0, 0), id="the owner pays for lost steps"),
    ],
)
def test_a_branch_of_two_trials_costs_nothing_again(
    tmp_path: Path, keep: float, wasted: int, expected: tuple[int, ...]
) -> None:
    """The trials differ only in the start of their decay, and both decays start after the rung."""
    values = {1: {"decay_frac": 0.2, "lr": 0.05}, 2: {"decay_frac": 0.5, "lr": 0.05}}
    study = branched(tmp_path, [2.0, 1.0, 1.0], keep=keep, values=values)
    study.run()
    one, two = (study.search._make_runs(values[number]) for number in (1, 2))
    assert one.cfg != two.cfg and one.branches[0] == two.branches[0]
    shared = one.branches[0].run_id
    assert study.search.owners[shared] == 1
    carried = {"carried": {"checkpoint": 4, "wasted": wasted, "resumed": 1}}
    (study.search.runs_dir / shared / "env.json").write_text(json.dumps(carried))
    study.search._costs.clear()
    assert steps(cost(study, 2)) == expected
    assert cost(study, 1).branch == 6 + wasted and cost(study, 1).wasted == wasted


# -- the best trials


def test_the_best_trials_are_done_and_have_different_runs(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [5.0, 3.0, 1.0, 3.0, 2.0, 4.0], values={4: SAME, 5: SAME}, rungs=None)
    study.run()
    study.trials[2].state = TrialState.PRUNED
    best = study.search.best(9)
    assert [trial.number for trial in best] == [4, 1, 3, 0]
    assert [trial.number for trial in study.search.best()] == [4]
    assert [trial.number for trial in study.search.best(2)] == [4, 1]


def test_the_best_trials_have_the_best_final_scores(tmp_path: Path) -> None:
    study = Prepared(tmp_path, [(1.0, 3.0), (2.0, 1.0), (3.0, 2.0)], rungs=RUNGS | {"keep": 1.0})
    study.run()
    assert [trial.number for trial in study.search.best(3)] == [1, 2, 0]


@pytest.mark.parametrize(
    ("state", "finished"),
    [
        (TrialState.WAITING, False),
        (TrialState.RUNNING, False),
        (TrialState.PAUSED, False),
        (TrialState.DONE, True),
        (TrialState.PRUNED, True),
        (TrialState.DIVERGED, True),
        (TrialState.FAILED, True),
    ],
)
def test_the_states_of_a_finished_trial(state: TrialState, finished: bool) -> None:
    assert Trial(1, {}, state=state).is_finished is finished


# -- the number of training tokens


class DryRun:
    """Replaces `subprocess.run` for the trainer's dry run."""

    def __init__(self, *answers: tuple[int, str, str]) -> None:
        self.answers = list(answers)
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], capture_output: bool = False, text: bool = False) -> Any:
        self.commands.append(command)
        code, *texts = self.answers[min(len(self.commands), len(self.answers)) - 1]
        out, err = (each if text else each.encode() for each in texts) if capture_output else (None, None)
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)


GOOD = (0, json.dumps({"plan": {"train_tokens": 4321}}), "")


def start_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, str, str]
) -> tuple[Search, DryRun]:
    dry = DryRun(*answers)
    monkeypatch.setattr(subprocess, "run", dry)
    folder.mkdir(exist_ok=True)
    return Search(make_study(), folder, Trainer(lambda cfg, step: 1.0), str, lambda: None), dry


def test_the_trainer_counts_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next driver reads the token count from disk if the fingerprints of the titles are unchanged."""
    search, dry = start_search(tmp_path, monkeypatch, GOOD)
    assert search.train_tokens == 4321
    sets = [part for text in set_arguments(search.study, search.base) for part in ("--set", text)]
    assert dry.commands == [
        [sys.executable, "-m", "mainrun", "train", "--preset", "baseline", *sets, "--dry-run", "--json"]
    ]
    written = json.loads((tmp_path / "tokens.json").read_text())
    assert written == {"train_tokens": 4321, "fingerprints": load_corpus(search.base).fingerprints}
    again, dry = start_search(tmp_path, monkeypatch, (1, "", "error: not to be called"))
    assert again.train_tokens == 4321 and dry.commands == []


def test_the_steps_of_a_trial_follow_from_its_own_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tokenizer is counted once. A tokenizer that cannot be fitted ends its trial, not the study."""
    twice = (0, json.dumps({"plan": {"train_tokens": 2 * TRAIN_TOKENS}}), "")
    dry = DryRun(twice, twice, (2, "", "error: the titles are too few for 90,000 tokens"))
    monkeypatch.setattr(subprocess, "run", dry)
    values: dict[int, dict[str, Any]] = {
        1: {"vocab_size": 300, "timescale": 2.0},
        2: {"vocab_size": 300, "case": "marked"},
        3: {"vocab_size": 300, "lr": 0.02},
        4: {"vocab_size": 90_000},
        5: {"vocab_size": TINY["vocab_size"], "lr": 0.02},
    }
    search = Prepared(tmp_path, [1.0] * 6, values=values, rungs=None).search
    search.ask()
    again = Search(search.study, tmp_path, search.engine, str, lambda: None)
    again.sampler = search.sampler
    again.ask()
    assert again.trials == search.trials
    assert [trial.stops for trial in search.trials] == [
        (STEPS,), (2 * STEPS,), (2 * STEPS,), (2 * STEPS,), (), (STEPS,)
    ]  # fmt: skip
    cfg = search.runs_of(search.trials[1]).cfg
    assert cfg.weight_decay == pytest.approx(1 / (cfg.lr * 2.0 * 2 * STEPS))
    reason = "the trial cannot be trained: the titles are too few for 90,000 tokens"
    assert (search.trials[4].state, search.trials[4].reason) == (TrialState.FAILED, reason)
    assert len(dry.commands) == 4, "the second driver repeats only the count that failed"
    assert "case=marked" in dry.commands[1] and "case=marked" not in dry.commands[0]


def test_titles_that_have_changed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_search(tmp_path, monkeypatch, GOOD)
    file = tmp_path / "tokens.json"
    data = json.loads(file.read_text())
    data["fingerprints"] = dict.fromkeys(data["fingerprints"], "0" * 64)
    file.write_text(json.dumps(data))
    with pytest.raises(
        UsageError,
        match=r"^the titles of synthetic have changed since .* was started; "
        r"restore the titles, or .*--as NAME",
    ):
        start_search(tmp_path, monkeypatch, GOOD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "is not JSON", id="empty"),
        pytest.param("[1]", "must be an object", id="a list"),
        pytest.param("{}", "lacks 'train_tokens'", id="without tokens"),
        pytest.param(
            '{"train_tokens": 0}',
            "has train_tokens = 0, but train_tokens must be a whole number",
            id="no tokens",
        ),
        pytest.param('{"train_tokens": "many"}', "has train_tokens = 'many'", id="a text"),
        pytest.param(
            '{"train_tokens": 9, "fingerprints": 5}',
            "has fingerprints = 5, but fingerprints must be an object",
            id="invalid fingerprints",
        ),
        pytest.param('{"train_tokens": 1281.0}', "has train_tokens = 1281.0", id="a fraction"),
        pytest.param('{"train_tokens": 128}', "has train_tokens = 128 ", id="less than one step"),
    ],
)
def test_a_damaged_tokens_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(text)
    with pytest.raises(RunError) as error:
        Search(make_study(), tmp_path, Trainer(lambda cfg, step: 1.0), str, lambda: None)
    assert str(error.value).startswith(f"{file} is damaged: it ") and message in str(error.value)
    assert "remove the file and run the same command again" in str(error.value)


def test_enough_tokens_for_one_step_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text('{"train_tokens": 129}')
    assert (
        Search(make_study(), tmp_path, Trainer(lambda cfg, step: 1.0), str, lambda: None).train_tokens == 129
    )


@pytest.mark.parametrize(("signal", "deaths"), [(1, 1), (9, 3), (15, 19)])
def test_a_killed_dry_run_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: int, deaths: int
) -> None:
    search, dry = start_search(tmp_path, monkeypatch, *[(-signal, "", "")] * deaths, GOOD)
    assert search.train_tokens == 4321 and len(dry.commands) == deaths + 1


@pytest.mark.parametrize(
    ("answer", "kind", "message", "calls"),
    [
        pytest.param(
            (-9, "", ""),
            MainrunError,
            "the base config of the study cannot be trained: the process ended without a message",
            20,
            id="always killed",
        ),
        pytest.param(
            (75, "", "warning: x\ninterrupted: no space left\n"),
            Interrupted,
            "no space left",
            1,
            id="a full disk",
        ),
        pytest.param(
            (2, "", "x\nerror: no corpus"),
            UsageError,
            "the base config of the study cannot be trained: no corpus",
            1,
            id="usage",
        ),
        pytest.param(
            (1, "", "error: odd"),
            MainrunError,
            "the base config of the study cannot be trained: odd",
            1,
            id="a crash",
        ),
        pytest.param(
            (1, "", " \n"),
            MainrunError,
            "the base config of the study cannot be trained: the process ended without a message",
            1,
            id="no message",
        ),
    ],
)
def test_a_base_that_cannot_be_trained_ends_the_study(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: tuple[int, str, str],
    kind: type[MainrunError],
    message: str,
    calls: int,
) -> None:
    dry = DryRun(answer)
    monkeypatch.setattr(subprocess, "run", dry)
    with pytest.raises(MainrunError) as error:
        Search(make_study(), tmp_path, Trainer(lambda cfg, step: 1.0), str, lambda: None)
    assert type(error.value) is kind and str(error.value) == message
    assert len(dry.commands) == calls and not (tmp_path / "tokens.json").exists()


# -- a config as --set arguments


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({}, []),
        ({"lr": 0.05}, ["lr=0.05"]),
        ({"lr": 0.1 + 0.2}, ["lr=0.30000000000000004"]),
        ({"optimizer": "muon"}, ["optimizer=muon"]),
        ({"tie_head": False}, ["tie_head=false"]),
        ({"qkv_bias": True}, ["qkv_bias=true"]),
        ({"frozen": (0, 2)}, ["frozen=[0, 2]"]),
        ({"preset": "another"}, []),
        ({"seed": 5, "lr": 0.05}, ["seed=5", "lr=0.05"]),
    ],
    ids=str,
)
def test_a_config_as_set_arguments(fields: dict[str, Any], texts: list[str]) -> None:
    plain = load("baseline")[0]
    cfg = plain.model_copy(update=fields)
    assert set_arguments(make_study(), cfg) == texts
    assert load("baseline", texts)[0] == cfg.model_copy(update={"preset": "baseline"})


def test_a_value_of_the_preset_can_be_unset(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "baseline"\nattn_dropout = 0.1\n')
    study = make_study(preset=str(file))
    cfg = study.base().model_copy(update={"attn_dropout": None})
    texts = set_arguments(study, cfg)
    assert "attn_dropout=none" in texts and load(str(file), texts)[0] == cfg


def test_a_growth_schedule_is_set_as_json() -> None:
    ops = {"version": 2, "ops": [{"name": "set_lr", "value": 0.01, "trigger": {"budget_frac": 0.5}}]}
    cfg = load("baseline", [f"growth={json.dumps(ops)}"])[0]
    (text,) = set_arguments(make_study(), cfg)
    assert text.startswith("growth={") and load("baseline", [text])[0] == cfg


# -- imports

HEAVY = ("torch", "optuna", "ray", "pandas", "matplotlib", "scipy")


def test_heavy_libraries_are_not_imported_early() -> None:
    """Libraries that take a second to import would slow down `mainrun --help`."""
    names = ("cli", "driver", "confirm", "display", "sampling", "space", "branch", "ledger", "study", "trial")
    modules = ", ".join(f"sweeps.{name}" for name in names)
    code = f"import sys, {modules}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
