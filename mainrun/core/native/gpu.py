"""The cross entropy of bfloat16 logits on a GPU, written in Triton.

The forward pass and the backward pass each read the logits once, without creating a float32 copy of them. The
elements of a row are summed in a fixed order, so the loss of a row does not depend on other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


# mypy cannot infer the types of Triton's decorator and of the variables inside a kernel.
@triton.jit  # type: ignore[untyped-decorator]
def _forward(logits, target, loss, log_sum, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
    top = tl.max(x, 0)
    log_z = top + tl.log(tl.sum(tl.exp(x - top), 0))
    tl.store(log_sum + row, log_z)
    tl.store(loss + row, log_z - tl.load(logits + row * vocab + tl.load(target + row)).to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    logits, target, log_sum, factor, grad, rows, vocab, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
    p = tl.exp(x - tl.load(log_sum + row)) - tl.where(column == tl.load(target + row), 1.0, 0.0)
    scaled = (p * (tl.load(factor) / rows)).to(grad.dtype.element_ty)
    tl.store(grad + row * vocab + column, scaled, mask=column < vocab)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the logarithm of the softmax denominator for each row."""
    rows, vocab = logits.shape
    block = triton.next_power_of_2(vocab)
    warps = min(32, max(4, block // 1024))
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    log_sum = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _forward[(rows,)](logits, target, loss, log_sum, vocab, BLOCK=block, num_warps=warps)
    return loss, log_sum


def cross_entropy_backward(logits: Tensor, target: Tensor, log_sum: Tensor, factor: Tensor) -> Tensor:
    """Return the gradient of the mean loss, multiplied by `factor`, which is a tensor on the GPU."""
    rows, vocab = logits.shape
    grad = torch.empty_like(logits)
    block = min(4096, triton.next_power_of_2(vocab))
    grid = (rows, triton.cdiv(vocab, block))
    _backward[grid](logits, target, log_sum, factor, grad, rows, vocab, BLOCK=block, num_warps=8)
    return grad
