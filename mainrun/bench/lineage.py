"""What sharing prefixes is worth: four studies, trained with a store and from scratch, in one process, one after the other.

    1  a constant-then-decay recipe: 2 rates x 4 times of a late change x 8 decay starts x 3 shapes = 192 trials
    2  the same with every second decay start moved to between two others; 1 and 2 together
    3  piecewise constant rates, values and milestones searched: 128 trials under successive halving
    4  a search over the rate alone, where little can be shared

Each says the steps that were asked for, the fewest that any way of sharing must train, and those that were trained: once with the
study known at once, once with its trials coming one by one in any order. The trials from scratch are the rival, and the proof:
every final score and every weight must be the same to the bit.
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
from typing import Any

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import Interrupted, MainrunError
from mainrun.plan.plan import Plan
from mainrun.run import batch
from mainrun.store import lineage
from mainrun.store.nodes import Node, Store
from mainrun.store.rundir import RunDir

# a model whose run takes a few seconds
SMALL = {
    "num_titles": 2100, "val_frac": 0.05, "vocab_size": 500, "block_size": 32, "batch_size": 8, "epochs": 2,
    "n_layer": 2, "n_head": 2, "d_model": 64, "norm": "rmsnorm", "position": "rope", "mlp": "relu2", "bias": False,
    "optimizer": "adamw", "beta2": 0.95, "weight_decay": 0.1, "dropout": 0.1, "warmup_frac": 0.02,
    "threads": 1, "compile": "off", "eval_per_epoch": 0,
}  # fmt: skip
RATES = (2e-3, 4e-3)
CHANGES = (0.10, 0.25, 0.40, 0.55)
STARTS = tuple(round(0.75 + 0.03 * i, 3) for i in range(8))
MOVED = tuple(start if i % 2 == 0 else round(start - 0.015, 3) for i, start in enumerate(STARTS))
SHAPES = ("linear", "cosine", "sqrt")
RUNGS = ((1 / 16, 4), (1 / 4, 4), (1.0, 1))  # share of the steps; of how many the best goes on


def late_change(base: TrainConfig, starts: Sequence[float]) -> list[TrainConfig]:
    """Studies 1 and 2. The late change is dropout's, to none: whatever it is, the tree is the same."""
    found = []
    for rate in RATES:
        for at in CHANGES:
            op = {"name": "set_dropout", "value": 0.0, "trigger": {"budget_frac": at}}
            for start in starts:
                for shape in SHAPES:
                    fields = {
                        "lr": rate,
                        "schedule": "wsd",
                        "decay_frac": round(1 - start, 6),
                        "decay_shape": shape,
                    }
                    found.append(changed(base, fields | {"growth": {"ops": [op]}}))
    return found


def piecewise(base: TrainConfig, trials: int = 128) -> list[TrainConfig]:
    """Study 3."""
    draw, found = random.Random(3), dict[str, TrainConfig]()
    while len(found) < trials:
        rate = draw.choice((1e-3, 2e-3, 4e-3, 8e-3))
        first, second = draw.choice((0.2, 0.3, 0.4, 0.5)), draw.choice((0.6, 0.7, 0.8, 0.9))
        one = draw.choice((0.5, 0.25))
        ops = [(first, rate * one), (second, rate * one * draw.choice((0.4, 0.2, 0.1)))]
        growth = {
            "ops": [{"name": "set_lr", "value": value, "trigger": {"budget_frac": at}} for at, value in ops]
        }
        cfg = changed(base, {"lr": rate, "schedule": "constant", "growth": growth})
        found[cfg.run_id] = cfg
    return list(found.values())


def rates(base: TrainConfig, trials: int = 24) -> list[TrainConfig]:
    """Study 4."""
    draw = random.Random(4)
    return [changed(base, {"lr": 10 ** draw.uniform(-4, -1.5), "schedule": "cosine"}) for _ in range(trials)]


def changed(base: TrainConfig, fields: dict[str, Any]) -> TrainConfig:
    return from_dict(base.model_dump(mode="json") | fields)


@dataclass
class Row:
    """One way of training one study."""

    study: str
    way: str
    trials: int
    asked: int
    fewest: int
    trained: int
    seconds: float
    store_seconds: float
    scratch_seconds: float
    compared: int = 0  # trials that were also trained from scratch
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
    """trials: of each study that many, at random; 0: all."""
    with tempfile.TemporaryDirectory(prefix="mainrun-bench-") as folder:
        bench = Bench(Path(folder), note)
        rows: list[Row] = []
        first, second = (some(late_change(base, starts), trials) for starts in (STARTS, MOVED))
        if 1 in studies:
            rows += bench.both("1", first)
        if 2 in studies:
            rows += bench.both("1 and 2", first + second)
        if 3 in studies:
            rows.append(bench.halving("3", some(piecewise(base), trials)))
        if 4 in studies:
            rows += bench.both("4", some(rates(base), trials))
        return [vars(row) | {"saving": row.saving, "speed": row.speed} for row in rows]


def some(configs: list[TrainConfig], trials: int) -> list[TrainConfig]:
    return random.Random(0).sample(configs, trials) if 0 < trials < len(configs) else configs


class Bench:
    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self.note = folder, note
        self.scratch: dict[
            str, tuple[float, str]
        ] = {}  # of each trial from scratch: seconds, and its final bits
        self.count = 0

    def both(self, study: str, configs: list[TrainConfig]) -> Iterator[Row]:
        """Known at once, then one by one; a trial that two studies ask for is asked for twice."""
        distinct = {cfg.run_id: cfg for cfg in configs}
        begun = time.perf_counter()
        at_once = batch.share_steps(distinct.values(), None)
        planning, chains = time.perf_counter() - begun, at_once.chains
        asked = sum(len(chains[cfg.run_id]) - 1 for cfg in configs)
        order = [distinct[part.name] for part in at_once.assignments.order]
        row = self.shared(study, "known at once", configs, order, at_once.keep, asked, chains)
        row.seconds += planning
        yield row
        # whoever asks one by one knows the space: the steps at which its trials may part
        steps = sorted({step for found in at_once.keep.values() for step in found})
        keep = {name: [step for step in steps if step < len(chain)] for name, chain in chains.items()}
        order = random.Random(1).sample(list(distinct.values()), len(distinct))
        yield self.shared(study, "one by one", configs, order, keep, asked, chains)

    def shared(
        self, study: str, way: str, configs: list[TrainConfig], order: list[TrainConfig], keep: dict[str, list[int]], asked: int,
        chains: dict[str, list[str]],
    ) -> Row:  # fmt: skip
        out, store = self.fresh()
        trained, seconds, store_seconds, bits, began = 0, 0.0, 0.0, {}, time.perf_counter()
        for i, cfg in enumerate(order):
            begun = time.perf_counter()
            summary, final = self.train(cfg, out, store, keep[cfg.run_id])
            seconds += time.perf_counter() - begun
            trained += summary["ledger"]["trained"]
            store_seconds += summary["spent"]["store"]
            bits[cfg.run_id] = final
            self.from_scratch(cfg)  # in turn, so that a machine that is slower for a while is so for both
            self.say(f"study {study}, {way}", i, len(order), began)
        fewest = len({key for chain in chains.values() for key in chain[1:]})
        differ = [name for name, final in bits.items() if self.scratch[name][1] != final]
        scratch = sum(self.scratch[cfg.run_id][0] for cfg in configs)
        return Row(
            study,
            way,
            len(configs),
            asked,
            fewest,
            trained,
            seconds,
            store_seconds,
            scratch,
            len(bits),
            differ,
        )

    def halving(self, study: str, configs: list[TrainConfig]) -> Row:
        """Successive halving: all to the first rung, the best of them to the next. What goes on continues where it stopped."""
        begun = time.perf_counter()
        shared = batch.share_steps(configs, None)
        planning, chains, keep = time.perf_counter() - begun, shared.chains, shared.keep
        steps = len(next(iter(chains.values()))) - 1
        rungs = [max(1, round(share * steps)) for share, _ in RUNGS]
        out, store = self.fresh()
        alive, reached, store_seconds, trained = list(configs), dict.fromkeys(chains, 0), 0.0, 0
        begun = time.perf_counter()
        for rung, (_, cut) in zip(rungs, RUNGS, strict=True):
            scores = {}
            for i, cfg in enumerate(alive):
                reached[cfg.run_id] = rung
                scores[cfg.run_id] = self.until(cfg, out, store, [*keep[cfg.run_id], *rungs], rung)
                self.say(f"study {study}, to step {rung}", i, len(alive), begun)
            alive = sorted(alive, key=lambda cfg: scores[cfg.run_id])[: max(1, len(alive) // cut)]
        seconds = planning + time.perf_counter() - begun
        survivors = [cfg for cfg in configs if reached[cfg.run_id] == rungs[-1]]
        for cfg in survivors:
            self.from_scratch(cfg)
        bits = {cfg.run_id: final_bits(RunDir(out / cfg.run_id)) for cfg in survivors}
        differ = [name for name, final in bits.items() if self.scratch[name][1] != final]
        asked = sum(reached.values())
        fewest = len({key for name, chain in chains.items() for key in chain[1 : reached[name] + 1]})
        for cfg in configs:
            ledger, spent = ledger_of(RunDir(out / cfg.run_id))
            trained, store_seconds = trained + ledger, store_seconds + spent
        # no trial that stops early was trained from scratch: its time is its share of one that was
        scratch = sum(self.scratch[cfg.run_id][0] for cfg in survivors) / (len(survivors) * steps) * asked
        return Row(
            study,
            "successive halving",
            len(configs),
            asked,
            fewest,
            trained,
            seconds,
            store_seconds,
            scratch,
            len(bits),
            differ,
        )

    def until(self, cfg: TrainConfig, out: Path, store: Store, keep: list[int], rung: int) -> float:
        from mainrun.run.session import train

        with suppress(Interrupted):
            train(cfg, out, store=store, keep=keep, until=rung)
        rows = [
            row
            for row in RunDir(out / cfg.run_id).metrics()
            if row["event"] == "step" and row["step"] <= rung
        ]
        return float(sum(row["loss"] for row in rows[-5:]))

    def from_scratch(self, cfg: TrainConfig) -> None:
        """Once for all studies."""
        if cfg.run_id not in self.scratch:
            begun = time.perf_counter()
            _, final = self.train(cfg, self.folder / "scratch", None, [])
            self.scratch[cfg.run_id] = time.perf_counter() - begun, final

    def train(
        self, cfg: TrainConfig, out: Path, store: Store | None, keep: list[int]
    ) -> tuple[dict[str, Any], str]:
        from mainrun.run.session import train

        summary = train(cfg, out, store=store, keep=keep)
        run = RunDir(out / cfg.run_id)
        final = final_bits(run)
        shutil.rmtree(run.checkpoints)  # hundreds of them would fill a disk
        return summary, final

    def fresh(self) -> tuple[Path, Store]:
        self.count += 1
        out = self.folder / f"shared-{self.count}"
        return out, Store(out / ".store")

    def say(self, what: str, i: int, total: int, begun: float) -> None:
        if (i + 1) % max(1, total // 8) == 0 or i + 1 == total:
            self.note(f"{what}: {i + 1} of {total} trials, {time.perf_counter() - begun:.0f} s")


def final_bits(run: RunDir) -> str:
    """The weights' hash, and every score and loss as they are written."""
    summary = run.summary()
    if summary is None:
        raise MainrunError(f"{run.path} did not come to its end")
    rows = [
        [row.get(k) for k in ("event", "step", "split", "loss", "grad_norm", "full", "official")]
        for row in run.metrics()
    ]
    return json.dumps([summary["weights"], rows])


def ledger_of(run: RunDir) -> tuple[int, float]:
    """Steps trained, and seconds in the store, of a run that may have been stopped."""
    if summary := run.summary():
        return summary["ledger"]["trained"], summary["spent"]["store"]
    meta = json.loads((sorted(run.checkpoints.glob("step-*"))[-1] / "meta.json").read_text())
    return meta["step"] - meta["ledger"]["reused"] + meta["ledger"]["wasted"], meta["spent"].get("store", 0.0)


def overheads() -> dict[str, float]:
    """What the store itself takes, in seconds: a node of the baseline's size, a chain of 100,000 steps, a list of 10,000 nodes."""
    import torch

    params = 27_172_864
    state = {
        name: torch.randn(params) for name in ("model/w", "optimizer/w/exp_avg", "optimizer/w/exp_avg_sq")
    }
    with tempfile.TemporaryDirectory(prefix="mainrun-bench-") as folder:
        store = Store(Path(folder) / "one")
        stall, held = timed(lambda: {name: t.to("cpu", copy=True) for name, t in state.items()})
        saved, _ = timed(lambda: store.save(a_node(0), held))
        loaded, _ = timed(lambda: store.load(store.node(a_node(0).key)))
        many = Store(Path(folder) / "many")
        nodes = Path(folder) / "many" / "nodes"
        nodes.mkdir(parents=True)
        for i in range(10_000):
            (nodes / a_node(i).key).write_bytes(a_node(i).dump())
        listed, _ = timed(many.summary)
        cfg = from_dict(SMALL | {"schedule": "cosine", "epochs": 1000})
        plan = Plan(cfg, 100 * cfg.batch_size * cfg.block_size + 1)
        looked, chain = timed(
            lambda: many.node_keys().intersection(lineage.chain("f" * 64, plan)) or plan.steps
        )
    assert chain == 100_000
    return {
        "copy": stall,
        "save": saved,
        "load": loaded,
        "bytes": 12.0 * params,
        "list_10000": listed,
        "look_up_100000": looked,
    }


def a_node(i: int) -> Node:
    rows = tuple(
        {"event": "step", "step": step, "tokens": 8192 * step, "lr": 0.006, "loss": 7.5, "grad_norm": 1.0}
        for step in (1, 2)
    )
    return Node(
        key=f"{i:064x}", parent="0" * 64, root="0" * 64, step=i + 1, begins=0, tokens_processed=8192, state="", size=0, geometry=[64, 128],
        seconds=1.0, run="bench", config=from_dict({}).model_dump(mode="json"), made=time.time(), rows_sha256="", rows=rows,
    )  # fmt: skip


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def lines(found: dict[str, float]) -> Iterator[str]:
    yield f"a node of 27.2M parameters with AdamW, {found['bytes'] / 1e6:.0f} MB: {found['copy']:.2f} s to copy while the training waits,"
    yield f"  {found['save']:.2f} s to write beside it, {found['load']:.2f} s to load"
    yield f"a chain of 100,000 steps: its nodes are found in {found['look_up_100000']:.2f} s"
    yield f"a store of 10,000 nodes: listed in {found['list_10000']:.2f} s"


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = [
        "study",
        "trials",
        "way",
        "asked",
        "fewest",
        "trained",
        "asked/trained",
        "wall s",
        "of it store",
        "from scratch",
        "faster",
        "bits",
    ]
    lines = []
    for r in rows:
        bits = f"{len(r['differ'])} differ" if r["differ"] else f"same ({r['compared']})"
        counts = [f"{r[k]:,}" for k in ("asked", "fewest", "trained")]
        times = [
            f"{r['seconds']:.1f}",
            f"{r['store_seconds']:.1f}",
            f"{r['scratch_seconds']:.1f}",
            f"x{r['speed']:.2f}",
        ]
        lines.append([r["study"], str(r["trials"]), r["way"], *counts, f"{r['saving']:.2f}", *times, bits])
    return head, lines
