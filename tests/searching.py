"""Helpers for testing `sweeps`: small studies, and an engine that writes run files without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conftest import TINY

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan
from mainrun.plan.recipes import load
from mainrun.store.rundir import RunDir
from sweeps.driver import Search
from sweeps.engine.protocol import Outcome, Task
from sweeps.study import Study, validate_study
from sweeps.trial import Trial

STEPS = 10  # steps per run
TRAIN_TOKENS = STEPS * TINY["batch_size"] * TINY["block_size"] + 1
FIELDS: dict[str, Any] = {key: value for key, value in TINY.items() if key != "threads"} | {
    "num_titles": 20,
    "n_layer": 1,
    "optimizer": "adamw",
    "dev_frac": 0.1,
    "eval_interval": 2,
}
SPACE: dict[str, Any] = {"lr": {"low": 1e-3, "high": 0.1, "log": True}}

ScoreFunction = Callable[[TrainConfig, int], float]  # returns the score of a run at a step


def make_study(fields: Mapping[str, Any] | None = None, **keys: Any) -> Study:
    data: dict[str, Any] = {"name": "tiny", "preset": "baseline", "space": SPACE, "budget": {"trials": 6}}
    data |= {"sampler": {"name": "random", "generation": 3}, "set": FIELDS | dict(fields or {})}
    return validate_study(data | keys, "tiny")


def make_search(folder: Path, study: Study, engine: Any) -> Search:
    """Create a search. It starts no trainer, because tokens.json already contains the number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").write_text(json.dumps({"train_tokens": TRAIN_TOKENS}))
    return Search(study, folder, engine, lambda text: None, lambda: None)


def no_score(cfg: TrainConfig, step: int) -> float:
    return -1.0


class Trainer:
    """An engine that writes the files of a run up to the requested step without training."""

    def __init__(self, score: ScoreFunction, workers: int = 1) -> None:
        self.score = score
        self.workers = workers
        self.tasks: list[Task] = []
        self.trained: list[TrainConfig] = []
        self.diverging: Callable[[TrainConfig], bool] = lambda cfg: False
        self.failing: Callable[[TrainConfig], bool] = lambda cfg: False
        self.failure = Outcome(False, reason="no such corpus")
        self.reused = 0  # mark this many initial steps of each run as reused
        self.val: ScoreFunction = no_score
        self.closed = False

    def train(self, task: Task) -> Outcome:
        cfg = load(task.preset, list(task.sets))[0]
        self.tasks.append(task)
        self.trained.append(cfg)
        if self.failing(cfg):
            return self.failure
        diverged = self.diverging(cfg)
        write_run(
            task.out / cfg.run_id,
            cfg,
            task.until or Plan(cfg, TRAIN_TOKENS).steps,
            self.score,
            self.val,
            self.reused,
            done=not task.until and not diverged,
        )
        return Outcome(not diverged, diverged=diverged, reason="the loss is inf" if diverged else "")

    def close(self) -> None:
        self.closed = True


def write_run(
    folder: Path,
    cfg: TrainConfig,
    until: int,
    score: ScoreFunction,
    val: ScoreFunction = no_score,
    reused: int = 0,
    done: bool = True,
) -> RunDir:
    """Write the files of a run up to a step. The first `reused` steps are marked as reused."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    eval_steps = Plan(cfg, TRAIN_TOKENS).eval_steps
    for step in range(1, until + 1):
        rows.append(step_row(step, reused=step <= reused))
        if step in eval_steps:
            rows += [eval_row("dev", step, score(cfg, step)), eval_row("val", step, val(cfg, step))]
    write_rows(folder, rows)
    (folder / "config.json").write_text(json.dumps({"config": cfg.model_dump(), "digest": cfg.digest}))
    status = {"state": "done" if done else "interrupted", "step": until}
    (folder / "status.json").write_text(json.dumps(status))
    if done:
        last = {
            "val": score_of("val", until, val(cfg, until)),
            "dev": score_of("dev", until, score(cfg, until)),
        }
        scores = {split: {"last": row, "best": score_of(split, 1, 0.0)} for split, row in last.items()}
        (folder / "summary.json").write_text(json.dumps({"scores": scores}))
    return RunDir(folder)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_row(
    step: int, tokens: int | None = None, seconds: float = 0.5, reused: bool = False
) -> dict[str, Any]:
    row = {
        "event": "step",
        "step": step,
        "tokens": 128 * step if tokens is None else tokens,
        "seconds": seconds,
        "loss": 5.0,
        "lr": 0.1,
        "grad_norm": 1.0,
    }
    return row | {"reused": True} if reused else row


def eval_row(split: str, step: int, full: float) -> dict[str, Any]:
    return {"event": "eval", "seconds": 0.25} | score_of(split, step, full)


def score_of(split: str, step: int, full: float) -> dict[str, Any]:
    """Return a score whose `official` value is `full` plus 10, so that tests can tell the two apart."""
    return {
        "step": step,
        "split": split,
        "full": full,
        "official": full + 10,
        "loss": 5.0,
        "bits_per_byte": 1.0,
        "coverage": 0.98,
        "tokens": 1000,
    }


class ScriptedSampler:
    """A sampler that returns prepared values and records the calls of the driver."""

    def __init__(
        self, values: Callable[[int], dict[str, Any]] = lambda number: {"lr": 0.01 + 0.001 * number}
    ) -> None:
        self.values = values
        self.calls: list[tuple[Any, ...]] = []

    def ask(self, number: int) -> dict[str, Any]:
        self.calls.append(("ask", number))
        return self.values(number) if number else {}

    def tell(self, number: int, scores: Mapping[int, float], completed: bool) -> None:
        self.calls.append(("tell", number, dict(scores), completed))


class FakeDatabase:
    """A replacement for Optuna's database, which takes a second to create.

    The replacement keeps the finished trials in order.
    """

    def __init__(self, study: Study, folder: Path, note: Callable[[str], None], written: int = 0) -> None:
        self.written = written
        self.rows: list[tuple[Any, ...]] = []

    def write(self, trials: list[Trial], row_of: Callable[[Trial], dict[str, Any]]) -> None:
        while self.written < len(trials) and trials[self.written].is_finished:
            trial = trials[self.written]
            self.rows.append((trial.number, trial.state, dict(trial.scores), row_of(trial)))
            self.written += 1
