"""Run the search methods of other libraries on a recorded table.

Each method runs in a process and a virtual environment of its own (adapters/, environments/). It asks for
runs through a pipe, and this module answers from the table and keeps the bills.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.core.hardware import cache_dir
from mainrun.errors import RunError, UsageError, nearest
from sweeps.coordinates import Values
from sweeps.frugal import recipe_key
from sweeps.search_bench.metrics import Trace

if TYPE_CHECKING:
    from sweeps.search_bench.tables import Table

FOLDER = Path(__file__).parent
BUDGET = 60.0  # whole runs
PATIENCE = 600.0  # the seconds that a method may take until its next request
MOST_REPEATS = 100  # a method whose trials are known already, this often in a row, is at its end
LAST_LINES = 5  # of stderr, for the message about a crash


@dataclass(frozen=True)
class Rival:
    """A search method: the script that runs it, and the library that the script needs."""

    script: Path
    arguments: tuple[str, ...] = ()
    library: str = ""


def _rivals() -> dict[str, Rival]:
    adapters = FOLDER / "adapters"
    rivals = {"random": Rival(adapters / "plain.py", ("random",))}
    for count in (16, 32, 64):
        for keep in (1, 3):
            rivals[f"top-{keep}-of-{count}"] = Rival(adapters / "plain.py", ("top-k", str(count), str(keep)))
    for library, methods in {
        "optuna": ("tpe", "tpe-hyperband", "random-halving", "gp"),
        "syne-tune": ("asha", "bohb", "asha-cqr", "cqr"),
        "smac": ("multi-fidelity", "black-box"),
        "neps": ("priorband", "async-hyperband"),
    }.items():
        for method in methods:
            script = adapters / f"use_{library.replace('-', '_')}.py"
            rivals[f"{library}-{method}"] = Rival(script, (method,), library)
    return rivals


RIVALS = _rivals()


def rival(name: str) -> Rival:
    if name not in RIVALS:
        raise UsageError(f"no rival {name!r}{nearest(name, RIVALS)}; choose one of {', '.join(RIVALS)}")
    return RIVALS[name]


# -- environments


def environment(library: str, folder: Path | None = None) -> Path:
    """Return the Python of a library's environment. The environment is created if it does not exist yet."""
    if not library:
        return Path(sys.executable)
    pins = FOLDER / "environments" / f"{library}.txt"
    version = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    home = (folder or cache_dir() / "rivals") / f"{library}-{version}"
    python = home / "bin" / "python"
    ready = home / "ready"
    if not ready.is_file():
        _run([sys.executable, "-m", "venv", "--clear", str(home)], library)
        _run([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(pins)], library)
        ready.touch()
    return python


def _run(command: list[str], library: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UsageError(
            f"the environment of {library} cannot be created: {' '.join(command)} ended with exit code "
            f"{done.returncode} ({last_lines(done.stdout.splitlines())}); check that pip reaches its package "
            f"index, or leave out the rivals of {library}"
        )


def last_lines(lines: Iterable[str]) -> str:
    """Return the last lines that are not empty, as one line."""
    full = [line.strip() for line in lines if line.strip()]
    return " | ".join(full[-LAST_LINES:])


# -- bills


@dataclass
class Bills:
    """The tokens that a search has trained, counted in two ways.

    own: each recipe is trained on its own. Its points are paid once, or again if the library restarts a run.
    shared: on our store, where recipes with the same trunk share the tokens of the trunk.
    """

    table: Table
    own: int = 0
    shared: int = 0
    points: dict[str, int] = field(default_factory=dict)  # how far each recipe is trained
    trunks: dict[str, int] = field(default_factory=dict)  # how many tokens of each trunk are trained

    def charge(self, values: Values, to: int, restart: bool) -> bool:
        """Add the cost of training a recipe up to a point. Return whether anything is to be trained."""
        key = recipe_key(values)
        done = self.points.get(key, 0)
        if to <= done:
            return False
        tokens = [0, *self.table.point_tokens(values)]
        before = tokens[done]
        after = tokens[to]
        self.own += after if restart else after - before
        trunk = self.table.trunk_key(values)
        decay = self.table.decay_tokens(values)
        in_trunk = max(self.trunks.get(trunk, 0), min(after, decay))
        self.shared += in_trunk - self.trunks.get(trunk, 0)
        self.shared += max(after, decay) - max(before, decay)
        self.trunks[trunk] = in_trunk
        self.points[key] = to
        return True

    @property
    def lower(self) -> float:
        """The lower bill, in whole runs."""
        return min(self.own, self.shared) / self.table.whole


# -- one search


class Adapter:
    """The process of an adapter. It works in a temporary folder, which is also its home."""

    def __init__(self, name: str, command: list[str], patience: float) -> None:
        self.name = name
        self.patience = patience
        self.cpu_seconds = 0.0  # known when the process has ended
        self._folder = tempfile.TemporaryDirectory(prefix="mainrun-rival-", ignore_cleanup_errors=True)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environ = {**os.environ, **single, "PYTHONHASHSEED": "0", "HOME": self._folder.name}
        environ.pop("PYTHONPATH", None)  # our packages must not shadow those of the environment
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, cwd=self._folder.name, env=environ, **pipes)
        assert self._process.stdin and self._process.stdout
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout
        self._received = b""

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._reap()
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        self._errors.close()
        self._folder.cleanup()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. If the adapter has ended, `receive` notices it."""
        with suppress(BrokenPipeError):
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()

    def receive(self) -> dict[str, Any] | None:
        """Return the next request, or None if the adapter has ended."""
        while b"\n" not in self._received:
            if not select.select([self._stdout], [], [], self.patience)[0]:
                raise self._error(f"has sent no request for {self.patience:g} seconds")
            received = os.read(self._stdout.fileno(), 1 << 16)
            if not received:
                self._reap()
                if self._process.returncode:
                    raise self._error(f"ended with exit code {self._process.returncode}")
                return None
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        try:
            request = json.loads(line)
        except ValueError:
            request = None
        if not isinstance(request, dict):
            raise self._error(f"has sent {line[:100]!r} instead of a JSON object")
        return request

    def _reap(self) -> None:
        """Wait for the end of the process. Its CPU time includes that of its own processes."""
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime

    def _error(self, problem: str) -> RunError:
        self._errors.seek(0)
        said = last_lines(self._errors) or "nothing"
        return RunError(f"rival {self.name}: the adapter {problem}; the end of its stderr: {said}")


class Service:
    """Answers the requests of one search from a table, until the budget is spent."""

    def __init__(self, table: Table, train_seed: int, budget: float) -> None:
        self.table = table
        self.train_seed = train_seed
        self.budget = budget
        self.bills = Bills(table)
        self.steps: list[tuple[float, str | None]] = []
        self._best = math.inf  # the lowest final score so far, whose recipe is recommended
        self._last: Values = {}  # the recipe of the last request
        self._repeats = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train a recipe up to a point, and return its scores or the order to stop."""
        values = self._recipe(request.get("train"))
        to = request.get("to")
        points = self.table.definition.points
        if not isinstance(to, int) or not 1 <= to <= points:
            raise RunError(f"a rival asked for the point {to!r}; a run has the points 1 to {points}")
        scores = self.table.curve(values, self.train_seed)[:to]
        if None in scores:  # the run ends at the point where it diverges
            finite = scores.index(None)
            scores = [*scores[:finite], *[None] * (to - finite)]
            to = finite + 1
        paid = self.bills.charge(values, to, bool(request.get("restart")))
        if paid:
            self._repeats = 0
        elif values != self._last:
            self._repeats += 1
        self._last = values
        self._recommend(values, scores)
        if self.bills.lower >= self.budget or self._repeats >= MOST_REPEATS:
            return {"stop": True}
        return {"scores": scores}

    def _recipe(self, values: Any) -> Values:
        """Return the recipe of a request, in the types and the order of the table's choices."""
        choices = self.table.choices
        if not isinstance(values, dict) or values.keys() != choices.keys():
            raise RunError(f"a rival asked for the recipe {values!r}; it must give {', '.join(choices)}")
        for name, value in values.items():
            if value not in choices[name]:
                raise RunError(f"a rival asked for {name} = {value!r}; allowed are {choices[name]}")
        return {name: known[known.index(values[name])] for name, known in choices.items()}

    def _recommend(self, values: Values, scores: Sequence[float | None]) -> None:
        last = scores[-1]
        if len(scores) == self.table.definition.points and last is not None and last < self._best:
            self._best = last
            self.steps.append((self.bills.lower, recipe_key(values)))


def search(
    name: str,
    chosen: Rival,
    table: Table,
    search_seed: int,
    train_seed: int,
    budget: float = BUDGET,
    patience: float = PATIENCE,
) -> Trace:
    """Run one search. Its trace has a step for each change of the recommendation, and one for the end."""
    command = [str(environment(chosen.library)), str(chosen.script), *chosen.arguments]
    service = Service(table, train_seed, budget)
    points = table.definition.points
    start = {
        "space": table.choices,
        "base": table.base,
        "seed": search_seed,
        "points": points,
        "epoch": max(1, round(points * table.train_tokens / table.whole)),
        "budget": budget,
    }
    with Adapter(name, command, patience) as adapter:
        adapter.send(start)
        request = adapter.receive()
        while request is not None:
            adapter.send(service.answer(request))
            request = adapter.receive()
    recommended = service.steps[-1][1] if service.steps else None
    steps = [*service.steps, (service.bills.lower, recommended)]
    return Trace(name, table.definition.name, search_seed, train_seed, steps, adapter.cpu_seconds)
