"""Leases, which record which process is training the steps up to a node.

A lease is a file leases/KEY.TOKEN, which is created exactly once. The process that holds the lease rewrites
the file every few seconds with a heartbeat count. Other processes time these heartbeats with their own
clocks, so the clocks of two machines need not agree. When the heartbeats stop for `ttl` seconds, or the
holder is known to be dead, another process takes over the lease. It creates the file with the next token. The
previous holder may then no longer write the node. This module does not import torch.
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

TTL = 30.0  # seconds after which a lease without heartbeats expires
HEARTBEATS_PER_TTL = 4


class Fenced(Refused):
    """Another process has taken over the lease of this process."""


def lease_name(key: str, token: int) -> str:
    return f"leases/{key}.{token:06d}"


@dataclass
class Lease:
    """A lease that this process holds. Each takeover increments the token."""

    leases: Leases
    key: str
    token: int
    info: dict[str, Any]  # the identity of this process, and the run and steps that it trains
    status: Callable[[], dict[str, Any]]  # called at each heartbeat; the result is written into the lease
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
            # While the store cannot be written, another process may take over the lease. `check` detects
            # that.
            try:
                content = canonical_json(self.info | self.status() | {"beat": count})
                # A heartbeat is not synced to disk, because a power failure also ends the holder of the
                # lease.
                self.leases.files.write(self.name, content, sync=False)
            except OSError:
                continue

    def check(self) -> None:
        """Raise Fenced if another process has taken over this lease."""
        newest = max(self.leases.tokens().get(self.key, [self.token]))
        if newest > self.token:
            tokens = f"token {newest}, this process has {self.token}"
            raise Fenced(f"another process has taken over these steps ({tokens})")

    def release(self, *, unfinished: bool = False) -> None:
        """End the lease.

        unfinished: the node was not written. The file of the lease stays, so that the next holder gets a
        higher token.
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
            pass  # the lease expires, because its heartbeats have stopped


class Leases:
    """All leases of a store."""

    def __init__(self, files: Files, ttl: float = TTL) -> None:
        self.files = files
        self.ttl = ttl
        # For each lease: its content, and the time at which this process first read that content.
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
        """Return the recorded information about the holder of a lease, or None if the lease has ended."""
        name = lease_name(key, token)
        try:
            content = self.files.read(name)
        except FileNotFoundError:
            return None
        except OSError:
            content = b""
        info = {}
        released = False
        # If the content of a lease cannot be parsed, only its heartbeats count.
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
        """Return the lease on a key, or None if another process holds it.

        status: called at each heartbeat. Its result is written into the lease.
        info: more values that are written into the lease.
        """
        tokens = self.tokens().get(key, [])
        newest = max(tokens, default=0)
        if newest and self._holder(key, newest) is not None:
            return None
        lease = Lease(self, key, newest + 1, this_process() | info, status)
        if not self.files.create(lease.name, canonical_json(lease.info | lease.status())):
            return None  # another process has acquired the lease
        # Since `tokens` was read, other processes may have acquired and released this lease.
        if max(self.tokens().get(key, [])) > lease.token:
            self.files.remove(lease.name)
            return None
        for token in tokens:
            self.files.remove(lease_name(key, token))
        lease.start()
        return lease

    def active(self) -> dict[str, dict[str, Any]]:
        """Return a dict from the key of every active lease to the information about its holder."""
        holders = {}
        for key, tokens in self.tokens().items():
            holder = self._holder(key, max(tokens))
            if holder is not None:
                holders[key] = holder
        return holders


# -- processes


@cache
def _boot() -> str:
    """Return a text that identifies the current boot of this machine, or an empty text if it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        process_numbers = os.readlink("/proc/self/ns/pid")  # process numbers are unique within this namespace
    except OSError:
        return ""
    return f"{platform.node()} {boot} {process_numbers}"


def _start_time(pid: int) -> str:
    """Return when a process started, or an empty text if the process is dead or unknown.

    The start time distinguishes two processes that have had the same number.
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

    This is known only for processes that started on this machine since its last boot.
    """
    if not process.get("boot") or process["boot"] != _boot():
        return False
    return _start_time(int(process["pid"])) != process["started"]
