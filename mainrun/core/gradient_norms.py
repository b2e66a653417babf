"""The norm of the gradient of each layer, which the first steps of a run can log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mainrun.core.sharding import layer_gradients, norms_of_whole


def gradient_norms(model: Any) -> Tensor:
    """Return the norm of the gradient of the embedding, of each block, and of the head with the final norm.

    Call this function before the gradients are clipped. A part without a gradient has the norm 0.
    """
    layers: list[list[Tensor]] = [[] for _ in range(len(model.blocks) + 2)]
    for name, gradient in layer_gradients(model):
        layers[_index(name)].append(gradient)
    zero = torch.zeros((), device=model.embed.weight.device)
    norms = [nn.utils.get_total_norm(layer) if layer else zero for layer in layers]
    return norms_of_whole(model, torch.stack(norms))


def _index(name: str) -> int:
    """Return the index of a parameter's layer in the result of `gradient_norms`."""
    part, _, rest = name.partition(".")
    if part == "blocks":
        return 1 + int(rest.partition(".")[0])
    return 0 if part in ("embed", "positions") else -1


def named_norms(norms: list[float]) -> dict[str, float]:
    """Return the norms under the names that metrics.jsonl contains."""
    blocks = [f"block_{i}" for i in range(len(norms) - 2)]
    return dict(zip(["embedding", *blocks, "head"], norms, strict=True))
