"""The planner: every step that any run needs is trained once, by somebody who is there in time, and the longest way goes first."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainrun.store.planner import Batch, Part, plan, shared


def chain(inputs: Sequence[object]) -> list[str]:
    """Keys as lineage makes them: the same exactly as long as all inputs so far are."""
    return ["root", *(repr(tuple(inputs[: i + 1])) for i in range(len(inputs)))]


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, list[str]], set[str]]:
    """Runs of few steps and fewer choices, so that they share, end inside each other and are the same; two roots; some keys stored."""
    runs = draw(
        st.lists(st.tuples(st.sampled_from("XY"), st.lists(st.integers(0, 1), max_size=7)), max_size=9)
    )
    chains = {f"run{i}": [f"{root} {k}" for k in chain(inputs)] for i, (root, inputs) in enumerate(runs)}
    keys = sorted({k for keys in chains.values() for k in keys})
    return chains, set(draw(st.lists(st.sampled_from(keys), max_size=5))) if keys else set()


def deepest(keys: list[str], stored: set[str]) -> int:
    return max((step for step, k in enumerate(keys) if k in stored), default=0)


@given(batches())
@settings(max_examples=300)
def test_every_step_is_trained_once_and_none_besides(batch: tuple[dict[str, list[str]], set[str]]) -> None:
    chains, stored = batch
    found = plan(chains, stored)
    needed = {k for keys in chains.values() for k in keys[deepest(keys, stored) + 1 :]}
    trained = [
        chains[part.name][step] for part in found.parts for step in range(part.begin + 1, part.end + 1)
    ]
    assert len(trained) == len(set(trained)) and set(trained) == needed
    assert found.steps == len(needed) and found.asked == sum(len(keys) - 1 for keys in chains.values())
    assert sorted(part.name for part in found.parts) == sorted(chains)
    assert all(part.end == len(chains[part.name]) - 1 for part in found.parts)


@given(batches())
@settings(max_examples=300)
def test_every_part_has_a_beginning_when_its_turn_comes(batch: tuple[dict[str, list[str]], set[str]]) -> None:
    """At a root, at what the store has, or where one before it left a node."""
    chains, stored = batch
    left: dict[str, str] = {}  # key -> who left a node there
    found = plan(chains, stored)
    for part in found.parts:
        keys = chains[part.name]
        if part.after is None:
            assert part.begin == 0 or keys[part.begin] in stored
        else:
            assert left[keys[part.begin]] == part.after
        assert all(part.begin < fork <= part.end for fork in part.forks) and part.forks == sorted(
            set(part.forks)
        )
        left |= {keys[fork]: part.name for fork in part.forks}
    begun = {chains[part.name][part.begin] for part in found.parts if part.after}
    assert begun == left.keys(), "a node is left only where somebody begins"


@given(batches(), st.data())
@settings(max_examples=300)
def test_a_run_that_goes_on_by_itself_trains_the_rest_and_leaves_nothing_before(
    batch: tuple[dict[str, list[str]], set[str]], data: st.DataObject
) -> None:
    chains, stored = batch
    own = {
        name: data.draw(st.integers(0, len(keys) - 1))
        for name, keys in chains.items()
        if data.draw(st.booleans())
    }
    found, left = plan(chains, stored, own), dict[str, str]()
    assert sorted(part.name for part in found.parts) == sorted(chains)
    for part in found.parts:
        keys = chains[part.name]
        mine = max(own.get(part.name, 0), deepest(keys, stored))
        assert mine <= part.begin <= part.end == len(keys) - 1
        assert left[keys[part.begin]] == part.after if part.after else part.begin == mine
        assert all(part.begin < fork <= part.end for fork in part.forks)
        left |= {keys[fork]: part.name for fork in part.forks}
    assert plan(chains, stored, dict.fromkeys(chains, 0)) == plan(chains, stored)


def test_whoever_is_done_trains_nothing_and_others_train_without_it() -> None:
    chains = {"done": chain("aaaabb"), "half": chain("aaaab"), "new": chain("aaaac")}
    found = {
        part.name: (part.begin, part.steps, part.after)
        for part in plan(chains, own={"done": 6, "half": 2}).parts
    }
    assert found == {"done": (6, 0, None), "half": (2, 3, None), "new": (4, 1, "half")}


@given(batches())
@settings(max_examples=300)
def test_of_those_that_are_ready_the_longest_way_goes_first(
    batch: tuple[dict[str, list[str]], set[str]],
) -> None:
    found = plan(*batch)

    def waits_for(part: Part) -> list[Part]:
        return [
            part,
            *itertools.chain.from_iterable(
                waits_for(other) for other in found.parts if other.after == part.name
            ),
        ]

    done: set[str | None] = {None}
    for i, part in enumerate(found.parts):
        assert part.end == max(other.end for other in waits_for(part)), (
            "nothing that waits for it ends later: its way is the critical path"
        )
        ready = [other for other in found.parts[i:] if other.after in done]
        assert part in ready and part.steps == max(other.steps for other in ready)
        done.add(part.name)


@given(batches())
@settings(max_examples=50)
def test_the_plan_is_the_same_in_whatever_order_the_runs_are_given(
    batch: tuple[dict[str, list[str]], set[str]],
) -> None:
    chains, stored = batch
    assert plan(dict(reversed(chains.items())), stored) == plan(chains, stored)


def finish(found: Batch, workers: int) -> int:
    """When the last part ends, if each free worker takes the first part whose beginning is there. A step takes a moment."""
    ends: dict[str, int] = {}
    begun: dict[str, int] = {}
    free, left = [0] * workers, list(found.parts)
    while left:
        parts = {part.name: part for part in found.parts}

        def ready(part: Part, parts: dict[str, Part] = parts) -> int:
            return begun[part.after] + part.begin - parts[part.after].begin if part.after else 0

        now = min(free)
        known = [part for part in left if part.after is None or part.after in begun]
        part = next((part for part in known if ready(part) <= now), None) or min(known, key=ready)
        begun[part.name] = max(now, ready(part))
        ends[part.name] = begun[part.name] + part.steps
        free[free.index(now)] = ends[part.name]
        left.remove(part)
    return max(ends.values(), default=0)


def test_enough_workers_need_no_longer_than_the_longest_run() -> None:
    chains = {f"{a}{b}": chain([0] * a + [a] * b) for a, b in ((0, 30), (10, 5), (10, 40), (25, 25), (49, 1))}
    assert finish(plan(chains), len(chains)) == 50


def test_the_first_to_begin_is_the_one_for_whom_most_waits() -> None:
    """A trunk of 5 steps before a way of 100 goes before a lone run of 50."""
    chains = {"trunk": chain([0] * 5), "long": chain([0] * 5 + [1] * 95), "lone": chain([2] * 50)}
    found = plan(chains)
    assert [part.name for part in found.parts] == ["long", "lone", "trunk"] and [
        part.steps for part in found.parts
    ] == [100, 50, 0]


@pytest.mark.parametrize(
    ("a", "b", "step"),
    [("", "", 0), ("aab", "aac", 2), ("abc", "abc", 3), ("ab", "abc", 2), ("x", "y", 0), ("", "abc", 0)],
)
def test_shared_is_the_last_step_that_two_have_in_common(a: str, b: str, step: int) -> None:
    assert shared(chain(a), chain(b)) == shared(chain(b), chain(a)) == step


def test_nothing_asked_is_nothing_planned() -> None:
    assert plan({}) == Batch([], 0) and plan({}).steps == 0


def test_the_same_run_twice_is_trained_once() -> None:
    found = plan({"a": chain("xyz"), "b": chain("xyz")})
    assert (found.steps, found.asked) == (3, 6) and [(p.name, p.steps, p.after) for p in found.parts] == [
        ("a", 3, None),
        ("b", 0, "a"),
    ]


def test_what_the_store_has_is_not_trained() -> None:
    keys = chain("xyz")
    assert plan({"a": keys}, {keys[2]}).parts == [Part("a", 2, 3, None, [])]
    assert plan({"a": keys}, set(keys)).steps == 0 and plan({"a": keys}, {"another"}).steps == 3


# -- the first study of docs: late choices share what comes before them

STEPS, DECAYS = 400, [0.75 + 0.03 * i for i in range(8)]


def study(steps: int, decays: Sequence[float]) -> dict[str, list[str]]:
    """2 learning rates x growth at 4 times x decay from 8 times x 3 shapes."""
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


def test_the_first_study_needs_less_than_a_fifth_of_what_it_asks() -> None:
    found = plan(study(STEPS, DECAYS))
    assert len(found.parts) == 192 and found.asked == 192 * STEPS
    trunks = 2 * (
        0.55 + 4 * 0.96 - sum((0.10, 0.25, 0.40, 0.55))
    )  # a rate's steps up to the last growth; each growth's to the last decay
    tails = 2 * 4 * 3 * sum(1 - decay for decay in DECAYS)
    assert found.steps == pytest.approx((trunks + tails) * STEPS, abs=1)
    assert found.asked / found.steps == pytest.approx(5.65, abs=0.05)


def test_a_second_study_pays_only_for_what_is_new() -> None:
    """Half of the decays kept, half moved between: with the first one's trunks and ends in the store, the ends that moved."""
    first, second = (
        study(STEPS, DECAYS),
        study(STEPS, [*DECAYS[::2], *(decay + 0.015 for decay in DECAYS[1::2])]),
    )
    known = plan(first)
    stored = {first[part.name][step] for part in known.parts for step in [*part.forks, part.end]}
    both = plan(
        {f"{i} {name}": keys for i, chains in enumerate((first, second)) for name, keys in chains.items()}
    )
    assert both.asked / both.steps > 6.77
    alone = plan(second, stored)
    assert both.steps <= known.steps + alone.steps < known.steps + plan(second).steps
    kept = [part for part in alone.parts if part.name in first]
    assert len(kept) == 96 and all(part.steps == 0 for part in kept)


def test_200_runs_of_100000_steps_are_planned_in_seconds() -> None:
    """Also with a store: each run is looked up from its end. The keys of the trunk are shared objects, to spare the memory of this test."""
    steps = 100_000
    trunk = [f"t{i}" for i in range(steps + 1)]
    ends = [[f"{run}.{i}" for i in range(steps // 100)] for run in range(200)]
    chains = {f"run{run:03}": trunk[: steps + 1 - len(end)] + end for run, end in enumerate(ends)}
    for stored, expected in ((set(), steps + 199 * 1000), ({trunk[50_000]}, steps // 2 + 199 * 1000)):
        before = time.process_time()
        found = plan(chains, stored)
        assert time.process_time() - before < 6
        assert found.steps == expected and len(found.parts) == 200


def test_a_thousand_runs_are_ordered_in_a_moment() -> None:
    chains = {f"{i:04}": chain([0] * (i % 10) + [i] * 5) for i in range(2000)}
    before = time.process_time()
    found = plan(chains)
    assert time.process_time() - before < 2 and len(found.parts) == 2000
