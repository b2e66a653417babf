"""Tests each decision about shared steps, with a fake store and without training."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import MainrunError
from mainrun.plan.plan import Plan
from mainrun.run import sharing
from mainrun.run.accounts import Accounts
from mainrun.run.sharing import OtherRun, Sharing
from mainrun.store import lineage
from mainrun.store.leases import Fenced
from mainrun.store.nodes import Damaged, Node, Refused

# The run has 37 steps, scores after steps 1, 18, 36 and 37, and a decay that begins after step 27.
SMALL: dict[str, Any] = {
    "num_titles": 200,
    "n_layer": 1,
    "optimizer": "adamw",
    "lr": 0.01,
    "schedule": "wsd",
    "decay_frac": 0.3,
}
TOKENS = 37 * 128
GEOMETRY = [8, 16]


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | SMALL | changes)


class FakeLeases:
    """Fake leases of other runs. The run under test can acquire any lease."""

    def __init__(self, held: dict[str, dict[str, Any]] | None = None) -> None:
        self.held = held or {}

    def active(self) -> dict[str, dict[str, Any]]:
        return self.held

    def acquire(self, key: str, beat: Any, **content: Any) -> SimpleNamespace:
        return lease(key, content)


def lease(key: str, content: dict[str, Any]) -> SimpleNamespace:
    released: list[bool] = []

    def release(unfinished: bool = False) -> None:
        released.append(unfinished)

    return SimpleNamespace(key=key, info=content, release=release, released=released, check=lambda: None)


class FakeStore:
    """A fake store in memory that records the calls of its methods."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node | Exception] = {}
        self.evicted: set[str] = set()
        self.wanted: set[str] = set()
        self.saved: list[Node] = []
        self.kept: list[set[str]] = []
        self.began: list[tuple[str, dict[str, Any]]] = []
        self.files = SimpleNamespace(exists=lambda name: name.removeprefix("nodes/") in self.nodes)
        self.fault: Exception | None = None
        self.beginnings: list[tuple[str, Any]] = []
        self.rows_read = 0

    def __str__(self) -> str:
        return "STORE"

    def node_keys(self) -> set[str]:
        return set(self.nodes)

    def states(self) -> set[str]:
        return {node.state for node in self.nodes.values() if isinstance(node, Node)} - self.evicted

    def node(self, key: str, rows: bool = True) -> Node:
        node = self.nodes[key]
        self.rows_read += rows
        if isinstance(node, Exception):
            raise node
        return node

    def history(self, node: Node, since: int) -> Iterator[Node]:
        yield node
        while node.begins > since and node.parent in self.nodes:
            node = self.node(node.parent)
            yield node

    def load(self, node: Node) -> dict[str, Any]:
        if node.state == "damaged":
            raise Damaged("its state is torn")
        return {"of": node.step}

    def wants(self) -> set[str]:
        return self.wanted

    def want(self, key: str, run: str) -> None:
        self.wanted.add(key)

    def roots(self) -> list[tuple[str, Any]]:
        if self.fault:
            raise self.fault
        return self.beginnings

    def begin(self, root: str, beginning: dict[str, Any]) -> None:
        self.began.append((root, beginning))

    def save(self, node: Node, tensors: dict[str, Any], check: Any) -> None:
        check()
        if self.fault:
            raise self.fault
        self.saved.append(node)
        self.nodes[node.key] = node

    def evict(self, keep: set[str]) -> None:
        self.kept.append(keep)


class FakeState:
    def __init__(self, step: int = 0) -> None:
        self.step, self.tokens = step, 128 * step
        self.growth_state: dict[str, Any] = {}
        self.loads: list[tuple[int, int]] = []

    def load(self, tensors: dict[str, Any], step: int, tokens: int) -> None:
        assert tensors == {"of": step}
        self.step, self.tokens = step, tokens
        self.loads.append((step, tokens))

    def tensors(self) -> dict[str, Any]:
        return {}


class FakeLog(list[dict[str, Any]]):
    """A log in memory, which is truthy even if the log has no rows."""

    def rows(self) -> list[dict[str, Any]]:
        return self

    def __bool__(self) -> bool:
        return True


class RunWithStore:
    """A run with a fake store, its `Sharing` object and its notes."""

    def __init__(
        self,
        until: int = 0,
        keep: tuple[int, ...] = (),
        fresh: bool = False,
        world: int = 1,
        leads: bool = True,
        **changes: Any,
    ):
        self.cfg = config(**changes)
        self.store, self.notes = FakeStore(), []
        self.plan = Plan(self.cfg, TOKENS)
        machine = SimpleNamespace(
            world=world,
            leads=leads,
            machine_class={"cpu": "x"},
            broadcast=lambda step, unscored: (step, unscored),
        )
        self.machine = machine
        self.accounts = Accounts()
        self.growth = SimpleNamespace(journal=None, figures=lambda step: {})
        self.sharing = Sharing(
            self.store,
            self.cfg,
            self.plan,
            machine,
            {"corpus": "c"},
            "t",
            self.notes.append,
            self.accounts,
            keep,
            until,
            fresh,
        )
        self.sharing.holder.leases = FakeLeases()
        self.keys = self.sharing.course.keys

    def node(
        self, step: int, begins: int = 0, rows: tuple[dict[str, Any], ...] | None = None, **changes: Any
    ) -> Node:
        node = Node(
            key=self.keys[step],
            parent=self.keys[begins],
            root=self.keys[0],
            step=step,
            begins=begins,
            tokens_processed=128 * step,
            state=f"state {step}",
            size=1,
            geometry=GEOMETRY,
            seconds=1.0,
            run="other-1",
            config={},
            made=0.0,
            rows_sha256="",
            rows=self.rows(begins, step) if rows is None else rows,
        )
        return replace(node, **changes)

    def add(self, *nodes: Node) -> None:
        self.store.nodes |= {node.key: node for node in nodes}

    def rows(self, begins: int, end: int) -> tuple[dict[str, Any], ...]:
        """Return the rows that a run with this plan logs from step `begins + 1` to step `end`."""
        rows = []
        for step in range(begins + 1, end + 1):
            rows.append({"event": "step", "step": step, "loss": 1.0})
            if step in self.plan.eval_steps:
                rows.append({"event": "eval", "step": step, "split": "val", "full": 2.0})
        return tuple(rows)


def test_the_constants_of_this_file_match_the_config() -> None:
    run = RunWithStore()
    assert run.sharing.course.geometry == GEOMETRY == list(run.cfg.geometry)
    assert run.plan.steps == 37 and run.plan.eval_steps == {1, 18, 36, 37} and run.plan.breaks == [27]


# -- where nodes are kept


@pytest.mark.parametrize(
    ("until", "keep", "stops"),
    [
        # No node is kept at the score after step 1. Nodes are kept at later scores, at the start of the decay
        # and at the end.
        (
            0,
            (),
            {18, 27, 36, 37},
        ),
        (20, (), {18, 20}),
        (99, (), {18, 27, 36, 37}),
        (0, (5, 30, 38, 0), {5, 18, 27, 30, 36, 37}),
        (0, (1,), {1, 18, 27, 36, 37}),
    ],
)
def test_the_steps_at_which_nodes_are_kept(until: int, keep: tuple[int, ...], stops: set[int]) -> None:
    run = RunWithStore(until, keep)
    assert run.sharing.course.stops == stops
    assert run.sharing.course.until == min(until or 37, 37)


def test_the_defaults_of_sharing() -> None:
    run = RunWithStore()
    fresh = Sharing(
        run.store,
        run.cfg,
        run.plan,
        run.machine,
        {"corpus": "c"},
        "t",
        run.notes.append,
        Accounts(),
    )
    assert (fresh.course.until, fresh.course.stops) == (37, {18, 27, 36, 37})
    assert fresh.reads and fresh.writer.on


@pytest.mark.parametrize(("step", "kept"), [(17, False), (18, True), (19, False), (20, True), (37, True)])
def test_a_step_is_kept_if_this_run_or_another_needs_it(step: int, kept: bool) -> None:
    run = RunWithStore()
    run.sharing.holder.wanted = frozenset({20})
    assert run.sharing.keeps(step) is kept
    assert run.sharing.holder.due == ([step] if kept else [])
    assert run.sharing.holder.passed == step


def test_a_written_step_is_no_longer_due() -> None:
    run = RunWithStore()
    run.sharing.holder.due, run.sharing.holder.written = [18, 27], 18
    run.sharing.keeps(36)
    assert run.sharing.holder.due == [27, 36]


def test_a_heartbeat_reports_the_step_up_to_which_nodes_are_written() -> None:
    run = RunWithStore()
    run.sharing.holder.passed, run.sharing.holder.due, run.sharing.holder.written = 30, [18, 27], 18
    assert run.sharing.holder.beat() == {"at": 26}
    run.sharing.holder.written = 27
    assert run.sharing.holder.beat() == {"at": 30}


@pytest.mark.parametrize(("world", "wanted"), [(1, {20}), (2, set())])
def test_a_heartbeat_reads_requests_in_runs_of_one_process(world: int, wanted: set[int]) -> None:
    run = RunWithStore(world=world)
    run.store.wanted = {run.keys[20], "f" * 64}
    run.sharing.holder.beat()
    assert run.sharing.holder.wanted == wanted


def test_a_heartbeat_survives_a_read_error_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunWithStore()

    def fail() -> None:
        raise OSError

    monkeypatch.setattr(run.store, "wants", fail)
    run.sharing.holder.passed = 7
    assert run.sharing.holder.beat() == {"at": 7}


@pytest.mark.parametrize(
    ("step", "target", "scores"), [(0, 18, [1]), (17, 18, []), (18, 27, []), (27, 36, []), (36, 37, [])]
)
def test_a_lease_is_on_the_next_node_and_lists_its_scores(step: int, target: int, scores: list[int]) -> None:
    run = RunWithStore()
    run.sharing.holder.acquire(step)
    held = run.sharing.holder.lease
    assert held is not None and held.key == run.keys[target] and run.sharing.holder.passed == step
    content = {
        "run": run.cfg.run_id,
        "config": run.cfg.model_dump(mode="json"),
        "root": run.keys[0],
        "step": target,
    }
    assert held.info == content | {"scores": scores, "geometry": GEOMETRY, "fired": []}


CONDITIONAL = {"ops": [{"name": "set_lr", "value": 0.001, "trigger": {"loss_below": 1.0}}]}


@pytest.mark.parametrize(
    ("growth", "step", "far"),
    [
        (None, 0, 37),
        (None, 20, 37),
        (CONDITIONAL, 0, 1),
        (CONDITIONAL, 1, 18),
        (CONDITIONAL, 18, 36),
        (CONDITIONAL, 37, 37),
    ],
)
def test_a_plan_is_certain_up_to_the_next_score_that_may_fire_an_op(
    growth: dict[str, Any] | None, step: int, far: int
) -> None:
    run = RunWithStore(**({"growth": growth} if growth else {}))
    assert run.sharing.course.certain_until(step) == far


def test_a_plan_without_the_leased_step_frees_the_lease() -> None:
    run = RunWithStore()
    on_the_way = run.sharing.holder.lease = lease(run.keys[27], {"step": 27})
    run.sharing.follow(run.plan)
    assert run.sharing.holder.lease is on_the_way and on_the_way.released == []
    run.sharing.follow(Plan(config(lr=0.02), TOKENS))
    assert run.sharing.holder.lease is None and on_the_way.released == [True]


def test_the_initial_state_of_sharing() -> None:
    fresh = RunWithStore().sharing
    assert (fresh.holder.written, fresh.holder.due, fresh.holder.passed) == (0, [], 0)
    assert (fresh.writer.rows, fresh.unscored) == ([], False)
    assert (fresh.writer.before, fresh.reads, fresh.writer.on) == ((0, fresh.course.keys[0]), True, True)


# -- waiting for other runs


def other_lease(run: RunWithStore, step: int, /, **changes: Any) -> dict[str, Any]:
    """Return the content of a lease that another run with the same config has on a node."""
    content = {
        "run": "other",
        "root": run.keys[0],
        "config": run.cfg.model_dump(mode="json"),
        "step": step,
        "at": 0,
        "geometry": GEOMETRY,
    }
    return content | {"scores": [1, 18, 36], "fired": []} | changes


# This config differs from config() after step 27, where the decay of config() begins.
LATER = config(decay_frac=0.2).model_dump(mode="json")


@pytest.mark.parametrize(
    ("step", "target", "changes", "meets"),
    [
        pytest.param(0, 18, {}, 18, id="the same node"),
        pytest.param(18, 18, {}, None, id="a node that this run has reached"),
        pytest.param(17, 18, {"scores": []}, 18, id="no score is needed before it"),
        pytest.param(0, 18, {"scores": []}, None, id="the score after step 1 is missing"),
        pytest.param(0, 27, {"scores": [1]}, None, id="one of two scores is missing"),
        pytest.param(0, 27, {"scores": [1, 18]}, 27, id="both scores"),
        pytest.param(0, 18, {"scores": "1"}, None, id="scores that are not a list"),
        pytest.param(0, 18, {"geometry": [1, 1]}, None, id="scores of another geometry"),
        pytest.param(0, 18, {"config": {"ngram": 3}}, None, id="scores of a mixture"),
        pytest.param(
            17,
            18,
            {"geometry": [1, 1], "scores": None},
            18,
            id="another geometry without a score",
        ),
    ],
)
def test_a_run_waits_for_another_one_that_trains_its_steps_and_scores(
    step: int, target: int, changes: dict[str, Any], meets: int | None
) -> None:
    run = RunWithStore()
    run.sharing.holder.leases = FakeLeases({run.keys[target]: other_lease(run, target, **changes)})
    other = run.sharing._other_run(step)
    assert (other and other.meets) == meets
    if other:
        assert (other.key, other.run) == (run.keys[target], "other")


@pytest.mark.parametrize(
    ("step", "logged", "meets"),
    [(0, 5, 18), (0, 9, 18), (0, 4, None), (4, 4, None), (5, 0, 18), (0, None, None), (0, "9", None)],
)
def test_a_run_waits_only_for_a_run_that_logs_the_gradient_norms_it_needs(
    step: int, logged: Any, meets: int | None
) -> None:
    run = RunWithStore(grad_norm_steps=5)
    held = other_lease(run, 18, config=run.cfg.model_dump(mode="json") | {"grad_norm_steps": logged})
    run.sharing.holder.leases = FakeLeases({run.keys[18]: held})
    other = run.sharing._other_run(step)
    assert (other and other.meets) == meets
    run.sharing.holder.leases = FakeLeases({run.keys[18]: held | {"config": "x"}})
    assert (run.sharing._other_run(step) is None) == (step < 5)


@pytest.mark.parametrize(
    ("at", "meets"), [(0, 27), (26, 27), (27, None), (30, None), ("0", None), (None, None)]
)
def test_a_run_waits_for_another_one_up_to_the_fork(at: Any, meets: int | None) -> None:
    run = RunWithStore()
    other_keys = lineage.chain(run.keys[0], Plan(from_dict(LATER), TOKENS))
    assert other_keys[27] == run.keys[27] and other_keys[28] != run.keys[28]
    run.sharing.holder.leases = FakeLeases({other_keys[36]: other_lease(run, 36, config=LATER, at=at)})
    other = run.sharing._other_run(18)
    assert (other and other.meets) == meets


def test_a_run_at_step_0_does_not_wait_for_a_run_past_the_fork() -> None:
    run = RunWithStore()
    other_keys = lineage.chain(run.keys[0], Plan(from_dict(LATER), TOKENS))
    run.sharing.holder.leases = FakeLeases({other_keys[36]: other_lease(run, 36, config=LATER, at=30)})
    assert run.sharing._other_run(0) is None


@pytest.mark.parametrize(
    ("changes", "fork"),
    [
        ({}, 27),
        ({"root": "0" * 64}, 0),
        ({"step": 35}, 0),
        ({"step": 99}, 0),
        ({"step": "x"}, 0),
        ({"config": {"lr": -1}}, 0),
        ({"config": 5}, 0),
        ({"fired": 5}, 0),
    ],
)
def test_only_a_consistent_lease_has_a_fork(changes: dict[str, Any], fork: int) -> None:
    run = RunWithStore()
    other_keys = lineage.chain(run.keys[0], Plan(from_dict(LATER), TOKENS))
    content = other_lease(run, 36, config=LATER) | changes
    assert run.sharing.holder.fork(other_keys[36], content) == fork
    # The previous call has cached the fork.
    assert run.sharing.holder.fork(other_keys[36], {"run": "other"}) == fork
    assert run.sharing.holder.fork(other_keys[27], {"run": "other"}) == 0, "the cache is per lease"
    assert run.sharing.holder.fork(other_keys[36], {"run": "third"}) == 0, "and per run"


def test_a_fork_is_computed_again_when_the_plan_changes() -> None:
    run, other = RunWithStore(), Plan(from_dict(LATER), TOKENS)
    other_keys = lineage.chain(run.keys[0], other)
    content = other_lease(run, 36, config=LATER)
    assert run.sharing.holder.fork(other_keys[36], content) == 27
    run.sharing.follow(run.plan)
    run.sharing.course.keys = other_keys
    assert run.sharing.holder.fork(other_keys[36], content) == 37


@pytest.mark.parametrize(
    "error",
    [
        MainrunError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
        AssertionError,
    ],
)
def test_a_lease_that_raises_an_error_has_no_fork(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    run = RunWithStore()

    def fail(*_: object) -> None:
        raise error("odd")

    monkeypatch.setattr(lineage, "chain", fail)
    assert run.sharing.holder.fork("f" * 64, other_lease(run, 36)) == 0


def test_a_fork_is_within_this_run_and_needs_one_process() -> None:
    assert (
        RunWithStore(until=20).sharing.holder.fork(RunWithStore().keys[36], other_lease(RunWithStore(), 36))
        == 20
    )
    assert (
        RunWithStore(world=2).sharing.holder.fork(RunWithStore().keys[36], other_lease(RunWithStore(), 36))
        == 0
    )


def test_a_run_waits_for_the_furthest_lease_except_its_own() -> None:
    run = RunWithStore()
    held = {run.keys[step]: other_lease(run, step, run=f"run {step}") for step in (18, 36, 27)}
    run.sharing.holder.leases = FakeLeases(held)
    furthest = run.sharing._other_run(0)
    assert furthest is not None and furthest.run == "run 36"
    run.sharing.holder.lease = lease(run.keys[36], {})
    next_one = run.sharing._other_run(0)
    assert next_one is not None and next_one.run == "run 27"
    run.sharing.reads = False
    assert run.sharing._other_run(0) is None


@pytest.mark.parametrize(
    ("fork", "key", "wanted"),
    [(27, 36, True), (0, 36, False), (36, 36, False)],
    ids=["a fork", "unknown", "the leased node"],
)
def test_a_fork_is_requested_once_unless_the_lease_is_on_it(fork: int, key: int, wanted: bool) -> None:
    run = RunWithStore()
    run.sharing.holder.want(OtherRun(27, fork, run.keys[key], "other"))
    assert run.store.wanted == ({run.keys[fork]} if wanted else set())
    run.store.wanted.clear()
    run.sharing.holder.want(OtherRun(27, fork, run.keys[key], "other"))
    assert run.store.wanted == set()


# -- which node is reused


def usable_steps(run: RunWithStore, step: int = 0) -> list[int]:
    return [node.step for node, _ in run.sharing.reader.usable(step)]


def test_usable_nodes_are_ordered_from_the_latest_step() -> None:
    run = RunWithStore()
    run.add(run.node(18), run.node(27, 18), run.node(36, 27))
    assert usable_steps(run) == [36, 27, 18]
    assert usable_steps(run, 18) == [36, 27]
    (_, past), *_ = run.sharing.reader.usable(0)
    assert [node.step for node in past] == [18, 27, 36]


def test_an_evicted_state_is_skipped_without_a_note() -> None:
    run = RunWithStore()
    run.add(run.node(18), run.node(27, 18))
    run.store.evicted = {"state 27"}
    assert usable_steps(run) == [18] and run.notes == []


@pytest.mark.parametrize("damage", ["misplaced", "torn"])
def test_a_damaged_node_is_reported_once_and_skipped(damage: str) -> None:
    run = RunWithStore()
    run.add(run.node(18), run.node(27, 18))
    run.store.nodes[run.keys[27]] = (
        replace(run.node(27), step=26) if damage == "misplaced" else Damaged("it is torn")
    )
    assert usable_steps(run) == [18]
    assert usable_steps(run) == [18]
    (note,) = run.notes
    assert (
        "step 27" in note
        and run.keys[27][:12] in note
        and ("step 26" if damage == "misplaced" else "it is torn") in note
    )


def test_a_node_without_a_needed_score_is_not_reused_and_the_step_is_kept() -> None:
    run = RunWithStore(eval_per_epoch=4)
    assert 9 in run.plan.eval_steps
    without = tuple(row for row in run.rows(0, 18) if (row["event"], row["step"]) != ("eval", 9))
    run.add(run.node(18, rows=without))
    run.sharing.course.stops -= {9}
    assert not run.sharing._reuse(FakeState(), run.growth, None) and 9 in run.sharing.course.stops
    several = RunWithStore(eval_per_epoch=4, world=2)
    several.add(several.node(18, rows=without))
    several.sharing.course.stops -= {9}
    assert not several.sharing._reuse(FakeState(), several.growth, None)
    assert 9 not in several.sharing.course.stops and not several.sharing.reader.extra_stops


def test_a_node_without_needed_gradient_norms_is_reused_only_after_their_steps() -> None:
    run = RunWithStore(grad_norm_steps=3)
    assert 3 in run.sharing.course.stops
    run.add(run.node(18))
    assert usable_steps(run) == []
    assert [node.step for node, _ in run.sharing.reader.usable(2)] == []
    assert [node.step for node, _ in run.sharing.reader.usable(3)] == [18]
    logged = [
        row | {"grad_norms": {"head": 1.0}} if row["event"] == "step" else row for row in run.rows(0, 18)
    ]
    run.store.nodes.clear()
    run.add(run.node(18, rows=tuple(logged)))
    assert usable_steps(run) == [18]
    copied = list(run.sharing.reader.rows_for_run([run.node(18, rows=tuple(logged))], 0))
    assert [row["step"] for row in copied if "grad_norms" in row] == [1, 2, 3], "as this run would log them"
    assert [row["step"] for row in copied if row["event"] == "step"] == list(range(1, 19))
    assert 0 not in RunWithStore().sharing.course.stops


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        pytest.param({"event": "step", "step": 4}, True, id="a logged step"),
        pytest.param({"event": "step", "step": 5}, False, id="a step between logged ones"),
        pytest.param({"event": "step", "step": 37}, True, id="the last step"),
        pytest.param({"event": "step", "step": 2}, False, id="an earlier step"),
        pytest.param({"event": "eval", "step": 18, "split": "val"}, True, id="a score of this run"),
        pytest.param(
            {"event": "eval", "step": 17, "split": "val"}, False, id="a score that this run does not need"
        ),
        pytest.param({"event": "eval", "step": 1, "split": "val"}, False, id="an earlier score"),
        pytest.param({"event": "op", "op": "0-set_lr", "step": 2}, True, id="an op at the first state"),
        pytest.param({"event": "op", "op": "0-set_lr", "step": 1}, False, id="an earlier op"),
    ],
)
def test_rows_are_filtered_as_this_run_would_log_them(row: dict[str, Any], shown: bool) -> None:
    run = RunWithStore(log_every=4)
    node = SimpleNamespace(rows=[row], geometry=GEOMETRY, config={})
    assert list(run.sharing.reader.rows_for_run([node], 2)) == ([row] if shown else [])


def test_a_score_is_logged_once_per_split_and_only_if_it_is_computed_alike() -> None:
    run = RunWithStore()
    val, dev = ({"event": "eval", "step": 18, "split": split} for split in ("val", "dev"))
    foreign, again = val | {"full": 1.0}, val | {"full": 2.0}
    nodes = [
        SimpleNamespace(rows=[foreign], geometry=[1, 1], config={}),
        SimpleNamespace(rows=[foreign], geometry=GEOMETRY, config={"ngram": 3, "ngram_weight": 0.3}),
        SimpleNamespace(rows=[val, dev], geometry=GEOMETRY, config={}),
    ]
    nodes.append(SimpleNamespace(rows=[again], geometry=GEOMETRY, config={}))
    assert list(run.sharing.reader.rows_for_run(nodes, 0)) == [val, dev]


def test_rows_before_the_start_are_skipped() -> None:
    run = RunWithStore(log_every=4)
    rows = [
        {"event": "op", "op": "0-set_lr", "step": 1},
        *({"event": "step", "step": step} for step in (3, 4, 5, 8)),
    ]
    assert [
        row["step"]
        for row in run.sharing.reader.rows_for_run([SimpleNamespace(rows=rows, geometry=GEOMETRY)], 3)
    ] == [4, 8]


# -- reusing a node


def test_reused_steps_are_counted_and_their_rows_are_marked() -> None:
    run, state, metrics = RunWithStore(), FakeState(), FakeLog()
    run.growth.figures = lambda step: {"params": step}
    foreign = [row | {"flops": 5} if row["event"] == "eval" else row for row in run.rows(0, 18)]
    run.add(run.node(18, rows=tuple(foreign)), run.node(27, 18, run="other-2"))
    assert run.sharing._reuse(state, run.growth, metrics)
    assert state.loads == [(27, 27 * 128)]
    assert run.accounts.ledger == {"reused": 27, "reused_tokens": 27 * 128, "wasted": 0}
    assert [row["step"] for row in metrics if row["event"] == "step"] == list(range(1, 28))
    assert all(row["reused"] for row in metrics)
    assert [row["params"] for row in metrics if row["event"] == "eval"] == [1, 18]
    assert not any("flops" in row for row in metrics), "this run computes the figures of the model itself"
    assert (run.sharing.writer.before, run.sharing.writer.rows, run.sharing.writer._pending) == (
        (27, run.keys[27]),
        [],
        None,
    )
    assert not run.sharing.unscored
    assert run.notes == ["steps 1 to 27 of 37 are reused from the store (trained by other-1, other-2)"]


def test_the_note_names_at_most_three_runs() -> None:
    run = RunWithStore()
    run.add(
        *(run.node(step, before, run=f"r{step}") for step, before in ((18, 0), (27, 18), (36, 27), (37, 36)))
    )
    run.sharing._reuse(FakeState(), run.growth, None)
    assert "(trained by r18, r27, r36, ...)" in run.notes[0]


def test_the_note_names_all_of_three_runs() -> None:
    run = RunWithStore()
    run.add(*(run.node(step, before, run=f"r{step}") for step, before in ((18, 0), (27, 18), (36, 27))))
    run.sharing._reuse(FakeState(), run.growth, None)
    assert "(trained by r18, r27, r36)" in run.notes[0]


@pytest.mark.parametrize(
    ("event", "step", "logged", "shown"),
    [
        ("OPERATION_LOOKBACK", 15, True, False),
        ("OPERATION_LOOKBACK", 15, False, True),
        ("OPERATION_LOOKBACK", 16, False, True),
        ("OPERATION_RECOMPILE", 15, True, False),
        ("OPERATION_START", 15, False, True),
        ("OPERATION_START", 15, True, False),
        ("OPERATION_SUCCESS", 15, False, True),
        ("OPERATION_START", 14, False, False),
        ("step", 15, False, False),
        ("step", 16, False, True),
    ],
)
def test_a_run_at_step_15_logs_the_rows_that_it_lacks(
    event: str, step: int, logged: bool, shown: bool
) -> None:
    """If a run stopped right after a growth op, the journal already has the row of the op.

    The row must not be written again.
    """
    run, journal = RunWithStore(), FakeLog()
    row = {"event": event, "op": "0-set_lr", "step": step}
    run.add(run.node(18, rows=(row, *run.rows(16, 18))))
    run.growth.journal = journal
    if logged:
        journal.append(row)
    metrics = FakeLog()
    assert run.sharing._reuse(FakeState(15), run.growth, metrics)
    new_rows = metrics if event == "step" else journal[logged:]
    assert (row | {"reused": True} in new_rows) == shown


def test_lost_steps_that_are_recovered_are_not_wasted() -> None:
    run, state, metrics, calls = RunWithStore(), FakeState(10), FakeLog(), []
    run.sharing.begin({11, 12, 40}, lambda: calls.append(1))
    run.accounts.ledger["wasted"] = 5
    run.add(run.node(18))
    assert run.sharing._reuse(state, run.growth, metrics)
    assert run.accounts.ledger == {"reused": 6, "reused_tokens": 6 * 128, "wasted": 3}
    assert calls == [1]
    assert [row["step"] for row in metrics if row["event"] == "step" and not row.get("reused")] == [11, 12]


def test_the_callback_is_not_called_without_lost_steps() -> None:
    run, calls = RunWithStore(), []
    run.sharing.begin(set(), lambda: calls.append(1))
    run.add(run.node(18))
    run.sharing._reuse(FakeState(), run.growth, None)
    assert calls == []


def test_rows_of_ops_are_written_to_the_journal() -> None:
    run, metrics, journal = RunWithStore(), FakeLog(), FakeLog()
    run.growth.journal = journal
    op = {"event": "op", "op": "0-set_lr", "step": 5}
    run.add(run.node(18, rows=(*run.rows(0, 18), op)))
    run.sharing._reuse(FakeState(), run.growth, metrics)
    assert journal == [op | {"reused": True}] and op not in metrics


def test_a_reused_state_without_its_score_is_unscored() -> None:
    run, state = RunWithStore(), FakeState()
    run.add(run.node(18, rows=run.rows(0, 18)[:-1]))
    assert run.sharing._reuse(state, run.growth, None) and run.sharing.unscored


def test_a_damaged_state_is_reported_and_the_previous_node_is_reused() -> None:
    run, state = RunWithStore(), FakeState()
    run.add(run.node(18), run.node(27, 18, state="damaged"))
    assert run.sharing._reuse(state, run.growth, None) and state.step == 18
    assert "its state is torn" in run.notes[0]
    assert not RunWithStore().sharing._reuse(FakeState(), run.growth, None)


# -- reusing or training


STOP = SimpleNamespace(name="")


def test_a_run_reuses_existing_nodes_and_leases_the_next_one() -> None:
    run, state = RunWithStore(), FakeState()
    run.add(run.node(18))
    assert run.sharing.advance(state, run.growth, None, STOP) is False
    assert state.step == 18 and run.accounts.spent.keys() == {"store"}
    assert run.sharing.holder.lease is not None and run.sharing.holder.lease.key == run.keys[27]


def test_a_fresh_run_reuses_nothing_and_acquires_a_lease() -> None:
    run, state = RunWithStore(fresh=True), FakeState()
    run.add(run.node(18))
    assert run.sharing.advance(state, run.growth, None, STOP) is False
    assert (
        state.step == 0
        and run.sharing.holder.lease is not None
        and run.sharing.holder.lease.key == run.keys[18]
    )


def test_a_run_that_does_not_write_acquires_no_lease() -> None:
    run = RunWithStore()
    run.sharing.writer.on = False
    run.sharing.advance(FakeState(), run.growth, None, STOP)
    assert run.sharing.holder.lease is None


def test_a_run_that_is_done_or_stopping_reuses_nothing() -> None:
    for step, reason in ((37, ""), (0, "SIGTERM")):
        run = RunWithStore()
        run.add(run.node(18))
        state = FakeState(step)
        run.sharing.advance(state, run.growth, None, SimpleNamespace(name=reason))
        assert state.step == step and run.sharing.holder.lease is None


def test_reusing_the_leased_node_frees_the_lease() -> None:
    run, state = RunWithStore(), FakeState(3)
    held = run.sharing.holder.lease = lease(run.keys[18], {"step": 18})
    run.add(run.node(18))
    run.sharing.advance(state, run.growth, None, STOP)
    assert held.released == [True]
    assert run.sharing.holder.lease is not None and run.sharing.holder.lease.key == run.keys[27]


def test_a_lease_on_a_later_node_is_kept() -> None:
    run, state = RunWithStore(), FakeState(3)
    held = run.sharing.holder.lease = lease(run.keys[27], {"step": 27})
    run.add(run.node(18))
    run.sharing.advance(state, run.growth, None, STOP)
    assert state.step == 18 and held.released == [] and run.sharing.holder.lease is held


def test_a_missing_score_comes_before_the_lease() -> None:
    run, state = RunWithStore(), FakeState()
    run.add(run.node(18, rows=run.rows(0, 18)[:-1]))
    assert run.sharing.advance(state, run.growth, None, STOP) is True
    assert run.sharing.holder.lease is None


def test_the_leader_waits_and_reports_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, state, waits = RunWithStore(), FakeState(), []
    others = FakeLeases({run.keys[18]: other_lease(run, 18, run="slow-1")})
    run.sharing.holder.leases = others

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            others.held = {}
            run.add(run.node(18))

    monkeypatch.setattr(sharing.time, "sleep", sleep)
    run.sharing.advance(state, run.growth, None, STOP)
    assert state.step == 18 and len(waits) == 3 and all(0.05 <= wait <= 0.15 for wait in waits)
    assert [note for note in run.notes if "waiting" in note] == [
        "waiting for slow-1, which trains the shared steps up to step 18"
    ]


def test_a_waiting_run_requests_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunWithStore()
    other_keys = lineage.chain(run.keys[0], Plan(from_dict(LATER), TOKENS))
    others = FakeLeases({other_keys[36]: other_lease(run, 36, config=LATER)})
    run.sharing.holder.leases = others
    monkeypatch.setattr(sharing.time, "sleep", lambda seconds: others.held.clear())
    run.sharing.advance(FakeState(18), run.growth, None, STOP)
    assert run.store.wanted == {run.keys[27]}


def test_two_runs_that_acquire_a_lease_at_once_release_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run, waits = RunWithStore(), []
    acquired: list[SimpleNamespace] = []
    others = FakeLeases()

    def acquire(key: str, beat: Any, **content: Any) -> SimpleNamespace:
        acquired.append(lease(key, content))
        others.held = {run.keys[27]: other_lease(run, 27)} if len(acquired) == 1 else {}
        return acquired[-1]

    others.acquire = acquire
    run.sharing.holder.leases = others

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        others.held = {}

    monkeypatch.setattr(sharing.time, "sleep", sleep)
    run.sharing.advance(FakeState(), run.growth, None, STOP)
    assert [one.released for one in acquired] == [[True], []] and len(waits) == 1


def test_a_failing_store_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = RunWithStore(), FakeState()

    def fail() -> set[str]:
        raise OSError(errno.EIO, "broken")

    held = run.sharing.holder.lease = lease(run.keys[18], {"step": 18})
    monkeypatch.setattr(run.store, "node_keys", fail)
    run.sharing.advance(state, run.growth, None, STOP)
    assert not run.sharing.writer.on and run.sharing.holder.lease is None and held.released == [True]
    assert run.notes == ["the store STORE cannot be used (broken); no more steps are saved in it"]


def test_a_follower_loads_the_node_that_the_leader_reuses() -> None:
    run, state = RunWithStore(world=2, leads=False), FakeState()
    run.add(run.node(18))
    run.machine.broadcast = lambda step, unscored: (18, 1)
    assert run.sharing.advance(state, run.growth, None, STOP) is True
    assert state.loads == [(18, 18 * 128)] and run.sharing.unscored is True
    assert run.store.rows_read == 0, "only the leader logs rows"


# -- publishing nodes


def publish(run: RunWithStore, step: int, leads: bool = True) -> Node | None:
    run.sharing.device.leads = leads
    state = FakeState(step)
    state.growth_state = {"cfg": step}
    run.sharing.publish(state)
    assert not run.store.saved or run.accounts.spent.keys() <= {"store"}
    if run.sharing.writer._writing:
        run.sharing.writer._writing.result()
    return run.store.saved[-1] if run.store.saved else None


def test_a_node_contains_the_state_and_the_rows_since_the_previous_node() -> None:
    run = RunWithStore()
    run.sharing.writer.rows = list(run.rows(0, 18))
    held = run.sharing.holder.lease = lease(run.keys[18], {"step": 18})
    node = publish(run, 18)
    assert node is not None and (node.key, node.parent, node.root) == (
        run.keys[18],
        run.keys[0],
        run.keys[0],
    )
    assert (node.step, node.begins, node.tokens_processed, node.rows) == (18, 0, 18 * 128, run.rows(0, 18))
    assert (node.run, node.geometry, node.config) == (
        run.cfg.run_id,
        GEOMETRY,
        run.cfg.model_dump(mode="json"),
    )
    assert node.seconds >= 0 and node.made > 1e9 and (node.state, node.size, node.rows_sha256) == ("", 0, "")
    assert node.growth_state == {"cfg": 18}
    assert run.store.began == [(run.keys[0], run.sharing.course.begun)] and run.store.kept == [{run.keys[18]}]
    assert run.sharing.holder.lease is None and held.released == [False] and run.sharing.holder.written == 18
    assert (run.sharing.writer.before, run.sharing.writer.rows) == ((18, run.keys[18]), [])


@pytest.mark.parametrize(("step", "leads"), [(17, True), (18, False), (0, True)])
def test_no_node_is_published_at_other_steps_or_by_followers(step: int, leads: bool) -> None:
    assert publish(RunWithStore(), step, leads) is None


def test_a_node_is_published_once() -> None:
    run = RunWithStore()
    run.sharing.writer.before = (18, run.keys[18])
    assert publish(run, 18) is None
    run.sharing.holder.due = [20]
    node = publish(run, 20)
    assert node is None or node.step == 20


def test_a_node_without_its_parent_stops_writing() -> None:
    run = RunWithStore()
    run.sharing.writer.before = (18, run.keys[18])
    run.sharing.holder.due = [20]
    publish(run, 20)
    assert (
        not run.sharing.writer.on
        and run.store.saved == []
        and "the log rows up to step 18 are no longer in the store" in run.notes[0]
    )


def test_publishing_an_earlier_node_keeps_the_lease() -> None:
    run = RunWithStore()
    held = run.sharing.holder.lease = lease(run.keys[27], {"step": 27})
    publish(run, 18)
    assert run.sharing.holder.lease is held and held.released == []


@pytest.mark.parametrize(
    ("fault", "words", "writes"),
    [
        (Fenced("taken over"), "step 18 is not saved in the store: taken over", True),
        (Refused("other bits"), "step 18 and later steps are not saved in the store: other bits", False),
        (
            OSError(errno.ENOSPC, "full"),
            "no space left in the store STORE; no more steps are saved in it",
            False,
        ),
        (
            OSError(errno.EIO, "broken"),
            "the store STORE cannot be written ([Errno 5] broken); no more steps are saved in it",
            False,
        ),
        (
            RuntimeError("odd"),
            "the store STORE cannot be written (RuntimeError('odd')); no more steps are saved in it",
            False,
        ),
    ],
)
def test_a_write_error_is_reported_and_the_lease_is_freed(fault: Exception, words: str, writes: bool) -> None:
    run = RunWithStore()
    run.store.fault = fault
    held = run.sharing.holder.lease = lease(run.keys[18], {"step": 18})
    publish(run, 18)
    assert run.notes == [words] and run.sharing.writer.on is writes
    assert held.released == [False] and run.sharing.holder.written == 18 and run.store.saved == []


def test_a_run_that_does_not_write_frees_its_lease() -> None:
    run = RunWithStore()
    run.sharing.writer.on = False
    held = run.sharing.holder.lease = lease(run.keys[18], {"step": 18})
    assert publish(run, 18) is None and held.released == [True]


@pytest.mark.parametrize(
    ("fault", "released"), [(None, []), (Fenced("taken over"), []), (OSError(errno.EIO, "broken"), [False])]
)
def test_a_later_lease_is_freed_when_writing_stops(fault: Exception | None, released: list[bool]) -> None:
    run = RunWithStore()
    run.store.fault = fault
    held = run.sharing.holder.lease = lease(run.keys[27], {"step": 27})
    publish(run, 18)
    assert held.released == released


def test_the_next_node_contains_only_its_own_rows() -> None:
    run = RunWithStore()
    publish(run, 18)
    run.sharing.writer.rows = list(run.rows(18, 27))
    node = publish(run, 27)
    assert node is not None and (node.begins, node.parent, node.rows) == (
        18,
        run.keys[18],
        run.rows(18, 27),
    )


def test_a_checkpoint_does_not_wait_for_a_node() -> None:
    run = RunWithStore()
    run.sharing.writer.rows = list(run.rows(0, 18))
    publish(run, 18)
    run.sharing.writer.rows = [{"step": 19}]
    run.sharing.writer._writing = SimpleNamespace(
        done=lambda: False, result=lambda: pytest.fail("the checkpoint waits")
    )
    meta = run.sharing.checkpoint_meta(19)
    assert meta == {
        "key": run.keys[19],
        "before": [0, run.keys[0]],
        "rows": [*run.rows(0, 18), {"step": 19}],
    }


def test_rows_are_kept_in_their_order() -> None:
    run = RunWithStore()
    for step in (1, 2):
        run.sharing.add_row({"step": step})
    assert run.sharing.writer.rows == [{"step": 1}, {"step": 2}]


def test_closing_waits_for_the_last_node() -> None:
    run, gate = RunWithStore(), threading.Event()
    save = run.store.save

    def late(*arguments: Any) -> None:
        gate.wait(60)
        save(*arguments)

    run.store.save = late  # type: ignore[method-assign]
    run.sharing.publish(FakeState(18))
    threading.Timer(0.2, gate.set).start()
    run.sharing.close()
    assert [node.step for node in run.store.saved] == [18]


def test_the_seconds_of_a_node_exclude_the_time_in_the_store() -> None:
    run = RunWithStore()
    run.sharing.writer.since = before = time.perf_counter() - 1000
    run.sharing.advance(FakeState(), run.growth, None, STOP)
    assert run.sharing.writer.since > before + 999


def test_reused_tokens_follow_the_batch_size_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mainrun.growth.state.rebuild_model", lambda *_: None)
    larger = {"name": "set_batch_size", "value": 16, "trigger": {"step": 9}}
    run, state = RunWithStore(growth={"version": 2, "ops": [larger]}), FakeState(5)
    stop = min(step for step in run.sharing.course.stops if step > 9)
    assert run.plan.tokens(stop) != stop * run.plan.tokens(1)
    run.add(run.node(9), run.node(stop, begins=9))
    assert run.sharing._reuse(state, run.growth, None)
    assert state.step == stop and run.accounts.ledger["reused_tokens"] == run.plan.tokens(
        stop
    ) - run.plan.tokens(5)


def test_rows_of_a_failed_node_are_in_the_next_node() -> None:
    run = RunWithStore()
    run.sharing.writer.rows = list(run.rows(0, 18))
    run.store.fault = Fenced("taken over")
    publish(run, 18)
    run.store.fault = None
    run.sharing.writer.rows = list(run.rows(18, 27))
    node = publish(run, 27)
    assert (
        node is not None and (node.begins, node.parent) == (0, run.keys[0]) and node.rows == run.rows(0, 27)
    )


# -- checkpoints


def test_a_checkpoint_restores_the_rows_since_the_last_node() -> None:
    run, other = RunWithStore(), RunWithStore()
    run.sharing.writer.before, run.sharing.writer.rows = (18, run.keys[18]), [{"step": 19}]
    meta = run.sharing.checkpoint_meta(19)
    assert meta == {"key": run.keys[19], "before": [18, run.keys[18]], "rows": [{"step": 19}]}
    other.sharing.restore(meta, 19)
    assert (
        other.sharing.writer.before,
        other.sharing.writer.rows,
        other.sharing.writer.on,
        other.sharing.reads,
    ) == (
        (18, run.keys[18]),
        [{"step": 19}],
        True,
        True,
    )
    run.sharing.writer.on = False
    assert run.sharing.checkpoint_meta(19) is None


@pytest.mark.parametrize(
    ("meta", "reads", "words"),
    [
        (None, True, "trained without a store"),
        ({"key": "0" * 64, "before": [0, ""], "rows": []}, False, "trained in a different environment"),
    ],
)
def test_steps_from_elsewhere_are_never_stored(meta: dict[str, Any] | None, reads: bool, words: str) -> None:
    run = RunWithStore()
    run.sharing.restore(meta, 19)
    assert (run.sharing.reads, run.sharing.writer.on) == (reads, False)
    assert words in run.notes[0] and "up to 19" in run.notes[0]


# -- reports of other versions


def beginning(run: RunWithStore, **machine: Any) -> dict[str, Any]:
    return run.sharing.course.begun | {"machine_class": run.sharing.course.begun["machine_class"] | machine}


def test_the_nearest_other_version_is_reported() -> None:
    run = RunWithStore()
    run.store.beginnings = [("a", beginning(run, cpu="y", isa="z")), ("b", beginning(run, cpu="y")), ("c", 5)]
    run.sharing.report_other_versions()
    (note,) = run.notes
    assert "machine_class cpu: y there, x here" in note and "isa" not in note


def test_of_equally_near_versions_the_first_is_reported() -> None:
    run = RunWithStore()
    run.store.beginnings = [("a", beginning(run, cpu="y")), ("b", beginning(run, cpu="z"))]
    run.sharing.report_other_versions()
    assert "machine_class cpu: y there" in run.notes[0]


def test_at_most_four_differences_are_reported() -> None:
    run = RunWithStore()
    run.store.beginnings = [("a", beginning(run, **{f"k{i}": i for i in range(6)}))]
    run.sharing.report_other_versions()
    assert run.notes[0].count("machine_class k") == 4


@pytest.mark.parametrize("change", ["fields", "data"])
def test_another_config_or_data_is_not_another_version(change: str) -> None:
    run = RunWithStore()
    run.store.beginnings = [("a", beginning(run, cpu="y") | {change: {}})]
    run.sharing.report_other_versions()
    assert run.notes == []


def test_nothing_is_reported_if_the_same_version_is_stored() -> None:
    run = RunWithStore()
    run.store.beginnings = [
        ("a", beginning(run, cpu="y")),
        (lineage.root(run.sharing.course.begun), run.sharing.course.begun),
    ]
    run.sharing.report_other_versions()
    assert run.notes == []


def test_a_read_error_while_comparing_versions_is_reported() -> None:
    run = RunWithStore()
    run.store.fault = OSError(errno.EIO, "broken")
    run.sharing.report_other_versions()
    assert run.notes == ["the store STORE cannot be searched for other versions of this run (broken)"]
