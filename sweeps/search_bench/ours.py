"""Run the sampler frugal, and variants of it, on a recorded table instead of the trainer.

The search is that of a study: the same sampler, virtual clock and planned tokens. Only the scores come from
the table.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.plan.plan import Plan
from sweeps.coordinates import Coordinates
from sweeps.frugal import Asked, Finished, Proposal, recipe_key
from sweeps.lanes import FrugalSearch
from sweeps.search_bench.metrics import CAP, LAST_POINT, Trace
from sweeps.study import Budget
from sweeps.trial import Trial, TrialRuns, TrialState

if TYPE_CHECKING:
    from sweeps.search_bench.tables import Table

Values = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """The settings of a search, and the parts of the sampler that are turned off."""

    lanes: int = 2
    horizons: tuple[float, ...] = (0.25, 0.5, 1.0)
    coupled: bool = True
    drifting: bool = True
    near_base: bool = True
    raw: bool = False  # a run at a horizon is the first part of the whole run
    shared: bool = True  # a step that an earlier run has trained costs nothing


OURS = "frugal"
THAW = "thaw-raw"  # a rival: our surrogate on raw curves, with one worker like the other rivals
ABLATIONS = {
    "plain-coordinates": Variant(coupled=False),
    "no-drift": Variant(drifting=False),
    "raw-curves": Variant(raw=True),
    "no-sharing": Variant(shared=False),
    "whole-runs": Variant(horizons=(1.0,)),
    "half-runs": Variant(horizons=(0.5, 1.0)),
    "not-near-base": Variant(near_base=False),
    "lanes-1": Variant(lanes=1),
    "lanes-4": Variant(lanes=4),
    "lanes-8": Variant(lanes=8),
}
VARIANTS = {OURS: Variant(), THAW: Variant(lanes=1, raw=True, coupled=False), **ABLATIONS}


class FirstPart(Plan):
    """The plan of the first steps of a whole run."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self.__dict__.update(plan.__dict__)
        self.steps = steps
        self.decay_start = min(plan.decay_start, steps)
        self.eval_steps = frozenset({*(step for step in plan.eval_steps if step <= steps), steps})
        self.breaks = [step for step in plan.breaks if step < steps]


class TableSearch(FrugalSearch):
    """The search of a study whose runs are in a table."""

    def __init__(self, replay: Replay, variant: Variant, search_seed: int, train_seed: int) -> None:
        self.table = replay.table
        self.variant = variant
        self.train_seed = train_seed
        study = self.table.study(seed=search_seed, lanes=variant.lanes, horizons=variant.horizons)
        study = study.model_copy(update={"budget": Budget(tokens=1e18)})  # `run` ends the search
        super().__init__(study, Path(), None, lambda text: None, lambda: None)  # type: ignore[arg-type]
        coordinates = Coordinates(study.space, self.base, self.train_tokens, coupled=variant.coupled)
        self.frugal.coordinates = coordinates
        self.frugal.drifting = variant.drifting
        self.frugal.near_base = variant.near_base
        self._chains = replay.chains.setdefault(variant.raw, {})
        self._made = replay.runs
        self.steps: list[tuple[float, str | None]] = []  # the trace of the recommendations

    def _count_train_tokens(self) -> int:
        return self.table.train_tokens

    def run(self) -> None:
        """Search until the tokens of the cap are spent.

        If the recommendation was good before, the search ends at the last point at which regret is measured.
        """
        while self.ask():
            self._answer(self.trials[-1])
            spent = self.spent(self.lanes.now)
            reached = any(key in self.table.good for _, key in self.steps)
            if spent >= CAP or (reached and spent > LAST_POINT):
                break

    def _answer(self, trial: Trial) -> None:
        values = self._full(trial.values)
        if self.variant.raw and trial.horizon < 1:
            curve = self.table.curve(values, self.train_seed)
            score = curve[self._point(trial.horizon)]
        else:
            score = self.table.score(values, trial.horizon, self.train_seed)
        if score is None:
            trial.end(TrialState.DIVERGED, "")
        else:
            trial.add_score(0, score)

    def _point(self, horizon: float) -> int:
        """Return the index of the point of a curve at a horizon."""
        return math.ceil(horizon * self.table.definition.points) - 1

    def _full(self, values: Values) -> Values:
        return {name: values.get(name, value) for name, value in self.table.base.items()}

    def spent(self, now: int) -> float:
        """Return the tokens that all lanes have trained until a time, in whole runs."""
        left = sum(max(0, self.lanes.ends[trial.number] - now) for trial in self.trials)
        return (self.planned_tokens - left) / self.table.whole

    # -- the trace

    def _propose(self, finished: list[Finished]) -> Proposal | None:
        best = self._recommended(finished)
        if best is not None:
            self.steps.append((self.spent(self.lanes.now), recipe_key(self._full(best))))
        return super()._propose(finished)

    def _recommended(self, finished: list[Finished]) -> Values | None:
        """Return the recipe that the study would recommend if it ended now."""
        whole = [run.asked.values for run in finished if run.asked.horizon == 1 and run.score is not None]
        if len(whole) < 2:
            return whole[0] if whole else None
        return self.frugal.beliefs(finished)[0][1]

    # -- plans

    def new_tokens(self, asked: Asked) -> int | None:
        tokens = super().new_tokens(asked)
        if tokens is None or self.variant.shared:
            return tokens
        plan, _ = self._chain(asked)
        return plan.tokens(plan.steps)

    def _chain(self, asked: Asked) -> tuple[Plan, list[str]]:
        if not self.variant.raw or asked.horizon == 1:
            return super()._chain(asked)
        if asked.key not in self._chains:
            plan, keys = self._chain(Asked(asked.values, 1.0))
            point = self._point(asked.horizon)
            steps = self.table.point_tokens(self._full(asked.values))[point] // plan.tokens(1)
            self._chains[asked.key] = FirstPart(plan, steps), keys[: steps + 1]
        return self._chains[asked.key]

    def kept_steps(self, plan: Plan) -> list[int]:
        return [step for step in super().kept_steps(plan) if step <= plan.steps]

    def _make_runs(self, values: Values, horizon: float = 1.0, late: float = 0.0) -> TrialRuns:
        key = Asked(values, horizon, late).key
        if key not in self._made:
            self._made[key] = super()._make_runs(values, horizon, late)
        return self._made[key]


class Replay:
    """A table, and the plans of its runs, which all searches share."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.chains: dict[bool, dict[str, tuple[Plan, list[str]]]] = {}
        self.runs: dict[str, TrialRuns] = {}

    def search(self, method: str, search_seed: int, train_seed: int) -> Trace:
        """Run one search of our sampler or of a variant."""
        search = TableSearch(self, VARIANTS[method], search_seed, train_seed)
        began = time.process_time()
        search.run()
        seconds = time.process_time() - began
        name = self.table.definition.name
        return Trace(method, name, search_seed, train_seed, search.steps, seconds)
