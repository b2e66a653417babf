"""Operations are the changes that a growth schedule can make to a config while a run trains.

A schedule is a list of ops. Each op has the name of an operation, an absolute value, and a trigger. The
trigger decides when the op fires; see `triggers.py`. Ops fire in the order of the list. After an op with
`reevaluate = false`, the next op may fire because of the same evaluation. After an op with
`reevaluate = true`, the model is evaluated again, and the next op waits for the next regular evaluation.

To add an operation, add a row to OPERATIONS in this file. If the operation changes the model, also add a
function to OPS in `mainrun/growth/operators.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from mainrun.plan.op_values import (
    LayersValue,
    NoValue,
    NumberValue,
    Rule,
    TableValue,
    Value,
    choice,
    number,
    shown,
    whole_number,
)
from mainrun.plan.triggers import Trigger

GUARANTEES = (
    "none",
    "approx",
    "exact",
    "bitexact",
)  # how closely an op preserves the function of the model, from weakest to strongest


# -- a schedule


@dataclass(frozen=True)
class Transfer:
    """The settings that control how an op transfers the optimizer state to the new model."""

    mode: str = "auto"
    min_coverage: float = 0.0  # the minimum fraction of the state to transfer


@dataclass(frozen=True)
class Rates:
    """The settings that control the learning rate of new parameters."""

    rewarm_iters: int = 0  # number of warm-up steps for new parameters
    new_params_peak: float = 1.0  # peak learning rate of new parameters, relative to old parameters
    width_rule: str = "none"  # the rule by which a wider model changes learning rates


@dataclass(frozen=True)
class Op:
    """An entry of a growth schedule: one change of the config."""

    name: str
    value: Any  # int, float, tuple of ints, dict, or None for an operation without a value
    trigger: Trigger
    place: int = 0  # index of the op in the schedule
    seed: int = 0  # random seed, derived from the seed of the schedule and the index of the op
    id: str = ""
    desc: str = ""
    reevaluate: bool = True  # whether the model is evaluated again immediately after the op
    init: str = ""  # initial values of new parameters: "copy", or "identity" to keep the output unchanged
    preserve: str = ""  # one of GUARANTEES; `walk` replaces "" with the strongest possible guarantee
    optimizer: Transfer = Transfer()
    lr: Rates = Rates()
    on_fail: str = "abort"  # the action if a check fails: "abort" or "skip"

    def data(self) -> dict[str, Any]:
        """Return the op in the format of a schedule file, without keys that have their default value."""
        data: dict[str, Any] = {"name": self.name}
        if isinstance(self.value, tuple):
            data["value"] = list(self.value)
        elif self.value is not None:
            data["value"] = self.value
        data["trigger"] = self.trigger.data()
        default = Op(self.name, self.value, self.trigger, **default_keys(self.name, self.place))
        for key in ("id", "desc", "reevaluate", "init", "preserve", "optimizer", "lr", "on_fail"):
            value = getattr(self, key)
            if value != getattr(default, key):
                data[key] = dict(vars(value)) if isinstance(value, Transfer | Rates) else value
        return data

    def effect(self) -> dict[str, Any]:
        """Return all settings that affect the training state after the op. The trigger is not included."""
        data = self.data()
        for key in ("trigger", "id", "desc", "reevaluate", "on_fail"):
            data.pop(key, None)
        data["seed"] = self.seed
        return data

    def __hash__(self) -> int:
        return hash((self.name, self.place, self.trigger))

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        return f"{self.name} {_compact(self.value)}"


@dataclass(frozen=True)
class Schedule:
    ops: tuple[Op, ...] = ()
    seed: int = 0

    def data(self) -> dict[str, Any]:
        """Return the schedule in version 2 of the schedule format."""
        data: dict[str, Any] = {"version": 2}
        if self.seed:
            data["seed"] = self.seed
        data["ops"] = [op.data() for op in self.ops]
        return data

    def __str__(self) -> str:
        """Return the schedule as a string that `--set growth=` accepts."""
        return json.dumps(self.data(), separators=(",", ":"))


def _compact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, separators=(",", ":"), default=repr)


# -- the config that an operation changes


class Config(Protocol):
    """The fields of a config that operations read. `mainrun.config.TrainConfig` implements this protocol."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_kv_head(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def ff_width(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def router_weights(self) -> str: ...
    @property
    def attn_lora_rank(self) -> int: ...
    @property
    def mlp_lora_rank(self) -> int: ...
    @property
    def embed_lora_rank(self) -> int: ...
    @property
    def has_low_rank(self) -> bool: ...
    @property
    def base_frozen(self) -> bool: ...
    @property
    def frozen(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def unused_ids(self) -> int: ...
    @property
    def block_pattern(self) -> str: ...
    @property
    def letters(self) -> str: ...
    @property
    def routed_layers(self) -> tuple[int, ...]: ...

    def changed(self, **fields: Any) -> Self:
        """Return a copy of the config with changed fields and without a growth schedule.

        Raise ValueError if a value is not allowed.
        """


C = TypeVar("C", bound=Config)
Changes = dict[str, Any]  # maps config fields to their new values
SetBy = Mapping[str, int]  # maps each config field to the place of the op that set the field last


def _origin(set_by: SetBy, field: str, how: str = "set by") -> str:
    """Return a phrase that names the op that set a field, or an empty string if no op set the field."""
    if field in set_by:
        return f" ({how} ops[{set_by[field]}])"
    return ""


# -- the changes of each operation. Every error message names the given value, the allowed values and a fix


def _grown_size(op: Op, what: str, now: int, origin: str) -> int:
    """Return the new size that an op sets. Raise ValueError if it is not larger than `now`."""
    if isinstance(op.value, float):
        new = round(now * op.value)
        raise ValueError(
            f"value {op.value:g} is in the old relative form; {what} is {now}{origin}, so write {new}"
        )
    if not isinstance(op.value, int):
        raise ValueError(
            f"value={shown(op.value)} is not allowed; give an integer above {now}, the current {what}{origin}"
        )
    if op.value <= now:
        raise ValueError(
            f"value {op.value} is not above the current {what} {now}{origin}; give an integer above {now}"
        )
    return op.value


def _layers(count: int) -> str:
    return f"{count} layers" if count > 1 else "1 layer"


def _layer_range(count: int) -> str:
    return f"0..{count - 1}" if count > 1 else "0"


def _stack_layers(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    state = f"at this point the model has {_layers(cfg.n_layer)}{_origin(set_by, 'n_layer', 'after')}"
    sources = op.value
    if not isinstance(sources, tuple) or not sources:
        raise ValueError(_not_a_layer_list(sources, cfg.n_layer, state))
    wrong = [f"value[{i}]={layer}" for i, layer in enumerate(sources) if not 0 <= layer < cfg.n_layer]
    if wrong:
        raise ValueError(
            f"layers out of range: {', '.join(wrong[:5])}; {state}. Use {_layer_range(cfg.n_layer)}"
        )
    # the first copy of a frozen layer stays frozen, and the other copies are trained
    frozen = [i for i, layer in enumerate(sources) if layer in cfg.frozen and layer not in sources[:i]]
    changes: Changes = {"n_layer": len(sources), "frozen": tuple(frozen)}
    if cfg.routed_layers:
        changes["block_pattern"] = _stacked_letters(sources, cfg.letters)
    return changes


def _stacked_letters(sources: tuple[int, ...], letters: str) -> str:
    """Return the kinds of the new layers. Raise ValueError if they do not form a valid pattern."""
    stacked = "".join(letters[layer] for layer in sources)
    got = f"value={list(sources)} makes the layers {shown(stacked)}"
    if stacked[0] != "D":
        raise ValueError(f"{got}, but the first layer must be D; begin with a layer of kind D")
    for place in range(1, len(stacked)):
        if stacked[place] == "S" and stacked[place - 1] != "D":
            fix = f"change value[{place - 1}] to a layer of kind D"
            raise ValueError(f"{got}, but the layer before each S must be D; {fix}")
    return stacked


def _not_a_layer_list(value: Any, n_layer: int, state: str) -> str:
    old = list(range(n_layer))
    is_factor = isinstance(value, int | float) and value == int(value)
    if is_factor and 2 <= value * n_layer <= 1024:
        form = {2: "double", 3: "triple"}.get(int(value), f"{int(value)}-fold")
        new = _compact(old * int(value))
        return f'value {value:g} is the old "{form}" form; the model has {_layers(n_layer)}, so write {new}'
    return (
        f"value={shown(value)} is not a list of layers; {state}, so write the source of each new layer, "
        f"such as {_compact(old)}"
    )


def _widen_mlp(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    return {"d_ff": _grown_size(op, "hidden width", cfg.ff_width, _origin(set_by, "d_ff"))}


def _widen_model(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    if cfg.routed_layers:
        raise ValueError(
            f"a model with routed blocks cannot be widened (layers: {cfg.letters}); "
            "set the final d_model in the config instead, or use widen_mlp"
        )
    factor = _width_factor(op.value, cfg.d_model, _origin(set_by, "d_model"))
    kv_heads = factor * cfg.n_kv_head  # 0 means one per query head, so 0 stays unchanged
    if op.value["kv"] == "keep":
        kv_heads = cfg.kv_heads
    return {  # the width of a head does not change
        "d_model": factor * cfg.d_model,
        "d_ff": factor * cfg.ff_width,
        "n_head": factor * cfg.n_head,
        "n_kv_head": kv_heads,
    }


def _width_factor(value: Any, width: int, origin: str) -> int:
    if not isinstance(value, dict):
        new = round(width * value)
        raise ValueError(
            f"value {value:g} is in the old relative form; the width is {width}{origin}, so write {new}"
        )
    multiples = f"give {2 * width}, {3 * width}, ..."
    factor = value.get("factor")
    if factor is not None:
        if factor != int(factor):
            raise ValueError(
                f"factor={factor:g} is not a whole number; give 2, 3, ... for the width {width}{origin}"
            )
        return int(factor)
    d_model = int(value["d_model"])
    if d_model % width:
        raise ValueError(
            f"d_model={d_model} is not a multiple of the current width {width}{origin}; {multiples}"
        )
    if d_model < 2 * width:
        raise ValueError(f"d_model={d_model} is not above the current width {width}{origin}; {multiples}")
    return d_model // width


def _add_heads(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    heads = _grown_size(op, "n_head", cfg.n_head, _origin(set_by, "n_head"))
    if cfg.kv_heads == cfg.n_head:
        return {"n_head": heads, "head_dim": cfg.head_width, "n_kv_head": 0}
    if heads % cfg.kv_heads:
        near = -(-heads // cfg.kv_heads) * cfg.kv_heads
        raise ValueError(
            f"{heads} heads cannot share {cfg.kv_heads} key/value heads evenly; "
            f"give a multiple, such as {near}"
        )
    return {"n_head": heads, "head_dim": cfg.head_width, "n_kv_head": cfg.kv_heads}


def _upcycle_moe(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    if cfg.experts:
        raise ValueError(
            f"the model already has {cfg.experts} experts{_origin(set_by, 'experts')}; "
            "remove this op, because only a dense model can be upcycled"
        )
    if cfg.mlp_lora_rank:
        raise ValueError(
            f"mlp_lora_rank is {cfg.mlp_lora_rank}{_origin(set_by, 'mlp_lora_rank')}, but experts have no "
            "low-rank terms; put merge_lora_weights before this op"
        )
    if not isinstance(op.value, dict):
        raise ValueError(f"value={shown(op.value)} is not allowed; write {OPERATIONS[op.name].value.wanted}")
    weights = op.value.get("router_weights", cfg.router_weights)
    _check_experts(op.value, cfg.ff_width, weights)
    _check_router(op)
    return {
        "experts": op.value["experts"],
        "top_k": op.value["top_k"],
        "router_weights": weights,
        "d_ff": cfg.ff_width // op.value["shards"],
    }


def _check_experts(value: dict[str, Any], hidden: int, weights: str) -> None:
    experts, top_k, shards = (value[key] for key in ("experts", "top_k", "shards"))
    if top_k > experts:
        raise ValueError(f"top_k={top_k} is larger than experts={experts}; use 1..{experts}")
    for name, size in (("hidden", hidden), ("experts", experts), ("top_k", top_k)):
        if size % shards:
            raise ValueError(
                f"shards={shards} does not divide {name}={size}; "
                "use a common divisor of hidden, experts and top_k"
            )
    if top_k == 1 and weights == "renormalised":
        raise ValueError(
            "top_k=1 with renormalised weights gives the router no gradient; "
            "use top_k=2, or router_weights=softmax"
        )


def _check_router(op: Op) -> None:
    value = op.value
    if value["router"] != "zero":
        if "noise_snr_db" in value:
            raise ValueError(
                "noise_snr_db changes the output of a model with router=random, "
                "whose experts diverge without noise; remove noise_snr_db, or use router=zero"
            )
        return
    if "router_std" in value:
        raise ValueError(
            f"router_std={value['router_std']:g} has no effect with router=zero; "
            "remove router_std, or use router=random"
        )
    if "noise_snr_db" not in value and op.optimizer.mode != "asymmetric":
        raise ValueError(
            "router=zero would always choose the same experts, because all experts get equal scores; "
            "use router=random, or make the experts differ with noise_snr_db or optimizer.mode=asymmetric"
        )


def _set_rank(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    field = OPERATIONS[op.name].field
    now = getattr(cfg, field)
    if isinstance(op.value, float):
        fix = f"write {round(now * op.value)}" if now else "write a rank such as 8"
        raise ValueError(
            f"value {op.value:g} is in the old relative form; "
            f"the rank is {now}{_origin(set_by, field)}, so {fix}"
        )
    if op.value < 1:
        fix = "give a rank of at least 1"
        if now:
            fix += ", or remove the low-rank weights with merge_lora_weights"
        raise ValueError(f"value={op.value} is not allowed; {fix}")
    if field == "mlp_lora_rank" and cfg.experts:
        raise ValueError(
            f"the MLPs are experts{_origin(set_by, 'experts', 'after')}, and experts have no low-rank terms; "
            "remove this op, or use set_attn_lora_rank"
        )
    return {field: op.value}


def _merge_lora_weights(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    if not cfg.has_low_rank:
        origin = _origin(set_by, "attn_lora_rank", "after")
        raise ValueError(
            f"there are no low-rank weights to merge{origin}; "
            "move this op after an op that sets a rank, or remove this op"
        )
    return {"attn_lora_rank": 0, "mlp_lora_rank": 0, "embed_lora_rank": 0}


def _freeze_layer(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    layers = _layers_of(op, cfg, set_by)
    twice = [layer for layer in layers if layer in cfg.frozen]
    if twice:
        raise ValueError(
            f"layer {twice[0]} is already frozen; {_frozen_layers(cfg, set_by)}. Remove it from the op"
        )
    return {"frozen": tuple(sorted({*cfg.frozen, *layers}))}


def _unfreeze_layer(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    layers = _layers_of(op, cfg, set_by)
    trained = [layer for layer in layers if layer not in cfg.frozen]
    if trained:
        raise ValueError(
            f"layer {trained[0]} is not frozen; {_frozen_layers(cfg, set_by)}. Remove it from the op"
        )
    return {"frozen": tuple(sorted(set(cfg.frozen) - set(layers)))}


def _layers_of(op: Op, cfg: Config, set_by: SetBy) -> tuple[int, ...]:
    """Return the layers that an op names. Raise ValueError if the model does not have these layers."""
    layers = op.value
    if isinstance(layers, int):
        layers = (layers,)
    if not isinstance(layers, tuple) or not layers:
        raise ValueError(
            f"value={shown(op.value)} is not a layer; "
            f"give a layer of {_layer_range(cfg.n_layer)}, or a list of layers"
        )
    wrong = [layer for layer in layers if not 0 <= layer < cfg.n_layer]
    if wrong:
        raise ValueError(
            f"layer {wrong[0]} is out of range; at this point the model has {_layers(cfg.n_layer)}"
            f"{_origin(set_by, 'n_layer', 'after')}. Use {_layer_range(cfg.n_layer)}"
        )
    return layers


def _frozen_layers(cfg: Config, set_by: SetBy) -> str:
    layers = ", ".join(map(str, cfg.frozen)) or "none"
    return f"frozen layers at this point: {layers}{_origin(set_by, 'frozen', 'after')}"


def _resize_vocabulary(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    now = cfg.vocab_size + cfg.unused_ids
    ids = _grown_size(op, "vocabulary size", now, _origin(set_by, "unused_ids"))
    # vocab_size does not change, because the tokenizer depends on vocab_size
    return {"unused_ids": ids - cfg.vocab_size}


def _set_field(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    return {OPERATIONS[op.name].field: op.value}


def _set_capacity(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    if not cfg.routed_layers:
        raise ValueError(
            f"no block routes (block_pattern={cfg.block_pattern}), so there is no capacity to set; "
            "remove the op, or set block_pattern to a pattern with M, S or T"
        )
    return {"capacity": op.value}


def _set_eval_iters(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    raise ValueError(
        "every evaluation scores each token of val exactly once, so its length cannot be set; remove the op"
    )


def _reset_lr_schedule(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    return {}  # no field changes, because the class Plan restarts the learning rate schedule


# -- how well each operation can preserve the function of the model


class Guarantee(NamedTuple):
    """The strongest guarantee that an op can give."""

    level: str  # one of GUARANTEES
    why: str = ""  # the reason why no stronger guarantee is possible, for an error message
    instead: str = ""  # the setting that makes a stronger guarantee possible


BITEXACT = Guarantee("bitexact")


def _exact(op: Op, cfg: Config) -> Guarantee:
    return Guarantee("exact", f"for {op.name}, which is exact up to rounding")


def _bitexact(op: Op, cfg: Config) -> Guarantee:
    return BITEXACT


def _guarantee_of_stack(op: Op, cfg: Config) -> Guarantee:
    first_copies = list(dict.fromkeys(op.value))
    if first_copies != list(range(cfg.n_layer)):
        instead = f"each of 0..{cfg.n_layer - 1}, the first copies in order, with init=identity"
        return Guarantee("none", "with a map that drops or reorders layers", instead)
    if op.init == "copy" and len(op.value) > cfg.n_layer:
        return Guarantee("none", "with init=copy", "init=identity")
    for layer, source in enumerate(op.value):
        is_first = source not in op.value[:layer]
        if is_first and cfg.letters[source] == "S" and op.value.index(source - 1) != layer - 1:
            instead = "the first copy of each S right after the first copy of its D"
            return Guarantee("none", "with another layer between an S and its D", instead)
    return BITEXACT


def _guarantee_of_rank(op: Op, cfg: Config) -> Guarantee:
    now = getattr(cfg, OPERATIONS[op.name].field)
    if op.value < now:
        return Guarantee("approx", f"with a rank cut from {now} to {op.value}", f"{now} or more")
    return _exact(op, cfg)


def _guarantee_of_upcycling(op: Op, cfg: Config) -> Guarantee:
    top_k = op.value["top_k"]
    zero = op.value["router"] == "zero"
    if op.value.get("router_weights", cfg.router_weights) == "softmax":
        return Guarantee(
            "exact" if zero else "approx",
            "with softmax weights, which are not renormalised",
            "router_weights=renormalised",
        )
    if top_k not in (1, 2, 4):
        return Guarantee("exact", f"with top_k={top_k}", "1, 2 or 4")
    if not zero and top_k > 1:
        return Guarantee("exact", "with router=random", "router=zero")
    for key in ("shards", "noise_snr_db"):
        value = op.value.get(key, 1)
        if value != 1:
            return Guarantee("exact", f"with {key}={value:g}", f"no {key}")
    return BITEXACT


# -- the table of operations


@dataclass(frozen=True)
class Operation:
    """A row of OPERATIONS: the description of one operation."""

    changes: Callable[[Op, Config, SetBy], Changes]
    value: Value
    field: str = ""  # the config field that the operation sets, if it sets exactly one
    architecture: bool = True  # whether the operation changes the model itself
    guarantee: Callable[[Op, Config], Guarantee] = _exact  # called only if `architecture` is true
    init: str = ""  # default value of the key `init`; empty if the operation does not use this key
    keeps_base: bool = False  # whether a model with `base_frozen` allows the operation
    refuses: tuple[str, ...] = ()  # the config fields whose weights the operation cannot extend


def _training(field: str) -> Operation:
    """Return the row of an operation that sets one field of the config."""
    return Operation(_set_field, NumberValue(), field, architecture=False)


def _rank(field: str) -> Operation:
    """Return the row of an operation that sets the rank of low-rank terms."""
    return Operation(_set_rank, WHOLE, field, guarantee=_guarantee_of_rank, keeps_base=True)


def _keep_factor(value: Any) -> int | float | None:
    kept: float | None = number("", low=1).keep(value)
    if kept is not None and kept.is_integer():
        return int(kept)
    return kept


NOISE = number("a number of decibels between -200 and 200", low=-200, high=200)
WHOLE = NumberValue("a whole number")
ONE_LAYER = LayersValue("a layer, or a list of layers")
WIDTH = TableValue(
    "{ factor = 2 } or { d_model = N }",
    {
        "factor": Rule(_keep_factor, "a whole number, 2 or more"),
        "d_model": whole_number(2),
        "kv": choice("scale", "keep"),
        "tied": choice("fold_final_norm"),
        "noise_snr_db": NOISE,
    },
    sizes=("factor", "d_model"),
    defaults={"kv": "scale", "tied": "fold_final_norm"},
    integer="d_model",
)
EXPERTS = TableValue(
    "{ experts = 8, top_k = 2 }",
    {
        "experts": whole_number(2),
        "top_k": whole_number(1),
        "router": choice("random", "zero"),
        "router_std": number("a number above 0", low=0),
        "router_weights": choice("renormalised", "softmax"),
        "shards": whole_number(1),
        "noise_snr_db": NOISE,
    },
    sizes=("experts",),
    defaults={"top_k": 2, "router": "random", "shards": 1},
)

OPERATIONS: dict[str, Operation] = {
    "set_lr": _training("lr"),
    "set_batch_size": _training("batch_size"),
    "set_grad_accum": _training("grad_accum"),
    # After the warm-up, set_warmup_iters has no effect until the next reset_lr_schedule.
    "set_warmup_iters": _training("warmup_iters"),
    "set_eval_iters": Operation(_set_eval_iters, NumberValue(), architecture=False),
    "set_eval_interval": _training("eval_interval"),
    "set_weight_decay": _training("weight_decay"),
    "set_dropout": _training("dropout"),
    "set_capacity": Operation(_set_capacity, NumberValue(), "capacity", architecture=False),
    "reset_lr_schedule": Operation(_reset_lr_schedule, NoValue(), architecture=False),
    "stack_layers": Operation(
        _stack_layers,
        LayersValue("the source of each new layer, like [0, 0, 1, 1]"),
        guarantee=_guarantee_of_stack,
        init="copy",
        refuses=("x0_shortcut", "unet"),
    ),
    "widen_mlp": Operation(_widen_mlp, WHOLE, init="copy"),
    "widen_model": Operation(_widen_model, WIDTH, refuses=("value_shortcut",)),
    "add_heads": Operation(_add_heads, WHOLE, refuses=("value_shortcut",)),
    "upcycle_moe": Operation(_upcycle_moe, EXPERTS, guarantee=_guarantee_of_upcycling),
    "set_attn_lora_rank": _rank("attn_lora_rank"),
    "set_mlp_lora_rank": _rank("mlp_lora_rank"),
    "set_embedding_lora_rank": _rank("embed_lora_rank"),
    "merge_lora_weights": Operation(_merge_lora_weights, NoValue()),
    "freeze_layer": Operation(_freeze_layer, ONE_LAYER, guarantee=_bitexact, keeps_base=True),
    "unfreeze_layer": Operation(_unfreeze_layer, ONE_LAYER, guarantee=_bitexact, keeps_base=True),
    "resize_vocabulary": Operation(_resize_vocabulary, WHOLE),
}
NAMES = tuple(OPERATIONS)
ARCHITECTURE = tuple(name for name, operation in OPERATIONS.items() if operation.architecture)
TRAINING = tuple(name for name in NAMES if name not in ARCHITECTURE)
# Maps the names of old relative operations to the names of current operations. The error message for an old
# operation names the absolute value to use.
RELATIVE = {name.replace("set_", "change_"): name for name in TRAINING if OPERATIONS[name].field}


def default_keys(name: str, place: int) -> dict[str, Any]:
    """Return the default values of the keys whose defaults depend on the operation."""
    operation = operation_of(name)
    return {
        "id": f"{place}-{name}",
        "reevaluate": operation.architecture,
        "init": operation.init,
        "place": place,
    }


def operation_of(name: str) -> Operation:
    """Return the row of an operation. The old name change_lr, for example, refers to the row of set_lr."""
    return OPERATIONS[RELATIVE.get(name, name)]


# -- ops applied to a config


class AppliedOp(NamedTuple, Generic[C]):
    """An op and the config after the op. The field `preserve` of the op contains its guarantee."""

    op: Op
    cfg: C


Fault = tuple[int, str]  # the index of an op, or -1 for the whole schedule, and a message


def fault_of(place: int, name: Any, text: str) -> Fault:
    label = f"ops[{place}]"
    if isinstance(name, str) and len(name) <= 40:
        label += f" {name!r}"
    return place, f"{label}: {text.removesuffix('.')}."


def after(op: Op, cfg: C, set_by: SetBy | None = None) -> C:
    """Return the config after an op. The returned config has no growth schedule.

    Raise ValueError if the op cannot be applied.
    set_by: the place of the op that set each field, for error messages.
    """
    return cfg.changed(**_changes(op, cfg, set_by or {}))


def _changes(op: Op, cfg: Config, set_by: SetBy) -> Changes:
    if op.name in RELATIVE:
        raise ValueError(_old_relative_form(op, cfg, set_by))
    operation = OPERATIONS[op.name]
    if cfg.base_frozen and operation.architecture and not operation.keeps_base:
        raise ValueError(
            f"{op.name} changes the base of the model, which base_frozen=true keeps unchanged; "
            "remove the op, or set base_frozen=false"
        )
    for field in operation.refuses:
        if getattr(cfg, field):
            raise ValueError(
                f"{op.name} cannot be combined with {field}=true, whose weights it cannot extend; "
                f"remove the op, or set {field}=false"
            )
    changes = operation.changes(op, cfg, set_by)
    if op.preserve:
        strongest = operation.guarantee(op, cfg)
        if GUARANTEES.index(op.preserve) > GUARANTEES.index(strongest.level):
            use = f"preserve={strongest.level}"
            if strongest.instead:
                use = f"{strongest.instead}, or {use}"
            raise ValueError(f"preserve={op.preserve} is impossible {strongest.why}; use {use}")
    return changes


def _old_relative_form(op: Op, cfg: Config, set_by: SetBy) -> str:
    new = RELATIVE[op.name]
    field = OPERATIONS[new].field
    now = getattr(cfg, field)
    value = now * op.value
    value = round(value) if isinstance(now, int) else float(f"{value:.6g}")
    return (
        f"this op has the old relative form; {field} is {_compact(now)}{_origin(set_by, field)}, "
        f'so write "{new}" and the value {value}'
    )


def walk(cfg: C, ops: Iterable[Op]) -> tuple[list[AppliedOp[C]], list[Fault]]:
    """Apply ops one after another. An op that cannot be applied is skipped and reported as a fault."""
    applied: list[AppliedOp[C]] = []
    faults: list[Fault] = []
    set_by: dict[str, int] = {}
    for op in ops:
        try:
            changes = _changes(op, cfg, set_by)
            new = cfg.changed(**changes)
        except ValueError as e:
            faults.append(fault_of(op.place, op.name, str(e)))
            continue
        if op.name in ARCHITECTURE and not op.preserve:
            op = replace(op, preserve=OPERATIONS[op.name].guarantee(op, cfg).level)
        for field in changes:
            if getattr(new, field) != getattr(cfg, field):
                set_by[field] = op.place
        cfg = new
        applied.append(AppliedOp(op, cfg))
    return applied, faults
