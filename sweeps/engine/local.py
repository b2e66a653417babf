"""The engine `local`, which runs workers as processes on this machine.

On Linux, the workers are forked from a warm parent, and stop when the driver ends.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

from mainrun.core.hardware import cores
from sweeps.engine.protocol import Outcome, Task
from sweeps.engine.warm import WarmParent, WarmWorker
from sweeps.engine.worker import STOPPED, WorkerExit, run_until_done, start_worker

Worker = subprocess.Popen[str] | WarmWorker


class Local:
    """An engine that trains each task in a process of its own.

    If `workers` is 0, the number of workers is the number of CPU cores divided by `threads`.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self.workers = workers or max(1, cores() // threads)
        self._processes: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = threads
        self._ready: bool | None = None  # whether the warm parent can fork workers, once this is known
        # the thread that starts the warm parent must not end before it, so it is started here
        self._warm = WarmParent(threads) if sys.platform == "linux" else None

    def train(self, task: Task) -> Outcome:
        return run_until_done(task, lambda: self._run_worker(task), lambda: self._closed)

    def _run_worker(self, task: Task) -> WorkerExit:
        with self._lock:
            if self._closed:
                return STOPPED
            process = self._start(task)
            self._processes.add(process)
        _, stderr = process.communicate()
        with self._lock:
            self._processes.discard(process)
        return WorkerExit(process.returncode, stderr)

    def _start(self, task: Task) -> Worker:
        """Fork a worker from the warm parent, or start a new process if this is not possible."""
        if self._warm and task.threads == self._threads and self._is_ready():
            worker = self._warm.start(task)
            if worker:
                return worker
        return start_worker(task)

    def _is_ready(self) -> bool:
        """Return whether the warm parent can fork workers. The first call waits until it can."""
        if self._ready is None:
            assert self._warm is not None
            self._ready = self._warm.is_ready()
        return self._ready

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)
            # the workers would get a second signal if the warm parent ended before them
            if self._warm and not self._processes:
                self._warm.close()
                self._warm = None
