"""Provoke each error of docs/faq.md, and find its text in the page."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_sets
from submitting import commit, make_pdf
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.errors import UsageError
from mainrun.store.rundir import RunDir

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faq.md"
STUDY = """
preset = "baseline"
[set]
dev_frac = 0.1
[space.lr]
low = 0.001
high = 0.1
"""


def quotes(text: str) -> list[str]:
    """Return the error texts of a page, which are quoted code."""
    return re.findall(r"^> `(.+)`$", text, re.M)


def matches(quote: str, message: str) -> bool:
    """Tell whether a message contains a quote, in which `...` stands for any text."""
    pattern = ".*".join(re.escape(part) for part in quote.split("..."))
    return re.search(pattern, message.replace("\n", " "), re.S) is not None


class Runs:
    """Two finished runs on different titles and an interrupted run, in the folder `runs`."""

    def __init__(self) -> None:
        lines = [f"Show HN: number {i} of the things that {i % 7} people like" for i in range(400)]
        Path("titles.txt").write_text("\n".join(lines))
        self.first = self.train(num_titles=380)
        self.second = self.train(num_titles=390)
        self.stopped = self.train("--until", "2", num_titles=380, seed=5)

    def train(self, *options: str, **changes: object) -> str:
        """Train a tiny run and return its id."""
        before = self.ids()
        CliRunner().invoke(app, [*command(**changes), "--quiet", *options])
        (new,) = self.ids() - before
        return new

    def ids(self) -> set[str]:
        return {path.parent.name for path in Path("runs").glob("*/config.json")}


def command(**changes: object) -> list[str]:
    """Return the command that trains a tiny run on the titles of the current folder."""
    sets = tiny_sets(corpus="file:titles.txt", eval_per_epoch=0, **changes)
    return ["train", "--preset", "baseline", *sets]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runs]:
    folder = tmp_path_factory.mktemp("faq")
    with contextlib.chdir(folder):
        return folder, Runs()


@pytest.fixture
def runs(prepared: tuple[Path, Runs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Return a copy of the prepared runs, in the current folder."""
    shutil.copytree(prepared[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return prepared[1]


def message(*arguments: object) -> str:
    """Run a command that fails, and return its error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code in (2, 3, 75), result.output
    return result.stderr


def train(*sets: str) -> str:
    options = [word for text in sets for word in ("--set", text)]
    return message("train", "--preset", "baseline", *options)


def old_python(runs: Runs) -> str:
    """Run ./task where the only Python is an old one."""
    folder = Path("old").absolute()
    folder.mkdir()
    for name in ("dirname", "cat", "sed", "cksum"):
        (folder / name).symlink_to(shutil.which(name) or "")
    shutil.copy(ROOT / "task", folder / "task")
    fake = folder / "python3"
    fake.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit 0\nexit 3\n')
    fake.chmod(0o755)
    env = {"PATH": str(folder)}
    done = subprocess.run(["/bin/sh", folder / "task"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    return done.stderr


def without_package(runs: Runs) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        return message("train", "--preset", "baseline", *tiny_sets(), "--track", "wandb")


def without_gpu(runs: Runs) -> str:
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return train("device=cuda")


def without_network(runs: Runs) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        patch.setenv("no_proxy", "*")
        return train("corpus=hn")


def full_disk(runs: Runs) -> str:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", write)
        return message("train", "--preset", "baseline", *tiny_sets(seed=7))


def changed_corpus(runs: Runs) -> str:
    with Path("titles.txt").open("a") as file:
        file.write("\none more title")
    return message(*command(num_titles=380))


def busy(runs: Runs) -> str:
    run = RunDir(Path("runs") / runs.stopped)
    run.lock()  # until the object is gone
    return message(*command(num_titles=380, seed=5))


def diverged(runs: Runs) -> str:
    sets = tiny_sets(lr=1000, clip=0, eval_per_epoch=0, seed=8)
    return message("train", "--preset", "baseline", *sets, "--no-store")


def changed_study(runs: Runs) -> str:
    from sweeps.folder import write_study_json
    from sweeps.study import read_study

    Path("s.toml").write_text(STUDY)
    Path("runs/studies/s").mkdir(parents=True)
    write_study_json(Path("runs/studies/s"), read_study("s.toml", {}), "mainrun sweep s.toml")
    Path("s.toml").write_text(STUDY.replace("high = 0.1", "high = 0.2"))
    return message("sweep", "s.toml")


def no_dev(runs: Runs) -> str:
    Path("s.toml").write_text(STUDY.replace("dev_frac = 0.1", "dev_frac = 0"))
    return message("sweep", "s.toml")


def uncommitted(runs: Runs) -> str:
    from reports.submission.commit import check_tree

    Path("clone").mkdir()
    commit(Path("clone"))
    Path("clone/new.py").touch()
    with pytest.raises(UsageError) as caught:
        check_tree(Path("clone").absolute())
    return str(caught.value)


def wrong_report(runs: Runs) -> str:
    Path("r.pdf").write_bytes(make_pdf(["nothing"]))
    return message("submit", "--run", runs.first, "--report", "r.pdf")


# Each row provokes the error that a quote of the page shows.
ERRORS: dict[str, Callable[[Runs], str]] = {
    "needs Python 3.11": old_python,
    "finds no GPU": without_gpu,
    "package wandb": without_package,
    "corpus=hn": without_network,
    "no space left": full_disk,
    "unknown preset": lambda runs: message("train", "--preset", "optimised"),
    "unknown field": lambda runs: train("learning_rate=0.1"),
    "lr='fast'": lambda runs: train("lr=fast"),
    "n_head=3": lambda runs: train("n_head=3", "d_model=512"),
    "extra argument": lambda runs: message("train", "--set", "lr", "0.1"),
    "nothing.txt": lambda runs: train("corpus=file:nothing.txt"),
    "but num_titles": lambda runs: train("corpus=file:titles.txt"),
    "larger than the text": lambda runs: message(
        "train", "--preset", "optimized", *tiny_sets(tokenizer="unigram", vocab_size=16000)
    ),
    "val split is too short": lambda runs: train("num_titles=400", "vocab_size=400"),
    "has changed": changed_corpus,
    "different data": lambda runs: message("compare", runs.first, runs.second),
    "no run 'nothing'": lambda runs: message("compare", "nothing"),
    "not unique": lambda runs: message("compare", "base"),
    "not finished": lambda runs: message("compare", runs.stopped),
    "being written": busy,
    "diverged": diverged,
    "unknown study": lambda runs: message("sweep", "nostudy"),
    "another study": changed_study,
    "no dev split": no_dev,
    "uncommitted": uncommitted,
    "does not quote": wrong_report,
    "zip file": lambda runs: message("verify", "titles.txt"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_in_the_page(name: str, runs: Runs) -> None:
    (quote,) = [quote for quote in quotes(PAGE.read_text(encoding="utf-8")) if name in quote]
    got = ERRORS[name](runs)
    assert matches(quote, got), f"{quote}\n{got}"


def test_every_error_of_the_page_is_provoked() -> None:
    page = quotes(PAGE.read_text(encoding="utf-8"))
    assert len(page) >= 20
    assert [quote for quote in page if not any(name in quote for name in ERRORS)] == []


def test_an_error_that_is_worded_differently_is_noticed() -> None:
    assert matches("a ... b; c", "error: a 1\n2 b; c (d)")
    assert not matches("a ... b; c", "error: a 1 b, c")
