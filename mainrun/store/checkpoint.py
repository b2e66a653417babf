"""Checkpoints: safetensors + JSON in one folder, there whole or not at all, and never believed unchecked.

A checkpoint is written beside its place, synced, and renamed into it. Its meta.json holds the checksum of the
tensors and one of itself, so a torn, truncated or edited one is found out, named, and passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mainrun.errors import MainrunError, RunError
from mainrun.store import records
from mainrun.store.records import open_file
from mainrun.store.rundir import FIX, disk_errors, fsync_folder, to_json, write_json

FORMAT = 1
KEEP = 2  # the newest, and the one before it in case the newest turns out damaged


def save(
    folder: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    meta: dict[str, Any],
    check: Callable[[], None] = lambda: None,
) -> Path:
    """`check` is asked last of all before anything that others see is touched."""
    place = folder / f"step-{step:08d}"
    temp = folder / f".tmp-{place.name}"
    with disk_errors(place):
        for left in folder.glob(".tmp-step-*"):  # by an earlier kill
            with suppress(OSError):
                _remove(left)
        temp.mkdir(parents=True)
    try:
        with disk_errors(place):
            save_tensors(tensors, temp / "state.safetensors")
            meta = {
                "format": FORMAT,
                "step": step,
                **meta,
                "state_sha256": sha256_file(temp / "state.safetensors"),
            }
            write_json(temp / "meta.json", meta | {"meta_sha256": _meta_sha256(meta)})
            check()
            for stale in steps(
                folder
            ):  # of this step or a later one: passed over when the run was resumed, this one replaces them
                if stale >= place:
                    _remove(stale)
            temp.rename(place)
            fsync_folder(folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    for old in steps(folder)[KEEP:]:
        _remove(old)
    return place


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """One safetensors file, synced. A full disk is an OSError that says so."""
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    except Exception as e:  # safetensors has its own error type and hides errno in its text
        if code := re.search(r"os error (\d+)", str(e)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from e
        raise
    with path.open("rb") as f:
        os.fsync(f.fileno())


def steps(folder: Path) -> list[Path]:
    """The checkpoints there, newest first. A folder that cannot be listed may hold some, and is an error."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise RunError(f"{folder} is damaged: it cannot be read ({e.strerror}); {FIX}") from None
    return sorted((folder / name for name in names if name.startswith("step-")), reverse=True)


def load_newest(
    folder: Path, usable: Callable[[dict[str, Any]], str | None], note: Callable[[str], None]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole and that `usable` has nothing against (it answers with a reason); others are named."""
    for place in steps(folder):
        try:
            return _load(place, usable)
        except ValueError as e:
            note(f"checkpoint {place} is passed over: {e}")
    return None


def _load(
    place: Path, usable: Callable[[dict[str, Any]], str | None]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with open_file(place / "meta.json") as f:
            text = f.read()
        meta = json.loads(text)
        claimed = meta.pop("meta_sha256")
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
        if claimed != _meta_sha256(meta) or text != to_json(meta | {"meta_sha256": claimed}).encode():
            raise ValueError("meta.json was changed after it was written")
        if sha256_file(place / "state.safetensors") != meta["state_sha256"]:
            raise ValueError("state.safetensors is torn or was changed after it was written")
    except OSError as e:
        raise ValueError(f"{e.filename} cannot be read ({e.strerror})") from None
    except (json.JSONDecodeError, UnicodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("meta.json is torn or was changed after it was written") from None
    if reason := usable(meta):
        raise ValueError(reason)
    try:
        return load_file(place / "state.safetensors"), meta
    except (SafetensorError, OSError) as e:
        raise ValueError(f"state.safetensors is no safetensors file ({e})") from None


def fault(meta: dict[str, Any]) -> str:
    """What is wrong with the meta.json of a run's checkpoint, even if its checksum fits; empty: nothing."""
    misfit = records.fault(meta, records.CHECKPOINT)
    return f"meta.json {misfit}" if misfit else ""


@contextmanager
def fitting(what: object) -> Iterator[None]:
    """While a state is loaded: tensors that do not fit the model are the fault of the file that they came from."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        MainrunError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        RuntimeError,
    ) as e:
        why = " ".join(str(e).split())
        raise RunError(
            f"{what} does not fit the model of its run ({type(e).__name__}: {why[:300]}); {FIX}"
        ) from e


def sha256_file(path: Path) -> str:
    with open_file(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_tensors(named: Iterator[tuple[str, torch.Tensor]]) -> str:
    """One hash of names, shapes, types and bits."""
    sha = hashlib.sha256()
    for name, tensor in sorted(named):
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        sha.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _meta_sha256(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
