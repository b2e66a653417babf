"""Stop a run when the process receives a signal."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """Record SIGTERM and SIGINT, so that a run stops between two steps.

    A SIGINT that follows another signal stops the run immediately.
    """

    last = ""  # name of the last signal, even if the signal came too late to stop a session

    def __init__(self) -> None:
        self.name = ""  # name of the received signal; "" if no signal was received
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        StopSignal.last = self.name

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
