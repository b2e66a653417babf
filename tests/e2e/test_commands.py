"""Tests the command line as a user runs it, with processes, signals, files and terminals."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_sets
from doors import ROOT, Driver, Outcome

MAINRUN = [sys.executable, "-m", "mainrun"]


def run(*args: object, env: dict[str, str] | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*MAINRUN, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=300,
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def forked(driver: Driver, tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that runs a command in a forked process, which need not import torch again."""

    def run_forked(*args: object, code: int = 0, **env: str) -> Outcome:
        env = {"MAINRUN_CACHE": os.environ["MAINRUN_CACHE"], **env}
        outcome = driver.run([str(arg) for arg in args], cwd=tmp_path, env=env)
        assert outcome.code == code and not outcome.problem(), outcome
        return outcome

    return run_forked


def train_args(out: Path, **changes: object) -> list[str]:
    return ["train", "--preset", "baseline", *tiny_sets(**changes), "--out", str(out)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return a folder with a run that several tests read, and the process that wrote the run."""
    out = tmp_path_factory.mktemp("runs")
    return out, run(*train_args(out), "--json")


def children_seconds() -> float:
    """Return the CPU time of all finished child processes, which hardly depends on the machine's load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def only(out: Path) -> Path:
    (path,) = (p for p in out.iterdir() if p.is_dir() and p.name != ".store")
    return path


def test_a_run_writes_a_complete_run_directory(trained: tuple[Path, Any]) -> None:
    out, done = trained
    summary = json.loads(done.stdout)
    path = only(out)
    assert path.name == summary["run"]
    assert path.name.startswith("baseline-")
    for name in ("config.json", "env.json", "status.json", "summary.json", "tokenizer.json"):
        assert isinstance(json.loads((path / name).read_text(encoding="utf-8")), dict), name
    assert json.loads((path / "summary.json").read_text(encoding="utf-8")) == summary
    assert json.loads((path / "status.json").read_text(encoding="utf-8"))["state"] == "done"
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [r["step"] for r in rows if r["event"] == "step"]
    assert steps == list(range(1, summary["steps"] + 1))
    assert {r["step"] for r in rows if r["event"] == "eval"} >= {1, summary["steps"]}
    last = [r for r in rows if r["event"] == "eval" and r["split"] == "val"][-1]
    assert (last["full"], last["official"]) == (summary["last"]["full"], summary["last"]["official"])
    assert any((path / "checkpoints").iterdir())
    assert not list(path.rglob("*tmp*"))
    assert len({g["name"] for g in summary["guards"]}) == len(summary["guards"]) >= 13


def test_stdout_has_the_result_and_stderr_the_progress(trained: tuple[Path, Any]) -> None:
    _, done = trained
    assert isinstance(json.loads(done.stdout), dict)
    lines = done.stderr.splitlines()
    assert "steps of 128 tokens" in lines[0]
    assert all("val full" in line and "best" in line for line in lines[1:])
    assert len(lines) >= 3
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr


def test_a_finished_run_is_shown_again_within_a_second(trained: tuple[Path, Any]) -> None:
    out, first = trained
    before = files(out)
    times = []
    while min(times, default=1.0) >= 1.0 and len(times) < 3:
        begin = children_seconds()
        done = run(*train_args(out), "--json")
        times.append(children_seconds() - begin)
        assert (done.stdout, done.stderr) == (first.stdout, "")
    assert min(times) < 1.0
    assert files(out) == before


@pytest.mark.slow
def test_fresh_trains_a_run_again_to_the_same_bits(trained: tuple[Path, Any], tmp_path: Path) -> None:
    first = json.loads(trained[1].stdout)
    one = json.loads(run(*train_args(tmp_path), "--json", "--quiet").stdout)
    checkpoint = max((only(tmp_path) / "checkpoints").iterdir())
    stamp = (checkpoint / "meta.json").stat().st_mtime_ns
    again = json.loads(run(*train_args(tmp_path), "--json", "--fresh").stdout)
    assert (checkpoint / "meta.json").stat().st_mtime_ns > stamp
    assert one["weights"] == again["weights"] == first["weights"]
    assert one["last"] == again["last"]
    assert again["resumed"] == 0


def test_quiet_prints_nothing(tmp_path: Path, forked: Callable[..., Outcome]) -> None:
    done = forked(*train_args(tmp_path / "runs"), "--quiet")
    assert (done.out, done.err) == ("", "")
    assert (only(tmp_path / "runs") / "summary.json").is_file()


def test_without_json_the_result_is_a_table(trained: tuple[Path, Any]) -> None:
    out, first = trained
    summary = json.loads(first.stdout)
    done = run(*train_args(out))
    assert summary["run"] in done.stdout
    assert f"{summary['last']['full']:.4f}" in done.stdout
    assert str(only(out)) in done.stdout


def test_a_dry_run_shows_the_plan_and_trains_nothing(
    tmp_path: Path, trained: tuple[Path, Any], forked: Callable[..., Outcome]
) -> None:
    out = tmp_path / "runs"
    summary = json.loads(trained[1].stdout)
    cost = json.loads(forked(*train_args(out), "--dry-run", "--json").out)
    assert cost["run"] == summary["run"]
    assert cost["params"] == summary["params"]
    assert cost["flops"] == summary["flops"]
    assert cost["plan"]["steps"] == summary["steps"]
    assert cost["memory"] > 4 * cost["params"]
    assert cost["eta_seconds"] > 0
    text = forked(*train_args(out), "--dry-run").out
    assert summary["run"] in text
    assert "memory" in text
    assert "ETA" in text
    assert f"{summary['steps']}" in text
    assert not out.exists()


@pytest.mark.slow
def test_compare(trained: tuple[Path, Any], tmp_path: Path) -> None:
    out, first = trained
    summary = json.loads(first.stdout)
    run(*train_args(tmp_path, lr=0.1), "--quiet")
    one, two = json.loads(run("compare", only(out), only(tmp_path), "--json").stdout)
    assert one["run"] == summary["run"]
    assert one["delta_full"] == 0
    assert two["delta_full"] == pytest.approx(two["full_last"] - one["full_last"])
    assert two["delta_full"] != 0
    done = run("compare", only(out), only(tmp_path))
    assert one["run"] in done.stdout
    assert two["run"] in done.stdout
    assert f"{two['delta_full']:+.4f}" in done.stdout
    other = tmp_path / "other"
    run(*train_args(other, num_titles=500), "--quiet")
    refused = run("compare", only(out), only(other), code=2)
    assert refused.stdout == ""
    assert "val fingerprint" in refused.stderr


def test_sample(trained: tuple[Path, Any], forked: Callable[..., Outcome]) -> None:
    out, _ = trained
    args = ["sample", only(out).name[:12], "--out", out, "--prompt", "Show HN: ", "-n", 3, "--max-tokens", 8]
    done = forked(*args)
    assert done.err == ""
    assert len(done.out.splitlines()) == 3
    assert all(line.startswith("Show HN: ") for line in done.out.splitlines())
    assert run(*args).stdout == done.out, "another process draws the same samples"
    assert forked(*args, "--seed", 1).out != done.out
    likeliest = forked(*args, "--temperature", 0).out.splitlines()
    assert len(set(likeliest)) == 1


def test_sample_escapes_control_characters(trained: tuple[Path, Any], forked: Callable[..., Outcome]) -> None:
    out, _ = trained
    options = ["--prompt", "a\x1b[31mb\nc", "-n", 2, "--max-tokens", 2]
    lines = forked("sample", only(out).name[:12], "--out", out, *options).out.splitlines()
    assert len(lines) == 2 and all(line.startswith(r"a\x1b[31mb\x0ac") for line in lines)


def test_presets_and_doctor(driver: Driver, tmp_path: Path) -> None:
    assert "baseline" in run("presets").stdout
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "MAINRUN_CACHE": str(tmp_path)}
    done = driver.run(["doctor", "--json"], cwd=tmp_path, env=env)
    status = {diagnosis["name"]: diagnosis["status"] for diagnosis in json.loads(done.out)}
    assert done.err == ""
    assert status["torch"] == "ok"
    assert status["hub"] == "warn"


@pytest.mark.slow
def test_the_json_of_a_ladder_is_a_list(tmp_path: Path) -> None:
    ladder = tmp_path / "ladder.toml"
    ladder.write_text('[[steps]]\nname = "a"\n[[steps]]\nname = "b"\nlr = 0.1\n', encoding="utf-8")
    done = run("train", "--preset", ladder, *tiny_sets(), "--out", tmp_path / "runs", "--json")
    a, b = json.loads(done.stdout)
    assert (a["preset"], b["preset"]) == ("ladder:a", "ladder:b")
    assert a["weights"] != b["weights"]


def test_commands_that_train_nothing_do_not_import_torch(trained: tuple[Path, Any]) -> None:
    out, _ = trained
    fake = out.parent / "no-torch"
    fake.mkdir(exist_ok=True)
    (fake / "torch.py").write_text("raise ImportError('torch was imported')", encoding="utf-8")
    cache = {"MAINRUN_CACHE": os.environ["MAINRUN_CACHE"]}
    # The process has imported only the command line, so each command imports its own modules.
    with Driver(env={"PYTHONPATH": os.pathsep.join([str(fake), str(ROOT)])}, warm=False) as cold:
        for args in (
            ["--help"],
            ["train", "--help"],
            ["presets"],
            ["presets", "--fields"],
            ["compare", str(only(out))],
            train_args(out),
        ):
            done = cold.run(args, cwd=out, env=cache)
            assert done.code == 0 and done.out, done
        crashed = cold.run(train_args(out.parent / "never"), cwd=out, env=cache)
    assert crashed.code == 1
    assert "crash: ImportError: torch was imported" in crashed.err
    assert len(crashed.err.splitlines()) == 1


# -- Ctrl-C


class Running:
    """A run that takes long enough to be stopped."""

    def __init__(self, out: Path, **changes: object) -> None:
        self.out = out
        self.args = train_args(out, **{"epochs": 400, "eval_per_epoch": 0, **changes})
        self.process = subprocess.Popen(
            [*MAINRUN, *self.args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def steps(self) -> int:
        return sum(path.read_bytes().count(b'"event": "step"') for path in self.out.glob("*/metrics.jsonl"))

    def wait_for(self, steps: int) -> None:
        until = time.monotonic() + 120
        while self.steps() < steps:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        assert "Traceback" not in err, err
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Return a function that starts a run. Runs that are still running at the end of the test are killed."""
    started: list[Running] = []

    def start_run(**changes: object) -> Running:
        started.append(Running(tmp_path / "runs", **changes))
        return started[-1]

    yield start_run
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_one_signal_the_same_command_resumes_the_run(
    start: Callable[..., Running], number: int
) -> None:
    running = start(epochs=10)
    running.wait_for(20)
    running.process.send_signal(number)
    code, out, err = running.end()
    assert (code, out) == (75, ""), err
    assert err.splitlines()[-1].startswith("interrupted: ")
    assert "run the same command again to resume" in err.splitlines()[-1]
    path = only(running.out)
    status = json.loads((path / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "interrupted"
    assert status["step"] >= 20
    assert not (path / "summary.json").exists()
    done = run(*running.args, "--json")
    summary = json.loads(done.stdout)
    assert summary["resumed"] == 1
    assert f"after step {status['step']}" in done.stderr
    steps = [
        json.loads(line)["step"]
        for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if '"loss"' in line and '"lr"' in line
    ]
    assert steps == list(range(1, summary["steps"] + 1))


def test_a_second_ctrl_c_ends_the_run_at_once_with_exit_code_130(start: Callable[..., Running]) -> None:
    """Both signals are sent during one long step. The second signal ends the run before the step is done."""
    sizes = {
        "num_titles": 2000,
        "batch_size": 128,
        "block_size": 64,
        "n_layer": 4,
        "d_model": 128,
        "grad_accum": 128,
    }
    running = start(**sizes, official_geometry="1x64", checkpoint_every=1)
    running.wait_for(2)
    time.sleep(0.3)  # the checkpoint of step 2 has been written, and step 3 has started
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # without a pause, Python would handle both signals as one after a torch operation
    running.process.send_signal(signal.SIGINT)
    code, out, err = running.end()
    assert (code, out) == (130, "")
    assert "interrupted" not in err and "stopped immediately" in err
    path = only(running.out)
    assert not (path / "summary.json").exists()
    assert any((path / "checkpoints").iterdir()), "earlier checkpoints remain"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported_ends_with_exit_code_75(tmp_path: Path, number: int) -> None:
    fake = tmp_path / "slow"
    fake.mkdir()
    (fake / "torch.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('started').touch()\ntime.sleep(60)\n",
        encoding="utf-8",
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(fake), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    process = subprocess.Popen(
        [*MAINRUN, *train_args(tmp_path / "runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    while not (fake / "started").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (75, "")
    assert err.startswith("interrupted: ")
    assert len(err.splitlines()) == 1


# -- a terminal


def on_a_terminal(args: list[str], width: int, env: dict[str, str]) -> str:
    """Run a command on a terminal of a given width and return its stderr."""
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    keep = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
    process = subprocess.Popen(
        [*MAINRUN, *args],
        stdout=subprocess.PIPE,
        stderr=follower,
        stdin=follower,
        env={**keep, "TERM": "xterm-256color", **env},
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # on Linux, reading from a closed terminal raises OSError
            break
        if not part:
            break
        seen += part
    os.close(leader)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, seen
    assert json.loads(out)["status"] == "done"
    return seen.decode()


@pytest.mark.parametrize(
    ("width", "env"),
    [
        (100, {}),
        pytest.param(24, {"NO_COLOR": "1"}, marks=pytest.mark.slow),
        pytest.param(100, {"NO_COLOR": "1"}, marks=pytest.mark.slow),
        pytest.param(24, {}, marks=pytest.mark.slow),
    ],
)
def test_a_terminal_shows_one_bar(tmp_path: Path, width: int, env: dict[str, str]) -> None:
    import re

    seen = on_a_terminal([*train_args(tmp_path), "--json"], width, env)
    assert "\x1b[2K" in seen  # the display erases its line before each update
    assert bool(re.search(r"\x1b\[(\d+;)*3[0-8]", seen)) is (not env)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    steps = json.loads((only(tmp_path) / "summary.json").read_text(encoding="utf-8"))["steps"]
    last = [line for line in re.split(r"[\r\n]+", plain) if line.strip()][-1]
    assert f"step {steps}/{steps}" in last
    assert len(last.rstrip()) <= width
    if width > 60:
        assert all(word in last for word in ("loss", "best", "tok/s", "ETA 0:00"))
