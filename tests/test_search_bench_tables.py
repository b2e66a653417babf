"""Tests the recorded tables: their lattice, the costs of runs, scores, the verdict, and the file."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from search_tables import SYNTHETIC, noisy, synthetic_table, truth

from mainrun.errors import RunError, UsageError
from mainrun.plan.plan import Plan
from mainrun.store import lineage
from sweeps.coordinates import Coordinates
from sweeps.frugal import recipe_key
from sweeps.search_bench.tables import DEFINITIONS, Lattice, Row, Table, definition_of
from sweeps.space import with_values


@pytest.fixture(scope="module")
def table() -> Table:
    return synthetic_table()


# -- the lattice


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_table_has_648_recipes_and_its_base_is_one_of_them(name: str) -> None:
    definition = definition_of(name)
    lattice = Lattice(definition, 34_051)
    assert len(lattice.recipes) == 648 and len(definition.seeds) == 2 and len(definition.fresh_seeds) == 5
    assert lattice.base in lattice.recipes
    assert not set(definition.seeds) & set(definition.fresh_seeds)
    assert definition.points == 28 and definition.horizons == (0.25, 0.5, 1.0)


def test_the_tables_share_no_titles_no_optimizer_and_no_seeds() -> None:
    a, b = definition_of("A"), definition_of("B")
    assert b.skipped_titles >= a.base().num_titles
    assert a.base().optimizer != b.base().optimizer
    assert not {*a.seeds, *a.fresh_seeds} & {*b.seeds, *b.fresh_seeds}


def test_a_recipe_without_a_value_has_that_of_the_base(table: Table) -> None:
    assert table.recipe({"dropout": 0.25}) == table.base | {"dropout": 0.25}
    # equal numbers of other types give equal keys
    assert table.key({"dropout": 0, "batch_size": 8.0}) == table.key({"dropout": 0.0})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dropuot": 0.1}, "the table has no field 'dropuot' (did you mean 'dropout'?)"),
        ({"lr": 0.01}, "lr=0.01 is not a value of the table; its values are [0.001,"),
    ],
)
def test_a_recipe_outside_of_the_table_is_refused(table: Table, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as e:
        table.score(values, 1.0, 1)
    assert message in str(e.value)


def test_the_study_of_a_table_searches_its_lattice_from_its_base(table: Table) -> None:
    study = table.study(lanes=3)
    assert study.sampler.lanes == 3 and study.sampler.horizons == (0.25, 0.5, 1.0)
    assert study.budget.tokens == 60 * table.whole
    coordinates = Coordinates(study.space, study.base(), table.train_tokens)
    for values in table.recipes:
        assert coordinates.decode(coordinates.encode(values)) == values
    assert not coordinates.encode(table.base).any()


# -- costs


def plan_of(table: Table, values: dict[str, Any], horizon: float = 1.0) -> Plan:
    return Plan(table.run_config(values, horizon), table.train_tokens)


def test_costs_are_those_of_real_plans(table: Table) -> None:
    assert table.whole == table.point_tokens({})[-1] == plan_of(table, {}).tokens(plan_of(table, {}).steps)
    for values in table.recipes[::7]:
        plan = Plan(with_values(table.config, values), table.train_tokens)
        steps = table.points(values)
        assert len(steps) == 28 and steps[-1] == plan.steps
        assert len({b - a for a, b in zip([0, *steps], steps[:-1], strict=False)}) == 1  # equally spaced
        assert table.point_tokens(values) == [plan.tokens(step) for step in steps]
        # the learning rate of the first step after the trunk is the first one that is lower
        shared = [step for step in range(plan.steps) if plan.at(step).lr == plan.at(plan.decay_start).lr]
        assert table.decay_tokens(values) == plan.tokens(shared[-1] + 1)
        assert table.decay_point(values) == sum(step <= shared[-1] + 1 for step in steps)


def test_recipes_with_the_same_trunk_key_share_their_states_until_the_earlier_decay(table: Table) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for values in table.recipes:
        groups.setdefault(table.trunk_key(values), []).append(values)
    assert len(groups) == 36 and {len(group) for group in groups.values()} == {4}
    group = groups[table.trunk_key({})]
    chains = [lineage.chain("00" * 32, plan_of(table, values)) for values in group]
    tokens = [table.decay_tokens(values) for values in group]
    assert tokens == sorted(tokens, reverse=True)  # the first decay has the longest trunk
    for i in range(1, 4):
        plan = plan_of(table, group[i])
        shared = sum(a == b for a, b in zip(chains[0], chains[i], strict=True)) - 1
        assert plan.tokens(shared) == tokens[i]


# -- scores


def test_the_curve_of_a_run_ends_with_its_score(table: Table) -> None:
    for values in table.recipes[::11]:
        curve = table.curve(values, 2)
        assert len(curve) == 28 and curve[-1] == table.score(values, 1.0, 2) == noisy(values, 1.0, 2)
        for horizon in (0.25, 0.5):
            assert table.score(values, horizon, 1) == noisy(values, horizon, 1)
        if curve[-1] is not None:
            steps = table.points(values)
            raw = [truth(values | table.decays[0], step / steps[-1]) + 0.05 for step in steps]
            shared = table.decay_point(values)
            assert curve[:shared] == raw[:shared]


def test_a_diverged_run_has_no_score_and_an_infinite_mean(table: Table) -> None:
    values = {"lr": 0.04, "dropout": 0.0}
    assert table.score(values, 1.0, 1) is None and table.curve(values, 1) == [None] * 28
    assert table.mean(values) == math.inf
    assert table.recipe(values) not in table.finalists


def test_the_good_recipes_are_within_a_sigma_of_the_best_mean_over_fresh_seeds(table: Table) -> None:
    fresh = table.definition.fresh_seeds
    scores = {recipe_key(v): [noisy(v, 1.0, seed) for seed in fresh] for v in table.finalists}
    assert len(scores) == 24
    means = {key: statistics.fmean(values) for key, values in scores.items()}
    sigma = math.sqrt(statistics.fmean(statistics.variance(values) for values in scores.values()))
    assert table.sigma == pytest.approx(sigma) and table.best_known == min(means.values())
    assert table.good == {key for key, mean in means.items() if mean <= table.best_known + table.sigma}
    assert all(table.mean(values) == means[recipe_key(values)] for values in table.finalists)
    other = next(v for v in table.recipes if v not in table.finalists and table.score(v, 1.0, 1))
    assert table.mean(other) == statistics.fmean([noisy(other, 1.0, seed) for seed in (1, 2)])


# -- the verdict


def test_the_verdict_says_how_many_recipes_are_good(table: Table) -> None:
    assert [line.partition(":")[0] for line in table.verdict()] == [
        "table A",
        f"{len(table.good)} recipes are good (1.4%); the base is not one of them",
    ]


def flat(values: dict[str, Any], horizon: float, seed: int) -> float:
    """Twelve recipes are equally good, which is more than 3%. Other recipes are much worse."""
    return 1.0 + 0.001 * (seed % 2) + (values["lr"] != 0.001)


def base_wins(values: dict[str, Any], horizon: float, seed: int) -> float:
    is_base = values["lr"] == 0.01913 and values["dropout"] == 0.1 and values["batch_size"] == 8
    return 1.0 + 0.001 * (seed % 2) + (not is_base or values["decay_frac"] != 0.4)


@pytest.mark.parametrize(("score", "good"), [(flat, 24), (base_wins, 1)])
def test_the_verdict_warns_of_a_table_that_is_too_easy(score: Any, good: int) -> None:
    easy = synthetic_table(score=score)
    assert len(easy.good) == good
    assert easy.verdict()[-1].startswith("the table is too easy: more than 3% of its recipes are good")


# -- the file


def test_a_table_is_read_as_it_was_written(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "A.parquet"
    table.write(path)
    read = Table.read(path)
    assert read.rows == table.rows and read.header == table.header and read.definition == SYNTHETIC
    assert read.recipes == table.recipes  # rows refer to recipes by their place
    assert [list(values) for values in read.recipes[:1]] == [list(table.choices)]
    assert (read.good, read.sigma) == (table.good, table.sigma)
    content = path.read_bytes()
    read.write(path)
    assert path.read_bytes() == content


def doctored(table: Table, path: Path, **changes: Any) -> Path:
    """Write a table with other rows or another header, but with the checksum of the original."""

    class Doctored(Table):
        checksum = table.checksum  # type: ignore[assignment]

    Doctored(changes.get("header", table.header), changes.get("rows", table.rows)).write(path)
    return path


def test_a_doctored_row_or_header_is_found_by_the_checksum(table: Table, tmp_path: Path) -> None:
    row = table.rows[100]
    assert row.dev is not None
    rows = table.rows.copy()
    rows[100] = row._replace(dev=math.nextafter(row.dev, 0))
    path = doctored(table, tmp_path / "x.parquet", rows=rows)
    message = f"{path} is damaged: its checksum differs; restore the file, or record the table again"
    with pytest.raises(RunError, match=message):
        Table.read(path)
    with pytest.raises(RunError, match="its checksum differs"):
        Table.read(doctored(table, path, header=table.header | {"versions": {"torch": "0"}}))
    assert Table.read(doctored(table, path)).rows == table.rows


def test_a_table_without_all_scores_is_refused(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    fresh = table.definition.fresh_seeds[0]
    for rows, lacking in (
        ([row for row in table.rows if row.seed < fresh], "the scores with fresh seeds"),
        (table.rows[1:], f"the scores of {table.recipes[0]} with seed 1"),
    ):
        Table(table.header, rows).write(path)
        with pytest.raises(RunError) as e:
            Table.read(path)
        assert f"it lacks {lacking}" in str(e.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"seed,trunk\n1,2\n"])
def test_another_file_is_no_table(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(RunError, match="it is not a recorded table"):
        Table.read(path)


def test_a_parquet_file_without_the_metadata_of_a_table_is_no_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"seed": [1]}), path)
    with pytest.raises(RunError, match="it is not a recorded table"):
        Table.read(path)


def test_bad_names_of_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown table 'C'; the tables are A, B"):
        definition_of("C")
    with pytest.raises(UsageError, match=r"table a\.parquet .*; give the path of a recorded table, or A, B"):
        Table.read("a.parquet")
    monkeypatch.setattr("sweeps.search_bench.tables.RECORDED", tmp_path)
    with pytest.raises(UsageError, match="table A is not recorded; record it with `mainrun bench search"):
        Table.read("A")


def test_a_name_reads_the_table_of_the_package(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.search_bench.tables.RECORDED", tmp_path)
    table.write(tmp_path / "A.parquet")
    assert Table.read("A").rows == table.rows


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_tables_of_the_package_are_intact(name: str) -> None:
    try:
        table = Table.read(name)
    except UsageError as e:
        pytest.skip(str(e))
    assert table.definition == definition_of(name)


def test_tables_need_no_torch() -> None:
    code = "import sys, sweeps.search_bench.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_the_header_contains_the_definition_as_json() -> None:
    other = replace(SYNTHETIC, name="B", horizons=(0.5, 1.0))
    table = synthetic_table(other)
    assert json.loads(json.dumps(table.header)) == table.header
    assert table.definition == other
    assert Row._fields == ("seed", "trunk", "decay", "horizon", "step", "dev")
