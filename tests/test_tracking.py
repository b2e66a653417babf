"""Test the trackers with the real packages: each step arrives once, also after kills, failures and resumes.

`simulate` stands in for the training loop where many kills are needed. It writes metrics.jsonl, saves
checkpoints and rewinds the log as a run does. A child process runs it and is killed with SIGKILL.
"""

import functools
import importlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import slow_unless, tiny_sets
from typer.testing import CliRunner, Result

from mainrun.cli import app
from mainrun.config import TrainConfig
from mainrun.errors import RunError, UsageError
from mainrun.run import trackers, tracking
from mainrun.run.progress import LineProgress, Progress
from mainrun.run.tracking import Tracker, Tracking, parse_trackers, points_of, values_of
from mainrun.store.rundir import WRITTEN, RunDir

ROOT = Path(__file__).parents[1]
CONFIG = TrainConfig()
TABLE = {"steps": 15, "tokens_per_step": 128}
STEPS = 15
KEY = "0123456789abcdef0123456789abcdef5ec2e7aa"
TOKEN = "hf" + "_0123456789abcdef5ec2e7bb"  # split, so that it does not look like a secret

Values = dict[int, dict[str, float]]  # the values of each step


@pytest.fixture(autouse=True)
def _surroundings(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Give each test its own home folder and offline W&B. All tests share the folder of trackio."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    if "trackio" not in sys.modules:  # trackio reads this variable when it is imported
        os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb = sys.modules.get("wandb")
    if wandb:
        wandb.teardown()


# -- reading back what a tracker received


def tensorboard_values(path: Path) -> Values:
    """Read a folder of event files as TensorBoard does. Fail if a step has two values of one name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    values: Values = {}
    for name in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(name):
            assert name not in values.setdefault(event.step, {}), f"{name} twice at step {event.step}"
            values[event.step][name] = event.value
    return values


def tensorboard_steps(path: Path) -> list[int]:
    """Return the steps of all records of values in the files, in the order of the files."""
    steps = []
    for file in sorted((path / "tensorboard").iterdir()):
        with file.open("rb") as stream:
            for event in iter(functools.partial(trackers.read_event, stream), None):
                if event.HasField("summary") and event.step:
                    steps.append(event.step)
    return steps


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: blocks of 32,768 bytes with pieces of records, as in LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place = 7
    record = b""
    while place + 7 <= len(data):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(record)
            record = b""


def wandb_values(path: Path) -> Values:
    """Read all offline W&B files of a run. Fail if a step occurs twice."""
    values: Values = {}
    for file in sorted(path.glob("wandb/*/*.wandb")):
        for record in wandb_records(file):
            if not record.HasField("history"):
                continue
            items = {}
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    items[name] = json.loads(item.value_json)
            step = record.history.step.num
            assert step not in values, f"step {step} twice"
            values[step] = items
    return values


def trackio_values(project: str, number: int = 0) -> Values:
    """Read a run of trackio through its API. Fail if a step occurs twice."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run = trackio.Api().runs(project)[number]
    values: Values = {}
    for row in SQLiteStorage.get_logs(project, run.name, run_id=run.id):
        step = row.pop("step")
        row.pop("timestamp")
        assert step not in values, f"step {step} twice"
        values[step] = row
    return values


def expected(path: Path) -> Values:
    """Return the values that metrics.jsonl contains."""
    return {point.step: point.values for point in points_of(RunDir(path).metrics())}


def near(got: Values, want: Values) -> None:
    """Check that two tables are equal up to the float32 numbers of TensorBoard."""
    assert list(got) == list(want)
    for step, values in want.items():
        assert got[step] == pytest.approx(values, rel=1e-6), step


# -- names


def test_the_names_of_a_step() -> None:
    row = {"event": "step", "step": 7, "steps": 9, "tokens": 70, "lr": 0.5, "loss": 2.0, "grad_norm": 1.5}
    row |= {"seconds": 0.25, "reused": True, "aux": {"prior": 0.1, "z": 0.2}}
    row |= {"grad_norms": {"embedding": 1.25, "block_0": 0.5, "head": 0.125}}
    row["routers"] = [{"layer": 1, "g": 0.75, "selected": 0.5}, {"layer": 3, "g": 0.25, "selected": 0.125}]
    assert values_of(row) == {
        "train/tokens": 70,
        "train/lr": 0.5,
        "train/loss": 2.0,
        "train/grad_norm": 1.5,
        "train/seconds": 0.25,
        "aux/prior": 0.1,
        "aux/z": 0.2,
        "grad_norm/embedding": 1.25,
        "grad_norm/block_0": 0.5,
        "grad_norm/head": 0.125,
        "router/layer_1/g": 0.75,
        "router/layer_1/selected": 0.5,
        "router/layer_3/g": 0.25,
        "router/layer_3/selected": 0.125,
    }


def test_the_names_of_an_evaluation() -> None:
    row = {"event": "eval", "step": 7, "split": "dev", "full": 1.5, "official": 1.25, "params": 99}
    row["routers"] = [{"layer": 3, "selected": 0.5}]
    values = {"dev/full": 1.5, "dev/official": 1.25, "dev/params": 99, "dev/router/layer_3/selected": 0.5}
    assert values_of(row) == values


# -- the option


def test_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_trackers(["tensorboard"]) == [Tracker("tensorboard")]
    texts = ["trackio:my project", "wandb"]
    assert parse_trackers(texts) == [Tracker("trackio", "my project"), Tracker("wandb", "mainrun")]
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert parse_trackers(["wandb", "trackio"]) == [Tracker("wandb", "theirs"), Tracker("trackio", "mainrun")]
    assert parse_trackers(["wandb:ours"]) == [Tracker("wandb", "ours")]


def invoke(out: Path, *arguments: str, **changes: object) -> Result:
    """Run `mainrun train` in this process."""
    sets = tiny_sets(**changes)
    command = ["train", "--preset", "baseline", *sets, "--out", str(out), "--no-store", *arguments]
    return CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mlflow"], ["got --track 'mlflow'", "allowed: tensorboard, wandb"]),
        (["wandv"], ["did you mean 'wandb'"]),
        ([""], ["got --track ''"]),
        (["wandb:"], ["got --track 'wandb:'", "a project must have"]),
        (["trackio:a/b"], ["a project must have"]),
        (["trackio: a"], ["a project must have"]),
        (["wandb:" + "a" * 129], ["at most 128"]),
        (["tensorboard:" + "x" * 500], ["characters ...] ", "tensorboard has no projects"]),
        (["x" * 500], ["characters ...] "]),
        (["trackio:" + "x" * 500], ["characters ...] ", "leave out the colon and the project"]),
        (["tensorboard:x"], ["tensorboard has no projects"]),
        (["wandb:a", "wandb:b"], ["got --track wandb twice"]),
    ],
)
def test_a_wrong_tracker_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    options: list[str] = []
    for argument in arguments:
        options += ["--track", argument]
    result = invoke(tmp_path / "runs", *options)
    assert result.exit_code == 2 and result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert len(result.stderr) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WANDB_MODE", "foo", "got WANDB_MODE='foo'; allowed: online, offline, disabled, shared"),
        ("WANDB_MODE", "", "got WANDB_MODE=''"),
        ("WANDB_MODE", "x" * 500, "characters ...]"),
        ("WANDB_PROJECT", "a/b", "got WANDB_PROJECT='a/b'; a project must have at most 128 letters"),
        ("WANDB_PROJECT", "x" * 500, "use --track wandb:PROJECT"),
    ],
)
def test_a_wrong_variable_of_wandb_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    result = invoke(tmp_path / "runs", "--track", "wandb")
    assert result.exit_code == 2 and result.stderr.startswith("error: ")
    assert words in result.stderr and len(result.stderr) < 400
    assert list(tmp_path.iterdir()) == []
    parse_trackers(["tensorboard", "trackio"])


@pytest.mark.parametrize("mode", ["online", "offline", "disabled", "shared"])
def test_the_modes_of_wandb(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    assert parse_trackers(["wandb:ours"]) == [Tracker("wandb", "ours")]


@pytest.mark.parametrize("other", ["--dry-run", "--plan"])
def test_a_command_that_does_not_train_refuses_trackers(tmp_path: Path, other: str) -> None:
    result = invoke(tmp_path / "runs", "--track", "tensorboard", other)
    assert result.exit_code == 2 and f"got --track and {other}" in result.stderr


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_reported_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # Python treats the package as missing
    result = invoke(tmp_path / "runs", "--track", name)
    assert result.exit_code == 2
    assert (
        f"the package {name} is not installed; install it with pip install 'mainrun[trackers]'"
        in result.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text('{"tensorboard": {"id": "a", "step": -1}}')
    with pytest.raises(RunError, match=r"trackers\.json is damaged.*remove it"):
        Tracking(Progress(), [Tracker("tensorboard")], tmp_path)
    Tracking(Progress(), [Tracker("tensorboard")], tmp_path, fresh=True)


# -- whole runs


def test_every_tracker_gets_every_row_and_the_run_keeps_its_bits(
    tmp_path: Path, tiny: Callable[..., TrainConfig]
) -> None:
    from mainrun.run.session import train

    cfg = tiny(dev_frac=0.1, n_layer=4, block_pattern="DMDS", d_model=16, num_titles=200)
    plain = train(cfg, tmp_path / "plain")
    names = parse_trackers(["tensorboard", "wandb:tests", "trackio:whole"])
    path = tmp_path / "tracked" / cfg.run_id
    tracked = train(cfg, tmp_path / "tracked", progress=Tracking(Progress(), names, path))
    want = expected(path)
    assert {"train/loss", "train/lr", "train/grad_norm", "aux/prior", "router/layer_3/g"} <= want[1].keys()
    last = want[max(want)]
    assert {"val/full", "val/loss", "dev/full", "val/router/layer_1/selected"} <= last.keys()
    near(tensorboard_values(path), want)
    assert wandb_values(path) == want
    assert trackio_values("whole") == want

    assert plain["weights"] == tracked["weights"] and plain["run"] == tracked["run"]
    other = expected(tmp_path / "plain" / cfg.run_id)
    for step, values in want.items():
        for name, value in values.items():
            assert name.endswith("/seconds") or other[step][name] == value
    assert not [name.name for name in path.iterdir() if name.name not in WRITTEN]


def test_the_config_is_sent(tmp_path: Path) -> None:
    import trackio
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    simulate(tmp_path, ["tensorboard", "wandb", "trackio:config"], steps=3)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    metadata = accumulator.SummaryMetadata("_hparams_/session_start_info")
    hparams = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert hparams["lr"].number_value == CONFIG.lr and hparams["optimizer"].string_value == CONFIG.optimizer
    (file,) = tmp_path.glob("wandb/*/*.wandb")
    (config,) = [record.run.config for record in wandb_records(file) if record.HasField("run")]
    sent = {item.key: json.loads(item.value_json) for item in config.update}
    assert sent["lr"] == CONFIG.lr and sent["optimizer"] == CONFIG.optimizer
    (run,) = trackio.Api().runs("config")
    assert run.name == CONFIG.run_id and run.config is not None and run.config["lr"] == CONFIG.lr


def test_rows_from_the_store_are_sent(tmp_path: Path, tiny: Callable[..., TrainConfig]) -> None:
    from mainrun.run.session import train
    from mainrun.store.nodes import Store

    cfg = tiny(num_titles=200)
    store = Store(tmp_path / "store")
    train(cfg, tmp_path / "first", store=store)
    path = tmp_path / "second" / cfg.run_id
    train(
        cfg, tmp_path / "second", store=store, progress=Tracking(Progress(), [Tracker("tensorboard")], path)
    )
    assert all(row.get("reused") for row in RunDir(path).metrics())
    near(tensorboard_values(path), expected(path))


def test_a_run_that_was_started_without_trackers_is_sent_completely(tmp_path: Path) -> None:
    assert invoke(tmp_path, "--until", "10").exit_code == 75
    assert invoke(tmp_path, "--until", "20", "--track", "tensorboard").exit_code == 75
    (path,) = [file.parent for file in tmp_path.glob("*/config.json")]
    assert tensorboard_steps(path) == list(range(1, 21))
    assert invoke(tmp_path).exit_code == 0
    assert len(tensorboard_steps(path)) == 20
    # a finished run is sent too
    assert invoke(tmp_path, "--track", "tensorboard", "--track", "trackio:later").exit_code == 0
    near(tensorboard_values(path), expected(path))
    assert trackio_values("later") == expected(path)
    before = tensorboard_steps(path)
    assert invoke(tmp_path, "--track", "tensorboard").exit_code == 0
    assert tensorboard_steps(path) == before == list(range(1, max(expected(path)) + 1))
    # with --fresh, the trackers start new runs
    options = ["--track", "tensorboard", "--track", "trackio:later", "--until", "5", "--fresh"]
    assert invoke(tmp_path, *options).exit_code == 75
    assert tensorboard_steps(path) == [1, 2, 3, 4, 5]
    assert len(list((path / "tensorboard").iterdir())) == 1
    assert [len(trackio_values("later", number)) for number in (0, 1)] in ([5, len(before)], [len(before), 5])


# -- kills


def simulate(
    path: Path,
    names: list[str],
    steps: int = STEPS,
    every: int = 3,
    display: Progress | None = None,
    pause: float = 0.0,
) -> None:
    """Write the log of a run from its last checkpoint to its end, and track it."""
    path.mkdir(exist_ok=True)
    log = path / "metrics.jsonl"
    saved = path / "saved"
    done, size = json.loads(saved.read_text()) if saved.exists() else (0, 0)
    log.touch()
    os.truncate(log, size)
    tracking_ = Tracking(display or Progress(), parse_trackers(names), path)
    tracking_.start(CONFIG, TABLE, RunDir(path).metrics())

    def write(row: dict[str, Any]) -> None:
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    for step in range(done + 1, steps + 1):
        time.sleep(pause)
        row = {"event": "step", "step": step, "loss": 1 / step, "lr": 0.5}
        write(row)
        tracking_.step(row)
        if step % 2 == 0:
            row = {"event": "eval", "step": step, "split": "val", "full": 2 / step}
            row |= {"official": 1 / step, "coverage": 0.75}
            write(row)
            tracking_.eval(row)
        if step % every == 0:
            temporary = path / "saved.tmp"
            temporary.write_text(json.dumps([step, log.stat().st_size]))
            temporary.replace(saved)
            tracking_.saved(step)
    tracking_.close()


def in_child(action: Callable[[], None]) -> int:
    """Start a child process that carries out an action. Return its process ID."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        tracking.SEND_SECONDS = 0.0
        action()
        code = 0
    finally:
        os._exit(code)


def import_packages() -> None:
    """Import the packages of all trackers, so that child processes need not import them again."""
    for name in ("tensorboard.plugins.hparams.summary_v2", "trackio.sqlite_storage", "wandb"):
        importlib.import_module(name)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(owner: Any, name: str, count: int, after: bool) -> None:
    """Kill this process before or after the call number `count` of a method."""
    original = getattr(owner, name)
    calls = [0]

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if calls[0] == count and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def read_all(path: Path, project: str) -> dict[str, Values]:
    return {"tensorboard": tensorboard_values(path), "trackio": trackio_values(project)}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("owner", "method", "count"),
    [
        (Tracking, "_remember", 2),
        (Tracking, "_remember", 8),
        (trackers.TensorBoard, "send", 5),
        (trackers.TensorBoard, "_write", 2),
        (trackers.TensorBoard, "_write", 12),
        (trackers.Trackio, "send", 7),
        (trackers.Trackio, "open", 1),
        (Tracking, "saved", 3),
    ],
)
def test_a_kill_at_any_point_loses_and_doubles_nothing(
    tmp_path: Path, owner: Any, method: str, count: int, after: bool
) -> None:
    import_packages()
    path = tmp_path / "run"
    project = f"{owner.__name__}{method}{count}{after}".lower()
    names = ["tensorboard", f"trackio:{project}"]

    def killed() -> None:
        kill_at(owner, method, count, after)
        simulate(path, names)

    assert exit_code(in_child(killed)) == -signal.SIGKILL
    assert exit_code(in_child(killed)) in (0, -signal.SIGKILL)
    assert exit_code(in_child(lambda: simulate(path, names))) == 0
    want = expected(path)
    assert list(want) == list(range(1, STEPS + 1))
    near(tensorboard_values(path), want)
    assert tensorboard_steps(path) == list(want)
    assert trackio_values(project) == want
    memory = json.loads((path / "trackers.json").read_text())
    assert [entry["step"] for entry in memory.values()] == [STEPS, STEPS]


@pytest.mark.parametrize("seed", slow_unless([1], [1, 2]))
def test_kills_at_random_times(tmp_path: Path, seed: int) -> None:
    import_packages()
    draw = random.Random(seed)
    path = tmp_path / "run"
    project = f"random{seed}"
    names = ["tensorboard", "wandb", f"trackio:{project}"]
    for _ in range(2):
        child = in_child(lambda: simulate(path, names, pause=0.05))
        while not (path / "saved").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))
        os.kill(child, signal.SIGKILL)
        exit_code(child)
    assert exit_code(in_child(lambda: simulate(path, names))) == 0
    want = expected(path)
    assert list(want) == list(range(1, STEPS + 1))
    near(tensorboard_values(path), want)
    assert wandb_values(path) == want
    assert trackio_values(project) == want


@pytest.mark.parametrize(
    ("owner", "method", "count", "after"),
    [(trackers.Wandb, "send", 7, True), (trackers.Wandb, "close", 1, True), (Tracking, "_remember", 1, True)],
)
def test_a_kill_at_any_point_of_an_offline_wandb_session(
    tmp_path: Path, owner: Any, method: str, count: int, after: bool
) -> None:
    path = tmp_path / "run"
    stopped = in_child(lambda: simulate(path, ["wandb"], steps=6))
    assert exit_code(stopped) == 0

    def killed() -> None:
        kill_at(owner, method, count, after)
        simulate(path, ["wandb"])

    assert exit_code(in_child(killed)) == -signal.SIGKILL
    assert exit_code(in_child(lambda: simulate(path, ["wandb"]))) == 0
    assert wandb_values(path) == expected(path)
    assert list(expected(path)) == list(range(1, STEPS + 1))
    files = sorted(path.glob("wandb/*/*.wandb"))
    first = [record.history.step.num for record in wandb_records(files[0]) if record.HasField("history")]
    assert first == list(range(1, 7)), "the session that ended properly is kept"
    ids = {record.run.run_id for file in files for record in wandb_records(file) if record.HasField("run")}
    assert len(ids) == 1 and CONFIG.run_id in ids.pop()


def test_a_killed_wandb_session_whose_folder_has_a_number_is_sent_again(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def killed() -> None:
        kill_at(trackers.Wandb, "close", 1, True)
        simulate(path, ["wandb"])

    assert exit_code(in_child(killed)) == -signal.SIGKILL
    (folder,) = path.glob("wandb/offline-run-*")
    folder.rename(f"{folder}-1")  # the name if two sessions start in the same second
    assert exit_code(in_child(lambda: simulate(path, ["wandb"]))) == 0
    assert wandb_values(path) == expected(path)


def test_steps_that_are_trained_again_replace_those_in_tensorboard(tmp_path: Path) -> None:
    names = [Tracker("tensorboard")]
    for loss, last in ((1.0, 6), (2.0, 9)):
        rows = [{"event": "step", "step": step, "loss": 1.0} for step in range(1, 4)]
        tracked = Tracking(Progress(), names, tmp_path)
        tracked.start(CONFIG, TABLE, rows)
        for step in range(4, last + 1):
            tracked.step({"event": "step", "step": step, "loss": loss})
        tracked.saved(last)
        tracked.close()
    losses = {step: values["train/loss"] for step, values in tensorboard_values(tmp_path).items()}
    assert losses == {step: 1.0 if step < 4 else 2.0 for step in range(1, 10)}
    assert tensorboard_steps(tmp_path) == list(range(1, 10))


def test_a_tensorboard_that_is_running_forgets_the_steps_that_were_cut(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps_shown() -> list[int]:
        viewer.Reload()
        return [event.step for event in viewer.Scalars("train/loss")]

    viewer = EventAccumulator(str(tmp_path / "tensorboard"))
    simulate(tmp_path, ["tensorboard"], steps=9, every=5)  # the last checkpoint is that of step 5
    tracked = Tracking(Progress(), [Tracker("tensorboard")], tmp_path)
    rows = RunDir(tmp_path).metrics()
    tracked.open(CONFIG, rows)
    tracked.close()
    before = steps_shown()
    simulate(tmp_path, ["tensorboard"], steps=15, every=5)
    assert before[-1] == 9 and steps_shown() == list(range(1, 16))


@pytest.mark.slow
def test_a_killed_run_is_tracked_completely(tmp_path: Path) -> None:
    sets = tiny_sets(num_titles=1000, epochs=3)
    options = ["--track", "tensorboard", "--track", "wandb", "--track", "trackio:killed", "--no-store"]
    command = [sys.executable, "-m", "mainrun", "train", "--preset", "baseline", *sets, *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    draw = random.Random(7)
    for _ in range(3):
        process = subprocess.Popen([*command, "--out", str(tmp_path)], env=env, stderr=subprocess.DEVNULL)
        before = sum(file.stat().st_size for file in tmp_path.glob("*/metrics.jsonl"))
        while process.poll() is None:
            size = sum(file.stat().st_size for file in tmp_path.glob("*/metrics.jsonl"))
            if size > before + 20_000:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2))
        process.kill()
        process.wait()
    done = subprocess.run([*command, "--out", str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = [file.parent for file in tmp_path.glob("*/config.json")]
    want = expected(path)
    assert list(want) == list(range(1, max(want) + 1))
    assert RunDir(path).status()["state"] == "done"
    near(tensorboard_values(path), want)
    assert tensorboard_steps(path) == list(want)
    assert wandb_values(path) == want
    assert trackio_values("killed") == want


# -- failures


def notes_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]


def test_a_tracker_that_cannot_start_is_reported_once_and_catches_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("not a folder")
    names = ["tensorboard", "trackio:other"]
    simulate(tmp_path, names, steps=9, display=LineProgress())
    (note,) = notes_of(capsys)
    assert "the tracker tensorboard failed: " in note and "the run continues" in note
    assert len(trackio_values("other")) == 9
    (tmp_path / "tensorboard").unlink()
    simulate(tmp_path, names, display=LineProgress())
    assert notes_of(capsys) == []
    near(tensorboard_values(tmp_path), expected(tmp_path))
    assert trackio_values("other") == expected(tmp_path)


def test_a_tracker_that_fails_during_the_run_is_reported_once_and_catches_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SEND_SECONDS", 0.0)

    class ClosesFile(LineProgress):
        def step(self, row: dict[str, Any]) -> None:
            if row["step"] == 6:
                writer = tracked.open_trackers[0].writer
                assert isinstance(writer, trackers.TensorBoard) and writer.file is not None
                writer.file.close()

    tracked = Tracking(ClosesFile(), [Tracker("tensorboard")], tmp_path)
    rows = [{"event": "step", "step": step, "loss": 1 / step} for step in range(1, 21)]
    tracked.start(CONFIG, TABLE)
    for row in rows:
        tracked.step(row)
    tracked.saved(20)
    tracked.close()
    (note,) = notes_of(capsys)
    assert "the tracker tensorboard failed" in note
    assert json.loads((tmp_path / "trackers.json").read_text())["tensorboard"]["step"] < 7
    again = Tracking(Progress(), [Tracker("tensorboard")], tmp_path)
    again.start(CONFIG, TABLE, rows)
    again.close()
    assert tensorboard_steps(tmp_path) == list(range(1, 21))


def test_the_process_of_wandb_may_die(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb

    class KillsService(LineProgress):
        def step(self, row: dict[str, Any]) -> None:
            if row["step"] == 8:
                connection = wandb.setup().ensure_service()
                os.kill(connection._proc._process.pid, signal.SIGKILL)
                time.sleep(0.2)

    simulate(tmp_path, ["wandb"], display=KillsService())
    (note,) = notes_of(capsys)
    assert "the tracker wandb:mainrun failed" in note
    simulate(tmp_path, ["wandb"], display=LineProgress())
    assert wandb_values(tmp_path) == expected(tmp_path)


@pytest.mark.parametrize("key", ["", KEY])
def test_wandb_without_key_or_server_fails_fast(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(trackers, "LOGIN_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    began = time.monotonic()
    simulate(tmp_path, ["wandb", f"trackio:online{len(key)}"], display=LineProgress())
    assert time.monotonic() - began < 8
    output = capfd.readouterr()
    (note,) = [line for line in output.err.splitlines() if "tracker" in line]
    assert "the tracker wandb:mainrun failed: " in note
    assert KEY not in output.err + output.out
    assert trackio_values(f"online{len(key)}") == expected(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    simulate(tmp_path, ["wandb"])
    assert wandb_values(tmp_path) == expected(tmp_path)


def test_a_disabled_wandb_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    simulate(tmp_path, ["wandb"], display=LineProgress())
    (note,) = notes_of(capsys)
    assert "WANDB_MODE is 'disabled'" in note
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb:mainrun"]["step"] == 0


def finished_run(path: Path) -> list[dict[str, Any]]:
    """Write and track a finished run, and return its rows."""
    simulate(path, ["tensorboard", "wandb", "trackio:finished"])
    return RunDir(path).metrics()


def send_finished(path: Path, rows: list[dict[str, Any]], names: list[str]) -> None:
    Tracking(LineProgress(), parse_trackers(names), path).send_finished(CONFIG, rows)


def test_a_finished_run_is_sent_again_only_if_steps_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["tensorboard", "wandb", "trackio:finished"]
    rows = finished_run(tmp_path)
    want = expected(tmp_path)
    before = {file for file in tmp_path.rglob("*") if "logs" not in file.parts}
    memory = json.loads((tmp_path / "trackers.json").read_text())
    for _ in range(2):
        send_finished(tmp_path, rows, names)
    assert {file for file in tmp_path.rglob("*") if "logs" not in file.parts} == before
    assert json.loads((tmp_path / "trackers.json").read_text()) == memory
    shutil.rmtree(tmp_path / "tensorboard")
    (folder,) = memory["wandb:mainrun"]["folders"]
    shutil.rmtree(tmp_path / "wandb" / folder)
    memory["wandb:mainrun"]["folders"] = {}
    (tmp_path / "trackers.json").write_text(json.dumps(memory))
    send_finished(tmp_path, rows, names)
    near(tensorboard_values(tmp_path), want)
    assert wandb_values(tmp_path) == want and trackio_values("finished") == want
    assert notes_of(capsys) == []
    # the server may still lack the steps of offline runs
    monkeypatch.setattr(trackers, "LOGIN_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    send_finished(tmp_path, rows, ["wandb"])
    assert len(notes_of(capsys)) == 1
    memory["wandb:mainrun"]["uploaded"] = STEPS
    (tmp_path / "trackers.json").write_text(json.dumps(memory))
    send_finished(tmp_path, rows, ["wandb"])
    assert notes_of(capsys) == []


def test_a_failure_on_a_finished_run_does_not_say_that_the_run_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("not a folder")
    rows = [{"event": "step", "step": 1, "loss": 1.0}]
    send_finished(tmp_path, rows, ["tensorboard"])
    (note,) = notes_of(capsys)
    assert "the tracker tensorboard failed: " in note and "continues" not in note
    assert note.endswith(
        "the run is not affected; repeat the command without --fresh to send the missing steps"
    )
    (tmp_path / "tensorboard").unlink()
    tracked = Tracking(LineProgress(), [Tracker("tensorboard")], tmp_path)
    tracked.start(CONFIG, TABLE, rows)
    writer = tracked.open_trackers[0].writer
    assert isinstance(writer, trackers.TensorBoard) and writer.file is not None
    writer.file.close()
    tracked.step({"event": "step", "step": 2, "loss": 1.0})
    tracked.saved(2)
    (note,) = notes_of(capsys)
    assert "the run continues" in note


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_failure_is_shown_once_even_if_the_run_is_quiet(tmp_path: Path, quiet: list[str]) -> None:
    assert invoke(tmp_path, "--until", "5").exit_code == 75
    (path,) = [file.parent for file in tmp_path.glob("*/config.json")]
    (path / "tensorboard").write_text("not a folder")
    for effect in ("the run continues", "the run is not affected"):  # unfinished, and finished
        result = invoke(tmp_path, "--track", "tensorboard", *quiet)
        assert result.exit_code == 0
        (note,) = [line for line in result.stderr.splitlines() if "tracker" in line]
        assert "the tracker tensorboard failed: " in note and effect in note
        if quiet:
            assert result.stderr == f"{note}\n" and result.stdout == ""


# -- secrets


def test_no_file_or_message_contains_a_key(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    options = ["--track", "tensorboard", "--track", "wandb", "--track", "trackio:secrets"]
    result = invoke(tmp_path, *options, num_titles=200)
    assert result.exit_code == 0 and "failed" not in result.stderr
    captured = capfd.readouterr()
    texts = [text.encode() for text in (result.stdout, result.stderr, captured.out, captured.err)]
    folders = [tmp_path, Path(os.environ["TRACKIO_DIR"]), Path(os.environ["HOME"])]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files) and any(file.suffix == ".db" for file in files)
    texts += [file.read_bytes() for file in files]
    for secret in (KEY, TOKEN):
        assert not [text for text in texts if secret.encode() in text]


def test_a_message_contains_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    error = UsageError(f"bad key {KEY}, bad token {TOKEN}\nmore text")
    assert trackers.message(error) == "bad key [WANDB_API_KEY], bad token [HF_TOKEN]"


def test_a_submission_contains_no_files_of_trackers() -> None:
    from reports.submission.finished_run import RUN_FILES
    from reports.submission.prepare import OPTIONAL_RUN_FILES

    assert not {"trackers.json", "tensorboard", "wandb"} & {*RUN_FILES, *OPTIONAL_RUN_FILES}
