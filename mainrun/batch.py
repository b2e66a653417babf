"""Runs that are known together: how many of their steps are the same, and what one of them must keep for the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mainrun.config import Plan, TrainConfig
from mainrun.corpus import load_corpus
from mainrun.machine import Machine, versions
from mainrun.store import lineage, planner
from mainrun.store.nodes import Damaged, Store
from mainrun.tokens import TokenData, prepare


def chains_of(configs: Iterable[TrainConfig]) -> dict[str, list[str]]:
    """The keys of each on this machine. Data that several have in common is read once."""
    read: dict[tuple[Any, ...], tuple[dict[str, str], TokenData]] = {}
    found, now = {}, versions()
    for cfg in configs:
        machine, which = Machine(cfg), tuple(getattr(cfg, field) for field in sorted(lineage.IN_TOKENS))
        if which not in read:
            with machine.leader_first():
                corpus = load_corpus(cfg)
                read[which] = corpus.fingerprints, prepare(cfg, corpus)
        fingerprints, data = read[which]
        plan = Plan(cfg, len(data.splits["train"]))
        machine.settle(cfg, plan)
        found[cfg.run_id] = lineage.chain(lineage.root(lineage.origin(cfg, fingerprints, data.digest, now, machine.facts)), plan)
    return found


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
    chains: dict[str, list[str]]


def plan(configs: Iterable[TrainConfig], store: Store | None) -> Shared:
    chains = chains_of(configs)
    forks = planner.plan(chains)
    keys = {chains[part.name][step] for part in forks.parts for step in part.forks}
    keep = {name: [step for step, key in enumerate(found) if key in keys] for name, found in chains.items()}
    return Shared(planner.plan(chains, usable(store, chains)) if store else forks, keep, sorted(keys), chains)


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
