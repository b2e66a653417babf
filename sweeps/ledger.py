"""Compute the cost of a study from the run directories of its runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mainrun.config import TrainConfig
from mainrun.errors import RunError
from mainrun.plan.cost import costs
from mainrun.store import records
from mainrun.store.rundir import RunDir

STEP_COSTS = {"step": records.at_least_one, "tokens": records.count, "seconds": records.not_negative}


@dataclass(frozen=True, slots=True)
class Ledger:
    """The cost of one or more runs.

    `asked` is the sum of `trained` and `reused`. The steps in `wasted` and `branch` are also part of
    `trained`.
    """

    asked: int = 0  # number of steps that were trained or reused
    trained: int = 0  # number of steps that were trained, including wasted steps
    reused: int = 0  # number of steps whose results were read from the store
    wasted: int = 0  # number of trained steps that were lost, or that belong to trials that ended early
    branch: int = 0  # number of trained steps of branches, which are used only to score a rung
    tokens: int = 0  # number of tokens in the trained steps
    flops: float = 0.0
    seconds: float = 0.0


def run_cost(run: RunDir, cfg: TrainConfig) -> Ledger:
    """Compute the cost of a run from its metrics.jsonl. If the run was never started, the cost is zero."""
    rows = [row for row in run.rows() if row["event"] == "step"]
    if not rows:
        return Ledger()
    for row in rows:
        fault = records.fault(row, STEP_COSTS)
        if fault:
            raise RunError(f"{run.path}/metrics.jsonl is damaged: a row {fault}; {run.fix}")
    step = 0
    tokens = 0
    reused = 0
    trained_tokens = 0
    seconds = 0.0
    for row in rows:  # each row covers the steps since the previous row
        if row.get("reused"):
            reused += row["step"] - step
        else:
            trained_tokens += row["tokens"] - tokens
            seconds += row["seconds"]
        step = row["step"]
        tokens = row["tokens"]
    # Steps that were lost when a worker was killed have no rows in metrics.jsonl. Assume that a lost step has
    # as many tokens as the average step of the run.
    wasted = int(run.env().get("carried", {}).get("wasted", 0))
    trained_tokens += wasted * tokens // step
    flops = trained_tokens * cfg.passes * costs(cfg, cfg.vocab_size)["flops_per_token"]
    return Ledger(
        asked=step + wasted,
        trained=step - reused + wasted,
        reused=reused,
        wasted=wasted,
        tokens=trained_tokens,
        flops=float(flops),
        seconds=seconds,
    )


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """Return the sum of several ledgers. Each field is summed separately."""
    ledgers = list(ledgers)
    sums = {name: sum(getattr(ledger, name) for ledger in ledgers) for name in Ledger.__dataclass_fields__}
    return Ledger(**sums)
