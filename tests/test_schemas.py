"""Tests the JSON schemas against the built-in presets and studies, and against spoiled files."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.config import TrainConfig
from mainrun.plan import preset_schema, recipes
from mainrun.plan.op_files import OP_KEYS
from sweeps import study
from sweeps.space import NOT_SEARCHABLE

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    "presets": ROOT / "mainrun/schemas/preset.json",
    "studies": ROOT / "sweeps/schemas/study.json",
}
FILES = sorted([*recipes.PRESETS.glob("*.toml"), *study.BUILT_IN.glob("*.toml")])
PRESET = 'base = "optimized"\nlr = 0.1\n'
STUDY = 'preset = "demo:optimized"\n[set]\ndev_frac = 0.1\n[space.lr]\nlow = 1e-3\nhigh = 1e-2\n'


def faults(kind: str, text: str) -> list[str]:
    validator = Draft202012Validator(json.loads(SCHEMAS[kind].read_text()))
    return [error.message for error in validator.iter_errors(tomllib.loads(text))]


@pytest.mark.parametrize(
    ("path", "made", "command"),
    [
        (SCHEMAS["presets"], preset_schema.json_schema, ["presets", "--schema"]),
        (SCHEMAS["studies"], study.json_schema, ["sweep", "run", "demo", "--schema"]),
    ],
    ids=["presets", "studies"],
)
def test_the_published_schema_is_current(path: Path, made: Any, command: list[str]) -> None:
    renew = f"renew it with `mainrun {' '.join(command)} >{path.relative_to(ROOT)}`"
    assert json.loads(path.read_text()) == made(), renew
    Draft202012Validator.check_schema(made())
    assert json.loads(CliRunner().invoke(app, command).stdout) == made()


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_each_built_in_file_names_its_schema_and_fits_it(path: Path) -> None:
    text = path.read_text()
    named = re.match(r"#:schema (\S+)\n", text)
    assert named is not None, "the first line names no schema"
    assert (path.parent / named[1]).resolve() == SCHEMAS[path.parent.name]
    assert faults(path.parent.name, text) == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("presets", PRESET),
        ("presets", PRESET + "weight_decay_aux = 0.1\nfrozen = [0]\n[growth]\nversion = 2\nops = []\n"),
        ("presets", PRESET + 'growth = "growth.toml"\n'),
        ("presets", PRESET + 'growth = [{ name = "change_lr", value = 1 }]\n'),
        ("presets", PRESET + '[scale]\nseed = 1\n[[steps]]\nname = "a"\n'),
        ("studies", STUDY),
        (
            "studies",
            STUDY + '[space."growth.ops.0.init"]\nvalues = ["copy"]\n[space.timescale]\nvalues = [1]\n',
        ),
        ("studies", STUDY.replace("[set]", '[set]\nweight_decay_aux = "none"')),
    ],
)
def test_valid_files_fit(kind: str, text: str) -> None:
    assert faults(kind, text) == []


OP = '{ name = "set_lr", value = 1, trigger = { step = 1 } }'


@pytest.mark.parametrize(
    ("kind", "text", "fault"),
    [
        ("presets", PRESET + "lrr = 0.1", "'lrr' was unexpected"),
        ("presets", PRESET + 'preset = "x"', "'preset' was unexpected"),
        ("presets", PRESET + "dropout = 1.5", "1.5 is greater than or equal to the maximum of 1"),
        ("presets", PRESET + 'mlp = "gelo"', "'gelo' is not one of"),
        ("presets", PRESET + "n_layer = 2.5", "2.5 is not of type 'integer'"),
        ("presets", PRESET + "qkv_bias = 3", "3 is not of type 'boolean'"),
        ("presets", PRESET + "[scale]\nsede = 1", "'sede' was unexpected"),
        ("presets", PRESET + "[[steps]]\nn_layer = 0", "0 is less than the minimum of 1"),
        (
            "presets",
            PRESET + f"growth = {{ ops = [{OP.replace('set_lr', 'set_rl')}] }}",
            "is not valid under",
        ),
        ("presets", PRESET + f"growth = {{ ops = [{OP.replace('step', 'steps')}] }}", "is not valid under"),
        ("studies", STUDY + "[budget]\ntrails = 3", "'trails' was unexpected"),
        ("studies", STUDY.replace("dev_frac", "dev_frak"), "'dev_frak' was unexpected"),
        ("studies", STUDY.replace("space.lr", "space.seed"), "'seed' does not match"),
        ("studies", STUDY + "[sampler]\nname = 'tpee'", "'tpee' is not one of"),
        ("studies", 'preset = "demo"', "'space' is a required property"),
    ],
)
def test_spoiled_files_do_not_fit(kind: str, text: str, fault: str) -> None:
    found = faults(kind, text)
    assert len(found) == 1
    assert fault in found[0]


def test_the_schemas_describe_every_field() -> None:
    fields = set(TrainConfig.model_fields) - {"preset"}
    presets = preset_schema.json_schema()
    assert set(presets["$defs"]) == fields
    assert set(presets["properties"]) == fields | {"about", "base", "scale", "steps"}
    assert all(definition["description"] for definition in presets["$defs"].values())
    ops = presets["$defs"]["growth"]["anyOf"][0]["properties"]["ops"]["items"]["properties"]
    assert set(ops) == set(OP_KEYS)
    studies = study.json_schema()["properties"]
    assert set(studies["set"]["properties"]) == fields
    searchable = {name for name in fields - {"growth"} if TrainConfig.class_of(name) != "inert"}
    assert set(studies["space"]["properties"]) == searchable - set(NOT_SEARCHABLE) | {"timescale"}
