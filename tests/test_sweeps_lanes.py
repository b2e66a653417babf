"""Tests the search with the sampler frugal: its trials depend on the study file, and its plans are kept."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import slow_unless
from searching import FIELDS, TRAIN_TOKENS, FakeDatabase, Trainer, make_study

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError
from mainrun.plan.plan import Plan
from mainrun.plan.recipes import load
from sweeps.engine.protocol import Outcome, Task
from sweeps.export import write_export
from sweeps.frugal import Asked, Proposal, Reason
from sweeps.lanes import FrugalSearch, Lanes, make_search
from sweeps.study import Study
from sweeps.trial import Trial, TrialState

SPACE: dict[str, Any] = {
    "lr": {"low": 1e-3, "high": 0.1, "log": True},
    "dropout": {"low": 0.0, "high": 0.3},
    "decay_frac": {"values": [0.2, 0.5, 0.8]},
}
WSD = {"schedule": "wsd", "epochs": 20}


@pytest.fixture(autouse=True)
def no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.database.StudyDatabase", FakeDatabase)


def frugal_study(fields: dict[str, Any] | None = None, **keys: Any) -> Study:
    sampler = {"name": "frugal", "startup": 4, **keys.pop("sampler", {})}
    return make_study(
        WSD | (fields or {}), **({"space": SPACE, "budget": {"trials": 20}} | keys), sampler=sampler
    )


def score(cfg: TrainConfig, step: int) -> float:
    return 2 + 0.1 * math.log(cfg.lr / 0.02) ** 2 + (cfg.dropout - 0.1) ** 2 + 0.1 * cfg.decay_frac + 1 / step


class SlowTrainer(Trainer):
    """A trainer whose tasks take random times, and that can be stopped after some tasks."""

    def __init__(self, workers: int, tasks: float = math.inf) -> None:
        super().__init__(score, workers)
        self.left = tasks

    def train(self, task: Task) -> Outcome:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        time.sleep(0.01 * random.random())
        return super().train(task)


def new_search(folder: Path, study: Study, engine: Any) -> FrugalSearch:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").write_text(json.dumps({"train_tokens": TRAIN_TOKENS}))
    search = make_search(study, folder, engine, lambda text: None, lambda: None)
    assert isinstance(search, FrugalSearch)
    return search


def trained(folder: Path, study: Study, engine: Any = None) -> FrugalSearch:
    search = new_search(folder, study, engine or SlowTrainer(1))
    search.run()
    return search


def facts(search: FrugalSearch) -> list[tuple[Any, ...]]:
    return [(t.number, t.values, t.horizon, t.late, t.scores, t.state, t.planned) for t in search.trials]


# -- the clock


def test_a_lane_is_busy_for_the_new_tokens_of_its_run() -> None:
    lanes = Lanes(2)
    seen = []
    for duration in (5, 3, 4, 0, 2):
        seen.append(lanes.now)
        lanes.take(duration)
    assert seen == [0, 0, 3, 5, 5]
    assert lanes.ends == [5, 3, 7, 5, 7]


def test_a_lane_waits_until_the_next_run_ends() -> None:
    lanes = Lanes(3)
    lanes.take(5)
    lanes.take(3)
    assert lanes.wait() and sorted(lanes.free) == [3, 3, 5]
    one = Lanes(1)
    one.take(5)
    assert not one.wait() and one.now == 5


# -- the trials are a function of the study


@pytest.mark.parametrize("lanes", slow_unless([1, 3], [1, 2, 3]))
def test_the_trials_do_not_depend_on_the_workers(tmp_path: Path, lanes: int) -> None:
    study = frugal_study(sampler={"lanes": lanes})
    searches = [trained(tmp_path / str(n), study, SlowTrainer(n)) for n in (1, 2, 3)]
    assert facts(searches[0]) == facts(searches[1]) == facts(searches[2])
    assert len(searches[0].trials) == 20
    horizons = {trial.horizon for trial in searches[0].trials}
    assert horizons == {0.25, 0.5, 1.0}


def test_the_lanes_are_part_of_what_the_trials_are(tmp_path: Path) -> None:
    one, four = (trained(tmp_path / str(n), frugal_study(sampler={"lanes": n})) for n in (1, 4))
    assert facts(one) != facts(four)


def test_a_driver_that_is_stopped_often_asks_for_the_same_trials(tmp_path: Path) -> None:
    study = frugal_study()
    expected = facts(trained(tmp_path / "whole", study))
    engine = SlowTrainer(2)
    for _ in range(40):
        engine = SlowTrainer(2, tasks=3)
        search = new_search(tmp_path / "stopped", study, engine)
        try:
            search.run()
        except KeyboardInterrupt:
            continue
        break
    assert engine.left >= 0 and facts(search) == expected


def test_the_content_of_the_store_does_not_change_the_trials(tmp_path: Path) -> None:
    """A store that already has all states, one that is emptied half-way, and one of another study."""
    study = frugal_study(budget={"trials": 11})
    expected = facts(trained(tmp_path / "new", study))
    full = SlowTrainer(2)
    full.reused = 40
    assert facts(trained(tmp_path / "full", study, full)) == expected
    for name, reused in (("emptied", 0), ("foreign", 40)):
        store = tmp_path / name / "runs" / ".store"
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / name, study, SlowTrainer(1, tasks=8))
        store.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"the state of another study")
        again = SlowTrainer(2)
        again.reused = reused
        assert facts(trained(tmp_path / name, study, again)) == expected


def test_a_larger_budget_leaves_the_first_trials_unchanged(tmp_path: Path) -> None:
    small = facts(trained(tmp_path, frugal_study(budget={"trials": 9})))
    large = facts(trained(tmp_path, frugal_study(budget={"trials": 16})))
    assert large[:9] == small and len(large) == 16


def test_the_budget_counts_planned_tokens(tmp_path: Path) -> None:
    whole = 200 * 128
    search = trained(tmp_path, frugal_study(budget={"tokens": 6.0 * whole}))
    assert search.planned_tokens >= 6 * whole > search.planned_tokens - search.trials[-1].planned


def test_an_ask_knows_exactly_the_runs_that_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The asks equal those of a simulation that runs one run after another."""
    study = frugal_study(sampler={"lanes": 3})
    search = new_search(tmp_path, study, SlowTrainer(3))
    known: list[tuple[int, int]] = []
    real_ask = search.frugal.ask

    def ask(number: int, finished: Any, pending: Any, new_tokens: Any) -> Any:
        known.append((number, len(finished)))
        assert len(finished) + len(pending) == number
        return real_ask(number, finished, pending, new_tokens)

    monkeypatch.setattr(search.frugal, "ask", ask)
    search.run()
    lanes = Lanes(3)
    for number, count in known:
        assert count == sum(end <= lanes.now for end in lanes.ends)
        lanes.take(search.trials[number].planned)


def test_a_run_that_diverged_ends_when_planned(tmp_path: Path) -> None:
    engine = SlowTrainer(2)
    engine.diverging = lambda cfg: cfg.lr > 0.05
    again = SlowTrainer(1)
    again.diverging = engine.diverging
    study = frugal_study(budget={"trials": 16}, sampler={"seed": 3})
    search = trained(tmp_path / "2", study, engine)
    assert any(trial.state is TrialState.DIVERGED for trial in search.trials)
    assert facts(search) == facts(trained(tmp_path / "1", study, again))


def test_a_settled_search_ends(tmp_path: Path) -> None:
    study = frugal_study(budget={"trials": 200, "until": "settled"})
    search = trained(tmp_path, study)
    assert 20 < len(search.trials) < 120
    assert search.remaining_trials() == 0 and not search.ask()


# -- new tokens


def test_a_second_decay_of_a_trunk_costs_only_its_decay(tmp_path: Path) -> None:
    search = new_search(tmp_path, frugal_study(), Trainer(score))
    search.ask()  # the base at horizon 1, whose learning rate decays over the last half
    base = search.base.decay_frac
    assert search.trials[0].planned == 200 * 128
    step = 128
    other = 0.5 if base != 0.5 else 0.8
    whole = search.new_tokens(Asked({"decay_frac": other}, 1.0))
    short = search.new_tokens(Asked({}, 0.25))
    assert search.new_tokens(Asked({}, 1.0)) == 0
    assert search.new_tokens(Asked({"dropout": 0.3}, 1.0)) == 200 * step
    decay = min(round(max(other, base) * 200), 200)
    assert whole == (decay - 1) * step  # the first step of a decay has the peak learning rate
    assert short == (round(base * 50) - 1) * step


def test_a_short_run_needs_twenty_steps_and_a_trunk(tmp_path: Path) -> None:
    search = new_search(tmp_path, frugal_study({"epochs": 7}), Trainer(score))
    assert search.new_tokens(Asked({}, 0.25)) is None and search.new_tokens(Asked({}, 0.5)) == 35 * 128
    warm = new_search(tmp_path / "warm", frugal_study({"warmup_frac": 0.2}), Trainer(score))
    assert warm.new_tokens(Asked({"decay_frac": 0.2}, 0.25)) is None
    assert warm.new_tokens(Asked({"decay_frac": 0.2}, 0.5)) == 100 * 128


def test_every_fork_of_a_trunk_is_kept(tmp_path: Path) -> None:
    search = new_search(tmp_path, frugal_study(), Trainer(score))
    plan = search._chain(Asked({"decay_frac": 0.2}, 1.0))[0]
    for horizon in (0.25, 0.5, 1.0):
        for decay_frac in (0.2, 0.5, 0.8):
            short, _ = search._chain(Asked({"decay_frac": decay_frac}, horizon))
            if plan.warmup_steps < short.decay_start + 1 < plan.decay_start:
                assert short.decay_start + 1 in search.forks(plan)


def test_the_engine_is_told_which_states_to_keep(tmp_path: Path) -> None:
    engine = Trainer(score)
    search = trained(tmp_path, frugal_study(budget={"trials": 4}), engine)
    for task, trial in zip(engine.tasks, search.trials, strict=True):
        assert list(task.keep) == search.forks(Plan(search.runs_of(trial).cfg, TRAIN_TOKENS))
    assert engine.tasks[0].keep


# -- late changes

LATE_SPACE = SPACE | {"batch_size": {"values": [4, 8, 16]}}
LATE: dict[str, Any] = {"sampler": {"late": 0.5}, "space": LATE_SPACE, "budget": {"trials": 26}}


def late_study(fields: dict[str, Any] | None = None, **keys: Any) -> Study:
    """Return a study whose short runs are expensive, because they share little."""
    return frugal_study({"decay_frac": 0.3} | (fields or {}), **LATE | keys)


def test_late_changes_share_the_first_half_of_the_base(tmp_path: Path) -> None:
    search = new_search(tmp_path, late_study(), Trainer(score))
    search.ask()  # the base, whose learning rate decays over the last three tenths
    step = 128
    assert 100 in search.forks(search.base_plan)
    late = Asked({"lr": 0.05, "dropout": 0.2}, 1.0, 0.5)
    assert search.new_tokens(late) == 100 * step
    assert search.new_tokens(Asked({"lr": 0.05, "batch_size": 4}, 1.0, 0.5)) == 100 * step
    assert search.new_tokens(Asked({"lr": 0.05}, 1.0)) == 200 * step
    assert search.new_tokens(Asked({}, 1.0, 0.5)) is None  # nothing changes
    assert search.new_tokens(Asked({"decay_frac": 0.2}, 1.0, 0.5)) is None
    assert search.new_tokens(Asked({"lr": 0.05, "decay_frac": 0.8}, 1.0, 0.5)) is None
    search._add(Proposal(late, Reason("search")))
    assert search.new_tokens(late) == 0
    second = Asked({"lr": 0.05, "dropout": 0.2, "decay_frac": 0.2}, 1.0, 0.5)
    assert search.new_tokens(second) == (60 - 1) * step  # they share the steps until the earlier decay


@pytest.mark.parametrize("batch_size", [4, 8, 16])
def test_every_fork_of_a_late_change_is_kept(tmp_path: Path, batch_size: int) -> None:
    search = new_search(tmp_path, late_study(), Trainer(score))
    values = {"lr": 0.05, "batch_size": batch_size}
    plan = search._chain(Asked(values | {"decay_frac": 0.2}, 1.0, 0.5))[0]
    other = search._chain(Asked(values | {"decay_frac": 0.5}, 1.0, 0.5))[0]
    assert other.decay_start + 1 in search.kept_steps(plan)
    assert plan.segments[-1].first in search.kept_steps(plan)


def test_the_trials_of_late_changes_do_not_depend_on_workers_or_kills(tmp_path: Path) -> None:
    study = late_study()
    first = trained(tmp_path / "1", study)
    late = [trial for trial in first.trials if trial.late]
    assert late and all(trial.state is TrialState.SHORT and trial.horizon == 1 for trial in late)
    assert facts(trained(tmp_path / "3", study, SlowTrainer(3))) == facts(first)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", study, SlowTrainer(2, tasks=20))
    assert facts(trained(tmp_path / "killed", study)) == facts(first)
    assert not any(trial.late for trial in first.best(50))


def test_the_export_names_late_changes(tmp_path: Path) -> None:
    search = trained(tmp_path, late_study())
    rows = [search.facts(trial) for trial in search.trials]
    assert [row.get("late", 0.0) for row in rows] == [trial.late for trial in search.trials]
    late = next(row for row in rows if "late" in row)
    chosen = max(late["why"]["options"], key=lambda option: option["value"])
    assert chosen["late"] == 0.5 and chosen["horizon"] == 1.0
    lengths = search.summary()["frugal"]["horizons"]
    assert lengths[-1]["late"] == 0.5 and sum(row["runs"] for row in lengths) == 26
    assert lengths[-1]["runs"] == sum("late" in row for row in rows)


# -- results


def test_only_whole_runs_can_be_best(tmp_path: Path) -> None:
    search = trained(tmp_path, frugal_study())
    best = search.best(50)
    assert best and all(trial.horizon == 1 and trial.state is TrialState.DONE for trial in best)
    short = [trial for trial in search.trials if trial.horizon < 1]
    assert short and all(trial.state is TrialState.SHORT for trial in short)
    assert search.best()[0].scores[0] < search.trials[0].scores[0]


def test_the_display_does_not_fit_the_surrogate_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = trained(tmp_path, frugal_study(budget={"trials": 12}))
    best = search.best(3)
    monkeypatch.setattr(search.frugal, "beliefs", None)
    assert search.best(3) == best


def test_the_export_says_why_each_run_was_chosen(tmp_path: Path) -> None:
    search = trained(tmp_path, frugal_study())
    rows = [search.facts(trial) for trial in search.trials]
    assert rows[0] == {"planned": 200 * 128, "why": {"phase": "first design", "options": []}}
    why = rows[-1]["why"]
    assert why["phase"] == "search" and why["improvement"] >= 0
    chosen = max(why["options"], key=lambda option: option["value"])
    assert (chosen["values"], chosen["horizon"]) == (search.trials[-1].values, search.trials[-1].horizon)
    summary = search.summary()["frugal"]
    assert sum(row["runs"] for row in summary["horizons"]) == 20 and set(summary["drift"]) == set(SPACE)
    json.dumps([rows, summary], allow_nan=False)
    write_export(search, None)
    table = pq.read_table(search.folder / "export" / "trials.parquet")
    assert table["horizon"].to_pylist() == [trial.horizon for trial in search.trials]
    assert table["planned"].to_pylist() == [trial.planned for trial in search.trials]


# -- bad input


@pytest.mark.parametrize(
    ("keys", "fields", "message"),
    [
        ({"sampler": {"horizons": [0.5, 0.25, 1.0]}}, {}, "must ascend and end with 1"),
        ({"sampler": {"horizons": [0.25, 0.5]}}, {}, "must ascend and end with 1"),
        ({"sampler": {"horizons": [0.5, 0.5, 1.0]}}, {}, "must ascend and end with 1"),
        ({"sampler": {"lanes": 0}}, {}, "sampler.lanes=0 is not allowed"),
        ({"sampler": {"lanes": 65}}, {}, "sampler.lanes=65 is not allowed"),
        ({"sampler": {"generation": 2}}, {}, "write lanes instead"),
        ({"sampler": {"name": "tpe", "lanes": 2}}, {}, "sampler.lanes with sampler.name='tpe'"),
        (
            {"sampler": {"name": "gp"}, "budget": {"trials": 3, "until": "settled"}},
            {},
            "only frugal predicts",
        ),
        ({"budget": {"flops": 1e12}}, {}, "write tokens or trials instead"),
        ({"rungs": {"at": [0.5]}}, {}, "its horizons replace rungs; remove [rungs]"),
        ({}, {"max_steps": 50}, "sampler.horizons with max_steps"),
        (
            {},
            {"growth": {"version": 2, "ops": [{"name": "set_lr", "value": 0.01, "trigger": {"step": 5}}]}},
            "sampler.horizons with growth",
        ),
    ],
)
def test_a_study_that_does_not_fit_is_refused(
    keys: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match="cannot be searched") as error:
        frugal_study(fields, **keys)
    assert message in str(error.value)


def test_growth_is_searched_with_whole_runs_only(tmp_path: Path) -> None:
    growth = {"version": 2, "ops": [{"name": "set_lr", "value": 0.01, "trigger": {"budget_frac": 0.5}}]}
    space = {"growth.ops.0.value": {"low": 1e-3, "high": 0.1, "log": True}}
    study = frugal_study({"growth": growth}, space=space, sampler={"horizons": [1.0]}, budget={"trials": 8})
    search = trained(tmp_path, study)
    assert all(trial.state is TrialState.DONE for trial in search.trials)
    assert search.trials[1].planned < search.trials[0].planned  # the first half is shared


def test_the_digest_of_other_samplers_does_not_depend_on_lanes(tmp_path: Path) -> None:
    plain = make_study()
    assert "lanes" not in json.dumps(sorted(plain.sampler.model_fields_set))
    changed = plain.model_copy(update={"sampler": plain.sampler.model_copy(update={"lanes": 5})})
    assert changed.digest == plain.digest
    frugal = frugal_study()
    assert frugal.digest != frugal_study(sampler={"lanes": 5}).digest
    assert FIELDS["dev_frac"]


# -- the real trainer


class RealTrainer:
    """An engine that trains in this process."""

    workers = 1

    def train(self, task: Task) -> Outcome:
        from mainrun.run.session import train
        from mainrun.store.nodes import Store

        train(load(task.preset, list(task.sets))[0], task.out, store=Store(task.store), keep=task.keep)
        return Outcome(True)

    def close(self) -> None:
        pass


REAL: dict[str, Any] = {
    "num_titles": 200, "vocab_size": 400, "epochs": 12, "eval_interval": 0, "eval_per_epoch": 1
}  # fmt: skip


def really_trained(folder: Path, study: Study) -> FrugalSearch:
    folder.mkdir(parents=True, exist_ok=True)
    search = make_search(study, folder, RealTrainer(), lambda text: None, lambda: None)
    assert isinstance(search, FrugalSearch)
    search.run()
    return search


def assert_equal_from_scratch(search: FrugalSearch, trials: list[Trial], folder: Path) -> None:
    """Train trials again without a store, and compare the states of the last step."""
    from safetensors.numpy import load_file

    from mainrun.run.session import train

    for trial in trials:
        cfg = search.runs_of(trial).cfg
        train(cfg, folder)
        shared, alone = (
            load_file(next((place / cfg.run_id / "checkpoints").glob("*/state.safetensors")))
            for place in (search.runs_dir, folder)
        )
        assert shared.keys() == alone.keys()
        assert all((shared[name] == alone[name]).all() for name in shared)


@pytest.mark.slow
@pytest.mark.parametrize(
    "study",
    [
        frugal_study(REAL, budget={"trials": 16}),
        late_study(REAL, sampler={"late": 0.5, "horizons": [1.0]}, budget={"trials": 14}),
    ],
    ids=["short runs", "late changes"],
)
def test_the_planned_tokens_are_trained_and_runs_equal_those_from_scratch(
    study: Study, tmp_path: Path
) -> None:
    search = really_trained(tmp_path, study)
    costs = [search.cost_of(trial) for trial in search.trials]
    assert [cost.tokens for cost in costs] == [trial.planned for trial in search.trials]
    reusing = [trial for trial, cost in zip(search.trials, costs, strict=True) if cost.reused]
    if study.sampler.late:
        reusing = [trial for trial in reusing if trial.late]
    assert len(reusing) >= 2
    assert_equal_from_scratch(search, reusing[:3], tmp_path / "scratch")


@pytest.mark.slow
def test_a_real_store_that_is_emptied_or_full_does_not_change_the_trials(tmp_path: Path) -> None:
    study = frugal_study(REAL, budget={"trials": 7})
    first = really_trained(tmp_path / "first", study)
    emptied = tmp_path / "emptied"
    really_trained(emptied, frugal_study(REAL, budget={"trials": 4}))
    shutil.rmtree(emptied / "runs" / ".store")
    assert facts(really_trained(emptied, study)) == facts(first)
    full = tmp_path / "full"
    shutil.copytree(first.store_dir, full / "runs" / ".store")
    search = really_trained(full, study)
    assert facts(search) == facts(first)
    assert all(search.cost_of(trial).tokens == 0 for trial in search.trials)
