"""A schedule carried out on a state that nobody trains: when ops fire, what the journal says, and what a broken word leaves behind."""

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

# 16 tokens a step, 40 steps an epoch, evaluated after 1, 10, 20, 30 and 40
SMALL: dict[str, Any] = TINY | {
    "block_size": 8, "batch_size": 2, "n_layer": 2, "n_head": 2, "d_model": 8, "d_ff": 12, "optimizer": "adamw", "lr": 0.01, "epochs": 1,
    "eval_per_epoch": 4,
}  # fmt: skip
TOKENS = 641
INITIAL: dict[str, Any] = {"init": "identity"}


def op(name: str, value: Any, trigger: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": trigger, **more}


def config(*ops: dict[str, Any], **changes: Any) -> TrainConfig:
    return from_dict(SMALL | {"growth": {"ops": list(ops)}} | changes)


class Follower:
    """A process that does what the first says."""

    leads, compile = True, False

    def any_process(self, flag: bool) -> bool:
        return flag


class Run:
    """A Growth with all that it stands on; `go` takes the state to a step as if it had been trained."""

    def __init__(self, cfg: TrainConfig, step: int = 0, grown: dict[str, Any] | None = None) -> None:
        self.device: Any = Follower()
        self.state = State(cfg, build(cfg, V))
        self.state.step, self.state.growth_state = step, grown or {}
        for p in self.state.model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        self.state.optimizers.step(Plan(cfg, TOKENS).at(0))
        self.rows: list[dict[str, Any]] = []
        self.heard: list[dict[str, Any]] = []
        journal: Any = SimpleNamespace(
            append=self.rows.append, close=lambda: self.rows.append({"event": "closed"})
        )
        self.accounts = Accounts()
        self.growth = Growth(
            cfg, Plan(cfg, TOKENS), self.device, self.state, journal, self.heard.append, self.accounts.clock
        )
        self.scored: list[int] = []

    def go(self, step: int, loss: float | None = None) -> None:
        self.state.step = step
        if loss is not None:
            self.growth.observe_scores([score(step, loss)])

    def evaluate(self) -> list[dict[str, Any]]:
        self.scored.append(self.state.step)
        return [score(self.state.step, 2.5)]

    def act(self) -> bool:
        return self.growth.act(self.evaluate)

    def events(self) -> list[tuple[str, int]]:
        return [(row["event"].removeprefix("OPERATION_"), row["step"]) for row in self.rows]


def score(step: int, loss: float, split: str = "val") -> dict[str, Any]:
    return {"event": "eval", "split": split, "step": step, "loss": loss}


def fired(run: Run) -> tuple[int, ...]:
    return run.growth.plan.fired


# -- scores


def test_only_scores_of_the_split_that_decides_are_heard() -> None:
    run = Run(config())
    run.growth.observe_scores(
        [
            score(10, 3.0),
            score(10, 1.0, "dev"),
            score(1, 4.0),
            {"event": "step", "step": 5, "loss": 2.0, "split": "val"},
        ]
    )
    run.growth.observe_scores([score(20, 2.0), score(10, 3.5)])
    assert run.growth.losses == [(1, 4.0), (10, 3.5), (20, 2.0)] and run.growth.split == "val"
    dev = Run(config(dev_frac=0.1))
    dev.growth.observe_scores([score(10, 3.0), score(10, 1.0, "dev")])
    assert dev.growth.losses == [(10, 1.0)] and dev.growth.split == "dev", "val must not steer a run"


# -- when an op is decided


LOSS = op("set_lr", 0.02, {"loss_below": 3.0})
DECIDED: dict[str, tuple[list[dict[str, Any]], int, float | None, bool, tuple[int, ...]]] = {
    "the loss is below": ([LOSS], 10, 2.99, True, (10,)),
    "equal is not below": ([LOSS], 10, 3.0, False, ()),
    "no evaluation at this step": ([LOSS], 11, 2.0, False, ()),
    "an evaluation that nobody scored": ([LOSS], 10, None, False, ()),
    "two on one loss": ([LOSS, op("set_lr", 0.03, {"loss_below": 9.0})], 10, 2.0, True, (10, 10)),
    "the second waits for a new loss": (
        [LOSS | {"reevaluate": True}, op("set_lr", 0.03, {"loss_below": 9.0})],
        10,
        2.0,
        True,
        (10,),
    ),
    "what an op of the architecture does by itself": (
        [op("widen_mlp", 20, {"loss_below": 3.0}), LOSS],
        10,
        2.0,
        True,
        (10,),
    ),
    "behind a fixed step": ([op("set_lr", 0.03, {"step": 10}), LOSS], 10, 2.0, True, (10, 10)),
    "before its fixed step": ([op("set_lr", 0.03, {"step": 11}), LOSS], 10, 2.0, False, (11,)),
    "a wait that is too short": ([op("set_lr", 0.03, {"wait_iters": 11})], 10, 2.0, False, ()),
    "a wait that is long enough": ([op("set_lr", 0.03, {"wait_iters": 10})], 10, 2.0, True, (10,)),
}


@pytest.mark.parametrize(("ops", "step", "loss", "changed", "plan"), DECIDED.values(), ids=DECIDED)
def test_what_an_evaluation_decides(
    ops: list[dict[str, Any]], step: int, loss: float | None, changed: bool, plan: tuple[int, ...]
) -> None:
    run = Run(config(*ops))
    run.go(step, loss)
    assert run.growth.decide() is changed and fired(run) == plan
    assert run.state.growth_state["fired"] == list(plan), "a checkpoint of this step knows it"
    assert run.growth.decide() is False, "once"


def test_losses_of_later_steps_decide_nothing() -> None:
    run = Run(config(LOSS))
    run.growth.observe_scores([score(10, 3.5), score(20, 2.0)])
    run.go(10)
    assert not run.growth.decide()
    run.go(20)
    assert run.growth.decide() and fired(run) == (20,)


def test_the_first_process_decides_for_all() -> None:
    run = Run(config(LOSS))
    run.device.leads = False
    run.go(10, 2.0)
    assert not run.growth.decide(), "a loss that only this process has is none"
    run.device.any_process = lambda flag: True
    run.growth.plan = Plan(config(LOSS), TOKENS)
    assert run.growth.decide() and fired(run) == (10,)


def test_waiting_is_counted_from_the_last_op() -> None:
    run = Run(config(op("set_lr", 0.03, {"wait_iters": 10}), op("set_lr", 0.04, {"wait_iters": 10})))
    run.go(10, 2.0)
    assert run.growth.decide() and fired(run) == (10,)
    run.go(20, 2.0)
    assert run.growth.decide() and fired(run) == (10, 20)


# -- what acts, and the rows that it leaves


def test_nothing_acts_before_its_step_or_after_the_last() -> None:
    run = Run(config(op("set_lr", 0.02, {"step": 10})))
    run.go(9)
    assert run.growth.pending_op is None and run.act() is False and run.rows == []
    run.go(10)
    assert run.growth.pending_op is not None and run.growth.pending_op.name == "set_lr"
    last = Run(config(op("set_lr", 0.02, {"wait_iters": 40})))
    last.go(40, 2.0)
    last.growth.plan = Plan(last.growth.cfg, TOKENS, (40,))
    assert last.growth.pending_op is None, "there is no step left to act before"


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
    assert run.act() is False and len(run.rows) == 2, "once"
    start, success = run.rows
    sizes = costs(run.growth.cfg, V)
    assert start == {
        "event": "OPERATION_START", "op": "slow", "name": "set_lr", "value": 0.02, "step": 10, "tokens": 160, "ops": 0, "desc": "slower",
        "why": "step 10 >= 10", "loss": 3.25, "seed": run.growth.cfg.growth.ops[0].seed, "preserve": "", **sizes,
    }  # fmt: skip
    assert 0 <= success.pop("seconds") < 60
    assert success == {
        "event": "OPERATION_SUCCESS", "op": "slow", "name": "set_lr", "value": 0.02, "step": 10, "tokens": 160, "checks": [], **sizes,
    }  # fmt: skip
    assert (
        run.growth.look_back() == ["growth: step 10: ops[0] 'set_lr' 0.02"] and run.growth.look_back() == []
    )


def test_an_op_without_a_value_is_named_alone() -> None:
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
        "event": "OPERATION_REEVALUATION", "op": "0-widen_mlp", "name": "widen_mlp", "value": 20, "step": 10, "tokens": 160,
        "loss_before": 3.25, "loss_after": 2.5, "change": -0.75,
    }  # fmt: skip
    sizes = [f"{costs(c, V)['params']:,}" for c in (before, cfg)]
    assert run.growth.look_back() == [
        f"growth: step 10: ops[0] 'widen_mlp' 20: {sizes[0]} -> {sizes[1]} parameters"
    ]
    assert run.accounts.spent["growth"] > 0
    assert run.state.growth_state["applied"] == 1 and run.state.growth_state["config"]["d_ff"] == 20


def test_gradients_and_an_old_model_do_not_outlive_an_op() -> None:
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


def test_the_mode_of_the_transfer_is_the_ops() -> None:
    for mode, kept in (("reset", False), ("keep", True)):
        run = Run(config(op("widen_model", {"factor": 2}, {"step": 10}, optimizer=mode)))
        before = run.state.optimizers.state()["optimizer/embed.weight/exp_avg"].clone()
        run.go(10)
        run.act()
        after = run.state.optimizers.state()
        assert (len(after) > 0) is kept
        assert not kept or torch.equal(after["optimizer/embed.weight/exp_avg"], before.repeat(1, 2))


def test_reset_is_asked_for_no_coverage() -> None:
    run = Run(
        config(op("widen_mlp", 20, {"step": 10}, optimizer={"mode": "reset", "min_coverage": 0.9}, **INITIAL))
    )
    run.go(10)
    assert run.act() is True
    assert run.rows[1]["coverage"] == 0 and run.rows[1]["checks"][4]["detail"].endswith("0.0% is asked for")


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


def test_inserted_layers_are_those_behind_the_first_copy() -> None:
    run = Run(config(op("stack_layers", [0, 0, 1, 1, 0], {"step": 10}, **INITIAL, preserve="none")))
    run.go(10)
    run.act()
    assert [c["detail"] for c in run.rows[1]["checks"] if c["name"] == "layer identity"] == [
        "3 inserted layers"
    ]


def test_a_loss_is_handed_from_op_to_op() -> None:
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
        "after growth nobody knows it"
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


def test_a_reevaluation_is_of_the_split_that_decides() -> None:
    run = Run(config(op("set_lr", 0.02, {"step": 10}, reevaluate=True), dev_frac=0.1))
    run.go(10)
    run.growth.act(lambda: [score(10, 9.0), score(10, 2.0, "dev")])
    assert run.rows[-1]["loss_after"] == 2.0


def test_why_an_op_fired_is_its_condition_or_its_words() -> None:
    run = Run(config(LOSS, op("set_lr", 0.03, {"wait_iters": 0})))
    run.go(10, 2.75)
    run.growth.decide()
    run.act()
    whys = [row["why"] for row in run.rows if row["event"] == "OPERATION_START"]
    assert whys == ["loss 2.7500 < 3", "0 steps since the last op >= 0"]
    late = Run(config(LOSS))
    late.growth.plan = Plan(
        late.growth.cfg, TOKENS, (10,)
    )  # decided by another process, or before its scores were lost
    late.go(10)
    late.act()
    assert late.rows[0]["why"] == "loss < 3"


def test_who_listens_hears_each_row_and_a_run_without_a_journal_has_none() -> None:
    run = Run(config(op("set_lr", 0.02, {"step": 10})))
    heard = run.heard
    run.go(10)
    run.act()
    assert heard == run.rows and len(heard) == 2
    run.growth.close()
    assert run.rows[-1] == {"event": "closed"}
    run.growth.journal = None
    run.growth.log_event({"event": "x"})
    run.growth.close()
    assert heard[-1] == {"event": "x"} and run.rows[-1] == {"event": "closed"}


# -- a word that is not kept


def loud(
    real: Callable[[operators.Change], operators.Pieces],
) -> Callable[[operators.Change], operators.Pieces]:
    return lambda c: {
        n: replace(p, weight=1.5) if n.endswith("down.weight") else p for n, p in real(c).items()
    }


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """widen_mlp changes the function."""
    monkeypatch.setitem(operators.OPS, "widen_mlp", loud(operators.widen_mlp))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.state.tensors().items()}


def test_a_broken_op_aborts_and_nothing_has_changed(broken: None) -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}, **INITIAL)))
    run.go(10, 3.0)
    before, cfg = weights(run), run.state.cfg
    with pytest.raises(UsageError) as e:
        run.act()
    text = str(e.value)
    assert text.startswith(
        "growth: ops[0] 'widen_mlp' did not keep its promise at step 10: function: max |delta logits| "
    )
    assert (
        "; the state before it is kept. Ask less of it (preserve, optimizer.min_coverage), or write on_fail=skip"
        in text
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
        "only what failed"
    )
    assert run.state.growth_state["applied"] == 0 and run.growth.look_back() == []


def test_a_broken_op_is_skipped_and_the_next_one_acts(broken: None) -> None:
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


def test_ops_before_a_skipped_one_stay_as_they_were(broken: None) -> None:
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


def test_an_abort_keeps_what_acted_before_it(broken: None) -> None:
    run = Run(config(op("add_heads", 4, {"step": 10}), op("widen_mlp", 20, {"step": 10}, **INITIAL)))
    run.go(10)
    with pytest.raises(UsageError, match=r"ops\[1\] 'widen_mlp' did not keep its promise"):
        run.act()
    assert run.state.growth_state["applied"] == 1 and run.state.growth_state["config"]["n_head"] == 4


def test_two_broken_words_are_both_named(broken: None) -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}, optimizer={"min_coverage": 1.0}, **INITIAL)))
    run.go(10)
    with pytest.raises(
        UsageError,
        match=r"function: max .*; coverage: \d\d\.\d% of the optimiser's state went over, 100.0% is asked for",
    ):
        run.act()


def test_an_op_that_breaks_off_is_a_check_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def bursts(c: operators.Change) -> operators.Pieces:
        raise MemoryError("no room")

    monkeypatch.setitem(operators.OPS, "widen_mlp", bursts)
    run = Run(config(op("widen_mlp", 20, {"step": 10})))
    run.go(10)
    with pytest.raises(UsageError, match="op: MemoryError: no room"):
        run.act()
    assert run.rows[1]["checks"] == [{"name": "op", "ok": False, "detail": "MemoryError: no room"}]


# -- looking back


def test_copies_that_never_part_are_reported_ten_steps_later() -> None:
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
        and " tensors with copies are locked: blocks.0" in note
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
    assert router["detail"] == "each layer's tokens go to several experts, where it has any"
    run.go(21)
    assert run.growth.look_back() == [], "once"


def test_copies_that_parted_are_only_in_the_journal() -> None:
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


def test_before_layers_move_what_could_not_be_looked_back_on_is() -> None:
    what = op("upcycle_moe", {"experts": 4, "router": "zero"}, {"step": 10}, optimizer="asymmetric")
    run = Run(config(what, op("stack_layers", [0, 1, 1], {"step": 14}, **INITIAL), epochs=2))
    for step in (10, 14):
        run.go(step)
        run.act()
    rows = [row for row in run.rows if row["event"] == "OPERATION_LOOKBACK"]
    assert [(row["name"], row["step"], row["since"]) for row in rows] == [("upcycle_moe", 14, 10)]
    assert rows[0]["checks"][1]["ok"], "after 4 steps a router need not have chosen"
    assert run.events().index(("LOOKBACK", 14)) == run.events().index(("START", 14)) + 1
    run.go(24)
    run.growth.look_back()
    assert [row["name"] for row in run.rows if row["event"] == "OPERATION_LOOKBACK"] == [
        "upcycle_moe",
        "stack_layers",
    ]


def test_ops_at_one_step_are_not_looked_back_on_between_them() -> None:
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


def test_other_ops_leave_what_is_to_be_looked_back_on() -> None:
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
    assert first["detail"].startswith("0 of 0 tensors"), "tensors of another size are not compared"


def test_compiling_again_is_reported_with_its_seconds() -> None:
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


def test_an_operation_on_the_training_compiles_nothing() -> None:
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


# -- figures, and what a state says of its growth


def test_figures_are_of_the_model_after_a_step_and_of_the_flops_so_far() -> None:
    cfg = config(
        op("widen_mlp", 20, {"step": 10}), op("set_batch_size", 4, {"step": 20}), rdrop=0.5, dropout=0.1
    )
    run = Run(cfg)
    narrow, wide = costs(cfg, V), costs(cfg.segment_configs[1], V)
    begun = 10 * 16 * 2 * narrow["flops_per_token"]
    expected = {
        0: (narrow, 0), 5: (narrow, begun // 2), 10: (narrow, begun), 11: (wide, begun + 16 * 2 * wide["flops_per_token"]),
        20: (wide, begun + 160 * 2 * wide["flops_per_token"]), 22: (wide, begun + (160 + 64) * 2 * wide["flops_per_token"]),
    }  # fmt: skip
    for step, (size, flops) in expected.items():
        assert run.growth.figures(step) == {
            "params": size["params"],
            "active": size["active"],
            "flops": flops,
        }, step
    still: Any = Run(config())
    none = make_controller(config(), still.growth.plan, still.device, still.state)
    assert none.figures(10) == {}


def test_the_ids_are_those_of_the_tokenizer() -> None:
    assert Run(config()).growth.vocab_size == V
    run = Run(config(op("resize_vocabulary", SMALL["vocab_size"] + 7, {"step": 10})))
    run.go(10)
    run.act()
    assert run.growth.vocab_size == V and run.state.model.embed.num_embeddings == V + 7


def test_ops_that_act_right_after_a_step_have_not_acted_on_its_state() -> None:
    plan = Plan(config(op("set_lr", 0.02, {"step": 10}), op("set_lr", 0.03, {"step": 20})), TOKENS)
    assert [ops_applied(plan, step) for step in (0, 9, 10, 11, 20, 21, 40)] == [0, 0, 0, 1, 1, 2, 2]


def test_what_a_state_says_of_its_growth() -> None:
    cfg = config(op("widen_mlp", 20, {"step": 10}), LOSS)
    plan = Plan(cfg, TOKENS)
    learns = {"embed.weight": list(ParamSchedule(0.5))}
    assert growth_state(plan, 0, learns) == {
        "fired": [10],
        "applied": 0,
        "config": plan.segments[0].cfg.model_dump(mode="json"),
        "marks": learns,
    }
    assert growth_state(plan, 1, {})["config"]["d_ff"] == 20
    assert growth_state(Plan(config(), TOKENS), 0, learns) == {}
    for step, applied in ((10, 0), (11, 1)):
        assert growth_state_at(plan, step, {"marks": learns}) == growth_state(plan, applied, learns)
    assert growth_state_at(plan, 11, {})["marks"] == {}


def test_what_a_map_adds_is_not_kept() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10}, **INITIAL), epochs=2))
    run.go(10)
    run.act()
    ((_, since, moved),) = run.growth._recent
    assert since == 10 and all(piece.plus is None for piece in moved.pieces.values())
    assert without_values(moved) == moved


# -- going on


def states(*ops: dict[str, Any], at: Iterable[int], **changes: Any) -> Run:
    run = Run(config(*ops, **changes))
    for step in at:
        run.go(step)
        run.act()
    return run


@pytest.mark.parametrize(("preserve", "full"), [("exact", True), ("approx", False)])
def test_an_op_is_measured_in_full_precision_where_it_promises_to_be_exact(
    monkeypatch: pytest.MonkeyPatch, preserve: str, full: bool
) -> None:
    asked: list[bool] = []
    real = controller.delta
    monkeypatch.setattr(controller, "delta", lambda *args, full: asked.append(full) or real(*args, full=full))
    states(op("widen_mlp", 20, {"step": 10}, preserve=preserve), at=[10])
    assert asked == [full]


def test_the_state_moves_once_and_is_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
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
    states(op("widen_mlp", 20, {"step": 10}), at=[10])
    assert dry == [True, False] and copies == [False], "a copy would take as much memory again"


def test_a_new_run_knows_where_it_stands() -> None:
    run = Run(config(op("widen_mlp", 20, {"step": 10})))
    assert (
        run.state.growth_state["fired"],
        run.state.growth_state["applied"],
        run.state.growth_state["marks"],
    ) == ([10], 0, {})
    assert run.growth.losses == [] and Run(config()).state.growth_state == {}


def test_a_state_that_is_loaded_says_which_ops_acted() -> None:
    before = states(op("widen_mlp", 20, {"step": 10}), LOSS, at=[10])
    before.go(20, 2.0)
    before.growth.decide()
    run = Run(before.growth.cfg, 20, before.state.growth_state)
    assert run.growth.applied == 1 and fired(run) == (10, 20)
    fresh = Run(before.growth.cfg, 20)
    assert fresh.growth.applied == 1 and fired(fresh) == (10,), "without a word of it, the plan tells"
    assert Run(before.growth.cfg, 10).growth.applied == 0
    assert run.state.growth_state["fired"] == [10, 20] and run.state.growth_state["applied"] == 1


@pytest.mark.parametrize(
    ("step", "applied", "recalled"),
    [(10, 0, []), (10, 1, [10]), (11, 1, [10]), (19, 1, [10]), (20, 1, []), (25, 1, []), (11, 0, [])],
)
def test_what_was_not_looked_back_on_is_recalled(step: int, applied: int, recalled: list[int]) -> None:
    """An op is recalled when the state says that it acted, also in a run that was stopped between the op and the next step."""
    before = states(op("widen_model", {"factor": 2}, {"step": 10}), at=[10], epochs=2)
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


def test_layers_that_moved_end_what_was_to_be_recalled() -> None:
    run = states(
        op("widen_mlp", 20, {"step": 10}), op("set_lr", 0.02, {"step": 11}), op("stack_layers", [0, 1, 1], {"step": 12}, **INITIAL),
        op("widen_mlp", 24, {"step": 13}), at=[10, 11, 12, 13], epochs=2,
    )  # fmt: skip
    run.go(14)
    run.growth.restore()
    assert [(what.name, since) for what, since, _ in run.growth._recent] == [
        ("stack_layers", 12),
        ("widen_mlp", 13),
    ]


def test_the_probe_is_four_rows_of_the_context() -> None:
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
    assert torch.equal(up[12:], model.get_parameter("blocks.0.mlp.up.weight")[12:]), "by the same draws"
    assert not torch.equal(average.shadow["embed.weight"], model.embed.weight) and not up.requires_grad


def test_the_marks_of_new_parameters_reach_the_optimiser() -> None:
    run = states(
        op(
            "stack_layers", [0, 1, 1], {"step": 10}, lr={"rewarm_iters": 4, "new_params_peak": 1.5}, **INITIAL
        ),
        at=[10],
    )
    mark = ParamSchedule(1.5, since=10, rewarm=4)
    assert run.state.optimizers.schedules and set(run.state.optimizers.schedules.values()) == {mark}
    assert all(name.startswith("blocks.2.") for name in run.state.optimizers.schedules)
    assert run.state.growth_state["marks"] == {name: list(mark) for name in run.state.optimizers.schedules}
    before = (run.state.cfg, run.state.optimizers.schedules, [p.shape for p in run.state.model.parameters()])
    other = State(run.growth.cfg, build(run.growth.cfg, V))
    rebuild_model(other, run.state.growth_state)
    assert (other.cfg, other.optimizers.schedules, [p.shape for p in other.model.parameters()]) == before
