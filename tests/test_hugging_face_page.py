"""Run the commands and the scripts of docs/hugging-face.md, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hugging-face.md"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)
NEEDS_A_HUB = ("pip install", "hub push", "hub export RUN")


def tutorial() -> list[tuple[str, str]]:
    """Return the language and the text of each block that needs neither a hub nor other runs."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    return [block for block in blocks if not any(words in block[1] for words in NEEDS_A_HUB)]


def execute(language: str, text: str, folder: Path) -> str:
    """Run a block in a folder, in which `mainrun` is the mainrun of this repository."""
    command = [sys.executable, "-c", text] if language == "python" else ["sh", "-ec", text]
    env = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_page_works_as_written(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "mainrun"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mainrun "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    outputs = []
    for language, text in tutorial():
        outputs.append(execute(language, text, tmp_path))
    assert len(outputs) == 8
    assert (tmp_path / "exported" / "routing.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "acc_norm" in outputs[3]
