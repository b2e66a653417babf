"""What this host is and has, found out without torch: processor, cores, C++ compiler, and the C library's memory."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 vnni",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "sve": "SVE",
    "bf16": "bf16",
}
# each of them makes a library compute in another way
CPU_LIMITS = (
    "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "OMP_THREAD_LIMIT", "NVIDIA_TF32_OVERRIDE", "TRITON_DEFAULT_FP_FUSION", "TRITON_INTERPRET", "PTXAS_OPTIONS", "DISABLE_PTXAS_OPT",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
)  # fmt: skip


def cpu() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor; empty where there is none."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # no /proc on this system: callers name what Python knows
    return facts


def cpu_name() -> str:
    """Model, and the numbers that tell apart what a cloud sells under one name."""
    facts = cpu()
    numbers = ", ".join(f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts)
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({numbers})" if numbers else name


def cpu_flags() -> list[str]:
    facts = cpu()
    found = set((facts.get("flags") or facts.get("Features") or "").split())
    return [label for flag, label in CPU_FLAGS.items() if flag in found]


def cpu_limits() -> dict[str, str]:
    return {name: os.environ[name] for name in CPU_LIMITS if name in os.environ}


def give_back() -> None:
    """Free memory to the system: a change of what is held leaves holes of sizes that nobody asks for again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    with suppress(
        OSError
    ):  # what getrusage says begins on Linux with what the process that started this one had
        for line in Path("/proc/self/status").read_bytes().splitlines():
            if line.startswith(b"VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cxx() -> tuple[str, str]:
    """The C++ compiler that torch.compile would take for a CPU, and what is wrong with it (empty: nothing)."""
    asked = os.environ.get("CXX")
    found = shutil.which(asked or "g++")
    if not found:
        return "", f"CXX={asked} is not there" if asked else "no g++"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return found, "" if header.is_file() else f"{found}, but no {header}"


def cache_dir() -> Path:
    if own := os.environ.get("MAINRUN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mainrun"


def tune_allocator() -> str:
    """Let glibc keep a step's memory for the next one: else each step maps its large tensors anew, page by page. No bit changes.

    Says what is in use. MAINRUN_ALLOCATOR=default leaves the C library as it is; others than glibc have no such settings.
    """
    if os.environ.get("MAINRUN_ALLOCATOR") == "default":
        return "default (MAINRUN_ALLOCATOR)"
    library, version = platform.libc_ver()
    if library != "glibc":
        return f"default ({library or 'this C library'} cannot be tuned)"
    mallopt = ctypes.CDLL(None).mallopt
    # mmap_max 0 and trim_threshold -1: nothing is given back; top_pad: the heap grows in large steps. Threads keep heaps of their own:
    # in a single one those of a tokenizer would wait for each other, and a step would gain nothing
    settings = {"mmap_max": (-4, 0), "trim_threshold": (-1, -1), "top_pad": (-2, 64 << 20)}
    refused = [name for name, (number, value) in settings.items() if not mallopt(number, value)]
    return f"glibc {version}, tuned" + (f" but for {', '.join(refused)}" if refused else "")
