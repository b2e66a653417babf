"""A schedule carried out on paper: what is wrong with it, what is odd about it, and what each of its segments costs. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError
from mainrun.plan.cost import Size, size
from mainrun.plan.op_files import read
from mainrun.plan.ops import AppliedOp, Facts, due, walk
from mainrun.plan.plan import Plan


class SegmentForecast(NamedTuple):
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
    segments: list[SegmentForecast]


def simulate(
    cfg: TrainConfig, data: Any, train_tokens: int | None = None, speed: float | None = None
) -> Found:
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
        op, last = plan.undecided, plan.segments[-1].first
        if op is None:
            return plan
        # an op that asks for a new loss keeps the next one waiting for an evaluation of its own
        again = bool(plan.fired) and cfg.growth.ops[len(plan.fired) - 1].reevaluate
        steps = (s for s in sorted(plan.eval_steps) if last + again <= s < plan.steps)
        step = next((s for s in steps if due(op, Facts(s, last, plan.tokens(s), plan.budget))), None)
        if step is None:
            return plan
        fired = (*plan.fired, step)


def _warnings(cfg: TrainConfig, phases: list[AppliedOp], plan: Plan | None) -> Iterator[str]:
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
        if (
            trigger.wait_iters is not None and (1 if i == 0 else 0) < trigger.wait_iters < every
        ):  # step 1 always has an evaluation
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


def _segments(
    cfg: TrainConfig, phases: list[AppliedOp], plan: Plan | None, speed: float | None
) -> Iterator[SegmentForecast]:
    ends = [*plan.fired, plan.steps] if plan else []
    for i, (op, now) in enumerate([(None, cfg), *phases]):
        steps = tokens = seconds = None
        begins = str(op.trigger) if op else "step 0"
        cost = size(now)
        if plan and i < len(ends):
            first = ends[i - 1] if i else 0
            steps, tokens = ends[i] - first, plan.tokens(ends[i]) - plan.tokens(first)
            seconds = tokens * now.passes * cost.flops / speed if speed else None
            begins = (
                begins
                if op is None
                else f"step {first}"
                if op.trigger.static
                else f"{begins}: step {first} at the latest"
            )
        yield SegmentForecast(str(op) if op else "", begins, now, cost, steps, tokens, seconds)
