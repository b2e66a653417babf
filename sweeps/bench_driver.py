"""Measure the overhead of the driver of a study.

The trials of the benchmark take no time. The driver writes the trials to a SQLite database.

    python -m sweeps.bench_driver [TRIALS [SAMPLER]]

By default, the benchmark runs 10,000 trials with the random sampler.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mainrun.core.hardware import peak_memory
from sweeps.driver import Search
from sweeps.engine.protocol import Outcome, Task
from sweeps.ledger import Ledger
from sweeps.study import validate_study
from sweeps.trial import Trial


class InstantEngine:
    workers = 2

    def train(self, task: Task) -> Outcome:
        return Outcome(True)

    def close(self) -> None:
        pass


class InstantSearch(Search):
    """A search that computes artificial scores instead of reading scores from run directories."""

    def _count_train_tokens(self) -> int:
        return 10_000

    def trial_score(self, trial: Trial, step: int) -> float:
        return abs(float(trial.values.get("lr", 0.05)) - 0.02) + 1 / step

    def cost_of(self, trial: Trial) -> Ledger:
        return Ledger()


class Sample(NamedTuple):
    """The number of trials so far, and the resources that the process has used so far."""

    trials: int
    cpu_seconds: float
    seconds: float
    peak_mb: float


class BenchRow(NamedTuple):
    trials: int
    cpu_ms: float  # CPU time per trial since the previous row, in milliseconds
    ms: float  # elapsed time per trial since the previous row, in milliseconds
    peak_mb: float


def take_sample(trials: int) -> Sample:
    return Sample(trials, time.process_time(), time.monotonic(), peak_memory() / 2**20)


def bench(trials: int, sampler: str, folder: Path) -> Iterator[BenchRow]:
    """Run a study, and yield a row of measurements for each tenth of its trials."""
    data = {
        "name": "bench",
        "preset": "baseline",
        "set": {"dev_frac": 0.1},
        "space": {"lr": {"low": 1e-3, "high": 0.1, "log": True}, "dropout": {"low": 0.0, "high": 0.3}},
        "budget": {"trials": trials},
        "sampler": {"name": sampler},
        "rungs": {"at": [0.25]},
    }
    samples = [take_sample(0)]

    def tick() -> None:
        if len(search.trials) >= len(samples) * trials / 10:
            samples.append(take_sample(len(search.trials)))

    study = validate_study(data, "bench")
    search = InstantSearch(study, folder, InstantEngine(), lambda text: None, tick)
    search.run()
    for before, after in pairwise(samples):
        count = after.trials - before.trials
        cpu_ms = 1000 * (after.cpu_seconds - before.cpu_seconds) / count
        ms = 1000 * (after.seconds - before.seconds) / count
        yield BenchRow(after.trials, cpu_ms, ms, after.peak_mb)


def main() -> None:
    arguments = sys.argv[1:]
    trials = int(arguments[0]) if arguments else 10_000
    sampler = arguments[1] if len(arguments) > 1 else "random"
    print(f"{'trials':>7} {'ms CPU':>8} {'ms':>9} {'MB':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for row in bench(trials, sampler, Path(folder)):
            print(f"{row.trials:7,} {row.cpu_ms:8.2f} {row.ms:9.2f} {row.peak_mb:7.0f}")


if __name__ == "__main__":
    main()
