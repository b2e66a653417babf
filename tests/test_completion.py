"""Tests shell completion: the names that are offered, the script for bash, and the installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import shellingham
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.config import TrainConfig
from mainrun.errors import UsageError
from mainrun.ui import completion, ls_cli


def asked(line: str, cwd: Path) -> list[str]:
    """Return what mainrun offers for an incomplete command line."""
    env = os.environ | {
        "COLUMNS": "999",
        completion.VARIABLE: "complete_fish",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_ARGS": line,
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-m", "mainrun"]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_mainrun_answers_the_scripts(tmp_path: Path) -> None:
    (tmp_path / "runs/demo-0123abcd").mkdir(parents=True)
    (tmp_path / "runs/demo-0123abcd/config.json").touch()
    (line,) = asked("mainrun train --set lr=1 --set warmup_f", tmp_path)
    assert line == "warmup_frac=\tfraction of the steps in which the learning rate rises from 0 (scheduled)"
    assert asked("mainrun compare x d", tmp_path) == ["demo-0123abcd"]
    (line,) = asked("mainrun sweep run rou", tmp_path)
    assert line.startswith("routing\tpattern, capacity")


def test_presets_steps_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("mine.toml", "notes.txt", "sub/other.toml", ".hidden.toml"):
        (tmp_path / name).touch()
    names = [name for name, _ in completion.presets("")]
    assert {"demo", "optimized", "mine.toml", "sub/"} < set(names)
    assert not {"notes.txt", ".hidden.toml"} & set(names)
    assert [name for name, _ in completion.presets("demo:")] == ["demo:baseline", "demo:optimized"]
    assert completion.presets("baseline:") == []
    assert completion.presets("sub/") == [("sub/other.toml", "")]
    assert [name for name, _ in completion.studies("l")] == ["lr"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("warmup_f", ["warmup_frac="]),
        ("mlp=", ["mlp=gelu", "mlp=relu2", "mlp=swiglu"]),
        ("mlp=s", ["mlp=swiglu"]),
        ("title_mask=", ["title_mask=true", "title_mask=false"]),
        ("epochs=", ["epochs=7"]),
        ("qkv_bias=", ["qkv_bias=true", "qkv_bias=false"]),
        ("no_such_field=", []),
        ("prese", []),
    ],
)
def test_fields_and_their_values(typed: str, offered: list[str]) -> None:
    assert [name for name, _ in completion.settings(typed)] == offered


def test_every_field_and_column_is_offered() -> None:
    fields = set(TrainConfig.model_fields) - {"preset"}
    assert {name for name, _ in completion.settings("")} == {f"{field}=" for field in fields}
    assert {name for name, _ in ls_cli.columns("")} == fields | set(ls_cli.RESULTS)


class Context:
    """The part of Typer's context that the completion reads."""

    def __init__(self, **params: Any) -> None:
        self.params = params


def test_runs_and_studies_of_the_folder_that_the_command_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("runs/a/config.json", "other/b/config.json", "runs/studies/c/study.json", "s/d/study.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    runs: Any = completion.runs
    studies: Any = completion.started_studies
    assert runs(Context(out=None, runs=["a"]), "") == [("a", "")]
    assert runs(Context(out=Path("other")), "") == [("b", "")]
    assert runs(Context(out=Path("submission.zip"), runs=Path("other")), "") == [("b", "")]
    assert runs(Context(), "x") == []
    assert studies(Context(), "") == [("c", "")]
    assert studies(Context(out="s"), "d") == [("d", "")]


# -- the script for bash


BASH = shutil.which("bash")


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "answer", "replies", "space"),
    [
        ("mainrun train --set war", "warmup_frac=\\tabout\\n", ["warmup_frac="], False),
        ("mainrun train --set mlp=", "mlp=gelu\\nmlp=relu2\\n", ["gelu", "relu2"], True),
        ("mainrun train --set corpus=file:", "corpus=file:a b\\n", ["a b"], True),
        ("mainrun train --preset demo:b", "demo:baseline\\t*\\n", ["baseline"], True),
        ("mainrun train --preset s", "sub/\\nstt\\tx\\n", ["sub/", "stt"], True),
        ("mainrun train --preset s", "sub/\\n", ["sub/"], False),
        ("mainrun nothing", "\\n", [], False),
    ],
)
def test_bash_gets_the_part_of_a_word_that_it_replaces(
    line: str, answer: str, replies: list[str], space: bool, tmp_path: Path
) -> None:
    fake = tmp_path / "mainrun"
    fake.write_text(f"#!/bin/sh\nprintf '{answer}'\necho \"$_TYPER_COMPLETE_ARGS\" >'{tmp_path}/asked'\n")
    fake.chmod(0o755)
    script = f"""compopt() {{ echo nospace; }}
COMP_LINE='{line} later' COMP_POINT={len(line)}
_mainrun_completion '{fake}'
printf '[%s]\\n' "${{COMPREPLY[@]}}"
"""
    command = [str(BASH), "--norc", "-c", completion.BASH + script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert done.stderr == ""
    expected = [f"[{reply}]" for reply in replies or [""]]
    assert done.stdout.splitlines() == ([] if space else ["nospace"]) + expected
    assert (tmp_path / "asked").read_text() == f"{line}\n"


@pytest.mark.parametrize("shell", completion.SCRIPTS)
def test_each_shell_can_read_its_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    result = CliRunner().invoke(app, ["--show-completion", shell])
    assert result.stdout == completion.SCRIPTS[shell]
    (tmp_path / "script").write_text(result.stdout)
    done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


# -- installing


@pytest.mark.parametrize(
    ("shell", "script", "start"),
    [
        ("bash", ".local/share/bash-completion/completions/mainrun", ".bashrc"),
        ("zsh", ".zfunc/_mainrun", ".zshrc"),
        ("fish", ".config/fish/completions/mainrun.fish", ""),
    ],
)
def test_the_completion_is_installed_once(
    shell: str, script: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shellingham, "detect_shell", lambda: (shell, f"/bin/{shell}"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    if start:
        (tmp_path / start).write_text("alias x=y")
    for _ in range(2):
        result = CliRunner().invoke(app, ["--install-completion"])
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(str(tmp_path / script))
    assert (tmp_path / script).read_text() == completion.SCRIPTS[shell]
    if start:
        lines = (tmp_path / start).read_text().splitlines()
        assert lines[:3] == ["alias x=y", "# completion of mainrun", lines[2]] and len(lines) == 3
        assert str((tmp_path / script) if shell == "bash" else (tmp_path / script).parent) in lines[2]


def test_an_unknown_shell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", fail)
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    with pytest.raises(UsageError, match=r"'tcsh' is not supported.*bash, zsh, fish"):
        completion.install()
    with pytest.raises(UsageError, match="'tcsh'; give one of: bash, zsh, fish"):
        completion.show("tcsh")


def test_the_help_of_train_shows_three_examples() -> None:
    text = CliRunner().invoke(app, ["train", "--help"]).stdout
    examples = text.split("Examples:")[1].split("\n\n")[1].splitlines()
    assert len(examples) == 3
    assert all(line.startswith("    mainrun train --") for line in examples)
