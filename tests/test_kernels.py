"""Compare the values and gradients of our kernels with torch's, both eager and compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainrun.core import kernels, machine_class
from mainrun.core.dropout import Masks
from mainrun.core.hardware import cpu_flags
from mainrun.core.kernels import attend, cross_entropy, gelu, linear, rms_norm, transposed
from mainrun.core.native import cpu as native
from mainrun.core.optimizers import Muon, orthogonal

COMPILER = pytest.mark.skipif(
    not machine_class.compiler("cpu"), reason="torch.compile needs a C++ compiler on the CPU"
)


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def both(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return the values and the gradients of two functions as pairs."""
    found = []
    for implementation in (ours, theirs):
        given = leaves(*tensors)
        y = implementation(*given)
        y.backward(random_tensor(*y.shape, seed=9, dtype=y.dtype))
        found.append([y.detach(), *(t.grad for t in given)])
    return list(zip(*found, strict=True))


# -- norm


def test_rms_norm_matches_torch_and_the_numerical_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gain = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((3, 5, 8), (8,))
    )
    assert torch.allclose(rms_norm(x, gain), F.rms_norm(x, (8,), gain, 1e-6), atol=1e-12)
    assert torch.autograd.gradcheck(rms_norm, (x, gain))
    half, gain32 = x.detach().bfloat16(), gain.detach().float()
    exact = F.rms_norm(half.float(), (8,), gain32, 1e-6)
    assert torch.equal(rms_norm(half, gain32), exact.bfloat16()), "the result is rounded once"


# -- matrix products


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(96, 8, 32), (96, 32, 8), (8, 24, 96), (8, 96, 24), (96, 8, 9), (1, 1, 4)]
)
@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_on_amx_matches_torch(
    monkeypatch: pytest.MonkeyPatch, rows: int, inputs: int, outputs: int, biased: bool
) -> None:
    """The inputs are integers, so all products are exact and both results must have the same bits."""
    monkeypatch.setattr(kernels, "HAS_AMX", True)
    monkeypatch.setattr(kernels, "AMX_MIN_WIDTH", 1)
    x, weight, bias = (
        t.mul(2).round().clamp(-2, 2)
        for t in (
            random_tensor(rows, inputs),
            random_tensor(outputs, inputs, seed=1),
            random_tensor(outputs, seed=2),
        )
    )
    tensors = [t.bfloat16() for t in ([x, weight, bias] if biased else [x, weight])]
    grad = random_tensor(rows, outputs, seed=3).round().clamp(-1, 1)
    given = leaves(*tensors)
    y = linear(given[0].unflatten(0, (1, rows)), *given[1:])
    assert "AmxLinear" in type(y.grad_fn).__name__
    y.backward(grad.bfloat16().unsqueeze(0))
    exact = [x @ weight.t() + (bias if biased else 0), grad @ weight, grad.t() @ x, grad.sum(0)]
    for found, right in zip([y.squeeze(0), *(t.grad for t in given)], exact, strict=False):
        assert found is not None and torch.equal(found.double(), right.bfloat16().double())


def test_the_amx_layer_is_used_only_for_bfloat16_on_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_used(dtype: torch.dtype, autocast: bool, wide: int = kernels.AMX_MIN_WIDTH) -> bool:
        x, weight = leaves(random_tensor(4, 3, dtype=dtype), random_tensor(wide, 3, seed=1, dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return "AmxLinear" in type(linear(x, weight).grad_fn).__name__

    monkeypatch.setattr(kernels, "HAS_AMX", True)
    assert is_used(torch.bfloat16, False) and is_used(torch.float32, True)
    assert (
        not is_used(torch.float32, False)
        and not is_used(torch.float64, False)
        and not is_used(torch.bfloat16, False, kernels.AMX_MIN_WIDTH - 1)
    )
    monkeypatch.setattr(kernels, "HAS_AMX", False)
    assert not is_used(torch.bfloat16, False) and not is_used(torch.float32, True)


@pytest.mark.parametrize("shape", [(1, 1), (70, 3), (3, 70), (64, 64), (257, 96)])
def test_transposed_is_exact(shape: tuple[int, int]) -> None:
    x = random_tensor(*shape, dtype=torch.bfloat16) * 10.0 ** torch.randint(
        -30, 30, shape, generator=torch.Generator().manual_seed(1)
    )
    x = x.bfloat16()
    assert torch.equal(transposed(x), x.t()) and transposed(x).is_contiguous()


# -- attention


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, p: float) -> Tensor:
    weights = (q @ k.mT + bias).softmax(-1)
    return (weights if mask is None else weights * mask / (1 - p)) @ v


CAUSAL = torch.zeros(5, 5, dtype=torch.float64).masked_fill(
    ~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf
)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    "bias", [CAUSAL, CAUSAL.expand(2, 1, 5, 5).clone()], ids=["one for all rows", "one per row"]
)
def test_attention_and_its_gradients_match_the_formula(p: float, bias: Tensor) -> None:
    q, k, v = (random_tensor(2, 3, 5, 4, seed=i) for i in range(3))
    mask = (
        torch.randint(0, 2, (2, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
        if p
        else None
    )
    strided_q = q.transpose(1, 2).contiguous().transpose(1, 2)  # the model's q is not contiguous either
    for found, right in both(
        lambda *t: attend(*t, bias, mask, p), lambda *t: reference(*t, bias, mask, p), strided_q, k, v
    ):
        assert torch.allclose(found, right, atol=1e-12)


@pytest.mark.slow
@COMPILER
def test_opaque_ops_give_the_same_bits_when_compiled() -> None:
    """The compiler must call these operators without tracing into them."""
    q, k, v = (random_tensor(2, 3, 5, 4, seed=i, dtype=torch.float32) for i in range(3))
    bias, mask = CAUSAL.float(), torch.ones(2, 3, 5, 5, dtype=torch.uint8)
    mask[..., ::2] = 0
    ways: list[tuple[Any, list[Tensor]]] = [
        (lambda *t: attend(*t, bias, mask, 0.5), [q, k, v]),
        (lambda *t: attend(*t, bias, None, 0.0), [q, k, v]),
        (gelu, [random_tensor(6, 7, dtype=torch.float32)]),
    ]
    for eager, tensors in ways:
        torch._dynamo.reset()
        for found, right in both(torch.compile(eager), eager, *tensors):
            assert torch.equal(found, right)


@COMPILER
def test_gelu_matches_torch_eager_and_compiled() -> None:
    x = random_tensor(4, 9, dtype=torch.float32)
    for found, right in [*both(gelu, F.gelu, x), *both(torch.compile(gelu), F.gelu, x)]:
        assert torch.allclose(found, right, atol=1e-6)


# -- loss


def test_the_chunked_loss_and_its_gradient_match_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.randint(0, 50, (70,), generator=torch.Generator().manual_seed(1))
    for chunk in (1, 400, 10**9):  # a chunk has one row, eight rows or all rows
        monkeypatch.setitem(kernels.CHUNK, "cpu", chunk)
        for smoothing in (0.0, 0.2):
            a, b = (
                torch.randn(70, 50, generator=torch.Generator().manual_seed(2)).mul_(3).requires_grad_()
                for _ in "ab"
            )
            loss, plain = cross_entropy(a, target, smoothing)
            (loss * 0.5).backward()
            expected = F.cross_entropy(b, target, label_smoothing=smoothing)
            (expected * 0.5).backward()
            assert torch.allclose(loss, expected, atol=1e-6) and torch.allclose(
                plain, F.cross_entropy(b, target), atol=1e-6
            )
            assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-7)


def test_the_chunk_size_does_not_change_the_bits_of_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The losses are summed in float64, both within a chunk and over all chunks."""
    noise = torch.Generator().manual_seed(3)
    for _ in range(20):
        logits, target = torch.randn(999, 7, generator=noise), torch.randint(0, 7, (999,), generator=noise)
        losses = set()
        for chunk in (7, 700, 10**9):
            monkeypatch.setitem(kernels.CHUNK, "cpu", chunk)
            losses.add(tuple(part.item() for part in cross_entropy(logits, target, 0.2)))
        assert len(losses) == 1


def test_a_probability_that_underflows_has_a_finite_loss() -> None:
    logits = torch.tensor([[0.0, 200.0], [0.0, 0.0]], requires_grad=True)
    loss, plain = cross_entropy(logits, torch.tensor([0, 1]), 0.0)
    loss.backward()
    assert plain.item() == pytest.approx((87.3 + 0.693) / 2, abs=0.1)
    assert torch.equal(logits.grad, torch.tensor([[-0.5, 0.5], [0.25, -0.25]]))
    broken, _ = cross_entropy(torch.tensor([[0.0, torch.inf]]), torch.tensor([0]), 0.0)
    assert not torch.isfinite(broken), "infinities and NaN stay"


# -- in C++


NATIVE = pytest.mark.skipif(native.library() is None, reason="no C++ compiler can build kernels.cpp")
HALF = torch.bfloat16


def with_threads(threads: int, work: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def close(found: Tensor, exact: Tensor) -> bool:
    """Return whether a result is exact up to float32 errors and one rounding to bfloat16."""
    return torch.allclose(found.double(), exact, rtol=2**-8 * 1.01, atol=1e-6)


@NATIVE
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 7), (70, 1003), (64, 4096)])
def test_the_cpp_loss_matches_the_formula(rows: int, vocab: int) -> None:
    logits, target = (
        random_tensor(rows, vocab, dtype=HALF) * 8,
        torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1)),
    )
    exact = logits.double().requires_grad_()
    right = F.cross_entropy(exact, target, reduction="none")
    right.mean().backward()
    one, two = (with_threads(threads, lambda: native.cross_entropy(logits, target)) for threads in (1, 2))
    assert exact.grad is not None
    assert torch.allclose(one[0], right, rtol=1e-6, atol=1e-6) and close(
        one[1].double() * rows, exact.grad * rows
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), (
        "the number of threads does not change the bits"
    )


@NATIVE
def test_the_cpp_loss_of_extreme_logits() -> None:
    minus = -torch.inf
    logits = torch.tensor(
        [[0.0, 200.0, minus], [0.0, 0.0, minus], [torch.inf, 0.0, 0.0], [torch.nan, 0.0, 0.0]], dtype=HALF
    )
    loss, grad = native.cross_entropy(logits, torch.tensor([0, 1, 0, 1]))
    assert loss[0] == 200 and loss[1].item() == pytest.approx(0.693147, abs=1e-6)
    assert torch.equal(grad[:2] * 4, torch.tensor([[-1.0, 1.0, 0.0], [0.5, -0.5, 0.0]], dtype=HALF)), (
        "impossible tokens have no gradient"
    )
    assert not torch.isfinite(loss[2:]).any(), "infinities and NaN stay"


@NATIVE
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("size", [5, 77])
@pytest.mark.parametrize("kind", ["causal", "titles", "all"])
def test_cpp_attention_matches_the_formula(p: float, size: int, kind: str) -> None:
    seen = torch.ones(size, size, dtype=torch.bool)
    if kind != "all":
        seen = seen.tril()
    if kind == "titles":
        title = torch.arange(2 * size).view(2, size) // 3
        seen = (seen & (title.unsqueeze(2) == title.unsqueeze(1))).unsqueeze(1)
    bias = torch.zeros_like(seen, dtype=HALF).masked_fill_(~seen, -torch.inf)
    mask = (random_tensor(2, 3, size, size, seed=4) > -0.7).to(torch.uint8) if p else None
    scores, upstream = (
        random_tensor(2, 3, size, size, dtype=HALF) * 3,
        random_tensor(2, 3, size, size, seed=5, dtype=HALF),
    )

    def ours() -> tuple[Tensor, ...]:
        weights, dropped = native.softmax(scores.clone(), bias, mask)
        return weights, dropped, *native.softmax_backward(upstream.clone(), weights, bias, mask)

    weights, dropped, grad, again = with_threads(1, ours)
    assert (
        close(weights, (scores.double() + bias).softmax(-1))
        and weights[~seen.expand_as(weights)].abs().sum() == 0
    )
    keep = torch.ones_like(weights) if mask is None else mask
    assert torch.equal(dropped, weights * keep) and torch.equal(again, dropped)
    wide, kept = weights.double(), upstream.double() * keep
    assert close(grad, wide * (kept - (kept * wide).sum(-1, keepdim=True)))
    assert all(
        torch.equal(a, b) for a, b in zip((weights, dropped, grad, again), with_threads(2, ours), strict=True)
    ), "the number of threads does not change the bits"


@NATIVE
@COMPILER
def test_only_compiled_bfloat16_code_calls_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    is_used: list[str] = []
    real = native._call
    monkeypatch.setattr(native, "_call", lambda name, *args: (is_used.append(name), real(name, *args))[1])
    q, k, v = (random_tensor(2, 3, 5, 4, seed=i, dtype=HALF) for i in range(3))
    bias, mask = CAUSAL.to(HALF), torch.ones(2, 3, 5, 5, dtype=torch.uint8)
    torch._dynamo.reset()
    for implementation in (
        torch.compile(lambda *t: attend(*t, bias, mask, 0.5)),
        lambda *t: attend(*t, bias, mask, 0.5),
    ):
        both(implementation, lambda *t: reference(*(x.float() for x in t), bias.float(), mask, 0.5), q, k, v)
    assert is_used == ["softmax", "softmax_backward"], "only the compiled function calls C++"
    logits, target = random_tensor(6, 50, dtype=HALF), torch.arange(6)
    for args in ((0.0, True), (0.0, False), (0.1, True)):
        cross_entropy(logits, target, *args)
    cross_entropy(logits.float(), target, 0.0, True)
    assert is_used[2:] == ["cross_entropy"]


@NATIVE
def test_the_library_is_built_once_and_rebuilt_if_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
    make = native.library.__wrapped__
    assert make() is not None
    (kept,) = (tmp_path / "cache" / "native").iterdir()
    size, when = kept.stat().st_size, kept.stat().st_mtime_ns
    assert make() is not None and kept.stat().st_mtime_ns == when
    # Use another path, because a library that is already loaded is not read again.
    torn = tmp_path / "other" / "native" / kept.name
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "other"))
    assert make() is not None and torn.stat().st_size == size
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "file"))
    assert make() is not None, "the cache cannot be written"
    monkeypatch.setenv("CXX", "false")
    assert make() is None, "the compiler fails"


# -- odd shapes, both dtypes and extreme values


SHAPES = [(5, 8), (3, 5, 8), (2, 1, 3, 7), (1, 1), (4, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 0.0])
def test_rms_norm_at_odd_shapes_and_scales(shape: tuple[int, ...], scale: float) -> None:
    """Small inputs reveal whether 1e-6 is added inside the square root."""
    x, gain = random_tensor(*shape) * scale, random_tensor(shape[-1], seed=1)
    plain = lambda x, gain: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain  # noqa: E731
    for ours, theirs in both(rms_norm, plain, x, gain):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_gradients_of_rms_norm_are_rounded_once(shape: tuple[int, ...]) -> None:
    x, gain = (
        random_tensor(*shape, dtype=torch.bfloat16),
        random_tensor(shape[-1], seed=1, dtype=torch.float32),
    )
    exact = both(rms_norm, rms_norm, x.double(), gain.double())
    given = leaves(x, gain)
    y = rms_norm(*given)
    y.backward(random_tensor(*shape, seed=9).to(torch.bfloat16))
    for got, (right, _), dtype in zip(
        [y, *(t.grad for t in given)], exact, (x.dtype, x.dtype, gain.dtype), strict=True
    ):
        assert got is not None and got.dtype == dtype
        assert torch.allclose(got.double(), right, rtol=2e-2, atol=3e-2 * float(right.abs().max()))


@pytest.mark.parametrize(
    ("inputs", "outputs", "turns"),
    [
        (8, 32, 2), (8, 33, 2),  # four times as many outputs
        (8, 31, 0), (8, 8, 0), (31, 8, 0),
        (32, 8, 1), (33, 8, 1),  # four times as many inputs
    ],
)  # fmt: skip
def test_the_narrow_operand_is_transposed(
    monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, turns: int
) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(kernels, "transposed", lambda x: (shapes.append(tuple(x.shape)), transposed(x))[1])
    x, weight, bias = (
        random_tensor(2, 3, inputs),
        random_tensor(outputs, inputs, seed=1),
        random_tensor(outputs, seed=2),
    )
    for ours, theirs in both(kernels.AmxLinear.apply, F.linear, x, weight, bias):
        assert torch.allclose(ours, theirs, atol=1e-12)
    expected = {0: [], 1: [(6, outputs)], 2: [(6, inputs), (inputs, outputs)]}
    assert shapes == expected[turns]


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 2), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_keeps_the_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert transposed(random_tensor(*shape, dtype=dtype)).dtype == dtype
    assert torch.equal(transposed(random_tensor(*shape, dtype=dtype)), random_tensor(*shape, dtype=dtype).t())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tiles", [True, False])
def test_linear_is_bfloat16_under_autocast(monkeypatch: pytest.MonkeyPatch, tiles: bool, bias: bool) -> None:
    monkeypatch.setattr(kernels, "HAS_AMX", tiles)
    monkeypatch.setattr(kernels, "AMX_MIN_WIDTH", 4)
    x, weight, offset = (random_tensor(*shape, dtype=torch.float32) for shape in ((3, 5), (4, 5), (4,)))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, offset if bias else None)
    assert y.dtype == torch.bfloat16
    right = x.bfloat16().float() @ weight.bfloat16().float().t() + (offset.bfloat16().float() if bias else 0)
    assert torch.allclose(y.float(), right, rtol=1e-2, atol=1e-2)
    assert linear(x, weight, offset).dtype == torch.float32
    assert torch.equal(linear(x, weight, offset), F.linear(x, weight, offset))


@pytest.mark.parametrize(
    ("outputs", "inputs", "is_used"), [(9, 2, True), (2, 9, True), (8, 2, True), (2, 8, True), (7, 7, False)]
)
def test_the_longer_side_of_the_weight_decides_about_amx(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, is_used: bool
) -> None:
    monkeypatch.setattr(kernels, "HAS_AMX", True)
    monkeypatch.setattr(kernels, "AMX_MIN_WIDTH", 8)
    x, weight = leaves(
        random_tensor(3, inputs, dtype=torch.bfloat16), random_tensor(outputs, inputs, dtype=torch.bfloat16)
    )
    assert ("AmxLinear" in type(linear(x, weight).grad_fn).__name__) == is_used


def test_measured_sizes_are_pinned() -> None:
    """These sizes determine the speed and the order of summation. Benchmark again before you change them."""
    assert (kernels.AMX_MIN_WIDTH, kernels.TRITON_MAX_VOCAB) == (2048, 65_536)
    assert kernels.CHUNK == {"cpu": 1_000_000, "cuda": 50_000_000}
    assert ("AMX bf16" in cpu_flags()) == kernels.HAS_AMX


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 5)])
def test_the_compiled_form_of_gelu_matches_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = random_tensor(*shape, dtype=dtype) * 3
    for ours, theirs in both(kernels.Gelu.apply, F.gelu, x):
        assert torch.equal(ours, theirs)
    for ours, theirs in both(gelu, F.gelu, x):
        assert torch.equal(ours, theirs)


def test_gelu_accepts_a_gradient_that_is_not_contiguous() -> None:
    (x,) = leaves(random_tensor(4, 6, dtype=torch.float32))
    grad = random_tensor(6, 4, seed=2, dtype=torch.float32).t()
    kernels.Gelu.apply(x).backward(grad)
    (right,) = leaves(x)
    F.gelu(right).backward(grad)
    assert torch.equal(x.grad, right.grad)


class OnGpu(float):
    device = SimpleNamespace(type="cuda")


def test_an_opaque_op_is_one_operator_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An opaque operator has the name of its first function. Compiling on a CPU uses its second function."""

    def _thrice(x: Tensor) -> Tensor:
        return 3 * x

    def in_one_pass(x: Tensor) -> Tensor:
        return 4 * x

    thrice = kernels.opaque_op(_thrice, in_one_pass)
    assert torch.ops.mainrun.thrice(torch.ones(1)).item() == 4
    assert thrice(torch.ones(1)).item() == 3
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert thrice(torch.ones(1)).item() == 4
    assert thrice(torch.ones(2, device="meta")).shape == (2,)
    assert thrice(OnGpu(2.0)) == 6, "on a GPU the first function is called"
    assert torch.equal(gelu(torch.ones(3)), F.gelu(torch.ones(3)))


def test_eager_gelu_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (x,) = leaves(random_tensor(3, dtype=torch.float32))
    assert "GeluBackward0" in type(gelu(x).grad_fn).__name__
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert type(gelu(x).grad_fn).__name__ == "GeluBackward"


FORWARD = [kernels._attend_forward, kernels._attend_forward_native, kernels.attend_forward]
BACKWARD = [kernels._attend_backward, kernels._attend_backward_native, kernels.attend_backward]


def attention_parts(dtype: torch.dtype, p: float, size: int = 5) -> tuple[Any, ...]:
    q, k, v = (random_tensor(2, 3, size, 4, seed=i, dtype=dtype) for i in range(3))
    bias = torch.zeros(size, size, dtype=dtype).masked_fill(
        ~torch.ones(size, size, dtype=torch.bool).tril(), -torch.inf
    )
    mask = (
        torch.randint(0, 2, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
        if p
        else None
    )
    return q, k, v, bias, mask


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", range(3), ids=["plain", "native", "whole"])
@pytest.mark.parametrize("library", ["as it is", "none"])
def test_every_implementation_of_attention_matches_the_formula(
    monkeypatch: pytest.MonkeyPatch, library: str, implementation: int, dtype: torch.dtype, p: float
) -> None:
    if library == "none":
        monkeypatch.setattr(native, "library", lambda: None)
    q, k, v, bias, mask = attention_parts(dtype, p)
    exact = leaves(q.double(), k.double(), v.double())
    right = reference(*exact, bias.double(), mask, p)
    upstream = random_tensor(*right.shape, seed=8, dtype=dtype)
    right.backward(upstream.double())
    scale = 1 / (1 - p)
    y, weights = FORWARD[implementation](q, k, v, bias, mask, scale)
    grads = BACKWARD[implementation](upstream, q, k, v, bias, weights, mask, scale)
    close_to = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    for got, wanted in zip([y, *grads], [right, *(t.grad for t in exact)], strict=True):
        assert got.dtype == dtype
        assert torch.allclose(got.double(), wanted, atol=close_to, rtol=close_to)
    assert torch.allclose(
        weights.double(), (q.double() @ k.double().mT + bias.double()).softmax(-1), atol=close_to
    )


@NATIVE
@pytest.mark.parametrize(("dtype", "is_used"), [(torch.bfloat16, 2), (torch.float32, 0)])
def test_cpp_attention_is_used_only_for_bfloat16(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_used: int
) -> None:
    names: list[str] = []
    real = native._call
    monkeypatch.setattr(native, "_call", lambda name, *args: (names.append(name), real(name, *args))[1])
    q, k, v, bias, mask = attention_parts(dtype, 0.5)
    y, weights = kernels._attend_forward_native(q, k, v, bias, mask, 2.0)
    kernels._attend_backward_native(y, q, k, v, bias, weights, mask, 2.0)
    assert len(names) == is_used


def test_attention_accepts_tensors_that_are_not_contiguous() -> None:
    q, k, v, bias, _ = attention_parts(torch.float64, 0.0)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    given, plain = leaves(*apart), leaves(q, k, v)
    grad = random_tensor(2, 5, 3, 4, seed=8).transpose(1, 2)
    attend(*given, bias, None, 0.0).backward(grad)
    reference(*plain, bias, None, 0.0).backward(grad)
    for ours, theirs in zip(given, plain, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)


# -- more about the loss


@pytest.mark.parametrize("upstream", [1.0, 2.0, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (3, 5), (7, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_a_scaled_loss_matches_torch(
    dtype: torch.dtype, rows: int, vocab: int, smoothing: float, upstream: float
) -> None:
    logits, target = random_tensor(rows, vocab, dtype=dtype) * 3, torch.arange(rows) % vocab
    ours, theirs = leaves(logits, logits.double())
    loss, plain = cross_entropy(ours, target, smoothing)
    (loss * upstream).backward()
    right = F.cross_entropy(theirs, target, label_smoothing=smoothing)
    (right * upstream).backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert (loss.dtype, plain.dtype, ours.grad.dtype) == (wide, wide, dtype)
    assert not plain.requires_grad
    assert loss.item() == pytest.approx(right.item(), rel=1e-6, abs=1e-6)
    assert plain.item() == pytest.approx(F.cross_entropy(theirs, target).item(), rel=1e-6, abs=1e-6)
    close_to = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert torch.allclose(ours.grad.double(), theirs.grad, atol=close_to)


@pytest.mark.parametrize(
    ("chunk", "sizes"),
    [(1, [1] * 7), (49, [1] * 7), (50, [1] * 7), (99, [1] * 7), (100, [2, 2, 2, 1]), (350, [7])],
)
def test_the_chunk_size_decides_the_rows_per_chunk(
    monkeypatch: pytest.MonkeyPatch, chunk: int, sizes: list[int]
) -> None:
    seen: list[int] = []
    real = F.softmax
    monkeypatch.setitem(kernels.CHUNK, "cpu", chunk)
    monkeypatch.setattr(
        kernels.F, "softmax", lambda x, *args, **kwargs: (seen.append(len(x)), real(x, *args, **kwargs))[1]
    )
    cross_entropy(random_tensor(7, 50, dtype=torch.float32), torch.arange(7), 0.0)
    assert seen == sizes


@pytest.mark.parametrize(
    ("dtype", "cuda", "vocab", "smoothing", "use_native", "implementation"),
    [
        (torch.bfloat16, False, 50, 0.0, True, "by hand"),
        (torch.bfloat16, False, 50, 0.0, False, "in chunks"),
        (torch.bfloat16, False, 50, 0.1, True, "in chunks"),
        (torch.float32, False, 50, 0.0, True, "in chunks"),
        (torch.bfloat16, True, 65_536, 0.0, True, "on the GPU"),
        (torch.bfloat16, True, 65_537, 0.0, True, "in chunks"),
        (torch.bfloat16, True, 50, 0.0, False, "in chunks"),
        (torch.bfloat16, True, 50, 0.1, True, "in chunks"),
        (torch.float32, True, 50, 0.0, True, "in chunks"),
    ],
)
def test_which_kernel_computes_the_loss(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    cuda: bool,
    vocab: int,
    smoothing: float,
    use_native: bool,
    implementation: str,
) -> None:
    class Logits:
        is_cuda = cuda

        def size(self, axis: int) -> int:
            assert axis == -1
            return vocab

    Logits.dtype = dtype
    monkeypatch.setattr(
        kernels.CrossEntropy, "apply", lambda _l, _t, share, own: ("by hand" if own else "in chunks", share)
    )
    monkeypatch.setattr(kernels.CrossEntropyOnGpu, "apply", lambda _l, _t: ("on the GPU", 0.0))
    assert cross_entropy(Logits(), None, smoothing, use_native) == (implementation, smoothing)


def test_native_kernels_are_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cross_entropy", lambda *args: pytest.fail("is_used"))
    cross_entropy(random_tensor(3, 5, dtype=torch.bfloat16), torch.arange(3), 0.0)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_the_native_loss_is_the_mean_of_the_rows(monkeypatch: pytest.MonkeyPatch, upstream: float) -> None:
    def rows_by_formula(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        assert logits.is_contiguous() and target.is_contiguous()
        exact = logits.double().requires_grad_()
        each = F.cross_entropy(exact, target, reduction="none")
        with torch.enable_grad():
            each = F.cross_entropy(exact, target, reduction="none")
            each.mean().backward()
        return each.detach(), exact.grad.to(logits.dtype)

    monkeypatch.setattr(native, "cross_entropy", rows_by_formula)
    (logits,) = leaves(random_tensor(5, 4, dtype=torch.bfloat16).t())
    target = torch.arange(8)[::2] % 5
    loss, plain = cross_entropy(logits, target, 0.0, True)
    (loss * upstream).backward()
    exact = logits.detach().double().requires_grad_()
    right = F.cross_entropy(exact, target)
    (right * upstream).backward()
    assert (loss.dtype, plain.requires_grad) == (torch.float32, False)
    assert loss.item() == plain.item() == pytest.approx(right.item(), rel=1e-6)
    assert torch.allclose(logits.grad.double(), exact.grad, atol=2e-3)


def test_the_gpu_loss_is_the_mean_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the GPU kernels with fakes, and check how their results are combined."""
    seen: list[Any] = []

    class Kernels:
        @staticmethod
        def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            assert logits.is_contiguous() and target.is_contiguous()
            return torch.tensor([1.0, 2.0, 6.0]), torch.tensor([7.0, 8.0, 9.0])

        @staticmethod
        def cross_entropy_backward(logits: Tensor, target: Tensor, log_sum: Tensor, grad: Tensor) -> Tensor:
            seen.append((target.tolist(), log_sum.tolist(), grad.item()))
            return torch.full_like(logits, 0.25)

    monkeypatch.setattr("mainrun.core.native.gpu", Kernels, raising=False)
    monkeypatch.setitem(sys.modules, "mainrun.core.native.gpu", Kernels)
    (logits,) = leaves(random_tensor(5, 3).t())
    loss, plain = kernels.CrossEntropyOnGpu.apply(logits, torch.arange(6)[::2])
    (loss * 4).backward()
    assert loss.item() == plain.item() == 3.0
    assert (loss.dtype, plain.requires_grad) == (torch.float32, False)
    assert seen == [([0, 2, 4], [7.0, 8.0, 9.0], 4.0)]
    assert torch.equal(logits.grad, torch.full_like(logits, 0.25))


# -- dropout


def test_masks_are_handed_out_in_order() -> None:
    pool = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.uint8)
    masks = Masks(pool)
    assert masks.take([1, 3]).tolist() == [[0, 1, 1]]
    x = torch.tensor([[2.0, 3.0]])
    assert masks.drop(x, 0.0) is x
    assert torch.equal(masks.drop(x, 0.75), torch.tensor([[0.0, 12.0]]))
    assert masks.take(iter((3,))).tolist() == [1, 1, 0]
    assert masks.used == 8


def test_dropout_scales_after_masking() -> None:
    x = random_tensor(64, dtype=torch.bfloat16)
    kept = Masks(torch.ones(64, dtype=torch.uint8)).drop(x, 0.1)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, (x.float() * (1 / 0.9)).bfloat16())


# -- Muon


def newton_schulz(matrix: Tensor) -> Tensor:
    """Return the result of five Newton-Schulz steps in float64."""
    x = matrix.double()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (6, 6), (1, 9), (16, 4)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_orthogonal_is_five_newton_schulz_steps(shape: tuple[int, int], size: float) -> None:
    batch = torch.stack([random_tensor(*shape, seed=seed, dtype=torch.float32) * size for seed in range(3)])
    result = orthogonal(batch)
    assert (result.dtype, result.shape) == (torch.bfloat16, batch.shape)
    for matrix, got in zip(batch, result, strict=True):
        assert torch.allclose(got.double(), newton_schulz(matrix), atol=0.1)
        assert torch.equal(orthogonal(matrix[None])[0], got) or shape[0] > 1, (
            "matrices do not affect each other"
        )


def test_the_bits_of_a_square_update() -> None:
    """The update of a square matrix is computed without transposing the matrix."""
    x = random_tensor(1, 6, 6, dtype=torch.bfloat16)
    result = orthogonal(x)
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    assert torch.equal(result, x)


def test_zero_and_tiny_gradients_give_bounded_updates() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4).bfloat16())
    tiny = torch.zeros(1, 3, 4)
    tiny[0, 0, 0] = 1e-9
    assert 0 < float(orthogonal(tiny).abs().max()) < 20, "the divisor is at least 1e-7"
    assert float(orthogonal(tiny)[0, 0, 0]) == pytest.approx(float(newton_schulz(tiny[0])[0, 0]), rel=3e-2)


def muon_use_native(
    weights: list[Tensor], grads: list[list[Tensor]], lr: float, weight_decay: float, momentum: float
) -> tuple[list[Tensor], list[Tensor]]:
    moments = [torch.zeros_like(w) for w in weights]
    weights = [w.clone() for w in weights]
    for step in grads:
        for i, grad in enumerate(step):
            moments[i] = momentum * moments[i] + (1 - momentum) * grad
            ahead = momentum * moments[i] + (1 - momentum) * grad
            update = newton_schulz(ahead).to(grad.dtype) * 0.2 * max(grad.shape) ** 0.5
            weights[i] = weights[i] * (1 - lr * weight_decay) - lr * update
    return weights, moments


@pytest.mark.parametrize(
    ("lr", "weight_decay", "momentum"),
    [(0.1, 0.0, 0.0), (0.1, 0.0, 0.9), (0.1, 0.5, 0.9), (0.02, 3.0, 0.5), (0.0, 0.5, 0.9), (1.0, 1.0, 0.0)],
)
@pytest.mark.parametrize("shapes", [[(4, 6)], [(4, 6), (4, 6), (6, 4)], [(5, 5), (2, 9), (5, 5)]])
def test_muon_matches_its_formula(
    shapes: list[tuple[int, int]], lr: float, weight_decay: float, momentum: float
) -> None:
    weights = [random_tensor(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    grads = [
        [random_tensor(*shape, seed=10 * step + i, dtype=torch.float32) for i, shape in enumerate(shapes)]
        for step in (1, 2, 3)
    ]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = Muon([{"params": params, "lr": lr, "weight_decay": weight_decay}], momentum)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    right, moments = muon_use_native(weights, grads, lr, weight_decay, momentum)
    for param, wanted, moment in zip(params, right, moments, strict=True):
        assert param.dtype == torch.float32
        assert torch.allclose(param, wanted, atol=max(1e-7, 0.15 * lr))
        assert torch.allclose(optimizer.state[param]["momentum_buffer"], moment, atol=1e-6)


def test_each_group_of_muon_has_its_own_rates() -> None:
    params = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(3)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "lr": 0.5},
        {"params": params[2:], "weight_decay": 0.25, "lr": 0.0},
    ]
    optimizer = Muon(groups, 0.0)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (1.0, 0.0),
        (0.5, 0.0),
        (0.0, 0.25),
    ]
    for param in params:
        param.grad = random_tensor(3, 4, seed=5, dtype=torch.float32)
    optimizer.step()
    moved = [param.detach() - 1 for param in params]
    assert torch.allclose(moved[0], 2 * moved[1], atol=1e-6)
    assert torch.equal(moved[2], torch.zeros(3, 4))


def test_a_muon_update_has_the_size_of_an_adamw_update() -> None:
    """The root mean square of an update is about 0.2 times the learning rate for every shape."""
    for shape in ((8, 32), (32, 8), (24, 24)):
        param = torch.nn.Parameter(torch.zeros(shape))
        param.grad = random_tensor(*shape, dtype=torch.float32) * 1e-4
        Muon([{"params": [param], "lr": 1.0}], 0.0).step()
        assert 0.15 < float(param.detach().pow(2).mean().sqrt()) < 0.23


def test_the_loss_is_summed_on_the_device_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device | None] = []
    real = torch.zeros

    def recording(*shape: Any, device: torch.device | None = None, **options: Any) -> Tensor:
        devices.append(device)
        return real(*shape, device=device, **options)

    logits, target = random_tensor(4, 5, dtype=torch.float32), torch.arange(4)
    monkeypatch.setattr(torch, "zeros", recording)
    cross_entropy(logits, target, 0.1)
    assert devices == [torch.device("cpu")]
