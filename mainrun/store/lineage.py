"""Compute the key chain of a run.

A run has one key per step. The key of a step is a hash of everything that determines the state of the run
after this step:

    key[0]   = H(model, optimizer and seed; tokens; versions of all code that computes; machine class)
    key[i+1] = H(key[i], the scheduled inputs of step i, the operations that change the model before step i)

Two runs have the same state after a step if and only if their keys for this step are equal. The name, the
length and the study of a run do not affect its keys. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, get_type_hints

from mainrun.config import TrainConfig
from mainrun.files.hashing import sha256_json
from mainrun.plan.plan import Plan, StepInputs

# Static fields that affect only the tokens. The first key does not include these fields, because it already
# contains a hash of the tokens.
IN_TOKENS = {
    "corpus",
    "num_titles",
    "shuffle",
    "val_frac",
    "dev_frac",
    "documents",
    "tokenizer",
    "tokenizer_fit",
    "case",
    "vocab_size",
}
# Static fields that affect only the machine class, which is part of the first key.
IN_MACHINE = {"device", "dtype", "threads", "compile", "attention", "shard"}
# The start counts by the content of its weights, not by its path.
IN_START = {"start"}

STRUCT_CODES = {float: "d", int: "q"}
INPUTS = struct.Struct("<" + "".join(STRUCT_CODES[kind] for kind in get_type_hints(StepInputs).values()))


def origin(
    cfg: TrainConfig,
    fingerprints: dict[str, str],
    tokens: str,
    versions: dict[str, str],
    machine: dict[str, Any],
    start: str = "",
) -> dict[str, Any]:
    """Return the values from which the first key of a run is computed.

    A default value such as `d_ff = 0` is replaced with the actual value that mainrun uses.

    start: the digest of the weights that the run starts from, or "" for random weights.
    """
    if bool(start) != bool(cfg.start):
        raise ValueError(f"the digest of start={cfg.start!r} must be given if and only if there is a start")
    left_out = IN_TOKENS | IN_MACHINE | IN_START
    data = {**fingerprints, "tokens": tokens}
    if start:
        data["start"] = start
    fields: dict[str, Any] = {}
    for field in TrainConfig.model_fields:
        if TrainConfig.class_of(field) == "static" and field not in left_out:
            fields[field] = getattr(cfg, field)
    fields["d_ff"] = cfg.ff_width
    fields["n_kv_head"] = cfg.kv_heads
    fields["qkv_bias"] = cfg.bias if cfg.qkv_bias is None else cfg.qkv_bias
    fields["head_dim"] = cfg.head_width
    fields["block_pattern"] = cfg.letters
    fields["frozen"] = list(cfg.frozen)  # the tuple is converted to a list, because JSON has no tuples
    return {
        "fields": fields,
        "data": data,
        "versions": versions,
        "machine_class": machine,
    }


def root(origin: dict[str, Any]) -> str:
    """Return the first key of a run."""
    return sha256_json(origin)


def chain(root: str, plan: Plan) -> list[str]:
    """Return key[0] ... key[steps] of a run.

    Operations that wait for the loss of an evaluation are ignored.
    """
    key = bytes.fromhex(root)
    keys = [root]
    for step in range(plan.steps):
        inputs = INPUTS.pack(*plan.at(step))
        key = hashlib.sha256(key + inputs + plan.grown.get(step, b"")).digest()
        keys.append(key.hex())
    return keys


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return phrases that describe the differences between two origins, for use in a message.

    ours: the origin of the current run.
    """
    phrases = []
    for part, values in ours.items():
        other = theirs.get(part)
        other_values = other if isinstance(other, dict) else {}
        for name in sorted({*values, *other_values}):
            value = values.get(name)
            other_value = other_values.get(name)
            if value != other_value:
                phrases.append(f"{part} {name}: {_short(other_value)} there, {_short(value)} here")
    return phrases


def _short(value: Any) -> str:
    """Return a value as a string. A hash is shortened to its first 12 digits."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
