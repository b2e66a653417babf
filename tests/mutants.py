"""Find the mutants of a file and apply one of them.

A mutant is a copy of a source file with one small bug. Cosmic Ray provides operators that change numbers,
comparisons, arithmetic, booleans, loops, decorators and `except` clauses. This module adds operators for bugs
that are common in this project: an entry missing from a table, a call or a keyword argument left out, half of
a condition ignored, `min` used instead of `max`, or a filter that accepts everything.
"""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

# Tests can easily miss these replacements. Others, such as `is` for `<` or `>>` for `+`, cause type errors
# that every test notices.
MISTAKES = {
    "Comparison": "Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Eq_NotEq NotEq_Eq "
    "Is_IsNot IsNot_Is",
    "Binary": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Div Mod_Mul Pow_Mul BitOr_BitAnd BitAnd_BitOr "
    "RShift_LShift LShift_RShift",
    "Unary": "Delete_USub Delete_Not",
}
OTHERS = (
    "AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd "
    "ReplaceBreakWithContinue ReplaceContinueWithBreak ExceptionReplacer NumberReplacer RemoveDecorator "
    "ZeroIterationForLoop"
)
# No test notices a change of these arguments. `strict` compares lengths that are equal anyway, `slots` saves
# memory, and `encoding` matters only on machines whose default is not UTF-8.
SAFEGUARDS = ("strict", "encoding", "slots")
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any"}


class AddedOperator(Operator):
    """A mutation operator that replaces complete nodes of the syntax tree.

    `alternatives` returns the source code of each possible replacement of a node.
    """

    def alternatives(self, node: Any) -> list[str]:
        raise NotImplementedError

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        for _ in self.alternatives(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        prefix = node.get_first_leaf().prefix
        return parso.parse(prefix + self.alternatives(node)[index])

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return ()


class DropElement(AddedOperator):
    """Remove one element of a literal that has at least two: `{"a": 1, "b": 2}` becomes `{"b": 2}`."""

    def alternatives(self, node: Any) -> list[str]:
        is_literal = node.type == "atom" and node.children[0].value in ("(", "[", "{")
        if not is_literal or len(node.children) != 3:
            return []
        inner = node.children[1]
        if inner.type not in ("dictorsetmaker", "testlist_comp"):
            return []
        is_comprehension = any(child.type in ("sync_comp_for", "comp_for") for child in inner.children)
        elements = split_at_commas(inner.children)
        if is_comprehension or len(elements) < 2:
            return []
        start, end = node.children[0].value, node.children[2].value
        return [f"{start}{join(elements, without=i)},{end}" for i in range(len(elements))]


class DropKeyword(AddedOperator):
    """Remove one keyword argument from a call."""

    def alternatives(self, node: Any) -> list[str]:
        is_call = node.type == "trailer" and node.children[0].value == "(" and len(node.children) == 3
        if not is_call:
            return []
        inner = node.children[1]
        arguments = split_at_commas(inner.children) if inner.type == "arglist" else [[inner]]
        keywords = [
            i
            for i, argument in enumerate(arguments)
            if is_keyword(argument) and name_of(argument) not in SAFEGUARDS
        ]
        return [f"({join(arguments, without=i)})" for i in keywords]


class DropStatement(AddedOperator):
    """Replace a statement with `pass`.

    The statement is a call, an assignment to an attribute or item, an augmented assignment or a `raise`.
    """

    def alternatives(self, node: Any) -> list[str]:
        if node.parent is None or node.parent.type != "simple_stmt":
            return []
        if node.type in ("raise_stmt", "del_stmt"):
            return ["pass"]
        if node.type == "atom_expr" or (node.type == "power" and node.children[-1].type == "trailer"):
            return ["pass"]
        if node.type != "expr_stmt":
            return []
        target, sign = node.children[0], node.children[1]
        changes_a_value = sign.type == "operator" and sign.value != "="
        changes_an_object = target.type in ("atom_expr", "power")
        return ["pass"] if changes_a_value or changes_an_object else []


class DropCondition(AddedOperator):
    """Drop one operand of `and` or `or`."""

    def alternatives(self, node: Any) -> list[str]:
        if node.type not in ("and_test", "or_test"):
            return []
        word = node.children[1].value
        operands = [child.get_code().strip() for child in node.children[::2]]
        return [f" {word} ".join(operands[:i] + operands[i + 1 :]) for i in range(len(operands))]


class DropFilter(AddedOperator):
    """Make the `if` of a comprehension accept everything."""

    def alternatives(self, node: Any) -> list[str]:
        return ["if True"] if node.type == "comp_if" else []


class SwapTwin(AddedOperator):
    """Swap `min` and `max`, or `any` and `all`."""

    def alternatives(self, node: Any) -> list[str]:
        is_call = (
            node.type == "name" and node.value in TWINS and getattr(node.get_next_leaf(), "value", "") == "("
        )
        return [TWINS[node.value]] if is_call else []


ADDED = (DropElement, DropKeyword, DropStatement, DropCondition, DropFilter, SwapTwin)


def split_at_commas(children: list[Any]) -> list[list[Any]]:
    parts: list[list[Any]] = [[]]
    for child in children:
        if getattr(child, "value", None) == ",":
            parts.append([])
        else:
            parts[-1].append(child)
    return [part for part in parts if part]


def join(parts: list[list[Any]], without: int) -> str:
    kept = parts[:without] + parts[without + 1 :]
    return ",".join("".join(node.get_code() for node in part) for part in kept)


def is_keyword(argument: list[Any]) -> bool:
    node = argument[0]
    return node.type == "argument" and len(node.children) == 3 and node.children[1].value == "="


def name_of(argument: list[Any]) -> str:
    return argument[0].children[0].value


# -- the mutants of a file


@dataclass(frozen=True)
class Mutant:
    """One bug at one place in a file.

    `lines` is the range of lines of the changed statement. `before` and `after` are the first changed line in
    the source and in the mutant.
    """

    file: str
    operator: str
    occurrence: int
    line: int
    lines: range
    before: str
    after: str


def operators() -> dict[str, Operator]:
    names = [
        f"Replace{kind}Operator_{change}" for kind, changes in MISTAKES.items() for change in changes.split()
    ] + OTHERS.split()
    ready = {name: get_operator(f"core/{name}")() for name in names}
    return ready | {operator.__name__: operator() for operator in ADDED}


OPERATORS = operators()


def places(source: str) -> list[tuple[str, int, int]]:
    """Return (operator, occurrence, line) for every change that a test could notice."""
    nodes = list(ast_nodes(get_ast(source)))
    everything = []
    for name, operator in OPERATORS.items():
        positions = [(node, start) for node in nodes for start, _end in operator.mutation_positions(node)]
        for occurrence, (node, (line, _column)) in enumerate(positions):
            if not is_unobservable(node):
                everything.append((name, occurrence, line))
    return everything


def draw(file: str, source: str, count: int, chance: random.Random) -> list[Mutant]:
    """Draw `count` random mutants, or return all mutants if `count` is 0.

    Each mutant compiles and differs from the source by more than whitespace.
    """
    candidates = places(source)
    chance.shuffle(candidates)
    statements = statement_lines(source)
    drawn: list[Mutant] = []
    for name, occurrence, line in candidates:
        if count and len(drawn) == count:
            break
        mutated = mutate(source, name, occurrence)
        if not is_different_code(source, mutated):
            continue
        before, after = changed_line(source, mutated)
        drawn.append(
            Mutant(file, name, occurrence, line, statements.get(line, range(line, line + 1)), before, after)
        )
    return drawn


def apply(mutant: Mutant, source: str) -> str:
    return mutate(source, mutant.operator, mutant.occurrence)


def mutate(source: str, operator: str, occurrence: int) -> str:
    """Apply one change to the source, or return the source unchanged if the operator fails."""
    try:
        return mutate_code(source, OPERATORS[operator], occurrence) or source
    except AttributeError:  # Cosmic Ray 8.7 fails on dotted names in `except (a.Error, b.Error)`
        return source


def is_unobservable(node: Any) -> bool:
    """Return whether a change of this node has no effect that a test or a user could notice."""
    return is_annotation(node) or is_shortened_text(node) or is_safeguard(node)


def is_annotation(node: Any) -> bool:
    """Return whether the node is part of a type annotation.

    With `from __future__ import annotations`, Python does not evaluate annotations.
    """
    for child in upwards(node):
        parent = child.parent
        if parent.type == "annassign" and child is parent.children[1]:
            return True
        if parent.type == "tfpdef" and child is parent.children[2]:
            return True
        if parent.type == "funcdef" and getattr(child.get_previous_sibling(), "value", "") == "->":
            return True
    return False


def is_shortened_text(node: Any) -> bool:
    """Return whether the number only shortens a displayed hash, as in f"{digest[:12]}"."""
    in_slice = node.parent is not None and node.parent.type in ("subscript", "sliceop")
    return (
        node.type == "number" and in_slice and any(child.parent.type == "fstring" for child in upwards(node))
    )


def is_safeguard(node: Any) -> bool:
    """Return whether the node is in an assert or in one of the arguments in `SAFEGUARDS`."""
    if any(child.parent.type == "assert_stmt" for child in upwards(node)):
        return True
    arguments = [child for child in (node, *upwards(node)) if child.type == "argument"]
    return bool(arguments) and getattr(arguments[0].children[0], "value", "") in SAFEGUARDS


def upwards(node: Any) -> Iterator[Any]:
    """Yield the node and all of its ancestors except the module."""
    while node.parent is not None:
        yield node
        node = node.parent


def is_different_code(source: str, mutated: str) -> bool:
    try:
        return ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def changed_line(source: str, mutated: str) -> tuple[str, str]:
    old, new = source.splitlines(), mutated.splitlines()
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            return " ".join(line.strip() for line in old[a:b]), " ".join(line.strip() for line in new[c:d])
    return "", ""


def statement_lines(source: str) -> dict[int, range]:
    """Map each line to the lines of the smallest statement that contains it.

    A compound statement has only the lines before its body.
    """
    ranges = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt):
            continue
        body = getattr(node, "body", None)
        end = body[0].lineno - 1 if body else node.end_lineno
        head = range(node.lineno, max(end, node.lineno) + 1)
        for line in head:
            if line not in ranges or len(head) < len(ranges[line]):
                ranges[line] = head
    return ranges


def sources(root: Path, targets: list[str]) -> list[str]:
    """Return the Python files of the targets as paths relative to the root.

    A folder stands for all Python files below it.
    """
    files = []
    for target in targets:
        path = (root / target).resolve()
        candidates = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        files += [
            str(file.relative_to(root.resolve()))
            for file in candidates
            if file.suffix == ".py" and file.name != "__init__.py"
        ]
    return list(dict.fromkeys(files))
