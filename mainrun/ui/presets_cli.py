"""`mainrun presets`: list all presets, the fields of one preset, or all fields."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import UsageError
from mainrun.ui import completion
from mainrun.ui.console import Debug, Json, emit, field_value, forward_cost_text, show_table

if TYPE_CHECKING:
    from mainrun.config import TrainConfig

# The symbols that the table shows for the bounds in a JSON schema.
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}

# A listing is a tuple of the --json output, the table header and the table rows.
Listing = tuple[list[dict[str, Any]], list[str], list[list[str]]]


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", autocompletion=completion.presets, help="Show the fields of this preset."
        ),
    ] = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="List all fields with their default, bounds, class and meaning.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a preset file.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the presets, or the fields of one preset."""
    if schema:
        from mainrun.plan.preset_schema import json_schema

        emit(json_schema())
        return
    if name and fields:
        raise UsageError(
            f"got NAME {name!r} and --fields; give one of them: "
            "NAME lists the fields of that preset, --fields lists all fields"
        )
    if fields:
        records, head, lines = _all_fields()
    elif name:
        records, head, lines = _fields_of(name)
    else:
        records, head, lines = _all_presets()
    if as_json:
        emit(records)
    else:
        show_table(head, lines)


def _all_presets() -> Listing:
    from mainrun.plan.recipes import load, preset_names

    records = []
    lines = []
    for preset in preset_names():
        configs = load(preset)
        steps = []
        for cfg in configs:
            _, _, step = cfg.preset.partition(":")
            if step:
                steps.append(step)
        about = _description(preset)
        routing = {} if steps else _routing(configs[0])
        records.append({"preset": preset, "about": about, "steps": steps, **routing})
        lines.append([preset, about, ", ".join(steps), _describe_routing(routing)])
    return records, ["preset", "about", "steps", "routed layers and forward pass"], lines


def _routing(cfg: TrainConfig) -> dict[str, Any]:
    """Return the layers and the cost of a config with routed blocks, or an empty dictionary."""
    from mainrun.plan.cost import forward_cost

    if not cfg.routed_layers:
        return {}
    return {"routing": forward_cost(cfg).table()}


def _describe_routing(record: dict[str, Any]) -> str:
    """Describe the result of `_routing` as text."""
    if "routing" not in record:
        return ""
    return f"{record['routing']['letters']}: {forward_cost_text(record['routing'])}"


def _description(preset: str) -> str:
    import tomllib

    from mainrun.plan.recipes import PRESETS

    return str(tomllib.loads((PRESETS / f"{preset}.toml").read_text(encoding="utf-8")).get("about", ""))


def _fields_of(name: str) -> Listing:
    """List the fields that a preset sets. Each step of a preset is compared with the previous step."""
    from mainrun.config import TrainConfig
    from mainrun.plan.recipes import load

    records = []
    lines = []
    defaults = TrainConfig().model_dump(exclude={"preset"})
    before = defaults
    for cfg in load(name):
        values = cfg.model_dump(exclude={"preset"})
        changes = {key: value for key, value in values.items() if value != before[key]}
        fields = {key: value for key, value in values.items() if value != defaults[key]}
        record = {"preset": cfg.preset, "run": cfg.run_id, "fields": fields, "step": changes}
        records.append(record | _routing(cfg))
        label = cfg.preset
        for key, value in changes.items():
            lines.append([label, key, field_value(value), field_value(before[key])])
            label = ""  # only the first row of each preset shows the preset name
        if cfg.routed_layers:
            lines.append([label, "(forward pass)", _describe_routing(_routing(cfg)), ""])
        before = values
    return records, ["preset", "field", "value", "before" if len(records) > 1 else "default"], lines


def _all_fields() -> Listing:
    from mainrun.config import TrainConfig

    records = []
    lines = []
    for name in TrainConfig.model_fields:
        record = describe_field(name)
        records.append(record)
        default = field_value(record["default"])
        lines.append([name, default, record["allowed"], record["class"], record["about"]])
    return records, ["field", "default", "allowed", "class", "meaning"], lines


@functools.cache
def _schemas() -> dict[str, Any]:
    """Return the JSON schema of each field."""
    from mainrun.config import TrainConfig

    properties: dict[str, Any] = TrainConfig.model_json_schema()["properties"]
    return properties


def describe_field(field: str) -> dict[str, Any]:
    from mainrun.config import TrainConfig

    schema = _schemas()[field]
    return {
        "field": field,
        "default": schema["default"],
        "allowed": _allowed_values(schema),
        "class": TrainConfig.class_of(field),
        "about": schema["description"],
    }


def _allowed_values(schema: dict[str, Any]) -> str:
    """Return the values that a field accepts, such as "number, >= 0, < 1, or none"."""
    if "anyOf" in schema:  # the field may be null
        (kind,) = (option for option in schema["anyOf"] if option.get("type") != "null")
        return f"{_allowed_values(kind)}, or none"
    if "$ref" in schema:
        return "a table, or the path of a file"
    if "enum" in schema:
        return " | ".join(schema["enum"])
    names = {"boolean": "true | false", "string": "text"}
    allowed = names.get(schema["type"], schema["type"])
    for bound, sign in BOUNDS.items():
        if bound in schema:
            allowed += f", {sign} {field_value(schema[bound])}"
    return allowed
