"""The bench: a plain rival that is plain, workers that take turns and never outlive their parent, parts that sum to the whole."""

from __future__ import annotations

import ast
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_sets

from mainrun.bench import gpu, lineage, parts, plain, step, worker
from mainrun.config import TrainConfig, from_dict
from mainrun.core.device import Device
from mainrun.errors import MainrunError, UsageError
from mainrun.plan.cost import costs
from mainrun.plan.plan import Plan
from mainrun.run import batch
from mainrun.run.session import train
from mainrun.store.rundir import RunDir
from mainrun.train import build
from mainrun.ui.estimate import Trial

ROOT = Path(__file__).parents[1]

# -- the plain loop


def plain_model(cfg: TrainConfig) -> plain.PlainGPT:
    torch.manual_seed(0)
    return plain.PlainGPT(cfg, cfg.vocab_size)


def test_the_plain_loop_stands_on_nothing_of_ours() -> None:
    tree = ast.parse((ROOT / "mainrun/bench/plain.py").read_text())
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in found if name and name.startswith("mainrun")} == {"mainrun.config"}


def test_the_plain_model_has_the_baselines_size(tiny: Any) -> None:
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


def test_the_plain_model_sees_no_future(tiny: Any) -> None:
    cfg = tiny()
    model, (x, _) = plain_model(cfg).eval(), worker.random_batch(cfg, "cpu")
    changed = x.clone()
    changed[:, 9] = 3
    same = (model(x) == model(changed)).flatten(2).all(-1).all(0)
    assert same[:9].all() and not same[9]


@pytest.mark.parametrize(("field", "sites"), [("dropout", 1), ("attn_dropout", 2), ("resid_dropout", 4)])
def test_the_plain_model_drops_at_every_site(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, field: str, sites: int
) -> None:
    cfg = tiny(**{"dropout": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0} | {field: 0.25})
    model, seen = plain_model(cfg), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, args, out: seen.append(m.p))
    model(worker.random_batch(cfg, "cpu")[0])
    assert sorted(seen) == [0.0] * (7 - sites) + [0.25] * sites


# -- the floor and the parts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_accum": 4, "dropout": 0.1, "rdrop": 0.5},
        {"mlp": "swiglu", "n_kv_head": 1, "tie_head": False},
    ],
)
def test_the_floor_holds_every_product_of_a_step(tiny: Any, changes: dict[str, Any]) -> None:
    cfg = tiny(**changes)
    floor = parts.Floor(cfg, cfg.vocab_size, torch.device("cpu"))
    attention = 12 * cfg.n_layer * cfg.d_model * cfg.block_size
    tokens = cfg.batch_size * cfg.block_size * cfg.passes
    assert floor.flops == tokens * (costs(cfg, cfg.vocab_size)["flops_per_token"] - attention)
    spent = floor.step()
    assert set(spent) == {"layers", "head"} and min(spent.values()) > 0


def test_the_floors_products_are_those_of_a_linear_layer() -> None:
    x, w, y = (torch.randn(*shape) for shape in ((8, 3), (5, 3), (8, 5)))
    dx, dy, dw = torch.empty_like(x), torch.empty_like(y), torch.empty_like(w)
    parts.Floor._once(x, w, y, dx, dy, dw)
    x.requires_grad_()
    w.requires_grad_()
    out = torch.nn.functional.linear(x, w)
    out.backward(y)
    assert torch.allclose(dy, out) and torch.allclose(dx, x.grad) and torch.allclose(dw, w.grad)  # type: ignore[arg-type]


def shares(cfg: TrainConfig) -> dict[str, float]:
    trial = Trial(cfg, Device(cfg), Plan(cfg, 10_000), cfg.vocab_size)
    x, y = worker.random_batch(cfg, "cpu")
    trial.step(x, y)
    return parts.shares(lambda: trial.step(x, y), trial.stepper.runner)


def test_the_parts_sum_to_the_step(tiny: Any) -> None:
    found = shares(tiny(dropout=0.1, optimizer="adamw", compile="off", attention="plain"))
    assert list(found) == list(parts.PARTS)
    assert sum(found.values()) == pytest.approx(1)
    assert all(share > 0.001 for share in found.values()), found


def test_what_a_step_lacks_takes_no_time(tiny: Any) -> None:
    assert shares(tiny(dropout=0.0, compile="off"))["dropout"] == 0


def test_each_part_is_what_it_is_called(tiny: Any) -> None:
    """A config that is nearly all one part has nearly all of its time there."""
    small = {
        "compile": "off",
        "attention": "plain",
        "vocab_size": 300,
        "n_layer": 1,
        "d_model": 8,
        "n_head": 1,
        "batch_size": 4,
    }
    assert shares(tiny(**small | {"d_model": 512, "batch_size": 16}))["GEMM"] > 0.4
    assert shares(tiny(**small | {"block_size": 1024}))["attention"] > 0.5
    dropped = shares(tiny(**small | {"block_size": 1024, "attn_dropout": 0.1}))
    assert dropped["dropout"] > 0.01, (
        dropped
    )  # 0.03 to 0.17, by machine and load; exactly 0 without dropout (above)
    wide = {"vocab_size": 40_000, "tie_head": False, "batch_size": 16, "label_smoothing": 0.1}
    assert shares(tiny(**small | wide))["loss"] > 0.2
    assert (
        shares(tiny(**small | {"d_model": 256, "batch_size": 1, "block_size": 2, "optimizer": "muon"}))[
            "optimiser"
        ]
        > 0.3
    )


def test_profiling_leaves_nothing_behind(tiny: Any) -> None:
    before = (parts.Masks.drop, parts.Device.masks)
    model = build(tiny(), 400)
    with parts.marked(model):
        assert (parts.Masks.drop, parts.Device.masks) != before
    assert (parts.Masks.drop, parts.Device.masks) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::addmm", "GEMM"), ("mkldnn::_linear_pointwise", "GEMM"), ("aten::bmm", "attention"), ("aten::_softmax", "attention"),
        ("aten::_log_softmax", "loss"), ("CrossEntropyBackward", "loss"), ("aten::_fused_adamw_", "optimiser"),
        ("graph_0_cpp_fused_native_layer_norm_3", "norm"), ("aten::bernoulli_", "dropout"), ("aten::mul", None),
    ],
)  # fmt: skip
def test_an_operation_is_known_by_its_name(name: str, part: str | None) -> None:
    assert parts.part_of(name) == part


# -- workers

FAKE = """
import json, os, sys
request = json.loads(sys.argv[1])
def say(**what): print(json.dumps(what), flush=True)
say(ready=True, warmup_seconds=1.0, allocator=os.environ.get("MAINRUN_ALLOCATOR", "tuned"), params=7, flops=100, memory_estimate=50,
    machine_class={}, dtype="bfloat16", compile=False)
for line in sys.stdin:
    with open(%r, "a") as log: print(request["rival"], os.environ.get("MAINRUN_ALLOCATOR", ""), line.strip(), file=log)
    %s
    if line == "end\\n":
        say(peak=60, profile={"GEMM": 1.0}, evaluation={"tokens_per_s": 900.0, "loss": 2.0, "loss_float32": 2.01}); break
    say(seconds=0.5, layers=0.1, head=0.1)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """fake(code): workers that answer at once, run `code` at each word they hear, and keep a log of the words."""
    log = tmp_path / "words"

    def install(code: str = "pass") -> Path:
        monkeypatch.setattr(step, "WORKER", [sys.executable, "-c", FAKE % (str(log), code)])
        return log

    return install


def test_rivals_take_turns(tiny: Any, fake: Any) -> None:
    log = fake()
    found = step.measure(tiny(), rivals=True, repeats=3)
    words = [line.rsplit(" ", 1) for line in log.read_text().splitlines()]
    turns = [who for who, word in words if word == "step"]
    every = {"plain default", "plain ", "ours default", "ours ", "floor "}
    assert [set(turns[i : i + 5]) for i in (0, 5, 10)] == [every] * 3
    assert len({turns[i] for i in (0, 5, 10)}) == 3, "another one begins each round"
    assert [word for _, word in words[15:]] == ["end"] * 5, "no peak is read before all steps are done"
    assert [row["rival"] for row in found["rivals"]] == [*step.RIVALS, step.OURS, step.FLOOR]
    assert [row["allocator"] for row in found["rivals"]] == ["default", "tuned", "default", "tuned", "tuned"]


def test_alone_it_runs_ours_and_the_floor(tiny: Any, fake: Any) -> None:
    fake()
    assert [row["rival"] for row in step.measure(tiny(), rivals=False, repeats=1)["rivals"]] == [
        step.OURS,
        step.FLOOR,
    ]


def answers(*seconds: float) -> list[dict[str, Any]]:
    return [{"seconds": s, "layers": s / 2, "head": s / 2} for s in seconds]


def test_the_figures_follow_from_the_answers(tiny: Any) -> None:
    cfg = tiny()  # 8 x 16 tokens
    took = {
        "plain, tuned allocator": answers(4, 9, 5),
        step.OURS: answers(2, 1, 4),
        step.FLOOR: answers(1, 1, 1),
    }
    known = {"warmup_seconds": 3, "params": 7, "flops": 100, "memory_estimate": 50, "machine_class": {}}
    evaluation = {"tokens_per_s": 96.0, "loss": 2.0, "loss_float32": 2.002}
    end = {"peak": 60, "profile": {"GEMM": 1.0}, "evaluation": evaluation}
    found = step.result(
        cfg, took, dict.fromkeys(took, known), {name: json.loads(json.dumps(end)) for name in took}
    )
    rival, ours, floor = found["rivals"]
    assert (ours["seconds"], ours["seconds_min"], ours["seconds_max"]) == (2, 1, 4)
    assert (ours["tokens_per_s"], ours["floor_share"], rival["ours_is"]) == (64, 0.5, 2.5)
    assert floor["peak"] is None and rival["peak"] == 60
    assert found["memory"] == {"peak": 60, "estimate": 50, "ratio": 1.2}
    assert found["evaluation"]["of_forward_share"] == 2, "64 tokens/s of a step are 192 of its forward"
    assert found["evaluation"]["bf16_error"] == pytest.approx(0.002) and not found["evaluation"]["bf16_close"]
    assert found["step_flops_per_s"] == 50 and found["floor"]["flops_per_s"] == 100
    json.dumps(found)
    head, lines = step.table(found)
    assert all(len(line) == len(head) for line in lines) and "x2.50" in lines[0]
    text = "\n".join(step.lines(found))
    assert "x1.20" in text and "NOT within" in text and "x2.00 the time" in text


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("sys.exit('no such luck')", MainrunError, "the worker of 'mainrun' ended with code 1: no such luck"),
        ("os.kill(os.getpid(), 9)", MainrunError, "was killed, most likely for want of memory"),
        ("os.close(1); sys.exit(3)", MainrunError, "ended with code 3: it said nothing"),
        ("say(error='n_head=7 is odd', exit_code=2)", UsageError, "n_head=7 is odd"),
        ("say(error='it broke', exit_code=1)", MainrunError, "it broke"),
    ],
)
def test_a_worker_that_dies_is_an_error_and_no_hang(
    tiny: Any, fake: Any, code: str, error: type[Exception], said: str
) -> None:
    fake(code)
    with pytest.raises(error, match=said) as caught:
        step.measure(tiny(), rivals=False, repeats=1)
    assert type(caught.value) is error


def gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_no_worker_outlives_a_ctrl_c(tiny: Any, fake: Any) -> None:
    fake("import time; time.sleep(60)")
    found = None

    def interrupted() -> None:
        nonlocal found
        with step.start("x", "ours", True, tiny()) as found:
            found.listen()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert found is not None and found.process.returncode == -signal.SIGKILL


def test_no_worker_outlives_a_parent_that_was_killed(tiny: Any, tmp_path: Path) -> None:
    """The parent has no chance to end it: it notices by itself, though it waits for the next word or is busy."""
    request = json.dumps({"rival": "plain", "config": tiny().model_dump()})
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "mainrun.bench.worker", {request!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid, 0.3)
    finally:
        parent.kill()
        parent.wait()
    assert gone(pid)


def test_a_worker_speaks_json_and_nothing_else(tiny: Any) -> None:
    cfg = tiny(dtype="bfloat16", dropout=0.1, compile="off")
    with step.start("x", "ours", True, cfg, evaluate=True, profile=True) as found:
        ready = found.listen()
        answer, end = found.ask("step"), found.ask("end")
    assert ready["params"] == sum(p.numel() for p in build(cfg, cfg.vocab_size).parameters())
    assert 0 < answer["seconds"] < 60 and abs(answer["loss"] - math.log(cfg.vocab_size)) < 0.5
    assert end["peak"] > 100e6 and sum(end["profile"].values()) == pytest.approx(1)
    evaluation = end["evaluation"]
    assert evaluation["tokens_per_s"] > 0 and 0 < abs(evaluation["loss"] - evaluation["loss_float32"]) < 1e-3


def test_a_worker_that_hears_nonsense_says_so(tiny: Any) -> None:
    with step.start("x", "floor", True, tiny()) as found:
        found.listen()
        with pytest.raises(UsageError, match="heard 'stop'; it knows step and end"):
            found.ask("stop")


@pytest.mark.slow
def test_the_rivals_for_real(tiny: Any) -> None:
    found = step.measure(tiny(compile="off"), rivals=True, repeats=2)
    for row in found["rivals"]:
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        if row["rival"] != step.FLOOR:
            assert (
                row["allocator"].startswith("default" if "default" in row["rival"] else "glibc")
                or sys.platform != "linux"
            )


def test_the_parent_needs_no_torch() -> None:
    code = "import mainrun.bench.step, mainrun.bench.gpu, sys; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
        == "False\n"
    )


# -- the GPU's commands, as far as a machine without one can see


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mainrun", "bench", "gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no GPU: torch sees none here; run this on a machine with one\n"


def test_the_stated_peak_is_the_devices() -> None:
    assert gpu.stated_peak("NVIDIA H200") == 989e12
    assert gpu.stated_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.stated_peak("NVIDIA H100 PCIe") == 756e12
    assert gpu.stated_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu.stated_peak("NVIDIA GeForce RTX 3060") is None


def test_two_runs_are_compared_to_the_bit(tiny: Any, tmp_path: Path) -> None:
    cfg = tiny(num_titles=200)
    for out in ("a", "b"):
        train(cfg, tmp_path / out)
    a, b = (RunDir(tmp_path / out / cfg.run_id) for out in ("a", "b"))
    assert gpu.differences(a, b) == []
    lines = (b.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (b.path / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert "rows" in gpu.differences(a, b)[0]
    row = json.loads(lines[0])
    lines[0] = json.dumps(row | {"loss": math.nextafter(row["loss"], 9)}) + "\n"
    (b.path / "metrics.jsonl").write_text("".join(lines))
    (named,) = gpu.differences(a, b)
    assert named.startswith("step at step 1")
    summary = json.loads((b.path / "summary.json").read_text())
    (b.path / "summary.json").write_text(json.dumps(summary | {"weights": "other"}))
    assert len(gpu.differences(a, b)) == 2


@pytest.mark.slow
def test_a_whole_run_is_timed(tmp_path: Path) -> None:
    sets = [text for text in tiny_sets() if text != "--set"]
    found = gpu.run("baseline", sets, tmp_path, lambda text: None)
    assert found["wall_seconds"] > sum(found["spent"].values()) > 0
    assert gpu.only_run(tmp_path).summary() is not None
    with pytest.raises(MainrunError, match="ended with code 2: error: n_head=7"):
        gpu.run("baseline", [*sets, "n_head=7"], tmp_path, lambda text: None)


# -- what sharing saves


def test_the_studies_train_the_least_and_change_no_bit(tiny) -> None:
    small = {
        "num_titles": 200,
        "n_layer": 1,
        "optimizer": "adamw",
        "lr": 0.01,
        "dropout": 0.1,
        "eval_per_epoch": 0,
        "compile": "off",
    }
    rows = lineage.measure(tiny(**small), studies=(1, 2, 3, 4), trials=3)
    assert [(row["study"], row["way"]) for row in rows] == [
        ("1", "known at once"), ("1", "one by one"), ("1 and 2", "known at once"), ("1 and 2", "one by one"),
        ("3", "successive halving"), ("4", "known at once"), ("4", "one by one"),
    ]  # fmt: skip
    for row in rows:
        assert (
            row["differ"] == [] and row["compared"] >= 1 and row["trained"] == row["fewest"] <= row["asked"]
        ), row
        assert (
            row["seconds"] > 0
            and row["scratch_seconds"] > 0
            and row["saving"] == row["asked"] / row["trained"]
        )
    assert rows[2]["fewest"] < rows[2]["asked"]
    head, lines = lineage.table(rows)
    assert {len(line) for line in lines} == {len(head)} and lines[0][-1] == "same (3)"


def test_a_bit_that_differs_is_shown(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "num_titles": 200,
        "n_layer": 1,
        "optimizer": "adamw",
        "lr": 0.01,
        "eval_per_epoch": 0,
        "compile": "off",
    }
    true, calls = lineage.final_bits, []
    monkeypatch.setattr(
        lineage, "final_bits", lambda run: calls.append(run) or f"{true(run)}{len(calls) == 2}"
    )
    (row, _) = lineage.measure(tiny(**small), studies=(4,), trials=1)
    assert len(row["differ"]) == 1 and lineage.table([row])[1][0][-1] == "1 differ"


def test_the_studies_are_those_that_are_written_down(tiny) -> None:
    base = from_dict(lineage.SMALL)
    first, second = (lineage.late_change(base, starts) for starts in (lineage.STARTS, lineage.MOVED))
    assert len(first) == len(second) == 192 and len({cfg.run_id for cfg in first + second}) == 288
    assert len({cfg.run_id for cfg in lineage.piecewise(base)}) == 128
    chains = batch.resolve({cfg.run_id: cfg for cfg in first + second}.values())[1]

    def saving(configs: list[TrainConfig]) -> float:
        asked = sum(len(chains[cfg.run_id]) - 1 for cfg in configs)
        return asked / len({key for cfg in configs for key in chains[cfg.run_id][1:]})

    assert saving(first) > 4.81 and saving(first + second) > 6.77


@pytest.mark.slow
def test_what_the_store_takes_is_measured() -> None:
    found = lineage.overheads()
    assert set(found) == {"copy", "save", "load", "bytes", "list_10000", "look_up_100000"} and all(
        value > 0 for value in found.values()
    )
    assert len(list(lineage.lines(found))) == 4
