"""What the tests of submissions hand in: a repository of this code, a run trained by it, a report that quotes the run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def git(root: Path, *args: str, given: bytes | None = None) -> str:
    who = (
        "-c",
        "user.name=ann",
        "-c",
        "user.email=ann@example.org",
        "-c",
        "core.protectNTFS=false",
        "-c",
        "commit.gpgsign=false",
    )
    done = subprocess.run(["git", "-C", str(root), *who, *args], input=given, capture_output=True, check=True)
    return done.stdout.decode("utf-8", "replace").strip()


def commit(root: Path) -> str:
    if not (root / ".git").exists():
        git(root, "init", "--quiet")
    git(root, "add", "--all", "--force")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "x")
    return git(root, "rev-parse", "HEAD")


def repository(root: Path) -> Path:
    """The code at hand, committed."""
    for package in ("mainrun", "sweeps", "reports"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".gitignore", "task"):
        shutil.copy(ROOT / name, root / name)
    commit(root)
    return root


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def quoting(found: dict[str, Any]) -> bytes:
    last = found["last"]
    return pdf(
        [
            "The report",
            f"run {found['run']}",
            f"full {last['full']:.4f}",
            f"official {last['official']:.4f} ({last['coverage']:.1%})",
        ]
    )


def pdf(lines: list[str]) -> bytes:
    """One page of text."""
    text = " ".join(
        "({}) Tj T*".format(line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)"))
        for line in lines
    )
    page = f"BT /F1 10 Tf 50 780 Td 14 TL {text} ET"
    parts = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(page)}>>stream\n{page}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = "%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{part}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    return (
        out
        + f"xref\n0 6\n0000000000 65535 f \n{table}trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(out)}\n%%EOF"
    ).encode("latin-1")
