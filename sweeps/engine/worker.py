"""Start worker processes, which run `mainrun train`, and interpret their exit codes and messages."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from mainrun.errors import DiskFull, Diverged, Interrupted, UsageError
from sweeps.engine.protocol import Outcome, Task

START = (
    "import sys; from sweeps.engine.worker import die_with_parent\n"
    "die_with_parent({parent}); sys.argv[0] = 'mainrun'\n"
    "from mainrun.cli import main; main()\n"
)
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
MAX_DEATHS = 20  # a task fails when its workers have died this many times
# `mainrun train` prints this text if another process has locked the run.
RUN_IS_LOCKED = "is being written by process"


class WorkerExit(NamedTuple):
    """The exit code and the error output of a worker that has ended."""

    code: int  # the exit code, which is negative if the worker was killed or lost
    stderr: str


STOPPED = WorkerExit(Interrupted.exit_code, "")


def die_with_parent(parent: int) -> None:
    """Let this process receive SIGTERM when its parent ends. A worker then saves a checkpoint and stops.

    This works only on Linux. On other systems, a worker continues to train after its parent has ended.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent ended before the call
        sys.exit(Interrupted.exit_code)


def worker_arguments(task: Task) -> list[str]:
    """Return the arguments of the command `mainrun` that carries out a task."""
    arguments = ["train", "--preset", task.preset, "--quiet"]
    arguments += ["--out", str(task.out), "--store", str(task.store)]
    for setting in task.sets:
        arguments += ["--set", setting]
    if task.until:
        arguments += ["--until", str(task.until)]
    if task.keep:
        arguments += ["--keep", ",".join(map(str, task.keep))]
    return arguments


def start_worker(task: Task, folder: str | None = None) -> subprocess.Popen[str]:
    """Start a worker process for a task.

    The working directory of the worker is `folder`, or the current directory if `folder` is None. Relative
    paths in the task are relative to the working directory.
    """
    return subprocess.Popen(
        [sys.executable, "-c", START.format(parent=os.getpid()), *worker_arguments(task)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": str(task.threads)},
        start_new_session=True,
    )


def run_until_done(task: Task, run_worker: Callable[[], WorkerExit], closed: Callable[[], bool]) -> Outcome:
    """Run one worker after another until the task is done.

    If a worker is killed, a new worker resumes the task. If a worker reports an error, the task fails,
    because a new worker would report the same error.
    """
    deaths = 0
    while not closed():
        code, stderr = run_worker()
        interrupted = code == Interrupted.exit_code
        if code == 0 or (interrupted and _reached(task.until, stderr)):
            return Outcome(True)
        message = _last_line(stderr) or f"the worker ended with code {code} and without a message"
        if code == Diverged.exit_code:
            return Outcome(False, diverged=True, reason=message)
        if interrupted and "no space left" in message:  # stop the whole study if the disk is full
            raise DiskFull(message.removeprefix("interrupted: "))
        if RUN_IS_LOCKED in stderr:  # wait for a worker of an earlier driver to release the lock
            time.sleep(0.5)
            continue
        if code >= 0 and not interrupted:
            return Outcome(False, refused=code == UsageError.exit_code, reason=message)
        deaths += 1
        if deaths >= MAX_DEATHS:
            return Outcome(False, reason=f"its worker died {deaths} times: {message}")
    return Outcome(False, reason="the driver stopped")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _reached(until: int, stderr: str) -> bool:
    """Return whether a worker stopped at or after the step where its task ends.

    A worker stops at a later step if an earlier driver has already trained the run beyond the task's step.
    """
    stopped = re.search(r"stopped at step (\d+) of", stderr)
    return bool(until and stopped and int(stopped[1]) >= until)
