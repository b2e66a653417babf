"""Compile kernels.cpp once per machine, and call the compiled functions on tensors."""

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

from mainrun.core.hardware import cache_dir, cpp_compiler, cpu_flags, cpu_name

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled library. If the library is not in the cache, compile it first.

    Return None if the library cannot be compiled, so that mainrun uses torch's own operations instead.
    """
    compiler, problem = cpp_compiler()
    if problem:
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    identity = repr((SOURCE.read_bytes(), FLAGS, version, cpu_name(), cpu_flags()))
    key = hashlib.sha256(identity.encode()).hexdigest()
    cached = cache_dir() / "native" / f"{key[:32]}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(cached))
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "native.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        with suppress(OSError):  # without a writable cache, each process compiles the library again (0.3 s)
            cached.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as temporary:
                temporary.write(built.read_bytes())
            Path(temporary.name).replace(cached)
        return ctypes.CDLL(str(built))


def _call(name: str, *args: Tensor | int | float | None) -> None:
    """Call a function of the compiled library. Each tensor is passed as a pointer to its data."""
    loaded = library()
    assert loaded is not None
    types: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_double, type(None): ctypes.c_void_p}
    arguments = []
    for arg in args:
        if isinstance(arg, Tensor):
            arguments.append(ctypes.c_void_p(arg.data_ptr()))
        else:
            arguments.append(types[type(arg)](arg))
    getattr(loaded, name)(*arguments)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each row and the gradient of the mean loss."""
    rows, vocab = logits.shape
    loss = torch.empty(rows, dtype=torch.float64)
    grad = torch.empty_like(logits)
    _call("cross_entropy", logits, target, loss, grad, rows, vocab, 1 / rows)
    return loss, grad


def _bias_rows(bias: Tensor, scores: Tensor) -> tuple[Tensor, int]:
    """Return the bias as a contiguous tensor, and the number n of its rows.

    Row i % n of the bias is added to row i of the scores.
    """
    if bias.dim() > 2:
        bias = bias.expand_as(scores)
    return bias.contiguous(), bias[..., 0].numel()


def softmax(scores: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Replace the scores with softmax(scores + bias) in place.

    Return two tensors: the softmax, and the softmax multiplied by the dropout mask.
    """
    dropped = scores if mask is None else torch.empty_like(scores)
    output = None if mask is None else dropped
    bias, period = _bias_rows(bias, scores)
    width = scores.size(-1)
    rows = scores.numel() // width
    _call("softmax", scores, bias, mask, output, rows, width, period)
    return scores, dropped


def softmax_backward(
    grad: Tensor, weights: Tensor, bias: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convert the gradient of the masked attention weights to the gradient of the scores, in place.

    Return the gradient of the scores, and the masked attention weights, which are recomputed.
    """
    dropped = weights if mask is None else torch.empty_like(weights)
    output = None if mask is None else dropped
    bias, period = _bias_rows(bias, weights)
    width = weights.size(-1)
    rows = weights.numel() // width
    _call("softmax_backward", grad, weights, bias, mask, output, rows, width, period)
    return grad, dropped
