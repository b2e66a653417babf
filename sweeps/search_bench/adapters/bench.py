"""The adapters' side of the benchmark: what is searched, and a call that trains a recipe."""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

Values = dict[str, Any]


class Bench:
    """One search. Requests go to stdout and answers come from stdin, as one JSON object per line."""

    def __init__(self) -> None:
        # what a library prints must not get between the requests
        self._requests = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        start = json.loads(sys.stdin.readline())
        self.space: dict[str, list[Any]] = start["space"]
        self.base: Values = start["base"]
        self.seed: int = start["seed"]
        self.points: int = start["points"]  # the number of evaluations of a whole run
        self.epoch: int = start["epoch"]  # the number of evaluations of the first epoch
        self.budget: float = start["budget"]  # in whole runs
        self._worst = [0.0] * self.points  # the worst score of each point
        random.seed(self.seed)

    def train(self, values: Values, to: int, restart: bool = False) -> list[float]:
        """Train a recipe up to a point, and return the scores of its points.

        A point after a divergence gets the worst score that this search has seen at this point.
        restart: the library starts the run again instead of continuing it.
        """
        request: dict[str, Any] = {"train": values, "to": to}
        if restart:
            request["restart"] = True
        print(json.dumps(request), file=self._requests, flush=True)
        answer = json.loads(sys.stdin.readline() or '{"stop": true}')
        if "stop" in answer:
            os._exit(0)  # no library can catch this and go on
        scores: list[float] = []
        for point, score in enumerate(answer["scores"]):
            if score is None:
                score = max([self._worst[point], *scores[-1:]])
            self._worst[point] = max(self._worst[point], score)
            scores.append(score)
        return scores

    def indices(self, values: Values) -> dict[str, int]:
        """Return the position of each value among the ordered values of its parameter."""
        return {name: self.space[name].index(value) for name, value in values.items()}

    def at(self, indices: dict[str, Any]) -> Values:
        return {name: self.space[name][int(index)] for name, index in indices.items()}
