"""mainrun.plan.recipes"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mainrun.config import TrainConfig, _build
from mainrun.errors import ConfigError, nearest
from mainrun.files import inputs

PRESETS = Path(__file__).parents[1] / "presets"


# -- presets and --set


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.toml"))


def load(preset: str, sets: Iterable[str] = ()) -> list[TrainConfig]:
    """The configs of a preset: one, or one a step where the file is a ladder (`[[steps]]`); `--set` goes on top of all.

    preset: a built-in name, a TOML file, or either with `:step` for one step of a ladder.
    """
    overrides = dict(parse_set(s) for s in sets)
    if "preset" in overrides:
        raise ConfigError(
            f"--set preset={overrides['preset']}: a preset is chosen by --preset, and its name is its file's"
        )
    return [_build(fields | overrides, label) for label, fields in _expand(preset)]


def _expand(preset: str, above: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(label, fields) of a preset, bases resolved."""
    path, step = _find(preset)
    if preset in above:
        raise ConfigError(
            f"preset {preset!r} is its own base ({' -> '.join((*above, preset))}); remove one of the base keys"
        )
    try:
        text = inputs.read_text(path)
    except inputs.BadInput as e:
        raise ConfigError(f"preset file {path} {e}") from None
    try:
        data = inputs.parse_toml(text)
    except inputs.BadInput as e:
        raise ConfigError(f"preset file {path} is not valid TOML: {e}") from None

    def base_of(table: dict[str, Any]) -> dict[str, Any]:
        base = table.pop("base", None)
        if base is None:
            return {}
        found = _expand(str(base), (*above, preset))
        if len(found) != 1:
            raise ConfigError(
                f"base = {base!r} in {path.name} is a ladder; name one step, like {base}:{found[0][0].split(':')[-1]}"
            )
        return found[0][1]

    data.pop("about", None)
    _named(path.stem, f"preset file {path}")
    steps, scale = data.pop("steps", None), data.pop("scale", {})
    if not isinstance(scale, dict):
        raise ConfigError(
            f"scale = {scale!r} in {path.name} is not a table; write [scale] and a field = value in each line below it"
        )
    if steps is not None and not (
        isinstance(steps, list) and steps and all(isinstance(entry, dict) for entry in steps)
    ):
        raise ConfigError(
            f"steps = {steps!r} in {path.name} is not a list of tables; write [[steps]] before the fields of each step"
        )
    for table in (data, scale, *(steps or ())):
        if "preset" in table:
            raise ConfigError(
                f"preset = {table['preset']!r} in {path.name} sets nothing: a preset's name is its file's; remove it"
            )
    fields = base_of(data) | data
    if steps is None:
        if step:
            raise ConfigError(
                f"preset {path.stem!r} has no steps, got {preset!r}; write --preset {preset.removesuffix(':' + step)}"
            )
        return [(path.stem, fields | scale)]
    ladder = []
    for i, entry in enumerate(steps):
        entry = dict(entry)
        name = _named(str(entry.pop("name", i)), f"step {i + 1} of {path.name}")
        entry.pop("about", None)
        fields = (base_of(entry) if "base" in entry else fields) | entry
        ladder.append((f"{path.stem}:{name}", fields | scale))
    labels = [label for label, _ in ladder]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(
            f"two steps of {path.name} are called {twice.split(':', 1)[1]!r}; give each a name of its own"
        )
    if not step:
        return ladder
    for label, found in ladder:
        if label.split(":", 1)[1] == step:
            return [(label, found)]
    names = [label.split(":", 1)[1] for label, _ in ladder]
    raise ConfigError(
        f"preset {path.stem!r} has no step {step!r}{nearest(step, names)}; its steps: {', '.join(names)}"
    )


def _named(name: str, what: str) -> str:
    """Names become part of a run's folder, so they hold nothing that leads elsewhere."""
    if not re.fullmatch(r"\w[\w .+-]{0,79}", name):
        raise ConfigError(
            f"{what} is called {name!r}; write at most 80 letters, digits and . + - _ or blanks, a letter or digit first"
        )
    return name


def _find(preset: str) -> tuple[Path, str]:
    """The file and the step that a preset's name means."""
    name, colon, step = preset.partition(":")
    if colon and preset.endswith(":"):
        raise ConfigError(
            f"preset {preset!r} names no step; write {preset[:-1]}:STEP, or {preset[:-1]} for all of it"
        )
    if name in preset_names():
        return PRESETS / f"{name}.toml", step
    for text, part in ((preset, ""), (preset.rpartition(":")[0], preset.rpartition(":")[2])):
        if text.endswith(".toml"):
            why = inputs.not_a_file(Path(text))
            if why:
                got = inputs.shortened(text, 120)
                raise ConfigError(
                    f"preset file {got} {why}; give a TOML file or one of: {', '.join(preset_names())}"
                )
            return Path(text), part
    known = preset_names()
    got = inputs.shown(preset, 80)
    raise ConfigError(
        f"unknown preset {got}{nearest(name, known)}; allowed: {', '.join(known)}, or a file ending in .toml"
    )


def parse_set(text: str) -> tuple[str, Any]:
    """`key=value`, the value a TOML literal, or else a plain string; `none` unsets."""
    key, eq, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not eq or not key:
        raise ConfigError(f"--set got {inputs.shown(text)}; write key=value, like --set lr=0.01")
    if raw.lower() == "none":
        return key, None
    try:
        return key, inputs.toml_value(raw)
    except inputs.BadInput as e:
        got = inputs.shortened(f"{key}={raw}", 120)
        raise ConfigError(f"--set {got} cannot be used: {e}") from None
