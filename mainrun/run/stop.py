"""mainrun.run.stop"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopFlag:
    """The first SIGTERM or SIGINT asks for a stop between two steps; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is not threading.main_thread():
            return (
                self  # signals are the main thread's; a caller with threads of its own stops us its own way
            )
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._on)
        return self

    def _on(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def __exit__(self, *exc: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
