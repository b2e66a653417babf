"""Test the rules of a growth schedule with the last allowed and the first refused value of each rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError
from mainrun.plan.op_files import from_text, read
from mainrun.plan.ops import Op, Rates, Schedule, Transfer, after, walk
from mainrun.plan.triggers import Facts, Trigger, due

START: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "d_model": 16,
    "d_ff": 64,
    "block_size": 4,
    "batch_size": 2,
    "vocab_size": 300,
    "lr": 0.01,
    "dropout": 0.1,
}


def config(**changes: Any) -> TrainConfig:
    return from_dict(START | changes)


def op(name: str, value: Any = None, trigger: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": trigger or {"step": 5}} | more


def one(name: str, value: Any = None, trigger: Any = None, **more: Any) -> Op:
    schedule, faults = read({"ops": [op(name, value, trigger, **more)]})
    assert not faults, faults
    return schedule.ops[0]


def faults_of(data: Any) -> list[str]:
    return [text for _, text in read(data)[1]]


# -- triggers

TRIGGERS: dict[str, tuple[dict[str, Any], str, bool, dict[str, Any]]] = {
    "step": ({"step": 1500}, "step 1,500", True, {"step": 1500}),
    "tokens": ({"tokens": 2e3}, "2,000 tokens", True, {"tokens": 2000}),
    "budget": ({"budget_frac": 0.25}, "0.25 of the budget", True, {"budget_frac": 0.25}),
    "loss": ({"loss_below": 3.5}, "loss < 3.5", False, {"loss_below": 3.5}),
    "wait": ({"wait_iters": 1500}, "a wait of 1,500", False, {"wait_iters": 1500}),
    "plateau": (
        {"plateau": {"evals": 3, "rel": 0.01}},
        "plateau of 3 evaluations",
        False,
        {"plateau": {"evals": 3, "rel": 0.01}},
    ),
    "any of one": ({"any": [{"step": 5}]}, "step 5", True, {"step": 5}),
    "any, all static": (
        {"any": [{"budget_frac": 0.5}, {"step": 5}]},
        "step 5 or 0.5 of the budget",
        True,
        {"any": [{"step": 5}, {"budget_frac": 0.5}]},
    ),
    "any, one of them not": (
        {"any": [{"wait_iters": 0}, {"step": 5}]},
        "a wait of 0 or step 5",
        False,
        {"any": [{"wait_iters": 0}, {"step": 5}]},
    ),
}


@pytest.mark.parametrize(("given", "words", "static", "data"), TRIGGERS.values(), ids=TRIGGERS)
def test_a_trigger_as_text_and_as_data(
    given: dict[str, Any], words: str, static: bool, data: dict[str, Any]
) -> None:
    trigger = one("set_lr", 0.1, given).trigger
    assert (str(trigger), trigger.static, trigger.data()) == (words, static, data)


EVALUATED = [(10, 4.0), (20, 3.99), (30, 3.97)]
DUE: dict[str, tuple[dict[str, Any], Facts, str | None]] = {
    "the last loss is below": ({"loss_below": 3.98}, Facts(30, 0, 9, 100, EVALUATED), "loss 3.9700 < 3.98"),
    "equal is not below": ({"loss_below": 3.97}, Facts(30, 0, 9, 100, EVALUATED), None),
    "an older loss does not count": (
        {"loss_below": 3.98},
        Facts(40, 0, 9, 100, [*EVALUATED, (40, 3.99)]),
        None,
    ),
    "no loss so far": ({"loss_below": 3.98}, Facts(30, 0, 9, 100), None),
    "one step too early for a wait": ({"wait_iters": 1500}, Facts(1509, 10, 9, 100), None),
    "waited long enough": (
        {"wait_iters": 1500},
        Facts(1510, 10, 9, 100),
        "1,500 steps since the last op >= 1,500",
    ),
    "waited longer": (
        {"wait_iters": 5},
        Facts(1510, 10, 9, 100),
        "1,500 steps since the last op >= 5",
    ),
    "one step too early": ({"step": 1500}, Facts(1499, 0, 9, 100), None),
    "at the step": ({"step": 1500}, Facts(1500, 0, 9, 100), "step 1,500 >= 1,500"),
    "after the step": ({"step": 1500}, Facts(2500, 0, 9, 100), "step 2,500 >= 1,500"),
    "one token too few": ({"tokens": 2000}, Facts(5, 0, 1999, 100), None),
    "the tokens": ({"tokens": 2000}, Facts(5, 0, 2000, 100), "2,000 tokens >= 2,000"),
    "more tokens": ({"tokens": 2000}, Facts(5, 0, 3000, 100), "3,000 tokens >= 2,000"),
    "just under the share": ({"budget_frac": 0.25}, Facts(5, 0, 999, 4000), None),
    "the share": ({"budget_frac": 0.25}, Facts(5, 0, 1000, 4000), "1,000 tokens >= 0.25 of the budget"),
    "no evaluation before the last two": (
        {"plateau": {"evals": 2, "rel": 0.01}},
        Facts(20, 0, 9, 100, EVALUATED[:2]),
        None,
    ),
    "a plateau": (
        {"plateau": {"evals": 2, "rel": 0.01}},
        Facts(30, 0, 9, 100, EVALUATED),
        "plateau: best loss 3.9700 in the last 2 evaluations, 4.0000 before",
    ),
    "an improvement of exactly rel is enough": (
        {"plateau": {"evals": 1, "rel": 0.25}},
        Facts(20, 0, 9, 100, [(10, 4.0), (20, 3.0)]),
        None,
    ),
    "an improvement of a bit less": (
        {"plateau": {"evals": 1, "rel": 0.25}},
        Facts(20, 0, 9, 100, [(10, 4.0), (20, 3.0001)]),
        "plateau: best loss 3.0001 in the last 1 evaluations, 4.0000 before",
    ),
    "the best before counts": (
        {"plateau": {"evals": 1, "rel": 0.25}},
        Facts(30, 0, 9, 100, [(10, 3.0), (20, 4.0), (30, 2.9)]),
        "plateau: best loss 2.9000 in the last 1 evaluations, 3.0000 before",
    ),
    "the best of the last counts": (
        {"plateau": {"evals": 2, "rel": 0.25}},
        Facts(30, 0, 9, 100, [(10, 4.0), (20, 2.0), (30, 3.9)]),
        None,
    ),
    "the loss at the step of the last op does not count": (
        {"plateau": {"evals": 2, "rel": 0.01}},
        Facts(30, 10, 9, 100, EVALUATED),
        None,
    ),
    "the first condition that holds is the reason": (
        {"any": [{"step": 5}, {"loss_below": 9}]},
        Facts(30, 0, 9, 100, EVALUATED),
        "loss 3.9700 < 9",
    ),
    "no condition holds": (
        {"any": [{"step": 50}, {"loss_below": 1}, {"tokens": 10}]},
        Facts(30, 0, 9, 100, EVALUATED),
        None,
    ),
}


@pytest.mark.parametrize(("trigger", "facts", "reason"), DUE.values(), ids=DUE)
def test_when_an_op_is_due(trigger: dict[str, Any], facts: Facts, reason: str | None) -> None:
    assert due(one("set_lr", 0.1, trigger).trigger, facts) == reason


# -- allowed and refused values


def kept_trigger(condition: str, value: Any) -> Any:
    schedule, faults = read({"ops": [op("set_lr", 0.1, {condition: value})]})
    return getattr(schedule.ops[0].trigger, condition) if not faults else faults[0][1]


LARGEST = 2**63
KEPT: dict[str, list[tuple[Any, Any]]] = {
    "loss_below": [(3, 3.0), (-2.5, -2.5), (0, 0.0), (9e299, 9e299)],
    "wait_iters": [(0, 0), (2.0, 2), (2e8, 200_000_000), (LARGEST - 1, LARGEST - 1)],
    "step": [(1, 1), (1.0, 1)],
    "tokens": [(1, 1), (2e8, 200_000_000)],
    "budget_frac": [(1e-9, 1e-9), (0.999999, 0.999999)],
    "plateau": [({"evals": 1, "rel": 0.5}, (1, 0.5)), ({"evals": 2.0, "rel": 1e-6}, (2, 1e-6))],
}
REFUSED: dict[str, tuple[str, list[Any]]] = {
    "loss_below": ("a finite number", [1e300, -1e300, math.inf, math.nan, True, "3", None, [3], {}]),
    "wait_iters": ("a whole number, 0 or more", [-1, 0.5, LARGEST, math.nan, math.inf, False, "0", None]),
    "step": ("a whole number, 1 or more", [0, 0.9, 1.5, True, LARGEST, [5]]),
    "tokens": ("a whole number, 1 or more", [0, 2.5]),
    "budget_frac": ("a fraction of the run's tokens, above 0 and below 1", [0, 0.0, 1, 1.0, -0.1, 1.1, True]),
    "plateau": (
        "{ evals = N, rel = R } with N of at least 1, and R above 0 and below 1",
        [
            {"evals": 1},
            {"rel": 0.5},
            {"evals": 1, "rel": 0.5, "x": 1},
            {"evals": 0, "rel": 0.5},
            {"evals": 1, "rel": 0},
            {"evals": 1, "rel": 1},
            {"evals": 1.5, "rel": 0.5},
            {"evals": "1", "rel": 0.5},
            3,
            [1, 0.5],
            {},
        ],
    ),
}


@pytest.mark.parametrize("condition", KEPT)
def test_the_allowed_values_of_a_condition(condition: str) -> None:
    for value, kept in KEPT[condition]:
        got = kept_trigger(condition, value)
        assert got == kept and type(got) is type(kept), value
    allowed, values = REFUSED[condition]
    for value in values:
        message = kept_trigger(condition, value)
        assert (
            message == f"ops[0] 'set_lr': trigger.{condition}={value!r} is not allowed; write {allowed}."
        ), value


PARTS: list[tuple[str, str, str, list[tuple[Any, Any]], str, list[Any]]] = [
    (
        "widen_mlp",
        "optimizer",
        "mode",
        [(m, m) for m in ("auto", "keep", "scale", "reset", "asymmetric")],
        "auto or keep or scale or reset or asymmetric",
        ["half", 1, True, None, ["auto"]],
    ),
    (
        "widen_mlp",
        "optimizer",
        "min_coverage",
        [(0, 0.0), (1, 1.0), (0.5, 0.5)],
        "a number from 0 to 1",
        [-1e-9, 1.000001, True, "1", None],
    ),
    ("widen_mlp", "lr", "rewarm_iters", [(0, 0), (5.0, 5)], "a whole number, 0 or more", [-1, 0.5, True]),
    (
        "widen_mlp",
        "lr",
        "new_params_peak",
        [(1e-9, 1e-9), (3, 3.0)],
        "a number above 0",
        [0, -1, math.inf, 1e300, True],
    ),
    (
        "widen_mlp",
        "lr",
        "width_rule",
        [("none", "none"), ("adam_1_over_n", "adam_1_over_n")],
        "none or adam_1_over_n",
        ["1/n", None],
    ),
    (
        "widen_model",
        "value",
        "factor",
        [(2, 2), (2.0, 2), (1.5, 1.5)],
        "a whole number, 2 or more",
        [1, 1.0, 0, -2, True, "2", math.inf],
    ),
    ("widen_model", "value", "d_model", [(2, 2), (32.0, 32)], "a whole number, 2 or more", [1, 32.5, True]),
    ("widen_model", "value", "kv", [("scale", "scale"), ("keep", "keep")], "scale or keep", ["drop"]),
    ("widen_model", "value", "tied", [("fold_final_norm", "fold_final_norm")], "fold_final_norm", ["no"]),
    (
        "widen_model",
        "value",
        "noise_snr_db",
        [(-199.9, -199.9), (199, 199.0), (0, 0.0)],
        "a number of decibels between -200 and 200",
        [-200, 200, math.nan],
    ),
    ("upcycle_moe", "value", "experts", [(2, 2), (8.0, 8)], "a whole number, 2 or more", [1, 0, 2.5]),
    ("upcycle_moe", "value", "top_k", [(1, 1)], "a whole number, 1 or more", [0, 1.5]),
    ("upcycle_moe", "value", "router", [("random", "random"), ("zero", "zero")], "random or zero", ["ones"]),
    ("upcycle_moe", "value", "router_std", [(1e-9, 1e-9), (2, 2.0)], "a number above 0", [0, -0.1]),
    (
        "upcycle_moe",
        "value",
        "router_weights",
        [("renormalised", "renormalised"), ("softmax", "softmax")],
        "renormalised or softmax",
        ["max"],
    ),
    ("upcycle_moe", "value", "shards", [(1, 1), (2, 2)], "a whole number, 1 or more", [0]),
    (
        "upcycle_moe",
        "value",
        "noise_snr_db",
        [(-199.9, -199.9), (199.9, 199.9)],
        "a number of decibels between -200 and 200",
        [-200, 200],
    ),
]


@pytest.mark.parametrize(
    ("name", "table", "key", "kept", "allowed", "refused"), PARTS, ids=[f"{row[0]}-{row[2]}" for row in PARTS]
)
def test_the_allowed_values_of_a_key_in_a_table(
    name: str, table: str, key: str, kept: list[tuple[Any, Any]], allowed: str, refused: list[Any]
) -> None:
    size: dict[str, Any] = {"widen_mlp": 128, "widen_model": {"factor": 2}, "upcycle_moe": {"experts": 4}}[
        name
    ]

    def written(value: Any) -> dict[str, Any]:
        if table != "value":
            return op(name, size, **{table: {key: value}})
        base = {} if key in ("factor", "d_model") else size
        return op(name, base | {key: value})

    for value, expected in kept:
        schedule, faults = read({"ops": [written(value)]})
        assert not faults, (value, faults)
        held = schedule.ops[0]
        got = held.value[key] if table == "value" else getattr(getattr(held, table), key)
        assert got == expected and type(got) is type(expected), value
    for value in refused:
        (message,) = faults_of({"ops": [written(value)]})
        assert message.startswith(f"ops[0] {name!r}: {table}.{key}={value!r} is not allowed"), value
        assert message.endswith(f"; write {allowed}."), value


def test_the_defaults_of_a_value_table() -> None:
    assert one("widen_model", 32).value == {"kv": "scale", "tied": "fold_final_norm", "d_model": 32}
    assert one("widen_model", {"factor": 2, "kv": "keep"}).value == {
        "kv": "keep",
        "tied": "fold_final_norm",
        "factor": 2,
    }
    assert one("upcycle_moe", {"experts": 4}).value == {
        "top_k": 2,
        "router": "random",
        "shards": 1,
        "experts": 4,
    }
    assert one("upcycle_moe", {"experts": 4, "top_k": 1, "router": "zero", "shards": 2}).value == {
        "top_k": 1,
        "router": "zero",
        "shards": 2,
        "experts": 4,
    }


# -- the defaults of an op


@pytest.mark.parametrize(
    ("name", "value", "init", "reevaluate"),
    [
        ("set_lr", 0.1, "", False),
        ("set_batch_size", 4, "", False),
        ("set_dropout", 0.2, "", False),
        ("reset_lr_schedule", None, "", False),
        ("stack_layers", [0, 1, 1], "copy", True),
        ("widen_mlp", 128, "copy", True),
        ("widen_model", 32, "", True),
        ("add_heads", 4, "", True),
        ("upcycle_moe", {"experts": 4}, "", True),
        ("set_attn_lora_rank", 4, "", True),
        ("set_mlp_lora_rank", 4, "", True),
        ("set_embedding_lora_rank", 4, "", True),
        ("merge_lora_weights", None, "", True),
        ("freeze_layer", 0, "", True),
        ("unfreeze_layer", [0], "", True),
        ("resize_vocabulary", 310, "", True),
    ],
)
def test_the_defaults_of_an_op(name: str, value: Any, init: str, reevaluate: bool) -> None:
    default = one(name, value)
    assert (default.id, default.desc, default.place, default.init, default.reevaluate) == (
        f"0-{name}",
        "",
        0,
        init,
        reevaluate,
    )
    assert (default.preserve, default.on_fail) == ("", "abort")
    assert default.optimizer == Transfer("auto", 0.0) and default.lr == Rates(0, 1.0, "none")
    assert one(name, value, reevaluate=not reevaluate).reevaluate is not reevaluate


def test_data_omits_keys_with_their_default() -> None:
    plain = one("widen_mlp", 128)
    assert plain.data() == {"name": "widen_mlp", "value": 128, "trigger": {"step": 5}}
    more = {
        "id": "wide",
        "desc": "more",
        "reevaluate": False,
        "init": "identity",
        "preserve": "exact",
        "on_fail": "skip",
        "optimizer": {"mode": "keep", "min_coverage": 0.5},
        "lr": {"rewarm_iters": 9, "new_params_peak": 2.0, "width_rule": "none"},
    }
    assert one("widen_mlp", 128, **more).data() == plain.data() | more
    for key, value in more.items():
        assert one("widen_mlp", 128, **{key: value}).data() == plain.data() | {key: value}
    assert one("stack_layers", [0, 0]).data()["value"] == [0, 0]
    assert one("merge_lora_weights").data() == {"name": "merge_lora_weights", "trigger": {"step": 5}}


def test_the_effect_of_an_op_has_the_keys_that_decide_the_bits() -> None:
    plain = one("widen_mlp", 128)
    assert plain.effect() == {"name": "widen_mlp", "value": 128, "seed": plain.seed}
    for key, value in {
        "id": "x",
        "desc": "x",
        "reevaluate": False,
        "on_fail": "skip",
        "trigger": {"step": 9},
    }.items():
        assert one("widen_mlp", 128, **{key: value}).effect() == plain.effect(), key
    for key, value in {
        "init": "identity",
        "preserve": "approx",
        "optimizer": "reset",
        "lr": {"rewarm_iters": 1},
    }.items():
        assert one("widen_mlp", 128, **{key: value}).effect() != plain.effect(), key


def test_a_schedule_as_data_and_as_text() -> None:
    ops = [op("set_lr", 0.1), op("stack_layers", [0, 0, 1])]
    plain, seeded = read({"ops": ops})[0], read({"ops": ops, "seed": 3})[0]
    assert plain.data() == {"version": 2, "ops": ops} and seeded.data() == {
        "version": 2,
        "seed": 3,
        "ops": ops,
    }
    assert str(seeded) == json.dumps(seeded.data(), separators=(",", ":")) and read(
        json.loads(str(seeded))
    ) == (seeded, [])
    assert Schedule().data() == {"version": 2, "ops": []} and (Schedule().ops, Schedule().seed) == ((), 0)
    assert [str(o) for o in plain.ops] == ["set_lr 0.1", "stack_layers [0,0,1]"] and str(
        one("reset_lr_schedule")
    ) == "reset_lr_schedule"
    assert [str(one("set_lr", v)) for v in (1e-7, 6e-4, 2)] == ["set_lr 1e-07", "set_lr 0.0006", "set_lr 2"]
    assert str(one("widen_model", 32)) == 'widen_model {"kv":"scale","tied":"fold_final_norm","d_model":32}'
    assert len({hash(o) for o in (*plain.ops, *seeded.ops)}) == 2


def test_the_seed_of_an_op_depends_on_its_place_and_the_seed_of_the_schedule() -> None:
    """The seeds are pinned, because other seeds would give another model for the same schedule."""
    ops = [op("widen_mlp", 128), op("widen_mlp", 256)]
    assert [o.seed for o in read({"ops": ops})[0].ops] == SEEDS[0]
    assert [o.seed for o in read({"ops": ops, "seed": 1})[0].ops] == SEEDS[1]
    entries = [{"name": "widen_mlp", "value": 128, "trigger_loss": 3, "max_wait_iters": 9}]
    assert read(entries)[0].ops[0].seed == SEEDS[0][0], "a schedule in the original format has the seed 0"


SEEDS = [[4481077711173917646, 6403782323461907794], [8793111607293158513, 7897666548380046824]]


CHANGES: list[tuple[dict[str, Any], str, Any, dict[str, Any]]] = [
    ({}, "set_lr", 0.5, {"lr": 0.5}),
    ({}, "set_batch_size", 4, {"batch_size": 4}),
    ({}, "set_grad_accum", 2, {"grad_accum": 2}),
    ({}, "set_warmup_iters", 7, {"warmup_iters": 7}),
    ({}, "set_eval_interval", 7, {"eval_interval": 7}),
    ({}, "set_weight_decay", 0.5, {"weight_decay": 0.5}),
    ({}, "set_dropout", 0.5, {"dropout": 0.5}),
    ({}, "reset_lr_schedule", None, {}),
    ({"n_layer": 3, "frozen": [1]}, "stack_layers", [1, 1, 0, 2], {"n_layer": 4, "frozen": (0,)}),
    ({"n_layer": 3, "frozen": [1]}, "stack_layers", [0, 2], {"n_layer": 2, "frozen": ()}),
    ({"n_layer": 3, "frozen": [0, 2]}, "stack_layers", [2, 2, 1, 0], {"n_layer": 4, "frozen": (0, 3)}),
    ({}, "widen_mlp", 65, {"d_ff": 65}),
    ({"d_ff": 0}, "widen_model", 32, {"d_model": 32, "d_ff": 128, "n_head": 4}),
    (
        {"n_head": 4, "n_kv_head": 2},
        "widen_model",
        48,
        {"d_model": 48, "d_ff": 192, "n_head": 12, "n_kv_head": 6},
    ),
    (
        {},
        "widen_model",
        {"factor": 2, "kv": "keep"},
        {"d_model": 32, "d_ff": 128, "n_head": 4, "n_kv_head": 2},
    ),
    ({}, "add_heads", 3, {"n_head": 3, "head_dim": 8}),
    ({"n_head": 4, "n_kv_head": 2}, "add_heads", 6, {"n_head": 6, "head_dim": 4}),
    ({}, "upcycle_moe", {"experts": 8, "top_k": 4, "shards": 2}, {"experts": 8, "top_k": 4, "d_ff": 32}),
    ({}, "set_attn_lora_rank", 3, {"attn_lora_rank": 3}),
    ({}, "set_mlp_lora_rank", 3, {"mlp_lora_rank": 3}),
    ({}, "set_embedding_lora_rank", 3, {"embed_lora_rank": 3}),
    ({"frozen": [1]}, "freeze_layer", 0, {"frozen": (0, 1)}),
    ({"frozen": [0, 1]}, "unfreeze_layer", [0], {"frozen": (1,)}),
    ({"unused_ids": 5}, "resize_vocabulary", 309, {"unused_ids": 9}),
]


@pytest.mark.parametrize(
    ("start", "name", "value", "changed"), CHANGES, ids=[f"{i}-{row[1]}" for i, row in enumerate(CHANGES)]
)
def test_the_fields_that_an_op_changes(
    start: dict[str, Any], name: str, value: Any, changed: dict[str, Any]
) -> None:
    before = config(**start)
    now = after(one(name, value), before)
    differ = {f: getattr(now, f) for f in TrainConfig.model_fields if getattr(now, f) != getattr(before, f)}
    assert differ == changed


@pytest.mark.parametrize("name", ["widen_mlp", "add_heads", "resize_vocabulary"])
def test_a_size_that_is_not_a_number_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"value='wide' is not allowed; give an integer above \d+, the "):
        after(Op(name, "wide", Trigger(step=1)), config())


def test_the_defaults_of_the_class_op() -> None:
    bare = Op("set_lr", 0.1, Trigger(step=5))
    assert (
        bare.place,
        bare.seed,
        bare.id,
        bare.desc,
        bare.reevaluate,
        bare.init,
        bare.preserve,
        bare.on_fail,
    ) == (
        0,
        0,
        "",
        "",
        True,
        "",
        "",
        "abort",
    )
    assert (bare.optimizer, bare.lr) == (Transfer("auto", 0.0), Rates(0, 1.0, "none"))


def test_a_merge_sets_all_ranks_to_zero() -> None:
    now = after(one("merge_lora_weights"), config(attn_lora_rank=2, mlp_lora_rank=4, embed_lora_rank=3))
    assert (now.attn_lora_rank, now.mlp_lora_rank, now.embed_lora_rank) == (0, 0, 0)
    for ranks in ({"attn_lora_rank": 2}, {"mlp_lora_rank": 4}, {"embed_lora_rank": 3}):
        assert walk(config(**ranks), [one("merge_lora_weights")])[1] == [], "one rank is enough"


# -- defaults


def test_defaults_except_reevaluate_apply_only_to_architecture_ops() -> None:
    data = {
        "defaults": {
            "reevaluate": True,
            "preserve": "approx",
            "optimizer": "keep",
            "lr": {"rewarm_iters": 3},
            "on_fail": "skip",
        },
        "ops": [
            op("set_lr", 0.1),
            op("widen_mlp", 128),
            op("widen_mlp", 256, preserve="none", on_fail="abort", reevaluate=False),
        ],
    }
    schedule, faults = read(data)
    assert not faults
    rate, wide, wider = schedule.ops
    assert (rate.reevaluate, rate.preserve, rate.optimizer.mode, rate.lr.rewarm_iters, rate.on_fail) == (
        True,
        "",
        "auto",
        0,
        "abort",
    )
    assert (wide.reevaluate, wide.preserve, wide.optimizer.mode, wide.lr.rewarm_iters, wide.on_fail) == (
        True,
        "approx",
        "keep",
        3,
        "skip",
    )
    assert (wider.reevaluate, wider.preserve, wider.optimizer.mode, wider.on_fail) == (
        False,
        "none",
        "keep",
        "abort",
    )


def test_a_wrong_default_is_reported_and_ignored() -> None:
    schedule, faults = read(
        {
            "defaults": {"on_fail": "retry", "preserve": "approx", "init": "copy"},
            "ops": [op("widen_mlp", 128)],
        }
    )
    assert [text for _, text in faults] == [
        "unknown key defaults.init; allowed: reevaluate, preserve, optimizer, lr, on_fail.",
        "defaults.on_fail='retry' is not allowed; write abort or skip.",
    ]
    assert (schedule.ops[0].on_fail, schedule.ops[0].preserve) == ("abort", "approx")


# -- faults of a schedule

NOT_A_SCHEDULE = (
    "is not a schedule; write { ops = [{ name, value, trigger }, ...] }, or a list of ops "
    "with trigger_loss and max_wait_iters."
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"version": True}, "version=True is unknown; write version=2, or a list in the original format."),
        ({"version": "2"}, "version='2' is unknown; write version=2, or a list in the original format."),
        ({"version": 2.0}, None),
        ({"seed": True}, "seed=True is not allowed; write a whole number, 0 or more."),
        ({"seed": 1.5}, "seed=1.5 is not allowed; write a whole number, 0 or more."),
        ({"seed": 2**63}, f"seed={2**63} is not allowed; write a whole number, 0 or more."),
        ({"seed": 2**63 - 1}, None),
        ({"ops": "x" * 78}, f"ops={'x' * 78!r} is not allowed; write a list of {{ name, value, trigger }}."),
        (
            {"ops": "x" * 79},
            f"ops='{'x' * 76}... is not allowed; write a list of {{ name, value, trigger }}.",
        ),
        ({"ops": ()}, None),
        ({"ops": [0] * 1001}, "ops has 1,001 entries; write at most 1,000."),
        ([0] * 1001, "the list has 1,001 ops; write at most 1,000."),
        ({"defaults": {"reevaluate": 1}}, "defaults.reevaluate=1 is not allowed; write true or false."),
        ({5: 1}, "unknown key 5; allowed: version, seed, defaults, ops."),
        (
            {"defaults": {5: 1}},
            "unknown key defaults.5; allowed: reevaluate, preserve, optimizer, lr, on_fail.",
        ),
        ({"a b": 1}, "unknown key 'a b'; allowed: version, seed, defaults, ops."),
        (
            {"defaults": {"a b": 1}},
            "unknown key defaults.'a b'; allowed: reevaluate, preserve, optimizer, lr, on_fail.",
        ),
        (
            "text",
            f"'text' {NOT_A_SCHEDULE}",
        ),
        ((), f"[] {NOT_A_SCHEDULE}"),
        ({"ops": [5]}, "ops[0]=5 is not an op; write { name, value, trigger }."),
    ],
)
def test_a_fault_of_the_schedule(data: Any, message: str | None) -> None:
    assert read(data)[1] == (
        [] if message is None else [(0 if message.startswith("ops[0]") else -1, message)]
    )


def test_the_largest_schedule_is_read() -> None:
    schedule, faults = read({"ops": [op("set_lr", 0.1)] * 1000 + []})
    assert not faults and len(schedule.ops) == 1000 and schedule.ops[999].id == "999-set_lr"
    entries = [{"name": "set_lr", "value": 0.1, "trigger_loss": 3, "max_wait_iters": 9}] * 1000
    assert read(entries)[1] == [] and len(read(entries)[0].ops) == 1000


def test_faults_of_the_schedule_do_not_affect_its_ops() -> None:
    schedule, faults = read(
        {"version": 3, "seed": -1, "defaults": 5, "x": 1, "ops": [op("set_lr", 0.1), 7, op("set_lr", 0.2)]}
    )
    assert (
        [o.value for o in schedule.ops] == [0.1, 0.2]
        and [o.place for o in schedule.ops] == [0, 2]
        and schedule.seed == 0
    )
    assert [place for place, _ in faults] == [-1, -1, -1, -1, 1]


@pytest.mark.parametrize("count", [10, 11, 13])
def test_only_ten_unknown_keys_are_listed(count: int) -> None:
    many = {f"k{i}": 1 for i in range(count)}
    whole = {"": many, "defaults": {"defaults": many}, "op": {"ops": [op("set_lr", 0.1, **many)]}}
    whole["table"] = {"ops": [op("widen_mlp", 128, optimizer=many)]}
    for where, data in whole.items():
        texts = faults_of(data)
        assert sum("unknown key" in text and "k9" in text for text in texts) == 1 and not any(
            "k10" in text for text in texts
        ), where
        assert len(texts) == (10 if count == 10 else 11), where
        assert count == 10 or texts[-1].endswith(f"and {count - 10} more unknown keys."), where


# -- faults of an op

TO_WRITE = "{ step = N } or { budget_frac = F } or { any = [{ loss_below = L }, { wait_iters = N }] }"
OP_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a name of 40 characters": (
        {"name": "x" * 40, "trigger": {"step": 1}},
        f"ops[0] {'x' * 40!r}: unknown op; allowed: set_lr, ",
    ),
    "a number as a name": ({"name": 3, "trigger": {"step": 1}}, "ops[0]: unknown op 3; allowed: set_lr, "),
    "a name of 41 characters": (
        {"name": "x" * 41, "trigger": {"step": 1}},
        "ops[0]: unknown op; allowed: set_lr, ",
    ),
    "no name": ({"value": 1, "trigger": {"step": 1}}, "ops[0]: the name is missing; write one of set_lr, "),
    "no value": (
        {"name": "widen_model", "trigger": {"step": 1}},
        "ops[0] 'widen_model': the value is missing; write value = { factor = 2 } or { d_model = N }.",
    ),
    "a value for an operation without one": (
        op("merge_lora_weights", 0),
        "ops[0] 'merge_lora_weights': value=0 is not allowed: this op takes no value; write null",
    ),
    "null for a number": (
        op("set_lr", None),
        "ops[0] 'set_lr': value=None is not allowed; write a finite number.",
    ),
    "infinite": (op("set_lr", math.inf), "ops[0] 'set_lr': value=inf is not allowed; write a finite number."),
    "too large": (
        op("set_lr", 1e300),
        "ops[0] 'set_lr': value=1e+300 is not allowed; write a finite number.",
    ),
    "a boolean for a size": (
        op("widen_mlp", True),
        "ops[0] 'widen_mlp': value=True is not allowed; write a whole number.",
    ),
    "a boolean for a layer": (
        op("freeze_layer", [True]),
        "ops[0] 'freeze_layer': value[0]=True is not allowed; write a layer, or a list of layers.",
    ),
    "only five wrong layers are shown": (
        op("stack_layers", list("abcdefg")),
        "ops[0] 'stack_layers': value[0]='a', value[1]='b', value[2]='c', value[3]='d', value[4]='e' is "
        "not allowed; write the source",
    ),
    "a table for a size": (
        op("widen_mlp", {"d_ff": 9}),
        "ops[0] 'widen_mlp': value={'d_ff': 9} is not allowed; write a whole number.",
    ),
    "two sizes": (
        op("widen_model", {"factor": 2, "d_model": 32}),
        "has both factor and d_model; write { factor = 2 } or { d_model = N }.",
    ),
    "no size": (
        op("widen_model", {}),
        "ops[0] 'widen_model': value={} has no size; write { factor = 2 } or { d_model = N }.",
    ),
    "no experts": (
        op("upcycle_moe", {}),
        "ops[0] 'upcycle_moe': value={} has no size; write { experts = 8, top_k = 2 }.",
    ),
    "a list in a table": (
        op("upcycle_moe", {"experts": [8]}),
        "value.experts=[8] is not allowed; write a whole number, 2 or more.",
    ),
    "init of an operation without it": (
        op("widen_model", 32, init="copy"),
        "ops[0] 'widen_model': only stack_layers and widen_mlp have the key init; remove the key.",
    ),
    "init of a training op": (
        op("set_lr", 0.1, init="copy"),
        "ops[0] 'set_lr': only ops that change the weights have the key init; remove the key.",
    ),
    "preserve of a training op": (
        op("set_lr", 0.1, preserve="none"),
        "ops[0] 'set_lr': only ops that change the weights have the key preserve",
    ),
    "lr of a training op": (
        op("set_lr", 0.1, lr={}),
        "ops[0] 'set_lr': only ops that change the weights have the key lr; remove the key.",
    ),
    "on_fail of a training op": (
        op("set_lr", 0.1, on_fail="skip"),
        "ops[0] 'set_lr': only ops that change the weights have the key on_fail",
    ),
    "a blank id": (op("set_lr", 0.1, id="  "), "ops[0] 'set_lr': id='  ' is not allowed; write a string."),
    "a number as an id": (op("set_lr", 0.1, id=3), "ops[0] 'set_lr': id=3 is not allowed; write a string."),
    "a number as a description": (
        op("set_lr", 0.1, desc=3),
        "ops[0] 'set_lr': desc=3 is not allowed; write a string.",
    ),
    "reevaluate as text": (
        op("set_lr", 0.1, reevaluate="yes"),
        "ops[0] 'set_lr': reevaluate='yes' is not allowed; write true or false.",
    ),
    "a misspelt init": (
        op("widen_mlp", 128, init="copi"),
        "init='copi' is not allowed (did you mean 'copy'?); write copy or identity.",
    ),
    "a number as init": (
        op("widen_mlp", 128, init=1),
        "ops[0] 'widen_mlp': init=1 is not allowed; write copy or identity.",
    ),
    "a number as optimizer": (
        op("widen_mlp", 128, optimizer=1),
        "optimizer=1 is not allowed; write a table of mode, min_coverage.",
    ),
    "an unknown optimizer mode": (
        op("widen_mlp", 128, optimizer="rest"),
        "optimizer.mode='rest' is not allowed (did you mean 'reset'?); write auto",
    ),
    "a text as lr": (
        op("widen_mlp", 128, lr="slow"),
        "lr='slow' is not allowed; write a table of rewarm_iters, new_params_peak, width_rule.",
    ),
    "no trigger": (
        {"name": "set_lr", "value": 0.1},
        f"ops[0] 'set_lr': the trigger is missing; write trigger = {TO_WRITE}.",
    ),
    "a trigger that is a list": (
        op("set_lr", 0.1, [5]),
        f"ops[0] 'set_lr': trigger=[5] is not allowed; write {TO_WRITE}.",
    ),
    "two conditions": (
        op("set_lr", 0.1, {"step": 1, "tokens": 2}),
        "trigger must have exactly one condition, got step and tokens; write { step = N }",
    ),
    "any next to another condition": (
        op("set_lr", 0.1, {"any": [{"step": 1}], "step": 2}),
        "write any = [...] as the only key, with one condition in each table.",
    ),
    "an empty any": (
        op("set_lr", 0.1, {"any": []}),
        "trigger={'any': []} is not allowed; write any = [...] as the only key",
    ),
    "any as a table": (
        op("set_lr", 0.1, {"any": {"step": 1}}),
        "trigger={'any': {'step': 1}} is not allowed; write any = [...] as the only key",
    ),
    "any of numbers": (
        op("set_lr", 0.1, {"any": [1]}),
        "trigger={'any': [1]} is not allowed; write any = [...] as the only key",
    ),
    "any with two conditions in one table": (
        op("set_lr", 0.1, {"any": [{"step": 1}, {"step": 2, "tokens": 3}]}),
        "write any = [...] as the only key",
    ),
    "any as a number": (
        op("set_lr", 0.1, {"any": 5}),
        "trigger={'any': 5} is not allowed; write any = [...] as the only key",
    ),
    "any with two repeated conditions": (
        op("set_lr", 0.1, {"any": [{"tokens": 1}, {"step": 2}, {"tokens": 3}, {"step": 4}]}),
        "trigger.any has the condition step twice; keep the one that is met first.",
    ),
    "any with a repeated condition": (
        op("set_lr", 0.1, {"any": [{"step": 1}, {"tokens": 2}, {"step": 3}]}),
        "trigger.any has the condition step twice; keep the one that",
    ),
    "an unknown condition": (
        op("set_lr", 0.1, {"stop": 1}),
        "unknown key trigger.stop (did you mean 'step'?); allowed: loss_below, wait_iters, ",
    ),
    "any with an unknown condition": (
        op("set_lr", 0.1, {"any": [{"stop": 1}]}),
        "unknown key trigger.stop (did you mean 'step'?)",
    ),
    "keys of the list format": (
        op("set_lr", 0.1, max_wait_iters=5),
        "'max_wait_iters' is a key of the list format; write a trigger.",
    ),
}


@pytest.mark.parametrize(("entry", "message"), OP_FAULTS.values(), ids=OP_FAULTS)
def test_a_fault_of_an_op(entry: dict[str, Any], message: str) -> None:
    schedule, faults = read({"ops": [entry]})
    assert schedule.ops == () and len(faults) == 1 and faults[0][0] == 0
    assert message in faults[0][1] and faults[0][1].endswith(".") and not faults[0][1].endswith("..")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"trigger_loss": 3},
            ["max_wait_iters is missing; write max_wait_iters = a whole number, 0 or more."],
        ),
        ({"max_wait_iters": 3}, ["trigger_loss is missing; write trigger_loss = a finite number."]),
        (
            {"trigger_loss": math.inf, "max_wait_iters": 0},
            ["trigger_loss=inf is not allowed; write a finite number."],
        ),
        (
            {"trigger_loss": 3, "max_wait_iters": -1},
            ["max_wait_iters=-1 is not allowed; write a whole number, 0 or more."],
        ),
        ({"trigger_loss": 3, "max_wait_iters": 0}, []),
        ({"trigger_loss": 3, "max_wait_iters": 0, "desc": ""}, []),
        (
            {"trigger_loss": 3, "max_wait_iters": 0, "id": "a"},
            ["'id' is a key of version 2; write { version = 2, ops = [...] } around the list."],
        ),
        (
            {"trigger_loss": 3, "max_wait_iters": 0, "reevaluate": 0},
            ["reevaluate=0 is not allowed; write true or false."],
        ),
    ],
)
def test_an_entry_of_the_list_format(entry: dict[str, Any], message: list[str]) -> None:
    schedule, faults = read([{"name": "set_lr", "value": 0.1} | entry])
    assert [text for _, text in faults] == [f"ops[0] 'set_lr': {text}" for text in message]
    assert len(schedule.ops) == (not message)
    if not message:
        assert schedule.ops[0].trigger == Trigger(loss_below=3.0, wait_iters=0)


def test_ids_must_be_unique() -> None:
    ops = [
        op("set_lr", 0.1, id="a"),
        op("set_lr", 0.2),
        op("set_lr", 0.3, id="a"),
        op("set_lr", 0.4, id="1-set_lr"),
    ]
    schedule, faults = read({"ops": ops})
    assert [o.id for o in schedule.ops] == ["a", "1-set_lr"]
    assert [text for _, text in faults] == [
        "ops[2] 'set_lr': id='a' is already used by ops[0]; give each op a different id.",
        "ops[3] 'set_lr': id='1-set_lr' is already used by ops[1]; give each op a different id.",
    ]


def test_a_faulty_op_does_not_reserve_its_id() -> None:
    ops = [
        op("set_lr", 0.1, id="a"),
        op("set_lr", "x", id="a"),
        op("set_lr", "x", id="b"),
        op("set_lr", 0.2, id="b"),
    ]
    schedule, faults = read({"ops": ops})
    assert [o.id for o in schedule.ops] == ["a", "b"]
    assert [text for _, text in faults] == [
        f"ops[{i}] 'set_lr': value='x' is not allowed; write a finite number." for i in (1, 2)
    ]


# -- limits of the model

MODEL: dict[
    str, tuple[dict[str, Any], str, Any, dict[str, Any], str]
] = {  # start, name, value, allowed, message
    "half a factor": (
        {},
        "stack_layers",
        2.5,
        {},
        "value=2.5 is not a list of layers; at this point the model has 2 layers",
    ),
    "out of one layer": (
        {"n_layer": 1},
        "stack_layers",
        [1],
        {"value": [0]},
        "layers out of range: value[0]=1; at this point the model has 1 layer. Use 0.",
    ),
    "an old triple": (
        {},
        "stack_layers",
        3,
        {},
        'value 3 is the old "triple" form; the model has 2 layers, so write [0,1,0,1,0,1]',
    ),
    "as many layers as 1,024": (
        {},
        "stack_layers",
        513,
        {},
        "value=513 is not a list of layers; at this point the model has 2 layers",
    ),
    "an old factor of 512": (
        {},
        "stack_layers",
        512,
        {},
        'value 512 is the old "512-fold" form; the model has 2 layers, so write [0,1,0,1,',
    ),
    "an old double of one layer": (
        {"n_layer": 1},
        "stack_layers",
        2,
        {},
        'value 2 is the old "double" form; the model has 1 layer, so write [0,0]',
    ),
    "one is no factor of one layer": (
        {"n_layer": 1},
        "stack_layers",
        1,
        {},
        "value=1 is not a list of layers; at this point the model has 1 layer",
    ),
    "a factor of 1 of two layers": (
        {},
        "stack_layers",
        1,
        {},
        'value 1 is the old "1-fold" form; the model has 2 layers, so write [0,1]',
    ),
    "a layer that is the last but one": (
        {},
        "stack_layers",
        [0, 1, 2],
        {"value": [0, 1, 1]},
        "layers out of range: value[2]=2; at this point the model has 2 layers. Use 0..1",
    ),
    "a layer below 0": (
        {},
        "stack_layers",
        [-1],
        {"value": [0]},
        "layers out of range: value[0]=-1; at this point the model has 2 layers. Use 0..1",
    ),
    "five layers of six": (
        {},
        "stack_layers",
        [9] * 6,
        {},
        "layers out of range: value[0]=9, value[1]=9, value[2]=9, value[3]=9, value[4]=9",
    ),
    "the same hidden width": (
        {},
        "widen_mlp",
        64,
        {"value": 65},
        "value 64 is not above the current hidden width 64; give an integer above 64",
    ),
    "an old hidden factor": (
        {},
        "widen_mlp",
        1.5,
        {},
        "value 1.5 is in the old relative form; hidden width is 64, so write 96",
    ),
    "an old width factor": (
        {},
        "widen_model",
        1.5,
        {},
        "value 1.5 is in the old relative form; the width is 16, so write 24",
    ),
    "no multiple": (
        {},
        "widen_model",
        33,
        {"value": 32},
        "d_model=33 is not a multiple of the current width 16; give 32, 48, ...",
    ),
    "no whole factor": (
        {},
        "widen_model",
        {"factor": 2.5},
        {"value": {"factor": 2}},
        "factor=2.5 is not a whole number; give 2, 3, ... for the width 16",
    ),
    "the same width": (
        {},
        "widen_model",
        16,
        {"value": 48},
        "d_model=16 is not above the current width 16; give 32, 48, ...",
    ),
    "as many heads": (
        {},
        "add_heads",
        2,
        {"value": 3},
        "value 2 is not above the current n_head 2; give an integer above 2",
    ),
    "heads that do not share": (
        {"n_head": 4, "n_kv_head": 2},
        "add_heads",
        7,
        {"value": 8},
        "7 heads cannot share 2 key/value heads evenly; give a multiple, such as 8",
    ),
    "experts again": (
        {"experts": 4},
        "upcycle_moe",
        {"experts": 8},
        {},
        "the model already has 4 experts; remove this op, because only a dense model can be upcycled",
    ),
    "a number of experts": (
        {},
        "upcycle_moe",
        8,
        {"value": {"experts": 8}},
        "value=8 is not allowed; write { experts = 8, top_k = 2 }",
    ),
    "more than all experts": (
        {},
        "upcycle_moe",
        {"experts": 4, "top_k": 5},
        {"value": {"experts": 4, "top_k": 4}},
        "top_k=5 is larger than experts=4; use 1..4",
    ),
    "shards of the hidden width": (
        {"d_ff": 62},
        "upcycle_moe",
        {"experts": 8, "top_k": 4, "shards": 4},
        {"value": {"experts": 8, "top_k": 4, "shards": 2}},
        "shards=4 does not divide hidden=62; use a common divisor of hidden, experts and top_k",
    ),
    "shards of the experts": (
        {},
        "upcycle_moe",
        {"experts": 6, "top_k": 4, "shards": 4},
        {"value": {"experts": 8, "top_k": 4, "shards": 4}},
        "shards=4 does not divide experts=6; use a common divisor of hidden, experts and top_k",
    ),
    "shards of the chosen": (
        {},
        "upcycle_moe",
        {"experts": 8, "top_k": 2, "shards": 4},
        {"value": {"experts": 8, "top_k": 2, "shards": 2}},
        "shards=4 does not divide top_k=2; use a common divisor of hidden, experts and top_k",
    ),
    "one renormalised weight": (
        {},
        "upcycle_moe",
        {"experts": 4, "top_k": 1},
        {"value": {"experts": 4, "top_k": 1, "router_weights": "softmax"}},
        "top_k=1 with renormalised weights gives the router no gradient; "
        "use top_k=2, or router_weights=softmax",
    ),
    "a zero router that locks": (
        {},
        "upcycle_moe",
        {"experts": 4, "router": "zero"},
        {"optimizer": "asymmetric"},
        "router=zero would always choose the same experts, because all experts get equal scores; "
        "use router=random, or make the experts differ with noise_snr_db or",
    ),
    "a zero router with keep": (
        {},
        "upcycle_moe",
        {"experts": 4, "router": "zero", "noise_snr_db": 9},
        {},
        "",
    ),
    "a zero router with a spread": (
        {},
        "upcycle_moe",
        {"experts": 4, "router": "zero", "router_std": 0.5, "noise_snr_db": 9},
        {},
        "router_std=0.5 has no effect with router=zero; remove router_std, or use router=random",
    ),
    "noise with a random router": (
        {},
        "upcycle_moe",
        {"experts": 4, "noise_snr_db": 9},
        {"value": {"experts": 4}},
        "noise_snr_db changes the output of a model with router=random",
    ),
    "rank 0": (
        {},
        "set_attn_lora_rank",
        0,
        {"value": 1},
        "value=0 is not allowed; give a rank of at least 1",
    ),
    "rank -1, with a rank": (
        {"attn_lora_rank": 2},
        "set_attn_lora_rank",
        -1,
        {"value": 1},
        "value=-1 is not allowed; "
        "give a rank of at least 1, or remove the low-rank weights with merge_lora_weights",
    ),
    "an old rank factor": (
        {"embed_lora_rank": 4},
        "set_embedding_lora_rank",
        1.5,
        {},
        "value 1.5 is in the old relative form; the rank is 4, so write 6",
    ),
    "an old rank factor of none": (
        {},
        "set_attn_lora_rank",
        1.5,
        {},
        "value 1.5 is in the old relative form; the rank is 0, so write a rank such as 8",
    ),
    "nothing to merge": (
        {},
        "merge_lora_weights",
        None,
        {},
        "there are no low-rank weights to merge; "
        "move this op after an op that sets a rank, or remove this op",
    ),
    "a layer to freeze that does not exist": (
        {},
        "freeze_layer",
        2,
        {"value": 1},
        "layer 2 is out of range; at this point the model has 2 layers. Use 0..1",
    ),
    "a layer below 0 to freeze": (
        {},
        "freeze_layer",
        [0, -1],
        {"value": [0]},
        "layer -1 is out of range; at this point the model has 2 layers. Use 0..1",
    ),
    "no layer to freeze": (
        {},
        "freeze_layer",
        [],
        {},
        "value=[] is not a layer; give a layer of 0..1, or a list of layers",
    ),
    "half a layer": (
        {},
        "freeze_layer",
        0.5,
        {},
        "value=0.5 is not a layer; give a layer of 0..1, or a list of layers",
    ),
    "frozen already": (
        {"frozen": [0, 1]},
        "freeze_layer",
        1,
        {},
        "layer 1 is already frozen; frozen layers at this point: 0, 1. Remove it from the op",
    ),
    "not frozen": (
        {},
        "unfreeze_layer",
        1,
        {},
        "layer 1 is not frozen; frozen layers at this point: none. Remove it from the op",
    ),
    "as many ids": (
        {"unused_ids": 5},
        "resize_vocabulary",
        305,
        {"value": 306},
        "value 305 is not above the current vocabulary size 305; give an integer above 305",
    ),
    "an old factor of the ids": (
        {},
        "resize_vocabulary",
        1.5,
        {},
        "value 1.5 is in the old relative form; vocabulary size is 300, so write 450",
    ),
    "no evaluations to set": (
        {},
        "set_eval_iters",
        200,
        {},
        "every evaluation scores each token of val exactly once, so its length cannot be set; remove the op",
    ),
    "an old factor of the rate": (
        {},
        "change_lr",
        1.234567891,
        {},
        'this op has the old relative form; lr is 0.01, so write "set_lr" and the value 0.0123457',
    ),
    "an old factor of the batch": (
        {},
        "change_batch_size",
        1.3,
        {},
        'this op has the old relative form; batch_size is 2, so write "set_batch_size" and the value 3',
    ),
}


@pytest.mark.parametrize(("start", "name", "value", "instead", "message"), MODEL.values(), ids=MODEL)
def test_a_value_that_does_not_fit_the_model(
    start: dict[str, Any], name: str, value: Any, instead: dict[str, Any], message: str
) -> None:
    cfg = config(**start)
    phases, faults = walk(cfg, [one(name, value)])
    if message:
        assert phases == [] and len(faults) == 1 and faults[0][1].startswith(f"ops[0] {name!r}: {message}"), (
            faults
        )
    else:
        assert len(phases) == 1 and not faults
    if instead:
        assert walk(cfg, [one(**{"name": name, "value": value} | instead)])[1] == []


BEFORE: dict[str, tuple[dict[str, Any], list[tuple[str, Any]], str]] = {
    "layers": (
        {},
        [("stack_layers", [0, 0, 1]), ("stack_layers", [3])],
        "at this point the model has 3 layers (after ops[0])",
    ),
    "frozen layers": (
        {},
        [("stack_layers", [0, 0, 1]), ("freeze_layer", 3)],
        "at this point the model has 3 layers (after ops[0]). Use 0..2",
    ),
    "hidden": (
        {},
        [("widen_mlp", 128), ("widen_mlp", 128)],
        "value 128 is not above the current hidden width 128 (set by ops[0]); give an integer above 128",
    ),
    "hidden, old": (
        {},
        [("widen_mlp", 128), ("widen_mlp", 2.0)],
        "hidden width is 128 (set by ops[0]), so write 256",
    ),
    "width": (
        {},
        [("widen_model", 32), ("widen_model", 32)],
        "d_model=32 is not above the current width 32 (set by ops[0]); give 64, 96, ...",
    ),
    "width, old": (
        {},
        [("widen_model", 32), ("widen_model", 2.0)],
        "the width is 32 (set by ops[0]), so write 64",
    ),
    "width, no multiple": (
        {},
        [("widen_model", 32), ("widen_model", 48)],
        "not a multiple of the current width 32 (set by ops[0]); give 64, 96, ...",
    ),
    "width, factor": (
        {},
        [("widen_model", 32), ("widen_model", {"factor": 1.5})],
        "give 2, 3, ... for the width 32 (set by ops[0])",
    ),
    "heads": (
        {},
        [("add_heads", 4), ("add_heads", 3)],
        "value 3 is not above the current n_head 4 (set by ops[0]); give an integer above 4",
    ),
    "experts": (
        {},
        [("upcycle_moe", {"experts": 4}), ("upcycle_moe", {"experts": 4})],
        "the model already has 4 experts (set by ops[0])",
    ),
    "rank": (
        {},
        [("set_attn_lora_rank", 4), ("set_attn_lora_rank", 2.0)],
        "the rank is 4 (set by ops[0]), so write 8",
    ),
    "merge": (
        {"attn_lora_rank": 2},
        [("merge_lora_weights", None)] * 2,
        "there are no low-rank weights to merge (after ops[0]); move this op after",
    ),
    "frozen": (
        {},
        [("freeze_layer", 1), ("freeze_layer", 1)],
        "frozen layers at this point: 1 (after ops[0]). Remove it from the op",
    ),
    "ids": (
        {},
        [("resize_vocabulary", 310), ("resize_vocabulary", 305)],
        "value 305 is not above the current vocabulary size 310 (set by ops[0]); give an integer above 310",
    ),
    "rate": (
        {},
        [("set_lr", 0.5), ("change_lr", 0.5)],
        'lr is 0.5 (set by ops[0]), so write "set_lr" and the value 0.25',
    ),
    "the last op that set it": (
        {},
        [("widen_mlp", 128), ("set_lr", 0.1), ("widen_mlp", 256), ("widen_mlp", 9)],
        "256 (set by ops[2])",
    ),
    "an op without an effect is not named": (
        {},
        [("set_lr", 0.01), ("change_lr", 0.5)],
        'lr is 0.01, so write "set_lr"',
    ),
}


@pytest.mark.parametrize(("start", "ops", "message"), BEFORE.values(), ids=BEFORE)
def test_a_message_names_the_op_that_set_the_conflicting_field(
    start: dict[str, Any], ops: list[tuple[str, Any]], message: str
) -> None:
    schedule, wrong = read({"ops": [op(*entry) for entry in ops]})
    assert not wrong
    phases, faults = walk(config(**start), schedule.ops)
    assert (
        len(faults) == 1
        and len(phases) == len(ops) - 1
        and message in faults[0][1]
        and faults[0][0] == len(ops) - 1
    )


PRESERVE: dict[str, tuple[dict[str, Any], tuple[str, Any], dict[str, Any], str, str]] = {
    "shards and noise": (
        {},
        ("upcycle_moe", {"experts": 4, "shards": 2, "noise_snr_db": 9, "router": "zero"}),
        {},
        "bitexact",
        "with shards=2; use no shards, or preserve=exact",
    ),
    "a map that drops": (
        {},
        ("stack_layers", [1]),
        {},
        "approx",
        "with a map that drops or reorders layers; "
        "use each of 0..1, the first copies in order, with init=identity, or preserve=none",
    ),
    "copies": (
        {},
        ("stack_layers", [0, 1, 1]),
        {},
        "approx",
        "with init=copy; use init=identity, or preserve=none",
    ),
    "hidden": (
        {},
        ("widen_mlp", 65),
        {},
        "bitexact",
        "for widen_mlp, which is exact up to rounding; use preserve=exact",
    ),
    "a rank that is cut": (
        {"attn_lora_rank": 4},
        ("set_attn_lora_rank", 3),
        {},
        "exact",
        "with a rank cut from 4 to 3; use 4 or more, or preserve=approx",
    ),
    "the rank that it has": (
        {"attn_lora_rank": 4},
        ("set_attn_lora_rank", 4),
        {},
        "bitexact",
        "for set_attn_lora_rank, which is exact up to rounding",
    ),
    "softmax weights": (
        {},
        ("upcycle_moe", {"experts": 4, "router_weights": "softmax"}),
        {},
        "exact",
        "with softmax weights, which are not renormalised; "
        "use router_weights=renormalised, or preserve=approx",
    ),
    "three experts": (
        {},
        ("upcycle_moe", {"experts": 4, "top_k": 3, "router": "zero"}),
        {"optimizer": "asymmetric"},
        "bitexact",
        "with top_k=3; use 1, 2 or 4, or preserve=exact",
    ),
    "a random router": (
        {},
        ("upcycle_moe", {"experts": 4}),
        {},
        "bitexact",
        "with router=random; use router=zero, or preserve=exact",
    ),
    "shards": (
        {},
        ("upcycle_moe", {"experts": 4, "shards": 2, "router": "zero"}),
        {"optimizer": "asymmetric"},
        "bitexact",
        "with shards=2; use no shards, or preserve=exact",
    ),
    "noise": (
        {},
        ("upcycle_moe", {"experts": 4, "noise_snr_db": 12.5, "router": "zero"}),
        {},
        "bitexact",
        "with noise_snr_db=12.5; use no noise_snr_db, or preserve=exact",
    ),
}


@pytest.mark.parametrize(("start", "what", "more", "preserve", "message"), PRESERVE.values(), ids=PRESERVE)
def test_why_a_guarantee_is_impossible(
    start: dict[str, Any], what: tuple[str, Any], more: dict[str, Any], preserve: str, message: str
) -> None:
    with pytest.raises(ValueError) as e:
        after(one(*what, preserve=preserve, **more), config(**start))
    assert str(e.value).startswith(f"preserve={preserve} is impossible {message}")


@pytest.mark.parametrize(
    ("start", "what", "more", "strongest"),
    [
        (
            {"router_weights": "softmax"},
            ("upcycle_moe", {"experts": 4, "router": "zero", "top_k": 1}),
            {"optimizer": "asymmetric"},
            "exact",
        ),
        (
            {},
            ("upcycle_moe", {"experts": 4, "top_k": 4, "router": "zero"}),
            {"optimizer": "asymmetric"},
            "bitexact",
        ),
        ({}, ("upcycle_moe", {"experts": 8, "top_k": 5}), {}, "exact"),
        ({}, ("upcycle_moe", {"experts": 4, "router": "zero", "noise_snr_db": 1}), {}, "bitexact"),
        ({}, ("stack_layers", [0, 1]), {"init": "copy"}, "bitexact"),
        ({}, ("stack_layers", [0, 1, 1, 0]), {"init": "identity"}, "bitexact"),
        ({}, ("stack_layers", [1, 0]), {"init": "identity"}, "none"),
    ],
)
def test_the_default_guarantee_of_an_op(
    start: dict[str, Any], what: tuple[str, Any], more: dict[str, Any], strongest: str
) -> None:
    phases, faults = walk(config(**start), [one(*what, **more)])
    assert not faults and phases[0].op.preserve == strongest


# -- files and inline text


def test_a_file_may_have_the_schedule_under_the_key_growth(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[growth]\nseed = 3\n")
    assert from_text(str(tmp_path / "a.toml")) == {"seed": 3}
    (tmp_path / "b.json").write_text('{"growth": 1, "seed": 3}')
    assert from_text(str(tmp_path / "b.json")) == {"growth": 1, "seed": 3}
    (tmp_path / "c.json").write_text('[{"name": "set_lr"}]')
    assert from_text(str(tmp_path / "c.json")) == [{"name": "set_lr"}]
    assert (
        from_text(' {"seed": 3}') == {"seed": 3}
        and from_text("[]") == []
        and from_text("seed: 3\n") == {"seed": 3}
    )
    assert from_text("{seed: 3}") == {"seed": 3} and from_text("[{name: set_lr}]") == [{"name": "set_lr"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.toml", "= 3", "not valid TOML"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yml", "a: [", "not valid YAML"),
        ("a.json", None, "the file cannot be read"),
        ("a.txt", "{}", "give a file ending in .json"),
        ("a", "{}", "give a file ending in .json"),
    ],
)
def test_an_unusable_schedule_file_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as e:
        from_text(str(tmp_path / name))
    assert message in str(e.value) and str(tmp_path / name) in str(e.value)


@pytest.mark.parametrize("text", ["{ops: [}", "[1,", "a: [\n"])
def test_a_malformed_inline_schedule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is neither TOML, JSON nor YAML"):
        from_text(text)


def test_a_long_text_is_shortened_in_the_message() -> None:
    for count, whole in ((200, True), (201, False)):
        text = "{" + "x" * (count - 1)
        with pytest.raises(ConfigError) as e:
            from_text(text)
        assert (
            (text in str(e.value)) is whole
            and "write { ops = [{ name, value, trigger }, ...] }, or give the name of a schedule file"
            in str(e.value)
        )
    for count, whole in ((120, True), (121, False)):
        text = "x" * count
        with pytest.raises(ConfigError) as e:
            from_text(text)
        assert (
            text in str(e.value)
        ) is whole and "is not a schedule; give a file ending in .json, .yaml, .yml or .toml" in str(e.value)
