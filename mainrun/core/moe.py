"""Mixture of experts: several MLPs in place of one. A router sends each token to its top k experts.

An expert is a plain MLP with its own weights (`mlp.experts.3.up.weight`), so optimizers see matrices.
The router is trained at `lr_aux`, like the embeddings and the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # `import torch` has loaded it

from mainrun.config import TrainConfig


class MoE(nn.Module):
    """A layer of experts. Shapes: N tokens, width D, E experts, k experts per token."""

    def __init__(self, cfg: TrainConfig, expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        _disable_compilation()
        self.k = cfg.top_k
        self.renormalised = cfg.router_weights == "renormalised"
        self.router = nn.Linear(cfg.d_model, cfg.experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(cfg.experts))

    def scores(self, x: Tensor) -> Tensor:
        """Return the router's scores (N, E) in the dtype of its weights.

        In bfloat16, scores that are close would become equal.
        """
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.flatten(0, -2).to(self.router.weight.dtype), self.router.weight)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's experts and their weights, both (N, k).

        If scores are equal, the expert with the lower index wins on every machine.
        """
        best, chosen = self.scores(x).sort(dim=-1, descending=True, stable=True)
        weight = best[:, : self.k].softmax(-1) if self.renormalised else best.softmax(-1)[:, : self.k]
        return chosen[:, : self.k], weight

    def shares(self, chosen: Tensor) -> list[int]:
        """Return how many rows each expert gets."""
        experts = len(self.experts)
        # A fake tensor has a shape and no values. The memory estimate assumes equal shares.
        if isinstance(chosen, FakeTensor):
            n = chosen.numel()
            return [n * (i + 1) // experts - n * i // experts for i in range(experts)]
        return chosen.flatten().bincount(minlength=experts).tolist()

    def forward(self, x: Tensor) -> Tensor:
        chosen, weight = self.route(x)
        # (N k): the rows of the first expert come first, each expert's rows in token order
        order = chosen.flatten().argsort(stable=True)
        rows = x.flatten(0, -2)[order // self.k].split(self.shares(chosen))
        outputs = [expert(part) for expert, part in zip(self.experts, rows, strict=True)]
        y = torch.cat(outputs)[order.argsort()].view(*chosen.shape, -1)  # (N, k, D)
        return (y * weight.unsqueeze(-1)).sum(1).view_as(x)


@cache
def _disable_compilation() -> None:
    """Keep torch.compile out of MoE.forward. The shares differ in each step, so each step would be compiled.

    `torch.compiler.disable` imports torch._dynamo, which takes 0.8 s, so it is called for the first MoE and
    not when this module is imported.
    """
    MoE.forward = torch.compiler.disable(MoE.forward)  # type: ignore[method-assign]
