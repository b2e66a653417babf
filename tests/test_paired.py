"""Tests `mainrun compare --paired`: the differences, the correction over claims, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from rich.console import Console
from test_cli import invoke, make_run, refused, summary

from mainrun.config import TrainConfig
from mainrun.errors import RunError, UsageError
from mainrun.ui import paired

RECORD = {1: 1.635, 2: 1.636, 3: 1.634}
STRONG = {1: 1.601, 2: 1.603, 3: 1.601}
ENSEMBLE = {1: 1.570, 2: 1.571, 3: 1.569, 1337: 1.572}
T = 4.302653  # a printed 97.5% quantile of Student's t with 2 degrees of freedom


def recipe(preset: str, scores: dict[int, float], **changes: Any) -> list[paired.RunScore]:
    runs = []
    for seed, full in scores.items():
        cfg = TrainConfig(preset=preset, seed=seed, lr=changes.get("lr", 0.006))
        other = {name: value for name, value in changes.items() if name != "lr"}
        runs.append(paired.RunScore(cfg, summary(cfg, last={"full": full}, **other)))
    return runs


ALL = [*recipe("record", RECORD), *recipe("strong", STRONG), *recipe("ensemble", ENSEMBLE)]
CLAIMS = ["record,strong,0.02", "record,ensemble,0.05", "strong,ensemble"]


def test_three_claims_over_common_seeds() -> None:
    one, ensemble, both = rows = paired.judge_claims(ALL, CLAIMS)
    assert [(row["base"], row["other"], row["margin"]) for row in rows] == [
        ("record", "strong", 0.02),
        ("record", "ensemble", 0.05),
        ("strong", "ensemble", 0.0),
    ]
    differences = [STRONG[seed] - RECORD[seed] for seed in (1, 2, 3)]
    assert one["difference"] == pytest.approx(sum(differences) / 3)
    assert (one["n"], one["seeds"]) == (3, [1, 2, 3])
    assert (one["full_base"], one["full_other"]) == pytest.approx((1.635, 1.601667), abs=1e-6)
    assert ensemble["seeds_left_out"] == {"record": [], "ensemble": [1337]}
    assert [row["result"] for row in rows] == ["better by >0.02", "better by >0.05", "better"]
    order = sorted(rows, key=lambda row: row["p"])
    assert order[0] in (both, ensemble) and order[2] is one
    for rank, row in enumerate(order):
        assert row["confidence"] == pytest.approx(1 - 0.05 / (3 - rank))
        assert row["p_holm"] >= (3 - rank) * row["p"] - 1e-12
    half = T * stdev(differences) / 3**0.5
    assert one["interval"] == pytest.approx((one["difference"] - half, one["difference"] + half), abs=1e-6)


def test_the_interval_excludes_the_margin_if_the_claim_is_proved() -> None:
    for margin in ("0.0285", "0.0295", "0.0305", "0.0335", "0.036", "0.04"):
        (row, _) = paired.judge_claims(ALL, [f"record,strong,{margin}", "strong,ensemble"])
        low, high = row["interval"]
        inside = low <= -float(margin) <= high
        assert inside == (row["result"] == "not proved") == (row["p_holm"] >= 0.05)
    (row,) = paired.judge_claims(ALL, ["record,strong,0.05"])
    assert row["result"] == "not better by 0.05"
    (row,) = paired.judge_claims(ALL, ["strong,record"])
    assert row["result"] == "worse" and row["difference"] > 0


def test_a_claim_that_is_not_proved_widens_the_intervals_of_weaker_claims() -> None:
    runs = ALL + recipe("loose", {1: 1.60, 2: 1.70, 3: 1.55}) + recipe("wild", {1: 1.6, 2: 1.8, 3: 1.4})
    rows = paired.judge_claims(runs, ["record,loose", "record,wild", "record,ensemble"])
    assert [row["confidence"] for row in rows] == pytest.approx([0.975, 0.975, 1 - 0.05 / 3])
    assert [row["result"] for row in rows] == ["not proved", "not proved", "better"]


def test_recipes_of_one_preset_are_named_by_the_fields_that_differ() -> None:
    runs = recipe("strong", RECORD, lr=0.01) + recipe("strong", STRONG, lr=0.02)
    (row,) = paired.judge_claims(runs, ["strong lr=0.01,strong lr=0.02"])
    assert (row["base"], row["other"]) == ("strong lr=0.01", "strong lr=0.02")
    with pytest.raises(UsageError, match=r"of the given runs: strong lr=0\.01; strong lr=0\.02"):
        paired.judge_claims(runs, ["strong,strong"])


def test_equal_differences_have_no_noise() -> None:
    runs = recipe("a", {1: 2.0, 2: 2.5}) + recipe("b", {1: 1.5, 2: 2.0})
    (row,) = paired.judge_claims(runs, ["a,b"])
    assert row["p"] == 0 and row["interval"] == (-0.5, -0.5) and row["result"] == "better"
    (row,) = paired.judge_claims(runs, ["a,b,0.5"])
    assert row["p"] == 1 and row["result"] == "not proved"


def test_the_parts_of_a_name_may_be_in_any_order() -> None:
    runs = recipe("strong", RECORD, lr=0.01) + recipe("strong", STRONG, lr=0.02)
    (expected,) = paired.judge_claims(runs, ["strong lr=0.01,strong lr=0.02,0.01"])
    (row,) = paired.judge_claims(runs, [" lr=0.01  strong , lr=0.02 strong , 0.01"])
    assert row == expected and row["base"] == "strong lr=0.01"


def test_a_name_may_contain_a_comma() -> None:
    runs = []
    for frozen, scores in (((), RECORD), ((0, 1), STRONG)):
        for run in recipe("strong", scores):
            runs.append(run._replace(cfg=run.cfg.model_copy(update={"frozen": frozen})))
    (row,) = paired.judge_claims(runs, ["strong frozen=[], strong frozen=[0, 1], 0.01"])
    assert (row["other"], row["margin"]) == ("strong frozen=[0, 1]", 0.01)


def test_runs_that_differ_only_in_inert_fields_count_as_one() -> None:
    again = []
    for run in recipe("record", RECORD):
        again.append(run._replace(cfg=run.cfg.model_copy(update={"token_scores": True})))
    assert {run.cfg.run_id for run in again}.isdisjoint(run.cfg.run_id for run in ALL)
    assert paired.judge_claims(ALL + again, CLAIMS) == paired.judge_claims(ALL, CLAIMS)
    other = [run._replace(summary={**run.summary, "last": {"full": 1.0}}) for run in again]
    with pytest.raises(RunError) as error:
        paired.judge_claims(ALL + other, CLAIMS)
    assert ALL[0].summary["run"] in str(error.value) and str(error.value).count("record-") == 2


FAILED = [{"name": "causality", "status": "fail", "detail": "sees the future"}]
OTHER_TRAIN = {"corpus": "c" * 64, "val": "v" * 64, "train": "u" * 64}


@pytest.mark.parametrize(
    ("runs", "claims", "words"),
    [
        (ALL, ["record,strng"], "got --paired 'record,strng'; give BASE,OTHER"),
        (ALL, ["record,strng,0.1"], "of the given runs: strong; record; ensemble"),
        (ALL, ["ensembel,record"], "of the given runs: ensemble; "),
        (ALL, ["record"], "of the given runs: record; strong; ensemble"),
        (ALL, ["record,record"], "compares a recipe with itself"),
        (ALL, ["record,strong,x"], "margin is not a number"),
        (ALL, ["record,strong,-0.1"], "margin is not a number"),
        (ALL, ["record,strong,inf"], "margin is not a number"),
        (ALL, ["record,strong,nan"], "margin is not a number"),
        (ALL, ["record,strong", "strong,record,0.1"], "compares record and strong twice"),
        (ALL + recipe("late", {2: 1.0, 9: 1.1}), ["record,late"], "of record are 1, 2, 3 and of late are 2"),
        (ALL + recipe("late", {8: 1.0, 9: 1.1}), ["record,late"], "needs at least two seeds that both"),
        (ALL + recipe("record", {2: 1.0}), ["record,strong"], "seed 2 of record has two runs with different"),
        (
            recipe("a", RECORD, weights="1") + recipe("a", RECORD, weights="2") + recipe("b", STRONG),
            ["a,b"],
            "seed 1 of a has two runs with different results",
        ),
        (ALL + recipe("bad", RECORD, guards=FAILED), ["record,bad"], "failed the guard causality"),
        (
            ALL + recipe("dev", RECORD, fingerprints=OTHER_TRAIN),
            ["record,dev"],
            "trained on different titles: train fingerprint tttttttttttt against uuuuuuuuuuuu",
        ),
    ],
)  # fmt: skip
def test_claims_that_the_runs_cannot_support(
    runs: list[paired.RunScore], claims: list[str], words: str
) -> None:
    with pytest.raises((UsageError, RunError)) as error:
        paired.judge_claims(runs, claims)
    assert words in str(error.value) and error.value.exit_code == 2


def test_old_summaries_without_the_fingerprint_of_train_are_accepted() -> None:
    old = recipe("old", {seed: full + 0.1 for seed, full in STRONG.items()}, fingerprints={"corpus": "c"})
    (row,) = paired.judge_claims(ALL + old, ["old,record"])
    assert row["n"] == 3


def test_the_command(tmp_path: Path) -> None:
    names = []
    for preset, scores in (("record", RECORD), ("strong", STRONG), ("ensemble", ENSEMBLE)):
        for run in recipe(preset, scores):
            make_run(tmp_path, run.cfg, last={"full": scores[run.cfg.seed]})
            names.append(run.cfg.run_id)
    options = [word for claim in CLAIMS for word in ("--paired", claim)]
    text = invoke("compare", *names, "--out", tmp_path, *options, "--svg", tmp_path / "t.svg").stdout
    assert "strong-" in text, "the runs themselves are shown too"
    (line,) = [line for line in text.splitlines() if "better by >0.02" in line]
    assert line.split()[:6] == ["strong", "record", "3", "1.6017", "1.6350", "-0.0333"]
    assert "adjusted over 3 claims by Holm's method" in text and "p tests the difference -margin" in text
    assert "ensemble: seed 1337 was left out, because record has no run with this seed" in text
    assert "seed 1337 was left out" in (tmp_path / "t.svg").read_text().replace("&#160;", " ")
    result = json.loads(invoke("compare", *names, "--out", tmp_path, *options, "--json").stdout)
    assert [row["run"] for row in result["runs"]] == names
    expected = paired.judge_claims(ALL, CLAIMS)
    assert result["paired"] == json.loads(json.dumps(expected))
    refused(invoke("compare", *names, "--out", tmp_path, "--paired", "x,y"), "record; strong; ensemble")


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_table_of_claims_fits_the_screen(width: int) -> None:
    text = io.StringIO()
    paired.show(paired.judge_claims(ALL, CLAIMS), Console(width=width, file=text))
    table = text.getvalue().split("Both scores are")[0]
    assert table.count("better by >0.02") == 1 and "…" not in table
    assert all(len(line) <= width for line in table.splitlines())
