"""Check a finished run with the version of mainrun that this file belongs to.

    python -m mainrun.replay guards RUN RESULT.json   # run all guards
    python -m mainrun.replay steps RUN RESULT.json N  # train the first N steps again, score the last weights

`mainrun submit` and `mainrun verify` run the copy of this module that is in a commit or in a bundle. The code
in the commit or the bundle may differ from the installed code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mainrun.checks.audit import retrain
from mainrun.checks.guards import Evidence, guards
from mainrun.core.machine_class import versions
from mainrun.errors import MainrunError, RunError
from mainrun.growth.make import make_controller
from mainrun.growth.state import Controller, load_state
from mainrun.plan.cost import segment_costs
from mainrun.plan.plan import Plan
from mainrun.store import checkpoint
from mainrun.store.checkpoint import sha256_tensors
from mainrun.store.rundir import RunDir, write_json
from mainrun.train import State, score, set_last_inputs, set_up


class Replay:
    """A finished run that can be trained again or scored again on this machine."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.cfg = run.config()
        self.setup = set_up(self.cfg)
        self.corpus = self.setup.corpus
        self.data = self.setup.data
        self.plan = self.setup.plan

    def facts(self) -> dict[str, Any]:
        """Return all values that `mainrun verify` compares with the run, except the log rows."""
        return {
            "versions": versions(),
            "machine_class": self.setup.device.machine_class,
            "fingerprints": self.corpus.fingerprints,
            "tokenizer": self.data.tokenizer.digest,
        }

    def start(self) -> Controller:
        """Return a growth controller that contains the state of the run at step 0."""
        return make_controller(self.cfg, self.plan, self.setup.device, self.setup.start())

    def end(self, note: Callable[[str], None] = lambda _: None) -> Controller | None:
        """Return a growth controller with the state at the last step, or None if no checkpoint is usable."""
        newest = checkpoint.load_newest(self.run.checkpoints, self._checkpoint_problem, note)
        if newest is None:
            return None
        tensors, meta = newest
        growth = self.start()
        with checkpoint.fit_errors(f"the checkpoint of step {meta['step']} in {self.run.checkpoints}"):
            load_state(growth.state, tensors, meta["step"], meta["presented"], meta.get("growth"))
            growth.restore()
        set_last_inputs(growth.state, growth.plan, self.setup.device)
        return growth

    def totals(self, growth: Controller) -> dict[str, Any]:
        """Return the steps, parameters, tokens and FLOPs of the whole run, computed from the run's plan."""
        plan = growth.plan
        segments = segment_costs(plan, self.data.tokenizer.vocab_size)
        return {
            "of": plan.steps,
            "params": sum(p.numel() for p in growth.state.model.parameters()),
            "tokens": plan.tokens(plan.steps),
            "flops": sum(segment["flops"] for segment in segments),
        }

    def _checkpoint_problem(self, meta: dict[str, Any]) -> str | None:
        """Return why a checkpoint does not belong to the run's last step, or None if it does."""
        problem = checkpoint.fault(meta)
        if problem:
            return problem
        fired = (meta.get("growth") or {}).get("fired", ())
        try:
            plan = Plan(self.cfg, self.plan.train_tokens, fired)
        except (MainrunError, LookupError, AssertionError) as e:
            return f"its growth operations cannot have fired at these steps ({e})"
        if meta["digest"] != self.cfg.digest or meta["step"] != plan.steps:
            return "it does not belong to the run's last step"
        return None


def run_guards(run: RunDir) -> dict[str, Any]:
    """Run all guards on the weights that a run had at its last step."""
    replay = Replay(run)
    summary = run.summary() or {}
    end = replay.end()
    if end is None:
        problem = f"{run.path} has no usable checkpoint of its last step, whose weights the guards need"
        raise RunError(f"{problem}; train the run again with --fresh")
    if hash_scored_weights(end.state) != summary.get("weights"):
        problem = f"{run.path}/summary.json does not match the weights in the last checkpoint"
        raise RunError(f"{problem}; train the run again with --fresh")
    with end.state.average.applied():
        evidence = Evidence(
            cfg=replay.cfg,
            corpus=replay.corpus,
            data=replay.data,
            model=replay.setup.scored(end.state.model),
            evals=[row for row in run.rows() if row["event"] == "eval"],
            ledger=summary["presentations"],
            summary=summary,
            initial_weights=replay.cfg.start or "random",
            evaluate_hash=str(run.env().get("evaluate_hash")),
        )
        verdicts = guards(evidence, all=True)
    return replay.facts() | {"guards": [asdict(verdict) for verdict in verdicts]}


def replay_steps(run: RunDir, n: int) -> dict[str, Any]:
    """Train the first `n` steps of a run again. Also score the checkpoint of its last step again."""
    replay = Replay(run)
    notes: list[str] = []
    growth = replay.start()
    end = replay.end(notes.append)
    rows = list(retrain(replay.setup, growth, n, lambda step: step in growth.plan.eval_steps, decides=True))
    finished = growth.state.step == growth.plan.steps
    result = replay.facts() | {"steps": growth.state.step, "rows": rows}
    if end is not None:
        scores = score(replay.setup, end.plan, end.state)
        result["last"] = [row | end.figures(end.state.step) for row in scores]
        result["weights"] = hash_scored_weights(end.state)
    elif checkpoint.paths(run.checkpoints):
        result["unusable"] = "; ".join(notes) or "they do not belong to the run's last step"
    if finished:
        result["trained_weights"] = hash_scored_weights(growth.state)
    if end is not None:
        result |= replay.totals(end)
    elif finished or not replay.cfg.growth.ops:  # the plan of a growing run is known only at the end
        result |= replay.totals(growth)
    return result


def hash_scored_weights(state: State) -> str:
    """Hash the weights that are scored, which are the averaged weights in a run with EMA or SWA."""
    with state.average.applied():
        return sha256_tensors(iter(state.model.named_parameters()))


def main(command: str, run: str, output: str, n: str = "1") -> int:
    """Write the result or the error to a JSON file. The exit code is 0 in both cases."""
    run_dir = RunDir(Path(run))
    try:
        if command == "guards":
            result = run_guards(run_dir)
        else:
            result = replay_steps(run_dir, int(n))
    except MainrunError as e:
        result = {"error": str(e), "exit_code": e.exit_code}
    write_json(Path(output), result)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
