"""Compares the loss kernel in Triton with the formula, on a GPU or in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainrun.core import kernels, machine_class

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
NEEDS_TRITON = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="needs a GPU, or Triton's interpreter, which the last test uses"
)


def some(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    logits = 8 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, -3:] = -torch.inf  # the last three ids are unused, so their logits are -inf
    return logits.bfloat16().to(DEVICE), torch.arange(rows, device=DEVICE) * 37 % (vocab - 3)


@NEEDS_TRITON
@pytest.mark.parametrize(("rows", "vocab"), [(1, 259), (7, 1003), (3, 4097), (2, 16000)])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_loss_matches_the_formula_and_is_deterministic(rows: int, vocab: int, factor: float) -> None:
    logits, target = some(rows, vocab)
    exact = logits.double().requires_grad_()
    right = F.cross_entropy(exact, target)
    (right * factor).backward()

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        loss, plain = kernels.CrossEntropyOnGpu.apply(leaf, target)
        (loss * factor).backward()
        return loss.detach(), plain, leaf.grad  # type: ignore[return-value]

    (loss, plain, grad), again = ours(), ours()
    assert exact.grad is not None
    assert torch.allclose(loss.double(), right, rtol=1e-5, atol=1e-5) and torch.equal(loss, plain)
    # The interpreter truncates to bfloat16, but a GPU rounds to the nearest value.
    unit = 2**-8 if GPU else 2**-7
    assert torch.allclose(grad.double(), exact.grad, rtol=unit * 1.01, atol=1e-6)
    assert torch.equal(grad[:, -3:], torch.zeros_like(grad[:, -3:])), "impossible tokens have no gradient"
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[2])


@NEEDS_TRITON
def test_the_loss_of_extreme_logits() -> None:
    from mainrun.core.native import gpu as native_gpu

    logits = torch.tensor(
        [[0.0, 200.0, 0.0], [torch.inf, 0.0, 0.0], [torch.nan, 0.0, 0.0]], dtype=torch.bfloat16, device=DEVICE
    )
    loss, _ = native_gpu.cross_entropy(logits, torch.tensor([0, 0, 1], device=DEVICE))
    assert loss[0] == 200 and not torch.isfinite(loss[1:]).any(), "infinities and NaN stay"


@pytest.mark.skipif(GPU, reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_reported() -> None:
    works, why = machine_class.triton_works(torch.device("cpu"))
    assert works == "" and why.startswith(
        "the loss uses torch's own operations, which are slower: Triton does not work here ("
    )


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above ran")
@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="Triton is not installed; it comes with torch for a GPU"
)
def test_the_interpreter_runs_the_tests_above() -> None:
    """The tests run in another process, because TRITON_INTERPRET must be set before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "10 passed" in done.stdout, done.stdout
