"""`mainrun bench lineage`: measure how much training time runs save by sharing steps.

Four studies are trained with a store, and again from scratch, in one process:

    1  192 trials: 2 learning rates x 4 late changes x 8 decay starts x 3 decay shapes
    2  the trials of study 1, and the same trials with every second decay start moved
    3  128 trials by successive halving: piecewise constant learning rates with random values and milestones
    4  24 trials: random learning rates with cosine decay, which have few steps in common

For each study, the table shows the number of requested steps, the number of distinct steps, and the number of
trained steps. Even with a store, every distinct step must be trained once. Studies 1, 2 and 4 are trained
with a store twice. In the first training, all trials are known in advance. In the second training, the trials
arrive one by one in random order. Every score and every weight must be exactly equal to the result of
training the same trial from scratch.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import Interrupted, MainrunError
from mainrun.plan.plan import Plan
from mainrun.run import batch
from mainrun.store import lineage
from mainrun.store.nodes import Node, Store
from mainrun.store.rundir import RunDir

# The default base config. A run of this config takes a few seconds.
SMALL = {
    "num_titles": 2100, "val_frac": 0.05, "vocab_size": 500, "block_size": 32, "batch_size": 8, "epochs": 2,
    "n_layer": 2, "n_head": 2, "d_model": 64, "norm": "rmsnorm", "position": "rope", "mlp": "relu2",
    "bias": False, "optimizer": "adamw", "beta2": 0.95, "weight_decay": 0.1, "dropout": 0.1,
    "warmup_frac": 0.02, "threads": 1, "compile": "off", "eval_per_epoch": 0,
}  # fmt: skip
RATES = (2e-3, 4e-3)
CHANGES = (0.10, 0.25, 0.40, 0.55)  # dropout is switched off after these fractions of the training tokens
# The learning rate starts to decay after these fractions of the training steps.
STARTS = tuple(round(0.75 + 0.03 * i, 3) for i in range(8))
MOVED = tuple(start if i % 2 == 0 else round(start - 0.015, 3) for i, start in enumerate(STARTS))
SHAPES = ("linear", "cosine", "sqrt")
BASELINE_PARAMS = 27_172_864


class Rung(NamedTuple):
    share: float  # a trial is scored when it has trained this fraction of all steps
    keep: int  # one of every `keep` trials continues to the next rung


RUNGS = (Rung(1 / 16, 4), Rung(1 / 4, 4), Rung(1.0, 1))


# -- the studies


def late_change(base: TrainConfig, starts: Sequence[float]) -> list[TrainConfig]:
    """Return the trials of study 1 or 2, which set the dropout to 0 late in the run."""
    configs = []
    for rate in RATES:
        for share in CHANGES:
            op = {"name": "set_dropout", "value": 0.0, "trigger": {"budget_frac": share}}
            for start in starts:
                for shape in SHAPES:
                    fields = {
                        "lr": rate,
                        "schedule": "wsd",
                        "decay_frac": round(1 - start, 6),
                        "decay_shape": shape,
                        "growth": {"ops": [op]},
                    }
                    configs.append(changed(base, fields))
    return configs


def piecewise(base: TrainConfig, trials: int = 128) -> list[TrainConfig]:
    """Return the trials of study 3, which have piecewise constant learning rates."""
    draw = random.Random(3)
    configs: dict[str, TrainConfig] = {}
    while len(configs) < trials:
        rate = draw.choice((1e-3, 2e-3, 4e-3, 8e-3))
        first = draw.choice((0.2, 0.3, 0.4, 0.5))
        second = draw.choice((0.6, 0.7, 0.8, 0.9))
        first_rate = rate * draw.choice((0.5, 0.25))
        second_rate = first_rate * draw.choice((0.4, 0.2, 0.1))
        ops = []
        for share, value in ((first, first_rate), (second, second_rate)):
            ops.append({"name": "set_lr", "value": value, "trigger": {"budget_frac": share}})
        cfg = changed(base, {"lr": rate, "schedule": "constant", "growth": {"ops": ops}})
        configs[cfg.run_id] = cfg
    return list(configs.values())


def rates(base: TrainConfig, trials: int = 24) -> list[TrainConfig]:
    """Return the trials of study 4, which have random learning rates with cosine decay."""
    draw = random.Random(4)
    return [changed(base, {"lr": 10 ** draw.uniform(-4, -1.5), "schedule": "cosine"}) for _ in range(trials)]


def changed(base: TrainConfig, fields: dict[str, Any]) -> TrainConfig:
    return from_dict(base.model_dump(mode="json") | fields)


def sample(configs: list[TrainConfig], trials: int) -> list[TrainConfig]:
    """Return a random sample of the trials, or all trials if `trials` is 0."""
    if 0 < trials < len(configs):
        return random.Random(0).sample(configs, trials)
    return configs


# -- training the studies


@dataclass
class StudyResult:
    """The cost of training a study with one method. The field names are the keys in the output of --json."""

    study: str
    way: str
    trials: int
    asked: int  # the total number of steps that all trials request
    fewest: int  # the number of distinct steps, each of which must be trained once
    trained: int = 0  # the number of steps that were actually trained
    seconds: float = 0.0
    store_seconds: float = 0.0  # the seconds that were spent on reading and writing the store
    scratch_seconds: float = 0.0  # the training time of the same trials from scratch
    compared: int = 0  # the number of trials that were also trained from scratch
    # The IDs of the runs whose results are not bit-identical.
    differ: list[str] = field(default_factory=list)

    @property
    def saving(self) -> float:
        return self.asked / self.trained

    @property
    def speed(self) -> float:
        return self.scratch_seconds / self.seconds


def measure(
    base: TrainConfig,
    studies: Sequence[int] = (1, 2, 3, 4),
    trials: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Run the studies and return one row for each study and each method of training the study.

    trials: the number of randomly chosen trials per study, or 0 to run all trials.
    """
    results: list[StudyResult] = []
    with tempfile.TemporaryDirectory(prefix="mainrun-bench-") as folder:
        bench = Bench(Path(folder), note)
        study_1 = sample(late_change(base, STARTS), trials)
        if 1 in studies:
            results += bench.two_ways("1", study_1)
        if 2 in studies:
            results += bench.two_ways("1 and 2", study_1 + sample(late_change(base, MOVED), trials))
        if 3 in studies:
            results.append(bench.halving("3", sample(piecewise(base), trials)))
        if 4 in studies:
            results += bench.two_ways("4", sample(rates(base), trials))
    return [vars(result) | {"saving": result.saving, "speed": result.speed} for result in results]


class ScratchRun(NamedTuple):
    seconds: float
    bits: str  # the string that `final_bits` returns for this trial


class Bench:
    """Train studies in a folder. Each distinct trial is trained from scratch only once."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder = folder
        self.note = note
        self.scratch: dict[str, ScratchRun] = {}
        self.stores = 0

    def two_ways(self, study: str, configs: list[TrainConfig]) -> Iterator[StudyResult]:
        """Train a study with all trials known in advance, and again with trials that arrive one by one."""
        trials = {cfg.run_id: cfg for cfg in configs}
        start = time.perf_counter()
        shared = batch.share_steps(trials.values(), None)
        planning = time.perf_counter() - start
        chains = shared.chains
        requested = sum(len(chains[cfg.run_id]) - 1 for cfg in configs)
        fewest = len({key for chain in chains.values() for key in chain[1:]})

        result = StudyResult(study, "known at once", len(configs), requested, fewest, seconds=planning)
        order = [trials[assignment.name] for assignment in shared.assignments.order]
        self.train_all(result, order, shared.keep)
        result.scratch_seconds += self.scratch_seconds(configs)
        yield result

        # A hyperparameter search knows all values of its search space, so it can list the steps at which two
        # trials may begin to differ.
        forks: set[int] = set()
        for steps in shared.keep.values():
            forks.update(steps)
        keep = {}
        for name, chain in chains.items():
            keep[name] = [step for step in sorted(forks) if step < len(chain)]
        order = random.Random(1).sample(list(trials.values()), len(trials))
        result = StudyResult(study, "one by one", len(configs), requested, fewest)
        self.train_all(result, order, keep)
        result.scratch_seconds += self.scratch_seconds(configs)
        yield result

    def train_all(self, result: StudyResult, order: list[TrainConfig], keep: dict[str, list[int]]) -> None:
        """Train trials with a new store, and add their times and steps to the result."""
        out, store = self.new_store()
        study_start = time.perf_counter()
        for i, cfg in enumerate(order):
            start = time.perf_counter()
            summary, bits = self.train(cfg, out, store, keep[cfg.run_id])
            result.seconds += time.perf_counter() - start
            result.trained += summary["ledger"]["trained"]
            result.store_seconds += summary["spent"]["store"]
            # Train the same trial from scratch immediately, so that a temporary slowdown of the machine
            # affects both runs.
            self.compare_with_scratch(result, cfg, bits)
            self.note_progress(f"study {result.study}, {result.way}", i, len(order), study_start)

    def halving(self, study: str, configs: list[TrainConfig]) -> StudyResult:
        """Train a study by successive halving. The best trials of each rung continue to the next rung."""
        start = time.perf_counter()
        shared = batch.share_steps(configs, None)
        chains = shared.chains
        steps = len(next(iter(chains.values()))) - 1
        rungs = [max(1, round(rung.share * steps)) for rung in RUNGS]
        out, store = self.new_store()
        remaining = list(configs)
        reached = dict.fromkeys(chains, 0)  # maps each trial to its last trained step
        for rung, (_, keep) in zip(rungs, RUNGS, strict=True):
            scores = {}
            for i, cfg in enumerate(remaining):
                reached[cfg.run_id] = rung
                scores[cfg.run_id] = self.train_to(cfg, out, store, [*shared.keep[cfg.run_id], *rungs], rung)
                self.note_progress(f"study {study}, to step {rung}", i, len(remaining), start)
            remaining.sort(key=lambda cfg: scores[cfg.run_id])
            remaining = remaining[: max(1, len(remaining) // keep)]
        seconds = time.perf_counter() - start

        requested = sum(reached.values())
        different: set[str] = set()
        for name, chain in chains.items():
            different.update(chain[1 : reached[name] + 1])
        result = StudyResult(
            study, "successive halving", len(configs), requested, len(different), seconds=seconds
        )
        for cfg in configs:
            trained, store_seconds = ledger_of(RunDir(out / cfg.run_id))
            result.trained += trained
            result.store_seconds += store_seconds
        finalists = [cfg for cfg in configs if reached[cfg.run_id] == rungs[-1]]
        for cfg in finalists:
            self.compare_with_scratch(result, cfg, final_bits(RunDir(out / cfg.run_id)))
        # Only the finalists are trained from scratch. The training time of each other trial is computed from
        # its number of steps.
        seconds_per_step = self.scratch_seconds(finalists) / (len(finalists) * steps)
        result.scratch_seconds += seconds_per_step * requested
        return result

    def train_to(self, cfg: TrainConfig, out: Path, store: Store, keep: list[int], step: int) -> float:
        """Train a trial up to a step and return the sum of its last five training losses."""
        from mainrun.run.session import train

        with suppress(Interrupted):
            train(cfg, out, store=store, keep=keep, until=step)
        losses = []
        for row in RunDir(out / cfg.run_id).metrics():
            if row["event"] == "step" and row["step"] <= step:
                losses.append(row["loss"])
        return float(sum(losses[-5:]))

    def compare_with_scratch(self, result: StudyResult, cfg: TrainConfig, bits: str) -> None:
        """Train a trial from scratch and compare all bits of the results.

        A trial is trained from scratch only once.
        """
        if cfg.run_id not in self.scratch:
            start = time.perf_counter()
            _, scratch_bits = self.train(cfg, self.folder / "scratch", None, [])
            self.scratch[cfg.run_id] = ScratchRun(time.perf_counter() - start, scratch_bits)
        result.compared += 1
        if self.scratch[cfg.run_id].bits != bits:
            result.differ.append(cfg.run_id)

    def scratch_seconds(self, configs: list[TrainConfig]) -> float:
        return sum(self.scratch[cfg.run_id].seconds for cfg in configs)

    def train(
        self, cfg: TrainConfig, out: Path, store: Store | None, keep: list[int]
    ) -> tuple[dict[str, Any], str]:
        """Train a trial to its last step. Return its summary and the result of `final_bits`."""
        from mainrun.run.session import train

        summary = train(cfg, out, store=store, keep=keep)
        run = RunDir(out / cfg.run_id)
        bits = final_bits(run)
        shutil.rmtree(run.checkpoints)  # the checkpoints of hundreds of runs would fill the disk
        return summary, bits

    def new_store(self) -> tuple[Path, Store]:
        """Return a new folder for runs and an empty store in this folder."""
        self.stores += 1
        out = self.folder / f"shared-{self.stores}"
        return out, Store(out / ".store")

    def note_progress(self, label: str, i: int, total: int, start: float) -> None:
        """Report the progress of a study in about eight lines."""
        count = i + 1
        if count % max(1, total // 8) == 0 or count == total:
            self.note(f"{label}: {count} of {total} trials, {time.perf_counter() - start:.0f} s")


def final_bits(run: RunDir) -> str:
    """Return a string that contains a run's losses and scores, and the hash of its final weights."""
    summary = run.summary()
    if summary is None:
        raise MainrunError(f"{run.path} did not finish")
    columns = ("event", "step", "split", "loss", "grad_norm", "full", "official")
    rows = [[row.get(column) for column in columns] for row in run.metrics()]
    return json.dumps([summary["weights"], rows])


def ledger_of(run: RunDir) -> tuple[int, float]:
    """Return the number of steps that a run trained, and the seconds that the run spent in the store.

    The run may have been stopped before its last step.
    """
    summary = run.summary()
    if summary:
        return summary["ledger"]["trained"], summary["spent"]["store"]
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    meta = json.loads((newest / "meta.json").read_text())
    trained = meta["step"] - meta["ledger"]["reused"] + meta["ledger"]["wasted"]
    return trained, meta["spent"].get("store", 0.0)


# -- the overhead of the store


def overheads() -> dict[str, float]:
    """Measure the time of operations on a store.

    The operations are saving and loading the training state of a model as large as the baseline, listing
    10,000 nodes, and looking up the nodes of a run with 100,000 steps.
    """
    with tempfile.TemporaryDirectory(prefix="mainrun-bench-") as folder:
        return _node_overheads(Path(folder) / "one") | _list_overheads(Path(folder) / "many")


def _node_overheads(folder: Path) -> dict[str, float]:
    import torch

    store = Store(folder)
    node = make_node(0)
    names = ("model/w", "optimizer/w/exp_avg", "optimizer/w/exp_avg_sq")
    state = {name: torch.randn(BASELINE_PARAMS) for name in names}
    copy_seconds, copies = timed(lambda: {name: t.to("cpu", copy=True) for name, t in state.items()})
    save_seconds, _ = timed(lambda: store.save(node, copies))
    load_seconds, _ = timed(lambda: store.load(store.node(node.key)))
    return {
        "copy": copy_seconds,
        "save": save_seconds,
        "load": load_seconds,
        "bytes": 4.0 * len(names) * BASELINE_PARAMS,
    }


def _list_overheads(folder: Path) -> dict[str, float]:
    store = Store(folder)
    (folder / "nodes").mkdir(parents=True)
    for i in range(10_000):
        node = make_node(i)
        (folder / "nodes" / node.key).write_bytes(node.dump())
    list_seconds, _ = timed(store.summary)
    cfg = from_dict(SMALL | {"schedule": "cosine", "epochs": 1000})
    plan = Plan(cfg, 100 * cfg.batch_size * cfg.block_size + 1)
    assert plan.steps == 100_000
    look_up_seconds, _ = timed(lambda: store.node_keys().intersection(lineage.chain("f" * 64, plan)))
    return {"list_10000": list_seconds, "look_up_100000": look_up_seconds}


def make_node(i: int) -> Node:
    """Return a node with two metric rows and no state."""
    rows = []
    for step in (1, 2):
        rows.append(
            {
                "event": "step",
                "step": step,
                "tokens": 8192 * step,
                "lr": 0.006,
                "loss": 7.5,
                "grad_norm": 1.0,
            }
        )
    return Node(
        key=f"{i:064x}",
        parent="0" * 64,
        root="0" * 64,
        step=i + 1,
        begins=0,
        tokens_processed=8192,
        state="",
        size=0,
        geometry=[64, 128],
        seconds=1.0,
        run="bench",
        config=from_dict({}).model_dump(mode="json"),
        made=time.time(),
        rows_sha256="",
        rows=tuple(rows),
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and the result of the call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


# -- the report


def lines(overheads: dict[str, float]) -> Iterator[str]:
    """Yield the text lines that are printed below the table."""
    yield (
        f"a node of 27.2M parameters with AdamW, {overheads['bytes'] / 1e6:.0f} MB: "
        f"{overheads['copy']:.2f} s to copy, during which the training waits,"
    )
    yield f"  {overheads['save']:.2f} s to write in the background, {overheads['load']:.2f} s to load"
    yield f"a run of 100,000 steps: {overheads['look_up_100000']:.2f} s to find its nodes"
    yield f"a store of 10,000 nodes: {overheads['list_10000']:.2f} s to list"


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of studies."""
    head = ["study", "trials", "trials are", "requested", "fewest", "trained", "requested/trained"]
    head += ["wall s", "in store s", "from scratch s", "speed-up", "bits"]
    lines = []
    for row in rows:
        bits = f"same ({row['compared']})"
        if row["differ"]:
            bits = f"{len(row['differ'])} differ"
        lines.append(
            [
                row["study"],
                str(row["trials"]),
                row["way"],
                f"{row['asked']:,}",
                f"{row['fewest']:,}",
                f"{row['trained']:,}",
                f"{row['saving']:.2f}",
                f"{row['seconds']:.1f}",
                f"{row['store_seconds']:.1f}",
                f"{row['scratch_seconds']:.1f}",
                f"x{row['speed']:.2f}",
                bits,
            ]
        )
    return head, lines
