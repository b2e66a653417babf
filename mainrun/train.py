"""The trainer, whole, in one file: model, loss, optimiser, loop. Read it top to bottom.

    mainrun train --preset baseline
    mainrun train --preset optimized --set corpus=file:titles.txt --set num_titles=20000
    torchrun --nproc-per-node 2 -m mainrun train --preset optimized

One config gives one sequence of bits on one machine class. That holds because nothing in here remembers: the batch,
the dropout masks and the learning rate of a step are functions of (config, step), so a run that was killed goes on
from its checkpoint as if nothing had been. Scores live in scoring.py, the schedule's arithmetic in config.Plan.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.average import Average
from mainrun.core.device import Machine
from mainrun.core.dropout import Masks
from mainrun.core.kernels import attend, cross_entropy, gelu, linear, rms_norm
from mainrun.core.optimizers import Muon
from mainrun.data.batches import Batches
from mainrun.data.sources import load_corpus
from mainrun.data.token_cache import TokenData, prepare
from mainrun.data.tokenizer import EOS
from mainrun.errors import Diverged, Interrupted, MainrunError, RunError
from mainrun.growth.controller import Growth, rebuilt
from mainrun.growth.moments import PLAIN, Mark
from mainrun.plan.ops import ARCHITECTURE
from mainrun.plan.plan import Plan, StepInputs
from mainrun.run.progress import QUIET, Progress
from mainrun.run.session import check_spans, ending, environment, finish, follow, resume, score, summarize
from mainrun.run.sharing import Reuse
from mainrun.run.stop import StopFlag
from mainrun.store import checkpoint
from mainrun.store.nodes import Store
from mainrun.store.rundir import Metrics, RunDir, check_same_data, check_writable, open_run, write_text

# ---------------------------------------------------------------------------------------------------------------------
# The model. Shapes: B rows, T tokens, D width, H heads, K heads of keys and values, h width of a head, V vocabulary.


Rope = tuple[Tensor, Tensor] | None


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


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


def make_norm(cfg: TrainConfig) -> nn.Module:
    return RMSNorm(cfg.d_model) if cfg.norm == "rmsnorm" else nn.LayerNorm(cfg.d_model, bias=cfg.bias)


def cast(x: Tensor) -> Tensor:
    """To what matrix products are computed in: once, where several would each do it."""
    return x.bfloat16() if torch.is_autocast_enabled(x.device.type) else x


class Linear(nn.Linear):
    def table(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def drops(cfg: TrainConfig, inputs: StepInputs, rows: int, attention: str) -> list[tuple[int, float]]:
    """Of each place that drops, in one pass of that many rows: how many numbers, and the share that is dropped."""
    branch = (rows * cfg.block_size * cfg.d_model, inputs.resid_dropout)
    weights = (rows * cfg.n_head * cfg.block_size**2 if attention == "plain" else 0, inputs.attn_dropout)
    places = [(branch[0], inputs.dropout), *[weights, branch, branch] * cfg.n_layer]
    return [(size, p) for size, p in places if size and p]


class Attention(nn.Module):
    def __init__(self, cfg: TrainConfig, first: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = cfg.n_head, cfg.kv_heads, cfg.head_width
        qkv_bias = cfg.bias if cfg.qkv_bias is None else cfg.qkv_bias
        self.q = Linear(cfg.d_model, cfg.n_head * cfg.head_width, bias=qkv_bias)
        self.k = Linear(cfg.d_model, cfg.kv_heads * cfg.head_width, bias=qkv_bias)
        self.v = Linear(cfg.d_model, cfg.kv_heads * cfg.head_width, bias=qkv_bias)
        self.o = Linear(cfg.n_head * cfg.head_width, cfg.d_model, bias=cfg.bias)
        self.q_norm, self.k_norm = (RMSNorm(cfg.head_width) if cfg.qk_norm else nn.Identity() for _ in "qk")
        self.gate = Linear(cfg.d_model, cfg.n_head, bias=False) if cfg.attn_gate else None
        self.first_share = nn.Parameter(torch.tensor(0.5)) if cfg.value_residual and not first else None
        self.fused, self.dropout = False, 0.0

    def forward(
        self, x: Tensor, bias: Tensor | None, rope: Rope, v_first: Tensor | None, masks: Masks | None
    ) -> tuple[Tensor, Tensor]:
        B, T, _ = x.shape
        x, parts = cast(x), (self.q, self.k, self.v)
        bias3 = None if self.q.bias is None else torch.cat([part.bias for part in parts])
        y = linear(
            x, torch.cat([part.table() for part in parts]), bias3
        )  # one product for the three: its gradient is one, too
        q, k, v = (
            t.unflatten(-1, (-1, self.width)).transpose(1, 2)
            for t in y.split([part.out_features for part in parts], dim=-1)
        )
        q, k = self.q_norm(q), self.k_norm(k)  # (B, H, T, h), (B, K, T, h)
        if self.first_share is not None and v_first is not None:
            v = torch.lerp(v, v_first, self.first_share.to(v.dtype))
        if rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        values = v
        if self.kv_heads != self.heads:
            k, values = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        if self.fused:
            p = self.dropout if self.training else 0.0  # it draws for itself
            y = F.scaled_dot_product_attention(
                q.to(v.dtype), k.to(v.dtype), values, bias, dropout_p=p, is_causal=bias is None
            )
        else:
            mask = masks.take((B, self.heads, T, T)) if masks and self.dropout else None
            with torch.autocast(
                x.device.type, enabled=False
            ):  # which would copy the scores to float32 and back
                assert bias is not None
                y = attend(q * self.width**-0.5, k, values, bias, mask, self.dropout)
        if self.gate is not None:
            y = y * (2 * torch.sigmoid(self.gate(x))).transpose(1, 2).unsqueeze(-1)
        return self.o(y.transpose(1, 2).reshape(B, T, -1)), v


class MLP(nn.Module):
    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__()
        self.kind = cfg.mlp
        self.gate = Linear(cfg.d_model, cfg.ff_width, bias=cfg.bias) if cfg.mlp == "swiglu" else None
        self.up = Linear(cfg.d_model, cfg.ff_width, bias=cfg.bias)
        self.down = Linear(cfg.ff_width, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "gelu":
            return self.down(gelu(self.up(x)))
        x = F.relu(self.up(x))
        return self.down(x * x)  # square() would be computed in float32


def make_mlp(cfg: TrainConfig) -> nn.Module:
    if not cfg.experts:
        return MLP(cfg)
    from mainrun.core.moe import MoE

    return MoE(cfg, lambda: MLP(cfg))


class Block(nn.Module):
    def __init__(self, cfg: TrainConfig, first: bool) -> None:
        super().__init__()
        self.attn_norm, self.attn = make_norm(cfg), Attention(cfg, first)
        self.mlp_norm, self.mlp = make_norm(cfg), make_mlp(cfg)
        scale = cfg.layer_scale
        self.attn_scale = nn.Parameter(torch.full((cfg.d_model,), scale)) if scale else None
        self.mlp_scale = nn.Parameter(torch.full((cfg.d_model,), scale)) if scale else None
        self.dropout = 0.0

    def branch(self, y: Tensor, scale: Tensor | None, masks: Masks | None) -> Tensor:
        y = y if scale is None else y * scale
        return masks.drop(y, self.dropout) if masks else y

    def forward(
        self, x: Tensor, bias: Tensor | None, rope: Rope, v_first: Tensor | None, masks: Masks | None
    ) -> tuple[Tensor, Tensor]:
        y, v = self.attn(self.attn_norm(x), bias, rope, v_first, masks)
        x = x + self.branch(y, self.attn_scale, masks)
        return x + self.branch(self.mlp(self.mlp_norm(x)), self.mlp_scale, masks), v


class GPT(nn.Module):
    causal: Tensor
    blocks: list[Block]

    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        vocab_size += cfg.unused_ids
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.positions = nn.Embedding(cfg.block_size, cfg.d_model) if cfg.position == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg, first=i == 0) for i in range(cfg.n_layer))  # type: ignore[assignment]
        self.norm = make_norm(cfg)
        self.head = None if cfg.tie_head else nn.Linear(cfg.d_model, vocab_size, bias=False)
        self.dropout = 0.0
        self.register_buffer(
            "causal", torch.ones(cfg.block_size, cfg.block_size, dtype=torch.bool).tril(), persistent=False
        )
        if cfg.position == "rope":
            cos, sin = rope_table(cfg.block_size, cfg.head_width, cfg.rope_theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        if cfg.attn_lora_rank or cfg.embed_lora_rank:
            from mainrun.core.lora import add_low_rank

            add_low_rank(self, cfg)
        self.init_weights()
        for i in cfg.frozen:
            self.blocks[i].requires_grad_(False)

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

    def set_up(self, inputs: StepInputs, attention: str) -> None:
        """How the passes of a step run; a score takes no noise, so it drops nothing."""
        self.dropout = inputs.dropout
        for block in self.blocks:
            block.dropout, block.attn.dropout, block.attn.fused = (
                inputs.resid_dropout,
                inputs.attn_dropout,
                attention == "sdpa",
            )

    def attention_bias(self, idx: Tensor) -> Tensor | None:
        """0 where a token may look, -inf where not, broadcast to (B, H, T, T). None: the fused kernel knows what causal means."""
        T = idx.size(1)
        seen = self.causal[:T, :T]
        if (
            self.cfg.title_mask
        ):  # <eos> opens the title it stands before: it is what its first word is told from
            title = (idx == EOS).cumsum(1)  # (B, T)
            seen = (seen & (title.unsqueeze(2) == title.unsqueeze(1))).unsqueeze(1)  # (B, 1, T, T)
        elif self.blocks[0].attn.fused:
            return None
        kind = torch.bfloat16 if torch.is_autocast_enabled(idx.device.type) else self.embed.weight.dtype
        return torch.zeros_like(seen, dtype=kind).masked_fill_(~seen, -torch.inf)

    def table(self) -> Tensor:
        return self.embed.table() if self.cfg.embed_lora_rank else self.embed.weight  # type: ignore[operator]

    def forward(self, idx: Tensor, pool: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each. The matrix products run in the config's dtype, wherever this is called from.

        pool: dropout's masks; without them nothing is dropped.
        """
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            T = idx.size(1)
            bias = self.attention_bias(idx)
            x = self.embed(idx)  # (B, T, D)
            if self.positions is not None:
                x = x + self.positions.weight[:T]
            masks = None if pool is None else Masks(pool)
            x = masks.drop(x, self.dropout) if masks else x
            rope = (self.cos, self.sin) if self.cfg.position == "rope" else None
            v_first = None
            for block in self.blocks:
                x, v = block(x, bias, rope, v_first, masks)
                v_first = v if v_first is None and self.cfg.value_residual else v_first
            logits = linear(self.norm(x), self.table() if self.head is None else self.head.weight)
            logits = self.cfg.softcap * torch.tanh(logits / self.cfg.softcap) if self.cfg.softcap else logits
            if self.cfg.unused_ids:
                logits[..., -self.cfg.unused_ids :] = -torch.inf
            return logits


def build(cfg: TrainConfig, vocab_size: int) -> GPT:
    """The model of a config at step 0: the seed decides every weight."""
    torch.manual_seed(mix(cfg.seed, "weights"))
    return GPT(cfg, vocab_size)


def mix(*parts: object) -> int:
    """A seed from anything: what is random at a step depends on its place in the run, never on what came before."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def compute_loss(
    model: nn.Module, x: Tensor, y: Tensor, inputs: StepInputs, pool: Tensor | None, native: bool = False
) -> tuple[Tensor, Tensor]:
    """What is descended, and the plain cross entropy in it (nats per token), which is what is logged."""
    if not inputs.rdrop:
        return cross_entropy(model(x, pool).flatten(0, 1), y.flatten(), inputs.label_smoothing, native)
    # R-Drop: the same rows under two dropout masks; both must predict the target, and agree with each other
    logp = F.log_softmax(model(torch.cat([x, x]), pool).float().flatten(0, 1), dim=-1)  # (2BT, V)
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
    """One optimiser, or Muon beside AdamW; parameters in groups by what they are and how they learn; state by the parameter's name."""

    def __init__(
        self, cfg: TrainConfig, model: nn.Module, marks: Mapping[str, Mark] = MappingProxyType({})
    ) -> None:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names: dict[Tensor, str] = {p: n for n, p in named.items()}
        self.marks = dict(marks)
        # a router's gradient lacks one direction, what all its scores share: Muon would fill it with noise of full size
        inside = {n for n in named if n.startswith("blocks.") and ".router." not in n}
        matrices = [p for n, p in named.items() if n in inside and p.ndim == 2]
        tables = [p for n, p in named.items() if n not in inside and p.ndim == 2]
        vectors = [p for p in named.values() if p.ndim < 2]

        def groups(params: Iterable[Tensor], rate: str, decays: bool) -> list[dict[str, Any]]:
            """One, where all of them learn alike."""
            by_mark: dict[Mark, list[Tensor]] = {}
            for p in params:
                by_mark.setdefault(marks.get(self.names[p], PLAIN), []).append(p)
            return [
                {"params": held, "rate": rate, "decays": decays, "mark": m, "eps": cfg.eps * m.eps}
                for m, held in by_mark.items()
            ]

        inner, outer = (
            groups(matrices, "lr", True),
            groups(tables, "lr_aux", True) + groups(vectors, "lr_aux", False),
        )
        self.all: list[torch.optim.Optimizer]
        if cfg.optimizer == "sgd":
            self.all = [
                torch.optim.SGD(
                    inner + outer, lr=1.0, momentum=cfg.momentum, nesterov=cfg.momentum > 0, fused=True
                )
            ]
        elif cfg.optimizer == "adamw":
            self.all = [torch.optim.AdamW(inner + outer, lr=1.0, betas=(cfg.beta1, cfg.beta2), fused=True)]
        else:
            beside = torch.optim.AdamW(outer, lr=1.0, betas=(cfg.beta1, cfg.beta2), fused=True)
            self.all = [*([Muon(inner, cfg.momentum)] if inner else []), beside]
        self.groups = [group for optimizer in self.all for group in optimizer.param_groups]

    def set_rates(self, inputs: StepInputs, step: int) -> None:
        for group in self.groups:
            rate, mark = getattr(inputs, group["rate"]), group["mark"]
            if mark != PLAIN:
                rate *= mark.rate(step)
            if group["params"][0].is_cuda:  # where a recorded step finds it
                group["lr"] = (
                    group["lr"].fill_(rate)
                    if isinstance(group["lr"], Tensor)
                    else torch.tensor(rate, device="cuda")
                )
            else:
                group["lr"] = rate
            group["weight_decay"] = inputs.weight_decay * mark.weight_decay if group["decays"] else 0.0

    def apply(self) -> None:
        for group in self.groups:
            group["capturable"] = group["params"][0].is_cuda and torch.cuda.is_current_stream_capturing()
        for optimizer in self.all:
            optimizer.step()

    def step(self, inputs: StepInputs, step: int = 0) -> None:
        self.set_rates(inputs, step)
        self.apply()

    def state(self) -> dict[str, Tensor]:
        return {
            f"optimizer/{self.names[p]}/{key}": value
            for optimizer in self.all
            for p, entries in optimizer.state.items()
            for key, value in entries.items()
            if value is not None
        }

    def load(self, tensors: dict[str, Tensor], copy: bool = True) -> None:
        """copy: not the tensors themselves, which may be a mapped file."""
        owner = {
            self.names[p]: (optimizer, p)
            for optimizer in self.all
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for full_name, value in tensors.items():
            _, name, key = full_name.split("/")
            optimizer, p = owner[name]
            optimizer.state[p][key] = value.to(
                p.device, copy=copy
            )  # fused kernels want all of it there, the step count too
        for p in (
            self.names if tensors and self.all[0].defaults.get("nesterov") else ()
        ):  # fused SGD takes momentum for all or for none
            self.all[0].state[p].setdefault(
                "momentum_buffer", torch.zeros_like(p)
            )  # new ones begin as all did at the first step


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class State:
    """Everything a run carries from step to step, and so everything a checkpoint holds."""

    def __init__(self, cfg: TrainConfig, model: GPT) -> None:
        self.step = self.saved = 0  # steps done; of them in the run's own checkpoint
        self.presented = 0  # tokens that went forward to be learnt from, R-Drop's second pass included
        self.resumed = 0
        self.ledger = {
            "reused": 0,
            "reused_tokens": 0,
            "wasted": 0,
        }  # steps taken from the store; steps trained, and lost again
        self.spent: dict[str, float] = {}  # seconds, by what they went into
        self.grown: dict[
            str, Any
        ] = {}  # of a run with a schedule: what growth/live.py needs to go on from here
        self.become(cfg, model, Optimizers(cfg, model))

    def become(self, cfg: TrainConfig, model: GPT, optimizers: Optimizers) -> None:
        self.cfg, self.model, self.optimizers, self.average = cfg, model, optimizers, Average(cfg, model)

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - started

    def tensors(self) -> dict[str, Tensor]:
        model = {f"model/{n}": p for n, p in self.model.named_parameters()}
        average = self.average.shadow.items() if self.average.apart else ()
        return model | self.optimizers.state() | {f"average/{n}": t for n, t in average}

    def load(
        self, tensors: dict[str, Tensor], step: int, presented: int, grown: dict[str, Any] | None = None
    ) -> None:
        if grown:
            self.become(*rebuilt(self, grown))
        self.grown = grown or {}
        if more := {n for n in tensors if n.startswith("model/")} - {
            f"model/{n}" for n, _ in self.model.named_parameters()
        }:
            raise RunError(
                f"the state holds {min(more)}, the model does not; build the model as it was when the state was saved"
            )
        self.step, self.presented = step, presented
        self.average.apart = any(name.startswith("average/") for name in tensors)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[f"model/{name}"])
            for name, t in self.average.shadow.items():
                t.copy_(tensors[f"{'average' if self.average.apart else 'model'}/{name}"])
        self.optimizers.load({k: v for k, v in tensors.items() if k.startswith("optimizer/")})


def train(
    cfg: TrainConfig,
    out: Path,
    *,
    fresh: bool = False,
    progress: Progress = QUIET,
    store: Store | None = None,
    keep: Iterable[int] = (),
    until: int = 0,
) -> dict[str, Any]:
    """Train a config to its end, from its last checkpoint or from what the store has of it, and give the summary.

    keep: steps after which the store keeps the state, besides those that the config suggests. until: stop after that step.
    """
    with ExitStack() as held:
        stop = held.enter_context(
            StopFlag()
        )  # from the start: a signal while data is prepared is obeyed before the first step
        started = time.perf_counter()
        machine = Machine(cfg)
        progress = progress if machine.leads else QUIET
        check_writable(Path(out))  # before the data is read, which may take a while
        corpus = load_corpus(cfg)
        with machine.leader_first():  # the others find its tokens in the cache
            data = prepare(cfg, corpus)
        read = time.perf_counter() - started
        plan = Plan(cfg, len(data.splits["train"]))
        check_spans(cfg, data)
        machine.settle(cfg, plan)

        with machine.leader_first():  # the others see what it has left of an earlier run
            run = open_run(Path(out), cfg, fresh) if machine.leads else RunDir(Path(out) / cfg.run_id)
        held.callback(run.release)
        titles = {"fingerprints": corpus.fingerprints, "tokenizer": data.tokenizer.digest}
        check_same_data(run, titles)
        if summary := run.summary():
            return summary
        if machine.leads:
            # the config first: a folder without it, with anything else in it, is not taken for a run
            run.write(
                "config.json",
                {"config": cfg.model_dump(), "digest": cfg.digest, "plan": plan.table(), **titles},
            )
            write_text(run.path / "tokenizer.json", data.tokenizer.to_json())
        state = State(cfg, build(cfg, data.tokenizer.vocab_size).to(machine.device))
        state.model.set_up(plan.at(0), machine.attention)  # a score may come before a step
        state.spent["data"] = read
        env = environment(machine)
        growth = Growth(
            cfg, plan, machine, state, run.log("growth.jsonl") if machine.leads and cfg.growth.ops else None
        )
        reuse = (
            Reuse(
                store, cfg, plan, machine, corpus.fingerprints, data.digest, progress.note, keep, until, fresh
            )
            if store
            else None
        )
        if reuse:
            growth.also, reuse.journal, reuse.figures = reuse.rows_append, growth.journal, growth.figures
        metrics = resume(cfg, run, state, env, progress, reuse, growth) if machine.leads else None
        if machine.world > 1:
            follow(cfg, run, state, machine, growth)
        progress.start(cfg, growth.plan.table(), run.metrics())
        if machine.why:
            progress.note(machine.why)
        earlier = sum(state.spent.values()) - read
        with ending(machine, run, growth, [reuse, progress, metrics, growth]):
            loop(cfg, growth, data, machine, run, state, metrics, progress, stop, reuse, until)
        if not machine.leads:
            return {}
        plan = growth.plan
        with state.average.applied(), state.clock("guards"):
            summary = summarize(cfg, plan, corpus, data, run, state, env)
        state.spent["overhead"] = (
            state.spent.get("overhead", 0.0)
            + earlier
            + time.perf_counter()
            - started
            - sum(state.spent.values())
        )
        return finish(run, state, plan, summary)


def make_runner(machine: Machine, model: GPT) -> nn.Module:
    """The model as the steps call it, compiled for the shape at hand, whatever this process saw before. Scores are the model's own."""
    runner: nn.Module = torch.compile(model, dynamic=False) if machine.compile else model  # type: ignore[assignment]
    return nn.parallel.DistributedDataParallel(runner) if machine.world > 1 else runner


class Stepper:
    """What a step does: its gradients, then what they do to the weights. Each is recorded on a GPU, so all that changes from step to
    step without a change of `inputs` (the batch, the seeds, the rates) reaches them through tensors and generators."""

    def __init__(self, cfg: TrainConfig, machine: Machine, state: State) -> None:
        self.cfg, self.machine, self.state, self.model = cfg, machine, state, state.model
        self.runner, model = make_runner(machine, state.model), state.model

        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if model.training:
                state.presented += args[0].numel() * machine.world

        # the ledger counts what really goes forward; nothing refers back to here, or DDP would outlive its process group
        self.counts = self.runner.register_forward_pre_hook(count)
        self.learn, self.move = machine.recorded(cfg), machine.recorded(cfg)
        self.goes = 0  # tokens of a step that is recorded: a replay calls no model

    def gradients(self, x: Tensor, y: Tensor, inputs: StepInputs, step: int) -> Tensor:
        """A step as far as the clipped gradients: its loss and their norm, still on the device."""
        machine, before = self.machine, self.state.presented
        # micro-batch m of this process is piece m * world + rank
        machine.seed(
            [
                mix(self.cfg.seed, "step", step, m * machine.world + machine.rank)
                for m in range(inputs.grad_accum)
            ]
        )
        self.inputs = inputs._replace(lr=0.0, lr_aux=0.0, weight_decay=0.0, average=0.0)
        numbers = self.learn((self.inputs, x.shape), self._learn, x, y)
        assert numbers is not None
        self.goes = self.state.presented - before or self.goes
        self.state.presented = before + self.goes
        return numbers

    def _learn(self, x: Tensor, y: Tensor) -> Tensor:
        cfg, machine, inputs, model, runner = self.cfg, self.machine, self.inputs, self.model, self.runner
        model.train()
        model.set_up(inputs, machine.attention)
        model.zero_grad(set_to_none=True)
        pieces = inputs.grad_accum * machine.world
        places = drops(cfg, inputs, cfg.passes * len(x) // pieces, machine.attention)
        total = torch.zeros((), device=machine.device)
        for micro in range(inputs.grad_accum):
            piece = micro * machine.world + machine.rank
            pool = machine.masks(places, micro)
            last = micro == inputs.grad_accum - 1
            with nullcontext() if last or machine.world == 1 else runner.no_sync():  # type: ignore[operator]
                loss, plain = compute_loss(
                    runner, x.chunk(pieces)[piece], y.chunk(pieces)[piece], inputs, pool, machine.native
                )
                (loss / inputs.grad_accum).backward()
            total += plain / inputs.grad_accum
            del loss, pool  # what they hold is not needed beside the next micro-batch
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        return torch.stack((machine.mean(total), norm))

    def update(self, inputs: StepInputs) -> None:
        self.state.optimizers.set_rates(inputs, self.state.step)
        self.move.on = self.learn.graph is not None  # before, the gradients lie elsewhere at each step
        self.move((inputs.weight_decay, self.learn.graph), self.state.optimizers.apply)
        self.state.average.update(inputs)

    def forget(self, model: bool = False) -> None:
        """The state was loaded anew; or, with its model, will be another."""
        self.learn.forget()
        self.move.forget()
        if model:
            self.counts.remove()
            self.model = self.runner = None  # type: ignore[assignment]


def loop(
    cfg: TrainConfig, growth: Growth, data: TokenData, machine: Machine, run: RunDir, state: State, metrics: Metrics | None,
    progress: Progress, stop: StopFlag, reuse: Reuse | None, until: int,
) -> None:  # fmt: skip
    stepper, warm = Stepper(state.cfg, machine, state), False
    batches = Batches(cfg, data.splits["train"])

    def renew() -> None:
        """The state was loaded, or grown."""
        nonlocal stepper, warm
        stepper.forget()
        if stepper.model is not state.model:
            stepper, warm = Stepper(state.cfg, machine, state), False

    def save() -> None:
        if metrics is not None and state.step > state.saved:
            with state.clock("checkpoints"):
                meta: dict[str, Any] = {
                    "digest": cfg.digest,
                    "machine_class": machine.facts,
                    "metrics": metrics.mark(),
                }
                meta |= {"resumed": state.resumed, "presented": state.presented, "spent": state.spent}
                meta |= {"store": reuse.meta(state.step) if reuse else None, "ledger": state.ledger}
                meta |= {"growth": state.grown, "journal": growth.journal.mark() if growth.journal else None}
                checkpoint.save(run.checkpoints, state.step, state.tensors(), meta, run.check)
        machine.any(
            False
        )  # none goes on, or away, before the leader has saved: torchrun ends all as soon as one is gone
        state.saved = state.step

    def write(row: dict[str, Any], logged: bool = True) -> None:
        if reuse:
            reuse.rows.append(row)
        if metrics is not None and logged:
            metrics.append(row)

    unread: list[
        tuple[dict[str, Any], Tensor]
    ] = []  # steps whose numbers are on the device: to read one is to wait for it
    read: list[dict[str, Any]] = []

    def fetch() -> None:
        """Read them, and end the run if one is no number. Read at each step (on a CPU), that one has not reached the weights yet."""
        numbers = torch.stack([found for _, found in unread]).tolist() if unread else []
        for (row, _), (loss, norm) in zip(unread, numbers, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                report(time.perf_counter() - clock)
                kept = "the last checkpoint before it is kept"
                if row["step"] == state.step + 1:
                    state.presented -= (
                        growth.plan.segment_at(state.step).span * cfg.passes
                    )  # nothing was learnt from this step
                    save()
                    kept = "the checkpoint before this step is kept"
                raise Diverged(
                    f"loss {loss} with gradient norm {norm} at step {row['step']} of {growth.plan.steps}, lr {row['lr']:g}; "
                    f"lower lr or lr_aux, or raise warmup_frac ({kept})"
                )
            read.append(row | {"loss": loss, "grad_norm": norm})
        unread.clear()

    def report(seconds: float) -> None:
        for row in read:
            row["seconds"] = seconds / len(read)
            write(row, logged := row["step"] % cfg.log_every == 0 or row["step"] == growth.plan.steps)
            if logged:
                progress.step(row | {"steps": growth.plan.steps})
        read.clear()

    def scores() -> list[dict[str, Any]]:
        with state.clock("evaluation"):
            return (
                [row | growth.figures(state.step) for row in score(cfg, data, state)] if machine.leads else []
            )

    def evaluate(lr: float) -> None:
        found = scores()
        if machine.any(not all(math.isfinite(row["loss"]) for row in found)):
            why = f"the score at step {state.step} of {growth.plan.steps} is no number after lr {lr:g}"
            raise Diverged(f"{why}; lower lr, lr_aux or weight_decay (the last checkpoint before it is kept)")
        for row in found:
            write(row)
            progress.eval(row | {"steps": growth.plan.steps})

    def share() -> None:
        """Leave the state for others, go on from what others have left further on, and settle what the scores so far decide."""
        again = True
        while again:
            again = False
            if reuse:
                reuse.publish(state)
                step, unscored = state.step, reuse.advance(state, metrics, stop)
                if moved := state.step != step:
                    growth.restored()
                    renew()
                if unscored:
                    evaluate(growth.plan.at(state.step - 1).lr)
                again = unscored or (moved and growth.plan.undecided is not None)
            growth.heard(run.metrics() if metrics is not None and cfg.growth.ops else [])
            if growth.decide():
                again = reuse is not None
                if reuse:
                    reuse.follow(growth.plan)

    share()
    clock = time.perf_counter()
    while state.step < (plan := growth.plan).steps:
        wanted = until and state.step >= until
        if wanted or (
            (machine.world == 1 or state.step % machine.lag == 0) and machine.any(bool(stop.asked))
        ):
            fetch()
            report(time.perf_counter() - clock)
            save()
            why = f"{stop.asked or ('stopped' if wanted else 'another process stopped')} at step {state.step} of {plan.steps}"
            raise Interrupted(f"{why}; everything is saved, the same command goes on from here")
        if op := growth.waits:
            stepper.forget(model=op.name in ARCHITECTURE)  # two models are enough
            try:
                growth.act(scores)
            except MainrunError:
                save()
                raise
            renew()
            if reuse:
                reuse.follow(growth.plan)
            continue
        inputs, done = plan.at(state.step), state.step + 1
        evaluates = done in plan.eval_steps
        saves = done % plan.checkpoint_every == 0 or done == plan.steps
        keeps = reuse is not None and reuse.keeps(done)
        with (
            state.clock("steps" if warm or not machine.compile else "compile"),
            machine.compiling(),
        ):  # at the first step
            x, y = (machine.put(a) for a in batches.at(state.step, plan.segment_at(state.step)))
            numbers = stepper.gradients(x, y, inputs, state.step)
            unread.append(
                ({"event": "step", "step": done, "tokens": plan.tokens(done), "lr": inputs.lr}, numbers)
            )
            if len(unread) == machine.lag or evaluates or keeps or saves:
                fetch()
            stepper.update(inputs)
        state.step, warm = done, True
        if read:
            report(time.perf_counter() - clock)
        for warning in growth.look_back():
            progress.note(warning)
        if evaluates:
            evaluate(inputs.lr)
        if keeps or evaluates:
            share()
        if saves:
            save()
        if not unread:
            clock = time.perf_counter()
    save()
