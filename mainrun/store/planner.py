"""What a batch of runs that are known together has to train: the tree of their segments. No torch.

Runs part where their keys part. Each segment of the tree is trained by one run: at a fork the run whose way on is the longest goes
on, the others begin from the node that it leaves there. So every run has a beginning of its own, and is ready as soon as the run
that passes there has passed. Nothing that waits for a run ends later than it does: its own way is the critical path, and of those
that are ready the one with the longest way goes first.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field


@dataclass
class Part:
    """What one run trains of the tree: the steps after `begin`, to `end`."""

    name: str
    begin: int
    end: int
    after: str | None  # the run that comes through `begin`; None: nobody has to be waited for
    forks: list[int] = field(default_factory=list)  # steps at which others begin, so at which a node is kept

    @property
    def steps(self) -> int:
        return self.end - self.begin


@dataclass
class Batch:
    """Runs in the order in which they are best begun."""

    parts: list[Part]
    asked: int

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.parts)


def plan(
    chains: Mapping[str, Sequence[str]], stored: Set[str] = frozenset(), own: Mapping[str, int] | None = None
) -> Batch:
    """chains: of each run, key[0] ... key[steps]. stored: keys that the store can give, so that nothing before them is trained.

    own: the step at which a run goes on by itself; up to there it leaves nothing for others.
    """
    parts: dict[str, Part] = {}
    begins: dict[tuple[int, str], list[str]] = {}
    for name, keys in chains.items():
        step = next((step for step in range(len(keys) - 1, 0, -1) if keys[step] in stored), 0)
        begins.setdefault((step, keys[step]), []).append(name)
    work: list[tuple[list[str], int, str | None]] = [
        (names, step, None) for (step, _), names in begins.items()
    ]
    while work:
        names, begin, after = work.pop()
        first, *others = sorted(
            names, key=lambda name: (-len(chains[name]), name)
        )  # the longest goes on at every fork
        start = max(begin, (own or {}).get(first, 0))
        part = parts[first] = Part(first, start, len(chains[first]) - 1, after if start == begin else None)
        apart: dict[tuple[int, str], list[str]] = {}
        without: list[str] = []
        for name in others:
            fork = shared(chains[first], chains[name])
            if fork <= start and start > begin:
                without.append(name)
                continue
            way = chains[name][fork + 1] if fork + 1 < len(chains[name]) else ""  # "": it ends there
            apart.setdefault((fork, way), []).append(name)
        part.forks = sorted({fork for fork, _ in apart if fork > start})
        if without:
            work.append((without, begin, after))
        work += [(group, fork, first if fork > begin else after) for (fork, _), group in apart.items()]
    order = sorted(parts.values(), key=lambda part: (_depth(part, parts), -part.steps, part.name))
    return Batch(_by_readiness(order), sum(len(keys) - 1 for keys in chains.values()))


def shared(a: Sequence[str], b: Sequence[str]) -> int:
    """The last step at which two chains are the same; they are up to there, and never again."""
    low, high = 0, min(len(a), len(b)) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[middle] == b[middle] else (low, middle - 1)
    return low


def _depth(part: Part, parts: dict[str, Part]) -> int:
    depth = 0
    while part.after:
        part, depth = parts[part.after], depth + 1
    return depth


def _by_readiness(order: list[Part]) -> list[Part]:
    """Nobody before the run that leaves its beginning; of the others the longest way first."""
    waiting: dict[str | None, list[tuple[int, int, Part]]] = {}
    for place, part in enumerate(order):
        waiting.setdefault(part.after, []).append((-part.steps, place, part))
    ready, found = waiting.get(None, []), []
    heapq.heapify(ready)
    while ready:
        part = heapq.heappop(ready)[2]
        found.append(part)
        for one in waiting.get(part.name, []):
            heapq.heappush(ready, one)
    return found
