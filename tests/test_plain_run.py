"""Tests that train.py alone gives the same bits as the full harness and imports no unneeded modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mainrun.plan.recipes import load
from mainrun.run.session import train
from mainrun.store.rundir import RunDir

ROOT = Path(__file__).parents[1]
SETS = [
    "num_titles=300",
    "vocab_size=400",
    "n_layer=2",
    "threads=1",
    "epochs=1",
    "log_every=1",
    "compile=off",
]
# A plain run must not import these modules, because only some configs need them.
OPTIONAL = (
    "torch._dynamo",
    "torch._inductor",
    "mainrun.core.moe",
    "mainrun.core.lora",
    "mainrun.growth.controller",
    "mainrun.growth.operators",
    "mainrun.growth.moments",
    "mainrun.growth.verify",
    "optuna",
    "matplotlib",
    "scipy",
    "pandas",
)
REPORT = f"print([name for name in {OPTIONAL!r} if name in sys.modules], file=sys.stderr)"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def alone(preset: str, sets: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `python -m mainrun.train`."""
    options = [part for text in sets for part in ("--set", text)]
    command = [sys.executable, "-m", "mainrun.train", "--preset", preset, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without `seconds`, which always varies, and `tokens`, which only the harness writes."""
    return [{key: row[key] for key in row if key not in ("seconds", "tokens")} for row in rows]


@pytest.mark.parametrize(
    ("preset", "more"),
    [("demo:optimized", []), ("demo:baseline", ["dropout=0.1", "grad_accum=2", "dev_frac=0.1"])],
)
def test_train_py_alone_gives_the_bits_of_the_full_harness(
    tmp_path: Path, preset: str, more: list[str]
) -> None:
    done = alone(preset, [*SETS, *more])
    assert done.returncode == 0, done.stderr
    (cfg,) = load(preset, [*SETS, *more])
    train(cfg, tmp_path)
    rows = RunDir(tmp_path / cfg.run_id).metrics()
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 10 and numbers(printed) == numbers(rows)


def test_train_py_alone_refuses_to_grow() -> None:
    done = alone("demo-grown", SETS)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: this file alone cannot grow a model; use `mainrun train`\n"


def test_importing_the_trainer_loads_nothing_optional() -> None:
    done = python(f"import sys, mainrun.train; {REPORT}")
    assert done.stderr.strip() == "[]"


def test_a_plain_run_loads_nothing_optional(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from mainrun.plan.recipes import load
from mainrun.run.session import train
(cfg,) = load("demo:optimized", {SETS!r})
train(cfg, Path(sys.argv[1]))
{REPORT}
"""
    done = python(code, str(tmp_path))
    assert done.returncode == 0 and done.stderr.strip().splitlines()[-1] == "[]", done.stderr
    assert list(tmp_path.glob("*/summary.json"))


def test_an_optional_module_would_be_reported() -> None:
    done = python(f"import sys, mainrun.train, mainrun.growth.operators; {REPORT}")
    assert "mainrun.growth.operators" in done.stderr
