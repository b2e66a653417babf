"""Group runs into recipes. Runs of one recipe differ only in their seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from mainrun.config import TrainConfig
from mainrun.files.inputs import printable
from mainrun.ui.console import field_value

Item = TypeVar("Item")
Summary = Mapping[str, Any]  # the content of a summary.json


class RunLike(Protocol):
    """What the functions below need to know about a run."""

    @property
    def cfg(self) -> TrainConfig: ...

    @property
    def summary(self) -> Summary: ...


SomeRun = TypeVar("SomeRun", bound=RunLike)


def recipe_fields(cfg: TrainConfig) -> dict[str, Any]:
    """Return the config fields that define a recipe: all fields that affect training, except the seed."""
    fields = cfg.model_dump()
    return {k: v for k, v in fields.items() if k != "seed" and TrainConfig.class_of(k) != "inert"}


def recipe_key(cfg: TrainConfig) -> str:
    return json.dumps(recipe_fields(cfg), sort_keys=True)


def group_by_recipe(
    items: Iterable[Item], cfg_of: Callable[[Item], TrainConfig]
) -> list[tuple[str, list[Item]]]:
    """Return the name and the items of each recipe, in the order of the items."""
    presets: dict[str, dict[str, list[Item]]] = {}  # maps a preset and a recipe key to items
    for item in items:
        cfg = cfg_of(item)
        recipes = presets.setdefault(cfg.preset, {})
        recipes.setdefault(recipe_key(cfg), []).append(item)
    grouped = []
    for preset, recipes in presets.items():
        differing = _differing_fields([cfg_of(of_recipe[0]) for of_recipe in recipes.values()])
        for key, of_recipe in recipes.items():
            grouped.append((_recipe_name(preset, json.loads(key), differing), of_recipe))
    return grouped


def runs_by_seed(runs: Iterable[SomeRun]) -> dict[int, list[SomeRun]]:
    """Return the runs of each seed of a recipe. Runs of one seed differ only in inert fields."""
    by_seed: dict[int, list[SomeRun]] = {}
    for run in runs:
        by_seed.setdefault(run.cfg.seed, []).append(run)
    return by_seed


def contradictions(
    recipe: str, by_seed: Mapping[int, Sequence[SomeRun]], label_of: Callable[[SomeRun], str]
) -> Iterator[str]:
    """Yield a message for each seed of a recipe whose runs have different results.

    Runs of one seed with the same result count as one run.
    """
    for seed, runs in by_seed.items():
        for run in runs[1:]:
            if not _same_result(runs[0].summary, run.summary):
                yield (
                    f"seed {seed} of {printable(recipe)} has two runs with different results, "
                    f"{label_of(runs[0])} and {label_of(run)}; give only one of them, because each seed "
                    "counts once"
                )
                break


def _same_result(a: Summary, b: Summary) -> bool:
    """Return whether two runs have the same weights, score and failed guards. Old runs lack the weights."""
    if a.get("weights") and b.get("weights") and a["weights"] != b["weights"]:
        return False
    return a["last"]["full"] == b["last"]["full"] and failed_guards(a) == failed_guards(b)


def failed_guards(summary: Summary) -> list[str]:
    return [guard["name"] for guard in summary["guards"] if guard["status"] == "fail"]


def _differing_fields(cfgs: Sequence[TrainConfig]) -> list[str]:
    """Return the names of the recipe fields that do not have the same value in all configs."""
    first, *others = map(recipe_fields, cfgs)
    return [name for name in first if any(fields[name] != first[name] for fields in others)]


def _recipe_name(preset: str, config: Mapping[str, Any], differing: Sequence[str]) -> str:
    """Return a recipe's name, which consists of its preset and the fields in `differing`."""
    words = [preset]
    for name in differing:
        if name != "growth":
            words.append(f"{name}={field_value(config[name])}")
    if "growth" in differing and config["growth"]["ops"]:
        words.append("with growth")
    return " ".join(words)
