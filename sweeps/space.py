"""What a study varies: parameters by the name of their config field, and a trial's config from their values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError, nearest
from mainrun.plan.plan import Plan

# what a comparison must hold still: other data, other epochs or another geometry are another task; a seed is no setting
NEVER = {
    "seed": "a seed is drawn, not chosen: a study that may choose it fits noise",
    "epochs": "the epochs are the task's budget",
    "max_steps": "the steps are the task's budget",
    **dict.fromkeys(
        ("corpus", "num_titles", "shuffle", "val_frac", "dev_frac", "tokenizer_fit"), "the data is the task's"
    ),
    "official_geometry": "the geometry of the evaluation is the task's",
    **dict.fromkeys(
        ("device", "threads", "compile", "attention", "dtype"),
        "the machine is the study's, under [set] or threads",
    ),
}
DERIVED = {
    "timescale": "weight_decay"
}  # searched in place of it: epochs over which a weight forgets, 1 / (lr * weight_decay * steps)


class Range(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    low: float | int
    high: float | int
    log: bool = False
    step: float | int | None = None
    when: dict[str, list[Any]] = {}


class Choice(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    values: list[Any]
    when: dict[str, list[Any]] = {}


Parameter = Range | Choice
Space = Mapping[str, Parameter]


def known_fields() -> list[str]:
    return [*TrainConfig.model_fields, *DERIVED]


def faults(space: Space, base: TrainConfig) -> Iterator[str]:
    """Everything that is wrong with a space, where a preset stands as it stands."""
    if not space:
        yield "space is empty; write at least one [space.FIELD]."
    for name, parameter in space.items():
        where = f"space.{name}"
        field = name.partition(".")[0]
        if name in NEVER:
            yield f"{where}: {NEVER[name]}; remove it."
            continue
        if field not in known_fields() or ("." in name and field != "growth"):
            yield f"{where} is no config field{nearest(field, known_fields())}; `mainrun presets --fields` lists them."
            continue
        if field == "growth" and (why := _no_path(base, name)):
            yield f"{where}: {why}."
            continue
        if "." not in name and name not in DERIVED and TrainConfig.class_of(name) == "inert":
            yield f"{where} changes nothing that is trained; remove it."
            continue
        if name in DERIVED and DERIVED[name] in space:
            yield f"{where} stands for {DERIVED[name]}, which is in the space too; keep one of them."
        before = len(bad := list(_values(where, parameter)))
        yield from bad
        yield from _conditions(where, parameter, space, base)
        if not before:
            yield from _outside(where, name, parameter, base)


def _values(where: str, p: Parameter) -> Iterator[str]:
    if isinstance(p, Choice):
        if not p.values:
            yield f"{where}.values is empty; write at least two values."
        elif len({repr(v) for v in p.values}) < len(p.values):
            yield f"{where}.values={p.values} has one of them twice; keep each once."
        elif odd := [v for v in p.values if not isinstance(v, bool | int | float | str)]:
            yield f"{where}.values holds {odd[0]!r}; write numbers, texts, true or false."
        return
    if not all(map(math.isfinite, (p.low, p.high))):
        yield f"{where}: low={p.low} high={p.high} are no numbers; write finite ones."
    elif p.low > p.high:
        yield f"{where}: low={p.low:g} > high={p.high:g}; swap them."
    elif p.low == p.high:
        yield f"{where}: low and high are both {p.low:g}, there is nothing to search; write it under [set]."
    if p.log and p.low <= 0:
        yield f"{where}: log=true with low={p.low:g}; a logarithm needs low > 0."
    if p.step is not None and p.step > 0 and not p.log and p.low < p.high and p.step > p.high - p.low:
        yield f"{where}: step={p.step:g} is wider than from low={p.low:g} to high={p.high:g}; write a smaller step, or values."
    if p.step is not None and (p.step <= 0 or p.log):
        yield f"{where}: step={p.step:g}{' with log=true' if p.log else ''}; write a step above 0, and no log."


def _conditions(where: str, p: Parameter, space: Space, base: TrainConfig) -> Iterator[str]:
    for other, values in p.when.items():
        if other not in space:
            if other not in TrainConfig.model_fields:
                yield f"{where}.when: {other} is no config field{nearest(other, known_fields())}; name one that is."
            elif (fixed := getattr(base, other)) not in values:
                yield f"{where}.when: {other} is {fixed!r} in every trial, never one of {values}; search it too, or remove {where}."
            continue
        parent = space[other]
        if parent.when:
            yield f"{where}.when: {other} is conditional itself; let {where} depend on what {other} depends on."
        if isinstance(parent, Choice):
            if never := [v for v in values if v not in parent.values]:
                yield f"{where}.when: {other} is never {never[0]!r}; its values: {parent.values}."
        else:
            yield f"{where}.when: {other} is a range; a condition needs a parameter with values."
        if not values:
            yield f"{where}.when: {other} has no value for which it holds; list at least one."


def _outside(where: str, name: str, p: Parameter, base: TrainConfig) -> Iterator[str]:
    """Values that no config takes, found by asking for the config."""
    if name in DERIVED:
        if not all(
            isinstance(v, int | float) and v > 0 for v in (p.values if isinstance(p, Choice) else [p.low])
        ):
            yield f"{where} is a time; its values must be above 0."
        return
    for value in p.values if isinstance(p, Choice) else [p.low, p.high]:
        try:
            changed(base, {name: value})
        except ConfigError as e:
            if (
                name.partition(".")[0] in str(e).partition(":")[0]
            ):  # not a quarrel with another field, which the space may settle
                yield f"{where}: {value!r} is no value of it: {e}."
                return


def _parts_below(node: Any) -> str:
    """What a path into a schedule can name next."""
    if isinstance(node, list) and node:
        return f"0..{len(node) - 1}"
    if isinstance(node, dict):
        return ", ".join(node)
    return "nothing"


def _no_path(base: TrainConfig, name: str) -> str:
    node: Any = base.growth.data()
    parts = name.split(".")[1:]
    for i, part in enumerate(parts):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            got = ".".join(parts[:i]) or "growth"
            return f"the preset's schedule has no {part!r} in {got}; there: {_parts_below(node)}"
    return "" if parts else "name what of the schedule, like growth.ops.0.trigger.budget_frac"


def active(space: Space, values: Mapping[str, Any], base: TrainConfig) -> dict[str, Parameter]:
    """The parameters whose conditions hold where these values (of those without conditions) stand."""

    def holds(p: Parameter) -> bool:
        return all(
            values.get(other, getattr(base, other, None)) in allowed for other, allowed in p.when.items()
        )

    return {name: p for name, p in space.items() if holds(p)}


def changed(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The config of a trial. A ConfigError where the values do not go together."""
    fields = base.model_dump()
    growth = base.growth.data()
    for name, value in values.items():
        if name in DERIVED:
            continue
        if "." in name:
            *path, last = name.split(".")[1:]
            node: Any = growth
            for part in path:
                node = node[int(part)] if isinstance(node, list) else node[part]
            node[int(last) if isinstance(node, list) else last] = value
        else:
            fields[name] = value
    if any("." in name for name in values):
        fields["growth"] = growth
    return from_dict(fields | {"preset": base.preset})


def resolved(base: TrainConfig, values: Mapping[str, Any], train_tokens: int | None) -> TrainConfig:
    """With derived parameters turned into the fields they stand for. train_tokens: of an epoch."""
    cfg = changed(base, values)
    if "timescale" in values:
        assert train_tokens is not None
        steps = Plan(cfg, train_tokens).steps
        cfg = changed(cfg, {"weight_decay": 1 / (cfg.lr * float(values["timescale"]) * steps)})
    return cfg
