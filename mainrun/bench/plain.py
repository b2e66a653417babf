"""The rival: a textbook GPT-2 and its loop, written as one writes them first. Nothing in here is to be made fast.

Only the sizes and the dropout come from the config. What a config may ask for beyond the public baseline's model (another norm,
rotary positions, bfloat16, Muon) is not in here, so a step of it is always the same kind of work: float32, all dropouts, AdamW.
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
        self.norm1, self.norm2 = nn.LayerNorm(cfg.d_model), nn.LayerNorm(cfg.d_model)
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.out = nn.Linear(cfg.d_model, cfg.d_model)
        self.up = nn.Linear(cfg.d_model, 4 * cfg.d_model)
        self.down = nn.Linear(4 * cfg.d_model, cfg.d_model)
        _, self.attn_drop, self.resid_drop = (nn.Dropout(p) for p in cfg.dropouts)

    def attention(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            t.view(B, T, self.heads, D // self.heads).transpose(1, 2) for t in self.qkv(x).split(D, dim=2)
        )
        score = q @ k.transpose(-2, -1) / math.sqrt(D // self.heads)  # (B, heads, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weight = self.attn_drop(F.softmax(score.masked_fill(future, -torch.inf), dim=-1))
        return self.out((weight @ v).transpose(1, 2).reshape(B, T, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.resid_drop(self.attention(self.norm1(x)))
        return x + self.resid_drop(self.down(F.gelu(self.up(self.norm2(x)))))


class PlainGPT(nn.Module):
    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, cfg.d_model)
        self.places = nn.Embedding(cfg.block_size, cfg.d_model)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.d_model)
        self.head = nn.Linear(cfg.d_model, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.drop(self.tokens(idx) + self.places(torch.arange(idx.size(1), device=idx.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, clip: float
) -> float:
    logits = model(x)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
    optimizer.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()
