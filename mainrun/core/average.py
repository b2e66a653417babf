"""Average a model's weights over the training steps, with EMA or SWA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mainrun.config import TrainConfig
from mainrun.plan.plan import StepInputs


class Average:
    """The running average of a model's weights, if the config enables EMA or SWA.

    `shadow` maps each parameter name to the parameter's average. Without EMA or SWA, `shadow` is empty.
    """

    def __init__(self, cfg: TrainConfig, model: nn.Module) -> None:
        self.live = dict(model.named_parameters())
        self.on = bool(cfg.ema or cfg.swa)
        self.differs = False  # True if the average may differ from the weights
        self.shadow: dict[str, torch.Tensor] = {}
        if self.on:
            self.shadow = {name: p.detach().clone() for name, p in self.live.items()}

    def update(self, inputs: StepInputs) -> None:
        """Update the average: average += inputs.average * (weights - average)."""
        if self.on:
            self.differs |= inputs.average < 1
            weights = [p.detach() for p in self.live.values()]
            torch._foreach_lerp_(list(self.shadow.values()), weights, inputs.average)

    def separate(self, averages: dict[str, torch.Tensor]) -> None:
        """Replace the running averages with the given averages, which may differ from the weights."""
        self.differs = True
        self.shadow = {name: average.detach() for name, average in averages.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averaged weights as the model's weights inside a `with` block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Swap the model's weights and the averaged weights."""
        for name, average in self.shadow.items():
            p = self.live[name]
            weights = p.data
            p.data = average
            self.shadow[name] = weights
