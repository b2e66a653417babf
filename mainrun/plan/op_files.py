"""mainrun.plan.op_files"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.errors import ConfigError, nearest
from mainrun.files import inputs

if TYPE_CHECKING:
    pass  # which imports this file

from mainrun.plan.ops import (
    ARCHITECTURE,
    NAMES,
    STRENGTH,
    TRAINING,
    VALUELESS,
    Fault,
    Op,
    Rates,
    Schedule,
    Transfer,
    Trigger,
    _defaults,
    _fault,
    _key,
    _shown,
    _Training,
    _written,
)

# -- reading it

CHOICES: dict[str, tuple[str, ...]] = {
    "init": ("copy", "identity"),
    "preserve": STRENGTH,
    "on_fail": ("abort", "skip"),
    "mode": ("auto", "keep", "scale", "reset", "asymmetric"),
    "width_rule": ("none", "adam_1_over_n"),
    "kv": ("scale", "keep"),
    "tied": ("fold_final_norm",),
    "router": ("random", "zero"),
    "router_weights": ("renormalised", "softmax"),
}
LIST_KEYS = ("name", "desc", "value", "trigger_loss", "max_wait_iters", "reevaluate")
OP_KEYS = (
    "id",
    "name",
    "desc",
    "value",
    "trigger",
    "reevaluate",
    "init",
    "preserve",
    "optimizer",
    "lr",
    "on_fail",
)
OF_WEIGHTS = ("init", "preserve", "optimizer", "lr", "on_fail")  # for an op of the architecture
SHAPE = "{ ops = [{ name, value, trigger }, ...] }"

Check = tuple[Callable[[Any], Any], str]  # the value as it is kept, or None; what is allowed


def _number(
    low: float = -math.inf, high: float = math.inf, closed: bool = False
) -> Callable[[Any], float | None]:
    """A finite number between; `closed`: or at an end."""

    def check(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            return None
        return float(value) if low < value < high or (closed and value in (low, high)) else None

    return check


def _whole(low: int) -> Callable[[Any], int | None]:
    """Also 2e8, which JSON and TOML take for no integer."""

    def check(value: Any) -> int | None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value < 2**63
            or value != int(value)
        ):
            return None
        return int(value)

    return check


def _one_of(key: str) -> Check:
    return (lambda value: value if value in CHOICES[key] else None), " or ".join(CHOICES[key])


def _plateau(value: Any) -> tuple[int, float] | None:
    if not isinstance(value, dict) or value.keys() != {"evals", "rel"}:
        return None
    evals, rel = _whole(1)(value["evals"]), _number(0, 1)(value["rel"])
    return (evals, rel) if evals and rel else None


CONDITIONS: dict[str, Check] = {
    "loss_below": (_number(), "a finite number"),
    "wait_iters": (_whole(0), "a whole number, 0 or more"),
    "step": (_whole(1), "a whole number, 1 or more"),
    "tokens": (_whole(1), "a whole number, 1 or more"),
    "budget_frac": (_number(0, 1), "a share of the run's tokens, above 0 and below 1"),
    "plateau": (_plateau, "{ evals = N, rel = R }, N 1 or more, R above 0 and below 1"),
}
TRIGGER = "{ step = N } or { budget_frac = F } or { any = [{ loss_below = L }, { wait_iters = N }] }"
PARTS: dict[str, dict[str, Check]] = {
    "optimizer": {"mode": _one_of("mode"), "min_coverage": (_number(0, 1, closed=True), "a share, 0 to 1")},
    "lr": {
        "rewarm_iters": (_whole(0), "a whole number, 0 or more"),
        "new_params_peak": (_number(0), "a number above 0"),
        "width_rule": _one_of("width_rule"),
    },
    "widen_model": {
        "factor": (_number(1), "a whole number, 2 or more"),
        "d_model": (_whole(2), "a whole number, 2 or more"),
        "kv": _one_of("kv"),
        "tied": _one_of("tied"),
        "noise_snr_db": (_number(-200, 200), "a number of decibels between -200 and 200"),
    },
    "upcycle_moe": {
        "experts": (_whole(2), "a whole number, 2 or more"),
        "top_k": (_whole(1), "a whole number, 1 or more"),
        "router": _one_of("router"),
        "router_std": (_number(0), "a number above 0"),
        "router_weights": _one_of("router_weights"),
        "shards": (_whole(1), "a whole number, 1 or more"),
        "noise_snr_db": (_number(-200, 200), "a number of decibels between -200 and 200"),
    },
}
FILLED: dict[str, dict[str, Any]] = {
    "widen_model": {"kv": "scale", "tied": "fold_final_norm"},
    "upcycle_moe": {"top_k": 2, "router": "random", "shards": 1},
}


def read(data: Any) -> tuple[Schedule, list[Fault]]:
    """The ops that are well formed, and everything that is wrong with the others."""
    faults: list[Fault] = []
    if isinstance(data, list) and len(data) > MOST_OPS:
        return Schedule(), [(-1, f"the list has {len(data):,} ops; write at most {MOST_OPS:,}.")]
    if isinstance(data, list):
        return Schedule(_ops(data, faults, {}, 0, listed=True)), faults
    if not isinstance(data, dict):
        return Schedule(), [
            (
                -1,
                f"{_shown(data)} is no schedule; write {SHAPE}, or a list of ops with trigger_loss and max_wait_iters.",
            )
        ]
    allowed = ("version", "seed", "defaults", "ops")
    faults += [(-1, f"{text}.") for text in _unknown("", data, allowed)]
    version, seed, ops, defaults = (
        data.get(key, other) for key, other in (("version", 2), ("seed", 0), ("ops", []), ("defaults", {}))
    )
    if version != 2 or isinstance(version, bool):
        faults.append(
            (-1, f"version={_shown(version)} is not known; write 2, or the original format as a list.")
        )
    if _whole(0)(seed) is None:
        faults.append((-1, f"seed={_shown(seed)} is not allowed; write a whole number, 0 or more."))
        seed = 0
    if not isinstance(ops, list | tuple):
        faults.append((-1, f"ops={_shown(ops)} is not allowed; write a list of {{ name, value, trigger }}."))
        ops = []
    if len(ops) > MOST_OPS:
        faults.append((-1, f"ops has {len(ops):,} entries; write at most {MOST_OPS:,}."))
        ops = []
    general = ("reevaluate", *OF_WEIGHTS[1:])
    if not isinstance(defaults, dict):
        faults.append(
            (-1, f"defaults={_shown(defaults)} is not allowed; write a table of {', '.join(general)}.")
        )
        defaults = {}
    faults += [(-1, f"{text}.") for text in _unknown("defaults.", defaults, general)]
    common = {key: value for key, value in defaults.items() if key in general}
    wrong: list[str] = []
    common = {key: found for key, value in common.items() if (found := _said(key, value, wrong)) is not None}
    faults += [(-1, f"defaults.{text}.") for text in wrong]
    return Schedule(_ops(ops, faults, common, int(seed)), int(seed)), faults


MOST_OPS = 1000


def _unknown(where: str, keys: Iterable[Any], allowed: Collection[str]) -> list[str]:
    """A sentence for each key that is not allowed; ten of them, and how many more there are."""
    strange = [key for key in keys if key not in allowed]
    texts = [_unknown_key(where, key, allowed) for key in strange[:10]]
    return texts + _uncounted(len(strange))


def _unknown_key(where: str, key: Any, allowed: Collection[str]) -> str:
    name = _key(key) if where else _shown(key)
    return f"unknown key {where}{name}{nearest(str(key), allowed)}; allowed: {', '.join(allowed)}"


def _uncounted(strange: int) -> list[str]:
    return [f"and {strange - 10:,} more unknown keys"] if strange > 10 else []


Wrong = list[str]


def _ops(
    entries: Sequence[Any], faults: list[Fault], common: dict[str, Any], seed: int, listed: bool = False
) -> tuple[Op, ...]:
    found: list[Op] = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            faults.append(
                (place, f"ops[{place}]={_shown(entry)} is no op; write {{ name, value, trigger }}.")
            )
            continue
        wrong: Wrong = []
        op = _op(place, entry, common, seed, listed, wrong)
        if op and op.id in (ids := {other.id: other.place for other in found}):
            wrong.append(f"id={op.id!r} is that of ops[{ids[op.id]}]; give each its own")
        faults += [_fault(place, entry.get("name"), text) for text in wrong]
        if op and not wrong:
            found.append(op)
    return tuple(found)


def _op(
    place: int, entry: dict[str, Any], common: dict[str, Any], seed: int, listed: bool, wrong: Wrong
) -> Op | None:
    keys, others = (LIST_KEYS, OP_KEYS) if listed else (OP_KEYS, LIST_KEYS)
    fires = (_list_trigger if listed else _new_trigger)(entry, wrong)
    strange = 0
    for key in entry:
        if key in keys:
            continue
        if key in others:
            form = (
                "version 2; write { version = 2, ops = [...] } around the list"
                if listed
                else "the list format; write a trigger"
            )
            wrong.append(f"{key!r} is a key of {form}")
            continue
        strange += 1
        if strange <= 10:
            wrong.append(_unknown_key("", key, keys))
    wrong += _uncounted(strange)
    name: Any = entry.get("name")
    relative = (
        isinstance(name, str)
        and name.startswith("change_")
        and TRAINING.get(f"set_{name[7:]}", _Training("")).field
    )
    if "name" not in entry:
        wrong.append(f"no name; write one of {', '.join(NAMES)}")
    elif name not in NAMES and not relative:
        wrong.append(
            f"unknown op{' ' + _shown(name) if not isinstance(name, str) else ''}{nearest(str(name), NAMES)}; allowed: {', '.join(NAMES)}"
        )
    if name not in NAMES and not relative:
        return None
    said = _defaults(name, place)
    said |= {key: value for key, value in common.items() if key == "reevaluate" or name in ARCHITECTURE}
    for key in ("id", "desc", "reevaluate", *OF_WEIGHTS):
        if key not in entry or key not in keys:
            continue
        if key in OF_WEIGHTS and name in TRAINING:
            wrong.append(f"{key} is for ops that change the weights; remove it")
        elif key == "init" and not said["init"]:
            wrong.append("init is for stack_layers and widen_mlp; remove it")
        elif (value := _said(key, entry[key], wrong)) is not None:
            said[key] = value
    value = _value(name, entry, wrong)
    if fires is None or wrong:
        return None
    drawn = hashlib.sha256(repr((seed, place)).encode()).digest()
    return Op(name, value, fires, place, int.from_bytes(drawn[:8], "little") >> 1, **said)


def _said(key: str, value: Any, wrong: Wrong) -> Any:
    """A key of an op, beside name, value and trigger, as it is kept; None: it is wrong."""
    if key in ("id", "desc"):
        if isinstance(value, str) and (value.strip() or key == "desc"):
            return value
        wrong.append(f"{key}={_shown(value)} is not allowed; write a text")
    elif key == "reevaluate":
        if isinstance(value, bool):
            return value
        wrong.append(f"reevaluate={_shown(value)} is not allowed; write true or false")
    elif key in PARTS:
        if key == "optimizer" and isinstance(value, str):
            value = {"mode": value}
        found = _table(key, value, PARTS[key], wrong)
        return None if found is None else Transfer(**found) if key == "optimizer" else Rates(**found)
    elif isinstance(value, str) and value in CHOICES[key]:
        return value
    else:
        meant = nearest(value, CHOICES[key]) if isinstance(value, str) else ""
        wrong.append(f"{key}={_shown(value)} is not allowed{meant}; write {' or '.join(CHOICES[key])}")
    return None


def _table(name: str, value: Any, known: dict[str, Check], wrong: Wrong) -> dict[str, Any] | None:
    """A table of known keys, or None; what is wrong with it is added."""
    if not isinstance(value, dict):
        wrong.append(f"{name}={_shown(value)} is not allowed; write a table of {', '.join(known)}")
        return None
    found, before = {}, len(wrong)
    strange = 0
    for key, given in value.items():
        if key not in known:
            strange += 1
            if strange <= 10:
                wrong.append(_unknown_key(f"{name}.", key, known))
            continue
        check, allowed = known[key]
        kept = check(given) if not isinstance(given, list | dict) or key == "plateau" else None
        if kept is None:
            meant = nearest(given, CHOICES[key]) if isinstance(given, str) and key in CHOICES else ""
            wrong.append(f"{name}.{key}={_shown(given)} is not allowed{meant}; write {allowed}")
        found[key] = kept
    wrong += _uncounted(strange)
    return found if len(wrong) == before else None


def _value(name: str, entry: dict[str, Any], wrong: Wrong) -> Any:
    """The value as it is kept. What only the model can tell, `after` tells."""
    value = entry.get("value")
    if name in VALUELESS:
        if value is not None:
            wrong.append(f"value={_shown(value)} is not allowed: it takes none; write null, or leave it out")
        return None
    if "value" not in entry:
        wrong.append(f"no value; write value = {_wants(name)}")
        return None
    if name == "widen_model" and type(value) is int:
        value = {"d_model": value}
    if name in FILLED and isinstance(value, dict):
        found = _table("value", value, PARTS[name], wrong)
        if found is None:
            return None
        one = (
            [key for key in ("factor", "d_model") if key in found]
            if name == "widen_model"
            else ["experts"]
            if "experts" in found
            else []
        )
        if len(one) != 1:
            wrong.append(
                f"value={_shown(value)} has {'both factor and d_model' if one else 'no size'}; write {_written(name)}"
            )
            return None
        if isinstance(found.get("factor"), float) and found["factor"].is_integer():
            found["factor"] = int(found["factor"])
        return FILLED[name] | found
    if isinstance(value, list | tuple) and name in ("stack_layers", "freeze_layer", "unfreeze_layer"):
        if odd := [f"value[{i}]={_shown(v)}" for i, v in enumerate(value) if type(v) is not int]:
            wrong.append(f"{', '.join(odd[:5])} is not allowed; write {_wants(name)}")
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or _number()(value) is None:
        wrong.append(f"value={_shown(value)} is not allowed; write {_wants(name)}")
    return value


def _wants(name: str) -> str:
    if name in FILLED:
        return _written(name)
    if name == "stack_layers":
        return "the source of each new layer, like [0, 0, 1, 1]"
    if name in ("freeze_layer", "unfreeze_layer"):
        return "a layer, or a list of layers"
    return "a whole number" if name in ARCHITECTURE else "a finite number"


def _list_trigger(entry: dict[str, Any], wrong: Wrong) -> Trigger | None:
    found = {}
    for key, condition in (("trigger_loss", "loss_below"), ("max_wait_iters", "wait_iters")):
        check, allowed = CONDITIONS[condition]
        if key not in entry:
            wrong.append(f"no {key}; write {key} = {allowed}")
        elif (kept := check(entry[key])) is None:
            wrong.append(f"{key}={_shown(entry[key])} is not allowed; write {allowed}")
        else:
            found[condition] = kept
    return Trigger(**found) if len(found) == 2 else None


def _new_trigger(entry: dict[str, Any], wrong: Wrong) -> Trigger | None:
    if "trigger" not in entry:
        wrong.append(f"no trigger; write trigger = {TRIGGER}")
        return None
    given = entry["trigger"]
    if not isinstance(given, dict):
        wrong.append(f"trigger={_shown(given)} is not allowed; write {TRIGGER}")
        return None
    if "any" in given:
        each = given["any"]
        if (
            len(given) > 1
            or not isinstance(each, list | tuple)
            or not each
            or not all(isinstance(one, dict) and len(one) == 1 for one in each)
        ):
            wrong.append(
                f"trigger={_shown(given)} is not allowed; write any = [...] alone, with one condition in each table"
            )
            return None
        if twice := sorted(
            {key for i, one in enumerate(each) for key in one if any(key in other for other in each[:i])}
        ):
            wrong.append(f"trigger.any has {twice[0]} twice; keep the one that comes first")
            return None
        given = {key: value for one in each for key, value in one.items()}
    elif len(given) != 1:
        got = " and ".join(map(_key, given)) or "none"
        wrong.append(f"trigger has one condition, got {got}; write {TRIGGER}")
        return None
    found = _table("trigger", given, CONDITIONS, wrong)
    return None if found is None else Trigger(**found)


# -- where it stands


READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    ".json": ("JSON", inputs.parse_json),
    ".toml": ("TOML", inputs.parse_toml),
    ".yaml": ("YAML", inputs.parse_yaml),
    ".yml": ("YAML", inputs.parse_yaml),
}


def from_text(text: str) -> Any:
    """The data of a schedule that is given by its file, or as JSON or YAML."""
    if text.lstrip()[:1] in ("{", "[") or "\n" in text:
        return _inline(text)
    got = inputs.shortened(inputs.printable(text), 120)
    path = Path(text)
    if path.suffix.lower() not in READERS:
        raise ConfigError(
            f"growth={got!r} is no schedule; give a file ending in .json, .yaml, .yml or .toml, or {{ ops = [...] }}"
        )
    why = inputs.not_a_file(path)
    if why:
        why = why.replace("does not exist", "No such file or directory")
        raise ConfigError(f"growth={got}: the file cannot be read ({why}); give the path of a schedule")
    try:
        content = inputs.read_text(path)
    except inputs.BadInput as e:
        raise ConfigError(f"growth={got}: the file {e}") from None
    kind, parse = READERS[path.suffix.lower()]
    try:
        data = parse(content)
    except inputs.BadInput as e:
        raise ConfigError(f"growth={got}: not valid {kind} ({e}); mend the file") from None
    return data["growth"] if isinstance(data, dict) and data.keys() == {"growth"} else data  # as in a preset


def _inline(text: str) -> Any:
    """A schedule that stands on the command line itself."""
    try:
        return inputs.parse_json(text)
    except inputs.BadInput as e:
        why = e
    try:
        return inputs.parse_yaml(text)
    except inputs.BadInput as e:
        why = e if "\n" in text else why
    raise ConfigError(
        f"growth={inputs.shortened(text, 200)} is neither TOML, JSON nor YAML ({why}); write {SHAPE}, or give its file"
    )
