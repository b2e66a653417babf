"""Low-rank terms in MLPs, their learning rate, and runs that train only low-rank terms and routers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, slow_unless, tiny_sets
from growing import IDX, at, gradients, grown, op, shaken, weights
from growing import config as model_config
from safetensors.torch import load_file
from test_estimate import tensor_bytes
from test_growth_controller import applied_ops, journal, outcome_with_journal
from test_sharing import Killed, Watch, kill, outcome, reused_steps
from torch._dynamo.testing import CompileCounterWithBackend

from mainrun.checks.audit import audit
from mainrun.checks.repeat import repeat_ops
from mainrun.config import TrainConfig, from_dict
from mainrun.core import kernels
from mainrun.core.average import Average
from mainrun.core.device import Device
from mainrun.core.optimizers import Optimizers
from mainrun.core.parameters import is_base, is_low_rank
from mainrun.errors import ConfigError
from mainrun.growth.moments import transfer
from mainrun.growth.verify import logit_change
from mainrun.plan.cost import size
from mainrun.plan.ops import OPERATIONS, walk
from mainrun.plan.optimizers import OPTIMIZERS
from mainrun.plan.plan import Plan
from mainrun.plan.recipes import load
from mainrun.replay import replay_steps, run_guards
from mainrun.run.session import train
from mainrun.store.checkpoint import sha256_tensors
from mainrun.store.lineage import chain
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir
from mainrun.train import GPT, State, TrainStep, build, set_up
from mainrun.ui import estimate
from mainrun.ui.estimate import estimate_memory
from mainrun.ui.sample import load_model

ROOT = Path(__file__).parents[1]
SWIGLU: dict[str, Any] = {"mlp": "swiglu", "n_kv_head": 1, "lora_alpha": 6.0}
SEVEN = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
# The run trains 20 steps and is scored after the steps 1, 10 and 20.
SMALL: dict[str, Any] = TINY | {
    "num_titles": 120, "n_layer": 4, "block_pattern": "DSMT", "mlp": "swiglu", "norm": "rmsnorm",
    "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "compile": "off", "checkpoint_every": 1000,
    "attn_lora_rank": 2, "mlp_lora_rank": 3, "lr_lora": 0.02, "base_frozen": True,
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return from_dict(SMALL | changes)


def growing(*ops: tuple[Any, ...], **changes: Any) -> TrainConfig:
    """Return a config with ops, each given as (name, value, step)."""
    written = [{"name": name, "value": value, "trigger": {"step": step}} for name, value, step in ops]
    return config(growth={"ops": written}, **changes)


def initial_base(cfg: TrainConfig) -> dict[str, torch.Tensor]:
    """Return copies of the base weights before training."""
    return {name: value for name, value in weights(set_up(cfg).start().model).items() if is_base(name)}


# -- low-rank terms in MLPs


@pytest.mark.parametrize("mlp", ["gelu", "relu2", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_matrices_of_an_mlp_with_low_rank_terms(mlp: str, bias: bool) -> None:
    model = shaken(model_config(mlp=mlp, bias=bias, mlp_lora_rank=3, lora_alpha=6.0))
    parts = ("gate", "up", "down") if mlp == "swiglu" else ("up", "down")
    terms = {f"blocks.{i}.mlp.{part}.lora_{x}" for i in (0, 1) for part in parts for x in "ab"}
    assert {name for name in weights(model) if is_low_rank(name)} == terms
    full = build(model_config(mlp=mlp, bias=bias), model.embed.num_embeddings).double().eval()
    w = weights(model)
    with torch.no_grad():
        for name, p in full.named_parameters():
            p.copy_(w[name])
            if name.removesuffix("weight") + "lora_a" in terms:
                module = name.removesuffix(".weight")
                p += 2.0 * w[f"{module}.lora_b"] @ w[f"{module}.lora_a"]
    assert torch.allclose(full(IDX), model(IDX), atol=1e-12)


def test_new_terms_leave_the_weights_and_the_output_unchanged() -> None:
    plain = model_config(**SWIGLU)
    model = build(plain.changed(mlp_lora_rank=2), 29)
    with torch.no_grad():
        for name, p in build(plain, 29).named_parameters():
            model.get_parameter(name).copy_(p)
    torch.testing.assert_close(model(IDX), build(plain, 29)(IDX), rtol=0, atol=1e-6)
    for name, p in model.named_parameters():
        if name.endswith(".lora_b"):
            assert not p.any()
        if name.endswith(".lora_a"):
            assert p.any() and p.requires_grad


def test_attention_computes_q_k_and_v_in_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from mainrun import train as trainer
    from mainrun.core import attention

    shapes: list[tuple[int, ...]] = []

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return F.linear(x, weight, bias)

    for module in (attention, trainer):
        monkeypatch.setattr(module, "linear", counted)
    cfg = model_config(**SWIGLU, n_layer=1, attn_lora_rank=2, mlp_lora_rank=2, base_frozen=True)
    shaken(cfg)(IDX)
    assert shapes == [(8 + 2 * 4, 8), (29, 8)], "one product for q, k and v, and one for the head"


# -- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mlp_lora_rank": 4, "experts": 8},
            "mlp_lora_rank=4 cannot be combined with experts=8.*one of them",
        ),
        ({"base_frozen": True}, r"base_frozen=true with frozen=\[\] leaves nothing to train; set attn_lora"),
        ({"base_frozen": True, "attn_lora_rank": 2, "frozen": [0, 1]}, r"frozen=\[0, 1\] leaves nothing"),
        ({"base_frozen": True, "mlp_lora_rank": 2, "frozen": [0, 1]}, "unfreeze a layer"),
        ({"base_frozen": True, "experts": 2, "frozen": [0, 1]}, "leaves nothing"),
        ({"base_frozen": True, "block_pattern": "DM", "frozen": [1]}, "leaves nothing"),
    ],
)
def test_configs_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_lora_rank": 2, "frozen": [0]},
        {"mlp_lora_rank": 2},
        {"embed_lora_rank": 2, "frozen": [0, 1]},
        {"experts": 2},
        {"block_pattern": "DM", "frozen": [0]},
    ],
)
def test_a_frozen_base_needs_one_part_that_trains(fields: dict[str, Any]) -> None:
    cfg = model_config(base_frozen=True, **fields)
    model = build(cfg, 29)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(is_base(name) for name in trained)
    for optimizer in OPTIMIZERS:
        names = set(Optimizers(cfg.changed(optimizer=optimizer), model).names.values())
        assert names == trained
    assert size(cfg.changed(vocab_size=300)).trained > 0


# Ops that a model with a frozen base allows, apart from ops that set a value of the training.
ALLOWED = (
    "set_attn_lora_rank",
    "set_mlp_lora_rank",
    "set_embedding_lora_rank",
    "freeze_layer",
    "unfreeze_layer",
)
VALUES: dict[str, Any] = {
    "stack_layers": [0, 1, 1], "widen_mlp": 20, "widen_model": {"factor": 2}, "add_heads": 4,
    "upcycle_moe": {"experts": 4}, "merge_lora_weights": None, "resize_vocabulary": 420,
    "set_attn_lora_rank": 3, "set_mlp_lora_rank": 3, "set_embedding_lora_rank": 3, "freeze_layer": 1,
    "unfreeze_layer": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, row in OPERATIONS.items() if row.architecture])
def test_an_op_that_would_change_a_frozen_base_is_refused(name: str) -> None:
    fields = {"base_frozen": True, "attn_lora_rank": 2, "embed_lora_rank": 1, "frozen": [0]}
    faults = walk(model_config(**fields), [op(name, VALUES[name])])[1]
    if name in ALLOWED:
        assert faults == []
        return
    ((_, text),) = faults
    assert f"{name} changes the base of the model, which base_frozen=true keeps unchanged; remove" in text
    fields["base_frozen"] = False
    assert walk(model_config(**fields), [op(name, VALUES[name])])[1] == []


def test_ops_of_the_training_are_allowed() -> None:
    assert walk(config(), [op("set_lr", 0.1), op("set_capacity", 0.25), op("reset_lr_schedule")])[1] == []


@pytest.mark.parametrize(
    ("fields", "name", "value", "message"),
    [
        (
            {"mlp_lora_rank": 3},
            "upcycle_moe",
            {"experts": 4},
            "mlp_lora_rank is 3.*put merge_lora_weights bef",
        ),
        ({"experts": 4}, "set_mlp_lora_rank", 2, "the MLPs are experts, and experts have no low-rank terms"),
        ({}, "set_mlp_lora_rank", 0, "value=0 is not allowed; give a rank of at least 1"),
        ({"base_frozen": True, "attn_lora_rank": 2}, "freeze_layer", [0, 1], "leaves nothing to train"),
    ],
)
def test_ops_that_are_refused(fields: dict[str, Any], name: str, value: Any, message: str) -> None:
    ((_, text),) = walk(model_config(**fields), [op(name, value)])[1]
    assert re.search(message, text)


# -- the learning rate


def rates(cfg: TrainConfig) -> dict[str, str]:
    """Return the name of the learning rate of each trained parameter."""
    model = build(cfg, 29)
    optimizers = Optimizers(cfg, model)
    return {optimizers.names[p]: group["rate"] for group in optimizers.groups for p in group["params"]}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_low_rank_terms_have_their_own_rate_if_it_is_set(optimizer: str) -> None:
    fields = {"attn_lora_rank": 2, "mlp_lora_rank": 2, "embed_lora_rank": 2, "optimizer": optimizer, **SWIGLU}
    before = rates(model_config(**fields))
    after = rates(model_config(**fields, lr_lora=0.5))
    for name, rate in after.items():
        if is_low_rank(name):
            assert before[name] == ("lr_aux" if name.startswith("embed.") else "lr")
            assert rate == "lr_lora"
        else:
            assert rate == before[name] != "lr_lora"
    muon, *_ = Optimizers(model_config(**fields), build(model_config(**fields), 29)).all
    if optimizer == "muon":
        shapes = {tuple(p.shape) for group in muon.param_groups for p in group["params"]}
        assert (2, 8) in shapes and (29, 2) not in shapes, "Muon trains the terms inside blocks"


def test_the_rate_is_0_for_a_model_without_low_rank_terms() -> None:
    dense = model_config(lr_lora=0.5)
    assert Plan(dense, 10_000).at(3).lr_lora == 0.0
    assert chain("00", Plan(dense, 10_000)) == chain("00", Plan(model_config(), 10_000))
    assert "lr_lora" not in Plan(dense, 10_000).table()["first_step"]
    for rank in ("attn_lora_rank", "mlp_lora_rank", "embed_lora_rank"):
        plan = Plan(model_config(**{rank: 2}, lr_lora=0.5, schedule="cosine", warmup_iters=3), 10_000)
        assert plan.table()["first_step"]["lr_lora"] > 0
        for step in range(plan.steps):
            assert plan.at(step).lr_lora == 0.5 * plan.lr_factor(step)


def test_the_rate_scales_the_steps_of_low_rank_terms_alone() -> None:
    cfg = model_config(**SWIGLU, mlp_lora_rank=2, optimizer="sgd", lr_lora=0.5)
    moves: list[dict[str, torch.Tensor]] = []
    for rate in (0.5, 1.0):
        model = shaken(cfg)
        before = weights(model)
        gradients(model, 1)
        Optimizers(cfg, model).step(at(cfg, lr=0.5, lr_aux=0.5, lr_lora=rate))
        moves.append({name: p - before[name] for name, p in weights(model).items()})
    for name, move in moves[0].items():
        factor = 2 if is_low_rank(name) else 1
        assert torch.allclose(factor * move, moves[1][name], atol=1e-15)


# -- growth


def test_the_low_rank_terms_of_copied_units_are_copied() -> None:
    cfg = model_config(**SWIGLU, mlp_lora_rank=2)
    model = shaken(cfg)
    for init in ("copy", "identity"):
        new, moved = grown(model, op("widen_mlp", 19, init=init))
        assert logit_change(model, new, IDX)[0] < 1e-12
        units = moved.pieces["blocks.0.mlp.up.weight"].index[0]
        share = moved.pieces["blocks.0.mlp.down.weight"].weight
        assert units is not None and isinstance(share, torch.Tensor)
        known = units >= 0
        old = weights(model)
        up = new.get_parameter("blocks.0.mlp.up.lora_b")
        down = new.get_parameter("blocks.0.mlp.down.lora_a")
        assert torch.equal(up[known], old["blocks.0.mlp.up.lora_b"][units[known]])
        assert torch.equal(down[:, known], old["blocks.0.mlp.down.lora_a"][:, units[known]] * share[known])
        assert not up[~known].any() and not down[:, ~known].any()


def test_merging_adds_the_terms_of_all_seven_matrices() -> None:
    cfg = model_config(**SWIGLU, attn_lora_rank=2, mlp_lora_rank=3, embed_lora_rank=1)
    model = shaken(cfg)
    new, _ = grown(model, op("merge_lora_weights"))
    assert not any(is_low_rank(name) for name in weights(new)) and not new.cfg.has_low_rank
    assert logit_change(model, new, IDX)[0] < 1e-10
    for part in SEVEN:
        module: Any = model.get_submodule(f"blocks.1.{part}")
        merged = new.get_parameter(f"blocks.1.{part}.weight")
        torch.testing.assert_close(merged, module.effective_weight(), rtol=0, atol=1e-12)


def test_an_op_on_a_frozen_base_moves_only_low_rank_terms() -> None:
    cfg = model_config(**SWIGLU, mlp_lora_rank=2, base_frozen=True, optimizer="adamw")
    model = shaken(cfg)
    optimizers = Optimizers(cfg, model)
    gradients(model, 1)
    optimizers.step(at(cfg))
    new, moved = grown(model, op("set_mlp_lora_rank", 4))
    assert set(moved.new) == {name for name in weights(new) if is_low_rank(name)}
    state, coverage = transfer(optimizers.state(), moved)
    assert coverage == 0.5 and not any(is_base(name.split("/")[1]) for name in state)
    for name, value in weights(model).items():
        if is_base(name):
            assert torch.equal(value, new.get_parameter(name))


# -- a frozen base


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("embed_rank", [0, 2])
def test_only_low_rank_terms_and_routers_have_gradients_and_moments(optimizer: str, embed_rank: int) -> None:
    cfg = config(optimizer=optimizer, momentum=0.9, embed_lora_rank=embed_rank, ema=0.9)
    state = State(cfg, build(cfg, 400))
    setup = set_up(cfg)
    step = TrainStep(state, setup.device)
    x = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(0))
    before = weights(state.model)
    for _ in range(2):
        inputs = setup.plan.at(state.step)
        step.gradients(x, x, inputs)
        step.update(inputs)
        state.step += 1
    own = {name for name in before if not is_base(name)}
    for name, p in state.model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (name in own), name
        if is_base(name) or is_low_rank(name):  # the gradient of a router's scalar may be 0
            assert torch.equal(p, before[name]) == is_base(name), name
    assert {name.split("/")[1] for name in state.optimizers.state()} == own
    assert state.average.shadow.keys() == own
    tensors = state.tensors()
    assert {name.removeprefix("model/") for name in tensors if name.startswith("model/")} == own
    assert {name.removeprefix("average/") for name in tensors if name.startswith("average/")} == own
    assert {name.split(".")[3] for name in own if ".router." in name} > {"score", "prior", "now", "bias"}


def test_the_routers_of_experts_train_on_a_frozen_base() -> None:
    model = build(model_config(base_frozen=True, experts=2), 29)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks.0.mlp.router.weight", "blocks.1.mlp.router.weight"}


def test_a_frozen_layer_of_a_frozen_base_keeps_its_terms_in_the_state() -> None:
    """The terms of a frozen layer may have been trained before, so a checkpoint must contain them."""
    cfg = config(frozen=[1, 2])
    state = State(cfg, build(cfg, 400))
    frozen = [name for name, p in state.model.named_parameters() if re.match(r"blocks\.[12]\.", name)]
    assert not any(state.model.get_parameter(name).requires_grad for name in frozen)
    saved = {name.removeprefix("model/") for name in state.tensors()}
    assert {name for name in frozen if not is_base(name)} <= saved
    trained = {name for name, p in state.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"0", "3"}


def test_the_average_of_a_frozen_base_leaves_the_base_alone() -> None:
    cfg = model_config(mlp_lora_rank=2, base_frozen=True, ema=0.5)
    model = build(cfg, 29)
    average = Average(cfg, model)
    before = weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update(at(cfg)._replace(average=0.5))
    with average.applied():
        for name, p in model.named_parameters():
            assert torch.allclose(p, before[name] + (1.0 if is_base(name) else 0.5))


@pytest.mark.parametrize("letters", ["D", "DSMT"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_size_and_the_moments_of_a_frozen_base(letters: str, frozen: bool) -> None:
    cfg = config(
        block_pattern=letters, base_frozen=frozen, optimizer="muon", frozen=[0, 2], embed_lora_rank=2
    )
    state = State(cfg, build(cfg, cfg.vocab_size))
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizers.step(Plan(cfg, 1000).at(0))
    held = [t for name, t in state.optimizers.state().items() if not name.endswith("/step")]
    computed = size(cfg)
    assert computed.moments == sum(t.numel() * t.element_size() for t in held)
    assert computed.params == sum(p.numel() for p in state.model.parameters())
    assert computed.trained == sum(p.numel() for p in state.model.parameters() if p.requires_grad)


def test_the_flops_of_low_rank_terms_in_an_mlp() -> None:
    plain = model_config(**SWIGLU)
    low = size(plain.changed(mlp_lora_rank=3))
    more = 2 * 3 * 3 * (8 + 12)  # two layers with three matrices of rank 3
    assert low.params - size(plain).params == more and low.flops - size(plain).flops == 6 * more
    frozen = size(plain.changed(mlp_lora_rank=3, base_frozen=True))
    assert (frozen.flops, frozen.trained) == (low.flops, more)


# -- kernels


def test_a_frozen_weight_needs_no_gradient_and_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HAS_AMX", True)
    monkeypatch.setattr(kernels, "AMX_MIN_WIDTH", 1)
    monkeypatch.setattr(kernels, "weight_gradient", lambda x, grad: pytest.fail("a needless product"))
    x = torch.randn(6, 8).bfloat16().requires_grad_()
    weight = torch.randn(32, 8).bfloat16()
    bias = torch.randn(32).bfloat16()
    y = kernels.linear(x, weight, bias)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert [tuple(t.shape) for t in kept] == [(32, 8)], "the input is not kept"
    y.backward(torch.ones_like(y))
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(y) @ weight)
    assert weight.grad is None and bias.grad is None


def test_a_weight_without_a_trained_input_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HAS_AMX", True)
    monkeypatch.setattr(kernels, "AMX_MIN_WIDTH", 1)
    x = torch.ones(6, 8).bfloat16()
    weight = torch.randn(32, 8).bfloat16().requires_grad_()
    kernels.linear(x, weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 6))
    assert x.grad is None


def test_a_frozen_gain_has_no_gradient() -> None:
    gain = torch.randn(8, dtype=torch.float64)
    grads = []
    for trained in (True, False):
        x = torch.randn(
            3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        kernels.rms_norm(x, gain.clone().requires_grad_(trained)).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_model_with_a_frozen_base_compiles_into_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    cfg = model_config(**SWIGLU, norm="rmsnorm", mlp_lora_rank=2, attn_lora_rank=2, base_frozen=True)
    model = shaken(cfg, dtype=torch.float32).train()
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    expected = shaken(cfg, dtype=torch.float32).train()
    for each in (compiled, expected):
        F.cross_entropy(each(IDX).flatten(0, 1), IDX.flatten()).backward()
    assert counter.frame_count == 1
    for name, p in model.named_parameters():
        theirs = expected.get_parameter(name).grad
        assert (p.grad is None) == (theirs is None) == is_base(name)
        if p.grad is not None and theirs is not None:
            torch.testing.assert_close(p.grad, theirs, rtol=1e-4, atol=1e-6)


# -- memory


def test_a_frozen_base_takes_memory_for_its_weights_alone(tiny: Any) -> None:
    fields = {
        "batch_size": 4, "block_size": 16, "d_model": 128, "n_layer": 3, "vocab_size": 2000,
        "compile": "off", "attn_lora_rank": 2, "mlp_lora_rank": 2, "optimizer": "adamw",
    }  # fmt: skip
    cfg = tiny(**fields)
    base = 4 * sum(p.numel() for n, p in build(cfg, 2000).named_parameters() if is_base(n))
    all_trained = tensor_bytes(cfg)
    frozen = tensor_bytes(tiny(**fields, base_frozen=True))
    assert base < frozen < all_trained - 2.9 * base, "a frozen base has no gradients and no moments"
    average = tensor_bytes(tiny(**fields, base_frozen=True, ema=0.9))
    assert average - frozen < 0.2 * base


@pytest.mark.slow
def test_the_weights_of_a_frozen_base_do_not_fragment_the_heap(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"d_model": 2048, "n_layer": 12, "attn_lora_rank": 2, "base_frozen": True}
    cfg = tiny(**fields, vocab_size=100_000, batch_size=1, compile="off", optimizer="adamw")
    base = 4 * (size(cfg).params - size(cfg).trained)
    monkeypatch.setattr(estimate, "_guards_bytes", lambda *args: 0)  # the guards copy the base
    total = []
    for factor in (1.0, 2.0):
        monkeypatch.setattr(estimate, "FRAGMENTATION", factor)
        total.append(estimate_memory(Plan(cfg, 10**9), Device(cfg), cfg.vocab_size))
    temporary = total[1] - total[0]
    assert temporary < 0.5 * base
    monkeypatch.setattr(estimate, "FRAGMENTATION", 1.0)
    with_store = estimate_memory(Plan(cfg, 10**9), Device(cfg), cfg.vocab_size, store=True)
    assert 0 < with_store - total[0] < 0.2 * base, "the store copies only what trains"


# -- complete runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run that was not interrupted, and the store that the run filled."""
    out = tmp_path_factory.mktemp("whole")
    train(config(), out, store=Store(out / "store"))
    return out


def saved_names(path: Path) -> set[str]:
    return {name.split("/")[1] for name in load_file(path)}


def test_a_run_changes_no_base_weight_and_saves_none(whole: Path) -> None:
    cfg = config()
    run = whole / cfg.run_id
    base = initial_base(cfg)
    model, _ = load_model(RunDir(run))
    for name, value in base.items():
        assert torch.equal(model.get_parameter(name), value), name
    own = {name for name in weights(model) if not is_base(name)}
    for path in (run / "checkpoints").glob("*/state.safetensors"):
        assert saved_names(path) == own
    store = Store(whole / "store")
    nodes = store.summary()[0]
    assert len(nodes) > 1
    for node in nodes:
        assert {name.split("/")[1] for name in store.load(node)} == own


def test_the_trained_terms_change_the_score(whole: Path) -> None:
    losses = [row["loss"] for row in RunDir(whole / config().run_id).metrics() if row["event"] == "eval"]
    assert losses[0] - losses[-1] > 0.02


def check_resumed(out: Path, expected: Path, fields: dict[str, Any]) -> None:
    """Kill and resume a run, and compare it with a run that was not interrupted."""
    cfg = config(**fields, checkpoint_every=6)
    with pytest.raises(Killed):
        train(cfg, out, progress=Watch({15: kill}))
    assert train(cfg, out)["resumed"] == 1
    assert outcome(out / cfg.run_id) == outcome(expected / config(**fields).run_id)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, whole: Path) -> None:
    check_resumed(tmp_path, whole, {})


RECIPES: dict[str, dict[str, Any]] = {
    "muon and ema": {"optimizer": "muon", "momentum": 0.9, "lr_aux": 0.01, "ema": 0.9},
    "sgd with momentum": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "lr_lora": 0.0},
    "bfloat16 and swa": {"dtype": "bfloat16", "swa": 0.5},
    "no router": {"block_pattern": "D", "mlp_lora_rank": 0, "optimizer": "muon"},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_of_any_recipe_resumes_to_the_same_bits(tmp_path: Path, recipe: str) -> None:
    train(config(**RECIPES[recipe]), tmp_path / "whole")
    check_resumed(tmp_path, tmp_path / "whole", RECIPES[recipe])


def test_the_guards_check_the_weights_with_the_base(whole: Path) -> None:
    """A checkpoint contains no base, so the guards build the base again and hash all weights."""
    run = RunDir(whole / config().run_id)
    model, _ = load_model(run)
    assert (run.summary() or {})["weights"] == sha256_tensors(iter(model.named_parameters()))
    assert not [guard for guard in run_guards(run)["guards"] if guard["status"] == "fail"]


def test_runs_share_steps_through_a_store(tmp_path: Path, whole: Path) -> None:
    late = growing(("set_lr", 0.03, 12))
    store = Store(shutil.copytree(whole / "store", tmp_path / "store"))
    train(late, tmp_path, store=store)
    train(late, tmp_path / "alone")
    assert max(reused_steps(tmp_path / late.run_id)) >= 10
    assert outcome(tmp_path / late.run_id) == outcome(tmp_path / "alone" / late.run_id)


def test_the_audit_replays_every_node(whole: Path) -> None:
    results = list(audit(Store(whole / "store"), 10, seed=0))
    assert results and [result.status for result in results] == ["same"] * len(results), results


def test_a_replay_trains_the_same_weights(whole: Path) -> None:
    run = RunDir(whole / config().run_id)
    replayed = replay_steps(run, 20)
    assert replayed["weights"] == replayed["trained_weights"] == (run.summary() or {})["weights"]
    assert replayed["params"] == (run.summary() or {})["params"]


# -- growth of a run with a frozen base

MANY = (
    ("set_attn_lora_rank", 4, 3),
    ("set_mlp_lora_rank", 2, 5),
    ("freeze_layer", [1, 2], 7),
    ("set_embedding_lora_rank", 2, 9),
    ("set_capacity", 0.25, 11),
    ("unfreeze_layer", [1], 13),
    ("set_embedding_lora_rank", 1, 15),
)


@pytest.fixture(scope="module")
def grown_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run with the ops MANY, and the store that the run filled."""
    out = tmp_path_factory.mktemp("grown")
    train(growing(*MANY, ema=0.9), out, store=Store(out / "store"))
    return out


def test_ops_keep_the_base_to_the_bit(grown_run: Path) -> None:
    cfg = growing(*MANY, ema=0.9)
    run = grown_run / cfg.run_id
    assert applied_ops(run) == [(name, step) for name, _, step in MANY]
    for row in [*journal(run, "SUCCESS"), *journal(run, "LOOKBACK")]:
        assert all(check["ok"] for check in row.get("checks", ())), row
    model, _ = load_model(RunDir(run))
    for name, value in initial_base(cfg).items():
        assert torch.equal(model.get_parameter(name), value), name
    for path in (run / "checkpoints").glob("*/state.safetensors"):
        assert not any(is_base(name) for name in saved_names(path))


@pytest.mark.parametrize("at_step", slow_unless([17], [8, 17]))
def test_a_killed_run_grows_to_the_same_bits(tmp_path: Path, grown_run: Path, at_step: int) -> None:
    cfg = growing(*MANY, ema=0.9, checkpoint_every=4)
    with pytest.raises(Killed):
        train(cfg, tmp_path, progress=Watch({at_step: kill}))
    assert train(cfg, tmp_path)["resumed"] == 1
    whole_run = grown_run / growing(*MANY, ema=0.9).run_id
    assert outcome_with_journal(tmp_path / cfg.run_id) == outcome_with_journal(whole_run)


def test_the_nodes_of_a_grown_run_are_reused(tmp_path: Path, grown_run: Path) -> None:
    cfg = growing(*MANY, ("set_lr", 0.005, 18), ema=0.9)
    store = Store(shutil.copytree(grown_run / "store", tmp_path / "store"))
    train(cfg, tmp_path, store=store)
    assert max(reused_steps(tmp_path / cfg.run_id)) >= 15
    train(cfg, tmp_path / "alone")
    assert outcome(tmp_path / cfg.run_id) == outcome(tmp_path / "alone" / cfg.run_id)


@pytest.mark.slow
def test_the_nodes_of_a_grown_run_are_audited(grown_run: Path) -> None:
    results = list(audit(Store(grown_run / "store"), 20, seed=0))
    assert len(results) > 4 and {result.status for result in results} == {"same"}, results


@pytest.mark.slow
def test_grow_verify_repeats_the_ops(grown_run: Path) -> None:
    checks = list(repeat_ops(RunDir(grown_run / growing(*MANY, ema=0.9).run_id), None))
    assert {check.name for check in checks} == {name for name, *_ in MANY} - {"set_capacity"}
    assert all(check.ok and check.same for check in checks)


# -- several processes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, {"growth": True}], ids=["plain", "growth"])
def test_two_processes_train_the_same_run_as_one(tmp_path: Path, recipe: dict[str, Any]) -> None:
    changes: dict[str, Any] = SMALL | {"num_titles": 200, "preset": "baseline", "dropout": 0.0, "lr": 1e-3}
    changes |= {"lr_lora": 2e-3, "weight_decay": 0.0}
    if recipe:
        changes["growth"] = (
            '{"version":2,"ops":[{"name":"set_mlp_lora_rank","value":4,"trigger":{"step":9}}]}'
        )
    sets = tiny_sets(**{key: value for key, value in changes.items() if key != "preset"})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "mainrun", "train", "--preset", "baseline", *sets, "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *torchrun, *command], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stderr
    cfg = from_dict(load("baseline")[0].model_dump() | changes)
    train(cfg, tmp_path / "one")
    runs = [RunDir(tmp_path / name / cfg.run_id) for name in ("one", "two")]
    one, two = ([row["loss"] for row in run.metrics()] for run in runs)
    assert one[0] - one[-1] > 0.02 and two == pytest.approx(one, abs=1e-5)
    first, second = (load_file(*(run.checkpoints).glob("*/state.safetensors")) for run in runs)
    assert first.keys() == second.keys() and not any(is_base(name.split("/")[1]) for name in first)
    for name in first:
        if name.startswith("model/"):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-4)
    failed = [guard for guard in (runs[1].summary() or {})["guards"] if guard["status"] == "fail"]
    assert failed == []


# -- the documentation


def test_the_recipe_in_the_page_has_rank_16_on_all_seven_matrices(tmp_path: Path) -> None:
    page = (ROOT / "docs/low-rank.md").read_text()
    (block,) = re.findall(r"```toml\n(# lora\.toml\n.*?)```", page, re.DOTALL)
    (tmp_path / "lora.toml").write_text(re.sub(r"qwen\.toml", "ablation:vocabulary", block))
    (cfg,) = load(str(tmp_path / "lora.toml"), ["mlp=swiglu"])
    assert (cfg.attn_lora_rank, cfg.mlp_lora_rank, cfg.embed_lora_rank) == (16, 16, 0)
    assert (cfg.lora_alpha, cfg.base_frozen, cfg.mlp) == (32.0, True, "swiglu")
    with torch.device("meta"):
        model = GPT(cfg, cfg.vocab_size)
    terms = {name.split(".", 2)[2] for name, _ in model.named_parameters() if is_low_rank(name)}
    assert terms == {f"{part}.lora_{x}" for part in SEVEN for x in "ab"}
