"""mainrun.core.optimizers"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# -- optimiser


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: every singular value of an update is about 1. Matrices of one shape are done in one batch.

    The rate is in AdamW's units: an update has the size (rms) that AdamW's would have.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {"lr": 1.0, "weight_decay": 0.0})
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                moments, grads = (
                    [self.state[p]["momentum_buffer"] for p in params],
                    [p.grad for p in params if p.grad is not None],
                )
                torch._foreach_lerp_(moments, grads, 1 - self.momentum)
                ahead = (
                    torch._foreach_lerp(grads, moments, self.momentum) if self.momentum else grads
                )  # Nesterov's look ahead
                updates = orthogonal(torch.stack(ahead)).to(params[0].dtype) * (
                    -group["lr"] * 0.2 * math.sqrt(max(shape))
                )
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates.unbind())


def orthogonal(batch: Tensor) -> Tensor:
    """The nearest matrices with singular values near 1, by five quintic Newton-Schulz steps in bfloat16. (N, rows, columns)"""
    x = batch.bfloat16()
    if tall := x.size(1) > x.size(2):
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x
