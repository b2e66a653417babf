"""A lease has one holder at a time. Others take over from a dead or silent holder and fence it off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from mainrun.store import leases as module
from mainrun.store.files import Folder, open_files
from mainrun.store.leases import Fenced, Lease, Leases
from mainrun.store.nodes import Refused

TTL = 0.6
KEY, OTHER = "a" * 64, "b" * 64

HOLD = """
import sys
from mainrun.store.files import Folder
from mainrun.store.leases import Fenced, Leases
lease = Leases(Folder(sys.argv[1]), float(sys.argv[2])).acquire(sys.argv[3], run="other")
print("held" if lease else "refused", flush=True)
for line in sys.stdin:
    try:
        lease.check() if line == "check\\n" else lease.release(unfinished=line == "leave\\n")
        print("fine", flush=True)
    except Fenced as e:
        print(e, flush=True)
"""


class Holder:
    """A separate process that holds a lease."""

    def __init__(self, files: Folder, key: str = KEY, ttl: float = TTL) -> None:
        command = [sys.executable, "-c", HOLD, str(files), str(ttl), key]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said = self.listen()

    def listen(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip()

    def ask(self, what: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.listen()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@contextmanager
def holding(files: Folder, **kwargs: float) -> Iterator[Holder]:
    holder = Holder(files, **kwargs)  # type: ignore[arg-type]
    try:
        assert holder.said == "held"
        yield holder
    finally:
        holder.process.kill()
        holder.process.communicate()


@pytest.fixture
def files(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def acquired(leases: Leases, key: str = KEY, **about: object) -> Lease:
    lease = leases.acquire(key, **about)
    assert lease
    return lease


def stop_heartbeats(lease: Lease) -> None:
    """Stop the heartbeats of a lease and wait until its thread has ended."""
    lease._stop.set()
    assert lease._thread
    lease._thread.join()


def foreign_lease(files: Folder, key: str = KEY, token: int = 1, **about: object) -> str:
    """Write a lease that belongs to a process on another machine."""
    name = f"leases/{key}.{token:06d}"
    files.write(name, json.dumps({"boot": "another machine", "pid": 1, "started": "1"} | about).encode())
    return name


def acquire_when_free(leases: Leases, key: str = KEY) -> None:
    """Keep trying to acquire the lease, as a run does. Then stop its heartbeats."""
    until = time.monotonic() + 20
    while (lease := leases.acquire(key)) is None:
        assert time.monotonic() < until, "never got it"
        time.sleep(0.01)
    stop_heartbeats(lease)


# -- one holder


@pytest.mark.parametrize("url", ["{}", "file://{}", "memory://{}"])
def test_a_held_lease_is_not_given_to_another(tmp_path: Path, url: str) -> None:
    place = url.format(f"{tmp_path}/store")
    mine, other = Leases(open_files(place), TTL), Leases(open_files(place), TTL)
    assert mine.active().get(KEY) is None and mine.active() == {} and mine.tokens() == {}
    lease = acquired(mine, run="mine", step=10)
    assert other.acquire(KEY) is None and mine.acquire(KEY) is None, "not even by its own process"
    assert (
        other.active().get(KEY) == mine.active().get(KEY) and (other.active().get(KEY) or {})["run"] == "mine"
    )
    another = acquired(other, OTHER, run="other")
    assert {key: about["run"] for key, about in mine.active().items()} == {KEY: "mine", OTHER: "other"}
    lease.check()
    another.check()
    lease.release()
    assert other.active().get(KEY) is None and mine.active().keys() == {OTHER}
    again = acquired(other)
    assert mine.acquire(KEY) is None
    again.release()
    another.release()
    assert mine.files.names("leases") == set()
    if "memory" in place:
        fsspec.filesystem("memory").rm(str(tmp_path), recursive=True)


def test_a_holder_with_heartbeats_keeps_its_lease_longer_than_ttl(files: Folder) -> None:
    ttl = 1.5  # long enough for a slow heartbeat on a busy disk
    lease, other = acquired(Leases(files, ttl)), Leases(files, ttl)
    seen, until = set(), time.monotonic() + 1.7 * ttl
    while time.monotonic() < until:
        seen.add(files.read(lease.name))
        assert other.acquire(KEY) is None and other.active().keys() == {KEY}
        time.sleep(0.02)
    assert len(seen) > 3, "it beats several times in a ttl"
    lease.check()
    lease.release()


RACE = """
import sys, time
from mainrun.store.files import Folder
from mainrun.store.leases import Leases
leases = Leases(Folder(sys.argv[1]), 60.0)
print("ready", flush=True)
for line in sys.stdin:
    key, at = line.split()
    while time.monotonic() < float(at):
        pass
    print("won" if leases.acquire(key) else "lost", flush=True)
"""


def test_of_two_processes_that_race_for_a_key_one_wins(files: Folder) -> None:
    """Two processes race for new keys and for keys of a dead process. Exactly one of them gets each key."""
    command = [sys.executable, "-c", RACE, str(files)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        assert all(racer.stdout and racer.stdout.readline() == "ready\n" for racer in racers)
        for i in range(50):
            key = f"{i:064x}"
            if i % 2:
                files.write(
                    f"leases/{key}.000007", json.dumps(module.this_process() | {"pid": 2**22 - 1}).encode()
                )
            for racer in racers:
                assert racer.stdin
                racer.stdin.write(f"{key} {time.monotonic() + 0.005}\n")
                racer.stdin.flush()
            assert sorted(racer.stdout.readline() for racer in racers if racer.stdout) == [
                "lost\n",
                "won\n",
            ], f"round {i}"
            assert Leases(files).tokens()[key] == [8 if i % 2 else 1]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def test_of_many_threads_that_race_one_holds_the_lease_at_a_time(files: Folder) -> None:
    """The threads acquire and release the lease quickly. No thread may get an outdated token."""
    holding_now, most, lock = 0, 0, threading.Lock()
    tokens: list[int] = []

    def train() -> None:
        nonlocal holding_now, most
        leases = Leases(files, 60.0)
        for _ in range(25):
            if lease := leases.acquire(KEY):
                with lock:
                    holding_now += 1
                    most = max(most, holding_now)
                    tokens.append(lease.token)
                lease.check()
                with lock:
                    holding_now -= 1
                lease.release(unfinished=True)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and tokens == sorted(set(tokens)) and len(tokens) > 1


# -- takeovers


def test_the_lease_of_a_killed_process_is_free_at_once(files: Folder) -> None:
    with holding(files, ttl=1000.0) as holder:
        leases = Leases(files, 1000.0)
        assert leases.acquire(KEY) is None and (leases.active().get(KEY) or {})["pid"] == holder.process.pid
        holder.signal(signal.SIGKILL)
        os.waitid(os.P_PID, holder.process.pid, os.WEXITED | os.WNOWAIT)  # the process is a zombie now
        assert leases.active().get(KEY) is None and leases.active() == {}
        holder.process.wait()
        assert leases.active().get(KEY) is None
        lease = acquired(leases)
        assert lease.token == 2
        lease.release()


def test_a_reused_process_number_does_not_keep_a_lease(files: Folder) -> None:
    files.write(f"leases/{KEY}.000001", json.dumps(module.this_process() | {"started": "1"}).encode())
    assert acquired(Leases(files, 1000.0)).token == 2


def test_a_holder_on_another_machine_is_judged_by_its_heartbeats(files: Folder) -> None:
    foreign_lease(files, pid=2**22 - 1)
    leases, before = Leases(files, TTL), time.monotonic()
    assert leases.active().get(KEY) is not None
    acquire_when_free(leases)
    assert time.monotonic() - before >= TTL


def test_a_stopped_holder_is_replaced_after_ttl_and_is_fenced(files: Folder) -> None:
    with holding(files) as holder:
        assert holder.ask("check") == "fine"
        leases, before = Leases(files, TTL), time.monotonic()
        assert leases.acquire(KEY) is None
        holder.signal(signal.SIGSTOP)
        acquire_when_free(leases)
        assert time.monotonic() - before >= TTL
        holder.signal(signal.SIGCONT)
        time.sleep(TTL)  # the old holder's heartbeats resume, but in an outdated file
        said = holder.ask("check")
        assert (
            said
            == "another process has taken over these steps (the lease has token 2, this process has token 1)"
        )
        assert holder.ask("finish") == "fine"
        assert Leases(files).tokens() == {KEY: [2]}, "what is another's stays when the late one lets go"
    assert issubclass(Fenced, Refused)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"pid',
        b"[]",
        b"7",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"{}",
        b'{"boot": "BOOT"}',
        b'{"boot": "BOOT", "pid": null}',
    ],
)
def test_a_torn_lease_holds_until_its_heartbeats_stop(files: Folder, text: bytes) -> None:
    files.write(f"leases/{KEY}.000003", text.replace(b"BOOT", module._boot().encode()))
    leases, before = Leases(files, 0.15), time.monotonic()
    assert leases.acquire(KEY) is None and leases.active().keys() == {KEY}
    acquire_when_free(leases)
    assert time.monotonic() - before >= 0.15 and leases.tokens() == {KEY: [4]}


def test_any_heartbeat_extends_a_lease(files: Folder) -> None:
    name = foreign_lease(files)
    leases = Leases(files, 0.3)
    for i in range(8):
        files.write(name, b"torn" * i)
        assert leases.acquire(KEY) is None
        time.sleep(0.1)
    acquire_when_free(leases)


def test_a_process_that_first_sees_a_lease_waits_for_all_of_ttl(files: Folder) -> None:
    """The age of a lease file is ignored, because it depends on the clock of another machine."""
    os.utime(Path(str(files)) / foreign_lease(files), (0, 0))
    before = time.monotonic()
    acquire_when_free(Leases(files, TTL))
    assert time.monotonic() - before >= TTL


def test_every_takeover_increments_the_token(files: Folder) -> None:
    leases, tokens = Leases(files, TTL), []
    for _ in range(4):
        lease = acquired(leases)
        tokens.append(lease.token)
        lease.release(unfinished=True)
        assert leases.active().get(KEY) is None and leases.active() == {} and len(files.names("leases")) == 1
    assert tokens == [1, 2, 3, 4]
    stop_heartbeats(late := acquired(leases))
    files.write(late.name, json.dumps(module.this_process() | {"pid": 2**22 - 1}).encode())
    new = acquired(leases)
    assert (late.token, new.token) == (5, 6)
    late.release(unfinished=True)
    assert leases.tokens() == {KEY: [6]}, "a late one leaves no mark on another's lease"
    with pytest.raises(Fenced, match="token 6, this process has token 5"):
        late.check()
    new.check()
    new.release()
    assert files.names("leases") == set()


def test_an_unfinished_lease_is_free_at_once(files: Folder) -> None:
    with holding(files, ttl=1000.0) as holder:
        leases = Leases(files, 1000.0)
        assert leases.acquire(KEY) is None
        assert holder.ask("leave") == "fine"
        assert acquired(leases).token == 2
        assert "token 2, this process has token 1" in holder.ask("check")


def test_an_outdated_listing_gives_no_old_token(files: Folder) -> None:
    """Other processes may acquire and release a lease between its listing and the creation of its file."""

    class Slow(Leases):
        between: Callable[[], None] | None = None

        def _holder(self, key: str, token: int) -> dict[str, object] | None:
            found = super()._holder(key, token)
            if self.between:
                between, self.between = self.between, None
                between()
            return found

    slow, others = Slow(files, 60.0), Leases(files, 60.0)
    acquired(others).release(unfinished=True)  # leaves token 1

    def come_and_go() -> None:
        acquired(others).release(unfinished=True)  # leaves token 2
        assert acquired(others).token == 3

    slow.between = come_and_go
    assert slow.acquire(KEY) is None and others.tokens() == {KEY: [3]}


# -- clocks and stores


def test_a_heartbeat_does_not_sync(files: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = acquired(Leases(files, 0.1))

    def slow(fd: int) -> None:
        raise AssertionError("a beat is synced")

    monkeypatch.setattr(os, "fsync", slow)
    before, until = files.read(lease.name), time.monotonic() + 20
    while files.read(lease.name) == before:
        assert time.monotonic() < until, "it beats"
        time.sleep(0.01)
    monkeypatch.undo()
    lease.release()


def test_a_heartbeat_writes_the_current_status(files: Folder) -> None:
    steps = iter(range(7, 1000))
    lease = Leases(files, 0.1).acquire(KEY, lambda: {"at": next(steps)}, run="mine")
    assert lease
    seen: set[int] = set()
    while len(seen) < 3:
        about = Leases(files).active()[KEY]
        assert about["run"] == "mine"
        seen.add(about["at"])
    lease.release()
    assert min(seen) >= 7


@pytest.mark.parametrize("clock", [0.0, 1e6, -1e6, "frozen"])
def test_the_system_clock_does_not_matter(
    files: Folder, monkeypatch: pytest.MonkeyPatch, clock: float | str
) -> None:
    real, started = time.time, time.time()
    leases, name, before = Leases(files, 0.3), foreign_lease(files), time.monotonic()
    lease = acquired(Leases(files, 0.3), OTHER)
    assert leases.active().keys() == {KEY, OTHER}
    monkeypatch.setattr(time, "time", lambda: started if clock == "frozen" else real() + float(clock))
    stamp = started if clock == "frozen" else started + float(clock)
    os.utime(Path(str(files)) / name, (stamp, stamp))
    assert leases.acquire(KEY) is None, "a jump of the clock does not end a lease"
    acquire_when_free(leases)  # expiry does not depend on the system clock either
    assert time.monotonic() - before >= 0.3
    assert leases.acquire(OTHER) is None
    lease.check()
    lease.release()


def test_a_store_that_fails_for_a_while_costs_only_heartbeats(tmp_path: Path) -> None:
    """A lease that cannot be written or read for a while still has exactly one holder."""
    files = Folder(tmp_path)
    leases, other = Leases(files, TTL), Leases(files, TTL)
    lease = acquired(leases)
    assert other.acquire(KEY) is None
    path = tmp_path / lease.name
    kept = path.read_bytes()
    path.unlink()
    path.mkdir()  # a folder cannot be read or replaced as a lease
    time.sleep(TTL / 3)
    assert other.acquire(KEY) is None and other.active().keys() == {KEY}
    path.rmdir()
    path.write_bytes(kept)
    until = time.monotonic() + 20
    while path.read_bytes() == kept:
        assert time.monotonic() < until, "its beats go on"
        time.sleep(0.01)
    lease.check()
    lease.release()


def test_process_numbers_of_two_containers_are_told_apart() -> None:
    """Two containers on one machine may use equal process numbers, so a lease stores the pid namespace."""
    assert os.readlink("/proc/self/ns/pid") in module._boot()


def test_foreign_files_next_to_leases_are_ignored(files: Folder) -> None:
    for name in ("readme", f"{KEY}.old", f"{KEY}.", "x.1"):
        files.write(f"leases/{name}", b"?")
    leases = Leases(files, TTL)
    lease = acquired(leases)
    assert lease.token == 1 and leases.active().keys() >= {KEY}
    lease.check()
    lease.release()
    assert files.names("leases") == {"readme", f"{KEY}.old", f"{KEY}.", "x.1"}
