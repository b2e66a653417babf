"""One process owns a study: it asks for trials, has them trained, and decides who goes on. Kill it anywhere and start it again.

It remembers nothing that cannot be found again. What a trial is follows from the study file; what it scored is in its run directory,
where training goes on from the last checkpoint. So a driver that begins again asks for the same trials, and those that are done
answer at once. Optuna's database is written for people and their dashboards, a trial at a time, in order.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mainrun.config import TrainConfig
from mainrun.data.corpus import load_corpus
from mainrun.errors import ConfigError, Interrupted, MainrunError, RunError, UsageError
from mainrun.plan.plan import Plan
from mainrun.plan.recipes import load
from mainrun.store import records
from mainrun.store.rundir import RunDir, check_same_config, write_text
from sweeps import branch
from sweeps.engine.protocol import Engine, Outcome, Task
from sweeps.engine.worker import PATIENCE
from sweeps.ledger import Ledger, spent, total
from sweeps.sampling import Asker
from sweeps.space import resolved
from sweeps.study import Study

TOKENS = {"train_tokens": records.at_least_one, "fingerprints?": records.table}  # of tokens.json


@dataclass(slots=True)
class Trial:
    number: int
    values: dict[str, Any]
    run: str = ""  # empty: its values do not go together
    stops: tuple[int, ...] = ()  # the step of each rung; the last is the end
    scores: dict[int, float] = field(default_factory=dict)  # by rung; what it is judged by
    raw: dict[int, float] = field(default_factory=dict)  # its own, of a rung that a branch scored
    state: str = "waiting"  # running | held | done | pruned | diverged | failed
    why: str = ""

    @property
    def over(self) -> bool:
        return self.state in ("done", "pruned", "diverged", "failed")

    @property
    def rung(self) -> int:
        return max(self.scores, default=-1)


@dataclass(frozen=True, slots=True)
class Made:
    """What a trial's values come to."""

    cfg: TrainConfig
    stops: tuple[int, ...]
    branches: dict[int, TrainConfig]  # by rung: the run that scores it, if not the trial itself


class Search:
    """A study in its folder. `trials` is all that is known of it."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        engine: Engine,
        note: Callable[[str], None],
        tick: Callable[[], None],
    ) -> None:
        self.study, self.folder, self.engine, self.note, self.tick = study, folder, engine, note, tick
        self.base = study.base()
        self.trials: list[Trial] = []
        self.owners: dict[
            str, int
        ] = {}  # run: the first trial that is it; a sampler may give the same values again
        self._spent: dict[int, Ledger] = {}  # of trials that are over
        self._made: dict[int, Made] = {}  # of the others: a config takes more memory than all else of a trial
        self.asker = Asker(study, self.base)
        self.told = self.first = (
            0  # generations: told to the sampler, and the first in which a trial is not over
        )
        self.began = time.monotonic()
        self.train_tokens = self._train_tokens()

    # -- what is asked

    def _train_tokens(self) -> int:
        """Of an epoch: read once, by the trainer itself. The titles may not change behind a study that goes on."""
        file = self.folder / "tokens.json"
        titles = load_corpus(self.base).fingerprints
        if before := records.load(
            file, TOKENS, "remove it, and start the same command again: it is made anew"
        ):
            if before.get("fingerprints", titles) != titles:
                now = f"{self.base.corpus} gives other titles now than when {self.folder} began"
                raise UsageError(f"{now}; restore it, or begin a study of its own with --as NAME")
            known = int(before["train_tokens"])
            try:
                Plan(self.base, known)
            except ConfigError as e:
                raise RunError(
                    f"{file} is damaged: it has train_tokens = {known:,} ({e}); remove it, and start again"
                ) from None
            return known
        sets = [part for text in sets_of(self.study, self.base) for part in ("--set", text)]
        command = [
            sys.executable,
            "-m",
            "mainrun",
            "train",
            "--preset",
            self.study.preset,
            *sets,
            "--dry-run",
            "--json",
        ]
        for _ in range(PATIENCE):
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode >= 0:  # it was not killed
                break
        if made.returncode:
            last = (made.stderr.strip().splitlines() or ["it said nothing"])[-1]
            if made.returncode == Interrupted.exit_code:  # a full disk, say
                raise Interrupted(last.removeprefix("interrupted: "))
            kind = UsageError if made.returncode == UsageError.exit_code else MainrunError
            raise kind(f"the base of the study cannot be trained: {last.removeprefix('error: ')}")
        found = int(json.loads(made.stdout)["plan"]["train_tokens"])
        write_text(file, json.dumps({"train_tokens": found, "fingerprints": titles}))
        return found

    @property
    def size(self) -> int:
        return self.study.sampler.generation

    def generation(self, g: int) -> list[Trial]:
        return self.trials[g * self.size : (g + 1) * self.size]

    def ask(self) -> bool:
        """The next generation, once that before the last is over; False: not yet, or the budget is spent."""
        g = len(self.trials) // self.size
        if g > 1 and not all(trial.over for trial in self.generation(g - 2)):
            return False
        while self.told < g - 1:
            for trial in self.generation(self.told):
                self.asker.tell(trial.number, trial.scores, trial.state == "done")
            self.told += 1
        left = self.left()
        if left <= 0:
            return False
        for number in range(len(self.trials), len(self.trials) + min(self.size, left)):
            self.trials.append(self._trial(number, self.asker.ask(number)))
        return True

    def left(self) -> int:
        """Trials that the budget still has. Tokens and FLOPs count as far as the sampler was told: workers' speed decides nothing.

        A generation with rungs is never cut: else a larger budget, given later, would decide anew about trials that are over.
        """
        budget, most = self.study.budget, 1_000_000
        if budget.trials is not None:
            whole = -(-budget.trials // self.size) * self.size if self.study.rungs else budget.trials
            most = whole - len(self.trials)
        if self.study.sampler.name == "grid":
            from sweeps.sampling import _grid

            cells = 1
            for p in self.study.space.values():
                cells *= len(_grid(p))
            most = min(most, cells + 1 - len(self.trials))
        if budget.tokens or budget.flops:
            known = [self.spent(trial) for trial in self.trials[: self.told * self.size]]
            if budget.tokens and sum(part.tokens for part in known) >= budget.tokens:
                return 0
            if budget.flops and sum(part.flops for part in known) >= budget.flops:
                return 0
        if budget.minutes and time.monotonic() - self.began >= 60 * budget.minutes:
            return 0
        return most

    def _trial(self, number: int, values: dict[str, Any]) -> Trial:
        try:
            made = self._make(values)
        except ConfigError as e:
            return Trial(number, values, state="failed", why=str(e))
        trial = Trial(number, values, made.cfg.run_id, made.stops)
        self._made[number] = made
        self.owners.setdefault(trial.run, number)
        return trial

    def _make(self, values: dict[str, Any]) -> Made:
        cfg = resolved(self.base, values, self.train_tokens)
        plan, asks = Plan(cfg, self.train_tokens), self.study.rungs
        evals = sorted(plan.eval_steps)
        rungs = [
            next(step for step in evals if step >= share * plan.steps) for share in (asks.at if asks else ())
        ]
        stops = (*dict.fromkeys(step for step in rungs if step < plan.steps), plan.steps)
        branches = {}
        if asks and asks.score == "branch":
            branches = {rung: branch.of(cfg, plan, step, asks.branch) for rung, step in enumerate(stops[:-1])}
        return Made(cfg, stops, branches)

    def made(self, trial: Trial) -> Made:
        return self._made.get(trial.number) or self._make(trial.values)

    # -- what is trained

    def run(self) -> None:
        """To the end of the budget. A KeyboardInterrupt leaves everything as it can be gone on with."""
        from sweeps.record import Record

        waiting: dict[Future[Outcome], tuple[Trial, int]] = {}
        record = Record(self.study, self.folder, self.note)
        if (asked := self.left()) < record.written:
            raise UsageError(
                f"{self.folder} has {record.written} trials, the budget has {asked}; it may only grow: write at least these"
            )
        with ThreadPoolExecutor(self.engine.workers) as pool:
            try:
                while True:
                    while self.ask():
                        pass
                    for trial, rung in self._ready():
                        trial.state = "running"
                        waiting[pool.submit(self._train, self._runs(trial, rung))] = (trial, rung)
                    record.write(self.trials, self.spent)
                    for number in [n for n in self._made if n < record.written and self.trials[n].over]:
                        del self._made[number]
                    self.tick()
                    if not waiting:
                        break
                    for future in wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done:
                        trial, rung = waiting.pop(future)
                        self._hear(trial, rung, future.result())
                    self._decide()
            except BaseException:
                self.engine.close()
                raise

    def _open(self) -> range:
        """The generations with trials that are not over. Only they are looked through: studies have thousands of trials."""
        count = -(-len(self.trials) // self.size)
        while self.first < count and all(trial.over for trial in self.generation(self.first)):
            self.first += 1
        return range(self.first, count)

    def _ready(self) -> Iterator[tuple[Trial, int]]:
        for trial in (trial for g in self._open() for trial in self.generation(g)):
            if trial.state == "waiting":
                yield trial, trial.rung + 1

    def _runs(self, trial: Trial, rung: int) -> list[tuple[TrainConfig, int]]:
        """The trial up to its rung, and the branch that scores it there."""
        made = self.made(trial)
        until = trial.stops[rung] if rung + 1 < len(trial.stops) else 0
        found = [(made.cfg, until)]
        if mine := made.branches.get(rung):
            self.owners.setdefault(
                mine.run_id, trial.number
            )  # trials that differ in their fall alone may have it in common
            found.append((mine, 0))
        return found

    def _train(self, runs: list[tuple[TrainConfig, int]]) -> Outcome:
        for cfg, until in runs:
            outcome = self.train(cfg, until)
            if not outcome.ok:
                break
        return outcome

    def train(self, cfg: TrainConfig, until: int = 0) -> Outcome:
        """Up to a step, or to the end. What its folder has already needs no worker, who would take a second to say so."""
        run = self.run_dir(cfg)
        status = run.status()
        stopped = status.get("state") == "interrupted" and 0 < until <= status.get("step", 0)
        if stopped or (status.get("state") == "done" and run.summary() is not None):
            check_same_config(run, cfg)
            return Outcome(True)
        sets = tuple(sets_of(self.study, cfg))
        return self.engine.train(
            Task(self.study.preset, sets, self.runs, self.store, until, self.study.threads)
        )

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def store(self) -> Path:
        return self.folder / "runs" / ".store"

    def run_dir(self, cfg: TrainConfig) -> RunDir:
        path = self.runs / cfg.run_id
        return RunDir(path, f"restore it, or remove {path} and start the same command again")

    def _hear(self, trial: Trial, rung: int, outcome: Outcome) -> None:
        if not outcome.ok:
            trial.state, trial.why = "diverged" if outcome.diverged else "failed", outcome.why
            self.note(f"trial {trial.number} {trial.state}: {outcome.why}")
            return
        trial.scores[rung] = self.score(trial, trial.stops[rung])
        if mine := self.made(trial).branches.get(rung):
            trial.raw[rung], trial.scores[rung] = trial.scores[rung], self.scored(mine, mine.max_steps)
        if rung + 1 == len(trial.stops):
            trial.state = "done"
        else:
            trial.state = "held"  # until its generation is there

    def score(self, trial: Trial, step: int) -> float:
        return self.scored(self.made(trial).cfg, step)

    def scored(self, cfg: TrainConfig, step: int) -> float:
        run = self.run_dir(cfg)
        split, name = self.study.objective.split("/")
        found = [
            row[name]
            for row in run.rows()
            if row["event"] == "eval" and row["split"] == split and row["step"] == step
        ]
        if not found:
            raise RunError(
                f"{run.path} has no score of {split} at step {step}; its metrics.jsonl was changed: remove the run, start again"
            )
        return float(found[-1])

    def _decide(self) -> None:
        """Generations of which all have come to a rung: the best go on, the others end there. Ties go to the lower number."""
        for g in self._open():
            group = [t for t in self.generation(g) if not t.over]
            held = [t for t in group if t.state == "held"]
            if not held or len(held) < len(group):
                continue
            rung = min(t.rung for t in held)
            here = sorted((t for t in held if t.rung == rung), key=lambda t: (t.scores[rung], t.number))
            assert self.study.rungs is not None
            keep = max(1, round(self.study.rungs.keep * len(here)))
            for place, trial in enumerate(here):
                goes_on = place < keep or trial.number == 0  # the base is what all are held against
                trial.state = "waiting" if goes_on else "pruned"
                trial.why = "" if goes_on else f"place {place + 1} of {len(here)} at step {trial.stops[rung]}"

    # -- what came out

    def spent(self, trial: Trial) -> Ledger:
        """A trial that was not taken to its end is wasted whole, whatever it taught the sampler; one that was there before cost nothing."""
        if trial.number in self._spent:
            return self._spent[trial.number]
        found = Ledger()
        if not trial.run:
            return found
        made = self.made(trial)
        begun = [
            mine
            for rung, mine in made.branches.items()
            if rung in trial.scores or self.owners.get(mine.run_id) == trial.number
        ]
        for cfg in [made.cfg, *begun]:  # one that diverged scored nothing, and cost what it cost
            part = spent(self.run_dir(cfg), cfg)
            if self.owners[cfg.run_id] != trial.number:
                steps = min(part.asked - part.wasted, trial.stops[trial.rung] if trial.scores else 0)
                part = Ledger(asked=steps, reused=steps)
            elif trial.state in ("pruned", "diverged", "failed"):
                part = replace(part, wasted=part.trained)
            found = total([found, part if cfg is made.cfg else replace(part, branch=part.trained)])
        if trial.over:
            self._spent[trial.number] = found
        return found

    def best(self, count: int = 1) -> list[Trial]:
        """Each run once: a sampler may have come to the same values twice."""
        done = [
            trial for trial in self.trials if trial.state == "done" and self.owners[trial.run] == trial.number
        ]
        return sorted(done, key=lambda t: (t.scores[t.rung], t.number))[:count]


def sets_of(study: Study, cfg: TrainConfig) -> list[str]:
    """What --set must say for this config, on top of the study's preset."""
    plain = load(study.preset)[0]
    found = []
    for name in TrainConfig.model_fields:
        value = getattr(cfg, name)
        if name == "preset" or value == getattr(plain, name):
            continue
        if name == "growth":
            found.append(f"growth={json.dumps(value.data())}")
        elif value is None:
            found.append(f"{name}=none")
        else:
            found.append(f"{name}={json.dumps(value) if not isinstance(value, str) else value}")
    return found
