"""Compute the size and the cost of a model from a config. A test compares the results with real models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.plan.optimizers import OPTIMIZERS, state_tensors
from mainrun.plan.plan import Plan

BYTES = 4  # bytes per number in the optimizer state


# what to do if a run needs more memory than its device has
SAVE_MEMORY = (
    "raise grad_accum, train only low-rank terms with base_frozen=true, or divide the model among several "
    "processes with shard=true"
)


class Size(NamedTuple):
    """The size of the model that a config describes, over all its members."""

    params: int
    active: int  # number of parameters that process one token
    trained: int  # number of parameters that are not frozen
    flops: int  # number of FLOPs per token in the forward and the backward pass
    moments: int  # size of the optimizer state in bytes


class _Block(NamedTuple):
    """The numbers of parameters in the parts of a block."""

    attention: int  # attention matrices, including low-rank terms
    router: int
    vectors: int  # biases, norms and gains outside the MLPs
    expert: int  # the matrices of one MLP, including low-rank terms
    expert_bias: int
    low_rank: int  # the low-rank terms in attention and in the MLP
    experts: int  # number of MLPs in the block
    used: int  # number of MLPs that process each token

    @property
    def params(self) -> int:
        return self.attention + self.router + self.vectors + self.experts * (self.expert + self.expert_bias)

    @property
    def unused(self) -> int:
        """The number of parameters in the MLPs that do not process a given token."""
        return (self.experts - self.used) * (self.expert + self.expert_bias)

    @property
    def multiplied(self) -> int:
        """The number of parameters in the matrices that process a given token."""
        return self.attention + self.router + self.used * self.expert

    @property
    def hidden_matrices(self) -> int:
        """The number of parameters that Muon trains: all matrices of the block except the router."""
        return self.attention + self.experts * self.expert


def size(cfg: TrainConfig) -> Size:
    """Return the size of the model, assuming the largest vocabulary that the config allows."""
    d = cfg.d_model
    block = _block(cfg)
    vocab = cfg.vocab_size + cfg.unused_ids
    embedding = vocab * d
    embed_lora = cfg.embed_lora_rank * (vocab + d)

    outside = embedding + embed_lora + _norm(cfg)  # parameters outside the blocks
    if cfg.position == "learned":
        outside += cfg.block_size * d
    if not cfg.tie_head:
        outside += vocab * d
    frozen = len(cfg.frozen) * block.params
    if cfg.value_residual:  # each layer except the first learns one mixing ratio
        outside += cfg.n_layer - 1
        frozen += sum(layer > 0 for layer in cfg.frozen)
    outside += cfg.skips  # each layer of the second half learns the weight of one skip connection
    frozen += sum(layer >= cfg.n_layer - cfg.skips for layer in cfg.frozen)
    routers = [_router_params(cfg, letter) for letter in cfg.letters]
    frozen += sum(routers[layer] for layer in cfg.frozen)
    params = cfg.n_layer * block.params + sum(routers) + outside
    trained = params - frozen

    trained_layers = cfg.n_layer - len(cfg.frozen)
    hidden_matrices = trained_layers * block.hidden_matrices
    if cfg.base_frozen:
        hidden_matrices = trained_layers * block.low_rank
        trained_routers = sum(routers) - sum(routers[layer] for layer in cfg.frozen)
        trained = hidden_matrices + trained_layers * block.router + trained_routers + embed_lora
    return Size(
        params=cfg.members * params,
        active=cfg.members * (params - cfg.n_layer * block.unused),
        trained=cfg.members * trained,
        flops=round(3 * forward_flops(cfg)),
        moments=cfg.members * BYTES * _state_numbers(cfg, trained, hidden_matrices),
    )


def state_bytes(plan: Plan, vocab_size: int, parts: int) -> int:
    """Return the size in bytes of the weights, gradients and optimizer state of the largest model of a plan.

    parts: the number of processes that the model is divided among.
    """
    largest = 0
    for segment in plan.segments:
        model = size(segment.cfg.model_copy(update={"vocab_size": vocab_size}))
        largest = max(largest, BYTES * (model.params + model.trained) + model.moments)
    return largest // parts


def _router_params(cfg: TrainConfig, letter: str) -> int:
    """Return the number of parameters in the router of a block."""
    if letter == "D":
        return 0
    d = cfg.d_model
    student = 2 * d + 1
    if letter == "M":
        return d + student
    return d + 3 * d * cfg.prior_width + 2 + student


def forward_flops(cfg: TrainConfig, shares: Sequence[float] = ()) -> float:
    """Return the number of FLOPs per token in a forward pass of all members.

    shares: for each routed layer, the share of tokens that the layer selects when the model is scored.
        Without `shares`, the result is for a forward pass in training.
    """
    head = cfg.vocab_size + cfg.unused_ids
    total: float = 2 * head * cfg.d_model
    if cfg.tie_head:
        total += 2 * cfg.embed_lora_rank * (head + cfg.d_model)
    return cfg.members * (total + sum(layer_flops(cfg, shares)))


def layer_flops(cfg: TrainConfig, shares: Sequence[float] = ()) -> list[float]:
    """Return the FLOPs per token of each layer in a forward pass of one member. For `shares`, see above."""
    block = _block(cfg)
    matrices = 2 * block.multiplied
    attention = 4 * cfg.n_head * cfg.head_width * cfg.block_size
    by_student = bool(shares) and (cfg.route == "student" or cfg.route == "auto")
    remaining = iter(shares)
    layers: list[float] = []
    for letter in cfg.letters:
        if letter == "D":
            layers.append(matrices + attention)
            continue
        share = next(remaining) if shares else cfg.capacity
        flops = share * matrices + share**2 * attention + _router_flops(cfg, letter, by_student)
        if letter == "T" and not by_student:  # the router needs the output of the block for all tokens
            flops += matrices + attention
        layers.append(flops)
    return layers


def _router_flops(cfg: TrainConfig, letter: str, by_student: bool) -> float:
    """Return the number of FLOPs per token of a router, including its student."""
    if letter == "M":
        return 2 * 3 * cfg.d_model
    if letter == "T" and by_student:
        return 2 * 2 * cfg.d_model
    return 2 * (2 * cfg.d_model + 3 * cfg.d_model * cfg.prior_width)


class ForwardCost(NamedTuple):
    """The number of FLOPs per token in a forward pass of a model."""

    letters: str  # the kind of each layer
    scored: float  # when the model is scored, if each routed layer selects the share `capacity`
    training: float
    dense: float  # if all layers were dense

    def table(self) -> dict[str, Any]:
        """Return the costs as `--json` shows them, with the names that summary.json uses."""
        return {
            "letters": self.letters,
            "forward_flops": self.scored,
            "forward_flops_training": self.training,
            "forward_flops_dense": self.dense,
        }


def forward_cost(cfg: TrainConfig, ids: int | None = None) -> ForwardCost:
    """Return the cost of a forward pass, before the shares that routers select have been measured.

    ids: the number of token ids, if the tokenizer has fewer token ids than `vocab_size` allows.
    """
    exact = cfg.model_copy(update={"vocab_size": ids or cfg.vocab_size})
    return ForwardCost(
        letters=cfg.letters,
        scored=forward_flops(exact, [cfg.capacity] * len(cfg.routed_layers)),
        training=forward_flops(exact),
        dense=forward_flops(exact.model_copy(update={"block_pattern": "D"})),
    )


def _block(cfg: TrainConfig) -> _Block:
    d = cfg.d_model
    q = cfg.n_head * cfg.head_width  # width of the queries and of the attention output
    kv = cfg.kv_heads * cfg.head_width  # width of the keys and of the values

    attention = d * (q + 2 * kv) + q * d
    attn_low_rank = cfg.attn_lora_rank * (2 * (d + q) + 2 * (d + kv))
    attention += attn_low_rank
    if cfg.attn_gate:
        attention += d * cfg.n_head
    if cfg.value_shortcut:
        attention += d * kv

    vectors = 2 * _norm(cfg)
    if cfg.qkv_bias or (cfg.qkv_bias is None and cfg.bias):
        vectors += q + 2 * kv
    if cfg.bias:
        vectors += d
    if cfg.qk_norm:
        vectors += 2 * cfg.head_width
    if cfg.layer_scale:
        vectors += 2 * d
    if cfg.value_shortcut:
        vectors += cfg.kv_heads
    if cfg.x0_shortcut:
        vectors += 2

    up = 2 if cfg.mlp == "swiglu" else 1  # number of matrices from d_model to the hidden width
    mlp_low_rank = cfg.mlp_lora_rank * (up + 1) * (d + cfg.ff_width)
    experts = max(1, cfg.experts)
    return _Block(
        attention=attention,
        router=d * cfg.experts,
        vectors=vectors,
        expert=(up + 1) * d * cfg.ff_width + mlp_low_rank,
        expert_bias=(up * cfg.ff_width + d) * cfg.bias,
        low_rank=attn_low_rank + mlp_low_rank,
        experts=experts,
        used=min(cfg.top_k, experts),
    )


def _state_numbers(cfg: TrainConfig, trained: int, hidden_matrices: int) -> int:
    """Return the number of elements in the optimizer state."""
    per_parameter = state_tensors(cfg.optimizer, cfg.momentum)
    others = OPTIMIZERS[cfg.optimizer].others
    if not others:
        return per_parameter * trained
    return per_parameter * hidden_matrices + state_tensors(others, cfg.momentum) * (trained - hidden_matrices)


def _norm(cfg: TrainConfig) -> int:
    """Return the number of parameters in one normalisation layer."""
    if cfg.norm == "layernorm" and cfg.bias:
        return 2 * cfg.d_model
    return cfg.d_model


def costs(cfg: TrainConfig, ids: int) -> dict[str, Any]:
    """Return the size and the FLOPs per token of a model whose tokenizer has `ids` token ids.

    A tokenizer may have fewer token ids than `vocab_size` allows.
    """
    exact = size(cfg.model_copy(update={"vocab_size": ids}))
    return {"params": exact.params, "active": exact.active, "flops_per_token": exact.flops}


def segment_costs(plan: Plan, ids: int) -> list[dict[str, Any]]:
    """Return the number of tokens, the FLOPs and the model size of each segment in a plan."""
    ends = [segment.first for segment in plan.segments[1:]]
    rows = []
    for segment, end in zip(plan.segments, [*ends, plan.steps], strict=True):
        tokens = plan.tokens(end) - plan.tokens(segment.first)
        cost = costs(segment.cfg, ids)
        rows.append(
            {
                "op": str(segment.op or ""),
                "begins": segment.first,
                "ends": end,
                "tokens": tokens,
                "flops": tokens * segment.cfg.passes * cost["flops_per_token"],
                **cost,
            }
        )
    return rows
