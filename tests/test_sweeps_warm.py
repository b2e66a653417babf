"""Tests forked workers: they behave like workers that are started as new processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY

from mainrun.errors import Interrupted, UsageError
from mainrun.store.rundir import RunDir
from sweeps.engine.local import Local
from sweeps.engine.protocol import Outcome, Task
from sweeps.engine.warm import LOST, WarmParent, WarmWorker
from sweeps.engine.worker import start_worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked only on Linux")
LONG = {"epochs": 400}  # a run that takes about a minute


@pytest.fixture(scope="module")
def parent() -> Iterator[WarmParent]:
    warm = WarmParent(1)
    assert warm.is_ready()
    yield warm
    warm.close()


def task(folder: Path, **fields: object) -> Task:
    sets = tuple(f"{key}={value}" for key, value in (TINY | {"dev_frac": 0.1} | fields).items())
    return Task("baseline", sets, folder / "runs", folder / "runs" / ".store", 0)


def run_of(folder: Path) -> RunDir:
    (place,) = (folder / "runs").glob("baseline-*")
    return RunDir(place)


def started(parent: WarmParent, job: Task) -> WarmWorker:
    worker = parent.start(job)
    assert worker is not None
    return worker


def wait_until_training(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if list((folder / "runs").glob("baseline-*/metrics.jsonl")) and run_of(folder).rows():
            return
        time.sleep(0.05)
    raise AssertionError("the worker does not train")


def states(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run_of(folder).checkpoints.glob("*/state.safetensors"))]


def test_a_forked_worker_trains_the_same_bits(parent: WarmParent, tmp_path: Path) -> None:
    worker = started(parent, task(tmp_path / "forked"))
    assert worker.communicate() == (None, "") and worker.returncode == 0
    process = start_worker(task(tmp_path / "new"))
    process.communicate()
    assert process.returncode == 0
    assert states(tmp_path / "forked") == states(tmp_path / "new") != []


def test_the_error_output_and_the_exit_code_are_those_of_a_new_process(
    parent: WarmParent, tmp_path: Path
) -> None:
    bad = task(tmp_path, lr=-1)
    worker = started(parent, bad)
    process = start_worker(bad)
    assert worker.communicate()[1] == process.communicate()[1] != ""
    assert worker.returncode == process.returncode == UsageError.exit_code


def test_workers_run_at_the_same_time_in_sessions_of_their_own(parent: WarmParent, tmp_path: Path) -> None:
    workers = [started(parent, task(tmp_path / str(i), **LONG)) for i in range(2)]
    for i in range(2):
        wait_until_training(tmp_path / str(i))
    assert [os.getsid(worker.pid) for worker in workers] == [worker.pid for worker in workers]
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    for worker in workers:
        assert "SIGTERM" in worker.communicate()[1] and worker.returncode == Interrupted.exit_code


def test_a_killed_worker_is_reported(parent: WarmParent, tmp_path: Path) -> None:
    worker = started(parent, task(tmp_path, **LONG))
    wait_until_training(tmp_path)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert worker.returncode == -signal.SIGKILL


def test_a_worker_saves_its_state_when_its_parents_are_killed(tmp_path: Path) -> None:
    parent = WarmParent(1)
    assert parent.is_ready()
    worker = started(parent, task(tmp_path, **LONG))
    wait_until_training(tmp_path)
    parent.process.kill()
    worker.communicate()
    assert worker.returncode == LOST
    deadline = time.monotonic() + 30
    while run_of(tmp_path).status().get("state") != "interrupted" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run_of(tmp_path).status()["state"] == "interrupted" and states(tmp_path)
    assert parent.start(task(tmp_path)) is None
    parent.close()


def test_a_parent_ends_with_its_driver() -> None:
    code = (
        "import os; from sweeps.engine.warm import WarmParent\n"
        "parent = WarmParent(1); parent.is_ready(); print(parent.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(result.stdout)}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{int(result.stdout)}").exists()


def test_the_engine_starts_new_processes_if_the_parent_cannot_fork(tmp_path: Path) -> None:
    engine = Local(1, 1)
    assert engine._warm is not None
    engine._warm.process.kill()
    assert engine.train(task(tmp_path)) == Outcome(True)
    engine.close()


def test_an_engine_that_is_closed_sends_one_signal(tmp_path: Path) -> None:
    """With a second signal, a worker would end without saving its state."""
    import threading

    engine = Local(1, 1)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(engine.train(task(tmp_path, **LONG))))
    thread.start()
    wait_until_training(tmp_path)
    engine.close()
    thread.join(60)
    engine.close()
    assert outcomes == [Outcome(False, reason="the driver stopped")]
    assert run_of(tmp_path).status()["state"] == "interrupted" and states(tmp_path)
    assert engine._warm is None
