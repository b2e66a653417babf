"""A schedule carried out on paper: what is wrong with it, what is odd about it, and what each of its stretches costs. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mainrun.config import Plan, TrainConfig
from mainrun.errors import ConfigError
from mainrun.growth.schedule import Facts, Phase, due, read, walk


class Size(NamedTuple):
    """What a config's model has and takes."""

    params: int
    active: int  # of them those that a token meets
    trained: int  # of them those that are not frozen
    flops: int  # a token, forward and backward, as sitting.flops_per_token counts
    moments: int  # bytes of the optimiser's state


class Segment(NamedTuple):
    """From the start, or from an op on. Numbers that need the run's tokens are of the longest wait: no loss ever fires an op."""

    op: str
    begins: str
    cfg: TrainConfig
    size: Size
    steps: int | None
    tokens: int | None
    seconds: float | None


class Found(NamedTuple):
    faults: list[str]  # if there are any, the segments are those of the ops without
    warnings: list[str]
    segments: list[Segment]


def size(cfg: TrainConfig) -> Size:
    """By arithmetic; a test counts the model. The vocabulary is taken as large as the config allows."""
    d, ff, heads, kv = cfg.d_model, cfg.ff_width, cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width
    bias, norm = int(cfg.bias), d * (2 if cfg.norm == "layernorm" and cfg.bias else 1)
    qkv_bias = bias if cfg.qkv_bias is None else int(cfg.qkv_bias)
    vocab = cfg.vocab_size + cfg.unused_ids
    attention = d * (heads + 2 * kv) + heads * d + (d * cfg.n_head if cfg.attn_gate else 0)
    low_rank = cfg.attn_lora_rank * (2 * (d + heads) + 2 * (d + kv))
    up_and_down = (3 if cfg.mlp == "swiglu" else 2) * d * ff
    mlp_bias = bias * ((2 if cfg.mlp == "swiglu" else 1) * ff + d)
    vectors = (
        2 * norm + qkv_bias * (heads + 2 * kv) + bias * d + (2 * cfg.head_width if cfg.qk_norm else 0) + (2 * d if cfg.layer_scale else 0)
    )
    experts, met = max(1, cfg.experts), min(cfg.top_k, cfg.experts) or 1
    matrices = attention + low_rank + (d * cfg.experts if cfg.experts else 0)
    layer = matrices + vectors + experts * (up_and_down + mlp_bias)
    shares = cfg.n_layer - 1 if cfg.value_residual else 0
    around = vocab * d + (cfg.block_size * d if cfg.position == "learned" else 0) + cfg.embed_lora_rank * (vocab + d)
    head = 0 if cfg.tie_head else vocab * d
    params = cfg.n_layer * layer + shares + around + norm + head
    unmet = cfg.n_layer * (experts - met) * (up_and_down + mlp_bias)
    multiplied = cfg.n_layer * (matrices + met * up_and_down) + vocab * d + (cfg.embed_lora_rank * (vocab + d) if cfg.tie_head else 0)
    frozen = len(cfg.frozen) * layer + (shares and sum(i > 0 for i in cfg.frozen))
    router = d * cfg.experts
    inner = (cfg.n_layer - len(cfg.frozen)) * (matrices - router + experts * up_and_down)  # matrices of blocks but routers: Muon's
    trained = params - frozen
    numbers = {"sgd": trained if cfg.momentum else 0, "adamw": 2 * trained, "muon": inner + 2 * (trained - inner)}[cfg.optimizer]
    flops = 6 * multiplied + 12 * cfg.n_layer * heads * cfg.block_size
    return Size(params, params - unmet, trained, flops, 4 * numbers)


def costs(cfg: TrainConfig, ids: int) -> dict[str, Any]:
    """ids: of the tokenizer, which may have found fewer than it was allowed."""
    found = size(cfg.model_copy(update={"vocab_size": ids}))
    return {"params": found.params, "active": found.active, "flops_per_token": found.flops}


def segments(plan: Plan, ids: int) -> list[dict[str, Any]]:
    """A run by its ops: from which step on, for how many tokens, of what size, for how many FLOPs."""
    found = []
    for stretch, end in zip(plan.stretches, [*(s.first for s in plan.stretches[1:]), plan.steps], strict=True):
        cost, tokens = costs(stretch.cfg, ids), plan.tokens(end) - plan.tokens(stretch.first)
        flops = tokens * stretch.cfg.passes * cost["flops_per_token"]
        found.append({"op": str(stretch.op or ""), "begins": stretch.first, "ends": end, "tokens": tokens, "flops": flops, **cost})
    return found


def simulate(cfg: TrainConfig, data: Any, train_tokens: int | None = None, speed: float | None = None) -> Found:
    """A schedule (its data) on a config, op by op. train_tokens: of an epoch; speed: FLOP/s, for the time."""
    schedule, wrong = read(data)
    phases, impossible = walk(cfg, schedule.ops)
    faults = [text for _, text in sorted(wrong + impossible, key=lambda fault: fault[0])]
    plan = None
    if not faults and train_tokens is not None:
        try:
            plan = latest(cfg.model_copy(update={"growth": schedule}), train_tokens)
        except ConfigError as e:
            faults.append(str(e).removeprefix("growth: ") + ".")
    return Found(faults, list(_warnings(cfg, phases, plan)), list(_segments(cfg, phases, plan, speed)))


def latest(cfg: TrainConfig, train_tokens: int) -> Plan:
    """The plan where no loss ever falls: each op fires at the last evaluation that it can wait for, or never."""
    fired: tuple[int, ...] = ()
    while True:
        plan = Plan(cfg, train_tokens, fired)
        op, last = plan.undecided, plan.stretches[-1].first
        if op is None:
            return plan
        # an op that asks for a new loss keeps the next one waiting for an evaluation of its own
        again = bool(plan.fired) and cfg.growth.ops[len(plan.fired) - 1].reevaluate
        steps = (s for s in sorted(plan.eval_steps) if last + again <= s < plan.steps)
        step = next((s for s in steps if due(op, Facts(s, last, plan.tokens(s), plan.budget))), None)
        if step is None:
            return plan
        fired = (*plan.fired, step)


def _warnings(cfg: TrainConfig, phases: list[Phase], plan: Plan | None) -> Iterator[str]:
    before, past = cfg, 0
    for i, (op, now) in enumerate(phases):
        where, trigger = f"ops[{op.place}] {op.name!r}:", op.trigger
        same = op.name != "stack_layers" or op.value == tuple(range(before.n_layer))
        if now == before and same and op.name != "reset_lr_schedule":
            yield f"{where} changes nothing, everything is so already."
        if trigger.loss_below is not None and trigger.loss_below <= 0:
            yield f"{where} loss_below={trigger.loss_below:g} is never reached, a loss is above 0."
        if trigger.static and trigger.step is not None:
            if trigger.step < past:
                yield f"{where} step {trigger.step} is past when its turn comes; it fires with the op before it, not before step {past}."
            past = max(past, trigger.step)
        if op.name == "stack_layers" and (dropped := sorted(set(range(before.n_layer)) - set(op.value))):
            layers = f"layer{'s' * (len(dropped) > 1)} {', '.join(map(str, dropped))}"
            yield f"{where} drops {layers} of {before.n_layer}; what is learnt there is lost."
        every = _interval(before, plan)
        if trigger.wait_iters is not None and (1 if i == 0 else 0) < trigger.wait_iters < every:  # step 1 always has an evaluation
            yield f"{where} a wait of {trigger.wait_iters} is shorter than the {every} steps between evaluations; it lasts until one comes."
        before = now
    if plan and len(plan.fired) < len(phases):
        op, _ = phases[len(plan.fired)]
        kinds, end = op.trigger.conditions.keys(), f"the run has {plan.steps} steps"
        if not kinds <= {"loss_below", "plateau"}:
            alone = kinds.isdisjoint({"loss_below", "plateau"})
            never = "never fires" if alone else "is fired by its loss or never"
            yield f"ops[{op.place}] {op.name!r}: {never}, {end}{', and the ops behind it wait for it' * (op is not phases[-1].op)}."


def _interval(cfg: TrainConfig, plan: Plan | None) -> int:
    """Steps between two evaluations; 0: it is not known."""
    if cfg.eval_interval or not plan or not cfg.eval_per_epoch:
        return cfg.eval_interval
    return max(1, plan.train_tokens // (cfg.batch_size * cfg.block_size) // cfg.eval_per_epoch)


def _segments(cfg: TrainConfig, phases: list[Phase], plan: Plan | None, speed: float | None) -> Iterator[Segment]:
    ends = [*plan.fired, plan.steps] if plan else []
    for i, (op, now) in enumerate([(None, cfg), *phases]):
        steps = tokens = seconds = None
        begins = str(op.trigger) if op else "step 0"
        cost = size(now)
        if plan and i < len(ends):
            first = ends[i - 1] if i else 0
            steps, tokens = ends[i] - first, plan.tokens(ends[i]) - plan.tokens(first)
            seconds = tokens * now.passes * cost.flops / speed if speed else None
            begins = begins if op is None else f"step {first}" if op.trigger.static else f"{begins}: step {first} at the latest"
        yield Segment(str(op) if op else "", begins, now, cost, steps, tokens, seconds)
