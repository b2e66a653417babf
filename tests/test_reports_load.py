"""Tests how a report finds its runs and studies, rejects mixed data, and groups runs by recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from evidence import (
    STEPS,
    TRAIN_TOKENS,
    edit,
    edit_rows,
    failing,
    make_data,
    make_recipe,
    make_rows,
    make_run,
    make_study,
    make_trial,
    write_run,
)

from mainrun import stats
from mainrun.config import TrainConfig, from_dict
from mainrun.errors import RunError, UsageError
from mainrun.plan.recipes import load as load_preset
from mainrun.ui.grouping import recipe_fields
from reports.evidence import front_page, load, tables
from reports.evidence.load import Recipe, ReportData, Run, base_indices

OPS = [
    {"name": "set_dropout", "value": 0.0, "trigger": {"step": 1}},
    {"name": "set_dropout", "value": 0.2, "trigger": {"step": 3}},
]
GROWTH = {"dropout": 0.1, "growth": {"version": 2, "ops": OPS}}


def started(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "event": "op_START",
        "op": "x",
        "name": "set_dropout",
        "step": step,
        "params": 1000,
        "flops_per_token": 6e3,
    } | changes


def ended(step: int, how: str = "SUCCESS", **changes: Any) -> dict[str, Any]:
    return {
        "event": f"op_{how}",
        "op": "x",
        "name": "set_dropout",
        "step": step,
        "tokens": 128 * step,
        "value": 0.0,
    } | changes


def write_study(folder: Path, trials: list[dict[str, Any]] | None = None, **facts: Any) -> Path:
    folder.mkdir(parents=True)
    rows = [make_trial(0), make_trial(1, 2.0)] if trials is None else trials
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "trials.parquet")
    (folder / "study.json").write_text(json.dumps(facts))
    return folder


def refusal(*places: object, out: Path = Path("none")) -> str:
    with pytest.raises(RunError) as caught:
        load.gather([str(place) for place in places], out)
    return str(caught.value)


# -- finding runs and studies


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return a folder with a baseline run, a hidden run, and a study that contains a run."""
    out = tmp_path / "runs"
    write_run(out, make_run())
    write_run(out / ".hidden", make_run("optimized"))
    write_study(out / "deep" / "er" / "lr")
    write_run(out / "deep" / "er" / "lr", make_run("grown"))
    return out


def test_a_folder_is_searched_for_runs_and_studies(out: Path) -> None:
    run = make_run().id
    for places in (
        [],
        [str(out)],
        [str(out), str(out)],
        [str(out / run), str(out / "deep")],
        [run, "deep"],
        [run[:10], "deep/er/lr"],
    ):
        e = load.gather(places, out)
        assert [r.path for r in e.runs] == [out / run], places
        assert [s.path for s in e.studies] == [out / "deep" / "er" / "lr"]
    assert load.gather([str(out / ".hidden")], out).runs[0].cfg.preset == "optimized"


def test_a_path_takes_precedence_over_a_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "mine", make_run())
    write_run(tmp_path / "runs" / "mine", make_run("optimized"))
    monkeypatch.chdir(tmp_path)
    assert [run.cfg.preset for run in load.gather(["mine"], Path("runs")).runs] == ["baseline"]


def test_folders_inside_a_run_are_not_searched(out: Path) -> None:
    run = make_run()
    write_run(out / run.id / "checkpoints", make_run("optimized"))
    write_run(out / "z", make_run("grown"))
    assert [r.cfg.preset for r in load.gather([], out).runs] == ["baseline", "grown"]


def test_folders_are_searched_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in "cab":
        write_study(tmp_path / name)
    assert [s.name for s in load.gather([], tmp_path).studies] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["study.json", "trials.parquet"])
def test_a_file_of_an_export_is_missing(tmp_path: Path, name: str) -> None:
    study = write_study(tmp_path / "lr")
    (study / name).unlink()
    assert f"the study {study} lacks {name}" in refusal(tmp_path)


def test_the_export_in_the_folder_of_a_study_is_read(tmp_path: Path) -> None:
    export = write_study(tmp_path / "lr" / "export", name="mine")
    (tmp_path / "lr" / "study.json").write_text("{}")
    (study,) = load.gather([str(tmp_path / "lr"), str(export)], tmp_path).studies
    assert study.path == export and study.name == "mine"


def test_places_without_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty", "nothing", out=tmp_path)
    assert message.startswith("2 problems prevent the report:\n")
    assert (
        f"{tmp_path / 'empty'} contains no run and no exported study" in message
        and "no run 'nothing'" in message
    )
    one = refusal("nothing", out=tmp_path)
    assert "problems" not in one and one.startswith("no run 'nothing'")


def test_the_content_of_a_run_is_read(tmp_path: Path) -> None:
    run = make_run(journal=[started(1), ended(1), ended(3)], fields=GROWTH)
    folder = write_run(tmp_path, run)
    (read,) = load.gather([], tmp_path).runs
    assert read.path == folder and read.cfg == run.cfg and read.summary == run.summary
    assert (read.rows, read.journal, read.plan) == (run.rows, run.journal, {"train_tokens": TRAIN_TOKENS})
    assert read.env["command"] == run.env["command"]


# -- incomplete and damaged runs


@pytest.mark.parametrize("name", ["env.json", "metrics.jsonl", "tokenizer.json"])
def test_a_file_of_a_run_is_missing(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path, make_run())
    (folder / name).unlink()
    assert name in refusal(tmp_path)


def test_all_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path, make_run())
    for name in ("env.json", "tokenizer.json"):
        (folder / name).unlink()
    assert f"{folder} lacks env.json, tokenizer.json" in refusal(tmp_path)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, make_run(), status="interrupted")
    (folder / "summary.json").unlink()
    assert f"run {folder.name} is not finished (interrupted)" in refusal(tmp_path)


def in_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, change)


def in_rows(name: str, change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_rows(folder / name, change)


HARMS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no flops": (in_json("summary.json", lambda s: s.pop("flops")), "summary.json", "flops"),
    "no presentations": (
        in_json("summary.json", lambda s: s["presentations"].pop("train_tokens_per_epoch")),
        "summary.json",
        "train_tokens_per_epoch",
    ),
    "a step without tokens": (
        in_rows("metrics.jsonl", lambda rows: rows[1].pop("tokens")),
        "metrics.jsonl",
        "tokens",
    ),
    "a step without loss": (
        in_rows("metrics.jsonl", lambda rows: rows[1].pop("loss")),
        "metrics.jsonl",
        "loss",
    ),
    "no step": (
        in_rows("metrics.jsonl", lambda rows: rows.__delitem__(slice(0, STEPS))),
        "metrics.jsonl",
        "row of a step",
    ),
    "an op without tokens": (
        in_rows("growth.jsonl", lambda rows: rows[1].pop("tokens")),
        "growth.jsonl",
        "tokens",
    ),
    "an op without value": (
        in_rows("growth.jsonl", lambda rows: rows[1].pop("value")),
        "growth.jsonl",
        "value",
    ),
    "an op without step": (in_rows("growth.jsonl", lambda rows: rows[1].pop("step")), "growth.jsonl", "step"),
    "a start without params": (
        in_rows("growth.jsonl", lambda rows: rows[0].pop("params")),
        "growth.jsonl",
        "params",
    ),
    "a start without flops": (
        in_rows("growth.jsonl", lambda rows: rows[0].pop("flops_per_token")),
        "growth.jsonl",
        "flops_per_token",
    ),
    "no start": (in_rows("growth.jsonl", lambda rows: rows.pop(0)), "growth.jsonl", "began"),
    "too many ops": (
        in_rows("growth.jsonl", lambda rows: rows.extend(rows[1:] * 2)),
        "growth.jsonl",
        "contradict each other",
    ),
    "no number of tokens": (
        in_json("config.json", lambda config: config["plan"].clear()),
        "config.json",
        "train_tokens",
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_damaged_run_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_run(
        tmp_path, make_run(fields=GROWTH, journal=[started(1), ended(1, params=1000), ended(3)])
    )
    load.gather([], tmp_path)
    harm, file, message = HARMS[name]
    harm(folder)
    refused = refusal(tmp_path)
    assert file in refused and message in refused and str(folder) in refused


def test_a_run_without_a_score_of_val_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, make_run())
    edit_rows(folder / "metrics.jsonl", lambda rows: rows[-1].update(split="dev"))
    edit(
        folder / "summary.json",
        lambda summary: [summary[name].update(split="dev") for name in ("last", "best")],
    )
    assert "metrics.jsonl" in refusal(tmp_path)


# -- incomplete and damaged studies


@pytest.mark.parametrize("data", [b"[]", b"3", b"{", b"\xff", b'{"name": 3}'])
def test_an_unreadable_study_is_refused(tmp_path: Path, data: bytes) -> None:
    study = write_study(tmp_path / "lr")
    (study / "study.json").write_bytes(data)
    message = refusal(tmp_path)
    assert "lr/study.json" in message and "mainrun sweep export" in message


def test_unreadable_trials_are_refused(tmp_path: Path) -> None:
    study = write_study(tmp_path / "lr")
    (study / "trials.parquet").write_bytes(b"no parquet")
    message = refusal(tmp_path)
    assert (
        f"the study {study} cannot be read" in message
        and "mainrun sweep export" in message
        and len(message) < 600
    )


@pytest.mark.parametrize("error", [OSError, ValueError, pyarrow.ArrowException])
def test_errors_of_the_parquet_reader_are_reported(
    tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error("so\nand so")

    write_study(tmp_path / "lr")
    monkeypatch.setattr(pyarrow.parquet, "read_table", fail)
    assert "cannot be read (trials.parquet: so and so)" in refusal(tmp_path)


@pytest.mark.parametrize("error", [RunError, KeyError, AssertionError])
def test_a_plan_that_contradicts_the_journal_is_refused(
    tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error("so")

    folder = write_run(tmp_path, make_run())
    monkeypatch.setattr(load, "Plan", fail)
    message = refusal(tmp_path)
    assert (
        f"the config.json and the growth.jsonl of {folder} contradict each other" in message
        and "so" in message
    )


@pytest.mark.parametrize("name", ["trial", "state", "value"])
def test_trials_without_a_required_column_are_refused(tmp_path: Path, name: str) -> None:
    write_study(tmp_path / "lr", [{k: v for k, v in make_trial(0).items() if k != name}])
    assert "is not in the format of `mainrun sweep export`" in refusal(tmp_path)


def test_a_study_without_trials_is_read(tmp_path: Path) -> None:
    study = write_study(tmp_path / "lr", [{"other": 1}])
    pyarrow.parquet.write_table(
        pyarrow.table({"other": pyarrow.array([], pyarrow.int64())}), study / "trials.parquet"
    )
    (read,) = load.gather([], tmp_path).studies
    assert read.trials == [] and read.searched_fields == [] and read.completed == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trial", -1),
        ("trial", "x"),
        ("state", 3),
        ("value", "x"),
        ("value", float("nan")),
        ("reason", 3),
        ("rung", "x"),
        ("scores", "x"),
        ("scores", '{"a": 1}'),
        ("asked", -1.0),
        ("trained", "x"),
        ("reused", -1),
        ("wasted", -1),
        ("branch", -1),
        ("steps", "x"),
        ("params.lr", [1]),
        ("params.lr", float("nan")),
    ],
)
def test_a_damaged_trial_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    write_study(tmp_path / "lr", [make_trial(0) | {name: value}])
    message = refusal(tmp_path)
    assert "trials.parquet is damaged" in message and name in message


def test_optional_columns_of_a_trial_can_be_empty(tmp_path: Path) -> None:
    unknown = dict.fromkeys(
        ("reason", "rung", "scores", "asked", "trained", "reused", "wasted", "branch", "steps", "params.lr")
    )
    filled = {
        "reason": "",
        "rung": float("inf"),
        "scores": '{"0": 1.5}',
        "asked": 10,
        "trained": 0.5,
        "reused": 0,
        "wasted": 0,
        "branch": 1,
    }
    trials = [
        make_trial(0, None) | unknown,
        make_trial(1, 2.0) | unknown | filled | {"steps": 3, "params.lr": 0.5},
    ]
    write_study(tmp_path / "lr", trials)
    assert [t["value"] for t in load.gather([], tmp_path).studies[0].trials] == [None, 2.0]


@pytest.mark.parametrize("part", ["", "study", "evidence"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 3),
        ("rows", [3]),
        ("rows", [{"trial": "x"}]),
        ("rows", [{"mean": "x"}]),
        ("rows", [{"difference": "x"}]),
        ("rows", [{"interval": 3}]),
        ("rows", [{"interval": [1]}]),
        ("rows", [{"interval": ["x", 1]}]),
        ("rows", [{"p_holm": "x"}]),
        ("rows", [{"why": 3}]),
        ("rung_correlation", 3),
        ("rung_correlation", {"0": "x"}),
        ("space", 3),
        ("space", {"lr": 3}),
        ("space", {"lr": {"values": 3}}),
        ("space", {"lr": {"when": 3}}),
        ("importance", 3),
        ("importance", {"lr": "x"}),
    ],
)
def test_a_damaged_fact_of_a_study_is_refused(tmp_path: Path, part: str, name: str, value: Any) -> None:
    write_study(tmp_path / "lr", **({part: {name: value}} if part else {name: value}))
    message = refusal(tmp_path)
    assert "study.json is damaged" in message and name in message


@pytest.mark.parametrize(
    ("name", "value"), [("ledger", 3), ("ledger", {"asked": -1}), ("study", 3), ("evidence", 3)]
)
def test_a_damaged_table_of_a_study_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    write_study(tmp_path / "lr", **{name: value})
    message = refusal(tmp_path)
    assert "study.json is damaged" in message and name in message


def test_optional_facts_of_a_study_can_be_missing(tmp_path: Path) -> None:
    unknown = dict.fromkeys(
        ("rows", "rung_correlation", "space", "importance", "study", "evidence", "ledger")
    )
    row = dict.fromkeys(("trial", "mean", "difference", "interval", "p_holm"))
    inner = {
        "rows": [row, {}],
        "rung_correlation": {"0": None},
        "space": {"a": None, "b": {"values": None, "when": None}},
    }
    write_study(tmp_path / "a", **unknown)
    write_study(tmp_path / "b", **inner, importance={"lr": None}, ledger={"asked": None})
    write_study(tmp_path / "c")
    assert [s.name for s in load.gather([], tmp_path).studies] == ["a", "b", "c"]


# -- data that must not be mixed


@pytest.mark.parametrize("what", ["val", "corpus"])
def test_runs_with_different_titles_are_refused(tmp_path: Path, what: str) -> None:
    run, other = make_run(), make_run(seed=2)
    other.summary["fingerprints"] = other.summary["fingerprints"] | {what: "f" * 64}
    for one in (run, other):
        write_run(tmp_path, one)
    message = refusal(tmp_path)
    first = run.summary["fingerprints"][what][:12]
    assert (
        f"the inputs differ in their {what} fingerprint: " in message
        and f"{first}: {run.id}" in message
        and f"{'f' * 12}: {other.id}" in message
    )
    assert "same titles" in message


@pytest.mark.parametrize("what", ["train", "dev"])
def test_runs_with_different_train_splits_are_accepted(tmp_path: Path, what: str) -> None:
    other = make_run(seed=2)
    other.summary["fingerprints"] = other.summary["fingerprints"] | {what: "f" * 64}
    for one in (make_run(), other):
        write_run(tmp_path, one)
    assert len(load.gather([], tmp_path).runs) == 2


def test_runs_with_different_geometries_are_refused(tmp_path: Path) -> None:
    run, other = make_run(), make_run(seed=2, geometry=[4, 16])
    for one in (run, other):
        write_run(tmp_path, one)
    message = refusal(tmp_path)
    assert (
        "the inputs differ in their evaluation geometry: " in message
        and f"8x16: {run.id}" in message
        and f"4x16: {other.id}" in message
    )
    assert "official_geometry=ROWSxTOKENS" in message


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"fingerprints": {"val": "f" * 64}}, "the inputs differ in their val fingerprint: "),
        ({"fingerprints": {"corpus": "f" * 64}}, "the inputs differ in their corpus fingerprint: "),
        ({"geometry": [4, 16]}, "the inputs differ in their evaluation geometry: "),
        ({"fingerprints": {"val": "b" * 64}, "geometry": [8, 16]}, ""),
        ({"fingerprints": {"val": None}}, ""),
        ({}, ""),
    ],
)
def test_a_study_with_different_titles_is_refused(
    tmp_path: Path, facts: dict[str, Any], message: str
) -> None:
    write_run(tmp_path, make_run())
    write_study(tmp_path / "lr", **facts)
    if not message:
        assert len(load.gather([], tmp_path).studies) == 1
        return
    refused = refusal(tmp_path)
    assert message in refused and "study lr" in refused and make_run().id in refused


def test_at_most_four_runs_are_named(tmp_path: Path) -> None:
    runs = [make_run(seed=seed) for seed in range(6)]
    for run in runs:
        write_run(tmp_path, run)
    write_run(tmp_path, make_run(seed=9, geometry=[1, 1]))
    assert "and 2 more" in refusal(tmp_path)
    names = list("abcdef")
    assert (
        load.shorten(names) == "a, b, c, d and 2 more"
        and load.shorten(names[:4]) == "a, b, c, d"
        and load.shorten([]) == ""
    )
    assert load.shorten(names, 5) == "a, b, c, d, e and 1 more"


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    for run in (make_run(), make_run(seed=2, geometry=[1, 2]), make_run(seed=3)):
        write_run(tmp_path, run)
    (tmp_path / make_run(seed=3).id / "env.json").unlink()
    study = write_study(tmp_path / "lr")
    (study / "study.json").unlink()
    message = refusal(tmp_path).splitlines()
    assert message[0] == "3 problems prevent the report:" and len(message) == 4


def test_a_seed_counts_once(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path, make_run(seed=seed))
    for seed in (3, 1):
        write_run(tmp_path, make_run(seed=seed, fields={"log_every": 2}, weights="f" * 64))
    message = refusal(tmp_path).splitlines()
    assert message[0] == "2 problems prevent the report:" and "seed 3 of baseline" in message[2]
    first = message[1]
    assert first.startswith("seed 1 of baseline has two runs with different results, ")
    for run in (make_run(), make_run(fields={"log_every": 2})):
        assert str(tmp_path / run.id) in first


def test_a_run_that_repeats_another_one_is_left_out(tmp_path: Path) -> None:
    once = make_run()
    again = make_run(fields={"grad_norm_steps": 5, "token_scores": True})
    for run in (once, again, make_run(seed=2)):
        write_run(tmp_path, run)
    shutil.copytree(tmp_path / make_run(seed=2).id, tmp_path / "copy")
    data = load.gather([], tmp_path)
    (recipe,) = data.recipes
    assert [run.id for run in recipe.runs] == [again.id, make_run(seed=2).id]
    left_out = f"{tmp_path / once.id} repeats {tmp_path / again.id} with the same result, and is left out."
    assert left_out in data.repeats and len(data.repeats) == 2
    assert left_out in tables.runs(data).note


@pytest.mark.parametrize(
    "changes",
    [{"full": 2.1}, {"weights": "f" * 64}, {"guards": failing()}],
    ids=["score", "weights", "guards"],
)
def test_a_repetition_with_another_result_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_run(tmp_path, make_run())
    write_run(tmp_path, make_run(fields={"token_scores": True}, **changes))
    assert "seed 1 of baseline has two runs with different results" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("fuller", "poorer"),
    [
        ({"fields": {"grad_norm_steps": 1}}, {"fields": {"token_scores": True}}),
        ({"fields": {"log_every": 2}, "ledger": {"reused": 0}}, {"ledger": {"reused": 4}}),
        ({"fields": {"token_scores": True}}, {}),
    ],
    ids=["gradient norms", "own time", "token scores"],
)
def test_the_run_with_the_most_data_is_kept(fuller: dict[str, Any], poorer: dict[str, Any]) -> None:
    runs = [make_run(**fuller), make_run(**poorer)]
    for order in (runs, runs[::-1]):
        (recipe,) = load._group_into_recipes(order)
        assert load._without_repeats(recipe).runs == (runs[0],)


# -- recipes


def named(*runs: Run) -> list[tuple[str, list[int]]]:
    return [(recipe.name, [run.cfg.seed for run in recipe.runs]) for recipe in load._group_into_recipes(runs)]


def test_runs_that_differ_only_by_seed_form_a_recipe() -> None:
    runs = (
        make_run(seed=3),
        make_run("optimized"),
        make_run(seed=1),
        make_run(seed=2, fields={"log_every": 7}),
    )
    assert named(*runs) == [("baseline", [1, 2, 3]), ("optimized", [1])]


def test_recipes_are_ordered_by_preset_before_seed() -> None:
    runs = make_run("optimized", 1), make_run("baseline", 3), make_run("baseline", 2)
    assert named(*runs) == [("baseline", [2, 3]), ("optimized", [1])]


def test_the_order_of_recipes_does_not_depend_on_the_order_of_runs() -> None:
    runs = [make_run(fields={"lr": lr}) for lr in (0.1, 0.2, 0.3)]
    assert named(*runs) == named(*reversed(runs)) == named(*sorted(runs, key=lambda run: run.id))


def test_a_recipe_name_lists_only_differences_within_its_preset() -> None:
    assert named(make_run(), make_run("optimized", fields={"lr": 0.5})) == [
        ("baseline", [1]),
        ("optimized", [1]),
    ]
    assert named(make_run("grown", fields=GROWTH)) == [("grown", [1])]
    names = sorted(
        name
        for name, _ in named(make_run("grown", fields=GROWTH), make_run("grown", fields=GROWTH | {"lr": 0.5}))
    )
    assert names == ["grown lr=0.006", "grown lr=0.5"]


@pytest.mark.parametrize(
    ("fields", "others", "names"),
    [
        ({"lr": 0.0123456789}, {}, ["baseline lr=0.006", "baseline lr=0.0123457"]),
        (
            {"optimizer": "adamw", "n_layer": 3},
            {},
            ["baseline n_layer=2 optimizer=sgd", "baseline n_layer=3 optimizer=adamw"],
        ),
        (
            {"qk_norm": True, "weight_decay_aux": 0.5},
            {},
            [
                "baseline qk_norm=false weight_decay_aux=none",
                "baseline qk_norm=true weight_decay_aux=0.5",
            ],
        ),
        (GROWTH, {"dropout": 0.1}, ["baseline", "baseline with growth"]),
        (GROWTH, {}, ["baseline dropout=0", "baseline dropout=0.1 with growth"]),
    ],
)
def test_recipe_names_list_the_fields_that_differ(
    fields: dict[str, Any], others: dict[str, Any], names: list[str]
) -> None:
    assert sorted(name for name, _ in named(make_run(fields=fields), make_run(fields=others))) == names


def test_the_fields_that_define_a_recipe() -> None:
    names = recipe_fields(make_run().cfg)
    left_out = {name for name in TrainConfig.model_fields if name not in names}
    assert left_out == {
        "seed",
        *(name for name in TrainConfig.model_fields if TrainConfig.class_of(name) == "inert"),
    }
    assert names["lr"] == 0.006


def test_a_run_that_failed_a_guard_has_no_score() -> None:
    recipe = make_recipe("baseline", {1: 2.0, 2: 3.0})
    recipe.runs[0].summary["guards"] = failing()
    assert (
        recipe.scores == {2: 3.0}
        and recipe.valid_runs == recipe.runs[1:]
        and recipe.cfg == recipe.runs[0].cfg
    )
    assert recipe.runs[0].failed_guards == ["causality"] and recipe.runs[1].failed_guards == []


# -- the headline


def headline(*recipes: Recipe) -> tuple[str | None, str | None, str]:
    base, other, chosen = load._select_pair(recipes)
    return base and base.name, other and other.name, chosen


def test_the_selection_of_the_two_main_recipes() -> None:
    base, base1 = make_recipe("baseline", {1: 2.0}), make_recipe("ablation:baseline", {1: 2.0})
    opt, opt1 = make_recipe("optimized", {1: 1.9}), make_recipe("demo:optimized", {1: 1.8, 2: 1.8})
    low, lower, bad = (
        make_recipe("grown", {1: 1.5}),
        make_recipe("staged", {1: 1.0, 2: 1.2}),
        make_recipe("x", {1: 0.1}, guards=failing()),
    )
    other, several = make_recipe("sdt", {1: 1.6}), "the only other recipe with several seeds"
    only, named_so = "the only other recipe", "the recipe is called optimized"
    assert headline() == (None, None, "no run was given")
    assert headline(base) == ("baseline", None, only)
    assert headline(low, base) == ("baseline", "grown", only)
    assert headline(low, lower) == ("grown", "staged", only)
    assert headline(low, other, base) == ("baseline", "grown", "the lowest mean full score of 2 recipes")
    assert headline(low, lower, base) == ("baseline", "staged", several)
    assert headline(bad, lower, base) == ("baseline", "staged", only)
    assert headline(bad, base) == ("baseline", "x", only)
    assert headline(low, opt, base) == ("baseline", "optimized", named_so)
    assert headline(opt, opt1, base) == ("baseline", "demo:optimized", f"{named_so} and has the most seeds")
    assert headline(base1, base, opt) == ("baseline", "optimized", named_so)
    assert headline(opt) == ("optimized", None, only)
    record = make_recipe("record", {1: 2.1})
    assert headline(opt, record) == ("record", "optimized", named_so)
    assert headline(record, low, lower) == ("record", "staged", several)
    assert headline(bad, opt, low) == ("x", "optimized", named_so)


def test_the_user_chooses_the_two_main_recipes() -> None:
    recipes = [make_recipe(name, {1: 2.0, 2: 2.1}) for name in ("baseline", "optimized", "record", "a,b")]
    data = load.choose_pair(make_data(*recipes), "record,a,b")
    assert data.baseline is not None and data.optimised is not None
    assert (data.baseline.name, data.optimised.name) == ("record", "a,b")
    assert data.selection == "the user chose the recipes of page 1 among 4"
    assert front_page.sentence(data).endswith("The author chose these two of 4 recipes.")
    assert "chose" not in front_page.sentence(load.choose_pair(make_data(*recipes[:2]), "baseline,optimized"))
    for text, expected in (
        ("recrod,baseline", "give BASE,OTHER with two recipes of the given runs: record; "),
        ("record,record", "compares a recipe with itself"),
        ("record,baseline,0.1", "give BASE,OTHER and nothing else"),
    ):
        with pytest.raises(UsageError, match=expected) as error:
            load.choose_pair(make_data(*recipes), text)
        assert "got --compare" in str(error.value)


def test_the_baseline_with_most_seeds_is_selected() -> None:
    few, many = make_recipe("baseline", {1: 2.0}), make_recipe("ablation:baseline", {1: 2.0, 2: 2.0})
    assert headline(few, many, make_recipe("optimized", {1: 1.0}))[0] == "ablation:baseline"
    twins = [
        Recipe(name, make_recipe("baseline", {1: 2.0}).runs) for name in ("baseline lr=2", "baseline lr=1")
    ]
    assert headline(*twins, make_recipe("optimized", {1: 1.0}))[0] == "baseline lr=1"


# -- noise and ladder


def test_the_noise_is_measured_between_seeds_of_a_recipe() -> None:
    a = make_recipe("baseline", {1: 2.0, 2: 2.2})
    b = make_recipe("optimized", {1: 1.0, 2: 1.1, 3: 1.2}, {"lr": 0.02})
    assert make_data(a, b).noise == stats.noise([[2.0, 2.2], [1.0, 1.1, 1.2]])
    assert make_data(a).noise == stats.noise([[2.0, 2.2]])
    assert make_data(make_recipe("baseline", {1: 2.0})).noise is None and make_data().noise is None
    same = make_recipe("same", {1: 2.0, 2: 2.2})
    assert make_data(a, same).noise == stats.noise([[2.0, 2.2]])
    more = make_recipe("same", {3: 2.4})
    assert make_data(a, more).noise == stats.noise([[2.0, 2.2, 2.4]])


def steps(*names: str, **changes: Any) -> list[Recipe]:
    return [
        make_recipe(f"ablation:{name}", {1: 2.0, 2: 2.1}, {"lr": 0.001 * n}, **changes)
        for n, name in enumerate(names, 1)
    ]


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (("adamw", "baseline", "size"), ["baseline", "size", "adamw"]),
        (("adamw", "baseline"), []),
        (("adamw", "baseline", "nothing"), []),
        (("baseline", "size", "bfloat16", "adamw"), ["baseline", "size", "bfloat16", "adamw"]),
    ],
)
def test_a_ladder_is_in_the_order_of_its_preset(given: tuple[str, ...], ordered: list[str]) -> None:
    e = make_data(make_recipe("baseline", {1: 2.0}), *steps(*given))
    assert [recipe.cfg.preset.removeprefix("ablation:") for recipe in e.ladder] == ordered


def test_a_step_changes_the_step_before_it_unless_that_step_was_not_kept() -> None:
    ladder = []
    for cfg in load_preset("ablation"):
        fields = cfg.model_dump(exclude={"preset", "seed", "growth"})
        ladder.append(make_recipe(cfg.preset, {1: 2.0, 2: 2.1}, fields))
    assert base_indices(ladder) == [0, 0, *range(2, len(ladder) - 1)]
    without = [*ladder[:1], *ladder[2:]]
    assert base_indices(without) == list(range(len(without) - 1))
    assert base_indices(steps("baseline", "size", "adamw")) == [0, 1]


def test_a_step_without_valid_runs_is_not_in_the_ladder() -> None:
    good, bad = steps("baseline", "size", "adamw"), steps("bfloat16", guards=failing())
    assert len(make_data(*good, *bad).ladder) == 3
    assert make_data(*good[:2], *bad).ladder == []


def test_other_presets_are_not_a_ladder() -> None:
    pair = [
        make_recipe(f"demo:{name}", {1: 2.0}, {"lr": lr})
        for name, lr in (("baseline", 0.1), ("optimized", 0.2), ("other", 0.3))
    ]
    assert make_data(*pair).ladder == []


@pytest.mark.parametrize(
    ("seeds", "kept"),
    [
        (((1, 2, 3), (1, 2), (2, 1)), [[1, 2], [1, 2], [1, 2]]),
        (((1, 2, 3), (3, 2, 9), (4, 3, 2)), [[2, 3], [2, 3], [2, 3]]),
        (((1, 2), (2, 3)), [[1, 2], [2, 3]]),
        (((1,), (1,)), [[1], [1]]),
        (((1,), (2,)), [[1], [2]]),
    ],
)
def test_the_scores_of_a_ladder_use_common_seeds(
    seeds: tuple[tuple[int, ...], ...], kept: list[list[int]]
) -> None:
    recipes = [
        make_recipe("baseline", {seed: seed / 10 + i for seed in mine}) for i, mine in enumerate(seeds)
    ]
    scores_of_steps = load.ladder_scores(recipes)
    assert [list(scores) for scores in scores_of_steps] == kept
    assert all(
        score == seed / 10 + i for i, scores in enumerate(scores_of_steps) for seed, score in scores.items()
    )


def test_config_differences() -> None:
    a = make_run().cfg
    b = from_dict(a.model_dump() | {"preset": "other", "lr": 0.5, "seed": 7})
    assert sorted(load.config_differences(a, b)) == [("lr", 0.006, 0.5), ("seed", 1, 7)]
    assert load.config_differences(a, a) == []


# -- a run


def test_the_rows_of_a_run() -> None:
    rows = make_rows(make_run().summary)
    run = make_run(rows=[*rows, {**rows[-1], "split": "dev"}])
    assert [row["step"] for row in run.steps] == [1, 2, 3, 4] and run.evals == rows[-1:]
    assert run.full == 2.0 and isinstance(make_run(full=2).full, float) and run.id == run.summary["run"]
    run.summary["run"] = "named-otherwise"
    assert run.id == "named-otherwise"


def test_the_ops_of_a_run_come_from_its_journal() -> None:
    journal = [
        started(1),
        ended(1),
        {"event": "op_CHECK", "name": "x", "step": 2},
        ended(3, "ERROR"),
        started(4),
    ]
    run = make_run(fields=GROWTH, journal=journal)
    assert run.ops == [journal[1], journal[3]]
    assert run.resolved.fired == (1, ~3)
    assert make_run(fields=GROWTH, journal=[started(1), ended(1), ended(3)]).resolved.fired == (1, 3)


def test_without_a_journal_the_ops_come_from_the_plan() -> None:
    run = make_run(fields=GROWTH)
    span = run.cfg.batch_size * run.cfg.block_size
    assert run.ops == [
        {"name": "set_dropout", "value": 0.0, "step": 1, "tokens": span},
        {"name": "set_dropout", "value": 0.2, "step": 3, "tokens": 3 * span},
    ]
    assert run.resolved.fired == (1, 3) and run.resolved.steps == STEPS
    assert make_run().ops == [] and make_run().resolved.fired == ()


def test_the_runs_of_the_report_data() -> None:
    e = make_data(make_recipe("baseline", {1: 2.0, 2: 2.0}), make_recipe("grown", {1: 2.0}))
    assert [run.cfg.preset for run in e.runs] == ["baseline", "baseline", "grown"]
    assert ReportData((), ()).selection == "" and ReportData((), ()).baseline is None


# -- a study


@pytest.mark.parametrize("state", ["fail", "failed", "error", "diverged", "FAIL", "TrialState.FAIL"])
def test_states_of_failed_trials(state: str) -> None:
    assert load.is_failed(make_trial(0, state=state)) and make_study(make_trial(0, state=state)).scored == []


@pytest.mark.parametrize("state", ["done", "complete", "TrialState.COMPLETE", "pruned", "running", ""])
def test_states_of_trials_that_did_not_fail(state: str) -> None:
    assert (
        not load.is_failed(make_trial(0, state=state))
        and len(make_study(make_trial(0, state=state)).scored) == 1
    )
    assert make_study(make_trial(0, None, state=state)).scored == [] and load.trial_state({}) == ""


@pytest.mark.parametrize("state", ["complete", "completed", "done", "TrialState.COMPLETE"])
def test_trials_trained_to_the_end_by_state(state: str) -> None:
    study = make_study(
        make_trial(0, 1.0, state),
        make_trial(1, 0.5, "pruned", rung=5),
        make_trial(2, None, state),
        make_trial(3, 9.0, "failed"),
    )
    assert [t["trial"] for t in study.completed] == [0] and [t["trial"] for t in study.stopped] == [1]


def test_trials_trained_to_the_end_by_rung() -> None:
    trials = [make_trial(i, 1.0, "pruned", rung=rung) for i, rung in enumerate((0, 2, None, 2, 1))]
    study = make_study(*trials, make_trial(9, None, "pruned", rung=7))
    assert [t["trial"] for t in study.completed] == [1, 3] and [t["trial"] for t in study.stopped] == [
        0,
        2,
        4,
    ]
    flat = make_study(*(make_trial(i, 1.0, "pruned") for i in range(2)))
    assert len(flat.completed) == 2 and flat.stopped == [] and make_study().completed == []


def test_the_fields_that_a_study_searched() -> None:
    trials = [
        make_trial(
            0, **{"params.lr": 0.1, "params.wd": 1, "params.only": None, "params.once": 3, "other": 1}
        ),
        make_trial(
            1, **{"params.lr": 0.2, "params.wd": 1, "params.only": None, "params.once": None, "other": 2}
        ),
    ]
    assert (
        make_study(*trials).searched_fields == ["lr"]
        and make_study().searched_fields == []
        and make_study(trials[0]).searched_fields == []
    )


@pytest.mark.parametrize("empty", [None, {}, [], ""])
def test_a_fact_is_looked_up_in_three_tables(empty: Any) -> None:
    study = make_study(a=1, b=empty, study={"b": 2, "c": empty, "a": 9}, evidence={"c": 3, "b": 9})
    assert [study.fact(name) for name in "abcd"] == [1, 2, 3, None]
    assert make_study(study=None, a=0).fact("a") == 0
    assert (
        make_study(study=None, evidence={"a": 1}).fact("a") == 1
        and make_study(evidence=None).fact("a") is None
    )


def test_the_name_of_a_study() -> None:
    assert make_study(name="mine").name == "mine" and make_study(name="").name == "lr"
