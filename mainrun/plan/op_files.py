"""Read a growth schedule from JSON, YAML or TOML text, which may be inline or in a file.

There are two formats. In version 2, a schedule is a table with a list of ops, and each op has a trigger:

    {"version": 2, "ops": [{"name": "set_lr", "value": 6e-4, "trigger": {"step": 100}}]}

In the original format, a schedule is a list of ops with the keys `trigger_loss` and `max_wait_iters`:

    [{"name": "set_lr", "value": 6e-4, "trigger_loss": 100.0, "max_wait_iters": 1, "reevaluate": false}]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mainrun.errors import ConfigError, nearest
from mainrun.files import inputs
from mainrun.plan.op_values import (
    Rule,
    choice,
    instance_of,
    number,
    read_table,
    refusal,
    shown,
    shown_key,
    unknown_keys,
    whole_number,
)
from mainrun.plan.ops import (
    GUARANTEES,
    NAMES,
    RELATIVE,
    TRAINING,
    Fault,
    Op,
    Rates,
    Schedule,
    Transfer,
    default_keys,
    fault_of,
    operation_of,
)
from mainrun.plan.seeds import seed_from
from mainrun.plan.triggers import Trigger

LARGEST_SCHEDULE = 1000  # the maximum number of ops in a schedule
SHAPE = "{ ops = [{ name, value, trigger }, ...] }"
OP_SHAPE = "{ name, value, trigger }"
TRIGGER_SHAPE = "{ step = N } or { budget_frac = F } or { any = [{ loss_below = L }, { wait_iters = N }] }"

# maps keys of the list format to the trigger conditions of version 2
LIST_TRIGGER = {"trigger_loss": "loss_below", "max_wait_iters": "wait_iters"}
SCHEDULE_KEYS = ("version", "seed", "defaults", "ops")
LIST_KEYS: tuple[str, ...] = ("name", "desc", "value", "trigger_loss", "max_wait_iters", "reevaluate")
OP_KEYS: tuple[str, ...] = (
    "id", "name", "desc", "value", "trigger", "reevaluate", "init", "preserve", "optimizer", "lr", "on_fail",
)  # fmt: skip
WEIGHT_KEYS = ("init", "preserve", "optimizer", "lr", "on_fail")  # keys of ops that change the model
DEFAULT_KEYS = ("reevaluate", "preserve", "optimizer", "lr", "on_fail")  # keys of the table `defaults`


def _keep_id(value: Any) -> str | None:
    if isinstance(value, str) and value.strip():
        return value
    return None


def _keep_plateau(value: Any) -> tuple[int, float] | None:
    if not isinstance(value, dict) or value.keys() != {"evals", "rel"}:
        return None
    evals = whole_number(1).keep(value["evals"])
    rel = number("", low=0, high=1).keep(value["rel"])
    if evals is None or rel is None:
        return None
    return evals, rel


KEYS: dict[str, Rule] = {
    "id": Rule(_keep_id, "a string"),
    "desc": instance_of(str, "a string"),
    "reevaluate": instance_of(bool, "true or false"),
    "init": choice("copy", "identity"),
    "preserve": choice(*GUARANTEES),
    "on_fail": choice("abort", "skip"),
}
TRANSFER: dict[str, Rule] = {
    "mode": choice("auto", "keep", "scale", "reset", "asymmetric"),
    "min_coverage": number("a number from 0 to 1", low=0, high=1, closed=True),
}
RATES: dict[str, Rule] = {
    "rewarm_iters": whole_number(0),
    "new_params_peak": number("a number above 0", low=0),
    "width_rule": choice("none", "adam_1_over_n"),
}
CONDITIONS: dict[str, Rule] = {
    "loss_below": number("a finite number"),
    "wait_iters": whole_number(0),
    "step": whole_number(1),
    "tokens": whole_number(1),
    "budget_frac": number("a fraction of the run's tokens, above 0 and below 1", low=0, high=1),
    "plateau": Rule(_keep_plateau, "{ evals = N, rel = R } with N of at least 1, and R above 0 and below 1"),
}


# -- the schedule as a whole


def read(data: Any) -> tuple[Schedule, list[Fault]]:
    """Read a schedule. Return a schedule of the valid ops, and a list of all faults."""
    if isinstance(data, list):
        return _read_list(data)
    if isinstance(data, dict):
        return _read_table(data)
    text = (
        f"{shown(data)} is not a schedule; write {SHAPE}, or a list of ops with {' and '.join(LIST_TRIGGER)}."
    )
    return Schedule(), [(-1, text)]


def _read_list(data: list[Any]) -> tuple[Schedule, list[Fault]]:
    if len(data) > LARGEST_SCHEDULE:
        text = f"the list has {len(data):,} ops; write at most {LARGEST_SCHEDULE:,}."
        return Schedule(), [(-1, text)]
    reader = _OpReader(list_format=True)
    return Schedule(reader.read(data)), reader.faults


def _read_table(data: dict[Any, Any]) -> tuple[Schedule, list[Fault]]:
    wrong = unknown_keys("", data, SCHEDULE_KEYS)
    version = data.get("version", 2)
    if version != 2 or isinstance(version, bool):
        wrong.append(
            f"version={shown(version)} is unknown; write version=2, or a list in the original format"
        )
    seed = _read_seed(data.get("seed", 0), wrong)
    entries = _read_entries(data.get("ops", []), wrong)
    defaults = _read_defaults(data.get("defaults", {}), wrong)
    reader = _OpReader(seed, defaults, faults=[(-1, f"{text}.") for text in wrong])
    return Schedule(reader.read(entries), seed), reader.faults


def _read_seed(seed: Any, wrong: list[str]) -> int:
    rule = whole_number(0)
    kept = rule.keep(seed)
    if kept is None:
        wrong.append(refusal("seed", seed, rule))
        return 0
    return int(kept)


def _read_entries(entries: Any, wrong: list[str]) -> Sequence[Any]:
    if not isinstance(entries, list | tuple):
        wrong.append(f"ops={shown(entries)} is not allowed; write a list of {OP_SHAPE}")
        return []
    if len(entries) > LARGEST_SCHEDULE:
        wrong.append(f"ops has {len(entries):,} entries; write at most {LARGEST_SCHEDULE:,}")
        return []
    return entries


def _read_defaults(defaults: Any, wrong: list[str]) -> dict[str, Any]:
    if not isinstance(defaults, dict):
        wrong.append(f"defaults={shown(defaults)} is not allowed; write a table of {', '.join(DEFAULT_KEYS)}")
        return {}
    wrong += unknown_keys("defaults.", defaults, DEFAULT_KEYS)
    kept = {}
    faults: list[str] = []
    for key, value in defaults.items():
        if key in DEFAULT_KEYS:
            kept[key] = _read_key(key, value, faults)
    wrong += [f"defaults.{text}" for text in faults]
    return {key: value for key, value in kept.items() if value is not None}


def _read_key(key: str, value: Any, wrong: list[str]) -> Any:
    """Return the parsed value of a key, or None if the value is not allowed."""
    if key == "optimizer":
        table = {"mode": value} if isinstance(value, str) else value
        return read_table(key, table, TRANSFER, wrong, Transfer)
    if key == "lr":
        return read_table(key, value, RATES, wrong, Rates)
    kept = KEYS[key].keep(value)
    if kept is None:
        wrong.append(refusal(key, value, KEYS[key]))
    return kept


# -- one op


@dataclass
class _OpReader:
    """Reads the ops of a schedule and collects the faults in these ops."""

    seed: int = 0
    defaults: dict[str, Any] = field(default_factory=dict)
    list_format: bool = False
    faults: list[Fault] = field(default_factory=list)

    def read(self, entries: Iterable[Any]) -> tuple[Op, ...]:
        ops: list[Op] = []
        owners: dict[str, int] = {}  # maps the id of each op to the index of the op in the schedule
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                self.faults.append((place, f"ops[{place}]={shown(entry)} is not an op; write {OP_SHAPE}."))
                continue
            wrong: list[str] = []
            op = self._op(place, entry, wrong)
            if op and op.id in owners:
                wrong.append(
                    f"id={op.id!r} is already used by ops[{owners[op.id]}]; give each op a different id"
                )
            self.faults += [fault_of(place, entry.get("name"), text) for text in wrong]
            if op and not wrong:
                ops.append(op)
                owners[op.id] = place
        return tuple(ops)

    def _op(self, place: int, entry: dict[Any, Any], wrong: list[str]) -> Op | None:
        if self.list_format:
            trigger = _read_list_trigger(entry, wrong)
        else:
            trigger = _read_trigger(entry, wrong)
        wrong += self._unknown_keys(entry)
        name = _read_name(entry, wrong)
        if name is None:
            return None
        keys = self._keys(place, name, entry, wrong)
        value = _read_value(name, entry, wrong)
        if trigger is None or wrong:
            return None
        return Op(name, value, trigger, seed=seed_from(self.seed, place), **keys)

    @property
    def _allowed(self) -> tuple[str, ...]:
        return LIST_KEYS if self.list_format else OP_KEYS

    def _unknown_keys(self, entry: dict[Any, Any]) -> list[str]:
        """Return error messages about the keys that the format does not allow."""
        other_format = "the list format; write a trigger"
        if self.list_format:
            other_format = "version 2; write { version = 2, ops = [...] } around the list"
        faults = []
        unknown = []
        for key in entry:
            if key in self._allowed:
                continue
            if key in LIST_KEYS or key in OP_KEYS:
                faults.append(f"{key!r} is a key of {other_format}")
            else:
                unknown.append(key)
        return faults + unknown_keys("", unknown, self._allowed)

    def _keys(self, place: int, name: str, entry: dict[Any, Any], wrong: list[str]) -> dict[str, Any]:
        """Return the values of all keys of an op except name, value, trigger and seed."""
        operation = operation_of(name)
        keys = default_keys(name, place)
        for key, value in self.defaults.items():
            if key == "reevaluate" or operation.architecture:
                keys[key] = value
        for key in ("id", "desc", "reevaluate", *WEIGHT_KEYS):
            if key not in entry or key not in self._allowed:
                continue
            if key in WEIGHT_KEYS and name in TRAINING:
                wrong.append(f"only ops that change the weights have the key {key}; remove the key")
            elif key == "init" and not keys["init"]:
                wrong.append("only stack_layers and widen_mlp have the key init; remove the key")
            else:
                keys[key] = _read_key(key, entry[key], wrong)
        return keys


def _read_name(entry: dict[Any, Any], wrong: list[str]) -> str | None:
    """Return the name of an op, or None if the name is unknown. Old names such as change_lr are accepted."""
    if "name" not in entry:
        wrong.append(f"the name is missing; write one of {', '.join(NAMES)}")
        return None
    name = entry["name"]
    if isinstance(name, str) and (name in NAMES or name in RELATIVE):
        return name
    allowed = f"{nearest(str(name), NAMES)}; allowed: {', '.join(NAMES)}"
    if isinstance(name, str):
        wrong.append(f"unknown op{allowed}")  # `fault_of` writes the name of the op before the text
    else:
        wrong.append(f"unknown op {shown(name)}{allowed}")
    return None


def _read_value(name: str, entry: dict[Any, Any], wrong: list[str]) -> Any:
    """Return the parsed value of an op. The operation checks later whether the value fits the model."""
    kind = operation_of(name).value
    if "value" not in entry and kind.required:
        wrong.append(f"the value is missing; write value = {kind.wanted}")
        return None
    return kind.read(entry.get("value"), wrong)


# -- the trigger of an op


def _read_list_trigger(entry: dict[Any, Any], wrong: list[str]) -> Trigger | None:
    conditions = {}
    for key, condition in LIST_TRIGGER.items():
        rule = CONDITIONS[condition]
        if key not in entry:
            wrong.append(f"{key} is missing; write {key} = {rule.allowed}")
            continue
        kept = rule.keep(entry[key])
        if kept is None:
            wrong.append(refusal(key, entry[key], rule))
            continue
        conditions[condition] = kept
    if len(conditions) < len(LIST_TRIGGER):
        return None
    return Trigger(**conditions)


def _read_trigger(entry: dict[Any, Any], wrong: list[str]) -> Trigger | None:
    if "trigger" not in entry:
        wrong.append(f"the trigger is missing; write trigger = {TRIGGER_SHAPE}")
        return None
    trigger = entry["trigger"]
    if not isinstance(trigger, dict):
        wrong.append(f"trigger={shown(trigger)} is not allowed; write {TRIGGER_SHAPE}")
        return None
    if "any" in trigger:
        trigger = _read_any(trigger, wrong)
        if trigger is None:
            return None
    elif len(trigger) != 1:
        got = " and ".join(map(shown_key, trigger)) or "none"
        wrong.append(f"trigger must have exactly one condition, got {got}; write {TRIGGER_SHAPE}")
        return None
    return read_table("trigger", trigger, CONDITIONS, wrong, Trigger)


def _read_any(trigger: dict[Any, Any], wrong: list[str]) -> dict[Any, Any] | None:
    """Return the conditions of { any = [...] } as one table, or None if the syntax is wrong."""
    tables = trigger["any"]
    if len(trigger) > 1 or not _are_conditions(tables):
        wrong.append(
            f"trigger={shown(trigger)} is not allowed; "
            "write any = [...] as the only key, with one condition in each table"
        )
        return None
    counts = Counter(name for table in tables for name in table)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        wrong.append(f"trigger.any has the condition {twice[0]} twice; keep the one that is met first")
        return None
    return {name: value for table in tables for name, value in table.items()}


def _are_conditions(tables: Any) -> bool:
    if not isinstance(tables, list | tuple) or not tables:
        return False
    return all(isinstance(table, dict) and len(table) == 1 for table in tables)


# -- schedules in files and in inline text


PARSERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    ".json": ("JSON", inputs.parse_json),
    ".toml": ("TOML", inputs.parse_toml),
    ".yaml": ("YAML", inputs.parse_yaml),
    ".yml": ("YAML", inputs.parse_yaml),
}


def from_text(text: str) -> Any:
    """Parse a schedule. `text` is the name of a file, or inline JSON or YAML."""
    if text.lstrip()[:1] in ("{", "[") or "\n" in text:
        return _parse_inline(text)
    data = _parse_file(text)
    if isinstance(data, dict) and data.keys() == {"growth"}:  # the file has the syntax of a preset
        return data["growth"]
    return data


def _parse_file(text: str) -> Any:
    got = inputs.shortened(inputs.printable(text), 120)
    path = Path(text)
    suffix = path.suffix.lower()
    if suffix not in PARSERS:
        raise ConfigError(
            f"growth={got!r} is not a schedule; "
            "give a file ending in .json, .yaml, .yml or .toml, or write { ops = [...] }"
        )
    why = inputs.not_a_file(path)
    if why:
        why = why.replace("does not exist", "No such file or directory")
        raise ConfigError(f"growth={got}: the file cannot be read ({why}); give the path of a schedule file")
    kind, parse = PARSERS[suffix]
    try:
        content = inputs.read_text(path)
    except inputs.BadInput as e:
        raise ConfigError(f"growth={got}: the file {e}") from None
    try:
        return parse(content)
    except inputs.BadInput as e:
        raise ConfigError(f"growth={got}: the file is not valid {kind} ({e}); fix the file") from None


def _parse_inline(text: str) -> Any:
    try:
        return inputs.parse_json(text)
    except inputs.BadInput as e:
        why = e
    try:
        return inputs.parse_yaml(text)
    except inputs.BadInput as e:
        if "\n" in text:  # a text with several lines is probably YAML
            why = e
    raise ConfigError(
        f"growth={inputs.shortened(text, 200)} is neither TOML, JSON nor YAML ({why}); "
        f"write {SHAPE}, or give the name of a schedule file"
    )
