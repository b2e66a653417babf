"""Tests that every row of the OPTIMIZERS table describes its optimizer class correctly."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY

from mainrun.config import TrainConfig, from_dict
from mainrun.core.optimizers import MAKERS, Optimizers
from mainrun.plan import optimizers
from mainrun.plan.cost import size
from mainrun.plan.optimizers import OPTIMIZERS, OptimizerSpec
from mainrun.plan.plan import Plan
from mainrun.train import build

VOCABULARY = 300


def config(optimizer: str) -> TrainConfig:
    return from_dict(TINY | {"optimizer": optimizer, "lr": 0.01, "momentum": 0.9, "vocab_size": VOCABULARY})


def stepped(cfg: TrainConfig) -> Optimizers:
    """Return the optimizers of a model after one step."""
    model = build(cfg, VOCABULARY)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    result = Optimizers(cfg, model)
    result.step(Plan(cfg, 10_000).at(0))
    return result


def test_every_row_has_a_maker() -> None:
    assert MAKERS.keys() == OPTIMIZERS.keys()
    assert {spec.others for spec in OPTIMIZERS.values()} - {""} <= OPTIMIZERS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_names_the_state_that_the_optimizer_keeps(name: str) -> None:
    spec = OPTIMIZERS[name]
    others = OPTIMIZERS[spec.others].state if spec.others else {}
    kept = {full_name.rpartition("/")[2] for full_name in stepped(config(name)).state()}
    assert kept - {"step"} == {*spec.state, *others}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bytes_of_the_plan_are_those_of_the_state(name: str) -> None:
    cfg = config(name)
    state = stepped(cfg).state()
    counted = sum(t.numel() * t.element_size() for key, t in state.items() if not key.endswith("/step"))
    assert counted == size(cfg).moments


def test_two_rows_that_disagree_about_a_tensor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optimizers.OPTIMIZERS, "odd", OptimizerSpec({"exp_avg": 2}))
    with pytest.raises(ValueError, match="two rows of OPTIMIZERS give 'exp_avg' different exponents"):
        optimizers.state_powers()
