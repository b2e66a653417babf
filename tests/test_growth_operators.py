"""Each architecture operation keeps its promise and follows its formulas on small models of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import examples
from growing import (
    IDX,
    MODERN,
    T,
    V,
    architectures,
    config,
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
from mainrun.growth.moments import transfer
from mainrun.growth.operators import OPS, SPACES, grow, part, truncate
from mainrun.growth.verify import check_function, logit_change
from mainrun.plan.ops import ARCHITECTURE, Op, Transfer, after
from mainrun.train import GPT

ASYMMETRIC = Transfer("asymmetric")  # a schedule accepts a zero router only with this mode or with noise
MakeOp = Callable[[TrainConfig], Op | None]  # returns None if the op does not apply to this model

EXACT: dict[str, MakeOp] = {
    "split hidden units": lambda c: op("widen_mlp", c.ff_width + 7),
    "new hidden units": lambda c: op("widen_mlp", c.ff_width + 7, init="identity"),
    "twice as wide": lambda c: op("widen_model", {"factor": 2}),
    "twice as wide, the same keys and values": lambda c: op("widen_model", {"factor": 2, "kv": "keep"}),
    "three times as wide, with noise": lambda c: op("widen_model", {"factor": 3, "noise_snr_db": 10.0}),
    "twice as wide, the same keys and values, with noise": lambda c: op(
        "widen_model", {"factor": 2, "kv": "keep", "noise_snr_db": 3.0}
    ),
    "twice as many heads": lambda c: op("add_heads", 8),
    "experts behind a random router": lambda c: (
        None if c.experts else op("upcycle_moe", {"experts": 4, "router_std": 0.5})
    ),
    "8 of 8 experts": lambda c: None if c.experts else op("upcycle_moe", {"experts": 8, "top_k": 8}),
    "shards of experts": lambda c: (
        None if c.experts else op("upcycle_moe", {"experts": 8, "top_k": 4, "shards": 2, "router_std": 0.5})
    ),
    "softmax weights": lambda c: (
        None
        if c.experts
        else op("upcycle_moe", {"experts": 6, "top_k": 3, "router": "zero", "router_weights": "softmax"})
    ),
    "shards with softmax weights": lambda c: (
        None
        if c.experts
        else op(
            "upcycle_moe",
            {"experts": 8, "top_k": 4, "shards": 4, "router": "zero", "router_weights": "softmax"},
        )
    ),
    **{
        f"noisy experts, {k}": lambda c, k=k: (  # type: ignore[misc]
            None
            if c.experts
            else op("upcycle_moe", {"experts": 8, "top_k": k, "router": "zero", "noise_snr_db": 3.0})
        )
        for k in (2, 3, 4)
    },
    "low rank, or a higher one, in attention": lambda c: op("set_attn_lora_rank", c.attn_lora_rank + 3),
    "low rank, or a higher one, in the MLPs": lambda c: (
        None if c.experts else op("set_mlp_lora_rank", c.mlp_lora_rank + 3)
    ),
    "low rank, or a higher one, of the embedding": lambda c: op(
        "set_embedding_lora_rank", c.embed_lora_rank + 3
    ),
    "merged low rank": lambda c: op("merge_lora_weights") if c.has_low_rank else None,
    "more ids": lambda c: op("resize_vocabulary", c.vocab_size + 5),
}
BIT_EXACT: dict[str, MakeOp] = {
    "new layers": lambda c: op(
        "stack_layers", tuple(i for i in range(c.n_layer) for _ in "ab"), init="identity"
    ),
    "new layers at the end": lambda c: op(
        "stack_layers", (*range(c.n_layer), 0, c.n_layer - 1), init="identity"
    ),
    "frozen": lambda c: op("freeze_layer", 0),
    **{
        f"{k} of 4 experts behind a zero router": lambda c, k=k: (  # type: ignore[misc]
            None
            if c.experts
            else op("upcycle_moe", {"experts": 4, "top_k": k, "router": "zero"}, optimizer=ASYMMETRIC)
        )
        for k in (2, 4)
    },
    "1 of 4 experts": lambda c: (
        None
        if c.experts
        else op(
            "upcycle_moe",
            {"experts": 4, "top_k": 1, "router": "zero", "router_weights": "softmax"},
            optimizer=ASYMMETRIC,
        )
    ),
}


def op_for(case: MakeOp, fields: dict[str, Any]) -> Op:
    cfg = config(**fields)
    what = case(cfg)
    assume(what is not None)
    assert what is not None
    assume(what.name != "upcycle_moe" or not cfg.mlp_lora_rank)
    if what.name == "upcycle_moe" and what.value["router"] == "zero":
        what = replace(what, optimizer=ASYMMETRIC)
    return what


@pytest.mark.parametrize("name", EXACT)
@given(architectures, st.integers(0, 1000))
@settings(max_examples=examples(12))
def test_an_exact_op_keeps_the_function_up_to_rounding(name: str, fields: dict[str, Any], seed: int) -> None:
    what = replace(op_for(EXACT[name], fields), seed=seed)
    for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = shaken(config(**fields), seed, dtype)
        new, moved = grown(model, what)
        moved_most, size = logit_change(model, new, IDX)
        assert moved_most <= most * max(1.0, size), (dtype, moved_most)
        assert check_function("exact", model, new, IDX).ok
        changed = {n for n, p in new.named_parameters() if n not in moved.old or p.shape != moved.old[n]}
        assert changed or what.name == "merge_lora_weights", "nothing was changed"


@pytest.mark.parametrize("name", BIT_EXACT)
@given(architectures, st.integers(0, 1000))
@settings(max_examples=6)
def test_a_bitexact_op_keeps_every_bit_of_the_logits(name: str, fields: dict[str, Any], seed: int) -> None:
    what = op_for(BIT_EXACT[name], fields)
    for dtype in (torch.float64, torch.float32):
        model = shaken(config(**fields), seed, dtype)
        new, _ = grown(model, what)
        with torch.no_grad():
            assert torch.equal(model(IDX), new(IDX)), dtype
        assert check_function("bitexact", model, new, IDX).ok


def test_every_op_of_the_schedule_has_an_operator() -> None:
    assert set(OPS) == set(ARCHITECTURE)


@given(architectures)
@settings(max_examples=20)
def test_the_spaces_of_every_parameter_match_its_shape(fields: dict[str, Any]) -> None:
    cfg = config(**fields)
    sizes = {
        "D": 8, "V": V, "T": T, "H": 4, "Q": 4 * cfg.head_width, "K": cfg.kv_heads * cfg.head_width,
        "h": cfg.head_width,
        "F": 12, "E": cfg.experts, "R": cfg.attn_lora_rank, "L": cfg.mlp_lora_rank, "S": cfg.embed_lora_rank,
    }  # fmt: skip
    for name, p in shaken(cfg).named_parameters():
        assert tuple(p.shape) == tuple(sizes[s] for s in SPACES[part(name)]), name


# -- depth


@given(architectures, st.lists(st.integers(0, 1), min_size=1, max_size=5))
@settings(max_examples=20)
def test_each_stacked_layer_is_a_copy_of_its_source(fields: dict[str, Any], sources: list[int]) -> None:
    model = shaken(config(**fields | {"n_layer": 2}))
    new, _ = grown(model, op("stack_layers", tuple(sources)))
    old, new_weights = weights(model), weights(new)
    assert new.cfg.n_layer == len(new.blocks) == len(sources)
    for name, w in new_weights.items():
        if not name.startswith("blocks."):
            assert torch.equal(w, old[name])
            continue
        _, layer, rest = name.split(".", 2)
        source = f"blocks.{sources[int(layer)]}.{rest}"
        assert torch.equal(w, old[source]) if source in old else not w.any() and rest == "attn.first_share"


def test_copied_layers_change_the_function() -> None:
    model = shaken(config())
    new, _ = grown(model, op("stack_layers", (0, 0, 1, 1)))
    assert (
        logit_change(model, new, IDX)[0] > 0.01
        and not check_function("exact", model, new, IDX).ok
        and check_function("none", model, new, IDX).ok
    )


def test_an_identity_layer_ends_in_zeros_and_gets_gradients() -> None:
    """Output weights of zero get gradients at once. The tensors before them get gradients a step later."""
    model = shaken(config(bias=True, attn_lora_rank=2, mlp_lora_rank=2))
    new, _ = grown(model, op("stack_layers", (0, 1, 1), init="identity"))
    old, new_weights = weights(model), weights(new)
    ends = {
        f"blocks.2.{branch}.{kind}"
        for branch in ("attn.o", "mlp.down")
        for kind in ("weight", "bias", "lora_b")
    }
    assert ends <= new_weights.keys() and not any(new_weights[n].any() for n in ends)
    assert all(
        torch.equal(w, old[n.replace("blocks.2", "blocks.1")])
        for n, w in new_weights.items()
        if n.startswith("blocks.2.") and n not in ends
    )
    gradients(new, 1)
    assert all(new.get_parameter(n).grad.abs().max() > 0 for n in ends)  # type: ignore[union-attr]
    steps(new, Optimizers(new.cfg, new), range(2))
    gradients(new, 1)
    assert all(
        p.grad.abs().max() > 0
        for n, p in new.named_parameters()
        if n.startswith("blocks.2.") and not n.endswith("k.bias")
    )  # type: ignore[union-attr]


def test_trap_a_layer_with_norm_gains_of_zero_gets_no_gradient() -> None:
    """A new layer with norm gains of zero also returns its input, but its MLP gets no gradient."""
    model = shaken(config(norm="rmsnorm", bias=False))
    right, _ = grown(model, op("stack_layers", (0, 1, 1), init="identity"))
    faulty, _ = grown(model, op("stack_layers", (0, 1, 1)))
    with torch.no_grad():
        for norm in (faulty.blocks[2].attn_norm, faulty.blocks[2].mlp_norm):
            norm.weight.zero_()  # type: ignore[operator, union-attr]
    assert logit_change(model, faulty, IDX)[0] == logit_change(model, right, IDX)[0] == 0
    for new, learns in ((faulty, False), (right, True)):
        gradients(new, 1)
        assert bool(new.blocks[2].mlp.down.weight.grad.any()) == learns  # type: ignore[union-attr]


def test_trap_the_biases_at_the_end_of_branches_are_forgotten() -> None:
    model = shaken(config(bias=True))
    what = op("stack_layers", (0, 1, 1), init="identity")
    new, _ = grown(model, what)
    assert check_function("bitexact", model, new, IDX).ok
    for name in ("attn.o.bias", "mlp.down.bias"):
        faulty, _ = grown(model, what)
        with torch.no_grad():
            faulty.get_parameter(f"blocks.2.{name}").copy_(model.get_parameter(f"blocks.1.{name}"))
        assert (
            not check_function("bitexact", model, faulty, IDX).ok
            and logit_change(model, faulty, IDX)[0] > 1e-3
        ), name


# -- width


def test_the_copies_of_a_unit_have_unequal_shares_of_its_output() -> None:
    model = shaken(config(mlp="swiglu", bias=True))
    new, moved = grown(model, op("widen_mlp", 40))
    old, new_weights = weights(model), weights(new)
    for mlp in ("blocks.0.mlp.", "blocks.1.mlp."):
        units = moved.pieces[f"{mlp}up.weight"].index[0]
        share = moved.pieces[f"{mlp}down.weight"].weight
        assert units is not None and isinstance(share, Tensor)
        assert torch.equal(units[:12], torch.arange(12)) and set(units.tolist()) == set(range(12))
        for side in ("up", "gate"):  # `up` and `gate` copy the same hidden units
            assert torch.equal(new_weights[f"{mlp}{side}.weight"], old[f"{mlp}{side}.weight"][units])
            assert torch.equal(new_weights[f"{mlp}{side}.bias"], old[f"{mlp}{side}.bias"][units])
        assert torch.equal(new_weights[f"{mlp}down.weight"], old[f"{mlp}down.weight"][:, units] * share)
        assert torch.equal(new_weights[f"{mlp}down.bias"], old[f"{mlp}down.bias"]), (
            "the bias is added once, not once per copy"
        )
        assert torch.allclose(
            torch.zeros(12, dtype=torch.float64).index_add(0, units, share),
            torch.ones(12, dtype=torch.float64),
        )
        assert len(share.unique()) > 12, "with equal shares, copies would never diverge"
    one, other = (moved.pieces[f"blocks.{i}.mlp.up.weight"].index[0] for i in (0, 1))
    assert one is not None and other is not None and not torch.equal(one, other)


def test_identity_units_are_random_and_have_no_output() -> None:
    new, _ = grown(shaken(config()), op("widen_mlp", 40, init="identity"))
    mlp: Any = new.blocks[0].mlp
    assert not mlp.down.weight[:, 12:].any() and not mlp.up.bias[12:].any()
    assert 0.01 < mlp.up.weight[12:].std() < 0.03 and mlp.down.weight[:, :12].all()


def test_a_widened_model_consists_of_tiles() -> None:
    """Widening by n turns each matrix W into tile(W, n, n) / n.

    A tied head keeps its weights, and the last norm is divided by n.
    """
    for tied in (True, False):
        model = shaken(
            config(
                tie_head=tied,
                norm="layernorm",
                qk_norm=True,
                attn_gate=True,
                layer_scale=0.5,
                value_residual=True,
                experts=3,
            )
        )
        new, _ = grown(model, op("widen_model", {"factor": 2}))
        old, new_weights = weights(model), weights(new)
        assert (new.cfg.d_model, new.cfg.n_head, new.cfg.head_width, new.cfg.ff_width) == (16, 4, 4, 24)
        for name, w in new_weights.items():
            expected = old[name]
            if name in ("embed.weight", "positions.weight"):
                expected = expected.tile(1, 2)
            elif name == "head.weight" or ".router." in name:
                expected = expected.tile(1, 2) / 2
            elif w.ndim == 2:
                expected = expected.tile(2, 2) / 2
            elif name in ("norm.weight", "norm.bias"):
                expected = expected.tile(2) / (2 if tied else 1)
            elif "first_share" not in name and "q_norm" not in name and "k_norm" not in name:
                expected = expected.tile(2)
            assert torch.equal(w, expected), name


def test_copies_of_a_query_head_share_kept_keys_and_values() -> None:
    model = shaken(config(n_head=4, n_kv_head=2))
    new, _ = grown(model, op("widen_model", {"factor": 2, "kv": "keep"}))
    old, new_weights = weights(model), weights(new)
    q, k, o = "blocks.0.attn.q.weight", "blocks.0.attn.k.weight", "blocks.0.attn.o.weight"
    assert torch.equal(
        new_weights[q], old[q].view(4, 2, 8).repeat_interleave(2, 0).flatten(0, 1).tile(1, 2) / 2
    )
    assert torch.equal(new_weights[k], old[k].tile(1, 2) / 2)
    assert torch.equal(new_weights[o], old[o].view(8, 4, 2).repeat_interleave(2, 1).flatten(1).tile(2, 1) / 2)
    faulty, _ = grown(model, op("widen_model", {"factor": 2, "kv": "keep"}))
    with torch.no_grad():  # plant the mistake: copies of head 1 read the keys of head 2
        for block in faulty.blocks:
            block.attn.q.weight.copy_(block.attn.q.weight.view(4, 2, 2, 16).transpose(0, 1).reshape(16, 16))
            block.attn.o.weight.copy_(block.attn.o.weight.view(16, 4, 2, 2).transpose(1, 2).reshape(16, 16))
            block.attn.q.bias.copy_(block.attn.q.bias.view(4, 2, 2).transpose(0, 1).flatten())
    assert logit_change(model, new, IDX)[0] < 1e-10 and logit_change(model, faulty, IDX)[0] > 1e-3


def test_a_change_of_the_head_width_is_refused() -> None:
    model = shaken(config())
    what = op("widen_model", {"factor": 2})
    with pytest.raises(ValueError, match="the head width would change from 4 to 8; keep the head width"):
        grow(what, model.cfg, model.cfg.changed(d_model=16, d_ff=24), model, 1)


def test_trap_a_tied_head_that_is_widened_twice() -> None:
    """Widening divides the last norm by n. Without this, widening by 2 twice multiplies the logits by 4."""
    model = shaken(config(tie_head=True))
    once, _ = grown(model, op("widen_model", {"factor": 2}))
    twice, _ = grown(once, op("widen_model", {"factor": 2}))
    assert logit_change(model, once, IDX)[0] < 1e-10 and logit_change(model, twice, IDX)[0] < 1e-10
    assert twice.head is None
    with torch.no_grad():
        twice.norm.weight.copy_(model.norm.weight.tile(4))  # type: ignore[operator, union-attr]
        twice.norm.bias.copy_(model.norm.bias.tile(4))  # type: ignore[operator, union-attr]
        assert torch.allclose(twice(IDX), 4 * model(IDX))


def test_noise_on_pairs_of_columns_has_the_given_size_and_keeps_the_function() -> None:
    model = shaken(config())
    plain, _ = grown(model, op("widen_model", {"factor": 2}))
    noisy, _ = grown(model, op("widen_model", {"factor": 2, "noise_snr_db": 10.0}))
    faulty, _ = grown(model, op("widen_model", {"factor": 2}))
    name = "blocks.0.mlp.up.weight"
    noise = noisy.get_parameter(name) - plain.get_parameter(name)
    assert torch.allclose(noise[:, :8], -noise[:, 8:])
    ratio = 10 * torch.log10(plain.get_parameter(name).square().mean() / noise.square().mean())
    assert 8 < ratio < 12
    with torch.no_grad():
        rows = noise[:12, :8].repeat(1, 2)
        faulty.get_parameter(name).add_(torch.cat([rows, -rows]))
    assert logit_change(model, noisy, IDX)[0] < 1e-10 and logit_change(model, faulty, IDX)[0] > 1e-3


def test_new_heads_have_output_weights_of_zero() -> None:
    model = shaken(config(n_head=4, n_kv_head=2, attn_lora_rank=2, attn_gate=True, d_model=16))
    new, _ = grown(model, op("add_heads", 6))
    attn: Any = new.blocks[0].attn
    # The third head of each group is new.
    fresh = torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.bool).repeat_interleave(4)
    assert (
        not attn.o.weight[:, fresh].any()
        and not attn.o.lora_a[:, fresh].any()
        and not attn.q.lora_b[fresh].any()
    )
    assert attn.q.weight[fresh].all() and torch.equal(attn.q.weight[~fresh], model.blocks[0].attn.q.weight)
    assert torch.equal(attn.k.weight, model.blocks[0].attn.k.weight)
    with pytest.raises(ValueError, match="cannot contain the old"):
        grow(op("add_heads", 8), model.cfg, model.cfg.changed(n_head=4, n_kv_head=4, head_dim=4), model, 1)


# -- experts


def test_experts_are_copies_of_the_mlp_or_of_its_shards() -> None:
    model = shaken(config(mlp="swiglu", bias=True))
    old = weights(model)
    new, _ = grown(model, op("upcycle_moe", {"experts": 4, "router_std": 0.02}))
    for name, w in weights(new).items():
        if ".experts." in name:
            assert torch.equal(w, old[name[: name.index("experts.")] + name.split("experts.")[1][2:]]), name
    router = new.get_parameter("blocks.0.mlp.router.weight")
    assert 0.01 < router.std() < 0.03
    new, _ = grown(model, op("upcycle_moe", {"experts": 4, "top_k": 2, "shards": 2}))
    new_weights = weights(new)
    for e in range(4):
        part_of = slice(e % 2 * 6, e % 2 * 6 + 6)
        assert torch.equal(
            new_weights[f"blocks.0.mlp.experts.{e}.gate.weight"], old["blocks.0.mlp.gate.weight"][part_of]
        )
        assert torch.equal(
            new_weights[f"blocks.0.mlp.experts.{e}.down.weight"],
            old["blocks.0.mlp.down.weight"][:, part_of] * 2,
        )
    assert torch.equal(
        new_weights["blocks.0.mlp.router.weight"][0], new_weights["blocks.0.mlp.router.weight"][1]
    ), "the shards of a group have equal router rows"
    assert not torch.equal(
        new_weights["blocks.0.mlp.router.weight"][1], new_weights["blocks.0.mlp.router.weight"][2]
    )


def test_with_softmax_weights_only_the_down_projection_is_scaled() -> None:
    model = shaken(config(bias=True))
    what = op(
        "upcycle_moe",
        {"experts": 6, "top_k": 3, "router": "zero", "router_weights": "softmax"},
        optimizer=ASYMMETRIC,
    )
    new, _ = grown(model, what)
    for kind in ("weight", "bias"):
        assert torch.equal(
            new.get_parameter(f"blocks.0.mlp.experts.1.down.{kind}"),
            model.get_parameter(f"blocks.0.mlp.down.{kind}") * 2,
        )
        assert torch.equal(
            new.get_parameter(f"blocks.0.mlp.experts.1.up.{kind}"),
            model.get_parameter(f"blocks.0.mlp.up.{kind}"),
        )


def test_shards_that_do_not_divide_and_noise_behind_a_random_router_are_refused() -> None:
    model = shaken(config())
    for value, match in (
        ({"shards": 5}, "shards=5 must divide"),
        ({"noise_snr_db": 3.0}, "noise_snr_db changes the output of a model with router=random"),
    ):
        with pytest.raises(ValueError, match=match):
            grow(op("upcycle_moe", {"experts": 4} | value), model.cfg, model.cfg.changed(experts=4), model, 1)


# -- low-rank terms


def test_a_lower_rank_is_the_nearest_product_and_reports_the_lost_share() -> None:
    model = shaken(config(attn_lora_rank=4, mlp_lora_rank=4, embed_lora_rank=4))
    for name, modules in (
        ("set_attn_lora_rank", [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in "qkvo"]),
        ("set_mlp_lora_rank", [f"blocks.{i}.mlp.{n}" for i in (0, 1) for n in ("up", "down")]),
        ("set_embedding_lora_rank", ["embed"]),
    ):
        new, moved = grown(model, op(name, 2))
        assert set(moved.truncated) == set(modules)
        for module in modules:
            before, now = (m.get_submodule(module) for m in (model, new))
            full, low = (m.scale * (m.lora_b @ m.lora_a).detach() for m in (before, now))  # type: ignore[operator, union-attr]
            u, s, vt = torch.linalg.svd(full)
            assert torch.allclose(low, u[:, :2] * s[:2] @ vt[:2], atol=1e-12)
            assert moved.truncated[module] == pytest.approx(float((full - low).norm() / full.norm()))
            assert 0.05 < moved.truncated[module] < 1
    a, b = torch.randn(4, 9, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    low_a, low_b, lost = truncate(a, b, 4)
    assert torch.allclose(low_b @ low_a, b @ a) and lost < 1e-12
    assert truncate(a, torch.zeros(7, 4), 2)[2] == 0


def test_a_rank_of_zero_is_refused() -> None:
    model = shaken(config(attn_lora_rank=2))
    with pytest.raises(ValueError, match="merge_lora_weights"):
        grow(op("set_attn_lora_rank", 0), model.cfg, model.cfg.changed(attn_lora_rank=0), model, 1)


def test_trap_the_term_of_a_tied_embedding_is_used_at_both_ends() -> None:
    """If a tied head ignored the low-rank term of the embedding, merging it would change the logits."""
    model = shaken(config(embed_lora_rank=2))
    new, _ = grown(model, op("merge_lora_weights"))
    assert "embed.lora_a" not in weights(new) and logit_change(model, new, IDX)[0] < 1e-10
    embed: Any = model.embed

    class TermAtTheInputOnly(GPT):
        def output_weight(self) -> Tensor:
            return self.embed.weight

    model.__class__ = TermAtTheInputOnly
    assert logit_change(model, new, IDX)[0] > 1e-3
    assert torch.allclose(new.embed.weight, embed.effective_weight())


# -- vocabulary


def test_new_ids_change_the_logits_only_without_their_mask() -> None:
    model = shaken(config(vocab_size=300))
    new, _ = grown(model, op("resize_vocabulary", 311))
    assert new.embed.num_embeddings == V + 11 and torch.equal(new.embed.weight[:V], model.embed.weight)
    with torch.no_grad():
        before, logits = model(IDX), new(IDX)
        assert torch.allclose(
            logits[..., :V], before, rtol=0, atol=1e-12
        )  # a wider matrix product may sum in another order
        assert (logits[..., V:] == -torch.inf).all()
        new.cfg = new.cfg.changed(unused_ids=0)  # the new ids are now in use
        open_ = new(IDX)
    rise = before.log_softmax(-1)[..., 0] - open_.log_softmax(-1)[..., 0]
    assert torch.allclose(
        rise, torch.log1p((open_[..., V:] - before.logsumexp(-1, keepdim=True)).exp().sum(-1))
    )
    assert (rise > 0.1).any() and not check_function("exact", model, new, IDX).ok


# -- random numbers and failures


def test_random_numbers_depend_only_on_the_seed() -> None:
    model = shaken(config(**MODERN))
    before, state = weights(model), torch.get_rng_state()
    whats = [op("widen_mlp", 40), op("widen_model", {"factor": 2, "noise_snr_db": 3.0}), op("add_heads", 8)]
    whats += [op("set_attn_lora_rank", 2), op("upcycle_moe", {"experts": 2}), op("resize_vocabulary", 500)]
    for what in whats:
        one, again, other = (weights(grown(model, replace(what, seed=seed))[0]) for seed in (1, 1, 2))
        assert all(torch.equal(one[n], again[n]) for n in one), what.name
        assert not all(torch.equal(one[n], other[n]) for n in one), what.name
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not used"
    assert all(torch.equal(before[n], w) for n, w in weights(model).items()), "the old model is not changed"


def test_trap_a_failed_op_changes_nothing() -> None:
    """After a failed operation, the run continues with the old model and optimizer state."""
    model, optimizers = trained(config())
    before, state = weights(model), {k: v.clone() for k, v in optimizers.state().items()}
    what = op("upcycle_moe", {"experts": 4, "shards": 5})
    with pytest.raises(ValueError, match="shards=5"):
        grow(what, model.cfg, model.cfg.changed(experts=4), model, 1)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())
    assert all(torch.equal(state[n], w) for n, w in optimizers.state().items())
    with torch.no_grad():  # an in-place change would remain after the failure
        model.embed.weight.mul_(2)
    with pytest.raises(RuntimeError):
        model.norm.weight.data.copy_(torch.zeros(5))  # type: ignore[operator, union-attr]
    assert not torch.equal(before["embed.weight"], model.embed.weight)


def test_a_grown_model_keeps_mode_attention_kernel_and_dtype() -> None:
    """A grown model keeps the mode, attention kernel, dtype and frozen layers of the old model."""
    model = shaken(config(), dtype=torch.float32).train()
    for block in model.blocks:
        block.attn.fused = True
    new, moved = grown(model, op("freeze_layer", 1))
    assert (
        new.training
        and all(block.attn.fused for block in new.blocks)
        and new.embed.weight.dtype == torch.float32
    )
    frozen = {n for n, p in new.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in weights(new) if n.startswith("blocks.1.")} and not frozen & set(moved.new)
    thawed, moved = grown(new, op("unfreeze_layer", 1))
    assert set(moved.new) == set(weights(thawed))


def test_a_staged_growth_keeps_each_of_its_promises() -> None:
    """The same model is upcycled, widened and stacked in turn, and each operation keeps its promise."""
    model, optimizers = trained(config(**MODERN))
    for what, promise in (
        (op("upcycle_moe", {"experts": 4, "top_k": 2, "router": "zero"}, optimizer=ASYMMETRIC), "bitexact"),
        (op("widen_model", {"factor": 2, "noise_snr_db": 10.0}), "exact"),
        (op("stack_layers", (0, 0, 1), init="identity"), "bitexact"),
    ):
        cfg = after(replace(what, preserve=promise), model.cfg)
        new, moved = grow(what, model.cfg, cfg, model, 3)
        assert check_function(promise, model, new, IDX).ok, what.name
        then = Optimizers(cfg, new)
        then.load(transfer(optimizers.state(), moved)[0])
        steps(new, then, range(3))
        model, optimizers = new, then
    logits = model(IDX)
    assert logits.isfinite().all() and F.cross_entropy(logits.flatten(0, 1), IDX.flatten()).isfinite()
