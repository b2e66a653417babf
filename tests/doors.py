"""Run the command line thousands of times with odd input.

Each case runs in a child process, forked from a process that has imported everything. A case passes if the
command ends in time with a documented exit code and at most one readable message. `Driver.run` runs a case.
`Outcome.problem` returns the reason why a case failed, or an empty string.

    with Driver() as driver:
        outcome = driver.run(["presets", "no-such-preset"], cwd=tmp_path)
    assert not outcome.problem(), outcome.problem()
"""

from __future__ import annotations

import argparse
import errno
import functools
import gc
import importlib
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutate import whole_number

ROOT = Path(__file__).parents[1]

# Import these modules once, before the first fork. Their import starts no threads, which a fork would lose.
WARM = (
    "mainrun.cli", "mainrun.config", "mainrun.data.sources", "mainrun.train", "mainrun.run.session",
    "mainrun.ui.sample", "mainrun.checks.guards", "mainrun.ui.compare", "mainrun.ui.doctor",
    "mainrun.ui.demo", "mainrun.ui.estimate", "mainrun.run.batch", "mainrun.growth.verify",
    "mainrun.plan.simulate", "sweeps.study", "sweeps.driver", "reports.evidence.pdf",
    "reports.submission.bundle", "reports.submission.prepare", "reports.submission.verification", "torch",
    "numpy", "tokenizers", "sentencepiece", "safetensors.torch", "optuna", "sqlalchemy", "scipy.stats",
    "matplotlib.figure", "matplotlib.backends.backend_svg", "reportlab.platypus", "svglib.svglib", "pypdf",
    "pyarrow.parquet", "huggingface_hub", "rich.console", "rich.table", "rich.text", "rich.box", "tomllib",
    "yaml", "ctypes", "difflib", "http.client", "urllib.request", "concurrent.futures", "multiprocessing",
)  # fmt: skip

OURS = ("mainrun", "sweeps", "reports")

# Every command may exit with 0, 2 or 75. This table lists the additional exit codes of each command.
OTHER_CODES = {
    "train": {3},  # the loss became NaN
    "demo": {3},
    "doctor": {1},  # a check found a problem that must be fixed before training
    "submit": {1},  # the upload failed
    "verify": {1},  # the bundle does not match its manifest
    "store verify": {1},  # a file is damaged
    "store audit": {1},  # retraining a segment changed the result
    "grow verify": {1},  # an op violates its contract
    "bench lineage": {1},  # reusing the steps of another run changed the result
    "bench gpu": {1},  # two runs differ
}
MESSAGES = {"demo": 2}  # `demo` and the command that it runs print one message each
LONGEST_MESSAGE = 3000
MOST_OUTPUT = 1 << 20  # output after this many bytes is truncated
PREFIX = re.compile(r"^(error|interrupted|diverged|crash)( in process [^\n:]*)?: ?", re.MULTILINE)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    `code` is None if the command was killed at the time limit, and negative if a signal ended it.
    """

    command: str
    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def message(self) -> str:
        """The error message without its prefix, or an empty string if there is none."""
        match = PREFIX.search(self.err)
        return self.err[match.end() :].strip() if match else ""

    def problem(self, allowed: Sequence[int] = (), stderr_is_read: bool = True) -> str:
        """Return the reason why the case failed, or an empty string if it passed.

        `allowed` lists additional exit codes that count as correct.
        """
        if self.code is None:
            return f"hangs: no end after {self.seconds:.0f} s"
        for name, text in (("stdout", self.out), ("stderr", self.err)):
            if "Traceback (most recent call last)" in text or "Exception ignored" in text:
                return f"a traceback in {name}"
        if "crash" in {match[1] for match in PREFIX.finditer(self.err)}:
            return f"a crash: {self.message[:200]}"
        if self.code not in {0, 2, 75, *OTHER_CODES.get(self.command, ()), *allowed}:
            return f"exit code {self.code}"
        return self._problem_of_message() if stderr_is_read else ""

    def _problem_of_message(self) -> str:
        messages = len(PREFIX.findall(self.err))
        if self.code == 0 and messages:
            return "exit code 0 with an error message"
        if self.code in (2, 75) and messages == 0:
            return f"exit code {self.code} without a message"
        if messages > MESSAGES.get(self.command, 1):
            return f"{messages} error messages"
        if messages and not self.message:
            return "an empty message"
        if len(self.message) > LONGEST_MESSAGE:
            return f"a message of {len(self.message):,} characters"
        control = CONTROL.search(self.err)
        if control:
            return f"a control character in stderr: {control[0]!r}"
        return ""


def command_of(argv: Sequence[str]) -> str:
    """Return the name of a command, such as `train` or `store verify`."""
    groups = {name.split()[0] for name in OTHER_CODES if " " in name}
    return " ".join(argv[: 2 if argv and argv[0] in groups else 1])


@dataclass
class Driver:
    """A process that has imported everything and forks one child per case.

    Use a driver as a context manager and from a single thread.

    `tree` is the root of the code under test. With `tree=None`, the process imports only libraries, and each
    case imports the code in its folder. `env` changes the environment of the interpreter, for example its
    locale. With `warm=False`, the process imports only the command line.
    """

    tree: Path | None = ROOT
    env: Mapping[str, str] = field(default_factory=dict)
    warm: bool = True
    limit: float = 60.0

    def __enter__(self) -> Driver:
        quiet = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MPLBACKEND": "agg",
        }
        closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}
        path = {"PYTHONPATH": str(self.tree)} if self.tree else {}
        env = os.environ | quiet | closed | path | dict(self.env)
        for name in ("MAINRUN_STORE", "RANK", "WORLD_SIZE", "COLUMNS", "HF_HUB_OFFLINE"):
            env.pop(name, None)
        self.home = tempfile.mkdtemp(prefix="doors-")
        env |= {"HOME": self.home, "MPLCONFIGDIR": self.home, "MAINRUN_CACHE": f"{self.home}/cache"}
        command = [sys.executable, __file__, "--serve", *self._imports()]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=self.home
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(30)
        shutil.rmtree(self.home, ignore_errors=True)

    def _imports(self) -> list[str]:
        """Return the modules that the process imports before the first case."""
        if not self.tree:
            return [name for name in WARM if not name.startswith(OURS)]
        return list(WARM if self.warm else WARM[:1])

    def run(
        self,
        argv: Sequence[str | bytes],
        cwd: Path | str,
        env: Mapping[str, str | None] | None = None,
        stdin: str = "null",
        stdout: str = "file",
        stderr: str = "file",
        limit: float | None = None,
    ) -> Outcome:
        """Run `mainrun *argv` in the folder `cwd`.

        `env` sets environment variables; the value None removes a variable.

        `stdin` is "null", "none" (the descriptor does not exist) or "text:TEXT". `stdout` and `stderr` are
        "file", "pipe", "none", "closed" (a pipe that nobody reads) or "full" (/dev/full). The outcome
        contains the output only for "file" and "pipe".
        """
        words = [os.fsdecode(word) for word in argv]
        case = {
            "argv": words,
            "cwd": str(cwd),
            "env": dict(env or {}),
            "stdin": stdin,
            "stdout": stdout,
            "stderr": stderr,
        }
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(case | {"limit": limit or self.limit}).encode() + b"\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(f"the driver's process has ended with exit code {self.server.wait(10)}")
        return Outcome(command_of(words), **json.loads(line))


# -- forking the cases


def serve(modules: list[str]) -> None:
    """Read one case per line from stdin, run it and write its outcome, until stdin is closed.

    modules: the modules to import before the first case.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    channel = os.fdopen(os.dup(1), "wb")
    requests = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    for fd in (null, channel.fileno(), requests.fileno()):
        os.set_inheritable(fd, False)
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as e:  # another version of the code may lack this module
            if name == WARM[0] or not name.startswith(OURS):
                raise RuntimeError(f"{name} cannot be imported") from e
    typer_main = importlib.import_module("typer.main")
    if WARM[0] in modules:
        # Build the Typer command once, because building it takes as long as running a small command.
        typer_main.get_command = functools.cache(typer_main.get_command)
        typer_main.get_command(importlib.import_module("mainrun.cli").app)
    gc.collect()
    gc.freeze()
    for line in requests:
        case = json.loads(line)
        channel.write(json.dumps(_run_case(case, (channel, requests))).encode() + b"\n")
        channel.flush()


def _run_case(case: dict[str, Any], channels: tuple[io.BufferedWriter, io.BufferedReader]) -> dict[str, Any]:
    streams = {name: _stream(case[name]) for name in ("stdout", "stderr")}
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        log = os.dup(2)  # for tracebacks from this file
        try:
            for file in channels:
                os.close(file.fileno())
            _child(case, {name: write for name, (_, write) in streams.items()})
        except BaseException:
            os.write(log, traceback.format_exc().encode())
        finally:
            os._exit(99)
    for _, write in streams.values():
        if write is not None:
            os.close(write)
    pipes = {
        read: bytearray()
        for kind, (read, _) in zip(streams, streams.values(), strict=True)
        if read is not None and case[kind] == "pipe"
    }
    code = _wait(pid, begin + case["limit"], pipes)
    seconds = time.monotonic() - begin
    texts = {}
    for name, (read, _) in streams.items():
        data = b""
        if read is not None:
            data = bytes(pipes[read]) if read in pipes else os.pread(read, MOST_OUTPUT, 0)
            os.close(read)
        texts[name] = data[:MOST_OUTPUT].decode(errors="surrogateescape")
    return {"code": code, "out": texts["stdout"], "err": texts["stderr"], "seconds": seconds}


def _stream(kind: str) -> tuple[int | None, int | None]:
    """Open a stream. Return its read and write descriptors."""
    if kind == "none":
        return None, None
    if kind == "full":
        return None, os.open("/dev/full", os.O_WRONLY)
    if kind == "file":
        fd = os.memfd_create("stream")
        return fd, os.dup(fd)
    read, write = os.pipe()
    if kind == "closed":
        os.close(read)
        return None, write
    return read, write


def _wait(pid: int, end: float, pipes: dict[int, bytearray]) -> int | None:
    """Wait for a child and return its exit code, or None if it exceeds the time limit.

    Afterwards, kill all processes that the child has started.
    """
    ended = os.pidfd_open(pid)
    waiting = [ended, *pipes]
    late = False
    while ended in waiting:
        ready, _, _ = select.select(waiting, [], [], max(0, end - time.monotonic()))
        if not ready:
            late = True
            break
        for fd in ready:
            if fd == ended:
                waiting.remove(ended)
                continue
            data = os.read(fd, 1 << 16)
            pipes[fd] += data
            if not data:
                waiting.remove(fd)
    os.close(ended)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    for fd, data in pipes.items():
        while rest := os.read(fd, 1 << 16):
            data += rest
    return None if late else os.waitstatus_to_exitcode(status)


def _child(case: dict[str, Any], writes: dict[str, int | None]) -> None:
    """Run a case in the forked child as if a shell had started the command."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _redirect(case["stdin"], writes)
    os.chdir(case["cwd"])
    for name, value in case["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = _decode(value)
    sys.argv = ["mainrun", *map(_decode, case["argv"])]
    if WARM[0] not in sys.modules:
        sys.path.insert(0, case["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from mainrun.cli import main

    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
        code = 1
    os._exit(_finish(code))


def _decode(text: str) -> str:
    """Decode a command-line argument as Python does in the current locale.

    If the text cannot be encoded, return it unchanged, because no shell could pass it.
    """
    try:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return text


def _redirect(stdin: str, writes: dict[str, int | None]) -> None:
    if stdin.startswith("text:"):
        fd = os.memfd_create("stdin")
        os.write(fd, stdin.removeprefix("text:").encode(errors="surrogateescape"))
        os.lseek(fd, 0, os.SEEK_SET)
        os.dup2(fd, 0)
        os.close(fd)
    elif stdin == "none":
        os.close(0)
    sys.stdin = None if stdin == "none" else open(0, closefd=False)  # noqa: SIM115
    for number, (name, write) in enumerate(writes.items(), 1):
        if write is None:
            os.close(number)
            setattr(sys, name, None)
            continue
        os.dup2(write, number)
        os.close(write)
        like = sys.__stdout__ if name == "stdout" else sys.__stderr__
        encoding = like.encoding if like else "utf-8"
        errors = (like.errors if like else None) or "strict"
        buffer = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        file = io.TextIOWrapper(buffer, encoding, errors, line_buffering=name == "stderr")
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


def _finish(code: int) -> int:
    """Flush the streams as the interpreter does at exit, and return the exit code.

    If flushing fails, the interpreter prints a message and exits with 120.
    """
    for file in (sys.stdout, sys.stderr):
        try:
            if file is not None and not file.closed:
                file.flush()
        except (OSError, ValueError) as e:
            with suppress(OSError, ValueError):
                print(
                    f"Exception ignored in: {file!r}\n{type(e).__name__}: {e}",
                    file=sys.__stderr__,
                    flush=True,
                )
            if file is sys.stdout or getattr(e, "errno", 0) != errno.EPIPE:
                code = 120
    return code


# -- many cases

CaseRow = tuple[int, Any, Outcome, str]  # index, case, outcome, problem


def case_number(text: str) -> tuple[int, int]:
    """Convert the argument of --case."""
    match = re.fullmatch(r"(-?\d+):(\d+)", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"got {text!r}; give SEED:INDEX, such as 1:57")
    return int(match[1]), int(match[2])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0: all cases passed. 1: a case failed. 2: invalid arguments. 130: interrupted.",
    )
    parser.add_argument(
        "--cases", type=whole_number(1), default=1000, help="the number of cases (default: 1000)"
    )
    parser.add_argument(
        "--first", type=whole_number(0), default=0, help="the index of the first case (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=1, help="the seed of the random cases (default: 1)")
    parser.add_argument(
        "--jobs", type=whole_number(1), default=1, help="the number of processes that run cases (default: 1)"
    )
    parser.add_argument("--tree", type=Path, default=ROOT, help="the root folder of the code under test")
    parser.add_argument(
        "--case",
        type=case_number,
        metavar="SEED:INDEX",
        help="run only this case and print all of its output",
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    sys.path.insert(0, str(args.tree))  # make odd_cases import the code under test
    import odd_cases

    known = odd_cases.commands()
    with tempfile.TemporaryDirectory(prefix="doors-") as folder:
        if args.case:
            return _show(odd_cases.make(*args.case, known), args.tree, Path(folder))
        began = time.monotonic()
        rows = _run_cases(args, known, Path(folder))
    _summary(rows, args.seed, time.monotonic() - began)
    return int(any(problem for *_, problem in rows))


def _run_cases(args: argparse.Namespace, known: dict[str, list[Any]], folder: Path) -> list[CaseRow]:
    parts = [range(args.first + job, args.first + args.cases, args.jobs) for job in range(args.jobs)]
    stop = threading.Event()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(_run_part, part, args, known, folder / str(i), stop) for i, part in enumerate(parts)
        ]
        try:
            return [row for job in jobs for row in job.result()]
        finally:
            stop.set()  # after Ctrl-C, each job finishes its current case and stops


def _run_part(
    indices: range, args: argparse.Namespace, known: dict[str, list[Any]], folder: Path, stop: threading.Event
) -> list[CaseRow]:
    import odd_cases

    folder.mkdir()
    rows = []
    with Driver(args.tree) as driver:
        fixture = odd_cases.make_fixture(driver, folder)
        for index in indices:
            if stop.is_set():
                break
            case = odd_cases.make(args.seed, index, known)
            outcome, problem = odd_cases.run_case(driver, case, fixture, folder / "case")
            if problem:
                print(f"{args.seed}:{index}  {problem}\n    {case}", flush=True)
            rows.append((index, case, outcome, problem))
    return rows


def _show(case: Any, tree: Path, folder: Path) -> int:
    import odd_cases

    with Driver(tree) as driver:
        outcome, problem = odd_cases.run_case(
            driver, case, odd_cases.make_fixture(driver, folder), folder / "case"
        )
    print(
        case,
        f"exit code {outcome.code}, {outcome.seconds:.2f} s",
        "stdout:",
        outcome.out,
        "stderr:",
        outcome.err,
        sep="\n",
    )
    print(f"fails: {problem}" if problem else "passes")
    return int(bool(problem))


def _summary(rows: list[CaseRow], seed: int, seconds: float) -> None:
    counts = Counter(case.command for _, case, _, _ in rows)
    bad = Counter(case.command for _, case, _, problem in rows if problem)
    codes = Counter(outcome.code for _, _, outcome, _ in rows)
    for command, count in sorted(counts.items()):
        print(f"{command:16} {count:6,} cases {bad[command]:6,} problems")
    print(f"exit codes: {', '.join(f'{code}: {count:,}' for code, count in sorted(codes.items(), key=str))}")
    slowest = max(rows, key=lambda row: row[2].seconds)
    print(f"slowest: {seed}:{slowest[0]}, {slowest[2].seconds:.1f} s")
    print(f"seed {seed}: {len(rows):,} cases, {sum(bad.values()):,} problems, {seconds:.0f} s")


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve(sys.argv[2:])
        sys.exit()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("doors: interrupted", file=sys.stderr)
        sys.exit(130)
