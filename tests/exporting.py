"""Helpers for the tests of exported models: small runs that a Qwen2 checkpoint can express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import TINY
from torch import Tensor

from mainrun.config import TrainConfig, from_dict
from mainrun.run.session import train
from mainrun.store.rundir import RunDir

# the fields that every Qwen2 model has, and a few steps of training
QWEN: dict[str, Any] = TINY | {
    "norm": "rmsnorm", "position": "rope", "rope_theta": 1000.0, "mlp": "swiglu", "bias": False,
    "qkv_bias": True, "d_ff": 48, "optimizer": "adamw", "lr": 0.02, "max_steps": 4,
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return from_dict(QWEN | changes)


def trained(out: Path, **changes: Any) -> RunDir:
    """Train a run in the folder `out`."""
    cfg = config(**changes)
    train(cfg, out)
    return RunDir(out / cfg.run_id)


def some_ids(vocab_size: int, length: int = 16) -> Tensor:
    return torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
