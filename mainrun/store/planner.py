"""Decide which run of a batch trains which steps, so that no step is trained twice. No torch.

The key chains of the runs form a tree: runs share their steps up to the fork where their keys differ. Each
segment of the tree is assigned to one run. At a fork the longest run continues, and the others start from the
node that it leaves there. Of the runs that can start, the longest starts first.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field


@dataclass
class Assignment:
    """The steps that one run trains: those after `begin`, up to `end`."""

    name: str
    begin: int
    end: int
    after: str | None  # the run that leaves the node at `begin`; None if this run need not wait
    forks: list[int] = field(
        default_factory=list
    )  # steps at which other runs begin, so at which a node is kept

    @property
    def steps(self) -> int:
        return self.end - self.begin


@dataclass
class Assignments:
    """What every run of a batch trains, in the order in which to start the runs."""

    order: list[Assignment]
    requested: int  # steps of all runs together, shared ones counted several times

    @property
    def steps(self) -> int:
        """The number of steps to train."""
        return sum(assignment.steps for assignment in self.order)


def assign(
    chains: Mapping[str, Sequence[str]],
    stored: Set[str] = frozenset(),
    resumed: Mapping[str, int] | None = None,
) -> Assignments:
    """Assign every step to one run.

    chains: key[0] ... key[steps] of each run.
    stored: keys of nodes in the store. Steps before such a node are not trained.
    resumed: the step of a run's own checkpoint. The run leaves no nodes up to that step.
    """
    assignments: dict[str, Assignment] = {}
    # groups of runs that begin at one step: (names, step, the run to wait for)
    groups: list[tuple[list[str], int, str | None]] = [
        (names, step, None) for step, names in _group_by_start(chains, stored)
    ]
    while groups:
        names, begin, after = groups.pop()
        longest, *others = sorted(names, key=lambda name: (-len(chains[name]), name))
        start = max(begin, (resumed or {}).get(longest, 0))
        branches: dict[tuple[int, str], list[str]] = {}
        left_out: list[str] = []  # they part from the longest run before its checkpoint
        for name in others:
            fork = shared_steps(chains[longest], chains[name])
            if fork <= start and start > begin:
                left_out.append(name)
                continue
            ends_at_fork = fork + 1 == len(chains[name])
            next_key = "" if ends_at_fork else chains[name][fork + 1]
            branches.setdefault((fork, next_key), []).append(name)
        waits_for = after if start == begin else None
        forks = sorted({fork for fork, _ in branches if fork > start})
        assignments[longest] = Assignment(longest, start, len(chains[longest]) - 1, waits_for, forks)
        if left_out:
            groups.append((left_out, begin, after))
        for (fork, _), branch in branches.items():
            groups.append((branch, fork, longest if fork > begin else after))
    requested = sum(len(keys) - 1 for keys in chains.values())
    return Assignments(_starting_order(assignments), requested)


def _group_by_start(chains: Mapping[str, Sequence[str]], stored: Set[str]) -> list[tuple[int, list[str]]]:
    """Return (step, names) for each node of the store, or root, at which runs begin."""
    groups: dict[tuple[int, str], list[str]] = {}
    for name, keys in chains.items():
        step = next((step for step in range(len(keys) - 1, 0, -1) if keys[step] in stored), 0)
        groups.setdefault((step, keys[step]), []).append(name)
    return [(step, names) for (step, _), names in groups.items()]


def shared_steps(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the last step at which two chains are equal. Once they differ, they never agree again."""
    low = 0
    high = min(len(a), len(b)) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if a[middle] == b[middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _starting_order(assignments: dict[str, Assignment]) -> list[Assignment]:
    """Order the assignments: each after the one that it waits for, longer ones first."""
    by_depth = sorted(
        assignments.values(), key=lambda each: (_depth(each, assignments), -each.steps, each.name)
    )
    waiting: dict[str | None, list[tuple[int, int, Assignment]]] = {}
    for place, assignment in enumerate(by_depth):
        waiting.setdefault(assignment.after, []).append((-assignment.steps, place, assignment))
    ready = waiting.get(None, [])
    heapq.heapify(ready)
    order: list[Assignment] = []
    while ready:
        assignment = heapq.heappop(ready)[2]
        order.append(assignment)
        for follower in waiting.get(assignment.name, []):
            heapq.heappush(ready, follower)
    return order


def _depth(assignment: Assignment, assignments: dict[str, Assignment]) -> int:
    """Return how many runs must come before this one."""
    depth = 0
    while assignment.after:
        assignment = assignments[assignment.after]
        depth += 1
    return depth
