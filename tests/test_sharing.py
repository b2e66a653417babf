"""Tests that runs share steps through a store with equal bits, whatever happens to the runs or the store."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_sets
from typer.testing import CliRunner, Result

from mainrun import train as trainer
from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.core import device as machine
from mainrun.core import machine_class
from mainrun.core.device import Device
from mainrun.errors import Diverged, Interrupted
from mainrun.files.hashing import sha256_file
from mainrun.plan.plan import Plan
from mainrun.run import batch, sharing
from mainrun.run import summary as summaries
from mainrun.run.accounts import Accounts
from mainrun.run.progress import Progress
from mainrun.run.session import train
from mainrun.store import checkpoint, leases, nodes, planner
from mainrun.store.files import Folder
from mainrun.store.leases import Leases
from mainrun.store.nodes import Node, Store
from mainrun.store.rundir import RunDir

ROOT = Path(__file__).parents[1]
# A run of this config trains 37 steps in a third of a second. The run saves nodes at steps 18 and 36 for
# scores, at step 27 for the start of the decay, and at step 37 for the end.
SMALL: dict[str, Any] = {
    "num_titles": 200, "n_layer": 1, "optimizer": "adamw", "lr": 0.01, "dropout": 0.1, "schedule": "wsd",
    "decay_frac": 0.3,
    "checkpoint_every": 1000,
}  # fmt: skip
STEPS = 37


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | SMALL | changes)


def late(name: str, value: float, step: int = 20) -> dict[str, Any]:
    return {"growth": {"ops": [{"name": name, "value": value, "trigger": {"step": step}}]}}


class Killed(BaseException):
    """Raised to simulate that the process is killed."""


class Watch(Progress):
    """A progress display that records steps and notes, and calls functions at given steps or notes."""

    def __init__(
        self,
        at: dict[int, Callable[[], object]] | None = None,
        on: dict[str, Callable[[], object]] | None = None,
    ) -> None:
        self.at, self.on = dict(at or {}), dict(on or {})
        self.steps: list[int] = []
        self.notes: list[str] = []

    def step(self, row: dict[str, Any]) -> None:
        self.steps.append(row["step"])
        self.at.pop(row["step"], lambda: None)()

    def note(self, text: str) -> None:
        self.notes.append(text)
        for words in [words for words in self.on if words in text]:
            self.on.pop(words)()

    def noted(self, words: str) -> bool:
        return any(words in note for note in self.notes)


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without the fields that depend on time or on sharing."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "reused")} for row in RunDir(run).metrics()]


def reused_steps(run: Path) -> list[int]:
    return [row["step"] for row in RunDir(run).metrics() if row["event"] == "step" and row.get("reused")]


def outcome(run: Path) -> dict[str, Any]:
    """Return the parts of a run's output that must equal those of a run from scratch."""
    summary = RunDir(run).summary()
    assert summary is not None and summary["status"] == "done", f"{run} is not done"
    newest = checkpoint.load_newest(run / "checkpoints", lambda meta: None, lambda text: None)
    assert newest is not None and newest[1]["step"] == summary["steps"]
    same_bits = (
        "weights",
        "last",
        "best",
        "scores",
        "steps",
        "tokens",
        "presentations",
        "flops",
        "geometry",
        "fingerprints",
    )
    guards = [(guard["name"], guard["status"]) for guard in summary["guards"]]
    return {name: summary[name] for name in same_bits} | {
        "rows": rows(run),
        "state": newest[1]["state_sha256"],
        "guards": guards,
    }


def ledger(asked: int, reused: int, wasted: int = 0) -> dict[str, int]:
    return {"asked": asked, "trained": asked - reused, "reused": reused, "wasted": wasted}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TrainConfig], dict[str, Any]]:
    """Return a function that trains a config without a store and returns the outcome.

    Each config is trained only once.
    """
    out = tmp_path_factory.mktemp("alone")

    def run(cfg: TrainConfig) -> dict[str, Any]:
        if not (out / cfg.run_id / "summary.json").exists():
            summary = train(cfg, out)
            assert summary["ledger"] == ledger(summary["steps"], 0)
        return outcome(out / cfg.run_id)

    return run


@pytest.fixture(scope="module")
def filled_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, TrainConfig], Store]:
    """Return a function that trains a config and creates a store with the nodes of the run."""
    out = tmp_path_factory.mktemp("filled")

    def fill(place: Path, cfg: TrainConfig) -> Store:
        if not (out / cfg.run_id / "summary.json").exists():
            train(cfg, out, store=Store(out / "stores" / cfg.run_id))
        shutil.copytree(out / "stores" / cfg.run_id, place)
        return Store(place)

    return fill


def keys(cfg: TrainConfig) -> list[str]:
    return batch.share_steps([cfg], None).chains[cfg.run_id]


def node(store: Store, step: int) -> Node:
    (matching,) = [entry for entry in store.summary()[0] if entry.step == step]
    return matching


def state_file(store: Store, step: int) -> Path:
    return Path(str(store)) / "states" / f"{node(store, step).state}.safetensors"


def node_file(store: Store, step: int) -> Path:
    return Path(str(store)) / "nodes" / node(store, step).key


def active_leases(store: Store) -> dict[str, dict[str, Any]]:
    return Leases(store.files).active()


# -- equal bits with fewer steps

DROP = {"lr": 0.3, "optimizer": "sgd", "momentum": 0.9}
MUON = {"optimizer": "muon", "momentum": 0.9, "lr_aux": 1e-3}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "the same again": ({}, {}, 37),
    "a longer run at a constant rate": ({"schedule": "constant"}, {"schedule": "constant", "epochs": 2}, 37),
    "a longer run of the same trunk": ({}, {"epochs": 2, "decay_frac": 0.2}, 27),
    "a shorter run of the same trunk": ({"epochs": 2, "decay_frac": 0.2}, {}, 18),
    "a later decay": ({}, {"decay_frac": 0.2}, 27),
    "an earlier decay": ({"decay_frac": 0.2}, {}, 18),
    "another shape of the decay": ({}, {"decay_shape": "sqrt"}, 27),
    "another rate": ({}, {"lr": 0.02}, 0),
    "another weight decay, late": (late("set_weight_decay", 0.1), late("set_weight_decay", 0.5), 20),
    "another dropout, late": (late("set_dropout", 0.2), late("set_dropout", 0.0), 20),
    "another batch, late": (late("set_batch_size", 4), late("set_batch_size", 2), 20),
    "another rate, late": (late("set_lr", 0.02), late("set_lr", 0.005), 20),
    "more micro-batches, late": (late("set_grad_accum", 2), late("set_grad_accum", 4), 20),
    "an average at the end": ({}, {"swa": 0.4}, 18),
    "no average at the end": ({"swa": 0.4}, {}, 23),
    "another average at the end": ({"swa": 0.4}, {"swa": 0.3}, 23),
    "an average throughout": ({}, {"ema": 0.9}, 0),
    "an average throughout, and a later decay": ({"ema": 0.9}, {"ema": 0.9, "decay_frac": 0.2}, 27),
    "fewer scores": ({}, {"eval_per_epoch": 0}, 37),
    "more scores": ({}, {"eval_per_epoch": 5}, 4 + 6 + 2),
    "scores elsewhere": ({"eval_per_epoch": 3}, {"eval_per_epoch": 2}, 12 + 19),
    "the official score in another geometry": ({}, {"official_geometry": "2x8"}, 36),
    "a mixture with an n-gram model": ({}, {"ngram": 3}, 36),
    "another weight of the n-gram model": ({"ngram": 3}, {"ngram": 3, "ngram_weight": 0.1}, 36),
    "fewer rows": ({}, {"log_every": 7}, 37),
    "more rows": ({"log_every": 7}, {}, 37),
    "gradient norms that the other run lacks": ({}, {"grad_norm_steps": 3}, 34),
    "gradient norms of the other run": ({"grad_norm_steps": 9}, {"grad_norm_steps": 3}, 37),
    "no gradient norms": ({"grad_norm_steps": 3}, {}, 37),
    "with a dev split": ({"dev_frac": 0.2}, {"dev_frac": 0.2, "decay_shape": "cosine"}, 21),
    "titles in a new order": (
        {"order": "shuffle_titles", "epochs": 2},
        {"order": "shuffle_titles", "epochs": 2, "decay_frac": 0.2},
        53,
    ),
    "sgd with momentum": (DROP, DROP | {"decay_frac": 0.2}, 27),
    "muon": (MUON, MUON | {"decay_frac": 0.2}, 27),
    "two passes a step": ({"rdrop": 0.5}, {"rdrop": 0.5, "decay_frac": 0.2}, 27),
    "members": ({"members": 2}, {"members": 2, "decay_frac": 0.2}, 27),
    "bfloat16": ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "decay_frac": 0.2}, 27),
}
# The slow suite trains all pairs.
FAST_PAIRS = {
    "the same again", "a longer run of the same trunk", "another rate", "another batch, late",
    "an average at the end", "more scores", "the official score in another geometry", "fewer rows",
    "a mixture with an n-gram model",
    "gradient norms that the other run lacks",
}  # fmt: skip
# In these pairs, the second run needs a score or a norm that the first run lacks.
LACKING = {
    "more scores", "scores elsewhere", "the official score in another geometry",
    "a mixture with an n-gram model", "another weight of the n-gram model",
    "gradient norms that the other run lacks",
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_the_keys_of_a_pair_are_equal_up_to_the_steps_that_it_shares(name: str) -> None:
    first, second, shared = PAIRS[name]
    one, two = config(**first), config(**second)
    plans, chains = batch.resolve([one, two])
    equal = planner.shared_steps(chains[one.run_id], chains[two.run_id])
    nodes = sharing.Course(one, {}, plans[one.run_id], (), 0).stops
    reached = max((step for step in nodes if step <= equal), default=0)
    assert shared < reached if name in LACKING else shared == reached


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        pytest.param(*pair, id=name, marks=[] if name in FAST_PAIRS else pytest.mark.slow)
        for name, pair in PAIRS.items()
    ],
)
def test_a_run_that_reuses_steps_equals_a_run_from_scratch(
    tmp_path: Path, alone: Any, filled_store: Any, first: dict[str, Any], second: dict[str, Any], shared: int
) -> None:
    cfg, watch = config(compile="off", **second), Watch()
    store = filled_store(tmp_path / "store", config(compile="off", **first))
    summary = train(cfg, tmp_path, store=store, progress=watch)
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)
    assert summary["ledger"] == ledger(summary["steps"], shared)
    assert watch.noted("are reused from the store (trained by custom-") == bool(shared)
    logged = [row["step"] for row in rows(tmp_path / cfg.run_id) if row["event"] == "step"]
    assert sorted({*reused_steps(tmp_path / cfg.run_id), *watch.steps}) == logged, (
        "every step is reused or trained"
    )
    assert store.verify() == [] and active_leases(store) == {}


def test_keeping_nodes_does_not_change_a_run(tmp_path: Path, alone: Any) -> None:
    cfg, store = config(), Store(tmp_path / "store")
    summary = train(cfg, tmp_path, store=store, keep=[5])
    assert outcome(tmp_path / cfg.run_id) == alone(cfg) and summary["ledger"] == ledger(STEPS, 0)
    assert [entry.step for entry in store.summary()[0]] == [5, 18, 27, 36, 37]
    assert (
        store.verify() == []
        and active_leases(store) == {}
        and list((tmp_path / "store" / "leases").iterdir()) == []
    )
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["seconds"])


def test_speed_counts_trained_tokens_only(tmp_path: Path, filled_store: Any) -> None:
    for changes, trained in (({"decay_frac": 0.2}, 10), ({}, 0)):
        summary = train(
            config(**changes), tmp_path, store=filled_store(tmp_path / f"store{trained}", config())
        )
        assert summary["tokens"] == STEPS * 128
        assert summary["tokens_per_s"] == pytest.approx(trained * 128 / summary["seconds"])


def test_a_score_in_two_nodes_is_logged_once(tmp_path: Path, alone: Any, filled_store: Any) -> None:
    """A run computes a score that a node in the store lacks.

    Later the node is lost, and another run trains the node again, including the score.
    """
    store = filled_store(tmp_path / "store", config())
    cfgs = [
        config(eval_per_epoch=4, preset=name) for name in ("adds", "again", "takes")
    ]  # These configs also evaluate the model after step 27.
    node_file(store, 37).unlink()
    node_file(store, 36).unlink()
    train(cfgs[0], tmp_path, store=store)
    node_file(store, 27).unlink()
    train(cfgs[1], tmp_path, store=store)
    holds = [
        entry.step
        for entry in map(store.node, store.node_keys())
        if any(r["event"] == "eval" and r["step"] == 27 for r in entry.rows)
    ]
    assert sorted(holds) == [27, 36]
    assert train(cfgs[2], tmp_path, store=store)["ledger"] == ledger(STEPS, STEPS)
    for cfg in cfgs:
        assert outcome(tmp_path / cfg.run_id) == alone(cfg)
    assert store.verify() == []


def test_a_node_that_is_written_late_contains_the_state_of_its_step(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, store, save = config(decay_frac=0.2), Store(tmp_path / "store"), Store.save
    monkeypatch.setattr(Store, "save", lambda *args: (time.sleep(0.1), save(*args))[1])
    train(config(), tmp_path, store=store)
    assert train(cfg, tmp_path, store=store)["ledger"] == ledger(STEPS, 27) and outcome(
        tmp_path / cfg.run_id
    ) == alone(cfg)


# -- the ledger and kills


@pytest.mark.parametrize(
    ("every", "at", "wasted"),
    [
        (1000, 5, 5),
        pytest.param(1000, 18, 18, marks=pytest.mark.slow),
        (1000, 30, 3),
        (10, 12, 2),
        pytest.param(10, 30, 3, marks=pytest.mark.slow),
        (10, 31, 1),
        pytest.param(25, 26, 1, marks=pytest.mark.slow),
        pytest.param(9, 20, 2, marks=pytest.mark.slow),
    ],
)
def test_lost_steps_that_the_store_has_count_as_trained(
    tmp_path: Path, alone: Any, every: int, at: int, wasted: int
) -> None:
    """The steps that a run has trained still count as trained if they are only in the store after a kill."""
    cfg, store, watch = config(checkpoint_every=every), Store(tmp_path / "store"), Watch()
    with pytest.raises(Killed):
        train(cfg, tmp_path, store=store, progress=Watch({at: kill}))
    summary = train(cfg, tmp_path, store=store, progress=watch)
    assert summary["ledger"] == ledger(
        STEPS + wasted, 0, wasted
    )  # A step is logged before its node and its checkpoint are written, so a kill may lose a logged step.
    assert reused_steps(tmp_path / cfg.run_id) == [] and len(watch.steps) == STEPS - at + wasted
    assert outcome(tmp_path / cfg.run_id) == alone(config(checkpoint_every=every))
    assert store.verify() == []


def test_reused_steps_stay_reused_after_a_kill(tmp_path: Path, alone: Any, filled_store: Any) -> None:
    cfg, store = (
        config(),
        filled_store(tmp_path / "store", config(decay_frac=0.9, decay_shape="sqrt")),
    )  # The two configs share their first 5 steps.
    with pytest.raises(Killed):
        train(cfg, tmp_path, store=store, progress=Watch({20: kill}))
    summary = train(cfg, tmp_path, store=store)
    assert summary["ledger"] == ledger(STEPS + 2, 5, 2) and reused_steps(tmp_path / cfg.run_id) == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)


def test_steps_reused_later_in_a_run_stay_reused_after_a_kill(
    tmp_path: Path, alone: Any, filled_store: Any
) -> None:
    """A run trains 18 steps, reuses 9 steps, trains 3 steps, and is killed. The run has trained 21 steps."""
    cfg, store, full = config(), Store(tmp_path / "store"), filled_store(tmp_path / "full", config())

    def fill_store() -> None:
        for name in (
            f"states/{node(full, 27).state}.safetensors",
            f"nodes/{node(full, 18).key}",
            f"nodes/{node(full, 27).key}",
        ):
            (tmp_path / "store" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "full" / name, tmp_path / "store" / name)

    with pytest.raises(Killed):
        train(cfg, tmp_path, store=store, progress=Watch({10: fill_store, 30: kill}))
    summary = train(cfg, tmp_path, store=store)
    assert summary["ledger"] == ledger(STEPS + 3, 9, 3) and reused_steps(tmp_path / cfg.run_id) == list(
        range(19, 28)
    )
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)


def test_a_kill_while_a_node_is_written_loses_no_rows(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next checkpoint contains the rows of the lost node."""
    cfg, store = config(checkpoint_every=9), Store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(
            sharing.NodeWriter,
            "_write",
            lambda self, node, tensors, lease: lease and lease.release(unfinished=True),
        )
        with pytest.raises(Killed):
            train(cfg, tmp_path, store=store, progress=Watch({29: kill}))
    assert store.node_keys() == set()
    train(cfg, tmp_path, store=store)
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)
    again = from_dict(cfg.model_dump() | {"preset": "again"})
    summary = train(again, tmp_path, store=store)
    assert summary["ledger"] == ledger(STEPS, STEPS) and outcome(tmp_path / again.run_id) == alone(again)
    assert store.verify() == []


def test_a_run_resumed_with_another_store_writes_no_incomplete_nodes(tmp_path: Path, alone: Any) -> None:
    cfg, watch, other = config(checkpoint_every=10), Watch(), Store(tmp_path / "other")
    with pytest.raises(Killed):
        train(
            cfg,
            tmp_path,
            store=Store(tmp_path / "store"),
            progress=Watch({19: lambda: time.sleep(0.5), 22: kill}),
        )
    train(cfg, tmp_path, store=other, progress=watch)
    assert watch.noted("the log rows up to step 18 are no longer in the store") and other.verify() == []
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)


@pytest.mark.parametrize("sessions", [pytest.param("-S", marks=pytest.mark.slow), "S-S", "-SS"])
def test_a_run_with_sessions_without_a_store_writes_no_incomplete_nodes(
    tmp_path: Path, alone: Any, sessions: str
) -> None:
    cfg, store, watch = config(checkpoint_every=10), Store(tmp_path / "store"), Watch()
    for i, kind in enumerate(sessions):
        watch = Watch({} if i == len(sessions) - 1 else {12 * (i + 1): kill})
        with suppress(Killed):
            train(cfg, tmp_path, store=store if kind == "S" else None, progress=watch)
    assert outcome(tmp_path / cfg.run_id) == alone(cfg) and store.verify() == []
    assert watch.noted("were trained without a store, so no steps of this run are saved in the store") == (
        sessions != "-SS" or store.node_keys() == set()
    )
    again = from_dict(cfg.model_dump() | {"preset": "again"})
    train(again, tmp_path, store=store)
    assert outcome(tmp_path / again.run_id) == alone(again) and store.verify() == []


# -- --fresh


def test_fresh_trains_all_steps_again(tmp_path: Path, alone: Any, filled_store: Any) -> None:
    cfg, watch, store = config(), Watch(), filled_store(tmp_path / "store", config())
    nodes_before = {path: path.read_bytes() for path in (tmp_path / "store" / "nodes").iterdir()}
    summary = train(cfg, tmp_path, store=store, fresh=True, progress=watch)
    assert (
        summary["ledger"] == ledger(STEPS, 0)
        and watch.steps == list(range(1, STEPS + 1))
        and reused_steps(tmp_path / cfg.run_id) == []
    )
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)
    assert not watch.noted("other bits") and not watch.noted("different environment")
    assert {path: path.read_bytes() for path in (tmp_path / "store" / "nodes").iterdir()} == nodes_before


def test_fresh_reports_a_store_with_other_bits(tmp_path: Path, alone: Any, filled_store: Any) -> None:
    """The stored state is well-formed but wrong, for example after a memory error."""
    cfg, watch, store = config(), Watch(), filled_store(tmp_path / "store", config())
    wrong = store.load(node(store, 27))
    wrong["model/embed.weight"][3, 3] += 1e-6
    (entry,) = [store.node(node(store, 27).key)]
    node_file(store, 27).unlink()
    store.save(entry, wrong)
    train(cfg, tmp_path, store=store, fresh=True, progress=watch)
    assert watch.noted("the store has a different state for step 27") and watch.noted("mainrun store audit")
    assert outcome(tmp_path / cfg.run_id) == alone(cfg) and active_leases(store) == {}


# -- waiting, leases and takeovers


def test_a_run_can_be_trained_up_to_a_step(
    tmp_path: Path, alone: Callable[[TrainConfig], dict[str, Any]]
) -> None:
    """Training stops at step `until` even if the store has later steps.

    The store keeps a node at step `until`.
    """
    cfg, other, store = config(), config(decay_frac=0.2), Store(tmp_path / "store")
    for where in (None, store):
        out = tmp_path / str(where is None)
        for until in (5, 30):
            with pytest.raises(Interrupted, match=f"stopped at step {until} of {STEPS}; everything is saved"):
                train(cfg, out, store=where, until=until)
            assert RunDir(out / cfg.run_id).status()["state"] == "interrupted"
            assert [row["step"] for row in rows(out / cfg.run_id) if row["event"] == "step"] == [
                *range(1, until + 1)
            ]
        with pytest.raises(Interrupted, match="stopped at step 30"):
            train(cfg, out, store=where, until=20)  # the run has already trained more than 20 steps
        if where:
            with pytest.raises(Interrupted, match="stopped at step 10"):
                train(other, tmp_path / "other", store=where, until=10)
            assert reused_steps(tmp_path / "other" / other.run_id) == [1, 2, 3, 4, 5]
        assert train(cfg, out, store=where, until=STEPS)["ledger"] == ledger(STEPS, 0)
        assert outcome(out / cfg.run_id) == alone(cfg)


def test_steps_of_another_machine_are_never_stored_under_this_machines_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may round differently, so its checkpoint may have other bits than this machine's."""
    cfg, store, watch = config(checkpoint_every=10), Store(tmp_path / "store"), Watch()
    with monkeypatch.context() as patch:
        patch.setattr("mainrun.core.device.cpu_name", lambda: "another processor")
        with pytest.raises(Killed):
            train(cfg, tmp_path, store=store, progress=Watch({14: kill}))
    train(cfg, tmp_path, store=store, progress=watch)
    assert watch.noted("trained in a different environment")
    assert not store.node_keys() & set(keys(cfg)) and store.verify() == []


@pytest.mark.parametrize(("stored", "kills"), [(False, (12, 23, 7, 30)), (True, (20, 22, 25, 29, 31))])
def test_all_lost_steps_and_sessions_are_counted(
    tmp_path: Path, alone: Any, stored: bool, kills: tuple[int, ...]
) -> None:
    """A run is killed several times before its first checkpoint.

    Every trained step and session counts once.
    """
    cfg, store, trained = config(), Store(tmp_path / "store") if stored else None, 0
    for at in kills:
        watch = Watch({at: kill})
        with pytest.raises(Killed):
            train(cfg, tmp_path, store=store, progress=watch)
        trained += len(watch.steps)
    watch = Watch()
    summary = train(cfg, tmp_path, store=store, progress=watch)
    assert summary["resumed"] == len(kills)
    assert summary["ledger"]["trained"] == trained + len(watch.steps) and summary["ledger"]["reused"] == 0
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)


def test_a_run_waits_for_shared_steps_that_another_run_trains(tmp_path: Path, alone: Any) -> None:
    """Two runs in separate threads train each shared step only once."""
    store, watch = Store(tmp_path / "store"), Watch()
    one, two = config(), config(decay_frac=0.2)
    results: list[dict[str, Any]] = []
    other = threading.Thread(target=lambda: results.append(train(two, tmp_path, store=store, progress=watch)))

    def begin() -> None:
        other.start()
        deadline = time.monotonic() + 60
        while not watch.noted("waiting for custom-") and time.monotonic() < deadline:
            time.sleep(0.01)

    results.append(train(one, tmp_path, store=store, progress=Watch({3: begin})))
    other.join()
    assert watch.noted(f"waiting for {one.run_id}, which trains the shared steps up to step 18")
    distinct = len({*keys(one)[1:], *keys(two)[1:]})
    assert distinct == STEPS + 10 and sum(summary["ledger"]["trained"] for summary in results) == distinct
    for cfg in (
        one,
        two,
    ):
        # The guards are not compared, because one guard detects that another thread uses the random
        # generator.
        assert outcome(tmp_path / cfg.run_id) | {"guards": None} == alone(cfg) | {"guards": None}
    assert store.verify() == [] and active_leases(store) == {}


# The decay of EARLY begins after step 27. LATE has nodes at steps 18 and 31, and saves a node at step 27 only
# if another run requests the node.
EARLY, LATE, FORK = {"preset": "early"}, {"preset": "late", "decay_frac": 0.2}, 27


class RunInThread(threading.Thread):
    """A thread that trains a run."""

    def __init__(
        self, out: Path, store: Store, cfg: TrainConfig, watch: Watch | None = None, keep: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.out, self.store, self.cfg, self.watch, self.keep = out, store, cfg, watch or Watch(), keep
        self.summary: dict[str, Any] = {}

    def run(self) -> None:
        with suppress(Killed):
            self.summary = train(self.cfg, self.out, store=self.store, progress=self.watch, keep=self.keep)

    def begin(self) -> None:
        """Start the thread, and return as soon as its run waits for another run."""
        self.start()
        wait_until(lambda: self.watch.noted("waiting for"))

    @property
    def trained(self) -> int:
        return self.summary["ledger"]["trained"]


def wait_until(happens: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not happens():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def lease_of(store: Store, step: int, cfg: TrainConfig) -> dict[str, Any]:
    return active_leases(store).get(keys(cfg)[step], {})


def wait_for_beats(store: Store, step: int, cfg: TrainConfig, count: int) -> None:
    """Wait for a number of heartbeats of a lease."""
    first = lease_of(store, step, cfg).get("beat", 0)
    wait_until(lambda: lease_of(store, step, cfg).get("beat", 0) >= first + count)


def same_bits(run: Path, alone: dict[str, Any]) -> bool:
    """Return whether a run has the same bits as a run from scratch.

    The guards are not compared, because one guard detects the other thread.
    """
    return outcome(run) | {"guards": None} == alone | {"guards": None}


@pytest.fixture
def fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every lease send a heartbeat every 0.2 seconds. An expired lease would still take 30 seconds."""
    monkeypatch.setattr(leases, "HEARTBEATS_PER_TTL", 150)


@pytest.mark.parametrize("late_first", [False, True])
def test_a_run_requests_a_fork_before_the_other_run_passes_it(
    tmp_path: Path, alone: Any, late_first: bool
) -> None:
    """Both runs train towards the same node when the second run requests another node at the fork."""
    store = Store(tmp_path / "store")
    cfgs = [config(**changes) for changes in ((LATE, EARLY) if late_first else (EARLY, LATE))]
    wants: list[set[str]] = []
    second = RunInThread(tmp_path, store, cfgs[1])
    first = RunInThread(
        tmp_path, store, cfgs[0], Watch({3: lambda: (second.begin(), wants.append(store.wants()))})
    )
    first.start()
    first.join()
    second.join()
    assert wants == [{keys(cfgs[0])[FORK]}] and store.wants() == set()
    assert first.trained + second.trained == STEPS + 10
    assert all(same_bits(tmp_path / cfg.run_id, alone(cfg)) for cfg in cfgs)
    assert store.verify() == [] and active_leases(store) == {}


def test_a_late_request_is_read_at_a_heartbeat_and_the_lease_is_kept(
    tmp_path: Path, alone: Any, fast_heartbeat: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run waits for the node at the fork, although the first run has already passed the fork."""
    store, early, late = Store(tmp_path / "store"), config(**EARLY), config(**LATE)
    second = RunInThread(tmp_path, store, early)
    seen: dict[int, Any] = {}

    def slow(self: Store, entry: Node, *args: Any) -> Node:
        if entry.step == FORK:
            wait_until(lambda: lease_of(store, 31, late)["at"] == FORK - 1)
            wait_for_beats(store, 31, late, 2)
        return save(self, entry, *args)

    save = Store.save
    monkeypatch.setattr(Store, "save", slow)

    def start_second() -> None:
        seen[20] = lease_of(store, 31, late)
        second.begin()
        # Wait for two heartbeats, because the first may have begun before the request.
        wait_for_beats(store, 31, late, 2)

    def go_past() -> None:
        seen[29] = lease_of(store, 31, late)
        wait_until(lambda: second.watch.noted("steps 19 to 27 of 37 are reused"))

    first = RunInThread(tmp_path, store, late, Watch({20: start_second, 29: go_past}))
    first.start()
    first.join()
    second.join()
    assert second.watch.noted(f"waiting for {late.run_id}, which trains the shared steps up to step 27")
    assert seen[20]["at"] in (17, 18), (
        "written when the lease was acquired; 17 while node 18 is being written"
    )
    assert seen[29]["step"] == 31, "the lease is kept"
    assert first.trained == STEPS and second.trained == 10
    assert [entry.step for entry in store.summary()[0] if entry.run == late.run_id] == [18, 27, 31, 36, 37]
    assert all(same_bits(tmp_path / cfg.run_id, alone(cfg)) for cfg in (early, late))
    assert store.wants() == set() and store.verify() == [] and active_leases(store) == {}


@pytest.mark.parametrize("known", [True, False])
def test_a_run_past_the_fork_is_not_waited_for(
    tmp_path: Path, alone: Any, fast_heartbeat: None, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """The second run stops waiting as soon as it learns that the first run has passed the fork."""
    store, early, late, beat = (
        Store(tmp_path / "store"),
        config(**EARLY),
        config(**LATE),
        sharing.LeaseHolder.beat,
    )
    second = RunInThread(tmp_path, store, early)
    if not known:  # the first run keeps reporting step 18 until the second run waits
        monkeypatch.setattr(
            sharing.LeaseHolder,
            "beat",
            lambda self: beat(self) if second.watch.noted("waiting for") else {"at": 18},
        )

    def start_second() -> None:
        if known:
            wait_until(lambda: lease_of(store, 31, late)["at"] == 28)
        second.start()
        wait_until(lambda: 30 in second.watch.steps)

    first = RunInThread(tmp_path, store, late, Watch({28: start_second}))
    first.start()
    first.join()
    second.join()
    assert second.watch.noted("waiting for") != known
    assert (first.trained, second.trained) == (STEPS, 19)
    assert all(same_bits(tmp_path / cfg.run_id, alone(cfg)) for cfg in (early, late))
    assert store.verify() == [] and active_leases(store) == {}


def test_a_waiting_run_continues_if_the_holder_fails(tmp_path: Path, alone: Any) -> None:
    store, early, late = Store(tmp_path / "store"), config(**EARLY), config(**LATE)
    second = RunInThread(tmp_path, store, early)
    first = RunInThread(tmp_path, store, late, Watch({20: lambda: (second.begin(), kill())}))
    first.start()
    first.join()
    second.join()
    assert first.summary == {} and second.trained == 19 and same_bits(tmp_path / early.run_id, alone(early))
    assert store.verify() == [] and active_leases(store) == {} and store.wants() == set()


@pytest.mark.slow
def test_of_two_leases_acquired_at_the_same_moment_one_is_released(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both runs look for leases at the same moment, find none, and acquire leases on different nodes."""
    store, hold, barrier = Store(tmp_path / "store"), sharing.LeaseHolder.acquire, threading.Barrier(2)
    runs = [
        RunInThread(tmp_path, store, config(**EARLY), keep=[10]),
        RunInThread(tmp_path, store, config(**LATE)),
    ]
    steps_leased: list[int] = []

    class Chance:
        """Replaces the random waits. The first run waits long enough for the second run to finish."""

        def uniform(self, low: float, high: float) -> float:
            assert low < high, "equal waits would collide again"
            return low if threading.current_thread() is runs[1] else 50

    monkeypatch.setattr(sharing, "CHANCE", Chance())

    def together(self: Any, step: int) -> None:
        if first := len(steps_leased) < 2:
            steps_leased.append(step)
            barrier.wait(60)
        hold(self, step)
        if first:
            assert self.lease
            barrier.wait(60)

    monkeypatch.setattr(sharing.LeaseHolder, "acquire", together)
    runs[0].start()
    # Start the second run after the first run has drawn its weights, because the threads share one random
    # generator.
    wait_until(lambda: steps_leased)
    runs[1].start()
    for run in runs:
        run.join()
    assert steps_leased == [0, 0] and sum(run.trained for run in runs) == STEPS + 10
    assert all(same_bits(tmp_path / run.cfg.run_id, alone(run.cfg)) for run in runs)
    assert store.verify() == [] and active_leases(store) == {} and store.wants() == set()


ODD_LEASES: list[dict[str, Any]] = [
    {}, {"root": 7}, {"config": None}, {"config": {"lr": "much"}},
    {"config": {"num_titles": 1, "batch_size": 10**6}}, {"step": 99},
    {"step": "x"}, {"step": 29}, {"at": None}, {"at": "late"}, {"at": 27}, {"scores": 7},
    {"scores": [[]], "geometry": 3},
    {"fired": None}, {"fired": "x"}, {"fired": [10**6]},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_LEASES, ids=str)
def test_the_content_of_another_lease_is_used_or_ignored(
    tmp_path: Path, alone: Any, filled_store: Any, odd: dict[str, Any]
) -> None:
    cfg, other, watch = config(**EARLY), config(**LATE, eval_per_epoch=3), Watch()
    store = filled_store(tmp_path / "store", config())
    for step in (27, 36, 37):
        node_file(store, step).unlink()
    content = {
        "run": other.run_id,
        "config": other.model_dump(mode="json"),
        "root": keys(other)[0],
        "step": 31,
        "at": 18,
    }
    content |= {"scores": [24], "geometry": list(other.geometry)} | odd
    lease = Leases(store.files).acquire(keys(other)[31], **content)
    assert lease
    watch.on = {"waiting for": lambda: lease.release(unfinished=True)}
    with pytest.raises(Interrupted):
        train(cfg, tmp_path, store=store, progress=watch, until=28)
    lease.release()
    assert watch.noted("waiting for") == (not odd or "scores" in odd), "no score is needed up to step 27"
    assert reused_steps(tmp_path / cfg.run_id) == list(range(1, 19)) and watch.steps == list(range(19, 29))
    trained = rows(tmp_path / cfg.run_id)
    assert trained == alone(cfg)["rows"][: len(trained)]


def test_an_outdated_request_costs_one_state_and_no_bit(tmp_path: Path, alone: Any) -> None:
    cfg, store = config(), Store(tmp_path / "store")
    for step in (0, 9, 18):
        store.want(keys(cfg)[step], "somebody")
    store.want("0" * 64, "somebody")
    store.files.write("wants/readme", b"?")
    assert train(cfg, tmp_path, store=store)["ledger"] == ledger(STEPS, 0) and outcome(
        tmp_path / cfg.run_id
    ) == alone(cfg)
    assert [entry.step for entry in store.summary()[0]] == [9, 18, 27, 36, 37]
    assert store.wants() == {keys(cfg)[0], "0" * 64, "readme"}
    assert [finding for finding in store.verify() if "wants/readme" not in finding] == [] and active_leases(
        store
    ) == {}


def test_reusing_a_node_past_its_own_lease_frees_the_lease(
    tmp_path: Path, alone: Any, filled_store: Any, fast_heartbeat: None
) -> None:
    """A run stops at a requested step.

    By then, the store has nodes beyond the last step of the run's lease.
    """
    cfg, store, full = config(), Store(tmp_path / "store"), filled_store(tmp_path / "full", config())

    def fill_store() -> None:
        store.want(keys(cfg)[15], "somebody")
        wait_for_beats(store, 18, cfg, 2)
        for entry in full.summary()[0][:2]:
            store.save(full.node(entry.key), full.load(entry))

    seen: list[set[str]] = []
    summary = train(
        cfg,
        tmp_path,
        store=store,
        progress=Watch({5: fill_store, 30: lambda: seen.append(set(active_leases(store)))}),
    )
    assert summary["ledger"] == ledger(STEPS, 12) and outcome(tmp_path / cfg.run_id) == alone(cfg)
    assert seen == [{keys(cfg)[36]}] and active_leases(store) == {} and store.verify() == []


def test_an_interrupted_waiting_run_can_be_resumed(tmp_path: Path, alone: Any) -> None:
    cfg, store = config(), Store(tmp_path / "store")
    lease = Leases(store.files).acquire(keys(cfg)[18], run="another", step=18, scores=[1], geometry=[8, 16])
    assert lease is not None
    with pytest.raises(Interrupted, match="SIGTERM at step 0") as e:
        train(cfg, tmp_path, store=store, progress=Watch(on={"waiting for another": terminate}))
    assert e.value.exit_code == 75 and RunDir(tmp_path / cfg.run_id).status()["state"] == "interrupted"
    assert set(active_leases(store)) == {lease.key}, "the holder keeps its lease"
    lease.release(unfinished=True)
    assert train(cfg, tmp_path, store=store)["ledger"] == ledger(STEPS, 0)
    assert outcome(tmp_path / cfg.run_id) == alone(cfg) and active_leases(store) == {}


def test_scores_that_the_holder_does_not_write_are_not_waited_for(tmp_path: Path, alone: Any) -> None:
    cfg, store, watch = config(eval_per_epoch=5), Store(tmp_path / "store"), Watch()
    lease = Leases(store.files).acquire(keys(cfg)[18], run="another", step=18, scores=[1], geometry=[8, 16])
    assert lease is not None
    # After step 14, the run needs no score before step 18 and would wait for the holder of the lease. The
    # lease is therefore released at step 14.
    watch.at = {14: lease.release}
    train(cfg, tmp_path, store=store, progress=watch)
    assert not watch.noted("waiting for") and outcome(tmp_path / cfg.run_id) == alone(cfg)


def test_a_dead_holder_is_not_waited_for(tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, store, watch = config(), Store(tmp_path / "store"), Watch()
    gone = subprocess.Popen(["true"])
    gone.wait()
    with monkeypatch.context() as patch:
        patch.setattr(
            leases, "this_process", lambda: {"boot": leases._boot(), "pid": gone.pid, "started": "1"}
        )
        lease = Leases(store.files).acquire(keys(cfg)[18])
    assert lease is not None
    started = time.monotonic()
    train(cfg, tmp_path, store=store, progress=watch)
    lease._stop.set()
    assert (
        time.monotonic() - started < 20
        and not watch.noted("waiting for")
        and outcome(tmp_path / cfg.run_id) == alone(cfg)
    )
    assert [entry.step for entry in store.summary()[0]] == [18, 27, 36, 37] and active_leases(store) == {}


def test_a_holder_whose_lease_was_taken_over_stores_no_node_and_finishes(tmp_path: Path, alone: Any) -> None:
    cfg, store, watch = config(), Store(tmp_path / "store"), Watch()
    name = f"leases/{keys(cfg)[18]}.000002"
    watch.at = {10: lambda: store.files.create(name, b"{}"), 30: lambda: store.files.remove(name)}
    train(cfg, tmp_path, store=store, progress=watch)
    assert watch.noted("step 18 is not saved in the store: another process has taken over these steps")
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)
    kept = store.summary()[0]
    assert [(entry.begins, entry.step) for entry in kept] == [(0, 27), (27, 36), (36, 37)], (
        "the next node has the rows of both parts"
    )
    assert store.verify() == [] and active_leases(store) == {}
    again = config(decay_frac=0.2)
    assert train(again, tmp_path, store=store)["ledger"] == ledger(STEPS, 27) and outcome(
        tmp_path / again.run_id
    ) == alone(again)


def test_a_run_that_cannot_keep_nodes_blocks_no_other_run(tmp_path: Path, alone: Any) -> None:
    """A single state is larger than the maximum size of the store."""
    cfg, store, watch = config(), Store(tmp_path / "store", size=1000), Watch()
    seen: list[set[str]] = []
    watch.at = {33: lambda: seen.append(set(active_leases(store)))}
    train(cfg, tmp_path, store=store, progress=watch)
    assert watch.noted("step 18 and later steps are not saved in the store") and watch.noted(
        "raise --store-size"
    )
    assert (
        seen == [set()]
        and active_leases(store) == {}
        and outcome(tmp_path / cfg.run_id) == alone(cfg)
        and store.node_keys() == set()
    )


# -- damage to the store


def flip_bit(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replace_folder_by_file(path: Path) -> None:

    shutil.rmtree(path)
    path.write_bytes(b"?")


def replace_file_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


Damage = Callable[[Store, Path], object]
DAMAGE: dict[str, tuple[Damage, str, int]] = {
    "a bit of a state": (lambda s, p: flip_bit(state_file(s, 37)),
        "of step 37 .* the state is incomplete or was changed", 36),
    "a bit of every state": (lambda s, p: [flip_bit(state_file(s, n)) for n in (18, 27, 36, 37)],
        "of step 18 .* the state is incomplete", 0),
    "half of a state": (lambda s, p: os.truncate(state_file(s, 37), 5000),
        "of step 37 .* the state is incomplete or was changed", 36),
    "a state without a byte": (lambda s, p: os.truncate(state_file(s, 37), 0),
        "of step 37 .* the state is incomplete", 36),
    "a node in the middle": (lambda s, p: node_file(s, 18).unlink(),
        "of step 27 .* the rows before step 18 are lost", 19),
    "a foreign file for a node": (lambda s, p: node_file(s, 27).write_bytes(b"\0hello\xff" * 99),
        "step 27 .* incomplete, or is not a node", 19),
    "a folder for a node": (lambda s, p: replace_file_by_folder(node_file(s, 37)),
        "of step 37 .* the file is a folder", 36),
    "a changed head": (lambda s, p: flip_bit(node_file(s, 27), 200),
        "step 27 .* (changed after it was written|incomplete)", 28),
    "changed rows": (lambda s, p: flip_bit(node_file(s, 27)),
        "step 27 .* rows are incomplete or were changed", 28),
    "half of the rows": (lambda s, p: os.truncate(node_file(s, 27), node_file(s, 27).stat().st_size - 999),
        "rows are incomplete", 28),
    "another node's name": (lambda s, p: shutil.copy(node_file(s, 18), node_file(s, 27)),
        "contains a different node, ", 28),
    "a foreign file beside them": (lambda s,
        p: [(p / f / "readme").write_text("?") for f in ("nodes", "states", "leases")], "", 37),
    "a file for all nodes": (lambda s, p: replace_folder_by_file(p / "nodes"),
        "the store .* cannot be (used|written)", 0),
    "a file for all states": (lambda s, p: replace_folder_by_file(p / "states"),
        "the store .* cannot be (used|written)", 0),
    "a file for all roots": (lambda s, p: replace_folder_by_file(p / "roots"),
        "cannot be searched for other versions", 37),
    "a file for all leases": (lambda s, p: replace_folder_by_file(p / "leases"), "", 37),
    "all states": (lambda s, p: shutil.rmtree(p / "states"), "", 0),
    "the whole store": (lambda s, p: shutil.rmtree(p), "", 0),
}  # fmt: skip
SLOW_DAMAGE = {
    "a state without a byte", "a folder for a node", "a changed head", "half of the rows",
    "another node's name", "a file for all nodes",
    "a file for all states", "a file for all leases",
}  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "words", "reused"),
    [
        pytest.param(*damage, id=name, marks=pytest.mark.slow if name in SLOW_DAMAGE else [])
        for name, damage in DAMAGE.items()
    ],
)
def test_damage_is_reported_and_costs_steps_but_no_bit(
    tmp_path: Path, alone: Any, filled_store: Any, damage: Damage, words: str, reused: int
) -> None:
    cfg, watch = config(), Watch()
    store = filled_store(tmp_path / "store", cfg)
    damage(store, tmp_path / "store")
    summary = train(cfg, tmp_path, store=store, progress=watch)
    assert re.search(words, "\n".join(watch.notes)), watch.notes
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)
    assert summary["ledger"]["reused"] >= reused if words else summary["ledger"]["reused"] == reused
    if all(path.is_dir() for path in (tmp_path / "store").iterdir() if path.name != "store.json"):
        assert [
            finding
            for finding in store.verify()
            if "not a file of a store" not in finding and "its root" not in finding
        ] == []
        if reused < STEPS:  # the run trained the damaged nodes again
            again = from_dict(cfg.model_dump() | {"preset": "again"})
            assert train(again, tmp_path, store=store)["ledger"] == ledger(STEPS, STEPS) and outcome(
                tmp_path / again.run_id
            ) == alone(again)


def test_damage_during_a_run_costs_no_bit(tmp_path: Path, alone: Any, filled_store: Any) -> None:
    """The nodes of earlier steps are deleted while the run trains."""
    cfg, store = config(decay_frac=0.2), filled_store(tmp_path / "store", config())
    watch = Watch({28: lambda: [shutil.rmtree(tmp_path / "store" / name) for name in ("nodes", "states")]})
    train(cfg, tmp_path, store=store, progress=watch)
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)
    assert watch.noted("the log rows up to step 27 are no longer in the store") and store.verify() == []


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    if subprocess.run(["mount", *options, str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_read_only_store_is_read(tmp_path: Path, alone: Any, filled_store: Any) -> None:
    cfg, watch, place = config(decay_frac=0.2), Watch(), tmp_path / "store"
    store = filled_store(place, config())
    before = {path: path.stat() for path in place.rglob("*") if path.is_file()}
    with mounted(place, "--bind", str(place)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (place / "x").touch()
        summary = train(cfg, tmp_path, store=store, progress=watch)
    assert watch.noted("cannot be used (Read-only") and sum("cannot be" in note for note in watch.notes) == 1
    assert summary["ledger"] == ledger(STEPS, 27) and outcome(tmp_path / cfg.run_id) == alone(cfg)
    assert {path: path.stat().st_mtime for path in before} == {
        path: stat.st_mtime for path, stat in before.items()
    }


@pytest.mark.parametrize("room", [0, 20_000, 150_000])
def test_a_full_disk_under_the_store_costs_no_step_of_the_run(tmp_path: Path, alone: Any, room: int) -> None:
    cfg, watch, place = config(), Watch(), tmp_path / "store"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        store = Store(place)
        store.begin("0" * 64, {})
        disk = os.statvfs(place)
        (place / "new").mkdir(exist_ok=True)
        (place / "new" / "ballast").write_bytes(b"x" * max(0, disk.f_bavail * disk.f_frsize - room))
        summary = train(cfg, tmp_path, store=store, progress=watch)
        assert summary["ledger"] == ledger(STEPS, 0) and outcome(tmp_path / cfg.run_id) == alone(cfg)
        assert watch.noted("no more steps are saved in it") and (watch.noted("o space left")), watch.notes
        assert (
            store.node_keys() == set()
            and active_leases(store) == {}
            and [path.name for path in (place / "new").iterdir()] == ["ballast"]
        )
        (place / "new" / "ballast").unlink()
        again = from_dict(cfg.model_dump() | {"preset": "again"})
        train(again, tmp_path, store=store)
        assert outcome(tmp_path / again.run_id) == alone(again) and len(store.node_keys()) == 4


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps_does_no_harm(
    tmp_path: Path, alone: Any, filled_store: Any, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    cfg, real = config(decay_frac=0.2), time.time
    store = filled_store(tmp_path / "store", config())
    store.size = 5 * node(store, 18).size + 1000
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    for path in (tmp_path / "store" / "states").iterdir():
        os.utime(path, (real() - jump, real() - jump))
    assert train(cfg, tmp_path, store=store)["ledger"] == ledger(STEPS, 27)
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)
    assert [
        finding for finding in store.verify() if "used in the future" not in finding
    ] == [] and active_leases(store) == {}
    assert store.files.list("states").keys() >= {
        f"{store.node(keys(cfg)[STEPS], rows=False).state}.safetensors"
    }


def test_an_unexpected_error_of_the_store_costs_no_step_of_the_run(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that fsspec uses may raise an exception that the store does not expect."""

    def broken(*args: Any) -> Any:
        raise RuntimeError("the bucket has a hole")

    cfg, store, watch = config(), Store(tmp_path / "store"), Watch()
    monkeypatch.setattr(Store, "save", broken)
    assert (
        train(cfg, tmp_path, store=store, progress=watch)["ledger"] == ledger(STEPS, 0)
        and active_leases(store) == {}
    )
    assert watch.noted("RuntimeError('the bucket has a hole')); no more steps are saved in it") and outcome(
        tmp_path / cfg.run_id
    ) == alone(cfg)


def test_eviction_costs_steps_and_no_bit(tmp_path: Path, alone: Any, filled_store: Any) -> None:
    """The store has room for one state, so each new state evicts the previous one."""
    store = Store(tmp_path / "store", size=node(filled_store(tmp_path / "full", config()), 18).size + 1000)
    train(config(), tmp_path, store=store)
    assert len(store.states()) == 1 and len(store.node_keys()) == 4
    for cfg, reused in (
        (config(decay_frac=0.2), 0),
        (config(preset="again"), 0),
        (config(preset="third"), STEPS),
    ):
        assert train(cfg, tmp_path, store=store)["ledger"] == ledger(STEPS, reused)
        assert outcome(tmp_path / cfg.run_id) == alone(cfg) and store.verify() == []


# -- other machines


def test_another_number_of_threads_shares_nothing_and_reports_why(tmp_path: Path, filled_store: Any) -> None:
    """The runs train one step, because two threads take seconds on a busy machine."""
    cfg, watch = config(threads=2), Watch()
    try:
        with pytest.raises(Interrupted):
            train(cfg, tmp_path, store=filled_store(tmp_path / "store", config()), progress=watch, until=1)
    finally:
        torch.set_num_threads(1)
    assert watch.steps == [1] and reused_steps(tmp_path / cfg.run_id) == []
    assert watch.noted(
        "the store has this run's first steps only from a different environment, so they are not reused "
        "(machine_class threads: 1 there"
    )
    watch = Watch()
    store = filled_store(tmp_path / "another", config())
    with pytest.raises(Interrupted):
        train(config(lr=0.02), tmp_path, store=store, progress=watch, until=1)
    assert watch.steps == [1]
    assert not watch.noted("different environment"), "the machine is the same and no step is shared"


@pytest.mark.parametrize("what", ["device", "torch"])
def test_another_machine_or_library_shares_nothing_and_reports_why(
    tmp_path: Path, filled_store: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    cfg, watch, versions = config(), Watch(), machine_class.versions
    store = filled_store(tmp_path / "store", cfg)
    monkeypatch.setattr(machine, "cpu_name", lambda: "Another CPU")
    if what == "torch":
        monkeypatch.undo()
        monkeypatch.setattr(sharing, "versions", lambda: versions() | {"torch": "9.9"})
    assert train(cfg, tmp_path, store=store, progress=watch)["ledger"] == ledger(STEPS, 0)
    assert watch.noted(
        f"so they are not reused ({'machine_class device' if what == 'device' else 'versions torch'}: "
    )
    assert len(store.node_keys()) == 8, "the run stores its own nodes as well"


# -- runs that fail


def test_a_run_that_diverges_leaves_no_lease_and_no_damage(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, store, calls = config(), Store(tmp_path / "store"), [0]
    original = trainer.compute_loss

    def diverging_loss(*args: Any) -> Any:
        calls[0] += 1
        loss = original(*args)
        if calls[0] != 30:
            return loss
        return loss._replace(minimized=loss.minimized * torch.inf, plain=loss.plain * torch.inf)

    monkeypatch.setattr(trainer, "compute_loss", diverging_loss)
    with pytest.raises(Diverged, match="at step 30"):
        train(cfg, tmp_path, store=store)
    monkeypatch.undo()
    assert (
        active_leases(store) == {}
        and [entry.step for entry in store.summary()[0]] == [18, 27]
        and store.verify() == []
    )
    other = config(decay_shape="sqrt")  # this run does not wait for a lease
    assert train(other, tmp_path, store=store)["ledger"] == ledger(STEPS, 27) and outcome(
        tmp_path / other.run_id
    ) == alone(other)
    train(cfg, tmp_path, store=store)
    assert outcome(tmp_path / cfg.run_id) == alone(cfg)


def test_a_config_that_diverges_also_diverges_from_the_store(tmp_path: Path) -> None:
    cfg, store = (
        config(lr=100.0, weight_decay=1.0, schedule="constant", eval_per_epoch=40),
        Store(tmp_path / "store"),
    )
    messages = set()
    for i in range(2):
        with pytest.raises(Diverged) as e:
            train(cfg, tmp_path / str(i), store=store)
        messages.add(str(e.value))
    assert len(messages) == 1 and store.node_keys() and store.verify() == [] and active_leases(store) == {}
    assert all(
        tensor.isfinite().all() for entry in store.summary()[0] for tensor in store.load(entry).values()
    )
    assert rows(tmp_path / "0" / cfg.run_id) == rows(tmp_path / "1" / cfg.run_id) and reused_steps(
        tmp_path / "1" / cfg.run_id
    )


# -- a batch of runs

LADDER = """
[[steps]]
name = "one"
[[steps]]
name = "shape"
decay_shape = "sqrt"
[[steps]]
name = "start"
decay_frac = 0.2
decay_shape = "linear"
[[steps]]
name = "twin"
decay_frac = 0.2
[[steps]]
name = "apart"
lr = 0.02
[[steps]]
name = "longer"
lr = 0.01
epochs = 2
"""


def run_cli(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def test_a_ladder_trains_each_shared_step_once(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ladder = tmp_path / "runs", tmp_path / "ladder.toml"
    ladder.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in (TINY | SMALL).items()) + LADDER)
    sets: list[str] = []
    planned = json.loads(run_cli("train", "--preset", ladder, *sets, "--out", out, "--plan", "--json").stdout)
    assert not out.exists(), "a plan writes nothing"
    text = run_cli("train", "--preset", ladder, *sets, "--out", out, "--plan").stdout
    assert f"requested steps: {planned['asked']}; to train: {planned['to_train']}; ratio: 1.89" in text
    assert "--plan trains nothing" in text
    pins: list[set[str]] = []
    original = Store.save

    def spy(self: Store, *args: Any) -> Any:
        pins.append(self.pinned())
        return original(self, *args)

    monkeypatch.setattr(Store, "save", spy)
    summaries = json.loads(run_cli("train", "--preset", ladder, *sets, "--out", out, "--json").stdout)
    ledgers = [summary["ledger"] for summary in summaries]
    configs = [RunDir(out / summary["run"]).config() for summary in summaries]
    distinct = {key for cfg in configs for key in keys(cfg)[1:]}
    assert sum(entry["trained"] for entry in ledgers) == planned["to_train"] == len(distinct)
    assert sum(entry["asked"] for entry in ledgers) == planned["asked"] == 5 * STEPS + 74
    assert {s["run"]: s["ledger"]["trained"] for s in summaries} == {
        part["name"]: part["steps"] for part in planned["runs"]
    }
    for cfg in configs:
        assert outcome(out / cfg.run_id) == alone(cfg)
    store = Store(out / ".store")
    assert store.verify() == [] and active_leases(store) == {}
    assert all(pins) and store.pinned() == set() and list((out / ".store" / "pins").iterdir()) == []
    assert (
        json.loads(run_cli("train", "--preset", ladder, *sets, "--out", out, "--plan", "--json").stdout)[
            "to_train"
        ]
        == 0
    )


def test_a_plan_counts_the_steps_in_run_directories(tmp_path: Path) -> None:
    """A plan counts only the steps that the run directories lack, with or without a store."""
    for name, store in (("with", []), ("without", ["--no-store"])):
        out = tmp_path / name

        def steps(*sets: str, out: Path = out, store: Sequence[str] = store) -> list[int]:
            planned = json.loads(
                run_cli(
                    "train",
                    "--preset",
                    "baseline",
                    *tiny_sets(**SMALL),
                    *sets,
                    "--out",
                    out,
                    "--plan",
                    "--json",
                    *store,
                ).stdout
            )
            assert planned["to_train"] == sum(run["steps"] for run in planned["runs"])
            return [run["steps"] for run in planned["runs"]]

        cfg = baseline()
        assert steps() == [STEPS]
        with pytest.raises(Interrupted):
            train(cfg, out, until=20)
        assert steps() == [STEPS - 20]
        train(cfg, out)
        assert steps() == [0] and steps("--set", "lr=0.02") == [STEPS]
        shutil.copytree(out, tmp_path / f"bare {name}")
        shutil.rmtree(tmp_path / f"bare {name}" / cfg.run_id / "checkpoints")
        assert steps(out=tmp_path / f"bare {name}") == [0], "the summary shows that the run is done"
        assert not (out / ".store").exists()
    (out / cfg.run_id / "summary.json").unlink()
    for path in (out / cfg.run_id / "checkpoints").glob("*/state.safetensors"):
        flip_bit(path)
    assert steps() == [STEPS], "damaged checkpoints do not count"


def test_a_failed_ladder_removes_its_pins(tmp_path: Path) -> None:
    ladder = tmp_path / "ladder.toml"
    ladder.write_text(
        "lr = 1000.0\nweight_decay = 100.0\noptimizer = 'adamw'\n"
        "[[steps]]\nname = 'a'\n[[steps]]\nname = 'b'\nschedule = 'wsd'\n"
    )
    assert (
        run_cli(
            "train",
            "--preset",
            ladder,
            *tiny_sets(num_titles=200, n_layer=1, eval_per_epoch=40),
            "--out",
            tmp_path,
        ).exit_code
        == 3
    )
    store = Store(tmp_path / ".store")
    assert store.pinned() == set() and active_leases(store) == {} and store.verify() == []


def test_no_store_creates_no_store(tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = tiny_sets(**SMALL)
    monkeypatch.setenv("MAINRUN_STORE", str(tmp_path / "elsewhere"))
    summary = json.loads(
        run_cli(
            "train", "--preset", "baseline", *sets, "--out", tmp_path / "runs", "--no-store", "--json"
        ).stdout
    )
    assert {path.name for path in tmp_path.iterdir()} == {"runs"} and [
        path.name for path in (tmp_path / "runs").iterdir()
    ] == [summary["run"]]
    again = json.loads(
        run_cli("train", "--preset", "baseline", *sets, "--out", tmp_path / "more", "--json").stdout
    )
    assert len(Store(tmp_path / "elsewhere").node_keys()) == 4 and again["ledger"] == summary[
        "ledger"
    ] == ledger(STEPS, 0)
    assert outcome(tmp_path / "more" / again["run"]) == outcome(tmp_path / "runs" / summary["run"])


# -- real processes

WORKER = """
import os, signal, sys, time
from mainrun.store import leases
leases.Leases.__init__.__defaults__ = (float(sys.argv.pop(1)),)
pace, halt = float(sys.argv.pop(1)), int(sys.argv.pop(1))
from mainrun import train
gradients = train.TrainStep.gradients

def slow_gradients(step, *args):
    if step.state.step == halt:
        leases = os.path.join(sys.argv[sys.argv.index("--store") + 1], "leases")
        while len(os.listdir(leases)) > 1:  # wait until pending nodes are written
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(pace)
    return gradients(step, *args)

train.TrainStep.gradients = slow_gradients
from mainrun.cli import main
main()
"""


class Worker:
    """A `mainrun train` process.

    `pace` is the sleep per step in seconds, `ttl` is the lifetime of a lease, and `halt` is the step at which
    the process stops itself.
    """

    def __init__(
        self, out: Path, store: Path, pace: float = 0.0, ttl: float = 30.0, halt: int = -1, **changes: Any
    ) -> None:
        self.out = out
        sets = tiny_sets(**SMALL | changes)
        command = [
            sys.executable,
            "-c",
            WORKER,
            str(ttl),
            str(pace),
            str(halt),
            "train",
            "--preset",
            "baseline",
            *sets,
        ]
        command += ["--out", str(out), "--store", str(store), "--json"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)  # type: ignore[call-overload]

    def halted(self) -> None:
        wait_until(
            lambda: Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        )

    def waits(self, what: str = "waiting for") -> None:
        assert self.process.stderr
        assert any(what in line for line in self.process.stderr), "the process ended without this note"

    def goes_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def wait_until(self, step: int) -> None:
        """Wait until the process has logged the given number of steps."""
        deadline = time.monotonic() + 120
        while True:
            for path in self.out.glob("*/metrics.jsonl"):
                if path.read_text().count('"step", "step"') >= step:
                    return
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()
            time.sleep(0.005)

    def summary(self) -> dict[str, Any]:
        stdout, self.stderr = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, self.stderr
        return json.loads(stdout)

    def outcome(self) -> dict[str, Any]:
        (path,) = self.out.glob("*/summary.json")
        return outcome(path.parent)


@pytest.fixture
def worker() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def begin(*args: Any, **changes: Any) -> Worker:
        workers.append(Worker(*args, **changes))
        return workers[-1]

    yield begin
    for entry in workers:
        with suppress(ProcessLookupError):
            entry.process.send_signal(signal.SIGCONT)
        entry.process.kill()
        entry.process.communicate()


def baseline(**changes: Any) -> TrainConfig:
    from mainrun.plan.recipes import load

    return from_dict(load("baseline")[0].model_dump() | TINY | SMALL | changes)


@pytest.mark.slow
def test_a_killed_process_costs_no_bit(tmp_path: Path, worker: Any, alone: Any) -> None:
    rng, kills, cfg = random.Random(1), 2, baseline(checkpoint_every=12)
    reached = 0
    for i in range(kills):
        one = worker(tmp_path / "runs", tmp_path / "store", 0.02, checkpoint_every=12)
        one.wait_until(rng.randint(reached + 1, 10 + 12 * i))
        time.sleep(rng.random() * 0.04)
        one.process.kill()
        one.process.communicate()
        reached = len(rows(tmp_path / "runs" / cfg.run_id)) - 3
    last = worker(tmp_path / "runs", tmp_path / "store", checkpoint_every=12)
    summary = last.summary()
    assert last.outcome() == alone(cfg)
    counts = summary["ledger"]
    assert (
        counts["asked"] == counts["trained"] + counts["reused"] == STEPS + counts["wasted"]
        and counts["reused"] == 0
    ), counts
    store = Store(tmp_path / "store")
    assert store.verify() == [] and active_leases(store) == {}
    again = worker(tmp_path / "again", tmp_path / "store", checkpoint_every=12)
    assert again.summary()["ledger"] == ledger(STEPS, STEPS) and again.outcome() == alone(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
def test_two_processes_train_shared_steps_once(tmp_path: Path, worker: Any, alone: Any, order: int) -> None:
    """The second process waits for the shared steps, whichever config starts first."""
    changes = [{}, {"decay_frac": 0.2}][::order]
    one = worker(tmp_path / "0", tmp_path / "store", halt=5, **changes[0])
    one.halted()
    two = worker(tmp_path / "1", tmp_path / "store", **changes[1])
    two.waits()
    one.goes_on()
    trained = sum(entry.summary()["ledger"]["trained"] for entry in (one, two))
    assert trained == len({key for change in changes for key in keys(baseline(**change))[1:]}) == STEPS + 10
    for entry, change in zip((one, two), changes, strict=True):
        assert entry.outcome() == alone(baseline(**change))
    store = Store(tmp_path / "store")
    assert store.verify() == [] and active_leases(store) == {} and store.wants() == set()


@pytest.mark.slow
def test_a_process_that_waits_for_the_fork_of_a_killed_process_continues(
    tmp_path: Path, worker: Any, alone: Any
) -> None:
    one = worker(tmp_path / "one", tmp_path / "store", halt=20, decay_frac=0.2)
    one.halted()
    two = worker(tmp_path / "two", tmp_path / "store")
    two.waits("which trains the shared steps up to step 27")
    assert Store(tmp_path / "store").wants() == {keys(baseline())[FORK]}
    one.process.kill()
    assert two.summary()["ledger"] == ledger(STEPS, 18) and two.outcome() == alone(baseline())
    again = worker(tmp_path / "one", tmp_path / "store", decay_frac=0.2)
    assert again.summary()["ledger"]["trained"] == STEPS - FORK + 20 and again.outcome() == alone(
        baseline(decay_frac=0.2)
    )
    store = Store(tmp_path / "store")
    assert store.verify() == [] and active_leases(store) == {} and store.wants() == set()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_lease_of_a_lost_process_is_taken_over(tmp_path: Path, worker: Any, alone: Any, how: str) -> None:
    """A killed process loses its lease at once.

    A suspended process loses its lease when the lease expires, but still finishes its run later.
    """
    one = worker(tmp_path / "one", tmp_path / "store", 0.05, ttl=3.0)
    one.wait_until(8)
    (key,) = active_leases(Store(tmp_path / "store"))
    two = worker(tmp_path / "two", tmp_path / "store", 0.2, ttl=3.0)
    one.process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    two.wait_until(10)
    if how == "stopped":
        assert (tmp_path / "store" / "leases" / f"{key}.000002").exists()
        one.process.send_signal(signal.SIGCONT)
        one.summary()
        assert "step 18 is not saved in the store: another process has taken over these steps" in one.stderr
        assert one.outcome() == alone(baseline())
    summary = two.summary()
    assert two.outcome() == alone(baseline()) and summary["ledger"]["wasted"] == 0
    assert ("waiting for" in two.stderr) == (how == "stopped")
    store = Store(tmp_path / "store")
    assert store.verify() == [] and active_leases(store) == {}


@pytest.mark.slow
def test_a_waiting_process_that_is_terminated_exits_with_75_and_can_be_resumed(
    tmp_path: Path, worker: Any, alone: Any
) -> None:
    one = worker(tmp_path / "one", tmp_path / "store", 1.0)
    one.wait_until(1)
    two = worker(tmp_path / "two", tmp_path / "store")
    two.waits()
    one.process.send_signal(signal.SIGSTOP)
    two.process.terminate()
    two.process.communicate()
    assert two.process.returncode == 75
    one.process.kill()
    two = worker(tmp_path / "two", tmp_path / "store")
    assert two.summary()["ledger"] == ledger(STEPS, 0) and two.outcome() == alone(baseline())


@pytest.mark.slow
def test_a_run_of_two_processes_reuses_steps(tmp_path: Path) -> None:
    """The run has the same bits as a run from scratch with two processes (torchrun with gloo)."""

    def two(out: str, *arguments: str, **changes: Any) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "mainrun",
            "train",
        ]
        sets = tiny_sets(**SMALL | changes)
        command += ["--preset", "baseline", *sets, "--out", str(tmp_path / out), "--json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    place = ["--store", str(tmp_path / "store")]
    two("first", *place)
    later = two("second", *place, decay_frac=0.2)
    scratch = two("scratch", "--no-store", decay_frac=0.2)
    assert later["ledger"] == ledger(STEPS, 27) and scratch["ledger"] == ledger(STEPS, 0)
    assert outcome(tmp_path / "second" / later["run"]) == outcome(tmp_path / "scratch" / scratch["run"])
    other = two(
        "third", *place, official_geometry="2x8"
    )  # Only the leader process detects that the store lacks the score after step 1.
    scratch = two("scratch", "--no-store", official_geometry="2x8")
    assert outcome(tmp_path / "third" / other["run"]) == outcome(tmp_path / "scratch" / scratch["run"])
    watch = Watch()
    train(baseline(), tmp_path, store=Store(tmp_path / "store"), progress=watch)
    assert watch.noted("so they are not reused (machine_class processes: 2 there, 1 here)")


# -- random failures


@pytest.mark.slow
def test_random_kills_and_damage_cost_no_bit_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 200 rounds, a run is killed at a random moment, the store is damaged, and the run is resumed."""
    configs = [
        config(num_titles=120, block_size=8, log_every=log, checkpoint_every=every, **changes)
        for log, every, changes in (
            (1, 10, {}), (1, 1000, {"decay_frac": 0.2}), (7, 7, {"decay_shape": "sqrt"}),
            (1, 15, {"swa": 0.4}),
            (1, 9, {"eval_per_epoch": 3}), (1, 12, late("set_batch_size", 4)),
            (3, 20, {"epochs": 2, "decay_frac": 0.1}),
        )
    ]  # fmt: skip
    corpora, prepared = (
        functools.cache(trainer.load_corpus),
        functools.cache(lambda cfg: prepare(cfg, corpora(cfg))),
    )
    prepare = trainer.prepare
    monkeypatch.setattr(trainer, "load_corpus", corpora)
    monkeypatch.setattr(trainer, "prepare", lambda cfg, corpus: prepared(cfg))
    monkeypatch.setattr(summaries, "guards", lambda evidence: [])
    scratch = {}
    for cfg in configs:
        train(cfg, tmp_path / "alone")
        scratch[cfg.run_id] = outcome(tmp_path / "alone" / cfg.run_id)
    # Every lease names a process that does not exist, so a resumed run does not wait for the lease of the
    # killed run.
    dead = {
        "boot": leases._boot(),
        "pid": 2**22 + 1,
        "started": "1",
    }
    monkeypatch.setattr(leases, "this_process", lambda: dead)
    monkeypatch.setattr(nodes.os, "fsync", lambda fd: None)
    gone = False

    def guarded(name: str) -> Callable[..., Any]:
        original = getattr(Folder, name)

        def call(self: Folder, *args: Any) -> Any:
            nonlocal left
            if left is not None:
                left -= 1
            if gone or left == 0:
                raise Killed
            return original(self, *args)

        return call

    def close(self: Any) -> None:
        """Keep the lease if the process was killed."""
        nonlocal gone
        gone = gone or isinstance(sys.exc_info()[1], Killed)
        original_close(self)
        if gone and self.holder.lease:
            self.holder.lease._stop.set()

    left: int | None = None
    original_close = sharing.Sharing.close
    for name in ("write", "create", "put", "remove"):
        monkeypatch.setattr(Folder, name, guarded(name))
    original_free = sharing.LeaseHolder.free
    monkeypatch.setattr(sharing.LeaseHolder, "free", lambda self: None if gone else original_free(self))
    monkeypatch.setattr(sharing.Sharing, "close", close)
    trained = killed = 0
    for seed in range(200):
        rng = random.Random(seed)
        if seed % 10 == 0:
            shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        store = Store(tmp_path / "store", size=rng.choice([200_000, 10**9, 10**9]))
        cfg = rng.choice(configs)
        steps = scratch[cfg.run_id]["steps"]
        kill_step = rng.choice([rng.randint(1, steps), None])
        left = rng.choice([None, rng.randint(1, 30)])
        fresh = rng.random() < 0.1
        try:
            train(
                cfg,
                tmp_path / "runs",
                store=store,
                fresh=fresh,
                progress=Watch({kill_step: kill} if kill_step else {}),
            )
        except Killed:
            killed += 1
        gone, left = False, None
        states = sorted((tmp_path / "store").glob("states/*"))
        for path in rng.sample(states, rng.randint(0, len(states)) if rng.random() < 0.5 else 0):
            path.unlink()
        if states and rng.random() < 0.2 and (damaged := rng.choice(states)).exists():
            flip_bit(damaged)
        if (node_files := sorted((tmp_path / "store").glob("nodes/*"))) and rng.random() < 0.2:
            rng.choice([Path.unlink, flip_bit])(rng.choice(node_files))
        summary = train(cfg, tmp_path / "runs", store=store, fresh=rng.random() < 0.05)
        assert outcome(tmp_path / "runs" / cfg.run_id) == scratch[cfg.run_id], seed
        counts = summary["ledger"]
        assert (
            counts["asked"] == steps + counts["wasted"] == counts["trained"] + counts["reused"]
            and min(counts.values()) >= 0
        ), (seed, counts)
        trained += counts["trained"]
    assert killed > 60, "too few rounds were killed"


# -- the cost of keeping nodes


@pytest.mark.slow
def test_keeping_a_node_delays_the_training_by_no_more_than_a_copy(tmp_path: Path) -> None:
    """The state has 27 million weights with AdamW's moments.

    If the machine is busy and a plain copy takes longer, the time limits are longer too.
    """
    cfg = config()
    size = 27_000_000
    tensors = {
        f"{name}/{i}": torch.randn(size // 9)
        for name in ("model", "optimizer/m", "optimizer/v")
        for i in range(9)
    }
    store, plan = Store(tmp_path / "store"), Plan(cfg, 37 * 128 + 1)
    keeper = sharing.Sharing(
        store, cfg, plan, Device(cfg), {}, "", lambda text: None, Accounts(), keep=range(1, 9)
    )
    assert plan.steps == STEPS
    state = SimpleNamespace(step=0, tokens=0, growth_state={}, tensors=lambda: tensors)
    stalls, saves = [], []
    for step in range(1, 5):
        state.step = step
        started = time.perf_counter()
        held_here = {name: tensor.clone() for name, tensor in tensors.items()}
        bare = time.perf_counter() - started
        del held_here
        started = time.perf_counter()
        keeper.publish(state)  # type: ignore[arg-type]
        stalls.append((time.perf_counter() - started) / max(0.3, 2 * bare) * 0.3)
        assert keeper.writer._writing is not None
        keeper.writer._writing.result()  # wait until this node is written before the next node is published
    (plain,) = [entry for entry in store.summary()[0] if entry.step == 4]
    for i in range(3):
        tensors["model/0"][0] = float(i)
        started = time.perf_counter()
        checkpoint.save_tensors(tensors, tmp_path / "bare")
        sha256_file(tmp_path / "bare")
        bare = time.perf_counter() - started
        started = time.perf_counter()
        store.save(Node(**(vars(plain) | {"key": f"{i}" * 64})), tensors)
        saves.append((time.perf_counter() - started) / max(1.5, 2 * bare) * 1.5)
    keeper.close()
    print(f"stall {min(stalls):.2f} s, save {min(saves):.2f} s")
    assert min(stalls) < 0.3 and min(saves) < 1.5


def test_a_score_before_the_first_step_uses_the_right_attention_kernel(tmp_path: Path) -> None:
    """The attention kernel must be set even if a run evaluates before it trains a step."""
    never, once = (config(attention="sdpa", dropout=0.0, eval_interval=every) for every in (1000, 10))
    store = Store(tmp_path / "store")
    train(never, tmp_path / "shared", store=store, keep=[10])
    summary = train(once, tmp_path / "shared", store=store)
    assert summary["ledger"]["reused"] >= 10
    train(once, tmp_path / "alone")
    assert outcome(tmp_path / "shared" / once.run_id) == outcome(tmp_path / "alone" / once.run_id)
