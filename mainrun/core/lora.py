"""Low-rank adaptation (LoRA): layers whose effective weight is W + (alpha / rank) B A.

A is initialized with random numbers and B with zeros, so a new layer gives the same output as a layer with
the weight W. A and B are always trained. W is trained too, unless the config sets `base_frozen`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainrun.config import TrainConfig


class LowRank(nn.Module):
    """A mixin that adds a low-rank term B A to a weight matrix of shape (rows, columns).

    A has the shape (rank, columns), and B has the shape (rows, rank).
    """

    weight: Tensor

    def add(self, rank: int, alpha: float) -> None:
        """Create the matrices A and B."""
        rows, columns = self.weight.shape
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, columns))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank))
        nn.init.normal_(self.lora_a, std=columns**-0.5)

    def effective_weight(self) -> Tensor:
        """Return the sum of the weight matrix and the low-rank term."""
        return self.weight + self.scale * (self.lora_b @ self.lora_a)


class LowRankLinear(LowRank, nn.Linear):
    """A linear layer whose weight has a low-rank term."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


class LowRankEmbedding(LowRank, nn.Embedding):
    """An embedding whose weight has a low-rank term.

    A tied head uses `effective_weight`, so the low-rank term affects both the embedding and the head. Merging
    the low-rank term into the weight therefore changes neither the embedding's output nor the head's output.
    """

    def forward(self, idx: Tensor) -> Tensor:
        return F.embedding(idx, self.weight) + self.scale * (F.embedding(idx, self.lora_b) @ self.lora_a)


def add_low_rank(model: Any, cfg: TrainConfig) -> None:
    """Replace the layers for which the config sets a rank with low-rank layers."""
    for block in model.blocks:
        if cfg.attn_lora_rank:
            _replace_layers(block.attn, ("q", "k", "v", "o"), cfg.attn_lora_rank, cfg.lora_alpha)
        if cfg.mlp_lora_rank:
            _replace_layers(block.mlp, ("gate", "up", "down"), cfg.mlp_lora_rank, cfg.lora_alpha)
    if cfg.embed_lora_rank:
        model.embed = LowRankEmbedding(*model.embed.weight.shape)
        model.embed.add(cfg.embed_lora_rank, cfg.lora_alpha)


def _replace_layers(module: nn.Module, names: tuple[str, ...], rank: int, alpha: float) -> None:
    """Replace linear layers of a module with low-rank layers."""
    for name in names:
        plain = getattr(module, name)
        if plain is None:  # only a swiglu MLP has a gate
            continue
        layer = LowRankLinear(plain.in_features, plain.out_features, bias=plain.bias is not None)
        layer.add(rank, alpha)
        setattr(module, name, layer)
