"""Runs that are known together: how many of their steps are the same, and what one of them must keep for the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mainrun.config import Plan, TrainConfig
from mainrun.corpus import load_corpus
from mainrun.machine import Machine, versions
from mainrun.store import lineage, planner
from mainrun.store.nodes import Damaged, Store
from mainrun.tokens import prepare


def chain(cfg: TrainConfig) -> list[str]:
    """A config's keys on this machine, its data read."""
    machine, corpus = Machine(cfg), load_corpus(cfg)
    with machine.leader_first():
        data = prepare(cfg, corpus)
    plan = Plan(cfg, len(data.splits["train"]))
    machine.settle(cfg, plan)
    return lineage.chain(lineage.root(lineage.origin(cfg, corpus.fingerprints, data.digest, versions(), machine.facts)), plan)


def may_share(configs: Sequence[TrainConfig]) -> bool:
    """Whether any two could have a step in common: without reading any data."""
    names = [f for f in TrainConfig.model_fields if TrainConfig.class_of(f) == "static"]
    static = [tuple(str(getattr(cfg, f)) for f in names) for cfg in configs]
    return len(set(static)) < len(static)


@dataclass
class Shared:
    """A batch of runs, and what the store has of it already."""

    parts: planner.Batch
    keep: dict[str, list[int]]  # of each run, the steps at which others part from it
    keys: list[str]  # of the nodes there


def plan(configs: Iterable[TrainConfig], store: Store | None) -> Shared:
    chains = {cfg.run_id: chain(cfg) for cfg in configs}
    forks = planner.plan(chains)
    keys = {chains[part.name][step] for part in forks.parts for step in part.forks}
    keep = {name: [step for step, key in enumerate(found) if key in keys] for name, found in chains.items()}
    return Shared(planner.plan(chains, usable(store, chains)) if store else forks, keep, sorted(keys))


def usable(store: Store, chains: dict[str, list[str]]) -> set[str]:
    """Keys on the chains whose state is there."""
    states, found = store.states(), set()
    for key in store.node_keys() & {key for keys in chains.values() for key in keys}:
        try:
            if store.node(key, rows=False).state in states:
                found.add(key)
        except Damaged:
            continue
    return found
