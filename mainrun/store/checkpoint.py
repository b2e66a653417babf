"""Save and load checkpoints.

A checkpoint is a folder that contains a safetensors file and the file meta.json. A new checkpoint is written
to a temporary folder, which is then synced and renamed. The file meta.json holds a checksum of the tensors
and a checksum of its own content. Checkpoints that are incomplete or were edited are reported and skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mainrun.errors import MainrunError, RunError
from mainrun.files.hashing import sha256_file, sha256_json
from mainrun.files.inputs import open_file
from mainrun.store import records
from mainrun.store.rundir import FIX, disk_errors, fsync_folder, to_json, write_json

FORMAT = 1
# Keep two checkpoints. If the newest checkpoint is damaged, the run resumes from the older checkpoint.
KEEP = 2

Tensors = dict[str, torch.Tensor]
Meta = dict[str, Any]


# -- writing


def save(
    folder: Path,
    step: int,
    tensors: Tensors,
    meta: Meta,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint and remove old checkpoints.

    check: a function that is called just before the checkpoint becomes visible. If the function raises an
    error, no checkpoint is written.
    """
    place = folder / f"step-{step:08d}"
    temp = folder / f".tmp-{place.name}"
    with disk_errors(place):
        _remove_abandoned(folder)
        temp.mkdir(parents=True)
    try:
        with disk_errors(place):
            _write(temp, step, tensors, meta)
            check()
            # The run may have resumed from an earlier checkpoint because the later checkpoints were unusable.
            for skipped in paths(folder):
                if skipped >= place:
                    _remove(skipped)
            temp.rename(place)
            fsync_folder(folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    for old in paths(folder)[KEEP:]:
        _remove(old)
    return place


def _write(folder: Path, step: int, tensors: Tensors, meta: Meta) -> None:
    state = folder / "state.safetensors"
    save_tensors(tensors, state)
    complete = {"format": FORMAT, "step": step, **meta, "state_sha256": sha256_file(state)}
    write_json(folder / "meta.json", complete | {"meta_sha256": sha256_json(complete)})


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders that killed processes left behind."""
    for temp in folder.glob(".tmp-step-*"):
        with suppress(OSError):
            _remove(temp)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write tensors to a safetensors file and sync the file. A full disk raises OSError."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with safetensors_errors():
        save_file(contiguous, path)
    with path.open("rb") as f:
        os.fsync(f.fileno())


@contextmanager
def safetensors_errors() -> Iterator[None]:
    """Convert an error of safetensors about the disk to OSError.

    Safetensors raises its own exception type, whose message contains the OS error number.
    """
    try:
        yield
    except SafetensorError as e:
        number = re.search(r"os error (\d+)", str(e))
        if number:
            code = int(number[1])
            raise OSError(code, os.strerror(code)) from e
        raise


# -- reading


def paths(folder: Path) -> list[Path]:
    """Return the paths of all checkpoints in a folder, newest first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as e:  # the folder cannot be read, but it may contain checkpoints
        raise RunError(f"{folder} is damaged: it cannot be read ({e.strerror}); {FIX}") from None
    return sorted((folder / name for name in names if name.startswith("step-")), reverse=True)


def load_newest(
    folder: Path, usable: Callable[[Meta], str | None], note: Callable[[str], None]
) -> tuple[Tensors, Meta] | None:
    """Load the newest intact checkpoint that `usable` accepts, or return None.

    usable: a function that returns the reason why a checkpoint cannot be used, or None.
    note: a function that is called with a message for each skipped checkpoint.
    """
    for place in paths(folder):
        try:
            return _load(place, usable)
        except ValueError as e:
            note(f"checkpoint {place} is skipped: {e}")
    return None


def find_newest(
    folder: Path, usable: Callable[[Meta], str | None], note: Callable[[str], None]
) -> tuple[Path, Meta] | None:
    """Return the safetensors file and the meta.json of the checkpoint that `load_newest` would load."""
    for place in paths(folder):
        try:
            return place / "state.safetensors", _load_usable_meta(place, usable)
        except ValueError as e:
            note(f"checkpoint {place} is skipped: {e}")
    return None


def _load_usable_meta(place: Path, usable: Callable[[Meta], str | None]) -> Meta:
    meta = _load_meta(place)
    reason = usable(meta)
    if reason:
        raise ValueError(reason)
    return meta


def _load(place: Path, usable: Callable[[Meta], str | None]) -> tuple[Tensors, Meta]:
    """Load a checkpoint. Raise ValueError if the checkpoint is damaged or cannot be used."""
    meta = _load_usable_meta(place, usable)
    try:
        return load_file(place / "state.safetensors"), meta
    except (SafetensorError, OSError) as e:
        raise ValueError(f"state.safetensors is not a valid safetensors file ({e})") from None


def _load_meta(place: Path) -> Meta:
    """Return the content of meta.json after verifying both checksums."""
    try:
        with open_file(place / "meta.json") as f:
            text = f.read()
        meta = json.loads(text)
        checksum = meta.pop("meta_sha256")
        if meta["format"] != FORMAT:
            raise ValueError(f"meta.json has format {meta['format']}, but this version reads format {FORMAT}")
        original = to_json(meta | {"meta_sha256": checksum}).encode()
        if checksum != sha256_json(meta) or text != original:
            raise ValueError("meta.json was changed after it was written")
        if sha256_file(place / "state.safetensors") != meta["state_sha256"]:
            raise ValueError("state.safetensors is incomplete or was changed after it was written")
    except OSError as e:
        raise ValueError(f"{e.filename} cannot be read ({e.strerror})") from None
    except (json.JSONDecodeError, UnicodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("meta.json is incomplete or was changed after it was written") from None
    return meta


def fault(meta: Meta) -> str:
    """Return a message about the first invalid value in meta.json, or an empty string.

    This function does not verify the checksums.
    """
    misfit = records.fault(meta, records.CHECKPOINT)
    return f"meta.json {misfit}" if misfit else ""


@contextmanager
def fit_errors(source: object) -> Iterator[None]:
    """Convert errors about tensors that do not fit the model to RunError.

    source: the file that contains the tensors. The error message names this file.
    """
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
        got = f"{source} does not fit the model of its run ({type(e).__name__}: {why[:300]})"
        raise RunError(f"{got}; {FIX}") from e


def sha256_tensors(named: Iterator[tuple[str, torch.Tensor]]) -> str:
    """Return a hash of the names, shapes, data types and values of the tensors."""
    return sha256_sorted_tensors(sorted(named))


def sha256_sorted_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the same hash as `sha256_tensors`. The tensors must be in the order of their names."""
    sha256 = hashlib.sha256()
    for name, tensor in named:
        sha256.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        sha256.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
