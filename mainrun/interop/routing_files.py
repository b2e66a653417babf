"""The two files that keep the routers of an exported model, beside its dense backbone.

routing.safetensors contains the parameters of the routers, in float32 and with their names in mainrun, such
as `blocks.1.router.score.weight`. routing.json contains the config fields that the routers depend on:

    {"format": 1, "block_pattern": "DMDM", "capacity": 0.125, "gate": "straight", "route": "auto",
     "prior_factor": 0.0625, "sharpness": 6.0, "sharpness_end": 6.0}

The value of `sharpness` is the one that the exported weights were scored with. A run that starts from the
exported model therefore begins with the same routes. `mainrun hub import` writes the fields to its preset,
and `start=hf:DIR` loads the tensors. This module does not import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.errors import UsageError
from mainrun.files import inputs
from mainrun.files.inputs import BadInput

if TYPE_CHECKING:
    from mainrun.train import Model

FORMAT = 1
TENSORS = "routing.safetensors"
FIELDS_FILE = "routing.json"
# the fields in routing.json, which have the names and the types of the config's fields
FIELDS: dict[str, type] = {
    "block_pattern": str,
    "capacity": float,
    "gate": str,
    "route": str,
    "prior_factor": float,
    "sharpness": float,
    "sharpness_end": float,
}
FIX = "export the model again, or remove both files to use the dense model"


def write_routing(model: Model, folder: Path) -> None:
    """Write the routers of a model to a folder. Do nothing if the model is dense."""
    from mainrun.store.checkpoint import save_tensors
    from mainrun.store.rundir import to_json

    cfg = model.cfg
    if not cfg.routed_layers:
        return
    sharpness = cfg.sharpness
    if "S" in cfg.letters or "T" in cfg.letters:
        # the value of the last step, which the scores depend on
        sharpness = float(model.get_buffer("sharpness"))
    tensors = {name: p.float() for name, p in model.named_parameters() if ".router." in name}
    fields = {
        "block_pattern": cfg.letters,
        "capacity": cfg.capacity,
        "gate": cfg.gate,
        "route": cfg.route,
        "prior_factor": cfg.prior_factor,
        "sharpness": sharpness,
        "sharpness_end": cfg.sharpness_end,
    }
    save_tensors(tensors, folder / TENSORS)
    (folder / FIELDS_FILE).write_text(to_json({"format": FORMAT, **fields}), encoding="utf-8")


def has_routing(folder: Path) -> bool:
    """Return whether a checkpoint has routers. Raise UsageError if one of the two files is missing."""
    for present, missing in ((TENSORS, FIELDS_FILE), (FIELDS_FILE, TENSORS)):
        if (folder / present).exists() and not (folder / missing).exists():
            raise UsageError(f"{folder} has {present} but no {missing}; copy it too, or remove {present}")
    return (folder / TENSORS).exists()


def read_routing_fields(folder: Path) -> dict[str, Any]:
    """Return the config fields in routing.json, or an empty dictionary if the checkpoint has no routers."""
    if not has_routing(folder):
        return {}
    path = folder / FIELDS_FILE
    try:
        table = json.loads(inputs.read_bytes(path))
    except (BadInput, ValueError, RecursionError) as e:
        raise UsageError(f"{path} is not valid JSON ({e}); {FIX}") from None
    problem = _problem(table)
    if problem:
        raise UsageError(f"{path} {problem}; {FIX}")
    return {name: table[name] for name in FIELDS}


def _problem(table: Any) -> str:
    """Return what is wrong with the content of routing.json, or an empty string."""
    if not isinstance(table, dict):
        return "contains no JSON object"
    if table.get("format") != FORMAT:
        return f"has format {table.get('format')!r}, but this version reads format {FORMAT}"
    differing = sorted({*FIELDS, "format"} ^ {*table})
    if differing:
        return f"must contain exactly the fields {', '.join(FIELDS)}; wrong: {', '.join(differing)}"
    for name, kind in FIELDS.items():
        value = table[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number if kind is float else isinstance(value, kind)
        if not fits:
            return f"has {name}={inputs.shown(value, 80)}, which must be a {kind.__name__}"
    return ""
