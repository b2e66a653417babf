"""Tests that `mainrun.replay` reproduces every row and every weight of a run, including its growth ops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, slow_unless
from test_growth_controller import MANY, SMALL, config

from mainrun.checks import guards
from mainrun.config import TrainConfig, from_dict
from mainrun.replay import replay_steps, run_guards
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
    "members": from_dict(AVERAGED | {"members": 2}),
    "ngram": from_dict(AVERAGED | {"ngram": 3}),
    "grown": config(*MANY),
    "grown and averaged": config(*MANY, ema=0.9),
}


@pytest.mark.parametrize("name", slow_unless(["ngram", "grown and averaged"], RUNS))
def test_a_replay_repeats_the_run(name: str, tmp_path: Path) -> None:
    cfg = RUNS[name]
    summary = train(cfg, tmp_path)
    run = RunDir(tmp_path / cfg.run_id)
    result = replay_steps(run, 10_000)
    assert result["steps"] == result["of"] == summary["steps"]
    for key in ("params", "tokens", "versions", "machine_class"):
        assert result[key] == summary[key]
    assert result["weights"] == result["trained_weights"] == summary["weights"]
    replayed = {key_of(row): row for row in [*result["rows"], *result["last"]]}
    for row in run.metrics():
        assert replayed[key_of(row)] | {"seconds": 0} == row | {"seconds": 0}
    verdicts = run_guards(run)["guards"]
    assert [verdict["name"] for verdict in verdicts] == list(guards.GUARDS)
    assert not [verdict for verdict in verdicts if verdict["status"] == "fail"]


def key_of(row: dict[str, Any]) -> tuple[str, int, str | None]:
    return row["event"], row["step"], row.get("split")


def test_the_replay_of_a_few_steps(tmp_path: Path) -> None:
    cfg = config(*MANY)
    train(cfg, tmp_path)
    result = replay_steps(RunDir(tmp_path / cfg.run_id), 8)  # the eight steps include the first growth op
    assert result["steps"] == 8 and "trained_weights" not in result
    assert [row["step"] for row in result["rows"] if row["event"] == "eval"] == [1]
    for path in (tmp_path / cfg.run_id / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(b"")
    without_weights = replay_steps(RunDir(tmp_path / cfg.run_id), 8)
    assert without_weights.keys() & {"last", "weights", "of", "params", "tokens"} == set()
    for row, other in zip(without_weights["rows"], result["rows"], strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
