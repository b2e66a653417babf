"""The initial weights, the loss, the training step and the costs of models with routed blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routed import T, V, at, config, router_of, shaken, some_ids
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mainrun import train as trainer
from mainrun.config import TrainConfig
from mainrun.core.device import Device
from mainrun.core.dropout import Masks, dropout_sites
from mainrun.core.optimizers import Muon, Optimizers
from mainrun.core.routing import RouterInfo, RoutingInfo, combine, count_numbers, numbers_of, routing_fields
from mainrun.data.corpus import load_corpus
from mainrun.data.token_cache import prepare
from mainrun.plan.cost import costs, forward_flops, size
from mainrun.plan.plan import Plan, StepInputs
from mainrun.plan.recipes import load
from mainrun.plan.routing import STATS
from mainrun.train import GPT, State, TrainStep, build, compute_loss
from mainrun.ui.estimate import estimate, estimate_memory

LETTERS = ["M", "S", "T"]
WEIGHTS = {"prior_loss": 0.0, "student_loss": 0.0, "router_loss": 0.0, "router_z_loss": 0.0}


pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(rows: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    idx = some_ids(rows, T + 1, seed)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


# -- the initial weights


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": 3},
        {"tie_head": False, "position": "learned", "norm": "layernorm", "bias": True},
        {"attn_lora_rank": 2, "value_residual": True, "attn_gate": True},
    ],
)
def test_a_routed_model_and_the_dense_model_of_its_seed_share_their_weights(changes: dict[str, Any]) -> None:
    routed = build(config("DSTM", **changes), V)
    dense = build(config("D", n_layer=4, **changes), V)
    shared = dict(dense.named_parameters())
    params = dict(routed.named_parameters())
    assert all(torch.equal(p, params[name]) for name, p in shared.items())
    assert all(name.startswith("blocks.") and ".router." in name for name in params.keys() - shared.keys())


SHAPES = {
    "M": {"score.weight": (1, 8)},
    "S": {
        "prior_norm.weight": (8,),
        "prior.gate.weight": (4, 8),
        "prior.up.weight": (4, 8),
        "prior.down.weight": (8, 4),
        "o_ce": (),
        "m_cu": (),
    },
}
SHAPES["T"] = SHAPES["S"]
STUDENT = {"now.weight": (1, 8), "before.weight": (1, 8), "bias": (1,)}


@pytest.mark.parametrize("letter", LETTERS)
def test_the_parameters_of_a_router(letter: str) -> None:
    """The predictor is a SwiGLU without biases, whatever the rest of the model uses."""
    cfg = config(f"D{letter}", bias=True, norm="layernorm", mlp="gelu", init_depth_scaled=True)
    params = dict(router_of(build(cfg, V)).named_parameters())
    assert {name: tuple(p.shape) for name, p in params.items()} == SHAPES[letter] | STUDENT
    assert not any(params[name].any() for name in STUDENT)
    if letter == "M":
        return
    assert params["o_ce"].item() == pytest.approx(1.025) and params["m_cu"].item() == pytest.approx(1.1)
    assert (params["prior_norm.weight"] == 1).all()


@pytest.mark.parametrize("letter", LETTERS)
def test_the_standard_deviation_of_new_routers(letter: str) -> None:
    cfg = config(f"D{letter}", d_model=512, n_head=8, init_std=0.1, init_depth_scaled=True, prior_factor=0.25)
    params = dict(router_of(build(cfg, V)).named_parameters())
    random = [name for name in params if name.startswith(("score.", "prior."))]
    assert len(random) == (1 if letter == "M" else 3)
    for name in random:
        assert params[name].std().item() == pytest.approx(0.1, rel=0.1), name
        assert params[name].mean().abs().item() < 0.02


# -- the optimizers

RATES = {
    "score.weight": ("lr_router", "weight_decay_aux"),
    "o_ce": ("lr_router", ""),
    "m_cu": ("lr_router", ""),
    "prior_norm.weight": ("lr_prior", ""),
    "prior.gate.weight": ("lr_prior", "weight_decay_aux"),
    "prior.up.weight": ("lr_prior", "weight_decay_aux"),
    "prior.down.weight": ("lr_prior", "weight_decay_aux"),
    "now.weight": ("lr_student", "weight_decay_aux"),
    "before.weight": ("lr_student", "weight_decay_aux"),
    "bias": ("lr_student", ""),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_parameters_of_routers_have_their_own_rates(optimizer: str) -> None:
    cfg = config("DSTM", optimizer=optimizer, experts=2)
    model = build(cfg, V)
    optimizers = Optimizers(cfg, model)
    groups: dict[str, tuple[str, str]] = {}
    for owner in optimizers.all:
        for group in owner.param_groups:
            for p in group["params"]:
                name = optimizers.names[p]
                groups[name] = (group["rate"], group["decay"])
                if ".router." in name:
                    assert not isinstance(owner, Muon), name
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, got in groups.items():
        block, _, part = name.partition(".router.")
        if block.endswith(".mlp"):
            assert got == ("lr_aux", "weight_decay_aux"), "the routers of experts keep their rate"
        elif part:
            assert got == RATES[part], name
        else:
            assert got[0] in ("lr", "lr_aux"), name


def test_each_rate_moves_its_own_parameters() -> None:
    cfg = config("DSM", optimizer="sgd")
    still = at(cfg, lr=0.0, lr_aux=0.0, lr_router=0.0, lr_prior=0.0, lr_student=0.0, weight_decay=0.0)
    for rate in ("lr_router", "lr_prior", "lr_student"):
        model = build(cfg, V)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        Optimizers(cfg, model).step(still._replace(**{rate: 0.5}))
        for name, p in model.named_parameters():
            own = RATES.get(name.partition(".router.")[2], ("", False))[0]
            assert torch.equal(p, before[name] - (0.5 if own == rate else 0.0)), (rate, name)


# -- dropout


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_the_dropout_masks_have_the_size_of_the_selected_tokens(
    monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """The dense pass of T draws no random numbers, so T takes as many masks as M and S."""
    cfg = config("DSTM", capacity=0.5)
    inputs = at(cfg, dropout=0.25, attn_dropout=0.5, resid_dropout=0.75, stochastic_depth=0.5)
    sites = dropout_sites(cfg, inputs, 3, attention)
    expected = [(3 * 11 * 8, 0.25)]
    for n, skipped in ((11, 0.125), (5, 0.25), (5, 0.375), (5, 0.5)):
        if attention == "plain":
            expected.append((3 * 2 * n * n, 0.5))
        expected += [(3 * n * 8, 0.75), (3, skipped)] * 2
    assert sites == expected
    used = []
    take = Masks.take

    def spy(self: Masks, shape: Any) -> Tensor:
        used.append(math.prod(shape))
        return take(self, shape)

    monkeypatch.setattr(Masks, "take", spy)
    model = build(cfg, V).train()
    model.set_inputs(inputs, attention)
    model(some_ids(3), torch.ones(sum(n for n, _ in sites), dtype=torch.uint8))
    assert used == [n for n, _ in sites], "the model takes these masks and no others"


def test_the_capacity_of_the_step_counts() -> None:
    cfg = config("DM", capacity=0.5)
    sites = dropout_sites(cfg, at(cfg, capacity=0.2, resid_dropout=0.5), 1, "plain")
    assert sites == [(88, 0.5), (88, 0.5), (16, 0.5), (16, 0.5)]


def test_the_dense_pass_of_t_is_without_fused_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, float]] = []
    fused = F.scaled_dot_product_attention

    def spy(q: Tensor, *args: Any, dropout_p: float, is_causal: bool) -> Tensor:
        given.append((q.size(2), dropout_p))
        return fused(q, *args, dropout_p=dropout_p, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    cfg = config("DT", capacity=0.5)
    model = build(cfg, V).train()
    model.set_inputs(at(cfg, attn_dropout=0.5), "sdpa")
    model(some_ids(3))
    assert given == [(11, 0.5), (11, 0.0), (5, 0.5)]


def test_the_values_of_a_step_reach_every_router() -> None:
    cfg = config("DSTM")
    model = build(cfg, V)
    assert model.sharpness.item() == pytest.approx(1.5)
    model.set_inputs(at(cfg, capacity=0.7, sharpness=3.5, resid_dropout=0.25), "plain")
    assert model.sharpness.item() == 3.5 and model.blocks[0].dropout == 0.25
    assert [router_of(model, layer).capacity for layer in (1, 2, 3)] == [0.7] * 3
    assert not [name for name in model.state_dict() if "sharpness" in name], "the buffer is not saved"


# -- the losses


def test_a_loss_is_a_mean_over_the_layers_that_have_it() -> None:
    def info(letter: str, losses: list[float]) -> RouterInfo:
        return RouterInfo(letter, torch.tensor(losses), torch.full((8,), losses[1]))

    mixed = [info("S", [1, 2, 0, 0]), info("M", [0, 5, 6, 8])]
    mixed += [info("T", [4, 5, 0, 0]), info("M", [0, 8, 2, 4])]
    losses, stats = combine(mixed, torch.zeros(1))
    assert losses.tolist() == [2.5, 5.0, 4.0, 6.0]
    assert stats.tolist() == [[2.0] * 8, [5.0] * 8, [5.0] * 8, [8.0] * 8]
    assert combine(mixed[1:2], torch.zeros(1)).losses.tolist() == [0, 5, 6, 8]


# The parts of a model DS, DT or DM that each loss reaches. Only the student's input and the targets of the
# losses are detached.
REACHED = {
    ("M", "lm"): "embed dense routed score norm",
    ("S", "lm"): "embed dense routed prior prior_norm o_ce m_cu norm",
    ("T", "lm"): "embed dense routed prior prior_norm o_ce m_cu norm",
    ("S", "prior"): "embed prior prior_norm",
    ("T", "prior"): "embed dense routed prior prior_norm",
    ("M", "student"): "now before bias",
    ("S", "student"): "now before bias",
    ("T", "student"): "now before bias",
    ("M", "router"): "embed dense score",
    ("M", "z"): "embed dense score",
}


def part_of(name: str) -> str:
    if ".router." in name:
        return name.partition(".router.")[2].partition(".")[0]
    for prefix, part in (("blocks.0.", "dense"), ("blocks.1.", "routed")):
        if name.startswith(prefix):
            return part
    return name.partition(".")[0]


@pytest.mark.parametrize("gate", ["soft", "straight"])
@pytest.mark.parametrize(("letter", "loss"), REACHED)
def test_where_the_gradient_of_each_loss_goes(letter: str, loss: str, gate: str) -> None:
    cfg = config(f"D{letter}", gate=gate)
    model = shaken(cfg).train()
    x, y = tokens()
    names = ["prior", "student", "router", "z"]
    logits, info = model(x, routing_info=True)
    value = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    if loss != "lm":
        value = info.losses[names.index(loss)]
    params = dict(model.named_parameters())
    gradients = torch.autograd.grad(value, params.values(), allow_unused=True)
    reached = set()
    for name, gradient in zip(params, gradients, strict=True):
        if gradient is not None and gradient.any():
            reached.add(part_of(name))
    assert reached == set(REACHED[letter, loss].split())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("letter", LETTERS)
def test_each_weight_adds_its_own_loss(letter: str, smoothing: float) -> None:
    cfg = config(f"D{letter}")
    model = shaken(cfg).train()
    x, y = tokens()
    logits, info = model(x, routing_info=True)
    cross = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    smooth = F.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=smoothing)
    bare = at(cfg, label_smoothing=smoothing, **WEIGHTS)
    loss = compute_loss(model, x, y, bare, None)
    assert loss.minimized.item() == pytest.approx(smooth.item(), abs=1e-10)
    for i, weight in enumerate(WEIGHTS):
        loss = compute_loss(model, x, y, bare._replace(**{weight: 2.0}), None)
        assert loss.minimized.item() == pytest.approx((smooth + 2 * info.losses[i]).item(), abs=1e-10)
        assert loss.plain.item() == pytest.approx(cross.item(), abs=1e-6) and not loss.plain.requires_grad
        assert loss.routing is not None and torch.equal(loss.routing.losses, info.losses)
    everything = bare._replace(prior_loss=0.5, student_loss=0.25, router_loss=2.0, router_z_loss=4.0)
    total = smooth + (info.losses * torch.tensor([0.5, 0.25, 2.0, 4.0])).sum()
    loss = compute_loss(model, x, y, everything, None)
    assert loss.minimized.item() == pytest.approx(total.item(), abs=1e-10)
    assert not torch.equal(loss.minimized, loss.plain)


def test_the_losses_of_routers_do_not_change_the_logged_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is a new tensor, even if the kernel returns one tensor as both losses."""
    shared = torch.tensor(2.0, dtype=torch.float64)
    monkeypatch.setattr(trainer, "cross_entropy", lambda *args: (shared, shared))
    cfg = config("DM")
    loss = compute_loss(shaken(cfg).train(), *tokens(), at(cfg), None)
    assert loss.plain.item() == 2.0 < loss.minimized.item()


def test_the_loss_of_a_dense_model_has_no_routing() -> None:
    cfg = config("D")
    x, y = tokens()
    loss = compute_loss(shaken(cfg), x, y, at(cfg), None)
    assert loss.routing is None and loss.minimized.item() == pytest.approx(loss.plain.item(), abs=1e-6)


@pytest.mark.parametrize("rdrop", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["soft", "straight"])
def test_with_all_weights_at_zero_every_parameter_has_a_gradient(gate: str, rdrop: float) -> None:
    """DDP waits for a gradient of every parameter."""
    cfg = config("DSTM", gate=gate, dropout=0.25)
    inputs = at(cfg, rdrop=rdrop, **WEIGHTS)
    model = shaken(cfg, dtype=torch.float32).train()
    model.set_inputs(inputs, "plain")
    x, y = tokens()
    rows = 8 if rdrop else 4
    pool = masks(dropout_sites(cfg, inputs, rows, "plain"))
    compute_loss(model, x, y, inputs, pool).minimized.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if ".router." in name:
            idle = name.partition(".router.")[2] in STUDENT
            assert p.grad.any().item() != idle, name


def masks(sites: list[tuple[int, float]], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(n, generator=generator) >= rate for n, rate in sites]
    return torch.cat(parts).to(torch.uint8)


def test_r_drop_passes_every_row_twice_through_the_routers() -> None:
    cfg = config("DSTM", dropout=0.25)
    inputs = at(cfg, rdrop=0.5, prior_loss=0.5, student_loss=0.25, router_loss=2.0, router_z_loss=4.0)
    model = shaken(cfg).train()
    model.set_inputs(inputs, "plain")
    x, y = tokens()
    pool = masks(dropout_sites(cfg, inputs, 8, "plain"))
    logits, info = model(torch.cat([x, x]), pool, routing_info=True)
    logp = F.log_softmax(logits.flatten(0, 1).float(), -1)
    cross = F.nll_loss(logp, torch.cat([y, y]).flatten())
    a, b = logp.chunk(2)
    divergence = F.kl_div(a, b, log_target=True, reduction="sum") + F.kl_div(
        b, a, log_target=True, reduction="sum"
    )
    total = cross + 0.5 * divergence / (2 * x.numel())
    total = total + (info.losses * torch.tensor([0.5, 0.25, 2.0, 4.0])).sum()
    loss = compute_loss(model, x, y, inputs, pool)
    assert loss.minimized.item() == pytest.approx(total.item(), rel=1e-6)
    assert loss.plain.item() == pytest.approx(cross.item(), rel=1e-6)
    assert loss.routing is not None and torch.equal(loss.routing.stats, info.stats)


# -- the numbers that leave a step


def test_the_numbers_of_a_batch_become_the_fields_of_a_row() -> None:
    info = RoutingInfo(torch.arange(1.0, 5.0), torch.arange(16.0).view(2, 8) + 10)
    numbers = numbers_of(torch.tensor(0.5), info)
    assert len(numbers) == count_numbers((1, 3)) == 21 and numbers[0] == 0.5
    fields = routing_fields(numbers[1:].tolist(), (1, 3))
    assert fields["aux"] == {"prior": 1.0, "student": 2.0, "router": 3.0, "z": 4.0}
    names = ["g", "selected", "student_accuracy", "score", "S_CE", "S_CU", "D_st", "D_ch"]
    assert list(STATS) == names
    assert fields["routers"] == [
        {"layer": 1} | {name: 10.0 + i for i, name in enumerate(names)},
        {"layer": 3} | {name: 18.0 + i for i, name in enumerate(names)},
    ]
    assert numbers_of(torch.tensor(0.5), None).tolist() == [0.5] and count_numbers(()) == 1


def step_of(cfg: TrainConfig) -> tuple[State, TrainStep]:
    device = Device(cfg)
    device.settle(cfg, Plan(cfg, 100_000))
    state = State(cfg, build(cfg, V))
    return state, TrainStep(state, device)


def test_the_numbers_of_a_step_are_means_over_its_micro_batches() -> None:
    cfg = config("DMDS", grad_accum=2, batch_size=4, clip=0.0)
    x, y = tokens()
    _, step = step_of(cfg)
    inputs = at(cfg)
    loss, norm, *rest = step.gradients(x, y, inputs).tolist()
    model = build(cfg, V).train()
    model.set_inputs(inputs, "plain")
    parts = [compute_loss(model, a, b, inputs, None) for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]
    expected = torch.stack([numbers_of(part.plain, part.routing) for part in parts]).mean(0).tolist()
    assert [loss, *rest] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    (sum(part.minimized for part in parts) / 2).backward()  # type: ignore[union-attr]
    squares = [p.grad.square().sum().item() for p in model.parameters() if p.grad is not None]
    assert norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)
    assert len(rest) == 4 + 2 * 8


def test_a_new_sharpness_is_outside_of_the_recorded_part() -> None:
    """The sharpness is set before the recorded part, and the key of the recording does not contain it."""
    cfg = config("DS", batch_size=4)
    state, step = step_of(cfg)
    keys: list[Any] = []
    recorded = step.forward_backward

    class Spy:
        graph = None

        def __call__(self, key: Any, work: Any, *given: Any) -> Any:
            keys.append((key, state.model.sharpness.item()))
            return recorded(key, work, *given)

    step.forward_backward = Spy()  # type: ignore[assignment]
    results = [step.gradients(*tokens(), at(cfg, sharpness=beta)).tolist() for beta in (0.5, 2.0, 8.0)]
    assert [beta for _, beta in keys] == [0.5, 2.0, 8.0]
    assert keys[0][0] == keys[1][0] == keys[2][0] and keys[0][0][0].sharpness == 0.0
    assert len({tuple(numbers) for numbers in results}) == 3
    step.gradients(*tokens(), at(cfg, capacity=0.6))
    assert keys[3][0] != keys[0][0], "another capacity is another recording"
    for rate in ("lr_router", "lr_prior", "lr_student"):
        step.gradients(*tokens(), at(cfg, **{rate: 0.125}))
        assert keys[-1][0] == keys[0][0], rate


# -- torch.compile


def gradients_of(runner: Any, model: GPT, inputs: StepInputs) -> list[Tensor]:
    model.zero_grad()
    model.set_sharpness(inputs)
    loss = compute_loss(runner, *tokens(), inputs, None)
    loss.minimized.backward()
    assert loss.routing is not None
    losses = [loss.minimized.detach(), loss.routing.losses.detach(), loss.routing.stats]
    return [*losses, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def count_graphs(pattern: str, backend: str) -> int:
    """Compile a model, and compare it with the eager model. Return the number of graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    cfg = config(pattern)
    counter = CompileCounterWithBackend(backend)
    model = shaken(cfg, dtype=torch.float32).train()
    model.set_inputs(at(cfg), "plain")
    torch._dynamo.reset()
    runner = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    losses = set()
    for beta in (0.3, 1.7, 6.0):
        inputs = at(cfg, sharpness=beta)
        eager = gradients_of(model, model, inputs)
        compiled = gradients_of(runner, model, inputs)
        for a, b in zip(eager, compiled, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        losses.add(compiled[0].item())
    assert len(losses) == 3
    return counter.frame_count


@pytest.mark.slow
def test_three_values_of_the_sharpness_are_one_graph() -> None:
    assert count_graphs("DSTM", "aot_eager") == 1


@pytest.mark.slow
def test_a_compiled_step_matches_the_eager_step() -> None:
    """T has all operations of S. Compiling more layers takes minutes."""
    assert count_graphs("DT", "inductor") == 1


# -- the cost

RATIOS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "optimized": ({}, [0.750, 0.584, 0.756, 0.590, 1.224, 0.750, 0.584]),
    "small": (
        {
            "vocab_size": 64, "d_model": 64, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "d_ff": 128,
            "mlp": "swiglu", "block_size": 512,
        },
        [0.674, 0.533, 0.678, 0.537, 1.173, 0.674, 0.533],
    ),
    "0.5B": (
        {
            "vocab_size": 151_936, "d_model": 896, "d_ff": 4864, "n_layer": 24, "n_head": 14, "n_kv_head": 2,
            "mlp": "swiglu", "qkv_bias": True, "block_size": 1024,
        },
        [0.803, 0.669, 0.806, 0.672, 1.180, 0.803, 0.669],
    ),
}  # fmt: skip
# the letter, the capacity, and whether a student decides in scoring
COLUMNS = [
    ("M", 0.5, False),
    ("M", 0.125, False),
    ("S", 0.5, False),
    ("S", 0.125, False),
    ("T", 0.5, False),
    ("T", 0.5, True),
    ("T", 0.125, True),
]


@pytest.mark.parametrize(("fields", "ratios"), RATIOS.values(), ids=RATIOS)
def test_the_flops_relative_to_the_dense_model(fields: dict[str, Any], ratios: list[float]) -> None:
    """The 21 ratios of the table in the specification."""
    (base,) = load("ablation:vocabulary")
    dense = base.model_copy(update=fields)  # a vocabulary of 64 is too small for a tokenizer
    for (letter, capacity, student), ratio in zip(COLUMNS, ratios, strict=True):
        cfg = dense.model_copy(update={"block_pattern": f"D{letter}", "capacity": capacity})
        shares = [capacity] * len(cfg.routed_layers) if student else []
        got = forward_flops(cfg, shares) / forward_flops(dense)
        assert got == pytest.approx(ratio, abs=0.001), (letter, capacity, student)
        if letter == "T" and not student:
            own = cfg.model_copy(update={"route": "own"})
            assert forward_flops(own, [capacity] * len(cfg.routed_layers)) == forward_flops(cfg)


def test_the_flops_of_each_part_by_hand() -> None:
    """d = 8 with two heads of 4, d_ff = 12 with SwiGLU, 11 tokens, 4 hidden units and 300 ids."""
    weights = 4 * 8 * 8 + 3 * 8 * 12
    attention = 4 * 8 * 11
    block = 2 * weights + attention
    head = 2 * 300 * 8
    student, predictor = 2 * 8, 3 * 8 * 4

    def routed(c: float) -> float:
        return 2 * c * weights + c * c * attention

    cfg = config("DSTM", capacity=0.25, vocab_size=300)
    expected = head + block + routed(0.25) + 2 * (student + predictor)  # D and S
    expected += block + routed(0.25) + 2 * (student + predictor)  # T, which processes all tokens in training
    expected += routed(0.25) + 2 * 3 * 8  # M
    assert forward_flops(cfg) == expected
    assert size(cfg).flops == round(3 * expected)
    expected = head + block + routed(0.5) + 2 * (student + predictor)
    expected += routed(0.125) + 2 * student
    expected += routed(1.0) + 2 * 3 * 8
    assert forward_flops(cfg, [0.5, 0.125, 1.0]) == expected
    by_router = cfg.changed(route="own")
    expected += block + 2 * predictor
    assert forward_flops(by_router, [0.5, 0.125, 1.0]) == expected


@pytest.mark.parametrize("route", ["own", "student"])
@pytest.mark.parametrize("letter", ["D", *LETTERS])
def test_torch_counts_the_same_flops(letter: str, route: str) -> None:
    fields = {"d_model": 64, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "block_size": 64, "prior_factor": 0.25}
    cfg = config(f"D{letter}", capacity=0.25, route=route, **fields)
    model = shaken(cfg, dtype=torch.float32)
    idx = some_ids(1, 64)
    exact = cfg.model_copy(update={"vocab_size": V})
    with torch.no_grad():
        for topk in (True, False):
            with FlopCounterMode(display=False) as counter:
                _, info = model(idx, routing_info=True, topk=topk)
            shares = [] if topk else info.stats[:, STATS.index("selected")].tolist()
            expected = forward_flops(exact, shares) * 64
            assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"experts": 3, "top_k": 1}, {"prior_factor": 0.3, "bias": True}])
def test_the_size_of_a_routed_model(changes: dict[str, Any]) -> None:
    cfg = config("DSTM", frozen=[2], tie_head=False, optimizer="adamw", **changes)
    with torch.device("meta"):
        model = GPT(cfg, cfg.vocab_size)
    expected = size(cfg)
    params = {name: p.numel() for name, p in model.named_parameters()}
    assert expected.params == sum(params.values())
    assert expected.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert expected.moments == 8 * expected.trained
    idle = sum(count for name, count in params.items() if ".experts." in name and ".experts.0." not in name)
    assert expected.active == expected.params - idle, "a routed block counts as a whole block"
    assert costs(cfg, V)["params"] == sum(p.numel() for p in build(cfg, V).parameters())


def test_an_estimate_counts_the_parameters_of_routers(tiny: Any) -> None:
    cfg = tiny(block_pattern="DM")
    ids = prepare(cfg, load_corpus(cfg)).tokenizer.vocab_size
    model = build(cfg, ids)
    assert estimate(cfg)["params"] == sum(p.numel() for p in model.parameters())


def test_the_memory_of_routed_models_can_be_estimated() -> None:
    """Training and scoring run on fake tensors, which cannot tell how many tokens are selected."""
    for fields in ({"route": "own", "experts": 2}, {"rdrop": 0.5, "dropout": 0.1}):
        cfg = config("DSTM", **fields)
        device = Device(cfg)
        plan = Plan(cfg, 10_000)
        device.settle(cfg, plan)
        assert estimate_memory(plan, device, V) > 4 * size(cfg).params
