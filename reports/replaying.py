"""Code of a commit or a bundle at work, in a process of its own that sees none of the user's keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mainrun.errors import MainrunError, UsageError

# all that the process gets of the environment: where things are, what the bits depend on
HANDED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
    "MAINRUN_CACHE", "MAINRUN_ALLOCATOR", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT",
    "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CXX", "CUDA_VISIBLE_DEVICES",
    "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
)  # fmt: skip


def replay(code: Path, what: str, run: Path, *args: str) -> dict[str, Any]:
    """What `mainrun.replay` in `code` finds; its error as an error of ours. Relative paths of a config are the caller's."""
    env = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    env |= {"PYTHONPATH": str(code.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory(prefix="mainrun-replay-") as folder:
        into = Path(folder) / "found.json"
        command = [
            sys.executable,
            "-P",
            "-m",
            "mainrun.replay",
            what,
            str(run.resolve()),
            str(into),
            *args,
        ]  # -P: not the current folder's
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
        )
        try:
            found = json.loads(into.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise MainrunError(f"the code at hand could not be run on {run.name}: {said[-1]}") from None
    if not isinstance(found, dict) or "error" in found:
        bad_input = isinstance(found, dict) and found.get("exit_code") == UsageError.exit_code
        kind = UsageError if bad_input else MainrunError
        raise kind(str(found["error"]) if isinstance(found, dict) else "the code at hand gave no findings")
    return found
