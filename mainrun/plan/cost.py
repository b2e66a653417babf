"""mainrun.plan.cost"""

from __future__ import annotations

from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan


class Size(NamedTuple):
    """What a config's model has and takes."""

    params: int
    active: int  # of them those that a token meets
    trained: int  # of them those that are not frozen
    flops: int  # a token, forward and backward, as sitting.flops_per_token counts
    moments: int  # bytes of the optimiser's state


def size(cfg: TrainConfig) -> Size:
    """By arithmetic; a test counts the model. The vocabulary is taken as large as the config allows."""
    d, ff, heads, kv = cfg.d_model, cfg.ff_width, cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width
    bias, norm = int(cfg.bias), d * (2 if cfg.norm == "layernorm" and cfg.bias else 1)
    qkv_bias = bias if cfg.qkv_bias is None else int(cfg.qkv_bias)
    vocab = cfg.vocab_size + cfg.unused_ids
    attention = d * (heads + 2 * kv) + heads * d + (d * cfg.n_head if cfg.attn_gate else 0)
    low_rank = cfg.attn_lora_rank * (2 * (d + heads) + 2 * (d + kv))
    up_and_down = (3 if cfg.mlp == "swiglu" else 2) * d * ff
    mlp_bias = bias * ((2 if cfg.mlp == "swiglu" else 1) * ff + d)
    vectors = (
        2 * norm
        + qkv_bias * (heads + 2 * kv)
        + bias * d
        + (2 * cfg.head_width if cfg.qk_norm else 0)
        + (2 * d if cfg.layer_scale else 0)
    )
    experts, met = max(1, cfg.experts), min(cfg.top_k, cfg.experts) or 1
    matrices = attention + low_rank + (d * cfg.experts if cfg.experts else 0)
    layer = matrices + vectors + experts * (up_and_down + mlp_bias)
    shares = cfg.n_layer - 1 if cfg.value_residual else 0
    around = (
        vocab * d
        + (cfg.block_size * d if cfg.position == "learned" else 0)
        + cfg.embed_lora_rank * (vocab + d)
    )
    head = 0 if cfg.tie_head else vocab * d
    params = cfg.n_layer * layer + shares + around + norm + head
    unmet = cfg.n_layer * (experts - met) * (up_and_down + mlp_bias)
    multiplied = (
        cfg.n_layer * (matrices + met * up_and_down)
        + vocab * d
        + (cfg.embed_lora_rank * (vocab + d) if cfg.tie_head else 0)
    )
    frozen = len(cfg.frozen) * layer + (shares and sum(i > 0 for i in cfg.frozen))
    router = d * cfg.experts
    inner = (cfg.n_layer - len(cfg.frozen)) * (
        matrices - router + experts * up_and_down
    )  # matrices of blocks but routers: Muon's
    trained = params - frozen
    numbers = {
        "sgd": trained if cfg.momentum else 0,
        "adamw": 2 * trained,
        "muon": inner + 2 * (trained - inner),
    }[cfg.optimizer]
    flops = 6 * multiplied + 12 * cfg.n_layer * heads * cfg.block_size
    return Size(params, params - unmet, trained, flops, 4 * numbers)


def costs(cfg: TrainConfig, ids: int) -> dict[str, Any]:
    """ids: of the tokenizer, which may have found fewer than it was allowed."""
    found = size(cfg.model_copy(update={"vocab_size": ids}))
    return {"params": found.params, "active": found.active, "flops_per_token": found.flops}


def segment_costs(plan: Plan, ids: int) -> list[dict[str, Any]]:
    """A run by its ops: from which step on, for how many tokens, of what size, for how many FLOPs."""
    found = []
    for segment, end in zip(plan.segments, [*(s.first for s in plan.segments[1:]), plan.steps], strict=True):
        cost, tokens = costs(segment.cfg, ids), plan.tokens(end) - plan.tokens(segment.first)
        flops = tokens * segment.cfg.passes * cost["flops_per_token"]
        found.append(
            {
                "op": str(segment.op or ""),
                "begins": segment.first,
                "ends": end,
                "tokens": tokens,
                "flops": flops,
                **cost,
            }
        )
    return found
