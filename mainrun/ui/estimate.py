"""`mainrun train --dry-run`: estimate the cost of a run without training it.

With --probe, a few training steps are measured on temporary weights.
"""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mainrun.config import TrainConfig
from mainrun.core.cuda_graph import WARM
from mainrun.core.device import Device
from mainrun.core.dropout import dropout_sites
from mainrun.core.kernels import CHUNK
from mainrun.core.machine_class import compile_balance
from mainrun.core.members import assemble, members_of
from mainrun.core.optimizers import CautiousAdamW
from mainrun.core.parameters import is_base
from mainrun.data import scoring
from mainrun.data.batches import Batches
from mainrun.data.token_cache import TokenData
from mainrun.plan.cost import forward_cost, segment_costs, size
from mainrun.plan.ops import Schedule
from mainrun.plan.optimizers import state_tensors
from mainrun.plan.plan import Plan, StepInputs
from mainrun.run.summary import describe_start
from mainrun.train import GPT, Model, Setup, State, TrainStep, build, compute_loss, set_up

PROBE_STEPS = 3  # the number of steps to measure; the estimate uses their median time
STEP_EFFICIENCY = 0.6  # the assumed speed of a training step, relative to the speed of a matrix product
DISK_SPEED = 3e8  # the assumed speed of saving a checkpoint, in bytes per second


def estimate(cfg: TrainConfig, probe: bool = False, store: bool = False) -> dict[str, Any]:
    """Return the resolved plan of a run and its estimated cost.

    probe: whether to measure the time of a few training steps.

    store: whether the run saves states in a store.
    """
    return estimate_setup(set_up(cfg), probe, store)


def estimate_setup(setup: Setup, probe: bool, store: bool) -> dict[str, Any]:
    """Return the resolved plan of a run that is set up, and its estimated cost."""
    cfg = setup.cfg
    device = setup.device
    data = setup.data
    plan = setup.plan
    vocab_size = data.tokenizer.vocab_size
    segments = segment_costs(plan, vocab_size)
    flops = sum(segment["flops"] for segment in segments)
    cost: dict[str, Any] = {
        "start": describe_start(setup),
        "params": segments[-1]["params"],
        "flops": flops,
        "memory": estimate_memory(plan, device, vocab_size, store and not device.sharded),
        "process_memory": process_floor(device),
        "device_memory": device.memory,
    }
    if cfg.members > 1:
        cost["members"] = cfg.members
    last = plan.segments[-1].cfg
    if last.routed_layers:
        cost["routing"] = forward_cost(last, vocab_size).table()
    if cfg.growth.ops:
        cost["segments"] = segments
    if probe:
        flops_at_first_cost = plan.tokens(plan.steps) * cfg.passes * segments[0]["flops_per_token"]
        cost |= probe_time(cfg, device, plan, data, flops / flops_at_first_cost)
    else:
        cost["eta_seconds"] = flops / (STEP_EFFICIENCY * matmul_speed(cfg, device))
    return {"run": cfg.run_id, "plan": plan.table(), **cost, "machine_class": device.machine_class}


def matmul_speed(cfg: TrainConfig, device: Device) -> float:
    """Measure the FLOP/s of a matrix product with the shape of a feed-forward layer."""
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
    rows = min(4096, cfg.batch_size * cfg.block_size)
    x = torch.ones(rows, cfg.d_model, dtype=dtype, device=device.torch_device)
    w = torch.ones(cfg.ff_width, cfg.d_model, dtype=dtype, device=device.torch_device)
    best = math.inf
    for _ in range(5):
        # Reading a number from the result forces the CPU to wait until the GPU has finished.
        best = min(best, seconds_of(lambda: float(F.linear(x, w)[0, 0])))
    return 2 * rows * cfg.d_model * cfg.ff_width / best


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# -- measuring the time


class StepProbe:
    """Run training steps of a config on temporary weights."""

    def __init__(self, cfg: TrainConfig, device: Device, plan: Plan, vocab_size: int) -> None:
        self.device = device
        self.plan = plan
        self.state = State(cfg, device.place(build(cfg, vocab_size)))
        self.train_step = TrainStep(self.state, device)

    def step(self, x: Tensor, y: Tensor, count: int = 1) -> float:
        """Run `count` steps and return the loss of the last step.

        The CPU waits for the GPU only after the last step, not between two steps.
        """
        for _ in range(count):
            inputs = self.plan.at(min(self.state.step, self.plan.steps - 1))
            numbers = self.train_step.gradients(x, y, inputs)
            self.train_step.update(inputs)
            self.state.step += 1
        if self.device.torch_device.type == "cuda":
            torch.cuda.synchronize()
        return float(numbers[0])


def probe_time(
    cfg: TrainConfig, device: Device, plan: Plan, data: TokenData, cost_growth: float
) -> dict[str, Any]:
    """Estimate the time of a run.

    The estimate is based on a few measured steps, a part of an evaluation, and the size of a checkpoint.

    cost_growth: the mean cost of a token during the run, relative to the cost of a token at the start.
    """
    compiles = device.compile
    with compiling_off(device):  # compiling the model would take longer than the measurement
        probe = StepProbe(cfg, device, plan, data.tokenizer.vocab_size)
    batches = Batches(cfg, data.splits["train"])

    def step(i: int) -> None:
        x, y = batches.at(i)
        probe.step(device.put(x), device.put(y))

    # The first step allocates memory. On a GPU, a CUDA graph is recorded after further warm-up steps.
    warmup = 1
    if probe.train_step.forward_backward.on:
        warmup += WARM
    for i in range(warmup):
        step(i)
    times = []
    for i in range(warmup, warmup + PROBE_STEPS):
        times.append(seconds_of(lambda i=i: step(i)))  # type: ignore[misc]
    step_seconds = statistics.median(times)
    evaluation_seconds = 0.0
    for split in ("val", "dev"):
        if split in data.splits:
            evaluation_seconds += _evaluation_seconds(cfg, probe.state.model, data, split)

    training = plan.tokens(plan.steps) / plan.segments[0].span * step_seconds * cost_growth
    if compiles:
        costs, saves = compile_balance(cfg, plan, device.torch_device.type, device.threads)
        # Compiling the model saves at most a third of the training time.
        training += costs - min(saves, training / 3)
    # The guards at the end of the run take about as long as one more evaluation.
    evaluations = len(plan.eval_steps) + 1
    checkpoints = math.ceil(plan.steps / plan.checkpoint_every)
    checkpoint_seconds = _bytes(probe.state.tensors().values()) / DISK_SPEED
    total = training + evaluations * evaluation_seconds * cost_growth + checkpoints * checkpoint_seconds
    return {
        "eta_seconds": total,
        "probe": {
            "step_seconds": step_seconds,
            "evaluation_seconds": evaluation_seconds,
            "compiles": compiles,
        },
    }


@contextmanager
def compiling_off(device: Device) -> Iterator[None]:
    before = device.compile
    device.compile = False
    try:
        yield
    finally:
        device.compile = before


def _evaluation_seconds(cfg: TrainConfig, model: Model, data: TokenData, split: str) -> float:
    """Measure the evaluation of the first tokens of a split, and extrapolate the time to the whole split."""
    tokens = data.splits[split]
    rows, length = cfg.geometry
    span = rows * length + 1
    sample = tokens[: max(span, 2 * cfg.batch_size * cfg.block_size)]

    def targets(n: int) -> int:
        """Return the total number of targets in the official score and the full score of n tokens."""
        return n // span * rows * length + n

    sizes = {"chars": len(sample), "nbytes": len(sample), "block_size": cfg.block_size}
    seconds = seconds_of(lambda: scoring.evaluate(model, sample, **sizes, geometry=cfg.geometry))
    return seconds * targets(len(tokens)) / targets(len(sample))


# -- estimating the memory

PROCESS = 500_000_000  # the amount of RAM that Python, torch and other libraries need, in bytes
# The factor by which fragmentation of the heap increases the memory for temporary tensors. Tensors that stay
# allocated do not fragment the heap (see docs/log/growth.md).
FRAGMENTATION = 1.28
# The memory in bytes that torch.compile keeps allocated. A compiled training step does not fragment the heap.
COMPILER = 100_000_000


def process_floor(device: Device) -> int:
    """Return the part of an estimate that every run needs. On a GPU, an estimate counts only tensors."""
    return 0 if device.torch_device.type == "cuda" else PROCESS


class LiveBytes(TorchDispatchMode):
    """A dispatch mode that counts the bytes of all live tensors and records the peak of this count."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # the size of each tensor storage in bytes, by the storage's address
        self.current = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:  # a view shares the storage of its base tensor
            return
        self.sizes[key] = storage.nbytes()
        self.current += self.sizes[key]
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self.remove, key).atexit = False

    def remove(self, key: int) -> None:
        self.current -= self.sizes.pop(key)


def estimate_memory(plan: Plan, device: Device, vocab_size: int, store: bool = False) -> int:
    """Return the peak memory of a run in bytes. For a run on a GPU, return the peak GPU memory.

    For each model in the plan, a training step and an evaluation are run on fake tensors, which have a size
    but no data. The estimate includes weights, gradients, optimizer state, activations and temporary tensors.
    For a run with a store, the estimate also includes the copy of the state that is written in the
    background.
    """
    return memory_of(configs_of(plan), device, vocab_size, store)


def configs_of(plan: Plan) -> list[TrainConfig]:
    """Return the configs of all segments of a run that have a step, in the order of the run."""
    configs = []
    ends = [*(segment.first for segment in plan.segments[1:]), plan.steps]
    for segment, end in zip(plan.segments, ends, strict=True):
        if end > segment.first:
            configs.append(segment.cfg)
    # Add the models of growth operations that are triggered by a loss, because they are not in the plan yet.
    configs += plan.cfg.segment_configs[len(plan.segments) :]
    return configs


def memory_of(configs: list[TrainConfig], device: Device, vocab_size: int, store: bool = False) -> int:
    """Return the peak memory in bytes of a run whose segments have these configs."""
    peaks = [_segment_memory(cfg, device, vocab_size, store) for cfg in largest_segments(configs)]
    peaks += _operation_memory(configs, device, vocab_size)
    return max(peaks)


def largest_segments(configs: list[TrainConfig]) -> list[TrainConfig]:
    """Return, for each model of a run, the config that needs the most memory.

    The config with the most rows per forward pass needs the most memory. Among configs with the same number
    of rows, the config with the highest dropout needs the most memory.
    """
    static = [field for field in TrainConfig.model_fields if TrainConfig.class_of(field) == "static"]
    largest: dict[str, TrainConfig] = {}
    for cfg in configs:
        model = str([getattr(cfg, field) for field in static])
        if model not in largest or _rows_and_dropout(cfg) > _rows_and_dropout(largest[model]):
            largest[model] = cfg
    return list(largest.values())


def _rows_and_dropout(cfg: TrainConfig) -> tuple[int, float]:
    return cfg.batch_size // cfg.grad_accum, max(cfg.dropouts)


def _operation_memory(configs: list[TrainConfig], device: Device, vocab_size: int) -> Iterator[int]:
    """Yield the peak memory of each growth operation that replaces the model."""
    sizes = [size(cfg.model_copy(update={"vocab_size": vocab_size})) for cfg in configs]
    for old, new in pairwise(sizes):
        # The old weights are freed before the new optimizer state is allocated.
        live = 4 * new.params + old.moments + max(4 * old.params, new.moments)
        yield _process_memory(device, live, live)


def _process_memory(device: Device, peak: int, persistent: int) -> int:
    """Return the peak memory of the process.

    peak: the peak size of the tensors in the process.

    persistent: the size of the tensors that stay allocated between training steps.
    """
    if device.torch_device.type == "cuda":
        return peak
    temporary = peak - persistent
    if device.sharded:  # freed memory is returned to the system, see `Device`
        return PROCESS + peak
    if device.compile:
        return PROCESS + persistent + temporary + COMPILER
    return PROCESS + persistent + int(FRAGMENTATION * temporary)


def _segment_memory(cfg: TrainConfig, device: Device, vocab_size: int, store: bool) -> int:
    """Return the peak memory of a training step and an evaluation of one model."""
    rows = cfg.batch_size // cfg.grad_accum // device.world
    inputs = Plan(cfg.model_copy(update={"growth": Schedule()}), cfg.batch_size * cfg.block_size * 2).at(0)
    with FakeTensorMode(allow_fallback_kernels=False), LiveBytes() as live, device.torch_device:
        state = State(cfg, assemble(cfg, [GPT(cfg, vocab_size) for _ in range(cfg.members)]))
        model = state.model
        model.set_inputs(inputs, device.attention)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        # Allocate the optimizer state first, because it exists during the forward pass of all later steps.
        moments = _optimizer_state(cfg, state)
        _evaluate(model, cfg, vocab_size)
        # Only the gradients of the last member do not exist yet when its activations take the most memory.
        last = members_of(model)[-1]
        last.zero_grad(set_to_none=True)
        mask_bytes = sum(n for n, _ in dropout_sites(cfg, inputs, rows * cfg.passes, device.attention))
        pool = torch.empty(mask_bytes, dtype=torch.uint8) if mask_bytes else None
        _backward(last, torch.zeros(rows, cfg.block_size, dtype=torch.int64), inputs, pool)
        saved = _bytes([*state.tensors().values(), *moments, *state.average.shadow.values()])
        persistent = saved
        if cfg.base_frozen:
            persistent += _bytes(p for name, p in model.named_parameters() if is_base(name))
    peak = max(live.peak, persistent + _guards_bytes(model, cfg, vocab_size))
    if store and device.torch_device.type == "cpu":
        peak += saved
        persistent += saved
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if device.sharded:
        temporary = peak - min(persistent + gradients, peak)
        persistent = (persistent + gradients) // device.world
        return _process_memory(device, persistent + _gathered_bytes(model) + temporary, persistent)
    if device.world > 1:
        peak += gradients  # add the buffers for exchanging gradients between processes
    return _process_memory(device, peak, min(persistent + gradients, peak))


def _guards_bytes(model: Model, cfg: TrainConfig, vocab_size: int) -> int:
    """Return the size of the tensors that the guards need: a copy of the weights, and two rows of logits."""
    return _bytes(model.parameters()) + 2 * 4 * cfg.block_size * vocab_size


def _gathered_bytes(model: Model) -> int:
    """Return the largest size of the whole weights and gradients that a process of a sharded run holds.

    The parameters outside of the blocks are gathered during the whole backward pass, and so are their
    gradients. A process also holds the weights of one block, their gradients, a buffer that exchanges these
    gradients, and the weights of the next block.
    """
    blocks = [_bytes(block.parameters()) for block in model.blocks]
    outside = _bytes(model.parameters()) - sum(blocks)
    return 2 * outside + 4 * max(blocks)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _optimizer_state(cfg: TrainConfig, state: State) -> list[Tensor]:
    """Allocate the optimizer state.

    The optimizers of mainrun allocate their state and their temporary tensors during a step. The optimizers
    of torch are fused. A fused optimizer cannot run on fake tensors, and needs no temporary tensors, except
    for a cautious weight decay.
    """
    moments = []
    for optimizer in state.optimizers.all:
        if not optimizer.defaults.get("fused"):
            optimizer.step()
            continue
        kind = "adamw" if isinstance(optimizer, torch.optim.AdamW) else "sgd"
        per_parameter = state_tensors(kind, cfg.momentum)
        for group in optimizer.param_groups:
            for p in group["params"]:
                moments += [torch.empty_like(p) for _ in range(per_parameter)]
        if isinstance(optimizer, CautiousAdamW):
            optimizer.decay()
    return moments


def _evaluate(model: Model, cfg: TrainConfig, vocab_size: int) -> None:
    """Evaluate one batch of the largest size that mainrun.data.scoring uses."""
    device = model.embed.weight.device
    rows = max(1, scoring.LOGITS[device.type] // (cfg.block_size * vocab_size))
    with torch.no_grad():
        logits = model.eval()(torch.zeros(rows, cfg.block_size, dtype=torch.int64)).flatten(0, 1)
        F.log_softmax(logits[: max(1, scoring.CHUNK[device.type] // vocab_size)].float(), dim=-1)


class LossMemory(torch.autograd.Function):
    """A stand-in for `kernels.cross_entropy` that allocates the same amount of memory.

    `kernels.cross_entropy` allocates the gradient of the logits, and two float32 copies of a chunk of the
    logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.grad = torch.empty_like(logits)
        chunk = min(logits.numel(), CHUNK[logits.device.type])
        copies = [torch.empty(chunk, dtype=torch.float32) for _ in range(2)]
        del copies
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = ctx.grad
        ctx.grad = None
        return grad


def _backward(model: Model, x: Tensor, inputs: StepInputs, pool: Tensor | None) -> None:
    model.train()
    if inputs.rdrop:
        loss = compute_loss(model, x, x, inputs, pool).minimized
    elif inputs.capacity:
        logits, routing = model(x, pool, routing_info=True)
        loss = LossMemory.apply(logits.flatten(0, 1)) + routing.losses.sum()
    else:
        loss = LossMemory.apply(model(x, pool).flatten(0, 1))
    loss.backward()
