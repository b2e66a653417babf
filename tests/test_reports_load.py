"""What a report is made of: which places are runs and studies, what may not stand side by side, what makes a recipe."""

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
)  # fmt: skip

from mainrun import stats
from mainrun.config import TrainConfig, from_dict
from mainrun.errors import RunError
from reports.evidence import load
from reports.evidence.load import ReportData, Recipe, Run

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


# -- which places


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with a run of the baseline, a hidden one, and a study with a run of its own."""
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


def test_a_path_comes_before_a_name_in_the_folder_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "mine", make_run())
    write_run(tmp_path / "runs" / "mine", make_run("optimized"))
    monkeypatch.chdir(tmp_path)
    assert [run.cfg.preset for run in load.gather(["mine"], Path("runs")).runs] == ["baseline"]


def test_below_a_run_nothing_is_searched(out: Path) -> None:
    run = make_run()
    write_run(out / run.id / "checkpoints", make_run("optimized"))
    write_run(out / "z", make_run("grown"))
    assert [r.cfg.preset for r in load.gather([], out).runs] == ["baseline", "grown"]


def test_folders_are_searched_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in "cab":
        write_study(tmp_path / name)
    assert [s.name for s in load.gather([], tmp_path).studies] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["study.json", "trials.parquet"])
def test_a_half_of_an_export_is_a_study_that_lacks_the_other(tmp_path: Path, name: str) -> None:
    study = write_study(tmp_path / "lr")
    (study / name).unlink()
    assert f"the study {study} lacks {name}" in refusal(tmp_path)


def test_the_folder_of_a_study_means_its_export(tmp_path: Path) -> None:
    export = write_study(tmp_path / "lr" / "export", name="mine")
    (tmp_path / "lr" / "study.json").write_text("{}")
    (study,) = load.gather([str(tmp_path / "lr"), str(export)], tmp_path).studies
    assert study.path == export and study.name == "mine"


def test_what_is_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refusal(tmp_path / "empty", "nothing", out=tmp_path)
    assert said.startswith("2 problems prevent the report:\n")
    assert f"{tmp_path / 'empty'} holds no run and no exported study" in said and "no run 'nothing'" in said
    one = refusal("nothing", out=tmp_path)
    assert "problems" not in one and one.startswith("no run 'nothing'")


def test_what_a_run_holds(tmp_path: Path) -> None:
    run = make_run(journal=[started(1), ended(1), ended(3)], fields=GROWTH)
    folder = write_run(tmp_path, run)
    (read,) = load.gather([], tmp_path).runs
    assert read.path == folder and read.cfg == run.cfg and read.summary == run.summary
    assert (read.rows, read.journal, read.plan) == (run.rows, run.journal, {"train_tokens": TRAIN_TOKENS})
    assert read.env["command"] == run.env["command"]


# -- a run that is not whole


@pytest.mark.parametrize("name", ["env.json", "metrics.jsonl", "tokenizer.json"])
def test_a_file_of_a_run_that_is_missing(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path, make_run())
    (folder / name).unlink()
    assert name in refusal(tmp_path)


def test_all_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path, make_run())
    for name in ("env.json", "tokenizer.json"):
        (folder / name).unlink()
    assert f"{folder} lacks env.json, tokenizer.json" in refusal(tmp_path)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
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
        in_json("summary.json", lambda s: s["presentations"].pop("train_tokens_per_epoch")), "summary.json", "train_tokens_per_epoch",
    ),
    "a step without tokens": (in_rows("metrics.jsonl", lambda rows: rows[1].pop("tokens")), "metrics.jsonl", "tokens"),
    "a step without loss": (in_rows("metrics.jsonl", lambda rows: rows[1].pop("loss")), "metrics.jsonl", "loss"),
    "no step": (in_rows("metrics.jsonl", lambda rows: rows.__delitem__(slice(0, STEPS))), "metrics.jsonl", "row of a step"),
    "an op without tokens": (in_rows("growth.jsonl", lambda rows: rows[1].pop("tokens")), "growth.jsonl", "tokens"),
    "an op without value": (in_rows("growth.jsonl", lambda rows: rows[1].pop("value")), "growth.jsonl", "value"),
    "an op without step": (in_rows("growth.jsonl", lambda rows: rows[1].pop("step")), "growth.jsonl", "step"),
    "a start without params": (in_rows("growth.jsonl", lambda rows: rows[0].pop("params")), "growth.jsonl", "params"),
    "a start without flops": (in_rows("growth.jsonl", lambda rows: rows[0].pop("flops_per_token")), "growth.jsonl", "flops_per_token"),
    "no start": (in_rows("growth.jsonl", lambda rows: rows.pop(0)), "growth.jsonl", "began"),
    "too many ops": (in_rows("growth.jsonl", lambda rows: rows.extend(rows[1:] * 2)), "growth.jsonl", "cannot have trained"),
    "no number of tokens": (in_json("config.json", lambda config: config["plan"].clear()), "config.json", "train_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMS)
def test_a_run_that_is_damaged(tmp_path: Path, name: str) -> None:
    folder = write_run(
        tmp_path, make_run(fields=GROWTH, journal=[started(1), ended(1, params=1000), ended(3)])
    )
    load.gather([], tmp_path)
    harm, file, said = HARMS[name]
    harm(folder)
    refused = refusal(tmp_path)
    assert file in refused and said in refused and str(folder) in refused


def test_a_run_without_a_score_of_val_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, make_run())
    edit_rows(folder / "metrics.jsonl", lambda rows: rows[-1].update(split="dev"))
    edit(
        folder / "summary.json",
        lambda summary: [summary[name].update(split="dev") for name in ("last", "best")],
    )
    assert "metrics.jsonl" in refusal(tmp_path)


# -- a study that is not whole


@pytest.mark.parametrize("data", [b"[]", b"3", b"{", b"\xff", b'{"name": 3}'])
def test_a_study_that_cannot_be_read(tmp_path: Path, data: bytes) -> None:
    study = write_study(tmp_path / "lr")
    (study / "study.json").write_bytes(data)
    said = refusal(tmp_path)
    assert "lr/study.json" in said and "mainrun sweep export" in said


def test_trials_that_cannot_be_read(tmp_path: Path) -> None:
    study = write_study(tmp_path / "lr")
    (study / "trials.parquet").write_bytes(b"no parquet")
    said = refusal(tmp_path)
    assert f"the study {study} cannot be read" in said and "mainrun sweep export" in said and len(said) < 600


@pytest.mark.parametrize("error", [OSError, ValueError, pyarrow.ArrowException])
def test_whatever_reading_trials_raises(
    tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error("so\nand so")

    write_study(tmp_path / "lr")
    monkeypatch.setattr(pyarrow.parquet, "read_table", fail)
    assert "cannot be read (trials.parquet: so and so)" in refusal(tmp_path)


@pytest.mark.parametrize("error", [RunError, KeyError, AssertionError])
def test_a_plan_that_cannot_have_been(
    tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error("so")

    folder = write_run(tmp_path, make_run())
    monkeypatch.setattr(load, "Plan", fail)
    said = refusal(tmp_path)
    assert f"{folder} cannot have trained as" in said and "so" in said


@pytest.mark.parametrize("name", ["trial", "state", "value"])
def test_trials_without_a_column(tmp_path: Path, name: str) -> None:
    write_study(tmp_path / "lr", [{k: v for k, v in make_trial(0).items() if k != name}])
    assert "is not in the format of `mainrun sweep export`" in refusal(tmp_path)


def test_a_study_may_have_no_trials(tmp_path: Path) -> None:
    study = write_study(tmp_path / "lr", [{"other": 1}])
    pyarrow.parquet.write_table(
        pyarrow.table({"other": pyarrow.array([], pyarrow.int64())}), study / "trials.parquet"
    )
    (read,) = load.gather([], tmp_path).studies
    assert read.trials == [] and read.searched_fields == [] and read.completed == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trial", -1), ("trial", "x"), ("state", 3), ("value", "x"), ("value", float("nan")), ("reason", 3), ("rung", "x"), ("scores", "x"),
        ("scores", '{"a": 1}'), ("asked", -1.0), ("trained", "x"), ("reused", -1), ("wasted", -1), ("branch", -1), ("steps", "x"),
        ("params.lr", [1]), ("params.lr", float("nan")),
    ],
)  # fmt: skip
def test_a_trial_that_is_damaged(tmp_path: Path, name: str, value: Any) -> None:
    write_study(tmp_path / "lr", [make_trial(0) | {name: value}])
    said = refusal(tmp_path)
    assert "trials.parquet is damaged" in said and name in said


def test_a_trial_may_lack_what_it_does_not_know(tmp_path: Path) -> None:
    unknown = dict.fromkeys(
        ("reason", "rung", "scores", "asked", "trained", "reused", "wasted", "branch", "steps", "params.lr")
    )
    told = {
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
        make_trial(1, 2.0) | unknown | told | {"steps": 3, "params.lr": 0.5},
    ]
    write_study(tmp_path / "lr", trials)
    assert [t["value"] for t in load.gather([], tmp_path).studies[0].trials] == [None, 2.0]


@pytest.mark.parametrize("part", ["", "study", "evidence"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 3), ("rows", [3]), ("rows", [{"trial": "x"}]), ("rows", [{"mean": "x"}]), ("rows", [{"difference": "x"}]),
        ("rows", [{"interval": 3}]), ("rows", [{"interval": [1]}]), ("rows", [{"interval": ["x", 1]}]), ("rows", [{"p_holm": "x"}]),
        ("rows", [{"why": 3}]), ("rung_correlation", 3), ("rung_correlation", {"0": "x"}), ("space", 3), ("space", {"lr": 3}),
        ("space", {"lr": {"values": 3}}), ("space", {"lr": {"when": 3}}), ("importance", 3), ("importance", {"lr": "x"}),
    ],
)  # fmt: skip
def test_a_fact_of_a_study_that_is_damaged(tmp_path: Path, part: str, name: str, value: Any) -> None:
    write_study(tmp_path / "lr", **({part: {name: value}} if part else {name: value}))
    said = refusal(tmp_path)
    assert "study.json is damaged" in said and name in said


@pytest.mark.parametrize(
    ("name", "value"), [("ledger", 3), ("ledger", {"asked": -1}), ("study", 3), ("evidence", 3)]
)
def test_a_part_of_a_study_that_is_damaged(tmp_path: Path, name: str, value: Any) -> None:
    write_study(tmp_path / "lr", **{name: value})
    said = refusal(tmp_path)
    assert "study.json is damaged" in said and name in said


def test_a_study_may_lack_what_it_does_not_know(tmp_path: Path) -> None:
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


# -- what may not stand side by side


@pytest.mark.parametrize("what", ["val", "corpus"])
def test_other_titles_are_refused(tmp_path: Path, what: str) -> None:
    run, other = make_run(), make_run(seed=2)
    other.summary["fingerprints"] = other.summary["fingerprints"] | {what: "f" * 64}
    for one in (run, other):
        write_run(tmp_path, one)
    said = refusal(tmp_path)
    first = run.summary["fingerprints"][what][:12]
    assert (
        f"the inputs differ in their {what} fingerprint: " in said
        and f"{first}: {run.id}" in said
        and f"{'f' * 12}: {other.id}" in said
    )
    assert "same titles" in said


@pytest.mark.parametrize("what", ["train", "dev"])
def test_other_splits_of_train_may_stand_together(tmp_path: Path, what: str) -> None:
    other = make_run(seed=2)
    other.summary["fingerprints"] = other.summary["fingerprints"] | {what: "f" * 64}
    for one in (make_run(), other):
        write_run(tmp_path, one)
    assert len(load.gather([], tmp_path).runs) == 2


def test_another_geometry_is_refused(tmp_path: Path) -> None:
    run, other = make_run(), make_run(seed=2, geometry=[4, 16])
    for one in (run, other):
        write_run(tmp_path, one)
    said = refusal(tmp_path)
    assert (
        "the inputs differ in their evaluation geometry: " in said
        and f"8x16: {run.id}" in said
        and f"4x16: {other.id}" in said
    )
    assert "official_geometry=ROWSxTOKENS" in said


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"fingerprints": {"val": "f" * 64}}, "the inputs differ in their val fingerprint: "),
        ({"fingerprints": {"corpus": "f" * 64}}, "the inputs differ in their corpus fingerprint: "),
        ({"geometry": [4, 16]}, "the inputs differ in their evaluation geometry: "),
        ({"fingerprints": {"val": "b" * 64}, "geometry": [8, 16]}, ""),
        ({"fingerprints": {"val": None}}, ""),
        ({}, ""),
    ],
)
def test_a_study_of_other_titles(tmp_path: Path, facts: dict[str, Any], said: str) -> None:
    write_run(tmp_path, make_run())
    write_study(tmp_path / "lr", **facts)
    if not said:
        assert len(load.gather([], tmp_path).studies) == 1
        return
    refused = refusal(tmp_path)
    assert said in refused and "study lr" in refused and make_run().id in refused


def test_of_many_runs_four_are_named(tmp_path: Path) -> None:
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


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    for run in (make_run(), make_run(seed=2, geometry=[1, 2]), make_run(seed=3)):
        write_run(tmp_path, run)
    (tmp_path / make_run(seed=3).id / "env.json").unlink()
    study = write_study(tmp_path / "lr")
    (study / "study.json").unlink()
    said = refusal(tmp_path).splitlines()
    assert said[0] == "3 problems prevent the report:" and len(said) == 4


def test_a_seed_counts_once(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path, make_run(seed=seed))
    for seed in (3, 1):
        shutil.copytree(tmp_path / make_run(seed=seed).id, tmp_path / f"again-{seed}")
    said = refusal(tmp_path)
    assert (
        said.splitlines()[1].startswith("seed 1 of baseline was given more than once (")
        and "seed 3 of baseline" in said
    )
    first = said.splitlines()[1]
    assert "again-1" in first and "again-3" not in first
    assert (
        str(tmp_path / "again-1") in said and str(tmp_path / make_run().id) in said and "seed 2" not in said
    )


# -- recipes


def named(*runs: Run) -> list[tuple[str, list[int]]]:
    return [(recipe.name, [run.cfg.seed for run in recipe.runs]) for recipe in load._group_into_recipes(runs)]


def test_runs_that_differ_by_their_seed_are_a_recipe() -> None:
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


def test_recipes_stand_in_one_order() -> None:
    runs = [make_run(fields={"lr": lr}) for lr in (0.1, 0.2, 0.3)]
    assert named(*runs) == named(*reversed(runs)) == named(*sorted(runs, key=lambda run: run.id))


def test_a_preset_is_told_apart_from_its_own_kind_alone() -> None:
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
        (GROWTH, {"dropout": 0.1}, ["baseline", "baseline with growth"]),
        (GROWTH, {}, ["baseline dropout=0", "baseline dropout=0.1 with growth"]),
    ],
)
def test_recipes_of_one_preset_are_told_apart_by_what_differs(
    fields: dict[str, Any], others: dict[str, Any], names: list[str]
) -> None:
    assert sorted(name for name, _ in named(make_run(fields=fields), make_run(fields=others))) == names


def test_what_makes_a_recipe() -> None:
    names = load.recipe_fields(make_run().cfg)
    left_out = {name for name in TrainConfig.model_fields if name not in names}
    assert left_out == {
        "seed",
        *(name for name in TrainConfig.model_fields if TrainConfig.class_of(name) == "inert"),
    }
    assert names["lr"] == 0.006


def test_a_run_that_failed_is_no_score() -> None:
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


def test_the_two_of_the_headline() -> None:
    base, base1 = make_recipe("baseline", {1: 2.0}), make_recipe("ablation:baseline", {1: 2.0})
    opt, opt1 = make_recipe("optimized", {1: 1.9}), make_recipe("demo:optimized", {1: 1.8, 2: 1.8})
    low, lower, bad = (
        make_recipe("grown", {1: 1.5}),
        make_recipe("staged", {1: 1.0, 2: 1.2}),
        make_recipe("x", {1: 0.1}, guards=failing()),
    )
    only, named_so = "the only other recipe", "the recipe is called optimized"
    assert headline() == (None, None, "no run was given")
    assert headline(base) == ("baseline", None, only)
    assert headline(low, base) == ("baseline", "grown", only)
    assert headline(low, lower) == ("grown", "staged", only)
    assert headline(low, lower, base) == ("baseline", "staged", "the lowest mean full score of 2 recipes")
    assert headline(bad, lower, base) == ("baseline", "staged", only)
    assert headline(bad, base) == ("baseline", "x", only)
    assert headline(low, opt, base) == ("baseline", "optimized", named_so)
    assert headline(opt, opt1, base) == ("baseline", "demo:optimized", f"{named_so}, the one with most seeds")
    assert headline(base1, base, opt) == ("baseline", "optimized", named_so)
    assert headline(opt) == ("optimized", None, only)
    assert headline(bad, opt, low) == ("x", "optimized", named_so)


def test_of_baselines_the_one_with_most_seeds_counts() -> None:
    few, many = make_recipe("baseline", {1: 2.0}), make_recipe("ablation:baseline", {1: 2.0, 2: 2.0})
    assert headline(few, many, make_recipe("optimized", {1: 1.0}))[0] == "ablation:baseline"
    twins = [
        Recipe(name, make_recipe("baseline", {1: 2.0}).runs) for name in ("baseline lr=2", "baseline lr=1")
    ]
    assert headline(*twins, make_recipe("optimized", {1: 1.0}))[0] == "baseline lr=1"


# -- noise and ladder


def test_the_noise_is_between_the_seeds_of_a_recipe() -> None:
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


def test_a_step_that_failed_is_no_step() -> None:
    good, bad = steps("baseline", "size", "adamw"), steps("bfloat16", guards=failing())
    assert len(make_data(*good, *bad).ladder) == 3
    assert make_data(*good[:2], *bad).ladder == []


def test_a_pair_of_presets_is_no_ladder() -> None:
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
def test_the_scores_of_a_ladder_are_over_common_seeds(
    seeds: tuple[tuple[int, ...], ...], kept: list[list[int]]
) -> None:
    recipes = [
        make_recipe("baseline", {seed: seed / 10 + i for seed in mine}) for i, mine in enumerate(seeds)
    ]
    found = load.ladder_scores(recipes)
    assert [list(scores) for scores in found] == kept
    assert all(score == seed / 10 + i for i, scores in enumerate(found) for seed, score in scores.items())


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


def test_the_ops_of_a_run_are_those_of_its_journal() -> None:
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


def test_the_ops_of_a_run_without_a_journal_are_those_of_its_plan() -> None:
    run = make_run(fields=GROWTH)
    span = run.cfg.batch_size * run.cfg.block_size
    assert run.ops == [
        {"name": "set_dropout", "value": 0.0, "step": 1, "tokens": span},
        {"name": "set_dropout", "value": 0.2, "step": 3, "tokens": 3 * span},
    ]
    assert run.resolved.fired == (1, 3) and run.resolved.steps == STEPS
    assert make_run().ops == [] and make_run().resolved.fired == ()


def test_the_runs_of_the_evidence() -> None:
    e = make_data(make_recipe("baseline", {1: 2.0, 2: 2.0}), make_recipe("grown", {1: 2.0}))
    assert [run.cfg.preset for run in e.runs] == ["baseline", "baseline", "grown"]
    assert ReportData((), ()).selection == "" and ReportData((), ()).baseline is None


# -- a study


@pytest.mark.parametrize("state", ["fail", "failed", "error", "diverged", "FAIL", "TrialState.FAIL"])
def test_a_trial_that_failed(state: str) -> None:
    assert load.is_failed(make_trial(0, state=state)) and make_study(make_trial(0, state=state)).scored == []


@pytest.mark.parametrize("state", ["done", "complete", "TrialState.COMPLETE", "pruned", "running", ""])
def test_a_trial_that_did_not(state: str) -> None:
    assert (
        not load.is_failed(make_trial(0, state=state))
        and len(make_study(make_trial(0, state=state)).scored) == 1
    )
    assert make_study(make_trial(0, None, state=state)).scored == [] and load.trial_state({}) == ""


@pytest.mark.parametrize("state", ["complete", "completed", "done", "TrialState.COMPLETE"])
def test_trials_that_were_trained_to_the_end(state: str) -> None:
    study = make_study(
        make_trial(0, 1.0, state),
        make_trial(1, 0.5, "pruned", rung=5),
        make_trial(2, None, state),
        make_trial(3, 9.0, "failed"),
    )
    assert [t["trial"] for t in study.completed] == [0] and [t["trial"] for t in study.stopped] == [1]


def test_without_a_state_the_highest_rung_was_trained_to_the_end() -> None:
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
def test_a_fact_is_looked_for_in_three_places(empty: Any) -> None:
    study = make_study(a=1, b=empty, study={"b": 2, "c": empty, "a": 9}, evidence={"c": 3, "b": 9})
    assert [study.fact(name) for name in "abcd"] == [1, 2, 3, None]
    assert make_study(study=None, a=0).fact("a") == 0
    assert (
        make_study(study=None, evidence={"a": 1}).fact("a") == 1
        and make_study(evidence=None).fact("a") is None
    )


def test_the_name_of_a_study() -> None:
    assert make_study(name="mine").name == "mine" and make_study(name="").name == "lr"
