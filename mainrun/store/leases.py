"""A lease records which process is training the steps up to a stored state, so that others wait for it.

A lease is a file with the name leases/KEY.TOKEN, which is created exactly once. The process that holds the
lease rewrites the lease file every few seconds with an incremented heartbeat count. Other processes measure
the time between heartbeats with their own clocks, so the clocks of two machines need not agree. When the
heartbeats stop for `ttl` seconds, or the process that holds the lease is known to be dead, another process
can take over the lease. To take over a lease, a process creates a lease file with the next token. The
previous holder of the lease may then no longer write the node. This module does not import torch.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mainrun.files.hashing import canonical_json
from mainrun.store.files import Files
from mainrun.store.nodes import Refused

TTL = 30.0  # the number of seconds after which a lease without heartbeats expires
HEARTBEATS_PER_TTL = 4


class Fenced(Refused):
    """Raised when another process has taken over a lease of this process."""


def lease_name(key: str, token: int) -> str:
    return f"leases/{key}.{token:06d}"


@dataclass
class Lease:
    """A lease that this process holds. Each takeover increments the lease token."""

    leases: Leases
    key: str
    token: int
    info: dict[str, Any]  # the identity of this process, its run, and the steps that the process trains
    # This function is called at each heartbeat, and its result is written to the lease file.
    status: Callable[[], dict[str, Any]]
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return lease_name(self.key, self.token)

    def start(self) -> None:
        """Start a thread that writes the heartbeats."""
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self.leases.ttl / HEARTBEATS_PER_TTL):
            count += 1
            # If this process cannot write heartbeats, another process may take over the lease. `check` then
            # detects the takeover.
            try:
                content = canonical_json(self.info | self.status() | {"beat": count})
                # Heartbeats are not synced to disk. After a power failure, this process no longer runs, so a
                # lost heartbeat does no harm.
                self.leases.files.write(self.name, content, sync=False)
            except OSError:
                continue

    def check(self) -> None:
        """Raise Fenced if another process has taken over this lease."""
        newest = max(self.leases.tokens().get(self.key, [self.token]))
        if newest > self.token:
            tokens = f"the lease has token {newest}, this process has token {self.token}"
            raise Fenced(f"another process has taken over these steps ({tokens})")

    def release(self, *, unfinished: bool = False) -> None:
        """End the lease.

        unfinished: true if the node was not written. In this case, the lease file is kept, so that the next
        holder gets a higher token.
        """
        self._stop.set()
        if self._thread:
            self._thread.join()
        try:
            tokens = self.leases.tokens().get(self.key, [])
            if unfinished and self.token == max(tokens, default=0):
                self.leases.files.write(self.name, canonical_json({"released": True}))
                return
            for token in tokens:
                if token <= self.token:
                    self.leases.files.remove(lease_name(self.key, token))
        except OSError:
            pass  # the lease will expire, because its heartbeats have stopped


class Leases:
    """All leases of a store."""

    def __init__(self, files: Files, ttl: float = TTL) -> None:
        self.files = files
        self.ttl = ttl
        # The content of each lease file, and the time at which this process first read the content.
        self._seen: dict[str, tuple[bytes, float]] = {}

    def tokens(self) -> dict[str, list[int]]:
        """Return all tokens of each key that has a lease, including expired leases."""
        tokens: dict[str, list[int]] = {}
        for name in self.files.names("leases"):
            key, _, token = name.partition(".")
            if token.isdecimal():
                tokens.setdefault(key, []).append(int(token))
        return tokens

    def _holder(self, key: str, token: int) -> dict[str, Any] | None:
        """Return the information about the lease holder in a lease file, or None if the lease has ended."""
        name = lease_name(key, token)
        try:
            content = self.files.read(name)
        except FileNotFoundError:
            return None
        except OSError:
            content = b""
        info = {}
        released = False
        # If a lease file cannot be parsed, only changes to the file show that the lease holder is alive.
        try:
            parsed = json.loads(content)
            released = bool(parsed.get("released")) or is_dead(parsed)
            info = parsed
        except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError):
            pass
        now = time.monotonic()
        before, since = self._seen.get(name, (b"", now))
        if content != before:
            since = now
        self._seen[name] = (content, since)
        expired = now - since > self.ttl
        return None if released or expired else info

    def acquire(self, key: str, status: Callable[[], dict[str, Any]] = dict, **info: Any) -> Lease | None:
        """Return the lease on a key, or None if another process holds the lease.

        status: a function that is called at each heartbeat. Its result is written to the lease file.
        info: additional values that are written to the lease file.
        """
        tokens = self.tokens().get(key, [])
        newest = max(tokens, default=0)
        if newest and self._holder(key, newest) is not None:
            return None
        lease = Lease(self, key, newest + 1, this_process() | info, status)
        if not self.files.create(lease.name, canonical_json(lease.info | lease.status())):
            return None  # another process has just acquired the lease
        # Other processes may have acquired and released this lease since `tokens` was read.
        if max(self.tokens().get(key, [])) > lease.token:
            self.files.remove(lease.name)
            return None
        for token in tokens:
            self.files.remove(lease_name(key, token))
        lease.start()
        return lease

    def active(self) -> dict[str, dict[str, Any]]:
        """Return a dict that maps the key of every active lease to information about the lease holder."""
        holders = {}
        for key, tokens in self.tokens().items():
            holder = self._holder(key, max(tokens))
            if holder is not None:
                holders[key] = holder
        return holders


# -- processes


@cache
def _boot() -> str:
    """Return an identifier of this machine's current boot, or an empty string if there is no identifier."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        process_numbers = os.readlink("/proc/self/ns/pid")  # process IDs are unique within this namespace
    except OSError:
        return ""
    return f"{platform.node()} {boot} {process_numbers}"


def _start_time(pid: int) -> str:
    """Return the start time of a process, or an empty string if the process is dead or unknown.

    The start time distinguishes two processes that had the same process ID at different times.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def this_process() -> dict[str, Any]:
    """Return the identity of this process. `is_dead` checks whether the process is still alive."""
    return {"boot": _boot(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def is_dead(process: dict[str, Any]) -> bool:
    """Return whether a process is known to be dead.

    The result can be true only for processes that started on this machine since its last boot.
    """
    if not process.get("boot") or process["boot"] != _boot():
        return False
    return _start_time(int(process["pid"])) != process["started"]
