"""mainrun.core.dropout"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

# -- dropout


class Masks:
    """Ones and zeros, a byte each, dealt out to the places that drop, in the order in which they come (`drops`)."""

    def __init__(self, pool: Tensor) -> None:
        self.pool, self.used = pool, 0

    def take(self, shape: Iterable[int]) -> Tensor:
        shape = tuple(shape)
        start, self.used = self.used, self.used + math.prod(shape)
        return self.pool[start : self.used].view(shape)

    def drop(self, x: Tensor, p: float) -> Tensor:
        # a bool would be six times slower; the scale apart and last, so that bfloat16 does not round it
        return x * self.take(x.shape).to(x.dtype) * (1 / (1 - p)) if p else x
