"""A plain GPT-2 and its training loop, which `mainrun bench step` compares with mainrun.

The plain training loop has no optimizations. The loop takes only the sizes and the dropout rates from the
config, and always uses the architecture of the public baseline, float32 and AdamW.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainrun.config import TrainConfig


class PlainBlock(nn.Module):
    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__()
        self.heads = cfg.n_head
        self.norm1 = nn.LayerNorm(cfg.d_model)
        self.norm2 = nn.LayerNorm(cfg.d_model)
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.out = nn.Linear(cfg.d_model, cfg.d_model)
        self.up = nn.Linear(cfg.d_model, 4 * cfg.d_model)
        self.down = nn.Linear(4 * cfg.d_model, cfg.d_model)
        _, attn_dropout, resid_dropout = cfg.dropouts
        self.attn_drop = nn.Dropout(attn_dropout)
        self.resid_drop = nn.Dropout(resid_dropout)

    def split_heads(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        # The shape is (B, heads, T, D / heads).
        return x.view(B, T, self.heads, D // self.heads).transpose(1, 2)

    def attention(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = map(self.split_heads, self.qkv(x).split(D, dim=2))
        score = q @ k.transpose(-2, -1) / math.sqrt(D // self.heads)  # the shape is (B, heads, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weight = self.attn_drop(F.softmax(score.masked_fill(future, -torch.inf), dim=-1))
        return self.out((weight @ v).transpose(1, 2).reshape(B, T, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.resid_drop(self.attention(self.norm1(x)))
        return x + self.resid_drop(self.down(F.gelu(self.up(self.norm2(x)))))


class PlainGPT(nn.Module):
    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, cfg.d_model)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.d_model)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.d_model)
        self.head = nn.Linear(cfg.d_model, vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        positions = torch.arange(idx.size(1), device=idx.device)
        x = self.drop(self.token_embedding(idx) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, clip: float
) -> float:
    """Run one training step and return its loss."""
    logits = model(x)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
    optimizer.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()
