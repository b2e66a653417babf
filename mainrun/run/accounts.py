"""What a run has cost so far: seconds by activity, steps reused and wasted, resumes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Accounts:
    """The costs of a run over all its sessions. A checkpoint holds them next to the state."""

    def __init__(self) -> None:
        self.saved = 0  # the step of the last checkpoint
        self.resumed = 0  # sessions that continued from a checkpoint, or repeated lost steps
        # reused: steps read from the store; wasted: steps that were trained and then lost with a session
        self.ledger = {"reused": 0, "reused_tokens": 0, "wasted": 0}
        self.spent: dict[str, float] = {}  # seconds by activity
        self._inner = [0.0]  # seconds spent in clocks inside the current one

    def add(self, activity: str, seconds: float) -> None:
        self.spent[activity] = self.spent.get(activity, 0.0) + seconds

    @contextmanager
    def clock(self, activity: str) -> Iterator[None]:
        """Add the time of the block to an activity. A clock inside another one stops the outer one."""
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            inner = self._inner.pop()
            self._inner[-1] += elapsed
            self.add(activity, elapsed - inner)
