"""Read and write token_scores.safetensors: the log-probabilities that a run gave to the held-out tokens.

For each held-out split, the file contains two arrays of float32 numbers, such as val/full and val/official,
with one number for each target of the score. The metadata contains a hash of the token ids, so that only
runs over the same tokens are combined, and a checksum of the arrays. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mainrun.errors import RunError
from mainrun.files import inputs
from mainrun.files.hashing import sha256_json
from mainrun.files.inputs import BadInput
from mainrun.store import records
from mainrun.store.rundir import RunDir

FILE = "token_scores.safetensors"
FORMAT = 1
KEY = "mainrun"  # one key, because safetensors writes several keys in a random order
ABOUT = {
    "format": records.at_least_one,
    "config": records.text,
    "splits": records.table_of(records.table),
    "sha256": records.text,
}
SPLIT = {"tokens": records.text, "chars": records.at_least_one}


@dataclass(frozen=True)
class TokenScores:
    """The log-probabilities of the tokens of one split."""

    tokens: str  # a hash of the token ids of the split
    chars: int  # the number of characters that a score of the split is divided by
    full: np.ndarray  # one number per token
    official: np.ndarray  # one number per target of the official score


def hash_tokens(tokens: np.ndarray) -> str:
    """Return a hash of token ids, which does not depend on the type of the array."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u4").data).hexdigest()


# -- writing


def write(run: RunDir, config: str, splits: dict[str, TokenScores]) -> None:
    """Write the file of a run atomically. `config` is the digest of the run's config."""
    from safetensors.numpy import save

    arrays = {}
    about: dict[str, Any] = {"format": FORMAT, "config": config, "splits": {}}
    for split, scores in splits.items():
        arrays[f"{split}/full"] = np.ascontiguousarray(scores.full, dtype=np.float32)
        arrays[f"{split}/official"] = np.ascontiguousarray(scores.official, dtype=np.float32)
        about["splits"][split] = {"tokens": scores.tokens, "chars": scores.chars}
    about["sha256"] = _checksum(arrays, about)
    run.write_bytes(FILE, save(arrays, {KEY: json.dumps(about)}))


def _checksum(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> str:
    """Return a hash of the arrays and of the metadata without its field `sha256`."""
    hashes = {}
    for name, array in arrays.items():
        hashes[name] = [array.dtype.str, list(array.shape), hashlib.sha256(array.data).hexdigest()]
    described = {name: value for name, value in about.items() if name != "sha256"}
    return sha256_json([hashes, described])


# -- reading


def read(run: RunDir) -> dict[str, TokenScores]:
    """Return the log-probabilities of each split. Raise RunError if the file is missing or damaged."""
    path = run.path / FILE
    if is_missing(run):
        raise RunError(_missing(run))
    try:
        return _read(path, str(run.config_file().get("digest")))
    except BadInput as e:
        raise RunError(f"{path} is damaged: it {e}; {run.fix}") from None


def is_missing(run: RunDir) -> bool:
    return not os.path.lexists(run.path / FILE)


def how_to_restore(run: RunDir) -> str:
    """Say that the file of a finished run was deleted, and how to write it again."""
    return (
        f"{run.path / FILE} was deleted after the run had written it; restore it, or delete "
        f"{run.path / 'summary.json'} and repeat the `mainrun train` command, which then continues from the "
        "last checkpoint and scores the model again"
    )


def _missing(run: RunDir) -> str:
    """Return a message that says how to get the file of a run."""
    if run.config().token_scores:
        return how_to_restore(run)
    got = f"run {run.path.name} has no {FILE}"
    return (
        f"{got}, because its config has token_scores=false; train the run again with "
        "--set token_scores=true; this creates a run with another id, which copies its steps from the store"
    )


def _read(path: Path, config: str) -> dict[str, TokenScores]:
    arrays, about = _load(path)
    if about["config"] != config:
        raise BadInput("belongs to a run with another config")
    splits = {}
    for split, described in about["splits"].items():
        records.check(described, SPLIT, split)
        full = arrays[f"{split}/full"]
        official = arrays[f"{split}/official"]
        splits[split] = TokenScores(described["tokens"], described["chars"], full, official)
    return splits


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the metadata of a file, after checking that they are as they were written."""
    from safetensors import SafetensorError, safe_open

    why = inputs.not_a_file(path)
    if why:
        raise BadInput(why.partition("; ")[0])
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(KEY, "")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, TypeError, AttributeError) as e:
        raise BadInput(f"cannot be read as safetensors ({inputs.parser_message(e)})") from None
    about = records.parse(text.encode())
    records.check(about, ABOUT)
    if about["format"] != FORMAT:
        raise BadInput(f"has format {about['format']}, but this version reads format {FORMAT}")
    if about["sha256"] != _checksum(arrays, about):
        raise BadInput("was changed after it was written")
    return arrays, about
