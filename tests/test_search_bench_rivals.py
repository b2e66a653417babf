"""Test how rivals are run: the protocol with their adapters, both bills, the budget, crashes and hangs.

The tests use small adapters of their own. Adapters of libraries are tested only where an environment exists.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sweeps.search_bench.rivals import Rival, search

CHOICES: dict[str, list[Any]] = {
    "lr": [0.001, 0.002, 0.004, 0.008, 0.016, 0.032],
    "weight_decay": [0.02, 0.1, 0.5],
    "dropout": [0.0, 0.1, 0.25],
    "batch_size": [4, 8, 16],
    "decay_frac": [0.2, 0.4, 0.6, 0.8],
}
BASE = {"lr": 0.008, "weight_decay": 0.1, "dropout": 0.1, "batch_size": 8, "decay_frac": 0.4}
BEST = {"lr": 3, "weight_decay": 1, "dropout": 0, "batch_size": 1, "decay_frac": 2}  # positions
POINTS = 28
WHOLE = 2800


@dataclass(frozen=True)
class Definition:
    name: str = "tiny"
    points: int = POINTS


class TinyTable:
    """Stands in for a recorded table: a smooth score with noise. The highest lr with a batch of 4 diverges."""

    definition = Definition()
    choices = CHOICES
    base = BASE
    whole = WHOLE
    train_tokens = WHOLE // 7

    def curve(self, values: dict[str, Any], seed: int) -> list[float | None]:
        position = {name: CHOICES[name].index(value) for name, value in values.items()}
        far = sum((position[name] - BEST[name]) ** 2 / len(CHOICES[name]) for name in CHOICES)
        noise = random.Random(f"{seed} {json.dumps(values, sort_keys=True)}")
        curve: list[float | None] = []
        for point in range(1, POINTS + 1):
            score = 1.5 + 4 / point + 0.05 * far * point / POINTS
            curve.append(score + noise.gauss(0, 0.02) / point**0.5)
        if position["lr"] == 5 and values["batch_size"] == 4:
            curve[10:] = [None] * (POINTS - 10)
        return curve

    def point_tokens(self, values: dict[str, Any]) -> list[int]:
        return [WHOLE * point // POINTS for point in range(1, POINTS + 1)]

    def decay_tokens(self, values: dict[str, Any]) -> int:
        return round(WHOLE * (1 - values["decay_frac"]))

    def trunk_key(self, values: dict[str, Any]) -> str:
        return json.dumps([values[name] for name in CHOICES if name != "decay_frac"])


TABLE: Any = TinyTable()
RECIPES = [dict(zip(CHOICES, row, strict=True)) for row in itertools.product(*CHOICES.values())]
