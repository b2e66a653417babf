"""Tests the cost of a run, computed from the rows of its metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from searching import eval_row, make_study, step_row, write_rows

from mainrun.errors import RunError
from mainrun.plan.cost import costs
from mainrun.store.rundir import RunDir
from sweeps.ledger import Ledger, run_cost, total


def cost(folder: Path, rows: list[dict[str, Any]], wasted: int | None = None, **fields: Any) -> Ledger:
    write_rows(folder, rows)
    if wasted is not None:
        (folder / "env.json").write_text(
            json.dumps({"carried": {"checkpoint": 1, "wasted": wasted, "resumed": 1}})
        )
    return run_cost(RunDir(folder), make_study(fields).base())


def step_rows(count: int, reused: int = 0, pace: int = 1) -> list[dict[str, Any]]:
    """Return a row for every `pace` steps."""
    return [step_row(step, reused=step <= reused) for step in range(pace, count + 1, pace)]


@pytest.mark.parametrize(
    ("rows", "wasted", "expected"),
    [
        pytest.param([], None, (0, 0, 0, 0, 0, 0.0), id="nothing was trained"),
        pytest.param([eval_row("dev", 1, 2.0)], None, (0, 0, 0, 0, 0, 0.0), id="an evaluation is not a step"),
        pytest.param(step_rows(1), None, (1, 1, 0, 0, 128, 0.5), id="one step"),
        pytest.param(step_rows(10), None, (10, 10, 0, 0, 1280, 5.0), id="all trained"),
        pytest.param(step_rows(10, reused=4), None, (10, 6, 4, 0, 768, 3.0), id="four steps from the store"),
        pytest.param(step_rows(10, reused=10), None, (10, 0, 10, 0, 0, 0.0), id="all steps from the store"),
        pytest.param(
            [*step_rows(4), eval_row("dev", 4, 2.0), step_row(5)],
            None,
            (5, 5, 0, 0, 640, 2.5),
            id="with evaluations",
        ),
        pytest.param(
            step_rows(10, pace=5),
            None,
            (10, 10, 0, 0, 1280, 1.0),
            id="a row covers the steps since the last row",
        ),
        pytest.param(
            step_rows(12, reused=8, pace=4),
            None,
            (12, 4, 8, 0, 512, 0.5),
            id="rows four steps apart, some reused",
        ),
        pytest.param(step_rows(10), 3, (13, 13, 0, 3, 1280 + 384, 5.0), id="steps lost with a worker"),
        pytest.param(step_rows(10, reused=4), 3, (13, 9, 4, 3, 768 + 384, 3.0), id="lost and reused steps"),
        pytest.param(step_rows(10), 0, (10, 10, 0, 0, 1280, 5.0), id="resumed without a lost step"),
        pytest.param(
            [step_row(2, 100), step_row(3, 1000)],
            2,
            (5, 5, 0, 2, 1000 + 2 * 1000 // 3, 1.0),
            id="steps of two sizes",
        ),
    ],
)
def test_the_cost_of_a_run(
    tmp_path: Path, rows: list[Any], wasted: int | None, expected: tuple[float, ...]
) -> None:
    """The cost counts all, trained, reused and wasted steps, and the tokens and seconds of trained steps."""
    ledger = cost(tmp_path, rows, wasted)
    steps = (ledger.asked, ledger.trained, ledger.reused, ledger.wasted)
    assert (*steps, ledger.tokens, ledger.seconds) == expected
    assert ledger.branch == 0 and ledger.asked == ledger.trained + ledger.reused


@pytest.mark.parametrize("passes", [1, 2])
def test_flops_count_the_trained_tokens(tmp_path: Path, passes: int) -> None:
    """R-Drop processes every token twice."""
    fields = {"rdrop": 1.0, "dropout": 0.1} if passes == 2 else {}
    ledger = cost(tmp_path, step_rows(10, reused=4), 3, **fields)
    cfg = make_study(fields).base()
    assert ledger.tokens == 768 + 384
    assert ledger.flops == ledger.tokens * passes * costs(cfg, 400)["flops_per_token"] > 0
    assert isinstance(ledger.flops, float)


def test_a_run_that_was_never_started_costs_nothing(tmp_path: Path) -> None:
    assert run_cost(RunDir(tmp_path / "none"), make_study().base()) == Ledger()


@pytest.mark.parametrize("key", ["step", "tokens", "seconds"])
def test_a_row_without_its_numbers_is_damage(tmp_path: Path, key: str) -> None:
    row = step_row(2)
    del row[key]
    with pytest.raises(RunError, match=rf"metrics\.jsonl is damaged: .*{key}"):
        cost(tmp_path, [step_row(1), row])


def test_ledgers_are_added_field_by_field() -> None:
    parts = [Ledger(13, 9, 4, 3, 2, 100, 1.5, 0.5), Ledger(1, 1, 0, 1, 1, 10, 0.25, 0.25), Ledger()]
    assert total(iter(parts)) == Ledger(14, 10, 4, 4, 3, 110, 1.75, 0.75)
    assert total([]) == Ledger(0, 0, 0, 0, 0, 0, 0.0, 0.0) == Ledger()


def test_a_ledger_cannot_be_changed() -> None:
    """Ledgers are immutable, because the driver keeps the ledgers of finished trials."""
    with pytest.raises(AttributeError):
        Ledger().asked = 1
