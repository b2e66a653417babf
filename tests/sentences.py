"""Draw random sentences from docstrings, comments, messages and documents for a blind review.

    python tests/sentences.py --count 60 --seed 1 > ours.txt
    python tests/sentences.py --count 60 --seed 1 FOLDER ... > theirs.txt

A reviewer who does not know the source of a sentence rates it as clear at first reading, as read twice, or as
a riddle.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("mainrun", "sweeps", "reports", "tests", "docs", "README.md")
LEAST_WORDS = 6
MOST_WORDS = 45


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of running text."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*|>#$])|\n {4,}", text):
        line = re.sub(r"\s+", " ", paragraph).strip(" -*>#")
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`\"])", line):
            words = sentence.split()
            letters = re.sub(r"[^A-Za-z ]", "", sentence)
            if (
                LEAST_WORDS <= len(words) <= MOST_WORDS
                and len(letters) > 0.7 * len(sentence)
                and "|" not in sentence
            ):
                yield sentence


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def messages(tree: ast.Module) -> Iterator[str]:
    """Yield the texts of errors and of help. `...` stands for each value that is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) or (
            isinstance(node, ast.keyword) and node.arg in ("help", "fix", "description")
        ):
            filled = [part for part in ast.walk(node) if isinstance(part, ast.JoinedStr)]
            pieces = {id(piece) for text in filled for piece in ast.walk(text)}
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in pieces:
                    yield part.value
                elif isinstance(part, ast.JoinedStr):
                    yield "".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in part.values)


def comments(path: Path) -> Iterator[str]:
    """Yield comments. Comments on consecutive lines form one text."""
    text: list[str] = []
    last = -1
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type != tokenize.COMMENT or re.match(r"#\s*(noqa|type:|fmt:|!)", token.string):
                continue
            whole_line = not token.line[: token.start[1]].strip()
            if token.start[0] != last + 1 or not whole_line:
                yield " ".join(text)
                text = []
            text.append(token.string.lstrip("# "))
            last = token.start[0] if whole_line else -1
    yield " ".join(text)


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) for each text of a file."""
    if path.suffix in (".md", ".rst"):
        body = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
        yield "document", body
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for text in docstrings(tree):
        yield "docstring", text
    for text in messages(tree):
        yield "message", text
    for text in comments(path):
        yield "comment", text


def draw(roots: list[Path], count: int, seed: int) -> list[tuple[str, str, str]]:
    """Draw the same number of sentences of each kind, if there are enough. Return (kind, file, sentence)."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for root in roots:
        files = (
            [root]
            if root.is_file()
            else sorted([*root.rglob("*.py"), *root.rglob("*.md"), *root.rglob("*.rst")])
        )
        for path in files:
            for kind, text in texts(path):
                by_kind.setdefault(kind, []).extend((str(path), sentence) for sentence in sentences(text))
    chance = random.Random(seed)
    drawn: list[tuple[str, str, str]] = []
    for kind, found in sorted(by_kind.items()):
        share = min(len(found), count // len(by_kind))
        drawn += [(kind, file, sentence) for file, sentence in chance.sample(found, share)]
    chance.shuffle(drawn)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw random sentences for a blind review of their language."
    )
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--where", action="store_true", help="print the kind and the file of each sentence")
    parser.add_argument("roots", nargs="*", type=Path)
    options = parser.parse_args()
    roots = options.roots or [ROOT / name for name in OURS]
    for kind, file, sentence in draw(roots, options.count, options.seed):
        print(f"{kind}\t{file}\t{sentence}" if options.where else sentence)


if __name__ == "__main__":
    main()
