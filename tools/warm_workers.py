"""Measure how much time the warm workers of the local engine save in the built-in study `demo`.

    python tools/warm_workers.py [REPETITIONS]

The study alternates between forked workers and workers that are started as new processes. Each run of the
study gets an empty directory. The command prints the wall-clock times, their medians and the ratio of the
medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

WARM = "from mainrun.cli import main; main()"
COLD = f"from sweeps.engine import local; local.WarmParent = lambda threads: None; {WARM}"
PROGRAMS = {"forked": WARM, "new processes": COLD}


def measure(program: str) -> float:
    """Run the study and return the seconds that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-c", program, "sweep", "run", "demo", "--out", folder],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return time.monotonic() - start


def main(repetitions: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(repetitions):
        for name, program in PROGRAMS.items():
            seconds[name].append(measure(program))
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"median with {name}: {median:.1f} s")
    print(f"ratio: {medians['new processes'] / medians['forked']:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
