"""What a run takes from the store and leaves there, decision by decision: no training, and a store of
hand-made nodes.
"""

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

# 37 steps: scores after 1, 18, 36 and 37, and the decay begins after 27
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


class Leases:
    """Those of other runs, and what this run acquires."""

    def __init__(self, held: dict[str, dict[str, Any]] | None = None) -> None:
        self.held = held or {}

    def active(self) -> dict[str, dict[str, Any]]:
        return self.held

    def acquire(self, key: str, beat: Any, **about: Any) -> SimpleNamespace:
        return lease(key, about)


def lease(key: str, about: dict[str, Any]) -> SimpleNamespace:
    released: list[bool] = []

    def release(unfinished: bool = False) -> None:
        released.append(unfinished)

    return SimpleNamespace(key=key, info=about, release=release, released=released, check=lambda: None)


class Store:
    """Nodes by their key; remembers what was asked of it."""

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

    def begin(self, root: str, begun: dict[str, Any]) -> None:
        self.began.append((root, begun))

    def save(self, node: Node, tensors: dict[str, Any], check: Any) -> None:
        check()
        if self.fault:
            raise self.fault
        self.saved.append(node)
        self.nodes[node.key] = node

    def evict(self, keep: set[str]) -> None:
        self.kept.append(keep)


class State:
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


class Journal(list[dict[str, Any]]):
    """A log of rows, which is a log while it is empty, too."""

    def rows(self) -> list[dict[str, Any]]:
        return self

    def __bool__(self) -> bool:
        return True


class House:
    """A run's view of a store, and what it said."""

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
        self.store, self.notes = Store(), []
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
        self.sharing.holder.leases = Leases()
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
        """All the rows that a run with this plan writes after `begins` up to `end`."""
        rows = []
        for step in range(begins + 1, end + 1):
            rows.append({"event": "step", "step": step, "loss": 1.0})
            if step in self.plan.eval_steps:
                rows.append({"event": "eval", "step": step, "split": "val", "full": 2.0})
        return tuple(rows)


def test_the_geometry_of_these_tests_is_that_of_the_config() -> None:
    house = House()
    assert house.sharing.course.geometry == GEOMETRY == list(house.cfg.geometry)
    assert house.plan.steps == 37 and house.plan.eval_steps == {1, 18, 36, 37} and house.plan.breaks == [27]


# -- where nodes are kept


@pytest.mark.parametrize(
    ("until", "keep", "stops"),
    [
        (0, (), {18, 27, 36, 37}),  # scores, the decay, the end; not the score after step 1
        (20, (), {18, 20}),
        (99, (), {18, 27, 36, 37}),
        (0, (5, 30, 38, 0), {5, 18, 27, 30, 36, 37}),
        (0, (1,), {1, 18, 27, 36, 37}),
    ],
)
def test_nodes_are_kept_at_scores_breaks_forks_and_the_end(
    until: int, keep: tuple[int, ...], stops: set[int]
) -> None:
    house = House(until, keep)
    assert house.sharing.course.stops == stops
    assert house.sharing.course.until == min(until or 37, 37)


def test_a_run_goes_to_its_end_unless_it_is_asked_to_stop_before() -> None:
    house = House()
    fresh = Sharing(
        house.store,
        house.cfg,
        house.plan,
        house.machine,
        {"corpus": "c"},
        "t",
        house.notes.append,
        Accounts(),
    )
    assert (fresh.course.until, fresh.course.stops) == (37, {18, 27, 36, 37})
    assert fresh.reads and fresh.writer.on


@pytest.mark.parametrize(("step", "kept"), [(17, False), (18, True), (19, False), (20, True), (37, True)])
def test_a_step_is_kept_where_this_run_or_another_wants_it(step: int, kept: bool) -> None:
    house = House()
    house.sharing.holder.wanted = frozenset({20})
    assert house.sharing.keeps(step) is kept
    assert house.sharing.holder.due == ([step] if kept else [])
    assert house.sharing.holder.passed == step


def test_what_is_written_is_no_longer_due() -> None:
    house = House()
    house.sharing.holder.due, house.sharing.holder.written = [18, 27], 18
    house.sharing.keeps(36)
    assert house.sharing.holder.due == [27, 36]


def test_a_beat_says_how_far_all_that_is_kept_is_there() -> None:
    house = House()
    house.sharing.holder.passed, house.sharing.holder.due, house.sharing.holder.written = 30, [18, 27], 18
    assert house.sharing.holder.beat() == {"at": 26}
    house.sharing.holder.written = 27
    assert house.sharing.holder.beat() == {"at": 30}


@pytest.mark.parametrize(("world", "wanted"), [(1, {20}), (2, set())])
def test_a_beat_hears_wants_on_the_way_of_one_process(world: int, wanted: set[int]) -> None:
    house = House(world=world)
    house.store.wanted = {house.keys[20], "f" * 64}
    house.sharing.holder.beat()
    assert house.sharing.holder.wanted == wanted


def test_a_beat_outlives_a_store_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()

    def fail() -> None:
        raise OSError

    monkeypatch.setattr(house.store, "wants", fail)
    house.sharing.holder.passed = 7
    assert house.sharing.holder.beat() == {"at": 7}


@pytest.mark.parametrize(
    ("step", "target", "scores"), [(0, 18, [1]), (17, 18, []), (18, 27, []), (27, 36, []), (36, 37, [])]
)
def test_the_lease_is_on_the_next_node_and_says_what_it_leaves(
    step: int, target: int, scores: list[int]
) -> None:
    house = House()
    house.sharing.holder.acquire(step)
    held = house.sharing.holder.lease
    assert held is not None and held.key == house.keys[target] and house.sharing.holder.passed == step
    about = {
        "run": house.cfg.run_id,
        "config": house.cfg.model_dump(mode="json"),
        "root": house.keys[0],
        "step": target,
    }
    assert held.info == about | {"scores": scores, "geometry": GEOMETRY, "fired": []}


WAITS = {"ops": [{"name": "set_lr", "value": 0.001, "trigger": {"loss_below": 1.0}}]}


@pytest.mark.parametrize(
    ("growth", "step", "far"),
    [(None, 0, 37), (None, 20, 37), (WAITS, 0, 1), (WAITS, 1, 18), (WAITS, 18, 36), (WAITS, 37, 37)],
)
def test_the_plan_is_certain_up_to_a_score_that_may_fire_an_op(
    growth: dict[str, Any] | None, step: int, far: int
) -> None:
    house = House(**({"growth": growth} if growth else {}))
    assert house.sharing.course.certain_until(step) == far


def test_a_plan_that_leaves_the_lease_frees_it() -> None:
    house = House()
    on_the_way = house.sharing.holder.lease = lease(house.keys[27], {"step": 27})
    house.sharing.follow(house.plan)
    assert house.sharing.holder.lease is on_the_way and on_the_way.released == []
    house.sharing.follow(Plan(config(lr=0.02), TOKENS))
    assert house.sharing.holder.lease is None and on_the_way.released == [True]


def test_a_run_begins_with_nothing_written_and_no_score_missing() -> None:
    fresh = House().sharing
    assert (fresh.holder.written, fresh.holder.due, fresh.holder.passed) == (0, [], 0)
    assert (fresh.writer.rows, fresh.unscored) == ([], False)
    assert (fresh.writer.before, fresh.reads, fresh.writer.on) == ((0, fresh.course.keys[0]), True, True)


# -- whom a run waits for


def holder(house: House, step: int, **changes: Any) -> dict[str, Any]:
    """The lease of another run with the same config, on its way to a node."""
    about = {
        "run": "other",
        "root": house.keys[0],
        "config": house.cfg.model_dump(mode="json"),
        "step": step,
        "at": 0,
        "geometry": GEOMETRY,
    }
    return about | {"scores": [1, 18, 36], "fired": []} | changes


LATER = config(decay_frac=0.2).model_dump(mode="json")  # parts after step 27, where the first decay begins


@pytest.mark.parametrize(
    ("step", "target", "changes", "meets"),
    [
        pytest.param(0, 18, {}, 18, id="on the way to the same node"),
        pytest.param(18, 18, {}, None, id="a node that is reached is no help"),
        pytest.param(17, 18, {"scores": []}, 18, id="no score is needed in between"),
        pytest.param(0, 18, {"scores": []}, None, id="it does not leave the score after step 1"),
        pytest.param(0, 27, {"scores": [1]}, None, id="it leaves only one of two scores"),
        pytest.param(0, 27, {"scores": [1, 18]}, 27, id="it leaves both"),
        pytest.param(0, 18, {"scores": "1"}, None, id="scores that are no list"),
        pytest.param(0, 18, {"geometry": [1, 1]}, None, id="scores of another geometry"),
        pytest.param(
            17,
            18,
            {"geometry": [1, 1], "scores": None},
            18,
            id="the geometry does not matter without a score",
        ),
    ],
)
def test_another_run_is_waited_for_if_it_brings_steps_and_scores(
    step: int, target: int, changes: dict[str, Any], meets: int | None
) -> None:
    house = House()
    house.sharing.holder.leases = Leases({house.keys[target]: holder(house, target, **changes)})
    other = house.sharing._other_run(step)
    assert (other and other.meets) == meets
    if other:
        assert (other.key, other.run) == (house.keys[target], "other")


@pytest.mark.parametrize(
    ("at", "meets"), [(0, 27), (26, 27), (27, None), (30, None), ("0", None), (None, None)]
)
def test_a_run_that_leaves_the_way_is_waited_for_up_to_the_fork_if_there_is_time(
    at: Any, meets: int | None
) -> None:
    house = House()
    theirs = lineage.chain(house.keys[0], Plan(from_dict(LATER), TOKENS))
    assert theirs[27] == house.keys[27] and theirs[28] != house.keys[28]
    house.sharing.holder.leases = Leases({theirs[36]: holder(house, 36, config=LATER, at=at)})
    other = house.sharing._other_run(18)
    assert (other and other.meets) == meets


def test_a_run_that_is_past_the_fork_is_no_help_from_the_start_either() -> None:
    house = House()
    theirs = lineage.chain(house.keys[0], Plan(from_dict(LATER), TOKENS))
    house.sharing.holder.leases = Leases({theirs[36]: holder(house, 36, config=LATER, at=30)})
    assert house.sharing._other_run(0) is None


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
def test_a_fork_is_found_only_in_a_lease_that_tells_the_truth(changes: dict[str, Any], fork: int) -> None:
    house = House()
    theirs = lineage.chain(house.keys[0], Plan(from_dict(LATER), TOKENS))
    about = holder(house, 36, config=LATER) | changes
    assert house.sharing.holder.fork(theirs[36], about) == fork
    assert house.sharing.holder.fork(theirs[36], {"run": "other"}) == fork  # remembered
    assert house.sharing.holder.fork(theirs[27], {"run": "other"}) == 0, "what is remembered is of one lease"
    assert house.sharing.holder.fork(theirs[36], {"run": "third"}) == 0, "and of one holder"


def test_a_fork_is_found_again_when_the_plan_changes() -> None:
    house, other = House(), Plan(from_dict(LATER), TOKENS)
    theirs = lineage.chain(house.keys[0], other)
    about = holder(house, 36, config=LATER)
    assert house.sharing.holder.fork(theirs[36], about) == 27
    house.sharing.follow(house.plan)
    house.sharing.course.keys = theirs
    assert house.sharing.holder.fork(theirs[36], about) == 37


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
def test_a_lease_that_cannot_be_understood_has_no_fork(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    house = House()

    def fail(*_: object) -> None:
        raise error("odd")

    monkeypatch.setattr(lineage, "chain", fail)
    assert house.sharing.holder.fork("f" * 64, holder(house, 36)) == 0


def test_a_fork_lies_within_this_run_and_needs_one_process() -> None:
    assert House(until=20).sharing.holder.fork(House().keys[36], holder(House(), 36)) == 20
    assert House(world=2).sharing.holder.fork(House().keys[36], holder(House(), 36)) == 0


def test_of_several_the_furthest_is_waited_for_and_the_own_lease_does_not_count() -> None:
    house = House()
    held = {house.keys[step]: holder(house, step, run=f"run {step}") for step in (18, 36, 27)}
    house.sharing.holder.leases = Leases(held)
    furthest = house.sharing._other_run(0)
    assert furthest is not None and furthest.run == "run 36"
    house.sharing.holder.lease = lease(house.keys[36], {})
    next_one = house.sharing._other_run(0)
    assert next_one is not None and next_one.run == "run 27"
    house.sharing.reads = False
    assert house.sharing._other_run(0) is None


@pytest.mark.parametrize(
    ("fork", "key", "wanted"),
    [(27, 36, True), (0, 36, False), (36, 36, False)],
    ids=["parts on the way", "unknown", "its own node"],
)
def test_a_fork_is_wanted_once_unless_the_lease_is_on_it(fork: int, key: int, wanted: bool) -> None:
    house = House()
    house.sharing.holder.want(OtherRun(27, fork, house.keys[key], "other"))
    assert house.store.wanted == ({house.keys[fork]} if wanted else set())
    house.store.wanted.clear()
    house.sharing.holder.want(OtherRun(27, fork, house.keys[key], "other"))
    assert house.store.wanted == set()


# -- which node is taken


def usable(house: House, step: int = 0) -> list[int]:
    return [node.step for node, _ in house.sharing.reader.usable(step)]


def test_the_deepest_node_ahead_comes_first_with_the_rows_in_order() -> None:
    house = House()
    house.add(house.node(18), house.node(27, 18), house.node(36, 27))
    assert usable(house) == [36, 27, 18]
    assert usable(house, 18) == [36, 27]
    (_, past), *_ = house.sharing.reader.usable(0)
    assert [node.step for node in past] == [18, 27, 36]


def test_an_evicted_state_is_passed_over_without_a_word() -> None:
    house = House()
    house.add(house.node(18), house.node(27, 18))
    house.store.evicted = {"state 27"}
    assert usable(house) == [18] and house.notes == []


@pytest.mark.parametrize("damage", ["misplaced", "torn"])
def test_a_damaged_node_is_named_once_and_passed_over(damage: str) -> None:
    house = House()
    house.add(house.node(18), house.node(27, 18))
    house.store.nodes[house.keys[27]] = (
        replace(house.node(27), step=26) if damage == "misplaced" else Damaged("it is torn")
    )
    assert usable(house) == [18]
    assert usable(house) == [18]
    (note,) = house.notes
    assert (
        "step 27" in note
        and house.keys[27][:12] in note
        and ("step 26" if damage == "misplaced" else "it is torn") in note
    )


def test_a_node_without_a_score_that_this_run_needs_is_not_taken_and_the_score_is_kept() -> None:
    house = House(eval_per_epoch=4)
    assert 9 in house.plan.eval_steps
    without = tuple(row for row in house.rows(0, 18) if (row["event"], row["step"]) != ("eval", 9))
    house.add(house.node(18, rows=without))
    house.sharing.course.stops -= {9}
    assert not house.sharing._reuse(State(), house.growth, None) and 9 in house.sharing.course.stops
    several = House(eval_per_epoch=4, world=2)
    several.add(several.node(18, rows=without))
    several.sharing.course.stops -= {9}
    assert not several.sharing._reuse(State(), several.growth, None)
    assert 9 not in several.sharing.course.stops and not several.sharing.reader.extra_stops


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        pytest.param({"event": "step", "step": 4}, True, id="its cadence"),
        pytest.param({"event": "step", "step": 5}, False, id="another cadence"),
        pytest.param({"event": "step", "step": 37}, True, id="the last step always"),
        pytest.param({"event": "step", "step": 2}, False, id="before"),
        pytest.param({"event": "eval", "step": 18, "split": "val"}, True, id="its score"),
        pytest.param(
            {"event": "eval", "step": 17, "split": "val"}, False, id="a score that it does not take"
        ),
        pytest.param({"event": "eval", "step": 1, "split": "val"}, False, id="a score before"),
        pytest.param(
            {"event": "op", "op": "0-set_lr", "step": 2}, True, id="an op at the very state it begins from"
        ),
        pytest.param({"event": "op", "op": "0-set_lr", "step": 1}, False, id="an op before"),
    ],
)
def test_rows_are_shown_as_this_run_would_have_written_them(row: dict[str, Any], shown: bool) -> None:
    house = House(log_every=4)
    node = SimpleNamespace(rows=[row], geometry=GEOMETRY)
    assert list(house.sharing.reader.rows_for_run([node], 2)) == ([row] if shown else [])


def test_a_score_is_shown_once_for_each_split_and_only_in_this_geometry() -> None:
    house = House()
    val, dev = ({"event": "eval", "step": 18, "split": split} for split in ("val", "dev"))
    foreign, again = val | {"full": 1.0}, val | {"full": 2.0}
    nodes = [
        SimpleNamespace(rows=[foreign], geometry=[1, 1]),
        SimpleNamespace(rows=[val, dev], geometry=GEOMETRY),
    ]
    nodes.append(SimpleNamespace(rows=[again], geometry=GEOMETRY))
    assert list(house.sharing.reader.rows_for_run(nodes, 0)) == [val, dev]


def test_rows_before_the_start_do_not_hide_those_behind_them() -> None:
    house = House(log_every=4)
    rows = [
        {"event": "op", "op": "0-set_lr", "step": 1},
        *({"event": "step", "step": step} for step in (3, 4, 5, 8)),
    ]
    assert [
        row["step"]
        for row in house.sharing.reader.rows_for_run([SimpleNamespace(rows=rows, geometry=GEOMETRY)], 3)
    ] == [4, 8]


# -- what taking it does


def test_steps_that_are_taken_count_as_reused_and_their_rows_say_so() -> None:
    house, state, metrics = House(), State(), Journal()
    house.growth.figures = lambda step: {"params": step}
    foreign = [row | {"flops": 5} if row["event"] == "eval" else row for row in house.rows(0, 18)]
    house.add(house.node(18, rows=tuple(foreign)), house.node(27, 18, run="other-2"))
    assert house.sharing._reuse(state, house.growth, metrics)
    assert state.loads == [(27, 27 * 128)]
    assert house.accounts.ledger == {"reused": 27, "reused_tokens": 27 * 128, "wasted": 0}
    assert [row["step"] for row in metrics if row["event"] == "step"] == list(range(1, 28))
    assert all(row["reused"] for row in metrics)
    assert [row["params"] for row in metrics if row["event"] == "eval"] == [1, 18]
    assert not any("flops" in row for row in metrics), "figures of the model are this run's own"
    assert (house.sharing.writer.before, house.sharing.writer.rows, house.sharing.writer._pending) == (
        (27, house.keys[27]),
        [],
        None,
    )
    assert not house.sharing.unscored
    assert house.notes == ["steps 1 to 27 of 37 are reused from the store (trained by other-1, other-2)"]


def test_the_note_names_three_runs_at_most() -> None:
    house = House()
    house.add(
        *(
            house.node(step, before, run=f"r{step}")
            for step, before in ((18, 0), (27, 18), (36, 27), (37, 36))
        )
    )
    house.sharing._reuse(State(), house.growth, None)
    assert "(trained by r18, r27, r36, ...)" in house.notes[0]


def test_three_runs_are_all_there_are() -> None:
    house = House()
    house.add(*(house.node(step, before, run=f"r{step}") for step, before in ((18, 0), (27, 18), (36, 27))))
    house.sharing._reuse(State(), house.growth, None)
    assert "(trained by r18, r27, r36)" in house.notes[0]


@pytest.mark.parametrize(
    ("event", "step", "told", "shown"),
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
def test_a_run_at_step_15_takes_the_rows_that_it_has_not_written(
    event: str, step: int, told: bool, shown: bool
) -> None:
    """A run may be stopped right after an op has acted.

    Its journal says so, and the rows of the op do not come twice.
    """
    house, journal = House(), Journal()
    row = {"event": event, "op": "0-set_lr", "step": step}
    house.add(house.node(18, rows=(row, *house.rows(16, 18))))
    house.growth.journal = journal
    if told:
        journal.append(row)
    metrics = Journal()
    assert house.sharing._reuse(State(15), house.growth, metrics)
    taken = metrics if event == "step" else journal[told:]
    assert (row | {"reused": True} in taken) == shown


def test_own_steps_that_were_lost_come_back_and_are_not_wasted() -> None:
    house, state, metrics, calls = House(), State(10), Journal(), []
    house.sharing.begin({11, 12, 40}, lambda: calls.append(1))
    house.accounts.ledger["wasted"] = 5
    house.add(house.node(18))
    assert house.sharing._reuse(state, house.growth, metrics)
    assert house.accounts.ledger == {"reused": 6, "reused_tokens": 6 * 128, "wasted": 3}
    assert calls == [1]
    assert [row["step"] for row in metrics if row["event"] == "step" and not row.get("reused")] == [11, 12]


def test_nothing_is_called_back_when_nothing_was_lost() -> None:
    house, calls = House(), []
    house.sharing.begin(set(), lambda: calls.append(1))
    house.add(house.node(18))
    house.sharing._reuse(State(), house.growth, None)
    assert calls == []


def test_rows_of_ops_go_to_the_journal() -> None:
    house, metrics, journal = House(), Journal(), Journal()
    house.growth.journal = journal
    op = {"event": "op", "op": "0-set_lr", "step": 5}
    house.add(house.node(18, rows=(*house.rows(0, 18), op)))
    house.sharing._reuse(State(), house.growth, metrics)
    assert journal == [op | {"reused": True}] and op not in metrics


def test_a_state_without_its_score_asks_for_it() -> None:
    house, state = House(), State()
    house.add(house.node(18, rows=house.rows(0, 18)[:-1]))
    assert house.sharing._reuse(state, house.growth, None) and house.sharing.unscored


def test_a_damaged_state_is_named_and_the_node_before_it_is_taken() -> None:
    house, state = House(), State()
    house.add(house.node(18), house.node(27, 18, state="damaged"))
    assert house.sharing._reuse(state, house.growth, None) and state.step == 18
    assert "its state is torn" in house.notes[0]
    assert not House().sharing._reuse(State(), house.growth, None)


# -- taking or training


STOP = SimpleNamespace(name="")


def test_a_run_takes_what_there_is_and_holds_the_lease_on_the_rest() -> None:
    house, state = House(), State()
    house.add(house.node(18))
    assert house.sharing.advance(state, house.growth, None, STOP) is False
    assert state.step == 18 and house.accounts.spent.keys() == {"store"}
    assert house.sharing.holder.lease is not None and house.sharing.holder.lease.key == house.keys[27]


def test_a_run_that_may_not_read_takes_nothing_and_holds_its_lease() -> None:
    house, state = House(fresh=True), State()
    house.add(house.node(18))
    assert house.sharing.advance(state, house.growth, None, STOP) is False
    assert (
        state.step == 0
        and house.sharing.holder.lease is not None
        and house.sharing.holder.lease.key == house.keys[18]
    )


def test_a_run_that_may_not_write_holds_no_lease() -> None:
    house = House()
    house.sharing.writer.on = False
    house.sharing.advance(State(), house.growth, None, STOP)
    assert house.sharing.holder.lease is None


def test_a_run_that_is_done_or_asked_to_stop_looks_for_nothing() -> None:
    for step, asked in ((37, ""), (0, "SIGTERM")):
        house = House()
        house.add(house.node(18))
        state = State(step)
        house.sharing.advance(state, house.growth, None, SimpleNamespace(name=asked))
        assert state.step == step and house.sharing.holder.lease is None


def test_a_node_beyond_the_own_lease_frees_it() -> None:
    house, state = House(), State(3)
    held = house.sharing.holder.lease = lease(house.keys[18], {"step": 18})
    house.add(house.node(18))
    house.sharing.advance(state, house.growth, None, STOP)
    assert held.released == [True]
    assert house.sharing.holder.lease is not None and house.sharing.holder.lease.key == house.keys[27]


def test_a_lease_further_on_stays() -> None:
    house, state = House(), State(3)
    held = house.sharing.holder.lease = lease(house.keys[27], {"step": 27})
    house.add(house.node(18))
    house.sharing.advance(state, house.growth, None, STOP)
    assert state.step == 18 and held.released == [] and house.sharing.holder.lease is held


def test_a_score_that_is_missing_comes_before_anything_else() -> None:
    house, state = House(), State()
    house.add(house.node(18, rows=house.rows(0, 18)[:-1]))
    assert house.sharing.advance(state, house.growth, None, STOP) is True
    assert house.sharing.holder.lease is None


def test_the_leader_waits_and_says_for_whom_once(monkeypatch: pytest.MonkeyPatch) -> None:
    house, state, waits = House(), State(), []
    others = Leases({house.keys[18]: holder(house, 18, run="slow-1")})
    house.sharing.holder.leases = others

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            others.held = {}
            house.add(house.node(18))

    monkeypatch.setattr(sharing.time, "sleep", sleep)
    house.sharing.advance(state, house.growth, None, STOP)
    assert state.step == 18 and len(waits) == 3 and all(0.05 <= wait <= 0.15 for wait in waits)
    assert [note for note in house.notes if "waiting" in note] == [
        "waiting for slow-1, which trains the shared steps up to 18"
    ]


def test_a_waiting_run_says_where_it_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    theirs = lineage.chain(house.keys[0], Plan(from_dict(LATER), TOKENS))
    others = Leases({theirs[36]: holder(house, 36, config=LATER)})
    house.sharing.holder.leases = others
    monkeypatch.setattr(sharing.time, "sleep", lambda seconds: others.held.clear())
    house.sharing.advance(State(18), house.growth, None, STOP)
    assert house.store.wanted == {house.keys[27]}


def test_two_that_take_a_lease_at_once_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    house, waits = House(), []
    taken: list[SimpleNamespace] = []
    others = Leases()

    def acquire(key: str, beat: Any, **about: Any) -> SimpleNamespace:
        taken.append(lease(key, about))
        others.held = {house.keys[27]: holder(house, 27)} if len(taken) == 1 else {}
        return taken[-1]

    others.acquire = acquire
    house.sharing.holder.leases = others

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        others.held = {}

    monkeypatch.setattr(sharing.time, "sleep", sleep)
    house.sharing.advance(State(), house.growth, None, STOP)
    assert [one.released for one in taken] == [[True], []] and len(waits) == 1


def test_a_store_that_breaks_costs_the_store_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    house, state = House(), State()

    def fail() -> set[str]:
        raise OSError(errno.EIO, "broken")

    held = house.sharing.holder.lease = lease(house.keys[18], {"step": 18})
    monkeypatch.setattr(house.store, "node_keys", fail)
    house.sharing.advance(state, house.growth, None, STOP)
    assert not house.sharing.writer.on and house.sharing.holder.lease is None and held.released == [True]
    assert house.notes == ["the store STORE cannot be used (broken); nothing more is kept in it"]


def test_a_follower_loads_what_the_leader_took() -> None:
    house, state = House(world=2, leads=False), State()
    house.add(house.node(18))
    house.machine.broadcast = lambda step, unscored: (18, 1)
    assert house.sharing.advance(state, house.growth, None, STOP) is True
    assert state.loads == [(18, 18 * 128)] and house.sharing.unscored is True
    assert house.store.rows_read == 0, "only the leader writes rows"


# -- leaving


def published(house: House, step: int, leads: bool = True) -> Node | None:
    house.sharing.device.leads = leads
    state = State(step)
    state.growth_state = {"cfg": step}
    house.sharing.publish(state)
    assert not house.store.saved or house.accounts.spent.keys() <= {"store"}
    if house.sharing.writer._writing:
        house.sharing.writer._writing.result()
    return house.store.saved[-1] if house.store.saved else None


def test_a_node_holds_the_state_and_the_rows_since_the_one_before() -> None:
    house = House()
    house.sharing.writer.rows = list(house.rows(0, 18))
    held = house.sharing.holder.lease = lease(house.keys[18], {"step": 18})
    node = published(house, 18)
    assert node is not None and (node.key, node.parent, node.root) == (
        house.keys[18],
        house.keys[0],
        house.keys[0],
    )
    assert (node.step, node.begins, node.tokens_processed, node.rows) == (18, 0, 18 * 128, house.rows(0, 18))
    assert (node.run, node.geometry, node.config) == (
        house.cfg.run_id,
        GEOMETRY,
        house.cfg.model_dump(mode="json"),
    )
    assert node.seconds >= 0 and node.made > 1e9 and (node.state, node.size, node.rows_sha256) == ("", 0, "")
    assert node.growth_state == {"cfg": 18}
    assert house.store.began == [(house.keys[0], house.sharing.course.begun)] and house.store.kept == [
        {house.keys[18]}
    ]
    assert (
        house.sharing.holder.lease is None and held.released == [False] and house.sharing.holder.written == 18
    )
    assert (house.sharing.writer.before, house.sharing.writer.rows) == ((18, house.keys[18]), [])


@pytest.mark.parametrize(("step", "leads"), [(17, True), (18, False), (0, True)])
def test_nothing_is_published_elsewhere_or_by_others(step: int, leads: bool) -> None:
    assert published(House(), step, leads) is None


def test_a_node_is_not_published_twice_and_a_due_one_is() -> None:
    house = House()
    house.sharing.writer.before = (18, house.keys[18])
    assert published(house, 18) is None
    house.sharing.holder.due = [20]
    node = published(house, 20)
    assert node is None or node.step == 20


def test_a_due_node_without_its_parent_stops_the_writing() -> None:
    house = House()
    house.sharing.writer.before = (18, house.keys[18])
    house.sharing.holder.due = [20]
    published(house, 20)
    assert (
        not house.sharing.writer.on
        and house.store.saved == []
        and "the rows up to step 18 are no longer in it" in house.notes[0]
    )


def test_a_lease_further_on_is_kept_when_a_node_on_the_way_is_published() -> None:
    house = House()
    held = house.sharing.holder.lease = lease(house.keys[27], {"step": 27})
    published(house, 18)
    assert house.sharing.holder.lease is held and held.released == []


@pytest.mark.parametrize(
    ("fault", "words", "writes"),
    [
        (Fenced("taken over"), "step 18 is not kept in the store: taken over", True),
        (Refused("other bits"), "step 18 and later steps are not kept in the store: other bits", False),
        (
            OSError(errno.ENOSPC, "full"),
            "no space left in the store STORE; nothing more is kept in it",
            False,
        ),
        (
            OSError(errno.EIO, "broken"),
            "the store STORE cannot be written ([Errno 5] broken); nothing more is kept in it",
            False,
        ),
        (
            RuntimeError("odd"),
            "the store STORE cannot be written (RuntimeError('odd')); nothing more is kept in it",
            False,
        ),
    ],
)
def test_what_cannot_be_written_is_named_and_the_lease_freed(
    fault: Exception, words: str, writes: bool
) -> None:
    house = House()
    house.store.fault = fault
    held = house.sharing.holder.lease = lease(house.keys[18], {"step": 18})
    published(house, 18)
    assert house.notes == [words] and house.sharing.writer.on is writes
    assert held.released == [False] and house.sharing.holder.written == 18 and house.store.saved == []


def test_a_run_that_cannot_write_frees_its_lease_and_publishes_nothing() -> None:
    house = House()
    house.sharing.writer.on = False
    held = house.sharing.holder.lease = lease(house.keys[18], {"step": 18})
    assert published(house, 18) is None and held.released == [True]


@pytest.mark.parametrize(
    ("fault", "released"), [(None, []), (Fenced("taken over"), []), (OSError(errno.EIO, "broken"), [False])]
)
def test_a_lease_further_on_is_freed_when_nothing_more_is_written(
    fault: Exception | None, released: list[bool]
) -> None:
    house = House()
    house.store.fault = fault
    held = house.sharing.holder.lease = lease(house.keys[27], {"step": 27})
    published(house, 18)
    assert held.released == released


def test_the_next_node_holds_only_the_rows_since_the_one_before() -> None:
    house = House()
    published(house, 18)
    house.sharing.writer.rows = list(house.rows(18, 27))
    node = published(house, 27)
    assert node is not None and (node.begins, node.parent, node.rows) == (
        18,
        house.keys[18],
        house.rows(18, 27),
    )


def test_a_checkpoint_does_not_wait_for_a_node_that_is_being_written() -> None:
    house = House()
    house.sharing.writer.rows = list(house.rows(0, 18))
    published(house, 18)
    house.sharing.writer.rows = [{"step": 19}]
    house.sharing.writer._writing = SimpleNamespace(
        done=lambda: False, result=lambda: pytest.fail("it waits")
    )
    meta = house.sharing.checkpoint_meta(19)
    assert meta == {
        "key": house.keys[19],
        "before": [0, house.keys[0]],
        "rows": [*house.rows(0, 18), {"step": 19}],
    }


def test_rows_are_kept_in_their_order() -> None:
    house = House()
    for step in (1, 2):
        house.sharing.add_row({"step": step})
    assert house.sharing.writer.rows == [{"step": 1}, {"step": 2}]


def test_a_run_ends_when_its_last_node_is_written() -> None:
    house, gate = House(), threading.Event()
    save = house.store.save

    def late(*arguments: Any) -> None:
        gate.wait(60)
        save(*arguments)

    house.store.save = late  # type: ignore[method-assign]
    house.sharing.publish(State(18))
    threading.Timer(0.2, gate.set).start()
    house.sharing.close()
    assert [node.step for node in house.store.saved] == [18]


def test_the_seconds_of_a_node_do_not_include_the_time_spent_in_the_store() -> None:
    house = House()
    house.sharing.writer.since = before = time.perf_counter() - 1000
    house.sharing.advance(State(), house.growth, None, STOP)
    assert house.sharing.writer.since > before + 999


def test_tokens_that_were_not_trained_are_counted_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mainrun.growth.state.rebuild_model", lambda *_: None)
    larger = {"name": "set_batch_size", "value": 16, "trigger": {"step": 9}}
    house, state = House(growth={"version": 2, "ops": [larger]}), State(5)
    stop = min(step for step in house.sharing.course.stops if step > 9)
    assert house.plan.tokens(stop) != stop * house.plan.tokens(1)
    house.add(house.node(9), house.node(stop, begins=9))
    assert house.sharing._reuse(state, house.growth, None)
    assert state.step == stop and house.accounts.ledger["reused_tokens"] == house.plan.tokens(
        stop
    ) - house.plan.tokens(5)


def test_rows_whose_node_was_not_written_go_with_the_next() -> None:
    house = House()
    house.sharing.writer.rows = list(house.rows(0, 18))
    house.store.fault = Fenced("taken over")
    published(house, 18)
    house.store.fault = None
    house.sharing.writer.rows = list(house.rows(18, 27))
    node = published(house, 27)
    assert (
        node is not None
        and (node.begins, node.parent) == (0, house.keys[0])
        and node.rows == house.rows(0, 27)
    )


# -- a run's own checkpoints


def test_a_checkpoint_holds_the_rows_since_the_last_node_and_gives_them_back() -> None:
    house, other = House(), House()
    house.sharing.writer.before, house.sharing.writer.rows = (18, house.keys[18]), [{"step": 19}]
    meta = house.sharing.checkpoint_meta(19)
    assert meta == {"key": house.keys[19], "before": [18, house.keys[18]], "rows": [{"step": 19}]}
    other.sharing.restore(meta, 19)
    assert (
        other.sharing.writer.before,
        other.sharing.writer.rows,
        other.sharing.writer.on,
        other.sharing.reads,
    ) == (
        (18, house.keys[18]),
        [{"step": 19}],
        True,
        True,
    )
    house.sharing.writer.on = False
    assert house.sharing.checkpoint_meta(19) is None


@pytest.mark.parametrize(
    ("meta", "reads", "words"),
    [
        (None, True, "trained without a store"),
        ({"key": "0" * 64, "before": [0, ""], "rows": []}, False, "trained elsewhere and have other bits"),
    ],
)
def test_steps_of_another_beginning_never_go_into_the_store(
    meta: dict[str, Any] | None, reads: bool, words: str
) -> None:
    house = House()
    house.sharing.restore(meta, 19)
    assert (house.sharing.reads, house.sharing.writer.on) == (reads, False)
    assert words in house.notes[0] and "up to 19" in house.notes[0]


# -- why nothing is taken


def begun(house: House, **machine: Any) -> dict[str, Any]:
    return house.sharing.course.begun | {
        "machine_class": house.sharing.course.begun["machine_class"] | machine
    }


def test_another_machine_s_steps_are_named_with_the_nearest_difference() -> None:
    house = House()
    house.store.beginnings = [("a", begun(house, cpu="y", isa="z")), ("b", begun(house, cpu="y")), ("c", 5)]
    house.sharing.report_other_versions()
    (note,) = house.notes
    assert "machine_class cpu: y there, x here" in note and "isa" not in note


def test_of_beginnings_as_near_the_first_is_named() -> None:
    house = House()
    house.store.beginnings = [("a", begun(house, cpu="y")), ("b", begun(house, cpu="z"))]
    house.sharing.report_other_versions()
    assert "machine_class cpu: y there" in house.notes[0]


def test_at_most_four_differences_are_named() -> None:
    house = House()
    house.store.beginnings = [("a", begun(house, **{f"k{i}": i for i in range(6)}))]
    house.sharing.report_other_versions()
    assert house.notes[0].count("machine_class k") == 4


@pytest.mark.parametrize("change", ["fields", "data"])
def test_the_steps_of_another_config_or_data_are_no_strangers(change: str) -> None:
    house = House()
    house.store.beginnings = [("a", begun(house, cpu="y") | {change: {}})]
    house.sharing.report_other_versions()
    assert house.notes == []


def test_the_same_beginning_needs_no_word() -> None:
    house = House()
    house.store.beginnings = [
        ("a", begun(house, cpu="y")),
        (lineage.root(house.sharing.course.begun), house.sharing.course.begun),
    ]
    house.sharing.report_other_versions()
    assert house.notes == []


def test_beginnings_that_cannot_be_read_are_said() -> None:
    house = House()
    house.store.fault = OSError(errno.EIO, "broken")
    house.sharing.report_other_versions()
    assert house.notes == ["the store STORE cannot be searched for other versions of this run (broken)"]
