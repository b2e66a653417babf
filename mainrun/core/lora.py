"""Low-rank terms: a weight W acts as W + (alpha / rank) B A. A is random and B zero at first, so nothing changes; W trains on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainrun.config import TrainConfig


class LowRank(nn.Module):
    """A (rank, columns) and B (rows, rank) beside a weight (rows, columns)."""

    weight: Tensor

    def add(self, rank: int, alpha: float) -> None:
        rows, columns = self.weight.shape
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, columns))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank))
        nn.init.normal_(self.lora_a, std=columns**-0.5)

    def effective_weight(self) -> Tensor:
        """The whole weight."""
        return self.weight + self.scale * (self.lora_b @ self.lora_a)


class LowRankLinear(LowRank, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(
            F.linear(x, self.lora_a), self.lora_b
        )


class LowRankEmbedding(LowRank, nn.Embedding):
    """Where the head is tied, the head takes `table`: the term is at both ends, and merging it changes neither."""

    def forward(self, idx: Tensor) -> Tensor:
        return F.embedding(idx, self.weight) + self.scale * (F.embedding(idx, self.lora_b) @ self.lora_a)


def add_low_rank(model: Any, cfg: TrainConfig) -> None:
    """To q, k, v and o of each block, and to the embedding, as the config says."""
    for attn in (block.attn for block in model.blocks if cfg.attn_lora_rank):
        for name in "qkvo":
            plain = getattr(attn, name)
            made = LowRankLinear(plain.in_features, plain.out_features, bias=plain.bias is not None)
            made.add(cfg.attn_lora_rank, cfg.lora_alpha)
            setattr(attn, name, made)
    if cfg.embed_lora_rank:
        model.embed = LowRankEmbedding(*model.embed.weight.shape)
        model.embed.add(cfg.embed_lora_rank, cfg.lora_alpha)
