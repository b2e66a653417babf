"""Read presets and `--set` options, which define a config on the command line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError, nearest
from mainrun.files import inputs

PRESETS = Path(__file__).parents[1] / "presets"


class Step(NamedTuple):
    """A step of a preset: the fields of one config."""

    label: str  # name of the preset, followed by `:STEP` if the preset is a ladder
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        return self.label.partition(":")[2]


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load(preset: str, sets: Iterable[str] = (), **fields: Any) -> list[TrainConfig]:
    """Return the configs of a preset. A preset with `[[steps]]` is a ladder and has one config per step.

    preset: a built-in name or a TOML file. The suffix `:STEP` selects one step of a ladder.
    sets: strings such as "lr=0.01", which override fields in every config.
    fields: further fields to override, as Python values.
    """
    overrides = dict(parse_set(text) for text in sets) | fields
    if "preset" in overrides:
        raise ConfigError(
            f"--set preset={overrides['preset']} has no effect, because a preset is named after its file; "
            "choose a preset with --preset"
        )
    return [from_dict(_with_overrides(step, overrides)) for step in _expand(preset)]


def _with_overrides(step: Step, overrides: dict[str, Any]) -> dict[str, Any]:
    fields = step.fields | overrides | {"preset": step.label}
    if str(overrides.get("tokenizer")).startswith("hf:") and "vocab_size" not in overrides:
        fields.pop("vocab_size", None)  # it belongs to the preset's own tokenizer
    return _with_full_paths(fields)


def _with_full_paths(fields: dict[str, Any]) -> dict[str, Any]:
    """Replace relative folders of `start` and `tokenizer`, because a run may be resumed from any folder."""
    for name in ("start", "tokenizer"):
        kind, _, folder = str(fields.get(name)).partition(":")
        if kind in ("hf", "run") and folder and not folder.startswith("~"):
            fields = fields | {name: f"{kind}:{Path(folder).absolute()}"}
    return fields


def parse_set(text: str) -> tuple[str, Any]:
    """Split a string of the form "key=value" and parse the value.

    The value is a TOML literal or a plain string. The value `none` unsets the field.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(f"--set got {inputs.shown(text)}; write key=value, like --set lr=0.01")
    if value.lower() == "none":
        return key, None
    try:
        return key, inputs.toml_value(value)
    except inputs.BadInput as e:
        got = inputs.shortened(f"{key}={value}", 120)
        raise ConfigError(f"--set {got} cannot be used: {e}") from None


# -- preset files


def _expand(preset: str, above: tuple[str, ...] = ()) -> list[Step]:
    """Return the steps of a preset. The fields of base presets are included in each step.

    above: the chain of presets that have this preset as a direct or indirect base.
    """
    if preset in above:
        chain = " -> ".join((*above, preset))
        raise ConfigError(f"preset {preset!r} is its own base ({chain}); remove one of the base keys")
    path, wanted = _find(preset)
    data = _read(path)
    check_name(path.stem, f"preset file {path}")
    above = (*above, preset)

    data.pop("about", None)
    scale = data.pop("scale", {})
    entries = data.pop("steps", None)
    _check_tables(path, data, scale, entries)
    fields = _base(data, path, above) | data
    if entries is None:
        if wanted:
            fixed = preset.removesuffix(f":{wanted}")
            raise ConfigError(f"preset {path.stem!r} has no steps, got {preset!r}; write --preset {fixed}")
        return [Step(path.stem, fields | scale)]

    ladder = []
    for number, entry in enumerate(entries):
        entry = dict(entry)
        name = str(entry.pop("name", number))
        check_name(name, f"step {number + 1} of {path.name}")
        entry.pop("about", None)
        if "base" in entry:
            fields = _base(entry, path, above)
        fields = fields | entry
        ladder.append(Step(f"{path.stem}:{name}", fields | scale))
    return _choose(ladder, wanted, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = inputs.read_text(path)
    except inputs.BadInput as e:
        raise ConfigError(f"preset file {path} {e}") from None
    try:
        return inputs.parse_toml(text)
    except inputs.BadInput as e:
        raise ConfigError(f"preset file {path} is not valid TOML: {e}") from None


def _check_tables(path: Path, data: dict[str, Any], scale: Any, entries: Any) -> None:
    if not isinstance(scale, dict):
        raise ConfigError(
            f"scale = {scale!r} in {path.name} is not a table; "
            "write [scale], and below it lines of the form field = value"
        )
    if entries is not None and not _are_tables(entries):
        raise ConfigError(
            f"steps = {entries!r} in {path.name} is not a list of tables; "
            "write [[steps]] before the fields of each step"
        )
    for table in (data, scale, *(entries or ())):
        if "preset" in table:
            raise ConfigError(
                f"preset = {table['preset']!r} in {path.name} has no effect, "
                "because a preset is named after its file; remove the line"
            )


def _are_tables(entries: Any) -> bool:
    return isinstance(entries, list) and bool(entries) and all(isinstance(entry, dict) for entry in entries)


def _base(table: dict[str, Any], path: Path, above: tuple[str, ...]) -> dict[str, Any]:
    """Remove the key `base` from a table and return the fields of the base preset."""
    base = table.pop("base", None)
    if base is None:
        return {}
    steps = _expand(str(base), above)
    if len(steps) != 1:
        raise ConfigError(
            f"base = {base!r} in {path.name} is a ladder; name one of its steps, like {base}:{steps[0].name}"
        )
    return steps[0].fields


def _choose(ladder: list[Step], wanted: str, path: Path) -> list[Step]:
    """Return the wanted step of a ladder, or all steps if `wanted` is empty."""
    counts = Counter(step.name for step in ladder)
    for name, count in counts.items():
        if count > 1:
            raise ConfigError(f"two steps of {path.name} are called {name!r}; give the steps different names")
    if not wanted:
        return ladder
    for step in ladder:
        if step.name == wanted:
            return [step]
    suggestion = nearest(wanted, counts)
    known = ", ".join(counts)
    raise ConfigError(f"preset {path.stem!r} has no step {wanted!r}{suggestion}; its steps: {known}")


def check_name(name: str, what: str) -> None:
    """Raise ConfigError if a name contains characters that the name of a run directory must not contain."""
    if not re.fullmatch(r"\w[\w .+-]{0,79}", name):
        raise ConfigError(
            f"{what} has the invalid name {name!r}; use at most 80 letters, digits, spaces and . + - _, "
            "and begin with a letter or digit"
        )


def _find(preset: str) -> tuple[Path, str]:
    """Return the file of a preset, and the name of the selected step or an empty string."""
    name, colon, step = preset.partition(":")
    if colon and preset.endswith(":"):
        raise ConfigError(
            f"preset {preset!r} names no step; write {preset[:-1]}:STEP, or {preset[:-1]} for all steps"
        )
    known = preset_names()
    if name in known:
        return PRESETS / f"{name}.toml", step
    path, _, last = preset.rpartition(":")
    if preset.endswith(".toml"):
        return _existing(preset, known), ""
    if path.endswith(".toml"):
        return _existing(path, known), last
    raise ConfigError(
        f"unknown preset {inputs.shown(preset, 80)}{nearest(name, known)}; "
        f"allowed: {', '.join(known)}, or a file ending in .toml"
    )


def _existing(text: str, known: list[str]) -> Path:
    path = Path(text)
    why = inputs.not_a_file(path)
    if why:
        got = inputs.shortened(text, 120)
        raise ConfigError(f"preset file {got} {why}; give a TOML file or one of: {', '.join(known)}")
    return path
