"""`mainrun doctor`: check that this machine is ready for training, and suggest how to fix problems."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mainrun.core.hardware import cores, cpp_compiler, cpu_flags, cpu_limits, cpu_name, tune_allocator

TORCH_SECONDS = 120  # the time limit for importing torch
DISK_WARN = 5e9  # the free disk space in bytes below which doctor warns
DISK_FAIL = 5e8  # the free disk space in bytes below which doctor reports a failure
MEMORY_WARN = 2e9  # the available memory in bytes below which doctor warns

# This code runs in a separate process. If torch crashes or hangs, only that process is affected.
_ASK_TORCH = """
import json, time
t = time.perf_counter()
import torch
t = time.perf_counter() - t
gpus = []
if torch.cuda.is_available():
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "seconds": t, "gpus": gpus}))
"""


@dataclass(frozen=True)
class Diagnosis:
    """The result of one check of the machine."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def diagnose(out: Path) -> Iterator[Diagnosis]:
    """Yield the results of all checks, in the order in which any problems should be fixed.

    out: the folder that contains the run directories.
    """
    yield _python()
    torch = _ask_torch()
    yield _torch(torch)
    yield _cores()
    yield _cpu()
    yield _gpu(torch)
    yield _memory()
    yield _allocator()
    yield from _disks(out)
    yield _compiler()
    yield _hub()


def _python() -> Diagnosis:
    # The Python version is not checked, because an older Python cannot run this file.
    return Diagnosis("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _ask_torch() -> dict[str, Any]:
    """Import torch in a separate process. Return the torch version, import time and GPUs, or an error."""
    try:
        process = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch takes more than {TORCH_SECONDS} s"}
    except OSError as e:
        return {"error": f"python cannot be started: {e.strerror}"}
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        return {"error": lines[-1]}
    try:
        return dict(json.loads(process.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return {"error": "importing torch did not print a readable version"}


def _torch(torch: dict[str, Any]) -> Diagnosis:
    if "error" in torch:
        return Diagnosis("torch", "fail", torch["error"], "install it: pip install -c constraints.txt torch")
    detail = f"{torch['version']}, imports in {torch['seconds']:.1f} s"
    major, minor = re.findall(r"\d+", torch["version"])[:2]
    if (int(major), int(minor)) < (2, 6):
        fix = "install torch 2.6 or newer: pip install -c constraints.txt torch"
        return Diagnosis("torch", "fail", detail, fix)
    return Diagnosis("torch", "ok", detail)


def _cores() -> Diagnosis:
    usable = cores()
    total = os.cpu_count() or usable
    detail = f"{usable} of {total} can be used"
    if usable > 1:
        return Diagnosis("cores", "ok", detail)
    return Diagnosis("cores", "warn", detail, "training on one core is slow; use more cores if you can")


def _cpu() -> Diagnosis:
    flags = cpu_flags()
    detail = f"{cpu_name()}: {', '.join(flags) or 'no known wide vector instructions'}"
    limits = cpu_limits()
    if limits:
        detail += ", limited by " + ", ".join(f"{name}={value}" for name, value in limits.items())
    if any("bf16" in flag for flag in flags):
        return Diagnosis("cpu", "ok", detail)
    return Diagnosis(
        "cpu", "warn", f"{detail}; no fast bf16", "use dtype=float32, which is faster on this CPU"
    )


def _gpu(torch: dict[str, Any]) -> Diagnosis:
    gpus = torch.get("gpus", [])
    if gpus:
        return Diagnosis("gpu", "ok", ", ".join(gpus))
    return Diagnosis("gpu", "ok", "torch finds no GPU, so runs use the CPU")


def _memory() -> Diagnosis:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = _available_memory()
    except (ValueError, OSError):
        fix = "`mainrun train --dry-run` shows how much memory a run needs"
        return Diagnosis("memory", "warn", "cannot be read on this system", fix)
    detail = f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB"
    if available < MEMORY_WARN:
        fix = "`mainrun train --dry-run` shows how much memory a run needs; a higher grad_accum reduces it"
        return Diagnosis("memory", "warn", detail, fix)
    return Diagnosis("memory", "ok", detail)


def _available_memory() -> int:
    """Return the available memory in bytes. On Linux, the result includes caches that the kernel can free."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _allocator() -> Diagnosis:
    allocator = tune_allocator()
    if allocator.startswith("default"):
        fix = "steps on a CPU may take twice as long; use Linux with glibc, and unset MAINRUN_ALLOCATOR"
        return Diagnosis("allocator", "warn", allocator, fix)
    return Diagnosis("allocator", "ok", allocator)


def _disks(out: Path) -> Iterator[Diagnosis]:
    from mainrun.core.hardware import cache_dir

    yield _disk("disk: runs", out, "give another folder with --out")
    yield _disk("disk: cache", cache_dir(), "give another folder with MAINRUN_CACHE")


def _disk(name: str, folder: Path, fix: str) -> Diagnosis:
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        free = shutil.disk_usage(existing).free
    except OSError as e:
        return Diagnosis(name, "fail", f"{folder}: {e.strerror}", fix)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Diagnosis(name, "fail", f"{folder} cannot be written", fix)
    detail = f"{free / 1e9:.1f} GB free at {folder}"
    if free < DISK_FAIL:
        return Diagnosis(name, "fail", detail, f"free some space, or {fix}")
    if free < DISK_WARN:
        return Diagnosis(name, "warn", detail, f"free some space, or {fix}")
    return Diagnosis(name, "ok", detail)


def _compiler() -> Diagnosis:
    compiler, problem = cpp_compiler()
    if problem:
        fix = "install python3-dev" if compiler else "install g++, or name a compiler with CXX"
        return Diagnosis("c++ compiler", "warn", problem, f"{fix}; until then, no run is compiled on the CPU")
    return Diagnosis("c++ compiler", "ok", compiler)


def _hub() -> Diagnosis:
    from mainrun.data.hub import hub_reachable

    reachable, detail = hub_reachable()
    if reachable:
        return Diagnosis("hub", "ok", detail)
    fix = "hn and hn-2025 must be downloaded from the hub once; synthetic and file:PATH need no download"
    return Diagnosis("hub", "warn", detail, fix)
