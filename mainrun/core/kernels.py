"""Kernels for the parts of a training step where torch's own operations are slow, mainly on a CPU.

In eager mode, these kernels make fewer passes over memory than torch's own operations. Compiled code also
makes fewer passes, but torch.compile generates slow code for exp and erf on a CPU. Compiled code therefore
calls the functions that `opaque_op` wraps, and torch.compile does not trace into them. In bfloat16, some of
the wrapped functions run the C++ code in native/kernels.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from mainrun.core.hardware import cpu_flags
from mainrun.core.native import cpu as native

# With AMX, a matrix product runs at half speed if an operand must be transposed during the product.
HAS_AMX = "AMX bf16" in cpu_flags()
AMX_MIN_WIDTH = 2048  # below this width, transposing an operand before the product saves no time


def opaque_op(function: Callable[..., Any], compiled: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Wrap a function so that torch.compile on a CPU calls the function without tracing into it.

    If `compiled` is given, compiled code calls this C++ implementation instead of the function.
    """
    name = function.__name__.strip("_")
    op = torch.library.custom_op(f"mainrun::{name}", compiled or function, mutates_args=())
    op.register_fake(function)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() and args[0].device.type == "cpu":
            return op(*args)
        return function(*args)

    return call


# -- norm


class RootMeanSquare(torch.autograd.Function):
    """RMSNorm that computes in the dtype of the gain.

    On a CPU, this implementation is three times as fast as F.rms_norm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        wide = x.to(gain.dtype)
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (size * size / x.size(-1) + 1e-6).rsqrt()
        ctx.save_for_backward(x, gain, scale)
        return (wide * scale).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, gain, scale = ctx.saved_tensors
        wide = x.to(gain.dtype)
        grad = grads[0] * scale
        gain_grad = None
        if ctx.needs_input_grad[1]:
            gain_grad = (grad * wide).flatten(0, -2).sum(0)
        grad = grad * gain
        projection = (grad * wide).sum(-1, keepdim=True) * (scale * scale / x.size(-1))
        return torch.addcmul(grad, wide, projection, value=-1).to(x.dtype), gain_grad


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return RootMeanSquare.apply(x, gain)


# -- matrix products


class AmxLinear(torch.autograd.Function):
    """F.linear with a faster computation of the weight gradient on processors with AMX.

    The weight gradient is a matrix product in which one operand must be transposed. If one operand is much
    narrower than the other operand, the narrow operand is transposed before the product. A frozen weight has
    no gradient, so its input is not kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grads[0].flatten(0, -2)
        input_grad = grads[0] @ weight if needs_input else None
        weight_grad = weight_gradient(x.flatten(0, -2), grad) if needs_weight else None
        bias_grad = grad.sum(0) if needs_bias else None
        return input_grad, weight_grad, bias_grad


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Return grad.t() @ x, the gradient of a weight, for an input and an output gradient with N rows."""
    inputs = x.size(1)
    outputs = grad.size(1)
    if outputs >= 4 * inputs:
        return transposed(transposed(x) @ grad)
    if inputs >= 4 * outputs:
        return transposed(grad) @ x
    return grad.t() @ x


def transposed(x: Tensor) -> Tensor:
    """Return x.t() as a contiguous tensor.

    The transpose is computed as a product with the identity matrix. This product is exact, and it is four
    times as fast as copying x.t() with torch.
    """
    rows, columns = x.shape
    identity = torch.eye(min(rows, columns), dtype=x.dtype)
    if columns < rows:
        return F.linear(identity, x)
    return x.t() @ identity


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear. Under autocast, the computation uses bfloat16."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.bfloat16()
        weight = weight.bfloat16()
        if bias is not None:
            bias = bias.bfloat16()
    on_amx = HAS_AMX and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    if on_amx and max(weight.shape) >= AMX_MIN_WIDTH:
        return AmxLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


# -- activation


@opaque_op
def gelu_forward(x: Tensor) -> Tensor:
    return F.gelu(x)


@opaque_op
def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x)


class Gelu(torch.autograd.Function):
    """F.gelu, with a forward pass and a backward pass that torch.compile does not trace."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu_forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return gelu_backward(grads[0].contiguous(), *ctx.saved_tensors)


def gelu(x: Tensor) -> Tensor:
    return Gelu.apply(x) if torch.compiler.is_compiling() else F.gelu(x)


# -- attention


def _attend_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Optional[Tensor],  # noqa: UP045  (custom_op reads this annotation)
    scale: float,
) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).add_(bias).softmax(dim=-1)
    if mask is None:
        return weights @ v, weights
    # The dropout scale is applied to the output, because the output is smaller than the attention weights.
    return ((weights * mask) @ v).mul_(scale), weights


def _attend_forward_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Optional[Tensor],  # noqa: UP045  (custom_op reads this annotation)
    scale: float,
) -> tuple[Tensor, Tensor]:
    if q.dtype != torch.bfloat16 or native.library() is None:
        return _attend_forward(q, k, v, bias, mask, scale)
    weights, dropped = native.softmax(q @ k.mT, bias, mask)
    y = dropped @ v
    if mask is not None:
        y.mul_(scale)
    return y, weights


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
        dropped = weights
        weights_grad = grad @ v.mT
    else:
        grad = grad * scale
        kept = mask.to(weights.dtype)
        dropped = weights * kept
        weights_grad = (grad @ v.mT).mul_(kept)
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
    if mask is not None:
        grad = grad * scale
    score_grad, dropped = native.softmax_backward(grad @ v.mT, weights, bias, mask)
    return score_grad @ k, score_grad.mT @ q, dropped.mT @ grad


attend_forward = opaque_op(_attend_forward, _attend_forward_native)
attend_backward = opaque_op(_attend_backward, _attend_backward_native)


class Attend(torch.autograd.Function):
    """Attention, with a forward pass and a backward pass that torch.compile does not trace."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        y, weights = attend_forward(q, k, v, bias, mask, scale)
        ctx.save_for_backward(q, k, v, bias, weights, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*attend_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Return dropout(softmax(q kᵀ + bias)) v, where `mask` determines which attention weights dropout keeps.

    q, k and v have the shape (B, H, T, h), and the caller has already scaled q. The bias is broadcast to the
    shape (B, H, T, T). The mask has one byte per attention weight, and p is the dropout rate.
    """
    return Attend.apply(q.contiguous(), k.contiguous(), v.contiguous(), bias, mask, 1 / (1 - p))


# -- loss


# The number of logits in a chunk. On a CPU, a chunk fits in the cache. On a GPU, a chunk is large enough to
# keep all cores busy.
CHUNK = {"cpu": 1_000_000, "cuda": 50_000_000}
TRITON_MAX_VOCAB = 2**16  # the Triton kernel keeps a whole row of logits in registers


class CrossEntropy(torch.autograd.Function):
    """Mean cross entropy over the rows of the logits, computed in chunks.

    A chunk of logits fits in the cache, and only one chunk at a time is converted to float32. The forward
    pass also computes the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, smoothing: float, use_native: bool
    ) -> tuple[Tensor, Tensor]:
        if use_native:
            row_losses, ctx.grad = native.cross_entropy(logits.contiguous(), target.contiguous())
            plain = row_losses.mean().float()
            ctx.mark_non_differentiable(plain)
            return plain.clone(), plain
        rows, vocab = logits.shape
        wide = torch.promote_types(logits.dtype, torch.float32)
        ctx.grad = torch.empty_like(logits)
        # The losses are summed in float64, so that the chunk size does not affect the mean loss.
        plain, uniform = torch.zeros(2, dtype=torch.float64, device=logits.device)
        chunk_rows = max(1, CHUNK[logits.device.type] // vocab)
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            p = F.softmax(logits[chunk], dim=-1, dtype=wide)
            at_target = torch.arange(len(p), device=p.device), target[chunk]
            p_target = p[at_target]
            # If the probability of a target underflows to 0, the loss is limited to 87 nats.
            plain = plain - p_target.clamp_min(torch.finfo(wide).tiny).log().sum(dtype=torch.float64)
            p[at_target] = p_target - (1 - smoothing)
            if smoothing:
                log_p = F.log_softmax(logits[chunk], dim=-1, dtype=wide)
                uniform = uniform - log_p.mean(1).sum(dtype=torch.float64)
                p.sub_(smoothing / vocab)
            ctx.grad[chunk] = p.mul_(1 / rows)
        plain = (plain / rows).to(wide)
        uniform = (uniform / rows).to(wide)
        loss = torch.lerp(plain, uniform, smoothing) if smoothing else plain.clone()
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = ctx.grad
        ctx.grad = None  # free the gradient's memory as soon as possible
        # On a CPU, the multiplication is skipped if the factor is 1. On a GPU, the factor is not checked,
        # because reading a value from a GPU waits until all running kernels have finished.
        if grad.is_cuda or grads[0] != 1:
            grad.mul_(grads[0])
        return grad, None, None, None


class CrossEntropyOnGpu(torch.autograd.Function):
    """Mean cross entropy, computed by one Triton kernel in the forward pass and one in the backward pass.

    The backward pass does not copy the incoming gradient to the CPU, because reading a value from a GPU waits
    until all running kernels have finished.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        from mainrun.core.native import gpu as native_gpu

        logits = logits.contiguous()
        target = target.contiguous()
        row_losses, log_sum = native_gpu.cross_entropy(logits, target)
        ctx.save_for_backward(logits, target, log_sum)
        plain = row_losses.mean(dtype=torch.float64).float()
        ctx.mark_non_differentiable(plain)
        return plain.clone(), plain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        from mainrun.core.native import gpu as native_gpu

        logits, target, log_sum = ctx.saved_tensors
        return native_gpu.cross_entropy_backward(logits, target, log_sum, grads[0]), None


def cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float, use_native: bool = False
) -> tuple[Tensor, Tensor]:
    """Return two numbers: the loss to minimize, and the cross entropy without label smoothing.

    If `use_native` is True, the C++ kernel (on a CPU) or the Triton kernel (on a GPU) processes the logits
    that it supports. Both kernels support only bfloat16 logits without label smoothing.
    """
    use_native = use_native and logits.dtype == torch.bfloat16 and not smoothing
    if use_native and logits.is_cuda and logits.size(-1) <= TRITON_MAX_VOCAB:
        return CrossEntropyOnGpu.apply(logits, target)
    return CrossEntropy.apply(logits, target, smoothing, use_native and not logits.is_cuda)


class RDrop(torch.autograd.Function):
    """The R-Drop loss, computed in chunks like `CrossEntropy`.

    The forward pass also computes the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: float, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = len(target)
        vocab = logits.size(1)
        ctx.grad = torch.empty_like(logits)
        # the cross entropy, the loss against the uniform distribution, and the symmetric divergence
        sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
        chunk_rows = max(1, CHUNK[logits.device.type] // (2 * vocab))
        for start in range(0, rows, chunk_rows):
            end = min(start + chunk_rows, rows)
            places = (slice(start, end), slice(rows + start, rows + end))  # the two passes of the same tokens
            log_p = [F.log_softmax(logits[place], dim=-1, dtype=wide) for place in places]
            losses, grads = rdrop_of_chunk(log_p, target[start:end], weight, smoothing)
            sums += losses
            for place, grad in zip(places, grads, strict=True):
                ctx.grad[place] = grad.mul_(1 / (2 * rows))
        plain, uniform, divergence = (sums / (2 * rows)).to(wide)
        loss = torch.lerp(plain, uniform, smoothing) if smoothing else plain
        ctx.mark_non_differentiable(plain)
        return loss + weight * divergence, plain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = ctx.grad
        ctx.grad = None  # free the gradient's memory as soon as possible
        return grad.mul_(grads[0]), None, None, None


def rdrop_of_chunk(
    log_p: list[Tensor], target: Tensor, weight: float, smoothing: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the three sums of `RDrop` for a chunk, and the gradients of its rows for the two passes.

    The divergence is KL(a|b) + KL(b|a), where a and b are the distributions of the two passes. Half of its
    mean over the tokens is multiplied by `weight`.
    """
    at_target = torch.arange(len(target), device=target.device), target
    vocab = log_p[0].size(1)
    a, b = (part.exp() for part in log_p)
    log_ratio = log_p[0] - log_p[1]
    kl_ab = (a * log_ratio).sum(1, keepdim=True)  # KL(a|b)
    kl_ba = (b * log_ratio).sum(1, keepdim=True).neg_()  # KL(b|a)
    difference = a - b
    a_grad = (a * (log_ratio - kl_ab)).add_(difference)
    b_grad = (b * (log_ratio + kl_ba)).add_(difference).neg_()
    plain = torch.zeros((), dtype=torch.float64, device=target.device)
    uniform = torch.zeros((), dtype=torch.float64, device=target.device)
    grads = []
    for p, log, divergence_grad in ((a, log_p[0], a_grad), (b, log_p[1], b_grad)):
        plain = plain - log[at_target].sum(dtype=torch.float64)
        if smoothing:
            uniform = uniform - log.mean(1).sum(dtype=torch.float64)
            p.sub_(smoothing / vocab)
        p[at_target] -= 1 - smoothing
        grads.append(p.add_(divergence_grad, alpha=weight))
    divergence = (kl_ab + kl_ba).sum(dtype=torch.float64)
    return torch.stack((plain, uniform, divergence)), grads


def rdrop(logits: Tensor, y: Tensor, weight: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the R-Drop loss of two passes with different dropout masks, and the plain cross entropy.

    R-Drop penalizes differences between the outputs of the two passes. `logits` contains the logits of the
    first pass, followed by those of the second pass.
    """
    return RDrop.apply(logits, y.flatten(), weight, smoothing)
