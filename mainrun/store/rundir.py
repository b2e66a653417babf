"""The run directory: the one door between a training and everything that reads it. No torch.

    config.json  env.json  status.json  metrics.jsonl  summary.json  tokenizer.json  checkpoints/

JSON files are replaced whole or not at all; metrics.jsonl is append-only and cut back to the checkpoint on resume.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mainrun.config import TrainConfig, digest_of, from_dict
from mainrun.errors import ConfigError, DiskFull, RunError, UsageError
from mainrun.files import inputs
from mainrun.files.inputs import BadInput
from mainrun.store import records

FIX = "restore it, or train the run again with --fresh"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(path: Path, option: str = "--out") -> Iterator[None]:
    """A full disk and an unwritable place become errors that say so. `option` is the one that gave the path."""
    try:
        yield
    except OSError as e:
        if e.errno in FULL:
            raise DiskFull(
                f"no space left to write {path} ({e.strerror}); free some and start the same command again, it goes on"
            ) from e
        raise RunError(
            f"cannot write {path}: {e.strerror or e}; choose a writable folder with {option}"
        ) from e


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value))


def write_text(path: Path, text: str) -> None:
    """All of it or nothing: temp file, fsync, rename."""
    temp = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with temp.open("w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            temp.replace(path)
            fsync_folder(path.parent)
        finally:
            temp.unlink(missing_ok=True)


def fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Metrics:
    """metrics.jsonl as it is written: one row a line, and a running checksum that a checkpoint can hold on to."""

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        self.path, self._check = path, check
        check_place(path)  # to open a pipe would wait for a reader
        with disk_errors(path):
            self._file = path.open(
                "ab", buffering=0
            )  # no buffer: what a full disk refused must not be tried again on closing
        self._sha = hashlib.sha256()
        self._size = 0

    def rewind(self, mark: dict[str, Any]) -> bool:
        """Cut the file back to a mark. False if what is there is not what was marked; the file is then untouched."""
        self._check()
        data = self.path.read_bytes()[: mark["bytes"]]
        sha = hashlib.sha256(data)
        if len(data) != mark["bytes"] or sha.hexdigest() != mark["sha256"]:
            return False
        os.truncate(self.path, mark["bytes"])
        self._sha, self._size = sha, len(data)
        return True

    def append(self, row: dict[str, Any]) -> None:
        self._check()
        line = json.dumps(row).encode() + b"\n"
        with disk_errors(self.path):
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._sha.update(line)
        self._size += len(line)

    def rows(self) -> list[dict[str, Any]]:
        """What the file holds now."""
        return records.load_lines(self.path, records.any_row, FIX)

    def mark(self) -> dict[str, Any]:
        """Where the file stands now, on disk for certain."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
        return {"bytes": self._size, "sha256": self._sha.hexdigest()}

    def close(self) -> None:
        self._file.close()


class RunDir:
    """A run directory, to read. `open_run` gives one to write.

    A file in it that is not as it was written is a RunError with `fix`, what to do about it.
    """

    def __init__(self, path: Path, fix: str = FIX) -> None:
        self.path, self.fix = Path(path), fix
        self._lock: IO[str] | None = None
        self._holder = ""  # what .lock says while it is ours

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _load(self, name: str, shape: records.Shape) -> Any:
        return records.load(self.path / name, shape, self.fix)

    def config(self) -> TrainConfig:
        place = self.path / "config.json"
        data = self._load("config.json", records.anything)
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
            raise RunError(
                f"{self.path} is not a run directory (no usable config.json); give one that `mainrun train` made"
            )
        if data.get("digest") != digest_of(data["config"]):
            raise RunError(f"{place} was changed after the run began; {self.fix}")
        try:
            return from_dict(data["config"])
        except ConfigError as e:
            raise RunError(f"{place} does not hold a config of this version: {e}; {self.fix}") from None

    def begun(self) -> dict[str, Any]:
        """All of config.json: the config, the resolved table, and what the data was."""
        return self._load("config.json", records.CONFIG) or {}

    def plan(self) -> dict[str, Any]:
        """The resolved table."""
        return dict(self.begun().get("plan", {}))

    def summary(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._load("summary.json", records.SUMMARY)
        return found

    def status(self) -> dict[str, Any]:
        return self._load("status.json", records.STATUS) or {}

    def env(self) -> dict[str, Any]:
        return self._load("env.json", records.ENV) or {}

    def metrics(self) -> list[dict[str, Any]]:
        return records.load_lines(self.path / "metrics.jsonl", records.table, self.fix)

    def rows(self) -> list[dict[str, Any]]:
        """The same, and each row has what a row of its kind must have."""
        return records.load_lines(self.path / "metrics.jsonl", records.metric, self.fix)

    def rows_so_far(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl up to the first that is damaged: what comes behind the last checkpoint may be torn."""
        try:
            data = records.read(self.path / "metrics.jsonl", records.LARGEST) or b""
        except BadInput as e:
            raise RunError(f"{self.path}/metrics.jsonl is damaged: it {e}; {self.fix}") from None
        rows: list[dict[str, Any]] = []
        with suppress(BadInput):
            for row in records.lines(data, records.metric):
                rows.append(row)
        return rows

    def journal(self) -> list[dict[str, Any]]:
        """What growth did, an event a row."""
        return records.load_lines(self.path / "growth.jsonl", records.EVENT, self.fix)

    def text(self, name: str) -> str:
        """The text of a JSON file, which must be there."""
        place = self.path / name
        try:
            data = records.read(place)
            if data is None:
                raise RunError(f"{self.path} has no {name}; {self.fix}")
            records.parse(data)
            return data.decode("utf-8")
        except BadInput as e:
            raise RunError(f"{place} is damaged: it {e}; {self.fix}") from None

    def check(self) -> None:
        """A lock can be lost while its holder lives: a file server drops those of a machine that it does not hear.

        Whoever opens the run then writes its own name into .lock, and the one before, should it come back, writes nothing more.
        """
        if self._lock:
            try:
                found = (self.path / ".lock").read_text(encoding="utf-8", errors="replace")
            except OSError as e:
                raise RunError(
                    f"{self.path} was taken away ({e.strerror or e}) while this process wrote it; nothing more is written"
                ) from e
            if found != self._holder:
                raise RunError(
                    f"{self.path} was taken over by process {_name(found)}; this one writes nothing more"
                )

    def write(self, name: str, value: Any) -> None:
        self.check()
        write_json(self.path / name, value)

    def log(self, name: str) -> Metrics:
        return Metrics(self.path / name, self.check)

    def release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None


def open_run(out: Path, cfg: TrainConfig, fresh: bool = False) -> RunDir:
    """The directory of this config below `out`, locked for writing. What is there stays unless `fresh`."""
    run = RunDir(Path(out) / cfg.run_id)
    if os.path.lexists(run.path) and not run.path.is_dir():
        raise RunError(f"{run.path} is not a folder; remove it, or give another --out")
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    check_places(run, fresh)
    with disk_errors(run.path):
        lock = (run.path / ".lock").open("a+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = _name(lock.read())
        lock.close()
        raise RunError(
            f"{run.path} is being written by process {holder}; wait for it, or give another --out"
        ) from None
    run._lock, run._holder = lock, f"{os.getpid()} on {platform.node()}\n{uuid.uuid4().hex}\n"
    try:
        with disk_errors(run.path):
            os.ftruncate(lock.fileno(), 0)
            os.write(
                lock.fileno(), run._holder.encode()
            )  # not through the file's buffer: it would be tried again on closing
        if fresh:
            _forget(run)
        else:
            check_same(run, cfg)
    except BaseException:
        run.release()
        raise
    return run


FILES = (
    "config.json",
    "env.json",
    "status.json",
    "metrics.jsonl",
    "growth.jsonl",
    "summary.json",
    "tokenizer.json",
)
WRITTEN = {*FILES, *(f".{name}.tmp" for name in FILES), "checkpoints", "traceback.txt", ".lock"}


def _forget(run: RunDir) -> None:
    """Remove what an earlier start of the run wrote, and nothing else."""
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
    """Whether a run began in this folder, perhaps one of another version."""
    try:
        return {"config", "digest"} <= run.begun().keys()
    except RunError:
        return False


def _not_a_run(run: RunDir, strays: list[str]) -> str:
    return (
        f"{run.path} holds {', '.join(strays[:3])} but no run of mainrun; move it away, or give another --out"
    )


def check_places(run: RunDir, fresh: bool = False) -> None:
    """Refuse a folder or a pipe in place of a file before anything is written beside it. `fresh` replaces all but the lock."""
    check_place(run.path / ".lock", "remove it")
    if fresh:
        return
    for name in FILES:
        check_place(run.path / name, run.fix)
    if os.path.lexists(run.checkpoints) and not run.checkpoints.is_dir():
        raise RunError(f"{run.checkpoints} is damaged: it is not a folder; {run.fix}")


def check_place(path: Path, fix: str = FIX) -> None:
    """Refuse what is no file where one is to be written."""
    if not os.path.lexists(path):
        return
    why = inputs.not_a_file(path)
    if why:
        raise RunError(f"{path} is damaged: it {why.partition('; ')[0]}; {fix}")


def _name(holder: str) -> str:
    return holder.partition("\n")[0].strip()


def check_writable(out: Path) -> None:
    """Refuse a folder that cannot be made or written, without making it."""
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise RunError(f"cannot write {out}: {there} is not a folder; choose a writable one with --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(
            f"cannot write {out}: no permission to write in {there}; choose a writable folder with --out"
        )


def check_same_data(run: RunDir, titles: dict[str, Any]) -> None:
    """Refuse to go on with other titles or tokens than the run began with: a file behind a config can change."""
    begun = run.begun()
    for name, now in titles.items():
        if begun and begun.get(name) != now:
            raise RunError(
                f"{run.path} was begun with other {name} than its corpus gives now; restore the corpus, or use --fresh to start over"
            )


def check_same(run: RunDir, cfg: TrainConfig) -> None:
    """Refuse a directory that holds something else than this config's run."""
    if not os.path.lexists(run.path / "config.json"):
        strays = sorted(p.name for p in run.path.iterdir() if not p.name.startswith("."))
        if strays:
            raise RunError(_not_a_run(run, strays))
        return
    found, asked = run.config().model_dump(), cfg.model_dump()
    differ = [f"{k}={found[k]!r} (asked: {asked[k]!r})" for k in asked if found[k] != asked[k]]
    if differ:
        what = f"{run.path} holds a run of another config: {', '.join(differ)}"
        raise RunError(f"{what}; give another --out, or --fresh to overwrite it")


def find(name: str | Path, out: Path = Path("runs")) -> RunDir:
    """A run by path, by id, or by the unique beginning of its id."""
    if not str(name):
        raise UsageError(
            f"got an empty run; give a run id, the beginning of one, or a run directory (those in {out} are searched)"
        )
    if os.path.lexists(Path(name) / "config.json"):
        return RunDir(Path(name))
    ids = sorted(p.parent.name for p in Path(out).glob("*/config.json"))
    hits = [i for i in ids if i == str(name)] or [i for i in ids if i.startswith(str(name))]
    if len(hits) == 1:
        return RunDir(Path(out) / hits[0])
    if hits:
        raise RunError(
            f"run {str(name)!r} is not unique in {out}: {', '.join(hits[:5])}; write more of the id"
        )
    near = difflib.get_close_matches(str(name), ids, n=3, cutoff=0.3) or ids[-3:]
    hint = f"there are: {', '.join(near)}" if near else "there are none yet: `mainrun train` makes one"
    raise RunError(f"no run {str(name)!r} in {out} and no run directory of that path; {hint}")
