"""A small synthetic table, whose scores are a smooth function of the recipe with noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mainrun.plan.plan import Plan
from sweeps.frugal import recipe_key
from sweeps.search_bench.tables import Definition, Lattice, Row, Table, header_of

NOISE = 0.004
TRAIN_TOKENS = 33_900
DEFINITION = Definition(
    name="A",
    preset="demo:optimized",
    settings={"n_layer": 2, "d_model": 64, "batch_size": 8, "num_titles": 1700, "epochs": 7, "dev_frac": 0.1}
    | {"lr": 0.01913, "weight_decay": 0.1, "dropout": 0.1, "decay_frac": 0.4},
    trunk={
        "lr": [0.001, 0.002091, 0.004373, 0.009146, 0.01913, 0.04],
        "weight_decay": [0.02, 0.1, 0.5],
        "dropout": [0.0, 0.1, 0.25],
    },
    decay={"decay_frac": [0.2, 0.4, 0.6, 0.8]},
)


def truth(values: dict[str, Any], horizon: float) -> float:
    """Return the expected score. The best learning rate falls as the horizon grows."""
    p = math.log2(horizon)
    loss = 1.7 - 0.1 * p + 0.02 * (math.log(values["lr"] / 0.009) + 0.25 * p) ** 2
    loss += 0.01 * math.log(values["weight_decay"] * values["lr"] / 0.004) ** 2
    return loss + 0.8 * (values["dropout"] - 0.12) ** 2 + 0.1 * (values["decay_frac"] - 0.65) ** 2


def score(values: dict[str, Any], horizon: float, seed: int) -> float | None:
    if values["lr"] == 0.04 and values["dropout"] == 0:
        return None
    rng = np.random.default_rng([seed, int(recipe_key(values)[:8], 16), int(1000 * horizon)])
    return truth(values, horizon) + NOISE * float(rng.normal())


def rows(lattice: Lattice) -> Iterator[Row]:
    definition = lattice.definition
    for place, values in enumerate(lattice.recipes):
        trunk, decay = divmod(place, len(lattice.decays))
        steps = lattice.points(values)
        shared = lattice.decay_point(values)
        for seed in definition.seeds:
            early = [truth(values, step / steps[-1]) + 0.05 for step in steps]
            if score(values, 1.0, seed) is None:
                early = [None] * len(steps)
            if decay == 0:
                yield from (Row(seed, trunk, None, None, steps[i], early[i]) for i in range(shared))
            between = range(shared, len(steps) - 1)
            yield from (Row(seed, trunk, decay, 1.0, steps[i], early[i]) for i in between)
            for horizon in definition.horizons:
                last = Plan(lattice.run_config(values, horizon), lattice.train_tokens).steps
                yield Row(seed, trunk, decay, horizon, last, score(values, horizon, seed))


def synthetic(name: str = "A") -> Table:
    definition = Definition.from_json({**header_of(DEFINITION)["definition"], "name": name})
    header = header_of(definition, train_tokens=TRAIN_TOKENS)
    found = list(rows(Lattice(definition, TRAIN_TOKENS)))
    table = Table(header, found)
    for place in table.best(24):
        values = table.recipes[place]
        trunk, decay = table.trunk_and_decay(values)
        last = table.points(values)[-1]
        for seed in definition.fresh_seeds:
            found.append(Row(seed, trunk, decay, 1.0, last, score(values, 1.0, seed)))
    return Table(header, found)
