"""Compare the sizes, costs, waits and warnings of `simulate` and `cost` with values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mainrun.config import TrainConfig, from_dict
from mainrun.plan.cost import costs, segment_costs, size
from mainrun.plan.plan import Plan
from mainrun.plan.simulate import latest, simulate

# The base model has 11,520 parameters: 128 (positions) + 4,800 (embedding) + 32 (last norm) + 2 layers of
# 1,024 (attention matrices) + 2,048 (MLP matrices) + 208 (vectors).
BASE: dict[str, Any] = {
    "n_layer": 2, "d_model": 16, "n_head": 2, "d_ff": 64, "batch_size": 8, "block_size": 8, "vocab_size": 300,
    "lr": 0.01, "dropout": 0.1,
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return from_dict(BASE | changes)


def op(name: str, value: Any, trigger: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": trigger, **more}


# -- sizes

SIZES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int]]] = {
    # A row lists all parameters, active parameters, trained parameters, FLOPs per token and bytes of moments.
    "SGD without momentum has no state": ({}, (11520, 11520, 11520, 68736, 0)),
    "momentum is one number per parameter": ({"momentum": 0.9}, (11520, 11520, 11520, 68736, 4 * 11520)),
    "AdamW has two numbers per parameter": ({"optimizer": "adamw"}, (11520, 11520, 11520, 68736, 8 * 11520)),
    "Muon has one number for the 6,144 parameters of hidden matrices": (
        {"optimizer": "muon"},
        (11520, 11520, 11520, 68736, 4 * 6144 + 8 * (11520 - 6144)),
    ),
    "an untied head needs the same FLOPs": ({"tie_head": False}, (11520 + 4800, 16320, 16320, 68736, 0)),
    "no table of positions": ({"position": "rope"}, (11520 - 128, 11392, 11392, 68736, 0)),
    "no biases, not in norms either": (
        {"bias": False},
        (11520 - 2 * (64 + 80 + 32) - 16, 11152, 11152, 68736, 0),
    ),
    "RMS norms have no bias": ({"norm": "rmsnorm"}, (11520 - 5 * 16, 11440, 11440, 68736, 0)),
    "a gate in the MLP": (
        {"mlp": "swiglu"},
        (11520 + 2 * (1024 + 64), 13696, 13696, 68736 + 6 * 2 * 1024, 0),
    ),
    "no bias of queries, keys and values": ({"qkv_bias": False}, (11520 - 2 * 48, 11424, 11424, 68736, 0)),
    "half the keys and values": (
        {"n_kv_head": 1},
        (11520 - 2 * (256 + 16), 10976, 10976, 68736 - 6 * 2 * 256, 0),
    ),
    "norms of queries and keys": ({"qk_norm": True}, (11520 + 2 * 16, 11552, 11552, 68736, 0)),
    "a gate of each head": ({"attn_gate": True}, (11520 + 2 * 32, 11584, 11584, 68736 + 6 * 2 * 32, 0)),
    "scales of the branches": ({"layer_scale": 0.1}, (11520 + 2 * 32, 11584, 11584, 68736, 0)),
    "a ratio of the first values, except in layer 0": (
        {"value_residual": True},
        (11521, 11521, 11521, 68736, 0),
    ),
    "shortcuts into values and inputs": (
        {"value_shortcut": True, "x0_shortcut": True, "n_kv_head": 1},
        (10976 + 2 * (16 * 8 + 1 + 2), 11238, 11238, 68736 - 6 * 2 * 128, 0),
    ),
    "a skip connection": ({"unet": True}, (11521, 11521, 11521, 68736, 0)),
    "a frozen layer and its shortcuts": (
        {"frozen": [1], "value_shortcut": True, "x0_shortcut": True, "unet": True, "optimizer": "muon"},
        (
            11521 + 2 * (256 + 2 + 2),
            12041,
            12041 - 3280 - 260 - 1,
            68736 + 6 * 2 * 256,
            4 * (3072 + 256) + 8 * (12041 - 3280 - 261 - 3072 - 256),
        ),
    ),
    "layer 0 has no skip connection to freeze": (
        {"frozen": [0], "unet": True},
        (11521, 11521, 11521 - 3280, 68736, 0),
    ),
    "one of four experts": (
        {"experts": 4, "top_k": 1, "router_weights": "softmax", "optimizer": "muon"},
        (
            11520 + 2 * (3 * 2128 + 64),
            11520 + 2 * 64,
            24416,
            68736 + 6 * 2 * 64,
            4 * 18432 + 8 * (24416 - 18432),
        ),
    ),
    "two of four experts": (
        {"experts": 4, "top_k": 2, "optimizer": "adamw"},
        (24416, 24416 - 2 * 2 * 2128, 24416, 68736 + 6 * 2 * (64 + 2048), 8 * 24416),
    ),
    "low rank in attention, with shared keys": (
        {"attn_lora_rank": 3, "n_kv_head": 1},
        (10976 + 2 * 3 * (2 * 32 + 2 * 24), 11648, 11648, 65664 + 6 * 672, 0),
    ),
    "low rank of a tied table": ({"embed_lora_rank": 3}, (11520 + 3 * 316, 12468, 12468, 68736 + 6 * 948, 0)),
    "low rank of a table that is looked up": (
        {"embed_lora_rank": 3, "tie_head": False},
        (16320 + 948, 17268, 17268, 68736, 0),
    ),
    "unused ids": ({"unused_ids": 10}, (11520 + 160, 11680, 11680, 68736 + 6 * 160, 0)),
    "a frozen layer and its ratio": (
        {"frozen": [1], "value_residual": True, "optimizer": "muon"},
        (11521, 11521, 11521 - 3280 - 1, 68736, 4 * 3072 + 8 * (8240 - 3072)),
    ),
    "layer 0 has no ratio to freeze": (
        {"frozen": [0], "value_residual": True, "experts": 4, "optimizer": "muon"},
        (24417, 15905, 24417 - 3280 - 6448, 94080, 4 * 9216 + 8 * (14689 - 9216)),
    ),
    "narrow heads": (
        {"head_dim": 6},
        (11520 - 2 * (256 + 12), 10984, 10984, 6 * (10944 - 512) + 12 * 2 * 12 * 8, 0),
    ),
}


@pytest.mark.parametrize(("changes", "expected"), SIZES.values(), ids=SIZES)
def test_sizes_computed_by_hand(changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    computed = size(config(**changes))
    assert computed == expected
    assert (computed.params, computed.active, computed.trained, computed.flops, computed.moments) == expected


def test_costs_depend_on_the_number_of_ids() -> None:
    assert costs(config(), 300) == {"params": 11520, "active": 11520, "flops_per_token": 68736}
    assert costs(config(), 290) == {"params": 11360, "active": 11360, "flops_per_token": 68736 - 960}
    assert costs(config(experts=4), 300) == {"params": 24416, "active": 15904, "flops_per_token": 94080}


# -- costs of segments

# Without ops, a run has 70 steps of 64 tokens, and an epoch has 10 steps.


def test_each_op_begins_a_segment() -> None:
    ops = [
        op("set_batch_size", 4, {"step": 30}),
        op("stack_layers", [0, 1, 1], {"step": 50}, init="identity"),
    ]
    cfg = config(rdrop=0.5, growth={"ops": ops})
    first, second, third = segment_costs(Plan(cfg, 641), 300)
    assert (first["op"], first["begins"], first["ends"], first["tokens"]) == ("", 0, 30, 30 * 64)
    assert (second["op"], second["begins"], second["ends"], second["tokens"]) == (
        "set_batch_size 4",
        30,
        50,
        20 * 32,
    )
    assert (third["op"], third["begins"], third["ends"], third["tokens"]) == (
        "stack_layers [0,1,1]",
        50,
        110,
        60 * 32,
    )
    assert first["flops"] == 30 * 64 * 2 * 68736, "R-Drop needs two passes"
    assert second["flops"] == 20 * 32 * 2 * 68736
    assert (
        third["params"] == 11520 + 3280
        and third["active"] == 14800
        and third["flops_per_token"] == 68736 + 6 * 3072 + 1536
    )
    assert third["flops"] == 60 * 32 * 2 * third["flops_per_token"]


def test_a_run_without_ops_is_one_segment() -> None:
    (only,) = segment_costs(Plan(config(), 641), 300)
    assert only == {
        "op": "", "begins": 0, "ends": 70, "tokens": 4480, "flops": 4480 * 68736, "params": 11520,
        "active": 11520,
        "flops_per_token": 68736,
    }  # fmt: skip


def test_the_simulated_segments_have_steps_tokens_and_seconds() -> None:
    ops = [op("set_batch_size", 4, {"step": 30}), op("set_lr", 0.02, {"loss_below": 3})]
    forecast = simulate(config(rdrop=0.5), {"ops": ops}, 641, speed=2.0)
    assert [(s.op, s.begins) for s in forecast.segments] == [
        ("", "step 0"),
        ("set_batch_size 4", "step 30"),
        ("set_lr 0.02", "loss < 3"),
    ]
    assert [(s.steps, s.tokens) for s in forecast.segments] == [(30, 1920), (80, 2560), (None, None)]
    assert [s.seconds for s in forecast.segments] == [1920 * 2 * 68736 / 2, 2560 * 2 * 68736 / 2, None]
    assert [s.seconds for s in simulate(config(), {"ops": ops}, 641).segments] == [None, None, None], (
        "the time needs a speed"
    )
    assert [s.steps for s in simulate(config(), {"ops": ops}).segments] == [None, None, None], (
        "the steps need the tokens"
    )


def test_with_faults_the_segments_are_those_of_the_other_ops() -> None:
    ops = [op("widen_mlp", 32, {"step": 5}), op("set_lr", 0.02, {"step": 6}), op("shrink", 1, {"step": 7})]
    forecast = simulate(config(), {"version": 3, "ops": ops}, 641)
    assert [text.split(";")[0] for text in forecast.faults] == [
        "version=3 is unknown",
        "ops[0] 'widen_mlp': value 32 is not above the current hidden width 64",
        "ops[2] 'shrink': unknown op",
    ]  # fmt: skip
    assert [s.op for s in forecast.segments] == ["", "set_lr 0.02"]
    assert [s.steps for s in forecast.segments] == [None, None], "a schedule with faults has no plan"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(65, None), (64, "train has 64 tokens, but one step needs batch_size*block_size+1 = 65")],
)
def test_too_few_tokens_are_a_fault(tokens: int, message: str | None) -> None:
    faults = simulate(config(), [], tokens).faults
    assert (
        faults == []
        if message is None
        else len(faults) == 1 and faults[0].startswith(message) and faults[0].endswith(".")
    )


# -- the longest waits

# In these runs, evaluations follow step 1 and every third step (eval_per_epoch=3).
WAITS: dict[str, tuple[list[dict[str, Any]], tuple[int, ...]]] = {
    "at the first evaluation": ([op("set_lr", 0.1, {"wait_iters": 1})], (1,)),
    "a wait of 0 needs an evaluation too": ([op("set_lr", 0.1, {"wait_iters": 0})], (1,)),
    "an evaluation at exactly that step": ([op("set_lr", 0.1, {"wait_iters": 9})], (9,)),
    "at the next one": ([op("set_lr", 0.1, {"wait_iters": 10})], (12,)),
    "at the last one before the end": ([op("set_lr", 0.1, {"wait_iters": 69})], (69,)),
    "the end is too late": ([op("set_lr", 0.1, {"wait_iters": 70})], ()),
    "a loss alone never fires": ([op("set_lr", 0.1, {"loss_below": 99})], ()),
    "nor does a plateau": ([op("set_lr", 0.1, {"plateau": {"evals": 1, "rel": 0.5}})], ()),
    "on the same loss": (
        [op("set_lr", 0.1, {"wait_iters": 9}), op("set_lr", 0.2, {"wait_iters": 0})],
        (9, 9),
    ),
    "on a new loss": (
        [op("widen_mlp", 80, {"wait_iters": 9}), op("set_lr", 0.2, {"wait_iters": 0})],
        (9, 12),
    ),
    "static after waiting": ([op("set_lr", 0.1, {"wait_iters": 9}), op("set_lr", 0.2, {"step": 8})], (9, 9)),
    "waiting after a static one": (
        [op("set_lr", 0.1, {"step": 10}), op("set_lr", 0.2, {"wait_iters": 2})],
        (10, 12),
    ),
    "a budget that needs an evaluation": (
        [op("set_lr", 0.1, {"any": [{"budget_frac": 0.5}, {"loss_below": 1}]})],
        (36,),
    ),
    "one that waits for one that never fires": (
        [op("set_lr", 0.1, {"loss_below": 9}), op("set_lr", 0.2, {"step": 8})],
        (),
    ),
}


@pytest.mark.parametrize(("ops", "fired"), WAITS.values(), ids=WAITS)
def test_latest_fires_every_op_as_late_as_possible(ops: list[dict[str, Any]], fired: tuple[int, ...]) -> None:
    assert latest(config(eval_per_epoch=3, growth={"ops": ops}), 641).fired == fired


# -- warnings

THREE = {"n_layer": 3}
WARNINGS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], int | None, list[str]]] = {
    "a layer map that moves nothing": (
        {}, [op("stack_layers", [0, 1], {"step": 5})], None,
        ["ops[0] 'stack_layers': changes nothing; the config already has these values."]
    ),
    "a layer map of the same length": ({}, [op("stack_layers", [1, 0], {"step": 5})], None, []),
    "a value that is set twice": (
        {}, [op("set_lr", 0.02, {"step": 5}), op("set_lr", 0.02, {"step": 6})], None,
        ["ops[1] 'set_lr': changes nothing; the config already has these values."],
    ),
    "two layers that are dropped": (
        THREE, [op("stack_layers", [1], {"step": 5})], None,
        ["ops[0] 'stack_layers': drops layers 0, 2 of 3 and their trained weights."],
    ),
    "one layer that is dropped": (
        THREE, [op("stack_layers", [0, 2], {"step": 5})], None,
        ["ops[0] 'stack_layers': drops layer 1 of 3 and their trained weights."],
    ),
    "a loss below zero": (
        {}, [op("set_lr", 0.1, {"loss_below": -1.5})], None,
        ["ops[0] 'set_lr': loss_below=-1.5 is never reached; a loss is always above 0."]
    ),
    "a loss of zero": (
        {}, [op("set_lr", 0.1, {"loss_below": 0})], None,
        ["ops[0] 'set_lr': loss_below=0 is never reached; a loss is always above 0."]
    ),
    "a loss just above zero": ({}, [op("set_lr", 0.1, {"loss_below": 1e-9})], None, []),
    "two ops at one step": ({}, [op("set_lr", 0.1, {"step": 50}), op("set_lr", 0.2, {"step": 50})], None, []),
    "steps that go back, after the largest": (
        {}, [op("set_lr", 0.1, {"step": 50}), op("set_lr", 0.2, {"step": 40}),
            op("set_lr", 0.3, {"step": 45})], None,
        ["ops[1] 'set_lr': the op cannot fire at step 40; "
         "it fires together with the previous op, at step 50 or later.",
         "ops[2] 'set_lr': the op cannot fire at step 45; "
         "it fires together with the previous op, at step 50 or later."],
    ),
    "a step next to a loss is not static": (
        {}, [op("set_lr", 0.1, {"any": [{"step": 50}, {"loss_below": 3}]}), op("set_lr", 0.2, {"step": 40})],
        None, []
    ),
    "a first wait of one step": ({"eval_interval": 9}, [op("set_lr", 0.1, {"wait_iters": 1})], None, []),
    "a first wait of two": (
        {"eval_interval": 9}, [op("set_lr", 0.1, {"wait_iters": 2})], None,
        ["ops[0] 'set_lr': a wait of 2 is shorter than the 9 steps between evaluations; "
         "the op fires at the next evaluation."],
    ),
    "a second wait of one": (
        {"eval_interval": 9}, [op("set_lr", 0.1, {"wait_iters": 9}), op("set_lr", 0.2, {"wait_iters": 1})],
        None,
        ["ops[1] 'set_lr': a wait of 1 is shorter than the 9 steps between evaluations; "
         "the op fires at the next evaluation."],
    ),
    "a second wait of 0": ({"eval_interval": 9},
        [op("set_lr", 0.1, {"wait_iters": 9}), op("set_lr", 0.2, {"wait_iters": 0})], None, []),
    "a wait as long as the interval": ({"eval_interval": 9}, [op("set_lr", 0.1, {"wait_iters": 9})], None,
        []),
    "an unknown interval": ({}, [op("set_lr", 0.1, {"wait_iters": 2})], None, []),
    "an interval by the tokens": (
        {"eval_per_epoch": 3}, [op("set_lr", 0.1, {"wait_iters": 2})], 641,
        ["ops[0] 'set_lr': a wait of 2 is shorter than the 3 steps between evaluations; "
         "the op fires at the next evaluation."],
    ),
    "no evaluation but the last": (
        {"eval_per_epoch": 0}, [op("set_lr", 0.1, {"wait_iters": 2})], 641,
        ["ops[0] 'set_lr': never fires; the run has 70 steps."]
    ),
    "more evaluations than steps": ({"eval_per_epoch": 100}, [op("set_lr", 0.1, {"wait_iters": 2})], 641, []),
    "an interval in steps comes before one by tokens": (
        {"eval_per_epoch": 3, "eval_interval": 5}, [op("set_lr", 0.1, {"wait_iters": 4})], 641,
        ["ops[0] 'set_lr': a wait of 4 is shorter than the 5 steps between evaluations; "
         "the op fires at the next evaluation."],
    ),
    "a loss alone may come": ({}, [op("set_lr", 0.1, {"loss_below": 3})], 641, []),
    "a plateau alone may come": ({}, [op("set_lr", 0.1, {"plateau": {"evals": 2, "rel": 0.1}})], 641, []),
    "a plateau or a wait that is too long": (
        {}, [op("set_lr", 0.1, {"any": [{"plateau": {"evals": 2, "rel": 0.1}}, {"wait_iters": 99}]})], 641,
        ["ops[0] 'set_lr': only fires if its condition on the loss is met; the run has 70 steps."],
    ),
    "no op waits for the last one": (
        {}, [op("set_lr", 0.1, {"step": 9}), op("set_lr", 0.2, {"wait_iters": 99})], 641,
        ["ops[1] 'set_lr': never fires; the run has 70 steps."],
    ),
    "an op waits for one that never fires": (
        {}, [op("set_lr", 0.2, {"wait_iters": 99}), op("set_lr", 0.1, {"loss_below": 9})], 641,
        ["ops[0] 'set_lr': never fires; the run has 70 steps, and later ops wait for this op."],
    ),
    "a reset changes nothing by itself": ({}, [op("reset_lr_schedule", None, {"step": 9})], None, []),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "ops", "tokens", "warnings"), WARNINGS.values(), ids=WARNINGS)
def test_warnings_and_their_boundaries(
    changes: dict[str, Any], ops: list[dict[str, Any]], tokens: int | None, warnings: list[str]
) -> None:
    forecast = simulate(config(**changes), {"ops": ops}, tokens)
    assert (forecast.faults, forecast.warnings) == ([], warnings)
