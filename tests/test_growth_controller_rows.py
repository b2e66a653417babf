"""Test without training when growth operations fire, what the journal records, and how failures end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY
from growing import V

from mainrun.config import TrainConfig, from_dict
from mainrun.core.optimizers import Optimizers, ParamSchedule
from mainrun.errors import UsageError
from mainrun.growth import controller, operators
from mainrun.growth.controller import Growth, without_values
from mainrun.growth.make import make_controller
from mainrun.growth.state import growth_state, growth_state_at, ops_applied, rebuild_model
from mainrun.plan.cost import costs
from mainrun.plan.plan import Plan
from mainrun.run.accounts import Accounts
from mainrun.train import State, build

# A step has 16 tokens and an epoch has 40 steps. Evaluations follow steps 1, 10, 20, 30 and 40.
SMALL: dict[str, Any] = TINY | {
    "block_size": 8, "batch_size": 2, "n_layer": 2, "n_head": 2, "d_model": 8, "d_ff": 12,
    "optimizer": "adamw", "lr": 0.01, "epochs": 1,
    "eval_per_epoch": 4,
}  # fmt: skip
TOKENS = 641
INITIAL: dict[str, Any] = {"init": "identity"}


def op(name: str, value: Any, trigger: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": trigger, **more}


def config(*ops: dict[str, Any], **changes: Any) -> TrainConfig:
    return from_dict(SMALL | {"growth": {"ops": list(ops)}} | changes)


class FakeDevice:
    """A device with one process."""

    leads, compile = True, False

    def any_process(self, flag: bool) -> bool:
        return flag


class Run:
    """A Growth object with its state, journal and device. `go` sets the step number without training."""

    def __init__(self, cfg: TrainConfig, step: int = 0, grown: dict[str, Any] | None = None) -> None:
        self.device: Any = FakeDevice()
        self.state = State(cfg, build(cfg, V))
        self.state.step, self.state.growth_state = step, grown or {}
        for p in self.state.model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        self.state.optimizers.step(Plan(cfg, TOKENS).at(0))
        self.rows: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []
        journal: Any = SimpleNamespace(
            append=self.rows.append, close=lambda: self.rows.append({"event": "closed"})
        )
        self.accounts = Accounts()
        self.growth = Growth(
            cfg, Plan(cfg, TOKENS), self.device, self.state, journal, self.seen.append, self.accounts.clock
        )
        self.scored: list[int] = []

    def go(self, step: int, loss: float | None = None) -> None:
        self.state.step = step
        if loss is not None:
            self.growth.observe_scores([score_row(step, loss)])

    def evaluate(self) -> list[dict[str, Any]]:
        self.scored.append(self.state.step)
        return [score_row(self.state.step, 2.5)]

    def act(self) -> bool:
        return self.growth.act(self.evaluate)

    def events(self) -> list[tuple[str, int]]:
        return [(row["event"].removeprefix("OPERATION_"), row["step"]) for row in self.rows]


def score_row(step: int, loss: float, split: str = "val") -> dict[str, Any]:
    return {"event": "eval", "split": split, "step": step, "loss": loss}


def fired(run: Run) -> tuple[int, ...]:
    return run.growth.plan.fired


# -- scores


def test_only_scores_of_the_deciding_split_are_kept() -> None:
    run = Run(config())
    run.growth.observe_scores(
        [
            score_row(10, 3.0),
            score_row(10, 1.0, "dev"),
            score_row(1, 4.0),
            {"event": "step", "step": 5, "loss": 2.0, "split": "val"},
        ]
    )
    run.growth.observe_scores([score_row(20, 2.0), score_row(10, 3.5)])
    assert run.growth.losses == [(1, 4.0), (10, 3.5), (20, 2.0)] and run.growth.split == "val"
    dev = Run(config(dev_frac=0.1))
    dev.growth.observe_scores([score_row(10, 3.0), score_row(10, 1.0, "dev")])
    assert dev.growth.losses == [(10, 1.0)] and dev.growth.split == "dev", (
        "val must not decide if there is a dev split"
    )


# -- when operations fire


LOSS = op("set_lr", 0.02, {"loss_below": 3.0})
DECIDED: dict[str, tuple[list[dict[str, Any]], int, float | None, bool, tuple[int, ...]]] = {
    "the loss is below": ([LOSS], 10, 2.99, True, (10,)),
    "equal is not below": ([LOSS], 10, 3.0, False, ()),
    "no evaluation at this step": ([LOSS], 11, 2.0, False, ()),
    "an evaluation without scores": ([LOSS], 10, None, False, ()),
    "two ops on one loss": ([LOSS, op("set_lr", 0.03, {"loss_below": 9.0})], 10, 2.0, True, (10, 10)),
    "the second waits for a new loss": (
        [LOSS | {"reevaluate": True}, op("set_lr", 0.03, {"loss_below": 9.0})],
        10,
        2.0,
        True,
        (10,),
    ),
    "an op on the architecture reevaluates by default": (
        [op("widen_mlp", 20, {"loss_below": 3.0}), LOSS],
        10,
        2.0,
        True,
        (10,),
    ),
    "after an op with a fixed step": ([op("set_lr", 0.03, {"step": 10}), LOSS], 10, 2.0, True, (10, 10)),
    "before an op with a fixed step": ([op("set_lr", 0.03, {"step": 11}), LOSS], 10, 2.0, False, (11,)),
    "a wait that is too short": ([op("set_lr", 0.03, {"wait_iters": 11})], 10, 2.0, False, ()),
    "a wait that is long enough": ([op("set_lr", 0.03, {"wait_iters": 10})], 10, 2.0, True, (10,)),
}


@pytest.mark.parametrize(("ops", "step", "loss", "changed", "plan"), DECIDED.values(), ids=DECIDED)
def test_which_ops_an_evaluation_fires(
    ops: list[dict[str, Any]], step: int, loss: float | None, changed: bool, plan: tuple[int, ...]
) -> None:
    run = Run(config(*ops))
    run.go(step, loss)
    assert run.growth.decide() is changed and fired(run) == plan
    assert run.state.growth_state["fired"] == list(plan), "a checkpoint of this step contains the decision"
    assert run.growth.decide() is False, "each op fires once"


def test_losses_of_later_steps_are_ignored() -> None:
    run = Run(config(LOSS))
    run.growth.observe_scores([score_row(10, 3.5), score_row(20, 2.0)])
    run.go(10)
    assert not run.growth.decide()
    run.go(20)
    assert run.growth.decide() and fired(run) == (20,)


def test_the_first_process_decides_for_all() -> None:
    run = Run(config(LOSS))
    run.device.leads = False
    run.go(10, 2.0)
    assert not run.growth.decide(), "only the leader decides"
    run.device.any_process = lambda flag: True
    run.growth.plan = Plan(config(LOSS), TOKENS)
    assert run.growth.decide() and fired(run) == (10,)


def test_waiting_starts_at_the_last_op() -> None:
    run = Run(config(op("set_lr", 0.03, {"wait_iters": 10}), op("set_lr", 0.04, {"wait_iters": 10})))
    run.go(10, 2.0)
    assert run.growth.decide() and fired(run) == (10,)
    run.go(20, 2.0)
    assert run.growth.decide() and fired(run) == (10, 20)


# -- operations and the journal


def test_no_op_acts_before_its_step_or_after_the_last_step() -> None:
    run = Run(config(op("set_lr", 0.02, {"step": 10})))
    run.go(9)
    assert run.growth.pending_op is None and run.act() is False and run.rows == []
    run.go(10)
    assert run.growth.pending_op is not None and run.growth.pending_op.name == "set_lr"
    last = Run(config(op("set_lr", 0.02, {"wait_iters": 40})))
    last.go(40, 2.0)
    last.growth.plan = Plan(last.growth.cfg, TOKENS, (40,))
    assert last.growth.pending_op is None, "no step is left"


def test_a_training_op_and_its_rows() -> None:
    run = Run(config(op("set_lr", 0.02, {"step": 10}, desc="slower", id="slow")))
    run.go(10, 3.25)
    model = run.state.model
    assert (
        run.act() is False
        and run.state.model is model
        and run.state.cfg.lr == 0.02
        and run.growth.applied == 1
    )
    assert run.act() is False and len(run.rows) == 2, "each op acts once"
    start, success = run.rows
    sizes = costs(run.growth.cfg, V)
    assert start == {
        "event": "OPERATION_START", "op": "slow", "name": "set_lr", "value": 0.02, "step": 10, "tokens": 160,
        "ops": 0, "desc": "slower",
        "why": "step 10 >= 10", "loss": 3.25, "seed": run.growth.cfg.growth.ops[0].seed, "preserve": "",
        **sizes,
    }  # fmt: skip
    assert 0 <= success.pop("seconds") < 60
    assert success == {
        "event": "OPERATION_SUCCESS", "op": "slow", "name": "set_lr", "value": 0.02, "step": 10,
        "tokens": 160, "checks": [], **sizes,
    }  # fmt: skip
    assert (
        run.growth.look_back() == ["growth: step 10: ops[0] 'set_lr' 0.02"] and run.growth.look_back() == []
    )


def test_the_note_of_an_op_without_a_value() -> None:
    run = Run(config(op("reset_lr_schedule", None, {"step": 10})))
    run.go(10)
    run.act()
    assert run.growth.look_back() == ["growth: step 10: ops[0] 'reset_lr_schedule'"]
    assert run.rows[0]["loss"] is None and run.rows[0]["why"] == "step 10 >= 10"


def test_a_growing_op_and_its_rows() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}, **INITIAL)))
    run.go(10, 3.25)
    before, old = run.growth.cfg, run.state.model
    assert run.act() is True
    cfg = run.state.cfg
    assert (
        run.state.model is not old and run.state.model.cfg == cfg and cfg.d_ff == 20 and cfg.growth.ops == ()
    )
    start, success, again = run.rows
    assert {key: start[key] for key in ("params", "active", "flops_per_token")} == costs(before, V)
    assert {key: success[key] for key in ("params", "active", "flops_per_token")} == costs(cfg, V)
    assert start["preserve"] == "exact" and start["desc"] == "" and start["loss"] == 3.25
    assert [check["name"] for check in success["checks"]] == [
        "function",
        "tying",
        "rope",
        "router scale",
        "coverage",
        "groups",
    ]
    assert all(check["ok"] and check["detail"] for check in success["checks"])
    assert 0 <= success["delta_logits"] < 1e-5 and success["largest_logit"] > 0 and success["truncated"] == {}
    assert 0.5 < success["coverage"] < 1
    assert again == {
        "event": "OPERATION_REEVALUATION", "op": "0-widen_mlp", "name": "widen_mlp", "value": 20, "step": 10,
        "tokens": 160,
        "loss_before": 3.25, "loss_after": 2.5, "change": -0.75,
    }  # fmt: skip
    sizes = [f"{costs(c, V)['params']:,}" for c in (before, cfg)]
    assert run.growth.look_back() == [
        f"growth: step 10: ops[0] 'widen_mlp' 20: {sizes[0]} -> {sizes[1]} parameters"
    ]
    assert run.accounts.spent["growth"] > 0
    assert run.state.growth_state["applied"] == 1 and run.state.growth_state["config"]["d_ff"] == 20


def test_the_gradients_of_the_old_model_are_freed() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}, **INITIAL)))
    run.go(10)
    old = run.state.model
    assert any(p.grad is not None for p in old.parameters())
    run.act()
    assert all(p.grad is None for p in old.parameters())
    held = run.state.optimizers.state()
    assert (
        held["optimizer/blocks.0.mlp.up.weight/exp_avg"].shape == (20, 8)
        and not held["optimizer/blocks.0.mlp.up.weight/exp_avg"][12:].any()
    )


def test_an_op_sets_the_mode_of_the_transfer() -> None:
    for mode, kept in (("reset", False), ("keep", True)):
        run = Run(config(op("widen_model", {"factor": 2}, {"step": 10}, optimizer=mode)))
        before = run.state.optimizers.state()["optimizer/embed.weight/exp_avg"].clone()
        run.go(10)
        run.act()
        after = run.state.optimizers.state()
        assert (len(after) > 0) is kept
        assert not kept or torch.equal(after["optimizer/embed.weight/exp_avg"], before.repeat(1, 2))


def test_a_reset_requires_no_coverage() -> None:
    run = Run(
        config(op("widen_mlp", 20, {"step": 10}, optimizer={"mode": "reset", "min_coverage": 0.9}, **INITIAL))
    )
    run.go(10)
    assert run.act() is True
    assert run.rows[1]["coverage"] == 0 and run.rows[1]["checks"][4]["detail"].endswith("0.0% is required")


@pytest.mark.parametrize(
    ("what", "fields", "names"),
    [
        (
            op("stack_layers", [0, 1, 1], {"step": 10}, **INITIAL),
            {},
            ["function", "tying", "rope", "layer identity", "coverage", "groups"],
        ),
        (
            op("stack_layers", [0, 1, 1], {"step": 10}),
            {},
            ["function", "tying", "rope", "coverage", "groups"],
        ),
        (
            op("freeze_layer", 0, {"step": 10}),
            {},
            ["function", "tying", "rope", "router scale", "coverage", "groups"],
        ),
        (
            op("set_attn_lora_rank", 1, {"step": 10}),
            {"attn_lora_rank": 2},
            ["function", "tying", "rope", "coverage", "groups"],
        ),
        (
            op("widen_mlp", 20, {"step": 10}, preserve="approx"),
            {},
            ["function", "tying", "rope", "coverage", "groups"],
        ),
    ],
)
def test_each_op_gets_the_checks_of_its_kind(
    what: dict[str, Any], fields: dict[str, Any], names: list[str]
) -> None:
    run = Run(config(what, **fields))
    run.go(10)
    assert run.act() is True and [check["name"] for check in run.rows[1]["checks"]] == names


def test_inserted_layers_are_the_second_and_later_copies() -> None:
    run = Run(config(op("stack_layers", [0, 0, 1, 1, 0], {"step": 10}, **INITIAL, preserve="none")))
    run.go(10)
    run.act()
    assert [c["detail"] for c in run.rows[1]["checks"] if c["name"] == "layer identity"] == [
        "3 inserted layers"
    ]


def test_ops_at_one_step_use_the_loss_of_the_op_before() -> None:
    ops = [
        op("set_lr", 0.02, {"step": 10}, reevaluate=True),
        op("set_lr", 0.03, {"step": 10}),
        op("widen_mlp", 20, {"step": 10}, reevaluate=False),
        op("set_lr", 0.04, {"step": 10}, reevaluate=True),
    ]
    run = Run(config(*ops))
    run.go(10, 3.25)
    assert run.act() is True and run.scored == [10, 10]
    assert [row["loss"] for row in run.rows if row["event"] == "OPERATION_START"] == [3.25, 2.5, 2.5, None], (
        "after growth the loss is unknown"
    )
    again = [row for row in run.rows if row["event"] == "OPERATION_REEVALUATION"]
    assert [(row["loss_before"], row["loss_after"], row["change"]) for row in again] == [
        (3.25, 2.5, -0.75),
        (None, 2.5, None),
    ]


def test_without_scores_there_is_no_reevaluation() -> None:
    run = Run(config(op("set_lr", 0.02, {"step": 10}, reevaluate=True)))
    run.go(10, 3.25)
    run.growth.act(list)
    assert run.events() == [("START", 10), ("SUCCESS", 10)]


def test_a_reevaluation_uses_the_deciding_split() -> None:
    run = Run(config(op("set_lr", 0.02, {"step": 10}, reevaluate=True), dev_frac=0.1))
    run.go(10)
    run.growth.act(lambda: [score_row(10, 9.0), score_row(10, 2.0, "dev")])
    assert run.rows[-1]["loss_after"] == 2.0


def test_the_journal_records_why_an_op_fired() -> None:
    run = Run(config(LOSS, op("set_lr", 0.03, {"wait_iters": 0})))
    run.go(10, 2.75)
    run.growth.decide()
    run.act()
    whys = [row["why"] for row in run.rows if row["event"] == "OPERATION_START"]
    assert whys == ["loss 2.7500 < 3", "0 steps since the last op >= 0"]
    late = Run(config(LOSS))
    # The plan says that the op has fired, but the score that triggered the op is missing.
    late.growth.plan = Plan(late.growth.cfg, TOKENS, (10,))
    late.go(10)
    late.act()
    assert late.rows[0]["why"] == "loss < 3"


def test_on_event_gets_every_row_with_or_without_a_journal() -> None:
    run = Run(config(op("set_lr", 0.02, {"step": 10})))
    events_seen = run.seen
    run.go(10)
    run.act()
    assert events_seen == run.rows and len(events_seen) == 2
    run.growth.close()
    assert run.rows[-1] == {"event": "closed"}
    run.growth.journal = None
    run.growth.log_event({"event": "x"})
    run.growth.close()
    assert events_seen[-1] == {"event": "x"} and run.rows[-1] == {"event": "closed"}


# -- failed operations


def with_too_much_output(
    real: Callable[[operators.Change], operators.Pieces],
) -> Callable[[operators.Change], operators.Pieces]:
    return lambda c: {
        n: replace(p, weight=1.5) if n.endswith("down.weight") else p for n, p in real(c).items()
    }


@pytest.fixture
def broken_widen_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace widen_mlp with an operation that changes the function."""
    monkeypatch.setitem(operators.OPS, "widen_mlp", with_too_much_output(operators.widen_mlp))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.state.tensors().items()}


def test_a_broken_op_aborts_and_changes_nothing(broken_widen_mlp: None) -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}, **INITIAL)))
    run.go(10, 3.0)
    before, cfg = weights(run), run.state.cfg
    with pytest.raises(UsageError) as e:
        run.act()
    text = str(e.value)
    assert text.startswith(
        "growth: ops[0] 'widen_mlp' failed a check at step 10: function: max |delta logits| "
    )
    assert (
        "; the operation did not change the model. Lower preserve or optimizer.min_coverage, "
        "or set on_fail=skip" in text
    )
    assert run.state.cfg is cfg and run.growth.applied == 0 and run.scored == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())
    assert run.events() == [("START", 10), ("ERROR", 10)]
    row = run.rows[1]
    assert (row["on_fail"], row["op"], row["name"], row["value"], row["tokens"]) == (
        "abort",
        "0-widen_mlp",
        "widen_mlp",
        20,
        160,
    )
    assert [(check["name"], check["ok"]) for check in row["checks"]] == [("function", False)], (
        "only failed checks are logged"
    )
    assert run.state.growth_state["applied"] == 0 and run.growth.look_back() == []


def test_a_broken_op_is_skipped_and_the_next_one_acts(broken_widen_mlp: None) -> None:
    ops = [op("widen_mlp", 20, {"step": 10}, on_fail="skip", **INITIAL), op("set_lr", 0.02, {"step": 10})]
    run = Run(config(*ops))
    run.go(10, 3.0)
    old = run.state.model
    assert run.act() is False and run.state.model is old
    assert fired(run) == (~10, 10) and run.state.cfg.lr == 0.02 and run.state.cfg.d_ff == 12
    assert (
        run.events() == [("START", 10), ("ERROR", 10), ("START", 10), ("SUCCESS", 10)]
        and run.rows[1]["on_fail"] == "skip"
    )
    assert run.state.growth_state["fired"] == [~10, 10] and run.growth.applied == 1


def test_a_skipped_op_does_not_change_earlier_ops(broken_widen_mlp: None) -> None:
    ops = [
        op("set_lr", 0.02, {"step": 5}),
        op("widen_mlp", 20, {"step": 10}, on_fail="skip", **INITIAL),
        op("set_lr", 0.03, {"step": 30}),
    ]
    run = Run(config(*ops))
    for step in (5, 10):
        run.go(step)
        run.act()
    assert fired(run) == (5, ~10, 30)


def test_an_abort_keeps_the_ops_before_it(broken_widen_mlp: None) -> None:
    run = Run(config(op("add_heads", 4, {"step": 10}), op("widen_mlp", 20, {"step": 10}, **INITIAL)))
    run.go(10)
    with pytest.raises(UsageError, match=r"ops\[1\] 'widen_mlp' failed a check"):
        run.act()
    assert run.state.growth_state["applied"] == 1 and run.state.growth_state["config"]["n_head"] == 4


def test_all_failed_checks_are_named(broken_widen_mlp: None) -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}, optimizer={"min_coverage": 1.0}, **INITIAL)))
    run.go(10)
    with pytest.raises(
        UsageError,
        match=r"function: max .*; coverage: \d\d\.\d% of the optimizer's state was .*, 100.0% is required",
    ):
        run.act()


def test_an_op_that_raises_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(c: operators.Change) -> operators.Pieces:
        raise MemoryError("no room")

    monkeypatch.setitem(operators.OPS, "widen_mlp", raises)
    run = Run(config(op("widen_mlp", 20, {"step": 10})))
    run.go(10)
    with pytest.raises(UsageError, match="op: MemoryError: no room"):
        run.act()
    assert run.rows[1]["checks"] == [{"name": "op", "ok": False, "detail": "MemoryError: no room"}]


# -- checks some steps later


def test_copies_that_stay_equal_are_reported_ten_steps_later() -> None:
    run = Run(config(op("widen_model", {"factor": 2}, {"step": 10}), epochs=2))
    run.go(10)
    run.act()
    run.growth.look_back()
    run.go(19)
    assert run.growth.look_back() == [] and run.events()[-1][0] != "LOOKBACK"
    run.go(20)
    (note,) = run.growth.look_back()
    assert (
        note.startswith("growth: 10 steps after ops[0] 'widen_model': ")
        and "copies are still equal in " in note
        and " tensors: blocks.0" in note
    )
    row = run.rows[-1]
    assert (row["event"], row["op"], row["name"], row["step"], row["since"]) == (
        "OPERATION_LOOKBACK",
        "0-widen_model",
        "widen_model",
        20,
        10,
    )
    symmetry, router = row["checks"]
    assert (symmetry["name"], symmetry["ok"], router["name"], router["ok"]) == (
        "symmetry",
        False,
        "router",
        True,
    )
    assert router["detail"] == "in every layer with experts, tokens go to several experts"
    run.go(21)
    assert run.growth.look_back() == [], "each op is reported once"


def test_copies_that_diverged_are_only_in_the_journal() -> None:
    run = Run(config(op("widen_model", {"factor": 2, "noise_snr_db": 5}, {"step": 10}), epochs=2))
    run.go(10)
    run.act()
    run.growth.look_back()
    run.go(20)
    assert run.growth.look_back() == [] and all(check["ok"] for check in run.rows[-1]["checks"])


def test_a_locked_router_is_reported() -> None:
    what = op("upcycle_moe", {"experts": 4, "router": "zero"}, {"step": 10}, optimizer="asymmetric")
    run = Run(config(what, epochs=2))
    run.go(10)
    run.act()
    run.growth.look_back()
    run.go(20)
    notes = run.growth.look_back()
    assert [note.split(": ", 2)[2] for note in notes][1:] == [
        f"blocks.{i}.mlp: all tokens go to the same 2 of 4 experts" for i in (0, 1)
    ]
    router = run.rows[-1]["checks"][1]
    assert (
        not router["ok"]
        and router["detail"].count("all tokens go to the same 2 of 4 experts") == 2
        and "; blocks.1.mlp" in router["detail"]
    )


def test_stacking_layers_first_checks_the_recent_op() -> None:
    what = op("upcycle_moe", {"experts": 4, "router": "zero"}, {"step": 10}, optimizer="asymmetric")
    run = Run(config(what, op("stack_layers", [0, 1, 1], {"step": 14}, **INITIAL), epochs=2))
    for step in (10, 14):
        run.go(step)
        run.act()
    rows = [row for row in run.rows if row["event"] == "OPERATION_LOOKBACK"]
    assert [(row["name"], row["step"], row["since"]) for row in rows] == [("upcycle_moe", 14, 10)]
    assert rows[0]["checks"][1]["ok"], "a router is not judged after 4 steps"
    assert run.events().index(("LOOKBACK", 14)) == run.events().index(("START", 14)) + 1
    run.go(24)
    run.growth.look_back()
    assert [row["name"] for row in run.rows if row["event"] == "OPERATION_LOOKBACK"] == [
        "upcycle_moe",
        "stack_layers",
    ]


def test_ops_at_the_same_step_are_not_checked_in_between() -> None:
    run = Run(
        config(
            op("widen_mlp", 20, {"step": 10}),
            op("stack_layers", [0, 1, 1], {"step": 10}, **INITIAL),
            epochs=2,
        )
    )
    run.go(10)
    run.act()
    assert "LOOKBACK" not in [event for event, _ in run.events()]


def test_other_ops_do_not_cancel_the_check_of_a_recent_op() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}), op("widen_mlp", 24, {"step": 12}), epochs=2))
    for step in (10, 12, 20, 22):
        run.go(step)
        run.act()
        run.growth.look_back()
    assert [(row["op"], row["step"]) for row in run.rows if row["event"] == "OPERATION_LOOKBACK"] == [
        ("0-widen_mlp", 20),
        ("1-widen_mlp", 22),
    ]
    first = next(row for row in run.rows if row["event"] == "OPERATION_LOOKBACK")["checks"][0]
    assert first["detail"].startswith("copies are still equal in 0 of 0 tensors"), (
        "resized tensors are not compared"
    )


def test_a_recompilation_is_reported_with_its_seconds() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10})))
    run.device.compile = True
    run.go(10)
    run.act()
    run.go(11)
    run.growth.compiled(2.5)
    assert run.rows[-1] == {
        "event": "OPERATION_RECOMPILE",
        "op": "0-widen_mlp",
        "name": "widen_mlp",
        "step": 11,
        "seconds": 2.5,
    }
    count = len(run.rows)
    run.growth.compiled(2.5)
    assert len(run.rows) == count
    eager = Run(config(op("widen_mlp", 20, {"step": 10})))
    eager.go(10)
    eager.act()
    eager.growth.compiled(2.5)
    assert "RECOMPILE" not in [event for event, _ in eager.events()]


def test_an_op_on_the_training_reports_no_recompilation() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}), op("set_lr", 0.02, {"step": 11})))
    run.device.compile = True
    run.go(10)
    run.act()
    run.growth.compiled(0.0)
    assert "RECOMPILE" not in [event for event, _ in run.events()]
    run.go(11)
    run.act()
    run.growth.compiled(2.5)
    assert "RECOMPILE" not in [event for event, _ in run.events()]


# -- figures and the growth state


def test_figures_are_the_size_of_the_model_and_the_flops_so_far() -> None:
    cfg = config(
        op("widen_mlp", 20, {"step": 10}), op("set_batch_size", 4, {"step": 20}), rdrop=0.5, dropout=0.1
    )
    run = Run(cfg)
    narrow, wide = costs(cfg, V), costs(cfg.segment_configs[1], V)
    narrow_flops = 10 * 16 * 2 * narrow["flops_per_token"]
    expected = {
        0: (narrow, 0), 5: (narrow, narrow_flops // 2), 10: (narrow, narrow_flops),
        11: (wide, narrow_flops + 16 * 2 * wide["flops_per_token"]),
        20: (wide, narrow_flops + 160 * 2 * wide["flops_per_token"]),
        22: (wide, narrow_flops + (160 + 64) * 2 * wide["flops_per_token"]),
    }  # fmt: skip
    for step, (size, flops) in expected.items():
        assert run.growth.figures(step) == {
            "params": size["params"],
            "active": size["active"],
            "flops": flops,
        }, step
    no_growth: Any = Run(config())
    none = make_controller(config(), no_growth.growth.plan, no_growth.device, no_growth.state)
    assert none.figures(10) == {}


def test_the_vocabulary_size_is_that_of_the_tokenizer() -> None:
    assert Run(config()).growth.vocab_size == V
    run = Run(config(op("resize_vocabulary", SMALL["vocab_size"] + 7, {"step": 10})))
    run.go(10)
    run.act()
    assert run.growth.vocab_size == V and run.state.model.embed.num_embeddings == V + 7


def test_the_state_of_a_step_precedes_the_ops_at_that_step() -> None:
    plan = Plan(config(op("set_lr", 0.02, {"step": 10}), op("set_lr", 0.03, {"step": 20})), TOKENS)
    assert [ops_applied(plan, step) for step in (0, 9, 10, 11, 20, 21, 40)] == [0, 0, 0, 1, 1, 2, 2]


def test_the_growth_state() -> None:
    cfg = config(op("widen_mlp", 20, {"step": 10}), LOSS)
    plan = Plan(cfg, TOKENS)
    schedules = {"embed.weight": list(ParamSchedule(0.5))}
    assert growth_state(plan, 0, schedules) == {
        "fired": [10],
        "applied": 0,
        "config": plan.segments[0].cfg.model_dump(mode="json"),
        "marks": schedules,
    }
    assert growth_state(plan, 1, {})["config"]["d_ff"] == 20
    assert growth_state(Plan(config(), TOKENS), 0, schedules) == {}
    for step, applied in ((10, 0), (11, 1)):
        assert growth_state_at(plan, step, {"marks": schedules}) == growth_state(plan, applied, schedules)
    assert growth_state_at(plan, 11, {})["marks"] == {}


def test_added_values_of_an_index_map_are_not_kept() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}, **INITIAL), epochs=2))
    run.go(10)
    run.act()
    ((_, since, moved),) = run.growth._recent
    assert since == 10 and all(piece.plus is None for piece in moved.pieces.values())
    assert without_values(moved) == moved


# -- resumed runs


def run_with_ops(*ops: dict[str, Any], at: Iterable[int], **changes: Any) -> Run:
    run = Run(config(*ops, **changes))
    for step in at:
        run.go(step)
        run.act()
    return run


@pytest.mark.parametrize(("preserve", "full"), [("exact", True), ("approx", False)])
def test_only_exact_ops_are_measured_in_full_precision(
    monkeypatch: pytest.MonkeyPatch, preserve: str, full: bool
) -> None:
    full_precision: list[bool] = []
    real = controller.logit_change

    def record(*args: Any, full: bool) -> Any:
        full_precision.append(full)
        return real(*args, full=full)

    monkeypatch.setattr(controller, "logit_change", record)
    run_with_ops(op("widen_mlp", 20, {"step": 10}, preserve=preserve), at=[10])
    assert full_precision == [full]


def test_the_state_is_transferred_once_and_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dry: list[bool] = []
    copies: list[bool] = []
    moves, loads = controller.transfer, Optimizers.load
    monkeypatch.setattr(
        controller,
        "transfer",
        lambda *args, **more: dry.append(more.get("dry", False)) or moves(*args, **more),
    )
    monkeypatch.setattr(
        Optimizers, "load", lambda self, tensors, copy=True: copies.append(copy) or loads(self, tensors, copy)
    )
    run_with_ops(op("widen_mlp", 20, {"step": 10}), at=[10])
    assert dry == [True, False] and copies == [False], "a copy would need the same memory again"


def test_the_growth_state_of_a_new_run() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10})))
    assert (
        run.state.growth_state["fired"],
        run.state.growth_state["applied"],
        run.state.growth_state["marks"],
    ) == ([10], 0, {})
    assert run.growth.losses == [] and Run(config()).state.growth_state == {}


def test_a_loaded_state_records_which_ops_acted() -> None:
    before = run_with_ops(op("widen_mlp", 20, {"step": 10}), LOSS, at=[10])
    before.go(20, 2.0)
    before.growth.decide()
    run = Run(before.growth.cfg, 20, before.state.growth_state)
    assert run.growth.applied == 1 and fired(run) == (10, 20)
    fresh = Run(before.growth.cfg, 20)
    assert fresh.growth.applied == 1 and fired(fresh) == (10,), "without a growth state, the plan decides"
    assert Run(before.growth.cfg, 10).growth.applied == 0
    assert run.state.growth_state["fired"] == [10, 20] and run.state.growth_state["applied"] == 1


@pytest.mark.parametrize(
    ("step", "applied", "recalled"),
    [(10, 0, []), (10, 1, [10]), (11, 1, [10]), (19, 1, [10]), (20, 1, []), (25, 1, []), (11, 0, [])],
)
def test_recent_ops_are_restored(step: int, applied: int, recalled: list[int]) -> None:
    """An op is restored if its copies are still unchecked and the growth state says that it was applied."""
    before = run_with_ops(op("widen_model", {"factor": 2}, {"step": 10}), at=[10], epochs=2)
    run = before
    run.go(step)
    run.state.growth_state["applied"] = applied
    kept = before.growth._recent[0][2]
    run.growth.restore()
    assert [since for _, since, _ in run.growth._recent] == recalled
    for what, _, moved in run.growth._recent:
        assert (
            what.name == "widen_model"
            and moved.pieces.keys() == kept.pieces.keys()
            and moved.old == kept.old
            and moved.new == kept.new
        )
        assert [(n, r.tolist(), f, t.tolist()) for n, r, f, t in moved.copies()] == [
            (n, r.tolist(), f, t.tolist()) for n, r, f, t in kept.copies()
        ]


def test_recent_ops_before_stacking_are_not_restored() -> None:
    run = run_with_ops(
        op("widen_mlp", 20, {"step": 10}), op("set_lr", 0.02, {"step": 11}),
        op("stack_layers", [0, 1, 1], {"step": 12}, **INITIAL),
        op("widen_mlp", 24, {"step": 13}), at=[10, 11, 12, 13], epochs=2,
    )  # fmt: skip
    run.go(14)
    run.growth.restore()
    assert [(what.name, since) for what, since, _ in run.growth._recent] == [
        ("stack_layers", 12),
        ("widen_mlp", 13),
    ]


def test_the_probe_has_four_rows_of_the_context_length() -> None:
    run = Run(config())
    assert run.growth._probe().shape == (4, 8) and run.growth._probe().max() < V
    assert torch.equal(run.growth._probe(), run.growth._probe())
    assert not torch.equal(run.growth._probe(), Run(config(seed=3)).growth._probe())
    assert Run(config(block_size=200)).growth._probe().shape == (4, 128)


def test_an_average_grows_with_the_weights() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}, **INITIAL), ema=0.9))
    run.state.average.differs = True
    shadow = {name: tensor.clone() for name, tensor in run.state.average.shadow.items()}
    with torch.no_grad():
        for p in run.state.model.parameters():
            p.add_(1.0)
    run.go(10)
    run.act()
    average, model = run.state.average, run.state.model
    assert average.differs and torch.equal(average.shadow["embed.weight"], shadow["embed.weight"])
    up = average.shadow["blocks.0.mlp.up.weight"]
    assert up.shape == (20, 8) and torch.equal(up[:12], shadow["blocks.0.mlp.up.weight"])
    assert torch.equal(up[12:], model.get_parameter("blocks.0.mlp.up.weight")[12:]), "the same random values"
    assert not torch.equal(average.shadow["embed.weight"], model.embed.weight) and not up.requires_grad


def test_the_optimizer_gets_the_schedules_of_new_parameters() -> None:
    run = run_with_ops(
        op(
            "stack_layers", [0, 1, 1], {"step": 10}, lr={"rewarm_iters": 4, "new_params_peak": 1.5}, **INITIAL
        ),
        at=[10],
    )
    schedule = ParamSchedule(1.5, since=10, rewarm=4)
    schedules = run.state.optimizers.schedules
    assert schedules and set(schedules.values()) == {schedule}
    assert all(name.startswith("blocks.2.") for name in schedules)
    assert run.state.growth_state["marks"] == {name: list(schedule) for name in schedules}
    before = (run.state.cfg, run.state.optimizers.schedules, [p.shape for p in run.state.model.parameters()])
    other = State(run.growth.cfg, build(run.growth.cfg, V))
    rebuild_model(other, run.state.growth_state)
    assert (other.cfg, other.optimizers.schedules, [p.shape for p in other.model.parameters()]) == before
