"""Causal self-attention, the first part of a transformer block.

The letters in shapes mean: B rows, T tokens, D model width, H query heads, K key/value heads, h head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.kernels import attend, linear
from mainrun.core.layers import Context, Linear, RMSNorm, cast, rotate
from mainrun.core.shortcuts import ValueShortcut


class Attention(nn.Module):
    """Causal self-attention.

    Optional parts are grouped keys and values, QK norm, gates, value residuals, value shortcuts and shifted
    keys.
    """

    def __init__(self, cfg: TrainConfig, first: bool) -> None:
        super().__init__()
        self.heads = cfg.n_head
        self.kv_heads = cfg.kv_heads
        self.width = cfg.head_width
        qkv_bias = cfg.qkv_bias
        if qkv_bias is None:
            qkv_bias = cfg.bias
        self.q = Linear(cfg.d_model, cfg.n_head * cfg.head_width, bias=qkv_bias)
        self.k = Linear(cfg.d_model, cfg.kv_heads * cfg.head_width, bias=qkv_bias)
        self.v = Linear(cfg.d_model, cfg.kv_heads * cfg.head_width, bias=qkv_bias)
        self.o = Linear(cfg.n_head * cfg.head_width, cfg.d_model, bias=cfg.bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_width)
            self.k_norm = RMSNorm(cfg.head_width)
        self.gate = Linear(cfg.d_model, cfg.n_head, bias=False) if cfg.attn_gate else None
        self.first_share: nn.Parameter | None = None
        if cfg.value_residual and not first:
            self.first_share = nn.Parameter(torch.tensor(0.5))
        self.shortcut: ValueShortcut | None = None
        self.unshifted = cfg.rotated_channels if cfg.key_shift else 0
        self.fused = False
        self.dropout = 0.0

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries (B, H, T, h), keys (B, K, T, h) and values (B, K, T, h) in one matrix product."""
        layers = (self.q, self.k, self.v)
        weight = torch.cat([layer.effective_weight() for layer in layers])
        bias = None
        if self.q.bias is not None:
            bias = torch.cat([layer.bias for layer in layers])
        qkv = linear(x, weight, bias)  # (B, T, (H + 2K) h)
        q, k, v = qkv.split([layer.out_features for layer in layers], dim=-1)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape (B, T, heads * h) to (B, heads, T, h)."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def forward(self, x: Tensor, context: Context, dropout: bool = True) -> tuple[Tensor, Tensor]:
        """Return the output (B, T, D) and the values (B, K, T, h). Later layers may reuse the values."""
        x = cast(x)  # (B, T, D)
        q, k, v = self.project(x)
        q = self.q_norm(q)  # (B, H, T, h)
        k = self.k_norm(k)  # (B, K, T, h)
        if self.first_share is not None and context.v_first is not None:
            v = torch.lerp(v, context.v_first, self.first_share.to(v.dtype))  # (B, K, T, h)
        if self.shortcut is not None:
            assert context.embedded is not None
            v = v + self.shortcut(context.embedded)  # (B, K, T, h)
        if context.rope:
            q = rotate(q, *context.rope)
            k = rotate(k, *context.rope)
        if self.unshifted:
            k = shift_keys(k, self.unshifted, context.bias)
        values = v
        if self.kv_heads != self.heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)  # (B, H, T, h)
            values = v.repeat_interleave(self.heads // self.kv_heads, dim=1)  # (B, H, T, h)
        y = self.weigh(q, k, values, context, dropout)  # (B, H, T, h)
        if self.gate is not None:
            gate = 2 * torch.sigmoid(self.gate(x))  # (B, T, H)
            y = y * gate.transpose(1, 2).unsqueeze(-1)
        y = y.transpose(1, 2).reshape(*x.shape[:2], -1)  # (B, T, H h)
        return self.o(y), v

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, context: Context, dropout: bool) -> Tensor:
        """Return softmax(q k' / sqrt(h) + bias) v, with dropout on the attention weights.

        The tensors q, k and v have the shape (B, H, T, h), like the result.
        """
        bias = context.bias
        if self.fused:
            # the fused kernel generates the dropout masks itself
            p = self.dropout if self.training and dropout else 0.0
            causal = bias is None
            return F.scaled_dot_product_attention(
                q.to(v.dtype), k.to(v.dtype), v, bias, dropout_p=p, is_causal=causal
            )
        mask = None
        if context.masks and dropout and self.dropout:
            B, H, T, _ = q.shape
            mask = context.masks.take((B, H, T, T))
        assert bias is not None
        # autocast would convert the attention scores to float32 and back
        with torch.autocast(q.device.type, enabled=False):
            return attend(q * self.width**-0.5, k, v, bias, mask, self.dropout)


def shift_keys(k: Tensor, first_channel: int, bias: Tensor | None) -> Tensor:
    """Replace the channels from `first_channel` of each key (B, K, T, h) with those of the previous token.

    The first token of a row has no previous token, so it gets zeros. With `title_mask`, so does the first
    token of a title.
    """
    before = k[..., :-1, first_channel:]
    if bias is not None and bias.dim() == 4:
        # the bias is below 0 where a token may not attend to the previous token, which is in another title
        other_title = bias.diagonal(-1, -2, -1) < 0  # (B, 1, T - 1)
        before = before.masked_fill(other_title.unsqueeze(-1), 0)
    return torch.cat([k[..., :first_channel], F.pad(before, (0, 0, 1, 0))], dim=-1)
