"""The key chain: what a run's state after each step depends on, as one hash a step. No torch.

    key[0]   = H(model, optimiser and seed; the tokens; the versions of everything that computes; the machine class)
    key[i+1] = H(key[i], everything scheduled that enters step i, the ops of the architecture that act before it)

Two runs share a prefix exactly as long as their keys agree. Nothing else decides: not their names, not their length, not the
study that they belong to.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any, get_type_hints

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan, StepInputs

# Static fields of which only the effect counts, and that is in the chain's beginning anyway: in the tokens, or in the machine class.
IN_TOKENS = {
    "corpus",
    "num_titles",
    "shuffle",
    "val_frac",
    "dev_frac",
    "tokenizer",
    "tokenizer_fit",
    "vocab_size",
}
IN_MACHINE = {"device", "dtype", "threads", "compile", "attention"}

INPUTS = struct.Struct(
    "<" + "".join({float: "d", int: "q"}[kind] for kind in get_type_hints(StepInputs).values())
)


def origin(
    cfg: TrainConfig,
    fingerprints: dict[str, str],
    tokens: str,
    versions: dict[str, str],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """What a chain begins with. Fields that stand for another (`d_ff = 0`) as what they come to."""
    static = (f for f in TrainConfig.model_fields if TrainConfig.class_of(f) == "static")
    fields = {f: getattr(cfg, f) for f in static if f not in IN_TOKENS | IN_MACHINE}
    fields |= {
        "d_ff": cfg.ff_width,
        "n_kv_head": cfg.kv_heads,
        "qkv_bias": cfg.bias if cfg.qkv_bias is None else cfg.qkv_bias,
    }
    fields |= {
        "head_dim": cfg.head_width,
        "frozen": list(cfg.frozen),
    }  # a list, as it comes back from the store
    return {
        "fields": fields,
        "data": {**fingerprints, "tokens": tokens},
        "versions": versions,
        "machine_class": machine,
    }


def root(begun: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(begun, sort_keys=True).encode()).hexdigest()


def chain(root: str, plan: Plan) -> list[str]:
    """key[0] ... key[steps]; where an op waits for an evaluation (`plan.undecided`), as if it never fired."""
    key, found, sha256, pack, at, grown = (
        bytes.fromhex(root),
        [root],
        hashlib.sha256,
        INPUTS.pack,
        plan.at,
        plan.grown,
    )
    for step in range(plan.steps):
        key = sha256(key + pack(*at(step)) + grown.get(step, b"")).digest()
        found.append(key.hex())
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What two beginnings differ in, for a sentence."""
    found = []
    for part in a:
        mine, other = a[part], b.get(part)
        other = other if isinstance(other, dict) else {}
        names = [k for k in sorted({*mine, *other}) if mine.get(k) != other.get(k)]
        found += [f"{part} {k}: {_short(other.get(k))} there, {_short(mine.get(k))} here" for k in names]
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
