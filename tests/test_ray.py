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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sweeps import command, data, ledger_adds_up, results, write
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.errors import ConfigError
from sweeps import study

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (mainrun[ray])")


def refused(file: Path, out: Path, *options: str) -> str:
    found = CliRunner().invoke(app, ["sweep", str(file), "--out", str(out), *options])
    assert found.exit_code == 2 and not (out / "tiny").exists(), found.output
    return found.stderr


def test_without_ray_the_way_to_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else real(name, *more))
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
    plain = study.checked(data(), "tiny.toml")
    assert study.checked(data(engine="ray", address="head:6379", gpus=0.5), "tiny.toml").digest == plain.digest
    for change, said in (
        ({"engine": "slurm"}, "engine='slurm' is not allowed"),
        ({"address": "auto"}, "address='auto' with engine='local'"),
        ({"gpus": 0.5}, "gpus=0.5 with engine='local'"),
        ({"engine": "ray", "set": data()["set"] | {"device": "cuda"}}, "write gpus = 1, or a share of one"),
    ):
        with pytest.raises(ConfigError, match=said):
            study.checked(data(**change), "tiny.toml")


# -- real trials

STUDY: dict[str, Any] = {"budget": {"trials": 8}, "evidence": {"noise_seeds": 2, "seeds": 2, "best": 1}}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the study comes to with local workers."""
    folder = tmp_path_factory.mktemp("local")
    made = subprocess.run(command(write(folder, **STUDY), folder, 2), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return results(folder)


@pytest.mark.slow
@needs_ray
def test_a_study_is_the_same_with_ray(tmp_path: Path, local: dict[str, Any]) -> None:
    made = subprocess.run([*command(write(tmp_path, **STUDY), tmp_path, 2), "--engine", "ray"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert results(tmp_path) == local and {t["state"] for t in local["trials"]} >= {"done", "pruned"}
    ledger_adds_up(tmp_path)


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    few = {"object_store_memory": 80_000_000, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **few})  # the driver's node, which is not lost
    yield found
    found.shutdown()


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_lost_node_and_a_lost_driver_cost_nothing(tmp_path: Path, local: dict[str, Any], cluster: Any) -> None:
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
    cluster.wait_for_nodes()
    line = [*command(write(tmp_path, **STUDY), tmp_path, 2), "--engine", "ray", "--address", cluster.address]
    log = tmp_path / "said.txt"

    def begin() -> subprocess.Popen[bytes]:
        with log.open("ab") as said:
            return subprocess.Popen(line, stdout=said, stderr=said)

    driver = begin()
    both(tmp_path / "tiny", driver, 2)
    cluster.remove_node(nodes[0], allow_graceful=False)  # in the middle of a trial
    both(tmp_path / "tiny", driver, 1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver = begin()
    assert driver.wait() == 0, log.read_text()
    assert results(tmp_path) == local
    ledger_adds_up(tmp_path)
    rows = [json.loads(row) for run in (tmp_path / "tiny" / "runs").glob("*/metrics.jsonl") for row in run.read_text().splitlines()]
    assert rows
    for run in (tmp_path / "tiny" / "runs").glob("*/metrics.jsonl"):
        steps = [row["step"] for row in map(json.loads, run.read_text().splitlines()) if row["event"] == "step"]
        assert steps == sorted(set(steps)), "a step stands twice"


def both(folder: Path, driver: subprocess.Popen[bytes], many: int) -> None:
    """Wait until so many trials are under way at once."""
    while True:
        assert driver.poll() is None
        states = [json.loads(file.read_text()) for file in folder.glob("runs/*/status.json")]
        if sum(state["state"] == "running" and os.path.exists(f"/proc/{state['pid']}") for state in states) >= many:
            return
        time.sleep(0.05)
