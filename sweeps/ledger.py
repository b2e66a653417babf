"""What trials cost: asked = trained + reused, in steps; wasted and branch are within trained. Read from the run directories."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mainrun.config import TrainConfig
from mainrun.errors import RunError
from mainrun.plan.cost import costs
from mainrun.store import records
from mainrun.store.rundir import RunDir

COSTS = {"step": records.at_least_one, "tokens": records.count, "seconds": records.not_negative}  # of a row of a step


@dataclass(frozen=True, slots=True)
class Ledger:
    asked: int = 0  # steps
    trained: int = 0
    reused: int = 0
    wasted: int = 0
    branch: int = 0  # trained to score rungs: of a trial that is done they are its price, and not wasted
    tokens: int = 0  # trained
    flops: float = 0.0
    seconds: float = 0.0


def spent(run: RunDir, cfg: TrainConfig) -> Ledger:
    rows = [row for row in run.rows() if row["event"] == "step"]
    if not rows:
        return Ledger()
    if fault := next((fault for row in rows if (fault := records.fault(row, COSTS))), ""):
        raise RunError(f"{run.path}/metrics.jsonl is damaged: a row {fault}; {run.fix}")
    last = reused = tokens = 0
    before = 0
    for row in rows:  # a row stands for the steps since the one before it
        steps, more = row["step"] - last, row["tokens"] - before
        if row.get("reused"):
            reused += steps
        else:
            tokens += more
        last, before = row["step"], row["tokens"]
    wasted = int(run.env().get("carried", {}).get("wasted", 0))
    tokens += (
        wasted * before // last
    )  # lost with a worker: their rows are gone, they had what the others have in the mean
    flops = tokens * cfg.passes * costs(cfg, cfg.vocab_size)["flops_per_token"]
    seconds = sum(row["seconds"] * 1.0 for row in rows if not row.get("reused"))
    return Ledger(last + wasted, last - reused + wasted, reused, wasted, 0, tokens, float(flops), seconds)


def total(parts: Iterable[Ledger]) -> Ledger:
    found = list(parts)
    return Ledger(*(sum(getattr(part, name) for part in found) for name in Ledger.__dataclass_fields__))
