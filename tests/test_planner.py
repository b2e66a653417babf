"""Tests of the planner.

The planner trains every step once, starts a run only when its starting node exists, and starts long runs
first.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from mainrun.store.planner import Assignment, Assignments, assign, shared_steps


def chain(inputs: Sequence[object]) -> list[str]:
    """Return keys as `lineage.chain` does: two chains have equal keys up to their first different input."""
    return ["root", *(repr(tuple(inputs[: i + 1])) for i in range(len(inputs)))]


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, list[str]], set[str]]:
    """Draw chains that often share steps, and the keys of some nodes that the store already has."""
    runs = draw(
        st.lists(st.tuples(st.sampled_from("XY"), st.lists(st.integers(0, 1), max_size=7)), max_size=9)
    )
    chains = {f"run{i}": [f"{root} {k}" for k in chain(inputs)] for i, (root, inputs) in enumerate(runs)}
    keys = sorted({k for keys in chains.values() for k in keys})
    return chains, set(draw(st.lists(st.sampled_from(keys), max_size=5))) if keys else set()


def deepest(keys: list[str], stored: set[str]) -> int:
    return max((step for step, k in enumerate(keys) if k in stored), default=0)


@given(batches())
@settings(max_examples=examples(300))
def test_every_needed_step_is_trained_once_and_no_other(batch: tuple[dict[str, list[str]], set[str]]) -> None:
    chains, stored = batch
    planned = assign(chains, stored)
    needed = {k for keys in chains.values() for k in keys[deepest(keys, stored) + 1 :]}
    trained = [
        chains[assignment.name][step]
        for assignment in planned.order
        for step in range(assignment.begin + 1, assignment.end + 1)
    ]
    assert len(trained) == len(set(trained)) and set(trained) == needed
    assert planned.steps == len(needed) and planned.requested == sum(
        len(keys) - 1 for keys in chains.values()
    )
    assert sorted(assignment.name for assignment in planned.order) == sorted(chains)
    assert all(assignment.end == len(chains[assignment.name]) - 1 for assignment in planned.order)


@given(batches())
@settings(max_examples=examples(300))
def test_every_run_starts_from_a_node_that_exists_by_then(
    batch: tuple[dict[str, list[str]], set[str]],
) -> None:
    """A run starts at a root, at a node of the store, or at a node that an earlier run has saved."""
    chains, stored = batch
    left: dict[str, str] = {}  # maps the key of each node to the run that saved the node
    planned = assign(chains, stored)
    for assignment in planned.order:
        keys = chains[assignment.name]
        if assignment.after is None:
            assert assignment.begin == 0 or keys[assignment.begin] in stored
        else:
            assert left[keys[assignment.begin]] == assignment.after
        assert all(
            assignment.begin < fork <= assignment.end for fork in assignment.forks
        ) and assignment.forks == sorted(set(assignment.forks))
        left |= {keys[fork]: assignment.name for fork in assignment.forks}
    begun = {chains[assignment.name][assignment.begin] for assignment in planned.order if assignment.after}
    assert begun == left.keys(), "a node is left only where another run begins"


@given(batches(), st.data())
@settings(max_examples=examples(300))
def test_a_resumed_run_trains_the_rest_and_leaves_no_nodes_before(
    batch: tuple[dict[str, list[str]], set[str]], data: st.DataObject
) -> None:
    chains, stored = batch
    resumed = {
        name: data.draw(st.integers(0, len(keys) - 1))
        for name, keys in chains.items()
        if data.draw(st.booleans())
    }
    planned, left = assign(chains, stored, resumed), dict[str, str]()
    assert sorted(assignment.name for assignment in planned.order) == sorted(chains)
    for assignment in planned.order:
        keys = chains[assignment.name]
        start = max(resumed.get(assignment.name, 0), deepest(keys, stored))
        assert start <= assignment.begin <= assignment.end == len(keys) - 1
        assert (
            left[keys[assignment.begin]] == assignment.after
            if assignment.after
            else assignment.begin == start
        )
        assert all(assignment.begin < fork <= assignment.end for fork in assignment.forks)
        left |= {keys[fork]: assignment.name for fork in assignment.forks}
    assert assign(chains, stored, dict.fromkeys(chains, 0)) == assign(chains, stored)


def test_a_finished_run_trains_nothing_and_leaves_no_nodes() -> None:
    chains = {"done": chain("aaaabb"), "half": chain("aaaab"), "new": chain("aaaac")}
    planned = {
        assignment.name: (assignment.begin, assignment.steps, assignment.after)
        for assignment in assign(chains, resumed={"done": 6, "half": 2}).order
    }
    assert planned == {"done": (6, 0, None), "half": (2, 3, None), "new": (4, 1, "half")}


@given(batches())
@settings(max_examples=examples(300))
def test_of_the_runs_that_can_start_the_longest_starts_first(
    batch: tuple[dict[str, list[str]], set[str]],
) -> None:
    planned = assign(*batch)

    def waits_for(assignment: Assignment) -> list[Assignment]:
        return [
            assignment,
            *itertools.chain.from_iterable(
                waits_for(other) for other in planned.order if other.after == assignment.name
            ),
        ]

    done: set[str | None] = {None}
    for i, assignment in enumerate(planned.order):
        assert assignment.end == max(other.end for other in waits_for(assignment)), (
            "a run that waits for it ends later: it is not the critical path"
        )
        ready = [other for other in planned.order[i:] if other.after in done]
        assert assignment in ready and assignment.steps == max(other.steps for other in ready)
        done.add(assignment.name)


@given(batches())
@settings(max_examples=examples(50))
def test_the_order_of_the_runs_does_not_matter(
    batch: tuple[dict[str, list[str]], set[str]],
) -> None:
    chains, stored = batch
    assert assign(dict(reversed(chains.items())), stored) == assign(chains, stored)


def finish(planned: Assignments, workers: int) -> int:
    """Simulate workers, and return the time at which the last run ends.

    Each free worker takes the first run whose starting node exists. A step takes one unit of time.
    """
    ends: dict[str, int] = {}
    begun: dict[str, int] = {}
    free, left = [0] * workers, list(planned.order)
    while left:
        parts = {assignment.name: assignment for assignment in planned.order}

        def ready(assignment: Assignment, parts: dict[str, Assignment] = parts) -> int:
            return (
                begun[assignment.after] + assignment.begin - parts[assignment.after].begin
                if assignment.after
                else 0
            )

        now = min(free)
        known = [assignment for assignment in left if assignment.after is None or assignment.after in begun]
        assignment = next((assignment for assignment in known if ready(assignment) <= now), None) or min(
            known, key=ready
        )
        begun[assignment.name] = max(now, ready(assignment))
        ends[assignment.name] = begun[assignment.name] + assignment.steps
        free[free.index(now)] = ends[assignment.name]
        left.remove(assignment)
    return max(ends.values(), default=0)


def test_enough_workers_need_as_long_as_the_longest_run() -> None:
    chains = {f"{a}{b}": chain([0] * a + [a] * b) for a, b in ((0, 30), (10, 5), (10, 40), (25, 25), (49, 1))}
    assert finish(assign(chains), len(chains)) == 50


def test_the_run_with_the_longest_followers_starts_first() -> None:
    """The run of 100 steps starts before the unrelated run of 50 steps.

    The run of 100 steps also trains all steps of the third run.
    """
    chains = {"trunk": chain([0] * 5), "long": chain([0] * 5 + [1] * 95), "lone": chain([2] * 50)}
    planned = assign(chains)
    assert [assignment.name for assignment in planned.order] == ["long", "lone", "trunk"] and [
        assignment.steps for assignment in planned.order
    ] == [100, 50, 0]


@pytest.mark.parametrize(
    ("a", "b", "step"),
    [("", "", 0), ("aab", "aac", 2), ("abc", "abc", 3), ("ab", "abc", 2), ("x", "y", 0), ("", "abc", 0)],
)
def test_shared_steps_is_the_last_step_that_two_chains_have_in_common(a: str, b: str, step: int) -> None:
    assert shared_steps(chain(a), chain(b)) == shared_steps(chain(b), chain(a)) == step


def test_no_runs_give_no_assignments() -> None:
    assert assign({}) == Assignments([], 0) and assign({}).steps == 0


def test_two_equal_runs_are_trained_once() -> None:
    planned = assign({"a": chain("xyz"), "b": chain("xyz")})
    assert (planned.steps, planned.requested) == (3, 6) and [
        (p.name, p.steps, p.after) for p in planned.order
    ] == [
        ("a", 3, None),
        ("b", 0, "a"),
    ]


def test_steps_in_the_store_are_not_trained() -> None:
    keys = chain("xyz")
    assert assign({"a": keys}, {keys[2]}).order == [Assignment("a", 2, 3, None, [])]
    assert assign({"a": keys}, set(keys)).steps == 0 and assign({"a": keys}, {"another"}).steps == 3


# -- the first study of the documents

STEPS, DECAYS = 400, [0.75 + 0.03 * i for i in range(8)]


def study(steps: int, decays: Sequence[float]) -> dict[str, list[str]]:
    """Return the chains for 2 learning rates x 4 growth steps x 8 decay starts x 3 decay shapes."""
    trials = itertools.product((1e-3, 3e-3), (0.10, 0.25, 0.40, 0.55), decays, ("linear", "cosine", "sqrt"))
    chains = {}
    for lr, growth, decay, shape in trials:
        grown, decaying = round(growth * steps), round(decay * steps)
        keys, key = ["root"], 0
        for step in range(steps):
            rate = (lr,) if step < decaying else (lr, shape, decaying)
            key = hash((key, rate, grown if step >= grown else None))
            keys.append(str(key))
        chains[f"{lr} {growth} {decay:.3f} {shape}"] = keys
    return chains


def test_the_first_study_trains_less_than_a_fifth_of_its_steps() -> None:
    planned = assign(study(STEPS, DECAYS))
    assert len(planned.order) == 192 and planned.requested == 192 * STEPS
    # Each learning rate has one trunk up to its last growth step. From each growth step, another trunk
    # continues to the start of the last decay.
    trunks = 2 * (0.55 + 4 * 0.96 - sum((0.10, 0.25, 0.40, 0.55)))
    tails = 2 * 4 * 3 * sum(1 - decay for decay in DECAYS)
    assert planned.steps == pytest.approx((trunks + tails) * STEPS, abs=1)
    assert planned.requested / planned.steps == pytest.approx(5.65, abs=0.05)


def test_a_second_study_trains_only_its_new_steps() -> None:
    """Half of the decay starts are new.

    The store has the nodes at the forks and at the ends of the runs of the first study.
    """
    first, second = (
        study(STEPS, DECAYS),
        study(STEPS, [*DECAYS[::2], *(decay + 0.015 for decay in DECAYS[1::2])]),
    )
    known = assign(first)
    stored = {
        first[assignment.name][step]
        for assignment in known.order
        for step in [*assignment.forks, assignment.end]
    }
    both = assign(
        {f"{i} {name}": keys for i, chains in enumerate((first, second)) for name, keys in chains.items()}
    )
    assert both.requested / both.steps > 6.77
    alone = assign(second, stored)
    assert both.steps <= known.steps + alone.steps < known.steps + assign(second).steps
    kept = [assignment for assignment in alone.order if assignment.name in first]
    assert len(kept) == 96 and all(assignment.steps == 0 for assignment in kept)


@pytest.mark.slow
def test_200_runs_of_100000_steps_are_assigned_within_six_seconds() -> None:
    """The planner searches the store backwards from the last step of each run.

    The runs of the test share key objects to save memory.
    """
    steps = 100_000
    trunk = [f"t{i}" for i in range(steps + 1)]
    ends = [[f"{run}.{i}" for i in range(steps // 100)] for run in range(200)]
    chains = {f"run{run:03}": trunk[: steps + 1 - len(end)] + end for run, end in enumerate(ends)}
    for stored, expected in ((set(), steps + 199 * 1000), ({trunk[50_000]}, steps // 2 + 199 * 1000)):
        before = time.process_time()
        planned = assign(chains, stored)
        assert time.process_time() - before < 6
        assert planned.steps == expected and len(planned.order) == 200


def test_two_thousand_runs_are_ordered_within_two_seconds() -> None:
    chains = {f"{i:04}": chain([0] * (i % 10) + [i] * 5) for i in range(2000)}
    before = time.process_time()
    planned = assign(chains)
    assert time.process_time() - before < 2 and len(planned.order) == 2000
