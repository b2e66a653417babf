"""Create summary.json, which contains the results of a finished run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from mainrun.checks.guards import Evidence, guards
from mainrun.core.hardware import peak_memory
from mainrun.core.members import members_of
from mainrun.core.sharding import shards_of
from mainrun.data import scoring
from mainrun.plan.cost import forward_flops, segment_costs
from mainrun.plan.plan import Plan
from mainrun.plan.routing import STATS
from mainrun.run.accounts import Accounts
from mainrun.store import checkpoint, costs
from mainrun.store.rundir import RunDir
from mainrun.train import Model, Setup, State, set_last_inputs

SCORE_FIELDS = ("step", "split", "official", "full", "loss", "bits_per_byte", "coverage", "tokens", "alone")
ENV_FIELDS = ("machine_class", "machine_classes", "versions", "all_versions")  # copied from env.json


def summarize(
    setup: Setup, plan: Plan, run: RunDir, state: State, accounts: Accounts, env: dict[str, Any]
) -> dict[str, Any]:
    """Return the contents of summary.json: the scores, the costs, the environment and the check results."""
    cfg = setup.cfg
    evals = [row for row in run.rows() if row["event"] == "eval"]
    scores = best_and_last(evals)
    segments = segment_costs(plan, state.model.embed.num_embeddings - state.model.cfg.unused_ids)
    presentations = count_presentations(setup, plan, state)
    flops = sum(segment["flops"] for segment in segments)
    if not cfg.growth.ops:  # state.tokens counts each member, but flops_per_token covers all members at once
        flops = state.tokens * segments[0]["flops_per_token"] // cfg.members
    summary = {
        "run": cfg.run_id,
        "preset": cfg.preset,
        "status": "done",
        "steps": plan.steps,
        **scores["val"],
        "scores": scores,
        "params": sum(p.numel() for p in state.model.parameters()),
        "tokens": plan.tokens(plan.steps),
        "ledger": count_steps(plan, accounts),
        "presentations": presentations,
        "flops": flops,
        "fingerprints": setup.corpus.fingerprints,
        "origin": setup.corpus.origin,
        "start": describe_start(setup),
        "geometry": list(cfg.geometry),
        "tokenizer": setup.data.tokenizer.digest,
        **{name: env[name] for name in ENV_FIELDS},
        "peak_memory": peak(),
        "weights": hash_weights(state.model),
        "resumed": accounts.resumed,
    }
    if cfg.members > 1:
        with accounts.clock("evaluation"):
            summary["member_scores"] = score_members(setup, state)
    if setup.ngram:
        summary["ngram_entries"] = setup.ngram.entries
    if state.cfg.routed_layers:
        summary["routing"] = summarize_routing(setup, plan, state, evals)
    evidence = Evidence(
        cfg=cfg,
        corpus=setup.corpus,
        data=setup.data,
        model=setup.scored(state.model),
        evals=evals,
        ledger=presentations,
        summary=summary,
        initial_weights=cfg.start or "random",
        evaluate_hash=env["evaluate_hash"],
    )
    if cfg.growth.ops:
        summary |= {"active": segments[-1]["active"], "segments": segments}
    return summary | costs.derived_costs(summary) | {"guards": [asdict(guard) for guard in guards(evidence)]}


def count_steps(plan: Plan, accounts: Accounts) -> dict[str, int]:
    """Return how many steps the run needed, trained, copied from the store and lost."""
    wasted = accounts.ledger["wasted"]
    reused = accounts.ledger["reused"]
    return {
        "asked": plan.steps + wasted,
        "trained": plan.steps + wasted - reused,
        "reused": reused,
        "wasted": wasted,
    }


def describe_start(setup: Setup) -> dict[str, str] | None:
    """Return the start of a run and the hash of its weights, or None if the weights are random."""
    if not setup.cfg.start:
        return None
    return {"source": setup.cfg.start, "digest": setup.start_digest}


def hash_weights(model: Model) -> str:
    """Return a hash of the weights. All processes of a sharded run must call this function together."""
    shards = shards_of(model)
    if shards:
        return checkpoint.sha256_sorted_tensors(shards.whole_weights())
    return checkpoint.sha256_tensors(iter(model.named_parameters()))


def score_members(setup: Setup, state: State) -> dict[str, list[float]]:
    """Return the full score that each member has alone, on each held-out split.

    The weights of the model must be those of the last evaluation.
    """
    cfg = setup.cfg
    data = setup.data
    scores: dict[str, list[float]] = {}
    for split in ("val", "dev"):
        if split not in data.splits:
            continue
        size = {"chars": data.chars[split], "nbytes": data.bytes[split], "block_size": cfg.block_size}
        scores[split] = [
            scoring.evaluate(member, data.splits[split], **size, geometry=cfg.geometry).full
            for member in members_of(state.model)
        ]
    return scores


def summarize_routing(setup: Setup, plan: Plan, state: State, evals: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of the routers, as lists with one value for each routed layer.

    `topk_loss` and `student_accuracy` come from the tokens that training would select. This selection sees
    the future, so these numbers are never compared with scores.
    """
    cfg = state.cfg
    set_last_inputs(state, plan, setup.device)
    last_val = [row for row in evals if row["split"] == "val"][-1]
    selected = [router["selected"] for router in last_val["routers"]]
    look_ahead = LookAhead(state.model)
    data = setup.data
    size = {"chars": data.chars["val"], "nbytes": data.bytes["val"], "block_size": cfg.block_size}
    topk = scoring.evaluate(look_ahead, data.splits["val"], **size, geometry=setup.cfg.geometry)
    exact = cfg.model_copy(update={"vocab_size": state.model.embed.num_embeddings - cfg.unused_ids})
    dense = exact.model_copy(update={"block_pattern": "D"})
    return {
        "letters": cfg.letters,
        "capacity": cfg.capacity,
        "selected": selected,
        "student_accuracy": look_ahead.student_accuracy(),
        "topk_loss": topk.loss,
        "forward_flops": forward_flops(exact, selected),
        "forward_flops_dense": forward_flops(dense),
    }


class LookAhead(nn.Module):
    """A model whose routers select the best tokens of the whole row, as in training."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.tokens = 0
        self.agreements = torch.zeros(len(model.cfg.routed_layers), dtype=torch.float64)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        logits, info = self.model(idx, routing_info=True, topk=True)
        accuracy = info.stats[:, STATS.index("student_accuracy")].double().cpu()
        self.agreements += idx.numel() * accuracy
        self.tokens += idx.numel()
        return logits

    def student_accuracy(self) -> list[float]:
        """Return the share of tokens for which each student predicts the selection."""
        return (self.agreements / self.tokens).tolist()


def count_presentations(setup: Setup, plan: Plan, state: State) -> dict[str, Any]:
    """Return how often the model processed each token of the training set."""
    return {
        "train_tokens_per_epoch": plan.train_tokens,
        "presentations_per_token": state.tokens / plan.train_tokens,
        "forward_passes": setup.cfg.passes,
        "ensemble_members": len(members_of(state.model)),
    }


def best_and_last(evals: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last and the best score of each split."""
    scores = {}
    for split in ("val", "dev"):
        rows = [row for row in evals if row["split"] == split]
        if rows:
            best = min(rows, key=lambda row: row["full"])
            scores[split] = {"last": _score(rows[-1]), "best": _score(best)}
    return scores


def _score(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in SCORE_FIELDS if name in row}


def finish(
    run: RunDir, state: State, plan: Plan, accounts: Accounts, summary: dict[str, Any]
) -> dict[str, Any]:
    """Add the duration of the run to the summary, and write status.json and summary.json."""
    seconds = sum(accounts.spent.values())
    trained = plan.tokens(plan.steps) - accounts.ledger["reused_tokens"]
    summary |= {"seconds": seconds, "tokens_per_s": trained / seconds, "spent": accounts.spent}
    # Write status.json first, because a run with a summary.json never starts again to correct its status.
    run.write("status.json", {"state": "done", "step": state.step, "steps": plan.steps})
    run.write("summary.json", summary)
    return summary


def peak() -> int:
    """Return the peak memory of this process in bytes. If a GPU is used, return the peak GPU memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return peak_memory()
