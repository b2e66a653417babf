"""Start a session from a checkpoint, and restore the costs of earlier sessions."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

import torch

from mainrun.config import TrainConfig
from mainrun.core.device import Device
from mainrun.core.machine_class import versions
from mainrun.data import scoring
from mainrun.errors import RunError
from mainrun.growth.state import Controller, load_state
from mainrun.run.accounts import Accounts
from mainrun.run.log import RunLog
from mainrun.run.sharing import NoSharing, Sharing
from mainrun.store import checkpoint
from mainrun.store.rundir import LogRow, RunDir
from mainrun.train import State

Row = dict[str, Any]
EMPTY_LOG = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}  # the size and the hash of an empty log


def environment(device: Device) -> Row:
    """Return the contents of env.json for this session."""
    return {
        "machine_class": device.machine_class,
        "versions": versions(),
        "evaluate_hash": scoring.evaluate_source_hash(),
        "allocator": device.allocator,
        "command": sys.argv,
    }


def resume(
    cfg: TrainConfig,
    run: RunDir,
    state: State,
    accounts: Accounts,
    env: Row,
    log: RunLog,
    sharing: Sharing | NoSharing,
    growth: Controller,
) -> None:
    """Restore a run from the newest usable checkpoint, or start the run at step 0."""
    trained = steps_trained(run.intact_rows(), growth.plan.steps)  # the logs are truncated later
    had_checkpoints = bool(checkpoint.paths(run.checkpoints))
    loaded = checkpoint.load_newest(run.checkpoints, Usable(cfg, log, growth), log.note)
    earlier = run.env() if loaded else {}
    if loaded:
        _continue(run, state, accounts, env, earlier, loaded, growth, log)
    else:
        if had_checkpoints:
            log.note(f"{run.path} has no usable checkpoint, so the run starts over at step 0")
        rewind(log, growth, EMPTY_LOG, EMPTY_LOG)
    # the steps after the checkpoint are lost, but the store may contain some of these steps
    lost_steps = {step for step in trained if step > state.step}
    carried = run.env().get("carried", {})
    if carried and carried["checkpoint"] == state.step:  # the last session did not save a checkpoint
        accounts.ledger["wasted"] = carried["wasted"]
        accounts.resumed = carried["resumed"] + bool(lost_steps)
    accounts.ledger["wasted"] += len(lost_steps)
    start = state.step

    def write_env() -> None:
        costs = {"wasted": accounts.ledger["wasted"], "resumed": accounts.resumed}
        env["carried"] = {"checkpoint": start, **costs}
        run.write("env.json", env)

    sharing.begin(lost_steps, write_env)
    sharing.follow(growth.plan)
    if loaded:
        sharing.restore(loaded[1].get("store"), state.step)
    else:
        sharing.report_other_versions()
    for key, current in (("machine_classes", env["machine_class"]), ("all_versions", env["versions"])):
        others = [entry for entry in earlier.get(key, []) if entry != current]
        env[key] = [*others, current]
    write_env()
    status = {"state": "running", "step": state.step, "pid": os.getpid(), "resumed": accounts.resumed}
    run.write("status.json", status)


class Usable:
    """Check whether a run can resume from a checkpoint. Truncate the logs to match a usable checkpoint."""

    def __init__(self, cfg: TrainConfig, log: RunLog, growth: Controller) -> None:
        self.cfg = cfg
        self.log = log
        self.growth = growth

    def __call__(self, meta: Row) -> str | None:
        """Return why a checkpoint cannot be used, or None if it can be used."""
        fault = checkpoint.fault(meta)
        if fault:
            return fault
        if meta["digest"] != self.cfg.digest:
            return "it belongs to another config"
        rewind(self.log, self.growth, meta["metrics"], meta.get("journal") or EMPTY_LOG)
        return None


def rewind(log: RunLog, growth: Controller, metrics: Row, journal: Row) -> None:
    """Truncate the logs to the sizes that they had when a checkpoint was saved."""
    for file, mark in ((log.metrics, metrics or EMPTY_LOG), (growth.journal, journal)):
        if file and not file.rewind(mark):
            # let the user decide, because starting over would discard the training so far
            fix = "restore the file, or use --fresh to start over"
            raise RunError(f"{file.path} does not match the checkpoints of the run; {fix}")


def _continue(
    run: RunDir,
    state: State,
    accounts: Accounts,
    env: Row,
    earlier: Row,
    loaded: tuple[dict[str, torch.Tensor], Row],
    growth: Controller,
    log: RunLog,
) -> None:
    """Load a checkpoint. Tell the user if the machine class or a version changed since the last session."""
    if "evaluate_hash" not in earlier:
        fix = "restore the file, or use --fresh to start over"
        raise RunError(f"{run.path}/env.json, which records how the run began, is missing; {fix}")
    run.rows()  # raise an error for invalid rows, which may exist even if the checksum matches
    load_checkpoint(run, state, accounts, *loaded, growth)
    env["evaluate_hash"] = earlier["evaluate_hash"]  # keep the first hash, to detect later edits
    log.note(f"{run.path} resumes after step {state.step}")
    compared = (
        ("the machine class", "machine_classes", env["machine_class"]),
        ("the version of mainrun or of a library", "all_versions", env["versions"]),
    )
    for what, key, current in compared:
        if earlier.get(key, [current])[-1] != current:
            log.note(f"{what} has changed: from here on, results may differ from an uninterrupted run")


def steps_trained(rows: list[LogRow], end: int) -> set[int]:
    """Return the steps that a run trained and did not reuse, according to the rows of metrics.jsonl.

    Steps after the end of the run are ignored.
    """
    trained: set[int] = set()
    last = 0
    for row in rows:
        step = min(row["step"], end)
        if row.get("reused"):
            last = step
        elif row.get("event") == "step":
            trained |= set(range(last + 1, step + 1))
            last = step
    return trained


def follow_leader(run: RunDir, state: State, accounts: Accounts, device: Device, growth: Controller) -> None:
    """Load the leader's checkpoint in all other processes."""
    (step,) = device.broadcast(state.step)
    if not step or device.leads:
        return

    def is_leaders(meta: Row) -> str:
        return "" if meta.get("step") == step else "the leader chose another checkpoint"

    loaded = checkpoint.load_newest(run.checkpoints, is_leaders, lambda _: None)
    if loaded is None:
        got = f"process {device.rank} cannot read the checkpoint of step {step} in {run.checkpoints}"
        raise RunError(f"{got}; --out must be a folder that all processes share")
    load_checkpoint(run, state, accounts, *loaded, growth)


def load_checkpoint(
    run: RunDir,
    state: State,
    accounts: Accounts,
    tensors: dict[str, torch.Tensor],
    meta: Row,
    growth: Controller,
) -> None:
    """Load the state and the costs from a checkpoint."""
    with checkpoint.fit_errors(f"the checkpoint of step {meta['step']} in {run.checkpoints}"):
        load_state(state, tensors, meta["step"], meta["presented"], meta.get("growth"))
        growth.restore()
    accounts.saved = state.step
    accounts.resumed = meta["resumed"] + 1
    accounts.ledger |= meta.get("ledger", {})
    for activity, seconds in meta["spent"].items():
        accounts.add(activity, seconds)
