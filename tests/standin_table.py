"""A small synthetic table, which has the interface of sweeps.search_bench.tables.Table."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np

from mainrun.plan.plan import Plan
from sweeps.frugal import recipe_key
from sweeps.space import with_values
from sweeps.study import Study, validate_study

SETTINGS = {
    "n_layer": 2,
    "d_model": 64,
    "batch_size": 8,
    "num_titles": 1700,
    "epochs": 7,
    "dev_frac": 0.1,
    "lr": 0.01913,
    "weight_decay": 0.1,
    "dropout": 0.1,
    "decay_frac": 0.4,
}
CHOICES: dict[str, list[Any]] = {
    "lr": [0.001, 0.002091, 0.004373, 0.009146, 0.01913, 0.04],
    "weight_decay": [0.02, 0.1, 0.5],
    "dropout": [0.0, 0.1, 0.25],
    "batch_size": [4, 8, 16],
    "decay_frac": [0.2, 0.4, 0.6, 0.8],
}
POINTS = 28
NOISE = 0.004


class StandIn:
    """Scores are a quadratic in logarithms, and the best learning rate falls as the horizon grows."""

    train_tokens = 33_900
    base = {name: SETTINGS[name] for name in CHOICES}
    choices = CHOICES
    sigma = NOISE

    def __init__(self, name: str = "A") -> None:
        self.definition = SimpleNamespace(name=name, seeds=(1, 2))
        self.recipes = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]
        base = self.study().base()
        plan = Plan(base, self.train_tokens)
        self.whole = plan.tokens(plan.steps)

    def study(self, **sampler: Any) -> Study:
        data = {
            "name": "table",
            "preset": "demo:optimized",
            "set": SETTINGS,
            "space": {name: {"values": values} for name, values in CHOICES.items()},
            "sampler": {"name": "frugal", **sampler},
            "budget": {"tokens": 1e15},
        }
        return validate_study(data, "table")

    def truth(self, values: dict[str, Any], horizon: float) -> float:
        p = math.log2(horizon)
        lr = math.log(values["lr"] / (values["batch_size"] / 8) ** 0.5)
        loss = 1.7 - 0.1 * p + 0.02 * (lr - math.log(0.009) + 0.25 * p) ** 2
        loss += 0.01 * math.log(values["weight_decay"] * values["lr"] / 0.004) ** 2
        loss += 0.8 * (values["dropout"] - 0.12) ** 2
        return loss + 0.02 * math.log(values["batch_size"] / 6) ** 2 + 0.1 * (values["decay_frac"] - 0.65) ** 2

    def luck(self, values: dict[str, Any], horizon: float, seed: int) -> float:
        rng = np.random.default_rng([seed, int(recipe_key(values)[:8], 16), int(1000 * horizon)])
        return NOISE * float(rng.normal())

    def score(self, values: dict[str, Any], horizon: float, seed: int) -> float | None:
        if values["lr"] == 0.04 and values["batch_size"] == 4:
            return None
        return self.truth(values, horizon) + self.luck(values, horizon, seed)

    def curve(self, values: dict[str, Any], seed: int) -> list[float | None]:
        end = self.score(values, 1.0, seed)
        if end is None:
            return [None] * POINTS
        raw = [self.truth(values, (i + 1) / POINTS) + 0.05 * (1 - i / (POINTS - 1)) for i in range(POINTS - 1)]
        return [*raw, end]

    def decay_point(self, values: dict[str, Any]) -> int:
        return int(POINTS * (1 - values["decay_frac"]))

    def trunk_key(self, values: dict[str, Any]) -> str:
        return recipe_key({name: value for name, value in values.items() if name != "decay_frac"})

    def point_tokens(self, values: dict[str, Any]) -> list[int]:
        plan = Plan(with_values(self.study().base(), values), self.train_tokens)
        return [plan.tokens(round(plan.steps * (i + 1) / POINTS)) for i in range(POINTS)]

    @cached_property
    def _means(self) -> dict[str, float]:
        return {recipe_key(values): self.truth(values, 1.0) for values in self.recipes}

    def mean(self, values: dict[str, Any]) -> float:
        return self._means[recipe_key(values)]

    @cached_property
    def best_known(self) -> float:
        return min(self._means.values())

    @cached_property
    def good(self) -> frozenset[str]:
        limit = self.best_known + self.sigma
        return frozenset(key for key, mean in self._means.items() if mean <= limit)
