"""What a run would cost, without training a step: `mainrun train --dry-run`."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F

from mainrun.config import Plan, TrainConfig
from mainrun.corpus import load_corpus
from mainrun.machine import Machine
from mainrun.tokens import prepare
from mainrun.train import GPT, check_spans, flops_per_token


def estimate(cfg: TrainConfig) -> dict[str, Any]:
    """--dry-run: the resolved table, and what the run would cost, without training a step."""
    machine = Machine(cfg)
    data = prepare(cfg, load_corpus(cfg))
    plan = Plan(cfg, len(data.splits["train"]))
    check_spans(cfg, data)
    with torch.device("meta"):
        model = GPT(cfg, data.tokenizer.vocab_size)
    params = sum(p.numel() for p in model.parameters())
    per_step = cfg.batch_size * cfg.block_size * cfg.passes * flops_per_token(cfg, model)
    moments = {"sgd": 1 if cfg.momentum else 0, "adamw": 2, "muon": 1.5}[cfg.optimizer]
    rows = cfg.batch_size // cfg.grad_accum // machine.world * cfg.passes
    width = 2 if cfg.dtype == "bfloat16" else 4
    # kept for the backward pass, per token and layer: both norms' in and out, q k v, heads' out, branch outs, the MLP's wide ones
    layer = cfg.d_model * (4 * 4 + 6 * width) + 2 * width * cfg.ff_width * (1.5 if cfg.mlp == "swiglu" else 1)
    attention = cfg.n_head * cfg.block_size * (4 + width + (1 if cfg.dropouts[1] else 0))
    activations = rows * cfg.block_size * (cfg.n_layer * (layer + attention) + data.tokenizer.vocab_size * (4 * 2 + width))
    memory = params * 4 * (2 + moments + (1 if cfg.ema or cfg.swa else 0)) + activations
    seconds = plan.steps * per_step / (0.6 * matmul_speed(cfg, machine))
    cost = {"params": params, "flops": plan.steps * per_step, "memory": int(memory), "eta_seconds": seconds}
    return {"run": cfg.run_id, "plan": plan.table(), **cost, "machine_class": machine.facts}


def matmul_speed(cfg: TrainConfig, machine: Machine) -> float:
    """FLOP/s of this machine on a product of the config's shape; a training step reaches about 0.6 of it."""
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
    rows = min(4096, cfg.batch_size * cfg.block_size)
    x = torch.ones(rows, cfg.d_model, dtype=dtype, device=machine.device)
    w = torch.ones(cfg.ff_width, cfg.d_model, dtype=dtype, device=machine.device)
    best = math.inf
    for _ in range(5):
        clock = time.perf_counter()
        float(F.linear(x, w)[0, 0])  # reading one number waits for the device
        best = min(best, time.perf_counter() - clock)
    return 2 * rows * cfg.d_model * cfg.ff_width / best
