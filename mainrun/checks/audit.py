"""Train random segments of the store again and compare every bit: what the store promises is checked, not believed."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mainrun.config import from_dict
from mainrun.core.machine_class import versions
from mainrun.data.batches import Batches
from mainrun.errors import MainrunError
from mainrun.growth.state import Controller, growth_state_at, load_state, make_controller
from mainrun.store import lineage
from mainrun.store.checkpoint import fitting, sha256_tensors
from mainrun.store.nodes import Damaged, Node, Store, misplaced
from mainrun.train import Setup, State, TrainStep, score, set_up


@dataclass
class Finding:
    node: Node
    status: str  # same | differs | skipped
    why: str = ""


REACH = 10_000  # steps that one segment may take


def audit(store: Store, segments: int, seed: int | None = None, reach: int = REACH) -> Iterator[Finding]:
    """A random few of the nodes; where there are fewer that can be trained again, the others with the reason."""
    nodes, damaged = store.summary()
    for key, why in damaged:
        yield Finding(_unreadable(key), "differs", why)
    states, chance = store.states(), random.Random(seed)
    there = {node.key: node for node in nodes}
    begins = {node.key: _before(node, there, states) for node in nodes}
    ways = {node.key: node.step - (before.step if (before := begins[node.key]) else 0) for node in nodes}
    ready = [node for node in nodes if node.state in states and ways[node.key] <= reach]
    picked = chance.sample(ready, min(segments, len(ready)))
    for node in picked:
        try:
            if misplaced(node, there.get(node.parent)):
                raise Damaged(f"{node.parent[:12]} is not what it says was before it")
            node = store.node(node.key)
        except Damaged as e:
            yield Finding(node, "differs", str(e))
            continue
        yield _again(store, node, begins[node.key])
    rest = [node for node in nodes if node.state not in states or ways[node.key] > reach]
    for node in sorted(rest, key=lambda node: node.state not in states)[: segments - len(picked)]:
        if node.state in states:
            why = f"the nearest state before it is {ways[node.key]:,} steps away; --reach {ways[node.key]} goes that far"
        else:
            why = "its state was evicted, so there is nothing to compare with"
        yield Finding(node, "skipped", why)


def _before(node: Node, nodes: Mapping[str, Node], states: Container[str]) -> Node | None:
    """The nearest one before it whose state is there; None: only the start of all."""
    while node.begins:
        before = nodes.get(node.parent)
        if before is None or misplaced(node, before):
            return None
        if before.state in states:
            return before
        node = before
    return None


def _again(store: Store, node: Node, before: Node | None) -> Finding:
    """Train to a node from one before it, or from the start."""
    try:
        cfg = from_dict(node.config)
        setup = set_up(cfg, node.grown.get("fired", ()))
        plan = setup.plan
        begun = lineage.origin(
            cfg, setup.corpus.fingerprints, setup.data.digest, versions(), setup.device.machine_class
        )
        if lineage.root(begun) != node.root:
            theirs = dict(store.roots()).get(node.root, {})
            return Finding(node, "skipped", "; ".join(lineage.differences(begun, theirs)[:3]))
        if lineage.chain(node.root, plan)[node.step : node.step + 1] != [node.key]:
            return Finding(node, "differs", "its config does not lead to its key")
        state = setup.start()
        if before:
            growth_state = growth_state_at(plan, before.step, before.grown)
            with fitting(f"node {before.key[:12]}"):
                load_state(state, store.load(before), before.step, before.presented, growth_state)
        stored = store.load(node)
    except Damaged as e:
        return Finding(node, "differs", str(e))
    except MainrunError as e:
        return Finding(node, "skipped", str(e))
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as e:  # a node that a hand wrote
        return Finding(node, "differs", f"it cannot be trained again ({type(e).__name__}: {e})")
    scored = {
        row["step"] for row in node.rows if row["event"] == "eval" and row["step"] >= node.begins
    }  # nobody had the first one yet
    growth = make_controller(cfg, plan, setup.device, state)
    found = again(setup, growth, node.step, lambda step: step in scored)
    try:
        rows = [row for row in found if row["event"] == "eval" or row["step"] > node.begins]
    except MainrunError as e:  # an op that did not keep its word here
        return Finding(node, "differs", str(e))
    if node.geometry != list(cfg.geometry):
        return Finding(
            node,
            "differs",
            f"it says that official scores are of {node.geometry}, its config of {list(cfg.geometry)}",
        )
    presented = plan.tokens(node.step) * cfg.passes
    if node.presented != presented:
        return Finding(
            node,
            "differs",
            f"it says that {node.presented:,} tokens were presented, its steps present {presented:,}",
        )
    return Finding(node, *_compare(node, stored, state, rows))


def again(
    setup: Setup, growth: Controller, end: int, scored: Callable[[int], bool], decides: bool = False
) -> Iterator[dict[str, Any]]:
    """Train to step `end`, or to the end of the run. Yield the rows of every step, and the scores where asked.

    scored: whether a step is scored. decides: whether scores fire growth operations, as they do in a run; they must
    then be all scores of the run so far. Otherwise the plan already knows when operations fire.
    """
    state = growth.state
    batches = Batches(setup.cfg, setup.data.splits["train"])
    step = TrainStep(state, setup.device)
    while True:
        if scored(state.step):
            figures = growth.figures(state.step)
            rows = [row | figures for row in score(setup.cfg, setup.data, state)]
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
        loss_and_norm = step.gradients(setup.device.put(x), setup.device.put(y), inputs)
        loss, norm = loss_and_norm.tolist()
        step.update(inputs)
        state.step += 1
        row = {"event": "step", "step": state.step, "tokens": growth.plan.tokens(state.step), "lr": inputs.lr}
        yield row | {"loss": loss, "grad_norm": norm}


def _compare(node: Node, stored: dict[str, Any], state: State, rows: list[dict[str, Any]]) -> tuple[str, str]:
    again = state.tensors()
    if names := sorted({*stored} ^ {*again}):
        return "differs", f"one of them has no {names[0]}"
    apart = [
        name
        for name in sorted(again)
        if sha256_tensors(iter([("", stored[name])])) != sha256_tensors(iter([("", again[name])]))
    ]
    if apart:
        return (
            "differs",
            f"{len(apart)} of {len(again)} tensors: {', '.join(apart[:3])}{', ...' if len(apart) > 3 else ''}",
        )
    kept = {
        (row["event"], row["step"], row.get("split")): row
        for row in node.rows
        if row["event"] in ("step", "eval")
    }
    for row in rows:
        there = kept.pop((row["event"], row["step"], row.get("split")), None)
        if there is None:
            return "differs", f"no {row['event']} row of step {row['step']}"
        for name in sorted({*row, *there} - {"seconds"}):
            if there.get(name) != row.get(name):
                return (
                    "differs",
                    f"{name} at step {row['step']}: {there.get(name)!r} in the store, {row.get(name)!r} now",
                )
    if kept:
        return "differs", "the store has a row that no step writes: {} of step {}".format(*next(iter(kept)))
    return "same", ""


def _unreadable(key: str) -> Node:
    return Node(key, "", "", 0, 0, 0, "", 0, [], 0.0, "", {}, 0.0, "")
