"""Compares the trainer with numbers that are worked out by hand.

The tests cover shapes, initial values, masks, losses, parameter groups, gradients, and the rows of one tiny
run.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import Tensor, nn

from mainrun import train as trainer
from mainrun.config import TrainConfig, from_dict
from mainrun.core import attention as attention_module
from mainrun.core.device import Device
from mainrun.core.dropout import Masks, depth_rates, dropout_sites
from mainrun.core.layers import Context, RMSNorm, rope_table, rotate
from mainrun.core.optimizers import Muon, Optimizers, ParamSchedule
from mainrun.core.pending_losses import StepRow, advice
from mainrun.data.tokenizer import EOS
from mainrun.errors import Diverged, Interrupted, RunError
from mainrun.growth.controller import Growth
from mainrun.growth.state import load_state
from mainrun.plan.plan import Plan, StepInputs
from mainrun.plan.seeds import seed_from
from mainrun.run import accounts, session
from mainrun.run.accounts import Accounts
from mainrun.run.progress import Progress
from mainrun.run.session import train
from mainrun.store import checkpoint
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir
from mainrun.train import GPT, Loss, State, TrainStep, build, compute_loss

V = 20  # the size of the vocabulary


pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | {"block_size": 4, "batch_size": 4, "d_model": 8} | changes)


def inputs(cfg: TrainConfig, **changes: Any) -> StepInputs:
    return Plan(cfg, 10_000).at(0)._replace(**changes)


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- the parts of the model


def test_the_rotary_table() -> None:
    cos, sin = rope_table(3, 4, 100.0)  # the two frequencies are 1 and 1/10
    angles = [[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]]
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.allclose(cos, torch.tensor(angles).cos()) and torch.allclose(sin, torch.tensor(angles).sin())


def test_a_rotation_turns_the_halves_against_each_other() -> None:
    cos = torch.tensor([[1.0, 0.0], [0.6, 1.0]])
    sin = torch.tensor([[0.0, 1.0], [0.8, 0.0]])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]).view(1, 1, 2, 4)
    # The halves of each vector are (1, 2) and (3, 4). The second row rotates the pair (1, 3) to 0.6 - 0.8 * 3
    # and 0.6 * 3 + 0.8.
    expected = torch.tensor([[1.0, -4.0, 3.0, 2.0], [-1.8, 2.0, 2.6, 4.0]])
    assert torch.allclose(rotate(x, cos, sin)[0, 0], expected)
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    rows = x.repeat(3, 2, 1, 1)
    tables = [table.expand(3, 1, 2, 2) for table in (cos, sin)]
    assert torch.equal(rotate(rows, *tables), rotate(rows, cos, sin)), "tables may differ from row to row"
    six = torch.arange(6.0).view(1, 1, 1, 6)
    assert rotate(six, torch.zeros(1, 3), torch.ones(1, 3)).flatten().tolist() == [-3, -4, -5, 0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "kind", "names"),
    [
        ({}, nn.LayerNorm, {"weight", "bias"}),
        ({"bias": False}, nn.LayerNorm, {"weight"}),
        ({"norm": "rmsnorm"}, RMSNorm, {"weight"}),
    ],
)
def test_the_norms(fields: dict[str, Any], kind: type, names: set[str]) -> None:
    model = build(config(**fields), V)
    for norm in (model.norm, model.blocks[1].attn_norm, model.blocks[1].mlp_norm):
        assert type(norm) is kind
        assert {n for n, _ in norm.named_parameters()} == names
        assert all(p.shape == (8,) and (p == (n == "weight")).all() for n, p in norm.named_parameters())


def test_cast_goes_down_only_under_autocast() -> None:
    x = torch.ones(2)
    assert trainer.cast(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert trainer.cast(x).dtype == torch.bfloat16


ATTENTION = {"n_head": 4, "n_kv_head": 2, "head_dim": 6, "d_model": 8}


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        (
            {},
            {
                "q.weight": (24, 8),
                "k.weight": (12, 8),
                "v.weight": (12, 8),
                "o.weight": (8, 24),
                "q.bias": (24,),
                "k.bias": (12,),
                "v.bias": (12,),
                "o.bias": (8,),
            },
        ),
        (
            {"bias": False},
            {"q.weight": (24, 8), "k.weight": (12, 8), "v.weight": (12, 8), "o.weight": (8, 24)},
        ),
        (
            {"qkv_bias": False},
            {
                "q.weight": (24, 8),
                "k.weight": (12, 8),
                "v.weight": (12, 8),
                "o.weight": (8, 24),
                "o.bias": (8,),
            },
        ),
        (
            {"bias": False, "qkv_bias": True, "qk_norm": True, "attn_gate": True, "value_residual": True},
            {
                "q.weight": (24, 8),
                "k.weight": (12, 8),
                "v.weight": (12, 8),
                "o.weight": (8, 24),
                "q.bias": (24,),
                "k.bias": (12,),
                "v.bias": (12,),
                "q_norm.weight": (6,),
                "k_norm.weight": (6,),
                "gate.weight": (4, 8),
                "first_share": (),
            },
        ),
    ],
)
def test_the_parameters_of_attention(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    model = build(config(**ATTENTION | fields), V)
    first, second = ({n: tuple(p.shape) for n, p in block.attn.named_parameters()} for block in model.blocks)
    assert second == shapes
    assert first == {n: shape for n, shape in shapes.items() if n != "first_share"}, (
        "the first layer has no layer before it"
    )
    if "first_share" in shapes:
        assert model.get_parameter("blocks.1.attn.first_share").item() == 0.5


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({}, {"up.weight": (32, 8), "up.bias": (32,), "down.weight": (8, 32), "down.bias": (8,)}),
        ({"mlp": "relu2", "bias": False, "d_ff": 12}, {"up.weight": (12, 8), "down.weight": (8, 12)}),
        (
            {"mlp": "swiglu", "d_ff": 12},
            {
                "gate.weight": (12, 8),
                "gate.bias": (12,),
                "up.weight": (12, 8),
                "up.bias": (12,),
                "down.weight": (8, 12),
                "down.bias": (8,),
            },
        ),
        (
            {"mlp": "swiglu", "d_ff": 12, "bias": False},
            {"gate.weight": (12, 8), "up.weight": (12, 8), "down.weight": (8, 12)},
        ),
    ],
)
def test_the_parameters_of_the_mlp(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    mlp = build(config(**fields), V).blocks[1].mlp
    assert {n: tuple(p.shape) for n, p in mlp.named_parameters()} == shapes


@pytest.mark.parametrize("kind", ["gelu", "relu2", "swiglu"])
def test_the_mlp_by_hand(kind: str) -> None:
    mlp: Any = build(config(d_model=2, n_head=1, d_ff=2, mlp=kind, bias=False), V).blocks[0].mlp
    with torch.no_grad():
        mlp.up.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        mlp.down.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))
        if kind == "swiglu":
            mlp.gate.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    x = torch.tensor([2.0, -1.0])
    gelu = [2 * 0.9772498680518208, -1 * 0.15865525393145707]
    silu = [-1 / (1 + math.e), 4 / (1 + math.e**-4)]  # the gate's outputs before SiLU are -1 and 4
    expected = {"gelu": [gelu[0], 10 * gelu[1]], "relu2": [4.0, 0.0], "swiglu": [2 * silu[0], -10 * silu[1]]}[
        kind
    ]
    assert mlp(x).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_the_gains_of_the_branches(scale: float) -> None:
    block = build(config(layer_scale=scale), V).blocks[1]
    names = {"attn_scale", "mlp_scale"} if scale else set()
    assert {n for n, _ in block.named_parameters() if n.endswith("_scale")} == names
    assert all(block.get_parameter(name).tolist() == [0.25] * 8 for name in names)


def test_the_tables_and_buffers_of_the_model() -> None:
    plain, rope = build(config(unused_ids=3), V), build(config(position="rope", tie_head=False), V)
    assert plain.embed.weight.shape == (V + 3, 8) and plain.head is None
    assert plain.positions is not None and plain.positions.weight.shape == (4, 8)
    assert (
        rope.positions is None
        and rope.head is not None
        and rope.head.weight.shape == (V, 8)
        and rope.head.bias is None
    )
    assert rope.cos.shape == rope.sin.shape == (4, 2)
    assert not hasattr(plain, "cos")
    for model in (plain, rope):
        assert model.causal.tolist() == [[j <= i for j in range(4)] for i in range(4)]
        assert {n for n in model.state_dict() if "." not in n} == set(), "buffers are not in a checkpoint"


STD_FIELDS: dict[str, Any] = {"n_layer": 8, "d_model": 128, "tie_head": False, "mlp": "swiglu", "n_head": 2}


@pytest.mark.parametrize(("scaled", "divisor"), [(False, 1), (True, 4)])
def test_the_standard_deviation_of_he(scaled: bool, divisor: int) -> None:
    """Matrices with 128 inputs start at sqrt(2 / 128) = 1/8, and those with 512 inputs at 1/16."""
    fields = STD_FIELDS | {"d_ff": 512, "attn_gate": True, "experts": 2, "init_depth_scaled": scaled}
    model = build(config(init="kaiming", init_std=0.03, **fields), 300)
    for name, p in model.named_parameters():
        if name.endswith(".bias") or name == "positions.weight" or ".attn.gate." in name:
            assert not p.any(), name
        elif name in ("embed.weight", "head.weight") or ".router." in name:
            assert p.std().item() == pytest.approx(0.03, rel=0.1), name
        elif "norm" not in name:
            expected = 1 / 16 if ".down." in name else 1 / 8
            if name.endswith((".o.weight", ".down.weight")):
                expected /= divisor
            assert p.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(
    ("scaled", "std", "branch"), [(False, 0.02, 0.02), (True, 0.02, 0.02 / 4), (True, 0.1, 0.1 / 4)]
)
def test_the_standard_deviation_at_the_start(scaled: bool, std: float, branch: float) -> None:
    fields = STD_FIELDS | {"attn_gate": True, "init_depth_scaled": scaled, "init_std": std}
    model = build(config(**fields), 300)
    for name, p in model.named_parameters():
        if name.endswith(".bias") or name == "positions.weight" or ".attn.gate." in name:
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            expected = branch if name.endswith((".o.weight", ".down.weight")) else std
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < expected / 20, name


def test_frozen_layers_do_not_train() -> None:
    model = build(config(n_layer=3, frozen=[0, 2]), V)
    assert {n.split(".")[1] for n, p in model.named_parameters() if not p.requires_grad} == {"0", "2"}
    assert all(
        p.requires_grad for n, p in model.named_parameters() if not n.startswith(("blocks.0", "blocks.2"))
    )


# -- attention masks


def test_the_mask_of_titles() -> None:
    model = build(config(title_mask=True), V)
    x, o = 0.0, -math.inf
    idx = torch.tensor([[5, EOS, 6, 7], [5, 6, 7, 8]])  # an <eos> belongs to the title that follows it
    expected = [
        [[[x, o, o, o], [o, x, o, o], [o, x, x, o], [o, x, x, x]]],
        [[[x, o, o, o], [x, x, o, o], [x, x, x, o], [x, x, x, x]]],
    ]
    for attention in ("plain", "sdpa"):
        model.set_dropout(inputs(model.cfg), attention)
        bias = model.attention_bias(idx)
        assert bias is not None and bias.tolist() == expected and bias.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        bias = model.attention_bias(idx)
    assert bias is not None and bias.dtype == torch.bfloat16


def test_the_causal_mask() -> None:
    model = build(config(), V)
    bias = model.attention_bias(torch.tensor([[5, EOS, 6]]))
    assert bias is not None and bias.tolist() == [[0, -math.inf, -math.inf], [0, 0, -math.inf], [0, 0, 0]]
    model.set_dropout(inputs(model.cfg), "sdpa")
    assert model.attention_bias(torch.tensor([[5, EOS, 6]])) is None


def test_set_dropout_sets_the_rates_of_every_block() -> None:
    model = build(config(n_layer=3), V)
    at = inputs(model.cfg, dropout=0.25, attn_dropout=0.5, resid_dropout=0.75, stochastic_depth=0.375)
    model.set_dropout(at, "sdpa")
    assert model.dropout == 0.25
    assert [block.depth_rate for block in model.blocks] == [0.125, 0.25, 0.375]
    assert [(b.dropout, b.attn.dropout, b.attn.fused) for b in model.blocks] == [(0.75, 0.5, True)] * 3
    model.set_dropout(inputs(model.cfg), "plain")
    assert [(b.dropout, b.attn.dropout, b.attn.fused) for b in model.blocks] == [(0.0, 0.0, False)] * 3
    assert [block.depth_rate for block in model.blocks] == [0.0] * 3


@pytest.mark.parametrize("title_mask", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_what_fused_attention_is_given(
    monkeypatch: pytest.MonkeyPatch, training: bool, title_mask: bool
) -> None:
    model = build(config(title_mask=title_mask, **ATTENTION), V).train(training)
    model.set_dropout(inputs(model.cfg, attn_dropout=0.5), "sdpa")
    original, given = F.scaled_dot_product_attention, []

    def spy(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        given.append((q.shape, k.shape, v.shape, bias is None, options))
        return original(q, k, v, bias, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(ids(3, 4))
    options = {"dropout_p": 0.5 if training else 0.0, "is_causal": not title_mask}
    assert given == [((3, 4, 4, 6), (3, 4, 4, 6), (3, 4, 4, 6), not title_mask, options)] * 2


def test_plain_attention_is_computed_outside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast would copy the scores to float32 and back."""
    model = build(config(dtype="bfloat16", **ATTENTION), V)
    original, given = attention_module.attend, []

    def spy(q: Tensor, *rest: Any) -> Tensor:
        given.append((q.dtype, torch.is_autocast_enabled("cpu"), rest[-2:]))
        return original(q, *rest)

    monkeypatch.setattr(attention_module, "attend", spy)
    assert model(ids(1, 4)).dtype == torch.bfloat16
    assert given == [(torch.bfloat16, False, (None, 0.0))] * 2


def test_layers_mix_in_the_values_of_the_first_layer() -> None:
    """In a model with more than two layers, the first layer's values differ from the previous layer's."""
    model = build(config(n_layer=4, value_residual=True), V)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.3)
    taken: list[tuple[Tensor | None, Tensor]] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, args, out: taken.append((args[1].v_first, out[1])))
    model(ids(2, 4))
    first = taken[0][1]
    assert taken[0][0] is None and all(given is first for given, _ in taken[1:])
    assert not any(torch.allclose(own, first) for _, own in taken[1:])
    # layer 3 has a share of 1, so it uses only the first layer's values
    taken.clear()
    with torch.no_grad():
        model.get_parameter("blocks.3.attn.first_share").fill_(1.0)
        model.get_parameter("blocks.2.attn.first_share").fill_(0.0)
    model(ids(2, 4))
    assert torch.equal(taken[3][1], taken[0][1]) and not torch.allclose(taken[2][1], taken[0][1])
    plain = build(config(n_layer=3), V)
    taken.clear()
    for block in plain.blocks:
        block.attn.register_forward_hook(lambda _, args, out: taken.append((args[1].v_first, out[1])))
    plain(ids(2, 4))
    assert [given for given, _ in taken] == [None] * 3


@pytest.mark.parametrize(
    "changes", [{}, {"softcap": 2.0}, {"unused_ids": 3}, {"softcap": 2.0, "unused_ids": 3}]
)
def test_caps_and_unused_ids(changes: dict[str, Any]) -> None:
    model, plain = build(config(tie_head=False, **changes), V), build(config(tie_head=False), V)
    rows = {n: w.clone() for n, w in model.state_dict().items()}
    plain.load_state_dict({n: w[:V] if n in ("embed.weight", "head.weight") else w for n, w in rows.items()})
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(500)
        plain.get_parameter("head.weight").mul_(500)
    logits, expected = model(ids(2, 4)), plain(ids(2, 4))
    if "softcap" in changes:
        assert expected.abs().max() > 3
        expected = 2 * torch.tanh(expected / 2)
    assert torch.allclose(logits[..., :V], expected, atol=1e-6)
    assert logits[..., V:].shape[-1] == changes.get("unused_ids", 0) and (logits[..., V:] == -math.inf).all()


# -- seeds


def test_a_seed_is_a_hash_of_its_parts() -> None:
    """Seeds decide weights and masks, so a changed hash would change every run."""
    assert (
        seed_from(1337, "weights") == 2691145544092237195
        and seed_from(1337, "step", 5, 2) == 4502907412409731383
    )
    assert all(0 <= seed_from(i) < 2**63 for i in range(200)) and any(
        seed_from(i) >= 2**62 for i in range(200)
    )


def test_build_seeds_with_the_configs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    assert isinstance(build(config(seed=5), V), GPT)
    assert seeds == [seed_from(5, "weights")]


# -- where dropout is applied


@pytest.mark.parametrize(
    ("rates", "attention", "places"),
    [
        ((0.0, 0.0, 0.0, 0.0), "plain", []),
        ((0.5, 0.0, 0.0, 0.0), "plain", [(96, 0.5)]),
        ((0.0, 0.5, 0.0, 0.0), "plain", [(96, 0.5)] * 2),  # 96 scores: 3 rows x 2 heads x 4 x 4
        ((0.0, 0.5, 0.0, 0.0), "sdpa", []),  # the fused attention kernel draws its own dropout mask
        ((0.0, 0.0, 0.5, 0.0), "plain", [(96, 0.5)] * 4),
        ((0.1, 0.2, 0.3, 0.0), "plain", [(96, 0.1), *[(96, 0.2), (96, 0.3), (96, 0.3)] * 2]),
        ((0.1, 0.2, 0.3, 0.0), "sdpa", [(96, 0.1), *[(96, 0.3)] * 4]),
        # stochastic depth draws one number per row and branch, with half of the rate in the first layer
        ((0.0, 0.0, 0.0, 0.5), "sdpa", [(3, 0.25), (3, 0.25), (3, 0.5), (3, 0.5)]),
        (
            (0.0, 0.2, 0.3, 0.5),
            "plain",
            [(96, 0.2), *[(96, 0.3), (3, 0.25)] * 2, (96, 0.2), *[(96, 0.3), (3, 0.5)] * 2],
        ),
    ],
)
def test_the_places_that_drop(
    monkeypatch: pytest.MonkeyPatch, rates: tuple[float, ...], attention: str, places: list[tuple[int, float]]
) -> None:
    cfg = config()
    names = ("dropout", "attn_dropout", "resid_dropout", "stochastic_depth")
    at = inputs(cfg, **dict(zip(names, rates, strict=True)))
    assert dropout_sites(cfg, at, 3, attention) == places
    if places:
        model, used = build(cfg, V).train(), []
        take = Masks.take
        monkeypatch.setattr(
            Masks, "take", lambda self, shape: (used.append(math.prod(shape)), take(self, shape))[1]
        )
        model.set_dropout(at, attention)
        model(ids(3, 4), torch.ones(sum(size for size, _ in places), dtype=torch.uint8))
        assert used == [size for size, _ in places], "the model takes them, and no others"
    wide = config(n_head=1, d_model=10)
    assert dropout_sites(wide, inputs(wide, dropout=0.5, attn_dropout=0.25), 5, "plain") == [
        (200, 0.5),
        (80, 0.25),
        (80, 0.25),
    ]


@pytest.mark.parametrize(
    ("rate", "layers", "expected"),
    [
        (0.0, 3, [0, 0, 0]),
        (128, 4, [32, 64, 96, 128]),
        (13, 4, [3, 6, 10, 13]),  # rounded to 256ths
        (1, 3, [1, 1, 1]),  # a rate above 0 is never rounded to 0
        (255, 1, [255]),
    ],
)
def test_the_rate_of_stochastic_depth_rises_linearly(rate: int, layers: int, expected: list[int]) -> None:
    assert depth_rates(rate / 256, layers) == [share / 256 for share in expected]


def test_stochastic_depth_leaves_out_whole_branches_of_rows() -> None:
    """A row without both branches passes unchanged. Branches that are kept are divided by 1 - p."""
    cfg = config(n_layer=1, norm="rmsnorm")
    model = build(cfg, V).double().train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    (block,) = model.blocks
    model.set_dropout(inputs(cfg, stochastic_depth=0.25), "plain")
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    bias = torch.zeros(3, 3, dtype=torch.float64)
    pool = torch.tensor(
        [1, 1, 0, 0, 1, 0, 1, 0], dtype=torch.uint8
    )  # four rows of attention, then of the MLP
    y, _ = block(x, Context(bias, None, None, Masks(pool)))
    keeps = pool.double().view(2, 4, 1, 1) / 0.75
    middle = x + keeps[0] * block.attn(block.attn_norm(x), Context(bias, None, None, None))[0]
    assert torch.allclose(y, middle + keeps[1] * block.mlp(block.mlp_norm(middle)), atol=1e-12)
    assert torch.equal(y[3], x[3]) and not torch.allclose(y[1], x[1], atol=0.01)


def test_the_two_passes_of_r_drop_leave_out_different_branches() -> None:
    cfg = config(rdrop=1.0, stochastic_depth=0.5)
    model = build(cfg, V).train()
    at = inputs(cfg)
    model.set_dropout(at, "plain")
    machine = Device(cfg)
    machine.seed([3])
    one, two = model(ids(4, 4).repeat(2, 1), machine.masks(dropout_sites(cfg, at, 8, "plain"), 0)).chunk(2)
    assert not torch.allclose(one, two, atol=1e-4)


# -- the loss


class Fixed(nn.Module):
    """A model that returns fixed logits and records its inputs."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits, self.given = torch.tensor(logits), []

    def forward(self, x: Tensor, pool: Any) -> Tensor:
        self.given.append((x, pool))
        return self.logits


def test_the_loss_by_hand() -> None:
    """Two tokens have the probabilities (1/2, 1/4, 1/4) and (1/8, 1/8, 3/4) over three ids."""
    model = Fixed([[[math.log(2.0), 0.0, 0.0], [0.0, 0.0, math.log(6.0)]]])
    x, y = torch.tensor([[0, 1]]), torch.tensor([[0, 1]])
    cross = (math.log(2) + math.log(8)) / 2
    uniform = (math.log(2 * 4 * 4) + math.log(8 * 8 * 4 / 3)) / 6
    cfg = config()
    for smoothing in (0.0, 0.25):
        loss, plain, _ = compute_loss(model, x, y, inputs(cfg, label_smoothing=smoothing), "pool")
        assert plain.item() == pytest.approx(cross, rel=1e-6)
        assert loss.item() == pytest.approx((1 - smoothing) * cross + smoothing * uniform, rel=1e-6)
    assert all(x is given and pool == "pool" for given, pool in model.given)


def test_r_drop_by_hand() -> None:
    """With two dropout masks, one token has the probabilities (3/4, 1/4) and (1/4, 3/4) over two ids."""
    model = Fixed([[[math.log(3.0), 0.0]], [[0.0, math.log(3.0)]]])
    x, y = torch.tensor([[1]]), torch.tensor([[0]])
    cross = (math.log(4 / 3) + math.log(4)) / 2
    divergence = 0.75 * math.log(3) - 0.25 * math.log(3)
    for smoothing in (0.0, 0.5):
        at = inputs(config(), rdrop=2.0, label_smoothing=smoothing)
        loss, plain, _ = compute_loss(model, x, y, at, "pool")
        assert plain.item() == pytest.approx(cross, rel=1e-6) and not plain.requires_grad
        assert loss.item() == pytest.approx(
            cross + 2 * divergence, rel=1e-6
        )  # The two forward passes have mirrored probabilities, so label smoothing does not change the loss.
    assert all(given.tolist() == [[1], [1]] and pool == "pool" for given, pool in model.given)
    three = Fixed([[[math.log(2.0), 0.0, 0.0]], [[math.log(2.0), 0.0, 0.0]]])
    loss, plain, _ = compute_loss(three, x, y, inputs(config(), rdrop=2.0, label_smoothing=0.25), None)
    assert plain.item() == pytest.approx(math.log(2), rel=1e-6)
    assert loss.item() == pytest.approx(0.75 * math.log(2) + 0.25 * math.log(32) / 3, rel=1e-6)


@pytest.mark.parametrize("native", [True, False])
def test_the_loss_in_kernels_of_our_own_is_asked_for(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    given: list[Any] = []
    monkeypatch.setattr(trainer, "cross_entropy", lambda *args: given.append(args) or (1, 2))
    model = Fixed([[[1.0, 2.0], [3.0, 4.0]]])
    at = inputs(config(), label_smoothing=0.25)
    assert compute_loss(
        model, torch.tensor([[0, 1]]), torch.tensor([[1, 0]]), at, None, *([True] if native else [])
    ) == (1, 2, None)
    logits, target, *rest = given[0]
    assert (logits.tolist(), target.tolist(), rest) == ([[1, 2], [3, 4]], [1, 0], [0.25, native])


# -- the optimizers

KINDS = {
    "inner": [
        "blocks.0.attn.q.weight",
        "blocks.1.mlp.experts.2.up.weight",
        "blocks.1.mlp.experts.0.down.weight",
        "blocks.0.attn.o.lora_a",
    ],
    "tables": ["embed.weight", "positions.weight", "head.weight", "blocks.0.mlp.router.weight"],
    "vectors": [
        "norm.weight",
        "blocks.0.attn.q.bias",
        "blocks.0.attn_scale",
        "blocks.1.attn.first_share",
        "blocks.1.mlp_norm.bias",
    ],
}
EVERYTHING: dict[str, Any] = {
    "experts": 3,
    "tie_head": False,
    "layer_scale": 0.5,
    "value_residual": True,
    "attn_lora_rank": 2,
    "eps": 1e-3,
    "beta1": 0.5,
    "beta2": 0.75,
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_groups(optimizer: str) -> None:
    cfg = config(optimizer=optimizer, momentum=0.25, **EVERYTHING)
    model = build(cfg, V)
    found = Optimizers(cfg, model)
    groups = {
        found.names[p]: (owner, group)
        for owner in found.all
        for group in owner.param_groups
        for p in group["params"]
    }
    assert set(groups) == {n for n, _ in model.named_parameters()}
    rates = {
        "inner": ("lr", "weight_decay"),
        "tables": ("lr_aux", "weight_decay_aux"),
        "vectors": ("lr_aux", ""),
    }
    for kind, names in KINDS.items():
        for name in names:
            owner, group = groups[name]
            assert (group["rate"], group["decay"]) == rates[kind], name
            assert group["eps"] == 1e-3
            if optimizer == "sgd":
                assert type(owner) is torch.optim.SGD
                assert (group["momentum"], group["nesterov"], group["lr"], group["fused"]) == (
                    0.25,
                    True,
                    1.0,
                    True,
                )
            elif optimizer == "muon" and kind == "inner":
                assert type(owner) is Muon and (owner.momentum, owner.cautious) == (0.25, False)
            else:
                assert type(owner) is torch.optim.AdamW
                assert (group["betas"], group["lr"], group["fused"]) == ((0.5, 0.75), 1.0, True)
    assert len(found.all) == (2 if optimizer == "muon" else 1)
    assert len(found.groups) == 3 and all(
        g is h for g, h in zip(found.groups, [g for o in found.all for g in o.param_groups], strict=True)
    )


def test_sgd_without_momentum_does_not_look_ahead() -> None:
    cfg = config()
    assert not any(group["nesterov"] for group in Optimizers(cfg, build(cfg, V)).groups)


def test_marks_make_groups_of_their_own() -> None:
    """New parameters warm up, and may have another learning rate, weight decay and eps."""
    cfg = config(optimizer="adamw", eps=1e-4)
    model = build(cfg, V)
    mark = ParamSchedule(lr=0.5, weight_decay=3.0, eps=2.0, since=10, rewarm=5)
    names = ["blocks.0.attn.q.weight", "norm.weight"]
    optimizers = Optimizers(cfg, model, dict.fromkeys(names, mark))
    assert optimizers.schedules == dict.fromkeys(names, mark)
    marked = [group for group in optimizers.groups if group["schedule"] == mark]
    assert sorted(optimizers.names[p] for group in marked for p in group["params"]) == names
    optimizers.set_rates(inputs(cfg, lr=0.5, lr_aux=0.25, weight_decay=0.125, weight_decay_aux=0.5), 12)
    for group in optimizers.groups:
        rate = 0.5 if group["rate"] == "lr" else 0.25
        new = group["schedule"] == mark
        assert group["lr"] == pytest.approx(rate * 0.3 if new else rate)
        decay = {"weight_decay": 0.125, "weight_decay_aux": 0.5, "": 0.0}[group["decay"]]
        assert group["weight_decay"] == pytest.approx(decay * (3 if new else 1))
        assert group["eps"] == pytest.approx(2e-4 if new else 1e-4)
    assert mark.rate(12) == pytest.approx(0.3)
    assert Optimizers(cfg, model).schedules == {}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    young = Optimizers(cfg, model, {"norm.weight": ParamSchedule(rewarm=4)})
    young.step(inputs(cfg, lr_aux=1.0))  # if no step number is given, this is the first step
    assert [group["lr"] for group in young.groups if group["schedule"].rewarm] == [0.25]


def test_a_step_sets_the_rates_and_moves_the_weights() -> None:
    cfg = config(weight_decay=0.1)
    model = build(cfg, V)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers = Optimizers(cfg, model)
    optimizers.step(inputs(cfg, lr=0.5, lr_aux=0.25, weight_decay=0.5, weight_decay_aux=0.125))
    for name, p in model.named_parameters():
        inner = name.startswith("blocks.") and p.ndim == 2
        rate, decay = (0.5, 0.5) if inner else (0.25, 0.125)
        if p.ndim < 2:
            decay = 0.0
        assert torch.allclose(p, before[name] - rate * (1 + decay * before[name]), atol=1e-6), name
    assert [group["capturable"] for group in optimizers.groups] == [False] * 3
    assert optimizers.state() == {}, "SGD without momentum remembers nothing"


def test_the_state_of_an_optimizer_goes_by_names() -> None:
    cfg = config(optimizer="adamw")
    model = build(cfg, V)
    optimizers = Optimizers(cfg, model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    optimizers.step(inputs(cfg))
    state = optimizers.state()
    names = [n for n, _ in model.named_parameters()]
    assert set(state) == {f"optimizer/{n}/{key}" for n in names for key in ("exp_avg", "exp_avg_sq", "step")}
    other = Optimizers(cfg, model)
    other.load(state)
    back = other.state()
    assert all(torch.equal(back[n], t) and back[n] is not t for n, t in state.items())
    other.load(state, copy=False)
    assert all(other.state()[n] is t for n, t in state.items())


def test_momentum_is_loaded_for_all_or_for_none() -> None:
    """Fused SGD needs momentum for all parameters or none, so new parameters start with zero momentum."""
    cfg = config(momentum=0.5)
    model = build(cfg, V)
    optimizers = Optimizers(cfg, model)
    optimizers.load({"optimizer/norm.weight/momentum_buffer": torch.full((8,), 2.0)})
    state = optimizers.state()
    assert set(state) == {f"optimizer/{n}/momentum_buffer" for n, _ in model.named_parameters()}
    assert all(
        (t == (2.0 if n == "optimizer/norm.weight/momentum_buffer" else 0.0)).all() for n, t in state.items()
    )
    fresh = Optimizers(cfg, model)
    fresh.load({})
    assert fresh.state() == {}


# -- the state of a run


def test_a_new_state() -> None:
    cfg = config()
    state = State(cfg, model := build(cfg, V))
    assert (state.step, state.tokens, state.growth_state) == (0, 0, {})
    assert state.cfg is cfg and state.model is model and state.average.live == dict(model.named_parameters())


def test_a_clock_adds_up_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 11.5])
    monkeypatch.setattr(accounts.time, "perf_counter", lambda: next(times))
    costs = Accounts()
    with costs.clock("steps"):
        pass
    with pytest.raises(KeyError), costs.clock("steps"):
        raise KeyError
    assert costs.spent == {"steps": 3.5}


def test_a_clock_inside_another_stops_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 5.0, 6.0, 8.0, 10.0])
    monkeypatch.setattr(accounts.time, "perf_counter", lambda: next(times))
    costs = Accounts()
    with costs.clock("growth"):
        with costs.clock("evaluation"):
            pass
        with costs.clock("evaluation"):
            pass
    assert costs.spent == {"evaluation": 6.0, "growth": 4.0}


def stepped(cfg: TrainConfig, average: float) -> State:
    """Return a state after a step that changed every tensor."""
    state = State(cfg, build(cfg, V))
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizers.step(inputs(cfg))
    state.average.update(inputs(cfg, average=average))
    return state


@pytest.mark.parametrize("average", [1.0, 0.5])
def test_a_state_comes_back_from_its_tensors(average: float) -> None:
    cfg = config(optimizer="adamw", ema=0.5)
    state = stepped(cfg, average)
    tensors = {n: t.detach().clone() for n, t in state.tensors().items()}
    names = {n for n, _ in state.model.named_parameters()}
    assert {n for n in tensors if n.startswith("model/")} == {f"model/{n}" for n in names}
    assert {n for n in tensors if n.startswith("average/")} == (
        {f"average/{n}" for n in names} if average < 1 else set()
    )
    assert {n.split("/")[0] for n in tensors} == {"model", "optimizer", *(["average"] if average < 1 else [])}
    other = State(cfg, build(config(seed=9, optimizer="adamw", ema=0.5), V))
    other.average.differs = average == 1
    other.load(tensors, 7, 700)
    assert (other.step, other.tokens, other.growth_state, other.average.differs) == (7, 700, {}, average < 1)
    assert all(torch.equal(t, tensors[n]) for n, t in other.tensors().items())
    assert all(
        torch.equal(t, tensors[f"{'average' if average < 1 else 'model'}/{n}"])
        for n, t in other.average.shadow.items()
    )


def test_a_state_of_another_model_is_refused() -> None:
    state = State(config(), build(config(), V))
    tensors = {f"model/{n}": p.detach().clone() for n, p in state.model.named_parameters()}
    with pytest.raises(
        RunError,
        match=r"the saved state contains model/a, but the model does not; build the model as it was when",
    ):
        state.load(tensors | {"model/b": torch.ones(1), "model/a": torch.ones(1)}, 7, 700)
    assert state.step == 0
    with pytest.raises(KeyError):
        state.load({n: t for n, t in tensors.items() if n != "model/norm.weight"}, 7, 700)


@pytest.mark.parametrize("name", ["model/norm.weight", "average/norm.weight"])
def test_a_tensor_of_another_shape_is_refused(name: str) -> None:
    """Copying a scalar would fill the whole parameter with one value."""
    state = stepped(config(ema=0.5), 0.5)
    tensors = {n: t.detach().clone() for n, t in state.tensors().items()} | {name: torch.tensor(1.0)}
    expected = r"norm.weight has the shape \(\) in the saved state and \(8,\) in the model"
    with pytest.raises(RunError, match=expected):
        state.load(tensors, 7, 700)


def test_a_grown_state_rebuilds_its_model() -> None:
    cfg = config()
    state, wide = State(cfg, build(cfg, V)), config(d_ff=48)
    other = State(wide, build(wide, V))
    grown = {"fired": [3], "applied": 1, "config": wide.model_dump(mode="json"), "marks": {}}
    load_state(state, other.tensors(), 5, 50, grown)
    assert state.cfg.d_ff == 48 and state.growth_state == grown
    assert all(torch.equal(t, other.tensors()[n]) for n, t in state.tensors().items())


# -- one step


class Parts:
    """A `TrainStep` on the CPU as process `rank` of `world`, without the other processes."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        cfg: TrainConfig,
        rank: int = 0,
        world: int = 1,
        mean: float = 1.0,
    ) -> None:
        self.device = Device(cfg)
        self.device.rank, self.device.world = rank, world
        self.synced: list[str] = []
        self.device.mean = lambda value: value * mean
        self.state = State(cfg, build(cfg, V))
        parts = self

        class Runner(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.inner = model

            def forward(self, *args: Any) -> Tensor:
                return self.inner(*args)

            @contextmanager
            def no_sync(self) -> Iterator[None]:
                parts.synced.append("none")
                yield

        monkeypatch.setattr(Device, "runner", lambda self, model: Runner(model))
        self.stepper = TrainStep(self.state, self.device)

    def run(self, x: Tensor, y: Tensor, at: StepInputs, step: int = 0) -> tuple[float, float]:
        self.state.step = step
        loss, norm = self.stepper.gradients(x, y, at).tolist()
        return loss, norm


def batch(rows: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    idx = ids(rows, 5, seed)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def expected_gradients(cfg: TrainConfig, x: Tensor, y: Tensor) -> tuple[float, float, dict[str, Tensor]]:
    model = build(cfg, V)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), math.sqrt(sum(float(g.square().sum()) for g in gradients.values())), gradients


@pytest.mark.parametrize(("clip", "grad_accum"), [(0.0, 1), (0.01, 1), (100.0, 1), (0.01, 2), (0.0, 4)])
def test_the_gradients_of_a_step(monkeypatch: pytest.MonkeyPatch, clip: float, grad_accum: int) -> None:
    """With clip=0, the gradients are not clipped."""
    cfg = config(clip=clip, grad_accum=grad_accum)
    x, y = batch()
    loss, norm, gradients = expected_gradients(cfg, x, y)
    assert 0.01 < norm < 100
    parts = Parts(monkeypatch, cfg)
    assert parts.run(x, y, inputs(cfg)) == pytest.approx((loss, norm), rel=1e-5)
    factor = 0.01 / (norm + 1e-6) if clip == 0.01 else 1.0
    for name, p in parts.state.model.named_parameters():
        assert p.grad is not None and torch.allclose(
            p.grad, factor * gradients[name], atol=1e-7, rtol=1e-4
        ), name
    assert parts.synced == [] and parts.state.tokens == 16 and parts.state.model.training
    parts.run(x, y, inputs(cfg), 1)  # gradients must not accumulate across steps
    assert all(
        torch.allclose(p.grad, factor * gradients[n], atol=1e-7, rtol=1e-4)
        for n, p in parts.state.model.named_parameters()
    )
    assert parts.state.tokens == 32


def test_each_process_takes_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batch m of process r of 2 is piece 2 * m + r. Only the last micro-batch syncs the gradients."""
    cfg = config(batch_size=8, grad_accum=2, dropout=0.5)
    x, y = batch(8)
    taken, seeds, places = [], [], []
    original = trainer.compute_loss

    def spy(model: Any, x: Tensor, y: Tensor, *rest: Any) -> Any:
        taken.append((x, y, rest[-1]))
        return original(model, x, y, *rest)

    monkeypatch.setattr(trainer, "compute_loss", spy)
    parts = Parts(monkeypatch, cfg, rank=1, world=2, mean=3.0)
    seed, masks = parts.device.seed, parts.device.masks
    monkeypatch.setattr(parts.device, "seed", lambda found: (seeds.append(found), seed(found)))
    monkeypatch.setattr(
        parts.device, "masks", lambda found, micro: (places.append((found, micro)), masks(found, micro))[1]
    )
    loss, _ = parts.run(x, y, inputs(cfg), 7)
    assert [(a.tolist(), b.tolist()) for a, b, _ in taken] == [
        (x[i : i + 2].tolist(), y[i : i + 2].tolist()) for i in (2, 6)
    ]
    assert [native for _, _, native in taken] == [False, False]
    assert seeds == [[seed_from(1337, "step", 7, 1), seed_from(1337, "step", 7, 3)]]
    at = inputs(cfg)
    assert places == [(dropout_sites(cfg, at, 2, "plain"), 0), (dropout_sites(cfg, at, 2, "plain"), 1)]
    assert parts.synced == ["none"]
    assert parts.state.tokens == 2 * 2 * 4 * 2  # each of 2 processes trains 2 pieces of 2 rows x 4 tokens
    assert 6 < loss < 12, "the mean is the machine's"


def test_r_drop_takes_masks_for_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(rdrop=0.5, dropout=0.5)
    parts = Parts(monkeypatch, cfg)
    places = []
    masks = parts.device.masks
    monkeypatch.setattr(
        parts.device, "masks", lambda found, micro: (places.append(found), masks(found, micro))[1]
    )
    parts.run(*batch(), inputs(cfg))
    assert places == [dropout_sites(cfg, inputs(cfg), 8, "plain")]
    assert parts.state.tokens == 32


def test_a_score_processes_no_training_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, config())
    parts.state.model.eval()
    parts.stepper.runners[0](batch()[0])
    assert parts.state.tokens == 0
    parts.state.model.train()
    parts.stepper.runners[0](batch()[0])
    assert parts.state.tokens == 16


class Replayed:
    """A fake CUDA graph, which does its work once and then replays it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.forgotten, self.on, self.result, self.graph = 0, False, None, None

    def __call__(self, key: Any, work: Callable[..., Any], *given: Tensor) -> Any:
        if not self.calls:
            self.result = work(*given)
        self.calls.append(key)
        return self.result

    def forget(self) -> None:
        self.forgotten += 1


def test_a_replayed_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(optimizer="adamw", ema=0.5)
    made: list[Replayed] = []

    def cuda_graph(self: Device, cfg: TrainConfig) -> Replayed:
        made.append(Replayed())
        return made[-1]

    monkeypatch.setattr(Device, "cuda_graph", cuda_graph)
    parts = Parts(monkeypatch, cfg)
    learn, move = made
    at = inputs(
        cfg, lr=0.5, lr_aux=0.25, weight_decay=0.125, weight_decay_aux=0.75, average=0.5, grad_accum=2
    )
    for step in range(3):
        parts.run(*batch(), at, step)
    assert parts.state.tokens == 48 and parts.stepper.tokens_per_replay == 16
    # The key omits all values that may change between steps without recording a new graph.
    still = at._replace(lr=0.0, lr_aux=0.0, weight_decay=0.0, weight_decay_aux=0.0, average=0.0)
    assert learn.calls == [(still, (4, 4), False)] * 3
    before = parts.state.model.embed.weight.detach().clone()
    parts.stepper.update(at)
    assert move.calls == [(0.125, 0.75, None)] and move.on is False
    assert not torch.equal(before, parts.state.model.embed.weight) and parts.state.average.differs
    learn.graph = "graph"
    parts.stepper.update(at)
    assert move.calls[1] == (0.125, 0.75, "graph") and move.on is True
    (runner,) = parts.stepper.runners
    parts.state.load(parts.state.tensors(), 3, 48)
    parts.run(*batch(), at, 3)
    assert (learn.forgotten, move.forgotten) == (1, 1), (
        "a recorded step reads the tensors that were there before"
    )
    assert parts.stepper.runners[0] is runner, "the model is the same, so it is not compiled again"
    parts.stepper.release()
    assert (learn.forgotten, move.forgotten) == (2, 2)
    assert parts.stepper.model is None and parts.stepper.runners == [] and not runner._forward_pre_hooks
    parts.stepper.release()
    assert (learn.forgotten, move.forgotten) == (2, 2), "once"


def test_an_update_takes_the_rates_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    parts = Parts(monkeypatch, cfg)
    steps: list[int] = []
    original = Optimizers.set_rates
    monkeypatch.setattr(
        Optimizers, "set_rates", lambda self, at, step: (steps.append(step), original(self, at, step))
    )
    parts.run(*batch(), inputs(cfg), 5)
    before = {n: p.detach().clone() for n, p in parts.state.model.named_parameters()}
    parts.stepper.update(inputs(cfg, lr=0.5, lr_aux=0.25))
    assert steps == [5]
    for name, p in parts.state.model.named_parameters():
        rate = 0.5 if name.startswith("blocks.") and p.ndim == 2 else 0.25
        assert p.grad is not None and torch.allclose(p, before[name] - rate * p.grad, atol=1e-7), name


@pytest.mark.parametrize(
    ("compiled", "world", "calls"),
    [(False, 1, []), (True, 1, ["compile"]), (True, 2, ["compile", "ddp"]), (False, 2, ["ddp"])],
)
def test_how_the_model_is_run(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, world: int, calls: list[str]
) -> None:
    done: list[str] = []

    def compile(model: Any, dynamic: bool | None = None) -> Any:
        assert dynamic is False
        done.append("compile")
        return model

    def ddp(model: Any) -> Any:
        done.append("ddp")
        return model

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", ddp)
    machine: Any = SimpleNamespace(compile=compiled, world=world, sharded=False)
    model = nn.Linear(1, 1)
    assert Device.runner(machine, model) is model
    assert done == calls
    machine.sharded = True
    assert Device.runner(machine, model) is model
    assert done == calls, "a sharded model is neither compiled nor wrapped"


# -- the loop

# A run has nine steps of 64 tokens. Only the patched functions advance the fake clock of the run.
RUN: dict[str, Any] = {
    "num_titles": 60,
    "block_size": 8,
    "batch_size": 8,
    "vocab_size": 300,
    "n_layer": 1,
    "log_every": 4,
    "eval_per_epoch": 0,
    "eval_interval": 3,
    "checkpoint_every": 2,
    "max_steps": 9,
    "lr": 0.3,
    "dropout": 0.1,
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def costs(self, seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the work and then advances the clock."""

        def timed(*args: Any, **options: Any) -> Any:
            done = work(*args, **options)
            self.now += seconds
            return done

        return timed


class Watch(Progress):
    def __init__(self, at: dict[int, Callable[[], object]] | None = None) -> None:
        self.at = at or {}
        self.steps: list[dict[str, Any]] = []
        self.evals: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.started: list[tuple[Any, ...]] = []
        self.closed = 0

    def start(self, cfg: TrainConfig, table: dict[str, Any], earlier: Any = ()) -> None:
        self.started.append((cfg.run_id, table["steps"], len(earlier)))

    def step(self, row: dict[str, Any]) -> None:
        self.steps.append(row)
        self.at.get(row["step"], lambda: None)()

    def eval(self, row: dict[str, Any]) -> None:
        self.evals.append(row)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None:
        self.closed += 1


class Ran(SimpleNamespace):
    cfg: TrainConfig
    run: RunDir
    summary: dict[str, Any]
    watch: Watch
    saved: list[tuple[int, dict[str, Any]]]
    clock: Clock

    def rows(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.run.metrics() if row["event"] == event]


def small(**changes: Any) -> TrainConfig:
    return from_dict(TINY | RUN | changes)


def go(cfg: TrainConfig, out: Path, watch: Watch | None = None, error: Any = None, **options: Any) -> Ran:
    """Train on the fake clock. If `error` is given, the run must end with this exception."""
    patch, clock, saved = pytest.MonkeyPatch(), Clock(), []
    original = checkpoint.save

    def save(place: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], *rest: Any) -> None:
        saved.append((step, json.loads(json.dumps(meta))))
        original(place, step, tensors, meta, *rest)

    watch, found = watch or Watch(), {}
    with patch.context() as p:
        for module in (trainer, session, accounts):
            p.setattr(module, "time", clock)
        p.setattr(trainer, "prepare", clock.costs(7, trainer.prepare))
        p.setattr(trainer, "build", clock.costs(0.5, trainer.build))
        p.setattr(session, "score", clock.costs(100, lambda *args, score=session.score: list(score(*args))))
        p.setattr(session, "summarize", clock.costs(10_000, session.summarize))
        p.setattr(trainer.TrainStep, "gradients", clock.costs(10, trainer.TrainStep.gradients))
        p.setattr(trainer.TrainStep, "update", clock.costs(1, trainer.TrainStep.update))
        p.setattr(checkpoint, "save", clock.costs(1000, save))
        if error is None:
            found["summary"] = train(cfg, out, progress=watch, **options)
        else:
            with pytest.raises(error) as e:
                train(cfg, out, progress=watch, **options)
            found["said"] = str(e.value)
    return Ran(cfg=cfg, run=RunDir(out / cfg.run_id), watch=watch, saved=saved, clock=clock, **found)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return go(small(), tmp_path_factory.mktemp("ran"))


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_the_rows_of_a_run(ran: Ran) -> None:
    plan = Plan(ran.cfg, 10_000)
    steps = ran.rows("step")
    assert [list(row) for row in steps] == [
        ["event", "step", "tokens", "lr", "loss", "grad_norm", "seconds"]
    ] * 3
    assert [(row["step"], row["tokens"]) for row in steps] == [(4, 256), (8, 512), (9, 576)], (
        "every fourth, and the last"
    )
    assert [row["lr"] for row in steps] == [plan.at(step).lr for step in (3, 7, 8)]
    assert [row["seconds"] for row in steps] == [11.0] * 3, "a step, without what was saved or scored"
    assert ran.watch.steps == [row | {"steps": 9} for row in steps]
    evals = ran.rows("eval")
    assert [row["step"] for row in evals] == [1, 3, 6, 9] and {row["split"] for row in evals} == {"val"}
    assert ran.watch.evals == [row | {"steps": 9} for row in evals]
    assert ran.watch.started == [(ran.cfg.run_id, 9, 0)] and ran.watch.closed == 1


def test_what_a_run_writes(ran: Ran) -> None:
    data = trainer.prepare(ran.cfg, corpus := trainer.load_corpus(ran.cfg))
    plan = Plan(ran.cfg, len(data.splits["train"]))
    written = json.loads((ran.run.path / "config.json").read_text())
    assert written == json.loads(
        json.dumps(
            {
                "config": ran.cfg.model_dump(),
                "digest": ran.cfg.digest,
                "plan": plan.table(),
                "fingerprints": corpus.fingerprints,
                "tokenizer": data.tokenizer.digest,
            }
        )
    )
    assert (ran.run.path / "tokenizer.json").read_text() == data.tokenizer.to_json()


def test_the_checkpoints_of_a_run(ran: Ran) -> None:
    assert [step for step, _ in ran.saved] == [2, 4, 6, 8, 9], "every second, and the last, each once"
    meta = ran.saved[1][1]
    spent = {"data": 7.0, "steps": 44.0, "evaluation": 200.0, "checkpoints": 1000.0}
    assert meta["spent"] == spent
    assert {
        k: meta[k] for k in ("digest", "resumed", "presented", "store", "ledger", "growth", "journal")
    } == {
        "digest": ran.cfg.digest,
        "resumed": 0,
        "presented": 256,
        "store": None,
        "growth": {},
        "journal": None,
        "ledger": {"reused": 0, "reused_tokens": 0, "wasted": 0},
    }
    assert meta["machine_class"]["device"] and meta["machine_class"]["torch"] == torch.__version__
    metrics = (ran.run.path / "metrics.jsonl").read_bytes()
    assert 0 < meta["metrics"]["bytes"] < len(metrics) == ran.saved[-1][1]["metrics"]["bytes"]


def test_where_the_seconds_of_a_run_went(ran: Ran) -> None:
    spent = {
        "data": 7.0,
        "steps": 99.0,
        "evaluation": 400.0,
        "checkpoints": 5000.0,
        "guards": 10_000.0,
        "overhead": 0.5,
    }
    assert ran.summary["spent"] == spent
    assert ran.summary["seconds"] == sum(spent.values()) == ran.clock.now - 1000


def test_a_run_on_a_compiled_model_counts_its_first_step_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = Device.settle

    def settled(self: Device, cfg: TrainConfig, plan: Plan) -> None:
        settle(self, cfg, plan)
        self.compile, self.note = True, "compiling"

    monkeypatch.setattr(Device, "settle", settled)
    monkeypatch.setattr(Device, "runner", lambda self, model: model)
    found = go(small(), tmp_path)
    assert (found.summary["spent"]["compile"], found.summary["spent"]["steps"]) == (11.0, 88.0)
    assert found.watch.notes == ["compiling"]


def test_a_run_that_stops_and_goes_on(tmp_path: Path, ran: Ran) -> None:
    stopped = go(small(), tmp_path, error=Interrupted, until=5)
    assert stopped.said == (
        "stopped at step 5 of 9; everything is saved; "
        "to continue, run the command without --until or with a later step"
    )
    assert [step for step, _ in stopped.saved] == [2, 4, 5]
    assert stopped.run.status()["state"] == "interrupted" and stopped.watch.closed == 1
    back = go(small(), tmp_path)
    assert back.watch.started == [(back.cfg.run_id, 9, 3)] and back.watch.notes == [
        f"{back.run.path} resumes after step 5"
    ]
    assert [step for step, _ in back.saved] == [6, 8, 9]
    assert (
        plain(back.run.metrics()) == plain(ran.run.metrics())
        and back.summary["weights"] == ran.summary["weights"]
    )
    assert back.summary["resumed"] == 1 and back.saved[-1][1]["presented"] == 576
    spent = {"data": 14.0, "steps": 99.0, "evaluation": 400.0, "checkpoints": 5000.0, "guards": 10_000.0}
    assert {k: v for k, v in back.summary["spent"].items() if k != "overhead"} == spent | {
        "checkpoints": 5000.0
    }
    again = go(small(), tmp_path)
    assert again.summary == back.run.summary() and again.watch.started == [] and again.saved == []
    assert [row["step"] for row in go(small(), tmp_path, fresh=True).rows("step")] == [4, 8, 9]


def test_a_signal_stops_after_its_step(tmp_path: Path) -> None:
    found = go(
        small(log_every=1), tmp_path, Watch({3: lambda: os.kill(os.getpid(), signal.SIGTERM)}), Interrupted
    )
    assert found.said == "SIGTERM at step 3 of 9; everything is saved; run the same command again to resume"
    assert [step for step, _ in found.saved] == [2, 3]


def test_another_process_may_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(Device, "any_process", lambda self, flag: flag or bool(asked))
    found = go(
        small(log_every=1, eval_interval=0), tmp_path, Watch({3: lambda: asked.append(True)}), Interrupted
    )
    assert (
        found.said
        == "another process stopped at step 3 of 9; everything is saved; run the same command again to resume"
    )


def planted(
    monkeypatch: pytest.MonkeyPatch, call: int, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Change the loss that one call computes."""

    def changed(loss: Loss) -> Loss:
        return Loss(*change(loss.minimized, loss.plain), loss.routing)

    original, calls = trainer.compute_loss, iter(range(1, 1000))
    monkeypatch.setattr(
        trainer,
        "compute_loss",
        lambda *args: changed(original(*args)) if next(calls) == call else original(*args),
    )


def test_the_advice_after_a_divergence_names_the_fields_of_routers() -> None:
    dense = StepRow(3, 0.01, math.nan, 1.0)
    assert advice(dense) == "lower lr or lr_aux, or raise warmup_frac"
    routed = dense._replace(routing={"aux": {}, "routers": []})
    assert (
        advice(routed) == "lower lr, lr_aux, lr_router or a weight such as prior_loss, or raise warmup_frac"
    )


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("fields", [{}, {"rdrop": 0.5}], ids=["one pass", "r-drop"])
def test_a_gradient_that_is_infinite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float, fields: dict[str, Any]
) -> None:
    """The loss of the step is finite, and the weights are not updated with the infinite gradient."""
    planted(monkeypatch, 4, lambda loss, plain: (loss * 1e38, plain))
    found = go(small(clip=clip, **fields), tmp_path, error=Diverged)
    lr = Plan(found.cfg, 10_000).at(3).lr
    words = (
        f"with gradient norm inf at step 4 of 9, lr {lr:g}; lower lr or lr_aux, or raise warmup_frac "
        "(the checkpoint before this step is kept)"
    )
    assert found.said.startswith("loss 5.") and found.said.endswith(words)
    assert [step for step, _ in found.saved] == [2, 3]
    assert found.saved[-1][1]["presented"] == 3 * 64 * found.cfg.passes, "nothing was learnt from step 4"
    assert found.run.status()["state"] == "diverged"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    planted(monkeypatch, 3, lambda loss, plain: (loss, plain + value))
    assert go(small(), tmp_path, error=Diverged).said.startswith(f"loss {value} with gradient norm ")


def test_a_score_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = session.score
    monkeypatch.setattr(
        session,
        "score",
        lambda cfg, data, state: [
            r | ({"loss": math.inf} if state.step == 3 else {}) for r in original(cfg, data, state)
        ],
    )
    found = go(small(), tmp_path, error=Diverged)
    lr = Plan(found.cfg, 10_000).at(2).lr
    assert found.said == (
        f"the score at step 3 of 9 is not finite after lr {lr:g}; lower lr, lr_aux or weight_decay "
        "(the last checkpoint before this step is kept)"
    )
    assert [step for step, _ in found.saved] == [2] and [row["step"] for row in found.rows("eval")] == [1]


# -- losses that are read later, as on a GPU


def late_numbers(monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
    original = Device.__init__

    def init(self: Device, cfg: TrainConfig) -> None:
        original(self, cfg)
        self.read_every = lag

    monkeypatch.setattr(Device, "__init__", init)


def test_numbers_that_are_read_later_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: Ran
) -> None:
    late_numbers(monkeypatch, 4)
    fields = {"log_every": 1, "eval_interval": 0, "checkpoint_every": 7}
    found = go(small(**fields), tmp_path)
    assert found.summary["weights"] == ran.summary["weights"]
    rows = found.rows("step")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [r for r in plain(rows) if r["step"] in (4, 8, 9)] == plain(ran.rows("step"))
    # Losses are read for the score at step 1, the checkpoint at step 7 and the end of the run at step 9. At
    # step 5, losses are read because four losses are waiting. Each time, the losses are read before the
    # weights are updated.
    assert sum(row["seconds"] for row in rows) == 99.0
    assert {row["seconds"] for row in rows} == {11.0}


def test_a_loss_that_is_read_later_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_numbers(monkeypatch, 4)
    planted(monkeypatch, 3, lambda loss, plain: (loss, plain + math.nan))
    found = go(small(log_every=1, eval_interval=0, checkpoint_every=50), tmp_path, error=Diverged)
    assert "at step 3 of 9" in found.said and found.said.endswith(
        "(the last checkpoint before this step is kept)"
    )
    assert [row["step"] for row in found.rows("step")] == [1, 2] and found.saved == []


def test_a_stop_reads_what_is_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late_numbers(monkeypatch, 4)
    found = go(small(log_every=1, eval_interval=0, checkpoint_every=50), tmp_path, error=Interrupted, until=3)
    assert [row["step"] for row in found.rows("step")] == [1, 2, 3] and [step for step, _ in found.saved] == [
        3
    ]


# -- stores, growth and several processes


def test_a_run_goes_on_with_the_store_behind_a_score_that_nobody_had(tmp_path: Path) -> None:
    go(small(eval_interval=0), tmp_path / "a", store=Store(tmp_path / "store"), keep=[4, 5])
    second = go(small(eval_interval=4), tmp_path / "b", store=Store(tmp_path / "store"))
    assert [row["step"] for row in second.rows("eval")] == [1, 4, 8, 9]
    assert second.summary["ledger"]["trained"] == 3, "6, 7 and 8; after 4 it takes 5, after 8 the end"


def test_a_run_that_waits_for_its_scores_takes_all_of_the_store(tmp_path: Path) -> None:
    cfg = small(
        max_steps=0, growth={"ops": [{"name": "set_lr", "value": 0.125, "trigger": {"wait_iters": 8}}]}
    )
    first = go(cfg, tmp_path / "a", store=Store(tmp_path / "store"))
    second = go(cfg, tmp_path / "b", store=Store(tmp_path / "store"))
    assert second.summary["weights"] == first.summary["weights"] and second.summary["ledger"]["trained"] == 0


def test_a_run_takes_what_the_store_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: Ran) -> None:
    first = go(small(), tmp_path / "a", store=Store(tmp_path / "store"), keep=[4])
    assert first.summary["weights"] == ran.summary["weights"]
    second = go(small(), tmp_path / "b", store=Store(tmp_path / "store"))
    assert second.summary["weights"] == ran.summary["weights"] and second.summary["ledger"]["trained"] == 0
    assert [step for step, _ in second.saved] == [9], "what was taken to the end is saved, too"
    assert "steps" not in second.summary["spent"]
    assert second.saved[0][1]["store"]["key"] == first.saved[-1][1]["store"]["key"]
    assert second.saved[0][1]["ledger"] == {"reused": 9, "reused_tokens": 576, "wasted": 0}
    kept = {Store(tmp_path / "store").node(key).step for key in Store(tmp_path / "store").node_keys()}
    assert kept == {1, 3, 4, 6, 9}


def test_a_run_that_grows(tmp_path: Path) -> None:
    ops = [
        {"name": "set_batch_size", "value": 4, "trigger": {"step": 2}},
        {"name": "freeze_layer", "value": 0, "trigger": {"step": 4}},
        {"name": "set_lr", "value": 0.125, "trigger": {"wait_iters": 2}},
    ]
    built: list[Any] = []
    original = Device.runner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Device, "runner", lambda self, model: (built.append(model.cfg), original(self, model))[1]
        )
        found = go(small(max_steps=0, growth={"ops": ops}, log_every=1), tmp_path)
    rows = found.rows("step")
    assert [row["tokens"] for row in rows[:6]] == [64, 128, 160, 192, 224, 256]
    assert next(row["step"] for row in rows if row["lr"] < 0.125) == 7, (
        "the first evaluation two steps after the op before it"
    )
    assert [cfg.frozen for cfg in built] == [(), (0,)], "a new model has a new runner, and only that"
    events = [json.loads(line) for line in (found.run.path / "growth.jsonl").read_text().splitlines()]
    done = [(row["name"], row["step"]) for row in events if row["event"].endswith("SUCCESS")]
    assert done == [("set_batch_size", 2), ("freeze_layer", 4), ("set_lr", 6)]
    assert found.saved[-1][1]["growth"]["fired"] == [2, 4, 6] and found.saved[-1][1]["journal"]["bytes"] > 0
    assert [note.split(": ")[1] for note in found.watch.notes] == ["step 2", "step 4", "step 6"]
    assert {"params", "active", "flops"} <= set(found.rows("eval")[0])


def test_an_op_that_fails_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(self: Any, evaluate: Any) -> None:
        raise RunError("no memory")

    monkeypatch.setattr(Growth, "act", act)
    ops = [{"name": "set_lr", "value": 0.125, "trigger": {"step": 3}}]
    found = go(small(max_steps=0, growth={"ops": ops}, checkpoint_every=50), tmp_path, error=RunError)
    assert found.said == "no memory" and [step for step, _ in found.saved] == [3]


def test_one_of_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes train the same steps, but only the leader writes files and messages."""
    original, flags, followed = Device.__init__, [], []

    def init(self: Device, cfg: TrainConfig) -> None:
        original(self, cfg)
        self.rank, self.world, self.read_every = 1, 2, 4

    @contextmanager
    def leader_first(self: Device) -> Iterator[None]:
        yield

    def asked(self: Device, flag: bool) -> bool:
        flags.append(flag)
        return flag

    class Runner(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args: Any) -> Any:
            return self.inner(*args)

    monkeypatch.setattr(Device, "__init__", init)
    monkeypatch.setattr(Device, "leader_first", leader_first)
    monkeypatch.setattr(Device, "any_process", asked)
    monkeypatch.setattr(Device, "mean", lambda self, value: value)
    monkeypatch.setattr(Device, "runner", lambda self, model: Runner(model))
    monkeypatch.setattr(session, "follow_leader", lambda *args: followed.append(args))
    found = go(small(eval_interval=0, checkpoint_every=50), tmp_path)
    assert found.summary == {} and found.saved == [] and len(followed) == 1
    assert found.watch.started == found.watch.steps == found.watch.evals == []
    assert not found.run.path.exists()
    # The processes exchange seven flags. Before steps 1, 5 and 9, the processes agree whether to stop. After
    # steps 1 and 9, the processes agree whether the score is finite. Two more flags belong to saves by the
    # leader.
    assert flags == [False] * 7
