"""Read and validate JSON files.

Pipes and huge files are refused, and every value is checked against a shape. A shape is a dict, a list, or a
function that checks a value. A shape that is a dict maps each key to the shape of its value, and a key that
ends with "?" is optional. A shape that is a list contains one shape, which all items must have. A value that
does not fit its shape raises `BadInput`. The error message is a predicate such as "is not JSON", so that a
caller can put the file name before it. This module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mainrun.errors import RunError
from mainrun.files import inputs
from mainrun.files.inputs import BadInput, shown
from mainrun.plan.routing import STATS

LARGEST = 4_000_000_000  # the maximum size of a log, in bytes
LARGEST_DOCUMENT = 500_000_000  # the maximum size of a JSON document, in bytes
DEEPEST = 100  # the maximum number of nested lists and objects
MAX_COUNT = 10**18
MAX_NUMBER = 1e40  # a limit above every float32 number, whose square is still finite in float64

Shape = Callable[[Any, str], None] | Mapping[str, Any] | list[Any]


# -- reading


def read(path: Path, largest: int = LARGEST_DOCUMENT) -> bytes | None:
    """Return the bytes of a file, or None if the file does not exist."""
    if not path.exists() and not path.is_symlink():
        return None
    try:
        return inputs.read_bytes(path, largest)
    except BadInput as e:
        raise BadInput(str(e).partition("; ")[0]) from None


def parse(data: bytes) -> Any:
    """Parse a JSON document that is encoded in UTF-8. Raise BadInput if the document is not valid."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise BadInput(f"is not UTF-8 text: {e.reason} at byte {e.start:,}") from None
    except (ValueError, RecursionError) as e:
        raise BadInput(f"is not JSON: {inputs.parser_message(e)}") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [item for container in level for item in _items(container)]
        if not level:
            return
    raise BadInput(f"is nested more than {DEEPEST} levels deep")


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list):
        return value
    return ()


def load(path: Path, shape: Shape, fix: str, *, largest: int = LARGEST_DOCUMENT) -> Any:
    """Read a JSON file and check its shape. Return None if the file does not exist.

    fix: advice on how to repair the file. If the file is damaged, the message of the RunError contains this
    advice.
    """
    try:
        data = read(path, largest)
        if data is None:
            return None
        value = parse(data)
        check(value, shape)
    except BadInput as e:
        raise RunError(f"{path} is damaged: it {e}; {fix}") from None
    return value


def load_lines(path: Path, shape: Shape, fix: str) -> list[dict[str, Any]]:
    """Return the rows of a log, which has one JSON object per line.

    If the file does not exist, the returned list is empty. A last line without a newline is ignored, because
    a killed process may leave an incomplete line.
    """
    try:
        data = read(path, LARGEST) or b""
    except BadInput as e:
        raise RunError(f"{path} is damaged: it {e}; {fix}") from None
    try:
        return list(lines(data, shape))
    except BadInput as e:
        raise RunError(f"{path} is damaged: {e}; {fix}") from None


def lines(data: bytes, shape: Shape) -> Iterator[dict[str, Any]]:
    """Yield each row of a log. Raise BadInput at the first row that does not fit the shape."""
    complete = data.rpartition(b"\n")[0]
    if not complete:
        return
    for number, line in enumerate(complete.split(b"\n"), 1):
        try:
            row = json.loads(line.decode("utf-8"))
            check(row, shape)
        except BadInput as e:
            raise BadInput(f"line {number:,} {e}") from None
        except (ValueError, RecursionError) as e:
            raise BadInput(f"line {number:,} is not JSON: {inputs.parser_message(e)}") from None
        yield row


# -- checking


def check(value: Any, shape: Shape, name: str = "") -> None:
    """Raise BadInput if a value does not fit its shape.

    name: the path of the value within the file. The error message shows this path.
    """
    if callable(shape):
        shape(value, name)
    elif isinstance(shape, list):
        _check_items(value, shape[0], name)
    else:
        _check_keys(value, shape, name)


def fault(value: Any, shape: Shape) -> str:
    """Return the reason why a value does not fit its shape, or an empty string."""
    try:
        check(value, shape)
    except BadInput as e:
        return str(e)
    return ""


def _check_items(value: Any, shape: Shape, name: str) -> None:
    if not isinstance(value, list):
        raise _fault(value, name, "a list")
    for index, item in enumerate(value):
        check(item, shape, f"{name}[{index}]")


def _check_keys(value: Any, shapes: Mapping[str, Any], name: str) -> None:
    if not isinstance(value, dict):
        raise _fault(value, name, "an object")
    for key, shape in shapes.items():
        required = not key.endswith("?")
        key = key.removesuffix("?")
        inner = f"{name}.{key}" if name else key
        if key in value:
            check(value[key], shape, inner)
        elif required:
            raise BadInput(f"lacks {inner!r}")


def _fault(value: Any, name: str, allowed: str) -> BadInput:
    got = shown(value, 60)
    if not name:
        return BadInput(f"is {got}, but must be {allowed}")
    return BadInput(f"has {name} = {got}, but {name} must be {allowed}")


def number(value: Any, name: str, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> None:
    """Check that a value is a finite number between `low` and `high`."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise _fault(value, name, _between("a number", low, high))


def above_zero(value: Any, name: str) -> None:
    """Check that a value is a number above 0 that is not too small to divide by."""
    if type(value) not in (int, float) or not 1e-30 <= value <= MAX_NUMBER:
        raise _fault(value, name, "a number above 0")


def integer(value: Any, name: str, low: int = 0, high: int = MAX_COUNT) -> None:
    """Check that a value is an integer between `low` and `high`."""
    if type(value) is not int or not low <= value <= high:
        raise _fault(value, name, _between("a whole number", low, high))


def _between(what: str, low: float, high: float) -> str:
    if high < min(MAX_COUNT, MAX_NUMBER):
        return f"{what} from {low:g} to {high:g}"
    if low > -MAX_NUMBER:
        return f"{what} from {low:g} on"
    return what


def any_number(value: Any, name: str) -> None:
    """Check that a value is a number, which may be infinite or NaN."""
    if type(value) is int:
        number(value, name)
    elif type(value) is not float:
        raise _fault(value, name, "a number")


def text(value: Any, name: str) -> None:
    """Check that a value is a one-line string without control characters."""
    if not isinstance(value, str) or inputs.printable(value) != value:
        raise _fault(value, name, "a text on one line")


def any_text(value: Any, name: str) -> None:
    """Check that a value is a string that can be encoded in UTF-8."""
    if not isinstance(value, str) or has_surrogates(value):
        raise _fault(value, name, "a text")


def has_surrogates(value: str) -> bool:
    """Return whether a string contains a lone surrogate, which cannot be encoded in UTF-8."""
    return not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)


def true_or_false(value: Any, name: str) -> None:
    """Check that a value is a boolean."""
    if type(value) is not bool:
        raise _fault(value, name, "true or false")


def table(value: Any, name: str) -> None:
    """Check that a value is a JSON object, which may have any keys and values."""
    if not isinstance(value, dict):
        raise _fault(value, name, "an object")


def anything(value: Any, name: str) -> None:
    """Accept any value. This shape is for values that are only shown or compared."""


def setting(value: Any, name: str) -> None:
    """Check that a value is null, or a value that a search space can give to a config field."""
    if isinstance(value, str):
        any_text(value, name)
    elif value is not None and type(value) is not bool:
        number(value, name)


def one_of(*allowed: str) -> Shape:
    """Return a shape that accepts only the given strings."""

    def shape(value: Any, name: str) -> None:
        if value not in allowed:
            raise _fault(value, name, "one of " + ", ".join(allowed))

    return shape


def optional(shape: Shape) -> Shape:
    """Return a shape that accepts null and every value that the given shape accepts."""

    def shape_or_null(value: Any, name: str) -> None:
        if value is not None:
            check(value, shape, name)

    return shape_or_null


def table_of(shape: Shape) -> Shape:
    """Return a shape for a JSON object with any keys, whose values must all have the given shape."""

    def all_of(value: Any, name: str) -> None:
        table(value, name)
        for key, inner in value.items():
            text(key, f"the key {key!r:.60} of {name or 'the top'}")
            check(inner, shape, f"{name}.{key}")

    return all_of


def pair(shape: Shape) -> Shape:
    """Return a shape for a list of exactly two items, which must both have the given shape."""

    def both(value: Any, name: str) -> None:
        check(value, [shape], name)
        if len(value) != 2:
            raise _fault(value, name, "a list of two items")

    return both


def non_empty(shape: Shape) -> Shape:
    """Return a shape for a non-empty list, whose items must all have the given shape."""

    def items(value: Any, name: str) -> None:
        check(value, [shape], name)
        if not value:
            raise _fault(value, name, "a list with at least one item")

    return items


def scores(value: Any, name: str) -> None:
    """Check that a value is a string that contains a JSON object, which maps rungs to scores.

    The scores are stored as a string, because Parquet cannot store an object with arbitrary keys.
    """
    any_text(value, name)
    try:
        by_rung = parse(value.encode())
        check(by_rung, table_of(number), name)
    except BadInput:
        raise _fault(value, name, "scores by rung") from None
    if not all(key.isdecimal() and len(key) < 4 for key in by_rung):
        raise _fault(value, name, "scores by rung")


# -- the files of a run directory

LAST_STEP = 10**9

step = partial(integer, high=LAST_STEP)
count = integer
at_least_one = partial(integer, low=1)
not_negative = partial(number, low=0.0)
share = partial(number, low=0.0, high=1.0)

SCORE = {
    "step": step,
    "split": text,
    "full": number,
    "official": number,
    "loss": number,
    "bits_per_byte": number,
    "coverage": share,
    "tokens": at_least_one,
    "alone?": number,
}
STEP_ROW = {
    "step": partial(step, low=1),
    "tokens?": count,
    "lr?": number,
    "loss?": number,
    "grad_norm?": any_number,
    "seconds?": not_negative,
    "reused?": true_or_false,
    "aux?": table_of(any_number),
    "grad_norms?": table_of(not_negative),
    "routers?": [{"layer": count, **dict.fromkeys(STATS, any_number)}],
}
EVAL_ROW = SCORE | {
    "alone_loss?": number,
    "seconds?": not_negative,
    "params?": count,
    "active?": count,
    "flops?": not_negative,
    "reused?": true_or_false,
    "routers?": [{"layer": count, "selected": share}],
}
ROUTING = {
    "letters": text,
    "capacity": share,
    "selected": [share],
    "student_accuracy": [share],
    "topk_loss": number,
    "forward_flops": not_negative,
    "forward_flops_dense": not_negative,
}
BOTH = {"last": SCORE, "best": SCORE}
SUMMARY = {
    "run?": text,
    "preset?": text,
    "steps?": at_least_one,
    "last?": SCORE,
    "best?": SCORE,
    "scores?": {"val?": BOTH, "dev?": BOTH},
    "member_scores?": {"val": [number], "dev?": [number]},
    "params?": at_least_one,
    "ngram_entries?": at_least_one,
    "tokens?": at_least_one,
    "flops?": above_zero,
    "seconds?": above_zero,
    "tokens_per_s?": not_negative,
    "geometry?": pair(at_least_one),
    "ledger?": {"asked?": count, "trained?": count, "reused?": count, "wasted?": count},
    "routing?": ROUTING,
    "segments?": [{"flops_per_token": not_negative}],
    "presentations?": {
        "presentations_per_token": not_negative,
        "train_tokens_per_epoch?": at_least_one,
        "forward_passes?": at_least_one,
        "ensemble_members?": at_least_one,
    },
    "fingerprints?": table_of(text),
    "origin?": table,
    "start?": optional({"source": any_text, "digest": text}),
    "tokenizer?": text,
    "weights?": text,
    "machine_class?": table,
    "machine_classes?": [table],
    "versions?": table_of(text),
    "all_versions?": [table_of(text)],
    "guards?": [{"name": text, "status": one_of("pass", "flag", "fail"), "detail": any_text}],
}
STATUS = {"state?": text, "step?": step}
ENV = {
    "machine_class?": table,
    "versions?": table_of(text),
    "evaluate_hash?": text,
    "command?": [any_text],
    "machine_classes?": non_empty(table),
    "all_versions?": non_empty(table_of(text)),
    "carried?": {"checkpoint": step, "wasted": partial(integer, low=-MAX_COUNT), "resumed": count},
}
CONFIG = {"config": table, "plan?": {"train_tokens?": partial(integer, low=2, high=10**13)}}
CHECK = {"name": text, "ok": true_or_false, "detail": any_text}
EVENT = {
    "event": text,
    "op": any_text,
    "name": text,
    "step": step,
    "tokens?": count,
    "params?": count,
    "active?": count,
    "flops_per_token?": not_negative,
    "delta_logits?": any_number,
    "largest_logit?": any_number,
    "coverage?": any_number,
    "checks?": [CHECK],
    "seconds?": not_negative,
}


def metrics_row(value: Any, name: str) -> None:
    """Check that a value is a row of metrics.jsonl."""
    if _is_plain_step(value):
        return
    check(value, {"event": one_of("step", "eval")}, name)
    if value["event"] == "step":
        check(value, STEP_ROW, name)
    else:
        check(value, EVAL_ROW, name)


def _is_plain_step(row: Any) -> bool:
    """Return whether a row is a valid training step with all the usual fields.

    This fast check replaces the slow general check for most rows. A log may have a million rows.
    """
    if type(row) is not dict or row.get("event") != "step" or row.get("reused", True) is not True:
        return False
    step = row.get("step")
    tokens = row.get("tokens")
    if type(step) is not int or not 0 < step <= LAST_STEP:
        return False
    if type(tokens) is not int or not 0 <= tokens <= MAX_COUNT:
        return False
    if "routers" in row or "aux" in row or "grad_norms" in row:
        return False
    figures = (row.get("lr"), row.get("loss"), row.get("grad_norm"), row.get("seconds"))
    return all(type(value) is float and 0 <= value <= MAX_NUMBER for value in figures)


def any_row(value: Any, name: str) -> None:
    """Check that a value is a row of metrics.jsonl or of growth.jsonl."""
    check(value, {"event": text}, name)
    if value["event"] in ("step", "eval"):
        metrics_row(value, name)
    else:
        check(value, EVENT, name)


# -- a checkpoint

MARK = {"bytes": count, "sha256": text}
GROWTH_STATE = {
    "fired": [partial(integer, low=-LAST_STEP - 1, high=LAST_STEP)],
    "applied?": count,
    "config": table,
    "marks": table_of([anything]),
}


def growth_state(value: Any, name: str) -> None:
    """Check that a value is the growth state of a checkpoint or node.

    The growth state is null or empty if the run does not grow its model.
    """
    if value is not None and value != {}:
        check(value, GROWTH_STATE, name)


CHECKPOINT = {
    "step": step,
    "digest": text,
    "metrics": MARK,
    "journal?": optional(MARK),
    "resumed": count,
    "presented": count,
    "spent": table_of(not_negative),
    "ledger?": table_of(partial(integer, low=-MAX_COUNT)),
    "growth?": growth_state,
    "store?": optional({"key": text, "before": pair(anything), "rows": [any_row]}),
}


# -- a node of the store

NODE = {
    "key": text,
    "parent": text,
    "root": text,
    "step": step,
    "begins": step,
    "presented": count,
    "state": text,
    "size": count,
    "geometry": [count],
    "seconds": not_negative,
    "run": text,
    "config": table,
    "made": number,
    "rows_sha256": text,
    "grown?": growth_state,
}
