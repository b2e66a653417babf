"""What the GPU path is worth, in one run on a machine that has one: `mainrun bench gpu`.

The share of the peak that a step reaches, the wall time of whole runs (process start, data and compiling in it), and whether
two runs of one config give the same losses and the same weights.
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
BURST = 20  # steps that are launched before one is waited for, as in a run
# dense bf16 FLOP/s as their maker states them; the first name that the device's holds
PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}


def measure(
    sets: list[str], *, repeats: int = 5, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """All of it. A UsageError where torch sees no GPU."""
    sets = ["device=cuda", "dtype=bfloat16", *sets]
    configs = [
        load(preset, sets)[0] for preset in PRESETS
    ]  # a wrong --set is refused before anything is measured
    if any(cfg.device != "cuda" for cfg in configs):
        raise UsageError(f"bench gpu got device={configs[0].device}; it measures the GPU: leave device out")
    import torch

    if not torch.cuda.is_available():
        raise UsageError("no GPU: torch sees none here; run this on a machine with one")
    name = torch.cuda.get_device_name()
    stated, reached = stated_peak(name), matmul_peak()
    found: dict[str, Any] = {"device": name, "stated_peak": stated, "matmul_peak": reached, "presets": []}
    for cfg in configs:
        note(f"{cfg.preset}: {repeats} x {BURST} steps")
        row = step(cfg, repeats)
        row["mfu"] = row["flops_per_s"] / (stated or reached)
        row["mfu_of_matmul"] = row["flops_per_s"] / reached
        with tempfile.TemporaryDirectory() as folder:
            row["runs"] = [run(cfg.preset, sets, Path(folder) / out, note) for out in ("first", "second")]
            a, b = (only_run(Path(folder) / out) for out in ("first", "second"))
            row["differences"] = differences(a, b)
        found["presets"].append(row)
    return found


def stated_peak(device: str) -> float | None:
    return next(
        (peak for name, peak in PEAKS.items() if set(name.split()) <= set(re.split(r"[\s-]+", device))), None
    )


def matmul_peak(size: int = 8192) -> float:
    """FLOP/s of a large bf16 product on this GPU: what the stated peak comes to in practice."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    seconds = []
    for _ in range(7):
        torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - clock) / 10)
    return 2 * size**3 / min(seconds)


def step(cfg: TrainConfig, repeats: int) -> dict[str, Any]:
    with start(cfg.preset, "ours", True, cfg, burst=BURST) as worker:
        ready = worker.listen()
        seconds = [worker.ask("step")["seconds"] for _ in range(repeats)]
        peak = worker.ask("end")["peak"]
    middle = statistics.median(seconds)
    return {
        "preset": cfg.preset,
        "params": ready["params"],
        "dtype": cfg.dtype,
        "compile": ready["compile"],
        "seconds": middle,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "tokens_per_s": cfg.batch_size * cfg.block_size / middle,
        "flops_per_s": ready["flops"] / middle,
        "peak": peak,
        "memory_estimate": ready["memory_estimate"],
    }


def run(preset: str, sets: list[str], out: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """One whole run by the command line, as a person would start it; its wall time, and what that went into."""
    note(f"{preset}: a whole run into {out.name}")
    given = [part for text in sets for part in ("--set", text)]
    command = [
        sys.executable,
        "-m",
        "mainrun",
        "train",
        "--preset",
        preset,
        *given,
        "--out",
        str(out),
        "--fresh",
        "--no-store",
        "--quiet",
        "--json",
    ]
    clock = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - clock
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise MainrunError(f"the run of {preset} ended with code {done.returncode}: {said[-1]}")
    summary = json.loads(done.stdout)
    return {
        "wall_seconds": wall,
        "spent": summary["spent"],
        "full": summary["last"]["full"],
        "steps": summary["steps"],
    }


def only_run(out: Path) -> RunDir:
    (path,) = (p.parent for p in out.glob("*/summary.json"))
    return RunDir(path)


def differences(a: RunDir, b: RunDir) -> list[str]:
    """Where two runs of one config part: losses and gradient norms to the bit, scores, and the weights at the end. Empty: nowhere."""
    keys = ("event", "step", "split", "loss", "grad_norm", "official", "full")
    rows = [[{key: row[key] for key in keys if key in row} for row in found.metrics()] for found in (a, b)]
    found = []
    if len(rows[0]) != len(rows[1]):
        found.append(f"one run has {len(rows[0])} rows, the other {len(rows[1])}")
    for one, other in zip(
        *rows, strict=False
    ):  # a length that differs is named above; this finds where they part
        if one != other:
            found.append(f"{one['event']} at step {one['step']}: {one} against {other}")
            break
    summaries = [found.summary() or {} for found in (a, b)]
    if summaries[0].get("weights") != summaries[1].get("weights"):
        found.append("the weights at the end are not the same")
    return found


def table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = [
        "",
        "tokens/s",
        "ms/step",
        "min-max",
        "MFU",
        "of matmul",
        "peak",
        "whole run",
        "again",
        "the same bits",
    ]
    lines = []
    for row in found["presets"]:
        walls = [f"{one['wall_seconds']:.1f} s" for one in row["runs"]]
        lines.append(
            [
                row["preset"],
                f"{row['tokens_per_s']:,.0f}",
                f"{1e3 * row['seconds']:.2f}",
                f"{1e3 * row['seconds_min']:.2f}-{1e3 * row['seconds_max']:.2f}",
                f"{row['mfu']:.1%}",
                f"{row['mfu_of_matmul']:.1%}",
                f"{gigabytes(row['peak'])} ({row['peak'] / row['memory_estimate']:.2f} of --dry-run)",
                *walls,
                "NO" if row["differences"] else "yes",
            ]
        )
    return head, lines


def lines(found: dict[str, Any]) -> Iterator[str]:
    stated = (
        f"{found['stated_peak'] / 1e12:.0f} stated"
        if found["stated_peak"]
        else "no stated peak known, MFU is of the matmul's"
    )
    yield f"{found['device']}: bf16 TFLOP/s {stated}, {found['matmul_peak'] / 1e12:.0f} by a large product"
    for row in found["presets"]:
        spent = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in row["runs"][0]["spent"].items())
        yield f"{row['preset']}: {row['params'] / 1e6:.1f}M parameters, {row['runs'][0]['steps']} steps; {spent}"
        yield from (f"{row['preset']}: {text}" for text in row["differences"])
