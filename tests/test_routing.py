"""Routed blocks: scores, gates, selection, losses and statistics, compared with a slow reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from routed import (
    T,
    V,
    at,
    average,
    best,
    best_so_far,
    config,
    noise,
    router_of,
    shaken,
    slow_forward,
    some_ids,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mainrun.core import routing
from mainrun.core.dropout import Masks
from mainrun.core.layers import Context
from mainrun.core.routing import (
    Router,
    moving_average,
    packed,
    select_causally,
    shift,
    top_k,
)
from mainrun.plan.routing import STATS, selected_tokens
from mainrun.train import GPT, build

LETTERS = ["M", "S", "T"]


pytestmark = pytest.mark.usefixtures("one_thread")


# -- the whole model against the reference

SHORTCUTS: dict[str, Any] = {
    "value_shortcut": True, "x0_shortcut": True, "unet": True, "rope_share": 0.5, "key_shift": True
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "M": {"pattern": "DM"},
    "S": {"pattern": "DS"},
    "T": {"pattern": "DT"},
    "M by its student": {"pattern": "DM", "route": "student"},
    "S by its student": {"pattern": "DS", "route": "student"},
    "T by its own score": {"pattern": "DT", "route": "own"},
    "M with a straight gate": {"pattern": "DM", "gate": "straight"},
    "S with a straight gate": {"pattern": "DS", "gate": "straight"},
    "all letters": {"pattern": "DSTMDS"},
    "all letters by students": {"pattern": "DSMT", "route": "student", "gate": "straight"},
    "titles and first values": {"pattern": "DMTDS", "title_mask": True, "value_residual": True},
    "shared keys": {"pattern": "DMDST", "n_kv_head": 1, "qk_norm": True, "attn_gate": True},
    "learned positions": {
        "pattern": "DSTM", "position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True
    },
    "softcap and an untied head": {
        "pattern": "DTDM", "softcap": 2.0, "tie_head": False, "layer_scale": 0.5, "mlp": "relu2"
    },
    "experts": {"pattern": "DSMT", "experts": 3, "top_k": 2},
    "shortcuts": {
        "pattern": "DMDST", "value_shortcut": True, "x0_shortcut": True, "unet": True, "n_kv_head": 1
    },
    "shifted keys": {"pattern": "DSTM", "rope_share": 0.5, "key_shift": True, "title_mask": True},
    "one token": {"pattern": "DSMT", "capacity": 0.01},
    "many tokens": {"pattern": "DSMT", "capacity": 0.8},
}  # fmt: skip


@pytest.mark.parametrize("topk", [True, False], ids=["training", "scoring"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_routed_model_matches_the_reference(changes: dict[str, Any], topk: bool) -> None:
    """The logits, losses, statistics and gradients are equal, and so is what each one is detached from."""
    model = shaken(config(**changes)).train(topk)
    idx = some_ids()
    logits, info = model(idx, routing_info=True)
    slow_logits, slow_losses, slow_stats, selected = slow_forward(model, idx, topk)
    assert torch.allclose(logits, slow_logits, rtol=0, atol=1e-10)
    assert torch.allclose(info.losses, slow_losses, rtol=0, atol=1e-10)
    assert torch.allclose(info.stats, slow_stats, rtol=0, atol=1e-10)
    sizes = {len(tokens) for row in selected for tokens in row}
    assert topk == (len(sizes) == 1) or model.cfg.capacity < 0.1, "the rows are ragged when scored"
    assert not info.stats.requires_grad

    weight = noise(*logits.shape, seed=1)
    weights = torch.tensor([0.3, 0.5, 0.7, 1.1], dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    ours, theirs = (
        torch.autograd.grad((out * weight).sum() + (losses * weights).sum(), params, allow_unused=True)
        for out, losses in ((logits, info.losses), (slow_logits, slow_losses))
    )
    for name, p, a, b in zip(names, params, ours, theirs, strict=True):
        a = torch.zeros_like(p) if a is None else a
        b = torch.zeros_like(p) if b is None else b
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9), name


@pytest.mark.parametrize("changes", [MODELS["all letters"], MODELS["titles and first values"]])
def test_topk_overrides_the_mode_of_the_model(changes: dict[str, Any]) -> None:
    model = shaken(config(**changes))
    idx = some_ids()
    training = model.train()(idx)
    scoring = model.eval()(idx)
    assert torch.equal(model(idx, topk=True), training)
    assert torch.equal(model.train()(idx, topk=False), scoring)
    assert (training - scoring).abs().max() > 1e-3
    logits, info = model(idx, routing_info=True)
    assert torch.equal(logits, training) and info.stats.shape == (len(model.cfg.routed_layers), 8)


def test_a_dense_model_has_no_routing_info() -> None:
    model = shaken(config("D"))
    logits, info = model(some_ids(), routing_info=True)
    assert torch.equal(logits, model(some_ids()))
    assert info.losses.tolist() == [0.0] * 4 and info.stats.shape == (0, 8)
    assert not [name for name, _ in model.named_parameters() if "router" in name]
    assert not hasattr(model, "sharpness")


# -- no model that is scored looks ahead


@pytest.mark.parametrize("route", ["own", "student"])
@pytest.mark.parametrize("letter", LETTERS)
def test_a_score_depends_on_nothing_later_and_on_no_other_row(letter: str, route: str) -> None:
    model = shaken(config(f"D{letter}", route=route, title_mask=letter == "S")).eval()
    idx = some_ids(4)
    logits = model(idx)
    for cut in (1, 4, 8):
        changed = idx.clone()
        changed[:, cut:] = some_ids(4, seed=9)[:, cut:]
        assert torch.allclose(model(changed)[:, :cut], logits[:, :cut], rtol=0, atol=1e-9)
        assert torch.allclose(model(idx[:, :cut]), logits[:, :cut], rtol=0, atol=1e-9)
    for row in range(4):
        assert torch.allclose(model(idx[row : row + 1])[0], logits[row], rtol=0, atol=1e-9)


@pytest.mark.parametrize("letter", LETTERS)
def test_the_best_tokens_of_a_row_depend_on_later_tokens(letter: str) -> None:
    model = shaken(config(f"D{letter}"))
    leaks = []
    for seed in range(5):
        idx = some_ids(4, seed=seed)
        changed = idx.clone()
        changed[:, 6:] = some_ids(4, seed=seed + 50)[:, 6:]
        leaks.append((model(idx, topk=True) - model(changed, topk=True))[:, :6].abs().max().item())
    assert max(leaks) > 1e-3


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("topk", [True, False])
@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"title_mask": True},
        {"value_residual": True, "title_mask": True, "n_kv_head": 1},
        SHORTCUTS | {"title_mask": True},
    ],
)
def test_with_all_tokens_and_a_straight_gate_the_model_is_dense(
    letter: str, topk: bool, attention: str, changes: dict[str, Any]
) -> None:
    cfg = config(f"D{letter}", n_layer=4, capacity=1.0, gate="straight", **changes)
    model = shaken(cfg)
    dense = build(cfg.changed(block_pattern="D"), V).double()
    dense.load_state_dict({n: p for n, p in model.state_dict().items() if ".router." not in n})
    for each in (model, dense):
        each.set_dropout(at(cfg), attention)
    idx = some_ids()
    assert torch.allclose(model(idx, topk=topk), dense(idx), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("letter", LETTERS)
def test_the_padding_of_short_rows_is_invisible(letter: str, attention: str) -> None:
    """Padding may come from earlier in the row than the selected tokens, which must not attend to it."""
    fields = {"title_mask": True, "value_residual": True} | SHORTCUTS
    cfg = config(f"D{letter}", capacity=0.4, route="student", **fields)
    model = shaken(cfg).eval()
    model.set_dropout(at(cfg), attention)
    router = router_of(model)
    idx = some_ids(6)
    with torch.no_grad():
        router.now.weight.mul_(3)
    logits = model(idx)
    for row in range(6):
        assert torch.allclose(model(idx[row : row + 1])[0], logits[row], rtol=0, atol=1e-12)


# -- the context of the selected tokens


def test_the_context_of_some_positions() -> None:
    positions = torch.tensor([[1, 4, 5, 0], [0, 2, 3, 5], [2, 0, 1, 3]])  # the last row has two padded places
    tokens = 6
    bias = noise(3, 1, tokens, tokens)
    rope = (noise(tokens, 2, seed=1), noise(tokens, 2, seed=2))
    values = noise(3, 2, tokens, 4, seed=3)
    masks = Masks(torch.zeros(0))
    states = tuple(noise(3, tokens, 4, seed=seed) for seed in (4, 5, 6))
    context = Context(bias, rope, values, masks, *states).at(positions)
    assert context.masks is masks
    assert context.bias is not None and context.rope is not None and context.v_first is not None
    assert context.bias.shape == (3, 1, 4, 4) and context.rope[0].shape == (3, 1, 4, 2)
    for row, places in enumerate(positions.tolist()):
        for i, p in enumerate(places):
            assert torch.equal(context.rope[0][row, 0, i], rope[0][p])
            assert torch.equal(context.rope[1][row, 0, i], rope[1][p])
            assert torch.equal(context.v_first[row, :, i], values[row, :, p])
            for found, state in zip((context.embedded, context.x0, context.skip), states, strict=True):
                assert found is not None and torch.equal(found[row, i], state[row, p])
            for j, q in enumerate(places):
                expected = bias[row, 0, p, q].item() if j <= i else -math.inf
                assert context.bias[row, 0, i, j].item() == expected
    flat = noise(tokens, tokens)
    assert torch.equal(Context(flat, None, None, None).at(positions).bias, flat[:4, :4])  # type: ignore[arg-type]
    nothing = Context(None, None, None, None)
    assert nothing.at(positions) == nothing == (None,) * 7


# -- scores and gates


def test_shift_moves_each_value_to_the_next_token() -> None:
    assert shift(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist() == [[0, 1, 2], [0, 4, 5]]
    x = noise(2, 4, 3)
    assert torch.equal(shift(x)[:, 1:], x[:, :-1]) and not shift(x)[:, 0].any()


@pytest.mark.parametrize("tokens", [1, 7, 99, 100, 101, 230])
def test_the_moving_average_of_100_tokens(tokens: int) -> None:
    x = noise(3, tokens) + 5
    means = moving_average(x)
    for row in range(3):
        assert torch.allclose(means[row], average(x[row]), rtol=0, atol=1e-12)
    for length in {1, tokens // 2 or 1, tokens}:
        assert torch.allclose(moving_average(x[:, :length]), means[:, :length], rtol=0, atol=1e-12)


def surprise_router() -> tuple[GPT, Router]:
    model = shaken(config("DS"))
    return model, router_of(model)


@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0, 6.0, 100.0])
def test_the_gate_is_the_union_of_the_two_surprises(beta: float) -> None:
    _, router = surprise_router()
    x = noise(2, 20, 8)
    route = router.own_route(x, noise(2, 20, 8, seed=1), None, torch.tensor(beta, dtype=torch.float64))
    s_ce = route.quantities["S_CE"]
    s_cu = route.quantities["S_CU"]
    assert route.score is not None and route.gate is not None
    assert torch.allclose(route.gate, s_ce + s_cu - s_ce * s_cu, rtol=0, atol=1e-12)
    assert torch.allclose(route.gate, 1 - (-route.score).exp(), rtol=0, atol=1e-12)


def test_the_score_orders_tokens_whose_gates_are_equal() -> None:
    """With a sharp criterion, the gate rounds to 1 for many tokens, but the score still tells them apart."""
    _, router = surprise_router()
    router.float()
    x = torch.linspace(5, 50, 64).view(1, 64, 1).expand(1, 64, 8)
    route = router.own_route(x, torch.zeros_like(x), None, torch.tensor(100.0))
    assert route.score is not None and route.gate is not None
    assert (route.gate == 1).all() and (route.score.diff() > 0).all() and route.score.isfinite().all()


@pytest.mark.parametrize(("o_ce", "m_cu"), [(-1.0, -2.0), (0.0, 0.0), (1e-4, -0.5), (2.0, 3.0)])
def test_learned_constants_below_their_bounds_give_numbers(o_ce: float, m_cu: float) -> None:
    model, router = surprise_router()
    with torch.no_grad():
        router.o_ce.fill_(o_ce)
        router.m_cu.fill_(m_cu)
    change = noise(2, 5, 8)
    expected = noise(2, 5, 8, seed=1)
    score, quantities = router.surprise(change, expected, torch.tensor(0.7, dtype=torch.float64))
    d_st = change.square().mean(-1)
    d_ch = (change - expected).square().mean(-1)
    ce = 0.7 * (d_st - d_ch + math.log(max(o_ce, 1e-3)))
    means = torch.stack([average(row) for row in d_st])
    cu = 0.7 * (d_st - max(m_cu, 0) * means)
    assert torch.allclose(score, F.softplus(ce) + F.softplus(cu), rtol=0, atol=1e-12)
    assert torch.allclose(quantities["S_CE"], ce.sigmoid())
    assert torch.allclose(quantities["S_CU"], cu.sigmoid())
    loss = model(some_ids(), topk=True).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (router.o_ce, router.m_cu))


def test_no_gradient_flows_through_the_moving_average() -> None:
    _, router = surprise_router()
    change = noise(1, 6, 8).requires_grad_()
    expected = noise(1, 6, 8, seed=1)
    score, _ = router.surprise(change, expected, torch.tensor(1.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(score[0, 5], change)
    assert gradient[0, 5].any() and not gradient[0, :5].any()


def test_the_student_sees_two_tokens_and_passes_no_gradient_on() -> None:
    router = router_of(shaken(config("DM")))
    x = noise(1, 6, 8).requires_grad_()
    logits = router.student(x)
    by_hand = []
    for token in range(6):
        logit = router.now.weight @ x[0, token] + router.bias
        if token > 0:
            logit = logit + router.before.weight @ x[0, token - 1]
        by_hand.append(logit.item())
    assert logits[0].tolist() == pytest.approx(by_hand, abs=1e-12)
    params = [router.now.weight, router.before.weight, router.bias]
    assert torch.autograd.grad(logits.sum(), [x], allow_unused=True, retain_graph=True) == (None,)
    assert all(g.any() for g in torch.autograd.grad(logits.sum(), params))
    other = x.detach().clone()
    other[0, 2] += 1
    changed = (router.student(other) != logits)[0].tolist()
    assert changed == [False, False, True, True, False, False]


@pytest.mark.parametrize("letter", LETTERS)
def test_routers_compute_in_the_dtype_of_their_weights_under_autocast(
    monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    model = shaken(config(f"D{letter}", dtype="bfloat16", route="own"), dtype=torch.float32)
    given: list[Any] = []
    own_route = Router.own_route
    student = Router.student

    def spy_route(self: Router, *args: Any) -> Any:
        given.append((args, own_route(self, *args), torch.is_autocast_enabled("cpu")))
        return given[-1][1]

    def spy_student(self: Router, x: Tensor) -> Tensor:
        given.append(((x,), student(self, x), torch.is_autocast_enabled("cpu")))
        return given[-1][1]

    monkeypatch.setattr(Router, "own_route", spy_route)
    monkeypatch.setattr(Router, "student", spy_student)
    for topk in (True, False):
        _, info = model(some_ids(), routing_info=True, topk=topk)
        assert info.losses.dtype == info.stats.dtype == torch.float32
        (_, logits, cast), (args, route, cast_too) = given
        assert logits.dtype == route.score.dtype == route.gate.dtype == torch.float32
        assert not cast and not cast_too
        assert all(value.dtype == torch.float32 for value in route.quantities.values())
        assert all(arg.dtype == torch.float32 for arg in args if arg is not None)
        assert torch.equal(own_route(router_of(model), *args).score, route.score)
        given.clear()


@pytest.mark.parametrize("letter", LETTERS)
def test_scores_of_bfloat16_inputs_are_computed_in_float32(letter: str) -> None:
    router = router_of(shaken(config(f"D{letter}", route="own"), dtype=torch.float32))
    x = noise(2, T, 8).bfloat16()
    x_before = noise(2, T, 8, seed=1).bfloat16()

    def block(x: Tensor, context: Context, dropout: bool = True) -> tuple[Tensor, Tensor]:
        return 2 * x, x

    context = Context(None, None, None, None)
    for topk in (True, False):
        out, info = router(block, x, x_before, context, torch.tensor(1.0), topk)
        _, exact = router(block, x.float(), x_before.float(), context, torch.tensor(1.0), topk)
        assert out.dtype == torch.bfloat16 and torch.equal(info.stats, exact.stats)


# -- counts and selections


def test_the_number_of_selected_tokens() -> None:
    rows = [(0.29, 100, 29), (0.5, 1, 1), (0.125, 7, 1), (0.125, 16, 2), (0.125, 15, 1), (1.0, 9, 9)]
    rows += [(0.001, 300, 1), (0.7, 10, 7), (0.999999, 10, 9), (0.57, 100, 57)]
    for capacity, tokens, count in rows:
        assert selected_tokens(capacity, tokens) == count, (capacity, tokens)
    for tokens in range(1, 200):
        for count in range(1, tokens + 1):
            assert selected_tokens(count / tokens, tokens) == count


scores = st.lists(st.integers(-3, 3), min_size=1, max_size=40)


@given(st.lists(scores, min_size=1, max_size=3), st.integers(1, 40))
def test_the_best_tokens_are_in_order_and_the_first_of_equals_wins(rows: list[list[int]], k: int) -> None:
    length = min(map(len, rows))
    k = min(k, length)
    score = torch.tensor([row[:length] for row in rows]).double()
    assert top_k(score, k).tolist() == [best(row[:length], k) for row in rows]


def test_with_equal_scores_the_first_tokens_are_selected() -> None:
    """Many equal scores are needed, because an unstable sort keeps the order of a few."""
    assert top_k(torch.zeros(2, 5000), 100).tolist() == [list(range(100))] * 2
    model = shaken(config("DM", capacity=0.5))
    with torch.no_grad():
        router_of(model).score.weight.zero_()
    seen: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda _, args, out: before.append(out[0]))
    model(some_ids(), topk=True)
    assert torch.equal(seen[0], before[0][:, :5])


@given(scores, st.sampled_from([0.01, 0.125, 0.29, 0.3, 0.5, 0.9, 1.0]))
def test_the_selection_without_the_future(row: list[int], capacity: float) -> None:
    mask = select_causally(torch.tensor([row, row[::-1]]).double(), capacity)
    for values, chosen in zip((row, row[::-1]), mask.tolist(), strict=True):
        assert [t for t, one in enumerate(chosen) if one] == best_so_far(values, capacity)


@given(scores, st.sampled_from([0.125, 0.29, 0.5, 1.0]), st.data())
def test_a_selection_of_a_prefix_and_the_last_token(row: list[int], capacity: float, data: Any) -> None:
    score = torch.tensor([row]).double()
    mask = select_causally(score, capacity)
    length = data.draw(st.integers(1, len(row)))
    assert torch.equal(select_causally(score[:, :length], capacity), mask[:, :length])
    positions = top_k(score[:, :length], selected_tokens(capacity, length))
    assert mask[0, length - 1].item() == (length - 1 in positions)


def test_the_counts_of_a_prefix_are_exact() -> None:
    """All earlier tokens rank ahead of a token in a falling row. It is then selected if t < k(t + 1)."""
    for capacity in (0.29, 0.7, 0.57, 1.0):
        for ties in (1, 0):
            score = -torch.arange(200.0)[None] * (1 - ties)
            expected = [t < selected_tokens(capacity, t + 1) for t in range(200)]
            assert select_causally(score, capacity)[0].tolist() == expected
    rising = select_causally(torch.arange(200.0)[None], 0.01)
    assert rising.all()


def test_the_count_of_a_row_is_exact_at_its_last_token() -> None:
    """With k - 1 higher scores before it, the last of n tokens is selected at k/n. With k, it is not."""
    for n in range(2, 61):
        for k in range(1, n):
            row = torch.zeros(2, n)
            row[0, : k - 1] = 2
            row[1, :k] = 2
            row[:, n - 1] = 1
            assert select_causally(row, k / n)[:, n - 1].tolist() == [True, False], (k, n)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_long_rows_are_ranked_in_slices() -> None:
    tokens = 2500
    score = (noise(2, tokens) * 40).round()  # with many equal scores
    with Largest() as largest:
        mask = select_causally(score, 0.125)
    assert largest.elements == 2 * 1024 * 2048, "the second slice ranks 1,024 tokens among 2,048"
    for row in range(2):
        for t in range(tokens):
            ahead = int((score[row, :t] >= score[row, t]).sum())
            assert mask[row, t].item() == (ahead < max(1, math.floor(0.125 * (t + 1) + 1e-9)))


@pytest.mark.parametrize("capacity", [0.125, 0.25, 0.5])
def test_the_shares_of_exchangeable_scores_are_close_to_the_capacity(capacity: float) -> None:
    mask = select_causally(noise(64, 256), capacity)
    assert mask.double().mean().item() == pytest.approx(capacity, abs=0.02)


def test_short_rows_are_padded_with_unselected_tokens_at_the_end() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 1], [0, 0, 1, 0, 0]]).bool()
    positions = packed(mask, 0.2)
    assert positions.tolist() == [[0, 3, 1], [1, 2, 4], [2, 0, 1]]
    assert packed(torch.ones(2, 300, dtype=torch.bool), 0.5).tolist() == [list(range(300))] * 2


# -- the output of a routed block


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("gate", ["soft", "straight"])
@pytest.mark.parametrize(("topk", "route"), [(True, "auto"), (False, "own"), (False, "student")])
def test_only_the_selected_tokens_change(letter: str, gate: str, topk: bool, route: str) -> None:
    """Under a straight gate, and always in T, the change of a selected token is exactly that of the block."""
    model = shaken(config(f"D{letter}", gate=gate, route=route))
    router = router_of(model)
    x = noise(3, T, 8)
    x_before = noise(3, T, 8, seed=1)
    context = model.context(some_ids(), None)
    calls: list[tuple[Tensor, Tensor]] = []
    positions: list[Tensor] = []

    def block(x: Tensor, context: Any, dropout: bool = True) -> tuple[Tensor, Tensor]:
        out, v = model.blocks[1](x, context, dropout)
        calls.append((x, out))
        return out, v

    at_positions = Context.at

    class Spy(Context):
        def at(self, given: Tensor) -> Context:
            positions.append(given)
            return at_positions(self, given)

    out, info = router(block, x, x_before, Spy(*context), model.sharpness, topk)
    selected = torch.zeros(3, T, dtype=torch.bool)
    expected = x.clone()
    chosen, processed = calls[-1]
    scale = torch.ones(3, T, dtype=torch.float64)
    if gate == "soft" and letter != "T":
        scale = router.own_route(x, x_before, None, model.sharpness).gate  # type: ignore[assignment]
    share = round(info.stats[STATS.index("selected")].item() * 3 * T)
    changed = (out != x).any(-1)
    assert changed.sum() == share
    for row in range(3):
        for place, t in enumerate(positions[0][row].tolist()):
            assert torch.equal(chosen[row, place], x[row, t])
            if changed[row, t]:
                selected[row, t] = True
                expected[row, t] += scale[row, t] * (processed[row, place] - x[row, t])
    assert torch.equal(selected, changed), "a token that was not given to the block is unchanged to the bit"
    assert torch.allclose(out, expected, rtol=0, atol=1e-14)
    assert len(calls) == (2 if letter == "T" and (topk or route == "own") else 1)


def test_a_straight_gate_has_a_gradient_also_where_it_is_zero() -> None:
    """The gradient of the factor is that of g / max(g, 1e-6), and the value is 1."""
    cfg = config("DM", gate="straight", capacity=1.0)
    model = shaken(cfg)
    router = router_of(model)
    x = noise(1, T, 8)
    gate = torch.tensor([[0.0, 1e-9, 0.25, 1.0, *[0.5] * (T - 4)]], dtype=torch.float64, requires_grad=True)
    positions = torch.arange(T)[None]
    context = model.context(some_ids(1), None)
    out = router.apply_block(model.blocks[1], x, context, positions, None, gate)
    y = model.blocks[1](x, context)[0]
    assert torch.allclose(out, y, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(out.sum(), gate)
    expected = (y - x).sum(-1) / gate.detach().clamp(min=1e-6)
    assert torch.allclose(gradient, expected, rtol=1e-9)


DECIDES = [
    ("M", "auto", "own"), ("M", "own", "own"), ("M", "student", "student"),
    ("S", "auto", "own"), ("S", "own", "own"), ("S", "student", "student"),
    ("T", "auto", "student"), ("T", "own", "own"), ("T", "student", "student"),
]  # fmt: skip


@pytest.mark.parametrize(("letter", "route", "who"), DECIDES)
def test_who_decides_when_a_model_is_scored(
    monkeypatch: pytest.MonkeyPatch, letter: str, route: str, who: str
) -> None:
    model = shaken(config(f"D{letter}", route=route))
    given: list[Tensor] = []
    select = routing.select_causally
    monkeypatch.setattr(routing, "select_causally", lambda *args: given.append(args[0]) or select(*args))
    x = noise(2, T, 8)
    x_before = noise(2, T, 8, seed=1)
    context = model.context(some_ids(2), None)
    router = router_of(model)
    router(model.blocks[1], x, x_before, context, model.sharpness, False)
    y = model.blocks[1](x, context)[0]
    expected = router.student(x)
    if who == "own":
        expected = router.own_route(x, x_before, y, model.sharpness).score  # type: ignore[assignment]
    assert torch.equal(given[0], expected) and not given[0].requires_grad
    given.clear()
    router(model.blocks[1], x, x_before, context, model.sharpness, True)
    assert not given, "training ranks the whole row"
