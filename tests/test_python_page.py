"""Run every Python block of the README and of docs/python-api.md in a notebook kernel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/python-api.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def notebook(sources: list[str]) -> Any:
    import nbformat

    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run_in_a_notebook(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel are in the extra dev")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    made = notebook(blocks(page))
    client = nbclient.NotebookClient(made, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [output for cell in made.cells for output in cell.outputs]
    pages = [output.data["text/html"] for output in shown if "data" in output and "text/html" in output.data]
    assert any("guards" in page or "<table" in page for page in pages)
    assert not [output for output in shown if output.output_type == "error"]
    (path, *_) = tmp_path.glob("runs/demo*")
    command = (path / "env.json").read_text()
    assert '"mainrun"' in command and "ipykernel" not in command


def test_the_page_is_short_and_has_examples() -> None:
    text = (ROOT / "docs/python-api.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200 and len(blocks("docs/python-api.md")) > 8 and blocks("README.md")
