"""Growth of models with routed blocks: promises, refusals, capacities, and equal bits after interruptions."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, slow_unless
from growing import IDX, MODERN, config, grown, op, shaken, weights
from test_growth_controller import applied_ops, journal, outcome_with_journal
from test_routed_runs import noisy_selection
from test_sharing import Killed, Watch, kill
from torch._dynamo.testing import CompileCounter

from mainrun.checks.repeat import repeat_ops
from mainrun.config import TrainConfig, from_dict
from mainrun.core import routing
from mainrun.core.dropout import dropout_sites
from mainrun.errors import ConfigError
from mainrun.growth import verify
from mainrun.growth.operators import SPACES, part
from mainrun.growth.verify import check_function, check_layer_identity, logit_change
from mainrun.plan.ops import Transfer, after, walk
from mainrun.plan.plan import Plan
from mainrun.plan.routing import selected_tokens
from mainrun.run.session import train
from mainrun.store.rundir import RunDir
from mainrun.train import GPT, TrainStep, set_up

ASYMMETRIC = Transfer("asymmetric")
ZERO: dict[str, Any] = {"experts": 4, "top_k": 2, "router": "zero"}
MODELS: dict[str, dict[str, Any]] = {
    "DM": {"block_pattern": "DM"},
    "DS": {"block_pattern": "DS", "route": "student"},
    "DT": {"block_pattern": "DT", "gate": "straight"},
    "DSMT": {"block_pattern": "DSMT", "n_layer": 4, **MODERN},
    "DSMT by itself": {"block_pattern": "DSMT", "n_layer": 4, "route": "own", "capacity": 0.25},
}

# -- promises

EXACT: dict[str, tuple[Any, ...]] = {
    "split hidden units": ("widen_mlp", 19),
    "new hidden units": ("widen_mlp", 19, "identity"),
    "twice as many heads": ("add_heads", 4),
    "experts behind a random router": ("upcycle_moe", {"experts": 4, "router_std": 0.5}),
    "low rank in attention": ("set_attn_lora_rank", 3),
    "low rank in the MLPs": ("set_mlp_lora_rank", 3),
    "low rank of the embedding": ("set_embedding_lora_rank", 3),
    "more ids": ("resize_vocabulary", 405),
}


def shaken_routed(model: str, dtype: torch.dtype = torch.float64, **changes: Any) -> GPT:
    return shaken(config(**MODELS[model] | changes), dtype=dtype)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", slow_unless([*EXACT][::2], EXACT))
def test_an_exact_op_keeps_the_function_up_to_rounding(model: str, name: str) -> None:
    op_name, value, *init = EXACT[name]
    what = op(op_name, value, **({"init": init[0]} if init else {}))
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 0.0)):
        old = shaken_routed(model, dtype)
        new, _ = grown(old, what)
        assert new.cfg.letters == old.cfg.letters and old.cfg.routed_layers
        check = check_function("exact", old, new, IDX)
        assert check.ok, check.detail
        moved, size = logit_change(old, new, IDX)
        assert not limit or moved <= limit * max(1.0, size)
    with torch.no_grad():
        new.blocks[-1].mlp_norm.weight.mul_(1.01)  # type: ignore[operator]
    assert not check_function("exact", old, new, IDX).ok, "a wrong op fails in float64 too"


@pytest.mark.parametrize("model", MODELS)
def test_merged_terms_and_frozen_layers_keep_the_function(model: str) -> None:
    for dtype in (torch.float64, torch.float32):
        old = shaken_routed(model, dtype, attn_lora_rank=2)
        assert check_function("exact", old, grown(old, op("merge_lora_weights"))[0], IDX).ok
        frozen, _ = grown(old, op("freeze_layer", 1))
        assert check_function("bitexact", old, frozen, IDX).ok
        trained = [name for name, p in frozen.named_parameters() if p.requires_grad]
        assert not [name for name in trained if name.startswith("blocks.1.")], "a router is frozen too"
        experts, _ = grown(old, op("upcycle_moe", ZERO, optimizer=ASYMMETRIC))
        assert check_function("bitexact", old, experts, IDX).ok


def promise(cfg: TrainConfig, layers: tuple[int, ...], **more: Any) -> str:
    """Return the guarantee that a schedule gives for a map of layers."""
    (applied,), faults = walk(cfg, [op("stack_layers", layers, **{"init": "identity"} | more)])
    assert faults == []
    return applied.op.preserve


MAPS: dict[tuple[int, ...], tuple[str, str]] = {
    (0, 1, 2, 2, 3, 3): ("DSMMTT", "bitexact"),
    (0, 1, 0, 1, 2, 3): ("DSDSMT", "bitexact"),
    (0, 1, 2, 3, 0, 1, 3): ("DSMTDST", "bitexact"),
    (0, 0, 1, 2, 3): ("DDSMT", "none"),  # the D before the first S is an inserted copy
    (0, 1, 3): ("DST", "none"),
    (0, 3, 2): ("DTM", "none"),
    (0, 0): ("DD", "none"),
}


@pytest.mark.parametrize("layers", MAPS)
@pytest.mark.parametrize("more", [{}, MODERN], ids=["baseline", "modern"])
def test_letters_and_routers_move_with_their_layers(layers: tuple[int, ...], more: dict[str, Any]) -> None:
    letters, guarantee = MAPS[layers]
    cfg = config(block_pattern="DSMT", n_layer=4, route="own", **more)
    assert promise(cfg, layers) == guarantee
    what = op("stack_layers", layers, init="identity")
    assert after(what, cfg).letters == after(what, cfg).block_pattern == letters
    old = shaken(cfg)
    new, _ = grown(old, what)
    assert check_function(guarantee, old, new, IDX).ok
    assert (logit_change(old, new, IDX)[0] == 0) == (guarantee == "bitexact")
    inserted = [i for i, source in enumerate(layers) if source in layers[:i]]
    assert check_layer_identity(new, inserted, IDX).ok
    before = weights(old)
    for name, value in weights(new).items():
        if ".router." in name:
            _, layer, rest = name.split(".", 2)
            assert torch.equal(value, before[f"blocks.{layers[int(layer)]}.{rest}"])
    assert [block.router is not None for block in new.blocks] == [letter != "D" for letter in letters]


def test_a_pattern_that_is_repeated_is_written_out() -> None:
    cfg = config(block_pattern="DM", n_layer=4)
    assert after(op("stack_layers", (0, 1, 3)), cfg).block_pattern == "DMM"
    assert after(op("stack_layers", (0, 2)), cfg).block_pattern == "DD"
    assert after(op("stack_layers", (0, 0, 1)), config(n_layer=2)).block_pattern == "D"


def test_the_spaces_of_every_router_match_its_shapes() -> None:
    cfg = config(block_pattern="DSMT", n_layer=4, prior_factor=0.5)
    sizes = {"D": 8, "P": cfg.prior_width, "Z": 1}
    routers = {name: p for name, p in shaken(cfg).named_parameters() if ".router." in name}
    assert len({part(name) for name in routers}) == 10 and cfg.prior_width == 4
    for name, p in routers.items():
        assert tuple(p.shape) == tuple(sizes[space] for space in SPACES[part(name)]), name


# -- refusals


@pytest.mark.parametrize(
    ("pattern", "name", "value", "more", "message"),
    [
        ("DS", "stack_layers", [1, 0], {}, r"value=\[1, 0\] makes the layers 'SD', but the first"),
        ("DS", "stack_layers", [0, 1, 1], {}, r"DSS.*before each S.*change value\[1\]"),
        ("DMDS", "stack_layers", [0, 1, 3], {}, "makes the layers 'DMS', but the layer before each S"),
        ("DM", "stack_layers", [1], {}, "makes the layers 'M', but the first"),
        (
            "DS", "stack_layers", [0, 0, 1], {"init": "identity", "preserve": "bitexact"},
            "preserve=bitexact is impossible with another layer between an S and its D; use the first copy",
        ),
        ("DM", "widen_model", {"factor": 2}, {}, "a model with routed blocks.*; set the final d_model"),
        ("D", "set_capacity", 0.5, {}, "no block routes .*remove the op, or set block_pattern"),
        ("DM", "set_capacity", 0, {}, "capacity"),
        ("DM", "set_capacity", 1.5, {}, "capacity"),
    ],
)  # fmt: skip
def test_an_op_that_does_not_fit_is_refused(
    pattern: str, name: str, value: Any, more: dict[str, Any], message: str
) -> None:
    ops = [{"name": name, "value": value, "trigger": {"step": 5}, **more}]
    with pytest.raises(ConfigError, match=message):
        config(block_pattern=pattern, n_layer=len(pattern), growth={"ops": ops})


def test_a_dense_model_can_be_widened() -> None:
    assert after(op("widen_model", {"factor": 2}), config()).d_model == 16


# -- rounding


def test_an_exact_op_is_checked_in_float64_if_rounding_changes_a_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "select_causally", noisy_selection)
    old = shaken_routed("DSMT by itself", torch.float32, capacity=0.5).train()
    new, _ = grown(old, op("widen_mlp", 19))
    moved, size = logit_change(old, new, IDX)
    assert moved > 100 * verify.EXACT[torch.float32] * size, "a token takes another path"
    modes: list[bool] = []
    old.register_forward_pre_hook(lambda module, args: modes.append(old.training))
    check = check_function("exact", old, new, IDX)
    assert check.ok and check.detail.endswith("checked in float64, because routers amplify rounding")
    assert "exact allows at most" in check.detail
    assert modes and not any(modes), "no pass counts as training"
    assert old.training and old.embed.weight.dtype == torch.float32
    with torch.no_grad():
        new.embed.weight[5] += 1e-3
    wrong = check_function("exact", old, new, IDX)
    assert not wrong.ok and "checked in float64" in wrong.detail
    assert "float64" not in check_function("bitexact", old, new, IDX).detail
    dense = shaken(config(), dtype=torch.float32)
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.embed.weight[5] += 1e-3
    assert "float64" not in check_function("exact", dense, other, IDX).detail


# -- capacity

# The run trains 20 steps, with scores after the steps 1, 5, 10, 15 and 20.
SMALL: dict[str, Any] = TINY | {
    "num_titles": 120, "n_layer": 4, "block_pattern": "DSMT", "optimizer": "adamw", "lr": 0.01,
    "eval_per_epoch": 4, "compile": "off",
}  # fmt: skip


def growing(*ops: tuple[Any, ...], **changes: Any) -> TrainConfig:
    """Return a config with ops, each given as (name, value, step) and possibly more keys."""
    written = []
    for name, value, step, *more in ops:
        written.append({"name": name, "value": value, "trigger": {"step": step}} | dict(*more))
    return from_dict(SMALL | {"growth": {"ops": written}} | changes)


def test_a_new_capacity_changes_the_inputs_and_the_shapes_of_a_step() -> None:
    cfg = growing(("set_capacity", 0.25, 5), dropout=0.1, attention="plain")
    setup = set_up(cfg)
    early, late = setup.plan.at(4), setup.plan.at(5)
    assert (early.capacity, late.capacity) == (0.5, 0.25)
    masks = [dropout_sites(cfg, inputs, 8, "plain") for inputs in (early, late)]
    assert [size for size, _ in masks[0][:7]] == [8 * 16 * 32, 8 * 2 * 16**2, *[8 * 16 * 32] * 2,
        8 * 2 * 8**2, *[8 * 8 * 32] * 2]  # fmt: skip
    assert [size for size, _ in masks[1][4:7]] == [8 * 2 * 4**2, *[8 * 4 * 32] * 2]
    step = TrainStep(setup.start(), setup.device)
    x = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(0))
    keys = []
    for inputs in (early, early._replace(sharpness=3.0, lr_router=9.0), late):
        numbers = step.gradients(x, x, inputs)
        keys.append(step.forward_backward.key)
        assert float(numbers[7]) == selected_tokens(inputs.capacity, 16) / 16
    assert keys[0] == keys[1] != keys[2], "a recording depends on the capacity, but not on the sharpness"


@pytest.mark.slow
def test_a_new_capacity_compiles_again_but_a_new_sharpness_does_not() -> None:
    counter = CompileCounter()
    model = shaken_routed("DSMT", torch.float32).train()
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    plan = Plan(model.cfg, 100_000)
    counts = []
    first = plan.at(0)
    for inputs in (first, first._replace(sharpness=2.0), first._replace(capacity=0.25)):
        model.set_inputs(inputs, "plain")
        compiled(IDX, None, routing_info=True)
        counts.append(counter.frame_count)
    assert counts == [1, 1, 2]


def test_a_new_capacity_changes_the_score_immediately(tmp_path: Path) -> None:
    """The second op compares the models before and after it, which both need the new capacity."""
    again = {"reevaluate": True}
    cfg = growing(("set_capacity", 0.1, 5, again), ("widen_mlp", 160, 5, again))
    train(cfg, tmp_path)
    run = tmp_path / cfg.run_id
    assert applied_ops(run) == [("set_capacity", 5), ("widen_mlp", 5)]
    first, second = journal(run, "REEVALUATION")
    assert abs(first["change"]) > 1e-6, "the new capacity is scored"
    assert abs(second["change"]) < 1e-4, "widen_mlp keeps the function"
    (widened,) = [row for row in journal(run, "SUCCESS") if row["name"] == "widen_mlp"]
    assert widened["delta_logits"] < 1e-4
    scores = {row["step"]: row["loss"] for row in RunDir(run).metrics() if row["event"] == "eval"}
    assert first["loss_before"] == scores[5], "the score of step 5 has the old capacity"
    routers = [row["routers"] for row in RunDir(run).metrics() if row["event"] == "step"]
    assert [router[0]["selected"] for router in routers] == [0.5] * 5 + [1 / 16] * 15
    assert (RunDir(run).summary() or {})["routing"]["capacity"] == 0.1


# -- complete runs

MANY = (
    ("stack_layers", [0, 1, 0, 1, 2, 3], 3, {"init": "identity"}),
    ("set_capacity", 0.25, 6),
    ("widen_mlp", 160, 6),
    ("set_attn_lora_rank", 4, 8),
    ("add_heads", 4, 9),
    ("merge_lora_weights", None, 11),
    ("stack_layers", [0, 2], 14),
)


@pytest.mark.parametrize("at", slow_unless([16], [7, 16]))
def test_a_killed_run_grows_to_the_same_bits(tmp_path: Path, whole: Path, at: int) -> None:
    """A run that resumes at step 6 checks `widen_mlp`, which needs the sharpness of the step before.

    A run that resumes at step 15 remembers `stack_layers`, which removed all routers.
    """
    cfg = growing(*MANY, checkpoint_every=3)
    with pytest.raises(Killed):
        train(cfg, tmp_path, progress=Watch({at: kill}))
    assert train(cfg, tmp_path)["resumed"] == 1
    assert outcome_with_journal(tmp_path / cfg.run_id) == outcome_with_journal(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was not interrupted, with the ops MANY."""
    cfg = growing(*MANY, checkpoint_every=3)
    out = tmp_path_factory.mktemp("whole")
    train(cfg, out)
    return out / cfg.run_id


@pytest.mark.slow
def test_grow_verify_repeats_every_op(whole: Path) -> None:
    checks = list(repeat_ops(RunDir(whole), None))
    assert {check.name for check in checks} == {name for name, *_ in MANY} - {"set_capacity"}
    assert len(checks) > 30 and all(check.ok and check.same for check in checks)


def test_every_op_of_a_run_keeps_its_promise(whole: Path) -> None:
    assert applied_ops(whole) == [(name, step) for name, _, step, *_ in MANY]
    for row in [*journal(whole, "SUCCESS"), *journal(whole, "LOOKBACK")]:
        assert all(check["ok"] for check in row.get("checks", ())), row
    summary = RunDir(whole).summary() or {}
    assert "routing" not in summary, "the last op removed all routers"
    rows = [row for row in RunDir(whole).metrics() if row["event"] == "step"]
    letters = ["SMT"] * 3 + ["SSMT"] * 11 + [""] * 6
    assert [len(row.get("routers", ())) for row in rows] == [len(routed) for routed in letters]
    layers = [router["layer"] for router in rows[5]["routers"]]
    assert layers == [1, 3, 4, 5] and "aux" not in rows[-1]


def test_replaced_seeds_change_only_the_op() -> None:
    """The seed of an op determines the copies of hidden units, and does not touch the routers."""
    old = shaken_routed("DSMT")
    one, _ = grown(old, op("widen_mlp", 19))
    other, _ = grown(old, replace(op("widen_mlp", 19), seed=8))
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    different = [name for (name, p), q in pairs if not torch.equal(p, q)]
    assert different and not [name for name in different if ".router." in name]
