"""Tests the tables of a report with made-up runs: cells, rounding, row order, and rows in red."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evidence import (
    STEPS,
    failing,
    guard,
    make_data,
    make_recipe,
    make_routed_run,
    make_run,
    make_study,
    make_trial,
    score,
)

from reports.evidence import front_page, tables
from reports.evidence.figures import waterfall
from reports.evidence.load import Recipe

MINUS = "\N{MINUS SIGN}"


def cells(table: tables.Table | None) -> list[list[str]]:
    assert table is not None
    return list(table.cells())


def heads(table: tables.Table | None) -> list[str]:
    assert table is not None
    return [column.head for column in table.columns]


def look(table: tables.Table | None) -> list[tuple[float, bool]]:
    """Return each column's share of the width and whether the column is aligned to the right."""
    assert table is not None
    return [(column.share, column.right) for column in table.columns]


# -- formats of numbers


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (tables.fixed(4), 1.23456, "1.2346"),
        (tables.fixed(4), -1.23456, f"{MINUS}1.2346"),
        (tables.fixed(1), 0.25, "0.2"),
        (tables.fixed(4), None, ""),
        (tables.fixed(2, sign=True), 0.5, "+0.50"),
        (tables.fixed(2, sign=True), -0.5, f"{MINUS}0.50"),
        (tables.fixed(2, sign=True), None, ""),
        (tables.integer, 1234567.4, "1,234,567"),
        (tables.integer, 0, "0"),
        (tables.integer, None, ""),
        (tables.identifier, 1337, "1337"),
        (tables.p_value, 0.001, "0.001"),
        (tables.p_value, 0.00099, "<0.001"),
        (tables.p_value, 0.0, "<0.001"),
        (tables.p_value, 0.12345, "0.123"),
        (tables.p_value, None, ""),
        (tables.text, None, ""),
        (tables.text, 0, "0"),
        (tables.scientific, 3.5512e13, "3.55e13"),
        (tables.scientific, 1e-5, "1e-05"),
        (tables.scientific, 12.0, "12"),
        (tables.scientific, None, ""),
        (tables.compact, 4_586_496, "4.59M"),
        (tables.compact, 1000, "1K"),
        (tables.compact, 999.0, "999"),
        (tables.compact, 2.5e9, "2.5G"),
        (tables.compact, 1e12, "1T"),
        (tables.compact, None, ""),
        (tables.setting, None, "none"),
        (tables.setting, True, "true"),
        (tables.setting, {"a": [1]}, '{"a": [1]}'),
        (tables.setting, [1, 2], "[1, 2]"),
        (tables.setting, (1, 2), "[1, 2]"),
        (tables.setting, 0.1234567, "0.123457"),
        (tables.setting, 3.0, "3"),
        (tables.setting, 10, "10"),
        (tables.setting, "adamw", "adamw"),
    ],
)
def test_how_a_value_is_written(form: tables.Format, value: Any, expected: str) -> None:
    assert form(value) == expected


def test_numbers_are_aligned_right_and_words_left() -> None:
    sides = {
        form: tables.Column("x", form).right
        for form in (tables.text, tables.setting, tables.integer, tables.identifier)
    }
    assert sides == {tables.text: False, tables.setting: False, tables.integer: True, tables.identifier: True}
    assert tables.Column("x") == tables.Column("x", tables.text, 0.0)


def test_the_csv_keeps_all_digits_and_the_cells_are_rounded(tmp_path: Path) -> None:
    columns = [tables.Column("a", tables.fixed(2)), tables.Column("b"), tables.Column("c", tables.setting)]
    table = tables.Table("x", "X", columns, [[1.23456, None, {"k": 1}], [2.0, "ü, z", ["y"]]])
    assert cells(table) == [["1.23", "", '{"k": 1}'], ["2.00", "ü, z", '["y"]']] and (
        table.note,
        table.red,
    ) == ("", set())
    path = table.write(tmp_path)
    assert path == tmp_path / "x.csv" and b"\r" not in path.read_bytes()
    with path.open(encoding="utf-8", newline="") as f:
        assert list(csv.reader(f)) == [["a", "b", "c"], ["1.23456", "", '{"k": 1}'], ["2.0", "ü, z", '["y"]']]


def test_the_mean_without_runs_is_none() -> None:
    runs = [make_run(seed=seed, full=full) for seed, full in ((1, 1.0), (2, 2.0))]
    assert (
        tables.mean_of(runs, lambda run: run.full) == 1.5 and tables.mean_of([], lambda run: run.full) is None
    )


# -- recipes and runs


def test_recipes() -> None:
    good = make_recipe("baseline", {1: 2.0, 2: 2.2}, params=1234, flops=2e12, seconds=8.0)
    good.runs[1].summary.update(flops=4e12, seconds=100.0, ledger={"reused": 3})
    good.runs[1].summary["last"] |= {"official": 3.5, "coverage": 0.9}
    better = make_recipe("optimized", {1: 1.9})
    del better.runs[0].summary["ledger"]
    bad = make_recipe("grown", {1: 0.1, 2: 0.3}, guards=failing())
    table = tables.recipes(make_data(good, bad, better))
    assert heads(table) == [
        "recipe",
        "seeds",
        "full",
        "sd",
        "±95%",
        "forward\nFLOPs",
        "official",
        "covers %",
        "params",
        "FLOPs",
        "seconds",
    ]
    assert cells(table) == [
        ["optimized", "1", "1.9000", "", "", "1.3M", "3.0000", "98.0", "1,000", "2e09", "10.0"],
        ["baseline", "2", "2.1000", "0.1414", "1.2706", "1.95G", "3.2500", "94.0", "1,234", "3e12", "8.0"],
        ["grown", "0", "", "", "", "1.3M", "", "98.0", "1,000", "2e09", "10.0"],
    ]
    assert table.red == {2} and (table.name, table.title) == ("recipes", "Recipes") and "97%" in table.note
    assert look(table) == [(0.25, False), *[(0.0, True)] * 10]


def test_a_recipe_counts_only_its_valid_runs() -> None:
    mixed = make_recipe("baseline", {1: 2.0, 2: 2.2, 3: 0.1})
    mixed.runs[2].summary.update(guards=failing(), seconds=99.0, flops=9e15)
    (row,) = cells(tables.recipes(make_data(mixed)))
    assert row == ["baseline", "2", "2.1000", "0.1414", "1.2706", "3.0000", "98.0", "1,000", "2e09", "10.0"]


def test_recipes_without_a_valid_run_come_last() -> None:
    red = [make_recipe(name, {1: 0.1}, guards=failing()) for name in ("grown", "staged")]
    table = tables.recipes(make_data(*red, make_recipe("baseline", {1: 2.0})))
    assert [row[0] for row in cells(table)] == ["baseline", "grown", "staged"]


def test_a_score_of_zero_is_the_lowest() -> None:
    table = tables.recipes(make_data(make_recipe("baseline", {1: 0.5}), make_recipe("optimized", {1: 0.0})))
    assert [row[0] for row in cells(table)] == ["optimized", "baseline"]


def test_a_recipe_that_reused_all_runs_has_no_time() -> None:
    (row,) = cells(tables.recipes(make_data(make_recipe("baseline", {1: 2.0}, ledger={"reused": 4}))))
    assert row[-1] == ""


def test_runs() -> None:
    last = score(full=2.12345, official=3.5, coverage=0.9, bits_per_byte=1.23456)
    flagged = [guard("coverage", "flag"), guard("causality", "flag"), guard("geometry")]
    runs = (
        make_run(
            seed=7,
            last=last,
            best=score(step=2, full=1.99999),
            guards=flagged,
            steps=1200,
            tokens_per_s=1234.5,
            ledger={"reused": 300},
        ),
        make_run(seed=8, guards=[*failing(), guard("geometry", "fail")]),
        make_run(seed=9, full=1.5),
    )
    del runs[2].summary["ledger"]
    table = tables.runs(make_data(Recipe("baseline", runs)))
    assert heads(table) == [
        "run",
        "seed",
        "full",
        "best",
        "official",
        "covers\n%",
        "bits/\nbyte",
        "steps",
        "reused",
        "tokens/\ns",
        "guards",
    ]
    assert cells(table) == [
        [
            runs[0].id,
            "7",
            "2.1235",
            "2.0000",
            "3.5000",
            "90.0",
            "1.2346",
            "1,200",
            "300",
            "1,234",
            "ok, 2 flag",
        ],
        [
            runs[1].id,
            "8",
            "2.0000",
            "2.0000",
            "3.0000",
            "98.0",
            "1.5000",
            "4",
            "0",
            "51",
            "FAIL: causality, geometry",
        ],
        [runs[2].id, "9", "1.5000", "1.5000", "3.0000", "98.0", "1.5000", "4", "0", "51", "ok"],
    ]
    assert table.red == {1} and "Red" in table.note and (table.name, table.title) == ("runs", "Runs")
    assert look(table) == [(0.0, False), *[(0.0, True)] * 9, (0.14, False)]
    assert "Red" not in tables.runs(make_data(Recipe("baseline", runs[2:]))).note


def test_what_the_runs_cost(tmp_path: Path) -> None:
    machine = {"device": "a processor", "threads": 2, "dtype": "float32"}
    gpu = {"device": "a GPU", "dtype": "bfloat16"}
    counted = {"presentations_per_token": 8.0, "train_tokens_per_epoch": 512}
    single = make_run(full=2.12345, params=1234, flops=2e12, seconds=8.0, machine_classes=[machine])
    ensemble = make_run(
        seed=2,
        flops=3.0 * 512 * 2 * 5e4,
        machine_classes=[gpu],
        presentations=counted | {"forward_passes": 2, "ensemble_members": 4},
    )
    bad = make_run(seed=3, machine_classes=[machine], guards=failing())
    table = tables.run_costs(make_data(Recipe("baseline", (single, ensemble, bad))))
    assert cells(table) == [
        [single.id, "2.1235", "3.0000", "98.0", "1,234", "1", "1", "2e12", "1.3G", "8.0", "A"],
        [ensemble.id, "2.0000", "3.0000", "98.0", "1,000", "4", "8", "1.54e08", "50K", "10.0", "B"],
        [bad.id, "2.0000", "3.0000", "98.0", "1,000", "1", "1", "2e09", "1.3M", "10.0", "A"],
    ]
    assert table.red == {2} and (table.name, table.title) == ("costs", "What the runs cost")
    assert "Machine A: a processor, 2 threads, float32; B: a GPU, bfloat16." in table.note
    head, first, *_ = table.write(tmp_path).read_text().splitlines()
    assert head == (
        "run,full,official,covers %,params,members,seen/epoch,training FLOPs,forward FLOPs,seconds,machine"
    )
    assert first.endswith('"a processor, 2 threads, float32"'), "the CSV has the whole machine"


def test_an_ensemble_is_called_an_ensemble() -> None:
    counted = {"presentations_per_token": 4.0, "train_tokens_per_epoch": 512, "ensemble_members": 4}
    single = make_recipe("baseline", {1: 2.0})
    data = make_data(single, make_recipe("optimized", {1: 1.9}, presentations=counted))
    for table, members in ((tables.recipes(data), ["4", "1"]), (front_page.headline(data), ["1", "4"])):
        assert table is not None
        place = heads(table).index("members")
        assert [row[place] for row in cells(table)][:2] == members
        assert "members is the number of models" in table.note
    for table in (tables.recipes(make_data(single)), front_page.headline(make_data(single))):
        assert table is not None and "members" not in heads(table) and "members" not in table.note


# -- forward FLOPs and routed blocks


def test_the_forward_flops_of_a_run_are_those_of_its_scored_model() -> None:
    dense = make_run(flops=3.0 * 512 * 700)
    assert tables.get_forward_flops(dense) == 700
    twice = make_run(flops=3.0 * 512 * 700)
    twice.summary["presentations"]["forward_passes"] = 2
    assert tables.get_forward_flops(twice) == 350, "a step with R-Drop makes two passes"
    grown = make_run(segments=[{"flops_per_token": 3000}, {"flops_per_token": 6000}])
    assert tables.get_forward_flops(grown) == 2000, "the model is scored at its last size"
    assert tables.get_forward_flops(make_routed_run()) == 3e4


def test_forward_flops_are_shown_beside_the_scores_if_they_differ(tmp_path: Path) -> None:
    dense = Recipe("optimized", (make_run("optimized", flops=3.0 * 512 * 5e4),))
    data = make_data(dense, Recipe("mod", (make_routed_run(),)))
    for table in (tables.recipes(data), tables.runs(data), front_page.headline(data)):
        assert table is not None and "forward FLOPs is the cost per token" in table.note
        place = heads(table).index("forward\nFLOPs")
        assert [row[place] for row in cells(table)][:2] == ["50K", "30K"], table.name
    path = tables.runs(data).write(tmp_path)
    assert "best,forward FLOPs,official" in path.read_text()
    alone = make_data(dense, Recipe("other", (make_run("other", seed=2, flops=3.0 * 512 * 50_001),)))
    for table in (tables.recipes(alone), tables.runs(alone), front_page.headline(alone)):
        assert table is not None and "forward" not in table.note
        assert "forward\nFLOPs" not in heads(table), "50.0K and 50.0K look equal"
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_layers_of_a_routed_run() -> None:
    run = make_routed_run()
    table = tables.routing(run, 2)
    assert (table.name, table.title) == ("routing_2", "The layers")
    dense, routed = table.rows
    assert dense[:4] == [0, "D, dense", None, None] and dense[5] == 1
    assert routed[:4] == [1, "M, Mixture-of-Depths", 26.0, 81.25]
    block = 8 * 32 * 32 + 4 * 32 * 32  # the weights of the MLP and of the attention
    attention = 4 * 32 * 16  # for 16 tokens in a row
    assert dense[4] == 2 * block + attention
    assert routed[4] == pytest.approx(0.26 * 2 * block + 0.26**2 * attention + 2 * 3 * 32)
    assert routed[5] == routed[4] / dense[4]
    assert "30K FLOPs per token, which is 0.600 of the dense model" in table.note


def test_the_loss_with_the_selection_of_training_is_said_to_see_the_future() -> None:
    run = make_routed_run(full=2.0)
    run.summary["routing"]["topk_loss"] = 0.1234
    data = make_data(make_recipe("optimized", {1: 1.9}), Recipe("mod", (run,)))
    note = tables.routing(run, 1).note
    assert "which sees the future, the loss would be 0.1234. This second loss is not a score" in note
    for table in (tables.recipes(data), tables.runs(data), front_page.headline(data)):
        assert table is not None
        assert "0.1234" not in str(cells(table)), "the loss is in no table of scores"
    assert [row[0] for row in cells(tables.recipes(data))] == ["optimized", "mod"], "nothing ranks by it"


# -- from step to step


def test_the_ablation() -> None:
    steps = (
        make_recipe("ablation:baseline", {1: 3.0, 2: 3.01, 3: 3.02}, {"lr": 0.001}),
        make_recipe("ablation:size", {1: 2.5, 2: 2.51, 3: 2.52}, {"lr": 0.002, "dropout": 0.2}),
        make_recipe("ablation:bfloat16", {1: 2.3, 2: 2.33, 3: 2.36}, {"lr": 0.003, "dropout": 0.2}),
    )
    e = make_data(*steps)
    table = tables.ablation(e)
    assert table is not None and e.noise is not None
    assert heads(table) == ["step", "seeds", "full", "delta", "low", "high", "p", "verdict", "what it sets"]
    shown = cells(table)
    assert shown[0] == ["baseline", "3", "3.0100", "", "", "", "", "", ""]
    assert shown[1] == [
        "size",
        "3",
        "2.5100",
        f"{MINUS}0.5000",
        f"{MINUS}0.5000",
        f"{MINUS}0.5000",
        "<0.001",
        "better",
        "lr=0.002, dropout=0.2",
    ]
    p = 2 * tables.stats.t_cdf(-0.18 / (0.02 / 3**0.5), 2)
    half = tables.stats.t_quantile(0.975, 2) * 0.02 / 3**0.5
    assert shown[2][:6] == [
        "bfloat16",
        "3",
        "2.3300",
        f"{MINUS}0.1800",
        f"{MINUS}{0.18 + half:.4f}",
        f"{MINUS}{0.18 - half:.4f}",
    ]
    assert shown[2][6:] == [f"{p:.3f}", "better", "lr=0.003"]
    assert table.rows[2][6] == pytest.approx(p) and (table.name, table.title) == (
        "ablation",
        "From step to step",
    )
    assert (
        f"{e.noise.floor:.4f}" in table.note
        and f"sd {e.noise.sd:.4f}" in table.note
        and f"{e.noise.df} degrees" in table.note
    )
    assert look(table) == [(0.11, False), *[(0.0, True)] * 6, (0.12, False), (0.27, False)]


def test_a_step_that_is_not_kept_is_not_part_of_the_next_change() -> None:
    steps = (
        make_recipe("ablation:baseline", {1: 3.0, 2: 3.01}),
        make_recipe("ablation:kaiming", {1: 2.8, 2: 2.81}, {"init": "kaiming"}),
        make_recipe("ablation:size", {1: 2.5, 2: 2.51}, {"lr": 0.002}),
        make_recipe("ablation:bfloat16", {1: 2.4, 2: 2.41}, {"lr": 0.002, "dropout": 0.2}),
    )
    table = tables.ablation(make_data(*steps))
    assert table is not None
    assert [row[3] for row in table.rows[1:]] == pytest.approx([-0.2, -0.5, -0.1])
    assert [row[-1] for row in cells(table)[1:]] == ["init=kaiming", "lr=0.002", "dropout=0.2"]
    kept = "Each step keeps the changes of the steps before it"
    assert table.note.startswith(
        f"{kept}, with this exception: size starts from baseline again. low and high"
    )


def test_the_waterfall_starts_a_step_at_the_step_that_it_changes() -> None:
    steps = [
        make_recipe("ablation:baseline", {1: 3.0}),
        make_recipe("ablation:kaiming", {1: 2.8}, {"init": "kaiming"}),
        make_recipe("ablation:size", {1: 2.5}, {"lr": 0.002}),
    ]
    figure = waterfall.draw(make_data(*steps))
    assert figure is not None
    (axes,) = figure.axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [pytest.approx(bar) for bar in ((3.0, 0.0), (3.0, -0.2), (3.0, -0.5))]
    ends = [(line.get_xdata()[0], line.get_ydata()[1]) for line in axes.get_lines()]
    assert ends == [pytest.approx(end) for end in ((3.0, 2.31), (2.8, 1.31), (2.5, 2.31))]


def test_the_seed_is_not_listed_as_a_change() -> None:
    steps = [
        make_recipe("ablation:baseline", {1: 3.0, 2: 3.0}, {"lr": 0.1}),
        make_recipe("ablation:size", {2: 2.5, 3: 2.5}, {"lr": 0.2}),
        make_recipe("ablation:adamw", {2: 2.4, 3: 2.4}, {"lr": 0.3}),
    ]
    assert [row[-1] for row in cells(tables.ablation(make_data(*steps)))] == ["", "lr=0.2", "lr=0.3"]


def test_holm_adjusts_over_all_steps() -> None:
    """Both p-values are below 5%.

    Holm's method doubles the smaller one and does not change the larger one.
    """
    steps = [
        make_recipe(f"ablation:{name}", fulls, {"lr": 0.001 * n})
        for n, (name, fulls) in enumerate(
            (
                ("baseline", {1: 3.0, 2: 3.01, 3: 3.02}),
                ("size", {1: 2.7, 2: 2.78, 3: 2.75}),
                ("bfloat16", {1: 2.4, 2: 2.52, 3: 2.5}),
            ),
            1,
        )
    ]
    table = tables.ablation(make_data(*steps))
    assert table is not None
    scores = [recipe.scores for recipe in steps]
    ps = [tables.stats.difference(a, b).p for a, b in pairwise(scores)]
    assert [row[6] for row in table.rows[1:]] == pytest.approx(
        tables.stats.holm([p for p in ps if p is not None])
    )
    assert [row[6] for row in table.rows[1:]] != pytest.approx(ps)


def test_an_ablation_with_one_seed_per_step() -> None:
    steps = [
        make_recipe(f"ablation:{name}", {1: full}, {"lr": 0.01 * full})
        for name, full in (("baseline", 3.0), ("size", 2.5), ("adamw", 2.6))
    ]
    table = tables.ablation(make_data(*steps))
    assert [row[3:8] for row in cells(table)[1:]] == [
        [f"{MINUS}0.5000", "", "", "", "no claim: one seed"],
        ["+0.1000", "", "", "", "no claim: one seed"],
    ]
    assert table is not None and "floor" not in table.note


def test_without_a_ladder_there_is_no_ablation() -> None:
    assert tables.ablation(make_data(make_recipe("baseline", {1: 2.0}))) is None


def test_the_short_name_of_a_step() -> None:
    assert (
        tables.step_name(make_run("ablation:size").cfg) == "size"
        and tables.step_name(make_run("baseline").cfg) == "baseline"
    )


@pytest.mark.parametrize(
    ("mean", "interval", "floor", "expected"),
    [
        (-0.1, (-0.2, -0.05), 0.0999, "better"),
        (0.1, (0.05, 0.2), 0.0999, "worse"),
        (-0.1, (-0.2, -0.05), 0.1, "within noise"),
        (0.1, (0.05, 0.2), 0.1, "within noise"),
        (-0.1, (-0.2, 0.0), 0.05, "not sure"),
        (0.1, (0.0, 0.2), 0.05, "not sure"),
        (0.1, (1e-12, 0.2), 0.05, "worse"),
        (-0.1, (-0.2, -1e-12), 0.05, "better"),
        (0.0, (0.0, 0.0), 0.0, "within noise"),
        (-0.1, None, 0.05, "no claim: one seed"),
        (-0.1, (-0.2, -0.05), None, "no claim: one seed"),
    ],
)
def test_a_verdict(mean: float, interval: Any, floor: float | None, expected: str) -> None:
    d: Any = SimpleNamespace(mean=mean, interval=interval)
    noise: Any = None if floor is None else SimpleNamespace(floor=floor)
    assert tables.verdict(d, noise) == expected


@pytest.mark.parametrize(
    ("p", "verdict"),
    [(0.0, "better"), (0.05, "better"), (0.0500001, "not sure"), (1.0, "not sure"), (None, "better")],
)
def test_a_verdict_needs_a_significant_p(p: float | None, verdict: str) -> None:
    d: Any = SimpleNamespace(mean=-0.1, interval=(-0.2, -0.05))
    noise: Any = SimpleNamespace(floor=0.05)
    if p == 0.05:
        p = 1 - tables.stats.LEVEL
    assert tables.verdict(d, noise, p) == verdict


# -- differences between configs

OPS = [
    {"name": "set_dropout", "value": 0.0, "trigger": {"step": 2}},
    {"name": "stack_layers", "value": [0, 0, 1, 1], "init": "identity", "trigger": {"step": 3}},
]
GROWTH = {"dropout": 0.1, "growth": {"version": 2, "ops": OPS}}


def test_differences() -> None:
    base = make_recipe("baseline", {1: 2.0, 2: 2.0})
    other = make_recipe("optimized", {2: 1.9}, GROWTH | {"lr": 0.02, "optimizer": "adamw"})
    table = tables.differences(make_data(base, other))
    assert table is not None and heads(table) == ["field", "baseline", "optimized"]
    ops = other.cfg.growth.ops
    fields = [["optimizer", "sgd", "adamw"], ["lr", "0.006", "0.02"], ["dropout", "0", "0.1"]]
    assert sorted(cells(table)[:-2]) == sorted(fields)
    assert cells(table)[-2:] == [["growth", "", f"{op} at {op.trigger}"] for op in ops]
    assert table.name == "config" and table.title == "Config of optimized against baseline" and table.note
    assert look(table) == [(0.2, False), (0.35, False), (0.45, False)]
    assert tables.differences(make_data(base)) is None and tables.differences(make_data()) is None


def test_the_other_recipes() -> None:
    base, optimised = make_recipe("baseline", {1: 2.0}), make_recipe("optimized", {1: 2.0}, {"lr": 0.02})
    more = make_recipe("grown", {5: 2.0}, GROWTH | {"lr": 0.5})
    table = tables.other_configs(make_data(base, optimised, more))
    assert cells(table) == [["grown", "lr=0.5, dropout=0.1"]]
    assert (
        table is not None
        and heads(table) == ["recipe", "sets"]
        and look(table) == [(0.25, False), (0.75, False)]
    )
    assert (table.name, table.title) == ("other_configs", "Other recipes against baseline")
    assert tables.other_configs(make_data(base, optimised)) is None
    e = make_data(base, optimised, more)
    object.__setattr__(e, "baseline", None)
    assert tables.other_configs(e) is None
    steps = [
        make_recipe(f"ablation:{name}", {1: 2.0}, {"lr": lr})
        for name, lr in (("baseline", 0.1), ("size", 0.2), ("adamw", 0.3))
    ]
    assert tables.other_configs(make_data(base, optimised, *steps)) is None


# -- guards and failures


def test_guards() -> None:
    each = [
        [guard("coverage"), guard("causality", "pass", "a"), guard("geometry", "flag", "b")],
        [guard("coverage"), guard("causality", "flag", "c"), guard("geometry", "flag", "a")],
        [guard("coverage"), guard("causality", "fail", "d"), guard("geometry", "flag", "b")],
        [guard("coverage"), guard("causality", "fail", "e"), guard("geometry", "pass", "z")],
        [guard("coverage"), guard("causality", "fail", "d"), guard("late", "pass", "y")],
    ]
    runs = tuple(make_run(seed=seed, guards=guards) for seed, guards in enumerate(each))
    table = tables.guards(make_data(Recipe("baseline", runs)))
    assert heads(table)[:4] == ["guard", "pass", "flag", "fail"]
    assert cells(table) == [
        ["coverage", "5", "0", "0", "pass: fine"],
        ["causality", "1", "1", "3", "fail: d (and 1 more like it)"],
        ["geometry", "1", "3", "0", "flag: b (and 1 more like it)"],
        ["late", "1", "0", "0", "pass: y"],
    ]
    assert table.red == {1} and (table.name, table.title) == ("guards", "Guards")
    assert look(table) == [(0.17, False), (0.06, True), (0.06, True), (0.06, True), (0.65, False)]


def test_equally_frequent_details_are_chosen_by_name() -> None:
    runs = tuple(
        make_run(seed=seed, guards=[guard("x", "fail", detail)]) for seed, detail in enumerate("cab")
    )
    assert cells(tables.guards(make_data(Recipe("baseline", runs)))) == [
        ["x", "0", "0", "3", "fail: a (and 2 more like it)"]
    ]


def test_failures() -> None:
    journal = [
        {"event": "op SUCCESS", "name": "set_dropout", "step": 2, "value": 0.0, "tokens": 256},
        {
            "event": "op ERROR",
            "name": "stack_layers",
            "step": 3,
            "value": [0],
            "tokens": 384,
            "checks": [{"ok": False}],
        },
    ]
    bad = make_run(seed=1, guards=[guard("coverage", "flag"), *failing("it looks ahead")[1:]])
    grown = make_run(seed=2, journal=journal)
    study = make_study(
        make_trial(0),
        make_trial(1, None, "diverged", reason="at step 9"),
        make_trial(2, None, "TrialState.FAIL"),
        make_trial(3, None, "failed"),
    )
    e = make_data(Recipe("baseline", (bad, grown)), studies=(study,))
    rows = [
        [bad.id, "guard", "causality: it looks ahead"],
        [grown.id, "step 3", 'stack_layers was rolled back: [{"ok": false}]'],
        ["lr, trial 1", "diverged", "at step 9"],
        ["lr, trial 2", "TrialState.FAIL", "no reason given"],
        ["lr, trial 3", "failed", "no reason given"],
    ]
    table = tables.failures(e)
    assert table is not None and cells(table) == rows and heads(table) == ["what", "where", "why"]
    assert look(table) == [(0.25, False), (0.15, False), (0.6, False)] and (table.name, table.title) == (
        "failures",
        "Runs, trials and ops",
    )
    assert cells(tables.failures(e, limit=3)) == rows
    assert cells(tables.failures(e, limit=2)) == [
        *rows[:4],
        ["lr", "", "and 1 more failed trials, in trials.parquet"],
    ]
    assert tables.failures(make_data(make_recipe("baseline", {1: 2.0}))) is None


def test_at_most_thirty_failed_trials_are_shown() -> None:
    study = make_study(*(make_trial(i, None, "error") for i in range(32)))
    assert cells(tables.failures(make_data(studies=(study,))))[30:] == [
        ["lr", "", "and 2 more failed trials, in trials.parquet"]
    ]


# -- growth


def test_the_ops_of_a_run() -> None:
    rows = [
        {"event": "eval", **score(step=step, full=full)}
        for step, full in ((1, 3.0), (2, 2.5), (3, 2.25), (4, 2.0))
    ]
    rows.insert(1, {"event": "eval", **score(step=2, full=9.0, split="dev")})
    done = {"params": 1000, "flops_per_token": 6000.0, "delta_logits": 1.25e-7}
    journal = [
        {"event": "op START", "name": "set_dropout", "step": 2, "value": 0.0},
        {"event": "op SUCCESS", "name": "set_dropout", "step": 2, "value": 0.0, "tokens": 256, **done},
        {"event": "op ERROR", "name": "stack_layers", "step": 3, "value": [0, 1], "tokens": 384},
        {"event": "op SUCCESS", "name": "first", "step": 0, "value": 1, "tokens": 0, "delta_logits": 0.0},
        {"event": "op SUCCESS", "name": "last", "step": 4, "value": None, "tokens": 512},
    ]  # fmt: skip
    table = tables.growth(make_run(rows=rows, journal=journal), 3)
    assert heads(table) == [
        "#",
        "op",
        "value",
        "step",
        "tokens",
        "full before",
        "after",
        "params",
        "FLOPs/token",
        "Δ logits",
    ]
    assert cells(table) == [
        ["1", "set_dropout", "0", "2", "256", "2.5000", "2.2500", "1,000", "6,000", "1.25e-07"],
        ["2", "stack_layers", "[0, 1]", "3", "384", "2.2500", "2.0000", "", "", "failed: rolled back"],
        ["3", "first", "1", "0", "0", "", "3.0000", "", "", "0"],
        ["4", "last", "none", "4", "512", "2.0000", "", "", "", ""],
    ]
    assert (table.name, table.title) == ("growth_3", "The ops")
    assert look(table) == [(0.0, True), (0.2, False), (0.13, False), *[(0.0, True)] * 6, (0.0, False)]


# -- the appendix


def test_commands() -> None:
    env = {"command": ["/bin/mainrun", "train", "--set", "a b"]}
    runs = [make_run(seed=seed, env=env) for seed in range(10)]
    other = make_run(seed=11)
    other.env["command"] = ["mainrun"]
    bare = make_run(seed=12)
    del bare.env["command"]
    table = tables.commands(make_data(Recipe("baseline", (*runs, other, bare))))
    assert cells(table) == [
        ["mainrun train --set 'a b'", ", ".join(run.id for run in runs[:8]) + " and 2 more"],
        ["mainrun", other.id],
        ["mainrun '(not recorded)'", bare.id],
    ]
    assert heads(table) == ["command", "runs"] and look(table) == [(0.6, False), (0.4, False)]
    assert (table.name, table.title) == ("commands", "Commands")


def test_hashes() -> None:
    digits = {name: f"{name}{'0123456789' * 3}" for name in "wesxt"}
    full = make_run(
        weights=digits["w"],
        versions={"mainrun": digits["s"]},
        tokenizer=digits["t"],
        env={"evaluate_hash": digits["e"]},
    )
    bare = make_run(seed=2)
    for name in ("weights", "versions", "tokenizer"):
        del bare.summary[name]
    del bare.env["evaluate_hash"]
    table = tables.hashes(make_data(Recipe("baseline", (full, bare))))
    assert heads(table) == ["run", "config", "weights", "evaluate", "source", "tokenizer"]
    assert cells(table) == [
        [full.id, full.cfg.digest[:12], *(f"{name}01234567890" for name in "west")],
        [bare.id, bare.cfg.digest[:12], "", "", "", ""],
    ]
    assert look(table) == [(0.0, False), *[(0.15, False)] * 5] and (table.name, table.title) == (
        "hashes",
        "Hashes",
    )


@pytest.mark.parametrize("name", ["corpus", "train", "dev", "val"])
def test_fingerprints(name: str) -> None:
    runs = [make_run(seed=seed) for seed in (1, 2, 3, 4)]
    runs[2].summary["fingerprints"] |= {name: "123456789abcdef"}
    del runs[3].summary["fingerprints"][name]
    del runs[3].summary["origin"]
    table = tables.fingerprints(make_data(Recipe("baseline", tuple(runs))))
    assert heads(table) == ["corpus", "train", "dev", "val", "which titles", "file", "runs"]
    first = ["c" * 12, "a" * 12, "d" * 12, "b" * 12, "synthetic, 400 titles", "0f" * 6, "2"]
    place = heads(table).index(name)
    other, bare = first.copy(), first.copy()
    other[place], other[-1] = "123456789abc", "1"
    bare[place], bare[5], bare[-1] = "", "", "1"
    assert cells(table) == [first, other, bare]
    assert look(table) == [*[(0.15, False)] * 6, (0.0, True)] and (table.name, table.title) == (
        "fingerprints",
        "Data fingerprints",
    )


def test_machines() -> None:
    moved = make_run(
        machine_classes=[{"device": "cuda"}, {"device": "cpu", "threads": 1}],
        all_versions=[{"torch": "2.0", "mainrun": "ab" * 20}],
    )
    stayed = make_run(
        seed=2, machine_classes=[{"device": "cuda"}], all_versions=[{"torch": "2.0", "mainrun": "ab" * 20}]
    )
    bare = make_run(seed=3)
    for name in ("machine_classes", "all_versions"):
        del bare.summary[name]
    table = tables.machines(make_data(Recipe("baseline", (moved, stayed, bare))))
    assert heads(table) == ["kind", "what", "runs"]
    assert cells(table) == [
        ["machine class", "device cpu, threads 1", "1"],
        ["machine class", "device cuda", "2"],
        ["versions", "torch 2.0, mainrun abababababab", "2"],
    ]
    assert look(table) == [(0.15, False), (0.77, False), (0.08, True)] and (table.name, table.title) == (
        "machines",
        "Machines and versions",
    )


# -- studies


def test_a_study_in_short() -> None:
    study = make_study(
        make_trial(0, 1.5), make_trial(1, 1.25), make_trial(2, None, "failed"),
        preset="optimized", objective="dev/full", rung_correlation={"0": 0.875, "1": None},
        ledger={"asked": 4000, "trained": 3000.0},
        study={
            "sampler": {"name": "tpe", "seed": 3},
            "budget": {"trials": 40, "tokens": None},
            "set": {},
            "seeds": [1, 2],
        },
        evidence={"claim": "trial 1 wins"},
    )  # fmt: skip
    (short,) = tables.study(study, 2)
    assert (short.name, short.title, heads(short)) == ("study_2", "In short", ["fact", "value"])
    assert cells(short) == [
        ["trials", "3: 2 done, 1 failed"],
        ["best trial", "1, value 1.2500"],
        ["preset", "optimized"],
        ["objective", "dev/full"],
        ["sampler", "name tpe, seed 3"],
        ["budget", "trials 40"],
        ["seeds", "1 2"],
        ["claim", "trial 1 wins"],
        ["steps", "asked 4,000, trained 3,000"],
        ["rung 0", "rank correlation with the last rung 0.88"],
        ["rung 1", "rank correlation with the last rung none"],
    ]
    assert look(short) == [(0.15, False), (0.85, False)]


FACTS = (
    "preset",
    "objective",
    "set",
    "sampler",
    "budget",
    "rungs",
    "engine",
    "noise",
    "seeds",
    "base",
    "claim",
    "val",
)


@pytest.mark.parametrize("name", FACTS)
def test_a_fact_of_a_study_is_shown(name: str) -> None:
    (short,) = tables.study(make_study(make_trial(0), **{name: "something"}), 1)
    assert [name, "something"] in cells(short)
    assert len(short.rows) == 4


def test_a_study_without_a_value() -> None:
    study = make_study(make_trial(0, None, "failed"), space={"lr": {"low": 0.1, "high": 1.0}})
    short, space = tables.study(study, 1)
    assert cells(short) == [["trials", "1: 1 failed"], ["steps", "not exported"]]
    assert cells(space) == [["lr", "0.1 to 1", ""]]


def test_the_bounds_of_a_study() -> None:
    space = {
        "lr": {"low": 1e-4, "high": 0.1, "log": True},
        "optimizer": {"values": ["adamw", "sgd"]},
        "depth": 3,
    }
    trials = (
        make_trial(0, 2.0, **{"params.lr": 0.5}),
        make_trial(1, 1.0, **{"params.lr": 0.0123456789, "params.optimizer": "sgd"}),
    )
    _, table = tables.study(make_study(*trials, space=space), 4)
    assert (table.name, table.title, heads(table)) == (
        "study_4_space",
        "Bounds",
        ["field", "searched", "best trial"],
    )
    assert cells(table) == [
        ["lr", "0.0001 to 0.1, logarithmic", "0.0123457"],
        ["optimizer", "one of adamw, sgd", "sgd"],
        ["depth", "3", "none"],
    ]
    assert look(table) == [(0.3, False), (0.5, False), (0.2, False)]


def test_the_confirmation_shows_forward_flops_that_differ_from_the_base() -> None:
    rows = [{"trial": 1, "mean": 1.5}, {"trial": 2, "mean": 1.6}]
    trials = [make_trial(number, forward_flops=5e6) for number in range(3)]
    _, equal = tables.study(make_study(*trials, evidence={"rows": rows}), 1)
    assert "forward\nFLOPs" not in heads(equal) and "FLOPs" not in equal.note
    assert len(cells(equal)[0]) == len(heads(equal))
    trials[0]["forward_flops"] = 4e6
    _, differing = tables.study(make_study(*trials, evidence={"rows": rows}), 1)
    assert heads(differing)[:3] == ["trial", "mean", "forward\nFLOPs"]
    assert [row[2] for row in cells(differing)] == ["5M", "5M"]
    assert differing.note.endswith("The base takes 4M forward FLOPs per token.")


def test_the_confirmation_shows_pairs_and_why_they_ended() -> None:
    rows = [
        {"trial": 6, "mean": 1.5, "claim": True, "pairs": 3, "stopped": "it is claimed"},
        {
            "trial": 7,
            "mean": 1.6,
            "claim": False,
            "why": "it is not better",
            "pairs": 2,
            "stopped": "unlikely",
        },
    ]
    facts = {"pairs": 3, "maximum": 8, "level": 0.95, "nominal_p": 0.0143}
    export = make_study(make_trial(0), evidence={"rows": rows, "sequential": facts})
    short, table = tables.study(export, 1)
    assert heads(table)[-3:] == ["pairs", "verdict", "what it sets"]
    assert [row[-3:-1] for row in cells(table)] == [
        ["3", "claimed"],
        ["2", "it is not better; unlikely"],
    ]
    assert "all numbers of pairs up to the maximum" in table.note
    fact = next(row for row in cells(short) if row[0] == "sequential")
    assert all(text in fact[1] for text in ("pairs 3", "maximum 8", "level 0.95"))


def test_the_confirmation_of_a_study() -> None:
    rows = [
        {
            "trial": 6,
            "mean": 1.51,
            "difference": -0.021,
            "interval": [-0.03, -0.012],
            "p_holm": 0.0004,
            "claim": True,
            "params": {"lr": 0.005},
        },
        {
            "trial": 7,
            "mean": 1.52,
            "difference": 0.01,
            "interval": None,
            "p_holm": 0.04,
            "claim": False,
            "why": "within noise",
            "params": None,
        },
        {"interval": [0.01, 0.02]},
        {},
        "no row",
    ]
    _, table = tables.study(make_study(make_trial(0), evidence={"rows": rows}), 1)
    assert heads(table) == ["trial", "mean", "difference", "low", "high", "p", "verdict", "what it sets"]
    assert cells(table) == [
        [
            "6",
            "1.5100",
            f"{MINUS}0.0210",
            f"{MINUS}0.0300",
            f"{MINUS}0.0120",
            "<0.001",
            "claimed",
            "lr 0.005",
        ],
        ["7", "1.5200", "+0.0100", "", "", "0.040", "within noise", "none"],
        ["", "", "", "+0.0100", "+0.0200", "", "", "none"],
        ["", "", "", "", "", "", "", "none"],
    ]
    assert look(table) == [*[(0.0, True)] * 6, (0.25, False), (0.35, False)]
    assert (table.name, table.title) == ("study_1_confirmation", "Confirmation")
    assert len(tables.study(make_study(make_trial(0), evidence={"rows": ["no row"]}), 1)) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"a": 1, "b": None, "c": "", "d": {}, "e": [], "f": 0}, "a 1, f 0"),
        ({"a": {"b": [1, "x"]}}, "a b 1 x"),
        ((1, 2.0), "1 2"),
        (False, "false"),
        (None, "none"),
    ],
)
def test_settings_in_words(settings: Any, expected: str) -> None:
    assert tables.describe(settings) == expected


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"values": [1, 2.5, None], "low": None, "high": None, "log": True}, "one of 1, 2.5, none"),
        ({"low": 0, "high": 1e-3, "log": False, "when": {}}, "0 to 0.001"),
        (
            {"low": 1, "high": 2, "log": True, "when": {"optimizer": ["adamw", "muon"]}},
            "1 to 2, logarithmic, when optimizer adamw muon",
        ),
        ({}, "none to none"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_bounds_in_words(space: Any, expected: str) -> None:
    assert tables.describe_bounds(space) == expected


def test_the_steps_of_a_run_come_from_its_summary() -> None:
    assert cells(tables.runs(make_data(make_recipe("baseline", {1: 2.0}))))[0][7] == str(STEPS)
