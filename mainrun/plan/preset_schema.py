"""The JSON schema of preset files, which editors use to complete and check TOML files.

The file mainrun/schemas/preset.json contains this schema. Renew it with `mainrun presets --schema`.
"""

from __future__ import annotations

from typing import Any

from mainrun.config import TrainConfig
from mainrun.plan.op_files import CONDITIONS, DEFAULT_KEYS, OP_KEYS
from mainrun.plan.ops import NAMES, RELATIVE

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BASE = {"type": "string", "description": "preset, step (NAME:STEP) or TOML file whose fields are the start"}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of preset files."""
    definitions = config_fields()
    fields: dict[str, Any] = {name: {"$ref": f"#/$defs/{name}"} for name in definitions}
    step = {
        "name": {"type": "string", "description": "name of the step, for --preset NAME:STEP"},
        "about": {"type": "string", "description": "what the step changes"},
        "base": BASE,
    }
    scale = _table(fields) | {"description": "fields that replace those of every step"}
    steps = {"type": "array", "minItems": 1, "items": _table(step | fields)}
    steps["description"] = "the steps of a ladder; each one starts from the fields of the step before"
    about = {"type": "string", "description": "what the preset is, in one line"}
    keys = {"about": about, "base": BASE, "scale": scale, "steps": steps}
    return {"$schema": DIALECT, "title": "mainrun preset", **_table(keys | fields), "$defs": definitions}


def config_fields(none: Any = None) -> dict[str, Any]:
    """Return the schema of each config field, as it is written in a TOML file.

    none: a schema that fields without a value may have instead.
    """
    fields = {}
    for name, schema in TrainConfig.model_json_schema()["properties"].items():
        if name != "preset":
            fields[name] = _field(schema, none)
    fields["growth"] = _growth(fields["growth"]["description"])
    return fields


def _field(schema: dict[str, Any], none: Any) -> dict[str, Any]:
    about = {"description": f"{schema['description']} ({schema['class']})"}
    value = {key: schema[key] for key in schema if key not in ("title", "class", "default", "description")}
    if "anyOf" not in value:
        return {**value, **about, "default": schema["default"]}
    (value,) = (option for option in value["anyOf"] if option != {"type": "null"})  # TOML has no null
    return {"anyOf": [value, none], **about} if none else value | about


def _growth(about: str) -> dict[str, Any]:
    """Return the schema of a growth schedule. mainrun itself checks the values of the operations."""
    anything: dict[str, Any] = {}
    trigger = dict.fromkeys((*CONDITIONS, "any"), anything)
    op = dict.fromkeys(OP_KEYS, anything) | {
        "name": {"enum": [*NAMES, *RELATIVE]},
        "trigger": _table(trigger) | {"minProperties": 1, "maxProperties": 1},
    }
    required = {"required": ["name", "trigger"]}
    table = {
        "version": {"const": 2},
        "seed": {"type": "integer", "minimum": 0},
        "defaults": _table(dict.fromkeys(DEFAULT_KEYS, anything)),
        "ops": {"type": "array", "items": _table(op) | required},
    }
    old_format = {"type": "array", "items": {"type": "object"}}
    return {"description": about, "anyOf": [_table(table), old_format, {"type": "string"}]}


def _table(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}
