"""Apply every example of the pages about extending to a copy of the code, and run its commands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import slow_unless
from doors import Driver

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("extending.md", "extending-checks.md")]
BLOCK = re.compile(r"^(?P<place>[^\n]*:)\n\n```(?:python|toml)\n(?P<code>.*?)```$", re.S | re.M)
COMMANDS = re.compile(r"^```console\n(?P<text>.*?)```$", re.S | re.M)


def read_pages() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


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


def copy_code(target: Path) -> None:
    """Copy the code with its compiled files, which stay valid because the copies keep their times."""
    for package in ("mainrun", "sweeps", "reports"):
        shutil.copytree(ROOT / package, target / package)


class Done(NamedTuple):
    """The end of a command."""

    code: int | None
    out: str
    err: str


@pytest.fixture(scope="module")
def libraries() -> Iterator[Driver]:
    """Return a process that has imported all libraries, and runs the code in the folder of each command."""
    with Driver(None, limit=180) as started:
        yield started


def run(command: str, root: Path, libraries: Driver) -> Done:
    """Run a command of the page in the copied code."""
    env = {"PYTHONPATH": str(root), "MAINRUN_CACHE": str(root / "cache")}
    words = shlex.split(command)
    if words[0] == "mainrun":
        outcome = libraries.run(words[1:], cwd=root, env=env)
        return Done(outcome.code, outcome.out, outcome.err)
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, timeout=180)
    return Done(done.returncode, done.stdout, done.stderr)


def apply(heading: str, root: Path) -> list[str]:
    """Apply an example of the page to a copy of the code, and return its commands."""
    body = sections(read_pages())[heading]
    copy_code(root)
    blocks = list(BLOCK.finditer(body))
    assert len(blocks) == body.count("```python") + body.count("```toml"), (
        "a block without a sentence that says where it belongs"
    )
    for block in blocks:
        insert(root, block["place"], block["code"])
    commands = COMMANDS.search(body)
    assert commands
    return [line.removeprefix("$ ") for line in commands["text"].splitlines()]


@pytest.mark.parametrize("heading", slow_unless(["An optimizer"], sections(read_pages())))
def test_an_example_works_as_it_stands(tmp_path: Path, libraries: Driver, heading: str) -> None:
    for command in apply(heading, tmp_path):
        done = run(command, tmp_path, libraries)
        assert done.code == 0, f"{command}\n{done.out[-2000:]}{done.err[-3000:]}"


DRAW = """
from sweeps.sampling import TrialSampler
from sweeps.study import read_study

study = read_study("brute.toml")
sampler = TrialSampler(study.sampler, study.space, study.base())
for number in range(study.budget.trials):
    print(sampler.ask(number))
"""


def test_the_sampler_of_the_page_draws_every_value(tmp_path: Path) -> None:
    assert apply("A sampler", tmp_path) == ["mainrun sweep run brute.toml --out studies"]
    done = subprocess.run([sys.executable, "-c", DRAW], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["{'lr': 0.01}", "{'lr': 0.02}", "{}"]


def test_every_kind_of_the_table_has_an_example() -> None:
    text = read_pages()
    linked = re.findall(r"^\| an? \[([^\]]+)\]\((?:extending-checks\.md)?#([^)]+)\)", text, re.M)
    anchors = [heading.lower().replace(" ", "-") for heading in sections(text)]
    assert [anchor for _, anchor in linked] == anchors


def test_a_command_that_fails_is_noticed(tmp_path: Path, libraries: Driver) -> None:
    copy_code(tmp_path)
    command = "mainrun train --preset demo:baseline --set optimizer=lyon"
    assert run(command, tmp_path, libraries).code == 2
    assert run("test -f nothing", tmp_path, libraries).code == 1


def test_a_wrong_example_fails(tmp_path: Path, libraries: Driver) -> None:
    copy_code(tmp_path)
    insert(
        tmp_path,
        "In `OPTIMIZERS` of `mainrun/plan/optimizers.py`:",
        '    "lyon": OptimizerSpec({"exp_avg": 1}),\n',
    )
    command = "mainrun train --preset demo:baseline --set optimizer=lyon --set num_titles=300 --out runs"
    done = run(command, tmp_path, libraries)
    assert done.code == 1 and "lyon" in done.err, "the class is missing"
