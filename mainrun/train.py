"""The trainer, whole, in one file: model, loss, optimiser, loop. Read it top to bottom.

    python -m mainrun.train --preset baseline
    python -m mainrun.train --preset optimized --set corpus=file:titles.txt --set num_titles=20000
    torchrun --nproc-per-node 2 -m mainrun.train --preset optimized

One config gives one sequence of bits on one machine class. That holds because nothing in here remembers: the batch,
the dropout masks and the learning rate of a step are functions of (config, step), so a run that was killed goes on
from its checkpoint as if nothing had been. Scores live in scoring.py, the schedule's arithmetic in config.Plan.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mainrun import scoring
from mainrun.config import Plan, StepInputs, TrainConfig, load
from mainrun.corpus import Corpus, load_corpus
from mainrun.errors import ConfigError, Diverged, Interrupted, MainrunError, RunError, plain_warnings
from mainrun.guards import Evidence, guards
from mainrun.machine import Machine, StopFlag, versions
from mainrun.progress import Progress, make_progress
from mainrun.store import checkpoint
from mainrun.store.rundir import Metrics, RunDir, check_same_data, check_writable, open_run, write_text
from mainrun.tokens import EOS, Batches, TokenData, prepare

# ---------------------------------------------------------------------------------------------------------------------
# The model. Shapes: B rows, T tokens, D width, H heads, K heads of keys and values, h width of a head, V vocabulary.


def rope_table(length: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each (T, h/2)."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head against each other. x: (B, heads, T, h)"""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[: x.size(-2)].to(x.dtype), sin[: x.size(-2)].to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def make_norm(cfg: TrainConfig) -> nn.Module:
    return nn.RMSNorm(cfg.d_model, eps=1e-6) if cfg.norm == "rmsnorm" else nn.LayerNorm(cfg.d_model, bias=cfg.bias)


class HeadNorm(nn.Module):
    """RMS norm of q or k, one gain a channel, in the type that q and k come in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    def __init__(self, cfg: TrainConfig, first: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = cfg.n_head, cfg.kv_heads, cfg.head_dim
        qkv_bias = cfg.bias if cfg.qkv_bias is None else cfg.qkv_bias
        self.q = nn.Linear(cfg.d_model, cfg.n_head * cfg.head_dim, bias=qkv_bias)
        self.k = nn.Linear(cfg.d_model, cfg.kv_heads * cfg.head_dim, bias=qkv_bias)
        self.v = nn.Linear(cfg.d_model, cfg.kv_heads * cfg.head_dim, bias=qkv_bias)
        self.o = nn.Linear(cfg.n_head * cfg.head_dim, cfg.d_model, bias=cfg.bias)
        self.q_norm, self.k_norm = (HeadNorm(cfg.head_dim) if cfg.qk_norm else nn.Identity() for _ in "qk")
        self.gate = nn.Linear(cfg.d_model, cfg.n_head, bias=False) if cfg.attn_gate else None
        self.first_share = nn.Parameter(torch.tensor(0.5)) if cfg.value_residual and not first else None
        self.dropout = 0.0

    def forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor] | None, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, self.heads, self.width).transpose(1, 2))  # (B, H, T, h)
        k = self.k_norm(self.k(x).view(B, T, self.kv_heads, self.width).transpose(1, 2))  # (B, K, T, h)
        v = self.v(x).view(B, T, self.kv_heads, self.width).transpose(1, 2)
        if self.first_share is not None and v_first is not None:
            v = torch.lerp(v, v_first, self.first_share.to(v.dtype))
        if rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        values = v
        if self.kv_heads != self.heads:
            k, values = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        p = self.dropout if self.training else 0.0
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q.to(values.dtype), k.to(values.dtype), values, attn_mask=mask, dropout_p=p)
        else:  # at a title's length the CPU's fused backward is several times slower than these four lines
            score = (q @ k.transpose(-2, -1)) * self.width**-0.5
            score = score.masked_fill(~mask, -torch.inf)
            y = F.dropout(score.softmax(dim=-1), p) @ values
        if self.gate is not None:
            y = y * (2 * torch.sigmoid(self.gate(x))).transpose(1, 2).unsqueeze(-1)
        return self.o(y.transpose(1, 2).reshape(B, T, -1)), v


class MLP(nn.Module):
    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__()
        self.kind = cfg.mlp
        self.gate = nn.Linear(cfg.d_model, cfg.ff_width, bias=cfg.bias) if cfg.mlp == "swiglu" else None
        self.up = nn.Linear(cfg.d_model, cfg.ff_width, bias=cfg.bias)
        self.down = nn.Linear(cfg.ff_width, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x)) if self.kind == "gelu" else F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, cfg: TrainConfig, first: bool) -> None:
        super().__init__()
        self.attn_norm, self.attn = make_norm(cfg), Attention(cfg, first)
        self.mlp_norm, self.mlp = make_norm(cfg), MLP(cfg)
        scale = cfg.layer_scale
        self.attn_scale = nn.Parameter(torch.full((cfg.d_model,), scale)) if scale else None
        self.mlp_scale = nn.Parameter(torch.full((cfg.d_model,), scale)) if scale else None
        self.dropout = 0.0

    def branch(self, y: Tensor, scale: Tensor | None) -> Tensor:
        return F.dropout(y if scale is None else y * scale, self.dropout if self.training else 0.0)

    def forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor] | None, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        y, v = self.attn(self.attn_norm(x), mask, rope, v_first)
        x = x + self.branch(y, self.attn_scale)
        return x + self.branch(self.mlp(self.mlp_norm(x)), self.mlp_scale), v


class GPT(nn.Module):
    causal: Tensor
    blocks: list[Block]

    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.positions = nn.Embedding(cfg.block_size, cfg.d_model) if cfg.position == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg, first=i == 0) for i in range(cfg.n_layer))  # type: ignore[assignment]
        self.norm = make_norm(cfg)
        self.head = None if cfg.tie_head else nn.Linear(cfg.d_model, vocab_size, bias=False)
        self.dropout = 0.0
        self.register_buffer("causal", torch.ones(cfg.block_size, cfg.block_size, dtype=torch.bool).tril(), persistent=False)
        if cfg.position == "rope":
            cos, sin = rope_table(cfg.block_size, cfg.head_dim, cfg.rope_theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        std = self.cfg.init_std
        branch_std = std / math.sqrt(2 * self.cfg.n_layer) if self.cfg.init_depth_scaled else std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=branch_std if name.endswith((".o", ".down")) else std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for start_at_zero in (self.positions, *(block.attn.gate for block in self.blocks)):
            if start_at_zero is not None:
                nn.init.zeros_(start_at_zero.weight)

    def set_dropout(self, inputs: StepInputs) -> None:
        self.dropout = inputs.dropout
        for block in self.blocks:
            block.dropout, block.attn.dropout = inputs.resid_dropout, inputs.attn_dropout

    def forward(self, idx: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each. The matrix products run in the config's dtype, wherever this is called from."""
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            T = idx.size(1)
            mask = self.causal[:T, :T]
            if self.cfg.title_mask:  # <eos> opens the title it stands before: it is what its first word is told from
                title = (idx == EOS).cumsum(1)  # (B, T)
                mask = (mask & (title.unsqueeze(2) == title.unsqueeze(1))).unsqueeze(1)  # (B, 1, T, T)
            x = self.embed(idx)  # (B, T, D)
            if self.positions is not None:
                x = x + self.positions.weight[:T]
            x = F.dropout(x, self.dropout if self.training else 0.0)
            rope = (self.cos, self.sin) if self.cfg.position == "rope" else None
            v_first = None
            for block in self.blocks:
                x, v = block(x, mask, rope, v_first)
                v_first = v if v_first is None and self.cfg.value_residual else v_first
            logits = F.linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight)
            return self.cfg.softcap * torch.tanh(logits / self.cfg.softcap) if self.cfg.softcap else logits


def build(cfg: TrainConfig, vocab_size: int) -> GPT:
    """The model of a config at step 0: the seed decides every weight."""
    torch.manual_seed(mix(cfg.seed, "weights"))
    return GPT(cfg, vocab_size)


def mix(*parts: object) -> int:
    """A seed from anything: what is random at a step depends on its place in the run, never on what came before."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def compute_loss(model: nn.Module, x: Tensor, y: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
    """What is descended, and the plain cross entropy in it (nats per token), which is what is logged."""
    if not inputs.rdrop:
        logits = model(x).float().flatten(0, 1)  # (BT, V)
        loss = F.cross_entropy(logits, y.flatten(), label_smoothing=inputs.label_smoothing)
        plain = F.cross_entropy(logits.detach(), y.flatten()) if inputs.label_smoothing else loss.detach()
        return loss, plain
    # R-Drop: the same rows under two dropout masks; both must predict the target, and agree with each other
    logp = F.log_softmax(model(torch.cat([x, x])).float().flatten(0, 1), dim=-1)  # (2BT, V)
    loss = F.nll_loss(logp, torch.cat([y, y]).flatten())
    plain = loss.detach()
    if inputs.label_smoothing:
        loss = torch.lerp(loss, -logp.mean(), inputs.label_smoothing)
    a, b = logp.chunk(2)
    agree = ((a.exp() - b.exp()) * (a - b)).sum(-1).mean() / 2  # (KL(a|b) + KL(b|a)) / 2
    return loss + inputs.rdrop * agree, plain


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser


class Optimizers:
    """One optimiser, or Muon beside AdamW; parameters in groups by what they are; state by the parameter's name."""

    def __init__(self, cfg: TrainConfig, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self.names: dict[Tensor, str] = {p: n for n, p in named.items()}
        matrices = [p for n, p in named.items() if n.startswith("blocks.") and p.ndim == 2]
        tables = [p for n, p in named.items() if not n.startswith("blocks.") and p.ndim == 2]
        vectors = [p for p in named.values() if p.ndim < 2]
        inner = {"params": matrices, "rate": "lr", "decays": True}
        outer = [{"params": tables, "rate": "lr_aux", "decays": True}, {"params": vectors, "rate": "lr_aux", "decays": False}]
        outer = [group for group in outer if group["params"]]
        self.all: list[torch.optim.Optimizer]
        if cfg.optimizer == "sgd":
            self.all = [torch.optim.SGD([inner, *outer], lr=1.0, momentum=cfg.momentum, nesterov=cfg.momentum > 0, fused=True)]
        elif cfg.optimizer == "adamw":
            self.all = [torch.optim.AdamW([inner, *outer], lr=1.0, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)]
        else:
            self.all = [
                # the rate is in AdamW's units: an update has the size (rms) that AdamW's would have
                torch.optim.Muon([inner], lr=1.0, momentum=cfg.momentum, nesterov=cfg.momentum > 0, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(outer, lr=1.0, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True),
            ]

    def step(self, inputs: StepInputs) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = getattr(inputs, group["rate"])
                group["weight_decay"] = inputs.weight_decay if group["decays"] else 0.0
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        return {
            f"optimizer/{self.names[p]}/{key}": value
            for optimizer in self.all
            for p, entries in optimizer.state.items()
            for key, value in entries.items()
            if value is not None
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        owner = {self.names[p]: (optimizer, p) for optimizer in self.all for group in optimizer.param_groups for p in group["params"]}
        for full_name, value in tensors.items():
            _, name, key = full_name.split("/")
            optimizer, p = owner[name]
            # fused kernels want all of it beside the weights, the step count too; a copy, for these tensors are a mapped file
            optimizer.state[p][key] = value.to(p.device, copy=True)


class Average:
    """The weights that are scored: the trained ones, or their EMA or SWA where the config asks for one."""

    def __init__(self, cfg: TrainConfig, model: nn.Module) -> None:
        self.live = dict(model.named_parameters())
        self.on = bool(cfg.ema or cfg.swa)
        self.shadow = {name: p.detach().clone() for name, p in self.live.items()} if self.on else {}

    def update(self, inputs: StepInputs) -> None:
        if self.on:
            torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.live.values()], inputs.average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        for name, average in self.shadow.items():
            p = self.live[name]
            p.data, self.shadow[name] = average, p.data


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class State:
    """Everything a run carries from step to step, and so everything a checkpoint holds."""

    def __init__(self, cfg: TrainConfig, model: GPT) -> None:
        self.model = model
        self.optimizers = Optimizers(cfg, model)
        self.average = Average(cfg, model)
        self.step = 0  # steps done
        self.presented = 0  # tokens that went forward to be learnt from, R-Drop's second pass included
        self.seconds = 0.0  # of earlier sittings
        self.resumed = 0

    def tensors(self) -> dict[str, Tensor]:
        model = {f"model/{n}": p for n, p in self.model.named_parameters()}
        return model | self.optimizers.state() | {f"average/{n}": t for n, t in self.average.shadow.items()}

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[f"model/{name}"])
            for name, t in self.average.shadow.items():
                t.copy_(tensors[f"average/{name}"])
        self.optimizers.load({k: v for k, v in tensors.items() if k.startswith("optimizer/")})
        self.step, self.seconds, self.resumed = meta["step"], meta["seconds"], meta["resumed"] + 1
        self.presented = meta["presented"]


def train(cfg: TrainConfig, out: Path, *, fresh: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train a config to its end, from its last checkpoint if it has one, and give the summary."""
    with StopFlag() as stop:  # from the start: a signal while the data is prepared is obeyed before the first step
        return _train(cfg, Path(out), fresh, progress or make_progress(quiet=True), stop)


def _train(cfg: TrainConfig, out: Path, fresh: bool, progress: Progress, stop: StopFlag) -> dict[str, Any]:
    machine = Machine(cfg)
    if not machine.leads:
        progress = make_progress(quiet=True)
    check_writable(out)  # before the data is read, which may take a while
    corpus = load_corpus(cfg)
    with machine.leader_first():  # the others find its tokens in the cache
        data = prepare(cfg, corpus)
    plan = Plan(cfg, len(data.splits["train"]))
    check_spans(cfg, data)

    with machine.leader_first():  # the others see what it has left of an earlier run
        run = open_run(out, cfg, fresh) if machine.leads else RunDir(out / cfg.run_id)
    try:
        titles = {"fingerprints": corpus.fingerprints, "tokenizer": data.tokenizer.digest}
        check_same_data(run, titles)
        if summary := run.summary():
            return summary
        if machine.leads:
            # the config first: a folder without it, with anything else in it, is not taken for a run
            run.write("config.json", {"config": cfg.model_dump(), "digest": cfg.digest, "plan": plan.table(), **titles})
            write_text(run.path / "tokenizer.json", data.tokenizer.to_json())
        state = State(cfg, build(cfg, data.tokenizer.vocab_size).to(machine.device))
        env = {"machine_class": machine.facts, "versions": versions(), "evaluate_hash": scoring.evaluate_source_hash(), "command": sys.argv}
        metrics = resume(cfg, run, state, env, progress) if machine.leads else None
        if machine.world > 1:
            follow(cfg, run, state, machine)
        progress.start(cfg, plan.table(), run.metrics())
        started = time.perf_counter()
        try:
            loop(cfg, plan, data, machine, run, state, metrics, progress, stop)
        except BaseException as e:
            kind = {75: "interrupted", 3: "diverged"}.get(getattr(e, "exit_code", 1), "failed")
            if machine.leads:
                with suppress(MainrunError):  # `e` is what must be heard; a full disk is heard at the next write
                    why = str(e) or type(e).__name__
                    run.write("status.json", {"state": kind, "step": state.step, "steps": plan.steps, "why": why})
            raise
        finally:
            progress.close()
            if metrics:
                metrics.close()
        state.seconds += time.perf_counter() - started
        if not machine.leads:
            return {}
        with state.average.applied():
            summary = summarize(cfg, plan, corpus, data, run, state, env)
        run.write("summary.json", summary)
        run.write("status.json", {"state": "done", "step": state.step, "steps": plan.steps})
        return summary
    finally:
        run.release()


def loop(
    cfg: TrainConfig,
    plan: Plan,
    data: TokenData,
    machine: Machine,
    run: RunDir,
    state: State,
    metrics: Metrics | None,
    progress: Progress,
    stop: StopFlag,
) -> None:
    model = state.model
    runner: nn.Module = torch.compile(model) if cfg.compile else model  # type: ignore[assignment]
    if machine.world > 1:
        runner = nn.parallel.DistributedDataParallel(runner)
    batches = Batches(cfg, data.splits["train"])

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        if model.training:
            state.presented += args[0].numel() * machine.world

    runner.register_forward_pre_hook(count)  # the ledger counts what really goes forward, not what the config says
    started, before = time.perf_counter(), state.seconds
    last_saved = state.step

    def save() -> None:
        nonlocal last_saved
        if metrics is not None and state.step > last_saved:
            meta: dict[str, Any] = {"digest": cfg.digest, "machine_class": machine.facts, "metrics": metrics.mark()}
            meta |= {"resumed": state.resumed, "presented": state.presented, "seconds": before + time.perf_counter() - started}
            checkpoint.save(run.checkpoints, state.step, state.tensors(), meta)
        machine.any(False)  # none goes on, or away, before the leader has saved: torchrun ends all as soon as one is gone
        last_saved = state.step

    def write(row: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.append(row)

    while state.step < plan.steps:
        if machine.any(bool(stop.asked)):
            save()
            why = f"{stop.asked or 'another process stopped'} at step {state.step} of {plan.steps}"
            raise Interrupted(f"{why}; everything is saved, the same command goes on from here")
        clock = time.perf_counter()
        inputs, presented = plan.at(state.step), state.presented
        model.train()
        model.set_dropout(inputs)
        state.optimizers.zero_grad()
        x, y = (torch.from_numpy(a).to(machine.device) for a in batches.at(state.step, inputs.batch_size))
        pieces = inputs.grad_accum * machine.world  # micro-batch m of this process is piece m * world + rank
        total = torch.zeros((), device=machine.device)
        for micro in range(inputs.grad_accum):
            piece = micro * machine.world + machine.rank
            torch.manual_seed(mix(cfg.seed, "step", state.step, piece))
            last = micro == inputs.grad_accum - 1
            with nullcontext() if last or machine.world == 1 else runner.no_sync():  # type: ignore[operator]
                loss, plain = compute_loss(runner, x.chunk(pieces)[piece], y.chunk(pieces)[piece], inputs)
                (loss / inputs.grad_accum).backward()
            total += plain / inputs.grad_accum
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf))
        mean_loss = machine.mean(total)
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            state.presented = presented  # nothing was learnt from this step
            save()  # the weights before it are still good
            raise Diverged(
                f"loss {mean_loss} with gradient norm {norm} at step {state.step + 1} of {plan.steps}, lr {inputs.lr:g}; "
                "lower lr or lr_aux, or raise warmup_frac (the checkpoint before this step is kept)"
            )
        state.optimizers.step(inputs)
        state.average.update(inputs)
        state.step += 1
        tokens = state.step * cfg.batch_size * cfg.block_size
        if state.step % cfg.log_every == 0 or state.step == plan.steps:
            row = {"event": "step", "step": state.step, "tokens": tokens, "loss": mean_loss, "lr": inputs.lr, "grad_norm": norm}
            row["seconds"] = time.perf_counter() - clock
            write(row)
            progress.step(row | {"steps": plan.steps})
        if state.step in plan.eval_steps:
            found = list(score(cfg, data, state)) if machine.leads else []
            if machine.any(not all(math.isfinite(row["loss"]) for row in found)):
                why = f"the score at step {state.step} of {plan.steps} is no number after lr {inputs.lr:g} and gradient norm {norm:g}"
                raise Diverged(f"{why}; lower lr, lr_aux or weight_decay (the last checkpoint before it is kept)")
            for row in found:
                write(row)
                progress.eval(row | {"steps": plan.steps})
        if state.step % plan.checkpoint_every == 0 or state.step == plan.steps:
            save()


def score(cfg: TrainConfig, data: TokenData, state: State) -> Iterator[dict[str, Any]]:
    """The eval rows of the weights as they stand."""
    for split in ("val", "dev"):
        if split in data.splits:
            clock = time.perf_counter()
            size = {"chars": data.chars[split], "nbytes": data.bytes[split], "block_size": cfg.block_size}
            with state.average.applied():
                found = scoring.evaluate(state.model, data.splits[split], **size, geometry=cfg.geometry)
            yield {"event": "eval", "step": state.step, "split": split, **asdict(found), "seconds": time.perf_counter() - clock}


def check_spans(cfg: TrainConfig, data: TokenData) -> None:
    """Before step 0: a split that cannot be scored is found now, not an hour later."""
    for split in ("val", "dev"):
        if split in data.splits:
            try:
                scoring.official_spans(len(data.splits[split]), cfg.geometry)
            except ConfigError as e:
                raise ConfigError(f"the {split} split is too short: {e}") from None


def resume(cfg: TrainConfig, run: RunDir, state: State, env: dict[str, Any], progress: Progress) -> Metrics:
    """Bring state, metrics.jsonl and env.json to the newest usable checkpoint, or to an untouched start."""
    metrics = Metrics(run.path / "metrics.jsonl")

    def usable(meta: dict[str, Any]) -> str | None:
        if meta["digest"] != cfg.digest:
            return "it belongs to another config"
        if not metrics.rewind(meta["metrics"]):  # hours of training are not thrown away over a log: whoever changed it decides
            raise RunError(f"{metrics.path} is not the one its checkpoints were saved with; restore it, or use --fresh to start over")
        return None

    before = checkpoint.steps(run.checkpoints)
    found = checkpoint.load_newest(run.checkpoints, usable, progress.note)
    earlier = run.env() if found else {}
    if found:
        if "evaluate_hash" not in earlier:
            raise RunError(f"{run.path}/env.json, which says how the run began, is lost; restore it, or use --fresh to start over")
        state.load(*found)
        env["evaluate_hash"] = earlier["evaluate_hash"]  # the first start's: an edit between two sittings must show
        progress.note(f"{run.path} goes on after step {state.step}")
        for what, key in (("machine class", "machine_classes"), ("mainrun or of a library", "all_versions")):
            now = env["machine_class" if key == "machine_classes" else "versions"]
            if earlier.get(key, [now])[-1] != now:
                progress.note(f"this is another {what} than the one before: from here on the bits are not those of an undisturbed run")
    else:
        if before:
            progress.note(f"{run.path} has no usable checkpoint: it starts over at step 0")
        metrics.rewind({"bytes": 0, "sha256": hashlib.sha256().hexdigest()})
    for key, now in (("machine_classes", env["machine_class"]), ("all_versions", env["versions"])):
        seen = earlier.get(key, [])
        env[key] = [entry for entry in seen if entry != now] + [now]
    run.write("env.json", env)
    run.write("status.json", {"state": "running", "step": state.step, "pid": os.getpid(), "resumed": state.resumed})
    return metrics


def follow(cfg: TrainConfig, run: RunDir, state: State, machine: Machine) -> None:
    """Every process starts where the leader does (it chose the checkpoint, the others read the same one)."""
    step = torch.tensor(state.step, device=machine.device)
    dist.broadcast(step, src=0)
    if step and not machine.leads:
        found = checkpoint.load_newest(
            run.checkpoints, lambda meta: "" if meta["step"] == step else "the leader chose another", lambda _: None
        )
        if found is None:
            what = f"process {machine.rank} cannot read the checkpoint of step {int(step)} in {run.checkpoints}"
            raise RunError(f"{what}; --out must be a folder that all processes share")
        state.load(*found)


def summarize(
    cfg: TrainConfig, plan: Plan, corpus: Corpus, data: TokenData, run: RunDir, state: State, env: dict[str, Any]
) -> dict[str, Any]:
    """summary.json: the last and the best score, what they cost, what they stand on, and the guards they passed."""
    rows = run.metrics()
    evals = [r for r in rows if r["event"] == "eval"]
    names = ("step", "split", "official", "full", "loss", "bits_per_byte", "coverage", "tokens")
    scores = {
        split: {"last": {k: mine[-1][k] for k in names}, "best": {k: min(mine, key=lambda r: r["full"])[k] for k in names}}
        for split in ("val", "dev")
        if (mine := [r for r in evals if r["split"] == split])
    }
    tokens = plan.steps * cfg.batch_size * cfg.block_size
    ledger = {
        "train_tokens_per_epoch": plan.train_tokens,
        "presentations_per_token": state.presented / plan.train_tokens,
        "forward_passes": cfg.passes,
        "ensemble_members": 1,
    }
    summary = {
        "run": cfg.run_id,
        "preset": cfg.preset,
        "status": "done",
        "steps": plan.steps,
        **scores["val"],
        "scores": scores,
        "params": sum(p.numel() for p in state.model.parameters()),
        "tokens": tokens,
        "presentations": ledger,
        "flops": state.presented * flops_per_token(cfg, state.model),
        "seconds": state.seconds,
        "tokens_per_s": tokens / max(state.seconds, 1e-9),
        "fingerprints": corpus.fingerprints,
        "origin": corpus.origin,
        "geometry": list(cfg.geometry),
        "tokenizer": data.tokenizer.digest,
        "machine_class": env["machine_class"],
        "machine_classes": env["machine_classes"],
        "versions": env["versions"],
        "all_versions": env["all_versions"],
        "weights": checkpoint.sha256_tensors(iter(state.model.named_parameters())),
        "resumed": state.resumed,
    }
    evidence = Evidence(
        cfg=cfg, corpus=corpus, data=data, model=state.model, evals=evals, ledger=ledger, summary=summary,
        initial_weights="random", evaluate_hash=env["evaluate_hash"],
    )  # fmt: skip
    return summary | {"guards": [asdict(g) for g in guards(evidence)]}


def flops_per_token(cfg: TrainConfig, model: nn.Module) -> int:
    """Forward and backward: 6 a weight that multiplies, and the two products of attention over the whole block."""
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith(("embed", "positions")))
    head = model.embed.weight.numel() if cfg.tie_head else 0  # type: ignore[union-attr, operator]
    return 6 * (weights + int(head)) + 12 * cfg.n_layer * cfg.d_model * cfg.block_size


def main() -> int:
    parser = argparse.ArgumentParser(description="Train one config (the same as `mainrun train`, for torchrun too).")
    parser.add_argument("--preset", default="optimized")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    plain_warnings()
    code = 0

    def say(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":  # of two processes that fail for one reason, one says so
            print(text, file=sys.stderr)

    try:
        for cfg in load(args.preset, args.set):
            try:
                summary = train(cfg, args.out, fresh=args.fresh, progress=make_progress(quiet=False))
            except Diverged as e:  # the other steps of a ladder are still worth training
                say(f"diverged: {cfg.run_id}: {e}")
                code = e.exit_code
                continue
            if summary:
                print(f"{summary['run']}: full {summary['last']['full']:.4f}, official {summary['last']['official']:.4f}")
    except MainrunError as e:
        say(f"{'interrupted' if isinstance(e, Interrupted) else 'error'}: {e}")
        code = e.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
