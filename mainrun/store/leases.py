"""Leases: which process is training the steps up to a node. No torch.

A lease is a file leases/KEY.TOKEN, which is created exactly once. Its holder rewrites it every few seconds
with a heartbeat count. Other processes time these heartbeats with their own clocks, so the clocks of two
machines need not agree. When the heartbeats stop for `ttl` seconds, or the holder is known to be dead,
another process takes over by creating the file with the next token. A holder that returns later may not write
the node.
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

TTL = 30.0  # seconds
HEARTBEATS_PER_TTL = 4


class Fenced(Refused):
    """Another process has taken over the lease."""


def lease_name(key: str, token: int) -> str:
    return f"leases/{key}.{token:06d}"


@dataclass
class Lease:
    """A lease that this process holds. Each takeover increments the token."""

    leases: Leases
    key: str
    token: int
    info: dict[str, Any]  # the holder, and what it trains
    status: Callable[[], dict[str, Any]]  # called at each heartbeat; its result is written into the lease
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return lease_name(self.key, self.token)

    def start(self) -> None:
        """Start the heartbeats, in a thread."""
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self.leases.ttl / HEARTBEATS_PER_TTL):
            count += 1
            # While the store cannot be written, others may take over. `check` notices that.
            try:
                content = canonical_json(self.info | self.status() | {"beat": count})
                # Not synced: after a power failure, no process trains anyway.
                self.leases.files.write(self.name, content, sync=False)
            except OSError:
                continue

    def check(self) -> None:
        """Raise Fenced if another process has taken over."""
        newest = max(self.leases.tokens().get(self.key, [self.token]))
        if newest > self.token:
            tokens = f"token {newest}, this process has {self.token}"
            raise Fenced(f"another process has taken over these steps ({tokens})")

    def release(self, *, unfinished: bool = False) -> None:
        """End the lease. unfinished: the node was not written, so the next holder needs a higher token."""
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
            pass  # without heartbeats the lease expires


class Leases:
    """All leases of a store, as this process sees them."""

    def __init__(self, files: Files, ttl: float = TTL) -> None:
        self.files = files
        self.ttl = ttl
        # name -> content, and since when it has not changed, by this process's clock
        self._seen: dict[str, tuple[bytes, float]] = {}

    def tokens(self) -> dict[str, list[int]]:
        """Return the tokens of each key that is or was leased."""
        tokens: dict[str, list[int]] = {}
        for name in self.files.names("leases"):
            key, _, token = name.partition(".")
            if token.isdecimal():
                tokens.setdefault(key, []).append(int(token))
        return tokens

    def _holder(self, key: str, token: int) -> dict[str, Any] | None:
        """Return what a lease says about its holder, or None if it is no longer held."""
        name = lease_name(key, token)
        try:
            content = self.files.read(name)
        except FileNotFoundError:
            return None
        except OSError:
            content = b""
        info = {}
        released = False
        # A torn lease is judged by its heartbeats alone.
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

        status: called at each heartbeat; its result is written into the lease.
        info: written into the lease, with the holder.
        """
        tokens = self.tokens().get(key, [])
        newest = max(tokens, default=0)
        if newest and self._holder(key, newest) is not None:
            return None
        lease = Lease(self, key, newest + 1, this_process() | info, status)
        if not self.files.create(lease.name, canonical_json(lease.info | lease.status())):
            return None  # another process was faster
        if max(self.tokens().get(key, [])) > lease.token:  # others have come and gone since the first look
            self.files.remove(lease.name)
            return None
        for token in tokens:
            self.files.remove(lease_name(key, token))
        lease.start()
        return lease

    def active(self) -> dict[str, dict[str, Any]]:
        """Return key -> holder of every lease that is held."""
        holders = {}
        for key, tokens in self.tokens().items():
            holder = self._holder(key, max(tokens))
            if holder is not None:
                holders[key] = holder
        return holders


# -- processes


@cache
def _boot() -> str:
    """Identify this boot of this machine. Return an empty text if the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        process_numbers = os.readlink("/proc/self/ns/pid")  # a container has its own
    except OSError:
        return ""
    return f"{platform.node()} {boot} {process_numbers}"


def _start_time(pid: int) -> str:
    """Return when a process started, because numbers are reused; an empty text if it is dead or unknown."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def this_process() -> dict[str, Any]:
    """Return an identity of this process by which others can tell whether it is alive."""
    return {"boot": _boot(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def is_dead(process: dict[str, Any]) -> bool:
    """Whether a process is known to be dead: one of this machine, since its last boot, that has ended."""
    if not process.get("boot") or process["boot"] != _boot():
        return False
    return _start_time(int(process["pid"])) != process["started"]
