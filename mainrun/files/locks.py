"""Exclusive locks between processes, on files."""

from __future__ import annotations

import fcntl
from pathlib import Path


class Locked(Exception):
    """Another process holds the lock. The message is the first line of the lock file: the holder."""


class FileLock:
    """An exclusive lock on a file, which names the holder. It lasts until `release` or the process ends."""

    def __init__(self, path: Path, holder: str) -> None:
        """Acquire the lock and write `holder` into the file. Raise `Locked` if another process holds it."""
        self.path = path
        self.holder = holder
        # Unbuffered: text that a full disk refused must not be written again when the file is closed.
        self._file = path.open("a+b", buffering=0)
        try:
            self._acquire()
        except BaseException:
            self.release()
            raise

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            raise Locked(first_line(self._file.read().decode(errors="replace"))) from None
        self._file.truncate(0)
        self._file.write(self.holder.encode())

    def current_holder(self) -> str:
        """Return the holder that the file names. It is another one if this process has lost the lock."""
        return self.path.read_text(encoding="utf-8", errors="replace")

    def release(self) -> None:
        """Release the lock. The file is kept."""
        self._file.close()


def first_line(holder: str) -> str:
    """Return the first line of a lock file's content: the process, and its machine if known."""
    return holder.partition("\n")[0].strip()
