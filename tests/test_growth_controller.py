"""Test in complete runs when operations fire, that interruptions change no bit, and how operations fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, slow_unless, tiny_sets
from test_sharing import Killed, Watch, outcome, reused_steps
from typer.testing import CliRunner

from mainrun.checks import audit
from mainrun.checks.repeat import repeat_ops
from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.core.optimizers import DEFAULT_SCHEDULE, Optimizers, ParamSchedule
from mainrun.errors import Interrupted, MainrunError, UsageError
from mainrun.growth import controller, operators
from mainrun.plan.ops import Rates
from mainrun.plan.triggers import Facts, due
from mainrun.run.session import train
from mainrun.store import checkpoint
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir
from mainrun.train import GPT

# A run has 37 steps, with scores after steps 1, 9, 18, 27, 36 and 37.
SMALL: dict[str, Any] = {
    "num_titles": 200,
    "optimizer": "adamw",
    "lr": 0.01,
    "dropout": 0.1,
    "eval_per_epoch": 4,
    "checkpoint_every": 12,
}


def op(name: str, value: Any = None, trigger: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": trigger or {"step": 5}, **more}


def config(*ops: dict[str, Any], **changes: Any) -> TrainConfig:
    return from_dict(TINY | SMALL | {"growth": {"ops": list(ops)}} | changes)


MANY = (
    op("stack_layers", [0, 0, 1], {"step": 7}, init="identity"),
    op("set_lr", 0.005, {"loss_below": 100.0}),
    op("widen_mlp", 160, {"wait_iters": 5}),
    op("widen_model", {"factor": 2}, {"any": [{"loss_below": 0.1}, {"wait_iters": 9}]}),
    op("set_attn_lora_rank", 4, {"step": 30}),
    op("merge_lora_weights", None, {"step": 33}),
)


def journal(run: Path, event: str = "") -> list[dict[str, Any]]:
    """Return the rows of growth.jsonl without the fields that depend on the time or on shared steps."""
    rows = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "reused")}
        for row in rows
        if row["event"].endswith(event)
    ]


def applied_ops(run: Path) -> list[tuple[str, int]]:
    return [(row["name"], row["step"]) for row in journal(run, "SUCCESS")]


def outcome_with_journal(run: Path) -> dict[str, Any]:
    """Return the results and the journal of a run, which must equal those of a run from scratch."""
    return outcome(run) | {"journal": journal(run)}


# -- when operations fire


def expected_ops(cfg: TrainConfig, run: RunDir) -> list[tuple[str, int]]:
    """Derive the operations and their steps from the losses that the run logged."""
    rows = [
        row
        for row in run.metrics()
        if row["event"] == "eval" and row["split"] == ("dev" if cfg.dev_frac else "val")
    ]
    tokens = {row["step"]: row["tokens"] for row in run.metrics() if row["event"] == "step"}
    losses: list[tuple[int, float]] = []
    ops, fired_ops, last = list(cfg.growth.ops), list[tuple[str, int]](), 0
    for row in rows:
        losses.append((row["step"], row["loss"]))
        while (
            ops
            and due(ops[0].trigger, Facts(row["step"], last, tokens[row["step"]], 10**12, losses))
            and row is not rows[-1]
        ):
            fired, last = ops.pop(0), row["step"]
            fired_ops.append((fired.name, last))
            if fired.reevaluate:
                break
    return fired_ops


EXAMPLE = """
[{"name": "set_lr", "desc": "start", "value": 6e-4, "trigger_loss": 100.0, "max_wait_iters": 1,
  "reevaluate": false},
 {"name": "stack_layers", "desc": "2 -> 4", "value": [0, 0, 1, 1], "trigger_loss": 3.5, "max_wait_iters": 500,
  "reevaluate": true},
 {"name": "widen_mlp", "value": 128, "trigger_loss": 3.2, "max_wait_iters": 500, "reevaluate": true},
 {"name": "set_attn_lora_rank", "value": 8, "trigger_loss": 2.8, "max_wait_iters": 1000, "reevaluate": true},
 {"name": "stack_layers", "desc": "drop layer 0", "value": [1, 1, 2, 3], "trigger_loss": 2.5,
  "max_wait_iters": 1000, "reevaluate": true}]
"""


@pytest.mark.slow
def test_the_original_example_runs_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(EXAMPLE)
    sets = tiny_sets(
        growth=file,
        num_titles=2000,
        vocab_size=300,
        d_ff=64,
        optimizer="adamw",
        lr=3e-3,
        epochs=12,
        eval_per_epoch=8,
        dev_frac=0.1,
    )
    process = subprocess.run(
        [sys.executable, "-m", "mainrun", "train", "--preset", "baseline", *sets, "--out",
            str(tmp_path / "runs"), "--no-store", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert file.read_text() == EXAMPLE, "the schedule file is not written"
    summary = json.loads(process.stdout)
    run = tmp_path / "runs" / summary["run"]
    cfg = RunDir(run).config()
    assert applied_ops(run) == expected_ops(cfg, RunDir(run))
    assert [name for name, _ in applied_ops(run)] == [
        "set_lr",
        "stack_layers",
        "widen_mlp",
        "set_attn_lora_rank",
        "stack_layers",
    ]
    again = journal(run, "REEVALUATION")
    assert [row["name"] for row in again] == [
        "stack_layers",
        "widen_mlp",
        "set_attn_lora_rank",
        "stack_layers",
    ]
    assert all(row["change"] == row["loss_after"] - row["loss_before"] for row in again)
    assert abs(again[1]["change"]) < 1e-4 and abs(again[2]["change"]) < 1e-4, (
        "these two operations keep the function"
    )
    assert abs(again[0]["change"]) > 1e-4, "copied layers change the function"


def test_ops_fire_at_the_right_evaluation(whole: Any) -> None:
    run = whole(config(*MANY))
    assert applied_ops(run) == [
        ("stack_layers", 7), ("set_lr", 9), ("widen_mlp", 18), ("widen_model", 27),
        ("set_attn_lora_rank", 30), ("merge_lora_weights", 33),
    ]  # fmt: skip
    sizes = [row["params"] for row in RunDir(run).metrics() if row["event"] == "eval"]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    summary = RunDir(run).summary()
    assert summary is not None
    segments = summary["segments"]
    assert [part["begins"] for part in segments] == [0, 7, 9, 18, 27, 30, 33]
    assert sum(part["tokens"] for part in segments) == summary["tokens"]
    assert summary["flops"] == sum(part["flops"] for part in segments)
    assert summary["params"] == segments[-1]["params"], "the summary counts the grown model"
    last = [row for row in RunDir(run).metrics() if row["event"] == "eval"][-1]
    assert (last["params"], last["flops"]) == (summary["params"], summary["flops"])


def test_a_reevaluation_fires_no_op(tmp_path: Path) -> None:
    """After an operation with `reevaluate`, the next operation waits for another evaluation."""
    for reevaluate, second in ((False, 9), (True, 18)):
        first = op("widen_mlp", 160, {"wait_iters": 5}, reevaluate=reevaluate)
        cfg = config(first, op("widen_mlp", 192, {"loss_below": 100.0}), seed=int(reevaluate))
        train(cfg, tmp_path)
        assert applied_ops(tmp_path / cfg.run_id) == [("widen_mlp", 9), ("widen_mlp", second)]


def test_the_journal_records_what_an_op_kept(tmp_path: Path) -> None:
    cfg = config(
        op("stack_layers", [0, 0, 1], {"step": 4}, init="identity"),
        op("widen_model", {"factor": 2}, {"step": 8}),
    )
    train(cfg, tmp_path)
    deeper, wider = journal(tmp_path / cfg.run_id, "SUCCESS")
    assert deeper["delta_logits"] == 0 and 0 < wider["delta_logits"] < 1e-4
    assert 0.5 < deeper["coverage"] < 1 and wider["coverage"] == 1
    assert wider["params"] > deeper["params"]
    assert [row["event"] for row in journal(tmp_path / cfg.run_id)][:3] == [
        "OPERATION_START",
        "OPERATION_SUCCESS",
        "OPERATION_REEVALUATION",
    ]
    back = journal(tmp_path / cfg.run_id, "LOOKBACK")
    assert [check["name"] for check in back[-1]["checks"]] == ["symmetry", "router"]
    assert {check["name"]: check["ok"] for check in deeper["checks"]} == dict.fromkeys(
        ("function", "tying", "rope", "layer identity", "coverage", "groups"), True
    )


# -- equal bits after interruptions


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TrainConfig], Path]:
    """Return a function that trains a config without an interruption. Each config is trained only once."""
    out = tmp_path_factory.mktemp("whole")

    def run(cfg: TrainConfig) -> Path:
        if not (out / cfg.run_id / "summary.json").exists():
            train(cfg, out)
        return out / cfg.run_id

    return run


@pytest.mark.parametrize("at", slow_unless([9, 20], [3, 8, 9, 20, 27, 31]))
def test_a_killed_run_grows_to_the_same_bits(tmp_path: Path, whole: Any, at: int) -> None:
    cfg = config(*MANY, ema=0.5 if at % 2 else 0.0)

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        train(cfg, tmp_path, progress=Watch({at: kill}))
    train(cfg, tmp_path)
    assert outcome_with_journal(tmp_path / cfg.run_id) == outcome_with_journal(whole(cfg))


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((1, 6, 7, 8, 9, 17, 18, 27, 30, 33), id="at every op"),
        pytest.param(range(1, 37), id="between any two steps", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_often_keeps_the_bits(tmp_path: Path, whole: Any, stops: Sequence[int]) -> None:
    cfg = config(*MANY)
    for step in stops:
        with pytest.raises(Interrupted):
            train(cfg, tmp_path, until=step)
    train(cfg, tmp_path)
    assert outcome_with_journal(tmp_path / cfg.run_id) == outcome_with_journal(whole(cfg))


KILLER = """
import os, signal, sys
from mainrun.growth import controller
nth, before = int(sys.argv.pop(1)), sys.argv.pop(1) == "before"
real, calls = controller.grow, []

def grow(*args):
    calls.append(1)
    if len(calls) == nth and before:
        os.kill(os.getpid(), signal.SIGKILL)
    found = real(*args)
    if len(calls) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

controller.grow = grow
from mainrun.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("store", [False, True])
def test_kill_9_in_the_middle_of_an_op(tmp_path: Path, store: bool) -> None:
    cfg = config(*MANY, preset="baseline")
    file = tmp_path / "growth.json"
    file.write_text(str(cfg.growth))
    sets = tiny_sets(**SMALL | {"growth": file})
    arguments = ["train", "--preset", "baseline", *sets, "--out", str(tmp_path / "cut")]
    arguments += ["--store", str(tmp_path / "store")] if store else ["--no-store"]
    for nth, when in ((1, "before"), (1, "after"), (2, "before"), (3, "after"), (1, "after")):
        process = subprocess.run(
            [sys.executable, "-c", KILLER, str(nth), when, *arguments], capture_output=True, text=True
        )
        assert process.returncode in (-signal.SIGKILL, 0), process.stderr
    process = subprocess.run(
        [sys.executable, "-m", "mainrun", *arguments, "--json"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    run = tmp_path / "cut" / json.loads(process.stdout)["run"]
    train(RunDir(run).config(), tmp_path / "whole")
    assert outcome_with_journal(run) == outcome_with_journal(tmp_path / "whole" / run.name)


# -- sharing


def test_a_run_reuses_a_grown_run_from_the_store(tmp_path: Path, whole: Any) -> None:
    cfg = config(*MANY, ema=0.5)
    store = Store(tmp_path / "store")
    train(cfg, tmp_path / "first", store=store)
    train(cfg, tmp_path / "second", store=store)
    first, second = (tmp_path / name / cfg.run_id for name in ("first", "second"))
    assert reused_steps(second) == list(range(1, 38))
    assert outcome_with_journal(first) == outcome_with_journal(second) == outcome_with_journal(whole(cfg))


@pytest.mark.parametrize("later", [20, pytest.param(33, marks=pytest.mark.slow)])
def test_runs_that_grow_at_different_steps_share_the_steps_before(
    tmp_path: Path, whole: Any, later: int
) -> None:
    early, late = (
        config(op("widen_mlp", 160, {"step": step}), op("set_lr", 0.001, {"loss_below": 100.0}))
        for step in (15, later)
    )
    store = Store(tmp_path / "store")
    for cfg in (early, late):
        train(cfg, tmp_path, store=store)
        assert outcome_with_journal(tmp_path / cfg.run_id) == outcome_with_journal(whole(cfg))
    assert reused_steps(tmp_path / late.run_id) == list(range(1, 16))


def test_a_run_reuses_no_step_after_a_different_decision(tmp_path: Path) -> None:
    """At step 18, one of two runs grows and the other does not. The runs share the steps up to 18."""
    store = Store(tmp_path / "store")
    fires = config(op("widen_mlp", 160, {"any": [{"loss_below": 0.01}, {"wait_iters": 18}]}))
    never = config(op("widen_mlp", 160, {"loss_below": 0.01}))
    for cfg in (never, fires):
        train(cfg, tmp_path / "shared", store=store)
        train(cfg, tmp_path / "alone")
        assert outcome_with_journal(tmp_path / "shared" / cfg.run_id) == outcome_with_journal(
            tmp_path / "alone" / cfg.run_id
        )
    assert reused_steps(tmp_path / "shared" / fires.run_id) == list(range(1, 19))
    assert applied_ops(tmp_path / "shared" / never.run_id) == [] and applied_ops(
        tmp_path / "shared" / fires.run_id
    ) == [("widen_mlp", 18)]


def test_the_audit_trains_a_grown_node_again(tmp_path: Path) -> None:
    cfg = config(*MANY)
    store = Store(tmp_path / "store")
    train(cfg, tmp_path / "runs", store=store)
    findings = list(audit.audit(store, 1000, seed=0))
    assert len(findings) >= 4 and {finding.status for finding in findings} == {"same"}, findings


# -- failed operations


def broken_widen_mlp(c: operators.Change) -> operators.Pieces:
    """Widen the MLP incorrectly: scale its output weights by 1.5."""
    pieces = operators.widen_mlp(c)
    return {
        n: replace(p, weight=p.weight * 1.5) if n.endswith("down.weight") else p for n, p in pieces.items()
    }


def test_a_broken_op_ends_the_run_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(op("widen_mlp", 160, {"step": 14}))
    with monkeypatch.context() as patch:
        patch.setitem(operators.OPS, "widen_mlp", broken_widen_mlp)
        with pytest.raises(
            MainrunError,
            match=r"ops\[0\] 'widen_mlp' failed a check at step 14: function: max \|delta logits\|",
        ):
            train(cfg, tmp_path)
    run = tmp_path / cfg.run_id
    assert [row["event"] for row in journal(run)] == ["OPERATION_START", "OPERATION_ERROR"]
    newest = checkpoint.load_newest(run / "checkpoints", lambda meta: None, lambda text: None)
    assert (
        newest is not None
        and newest[1]["step"] == 14
        and newest[0]["model/blocks.0.mlp.up.weight"].shape == (128, 32)
    )
    # With the correct operation, the run resumes and has the same journal as a run from scratch.
    train(cfg, tmp_path)
    train(cfg, tmp_path / "alone")
    assert outcome(run) == outcome(tmp_path / "alone" / cfg.run_id)


def test_a_skipped_op_leaves_the_run_as_it_would_be_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = op("stack_layers", [0, 0, 1], {"wait_iters": 8}, init="identity")
    cfg = config(op("widen_mlp", 160, {"step": 14}, on_fail="skip"), more)
    store = Store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setitem(operators.OPS, "widen_mlp", broken_widen_mlp)
        train(cfg, tmp_path, store=store)
    run = tmp_path / cfg.run_id
    assert [row["event"] for row in journal(run)][:2] == ["OPERATION_START", "OPERATION_ERROR"]
    assert applied_ops(run) == [("stack_layers", 9)] or applied_ops(run) == [("stack_layers", 18)]
    alone = config(more)
    train(alone, tmp_path)
    a, b = (RunDir(tmp_path / c.run_id).summary() for c in (cfg, alone))
    assert a is not None and b is not None
    assert a["params"] == b["params"] and a["steps"] == b["steps"]
    train(cfg, tmp_path / "again", store=store)  # the operation is correct again, so it is applied
    assert applied_ops(tmp_path / "again" / cfg.run_id)[0] == ("widen_mlp", 14)


def test_too_little_coverage_ends_the_run(tmp_path: Path) -> None:
    cfg = config(
        op("stack_layers", [0, 0, 1, 1], {"step": 14}, init="identity", optimizer={"min_coverage": 0.99})
    )
    with pytest.raises(MainrunError, match=r"coverage: .*99.0% is required.*optimizer.min_coverage"):
        train(cfg, tmp_path)


def failing_op(c: operators.Change) -> operators.Pieces:
    raise OverflowError("too large")


@pytest.mark.parametrize("on_fail", ["abort", "skip"])
def test_an_op_that_raises_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_fail: str) -> None:
    cfg = config(op("widen_mlp", 160, {"step": 14}, on_fail=on_fail))
    monkeypatch.setitem(operators.OPS, "widen_mlp", failing_op)
    with (
        pytest.raises(UsageError, match="op: OverflowError: too large")
        if on_fail == "abort"
        else nullcontext()
    ):
        train(cfg, tmp_path)
    assert [row["event"] for row in journal(tmp_path / cfg.run_id)] == ["OPERATION_START", "OPERATION_ERROR"]


def test_the_loss_before_an_op_belongs_to_the_state_at_that_step(tmp_path: Path) -> None:
    """Before the first evaluation, no loss is known. An op uses the loss after an earlier op at its step."""
    ops = [
        op("widen_mlp", 160, {"step": 5}),
        op("widen_mlp", 192, {"step": 9}),
        op("widen_mlp", 256, {"step": 9}),
    ]
    cfg = config(*ops)
    train(cfg, tmp_path)
    one, two, three = journal(tmp_path / cfg.run_id, "REEVALUATION")
    assert (one["step"], two["step"], three["step"]) == (5, 9, 9)
    assert one["loss_before"] is None and one["change"] is None
    assert abs(two["change"]) < 1e-5 and three["loss_before"] == two["loss_after"]


def test_a_later_op_does_not_hide_copies_that_stay_equal(tmp_path: Path) -> None:
    """Copies without noise stay equal. A run checks them after 10 steps, or just before it stacks layers."""
    wide = op("widen_model", {"factor": 2}, {"step": 4})
    after = {
        "frozen": op("freeze_layer", 0, {"step": 7}),
        "deeper": op("stack_layers", [0, 0, 1], {"step": 7}, init="identity"),
    }
    for name, other in {"alone": None, **after}.items():
        watch = Watch()
        cfg = config(*filter(None, (wide, other)), optimizer="sgd", momentum=0.0)
        train(cfg, tmp_path / name, progress=watch)
        rows = journal(tmp_path / name / cfg.run_id, "LOOKBACK")
        assert rows[0]["name"] == "widen_model" and rows[0]["step"] == (7 if name == "deeper" else 14)
        assert len(rows) == (1 if name == "alone" else 2)
        assert not rows[0]["checks"][0]["ok"], name
        assert watch.noted("after ops[0] 'widen_model'") and watch.noted("copies are still equal")
        assert watch.noted("growth: step 4: ops[0] 'widen_model'")


def test_verify_reports_missing_and_forged_rows_of_the_journal(tmp_path: Path) -> None:
    cfg = config(
        op("stack_layers", [0, 0, 1], {"step": 4}, init="identity"), op("widen_mlp", 160, {"step": 8})
    )
    train(cfg, tmp_path)
    run = RunDir(tmp_path / cfg.run_id)
    complete_journal = (run.path / "growth.jsonl").read_text().splitlines()
    assert all(result.ok and result.same for result in repeat_ops(run, None))
    (run.path / "growth.jsonl").write_text(
        "".join(f"{row}\n" for row in complete_journal if "widen_mlp" not in row)
    )
    assert {result.name for result in repeat_ops(run, None) if not result.same} == {"widen_mlp"}
    forged = complete_journal[1].replace("0-stack_layers", "7-stack_layers")
    (run.path / "growth.jsonl").write_text("".join(f"{row}\n" for row in [*complete_journal, forged]))
    assert [result.check for result in repeat_ops(run, None) if not result.same] == ["journal"]


@pytest.mark.slow
def test_the_journal_records_the_recompilation(tmp_path: Path) -> None:
    cfg = config(op("widen_mlp", 160, {"step": 4}), compile="on", n_layer=1, epochs=1)
    train(cfg, tmp_path)
    (row,) = [
        json.loads(line)
        for line in (tmp_path / cfg.run_id / "growth.jsonl").read_text().splitlines()
        if "RECOMPILE" in line
    ]
    summary = RunDir(tmp_path / cfg.run_id).summary()
    assert summary is not None and 0 < row["seconds"] < summary["spent"]["compile"] and row["step"] == 5


# -- learning rates of new parameters


def test_new_tensors_warm_up_and_widened_ones_get_lower_rates(tmp_path: Path) -> None:
    rewarm = {"rewarm_iters": 4, "new_params_peak": 1.5}
    cfg = config(
        op("stack_layers", [0, 0, 1], {"step": 10}, init="identity", lr=rewarm),
        op("widen_model", {"factor": 2}, {"step": 20}, lr={"width_rule": "adam_1_over_n"}),
    )
    seen: dict[int, dict[str, tuple[float, float]]] = {}
    real = Optimizers.set_rates

    def watch(self: Optimizers, inputs: Any, step: int) -> None:
        real(self, inputs, step)
        seen[step] = {
            self.names[p]: (g["lr"] / inputs.lr, g["weight_decay"]) for g in self.groups for p in g["params"]
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizers, "set_rates", watch)
        train(cfg, tmp_path)
    assert {rate for rate, _ in seen[9].values()} == {1.0}
    rates = [seen[step]["blocks.1.mlp.up.weight"][0] for step in range(10, 16)]
    assert rates == pytest.approx([0.375, 0.75, 1.125, 1.5, 1.5, 1.5])
    assert {
        seen[step][name][0]
        for step in range(10, 20)
        for name in ("blocks.0.mlp.up.weight", "blocks.2.mlp.up.weight")
    } == {1.0}
    assert seen[20]["blocks.0.mlp.up.weight"][0] == 0.5 and seen[20]["embed.weight"][0] == 1.0
    assert seen[20]["blocks.1.mlp.up.weight"][0] == 0.75, "both rules apply"
    with pytest.raises(Interrupted):
        train(cfg, tmp_path / "cut", until=22)
    train(cfg, tmp_path / "cut")
    assert outcome_with_journal(tmp_path / "cut" / cfg.run_id) == outcome_with_journal(
        tmp_path / cfg.run_id
    ), "a checkpoint contains the schedules of the parameters"


def test_a_default_schedule_makes_no_group() -> None:
    cfg = config()
    model = GPT(cfg, 29)
    plain = [len(group["params"]) for group in Optimizers(cfg, model).groups]
    assert plain == [
        len(group["params"]) for group in Optimizers(cfg, model, {"embed.weight": DEFAULT_SCHEDULE}).groups
    ]
    marked = Optimizers(cfg, model, {"embed.weight": ParamSchedule(lr=0.5)})
    assert len(marked.groups) == len(plain) + 1
    assert Rates() == Rates(0, 1.0, "none")


# -- averages


def test_an_average_grows_with_the_same_random_numbers(tmp_path: Path) -> None:
    """Evaluation uses the averaged weights, so an exact operation does not change the score."""
    cfg = config(op("widen_model", {"factor": 2, "noise_snr_db": 10}, {"step": 18}), ema=0.9)
    train(cfg, tmp_path)
    (row,) = journal(tmp_path / cfg.run_id, "REEVALUATION")
    assert abs(row["change"]) < 1e-5
    assert row["loss_before"] is not None


def test_a_checkpoint_records_how_its_state_grew(tmp_path: Path) -> None:
    cfg = config(op("widen_mlp", 160, {"step": 14}))
    train(cfg, tmp_path)
    newest = checkpoint.load_newest(
        tmp_path / cfg.run_id / "checkpoints", lambda meta: None, lambda text: None
    )
    assert newest is not None
    tensors, meta = newest
    assert (
        meta["growth"]["config"]["d_ff"] == 160
        and meta["growth"]["fired"] == [14]
        and meta["growth"]["applied"] == 1
    )
    assert tensors["model/blocks.0.mlp.up.weight"].shape == torch.Size((160, 32))


# -- the staged preset


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of the preset `staged-demo`, trained with a store."""
    folder = tmp_path_factory.mktemp("staged")
    process = subprocess.run(
        [sys.executable, "-m", "mainrun", "train", "--preset", "staged-demo", "--out", str(folder), "--quiet",
            "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder / str(json.loads(process.stdout)["run"])


@pytest.mark.slow
def test_the_staged_preset_runs_and_is_verified(staged: Path) -> None:
    assert applied_ops(staged) == [
        ("upcycle_moe", 10), ("set_lr", 10), ("widen_model", 20), ("set_lr", 20), ("set_batch_size", 20),
        ("stack_layers", 30),
        ("set_lr", 30), ("set_batch_size", 30),
    ]  # fmt: skip
    summary = RunDir(staged).summary()
    assert summary is not None
    trained = [part for part in summary["segments"] if part["ends"] > part["begins"]]
    assert all(part["ends"] - part["begins"] >= 10 for part in trained) and len(trained) == 4
    assert [row["delta_logits"] == 0 for row in journal(staged, "SUCCESS") if "delta_logits" in row] == [
        True,
        False,
        True,
    ]
    verification = subprocess.run(
        [sys.executable, "-m", "mainrun", "grow", "verify", str(staged), "--json"],
        capture_output=True,
        text=True,
    )
    assert verification.returncode == 0, verification.stderr
    checks = [(f["name"], f["check"]) for f in json.loads(verification.stdout) if f["ok"] and f["same"]]
    assert {
        ("widen_model", "rope"),
        ("widen_model", "router scale"),
        ("widen_model", "symmetry"),
        ("stack_layers", "layer identity"),
    } <= set(checks)


def with_changed_pieces(name: str, change: Any) -> Any:
    """Return an operation whose pieces are changed.

    `change` receives the name and the piece of each parameter and returns the new piece.
    """
    real = operators.OPS[name]

    def op(c: operators.Change) -> operators.Pieces:
        return {n: change(n, piece) for n, piece in real(c).items()}

    return op


FAULTS: dict[str, tuple[str, Any]] = {
    "router scale": ("widen_model", lambda n, p: replace(p, weight=1.0) if ".router." in n else p),
    "layer identity": ("stack_layers", lambda n, p: _unsilenced(n, p)),
    "symmetry": ("widen_model", lambda n, p: replace(p, plus=None)),
}


def _unsilenced(name: str, piece: Any) -> Any:
    """Make an inserted layer keep the output weights of its source layer."""
    return replace(piece, source="blocks.3.attn.o.weight") if name == "blocks.4.attn.o.weight" else piece


@pytest.mark.slow
@pytest.mark.parametrize("check", FAULTS)
def test_each_check_of_the_staged_preset_can_fail(
    staged: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    name, change = FAULTS[check]
    monkeypatch.setitem(operators.OPS, name, with_changed_pieces(name, change))
    store = Store(staged.parent / ".store")
    if check == "symmetry":  # this check needs some steps of training
        results = list(repeat_ops(RunDir(staged), store))
        assert [result.name for result in results if result.check == check and not result.ok] == [name]
    else:
        with pytest.raises(MainrunError, match=rf"{name!r} failed a check.*{check}: "):
            list(repeat_ops(RunDir(staged), store))


@pytest.mark.slow
def test_a_changed_rotary_table_fails(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = controller.grow

    def turned(*args: Any) -> Any:
        new, moved = real(*args)
        new.cos = new.get_buffer("cos").roll(1, 0)
        return new, moved

    monkeypatch.setattr(controller, "grow", turned)
    with pytest.raises(MainrunError, match=r"'upcycle_moe' failed a check.*rope: "):
        list(repeat_ops(RunDir(staged), Store(staged.parent / ".store")))


@pytest.mark.parametrize("arguments", [["nowhere"], ["PLAIN"]])
def test_verify_names_a_directory_without_growth(tmp_path: Path, arguments: list[str]) -> None:
    cfg = from_dict(TINY | SMALL)
    train(cfg, tmp_path)
    place = str(tmp_path / cfg.run_id) if arguments == ["PLAIN"] else str(tmp_path / "nowhere")
    result = CliRunner().invoke(app, ["grow", "verify", place])
    assert result.exit_code in (1, 2) and place in result.output + (result.stderr or "")
