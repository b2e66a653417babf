"""Shortcuts past layers: into the values of attention, and into the input of a block.

All shortcuts start with the weight 0, so a new model gives the same output as a model without shortcuts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.initial import initial_std
from mainrun.core.layers import Context, Linear


class ValueShortcut(Linear):
    """Compute what `value_shortcut` adds to the values: a projection of the token embedding, times a gate.

    The projection starts with random weights, because the gate would have no gradient otherwise.
    """

    def __init__(self, cfg: TrainConfig, std: float) -> None:
        super().__init__(cfg.d_model, cfg.kv_heads * cfg.head_width, bias=False)
        nn.init.normal_(self.weight, std=std)
        self.gate = nn.Parameter(torch.zeros(cfg.kv_heads))

    def forward(self, embedded: Tensor) -> Tensor:
        """Return the values (B, K, T, h) for token embeddings of shape (B, T, D)."""
        values = super().forward(embedded).unflatten(-1, (len(self.gate), -1))  # (B, T, K, h)
        values = values * self.gate.to(values.dtype).unsqueeze(-1)
        return values.transpose(1, 2)


class InputMix(nn.Module):
    """Compute the input of a block: the sum of x, x0 and skip.

    Each of them is multiplied by a learned scalar of the same name.
    """

    def __init__(self, cfg: TrainConfig, layer: int) -> None:
        super().__init__()
        self.x: nn.Parameter | None = None
        self.x0: nn.Parameter | None = None
        self.skip: nn.Parameter | None = None
        if cfg.x0_shortcut:
            self.x = nn.Parameter(torch.tensor(1.0))
            self.x0 = nn.Parameter(torch.tensor(0.0))
        if layer >= cfg.n_layer - cfg.skips:
            self.skip = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        mixed = x
        if self.x is not None:
            assert self.x0 is not None and context.x0 is not None
            mixed = self.x * x + self.x0 * context.x0
        if self.skip is not None:
            assert context.skip is not None
            mixed = mixed + self.skip * context.skip
        return mixed


class UNetSkips:
    """The outputs of the first half of the layers, which `unet` feeds to the second half in reverse order."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.sources = cfg.skips
        self.first_target = cfg.n_layer - cfg.skips
        self.outputs: list[Tensor] = []

    def take(self, layer: int) -> Tensor | None:
        """Return the output of layer n - 1 - i for layer i of the second half, and None for other layers."""
        return self.outputs.pop() if layer >= self.first_target else None

    def store(self, layer: int, x: Tensor) -> None:
        """Store the output of a layer of the first half."""
        if layer < self.sources:
            self.outputs.append(x)


def add_shortcuts(model: Any, cfg: TrainConfig) -> None:
    """Add the shortcuts of a config to the blocks of a model."""
    for layer, block in enumerate(model.blocks):
        if cfg.value_shortcut:
            std = initial_std(cfg, f"blocks.{layer}.attn.shortcut", inputs=cfg.d_model)
            block.attn.shortcut = ValueShortcut(cfg, std)
        if cfg.x0_shortcut or layer >= cfg.n_layer - cfg.skips:
            block.mix = InputMix(cfg, layer)
