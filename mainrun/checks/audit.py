"""Train random segments of stored runs again, and compare each result with the store bit by bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mainrun.config import from_dict
from mainrun.core.machine_class import versions
from mainrun.core.pending_losses import step_row
from mainrun.data.batches import Batches
from mainrun.errors import MainrunError
from mainrun.growth.make import make_controller
from mainrun.growth.state import Controller, growth_state_at, load_state
from mainrun.store import lineage
from mainrun.store.checkpoint import fit_errors, sha256_tensors
from mainrun.store.nodes import Damaged, Node, Store, contradicts_parent
from mainrun.train import Setup, State, TrainStep, score, set_up

REACH = 10_000  # the maximum length of a segment that is trained again, in steps
Row = dict[str, Any]  # a row of metrics.jsonl


@dataclass(frozen=True)
class AuditResult:
    """The result of auditing one node of the store."""

    node: Node
    status: Literal["same", "differs", "skipped"]
    why: str = ""


@dataclass(frozen=True)
class _Target:
    """A node to audit, and the nearest earlier node whose state is in the store.

    If the store has no state of an earlier node, `start` is None and the segment begins at step 0.
    """

    node: Node
    start: Node | None

    @property
    def steps(self) -> int:
        return self.node.step - (self.start.step if self.start else 0)


def audit(store: Store, segments: int, seed: int | None = None, reach: int = REACH) -> Iterator[AuditResult]:
    """Audit a random sample of the store's nodes, and yield a result for each node.

    If fewer than `segments` nodes can be trained again, also yield results that say why nodes were skipped.
    """
    nodes, damaged = store.summary()
    for key, why in damaged:
        yield AuditResult(_unreadable(key), "differs", why)
    states = store.states()
    by_key = {node.key: node for node in nodes}
    targets = [_Target(node, _nearest_with_state(node, by_key, states)) for node in nodes]
    ready: list[_Target] = []
    rest: list[_Target] = []
    for target in targets:
        if target.node.state in states and target.steps <= reach:
            ready.append(target)
        else:
            rest.append(target)
    picked = random.Random(seed).sample(ready, min(segments, len(ready)))
    for target in picked:
        yield _audit_node(store, target, by_key)
    rest.sort(key=lambda target: target.node.state not in states)
    for target in rest[: segments - len(picked)]:
        if target.node.state in states:
            distance = f"the nearest earlier state is {target.steps:,} steps before the node"
            yield AuditResult(target.node, "skipped", f"{distance}; use --reach {target.steps}")
        else:
            yield AuditResult(
                target.node, "skipped", "its state was evicted, so there is nothing to compare with"
            )


def _nearest_with_state(node: Node, nodes: Mapping[str, Node], states: Container[str]) -> Node | None:
    """Return the nearest earlier node whose state is in the store, or None."""
    while node.begins:
        parent = nodes.get(node.parent)
        if parent is None or contradicts_parent(node, parent):
            return None
        if parent.state in states:
            return parent
        node = parent
    return None


def _audit_node(store: Store, target: _Target, nodes: Mapping[str, Node]) -> AuditResult:
    """Train the segment of a node again, and compare the result with the node."""
    node = target.node
    try:
        if contradicts_parent(node, nodes.get(node.parent)):
            raise Damaged(f"the node {node.parent[:12]} is not the parent that this node describes")
        node = store.node(node.key)
        segment = _prepare(store, node, target.start)
        if isinstance(segment, AuditResult):
            return segment
        stored = store.load(node)
    except Damaged as e:
        return AuditResult(node, "differs", str(e))
    except MainrunError as e:
        return AuditResult(node, "skipped", str(e))
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as e:  # a node that mainrun wrote never causes these errors
        return AuditResult(node, "differs", f"it cannot be trained again ({type(e).__name__}: {e})")
    try:
        rows = segment.train(node)
    except MainrunError as e:  # a growth operation failed its checks
        return AuditResult(node, "differs", str(e))
    difference = (
        _header_difference(node, segment)
        or _tensor_difference(stored, segment.state.tensors())
        or _row_difference(node, rows)
    )
    return AuditResult(node, "differs" if difference else "same", difference)


@dataclass(frozen=True)
class _Segment:
    """A run that is ready to be trained up to the step of a node."""

    setup: Setup
    state: State
    controller: Controller

    def train(self, node: Node) -> list[Row]:
        """Train the run up to the step of a node, and return the rows that the node should contain."""
        scored_steps = set()
        for row in node.rows:
            if row["event"] == "eval" and row["step"] >= node.begins:
                scored_steps.add(row["step"])
        rows = retrain(self.setup, self.controller, node.step, lambda step: step in scored_steps)
        # The node also contains the score at the step `begins`, unless an earlier run had already stored it.
        return [row for row in rows if row["event"] == "eval" or row["step"] > node.begins]


def _prepare(store: Store, node: Node, start: Node | None) -> _Segment | AuditResult:
    """Set up a run at the start of a node's segment.

    If the node cannot be trained again, return a result that says why.
    """
    cfg = from_dict(node.config)
    setup = set_up(cfg, node.growth_state.get("fired", ()))
    plan = setup.plan
    origin = lineage.origin(
        cfg,
        setup.corpus.fingerprints,
        setup.data.digest,
        versions(),
        setup.device.machine_class,
        setup.start_digest,
    )
    if lineage.root(origin) != node.root:
        stored_origin = dict(store.roots()).get(node.root, {})
        return AuditResult(node, "skipped", "; ".join(lineage.differences(origin, stored_origin)[:3]))
    if lineage.chain(node.root, plan)[node.step : node.step + 1] != [node.key]:
        return AuditResult(node, "differs", "its key does not match its config")
    state = setup.start()
    if start:
        growth_state = growth_state_at(plan, start.step, start.growth_state)
        with fit_errors(f"node {start.key[:12]}"):
            load_state(state, store.load(start), start.step, start.tokens_processed, growth_state)
    return _Segment(setup, state, make_controller(cfg, plan, setup.device, state))


def retrain(
    setup: Setup, growth: Controller, end: int, scored: Callable[[int], bool], decides: bool = False
) -> Iterator[Row]:
    """Train a run up to step `end`, or to the end of the run. Yield a row for every step and every score.

    `scored(step)` returns whether the model is scored at a step. If `decides` is True, the scores trigger
    growth operations as in a run. In this case, `scored` must return True for every step at which the run
    scores the model. If `decides` is False, the plan already contains the steps of the growth operations.
    """
    state = growth.state
    batches = Batches(setup.cfg, setup.data.splits["train"])
    step = TrainStep(state, setup.device)
    while True:
        if scored(state.step):
            figures = growth.figures(state.step)
            rows = [row | figures for row in score(setup, growth.plan, state)]
            yield from rows
            if decides:
                growth.observe_scores(rows)
                growth.decide()
        if state.step >= min(end, growth.plan.steps):
            return
        if growth.pending_op:
            growth.act(list)
        inputs = growth.plan.at(state.step)
        x, y = batches.at(state.step, growth.plan.segment_at(state.step))
        numbers = step.gradients(setup.device.put(x), setup.device.put(y), inputs)
        row = step_row(state.step + 1, inputs.lr, numbers.tolist(), state.cfg.routed_layers)
        step.update(inputs)
        state.step += 1
        yield {"event": "step", "tokens": growth.plan.tokens(state.step), **row.fields()}


# -- comparisons: each function below describes a difference, or returns "" if there is no difference


def _header_difference(node: Node, segment: _Segment) -> str:
    cfg = segment.setup.cfg
    if node.geometry != list(cfg.geometry):
        return f"its official scores have geometry {node.geometry}, but its config says {list(cfg.geometry)}"
    presented = segment.setup.plan.tokens(node.step) * cfg.presentations
    if node.tokens_processed != presented:
        tokens = f"{node.tokens_processed:,} tokens were processed"
        return f"it says that {tokens}, but its steps process {presented:,} tokens"
    return ""


def _tensor_difference(stored: dict[str, Any], trained: dict[str, Any]) -> str:
    missing = sorted({*stored} ^ {*trained})
    if missing:
        return f"the tensor {missing[0]} exists only in the store or only after training again"
    differing = []
    for name in sorted(trained):
        if sha256_tensors(iter([("", stored[name])])) != sha256_tensors(iter([("", trained[name])])):
            differing.append(name)
    if not differing:
        return ""
    names = ", ".join(differing[:3])
    more = ", ..." if len(differing) > 3 else ""
    return f"{len(differing)} of {len(trained)} tensors differ: {names}{more}"


def _row_difference(node: Node, rows: list[Row]) -> str:
    stored = {_row_key(row): row for row in node.rows if row["event"] in ("step", "eval")}
    for row in rows:
        stored_row = stored.pop(_row_key(row), None)
        if stored_row is None:
            return f"the store has no {row['event']} row of step {row['step']}"
        for name in sorted({*row, *stored_row} - {"seconds"}):
            if stored_row.get(name) != row.get(name):
                return (
                    f"{name} at step {row['step']} is {stored_row.get(name)!r} in the store, "
                    f"but {row.get(name)!r} after training again"
                )
    if stored:
        event, step, _ = next(iter(stored))
        return f"the store has a row that training again does not produce: {event} of step {step}"
    return ""


def _row_key(row: Row) -> tuple[str, int, str | None]:
    return row["event"], row["step"], row.get("split")


def _unreadable(key: str) -> Node:
    """Return a placeholder for a node that mainrun cannot read."""
    return Node(key, "", "", 0, 0, 0, "", 0, [], 0.0, "", {}, 0.0, "")
