"""Find the training steps that several runs share, and the stored states that these runs need."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mainrun.config import TrainConfig, mixture_of
from mainrun.core.device import Device
from mainrun.core.machine_class import versions
from mainrun.data.corpus import load_corpus
from mainrun.data.token_cache import TokenData, prepare
from mainrun.plan.plan import Plan
from mainrun.store import checkpoint, lineage, planner
from mainrun.store.nodes import Damaged, Node, Store
from mainrun.store.rundir import RunDir
from mainrun.train import check_start


@dataclass
class SharedBatch:
    """The steps that a batch of runs must train, and the stored states through which runs share steps."""

    assignments: planner.Assignments
    keep: dict[str, list[int]]  # for each run, the steps whose states other runs need
    keys: list[str]  # the keys of the nodes in `keep`
    chains: dict[str, list[str]]


def share_steps(configs: Iterable[TrainConfig], store: Store | None, out: Path | None = None) -> SharedBatch:
    """Find the training steps that the runs of a batch share.

    out: the folder that contains the run directories.
    """
    plans, chains = resolve(configs)
    keys = _keys_to_keep(plans, chains)
    keep: dict[str, list[int]] = {}
    for name, chain in chains.items():
        keep[name] = [step for step, key in enumerate(chain) if key in keys]
    stored: set[str] = set()
    if store:
        stored = starting_keys(store, plans, chains)
    resumed: dict[str, int] = {}
    if out:
        for name, plan in plans.items():
            resumed[name] = _resumed_step(RunDir(out / name), plan)
    return SharedBatch(planner.assign(chains, stored, resumed), keep, sorted(keys), chains)


def resolve(configs: Iterable[TrainConfig]) -> tuple[dict[str, Plan], dict[str, list[str]]]:
    """Return the plan of each run and the store keys of its steps. Shared data is loaded only once."""
    read: dict[tuple[Any, ...], tuple[dict[str, str], TokenData]] = {}
    plans = {}
    chains = {}
    current = versions()
    for cfg in configs:
        device = Device(cfg)
        data_fields = tuple(getattr(cfg, field) for field in sorted(lineage.IN_TOKENS))
        if data_fields not in read:
            with device.leader_first():
                corpus = load_corpus(cfg)
                read[data_fields] = (corpus.fingerprints, prepare(cfg, corpus))
        fingerprints, data = read[data_fields]
        plan = Plan(cfg, len(data.splits["train"]))
        device.settle(cfg, plan)
        start = check_start(cfg, data)
        origin = lineage.origin(cfg, fingerprints, data.digest, current, device.machine_class, start)
        plans[cfg.run_id] = plan
        chains[cfg.run_id] = lineage.chain(lineage.root(origin), plan)
    return plans, chains


def may_share(configs: Sequence[TrainConfig]) -> bool:
    """Return whether any two configs are similar enough for their runs to share a step."""
    fields = [field for field in TrainConfig.model_fields if TrainConfig.class_of(field) == "static"]
    static = {tuple(str(getattr(cfg, field)) for field in fields) for cfg in configs}
    return len(static) < len(configs)


def _keys_to_keep(plans: dict[str, Plan], chains: dict[str, list[str]]) -> set[str]:
    """Return the keys of the states that the runs of a batch need from each other.

    Runs need the states at which they fork. If runs with the same first key are scored at different steps or
    in different ways, they also need the states at all scored steps.
    """
    keys: set[str] = set()
    for assignment in planner.assign(chains).order:
        keys.update(chains[assignment.name][step] for step in assignment.forks)
    for root in {chain[0] for chain in chains.values()}:
        names = [name for name, chain in chains.items() if chain[0] == root]
        scorings = {
            (plans[name].eval_steps, plans[name].cfg.geometry, plans[name].cfg.mixture) for name in names
        }
        if len(scorings) > 1:
            for name in names:
                keys.update(chains[name][step] for step in plans[name].eval_steps)
    return keys


def scoring_of(plan: Plan) -> tuple[list[int], tuple[Any, ...]]:
    """Return what the scores of a run depend on, besides its weights."""
    return list(plan.cfg.geometry), plan.cfg.mixture


def _resumed_step(run: RunDir, plan: Plan) -> int:
    """Return the step from which a run would resume. For a finished run, return its last step."""
    if run.summary():
        return plan.steps

    def usable(meta: dict[str, Any]) -> str:
        if meta.get("digest") != plan.cfg.digest:
            return "it belongs to another config"
        return checkpoint.fault(meta)

    loaded = checkpoint.load_newest(run.checkpoints, usable, lambda _: None)
    if loaded is None:
        return 0
    return loaded[1]["step"]


def starting_keys(store: Store, plans: dict[str, Plan], chains: dict[str, list[str]]) -> set[str]:
    """Return the keys of the stored nodes from which the runs can start."""
    reached: dict[str, int] = {}
    try:
        states = store.states()
        keys = store.node_keys()
        for name, chain in chains.items():
            reached[name] = _reachable_step(store, states, keys, plans[name], chain)
    except OSError:  # every run reports this error when it opens the store
        return set()
    # Remove each node that another run shares but cannot reach, because a score is missing.
    starts = {chains[name][step]: step for name, step in reached.items() if step}
    for name, chain in chains.items():
        for key, step in list(starts.items()):
            if step < len(chain) and chain[step] == key and reached[name] < step:
                del starts[key]
    return set(starts)


def _reachable_step(
    store: Store, states: Container[str], keys: Container[str], plan: Plan, chain: list[str]
) -> int:
    """Return the last step that a run can reach by reusing stored nodes, without missing a required score."""
    step = 0
    while True:
        for target in range(len(chain) - 1, step, -1):
            if chain[target] in keys and _can_use(store, states, plan, chain[target], step, target):
                step = target
                break
        else:
            return step


def _can_use(store: Store, states: Container[str], plan: Plan, key: str, step: int, target: int) -> bool:
    """Return whether a run at `step` can continue from a node at `target`."""
    try:
        node = store.node(key)
        path: list[Node] = list(store.history(node, step))
    except Damaged:
        return False
    scored: set[int] = set()
    for ancestor in path:
        if (ancestor.geometry, mixture_of(ancestor.config)) == scoring_of(plan):
            scored.update(row["step"] for row in ancestor.rows if row["event"] == "eval")
    needed = {score for score in plan.eval_steps if step < score < target}
    return node.state in states and needed <= scored
