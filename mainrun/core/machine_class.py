"""Versions of the compilers, libraries and source code that affect a run's results."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from mainrun.config import TrainConfig
from mainrun.core.hardware import cpp_compiler
from mainrun.core.kernels import HAS_AMX
from mainrun.plan.plan import Plan

# The source files and folders that affect a run's results. A test in tests/test_house.py fails if training
# imports a module that neither HASHED nor NOT_HASHED contains.
HASHED = (
    "config.py",
    "train.py",
    "core",
    "data",
    "plan",
    "growth",
    "run",
    "interop/names.py",
    "interop/qwen2.py",
    "interop/start.py",
)


def compiler(device: str) -> str:
    """Return the version of the compiler that torch.compile would use, or "" if no compiler works."""
    if device == "cuda":
        try:
            import triton
        except Exception:  # Triton is not installed or was built for another system
            return ""
        return f"triton {triton.__version__}"
    path, problem = cpp_compiler()
    if problem:
        return ""
    version = subprocess.run([path, "--version"], capture_output=True, text=True)
    return version.stdout.partition("\n")[0]


@cache
def triton_works(device: torch.device) -> tuple[str, str]:
    """Test whether mainrun's Triton kernels work on this machine.

    Return (Triton's version, "") if the kernels work. Otherwise, return ("", the reason for the failure).
    """
    try:
        _try_triton(device)
    # Triton may be missing or too old, or may find no C compiler or no driver. Training works without Triton.
    except Exception as e:
        lines = str(e).strip().splitlines()
        reason = lines[0] if lines else type(e).__name__
        problem = f"Triton does not work here ({reason})"
        return "", f"the loss uses torch's own operations, which are slower: {problem}"
    return compiler("cuda"), ""


def _try_triton(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError("this GPU is too old to support bfloat16")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET makes Triton run on the CPU")
    from mainrun.core.native import gpu

    logits = torch.zeros(1, 2, dtype=torch.bfloat16, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    loss, log_sum = gpu.cross_entropy(logits, target)
    gpu.cross_entropy_backward(logits, target, log_sum, loss[0])
    torch.cuda.synchronize(device)


def compile_balance(cfg: TrainConfig, plan: Plan, device: str, threads: int) -> tuple[float, float]:
    """Estimate the seconds that compiling the model takes, and the seconds that the compiled model saves.

    The estimate is based on the measurements in docs/log/speed.md.
    """
    attention = cfg.d_model * (2 * cfg.n_head + 2 * cfg.kv_heads) * cfg.head_width
    matrices = 3 if cfg.mlp == "swiglu" else 2
    mlp = matrices * cfg.d_model * cfg.ff_width
    weights = cfg.n_layer * (attention + mlp) + cfg.vocab_size * cfg.d_model
    flops = 6 * weights * plan.tokens(plan.steps) * cfg.presentations
    if device == "cuda":
        return 10 + 3 * cfg.n_layer, max(3e-4 * cfg.n_layer * plan.steps, 0.3 * flops / 2e14)
    speed, share = _cpu_rates(half=cfg.dtype == "bfloat16", rms=cfg.norm == "rmsnorm")
    return 15 + 8 * cfg.n_layer, share * flops / (threads * speed)


def _cpu_rates(half: bool, rms: bool) -> tuple[float, float]:
    """Return the FLOP/s of one thread, and the fraction of a training step's time that compiling saves."""
    if not half:
        # In float32, most of a step's time goes into matrix products, so fusing other operations saves
        # nothing.
        return 6e10, 0.0
    # Compiling speeds up RMSNorm most. With AMX, matrix products are faster, so RMSNorm takes a larger share
    # of a step's time.
    if HAS_AMX:
        return 4.7e11, 0.3 if rms else 0.06
    return 1.5e11, 0.1 if rms else 0.0


def source_hash(root: Path = Path(__file__).parents[1]) -> str:
    """Return the hash of the source files that affect a run's results."""
    paths: list[Path] = []
    for name in HASHED:
        paths += [root / name, *(root / name).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in (".py", ".cpp") and path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


# The hash is computed when this module is imported, because later edits of the source files do not affect the
# running process.
SOURCE = source_hash()


def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries, and the hash of mainrun's source code."""
    import numpy
    import safetensors
    import sentencepiece
    import tokenizers

    libraries = {
        m.__name__: str(m.__version__) for m in (torch, numpy, tokenizers, sentencepiece, safetensors)
    }
    return {"python": platform.python_version(), "mainrun": SOURCE, **libraries}
