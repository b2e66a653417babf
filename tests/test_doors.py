"""With any input, a command ends with a documented exit code and at most one message.

See doors.py and odd_cases.py.

    python tests/doors.py --cases 20000 --seed 1    # many more random cases than these tests run
    python tests/doors.py --case 1:57               # one case, with all of its output
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import odd_cases
import pytest
from doors import ROOT, Driver, Outcome
from odd_cases import Case
from typer.testing import CliRunner

from mainrun import config
from mainrun.cli import app
from mainrun.errors import ConfigError, UsageError
from mainrun.files import inputs
from mainrun.plan.recipes import load

TREE = Path(os.environ.get("DOORS_TREE", ROOT))
CASES = int(os.environ.get("DOORS_CASES", "20"))
SEED = int(os.environ.get("DOORS_SEED", "1"))


@pytest.fixture(scope="module")
def fixture(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_cases.make_fixture(driver, tmp_path_factory.mktemp("doors"))


# -- known failures


class Row(NamedTuple):
    words: str  # the command line; LONG, DEEP and the other keys of `ODD` are placeholders
    expected: str  # part of the message, or of stdout if the command succeeds
    code: int = 2
    around: dict[str, Any] = {}  # noqa: RUF012


ODD = {
    "LONG": "x" * 300,
    "FOLDERS": "d/" * 1500 + "d",
    "DEEP": "[" * 3000 + "]" * 3000,
    "OBJECTS": '{"ops": ' + '{"a":' * 3000 + "1" + "}" * 3001,
    "DOTTED": "{" + "a." * 3000 + "b = 1}",
    "DIGITS": "1" * 5000,
    "HEX": "0x" + "f" * 5000,
    "BYTES": os.fsdecode(b"r\xe9sultats"),
}
DEEP = "nested too deep: at most 100 levels"
LONG = "300 bytes; at most 255"
LOOP = "leads back to itself"
TRAIN = "train --preset small.toml --dry-run"

FAILED_ONCE = [
    # nested TOML and JSON
    Row(f"{TRAIN} --set lr=DEEP", DEEP),
    Row(f"{TRAIN} --set lr=DOTTED", DEEP),
    Row(f"{TRAIN} --set growth=DEEP", DEEP),
    Row(f"{TRAIN} --set growth=deep.toml", DEEP),
    Row(f"{TRAIN} --set growth=dotted.toml", DEEP),
    Row("train --preset deep.toml", DEEP),
    Row("train --preset dotted.toml", DEEP),
    Row("presets deep.toml", DEEP),
    Row(f"{TRAIN} --set corpus=mix:deepmix.toml", DEEP),
    Row("sweep run demo --plan --set lr=DEEP", DEEP),
    Row("sweep run dotted.toml --plan", DEEP),
    Row("grow plan deep.toml --preset small.toml", DEEP),
    Row("bench step --set lr=DEEP", DEEP),
    # names of 300 characters
    Row("train --preset LONG.toml", "305 bytes; at most 255"),
    Row("train --preset LONG", "unknown preset"),
    Row(f"{TRAIN} --out LONG", LONG),
    Row(f"{TRAIN} --store LONG", LONG),
    Row(f"{TRAIN} --set corpus=file:LONG", LONG),
    Row(f"{TRAIN} --set corpus=mix:LONG", LONG),
    Row(f"{TRAIN} --set growth=LONG.json", "305 bytes; at most 255"),
    Row("grow plan LONG.json", "305 bytes; at most 255"),
    Row("grow verify LONG", LONG),
    Row("sweep run LONG", "unknown study"),
    Row("sweep run LONG.toml", "305 bytes; at most 255"),
    Row("sweep run broken.toml --out LONG", LONG),
    Row("sweep ls --out LONG", LONG),
    Row("sweep show done --out LONG", LONG),
    Row("sweep export done LONG", LONG),
    Row("compare LONG", "no run"),
    Row("compare RUN --svg LONG", LONG),
    Row("compare RUN --out LONG", LONG),
    Row("sample LONG --prompt x", "no run"),
    Row("sample RUN --prompt x --out LONG", LONG),
    Row("report LONG", LONG),
    Row("report --out LONG", LONG),
    Row("report --runs LONG", LONG),
    Row("report --log LONG", LONG),
    Row("report --figures LONG", LONG),
    Row("report --tables LONG", LONG),
    Row("submit --runs LONG", LONG),
    Row("submit --report LONG", LONG),
    Row("submit --out LONG", LONG),
    Row("verify LONG", LONG),
    Row("doctor --out LONG", LONG),
    Row("demo --out LONG", LONG),
    Row("store ls --store LONG", LONG),
    Row("sweep run broken.toml --out FOLDERS", "1,500 folders; at most 200"),
    Row(f"{TRAIN} --set seed=6", "got MAINRUN_CACHE", 2, {"env": {"MAINRUN_CACHE": "d/" * 1500}}),
    Row(f"{TRAIN} --set seed=6", "got MAINRUN_CACHE", 2, {"env": {"MAINRUN_CACHE": "loop"}}),
    # These paths are in the home directory of an unknown user.
    Row("store ls --store ~no-such-user", "~ names no user"),
    Row(f"{TRAIN} --set corpus=file:~no-such-user/x", "~ names no user"),
    Row("download hn", "~ names no user", 2, {"env": {"MAINRUN_CACHE": "~no-such-user"}}),
    # symlinks that point to themselves
    Row(f"{TRAIN} --out loop", LOOP),
    Row(f"{TRAIN} --store loop", LOOP),
    Row("store ls --store loop", LOOP),
    Row(f"{TRAIN} --out loop/x", LOOP),
    # An argument is not text, or stdout cannot be written.
    Row("train --preset small.toml --out BYTES", "not UTF-8 text"),
    Row("presets", "stdout cannot be written (No space left on device)", 2, {"stdout": "full"}),
    Row("presets --json", "stdout cannot be written (No space left on device)", 2, {"stdout": "full"}),
    Row("presets", "", 0, {"stdout": "closed"}),  # `| head` closes stdout early, too
    Row("presets no", "", 2, {"stderr": "full"}),
    Row("presets no", "", 2, {"stderr": "closed"}),
    # numbers
    Row(f"{TRAIN} --set seed=DIGITS", "5,000 digits"),
    Row(f"{TRAIN} --set seed=HEX", "more than 300 digits"),
    Row("train --preset numbers.toml", "5,000 digits"),
    Row("sample RUN --prompt x --temperature 1e-320", "x", 0),
    # messages that were misleading
    Row("train --preset fifo.toml", "is a named pipe"),
    Row("sweep run fifo.toml", "is a named pipe"),
    Row("sweep run folder.toml", "is a folder"),
    Row(f"{TRAIN} --set corpus=file:fifo", "is a named pipe"),
    Row("presets bom.toml", "num_titles", 0),
    Row("presets empty.toml", "default", 0),
    Row(f"{TRAIN} --set corpus=file:wide.csv", "more than 131,072 characters; shorten it"),
]


@pytest.mark.parametrize(
    "row", FAILED_ONCE, ids=[inputs.shown(f"{row.words} {row.around}", 120) for row in FAILED_ONCE]
)
def test_input_that_failed_once(driver: Driver, fixture: Path, tmp_path: Path, row: Row) -> None:
    outcome = end_of(driver, fixture, tmp_path, row.words, **row.around)
    assert outcome.code == row.code
    output = outcome.message if row.code else outcome.out
    assert row.expected in output, output


def end_of(driver: Driver, fixture: Path, tmp_path: Path, words: str, **around: Any) -> Outcome:
    argv = [re.sub("|".join(ODD), lambda odd: ODD[odd[0]], word) for word in words.split(" ")]
    outcome, problem = odd_cases.run_case(driver, Case("", argv, **around), fixture, tmp_path / "case")
    assert not problem, f"{problem}\n{outcome}"
    return outcome


@pytest.mark.parametrize("keys", [20_000, pytest.param(300_000, marks=pytest.mark.slow)])
def test_a_preset_of_many_unknown_keys(driver: Driver, tmp_path: Path, keys: int) -> None:
    (tmp_path / "keys.toml").write_text("".join(f"k{i} = 1\n" for i in range(keys)), encoding="utf-8")
    outcome = driver.run(["train", "--preset", "keys.toml"], cwd=tmp_path, limit=300)
    assert not outcome.problem() and outcome.code == 2
    assert len(outcome.message.splitlines()) == 11
    assert outcome.message.startswith("unknown field 'k0'")
    assert outcome.message.endswith(f"and {keys - 10:,} more faults")


def test_suggestions_are_computed_only_for_the_faults_that_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison of a name with all fields takes 0.2 ms, so 300,000 unknown names would take a minute."""
    names = []
    monkeypatch.setattr(config, "nearest", lambda name, allowed: names.append(name) or "")
    (tmp_path / "keys.toml").write_text("".join(f"k{i} = 1\n" for i in range(2000)), encoding="utf-8")
    with pytest.raises(ConfigError, match="and 1,990 more faults"):
        load(str(tmp_path / "keys.toml"))
    assert names == [f"k{i}" for i in range(10)]


# -- input that is too large


@pytest.mark.parametrize(
    ("words", "document", "expected"),
    [
        (
            "grow plan odd.json",
            '{"ops": [' + ",".join(["{}"] * 1001) + "]}",
            "ops has 1,001 entries; write at most 1,000",
        ),
        (
            "grow plan odd.json",
            "[" + ",".join(["{}"] * 1001) + "]",
            "the list has 1,001 ops; write at most 1,000",
        ),
        (
            "grow plan odd.json",
            "{" + ",".join(f'"k{i}": 1' for i in range(2000)) + "}",
            "and 1,990 more unknown keys",
        ),
        (
            "grow plan odd.json",
            '{"ops": [{' + ",".join(f'"k{i}": 1' for i in range(2000)) + "}]}",
            "and 1,990 more unknown keys",
        ),
        ("grow plan odd.yaml", odd_cases.bomb("x"), "more than 1,000,000 values"),
        ("grow plan odd.yaml", "k: 1\n" * 100_000, "at most 300,000 are allowed in YAML; use JSON instead"),
        ("sweep run odd.toml", "".join(f"k{i} = 1\n" for i in range(2000)), "and 1,991 more faults"),
        (
            "train --set corpus=mix:odd.toml",
            '[[source]]\npath = "x"\n' * 1001,
            "has 1,001 sources; write at most 1,000",
        ),
        ("train --preset odd.toml", "lr = " + '"x' * 2, "not valid TOML"),
        ("presets odd.toml", "#" * 16_000_001, "has 16,000,001 bytes; at most 16,000,000 are allowed"),
    ],
    ids=lambda text: inputs.shown(text, 40),
)
def test_too_large_documents(
    driver: Driver, tmp_path: Path, words: str, document: str, expected: str
) -> None:
    name = re.search(r"odd\.\w+", words)
    assert name
    (tmp_path / name[0]).write_text(document, encoding="utf-8")
    outcome = driver.run(words.split(), cwd=tmp_path)
    assert not outcome.problem() and outcome.code == 2
    assert expected in outcome.message


def test_the_coldest_temperature_is_the_likeliest_token(
    driver: Driver, fixture: Path, tmp_path: Path
) -> None:
    """A temperature of 1e-320 becomes 0 in float32, so it must not be used as a divisor."""
    samples = [
        end_of(driver, fixture, tmp_path, f"sample RUN --prompt x -n 3 --temperature {t}").out
        for t in ("0", "1e-320", "1e-31")
    ]
    assert samples[0] and samples == [samples[0]] * 3


def test_a_full_stdout_does_not_end_a_training(driver: Driver, fixture: Path, tmp_path: Path) -> None:
    odd_cases.make_folder(fixture, tmp_path / "case", ())
    outcome = driver.run(
        ["train", "--preset", "small.toml", "--set", "seed=5", "--json"], cwd=tmp_path / "case", stdout="full"
    )
    assert outcome.code == 2 and not outcome.problem()
    assert len(list((tmp_path / "case" / "runs").glob("*/summary.json"))) == 2


# -- the endings of a command


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "xx"),
            2,
            "error: 'xx' cannot be used: the name is too long",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "xx"),
            75,
            "interrupted: no space left to write 'xx'",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 75, "interrupted: no space left to write a file"),
        (
            OSError(errno.EIO, "Input/output error"),
            1,
            "crash: OSError: [Errno 5] Input/output error; --debug shows the traceback",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "crash: BrokenPipeError: [Errno 32] Broken pipe"),
        (RuntimeError(""), 1, "crash: RuntimeError:; --debug"),
        (UsageError("a\x1b[2Jb\nc"), 2, "error: a\\x1b[2Jb\nc\n"),
        (UsageError("x" * 5000), 2, "x" * 800 + " [... 3,800 characters ...] " + "x" * 400),
        (UsageError("\n".join(["y" * 1000] * 50)), 2, "and 48 more lines"),
    ],
    ids=lambda value: inputs.shown(value, 60),
)
def test_every_error_gives_one_message(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, expected: str
) -> None:
    def fail() -> list[str]:
        raise error

    monkeypatch.setattr("mainrun.plan.recipes.preset_names", fail)
    result = CliRunner().invoke(app, ["presets"])
    assert (result.exit_code, result.stdout) == (code, "")
    assert expected in result.stderr and len(result.stderr) < 3000 and "Traceback" not in result.stderr


@pytest.mark.parametrize("word", ["a\0", "\ud83d"])
def test_an_argument_that_is_not_text(word: str) -> None:
    result = CliRunner().invoke(app, ["presets", word])
    assert (
        result.exit_code == 2
        and result.stderr.startswith("error: got the argument '")
        and "not UTF-8 text" in result.stderr
    )


# -- random cases


def test_every_option_has_odd_values() -> None:
    """New commands and options are tested automatically, but a text option needs a row in `TEXT`."""
    known = odd_cases.commands()
    assert set(known) == set(odd_cases.BASE), "give each command a row in BASE, which keeps its cases short"
    for params in known.values():
        for param in params:
            odd_cases.draw_for(param)


def test_every_path_is_validated() -> None:
    """Every path option and path argument has a callback, which refuses names of 300 characters."""
    bare = [
        f"{command} {param.opts[0]}"
        for command, params in odd_cases.commands().items()
        for param in params
        if param.type_descriptor.annotation is Path and param.callback is None
    ]
    assert bare == []


def test_a_case_is_a_function_of_its_number() -> None:
    known = odd_cases.commands()
    cases = [odd_cases.make(7, index, known) for index in range(2000)]
    assert cases == [odd_cases.make(7, index, known) for index in range(2000)]
    assert {case.command for case in cases} == set(known)


def check_cases(driver: Driver, fixture: Path, folder: Path, indices: range) -> None:
    known = odd_cases.commands()
    for index in indices:
        case = odd_cases.make(SEED, index, known)
        _, problem = odd_cases.run_case(driver, case, fixture, folder / "case")
        assert not problem, (
            f"{SEED}:{index}: {problem}\n{case}\npython tests/doors.py --case {SEED}:{index} shows it"
        )


def test_random_cases(driver: Driver, fixture: Path, tmp_path: Path) -> None:
    check_cases(driver, fixture, tmp_path, range(CASES))


@pytest.mark.slow
def test_more_random_cases(driver: Driver, fixture: Path, tmp_path: Path) -> None:
    check_cases(driver, fixture, tmp_path, range(CASES, 39 * CASES))


# -- tests/doors.py itself


@pytest.mark.parametrize(
    ("err", "problem"),
    [
        ("crash: KeyError: 1", "a crash: KeyError: 1"),
        ("crash in process 3: KeyError: 1", "a crash: KeyError: 1"),
        ("crash in process abc: KeyError: 1", "a crash: KeyError: 1"),
        ("error in process a b: no such file; give another", ""),
    ],
)
def test_a_crash_is_recognised_in_every_process(err: str, problem: str) -> None:
    assert Outcome("train", 2, "", err, 1.0).problem() == problem


@pytest.mark.parametrize("script", ["doors.py", "damage.py"])
@pytest.mark.parametrize("option", ["--case=1", "--case=a:b", "--cases=0"])
def test_a_wrong_option_of_the_tool_is_refused(script: str, option: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), option], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{script}: error: argument {option.split('=')[0]}: got " in done.stderr


@pytest.mark.slow
def test_an_interrupted_tool_ends_without_a_traceback() -> None:
    # Background jobs ignore SIGINT, so restore the default handler.
    allow_interrupts = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, str(ROOT / "tests" / "doors.py"), "--cases", "100000", "--jobs", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=allow_interrupts,
    )
    time.sleep(6)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert (process.returncode, stderr) == (130, "doors: interrupted\n")


# -- locales


@pytest.mark.parametrize(
    ("env", "code", "expected"),
    [
        ({"LC_ALL": "C"}, 0, "ü: nothing"),  # Python uses UTF-8 in the locale C
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            2,
            "set PYTHONUTF8=1 or LC_ALL=C.UTF-8",
        ),
    ],
)
def test_umlauts_in_a_small_locale(tmp_path: Path, env: dict[str, str], code: int, expected: str) -> None:
    (tmp_path / "ü.toml").write_text('about = "ü: nothing"\nlr = 0.5\n', encoding="utf-8")
    with Driver(TREE, env=env, warm=False) as driver:
        outcome = driver.run(["presets", "ü.toml"], cwd=tmp_path)
        assert not outcome.problem() and outcome.code == code
        assert code == 0 or expected in outcome.message
        shown = driver.run(["grow", "plan", "growth.json"], cwd=tmp_path)
        assert not shown.problem()
