"""What is written by hand is held against torch's own, values and gradients, in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainrun import kernels, machine, native
from mainrun.kernels import attend, cross_entropy, gelu, linear, rms_norm, turned

COMPILER = pytest.mark.skipif(not machine.compiler("cpu"), reason="torch.compile needs a C++ compiler on the CPU, and there is none")


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def both(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Value and gradients of the two ways."""
    found = []
    for way in (ours, theirs):
        given = leaves(*tensors)
        y = way(*given)
        y.backward(some(*y.shape, seed=9, dtype=y.dtype))
        found.append([y.detach(), *(t.grad for t in given)])
    return list(zip(*found, strict=True))  # type: ignore[arg-type]


# -- norm


def test_the_rms_norm_is_torchs_and_its_gradient_is_the_numerical_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gain = (torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in ((3, 5, 8), (8,)))
    assert torch.allclose(rms_norm(x, gain), F.rms_norm(x, (8,), gain, 1e-6), atol=1e-12)
    assert torch.autograd.gradcheck(rms_norm, (x, gain))
    half, gain32 = x.detach().bfloat16(), gain.detach().float()
    exact = F.rms_norm(half.float(), (8,), gain32, 1e-6)
    assert torch.equal(rms_norm(half, gain32), exact.bfloat16()), "bfloat16 goes in and out, and is rounded once"


# -- matrix products


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(96, 8, 32), (96, 32, 8), (8, 24, 96), (8, 96, 24), (96, 8, 9), (1, 1, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_on_tiles_is_torchs(monkeypatch: pytest.MonkeyPatch, rows: int, inputs: int, outputs: int, biased: bool) -> None:
    """Whole numbers, so that every sum is exact in bfloat16's products and both ways must agree to the bit."""
    monkeypatch.setattr(kernels, "TILES", True)
    monkeypatch.setattr(kernels, "WIDE", 1)
    x, weight, bias = (t.mul(2).round().clamp(-2, 2) for t in (some(rows, inputs), some(outputs, inputs, seed=1), some(outputs, seed=2)))
    tensors = [t.bfloat16() for t in ([x, weight, bias] if biased else [x, weight])]
    grad = some(rows, outputs, seed=3).round().clamp(-1, 1)
    given = leaves(*tensors)
    y = linear(given[0].unflatten(0, (1, rows)), *given[1:])
    assert "Product" in type(y.grad_fn).__name__
    y.backward(grad.bfloat16().unsqueeze(0))
    exact = [x @ weight.t() + (bias if biased else 0), grad @ weight, grad.t() @ x, grad.sum(0)]
    for found, right in zip([y.squeeze(0), *(t.grad for t in given)], exact, strict=False):
        assert found is not None and torch.equal(found.double(), right.bfloat16().double())


def test_it_is_taken_where_tiles_are_and_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(dtype: torch.dtype, autocast: bool, wide: int = kernels.WIDE) -> bool:
        x, weight = leaves(some(4, 3, dtype=dtype), some(wide, 3, seed=1, dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return "Product" in type(linear(x, weight).grad_fn).__name__

    monkeypatch.setattr(kernels, "TILES", True)
    assert taken(torch.bfloat16, False) and taken(torch.float32, True)
    assert not taken(torch.float32, False) and not taken(torch.float64, False) and not taken(torch.bfloat16, False, kernels.WIDE - 1)
    monkeypatch.setattr(kernels, "TILES", False)
    assert not taken(torch.bfloat16, False) and not taken(torch.float32, True)


@pytest.mark.parametrize("shape", [(1, 1), (70, 3), (3, 70), (64, 64), (257, 96)])
def test_turned_is_the_transpose_to_the_bit(shape: tuple[int, int]) -> None:
    x = some(*shape, dtype=torch.bfloat16) * 10.0 ** torch.randint(-30, 30, shape, generator=torch.Generator().manual_seed(1))
    x = x.bfloat16()
    assert torch.equal(turned(x), x.t()) and turned(x).is_contiguous()


# -- attention


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, p: float) -> Tensor:
    weights = (q @ k.mT + bias).softmax(-1)
    return (weights if mask is None else weights * mask / (1 - p)) @ v


CAUSAL = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [CAUSAL, CAUSAL.expand(2, 1, 5, 5).clone()], ids=["one for all", "one a row"])
def test_attention_is_its_formula_and_its_gradients_are(p: float, bias: Tensor) -> None:
    q, k, v = (some(2, 3, 5, 4, seed=i) for i in range(3))
    mask = torch.randint(0, 2, (2, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)) if p else None
    turned_q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as it comes: not contiguous
    for found, right in both(lambda *t: attend(*t, bias, mask, p), lambda *t: reference(*t, bias, mask, p), turned_q, k, v):
        assert torch.allclose(found, right, atol=1e-12)


@COMPILER
def test_compiled_for_a_cpu_the_whole_ones_stay_whole_and_give_the_same() -> None:
    """To the bit what eager mode gives: the compiler calls them, and takes none apart."""
    q, k, v = (some(2, 3, 5, 4, seed=i, dtype=torch.float32) for i in range(3))
    bias, mask = CAUSAL.float(), torch.ones(2, 3, 5, 5, dtype=torch.uint8)
    mask[..., ::2] = 0
    ways: list[tuple[Any, list[Tensor]]] = [
        (lambda *t: attend(*t, bias, mask, 0.5), [q, k, v]),
        (lambda *t: attend(*t, bias, None, 0.0), [q, k, v]),
        (gelu, [some(6, 7, dtype=torch.float32)]),
    ]
    for eager, tensors in ways:
        torch._dynamo.reset()
        for found, right in both(torch.compile(eager), eager, *tensors):
            assert torch.equal(found, right)


@COMPILER
def test_gelu_is_torchs_in_both_modes() -> None:
    x = some(4, 9, dtype=torch.float32)
    for found, right in [*both(gelu, F.gelu, x), *both(torch.compile(gelu), F.gelu, x)]:
        assert torch.allclose(found, right, atol=1e-6)


# -- loss


def test_the_loss_in_chunks_is_torchs_and_so_is_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.randint(0, 50, (70,), generator=torch.Generator().manual_seed(1))
    for chunk in (1, 400, 10**9):  # one row at a time, eight, all
        monkeypatch.setitem(kernels.CHUNK, "cpu", chunk)
        for smoothing in (0.0, 0.2):
            a, b = (torch.randn(70, 50, generator=torch.Generator().manual_seed(2)).mul_(3).requires_grad_() for _ in "ab")
            loss, plain = cross_entropy(a, target, smoothing)
            (loss * 0.5).backward()
            expected = F.cross_entropy(b, target, label_smoothing=smoothing)
            (expected * 0.5).backward()
            assert torch.allclose(loss, expected, atol=1e-6) and torch.allclose(plain, F.cross_entropy(b, target), atol=1e-6)
            assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-7)


def test_a_chance_that_is_zero_by_rounding_costs_much_and_not_infinity() -> None:
    logits = torch.tensor([[0.0, 200.0], [0.0, 0.0]], requires_grad=True)
    loss, plain = cross_entropy(logits, torch.tensor([0, 1]), 0.0)
    loss.backward()
    assert plain.item() == pytest.approx((87.3 + 0.693) / 2, abs=0.1)
    assert torch.equal(logits.grad, torch.tensor([[-0.5, 0.5], [0.25, -0.25]]))
    broken, _ = cross_entropy(torch.tensor([[0.0, torch.inf]]), torch.tensor([0]), 0.0)
    assert not torch.isfinite(broken), "a number that is none stays none"


# -- in C++


NATIVE = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler that makes native.cpp")
HALF = torch.bfloat16


def on(threads: int, work: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def close(found: Tensor, exact: Tensor) -> bool:
    """Rounded once: within half a unit of bfloat16's last place, and the little that float32 adds."""
    return torch.allclose(found.double(), exact, rtol=2**-8 * 1.01, atol=1e-6)


@NATIVE
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 7), (70, 1003), (64, 4096)])
def test_the_loss_in_cpp_is_the_formula(rows: int, vocab: int) -> None:
    logits, target = some(rows, vocab, dtype=HALF) * 8, torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    exact = logits.double().requires_grad_()
    right = F.cross_entropy(exact, target, reduction="none")
    right.mean().backward()
    one, two = (on(threads, lambda: native.cross_entropy(logits, target)) for threads in (1, 2))
    assert exact.grad is not None
    assert torch.allclose(one[0], right, rtol=1e-6, atol=1e-6) and close(one[1].double() * rows, exact.grad * rows)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "threads do not show"


@NATIVE
def test_the_loss_in_cpp_at_its_edges() -> None:
    minus = -torch.inf
    logits = torch.tensor([[0.0, 200.0, minus], [0.0, 0.0, minus], [torch.inf, 0.0, 0.0], [torch.nan, 0.0, 0.0]], dtype=HALF)
    loss, grad = native.cross_entropy(logits, torch.tensor([0, 1, 0, 1]))
    assert loss[0] == 200 and loss[1].item() == pytest.approx(0.693147, abs=1e-6)
    assert torch.equal(grad[:2] * 4, torch.tensor([[-1.0, 1.0, 0.0], [0.5, -0.5, 0.0]], dtype=HALF)), "what cannot be has no gradient"
    assert not torch.isfinite(loss[2:]).any(), "a number that is none stays none"


@NATIVE
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("size", [5, 77])
@pytest.mark.parametrize("kind", ["causal", "titles", "all"])
def test_attention_in_cpp_is_the_formula(p: float, size: int, kind: str) -> None:
    seen = torch.ones(size, size, dtype=torch.bool)
    if kind != "all":
        seen = seen.tril()
    if kind == "titles":
        title = torch.arange(2 * size).view(2, size) // 3
        seen = (seen & (title.unsqueeze(2) == title.unsqueeze(1))).unsqueeze(1)
    bias = torch.zeros_like(seen, dtype=HALF).masked_fill_(~seen, -torch.inf)
    mask = (some(2, 3, size, size, seed=4) > -0.7).to(torch.uint8) if p else None
    scores, upstream = some(2, 3, size, size, dtype=HALF) * 3, some(2, 3, size, size, seed=5, dtype=HALF)

    def ours() -> tuple[Tensor, ...]:
        weights, dropped = native.softmax(scores.clone(), bias, mask)
        return weights, dropped, *native.softmax_backward(upstream.clone(), weights, bias, mask)

    weights, dropped, grad, again = on(1, ours)
    assert close(weights, (scores.double() + bias).softmax(-1)) and weights[~seen.expand_as(weights)].abs().sum() == 0
    keep = torch.ones_like(weights) if mask is None else mask
    assert torch.equal(dropped, weights * keep) and torch.equal(again, dropped)
    wide, kept = weights.double(), upstream.double() * keep
    assert close(grad, wide * (kept - (kept * wide).sum(-1, keepdim=True)))
    assert all(torch.equal(a, b) for a, b in zip((weights, dropped, grad, again), on(2, ours), strict=True)), "threads do not show"


@NATIVE
@COMPILER
def test_a_compiled_step_in_bfloat16_takes_them_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    real = native._call
    monkeypatch.setattr(native, "_call", lambda name, *args: (taken.append(name), real(name, *args))[1])
    q, k, v = (some(2, 3, 5, 4, seed=i, dtype=HALF) for i in range(3))
    bias, mask = CAUSAL.to(HALF), torch.ones(2, 3, 5, 5, dtype=torch.uint8)
    torch._dynamo.reset()
    for way in (torch.compile(lambda *t: attend(*t, bias, mask, 0.5)), lambda *t: attend(*t, bias, mask, 0.5)):
        both(way, lambda *t: reference(*(x.float() for x in t), bias.float(), mask, 0.5), q, k, v)
    assert taken == ["softmax", "softmax_backward"], "the compiled one, not the eager one"
    logits, target = some(6, 50, dtype=HALF), torch.arange(6)
    for args in ((0.0, True), (0.0, False), (0.1, True)):
        cross_entropy(logits, target, *args)
    cross_entropy(logits.float(), target, 0.0, True)
    assert taken[2:] == ["cross_entropy"]


@NATIVE
def test_the_library_is_made_once_and_made_again_where_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
    make = native.library.__wrapped__
    assert make() is not None
    (kept,) = (tmp_path / "cache" / "native").iterdir()
    size, when = kept.stat().st_size, kept.stat().st_mtime_ns
    assert make() is not None and kept.stat().st_mtime_ns == when
    torn = tmp_path / "other" / "native" / kept.name  # a file that was loaded once is not read again
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "other"))
    assert make() is not None and torn.stat().st_size == size
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "file"))
    assert make() is not None, "a cache that cannot be written"
    monkeypatch.setenv("CXX", "false")
    assert make() is None, "a compiler that cannot"
