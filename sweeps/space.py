"""Check the search space of a study, and create the config of a trial from the trial's values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError, nearest
from mainrun.plan.plan import Plan

DATA_IS_FIXED = "the data is fixed by the task"
MACHINE_IS_FIXED = "the machine is the same for all trials; set it under [set] or with threads"
# Config fields that must be equal in all trials, because the scores of the trials are compared. The
# dictionary maps the name of each field to the reason that the error message gives.
NOT_SEARCHABLE = {
    "seed": "the seed is not a hyperparameter, and a search over seeds would fit noise",
    "epochs": "the number of epochs is fixed by the task",
    "max_steps": "the number of steps is fixed by the task",
    "corpus": DATA_IS_FIXED,
    "num_titles": DATA_IS_FIXED,
    "shuffle": DATA_IS_FIXED,
    "val_frac": DATA_IS_FIXED,
    "dev_frac": DATA_IS_FIXED,
    "documents": DATA_IS_FIXED,
    "tokenizer_fit": DATA_IS_FIXED,
    "start": "runs from trained weights are not compared with runs from random weights",
    "official_geometry": "the geometry of the evaluation is fixed by the task",
    "device": MACHINE_IS_FIXED,
    "threads": MACHINE_IS_FIXED,
    "compile": MACHINE_IS_FIXED,
    "attention": MACHINE_IS_FIXED,
    "dtype": MACHINE_IS_FIXED,
}
# Maps each parameter that is not a config field to the config field that the parameter sets. `timescale` is
# the time constant of weight decay as a share of the run, which equals 1 / (lr * weight_decay * steps).
DERIVED = {"timescale": "weight_decay"}


class Range(BaseModel):
    """A parameter whose value is a number between `low` and `high`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    low: float | int
    high: float | int
    log: bool = False
    step: float | int | None = None
    when: dict[str, list[Any]] = {}


class Choice(BaseModel):
    """A parameter whose value is chosen from a list."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    values: list[Any]
    when: dict[str, list[Any]] = {}


Parameter = Range | Choice
Space = Mapping[str, Parameter]


def searchable_names() -> list[str]:
    """Return all valid parameter names, except paths into the growth schedule."""
    return [*TrainConfig.model_fields, *DERIVED]


def may_be_searched(name: str) -> bool:
    """Return whether a study may search a parameter, which is a config field or derived from one."""
    return name in DERIVED or (name not in NOT_SEARCHABLE and TrainConfig.class_of(name) != "inert")


# -- faults of a space


def faults(space: Space, base: TrainConfig) -> Iterator[str]:
    """Yield one sentence for each fault of a search space. The trials change fields of the config `base`."""
    if not space:
        yield "space is empty; write at least one [space.FIELD]."
    for name, parameter in space.items():
        where = f"space.{name}"
        fault = _name_fault(name, base)
        if fault:
            yield f"{where}{fault}."
            continue
        if name in DERIVED and DERIVED[name] in space:
            yield f"{where} sets {DERIVED[name]}, which is also in the space; keep one of them."
        own_faults = list(_parameter_faults(where, parameter))
        yield from own_faults
        yield from _condition_faults(where, parameter, space, base)
        if not own_faults:
            yield from _config_faults(where, name, parameter, base)


def _name_fault(name: str, base: TrainConfig) -> str:
    """Return the reason why a parameter cannot have a name, or an empty string if the name is valid."""
    field = name.partition(".")[0]
    if name in NOT_SEARCHABLE:
        return f": {NOT_SEARCHABLE[name]}; remove it"
    if field not in searchable_names() or ("." in name and field != "growth"):
        suggestion = nearest(field, searchable_names())
        return f" is not a config field{suggestion}; `mainrun presets --fields` lists them"
    if field == "growth":
        fault = _path_fault(name, base)
        return f": {fault}" if fault else ""
    if name not in DERIVED and TrainConfig.class_of(name) == "inert":
        return " has no effect on the training; remove it"
    return ""


def _parameter_faults(where: str, p: Parameter) -> Iterator[str]:
    if isinstance(p, Range):
        yield from _range_faults(where, p)
        return
    if not p.values:
        yield f"{where}.values is empty; write at least two values."
        return
    if len({repr(value) for value in p.values}) < len(p.values):
        yield f"{where}.values={p.values} has a value twice; keep each value once."
        return
    for value in p.values:
        if not isinstance(value, bool | int | float | str):
            yield f"{where}.values contains {value!r}; write numbers, strings, true or false."
            return


def _range_faults(where: str, p: Range) -> Iterator[str]:
    if not math.isfinite(p.low) or not math.isfinite(p.high):
        yield f"{where}: low={p.low} high={p.high} must be finite numbers."
    elif p.low > p.high:
        yield f"{where}: low={p.low:g} > high={p.high:g}; swap them."
    elif p.low == p.high:
        yield f"{where}: low and high are both {p.low:g}: there is nothing to search; write it under [set]."
    if p.log and p.low <= 0:
        yield f"{where}: log=true with low={p.low:g}; a logarithm needs low > 0."
    if p.step is None:
        return
    if p.step <= 0 or p.log:
        logarithm = " with log=true" if p.log else ""
        yield f"{where}: step={p.step:g}{logarithm}; write a step above 0, and no log."
    elif p.low < p.high and p.step > p.high - p.low:
        yield (
            f"{where}: step={p.step:g} is larger than the range from low={p.low:g} to high={p.high:g}; "
            "write a smaller step, or values."
        )


def _condition_faults(where: str, p: Parameter, space: Space, base: TrainConfig) -> Iterator[str]:
    for name, allowed in p.when.items():
        if name in space:
            yield from _parent_faults(where, name, allowed, space[name])
        elif name not in TrainConfig.model_fields:
            suggestion = nearest(name, searchable_names())
            yield f"{where}.when: {name} is not a config field{suggestion}; name a field."
        elif getattr(base, name) not in allowed:
            yield (
                f"{where}.when: {name} is {getattr(base, name)!r} in every trial, never one of {allowed}; "
                f"search {name} too, or remove {where}."
            )


def _parent_faults(where: str, name: str, allowed: list[Any], parent: Parameter) -> Iterator[str]:
    """Yield the faults of a condition that depends on another parameter of the search space."""
    if parent.when:
        yield f"{where}.when: {name} also has a condition; give {where} the condition of {name} instead."
    if isinstance(parent, Range):
        yield f"{where}.when: {name} is a range; a condition needs a parameter with values."
    else:
        for value in allowed:
            if value not in parent.values:
                yield f"{where}.when: {name} is never {value!r}; its values are {parent.values}."
                break
    if not allowed:
        yield f"{where}.when: {name} has no values, so the condition is never met; write at least one value."


def _config_faults(where: str, name: str, p: Parameter, base: TrainConfig) -> Iterator[str]:
    """Yield a sentence about the first value of a parameter that the config does not allow.

    The values of a parameter with a condition are tried with the first values that meet the condition.
    """
    values = p.values if isinstance(p, Choice) else [p.low, p.high]
    if name in DERIVED:
        smallest = p.values if isinstance(p, Choice) else [p.low]
        if not all(isinstance(value, int | float) and value > 0 for value in smallest):
            yield f"{where} is a time; its values must be above 0."
        return
    field = name.partition(".")[0]
    met = {
        other: allowed[0]
        for other, allowed in p.when.items()
        if other in TrainConfig.model_fields and allowed
    }
    for value in values:
        try:
            with_values(base, met | {name: value})
        except ConfigError as e:
            # Ignore conflicts with other fields, because other parameters may resolve these conflicts.
            if field in str(e).partition(":")[0]:
                yield f"{where}: {value!r} is not allowed: {e}."
                return


def _path_fault(name: str, base: TrainConfig) -> str:
    """Return an error message if a path, such as growth.ops.0.value, is not in the growth schedule of `base`.

    If the path exists, return an empty string.
    """
    node: Any = base.growth.data()
    keys = name.split(".")[1:]
    if not keys:
        return "name a value of the schedule, such as growth.ops.0.trigger.budget_frac"
    for i, key in enumerate(keys):
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        else:
            parent = ".".join(keys[:i]) or "growth"
            return f"the preset's schedule has no {key!r} in {parent}; allowed: {_keys_of(node)}"
    return ""


def _keys_of(node: Any) -> str:
    """Return a text that lists the keys or indices of a node of the growth schedule."""
    if isinstance(node, list) and node:
        return f"0..{len(node) - 1}"
    if isinstance(node, dict):
        return ", ".join(node)
    return "nothing"


# -- the config of a trial


def active_parameters(space: Space, values: Mapping[str, Any], base: TrainConfig) -> dict[str, Parameter]:
    """Return the parameters whose conditions are met by the values of a trial or by the base config."""
    active: dict[str, Parameter] = {}
    for name, parameter in space.items():
        conditions = parameter.when.items()
        if all(values.get(other, getattr(base, other, None)) in allowed for other, allowed in conditions):
            active[name] = parameter
    return active


def with_values(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return a copy of the base config with new values for config fields and parts of the growth schedule.

    Derived parameters are ignored. Raises ConfigError if the new config is not valid.
    """
    fields = base.model_dump()
    growth = base.growth.data()
    for name, value in values.items():
        if name in DERIVED:
            continue
        if "." in name:
            _set_path(growth, name.split(".")[1:], value)
            fields["growth"] = growth
        else:
            fields[name] = value
    return from_dict(fields | {"preset": base.preset})


def base_value(name: str, base: TrainConfig, train_tokens: int) -> Any:
    """Return the value of a parameter in the base config, or None if the base has no such value."""
    if name == "timescale":
        rate = base.lr * base.weight_decay * Plan(base, train_tokens).steps
        return 1 / rate if rate else None
    if "." not in name:
        return getattr(base, name)
    node: Any = base.growth.data()
    for key in name.split(".")[1:]:
        node = node[_index(node, key)]
    return node


def _set_path(node: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        node = node[_index(node, key)]
    node[_index(node, keys[-1])] = value


def _index(node: Any, key: str) -> Any:
    return int(key) if isinstance(node, list) else key


def trial_config(base: TrainConfig, values: Mapping[str, Any], train_tokens: int | None) -> TrainConfig:
    """Return the config of a trial, including the fields that derived parameters set.

    `train_tokens` is the number of training tokens in an epoch.
    """
    cfg = with_values(base, values)
    if "timescale" in values:
        assert train_tokens is not None
        steps = Plan(cfg, train_tokens).steps
        cfg = with_values(cfg, {"weight_decay": 1 / (cfg.lr * float(values["timescale"]) * steps)})
    return cfg
