"""A finished run looked at by the code beside this file: all its guards, or its first steps and its last score once more.

    python -m mainrun.replay guards RUN INTO.json
    python -m mainrun.replay steps RUN INTO.json N

`mainrun submit` and `mainrun verify` start it in the code of a commit or of a bundle, which need not be the installed one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mainrun.checks.audit import again
from mainrun.checks.guards import Evidence, guards
from mainrun.core.device import Machine
from mainrun.core.machine_class import versions
from mainrun.data.sources import Corpus, load_corpus
from mainrun.data.token_cache import TokenData, prepare
from mainrun.errors import MainrunError, RunError
from mainrun.growth.controller import Growth
from mainrun.plan.cost import segment_costs
from mainrun.plan.plan import Plan
from mainrun.run.session import score
from mainrun.store import checkpoint
from mainrun.store.checkpoint import sha256_tensors
from mainrun.store.rundir import RunDir, write_json
from mainrun.train import State, build


class Place:
    """What a run computes with, made anew."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.cfg = run, run.config()
        self.machine = Machine(self.cfg)
        self.corpus: Corpus = load_corpus(self.cfg)
        self.data: TokenData = prepare(self.cfg, self.corpus)
        self.plan = Plan(self.cfg, len(self.data.splits["train"]))
        self.machine.settle(self.cfg, self.plan)

    def facts(self) -> dict[str, Any]:
        titles = {"fingerprints": self.corpus.fingerprints, "tokenizer": self.data.tokenizer.digest}
        return {"versions": versions(), "machine_class": self.machine.facts, **titles}

    def start(self) -> Growth:
        state = State(self.cfg, build(self.cfg, self.data.tokenizer.vocab_size).to(self.machine.device))
        state.model.set_up(self.plan.at(0), self.machine.attention)
        return Growth(self.cfg, self.plan, self.machine, state)

    def end(self, note: Callable[[str], None] = lambda _: None) -> Growth | None:
        """The run's last weights, if its checkpoint is there."""
        found = checkpoint.load_newest(self.run.checkpoints, self._last, note)
        if found is None:
            return None
        growth, (tensors, meta) = self.start(), found
        with checkpoint.fitting(f"the checkpoint of step {meta['step']} in {self.run.checkpoints}"):
            growth.state.load(tensors, meta["step"], meta["presented"], meta.get("growth"))
            growth.restored()
        return growth

    def _last(self, meta: dict[str, Any]) -> str | None:
        if fault := checkpoint.fault(meta):
            return fault
        try:
            plan = Plan(self.cfg, self.plan.train_tokens, (meta.get("growth") or {}).get("fired", ()))
        except (MainrunError, LookupError, AssertionError) as e:
            return f"its ops cannot have fired so ({e})"
        return (
            None
            if meta["digest"] == self.cfg.digest and meta["step"] == plan.steps
            else "it is not of this run's last step"
        )


def all_guards(run: RunDir) -> dict[str, Any]:
    place, summary = Place(run), run.summary() or {}
    end = place.end()
    if end is None:
        raise RunError(
            f"{run.path} has no usable checkpoint of its last step, and the guards need its weights; train it again with --fresh"
        )
    if weights(end.state) != summary.get("weights"):
        raise RunError(
            f"{run.path}/summary.json was written for other weights than its checkpoint holds; train it again with --fresh"
        )
    with end.state.average.applied():
        evidence = Evidence(
            cfg=place.cfg, corpus=place.corpus, data=place.data, model=end.state.model,
            evals=[row for row in run.rows() if row["event"] == "eval"], ledger=summary["presentations"], summary=summary,
            initial_weights="random", evaluate_hash=str(run.env().get("evaluate_hash")),
        )  # fmt: skip
        found = guards(evidence, all=True)
    return place.facts() | {"guards": [asdict(guard) for guard in found]}


def first_steps(run: RunDir, n: int) -> dict[str, Any]:
    place = Place(run)
    notes: list[str] = []
    growth, end = place.start(), place.end(notes.append)
    rows = list(again(growth, place.data, n, lambda step: step in growth.plan.eval_steps, decides=True))
    whole = growth.state.step == growth.plan.steps
    found = place.facts() | {"steps": growth.state.step, "rows": rows}
    if end:
        last = [row | end.figures(end.state.step) for row in score(place.cfg, place.data, end.state)]
        found |= {"last": last, "weights": weights(end.state)}
    elif checkpoint.steps(run.checkpoints):
        found["unusable"] = "; ".join(notes) or "they are not of its last step"
    if whole:
        found["trained_weights"] = weights(growth.state)
    if known := end or (
        growth if whole or not place.cfg.growth.ops else None
    ):  # how a run grew only its end can tell
        params = sum(p.numel() for p in known.state.model.parameters())
        flops = sum(part["flops"] for part in segment_costs(known.plan, known.ids))
        found |= {
            "of": known.plan.steps,
            "params": params,
            "tokens": known.plan.tokens(known.plan.steps),
            "flops": flops,
        }
    return found


def weights(state: State) -> str:
    """The hash of what is scored."""
    with state.average.applied():
        return sha256_tensors(iter(state.model.named_parameters()))


def main(what: str, run: str, into: str, n: str = "1") -> int:
    try:
        found = all_guards(RunDir(Path(run))) if what == "guards" else first_steps(RunDir(Path(run)), int(n))
    except MainrunError as e:
        found = {"error": str(e), "exit_code": e.exit_code}
    write_json(Path(into), found)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
