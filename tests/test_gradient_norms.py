"""The gradient norms by layer that the first steps of a run log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from mainrun.config import TrainConfig, from_dict
from mainrun.core.cuda_graph import CudaGraph
from mainrun.core.device import Device
from mainrun.core.gradient_norms import gradient_norms, named_norms
from mainrun.errors import Interrupted
from mainrun.plan.plan import Plan
from mainrun.run.session import train
from mainrun.store.rundir import RunDir
from mainrun.train import State, TrainStep, build

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "num_titles": 120, "optimizer": "adamw", "compile": "off", "eval_per_epoch": 0, "dropout": 0.1,
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | SMALL | changes)


def step_rows(out: Path, cfg: TrainConfig) -> list[dict[str, Any]]:
    rows = [dict(row) for row in RunDir(out / cfg.run_id).metrics() if row["event"] == "step"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_each_layer_has_the_norm_of_its_own_parameters() -> None:
    cfg = config(tie_head=False, frozen=[1], n_layer=3)
    model = build(cfg, 400)
    for i, p in enumerate(model.parameters()):
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.01 * (i + 1))
    layers = {
        "embedding": [model.embed, model.positions],
        "block_0": [model.blocks[0]],
        "block_1": [],
        "block_2": [model.blocks[2]],
        "head": [model.norm, model.head],
    }
    logged = named_norms(gradient_norms(model).tolist())
    assert list(logged) == list(layers)
    for name, modules in layers.items():
        grads = [p.grad.double() for module in modules for p in module.parameters()]  # type: ignore[union-attr]
        assert logged[name] == pytest.approx(math.sqrt(sum(float((g * g).sum()) for g in grads)), rel=1e-4), (
            name
        )


def test_only_the_first_steps_have_norms_and_the_bits_stay_the_same(tmp_path: Path) -> None:
    """The norms are those before clipping, so together they have the norm of the whole gradient."""
    off, on = config(clip=0.1, log_every=4), config(clip=0.1, log_every=4, grad_norm_steps=3)
    summaries = [train(cfg, tmp_path) for cfg in (off, on)]
    assert summaries[0]["weights"] == summaries[1]["weights"]
    plain, normed = step_rows(tmp_path, off), step_rows(tmp_path, on)
    assert [row["step"] for row in normed][:5] == [1, 2, 3, 4, 8], "the first steps are always logged"
    assert not any("grad_norms" in row for row in [*plain, *normed[3:]])
    assert normed[3:] == plain
    for row in normed[:3]:
        norms = row["grad_norms"]
        assert list(norms) == ["embedding", "block_0", "block_1", "head"]
        assert row["grad_norm"] > 0.1, "the gradient is clipped"
        assert math.hypot(*norms.values()) == pytest.approx(row["grad_norm"], rel=1e-5)


def test_a_routed_run_logs_both_norms_and_statistics(tmp_path: Path) -> None:
    cfg = config(block_pattern="DM", grad_norm_steps=1, max_steps=2)
    train(cfg, tmp_path)
    first, second = step_rows(tmp_path, cfg)
    assert list(first["grad_norms"]) == ["embedding", "block_0", "block_1", "head"]
    assert math.hypot(*first["grad_norms"].values()) == pytest.approx(first["grad_norm"], rel=1e-5)
    assert first["aux"].keys() == second["aux"].keys() and "grad_norms" not in second


def test_a_resumed_run_has_each_norm_once(tmp_path: Path) -> None:
    cfg = config(grad_norm_steps=4, max_steps=6)
    train(cfg, tmp_path / "whole")
    for until in (2, 3):
        with pytest.raises(Interrupted):
            train(cfg, tmp_path / "parts", until=until)
    train(cfg, tmp_path / "parts")
    assert step_rows(tmp_path / "parts", cfg) == step_rows(tmp_path / "whole", cfg)
    assert [row["step"] for row in step_rows(tmp_path / "parts", cfg) if "grad_norms" in row] == [1, 2, 3, 4]


def test_a_recorded_step_with_norms_is_not_replayed_for_a_step_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config(grad_norm_steps=2, dropout=0.0)
    step = TrainStep(State(cfg, build(cfg, 400)), Device(cfg))
    keys: list[Any] = []

    def call(self: CudaGraph, key: Any, work: Any, *given: Any) -> Any:
        keys.append(key)
        return work(*given)

    monkeypatch.setattr(CudaGraph, "__call__", call)
    inputs = Plan(cfg, 100_000).at(0)
    tokens = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.int64)
    counts = []
    for step.state.step in range(4):
        counts.append(len(step.gradients(tokens, tokens, inputs)))
    assert counts == [6, 6, 2, 2]
    assert keys[0] == keys[1] != keys[2] == keys[3]
