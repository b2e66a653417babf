"""Who trains the way to a node now. No torch.

A lease is a file leases/KEY.TOKEN that can be created once. Its holder writes it anew every few seconds (a beat). Whoever wants the
same key watches the beats by a clock of its own, so no two machines must agree on the time, and a clock that jumps does no harm:
a lease whose beats have stopped for `ttl` seconds, or whose process is known to be gone, is taken over by creating the next token.
A holder that comes back after that has an old token, and may not publish.
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

from mainrun.store.files import Files
from mainrun.store.nodes import Refused

TTL = 30.0


class Fenced(Refused):
    """Another holder has taken over since."""


@dataclass
class Lease:
    """Held by this process. `token` grows with every change of hands."""

    leases: Leases
    key: str
    token: int
    about: dict[str, Any]
    now: Callable[[], dict[str, Any]]  # what changes from beat to beat
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return f"leases/{self.key}.{self.token:06d}"

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(self.leases.ttl / 4):
            count += 1
            try:
                said = _dump(self.about | self.now() | {"beat": count})
                self.leases.files.write(
                    self.name, said, sync=False
                )  # when the power fails nobody trains either
            except (
                OSError
            ):  # a store that cannot be written for a while: others may take over, and `check` finds it out
                continue

    def check(self) -> None:
        """Raises Fenced when somebody else has taken over since."""
        newest = max(self.leases.tokens().get(self.key, [self.token]))
        if newest > self.token:
            raise Fenced(
                f"another process has taken these steps over since (token {newest}, ours is {self.token})"
            )

    def release(self, *, unfinished: bool = False) -> None:
        """Finished: the node speaks for itself. Unfinished: the token stays behind, so that the next one is higher."""
        self._over.set()
        if self._thread:
            self._thread.join()
        try:
            tokens = self.leases.tokens().get(self.key, [])
            if unfinished and self.token == max(tokens, default=0):
                self.leases.files.write(self.name, _dump({"released": True}))
                return
            for token in tokens:
                if token <= self.token:
                    self.leases.files.remove(f"leases/{self.key}.{token:06d}")
        except OSError:  # it will be taken for dead, in time
            pass


class Leases:
    def __init__(self, files: Files, ttl: float = TTL) -> None:
        self.files, self.ttl = files, ttl
        self._seen: dict[
            str, tuple[bytes, float]
        ] = {}  # name -> what it said, and since when by our own clock

    def tokens(self) -> dict[str, list[int]]:
        """Of each key that somebody holds or has held."""
        found: dict[str, list[int]] = {}
        for name in self.files.names("leases"):
            key, _, token = name.partition(".")
            if token.isdecimal():
                found.setdefault(key, []).append(int(token))
        return found

    def _holder(self, key: str, token: int) -> dict[str, Any] | None:
        name = f"leases/{key}.{token:06d}"
        try:
            said = self.files.read(name)
        except FileNotFoundError:
            return None
        except OSError:  # like a torn one
            said = b""
        try:
            about = json.loads(said)
            gone = about.get("released") or _gone(about)
        except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError):
            about, gone = {}, False  # torn: its beats decide, like those of any other
        now = time.monotonic()
        before, since = self._seen.get(name, (b"", now))
        if said != before:
            since = now
        self._seen[name] = (said, since)
        return None if gone or now - since > self.ttl else about

    def acquire(self, key: str, now: Callable[[], dict[str, Any]] = dict, **about: Any) -> Lease | None:
        """None while somebody else holds it. `now` is asked at each beat for what else the lease is to say."""
        tokens = self.tokens().get(key, [])
        newest = max(tokens, default=0)
        if newest and self._holder(key, newest) is not None:
            return None
        lease = Lease(self, key, newest + 1, me() | about, now)
        if not self.files.create(lease.name, _dump(lease.about | now())):
            return None  # by a moment
        if (
            max(self.tokens().get(key, [])) > lease.token
        ):  # others came and went since the look: this token is an old one
            self.files.remove(lease.name)
            return None
        for token in tokens:
            self.files.remove(f"leases/{key}.{token:06d}")
        lease._thread = threading.Thread(target=lease._beat, daemon=True, name="lease")
        lease._thread.start()
        return lease

    def active(self) -> dict[str, dict[str, Any]]:
        """key -> holder, of all that are being trained now."""
        found = {key: self._holder(key, max(tokens)) for key, tokens in self.tokens().items()}
        return {key: holder for key, holder in found.items() if holder is not None}


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


@cache
def _boot() -> str:
    """Which start of which machine, and which container's process numbers; empty where it cannot be told."""
    try:
        boot, numbers = (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        )
    except OSError:
        return ""
    return f"{platform.node()} {boot} {numbers}"


def _started(pid: int) -> str:
    """When a process began, so that another with its number is not taken for it; empty when it is dead, or nothing tells."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def me() -> dict[str, Any]:
    return {"boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}


def _gone(about: dict[str, Any]) -> bool:
    """Known to be dead: a process of this very start of this machine that is no more."""
    if not about.get("boot") or about["boot"] != _boot():
        return False
    return _started(int(about["pid"])) != about["started"]
