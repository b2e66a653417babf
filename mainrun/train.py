"""The trainer in one file: the model, the loss, the training step and the training loop.

The model uses attention and other layers from `mainrun/core`.

    python -m mainrun.train --preset demo:optimized    # without checkpoints, store and growth
    mainrun train --preset optimized                   # with checkpoints, store and growth
    torchrun --nproc-per-node 2 -m mainrun train --preset optimized

On one class of machines, the same config always produces the same weights, bit for bit. The batch, the
dropout masks and the learning rates of a step depend only on the config, the step number and the growth
operations so far. A checkpoint therefore needs no random state, and `mainrun train` continues from a
checkpoint as if the run had never stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mainrun.core.frozen_torch  # noqa: F401  imported first, because it speeds up the imports below
from mainrun.config import TrainConfig
from mainrun.core.attention import Attention
from mainrun.core.average import Average, copy_tensors
from mainrun.core.device import Device
from mainrun.core.dropout import Masks, depth_rates, dropout_sites
from mainrun.core.gradient_norms import gradient_norms
from mainrun.core.initial import initial_std
from mainrun.core.kernels import cross_entropy, gelu, linear, rdrop
from mainrun.core.layers import Context, Linear, bias_of, cast, make_norm, rope_table
from mainrun.core.members import Ensemble, build_members, count_tokens, members_of, merge_numbers, step_seeds
from mainrun.core.optimizers import Optimizers
from mainrun.core.parameters import freeze, saved_parameters
from mainrun.core.pending_losses import PendingLosses, StepRow
from mainrun.core.routing import Router, RoutingInfo, combine, count_numbers, numbers_of, selected_shares
from mainrun.core.sharding import clear_gradients, clip_gradients, parts_of, whole_tensors
from mainrun.core.shortcuts import InputMix, UNetSkips, add_shortcuts
from mainrun.data import scoring
from mainrun.data.batches import Batches
from mainrun.data.corpus import Corpus, load_corpus
from mainrun.data.lengths import check_lengths
from mainrun.data.ngram import Mixture, NGram
from mainrun.data.token_cache import TokenData, prepare
from mainrun.data.tokenizer import EOS
from mainrun.errors import Interrupted, MainrunError, UsageError
from mainrun.plan.plan import Plan, StepInputs
from mainrun.plan.recipes import load

# ------------------------------------------------------------------------------------------------------------
# The model. The letters in shapes mean: B rows, T tokens, D model width, H query heads, K key/value heads,
# h head width, V vocabulary size.


class MLP(nn.Module):
    """The feed-forward part of a block: GELU, squared ReLU or SwiGLU."""

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
        return self.down(x * x)  # under autocast, torch.square would compute in float32


def make_mlp(cfg: TrainConfig) -> nn.Module:
    if not cfg.experts:
        return MLP(cfg)
    from mainrun.core.moe import MoE

    return MoE(cfg, lambda: MLP(cfg))


class Block(nn.Module):
    """A transformer block: attention, then an MLP. Both parts have a pre-norm and a residual connection.

    If the block has a router, the router applies the block to the tokens that it selects.
    """

    def __init__(self, cfg: TrainConfig, first: bool) -> None:
        super().__init__()
        self.attn_norm = make_norm(cfg)
        self.attn = Attention(cfg, first)
        self.mlp_norm = make_norm(cfg)
        self.mlp = make_mlp(cfg)
        self.attn_scale = self.make_scale(cfg)
        self.mlp_scale = self.make_scale(cfg)
        self.router: Router | None = None
        self.mix: InputMix | None = None
        self.dropout = 0.0
        self.depth_rate = 0.0  # rate of stochastic depth

    @staticmethod
    def make_scale(cfg: TrainConfig) -> nn.Parameter | None:
        if not cfg.layer_scale:
            return None
        return nn.Parameter(torch.full((cfg.d_model,), cfg.layer_scale))

    def branch(self, y: Tensor, scale: Tensor | None, masks: Masks | None) -> Tensor:
        """Apply layer scale, dropout and stochastic depth to the output of a residual branch."""
        if scale is not None:
            y = y * scale
        return masks.drop_branch(y, self.dropout, self.depth_rate) if masks else y

    def forward(self, x: Tensor, context: Context, dropout: bool = True) -> tuple[Tensor, Tensor]:
        """Process all tokens of `x`. Return the output (B, T, D) and the attention values (B, K, T, h)."""
        masks = context.masks if dropout else None
        if self.mix is not None:
            x = self.mix(x, context)
        y, v = self.attn(self.attn_norm(x), context, dropout)
        x = x + self.branch(y, self.attn_scale, masks)
        y = self.mlp(self.mlp_norm(x))
        return x + self.branch(y, self.mlp_scale, masks), v


class GPT(nn.Module):
    """The language model that a config describes."""

    causal: Tensor
    sharpness: Tensor
    blocks: list[Block]

    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        vocab_size += cfg.unused_ids
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.positions = nn.Embedding(cfg.block_size, cfg.d_model) if cfg.position == "learned" else None
        blocks = [Block(cfg, first=i == 0) for i in range(cfg.n_layer)]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = make_norm(cfg)
        self.head = None if cfg.tie_head else nn.Linear(cfg.d_model, vocab_size, bias=False)
        self.dropout = 0.0
        causal = torch.ones(cfg.block_size, cfg.block_size, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)
        if cfg.position == "rope":
            cos, sin = rope_table(cfg.block_size, cfg.rotated_channels, cfg.rope_theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        if cfg.has_low_rank:
            from mainrun.core.lora import add_low_rank

            add_low_rank(self, cfg)
        self.init_weights()
        self.add_routers()
        # shortcuts come last, so that the other weights do not depend on them
        add_shortcuts(self, cfg)
        freeze(cfg, self)

    def init_weights(self) -> None:
        """Set the initial values of all weights."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=initial_std(self.cfg, name, module.weight.size(1)))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for start_at_zero in (self.positions, *(block.attn.gate for block in self.blocks)):
            if start_at_zero is not None:
                nn.init.zeros_(start_at_zero.weight)

    def add_routers(self) -> None:
        """Add the routers. They come late, so that a dense model of the same seed has the same weights."""
        if not self.cfg.routed_layers:
            return
        for layer in self.cfg.routed_layers:
            self.blocks[layer].router = Router(self.cfg, self.cfg.letters[layer])
        self.register_buffer("sharpness", torch.tensor(self.cfg.sharpness), persistent=False)

    def set_inputs(self, inputs: StepInputs, attention: str) -> None:
        """Set all values of a step that the model depends on."""
        self.set_dropout(inputs, attention)
        self.set_sharpness(inputs)

    def set_sharpness(self, inputs: StepInputs) -> None:
        """Set the sharpness of the routers for a step, in a buffer that CUDA graphs read."""
        if self.cfg.routed_layers:
            self.sharpness.fill_(inputs.sharpness)

    def set_dropout(self, inputs: StepInputs, attention: str) -> None:
        """Set the dropout rates, the capacity and the attention kernel, which a CUDA graph may record."""
        self.dropout = inputs.dropout
        rates = depth_rates(inputs.stochastic_depth, len(self.blocks))
        for block, rate in zip(self.blocks, rates, strict=True):
            if block.router is not None:
                block.router.capacity = inputs.capacity
            block.dropout = inputs.resid_dropout
            block.depth_rate = rate
            block.attn.dropout = inputs.attn_dropout
            block.attn.fused = attention == "sdpa"

    def attention_bias(self, idx: Tensor) -> Tensor | None:
        """Return the attention bias, or None if the fused kernel applies the causal mask itself."""
        if self.blocks[0].attn.fused and not self.cfg.title_mask:
            return None
        T = idx.size(1)
        visible = self.causal[:T, :T]  # (T, T)
        if self.cfg.title_mask:
            # the model predicts the first token of a title from <eos>, so <eos> belongs to the next title
            title = (idx == EOS).cumsum(1)  # (B, T)
            same_title = title.unsqueeze(2) == title.unsqueeze(1)  # (B, T, T)
            visible = (visible & same_title).unsqueeze(1)  # (B, 1, T, T)
        return bias_of(visible, self.embed.weight.dtype)

    def output_weight(self) -> Tensor:
        """Return the weight of the output head. A tied head uses the weight of the embedding."""
        if self.head is not None:
            return self.head.weight
        if self.cfg.embed_lora_rank:
            return self.embed.effective_weight()  # type: ignore[operator]
        return self.embed.weight

    def forward(
        self, idx: Tensor, pool: Tensor | None = None, routing_info: bool = False, topk: bool | None = None
    ) -> Any:
        """Return the logits (B, T, V) of the next token at each position.

        Matrix products use the `dtype` of the config.

        pool: the dropout masks, or None to turn dropout off.
        routing_info: whether to return the tuple (logits, RoutingInfo).
        topk: whether routers select the best tokens of the whole row, which looks ahead. By default, they do
            so in training only.
        """
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            context = self.context(idx, pool)
            x = self.embed(idx)  # (B, T, D)
            if self.cfg.value_shortcut:
                context = context._replace(embedded=cast(x))
            if self.positions is not None:
                x = x + self.positions.weight[: idx.size(1)]
            if context.masks:
                x = context.masks.drop(x, self.dropout)
            if self.cfg.x0_shortcut:
                context = context._replace(x0=x)
            skips = UNetSkips(self.cfg)
            x_before = x
            infos = []
            for layer, block in enumerate(self.blocks):
                context = context._replace(skip=skips.take(layer))
                x_in = x
                if block.router is None:
                    x, v = block(x, context)
                    if context.v_first is None and self.cfg.value_residual:
                        context = context._replace(v_first=v)
                else:
                    look_ahead = self.training if topk is None else topk
                    x, info = block.router(block, x, x_before, context, self.sharpness, look_ahead)
                    infos.append(info)
                x_before = x_in
                skips.store(layer, x)
            logits = linear(self.norm(x), self.output_weight())  # (B, T, V)
            if self.cfg.softcap:
                logits = self.cfg.softcap * torch.tanh(logits / self.cfg.softcap)
            if self.cfg.unused_ids:
                logits[..., -self.cfg.unused_ids :] = -torch.inf
        if not routing_info:
            return logits
        return logits, combine(infos, x)

    def context(self, idx: Tensor, pool: Tensor | None) -> Context:
        """Return what the blocks need besides their input."""
        rope = None
        if self.cfg.position == "rope":
            rope = (self.cos[: idx.size(1)], self.sin[: idx.size(1)])  # type: ignore[index]
        masks = None if pool is None else Masks(pool)
        return Context(self.attention_bias(idx), rope, None, masks)


Model = GPT | Ensemble  # an ensemble if the config has `members` > 1


def build(cfg: TrainConfig, vocab_size: int) -> Model:
    """Build the model of a config with its initial weights, which the config's seed and start determine."""
    model: Model = build_members(cfg, lambda: GPT(cfg, vocab_size))
    if cfg.start:
        from mainrun.interop import start

        start.load_start(model, cfg)
    return model


# ------------------------------------------------------------------------------------------------------------
# The training loss


class Loss(NamedTuple):
    """The losses of a batch."""

    minimized: Tensor
    plain: Tensor  # the cross entropy in nats per token, which is logged
    routing: RoutingInfo | None  # None for a dense model


def compute_loss(
    model: nn.Module, x: Tensor, y: Tensor, inputs: StepInputs, pool: Tensor | None, native: bool = False
) -> Loss:
    """Return the training loss of a batch, and the parts that are logged."""
    if inputs.rdrop:
        x = torch.cat([x, x])
    routing = None
    if inputs.capacity:
        logits, routing = model(x, pool, routing_info=True)
    else:
        logits = model(x, pool)
    logits = logits.flatten(0, 1)  # (BT, V), with R-Drop (2BT, V)
    if inputs.rdrop:
        loss, plain = rdrop(logits, y, inputs.rdrop, inputs.label_smoothing)
    else:
        loss, plain = cross_entropy(logits, y.flatten(), inputs.label_smoothing, native)
    if routing is not None:
        weights = (inputs.prior_loss, inputs.student_loss, inputs.router_loss, inputs.router_z_loss)
        for weight, routing_loss in zip(weights, routing.losses, strict=True):
            # a loss with a weight of 0 is added too, so that every parameter of a router has a gradient
            loss = loss + weight * routing_loss
    return Loss(loss, plain, routing)


# ------------------------------------------------------------------------------------------------------------
# The training step


class State:
    """The state of a run after a training step. A checkpoint contains this state."""

    cfg: TrainConfig  # the current config, which growth may have changed
    model: Model
    optimizers: Optimizers
    average: Average

    def __init__(self, cfg: TrainConfig, model: Model) -> None:
        self.step = 0
        self.tokens = 0  # number of tokens processed in training, in each pass of R-Drop and by each member
        self.growth_state: dict[str, Any] = {}  # the growth state; empty if the run does not grow
        self.generation = 0  # number of times that tensors were replaced, which makes CUDA graphs invalid
        self.replace_model(cfg, model, Optimizers(cfg, model))

    def replace_model(self, cfg: TrainConfig, model: Model, optimizers: Optimizers) -> None:
        self.cfg = cfg
        self.model = model
        self.optimizers = optimizers
        self.average = Average(cfg, model)
        self.generation += 1

    def tensors(self) -> dict[str, Tensor]:
        """Return a dict of all tensors to save. The names begin with model/, optimizer/ or average/.

        In a sharded run, all processes call this method together, and only the leader gets the tensors.
        """
        saved = saved_parameters(self.cfg, self.model)
        tensors: dict[str, Tensor] = {f"model/{name}": p for name, p in saved.items()}
        tensors |= self.optimizers.state()
        if self.average.differs:
            tensors |= {f"average/{name}": t for name, t in self.average.shadow.items()}
        return whole_tensors(self.model, tensors)

    def load(self, tensors: dict[str, Tensor], step: int, tokens: int) -> None:
        """Load saved tensors whose names and shapes match this model."""
        tensors = parts_of(self.model, tensors)
        copy_tensors("model", tensors, saved_parameters(self.cfg, self.model))
        self.average.load(tensors)
        self.optimizers.load({name: t for name, t in tensors.items() if name.startswith("optimizer/")})
        self.step = step
        self.tokens = tokens
        self.generation += 1


# the values of a step that the gradients do not depend on, or only through a buffer
RATES = ("lr", "lr_aux", "lr_lora", "lr_prior", "lr_router", "lr_student", "weight_decay", "weight_decay_aux")
OUTSIDE_GRADIENTS: dict[str, Any] = dict.fromkeys((*RATES, "average", "sharpness"), 0.0)


class TrainStep:
    """A training step in two parts: computing the gradients, and updating the weights.

    On a GPU, both parts are recorded as CUDA graphs. Values that change between steps, such as the batch and
    the learning rates, therefore enter the graphs only through tensors and random generators.
    """

    def __init__(self, state: State, device: Device) -> None:
        self.state = state
        self.device = device
        self.model: Model | None = None
        self.generation = -1
        self.runners: list[Any] = []  # one for each member of the model
        self.stop_counting: Callable[[], None] = lambda: None
        self.prepare()

    def prepare(self) -> None:
        """Adapt to the current model of the state, and discard CUDA graphs that are out of date."""
        state = self.state
        if self.model is not state.model:
            self.release()
            self.model = state.model
            self.runners = [self.device.runner(member) for member in members_of(state.model)]
            self.stop_counting = count_tokens(self.runners, state, self.device.world)
            self.forward_backward = self.device.cuda_graph(state.cfg)
            self.optimizer_step = self.device.cuda_graph(state.cfg)
            # replaying a CUDA graph does not call the model, so the hook from `count_tokens` does not run
            self.tokens_per_replay = 0
        elif self.generation != state.generation:
            self.forward_backward.forget()
            self.optimizer_step.forget()
        self.generation = state.generation

    def release(self) -> None:
        """Drop all references to the model, so that its memory is freed when growth replaces the model."""
        if self.model is None:
            return
        self.stop_counting()
        self.forward_backward.forget()
        self.optimizer_step.forget()
        self.model = None
        self.runners = []

    def gradients(self, x: Tensor, y: Tensor, inputs: StepInputs) -> Tensor:
        """Compute the clipped gradients of a batch. Return the numbers of the step for `step_row`."""
        self.prepare()
        device = self.device
        state = self.state
        # micro-batch m of this process is piece m * world + rank of the batch
        pieces = [m * device.world + device.rank for m in range(inputs.grad_accum)]
        device.seed(step_seeds(state.cfg, state.step, pieces))
        # new values outside the gradients must not make the CUDA graph invalid
        state.model.set_sharpness(inputs)
        self.inputs = inputs._replace(**OUTSIDE_GRADIENTS)
        self.logs_norms = state.step < state.cfg.grad_norm_steps
        before = state.tokens
        with device.compiling():
            numbers = self.forward_backward(
                (self.inputs, x.shape, self.logs_norms), self._forward_backward, x, y
            )
        assert numbers is not None
        self.tokens_per_replay = state.tokens - before or self.tokens_per_replay
        state.tokens = before + self.tokens_per_replay
        return numbers

    def _forward_backward(self, x: Tensor, y: Tensor) -> Tensor:
        model = self.state.model
        model.train()
        model.set_dropout(self.inputs, self.device.attention)
        clear_gradients(model)
        members = members_of(model)
        return merge_numbers([self._train_member(i, member, x, y) for i, member in enumerate(members)])

    def _train_member(self, index: int, member: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Compute the clipped gradients of one member of the model."""
        cfg = self.state.cfg
        device = self.device
        inputs = self.inputs
        runner = self.runners[index]
        pieces = inputs.grad_accum * device.world
        sites = dropout_sites(cfg, inputs, cfg.passes * len(x) // pieces, device.attention)
        total = torch.zeros(count_numbers(cfg.routed_layers), device=device.torch_device)
        for micro in range(inputs.grad_accum):
            piece = micro * device.world + device.rank
            pool = device.masks(sites, index * inputs.grad_accum + micro)
            with device.gradient_exchange(runner, last=micro == inputs.grad_accum - 1):
                x_piece = x.chunk(pieces)[piece]
                y_piece = y.chunk(pieces)[piece]
                loss = compute_loss(runner, x_piece, y_piece, inputs, pool, device.native)
                (loss.minimized / inputs.grad_accum).backward()
            total += numbers_of(loss.plain, loss.routing) / inputs.grad_accum
            del loss, pool  # free this memory before the next micro-batch
        norms_by_layer = gradient_norms(member) if self.logs_norms else total[:0]
        norm = clip_gradients(member, cfg.clip or math.inf)
        total = device.mean(total)
        return torch.cat((total[:1], norm.view(1), total[1:], norms_by_layer))

    def update(self, inputs: StepInputs) -> None:
        """Update the weights from the gradients. Then update the weight average, if the config has one."""
        state = self.state
        state.optimizers.set_rates(inputs, state.step)
        graph = self.forward_backward.graph
        # without a CUDA graph, each step allocates new gradients, which a recorded update could not read
        self.optimizer_step.on = graph is not None
        self.optimizer_step((inputs.weight_decay, inputs.weight_decay_aux, graph), state.optimizers.apply)
        state.average.update(inputs)


# ------------------------------------------------------------------------------------------------------------
# The training loop
class Due(NamedTuple):
    """The actions that are due after a step."""

    score: bool
    keep: bool  # whether to keep the state in the store
    save: bool  # whether to write a checkpoint


class Run(Protocol):
    """The methods that `loop` calls. `Session` in run/session.py and `PlainRun` implement this protocol."""

    @property
    def plan(self) -> Plan:
        """The plan of the run. Growth may replace the plan during training."""

    def settle(self) -> None:
        """Save the state in the store or continue from a later stored state, then decide about growth."""

    def stop_reason(self) -> str:
        """Return the reason to stop before the next step, or an empty string."""

    def grow(self, release: Callable[[], None]) -> bool:
        """Carry out the growth operation that is due. Return False if no operation is due."""

    def due(self, step: int) -> Due:
        """Return the actions that are due after a step. The loop calls this method before the step."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and the targets of a step. Both tensors have the shape (B, T)."""

    def log(self, rows: Sequence[StepRow]) -> None:
        """Write the rows of finished steps to the log."""

    def evaluate(self) -> None:
        """Score the weights on held-out titles."""

    def save(self) -> None:
        """Write a checkpoint of the state, unless the state is already saved."""


def loop(run: Run, state: State, device: Device) -> None:
    """Train to the end of the plan.

    The loop can start at any step, because a step depends only on the state, the config and the step number.
    """
    step = TrainStep(state, device)
    losses = PendingLosses(limit=device.read_every)

    run.settle()
    while state.step < run.plan.steps:
        reason = run.stop_reason()
        if reason:
            run.log(losses.drain())
            run.save()
            raise Interrupted(reason)
        if run.grow(step.release):
            continue

        due = run.due(state.step + 1)
        inputs = run.plan.at(state.step)  # scheduled values of the step, such as the learning rates
        x, y = run.batch(state.step)
        numbers = step.gradients(x, y, inputs)

        # if an action is due, check the loss before the weights change, so that no checkpoint contains a NaN
        losses.push(state.step + 1, inputs.lr, numbers, state.cfg.routed_layers)
        rows = losses.drain() if losses.full or any(due) else []

        step.update(inputs)
        state.step += 1
        run.log(rows)
        if due.score:
            run.evaluate()
        if due.score or due.keep:
            run.settle()
        if due.save:
            run.save()
    run.save()


# ------------------------------------------------------------------------------------------------------------
# Training with this file alone


class Setup(NamedTuple):
    """Everything that a run needs on this machine: the config, the device, the data and the plan."""

    cfg: TrainConfig
    device: Device
    corpus: Corpus
    data: TokenData
    plan: Plan
    start_digest: str  # a hash of the weights that the run starts from, or "" for random weights
    ngram: NGram | None  # the n-gram model that is mixed into the scores

    def scored(self, model: nn.Module) -> nn.Module:
        """Return the model that is scored: the model itself, or a mixture with the n-gram model."""
        if self.ngram is None:
            return model
        return Mixture(model, self.ngram, self.cfg.ngram_weight)

    def start(self) -> State:
        """Return the initial state."""
        model: Model = self.device.place(build(self.cfg, self.data.tokenizer.vocab_size))
        model.set_inputs(self.plan.at(0), self.device.attention)
        return State(self.cfg, model)


def set_up(cfg: TrainConfig, fired: Sequence[Any] = ()) -> Setup:
    """Read the data of a config and plan the run. fired: the decisions about growth ops, for `Plan`."""
    device = Device(cfg)
    corpus = load_corpus(cfg)
    with device.leader_first():  # the leader fills the token cache for the other processes
        data = prepare(cfg, corpus)
        start = check_start(cfg, data)
    check_lengths(cfg, data.splits)
    plan = Plan(cfg, len(data.splits["train"]), fired)
    device.settle(cfg, plan)
    ngram = None
    if cfg.ngram:
        ngram = NGram(data.splits["train"], data.tokenizer.vocab_size, cfg.ngram)
    return Setup(cfg, device, corpus, data, plan, start, ngram)


def check_start(cfg: TrainConfig, data: TokenData) -> str:
    """Check that the start of a config fits its model, and return the digest of the start."""
    if not cfg.start:
        return ""
    from mainrun.interop import start

    with torch.device("meta"):  # the check needs only the names and the shapes
        model = GPT(cfg, data.tokenizer.vocab_size)
    return start.check_start(cfg, model, data.tokenizer.digest)


def set_last_inputs(state: State, plan: Plan, device: Device) -> None:
    """Set the values of the last step that scores depend on. Loading a state does not set these values."""
    inputs = plan.at(max(state.step - 1, 0))
    # an operation after this step may already have changed the capacity
    inputs = inputs._replace(capacity=state.cfg.capacity)
    state.model.set_inputs(inputs, device.attention)


def score(setup: Setup, plan: Plan, state: State) -> Iterator[dict[str, Any]]:
    """Score the weights on each held-out split that exists. Yield one row of metrics.jsonl per split."""
    cfg = setup.cfg
    data = setup.data
    set_last_inputs(state, plan, setup.device)
    for split in ("val", "dev"):
        if split not in data.splits:
            continue
        started = time.perf_counter()
        tokens = data.splits[split]
        size = {"chars": data.chars[split], "nbytes": data.bytes[split], "block_size": cfg.block_size}
        with state.average.applied():
            result = scoring.evaluate(setup.scored(state.model), tokens, **size, geometry=cfg.geometry)
            row = {"event": "eval", "step": state.step, "split": split, **asdict(result)}
            if setup.ngram:
                alone = scoring.evaluate(state.model, tokens, **size, geometry=cfg.geometry)
                row |= {"alone": alone.full, "alone_loss": alone.loss}
            if state.cfg.routed_layers:
                logits = scoring.LOGITS[setup.device.torch_device.type]
                row["routers"] = selected_shares(state.model, tokens, state.cfg, logits)
        yield row | {"seconds": time.perf_counter() - started}


class PlainRun:
    """A minimal `Run` that has no checkpoints, store or growth, and prints log rows as JSON."""

    def __init__(self, setup: Setup, state: State) -> None:
        if setup.cfg.growth.ops:
            raise UsageError("this file alone cannot grow a model; use `mainrun train`")
        self.setup = setup
        self.device = setup.device
        self.plan = setup.plan
        self.state = state
        self.batches = Batches(setup.cfg, setup.data.splits["train"])

    def settle(self) -> None: ...

    def stop_reason(self) -> str:
        return ""

    def grow(self, release: Callable[[], None]) -> bool:
        return False

    def due(self, step: int) -> Due:
        return Due(score=step in self.plan.eval_steps, keep=False, save=False)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = self.batches.at(step, self.plan.segment_at(step))
        return self.device.put(x), self.device.put(y)

    def log(self, rows: Sequence[StepRow]) -> None:
        for row in rows:
            print(json.dumps({"event": "step", **row.fields()}))

    def evaluate(self) -> None:
        for row in score(self.setup, self.plan, self.state):
            print(json.dumps(row), flush=True)

    def save(self) -> None: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a preset with this file alone."""
    parser = argparse.ArgumentParser(prog="python -m mainrun.train", description=main.__doc__)
    parser.add_argument("--preset", default="demo:optimized", help="a built-in preset or a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    options = parser.parse_args(arguments)
    try:
        for cfg in load(options.preset, options.set):
            setup = set_up(cfg)
            state = setup.start()
            loop(PlainRun(setup, state), state, setup.device)
    except MainrunError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
