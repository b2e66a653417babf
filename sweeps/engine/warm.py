"""Start workers without waiting for Python and torch to be imported.

A small process, the warm parent, imports the trainer once and then waits for tasks. For each task, it forks a
supervisor, which forks the worker and reports the worker's exit code. A forked worker starts within
milliseconds, and otherwise behaves like a worker that was started as a new process.

The warm parent forks only while it has a single thread, because other threads would not survive a fork.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from sweeps.engine.protocol import Task
from sweeps.engine.worker import die_with_parent, worker_arguments

# The imports come first, so that forked workers need not repeat them. Only a worker returns from `serve`.
START = (
    "import sys; from sweeps.engine.warm import serve\n"
    "import mainrun.cli, mainrun.run.session, mainrun.run.summary\n"
    "sys.argv = ['mainrun', *serve(*sys.argv[1:])]; mainrun.cli.main()\n"
)
READY = b"ready\n"
LOST = -int(signal.SIGKILL)  # the exit code of a worker whose supervisor was lost


# -- in the driver


class WarmWorker:
    """A worker that was forked. The methods correspond to those of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket, errors: int) -> None:
        self._messages = connection.makefile("rb")
        self._errors = errors
        self.pid: int = json.loads(self._messages.readline())["pid"]
        self.returncode = LOST

    def communicate(self) -> tuple[None, str]:
        """Wait for the worker to end, and return its error output."""
        with open(self._errors, encoding="utf-8", errors="replace") as file:
            stderr = file.read()
        answer = self._messages.readline()
        self._messages.close()
        if answer:
            self.returncode = json.loads(answer)["code"]
        return None, stderr

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class WarmParent:
    """The driver's handle of a warm parent."""

    def __init__(self, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mainrun-")
        self.address = str(Path(self._folder.name) / "warm")
        # BLAS libraries of numpy and scipy would otherwise start threads when they are imported
        limits = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, self.address, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | limits,
            start_new_session=True,
        )

    def is_ready(self) -> bool:
        """Wait until the parent has imported the trainer. Return False if it cannot fork workers."""
        assert self.process.stdout is not None
        return self.process.stdout.readline() == READY

    def start(self, task: Task) -> WarmWorker | None:
        """Start a worker, or return None if the parent was lost."""
        reading, writing = os.pipe()
        try:
            connection = socket.socket(socket.AF_UNIX)
            with connection:
                connection.connect(self.address)
                request = json.dumps(worker_arguments(task)).encode() + b"\n"
                socket.send_fds(connection, [request], [writing])
                return WarmWorker(connection, reading)
        except (OSError, ValueError):  # no answer, or no connection
            os.close(reading)
            return None
        finally:
            os.close(writing)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._folder.cleanup()


# -- in the warm parent


def serve(address: str, driver: str) -> list[str]:
    """Fork a worker for each request. Return only in a worker, with the arguments of its command."""
    die_with_parent(int(driver))
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(64)
    if thread_count() != 1:
        sys.exit(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors that have ended need no wait
    os.write(1, READY)
    while True:
        connection, _ = server.accept()
        parent = os.getpid()
        if os.fork():
            connection.close()
            continue
        server.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent(parent)
        return supervise(connection)


def supervise(connection: socket.socket) -> list[str]:
    """Fork the worker of a request, and report its exit code. Return only in the worker."""
    data, errors = receive(connection)
    supervisor = os.getpid()
    worker = os.fork()
    if not worker:
        connection.close()
        become_worker(supervisor, errors)
        arguments: list[str] = json.loads(data)
        return arguments
    os.close(errors)
    with suppress(OSError):
        connection.sendall(json.dumps({"pid": worker}).encode() + b"\n")
    _, status = os.waitpid(worker, 0)
    with suppress(OSError):
        connection.sendall(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    os._exit(0)


def receive(connection: socket.socket) -> tuple[bytes, int]:
    """Return the line of a request, and the file descriptor that came with it."""
    data, descriptors, _, _ = socket.recv_fds(connection, 2**16, 1)
    while not data.endswith(b"\n"):
        part = connection.recv(2**16)
        if not part:
            sys.exit(1)
        data += part
    return data, descriptors[0]


def become_worker(supervisor: int, errors: int) -> None:
    """Give a forked process the surroundings of a worker that was started as a new process."""
    os.setsid()
    die_with_parent(supervisor)
    nothing = os.open(os.devnull, os.O_RDWR)
    for source, target in ((nothing, 0), (nothing, 1), (errors, 2)):
        os.dup2(source, target)
    for descriptor in (nothing, errors):
        os.close(descriptor)


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))
