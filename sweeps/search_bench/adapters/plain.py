"""Search at random: `random`, or `top-k COUNT KEEP`.

The second one trains COUNT recipes for an epoch and the best KEEP of them to the end, again and again.
"""

from __future__ import annotations

import itertools
import random
import sys

from bench import Bench, Values


def shuffled(bench: Bench) -> list[Values]:
    """Return all recipes: the base first, the others in random order."""
    rows = itertools.product(*bench.space.values())
    recipes = [dict(zip(bench.space, row, strict=True)) for row in rows]
    recipes.remove(bench.base)
    random.shuffle(recipes)
    return [bench.base, *recipes]


def keep_best(bench: Bench, recipes: list[Values], keep: int) -> None:
    """Train recipes for an epoch, and the best of them to the end."""
    scores = [bench.train(values, bench.epoch)[-1] for values in recipes]
    for index in sorted(range(len(scores)), key=scores.__getitem__)[:keep]:
        bench.train(recipes[index], bench.points)


def main(method: str, *sizes: str) -> None:
    bench = Bench()
    recipes = shuffled(bench)
    if method == "random":
        for values in recipes:
            bench.train(values, bench.points)
        return
    count, keep = map(int, sizes)
    for first in range(0, len(recipes), count):
        keep_best(bench, recipes[first : first + count], keep)


if __name__ == "__main__":
    main(*sys.argv[1:])
