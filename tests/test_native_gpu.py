"""The loss in Triton against the formula: on a GPU, or on a CPU by Triton's interpreter, where Triton is installed at all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainrun.core import device as machine
from mainrun.core import kernels

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
HERE = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="needs a GPU, or Triton's interpreter as the last test asks for it"
)


def some(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    logits = 8 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, -3:] = -torch.inf  # what unused ids have
    return logits.bfloat16().to(DEVICE), torch.arange(rows, device=DEVICE) * 37 % (vocab - 3)


@HERE
@pytest.mark.parametrize(("rows", "vocab"), [(1, 259), (7, 1003), (3, 4097), (2, 16000)])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_it_is_the_formula_and_the_same_bits_again(rows: int, vocab: int, factor: float) -> None:
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
    unit = 2**-8 if GPU else 2**-7  # the interpreter cuts off where a GPU rounds
    assert torch.allclose(grad.double(), exact.grad, rtol=unit * 1.01, atol=1e-6)
    assert torch.equal(grad[:, -3:], torch.zeros_like(grad[:, -3:])), "what cannot be has no gradient"
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[2])


@HERE
def test_its_edges() -> None:
    from mainrun.core.native import gpu as native_gpu

    logits = torch.tensor(
        [[0.0, 200.0, 0.0], [torch.inf, 0.0, 0.0], [torch.nan, 0.0, 0.0]], dtype=torch.bfloat16, device=DEVICE
    )
    loss, _ = native_gpu.cross_entropy(logits, torch.tensor([0, 0, 1], device=DEVICE))
    assert loss[0] == 200 and not torch.isfinite(loss[1:]).any(), "a number that is none stays none"


@pytest.mark.skipif(GPU, reason="there is a GPU here")
def test_without_a_gpu_a_run_goes_without_and_says_why() -> None:
    works, why = machine.triton_works(torch.device("cpu"))
    assert works == "" and why.startswith(
        "the loss takes torch's own operations, which are slower: Triton does not work here ("
    )


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above ran")
@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="Triton comes with torch for a GPU, and is not here"
)
def test_by_the_interpreter() -> None:
    """In a process of its own: the interpreter must be asked for before anything imports Triton."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "10 passed" in done.stdout, done.stdout
