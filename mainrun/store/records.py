"""Read JSON from disk without trusting it: no file can block or flood the reader, and its values are checked. No torch.

A shape says what a value must be: a function that checks it, a table of shapes by key ("key?" may be missing), or a list
of one shape for all items. What does not fit is a `BadInput`, whose words complete a sentence that begins with the file's name.
"""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from mainrun.errors import RunError
from mainrun.files import inputs
from mainrun.files.inputs import BadInput, shown

LARGEST = 4_000_000_000  # bytes of a log
LARGEST_DOCUMENT = 500_000_000  # bytes of a JSON document
DEEPEST = 100  # levels of lists and tables
MAX_COUNT = 10**18
MAX_NUMBER = 1e40  # beyond every loss in float32; sums and squares of such numbers are still finite

Shape = Callable[[Any, str], None] | Mapping[str, Any] | list[Any]


# -- reading


class NotAFile(OSError):
    """A pipe, a socket or a device where a file should be."""


def open_file(path: Path) -> BufferedReader:
    """Open a file to read. A pipe or a device is an error at once, where `open` would wait or never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise NotAFile(errno.EINVAL, f"it {inputs.not_a_file(path)}", str(path))
    return path.open("rb")


def read(path: Path, largest: int = LARGEST_DOCUMENT) -> bytes | None:
    """The bytes of a file; None if it does not exist. Raises BadInput if it is not a regular file or cannot be read."""
    if not path.exists() and not path.is_symlink():
        return None
    try:
        return inputs.read_bytes(path, largest)
    except BadInput as e:
        raise BadInput(str(e).partition("; ")[0]) from None


def parse(data: bytes) -> Any:
    """A JSON document in UTF-8. The plain `json.loads` takes UTF-16 too, and raises several kinds of exception."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise BadInput(f"is not UTF-8 text: {e.reason} at byte {e.start:,}") from None
    except (ValueError, RecursionError) as e:
        raise BadInput(f"is not JSON: {inputs.plain(e)}") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise BadInput(f"is nested more than {DEEPEST} levels deep")


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def load(path: Path, shape: Shape, fix: str, *, largest: int = LARGEST_DOCUMENT) -> Any:
    """The JSON document of a file, or None if there is no file. Raises RunError, with the fix, if the content is damaged."""
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
    """The rows of a log, one JSON object a line; empty where there is no file. A last line without a newline is ignored."""
    try:
        data = read(path, LARGEST) or b""
    except BadInput as e:
        raise RunError(f"{path} is damaged: it {e}; {fix}") from None
    try:
        return list(lines(data, shape))
    except BadInput as e:
        raise RunError(f"{path} is damaged: {e}; {fix}") from None


def lines(data: bytes, shape: Shape) -> Iterator[dict[str, Any]]:
    """Each row in turn, up to the first that does not fit, which is a BadInput."""
    whole = data.rpartition(b"\n")[0]
    for number, line in enumerate(whole.split(b"\n"), 1) if whole else ():
        try:
            row = json.loads(line.decode("utf-8"))
            check(row, shape)
        except (ValueError, RecursionError) as e:
            fault = str(e) if isinstance(e, BadInput) else f"is not JSON: {inputs.plain(e)}"
            raise BadInput(f"line {number:,} {fault}") from None
        yield row


# -- checking


def check(value: Any, shape: Shape, name: str = "") -> None:
    """BadInput where a value does not fit its shape."""
    if callable(shape):
        shape(value, name)
    elif isinstance(shape, list):
        _check_items(value, shape[0], name)
    else:
        _check_keys(value, shape, name)


def fault(value: Any, shape: Shape) -> str:
    """Why a value does not fit its shape; empty when it does."""
    try:
        check(value, shape)
    except BadInput as e:
        return str(e)
    return ""


def _check_items(value: Any, shape: Shape, name: str) -> None:
    if not isinstance(value, list):
        raise _fault(value, name, "a list")
    for place, item in enumerate(value):
        check(item, shape, f"{name}[{place}]")


def _check_keys(value: Any, shapes: Mapping[str, Any], name: str) -> None:
    if not isinstance(value, dict):
        raise _fault(value, name, "an object")
    for key, shape in shapes.items():
        known = key.removesuffix("?")
        inner = f"{name}.{known}" if name else known
        if known in value:
            check(value[known], shape, inner)
        elif known == key:
            raise BadInput(f"lacks {inner!r}")


def _fault(value: Any, name: str, what: str) -> BadInput:
    got = shown(value, 60)
    return BadInput(
        f"has {name} = {got}, but {name} must be {what}" if name else f"is {got}, but must be {what}"
    )


def number(value: Any, name: str, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> None:
    """Check for a finite number."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise _fault(value, name, _between("a number", low, high))


def above(value: Any, name: str) -> None:
    """Check for a number above 0, to divide by."""
    if type(value) not in (int, float) or not 1e-30 <= value <= MAX_NUMBER:
        raise _fault(value, name, "a number above 0")


def whole(value: Any, name: str, low: int = 0, high: int = MAX_COUNT) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _fault(value, name, _between("a whole number", low, high))


def _between(what: str, low: float, high: float) -> str:
    if high < min(MAX_COUNT, MAX_NUMBER):
        return f"{what} from {low:g} to {high:g}"
    return f"{what} from {low:g} on" if low > -MAX_NUMBER else what


def real(value: Any, name: str) -> None:
    """A number that may be infinite, or none."""
    if type(value) is int:
        number(value, name)
    elif type(value) is not float:
        raise _fault(value, name, "a number")


def text(value: Any, name: str) -> None:
    if not isinstance(value, str) or inputs.printable(value) != value:
        raise _fault(value, name, "a text on one line")


def any_text(value: Any, name: str) -> None:
    """A text of any kind."""
    if not isinstance(value, str) or (not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)):
        raise _fault(value, name, "a text")


def yes_or_no(value: Any, name: str) -> None:
    if type(value) is not bool:
        raise _fault(value, name, "true or false")


def table(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise _fault(value, name, "an object")


def anything(value: Any, name: str) -> None:
    """No check, for values that are only shown or compared."""


def setting(value: Any, name: str) -> None:
    """The value of a field in a search space, or null."""
    if isinstance(value, str):
        any_text(value, name)
    elif value is not None and type(value) is not bool:
        number(value, name)


def one_of(*allowed: str) -> Shape:
    def shape(value: Any, name: str) -> None:
        if value not in allowed:
            raise _fault(value, name, "one of " + ", ".join(allowed))

    return shape


def optional(shape: Shape) -> Shape:
    """Accept null as well."""
    return lambda value, name: None if value is None else check(value, shape, name)


def table_of(shape: Shape) -> Shape:
    """Any keys, with values of one shape."""

    def all_of(value: Any, name: str) -> None:
        table(value, name)
        for key, inner in value.items():
            text(key, f"the key {key!r:.60} of {name or 'the top'}")
            check(inner, shape, f"{name}.{key}")

    return all_of


def pair(shape: Shape) -> Shape:
    def both(value: Any, name: str) -> None:
        check(value, [shape], name)
        if len(value) != 2:
            raise _fault(value, name, "a list of two items")

    return both


def some(shape: Shape) -> Shape:
    """A list that is not empty."""

    def items(value: Any, name: str) -> None:
        check(value, [shape], name)
        if not value:
            raise _fault(value, name, "a list with at least one item")

    return items


def scores(value: Any, name: str) -> None:
    """The scores of a trial by rung, as a JSON text, because Parquet cannot store this table."""
    any_text(value, name)
    try:
        by_rung = parse(value.encode())
        check(by_rung, table_of(number), name)
        ok = all(key.isdecimal() and len(key) < 4 for key in by_rung)
    except BadInput:
        ok = False
    if not ok:
        raise _fault(value, name, "scores by rung")


# -- the files of a run directory

LAST_STEP = 10**9

step = partial(whole, high=LAST_STEP)
count = whole
first = partial(whole, low=1)
positive = partial(number, low=0.0)
share = partial(number, low=0.0, high=1.0)

SCORE = {
    "step": step, "split": text, "full": number, "official": number, "loss": number, "bits_per_byte": number, "coverage": share,
    "tokens": first,
}  # fmt: skip
STEP_ROW = {
    "step": partial(step, low=1), "tokens?": count, "lr?": number, "loss?": number, "grad_norm?": real, "seconds?": positive,
    "reused?": yes_or_no,
}  # fmt: skip
EVAL_ROW = SCORE | {
    "seconds?": positive,
    "params?": count,
    "active?": count,
    "flops?": positive,
    "reused?": yes_or_no,
}
BOTH = {"last": SCORE, "best": SCORE}
SUMMARY = {
    "run?": text, "preset?": text, "steps?": first, "last?": SCORE, "best?": SCORE, "scores?": {"val?": BOTH, "dev?": BOTH},
    "params?": first, "tokens?": first, "flops?": above, "seconds?": above, "tokens_per_s?": positive, "geometry?": pair(first),
    "ledger?": {"asked?": count, "trained?": count, "reused?": count, "wasted?": count},
    "presentations?": {"presentations_per_token": positive, "train_tokens_per_epoch?": first},
    "fingerprints?": table_of(text), "origin?": table, "tokenizer?": text, "weights?": text, "machine_class?": table,
    "machine_classes?": [table], "versions?": table_of(text), "all_versions?": [table_of(text)],
    "guards?": [{"name": text, "status": one_of("pass", "flag", "fail"), "detail": any_text}],
}  # fmt: skip
STATUS = {"state?": text, "step?": step}
ENV = {
    "machine_class?": table, "versions?": table_of(text), "evaluate_hash?": text, "command?": [any_text], "machine_classes?": some(table),
    "all_versions?": some(table_of(text)), "carried?": {"checkpoint": step, "wasted": partial(whole, low=-MAX_COUNT), "resumed": count},
}  # fmt: skip
CONFIG = {"config": table, "plan?": {"train_tokens?": partial(whole, low=2, high=10**13)}}
CHECK = {"name": text, "ok": yes_or_no, "detail": any_text}
EVENT = {
    "event": text, "op": any_text, "name": text, "step": step, "tokens?": count, "params?": count, "active?": count,
    "flops_per_token?": positive, "delta_logits?": real, "largest_logit?": real, "coverage?": real, "checks?": [CHECK],
    "seconds?": positive,
}  # fmt: skip


def metric(value: Any, name: str) -> None:
    """A row of metrics.jsonl."""
    if _is_plain_step(value):
        return
    check(value, {"event": one_of("step", "eval")}, name)
    check(value, STEP_ROW if value["event"] == "step" else EVAL_ROW, name)


def _is_plain_step(row: Any) -> bool:
    """A quick check that nearly every row passes. There may be a million rows."""
    if type(row) is not dict or row.get("event") != "step" or row.get("reused", True) is not True:
        return False
    at, tokens = row.get("step"), row.get("tokens")
    figures = [row.get(name) for name in ("lr", "loss", "grad_norm", "seconds")]
    return (
        type(at) is int and 0 < at <= LAST_STEP and type(tokens) is int and 0 <= tokens <= MAX_COUNT
        and all(type(value) is float and 0 <= value <= MAX_NUMBER for value in figures)
    )  # fmt: skip


def any_row(value: Any, name: str) -> None:
    """A row of metrics.jsonl or of growth.jsonl."""
    check(value, {"event": text}, name)
    check(value, metric if value["event"] in ("step", "eval") else EVENT, name)


# -- a checkpoint

MARK = {"bytes": count, "sha256": text}
GROWN = {
    "fired": [partial(whole, low=-LAST_STEP - 1, high=LAST_STEP)],
    "applied?": count,
    "config": table,
    "marks": table_of([anything]),
}


def grown(value: Any, name: str) -> None:
    """The growth of a state; null or an empty object for a run without a schedule."""
    if value is not None and value != {}:
        check(value, GROWN, name)


CHECKPOINT = {
    "step": step, "digest": text, "metrics": MARK, "journal?": optional(MARK), "resumed": count, "presented": count,
    "spent": table_of(positive), "ledger?": table_of(partial(whole, low=-MAX_COUNT)), "growth?": grown,
    "store?": optional({"key": text, "before": pair(anything), "rows": [any_row]}),
}  # fmt: skip


# -- a node of the store

NODE = {
    "key": text, "parent": text, "root": text, "step": step, "begins": step, "presented": count, "state": text, "size": count,
    "geometry": [count], "seconds": positive, "run": text, "config": table, "made": number, "rows_sha256": text, "grown?": grown,
}  # fmt: skip
