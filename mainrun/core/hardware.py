"""Find the host's processor, memory allocator, C++ compiler and cache folder, without importing torch."""

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
# Environment variables that can change the last bits of a numerical library's results.
CPU_LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "OMP_THREAD_LIMIT",
    "NVIDIA_TF32_OVERRIDE",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_INTERPRET",
    "PTXAS_OPTIONS",
    "DISABLE_PTXAS_OPT",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
)


def cpu() -> dict[str, str]:
    """Return the entries of /proc/cpuinfo for the first processor, or {} on a system without that file."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return facts


def cpu_name() -> str:
    """Return the processor's name, family, model and stepping.

    The name alone does not identify a processor, because some cloud providers give several processor models
    the same name.
    """
    facts = cpu()
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts]
    if not numbers:
        return name
    return f"{name} ({', '.join(numbers)})"


def cpu_flags() -> list[str]:
    """Return the processor's instruction set extensions that matter for speed, such as AVX-512."""
    facts = cpu()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return [label for flag, label in CPU_FLAGS.items() if flag in flags]


def cpu_limits() -> dict[str, str]:
    """Return the environment variables in `CPU_LIMITS` that are set for this process, with their values."""
    return {name: os.environ[name] for name in CPU_LIMITS if name in os.environ}


def release_free_memory() -> None:
    """Return freed memory to the operating system.

    When a model grows, its new tensors are too large for the memory blocks that its old tensors used.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _memory_field(path: Path, name: str) -> int:
    """Return a number in bytes from a file with lines such as `VmRSS: 1234 kB`, or 0 if it is not there."""
    with suppress(OSError):
        for line in path.read_bytes().splitlines():
            if line.startswith(f"{name}:".encode()):
                return 1024 * int(line.split()[1])
    return 0


def resident_memory() -> int:
    """Return the memory in bytes that this process uses now, or 0 if it is unknown."""
    return _memory_field(Path("/proc/self/status"), "VmRSS")


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    # On Linux, the peak memory that getrusage reports can include the memory of the parent process.
    recorded = _memory_field(Path("/proc/self/status"), "VmHWM")
    if recorded:
        return recorded
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # ru_maxrss is in bytes on macOS and in kilobytes on other systems
        return peak
    return 1024 * peak


def total_memory() -> int:
    """Return the memory in bytes that all processes together may use, or 0 if it is unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
    # a container may have a lower limit; without a limit, the file contains the word "max"
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def available_memory() -> int:
    """Return the memory in bytes that is still available to processes, or 0 if it is unknown.

    A container may have a lower limit than the machine.
    """
    available = _memory_field(Path("/proc/meminfo"), "MemAvailable") or total_memory()
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # without a limit, memory.max contains the word "max"
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # the system drops the cache of files before it refuses memory to a process
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(statistics.get("inactive_file", 0))
        available = min(available, max(limit - used, 0))
    return available


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpp_compiler() -> tuple[str, str]:
    """Return the path of the C++ compiler that torch.compile uses on a CPU, and why it cannot be used.

    The second value is an empty string if the compiler can be used.
    """
    requested = os.environ.get("CXX")
    path = shutil.which(requested or "g++")
    if not path:
        problem = f"CXX={requested} does not exist" if requested else "g++ is not installed"
        return "", problem
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return path, f"{path} exists, but {header} is missing"
    return path, ""


def cache_dir() -> Path:
    """Return the cache folder, which contains downloads, tokens and compiled kernels."""
    folder = os.environ.get("MAINRUN_CACHE")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mainrun"


def tune_allocator(keep_freed: bool = True) -> str:
    """Configure glibc to keep freed memory, so that a training step reuses the previous step's memory.

    If `keep_freed` is False, the memory of a large tensor is returned to the operating system instead.

    Return a description of the memory allocator. If MAINRUN_ALLOCATOR=default is set, the allocator is not
    changed. The allocator does not affect the results of a run.
    """
    if os.environ.get("MAINRUN_ALLOCATOR") == "default":
        return "default (MAINRUN_ALLOCATOR)"
    library, version = platform.libc_ver()
    if library != "glibc":
        return f"default ({library or 'this C library'} cannot be tuned)"
    mallopt = ctypes.CDLL(None).mallopt
    # mmap_max=0 and trim_threshold=-1 keep all freed memory in the process. top_pad makes the heap grow by 64
    # MiB at a time. The number of heaps is not limited, because tokenizer threads that share a single heap
    # block each other.
    settings = {"mmap_max": (-4, 0), "trim_threshold": (-1, -1), "top_pad": (-2, 64 << 20)}
    name = "tuned"
    if not keep_freed:
        settings = {
            "mmap_max": (-4, 65_536),
            "mmap_threshold": (-3, 1 << 20),
            "trim_threshold": (-1, 1 << 20),
        }
        settings["top_pad"] = (-2, 128 << 10)
        name = "tuned to return freed memory"
    refused = [key for key, (number, value) in settings.items() if not mallopt(number, value)]
    if refused:
        return f"glibc {version}, {name} except {', '.join(refused)}"
    return f"glibc {version}, {name}"
