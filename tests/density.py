"""Count dense constructs per 1,000 lines of code, and report places that break a style rule.

    python tests/density.py                   # the product, a row per folder
    python tests/density.py mainrun/train.py  # a row per file

tests/test_house.py sets the limits.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRODUCT = ("mainrun", "sweeps", "reports")
COUNTED = ("conditional expressions", "walrus", "comprehensions", "tuple assignments")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LONGEST_FUNCTION = 60
WIDEST_LINE = 110
# These methods change their object, so `a, b = x.pop(), x` depends on the order of evaluation.
CHANGING = {
    "pop",
    "popleft",
    "read",
    "readline",
    "next",
    "append",
    "add",
    "update",
    "remove",
    "send",
    "get_nowait",
}


def counts(tree: ast.Module) -> Counter[str]:
    """Count the dense constructs of a file."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            found["conditional expressions"] += 1
        elif isinstance(node, ast.NamedExpr):
            found["walrus"] += 1
        elif isinstance(node, COMPREHENSIONS):
            found["comprehensions"] += 1
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            found["tuple assignments"] += 1
    return found


def violations(tree: ast.Module, lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, rule) for each violation of a rule."""
    own = own_classes(tree)
    for number, line in enumerate(lines, 1):
        if len(line) > WIDEST_LINE:
            yield number, f"line of {len(line)} columns, at most {WIDEST_LINE}"
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and any(
            isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node
        ):
            yield node.lineno, "nested conditional expression"
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(isinstance(argument, ast.NamedExpr) for argument in arguments):
                yield node.lineno, "walrus in an argument"
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and has_call(node.value):
            yield node.lineno, "tuple assignment with a call"
        if isinstance(node, FUNCTIONS):
            for line in outside_attributes(node, own):
                yield line, "attribute of a new object set from outside"
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield node.lineno, f"function {node.name} of {length} lines, at most {LONGEST_FUNCTION}"


def has_call(value: ast.expr) -> bool:
    """Return whether a tuple contains a method call that may change its object."""
    if not isinstance(value, ast.Tuple):
        return False
    calls = [
        node
        for node in ast.walk(value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    return any(isinstance(call.func, ast.Attribute) and call.func.attr in CHANGING for call in calls)


def own_classes(tree: ast.Module) -> set[str]:
    """Return the classes that a file defines and the names that it imports from our packages."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PRODUCT:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def outside_attributes(function: ast.AST, own: set[str]) -> Iterator[int]:
    """Yield the lines where a function sets attributes on an object that it has created.

    Only objects of the classes in `own` count.
    """
    created: set[str] = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.value.func).rpartition(".")[2]
            if name[:1].isupper() and name in own:
                created.add(target.id)
        if (
            isinstance(target, ast.Attribute)
            and isinstance(target.value, ast.Name)
            and target.value.id in created
        ):
            yield node.lineno


def per_1000_lines(files: list[Path]) -> dict[str, float]:
    """Return how often each construct occurs per 1,000 lines of the files."""
    total: Counter[str] = Counter()
    lines = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        total += counts(ast.parse(text))
        lines += len(text.splitlines())
    return {name: 1000 * total[name] / max(lines, 1) for name in COUNTED}


def python_files(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return files


def row(label: str, files: list[Path]) -> str:
    """Return one line of the table."""
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    shares = "  ".join(f"{share:6.1f}" for share in per_1000_lines(files).values())
    return f"{label:<40}{lines:>7}  {shares}"


def main(arguments: list[str]) -> None:
    paths = [Path(argument) for argument in arguments] or [ROOT / name for name in PRODUCT]
    files = python_files(paths)
    print(f"{'per 1,000 lines':<40}{'lines':>7}  cond.   walrus  compr.  tuples")
    if arguments:
        for file in files:
            print(row(str(file), [file]))
    else:
        for folder in sorted({file.parent for file in files}):
            print(row(str(folder.relative_to(ROOT)), [file for file in files if file.parent == folder]))
    print(row("all", files))
    for file in files:
        text = file.read_text(encoding="utf-8")
        for number, rule in sorted(violations(ast.parse(text), text.splitlines())):
            print(f"{file}:{number}: {rule}")


if __name__ == "__main__":
    main(sys.argv[1:])
