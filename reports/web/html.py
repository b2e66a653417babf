"""Write HTML: escaped text, tables, and the script and the style of the page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from mainrun.files.inputs import printable
from reports.evidence.tables import Table

LONG = 40  # the length of a text that may be clipped
HERE = Path(__file__).parent
QUOTED = re.compile(r'("(?:\\.|[^"\\])*"|`(?:\\.|[^`\\])*`|/\\s\+/)')  # also the only regular expression


def text(value: Any) -> str:
    """Escape a text for HTML. Control characters become visible."""
    return escape(printable(str(value)))


class Html(str):
    """HTML that is already escaped."""

    __slots__ = ()


def tag(name: str, content: Any = "", /, **attributes: Any) -> Html:
    """Return an element. Attributes that are None are left out, and `_` in their names stands for `-`."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            parts.append(f'{key.strip("_").replace("_", "-")}="{text(value)}"')
    inner = content if isinstance(content, Html) else text(content)
    return Html(f"<{' '.join(parts)}>{inner}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Join pieces of HTML. A plain string among them is escaped."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts))


# -- tables


@dataclass(frozen=True)
class Cell:
    """A cell: what it shows, what it is sorted by, and its class."""

    shown: Any
    value: float | None = None
    style: str | None = None


@dataclass(frozen=True)
class Row:
    cells: Sequence[Cell]
    style: str | None = None
    key: str | None = None  # with which the script finds the curve of the row


def table(
    name: str, label: str, heads: Sequence[str], rows: Iterable[Row], right: Sequence[int] = ()
) -> Html:
    """Return a table that the script sorts. `right` are the columns with numbers."""
    head = []
    for place, text_of_head in enumerate(heads):
        style = "n" if place in right else None
        button = tag("button", text_of_head, type="button")
        head.append(tag("th", button, scope="col", class_=style))
    body = []
    for row in rows:
        cells = [_cell(cell, place in right) for place, cell in enumerate(row.cells)]
        body.append(tag("tr", join(cells), class_=row.style, data_key=row.key))
    parts = join([tag("thead", tag("tr", join(head))), tag("tbody", join(body))])
    box = tag("table", parts, id=name)
    return tag("div", box, class_="scroll", tabindex="0", role="region", aria_label=label)


def _cell(cell: Cell, right: bool) -> Html:
    style = cell.style or ("n" if right else None)
    value = None if cell.value is None else f"{cell.value:.12g}"
    return tag("td", cell.shown, class_=style, data_v=value)


def evidence_table(made: Table, name: str, title: Html | None = None) -> Html:
    """Return a table of the report, with its note, below its title."""
    right = [place for place, column in enumerate(made.columns) if column.right]
    rows = []
    for place, (values, shown) in enumerate(zip(made.rows, made.cells(), strict=True)):
        cells = [
            Cell(clipped(words, words), _number(value)) for value, words in zip(values, shown, strict=True)
        ]
        rows.append(Row(cells, "bad" if place in made.red else None))
    heads = [" ".join(column.head.replace("/\n", "/").split()) for column in made.columns]
    parts = [tag("h3", made.title) if title is None else title]
    parts.append(table(name, made.title, heads, rows, right))
    if made.note:
        parts.append(tag("p", made.note, class_="note"))
    return join(parts)


def clipped(content: str, full: str) -> Html:
    """Return a text that is clipped if it is long. A long text is shown in full below the pointer."""
    return tag("span", content, class_="clip", title=full if len(full) > LONG else None)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


# -- the script, the style and the data


@cache
def script() -> str:
    """Return the script without its comments and without spaces outside of its texts."""
    source = (HERE / "page.js").read_text(encoding="utf-8")
    parts = QUOTED.split(re.sub(r"(?m)^\s*//.*$", "", source))
    for place in range(0, len(parts), 2):
        code = re.sub(r"\s+", " ", parts[place])
        parts[place] = re.sub(r"\s*([{}()\[\],;:=+\-*/<>&|?!%])\s*", r"\1", code)
    return "".join(parts).strip()


@cache
def style() -> str:
    return (HERE / "page.css").read_text(encoding="utf-8").strip()


def source_hash(content: str) -> str:
    """Return the hash with which a policy allows an inline script or style."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def policy(live: bool) -> str:
    """Return the Content-Security-Policy: only the page's own script and style, and no requests.

    The page of the board may ask the board for news.
    """
    rules = {
        "default-src": "'none'",
        "script-src": source_hash(script()),
        "style-src": source_hash(style()),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    if live:
        rules["connect-src"] = "'self'"
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def json_block(data: Mapping[str, Any]) -> Html:
    """Return the data of the script. No text in it can end the block."""
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Html(f'<script type="application/json" id="data">{content}</script>')


def lines_of(config: Mapping[str, Any]) -> Iterator[str]:
    from mainrun.ui.console import field_value

    for name, value in config.items():
        yield f"{name} = {field_value(value)}"
