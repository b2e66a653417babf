"""Compare experts, low-rank layers, frozen layers and unused ids with simple references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from growing import IDX, SMALL, V, at, config, gradients, probe, shaken, trained, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from mainrun.config import from_dict
from mainrun.core.device import Device
from mainrun.core.kernels import cross_entropy
from mainrun.core.moe import MoE
from mainrun.core.optimizers import Optimizers
from mainrun.errors import ConfigError
from mainrun.plan.cost import size
from mainrun.plan.plan import Plan
from mainrun.train import GPT, MLP, build
from mainrun.ui.estimate import estimate_memory

LATE: dict[str, Any] = {
    "experts": 4,
    "attn_lora_rank": 2,
    "embed_lora_rank": 2,
    "frozen": (0,),
    "unused_ids": 3,
}


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["renormalised", "softmax"]),
    st.sampled_from(["gelu", "swiglu"]),
    st.integers(0, 99),
)
@settings(max_examples=20)
def test_a_token_goes_through_its_top_k_experts(
    experts: int, k: int, router_weights: str, mlp: str, seed: int
) -> None:
    cfg = config(experts=max(experts, k), top_k=k, router_weights=router_weights, mlp=mlp)
    moe: Any = shaken(cfg, seed).blocks[0].mlp
    x = torch.randn(
        2, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    y = moe(x)
    expected = []
    for token in x.flatten(0, 1):  # one token at a time
        score = moe.router.weight @ token
        chosen = sorted(range(cfg.experts), key=lambda e, s=score: -s[e].item())[:k]  # type: ignore[misc]
        share = score.exp() / (score[chosen] if router_weights == "renormalised" else score).exp().sum()
        expected.append(sum(share[e] * moe.experts[e](token) for e in chosen))
    reference = torch.stack(expected).view_as(x)
    assert torch.allclose(y, reference, atol=1e-12)
    leaves = [x, *moe.parameters()]
    ours, theirs = (
        torch.autograd.grad(out.square().sum(), leaves, allow_unused=True) for out in (y, reference)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None and torch.allclose(a, torch.zeros_like(a) if b is None else b, atol=1e-11)


def test_with_equal_scores_the_first_experts_are_chosen() -> None:
    moe = MoE(cfg := config(experts=6, top_k=3), lambda: MLP(cfg))
    torch.nn.init.zeros_(moe.router.weight)
    chosen, weight = moe.route(torch.randn(500, 8))
    assert (chosen == torch.arange(3)).all() and torch.allclose(weight, torch.full_like(weight, 1 / 3))


def test_router_scores_keep_the_dtype_of_the_weights_under_autocast() -> None:
    """If the scores were rounded to bfloat16, some tokens would go to other experts."""
    model = shaken(config(experts=4, dtype="bfloat16"), dtype=torch.float32)
    moe: Any = model.blocks[0].mlp
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    plain = moe.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = moe.route(x)
        rounded = F.linear(x, moe.router.weight)
    assert cast[1].dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert (
        rounded.dtype == torch.bfloat16
        and (rounded.sort(descending=True, stable=True)[1][:, :2] != plain[0]).any()
    )
    assert model(IDX).isfinite().all()


def test_experts_are_deterministic() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        model = shaken(config(experts=4), dtype=torch.float32)
        runs = []
        for _ in "ab":
            gradients(model, 3)
            runs.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.use_deterministic_algorithms(before)
    assert runs[0].keys() == weights(model).keys() and all(
        torch.equal(g, runs[1][n]) for n, g in runs[0].items()
    )


def test_an_expert_without_tokens_has_a_gradient_of_zeros() -> None:
    """Muon and DDP need a gradient for every parameter, even if an expert gets no tokens."""
    model = shaken(config(experts=4, top_k=1, optimizer="muon", momentum=0.9), dtype=torch.float32)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.weight.zero_()  # type: ignore[union-attr, operator]
    gradients(model, 1)
    idle = model.get_parameter("blocks.0.mlp.experts.2.up.weight")
    assert idle.grad is not None and not idle.grad.any()
    before = idle.detach().clone()
    Optimizers(model.cfg, model).step(at(model.cfg, weight_decay=0.0))
    assert torch.equal(idle, before)


def test_a_low_rank_layer_adds_the_product_of_its_matrices() -> None:
    model = shaken(config(attn_lora_rank=3, embed_lora_rank=2, lora_alpha=6.0, bias=True))
    w = weights(model)
    q: Any = model.blocks[0].attn.q
    x = torch.randn(5, 8, dtype=torch.float64)
    full = w["blocks.0.attn.q.weight"] + 2.0 * w["blocks.0.attn.q.lora_b"] @ w["blocks.0.attn.q.lora_a"]
    assert torch.allclose(q(x), F.linear(x, full, w["blocks.0.attn.q.bias"])) and torch.allclose(
        q.effective_weight(), full
    )
    assert torch.allclose(
        model.embed(IDX), (w["embed.weight"] + 3.0 * w["embed.lora_b"] @ w["embed.lora_a"])[IDX]
    )
    assert {n for n in w if "lora" in n and n.startswith("blocks.1")} == {
        f"blocks.1.attn.{m}.lora_{x}" for m in "qkvo" for x in "ab"
    }


@pytest.mark.parametrize("tied", [True, False])
def test_low_rank_terms_start_without_effect_and_reach_a_tied_head(tied: bool) -> None:
    plain, low = (
        build(config(tie_head=tied, **fields), V)
        for fields in ({}, {"attn_lora_rank": 2, "embed_lora_rank": 2})
    )
    low.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        before = plain(IDX)
        assert torch.equal(low(IDX), before)
        x = low.norm(torch.randn(8))
        low.embed.lora_b.add_(1.0)  # type: ignore[operator, union-attr]
        head = F.linear(x, low.output_weight())
        assert torch.allclose(head, x @ (low.embed.effective_weight() if tied else low.head.weight).T)  # type: ignore[operator, union-attr]
        assert not torch.allclose(low(IDX), before)


def test_a_frozen_layer_does_not_change_and_passes_gradients_on() -> None:
    model, _ = trained(config(optimizer="adamw", frozen=(1,)), 0)
    before = weights(model)
    optimizers = Optimizers(model.cfg, model)
    gradients(model, 1)
    optimizers.step(at(model.cfg, lr=0.1, lr_aux=0.1, weight_decay=0.5))
    for name, w in weights(model).items():
        assert torch.equal(w, before[name]) == name.startswith("blocks.1."), name
    assert not any("blocks.1" in name for name in optimizers.state())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_all_layers_can_be_frozen(optimizer: str) -> None:
    model = shaken(config(optimizer=optimizer, frozen=(0, 1)), dtype=torch.float32)
    optimizers = Optimizers(model.cfg, model)
    before = model.embed.weight.detach().clone()
    gradients(model, 1)
    optimizers.step(at(model.cfg))
    assert not torch.equal(model.embed.weight, before)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_unused_ids_have_probability_zero_and_no_gradient(softcap: float) -> None:
    plain, model = (
        shaken(config(softcap=softcap, tie_head=False, **more), dtype=torch.float32)
        for more in ({}, {"unused_ids": 3})
    )
    model.load_state_dict(
        {
            n: F.pad(w, (0, 0, 0, 3), value=0.5) if w.shape[0] == V else w
            for n, w in plain.state_dict().items()
        }
    )
    logits, expected = model(IDX), plain(IDX)
    assert (
        logits.shape[-1] == V + 3
        and torch.equal(logits[..., :V], expected)
        and (logits[..., V:] == -torch.inf).all()
    )
    losses = [cross_entropy(x.flatten(0, 1), IDX.flatten(), 0.0)[0] for x in (logits, expected)]
    assert torch.allclose(losses[0], losses[1])
    losses[0].backward()
    for table in (model.embed, model.head):
        assert table is not None and table.weight.grad is not None and table.weight.grad.isfinite().all()
        assert not table.weight.grad[V:].any() and table.weight.grad[:V].any()
    for field in ({"label_smoothing": 0.1}, {"rdrop": 0.5, "dropout": 0.1}):
        with pytest.raises(
            ConfigError,
            match=r"unused_ids=3 and (rdrop|label_smoothing)=0\.[15] cannot.*; set one of them",
        ):
            config(unused_ids=3, **field)


def test_disabled_layers_change_nothing() -> None:
    plain, other = (
        build(config(**fields), V)
        for fields in ({}, {"top_k": 1, "router_weights": "softmax", "lora_alpha": 2.0})
    )
    assert all(torch.equal(w, weights(other)[n]) for n, w in weights(plain).items()) and torch.equal(
        plain(IDX), other(IDX)
    )
    assert not [n for n in weights(plain) if "lora" in n or "expert" in n or "router" in n]


def test_all_layers_together_are_estimated_counted_and_trained() -> None:
    cfg = from_dict(SMALL | LATE | {"optimizer": "muon", "momentum": 0.9, "d_model": 16})
    with torch.device("meta"):
        model = GPT(cfg, cfg.vocab_size)
    expected_size = size(cfg)
    assert expected_size.params == sum(p.numel() for p in model.parameters())
    assert expected_size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 2}
    multiplied = {n: count for n, count in matrices.items() if not n.startswith(("positions", "embed"))}
    if cfg.tie_head:
        multiplied |= {n: count for n, count in matrices.items() if n.startswith("embed")}
    experts = sum(count for n, count in multiplied.items() if ".experts." in n)
    active = sum(multiplied.values()) - experts + experts * cfg.top_k // cfg.experts
    attention = 12 * cfg.n_layer * cfg.n_head * cfg.head_width * cfg.block_size
    assert expected_size.flops == 6 * active + attention
    device = Device(cfg)
    device.settle(cfg, Plan(cfg, 10_000))
    more = estimate_memory(Plan(cfg.changed(experts=32), 10**6), device, cfg.vocab_size) - estimate_memory(
        Plan(cfg, 10**6), device, cfg.vocab_size
    )
    extra_params = size(cfg.changed(experts=32)).params - expected_size.params
    assert 2 * 4 * extra_params < more < 6 * 4 * extra_params, (
        "weights, gradients, momentum; half of the layers are frozen"
    )
    live, optimizers = trained(cfg, 2, torch.float32)
    assert live(probe(V, 8, 1)).isfinite()[..., :V].all() and optimizers.state()
