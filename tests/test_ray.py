"""Tests that the `ray` engine gives the results of local workers, even if a node and the driver are lost."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_sweeps import check_ledger, command, results, study_data, write_study_file
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.errors import ConfigError
from mainrun.store.rundir import RunDir
from sweeps.engine.protocol import Outcome, Task
from sweeps.engine.worker import MAX_DEATHS, WorkerExit, run_until_done
from sweeps.study import validate_study

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (mainrun[ray])"
)


def refused(file: Path, out: Path, *options: str) -> str:
    """Run a study that must be refused, and return the error message."""
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(out), *options])
    assert result.exit_code == 2 and not (out / "tiny").exists(), result.output
    return result.stderr


def test_without_ray_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find_spec(name, *more)
    )
    message = refused(write_study_file(tmp_path), tmp_path / "out", "--engine", "ray")
    assert "pip install 'mainrun[ray]'" in message and "--engine local" in message


@needs_ray
def test_a_wrong_address_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write_study_file(tmp_path, engine="ray"), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"  # the port is reserved, but no process listens on it
        assert f"no Ray cluster answers at {closed}" in refused(file, out, "--address", closed)
    for odd in ("nowhere", "ray://127.0.0.1:10001", "127.0.0.1:x"):
        assert f"--address '{odd}' is not allowed; write auto, or HOST:PORT" in refused(
            file, out, "--address", odd
        )
    monkeypatch.setenv("RAY_ADDRESS", closed)
    assert f"no Ray cluster answers at {closed}" in refused(file, out, "--address", "auto")


def test_the_engine_does_not_change_the_digest() -> None:
    plain = validate_study(study_data(), "tiny.toml")
    assert (
        validate_study(study_data(engine="ray", address="head:6379", gpus=0.5), "tiny.toml").digest
        == plain.digest
    )
    for change, message in (
        ({"engine": "slurm"}, "engine='slurm' is not allowed"),
        ({"address": "auto"}, "address='auto' with engine='local'"),
        ({"gpus": 0.5}, "gpus=0.5 with engine='local'"),
        (
            {"engine": "ray", "set": study_data()["set"] | {"device": "cuda"}},
            "write gpus = 1, or a share of one",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            validate_study(study_data(**change), "tiny.toml")


def test_the_exit_of_a_worker_decides_the_outcome() -> None:
    """A lost worker is replaced, a locked run is retried, and an error is final."""
    task = Task("baseline", (), Path("runs"), Path("store"), 10)
    locked = WorkerExit(2, "error: runs/x is being written by process 7 on a; wait")
    lost = WorkerExit(-1, "lost")
    early = WorkerExit(75, "SIGTERM at step 3 of 20")
    at_step = WorkerExit(75, "stopped at step 10 of 20; saved")

    def outcome(*exits: WorkerExit) -> Outcome:
        remaining = [*exits]
        result = run_until_done(task, lambda: remaining.pop(0), lambda: not remaining)
        assert not remaining
        return result

    assert outcome(lost, locked, early, at_step) == Outcome(True)
    assert outcome(WorkerExit(2, "error: no such field")) == Outcome(
        False, refused=True, reason="error: no such field"
    )
    assert outcome(WorkerExit(1, "error: no such field")) == Outcome(False, reason="error: no such field")
    assert outcome(WorkerExit(3, "diverged: loss is nan")) == Outcome(
        False, diverged=True, reason="diverged: loss is nan"
    )
    assert outcome(*MAX_DEATHS * [lost]) == Outcome(False, reason=f"its worker died {MAX_DEATHS} times: lost")
    assert outcome(lost) == Outcome(False, reason="the driver stopped")


# -- real trials

STUDY: dict[str, Any] = {"budget": {"trials": 8}, "evidence": {"noise_seeds": 2, "seeds": 2, "best": 1}}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of the study with local workers."""
    folder = tmp_path_factory.mktemp("local")
    process = subprocess.run(
        command(write_study_file(folder, **STUDY), folder, 2), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return results(folder)


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)  # the node of the driver is never removed
    yield cluster
    cluster.shutdown()


class Driver:
    """A `mainrun sweep` process that can be killed and restarted, with access to the states of its runs."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder / "tiny"
        self.log = folder / "log.txt"
        self.line = [
            *command(write_study_file(folder, **STUDY), folder, 2),
            "--engine",
            "ray",
            "--address",
            address,
        ]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.line, stdout=log, stderr=log)

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Wait until a condition is true, and return its value."""
        while True:
            value = condition()
            if value:
                return value
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def states(self) -> dict[str, dict[str, Any]]:
        return {
            file.parent.name: json.loads(file.read_text()) for file in self.folder.glob("runs/*/status.json")
        }

    def running(self) -> dict[str, int]:
        """Return the process id of each run that is being trained."""
        running = {run: state["pid"] for run, state in self.states().items() if state["state"] == "running"}
        return {run: pid for run, pid in running.items() if parent(pid)}

    def at_rung(self) -> list[str]:
        return [
            run
            for run, state in self.states().items()
            if state["state"] == "done" or "stopped at" in state.get("why", "")
        ]


def parent(pid: int) -> int:
    """Return the id of a process's parent, or 0 if the process does not exist."""
    try:
        state, above, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(above)


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="looks at the workers in /proc")
def test_a_lost_node_and_a_lost_driver_change_nothing(
    tmp_path: Path, local: dict[str, Any], cluster: Any
) -> None:
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
    cluster.wait_for_nodes()
    driver = Driver(tmp_path, cluster.address)
    # Maps each run that was stopped in the middle of a trial to the ids of its process and its Ray worker.
    halted: dict[str, tuple[int, int]] = {}

    def halt() -> bool:
        """Stop one training process on each node, and return whether both have been stopped."""
        for run, pid in driver.running().items():
            if run not in halted:
                above = parent(pid)
                os.kill(pid, signal.SIGSTOP)
                if driver.running().get(run) == pid:
                    halted[run] = pid, above
                else:
                    os.kill(pid, signal.SIGCONT)
        return len(halted) == 2

    driver.wait_for(halt)
    cluster.remove_node(nodes[0], allow_graceful=False)
    # When a node is removed, its Ray worker and the child processes of the worker end.
    lost = driver.wait_for(lambda: [run for run, (pid, above) in halted.items() if parent(pid) != above])
    assert len(lost) == 1
    for pid, _ in halted.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    pid = halted[lost[0]][0]
    driver.wait_for(lambda: lost[0] in driver.at_rung() or driver.running().get(lost[0], pid) != pid)
    driver.wait_for(driver.running)
    driver.process.kill()
    driver.process.wait()
    driver.start()
    assert driver.process.wait() == 0, driver.log.read_text()
    assert results(tmp_path) == local
    check_ledger(tmp_path)
    for run in driver.states():
        rows = RunDir(driver.folder / "runs" / run).metrics()
        steps = [row["step"] for row in rows if row["event"] == "step"]
        assert steps and steps == sorted(set(steps)), "no step is written twice"
