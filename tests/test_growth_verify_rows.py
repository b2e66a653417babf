"""Test each check of a grown model with the last value that passes and the first value that fails."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from growing import IDX, V, config, grown, op, shaken
from torch import Tensor, nn

from mainrun.core.optimizers import Optimizers
from mainrun.growth import verify
from mainrun.growth.moments import IndexMap, Piece
from mainrun.growth.verify import (
    PromiseCheck,
    check_coverage,
    check_function,
    check_groups,
    check_layer_identity,
    check_rope,
    check_router_scale,
    check_symmetry,
    check_tying,
    equal_copies,
    eval_mode,
    locked_routers,
    logit_change,
    moe_layers,
    probe,
    router_inputs,
)
from mainrun.train import GPT

CFG = config()


class ConstantModel(nn.Module):
    """A model that always returns the same logits."""

    def __init__(self, *logits: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, 2).to(dtype)
        self.cfg: Any = CFG
        self.logits = torch.tensor(logits, dtype=torch.float64)
        self.seen: list[tuple[bool, str, bool]] = []

    def forward(self, idx: Tensor) -> Tensor:
        self.seen.append((self.training, self.cfg.dtype, torch.is_grad_enabled()))
        return self.logits


def function_check(promise: str, before: ConstantModel, after: ConstantModel) -> PromiseCheck:
    return check_function(promise, before, after, IDX)


def test_a_probe_is_drawn_from_its_seed() -> None:
    assert probe(50, 6, seed=1).shape == (4, 6) and probe(50, 6, seed=1, rows=2).shape == (2, 6)
    assert torch.equal(
        probe(50, 6, seed=1), torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(1))
    )
    assert probe(2, 99, seed=1).unique().tolist() == [0, 1]


@pytest.mark.parametrize(("full", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_eval_mode_restores_mode_config_and_gradients(full: bool, dtype: str) -> None:
    models = [ConstantModel(1.0).train(), ConstantModel(1.0).eval()]
    for model in models:
        model.cfg = CFG.changed(dtype="bfloat16")

    def use_models() -> None:
        with eval_mode(*models, full=full):
            assert [(m.training, m.cfg.dtype, torch.is_grad_enabled()) for m in models] == [
                (False, dtype, False)
            ] * 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        use_models()
    assert [(m.training, m.cfg.dtype) for m in models] == [
        (True, "bfloat16"),
        (False, "bfloat16"),
    ] and torch.is_grad_enabled()


DELTAS: dict[str, tuple[list[float], list[float], tuple[float, float]]] = {
    "unchanged": ([1.0, -2.0], [1.0, -2.0], (0.0, 2.0)),
    "up and down": ([1.0, -2.0], [1.5, -2.25], (0.5, 2.0)),
    "the largest logit before": ([1.0, 0.5], [1.0, 8.5], (8.0, 1.0)),
    "new ids with probability 0": ([1.0, 2.0], [1.0, 2.0, -math.inf], (0.0, 2.0)),
    "a new id with some probability": ([1.0, 2.0], [1.0, 2.0, -9.0], (math.inf, 2.0)),
    "one of two new ids with some probability": ([1.0, 2.0], [1.0, 2.0, -math.inf, 0.0], (math.inf, 2.0)),
    "an id that keeps probability 0": ([1.0, -math.inf], [1.25, -math.inf], (0.25, 1.0)),
    "an id that loses its probability": ([1.0, 2.0], [1.0, -math.inf], (math.inf, 2.0)),
    "NaN": ([1.0, 2.0], [1.0, math.nan], (math.inf, 2.0)),
}


@pytest.mark.parametrize(("before", "after", "expected"), DELTAS.values(), ids=DELTAS)
def test_the_largest_change_of_a_logit(
    before: list[float], after: list[float], expected: tuple[float, float]
) -> None:
    assert logit_change(ConstantModel(*before), ConstantModel(*after), IDX) == expected


def test_logits_are_compared_in_the_dtype_of_the_config_unless_full() -> None:
    before, after = ConstantModel(0.5), ConstantModel(0.5)
    before.cfg = after.cfg = CFG.changed(dtype="bfloat16")
    logit_change(before, after, IDX)
    logit_change(before, after, IDX, full=True)
    assert before.seen == after.seen == [(False, "bfloat16", False), (False, "float32", False)]


PROMISES: list[tuple[str, torch.dtype, list[float], list[float], bool, str]] = [
    ("bitexact", torch.float32, [0.5], [0.5], True, "max |delta logits| 0; bitexact allows only 0"),
    (
        "bitexact",
        torch.float32,
        [0.5],
        [0.5 + 1e-12],
        False,
        "max |delta logits| 1e-12; bitexact allows only 0",
    ),
    (
        "exact",
        torch.float32,
        [0.5],
        [0.5 + 0.99e-5],
        True,
        "max |delta logits| 9.9e-06; exact allows at most 1e-05, for logits up to 0.5",
    ),
    (
        "exact",
        torch.float32,
        [0.5],
        [0.5 + 1.01e-5],
        False,
        "max |delta logits| 1.01e-05; exact allows at most 1e-05, for logits up to 0.5",
    ),
    (
        "exact",
        torch.float32,
        [0.0],
        [1e-5],
        True,
        "max |delta logits| 1e-05; exact allows at most 1e-05, for logits up to 0",
    ),
    (
        "exact",
        torch.float32,
        [8.0],
        [8.0 + 7.9e-5],
        True,
        "max |delta logits| 7.9e-05; exact allows at most 8e-05, for logits up to 8",
    ),
    (
        "exact",
        torch.float32,
        [8.0],
        [8.0 + 8.1e-5],
        False,
        "max |delta logits| 8.1e-05; exact allows at most 8e-05, for logits up to 8",
    ),
    (
        "exact",
        torch.float64,
        [0.5],
        [0.5 + 0.99e-10],
        True,
        "exact allows at most 1e-10, for logits up to 0.5",
    ),
    (
        "exact",
        torch.float64,
        [0.5],
        [0.5 + 1.01e-10],
        False,
        "exact allows at most 1e-10, for logits up to 0.5",
    ),
    (
        "exact",
        torch.float64,
        [-4.0],
        [-4.0 - 3.9e-10],
        True,
        "exact allows at most 4e-10, for logits up to 4",
    ),
    ("exact", torch.float64, [0.5], [math.nan], False, "max |delta logits| inf; exact allows at most 1e-10"),
    ("approx", torch.float32, [0.5], [99.0], True, "max |delta logits| 98.5; logits must be finite"),
    ("none", torch.float32, [0.5], [99.0], True, "max |delta logits| 98.5; logits must be finite"),
    (
        "approx",
        torch.float32,
        [0.5, 0.5],
        [99.0, math.nan],
        False,
        "max |delta logits| inf; logits must be finite",
    ),
    (
        "none",
        torch.float32,
        [0.5, 0.5],
        [99.0, math.inf],
        False,
        "max |delta logits| inf; logits must be finite",
    ),
    (
        "none",
        torch.float32,
        [0.5, 0.5],
        [99.0, -math.inf],
        True,
        "max |delta logits| inf; logits must be finite",
    ),
]


@pytest.mark.parametrize(("promise", "dtype", "before", "after", "ok", "words"), PROMISES)
def test_the_limit_of_each_promise(
    promise: str, dtype: torch.dtype, before: list[float], after: list[float], ok: bool, words: str
) -> None:
    check = function_check(promise, ConstantModel(*before), ConstantModel(*after, dtype=dtype))
    assert (check.name, check.ok) == ("function", ok) and words in check.detail


@pytest.mark.parametrize(
    ("logits", "ok"),
    [
        ([[0.0, -math.inf], [1.0, -math.inf]], True),
        ([[0.0, 1.0], [math.nan, 1.0]], False),
        ([[-math.inf, -math.inf], [0.0, 0.0]], False),
    ],
)
def test_each_position_needs_a_finite_logit(logits: list[list[float]], ok: bool) -> None:
    before, after = ConstantModel(0.0), ConstantModel(0.0)
    before.logits, after.logits = torch.zeros(2, 2), torch.tensor(logits)
    assert function_check("none", before, after).ok is ok


def test_a_check_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        check_coverage(0.1, 0.2).ok = True


@pytest.mark.parametrize(
    ("promise", "dtype"),
    [("exact", "float32"), ("bitexact", "bfloat16"), ("none", "bfloat16"), ("approx", "bfloat16")],
)
def test_only_exact_is_checked_in_full_precision(promise: str, dtype: str) -> None:
    before, after = ConstantModel(0.5), ConstantModel(0.5)
    before.cfg = after.cfg = CFG.changed(dtype="bfloat16")
    assert function_check(promise, before, after).ok
    assert {seen for model in (before, after) for seen in model.seen} == {(False, dtype, False)}


@pytest.mark.parametrize(
    ("coverage", "least", "ok", "words"),
    [
        (0.9, 0.9, True, "90.0% of the optimizer's state was transferred, 90.0% is required"),
        (0.8999, 0.9, False, "90.0% of the optimizer's state was transferred, 90.0% is required"),
        (0.0, 0.0, True, "0.0% of the optimizer's state was transferred, 0.0% is required"),
        (0.721, 1.0, False, "72.1% of the optimizer's state was transferred, 100.0% is required"),
    ],
)
def test_coverage_and_its_minimum(coverage: float, least: float, ok: bool, words: str) -> None:
    assert check_coverage(coverage, least) == PromiseCheck("coverage", ok, words)


# -- tying and groups


@pytest.mark.parametrize("tie", [True, False])
def test_a_head_must_be_tied_as_in_both_configs(tie: bool) -> None:
    model = shaken(config(tie_head=tie))
    word, other = ("tied", "untied") if tie else ("untied", "tied")
    assert check_tying(model.cfg, model) == PromiseCheck(
        "tying", True, f"head {word}, before {word}; shared: none"
    )
    changed = model.cfg.changed(tie_head=not tie)
    assert check_tying(changed, model) == PromiseCheck(
        "tying", False, f"head {word}, before {other}; shared: none"
    )
    model.cfg = changed
    assert not check_tying(changed, model).ok, "both configs differ from the model"
    assert not check_tying(changed.changed(tie_head=tie), model).ok, "the new config differs from the model"


def test_parameters_that_share_memory_are_named() -> None:
    model = shaken(config())
    first, second = model.blocks[0].mlp.up, model.blocks[1].mlp.up
    first.weight.data = second.weight.data
    check = check_tying(model.cfg, model)
    assert not check.ok and check.detail.endswith(
        "shared: ['blocks.0.mlp.up.weight', 'blocks.1.mlp.up.weight']"
    )


class FakeOptimizers:
    """Optimizers with the given parameter groups."""

    def __init__(self, *groups: list[Tensor]) -> None:
        self.all = [SimpleNamespace(param_groups=[{"params": group} for group in groups])]


def test_each_parameter_must_be_in_one_group_and_nothing_else_in_any() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    a, b, c, d = model.parameters()
    stranger = nn.Parameter(torch.zeros(1))

    def check(*groups: list[Tensor]) -> tuple[bool, str]:
        result = check_groups(model, FakeOptimizers(*groups))
        assert result.name == "groups"
        return result.ok, result.detail

    assert check([a, b], [c, d]) == (True, "4 tensors, each in one group")
    assert check([a, b], [c]) == (False, "1.bias in 0 groups")
    assert check([a, b, a], [c, d]) == (False, "0.weight in 2 groups")
    assert check([a, b], [c, d, stranger]) == (
        False,
        "1 tensors that the model does not train",
    )
    assert check([a], [a, c, stranger]) == (
        False,
        "0.weight in 2 groups, 0.bias in 0 groups, 1.bias in 0 groups, "
        "1 tensors that the model does not train",
    )
    d.requires_grad_(False)
    assert check([a, b], [c]) == (True, "3 tensors, each in one group")
    assert check([a, b], [c, d]) == (False, "1 tensors that the model does not train")
    six = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(6)))
    assert check_groups(six, FakeOptimizers()).detail == ", ".join(
        f"{i}.weight in 0 groups" for i in range(5)
    )


# -- equal copies, locked routers


NAME, OTHER = "blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"


class FakeModel(nn.Module):
    def __init__(self, **named: Tensor) -> None:
        super().__init__()
        self.named = {name.replace("__", "."): value for name, value in named.items()}

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.named.items())


def map_with_copies(*rows: list[float], name: str = NAME, weight: Any = 1.0) -> tuple[IndexMap, FakeModel]:
    """Return a map and a model with four rows, in which rows 2 and 3 are copies of rows 0 and 1."""
    value = torch.tensor(rows, dtype=torch.float64)
    piece = Piece(name, (torch.tensor([0, 1, 0, 1]), None), weight=weight)
    return IndexMap({name: piece}, {}, {name: value.shape}), FakeModel(**{name.replace(".", "__"): value})


@pytest.mark.parametrize(
    ("rows", "weight", "locked"),
    [
        ([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], 1.0, True),
        ([[3.0, 4.0], [0.0, 0.0], [3.0, 4.00004], [0.0, 0.0]], 1.0, True),  # a relative difference of 8e-6
        ([[3.0, 4.0], [0.0, 0.0], [3.0, 4.00006], [0.0, 0.0]], 1.0, False),  # a relative difference of 12e-6
        ([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 1e-9]], 1.0, True),
        (
            [[0.0, 0.0], [0.0, 0.0], [0.0, 1e-30], [0.0, 0.0]],
            1.0,
            False,
        ),  # a norm of zero has no relative difference
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], 1.0, True),
        ([[3.0, 4.0], [1.0, 1.0], [3.0, 4.0], [1.0, 1.0]], 0.5, True),
        (
            [[3.0, 4.0], [1.0, 1.0], [6.0, 8.0], [2.0, 2.0]],
            torch.tensor([[1.0], [1.0], [2.0], [2.0]]),
            True,
        ),  # shares of one unit
        ([[3.0, 4.0], [1.0, 1.0], [3.0, 4.0], [1.0, 1.0]], torch.tensor([[1.0], [1.0], [2.0], [2.0]]), False),
    ],
)
def test_copies_within_the_tolerance_count_as_equal(
    rows: list[list[float]], weight: Any, locked: bool
) -> None:
    moved, model = map_with_copies(*rows, weight=weight)
    assert equal_copies(moved, model) == ([NAME] if locked else [])
    check = check_symmetry(moved, model)
    assert (check.name, check.ok) == ("symmetry", not locked)
    assert check.detail == f"copies are still equal in {int(locked)} of 1 tensors" + f": {NAME}" * locked


def test_a_tensor_is_listed_if_all_of_its_copies_are_equal() -> None:
    """An expert is listed only if both of its rows equal the rows that two other experts have copied."""
    names = [f"blocks.0.mlp.experts.{e}.up.weight" for e in range(3)]
    pieces = {
        names[0]: Piece("w", (torch.tensor([0, -1]), None)),
        names[1]: Piece("w", (torch.tensor([1, -1]), None)),
        names[2]: Piece("w", (torch.tensor([0, 1]), None)),
    }
    moved = IndexMap(pieces, {}, {name: torch.Size((2, 1)) for name in names})
    values = {names[0]: [[1.0], [9.0]], names[1]: [[2.0], [9.0]], names[2]: [[1.0], [2.0]]}
    model = FakeModel(**{name.replace(".", "__"): torch.tensor(value) for name, value in values.items()})
    assert equal_copies(moved, model) == [names[2]]
    for row in (0, 1):
        other = [[1.0], [2.0]]
        other[row] = [3.0]
        model.named[names[2]] = torch.tensor(other)
        assert equal_copies(moved, model) == [], row


def test_copies_are_compared_without_their_factors() -> None:
    names = EXPERTS[:2]
    pieces = {names[0]: Piece("w", weight=1.0), names[1]: Piece("w", weight=2.0)}
    moved = IndexMap(pieces, {}, {name: torch.Size((1, 1)) for name in names})
    for value, locked in ((6.0, True), (3.0, False)):
        model = FakeModel(
            **{
                names[0].replace(".", "__"): torch.tensor([[3.0]]),
                names[1].replace(".", "__"): torch.tensor([[value]]),
            }
        )
        assert equal_copies(moved, model) == ([names[1]] if locked else [])


EXPERTS = [f"blocks.0.mlp.experts.{e}.up.weight" for e in range(3)]


def test_the_tolerance_of_equal_copies() -> None:
    moved, model = map_with_copies([3.0, 4.0], [0.0, 0.0], [3.0, 4.05], [0.0, 0.0])
    assert equal_copies(moved, model) == [] and equal_copies(moved, model, tolerance=0.02) == [NAME]
    assert equal_copies(moved, model, tolerance=0.01) == [NAME], "the tolerance itself counts as equal"


def test_at_most_three_tensors_are_named() -> None:
    names = [f"blocks.{i}.mlp.up.weight" for i in range(5)]
    pieces = {name: Piece(name, (torch.tensor([0, 0]), None)) for name in names}
    moved = IndexMap(pieces, {}, {name: torch.Size((2, 1)) for name in names})
    model = FakeModel(**{name.replace(".", "__"): torch.ones(2, 1) for name in names})
    assert (
        check_symmetry(moved, model).detail
        == f"copies are still equal in 5 of 5 tensors: {', '.join(names[:3])}"
    )
    none = IndexMap({}, {}, {})
    assert check_symmetry(none, model) == PromiseCheck(
        "symmetry", True, "copies are still equal in 0 of 0 tensors"
    )


ROUTED = {"experts": 4, "d_model": 8}


def routed(**fields: Any) -> GPT:
    return shaken(config(**ROUTED | fields))


def test_router_inputs_are_the_inputs_of_the_layers() -> None:
    model = routed().train()
    inputs = router_inputs(model, IDX)
    assert list(inputs) == list(moe_layers(model)) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert all(x.shape == (*IDX.shape, 8) for x in inputs.values()) and model.training
    assert not any(module._forward_pre_hooks for module in model.modules()), "all hooks are removed"
    assert router_inputs(shaken(config()), IDX) == {}


def route_to(x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    return experts, torch.full(experts.shape, 0.5, dtype=x.dtype)


def with_fixed_route(model: GPT, *experts: int) -> GPT:
    """Return a model whose layer 0 routes every token to the given experts."""
    moe: Any = model.blocks[0].mlp
    wanted = torch.tensor(experts)
    moe.route = lambda x: route_to(x, wanted.expand(x[..., 0].numel(), len(experts)))
    return model


def test_a_router_that_always_chooses_the_same_experts_is_locked() -> None:
    many = probe(V, 8, 3, rows=32)
    assert locked_routers(routed(), many) == []
    assert locked_routers(with_fixed_route(routed(), 1, 3), many) == [
        "blocks.0.mlp: all tokens go to the same 2 of 4 experts"
    ]
    assert locked_routers(with_fixed_route(routed(experts=2), 0, 1), many) == [], (
        "all experts are route_to anyway"
    )
    one = with_fixed_route(routed(top_k=1, router_weights="softmax"), 2)
    assert locked_routers(one, many)[0] == "blocks.0.mlp: all tokens go to the same 1 of 4 experts"
    three: Any = with_fixed_route(routed(), 0, 1)
    three.blocks[0].mlp.route = lambda x: route_to(x, torch.arange(x[..., 0].numel() * 2).view(-1, 2) % 3)
    assert locked_routers(three, many) == [], "the tokens use three experts, more than top_k"


def test_one_renormalised_expert_is_reported_with_a_fix() -> None:
    problems = locked_routers(routed(top_k=1, router_weights="renormalised"), IDX)
    rest = "with one expert per token, the renormalised weight is always 1, so the router gets no gradient; "
    rest += "use top_k=2 or softmax weights"
    assert problems == [f"blocks.{i}.mlp: {rest}" for i in (0, 1)]
    assert not [text for text in locked_routers(routed(top_k=2), IDX) if "gradient" in text]


# -- heads, routers and layers


def test_the_head_width_must_be_kept() -> None:
    model = shaken(config(position="rope"))
    same, _ = grown(model, op("widen_model", {"factor": 2}))
    assert check_rope(model, same) == PromiseCheck("rope", True, "heads 4 wide before, 4 after")
    wider = GPT(same.cfg.changed(n_head=2), V)
    assert check_rope(model, wider) == PromiseCheck("rope", False, "heads 4 wide before, 8 after")


@pytest.mark.parametrize("table", ["cos", "sin"])
def test_both_rotary_tables_must_be_kept(table: str) -> None:
    model = shaken(config(position="rope"))
    new, _ = grown(model, op("widen_model", {"factor": 2}))
    setattr(new, table, new.get_buffer(table) + 1e-6)
    assert not check_rope(model, new).ok


def test_a_head_width_that_attention_does_not_have_fails() -> None:
    for change in ("width", "q"):
        model = shaken(config())
        new, _ = grown(model, op("widen_mlp", 20))
        attn: Any = new.blocks[0].attn
        if change == "width":
            attn.width = 8
        else:
            attn.q = nn.Linear(8, 12)
        assert not check_rope(model, new).ok, change


def test_a_rotary_table_of_another_width_fails() -> None:
    model = shaken(config(position="rope"))
    new, _ = grown(model, op("widen_mlp", 20))
    for name in ("cos", "sin"):
        for m in (model, new):
            setattr(m, name, m.get_buffer(name)[..., :1])
    assert not check_rope(model, new).ok


@pytest.mark.parametrize(
    ("factor", "ok"), [(1.0, True), (1.0099, True), (0.9901, True), (1.0101, False), (0.9899, False)]
)
def test_the_spread_of_scores_may_change_by_one_percent(factor: float, ok: bool) -> None:
    model, new = routed(), routed()
    idx = probe(V, 8, 3)
    with torch.no_grad():
        new.get_parameter("blocks.1.mlp.router.weight").mul_(factor)
    check = check_router_scale(model, new, idx)
    assert (check.name, check.ok) == ("router scale", ok)
    x = router_inputs(model, idx)
    with torch.no_grad():
        spread = [float(moe_layers(model)[n].scores(x[n]).double().std(-1).mean()) for n in x]
    before = f"{spread[0]:.3g}, {spread[1]:.3g} before"
    after = f"{spread[0]:.3g}, {spread[1] * factor:.3g} after"
    assert check.detail == f"scores spread by {before}, {after}"
    assert check_router_scale(model, new, idx, tolerance=0.02).ok


def test_a_new_router_must_have_finite_scores() -> None:
    dense = shaken(config())
    check = check_router_scale(dense, routed(), IDX)
    assert check == PromiseCheck("router scale", True, "there was no router before")
    broken = routed()
    with torch.no_grad():
        broken.get_parameter("blocks.1.mlp.router.weight").fill_(math.nan)
    assert not check_router_scale(dense, broken, IDX).ok


def test_a_zero_router_passes_and_another_number_of_routers_fails() -> None:
    model, new = routed(), routed()
    with torch.no_grad():
        for m in (model, new):
            m.get_parameter("blocks.0.mlp.router.weight").zero_()
    assert check_router_scale(model, new, IDX).ok
    deeper, _ = grown(model, op("stack_layers", (0, 1, 1), init="identity"))
    assert not check_router_scale(model, deeper, IDX).ok


def test_only_the_given_layers_are_checked() -> None:
    model = shaken(config()).train()
    right, _ = grown(model, op("stack_layers", (0, 1, 1), init="identity"))
    assert (
        check_layer_identity(right, [2], IDX) == PromiseCheck("layer identity", True, "1 inserted layers")
        and right.training
    )
    assert check_layer_identity(right, [], IDX).detail == "0 inserted layers"
    check = check_layer_identity(right, [0, 1, 2], IDX)
    assert check == PromiseCheck("layer identity", False, "layers 0, 1 change their input")
    assert not any(module._forward_hooks for module in right.modules()), "all hooks are removed"
    with torch.no_grad():
        right.get_parameter("blocks.2.mlp.down.bias").fill_(1e-12)
    assert not check_layer_identity(right, [2], IDX).ok, "the output must be equal bit by bit"


def test_a_correctly_grown_model_passes_all_checks() -> None:
    model = shaken(config(experts=4))
    new, moved = grown(model, op("widen_model", {"factor": 2}))
    assert check_function("exact", model, new, IDX).ok and check_router_scale(model, new, IDX).ok
    assert check_groups(new, Optimizers(new.cfg, new)).ok and check_tying(model.cfg, new).ok
    assert set(equal_copies(replace(moved, pieces=moved.pieces), new)) == {
        name for name, *_ in moved.copies()
    }
    assert {torch.float64: 1e-10, torch.float32: 1e-5} == verify.EXACT and verify.EQUAL == 1e-5
