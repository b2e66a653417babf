"""Detect training steps that are slow because other processes use the CPU cores."""

from __future__ import annotations

import time

WINDOW = 5.0  # seconds of training before each check
LEAST_CORES = 1.1  # if several threads use fewer cores than this on average, they wait for cores


class SlowSteps:
    """Warn once if the threads of a training step spend much of their time waiting for CPU cores.

    Every matrix product waits for its slowest thread. If another process uses one of two cores, a run on two
    threads is therefore many times slower than a run on one thread.
    """

    def __init__(self, threads: int, device: str) -> None:
        self.threads = threads
        self.on = device == "cpu" and threads > 1
        self.steps = 0
        self.wall = 0.0
        self.processor = 0.0
        self._started = (0.0, 0.0)

    def start(self) -> None:
        """Start the clocks before a step."""
        if self.on:
            self._started = (time.perf_counter(), time.process_time())

    def check(self, steps: int) -> str:
        """Stop the clocks. Return a warning if these steps are the first slow steps, or an empty string."""
        if not self.on:
            return ""
        self.steps += steps
        self.wall += time.perf_counter() - self._started[0]
        self.processor += time.process_time() - self._started[1]
        if self.wall < WINDOW:
            return ""
        warning = ""
        if self.processor < LEAST_CORES * self.wall:
            self.on = False
            warning = self._warning()
        self.steps = 0
        self.wall = 0.0
        self.processor = 0.0
        return warning

    def _warning(self) -> str:
        wall = self.wall / self.steps
        processor = self.processor / self.steps
        work = f"its {self.threads} threads compute for only {processor:.2g} s in total"
        step = f"a step takes {wall:.2g} s, but {work}"
        return f"{step}, because they wait for busy cores; --set threads=1 may be faster"
