"""Test both formats of growth schedules, when ops fire, and how ops change a config and a plan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError
from mainrun.plan.op_files import read
from mainrun.plan.ops import ARCHITECTURE, NAMES, TRAINING, Op, Schedule, after, walk
from mainrun.plan.plan import Plan
from mainrun.plan.triggers import Facts, Trigger, due
from mainrun.store import lineage

# The specification gives this example of the original format.
LIST = """
[{"name": "set_lr", "desc": "start", "value": 6e-4,
  "trigger_loss": 100.0, "max_wait_iters": 1, "reevaluate": false},
 {"name": "stack_layers", "desc": "2 -> 4", "value": [0, 0, 1, 1],
  "trigger_loss": 3.5, "max_wait_iters": 500, "reevaluate": true},
 {"name": "widen_mlp", "value": 128, "trigger_loss": 3.2, "max_wait_iters": 500, "reevaluate": true},
 {"name": "set_attn_lora_rank", "value": 8, "trigger_loss": 2.8, "max_wait_iters": 1000, "reevaluate": true},
 {"name": "stack_layers", "desc": "drop layer 0", "value": [1, 1, 2, 3],
  "trigger_loss": 2.5, "max_wait_iters": 1000, "reevaluate": true}]
"""
SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "d_model": 16,
    "block_size": 4,
    "batch_size": 2,
    "vocab_size": 300,
    "epochs": 2,
    "lr": 0.5,
}


def config(**changes: Any) -> TrainConfig:
    return from_dict(SMALL | changes)


def good(data: Any) -> Schedule:
    schedule, faults = read(data)
    assert not faults, faults
    return schedule


def op(name: str, value: Any = None, trigger: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": trigger or {"step": 5}} | more


def one(name: str, value: Any = None, trigger: Any = None, **more: Any) -> Op:
    (only,) = good({"ops": [op(name, value, trigger, **more)]}).ops
    return only


# -- both formats


def test_the_example_of_the_original_format() -> None:
    cfg = config(d_ff=64, growth=json.loads(LIST))
    shapes = [(p.lr, p.n_layer, p.ff_width, p.attn_lora_rank) for p in cfg.segment_configs]
    assert shapes == [
        (0.5, 2, 64, 0),
        (6e-4, 2, 64, 0),
        (6e-4, 4, 64, 0),
        (6e-4, 4, 128, 0),
        (6e-4, 4, 128, 8),
        (6e-4, 4, 128, 8),
    ]
    first, stack, *_, drop = cfg.growth.ops
    assert (first.desc, first.reevaluate, first.trigger) == (
        "start",
        False,
        Trigger(loss_below=100.0, wait_iters=1),
    )
    assert (stack.value, stack.reevaluate, stack.init, stack.on_fail) == ((0, 0, 1, 1), True, "copy", "abort")
    assert drop.value == (1, 1, 2, 3)


def test_both_formats_give_the_same_schedule() -> None:
    entries = json.loads(LIST)
    version2 = [
        {k: v for k, v in entry.items() if k not in ("trigger_loss", "max_wait_iters")}
        | {
            "trigger": {
                "any": [{"wait_iters": entry["max_wait_iters"]}, {"loss_below": entry["trigger_loss"]}]
            }
        }
        for entry in entries
    ]
    a, b = config(d_ff=64, growth=entries), config(d_ff=64, growth={"version": 2, "ops": version2})
    assert a == b and a.digest == b.digest and hash(a.growth) == hash(b.growth)
    assert good(json.loads(str(a.growth))) == a.growth


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".toml"])
def test_a_file_in_the_original_format_is_read_and_never_written(tmp_path: Path, suffix: str) -> None:
    from mainrun.plan.recipes import load

    path = tmp_path / f"mine{suffix}"
    entries = json.loads(LIST)
    if suffix == ".toml":
        lines = [
            f"{k} = {json.dumps(v)}" if k != "name" else f'[[growth]]\nname = "{v}"'
            for entry in entries
            for k, v in entry.items()
        ]
        path.write_text("\n".join(lines))
    elif suffix == ".json":
        path.write_text(LIST)
    else:
        path.write_text(
            "".join(f"- {{{', '.join(f'{k}: {v!r}' for k, v in e.items())}}}\n" for e in entries).replace(
                "0.0006", "6e-4"
            )
        )
    before = path.read_bytes()
    path.chmod(0o400)
    (cfg,) = load("baseline", [f"growth={path}", "n_layer=2", "d_ff=64"])
    assert cfg.growth == good(entries)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("twice.json", b'[{"name": "set_lr", "value": 0.1, "value": 0.2}]', "the key 'value' appears twice"),
        ("twice.yaml", b"ops:\n- {name: set_lr, value: 0.1}\nops: []\n", "the key 'ops' appears twice"),
        ("deep.json", b"[" * 100_000, "it is nested too deep"),
        ("deep.yaml", b"[" * 3_000, "it is nested too deep"),
        ("wide.json", '[{"name": "set_lr"}]'.encode("utf-16"), "save the file as UTF-8"),
    ],
)
def test_ambiguous_files_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    from mainrun.plan.op_files import from_text

    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        from_text(str(tmp_path / name))


def test_a_byte_order_mark_and_an_uppercase_suffix_are_allowed(tmp_path: Path) -> None:
    from mainrun.plan.op_files import from_text

    (tmp_path / "UP.JSON").write_bytes(b'\xef\xbb\xbf{"ops": []}')
    assert from_text(str(tmp_path / "UP.JSON")) == {"ops": []}


def test_yaml_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    """PyYAML implements YAML 1.1, which reads 6e-4 as a string."""
    from mainrun.plan.op_files import from_text

    for text, value in (
        ("6e-4", 6e-4),
        ("1.5E+3", 1500.0),
        ("2e8", 2e8),
        ("-1e2", -100.0),
        ("7", 7),
        ("abc", "abc"),
        ("1e", "1e"),
    ):
        assert from_text(f"ops:\n- value: {text}\n") == {"ops": [{"value": value}]}


# -- round trips


def _conditions() -> st.SearchStrategy[dict[str, Any]]:
    share = st.floats(0, 1, exclude_min=True, exclude_max=True)
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "loss_below": st.floats(0, 100, exclude_min=True),
        "wait_iters": st.integers(0, 10**6),
        "step": st.integers(1, 10**6),
        "tokens": st.integers(1, 10**12),
        "budget_frac": share,
        "plateau": st.fixed_dictionaries({"evals": st.integers(1, 9), "rel": share}),
    }
    some = st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=6, unique=True)
    each = some.flatmap(lambda names: st.tuples(*(st.tuples(st.just(n), kinds[n]) for n in names)))
    return each.map(lambda pairs: dict(pairs[:1]) if len(pairs) == 1 else {"any": [{k: v} for k, v in pairs]})


def _ops() -> st.SearchStrategy[dict[str, Any]]:
    number = st.one_of(st.integers(-5, 500), st.floats(-10, 1000))
    maps = st.lists(st.integers(-1, 6), max_size=6)
    values: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(TRAINING, number) | dict.fromkeys(
        ARCHITECTURE, st.integers(1, 64)
    )
    values |= {"stack_layers": maps, "freeze_layer": maps, "unfreeze_layer": maps}
    values |= dict.fromkeys(("reset_lr_schedule", "merge_lora_weights"), st.none())
    values["widen_model"] = st.one_of(
        st.integers(2, 64),
        st.fixed_dictionaries(
            {"factor": st.integers(2, 4)}, optional={"kv": st.sampled_from(["scale", "keep"])}
        ),
    )
    sizes = {"experts": st.integers(2, 8)}
    values["upcycle_moe"] = st.fixed_dictionaries(
        sizes, optional={"top_k": st.integers(1, 4), "noise_snr_db": st.floats(1, 20)}
    )
    general = {"desc": st.text(max_size=5), "reevaluate": st.booleans()}
    weights = {
        "preserve": st.sampled_from(["none", "approx", "exact", "bitexact"]),
        "on_fail": st.sampled_from(["abort", "skip"]),
        "optimizer": st.one_of(st.just("keep"), st.fixed_dictionaries({"min_coverage": st.floats(0, 1)})),
        "lr": st.fixed_dictionaries(
            {"rewarm_iters": st.integers(0, 500)}, optional={"width_rule": st.just("adam_1_over_n")}
        ),
    }
    return st.one_of(
        st.fixed_dictionaries(
            {"name": st.just(n), "value": values[n], "trigger": _conditions()},
            optional=general
            | (weights if n in ARCHITECTURE else {})
            | ({"init": st.just("identity")} if n == "stack_layers" else {}),
        )
        for n in NAMES
    )


def _schedules() -> st.SearchStrategy[dict[str, Any]]:
    defaults = st.fixed_dictionaries(
        {}, optional={"on_fail": st.just("skip"), "optimizer": st.sampled_from(["auto", "reset"])}
    )
    return st.fixed_dictionaries(
        {"ops": st.lists(_ops(), max_size=4)}, optional={"seed": st.integers(0, 9), "defaults": defaults}
    )


@given(_schedules())
def test_a_schedule_survives_a_round_trip(data: dict[str, Any]) -> None:
    schedule = good(data)
    text = str(schedule)
    assert read(json.loads(text)) == (schedule, [])
    assert str(read(json.loads(text))[0]) == text
    assert [o.name for o in schedule.ops] == [entry["name"] for entry in data["ops"]]


@given(_schedules(), st.integers(1, 6))
def test_a_config_keeps_a_schedule_that_it_accepts(data: dict[str, Any], n_layer: int) -> None:
    """If the config refuses a schedule, the message has one fault per line."""
    try:
        cfg, refused = config(n_layer=n_layer, growth=data), ""
    except ConfigError as e:
        refused = str(e)
    if refused:
        assert all(line.startswith("growth: ops[") and line.endswith(".") for line in refused.splitlines()), (
            refused
        )
        return
    assert from_dict(json.loads(json.dumps(cfg.model_dump()))) == cfg
    phases, faults = walk(cfg, cfg.growth.ops)
    assert not faults and (cfg, *(p.cfg for p in phases)) == cfg.segment_configs
    for phase, before in zip(phases, cfg.segment_configs, strict=False):
        assert phase.cfg == after(phase.op, before) and not phase.cfg.growth.ops, (
            "an op whose guarantee `walk` has settled gives the same config by itself"
        )
        assert (phase.op.preserve != "") == (phase.op.name in ARCHITECTURE)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
        st.sampled_from([*NAMES, "change_lr"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.sampled_from(["ops", "name", "value", "trigger", "any", "step", "plateau",
                "defaults"]), st.text(max_size=3)),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)  # fmt: skip


@given(
    st.one_of(
        json_values,
        st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(NAMES), "value": json_values, "trigger": json_values}
            )
        ),
    )
)
def test_any_data_is_read_or_refused(data: Any) -> None:
    try:
        cfg = config(growth=data)
    except ConfigError as e:
        wrong = [line for line in str(e).splitlines() if not line.startswith("growth")]
    else:
        wrong = []
        assert good(json.loads(str(cfg.growth))) == cfg.growth
    assert not wrong, wrong


def test_defaults_apply_to_ops_that_do_not_set_the_key() -> None:
    ops = [
        op("set_lr", 0.1),
        op("widen_mlp", 128),
        op("widen_mlp", 256, optimizer={"mode": "keep", "min_coverage": 0.5}, on_fail="abort"),
    ]
    schedule = good(
        {"defaults": {"on_fail": "skip", "optimizer": "reset", "lr": {"rewarm_iters": 9}}, "ops": ops}
    )
    rate, first, second = schedule.ops
    assert (rate.on_fail, rate.optimizer.mode, rate.lr.rewarm_iters) == ("abort", "auto", 0)
    assert (first.on_fail, first.optimizer.mode, first.lr.rewarm_iters) == ("skip", "reset", 9)
    assert (second.on_fail, second.optimizer.mode, second.optimizer.min_coverage, second.lr.rewarm_iters) == (
        "abort",
        "keep",
        0.5,
        9,
    )
    assert good(schedule.data()) == schedule


def test_every_op_has_its_own_seed_and_id() -> None:
    ops = [op("widen_mlp", 128), op("widen_mlp", 256), op("widen_mlp", 512, id="last")]
    a, b = good({"ops": ops, "seed": 1}), good({"ops": ops, "seed": 2})
    assert len({o.seed for o in (*a.ops, *b.ops)}) == 6 and all(0 <= o.seed < 2**63 for o in a.ops)
    assert [o.id for o in a.ops] == ["0-widen_mlp", "1-widen_mlp", "last"]
    assert a.ops == good({"ops": ops, "seed": 1}).ops


# -- when an op fires


def facts(step: int, *losses: float, last: int = 0, tokens: int = 0, budget: int = 1000) -> Facts:
    """Return facts with one loss every ten steps. The last loss belongs to `step`."""
    return Facts(
        step, last, tokens, budget, [(step - 10 * i, loss) for i, loss in enumerate(reversed(losses))][::-1]
    )


PLATEAU = "plateau: best loss {:.4f} in the last 2 evaluations, 4.0000 before"


@pytest.mark.parametrize(
    ("trigger", "known", "reason"),
    [
        ({"loss_below": 3.5}, facts(100, 3.4999), "loss 3.4999 < 3.5"),
        ({"loss_below": 3.5}, facts(100, 3.5), None),  # an equal loss is not below the bound
        ({"loss_below": 3.5}, facts(100, 3.4, 3.6), None),  # only the last loss counts
        ({"loss_below": 3.5}, facts(100), None),
        ({"loss_below": 3.5}, facts(100, math.nan), None),
        ({"wait_iters": 500}, facts(499, 9.0), None),
        ({"wait_iters": 500}, facts(500, 9.0), "500 steps since the last op >= 500"),
        ({"wait_iters": 500}, facts(900, 9.0, last=401), None),
        ({"wait_iters": 0}, facts(900, 9.0, last=900), "0 steps since the last op >= 0"),
        ({"step": 900}, facts(899), None),
        ({"step": 900}, facts(900), "step 900 >= 900"),
        ({"tokens": 2e8}, facts(9, tokens=200_000_000 - 1), None),
        ({"tokens": 2e8}, facts(9, tokens=200_000_000), "200,000,000 tokens >= 200,000,000"),
        ({"budget_frac": 0.8}, facts(9, tokens=799), None),
        ({"budget_frac": 0.8}, facts(9, tokens=800), "800 tokens >= 0.8 of the budget"),
        ({"plateau": {"evals": 2, "rel": 0.01}}, facts(100, 4.0, 3.97), None),  # no earlier loss
        ({"plateau": {"evals": 2, "rel": 0.01}}, facts(100, 4.0, 3.99, 3.97), PLATEAU.format(3.97)),
        ({"plateau": {"evals": 2, "rel": 0.01}}, facts(100, 4.0, 3.95, 3.99),
            None),  # the better of the two losses counts
        ({"plateau": {"evals": 2, "rel": 0.01}}, facts(100, 4.0, 3.96, 3.96), None),  # a gain of exactly 1%
        ({"plateau": {"evals": 2, "rel": 0.01}}, facts(100, 4.0, 4.0, 4.0, last=80),
            None),  # there are only two losses since the last op
        ({"plateau": {"evals": 2, "rel": 0.01}}, facts(100, 4.0, 4.0, 4.0, last=79), PLATEAU.format(4.0)),
        ({"any": [{"loss_below": 3.5}, {"wait_iters": 500}]}, facts(500, 3.4), "loss 3.4000 < 3.5"),
        ({"any": [{"loss_below": 3.5}, {"wait_iters": 500}]}, facts(500, 3.6),
            "500 steps since the last op >= 500"),
        ({"any": [{"loss_below": 3.5}, {"wait_iters": 500}]}, facts(499, 3.6), None),
    ],
)  # fmt: skip
def test_when_an_op_is_due(trigger: dict[str, Any], known: Facts, reason: str | None) -> None:
    assert due(one("set_lr", 0.1, trigger).trigger, known) == reason


known_facts = st.builds(
    lambda steps, losses, last, tokens: Facts(steps[-1], min(last, steps[-1]), tokens, 10**6,
        list(zip(steps, losses, strict=False))),
    st.lists(st.integers(1, 2000), min_size=1, max_size=6, unique=True).map(sorted),
    st.lists(st.floats(0.1, 12), min_size=6, max_size=6),
    st.integers(0, 2000), st.integers(0, 10**6),
)  # fmt: skip


@given(_conditions(), known_facts)
def test_a_trigger_with_any_fires_if_one_condition_holds(trigger: dict[str, Any], known: Facts) -> None:
    each = trigger.get("any", [trigger])
    reasons = [due(one("set_lr", 0.1, condition).trigger, known) for condition in each]
    reason = due(one("set_lr", 0.1, trigger).trigger, known)
    assert reason in reasons if reason else not any(reasons)


@given(st.floats(0.1, 10), known_facts)
def test_an_op_stays_due_with_a_lower_loss_or_a_longer_wait(bound: float, known: Facts) -> None:
    waits = one("set_lr", 0.1, {"any": [{"loss_below": bound}, {"wait_iters": 300}]}).trigger
    lower = known._replace(losses=[(s, loss * 0.9) for s, loss in known.losses])
    later = known._replace(step=known.step + 50)
    assert not due(waits, known) or (due(waits, lower) and due(waits, later))


def test_ops_fire_in_order_and_wait_for_a_new_loss_after_reevaluate() -> None:
    """Determine the step at which each op fires if every 100th step has a loss."""
    entries = [
        {"name": "set_lr", "value": 0.1, "trigger_loss": 100.0, "max_wait_iters": 10**6, "reevaluate": False},
        {"name": "set_dropout", "value": 0.1, "trigger_loss": 4.0, "max_wait_iters": 250, "reevaluate": True},
        {
            "name": "set_dropout",
            "value": 0.2,
            "trigger_loss": 9.0,
            "max_wait_iters": 250,
            "reevaluate": False,
        },
        {
            "name": "set_dropout",
            "value": 0.3,
            "trigger_loss": 3.0,
            "max_wait_iters": 250,
            "reevaluate": False,
        },
    ]
    cfg, plan = config(epochs=200, growth=entries), None
    plan, losses = Plan(cfg, 81), [(s, 5.0) for s in range(100, 1100, 100)]
    for i, (step, _) in enumerate(losses):
        while op := plan.undecided:
            last = plan.fired[-1] if plan.fired else 0
            if not due(op.trigger, Facts(step, last, plan.tokens(step), plan.budget, losses[: i + 1])):
                break
            plan = Plan(cfg, 81, (*plan.fired, step))
            if op.reevaluate:
                break
    # The second op waits 250 steps, the third for the next evaluation, and the fourth another 250 steps.
    assert plan.fired == (100, 400, 500, 800) and plan.undecided is None
    assert [plan.at(s).dropout for s in (399, 400, 499, 500, 799, 800)] == [
        0.0,
        26 / 256,
        26 / 256,
        51 / 256,
        51 / 256,
        77 / 256,
    ]


# -- the effect of an op


@pytest.mark.parametrize(
    ("start", "name", "value", "changed"),
    [
        ({}, "set_lr", 0.1, {"lr": 0.1}),
        ({}, "set_batch_size", 4, {"batch_size": 4}),
        ({}, "set_grad_accum", 2, {"grad_accum": 2}),
        ({}, "set_warmup_iters", 30, {"warmup_iters": 30}),
        ({}, "set_eval_interval", 40, {"eval_interval": 40}),
        ({}, "set_weight_decay", 0.1, {"weight_decay": 0.1}),
        ({}, "set_dropout", 0.1, {"dropout": 0.1}),
        ({"block_pattern": "DM"}, "set_capacity", 0.25, {"capacity": 0.25}),
        ({}, "reset_lr_schedule", None, {}),
        ({}, "stack_layers", [0, 0, 1, 1], {"n_layer": 4}),
        ({"n_layer": 4, "frozen": [1, 3]}, "stack_layers", [1, 1, 0, 3], {"n_layer": 4, "frozen": (0, 3)}),
        ({"n_layer": 4}, "stack_layers", [1, 1, 2], {"n_layer": 3}),
        ({}, "widen_mlp", 128, {"d_ff": 128}),
        ({}, "widen_model", 32, {"d_model": 32, "d_ff": 128, "n_head": 4}),
        ({}, "widen_model", {"factor": 3}, {"d_model": 48, "d_ff": 192, "n_head": 6}),
        ({"mlp": "swiglu"}, "widen_model", {"factor": 2}, {"d_model": 32, "d_ff": 128, "n_head": 4}),
        ({"n_head": 4, "n_kv_head": 2}, "widen_model", {"factor": 2},
            {"d_model": 32, "d_ff": 128, "n_head": 8, "n_kv_head": 4}),
        ({"n_head": 4, "n_kv_head": 2}, "widen_model", {"factor": 2, "kv": "keep"},
            {"d_model": 32, "d_ff": 128, "n_head": 8}),
        ({"head_dim": 4}, "widen_model", {"factor": 2}, {"d_model": 32, "d_ff": 128, "n_head": 4}),
        ({}, "add_heads", 3, {"n_head": 3, "head_dim": 8}),
        ({"n_head": 4, "n_kv_head": 2}, "add_heads", 6, {"n_head": 6, "head_dim": 4}),
        ({"n_kv_head": 2}, "add_heads", 3, {"n_head": 3, "head_dim": 8, "n_kv_head": 0}),
        ({}, "upcycle_moe", {"experts": 8}, {"experts": 8, "d_ff": 64}),
        ({}, "upcycle_moe", {"experts": 8, "top_k": 4, "shards": 4}, {"experts": 8, "top_k": 4, "d_ff": 16}),
        ({}, "upcycle_moe", {"experts": 8, "top_k": 1, "router_weights": "softmax"},
         {"experts": 8, "top_k": 1, "d_ff": 64, "router_weights": "softmax"}),
        ({}, "set_attn_lora_rank", 8, {"attn_lora_rank": 8}),
        ({}, "set_mlp_lora_rank", 8, {"mlp_lora_rank": 8}),
        ({"embed_lora_rank": 8}, "set_embedding_lora_rank", 4, {"embed_lora_rank": 4}),
        ({"attn_lora_rank": 8, "mlp_lora_rank": 4, "embed_lora_rank": 2}, "merge_lora_weights", None,
            {"attn_lora_rank": 0, "mlp_lora_rank": 0, "embed_lora_rank": 0}),
        ({}, "freeze_layer", 1, {"frozen": (1,)}),
        ({"frozen": [1]}, "freeze_layer", [0], {"frozen": (0, 1)}),
        ({"frozen": [0, 1]}, "unfreeze_layer", [1, 0], {"frozen": ()}),
        ({}, "resize_vocabulary", 310, {"unused_ids": 10}),
        ({"unused_ids": 10}, "resize_vocabulary", 320, {"unused_ids": 20}),
    ],
)  # fmt: skip
def test_the_fields_that_an_op_changes(
    start: dict[str, Any], name: str, value: Any, changed: dict[str, Any]
) -> None:
    before = config(**start)
    now = after(one(name, value), before)
    differ = {f: getattr(now, f) for f in TrainConfig.model_fields if getattr(now, f) != getattr(before, f)}
    same = {f: v for f, v in changed.items() if getattr(before, f) == v}
    assert differ | same == changed
    if name == "widen_model":
        assert now.head_width == before.head_width


def test_every_operation_has_a_case() -> None:
    marks = getattr(test_the_fields_that_an_op_changes, "pytestmark")  # noqa: B009
    (mark,) = [mark for mark in marks if mark.name == "parametrize"]
    assert {case[1] for case in mark.args[1]} == set(NAMES) - {"set_eval_iters"}


@pytest.mark.parametrize(
    ("start", "name", "value", "more", "strongest"),
    [
        ({}, "stack_layers", [0, 0, 1, 1], {}, "none"),
        ({}, "stack_layers", [0, 1], {}, "bitexact"),
        ({}, "stack_layers", [0, 0, 1, 1], {"init": "identity"}, "bitexact"),
        ({}, "stack_layers", [0, 1, 0], {"init": "identity"}, "bitexact"),
        ({}, "stack_layers", [1, 0, 0], {"init": "identity"}, "none"),
        ({}, "stack_layers", [1, 1], {"init": "identity"}, "none"),
        ({}, "widen_mlp", 128, {}, "exact"),
        ({}, "widen_model", 32, {}, "exact"),
        ({}, "add_heads", 4, {}, "exact"),
        ({}, "upcycle_moe", {"experts": 8}, {}, "exact"),
        ({}, "upcycle_moe", {"experts": 8, "router": "zero"}, {"optimizer": "asymmetric"}, "bitexact"),
        ({}, "upcycle_moe", {"experts": 8, "top_k": 3, "router": "zero"}, {"optimizer": "asymmetric"},
            "exact"),
        ({}, "upcycle_moe", {"experts": 8, "router": "zero", "noise_snr_db": 20}, {}, "exact"),
        ({}, "upcycle_moe", {"experts": 8, "router": "zero", "shards": 2}, {"optimizer": "asymmetric"},
            "exact"),
        ({"router_weights": "softmax"}, "upcycle_moe", {"experts": 8, "router": "zero"},
            {"optimizer": "asymmetric"}, "exact"),
        ({"router_weights": "softmax"}, "upcycle_moe", {"experts": 8}, {}, "approx"),
        ({}, "set_attn_lora_rank", 8, {}, "exact"),
        ({"attn_lora_rank": 4}, "set_attn_lora_rank", 8, {}, "exact"),
        ({"attn_lora_rank": 8}, "set_attn_lora_rank", 4, {}, "approx"),
        ({"mlp_lora_rank": 4}, "set_mlp_lora_rank", 8, {}, "exact"),
        ({"mlp_lora_rank": 8}, "set_mlp_lora_rank", 4, {}, "approx"),
        ({"embed_lora_rank": 8}, "set_embedding_lora_rank", 4, {}, "approx"),
        ({"attn_lora_rank": 8}, "merge_lora_weights", None, {}, "exact"),
        ({}, "freeze_layer", 0, {}, "bitexact"),
        ({"frozen": [0]}, "unfreeze_layer", 0, {}, "bitexact"),
        ({}, "resize_vocabulary", 310, {}, "exact"),
    ],
)  # fmt: skip
def test_the_strongest_guarantee_of_an_op(
    start: dict[str, Any], name: str, value: Any, more: dict[str, Any], strongest: str
) -> None:
    cfg, strengths = config(**start), ("none", "approx", "exact", "bitexact")
    ((settled, _),), _ = walk(cfg, [one(name, value, **more)])
    assert settled.preserve == strongest
    for strength in strengths:
        wanted = one(name, value, preserve=strength, **more)
        if strengths.index(strength) <= strengths.index(strongest):
            assert walk(cfg, [wanted])[0][0].op.preserve == strength
        else:
            with pytest.raises(
                ValueError, match=f"preserve={strength} is impossible .* preserve={strongest}"
            ):
                after(wanted, cfg)


# -- the plan


def test_a_plan_is_known_up_to_the_undecided_op() -> None:
    ops = [
        op("set_lr", 0.25, {"step": 10}),
        op("set_dropout", 0.5, {"loss_below": 3}),
        op("set_lr", 0.125, {"step": 20}),
    ]
    cfg = config(epochs=1, schedule="constant", growth={"ops": ops})
    plan = Plan(cfg, 401)
    assert plan.steps == 50 and plan.fired == (10,) and plan.undecided == cfg.growth.ops[1]
    assert plan.table()["growth"] == "set_lr 0.25 after step 10, then set_dropout 0.5 at loss < 3"
    later = Plan(cfg, 401, (10, 30))
    assert later.fired == (10, 30, 30) and later.undecided is None, (
        "the third op was due before, and needs no evaluation"
    )
    assert Plan(cfg, 401, (10, 15)).fired == (10, 15, 20)
    root = "f" * 64
    a, b, never = (
        lineage.chain(root, p)
        for p in (plan, later, Plan(config(epochs=1, schedule="constant", growth={"ops": ops[:1]}), 401))
    )
    assert a == never and a[:31] == b[:31] and not set(a[31:]) & set(b[31:])


def test_a_static_op_that_is_too_late_after_a_decision_is_left_out() -> None:
    ops = [op("set_batch_size", 4, {"loss_below": 3}), op("set_lr", 0.125, {"step": 45})]
    cfg = config(epochs=1, growth={"ops": ops})
    assert Plan(cfg, 401, (40,)).fired == (40,) and Plan(cfg, 401, (40,)).steps == 45
    assert Plan(cfg, 401, (2,)).steps == 26
    assert Plan(cfg, 401, (45,)).fired == (45, 45)


@given(
    st.lists(
        st.sampled_from([{"step": 7}, {"tokens": 100}, {"budget_frac": 0.3}]),
        min_size=1,
        max_size=3,
        unique_by=str,
    )
)
def test_the_first_of_several_static_conditions_counts(each: list[dict[str, Any]]) -> None:
    at = {"step": 7, "tokens": 12, "budget_frac": 15}  # a run has 50 steps of 8 tokens
    cfg = config(epochs=1, growth={"ops": [op("set_lr", 0.1, {"any": each})]})
    assert Plan(cfg, 401).fired == (min(at[key] for one in each for key in one),)


@given(st.integers(1, 49), st.integers(1, 49))
def test_an_architecture_op_changes_the_keys_from_its_step_on(first: int, second: int) -> None:
    assume(first < second)
    root, same = "f" * 64, {"epochs": 1, "schedule": "constant"}

    def keys(step: int, **change: Any) -> list[str]:
        return lineage.chain(
            root,
            Plan(
                config(**same, growth={"ops": [op("stack_layers", [0, 0, 1], {"step": step}) | change]}), 401
            ),
        )

    plain = lineage.chain(root, Plan(config(**same), 401))
    a, b = keys(first), keys(second)
    assert a[: first + 1] == plain[: first + 1] and not set(a[first + 1 :]) & set(plain)
    assert b[: second + 1] == plain[: second + 1] and not set(b[second + 1 :]) & set(plain)
    assert a == keys(
        first, desc="in other words", id="other", on_fail="skip", trigger={"budget_frac": first / 50}
    )
    for other in (
        {"value": [0, 1, 1]},
        {"init": "identity"},
        {"optimizer": "reset"},
        {"lr": {"rewarm_iters": 5}},
    ):
        assert not set(keys(first, **other)[first + 1 :]) & set(a)


def test_a_reset_restarts_the_schedule_over_the_remaining_steps() -> None:
    shape = {"epochs": 1, "schedule": "wsd", "warmup_frac": 0.1, "decay_frac": 0.5, "min_lr_frac": 0.0}
    plan = Plan(config(**shape, growth={"ops": [op("reset_lr_schedule", None, {"step": 30})]}), 401)
    plain = Plan(config(**shape), 401)
    assert [plan.lr_factor(s) for s in range(30)] == [plain.lr_factor(s) for s in range(30)]
    left = [plan.lr_factor(s) for s in range(30, 50)]  # 20 steps left: 2 of warm-up, 10 of decay
    assert left == [0.5, 1.0, *[1.0] * 8, *(1 - i / 10 for i in range(10))]
    assert {30, 32, 41} <= set(plan.breaks)


def test_warmup_iters_counts_from_the_last_reset() -> None:
    ops = [op("set_warmup_iters", 4, {"step": 10}), op("reset_lr_schedule", None, {"step": 20})]
    plan = Plan(config(epochs=1, schedule="constant", warmup_iters=2, growth={"ops": ops}), 401)
    assert [plan.lr_factor(s) for s in (0, 1, 2, 10, 11, 19)] == [0.5, 1, 1, 1, 1, 1], (
        "after the warm-up the value has no effect"
    )
    assert [plan.lr_factor(s) for s in (20, 21, 22, 23, 24)] == [0.25, 0.5, 0.75, 1, 1]
    assert Plan(config(epochs=1, warmup_iters=3), 401).warmup_steps == 3


def test_eval_interval_counts_from_the_op_that_sets_it() -> None:
    ops = [
        op("set_eval_interval", 7, {"step": 20}),
        op("set_lr", 0.1, {"step": 30}),
        op("set_batch_size", 1, {"step": 36}),
    ]
    plan = Plan(config(epochs=1, eval_interval=9, growth={"ops": ops}), 401)
    assert plan.eval_steps == {1, 9, 18, 27, 34, 41, 48, 55, 62, plan.steps}
    assert Plan(config(epochs=1, eval_per_epoch=5), 401).eval_steps == {1, 10, 20, 30, 40, 50}
