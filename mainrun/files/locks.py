"""Exclusive file locks between processes."""

from __future__ import annotations

import fcntl
from pathlib import Path


class Locked(Exception):
    """Raised if another process holds the lock. The message is the first line of the lock file."""


class FileLock:
    """An exclusive lock on a file. The lock file contains the name of the process that holds the lock.

    The process holds the lock until it calls `release` or ends.
    """

    def __init__(self, path: Path, holder: str) -> None:
        """Acquire the lock, and write `holder` to the lock file.

        Raise `Locked` if another process holds the lock.
        """
        self.path = path
        self.holder = holder
        # The file is opened without a buffer. On a full disk, closing a buffered file would fail, because
        # Python would try to write `holder` again.
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
        """Return the content of the lock file, which names another process if this one has lost the lock."""
        return self.path.read_text(encoding="utf-8", errors="replace")

    def release(self) -> None:
        """Release the lock without deleting the file."""
        self._file.close()


def first_line(holder: str) -> str:
    """Return the first line of a lock file, which names the process and, if known, the machine."""
    return holder.partition("\n")[0].strip()
