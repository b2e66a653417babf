"""How a sitting begins and ends: from which checkpoint a run goes on, and what it amounts to once it is done."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mainrun.checks.guards import Evidence, guards
from mainrun.config import TrainConfig
from mainrun.core.device import Machine
from mainrun.core.hardware import peak_memory
from mainrun.core.machine_class import versions
from mainrun.data import scoring
from mainrun.data.sources import Corpus
from mainrun.data.token_cache import TokenData
from mainrun.errors import ConfigError, MainrunError, RunError
from mainrun.plan.cost import segment_costs
from mainrun.plan.plan import Plan
from mainrun.run.progress import Progress
from mainrun.store import checkpoint
from mainrun.store.rundir import Metrics, RunDir

if TYPE_CHECKING:
    from mainrun.growth.controller import Growth
    from mainrun.run.sharing import Reuse
    from mainrun.train import State


NOTHING = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}  # where a log stands that has no row


def check_spans(cfg: TrainConfig, data: TokenData) -> None:
    """Before step 0: a split that cannot be scored is found now, not an hour later."""
    for split in ("val", "dev"):
        if split in data.splits:
            try:
                scoring.official_spans(len(data.splits[split]), cfg.geometry)
            except ConfigError as e:
                raise ConfigError(f"the {split} split is too short: {e}") from None


def environment(machine: Machine) -> dict[str, Any]:
    """env.json of this sitting."""
    env: dict[str, Any] = {
        "machine_class": machine.facts,
        "versions": versions(),
        "evaluate_hash": scoring.evaluate_source_hash(),
    }
    return env | {"allocator": machine.allocator, "command": sys.argv}


def resume(
    cfg: TrainConfig,
    run: RunDir,
    state: State,
    env: dict[str, Any],
    progress: Progress,
    reuse: Reuse | None,
    growth: Growth,
) -> Metrics:
    """Bring state, metrics.jsonl, growth.jsonl and env.json to the newest usable checkpoint, or to an untouched start."""
    metrics = run.log("metrics.jsonl")
    own = _trained(run.rows_so_far(), growth.plan.steps)  # before what no checkpoint holds is cut off

    def usable(meta: dict[str, Any]) -> str | None:
        if fault := checkpoint.fault(meta):
            return fault
        if meta["digest"] != cfg.digest:
            return "it belongs to another config"
        for log, mark in ((metrics, meta["metrics"]), (growth.journal, meta.get("journal"))):
            if log and not log.rewind(
                mark or NOTHING
            ):  # hours of training are not thrown away over a log: whoever changed it decides
                raise RunError(
                    f"{log.path} is not the one its checkpoints were saved with; restore it, or use --fresh to start over"
                )
        return None

    before = checkpoint.steps(run.checkpoints)
    found = checkpoint.load_newest(run.checkpoints, usable, progress.note)
    earlier = run.env() if found else {}
    if found:
        if "evaluate_hash" not in earlier:
            raise RunError(
                f"{run.path}/env.json, which says how the run began, is lost; restore it, or use --fresh to start over"
            )
        run.rows()  # a checksum that fits does not make a row of what is none
        _load(run, state, *found, growth)
        env["evaluate_hash"] = earlier[
            "evaluate_hash"
        ]  # the first start's: an edit between two sittings must show
        progress.note(f"{run.path} goes on after step {state.step}")
        for what, key in (("machine class", "machine_classes"), ("mainrun or of a library", "all_versions")):
            now = env["machine_class" if key == "machine_classes" else "versions"]
            if earlier.get(key, [now])[-1] != now:
                progress.note(
                    f"this is another {what} than the one before: from here on the bits are not those of an undisturbed run"
                )
    else:
        if before:
            progress.note(f"{run.path} has no usable checkpoint: it starts over at step 0")
        metrics.rewind(NOTHING)
        if growth.journal:
            growth.journal.rewind(NOTHING)
    lost = {step for step in own if step > state.step}  # some of these may be in the store
    carried = run.env().get("carried", {})
    if (
        carried and carried["checkpoint"] == state.step
    ):  # the sitting before this one ended before it saved anything
        state.ledger["wasted"], state.resumed = carried["wasted"], carried["resumed"] + bool(lost)
    state.ledger["wasted"] += len(lost)
    begins = state.step

    def carry() -> None:
        env["carried"] = {"checkpoint": begins, "wasted": state.ledger["wasted"], "resumed": state.resumed}
        run.write("env.json", env)

    if reuse:
        reuse.own, reuse.found_again = lost, carry
        reuse.follow(growth.plan)
        if found:
            reuse.restore(found[1].get("store"), state.step)
        else:
            reuse.strangers()
    for key, now in (("machine_classes", env["machine_class"]), ("all_versions", env["versions"])):
        seen = earlier.get(key, [])
        env[key] = [entry for entry in seen if entry != now] + [now]
    carry()
    run.write(
        "status.json", {"state": "running", "step": state.step, "pid": os.getpid(), "resumed": state.resumed}
    )
    return metrics


def _trained(rows: list[dict[str, Any]], end: int) -> set[int]:
    """The steps behind the rows that were not taken from the store. Rows beyond the end of the run are not its own."""
    found: set[int] = set()
    last = 0
    for row in rows:
        step = min(row["step"], end)
        if row.get("reused"):
            last = step
        elif row.get("event") == "step":
            found |= set(range(last + 1, step + 1))
            last = step
    return found


def follow(cfg: TrainConfig, run: RunDir, state: State, machine: Machine, growth: Growth) -> None:
    """Every process starts where the leader does (it chose the checkpoint, the others read the same one)."""
    step, _ = machine.share(state.step, 0)
    if step and not machine.leads:
        found = checkpoint.load_newest(
            run.checkpoints,
            lambda meta: "" if meta.get("step") == step else "the leader chose another",
            lambda _: None,
        )
        if found is None:
            what = f"process {machine.rank} cannot read the checkpoint of step {step} in {run.checkpoints}"
            raise RunError(f"{what}; --out must be a folder that all processes share")
        _load(run, state, *found, growth)


def _load(
    run: RunDir, state: State, tensors: dict[str, torch.Tensor], meta: dict[str, Any], growth: Growth
) -> None:
    """A checkpoint, and what the sittings before it have cost."""
    with checkpoint.fitting(f"the checkpoint of step {meta['step']} in {run.checkpoints}"):
        state.load(tensors, meta["step"], meta["presented"], meta.get("growth"))
        growth.restored()
    state.saved = state.step
    state.resumed = meta["resumed"] + 1
    state.ledger |= meta.get("ledger", {})
    state.spent = {
        part: meta["spent"].get(part, 0.0) + state.spent.get(part, 0.0)
        for part in {**meta["spent"], **state.spent}
    }


def score(cfg: TrainConfig, data: TokenData, state: State) -> Iterator[dict[str, Any]]:
    """The eval rows of the weights as they stand."""
    for split in ("val", "dev"):
        if split in data.splits:
            clock = time.perf_counter()
            size = {"chars": data.chars[split], "nbytes": data.bytes[split], "block_size": cfg.block_size}
            with state.average.applied():
                found = scoring.evaluate(state.model, data.splits[split], **size, geometry=cfg.geometry)
            yield {
                "event": "eval",
                "step": state.step,
                "split": split,
                **asdict(found),
                "seconds": time.perf_counter() - clock,
            }


@contextmanager
def ending(
    machine: Machine, run: RunDir, growth: Growth, parts: Sequence[Reuse | Progress | Metrics | Growth | None]
) -> Iterator[None]:
    """Whatever ends a sitting, status.json says it, and its parts are closed."""
    try:
        yield
    except BaseException as e:
        kind = {75: "interrupted", 3: "diverged"}.get(getattr(e, "exit_code", 1), "failed")
        if machine.leads:
            with suppress(MainrunError):  # `e` is what must be heard; a full disk is heard at the next write
                why = str(e) or type(e).__name__
                at = {"step": growth.state.step, "steps": growth.plan.steps}
                run.write("status.json", {"state": kind, **at, "why": why})
        raise
    finally:
        for part in parts:
            if part:
                part.close()


def finish(run: RunDir, state: State, plan: Plan, summary: dict[str, Any]) -> dict[str, Any]:
    """What all of it took, and the last words of a run that is done."""
    seconds = sum(state.spent.values())
    trained = plan.tokens(plan.steps) - state.ledger["reused_tokens"]
    summary |= {"seconds": seconds, "tokens_per_s": trained / seconds, "spent": state.spent}
    # The summary comes last: a run that has one is never begun again, so a status that a kill left unwritten would stay so.
    run.write("status.json", {"state": "done", "step": state.step, "steps": plan.steps})
    run.write("summary.json", summary)
    return summary


def summarize(
    cfg: TrainConfig,
    plan: Plan,
    corpus: Corpus,
    data: TokenData,
    run: RunDir,
    state: State,
    env: dict[str, Any],
) -> dict[str, Any]:
    """summary.json: the last and the best score, what they cost, what they stand on, and the guards they passed."""
    rows = run.rows()
    evals = [r for r in rows if r["event"] == "eval"]
    names = ("step", "split", "official", "full", "loss", "bits_per_byte", "coverage", "tokens")
    scores = {
        split: {
            "last": {k: mine[-1][k] for k in names},
            "best": {k: min(mine, key=lambda r: r["full"])[k] for k in names},
        }
        for split in ("val", "dev")
        if (mine := [r for r in evals if r["split"] == split])
    }
    tokens = plan.tokens(plan.steps)
    parts = segment_costs(plan, state.model.embed.num_embeddings - state.model.cfg.unused_ids)
    ledger = {
        "train_tokens_per_epoch": plan.train_tokens,
        "presentations_per_token": state.presented / plan.train_tokens,
        "forward_passes": cfg.passes,
        "ensemble_members": 1,
    }
    summary = {
        "run": cfg.run_id,
        "preset": cfg.preset,
        "status": "done",
        "steps": plan.steps,
        **scores["val"],
        "scores": scores,
        "params": sum(p.numel() for p in state.model.parameters()),
        "tokens": tokens,
        "ledger": {
            "asked": plan.steps + state.ledger["wasted"],
            "trained": plan.steps + state.ledger["wasted"] - state.ledger["reused"],
            "reused": state.ledger["reused"],
            "wasted": state.ledger["wasted"],
        },
        "presentations": ledger,
        "flops": state.presented * flops_per_token(cfg, state.model)
        if not cfg.growth.ops
        else sum(part["flops"] for part in parts),
        "fingerprints": corpus.fingerprints,
        "origin": corpus.origin,
        "geometry": list(cfg.geometry),
        "tokenizer": data.tokenizer.digest,
        "machine_class": env["machine_class"],
        "machine_classes": env["machine_classes"],
        "versions": env["versions"],
        "all_versions": env["all_versions"],
        "peak_memory": peak(),
        "weights": checkpoint.sha256_tensors(iter(state.model.named_parameters())),
        "resumed": state.resumed,
    }
    evidence = Evidence(
        cfg=cfg, corpus=corpus, data=data, model=state.model, evals=evals, ledger=ledger, summary=summary,
        initial_weights="random", evaluate_hash=env["evaluate_hash"],
    )  # fmt: skip
    if cfg.growth.ops:
        summary |= {"active": parts[-1]["active"], "segments": parts}
    return summary | {"guards": [asdict(g) for g in guards(evidence)]}


def peak() -> int:
    """The most memory that this process has had, in bytes: the GPU's where it has one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def flops_per_token(cfg: TrainConfig, model: nn.Module) -> int:
    """Forward and backward: 6 a weight that multiplies, and the two products of attention over the whole block."""
    looked_up = ("positions",) if cfg.tie_head else ("positions", "embed")
    weights = {
        n: p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith(looked_up)
    }
    experts = sum(size for n, size in weights.items() if ".experts." in n)
    met = sum(weights.values()) - experts + (experts * cfg.top_k // cfg.experts if cfg.experts else 0)
    return 6 * met + 12 * cfg.n_layer * cfg.n_head * cfg.head_width * cfg.block_size
