"""The engine `ray`: the same study as with local workers, bit for bit, also when a node and the driver are lost on the way."""

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
from test_sweeps import command, data, ledger_adds_up, results, write
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.errors import ConfigError
from mainrun.store.rundir import RunDir
from sweeps.engine.protocol import Outcome, Task
from sweeps.engine.worker import MAX_DEATHS, run_until_done
from sweeps.study import validate_study

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (mainrun[ray])"
)


def refused(file: Path, out: Path, *options: str) -> str:
    found = CliRunner().invoke(app, ["sweep", str(file), "--out", str(out), *options])
    assert found.exit_code == 2 and not (out / "tiny").exists(), found.output
    return found.stderr


def test_without_ray_the_way_to_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "ray" else real(name, *more)
    )
    said = refused(write(tmp_path), tmp_path / "out", "--engine", "ray")
    assert "pip install 'mainrun[ray]'" in said and "--engine local" in said


@needs_ray
def test_a_wrong_address_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write(tmp_path, engine="ray"), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        assert f"no Ray cluster answers at {closed}" in refused(file, out, "--address", closed)
    for odd in ("nowhere", "ray://127.0.0.1:10001", "127.0.0.1:x"):
        assert f"got --address '{odd}'; allowed: auto, or HOST:PORT" in refused(file, out, "--address", odd)
    monkeypatch.setenv("RAY_ADDRESS", closed)
    assert f"no Ray cluster answers at {closed}" in refused(file, out, "--address", "auto")


def test_the_engine_is_no_part_of_what_is_searched() -> None:
    plain = validate_study(data(), "tiny.toml")
    assert (
        validate_study(data(engine="ray", address="head:6379", gpus=0.5), "tiny.toml").digest == plain.digest
    )
    for change, said in (
        ({"engine": "slurm"}, "engine='slurm' is not allowed"),
        ({"address": "auto"}, "address='auto' with engine='local'"),
        ({"gpus": 0.5}, "gpus=0.5 with engine='local'"),
        ({"engine": "ray", "set": data()["set"] | {"device": "cuda"}}, "write gpus = 1, or a share of one"),
    ):
        with pytest.raises(ConfigError, match=said):
            validate_study(data(**change), "tiny.toml")


def test_what_a_workers_end_means() -> None:
    """A death is tried again, so is a run that somebody out of reach still writes; an error is an answer."""
    task = Task("baseline", (), Path("runs"), Path("store"), 10)
    busy, lost, there = (
        (2, "error: runs/x is being written by process 7 on a; wait"),
        (-1, "lost"),
        (75, "stopped at step 10 of 20; saved"),
    )

    def outcome(*ends: tuple[int, str]) -> Outcome:
        left = [*ends]
        found = run_until_done(task, lambda: left.pop(0), lambda: not left)
        return found if not left else Outcome(False, reason=f"{len(left)} tries were not made")

    assert outcome(lost, busy, (75, "SIGTERM at step 3 of 20"), there) == Outcome(True)
    assert outcome((2, "error: no such field")) == Outcome(False, refused=True, reason="error: no such field")
    assert outcome((1, "error: no such field")) == Outcome(False, reason="error: no such field")
    assert outcome((3, "diverged: loss is nan")) == Outcome(
        False, diverged=True, reason="diverged: loss is nan"
    )
    assert outcome(*MAX_DEATHS * [lost]) == Outcome(False, reason=f"its worker died {MAX_DEATHS} times: lost")
    assert outcome(lost) == Outcome(False, reason="the driver stopped")


# -- real trials

STUDY: dict[str, Any] = {"budget": {"trials": 8}, "evidence": {"noise_seeds": 2, "seeds": 2, "best": 1}}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the study comes to with local workers."""
    folder = tmp_path_factory.mktemp("local")
    made = subprocess.run(command(write(folder, **STUDY), folder, 2), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return results(folder)


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    few = {"object_store_memory": 80_000_000, "include_dashboard": False}
    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, **few}
    )  # the driver's node, which is not lost
    yield found
    found.shutdown()


class Driver:
    """`mainrun sweep` as it is started by hand, killed and started again; and a look at its trials."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.log = folder / "tiny", folder / "said.txt"
        self.line = [*command(write(folder, **STUDY), folder, 2), "--engine", "ray", "--address", address]
        self.begin()

    def begin(self) -> None:
        with self.log.open("ab") as said:
            self.process = subprocess.Popen(self.line, stdout=said, stderr=said)

    def until(self, look: Callable[[], Any]) -> Any:
        while not (found := look()):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        return found

    def states(self) -> dict[str, dict[str, Any]]:
        return {
            file.parent.name: json.loads(file.read_text()) for file in self.folder.glob("runs/*/status.json")
        }

    def under_way(self) -> dict[str, int]:
        """run -> process."""
        running = {run: state["pid"] for run, state in self.states().items() if state["state"] == "running"}
        return {run: pid for run, pid in running.items() if parent(pid)}

    def at_rung(self) -> list[str]:
        return [
            run
            for run, state in self.states().items()
            if state["state"] == "done" or "stopped at" in state.get("why", "")
        ]


def parent(pid: int) -> int:
    """0 where there is no such process."""
    try:
        state, above, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(above)


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="looks at the workers in /proc")
def test_a_lost_node_and_a_lost_driver_cost_nothing(
    tmp_path: Path, local: dict[str, Any], cluster: Any
) -> None:
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
    cluster.wait_for_nodes()
    driver = Driver(tmp_path, cluster.address)
    halted: dict[
        str, tuple[int, int]
    ] = {}  # run -> process, its Ray worker: one on each node, held in the middle of a trial

    def halt() -> bool:
        for run, pid in driver.under_way().items():
            if run not in halted:
                above = parent(pid)
                os.kill(pid, signal.SIGSTOP)
                if driver.under_way().get(run) == pid:
                    halted[run] = pid, above
                else:
                    os.kill(pid, signal.SIGCONT)
        return len(halted) == 2

    driver.until(halt)
    cluster.remove_node(nodes[0], allow_graceful=False)
    # with its node's Ray goes the Ray worker, and that takes what it has started along
    lost = driver.until(lambda: [run for run, (pid, above) in halted.items() if parent(pid) != above])
    assert len(lost) == 1
    for pid, _ in halted.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    pid = halted[lost[0]][0]
    driver.until(lambda: lost[0] in driver.at_rung() or driver.under_way().get(lost[0], pid) != pid)
    driver.until(driver.under_way)
    driver.process.kill()
    driver.process.wait()
    driver.begin()
    assert driver.process.wait() == 0, driver.log.read_text()
    assert results(tmp_path) == local
    ledger_adds_up(tmp_path)
    for run in driver.states():
        rows = RunDir(driver.folder / "runs" / run).metrics()
        steps = [row["step"] for row in rows if row["event"] == "step"]
        assert steps and steps == sorted(set(steps)), "a step stands twice"
