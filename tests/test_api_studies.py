"""Test studies and reports from Python, the tables of trials, and the recorded times."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
from conftest import TINY
from pandas import DataFrame
from pandas.testing import assert_frame_equal
from searching import FIELDS, TRAIN_TOKENS, Trainer, make_search, make_study

import mainrun
from mainrun.config import TrainConfig
from reports.evidence import load
from sweeps.driver import Search
from sweeps.engine.protocol import Outcome, Task
from sweeps.export import write_export
from sweeps.folder import write_study_json
from sweeps.times import FILE, RunTimes, Span

EVIDENCE = {
    "noise": {"sigma": 0.1, "floor": 0.2, "values": [1.0, 1.1]},
    "rows": [
        {"trial": 2, "difference": -0.5, "interval": [-0.6, -0.4], "p_holm": 0.01, "claim": True, "why": "",
         "params": {"lr": 0.1}, "pairs": 3, "stopped": "claimed"}
    ],
    "claim": "trial 2 is better than the base",
    "winner": 2,
}  # fmt: skip


def score(cfg: TrainConfig, step: int) -> float:
    return cfg.lr + 1 / step


def bad(cfg: TrainConfig) -> bool:
    return cfg.momentum > 0.5


SPACE = {
    "lr": {"low": 1e-3, "high": 0.1, "log": True},
    "momentum": {"values": [0.0, 0.9], "when": {"optimizer": ["sgd"]}},
    "optimizer": {"values": ["adamw", "sgd"]},
    "bias": {"values": [True, False]},
    "n_layer": {"values": [1, 2]},
}


def searched(folder: Path, evidence: Any = None, **keys: Any) -> Search:
    """Search a study whose runs are written without training, and export it."""
    study = make_study(space=SPACE, budget={"trials": 12}, rungs={"at": [0.5], "keep": 0.5}, **keys)
    engine = Trainer(score)
    engine.diverging = bad
    search = make_search(folder, study, engine)
    write_study_json(folder, study, "mainrun sweep tiny")
    search.run()
    if evidence is not None:
        write_export(search, evidence)
    return search


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    return searched(tmp_path_factory.mktemp("studies") / "tiny", EVIDENCE)


def database(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="tiny", storage=f"sqlite:///{folder / 'study.db'}")


# -- tables


def test_the_trials_have_all_columns_of_optuna_with_their_types(search: Search) -> None:
    expected = database(search.folder).trials_dataframe()
    table = mainrun.study(search.folder).trials
    assert {"number", "value", "params_lr", "state", "datetime_start", "duration"} <= set(expected.columns)
    assert set(expected["state"]) == {"COMPLETE", "PRUNED", "FAIL"}
    # SQLite and export.json keep the same microseconds
    assert_frame_equal(table[list(expected.columns)], expected)
    states = [trial.state.value for trial in search.trials]
    assert list(table["outcome"]) == states and {"done", "pruned", "diverged"} <= set(states)
    assert list(table["run"]) == [trial.run_id for trial in search.trials]


def without_nan(table: DataFrame) -> DataFrame:
    """Return a table with None in empty cells, because Parquet does not distinguish None and NaN."""
    return table.astype(object).where(table.notna(), None)


def test_trials_parquet_has_the_columns_of_optuna(search: Search) -> None:
    expected = database(search.folder).trials_dataframe(
        ("number", "value", "datetime_start", "datetime_complete", "duration", "params", "state")
    )
    table = pq.read_table(search.folder / "export/trials.parquet").to_pandas()
    assert dict(table.dtypes[expected.columns]) == dict(expected.dtypes)
    assert_frame_equal(without_nan(table[list(expected.columns)]), without_nan(expected))
    assert list(table.columns[: len(expected.columns)]) == list(expected.columns)


def test_a_pruned_trial_has_its_last_score_as_in_optuna(search: Search) -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.report(2.0, 0)
        raise optuna.TrialPruned

    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    assert study.trials[0].value == 2.0
    pruned = [trial for trial in database(search.folder).trials if trial.state.name == "PRUNED"]
    assert pruned and all(trial.value == trial.intermediate_values[0] for trial in pruned)
    failed = [trial for trial in database(search.folder).trials if trial.state.name == "FAIL"]
    assert failed and all(trial.value is None for trial in failed)


OLD = (
    "trial", "state", "value", "seed", "rung", "steps", "asked", "trained", "reused", "wasted", "branch",
    "tokens", "flops", "seconds", "reason", "run", "forward_flops", "horizon",
)  # fmt: skip


def test_the_report_reads_old_and_new_exports_alike(search: Search, tmp_path: Path) -> None:
    new = load._read_study(search.folder / "export")
    rows = []
    for row in json.loads((search.folder / "export.json").read_text())["trials"]:
        old = {name: row[name] for name in OLD} | {"planned": None}
        old |= {name: json.dumps(row[name]) for name in ("scores", "raw_scores")}
        rows.append(old | {f"params.{name}": row["params"].get(name) for name in SPACE})
    assert sorted(new.trials[0]) == sorted(rows[0])
    assert [{**row} for row in new.trials] == rows


# -- times


class SlowTrainer(Trainer):
    """An engine whose runs take a moment, and that remembers when."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(score, **keys)
        self.spans: dict[str, list[tuple[float, float]]] = {}

    def train(self, task: Task) -> Outcome:
        start = time.time()
        time.sleep(0.02)
        outcome = super().train(task)
        self.spans.setdefault(self.trained[-1].run_id, []).append((start, time.time()))
        return outcome


def test_the_database_has_the_real_times_of_the_trials(tmp_path: Path) -> None:
    engine = SlowTrainer()
    search = make_search(tmp_path, make_study(budget={"trials": 3}), engine)
    search.run()
    for trial, written in zip(search.trials, database(tmp_path).trials, strict=True):
        (start, end), *_ = engine.spans[trial.run_id]
        assert written.datetime_start is not None and written.datetime_complete is not None
        assert abs(written.datetime_start.timestamp() - start) < 0.015
        assert abs(written.datetime_complete.timestamp() - end) < 0.015
        assert written.duration is not None and written.duration.total_seconds() > 0.015
    later = make_search(tmp_path, make_study(budget={"trials": 3}), Trainer(score))
    later.run()
    assert [later.span_of(t) for t in later.trials] == [search.span_of(t) for t in search.trials]


def test_a_promoted_trial_lasts_from_its_first_rung_to_its_last(tmp_path: Path) -> None:
    engine = SlowTrainer()
    study = make_study(budget={"trials": 3}, rungs={"at": [0.5], "keep": 1.0})
    search = make_search(tmp_path, study, engine)
    search.run()
    span = search.span_of(search.trials[0])
    first, last = engine.spans[search.trials[0].run_id]
    assert abs(span.start - first[0]) < 0.015 and abs(span.end - last[1]) < 0.015 < last[0] - first[1]


def test_damaged_times_are_left_out(tmp_path: Path) -> None:
    rows = [
        '{"run": "a", "start": 5.0}', "not json", "[1]", '{"run": 1, "start": 2}', '{"run": "a"}',
        '{"run": "a", "start": "x"}', '{"run": "a", "end": 1e300}', '{"run": "a", "end": 9}', '{"run',
    ]  # fmt: skip
    (tmp_path / FILE).write_text("\n".join(rows))
    times = RunTimes(tmp_path)
    assert times.span(["a"]) == Span(5.0, 9.0) and times.span(["b"]) is None
    assert RunTimes(tmp_path / "none").span(["a"]) is None


def test_times_that_cannot_be_written_do_not_stop_the_study(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    times = RunTimes(tmp_path)
    times.started("a")
    times.ended("a")
    assert times.span(["a"]) is not None


def test_a_study_without_recorded_times_uses_those_of_its_files(tmp_path: Path) -> None:
    search = make_search(tmp_path, make_study(budget={"trials": 2}), Trainer(score))
    search.run()
    (tmp_path / FILE).unlink()
    path = search.run_dir(search.runs_of(search.trials[1]).cfg).path / "summary.json"
    summary = json.loads(path.read_text()) | {"seconds": 30.0}
    path.write_text(json.dumps(summary))
    os.utime(path, (2e9, 2e9))
    later = make_search(tmp_path, make_study(budget={"trials": 2}), Trainer(score))
    later.run()
    assert later.span_of(later.trials[1]) == Span(2e9 - 30, 2e9)
    assert later.span_of(later.trials[0]) == Span(later.started_at, later.started_at)


# -- a study


def test_a_study_knows_its_best_trial_and_its_claim(search: Search) -> None:
    study = mainrun.study("tiny", search.folder.parent)
    assert study == mainrun.study(search.folder) and study.finished and study.claim == EVIDENCE["claim"]
    best = study.best
    assert best.number == 2 and best.confirmed and best.value == search.trials[2].scores[1]
    assert best.params == search.trials[2].values and best.run.id == search.trials[2].run_id
    assert best.run.config.lr == search.trials[2].values["lr"]
    (row,) = study.evidence.to_dict("records")
    assert row["difference"] == -0.5 and row["claim"] is True
    assert (
        len(study.runs) == len({trial.run_id for trial in search.trials})
        and study.definition["name"] == "tiny"
    )
    assert (
        isinstance(study.optuna(), optuna.Study) and study.optuna().best_value == search.best()[0].scores[1]
    )
    page = study._repr_html_()
    assert "finished" in page and "trial 2: " in page and "diverged" in page and "<svg" in page


def test_an_unfinished_study_shows_what_it_has(tmp_path: Path) -> None:
    search = searched(tmp_path / "tiny")
    study = mainrun.study(tmp_path / "tiny")
    assert not study.finished and "not finished" in study.claim and "not finished" in repr(study)
    table = study.trials
    assert len(table) == 12 and {"params_lr", "duration", "outcome", "run"} <= set(table.columns)
    assert table["trained"].sum() == sum(search.cost_of(trial).trained for trial in search.trials)
    best = study.best
    assert best.number == search.best()[0].number and not best.confirmed
    assert best.params == search.trials[best.number].values
    assert len(study.evidence) == 0 and "not finished" in study._repr_html_()
    with pytest.raises(mainrun.RunError, match="is not finished"):
        _ = study.export


def test_a_study_without_trials_says_so(tmp_path: Path) -> None:
    write_study_json(tmp_path, make_study(), "mainrun sweep tiny")
    study = mainrun.study(tmp_path)
    with pytest.raises(mainrun.RunError, match=r"no study.db yet"):
        _ = study.best
    assert "no study.db yet" in study._repr_html_()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: mainrun.study("nothing"), mainrun.UsageError, "no study 'nothing'"),
        (lambda: mainrun.sweep("nothing"), mainrun.ConfigError, "unknown study 'nothing'"),
        (lambda: mainrun.sweep("lr", lrr=1), mainrun.ConfigError, "unknown keyword 'lrr'.*options of sweep"),
        (lambda: mainrun.sweep("lr", budget={"trial": 3}), mainrun.ConfigError, "unknown key budget.trial"),
        (lambda: mainrun.sweep({"set": 3}), mainrun.UsageError, "got set=3"),
        (lambda: mainrun.sweep({"space": {}}, workers=-1), mainrun.ConfigError, "in the dict cannot be"),
        (lambda: mainrun.report(title="\n"), mainrun.UsageError, "cannot be printed"),
        (lambda: mainrun.report(out=__file__), mainrun.UsageError, "would be overwritten"),
    ],
)
def test_a_wrong_call_raises_the_error_of_the_command_line(call: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def sweep(study: Any, out: Path, monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> mainrun.Study:
    """Run a study from Python with an engine that does not train."""
    from sweeps import cli, confirm

    monkeypatch.setattr(cli, "_create_engine", lambda study: Trainer(score))
    monkeypatch.setattr(confirm, "confirm", lambda search: EVIDENCE)
    monkeypatch.setattr("sweeps.driver.count_train_tokens", lambda *_: TRAIN_TOKENS)
    return mainrun.sweep(study, out=out, quiet=True, **keywords)


def test_a_dict_is_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = {
        "name": "mine",
        "preset": "baseline",
        "space": {"lr": {"low": np.float64(1e-3), "high": 0.1, "log": True}},
        "sampler": {"name": "random", "generation": 3},
    }
    study = sweep(definition, tmp_path, monkeypatch, budget={"trials": 4}, **FIELDS)
    assert study.path == tmp_path / "mine" and len(study.trials) == 4 and study.claim == EVIDENCE["claim"]
    assert study.best.run.config.n_layer == 1
    document = json.loads((study.path / "study.json").read_text())
    assert document["command"] == "mainrun.sweep({...}, ...) in Python" and "set" not in definition
    assert sweep(definition, tmp_path, monkeypatch, budget={"trials": 4}, **FIELDS) == study


def test_a_study_file_records_the_command_that_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "baseline"\nbudget = {trials = 3}\n[space.lr]\nlow = 0.001\nhigh = 0.1\n')
    study = sweep(file, tmp_path, monkeypatch, name="other", workers=2, **FIELDS)
    command = json.loads((study.path / "study.json").read_text())["command"]
    assert command.startswith(f"mainrun sweep run {file} --set ") and "dev_frac=0.1" in command
    assert command.endswith(f"--out {tmp_path} --as other --workers 2") and study.name == "other"


def test_an_interrupted_study_says_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(cfg: TrainConfig, step: int) -> float:
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return 1.0

    sent: list[bool] = []
    definition = {"name": "a", "preset": "baseline", "space": {"lr": {"values": [0.1, 0.2]}}}
    monkeypatch.setitem(globals(), "score", interrupt)
    with pytest.raises(mainrun.Interrupted, match=r"nothing is lost; run `mainrun.sweep\(\{...\}, ...\)"):
        sweep(definition, tmp_path, monkeypatch, **FIELDS)
    assert not mainrun.study("a", tmp_path).finished


# -- the real thing


@pytest.mark.slow
def test_a_study_and_its_report(tmp_path: Path) -> None:
    definition = {
        "name": "real",
        "preset": "baseline",
        "space": {"lr": {"low": 1e-3, "high": 0.1, "log": True}},
        "budget": {"trials": 3},
        "sampler": {"name": "random", "generation": 3},
        "evidence": {"seeds": 2, "best": 1},
    }
    fields = {name: value for name, value in TINY.items() if name != "threads"} | {"compile": "off"}
    begun = datetime.now()
    study = mainrun.sweep(definition, out=tmp_path, dev_frac=0.1, workers=1, quiet=True, **fields)
    trials = study.trials
    assert (trials["datetime_start"] >= begun).all() and (trials["duration"].dt.total_seconds() > 0).all()
    assert study.claim and study.best.run.summary["guards"]
    report = mainrun.report(study, study.best.run, out=tmp_path / "report.pdf", samples=0)
    assert report.path.read_bytes().startswith(b"%PDF") and report.claim in report._repr_html_()
