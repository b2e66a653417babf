"""Turn the arguments and the errors of Python calls into those that the rest of mainrun uses."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError, nearest
from mainrun.files import inputs

Place = str | Path


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise a MainrunError instead of an OSError that names a path, as the command line does."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno not in inputs.NO_SPACE:
            raise
        raise inputs.refusal(e) from e


@contextmanager
def recorded_command(command: list[str]) -> Iterator[None]:
    """Let the runs and studies of a call record a command that repeats them, not the one of the notebook."""
    before = sys.argv
    sys.argv = command
    try:
        yield
    finally:
        sys.argv = before


def set_options(fields: dict[str, Any]) -> list[str]:
    """Return the options --set that give config fields on the command line."""
    options = []
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value)
        options += ["--set", f"{name}={'none' if value is None else text}"]
    return options


def path_of(place: Any, name: str) -> Path:
    """Return a path, for which `~` stands for the home folder. Raise UsageError if no file can be there."""
    path = Path(inputs.expanded(str(place), name))
    inputs.check_path(path, name)
    return path


def config_fields(function: Callable[..., Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the config fields that a function got as keywords, as plain Python values.

    Raise ConfigError if a keyword is no config field. The message names the fields and the options.
    """
    parameters = inspect.signature(function).parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    known = [*options, *(name for name in TrainConfig.model_fields if name != "preset")]
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"unknown keyword {inputs.shown(name, 80)}{nearest(name, known)}; "
                f"options of {function.__name__}: {', '.join(options)}; "
                f"config fields: {', '.join(known[len(options) :])}"
            )
    return {name: plain_value(value) for name, value in fields.items()}


def plain_value(value: Any) -> Any:
    """Return a value without the types of NumPy, pathlib and other libraries, which a config refuses."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if not isinstance(value, str) and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()  # a number of NumPy
    return value
