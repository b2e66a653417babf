"""CUDA graphs: launch all kernels of a step at once.

Launching a thousand kernels one by one takes several times as long as running them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WARM = 3  # calls that run without a graph, because libraries initialise themselves in the first call


class CudaGraph:
    """A function on tensors that is recorded as a CUDA graph and then replayed.

    The first `WARM` calls with a key run the function directly. The next call records it, and later calls
    replay the recording: the same kernels, so the same bits. The key must identify everything that the
    function depends on, except the values of tensors on the device. With `on=False` nothing is recorded.
    """

    def __init__(self, generators: list[torch.Generator], on: bool) -> None:
        self.generators = generators
        self.on = on
        self.forget()

    def forget(self) -> None:
        """Discard the recording. Call this when a tensor that the function uses has moved in memory."""
        self.key: Hashable = None
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.result: Tensor | None = None

    def __call__(self, key: Hashable, work: Callable[..., Tensor | None], *inputs: Tensor) -> Tensor | None:
        """Return work(*inputs)."""
        if key != self.key:
            self.forget()
            self.key = key
        self.calls += 1
        if not self.on or self.calls <= WARM:
            return work(*inputs)
        if self.graph is None:
            self.graph = self._record(work, inputs)
        for recorded, new in zip(self.inputs, inputs, strict=True):
            recorded.copy_(new)
        self.graph.replay()
        return None if self.result is None else self.result.clone()

    def _record(self, work: Callable[..., Tensor | None], inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        self.inputs = [t.clone() for t in inputs]
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            self.result = work(*self.inputs)
        return graph
