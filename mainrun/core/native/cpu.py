"""The C++ of a compiled step (kernels.cpp): built once for a machine, kept in the cache, called with the addresses of tensors."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mainrun.core.hardware import cache_dir, cpu_flags, cpu_name, cxx

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


@cache
def library() -> ctypes.CDLL | None:
    """None: there is no compiler that makes it, and torch's own operations do the same in more passes."""
    compiler, problem = cxx()
    if problem:
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    key = hashlib.sha256(
        repr((SOURCE.read_bytes(), FLAGS, version, cpu_name(), cpu_flags())).encode()
    ).hexdigest()
    kept = cache_dir() / "native" / f"{key[:32]}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "native.so"
        if subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True).returncode:
            return None
        with suppress(OSError):  # a cache that cannot be written costs a third of a second each time
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as temp:
                temp.write(made.read_bytes())
            Path(temp.name).replace(kept)
        return ctypes.CDLL(str(made))


def _call(name: str, *args: Tensor | int | float | None) -> None:
    found = library()
    assert found is not None
    kinds: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_double, type(None): ctypes.c_void_p}
    getattr(found, name)(
        *(ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else kinds[type(x)](x) for x in args)
    )


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, and the gradient of their mean."""
    rows, vocab = logits.shape
    loss, grad = torch.empty(rows, dtype=torch.float64), torch.empty_like(logits)
    _call("cross_entropy", logits, target, loss, grad, rows, vocab, 1 / rows)
    return loss, grad


def _bias(bias: Tensor, scores: Tensor) -> tuple[Tensor, int]:
    """As rows that come again and again, and how many."""
    if bias.dim() > 2:
        bias = bias.expand_as(scores)
    return bias.contiguous(), bias[..., 0].numel()


def softmax(scores: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of scores + bias, in place; and that times the mask."""
    dropped = scores if mask is None else torch.empty_like(scores)
    bias, period = _bias(bias, scores)
    width = scores.size(-1)
    _call(
        "softmax",
        scores,
        bias,
        mask,
        None if mask is None else dropped,
        scores.numel() // width,
        width,
        period,
    )
    return scores, dropped


def softmax_backward(
    grad: Tensor, weights: Tensor, bias: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of the scores, in place of that of the dropped weights; and these once more."""
    dropped = weights if mask is None else torch.empty_like(weights)
    bias, period = _bias(bias, weights)
    width = weights.size(-1)
    _call(
        "softmax_backward",
        grad,
        weights,
        bias,
        mask,
        None if mask is None else dropped,
        weights.numel() // width,
        width,
        period,
    )
    return grad, dropped
