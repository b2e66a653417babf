"""Mixture of experts: a layer with several MLPs, where a router sends each token to k of the MLPs.

Each expert is an MLP with separate weight matrices, for example `mlp.experts.3.up.weight`. An optimizer
therefore treats an expert's weights like the weights of any other layer. The router is trained at the
learning rate `lr_aux`, like the embeddings and the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # `import torch` has already loaded this module

from mainrun.config import TrainConfig


class MoE(nn.Module):
    """A layer of experts.

    In shapes such as (N, D), N is the number of tokens, D is the width of the model, E is the number of
    experts, and k is the number of experts per token.
    """

    def __init__(self, cfg: TrainConfig, expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        _disable_compilation()
        self.k = cfg.top_k
        self.renormalised = cfg.router_weights == "renormalised"
        self.router = nn.Linear(cfg.d_model, cfg.experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(cfg.experts))

    def scores(self, x: Tensor) -> Tensor:
        """Return the router's scores, of shape (N, E), in the dtype of the router's weights.

        The scores are not computed in bfloat16, which could round two slightly different scores to the same
        number.
        """
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.flatten(0, -2).to(self.router.weight.dtype), self.router.weight)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices and the weights of each token's experts. Both tensors have the shape (N, k).

        If two scores are equal, the expert with the lower index comes first on every machine.
        """
        best, chosen = self.scores(x).sort(dim=-1, descending=True, stable=True)
        weight = best[:, : self.k].softmax(-1) if self.renormalised else best.softmax(-1)[:, : self.k]
        return chosen[:, : self.k], weight

    def shares(self, chosen: Tensor) -> list[int]:
        """Return the number of rows that each expert receives."""
        experts = len(self.experts)
        # The memory estimate uses fake tensors, which have no values, and therefore assumes that all experts
        # receive the same number of rows.
        if isinstance(chosen, FakeTensor):
            n = chosen.numel()
            return [n * (i + 1) // experts - n * i // experts for i in range(experts)]
        return chosen.flatten().bincount(minlength=experts).tolist()

    def forward(self, x: Tensor) -> Tensor:
        chosen, weight = self.route(x)
        # `order` sorts all N * k rows by expert. Rows of the same expert stay in the order of their tokens.
        order = chosen.flatten().argsort(stable=True)
        rows = x.flatten(0, -2)[order // self.k].split(self.shares(chosen))
        outputs = [expert(part) for expert, part in zip(self.experts, rows, strict=True)]
        y = torch.cat(outputs)[order.argsort()].view(*chosen.shape, -1)  # (N, k, D)
        return (y * weight.unsqueeze(-1)).sum(1).view_as(x)


@cache
def _disable_compilation() -> None:
    """Exclude MoE.forward from torch.compile.

    The number of rows per expert changes in each step, so torch.compile would recompile the layer in each
    step. `torch.compiler.disable` imports torch._dynamo, which takes 0.8 s. To keep the import of this module
    fast, this function is called only when the first MoE is created.
    """
    MoE.forward = torch.compiler.disable(MoE.forward)  # type: ignore[method-assign]
