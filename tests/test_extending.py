"""Apply every example of docs/extending.md to a copy of the code, and run its commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^(?P<place>[^\n]*:)\n\n```(?:python|toml)\n(?P<code>.*?)```$", re.S | re.M)
COMMANDS = re.compile(r"^```console\n(?P<text>.*?)```$", re.S | re.M)


def sections(text: str) -> dict[str, str]:
    """Map the heading of each section that contains an example to the section."""
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {heading: body for heading, body in found.items() if "```console" in body}


def insert(root: Path, place: str, code: str) -> None:
    """Insert code at the place that a sentence such as "In `OPS` of `file.py`:" describes."""
    new = re.match(r"Create `(?P<file>[^`]+)`:", place)
    end = re.match(r"At the end of `(?P<file>[^`]+)`:", place)
    row = re.match(r"In `(?P<table>\w+)` of `(?P<file>[^`]+)`.*:", place)
    before = re.match(r"Before `(?P<start>[^`]+)` in `(?P<file>[^`]+)`:", place)
    match = new or end or row or before
    assert match, f"{place!r} does not say where the code belongs"
    path = root / match["file"]
    if new:
        assert not path.exists(), path
        path.write_text(code)
        return
    lines = path.read_text().splitlines(keepends=True)
    if end:
        lines.append(f"\n\n{code}")
    elif before:
        lines.insert(first(lines, before["start"]), f"{code}\n\n")
    elif row:
        lines.insert(last_row(lines, row["table"]), code)
    path.write_text("".join(lines))


def first(lines: list[str], start: str) -> int:
    """Return the index of the first line that starts with a text."""
    return next(i for i, line in enumerate(lines) if line.startswith(start))


def last_row(lines: list[str], table: str) -> int:
    """Return the index of the line that closes the rows of a table."""
    begin = next(i for i, line in enumerate(lines) if re.match(rf"{table}\b.*[=(\[{{]\s*$", line))
    rest = range(begin + 1, len(lines))
    close = next(i for i in rest if re.match(r"[)\]}]", lines[i]))
    while re.match(r"\s*[)\]}]", lines[close - 1]) and not lines[close - 1].rstrip().endswith(","):
        close -= 1  # skip the closing bracket of an inner literal
    return close


def copy_code(target: Path) -> Path:
    for package in ("mainrun", "sweeps", "reports"):
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def run(command: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the page in the copied code."""
    command = re.sub(r"^mainrun\b", f"{shlex.quote(sys.executable)} -m mainrun", command)
    env = os.environ | {"PYTHONPATH": str(root), "MAINRUN_CACHE": str(root / "cache")}
    return subprocess.run(
        ["bash", "-c", command], cwd=root, env=env, capture_output=True, text=True, timeout=180
    )


@pytest.mark.parametrize("heading", sections(PAGE.read_text(encoding="utf-8")))
def test_an_example_works_as_it_stands(tmp_path: Path, heading: str) -> None:
    body = sections(PAGE.read_text(encoding="utf-8"))[heading]
    root = copy_code(tmp_path)
    blocks = list(BLOCK.finditer(body))
    assert len(blocks) == body.count("```python") + body.count("```toml"), (
        "a block without a sentence that says where it belongs"
    )
    for block in blocks:
        insert(root, block["place"], block["code"])
    commands = [line.removeprefix("$ ") for line in COMMANDS.search(body)["text"].splitlines()]  # type: ignore[index]
    assert commands
    for command in commands:
        done = run(command, root)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


def test_every_kind_of_the_table_has_an_example() -> None:
    text = PAGE.read_text(encoding="utf-8")
    linked = re.findall(r"^\| an? \[([^\]]+)\]\(#([^)]+)\)", text, re.M)
    anchors = [heading.lower().replace(" ", "-") for heading in sections(text)]
    assert [anchor for _, anchor in linked] == anchors


def test_a_command_that_fails_is_noticed(tmp_path: Path) -> None:
    root = copy_code(tmp_path)
    assert run("mainrun train --preset demo:baseline --set optimizer=lyon", root).returncode == 2


def test_a_wrong_example_fails(tmp_path: Path) -> None:
    root = copy_code(tmp_path)
    insert(
        root,
        "In `OPTIMIZERS` of `mainrun/plan/optimizers.py`:",
        '    "lyon": OptimizerSpec({"exp_avg": 1}),\n',
    )
    done = run(
        "mainrun train --preset demo:baseline --set optimizer=lyon --set num_titles=300 --out runs", root
    )
    assert done.returncode == 1 and "lyon" in done.stderr, "the class is missing"
