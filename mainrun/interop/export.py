"""Export the model of a run: as a Qwen2 checkpoint for `transformers`, or as an adapter for `peft`."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mainrun.data.token_cache import ABANDONED
from mainrun.errors import UsageError
from mainrun.interop.adapter import check_adapter, write_adapter
from mainrun.interop.qwen2_export import write_checkpoint
from mainrun.interop.source import ExportedModel, check_expressible, load_source
from mainrun.store.checkpoint import safetensors_errors
from mainrun.store.rundir import RunDir, disk_errors, fsync_folder

TEMPORARY = ".mainrun-export-"  # the beginning of the names of temporary folders
FULL = "free some space and run the same command again"  # an export begins from the start


def export_run(
    run: RunDir, folder: Path, *, dtype: str = "float32", adapter: bool = False, published: bool = False
) -> ExportedModel:
    """Write the model of a run's newest checkpoint to a new folder.

    adapter: write only the low-rank terms, as an adapter for peft.
    published: whether other people will read the files, so that no file may name a folder of this machine.
    """
    check_new(folder)
    source = load_source(run, dtype)
    if adapter:
        base = check_adapter(source, published)
    else:
        check_expressible(source.cfg)
    with new_folder(folder) as temp, safetensors_errors():
        if adapter:
            write_adapter(source, base, temp)
        else:
            write_checkpoint(source, temp)
    return source


def check_new(folder: Path) -> None:
    """Raise UsageError unless a folder is empty or does not exist."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the path of a new folder")
    if any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; give the path of a new folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder. It becomes `folder` if the block ends without an error.

    The temporary folder is in the same parent folder, so that renaming it is atomic. If `folder` exists, it
    stays the same folder and gets the files.
    """
    folder = folder.resolve()
    temp = folder.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    with disk_errors(folder, "DIR", FULL):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        temp.mkdir()
    try:
        with disk_errors(folder, "DIR", FULL):
            yield temp
            for file in temp.iterdir():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
            fsync_folder(temp)
            check_new(folder)  # another process may have written to the folder in the meantime
            if folder.exists():
                _move_files(temp, folder)
            else:
                temp.rename(folder)
            fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _move_files(temp: Path, folder: Path) -> None:
    """Move all files into an empty folder, or none of them if there is an error."""
    # the config comes last, because no library loads a model without it
    files = sorted(temp.iterdir(), key=lambda file: (file.name.endswith("config.json"), file.name))
    moved = []
    try:
        for file in files:
            moved.append(folder / file.name)
            shutil.move(file, folder / file.name)
        fsync_folder(folder)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def _remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders of exports that were killed."""
    for temp in parent.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # another export may be removing the same folder
            if time.time() - temp.stat().st_mtime > ABANDONED:
                shutil.rmtree(temp)
