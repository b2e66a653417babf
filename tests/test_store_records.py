"""Tests which values each record shape accepts and refuses, key by key and at each limit."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mainrun.errors import RunError
from mainrun.files import inputs
from mainrun.files.inputs import BadInput
from mainrun.store import records

NAN, INFINITY = float("nan"), float("inf")

# Maps each kind of value to accepted values, which include both limits, and to refused values, which are just
# beyond the limits.
KINDS: dict[str, tuple[list[Any], list[Any]]] = {
    "count": ([0, 10**18], [-1, 10**18 + 1, 1.0, True, "1", None]),
    "first": ([1, 10**18], [0, 10**18 + 1, 1.0, True, None]),
    "step": ([0, 10**9], [-1, 10**9 + 1, 1.0, True, None]),
    "step from 1": ([1, 10**9], [0, 10**9 + 1, 1.0, True, None]),
    "change": ([0, -(10**18), 10**18], [-(10**18) - 1, 10**18 + 1, 1.0, None]),
    "train tokens": ([2, 10**13], [1, 10**13 + 1, 2.0, None]),
    "fired": ([-(10**9) - 1, 10**9], [-(10**9) - 2, 10**9 + 1, 1.0, None]),
    "number": ([0, -1e40, 1e40, 0.5], [1.1e40, -1.1e40, NAN, INFINITY, True, "1", None]),
    "positive": ([0, 0.0, 1e40], [-1e-9, 1.1e40, NAN, INFINITY, True, None]),
    "above": ([1e-30, 1, 1e40], [0, 9e-31, -1.0, 1.1e40, NAN, True, None]),
    "share": ([0, 0.5, 1], [-1e-9, 1.0000001, NAN, True, None]),
    "real": ([0, -(10**40), 1.5, NAN, INFINITY], [10**41, -(10**41), True, "1", None]),
    "text": (["", "a ü"], ["a\nb", "a\x1b", "\ud800", 5, None]),
    "any text": (["", "a\nb ü", "\ue000", "\ud7ff"], ["\ud800", "ü\udfff", 5, None]),
    "flag": ([True, False], [0, 1, "true", None]),
    "table": ([{}, {"a\n": 1}], [[], "a", None]),
    "tables": ([[], [{}]], [{}, [[]], None]),
    "some tables": ([[{}]], [[], {}, [[]], None]),
    "texts by name": ([{}, {"a": "b"}], [{"a": 1}, {"a\n": "b"}, {"a": "b\n"}, [], None]),
    "some texts by name": ([[{"a": "b"}]], [[], [{"a": 1}], {"a": "b"}, None]),
    "lists of texts by name": ([[], [{"a": "b"}]], [[{"a": 1}], {"a": "b"}, None]),
    "pair of firsts": ([[1, 2]], [[1], [1, 2, 3], [0, 1], [1, 0], "12", None]),
    "pair": ([[0, "a"]], [[0], [0, 1, 2], "ab", None]),
    "counts": ([[], [0, 1]], [[-1], 1, None]),
    "texts of any kind": ([[], ["a\nb"]], [["\ud800"], [1], "a", None]),
    "steps that fired": ([[], [-(10**9) - 1]], [[10**9 + 1], [-(10**9) - 2], 1, None]),
    "lists by name": ([{}, {"a": [1, "b"]}], [{"a": 1}, {"a\n": []}, [], None]),
    "numbers by name": ([{}, {"a": 0.0}], [{"a": -1.0}, {"a": "1"}, [], None]),
    "changes by name": ([{}, {"a": -(10**18)}], [{"a": -(10**18) - 1}, {"a": 1.0}, [], None]),
    "status": (["pass", "flag", "fail"], ["fine", "", 1, None]),
    "growth": ([{}, None, {"fired": [], "config": {}, "marks": {}}], [{"fired": []}, [1], "a"]),
    "object": ([], [[], "a", 5, None]),
    "list": ([], [{}, "a", 5, None]),
    "object or null": ([None], [[], "a", 5]),
}

SCORE = {
    "step": 1,
    "split": "val",
    "full": 1.0,
    "official": 1.0,
    "loss": 1.0,
    "bits_per_byte": 1.0,
    "coverage": 1.0,
    "tokens": 1,
}
SCORE_KINDS = {
    "step": "step",
    "split": "text",
    "full": "number",
    "official": "number",
    "loss": "number",
    "bits_per_byte": "number",
    "coverage": "share",
    "tokens": "first",
}
MARK = {"bytes": 1, "sha256": "a"}
GROWN = {"fired": [1], "applied": 1, "config": {}, "marks": {"a": [1]}}
GROWN_KINDS = {"fired": "steps that fired", "applied?": "count", "config": "table", "marks": "lists by name"}
CHECK = {"name": "a", "ok": True, "detail": "b"}
BOTH = {"last": SCORE, "best": SCORE}
STORED = {"key": "a", "before": [1, "a"], "rows": [{"event": "step", "step": 1}]}


def below(name: str, kinds: dict[str, str]) -> dict[str, str]:
    return {f"{name}.{path}": kind for path, kind in kinds.items()}


# Maps each record shape to a document with all keys, and to the kind of value at each path. A kind that ends
# with "?" belongs to an optional key.
DOCUMENTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "SCORE": (SCORE, SCORE_KINDS),
    "STEP_ROW": (
        {"step": 1, "tokens": 1, "lr": 1.0, "loss": 1.0, "grad_norm": 1.0, "seconds": 1.0, "reused": True},
        {
            "step": "step from 1",
            "tokens?": "count",
            "lr?": "number",
            "loss?": "number",
            "grad_norm?": "real",
            "seconds?": "positive",
            "reused?": "flag",
        },
    ),
    "EVAL_ROW": (
        SCORE | {"seconds": 1.0, "params": 1, "active": 1, "flops": 1.0, "reused": True},
        SCORE_KINDS
        | {
            "seconds?": "positive",
            "params?": "count",
            "active?": "count",
            "flops?": "positive",
            "reused?": "flag",
        },
    ),
    "SUMMARY": (
        {
            "run": "a",
            "preset": "a",
            "steps": 1,
            "last": SCORE,
            "best": SCORE,
            "scores": {"val": BOTH, "dev": BOTH},
            "member_scores": {"val": [1.0], "dev": [1.0]},
            "params": 1,
            "tokens": 1,
            "flops": 1.0,
            "seconds": 1.0,
            "tokens_per_s": 1.0,
            "geometry": [1, 1],
            "ledger": {"asked": 1, "trained": 1, "reused": 1, "wasted": 1},
            "presentations": {"presentations_per_token": 1.0, "train_tokens_per_epoch": 1},
            "fingerprints": {},
            "origin": {},
            "tokenizer": "a",
            "weights": "a",
            "machine_class": {},
            "machine_classes": [{}],
            "versions": {},
            "all_versions": [{}],
            "guards": [{"name": "a", "status": "pass", "detail": "a"}],
        },
        {
            "run?": "text",
            "preset?": "text",
            "steps?": "first",
            "last?": "object",
            "best?": "object",
            "scores?": "object",
            "scores.val?": "object",
            "scores.dev?": "object",
            "scores.val.last": "object",
            "scores.val.best": "object",
            "scores.dev.last.full": "number",
            "member_scores?": "object",
            "member_scores.val": "list",
            "member_scores.dev?": "list",
            "member_scores.val.0": "number",
            "last.full": "number",
            "best.full": "number",
            "params?": "first",
            "tokens?": "first",
            "flops?": "above",
            "seconds?": "above",
            "tokens_per_s?": "positive",
            "geometry?": "pair of firsts",
            "ledger?": "object",
            "presentations?": "object",
            "presentations.presentations_per_token": "positive",
            "presentations.train_tokens_per_epoch?": "first",
            "fingerprints?": "texts by name",
            "origin?": "table",
            "tokenizer?": "text",
            "weights?": "text",
            "machine_class?": "table",
            "machine_classes?": "tables",
            "versions?": "texts by name",
            "all_versions?": "lists of texts by name",
            "guards?": "list",
            "guards.0": "object",
            "guards.0.name": "text",
            "guards.0.status": "status",
            "guards.0.detail": "any text",
        }
        | below("ledger", {"asked?": "count", "trained?": "count", "reused?": "count", "wasted?": "count"}),
    ),
    "STATUS": ({"state": "a", "step": 1}, {"state?": "text", "step?": "step"}),
    "ENV": (
        {
            "machine_class": {},
            "versions": {},
            "evaluate_hash": "a",
            "command": ["a"],
            "machine_classes": [{}],
            "all_versions": [{}],
            "carried": {"checkpoint": 1, "wasted": 1, "resumed": 1},
        },
        {
            "machine_class?": "table",
            "versions?": "texts by name",
            "evaluate_hash?": "text",
            "command?": "texts of any kind",
            "machine_classes?": "some tables",
            "all_versions?": "some texts by name",
            "carried?": "object",
        }
        | below("carried", {"checkpoint": "step", "wasted": "change", "resumed": "count"}),
    ),
    "CONFIG": (
        {"config": {}, "plan": {"train_tokens": 2}},
        {"config": "table", "plan?": "object", "plan.train_tokens?": "train tokens"},
    ),
    "CHECK": (CHECK, {"name": "text", "ok": "flag", "detail": "any text"}),
    "EVENT": (
        {
            "event": "op",
            "op": "a",
            "name": "a",
            "step": 1,
            "tokens": 1,
            "params": 1,
            "active": 1,
            "flops_per_token": 1.0,
            "delta_logits": 1.0,
            "largest_logit": 1.0,
            "coverage": 1.0,
            "checks": [CHECK],
            "seconds": 1.0,
        },
        {
            "event": "text",
            "op": "any text",
            "name": "text",
            "step": "step",
            "tokens?": "count",
            "params?": "count",
            "active?": "count",
            "flops_per_token?": "positive",
            "delta_logits?": "real",
            "largest_logit?": "real",
            "coverage?": "real",
            "checks?": "list",
            "checks.0.ok": "flag",
            "seconds?": "positive",
        },
    ),
    "MARK": (MARK, {"bytes": "count", "sha256": "text"}),
    "GROWTH_STATE": (GROWN, GROWN_KINDS | {"fired.0": "fired"}),
    "CHECKPOINT": (
        {
            "step": 1,
            "digest": "a",
            "metrics": MARK,
            "journal": MARK,
            "resumed": 1,
            "presented": 1,
            "spent": {"a": 1.0},
            "ledger": {"a": 1},
            "growth": GROWN,
            "store": STORED,
        },
        {
            "step": "step",
            "digest": "text",
            "metrics": "object",
            "journal?": "object or null",
            "resumed": "count",
            "presented": "count",
            "spent": "numbers by name",
            "ledger?": "changes by name",
            "growth?": "growth",
            "store?": "object or null",
            "metrics.bytes": "count",
            "journal.sha256": "text",
        }
        | below(
            "store",
            {
                "key": "text",
                "before": "pair",
                "rows": "list",
                "rows.0": "object",
                "rows.0.step": "step from 1",
            },
        ),
    ),
    "NODE": (
        {
            "key": "a",
            "parent": "a",
            "root": "a",
            "step": 1,
            "begins": 0,
            "presented": 1,
            "state": "a",
            "size": 1,
            "geometry": [1, 2],
            "seconds": 1.0,
            "run": "a",
            "config": {},
            "made": 1.0,
            "rows_sha256": "a",
            "grown": GROWN,
        },
        {
            "key": "text",
            "parent": "text",
            "root": "text",
            "step": "step",
            "begins": "step",
            "presented": "count",
            "state": "text",
            "size": "count",
            "geometry": "counts",
            "seconds": "positive",
            "run": "text",
            "config": "table",
            "made": "number",
            "rows_sha256": "text",
            "grown?": "growth",
        },
    ),
}
PATHS = [(shape, path, kind) for shape, (_, kinds) in DOCUMENTS.items() for path, kind in kinds.items()]


def place_of(document: Any, path: str) -> tuple[Any, Any]:
    """Return the container of the value at a path, and the value's key in that container."""
    *way, last = [int(part) if part.isdecimal() else part for part in path.removesuffix("?").split(".")]
    for part in way:
        document = document[part]
    return document, last


def changed(shape: str, path: str, value: Any) -> Any:
    document = json.loads(json.dumps(DOCUMENTS[shape][0]))
    holder, key = place_of(document, path)
    holder[key] = value
    return document


def written(path: str) -> str:
    """Return a path in the notation of messages: guards.0.name becomes guards[0].name."""
    return "".join(
        f"[{part}]" if part.isdecimal() else f".{part}" for part in path.removesuffix("?").split(".")
    ).removeprefix(".")


@pytest.mark.parametrize("shape", DOCUMENTS)
def test_each_shape_accepts_a_full_document_and_no_other_type(shape: str) -> None:
    assert records.fault(DOCUMENTS[shape][0], getattr(records, shape)) == ""
    assert records.fault(DOCUMENTS[shape][0] | {"another key": 1}, getattr(records, shape)) == ""
    for value in ([], "a", 5, None):
        assert "an object" in records.fault(value, getattr(records, shape))


@pytest.mark.parametrize(("shape", "path", "kind"), PATHS)
def test_each_key_accepts_its_values_and_refuses_near_misses(shape: str, path: str, kind: str) -> None:
    accepted, refused = KINDS[kind]
    for value in accepted:
        assert records.fault(changed(shape, path, value), getattr(records, shape)) == "", f"{value!r:.80}"
    for value in refused:
        assert written(path) in records.fault(changed(shape, path, value), getattr(records, shape)), (
            f"{value!r:.80}"
        )


@pytest.mark.parametrize(
    ("shape", "path"), [(shape, path) for shape, path, _ in PATHS if not path.endswith("0")]
)
def test_only_optional_keys_may_be_missing(shape: str, path: str) -> None:
    document = json.loads(json.dumps(DOCUMENTS[shape][0]))
    holder, key = place_of(document, path)
    del holder[key]
    fault = records.fault(document, getattr(records, shape))
    assert fault == "" if path.endswith("?") else fault == f"lacks {written(path)!r}"


# -- single checks


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        (records.number, "number"),
        (records.above_zero, "above"),
        (records.integer, "count"),
        (records.any_number, "real"),
        (records.text, "text"),
        (records.any_text, "any text"),
        (records.true_or_false, "flag"),
        (records.table, "table"),
        (records.pair(records.anything), "pair"),
        (records.growth_state, "growth"),
        (records.at_least_one, "first"),
        (records.count, "count"),
        (records.step, "step"),
        (records.share, "share"),
    ],
)
def test_each_check_accepts_up_to_its_limits(check: Any, kind: str) -> None:
    accepted, refused = KINDS[kind]
    for value in accepted:
        check(value, "x")
    for value in refused:
        with pytest.raises(BadInput):
            check(value, "x")


@pytest.mark.parametrize("value", ["", "a\nb", None, True, False, 0, -1e40, 1e40])
def test_a_setting_is_a_text_a_number_a_flag_or_null(value: Any) -> None:
    records.setting(value, "x")


@pytest.mark.parametrize("value", ["\ud800", [], {}, NAN, 1.1e40])
def test_other_values_are_not_settings(value: Any) -> None:
    with pytest.raises(BadInput, match="x"):
        records.setting(value, "x")


@pytest.mark.parametrize("value", ["{}", '{"0": 1.5}', '{"999": -1e40, "1": 0}'])
def test_scores_are_numbers_by_rung(value: str) -> None:
    records.scores(value, "x")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "[]",
        '{"1000": 1}',
        '{"x": 1}',
        '{"0": 1, "x": 1}',
        '{"-1": 1}',
        '{"0": "1"}',
        '{"0": NaN}',
        "{",
        5,
    ],
)
def test_other_values_are_not_scores(value: Any) -> None:
    with pytest.raises(BadInput, match="x"):
        records.scores(value, "x")


@pytest.mark.parametrize(
    ("value", "check", "words"),
    [
        (-1, records.share, "a number from 0 to 1"),
        (-1, records.not_negative, "a number from 0 on"),
        ("a", records.number, "a number$"),
        (-1, records.integer, "a whole number from 0 on"),
        (-1, records.step, "a whole number from 0 to 1e.09"),
        (0, records.above_zero, "a number above 0"),
        ("a", records.any_number, "a number$"),
        (True, records.any_number, "a number$"),
        (5, records.text, "a text on one line"),
        (5, records.any_text, "a text$"),
        (5, records.true_or_false, "true or false"),
        (5, records.table, "an object"),
        (5, records.one_of("a", "b"), "one of a, b"),
        ([1], records.pair(records.anything), "a list of two items"),
        ([], records.non_empty(records.anything), "a list with at least one item"),
        ("[", records.scores, "scores by rung"),
        (5, [records.anything], "a list"),
        (5, {"a": records.anything}, "an object"),
    ],
)
def test_a_message_says_what_the_value_must_be(value: Any, check: Any, words: str) -> None:
    with pytest.raises(BadInput, match=f"x.*must be {words}"):
        records.check(value, check, "x")


def test_a_message_without_a_name_is_about_the_file() -> None:
    fault = records.fault(5, records.SUMMARY)
    assert "5" in fault and "must be an object" in fault and "has" not in fault


@pytest.mark.parametrize(("length", "whole"), [(58, True), (59, False)])
def test_a_message_shows_sixty_characters_of_the_value(length: int, whole: bool) -> None:
    fault = records.fault({"x": "a" * length}, {"x": records.number})
    assert ("a" * length in fault) is whole


def test_a_message_cuts_a_long_value_to_sixty_characters() -> None:
    fault = records.fault({"x": "a" * 1000}, {"x": records.number})
    assert fault.count("a" * 19) >= 2 and inputs.shown("a" * 1000, 60) in fault


def test_a_message_names_the_path_to_the_value() -> None:
    shape = {"a": {"b": [records.table_of(records.number)]}}
    assert "a.b[1].c" in records.fault({"a": {"b": [{}, {"c": "d"}]}}, shape)
    assert records.fault({"a": {}}, shape) == "lacks 'a.b'"
    assert "the key 'c\\n' of the top" in records.fault({"c\n": 1}, records.table_of(records.number))
    assert "the key 'c\\n' of a.b[0]" in records.fault({"a": {"b": [{"c\n": 1}]}}, shape)


# -- rows of a log

STEP = {"event": "step", "step": 1, "tokens": 1, "lr": 0.1, "loss": 1.0, "grad_norm": 1.0, "seconds": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reused": True},
        {"step": 10**9},
        {"tokens": 0},
        {"tokens": 10**18},
        {"loss": 0.0},
        {"loss": 1e40},
        {"lr": 0.0},
        {"lr": 1e40},
        {"grad_norm": 1e40},
        {"seconds": 0.0},
    ],
)
def test_the_quick_check_accepts_ordinary_steps(changes: dict[str, Any]) -> None:
    assert records._is_plain_step(STEP | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"event": "eval"},
        {"event": None},
        {"reused": False},
        {"reused": 1},
        {"step": 0},
        {"step": 10**9 + 1},
        {"step": 1.0},
        {"step": True},
        {"tokens": -1},
        {"tokens": 10**18 + 1},
        {"tokens": 1.0},
        {"tokens": None},
        {"lr": -0.1},
        {"lr": 1.1e40},
        {"loss": NAN},
        {"loss": 1},
        {"loss": None},
        {"grad_norm": INFINITY},
        {"seconds": -1.0},
        {"seconds": "1"},
    ],
)
def test_the_quick_check_accepts_nothing_else(changes: dict[str, Any]) -> None:
    assert not records._is_plain_step(STEP | changes)


@pytest.mark.parametrize("name", ["event", "step", "tokens", "lr", "loss", "grad_norm", "seconds"])
def test_the_quick_check_needs_each_figure(name: str) -> None:
    assert not records._is_plain_step({key: value for key, value in STEP.items() if key != name})
    assert not records._is_plain_step([STEP])


EVENT = {"event": "grow", "op": "a", "name": "b", "step": 0}


@pytest.mark.parametrize(
    ("row", "metric", "words"),
    [
        (STEP, True, ""),
        ({"event": "step", "step": 1}, True, ""),
        ({"event": "step", "step": 1, "reused": False}, True, ""),
        (STEP | {"grad_norms": {"embedding": 0.5, "block_0": 0.0, "head": 0.5}}, True, ""),
        (STEP | {"grad_norms": {"embedding": -0.5}}, True, "grad_norms.embedding"),
        (STEP | {"grad_norms": [0.5]}, True, "grad_norms"),
        ({"event": "step"}, True, "lacks 'step'"),
        ({"event": "step", "step": 0}, True, "step"),
        (SCORE | {"event": "eval"}, True, ""),
        (SCORE | {"event": "eval", "step": 0}, True, ""),
        ({"event": "eval", "step": 1}, True, "lacks 'split'"),
        (EVENT, False, "event"),
        ({"step": 1}, False, "lacks 'event'"),
        ({"event": 5}, False, "event"),
        ([], False, "an object"),
    ],
)
def test_a_row_has_the_keys_of_its_event(row: Any, metric: bool, words: str) -> None:
    assert words in records.fault(row, records.metrics_row) and bool(words) == bool(
        records.fault(row, records.metrics_row)
    )
    if metric:
        assert records.fault(row, records.any_row) == records.fault(row, records.metrics_row)


@pytest.mark.parametrize(
    ("row", "fits"),
    [
        (EVENT, True),
        (EVENT | {"op": 5}, False),
        ({"event": "grow"}, False),
        ({"event": 5}, False),
        (5, False),
    ],
)
def test_any_other_row_is_a_growth_event(row: Any, fits: bool) -> None:
    assert (records.fault(row, records.any_row) == "") is fits


ROW = b'{"event": "step", "step": 1}'


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"", 0),
        (b"\n", 0),
        (ROW, 0),
        (ROW + b"\n", 1),
        (ROW + b"\n" + ROW, 1),
        (ROW + b"\n" + ROW + b"\n", 2),
    ],
)
def test_only_complete_lines_are_rows(data: bytes, count: int) -> None:
    assert list(records.lines(data, records.metrics_row)) == [json.loads(ROW)] * count


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"", "is not JSON"),
        (b"[" * sys.getrecursionlimit() * 100, "is not JSON"),
        (b"9" * 5000, "is not JSON: .*5,000 digits"),
        (b'{"event": "step"}', "lacks 'step'"),
    ],
    ids=["torn", "not UTF-8", "empty", "deep", "long", "without a step"],
)
def test_the_first_line_that_does_not_fit_is_reported(line: bytes, words: str) -> None:
    rows = records.lines((ROW + b"\n") * 1000 + line + b"\n" + ROW + b"\n", records.metrics_row)
    assert len(list(itertools.islice(rows, 1000))) == 1000
    with pytest.raises(BadInput, match=f"^line 1,001 {words}"):
        next(rows)


# -- files


def test_a_pipe_is_refused_and_a_folder_raises_pythons_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(inputs.NotAFile, match="it is a named pipe") as e:
        inputs.open_file(tmp_path / "pipe")
    assert e.value.errno == errno.EINVAL and e.value.filename == str(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        inputs.open_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        inputs.open_file(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"a\r\nb")
    with inputs.open_file(tmp_path / "file") as f:
        assert f.read() == b"a\r\nb"


def test_only_a_missing_file_reads_as_none(tmp_path: Path) -> None:
    assert records.read(tmp_path / "none") is None
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(BadInput, match=r"^does not exist$"):
        records.read(tmp_path / "link")
    with pytest.raises(BadInput, match=r"^is a folder$"):
        records.read(tmp_path)
    (tmp_path / "file").write_bytes(b"12345")
    assert records.read(tmp_path / "file", 5) == b"12345"
    with pytest.raises(BadInput, match="5 bytes"):
        records.read(tmp_path / "file", 4)


def test_documents_and_logs_have_their_own_size_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def read_bytes(path: Path, largest: int) -> bytes:
        limits.append(largest)
        return b"{}\n"

    monkeypatch.setattr(inputs, "read_bytes", read_bytes)
    (tmp_path / "a").touch()
    records.read(tmp_path / "a")
    records.load(tmp_path / "a", {}, "fix")
    records.load(tmp_path / "a", {}, "fix", largest=7)
    records.load_lines(tmp_path / "a", {}, "fix")
    assert limits == [500_000_000, 500_000_000, 7, 4_000_000_000]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff", "is not UTF-8 text: .* at byte 0"),
        (b" " * 1000 + b"\xff", "at byte 1,000"),
        (b"{", "is not JSON"),
        (b"9" * 5000, "is not JSON: .*5,000 digits"),
        (b"[" * 101 + b"]" * 101, "more than 100 levels"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "more than 100 levels"),
        (b"[" * sys.getrecursionlimit() * 100, "is not JSON"),
    ],
    ids=["not UTF-8", "not UTF-8 further on", "torn", "long", "deep lists", "deep tables", "deeper"],
)
def test_an_invalid_document_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        records.parse(data)


@pytest.mark.parametrize(
    "data", [b"[" * 100 + b"]" * 100, b'{"a":' * 99 + b"[]" + b"}" * 99, b"5", b'"\xc3\xbc"']
)
def test_a_document_may_be_a_hundred_levels_deep(data: bytes) -> None:
    assert records.parse(data) == json.loads(data)


FIX = "fetch another"


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "it is not JSON"), ("[]", "it .*an object"), ('{"a": 5}', "it .*a text"), ("{}", "it lacks 'a'")],
)
def test_a_damaged_document_is_reported_with_the_fix(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RunError, match=rf"^{tmp_path}/a.json is damaged: {words}.*; {FIX}$"):
        records.load(tmp_path / "a.json", {"a": records.text}, FIX)


def test_an_intact_document_is_loaded(tmp_path: Path) -> None:
    assert records.load(tmp_path / "a.json", {"a": records.text}, FIX) is None
    (tmp_path / "a.json").write_text('{"a": "b", "c": 1}')
    assert records.load(tmp_path / "a.json", {"a": records.text}, FIX) == {"a": "b", "c": 1}


def test_a_log_is_loaded_line_by_line(tmp_path: Path) -> None:
    assert records.load_lines(tmp_path / "a.jsonl", records.table, FIX) == []
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": 2}\n{"c"')
    assert records.load_lines(tmp_path / "a.jsonl", records.table, FIX) == [{"a": 1}, {"b": 2}]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n5\n')
    with pytest.raises(RunError, match=rf"^{tmp_path}/a.jsonl is damaged: line 2 .*an object; {FIX}$"):
        records.load_lines(tmp_path / "a.jsonl", records.table, FIX)
    with pytest.raises(RunError, match=rf"^{tmp_path} is damaged: it is a folder; {FIX}$"):
        records.load_lines(tmp_path, records.table, FIX)


@pytest.mark.parametrize("value", [0, "", [], False])
def test_a_growth_state_is_an_object_or_null(value: Any) -> None:
    assert (
        records.fault(value, records.growth_state)
        and not records.fault({}, records.growth_state)
        and not records.fault(None, records.growth_state)
    )
