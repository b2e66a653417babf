"""The machine class: everything besides the config that the bits of a run depend on."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from mainrun.config import TrainConfig
from mainrun.core.hardware import cxx
from mainrun.core.kernels import TILES
from mainrun.plan.plan import Plan


def compiler(device: str) -> str:
    """The first line of what the C++ compiler says of itself; for a GPU the one that comes with torch. Empty: none that works."""
    if device == "cuda":
        try:
            import triton
        except Exception:  # there is none, or one that was built for something else
            return ""
        return f"triton {triton.__version__}"
    found, problem = cxx()
    return (
        ""
        if problem
        else subprocess.run([found, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    )


@cache
def triton_works(device: torch.device) -> tuple[str, str]:
    """Its version, if kernels of our own can be made and run there; else why a run goes without."""
    try:
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("a GPU of this age has no bfloat16")
        if os.environ.get("TRITON_INTERPRET", "0") != "0":
            raise RuntimeError("TRITON_INTERPRET has it run on the CPU")
        from mainrun.core.native import gpu as native_gpu

        logits, target = (
            torch.zeros(1, 2, dtype=torch.bfloat16, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        loss, log_sum = native_gpu.cross_entropy(logits, target)
        native_gpu.cross_entropy_backward(logits, target, log_sum, loss[0])
        torch.cuda.synchronize(device)
    except Exception as e:  # not there, of another version, without a C compiler, without the driver's library: torch's own operations do
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        return (
            "",
            f"the loss takes torch's own operations, which are slower: Triton does not work here ({reason})",
        )
    return compiler("cuda"), ""


def compile_balance(cfg: TrainConfig, plan: Plan, device: str, threads: int) -> tuple[float, float]:
    """Seconds that compiling costs, and that it saves over the run, by rule of thumb (the figures are in docs/log.md)."""
    attention = cfg.d_model * (2 * cfg.n_head + 2 * cfg.kv_heads) * cfg.head_width
    mlp = (3 if cfg.mlp == "swiglu" else 2) * cfg.d_model * cfg.ff_width
    weights = cfg.n_layer * (attention + mlp) + cfg.vocab_size * cfg.d_model
    flops = 6 * weights * plan.tokens(plan.steps) * cfg.passes
    if device == "cuda":
        return 10 + 3 * cfg.n_layer, max(3e-4 * cfg.n_layer * plan.steps, 0.3 * flops / 2e14)
    half, rms = cfg.dtype == "bfloat16", cfg.norm == "rmsnorm"
    speed = threads * (4.7e11 if half and TILES else 1.5e11 if half else 6e10)
    # what there is to fuse, most of it in RMSNorm; beside AMX's products it weighs more, beside those in float32 nothing
    share = (0.3 if rms else 0.06) if half and TILES else 0.1 if half and rms else 0.0
    return 15 + 8 * cfg.n_layer, share * flops / speed


HASHED = (
    "config.py",
    "train.py",
    "core",
    "data",
    "plan",
    "growth",
    "run",
)  # tests/test_house.py: a run reaches nothing else


def _source(root: Path = Path(__file__).parents[1]) -> str:
    """Return the hash of every source file that decides the bits of a run."""
    paths = [path for name in HASHED for path in [root / name, *(root / name).rglob("*")]]
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in (".py", ".cpp") and path.is_file()):
        digest.update(
            f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


SOURCE = _source()  # once, at the start: an edit while this process lives is not what it computes with


def versions() -> dict[str, str]:
    """Of everything that computes: Python, the libraries, and mainrun by the hash of its own files that do."""
    import numpy
    import safetensors
    import sentencepiece
    import tokenizers

    found = {m.__name__: str(m.__version__) for m in (torch, numpy, tokenizers, sentencepiece, safetensors)}
    return {"python": platform.python_version(), "mainrun": SOURCE, **found}
