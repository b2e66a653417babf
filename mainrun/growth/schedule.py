"""A growth schedule: what the model and the training shall be, in absolute terms, and when. Data in, a checked `Schedule` out; no torch.

Two formats give the same thing. A list (the original format) of

    {"name": "set_lr", "desc": "...", "value": 6e-4, "trigger_loss": 100.0, "max_wait_iters": 1, "reevaluate": false}

and an object, version 2, whose ops have a `trigger` in place of these two keys, and may say more (OP_KEYS). JSON, YAML or TOML, inline
or in a file, which is only ever read.

When an op fires. First in, first out: an op waits for the one before it. It fires when any of its conditions holds:

    loss_below    the last evaluation's loss (a token's mean, in nats) is below it; equal is not below
    wait_iters    that many steps since the last op (since the start, where there was none)
    plateau       the best of the last `evals` evaluations since the last op gained less than the share `rel` on the best before them
    step, tokens, budget_frac
                  that many steps or tokens are trained, or that share of the run's tokens

These are looked at when an evaluation runs. Only an op that has nothing but the last three needs none: it fires at that very step.
After an op with `reevaluate = false` the next may fire on the same loss; with `true` the loss is taken again and the next waits for the
next evaluation. Left out, it is true for an op of the architecture and false for one of the training, which moves no loss by itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mainrun import inputs
from mainrun.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mainrun.config import TrainConfig  # which imports this file

# -- what a schedule is


@dataclass(frozen=True)
class Trigger:
    """Any of these, when the op's turn has come."""

    loss_below: float | None = None
    wait_iters: int | None = None
    step: int | None = None
    tokens: int | None = None
    budget_frac: float | None = None
    plateau: tuple[int, float] | None = None  # evaluations, share

    @property
    def conditions(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @property
    def static(self) -> bool:
        """Known before the run: it needs no evaluation."""
        return self.conditions.keys() <= {"step", "tokens", "budget_frac"}

    def data(self) -> dict[str, Any]:
        each = [{k: {"evals": v[0], "rel": v[1]} if k == "plateau" else v} for k, v in self.conditions.items()]
        return each[0] if len(each) == 1 else {"any": each}

    def __str__(self) -> str:
        words = {
            "loss_below": "loss < {:g}", "wait_iters": "a wait of {:,}", "step": "step {:,}", "tokens": "{:,} tokens",
            "budget_frac": "{:g} of the budget", "plateau": "plateau of {0[0]} evaluations",
        }  # fmt: skip
        return " or ".join(words[k].format(v) for k, v in self.conditions.items())


@dataclass(frozen=True)
class Transfer:
    """How the optimiser's state goes over: `mode`, and the share of its elements that must."""

    mode: str = "auto"
    min_coverage: float = 0.0


@dataclass(frozen=True)
class Rates:
    """How fast what is new learns: steps until its full rate, its peak over the others', how the rate follows the width."""

    rewarm_iters: int = 0
    new_params_peak: float = 1.0
    width_rule: str = "none"


@dataclass(frozen=True)
class Op:
    """One change, what it must keep, and what happens if it does not."""

    name: str
    value: Any  # int, float, tuple of ints, dict, or None where the op takes none
    trigger: Trigger
    place: int = 0  # in the list
    seed: int = 0  # of what it draws: from the schedule's seed and its place
    id: str = ""
    desc: str = ""
    reevaluate: bool = True
    init: str = ""  # copy, or identity: what is new adds nothing at first
    preserve: str = ""  # none, approx, exact, bitexact; left out, it is settled by `walk`: the most that the op can keep
    optimizer: Transfer = Transfer()
    lr: Rates = Rates()
    on_fail: str = "abort"

    def data(self) -> dict[str, Any]:
        """Only what is not so anyway."""
        found: dict[str, Any] = {"name": self.name}
        if self.value is not None:
            found["value"] = list(self.value) if isinstance(self.value, tuple) else self.value
        found["trigger"] = self.trigger.data()
        plain = Op(self.name, self.value, self.trigger, self.place, self.seed, **_defaults(self.name, self.place))
        for key in ("id", "desc", "reevaluate", "init", "preserve", "optimizer", "lr", "on_fail"):
            if (value := getattr(self, key)) != getattr(plain, key):
                found[key] = dict(vars(value)) if isinstance(value, Transfer | Rates) else value
        return found

    def effect(self) -> dict[str, Any]:
        """What it does, without when and what it is called: enough to tell whether two ops do the same to the bit."""
        return {k: v for k, v in self.data().items() if k not in ("trigger", "id", "desc", "reevaluate", "on_fail")} | {"seed": self.seed}

    def __hash__(self) -> int:
        return hash((self.name, self.place, self.trigger))

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name} {_compact(self.value)}"


@dataclass(frozen=True)
class Schedule:
    ops: tuple[Op, ...] = ()
    seed: int = 0

    def data(self) -> dict[str, Any]:
        """In version 2; read again it is the same schedule."""
        return {"version": 2, **({"seed": self.seed} if self.seed else {}), "ops": [op.data() for op in self.ops]}

    def __str__(self) -> str:
        """As --set takes it."""
        return json.dumps(self.data(), separators=(",", ":"))


def _compact(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(value, separators=(",", ":"), default=repr)


def _shown(value: Any) -> str:
    """What was got, not longer than a line can hold."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _key(key: Any) -> str:
    return key if isinstance(key, str) and key.isidentifier() else _shown(key)


# -- when an op fires


class Facts(NamedTuple):
    """What is known when an evaluation has run."""

    step: int  # steps done
    last: int  # steps done when the last op fired; 0: none has
    tokens: int
    budget: int  # tokens of the run
    losses: Sequence[tuple[int, float]] = ()  # of the evaluations so far: the step and the loss, the newest last


def due(op: Op, facts: Facts) -> str | None:
    """Why an op whose turn has come fires now; None: it does not."""
    t, waited = op.trigger, facts.step - facts.last
    if t.loss_below is not None and facts.losses and facts.losses[-1][1] < t.loss_below:
        return f"loss {facts.losses[-1][1]:.4f} < {t.loss_below:g}"
    if t.wait_iters is not None and waited >= t.wait_iters:
        return f"{waited:,} steps since the last op, {t.wait_iters:,} were to be waited"
    if t.step is not None and facts.step >= t.step:
        return f"step {facts.step:,} of {t.step:,}"
    if t.tokens is not None and facts.tokens >= t.tokens:
        return f"{facts.tokens:,} tokens of {t.tokens:,}"
    if t.budget_frac is not None and facts.tokens >= t.budget_frac * facts.budget:
        return f"{facts.tokens:,} tokens, {t.budget_frac:g} of the budget"
    if t.plateau is not None:
        evals, rel = t.plateau
        losses = [loss for step, loss in facts.losses if step > facts.last]
        if len(losses) > evals:
            before, now = min(losses[:-evals]), min(losses[-evals:])
            if now > before * (1 - rel):
                return f"plateau: {evals} evaluations took the loss from {before:.4f} to {now:.4f} at best"
    return None


# -- what an op does


class _Training(NamedTuple):
    field: str
    why: str = ""  # it cannot be set here, and what to do instead


TRAINING = {
    "set_lr": _Training("lr"),
    "set_batch_size": _Training("batch_size"),
    "set_grad_accum": _Training("grad_accum"),
    # steps of the climb of the schedule that runs: counted from its start, so late in it this says what the next reset does
    "set_warmup_iters": _Training("warmup_iters"),
    "set_eval_iters": _Training("", "every evaluation here scores each token of val once, there is nothing to set; remove the op"),
    "set_eval_interval": _Training("eval_interval"),
    "set_weight_decay": _Training("weight_decay"),
    "set_dropout": _Training("dropout"),
    "reset_lr_schedule": _Training(""),  # warm-up, plateau and decay begin anew, over the steps that are left: Plan counts them
}
ARCHITECTURE = (
    "stack_layers", "widen_mlp", "widen_model", "add_heads", "upcycle_moe", "set_attn_lora_rank", "set_embedding_lora_rank",
    "merge_lora_weights", "freeze_layer", "unfreeze_layer", "resize_vocabulary",
)  # fmt: skip
NAMES = (*TRAINING, *ARCHITECTURE)
RANKS = {"set_attn_lora_rank": "attn_lora_rank", "set_embedding_lora_rank": "embed_lora_rank"}
VALUELESS = ("reset_lr_schedule", "merge_lora_weights")
STRENGTH = ("none", "approx", "exact", "bitexact")

By = Mapping[str, int]  # field -> the op that set it last


def after(op: Op, cfg: TrainConfig, by: By | None = None) -> TrainConfig:
    """The config once the op has fired: the one place that says what an op does. It has no growth of its own.

    ValueError: what was got, what is allowed here, how to fix it. by: for such a sentence, which op set what is in the way.
    """
    changes = _effect(op, cfg, by or {})
    if op.preserve:
        best, why, use = _strongest(op, cfg)
        if STRENGTH.index(op.preserve) > STRENGTH.index(best):
            raise ValueError(f"preserve={op.preserve} impossible {why}; use {f'{use}, or ' if use else ''}preserve={best}")
    return cfg.changed(**changes)


def _effect(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    if op.name in ARCHITECTURE:
        return _GROWS[op.name](op, cfg, by)
    if op.name.startswith("change_"):
        field = TRAINING["set_" + op.name.removeprefix("change_")].field
        now = getattr(cfg, field)
        target = now * op.value if isinstance(op.value, int | float) else now
        target = round(target) if isinstance(now, int) else float(f"{target:.6g}")
        raise ValueError(
            f'the old relative form; {field} is {_compact(now)} here{_set_by(by, field)}, write "set_{field}" and the value {target}'
        )
    field, why = TRAINING[op.name]
    if why:
        raise ValueError(why)
    return {field: op.value} if field else {}


def _set_by(by: By, field: str, how: str = "set by") -> str:
    return f" ({how} ops[{by[field]}])" if field in by else ""


def _whole_value(op: Op, what: str, now: int, by: str) -> int:
    """An absolute size that is to grow."""
    if isinstance(op.value, float):
        raise ValueError(f"value {op.value:g} is the old relative form; for {what} {now}{by} write {round(now * op.value)}")
    if not isinstance(op.value, int):
        raise ValueError(f"value={_shown(op.value)} is not allowed; give an integer > {now}, the {what} here{by}")
    if op.value <= now:
        raise ValueError(f"{op.value} <= current {what} {now}{by}; give an integer > {now}")
    return op.value


def _stack(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    n, source = cfg.n_layer, op.value
    here = f"the model has {n} layer{'s' if n > 1 else ''} here{_set_by(by, 'n_layer', 'after')}"
    if not isinstance(source, tuple) or not source:
        if isinstance(source, int | float) and source == int(source) and 2 <= source * n <= 1024:
            old = {2: "double", 3: "triple"}.get(int(source), f"{int(source)}-fold")
            write = _compact(list(range(n)) * int(source))
            raise ValueError(f'value {source:g} is the old "{old}" form; for {n} layer{"s" if n > 1 else ""} write {write}')
        old = _compact(list(range(n)))
        raise ValueError(f"value={_shown(source)} is no list of layers; {here}, write the source of each new layer, like {old}")
    if wrong := [f"value[{i}]={s}" for i, s in enumerate(source) if not 0 <= s < n]:
        raise ValueError(f"{', '.join(wrong[:5])} out of range; {here}. Use {f'0..{n - 1}' if n > 1 else '0'}")
    # the first copy of a frozen layer stays frozen, what is new trains
    frozen = tuple(i for i, s in enumerate(source) if s in cfg.frozen and s not in source[:i])
    return {"n_layer": len(source), "frozen": frozen}


def _widen_mlp(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    return {"d_ff": _whole_value(op, "hidden", cfg.ff_width, _set_by(by, "d_ff"))}


def _widen_model(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    width, since = cfg.d_model, _set_by(by, "d_model")
    if not isinstance(op.value, dict):  # a float
        raise ValueError(f"value {op.value:g} is the old relative form; for width {width}{since} write {round(width * op.value)}")
    n = op.value.get("factor") or op.value["d_model"] / width
    if n != int(n):
        if "factor" in op.value:
            raise ValueError(f"factor={n:g} is no whole number; the width is {width}{since}, give 2, 3, ...")
        raise ValueError(f"d_model={op.value['d_model']} is no multiple of the width {width}{since}; give {2 * width}, {3 * width}, ...")
    if n < 2:
        raise ValueError(f"{op.value['d_model']} <= current width {width}{since}; give {2 * width}, {3 * width}, ...")
    n = int(n)
    # heads keep their width; what is 0 because it follows another still does
    kv = cfg.kv_heads if op.value["kv"] == "keep" else n * cfg.n_kv_head
    return {"d_model": n * width, "d_ff": n * cfg.ff_width, "n_head": n * cfg.n_head, "n_kv_head": kv}


def _add_heads(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    heads = _whole_value(op, "n_head", cfg.n_head, _set_by(by, "n_head"))
    grouped = cfg.kv_heads != cfg.n_head
    if grouped and heads % cfg.kv_heads:
        near = -(-heads // cfg.kv_heads) * cfg.kv_heads
        raise ValueError(f"{heads} heads do not share {cfg.kv_heads} heads of keys and values; give a multiple, like {near}")
    return {"n_head": heads, "head_dim": cfg.head_width, "n_kv_head": cfg.kv_heads if grouped else 0}


def _upcycle(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    value = op.value
    if cfg.experts:
        raise ValueError(
            f"the model has {cfg.experts} experts already{_set_by(by, 'experts')}; a dense one can be upcycled, once. Remove it"
        )
    if not isinstance(value, dict):
        raise ValueError(f"value={_shown(value)} is not allowed; write {_written('upcycle_moe')}")
    experts, k, shards, hidden = value["experts"], value["top_k"], value["shards"], cfg.ff_width
    weights = value.get("router_weights", cfg.router_weights)
    if k > experts:
        raise ValueError(f"top_k={k} of {experts} experts; use 1..{experts}")
    for what, got in (("hidden", hidden), ("experts", experts), ("top_k", k)):
        if got % shards:
            raise ValueError(f"shards={shards} does not divide {what}={got}; use a divisor of hidden, experts and top_k")
    if k == 1 and weights == "renormalised":
        raise ValueError("top_k=1 with renormalised weights gives the router no gradient; use top_k=2, or router_weights=softmax")
    if value["router"] == "zero":
        if "router_std" in value:
            raise ValueError(f"router_std={value['router_std']:g} with router=zero; leave it out, or use router=random")
        if "noise_snr_db" not in value and op.optimizer.mode != "asymmetric":
            raise ValueError(
                "router=zero locks: ties choose the same experts for ever; use router=random, or break the tie with "
                "noise_snr_db or optimizer.mode=asymmetric"
            )
    elif "noise_snr_db" in value:
        raise ValueError("noise_snr_db with router=random changes the function; leave it out, its experts differ soon, or use router=zero")
    return {"experts": experts, "top_k": k, "router_weights": weights, "d_ff": hidden // shards}


def _rank(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    field = RANKS[op.name]
    now = getattr(cfg, field)
    if isinstance(op.value, float):
        write = f"write {round(now * op.value)}" if now else "give the rank, like 8"
        raise ValueError(f"value {op.value:g} is the old relative form; the rank is {now} here{_set_by(by, field)}, {write}")
    if op.value < 1:
        rid = ", or merge_lora_weights to be rid of it" if now else ""
        raise ValueError(f"value={op.value} is not allowed; give a rank, 1 or more{rid}")
    return {field: op.value}


def _merge(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    if not (cfg.attn_lora_rank or cfg.embed_lora_rank):
        raise ValueError(
            f"there is nothing to merge{_set_by(by, 'attn_lora_rank', 'after')}; put it behind a set_attn_lora_rank, or remove it"
        )
    return {"attn_lora_rank": 0, "embed_lora_rank": 0}


def _freeze(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    layers = (op.value,) if isinstance(op.value, int) else op.value
    n, since, thaws = cfg.n_layer, _set_by(by, "n_layer", "after"), op.name == "unfreeze_layer"
    if not isinstance(layers, tuple) or not layers:
        raise ValueError(f"value={_shown(op.value)} is no layer; give one of 0..{n - 1}, or a list of them")
    if wrong := [layer for layer in layers if not 0 <= layer < n]:
        raise ValueError(f"layer {wrong[0]} out of range; the model has {n} layers here{since}. Use 0..{n - 1}")
    if wrong := [layer for layer in layers if (layer in cfg.frozen) != thaws]:
        frozen = f"frozen here: {', '.join(map(str, cfg.frozen)) or 'none'}{_set_by(by, 'frozen', 'after')}"
        raise ValueError(f"layer {wrong[0]} is {'not ' if thaws else ''}frozen{' already' * (not thaws)}; {frozen}. Leave it out")
    return {"frozen": tuple(sorted(set(cfg.frozen) - set(layers) if thaws else {*cfg.frozen, *layers}))}


def _resize(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    ids = _whole_value(op, "vocabulary", cfg.vocab_size + cfg.unused_ids, _set_by(by, "unused_ids"))
    return {"unused_ids": ids - cfg.vocab_size}  # the tokenizer, which vocab_size makes, stays


_GROWS: dict[str, Callable[[Op, TrainConfig, By], dict[str, Any]]] = {
    "stack_layers": _stack,
    "widen_mlp": _widen_mlp,
    "widen_model": _widen_model,
    "add_heads": _add_heads,
    "upcycle_moe": _upcycle,
    "set_attn_lora_rank": _rank,
    "set_embedding_lora_rank": _rank,
    "merge_lora_weights": _merge,
    "freeze_layer": _freeze,
    "unfreeze_layer": _freeze,
    "resize_vocabulary": _resize,
}


def _strongest(op: Op, cfg: TrainConfig) -> tuple[str, str, str]:
    """What an op keeps at most of the function, why not more, and what else to write for that."""
    if op.name == "stack_layers":
        first = [s for i, s in enumerate(op.value) if s not in op.value[:i]]
        if first != list(range(cfg.n_layer)):
            use = f"each of 0..{cfg.n_layer - 1}, the first copies in order, with init=identity"
            return "none", "with a map that drops or reorders layers", use
        if op.init == "copy" and len(op.value) > cfg.n_layer:
            return "none", "with init=copy", "init=identity"
        return "bitexact", "", ""
    if op.name in ("freeze_layer", "unfreeze_layer"):
        return "bitexact", "", ""
    if op.name in RANKS and op.value < (now := getattr(cfg, RANKS[op.name])):
        return "approx", f"with a rank cut from {now} to {op.value}", f"{now} or more"
    if op.name == "upcycle_moe":
        k, zero = op.value["top_k"], op.value["router"] == "zero"
        if op.value.get("router_weights", cfg.router_weights) == "softmax":
            return "exact" if zero else "approx", "with softmax weights, which are not renormalised", "router_weights=renormalised"
        if k not in (1, 2, 4):
            return "exact", f"with top_k={k}", "1, 2 or 4"
        if not zero and k > 1:
            return "exact", "with router=random", "router=zero"
        if odd := [key for key in ("shards", "noise_snr_db") if op.value.get(key, 1) != 1]:
            return "exact", f"with {odd[0]}={op.value[odd[0]]:g}", f"no {odd[0]}"
        return "bitexact", "", ""
    return "exact", f"for {op.name}, which is exact to rounding", ""


class Phase(NamedTuple):
    """An op as it is carried out (`preserve` settled), and the config from then on."""

    op: Op
    cfg: TrainConfig


Fault = tuple[int, str]  # the op's place (-1: none) and the sentence


def walk(cfg: TrainConfig, ops: Iterable[Op]) -> tuple[list[Phase], list[Fault]]:
    """Ops applied one after another, and everything that is wrong with them; an op that cannot be is passed over."""
    phases: list[Phase] = []
    faults: list[Fault] = []
    by: dict[str, int] = {}
    for op in ops:
        try:
            found = after(op, cfg, by)
        except ValueError as e:
            faults.append(_fault(op.place, op.name, str(e)))
            continue
        if op.name in ARCHITECTURE:
            op = replace(op, preserve=op.preserve or _strongest(op, cfg)[0])
        by |= {f: op.place for f in type(cfg).model_fields if getattr(found, f) != getattr(cfg, f)}
        cfg = found
        phases.append(Phase(op, cfg))
    return phases, faults


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
OP_KEYS = ("id", "name", "desc", "value", "trigger", "reevaluate", "init", "preserve", "optimizer", "lr", "on_fail")
OF_WEIGHTS = ("init", "preserve", "optimizer", "lr", "on_fail")  # for an op of the architecture
SHAPE = "{ ops = [{ name, value, trigger }, ...] }"

Check = tuple[Callable[[Any], Any], str]  # the value as it is kept, or None; what is allowed


def _number(low: float = -math.inf, high: float = math.inf, closed: bool = False) -> Callable[[Any], float | None]:
    """A finite number between; `closed`: or at an end."""

    def check(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            return None
        return float(value) if low < value < high or (closed and value in (low, high)) else None

    return check


def _whole(low: int) -> Callable[[Any], int | None]:
    """Also 2e8, which JSON and TOML take for no integer."""

    def check(value: Any) -> int | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 2**63 or value != int(value):
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


def _written(name: str) -> str:
    return {"widen_model": "{ factor = 2 } or { d_model = N }", "upcycle_moe": "{ experts = 8, top_k = 2 }"}[name]


def _defaults(name: str, place: int) -> dict[str, Any]:
    """What an op is where nothing is said."""
    init = "copy" if name in ("stack_layers", "widen_mlp") else ""
    return {"id": f"{place}-{name}", "reevaluate": name in ARCHITECTURE, "init": init}


def _fault(place: int, name: Any, text: str) -> Fault:
    label = f" {name!r}" if isinstance(name, str) and len(name) <= 40 else ""
    return place, f"ops[{place}]{label}: {text}{'' if text.endswith('.') else '.'}"


def read(data: Any) -> tuple[Schedule, list[Fault]]:
    """The ops that are well formed, and everything that is wrong with the others."""
    faults: list[Fault] = []
    if isinstance(data, list) and len(data) > MOST_OPS:
        return Schedule(), [(-1, f"the list has {len(data):,} ops; write at most {MOST_OPS:,}.")]
    if isinstance(data, list):
        return Schedule(_ops(data, faults, {}, 0, listed=True)), faults
    if not isinstance(data, dict):
        return Schedule(), [(-1, f"{_shown(data)} is no schedule; write {SHAPE}, or a list of ops with trigger_loss and max_wait_iters.")]
    allowed = ("version", "seed", "defaults", "ops")
    faults += [(-1, f"{text}.") for text in _unknown("", data, allowed)]
    version, seed, ops, defaults = (data.get(key, other) for key, other in (("version", 2), ("seed", 0), ("ops", []), ("defaults", {})))
    if version != 2 or isinstance(version, bool):
        faults.append((-1, f"version={_shown(version)} is not known; write 2, or the original format as a list."))
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
        faults.append((-1, f"defaults={_shown(defaults)} is not allowed; write a table of {', '.join(general)}."))
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


def _ops(entries: Sequence[Any], faults: list[Fault], common: dict[str, Any], seed: int, listed: bool = False) -> tuple[Op, ...]:
    found: list[Op] = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            faults.append((place, f"ops[{place}]={_shown(entry)} is no op; write {{ name, value, trigger }}."))
            continue
        wrong: Wrong = []
        op = _op(place, entry, common, seed, listed, wrong)
        if op and op.id in (ids := {other.id: other.place for other in found}):
            wrong.append(f"id={op.id!r} is that of ops[{ids[op.id]}]; give each its own")
        faults += [_fault(place, entry.get("name"), text) for text in wrong]
        if op and not wrong:
            found.append(op)
    return tuple(found)


def _op(place: int, entry: dict[str, Any], common: dict[str, Any], seed: int, listed: bool, wrong: Wrong) -> Op | None:
    keys, others = (LIST_KEYS, OP_KEYS) if listed else (OP_KEYS, LIST_KEYS)
    fires = (_list_trigger if listed else _new_trigger)(entry, wrong)
    strange = 0
    for key in entry:
        if key in keys:
            continue
        if key in others:
            form = "version 2; write { version = 2, ops = [...] } around the list" if listed else "the list format; write a trigger"
            wrong.append(f"{key!r} is a key of {form}")
            continue
        strange += 1
        if strange <= 10:
            wrong.append(_unknown_key("", key, keys))
    wrong += _uncounted(strange)
    name: Any = entry.get("name")
    relative = isinstance(name, str) and name.startswith("change_") and TRAINING.get(f"set_{name[7:]}", _Training("")).field
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
        one = [key for key in ("factor", "d_model") if key in found] if name == "widen_model" else ["experts"] if "experts" in found else []
        if len(one) != 1:
            wrong.append(f"value={_shown(value)} has {'both factor and d_model' if one else 'no size'}; write {_written(name)}")
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
            wrong.append(f"trigger={_shown(given)} is not allowed; write any = [...] alone, with one condition in each table")
            return None
        if twice := sorted({key for i, one in enumerate(each) for key in one if any(key in other for other in each[:i])}):
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
        raise ConfigError(f"growth={got!r} is no schedule; give a file ending in .json, .yaml, .yml or .toml, or {{ ops = [...] }}")
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
    raise ConfigError(f"growth={inputs.shortened(text, 200)} is neither TOML, JSON nor YAML ({why}); write {SHAPE}, or give its file")
