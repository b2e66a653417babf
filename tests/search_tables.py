"""Helpers for testing the bench of searches: tables with computed scores, and a tiny definition.

The fields of both definitions have no alphabetical order, and their batch sizes give different numbers of
steps, so a test fails if a table exchanges recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from searching import FIELDS

from mainrun.plan.plan import Plan
from sweeps.frugal import recipe_key
from sweeps.search_bench.tables import FINALISTS, Definition, Lattice, Row, Table, header_of

Score = Callable[[dict[str, Any], float, int], float | None]  # of a recipe, a horizon and a seed

NOISE = 0.004
TRAIN_TOKENS = 33_900  # of the synthetic tables

SYNTHETIC = Definition(
    name="A",
    preset="demo:optimized",
    settings={"n_layer": 2, "d_model": 64, "batch_size": 8, "num_titles": 1700, "epochs": 7, "dev_frac": 0.1}
    | {"lr": 0.01913, "dropout": 0.1, "decay_frac": 0.4},
    trunk={
        "lr": [0.001, 0.002091, 0.004373, 0.009146, 0.01913, 0.04],
        "dropout": [0.0, 0.1, 0.25],
        "batch_size": [8, 2],
    },
    decay={"decay_frac": [0.2, 0.4, 0.6, 0.8]},
)

# A definition whose runs train in a fraction of a second
TINY_TABLE = Definition(
    name="tiny",
    preset="baseline",
    settings=FIELDS
    | {"corpus": "synthetic", "num_titles": 60, "threads": 1, "schedule": "wsd", "warmup_frac": 0.1}
    | {"lr": 0.01, "decay_frac": 0.5, "eval_interval": 0},
    trunk={"lr": [0.01, 0.03]},
    decay={"decay_frac": [0.25, 0.5]},
    horizons=(0.5, 1.0),
    fresh_seeds=(11, 12),
    points=4,
)


def truth(values: dict[str, Any], horizon: float) -> float:
    """Return the expected score. The best learning rate falls as the horizon grows."""
    p = math.log2(horizon)
    loss = 1.7 - 0.1 * p + 0.02 * (math.log(values["lr"] / 0.009) + 0.25 * p) ** 2
    loss += 0.01 * math.log(values["batch_size"] / 8) ** 2
    return loss + 0.8 * (values["dropout"] - 0.12) ** 2 + 0.1 * (values["decay_frac"] - 0.65) ** 2


def noisy(values: dict[str, Any], horizon: float, seed: int) -> float | None:
    """Return a score with noise. Recipes with the largest learning rate diverge without dropout."""
    if values["lr"] == 0.04 and values["dropout"] == 0:
        return None
    rng = np.random.default_rng([seed, int(recipe_key(values)[:8], 16), int(1000 * horizon)])
    return truth(values, horizon) + NOISE * float(rng.normal())


def synthetic_table(
    definition: Definition = SYNTHETIC, score: Score = noisy, train_tokens: int = TRAIN_TOKENS
) -> Table:
    """Return a table that looks like a recorded one. Raw scores are 0.05 worse than finished ones."""
    header = header_of(definition, train_tokens=train_tokens)
    rows = list(_rows(Lattice(definition, train_tokens), score))
    table = Table(header, rows)
    for place in table.best(FINALISTS):
        values = table.recipes[place]
        last = table.points(values)[-1]
        for seed in definition.fresh_seeds:
            rows.append(Row(seed, *table.trunk_and_decay(values), 1.0, last, score(values, 1.0, seed)))
    return Table(header, rows)


def _rows(lattice: Lattice, score: Score) -> Iterator[Row]:
    for values in lattice.recipes:
        trunk, decay = lattice.trunk_and_decay(values)
        steps = lattice.points(values)
        shared = lattice.decay_point(values)
        for seed in lattice.definition.seeds:
            diverged = score(values, 1.0, seed) is None
            raw = [None if diverged else 0.05 + truth(values, step / steps[-1]) for step in steps]
            if decay == 0:
                for i in range(shared):
                    yield Row(seed, trunk, None, None, steps[i], raw[i])
            elif shared > lattice.decay_point(values | lattice.decays[0]):
                raise ValueError("the first decay must have the longest trunk")
            for i in range(shared, len(steps) - 1):
                yield Row(seed, trunk, decay, 1.0, steps[i], raw[i])
            for horizon in lattice.definition.horizons:
                last = Plan(lattice.run_config(values, horizon), lattice.train_tokens).steps
                yield Row(seed, trunk, decay, horizon, last, score(values, horizon, seed))
