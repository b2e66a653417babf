"""Test the faults, the warnings and the cost of each segment that `mainrun grow plan` reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_growth_schedule import LIST
from typer.testing import CliRunner, Result

from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError
from mainrun.plan.cost import size
from mainrun.plan.op_files import from_text
from mainrun.plan.plan import Plan
from mainrun.plan.recipes import parse_set
from mainrun.plan.simulate import simulate
from mainrun.train import GPT, State, build

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests/data/growth_faults.txt"
START = {
    "n_layer": 2,
    "d_model": 16,
    "n_head": 2,
    "d_ff": 64,
    "batch_size": 8,
    "lr": 0.01,
    "dropout": 0.1,
    "vocab_size": 300,
}


class Case(NamedTuple):
    name: str
    changes: dict[str, Any]
    text: str  # the schedule, as YAML
    faults: list[str]


def cases() -> list[Case]:
    cases = []
    for block in FAULTS.read_text(encoding="utf-8").strip().split("\n\n")[1:]:
        name, *lines = block.splitlines()
        changes = (
            dict(parse_set(text) for text in lines.pop(0).split()[1:]) if lines[0].startswith("with ") else {}
        )
        faults = [line.removeprefix("=> ") for line in lines if line.startswith("=> ")]
        text = "\n".join(line for line in lines if not line.startswith("=> "))
        cases.append(Case(name.removeprefix("# "), changes, f"{text}\n", faults))
    return cases


CASES = cases()


def start(**changes: Any) -> TrainConfig:
    return from_dict(START | changes)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_exact_faults(case: Case) -> None:
    assert simulate(start(**case.changes), from_text(case.text)).faults == case.faults


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_config_is_refused_with_the_same_faults(case: Case) -> None:
    with pytest.raises(ConfigError) as e:
        start(**case.changes, growth=from_text(case.text))
    assert str(e.value).splitlines() == [f"growth: {fault}" for fault in case.faults]


def test_there_are_enough_distinct_cases() -> None:
    assert len(CASES) >= 60 and all(case.faults for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_faults_of_the_example_in_the_specification() -> None:
    entries = json.loads(LIST)
    entries[4]["value"] = [1, 1, 4, 3]
    assert simulate(start(), entries).faults == [
        "ops[4] 'stack_layers': layers out of range: value[2]=4; "
        "at this point the model has 4 layers (after ops[1]). Use 0..3."
    ]
    entries[4]["value"], entries[1]["value"] = [1, 1, 2, 3], 2
    assert simulate(start(), entries).faults == [
        "ops[1] 'stack_layers': value 2 is the old \"double\" form; "
        "the model has 2 layers, so write [0,1,0,1].",
        "ops[4] 'stack_layers': layers out of range: value[2]=2, value[3]=3; "
        "at this point the model has 2 layers. Use 0..1.",
    ]


# -- the cost of a segment

SHAPES: dict[str, Any] = {
    "n_head": [2, 4], "n_kv_head": [0, 1, 2], "d_model": [16, 24], "d_ff": [0, 40],
    "norm": ["layernorm", "rmsnorm"],
    "position": ["learned", "rope"], "mlp": ["gelu", "swiglu", "relu2"], "bias": [True, False],
    "qkv_bias": [None, True, False],
    "qk_norm": [True, False], "attn_gate": [True, False], "layer_scale": [0.0, 0.1],
    "value_residual": [True, False], "value_shortcut": [True, False], "x0_shortcut": [True, False],
    "unet": [True, False],
    "tie_head": [True, False], "head_dim": [0, 6], "n_layer": [1, 3], "block_size": [4, 8], "experts": [0, 4],
    "top_k": [1, 2],
    "router_weights": ["renormalised", "softmax"], "attn_lora_rank": [0, 3], "mlp_lora_rank": [0, 2],
    "embed_lora_rank": [0, 2], "base_frozen": [False, True],
    "unused_ids": [0, 5],
    "frozen": [(), (0,)],
}  # fmt: skip


@st.composite
def shapes(draw: st.DrawFn) -> TrainConfig:
    try:
        return start(**{name: draw(st.sampled_from(values)) for name, values in SHAPES.items()})
    except ConfigError:
        assume(False)
        raise


def counted_flops(cfg: TrainConfig, model: GPT) -> int:
    """Count 6 FLOPs per weight that multiplies a token, and add the two matrix products of attention."""
    looked_up = ("positions",) if cfg.tie_head else ("positions", "embed")
    weights = 0
    for name, p in model.named_parameters():
        if p.ndim != 2 or name.startswith(looked_up):
            continue
        used = cfg.top_k / cfg.experts if ".experts." in name else 1
        weights += p.numel() * used
    return 6 * round(weights) + 12 * cfg.n_layer * cfg.n_head * cfg.head_width * cfg.block_size


@given(shapes())
def test_sizes_agree_with_a_real_model(cfg: TrainConfig) -> None:
    with torch.device("meta"):
        model = GPT(cfg, cfg.vocab_size)
    computed = size(cfg)
    counted = sum(p.numel() for p in model.parameters())
    met = (
        sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) * cfg.top_k // cfg.experts
        if cfg.experts
        else 0
    )
    others = sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (computed.params, computed.active, computed.trained) == (counted, others + met, trained)
    assert computed.flops == counted_flops(cfg, model)


@settings(max_examples=15)
@given(shapes(), st.sampled_from([("sgd", 0.0), ("sgd", 0.9), ("adamw", 0.0), ("muon", 0.9)]))
def test_moments_agree_with_a_real_optimizer(cfg: TrainConfig, kind: tuple[str, float]) -> None:
    cfg = cfg.changed(optimizer=kind[0], momentum=kind[1])
    state = State(cfg, build(cfg, cfg.vocab_size))
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizers.step(Plan(cfg, 1000).at(0))
    held = {name: t for name, t in state.optimizers.state().items() if not name.endswith("/step")}
    assert size(cfg).moments == sum(t.numel() * t.element_size() for t in held.values())


def test_experts_low_rank_terms_and_frozen_layers_are_counted() -> None:
    base = start(optimizer="adamw", bias=False)
    plain, mlp = size(base), 2 * 16 * 64
    moe = size(base.changed(experts=8, top_k=2))
    assert moe.params - plain.params == 2 * (7 * mlp + 8 * 16) and moe.params - moe.active == 2 * 6 * mlp
    assert moe.flops - plain.flops == 6 * 2 * (mlp + 8 * 16)
    low = size(base.changed(attn_lora_rank=3))
    assert low.params - plain.params == 2 * 4 * 3 * (16 + 16) and low.flops - plain.flops == 6 * (
        low.params - plain.params
    )
    table = size(base.changed(embed_lora_rank=3, unused_ids=10))
    assert table.params - plain.params == 10 * 16 + 3 * (310 + 16)
    assert table.flops - plain.flops == 6 * (table.params - plain.params), "the head is tied to the table"
    apart = start(optimizer="adamw", tie_head=False)
    assert size(apart.changed(embed_lora_rank=3)).flops == size(apart).flops, "a lookup needs no FLOPs"
    frozen = size(base.changed(frozen=[1]))
    layer = (plain.params - size(base.changed(n_layer=1)).params) * 4 * 2
    assert (frozen.params, frozen.flops, plain.moments - frozen.moments) == (plain.params, plain.flops, layer)


def test_the_segments_of_the_original_example() -> None:
    forecast = simulate(start(optimizer="adamw"), json.loads(LIST))
    assert not forecast.faults
    shape = [(s.op, s.begins, s.cfg.n_layer, s.cfg.ff_width, s.cfg.attn_lora_rank) for s in forecast.segments]
    assert shape == [
        ("", "step 0", 2, 64, 0),
        ("set_lr 0.0006", "loss < 100 or a wait of 1", 2, 64, 0),
        ("stack_layers [0,0,1,1]", "loss < 3.5 or a wait of 500", 4, 64, 0),
        ("widen_mlp 128", "loss < 3.2 or a wait of 500", 4, 128, 0),
        ("set_attn_lora_rank 8", "loss < 2.8 or a wait of 1,000", 4, 128, 8),
        ("stack_layers [1,1,2,3]", "loss < 2.5 or a wait of 1,000", 4, 128, 8),
    ]
    assert all((s.steps, s.tokens, s.seconds) == (None, None, None) for s in forecast.segments)
    assert [s.size for s in forecast.segments] == [size(s.cfg) for s in forecast.segments]


def test_with_train_tokens_the_segments_assume_the_longest_waits() -> None:
    """The run has 100 steps per epoch and 7 epochs, with evaluations after step 1 and every 33 steps."""
    cfg = start(batch_size=8, block_size=128)
    ops = [
        {"name": "set_lr", "value": 0.1, "trigger": {"any": [{"loss_below": 9}, {"wait_iters": 100}]}},  # 132
        {"name": "stack_layers", "value": [0, 0, 1], "trigger": {"step": 200}},  # step 200
        {"name": "set_batch_size", "value": 16, "trigger": {"wait_iters": 0}},  # at the next loss: 231
        {"name": "set_lr", "value": 0.2, "trigger": {"wait_iters": 0}},  # at the same loss: 231
    ]
    forecast = simulate(cfg, {"ops": ops}, train_tokens=102_401, speed=1e9)
    assert [s.begins for s in forecast.segments] == [
        "step 0", "loss < 9 or a wait of 100: step 132 at the latest", "step 200",
        "a wait of 0: step 231 at the latest",
        "a wait of 0: step 231 at the latest",
    ]  # fmt: skip
    assert [s.steps for s in forecast.segments] == [132, 68, 31, 0, (716_800 - 231 * 1024) // 2048]
    assert sum(s.tokens or 0 for s in forecast.segments) <= 716_800
    assert [s.seconds for s in forecast.segments] == [
        (s.tokens or 0) * s.size.flops / 1e9 for s in forecast.segments
    ]


def test_after_reevaluate_the_longest_wait_ends_at_the_next_evaluation() -> None:
    ops = [
        {"name": "stack_layers", "value": [0, 0, 1], "trigger": {"wait_iters": 100}},
        {"name": "set_lr", "value": 0.1, "trigger": {"wait_iters": 0}},
        {"name": "set_lr", "value": 0.2, "trigger": {"wait_iters": 0}},
    ]
    cfg = start(batch_size=8, block_size=128)
    assert [s.steps for s in simulate(cfg, {"ops": ops}, 102_401).segments] == [132, 33, 0, 535]
    assert [
        s.steps for s in simulate(cfg, {"ops": [ops[0] | {"reevaluate": False}, *ops[1:]]}, 102_401).segments
    ] == [132, 0, 0, 568]


def test_a_static_op_that_is_too_late_is_a_fault_if_the_tokens_are_known() -> None:
    ops = {"ops": [{"name": "set_lr", "value": 0.1, "trigger": {"step": 10**6}}]}
    assert simulate(start(), ops).faults == []
    (fault,) = simulate(start(), ops, 102_401).faults
    assert fault == (
        "ops[0] 'set_lr' would fire after step 1000000, but less than one step would then be left "
        "(without this op, the run has 700 steps); "
        "give the op an earlier trigger."
    )


def wait(name: str, value: Any, **trigger: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": {"any": [{k: v} for k, v in trigger.items()]}}


@pytest.mark.parametrize(
    ("ops", "tokens", "warnings"),
    [
        ([wait("set_lr", 0.1, loss_below=100, wait_iters=1)], 102_401, []),  # step 1 always has an evaluation
        ([wait("set_lr", 0.01, step=5)], None,
            ["ops[0] 'set_lr': changes nothing; the config already has these values."]),
        ([wait("stack_layers", [1, 1, 1], step=5)], None,
            ["ops[0] 'stack_layers': drops layer 0 of 2 and their trained weights."]),
        ([wait("stack_layers", [1, 0], step=5)], None, []),
        ([wait("reset_lr_schedule", None, step=5)], None, []),
        ([wait("set_lr", 0.1, loss_below=0)], None,
            ["ops[0] 'set_lr': loss_below=0 is never reached; a loss is always above 0."]),
        ([wait("set_lr", 0.1, step=50), wait("set_lr", 0.2, step=40)], None,
         ["ops[1] 'set_lr': the op cannot fire at step 40; "
          "it fires together with the previous op, at step 50 or later."]),
        ([wait("set_lr", 0.1, wait_iters=2)], 102_401,
         ["ops[0] 'set_lr': a wait of 2 is shorter than the 33 steps between evaluations; "
          "the op fires at the next evaluation."]),
        ([wait("set_lr", 0.1, loss_below=3), wait("set_lr", 0.2, wait_iters=32)], 102_401,
         ["ops[1] 'set_lr': a wait of 32 is shorter than the 33 steps between evaluations; "
          "the op fires at the next evaluation."]),
        ([wait("set_eval_interval", 50, step=5), wait("set_lr", 0.2, wait_iters=40)], None,
         ["ops[1] 'set_lr': a wait of 40 is shorter than the 50 steps between evaluations; "
          "the op fires at the next evaluation."]),
        ([wait("set_lr", 0.1, wait_iters=700)], 102_401,
            ["ops[0] 'set_lr': never fires; the run has 700 steps."]),
        ([wait("set_lr", 0.1, wait_iters=700), wait("set_lr", 0.2, step=9)], 102_401,
         ["ops[0] 'set_lr': never fires; the run has 700 steps, and later ops wait for this op."]),
        ([wait("set_lr", 0.1, loss_below=3, wait_iters=700)], 102_401,
         ["ops[0] 'set_lr': only fires if its condition on the loss is met; the run has 700 steps."]),
        ([wait("set_lr", 0.1, wait_iters=600), wait("set_lr", 0.2, wait_iters=60),
            wait("set_lr", 0.3, step=699)], 102_401, []),
        ([wait("set_lr", 0.1, wait_iters=600), wait("set_lr", 0.2, tokens=10**9)], 102_401,
         ["ops[1] 'set_lr': never fires; the run has 700 steps."]),
    ],
)  # fmt: skip
def test_warnings(ops: list[dict[str, Any]], tokens: int | None, warnings: list[str]) -> None:
    forecast = simulate(start(batch_size=8, block_size=128), {"ops": ops}, tokens)
    assert (forecast.faults, forecast.warnings) == ([], warnings)


# -- the command


def run_plan(*args: str) -> Result:
    return CliRunner().invoke(app, ["grow", "plan", *args], catch_exceptions=False)


SETS = [arg for key, value in START.items() for arg in ("--set", f"{key}={value}")]


def test_the_plan_of_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(LIST)
    done = run_plan(str(path), "--preset", "baseline", *SETS)
    assert (done.exit_code, done.stderr) == (0, "")
    head, _, *rows = [
        re.split(r"\s{2,}", line.strip())
        for line in done.stdout.splitlines()
        if line.strip() and ":" not in line
    ]
    assert head == [
        "op",
        "begins",
        "layers",
        "width",
        "heads",
        "experts",
        "parameters",
        "active",
        "FLOPs per token",
        "optimizer",
    ]
    assert [row[0] for row in rows] == [
        "start", "set_lr 0.0006", "stack_layers [0,0,1,1]", "widen_mlp 128", "set_attn_lora_rank 8",
        "stack_layers [1,1,2,3]",
    ]  # fmt: skip
    assert rows[2][1:5] == ["loss < 3.5 or a wait of 500", "4", "16", "2"]
    assert done.stdout.rstrip().endswith(
        "warning: ops[4] 'stack_layers': drops layer 0 of 4 and their trained weights."
    )
    assert path.read_text() == LIST and [*tmp_path.iterdir()] == [path]


def test_the_plan_as_json_with_times() -> None:
    text = "{ops: [{name: upcycle_moe, value: {experts: 4}, trigger: {step: 100}}]}"
    done = run_plan(
        text, "--preset", "baseline", *SETS, "--train-tokens", "102401", "--speed", "1e9", "--json"
    )
    assert (done.exit_code, done.stderr) == (0, "")
    output = json.loads(done.stdout)
    assert output["warnings"] == [] and [row["steps"] for row in output["segments"]] == [100, 600]
    first, second = output["segments"]
    assert (first["experts"], second["experts"], second["op"][:11]) == (0, 4, "upcycle_moe")
    assert (
        second["active"] < second["params"]
        and second["seconds"] == second["tokens"] * second["flops_per_token"] / 1e9
    )


def test_each_fault_has_its_own_line_and_the_exit_code_is_2(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "- {name: set_lrr}\n- {name: stack_layers, value: 2, trigger_loss: 3, max_wait_iters: 9}\n"
    )
    done = run_plan(str(path), "--preset", "baseline", *SETS)
    assert (done.exit_code, done.stdout) == (2, "")
    first, *faults = done.stderr.splitlines()
    assert first == f"error: {path} cannot be applied" and len(faults) == 4
    assert (
        faults[-1] == "ops[1] 'stack_layers': value 2 is the old \"double\" form; "
        "the model has 2 layers, so write [0,1,0,1]."
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["gone.json"], "the file cannot be read"),
        (["mine.txt"], "give a file ending in .json, .yaml, .yml or .toml"),
        (["[]", "--preset", "demo"], "write, for example, --preset demo:baseline"),
        (["[]", "--speed", "1e9"], "got --speed without --train-tokens"),
        (["[]", "--set", "lr=-1"], "lr=-1 is not allowed"),
        ([], "Missing argument"),
    ],
)
def test_invalid_arguments_are_refused_with_the_reason(args: list[str], words: str) -> None:
    done = run_plan(*args)
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
