"""A run looked at once more by code alone: what grew, grows again, and every row and weight is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from test_growth_controller import MANY, SMALL, config

from mainrun.checks import guards
from mainrun.config import TrainConfig, from_dict
from mainrun.replay import all_guards, first_steps
from mainrun.run.session import train
from mainrun.store.rundir import RunDir

AVERAGED: dict[str, Any] = TINY | {
    "num_titles": 200,
    "ema": 0.9,
    "rdrop": 1.0,
    "dropout": 0.1,
    "dev_frac": 0.1,
    "log_every": 5,
}


RUNS: dict[str, TrainConfig] = {
    "plain": from_dict(TINY | SMALL),
    "averaged": from_dict(AVERAGED),
    "grown": config(*MANY),
    "grown and averaged": config(*MANY, ema=0.9),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_once_more(name: str, tmp_path: Path) -> None:
    cfg = RUNS[name]
    summary = train(cfg, tmp_path)
    run = RunDir(tmp_path / cfg.run_id)
    found = first_steps(run, 10_000)
    assert (
        found["steps"] == found["of"] == summary["steps"]
        and found["params"] == summary["params"]
        and found["tokens"] == summary["tokens"]
    )
    assert found["weights"] == found["trained_weights"] == summary["weights"]
    assert found["versions"] == summary["versions"] and found["machine_class"] == summary["machine_class"]
    again = {(row["event"], row["step"], row.get("split")): row for row in [*found["rows"], *found["last"]]}
    for row in run.metrics():
        now = again[row["event"], row["step"], row.get("split")]
        assert {k: v for k, v in now.items() if k != "seconds"} == {
            k: v for k, v in row.items() if k != "seconds"
        }
    told = all_guards(run)
    assert [guard["name"] for guard in told["guards"]] == list(guards.GUARDS)
    assert not [guard for guard in told["guards"] if guard["status"] == "fail"]


def test_a_few_steps_say_what_they_know(tmp_path: Path) -> None:
    cfg = config(*MANY)
    train(cfg, tmp_path)
    found = first_steps(RunDir(tmp_path / cfg.run_id), 8)  # one op further
    assert found["steps"] == 8 and "trained_weights" not in found
    assert [row["step"] for row in found["rows"] if row["event"] == "eval"] == [1]
    for path in (tmp_path / cfg.run_id / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(b"")
    without = first_steps(RunDir(tmp_path / cfg.run_id), 8)
    assert without.keys() & {"last", "weights", "of", "params", "tokens"} == set()
    assert [r | {"seconds": 0} for r in without["rows"]] == [r | {"seconds": 0} for r in found["rows"]]
