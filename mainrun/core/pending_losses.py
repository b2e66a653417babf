"""Keep the losses of training steps on the device, and read them as late as possible."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mainrun.core.gradient_norms import named_norms
from mainrun.core.routing import count_numbers, routing_fields
from mainrun.errors import Diverged


class StepRow(NamedTuple):
    """The results of one training step."""

    step: int
    lr: float
    loss: float
    grad_norm: float
    routing: dict[str, Any] | None = None  # the losses and statistics of the routers
    grad_norms: dict[str, float] | None = None  # the gradient norm of each layer, at the first steps

    def fields(self) -> dict[str, Any]:
        """Return the results as metrics.jsonl contains them."""
        row = self._asdict()
        routing = row.pop("routing")
        if self.grad_norms is None:
            del row["grad_norms"]
        return row | (routing or {})


def step_row(step: int, lr: float, numbers: list[float], layers: tuple[int, ...]) -> StepRow:
    """Return the results of a step.

    numbers: the loss, the gradient norm, the losses and statistics of the routers, and then the gradient norm
        of each layer, if the step computed them.
    layers: the layers that have routers.
    """
    loss, norm, *rest = numbers
    end = count_numbers(layers) - 1
    routing = routing_fields(rest[:end], layers) if layers else None
    by_layer = named_norms(rest[end:]) if rest[end:] else None
    return StepRow(step, lr, loss, norm, routing, by_layer)


def advice(row: StepRow) -> str:
    """Return what to change after a run diverged at `row`."""
    if row.routing is None:
        return "lower lr or lr_aux, or raise warmup_frac"
    return "lower lr, lr_aux, lr_router or a weight such as prior_loss, or raise warmup_frac"


class NotFinite(Diverged):
    """Raised when the loss or the gradient norm of a step is NaN or infinite.

    `rows` contains the results of the steps before the failed step.
    """

    def __init__(self, row: StepRow, rows: list[StepRow]) -> None:
        got = f"loss {row.loss} with gradient norm {row.grad_norm} at step {row.step}, lr {row.lr:g}"
        super().__init__(f"{got}; {advice(row)}")
        self.row = row
        self.rows = rows


class PendingLosses:
    """The losses of training steps that have not been read from the device yet.

    Reading a loss makes the CPU wait until the GPU has finished the step. On a GPU, the losses of many steps
    are therefore read at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pending: list[tuple[int, float, tuple[int, ...]]] = []
        self.numbers: list[Tensor] = []

    def push(self, step: int, lr: float, numbers: Tensor, layers: tuple[int, ...]) -> None:
        """Add the numbers of a step, for `step_row`."""
        self.pending.append((step, lr, layers))
        self.numbers.append(numbers)

    @property
    def full(self) -> bool:
        return len(self.pending) >= self.limit

    def drain(self) -> list[StepRow]:
        """Read all pending losses and gradient norms. Raise NotFinite if a number is NaN or infinite."""
        if not self.pending:
            return []
        numbers = torch.cat(self.numbers).tolist()
        rows: list[StepRow] = []
        start = 0
        pending = list(zip(self.pending, map(len, self.numbers), strict=True))
        self.pending.clear()
        self.numbers.clear()
        for (step, lr, layers), length in pending:
            row = step_row(step, lr, numbers[start : start + length], layers)
            start += length
            if not (math.isfinite(row.loss) and math.isfinite(row.grad_norm)):
                raise NotFinite(row, rows)
            rows.append(row)
        return rows
