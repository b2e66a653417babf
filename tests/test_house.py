"""The rules of the house: who imports whom, what stays light, what is pinned, what the menu promises.

Each rule is a function that takes a tree (or a text) and gives the list of what breaks it. One test holds the rule on
this repository; its neighbour plants one violation and sees it named, so that no rule can fall asleep.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, Field

ROOT = Path(__file__).parents[1]
PACKAGES = ("mainrun", "sweeps", "reports")

# Who may import whom. A part is a file or a folder right below mainrun, or a whole package beside it; each may import itself.
# A part without a row is refused: whoever adds one decides its directions here.
MAY_IMPORT = {
    "mainrun": "mainrun.config mainrun.errors",
    "mainrun.__main__": "mainrun.cli",
    "mainrun.errors": "",
    "mainrun.files.inputs": "mainrun.errors",
    "mainrun.data.synthetic": "",
    "mainrun.config": "mainrun.errors mainrun.files.inputs mainrun.growth",  # of growth its schedule, which knows TrainConfig for its type alone
    "mainrun.core.hardware": "",
    "mainrun.core.kernels": "mainrun.core.native.cpu mainrun.core.native.gpu mainrun.core.hardware",
    "mainrun.core.native.cpu": "mainrun.core.hardware",
    "mainrun.core.native.gpu": "",
    "mainrun.core.cuda_graph": "",
    "mainrun.core.device": "mainrun.core.kernels mainrun.core.native.cpu mainrun.core.native.gpu mainrun.core.cuda_graph mainrun.core.hardware mainrun.config mainrun.errors",
    "mainrun.run.progress": "mainrun.config mainrun.errors",
    "mainrun.store": "mainrun.files.inputs mainrun.config mainrun.errors",
    "mainrun.layers": "mainrun.config mainrun.errors",
    "mainrun.data.sources": "mainrun.data.synthetic mainrun.core.hardware mainrun.files.inputs mainrun.config mainrun.errors",
    "mainrun.data.tokenizer": "mainrun.data.sources mainrun.core.hardware mainrun.config mainrun.errors mainrun.files.inputs",
    "mainrun.data.scoring": "mainrun.data.tokenizer mainrun.data.sources mainrun.config mainrun.errors",
    "mainrun.checks.guards": "mainrun.data.scoring mainrun.data.tokenizer mainrun.data.sources mainrun.config mainrun.errors",
    "mainrun.growth": "mainrun.layers mainrun.core.hardware mainrun.store mainrun.run.progress mainrun.files.inputs mainrun.config mainrun.errors "
    "mainrun.train mainrun.core.device",  # these two for their types alone
    "mainrun.run.session": "mainrun.growth mainrun.core.hardware "
    "mainrun.data.tokenizer mainrun.data.sources mainrun.data.scoring mainrun.checks.guards mainrun.store mainrun.core.device mainrun.run.progress "
    "mainrun.config mainrun.errors mainrun.run.sharing mainrun.train",  # these two for their types alone
    "mainrun.run.sharing": "mainrun.growth mainrun.store mainrun.core.device mainrun.config mainrun.errors mainrun.train",  # for its types alone
    "mainrun.run.batch": "mainrun.store mainrun.data.tokenizer mainrun.data.sources mainrun.core.device mainrun.config",
    "mainrun.checks.audit": "mainrun.growth "
    "mainrun.train mainrun.run.session mainrun.store mainrun.data.tokenizer mainrun.data.sources mainrun.core.device mainrun.config "
    "mainrun.errors",
    "mainrun.replay": "mainrun.checks.audit mainrun.growth mainrun.train mainrun.run.session mainrun.checks.guards mainrun.store mainrun.data.tokenizer "
    "mainrun.data.sources mainrun.core.device mainrun.config mainrun.errors",
    "mainrun.train": "mainrun.run.sharing mainrun.layers mainrun.data.tokenizer mainrun.data.sources mainrun.data.scoring mainrun.run.session mainrun.growth "
    "mainrun.core.kernels mainrun.store mainrun.core.device mainrun.run.progress mainrun.config mainrun.errors",
    "mainrun.bench": "mainrun.core.kernels "
    "mainrun.core.hardware mainrun.run.batch mainrun.run.progress mainrun.train mainrun.run.session mainrun.store mainrun.ui.estimate "
    "mainrun.data.scoring mainrun.core.device mainrun.config mainrun.errors",
    "mainrun.ui.estimate": "mainrun.core.kernels mainrun.core.cuda_graph mainrun.train mainrun.run.session mainrun.data.scoring mainrun.data.tokenizer mainrun.data.sources "
    "mainrun.growth "
    "mainrun.core.device "
    "mainrun.config",
    "mainrun.ui.sample": "mainrun.train mainrun.data.tokenizer mainrun.store mainrun.errors",
    "mainrun.ui.compare": "mainrun.store mainrun.run.progress mainrun.config mainrun.errors mainrun.files.inputs",
    "mainrun.ui.doctor": "mainrun.core.hardware mainrun.core.device mainrun.data.sources mainrun.config mainrun.errors",
    "mainrun.cli": "*",
    "mainrun.ui.demo": "mainrun.store mainrun.run.progress mainrun.config mainrun.errors",
    "mainrun.ui.console": "mainrun.core.hardware mainrun.files.inputs mainrun.errors",
    "mainrun.ui.store_cli": "mainrun.ui.console mainrun.store mainrun.checks.audit mainrun.run.progress mainrun.files.inputs mainrun.errors",
    "mainrun.ui.growth_cli": "mainrun.ui.console mainrun.growth mainrun.ui.store_cli mainrun.store mainrun.run.progress mainrun.files.inputs mainrun.config "
    "mainrun.errors",
    "mainrun.bench.cli": "mainrun.ui.console mainrun.bench mainrun.config mainrun.errors",
    # they speak to the trainer through its config, the run directory and a subprocess
    "mainrun.stats": "",
    "sweeps": "mainrun.store mainrun.data.sources mainrun.growth mainrun.stats mainrun.core.hardware mainrun.ui.console mainrun.run.progress mainrun.config "
    "mainrun.files.inputs "
    "mainrun.errors",
    "reports": "mainrun.stats mainrun.store mainrun.ui.compare mainrun.ui.console mainrun.files.inputs mainrun.config mainrun.errors",
}

# What must start at once, and what must therefore wait until a function needs it.
LIGHT = (
    "", ".errors", ".config", ".synthetic", ".corpus", ".tokens", ".progress", ".store.rundir", ".cli",
    ".growth.schedule", ".growth.simulate", ".growth.cli",
)  # fmt: skip
HEAVY = ("torch", "optuna", "ray", "matplotlib", "pandas")

# The public faces. Who adds a name to an `__all__` adds it here, on purpose.
FACES = {
    "mainrun": [
        "Diverged",
        "Interrupted",
        "MainrunError",
        "TrainConfig",
        "UsageError",
        "__version__",
        "from_dict",
        "load",
    ],
}

TRAIN_LINES = 700


def plant(root: Path, **files: str) -> Path:
    """A tree of one-line files; `__` in a name stands for `/` and every package gets its `__init__.py`."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        for folder in path.parents:
            if folder == root:
                break
            (folder / "__init__.py").touch()
    return root


def sources(root: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """(dotted name, file, tree) of every module of the packages."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            dotted = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            yield dotted, path, ast.parse(path.read_text(encoding="utf-8"))


# -- directions


def part_of(dotted: str) -> str:
    """`mainrun.store.rundir` -> `mainrun.store`; `sweeps.engine.ray` -> `sweeps`. The commands of a folder are a part of their own."""
    names = dotted.split(".")
    if names[0] == "mainrun" and names[2:3] == ["cli"]:
        return ".".join(names[:3])
    return ".".join(names[:2]) if names[0] == "mainrun" else names[0]


def imported(node: ast.stmt, dotted: str, is_package: bool) -> list[str]:
    """The dotted names that an import statement may mean; a name imported from a package may be a module of it."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    home = node.module or ""
    if node.level:
        here = dotted.split(".")
        here = here[: len(here) - node.level + is_package]
        home = ".".join([*here, *home.split(".")] if home else here)
    return [f"{home}.{alias.name}" for alias in node.names]


def wrong_imports(root: Path) -> list[str]:
    """Imports anywhere in a file count, those inside functions and for types too: a direction is a direction."""
    known = {part_of(dotted) for dotted, _, _ in sources(root)}
    wrong = [
        f"{part} has no row in MAY_IMPORT; decide there what it may import"
        for part in sorted(known - set(MAY_IMPORT))
    ]
    for dotted, path, tree in sources(root):
        part = part_of(dotted)
        allowed = MAY_IMPORT.get(part, "*").split()
        if "*" in allowed:
            continue
        for node in ast.walk(tree):
            for name in (
                imported(node, dotted, path.name == "__init__.py") if isinstance(node, ast.stmt) else []
            ):
                target = part_of(name)
                if name.split(".")[0] not in PACKAGES:
                    continue
                if target not in known:  # `from mainrun import __version__`: the package's own name
                    target = name.split(".")[0]
                if target not in (part, "mainrun", *allowed):
                    wrong.append(f"{path.relative_to(root)}:{node.lineno}: {part} must not import {target}")
    return wrong


def test_imports_go_one_way() -> None:
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (
            {"mainrun__config": "import mainrun.data.tokenizer", "mainrun__tokens": ""},
            "mainrun.config must not import mainrun.data.tokenizer",
        ),
        (
            {"mainrun__layers__moe": "from mainrun.growth import verify", "mainrun__growth__verify": ""},
            "mainrun.layers must not import mainrun.growth",
        ),
        (
            {"mainrun__layers__moe": "from ..growth import verify", "mainrun__growth__verify": ""},
            "mainrun.layers must not import mainrun.growth",
        ),
        (
            {"mainrun__scoring": "from . import train", "mainrun__train": ""},
            "mainrun.data.scoring must not import mainrun.train",
        ),
        (
            {"sweeps__study": "from mainrun import train", "mainrun__train": ""},
            "sweeps must not import mainrun.train",
        ),
        (
            {"sweeps__study": "def f():\n    import mainrun.train as t", "mainrun__train": ""},
            "sweeps must not import mainrun.train",
        ),
        ({"reports__load": "import sweeps.ledger", "sweeps__ledger": ""}, "reports must not import sweeps"),
        (
            {"mainrun__store__rundir": "from sweeps import study", "sweeps__study": ""},
            "mainrun.store must not import sweeps",
        ),
        (
            {
                "mainrun__store__nodes": "from mainrun.ui.store_cli import app",
                "mainrun__store__cli": "app = 0",
            },
            "must not import mainrun.ui.store_cli",
        ),
        ({"mainrun__novelty": ""}, "mainrun.novelty has no row"),
    ],
)
def test_a_wrong_import_is_named(tmp_path: Path, files: dict[str, str], named: str) -> None:
    (wrong,) = wrong_imports(plant(tmp_path, **files))
    assert named in wrong


def test_a_right_import_is_not_named(tmp_path: Path) -> None:
    plant(
        tmp_path,
        mainrun__train="from mainrun import __version__, scoring\nfrom mainrun.store.rundir import RunDir\nfrom . import growth",
        mainrun__scoring="",
        mainrun__growth__verify="from mainrun.layers import moe",
        mainrun__layers__moe="from . import lora",
        mainrun__layers__lora="",
        mainrun__store__rundir="",
        mainrun__cli="import sweeps.cli, reports.cli, mainrun.train",
        sweeps__cli="from mainrun.store.rundir import RunDir",
        reports__cli="",
    )
    assert wrong_imports(tmp_path) == []


# -- lightness


def heavy_at_top(root: Path) -> list[str]:
    """Heavy libraries that a light file asks for as soon as it is read; what is under TYPE_CHECKING is never run."""

    def run_at_import(nodes: Iterable[ast.AST]) -> Iterator[ast.stmt]:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                yield from run_at_import(node.orelse)
                continue
            if isinstance(node, ast.stmt):
                yield node
            yield from run_at_import(ast.iter_child_nodes(node))

    wrong = []
    for dotted, path, tree in sources(root):
        if dotted in {f"mainrun{name}" for name in LIGHT}:
            for node in run_at_import(tree.body):
                for name in imported(node, dotted, path.name == "__init__.py"):
                    if name.split(".")[0] in HEAVY:
                        wrong.append(
                            f"{path.relative_to(root)}:{node.lineno}: imports {name.split('.')[0]} at its top"
                        )
    return wrong


def heavy_loaded(root: Path, modules: Iterable[str]) -> list[str]:
    """Heavy libraries that are in memory after the modules were imported, by whatever way they came."""
    code = f"import sys\nfor m in {list(modules)!r}: __import__(m)\nprint(*(h for h in {HEAVY!r} if h in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_light_files_ask_for_nothing_heavy() -> None:
    assert heavy_at_top(ROOT) == []


def test_the_command_line_starts_without_torch() -> None:
    assert heavy_loaded(ROOT, [f"mainrun{name}" for name in LIGHT]) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import torch.nn as nn", 1),
        ("try:\n    from pandas import DataFrame\nexcept ImportError:\n    pass", 1),
        ("class A:\n    import optuna", 1),
        ("def f():\n    import torch", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", 0),
    ],
)
def test_a_heavy_import_is_named(tmp_path: Path, text: str, count: int) -> None:
    assert len(heavy_at_top(plant(tmp_path, mainrun__store__rundir=text))) == count


def test_a_heavy_import_behind_another_is_found(tmp_path: Path) -> None:
    plant(tmp_path, mainrun__cli="import mainrun.helper", mainrun__helper="import matplotlib", matplotlib="")
    assert heavy_at_top(tmp_path) == []
    assert heavy_loaded(tmp_path, ["mainrun.cli"]) == ["matplotlib"]


# -- faces and sizes


def faces(root: Path) -> dict[str, list[str]]:
    """`__all__` of every package that has one."""
    found = {}
    for dotted, path, tree in sources(root):
        for node in tree.body if path.name == "__init__.py" else []:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found[dotted] = sorted(ast.literal_eval(node.value))
    return found


def faceless(root: Path) -> list[str]:
    """Packages without `__init__.py` (an install would not see them), or that offer names without an `__all__`."""
    wrong = []
    for package in PACKAGES:
        folders = {path.parent for path in (root / package).rglob("*.py")}
        wrong += [
            f"{f.relative_to(root)} has no __init__.py"
            for f in sorted(folders)
            if not (f / "__init__.py").is_file()
        ]
    for dotted, path, tree in sources(root):
        speaks = [
            node
            for node in tree.body
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ]
        if path.name == "__init__.py" and speaks and dotted not in faces(root):
            wrong.append(f"{path.relative_to(root)} holds code, but no __all__ says what it offers")
    return wrong


def test_each_public_face_is_the_agreed_one() -> None:
    assert faceless(ROOT) == []
    assert faces(ROOT) == FACES
    for package, names in FACES.items():
        module = importlib.import_module(package)
        assert [name for name in names if not hasattr(module, name)] == []


def test_a_face_that_changed_is_named(tmp_path: Path) -> None:
    plant(tmp_path, mainrun__errors="")
    (tmp_path / "mainrun/__init__.py").write_text("from mainrun.errors import *\n")
    (tmp_path / "sweeps/engine").mkdir(parents=True)
    (tmp_path / "sweeps/engine/local.py").touch()
    assert faceless(tmp_path) == [
        "sweeps/engine has no __init__.py",
        "mainrun/__init__.py holds code, but no __all__ says what it offers",
    ]
    (tmp_path / "mainrun/__init__.py").write_text('__all__ = ["b", "a"]\n')
    assert faces(tmp_path) == {"mainrun": ["a", "b"]}


def too_long(path: Path, most: int = TRAIN_LINES) -> list[str]:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    return [f"{path.name} has {lines} lines, may have {most}"] if lines > most else []


def test_the_trainer_is_read_in_one_sitting() -> None:
    assert too_long(ROOT / "mainrun/train.py") == []


def test_a_trainer_of_701_lines_is_too_long(tmp_path: Path) -> None:
    plant(tmp_path, train="\n" * (TRAIN_LINES - 1))
    assert too_long(tmp_path / "train.py") == []
    plant(tmp_path, train="\n" * TRAIN_LINES)
    assert too_long(tmp_path / "train.py") == ["train.py has 701 lines, may have 700"]


# -- config fields


def unclassed(model: type[BaseModel]) -> list[str]:
    """Fields without a class (the lineage key is computed from it) or without a word on what they are."""
    wrong = []
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or extra.get("class") not in ("static", "scheduled", "inert"):
            wrong.append(f"{name} has no class")
        if not (field.description or "").strip():
            wrong.append(f"{name} has no description")
    return wrong


def test_every_field_is_classed_and_described() -> None:
    from mainrun.config import TrainConfig

    assert unclassed(TrainConfig) == []


def test_a_bare_field_is_named() -> None:
    class Bare(BaseModel):
        good: int = Field(1, description="a number", json_schema_extra={"class": "static"})
        bare: int = 2
        odd: int = Field(3, description=" ", json_schema_extra={"class": "loud"})

    assert unclassed(Bare) == [
        "bare has no class",
        "bare has no description",
        "odd has no class",
        "odd has no description",
    ]


# -- pins


def pins(text: str) -> dict[str, str]:
    """name -> version of a constraints file; a line that is no plain `name==version` stands under itself."""
    found = {}
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if line:
            exact = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            found[canonicalize_name(exact[1]) if exact else line] = exact[2] if exact else ""
    return found


def needed(requirements: Iterable[str]) -> set[str]:
    """The names of the requirements and of everything that they pull in here."""
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
        except PackageNotFoundError:  # a dependency that is not installed here is pinned all the same
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
    ):  # named, built with, and pulled in
        without = re.sub(rf"(?m)^{re.escape(name)}==.*$", "", constraints)
        assert unpinned(house_requirements(), without) == [f"{canonicalize_name(name)} is not pinned"]
    assert unpinned([], "torch==2.13.0+cpu\nnumpy>=2\nfoo @ file:///x/foo.whl") == [
        "'torch==2.13.0+cpu' is no exact name==version",
        "'numpy>=2' is no exact name==version",
        "'foo @ file:///x/foo.whl' is no exact name==version",
    ]


# -- no trace of the machine that wrote it

TRACES = re.compile(
    r"(?<![\w.$}~-])/(?:opt|root|home|work|Users|mnt|srv)/[\w.]"  # a folder of one machine
    r"|(?<![\w.$}~-])/tmp/\w+/"
    r"|file:///\w"
    r"|--(?:extra-)?index-url|--find-links|--trusted-host"  # a package registry
    r"|https?://[\w.-]*(?:\.internal|\.local|\.corp|\.lan)\b"
    r"|(?<![\w.=])(?:10\.\d+|172\.(?:1[6-9]|2\d|3[01])|192\.168)\.\d+\.\d+\b"
)


def repo_files(root: Path) -> list[Path]:
    """What is in git, or would be with the next `git add`."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True
    )
    if listed.returncode:  # an unpacked archive: everything but the tools' own folders
        return [
            p
            for p in root.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
        ]
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def traces(root: Path) -> list[str]:
    wrong = []
    for path in repo_files(root):
        if path == Path(__file__):  # it holds the planted ones
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


# -- the menu


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
    """Where the menu and the README's table (rows that begin with | `./task NAME or | `task NAME) part."""
    told = set(re.findall(r"(?m)^\|\s*`(?:\./)?task ([\w:-]+)", readme))
    listed = set(menu(taskfile))
    return [f"README lists {name}, Taskfile.yml does not" for name in sorted(told - listed)] + [
        f"Taskfile.yml lists {name}, the README's table does not" for name in sorted(listed - told)
    ]


def empty_promises(taskfile: Path, works: Callable[[list[str]], bool]) -> list[str]:
    """Tasks of the menu with a command that does not exist."""
    wrong = []
    for name in menu(taskfile):
        # without colours, which go-task puts in whenever CI is set
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
    """The `./task ...` commands that stand on lines of their own, without comment, pipe or redirection."""
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
