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
from mainrun.core.machine_class import versions
from mainrun.errors import MainrunError, RunError
from mainrun.growth.state import Controller, load_state, make_controller
from mainrun.plan.cost import segment_costs
from mainrun.plan.plan import Plan
from mainrun.store import checkpoint
from mainrun.store.checkpoint import sha256_tensors
from mainrun.store.rundir import RunDir, write_json
from mainrun.train import State, score, set_up


class Place:
    """What a run computes with, set up again."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.cfg = run.config()
        self.setup = set_up(self.cfg)
        self.corpus = self.setup.corpus
        self.data = self.setup.data
        self.plan = self.setup.plan

    def facts(self) -> dict[str, Any]:
        titles = {"fingerprints": self.corpus.fingerprints, "tokenizer": self.data.tokenizer.digest}
        return {"versions": versions(), "machine_class": self.setup.device.machine_class, **titles}

    def start(self) -> Controller:
        """Return the run at step 0."""
        return make_controller(self.cfg, self.plan, self.setup.device, self.setup.start())

    def end(self, note: Callable[[str], None] = lambda _: None) -> Controller | None:
        """Return the run with its last weights, or None if it has no usable checkpoint of them."""
        loaded = checkpoint.load_newest(self.run.checkpoints, self._last, note)
        if loaded is None:
            return None
        tensors, meta = loaded
        growth = self.start()
        with checkpoint.fitting(f"the checkpoint of step {meta['step']} in {self.run.checkpoints}"):
            load_state(growth.state, tensors, meta["step"], meta["presented"], meta.get("growth"))
            growth.restore()
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
    rows = list(again(place.setup, growth, n, lambda step: step in growth.plan.eval_steps, decides=True))
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
        vocab_size = place.data.tokenizer.vocab_size
        flops = sum(part["flops"] for part in segment_costs(known.plan, vocab_size))
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
