"""The growth controller fires the operations of a run, carries out each operation and checks the result.

An operation fires after a training step and changes the state of the run. A checkpoint or a store node of
this step contains the state before the operation. A run that continues from a checkpoint or a node therefore
repeats the decision and the operation. The result is bit-identical, because decisions and operations depend
only on the config and the previous scores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from mainrun.config import TrainConfig
from mainrun.core.device import Device
from mainrun.core.hardware import release_free_memory
from mainrun.core.optimizers import Optimizers
from mainrun.core.parameters import saved_parameters
from mainrun.errors import UsageError
from mainrun.growth.moments import IndexMap, param_schedules, transfer
from mainrun.growth.operators import empty_model, grow, map_parameters, meta_model
from mainrun.growth.state import FIGURES, Row, growth_state, ops_applied, single_model
from mainrun.growth.verify import (
    PromiseCheck,
    check_coverage,
    check_function,
    check_groups,
    check_layer_identity,
    check_rope,
    check_router_scale,
    check_symmetry,
    check_tying,
    locked_routers,
    logit_change,
    probe,
)
from mainrun.plan.cost import costs
from mainrun.plan.ops import ARCHITECTURE, Op
from mainrun.plan.plan import Decision, Plan, Segment
from mainrun.plan.triggers import Facts, due
from mainrun.store.rundir import RowLog
from mainrun.train import GPT, State, set_last_inputs

SETTLES = 10  # after this number of steps, copies should differ and a router should use several experts
ROWS = 4  # number of rows in the batch that is used to check operations
PREFIX = "OPERATION_"  # prefix of the event names in growth.jsonl


class Recent(NamedTuple):
    """A recent operation whose copied weights have not been checked yet."""

    op: Op
    step: int
    moved: IndexMap


class Grown(NamedTuple):
    """The result of an operation, which replaces parts of the state if all checks pass."""

    model: GPT
    optimizers: Optimizers
    average: dict[str, Tensor] | None
    moved: IndexMap
    checks: list[PromiseCheck]
    figures: Row  # additional values that are logged in growth.jsonl


class Growth:
    """The growth controller of a run.

    plan: the plan of the run, with all decisions so far.
    journal: the log of growth events, growth.jsonl.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        plan: Plan,
        device: Device,
        state: State,
        journal: RowLog | None = None,
        on_event: Callable[[Row], None] = lambda row: None,
        clock: Callable[[str], Any] = nullcontext,
    ) -> None:
        self.cfg = cfg
        self.plan = plan
        self.device = device
        self.state = state
        self.journal = journal
        self.on_event = on_event
        self.clock = clock
        self.losses: list[tuple[int, float]] = []  # the step and the loss of each evaluation on `split`
        self.applied = 0  # number of operations that were carried out
        self._recent: list[Recent] = []
        self._compiling: Op | None = None  # an operation whose compile time is not logged yet
        self._notes: list[str] = []
        self.restore()

    @property
    def split(self) -> str:
        """The split whose loss triggers operations: dev if the config has a dev split, else val."""
        return "dev" if self.cfg.dev_frac else "val"

    @property
    def vocab_size(self) -> int:
        model = self.state.model
        return model.embed.num_embeddings - model.cfg.unused_ids

    def log_event(self, row: Row) -> None:
        self.on_event(row)
        if self.journal:
            self.journal.append(row)

    def close(self) -> None:
        if self.journal:
            self.journal.close()

    def restore(self) -> None:
        """Adapt the controller to a state that was just built or loaded.

        Operations that are due have not been applied to this state yet.
        """
        saved = self.state.growth_state
        if saved:
            self.plan = Plan(self.cfg, self.plan.train_tokens, saved["fired"])
        self.applied = saved.get("applied", ops_applied(self.plan, self.state.step))
        self._recent = self._recall()
        self._store_state()

    def _recall(self) -> list[Recent]:
        """Return the operations of all sessions whose copied weights have not been checked yet."""
        recent: list[Recent] = []
        for last, segment in pairwise(self.plan.segments[: self.applied + 1]):
            op = segment.op
            if op is None or op.name not in ARCHITECTURE:
                continue
            recent = self._surviving(op, recent)
            if self.state.step < segment.first + SETTLES:
                old = empty_model(single_model(self.state), last.cfg)
                for p in old.parameters():
                    p.detach().zero_()  # the index map does not depend on the values of the weights
                new = meta_model(old, segment.cfg)
                moved = map_parameters(op, last.cfg, segment.cfg, old, new, op.seed)[1]
                recent.append(Recent(op, segment.first, without_values(moved)))
        return recent

    @staticmethod
    def _surviving(op: Op, recent: list[Recent]) -> list[Recent]:
        """Return the recent operations whose tensors keep their names when `op` is carried out."""
        return [] if op.name == "stack_layers" else recent

    def _store_state(self) -> None:
        schedules = {name: list(values) for name, values in self.state.optimizers.schedules.items()}
        self.state.growth_state = growth_state(self.plan, self.applied, schedules)

    def figures(self, step: int) -> Row:
        """Return the model size and the total FLOPs after a step, to log with the scores of the step."""
        flops = 0
        segments = self.plan.segments
        for segment, later in zip(segments, [*segments[1:], None], strict=True):
            end = min(step, later.first) if later else step
            tokens = max(0, end - segment.first) * segment.span
            per_token = costs(segment.cfg, self.vocab_size)["flops_per_token"]
            flops += tokens * segment.cfg.passes * per_token
        size = costs(segments[ops_applied(self.plan, step)].cfg, self.vocab_size)
        return dict(zip(FIGURES, (size["params"], size["active"], flops), strict=True))

    def observe_scores(self, rows: Iterable[Row]) -> None:
        """Remember the losses of the split that triggers operations."""
        losses = dict(self.losses)
        for row in rows:
            if row["event"] == "eval" and row["split"] == self.split:
                losses[row["step"]] = row["loss"]
        self.losses = sorted(losses.items())

    # -- when an operation is due

    def decide(self) -> bool:
        """Fire the operations whose triggers are met. Return True if the plan changed."""
        changed = False
        while self._may_decide():
            op = self.plan.undecided
            assert op is not None
            fires = self.device.leads and self._reason(op, self.plan.segments[-1].first) is not None
            if not self.device.any_process(fires):
                break
            self.plan = self.plan.decided(Decision(self.state.step))
            changed = True
        self._store_state()
        return changed

    def _may_decide(self) -> bool:
        """Whether the evaluation after this step may fire the next undecided operation."""
        step = self.state.step
        last = self.plan.segments[-1]
        if self.plan.undecided is None or last.first > step or step not in self.plan.eval_steps:
            return False
        # after an operation with `reevaluate`, the next operation waits for a new evaluation
        waits = last.op is not None and last.op.reevaluate and last.first == step
        return not waits

    def _reason(self, op: Op, last: int) -> str | None:
        """Return the reason why an operation fires after this step. Return None if it does not fire."""
        step = self.state.step
        losses = [entry for entry in self.losses if entry[0] <= step]
        return due(op.trigger, Facts(step, last, self.plan.tokens(step), self.plan.budget, losses))

    @property
    def pending_op(self) -> Op | None:
        """The operation that is due before the next step, or None if no operation is due."""
        later = self.plan.segments[self.applied + 1 :]
        if not later or later[0].first > self.state.step or self.state.step >= self.plan.steps:
            return None
        return later[0].op

    # -- carrying out operations

    def act(self, evaluate: Callable[[], list[Row]]) -> bool:
        """Carry out all operations that are due before the next step.

        Return True if the model was replaced.
        """
        replaced = False
        # the loss before the operations, or None if the state was not scored
        loss = dict(self.losses).get(self.state.step)
        op = self.pending_op
        while op:
            replaced, loss = self._act(op, evaluate, replaced, loss)
            op = self.pending_op
        self._store_state()
        return replaced

    def _act(
        self, op: Op, evaluate: Callable[[], list[Row]], replaced: bool, loss: float | None
    ) -> tuple[bool, float | None]:
        """Carry out an operation. Return whether the model was replaced, and the loss after the operation."""
        last, segment = self.plan.segments[self.applied : self.applied + 2]
        before = self.state.cfg
        event = self._event(op)
        why = self._reason(op, last.first) or str(op.trigger)
        start = {"ops": op.place, "desc": op.desc, "why": why, "loss": loss, "seed": op.seed}
        start |= {"preserve": op.preserve, **costs(before, self.vocab_size)}
        self.log_event({"event": f"{PREFIX}START", **event, **start})
        started = time.perf_counter()
        checks, figures = self._apply(op, segment)
        failed = [check for check in checks if not check.ok]
        if failed:
            self._fail(op, event, failed)
            return replaced, loss
        self.applied += 1
        if op.name in ARCHITECTURE and self.device.compile:
            self._compiling = op
        size = costs(segment.cfg, self.vocab_size)
        done = {
            "event": f"{PREFIX}SUCCESS",
            **event,
            "seconds": time.perf_counter() - started,
            **size,
            **figures,
        }
        self.log_event(done | {"checks": [vars(check) for check in checks]})
        self._notes.append(self._note(op, before, segment.cfg))
        if op.reevaluate:
            loss = self._reevaluate(event, evaluate, loss)
        elif op.name in ARCHITECTURE:
            loss = None
        return replaced or op.name in ARCHITECTURE, loss

    def _event(self, op: Op) -> Row:
        """Return the fields that all events of an operation have in growth.jsonl."""
        step = self.state.step
        tokens = self.plan.tokens(step)
        return {"op": op.id, "name": op.name, "value": op.value, "step": step, "tokens": tokens}

    def _apply(self, op: Op, segment: Segment) -> tuple[list[PromiseCheck], Row]:
        """Apply an operation to the state, provided that the result passes all checks."""
        if op.name not in ARCHITECTURE:
            self.state.cfg = segment.cfg
            return [], {}
        self._look_before(op)
        with self.clock("growth"):
            return self._grow(op, self.state.cfg, segment.cfg)

    def _note(self, op: Op, before: TrainConfig, after: TrainConfig) -> str:
        """Return the message about an operation for the user."""
        value = "" if op.value is None else f" {json.dumps(op.value)}"
        note = f"growth: step {self.state.step}: ops[{op.place}] {op.name!r}{value}"
        if op.name not in ARCHITECTURE:
            return note
        sizes = [f"{costs(cfg, self.vocab_size)['params']:,}" for cfg in (before, after)]
        return f"{note}: {sizes[0]} -> {sizes[1]} parameters"

    def _reevaluate(
        self, event: Row, evaluate: Callable[[], list[Row]], before: float | None
    ) -> float | None:
        """Score the state again after an operation.

        Return the new loss. A process that computes no scores returns the previous loss, or None if the
        operation changed the model.
        """
        rows = evaluate()
        if not rows:
            return None if event["name"] in ARCHITECTURE else before
        after: float = next(row["loss"] for row in rows if row["split"] == self.split)
        change = None if before is None else after - before
        losses = {"loss_before": before, "loss_after": after, "change": change}
        self.log_event({"event": f"{PREFIX}REEVALUATION", **event, **losses})
        return after

    def _look_before(self, op: Op) -> None:
        """Check the copies in all tensors that the operation is about to rename."""
        kept = self._surviving(op, self._recent)
        for recent in self._recent:
            if recent not in kept and recent.step < self.state.step:
                self._look(recent)
        self._recent = kept

    def _grow(self, op: Op, before: TrainConfig, after: TrainConfig) -> tuple[list[PromiseCheck], Row]:
        """Replace the model with the grown model if the grown model passes every check."""
        state = self.state
        state.model.zero_grad(set_to_none=True)
        try:
            grown = self._make(op, before, after)
        except Exception as e:  # every error, such as a lack of memory, makes the operation fail
            return [PromiseCheck("op", False, f"{type(e).__name__}: {e}")], {}
        if all(check.ok for check in grown.checks):
            old_moments = state.optimizers.state()
            # free the old weights before the new optimizer state is allocated
            state.replace_model(after, grown.model, grown.optimizers)
            release_free_memory()
            mode = op.optimizer.mode
            moments = transfer(old_moments, grown.moved, mode, op.optimizer.min_coverage)[0]
            grown.optimizers.load(moments, copy=False)
            del old_moments
            release_free_memory()
            if grown.average:
                state.average.separate(grown.average)
            self._recent.append(Recent(op, state.step, without_values(grown.moved)))
        return grown.checks, grown.figures

    def _make(self, op: Op, before: TrainConfig, after: TrainConfig) -> Grown:
        """Compute and check the result of an operation without changing the state."""
        state = self.state
        old = single_model(state)
        set_last_inputs(state, self.plan, self.device)
        idx = self._probe()
        new, moved = grow(op, before, after, old, op.seed)
        moved_by, largest = logit_change(old, new, idx, full=op.preserve == "exact")
        checks = [check_function(op.preserve, old, new, idx), check_tying(before, new), check_rope(old, new)]
        if op.preserve in ("exact", "bitexact") and op.name != "stack_layers":
            checks.append(check_router_scale(old, new, idx))
        if op.name == "stack_layers" and op.init == "identity":
            inserted = [i for i, source in enumerate(op.value) if source in op.value[:i]]
            checks.append(check_layer_identity(new, inserted, idx))
        average: dict[str, Tensor] | None = None
        if state.average.differs:
            with state.average.applied():
                # with the same seed, the average gets the same random numbers as the weights
                grown_average = grow(op, before, after, old, op.seed)[0]
            average = dict(saved_parameters(after, grown_average))
        schedules = param_schedules(state.optimizers.schedules, moved, op, state.step)
        optimizers = Optimizers(after, new, schedules)
        coverage = transfer(state.optimizers.state(), moved, op.optimizer.mode, dry=True)[1]
        required = 0.0 if op.optimizer.mode == "reset" else op.optimizer.min_coverage
        checks += [check_coverage(coverage, required), check_groups(new, optimizers)]
        figures: Row = {"delta_logits": moved_by, "largest_logit": largest, "coverage": coverage}
        figures["truncated"] = moved.truncated
        return Grown(new, optimizers, average, moved, checks, figures)

    def _fail(self, op: Op, event: Row, failed: list[PromiseCheck]) -> None:
        """Report a failed operation. The state is unchanged, and the operation is not tried again."""
        why = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        checks = [vars(check) for check in failed]
        self.log_event({"event": f"{PREFIX}ERROR", **event, "checks": checks, "on_fail": op.on_fail})
        if op.on_fail == "abort":
            self._store_state()
            at = f"growth: ops[{op.place}] {op.name!r} failed a check at step {self.state.step}"
            fix = "Lower preserve or optimizer.min_coverage, or set on_fail=skip"
            raise UsageError(f"{at}: {why}; the operation did not change the model. {fix}")
        self.plan = self.plan.decided(Decision(self.state.step, skipped=True), op.place)

    def _probe(self) -> Tensor:
        """Return the batch of token ids that is used to check operations."""
        model = self.state.model
        length = min(model.cfg.block_size, 128)
        return probe(self.vocab_size, length, self.cfg.seed, ROWS).to(model.embed.weight.device)

    # -- checks some steps after an operation

    def compiled(self, seconds: float) -> None:
        """Log how long the compilation after an operation took."""
        op = self._compiling
        self._compiling = None
        if op and seconds:
            row = {"event": f"{PREFIX}RECOMPILE", "op": op.id, "name": op.name, "step": self.state.step}
            self.log_event(row | {"seconds": seconds})

    def look_back(self) -> list[str]:
        """Return messages for the user about new operations, equal copies, and routers that are stuck."""
        settled = [recent for recent in self._recent if self.state.step >= recent.step + SETTLES]
        for recent in settled:
            self._recent.remove(recent)
            self._look(recent)
        notes = self._notes
        self._notes = []
        return notes

    def _look(self, recent: Recent) -> None:
        """Check whether the copies from an operation have diverged, and whether a router is stuck."""
        model = single_model(self.state)
        set_last_inputs(self.state, self.plan, self.device)
        op = recent.op
        later = self.state.step - recent.step
        shapes = {name: p.shape for name, p in model.named_parameters()}
        kept = {}  # the tensors whose shapes no later operation has changed
        for name, piece in recent.moved.pieces.items():
            if shapes.get(name) == recent.moved.new[name]:
                kept[name] = piece
        symmetry = check_symmetry(replace(recent.moved, pieces=kept), model)
        # a new router needs some training steps before the router sends tokens to several experts
        locked = locked_routers(model, self._probe()) if later >= SETTLES else []
        detail = "; ".join(locked) or "in every layer with experts, tokens go to several experts"
        router = PromiseCheck("router", not locked, detail)
        row: Row = {"event": f"{PREFIX}LOOKBACK", "op": op.id, "name": op.name}
        row |= {"step": self.state.step, "since": recent.step, "checks": [vars(symmetry), vars(router)]}
        self.log_event(row)
        problems = list(locked) if symmetry.ok else [symmetry.detail, *locked]
        for problem in problems:
            self._notes.append(f"growth: {later} steps after ops[{op.place}] {op.name!r}: {problem}")


def without_values(moved: IndexMap) -> IndexMap:
    """Return a copy of an index map without the large `plus` tensors, which are no longer needed."""
    pieces = {name: replace(piece, plus=None) for name, piece in moved.pieces.items()}
    return replace(moved, pieces=pieces)
