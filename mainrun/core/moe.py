"""Experts: many MLPs in the place of one. Each token goes through the top k of them, by a router's scores.

An expert is a plain MLP with weights of its own (`mlp.experts.3.up.weight`), so optimisers see matrices. The router trains with the
embeddings and the head, at lr_aux (train.Optimizers says why).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mainrun.config import TrainConfig


class MoE(nn.Module):
    """Shapes: N tokens, D width, E experts, k of them for each token."""

    def __init__(self, cfg: TrainConfig, expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.k, self.renormalised = cfg.top_k, cfg.router_weights == "renormalised"
        self.router = nn.Linear(cfg.d_model, cfg.experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(cfg.experts))

    def scores(self, x: Tensor) -> Tensor:
        """(N, E), in the width of the weights: in bfloat16 near scores would be equal."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.flatten(0, -2).to(self.router.weight.dtype), self.router.weight)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights, (N, k) both. Of equal scores the first wins, on every machine."""
        best, chosen = self.scores(x).sort(dim=-1, descending=True, stable=True)
        weight = best[:, : self.k].softmax(-1) if self.renormalised else best.softmax(-1)[:, : self.k]
        return chosen[:, : self.k], weight

    def shares(self, chosen: Tensor) -> list[int]:
        """How many of the rows each expert gets."""
        n, experts = chosen.numel(), len(self.experts)
        if isinstance(
            chosen, FakeTensor
        ):  # sizes without numbers, where memory is counted: as if all were alike
            return [n * (i + 1) // experts - n * i // experts for i in range(experts)]
        found: list[int] = chosen.flatten().bincount(minlength=experts).tolist()
        return found

    # the shares are other ones at each step, and each would be compiled anew
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        chosen, weight = self.route(x)
        order = chosen.flatten().argsort(
            stable=True
        )  # (N k): the rows of the first expert first, each in the order of the tokens
        rows = x.flatten(0, -2)[order // self.k].split(self.shares(chosen))
        y = torch.cat([expert(part) for expert, part in zip(self.experts, rows, strict=True)])
        y = y[order.argsort()].view(*chosen.shape, -1)  # (N, k, D)
        return (y * weight.unsqueeze(-1)).sum(1).view_as(x)
