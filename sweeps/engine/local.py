"""Workers on this machine: a subprocess a task, which ends with whoever started it, and is begun again where it was killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

from mainrun.errors import DiskFull, Diverged, Interrupted
from mainrun.host import cores
from sweeps.engine.protocol import Outcome, Task

# where the driver is gone nobody waits for the worker: it stops as on Ctrl-C, and everything is saved (Linux; elsewhere it goes on alone)
START = (
    "import sys, signal; sys.argv[0] = 'mainrun'\n"
    "if sys.platform == 'linux':\n"
    "    import ctypes, os; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.getppid() == {parent} or sys.exit(75)\n"
    "from mainrun.cli import main; main()\n"
)
PATIENCE = 20  # deaths of one task: then it is the task that kills
BUSY = "is being written by process"


class Local:
    def __init__(self, workers: int, threads: int) -> None:
        self.workers = workers or max(1, cores() // threads)
        self._live: set[subprocess.Popen[str]] = set()
        self._lock, self._closed = threading.Lock(), False

    def train(self, task: Task) -> Outcome:
        deaths = 0
        while not self._closed:
            code, said = self._once(task)
            if code == 0 or (code == Interrupted.exit_code and _came(said, task.until)):
                return Outcome(True)
            last = said.strip().splitlines()[-1] if said.strip() else f"it ended with code {code} and said nothing"
            if code == Diverged.exit_code:
                return Outcome(False, diverged=True, why=last)
            if code == Interrupted.exit_code and "no space left" in last:  # it is the study that must wait for space
                raise DiskFull(last.removeprefix("interrupted: "))
            if BUSY in said:  # a worker of a driver that is gone: it ends soon
                time.sleep(0.5)
                continue
            deaths += 1
            if code >= 0 and code != Interrupted.exit_code:  # an error, not a death: the next time it is the same
                return Outcome(False, why=last)
            if deaths >= PATIENCE:
                return Outcome(False, why=f"its worker died {deaths} times: {last}")
        return Outcome(False, why="the driver stopped")

    def _once(self, task: Task) -> tuple[int, str]:
        command = [sys.executable, "-c", START.format(parent=os.getpid()), "train", "--preset", task.preset, "--quiet"]
        command += ["--out", str(task.out)]
        command += ["--store", str(task.store), *(part for text in task.sets for part in ("--set", text))]
        command += ["--until", str(task.until)] if task.until else []
        env = os.environ | {"OMP_NUM_THREADS": str(task.threads)}
        with self._lock:
            if self._closed:
                return Interrupted.exit_code, ""
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env,
                start_new_session=True,
            )  # fmt: skip
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


def _came(said: str, until: int) -> bool:
    """Stopped there, as it was asked to; or further on, where an earlier driver had it go on and was killed."""
    stopped = re.search(r"stopped at step (\d+) of", said)
    return bool(until and stopped and int(stopped[1]) >= until)
