"""The loss of a bfloat16 step on a GPU, in Triton: the logits are read once on the way forward and once on the way back, and no copy
of them in float32 is made. A row is one program's, summed in one order, so its bits do not depend on the others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


# (Triton has no types: its decorator, and what it makes of a function, are beyond mypy.)
@triton.jit  # type: ignore[untyped-decorator]
def _forward(logits, target, loss, log_sum, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
    top = tl.max(x, 0)
    found = top + tl.log(tl.sum(tl.exp(x - top), 0))
    tl.store(log_sum + row, found)
    tl.store(loss + row, found - tl.load(logits + row * vocab + tl.load(target + row)).to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _backward(logits, target, log_sum, factor, grad, rows, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
    p = tl.exp(x - tl.load(log_sum + row)) - tl.where(at == tl.load(target + row), 1.0, 0.0)
    tl.store(
        grad + row * vocab + at, (p * (tl.load(factor) / rows)).to(grad.dtype.element_ty), mask=at < vocab
    )


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row; and the logarithm of the sum that its chances were divided by."""
    (rows, vocab), block = logits.shape, triton.next_power_of_2(logits.shape[1])
    loss, log_sum = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in "ab")
    _forward[(rows,)](
        logits, target, loss, log_sum, vocab, BLOCK=block, num_warps=min(32, max(4, block // 1024))
    )
    return loss, log_sum


def cross_entropy_backward(logits: Tensor, target: Tensor, log_sum: Tensor, factor: Tensor) -> Tensor:
    """The gradient of the mean, times a factor that is on the device."""
    (rows, vocab), grad = logits.shape, torch.empty_like(logits)
    block = min(4096, triton.next_power_of_2(vocab))
    _backward[(rows, triton.cdiv(vocab, block))](
        logits, target, log_sum, factor, grad, rows, vocab, BLOCK=block, num_warps=8
    )
    return grad
