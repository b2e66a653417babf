"""Tests that packages are pinned, that no file reveals the author's machine, and that all listed tasks work.

Each rule is a function that returns its violations. One test applies the rule to this repository. Another
test adds a violation and expects the rule to report it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

# -- pins


def pins(text: str) -> dict[str, str]:
    """Return the version of each package in a constraints file.

    A line that is not a plain `name==version` becomes a key with an empty version.
    """
    found = {}
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if line:
            exact = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            found[canonicalize_name(exact[1]) if exact else line] = exact[2] if exact else ""
    return found


def needed(requirements: Iterable[str]) -> set[str]:
    """Return the names of the requirements and of all their dependencies in this environment."""
    found: set[str] = set()
    todo = [(Requirement(r), "") for r in requirements]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (requirement.marker and not requirement.marker.evaluate({"extra": extra})) or (
            name in found and not requirement.extras
        ):
            continue
        new = name not in found
        found.add(name)
        try:
            below = [Requirement(r) for r in requires(name) or []]
        except PackageNotFoundError:  # a dependency must be pinned even if it is not installed
            below = []
        todo += [(r, e) for r in below for e in (["", *requirement.extras] if new else requirement.extras)]
    return found


def house_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    return [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(r for extra in extras for r in extra),
    ]


def unpinned(requirements: Iterable[str], constraints: str) -> list[str]:
    held = pins(constraints)
    wrong = [f"{line!r} is no exact name==version" for line, version in held.items() if not version]
    return wrong + [f"{name} is not pinned" for name in sorted(needed(requirements) - set(held))]


def test_every_package_is_pinned() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert unpinned(house_requirements(), constraints) == []
    assert pins(constraints)["torch"] == "2.13.0"


def test_a_package_without_a_pin_is_named() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in (
        "torch",
        "setuptools",
        "pydantic_core",
        "MarkupSafe",
        "go-task-bin",
    ):  # these packages are direct, build-time and indirect requirements
        without = re.sub(rf"(?m)^{re.escape(name)}==.*$", "", constraints)
        assert unpinned(house_requirements(), without) == [f"{canonicalize_name(name)} is not pinned"]
    assert unpinned([], "torch==2.13.0+cpu\nnumpy>=2\nfoo @ file:///x/foo.whl") == [
        "'torch==2.13.0+cpu' is no exact name==version",
        "'numpy>=2' is no exact name==version",
        "'foo @ file:///x/foo.whl' is no exact name==version",
    ]


# -- no traces of the author's machine

TRACES = re.compile(
    # This pattern matches the path of a folder on the author's machine.
    r"(?<![\w.$}~-])/(?:opt|root|home|work|Users|mnt|srv)/[\w.]"
    r"|(?<![\w.$}~-])/tmp/\w+/"
    r"|file:///\w"
    # an option that names a package index, and not a variable of a script or of a test
    r"""|--(?:extra-)?index-url(?![ =]["']?[${])|--find-links|--trusted-host"""
    r"|https?://[\w.-]*(?:\.internal|\.local|\.corp|\.lan)\b"
    r"|(?<![\w.=])(?:10\.\d+|172\.(?:1[6-9]|2\d|3[01])|192\.168)\.\d+\.\d+\b"
)


def repo_files(root: Path) -> list[Path]:
    """Return the files that git tracks or that `git add` would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True
    )
    if listed.returncode:  # outside a git repository, return all files that are not hidden
        return [
            p
            for p in root.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
        ]
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def traces(root: Path) -> list[str]:
    wrong = []
    for path in repo_files(root):
        if path == Path(__file__):  # skip this file, because it contains examples of traces
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        wrong += [
            f"{path.relative_to(root)}:{i}: {found[0]}"
            for i, line in enumerate(lines, 1)
            if (found := TRACES.search(line))
        ]
    return wrong


def test_no_file_knows_the_machine_that_wrote_it() -> None:
    assert traces(ROOT) == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("find-links = /opt/wheels", True),
        ("corpus=file:/home/ann/titles.txt", True),
        ("see /root/.cache/x", True),
        ("python /tmp/try/x.py", True),
        ("foo @ file:///wheels/foo.whl", True),
        ("pip install --extra-index-url https://x.org/simple y", True),
        ('pip install --index-url "$index" torch', False),
        ("http://hub.internal/api", True),
        ("connect(10.0.3.7)", True),
        ("#!/usr/bin/env bash", False),
        ("corpus=file:../shared/data/hn_titles.txt", False),
        ("$HOME/work/x, {root}/opt/x, https://a.org/work/x", False),
        ("http://127.0.0.1:8000/x, curand==10.4.0.35, numpy 1.10.2.3", False),
    ],
)
def test_a_trace_of_a_machine_is_named(tmp_path: Path, line: str, bad: bool) -> None:
    (tmp_path / "notes.md").write_text(f"first\n{line}\n")
    assert [w.split(": ")[0] for w in traces(tmp_path)] == (["notes.md:2"] if bad else [])


# -- the list of tasks


def go_task() -> str:
    found = shutil.which("task", path=str(Path(sys.executable).parent)) or shutil.which("task")
    assert found, "go-task is not installed; it comes with the extra dev"
    return found


def menu(taskfile: Path) -> list[str]:
    listed = subprocess.run(
        [go_task(), "--taskfile", str(taskfile), "--list", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert listed.returncode == 0, listed.stderr
    return sorted(task["name"] for task in json.loads(listed.stdout)["tasks"])


def menu_gaps(taskfile: Path, readme: str) -> list[str]:
    """Return the differences between the tasks that go-task lists and those in the README's table.

    The first cell of each row in the table begins with `./task NAME` or `task NAME`.
    """
    told = set(re.findall(r"(?m)^\|\s*`(?:\./)?task ([\w:-]+)", readme))
    listed = set(menu(taskfile))
    return [f"README lists {name}, Taskfile.yml does not" for name in sorted(told - listed)] + [
        f"Taskfile.yml lists {name}, the README's table does not" for name in sorted(listed - told)
    ]


def empty_promises(taskfile: Path, works: Callable[[list[str]], bool]) -> list[str]:
    """Return the listed tasks that contain a command that does not exist."""
    wrong = []
    for name in menu(taskfile):
        # If the variable CI is set, go-task prints in colours by default.
        ask = [go_task(), "--color=false", "--taskfile", str(taskfile), "--summary", name]
        told = subprocess.run(ask, capture_output=True, text=True, timeout=60)
        commands = told.stdout.partition("\ncommands:\n")[2]
        assert commands.strip(), f"go-task names no command of {name}: {told.stdout}{told.stderr}"
        for command in re.findall(r"(?m)^ - (.+)", commands):
            if not works(command.split()):
                wrong.append(f"{name}: {command.strip()!r} does not exist")
    return wrong


def exists(command: list[str]) -> bool:
    if command[0] == "mainrun":
        asked = [sys.executable, "-m", "mainrun", *command[1:2], "--help"]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, timeout=60).returncode == 0
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return command[0].rstrip("()") in ("refuse", "echo") or shutil.which(command[0], path=path) is not None


def test_the_menu_is_the_readmes_table() -> None:
    assert menu_gaps(ROOT / "Taskfile.yml", (ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_every_task_of_the_menu_works() -> None:
    assert empty_promises(ROOT / "Taskfile.yml", exists) == []


def test_a_gap_in_the_menu_is_named(tmp_path: Path) -> None:
    taskfile = tmp_path / "Taskfile.yml"
    taskfile.write_text(
        """
version: "3"
tasks:
  train: {desc: x, cmds: [mainrun train]}
  sweep: {desc: y, cmds: [mainrun nonsense, no-such-thing --x]}
  hidden: {cmds: [no]}
"""
    )
    assert menu_gaps(taskfile, "| `./task train` | trains |\n| `./task report -- RUN` | later |\n") == [
        "README lists report, Taskfile.yml does not",
        "Taskfile.yml lists sweep, the README's table does not",
    ]
    assert empty_promises(taskfile, exists) == [
        "sweep: 'mainrun nonsense' does not exist",
        "sweep: 'no-such-thing --x' does not exist",
    ]


def commands(text: str) -> list[str]:
    """Return the `./task ...` commands on lines of their own, without comments, pipes or redirections."""
    lines = (line.strip().removeprefix("$ ") for line in text.splitlines())
    return [
        re.split(r"\s+(?:#|\||&&|;|\d?>)", line)[0].strip() for line in lines if line.startswith("./task ")
    ]


def ci_gap(readme: str, ci: str) -> list[str]:
    told = [command for command in commands(readme) if command.split()[1] == "test"]
    if not told:
        return ["README names no test command on a line of its own, like ./task test"]
    return [] if told[0] in commands(ci) else [f".ci/run does not run the README's {told[0]!r}"]


def test_ci_runs_the_readmes_test_command() -> None:
    assert (
        ci_gap(
            (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci/run").read_text(encoding="utf-8")
        )
        == []
    )


def test_a_ci_that_runs_something_else_is_named() -> None:
    assert (
        ci_gap("./task demo\n./task test   # all of it\n", "# ./task test\n./task test 2>&1 | tee log\n")
        == []
    )
    assert ci_gap("./task test\n", "# ./task test\npytest\n./task test -- -m slow\n") == [
        ".ci/run does not run the README's './task test'"
    ]
    assert ci_gap("run the tests", "./task test") == [
        "README names no test command on a line of its own, like ./task test"
    ]
