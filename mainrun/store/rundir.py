"""Read, write and lock run directories. A run directory contains these files:

    config.json  env.json  status.json  metrics.jsonl  growth.jsonl  summary.json  tokenizer.json
    token_scores.safetensors  checkpoints/

A run with trackers also contains trackers.json, and the folders tensorboard and wandb.

JSON files are replaced atomically. metrics.jsonl and growth.jsonl are append-only logs. A run that resumes
truncates both logs to the length that they had when its checkpoint was saved. This module does not import
torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from mainrun.config import TrainConfig, digest_of, from_dict
from mainrun.errors import ConfigError, DiskFull, RunError, UsageError
from mainrun.files import inputs
from mainrun.files.inputs import BadInput
from mainrun.files.locks import FileLock, Locked, first_line
from mainrun.store import records

FIX = "restore it, or train the run again with --fresh"
FILES = (
    "config.json",
    "env.json",
    "status.json",
    "metrics.jsonl",
    "growth.jsonl",
    "summary.json",
    "tokenizer.json",
    "token_scores.safetensors",
)
TRACKING = ("trackers.json", ".trackers.json.tmp", "tensorboard", "wandb")
# The files that a run writes into its directory. The option --fresh removes only these files.
TEMPORARY = tuple(f".{name}.tmp" for name in FILES)
WRITTEN = {*FILES, *TEMPORARY, *TRACKING, "checkpoints", "traceback.txt", ".lock"}


# -- rows of metrics.jsonl


class LoggedStep(TypedDict):
    """A training step in metrics.jsonl."""

    event: Literal["step"]
    step: int
    tokens: int  # the number of tokens processed up to this step
    lr: float
    loss: float
    grad_norm: float
    seconds: float
    aux: NotRequired[dict[str, float]]  # the losses of the routers
    grad_norms: NotRequired[dict[str, float]]  # the gradient norm of each layer, at the first steps
    routers: NotRequired[list[dict[str, Any]]]  # the statistics of the routers
    reused: NotRequired[bool]  # whether this step was copied from the store instead of being trained


class LoggedEval(TypedDict):
    """The scores of one split in metrics.jsonl."""

    event: Literal["eval"]
    step: int
    split: str
    full: float
    official: float
    loss: float
    bits_per_byte: float
    coverage: float
    tokens: int
    seconds: NotRequired[float]
    params: NotRequired[int]  # the number of parameters at this step, in runs whose model grows
    active: NotRequired[int]
    flops: NotRequired[float]
    routers: NotRequired[list[dict[str, Any]]]  # the share of tokens that each router selected
    reused: NotRequired[bool]


LogRow = LoggedStep | LoggedEval


class LogMark(TypedDict):
    """A position in a log that a checkpoint refers to."""

    bytes: int
    sha256: str  # the hash of all bytes of the log before the position


# -- writing files


@contextmanager
def disk_errors(path: Path, option: str = "--out", full: str = inputs.FREE_SPACE) -> Iterator[None]:
    """Convert an OSError to DiskFull or RunError.

    option: the command-line option that sets the path. The error message names this option.
    full: what to do if the disk is full.
    """
    try:
        yield
    except OSError as e:
        if e.errno in inputs.NO_SPACE:
            got = f"no space left to write {path} ({e.strerror})"
            raise DiskFull(f"{got}; {full}") from e
        got = f"cannot write {path}: {e.strerror or e}"
        raise RunError(f"{got}; choose a writable folder with {option}") from e


def to_json(value: Any) -> str:
    """Return the JSON text of a value, as it is written to a file."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, to_json(value))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically. The data is written to a temporary file, which is synced and renamed."""
    temp = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with temp.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            temp.replace(path)
            fsync_folder(path.parent)
        finally:
            temp.unlink(missing_ok=True)


def fsync_folder(path: Path) -> None:
    """Sync a folder to disk, so that a renamed file in the folder survives a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class RowLog:
    """An append-only log with one JSON row per line and a running checksum.

    A checkpoint contains a mark, which is a position in the log. A run that resumes truncates the log at this
    mark.
    """

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        """Open the log. The function `check` is called before every change and may raise an error."""
        self.path = path
        self._check = check
        # Refuse a pipe, because opening a pipe blocks until another process reads from it.
        check_regular_file(path)
        with disk_errors(path):
            # The log file is unbuffered. If a row did not fit on a full disk, a buffer would keep the row,
            # and would write it when the file is closed.
            self._file = path.open("ab", buffering=0)
        self._sha256 = hashlib.sha256()
        self._size = 0

    def rewind(self, mark: Mapping[str, Any]) -> bool:
        """Truncate the log at a mark.

        If the checksum of the content before the mark does not match, leave the log unchanged and return
        False.
        """
        self._check()
        data = self.path.read_bytes()[: mark["bytes"]]
        sha256 = hashlib.sha256(data)
        if len(data) != mark["bytes"] or sha256.hexdigest() != mark["sha256"]:
            return False
        os.truncate(self.path, mark["bytes"])
        self._sha256 = sha256
        self._size = len(data)
        return True

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row to the log."""
        self._check()
        line = json.dumps(row).encode() + b"\n"
        with disk_errors(self.path):
            rest = memoryview(line)
            while rest:
                written = self._file.write(rest)
                rest = rest[written:]
        self._sha256.update(line)
        self._size += len(line)

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows of the log."""
        return records.load_lines(self.path, records.any_row, FIX)

    def mark(self) -> LogMark:
        """Sync the log to disk and return its current end as a mark."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
        return {"bytes": self._size, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        self._file.close()


# -- the directory


class RunDir:
    """A run directory. `open_run` locks the directory for writing. Reading a run directory needs no lock.

    Reading a damaged file raises RunError. The error message ends with `fix`, which says how to repair the
    directory.
    """

    def __init__(self, path: Path, fix: str = FIX) -> None:
        self.path = Path(path)
        self.fix = fix
        self._lock: FileLock | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    # -- reading

    def _load(self, name: str, shape: records.Shape) -> Any:
        return records.load(self.path / name, shape, self.fix)

    def config(self) -> TrainConfig:
        """Return the config of the run. Raise RunError if the config does not match its stored digest."""
        file = self.path / "config.json"
        data = self._load("config.json", records.anything)
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
            got = f"{self.path} is not a run directory (no usable config.json)"
            raise RunError(f"{got}; give a run directory that `mainrun train` created")
        if data.get("digest") != digest_of(data["config"]):
            raise RunError(f"{file} was changed after the run began; {self.fix}")
        try:
            return from_dict(data["config"])
        except ConfigError as e:
            raise RunError(
                f"{file} does not contain a config that this version accepts: {e}; {self.fix}"
            ) from None

    def config_file(self) -> dict[str, Any]:
        """Return the content of config.json: the config, the resolved plan and the data fingerprints."""
        return self._load("config.json", records.CONFIG) or {}

    def plan(self) -> dict[str, Any]:
        """Return the resolved plan from config.json."""
        return dict(self.config_file().get("plan", {}))

    def summary(self) -> dict[str, Any] | None:
        """Return the content of summary.json, or None if the run is not finished."""
        summary: dict[str, Any] | None = self._load("summary.json", records.SUMMARY)
        return summary

    def status(self) -> dict[str, Any]:
        """Return the content of status.json, which contains the state of the run and its last saved step."""
        return self._load("status.json", records.STATUS) or {}

    def env(self) -> dict[str, Any]:
        """Return the content of env.json, which describes the machine, the versions and the command."""
        return self._load("env.json", records.ENV) or {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl.

        Each row must be a JSON object, but the values in a row are not checked.
        """
        return records.load_lines(self.path / "metrics.jsonl", records.table, self.fix)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, after checking every value."""
        return records.load_lines(self.path / "metrics.jsonl", records.metrics_row, self.fix)

    def intact_rows(self) -> list[LogRow]:
        """Return the rows of metrics.jsonl before the first damaged row.

        A killed run may leave an incomplete row at the end of the file.
        """
        try:
            data = records.read(self.path / "metrics.jsonl", records.LARGEST) or b""
        except BadInput as e:
            raise RunError(f"{self.path}/metrics.jsonl is damaged: it {e}; {self.fix}") from None
        rows: list[LogRow] = []
        with suppress(BadInput):
            for row in records.lines(data, records.metrics_row):
                rows.append(cast(LogRow, row))
        return rows

    def journal(self) -> list[dict[str, Any]]:
        """Return the growth events of growth.jsonl."""
        return records.load_lines(self.path / "growth.jsonl", records.EVENT, self.fix)

    def text(self, name: str) -> str:
        """Return the text of a JSON file. Raise RunError if the file does not exist."""
        file = self.path / name
        try:
            data = records.read(file)
            if data is None:
                raise RunError(f"{self.path} has no {name}; {self.fix}")
            records.parse(data)
            return data.decode("utf-8")
        except BadInput as e:
            raise RunError(f"{file} is damaged: it {e}; {self.fix}") from None

    # -- writing

    def lock(self) -> None:
        """Lock the directory for writing. Raise RunError if another process holds the lock."""
        # Two processes on different machines may have the same process ID. The random part of the name
        # distinguishes the processes.
        holder = f"{os.getpid()} on {platform.node()}\n{uuid.uuid4().hex}\n"
        try:
            with disk_errors(self.path):
                self._lock = FileLock(self.path / ".lock", holder)
        except Locked as e:
            got = f"{self.path} is being written by process {e}"
            raise RunError(f"{got}; wait until that process ends, or give another --out") from None

    def check(self) -> None:
        """Raise RunError if this process has lost the lock.

        A file server drops the locks of a machine that it cannot reach. Another process may then lock the
        directory and write its own name into the file .lock.
        """
        if not self._lock:
            return
        try:
            holder = self._lock.current_holder()
        except OSError as e:
            got = f"{self.path} was removed ({e.strerror or e}) while this process wrote to it"
            raise RunError(f"{got}; this process has stopped writing files") from e
        if holder != self._lock.holder:
            got = f"{self.path} was taken over by process {first_line(holder)}"
            raise RunError(f"{got}; this process has stopped writing files")

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        self.check()
        write_json(self.path / name, value)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a binary file atomically."""
        self.check()
        write_bytes(self.path / name, data)

    def log(self, name: str) -> RowLog:
        """Open a log for appending."""
        return RowLog(self.path / name, self.check)

    def release(self) -> None:
        """Release the lock, if this process holds it."""
        if self._lock:
            self._lock.release()
            self._lock = None


def open_run(out: Path, cfg: TrainConfig, fresh: bool = False) -> RunDir:
    """Create and lock the run directory of a config in the folder `out`.

    fresh: whether to remove the files that earlier sessions of the run wrote.
    """
    run = RunDir(Path(out) / cfg.run_id)
    if os.path.lexists(run.path) and not run.path.is_dir():
        raise RunError(f"{run.path} is not a folder; remove it, or give another --out")
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    check_files(run, fresh)
    run.lock()
    try:
        if fresh:
            _remove_written(run)
        else:
            check_same_config(run, cfg)
    except BaseException:
        run.release()
        raise
    return run


def _remove_written(run: RunDir) -> None:
    """Remove the files that earlier sessions of the run wrote. Files that mainrun did not write are kept."""
    strays = sorted(path.name for path in run.path.iterdir() if path.name not in WRITTEN)
    if strays and not _is_run(run):
        raise RunError(_not_a_run(run, strays))
    with disk_errors(run.path):
        for path in run.path.iterdir():
            if path.name not in WRITTEN or path.name == ".lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_run(run: RunDir) -> bool:
    """Return whether the folder contains a run, possibly from another version of mainrun."""
    try:
        return {"config", "digest"} <= run.config_file().keys()
    except RunError:
        return False


def _not_a_run(run: RunDir, strays: list[str]) -> str:
    got = f"{run.path} contains {', '.join(strays[:3])} but no run of mainrun"
    return f"{got}; move the folder away, or give another --out"


# -- checks before writing


def check_files(run: RunDir, fresh: bool = False) -> None:
    """Raise RunError if a file of the run is a folder or a pipe.

    fresh: whether to check only the lock file, because all other files of the run will be removed.
    """
    check_regular_file(run.path / ".lock", "remove it")
    if fresh:
        return
    for name in FILES:
        check_regular_file(run.path / name, run.fix)
    if os.path.lexists(run.checkpoints) and not run.checkpoints.is_dir():
        raise RunError(f"{run.checkpoints} is damaged: it is not a folder; {run.fix}")


def check_regular_file(path: Path, fix: str = FIX) -> None:
    """Raise RunError if a path exists and is not a regular file."""
    if not os.path.lexists(path):
        return
    why = inputs.not_a_file(path)
    if why:
        raise RunError(f"{path} is damaged: it {why.partition('; ')[0]}; {fix}")


def check_writable(out: Path) -> None:
    """Raise RunError if a folder cannot be created or written. This check does not create the folder."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise RunError(f"cannot write {out}: {existing} is not a folder; choose a writable folder with --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        got = f"cannot write {out}: no permission to write in {existing}"
        raise RunError(f"{got}; choose a writable folder with --out")


def check_same_data(run: RunDir, fingerprints: dict[str, Any]) -> None:
    """Raise RunError if the corpus or the start of a run has changed.

    fingerprints: the current hashes of the corpus and the start, in the format of config.json.
    """
    recorded = run.config_file()
    for name, current in fingerprints.items():
        if not recorded or recorded.get(name) == current:
            continue
        if name == "start":
            got = f"the weights that {run.path} starts from have changed since the run began"
            raise RunError(f"{got}; restore them, or use --fresh to start over")
        got = f"the corpus of {run.path} has changed: its {name} differ from config.json"
        raise RunError(f"{got}; restore the corpus, or use --fresh to start over")


def check_same_config(run: RunDir, cfg: TrainConfig) -> None:
    """Raise RunError if a directory contains the run of another config, or files of another program."""
    if not os.path.lexists(run.path / "config.json"):
        strays = sorted(path.name for path in run.path.iterdir() if not path.name.startswith("."))
        if strays:
            raise RunError(_not_a_run(run, strays))
        return
    stored = run.config().model_dump()
    requested = cfg.model_dump()
    differences = [
        f"{key}={stored[key]!r} (requested: {value!r})"
        for key, value in requested.items()
        if stored[key] != value
    ]
    if differences:
        got = f"{run.path} contains a run with another config: {', '.join(differences)}"
        raise RunError(f"{got}; give another --out, or use --fresh to overwrite the run")


def find(name: str | Path, out: Path = Path("runs")) -> RunDir:
    """Find a run by its path, its id, or a unique prefix of its id."""
    if not str(name):
        allowed = "give a run id, the first characters of a run id, or a run directory"
        raise UsageError(f"the name of the run is empty; {allowed} (runs are searched in {out})")
    if os.path.lexists(Path(name) / "config.json"):
        return RunDir(Path(name))
    ids = sorted(file.parent.name for file in Path(out).glob("*/config.json"))
    if str(name) in ids:
        return RunDir(Path(out) / name)
    matches = [run_id for run_id in ids if run_id.startswith(str(name))]
    if len(matches) == 1:
        return RunDir(Path(out) / matches[0])
    if matches:
        got = f"run {str(name)!r} is not unique in {out}: {', '.join(matches[:5])}"
        raise RunError(f"{got}; give more characters of the id")
    similar = difflib.get_close_matches(str(name), ids, n=3, cutoff=0.3) or ids[-3:]
    if similar:
        hint = f"runs in {out}: {', '.join(similar)}"
    else:
        hint = f"{out} contains no runs yet; `mainrun train` creates one"
    raise RunError(f"no run {str(name)!r} in {out}, and no run directory at the path {str(name)!r}; {hint}")
