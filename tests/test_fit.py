"""`mainrun train --dry-run --fit`: the largest micro-batch that fits into the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_sets
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.core import device as device_module
from mainrun.core import hardware
from mainrun.data.lengths import check_lengths
from mainrun.errors import ConfigError, UsageError
from mainrun.train import Setup, set_up
from mainrun.ui import fit as module
from mainrun.ui.estimate import configs_of
from mainrun.ui.fit import fit, fit_rows, largest, prove, rates_for, smallest_grad_accum

SMALL: dict[str, Any] = {"compile": "off", "attention": "plain", "lr": 0.01, "lr_aux": 0.004}


def setup(**changes: Any) -> Setup:
    return set_up(from_dict(TINY | SMALL | changes))


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the slow estimate of the memory: a row of a layer takes 1 MB, and the rest takes 100 MB."""

    def memory_of(configs: list[TrainConfig], device: Any, vocab_size: int, store: bool) -> int:
        rows = [cfg.batch_size // cfg.grad_accum * cfg.passes * cfg.n_layer for cfg in configs]
        return (100 + max(rows)) * 10**6

    monkeypatch.setattr(module, "memory_of", memory_of)


def dry_run(*options: str, **changes: Any) -> Any:
    sets = tiny_sets(**{"compile": "off"} | changes)
    return CliRunner().invoke(app, ["train", "--preset", "baseline", *sets, "--dry-run", *options])


# -- the search


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(0, 400))
def test_the_largest_number_is_found_for_every_rising_memory(steps: list[int], usable: int) -> None:
    memory = [sum(steps[: i + 1]) for i in range(len(steps))]
    asked = []

    def of(rows: int) -> int:
        asked.append(rows)
        return memory[rows - 1]

    expected = sum(1 for each in memory if each <= usable)
    assert largest(of, usable, len(memory)) == expected
    assert min(asked) >= 1


def test_a_linear_memory_needs_few_estimates() -> None:
    asked = []
    assert largest(lambda rows: asked.append(rows) or 500 + 7 * rows, 500 + 7 * 900 + 3, 10_000) == 900
    assert len(set(asked)) <= 9, "six powers of four, and two numbers at the border"


# -- the facts


@pytest.mark.usefixtures("linear")
def test_the_largest_micro_batch_uses_the_memory_up_to_the_margin() -> None:
    one = setup(batch_size=64, num_titles=3000)
    result = fit(one, store=False, memory=167_000_000)
    assert (result["memory"], result["margin"], result["usable"]) == (167_000_000, 0.1, 150_300_000)
    assert (result["largest_micro_batch"], result["largest_memory"]) == (25, 150_000_000)
    assert (result["grad_accum"], result["micro_batch"], result["set"]) == (4, 16, "--set grad_accum=4")
    assert result["micro_batch_memory"] == 132_000_000 and not result["all_of_train"]
    assert not result["proved"] and "--probe" in result["why_not_proved"]
    facts = {"limited_by": None, "steps": set_up(one.cfg.changed(batch_size=25)).plan.steps, "why_not": ""}
    assert result["largest_batch"] == rates_for(one.cfg, 25) | facts


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, 100),
        ({"rdrop": 1.0, "dropout": 0.1}, 50),
        ({"growth": {"ops": [{"name": "stack_layers", "value": [0, 0, 1, 1], "trigger": {"step": 3}}]}}, 50),
    ],
)
def test_passes_and_grown_models_count(fields: dict[str, Any], rows: int) -> None:
    result = fit(setup(**fields), store=False, memory=334_000_000)
    assert result["largest_micro_batch"] == rows


@pytest.mark.usefixtures("linear")
def test_train_limits_the_rows() -> None:
    one = setup()
    result = fit(one, store=False, memory=10**12)
    rows = (one.plan.train_tokens - 1) // 16
    assert result["largest_micro_batch"] == rows and result["all_of_train"] and result["grad_accum"] == 1
    assert "train has no more rows" in dict(fit_rows(one.cfg, result, 1))["fit: largest micro-batch"]
    set_up(one.cfg.changed(batch_size=rows, official_geometry="8x16"))
    with pytest.raises(ConfigError, match=r"train has .* lower batch_size"):
        set_up(one.cfg.changed(batch_size=rows + 1, official_geometry="8x16"))


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize(
    ("fields", "dev_tokens", "limit"),
    [
        ({}, 0, "val"),
        ({"dev_frac": 0.5, "val_frac": 0.5}, 200, "dev"),
        ({"official_geometry": "8x16"}, 0, None),
    ],
)
def test_the_largest_batch_is_one_that_the_run_accepts(
    fields: dict[str, Any], dev_tokens: int, limit: str | None
) -> None:
    one = setup(**fields)
    if dev_tokens:
        one.data.splits["dev"] = one.data.splits["dev"][:dev_tokens]
    batch = fit(one, store=False, memory=10**12)["largest_batch"]
    assert batch["limited_by"] == limit
    rows = batch["batch_size"]
    if limit:
        assert rows == (len(one.data.splits[limit]) - 1) // 16
    else:
        assert rows == (one.plan.train_tokens - 1) // 16
    check_lengths(one.cfg.changed(batch_size=rows), one.data.splits)
    with pytest.raises(ConfigError, match=f"the {limit} split" if limit else "train has"):
        check_lengths(one.cfg.changed(batch_size=rows + 1), one.data.splits)
    assert batch["steps"] == one.plan.train_tokens // (16 * rows)


@pytest.mark.usefixtures("linear")
def test_a_batch_that_a_growth_schedule_refuses_is_called_so() -> None:
    one = setup(growth={"ops": [op("set_dropout", 0.1)]}, official_geometry="8x16")
    batch = fit(one, store=False, memory=10**12)["largest_batch"]
    assert batch["steps"] is None and "earlier trigger" in batch["why_not"]
    text = dict(fit_rows(one.cfg, fit(one, store=False, memory=10**12), 1))["fit: largest batch"]
    assert "the growth schedule does not allow this batch: " in text and "step " in text


@pytest.mark.usefixtures("linear")
def test_the_rows_name_the_steps_the_limit_and_the_memory_of_the_process() -> None:
    one = setup()
    result = fit(one, store=False, memory=10**12)
    rows = dict(fit_rows(one.cfg, result, 1))
    steps = result["largest_batch"]["steps"]
    assert f"; the run would have {steps} step" in rows["fit: largest batch"]
    assert "; val has no more tokens for one span of the official score" in rows["fit: largest batch"]
    assert "500.0MB of it for the process itself" in rows["fit: largest micro-batch"]
    on_a_gpu = dict(fit_rows(one.cfg, result | {"process_memory": 0}, 1))
    assert "of tensors, besides the memory of CUDA itself" in on_a_gpu["fit: largest micro-batch"]


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize(
    ("fields", "fixes"),
    [
        ({}, "vocab_size, train only low-rank terms with base_frozen=true, or use a larger device"),
        (
            {"members": 2, "rdrop": 1.0, "dropout": 0.1},
            "vocab_size, lower members=2, set rdrop=0, train only low-rank terms",
        ),
    ],
)
def test_memory_without_room_for_one_row_is_refused_with_the_numbers(
    fields: dict[str, Any], fixes: str
) -> None:
    words = (
        r"one row does not fit into 113.0MB: it needs about 10\d.0MB, 500.0MB of it for the process itself, "
        "and a margin .*; lower block_size, d_model, n_layer or "
    )
    with pytest.raises(UsageError, match=words + fixes):
        fit(setup(**fields), store=False, memory=113_000_000)


def op(name: str, value: int) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": {"step": 3}}


@pytest.mark.parametrize(
    ("fields", "rows", "world", "expected"),
    [
        ({"batch_size": 64}, 64, 1, 1),
        ({"batch_size": 64}, 63, 1, 2),
        ({"batch_size": 64}, 1, 1, 64),
        ({"batch_size": 64, "grad_accum": 64}, 64, 1, 1),
        ({"batch_size": 60}, 25, 1, 3),
        ({"batch_size": 60}, 14, 1, 5),
        ({"batch_size": 60}, 14, 2, 3),
        ({"batch_size": 62}, 30, 1, 31),
        ({"batch_size": 8, "growth": {"ops": [op("set_batch_size", 32)]}}, 8, 1, 4),
        ({"batch_size": 12, "growth": {"ops": [op("set_batch_size", 16)]}}, 4, 1, 4),
    ],
)
def test_grad_accum_is_the_smallest_divisor_that_fits(
    fields: dict[str, Any], rows: int, world: int, expected: int
) -> None:
    assert smallest_grad_accum(from_dict(TINY | fields), rows, world) == expected


def test_a_growth_schedule_that_sets_too_large_micro_batches_is_refused() -> None:
    cfg = from_dict(TINY | {"growth": {"ops": [op("set_grad_accum", 1), op("set_batch_size", 32)]}})
    with pytest.raises(UsageError, match=r"at most 8 rows .* set_batch_size or set_grad_accum"):
        smallest_grad_accum(cfg, 8, 1)


def test_the_rates_follow_the_linear_and_the_square_root_rule() -> None:
    cfg = from_dict(TINY | {"lr": 0.01, "lr_aux": 0.004})
    rates = rates_for(cfg, 32)
    assert rates["batch_size"] == 32 and rates["factor"] == 4
    assert rates["linear"] == pytest.approx({"lr": 0.04, "lr_aux": 0.016})
    assert rates["square_root"] == pytest.approx({"lr": 0.02, "lr_aux": 0.008})
    assert rates_for(cfg, 2)["square_root"]["lr"] == pytest.approx(0.005)


# -- the proof


def on_gpu(one: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one.device, "torch_device", torch.device("cuda", 0))


def test_a_step_that_runs_out_of_memory_halves_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    one, tried = setup(), []

    def train_steps(setup: Setup, cfg: TrainConfig, rows: int) -> int:
        tried.append(rows)
        if rows > 30:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return 1000 if rows > 20 else 100

    monkeypatch.setattr(module, "train_steps", train_steps)
    on_gpu(one, monkeypatch)
    proof = prove(one, configs_of(one.plan), 100, 500, probe=False)
    assert tried == [100, 50, 25, 12], "25 rows need more memory than allowed"
    assert proof == (12, True, 100, "")
    tried.clear()
    assert prove(one, configs_of(one.plan), 100, 50, probe=False).rows == 0


@pytest.mark.usefixtures("linear")
def test_fit_follows_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    one = setup(batch_size=64, num_titles=3000)
    limit = 10**9
    monkeypatch.setattr(module, "prove", lambda *_: module.Proof(20, True, 5))
    result = fit(one, store=False, memory=limit)
    assert (result["largest_micro_batch"], result["grad_accum"], result["proved"]) == (20, 4, True)
    monkeypatch.setattr(module, "prove", lambda *_: module.Proof(0, False))
    with pytest.raises(
        UsageError, match=r"one row does not fit into .*: a training step needed more .*; lower block_size"
    ):
        fit(one, store=False, memory=limit)


def test_on_a_cpu_a_probe_proves_the_estimate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, configs = setup(), configs_of(setup().plan)
    assert not prove(one, configs, 16, 10**12, probe=False).proved
    proof = prove(one, configs, 16, 10**12, probe=True)
    assert proof.proved and proof.rows == 16 and 10**8 < (proof.peak or 0) < 10**11
    tried: list[int] = []
    monkeypatch.setattr(module, "train_steps", lambda setup, cfg, rows: tried.append(rows) or 2000)
    proof = prove(one, configs, 16, 1999, probe=True)
    assert tried == [16] and not proof.proved and "--memory" in proof.why_not
    one.device.world = 2
    assert "single process" in prove(one, configs, 16, 1999, probe=True).why_not and tried == [16]


def test_the_proof_trains_the_rows_of_the_largest_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = [{"name": "stack_layers", "value": [0, 0, 1, 1], "trigger": {"step": 3}}]
    one = setup(growth={"version": 2, "ops": ops}, grad_accum=4)
    seen = []
    step = module.StepProbe.step

    def spy(self: Any, x: torch.Tensor, y: torch.Tensor, count: int) -> float:
        seen.append((len(self.state.model.blocks), tuple(x.shape), self.state.cfg.grad_accum, count))
        return step(self, x, y, count)

    monkeypatch.setattr(module.StepProbe, "step", spy)
    assert prove(one, configs_of(one.plan), 12, 10**12, probe=True).proved
    assert seen == [(2, (12, 16), 1, 1), (4, (12, 16), 1, 1)]


# -- the memory of the device


def test_the_free_memory_respects_the_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "/sys/fs/cgroup/memory.max": "6000000",
        "/sys/fs/cgroup/memory.current": "3000000",
        "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 500000\n",
    }

    def place(path: str) -> Path:
        return tmp_path / path.strip("/")

    for path, text in files.items():
        place(path).parent.mkdir(parents=True, exist_ok=True)
        place(path).write_text(text)
    monkeypatch.setattr(hardware, "Path", place)
    assert hardware.available_memory() == 3_500_000
    place("/sys/fs/cgroup/memory.max").write_text("max")
    assert hardware.available_memory() == 8_192_000
    place("/sys/fs/cgroup/memory.max").write_text("1000000")
    assert hardware.available_memory() == 0


def test_each_process_may_use_its_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    one = setup()
    monkeypatch.setattr(device_module, "available_memory", lambda: 1000)
    monkeypatch.setattr(device_module, "resident_memory", lambda: 30)
    assert one.device.free_memory == 1030
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert one.device.free_memory == 280
    monkeypatch.setattr(device_module, "available_memory", lambda: 0)
    assert one.device.free_memory == 0, "unknown"
    with pytest.raises(UsageError, match="--memory SIZE"):
        fit(one, store=False)


# -- the command


def test_the_command_shows_the_facts_in_both_formats() -> None:
    cfg = from_dict(TINY | {"compile": "off", "preset": "baseline"})
    options = ("--fit", "--memory", "1GB", "--no-store")
    done = dry_run(*options, "--json", num_titles=90)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)["fit"]
    assert result["memory"] == 10**9 and result["grad_accum"] == 1 and not result["proved"]
    assert result["micro_batch_memory"] == json.loads(done.stdout)["memory"]
    assert result["micro_batch_memory"] <= result["largest_memory"] <= result["usable"] == 900_000_000
    rows = dict(fit_rows(cfg, result, 1))
    assert rows["fit: memory"] == "1.0GB less a margin of 10%: 900.0MB"
    assert rows["fit: use"].startswith("--set grad_accum=1 keeps batch_size=8 with micro-batches of 8 rows")
    assert rows["fit: proof"].startswith("estimated, not proved: on a CPU, --probe")
    batch = result["largest_batch"]
    assert rows["fit: largest batch"].startswith(f"--set batch_size={batch['batch_size']} --set grad_accum=1")
    assert rows["fit: linear rule, lr x k"] == f"--set lr={batch['linear']['lr']:.4g}", "lr_aux follows lr"
    assert rows["fit: square-root rule, lr x sqrt(k)"] == f"--set lr={batch['square_root']['lr']:.4g}"
    assert "per process" in dict(fit_rows(cfg, result, 2))["fit: memory"]
    rows = dict(fit_rows(cfg, result | {"proved": True, "measured_peak": 7_000}, 1))
    assert rows["fit: proof"] == "by training: the peak was 7.0kB"
    rates = rates_for(cfg.changed(lr_aux=0.002), 32)
    rows = dict(fit_rows(cfg, result | {"largest_batch": batch | rates}, 1))
    assert rows["fit: linear rule, lr x k"] == f"--set lr={4 * cfg.lr:.4g} --set lr_aux=0.008"
    assert "fit: largest batch" not in dict(fit_rows(cfg, result | {"largest_batch": rates_for(cfg, 8)}, 1))


@pytest.mark.usefixtures("linear")
def test_the_table_has_the_rows_of_fit_only_if_requested() -> None:
    shown = dry_run("--fit", "--memory", "2GB", "--no-store")
    assert shown.exit_code == 0 and "fit: largest micro-batch" in shown.stdout, shown.output
    assert "fit:" not in dry_run("--no-store").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dry-run", "--fit", "--memory", "300MB"], "one row does not fit into 300.0MB"),
        (["--dry-run", "--fit", "--memory", "x"], "got --memory 'x'; give a number with the unit"),
        (["--dry-run", "--fit", "--memory", "0"], "a size above 0"),
        (["--dry-run", "--fit", "--memory", "16"], "KB, MB, GB or TB, like 16GB"),
        (["--dry-run", "--memory", "2GB"], "without --fit; add --fit"),
        (["--fit"], "without --dry-run; add --dry-run"),
    ],
)
def test_bad_options_are_refused_with_a_fix(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["train", "--preset", "baseline", *tiny_sets(), *options])
    assert done.exit_code == 2 and words in " ".join(done.output.split()), done.output
