"""Parts of a step that are faster by hand than torch's own, most of all on a CPU; each is held against torch's in the tests.

In eager mode they save passes over memory. A compiler would fuse most of that away, but its exp and erf are slow on a CPU: what
is marked `whole` it calls, and does not look into; in bfloat16 that is C++ of our own (kernels.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from mainrun.core.hardware import cpu_flags
from mainrun.core.native import cpu as native

# AMX multiplies tiles as they lie; an operand that has to be turned on the way halves its speed
TILES = "AMX bf16" in cpu_flags()
WIDE = 2048  # from where on that shows


def whole(function: Callable[..., Any], compiled: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The function; while compiling for a CPU, as one operation of that name, which may do the same in C++."""
    op = torch.library.custom_op(
        f"mainrun::{function.__name__.strip('_')}", compiled or function, mutates_args=()
    )
    op.register_fake(function)
    return lambda *args: (
        op(*args) if torch.compiler.is_compiling() and args[0].device.type == "cpu" else function(*args)
    )


# -- norm


class RootMeanSquare(torch.autograd.Function):
    """x over its root mean square, times a gain, in float32 at least. By hand: on a CPU torch's own takes three times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        wide = x.to(gain.dtype)
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (size * size / x.size(-1) + 1e-6).rsqrt()
        ctx.save_for_backward(x, gain, scale)
        return (wide * scale).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, gain, scale = ctx.saved_tensors
        wide, grad = x.to(gain.dtype), grads[0] * scale
        gain_grad = (grad * wide).flatten(0, -2).sum(0)
        grad = grad * gain
        along = (grad * wide).sum(-1, keepdim=True) * (scale * scale / x.size(-1))
        return torch.addcmul(grad, wide, along, value=-1).to(x.dtype), gain_grad


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    found: Tensor = RootMeanSquare.apply(x, gain)
    return found


# -- matrix products


class Product(torch.autograd.Function):
    """F.linear. The gradient of its weight is a product over rows, for which one operand has to be turned. Where that is much narrower
    than the other it is turned first: by a product with the identity, which is exact, and four times as fast as torch's copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        (outputs, inputs), rows, grad = weight.shape, x.flatten(0, -2), grads[0].flatten(0, -2)
        if outputs >= 4 * inputs:
            weight_grad = turned(turned(rows) @ grad)
        else:
            weight_grad = turned(grad) @ rows if inputs >= 4 * outputs else grad.t() @ rows
        return grads[0] @ weight, weight_grad, grad.sum(0) if ctx.bias else None


def turned(x: Tensor) -> Tensor:
    """x.t(), contiguous."""
    rows, columns = x.shape
    one = torch.eye(min(rows, columns), dtype=x.dtype)
    return F.linear(one, x) if columns < rows else x.t() @ one


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, in bfloat16 under autocast."""
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()
    if not (TILES and x.dtype == torch.bfloat16 and x.device.type == "cpu" and max(weight.shape) >= WIDE):
        return F.linear(x, weight, bias)
    found: Tensor = Product.apply(x, weight, bias)
    return found


# -- activation


@whole
def gelu_forward(x: Tensor) -> Tensor:
    return F.gelu(x)


@whole
def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.gelu_backward(grad, x)
    return found


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        found: Tensor = gelu_forward(x)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        found: Tensor = gelu_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return found


def gelu(x: Tensor) -> Tensor:
    found: Tensor = Gelu.apply(x) if torch.compiler.is_compiling() else F.gelu(x)
    return found


# -- attention


def _attend_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Optional[Tensor],
    scale: float,  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).add_(bias).softmax(dim=-1)
    # the scale on the way out, where there are fewer numbers
    return weights @ v if mask is None else ((weights * mask) @ v).mul_(scale), weights


def _attend_forward_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Optional[Tensor],
    scale: float,  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    if q.dtype != torch.bfloat16 or native.library() is None:
        return _attend_forward(q, k, v, bias, mask, scale)
    weights, dropped = native.softmax(q @ k.mT, bias, mask)
    return dropped @ v if mask is None else (dropped @ v).mul_(scale), weights


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if mask is None:
        dropped, weights_grad = weights, grad @ v.mT
    else:
        grad, kept = grad * scale, mask.to(weights.dtype)
        dropped, weights_grad = weights * kept, (grad @ v.mT).mul_(kept)
    score_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
    return score_grad @ k, score_grad.mT @ q, dropped.mT @ grad


def _attend_backward_native(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.dtype != torch.bfloat16 or native.library() is None:
        return _attend_backward(grad, q, k, v, bias, weights, mask, scale)
    grad = grad if mask is None else grad * scale
    score_grad, dropped = native.softmax_backward(grad @ v.mT, weights, bias, mask)
    return score_grad @ k, score_grad.mT @ q, dropped.mT @ grad


attend_forward, attend_backward = (
    whole(_attend_forward, _attend_forward_native),
    whole(_attend_backward, _attend_backward_native),
)


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        y, weights = attend_forward(q, k, v, bias, mask, scale)
        ctx.save_for_backward(q, k, v, bias, weights, mask)
        ctx.scale = scale
        found: Tensor = y
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*attend_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """softmax(q k' + bias), dropped by its mask of bytes, times v. (B, H, T, h); q comes scaled, bias is broadcast."""
    found: Tensor = Attend.apply(q.contiguous(), k.contiguous(), v.contiguous(), bias, mask, 1 / (1 - p))
    return found


# -- loss


# Numbers of logits at a time: what a CPU's cache holds; on a GPU as many as keep it busy
CHUNK = {"cpu": 1_000_000, "cuda": 50_000_000}
WIDEST = 2**16  # of a vocabulary in native_gpu.py: a row is held in one program's registers


class CrossEntropy(torch.autograd.Function):
    """Mean cross entropy of rows of logits, some rows at a time: they stay in the cache, and no float32 copy of all of them is made."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, smoothing: float, by_hand: bool
    ) -> tuple[Tensor, Tensor]:
        if by_hand:
            each, ctx.grad = native.cross_entropy(logits.contiguous(), target.contiguous())
            plain = each.mean().float()
            ctx.mark_non_differentiable(plain)
            return plain.clone(), plain
        (rows, vocab), wide = logits.shape, torch.promote_types(logits.dtype, torch.float32)
        ctx.grad = torch.empty_like(logits)
        plain, even = torch.zeros(
            2, dtype=torch.float64, device=logits.device
        )  # of many rows, so that their number does not show
        width = max(1, CHUNK[logits.device.type] // vocab)
        for start in range(0, rows, width):
            part = slice(start, start + width)
            p = F.softmax(logits[part], dim=-1, dtype=wide)
            right = torch.arange(len(p), device=p.device), target[part]
            chance = p[right]  # 0 by rounding costs 87, not infinity
            plain = plain - chance.clamp_min(torch.finfo(wide).tiny).log().sum(dtype=torch.float64)
            p[right] = chance - (1 - smoothing)
            if smoothing:
                even = even - F.log_softmax(logits[part], dim=-1, dtype=wide).mean(1).sum(dtype=torch.float64)
                p.sub_(smoothing / vocab)
            ctx.grad[part] = p.mul_(1 / rows)
        plain, even = (plain / rows).to(wide), (even / rows).to(wide)
        loss = torch.lerp(plain, even, smoothing) if smoothing else plain.clone()
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad, ctx.grad = ctx.grad, None  # nobody else holds it, so it goes as soon as it is used
        if grad.is_cuda or grads[0] != 1:  # a pass over all of it; to ask a GPU would be to wait for it
            grad.mul_(grads[0])
        return grad, None, None, None


class CrossEntropyOnGpu(torch.autograd.Function):
    """The same in a kernel each way. How much of the gradient is asked for stays on the device: to look at it would be to wait for it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        from mainrun.core.native import gpu as native_gpu

        logits, target = logits.contiguous(), target.contiguous()
        each, log_sum = native_gpu.cross_entropy(logits, target)
        ctx.save_for_backward(logits, target, log_sum)
        plain = each.mean(dtype=torch.float64).float()
        ctx.mark_non_differentiable(plain)
        return plain.clone(), plain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        from mainrun.core.native import gpu as native_gpu

        logits, target, log_sum = ctx.saved_tensors
        return native_gpu.cross_entropy_backward(logits, target, log_sum, grads[0]), None


def cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float, by_hand: bool = False
) -> tuple[Tensor, Tensor]:
    """What is descended, and the plain cross entropy in it. by_hand: in kernels of our own, where there are some for such logits."""
    found: tuple[Tensor, Tensor]
    by_hand = by_hand and logits.dtype == torch.bfloat16 and not smoothing
    if by_hand and logits.is_cuda and logits.size(-1) <= WIDEST:
        found = CrossEntropyOnGpu.apply(logits, target)
    else:
        found = CrossEntropy.apply(logits, target, smoothing, by_hand and not logits.is_cuda)
    return found
