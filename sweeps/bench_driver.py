"""What the driver itself costs: trials of a trainer that returns at once, on SQLite, a tenth of them a line.

python -m sweeps.bench_driver [TRIALS [SAMPLER]]          10000 random
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from mainrun.core.hardware import peak_memory
from sweeps.driver import Search, Trial
from sweeps.engine.protocol import Outcome, Task
from sweeps.ledger import Ledger
from sweeps.study import checked


class AtOnce:
    workers = 2

    def train(self, task: Task) -> Outcome:
        return Outcome(True)

    def close(self) -> None:
        pass


class Untrained(Search):
    def _train_tokens(self) -> int:
        return 10_000

    def score(self, trial: Trial, step: int) -> float:
        return abs(float(trial.values.get("lr", 0.05)) - 0.02) + 1 / step

    def spent(self, trial: Trial) -> Ledger:
        return Ledger()


def bench(trials: int, sampler: str, folder: Path) -> Iterator[tuple[int, float, float, float]]:
    """Trials so far; milliseconds of each since the line before: of this process, and on the clock; its memory's peak in MB."""
    space = {"lr": {"low": 1e-3, "high": 0.1, "log": True}, "dropout": {"low": 0.0, "high": 0.3}}
    study = checked(
        {"name": "bench", "preset": "baseline", "set": {"dev_frac": 0.1}, "space": space, "budget": {"trials": trials},
         "sampler": {"name": sampler}, "rungs": {"at": [0.25]}},
        "bench",
    )  # fmt: skip
    seen = [(0, time.process_time(), time.monotonic(), peak_memory() / 2**20)]

    def tick() -> None:
        if len(search.trials) >= len(seen) * trials / 10:
            seen.append((len(search.trials), time.process_time(), time.monotonic(), peak_memory() / 2**20))

    search = Untrained(study, folder, AtOnce(), lambda text: None, tick)
    search.run()
    for (a, cpu_a, wall_a, _), (b, cpu_b, wall_b, memory) in pairwise(seen):
        yield b, 1000 * (cpu_b - cpu_a) / (b - a), 1000 * (wall_b - wall_a) / (b - a), memory


def main() -> None:
    trials, sampler = int((sys.argv[1:] or ["10000"])[0]), (sys.argv[2:] or ["random"])[0]
    print(f"{'trials':>7} {'ms CPU':>8} {'ms clock':>9} {'MB':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for count, cpu, wall, memory in bench(trials, sampler, Path(folder)):
            print(f"{count:7,} {cpu:8.2f} {wall:9.2f} {memory:7.0f}")


if __name__ == "__main__":
    main()
