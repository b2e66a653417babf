"""Check a growth schedule without training, and report faults, warnings and the cost of each segment."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError
from mainrun.plan.cost import Size, size
from mainrun.plan.op_files import read
from mainrun.plan.ops import AppliedOp, Op, walk
from mainrun.plan.plan import Decision, Plan
from mainrun.plan.triggers import Facts, due

Applied = AppliedOp[TrainConfig]
NEEDS_A_LOSS = {"loss_below", "plateau"}  # a condition on the loss may never be met


class SegmentForecast(NamedTuple):
    """The forecast of a segment, which assumes that every op fires as late as possible."""

    op: str  # the op that begins the segment; empty for the first segment
    begins: str
    cfg: TrainConfig
    size: Size
    steps: int | None = None  # the number of steps, or None if the number is unknown
    tokens: int | None = None
    seconds: float | None = None


class Forecast(NamedTuple):
    """The result of `simulate`."""

    faults: list[str]  # messages about invalid ops, which `segments` does not include
    warnings: list[str]
    segments: list[SegmentForecast]


def simulate(
    cfg: TrainConfig, data: Any, train_tokens: int | None = None, speed: float | None = None
) -> Forecast:
    """Apply the ops of a schedule to a config, one after another.

    train_tokens: the number of tokens in an epoch, which is needed to forecast the steps.
    speed: the training speed in FLOP/s, which is needed to forecast the time.
    """
    schedule, unreadable = read(data)
    applied, impossible = walk(cfg, schedule.ops)
    by_place = sorted(unreadable + impossible, key=lambda fault: fault[0])
    faults = [text for _, text in by_place]
    plan = None
    if not faults and train_tokens is not None:
        try:
            plan = latest(cfg.model_copy(update={"growth": schedule}), train_tokens)
        except ConfigError as e:
            faults.append(str(e).removeprefix("growth: ") + ".")
    warnings = list(_warnings(cfg, applied, plan))
    if plan and len(plan.fired) < len(applied):
        warnings += _never_fires(applied, plan)
    return Forecast(faults, warnings, _segments(cfg, applied, plan, speed))


def latest(cfg: TrainConfig, train_tokens: int) -> Plan:
    """Return the plan of a run whose loss never falls, so that every op fires as late as possible."""
    plan = Plan(cfg, train_tokens)
    while plan.undecided:
        step = _latest_step(plan, plan.undecided)
        if step is None:
            break
        plan = plan.decided(Decision(step))
    return plan


def _latest_step(plan: Plan, op: Op) -> int | None:
    """Return the step of the first evaluation at which an op fires regardless of the loss, or None."""
    last = plan.segments[-1].first
    earliest = last
    if plan.fired and plan.cfg.growth.ops[len(plan.fired) - 1].reevaluate:
        earliest += 1  # the op waits for an evaluation of the new model
    for step in sorted(plan.eval_steps):
        if not earliest <= step < plan.steps:
            continue
        if due(op.trigger, Facts(step, last, plan.tokens(step), plan.budget)):
            return step
    return None


# -- warnings


def _warnings(cfg: TrainConfig, applied: list[Applied], plan: Plan | None) -> Iterator[str]:
    """Yield a warning for each op that probably does not do what the author intended."""
    before = cfg
    past = 0  # the latest step that the trigger of a previous op names
    for i, (op, after) in enumerate(applied):
        evaluated = 1 if i == 0 else 0  # the model is always evaluated after step 1
        oddities = [
            _no_effect(op, before, after),
            _impossible_loss(op),
            _past_step(op, past),
            _dropped_layers(op, before),
            _short_wait(op, evaluated, _eval_interval(before, plan)),
        ]
        for text in oddities:
            if text:
                yield f"ops[{op.place}] {op.name!r}: {text}."
        if op.trigger.static and op.trigger.step is not None:
            past = max(past, op.trigger.step)
        before = after


def _no_effect(op: Op, before: TrainConfig, after: TrainConfig) -> str:
    if op.name == "reset_lr_schedule" or after != before:
        return ""
    if op.name == "stack_layers" and op.value != tuple(range(before.n_layer)):
        return ""
    return "changes nothing; the config already has these values"


def _impossible_loss(op: Op) -> str:
    loss = op.trigger.loss_below
    if loss is None or loss > 0:
        return ""
    return f"loss_below={loss:g} is never reached; a loss is always above 0"


def _past_step(op: Op, past: int) -> str:
    step = op.trigger.step
    if step is None or not op.trigger.static or step >= past:
        return ""
    return (
        f"the op cannot fire at step {step}; it fires together with the previous op, at step {past} or later"
    )


def _dropped_layers(op: Op, before: TrainConfig) -> str:
    if op.name != "stack_layers":
        return ""
    dropped = [str(layer) for layer in range(before.n_layer) if layer not in op.value]
    if not dropped:
        return ""
    noun = "layer" if len(dropped) == 1 else "layers"
    return f"drops {noun} {', '.join(dropped)} of {before.n_layer} and their trained weights"


def _short_wait(op: Op, evaluated: int, interval: int) -> str:
    wait = op.trigger.wait_iters
    if wait is None or not evaluated < wait < interval:
        return ""
    return (
        f"a wait of {wait} is shorter than the {interval} steps between evaluations; "
        "the op fires at the next evaluation"
    )


def _eval_interval(cfg: TrainConfig, plan: Plan | None) -> int:
    """Return the number of steps between two evaluations, or 0 if this number is unknown."""
    if cfg.eval_interval or not plan or not cfg.eval_per_epoch:
        return cfg.eval_interval
    return max(1, plan.train_tokens // (cfg.batch_size * cfg.block_size) // cfg.eval_per_epoch)


def _never_fires(applied: list[Applied], plan: Plan) -> Iterator[str]:
    """Yield a warning if the first op that has not fired might never fire.

    An op whose trigger depends only on the loss gets no warning.
    """
    op = applied[len(plan.fired)].op
    conditions = op.trigger.conditions.keys()
    if conditions <= NEEDS_A_LOSS:
        return
    text = "never fires"
    if not conditions.isdisjoint(NEEDS_A_LOSS):
        text = "only fires if its condition on the loss is met"
    text += f"; the run has {plan.steps} steps"
    if op is not applied[-1].op:
        text += ", and later ops wait for this op"
    yield f"ops[{op.place}] {op.name!r}: {text}."


# -- segments


def _segments(
    cfg: TrainConfig, applied: list[Applied], plan: Plan | None, speed: float | None
) -> list[SegmentForecast]:
    segments = [SegmentForecast("", "step 0", cfg, size(cfg))]
    for op, op_cfg in applied:
        segments.append(SegmentForecast(str(op), str(op.trigger), op_cfg, size(op_cfg)))
    if plan is None:
        return segments
    for i, (first, end) in enumerate(pairwise([0, *plan.fired, plan.steps])):
        segments[i] = _with_steps(segments[i], first, end, plan, speed)
        if i > 0:
            segments[i] = segments[i]._replace(begins=_begins(applied[i - 1].op, first))
    return segments


def _with_steps(
    segment: SegmentForecast, first: int, end: int, plan: Plan, speed: float | None
) -> SegmentForecast:
    tokens = plan.tokens(end) - plan.tokens(first)
    seconds = None
    if speed:
        seconds = tokens * segment.cfg.passes * segment.size.flops / speed
    return segment._replace(steps=end - first, tokens=tokens, seconds=seconds)


def _begins(op: Op, step: int) -> str:
    return f"step {step}" if op.trigger.static else f"{op.trigger}: step {step} at the latest"
