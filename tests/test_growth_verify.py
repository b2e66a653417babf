"""The checks after an op: each passes on what is right, and each is seen to fail on what it is there for."""

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


def test_the_probe_is_the_seeds() -> None:
    assert torch.equal(probe(V, 8, 1), probe(V, 8, 1)) and not torch.equal(probe(V, 8, 1), probe(V, 8, 2))
    assert probe(50, 200, 1).max() == 49 and probe(50, 200, 1).shape == (4, 200)


def test_logits_are_compared_in_eval_mode_and_the_modes_come_back() -> None:
    model = shaken(config(dtype="bfloat16"), dtype=torch.float32).train()
    other = shaken(config(dtype="bfloat16"), dtype=torch.float32)
    assert logit_change(model, other, IDX)[0] == 0 and model.training and not other.training
    with torch.no_grad():
        other.embed.weight.add_(1e-4)
    assert 0 < logit_change(model, other, IDX, full=True)[0] < 0.05, (
        "in full precision, whatever the config computes in"
    )
    assert model.cfg.dtype == "bfloat16" and model(IDX).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_exact_is_to_rounding_and_bit_exact_to_the_bit(dtype: torch.dtype, most: float) -> None:
    model, other = shaken(config(), dtype=dtype), shaken(config(), dtype=dtype)
    assert check_function("bitexact", model, other, IDX).ok and check_function("exact", model, other, IDX).ok
    size = logit_change(model, other, IDX)[1]
    for part, exact in ((0.3, True), (30.0, False)):
        with torch.no_grad():
            other.norm.weight.copy_(model.norm.weight * (1 + part * most))  # type: ignore[operator, union-attr]
        assert not check_function("bitexact", model, other, IDX).ok
        found = check_function("exact", model, other, IDX)
        assert found.ok == exact and "max |delta logits|" in found.detail and size > 0.3
    assert check_function("none", model, other, IDX).ok and check_function("approx", model, other, IDX).ok
    with torch.no_grad():
        other.embed.weight[0, 0] = math.nan
    assert not any(
        check_function(promise, model, other, IDX).ok for promise in ("none", "approx", "exact", "bitexact")
    )


def test_coverage_under_its_least_fails() -> None:
    assert check_coverage(0.9, 0.9).ok and not check_coverage(0.89, 0.9).ok


def test_tied_tensors_stay_tied() -> None:
    for tie in (True, False):
        model = shaken(config(tie_head=tie))
        new, _ = grown(model, op("widen_model", {"factor": 2}))
        assert check_tying(model.cfg, new).ok
        assert not check_tying(model.cfg.changed(tie_head=not tie), new).ok
    tie = shaken(config(tie_head=True))
    tie.head = nn.Linear(8, V, bias=False).double()  # a head of its own that begins as the embedding
    tie.head.weight.data.copy_(tie.embed.weight)
    assert not check_tying(tie.cfg, tie).ok
    apart = shaken(config(tie_head=False))
    assert apart.head is not None
    apart.head.weight.data = apart.embed.weight.data  # two names, one memory
    assert not check_tying(apart.cfg, apart).ok


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_each_tensor_that_trains_is_in_one_group(optimizer: str) -> None:
    model = shaken(config(optimizer=optimizer, experts=2, attn_lora_rank=2, embed_lora_rank=2))
    new, _ = grown(model, op("freeze_layer", 0))
    held = Optimizers(new.cfg, new)
    assert check_groups(new, held).ok
    assert not check_groups(new, Optimizers(model.cfg, model)).ok, "tensors of the model before"
    names = {p: n for n, p in new.named_parameters()}
    found = {names[p]: group["rate"] for o in held.all for group in o.param_groups for p in group["params"]}
    assert (
        found["blocks.1.mlp.router.weight"] == "lr_aux" and found["blocks.1.mlp.experts.1.up.weight"] == "lr"
    )
    assert (
        found["blocks.1.attn.q.lora_a"] == "lr"
        and found["embed.lora_a"] == "lr_aux"
        and not any("blocks.0" in n for n in found)
    )
    inner = held.all[0].param_groups[0]["params"]
    for more in (
        new.get_parameter("blocks.1.attn.q.weight"),
        nn.Parameter(torch.zeros(2, 2)),
    ):  # one twice, and a stranger
        inner.append(more)
        assert not check_groups(new, held).ok
        del inner[-1]
        assert check_groups(new, held).ok
    inner.clear()
    assert not check_groups(new, held).ok, "none"


# -- locks


def test_trap_a_zero_router_locks() -> None:
    """Ties choose the same k for all, the router's gradient is zero to the bit, the others never move."""
    model, optimizers = trained(config(optimizer="adamw"))
    what = op("upcycle_moe", {"experts": 4, "top_k": 2} | ZERO, optimizer=ASYMMETRIC)
    new, held, _ = go_on(model, optimizers, what, "scale", count=5)  # as if nothing broke the tie
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
    for way, mode in ((what, "asymmetric"), (op("upcycle_moe", {"experts": 4, "noise_snr_db": 20.0} | ZERO), "scale"),
                      (op("upcycle_moe", {"experts": 4, "router_std": 0.02}), "scale")):  # fmt: skip
        new, _, moved = go_on(model, optimizers, way, mode, count=5)
        assert locked_routers(new, MANY) == [], (way, mode)
        assert not [name for name in equal_copies(moved, new) if ".experts." in name]
    assert held.state()


def test_trap_one_renormalised_expert_gives_the_router_no_gradient() -> None:
    for weights_are, learns in (("renormalised", False), ("softmax", True)):
        model = shaken(config(experts=4, top_k=1, router_weights=weights_are))
        gradients(model, 1)
        grad = model.get_parameter("blocks.0.mlp.router.weight").grad
        assert grad is not None and bool(grad.any()) == learns
        assert [("top_k=2 or softmax" in found) for found in locked_routers(model, MANY)] == [True, True] * (
            not learns
        )


def test_units_that_are_split_evenly_lock_and_unevenly_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers = trained(config(optimizer="adamw"))
    new, _, moved = go_on(model, optimizers, op("widen_mlp", 20), count=5)
    assert list(moved.copies()) and equal_copies(moved, new) == []
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.zeros(n, dtype=torch.float64))
    new, _, moved = go_on(model, optimizers, op("widen_mlp", 20), count=5)
    assert equal_copies(moved, new) == ["blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"]


# -- the four checks of a staged growth


def test_rope_integrity_sees_another_width_of_a_head() -> None:
    for fields in ({"position": "rope"}, {}):
        model = shaken(config(**fields))
        new, _ = grown(model, op("widen_model", {"factor": 2}))
        assert check_rope(model, new).ok
        other = GPT(new.cfg.changed(n_head=2), V).double()  # as wide, with heads twice as wide
        assert not check_rope(model, other).ok
    model = shaken(config(position="rope"))
    new, _ = grown(model, op("widen_model", {"factor": 2}))
    other = GPT(new.cfg.changed(rope_theta=50.0), V).double()
    assert not check_rope(model, other).ok, "another table"


def test_the_router_is_as_sure_as_it_was() -> None:
    model = shaken(config(experts=4))
    new, _ = grown(model, op("widen_model", {"factor": 2}))
    assert check_router_scale(model, new, MANY).ok and set(router_inputs(new, MANY)) == {
        "blocks.0.mlp",
        "blocks.1.mlp",
    }
    with torch.no_grad():  # tiled without its 1/n
        new.get_parameter("blocks.1.mlp.router.weight").mul_(2)
    assert not check_router_scale(model, new, MANY).ok
    dense = shaken(config())
    assert check_router_scale(dense, grown(dense, op("upcycle_moe", {"experts": 4}))[0], MANY).ok


def test_heads_diverge_or_are_named() -> None:
    model, optimizers = trained(config(optimizer="adamw"))
    for noise, parted in (({}, False), ({"noise_snr_db": 20.0}, True)):
        new, _, moved = go_on(model, optimizers, op("widen_model", {"factor": 2, **noise}), count=5)
        found = check_symmetry(moved, new)
        assert found.ok == parted and ("blocks.0.attn.q.weight" in equal_copies(moved, new)) != parted
        assert ("are locked: blocks.0" in found.detail) != parted


def test_an_inserted_layer_gives_back_what_it_gets() -> None:
    model = shaken(config(**MODERN))
    for what, ok in (
        (op("stack_layers", (0, 1, 1), init="identity"), True),
        (op("stack_layers", (0, 1, 1)), False),
    ):
        new, _ = grown(model, what)
        found = check_layer_identity(new, (2,), IDX)
        assert found.ok == ok and ("layers 2 change" in found.detail) != ok
    assert not check_layer_identity(new, (0, 2), IDX).ok


# -- a checkpoint of a grown model


def test_trap_a_state_is_not_loaded_into_the_model_that_it_has_outgrown() -> None:
    """By the names of the first architecture alone it would load, and the grown layers would be gone."""
    model, optimizers = trained(config(optimizer="adamw"))
    new, held, _ = go_on(model, optimizers, op("stack_layers", (0, 0, 1, 1)), count=1)
    state = State(new.cfg, new)
    state.optimizers = held
    saved = {name: tensor.detach().clone() for name, tensor in state.tensors().items()}
    first = shaken(model.cfg)
    with torch.no_grad():  # the faulty way: nothing is missing, so nothing is said
        for name, p in first.named_parameters():
            p.copy_(saved[f"model/{name}"])
    assert len(first.blocks) == 2 and logit_change(new, first, IDX)[0] > 0.01
    with pytest.raises(RunError, match=r"the state holds model/blocks\.2.*build the model as it was"):
        State(model.cfg, shaken(model.cfg)).load(saved, 4, 0)
    again = State(new.cfg, GPT(new.cfg, V).double().eval())
    again.load(saved, 4, 0)
    assert all(torch.equal(w, weights(new)[n]) for n, w in weights(again.model).items())
    steps(new, held, range(7, 9))
    steps(again.model, again.optimizers, range(7, 9))
    assert all(torch.equal(w, weights(new)[n]) for n, w in weights(again.model).items()), (
        "and it goes on to the bit"
    )
    assert at(new.cfg).lr and transfer({}, grown(new, op("freeze_layer", 0))[1])[1] == 1
