"""Profile the parts of a training step, and measure the lower limit of the step time.

The lower limit, called the floor, is the time that the matrix products of the linear layers take. No training
step with these linear layers can be faster.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mainrun.config import TrainConfig
from mainrun.core.attention import Attention
from mainrun.core.device import Device
from mainrun.core.dropout import Masks
from mainrun.core.layers import RMSNorm
from mainrun.train import GPT

PARTS = ("GEMM", "attention", "dropout", "norm", "loss", "optimizer", "other")
LABEL = "part:"  # the prefix of the events that this module adds to the profile
STEP = "whole step"

# The substrings of operation names that identify each part of a training step. An operation belongs to the
# first part that has a matching substring. The name of a compiled kernel contains the names of all operations
# that the kernel fuses. The parts are ordered so that a fused kernel belongs to the part of its most
# expensive operation.
NAMES = {
    "optimizer": ("adamw", "_sgd", "optimizer."),
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
    """Return the part of a training step that an operation belongs to, or None if its name is unknown."""
    name = name.lower()
    for part, substrings in NAMES.items():
        if any(text in name for text in substrings):
            return part
    return None


def shares(step: Callable[[], Any], models: Iterable[nn.Module]) -> dict[str, float]:
    """Return each part's share of the time of a training step of some models. The shares sum to 1.

    The part `other` is the time that is spent outside of known operations, for example in Python code.
    """
    model = nn.ModuleList(models)
    cuda = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU]
    if cuda:
        activities.append(ProfilerActivity.CUDA)
    with labelled(model), profile(activities=activities) as profiler, record_function(STEP):
        step()
        if cuda:
            torch.cuda.synchronize()
    events = []
    for event in profiler.events() or []:
        if event.device_type == DeviceType.CPU and any(outer.name == STEP for outer in _chain(event)):
            events.append(event)
    forward_parts = _forward_parts(events)
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:
        part = _part(event, forward_parts)
        seconds[part] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(seconds.values()) or 1.0
    return {part: spent / total for part, spent in seconds.items()}


def _chain(event: Any) -> Iterator[Any]:
    """Yield a profiler event and all events that enclose it, from the innermost to the outermost."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _label(event: Any) -> str | None:
    """Return the part of the labeled module that contains a profiler event, or None for other events."""
    for outer in _chain(event):
        if outer.name.startswith(LABEL):
            return str(outer.name.removeprefix(LABEL))
    return None


def _forward_parts(events: list[Any]) -> dict[int, str]:
    """Return a dict that maps the sequence number of each labeled forward operation to its part.

    A backward operation has the same sequence number as its forward operation.
    """
    parts = {}
    for event in events:
        if event.sequence_nr >= 0 and event.scope == 0:
            part = _label(event)
            if part:
                parts[event.sequence_nr] = part
    return parts


def _part(event: Any, forward_parts: dict[int, str]) -> str:
    """Return the part of a profiler event, based on its name and on the events that enclose it."""
    chain = list(_chain(event))
    if any(outer.name.startswith("Optimizer.") for outer in chain):
        return "optimizer"
    part = part_of(event.name) or _label(event)
    if part:
        return part
    for outer in chain:
        # A backward operation belongs to the same part as its forward operation.
        if outer.sequence_nr in forward_parts:
            return forward_parts[outer.sequence_nr]
    for outer in chain:
        part = part_of(outer.name)
        if part:
            return part
    return "other"


@contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """Label attention, norms and dropout for the profiler.

    The labels have no effect on a compiled model, whose kernels are recognized by their names.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Attention):
                _label_module(module, "attention", stack)
            elif isinstance(module, nn.LayerNorm | RMSNorm):
                _label_module(module, "norm", stack)
        _label_dropout(Masks, "drop", 2, stack)  # argument 2 of Masks.drop is the dropout rate
        _label_dropout(Masks, "drop_rows", 2, stack)
        _label_dropout(Device, "masks", 1, stack)  # argument 1 of Device.masks is the list of dropout sites
        yield


def _label_module(module: nn.Module, part: str, stack: ExitStack) -> None:
    """Record each forward pass of a module as a profiler event until the stack is closed."""
    open_events: list[Any] = []

    def enter(*_: Any) -> None:
        event = record_function(f"{LABEL}{part}")
        event.__enter__()
        open_events.append(event)

    def leave(*_: Any) -> None:
        open_events.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def _label_dropout(owner: type, name: str, condition: int, stack: ExitStack) -> None:
    """Record the calls of a method as profiler events until the stack is closed.

    condition: the index of an argument. A call is recorded only if this argument is true.
    """
    method = getattr(owner, name)

    @wraps(method)
    def labelled_method(*args: Any) -> Any:
        with record_function(f"{LABEL}dropout") if args[condition] else nullcontext():
            return method(*args)

    stack.callback(setattr, owner, name, method)
    setattr(owner, name, labelled_method)


# -- the floor


def products(cfg: TrainConfig, vocab_size: int) -> Counter[tuple[int, int, bool]]:
    """Count the linear layers of a model. The keys are (inputs, outputs, whether the layer is the head)."""
    with torch.device("meta"):
        model = GPT(cfg, vocab_size)
    counts: Counter[tuple[int, int, bool]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            counts[module.in_features, module.out_features, False] += 1
    counts[cfg.d_model, vocab_size, True] = 1
    return counts


class Floor:
    """The matrix products of all linear layers in the forward and backward pass of a step."""

    def __init__(self, cfg: TrainConfig, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
        self.repeats = cfg.grad_accum * cfg.members
        self.rows = cfg.batch_size // cfg.grad_accum * cfg.block_size * cfg.passes
        self.products = products(cfg, vocab_size)
        self.flops = 0
        for (inputs, outputs, _), count in self.products.items():
            self.flops += self.repeats * 6 * self.rows * inputs * outputs * count

    def step(self) -> dict[str, float]:
        """Run all matrix products once. Return the seconds for the layers and the seconds for the head."""
        seconds = {"layers": 0.0, "head": 0.0}
        for (inputs, outputs, is_head), count in self.products.items():
            part = "head" if is_head else "layers"
            seconds[part] += self._seconds(inputs, outputs, count * self.repeats)
        return seconds

    def _seconds(self, inputs: int, outputs: int, count: int) -> float:
        x = torch.ones(self.rows, inputs, dtype=self.dtype, device=self.device)
        y = torch.ones(self.rows, outputs, dtype=self.dtype, device=self.device)
        w = torch.ones(outputs, inputs, dtype=self.dtype, device=self.device)
        dx = torch.empty_like(x)
        dy = torch.empty_like(y)
        dw = torch.empty_like(w)
        self.multiply(x, w, y, dx, dy, dw)  # the first call allocates memory, so it is not measured
        wait(self.device)
        start = time.perf_counter()
        for _ in range(count):
            self.multiply(x, w, y, dx, dy, dw)
        wait(self.device)
        return time.perf_counter() - start

    @staticmethod
    def multiply(x: Tensor, w: Tensor, y: Tensor, dx: Tensor, dy: Tensor, dw: Tensor) -> None:
        """Compute the output of a linear layer, the gradient of its input and the gradient of its weight."""
        torch.mm(x, w.t(), out=dy)
        torch.mm(y, w, out=dx)
        torch.mm(y.t(), x, out=dw)


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
