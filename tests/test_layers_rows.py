"""Compare averages, low-rank layers and experts with numbers that are computed by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mainrun.config import TrainConfig, from_dict
from mainrun.core.average import Average
from mainrun.core.lora import LowRankEmbedding, LowRankLinear
from mainrun.core.moe import MoE
from mainrun.plan.plan import Plan, StepInputs
from mainrun.train import build


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | changes)


def share(of_new_weights: float) -> StepInputs:
    return Plan(config(), 1000).at(0)._replace(average=of_new_weights)


# -- averages


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([8.0]))
        self.b = nn.Parameter(torch.tensor([1.0, 2.0]))

    def set_values(self, a: float, b: list[float]) -> None:
        with torch.no_grad():
            self.a.fill_(a)
            self.b.copy_(torch.tensor(b))


@pytest.mark.parametrize(("fields", "on"), [({}, False), ({"ema": 0.5}, True), ({"swa": 0.5}, True)])
def test_an_average_exists_if_the_config_asks_for_one(fields: dict[str, Any], on: bool) -> None:
    model = Numbers()
    average = Average(config(**fields), model)
    assert (average.on, average.differs, set(average.shadow)) == (on, False, {"a", "b"} if on else set())
    model.set_values(4.0, [0.0, 0.0])
    average.update(share(0.5))
    assert average.differs == on
    if on:
        assert average.shadow["a"].tolist() == [6.0] and average.shadow["b"].tolist() == [0.5, 1.0]
        assert not any(t.requires_grad for t in average.shadow.values())


def test_swa_step_by_step() -> None:
    model = Numbers()
    average = Average(config(swa=0.5), model)
    model.set_values(4.0, [2.0, 2.0])
    average.update(share(1.0))  # until averaging begins, the average equals the weights
    assert not average.differs and average.shadow["a"].tolist() == [4.0]
    for i, a in enumerate((6.0, 8.0), start=2):
        model.set_values(a, [2.0, 2.0])
        average.update(share(1 / i))
    assert average.differs and average.shadow["a"].tolist() == pytest.approx([6.0])
    average.update(share(1.0))
    assert average.differs, "it stays true"


def test_applied_puts_the_average_into_the_model_and_restores_the_weights() -> None:
    model = Numbers()
    average = Average(config(ema=0.5), model)
    model.set_values(4.0, [0.0, 0.0])
    average.update(share(0.25))
    with average.applied():
        assert model.a.tolist() == [7.0] and average.shadow["a"].tolist() == [4.0]
    assert model.a.tolist() == [4.0] and average.shadow["a"].tolist() == [7.0]
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert model.a.tolist() == [4.0] and average.shadow["a"].tolist() == [7.0]


# -- low-rank terms


def test_a_low_rank_linear_layer_with_known_numbers() -> None:
    plain = LowRankLinear(3, 2, bias=True)
    plain.add(rank=1, alpha=4.0)
    assert plain.scale == 4.0
    assert plain.lora_a.shape == (1, 3) and plain.lora_b.shape == (2, 1) and not plain.lora_b.any()
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        plain.bias.copy_(torch.tensor([10.0, 20.0]))
        plain.lora_a.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        plain.lora_b.copy_(torch.tensor([[1.0], [0.5]]))
    assert plain.effective_weight().tolist() == [[5.0, 8.0, 12.0], [2.0, 5.0, 6.0]]
    assert plain(torch.tensor([1.0, 1.0, 1.0])).tolist() == [35.0, 33.0]


def test_a_low_rank_embedding_with_known_numbers() -> None:
    table = LowRankEmbedding(3, 2)
    table.add(rank=2, alpha=4.0)
    assert table.scale == 2.0 and table.lora_a.shape == (2, 2) and table.lora_b.shape == (3, 2)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]))
        table.lora_a.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        table.lora_b.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]]))
    assert table.effective_weight().tolist() == [[0.0, 0.0], [3.0, 2.0], [6.0, 6.0]]
    assert table(torch.tensor([[2, 1]])).tolist() == [[[6.0, 6.0], [3.0, 2.0]]]


def test_a_low_rank_term_starts_with_unit_variance_per_column() -> None:
    torch.manual_seed(0)
    plain = LowRankLinear(256, 8, bias=False)
    plain.add(rank=64, alpha=1.0)
    assert plain.lora_a.std().item() == pytest.approx(1 / 16, rel=0.03) and abs(plain.lora_a.mean()) < 0.002
    assert plain.lora_a.requires_grad and plain.lora_b.requires_grad


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, []),
        ({"attn_lora_rank": 3}, [f"blocks.{i}.attn.{part}" for i in (0, 1) for part in "qkvo"]),
        ({"embed_lora_rank": 3}, ["embed"]),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_which_layers_get_low_rank_terms(fields: dict[str, Any], where: list[str], bias: bool) -> None:
    cfg = config(n_kv_head=1, bias=bias, lora_alpha=6.0, **fields)
    model, plain = build(cfg, 50), build(config(n_kv_head=1, bias=bias), 50)
    names = dict(model.named_parameters())
    more = {f"{name}.lora_{x}" for name in where for x in "ab"}
    assert set(names) == {n for n, _ in plain.named_parameters()} | more
    assert all(p.shape == names[n].shape for n, p in plain.named_parameters())
    for name in where:
        module: Any = model.get_submodule(name)
        assert module.scale == 2.0
        assert names[f"{name}.lora_a"].shape == (3, module.weight.shape[1])
        assert names[f"{name}.lora_b"].shape == (module.weight.shape[0], 3)


# -- experts


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.rows = factor, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.factor * x


def experts(k: int, router_weights: str = "renormalised") -> MoE:
    """Return three experts for tokens (a, b). The router scores of a token are (a, b, a + b)."""
    factors = iter((1.0, 10.0, 100.0))
    cfg = config(d_model=2, n_head=1, experts=3, top_k=k, router_weights=router_weights)
    moe = MoE(cfg, lambda: Times(next(factors)))
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    return moe


TOKENS = torch.tensor([[1.0, 2.0], [1.0, -3.0], [-2.0, -1.0]])  # scores 1 2 3; 1 -3 -2; -2 -1 -3


def test_the_router_with_known_numbers() -> None:
    moe = experts(2)
    assert moe.router.bias is None and moe.router.weight.shape == (3, 2) and len(moe.experts) == 3
    assert moe.scores(TOKENS).tolist() == [[1, 2, 3], [1, -3, -2], [-2, -1, -3]]
    assert moe.scores(TOKENS.view(1, 3, 2)).shape == (3, 3)
    chosen, weight = moe.route(TOKENS)
    assert chosen.tolist() == [[2, 1], [0, 2], [1, 0]]
    sigmoid = lambda gap: 1 / (1 + 2.718281828459045**-gap)  # noqa: E731
    expected = [[sigmoid(gap), 1 - sigmoid(gap)] for gap in (1, 3, 1)]
    assert torch.allclose(weight, torch.tensor(expected))
    assert moe.shares(chosen) == [2, 2, 2]
    softmax = experts(2, "softmax")
    chosen, weight = softmax.route(TOKENS)
    assert chosen.tolist() == [[2, 1], [0, 2], [1, 0]]
    all_weights = torch.tensor([[3.0, 2, 1], [1, -2, -3], [-1, -2, -3]]).softmax(-1)
    assert torch.allclose(weight, all_weights[:, :2]) and (weight.sum(-1) < 0.999).all()


@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2)])
def test_a_token_is_the_weighted_sum_of_its_experts(shape: tuple[int, ...]) -> None:
    moe = experts(2)
    chosen, weight = moe.route(TOKENS)
    factors = torch.tensor([1.0, 10.0, 100.0])
    expected = (factors[chosen] * weight).sum(-1, keepdim=True) * TOKENS
    y = moe(TOKENS.view(shape))
    assert y.shape == shape and torch.allclose(y.view(3, 2), expected)
    assert [expert.rows for expert in moe.experts] == [2, 2, 2]
    assert experts(1)(TOKENS).tolist() == (TOKENS * torch.tensor([[100.0], [1.0], [10.0]])).tolist()


def test_shares_count_the_rows_of_each_expert() -> None:
    moe = experts(2)
    assert moe.shares(torch.tensor([[0, 0], [0, 2]])) == [3, 0, 1]
    assert moe.shares(torch.tensor([[0, 0]])) == [2, 0, 0], "the last experts get no rows"
    with FakeTensorMode():
        assert moe.shares(torch.empty(5, 2, dtype=torch.int64)) == [3, 3, 4]  # 10 rows for 3 experts
        assert moe.shares(torch.empty(1, 1, dtype=torch.int64)) == [0, 0, 1]


def test_equal_scores_go_to_the_first_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = experts(2)
    original, options = torch.Tensor.sort, []

    def spy(self: Tensor, **given: Any) -> Any:
        options.append(given)
        return original(self, **given)

    monkeypatch.setattr(torch.Tensor, "sort", spy)
    chosen, weight = moe.route(torch.zeros(40, 2))
    assert chosen.tolist() == [[0, 1]] * 40 and weight.eq(0.5).all()
    assert options[0]["stable"], "on a CPU every sort is stable, on a GPU it is not"


def test_router_scores_have_the_dtype_of_the_router() -> None:
    moe = experts(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe.scores(TOKENS.bfloat16()).dtype == torch.float32
        assert not torch.equal(F.linear(TOKENS + 1e-4, moe.router.weight), moe.scores(TOKENS + 1e-4))
    assert moe.double().scores(TOKENS).dtype == torch.float64


def test_experts_are_not_compiled() -> None:
    """Each expert gets a different number of rows at each step, so every step would be compiled again."""
    experts(1)
    assert getattr(MoE.forward, "_torchdynamo_disable", False)


def test_the_experts_of_a_block_are_mlps() -> None:
    block: Any = build(config(experts=3, top_k=1, mlp="swiglu", d_ff=24), 50).blocks[0]
    shapes = {n: tuple(p.shape) for n, p in block.mlp.named_parameters() if n.endswith("weight")}
    one = {"gate.weight": (24, 32), "up.weight": (24, 32), "down.weight": (32, 24)}
    assert shapes == {"router.weight": (3, 32)} | {
        f"experts.{i}.{n}": shape for i in range(3) for n, shape in one.items()
    }
    assert SimpleNamespace(k=block.mlp.k, renormalised=block.mlp.renormalised) == SimpleNamespace(
        k=1, renormalised=True
    )
