"""Run `mainrun.replay` from a commit or a bundle in a process that does not receive the user's keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mainrun.errors import MainrunError, UsageError

# The replay process receives only these environment variables, which locate files or affect the results.
PASSED_VARIABLES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "XDG_CACHE_HOME",
    "MAINRUN_CACHE",
    "MAINRUN_ALLOCATOR",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "CXX",
    "CUDA_VISIBLE_DEVICES",
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
)


def run_replay(code: Path, command: str, run: Path, *args: str) -> dict[str, Any]:
    """Run the command "guards" or "steps" of `mainrun.replay`, and return the result of the command.

    If the process reports an error, raise an exception with the same message. Relative paths in the run's
    config refer to the current folder.
    """
    env = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
    env["PYTHONPATH"] = str(code.resolve())
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryDirectory(prefix="mainrun-replay-") as folder:
        output = Path(folder) / "result.json"
        python = [sys.executable, "-P"]  # the option -P prevents imports from the current folder
        process = subprocess.run(
            [*python, "-m", "mainrun.replay", command, str(run.resolve()), str(output), *args],
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        try:
            result = json.loads(output.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            lines = process.stderr.strip().splitlines() or [f"it ended with code {process.returncode}"]
            raise MainrunError(f"mainrun.replay could not be run on {run.name}: {lines[-1]}") from None
    if not isinstance(result, dict):
        raise MainrunError("mainrun.replay returned no result")
    if "error" in result:
        is_usage_error = result.get("exit_code") == UsageError.exit_code
        error_type = UsageError if is_usage_error else MainrunError
        raise error_type(str(result["error"]))
    return result
