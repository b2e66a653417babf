"""Run the blocks of README.md and docs that are marked as runnable, at demo scale.

A comment before a block, which readers do not see, says what to do with it:

    <!-- run: GROUP -->                  run the commands in the folder of the group
    <!-- run: GROUP; file: NAME -->      write the block to a file in this folder
    <!-- run: GROUP; RUN: PATTERN -->    the same as the first, with a run directory in place of each RUN
    <!-- not run: REASON -->             leave the block out

The blocks of a group share their runs. They run in the order of the pages, README.md and getting-started.md
first. In a block, `mainrun` is this code, whose runs are small, and `./task NAME -- ARGUMENTS` is the same as
`mainrun NAME ARGUMENTS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from doors import Driver
from submitting import repository

from mainrun.data.synthetic import titles

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
# The pages, or the blocks of one language in a page, that another test runs.
OWN_TESTS = {
    "README.md python": "test_python_page.py",
    "python-api.md": "test_python_page.py",
    "hugging-face.md": "test_hugging_face_page.py",
    "extending.md": "test_extending.py",
    "extending-checks.md": "test_extending.py",
}
LANGUAGES = ("sh", "python")  # these blocks must be marked
# The size of every run of a block, whatever the block asks for.
SCALE = {
    "num_titles": 600,
    "vocab_size": 420,
    "block_size": 32,
    "batch_size": 8,
    "epochs": 1,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 32,
    "eval_per_epoch": 1,
    "official_geometry": "1x32",
    "threads": 1,
    "device": "cpu",
    "dtype": "float32",
    "compile": "off",
}
SCALED = re.compile(r"train\b|sweep (?!run\b|ls\b|show\b|best\b|export\b|dashboard\b)|sweep run\b")
# `mainrun` and `./task` of a block: ask the process that has imported everything.
CLIENT = """#!{python} -IS
import json, os, socket, sys
words = sys.argv[1:]
if os.path.basename(sys.argv[0]) == "task":
    words = words[:1] + words[2:]
    words += ["submission.zip"] if words == ["verify"] else []
link = socket.socket(socket.AF_UNIX)
link.connect({place!r})
link.sendall(json.dumps([words, os.getcwd()]).encode() + b"\\n")
answer = json.loads(link.makefile().readline())
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["code"])
"""


@dataclass
class Block:
    page: str
    line: int
    mark: str
    language: str
    text: str

    @property
    def settings(self) -> dict[str, str]:
        return dict(part.strip().split(": ", 1) for part in self.mark.split(";") if ": " in part)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(root: Path) -> list[Block]:
    """Return the blocks of the documents, in the order in which they run."""
    pages = [root / "README.md", root / "docs/getting-started.md", *sorted((root / "docs").glob("*.md"))]
    listed = []
    for page in dict.fromkeys(pages):
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            name = page.relative_to(root).as_posix()
            listed.append(Block(name, line, match["mark"] or "", match["language"], match["text"]))
    return listed


def unmarked(root: Path) -> list[str]:
    """Return the blocks of commands and of Python that do not say whether they run."""
    return [
        f"{block.place}: write <!-- run: GROUP --> or <!-- not run: REASON --> before this block"
        for block in blocks(root)
        if block.language in LANGUAGES
        and not re.match(r"(not )?run: \S", block.mark)
        and not {Path(block.page).name, f"{block.page} {block.language}"} & set(OWN_TESTS)
    ]


def groups(root: Path) -> dict[str, list[Block]]:
    by_group: dict[str, list[Block]] = {}
    for block in blocks(root):
        if "run" in block.settings:
            by_group.setdefault(block.settings["run"], []).append(block)
    return by_group


@dataclass
class Shell:
    """Runs the commands of a group in a folder."""

    driver: Driver
    folder: Path
    place: Path
    asked: list[list[str]] = field(default_factory=list)

    def run(self, block: Block) -> None:
        file = block.settings.get("file")
        if file:
            (self.folder / file).write_text(block.text, encoding="utf-8")
            return
        text = self._with_runs(block)
        command = [sys.executable, "-c", text] if block.language == "python" else ["sh", "-ec", text]
        path = f"{self.folder / '.bin'}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHONPATH": str(self.driver.tree), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, f"{block.place}\n{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def _with_runs(self, block: Block) -> str:
        """Return the text of a block with a run directory in place of each RUN."""
        pattern = block.settings.get("RUN")
        if not pattern:
            return block.text
        runs = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob(pattern))
        lines = []
        for line in block.text.splitlines():
            command, mark, comment = line.partition("#")
            for run in runs[: command.count("RUN")]:
                command = re.sub(r"\bRUN\b", run, command, count=1)
            assert not re.search(r"\bRUN\b", command), f"{block.place}: too few runs: {runs}"
            lines.append(command + mark + comment)
        return "\n".join(lines)

    def answer(self, words: list[str], folder: str) -> dict[str, object]:
        """Run a mainrun command at demo scale."""
        self.asked.append(words)
        line = " ".join(words)
        if SCALED.match(line):
            for key, value in SCALE.items():
                words = [*words, "--set", f"{key}={value}"]
        if words[0] == "submit":
            words = [*words, "--yes"] if "--upload" in words else words
        done = self.driver.run(words, cwd=folder, env={"MAINRUN_CACHE": str(self.place.parent / "cache")})
        return {"code": done.code, "out": done.out, "err": done.err}


@contextlib.contextmanager
def serving(shell: Shell) -> Iterator[None]:
    """Answer the clients of a shell in a thread."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(shell.place))
    server.listen()

    def serve() -> None:
        while True:
            link = server.accept()[0]
            request = link.makefile().readline()
            if not request:
                return
            link.sendall(json.dumps(shell.answer(*json.loads(request))).encode() + b"\n")
            link.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(shell.place))
        thread.join()
        server.close()


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """Return a process with the code of a clean git repository, because blocks submit runs."""
    root = repository(tmp_path_factory.mktemp("code") / "mainrun")
    with Driver(root, limit=800) as driver:
        yield driver


def prepare(folder: Path, place: Path) -> None:
    """Write the titles and the commands that blocks expect."""
    lines = titles(3000)
    (folder / "titles.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "mine.txt").write_text("\n".join(lines[::2]), encoding="utf-8")
    (folder / ".bin").mkdir()
    for name in (".bin/mainrun", "task"):
        file = folder / name
        file.write_text(CLIENT.format(python=sys.executable, place=str(place)), encoding="utf-8")
        file.chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("group", groups(ROOT))
def test_the_blocks_of_a_group_run(group: str, code: Driver, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    shell = Shell(code, folder, tmp_path / "s")
    prepare(folder, shell.place)
    with serving(shell):
        for block in groups(ROOT)[group]:
            shell.run(block)


@pytest.mark.slow
def test_a_block_that_fails_is_noticed(code: Driver, tmp_path: Path) -> None:
    shell = Shell(code, tmp_path, tmp_path / "s")
    prepare(tmp_path, shell.place)
    good = Block(
        "a.md", 1, "run: x", "sh", "mainrun presets optimized\n./task presets -- mod | grep capacity\n"
    )
    bad = Block("a.md", 9, "run: x", "sh", "mainrun presets --field\n")
    with serving(shell):
        shell.run(good)
        with pytest.raises(AssertionError, match=r"a\.md:9"):
            shell.run(bad)
    assert shell.asked == [["presets", "optimized"], ["presets", "mod"], ["presets", "--field"]]


def test_every_block_says_whether_it_runs() -> None:
    assert unmarked(ROOT) == []


def test_an_unmarked_block_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "<!-- run: a -->\n```sh\nx\n```\n\n```sh\ny\n```\n<!-- not run: needs z -->\n```sh\nz\n```\n"
        "```toml\na = 1\n```\n<!-- run: a; file: b.toml -->\n```toml\nb = 1\n```\n"
    )
    (wrong,) = unmarked(tmp_path)
    assert wrong.startswith("README.md:6: write <!-- run: GROUP -->")
    by_group = groups(tmp_path)
    assert [(block.text, block.settings.get("file")) for block in by_group["a"]] == [
        ("x\n", None),
        ("b = 1\n", "b.toml"),
    ]
