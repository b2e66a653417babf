"""A finished run looked at by the code beside this file: all its guards, or its first steps and its last score once more.

    python -m mainrun.replay guards RUN INTO.json
    python -m mainrun.replay steps RUN INTO.json N

`mainrun submit` and `mainrun verify` start it in the code of a commit or of a bundle, which need not be the installed one.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mainrun.audit import again
from mainrun.config import Plan, TrainConfig
from mainrun.corpus import Corpus, load_corpus
from mainrun.errors import MainrunError, RunError
from mainrun.guards import Evidence, guards
from mainrun.machine import Machine, versions
from mainrun.sitting import score
from mainrun.store import checkpoint
from mainrun.store.checkpoint import sha256_tensors
from mainrun.store.rundir import RunDir, write_json
from mainrun.tokens import TokenData, prepare
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

    def start(self) -> State:
        return State(self.cfg, build(self.cfg, self.data.tokenizer.vocab_size).to(self.machine.device))

    def end(self) -> State | None:
        """The run's last weights, if its checkpoint is there."""
        found = checkpoint.load_newest(self.run.checkpoints, lambda meta: _last(meta, self.cfg, self.plan), lambda _: None)
        if found is None:
            return None
        state = self.start()
        state.load(found[0], found[1]["step"], found[1]["presented"])
        state.model.set_up(self.plan.at(state.step - 1), self.machine.attention)
        return state


def _last(meta: dict[str, Any], cfg: TrainConfig, plan: Plan) -> str | None:
    return None if meta["digest"] == cfg.digest and meta["step"] == plan.steps else "it is not of this run's last step"


def all_guards(run: RunDir) -> dict[str, Any]:
    place, summary = Place(run), run.summary() or {}
    state = place.end()
    if state is None:
        raise RunError(
            f"{run.path} has no usable checkpoint of its last step, and the guards need its weights; train it again with --fresh"
        )
    with state.average.applied():
        weights = sha256_tensors(iter(state.model.named_parameters()))
        if weights != summary["weights"]:
            raise RunError(f"{run.path}/summary.json was written for other weights than its checkpoint holds; train it again with --fresh")
        evidence = Evidence(
            cfg=place.cfg, corpus=place.corpus, data=place.data, model=state.model,
            evals=[row for row in run.metrics() if row["event"] == "eval"], ledger=summary["presentations"], summary=summary,
            initial_weights="random", evaluate_hash=run.env()["evaluate_hash"],
        )  # fmt: skip
        found = guards(evidence, all=True)
    return place.facts() | {"guards": [asdict(guard) for guard in found]}


def first_steps(run: RunDir, n: int) -> dict[str, Any]:
    place = Place(run)
    n = min(n, place.plan.steps)
    state = place.start()
    scored = {step for step in place.plan.eval_steps if step <= n}
    rows = list(again(place.cfg, place.machine, place.data, place.plan, state, n, scored))
    found = place.facts() | {"steps": n, "of": place.plan.steps, "rows": rows, "params": sum(p.numel() for p in state.model.parameters())}
    if end := place.end():
        found["last"] = list(score(place.cfg, place.data, end))
    for name, whole in (("weights", end), ("trained_weights", state if n == place.plan.steps else None)):
        if whole:
            with whole.average.applied():
                found[name] = sha256_tensors(iter(whole.model.named_parameters()))
    return found


def main(what: str, run: str, into: str, n: str = "1") -> int:
    try:
        found = all_guards(RunDir(Path(run))) if what == "guards" else first_steps(RunDir(Path(run)), int(n))
    except MainrunError as e:
        found = {"error": str(e)}
    write_json(Path(into), found)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
