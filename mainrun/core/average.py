"""Averages of the weights over the steps: EMA and SWA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mainrun.config import TrainConfig
from mainrun.plan.plan import StepInputs


class Average:
    """The weights that are scored: the trained ones, or their EMA or SWA where the config asks for one."""

    def __init__(self, cfg: TrainConfig, model: nn.Module) -> None:
        self.live = dict(model.named_parameters())
        self.on = bool(cfg.ema or cfg.swa)
        self.apart = False  # until a step has averaged, the shadow is the weights
        self.shadow = {name: p.detach().clone() for name, p in self.live.items()} if self.on else {}

    def update(self, inputs: StepInputs) -> None:
        if self.on:
            self.apart |= inputs.average < 1
            torch._foreach_lerp_(
                list(self.shadow.values()), [p.detach() for p in self.live.values()], inputs.average
            )

    def separate(self, averages: dict[str, torch.Tensor]) -> None:
        """Continue from averages that differ from the weights."""
        self.apart = True
        self.shadow = {name: average.detach() for name, average in averages.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        for name, average in self.shadow.items():
            p = self.live[name]
            p.data, self.shadow[name] = average, p.data
