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

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

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
        each = [
            {k: {"evals": v[0], "rel": v[1]} if k == "plateau" else v} for k, v in self.conditions.items()
        ]
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
    preserve: str = (
        ""  # none, approx, exact, bitexact; left out, it is settled by `walk`: the most that the op can keep
    )
    optimizer: Transfer = Transfer()
    lr: Rates = Rates()
    on_fail: str = "abort"

    def data(self) -> dict[str, Any]:
        """Only what is not so anyway."""
        found: dict[str, Any] = {"name": self.name}
        if self.value is not None:
            found["value"] = list(self.value) if isinstance(self.value, tuple) else self.value
        found["trigger"] = self.trigger.data()
        plain = Op(
            self.name, self.value, self.trigger, self.place, self.seed, **_defaults(self.name, self.place)
        )
        for key in ("id", "desc", "reevaluate", "init", "preserve", "optimizer", "lr", "on_fail"):
            if (value := getattr(self, key)) != getattr(plain, key):
                found[key] = dict(vars(value)) if isinstance(value, Transfer | Rates) else value
        return found

    def effect(self) -> dict[str, Any]:
        """What it does, without when and what it is called: enough to tell whether two ops do the same to the bit."""
        return {
            k: v
            for k, v in self.data().items()
            if k not in ("trigger", "id", "desc", "reevaluate", "on_fail")
        } | {"seed": self.seed}

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
        return {
            "version": 2,
            **({"seed": self.seed} if self.seed else {}),
            "ops": [op.data() for op in self.ops],
        }

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
    losses: Sequence[
        tuple[int, float]
    ] = ()  # of the evaluations so far: the step and the loss, the newest last


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
    "set_eval_iters": _Training(
        "", "every evaluation here scores each token of val once, there is nothing to set; remove the op"
    ),
    "set_eval_interval": _Training("eval_interval"),
    "set_weight_decay": _Training("weight_decay"),
    "set_dropout": _Training("dropout"),
    "reset_lr_schedule": _Training(
        ""
    ),  # warm-up, plateau and decay begin anew, over the steps that are left: Plan counts them
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
            raise ValueError(
                f"preserve={op.preserve} impossible {why}; use {f'{use}, or ' if use else ''}preserve={best}"
            )
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
        raise ValueError(
            f"value {op.value:g} is the old relative form; for {what} {now}{by} write {round(now * op.value)}"
        )
    if not isinstance(op.value, int):
        raise ValueError(
            f"value={_shown(op.value)} is not allowed; give an integer > {now}, the {what} here{by}"
        )
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
            raise ValueError(
                f'value {source:g} is the old "{old}" form; for {n} layer{"s" if n > 1 else ""} write {write}'
            )
        old = _compact(list(range(n)))
        raise ValueError(
            f"value={_shown(source)} is no list of layers; {here}, write the source of each new layer, like {old}"
        )
    if wrong := [f"value[{i}]={s}" for i, s in enumerate(source) if not 0 <= s < n]:
        raise ValueError(
            f"{', '.join(wrong[:5])} out of range; {here}. Use {f'0..{n - 1}' if n > 1 else '0'}"
        )
    # the first copy of a frozen layer stays frozen, what is new trains
    frozen = tuple(i for i, s in enumerate(source) if s in cfg.frozen and s not in source[:i])
    return {"n_layer": len(source), "frozen": frozen}


def _widen_mlp(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    return {"d_ff": _whole_value(op, "hidden", cfg.ff_width, _set_by(by, "d_ff"))}


def _widen_model(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    width, since = cfg.d_model, _set_by(by, "d_model")
    if not isinstance(op.value, dict):  # a float
        raise ValueError(
            f"value {op.value:g} is the old relative form; for width {width}{since} write {round(width * op.value)}"
        )
    n = op.value.get("factor") or op.value["d_model"] / width
    if n != int(n):
        if "factor" in op.value:
            raise ValueError(f"factor={n:g} is no whole number; the width is {width}{since}, give 2, 3, ...")
        raise ValueError(
            f"d_model={op.value['d_model']} is no multiple of the width {width}{since}; give {2 * width}, {3 * width}, ..."
        )
    if n < 2:
        raise ValueError(
            f"{op.value['d_model']} <= current width {width}{since}; give {2 * width}, {3 * width}, ..."
        )
    n = int(n)
    # heads keep their width; what is 0 because it follows another still does
    kv = cfg.kv_heads if op.value["kv"] == "keep" else n * cfg.n_kv_head
    return {"d_model": n * width, "d_ff": n * cfg.ff_width, "n_head": n * cfg.n_head, "n_kv_head": kv}


def _add_heads(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    heads = _whole_value(op, "n_head", cfg.n_head, _set_by(by, "n_head"))
    grouped = cfg.kv_heads != cfg.n_head
    if grouped and heads % cfg.kv_heads:
        near = -(-heads // cfg.kv_heads) * cfg.kv_heads
        raise ValueError(
            f"{heads} heads do not share {cfg.kv_heads} heads of keys and values; give a multiple, like {near}"
        )
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
            raise ValueError(
                f"shards={shards} does not divide {what}={got}; use a divisor of hidden, experts and top_k"
            )
    if k == 1 and weights == "renormalised":
        raise ValueError(
            "top_k=1 with renormalised weights gives the router no gradient; use top_k=2, or router_weights=softmax"
        )
    if value["router"] == "zero":
        if "router_std" in value:
            raise ValueError(
                f"router_std={value['router_std']:g} with router=zero; leave it out, or use router=random"
            )
        if "noise_snr_db" not in value and op.optimizer.mode != "asymmetric":
            raise ValueError(
                "router=zero locks: ties choose the same experts for ever; use router=random, or break the tie with "
                "noise_snr_db or optimizer.mode=asymmetric"
            )
    elif "noise_snr_db" in value:
        raise ValueError(
            "noise_snr_db with router=random changes the function; leave it out, its experts differ soon, or use router=zero"
        )
    return {"experts": experts, "top_k": k, "router_weights": weights, "d_ff": hidden // shards}


def _rank(op: Op, cfg: TrainConfig, by: By) -> dict[str, Any]:
    field = RANKS[op.name]
    now = getattr(cfg, field)
    if isinstance(op.value, float):
        write = f"write {round(now * op.value)}" if now else "give the rank, like 8"
        raise ValueError(
            f"value {op.value:g} is the old relative form; the rank is {now} here{_set_by(by, field)}, {write}"
        )
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
        raise ValueError(
            f"layer {wrong[0]} out of range; the model has {n} layers here{since}. Use 0..{n - 1}"
        )
    if wrong := [layer for layer in layers if (layer in cfg.frozen) != thaws]:
        frozen = f"frozen here: {', '.join(map(str, cfg.frozen)) or 'none'}{_set_by(by, 'frozen', 'after')}"
        raise ValueError(
            f"layer {wrong[0]} is {'not ' if thaws else ''}frozen{' already' * (not thaws)}; {frozen}. Leave it out"
        )
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
            return (
                "exact" if zero else "approx",
                "with softmax weights, which are not renormalised",
                "router_weights=renormalised",
            )
        if k not in (1, 2, 4):
            return "exact", f"with top_k={k}", "1, 2 or 4"
        if not zero and k > 1:
            return "exact", "with router=random", "router=zero"
        if odd := [key for key in ("shards", "noise_snr_db") if op.value.get(key, 1) != 1]:
            return "exact", f"with {odd[0]}={op.value[odd[0]]:g}", f"no {odd[0]}"
        return "bitexact", "", ""
    return "exact", f"for {op.name}, which is exact to rounding", ""


class AppliedOp(NamedTuple):
    """An op as it is carried out (`preserve` settled), and the config from then on."""

    op: Op
    cfg: TrainConfig


Fault = tuple[int, str]  # the op's place (-1: none) and the sentence


def walk(cfg: TrainConfig, ops: Iterable[Op]) -> tuple[list[AppliedOp], list[Fault]]:
    """Ops applied one after another, and everything that is wrong with them; an op that cannot be is passed over."""
    phases: list[AppliedOp] = []
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
        phases.append(AppliedOp(op, cfg))
    return phases, faults


def _written(name: str) -> str:
    return {"widen_model": "{ factor = 2 } or { d_model = N }", "upcycle_moe": "{ experts = 8, top_k = 2 }"}[
        name
    ]


def _defaults(name: str, place: int) -> dict[str, Any]:
    """What an op is where nothing is said."""
    init = "copy" if name in ("stack_layers", "widen_mlp") else ""
    return {"id": f"{place}-{name}", "reevaluate": name in ARCHITECTURE, "init": init}


def _fault(place: int, name: Any, text: str) -> Fault:
    label = f" {name!r}" if isinstance(name, str) and len(name) <= 40 else ""
    return place, f"ops[{place}]{label}: {text}{'' if text.endswith('.') else '.'}"
