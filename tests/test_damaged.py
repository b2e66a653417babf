"""A command that reads a damaged file does not crash, hang or change undamaged files.

The damage is defined in damage.py, which can also run thousands of cases:

    python tests/damage.py --cases 20000 --seed 1
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import slow_unless
from damage import (
    DEEP,
    PLACES,
    ROWS,
    FixtureDirectory,
    Row,
    damage_json,
    damage_lines,
    make,
    prepare,
    prepare_row,
    replace_with,
    run_case,
)
from doors import Driver

from mainrun.errors import RunError
from mainrun.files.inputs import BadInput
from mainrun.store import records
from mainrun.store.rundir import RunDir
from reports.submission.prepare import _run_files


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> FixtureDirectory:
    folder = tmp_path_factory.mktemp("damaged")
    cache = os.environ["MAINRUN_CACHE"]
    try:
        make(folder / "made")
    finally:
        os.environ["MAINRUN_CACHE"] = cache
    return FixtureDirectory(folder / "made", folder / "copy")


@pytest.mark.parametrize("row", slow_unless(ROWS[::2], ROWS), ids=[row.name for row in ROWS])
def test_damage_that_crashed_or_hung(fixture: FixtureDirectory, driver: Driver, row: Row) -> None:
    outcome, problem = run_case(fixture, driver, prepare_row(fixture, row))
    assert not problem, f"{problem}\n{outcome.err}"
    assert outcome.code == row.code, outcome.err


def sample(fixture: FixtureDirectory, driver: Driver, seed: int, cases: int) -> None:
    """Run random cases. The message of a failed case contains the command that repeats this case."""
    for index in range(cases):
        case = prepare(fixture, seed, index)
        outcome, problem = run_case(fixture, driver, case)
        again = f"python tests/damage.py --case {case.name}"
        assert not problem, (
            f"{problem}\n{case.place}: {case.damage}\n{' '.join(case.argv)}\n{outcome.err}\n{again}"
        )


def test_random_damage(fixture: FixtureDirectory, driver: Driver) -> None:
    sample(fixture, driver, seed=0, cases=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_more_random_damage(fixture: FixtureDirectory, driver: Driver, seed: int) -> None:
    sample(fixture, driver, seed, cases=400)


def test_a_case_is_a_function_of_its_number(fixture: FixtureDirectory) -> None:
    assert prepare(fixture, 3, 7) == prepare(fixture, 3, 7)
    assert len({prepare(fixture, 3, index).place for index in range(4)}) > 1


def test_damage_leaves_the_rest_of_the_file() -> None:
    """The damage generator changes a single place of a file."""
    chance = random.Random(1)
    whole = b'{"a": 1, "b": {"c": [2]}}'
    for _ in range(200):
        assert damage_json(chance, whole)[0] != whole
        text, _ = damage_lines(chance, whole + b"\n" + whole + b"\n")
        assert text != whole + b"\n" + whole + b"\n"
        assert whole in text or b"a" in text


@pytest.mark.parametrize("name", ["meta.json", "state.safetensors"])
@pytest.mark.parametrize("what", ["missing", "a FIFO", "a folder"])
def test_a_damaged_checkpoint_cannot_be_submitted(fixture: FixtureDirectory, name: str, what: str) -> None:
    fixture.renew("runs")
    run = RunDir(fixture.place / "runs" / fixture.names["whole"])
    replace_with(max(run.checkpoints.iterdir()) / name, what)
    with pytest.raises(RunError, match=name):
        _run_files(run)


# -- the reader


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\0\0\0", "is not JSON"),
        (b"\xff\xfe{\0}\0", "is not UTF-8 text"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"9" * 5000, "5,000 digits"),
        (DEEP.encode(), "nested too deep"),
        (b"[" * 101 + b"]" * 101, "nested more than 100 levels deep"),
    ],
)
def test_an_invalid_document(data: bytes, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        records.parse(data)


def test_a_document_may_be_nested_a_hundred_deep() -> None:
    assert records.parse(b"[" * 100 + b"]" * 100)


@pytest.mark.parametrize("what", sorted(PLACES))
def test_a_path_that_is_not_a_file_is_reported_and_not_opened(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.json"
    PLACES[what](path)
    if what == "missing":
        assert records.load(path, records.table, "mend it") is None
        return
    if os.geteuid() == 0 and what == "a file that nobody may read":
        pytest.skip("root may read everything")
    with pytest.raises(RunError, match=r"x\.json is damaged: it (is|does|cannot) .*; mend it"):
        records.load(path, records.table, "mend it")


@pytest.mark.parametrize(
    ("shape", "good", "bad"),
    [
        (records.number, [0, -1.5, 1e39], [True, "1", None, float("nan"), float("inf"), 10**400, 1e41]),
        (records.any_number, [0, float("inf"), float("nan")], [True, "1", None, 10**400]),
        (records.count, [0, 10**18], [True, -1, 1.0, 10**19, "1", None]),
        (records.step, [0, 10**9], [-1, 10**9 + 1]),
        (records.at_least_one, [1], [0]),
        (records.above_zero, [1e-30, 5], [0, -1, float("inf"), "5", True]),
        (records.share, [0, 1, 0.5], [-0.1, 1.1]),
        (records.text, ["", "a ü"], [5, None, "a\nb", "\x1b[31m", "\ud800"]),
        (records.any_text, ["a\nb"], [5, None, "\ud800"]),
        (records.true_or_false, [True, False], [0, 1, "true", None]),
        (records.table, [{}], [[], None, 5]),
        ([records.count], [[], [1, 2]], [{}, [1, "x"], 5]),
        ({"a": records.count}, [{"a": 1}, {"a": 1, "b": "x"}], [{}, {"a": "x"}, [], None]),
        ({"a?": records.count}, [{}, {"a": 1}], [{"a": None}, {"a": "x"}, 5]),
        (records.optional(records.count), [None, 1], ["x"]),
        (records.table_of(records.count), [{}, {"x": 1}], [{"x": "y"}, {"a\nb": 1}, []]),
        (records.pair(records.count), [[1, 2]], [[1], [1, 2, 3], [1, "x"], 5]),
        (records.non_empty(records.count), [[1]], [[], ["x"]]),
        (records.one_of("a", "b"), ["a"], ["c", None, [], {}]),
        (records.setting, [None, True, 1, 0.5, "x"], [[], {}, float("nan"), "\ud800"]),
        (
            records.scores,
            ["{}", '{"0": 1.5}'],
            [5, "x", "[]", '{"x": 1}', '{"0": "x"}', '{"99999": 1}', '{"0": NaN}'],
        ),
        (
            records.metrics_row,
            [{"event": "step", "step": 1}],
            [{"event": "step", "step": 0}, {"event": "x"}, {"event": []}, {"step": 1}, 5, None],
        ),
    ],
)
def test_a_shape_accepts_valid_values(shape: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if records.fault(value, shape)] == []
    assert [value for value in bad if not records.fault(value, shape)] == []


def test_a_fault_names_the_path_and_the_value() -> None:
    shape = {"last": {"full": records.number}, "guards": [{"name": records.text}]}
    assert records.fault({"last": 5, "guards": []}, shape) == "has last = 5, but last must be an object"
    assert (
        records.fault({"last": {"full": "x"}}, shape) == "has last.full = 'x', but last.full must be a number"
    )
    assert records.fault({"last": {"full": 1}}, shape) == "lacks 'guards'"
    assert (
        records.fault({"last": {"full": 1}, "guards": [{"name": "a"}, {}]}, shape) == "lacks 'guards[1].name'"
    )
    assert records.fault([1], shape) == "is [1], but must be an object"


def test_a_plain_row_is_checked_quickly_and_like_any_other() -> None:
    row = {"event": "step", "step": 1, "tokens": 8, "lr": 0.1, "loss": 2.0, "grad_norm": 1.0, "seconds": 0.5}
    assert records.fault(row, records.metrics_row) == ""
    for name in row.keys() - {"event"}:
        for other in (None, "x", -1, 0, 1.5, [], True, float("nan"), 1e300, 10**30):
            changed = row | {name: other}
            assert records.fault(changed, records.metrics_row) == records.fault(changed, records.STEP_ROW)


def test_rows_are_read_up_to_the_first_damaged_one() -> None:
    rows = records.lines(
        b'{"event": "step", "step": 1}\n{"event": "step", "step": 2}\n[1]\n', records.metrics_row
    )
    assert [next(rows)["step"], next(rows)["step"]] == [1, 2]
    with pytest.raises(BadInput, match=r"line 3 is \[1\]"):
        next(rows)
