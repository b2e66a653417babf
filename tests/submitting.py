"""Test data for submissions: a git repository of this code, and a report that quotes a run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SETTINGS = ("user.name=ann", "user.email=ann@example.org", "core.protectNTFS=false", "commit.gpgsign=false")


def git(root: Path, *args: str, stdin: bytes | None = None) -> str:
    command = ["git", "-C", str(root)]
    for setting in SETTINGS:
        command += ["-c", setting]
    result = subprocess.run([*command, *args], input=stdin, capture_output=True, check=True)
    return result.stdout.decode("utf-8", "replace").strip()


def commit(root: Path) -> str:
    """Commit all files and return the commit id. Create a repository first if there is none."""
    if not (root / ".git").exists():
        git(root, "init", "--quiet")
    git(root, "add", "--all", "--force")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "x")
    return git(root, "rev-parse", "HEAD")


def repository(root: Path) -> Path:
    """Copy this code into a new git repository."""
    for package in ("mainrun", "sweeps", "reports"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".gitignore", "task"):
        shutil.copy(ROOT / name, root / name)
    commit(root)
    return root


def read_summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def make_report(summary: dict[str, Any]) -> bytes:
    """Make a PDF report that quotes the figures of a run."""
    last = summary["last"]
    return make_pdf(
        [
            "The report",
            f"run {summary['run']}",
            f"full {last['full']:.4f}",
            f"official {last['official']:.4f} ({last['coverage']:.1%})",
        ]
    )


def make_pdf(lines: list[str]) -> bytes:
    """Make a PDF with one page of text."""
    text = ""
    for line in lines:
        escaped = line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
        text += f"({escaped}) Tj T* "
    page = f"BT /F1 10 Tf 50 780 Td 14 TL {text}ET"
    resources = "<</Font<</F1 5 0 R>>>>"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents 4 0 R/Resources{resources}>>",
        f"<</Length {len(page)}>>stream\n{page}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    pdf = "%PDF-1.4\n"
    table = ""
    for number, content in enumerate(objects, 1):
        table += f"{len(pdf):010} 00000 n \n"
        pdf += f"{number} 0 obj\n{content}\nendobj\n"
    xref = f"xref\n0 6\n0000000000 65535 f \n{table}trailer<</Size 6/Root 1 0 R>>\n"
    return f"{pdf}{xref}startxref\n{len(pdf)}\n%%EOF".encode("latin-1")
