"""The mutation tester: which bugs it plants, which tests notice them, and which arguments it refuses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mutants
import mutate
import pytest

SCRIPT = Path(mutate.__file__)


def planted(source: str) -> set[str]:
    """Return the code of every mutant of a line, without spaces."""
    drawn = mutants.draw("x.py", f"{source}\n", 0, random.Random(0))
    return {mutate.without_spaces(mutant.after) for mutant in drawn}


@pytest.mark.parametrize(
    ("source", "mutant"),
    [
        ("x = a < b", "x=a<=b"),
        ("x = a <= b", "x=a>b"),
        ("x = a == b", "x=a!=b"),
        ("x = a is None", "x=aisnotNone"),
        ("x = a - b", "x=a+b"),
        ("x = -a", "x=a"),
        ("x = not a", "x=a"),
        ("x = a if b else c", "x=aifnotbelsec"),
        ("x = 1e-6", "x=1.000001"),
        ("x = 3", "x=2"),
        ("x = True", "x=False"),
        ("x = a and b", "x=aorb"),
        ("x = a and b", "x=b"),
        ("x = a or b or c", "x=aorc"),
        ("x = {'a': 1, 'b': 2}", "x={'b':2,}"),
        ("x = {a, b}", "x={a,}"),
        ("x = (a, b, c)", "x=(a,c,)"),
        ("f(a, key=b)", "f(a)"),
        ("f(a)", "pass"),
        ("x[0] = a", "pass"),
        ("x.y = a", "pass"),
        ("x += a", "pass"),
        ("raise ValueError(x)", "pass"),
        ("x = [a for a in b if a]", "x=[aforainbifTrue]"),
        ("x = min(a)", "x=max(a)"),
        ("x = any(a)", "x=all(a)"),
    ],
)
def test_a_bug_is_planted(source: str, mutant: str) -> None:
    assert mutant in planted(source)


@pytest.mark.parametrize(
    "source",
    [
        "x = a",
        "x: int | None = a",
        "def f(x: tuple[int, str] | None) -> int | None: ...",
        'x = f"{digest[:12]}"',
        "x = zip(a, b, strict=True)",
        "x = path.read_text(encoding=name)",
        "assert isinstance(x, int) and y < name, x",
        "x = (a for a in b)",
    ],
)
def test_nothing_is_planted_where_no_test_can_notice(source: str) -> None:
    drawn = mutants.draw("x.py", f"{source}\n", 0, random.Random(0))
    assert [mutant for mutant in drawn if mutant.operator != "AddNot"] == []


def test_a_file_with_a_dotted_exception_name_is_mutated() -> None:
    source = "try:\n    x = a < b\nexcept (c.Error, d.Error):\n    x = 1\n"
    drawn = mutants.draw("x.py", source, 0, random.Random(0))
    assert {mutate.without_spaces(mutant.after) for mutant in drawn} >= {"x=a<=b", "x=2"}


def test_a_seed_draws_the_same_mutants_and_another_seed_others() -> None:
    source = "\n".join(f"x{i} = {i} < y" for i in range(30))
    first, again, other = (mutants.draw("x.py", source, 10, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len({mutant.line for mutant in first}) > 5


def test_a_mutant_knows_the_lines_of_its_statement() -> None:
    source = "if (a <\n    b):\n    x = [\n        1,\n    ]\n"
    lines = {mutant.line: mutant.lines for mutant in mutants.draw("x.py", source, 0, random.Random(0))}
    assert lines[1] == range(1, 3)
    assert lines[4] == range(3, 6)


def test_every_source_file_has_tests_that_mirror_it() -> None:
    root = SCRIPT.parents[1]
    files = mutants.sources(root, ["mainrun", "sweeps", "reports"])
    tests = {file: mutate.mirrored_tests(file, root) for file in files}
    assert tests["mainrun/growth/controller.py"] == [
        "tests/test_growth_controller.py",
        "tests/test_growth_controller_rows.py",
    ]
    assert [file for file, names in tests.items() if not names] == ["mainrun/__main__.py"]


SOURCE = """LIMIT = 10


def check(x):
    if x > LIMIT:
        raise ValueError(x)
    return x + 1 if x else 0


def unseen(x):
    return x < 3
"""
TESTS = """import pytest
from mainrun.thing import check


@pytest.mark.parametrize("x", [0, 1, 10])
def test_check(x):
    assert check(x) == (x + 1 if x else 0)


def test_too_large():
    with pytest.raises(ValueError):
        check(11)


def test_fails_anyway():
    assert False
"""
EQUIVALENT = """[["mainrun/thing.py"]]
line = "return x < 3"
mutant = "return x <= 3"
reason = "nobody calls it"
"""


class Outcome(NamedTuple):
    out: str
    err: str
    rows: list[dict]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Run the mutation tester on a small tree. Return stdout, stderr and the rows.

    One function of the tree has tests, and another has none.
    """
    root = tmp_path_factory.mktemp("tree")
    (root / "mainrun").mkdir()
    (root / "tests").mkdir()
    (root / "mainrun" / "__init__.py").touch()
    (root / "mainrun" / "thing.py").write_text(SOURCE)
    (root / "tests" / "test_thing.py").write_text(TESTS)
    (root / "equivalent.toml").write_text(EQUIVALENT)
    (root / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\npythonpath = ["."]\nmarkers = ["slow: no"]\n'
    )
    options = [
        "--root",
        str(root),
        "--sample",
        "0",
        "--jobs",
        "1",
        "--json",
        str(root / "out.json"),
        "--equivalent",
        str(root / "equivalent.toml"),
    ]
    command = [sys.executable, str(SCRIPT), "mainrun/thing.py", *options, "--at-least", "99"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return Outcome(done.stdout, done.stderr, json.loads((root / "out.json").read_text())["mutants"])


def test_what_a_test_notices_is_killed_and_named(outcome: Outcome) -> None:
    killed = {
        mutate.without_spaces(row["mutant"]["after"]): row["by"]
        for row in outcome.rows
        if row["outcome"] == "killed"
    }
    assert killed["ifx>=LIMIT:"] == "tests/test_thing.py::test_check[10]"
    assert killed["pass"] == "tests/test_thing.py::test_too_large"
    assert {"LIMIT=9", "LIMIT=11", "ifx<=LIMIT:", "returnx-1ifxelse0"} <= set(killed)


def test_what_no_test_notices_survives(outcome: Outcome) -> None:
    survived = {
        mutate.without_spaces(row["mutant"]["after"]) for row in outcome.rows if row["outcome"] == "survived"
    }
    assert survived == {"returnx>=3", "returnx<4", "returnx<2"}
    assert "survived: mainrun/thing.py:11" in outcome.out


def test_a_listed_equivalent_is_named_with_its_reason_and_does_not_count(outcome: Outcome) -> None:
    assert [row["reason"] for row in outcome.rows if row["outcome"] == "equivalent"] == ["nobody calls it"]
    assert "nobody calls it" in outcome.out
    killed = sum(row["outcome"] == "killed" for row in outcome.rows)
    counts = f"{killed} killed (0 by the time limit), 3 survived, 1 equivalent"
    assert f"{counts}: {killed / (killed + 3):.1%} of {killed + 3}" in outcome.out


def test_a_score_below_the_minimum_is_reported(outcome: Outcome) -> None:
    killed = sum(row["outcome"] == "killed" for row in outcome.rows)
    assert outcome.err == f"mutate: {100 * killed / (killed + 3):.1f}% is below --at-least 99\n", (
        "stderr is not a terminal, so there is no progress"
    )


def test_a_test_that_fails_without_a_mutant_is_skipped(outcome: Outcome) -> None:
    assert "skipped, because it fails without a mutant: tests/test_thing.py::test_fails_anyway" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "no such file"),
        (["/etc/passwd"], "/etc/passwd: outside of"),
        (["../x.py"], "../x.py: outside of"),
        (["docs"], "no Python file"),
        (["README.md"], "no Python file"),
        (["mainrun/__main__.py"], "no test mirrors mainrun/__main__.py"),
        (["mainrun/stats.py", "--tests", "tests/test_statistics.py"], "no such test file"),
        (
            ["mainrun/stats.py", "--equivalent", "/nofile"],
            "--equivalent /nofile: cannot be read (No such file or directory)",
        ),
        (["mainrun/stats.py", "--equivalent", str(SCRIPT)], "not a list like equivalent_mutants.toml"),
        (["mainrun/stats.py", "--json", "/nofolder/x.json"], "its folder does not exist"),
        (["mainrun/stats.py", "--json", "/"], "is a folder"),
    ],
)
def test_a_wrong_path_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutate.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--sample=-1", "--sample=all", "--jobs=0", "--at-least=nan", "--at-least=200", "--at-least=-1"]
)
def test_a_wrong_number_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        mutate.main(["mainrun/stats.py", option])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "./task mutate: error: argument" in message
    assert "give a whole number of" in message or "give a number from 0 to 100" in message


def test_one_mutant_is_singular() -> None:
    assert "x.py: 1 mutant (seed 1)" in mutate.summary("x.py", [mutate.Verdict(None, "killed")], 1, 2.0)
    assert "x.py: 0 mutants (seed 1)" in mutate.summary("x.py", [], 1, 2.0)


@pytest.mark.parametrize(("terminal", "text"), [(True, "\r12/40\r"), (False, "")])
def test_progress_is_for_terminals(
    terminal: bool, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    mutate.show_progress(12, 40)
    assert capsys.readouterr().err == text


WAITING = """
import os, time
from pathlib import Path
from mainrun.thing import LIMIT

def test_waits_for_a_mutant():
    if LIMIT != 10:
        Path({file!r}).write_text(str(os.getpid()))
        time.sleep(600)
"""


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[list[str], Path]:
    """Return a command that runs endless mutants, and the file to which a mutant writes its process id."""
    (tmp_path / "mainrun").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "mainrun" / "__init__.py").touch()
    (tmp_path / "mainrun" / "thing.py").write_text("LIMIT = 10\n")
    pid_file = tmp_path / "pid"
    (tmp_path / "tests" / "test_thing.py").write_text(WAITING.format(file=str(pid_file)))
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\npythonpath = ["."]\nmarkers = ["slow: no"]\n'
    )
    command = [
        sys.executable,
        str(SCRIPT),
        "mainrun/thing.py",
        "--root",
        str(tmp_path),
        "--jobs",
        "1",
        "--sample",
        "1",
    ]
    return command, pid_file


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow), "SIGKILL"])
def test_no_process_outlives_the_command(name: str, waiting: tuple[list[str], Path]) -> None:
    command, pid_file = waiting
    # Shells start background jobs with SIGINT ignored, and child processes inherit this setting.
    allow_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=allow_interrupts
    )
    wait_until(lambda: pid_file.is_file() and pid_file.read_text() != "")
    process.send_signal(getattr(signal, name))
    stderr = process.communicate(timeout=60)[1]
    if name != "SIGKILL":
        assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    wait_until(lambda: not is_alive(int(pid_file.read_text())))


@pytest.mark.slow
def test_a_mutant_that_waits_is_killed_by_the_time_limit_of_its_test(waiting: tuple[list[str], Path]) -> None:
    command, pid_file = waiting
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "1 killed (1 by the time limit)" in done.stdout
    assert not is_alive(int(pid_file.read_text()))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 15  # the mutation tester kills a waiting mutant after at least 20 seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_every_equivalent_mutant_has_a_reason_and_its_line_exists() -> None:
    """Entries for lines that no longer exist must be removed."""
    root = SCRIPT.parents[1]
    for file, line, _mutant in mutate.read_equivalents([mutate.EQUIVALENT]):
        assert line in mutate.without_spaces((root / file).read_text()), f"{file}: {line}"
    assert all(mutate.read_equivalents([mutate.EQUIVALENT]).values())
