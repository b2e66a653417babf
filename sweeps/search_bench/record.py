"""Record a table: train all recipes of its lattice, and the best ones on fresh seeds.

The runs of one trunk and seed are a unit of work. They are trained one after another, and share their steps
through a store of their own. When a unit is finished, its rows are written to a file, and its runs and its
store are removed. A recording that was stopped or killed goes on with the unit that it was training.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mainrun.config import TrainConfig
from mainrun.core.hardware import cores
from mainrun.errors import Diverged, Interrupted, UsageError
from mainrun.files.hashing import sha256_json
from mainrun.plan.plan import Plan
from mainrun.run.progress import clock
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir, disk_errors, write_json, write_text
from sweeps.engine.worker import die_with_parent
from sweeps.search_bench.tables import (
    FINALISTS,
    Definition,
    Lattice,
    Row,
    Table,
    definition_of,
    fork,
    header_of,
)
from sweeps.short_run import short_run
from sweeps.space import with_values

NO_CHECKPOINTS = 1_000_000_000  # the interval between checkpoints; the store contains the states instead

Note = Callable[[str], None]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Unit:
    """The runs of a trunk with one seed: each decay at each horizon."""

    seed: int
    trunk: int
    decays: tuple[int, ...]
    horizons: tuple[float, ...]
    curves: bool = True  # whether whole runs are scored at all points, and not only at their end

    @property
    def name(self) -> str:
        return f"{self.seed}-{self.trunk}"


@dataclass(frozen=True)
class Run:
    """A run of a unit."""

    decay: int
    horizon: float
    plan: Plan
    points: tuple[int, ...]  # the steps whose scores the table contains


@dataclass(frozen=True)
class Lab:
    """Trains the units of a table."""

    definition: Definition
    train_tokens: int
    corpus: str
    folder: Path

    @cached_property
    def lattice(self) -> Lattice:
        return Lattice(self.definition, self.train_tokens)

    def part(self, unit: Unit) -> Path:
        """Return the file with the rows of a finished unit."""
        return self.folder / "parts" / f"{unit.name}.json"

    def work(self, unit: Unit) -> Path:
        return self.folder / "work" / unit.name

    def rows(self, units: Sequence[Unit]) -> Iterator[Row]:
        for unit in units:
            yield from (Row(*row) for row in json.loads(self.part(unit).read_bytes()))

    # -- training

    def train(self, unit: Unit) -> None:
        """Train a unit, and write its rows."""
        if not self.part(unit).exists():
            out = self.work(unit)
            store = Store(out / ".store")
            rows: list[Row] = []
            runs = self.runs(unit)
            forks = {fork(run.plan) for run in runs}
            for run in runs:
                scores = self.scores(run, out, store, sorted(forks))
                rows += self.rows_of(unit, run, scores, first=run is runs[0])
            write_json(self.part(unit), rows)
        shutil.rmtree(self.work(unit), ignore_errors=True)

    def runs(self, unit: Unit) -> list[Run]:
        """Return the runs of a unit. The first one has the longest trunk."""
        runs = [self.run(unit, d, h) for h in unit.horizons for d in unit.decays]
        return sorted(runs, key=lambda run: (run.horizon, run.plan.decay_start), reverse=True)

    def run(self, unit: Unit, decay: int, horizon: float) -> Run:
        lattice = self.lattice
        values = lattice.trunks[unit.trunk] | lattice.decays[decay]
        whole = lattice.plan(values)
        curve = unit.curves and horizon == 1
        changes: dict[str, Any] = {
            "corpus": self.corpus,
            "seed": unit.seed,
            "checkpoint_every": NO_CHECKPOINTS,
            "eval_per_epoch": 0,
            "eval_interval": whole.steps // self.definition.points if curve else 0,
        }
        cfg = with_values(short_run(whole.cfg, whole, horizon), changes)
        plan = Plan(cfg, self.train_tokens)
        steps = lattice.points(values) if curve else [plan.steps]
        return Run(decay, horizon, plan, tuple(steps))

    def scores(self, run: Run, out: Path, store: Store, keep: Sequence[int]) -> dict[int, float]:
        """Train a run, and return its scores on dev by step. A run that diverges has fewer scores."""
        from mainrun.run.session import train

        cfg = run.plan.cfg
        try:
            train(cfg, out, store=store, keep=[step for step in keep if step < run.plan.steps])
        except Diverged:
            pass
        return {
            row["step"]: row["full"]
            for row in RunDir(out / cfg.run_id).rows()
            if row["event"] == "eval" and row["split"] == "dev"
        }

    def rows_of(self, unit: Unit, run: Run, scores: dict[int, float], first: bool) -> Iterator[Row]:
        """Yield the rows of a run. Only the first run of a unit yields the rows of the trunk."""
        shared = fork(run.plan)
        for step in run.points:
            dev = scores.get(step)
            if step > shared or len(run.points) == 1:
                yield Row(unit.seed, unit.trunk, run.decay, run.horizon, step, dev)
            elif first:
                yield Row(unit.seed, unit.trunk, None, None, step, dev)


# -- units


def search_units(lattice: Lattice) -> list[Unit]:
    """Return the units of the seeds to search on: every recipe at every horizon."""
    definition = lattice.definition
    decays = tuple(range(len(lattice.decays)))
    return [
        Unit(seed, trunk, decays, definition.horizons)
        for seed in definition.seeds
        for trunk in range(len(lattice.trunks))
    ]


def fresh_units(table: Table) -> list[Unit]:
    """Return the units of the fresh seeds: the whole runs of the best recipes."""
    decays: dict[int, list[int]] = {}
    for place in table.best(FINALISTS):
        trunk, decay = divmod(place, len(table.decays))
        decays.setdefault(trunk, []).append(decay)
    return [
        Unit(seed, trunk, tuple(sorted(of_trunk)), (1.0,), curves=False)
        for seed in table.definition.fresh_seeds
        for trunk, of_trunk in sorted(decays.items())
    ]


# -- recording


def record(name: str, out: Path, workers: int = 0, note: Note = _note) -> Path:
    """Record the table of a name, and return the path of its file in the folder `out`.

    workers: the number of processes, or 0 for one per core.
    """
    return record_table(definition_of(name), out, workers, note)


def record_table(definition: Definition, out: Path, workers: int = 0, note: Note = _note) -> Path:
    path = out / f"{definition.name}.parquet"
    lab, header = open_lab(definition, out)
    if path.exists():
        if Table.read(path).header != header:
            raise UsageError(f"{path} is another recording; move it away, or give another --out")
        note(f"{path} is recorded already")
        return path
    workers = workers or cores()
    units = search_units(lab.lattice)
    train_units(lab, units, workers, note, f"table {definition.name}, search seeds")
    fresh = fresh_units(Table(header, lab.rows(units)))
    train_units(lab, fresh, workers, note, f"table {definition.name}, fresh seeds")
    table = Table(header, sorted(lab.rows([*units, *fresh]), key=_order))
    table.write(path)
    for line in Table.read(path).verdict():
        note(line)
    shutil.rmtree(lab.folder)
    return path


def _order(row: Row) -> tuple[Any, ...]:
    return row.seed, row.trunk, -1 if row.decay is None else row.decay, row.horizon or 0.0, row.step


def open_lab(definition: Definition, out: Path) -> tuple[Lab, dict[str, Any]]:
    """Prepare the data of a table, and return the lab and the header of the table.

    The lab's folder depends on the header, so a recording never mixes rows of different code or machines.
    """
    from mainrun.core.device import Device
    from mainrun.core.machine_class import versions
    from mainrun.data.corpus import load_corpus
    from mainrun.data.token_cache import prepare

    cfg = definition.base()
    folder = out / f"recording-{definition.name}"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    corpus = cfg.corpus
    if definition.skipped_titles:
        corpus = f"file:{write_titles(definition, cfg, folder).absolute()}"
    loaded = load_corpus(with_values(cfg, {"corpus": corpus}))
    data = prepare(cfg, loaded)
    train_tokens = len(data.splits["train"])
    device = Device(cfg)
    device.settle(cfg, Plan(cfg, train_tokens))
    header = header_of(
        definition,
        config=cfg.model_dump(),
        train_tokens=train_tokens,
        fingerprints=loaded.fingerprints,
        tokens=data.digest,
        versions=versions(),
        machine_class=device.machine_class,
    )
    lab = Lab(definition, train_tokens, corpus, folder / sha256_json(header)[:12])
    for name in ("parts", "work"):
        (lab.folder / name).mkdir(parents=True, exist_ok=True)
    return lab, header


def write_titles(definition: Definition, cfg: TrainConfig, folder: Path) -> Path:
    """Write the titles of a table that has other titles than the synthetic corpus of other runs."""
    from mainrun.data import synthetic

    path = folder / "titles.txt"
    titles = synthetic.titles(definition.skipped_titles + cfg.num_titles)[definition.skipped_titles :]
    write_text(path, "\n".join(titles) + "\n")
    return path


# -- processes


def train_units(lab: Lab, units: Sequence[Unit], workers: int, note: Note, what: str) -> None:
    """Train the units that are not finished, and tell the progress after each one."""
    left = [unit for unit in units if not lab.part(unit).exists()]
    started = time.monotonic()
    note(f"{what}: {len(units) - len(left)} of {len(units)} units were finished before")
    results = _one_by_one(lab, left) if workers == 1 else _in_parallel(lab, left, workers)
    for done, _ in enumerate(results, 1):
        seconds = (time.monotonic() - started) * (len(left) - done) / done
        finished = len(units) - len(left) + done
        note(f"{what}: {finished} of {len(units)} units, {clock(math.ceil(seconds))} left")


def _one_by_one(lab: Lab, units: Sequence[Unit]) -> Iterator[None]:
    for unit in units:
        yield lab.train(unit)


def _in_parallel(lab: Lab, units: Sequence[Unit], workers: int) -> Iterator[None]:
    # forked processes would inherit the threads of torch
    context = multiprocessing.get_context("spawn")
    prepare = partial(_prepare_worker, os.getpid())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=prepare) as pool:
        try:
            futures: list[Future[None]] = [pool.submit(lab.train, unit) for unit in units]
            for future in as_completed(futures):
                yield future.result()
        except BaseException as e:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # a run stops between two steps, and saves its state
            if isinstance(e, KeyboardInterrupt):
                raise Interrupted(
                    "stopped; everything is saved; run the same command again to go on"
                ) from None
            raise


def _prepare_worker(parent: int) -> None:
    """Leave Ctrl-C to the recorder, which stops its workers. A worker ends with its recorder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
