"""Notices training steps that wait for a busy processor."""

from __future__ import annotations

import time

WINDOW = 5.0  # seconds of steps that are looked at together
FACTOR = 2.0  # steps are slow if they take this many times the processor time that one thread used


class SlowSteps:
    """Warns once when steps on several threads take far longer than the processor time they use.

    Every matrix product waits for its slowest thread. If another process keeps one core busy, a run on all cores is
    therefore many times slower than a run on one.
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
        slow = self.wall * self.threads > FACTOR * self.processor
        self.on = not slow
        seconds = self.wall / self.steps
        used = self.processor / self.threads / self.steps
        self.steps = 0
        self.wall = 0.0
        self.processor = 0.0
        if not slow:
            return ""
        times = f"a step takes {seconds:.2g} s but only {used:.2g} s of processor time on each thread"
        fix = "if other processes keep the cores busy, --set threads=1 is faster"
        return f"{times}; {fix}"
