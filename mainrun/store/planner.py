"""Decide which run of a batch trains which steps, so that no step is trained twice.

Two runs share all steps up to a fork, which is the step after which their keys differ. The key chains of all
runs therefore form a tree, and each segment of this tree is assigned to one run. At each fork, the longest
run saves a node and continues. The other runs start from this node. Among the runs that can start, the
longest run starts first. This module does not import torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field


@dataclass
class Assignment:
    """The steps that one run trains. The first step is `begin + 1`, and the last step is `end`."""

    name: str
    begin: int
    end: int
    # The run that saves the node of step `begin`, or None if this run does not have to wait.
    after: str | None
    # The steps at which this run saves a node, because other runs start from these nodes.
    forks: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.end - self.begin


@dataclass
class Assignments:
    """The assignments of all runs of a batch, in the order in which the runs should start."""

    order: list[Assignment]
    requested: int  # the total number of steps of all runs; a step that two runs share counts twice

    @property
    def steps(self) -> int:
        """The total number of steps to train."""
        return sum(assignment.steps for assignment in self.order)


def assign(
    chains: Mapping[str, Sequence[str]],
    stored: Set[str] = frozenset(),
    resumed: Mapping[str, int] | None = None,
) -> Assignments:
    """Assign every step to one run.

    chains: the keys key[0] ... key[steps] of each run.
    stored: the keys of the nodes in the store. Steps up to a stored node are not trained.
    resumed: a dict that maps each interrupted run to the step of its checkpoint. An interrupted run saves no
    nodes up to the step of its checkpoint.
    """
    assignments: dict[str, Assignment] = {}
    # All runs in a group begin at the same node. A group is a tuple of the names of the runs, the step of the
    # node, and the run that saves the node.
    groups: list[tuple[list[str], int, str | None]] = [
        (names, step, None) for step, names in _group_by_start(chains, stored)
    ]
    while groups:
        names, begin, after = groups.pop()
        longest, *others = sorted(names, key=lambda name: (-len(chains[name]), name))
        start = max(begin, (resumed or {}).get(longest, 0))
        branches: dict[tuple[int, str], list[str]] = {}
        # These runs fork from the longest run before or at the checkpoint of the longest run.
        left_out: list[str] = []
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
    """Group the runs by the stored node or root at which they begin. Return (step, names) for each group."""
    groups: dict[tuple[int, str], list[str]] = {}
    for name, keys in chains.items():
        step = next((step for step in range(len(keys) - 1, 0, -1) if keys[step] in stored), 0)
        groups.setdefault((step, keys[step]), []).append(name)
    return [(step, names) for (step, _), names in groups.items()]


def shared_steps(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the last step at which two chains are equal.

    All keys before this step are equal, and all keys after it differ.
    """
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
    """Return the assignments in the order in which the runs should start.

    A run starts after the run that it waits for. Longer assignments start first.
    """
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
    """Return how many runs must be trained one after another before this run can start."""
    depth = 0
    while assignment.after:
        assignment = assignments[assignment.after]
        depth += 1
    return depth
