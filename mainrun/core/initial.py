"""The standard deviation of the initial weights of each linear layer and each embedding."""

from __future__ import annotations

import math

from mainrun.config import TrainConfig


def initial_std(cfg: TrainConfig, name: str, inputs: int) -> float:
    """Return the standard deviation of the initial weights of a module.

    With `init=kaiming`, the linear layers of attention and of the MLPs follow He et al., who derived the
    factor sqrt(2 / inputs) for ReLU. The embeddings, the head and the routers keep `init_std`.

    name: the name of the module, such as blocks.0.mlp.up.
    inputs: the number of inputs of the linear layer.
    """
    std = cfg.init_std
    if cfg.init == "kaiming" and name.startswith("blocks.") and not name.endswith(".router"):
        std = math.sqrt(2 / inputs)
    if cfg.init_depth_scaled and name.endswith((".o", ".down")):
        std /= math.sqrt(2 * cfg.n_layer)
    return std
