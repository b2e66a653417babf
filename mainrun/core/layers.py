"""The layers that every block is made of: rotary position embedding, RMSNorm and the linear layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.dropout import Masks
from mainrun.core.kernels import linear, rms_norm

Rope = tuple[Tensor, Tensor]  # the cosines and sines of the tokens, (T, h/2) or (B, 1, T, h/2)


class Context(NamedTuple):
    """What a block needs besides its input. The tensors belong to the tokens of the block's input."""

    bias: Tensor | None  # 0 where a token may attend and -inf elsewhere, (T, T) or (B, 1, T, T)
    rope: Rope | None
    v_first: Tensor | None  # the values (B, K, T, h) of the first block, for value residuals
    masks: Masks | None
    embedded: Tensor | None = None  # the token embeddings (B, T, D), for value shortcuts
    x0: Tensor | None = None  # the input (B, T, D) of the first block, for x0 shortcuts
    skip: Tensor | None = None  # the output (B, T, D) of an earlier layer, for skip connections

    def at(self, positions: Tensor) -> Context:
        """Return the context of the tokens at the positions (B, n).

        The positions ascend in each row, except for padding at the end of the row.
        """
        n = positions.size(1)
        bias = self.bias
        if bias is not None and bias.dim() == 2:
            bias = bias[:n, :n]  # a causal mask is the same for any tokens in ascending order
        elif bias is not None:
            index = positions[:, None, :, None]  # (B, 1, n, 1)
            bias = bias.take_along_dim(index, 2).take_along_dim(index.mT, 3)
            # padding at the end of a row may have an earlier position than the tokens before the padding
            later = torch.ones(n, n, dtype=torch.bool, device=bias.device).triu(1)
            bias = bias.masked_fill(later, -torch.inf)
        rope = None
        if self.rope is not None:
            cos, sin = self.rope
            rope = (cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))  # (B, 1, n, h/2)
        v_first = self.v_first
        if v_first is not None:
            v_first = v_first.take_along_dim(positions[:, None, :, None], 2)
        embedded, x0, skip = (
            x if x is None else x.take_along_dim(positions.unsqueeze(-1), 1)
            for x in (self.embedded, self.x0, self.skip)
        )
        return Context(bias, rope, v_first, self.masks, embedded, x0, skip)


def bias_of(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an attention bias: 0 where a token may attend, and -inf elsewhere.

    visible: a mask that is true where a token may attend.
    """
    if torch.is_autocast_enabled(visible.device.type):
        dtype = torch.bfloat16
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def rope_table(length: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of each position * frequency, as two tensors of shape (T, h/2)."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to queries or keys `x` of shape (B, heads, T, h).

    Channels beyond the width of the tables stay unchanged.
    """
    rotated = 2 * cos.size(-1)
    rest = []
    if rotated < x.size(-1):
        rest = [x[..., rotated:]]
        x = x[..., :rotated]
    a, b = x.chunk(2, dim=-1)
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, *rest], dim=-1)


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
