"""Search for the best config of a study by training trials in generations.

In each generation, the best trials are promoted to the next rung, and the other trials are pruned.

A study is run by a single process, the driver. The driver can be killed and restarted at any time, because
the complete state of the study can be rebuilt from disk. A new driver asks the sampler for the same trials,
reads the scores of finished runs from their run directories, and resumes unfinished runs from their
checkpoints. The driver also writes the trials to an Optuna database for people and dashboards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError, RunError, UsageError
from mainrun.plan.plan import Plan
from mainrun.store.rundir import RunDir, check_same_config
from sweeps.branch import branch_config
from sweeps.corpus_size import TOKENIZER_FIELDS, count_train_tokens, count_with_tokenizer
from sweeps.engine.protocol import Engine, Outcome, Task
from sweeps.late_change import late_change
from sweeps.ledger import Ledger, run_cost, total
from sweeps.sampling import TrialSampler, grid_size
from sweeps.short_run import short_run
from sweeps.space import trial_config, with_values
from sweeps.study import Study, set_arguments
from sweeps.times import RunTimes, Span, file_span
from sweeps.trial import Trial, TrialRuns, TrialState

UNLIMITED = 1_000_000  # the maximum number of trials if the budget sets no maximum


class Target(NamedTuple):
    """A run that the engine trains for a trial."""

    cfg: TrainConfig
    until: int  # the last step, or 0 for the end of the run
    keep: tuple[int, ...] = ()  # the steps whose states are kept for other runs


class Search:
    """The search of one study.

    `trials` contains the complete state of the search. All other attributes can be rebuilt from `trials`.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        engine: Engine,
        note: Callable[[str], None],
        tick: Callable[[], None],
    ) -> None:
        """Initialize a search, without training any trials.

        `note` is called to print a message. `tick` is called about twice a second to show the progress.
        """
        self.study = study
        self.folder = folder
        self.engine = engine
        self.note = note
        self.tick = tick
        self.base = study.base()
        self.trials: list[Trial] = []
        # Map the id of a run to the number of the first trial that uses the run. If a sampler suggests the
        # same values twice, two trials share a run.
        self.owners: dict[str, int] = {}
        self.sampler = TrialSampler(study.sampler, study.space, self.base)
        self.generation_size = study.sampler.generation
        self.start_time = time.monotonic()
        self.started_at = time.time()
        self.train_tokens = self._count_train_tokens()
        self.times = RunTimes(folder)
        self._costs: dict[int, Ledger] = {}  # the cost of each finished trial, by trial number
        self._runs: dict[int, TrialRuns] = {}  # the runs of each trial that is not in the database yet
        self._reported = 0  # the number of generations whose scores were reported to the sampler
        self._first_open = 0  # index of the first generation with an unfinished trial

    def _count_train_tokens(self) -> int:
        return count_train_tokens(self.study, self.base, self.folder)

    def _train_tokens_of(self, values: dict[str, Any]) -> int:
        """Return the number of training tokens in an epoch of a trial."""
        fields = {name: values[name] for name in TOKENIZER_FIELDS if name in values}
        if all(value == getattr(self.base, name) for name, value in fields.items()):
            return self.train_tokens
        return count_with_tokenizer(self.study, with_values(self.base, values), self.folder)

    # -- choosing trials

    def generation(self, index: int) -> list[Trial]:
        return self.trials[index * self.generation_size : (index + 1) * self.generation_size]

    def ask(self) -> bool:
        """Sample a new generation of trials, and return whether trials were added.

        No trials are added if the budget is spent. Generation n is sampled only after generation n - 2 is
        finished, so workers can train generation n - 1 during the sampling.
        """
        index = len(self.trials) // self.generation_size
        if index > 1 and not all(trial.is_finished for trial in self.generation(index - 2)):
            return False
        self._report_scores(index - 1)
        remaining = self.remaining_trials()
        if remaining <= 0:
            return False
        first = len(self.trials)
        for number in range(first, first + min(self.generation_size, remaining)):
            self.trials.append(self._new_trial(number, self.sampler.ask(number)))
        return True

    def _report_scores(self, end: int) -> None:
        """Report the scores of all generations before `end` to the sampler. Each is reported only once."""
        while self._reported < end:
            for trial in self.generation(self._reported):
                self.sampler.tell(trial.number, trial.scores, trial.state is TrialState.DONE)
            self._reported += 1

    def remaining_trials(self) -> int:
        """Return how many more trials the budget allows.

        Tokens and FLOPs are summed only over the generations whose scores were reported to the sampler. A
        budget of tokens or FLOPs therefore allows the same trials, no matter how fast the workers are.

        If the study has rungs, the maximum number of trials is rounded up to a whole generation. Without
        rounding, a larger budget could later change which trials of the last generation are promoted.
        """
        if self._is_budget_spent():
            return 0
        remaining = UNLIMITED
        limit = self.study.budget.trials
        if limit is not None:
            if self.study.rungs:
                limit = -(-limit // self.generation_size) * self.generation_size
            remaining = limit - len(self.trials)
        if self.study.sampler.name == "grid":
            remaining = min(remaining, grid_size(self.study.space) + 1 - len(self.trials))
        return remaining

    def _is_budget_spent(self) -> bool:
        budget = self.study.budget
        if budget.minutes and time.monotonic() - self.start_time >= 60 * budget.minutes:
            return True
        if not budget.tokens and not budget.flops:
            return False
        known_trials = self.trials[: self._reported * self.generation_size]
        cost = total(self.cost_of(trial) for trial in known_trials)
        if budget.tokens and cost.tokens >= budget.tokens:
            return True
        return bool(budget.flops and cost.flops >= budget.flops)

    def _new_trial(
        self, number: int, values: dict[str, Any], horizon: float = 1.0, late: float = 0.0
    ) -> Trial:
        try:
            runs = self._make_runs(values, horizon, late)
        except ConfigError as e:
            state = TrialState.FAILED
            return Trial(number, values, state=state, reason=str(e), horizon=horizon, late=late)
        trial = Trial(number, values, runs.cfg.run_id, runs.stops, horizon=horizon, late=late)
        self._runs[number] = runs
        self.owners.setdefault(trial.run_id, number)
        return trial

    def _run_config(
        self, values: dict[str, Any], horizon: float, late: float, train_tokens: int
    ) -> TrainConfig:
        cfg = trial_config(self.base, values, train_tokens)
        plan = Plan(cfg, train_tokens)
        if late:
            return late_change(Plan(self.base, train_tokens), plan, late)
        return short_run(cfg, plan, horizon)

    def _make_runs(self, values: dict[str, Any], horizon: float = 1.0, late: float = 0.0) -> TrialRuns:
        """Create the configs of a trial's runs, and choose the step of each rung.

        A rung is at the first evaluation after the trial has trained the rung's share of its steps.
        """
        train_tokens = self._train_tokens_of(values)
        cfg = self._run_config(values, horizon, late, train_tokens)
        plan = Plan(cfg, train_tokens)
        rungs = self.study.rungs
        stops: list[int] = []
        for share in rungs.at if rungs else ():
            step = min(step for step in plan.eval_steps if step >= share * plan.steps)
            if step < plan.steps and step not in stops:
                stops.append(step)
        branches: dict[int, TrainConfig] = {}
        if rungs and rungs.score == "branch":
            for rung, step in enumerate(stops):
                branches[rung] = branch_config(cfg, plan, step, rungs.branch)
        return TrialRuns(cfg, (*stops, plan.steps), branches)

    def runs_of(self, trial: Trial) -> TrialRuns:
        return self._runs.get(trial.number) or self._make_runs(trial.values, trial.horizon, trial.late)

    # -- training

    def run(self) -> None:
        """Sample and train trials until the budget is spent.

        If a KeyboardInterrupt stops the search, a new driver can resume the study.
        """
        from sweeps.database import StudyDatabase

        database = StudyDatabase(self.study, self.folder, self.note)
        limit = self.remaining_trials()
        if limit < database.written:
            raise UsageError(
                f"{self.folder} has {database.written} trials, but the budget allows only {limit}; "
                f"a budget can only grow, so allow at least {database.written} trials"
            )
        running: dict[Future[Outcome], tuple[Trial, int]] = {}
        with ThreadPoolExecutor(self.engine.workers) as pool:
            try:
                while True:
                    while self.ask():
                        pass
                    for trial in self._open_trials():
                        if trial.state is TrialState.WAITING:
                            rung = trial.rung + 1
                            trial.start()
                            future = pool.submit(self._train_targets, self._targets(trial, rung))
                            running[future] = (trial, rung)
                    database.write(self.trials, self.row)
                    self._forget_runs(database.written)
                    self.tick()
                    if not running:
                        break
                    for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                        trial, rung = running.pop(future)
                        self._record_outcome(trial, rung, future.result())
                    self._promote()
            except BaseException:
                self.engine.close()
                raise

    def _open_generations(self) -> range:
        """Return the indices of the generations that may have unfinished trials.

        Finished generations at the start of the study are skipped to save time, because a study may have a
        million trials.
        """
        count = -(-len(self.trials) // self.generation_size)
        while self._first_open < count:
            if not all(trial.is_finished for trial in self.generation(self._first_open)):
                break
            self._first_open += 1
        return range(self._first_open, count)

    def _open_trials(self) -> Iterator[Trial]:
        for index in self._open_generations():
            yield from self.generation(index)

    def _forget_runs(self, end: int) -> None:
        """Free the configs of all trials whose number is below `end`, because configs use the most memory."""
        for number in list(self._runs):
            if number < end:
                del self._runs[number]

    def _targets(self, trial: Trial, rung: int) -> list[Target]:
        """Return the runs that must be trained to score a trial at a rung, and the last step of each run.

        The first run is the trial's own run, up to the step of the rung. If the rung is scored by a branch,
        the branch is the second run.
        """
        runs = self.runs_of(trial)
        is_last = rung + 1 == len(trial.stops)
        targets = [Target(runs.cfg, 0 if is_last else trial.stops[rung])]
        branch = runs.branches.get(rung)
        if branch:
            # Trials that differ only in their learning rate decay can share a branch.
            self.owners.setdefault(branch.run_id, trial.number)
            targets.append(Target(branch, 0))
        return targets

    def _train_targets(self, targets: list[Target]) -> Outcome:
        for target in targets:
            outcome = self.train(*target)
            if not outcome.ok:
                break
        return outcome

    def train(self, cfg: TrainConfig, until: int = 0, keep: tuple[int, ...] = ()) -> Outcome:
        """Train a run up to a step, or to the end of the run if `until` is 0.

        The states after the steps in `keep` are kept in the store.

        If the run has already reached the step, no worker is started, because starting a worker takes about a
        second.
        """
        run = self.run_dir(cfg)
        status = run.status()
        is_done = status.get("state") == "done" and run.summary() is not None
        is_at_step = status.get("state") == "interrupted" and 0 < until <= status.get("step", 0)
        if is_done or is_at_step:
            check_same_config(run, cfg)
            return Outcome(True)
        settings = tuple(set_arguments(self.study, cfg))
        task = Task(
            self.study.preset, settings, self.runs_dir, self.store_dir, until, self.study.threads, keep
        )
        self.times.started(cfg.run_id)
        outcome = self.engine.train(task)
        self.times.ended(cfg.run_id)
        return outcome

    @property
    def runs_dir(self) -> Path:
        return self.folder / "runs"

    @property
    def store_dir(self) -> Path:
        return self.runs_dir / ".store"

    def run_dir(self, cfg: TrainConfig) -> RunDir:
        path = self.runs_dir / cfg.run_id
        return RunDir(path, f"restore it, or remove {path} and run the same command again")

    def _record_outcome(self, trial: Trial, rung: int, outcome: Outcome) -> None:
        if not outcome.ok:
            trial.end(TrialState.DIVERGED if outcome.diverged else TrialState.FAILED, outcome.reason)
            self.note(f"trial {trial.number} {trial.state}: {trial.reason}")
            return
        score = self.trial_score(trial, trial.stops[rung])
        branch = self.runs_of(trial).branches.get(rung)
        if branch:
            trial.add_score(rung, self.run_score(branch, branch.max_steps), raw_score=score)
        else:
            trial.add_score(rung, score)

    def trial_score(self, trial: Trial, step: int) -> float:
        return self.run_score(self.runs_of(trial).cfg, step)

    def run_score(self, cfg: TrainConfig, step: int) -> float:
        """Return the score of a run after a step. The study's objective defines which score is used.

        If metrics.jsonl has several evaluations after the same step, use the last evaluation.
        """
        run = self.run_dir(cfg)
        split, name = self.study.objective.split("/")
        for row in reversed(run.rows()):
            if row["event"] == "eval" and row["split"] == split and row["step"] == step:
                return float(row[name])
        raise RunError(
            f"the run {run.path} has no score of {split} at step {step}, because its metrics.jsonl was "
            "changed; remove the run and run the same command again"
        )

    def _promote(self) -> None:
        """Promote the best trials of each generation to the next rung, and prune the other trials.

        A generation is promoted when all of its unfinished trials have a score at the current rung. Trials
        with equal scores are ordered by trial number. Trial 0 is never pruned, because all other trials are
        compared with trial 0.
        """
        for index in self._open_generations():
            group = [trial for trial in self.generation(index) if not trial.is_finished]
            if not group or any(trial.state is not TrialState.PAUSED for trial in group):
                continue
            assert self.study.rungs is not None
            rung = group[0].rung  # all trials of the group have the same rung
            ranked = sorted(group, key=lambda trial: (trial.scores[rung], trial.number))
            keep = max(1, round(self.study.rungs.keep * len(group)))
            for place, trial in enumerate(ranked, 1):
                if place <= keep or trial.number == 0:
                    trial.promote()
                else:
                    reason = f"place {place} of {len(group)} at step {trial.stops[rung]}"
                    trial.end(TrialState.PRUNED, reason)

    # -- results

    def row(self, trial: Trial) -> dict[str, Any]:
        """Return the facts of a finished trial that the database and the export record."""
        span = self.span_of(trial)
        return {
            "trial": trial.number,
            "state": trial.state.value,
            "value": trial.scores.get(trial.rung),
            "params": trial.values,
            "scores": {str(rung): score for rung, score in trial.scores.items()},
            "run": trial.run_id,
            "reason": trial.reason,
            "started": span.start,
            "ended": span.end,
            **asdict(self.cost_of(trial)),
        }

    def cost_of(self, trial: Trial) -> Ledger:
        """Return the cost of a trial, including its branches.

        If a trial was pruned, diverged or failed, all of its trained steps count as wasted, even if the
        sampler used the trial's scores. If two trials share a run, only the first trial pays for the run.
        """
        if trial.number in self._costs:
            return self._costs[trial.number]
        if not trial.run_id:
            return Ledger()
        runs = self.runs_of(trial)
        cost = self._cost_of_run(trial, runs.cfg)
        for rung, branch in runs.branches.items():
            # A branch that diverged has no score, but the cost of the branch still belongs to the trial.
            if rung in trial.scores or self.owners.get(branch.run_id) == trial.number:
                branch_cost = self._cost_of_run(trial, branch)
                cost = total([cost, replace(branch_cost, branch=branch_cost.trained)])
        if trial.is_finished:
            self._costs[trial.number] = cost
        return cost

    def _cost_of_run(self, trial: Trial, cfg: TrainConfig) -> Ledger:
        cost = run_cost(self.run_dir(cfg), cfg)
        if self.owners[cfg.run_id] != trial.number:
            reused = 0
            if trial.scores:
                reused = min(cost.asked - cost.wasted, trial.stops[trial.rung])
            return Ledger(asked=reused, reused=reused)
        if trial.state in (TrialState.PRUNED, TrialState.DIVERGED, TrialState.FAILED):
            return replace(cost, wasted=cost.trained)
        return cost

    def span_of(self, trial: Trial) -> Span:
        """Return when a trial was trained. A trial that needed no training has the times of its run."""
        if not trial.run_id:  # its values are not a valid config
            return Span(self.started_at, self.started_at)
        runs = self.runs_of(trial)
        branches = [branch.run_id for branch in runs.branches.values()]
        branches = [run_id for run_id in branches if self.owners.get(run_id) == trial.number]
        span = self.times.span([trial.run_id, *branches])
        if span is None:
            span = file_span(self.run_dir(runs.cfg).path / "summary.json")
        return span or Span(self.started_at, self.started_at)

    def progress_text(self) -> str:
        """Return what a sampler adds to the line that shows the progress."""
        return ""

    def summary(self) -> dict[str, Any]:
        """Return what a sampler adds to the export of the study."""
        return {}

    def facts(self, trial: Trial) -> dict[str, Any]:
        """Return what a sampler adds to the row of a trial in the export."""
        return {}

    def best(self, count: int = 1) -> list[Trial]:
        """Return the best completed trials. If several trials share a run, return only the first trial."""
        done = []
        for trial in self.trials:
            if trial.state is TrialState.DONE and self.owners[trial.run_id] == trial.number:
                done.append(trial)
        return sorted(done, key=lambda trial: (trial.scores[trial.rung], trial.number))[:count]
