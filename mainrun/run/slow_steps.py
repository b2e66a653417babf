"""Notices training steps that wait for a processor which other processes keep busy."""

from __future__ import annotations

import time

WINDOW = 5.0  # seconds of steps that are looked at together
LEAST_CORES = 1.1  # two threads that are not held up use more than this many cores on average


class SlowSteps:
    """Warns once when steps on several threads take far longer than the processor time that they use.

    Every matrix product waits for its slowest thread. If another process keeps one of two cores busy, a run
    on two threads is therefore many times slower than a run on one.
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
        """Stop the clocks after some steps. Return a warning the first time that they are slow, else ""."""
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
