"""A worker is `mainrun train` in a process of its own: how it starts, on whatever machine; what its end means; when it is begun again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

from mainrun.errors import DiskFull, Diverged, Interrupted, UsageError
from sweeps.engine.protocol import Outcome, Task

# where whoever started it is gone nobody waits for it: it stops as on Ctrl-C, and everything is saved (Linux; elsewhere it goes on alone)
START = (
    "import sys, signal; sys.argv[0] = 'mainrun'\n"
    "if sys.platform == 'linux':\n"
    "    import ctypes, os; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.getppid() == {parent} or sys.exit(75)\n"
    "from mainrun.cli import main; main()\n"
)
PATIENCE = 20  # deaths of one task: then it is the task that kills
BUSY = "is being written by process"

End = tuple[int, str]  # exit code, negative where it was killed or lost; what it said on stderr
STOPPED: End = (Interrupted.exit_code, "")


def start(task: Task, folder: str | None = None) -> subprocess.Popen[str]:
    """In `folder`, from which relative names in a task are meant; None: the one we are in."""
    command = [
        sys.executable,
        "-c",
        START.format(parent=os.getpid()),
        "train",
        "--preset",
        task.preset,
        "--quiet",
    ]
    command += [
        "--out",
        str(task.out),
        "--store",
        str(task.store),
        *(part for text in task.sets for part in ("--set", text)),
    ]
    command += ["--until", str(task.until)] if task.until else []
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": str(task.threads)}, start_new_session=True,
    )  # fmt: skip


def insist(task: Task, once: Callable[[], End], closed: Callable[[], bool]) -> Outcome:
    """Try until it is done. A death is no answer, an error is: the next time it would be the same."""
    deaths = 0
    while not closed():
        code, said = once()
        if code == 0 or (code == Interrupted.exit_code and _came(said, task.until)):
            return Outcome(True)
        last = (
            said.strip().splitlines()[-1] if said.strip() else f"it ended with code {code} and said nothing"
        )
        if code == Diverged.exit_code:
            return Outcome(False, diverged=True, why=last)
        if (
            code == Interrupted.exit_code and "no space left" in last
        ):  # it is the study that must wait for space
            raise DiskFull(last.removeprefix("interrupted: "))
        if BUSY in said:  # a worker whom nobody waits for any more: it ends soon
            time.sleep(0.5)
            continue
        deaths += 1
        if code >= 0 and code != Interrupted.exit_code:
            return Outcome(False, refused=code == UsageError.exit_code, why=last)
        if deaths >= PATIENCE:
            return Outcome(False, why=f"its worker died {deaths} times: {last}")
    return Outcome(False, why="the driver stopped")


def _came(said: str, until: int) -> bool:
    """Stopped there, as it was asked to; or further on, where an earlier driver had it go on and was killed."""
    stopped = re.search(r"stopped at step (\d+) of", said)
    return bool(until and stopped and int(stopped[1]) >= until)
