"""Where a step's time goes, and the floor under it: the linear layers' matrix products alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mainrun.config import TrainConfig
from mainrun.core.device import Device
from mainrun.core.dropout import Masks
from mainrun.train import GPT, Attention, RMSNorm

PARTS = ("GEMM", "attention", "dropout", "norm", "loss", "optimiser", "other")
MARK, STEP = "part:", "whole step"

# What an operation is by its own name; the first that fits. torch.compile writes into a kernel's name what it fused, so such a kernel
# counts for the dearest thing in it.
BY_NAME = {
    "optimiser": ("adamw", "_sgd", "optimizer."),
    "loss": ("log_softmax", "nll_loss", "cross_entropy", "crossentropy", "logsumexp"),
    "GEMM": (
        "aten::mm",
        "aten::addmm",
        "aten::linear",
        "_linear_pointwise",
        "mkldnn_linear",
        "cpp_packed_gemm",
        "gemm",
    ),
    "attention": ("softmax", "bmm", "attention", "attend_"),
    "dropout": ("bernoulli", "random_", "dropout"),
    "norm": ("layer_norm", "rms_norm", "rmsnorm", "rootmeansquare", "layernorm", "rsqrt"),
}


def part_of(name: str) -> str | None:
    name = name.lower()
    return next((part for part, signs in BY_NAME.items() if any(sign in name for sign in signs)), None)


def shares(step: Callable[[], Any], model: nn.Module) -> dict[str, float]:
    """The share of each part in one step; they sum to 1. What no operation accounts for (Python, launching) is `other`."""
    cuda = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with marked(model), profile(activities=activities) as found, record_function(STEP):
        step()
        if cuda:
            torch.cuda.synchronize()
    events = [
        e
        for e in found.events() or []
        if e.device_type == DeviceType.CPU and any(outer.name == STEP for outer in _chain(e))
    ]
    forward = {
        e.sequence_nr: part for e in events if e.sequence_nr >= 0 and e.scope == 0 and (part := _marked_as(e))
    }
    spent = dict.fromkeys(PARTS, 0.0)
    for e in events:
        spent[_part(e, forward)] += e.self_device_time_total if cuda else e.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    return {part: seconds / total for part, seconds in spent.items()}


def _chain(event: Any) -> Iterator[Any]:
    """An event and those around it, inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _marked_as(event: Any) -> str | None:
    return next((e.name.removeprefix(MARK) for e in _chain(event) if e.name.startswith(MARK)), None)


def _part(event: Any, forward: dict[int, str]) -> str:
    """By the optimiser around it, by its own name, by the module around it, or by the forward operation that it is the backward of."""
    chain = list(_chain(event))
    if any(e.name.startswith("Optimizer.") for e in chain):
        return "optimiser"
    named = next((part for e in chain if (part := part_of(e.name))), None)
    backward = next(
        (part for e in chain if e.sequence_nr >= 0 and (part := forward.get(e.sequence_nr))), None
    )
    return part_of(event.name) or _marked_as(event) or backward or named or "other"


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """The profiler sees attention, the norms and dropout by name while this is open. A compiled model has its kernels' names instead."""
    open_marks: list[Any] = []
    with ExitStack() as stack:

        def enter(part: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                mark = record_function(f"{MARK}{part}")
                mark.__enter__()
                open_marks.append(mark)

            return hook

        def leave(*_: Any) -> None:
            open_marks.pop().__exit__(None, None, None)

        for module in model.modules():
            part = "norm" if isinstance(module, nn.LayerNorm | RMSNorm) else None
            part = "attention" if isinstance(module, Attention) else part
            if part:
                for handle in (
                    module.register_forward_pre_hook(enter(part)),
                    module.register_forward_hook(leave),
                ):
                    stack.callback(handle.remove)
        for owner, name, what in ((Masks, "drop", 2), (Device, "masks", 1)):
            before = getattr(owner, name)
            stack.callback(setattr, owner, name, before)
            setattr(owner, name, _marking(before, what))
        yield


def _marking(function: Callable[..., Any], what: int) -> Callable[..., Any]:
    """Dropout, where the argument in that place (the rate, the places) asks for any."""

    @wraps(function)
    def marks(*args: Any) -> Any:
        with record_function(f"{MARK}dropout") if args[what] else nullcontext():
            return function(*args)

    return marks


# -- the floor


def products(cfg: TrainConfig, vocab_size: int) -> Counter[tuple[int, int, bool]]:
    """(inputs, outputs, is the head) of each linear layer of a step, and how many there are of that size."""
    with torch.device("meta"):
        model = GPT(cfg, vocab_size)
    found = Counter(
        (m.in_features, m.out_features, False)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "head"
    )
    found[cfg.d_model, vocab_size, True] = 1
    return found


class Floor:
    """Forward, dX and dW of every linear layer, each on buffers that are there already: no step with these layers can be faster."""

    def __init__(self, cfg: TrainConfig, vocab_size: int, device: torch.device) -> None:
        self.dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
        self.rows = cfg.batch_size // cfg.grad_accum * cfg.block_size * cfg.passes
        self.repeats, self.device = cfg.grad_accum, device
        self.products = products(cfg, vocab_size)
        self.flops = self.repeats * sum(6 * self.rows * i * o * n for (i, o, _), n in self.products.items())

    def step(self) -> dict[str, float]:
        """Seconds of the layers' products and of the head's."""
        spent = {"layers": 0.0, "head": 0.0}
        for (inputs, outputs, is_head), count in self.products.items():
            x, y = (torch.ones(self.rows, n, dtype=self.dtype, device=self.device) for n in (inputs, outputs))
            w = torch.ones(outputs, inputs, dtype=self.dtype, device=self.device)
            dx, dy, dw = torch.empty_like(x), torch.empty_like(y), torch.empty_like(w)
            self._once(x, w, y, dx, dy, dw)  # the first touch of new pages is not the product's
            wait(self.device)
            clock = time.perf_counter()
            for _ in range(count * self.repeats):
                self._once(x, w, y, dx, dy, dw)
            wait(self.device)
            spent["head" if is_head else "layers"] += time.perf_counter() - clock
        return spent

    @staticmethod
    def _once(
        x: torch.Tensor,
        w: torch.Tensor,
        y: torch.Tensor,
        dx: torch.Tensor,
        dy: torch.Tensor,
        dw: torch.Tensor,
    ) -> None:
        torch.mm(x, w.t(), out=dy)
        torch.mm(y, w, out=dx)
        torch.mm(y.t(), x, out=dw)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
