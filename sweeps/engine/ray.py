"""The engine `ray`, which runs workers on the nodes of a Ray cluster.

Each attempt to run a worker is one Ray task. Ray chooses the node of each worker and reports lost nodes. The
run directories and the store are in a folder that all nodes share, so a new worker can resume a run on any
node. Retries by Ray are disabled, because `run_until_done` already retries a task whose worker was lost.

If the driver is lost, Ray stops the Ray workers. A training process stops when its Ray worker stops. A
training process keeps the lock on its run directory until the process ends. A training process that loses the
lock stops writing to the run directory (see `RunDir.check`).
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
from sweeps.engine.worker import STOPPED, WorkerExit, run_until_done, start_worker

OBJECT_STORE_BYTES = 80_000_000  # close to Ray's minimum size, because only tasks and exit codes are stored


class Ray:
    """An engine that trains each task on a Ray cluster.

    If `address` is empty, a Ray cluster is started on this machine, and is stopped when the driver ends.
    """

    def __init__(self, workers: int, threads: int, gpus: float, address: str) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UsageError(
                "the engine 'ray' needs Ray, which is not installed; "
                "install it with pip install 'mainrun[ray]', or use --engine local"
            )
        local_workers = workers or max(1, cores() // threads)
        _connect(address, num_cpus=local_workers * threads)
        import ray

        self._resources = {"CPU": float(threads)}
        if gpus:
            self._resources["GPU"] = gpus
        self.workers = workers or self._capacity()
        self._attempt = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(run_attempt)
        self._running: set[Any] = set()
        self._lock = threading.Lock()
        self._closed = False

    def _capacity(self) -> int:
        """Return how many trials the whole cluster can train at the same time."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        capacity = 0
        for node in nodes:
            capacity += min(
                math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in self._resources.items()
            )
        if capacity:
            return capacity
        offers = "; ".join(_describe({name: node.get(name, 0) for name in self._resources}) for node in nodes)
        raise UsageError(
            f"a trial needs {_describe(self._resources)}, but no node of the cluster has these resources "
            f"(the nodes have {offers}); lower threads or gpus in the study, "
            "or give --workers N if the cluster adds nodes on demand"
        )

    def train(self, task: Task) -> Outcome:
        task.out.mkdir(parents=True, exist_ok=True)
        return run_until_done(task, lambda: self._run_worker(task), lambda: self._closed)

    def _run_worker(self, task: Task) -> WorkerExit:
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        with self._lock:
            if self._closed:
                return STOPPED
            ref = self._attempt.remote(task, os.getcwd())
            self._running.add(ref)
        try:
            worker_exit: WorkerExit = ray.get(ref)
        except TaskCancelledError:
            return STOPPED
        except RayTaskError as e:  # the Ray task raised an error before a worker was started
            raise UsageError(
                f"a node of the cluster cannot start a worker ({e.cause}); "
                "every node needs this version of mainrun[ray] and the study's folder"
            ) from e
        except RayError as e:  # the node, its Ray daemon or the Ray worker was lost
            return WorkerExit(-1, f"its Ray worker was lost ({type(e).__name__})")
        finally:
            with self._lock:
                self._running.discard(ref)
        return worker_exit

    def close(self) -> None:
        import ray

        with self._lock:
            self._closed = True
            refs = list(self._running)
        for ref in refs:
            ray.cancel(ref)
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=60)


def _describe(resources: dict[str, float]) -> str:
    """Format Ray resources as text, such as "2 CPU, 0.5 GPU"."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def run_attempt(task: Task, folder: str) -> WorkerExit:
    """Run a worker for a task. Ray calls this function on a node, in the main thread of a Ray worker."""
    for place in (folder, task.out):
        if not os.path.isdir(os.path.join(folder, place)):
            raise UsageError(f"{platform.node()} has no folder {place}")
    process = start_worker(task, folder)
    try:
        while True:
            try:
                _, stderr = process.communicate(timeout=0.5)  # a timeout lets Ray cancel the task
                return WorkerExit(process.returncode, stderr)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.terminate()  # SIGTERM makes the worker save a checkpoint
            process.communicate()


def _connect(address: str, num_cpus: int) -> None:
    """Connect to the Ray cluster at an address. If the address is empty, start a cluster on this machine."""
    if address == "auto":  # as in Ray itself, RAY_ADDRESS overrides "auto"
        address = os.environ.get("RAY_ADDRESS") or "auto"
        options: dict[str, Any] = {}
    elif address:
        options = {}
    else:
        options = {
            "num_cpus": num_cpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    if address not in ("", "auto"):
        _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # do not send usage statistics to the Ray project
    import ray

    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError) as e:
        raise UsageError(
            f"cannot join a Ray cluster at {address or 'this machine'}: {str(e).splitlines()[0]}"
        ) from e
    finally:
        # Restore the driver's SIGTERM handler, because Ray's handler would end the driver without a message.
        signal.signal(signal.SIGTERM, sigterm_handler)


def _check_address(address: str) -> None:
    """Raise UsageError if no server answers at an address.

    Without this check, Ray would try to connect for several minutes.
    """
    if not re.fullmatch(r"[\w.-]+:\d{1,5}", address):
        raise UsageError(
            f"--address {address!r} is not allowed; write auto, or HOST:PORT of the cluster's head node, "
            "such as head:6379"
        )
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as e:
        raise UsageError(
            f"no Ray cluster answers at {address} ({e}); "
            f"check the cluster with `ray status --address {address}`, or omit --address"
        ) from None
