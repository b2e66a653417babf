"""Averages of the weights over the steps: EMA and SWA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mainrun.config import TrainConfig
from mainrun.plan.plan import StepInputs


class Average:
    """The running average of a model's weights, if the config asks for EMA or SWA.

    `shadow` holds the average by parameter name. It is empty if there is no average.
    """

    def __init__(self, cfg: TrainConfig, model: nn.Module) -> None:
        self.live = dict(model.named_parameters())
        self.on = bool(cfg.ema or cfg.swa)
        self.differs = False  # whether the average may differ from the weights
        self.shadow: dict[str, torch.Tensor] = {}
        if self.on:
            self.shadow = {name: p.detach().clone() for name, p in self.live.items()}

    def update(self, inputs: StepInputs) -> None:
        """Move the average towards the current weights by the step's share of the new weights."""
        if self.on:
            self.differs |= inputs.average < 1
            weights = [p.detach() for p in self.live.values()]
            torch._foreach_lerp_(list(self.shadow.values()), weights, inputs.average)

    def separate(self, averages: dict[str, torch.Tensor]) -> None:
        """Continue from averages that differ from the weights."""
        self.differs = True
        self.shadow = {name: average.detach() for name, average in averages.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the duration of a `with` block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the model's weights and the average."""
        for name, average in self.shadow.items():
            p = self.live[name]
            weights = p.data
            p.data = average
            self.shadow[name] = weights
