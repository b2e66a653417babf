"""The size and the cost of a model, computed from its config. A test compares them with real models."""

from __future__ import annotations

from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.plan.optimizers import OPTIMIZERS, state_tensors
from mainrun.plan.plan import Plan

BYTES = 4  # of a number in the optimiser's state


class Size(NamedTuple):
    """The size of a config's model."""

    params: int
    active: int  # parameters that one token uses
    trained: int  # parameters that are not frozen
    flops: int  # per token, forward and backward
    moments: int  # bytes of the optimiser's state


class _Block(NamedTuple):
    """The parameters of one block."""

    attention: int  # matrices of attention, low-rank terms included
    router: int
    vectors: int  # biases, norms and gains, but not those of the MLP
    expert: int  # matrices of one MLP
    expert_bias: int
    experts: int  # MLPs
    used: int  # MLPs that one token uses

    @property
    def params(self) -> int:
        return self.attention + self.router + self.vectors + self.experts * (self.expert + self.expert_bias)

    @property
    def unused(self) -> int:
        """Parameters that one token does not use."""
        return (self.experts - self.used) * (self.expert + self.expert_bias)

    @property
    def multiplied(self) -> int:
        """Parameters of the matrices that one token is multiplied by."""
        return self.attention + self.router + self.used * self.expert

    @property
    def hidden_matrices(self) -> int:
        """Parameters of all matrices except the router. Muon trains only these."""
        return self.attention + self.experts * self.expert


def size(cfg: TrainConfig) -> Size:
    """Return the size of a config's model, with as many ids as the config allows."""
    d = cfg.d_model
    block = _block(cfg)
    vocab = cfg.vocab_size + cfg.unused_ids
    embedding = vocab * d
    embed_lora = cfg.embed_lora_rank * (vocab + d)

    outside = embedding + embed_lora + _norm(cfg)  # of the blocks
    if cfg.position == "learned":
        outside += cfg.block_size * d
    if not cfg.tie_head:
        outside += vocab * d
    frozen = len(cfg.frozen) * block.params
    if cfg.value_residual:  # a ratio in each layer but the first
        outside += cfg.n_layer - 1
        frozen += sum(layer > 0 for layer in cfg.frozen)
    params = cfg.n_layer * block.params + outside
    trained = params - frozen

    multiplied = cfg.n_layer * block.multiplied + embedding
    if cfg.tie_head:
        multiplied += embed_lora
    flops = 6 * multiplied + 12 * cfg.n_layer * cfg.n_head * cfg.head_width * cfg.block_size

    hidden_matrices = (cfg.n_layer - len(cfg.frozen)) * block.hidden_matrices
    return Size(
        params=params,
        active=params - cfg.n_layer * block.unused,
        trained=trained,
        flops=flops,
        moments=BYTES * _state_numbers(cfg, trained, hidden_matrices),
    )


def _block(cfg: TrainConfig) -> _Block:
    d = cfg.d_model
    q = cfg.n_head * cfg.head_width  # width of the queries, and of the attention output
    kv = cfg.kv_heads * cfg.head_width  # width of the keys, and of the values

    attention = d * (q + 2 * kv) + q * d
    attention += cfg.attn_lora_rank * (2 * (d + q) + 2 * (d + kv))
    if cfg.attn_gate:
        attention += d * cfg.n_head

    vectors = 2 * _norm(cfg)
    if cfg.qkv_bias or (cfg.qkv_bias is None and cfg.bias):
        vectors += q + 2 * kv
    if cfg.bias:
        vectors += d
    if cfg.qk_norm:
        vectors += 2 * cfg.head_width
    if cfg.layer_scale:
        vectors += 2 * d

    up = 2 if cfg.mlp == "swiglu" else 1  # matrices from the model's width to the hidden width
    experts = max(1, cfg.experts)
    return _Block(
        attention=attention,
        router=d * cfg.experts,
        vectors=vectors,
        expert=(up + 1) * d * cfg.ff_width,
        expert_bias=(up * cfg.ff_width + d) * cfg.bias,
        experts=experts,
        used=min(cfg.top_k, experts),
    )


def _state_numbers(cfg: TrainConfig, trained: int, hidden_matrices: int) -> int:
    """Return how many numbers the state of the optimiser has."""
    per_parameter = state_tensors(cfg.optimizer, cfg.momentum)
    others = OPTIMIZERS[cfg.optimizer].others
    if not others:
        return per_parameter * trained
    return per_parameter * hidden_matrices + state_tensors(others, cfg.momentum) * (trained - hidden_matrices)


def _norm(cfg: TrainConfig) -> int:
    """Return the parameters of one norm."""
    if cfg.norm == "layernorm" and cfg.bias:
        return 2 * cfg.d_model
    return cfg.d_model


def costs(cfg: TrainConfig, ids: int) -> dict[str, Any]:
    """Return the costs of a model with `ids` ids: a tokenizer may have fewer than the config allows."""
    exact = size(cfg.model_copy(update={"vocab_size": ids}))
    return {"params": exact.params, "active": exact.active, "flops_per_token": exact.flops}


def segment_costs(plan: Plan, ids: int) -> list[dict[str, Any]]:
    """Return the tokens, FLOPs and costs of each segment of a plan."""
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
