"""Read the values in a growth schedule. Each reader returns the parsed value and adds faults to a list."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from mainrun.errors import nearest

T = TypeVar("T")
NAMED_KEYS = 10  # the maximum number of unknown keys that are reported by name


def shown(value: Any) -> str:
    """Return the `repr` of a value, shortened to 80 characters."""
    if isinstance(value, tuple):
        value = list(value)
    text = repr(value)
    if len(text) > 80:
        return f"{text[:77]}..."
    return text


def shown_key(key: Any) -> str:
    if isinstance(key, str) and key.isidentifier():
        return key
    return shown(key)


# -- rules for single values


class Rule(NamedTuple):
    """A rule that defines the allowed values of a key."""

    keep: Callable[[Any], Any]  # a function that returns the parsed value, or None for a forbidden value
    allowed: str  # a description of the allowed values for error messages
    choices: tuple[str, ...] = ()  # the allowed strings; error messages suggest the most similar one


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether the value is a finite number below 1e300. Larger numbers might overflow a float."""
    return is_number(value) and abs(value) < 1e300


def number(allowed: str, low: float = -math.inf, high: float = math.inf, closed: bool = False) -> Rule:
    """Allow finite numbers between two bounds. The bounds themselves are allowed only if `closed` is true."""

    def keep(value: Any) -> float | None:
        if not is_finite(value):
            return None
        if low < value < high or (closed and value in (low, high)):
            return float(value)
        return None

    return Rule(keep, allowed)


def whole_number(low: int) -> Rule:
    """Allow integers of at least `low`. Floats with an integer value, such as 2e8, are also allowed."""

    def keep(value: Any) -> int | None:
        if not is_number(value) or not low <= value < 2**63 or value != int(value):
            return None
        return int(value)

    return Rule(keep, f"a whole number, {low} or more")


def choice(*choices: str) -> Rule:
    def keep(value: Any) -> Any:
        return value if value in choices else None

    return Rule(keep, " or ".join(choices), choices)


def instance_of(kind: type, allowed: str) -> Rule:
    def keep(value: Any) -> Any:
        return value if isinstance(value, kind) else None

    return Rule(keep, allowed)


def refusal(name: str, value: Any, rule: Rule) -> str:
    """Return the error message for a value that breaks a rule."""
    suggestion = nearest(value, rule.choices) if isinstance(value, str) else ""
    return f"{name}={shown(value)} is not allowed{suggestion}; write {rule.allowed}"


# -- tables


def unknown_keys(prefix: str, keys: Iterable[Any], allowed: Collection[str]) -> list[str]:
    """Return a message for each of the first ten unknown keys, and one that counts the other keys."""
    unknown = [key for key in keys if key not in allowed]
    faults = []
    show = shown_key if prefix else shown
    for key in unknown[:NAMED_KEYS]:
        suggestion = nearest(str(key), allowed)
        faults.append(f"unknown key {prefix}{show(key)}{suggestion}; allowed: {', '.join(allowed)}")
    if len(unknown) > NAMED_KEYS:
        faults.append(f"and {len(unknown) - NAMED_KEYS:,} more unknown keys")
    return faults


def read_table(
    name: str, table: Any, rules: Mapping[str, Rule], faults: list[str], make: Callable[..., T]
) -> T | None:
    """Call `make` with the values of a table. Return None if any value is not allowed."""
    if not isinstance(table, dict):
        faults.append(f"{name}={shown(table)} is not allowed; write a table of {', '.join(rules)}")
        return None
    wrong = unknown_keys(f"{name}.", table, rules)
    kept = {}
    for key, value in table.items():
        if key not in rules:
            continue
        kept[key] = rules[key].keep(value)
        if kept[key] is None:
            wrong.append(refusal(f"{name}.{key}", value, rules[key]))
    faults += wrong
    if wrong:
        return None
    return make(**kept)


# -- the value of an op


class Value(Protocol):
    """A kind of value that an operation can take."""

    @property
    def wanted(self) -> str: ...  # a description of the allowed values for error messages

    @property
    def required(self) -> bool: ...  # whether an op must have the key `value`

    def read(self, value: Any, faults: list[str]) -> Any:
        """Return the parsed value. Add a fault if the value has the wrong type."""


@dataclass(frozen=True)
class NoValue:
    wanted: str = "null"
    required: bool = False

    def read(self, value: Any, faults: list[str]) -> None:
        if value is not None:
            faults.append(
                f"value={shown(value)} is not allowed: this op takes no value; write null, or omit the value"
            )


@dataclass(frozen=True)
class NumberValue:
    wanted: str = "a finite number"
    required: bool = True

    def read(self, value: Any, faults: list[str]) -> Any:
        if not is_finite(value):
            faults.append(f"value={shown(value)} is not allowed; write {self.wanted}")
        return value


@dataclass(frozen=True)
class LayersValue:
    """A list of layers. The meaning of a single number depends on the operation."""

    wanted: str
    required: bool = True

    def read(self, value: Any, faults: list[str]) -> Any:
        if not isinstance(value, list | tuple):
            return NumberValue(self.wanted).read(value, faults)
        odd = [f"value[{i}]={shown(layer)}" for i, layer in enumerate(value) if type(layer) is not int]
        if odd:
            faults.append(f"{', '.join(odd[:5])} is not allowed; write {self.wanted}")
        return tuple(value)


@dataclass(frozen=True)
class TableValue:
    """A table with exactly one of the keys in `sizes`.

    A single number is accepted here, but the operation rejects the number later.
    """

    wanted: str
    rules: Mapping[str, Rule]
    sizes: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    integer: str = ""  # the key that a plain integer sets; empty if an integer is not allowed
    required: bool = True

    def read(self, value: Any, faults: list[str]) -> Any:
        if self.integer and type(value) is int:
            value = {self.integer: value}
        if not isinstance(value, dict):
            return NumberValue(self.wanted).read(value, faults)
        table: dict[str, Any] | None = read_table("value", value, self.rules, faults, dict)
        if table is None:
            return None
        sizes = [key for key in self.sizes if key in table]
        if len(sizes) != 1:
            got = f"both {' and '.join(sizes)}" if sizes else "no size"
            faults.append(f"value={shown(value)} has {got}; write {self.wanted}")
            return None
        return {**self.defaults, **table}
