"""The engine `local`, which runs workers as subprocesses on this machine.

On Linux, the workers stop when the driver ends.
"""

from __future__ import annotations

import signal
import subprocess
import threading

from mainrun.core.hardware import cores
from sweeps.engine.protocol import Outcome, Task
from sweeps.engine.worker import STOPPED, WorkerExit, run_until_done, start_worker


class Local:
    """An engine that trains each task in a subprocess.

    If `workers` is 0, the number of workers is the number of CPU cores divided by `threads`.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self.workers = workers or max(1, cores() // threads)
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def train(self, task: Task) -> Outcome:
        return run_until_done(task, lambda: self._run_worker(task), lambda: self._closed)

    def _run_worker(self, task: Task) -> WorkerExit:
        with self._lock:
            if self._closed:
                return STOPPED
            process = start_worker(task)
            self._processes.add(process)
        _, stderr = process.communicate()
        with self._lock:
            self._processes.discard(process)
        return WorkerExit(process.returncode, stderr)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)
