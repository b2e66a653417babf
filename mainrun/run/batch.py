"""Runs that are known together: how many of their steps are the same, and what one of them must keep for the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mainrun.config import TrainConfig
from mainrun.core.device import Device
from mainrun.core.machine_class import versions
from mainrun.data.corpus import load_corpus
from mainrun.data.token_cache import TokenData, prepare
from mainrun.plan.plan import Plan
from mainrun.store import checkpoint, lineage, planner
from mainrun.store.nodes import Damaged, Store
from mainrun.store.rundir import RunDir


def resolved(configs: Iterable[TrainConfig]) -> tuple[dict[str, Plan], dict[str, list[str]]]:
    """The plan and the keys of each on this machine. Data that several have in common is read once."""
    read: dict[tuple[Any, ...], tuple[dict[str, str], TokenData]] = {}
    plans, chains, now = {}, {}, versions()
    for cfg in configs:
        machine, which = Device(cfg), tuple(getattr(cfg, field) for field in sorted(lineage.IN_TOKENS))
        if which not in read:
            with machine.leader_first():
                corpus = load_corpus(cfg)
                read[which] = corpus.fingerprints, prepare(cfg, corpus)
        fingerprints, data = read[which]
        plans[cfg.run_id] = plan = Plan(cfg, len(data.splits["train"]))
        machine.settle(cfg, plan)
        root = lineage.root(lineage.origin(cfg, fingerprints, data.digest, now, machine.machine_class))
        chains[cfg.run_id] = lineage.chain(root, plan)
    return plans, chains


def may_share(configs: Sequence[TrainConfig]) -> bool:
    """Whether any two could have a step in common: without reading any data."""
    names = [f for f in TrainConfig.model_fields if TrainConfig.class_of(f) == "static"]
    static = [tuple(str(getattr(cfg, f)) for f in names) for cfg in configs]
    return len(set(static)) < len(static)


@dataclass
class Shared:
    """A batch of runs, and what the store has of it already."""

    parts: planner.Batch
    keep: dict[
        str, list[int]
    ]  # of each run, the steps at which others part from it, or want a score that it does not take
    keys: list[str]  # of the nodes there
    chains: dict[str, list[str]]


def plan(configs: Iterable[TrainConfig], store: Store | None, out: Path | None = None) -> Shared:
    """out: where the runs' own directories are, some of them perhaps half-way or done."""
    plans, chains = resolved(configs)
    forks = planner.plan(chains)
    keys = {chains[part.name][step] for part in forks.parts for step in part.forks}
    for root in {chain[0] for chain in chains.values()}:
        alike = [name for name, chain in chains.items() if chain[0] == root]
        if len({(plans[name].eval_steps, plans[name].cfg.geometry) for name in alike}) > 1:
            keys |= {chains[name][step] for name in alike for step in plans[name].eval_steps}
    keep = {name: [step for step, key in enumerate(found) if key in keys] for name, found in chains.items()}
    stored = usable(store, plans, chains) if store else set()
    own = {name: _own(RunDir(out / name), plan) for name, plan in plans.items()} if out else {}
    return Shared(planner.plan(chains, stored, own), keep, sorted(keys), chains)


def _own(run: RunDir, plan: Plan) -> int:
    """The step that a run directory goes on from."""
    if run.summary():
        return plan.steps
    digest = plan.cfg.digest

    def usable(meta: dict[str, Any]) -> str:
        other = "it belongs to another config" if meta.get("digest") != digest else ""
        return checkpoint.fault(meta) or other

    found = checkpoint.load_newest(run.checkpoints, usable, lambda _: None)
    return found[1]["step"] if found else 0


def usable(store: Store, plans: dict[str, Plan], chains: dict[str, list[str]]) -> set[str]:
    """The key that each run can begin at."""
    try:
        states, keys = store.states(), store.node_keys()
        found = {
            name: _reach(store, states.keys(), keys, plans[name], chain) for name, chain in chains.items()
        }
    except OSError:  # a run that finds the same says so
        return set()
    at = {chains[name][step]: step for name, step in found.items() if step}
    # one that another run may not begin at, for want of a score, counts for neither: better to promise less
    return {
        key
        for key, step in at.items()
        if all(len(chain) <= step or chain[step] != key or found[n] >= step for n, chain in chains.items())
    }


def _reach(store: Store, states: Iterable[str], keys: set[str], plan: Plan, chain: list[str]) -> int:
    """The deepest step that a run gets to from node to node, having every score that it wants on the way."""
    step, there = 0, set(states)
    while True:
        for further in range(len(chain) - 1, step, -1):
            if chain[further] not in keys:
                continue
            try:
                node = store.node(chain[further])
                past = list(store.history(node, step))
            except Damaged:
                continue
            rows = (row for part in past if part.geometry == list(plan.cfg.geometry) for row in part.rows)
            scored = {row["step"] for row in rows if row["event"] == "eval"}
            if node.state in there and {s for s in plan.eval_steps if step < s < further} <= scored:
                step = further
                break
        else:
            return step
