"""Search with the sampler `frugal`, in virtual time.

A lane is busy from the moment it takes a run until the run's planned new tokens have passed. When a lane
becomes free, the next run is chosen. The sampler then knows exactly the results of the runs that have
ended by then in virtual time. The trials are therefore a function of the study file. They do not depend
on the number of workers, on their speed, or on restarts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mainrun import stats
from mainrun.config import TrainConfig
from mainrun.errors import ConfigError
from mainrun.plan.plan import Plan
from mainrun.store import lineage
from sweeps.coordinates import Coordinates
from sweeps.driver import Search, Target
from sweeps.engine.protocol import Engine
from sweeps.frugal import WHOLE, Asked, Finished, Frugal, Kind, Proposal, Reason, recipe_key
from sweeps.space import Range, with_values
from sweeps.study import Study
from sweeps.trial import Trial, TrialState

LEAST_STEPS = 20  # a short run with fewer steps is not asked for
MOST_FORKS = 8  # the largest number of values of decay_frac whose forks are kept
SETTLED_ASKS = 3
SETTLED_SHARE = 0.1  # a search is settled when the expected improvement is below this share of the noise


class Lanes:
    """The virtual clock. `free` is the time at which each lane becomes free, in tokens."""

    def __init__(self, count: int) -> None:
        self.free = [0] * count
        self.ends: list[int] = []  # the time at which each run ends

    @property
    def now(self) -> int:
        return min(self.free)

    def take(self, duration: int) -> None:
        """Start a run on the lane that becomes free first."""
        lane = self.free.index(self.now)
        self.free[lane] += duration
        self.ends.append(self.free[lane])

    def wait(self) -> bool:
        """Let the next lane wait until another run ends. Return False if no run is pending."""
        later = [end for end in self.ends if end > self.now]
        if later:
            self.free[self.free.index(self.now)] = min(later)
        return bool(later)


class FrugalSearch(Search):
    """A search whose trials are single runs: whole runs of recipes, short runs, and late changes."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        engine: Engine,
        note: Callable[[str], None],
        tick: Callable[[], None],
    ) -> None:
        super().__init__(study, folder, engine, note, tick)
        self.generation_size = 1
        coordinates = Coordinates(study.space, self.base, self.train_tokens)
        self.base_plan = Plan(self.base, self.train_tokens)
        whole = self.base_plan.tokens(self.base_plan.steps)
        self.frugal = Frugal(study.sampler, coordinates, study.sampler.horizons, whole, self.base.epochs)
        self.lanes = Lanes(study.sampler.lanes)
        self.late = study.sampler.late or 0.0
        self.reasons: list[Reason] = []  # why each trial was asked for
        self._kept: set[str] = set()  # the keys of the states that the trials so far keep in the store
        self._chains: dict[str, tuple[Plan, list[str]]] = {}  # by the key of a run
        fields = sorted({name.partition(".")[0] for name in study.space} & TrainConfig.model_fields.keys())
        self._static_fields = [name for name in fields if TrainConfig.class_of(name) == "static"]
        self._settled = 0  # how many asks in a row expected almost no improvement
        self._over = False
        self._ranking: list[str] = []  # the keys of the trained recipes, the best first
        self._ranked_with = (0, 0)  # the numbers of trials and of finished trials that the ranking knows
        if study.budget.tokens and study.budget.tokens < 4 * whole:
            note(
                f"the budget of {study.budget.tokens:,.0f} tokens is less than four whole runs "
                f"of {whole:,} tokens, so the first design takes most of it"
            )

    # -- choosing trials

    def ask(self) -> bool:
        while not self._over and self.remaining_trials() > 0:
            known = [trial for trial in self.trials if self.lanes.ends[trial.number] <= self.lanes.now]
            if not all(trial.is_finished for trial in known):
                return False
            proposal = self._propose([self._finished(trial) for trial in known])
            if proposal is not None and not self._is_settled(proposal.reason):
                self._add(proposal)
                return True
            self._over = proposal is not None or not self.lanes.wait()
        return False

    def _propose(self, finished: list[Finished]) -> Proposal | None:
        """Choose the next run, given the runs that have ended in virtual time."""
        pending = [self._asked(t) for t in self.trials if self.lanes.ends[t.number] > self.lanes.now]
        return self.frugal.ask(len(self.trials), finished, pending, self.new_tokens)

    def _is_settled(self, reason: Reason) -> bool:
        if self.study.budget.until != "settled" or reason.phase != "search":
            return False
        small = reason.improvement < SETTLED_SHARE * reason.noise
        self._settled = self._settled + 1 if small else 0
        return self._settled >= SETTLED_ASKS

    def _add(self, proposal: Proposal) -> None:
        asked = proposal.asked
        tokens = self.new_tokens(asked)
        assert tokens is not None
        plan, keys = self._chain(asked)
        self._kept.update(keys[step] for step in self.kept_steps(plan))
        self.lanes.take(tokens)
        self.reasons.append(proposal.reason)
        trial = self._new_trial(len(self.trials), asked.values, asked.horizon, asked.late)
        trial.planned = tokens
        self.trials.append(trial)

    @staticmethod
    def _asked(trial: Trial) -> Asked:
        return Asked(trial.values, trial.horizon, trial.late)

    def _finished(self, trial: Trial) -> Finished:
        return Finished(self._asked(trial), trial.scores.get(0))

    def _is_budget_spent(self) -> bool:
        budget = self.study.budget
        return bool(budget.tokens and self.planned_tokens >= budget.tokens) or super()._is_budget_spent()

    @property
    def planned_tokens(self) -> int:
        """The new tokens of all trials so far, as planned."""
        return sum(trial.planned for trial in self.trials)

    # -- new tokens

    def new_tokens(self, asked: Asked) -> int | None:
        """Return the tokens of a run after its last state that an earlier run keeps, as planned.

        Return None if the run cannot be asked for. The number does not depend on the states that the store
        happens to hold, so a full store or another study cannot change the trials.
        """
        try:
            plan, keys = self._chain(asked)
        except ConfigError:
            return None
        if asked.horizon < 1 and (plan.steps < LEAST_STEPS or plan.warmup_steps >= plan.decay_start):
            return None
        shared = next((step for step in range(plan.steps, 0, -1) if keys[step] in self._kept), 0)
        return plan.tokens(plan.steps) - plan.tokens(shared)

    def _chain(self, asked: Asked) -> tuple[Plan, list[str]]:
        """Return the plan of a run, and the keys of its states, which only this search uses."""
        if asked.key not in self._chains:
            train_tokens = self._train_tokens_of(asked.values)
            cfg = self._run_config(asked.values, asked.horizon, asked.late, train_tokens)
            plan = Plan(cfg, train_tokens)
            static = {name: getattr(cfg, name) for name in self._static_fields}
            self._chains[asked.key] = plan, lineage.chain(recipe_key(static) * 4, plan)
        return self._chains[asked.key]

    def kept_steps(self, plan: Plan) -> list[int]:
        """Return the steps whose states a run keeps: evaluations, phases of the schedule, and forks."""
        steps = {*plan.eval_steps, *plan.breaks, *self.forks(plan), plan.steps}
        return sorted(steps - {1})

    def forks(self, plan: Plan) -> list[int]:
        """Return the steps of a run's trunk at which other runs of the same trunk may begin to decay."""
        values = [plan.cfg.decay_frac]
        parameter = self.study.space.get("decay_frac")
        if isinstance(parameter, Range):
            share = (parameter.high - parameter.low) / (MOST_FORKS - 1)
            values = [parameter.low + i * share for i in range(MOST_FORKS)]
        elif parameter is not None:
            values = parameter.values
        steps: set[int] = set()
        if self.late and plan.cfg.growth.ops:
            whole = self._whole_steps(plan.segments[-1].cfg)
            steps.update(plan.steps - round(value * whole) + 1 for value in values)
        else:
            whole = self._whole_steps(plan.cfg)
            for horizon in self.study.sampler.horizons:
                length = -(-whole * horizon // 1)
                steps.update(int(length - round(value * length)) + 1 for value in values)
        if self.late and plan.at(plan.warmup_steps) == self.base_plan.at(plan.warmup_steps):
            steps.add(self.base_plan.segments[0].steps_to(self.late * self.base_plan.budget))
        return sorted(step for step in steps if plan.warmup_steps < step < plan.decay_start)

    def _whole_steps(self, cfg: TrainConfig) -> int:
        return Plan(with_values(cfg, {"max_steps": 0}), self.train_tokens).steps

    # -- training

    def _targets(self, trial: Trial, rung: int) -> list[Target]:
        runs = self.runs_of(trial)
        plan = Plan(runs.cfg, self._train_tokens_of(trial.values))
        return [Target(runs.cfg, 0, tuple(self.forks(plan)))]

    # -- results

    def best(self, count: int = 1) -> list[Trial]:
        """Return the best whole runs by the surrogate's prediction, which depends less on luck."""
        done = [self._finished(trial) for trial in self.trials if trial.is_finished]
        known = (len(self.trials), len(done))
        if known != self._ranked_with:  # the display asks several times a second
            self._ranking = [recipe_key(values) for _, values in self.frugal.beliefs(done)]
            self._ranked_with = known
        whole = [trial for trial in self.trials if trial.state is TrialState.DONE]
        return sorted(whole, key=lambda trial: self._ranking.index(recipe_key(trial.values)))[:count]

    def summary(self) -> dict[str, Any]:
        """Return the runs of each horizon, how well they rank recipes, and the fitted drift."""
        runs = Counter(self._asked(trial).kind for trial in self.trials)
        kinds = [(horizon, 0.0) for horizon in self.study.sampler.horizons]
        if self.late:
            kinds.append((1.0, self.late))
        horizons: list[dict[str, Any]] = []
        for horizon, late in kinds:
            row = {"horizon": horizon, "runs": runs[horizon, late]}
            row |= {"late": late} if late else {}
            horizons.append(row | {"correlation": self._correlation((horizon, late))})
        drift = self.frugal.fitted_drift()
        return {"frugal": {"planned": self.planned_tokens, "horizons": horizons, "drift": drift}}

    def _correlation(self, kind: Kind) -> float | None:
        """Return the rank correlation of a kind with whole runs, or None with fewer than three recipes."""
        scores: dict[Kind, dict[str, float]] = {kind: {}, WHOLE: {}}
        for trial in self.trials:
            trial_kind = self._asked(trial).kind
            if trial_kind in scores and trial.scores:
                scores[trial_kind][recipe_key(trial.values)] = trial.scores[0]
        both = sorted(scores[kind].keys() & scores[WHOLE].keys())
        if kind == WHOLE or len(both) < 3:
            return None
        early, final = ([scores[k][key] for key in both] for k in (kind, WHOLE))
        return stats.spearman(early, final)

    def facts(self, trial: Trial) -> dict[str, Any]:
        """Return the planned new tokens of a trial, why it was asked for, and whether it is a late change."""
        reason = asdict(self.reasons[trial.number])
        options = []
        for option in reason.pop("options"):
            asked = {name: value for name, value in option.pop("asked").items() if name != "late" or value}
            options.append({**asked, **option})
        numbers = {name: value for name, value in reason.items() if value == value}  # without NaN
        late = {"late": trial.late} if trial.late else {}
        return {"planned": trial.planned, "why": {**numbers, "options": options}, **late}

    def remaining_trials(self) -> int:
        return 0 if self._over else super().remaining_trials()

    def progress_text(self) -> str:
        """Return the tokens spent, the runs by horizon, and the prediction of the last ask."""
        whole = self.base_plan.tokens(self.base_plan.steps)
        text = f"; {self.planned_tokens / whole:.1f} whole runs of tokens"
        reason: Any = self.reasons[-1] if self.reasons else None
        if reason and reason.phase == "search":
            text += f"; predicted best {reason.belief:.4f} ± {reason.deviation:.4f}"
            text += f", expected improvement {reason.improvement:.4f}"
        return text


def make_search(
    study: Study, folder: Path, engine: Engine, note: Callable[[str], None], tick: Callable[[], None]
) -> Search:
    """Return the search of a study."""
    kind = FrugalSearch if study.sampler.name == "frugal" else Search
    return kind(study, folder, engine, note, tick)
