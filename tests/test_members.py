"""Tests of runs with several members: their bits, their scores, their costs, and what refuses them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from mainrun import train as trainer
from mainrun.cli import app
from mainrun.config import TrainConfig
from mainrun.core.device import Device
from mainrun.core.members import Ensemble, member_seed, members_of, merge_numbers
from mainrun.data import scoring
from mainrun.errors import ConfigError, Interrupted, UsageError
from mainrun.interop.source import check_expressible
from mainrun.interop.start import read_start
from mainrun.plan.cost import costs, forward_flops, size
from mainrun.plan.plan import Plan
from mainrun.plan.seeds import seed_from
from mainrun.run.session import train
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir
from mainrun.train import State, TrainStep, build
from mainrun.ui import compare, estimate
from mainrun.ui.train_cli import _estimate_rows

V = 300
SMALL: dict[str, Any] = {
    "num_titles": 200,
    "d_model": 16,
    "block_size": 8,
    "compile": "off",
    "dropout": 0.2,
    "attention": "plain",
}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "lr": 0.01, "rdrop": 1.0, "ema": 0.5, "weight_decay": 0.1},
    "muon": {
        "optimizer": "muon",
        "momentum": 0.9,
        "lr": 0.02,
        "lr_aux": 0.01,
        "weight_decay": 0.1,
        "grad_accum": 2,
        "swa": 0.9,
    },
    "sgd, clipped": {"optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "clip": 0.05},
    "fused attention": {"optimizer": "adamw", "lr": 0.01, "attention": "sdpa", "grad_accum": 2},
    "experts": {"optimizer": "muon", "lr": 0.02, "experts": 3},
    "frozen layer": {"optimizer": "sgd", "lr": 0.1, "frozen": [0], "tie_head": False},
}


def take_steps(cfg: TrainConfig, count: int = 3, watch: Callable[[State], None] = lambda _: None) -> State:
    """Train the first steps of a config on random tokens."""
    plan = Plan(cfg, 1000 * cfg.block_size)
    device = Device(cfg)
    state = State(cfg, build(cfg, V))
    step = TrainStep(state, device)
    tokens = np.random.default_rng(0).integers(0, V, (count, 2, cfg.batch_size, cfg.block_size))
    for x, y in torch.from_numpy(tokens):
        inputs = plan.at(state.step)._replace(average=0.25)
        # the tests read the numbers of the last step from here
        state.last = step.gradients(x, y, inputs)  # type: ignore[attr-defined]
        watch(state)
        step.update(inputs)
        state.step += 1
    return state


def tensors_of(state: State, member: int) -> dict[str, Tensor]:
    """Return the saved tensors of a member, by the names that they have in a run with one model."""
    tensors = {}
    for name, tensor in state.tensors().items():
        kind, rest = name.split("/", 1)
        if rest.startswith(f"members.{member}."):
            tensors[f"{kind}/{rest.removeprefix(f'members.{member}.')}"] = tensor
    return tensors


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# -- the bits of the members


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_member_0_is_the_run_with_one_model(tiny: Any, recipe: dict[str, Any]) -> None:
    one = take_steps(tiny(**SMALL | recipe))
    several = take_steps(tiny(**SMALL | recipe, members=3))
    single = one.tensors()
    first, second, third = (tensors_of(several, member) for member in range(3))
    assert same(single, first), "weights, averages and the state of the optimizer"
    for name, tensor in second.items():
        differs = not (torch.equal(tensor, first[name]) and torch.equal(tensor, third[name]))
        # gains and biases start equal, and a frozen layer keeps them
        assert differs or tensor.numel() == 1 or "blocks.0" in name, name
    assert 3 * len(single) == len(several.tensors())
    assert several.tokens == 3 * one.tokens


@pytest.mark.parametrize("recipe", ["sgd, clipped", "muon"])
def test_each_optimizer_holds_the_state_of_its_member(tiny: Any, recipe: str) -> None:
    cfg = tiny(**SMALL | RECIPES[recipe], members=2)
    trained = take_steps(cfg)
    saved = {name: tensor.clone() for name, tensor in trained.tensors().items()}
    loaded = State(cfg, build(cfg, V))
    loaded.load(saved, trained.step, trained.tokens)
    assert same(loaded.tensors(), saved)
    for optimizer in loaded.optimizers.all:
        own = {p for group in optimizer.param_groups for p in group["params"]}
        assert set(optimizer.state) == own
        (member,) = {loaded.optimizers.names[p].split(".blocks")[0].split(".")[1] for p in own}
        assert member in ("0", "1")


def test_a_model_of_one_member_has_no_ensemble(tiny: Any) -> None:
    model = build(tiny(**SMALL, members=1), V)
    assert not isinstance(model, Ensemble) and members_of(model) == [model]
    assert not any("members" in name for name, _ in model.named_parameters())


def test_the_seeds_of_the_members() -> None:
    assert member_seed(5, 0, "step", 7, 1) == seed_from(5, "step", 7, 1)
    assert member_seed(5, 2, "step", 7, 1) == seed_from(5, "member", 2, "step", 7, 1)


def test_each_member_has_its_own_initial_weights_and_masks(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights differ before the first step, and the masks of a step are those of the members' seeds."""
    cfg = tiny(**SMALL, optimizer="sgd", lr=0.1, members=2, grad_accum=2)
    first, second = members_of(build(cfg, V))
    assert not torch.equal(first.embed.weight, second.embed.weight)
    seeds: list[list[int]] = []
    pools: list[Tensor] = []
    masks = Device.masks

    def recorded(self: Device, sites: Any, micro: int) -> Tensor | None:
        seeds.append(list(self.seeds))
        pools.append(masks(self, sites, micro).clone())  # type: ignore[union-attr]
        return masks(self, sites, micro)

    monkeypatch.setattr(Device, "masks", recorded)
    take_steps(cfg, 1)
    seed = cfg.seed
    wanted = [seed_from(seed, "step", 0, 0), seed_from(seed, "step", 0, 1)]
    wanted += [seed_from(seed, "member", 1, "step", 0, piece) for piece in (0, 1)]
    assert seeds == [wanted] * 4
    different = {tuple(pool.tolist()) for pool in pools}
    assert len(pools) == len(different) == 4, "the graph's generator of each member and micro-batch"


def test_each_member_is_clipped_by_its_own_norm(tiny: Any) -> None:
    def norms(state: State) -> list[float]:
        return [
            math.sqrt(sum(float(p.grad.square().sum()) for p in member.parameters()))
            for member in members_of(state.model)
        ]

    recipe = SMALL | {"optimizer": "sgd", "lr": 0.1, "members": 2}
    found: list[list[float]] = []
    state = take_steps(tiny(**recipe, clip=0.0), 1, lambda state: found.append(norms(state)))
    (free,) = found
    assert free[0] != free[1] and min(free) > 0.05
    assert float(state.last[1]) == pytest.approx(max(free)), "the largest norm is logged"  # type: ignore[attr-defined]
    limit = sum(free) / 2  # only one member exceeds the limit
    take_steps(tiny(**recipe, clip=limit), 1, lambda state: found.append(norms(state)))
    assert found[1] == pytest.approx([min(norm, limit) for norm in free], rel=1e-3)


def test_the_logged_loss_is_the_mean_and_a_nan_stays(tiny: Any) -> None:
    one = torch.tensor([2.0, 5.0])
    assert merge_numbers([one]) is one
    assert merge_numbers([one, torch.tensor([4.0, 3.0])]).tolist() == [3.0, 5.0]
    for bad in (torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan])):
        assert not merge_numbers([one, bad]).isfinite().all()


def test_the_activations_of_a_member_are_freed_before_the_next(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    losses: list[Any] = []
    original = trainer.compute_loss

    def watched(*arguments: Any) -> Any:
        import weakref

        alive.append(sum(loss() is not None for loss in losses))
        result = original(*arguments)
        losses.append(weakref.ref(result.minimized))
        return result

    monkeypatch.setattr(trainer, "compute_loss", watched)
    take_steps(tiny(**SMALL, optimizer="sgd", lr=0.1, members=3), 1)
    assert alive == [0, 0, 0]


# -- scores


def test_the_output_is_the_log_of_the_mean_probability(tiny: Any) -> None:
    cfg = tiny(**SMALL, members=3, unused_ids=2)
    model = build(cfg, V).eval()
    assert model.embed.num_embeddings == V + 2 and len(model.blocks) == 3 * cfg.n_layer
    idx = torch.arange(2 * 8).view(2, 8)
    each = [member(idx).double().softmax(-1) for member in members_of(model)]
    output = model(idx)
    assert output.dtype == torch.float32 and output.shape == (2, 8, V + 2)
    assert torch.allclose(output.exp().double(), sum(each) / 3, atol=1e-6)
    assert (output[..., -2:] == -math.inf).all()
    single = build(tiny(**SMALL, unused_ids=2), V).eval()
    assert torch.equal(members_of(model)[0](idx), single(idx))


class Uniform(nn.Module):
    """A member that gives probability p to the even tokens."""

    def __init__(self, p: float) -> None:
        super().__init__()
        weights = torch.tensor([p, 1 - p] * 4) / 4
        self.table = nn.Embedding.from_pretrained(weights.log().expand(8, 8).clone())

    def forward(self, idx: Tensor) -> Tensor:
        logits: Tensor = self.table(idx)
        return logits + 7  # logits need not be normalised


def test_an_ensemble_is_scored_by_the_mean_probability(tiny: Any) -> None:
    model = Ensemble(tiny(), [Uniform(0.9), Uniform(0.5)])
    tokens = np.array([2, 4, 6, 0, 2, 3], dtype=np.uint16)
    sizes: dict[str, Any] = {"chars": 6, "nbytes": 6, "block_size": 4, "geometry": (1, 4)}
    expected = -(5 * math.log(0.7 / 4) + math.log(0.3 / 4)) / 6
    assert scoring.evaluate(model, tokens, **sizes).loss == pytest.approx(expected, rel=1e-6)


# -- costs


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon", "tie_head": False, "qk_norm": True},
        {"optimizer": "adamw", "experts": 3, "position": "rope", "bias": False, "value_residual": True},
        {"optimizer": "sgd", "momentum": 0.9, "frozen": [0]},
    ],
)
def test_the_cost_of_all_members(tiny: Any, changes: dict[str, Any]) -> None:
    one, cfg = tiny(**SMALL | changes), tiny(**SMALL | changes, members=3)
    state = take_steps(cfg, 1)
    exact = size(cfg.model_copy(update={"vocab_size": V}))
    parameters = list(state.model.parameters())
    assert exact.params == sum(p.numel() for p in parameters)
    assert exact.trained == sum(p.numel() for p in parameters if p.requires_grad)
    moments = [tensor for name, tensor in state.optimizers.state().items() if not name.endswith("/step")]
    assert exact.moments == 4 * sum(tensor.numel() for tensor in moments)
    assert forward_flops(cfg) == 3 * forward_flops(one)
    assert costs(cfg, V) == {name: 3 * value for name, value in costs(one, V).items()}


def test_the_memory_holds_the_state_of_all_members_and_the_activations_of_one(tiny: Any) -> None:
    shape = SMALL | {"batch_size": 256, "block_size": 64, "d_model": 64, "vocab_size": 2000}
    shape |= {"optimizer": "adamw", "dropout": 0.0}

    def memory(**changes: Any) -> int:
        cfg = tiny(**shape | changes)
        return estimate.estimate_memory(Plan(cfg, 10**9), Device(cfg), cfg.vocab_size)

    cfg = tiny(**shape)
    model = size(cfg)
    state = 4 * (model.params + model.trained) + model.moments
    assert memory(members=3) - memory() == pytest.approx(2 * state, rel=0.02)


# -- whole runs


RUN: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01, "rdrop": 0.5, "ema": 0.5, "max_steps": 20}


def run(tiny: Any, out: Path, **changes: Any) -> tuple[TrainConfig, RunDir, dict[str, Any]]:
    cfg = tiny(**SMALL | RUN | changes)
    summary = train(cfg, out)
    return cfg, RunDir(out / cfg.run_id), summary


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, RunDir, dict[str, Any]]:
    """Return a finished run with three members, which tests must not change."""
    from conftest import TINY

    from mainrun.config import from_dict

    return run(lambda **changes: from_dict(TINY | changes), tmp_path_factory.mktemp("ensemble"), members=3)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_states_its_members_and_passes_every_guard(tiny: Any, tmp_path: Path, ensemble: Any) -> None:
    _, directory, summary = ensemble
    assert [guard for guard in summary["guards"] if guard["status"] == "fail"] == []
    ledger = summary["presentations"]
    assert (ledger["ensemble_members"], ledger["forward_passes"]) == (3, 2)
    per_token = 6 * summary["tokens"] / ledger["train_tokens_per_epoch"]
    assert ledger["presentations_per_token"] == pytest.approx(per_token)
    _, one, single = run(tiny, tmp_path)
    for name in ("params", "flops"):
        assert summary[name] == 3 * single[name]
    assert summary["tokens"] == single["tokens"]
    assert summary["forward_flops"] == 3 * single["forward_flops"]
    assert summary["last"]["full"] < single["last"]["full"]
    newest = [checkpoint.load_newest(r.checkpoints, lambda _: None, print) for r in (directory, one)]
    mine, theirs = (found[0] for found in newest if found is not None)
    for name, tensor in theirs.items():
        kind, rest = name.split("/", 1)
        assert torch.equal(tensor, mine[f"{kind}/members.0.{rest}"]), name
    table = compare.rows([single, summary])
    assert [row["members"] for row in table] == [1, 3]


def test_each_member_is_also_scored_alone(tiny: Any, tmp_path: Path) -> None:
    """Member 0 has the score of the run with one model, with averaged weights and after a resume."""
    changes = {"dev_frac": 0.1, "max_steps": 8}
    _, _, single = run(tiny, tmp_path, **changes)
    assert "member_scores" not in single
    with pytest.raises(Interrupted):
        train(tiny(**SMALL | RUN | changes, members=2), tmp_path, until=5)
    cfg, directory, summary = run(tiny, tmp_path, **changes, members=2)
    assert summary["resumed"] == 1
    for split, scores in summary["member_scores"].items():
        assert scores[0] == single["scores"][split]["last"]["full"]
        # the mean of probabilities is better than the mean of the scores
        assert summary["scores"][split]["last"]["full"] < sum(scores) / 2
        assert len(scores) == 2 and scores[1] != scores[0]
    assert list(summary["member_scores"]) == ["val", "dev"]
    assert directory.summary() == summary
    rows = compare.rows([single, summary])
    notes = [note for note in compare._notes(rows) if "ensemble" in note]
    alone = ", ".join(f"{score:.4f}" for score in summary["member_scores"]["val"])
    text = f"{cfg.run_id} is an ensemble of 2 models; the columns count all of them"
    assert notes == [f"{text}; the full scores of its models alone are {alone}"]
    assert "member_scores" not in rows[0]
    (mixed,) = (
        note for note in compare._notes(compare.rows([summary | {"ngram_entries": 5}])) if text in note
    )
    assert mixed == f"{text}; the full scores of its models alone and without the n-gram model are {alone}"
    del summary["member_scores"]  # as in the summaries of older versions
    assert text in compare._notes(compare.rows([summary]))


def test_a_run_with_members_is_sampled_and_evaluated(ensemble: Any, tmp_path: Path) -> None:
    cfg, directory, _ = ensemble
    out = directory.path.parent
    sampled = invoke("sample", cfg.run_id, "--out", out, "--prompt", "Show", "-n", 2)
    assert sampled.exit_code == 0 and len(sampled.stdout.splitlines()) == 2, sampled.output
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "Show HN:", "choices": ["a tool", "zzz"], "answer": 0}\n')
    answered = invoke("eval", cfg.run_id, "--choices", questions, "--out", out, "--json")
    assert answered.exit_code == 0, answered.output


def test_a_run_with_members_is_not_exported_and_is_no_start(ensemble: Any, tmp_path: Path, tiny: Any) -> None:
    cfg, directory, _ = ensemble
    out = directory.path.parent
    exported = invoke("hub", "export", cfg.run_id, tmp_path / "new", "--out", out)
    assert exported.exit_code == 2 and "members=3 (must be 1)" in exported.output, exported.output
    with pytest.raises(UsageError, match=r"members=3 \(must be 1\)"):
        check_expressible(cfg)
    start = tiny(**SMALL, start=f"run:{directory.path}")
    with pytest.raises(UsageError, match="members=3; a run can start only from one model"):
        read_start(start)


def test_a_dry_run_states_the_members(ensemble: Any) -> None:
    cfg, _, summary = ensemble
    shown = dict(_estimate_rows(estimate.estimate(cfg)))
    assert shown["members"] == "3 models, which the other numbers include"
    assert shown["parameters"] == f"{summary['params']:,}"


# -- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"growth": {"ops": [{"name": "set_lr", "value": 0.1, "trigger": {"step": 3}}]}},
            "a growth schedule cannot be combined; set members=1, or remove the growth schedule",
        ),
        ({"shard": True, "optimizer": "adamw"}, "shard=true cannot be combined; set members=1, or set shard"),
        ({"start": "run:runs/a"}, "start='run:runs/a' cannot be combined; set members=1, or leave start"),
        ({"block_pattern": "DM"}, "block_pattern=DM cannot be combined; set members=1, or set block_pattern"),
        ({"attn_lora_rank": 2}, "low-rank terms cannot be combined; set members=1, or set all fields that"),
        ({"experts": 2, "base_frozen": True}, "base_frozen=true cannot be combined; set members=1, or set"),
    ],
)
def test_what_needs_one_model_is_refused(tiny: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**fields, members=2)
    assert f"members=2 and {message}" in str(error.value)
    tiny(**fields, members=1)
