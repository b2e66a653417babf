"""Detect training steps that are slow because other processes use the CPU cores."""

from __future__ import annotations

import time

WINDOW = 5.0  # seconds of training before each check
LEAST_CORES = 1.1  # the minimum average number of cores that two threads use if no thread waits


class SlowSteps:
    """Warn once if steps on several threads take much longer than their CPU time.

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
        """Stop the clocks after some steps. Return a warning the first time that steps are slow, or ""."""
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
        work = f"its {self.threads} threads compute {processor:.2g} s in all"
        step = f"a step takes {wall:.2g} s, of which {work}"
        return f"{step}: they wait for busy cores; --set threads=1 may be faster"
