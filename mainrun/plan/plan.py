"""The plan of a run: the number of steps, and the scheduled values of every step."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError
from mainrun.plan import routing
from mainrun.plan.ops import ARCHITECTURE, AppliedOp, Op, walk


class StepInputs(NamedTuple):
    """All scheduled values of a step.

    Two runs share a step if their static fields and all scheduled values up to this step are equal.
    """

    lr: float
    lr_aux: float
    weight_decay: float
    weight_decay_aux: float
    dropout: float
    attn_dropout: float
    resid_dropout: float
    stochastic_depth: float  # the rate of the last layer
    batch_size: int
    grad_accum: int
    rdrop: float
    label_smoothing: float
    average: float  # weight of the new parameters in the weight average; 1 turns averaging off
    # The values below concern routed blocks. A value that no block of the model uses is 0.
    capacity: float
    sharpness: float
    prior_loss: float
    student_loss: float
    router_loss: float
    router_z_loss: float
    lr_router: float
    lr_prior: float
    lr_student: float
    lr_lora: float  # 0 unless the model has low-rank terms and the config sets a separate rate for them


class Decision(NamedTuple):
    """The decision that an op fired, or was skipped, after `step` steps."""

    step: int
    skipped: bool = False

    @classmethod
    def from_int(cls, number: int) -> Decision:
        """Decode a decision from an integer: `step` if the op fired, or `~step` if the op was skipped."""
        if number < 0:
            return cls(~number, skipped=True)
        return cls(number)

    def to_int(self) -> int:
        return ~self.step if self.skipped else self.step


class Segment(NamedTuple):
    """The steps between two ops, which all use the same config."""

    cfg: TrainConfig
    first: int = 0  # first step of the segment
    tokens: int = 0  # number of tokens trained before the first step
    epoch: int = 0  # epoch of the first step
    start: int = 0  # position in the epoch's token stream at which the first step begins
    lr_start: int = 0  # step at which the learning rate schedule starts, or was last reset
    op: Op | None = None  # the op that began the segment; `preserve` contains its guarantee

    @property
    def span(self) -> int:
        """The number of tokens per step."""
        return self.cfg.batch_size * self.cfg.block_size

    def check_fits(self, train_tokens: int) -> None:
        """Raise ConfigError if the training set has too few tokens for one step."""
        if train_tokens <= self.span:
            raise ConfigError(
                f"train has {train_tokens:,} tokens, but one step needs batch_size*block_size+1 = "
                f"{self.span + 1:,}; lower batch_size or block_size, or raise num_titles"
            )

    def place(self, step: int, train_tokens: int) -> tuple[int, int]:
        """Return the epoch of a step, and the position of the step's first token in the epoch's stream."""
        epoch, start = self._pointer(step, train_tokens)
        if start + self.span >= train_tokens:
            start = 0
        return epoch, start

    def after(self, step: int, train_tokens: int) -> tuple[int, int]:
        """Return the epoch and the position in the token stream after `step` steps."""
        epoch, start = self._pointer(step - 1, train_tokens)
        return epoch, start + self.span

    def _pointer(self, step: int, train_tokens: int) -> tuple[int, int]:
        # The last target of a step is the first token after the inputs of the step. If an epoch consists of a
        # whole number of steps, the stream has no token for the last target of the last step. A sequential
        # stream then starts the next epoch one step early. A shuffled stream instead uses the first token of
        # the epoch as the last target.
        readable = train_tokens - 1
        if self.cfg.order == "shuffle_titles" and train_tokens % self.span == 0:
            readable = train_tokens
        steps = step - self.first
        steps_in_epoch = max(0, readable - self.start) // self.span  # steps in the rest of the first epoch
        if steps < steps_in_epoch:
            return self.epoch, self.start + steps * self.span
        epochs, steps = divmod(steps - steps_in_epoch, readable // self.span)
        return self.epoch + 1 + epochs, steps * self.span

    def steps_to(self, tokens: float) -> int:
        """Return the number of steps after which the number of trained tokens is closest to `tokens`."""
        return self.first + round((tokens - self.tokens) / self.span)

    def last_step(self, budget: int) -> int:
        """Return the total number of steps in a run that ends in this segment."""
        return self.first + (budget - self.tokens) // self.span


class Plan:
    """The steps of a run, given its config and the number of training tokens. Steps are counted from 0.

    fired: the decisions about the first ops, as integers (see `Decision.to_int`).

    If the trigger of an op needs an evaluation, the decision about the op is made during the run. Until this
    decision, the plan assumes that the op never fires, and the attribute `undecided` is this op. A decision
    does not change the plan for earlier steps.
    """

    def __init__(self, cfg: TrainConfig, train_tokens: int, fired: Iterable[int] = ()) -> None:
        for segment_cfg in cfg.segment_configs:
            Segment(segment_cfg).check_fits(train_tokens)
        given = [Decision.from_int(number) for number in fired]
        self.cfg = cfg
        self.train_tokens = train_tokens
        self.steps_per_epoch = train_tokens // (cfg.batch_size * cfg.block_size)
        self.before, self.since = self._plan_before(given)
        self.decisions: list[Decision] = []  # all decisions so far
        self.undecided: Op | None = None
        self.segments = self._lay_out(given)
        self._firsts = [segment.first for segment in self.segments]
        self._dropouts = []
        for segment in self.segments:
            rates = (*segment.cfg.dropouts, segment.cfg.stochastic_depth)
            self._dropouts.append([in_256ths(p) for p in rates])
        self.steps = self.segments[-1].last_step(self.budget)
        if cfg.max_steps:
            self.steps = min(cfg.max_steps, self.steps)
        self._lr_phases = [self._lr_phase(segment) for segment in self.segments]
        self.warmup_steps, self.decay_start = self._lr_phases[0]
        self.swa_start = self.steps - round(cfg.swa * self.steps)
        self.checkpoint_every = cfg.checkpoint_every or self.steps_per_epoch

    # -- the layout of the segments, in steps

    @property
    def fired(self) -> tuple[int, ...]:
        """All decisions so far, encoded as integers (see `Decision.to_int`)."""
        return tuple(decision.to_int() for decision in self.decisions)

    @property
    def budget(self) -> int:
        """The number of tokens that the run trains on."""
        return self.cfg.epochs * self.steps_per_epoch * self.cfg.batch_size * self.cfg.block_size

    def decided(self, decision: Decision, place: int | None = None) -> Plan:
        """Return the plan after a decision about the undecided op, or about the op at `place`."""
        if place is None:
            place = len(self.decisions)
        return Plan(self.cfg, self.train_tokens, (*self.fired[:place], decision.to_int()))

    def _plan_before(self, given: list[Decision]) -> tuple[Plan | None, int]:
        """Return the plan before the last decision made during the run, and the step of this decision."""
        for place, decision in reversed(list(enumerate(given))):
            if decision.skipped or not self.cfg.growth.ops[place].trigger.static:
                earlier = [other.to_int() for other in given[:place]]
                return Plan(self.cfg, self.train_tokens, earlier), decision.step
        return None, 0

    def _lay_out(self, given: list[Decision]) -> list[Segment]:
        """Return the segments of the run. Also set the attributes `decisions` and `undecided`."""
        applied = self._applied_ops(given)
        skipped = any(decision.skipped for decision in given)
        segments = [Segment(self.cfg)]
        foreseen = True  # whether all previous ops were decided before the run
        for place in range(len(self.cfg.growth.ops)):
            decision = given[place] if place < len(given) else None
            if decision and decision.skipped:
                self.decisions.append(decision)
                continue
            op = applied[place].op
            if decision is None and not op.trigger.static:
                self.undecided = op
                break
            segment = self._next_segment(segments[-1], applied[place], decision)
            if decision is None and segment.tokens + segment.span > self.budget:
                if not foreseen:  # no steps are left for this op, because a previous op fired too late
                    break
                raise ConfigError(self._too_late(segment, segments[-1]))
            segments.append(segment)
            self.decisions.append(Decision(segment.first))
            foreseen = foreseen and op.trigger.static and not skipped
        return segments

    def _applied_ops(self, given: list[Decision]) -> dict[int, AppliedOp[TrainConfig]]:
        """Return a dict that maps the place of each op that was not skipped to the applied op."""
        skipped = [place for place, decision in enumerate(given) if decision.skipped]
        ops = [op for place, op in enumerate(self.cfg.growth.ops) if place not in skipped]
        applied, faults = walk(self.cfg, ops)
        if skipped and faults:
            raise ConfigError(
                f"growth: ops[{skipped[-1]}] was skipped, and a later op cannot be applied without it: "
                f"{faults[0][1]}"
            )
        return {item.op.place: item for item in applied}

    def _next_segment(
        self, last: Segment, applied: AppliedOp[TrainConfig], decision: Decision | None
    ) -> Segment:
        op = applied.op
        first = decision.step if decision else self._step_of(op, last)
        assert first >= last.first, f"ops[{op.place}] fired at step {first}, before the op before it"
        tokens = last.tokens + (first - last.first) * last.span
        epoch, start = last.after(first, self.train_tokens)
        lr_start = first if op.name == "reset_lr_schedule" else last.lr_start
        return Segment(applied.cfg, first, tokens, epoch, start, lr_start, op)

    def _step_of(self, op: Op, last: Segment) -> int:
        """Return the step at which an op with a static trigger fires."""
        trigger = op.trigger
        steps = []
        if trigger.step is not None:
            steps.append(trigger.step)
        if trigger.tokens is not None:
            steps.append(last.steps_to(trigger.tokens))
        if trigger.budget_frac is not None:
            steps.append(last.steps_to(trigger.budget_frac * self.budget))
        return max(last.first, min(steps))

    def _too_late(self, segment: Segment, last: Segment) -> str:
        assert segment.op
        steps = last.last_step(self.budget)
        return (
            f"growth: ops[{segment.op.place}] {segment.op.name!r} would fire after step {segment.first}, "
            f"but less than one step would then be left (without this op, the run has {steps} steps); "
            "give the op an earlier trigger"
        )

    def _lr_phase(self, segment: Segment) -> tuple[int, int]:
        """Return the step at which the warm-up ends, and the step at which the decay begins."""
        cfg = segment.cfg
        steps = self.steps - segment.lr_start
        warmup = cfg.warmup_iters or round(cfg.warmup_frac * steps)
        decay = steps
        if cfg.schedule == "wsd":
            decay = round(cfg.decay_frac * steps)
        decay_start = max(warmup, steps - decay)  # rounding may make the two phases overlap
        return segment.lr_start + warmup, segment.lr_start + decay_start

    # -- the values of each step

    def segment_at(self, step: int) -> Segment:
        return self.segments[self._index_at(step)]

    def _index_at(self, step: int) -> int:
        return bisect_right(self._firsts, step) - 1

    def tokens(self, done: int) -> int:
        """Return the number of tokens that the run has trained on after `done` steps."""
        segment = self.segment_at(done)
        return segment.tokens + (done - segment.first) * segment.span

    def at(self, step: int) -> StepInputs:
        """Return the scheduled values of a step."""
        if self.before and step < self.since:
            return self.before.at(step)
        index = self._index_at(step)
        cfg = self.segments[index].cfg
        lr_factor = self.lr_factor(step)
        wd_factor = 1.0
        if cfg.wd_schedule != "constant":
            wd_factor = DECAY[cfg.wd_schedule](step / self.steps)
        weight_decay_aux = cfg.weight_decay_aux
        if weight_decay_aux is None:
            weight_decay_aux = cfg.weight_decay
        dropout, attn_dropout, resid_dropout, stochastic_depth = self._dropouts[index]
        return StepInputs(
            lr=cfg.lr * lr_factor,
            lr_aux=(cfg.lr_aux or cfg.lr) * lr_factor,
            weight_decay=cfg.weight_decay * wd_factor,
            weight_decay_aux=weight_decay_aux * wd_factor,
            dropout=dropout,
            attn_dropout=attn_dropout,
            resid_dropout=resid_dropout,
            stochastic_depth=stochastic_depth,
            batch_size=cfg.batch_size,
            grad_accum=cfg.grad_accum,
            rdrop=cfg.rdrop,
            label_smoothing=cfg.label_smoothing,
            average=self.average(step),
            **self._routing(cfg, step, lr_factor),
            lr_lora=cfg.lr_lora * lr_factor if cfg.has_low_rank else 0.0,
        )

    def _routing(self, cfg: TrainConfig, step: int, lr_factor: float) -> dict[str, float]:
        """Return the scheduled values of routed blocks. A value that no block uses is 0."""
        values = dict.fromkeys(routing.INPUTS, 0.0)
        for name, letters in routing.INPUTS.items():
            if not set(letters) & set(cfg.letters):
                continue
            values[name] = getattr(cfg, name)
            if name.startswith("lr_"):
                values[name] = (values[name] or cfg.lr_aux or cfg.lr) * lr_factor
        if values["sharpness"]:
            values["sharpness"] = self.sharpness(step)
        return values

    def sharpness(self, step: int) -> float:
        """Return the sharpness of the surprise, which changes along a half cosine wave after the warm-up."""
        cfg = self.segments[self._index_at(step)].cfg
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        if progress >= 1:
            return cfg.sharpness_end  # the sum below may round to a slightly different number
        progress = max(progress, 0.0)
        rise = cfg.sharpness_end - cfg.sharpness
        return cfg.sharpness + rise * (1 - math.cos(math.pi * progress)) / 2

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of a step as a fraction of the peak learning rate."""
        index = self._index_at(step)
        lr_start = self.segments[index].lr_start
        warmup_end, decay_start = self._lr_phases[index]
        if step < warmup_end:
            return (step - lr_start + 1) / (warmup_end - lr_start)
        if self.cfg.schedule == "constant" or step < decay_start:
            return 1.0
        progress = (step - decay_start) / (self.steps - decay_start)
        shape = self.cfg.decay_shape
        if self.cfg.schedule == "cosine":
            shape = "cosine"
        low = self.cfg.min_lr_frac
        return low + (1 - low) * DECAY[shape](progress)

    def average(self, step: int) -> float:
        """Return the weight of the new parameters in the weight average."""
        if step >= self.swa_start:
            return 1 / (step - self.swa_start + 1)
        if not self.cfg.ema:
            return 1.0
        # at first, the average follows the parameters closely, to forget the random initial weights soon
        return 1 - min(self.cfg.ema, (1 + step) / (10 + step))

    @cached_property
    def grown(self) -> dict[int, bytes]:
        """The encoded effects of all ops that change the model. Each key is the first step after an op."""
        effects: dict[int, bytes] = {}
        for segment in self.segments:
            if segment.op and segment.op.name in ARCHITECTURE:
                effect = json.dumps(segment.op.effect(), sort_keys=True).encode()
                effects[segment.first] = effects.get(segment.first, b"") + effect
        return effects

    # -- the steps with evaluations and checkpoints

    @cached_property
    def eval_steps(self) -> frozenset[int]:
        """The steps, counted from 1, after which val and dev are scored."""
        steps = {1, self.steps}
        starts = self._eval_segments()
        ends = [segment.first for segment in starts[1:]]
        for segment, end in zip(starts, [*ends, self.steps], strict=True):
            interval = self._eval_interval(segment)
            if interval:
                steps.update(range(segment.first + interval, end + 1, interval))
        if self.before:
            earlier = {step for step in self.before.eval_steps if step <= self.since}
            steps = earlier | {step for step in steps if step > self.since}
        return frozenset(steps)

    def _eval_segments(self) -> list[Segment]:
        """Return the first segment, and each segment in which the interval between evaluations changes."""
        starts = self.segments[:1]
        for segment in self.segments[1:]:
            before = starts[-1]
            same_interval = segment.cfg.eval_interval == before.cfg.eval_interval
            by_epoch = segment.cfg.eval_interval == 0
            if not same_interval or (by_epoch and segment.span != before.span):
                starts.append(segment)
        return starts

    def _eval_interval(self, segment: Segment) -> int:
        """Return the number of steps between two evaluations, or 0 if there are no evaluations."""
        if segment.cfg.eval_interval or not self.cfg.eval_per_epoch:
            return segment.cfg.eval_interval
        return max(1, self.train_tokens // segment.span // self.cfg.eval_per_epoch)

    @cached_property
    def breaks(self) -> list[int]:
        """The steps after which similar runs often begin to differ, for example the steps of ops."""
        steps = set(self._firsts)
        for warmup_end, decay_start in self._lr_phases:
            steps.add(warmup_end)
            if self.cfg.schedule != "constant":
                steps.add(decay_start + 1)  # the first step of a decay still has the peak rate
        steps.add(self.swa_start + 1)  # at `swa_start`, the average still equals the weights
        earlier = []
        if self.before:
            earlier = [step for step in self.before.breaks if step <= self.since]
        return earlier + sorted(step for step in steps if self.since < step < self.steps)

    def table(self) -> dict[str, Any]:
        """Return the numbers of the plan that appear in config.json and in the output of --dry-run."""
        cfg = self.cfg
        growth = [f"{segment.op} after step {segment.first}" for segment in self.segments if segment.op]
        if self.undecided:
            growth.append(f"then {self.undecided} at {self.undecided.trigger}")
        return {
            "train_tokens": self.train_tokens,
            "tokens_per_step": cfg.batch_size * cfg.block_size,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "decay_start": self.decay_start,
            "swa_start": self.swa_start if cfg.swa else None,
            "growth": ", ".join(growth) or None,
            "evaluations": len(self.eval_steps),
            "checkpoint_every": self.checkpoint_every,
            "official_geometry": list(cfg.geometry),
            "d_ff": cfg.ff_width,
            "n_kv_head": cfg.kv_heads,
            "first_step": self._shown(0),
            "last_step": self._shown(self.steps - 1),
        }

    def logs(self, step: int) -> bool:
        """Return whether metrics.jsonl has the row of a step, counted from 1."""
        due = step % self.cfg.log_every == 0 or step == self.steps
        return due or step <= self.cfg.grad_norm_steps

    def steps_with_norms(self, begin: int, end: int) -> set[int]:
        """Return the steps after `begin`, up to `end`, whose rows have the gradient norm of each layer."""
        return set(range(begin + 1, min(end, self.cfg.grad_norm_steps) + 1))

    def _shown(self, step: int) -> dict[str, float]:
        """Return the scheduled values of a step, without values that no part of the model uses."""
        values = self.at(step)._asdict()
        optional = {*routing.INPUTS, "lr_lora", "stochastic_depth"}
        return {name: value for name, value in values.items() if value or name not in optional}


def in_256ths(p: float) -> float:
    """Round a dropout rate to a multiple of 1/256, because dropout masks are made from random bytes.

    A rate above 0 is never rounded to 0.
    """
    if p == 0:
        return 0.0
    return min(max(round(256 * p), 1), 255) / 256


# each decay function falls from 1 at progress 0 to 0 at progress 1
DECAY = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "sqrt": lambda t: 1 - math.sqrt(t),
}
