"""Each operation takes every channel from the expected source and scales every tensor as expected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from growing import MODERN, V, config, grown, op, shaken
from torch import Tensor

from mainrun.config import TrainConfig
from mainrun.growth import operators
from mainrun.growth.moments import IndexMap, Piece
from mainrun.growth.operators import (
    Change,
    channels,
    empty_model,
    flow,
    grow,
    map_parameters,
    meta_model,
    part,
    truncate,
)
from mainrun.train import GPT

BLOCK = "blocks.0."


def pieces(model: GPT, what: Any, **fields: Any) -> dict[str, Piece]:
    return grown(model, what)[1].pieces


def index_of(piece: Piece, dim: int) -> list[int] | None:
    return None if not piece.index or piece.index[dim] is None else piece.index[dim].tolist()


def change(before: TrainConfig, after: TrainConfig, what: Any = None, seed: int = 7) -> Change:
    old, new = shaken(before), shaken(after)
    generator = torch.Generator().manual_seed(seed)
    return Change(what, before, after, dict(old.named_parameters()), dict(new.named_parameters()), generator)


# -- names and spaces


@pytest.mark.parametrize(
    ("name", "short", "writes", "reads"),
    [
        ("blocks.3.mlp.experts.11.up.weight", "mlp.up.weight", "F", "D"),
        ("blocks.12.mlp.down.weight", "mlp.down.weight", "D", "F"),
        ("blocks.0.attn.q.weight", "attn.q.weight", "Q", "D"),
        ("blocks.0.attn.k.lora_b", "attn.k.lora_b", "K", "R"),
        ("blocks.0.attn.o.weight", "attn.o.weight", "D", "Q"),
        ("blocks.0.attn.gate.weight", "attn.gate.weight", "H", "D"),
        ("blocks.0.attn.q.bias", "attn.q.bias", "Q", ""),
        ("blocks.0.attn.first_share", "attn.first_share", "", ""),
        ("blocks.0.mlp.router.weight", "mlp.router.weight", "E", "D"),
        ("embed.weight", "embed.weight", "D", "V"),
        ("embed.lora_a", "embed.lora_a", "D", "S"),
        ("embed.lora_b", "embed.lora_b", "S", "V"),
        ("positions.weight", "positions.weight", "D", "T"),
        ("head.weight", "head.weight", "V", "D"),
        ("norm.weight", "norm.weight", "D", ""),
    ],
)
def test_the_spaces_that_a_parameter_writes_and_reads(name: str, short: str, writes: str, reads: str) -> None:
    assert part(name) == short and flow(name) == (writes, reads)


def test_channels_of_heads() -> None:
    assert channels(torch.tensor([1, -1, 0]), 2).tolist() == [2, 3, -1, -1, 0, 1]
    assert channels(torch.tensor([2]), 3).tolist() == [6, 7, 8]


def test_by_space_uses_one_index_per_space() -> None:
    c = change(config(), config(d_ff=20, experts=0))
    units = torch.arange(20)
    mapped = c.by_space(F=units)
    assert mapped.keys() == c.new.keys()
    up, down, q = (mapped[f"{BLOCK}{name}"] for name in ("mlp.up.weight", "mlp.down.weight", "attn.q.weight"))
    assert (
        up.index[0] is units
        and up.index[1] is None
        and down.index == (None, units)
        and q.index == (None, None)
    )
    assert up.source == f"{BLOCK}mlp.up.weight"
    more = change(config(), config(attn_lora_rank=2)).by_space()
    assert more[f"{BLOCK}attn.q.lora_a"] == Piece(None)


def test_random_values_have_the_given_std_and_fill_only_new_elements() -> None:
    c = change(config(init_std=0.05), config(init_std=0.05, d_ff=4000))
    assert 0.49 < float(c.normal((4000, 8), 0.5).std()) < 0.51
    units = torch.cat([torch.arange(12), torch.full((3988,), -1)])
    mapped = c.by_space(F=units)
    c.fill(mapped, ("mlp.up.weight",), 0)
    plus, other = mapped[f"{BLOCK}mlp.up.weight"].plus, mapped[f"{BLOCK}mlp.down.weight"].plus
    assert plus is not None and other is None and mapped[f"{BLOCK}mlp.up.bias"].plus is None
    assert not plus[:12].any() and 0.048 < float(plus[12:].std()) < 0.052
    c.fill(mapped, ("mlp.down.weight",), 1, std=0.5)
    down = mapped[f"{BLOCK}mlp.down.weight"].plus
    assert down is not None and not down[:, :12].any() and 0.48 < float(down[:, 12:].std()) < 0.52
    c.fill(mapped, ("attn.q.weight",), 0)
    assert mapped[f"{BLOCK}attn.q.weight"].plus is None, "no element is new"


def test_new_elements_have_the_std_of_the_initial_weights() -> None:
    """With init=kaiming, the 8 inputs of an MLP's first matrix give a standard deviation of 1/2."""
    fields = {"init": "kaiming", "init_std": 0.05, "init_depth_scaled": True}
    c = change(config(**fields), config(d_ff=4000, **fields))
    mapped = c.by_space(F=torch.cat([torch.arange(12), torch.full((3988,), -1)]))
    c.fill(mapped, ("mlp.up.weight",), 0)
    plus = mapped[f"{BLOCK}mlp.up.weight"].plus
    assert plus is not None and 0.48 < float(plus[12:].std()) < 0.52
    c = change(config(**fields), config(unused_ids=4000, **fields))
    ids = len(c.old["embed.weight"])
    mapped = c.by_space(V=torch.cat([torch.arange(ids), torch.full((4000,), -1)]))
    c.fill(mapped, ("embed.weight",), 0)
    plus = mapped["embed.weight"].plus
    assert plus is not None and 0.048 < float(plus[ids:].std()) < 0.052


def test_rms_is_the_root_mean_square() -> None:
    c = change(config(), config())
    with torch.no_grad():
        c.old["embed.weight"].zero_()
        c.old["embed.weight"][0, :2] = torch.tensor([3.0, 4.0])
    assert c.rms("embed.weight") == pytest.approx(5 / (V * 8) ** 0.5)


# -- meta and empty models


def test_a_meta_model_has_shapes_only() -> None:
    model = shaken(config(unused_ids=0))
    meta = meta_model(model, model.cfg.changed(unused_ids=5, d_ff=20))
    assert meta.embed.num_embeddings == V + 5 and {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta_model(meta_model(model, model.cfg.changed(unused_ids=5)), model.cfg).embed.num_embeddings == V
    assert type(meta) is type(model)


@pytest.mark.parametrize(("training", "dtype"), [(True, torch.float32), (False, torch.float64)])
def test_an_empty_model_has_the_dtype_mode_and_buffers_of_the_old_one(
    training: bool, dtype: torch.dtype
) -> None:
    model = shaken(config(position="rope"), dtype=dtype).train(training)
    model.blocks[0].attn.fused = model.blocks[1].attn.fused = training
    empty = empty_model(model, model.cfg.changed(n_layer=3))
    assert (empty.training, empty.embed.weight.dtype) == (training, dtype) and len(empty.blocks) == 3
    assert {block.attn.fused for block in empty.blocks} == {training}
    for name, buffer in model.named_buffers():
        assert torch.equal(empty.get_buffer(name), buffer), name
    assert {p.device.type for p in empty.parameters()} == {"cpu"}


def test_an_index_map_contains_trainable_parameters_only() -> None:
    model = shaken(config(frozen=[1]))
    new = empty_model(model, model.cfg.changed(d_ff=20))
    all_pieces, moved = map_parameters(op("widen_mlp", 20), model.cfg, new.cfg, model, new, 7)
    names = {name for name, p in new.named_parameters() if p.requires_grad}
    assert set(moved.pieces) == set(moved.new) == names and set(all_pieces) >= {
        name for name, _ in new.named_parameters()
    }
    assert moved.old == {name: p.shape for name, p in model.named_parameters()} and moved.truncated == {}
    assert not [name for name in names if name.startswith("blocks.1.")]
    again = map_parameters(op("widen_mlp", 20), model.cfg, new.cfg, model, meta_model(model, new.cfg), 7)[1]
    assert index_of(again.pieces[f"{BLOCK}mlp.up.weight"], 0) == index_of(
        moved.pieces[f"{BLOCK}mlp.up.weight"], 0
    )


# -- depth


def test_the_pieces_of_stacked_layers() -> None:
    model = shaken(config(value_residual=True, n_layer=2))
    copied = pieces(model, op("stack_layers", (0, 0, 1)))
    assert copied["embed.weight"] == Piece("embed.weight")
    assert [copied[f"blocks.{i}.mlp.up.weight"] for i in range(3)] == [
        Piece(f"blocks.{s}.mlp.up.weight") for s in (0, 0, 1)
    ]
    assert copied["blocks.1.attn.first_share"] == Piece(None) and copied[
        "blocks.2.attn.first_share"
    ] == Piece("blocks.1.attn.first_share")
    assert copied["blocks.1.mlp.down.weight"] == Piece("blocks.0.mlp.down.weight")
    inserted = pieces(model, op("stack_layers", (0, 0, 1), init="identity"))
    assert inserted["blocks.0.mlp.up.weight"].grad == 1.0 and inserted["blocks.1.mlp.up.weight"] == Piece(
        "blocks.0.mlp.up.weight", grad=None
    )
    for end in ("attn.o.weight", "attn.o.bias", "mlp.down.weight", "mlp.down.bias"):
        assert inserted[f"blocks.1.{end}"] == Piece(None) and inserted[f"blocks.2.{end}"] == Piece(
            f"blocks.1.{end}"
        )


# -- width


def test_the_pieces_of_new_hidden_units() -> None:
    model = shaken(config(mlp="swiglu"))
    new = pieces(model, op("widen_mlp", 15, init="identity"))
    for side in ("up", "gate"):
        assert index_of(new[f"{BLOCK}mlp.{side}.weight"], 0) == [*range(12), -1, -1, -1]
        assert index_of(new[f"{BLOCK}mlp.{side}.bias"], 0) == [*range(12), -1, -1, -1]
        plus = new[f"{BLOCK}mlp.{side}.weight"].plus
        assert plus is not None and plus[12:].all() and not plus[:12].any()
    down = new[f"{BLOCK}mlp.down.weight"]
    assert (
        index_of(down, 1) == [*range(12), -1, -1, -1]
        and isinstance(down.weight, Tensor)
        and down.weight.tolist() == [1.0] * 15
    )
    copied = pieces(model, op("widen_mlp", 15))
    units, share = index_of(copied[f"{BLOCK}mlp.up.weight"], 0), copied[f"{BLOCK}mlp.down.weight"].weight
    assert (
        units is not None
        and units[:12] == list(range(12))
        and all(0 <= unit < 12 for unit in units[12:])
        and isinstance(share, Tensor)
    )
    for unit in range(12):
        assert float(share[[i for i, u in enumerate(units) if u == unit]].sum()) == pytest.approx(1.0)
    assert all(0.5 / 2 / 1.5 <= float(s) <= 1.0 for s in share)
    grad = copied[f"{BLOCK}mlp.up.weight"].grad
    assert isinstance(grad, Tensor) and torch.equal(grad, share.unsqueeze(1))
    assert copied[f"{BLOCK}mlp.up.bias"].grad is share and copied[f"{BLOCK}mlp.gate.bias"].grad is share


def test_a_narrower_mlp_is_refused() -> None:
    model = shaken(config())
    with pytest.raises(
        ValueError, match="hidden width 11 is below the current hidden width 12; give an integer above 12"
    ):
        grow(op("widen_mlp", 11), model.cfg, model.cfg.changed(d_ff=11), model, 1)
    grow(op("widen_mlp", 12), model.cfg, model.cfg, model, 1)


def factors(piece: Piece) -> tuple[Any, Any]:
    return piece.weight, piece.grad


@pytest.mark.parametrize("tied", [True, False])
def test_the_factors_of_a_model_three_times_as_wide(tied: bool) -> None:
    third = 1 / 3
    model = shaken(
        config(
            tie_head=tied, norm="layernorm", experts=2, attn_gate=True, embed_lora_rank=2, attn_lora_rank=2
        )
    )
    mapped = pieces(model, op("widen_model", {"factor": 3}))
    expected = {
        "embed.weight": (1.0, third),
        "embed.lora_a": (1.0, third),
        "embed.lora_b": (1.0, 1.0),
        "positions.weight": (1.0, third),
        f"{BLOCK}attn.q.weight": (third, third),
        f"{BLOCK}attn.q.bias": (1.0, third),
        f"{BLOCK}attn.o.weight": (third, third),
        f"{BLOCK}attn.k.weight": (third, third),
        f"{BLOCK}attn.q.lora_a": (third, 1.0),
        f"{BLOCK}attn.q.lora_b": (1.0, third),
        f"{BLOCK}attn.gate.weight": (third, third),
        f"{BLOCK}attn_norm.weight": (1.0, third),
        f"{BLOCK}mlp_norm.bias": (1.0, third),
        f"{BLOCK}mlp.router.weight": (third, 1.0),
        f"{BLOCK}mlp.experts.0.up.weight": (third, third),
        f"{BLOCK}mlp.experts.1.down.weight": (third, third),
        f"{BLOCK}mlp.experts.1.down.bias": (1.0, third),
        "norm.weight": (third, 1.0) if tied else (1.0, third),
        "norm.bias": (third, 1.0) if tied else (1.0, third),
    }
    if not tied:
        expected["head.weight"] = (third, 1.0)
    assert {name: factors(mapped[name]) for name in expected} == expected


def test_the_channels_of_a_model_twice_as_wide() -> None:
    model = shaken(config(n_head=4, n_kv_head=2, attn_gate=True))
    scaled = pieces(model, op("widen_model", {"factor": 2}))
    kept = pieces(model, op("widen_model", {"factor": 2, "kv": "keep"}))
    eight = [*range(8), *range(8)]
    for mapped in (scaled, kept):
        assert index_of(mapped["embed.weight"], 1) == eight and index_of(mapped["embed.weight"], 0) is None
        assert index_of(mapped[f"{BLOCK}mlp.up.weight"], 0) == [*range(12), *range(12)]
    assert index_of(scaled[f"{BLOCK}attn.gate.weight"], 0) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert index_of(kept[f"{BLOCK}attn.gate.weight"], 0) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (
        index_of(scaled[f"{BLOCK}attn.k.weight"], 0) == [0, 1, 2, 3] * 2
        and index_of(kept[f"{BLOCK}attn.k.weight"], 0) is None
    )
    assert index_of(kept[f"{BLOCK}attn.q.weight"], 0) == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7]
    assert factors(kept[f"{BLOCK}attn.k.weight"]) == (0.5, 1.0) and factors(
        scaled[f"{BLOCK}attn.k.weight"]
    ) == (0.5, 0.5)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_pairs_of_copies_get_opposite_noise(n: int) -> None:
    model = shaken(config(d_model=8, d_ff=400))
    mapped = pieces(model, op("widen_model", {"factor": n, "noise_snr_db": 20.0}))
    for name, width in ((f"{BLOCK}mlp.up.weight", 8), (f"{BLOCK}mlp.down.weight", 400)):
        plus = mapped[name].plus
        assert plus is not None and plus.shape[1] == n * width
        each = plus.view(plus.size(0), n, width)
        assert torch.equal(each[:, 0], -each[:, 1]) and each[:, 0].all()
        if n > 2:
            assert torch.equal(each[:, 2], -each[:, 3] if n == 4 else torch.zeros_like(each[:, 2]))
        if n == 4:
            assert not torch.equal(each[:, 0], each[:, 2])
        rms = float(model.get_parameter(name).detach().square().mean().sqrt())
        assert float(each[:, 0].std()) == pytest.approx(rms / n / 10, rel=0.05)
    noisy = {name for name, piece in mapped.items() if piece.plus is not None}
    assert noisy == {
        name
        for name in mapped
        if name.endswith(("q.weight", "k.weight", "v.weight", "o.weight", "up.weight", "down.weight"))
    }
    assert not [p for p in pieces(model, op("widen_model", {"factor": n})).values() if p.plus is not None]
    assert [
        p
        for p in pieces(model, op("widen_model", {"factor": n, "noise_snr_db": 0.0})).values()
        if p.plus is not None
    ], "0 dB is noise"


def test_new_heads_are_at_the_end_of_their_group() -> None:
    model = shaken(config(n_head=4, n_kv_head=2, attn_gate=True))
    mapped = pieces(model, op("add_heads", 8))
    assert index_of(mapped[f"{BLOCK}attn.gate.weight"], 0) == [0, 1, -1, -1, 2, 3, -1, -1]
    assert index_of(mapped[f"{BLOCK}attn.q.weight"], 0) == [
        0,
        1,
        2,
        3,
        -1,
        -1,
        -1,
        -1,
        4,
        5,
        6,
        7,
        -1,
        -1,
        -1,
        -1,
    ]
    assert index_of(mapped[f"{BLOCK}attn.k.weight"], 0) == [0, 1, 2, 3]
    plus = mapped[f"{BLOCK}attn.q.weight"].plus
    assert (
        plus is not None
        and plus[4:8].all()
        and plus[12:].all()
        and not plus[:4].any()
        and not plus[8:12].any()
    )
    for name in ("attn.o.weight", "attn.gate.weight", "attn.q.bias"):
        assert mapped[BLOCK + name].plus is None, name
    alone = pieces(shaken(config()), op("add_heads", 3))
    for kind in "qkv":
        assert index_of(alone[f"{BLOCK}attn.{kind}.weight"], 0) == [*range(8), -1, -1, -1, -1]
        plus = alone[f"{BLOCK}attn.{kind}.weight"].plus
        assert plus is not None and plus[8:].all() and not plus[:8].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"n_head": 1, "head_dim": 4},
            "1 heads of width 4 over 1 key/value heads cannot contain the old 2 heads of width 4 over 2; "
            "keep",
        ),
        (
            {"n_head": 4},
            "4 heads of width 2 over 4 key/value heads cannot contain the old 2 heads of width 4 over 2",
        ),
        (
            {"n_head": 2, "head_dim": 6},
            "2 heads of width 6 over 2 key/value heads cannot contain the old 2 heads of width 4 over 2",
        ),
        (
            {"n_head": 4, "head_dim": 4, "n_kv_head": 1},
            "4 heads of width 4 over 1 key/value heads cannot contain the old 2 heads of width 4 over 2",
        ),
        ({"n_head": 4, "head_dim": 4, "n_kv_head": 4}, ""),
        ({"n_head": 4, "head_dim": 4, "n_kv_head": 2}, ""),
        ({"n_head": 2, "head_dim": 4}, ""),
    ],
)
def test_heads_that_do_not_contain_the_old_ones_are_refused(fields: dict[str, Any], message: str) -> None:
    model = shaken(config())
    after = model.cfg.changed(**fields)
    if not message:
        grow(op("add_heads", 9), model.cfg, after, model, 1)
        return
    with pytest.raises(ValueError) as e:
        grow(op("add_heads", 9), model.cfg, after, model, 1)
    assert message in str(e.value)


def test_fewer_query_heads_per_group_are_refused() -> None:
    model = shaken(config(n_head=4, n_kv_head=2))
    with pytest.raises(
        ValueError,
        match=r"4 heads of width 2 over 4 .* the old 4 heads of width 2 over 2; .* with 2 query heads each",
    ):
        grow(op("add_heads", 9), model.cfg, model.cfg.changed(n_kv_head=4), model, 1)


# -- experts


@pytest.mark.parametrize(
    ("experts", "k", "shards", "softmax", "up_grad", "down_weight", "bias_weight", "down_grad"),
    [
        (4, 2, 1, False, 1 / 4, 1.0, 1.0, 1 / 4),
        (8, 2, 2, False, 2 / 8, 2.0, 1.0, 1 / 8),
        (6, 3, 1, True, 1 / 6, 2.0, 2.0, 1 / 12),
        (8, 4, 4, True, 4 / 8, 8.0, 2.0, 1 / 16),
        (4, 1, 1, True, 1 / 4, 4.0, 4.0, 1 / 16),
    ],
)
def test_the_factors_of_an_expert(
    experts: int,
    k: int,
    shards: int,
    softmax: bool,
    up_grad: float,
    down_weight: float,
    bias_weight: float,
    down_grad: float,
) -> None:
    value = {"experts": experts, "top_k": k, "shards": shards, "router": "zero"} | (
        {"router_weights": "softmax"} if softmax else {}
    )
    what = replace(op("upcycle_moe", value), optimizer=transfer_mode("asymmetric"))
    mapped = pieces(shaken(config(bias=True)), what)
    for expert in range(experts):
        base = f"{BLOCK}mlp.experts.{expert}."
        assert factors(mapped[f"{base}up.weight"]) == pytest.approx((1.0, up_grad))
        assert factors(mapped[f"{base}up.bias"]) == pytest.approx((1.0, up_grad))
        assert factors(mapped[f"{base}down.weight"]) == pytest.approx((down_weight, down_grad))
        assert factors(mapped[f"{base}down.bias"]) == pytest.approx((bias_weight, down_grad))
        assert mapped[f"{base}up.weight"].source == f"{BLOCK}mlp.up.weight"
        hidden = 12 // shards
        units = (
            None if shards == 1 else list(range(expert % shards * hidden, expert % shards * hidden + hidden))
        )
        assert (
            index_of(mapped[f"{base}up.weight"], 0)
            == units
            == index_of(mapped[f"{base}down.weight"], 1)
            == index_of(mapped[f"{base}up.bias"], 0)
        )
        assert index_of(mapped[f"{base}down.weight"], 0) is None
    assert mapped[f"{BLOCK}mlp.router.weight"] == Piece(None)


def transfer_mode(mode: str) -> Any:
    from mainrun.plan.ops import Transfer

    return Transfer(mode)


def test_a_random_router_has_one_row_per_group_and_the_given_std() -> None:
    model = shaken(config(d_model=200, d_ff=12))
    for std, value in ((0.02, {}), (0.5, {"router_std": 0.5})):
        plus = pieces(model, op("upcycle_moe", {"experts": 8, "top_k": 4, "shards": 2} | value))[
            f"{BLOCK}mlp.router.weight"
        ].plus
        assert (
            plus is not None and plus.shape == (8, 200) and float(plus.std()) == pytest.approx(std, rel=0.1)
        )
        assert (
            all(torch.equal(plus[i], plus[i + 1]) for i in (0, 2, 4, 6))
            and len({tuple(row.tolist()) for row in plus}) == 4
        )


def noise(experts: int, k: int, shards: int = 1, snr: float = 20.0, **fields: Any) -> list[Tensor | None]:
    value = {"experts": experts, "top_k": k, "shards": shards, "router": "zero", "noise_snr_db": snr}
    mapped = pieces(shaken(config(**fields)), op("upcycle_moe", value))
    assert not [
        name for name, piece in mapped.items() if piece.plus is not None and not name.endswith("down.weight")
    ]
    return [mapped[f"{BLOCK}mlp.experts.{e}.down.weight"].plus for e in range(experts)]


def signs(noises: list[Tensor | None]) -> list[str]:
    """Name the noise of each expert: `+a` and `-a` for the first pair, `+b` and `-b` for the second, etc."""
    names: dict[tuple[float, ...], str] = {}
    shown = []
    for plus in noises:
        if plus is None:
            shown.append("")
            continue
        key, other = tuple(plus.flatten().tolist()), tuple((-plus).flatten().tolist())
        shown.append(
            f"-{names[other]}" if other in names else f"+{names.setdefault(key, 'abcdefgh'[len(names)])}"
        )
    return shown


@pytest.mark.parametrize(
    ("experts", "k", "shards", "expected"),
    [
        (4, 2, 1, ["+a", "-a", "+b", "-b"]),
        (5, 2, 1, ["+a", "-a", "+b", "-b", "+c"]),
        (4, 1, 1, None),
        (6, 3, 1, ["+a", "-a", "", "+b", "-b", "+c"]),
        (8, 4, 2, ["+a", "+b", "-a", "-b", "+c", "+d", "-c", "-d"]),
        (4, 4, 1, ["+a", "-a", "+b", "-b"]),
    ],
)
def test_pairs_of_experts_that_are_chosen_together_get_opposite_noise(
    experts: int, k: int, shards: int, expected: list[str] | None
) -> None:
    if expected is not None:
        assert signs(noise(experts, k, shards)) == expected
        return
    value = {
        "experts": experts,
        "top_k": k,
        "router": "zero",
        "noise_snr_db": 20.0,
        "router_weights": "softmax",
    }
    mapped = pieces(shaken(config()), op("upcycle_moe", value))
    assert signs([mapped[f"{BLOCK}mlp.experts.{e}.down.weight"].plus for e in range(experts)]) == [
        "",
        "+a",
        "-a",
        "+b",
    ]


def test_the_noise_of_experts_has_the_given_size() -> None:
    model = shaken(config(d_ff=400))
    rms = float(model.get_parameter(f"{BLOCK}mlp.down.weight").detach().square().mean().sqrt())
    for shards, snr, times in ((1, 20.0, 0.1), (2, 20.0, 0.2), (1, 40.0, 0.01)):
        plus = noise(8, 4, shards, snr, d_ff=400)[0]
        assert (
            plus is not None
            and plus.shape == (8, 400 // shards)
            and float(plus.std()) == pytest.approx(rms * times, rel=0.05)
        )
    value = {"experts": 4, "top_k": 2, "router": "zero", "noise_snr_db": 20.0, "router_weights": "softmax"}
    softmax = pieces(model, op("upcycle_moe", value))[f"{BLOCK}mlp.experts.0.down.weight"].plus
    assert softmax is not None and float(softmax.std()) == pytest.approx(rms * 0.2, rel=0.05), (
        "the noise is relative to the scaled weight"
    )


@pytest.mark.parametrize(
    ("value", "fields", "message"),
    [
        (
            {"experts": 4, "top_k": 2, "shards": 5},
            {"experts": 5, "top_k": 5, "d_ff": 2},
            "shards=5 must divide hidden=12, experts=5 and top_k=5",
        ),
        (
            {"experts": 6, "top_k": 4, "shards": 4},
            {"experts": 6, "top_k": 4, "d_ff": 3},
            "shards=4 must divide hidden=12, experts=6 and top_k=4",
        ),
        (
            {"experts": 8, "top_k": 2, "shards": 4},
            {"experts": 8, "top_k": 2, "d_ff": 3},
            "shards=4 must divide hidden=12, experts=8 and top_k=2",
        ),
        (
            {"experts": 4, "top_k": 2, "noise_snr_db": 3.0},
            {"experts": 4, "top_k": 2},
            "noise_snr_db changes the output of a model with router=random",
        ),
        ({"experts": 4, "top_k": 2, "shards": 2}, {"experts": 4, "top_k": 2, "d_ff": 6}, ""),
    ],
)
def test_impossible_experts_are_refused(value: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    model = shaken(config())
    after = model.cfg.changed(**fields)
    if not message:
        grow(op("upcycle_moe", value), model.cfg, after, model, 1)
        return
    with pytest.raises(ValueError) as e:
        grow(op("upcycle_moe", value), model.cfg, after, model, 1)
    assert message in str(e.value)


# -- low-rank terms


def test_a_new_term_has_a_random_a_and_a_zero_b() -> None:
    model = shaken(config(d_model=64, n_head=2, d_ff=12))
    mapped = pieces(model, op("set_attn_lora_rank", 40))
    a, b = mapped[f"{BLOCK}attn.q.lora_a"], mapped[f"{BLOCK}attn.q.lora_b"]
    assert b == Piece(None) and a.source is None and a.plus is not None and a.plus.shape == (40, 64)
    assert float(a.plus.std()) == pytest.approx(1 / 8, rel=0.06)
    assert "embed.lora_a" not in mapped
    table = pieces(model, op("set_embedding_lora_rank", 40))
    assert (
        table["embed.lora_a"].plus is not None
        and table["embed.lora_b"] == Piece(None)
        and f"{BLOCK}attn.q.lora_a" not in table
    )


def test_a_higher_rank_keeps_its_term() -> None:
    model = shaken(config(attn_lora_rank=2, embed_lora_rank=3))
    mapped = pieces(model, op("set_attn_lora_rank", 8))
    for name in "qkvo":
        a, b = mapped[f"{BLOCK}attn.{name}.lora_a"], mapped[f"{BLOCK}attn.{name}.lora_b"]
        assert (
            index_of(a, 0) == [0, 1, *[-1] * 6] == index_of(b, 1)
            and index_of(a, 1) is None
            and index_of(b, 0) is None
        )
        assert factors(a) == (1.0, 1.0) and factors(b) == (4.0, 0.25) and b.plus is None
        assert a.plus is not None and a.plus[2:].all() and not a.plus[:2].any()
        assert 0.2 < float(a.plus[2:].std()) < 0.5  # the expected value is sqrt(1/8) = 0.354
    assert mapped["embed.lora_a"] == replace(Piece("embed.lora_a"), index=(None, None)) and factors(
        mapped["embed.lora_b"]
    ) == (1.0, 1.0)
    same = pieces(model, op("set_attn_lora_rank", 2))
    assert factors(same[f"{BLOCK}attn.q.lora_b"]) == (1.0, 1.0) and index_of(
        same[f"{BLOCK}attn.q.lora_a"], 0
    ) == [0, 1]


def test_the_minimum_rank_is_one() -> None:
    model = shaken(config(attn_lora_rank=2))
    grown(model, op("set_attn_lora_rank", 1))
    with pytest.raises(
        ValueError,
        match="rank 0 is not allowed; give at least 1, or remove the term with merge_lora_weights",
    ):
        grow(op("set_attn_lora_rank", 0), model.cfg, model.cfg.changed(attn_lora_rank=0), model, 1)


def test_a_lower_rank_has_no_source() -> None:
    model = shaken(config(attn_lora_rank=4))
    new, moved = grown(model, op("set_attn_lora_rank", 2))
    a, b = moved.pieces[f"{BLOCK}attn.q.lora_a"], moved.pieces[f"{BLOCK}attn.q.lora_b"]
    assert a.source is None and b.source is None
    low_a, low_b, lost = truncate(
        model.get_parameter(f"{BLOCK}attn.q.lora_a").detach(),
        model.get_parameter(f"{BLOCK}attn.q.lora_b").detach(),
        2,
    )
    assert torch.allclose(new.get_parameter(f"{BLOCK}attn.q.lora_b"), low_b * 0.5), (
        "alpha / rank is twice as large"
    )
    assert (
        torch.allclose(new.get_parameter(f"{BLOCK}attn.q.lora_a"), low_a)
        and moved.truncated[f"{BLOCK}attn.q"] == lost
    )
    assert set(moved.truncated) == {f"blocks.{i}.attn.{n}" for i in (0, 1) for n in "qkvo"}


def test_the_share_that_truncation_loses() -> None:
    a, b = torch.diag(torch.tensor([1.0, 1.0])), torch.diag(torch.tensor([4.0, 3.0]))
    low_a, low_b, lost = truncate(a, b, 1)
    assert lost == pytest.approx(3 / 5) and torch.allclose(
        low_b @ low_a, torch.diag(torch.tensor([4.0, 0.0])).double()
    )
    assert (
        low_a.shape == (1, 2)
        and low_b.shape == (2, 1)
        and torch.allclose(low_a.abs().max(), torch.tensor(2.0).double())
    )
    assert truncate(a, b, 2)[2] == 0.0 and truncate(a, torch.zeros(2, 2), 1)[2] == 0.0


def test_a_merged_term_is_scaled() -> None:
    model = shaken(config(attn_lora_rank=4, embed_lora_rank=2, lora_alpha=6.0))
    mapped = pieces(model, op("merge_lora_weights"))
    for name, rank in ((f"{BLOCK}attn.o.", 4), ("embed.", 2)):
        term = (
            6.0
            / rank
            * (model.get_parameter(f"{name}lora_b") @ model.get_parameter(f"{name}lora_a")).detach()
        )
        piece = mapped[f"{name}weight"]
        assert piece.plus is not None and torch.allclose(piece.plus, term) and factors(piece) == (1.0, 1.0)
    assert mapped[f"{BLOCK}mlp.up.weight"].plus is None and not [name for name in mapped if "lora" in name]


# -- the vocabulary and frozen layers


@pytest.mark.parametrize("tied", [True, False])
def test_new_ids_are_small_and_random(tied: bool) -> None:
    model = shaken(config(tie_head=tied, vocab_size=300, init_std=0.05))
    mapped = pieces(model, op("resize_vocabulary", 400))
    names = ["embed.weight"] if tied else ["embed.weight", "head.weight"]
    for name in names:
        assert index_of(mapped[name], 0) == [*range(V), *[-1] * 100] and index_of(mapped[name], 1) is None
        plus = mapped[name].plus
        assert (
            plus is not None and not plus[:V].any() and float(plus[V:].std()) == pytest.approx(0.05, rel=0.1)
        )
    assert [name for name, piece in mapped.items() if piece.plus is not None] == names


def test_freezing_changes_no_parameter() -> None:
    model = shaken(config(**MODERN))
    for name, frozen in (("freeze_layer", 0), ("unfreeze_layer", 0)):
        if name == "unfreeze_layer":
            model = shaken(config(**MODERN, frozen=[0]))
        new, moved = grown(model, op(name, frozen))
        assert all(torch.equal(p, model.get_parameter(n)) for n, p in new.named_parameters())
        assert all(factors(piece) == (1.0, 1.0) and piece.source == n for n, piece in moved.pieces.items())
        assert isinstance(moved, IndexMap) and operators.OPS[name] is operators.unchanged


# -- the order of random draws


def normal(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_numbers(values: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to a positive factor."""
    factor = float((values / expected.to(values)).median())
    return factor > 0 and torch.allclose(values, expected.to(values) * factor, rtol=1e-4)


def test_the_first_of_a_pair_gets_positive_noise() -> None:
    model = shaken(config())
    wide = pieces(model, op("widen_model", {"factor": 2, "noise_snr_db": 20.0}))[f"{BLOCK}attn.q.weight"].plus
    assert wide is not None and same_numbers(wide[:, :8], normal(16, 8))
    expert = noise(4, 2)[0]
    assert expert is not None and same_numbers(expert, normal(8, 12))


def test_copied_units_and_their_shares_are_drawn_in_this_order() -> None:
    mapped = pieces(shaken(config()), op("widen_mlp", 20))
    generator = torch.Generator().manual_seed(7)
    units = torch.cat([torch.arange(12), torch.randint(12, (8,), generator=generator)])
    share = torch.rand(20, generator=generator, dtype=torch.float64) + 0.5
    share = share / torch.zeros(12, dtype=torch.float64).index_add(0, units, share)[units]
    assert index_of(mapped[f"{BLOCK}mlp.up.weight"], 0) == units.tolist()
    weight = mapped[f"{BLOCK}mlp.down.weight"].weight
    assert isinstance(weight, Tensor) and torch.allclose(weight, share)


def test_routers_ranks_and_ids_are_drawn_from_the_seed() -> None:
    model = shaken(config())
    router = pieces(model, op("upcycle_moe", {"experts": 4}))[f"{BLOCK}mlp.router.weight"].plus
    rank = pieces(model, op("set_attn_lora_rank", 3))[f"{BLOCK}attn.q.lora_a"].plus
    ids = pieces(model, op("resize_vocabulary", model.cfg.vocab_size + 5))["embed.weight"].plus
    assert router is not None and same_numbers(router, normal(4, 8))
    assert rank is not None and same_numbers(rank, normal(3, 8))
    assert ids is not None and same_numbers(ids[V:], normal(V + 5, 8)[V:])


def test_the_defaults_of_upcycling_are_no_shards_and_a_random_router() -> None:
    model = shaken(config())
    bare = replace(op("upcycle_moe", {"experts": 4}), value={"experts": 4, "top_k": 2})
    mapped = grow(bare, model.cfg, model.cfg.changed(experts=4, top_k=2), model, 7)[1].pieces
    router = mapped[f"{BLOCK}mlp.router.weight"].plus
    assert router is not None and 0.01 < float(router.std()) < 0.03
    assert index_of(mapped[f"{BLOCK}mlp.experts.1.up.weight"], 0) is None
