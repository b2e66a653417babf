"""Test the output and exit codes of `mainrun grow plan` and `verify` in this process, without training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mainrun.checks import repeat
from mainrun.checks.repeat import RepeatedCheck
from mainrun.cli import app
from mainrun.store.rundir import RunDir
from mainrun.ui import growth_cli

UPCYCLED = 'upcycle_moe {"top_k":2,"router":"random","shards":1,"experts":4}'
START = {
    "n_layer": 2,
    "d_model": 16,
    "n_head": 2,
    "d_ff": 64,
    "batch_size": 8,
    "block_size": 8,
    "vocab_size": 300,
    "lr": 0.01,
    "dropout": 0.1,
}
SETS = ["--preset", "baseline", *(arg for key, value in START.items() for arg in ("--set", f"{key}={value}"))]
GROWS = (
    '{"ops": [{"name": "set_lr", "value": 0.02, "trigger": {"step": 30}},'
    ' {"name": "upcycle_moe", "value": {"experts": 4}, "trigger": {"step": 6000}}]}'
)


def run(*args: str) -> tuple[int, str, str]:
    """Run `mainrun grow` and return the exit code, stdout and stderr."""
    result = CliRunner().invoke(app, ["grow", *args])
    return result.exit_code, result.stdout, result.stderr


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("  ") if cell.strip()]
        for line in text.splitlines()
        if line.strip() and "──" not in line
    ]


# -- plan


def test_the_table_of_a_plan_without_tokens() -> None:
    code, text, _ = run("plan", GROWS, *SETS)
    assert code == 0
    assert cells(text) == [
        ["op", "begins", "layers", "width", "heads", "experts", "parameters", "active", "FLOPs per token",
            "optimizer"],
        ["start", "step 0", "2", "16", "2", "11,520", "11,520", "6.87e+04", "0B"],
        ["set_lr 0.02", "step 30", "2", "16", "2", "11,520", "11,520", "6.87e+04", "0B"],
        [UPCYCLED, "step 6,000", "2", "16", "2", "4", "24,416", "15,904", "9.41e+04",
         "0B"],
    ]  # fmt: skip


def test_the_table_of_a_plan_with_tokens_and_a_speed() -> None:
    code, text, _ = run(
        "plan", GROWS, *SETS, "--set", "optimizer=adamw", "--train-tokens", "64001", "--speed", "1e6"
    )
    assert code == 0
    head, *rows = cells(text)
    assert head[-3:] == ["optimizer", "steps", "ETA"]
    assert [row[-3:] for row in rows] == [
        ["92.2kB", "30", "2:12"],
        ["92.2kB", "5,970", "7:17:43"],
        ["195.3kB", "1,000", "1:40:21"],
    ]
    _, without, _ = run("plan", GROWS, *SETS, "--train-tokens", "64001")
    assert cells(without)[0][-2:] == ["optimizer", "steps"], "the time needs a speed"


def test_unknown_steps_are_left_empty() -> None:
    waits = '{"ops": [{"name": "set_lr", "value": 0.02, "trigger": {"loss_below": 3}}]}'
    code, text, _ = run("plan", waits, *SETS, "--train-tokens", "64001", "--speed", "1e6")
    assert code == 0 and [row[-2:] for row in cells(text)[1:]] == [["7,000", "8:33:14"], ["6.87e+04", "0B"]]


def test_the_column_of_experts_is_shown_without_experts() -> None:
    head, only = cells(run("plan", "[]", *SETS)[1])
    assert head[4:] == ["heads", "experts", "parameters", "active", "FLOPs per token", "optimizer"]
    assert only == ["start", "step 0", "2", "16", "2", "11,520", "11,520", "6.87e+04", "0B"]


def test_a_plan_as_json() -> None:
    code, text, _ = run("plan", GROWS, *SETS, "--train-tokens", "64001", "--speed", "1e6", "--json")
    assert code == 0
    first, _, last = json.loads(text)["segments"]
    assert first == {
        "op": "", "begins": "step 0", "layers": 2, "width": 16, "heads": 2, "experts": 0, "params": 11520,
        "active": 11520,
        "flops_per_token": 68736, "optimizer_bytes": 0, "steps": 30, "tokens": 1920,
        "seconds": 1920 * 68736 / 1e6,
    }  # fmt: skip
    assert last == {
        "op": UPCYCLED, "begins": "step 6000", "layers": 2, "width": 16, "heads": 2,
        "experts": 4, "params": 24416, "active": 15904, "flops_per_token": 94080, "optimizer_bytes": 0,
        "steps": 1000, "tokens": 64000,
        "seconds": 64000 * 94080 / 1e6,
    }  # fmt: skip
    assert json.loads(text)["warnings"] == []


def test_warnings_are_printed_after_the_table_and_in_the_json() -> None:
    drops = '{"ops": [{"name": "stack_layers", "value": [0], "trigger": {"step": 30}}]}'
    message = "ops[0] 'stack_layers': drops layer 1 of 2 and their trained weights."
    code, text, _ = run("plan", drops, *SETS)
    assert code == 0 and text.splitlines()[-1] == f"warning: {message}"
    assert json.loads(run("plan", drops, *SETS, "--json")[1])["warnings"] == [message]


def test_faults_are_printed_one_per_line_and_the_exit_code_is_2() -> None:
    code, text, message = run("plan", '{"version": 3, "ops": [5]}', *SETS)
    assert (code, text) == (2, "")
    assert message.splitlines() == [
        'error: {"version": 3, "ops": [5]} cannot be applied',
        "version=3 is unknown; write version=2, or a list in the original format.",
        "ops[0]=5 is not an op; write { name, value, trigger }.",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["[]", "--speed", "1e6"],
            "got --speed without --train-tokens; give both to see the time, or neither",
        ),
        (["[]", "--preset", "demo"], "preset 'demo' has "),
        (["[]", "--set", "lr=-1"], "lr=-1 is not allowed"),
    ],
)
def test_invalid_arguments_of_plan(args: list[str], message: str) -> None:
    code, text, why = run("plan", *args)
    assert (code, text) == (2, "") and message in why


def test_a_ladder_is_refused_with_the_name_of_a_step() -> None:
    assert (
        "a schedule starts from one config; write, for example, --preset demo:baseline"
        in run("plan", "[]", "--preset", "demo")[2]
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--train-tokens", "0"),
        ("--train-tokens", "-5"),
        ("--train-tokens", "1" * 402),
        ("--speed", "0.5"),
        ("--speed", "0"),
    ],
)
def test_numbers_that_are_too_small_are_refused(option: str, value: str) -> None:
    args = ["plan", "[]", *SETS, option, value] + (["--train-tokens", "64001"] if option == "--speed" else [])
    code, text, why = run(*args)
    assert (code, text) == (2, "") and option in why


def test_the_smallest_numbers_are_allowed() -> None:
    assert run("plan", "[]", *SETS, "--train-tokens", "65", "--speed", "1")[0] == 0
    code, _, why = run("plan", "[]", *SETS, "--train-tokens", "1")
    assert code == 2 and "train has 1 tokens, but one step needs" in why


def test_the_default_preset_is_optimized() -> None:
    code, text, _ = run("plan", "[]", "--json")
    assert code == 0
    (only,) = json.loads(text)["segments"]
    same = json.loads(run("plan", "[]", "--preset", "optimized", "--json")[1])["segments"]
    other = json.loads(run("plan", "[]", "--preset", "baseline", "--json")[1])["segments"]
    assert [only] == same != other


# -- verify


def finding(ok: bool = True, same: bool = True, check: str = "function") -> RepeatedCheck:
    return RepeatedCheck("0-widen_mlp", "widen_mlp", 14, check, ok, same, "max |delta logits| 0")


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace `repeat_ops`. Return the list that the fake returns, followed by the arguments of its calls."""
    called: list[Any] = []

    def fake(run_: RunDir, store: Any) -> Iterable[RepeatedCheck]:
        called.append((run_.path, str(store)))
        return called_findings

    called_findings: list[RepeatedCheck] = []
    monkeypatch.setattr(repeat, "repeat_ops", fake)
    called.append(called_findings)
    return called


VERDICTS = [
    ([finding()], "ok", None),
    ([finding(), finding(check="groups")], "ok", None),
    ([], None, None),
    (
        [finding(same=False)],
        "ok, but different from the run",
        "the repeated ops gave different results than in the run; see the table",
    ),
    ([finding(ok=False)], "FAILS", "1 of 1 checks failed; see the table"),
    (
        [finding(ok=False, check="symmetry")],
        "FAILS",
        f"1 of 1 checks failed; see the table{growth_cli.ASYMMETRY}",
    ),
    ([finding(ok=False, same=False), finding()], "FAILS", "1 of 2 checks failed; see the table"),
    (
        [finding(), finding(same=False)],
        "ok",
        "the repeated ops gave different results than in the run; see the table",
    ),
]


@pytest.mark.parametrize(("findings", "verdict", "message"), VERDICTS)
def test_the_verdicts_of_verify(
    tmp_path: Path,
    repeated: list[Any],
    findings: list[RepeatedCheck],
    verdict: str | None,
    message: str | None,
) -> None:
    repeated[0].extend(findings)
    code, text, why = run("verify", str(tmp_path / "run"))
    assert (code, why) == ((0, "") if message is None else (1, f"error: {message}\n"))
    head, *rows = cells(text)
    assert head == ["op", "step", "check", "details"]
    assert [row[:3] for row in rows] == [["widen_mlp", "14", f.check] for f in findings]
    assert verdict is None or rows[0][3:] == [verdict, "max |delta logits| 0"]
    assert repeated[1][0] == tmp_path / "run"
    (title,) = [line for line in text.splitlines() if "details" in line]
    details = {line.index("max |delta") for line in text.splitlines() if "max |delta" in line}
    assert details <= {title.index("details")}, "the column of the verdict has no name"


def test_verify_with_json_fails_too(tmp_path: Path, repeated: list[Any]) -> None:
    repeated[0].append(finding(ok=False))
    code, text, why = run("verify", str(tmp_path / "run"), "--json")
    assert json.loads(text) == [
        {"op": "0-widen_mlp", "name": "widen_mlp", "step": 14, "check": "function", "ok": False, "same": True,
         "detail": "max |delta logits| 0"},
    ]  # fmt: skip
    assert code == 1 and why == "error: 1 of 1 checks failed; see the table\n"


def test_verify_uses_the_store_next_to_the_run_or_the_given_one(
    tmp_path: Path, repeated: list[Any], monkeypatch: Any
) -> None:
    monkeypatch.delenv("MAINRUN_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    run("verify", "runs/one")
    run("verify", "runs/one", "--store", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "runs") in str(repeated[1][1]) and str(tmp_path / "elsewhere") in str(
        repeated[2][1]
    )


def test_verify_refuses_an_impossible_file_name() -> None:
    code, _, why = run("verify", "x" * 300)
    assert code == 2 and "got RUN" in why and "a name has 300 bytes" in why


def test_the_help_names_both_commands() -> None:
    text = run("--help")[1]
    assert "plan" in text and "verify" in text


def test_the_help_of_plan_describes_each_option() -> None:
    text = " ".join(run("plan", "--help")[1].split())
    for words in (
        "FILE <str> A growth schedule: a JSON, YAML or TOML file, or inline JSON.",
        "--preset NAME|FILE The config at the start of the run. [default: optimized]",
        "--set KEY=VALUE Set a config field. Can be repeated.",
        "--train-tokens N Training tokens per epoch. Used to show steps", "[1<=x<=10000000000000]",
        "--speed FLOP/S With --train-tokens, also show the time. [x>=1.0]", "--json ", "--debug ",
    ):  # fmt: skip
        assert words in text, words
    assert text.count("default:") == 1


def test_the_help_of_verify_describes_each_option() -> None:
    text = " ".join(run("verify", "--help")[1].split())
    assert "RUN" in text and "A run directory." in text and "--store PLACE" in text and "default:" not in text
