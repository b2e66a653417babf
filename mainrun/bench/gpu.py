"""`mainrun bench gpu`: measure training on a GPU.

The benchmark measures what fraction of the GPU's peak speed a training step reaches, and how long whole runs
take. The benchmark also checks that two runs of the same config give the same losses and weights.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mainrun.bench.step import gigabytes, start
from mainrun.config import TrainConfig
from mainrun.errors import MainrunError, UsageError
from mainrun.plan.recipes import load
from mainrun.store.rundir import RunDir

PRESETS = ("baseline", "optimized")
BURST = 20  # the number of steps between two synchronizations with the GPU
# The peak speed of dense bf16 matrix products in FLOP/s, as stated by the manufacturer. `stated_peak`
# returns the first entry whose words all occur in the name of the device.
PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}
MATMUL_SIZE = 8192  # the number of rows and columns of each matrix
MATMUL_COUNT = 10  # the number of matrix products between two synchronizations with the GPU
# The keys in metrics.jsonl whose values must be equal in both runs.
COMPARED = ("event", "step", "split", "loss", "grad_norm", "official", "full")

Report = dict[str, Any]  # the report that --json prints


def measure(sets: list[str], *, repeats: int = 5, note: Callable[[str], None] = lambda _: None) -> Report:
    """Measure both presets on a GPU. Raise UsageError if torch finds no GPU."""
    sets = ["device=cuda", "dtype=bfloat16", *sets]
    configs = [load(preset, sets)[0] for preset in PRESETS]  # reject invalid --set options first
    for cfg in configs:
        if cfg.device != "cuda":
            raise UsageError(f"bench gpu measures a GPU, but got device={cfg.device}; do not set device")
    import torch

    if not torch.cuda.is_available():
        raise UsageError("torch finds no GPU; run this command on a machine with a GPU")
    name = torch.cuda.get_device_name()
    stated = stated_peak(name)
    reached = matmul_peak()
    rows = []
    for cfg in configs:
        note(f"{cfg.preset}: {repeats} x {BURST} steps")
        row = measure_steps(cfg, repeats)
        row["mfu"] = row["flops_per_s"] / (stated or reached)
        row["mfu_of_matmul"] = row["flops_per_s"] / reached
        row |= compare_two_runs(cfg.preset, sets, note)
        rows.append(row)
    return {"device": name, "stated_peak": stated, "matmul_peak": reached, "presets": rows}


def stated_peak(device: str) -> float | None:
    """Return the peak speed that the manufacturer states for a GPU, or None if the speed is unknown."""
    words = set(re.split(r"[\s-]+", device))
    for name, peak in PEAKS.items():
        if set(name.split()) <= words:
            return peak
    return None


def matmul_peak() -> float:
    """Measure the FLOP/s of large bf16 matrix products on this GPU."""
    import torch

    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(7):
        torch.cuda.synchronize()
        start_time = time.perf_counter()
        for _ in range(MATMUL_COUNT):
            torch.mm(a, b)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start_time) / MATMUL_COUNT)
    return 2 * MATMUL_SIZE**3 / min(seconds)


def measure_steps(cfg: TrainConfig, repeats: int) -> dict[str, Any]:
    """Measure the training step of a config."""
    with start(cfg.preset, "ours", True, cfg, burst=BURST) as worker:
        ready = worker.listen()
        seconds = [worker.ask("step")["seconds"] for _ in range(repeats)]
        peak = worker.ask("end")["peak"]
    median = statistics.median(seconds)
    return {
        "preset": cfg.preset,
        "params": ready["params"],
        "dtype": cfg.dtype,
        "compile": ready["compile"],
        "seconds": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "tokens_per_s": cfg.batch_size * cfg.block_size / median,
        "flops_per_s": ready["flops"] / median,
        "peak": peak,
        "memory_estimate": ready["memory_estimate"],
    }


def compare_two_runs(preset: str, sets: list[str], note: Callable[[str], None]) -> dict[str, Any]:
    """Run a preset twice. Return the times of both runs and the differences between the runs."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first"
        second = Path(folder) / "second"
        runs = [run(preset, sets, first, note), run(preset, sets, second, note)]
        return {"runs": runs, "differences": differences(only_run(first), only_run(second))}


def run(preset: str, sets: list[str], out: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Run a preset with `mainrun train` in a new process, and measure the time of the whole process."""
    note(f"{preset}: a whole run into {out.name}")
    command = [sys.executable, "-m", "mainrun", "train", "--preset", preset]
    for text in sets:
        command += ["--set", text]
    command += ["--out", str(out), "--fresh", "--no-store", "--quiet", "--json"]
    start_time = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - start_time
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["it printed nothing"]
        raise MainrunError(f"the run of {preset} ended with exit code {process.returncode}: {lines[-1]}")
    summary = json.loads(process.stdout)
    return {
        "wall_seconds": wall,
        "spent": summary["spent"],
        "full": summary["last"]["full"],
        "steps": summary["steps"],
    }


def only_run(out: Path) -> RunDir:
    (summary,) = out.glob("*/summary.json")
    return RunDir(summary.parent)


def differences(a: RunDir, b: RunDir) -> list[str]:
    """Compare the losses, gradient norms, scores and final weights of two runs. Return the differences."""
    texts = []
    rows_a = _compared_rows(a)
    rows_b = _compared_rows(b)
    if len(rows_a) != len(rows_b):
        texts.append(f"one run has {len(rows_a)} rows, the other has {len(rows_b)}")
    for row_a, row_b in zip(rows_a, rows_b, strict=False):
        if row_a != row_b:
            texts.append(f"{row_a['event']} at step {row_a['step']}: {row_a} against {row_b}")
            break  # only the first row that differs is reported
    summary_a = a.summary() or {}
    summary_b = b.summary() or {}
    if summary_a.get("weights") != summary_b.get("weights"):
        texts.append("the final weights differ")
    return texts


def _compared_rows(run: RunDir) -> list[dict[str, Any]]:
    return [{key: row[key] for key in COMPARED if key in row} for row in run.metrics()]


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of presets."""
    head = ["", "tokens/s", "ms/step", "min-max", "MFU", "of matmul"]
    head += ["peak", "whole run", "second run", "same bits"]
    lines = []
    for row in report["presets"]:
        first, second = row["runs"]
        lines.append(
            [
                row["preset"],
                f"{row['tokens_per_s']:,.0f}",
                f"{1e3 * row['seconds']:.2f}",
                f"{1e3 * row['seconds_min']:.2f}-{1e3 * row['seconds_max']:.2f}",
                f"{row['mfu']:.1%}",
                f"{row['mfu_of_matmul']:.1%}",
                f"{gigabytes(row['peak'])} ({row['peak'] / row['memory_estimate']:.2f} of --dry-run)",
                f"{first['wall_seconds']:.1f} s",
                f"{second['wall_seconds']:.1f} s",
                "NO" if row["differences"] else "yes",
            ]
        )
    return head, lines


def lines(report: Report) -> Iterator[str]:
    """Yield the text lines that are printed below the table."""
    stated = "manufacturer's peak unknown, so MFU is relative to the measured peak"
    if report["stated_peak"]:
        stated = f"manufacturer's peak {report['stated_peak'] / 1e12:.0f} TFLOP/s"
    measured = f"{report['matmul_peak'] / 1e12:.0f} TFLOP/s measured with a large matrix product"
    yield f"{report['device']} in bf16: {stated}; {measured}"
    for row in report["presets"]:
        run = row["runs"][0]
        spent = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in run["spent"].items())
        yield f"{row['preset']}: {row['params'] / 1e6:.1f}M parameters, {run['steps']} steps; {spent}"
        for text in row["differences"]:
            yield f"{row['preset']}: {text}"
