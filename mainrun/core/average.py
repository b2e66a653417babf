"""Average a model's weights over the training steps, with EMA or SWA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.parameters import saved_parameters
from mainrun.core.sharding import shards_of
from mainrun.errors import RunError
from mainrun.plan.plan import StepInputs


def copy_tensors(prefix: str, saved: dict[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy the saved tensors `prefix/name` into the targets, which have the same names and shapes."""
    if not targets:
        return
    unknown = {name for name in saved if name.startswith(f"{prefix}/")} - {f"{prefix}/{n}" for n in targets}
    if unknown:
        raise RunError(
            f"the saved state contains {min(unknown)}, but the model does not; "
            "build the model as it was when the state was saved"
        )
    for name, target in targets.items():
        tensor = saved[f"{prefix}/{name}"]
        if tensor.shape != target.shape:  # copy_ would silently broadcast a tensor of another shape
            raise RunError(
                f"{name} has the shape {tuple(tensor.shape)} in the saved state and {tuple(target.shape)} in "
                "the model; restore the state that was saved"
            )
        with torch.no_grad():
            target.copy_(tensor)


class Average:
    """The running average of a model's weights, if the config enables EMA or SWA.

    `shadow` maps each parameter name to the parameter's average. Without EMA or SWA, `shadow` is empty. A
    frozen base never changes, so it has no average.
    """

    def __init__(self, cfg: TrainConfig, model: nn.Module) -> None:
        self.live = saved_parameters(cfg, model)
        self.sharded = shards_of(model) is not None
        self.on = bool(cfg.ema or cfg.swa)
        self.differs = False  # True if the average may differ from the weights
        self.shadow: dict[str, Tensor] = {}
        if self.on:
            self.shadow = {name: p.detach().clone() for name, p in self.live.items()}

    def update(self, inputs: StepInputs) -> None:
        """Update the average: average += inputs.average * (weights - average)."""
        if self.on:
            self.differs |= inputs.average < 1
            weights = [p.detach() for p in self.live.values()]
            torch._foreach_lerp_(list(self.shadow.values()), weights, inputs.average)

    def separate(self, averages: dict[str, Tensor]) -> None:
        """Replace the running averages with the given averages, which may differ from the weights."""
        self.differs = True
        self.shadow = {name: average.detach() for name, average in averages.items()}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Load saved averages. If the state contains none, the averages are equal to the saved weights."""
        self.differs = any(name.startswith("average/") for name in saved)
        copy_tensors("average" if self.differs else "model", saved, self.shadow)

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
            if self.sharded:  # a sharded model gathers its weights from the memory of the parts
                weights = p.data.clone()
                p.data.copy_(average)
            else:
                weights = p.data
                p.data = average
            self.shadow[name] = weights
