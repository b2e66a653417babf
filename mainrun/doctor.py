"""Is this machine ready? One line a check: ok, warn or fail, and what to do about it. Never a traceback."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


CPU_FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16", "sve": "SVE", "bf16": "bf16"}


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
    return Check("python", "ok", f"{platform.python_version()} ({sys.executable})")  # an older one could not read this file


def _ask_torch() -> dict[str, Any]:
    try:
        done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS)
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
    numbers = [int("".join(c for c in part if c.isdigit()) or 0) for part in found["version"].split("+")[0].split(".")[:2]]
    if numbers < [2, 6]:
        return Check("torch", "fail", detail, "install torch 2.6 or newer: pip install -c constraints.txt torch")
    return Check("torch", "ok", detail)


def _cores() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = os.cpu_count() or usable
    detail = f"{usable} usable of {total}"
    return Check("cores", "ok", detail) if usable > 1 else Check("cores", "warn", detail, "training on one core is slow; give it more")


def _cpu() -> Check:
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        return Check("cpu", "ok", f"{platform.processor() or platform.machine()} (its features cannot be read here)")
    model = facts.get("model name") or platform.machine()
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    found = ", ".join(label for flag, label in CPU_FLAGS.items() if flag in flags)
    if flags & {"amx_bf16", "avx512_bf16", "bf16"}:
        return Check("cpu", "ok", f"{model}: {found}")
    return Check("cpu", "warn", f"{model}: {found or 'no wide vectors'}; no fast bf16", "dtype=float32 is the faster one here")


def _gpu(torch: dict[str, Any]) -> Check:
    gpus = torch.get("gpus", [])
    return Check("gpu", "ok", ", ".join(gpus) if gpus else "none seen by torch; runs use the CPU")


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return Check("memory", "warn", "cannot be read here", "`mainrun train --dry-run` says what a run needs")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    detail = f"{free / 1e9:.1f} GB available of {total / 1e9:.1f} GB"
    if free < 2e9:
        return Check("memory", "warn", detail, "`mainrun train --dry-run` says what a run needs; grad_accum lowers it")
    return Check("memory", "ok", detail)


def _allocator() -> Check:
    from mainrun.allocator import tune_allocator

    found = tune_allocator()
    if found.startswith("default"):
        return Check("allocator", "warn", found, "steps on a CPU may take twice as long; use Linux with glibc, without MAINRUN_ALLOCATOR")
    return Check("allocator", "ok", found)


def _disk(out: Path) -> Iterator[Check]:
    from mainrun.corpus import cache_dir

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
            yield Check(name, "fail" if free < FREE_FAIL else "warn", detail, f"free some, or give another folder with {fix}")
        else:
            yield Check(name, "ok", detail)


def _compiler() -> Check:
    asked = os.environ.get("CXX")
    found = [path for name in ([asked] if asked else ["g++", "clang++", "c++"]) if (path := shutil.which(name))]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not found:
        detail = f"CXX={asked} is not there" if asked else "none found"
        return Check("c++ compiler", "warn", detail, "install g++; until then leave compile=off")
    if not header.is_file():
        return Check("c++ compiler", "warn", f"{found[0]}, but no {header}", "install python3-dev; until then leave compile=off")
    return Check("c++ compiler", "ok", found[0])


def _hub() -> Check:
    from mainrun.corpus import hub_reachable

    reachable, detail = hub_reachable()
    if reachable:
        return Check("hub", "ok", detail)
    return Check("hub", "warn", detail, "hn and hn-2025 need it once; synthetic and file:PATH never do")
