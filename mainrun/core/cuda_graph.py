"""A GPU's work as one launch. To launch the thousand kernels of a step one by one takes several times as long as they run."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WARM = 3  # times that work is launched kernel by kernel before it is recorded: libraries set themselves up at the first


class Recorded:
    """Work on tensors, done as often as it is called. With `on`, and once it was called a few times with the same key (which is all that
    it does besides numbers on the device), it is recorded, and from then on replayed: the same kernels, so the same bits."""

    def __init__(self, generators: list[torch.Generator], on: bool) -> None:
        self.generators, self.on = generators, on
        self.forget()

    def forget(self) -> None:
        """What it reads or writes lies elsewhere now."""
        self.key: Hashable = None
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.result: Tensor | None = None

    def __call__(self, key: Hashable, work: Callable[..., Tensor | None], *given: Tensor) -> Tensor | None:
        if key != self.key:
            self.forget()
            self.key = key
        self.calls += 1
        if not self.on or self.calls <= WARM:
            return work(*given)
        if self.graph is None:
            self.inputs, self.graph = [t.clone() for t in given], torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self.result = work(*self.inputs)
        for mine, new in zip(self.inputs, given, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return None if self.result is None else self.result.clone()
