"""Where a store keeps its files: a folder, or any place that fsspec knows (`s3://bucket/store`, `memory://store`). No torch.

Both have the same few verbs, and each is whole or not at all: `write` replaces, `create` is refused when the name is taken (that
is what leases and nodes stand on), `put` moves a finished file in.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from mainrun.errors import ConfigError
from mainrun.store.records import open_file
from mainrun.store.rundir import fsync_folder

USED = ".used"  # a name with this says when the one without was used


class Entry(NamedTuple):
    size: int
    modified: float  # seconds since 1970


class Folder:
    """A folder on disk. What is written is synced, unless it says otherwise."""

    def __init__(self, place: Path) -> None:
        self.place = Path(place)

    def __str__(self) -> str:
        return str(self.place)

    def read(self, name: str) -> bytes:
        with open_file(self.place / name) as f:
            return f.read()

    def first_line(self, name: str) -> bytes:
        with open_file(self.place / name) as f:
            return f.readline()

    def write(self, name: str, data: bytes, *, sync: bool = True) -> None:
        with self._temp(name) as temp:
            _write(temp, data, sync)
            temp.replace(self.place / name)
        if sync:
            fsync_folder((self.place / name).parent)

    def create(self, name: str, data: bytes) -> bool:
        """False when there is such a file already; it is then untouched."""
        with self._temp(name) as temp:
            _write(temp, data, sync=True)
            try:
                os.link(
                    temp, self.place / name
                )  # a rename would replace; a link does not, and shows the file whole
            except FileExistsError:
                return False
            except OSError as e:
                if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise
                try:  # a file system without links
                    with (self.place / name).open("xb") as f:
                        f.write(data)
                except FileExistsError:
                    return False
        fsync_folder((self.place / name).parent)
        return True

    @contextmanager
    def new(self) -> Iterator[Path]:
        """A path on this machine to write a file at, for `put`; gone afterwards."""
        with self._temp("new") as temp:
            yield temp

    def put(self, file: Path, name: str) -> None:
        with file.open("rb") as f:
            os.fsync(f.fileno())
        folder = (self.place / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        file.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that nobody else may read
        file.replace(self.place / name)
        fsync_folder(folder)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A path on this machine to read the file at."""
        yield self.place / name

    def list(self, folder: str) -> dict[str, Entry]:
        found = {}
        try:
            with os.scandir(self.place / folder) as entries:
                for entry in entries:
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:  # just now
                        continue
                    except OSError:  # a link that leads back to itself
                        stat = entry.stat(follow_symlinks=False)
                    found[entry.name] = Entry(stat.st_size, stat.st_mtime)
        except FileNotFoundError:
            pass
        return found

    def names(self, folder: str) -> set[str]:
        try:
            return set(os.listdir(self.place / folder))
        except FileNotFoundError:
            return set()

    def exists(self, name: str) -> bool:
        return (self.place / name).exists()

    def remove(self, name: str) -> None:
        path = self.place / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def touch(self, name: str) -> None:
        os.utime(self.place / name)

    @contextmanager
    def _temp(self, name: str) -> Iterator[Path]:
        """Beside where it will be, so that a rename is enough. Not one of tempfile's, which nobody else may read."""
        folder = self.place / "new"
        (self.place / name).parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes, sync: bool) -> None:
    with path.open("wb") as f:
        f.write(data)
        if sync:
            f.flush()
            os.fsync(f.fileno())


class Remote:
    """The same on anything that fsspec opens. One object is written at once, so it is there whole or not at all."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as e:
            raise ConfigError(
                f"store {url!r} cannot be opened ({e}); give a folder or a place that fsspec knows"
            ) from None
        self.fs, self.url = _OSErrors(fs), url

    def __str__(self) -> str:
        return self.url

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _fresh(self, name: str) -> str:
        """Other machines write here too, so no listing of a moment ago is believed."""
        self.fs.invalidate_cache()
        return self._path(name)

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self._path(name))

    def first_line(self, name: str) -> bytes:
        return self.read(name).partition(b"\n")[0] + b"\n"

    def write(self, name: str, data: bytes, *, sync: bool = True) -> None:
        self._parent(name)
        self.fs.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        self._parent(name)
        try:
            self.fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def _parent(self, name: str) -> None:
        self.fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    @contextmanager
    def new(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mainrun-") as folder:
            yield Path(folder) / "new"

    def put(self, file: Path, name: str) -> None:
        self._parent(name)
        self.fs.put_file(str(file), self._path(name))

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with self.new() as path:
            self.fs.get_file(self._path(name), str(path))
            yield path

    def list(self, folder: str) -> dict[str, Entry]:
        try:
            rows = self.fs.ls(self._fresh(folder), detail=True)
        except FileNotFoundError:
            return {}
        found = {row["name"].rpartition("/")[2]: Entry(row.get("size") or 0, _modified(row)) for row in rows}
        marks = {name.removesuffix(USED): found.pop(name) for name in sorted(found) if name.endswith(USED)}
        return {
            name: Entry(entry.size, max(entry.modified, marks.get(name, entry).modified))
            for name, entry in found.items()
        }

    def names(self, folder: str) -> set[str]:
        return set(self.list(folder))

    def exists(self, name: str) -> bool:
        return self.fs.exists(self._fresh(name))

    def remove(self, name: str) -> None:
        for path in (name, name + USED):
            with suppress(FileNotFoundError):
                self.fs.rm(self._fresh(path), recursive=True)

    def touch(self, name: str) -> None:
        """By a mark beside it: an object is dated anew only by writing all of it."""
        self.write(name + USED, b"")


class _OSErrors:
    """The verbs of one of fsspec's places. Each has errors of its own for a network or a key that fails; here they are all OSErrors."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Callable[..., Any]:
        verb = getattr(self._fs, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return verb(*args, **kwargs)
            except OSError:
                raise
            except Exception as e:
                raise OSError(errno.EIO, f"{type(e).__name__}: {e}") from e

        return call


def _modified(row: dict[str, Any]) -> float:
    """Each of fsspec's places has its own word for it."""
    for word in ("mtime", "LastModified", "last_modified", "updated", "created"):
        if (found := row.get(word)) is not None:
            return float(found.timestamp() if hasattr(found, "timestamp") else found)
    return time.time()


Files = Folder | Remote


def open_files(place: str | Path) -> Files:
    folder = folder_of(place)
    return Remote(str(place)) if folder is None else Folder(folder)


def folder_of(place: str | Path) -> Path | None:
    """Where on this machine a place is; None for one that fsspec opens.

    It could open folders too, but would neither exclude nor replace there: it opens a file and writes into it.
    """
    scheme, colon, path = str(place).partition(":")
    if colon and scheme in ("file", "local"):  # with none, one or three slashes
        return Path(path.removeprefix("//")).expanduser()
    return None if "://" in str(place) else Path(place).expanduser()
