"""Is this machine ready? One line a check: ok, warn or fail, and what to do about it. Never a traceback."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mainrun.core.hardware import cores, cpp_compiler, cpu_flags, cpu_limits, cpu_name, tune_allocator

TORCH_SECONDS = 120  # longer than any import that is worth waiting for
FREE_WARN, FREE_FAIL = 5e9, 5e8  # bytes: a few runs of the largest preset; one checkpoint

# asked in a process of its own: a torch that crashes or hangs is then a line in the table
_ASK_TORCH = """
import json, time
t = time.perf_counter()
import torch
t = time.perf_counter() - t
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "seconds": t, "gpus": gpus}))
"""


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def checks(out: Path) -> Iterator[Check]:
    """All checks, in the order in which a person would fix them. `out` is where runs go."""
    yield _python()
    torch = _ask_torch()
    yield _torch(torch)
    yield _cores()
    yield _cpu()
    yield _gpu(torch)
    yield _memory()
    yield _allocator()
    yield from _disk(out)
    yield _compiler()
    yield _hub()


def _python() -> Check:
    return Check(
        "python", "ok", f"{platform.python_version()} ({sys.executable})"
    )  # an older one could not read this file


def _ask_torch() -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"its import takes more than {TORCH_SECONDS} s"}
    except OSError as e:
        return {"error": f"python cannot be started: {e.strerror}"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": last}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return {"error": "its import printed nothing that can be read"}


def _torch(found: dict[str, Any]) -> Check:
    if "error" in found:
        return Check("torch", "fail", found["error"], "install it: pip install -c constraints.txt torch")
    detail = f"{found['version']}, imports in {found['seconds']:.1f} s"
    numbers = [
        int("".join(c for c in part if c.isdigit()) or 0)
        for part in found["version"].split("+")[0].split(".")[:2]
    ]
    if numbers < [2, 6]:
        return Check(
            "torch", "fail", detail, "install torch 2.6 or newer: pip install -c constraints.txt torch"
        )
    return Check("torch", "ok", detail)


def _cores() -> Check:
    usable = cores()
    total = os.cpu_count() or usable
    detail = f"{usable} usable of {total}"
    return (
        Check("cores", "ok", detail)
        if usable > 1
        else Check("cores", "warn", detail, "training on one core is slow; give it more")
    )


def _cpu() -> Check:
    found = cpu_flags()
    detail = f"{cpu_name()}: {', '.join(found) or 'no wide vectors known'}"
    if cpu_limits():
        detail += ", limited by " + ", ".join(f"{name}={value}" for name, value in cpu_limits().items())
    if any("bf16" in flag for flag in found):
        return Check("cpu", "ok", detail)
    return Check("cpu", "warn", f"{detail}; no fast bf16", "dtype=float32 is the faster one here")


def _gpu(torch: dict[str, Any]) -> Check:
    gpus = torch.get("gpus", [])
    return Check("gpu", "ok", ", ".join(gpus) if gpus else "none seen by torch; runs use the CPU")


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return Check(
            "memory", "warn", "cannot be read here", "`mainrun train --dry-run` says what a run needs"
        )
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    detail = f"{free / 1e9:.1f} GB available of {total / 1e9:.1f} GB"
    if free < 2e9:
        return Check(
            "memory", "warn", detail, "`mainrun train --dry-run` says what a run needs; grad_accum lowers it"
        )
    return Check("memory", "ok", detail)


def _allocator() -> Check:
    found = tune_allocator()
    if found.startswith("default"):
        return Check(
            "allocator",
            "warn",
            found,
            "steps on a CPU may take twice as long; use Linux with glibc, without MAINRUN_ALLOCATOR",
        )
    return Check("allocator", "ok", found)


def _disk(out: Path) -> Iterator[Check]:
    from mainrun.core.hardware import cache_dir

    for name, place, fix in (("disk: runs", out, "--out"), ("disk: cache", cache_dir(), "MAINRUN_CACHE")):
        there = place.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        try:
            free = shutil.disk_usage(there).free
        except OSError as e:
            yield Check(name, "fail", f"{place}: {e.strerror}", f"give another folder with {fix}")
            continue
        detail = f"{free / 1e9:.1f} GB free at {place}"
        if not there.is_dir() or not os.access(there, os.W_OK):
            yield Check(name, "fail", f"{place} cannot be written", f"give another folder with {fix}")
        elif free < FREE_WARN:
            yield Check(
                name,
                "fail" if free < FREE_FAIL else "warn",
                detail,
                f"free some, or give another folder with {fix}",
            )
        else:
            yield Check(name, "ok", detail)


def _compiler() -> Check:
    found, problem = cpp_compiler()
    if problem:
        fix = "install python3-dev" if found else "install g++, or name a compiler with CXX"
        return Check("c++ compiler", "warn", problem, f"{fix}; until then no run is compiled on the CPU")
    return Check("c++ compiler", "ok", found)


def _hub() -> Check:
    from mainrun.data.hub import hub_reachable

    reachable, detail = hub_reachable()
    if reachable:
        return Check("hub", "ok", detail)
    return Check("hub", "warn", detail, "hn and hn-2025 need it once; synthetic and file:PATH never do")
