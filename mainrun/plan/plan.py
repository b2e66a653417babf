"""mainrun.plan.plan"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError
from mainrun.plan.ops import ARCHITECTURE, Op, walk

# -- the plan: fractions become integer steps, once


class StepInputs(NamedTuple):
    """Everything scheduled that enters one step. Two runs are the same as long as these are (and the statics)."""

    lr: float
    lr_aux: float
    weight_decay: float
    dropout: float
    attn_dropout: float
    resid_dropout: float
    batch_size: int
    grad_accum: int
    rdrop: float
    label_smoothing: float
    average: float  # share of the new weights in the scored average; 1: no average


class Segment(NamedTuple):
    """Steps of one phase: the config in force, and where it takes over in the tokens."""

    cfg: TrainConfig
    first: int = 0
    tokens: int = 0  # trained before it
    epoch: int = 0
    start: int = 0  # in the stream of the epoch: where the step before it stopped reading
    climbs: int = 0  # the step that the rate's schedule counts from: that of the last reset_lr_schedule
    op: Op | None = None  # what began it, as it is carried out

    @property
    def span(self) -> int:
        return self.cfg.batch_size * self.cfg.block_size

    def place(self, step: int, train_tokens: int) -> tuple[int, int]:
        """The epoch of a step, and where its tokens begin: a pointer that goes back to 0 where span + 1 tokens do not fit any more."""
        epoch, start = self._pointer(step, train_tokens)
        return epoch, start if start + self.span < train_tokens else 0

    def after(self, step: int, train_tokens: int) -> tuple[int, int]:
        """Epoch and pointer where this phase leaves them before a step. What fits there, the size of that step decides."""
        epoch, start = self._pointer(step - 1, train_tokens)
        return epoch, start + self.span

    def _pointer(self, step: int, train_tokens: int) -> tuple[int, int]:
        # An epoch of whole spans has its last one in the plan, but no last target for it. The sequential stream begins anew there; a
        # shuffled epoch reads its start again, and the next one comes when the plan says.
        readable = (
            train_tokens
            if self.cfg.order == "shuffle_titles" and train_tokens % self.span == 0
            else train_tokens - 1
        )
        ahead, here = (
            step - self.first,
            max(0, readable - self.start) // self.span,
        )  # `here`: steps of the epoch that is under way
        if ahead < here:
            return self.epoch, self.start + ahead * self.span
        later, ahead = divmod(ahead - here, readable // self.span)
        return self.epoch + 1 + later, ahead * self.span


class Plan:
    """A config on a number of training tokens: which steps, and what enters each. Steps count from 0 here.

    fired: after how many steps each op so far has fired; ~step where it was passed over then. Ops that wait for an evaluation are known by
    that alone: without it the plan goes on as if the first of them (`undecided`) never fired. With `(*plan.fired, step)` it is the plan
    from that decision on; what was before it stays as it was planned then.
    """

    def __init__(self, cfg: TrainConfig, train_tokens: int, fired: Iterable[int] = ()) -> None:
        for phase in cfg.segment_configs:
            span = phase.batch_size * phase.block_size
            if train_tokens <= span:
                raise ConfigError(
                    f"train has {train_tokens:,} tokens, but one step takes batch_size*block_size+1 = {span + 1:,}; "
                    "lower batch_size or block_size, or raise num_titles"
                )
        self.cfg = cfg
        self.train_tokens = train_tokens
        self.steps_per_epoch = train_tokens // (cfg.batch_size * cfg.block_size)
        self.undecided: Op | None = None
        told = tuple(fired)
        self.before, self.since = self._decided(told)
        self.fired: tuple[int, ...] = ()  # as far as that is known
        self.segments = self._walk(told)
        self._firsts = [segment.first for segment in self.segments]
        self._dropouts = [tuple(map(_in_256ths, segment.cfg.dropouts)) for segment in self.segments]
        last = self.segments[-1]
        whole = last.first + (self.budget - last.tokens) // last.span
        self.steps = min(cfg.max_steps or whole, whole)
        self._rates = [self._rate(segment) for segment in self.segments]
        self.warmup_steps, self.decay_start = self._rates[0]
        self.swa_start = self.steps - round(cfg.swa * self.steps) if cfg.swa else self.steps
        self.checkpoint_every = cfg.checkpoint_every or self.steps_per_epoch

    @property
    def budget(self) -> int:
        """Tokens of the run."""
        return self.cfg.epochs * self.steps_per_epoch * self.cfg.batch_size * self.cfg.block_size

    def _decided(self, fired: tuple[int, ...]) -> tuple[Plan | None, int]:
        """The plan before the last of the decisions that only the run could take, and after how many steps it was taken."""
        for i in range(len(fired) - 1, -1, -1):
            if fired[i] < 0 or not self.cfg.growth.ops[i].trigger.static:
                return Plan(self.cfg, self.train_tokens, fired[:i]), max(fired[i], ~fired[i])
        return None, 0

    def _walk(self, fired: tuple[int, ...]) -> list[Segment]:
        """Where each phase begins. An op waits for the one before it."""
        found, foreseen = [Segment(self.cfg)], True
        passed = [i for i, first in enumerate(fired) if first < 0]
        phases, faults = walk(self.cfg, [op for i, op in enumerate(self.cfg.growth.ops) if i not in passed])
        if passed and faults:
            raise ConfigError(
                f"growth: ops[{passed[-1]}] was passed over, and without it the schedule cannot go on: {faults[0][1]}"
            )
        begun = {phase.op.place: phase for phase in phases}
        for i in range(len(self.cfg.growth.ops)):
            if i in passed:
                self.fired = (*self.fired, fired[i])
                continue
            (op, cfg), before = begun[i], found[-1]
            if i >= len(fired) and not op.trigger.static:
                self.undecided = op
                break
            first = fired[i] if i < len(fired) else self._due(op, before)
            assert first >= before.first, f"ops[{i}] fired before the one before it: {fired}"
            tokens = before.tokens + (first - before.first) * before.span
            climbs = first if op.name == "reset_lr_schedule" else before.climbs
            segment = Segment(cfg, first, tokens, *before.after(first, self.train_tokens), climbs, op)
            if i >= len(fired) and tokens + segment.span > self.budget:
                if not foreseen:  # what waited for an evaluation came too late for it
                    break
                steps = before.first + (self.budget - before.tokens) // before.span
                raise ConfigError(
                    f"growth: ops[{i}] {op.name!r} would fire after step {first}, with less than a step left to train "
                    f"(without it the run has {steps} steps); give it an earlier trigger"
                )
            found.append(segment)
            self.fired = (*self.fired, first)
            foreseen &= op.trigger.static and not passed
        return found

    def _due(self, op: Op, before: Segment) -> int:
        """After how many steps an op fires that needs no evaluation."""
        trigger = op.trigger
        asked = [trigger.tokens, trigger.budget_frac and trigger.budget_frac * self.budget]
        firsts = [before.first + round((tokens - before.tokens) / before.span) for tokens in asked if tokens]
        return max(before.first, min([trigger.step, *firsts] if trigger.step else firsts))

    def _rate(self, segment: Segment) -> tuple[int, int]:
        """Where the rate has climbed, and where it begins to fall."""
        cfg, left = segment.cfg, self.steps - segment.climbs
        climb = cfg.warmup_iters or round(cfg.warmup_frac * left)
        fall = round(cfg.decay_frac * left) if cfg.schedule == "wsd" else left
        return segment.climbs + climb, segment.climbs + max(
            climb, left - fall
        )  # both fractions may have been rounded up

    def segment_at(self, step: int) -> Segment:
        return self.segments[self._phase(step)]

    def _phase(self, step: int) -> int:
        return bisect_right(self._firsts, step) - 1

    def tokens(self, done: int) -> int:
        """Trained after so many steps."""
        segment = self.segment_at(done)
        return segment.tokens + (done - segment.first) * segment.span

    @cached_property
    def grown(self) -> dict[int, bytes]:
        """What the ops of the architecture do, by the step before which they do it: it enters that step, beside what `at` says."""
        found: dict[int, bytes] = {}
        for segment in self.segments:
            if segment.op and segment.op.name in ARCHITECTURE:
                effect = json.dumps(segment.op.effect(), sort_keys=True).encode()
                found[segment.first] = found.get(segment.first, b"") + effect
        return found

    @cached_property
    def eval_steps(self) -> frozenset[int]:
        """Steps (counted from 1) after which val and dev are scored."""
        found = {1, self.steps}
        # counted anew where the interval changes, or an epoch comes to have another number of steps; no other op moves them
        paces = [(s.cfg.eval_interval, 0 if s.cfg.eval_interval else s.span) for s in self.segments]
        parts = [
            s for s, before, now in zip(self.segments, [None, *paces], paces, strict=False) if before != now
        ]
        for segment, end in zip(parts, [*(later.first for later in parts[1:]), self.steps], strict=True):
            every = segment.cfg.eval_interval
            if not every and self.cfg.eval_per_epoch:
                every = max(1, self.train_tokens // segment.span // self.cfg.eval_per_epoch)
            if every:
                found |= set(range(segment.first + every, end + 1, every))
        if self.before:
            return frozenset(step for step in found if step > self.since) | {
                s for s in self.before.eval_steps if s <= self.since
            }
        return frozenset(found)

    @cached_property
    def breaks(self) -> list[int]:
        """Steps after which another config may well part from this one: the end of its warm-up, its ops, the start of its decay."""
        # the first step of a decay still has the peak rate, the first of an average the weights as they are
        falls = [fall + 1 for _, fall in self._rates] if self.cfg.schedule != "constant" else []
        steps = {*(climbed for climbed, _ in self._rates), *falls, self.swa_start + 1, *self._firsts}
        past = [step for step in self.before.breaks if step <= self.since] if self.before else []
        return past + sorted(step for step in steps if self.since < step < self.steps)

    def lr_factor(self, step: int) -> float:
        cfg, low, phase = self.cfg, self.cfg.min_lr_frac, self._phase(step)
        begun, (climbed, falls) = self.segments[phase].climbs, self._rates[phase]
        if step < climbed:
            return (step - begun + 1) / (climbed - begun)
        if cfg.schedule == "constant" or step < falls:
            return 1.0
        progress = (step - falls) / (self.steps - falls)
        shape = "cosine" if cfg.schedule == "cosine" else cfg.decay_shape
        return low + (1 - low) * FALL[shape](progress)

    def average(self, step: int) -> float:
        if step >= self.swa_start:
            return 1 / (step - self.swa_start + 1)
        # a young average follows the weights closely, else the random start would be in it for ever
        return 1 - min(self.cfg.ema, (1 + step) / (10 + step)) if self.cfg.ema else 1.0

    def at(self, step: int) -> StepInputs:
        if self.before and step < self.since:
            return self.before.at(step)
        phase, factor = self._phase(step), self.lr_factor(step)
        cfg = self.segments[phase].cfg
        fall = 1.0 if cfg.wd_schedule == "constant" else FALL[cfg.wd_schedule](step / self.steps)
        embedding, attention, residual = self._dropouts[phase]
        return StepInputs(
            lr=cfg.lr * factor,
            lr_aux=(cfg.lr_aux or cfg.lr) * factor,
            weight_decay=cfg.weight_decay * fall,
            dropout=embedding,
            attn_dropout=attention,
            resid_dropout=residual,
            batch_size=cfg.batch_size,
            grad_accum=cfg.grad_accum,
            rdrop=cfg.rdrop,
            label_smoothing=cfg.label_smoothing,
            average=self.average(step),
        )

    def table(self) -> dict[str, Any]:
        """The resolved numbers, as config.json and --dry-run show them."""
        cfg = self.cfg
        growth = [f"{segment.op} after step {segment.first}" for segment in self.segments if segment.op]
        growth += [f"then {self.undecided} at {self.undecided.trigger}"] if self.undecided else []
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
            "first_step": self.at(0)._asdict(),
            "last_step": self.at(self.steps - 1)._asdict(),
        }


def _in_256ths(p: float) -> float:
    """The rate that is used: one random byte decides, so it is a whole 256th, and never none where one was asked for."""
    return min(max(round(256 * p), p > 0), 255) / 256


# from 1 at progress 0 to 0 at progress 1
FALL = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "sqrt": lambda t: 1 - math.sqrt(t),
}
