"""Test the benchmarks of the plain loop, the parts of a step, the GPU and the savings from sharing."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import queue
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_sets
from typer.testing import CliRunner

from mainrun.bench import gpu, lineage, parts, plain, step, worker
from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.core.device import Device
from mainrun.errors import MainrunError, UsageError
from mainrun.plan.cost import costs
from mainrun.plan.plan import Plan
from mainrun.run import batch
from mainrun.run import summary as summaries
from mainrun.run.session import train
from mainrun.store.rundir import RunDir
from mainrun.train import build
from mainrun.ui.estimate import StepProbe

ROOT = Path(__file__).parents[1]

# -- the plain loop


def plain_model(cfg: TrainConfig) -> plain.PlainGPT:
    torch.manual_seed(0)
    return plain.PlainGPT(cfg, cfg.vocab_size)


def test_the_plain_loop_imports_only_the_config() -> None:
    tree = ast.parse((ROOT / "mainrun/bench/plain.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name and name.startswith("mainrun")} == {"mainrun.config"}


def test_the_plain_model_has_as_many_parameters_as_the_baseline(tiny: Any) -> None:
    cfg = tiny()
    ours = sum(p.numel() for p in build(cfg, cfg.vocab_size).parameters())
    assert sum(p.numel() for p in plain_model(cfg).parameters()) == ours


def test_the_plain_loop_learns(tiny: Any) -> None:
    cfg = tiny(dropout=0.0)
    model = plain_model(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = worker.random_batch(cfg, "cpu")
    losses = [plain.plain_step(model, optimizer, x, y, 1.0) for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(cfg.vocab_size), abs=0.1)
    assert losses[-1] < losses[0] / 2


def test_the_plain_model_does_not_see_the_future(tiny: Any) -> None:
    cfg = tiny()
    model = plain_model(cfg).eval()
    x, _ = worker.random_batch(cfg, "cpu")
    changed = x.clone()
    changed[:, 9] = 3
    same = (model(x) == model(changed)).flatten(2).all(-1).all(0)
    assert same[:9].all() and not same[9]


@pytest.mark.parametrize(("field", "sites"), [("dropout", 1), ("attn_dropout", 2), ("resid_dropout", 4)])
def test_the_plain_model_has_dropout_at_every_site(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, field: str, sites: int
) -> None:
    cfg = tiny(**{"dropout": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0} | {field: 0.25})
    model = plain_model(cfg)
    rates: list[float] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, args, out: rates.append(m.p))
    model(worker.random_batch(cfg, "cpu")[0])
    assert sorted(rates) == [0.0] * (7 - sites) + [0.25] * sites


# -- the floor and the parts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_accum": 4, "dropout": 0.1, "rdrop": 0.5},
        {"mlp": "swiglu", "n_kv_head": 1, "tie_head": False},
    ],
)
def test_the_floor_contains_every_matrix_product_of_a_step(tiny: Any, changes: dict[str, Any]) -> None:
    cfg = tiny(**changes)
    floor = parts.Floor(cfg, cfg.vocab_size, torch.device("cpu"))
    attention = 12 * cfg.n_layer * cfg.d_model * cfg.block_size
    tokens = cfg.batch_size * cfg.block_size * cfg.passes
    assert floor.flops == tokens * (costs(cfg, cfg.vocab_size)["flops_per_token"] - attention)
    seconds = floor.step()
    assert set(seconds) == {"layers", "head"} and min(seconds.values()) > 0


def test_the_products_of_the_floor_are_those_of_a_linear_layer() -> None:
    x = torch.randn(8, 3)
    w = torch.randn(5, 3)
    y = torch.randn(8, 5)
    dx = torch.empty_like(x)
    dy = torch.empty_like(y)
    dw = torch.empty_like(w)
    parts.Floor.multiply(x, w, y, dx, dy, dw)
    x.requires_grad_()
    w.requires_grad_()
    out = torch.nn.functional.linear(x, w)
    out.backward(y)
    assert torch.allclose(dy, out) and torch.allclose(dx, x.grad) and torch.allclose(dw, w.grad)  # type: ignore[arg-type]


def shares(cfg: TrainConfig) -> dict[str, float]:
    probe = StepProbe(cfg, Device(cfg), Plan(cfg, 10_000), cfg.vocab_size)
    x, y = worker.random_batch(cfg, "cpu")
    probe.step(x, y)
    return parts.shares(lambda: probe.step(x, y), probe.train_step.runners)


def test_the_shares_sum_to_one(tiny: Any) -> None:
    measured = shares(tiny(dropout=0.1, optimizer="adamw", compile="off", attention="plain"))
    assert list(measured) == list(parts.PARTS)
    assert sum(measured.values()) == pytest.approx(1)
    assert all(share > 0.001 for share in measured.values()), measured


def test_a_step_without_dropout_spends_no_time_on_it(tiny: Any) -> None:
    assert shares(tiny(dropout=0.0, compile="off"))["dropout"] == 0


def test_each_part_dominates_a_config_that_consists_of_it(tiny: Any) -> None:
    small = {
        "compile": "off",
        "attention": "plain",
        "vocab_size": 300,
        "n_layer": 1,
        "d_model": 8,
        "n_head": 1,
        "batch_size": 4,
    }
    matrices = {"d_model": 512, "batch_size": 16}
    assert shares(tiny(**small | matrices))["GEMM"] > 0.4
    assert shares(tiny(**small | {"block_size": 1024}))["attention"] > 0.5
    dropped = shares(tiny(**small | {"block_size": 1024, "attn_dropout": 0.1}))
    # The measured share ranges from 0.03 to 0.17, depending on the machine and its load.
    assert dropped["dropout"] > 0.01, dropped
    wide = {"vocab_size": 40_000, "tie_head": False, "batch_size": 16, "label_smoothing": 0.1}
    assert shares(tiny(**small | wide))["loss"] > 0.1  # measured shares: 0.2 to 0.53
    muon = {"d_model": 256, "batch_size": 1, "block_size": 2, "optimizer": "muon"}
    assert shares(tiny(**small | muon))["optimizer"] > 0.3


def test_profiling_removes_its_hooks(tiny: Any) -> None:
    before = (parts.Masks.drop, parts.Device.masks)
    model = build(tiny(), 400)
    with parts.labelled(model):
        assert (parts.Masks.drop, parts.Device.masks) != before
    assert (parts.Masks.drop, parts.Device.masks) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::addmm", "GEMM"),
        ("mkldnn::_linear_pointwise", "GEMM"),
        ("aten::bmm", "attention"),
        ("aten::_softmax", "attention"),
        ("aten::_log_softmax", "loss"),
        ("CrossEntropyBackward", "loss"),
        ("aten::_fused_adamw_", "optimizer"),
        ("graph_0_cpp_fused_native_layer_norm_3", "norm"),
        ("aten::bernoulli_", "dropout"),
        ("aten::mul", None),
    ],
)
def test_the_name_of_an_operation_decides_its_part(name: str, part: str | None) -> None:
    assert parts.part_of(name) == part


# -- workers

FAKE = """
import json, os, sys
request = json.loads(sys.argv[1])
allocator = os.environ.get("MAINRUN_ALLOCATOR", "")
def answer(**content): print(json.dumps(content), flush=True)
answer(ready=True, warmup_seconds=1.0, allocator=allocator or "tuned", params=7, flops=100,
       memory_estimate=50, machine_class={}, dtype="bfloat16", compile=False)
for line in sys.stdin:
    with open(%r, "a") as log: print(request["rival"], allocator, line.strip(), file=log)
    %s
    if line == "end\\n":
        evaluation = {"tokens_per_s": 900.0, "loss": 2.0, "loss_float32": 2.01}
        answer(peak=60, profile={"GEMM": 1.0}, evaluation=evaluation); break
    answer(seconds=0.5, layers=0.1, head=0.1)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that installs fake workers. Each worker logs requests, runs `code` and answers."""
    log = tmp_path / "words"

    def install(code: str = "pass") -> Path:
        monkeypatch.setattr(step, "WORKER", [sys.executable, "-c", FAKE % (str(log), code)])
        return log

    return install


def test_rivals_take_turns(tiny: Any, fake: Any) -> None:
    log = fake()
    report = step.measure(tiny(), rivals=True, repeats=3)
    words = [line.rsplit(" ", 1) for line in log.read_text().splitlines()]
    turns = [rival for rival, word in words if word == "step"]
    every = {"plain default", "plain ", "ours default", "ours ", "floor "}
    assert [set(turns[i : i + 5]) for i in (0, 5, 10)] == [every] * 3
    assert len({turns[i] for i in (0, 5, 10)}) == 3, "each round begins with another rival"
    assert [word for _, word in words[15:]] == ["end"] * 5, "no peak is read before all steps have finished"
    assert [row["rival"] for row in report["rivals"]] == [*step.RIVALS, step.OURS, step.FLOOR]
    assert [row["allocator"] for row in report["rivals"]] == ["default", "tuned", "default", "tuned", "tuned"]


def test_without_rivals_only_mainrun_and_the_floor_run(tiny: Any, fake: Any) -> None:
    fake()
    report = step.measure(tiny(), rivals=False, repeats=1)
    assert [row["rival"] for row in report["rivals"]] == [step.OURS, step.FLOOR]


def answers(*seconds: float) -> list[dict[str, Any]]:
    return [{"seconds": s, "layers": s / 2, "head": s / 2} for s in seconds]


def test_the_figures_are_computed_from_the_answers(tiny: Any) -> None:
    cfg = tiny()  # a batch has 8 x 16 tokens
    steps = {
        "plain, tuned allocator": answers(4, 9, 5),
        step.OURS: answers(2, 1, 4),
        step.FLOOR: answers(1, 1, 1),
    }
    ready = {"warmup_seconds": 3, "params": 7, "flops": 100, "memory_estimate": 50, "machine_class": {}}
    evaluation = {"tokens_per_s": 96.0, "loss": 2.0, "loss_float32": 2.002}
    end = {"peak": 60, "profile": {"GEMM": 1.0}, "evaluation": evaluation}
    report = step.make_report(cfg, steps, dict.fromkeys(steps, ready), dict.fromkeys(steps, end))
    rival, ours, floor = report["rivals"]
    assert (ours["seconds"], ours["seconds_min"], ours["seconds_max"]) == (2, 1, 4)
    assert (ours["tokens_per_s"], ours["floor_share"], rival["ours_is"]) == (64, 0.5, 2.5)
    assert floor["peak"] is None and rival["peak"] == 60
    assert report["memory"] == {"peak": 60, "estimate": 50, "ratio": 1.2}
    evaluation = report["evaluation"]
    assert evaluation["of_forward_share"] == 2, "64 tokens/s of steps are 192 tokens/s of forward passes"
    assert evaluation["bf16_error"] == pytest.approx(0.002) and not evaluation["bf16_close"]
    assert report["step_flops_per_s"] == 50 and report["floor"]["flops_per_s"] == 100
    json.dumps(report)
    head, lines = step.table(report)
    assert all(len(line) == len(head) for line in lines) and "x2.50" in lines[0]
    text = "\n".join(step.lines(report))
    assert "x1.20" in text and "NOT within" in text and "x2.00 the time" in text


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("sys.exit('bad')", MainrunError, "the worker of 'mainrun' ended with exit code 1: bad"),
        ("os.kill(os.getpid(), 9)", MainrunError, "was killed, most likely because the memory was full"),
        ("os.close(1); sys.exit(3)", MainrunError, "ended with exit code 3: it printed nothing"),
        ("answer(error='n_head=7 is odd', exit_code=2)", UsageError, "n_head=7 is odd"),
        ("answer(error='it broke', exit_code=1)", MainrunError, "it broke"),
    ],
)
def test_a_worker_that_ends_early_is_an_error(
    tiny: Any, fake: Any, code: str, error: type[Exception], message: str
) -> None:
    fake(code)
    with pytest.raises(error, match=message) as caught:
        step.measure(tiny(), rivals=False, repeats=1)
    assert type(caught.value) is error


def ended(pid: int, seconds: float = 10) -> bool:
    """Wait for a process to end. Return False if the process is still running at the time limit."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_ends_after_a_ctrl_c(tiny: Any, fake: Any) -> None:
    fake("import time; time.sleep(60)")
    with ExitStack() as stack:
        started = stack.enter_context(step.start("x", "ours", True, tiny()))
        started.listen()
        with pytest.raises(KeyboardInterrupt), stack.pop_all():
            raise KeyboardInterrupt
    assert started.process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_is_killed(tiny: Any, tmp_path: Path) -> None:
    """A worker must exit when its stdin is closed, because a killed parent cannot stop it."""
    request = json.dumps({"rival": "plain", "config": tiny().model_dump()})
    code = f"""
import subprocess, sys, time
command = [sys.executable, "-m", "mainrun.bench.worker", {request!r}]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not ended(pid, 0.3)
    finally:
        parent.kill()
        parent.wait()
    assert ended(pid)


def test_a_worker_answers_in_json_only(tiny: Any) -> None:
    cfg = tiny(dtype="bfloat16", dropout=0.1, compile="off")
    with step.start("x", "ours", True, cfg, evaluate=True, profile=True) as started:
        ready = started.listen()
        answer = started.ask("step")
        end = started.ask("end")
    assert ready["params"] == sum(p.numel() for p in build(cfg, cfg.vocab_size).parameters())
    assert 0 < answer["seconds"] < 60 and abs(answer["loss"] - math.log(cfg.vocab_size)) < 0.5
    assert end["peak"] > 100e6 and sum(end["profile"].values()) == pytest.approx(1)
    evaluation = end["evaluation"]
    assert evaluation["tokens_per_s"] > 0 and 0 < abs(evaluation["loss"] - evaluation["loss_float32"]) < 1e-3


def test_a_worker_refuses_an_unknown_word(tiny: Any, one_thread: None) -> None:
    words: queue.Queue[str] = queue.Queue()
    words.put("stop")
    with pytest.raises(UsageError, match="got the command 'stop', but accepts only step and end"):
        worker.serve({"rival": "floor", "config": tiny().model_dump()}, words, io.StringIO())


def test_a_worker_that_is_refused_answers_with_the_error(tiny: Any) -> None:
    with step.start("x", "floor", True, tiny().model_copy(update={"n_head": 7})) as started:
        with pytest.raises(UsageError, match="n_head=7"):
            started.listen()
        assert started.process.wait(60) == 2


@pytest.mark.slow
def test_real_rivals(tiny: Any) -> None:
    report = step.measure(tiny(compile="off"), rivals=True, repeats=2)
    for row in report["rivals"]:
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        if row["rival"] != step.FLOOR and sys.platform == "linux":
            assert row["allocator"].startswith("default" if "default" in row["rival"] else "glibc")


def test_the_parent_does_not_import_torch() -> None:
    code = "import mainrun.bench.step, mainrun.bench.gpu, sys; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == "False\n"


# -- bench gpu without a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_gpu_needs_a_gpu() -> None:
    result = CliRunner().invoke(app, ["bench", "gpu"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: torch finds no GPU; run this command on a machine with a GPU\n"


def test_the_name_of_a_gpu_decides_its_stated_peak() -> None:
    assert gpu.stated_peak("NVIDIA H200") == 989e12
    assert gpu.stated_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.stated_peak("NVIDIA H100 PCIe") == 756e12
    assert gpu.stated_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu.stated_peak("NVIDIA GeForce RTX 3060") is None


def test_two_runs_are_compared_to_the_bit(tiny: Any, tmp_path: Path) -> None:
    cfg = tiny(num_titles=200)
    for out in ("a", "b"):
        train(cfg, tmp_path / out)
    a = RunDir(tmp_path / "a" / cfg.run_id)
    b = RunDir(tmp_path / "b" / cfg.run_id)
    assert gpu.differences(a, b) == []
    lines = (b.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (b.path / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert "rows" in gpu.differences(a, b)[0]
    row = json.loads(lines[0])
    lines[0] = json.dumps(row | {"loss": math.nextafter(row["loss"], 9)}) + "\n"
    (b.path / "metrics.jsonl").write_text("".join(lines))
    (difference,) = gpu.differences(a, b)
    assert difference.startswith("step at step 1")
    summary = json.loads((b.path / "summary.json").read_text())
    (b.path / "summary.json").write_text(json.dumps(summary | {"weights": "other"}))
    assert len(gpu.differences(a, b)) == 2


@pytest.mark.slow
def test_the_time_of_a_whole_run_is_measured(tmp_path: Path) -> None:
    sets = [text for text in tiny_sets() if text != "--set"]
    row = gpu.run("baseline", sets, tmp_path, lambda text: None)
    assert row["wall_seconds"] > sum(row["spent"].values()) > 0
    assert gpu.only_run(tmp_path).summary() is not None
    with pytest.raises(MainrunError, match="ended with exit code 2: error: n_head=7"):
        gpu.run("baseline", [*sets, "n_head=7"], tmp_path, lambda text: None)


# -- the savings from sharing steps


def test_the_studies_train_the_fewest_steps_and_change_no_bit(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summaries, "guards", lambda evidence: [])
    small = {
        "num_titles": 120,
        "n_layer": 1,
        "optimizer": "adamw",
        "lr": 0.01,
        "dropout": 0.1,
        "eval_per_epoch": 0,
        "compile": "off",
    }
    rows = lineage.measure(tiny(**small), studies=(1, 2, 3, 4), trials=2)
    assert [(row["study"], row["way"]) for row in rows] == [
        ("1", "known at once"), ("1", "one by one"), ("1 and 2", "known at once"), ("1 and 2", "one by one"),
        ("3", "successive halving"), ("4", "known at once"), ("4", "one by one"),
    ]  # fmt: skip
    for row in rows:
        assert row["differ"] == [] and row["compared"] >= 1, row
        assert row["trained"] == row["fewest"] <= row["asked"], row
        assert row["seconds"] > 0 and row["scratch_seconds"] > 0
        assert row["saving"] == row["asked"] / row["trained"]
    assert rows[2]["fewest"] < rows[2]["asked"]
    head, lines = lineage.table(rows)
    assert {len(line) for line in lines} == {len(head)} and lines[0][-1] == "same (2)"


def test_a_run_with_other_bits_is_reported(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "num_titles": 200,
        "n_layer": 1,
        "optimizer": "adamw",
        "lr": 0.01,
        "eval_per_epoch": 0,
        "compile": "off",
    }
    real_bits = lineage.final_bits
    calls: list[RunDir] = []

    def final_bits(run: RunDir) -> str:
        calls.append(run)
        return f"{real_bits(run)}{len(calls) == 2}"  # the second call returns a different value

    monkeypatch.setattr(lineage, "final_bits", final_bits)
    (row, _) = lineage.measure(tiny(**small), studies=(4,), trials=1)
    assert len(row["differ"]) == 1 and lineage.table([row])[1][0][-1] == "1 differ"


def test_the_studies_have_the_documented_trials() -> None:
    base = from_dict(lineage.SMALL)
    first = lineage.late_change(base, lineage.STARTS)
    second = lineage.late_change(base, lineage.MOVED)
    assert len(first) == len(second) == 192 and len({cfg.run_id for cfg in first + second}) == 288
    assert len({cfg.run_id for cfg in lineage.piecewise(base)}) == 128
    chains = batch.resolve({cfg.run_id: cfg for cfg in first + second}.values())[1]

    def saving(configs: list[TrainConfig]) -> float:
        requested = sum(len(chains[cfg.run_id]) - 1 for cfg in configs)
        return requested / len({key for cfg in configs for key in chains[cfg.run_id][1:]})

    assert saving(first) > 4.81 and saving(first + second) > 6.77


@pytest.mark.slow
def test_the_overheads_of_the_store_are_measured() -> None:
    overheads = lineage.overheads()
    assert set(overheads) == {"copy", "save", "load", "bytes", "list_10000", "look_up_100000"}
    assert min(overheads.values()) > 0
    assert len(list(lineage.lines(overheads))) == 4
