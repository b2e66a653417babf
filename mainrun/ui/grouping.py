"""Group runs into recipes. Runs of one recipe differ only in their seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mainrun.config import TrainConfig

Item = TypeVar("Item")


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


def _differing_fields(cfgs: Sequence[TrainConfig]) -> list[str]:
    """Return the names of the recipe fields that do not have the same value in all configs."""
    first, *others = map(recipe_fields, cfgs)
    return [name for name in first if any(fields[name] != first[name] for fields in others)]


def _recipe_name(preset: str, config: Mapping[str, Any], differing: Sequence[str]) -> str:
    """Return a recipe's name, which consists of its preset and the fields in `differing`."""
    words = [preset]
    for name in differing:
        value = config[name]
        if isinstance(value, float):
            words.append(f"{name}={value:.6g}")
        elif name != "growth":
            words.append(f"{name}={value}")
    if "growth" in differing and config["growth"]["ops"]:
        words.append("with growth")
    return " ".join(words)
