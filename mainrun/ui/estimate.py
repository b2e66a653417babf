"""What a run would cost, without training it: `mainrun train --dry-run`, and with --probe a few steps that are thrown away."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
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
from mainrun.core.optimizers import Muon
from mainrun.data import scoring
from mainrun.data.batches import Batches
from mainrun.data.token_cache import TokenData
from mainrun.plan.cost import segment_costs, size
from mainrun.plan.ops import Schedule
from mainrun.plan.plan import Plan, StepInputs
from mainrun.run.resume import check_spans
from mainrun.train import GPT, State, TrainStep, build, compute_loss, set_up

PROBED = 3  # steps
DISK = 3e8  # bytes a second of a checkpoint: its checksum, its write and its sync


def estimate(cfg: TrainConfig, probe: bool = False, store: bool = False) -> dict[str, Any]:
    """--dry-run: the resolved table, and what the run would cost. With `probe` the time is measured on a few real steps."""
    _, machine, _, data, plan = set_up(cfg)
    check_spans(cfg, data)
    vocab_size = data.tokenizer.vocab_size
    parts = segment_costs(plan, vocab_size)
    flops = sum(part["flops"] for part in parts)
    cost: dict[str, Any] = {
        "params": parts[-1]["params"],
        "flops": flops,
        "memory": memory(plan, machine, vocab_size, store),
    }
    if cfg.growth.ops:
        cost["segments"] = parts
    if probe:
        cost |= probed(
            cfg,
            machine,
            plan,
            data,
            flops / (plan.tokens(plan.steps) * cfg.passes * parts[0]["flops_per_token"]),
        )
    else:
        cost["eta_seconds"] = flops / (0.6 * matmul_speed(cfg, machine))
    return {"run": cfg.run_id, "plan": plan.table(), **cost, "machine_class": machine.machine_class}


def matmul_speed(cfg: TrainConfig, machine: Device) -> float:
    """FLOP/s of this machine on a product of the config's shape; a training step reaches about 0.6 of it."""
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
    rows = min(4096, cfg.batch_size * cfg.block_size)
    x = torch.ones(rows, cfg.d_model, dtype=dtype, device=machine.torch_device)
    w = torch.ones(cfg.ff_width, cfg.d_model, dtype=dtype, device=machine.torch_device)
    best = math.inf
    for _ in range(5):
        clock = time.perf_counter()
        float(F.linear(x, w)[0, 0])  # reading one number waits for the device
        best = min(best, time.perf_counter() - clock)
    return 2 * rows * cfg.d_model * cfg.ff_width / best


# -- time, measured


class Trial:
    """The real training step of a config, on weights that nobody keeps."""

    def __init__(self, cfg: TrainConfig, machine: Device, plan: Plan, vocab_size: int) -> None:
        self.cfg, self.machine, self.plan = cfg, machine, plan
        self.state = State(cfg, build(cfg, vocab_size).to(machine.torch_device))
        self.stepper = TrainStep(self.state, machine)

    def step(self, x: Tensor, y: Tensor, count: int = 1) -> float:
        """Steps, to the very end of the last, whose loss is given. As in a run, none of them waits for the one before."""
        for _ in range(count):
            state, inputs = self.state, self.plan.at(min(self.state.step, self.plan.steps - 1))
            numbers = self.stepper.gradients(x, y, inputs)
            self.stepper.update(inputs)
            state.step += 1
        if self.machine.torch_device.type == "cuda":
            torch.cuda.synchronize()
        return float(numbers[0])


def probed(cfg: TrainConfig, machine: Device, plan: Plan, data: TokenData, grows: float) -> dict[str, Any]:
    """The time of the run by a few of its steps, one part of an evaluation, and the size of a checkpoint.

    grows: by how much a token costs more in the mean of the run than at its start.
    """
    compiles, machine.compile = machine.compile, False  # a probe must be cheap
    try:
        trial, batches = (
            Trial(cfg, machine, plan, data.tokenizer.vocab_size),
            Batches(cfg, data.splits["train"]),
        )
    finally:
        machine.compile = compiles

    def step(i: int) -> None:
        x, y = (machine.put(a) for a in batches.at(i))
        trial.step(x, y)

    warm = 1 + (
        WARM if trial.stepper.forward_backward.on else 0
    )  # the first maps the memory; on a GPU a few go before what a run does is recorded
    for i in range(warm):
        step(i)
    seconds = statistics.median(timed(lambda i=i: step(i)) for i in range(warm, warm + PROBED))  # type: ignore[misc]
    evaluation = sum(_evaluation(cfg, trial, data, split) for split in ("val", "dev") if split in data.splits)
    held = sum(t.numel() * t.element_size() for t in trial.state.tensors().values())
    saves = -(-plan.steps // plan.checkpoint_every)
    steps = plan.tokens(plan.steps) / plan.segments[0].span * seconds * grows
    if compiles:
        costs, gains = compile_balance(
            cfg, plan, machine.torch_device.type, machine.threads
        )  # the gain by rule of thumb, and never more than that of modern blocks
        steps += costs - min(gains, steps / 3)
    # the guards take each score again, and a few more, at the end: about one evaluation
    total = steps + evaluation * grows * (len(plan.eval_steps) + 1) + saves * held / DISK
    return {
        "eta_seconds": total,
        "probe": {"step_seconds": seconds, "evaluation_seconds": evaluation, "compiles": compiles},
    }


def _evaluation(cfg: TrainConfig, trial: Trial, data: TokenData, split: str) -> float:
    """Seconds to score a split, from the first tokens of it."""
    tokens, (rows, length) = data.splits[split], cfg.geometry
    span = rows * length + 1
    part = tokens[: max(span, 2 * cfg.batch_size * cfg.block_size)]

    def work(n: int) -> int:  # targets, of the official score and of the full one
        return n // span * rows * length + n

    size = {"chars": len(part), "nbytes": len(part), "block_size": cfg.block_size}
    seconds = timed(lambda: scoring.evaluate(trial.state.model, part, **size, geometry=cfg.geometry))
    return seconds * work(len(tokens)) / work(len(part))


def timed(work: Callable[[], Any]) -> float:
    clock = time.perf_counter()
    work()
    return time.perf_counter() - clock


# -- memory, counted

# Python, torch and the other libraries of a run, in bytes; on a GPU they are not in its memory.
PROCESS = 500_000_000
FRAGMENTS = 1.28  # the heap's peak over that of the tensors that come and go in a step; those that stay leave no holes (docs/log/growth.md)
COMPILER = 100_000_000  # what torch.compile leaves in the process ...
COMPILED = 1.0  # ... and the same peak where a step is compiled: it keeps fewer, and reuses them


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive while it is open, and their most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:  # a view has the storage of what it shows
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, key).atexit = False

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def memory(plan: Plan, machine: Device, vocab_size: int, store: bool = False) -> int:
    """The peak of the whole process (of a GPU's memory), in bytes: a step and an evaluation on tensors that have sizes but no memory.

    So weights, gradients, moments, what autograd keeps, and what an operation needs for a moment are in it, each for as long as it lives;
    and the copy of a state that is on its way to the store, if there is one.
    """
    ends = [*(segment.first for segment in plan.segments[1:]), plan.steps]
    phases = [segment.cfg for segment, end in zip(plan.segments, ends, strict=True) if end > segment.first]
    phases += plan.cfg.segment_configs[len(plan.segments) :]  # what waits for a loss may come
    return max(
        [_phase(phase, machine, vocab_size, store) for phase in _largest(phases)]
        + list(_ops(phases, machine, vocab_size))
    )


def _ops(phases: list[TrainConfig], machine: Device, vocab_size: int) -> Iterator[int]:
    """Between two phases: the weights before and after are there at once, then the moments before and after."""
    sizes = [size(phase.model_copy(update={"vocab_size": vocab_size})) for phase in phases]
    for a, b in pairwise(sizes):
        live = 4 * b.params + a.moments + max(4 * a.params, b.moments)
        yield _process(machine, live, live)


def _process(machine: Device, live: int, stays: int) -> int:
    """The peak of a process, of that of its tensors, of which some stay from step to step."""
    if machine.torch_device.type == "cuda":
        return live
    comes = live - stays
    return PROCESS + stays + (int(COMPILED * comes) + COMPILER if machine.compile else int(FRAGMENTS * comes))


def _largest(phases: list[TrainConfig]) -> list[TrainConfig]:
    """Of each model the phase with the most rows, and the most that drops."""
    found: dict[str, TrainConfig] = {}
    for phase in phases:
        model = str(
            [
                getattr(phase, field)
                for field in TrainConfig.model_fields
                if TrainConfig.class_of(field) == "static"
            ]
        )
        found[model] = max(
            found.get(model, phase), phase, key=lambda c: (c.batch_size // c.grad_accum, max(c.dropouts))
        )
    return list(found.values())


def _phase(cfg: TrainConfig, machine: Device, vocab_size: int, store: bool) -> int:
    rows = cfg.batch_size // cfg.grad_accum // machine.world
    inputs = Plan(cfg.model_copy(update={"growth": Schedule()}), cfg.batch_size * cfg.block_size * 2).at(0)
    with FakeTensorMode(allow_fallback_kernels=False), Live() as live, machine.torch_device:
        state = State(cfg, GPT(cfg, vocab_size))
        model = state.model
        model.set_dropout(inputs, machine.attention)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        moments = _moments(cfg, state)  # first: from the second step on they are there while the model runs
        _evaluate(model, cfg, vocab_size)
        model.zero_grad(set_to_none=True)
        size = sum(n for n, _ in dropout_sites(cfg, inputs, rows * cfg.passes, machine.attention))
        pool = torch.empty(size, dtype=torch.uint8) if size else None
        _backward(model, torch.zeros(rows, cfg.block_size, dtype=torch.int64), inputs, pool)
        held = [*state.tensors().values(), *moments, *state.average.shadow.values()]
        stays = sum(t.numel() * t.element_size() for t in held)
        if store and machine.torch_device.type == "cpu":
            live.most += stays
            stays *= 2
        del moments, held
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if machine.world > 1:
        live.most += gradients  # the buckets in which they travel
    return _process(machine, live.most, min(stays + gradients, live.most))


def _moments(cfg: TrainConfig, state: State) -> list[Tensor]:
    """What the optimisers keep. Only Muon needs more than that while it steps; the fused ones have no form without memory."""
    kept = []
    for optimizer in state.optimizers.all:
        if isinstance(optimizer, Muon):
            optimizer.step()
        else:
            each = 2 if isinstance(optimizer, torch.optim.AdamW) else int(cfg.momentum > 0)
            kept += [
                torch.empty_like(p)
                for group in optimizer.param_groups
                for p in group["params"]
                for _ in range(each)
            ]
    return kept


def _evaluate(model: GPT, cfg: TrainConfig, vocab_size: int) -> None:
    """The widest batch of a score, as scoring.py takes it."""
    device = model.embed.weight.device
    rows = max(1, scoring.LOGITS[device.type] // (cfg.block_size * vocab_size))
    with torch.no_grad():
        logits = model.eval()(torch.zeros(rows, cfg.block_size, dtype=torch.int64)).flatten(0, 1)
        F.log_softmax(logits[: max(1, scoring.CHUNK[device.type] // vocab_size)].float(), dim=-1)


class HeldGradient(torch.autograd.Function):
    """The memory of kernels.cross_entropy: beside the logits their gradient, in their type, and for a chunk of them two float32 copies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.grad = torch.empty_like(logits)
        chunk = min(logits.numel(), CHUNK[logits.device.type])
        copies = [torch.empty(chunk, dtype=torch.float32) for _ in "ab"]
        del copies
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad, ctx.grad = ctx.grad, None
        return grad


def _backward(model: GPT, x: Tensor, inputs: StepInputs, pool: Tensor | None) -> None:
    model.train()
    if inputs.rdrop:
        loss = compute_loss(model, x, x, inputs, pool)[0]
    else:
        loss = HeldGradient.apply(model(x, pool).flatten(0, 1))
    loss.backward()
