"""Helpers for the growth tests: small random models, ops and training steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from conftest import TINY
from hypothesis import strategies as st
from torch import Tensor, nn

from mainrun.config import TrainConfig, from_dict
from mainrun.core.optimizers import Optimizers
from mainrun.growth.moments import IndexMap, transfer
from mainrun.growth.operators import grow
from mainrun.growth.verify import probe
from mainrun.plan.ops import OPERATIONS, Op, after
from mainrun.plan.plan import Plan, StepInputs
from mainrun.plan.triggers import Trigger
from mainrun.train import GPT, build

V, T = 29, 8
IDX = probe(V, T, seed=0, rows=3)
SMALL: dict[str, Any] = TINY | {"block_size": T, "n_layer": 2, "n_head": 2, "d_model": 8, "d_ff": 12}
MODERN: dict[str, Any] = {
    "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "qk_norm": True, "attn_gate": True,
    "layer_scale": 0.3,
    "value_residual": True, "tie_head": False, "softcap": 4.0, "n_kv_head": 1,
}  # fmt: skip

any_fields = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "position": st.sampled_from(["learned", "rope"]),
        "mlp": st.sampled_from(["gelu", "relu2", "swiglu"]),
        "n_head": st.just(4),
        "n_kv_head": st.sampled_from([0, 1, 2]),
        "layer_scale": st.sampled_from([0.0, 0.5]),
        "softcap": st.sampled_from([0.0, 5.0]),
        "n_layer": st.integers(1, 2),
        "experts": st.sampled_from([0, 3]),
        "attn_lora_rank": st.sampled_from([0, 2]),
        "mlp_lora_rank": st.sampled_from([0, 2]),
        "embed_lora_rank": st.sampled_from([0, 2]),
        "lora_alpha": st.just(2.0),
        **dict.fromkeys(["bias", "qk_norm", "attn_gate", "value_residual", "tie_head"], st.booleans()),
    }
)


# experts have no low-rank terms
architectures = any_fields.filter(lambda fields: not (fields["experts"] and fields["mlp_lora_rank"]))


def config(**changes: Any) -> TrainConfig:
    return from_dict(SMALL | changes)


def shaken(cfg: TrainConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> GPT:
    """Return a model with noise in every parameter, so that no bias or gate is zero and no gain is one."""
    model = build(cfg, V)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) * 0.2
    return model.to(dtype).eval()


def op(name: str, value: Any = None, **more: Any) -> Op:
    value = OPERATIONS[name].value.read(value, [])
    return Op(name, value, Trigger(step=1), **{"init": OPERATIONS[name].init, "seed": 7, **more})


def grown(model: GPT, what: Op) -> tuple[GPT, IndexMap]:
    return grow(what, model.cfg, after(what, model.cfg), model, what.seed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def at(cfg: TrainConfig, **changes: Any) -> StepInputs:
    return Plan(cfg, 100_000).at(0)._replace(**changes)


def gradients(model: GPT, seed: int) -> Tensor:
    """Compute the gradients for a batch of random tokens, and return the loss."""
    model.zero_grad()
    idx = probe(V, T + 1, seed, rows=4)
    loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def steps(model: GPT, optimizers: Optimizers, seeds: range, lr: float = 0.01) -> None:
    for seed in seeds:
        gradients(model, seed)
        optimizers.step(at(model.cfg, lr=lr, lr_aux=lr, weight_decay=0.0))


def trained(cfg: TrainConfig, count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[GPT, Optimizers]:
    model = shaken(cfg, dtype=dtype)
    optimizers = Optimizers(cfg, model)
    steps(model, optimizers, range(count))
    return model, optimizers


def go_on(
    model: GPT, optimizers: Optimizers, what: Op, mode: str = "scale", count: int = 0
) -> tuple[GPT, Optimizers, IndexMap]:
    """Apply an op, transfer the optimizer state, and train for `count` more steps."""
    new, moved = grown(model, what)
    after_it = Optimizers(new.cfg, new)
    after_it.load(transfer(optimizers.state(), moved, mode)[0])
    steps(new, after_it, range(100, 100 + count))
    return new, after_it, moved
