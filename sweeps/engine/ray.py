"""Workers on the machines of a Ray cluster: a Ray task a try, which runs the same subprocess there as `local` does here.

Ray says where there is room and that a machine is gone; what was trained is in the run directories and the store, in a folder
that all machines share. Ray itself tries nothing again: the driver does, and a try goes on from the last checkpoint, wherever it is.
A try that nobody waits for any more ends with its Ray worker; until then it holds the run directory's lock, and where the lock was
lost without it (rundir.RunDir.check) it writes nothing more.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import platform
import re
import signal
import socket
import subprocess
import threading
from typing import Any

from mainrun.core.hardware import cores
from mainrun.errors import UsageError
from sweeps.engine.protocol import Outcome, Task
from sweeps.engine.worker import STOPPED, End, insist, start

OBJECTS = 80_000_000  # bytes of memory for Ray's objects, about the least that it takes: ours are a task and what it said


class Ray:
    def __init__(self, workers: int, threads: int, gpus: float, address: str) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UsageError(
                "engine 'ray' needs Ray, which is not installed; pip install 'mainrun[ray]', or take --engine local"
            )
        wanted = workers or max(1, cores() // threads)
        _join(address, num_cpus=wanted * threads)
        import ray

        self._needs = {"CPU": float(threads)} | ({"GPU": gpus} if gpus else {})
        self.workers = workers or self._room()
        self._try = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(attempt)
        self._live: set[Any] = set()
        self._lock, self._closed = threading.Lock(), False

    def _room(self) -> int:
        """How many trials all machines hold at once."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(
            min(math.floor(node.get(what, 0) / much + 1e-9) for what, much in self._needs.items())
            for node in nodes
        )
        if not room:
            has = "; ".join(
                ", ".join(f"{node.get(what, 0):g} {what}" for what in self._needs) for node in nodes
            )
            asks = ", ".join(f"{much:g} {what}" for what, much in self._needs.items())
            raise UsageError(
                f"a trial asks for {asks}, and no node of the cluster has that (they have {has}); "
                "lower threads or gpus in the study, or give --workers N where nodes come when they are asked for"
            )
        return room

    def train(self, task: Task) -> Outcome:
        task.out.mkdir(parents=True, exist_ok=True)
        return insist(task, lambda: self._once(task), lambda: self._closed)

    def _once(self, task: Task) -> End:
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        with self._lock:
            if self._closed:
                return STOPPED
            ref = self._try.remote(task, os.getcwd())
            self._live.add(ref)
        try:
            code, said = ray.get(ref)
        except TaskCancelledError:
            return STOPPED
        except RayTaskError as e:  # not the worker's end, but ours to start one
            raise UsageError(
                f"a node of the cluster cannot start a worker ({e.cause}); each needs this mainrun[ray] and the study's folder"
            ) from e
        except RayError as e:  # the node, its Ray or the Ray worker is gone
            return -1, f"its Ray worker was lost ({type(e).__name__})"
        finally:
            with self._lock:
                self._live.discard(ref)
        return code, said

    def close(self) -> None:
        import ray

        with self._lock:
            self._closed = True
            live = list(self._live)
        for ref in live:
            ray.cancel(ref)
        ray.wait(live, num_returns=len(live), timeout=60) if live else None


def attempt(task: Task, folder: str) -> End:
    """Runs on a node, in a Ray worker's main thread."""
    for place in (folder, task.out):
        if not os.path.isdir(os.path.join(folder, place)):
            raise UsageError(f"{platform.node()} has no folder {place}")
    process = start(task, folder)
    try:
        while True:
            try:
                _, said = process.communicate(timeout=0.5)  # a cancel is heard between two looks
                return process.returncode, said
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.terminate()  # it saves where it stands
            process.communicate()


def _join(address: str, num_cpus: int) -> None:
    """The cluster at an address, or one of our own on this machine, which ends with us."""
    found = (
        os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    )  # as Ray understands auto
    if found not in ("", "auto"):
        if not re.fullmatch(r"[\w.-]+:\d{1,5}", found):
            raise UsageError(
                f"got --address {found!r}; allowed: auto, or HOST:PORT of the cluster's head, like head:6379"
            )
        host, port = found.split(":")
        try:  # Ray itself asks for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError) as e:
            raise UsageError(
                f"no Ray cluster answers at {found} ({e}); look with `ray status --address {found}`, or leave --address out"
            ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a search reports to nobody
    import ray

    own: dict[str, Any] = {"num_cpus": num_cpus, "object_store_memory": OBJECTS, "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            found or "local", logging_level=logging.ERROR, log_to_driver=False, **({} if address else own)
        )
    except (ConnectionError, RuntimeError) as e:
        raise UsageError(
            f"no Ray cluster can be joined at {found or 'this machine'}: {str(e).splitlines()[0]}"
        ) from e
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in place, which would end us without a word
