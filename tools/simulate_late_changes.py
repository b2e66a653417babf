"""Simulate whether late changes save tokens, on synthetic scores.

    python tools/simulate_late_changes.py [SEARCHES] [CORRELATION]

The space and the costs are those of tools/short_run_ranking.py. The final score is a quadratic function of
the coordinates. Short runs and late changes add smooth random functions to it, so that their rank correlation
over the better half of the recipes is as measured there: 0.74 at 1/4, 0.85 at 1/2, and CORRELATION (default:
0.95) for late changes. Nothing is trained. The table shows after how many tokens the recommended recipe is
good, in whole runs, with and without late changes. A recipe is good if it is at most one standard deviation
over seeds above the best recipe.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from sweeps.engine.local import Local
from sweeps.frugal import WHOLE, Asked, Finished, Kind, recipe_key
from sweeps.lanes import FrugalSearch, make_search
from sweeps.search_bench.tables import WITHOUT_GATES
from sweeps.study import validate_study

TRAIN_TOKENS = 33_800  # 462 steps in 7 epochs
SIGMA = 0.0065  # the deviation of final scores over seeds
GAP = 0.06  # the difference between the base and the best recipe
LIMIT = 24.0  # a search ends after the tokens of this many whole runs
CORRELATIONS: dict[Kind, float] = {(0.25, 0.0): 0.74, (0.5, 0.0): 0.85}
SPACE: dict[str, Any] = {
    "lr": {"low": 1e-3, "high": 4e-2, "log": True},
    "weight_decay": {"low": 0.02, "high": 0.5, "log": True},
    "dropout": {"low": 0.0, "high": 0.25},
    "batch_size": {"values": [4, 8, 16]},
    "decay_frac": {"values": [0.2, 0.4, 0.6, 0.8]},
}
FIELDS: dict[str, Any] = WITHOUT_GATES | {
    "n_layer": 2,
    "d_model": 64,
    "batch_size": 8,
    "num_titles": 1700,
    "epochs": 7,
}
FEATURES = 100


def new_search(folder: Path, seed: int, late: float | None) -> FrugalSearch:
    sampler: dict[str, Any] = {"name": "frugal", "seed": seed, "lanes": 1}
    data: dict[str, Any] = {"name": "late", "preset": "demo:optimized", "space": SPACE}
    data |= {"set": FIELDS | {"dev_frac": 0.1}, "budget": {"trials": 1000}}
    study = validate_study(data | {"sampler": sampler | ({"late": late} if late else {})}, "simulation")
    (folder / "tokens.json").write_text(json.dumps({"train_tokens": TRAIN_TOKENS}))
    search = make_search(study, folder, Local(0, 1), lambda text: None, lambda: None)
    assert isinstance(search, FrugalSearch)
    return search


def smooth_function(rng: np.random.Generator, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a random function with the variance 1 and the length scale 0.7."""
    frequencies = rng.normal(0, 1 / 0.7, (FEATURES, size))
    phases = rng.uniform(0, 2 * math.pi, FEATURES)
    weights = rng.normal(0, math.sqrt(2 / FEATURES), FEATURES)
    return lambda z: np.cos(z @ frequencies.T + phases) @ weights


class World:
    """The scores of all runs. The base is the origin, and its late change is the base itself."""

    def __init__(self, search: FrugalSearch, seed: int, late: float) -> None:
        coordinates = search.frugal.coordinates
        self.encode = coordinates.encode
        rng = np.random.default_rng(seed)
        size = coordinates.size
        points = rng.random((256, len(coordinates.axes)))
        self.samples = np.array([self.encode(coordinates.at(point)) for point in points])
        middle, spread = self.samples.mean(0), self.samples.std(0)
        self.best = middle + np.clip(rng.normal(0, 1, size), -1.2, 1.2) * spread
        self.weight = rng.uniform(0.3, 1.2, size)
        self.weight *= GAP / (self.weight * self.best**2).sum()
        self.errors = {kind: smooth_function(rng, size) for kind in (*CORRELATIONS, (1.0, 0.5))}
        self.amplitudes: dict[Kind, float] = {}
        for kind, correlation in (CORRELATIONS | {(1.0, 0.5): late}).items():
            self.amplitudes[kind] = self._amplitude(kind, correlation)

    def final(self, z: np.ndarray) -> np.ndarray:
        """Return the mean score of whole runs, where the best recipe has 0."""
        above = (self.weight * (z - self.best) ** 2).sum(-1)
        return np.asarray(GAP * np.log1p(above / GAP))

    def error(self, kind: Kind, z: np.ndarray) -> np.ndarray:
        error = self.errors[kind]
        return error(z) - error(np.zeros((1, z.shape[1]))) if kind[1] else error(z)

    def _amplitude(self, kind: Kind, correlation: float) -> float:
        """Return the amplitude of the error at which the better half has a rank correlation."""
        final = self.final(self.samples)
        half = final.argsort()[: len(final) // 2]
        error = self.error(kind, self.samples)
        noise = SIGMA * np.random.default_rng(0).normal(size=(2, len(final)))
        low, high = 0.0, 1.0
        for _ in range(30):
            amplitude = (low + high) / 2
            early = final + amplitude * error + noise[0]
            found = spearmanr(early[half], (final + noise[1])[half]).statistic
            low, high = (amplitude, high) if found > correlation else (low, amplitude)
        return low

    def score(self, asked: Asked, seed: int) -> float:
        z = self.encode(asked.values)[None]
        words = [seed, int(recipe_key(asked.values)[:8], 16), int(100 * asked.horizon), int(100 * asked.late)]
        score = self.final(z)[0] + SIGMA * np.random.default_rng(words).normal()
        if asked.kind != WHOLE:
            score += self.amplitudes[asked.kind] * self.error(asked.kind, z)[0]
        return float(1.74 - 0.1 * math.log2(asked.horizon) + score)

    def is_good(self, search: FrugalSearch, finished: list[Finished]) -> bool:
        beliefs = search.frugal.beliefs(finished)
        return bool(beliefs) and float(self.final(self.encode(beliefs[0][1]))) <= SIGMA


def tokens_until_good(seed: int, late: float | None, correlation: float) -> tuple[float, int]:
    """Return the tokens until the recommendation is good, in whole runs, and the number of late changes."""
    with tempfile.TemporaryDirectory() as folder:
        search = new_search(Path(folder), seed, late)
        world = World(search, seed, correlation)
        whole = search.frugal.whole_tokens
        finished: list[Finished] = []
        while search.planned_tokens < LIMIT * whole:
            proposal = search.frugal.ask(len(finished), finished, [], search.new_tokens)
            if proposal is None:
                break
            search._add(proposal)
            finished.append(Finished(proposal.asked, world.score(proposal.asked, seed)))
            is_search = proposal.reason.phase == "search"
            if is_search and world.is_good(search, finished):
                break
        changes = sum(run.asked.late > 0 for run in finished)
        return min(search.planned_tokens / whole, LIMIT), changes


def main(searches: int, correlation: float) -> None:
    plain, late = [], []
    changes = 0
    for seed in range(searches):
        plain.append(tokens_until_good(seed, None, correlation)[0])
        tokens, count = tokens_until_good(seed, 0.5, correlation)
        late.append(tokens)
        changes += count
        text = f"search {seed}: {plain[-1]:.1f} without, {tokens:.1f} with {count}"
        print(text, file=sys.stderr, flush=True)
    print("| runs | searches that reach it | mean tokens | median |\n|---|---|---|---|")
    for name, values in (("without late changes", plain), ("with late changes", late)):
        reached = sum(value < LIMIT for value in values)
        mean, median = statistics.mean(values), statistics.median(values)
        print(f"| {name} | {reached} of {searches} | {mean:.1f} R | {median:.1f} R |")
    rng = np.random.default_rng(0)
    draws = rng.integers(0, searches, (10_000, searches))
    ratios = np.array(late)[draws].sum(1) / np.array(plain)[draws].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    print(f"\nratio of the means {sum(late) / sum(plain):.2f} [{low:.2f}, {high:.2f}]", end="; ")
    print(f"{changes / searches:.1f} late changes a search")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    main(count, float(sys.argv[2]) if len(sys.argv) > 2 else 0.95)
