"""Run the command line with odd input, thousands of times: each case is a child forked from a process that has imported everything.

A door holds when the command ends in time, with an exit code that it documents, and with at most one message that a
person can read. `Driver.run` runs a case, and `Outcome.problem` says what is wrong with its end.

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
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# imported once, before the first case; nothing is computed, so no thread is lost in a fork
WARM = (
    "mainrun.cli", "mainrun.config", "mainrun.corpus", "mainrun.train", "mainrun.sitting", "mainrun.sample", "mainrun.guards",
    "mainrun.compare", "mainrun.doctor", "mainrun.demo", "mainrun.estimate", "mainrun.batch", "mainrun.growth.verify",
    "mainrun.growth.simulate", "sweeps.study", "sweeps.driver", "reports.pdf", "reports.bundle", "reports.submission",
    "reports.verification", "torch", "numpy", "tokenizers", "sentencepiece", "safetensors.torch", "optuna", "sqlalchemy", "scipy.stats",
    "matplotlib.figure", "matplotlib.backends.backend_svg", "reportlab.platypus", "svglib.svglib", "pypdf", "pyarrow.parquet",
    "huggingface_hub", "rich.console", "rich.table", "rich.text", "rich.box", "tomllib", "yaml", "ctypes", "difflib", "http.client",
    "urllib.request", "concurrent.futures", "multiprocessing",
)  # fmt: skip

# exit codes beside 0, 2 and 75, for the commands whose documentation names them
OTHER_CODES = {
    "train": {3},  # the loss is not a number any more
    "demo": {3},
    "doctor": {1},  # something must be fixed first
    "submit": {1},  # an upload that failed
    "verify": {1},  # a bundle that is not what it says
    "store verify": {1},  # damage
    "store audit": {1},  # a segment that trains to other bits
    "grow verify": {1},  # an op that breaks its promise
    "bench lineage": {1},  # a shared prefix that changes bits
    "bench gpu": {1},  # two runs that differ
}
MESSAGES = {"demo": 2}  # that of the command that it ran, and its own
LONGEST_MESSAGE = 3000
MOST_OUTPUT = 1 << 20  # bytes of each stream that an outcome keeps
PREFIX = re.compile(r"^(error|interrupted|diverged|crash)( in process \d+)?: ?", re.MULTILINE)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `code` is None when it was killed at the time limit, and negative when a signal ended it."""

    command: str
    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def message(self) -> str:
        """The error message, without its prefix; empty when there is none."""
        match = PREFIX.search(self.err)
        return self.err[match.end() :].strip() if match else ""

    def problem(self, allowed: Sequence[int] = (), stderr_is_read: bool = True) -> str:
        """Why the door did not hold; empty when it did. `allowed` adds exit codes to those that the command documents."""
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
    """What `OTHER_CODES` is keyed by: the first word, and the second where the first is a group."""
    groups = {name.split()[0] for name in OTHER_CODES if " " in name}
    return " ".join(argv[: 2 if argv and argv[0] in groups else 1])


@dataclass
class Driver:
    """A warm process that forks one child per case. Use it as a context manager, from one thread.

    `tree` is the root of the code under test, `env` changes the environment of the interpreter (a locale, say),
    `warm=False` imports the command line only.
    """

    tree: Path = ROOT
    env: Mapping[str, str] = field(default_factory=dict)
    warm: bool = True
    limit: float = 60.0

    def __enter__(self) -> Driver:
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
        closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env = os.environ | quiet | closed | {"PYTHONPATH": str(self.tree)} | dict(self.env)
        for name in ("MAINRUN_STORE", "RANK", "WORLD_SIZE", "COLUMNS", "HF_HUB_OFFLINE"):
            env.pop(name, None)
        self.home = tempfile.mkdtemp(prefix="doors-")
        env |= {"HOME": self.home, "MPLCONFIGDIR": self.home, "MAINRUN_CACHE": f"{self.home}/cache"}
        command = [sys.executable, __file__, "--serve", *([] if self.warm else ["--cold"])]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=self.home)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(30)
        shutil.rmtree(self.home, ignore_errors=True)

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
        """Run `mainrun *argv` in the folder `cwd`, with that environment on top (None removes a variable).

        `stdin` is null, none (no such descriptor) or text:TEXT. `stdout` and `stderr` are file, pipe, none, closed (a pipe
        that nobody reads) or full (/dev/full); only file and pipe are shown in the outcome.
        """
        words = [os.fsdecode(word) for word in argv]
        case = {"argv": words, "cwd": str(cwd), "env": dict(env or {}), "stdin": stdin, "stdout": stdout, "stderr": stderr}
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(case | {"limit": limit or self.limit}).encode() + b"\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(f"the driver's process has ended with exit code {self.server.wait(10)}")
        return Outcome(command_of(words), **json.loads(line))


# -- the warm process


def serve(warm: bool) -> None:
    """Answer one case a line until stdin ends."""
    channel = os.fdopen(os.dup(1), "wb")
    requests = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    for fd in (null, channel.fileno(), requests.fileno()):
        os.set_inheritable(fd, False)
    for name in WARM if warm else WARM[:1]:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as e:  # an older or a newer tree has other modules
            if name == WARM[0] or not name.startswith(("mainrun", "sweeps", "reports")):
                raise RuntimeError(f"{name} cannot be imported") from e
    typer_main = importlib.import_module("typer.main")
    typer_main.get_command = functools.cache(typer_main.get_command)  # building it takes as long as a small command
    typer_main.get_command(importlib.import_module("mainrun.cli").app)
    gc.collect()
    gc.freeze()
    for line in requests:
        case = json.loads(line)
        channel.write(json.dumps(_run_case(case, (channel, requests))).encode() + b"\n")
        channel.flush()


def _run_case(case: dict[str, Any], mine: tuple[io.BufferedWriter, io.BufferedReader]) -> dict[str, Any]:
    streams = {name: _stream(case[name]) for name in ("stdout", "stderr")}
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        said = os.dup(2)  # for the faults of this file
        try:
            for file in mine:
                os.close(file.fileno())
            _child(case, {name: write for name, (_, write) in streams.items()})
        except BaseException:
            os.write(said, traceback.format_exc().encode())
        finally:
            os._exit(99)
    for _, write in streams.values():
        if write is not None:
            os.close(write)
    pipes = {
        read: bytearray() for kind, (read, _) in zip(streams, streams.values(), strict=True) if read is not None and case[kind] == "pipe"
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
    """What the outcome is read from, and what the child writes to."""
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
    """The exit code, or None at the time limit. Whatever the child has started ends with it."""
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
    """Become what a shell would have started, and end as an interpreter does."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _redirect(case["stdin"], writes)
    os.chdir(case["cwd"])
    for name, value in case["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = _as_given(value)
    sys.argv = ["mainrun", *map(_as_given, case["argv"])]
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


def _as_given(text: str) -> str:
    """What the interpreter would make of these bytes, in its locale. Half of a surrogate pair comes from no shell, and stays."""
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
    """Flush what is still to be written; an interpreter that cannot says so, and ends with 120."""
    for file in (sys.stdout, sys.stderr):
        try:
            if file is not None and not file.closed:
                file.flush()
        except (OSError, ValueError) as e:
            with suppress(OSError, ValueError):
                print(f"Exception ignored in: {file!r}\n{type(e).__name__}: {e}", file=sys.__stderr__, flush=True)
            if file is sys.stdout or getattr(e, "errno", 0) != errno.EPIPE:
                code = 120
    return code


# -- many cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the index of the first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes that run cases at once")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the root of the code under test")
    parser.add_argument("--case", metavar="SEED:INDEX", help="run this one, and show all of it")
    given = parser.parse_args()
    sys.path.insert(0, str(given.tree))  # the options of the tree under test
    import odd_cases

    known = odd_cases.commands()
    with tempfile.TemporaryDirectory(prefix="doors-") as temp:
        if given.case:
            seed, index = map(int, given.case.split(":"))
            return _show(odd_cases.make(seed, index, known), given.tree, Path(temp))
        parts = [range(given.first + job, given.first + given.cases, given.jobs) for job in range(given.jobs)]
        began = time.monotonic()
        with ThreadPoolExecutor(given.jobs) as pool:
            jobs = [pool.submit(_part, part, given.seed, given.tree, Path(temp) / str(i), known) for i, part in enumerate(parts)]
            ended = [row for job in jobs for row in job.result()]
    _summary(ended, given.seed, time.monotonic() - began)
    return int(any(problem for *_, problem in ended))


def _part(indices: range, seed: int, tree: Path, folder: Path, known: dict[str, list[Any]]) -> list[tuple[int, Any, Outcome, str]]:
    import odd_cases

    folder.mkdir()
    ended = []
    with Driver(tree) as driver:
        kit = odd_cases.make_kit(driver, folder)
        for index in indices:
            case = odd_cases.make(seed, index, known)
            outcome, problem = odd_cases.run_case(driver, case, kit, folder / "case")
            if problem:
                print(f"{seed}:{index}  {problem}\n    {case}", flush=True)
            ended.append((index, case, outcome, problem))
    return ended


def _show(case: Any, tree: Path, folder: Path) -> int:
    import odd_cases

    with Driver(tree) as driver:
        outcome, problem = odd_cases.run_case(driver, case, odd_cases.make_kit(driver, folder), folder / "case")
    print(case, f"exit code {outcome.code}, {outcome.seconds:.2f} s", "stdout:", outcome.out, "stderr:", outcome.err, sep="\n")
    print(f"PROBLEM: {problem}" if problem else "the door held")
    return int(bool(problem))


def _summary(ended: list[tuple[int, Any, Outcome, str]], seed: int, seconds: float) -> None:
    counts = Counter(case.command for _, case, _, _ in ended)
    bad = Counter(case.command for _, case, _, problem in ended if problem)
    codes = Counter(outcome.code for _, _, outcome, _ in ended)
    for command, count in sorted(counts.items()):
        print(f"{command:16} {count:6,} cases {bad[command]:6,} problems")
    print(f"exit codes: {', '.join(f'{code}: {count:,}' for code, count in sorted(codes.items(), key=str))}")
    slowest = max(ended, key=lambda row: row[2].seconds)
    print(f"slowest: {seed}:{slowest[0]}, {slowest[2].seconds:.1f} s")
    print(f"seed {seed}: {len(ended):,} cases, {sum(bad.values()):,} problems, {seconds:.0f} s")


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve("--cold" not in sys.argv)
    else:
        sys.exit(main())
