"""Workers on this machine: a subprocess a task, which ends with whoever started it, and is begun again where it was killed."""

from __future__ import annotations

import signal
import subprocess
import threading

from mainrun.core.hardware import cores
from sweeps.engine.protocol import Outcome, Task
from sweeps.engine.worker import STOPPED, End, insist, start


class Local:
    def __init__(self, workers: int, threads: int) -> None:
        self.workers = workers or max(1, cores() // threads)
        self._live: set[subprocess.Popen[str]] = set()
        self._lock, self._closed = threading.Lock(), False

    def train(self, task: Task) -> Outcome:
        return insist(task, lambda: self._once(task), lambda: self._closed)

    def _once(self, task: Task) -> End:
        with self._lock:
            if self._closed:
                return STOPPED
            process = start(task)
            self._live.add(process)
        _, said = process.communicate()
        with self._lock:
            self._live.discard(process)
        return process.returncode, said

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._live:
                process.send_signal(signal.SIGTERM)
