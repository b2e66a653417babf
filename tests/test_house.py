"""Check the import directions, the start-up time, the version hash and the density of the code.

A function for each rule returns the violations. One test applies the function to this repository, and another
plants a violation and expects the function to name it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import density
import pytest
from pydantic import BaseModel, Field

from mainrun.core.machine_class import HASHED

ROOT = Path(__file__).parents[1]
PACKAGES = ("mainrun", "sweeps", "reports")

# The parts that each part may import besides `errors`. A part is a folder or a file directly below mainrun,
# or a package next to mainrun. In short, core imports only basic parts, train imports core, run
# imports train, and checks and sweeps import run.
MAY_IMPORT = {
    "config": "files plan data.sources data.foreign",
    "plan": "files config",
    "core": "files config plan",
    "data": "files config plan core",
    "train": "config plan core data interop.names interop.start",
    "store": "files config plan",
    "growth": "config plan core train store",
    "run": "files config plan core data train store growth checks.guards",
    "checks": "files config plan core data train store growth run",
    "replay": "plan core data train store growth checks",
    "interop": "files config plan core data train store growth run checks ui",
    "ui": "files config plan core data train store growth run checks stats interop.start",
    "api": "files config plan core store run stats ui sweeps reports",
    "bench": "files config plan core data train store run ui sweeps reports",
    "sweeps": "files config plan core data store stats run ui",
    "reports": "files config plan store stats ui run.progress",
}
ALONE = ("errors", "stats", "files")  # may import only `errors`
ENTRY_POINTS = ("cli", "__main__")  # may import everything

# Modules that must start fast, so they may import the heavy libraries only inside functions.
LIGHT = (
    "mainrun",
    "mainrun.api.documents",
    "mainrun.api.runs",
    "mainrun.api.studies",
    "mainrun.api.training",
    "mainrun.cli",
    "mainrun.config",
    "mainrun.data.sources",
    "mainrun.data.token_cache",
    "mainrun.errors",
    "mainrun.interop.cli",
    "mainrun.plan.recipes",
    "mainrun.plan.simulate",
    "mainrun.run.progress",
    "mainrun.run.tracking",
    "mainrun.stats",
    "mainrun.store.rundir",
    "mainrun.ui.console",
    "mainrun.ui.growth_cli",
    "reports.cli",
    "sweeps.cli",
)
HEAVY = ("torch", "optuna", "ray", "matplotlib", "pandas", "scipy")

# The public names of each package. If you add a name to an `__all__`, add it here too.
FACES = {
    "mainrun": [
        "ConfigError",
        "CorpusError",
        "Diverged",
        "Interrupted",
        "MainrunError",
        "Run",
        "RunError",
        "Study",
        "TrainConfig",
        "UsageError",
        "__version__",
        "compare",
        "from_dict",
        "load",
        "report",
        "run",
        "runs",
        "study",
        "sweep",
        "train",
    ],
}

# A run imports these modules although the version hash does not cover them. Each entry says why the module
# cannot change the bits of a run.
NOT_HASHED = {
    "mainrun.errors": "text of errors",
    "mainrun.files": "reads files; what they hold is in the config and in the fingerprints of the data",
    "mainrun.store": "stores and loads states with checksums; computes none",
    "mainrun.checks.guards": "judges a run that is finished",
}

MOST_FILES_AT_THE_TOP = 8  # files directly in mainrun/
MOST_LINES = {"mainrun/train.py": 780}
# These limits per 1,000 lines apply to all files together and to train.py alone.
MOST_PER_1000 = {"conditional expressions": 15, "comprehensions": 30}
MOST_IN_TRAIN = {"conditional expressions": 20}
# These long functions are easier to read in one piece. Each (file, name) has a reason.
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}


def plant(root: Path, **files: str) -> Path:
    """Write a tree of small Python files.

    In a file name, `__` stands for `/`. Every package gets an `__init__.py`.
    """
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        for folder in path.parents:
            if folder == root:
                break
            (folder / "__init__.py").touch()
    return root


@functools.cache
def parse(text: str) -> ast.Module:
    """Parse a source text. Many tests read the same files, and parsing all of them takes a second."""
    return ast.parse(text)


def sources(root: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """Yield (dotted name, path, syntax tree) of every module of the packages."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            dotted = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            yield dotted, path, parse(path.read_text(encoding="utf-8"))


# -- directions


def imported(node: ast.AST, dotted: str, is_package: bool) -> list[str]:
    """Return the dotted names that an import statement may refer to. An imported name may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    home = node.module or ""
    if node.level:
        package = dotted.split(".")
        package = package[: len(package) - node.level + is_package]
        home = ".".join([*package, home] if home else package)
    return [f"{home}.{alias.name}" for alias in node.names]


@functools.cache
def imports(tree: ast.Module, dotted: str, is_package: bool) -> list[tuple[str, int]]:
    """Return the names that a module may import, with the line of each import."""
    return [
        (name, node.lineno)  # type: ignore[attr-defined]  # not every kind of node has a line
        for node in ast.walk(tree)
        for name in imported(node, dotted, is_package)
    ]


def import_graph(root: Path) -> dict[str, dict[str, int]]:
    """Map each module to the modules that it imports, with the line of each import.

    Imports inside functions and imports for type checking count too.
    """
    modules = {dotted: (path, tree) for dotted, path, tree in sources(root)}
    graph: dict[str, dict[str, int]] = {}
    for dotted, (path, tree) in modules.items():
        graph[dotted] = {}
        for name, line in imports(tree, dotted, path.name == "__init__.py"):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != dotted:
                graph[dotted].setdefault(name, line)
    return graph


def part_of(dotted: str) -> str:
    """Return the part of a module: `store` for mainrun.store.rundir, `sweeps` for sweeps.engine.ray."""
    names = dotted.split(".")
    if names[0] != "mainrun":
        return names[0]
    return names[1] if len(names) > 1 else ""


def wrong_imports(root: Path) -> list[str]:
    graph = import_graph(root)
    parts = {part_of(dotted) for dotted in graph} - {""}
    unknown = parts - set(MAY_IMPORT) - set(ALONE) - set(ENTRY_POINTS)
    wrong = [f"{part} has no row in MAY_IMPORT" for part in sorted(unknown)]
    for dotted, targets in graph.items():
        part = part_of(dotted)
        if not part or part in ENTRY_POINTS or part in unknown:
            continue
        allowed = MAY_IMPORT.get(part, "").split()
        for target, line in targets.items():
            inside = target.removeprefix("mainrun.")
            if target == "mainrun" or part_of(target) in (part, "errors", *allowed) or inside in allowed:
                continue
            wrong.append(f"{dotted}:{line}: {part} must not import {target}")
    return wrong


def circles(root: Path) -> list[list[str]]:
    """Return the groups of modules that import each other."""
    graph = import_graph(root)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in graph[todo.pop()]:
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    closure = {module: reached(module) for module in graph}
    groups = []
    for module in graph:
        group = sorted(other for other in closure[module] if module in closure[other])
        if group and group not in groups:
            groups.append(group)
    return groups


def test_imports_go_one_way() -> None:
    assert wrong_imports(ROOT) == []


def test_no_modules_import_each_other() -> None:
    assert circles(ROOT) == []


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (
            {"mainrun__core__device": "import mainrun.train", "mainrun__train": ""},
            "core must not import mainrun.train",
        ),
        (
            {"mainrun__train": "from mainrun.run import session", "mainrun__run__session": ""},
            "train must not import mainrun.run.session",
        ),
        (
            {"mainrun__core__moe": "from ..growth import verify", "mainrun__growth__verify": ""},
            "core must not import mainrun.growth.verify",
        ),
        ({"mainrun__config": "from mainrun.data import hub", "mainrun__data__hub": ""}, "mainrun.data.hub"),
        (
            {"mainrun__run__log": "from mainrun.checks import audit", "mainrun__checks__audit": ""},
            "run must not import mainrun.checks.audit",
        ),
        (
            {"sweeps__study": "def f():\n    import mainrun.train as t", "mainrun__train": ""},
            "sweeps must not import mainrun.train",
        ),
        (
            {"reports__load": "import sweeps.ledger", "sweeps__ledger": ""},
            "reports must not import sweeps.ledger",
        ),
        ({"mainrun__files__locks": "import mainrun.config", "mainrun__config": ""}, "files must not import"),
        ({"mainrun__novelty__thing": ""}, "novelty has no row"),
    ],
)
def test_a_wrong_import_is_named(tmp_path: Path, files: dict[str, str], named: str) -> None:
    (wrong,) = wrong_imports(plant(tmp_path, **files))
    assert named in wrong


def test_a_right_import_is_not_named(tmp_path: Path) -> None:
    plant(
        tmp_path,
        mainrun__train="from mainrun import __version__\nfrom mainrun.data import scoring",
        mainrun__data__scoring="",
        mainrun__run__summary="from mainrun.checks.guards import guards",
        mainrun__checks__guards="from . import audit",
        mainrun__checks__audit="",
        mainrun__cli="import sweeps.cli, mainrun.train",
        sweeps__cli="from mainrun.store.rundir import RunDir",
        mainrun__store__rundir="",
    )
    assert wrong_imports(tmp_path) == []


@pytest.mark.parametrize("text", ["from mainrun import train", "if TYPE_CHECKING:\n    import mainrun.train"])
def test_a_circle_is_named(tmp_path: Path, text: str) -> None:
    plant(tmp_path, mainrun__train="from mainrun.data import batches", mainrun__data__batches=text)
    assert circles(tmp_path) == [["mainrun.data.batches", "mainrun.train"]]


# -- the version hash


def not_hashed(root: Path, hashed: Iterable[str], exempt: Iterable[str]) -> list[str]:
    """Return the modules that a run imports but that neither the version hash nor an exemption covers."""
    graph = import_graph(root)
    starts = [name for name in graph if name in ("mainrun.train", "mainrun.run.session")]
    reached = set(starts)
    todo = list(starts)
    while todo:
        for target in graph[todo.pop()]:
            if target not in reached:
                reached.add(target)
                todo.append(target)
    covered = tuple(f"mainrun.{name.removesuffix('.py').replace('/', '.')}" for name in hashed)
    return sorted(
        module
        for module in reached
        if not any(module == name or module.startswith(f"{name}.") for name in covered)
        and not any(
            module == name or (name != "mainrun" and module.startswith(f"{name}.")) for name in exempt
        )
    )


def test_the_version_hash_covers_what_a_run_imports() -> None:
    assert not_hashed(ROOT, HASHED, NOT_HASHED) == []


def test_every_exemption_is_needed() -> None:
    for module in NOT_HASHED:
        others = [name for name in NOT_HASHED if name != module]
        assert not_hashed(ROOT, HASHED, others), f"{module} is not imported by a run, or covered anyway"


def test_a_module_outside_the_hash_is_named(tmp_path: Path) -> None:
    plant(
        tmp_path,
        mainrun__train="def f():\n    from mainrun.layers import moe",
        mainrun__layers__moe="import mainrun.core.kernels",
        mainrun__core__kernels="",
    )
    assert not_hashed(tmp_path, HASHED, []) == ["mainrun.layers.moe"]


def test_the_hash_changes_with_every_hashed_file(tmp_path: Path) -> None:
    from mainrun.core.machine_class import source_hash

    root = plant(tmp_path, train="a = 1", config="b = 1", core__kernels="c = 1", store__nodes="d = 1")
    before = source_hash(root)
    (root / "store/nodes.py").write_text("d = 2\n")
    assert source_hash(root) == before, "the store computes nothing"
    seen = {before}
    for name in ("train.py", "config.py", "core/kernels.py", "core/native.cpp"):
        (root / name).write_text("changed\n")
        assert source_hash(root) not in seen, name
        seen.add(source_hash(root))


# -- lightness


def heavy_loaded(root: Path, modules: Iterable[str]) -> list[str]:
    """Return the heavy libraries that importing these modules loads, directly or indirectly."""
    loaded = f"print(*(h for h in {HEAVY!r} if h in sys.modules))"
    code = f"import sys\nfor m in {list(modules)!r}: __import__(m)\n{loaded}"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_command_line_starts_without_torch() -> None:
    assert heavy_loaded(ROOT, LIGHT) == []


def test_a_heavy_import_behind_another_is_found(tmp_path: Path) -> None:
    plant(tmp_path, mainrun__cli="import mainrun.helper", mainrun__helper="import matplotlib", matplotlib="")
    assert heavy_loaded(tmp_path, ["mainrun.cli"]) == ["matplotlib"]


# -- public names


def faces(root: Path) -> dict[str, list[str]]:
    """Map each package that has an `__all__` to the names in it."""
    found = {}
    for dotted, path, tree in sources(root):
        for node in tree.body if path.name == "__init__.py" else []:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found[dotted] = sorted(ast.literal_eval(node.value))
    return found


def faceless(root: Path) -> list[str]:
    """Report packages that have no `__init__.py`, or that define names without an `__all__`.

    An installation would leave out a package without an `__init__.py`.
    """
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


# -- sizes and density


def top_files(root: Path) -> list[str]:
    """Return the files directly in mainrun if there are too many of them."""
    files = sorted(path.name for path in (root / "mainrun").glob("*.py"))
    return files if len(files) > MOST_FILES_AT_THE_TOP else []


def too_long(root: Path) -> list[str]:
    wrong = []
    for name, most in MOST_LINES.items():
        lines = len((root / name).read_text(encoding="utf-8").splitlines())
        if lines > most:
            wrong.append(f"{name} has {lines} lines, at most {most} are allowed")
    return wrong


def dense_places(root: Path) -> list[str]:
    """Return the places that break a rule of tests/density.py."""
    wrong = []
    for _, path, tree in sources(root):
        name = path.relative_to(root).as_posix()
        long = {function for file, function in LONG_FUNCTIONS if file == name}
        lines = path.read_text(encoding="utf-8").splitlines()
        for line, rule in density.violations(tree, lines):
            if not any(rule.startswith(f"function {function} of") for function in long):
                wrong.append(f"{name}:{line}: {rule}")
    return wrong


def too_dense(files: list[Path], most: dict[str, int]) -> list[str]:
    """Return the constructs that occur too often in the files."""
    shares = density.per_1000_lines(files)
    return [
        f"{shares[name]:.1f} {name} per 1,000 lines, at most {limit}"
        for name, limit in most.items()
        if shares[name] > limit
    ]


def product_files(root: Path) -> list[Path]:
    return [path for _, path, _ in sources(root)]


def test_the_top_of_the_tree_is_short() -> None:
    assert top_files(ROOT) == []


def test_the_trainer_is_read_in_one_sitting() -> None:
    assert too_long(ROOT) == []


def test_no_place_is_dense() -> None:
    assert dense_places(ROOT) == []


def test_the_code_is_open() -> None:
    assert too_dense(product_files(ROOT), MOST_PER_1000) == []
    assert too_dense([ROOT / "mainrun/train.py"], MOST_IN_TRAIN) == []


def test_a_ninth_file_at_the_top_is_named(tmp_path: Path) -> None:
    plant(tmp_path, **{f"mainrun__m{i}": "" for i in range(7)})
    assert top_files(tmp_path) == []
    plant(tmp_path, mainrun__m7="")
    assert len(top_files(tmp_path)) == 9


def test_a_trainer_of_too_many_lines_is_named(tmp_path: Path) -> None:
    plant(tmp_path, mainrun__train="\n" * 779)
    assert too_long(tmp_path) == []
    plant(tmp_path, mainrun__train="\n" * 780)
    assert too_long(tmp_path) == ["mainrun/train.py has 781 lines, at most 780 are allowed"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("x = 1 if a else 2 if b else 3", "nested conditional expression"),
        ("f(x := 1)", "walrus in an argument"),
        ("f(key=(x := 1))", "walrus in an argument"),
        ("x = '" + "a" * 120 + "'", "line of 126 columns"),
        ("def f():\n" + "    x = 1\n" * 60, "function f of 61 lines"),
        ("a, b = f.pop(), g", "tuple assignment with a call"),
        (
            "class Run: ...\ndef f():\n    run = Run()\n    run.name = 1",
            "attribute of a new object set from outside",
        ),
    ],
)
def test_a_dense_place_is_named(tmp_path: Path, text: str, rule: str) -> None:
    (wrong,) = dense_places(plant(tmp_path, mainrun__config=text))
    assert rule in wrong


@pytest.mark.parametrize(
    "text",
    [
        "x = (1 if a else 2) + 1\nif (y := f()): pass",
        "def f():\n" + "    x = 1\n" * 59,
        "a, b = b, a",
        "import zipfile\ndef f():\n    info = zipfile.ZipInfo()\n    info.name = 1",
        "class A:\n    def __init__(self):\n        self.x = Run()\n        self.x.y = 1",
    ],
)
def test_open_code_is_not_named(tmp_path: Path, text: str) -> None:
    assert dense_places(plant(tmp_path, mainrun__config=text)) == []


def test_too_many_constructs_are_named(tmp_path: Path) -> None:
    lines = ["x = 1"] * 984 + ["y = 1 if x else 2"] * 16
    plant(tmp_path, mainrun__config="\n".join(lines))
    (wrong,) = too_dense([tmp_path / "mainrun/config.py"], MOST_PER_1000)
    assert wrong == "16.0 conditional expressions per 1,000 lines, at most 15"


# -- config fields


def unclassed(model: type[BaseModel]) -> list[str]:
    """Report the fields that lack a class or a description.

    The class of a field determines how the field enters the lineage key.
    """
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
