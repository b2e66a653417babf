"""Compare the optimizer state after each operation with gradients, wide runs and known mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import examples, slow_unless
from growing import (
    IDX,
    MODERN,
    architectures,
    at,
    config,
    go_on,
    gradients,
    grown,
    op,
    shaken,
    steps,
    trained,
    weights,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainrun.config import TrainConfig
from mainrun.core.optimizers import Optimizers
from mainrun.growth.moments import IndexMap, Piece, WidthFactors, scaled, transfer, width_factors
from mainrun.growth.verify import equal_copies, logit_change
from mainrun.plan.ops import Op, Transfer
from mainrun.train import GPT

ADAMW: dict[str, Any] = {"optimizer": "adamw"}


def upcycle_to_all_experts(cfg: TrainConfig, **value: Any) -> Op | None:
    """Return an op whose zero router chooses all experts, so the gradient is evenly split among them."""
    if cfg.experts or cfg.mlp_lora_rank:
        return None
    return op(
        "upcycle_moe", {"experts": 4, "top_k": 4, "router": "zero"} | value, optimizer=Transfer("asymmetric")
    )


OPS = {
    "split hidden units": lambda c: op("widen_mlp", 20),
    "new hidden units": lambda c: op("widen_mlp", 20, init="identity"),
    "wider": lambda c: op("widen_model", {"factor": 3}),
    "wider, the same keys and values": lambda c: op("widen_model", {"factor": 2, "kv": "keep"}),
    "heads": lambda c: op("add_heads", 8),
    "experts": upcycle_to_all_experts,
    "shards of experts": lambda c: upcycle_to_all_experts(c, shards=2),
    "experts, softmax weights": lambda c: upcycle_to_all_experts(c, shards=2, router_weights="softmax"),
    "rank": lambda c: op("set_attn_lora_rank", c.attn_lora_rank + 2),
    "rank in the MLPs": lambda c: None if c.experts else op("set_mlp_lora_rank", c.mlp_lora_rank + 2),
    "rank of the embedding": lambda c: op("set_embedding_lora_rank", c.embed_lora_rank + 2),
    "merge": lambda c: op("merge_lora_weights") if c.has_low_rank else None,
    "ids": lambda c: op("resize_vocabulary", 500),
    "layers": lambda c: op("stack_layers", (*range(c.n_layer), 0), init="identity"),
}


@pytest.mark.parametrize("name", OPS)
@given(architectures, st.integers(0, 100))
@settings(max_examples=examples(8))
def test_the_gradient_of_a_copy_has_the_factor_of_the_index_map(
    name: str, fields: dict[str, Any], seed: int
) -> None:
    model = shaken(config(**fields), seed)
    what = OPS[name](model.cfg)
    assume(what is not None)
    new, moved = grown(model, what)
    gradients(model, 5)
    gradients(new, 5)
    checked = 0
    for tensor, piece in moved.pieces.items():
        if piece.source is None or piece.grad is None:
            continue
        before, now = model.get_parameter(piece.source).grad, new.get_parameter(tensor).grad
        assert before is not None and now is not None
        known = piece.known(now.shape)
        assert torch.allclose(
            now[known], scaled(piece.take(before), piece.grad)[known], atol=1e-12, rtol=1e-7
        ), tensor
        checked += int(known.sum())
    assert checked > 0.2 * sum(shape.numel() for shape in moved.new.values())


# -- width


def adamw_by_name(model: GPT, state: dict[str, Tensor], rate: dict[str, WidthFactors]) -> torch.optim.AdamW:
    """Return an AdamW with separate learning rates, weight decays and eps values for each parameter."""
    groups = []
    for name, p in model.named_parameters():
        r = rate.get(name, WidthFactors(1.0, 1.0, 1.0))
        decay = 0.1 * r.weight_decay if p.ndim == 2 else 0.0
        groups.append({"params": [p], "lr": 0.01 * r.lr, "weight_decay": decay, "eps": 1e-8 * r.eps})
    made = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for name, p in model.named_parameters():
        made.state[p] = {k.rsplit("/", 1)[1]: v.clone() for k, v in state.items() if k.split("/")[1] == name}
    return made


WIDE = {
    "baseline": ({"tie_head": True}, {"factor": 2}),
    "modern": (MODERN, {"factor": 3}),
    "shared keys": (
        {"n_head": 4, "n_kv_head": 2, "position": "rope", "tie_head": True, "mlp": "relu2"},
        {"factor": 2, "kv": "keep"},
    ),
    "low rank everywhere": (
        {"mlp": "swiglu", "attn_lora_rank": 2, "mlp_lora_rank": 3, "embed_lora_rank": 2, "lora_alpha": 2.0},
        {"factor": 2},
    ),
    "experts and low rank": (
        {"experts": 4, "attn_lora_rank": 2, "embed_lora_rank": 2, "lora_alpha": 2.0, "tie_head": False},
        {"factor": 2},
    ),
}


@pytest.mark.parametrize("name", slow_unless([*WIDE][:2], WIDE))
@pytest.mark.parametrize("fault", ["", "unscaled moments", "unscaled rates"])
def test_a_wide_run_follows_the_narrow_one(name: str, fault: str) -> None:
    """If moments and rates are scaled, the wide and the narrow run agree to 1e-10 over 20 steps of AdamW."""
    fields, value = WIDE[name]
    model, optimizers = trained(config(**ADAMW, **fields), 5)
    state = optimizers.state()
    wide, moved = grown(model, op("widen_model", value))
    wide_state, coverage = transfer(state, moved, "keep" if fault == "unscaled moments" else "scale")
    assert coverage == 1
    one = adamw_by_name(model, state, {})
    two = adamw_by_name(wide, wide_state, {} if fault == "unscaled rates" else width_factors(moved))
    apart = 0.0
    for seed in range(20):
        a, b = gradients(model, 50 + seed), gradients(wide, 50 + seed)
        apart = max(apart, abs(float(a - b)))
        one.step()
        two.step()
    assert (apart <= 1e-10 and logit_change(model, wide, IDX)[0] <= 1e-10) != bool(fault), apart


def test_widening_divides_m_by_n_and_v_by_n_squared_except_in_the_head() -> None:
    for tied in (True, False):
        model, optimizers = trained(config(**ADAMW, tie_head=tied))
        _, moved = grown(model, op("widen_model", {"factor": 2}))
        before, (after, coverage) = optimizers.state(), transfer(optimizers.state(), moved)
        assert coverage == 1 and after.keys() == {
            f"optimizer/{n}/{k}" for n in moved.new for k in ("exp_avg", "exp_avg_sq", "step")
        }
        for name in moved.new:
            factor = 1.0 if name == "head.weight" or (tied and name in ("norm.weight", "norm.bias")) else 0.5
            m, v, step = (f"optimizer/{name}/{key}" for key in ("exp_avg", "exp_avg_sq", "step"))
            times = (
                (1, 2)
                if name in ("embed.weight", "positions.weight", "head.weight")
                else (2,) * before[m].ndim
            )
            assert torch.allclose(after[m], before[m].tile(times) * factor, atol=1e-15), name
            assert torch.allclose(after[v], before[v].tile(times) * factor**2, atol=1e-18), name
            assert after[step] == before[step] == 3


def test_the_copies_of_a_unit_get_their_share_of_the_moments() -> None:
    model, optimizers = trained(config(**ADAMW))
    _, moved = grown(model, op("widen_mlp", 20))
    before, (after, coverage) = optimizers.state(), transfer(optimizers.state(), moved)
    units, share = (
        moved.pieces["blocks.0.mlp.up.weight"].index[0],
        moved.pieces["blocks.0.mlp.down.weight"].weight,
    )
    assert units is not None and isinstance(share, Tensor) and coverage == 1
    up, down = "optimizer/blocks.0.mlp.up.weight/", "optimizer/blocks.0.mlp.down.weight/"
    assert torch.allclose(after[up + "exp_avg"], before[up + "exp_avg"][units] * share.unsqueeze(1))
    assert torch.allclose(
        after[up + "exp_avg_sq"], before[up + "exp_avg_sq"][units] * share.unsqueeze(1) ** 2
    )
    assert torch.equal(after[down + "exp_avg"], before[down + "exp_avg"][:, units])


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("sgd", 0.0), ("muon", 0.9)])
def test_momentum_is_scaled_like_m(optimizer: str, momentum: float) -> None:
    model, optimizers = trained(
        config(optimizer=optimizer, momentum=momentum, tie_head=False), dtype=torch.float32
    )
    before = optimizers.state()
    new, after, moved = go_on(model, optimizers, op("widen_model", {"factor": 2}))
    name = "optimizer/blocks.0.mlp.up.weight/momentum_buffer"
    assert (name in before) == bool(momentum)
    if momentum:
        assert torch.allclose(after.state()[name], before[name].tile(2, 2) / 2)
    state, coverage = transfer(before, moved)
    assert coverage == 1 and state.keys() == after.state().keys()
    steps(new, after, range(2))


# -- modes and coverage


def test_each_mode_keeps_the_state_that_it_promises() -> None:
    model, optimizers = trained(config(**ADAMW))
    new, moved = grown(model, op("widen_model", {"factor": 2}))
    state = optimizers.state()
    scale, auto, keep, reset, apart = (
        transfer(state, moved, mode) for mode in ("scale", "auto", "keep", "reset", "asymmetric")
    )
    m, v = "optimizer/blocks.0.attn.q.weight/exp_avg", "optimizer/blocks.0.attn.q.weight/exp_avg_sq"
    assert all(torch.equal(scale[0][k], auto[0][k]) for k in scale[0])
    assert torch.equal(keep[0][m], state[m].tile(2, 2)) and torch.equal(keep[0][v], state[v].tile(2, 2))
    assert reset == ({}, 0.0)
    expected = scale[0][m].clone()
    expected[8:], expected[:, 8:] = 0, 0
    assert torch.equal(apart[0][m], expected) and torch.equal(apart[0][v], scale[0][v])
    kept = sum(moved.old[n].numel() for n in moved.old)
    assert apart[1] == pytest.approx(kept / sum(s.numel() for s in moved.new.values()))
    with pytest.raises(ValueError, match="mode='half' is not allowed; use auto, keep"):
        transfer(state, moved, "half")
    assert new.cfg.d_model == 16


def test_asymmetric_keeps_the_momentum_of_the_first_copy_of_the_experts() -> None:
    model, optimizers = trained(config(**ADAMW))
    _, moved = grown(model, op("upcycle_moe", {"experts": 4, "top_k": 2, "shards": 2}))
    state, _ = transfer(optimizers.state(), moved, "asymmetric")
    m = [state[f"optimizer/blocks.0.mlp.experts.{e}.up.weight/exp_avg"] for e in range(4)]
    # Experts 0 and 1 are the two shards of the MLP, and experts 2 and 3 are their copies.
    assert m[0].all() and m[1].all() and not m[2].any() and not m[3].any()
    assert not any("router" in name for name in state), "a router is new"


def test_coverage_is_the_share_of_elements_and_has_a_minimum() -> None:
    model, optimizers = trained(config(**ADAMW))
    new, moved = grown(model, op("stack_layers", (0, 1, 1), init="identity"))
    state, coverage = transfer(optimizers.state(), moved)
    total, added = (
        sum(p.numel() for p in new.parameters()),
        sum(p.numel() for p in new.blocks[2].parameters()),
    )
    assert coverage == pytest.approx(1 - added / total) and not any("blocks.2" in name for name in state)
    with pytest.raises(
        ValueError,
        match=r"72\.1% of the optimizer's state was transferred, but min_coverage=0.9 requires more",
    ):
        transfer(optimizers.state(), moved, min_coverage=0.9)
    assert transfer(optimizers.state(), moved, "reset", min_coverage=0.9) == ({}, 0.0), (
        "a reset needs no coverage"
    )
    assert transfer({}, moved, min_coverage=0.9) == ({}, 1.0), "before the first step there is no state"


def test_a_copied_layer_keeps_its_moments_and_a_frozen_one_has_none() -> None:
    model, optimizers = trained(config(**ADAMW))
    _, moved = grown(model, op("stack_layers", (0, 0, 1)))
    state, coverage = transfer(optimizers.state(), moved)
    name = "blocks.{}.mlp.up.weight/exp_avg"
    assert coverage == 1 and torch.equal(
        state["optimizer/" + name.format(1)], optimizers.state()["optimizer/" + name.format(0)]
    )
    frozen, held, moved = go_on(model, optimizers, op("freeze_layer", 0), count=2)
    assert transfer(optimizers.state(), moved)[1] == 1, "only trainable parameters count"
    assert not any("blocks.0." in n for n in held.state())
    assert torch.equal(frozen.blocks[0].mlp.up.weight, model.blocks[0].mlp.up.weight)
    _, thawed, moved = go_on(frozen, held, op("unfreeze_layer", 0), count=1)
    assert (
        thawed.state()["optimizer/blocks.0.mlp.up.weight/step"] == 1
        and thawed.state()["optimizer/blocks.1.mlp.up.weight/step"] == 6
    )
    assert transfer(held.state(), moved)[1] < 0.8


def test_merging_drops_the_moments_of_the_low_rank_term() -> None:
    model, optimizers = trained(config(**ADAMW, attn_lora_rank=2, embed_lora_rank=2))
    _, moved = grown(model, op("merge_lora_weights"))
    state, coverage = transfer(optimizers.state(), moved)
    assert coverage == 1 and not any("lora" in name for name in state)
    name = "optimizer/embed.weight/exp_avg"
    assert torch.equal(state[name], optimizers.state()[name])


# -- known mistakes


def test_trap_state_looked_up_by_position_or_identity() -> None:
    """Looking up optimizer state by position or identity finds nothing and raises no error."""
    model, optimizers = trained(config(**ADAMW))
    new, moved = grown(model, op("widen_model", {"factor": 2}))
    by_position = {f"optimizer/{i}/exp_avg": v for i, v in enumerate(optimizers.state().values())}
    by_identity = {id(p): s for o in optimizers.all for p, s in o.state.items()}
    assert not [s for p in new.parameters() if (s := by_identity.get(id(p)))], (
        "the faulty lookup returns nothing and raises no error"
    )
    for wrong in (by_position, by_identity, {"optimizer/blocks.0.mlp.up.weight/exp_max": torch.zeros(12, 8)}):
        with pytest.raises(ValueError, match="belongs to no parameter of the model before the operation"):
            transfer(wrong, moved)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has shape \(3,\), but its parameter has shape \(12, 8\)"):
        transfer({"optimizer/blocks.0.mlp.up.weight/exp_avg": torch.zeros(3)}, moved)


def first_update(model: GPT, optimizers: Optimizers, seed: int = 0) -> dict[str, Tensor]:
    """Return the updates of one step, divided by the learning rate, for random gradients of size 1."""
    before, generator = weights(model), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizers.step(at(model.cfg, lr=1e-3, lr_aux=1e-3, weight_decay=0.0))
    return {name: (before[name] - w).abs() / 1e-3 for name, w in weights(model).items()}


@pytest.mark.parametrize(("beta2", "overshoot"), [(0.999, 3.16), (0.95, 0.447)])
@pytest.mark.parametrize("name", ["new hidden units", "heads", "rank", "ids", "layers"])
def test_trap_a_second_moment_of_zero_at_a_large_step_count(
    name: str, beta2: float, overshoot: float
) -> None:
    """The first update of a new element is at most the learning rate, even after 10,000 optimizer steps."""
    model = shaken(config(**ADAMW, beta2=beta2, attn_lora_rank=2))
    shapes = {n: p.shape for n, p in model.named_parameters()}
    state = {f"optimizer/{n}/step": torch.tensor(10_000.0) for n in shapes}
    state |= {f"optimizer/{n}/exp_avg": torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
    state |= {f"optimizer/{n}/exp_avg_sq": torch.ones(s, dtype=torch.float64) for n, s in shapes.items()}
    new, moved = grown(model, OPS[name](model.cfg))
    new_state, _ = transfer(state, moved)
    optimizers = Optimizers(new.cfg, new)
    optimizers.load(new_state)
    updates = first_update(new, optimizers)
    fresh = {n: ~piece.known(moved.new[n]) for n, piece in moved.pieces.items()}
    partial = {n for n, mask in fresh.items() if mask.any() and not mask.all()}
    assert partial or name == "layers"
    for n, mask in fresh.items():
        assert not mask.any() or updates[n][mask].max() <= 1.0 + 1e-6, n
    for seed in range(1, 11):  # later updates stay below 2.5 times the learning rate
        later = first_update(new, optimizers, seed)
        assert all(later[n].max() < 2.5 for n in fresh), seed
    for n in partial:  # plant the mistake: set the second moment to zero
        faulty, _ = grown(model, OPS[name](model.cfg))
        zero = {k: v.clone() for k, v in new_state.items()}
        zero[f"optimizer/{n}/exp_avg_sq"][fresh[n]] = 0
        held = Optimizers(faulty.cfg, faulty)
        held.load(zero)
        assert first_update(faulty, held)[n][fresh[n]].max() == pytest.approx(overshoot, rel=0.01), n


def test_a_new_tensor_has_its_own_step_count() -> None:
    model, optimizers = trained(config(**ADAMW), 4)
    _, held, _ = go_on(model, optimizers, op("set_attn_lora_rank", 2), count=1)
    state = held.state()
    assert (
        state["optimizer/blocks.0.attn.q.lora_b/step"] == 1
        and state["optimizer/blocks.0.attn.q.weight/step"] == 5
    )


def test_a_partly_new_tensor_with_a_zero_second_moment_starts_empty() -> None:
    piece = Piece("w", (torch.tensor([0, 1, -1]), None))
    moved = IndexMap({"w": piece}, {"w": torch.Size((2, 2))}, {"w": torch.Size((3, 2))})
    state = {
        "optimizer/w/exp_avg": torch.zeros(2, 2),
        "optimizer/w/exp_avg_sq": torch.zeros(2, 2),
        "optimizer/w/step": torch.tensor(9.0),
    }
    assert transfer(state, moved) == ({}, 0.0)


@pytest.mark.parametrize("mode", ["scale", "keep", "reset"])
def test_trap_copies_that_never_diverge(mode: str) -> None:
    """Copies stay equal if their moments are copied, and also if the optimizer state is reset."""
    model, optimizers = trained(config(**ADAMW, **MODERN))
    new, _, moved = go_on(model, optimizers, op("widen_model", {"factor": 2}), mode, count=10)
    assert set(equal_copies(moved, new)) == {name for name, *_ in moved.copies()}


@pytest.mark.parametrize(("mode", "noise"), [("scale", {"noise_snr_db": 20.0}), ("asymmetric", {})])
@pytest.mark.parametrize("fields", [{}, MODERN], ids=["baseline", "modern"])
def test_paired_noise_or_the_asymmetric_mode_makes_copies_diverge(
    mode: str, noise: dict[str, Any], fields: dict[str, Any]
) -> None:
    model, optimizers = trained(config(**ADAMW, **fields))
    new, _, moved = go_on(model, optimizers, op("widen_model", {"factor": 2, **noise}), mode, count=10)
    assert len(list(moved.copies())) >= 12 and equal_copies(moved, new) == []


def test_width_factors_exist_only_for_tensors_scaled_as_a_whole() -> None:
    model = shaken(config(tie_head=True))
    _, moved = grown(model, op("widen_model", {"factor": 2}))
    factors = width_factors(moved)
    assert factors["blocks.0.mlp.up.weight"] == WidthFactors(0.5, 2.0, 0.5) and factors[
        "embed.weight"
    ] == WidthFactors(1.0, 1.0, 0.5)
    assert factors["norm.weight"] == WidthFactors(0.5, 2.0, 1.0) and factors[
        "blocks.0.mlp_norm.weight"
    ] == WidthFactors(1.0, 1.0, 0.5)
    _, moved = grown(model, op("widen_mlp", 20))
    assert "blocks.0.mlp.down.weight" not in width_factors(moved)
