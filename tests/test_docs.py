"""Check the documents: links, sizes, generated pages, and the tree of the sources.

A function for each rule returns the violations. One test applies the function to this repository, and another
plants a violation and expects the function to name it.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MOST_LINES = 200
MOST_COLUMNS = 100
MOST_LINES_OF_README = 100
FENCE = re.compile(r"^(```|~~~)")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def documents(root: Path) -> list[Path]:
    """Return the Markdown files at the top of the repository and in docs."""
    return sorted(root.glob("*.md")) + sorted((root / "docs").rglob("*.md"))


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line outside blocks of code."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


# -- links


def slug(heading: str) -> str:
    """Return the anchor of a heading, as the viewers of repositories compute it."""
    plain = re.sub(r"`|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(text: str) -> list[str]:
    headings = [re.match(r"#{1,6} (.+)", line) for _, line in prose(text)]
    return [slug(match[1]) for match in headings if match]


def links(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the target of each link and image."""
    lines = [""] * (text.count("\n") + 1)
    for number, line in prose(text):
        lines[number - 1] = line
    without_code = re.sub(r"`[^`\n]*`", "", "\n".join(lines))
    for match in LINK.finditer(without_code):
        yield without_code.count("\n", 0, match.end()) + 1, match[1]


def broken_link(page: Path, target: str, root: Path) -> str:
    """Return what is wrong with a link of a page, or an empty string."""
    if re.match(r"[a-z]+:", target):
        return ""
    name, _, anchor = target.partition("#")
    file = (page.parent / unquote(name)).resolve() if name else page
    if not file.is_file():
        return f"{target} does not exist"
    docs = root / "docs"
    if page.is_relative_to(docs) and not file.is_relative_to(docs):
        return f"{target} is outside docs, so the site cannot show it"
    found = anchors(file.read_text(encoding="utf-8")).count(anchor) if file.suffix == ".md" else 0
    if anchor and found == 0:
        return f"{target} has no such heading"
    if anchor and found > 1:
        return f"{target} is ambiguous: {found} headings have this anchor"
    return ""


def broken_links(root: Path) -> list[str]:
    wrong = []
    for page in documents(root):
        for number, target in links(page.read_text(encoding="utf-8")):
            problem = broken_link(page, target, root)
            if problem:
                wrong.append(f"{page.relative_to(root)}:{number}: {problem}")
    return wrong


def test_every_link_leads_somewhere() -> None:
    assert broken_links(ROOT) == []


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# A\n[x](docs/a.md#b-c), [y](docs/b.md)\n```\n[z](none.md)\n```\n")
    (tmp_path / "docs/a.md").write_text(
        "## B `c`!\n## Twice\n## Twice\n[p](#nothing) ![q](a.png)\n[r](../README.md) [s](#twice) [t](https://a.b/c)\n"
        "`[u](none.md)` [a [b]\nc](gone.md)\n"
    )
    assert broken_links(tmp_path) == [
        "README.md:2: docs/b.md does not exist",
        "docs/a.md:4: #nothing has no such heading",
        "docs/a.md:4: a.png does not exist",
        "docs/a.md:5: ../README.md is outside docs, so the site cannot show it",
        "docs/a.md:5: #twice is ambiguous: 2 headings have this anchor",
        "docs/a.md:7: gone.md does not exist",
    ]


def old_names(root: Path, files: list[Path]) -> list[str]:
    """Return the places that name a page of docs that does not exist."""
    wrong = []
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", text):
            if not (root / name).is_file() and name not in WRITTEN_LATER:
                wrong.append(f"{path.relative_to(root)} names {name}")
    return wrong


WRITTEN_LATER = ("docs/search-openings.md",)  # `mainrun bench search` writes this page


def sources(root: Path) -> list[Path]:
    folders = ("mainrun", "sweeps", "reports", "tools", "tests")
    found = [path for folder in folders for path in (root / folder).rglob("*")]
    mine = [path for path in found if path.suffix in (".py", ".toml", ".sh") and path.is_file()]
    return sorted(path for path in mine if path.name != "test_docs.py")


def test_the_code_names_only_pages_that_exist() -> None:
    assert old_names(ROOT, sources(ROOT)) == []


def test_a_page_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("# see docs/guide.md and docs/log/a.md\n")
    (tmp_path / "docs/log").mkdir(parents=True)
    (tmp_path / "docs/log/a.md").touch()
    assert old_names(tmp_path, [tmp_path / "a.py"]) == ["a.py names docs/guide.md"]


# -- sizes


def too_large(root: Path) -> list[str]:
    """Return the pages that are too long, and their lines of prose that are too wide."""
    wrong = []
    for page in [*sorted((root / "docs").glob("*.md")), root / "README.md"]:
        text = page.read_text(encoding="utf-8")
        count = len(text.splitlines())
        most = MOST_LINES_OF_README if page.name == "README.md" and page.parent == root else MOST_LINES - 1
        if count > most:
            wrong.append(f"{page.relative_to(root)} has {count} lines, at most {most} are allowed")
        for number, line in prose(text):
            if len(line) > MOST_COLUMNS and not line.startswith("|"):
                wrong.append(f"{page.relative_to(root)}:{number} has {len(line)} columns")
    return wrong


def test_every_page_is_short() -> None:
    assert too_large(ROOT) == []


def test_a_large_page_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("x\n" * 101)
    (tmp_path / "docs/README.md").write_text("x\n" * 199)
    (tmp_path / "docs/a.md").write_text("x\n" * 200)
    (tmp_path / "docs/b.md").write_text(f"{'x' * 101}\n|{'x' * 101}|\n```\n{'x' * 101}\n```\n{'y' * 100}\n")
    assert too_large(tmp_path) == [
        "docs/a.md has 200 lines, at most 199 are allowed",
        "docs/b.md:1 has 101 columns",
        "README.md has 101 lines, at most 100 are allowed",
    ]


# -- the index and the menu of the site


def unlisted(root: Path) -> list[str]:
    """Return the pages of docs that docs/README.md does not link, and the pages of docs/log likewise."""
    wrong = []
    for folder in (root / "docs", root / "docs/log"):
        index = folder / "README.md"
        linked = {target.partition("#")[0] for _, target in links(index.read_text(encoding="utf-8"))}
        names = (
            {page.name for page in folder.glob("*.md")}
            - {"README.md"}
            - {Path(n).name for n in WRITTEN_LATER}
        )
        wrong += [f"{index.relative_to(root)} does not link {name}" for name in sorted(names - linked)]
    return wrong


def test_the_index_lists_every_page() -> None:
    assert unlisted(ROOT) == []


def test_a_page_without_a_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs/log").mkdir(parents=True)
    (tmp_path / "docs/README.md").write_text("[a](a.md#x)")
    (tmp_path / "docs/log/README.md").touch()
    for name in ("a.md", "b.md", "log/c.md"):
        (tmp_path / "docs" / name).touch()
    assert unlisted(tmp_path) == [
        "docs/README.md does not link b.md",
        "docs/log/README.md does not link c.md",
    ]


# -- generated pages


@functools.cache
def make_docs() -> Any:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools/make_docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_pages_are_current() -> None:
    assert make_docs().stale(DOCS) == [], "run python tools/make_docs.py"


def test_a_stale_page_is_named(tmp_path: Path) -> None:
    tool = make_docs()
    pages = tool.pages()
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    assert tool.stale(tmp_path) == []
    (tmp_path / "config.md").write_text(pages["config.md"].replace("| `seed` |", "| `seeds` |"))
    (tmp_path / "cli.md").unlink()
    assert tool.stale(tmp_path) == ["cli.md", "config.md"]


def test_the_generated_pages_list_every_command_and_field() -> None:
    from mainrun.config import TrainConfig

    pages = make_docs().pages()
    text = "".join(pages.values())
    for name in ("## mainrun train", "## mainrun report", "**`store gc`**", "**`sweep run`**", "`--paired "):
        assert text.count(name) == 1, name
    for field in TrainConfig.model_fields:
        assert f"| `{field}` |" in pages["config.md"], field


# -- the tree of the sources


def tree_gaps(root: Path) -> list[str]:
    """Return what docs/layout.md does not mention, and what it mentions but does not exist.

    The page must mention the folders of each package, the files directly in mainrun, and the files in tools.
    """
    text = (root / "docs/layout.md").read_text(encoding="utf-8")
    tree = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S))
    named = set(re.findall(r"[\w./-]+", tree))
    wanted = [root / "mainrun" / name.name for name in (root / "mainrun").glob("*.py")]
    wanted += [path for path in (root / "tools").glob("*") if path.is_file()]
    for package in ("mainrun", "sweeps", "reports"):
        wanted += [path.parent for path in (root / package).glob("*/__init__.py")]
    names = {f"{path.name}/" if path.is_dir() else path.name for path in wanted} - {"__init__.py"}
    there = {path.name for package in PARTS for path in (root / package).rglob("*")} | set(PARTS)
    files = {name for name in named if name.endswith((".py", ".sh"))}
    folders = {name.rstrip("/").split("/")[-1] for name in named if name.endswith("/")}
    gone = {name for name in files | folders if name.split("/")[-1] not in there}
    return [f"layout.md does not mention {name}" for name in sorted(names - named)] + [
        f"layout.md mentions {name}, which does not exist" for name in sorted(gone)
    ]


PARTS = ("mainrun", "sweeps", "reports", "tests", "tools", "docs")


def test_the_tree_is_the_source() -> None:
    assert tree_gaps(ROOT) == []


def test_a_gap_in_the_tree_is_named(tmp_path: Path) -> None:
    for name in ("mainrun/core/__init__.py", "mainrun/a.py", "tools/b.py", "docs/layout.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "docs/layout.md").write_text("```\nmainrun/   x\n  a.py  y\n  gone/  z\n  old.py\n```\n")
    assert tree_gaps(tmp_path) == [
        "layout.md does not mention b.py",
        "layout.md does not mention core/",
        "layout.md mentions gone, which does not exist",
        "layout.md mentions old.py, which does not exist",
    ]


# -- the site


def missing_in_menu(root: Path) -> list[str]:
    """Return the pages that the menu of the site in mkdocs.yml lacks."""
    menu = yaml.load((root / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["nav"]
    text = str(menu)
    pages = [page.relative_to(root / "docs").as_posix() for page in (root / "docs").rglob("*.md")]
    return sorted(page for page in pages if f"'{page}'" not in text and f"docs/{page}" not in WRITTEN_LATER)


def test_the_menu_of_the_site_lists_every_page() -> None:
    assert missing_in_menu(ROOT) == []


def test_a_page_that_the_menu_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs/log").mkdir(parents=True)
    for name in ("a.md", "b.md", "log/a.md"):
        (tmp_path / "docs" / name).touch()
    (tmp_path / "mkdocs.yml").write_text("nav:\n  - A: a.md\n  - x: !!python/name:y.z\n")
    assert missing_in_menu(tmp_path) == ["b.md", "log/a.md"]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a repository strictly."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra docs: pip install 'mainrun[docs]'")
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'href="getting-started.html"' in home
    assert '<pre class="mermaid">' in (tmp_path / "site/training.html").read_text(encoding="utf-8")
    assert "fingerprint" in (tmp_path / "site/search/search_index.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_broken_link_stops_the_site(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra docs: pip install 'mainrun[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs/faq.md").open("a", encoding="utf-8") as page:
        page.write("\n[x](training.md#no-such-heading)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and "no-such-heading" in done.stdout + done.stderr
