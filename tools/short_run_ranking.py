"""Measure how well short runs, raw losses and late changes predict the final scores of recipes.

    python tools/short_run_ranking.py [OUT]

The recipes come from a scrambled Sobol sequence. Each recipe is trained to the end and as short runs, which
have a learning rate decay of their own. All runs share their steps in a store below OUT (default:
runs/ranking), and a repeated command continues where the last one stopped. The tables are in Markdown.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc, spearmanr

from mainrun.config import TrainConfig
from mainrun.data.corpus import load_corpus
from mainrun.data.token_cache import prepare
from mainrun.plan.plan import Plan
from mainrun.plan.recipes import load
from mainrun.run.session import train
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir
from mainrun.ui.store_cli import open_store
from sweeps.search_bench.tables import WITHOUT_GATES
from sweeps.short_run import short_run
from sweeps.space import with_values

BASE: dict[str, Any] = WITHOUT_GATES | {
    "n_layer": 2,
    "d_model": 64,
    "batch_size": 8,
    "num_titles": 1700,
    "epochs": 7,
    "dev_frac": 0.1,
    "eval_per_epoch": 4,
    "seed": 1,
}
SPACE: dict[str, list[Any]] = {
    "lr": [float(f"{value:.4g}") for value in np.geomspace(1e-3, 4e-2, 6)],
    "weight_decay": [0.02, 0.1, 0.5],
    "dropout": [0.0, 0.1, 0.25],
    "batch_size": [4, 8, 16],
    "decay_frac": [0.2, 0.4, 0.6, 0.8],
}
HORIZONS = [1 / 8, 1 / 4, 1 / 2]
RECIPES = 32
REPEATED = 8  # the recipes that are also trained with the other seeds
SEEDS = [2, 3, 4, 5]
LATE = 16  # the recipes that are also tried as late changes of the base
LATE_AT = [1 / 2, 3 / 4]  # the shares of the base's tokens after which they change
LATE_OPS = ("lr", "weight_decay", "dropout", "batch_size")

Values = dict[str, Any]
Score = Callable[[TrainConfig], float]


def recipes(count: int) -> list[Values]:
    """Return recipes of the space from a scrambled Sobol sequence."""
    points = qmc.Sobol(len(SPACE), scramble=True, seed=0).random(count)
    return [
        {
            name: choices[int(x * len(choices))]
            for x, (name, choices) in zip(point, SPACE.items(), strict=True)
        }
        for point in points
    ]


class Lab:
    """Train runs and read their scores on dev. Finished runs are read from disk."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.store: Store = open_store(None, out)
        self.base = load("demo:optimized", [f"{key}={value}" for key, value in BASE.items()])[0]
        data = prepare(self.base, load_corpus(self.base))
        self.train_tokens = len(data.splits["train"])

    def plan(self, cfg: TrainConfig) -> Plan:
        return Plan(cfg, self.train_tokens)

    def rows(self, cfg: TrainConfig) -> list[tuple[int, float]]:
        """Train a run, and return its steps and scores on dev."""
        run = RunDir(self.out / cfg.run_id)
        if not run.summary():
            train(cfg, self.out, store=self.store, keep=self.forks(cfg))
            print(".", end="", file=sys.stderr, flush=True)
        return [
            (row["step"], row["full"])
            for row in run.rows()
            if row["event"] == "eval" and row["split"] == "dev"
        ]

    def forks(self, cfg: TrainConfig) -> list[int]:
        """Return the steps after which short runs of the same trunk begin to decay."""
        plan = self.plan(cfg)
        steps = set()
        if not cfg.growth.ops:
            steps = {self.plan(short_run(cfg, plan, horizon)).decay_start for horizon in HORIZONS}
        if not cfg.max_steps:
            steps.update(int(share * plan.steps) for share in LATE_AT)
        return sorted(step for step in steps if 0 < step < plan.steps)

    def final(self, cfg: TrainConfig) -> float:
        return self.rows(cfg)[-1][1]

    def short(self, cfg: TrainConfig, horizon: float) -> float:
        return self.final(short_run(cfg, self.plan(cfg), horizon))

    def raw(self, cfg: TrainConfig, horizon: float) -> float:
        """Return the score of the whole run at the first evaluation at or after a horizon."""
        steps = self.plan(cfg).steps
        return next(score for step, score in self.rows(cfg) if step >= horizon * steps)

    def late(self, values: Values, share: float) -> TrainConfig:
        """Return the base with the values of a recipe from a share of its tokens on."""
        ops = [
            {"name": f"set_{name}", "value": values[name], "trigger": {"budget_frac": share}}
            for name in LATE_OPS
            if values[name] != getattr(self.base, name)
        ]
        changes: Values = {"decay_frac": min(values["decay_frac"], 1 - share)}
        return with_values(self.base, changes | {"growth": {"version": 2, "ops": ops}})


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) + " |")


def ranking(early: Sequence[float], final: Sequence[float], sigma: float) -> list[float]:
    """Return Spearman's correlation, that of the better half, and how much the best early recipe loses."""
    early_scores, final_scores = np.array(early), np.array(final)
    half = final_scores.argsort()[: len(final) // 2]
    everywhere = spearmanr(early_scores, final_scores).statistic
    better = spearmanr(early_scores[half], final_scores[half]).statistic
    lost = (final_scores[early_scores.argmin()] - final_scores.min()) / sigma
    return [float(everywhere), float(better), float(lost)]


@dataclass(frozen=True)
class Results:
    """The recipes, their final scores, and the scores of some recipes over seeds."""

    lab: Lab
    recipes: list[Values]
    configs: list[TrainConfig]
    final: list[float]
    repeated: list[int]  # the places of the recipes that are trained with several seeds

    def early(self, score: Score) -> list[float]:
        return [score(cfg) for cfg in self.configs]

    def over_seeds(self, score: Score) -> np.ndarray:
        """Return the scores of the repeated recipes, one row per recipe and one column per seed."""
        seeds = [BASE["seed"], *SEEDS]
        rows = []
        for place in self.repeated:
            rows.append([score(with_values(self.configs[place], {"seed": seed})) for seed in seeds])
        return np.array(rows)

    def differing(self, a: int, b: int) -> int:
        """Return the number of fields in which two repeated recipes differ."""
        first, second = (self.recipes[self.repeated[i]] for i in (a, b))
        return sum(first[name] != second[name] for name in SPACE)


def measure(lab: Lab) -> Results:
    chosen = recipes(RECIPES)
    configs = [with_values(lab.base, values) for values in chosen]
    final = [lab.final(cfg) for cfg in configs]
    repeated = [int(place) for place in np.argsort(final)[:: RECIPES // REPEATED]]
    return Results(lab, chosen, configs, final, repeated)


def print_rankings(results: Results, sigma: float) -> None:
    lab = results.lab
    rows = []
    for horizon in HORIZONS:
        raw = results.early(partial(lab.raw, horizon=horizon))
        short = results.early(partial(lab.short, horizon=horizon))
        rows.append([fraction(horizon), "raw", *ranking(raw, results.final, sigma)])
        rows.append([fraction(horizon), "short run", *ranking(short, results.final, sigma)])
    table(["horizon", "score", "Spearman, all", "better half", "sigma lost"], rows)


def print_spreads(results: Results, finals: np.ndarray) -> None:
    """Print how much less the paired differences between two recipes vary than unpaired ones."""
    by_horizon = {1.0: finals}
    for horizon in HORIZONS:
        by_horizon[horizon] = results.over_seeds(partial(results.lab.short, horizon=horizon))
    rows = []
    for horizon, scores in by_horizon.items():
        unpaired = math.sqrt(2 * statistics.mean(scores.var(axis=1, ddof=1)))
        spreads: dict[int, list[float]] = {}
        for a, b in combinations(range(REPEATED), 2):
            paired = (scores[a] - scores[b]).std(ddof=1)
            spreads.setdefault(results.differing(a, b), []).append(float(paired))
        for count, values in sorted(spreads.items()):
            cells = [f"{statistics.mean(values):.4f}", f"{unpaired:.4f}"]
            rows.append([fraction(horizon), count, len(values), *cells])
    table(["horizon", "fields that differ", "pairs", "std paired", "std unpaired"], rows)


def print_late_changes(results: Results, sigma: float) -> None:
    lab = results.lab
    final = results.final[:LATE]
    rows = []
    for share in LATE_AT:
        late = [lab.final(lab.late(values, share)) for values in results.recipes[:LATE]]
        short = [lab.short(cfg, 1 - share) for cfg in results.configs[:LATE]]
        rows.append([f"late changes for {fraction(1 - share)}", *ranking(late, final, sigma)])
        rows.append([f"short runs of {fraction(1 - share)}", *ranking(short, final, sigma)])
    table([f"{LATE} recipes", "Spearman, all", "better half", "sigma lost"], rows)


def fraction(horizon: float) -> str:
    return "1" if horizon == 1 else f"1/{round(1 / horizon)}"


def main(out: Path) -> None:
    lab = Lab(out)
    results = measure(lab)
    finals = results.over_seeds(lab.final)
    sigma = math.sqrt(statistics.mean(finals.var(axis=1, ddof=1)))
    print(f"{lab.plan(lab.base).steps} steps of the base; sigma of the final score over seeds: {sigma:.4f}")
    best, median = min(results.final), statistics.median(results.final)
    print(f"base {lab.final(lab.base):.4f}; best recipe {best:.4f}; median {median:.4f}")
    print_rankings(results, sigma)
    print_spreads(results, finals)
    print_late_changes(results, sigma)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ranking"))
