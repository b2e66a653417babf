"""Run the searches of a benchmark in parallel, and keep each trace in a file.

A benchmark that was stopped continues where it ended. Traces are kept by table, method and version of the
method, so a changed method is run again, and the others are not.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

from mainrun.errors import Interrupted, RunError, UsageError, nearest
from mainrun.store.rundir import disk_errors, write_json
from sweeps.search_bench import rivals
from sweeps.search_bench.metrics import Trace
from sweeps.search_bench.ours import ABLATIONS, OURS, THAW, VARIANTS, Replay
from sweeps.search_bench.tables import Table

SLOW_SECONDS = 20.0  # a method that needs more for a search runs fewer searches
SLOW_SEEDS = 25
SWEEPS = Path(__file__).parents[1]
SAMPLER_FILES = [
    SWEEPS / f"{name}.py"
    for name in ("coordinates", "frugal", "lanes", "late_change", "short_run", "surrogate")
]
SAMPLER_FILES.append(SWEEPS / "search_bench/ours.py")

Job = tuple[str, int, int]  # method, search seed, training seed


def chosen_methods(names: str, with_ablations: bool) -> list[str]:
    """Return the methods of the benchmark. `names` are rivals, separated by commas, or "all"."""
    known = [*rivals.RIVALS, THAW]
    chosen = known if names == "all" else [name.strip() for name in names.split(",") if names]
    for name in chosen:
        if name not in known:
            raise UsageError(
                f"unknown rival {name!r}{nearest(name, known)}; write all, or some of {', '.join(known)}"
            )
    return [OURS, *dict.fromkeys(chosen), *(ABLATIONS if with_ablations else ())]


def sampler_hash() -> str:
    """Return the hash of the files that determine what the sampler frugal asks for."""
    return _hash(SAMPLER_FILES)


def _hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def version_of(method: str) -> str:
    """Return a hash of the files that determine the searches of a method."""
    if method in VARIANTS:
        return sampler_hash()
    rival = rivals.rival(method)
    paths = [Path(rivals.__file__), rival.script, rival.script.with_name("bench.py")]
    if rival.library:
        paths.append(rivals.FOLDER / "environments" / f"{rival.library}.txt")
    return _hash(paths)


# -- the files


class Traces:
    """The traces of a table, in files below a folder."""

    def __init__(self, out: Path, table: Table) -> None:
        self.folder = out / f"{table.definition.name}-{table.checksum[:12]}"
        self.seeds = table.definition.seeds

    def path(self, job: Job) -> Path:
        method, search_seed, train_seed = job
        return self.folder / f"{method}-{version_of(method)[:12]}" / f"{search_seed:03d}-{train_seed}.json"

    def write(self, job: Job, trace: Trace) -> None:
        path = self.path(job)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, trace.data())

    def jobs(self, method: str, count: int) -> list[Job]:
        return [(method, search, train) for search in range(count) for train in self.seeds]

    def read(self, jobs: Sequence[Job]) -> list[Trace]:
        traces = []
        for path in map(self.path, jobs):
            try:
                traces.append(Trace.from_data(json.loads(path.read_text(encoding="utf-8"))))
            except (ValueError, TypeError, KeyError):
                raise RunError(f"{path} is damaged; remove it and run the same command again") from None
        return traces

    def is_slow(self, method: str, count: int) -> bool:
        traces = self.read(self.jobs(method, min(count, SLOW_SEEDS)))
        return statistics.median(trace.cpu_seconds for trace in traces) > SLOW_SECONDS


# -- running


class Runner:
    """Runs single searches in a worker process, which reads the table once."""

    def __init__(self, place: str, out: Path) -> None:
        self.table = Table.read(place)
        self.traces = Traces(out, self.table)
        self.replay = Replay(self.table)

    def run(self, job: Job) -> None:
        method, search_seed, train_seed = job
        if method in VARIANTS:
            trace = self.replay.search(*job)
        else:
            trace = rivals.search(method, rivals.rival(method), self.table, search_seed, train_seed)
        self.traces.write(job, trace)


@cache
def _runner(place: str, out: Path) -> Runner:
    return Runner(place, out)


def _run(place: str, out: Path, job: Job) -> str:
    _runner(place, out).run(job)
    return job[0]


def run_all(
    place: str,
    table: Table,
    methods: Sequence[str],
    count: int,
    out: Path,
    workers: int,
    note: Callable[[str], None],
) -> dict[str, list[Trace]]:
    """Run the searches that have no trace yet, and return all traces by method.

    count: the number of search seeds. Slow methods use at most SLOW_SEEDS.
    """
    traces = Traces(out, table)
    for library in dict.fromkeys(rivals.rival(name).library for name in methods if name not in VARIANTS):
        rivals.environment(library)  # two workers must not create it at the same time
    first = [job for method in methods for job in traces.jobs(method, min(count, SLOW_SEEDS))]
    _run_missing(first, traces, partial(_run, place, out), workers, note)
    counts = {name: min(count, SLOW_SEEDS) if traces.is_slow(name, count) else count for name in methods}
    jobs = {method: traces.jobs(method, seeds) for method, seeds in counts.items()}
    every = [job for own in jobs.values() for job in own]
    _run_missing(every, traces, partial(_run, place, out), workers, note)
    return {method: traces.read(own) for method, own in jobs.items()}


def _run_missing(
    jobs: Sequence[Job],
    traces: Traces,
    run: Callable[[Job], str],
    workers: int,
    note: Callable[[str], None],
) -> None:
    missing = [job for job in jobs if not traces.path(job).exists()]
    if missing:
        note(f"{len(jobs) - len(missing)} of {len(jobs)} searches were finished before")
    done = _in_parallel(missing, run, workers)
    for number, method in enumerate(done, len(jobs) - len(missing) + 1):
        if number % 10 == 0 or number == len(jobs):
            note(f"{number} of {len(jobs)} searches; the last one was of {method}")


def _in_parallel(jobs: Sequence[Job], run: Callable[[Job], str], workers: int) -> Iterator[str]:
    if not jobs:
        return
    # more threads would only wait for each other, and could change the rounding
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    os.environ.update(dict.fromkeys(before, "1"))
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            try:
                futures = [pool.submit(run, job) for job in jobs]
                for future in as_completed(futures):
                    yield future.result()
            except BaseException as e:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                if isinstance(e, KeyboardInterrupt):
                    raise Interrupted("stopped; finished searches are kept; run it again to go on") from None
                raise
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
