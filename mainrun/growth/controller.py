"""A schedule carried out while a run trains: when an op is due, what it makes of the state, and the proof that it kept its word.

A state after step S is the one before the ops that act there: a checkpoint and a node of the store hold it so, and whoever goes on from
one decides and acts once more. Both are functions of the config and of the scores so far, so it comes to the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mainrun.config import TrainConfig, from_dict
from mainrun.core.hardware import give_back
from mainrun.errors import UsageError
from mainrun.growth.moments import IndexMap, Mark, marks, transfer
from mainrun.growth.operators import grow, like, mapped, outline
from mainrun.growth.verify import (
    Check,
    covered,
    delta,
    grouped,
    heads_diverge,
    layer_identity,
    preserved,
    probe,
    rope_integrity,
    router_lock,
    router_scale,
    tied,
)
from mainrun.plan.cost import costs
from mainrun.plan.ops import ARCHITECTURE, Facts, Op, due
from mainrun.plan.plan import Plan
from mainrun.store.rundir import Metrics

if TYPE_CHECKING:
    from mainrun.core.device import Machine
    from mainrun.store.nodes import Node
    from mainrun.train import GPT, Optimizers, State

Row = dict[str, Any]
SETTLES = 10  # steps after which copies should have parted, and a router have chosen
ROWS = 4  # of the batch that an op is checked on
PREFIX = "OPERATION_"  # of the journal's events
FIGURES = ("params", "active", "flops")  # in the rows of scores of a run with a schedule; flops: so far


class Growth:
    """One run's schedule: `plan` is what is known of it by now, `journal` what was done."""

    def __init__(
        self, cfg: TrainConfig, plan: Plan, machine: Machine, state: State, journal: Metrics | None = None
    ) -> None:
        self.cfg, self.plan, self.machine, self.state, self.journal = cfg, plan, machine, state, journal
        self.also: Callable[[Row], None] = lambda row: None  # hears each row of the journal, too
        self.losses: list[tuple[int, float]] = []  # of the split that decides, by step
        self.applied = 0  # of the plan's segments
        self._fresh: list[
            tuple[Op, int, IndexMap]
        ] = []  # ops of the architecture, until their copies should have parted
        self._compiled: tuple[Op, float] | None = (
            None  # the last op of the architecture, and what compiling had taken before
        )
        self._notes: list[str] = []  # for whoever watches
        self.restored()

    @property
    def split(self) -> str:
        return "dev" if self.cfg.dev_frac else "val"

    @property
    def ids(self) -> int:
        model = self.state.model
        return model.embed.num_embeddings - model.cfg.unused_ids

    def tell(self, row: Row) -> None:
        self.also(row)
        if self.journal:
            self.journal.append(row)

    def close(self) -> None:
        if self.journal:
            self.journal.close()

    def restored(self) -> None:
        """The state was loaded, or built: the ops that act right where it stands are still to come, unless it says otherwise."""
        if self.state.grown:
            self.plan = Plan(self.cfg, self.plan.train_tokens, self.state.grown["fired"])
        self.applied = self.state.grown.get("applied", acted(self.plan, self.state.step))
        self._fresh = self._recall()
        self._keep()

    def _recall(self) -> list[tuple[Op, int, IndexMap]]:
        """The ops that a sitting before this one, or another run, carried out and did not look back on yet."""
        found: list[tuple[Op, int, IndexMap]] = []
        for last, segment in pairwise(self.plan.segments[: self.applied + 1]):
            if (op := segment.op) and op.name in ARCHITECTURE:
                found = self._standing(op, found)
                if self.state.step < segment.first + SETTLES:
                    old = like(self.state.model, last.cfg)
                    for p in old.parameters():
                        p.detach().zero_()  # where numbers go does not depend on what they are
                    moved = mapped(op, last.cfg, segment.cfg, old, outline(old, segment.cfg), op.seed)[1]
                    found.append((op, segment.first, bare(moved)))
        return found

    @staticmethod
    def _standing(op: Op, fresh: list[tuple[Op, int, IndexMap]]) -> list[tuple[Op, int, IndexMap]]:
        """Those whose tensors keep their names when this op acts."""
        return [] if op.name == "stack_layers" else fresh

    def _keep(self) -> None:
        self.state.grown = standing(
            self.plan, self.applied, {n: list(mark) for n, mark in self.state.optimizers.marks.items()}
        )

    def figures(self, step: int) -> Row:
        """Of the model after a step, for a row of its scores; nothing where nothing grows."""
        if not self.cfg.growth.ops:
            return {}
        spent, segments = 0, self.plan.segments
        for segment, later in zip(segments, [*segments[1:], None], strict=True):
            end = min(step, later.first if later else step)
            tokens = max(0, end - segment.first) * segment.span
            spent += tokens * segment.cfg.passes * costs(segment.cfg, self.ids)["flops_per_token"]
        found = costs(segments[acted(self.plan, step)].cfg, self.ids)
        return dict(zip(FIGURES, (found["params"], found["active"], spent), strict=True))

    def heard(self, rows: Iterable[Row]) -> None:
        """Scores: of dev where there is one, for val must not steer a run."""
        found = {r["step"]: r["loss"] for r in rows if r["event"] == "eval" and r["split"] == self.split}
        self.losses = sorted({**dict(self.losses), **found}.items())

    # -- when

    def decide(self) -> bool:
        """After an evaluation: have ops that waited for it become due? If so the plan from here on is another."""
        changed = False
        while (op := self.plan.undecided) and self.plan.segments[-1].first <= (step := self.state.step):
            last = self.plan.segments[-1]
            if step not in self.plan.eval_steps or (last.op and last.op.reevaluate and last.first == step):
                break
            why = self._why(op, last.first) if self.machine.leads else None
            if not self.machine.any(bool(why)):
                break
            self.plan, changed = Plan(self.cfg, self.plan.train_tokens, (*self.plan.fired, step)), True
        self._keep()
        return changed

    def _why(self, op: Op, last: int) -> str | None:
        step = self.state.step
        return due(
            op,
            Facts(
                step, last, self.plan.tokens(step), self.plan.budget, [e for e in self.losses if e[0] <= step]
            ),
        )

    # -- what

    @property
    def waits(self) -> Op | None:
        """The op that acts before the next step, if there is one."""
        later = self.plan.segments[self.applied + 1 :]
        return later[0].op if later and later[0].first <= self.state.step < self.plan.steps else None

    def act(self, evaluate: Callable[[], list[Row]]) -> bool:
        """Carry out what is due before the next step. True: the model is another one."""
        grew, step = False, self.state.step
        here = dict(self.losses).get(step)  # the loss of the state as it is; nothing where nobody scored it
        while op := self.waits:
            (last, segment), before = self.plan.segments[self.applied : self.applied + 2], self.state.cfg
            now = {
                "op": op.id,
                "name": op.name,
                "value": op.value,
                "step": step,
                "tokens": self.plan.tokens(step),
            }
            why = self._why(op, last.first) or str(op.trigger)
            told = {
                "ops": op.place,
                "desc": op.desc,
                "why": why,
                "loss": here,
                "seed": op.seed,
                "preserve": op.preserve,
            }
            self.tell({"event": f"{PREFIX}START", **now, **told, **costs(before, self.ids)})
            clock = time.perf_counter()
            if op.name in ARCHITECTURE:
                self._part(op)
                with self.state.clock("growth"):
                    checks, found = self._grow(op, before, segment.cfg)
                if wrong := [check for check in checks if not check.ok]:
                    self._fail(op, now, wrong)
                    continue
                grew = True
                if self.machine.compile:
                    self._compiled = (op, self.state.spent.get("compile", 0.0))
            else:
                self.state.cfg, checks, found = segment.cfg, [], {}
            self.applied += 1
            sizes = [costs(cfg, self.ids) for cfg in (before, segment.cfg)]
            done = {
                "event": f"{PREFIX}SUCCESS",
                **now,
                "seconds": time.perf_counter() - clock,
                **sizes[1],
                **found,
            }
            self.tell(done | {"checks": [vars(check) for check in checks]})
            became = [f"{size['params']:,}" for size in sizes] if op.name in ARCHITECTURE else []
            said = f"growth: step {step}: ops[{op.place}] {op.name!r}" + (
                "" if op.value is None else f" {json.dumps(op.value)}"
            )
            self._notes.append(said + (f": {became[0]} -> {became[1]} parameters" if became else ""))
            if op.reevaluate and (rows := evaluate()):
                new = next(r["loss"] for r in rows if r["split"] == self.split)
                change = None if here is None else new - here
                self.tell(
                    {
                        "event": f"{PREFIX}REEVALUATION",
                        **now,
                        "loss_before": here,
                        "loss_after": new,
                        "change": change,
                    }
                )
                here = new
            elif op.name in ARCHITECTURE:
                here = None
        self._keep()
        return grew

    def _part(self, op: Op) -> None:
        """Before this op: what could not be looked back on behind it is now."""
        kept = self._standing(op, self._fresh)
        for entry in self._fresh:
            if entry not in kept and entry[1] < self.state.step:
                self._look(*entry)
        self._fresh = kept

    def _grow(self, op: Op, before: TrainConfig, after: TrainConfig) -> tuple[list[Check], Row]:
        """The new model in place of the old one, if it passes; else nothing has changed."""
        state = self.state
        state.model.zero_grad(set_to_none=True)
        try:
            new, optimizers, shadow, moved, checks, found = self._made(op, before, after)
        except Exception as e:  # whatever it is: memory that is not there, a number that is none
            return [Check("op", False, f"{type(e).__name__}: {e}")], {}
        if all(check.ok for check in checks):
            moments, how = state.optimizers.state(), (op.optimizer.mode, op.optimizer.min_coverage)
            state.become(after, new, optimizers)  # so that the old weights go before the new moments come
            give_back()
            optimizers.load(transfer(moments, moved, *how)[0], copy=False)
            del moments
            give_back()
            if shadow:
                state.average.apart = True
                state.average.shadow = {name: p.detach() for name, p in shadow.items()}
            self._fresh.append((op, state.step, bare(moved)))
        return checks, found

    def _made(
        self, op: Op, before: TrainConfig, after: TrainConfig
    ) -> tuple[GPT, Optimizers, Any, IndexMap, list[Check], Row]:
        """What an op makes of the state, which it does not touch, and whether it kept its word."""
        state = self.state
        old, idx = state.model, self._probe()
        new, moved = grow(op, before, after, old, op.seed)
        moved_by, largest = delta(old, new, idx, full=op.preserve == "exact")
        checks = [preserved(op.preserve, old, new, idx), tied(before, new), rope_integrity(old, new)]
        if op.preserve in ("exact", "bitexact") and op.name != "stack_layers":
            checks.append(router_scale(old, new, idx))
        if op.name == "stack_layers" and op.init == "identity":
            inserted = [i for i, source in enumerate(op.value) if source in op.value[:i]]
            checks.append(layer_identity(new, inserted, idx))
        shadow = None
        if state.average.apart:
            with state.average.applied():
                shadow = dict(
                    grow(op, before, after, old, op.seed)[0].named_parameters()
                )  # the same draws: the same change
        optimizers = type(state.optimizers)(after, new, marks(state.optimizers.marks, moved, op, state.step))
        least = op.optimizer.min_coverage
        coverage = transfer(state.optimizers.state(), moved, op.optimizer.mode, dry=True)[1]
        checks += [
            covered(coverage, least if op.optimizer.mode != "reset" else 0.0),
            grouped(new, optimizers),
        ]
        return new, optimizers, shadow, moved, checks, {
            "delta_logits": moved_by, "largest_logit": largest, "coverage": coverage, "truncated": moved.truncated,
        }  # fmt: skip

    def _fail(self, op: Op, now: Row, wrong: list[Check]) -> None:
        """Rolled back already, for the state was never touched; and never tried again."""
        why = "; ".join(f"{check.name}: {check.detail}" for check in wrong)
        self.tell(
            {
                "event": f"{PREFIX}ERROR",
                **now,
                "checks": [vars(check) for check in wrong],
                "on_fail": op.on_fail,
            }
        )
        if op.on_fail == "abort":
            self._keep()
            raise UsageError(
                f"growth: ops[{op.place}] {op.name!r} did not keep its word at step {self.state.step}: {why}; the state before it is kept. "
                "Ask less of it (preserve, optimizer.min_coverage), or write on_fail=skip"
            )
        self.plan = Plan(self.cfg, self.plan.train_tokens, (*self.plan.fired[: op.place], ~self.state.step))

    def _probe(self) -> Any:
        model = self.state.model
        return probe(self.ids, min(model.cfg.block_size, 128), self.cfg.seed, ROWS).to(
            model.embed.weight.device
        )

    # -- some steps later

    def look_back(self) -> list[str]:
        """After each step: what there is to say of ops, and some steps after one of copies and routers that are locked."""
        if self._compiled:
            (op, before), self._compiled = self._compiled, None
            if seconds := self.state.spent.get("compile", 0.0) - before:
                self.tell(
                    {
                        "event": f"{PREFIX}RECOMPILE",
                        "op": op.id,
                        "name": op.name,
                        "step": self.state.step,
                        "seconds": seconds,
                    }
                )
        for entry in [entry for entry in self._fresh if self.state.step >= entry[1] + SETTLES]:
            self._fresh.remove(entry)
            self._look(*entry)
        notes, self._notes = self._notes, []
        return notes

    def _look(self, op: Op, since: int, moved: IndexMap) -> None:
        model: GPT = self.state.model
        later = self.state.step - since
        shapes = {name: p.shape for name, p in model.named_parameters()}
        kept = {
            name: piece for name, piece in moved.pieces.items() if shapes.get(name) == moved.new[name]
        }  # by ops in between
        symmetry = heads_diverge(replace(moved, pieces=kept), model)
        locked = (
            router_lock(model, self._probe()) if later >= SETTLES else []
        )  # earlier it need not have chosen
        wrong = ([] if symmetry.ok else [symmetry.detail]) + locked
        router = Check(
            "router",
            not locked,
            "; ".join(locked) or "each layer's tokens go to several experts, where it has any",
        )
        row = {
            "event": f"{PREFIX}LOOKBACK",
            "op": op.id,
            "name": op.name,
            "step": self.state.step,
            "since": since,
        }
        self.tell(row | {"checks": [vars(symmetry), vars(router)]})
        self._notes += [f"growth: {later} steps after ops[{op.place}] {op.name!r}: {text}" for text in wrong]


def bare(moved: IndexMap) -> IndexMap:
    """Without what is added to the numbers: as large as the model, and of no use afterwards."""
    return replace(moved, pieces={name: replace(piece, plus=None) for name, piece in moved.pieces.items()})


def rebuilt(state: State, grown: dict[str, Any]) -> tuple[TrainConfig, GPT, Optimizers]:
    """Config, model and optimisers as they were when a state was saved."""
    cfg = from_dict(grown["config"])
    model = like(state.model, cfg)
    return (
        cfg,
        model,
        type(state.optimizers)(cfg, model, {name: Mark(*mark) for name, mark in grown["marks"].items()}),
    )


def acted(plan: Plan, step: int) -> int:
    """How many ops have acted on the state after a step, which is kept before those that act right there."""
    return sum(segment.first < step for segment in plan.segments[1:])


def standing(plan: Plan, applied: int, learns: dict[str, list[Any]]) -> dict[str, Any]:
    """What a state says of its growth; nothing where nothing grows."""
    if not plan.cfg.growth.ops:
        return {}
    config = plan.segments[applied].cfg.model_dump(mode="json")
    return {"fired": list(plan.fired), "applied": applied, "config": config, "marks": learns}


def taken(plan: Plan, node: Node) -> dict[str, Any]:
    """The same of a node that another run may have left: on the same chain, by another schedule."""
    return standing(plan, acted(plan, node.step), node.grown.get("marks", {}))
