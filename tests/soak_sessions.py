"""Start command-line sessions for the soak test, watch them, and disturb them at chosen moments.

A session is `mainrun ARGUMENTS` in its own process. The process is forked from one that has imported
everything and computed nothing, so it starts in milliseconds. A disturbance is a signal that is sent either
after some seconds or just before the n-th file operation of the session. A signal before a file operation
reliably interrupts the session between two operations.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import itertools
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Import these modules once, before the first session.
WARM = (
    "mainrun.cli",
    "mainrun.train",
    "mainrun.run.batch",
    "mainrun.ui.compare",
    "mainrun.core.moe",
    "mainrun.core.lora",
    "mainrun.growth.controller",
    "sweeps.cli",
    "sweeps.study",
    "sweeps.driver",
    "sweeps.confirm",
    "sweeps.export",
    "sweeps.folder",
    "sweeps.database",
    "sweeps.sampling",
    "sweeps.branch",
    "sweeps.engine.local",
    "torch",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "safetensors.torch",
    "optuna",
    "sqlalchemy",
    "sqlalchemy.dialects.sqlite",
    "scipy.stats",
    "pyarrow.parquet",
    "rich.console",
    "rich.table",
    "rich.box",
    "tomllib",
    "torch._dynamo",
)

DRIVER_LEVEL = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
FILE_OPERATIONS = frozenset(
    {
        "open",
        "os.rename",
        "os.link",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.truncate",
        "os.utime",
        "os.chmod",
        "os.listdir",
        "os.scandir",
    }
)
# Each entry has a purpose and a part of a path. A file operation has the purpose of the first entry whose
# part occurs in its path.
AREAS = (
    ("token cache", "/tokens"),
    ("checkpoint", "/checkpoints"),
    ("store", "/.store"),
    ("store", "/store/"),
    ("rows", "metrics.jsonl"),
    ("rows", "growth.jsonl"),
    ("end", "summary.json"),
    ("study", "/studies/"),
    ("start", ""),
)
NAMES = tuple(dict.fromkeys(name for name, _ in AREAS))
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT, "STOP": signal.SIGSTOP}
HANDLED = (signal.SIGINT, signal.SIGTERM)
# A session shares three numbers with its parent: how many file operations it has started, the area of the
# last operation, and how many signals it has sent to itself.
SHARED = struct.Struct("<III")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def warm_up() -> None:
    """Import all modules that a session needs."""
    os.environ.update(DRIVER_LEVEL)
    for name in ("MAINRUN_STORE", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    for name in WARM:
        importlib.import_module(name)
    typer_main = importlib.import_module("typer.main")
    # Build the Typer command once, because building it takes as long as running a small command.
    typer_main.get_command = functools.cache(typer_main.get_command)
    typer_main.get_command(importlib.import_module("mainrun.cli").app)
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Disturbance:
    """A signal that is sent before file operation number `operation`, or after `after` seconds.

    The kind WORKER kills a worker of a study.
    """

    kind: str
    after: float = 0.0
    operation: int = 0
    pause: float = 0.0  # seconds between STOP and CONT

    def __str__(self) -> str:
        moment = f"operation {self.operation}" if self.operation else f"{self.after:.2f} s"
        return f"{self.kind} at {moment}" + (f" for {self.pause:.2f} s" if self.pause else "")


@dataclass(frozen=True)
class Session:
    """The command of a session and its disturbances.

    Only file operations below `base` and `cache` are counted.
    """

    argv: tuple[str, ...]
    base: Path
    cache: Path
    log: Path
    disturbances: tuple[Disturbance, ...] = ()
    # Entries 0 and 1 are errors of time.time() in seconds. Entry 2 is the number of the call at which the
    # second error replaces the first.
    clock: tuple[float, float, int] = (0.0, 0.0, 0)
    file_limit: int = 0  # largest file size in bytes; 0 means no limit
    disk_is_full: bool = False  # the disk may run out of space
    limit: float = 120.0

    def __str__(self) -> str:
        parts = [str(disturbance) for disturbance in self.disturbances]
        parts += [f"files of at most {self.file_limit} bytes"] if self.file_limit else []
        parts += ["a full disk"] if self.disk_is_full and not self.file_limit else []
        parts += (
            [f"a clock that is wrong by {self.clock[0]:.0f} s, then {self.clock[1]:.0f} s"]
            if any(self.clock)
            else []
        )
        return ", ".join(parts) or "undisturbed"


@dataclass(frozen=True)
class Ending:
    """The result of a session.

    `code` is None if the session reached the time limit, and negative if a signal ended it.
    """

    session: Session
    code: int | None
    text: str
    seconds: float
    operations: int
    applied: tuple[tuple[str, str], ...]  # the kind and the area of each disturbance that happened

    def problem(self) -> str:
        """Return the problem with this ending, or an empty string if there is none."""
        kinds = {kind for kind, _ in self.applied}
        if self.code is None:
            return f"hangs: no end after {self.seconds:.0f} s"
        if "Traceback (most recent call last)" in self.text or "crash:" in self.text:
            return f"a crash with exit code {self.code}"
        allowed = {0}
        for kind in kinds & {"KILL", "TERM", "INT"}:
            allowed |= {-SIGNALS[kind], *(() if kind == "KILL" else (75,))}
        if "INT" in kinds:
            allowed.add(130)  # the command may not have set its signal handlers yet
        if self.session.disk_is_full:
            allowed.add(75)
        return "" if self.code in allowed else f"exit code {self.code}"


class Running:
    """A running session. Call `poll` regularly.

    While the session is stopped by a signal, `poll` calls `stopped`.
    """

    def __init__(self, session: Session, stopped: Callable[[], None] | None = None) -> None:
        self.session, self.stopped = session, stopped
        self.shared = mmap.mmap(-1, SHARED.size)
        self.begin = self.last = time.monotonic()
        self.applied: list[tuple[str, str]] = []
        self._waiting = list(session.disturbances)
        self._resume_at: float | None = None
        self._pause = 0.0
        self._own = 0  # number of signals from the session itself that are already counted
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)  # the child unblocks these signals
        self.pid = os.fork()
        if self.pid == 0:
            _run_session(session, self.shared)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def poll(self) -> Ending | None:
        now = time.monotonic()
        self._count_own()
        pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            self._hold(now)
            return None
        if pid:
            self._count_own()
            return self._end(os.waitstatus_to_exitcode(status))
        if self._resume_at is not None:
            if now >= self._resume_at:
                os.kill(self.pid, signal.SIGCONT)
                self._resume_at, self.last = None, now
            return None
        if now - self.begin > self.session.limit:
            self.destroy()
            return self._end(None)
        if self._waiting and not self._waiting[0].operation and now - self.last >= self._waiting[0].after:
            self._send(self._waiting.pop(0))
        return None

    def wait(self) -> Ending:
        ending = None
        while ending is None:
            ending = self.poll()
            time.sleep(0.003)
        return ending

    def destroy(self) -> None:
        """Kill the session and all processes that it has started."""
        for pid in [*descendants(self.pid), self.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _read(self) -> tuple[int, int, int]:
        return SHARED.unpack(self.shared[:])

    def _area(self) -> str:
        return NAMES[self._read()[1]]

    def _count_own(self) -> None:
        while self._own < self._read()[2]:
            self._own += 1
            disturbance = self._waiting.pop(0)
            self.last = time.monotonic()
            self.applied.append((disturbance.kind, self._area()))
            if disturbance.kind == "STOP":
                self._pause = disturbance.pause

    def _send(self, disturbance: Disturbance) -> None:
        self.last = time.monotonic()
        if disturbance.kind == "WORKER":
            workers = descendants(self.pid)[1:]  # the first descendant is the fork server
            if not workers:
                return
            target, number = workers[len(workers) // 2], signal.SIGKILL
        else:
            target, number = self.pid, SIGNALS[disturbance.kind]
        self._pause = disturbance.pause
        self.applied.append((disturbance.kind, self._area()))
        with suppress(ProcessLookupError):
            os.kill(target, number)

    def _hold(self, now: float) -> None:
        self._count_own()
        if self.stopped:
            self.stopped()
        self._resume_at = max(now + self._pause, time.monotonic())

    def _end(self, code: int | None) -> Ending:
        text = self.session.log.read_text(errors="replace") if self.session.log.exists() else ""
        operations = self._read()[0]
        self.shared.close()
        return Ending(
            self.session, code, text, time.monotonic() - self.begin, operations, tuple(self.applied)
        )


def descendants(pid: int) -> list[int]:
    """Return the ids of all direct and indirect child processes of a process."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        parents.setdefault(parent, []).append(int(name))
    known, queue = [], [pid]
    while queue:
        children = sorted(parents.get(queue.pop(0), []))
        known += children
        queue += children
    return known


def adopt_orphans() -> None:
    """Become the parent of orphaned processes, so that `wait_for_orphans` can wait for them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def wait_for_orphans(limit: float) -> bool:
    """Wait until all processes of ended sessions have exited.

    Return False if any of these processes had to be killed.
    """
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if not pid:
            time.sleep(0.01)
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return False


# -- in the session's process


def _run_session(session: Session, shared: mmap.mmap) -> None:
    """Run `mainrun ARGUMENTS` in this process and exit with its code."""
    code = 99
    try:
        os.setsid()
        _redirect(session.log)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        os.environ["MAINRUN_CACHE"] = str(session.cache)
        if session.argv[0] == "sweep":
            _use_fork_server(ForkServer(session.log.with_suffix("")))
        _set_clock(session.clock)
        if session.file_limit:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (session.file_limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )
        Probe(session, shared)
        code = run_main(session.argv)
    except KeyboardInterrupt:  # the session was interrupted before the command line started
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_main(argv: Sequence[str]) -> int:
    """Call the command line and return its exit code."""
    from mainrun.cli import main

    sys.argv = ["mainrun", *argv]
    code: Any = 0
    try:
        main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except Exception:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return int(code)


def _redirect(log: Path) -> None:
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        fd = os.open(path, flags, 0o644)
        os.dup2(fd, number)
        os.close(fd)
    os.dup2(1, 2)


def _set_clock(clock: tuple[float, float, int]) -> None:
    before, after, jump = clock
    if not before and not after:
        return
    real, calls = time.time, itertools.count()
    time.time = lambda: real() + (before if next(calls) < jump else after)


class Probe:
    """Counts the file operations of a session, and sends the signal that is due before an operation."""

    def __init__(self, session: Session, shared: mmap.mmap) -> None:
        self.bases = (str(session.base), str(session.cache))
        self.shared, self.operations, self.area, self.done = shared, 0, 0, 0
        self.disturbances = list(session.disturbances)
        self.lock = threading.Lock()
        sys.addaudithook(self.on_audit_event)

    def on_audit_event(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in FILE_OPERATIONS or not args:
            return
        path = args[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or not path.startswith(self.bases):
            return
        self.operations += 1
        kind = next(name for name, part in AREAS if part in path)
        self.area = NAMES.index(kind)
        disturbance = self.disturbances[0] if self.disturbances else None
        is_due = disturbance is not None and 0 < disturbance.operation <= self.operations
        if is_due:
            self.disturbances.pop(0)
            self.done += 1
        self.shared[:] = SHARED.pack(self.operations, self.area, self.done)
        if is_due:
            assert disturbance is not None
            os.kill(os.getpid(), SIGNALS[disturbance.kind])


# -- workers of a study


@dataclass(eq=False)
class Worker:
    """A stand-in for `subprocess.Popen` in the engine of a study."""

    fork_server: ForkServer
    number: int
    log: Path
    pid: int = 0
    returncode: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def communicate(self) -> tuple[None, str]:
        self.ended.wait()
        return None, self.log.read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        self.fork_server.send({"signal": number, "number": self.number})


class ForkServer:
    """A process that forks the workers of a study.

    The driver itself has threads, so it must not fork.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.numbers, self.workers = folder, itertools.count(), dict[int, Worker]()
        self.lock = threading.Lock()
        ours, theirs = socket.socketpair()
        driver = os.getpid()
        if os.fork() == 0:
            ours.close()
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != driver:
                os._exit(0)
            _serve_forks(theirs)
        theirs.close()
        self.socket = ours
        threading.Thread(target=self._listen, daemon=True).start()

    def popen(self, command: list[str], *, env: dict[str, str], cwd: str | None = None, **_: Any) -> Worker:
        """Start a worker in place of `subprocess.Popen`.

        The command consists of an interpreter, -c, a program and its arguments.
        """
        with self.lock:
            number = next(self.numbers)
            worker = self.workers[number] = Worker(self, number, self.folder / f"worker-{number}.log")
        changed = {name: value for name, value in env.items() if os.environ.get(name) != value}
        self.send({"number": number, "argv": command[3:], "env": changed, "cwd": cwd, "log": str(worker.log)})
        return worker

    def send(self, message: dict[str, Any]) -> None:
        with self.lock, suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        with self.socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                worker = self.workers[message["number"]]
                worker.returncode = message["code"]
                worker.ended.set()


def _use_fork_server(fork_server: ForkServer) -> None:
    worker = importlib.import_module("sweeps.engine.worker")
    worker.subprocess = SimpleNamespace(Popen=fork_server.popen, DEVNULL=-3, PIPE=-1)


def _serve_forks(channel: socket.socket) -> None:
    """Fork a worker for each request and report its exit code. This function never returns."""
    channel.settimeout(0.01)
    pids: dict[int, int] = {}
    rest = b""
    while True:
        with suppress(TimeoutError):
            data = channel.recv(1 << 16)
            if not data:
                os._exit(0)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _handle_request(json.loads(line), pids, channel)
        for number, pid in list(pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del pids[number]
                channel.sendall(
                    json.dumps({"number": number, "code": os.waitstatus_to_exitcode(status)}).encode() + b"\n"
                )


def _handle_request(message: dict[str, Any], pids: dict[int, int], channel: socket.socket) -> None:
    number, fork_server = message["number"], os.getpid()
    if "signal" in message:
        if number in pids:
            os.kill(pids[number], message["signal"])
        return
    pid = os.fork()
    if pid:
        pids[number] = pid
        return
    code = 99
    try:
        channel.close()
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != fork_server:
            os._exit(75)
        _redirect(Path(message["log"]))
        os.environ.update(message["env"])
        if message["cwd"]:
            os.chdir(message["cwd"])
        code = run_main(message["argv"])
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
