"""Count the seconds that a run spends per activity, its reused and wasted steps, and its resumes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Accounts:
    """Track the costs of a run over all its sessions. Checkpoints save these costs."""

    def __init__(self) -> None:
        self.saved = 0  # step of the last checkpoint
        self.resumed = 0  # number of sessions that continued from a checkpoint or repeated lost steps
        # Reused steps were read from the store. Wasted steps were trained, but lost when a session ended.
        self.ledger = {"reused": 0, "reused_tokens": 0, "wasted": 0}
        self.spent: dict[str, float] = {}  # seconds per activity
        self._inner = [0.0]  # contains, for each running clock, the seconds that its nested clocks measured

    def add(self, activity: str, seconds: float) -> None:
        self.spent[activity] = self.spent.get(activity, 0.0) + seconds

    @contextmanager
    def clock(self, activity: str) -> Iterator[None]:
        """Add the time of the `with` block to an activity. A nested clock pauses the outer clock."""
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            inner = self._inner.pop()
            self._inner[-1] += elapsed
            self.add(activity, elapsed - inner)
