"""Keep the losses of training steps on the device, and read them as late as possible."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mainrun.errors import Diverged


class StepRow(NamedTuple):
    """The results of one training step."""

    step: int
    lr: float
    loss: float
    grad_norm: float


class NotFinite(Diverged):
    """Raised when the loss or the gradient norm of a step is NaN or infinite.

    `rows` contains the results of the steps before the failed step.
    """

    def __init__(self, row: StepRow, rows: list[StepRow]) -> None:
        got = f"loss {row.loss} with gradient norm {row.grad_norm} at step {row.step}, lr {row.lr:g}"
        super().__init__(f"{got}; lower lr or lr_aux, or raise warmup_frac")
        self.row = row
        self.rows = rows


class PendingLosses:
    """The losses of training steps that have not been read from the device yet.

    Reading a loss makes the CPU wait until the GPU has finished the step. On a GPU, the losses of many steps
    are therefore read at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pending: list[tuple[int, float, Tensor]] = []

    def push(self, step: int, lr: float, loss_and_norm: Tensor) -> None:
        self.pending.append((step, lr, loss_and_norm))

    @property
    def full(self) -> bool:
        return len(self.pending) >= self.limit

    def drain(self) -> list[StepRow]:
        """Read all pending losses and gradient norms. Raise NotFinite if a number is NaN or infinite."""
        if not self.pending:
            return []
        numbers = torch.stack([loss_and_norm for _, _, loss_and_norm in self.pending]).tolist()
        steps = list(self.pending)
        self.pending.clear()
        rows: list[StepRow] = []
        for (step, lr, _), (loss, norm) in zip(steps, numbers, strict=True):
            row = StepRow(step, lr, loss, norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFinite(row, rows)
            rows.append(row)
        return rows
