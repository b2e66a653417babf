"""The kinds of parameters that a model has: low-rank terms, routers, and the base, which is all the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from mainrun.config import TrainConfig
from mainrun.core.sharding import trained_tensors


def is_low_rank(name: str) -> bool:
    """Return whether a parameter is a factor of a low-rank term."""
    return name.endswith((".lora_a", ".lora_b"))


def is_base(name: str) -> bool:
    """Return whether a parameter belongs to the base, which `base_frozen` keeps unchanged."""
    return not is_low_rank(name) and ".router." not in name


def freeze(cfg: TrainConfig, model: Any) -> None:
    """Turn off the gradients of all parameters that the config freezes."""
    for layer in cfg.frozen:
        model.blocks[layer].requires_grad_(False)
    if cfg.base_frozen:
        for name, p in model.named_parameters():
            if is_base(name):
                p.requires_grad_(False)


def saved_parameters(cfg: TrainConfig, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a saved state contains, by name.

    A frozen base is not saved, because `build` creates the same base again. In a sharded run, the parameters
    are the parts that this process holds.
    """
    parameters = trained_tensors(model)
    if not cfg.base_frozen:
        return parameters
    return {name: p for name, p in parameters.items() if not is_base(name)}
