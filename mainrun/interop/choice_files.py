"""Read files of multiple-choice questions. This module does not import torch.

Each line of a file is a JSON object such as

    {"prompt": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1}

where `answer` is the index of the right choice. Blank lines are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mainrun.data import title_files
from mainrun.errors import UsageError, nearest
from mainrun.files import inputs
from mainrun.files.inputs import BadInput, shown

KEYS = ("prompt", "choices", "answer")
ALLOWED = 'a .jsonl file with one {"prompt": ..., "choices": [...], "answer": INDEX} per line'


class Question(NamedTuple):
    """A multiple-choice question."""

    line: int  # the number of the question's line in the file
    prompt: str
    choices: list[str]
    answer: int  # the index of the right choice


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file. The error of a wrong line contains the number of the line."""
    text = title_files.decode(title_files.read_bytes(path, ALLOWED), path)
    questions = []
    # `splitlines` would also split a line at U+2028 and similar characters
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            questions.append(_question(number, line))
        except BadInput as e:
            raise UsageError(f"{path}, line {number}: {e}") from None
    if not questions:
        raise UsageError(f"{path} has no questions: all of its lines are blank; give {ALLOWED}")
    return questions


def _question(number: int, line: str) -> Question:
    row = inputs.parse_json(line)
    if not isinstance(row, dict):
        raise BadInput(f"got a JSON {type(row).__name__}; write one object with the keys {', '.join(KEYS)}")
    for key in row:
        if key not in KEYS:
            raise BadInput(
                f"unknown key {shown(key, 80)}{nearest(key, KEYS)}; remove it, or rename it to one of "
                f"{', '.join(KEYS)}"
            )
    for key in KEYS:
        if key not in row:
            raise BadInput(f"the key {key!r} is missing; a question needs {', '.join(KEYS)}")
    _check_prompt(row["prompt"])
    _check_choices(row["choices"])
    _check_answer(row["answer"], len(row["choices"]))
    return Question(number, row["prompt"], row["choices"], row["answer"])


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise BadInput(f'prompt must be a string, got {shown(prompt, 80)}; write "" for an empty prompt')


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list):
        raise BadInput(f"choices must be a list of strings, got {shown(choices, 80)}; write [...]")
    for i, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise BadInput(f"choice {i} must be a string, got {shown(choice, 80)}; put it in quotes")
        if not choice.strip():
            raise BadInput(f"choice {i} is blank; write a text, or remove the choice")
    if len(choices) < 2:
        raise BadInput(f"the number of choices is {len(choices)}; give at least two choices")


def _check_answer(answer: Any, count: int) -> None:
    allowed = f"give the index of the right choice, 0 to {count - 1}"
    if type(answer) is not int:
        raise BadInput(f"answer must be an integer, got {shown(answer, 80)}; {allowed}")
    if not 0 <= answer < count:
        raise BadInput(f"answer={answer} is out of range, because there are {count} choices; {allowed}")
