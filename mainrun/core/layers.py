"""The layers that every block is made of: rotary position embedding, RMSNorm and the linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.kernels import linear, rms_norm


def rope_table(length: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of each position * frequency, as two tensors of shape (T, h/2)."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to queries or keys `x` of shape (B, heads, T, h)."""
    a, b = x.chunk(2, dim=-1)
    cos = cos[: x.size(-2)].to(x.dtype)
    sin = sin[: x.size(-2)].to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a learned gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


def make_norm(cfg: TrainConfig) -> nn.Module:
    """Return the normalization layer that the config selects."""
    if cfg.norm == "rmsnorm":
        return RMSNorm(cfg.d_model)
    return nn.LayerNorm(cfg.d_model, bias=cfg.bias)


class Linear(nn.Linear):
    """A linear layer that uses the matrix product of `mainrun.core.kernels`."""

    def effective_weight(self) -> Tensor:
        """Return the weight of the layer. Subclasses add low-rank terms to the weight."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def cast(x: Tensor) -> Tensor:
    """Cast `x` to bfloat16 under autocast. One cast of the input is faster than one cast per projection."""
    return x.bfloat16() if torch.is_autocast_enabled(x.device.type) else x
