"""Launch all kernels of a training step at once, as a CUDA graph.

A training step launches about a thousand kernels. Launching a thousand kernels one by one takes several times
longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

# The number of warm-up calls before a graph is recorded. CUDA libraries initialize during the warm-up calls.
WARM = 3


class CudaGraph:
    """A CUDA graph of a function on tensors, which is recorded once and then replayed.

    The first `WARM` calls with a key run the function directly. The next call records the graph, and all
    later calls replay the graph. Replaying a graph runs the same kernels, so the results are identical bit
    for bit. The key must identify everything that affects the function's result, except the values of tensors
    on the GPU. If `on` is False, every call runs the function directly.
    """

    def __init__(self, generators: list[torch.Generator], on: bool) -> None:
        self.generators = generators
        self.on = on
        self.forget()

    def forget(self) -> None:
        """Discard the recorded graph. Call this method when a tensor that the graph uses has been moved."""
        self.key: Hashable = None
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.result: Tensor | None = None

    def __call__(self, key: Hashable, work: Callable[..., Tensor | None], *inputs: Tensor) -> Tensor | None:
        """Return the result of `work(*inputs)`."""
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
