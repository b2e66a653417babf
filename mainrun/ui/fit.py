"""`mainrun train --dry-run --fit`: find the largest micro-batch that fits into the memory of the device.

The memory of a micro-batch is estimated. On one GPU, or with --probe, real training steps then prove that
the largest micro-batch fits.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from mainrun.config import MAX_BATCH_SIZE, TrainConfig, from_dict
from mainrun.core.cuda_graph import WARM
from mainrun.core.hardware import peak_memory
from mainrun.data.lengths import HELD_OUT, most_rows
from mainrun.errors import ConfigError, UsageError
from mainrun.plan.ops import Schedule
from mainrun.plan.plan import Plan
from mainrun.run.progress import short
from mainrun.train import Setup
from mainrun.ui.console import memory_words
from mainrun.ui.estimate import (
    StepProbe,
    compiling_off,
    configs_of,
    largest_segments,
    memory_of,
    process_floor,
)

MARGIN = 0.1  # the share of the memory that stays free, because the estimate is not exact


class Proof(NamedTuple):
    """The result of training with the largest micro-batch. The number of rows may be lower than estimated."""

    rows: int
    proved: bool
    peak: int | None = None  # the measured peak of the memory, in bytes
    why_not: str = ""


def fit(setup: Setup, *, store: bool, memory: int = 0, probe: bool = False) -> dict[str, Any]:
    """Return the largest micro-batch that fits, and the settings that follow from it.

    memory: the memory in bytes that a process may use. The value 0 means the free memory of its device.

    probe: whether to prove the estimate with a training step even on a CPU.
    """
    device = setup.device
    limit = device.smallest(memory or device.free_memory)
    if not limit:
        raise UsageError("the free memory of this machine is unknown; give --memory SIZE, like --memory 16GB")
    usable = int((1 - MARGIN) * limit)
    configs = configs_of(setup.plan)
    vocab_size = setup.data.tokenizer.vocab_size

    @cache
    def memory_with(rows: int) -> int:
        return memory_of(with_rows(configs, rows, device.world), device, vocab_size, store)

    rows_of_splits = most_rows(setup.cfg, setup.data.splits)
    cap = max(1, min(rows_of_splits["train"], MAX_BATCH_SIZE) // device.world)
    estimated = largest(memory_with, usable, cap)
    process = process_floor(device)
    if not estimated:
        needed = memory_words(memory_with(1), process)
        why = f"it needs about {needed}, and a margin of {MARGIN:.0%} must stay free"
        raise UsageError(_too_small(setup.cfg, limit, why))
    proof = prove(setup, configs, estimated, limit, probe)
    if not proof.rows:
        why = f"a training step needed more than the estimate of {short(memory_with(1))}B"
        raise UsageError(_too_small(setup.cfg, limit, why))
    grad_accum = smallest_grad_accum(setup.cfg, proof.rows, device.world)
    micro_batch = setup.cfg.batch_size // grad_accum // device.world
    return {
        "memory": limit,
        "margin": MARGIN,
        "usable": usable,
        "process_memory": process,
        "largest_micro_batch": proof.rows,
        "largest_memory": memory_with(proof.rows),
        "all_of_train": proof.rows == cap,
        "proved": proof.proved,
        "measured_peak": proof.peak,
        "why_not_proved": proof.why_not,
        "grad_accum": grad_accum,
        "micro_batch": micro_batch,
        "micro_batch_memory": memory_with(micro_batch),
        "set": f"--set grad_accum={grad_accum}",
        "largest_batch": largest_batch(setup, proof.rows * device.world, rows_of_splits),
    }


def _too_small(cfg: TrainConfig, limit: int, why: str) -> str:
    fixes = ["lower block_size, d_model, n_layer or vocab_size"]
    if cfg.members > 1:
        fixes.append(f"lower members={cfg.members}")
    if cfg.rdrop:
        fixes.append("set rdrop=0")
    fixes.append("train only low-rank terms with base_frozen=true")
    return (
        f"a micro-batch of one row does not fit into {short(limit)}B: {why}; {', '.join(fixes)}, "
        "or use a larger device"
    )


# -- the search


def largest(memory_with: Callable[[int], int], usable: int, cap: int) -> int:
    """Return the largest number of rows, from 1 to `cap`, whose memory is usable, or 0 if there is none.

    memory_with: the memory of a number of rows, which never falls as the number rises.
    """
    if memory_with(1) > usable:
        return 0
    low = 1
    high = min(4, cap)
    while low < cap and memory_with(high) <= usable:
        low = high
        high = min(4 * low, cap)
    while high - low > 1:
        # The memory is almost linear, so the largest number is often the one that a line predicts.
        below = memory_with(low)
        guess = low + int((usable - below) / (memory_with(high) - below) * (high - low))
        for middle in (guess, guess + 1, (low + high) // 2):
            if not low < middle < high:
                continue
            if memory_with(middle) <= usable:
                low = middle
            else:
                high = middle
    return low


def with_rows(configs: list[TrainConfig], rows: int, world: int) -> list[TrainConfig]:
    """Return the configs with one micro-batch of `rows` rows per process."""
    return [cfg.model_copy(update={"batch_size": rows * world, "grad_accum": 1}) for cfg in configs]


def smallest_grad_accum(cfg: TrainConfig, rows: int, world: int) -> int:
    """Return the smallest grad_accum with which no micro-batch of the run has more than `rows` rows."""
    for grad_accum in range(1, cfg.batch_size // world + 1):
        if cfg.batch_size % (grad_accum * world):
            continue
        try:
            changed = from_dict(cfg.model_dump() | {"grad_accum": grad_accum})
        except ConfigError:  # an operation changes batch_size to a number that grad_accum does not divide
            continue
        if all(_fits(segment, rows, world) for segment in changed.segment_configs):
            return grad_accum
    raise UsageError(
        f"a micro-batch of at most {rows} rows per process fits, but no grad_accum gives all steps of the "
        "growth schedule such a micro-batch; change the set_batch_size or set_grad_accum operations"
    )


def _fits(cfg: TrainConfig, rows: int, world: int) -> bool:
    pieces = cfg.grad_accum * world
    return cfg.batch_size % pieces == 0 and cfg.batch_size // pieces <= rows


# -- the proof


def prove(setup: Setup, configs: list[TrainConfig], rows: int, limit: int, probe: bool) -> Proof:
    """Train with the largest micro-batch. On a GPU, halve the micro-batch until it fits."""
    device = setup.device
    on_gpu = device.torch_device.type == "cuda"
    if device.world > 1:
        return Proof(rows, False, why_not="a proof needs a single process")
    if not on_gpu and not probe:
        return Proof(rows, False, why_not="on a CPU, --probe trains one step to prove it")
    while rows:
        try:
            peak = max(train_steps(setup, cfg, rows) for cfg in largest_segments(configs))
        except torch.cuda.OutOfMemoryError:
            peak = 0
        if 0 < peak <= limit:
            return Proof(rows, True, peak)
        if peak and not on_gpu:  # the peak of a process never falls, so fewer rows cannot be measured
            return Proof(rows, False, peak, f"a step used {short(peak)}B; try --memory with a lower size")
        rows //= 2
    return Proof(0, False)


def train_steps(setup: Setup, cfg: TrainConfig, rows: int) -> int:
    """Train with a micro-batch of random tokens, and return the peak memory in bytes.

    On a CPU, one step is trained. On a GPU, the steps include one that is recorded as a CUDA graph.
    """
    device = setup.device
    (cfg,) = with_rows([cfg.model_copy(update={"growth": Schedule(), "start": ""})], rows, device.world)
    on_gpu = device.torch_device.type == "cuda"
    if on_gpu:
        gc.collect()  # the weights of an earlier step may still be in use by a cycle of objects
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device.torch_device)
    plan = Plan(cfg, 2 * rows * cfg.block_size)
    vocab_size = setup.data.tokenizer.vocab_size
    tokens = torch.randint(vocab_size, (rows, cfg.block_size + 1)).to(device.torch_device)
    with compiling_off(device):  # compiling takes minutes and lowers the memory
        probe = StepProbe(cfg, device, plan, vocab_size)
    probe.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), WARM + 2 if on_gpu else 1)
    if on_gpu:
        return torch.cuda.max_memory_allocated(device.torch_device)
    return peak_memory()


# -- the largest batch


def largest_batch(setup: Setup, fitting: int, rows_of_splits: dict[str, int]) -> dict[str, Any]:
    """Return the largest batch of one micro-batch that the run accepts, with its steps and learning rates.

    fitting: the rows that fit into memory.

    rows_of_splits: the largest batch_size that each split has enough tokens for.
    """
    limit = min(rows_of_splits, key=rows_of_splits.__getitem__)
    world = setup.device.world
    rows = min(fitting, rows_of_splits[limit] // world * world)
    facts: dict[str, Any] = {"limited_by": limit if rows < fitting else None, "steps": None, "why_not": ""}
    try:
        cfg = from_dict(setup.cfg.model_dump() | {"batch_size": rows, "grad_accum": 1})
        facts["steps"] = Plan(cfg, setup.plan.train_tokens).steps
    except ConfigError as e:  # an operation would fire too late in a run with fewer steps
        facts["why_not"] = str(e)
    return rates_for(setup.cfg, rows) | facts


def rates_for(cfg: TrainConfig, batch_size: int) -> dict[str, Any]:
    """Return the learning rates for another batch_size, by the linear rule and by the square-root rule."""
    factor = batch_size / cfg.batch_size
    rules = {"linear": factor, "square_root": math.sqrt(factor)}
    rates: dict[str, Any] = {"batch_size": batch_size, "factor": factor}
    for rule, by in rules.items():
        rates[rule] = {"lr": cfg.lr * by, "lr_aux": cfg.lr_aux * by}
    return rates


# -- the rows of the table


def fit_rows(cfg: TrainConfig, result: dict[str, Any], world: int) -> list[tuple[str, str]]:
    """Return the rows of the table that `--fit` adds."""
    memory = f"{short(result['memory'])}B less a margin of {result['margin']:.0%}: {short(result['usable'])}B"
    each = " per process" if world > 1 else ""
    twice = ", each of which passes twice (rdrop)" if cfg.rdrop else ""
    end = "; train has no more rows" if result["all_of_train"] else ""
    memory_of_most = memory_words(result["largest_memory"], result["process_memory"])
    most = f"{result['largest_micro_batch']} rows{each}{twice}, about {memory_of_most}{end}"
    proof = f"estimated, not proved: {result['why_not_proved']}"
    if result["proved"]:
        proof = f"by training: the peak was {short(result['measured_peak'])}B"
    setting = (
        f"{result['set']} keeps batch_size={cfg.batch_size} with micro-batches of {result['micro_batch']} "
        f"rows{each}, about {short(result['micro_batch_memory'])}B"
    )
    rows = [("fit: memory", memory + each), ("fit: largest micro-batch", most), ("fit: proof", proof)]
    rows.append(("fit: use", setting))
    batch = result["largest_batch"]
    if batch["batch_size"] == cfg.batch_size:
        return rows
    rows.append(("fit: largest batch", _batch_text(batch)))
    for rule, name in (("linear", "linear rule, lr x k"), ("square_root", "square-root rule, lr x sqrt(k)")):
        rates = [f"--set {key}={rate:.4g}" for key, rate in batch[rule].items() if rate]
        rows.append((f"fit: {name}", " ".join(rates)))
    return rows


def _batch_text(batch: dict[str, Any]) -> str:
    """Return how to set the largest batch, how many steps the run would have, and what limits the batch."""
    text = f"--set batch_size={batch['batch_size']} --set grad_accum=1 (k = {batch['factor']:.4g})"
    if batch["why_not"]:
        text += f"; the growth schedule does not allow this batch: {batch['why_not']}"
    else:
        text += f"; the run would have {batch['steps']:,} {'step' if batch['steps'] == 1 else 'steps'}"
    if batch["limited_by"] in HELD_OUT:
        text += (
            f"; {batch['limited_by']} has no more tokens for one span of the official score, whose shape "
            "official_geometry can fix"
        )
    return text
