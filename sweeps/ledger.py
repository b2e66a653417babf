"""Compute the cost of the runs of a study from their run directories."""

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
    """The cost of a set of runs.

    The asked steps are the sum of the trained and the reused steps. Wasted steps and branch steps are
    included in the trained steps.
    """

    asked: int = 0  # all steps of the runs
    trained: int = 0  # steps that were computed
    reused: int = 0  # steps that were read from the store
    wasted: int = 0  # trained steps that were lost, or that belong to trials that ended early
    branch: int = 0  # trained steps of branches, which only score a rung
    tokens: int = 0  # tokens of the trained steps
    flops: float = 0.0
    seconds: float = 0.0


def run_cost(run: RunDir, cfg: TrainConfig) -> Ledger:
    """Compute the cost of a run from its metrics. A run that was never started has no cost."""
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
    for row in rows:  # a row covers the steps since the previous row
        if row.get("reused"):
            reused += row["step"] - step
        else:
            trained_tokens += row["tokens"] - tokens
            seconds += row["seconds"]
        step = row["step"]
        tokens = row["tokens"]
    # Steps that were lost with a worker have no rows. Their tokens are estimated by the mean of other steps.
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
    """Add ledgers field by field."""
    ledgers = list(ledgers)
    sums = {name: sum(getattr(ledger, name) for ledger in ledgers) for name in Ledger.__dataclass_fields__}
    return Ledger(**sums)
