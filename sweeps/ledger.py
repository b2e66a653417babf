"""What the runs of a study cost, read from their run directories."""

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
    """The cost of some runs.

    Asked = trained + reused; wasted and branch steps are part of the trained ones.
    """

    asked: int = 0  # steps that the runs cover
    trained: int = 0  # steps that were computed for them
    reused: int = 0  # steps that were read from the store
    wasted: int = 0  # steps lost with a worker, or of trials that were not trained to their end
    branch: int = 0  # steps that only served to score a rung
    tokens: int = 0  # trained
    flops: float = 0.0
    seconds: float = 0.0


def run_cost(run: RunDir, cfg: TrainConfig) -> Ledger:
    """Read the cost of a run from its metrics. A run that was never started costs nothing."""
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
    for row in rows:  # a row covers the steps since the row before it
        if row.get("reused"):
            reused += row["step"] - step
        else:
            trained_tokens += row["tokens"] - tokens
            seconds += row["seconds"]
        step = row["step"]
        tokens = row["tokens"]
    # Steps that were lost with a worker have no rows any more, so the mean of the others is counted for them.
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
