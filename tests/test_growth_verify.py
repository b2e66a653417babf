"""Each check of a grown model passes for a correct operation and fails for a known mistake."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from growing import IDX, MODERN, V, at, config, go_on, gradients, grown, op, shaken, steps, trained, weights
from torch import nn

from mainrun.core.optimizers import Optimizers
from mainrun.errors import RunError
from mainrun.growth.moments import transfer
from mainrun.growth.verify import (
    check_coverage,
    check_function,
    check_groups,
    check_layer_identity,
    check_rope,
    check_router_scale,
    check_symmetry,
    check_tying,
    equal_copies,
    locked_routers,
    logit_change,
    probe,
    router_inputs,
)
from mainrun.plan.ops import Transfer
from mainrun.train import GPT, State

MANY = probe(V, 8, seed=3, rows=32)
ZERO: dict[str, Any] = {"router": "zero"}
ASYMMETRIC = Transfer("asymmetric")


def test_a_probe_depends_on_its_seed_only() -> None:
    assert torch.equal(probe(V, 8, 1), probe(V, 8, 1)) and not torch.equal(probe(V, 8, 1), probe(V, 8, 2))
    assert probe(50, 200, 1).max() == 49 and probe(50, 200, 1).shape == (4, 200)


def test_logits_are_compared_in_eval_mode_and_the_mode_is_restored() -> None:
    model = shaken(config(dtype="bfloat16"), dtype=torch.float32).train()
    other = shaken(config(dtype="bfloat16"), dtype=torch.float32)
    assert logit_change(model, other, IDX)[0] == 0 and model.training and not other.training
    with torch.no_grad():
        other.embed.weight.add_(1e-4)
    assert 0 < logit_change(model, other, IDX, full=True)[0] < 0.05, "full=True computes in float32"
    assert model.cfg.dtype == "bfloat16" and model(IDX).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_exact_allows_rounding_and_bitexact_allows_nothing(dtype: torch.dtype, most: float) -> None:
    model, other = shaken(config(), dtype=dtype), shaken(config(), dtype=dtype)
    assert check_function("bitexact", model, other, IDX).ok and check_function("exact", model, other, IDX).ok
    size = logit_change(model, other, IDX)[1]
    for part, exact in ((0.3, True), (30.0, False)):
        with torch.no_grad():
            other.norm.weight.copy_(model.norm.weight * (1 + part * most))  # type: ignore[operator, union-attr]
        assert not check_function("bitexact", model, other, IDX).ok
        check = check_function("exact", model, other, IDX)
        assert check.ok == exact and "max |delta logits|" in check.detail and size > 0.3
    assert check_function("none", model, other, IDX).ok and check_function("approx", model, other, IDX).ok
    with torch.no_grad():
        other.embed.weight[0, 0] = math.nan
    assert not any(
        check_function(promise, model, other, IDX).ok for promise in ("none", "approx", "exact", "bitexact")
    )


def test_coverage_below_the_minimum_fails() -> None:
    assert check_coverage(0.9, 0.9).ok and not check_coverage(0.89, 0.9).ok


def test_a_tied_head_stays_tied() -> None:
    for tie in (True, False):
        model = shaken(config(tie_head=tie))
        new, _ = grown(model, op("widen_model", {"factor": 2}))
        assert check_tying(model.cfg, new).ok
        assert not check_tying(model.cfg.changed(tie_head=not tie), new).ok
    tie = shaken(config(tie_head=True))
    tie.head = nn.Linear(8, V, bias=False).double()  # this head copies the embedding but shares no memory
    tie.head.weight.data.copy_(tie.embed.weight)
    assert not check_tying(tie.cfg, tie).ok
    apart = shaken(config(tie_head=False))
    assert apart.head is not None
    apart.head.weight.data = apart.embed.weight.data  # make the two parameters share memory
    assert not check_tying(apart.cfg, apart).ok


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_each_trainable_parameter_is_in_one_group(optimizer: str) -> None:
    model = shaken(config(optimizer=optimizer, experts=2, attn_lora_rank=2, embed_lora_rank=2))
    new, _ = grown(model, op("freeze_layer", 0))
    optimizers_after = Optimizers(new.cfg, new)
    assert check_groups(new, optimizers_after).ok
    assert not check_groups(new, Optimizers(model.cfg, model)).ok, (
        "the groups hold the old model's parameters"
    )
    names = {p: n for n, p in new.named_parameters()}
    rates = {
        names[p]: group["rate"]
        for o in optimizers_after.all
        for group in o.param_groups
        for p in group["params"]
    }
    assert (
        rates["blocks.1.mlp.router.weight"] == "lr_aux" and rates["blocks.1.mlp.experts.1.up.weight"] == "lr"
    )
    assert (
        rates["blocks.1.attn.q.lora_a"] == "lr"
        and rates["embed.lora_a"] == "lr_aux"
        and not any("blocks.0" in n for n in rates)
    )
    inner = optimizers_after.all[0].param_groups[0]["params"]
    # Add a parameter that is already in a group, and then a parameter of another model.
    for more in (new.get_parameter("blocks.1.attn.q.weight"), nn.Parameter(torch.zeros(2, 2))):
        inner.append(more)
        assert not check_groups(new, optimizers_after).ok
        del inner[-1]
        assert check_groups(new, optimizers_after).ok
    inner.clear()
    assert not check_groups(new, optimizers_after).ok, "none"


# -- equal copies, locked routers


def test_trap_a_zero_router_never_moves() -> None:
    """A zero router sends all tokens to the same experts, so it gets no gradient and never changes."""
    model, optimizers = trained(config(optimizer="adamw"))
    what = op("upcycle_moe", {"experts": 4, "top_k": 2} | ZERO, optimizer=ASYMMETRIC)
    # In the mode "scale", all experts stay equal.
    new, optimizers_after, _ = go_on(model, optimizers, what, "scale", count=5)
    assert (
        len(locked_routers(new, MANY)) == 2
        and "all tokens go to the same 2 of 4 experts" in locked_routers(new, MANY)[0]
    )
    router, idle = (
        new.get_parameter("blocks.0.mlp.router.weight"),
        new.get_parameter("blocks.0.mlp.experts.3.up.weight"),
    )
    gradients(new, 1)
    assert router.grad is not None and not router.grad.any() and not router.any()
    assert idle.grad is not None and not idle.grad.any()
    noisy = op("upcycle_moe", {"experts": 4, "noise_snr_db": 20.0} | ZERO)
    random = op("upcycle_moe", {"experts": 4, "router_std": 0.02})
    for way, mode in ((what, "asymmetric"), (noisy, "scale"), (random, "scale")):
        new, _, moved = go_on(model, optimizers, way, mode, count=5)
        assert locked_routers(new, MANY) == [], (way, mode)
        assert not [name for name in equal_copies(moved, new) if ".experts." in name]
    assert optimizers_after.state()


def test_trap_one_renormalised_expert_gives_the_router_no_gradient() -> None:
    for router_weights, learns in (("renormalised", False), ("softmax", True)):
        model = shaken(config(experts=4, top_k=1, router_weights=router_weights))
        gradients(model, 1)
        grad = model.get_parameter("blocks.0.mlp.router.weight").grad
        assert grad is not None and bool(grad.any()) == learns
        assert [("top_k=2 or softmax" in problem) for problem in locked_routers(model, MANY)] == [
            True,
            True,
        ] * (not learns)


def test_copies_with_equal_shares_stay_equal_and_with_unequal_shares_diverge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizers = trained(config(optimizer="adamw"))
    new, _, moved = go_on(model, optimizers, op("widen_mlp", 20), count=5)
    assert list(moved.copies()) and equal_copies(moved, new) == []
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.zeros(n, dtype=torch.float64))
    new, _, moved = go_on(model, optimizers, op("widen_mlp", 20), count=5)
    assert equal_copies(moved, new) == ["blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"]


# -- heads, routers and layers


def test_the_rope_check_fails_for_another_head_width_or_table() -> None:
    for fields in ({"position": "rope"}, {}):
        model = shaken(config(**fields))
        new, _ = grown(model, op("widen_model", {"factor": 2}))
        assert check_rope(model, new).ok
        other = GPT(new.cfg.changed(n_head=2), V).double()  # this model has fewer, wider heads
        assert not check_rope(model, other).ok
    model = shaken(config(position="rope"))
    new, _ = grown(model, op("widen_model", {"factor": 2}))
    other = GPT(new.cfg.changed(rope_theta=50.0), V).double()
    assert not check_rope(model, other).ok, "another rotary table"


def test_the_spread_of_router_scores_is_kept() -> None:
    model = shaken(config(experts=4))
    new, _ = grown(model, op("widen_model", {"factor": 2}))
    assert check_router_scale(model, new, MANY).ok and set(router_inputs(new, MANY)) == {
        "blocks.0.mlp",
        "blocks.1.mlp",
    }
    with torch.no_grad():  # plant the mistake: undo the division of the router by n
        new.get_parameter("blocks.1.mlp.router.weight").mul_(2)
    assert not check_router_scale(model, new, MANY).ok
    dense = shaken(config())
    assert check_router_scale(dense, grown(dense, op("upcycle_moe", {"experts": 4}))[0], MANY).ok


def test_copies_that_stay_equal_are_named() -> None:
    model, optimizers = trained(config(optimizer="adamw"))
    for noise, diverges in (({}, False), ({"noise_snr_db": 20.0}, True)):
        new, _, moved = go_on(model, optimizers, op("widen_model", {"factor": 2, **noise}), count=5)
        check = check_symmetry(moved, new)
        assert check.ok == diverges and ("blocks.0.attn.q.weight" in equal_copies(moved, new)) != diverges
        assert ("tensors: blocks.0" in check.detail) != diverges


def test_an_inserted_layer_returns_its_input() -> None:
    model = shaken(config(**MODERN))
    for what, ok in (
        (op("stack_layers", (0, 1, 1), init="identity"), True),
        (op("stack_layers", (0, 1, 1)), False),
    ):
        new, _ = grown(model, what)
        check = check_layer_identity(new, (2,), IDX)
        assert check.ok == ok and ("layers 2 change" in check.detail) != ok
    assert not check_layer_identity(new, (0, 2), IDX).ok


# -- checkpoints of a grown model


def test_trap_a_grown_state_is_not_loaded_into_the_old_model() -> None:
    """Loading a grown state by the names of the old parameters would lose the new layers without an error."""
    model, optimizers = trained(config(optimizer="adamw"))
    new, optimizers_after, _ = go_on(model, optimizers, op("stack_layers", (0, 0, 1, 1)), count=1)
    state = State(new.cfg, new)
    state.optimizers = optimizers_after
    saved = {name: tensor.detach().clone() for name, tensor in state.tensors().items()}
    first = shaken(model.cfg)
    with torch.no_grad():  # loading by name finds every old parameter, so it raises no error
        for name, p in first.named_parameters():
            p.copy_(saved[f"model/{name}"])
    assert len(first.blocks) == 2 and logit_change(new, first, IDX)[0] > 0.01
    with pytest.raises(RunError, match=r"saved state contains model/blocks\.2.*build the model as it was"):
        State(model.cfg, shaken(model.cfg)).load(saved, 4, 0)
    again = State(new.cfg, GPT(new.cfg, V).double().eval())
    again.load(saved, 4, 0)
    assert all(torch.equal(w, weights(new)[n]) for n, w in weights(again.model).items())
    steps(new, optimizers_after, range(7, 9))
    steps(again.model, again.optimizers, range(7, 9))
    assert all(torch.equal(w, weights(new)[n]) for n, w in weights(again.model).items()), (
        "training continues with the same bits"
    )
    assert at(new.cfg).lr and transfer({}, grown(new, op("freeze_layer", 0))[1])[1] == 1
