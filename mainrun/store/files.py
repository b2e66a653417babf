"""Read and write the files of a store.

`Folder` is a store in a local folder. `Remote` is a store at any URL that fsspec can open, such as
s3://bucket/store. Both classes have the same methods, and all their writes are atomic. `write` replaces a
file. `create` never changes an existing file, which leases and nodes rely on. `put` moves a
finished file into the store. This module does not import torch.
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
from mainrun.files.inputs import open_file
from mainrun.store.rundir import fsync_folder

USED = ".used"  # the modification time of NAME.used is the time at which the file NAME was last used


class Entry(NamedTuple):
    """The size and the modification time of a file."""

    size: int
    modified: float  # the modification time of the file, in seconds since 1970


class Folder:
    """The files of a store in a local folder. Files are synced to disk after they are written."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with open_file(self.path / name) as f:
            return f.read()

    def first_line(self, name: str) -> bytes:
        """Return the first line of a file."""
        with open_file(self.path / name) as f:
            return f.readline()

    def write(self, name: str, data: bytes, *, sync: bool = True) -> None:
        """Create or replace a file."""
        with self._temp(name) as temp:
            _write(temp, data, sync)
            temp.replace(self.path / name)
        if sync:
            fsync_folder((self.path / name).parent)

    def create(self, name: str, data: bytes) -> bool:
        """Create a file and return True. If the file exists, leave it unchanged and return False."""
        with self._temp(name) as temp:
            _write(temp, data, sync=True)
            try:
                # Creating a hard link is atomic, like renaming a file. Unlike a rename, creating a link never
                # replaces an existing file.
                os.link(temp, self.path / name)
            except FileExistsError:
                return False
            except OSError as e:
                if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise
                if not self._create_without_link(name, data):
                    return False
        fsync_folder((self.path / name).parent)
        return True

    def _create_without_link(self, name: str, data: bytes) -> bool:
        """Create a file on a file system that does not support hard links."""
        try:
            with (self.path / name).open("xb") as f:
                f.write(data)
        except FileExistsError:
            return False
        return True

    @contextmanager
    def new(self) -> Iterator[Path]:
        """Yield a temporary local path for a file that `put` will store. The file is removed afterwards."""
        with self._temp("new") as temp:
            yield temp

    def put(self, file: Path, name: str) -> None:
        """Move a finished file into the store under a name.

        An existing file with the same name is replaced.
        """
        with file.open("rb") as f:
            os.fsync(f.fileno())
        folder = (self.path / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        file.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that other users cannot read
        file.replace(self.path / name)
        fsync_folder(folder)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Yield a local path from which the file can be read."""
        yield self.path / name

    def list(self, folder: str) -> dict[str, Entry]:
        """Return the size of every file in a folder, and the time at which the file was last used."""
        files: dict[str, Entry] = {}
        try:
            with os.scandir(self.path / folder) as entries:
                for entry in entries:
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:  # another process has just removed the file
                        continue
                    # The file is unusable, for example because it is a symbolic link to itself.
                    except OSError:
                        stat = entry.stat(follow_symlinks=False)
                    files[entry.name] = Entry(stat.st_size, stat.st_mtime)
        except FileNotFoundError:
            pass
        return files

    def names(self, folder: str) -> set[str]:
        """Return the names of all files in a folder."""
        try:
            return set(os.listdir(self.path / folder))
        except FileNotFoundError:
            return set()

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def remove(self, name: str) -> None:
        """Remove the file or folder with the given name, if it exists."""
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def touch(self, name: str) -> None:
        """Record that a file has just been used."""
        os.utime(self.path / name)

    @contextmanager
    def _temp(self, name: str) -> Iterator[Path]:
        """Yield a temporary path in the store. A file at this path can be renamed to its final name.

        The module `tempfile` is not used, because it creates files that other users cannot read.
        """
        folder = self.path / "new"
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
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
    """The files of a store at a URL that fsspec can open.

    An object store makes an object visible only after the whole object was written, so every write is atomic.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as e:
            allowed = "give a folder, or a URL that fsspec can open"
            raise ConfigError(f"store {url!r} cannot be opened ({e}); {allowed}") from None
        self.root = root
        self.fs = _OSErrors(fs)
        self.url = url

    def __str__(self) -> str:
        return self.url

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _refresh(self) -> None:
        """Drop the folder listings that fsspec caches, because other machines also write to the store."""
        self.fs.invalidate_cache()

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
            self._refresh()
            rows = self.fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        entries: dict[str, Entry] = {}
        for row in rows:
            name = row["name"].rpartition("/")[2]
            entries[name] = Entry(row.get("size") or 0, _modified(row))
        files: dict[str, Entry] = {}
        for name, entry in entries.items():
            if not name.endswith(USED):
                used = entries.get(name + USED, entry)
                files[name] = Entry(entry.size, max(entry.modified, used.modified))
        return files

    def names(self, folder: str) -> set[str]:
        return set(self.list(folder))

    def exists(self, name: str) -> bool:
        self._refresh()
        return self.fs.exists(self._path(name))

    def remove(self, name: str) -> None:
        for path in (name, name + USED):
            self._refresh()
            with suppress(FileNotFoundError):
                self.fs.rm(self._path(path), recursive=True)

    def touch(self, name: str) -> None:
        # The modification time of an object changes only when the object is written again. To record a use,
        # write an empty file NAME.used instead.
        self.write(name + USED, b"")


class _OSErrors:
    """Wrap an fsspec file system and convert all its errors to OSError.

    Each fsspec file system has its own exception types for network errors.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._fs, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except OSError:
                raise
            except Exception as e:
                raise OSError(errno.EIO, f"{type(e).__name__}: {e}") from e

        return call


def _modified(row: dict[str, Any]) -> float:
    """Return the modification time of a file. The key for this time depends on the file system."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        modified = row.get(key)
        if modified is None:
            continue
        if hasattr(modified, "timestamp"):
            modified = modified.timestamp()
        return float(modified)
    return time.time()


Files = Folder | Remote


def open_files(place: str | Path) -> Files:
    """Return an object that reads and writes the files of a store.

    place: a folder, or a URL that fsspec can open.
    """
    folder = folder_of(place)
    if folder is None:
        return Remote(str(place))
    return Folder(folder)


def folder_of(place: str | Path) -> Path | None:
    """Return the path of a local folder, or None if `place` is a URL that fsspec must open.

    fsspec is not used for local folders, because fsspec does not write local files atomically.
    """
    scheme, colon, path = str(place).partition(":")
    if colon and scheme in ("file", "local"):  # zero, one or three slashes may follow the colon of a file URL
        return Path(path.removeprefix("//")).expanduser()
    if "://" in str(place):
        return None
    return Path(place).expanduser()
