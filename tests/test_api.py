"""Test the public Python names of mainrun: training, runs and their tables."""

from __future__ import annotations

import inspect
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import TINY

import mainrun
from mainrun.api import html
from mainrun.api.calls import plain_value
from mainrun.config import TrainConfig
from mainrun.store.rundir import RunDir, write_json

ROOT = Path(__file__).parents[1]
FIELDS: dict[str, Any] = {**TINY, "compile": "off"}


def train(out: Path, **fields: Any) -> mainrun.Run:
    return mainrun.train("baseline", out=out, quiet=True, **{**FIELDS, **fields})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> mainrun.Run:
    return train(tmp_path_factory.mktemp("runs"), dev_frac=0.1)


def command_line(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mainrun", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# -- importing


def test_importing_mainrun_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import time; t = time.perf_counter(); import mainrun; print(time.perf_counter() - t);"
        "import sys; print(sorted({'torch', 'pandas', 'optuna', 'typer', 'pydantic'} & sys.modules.keys()))"
    )
    seconds = []
    for _ in range(3):  # on a busy machine, one process may have to wait for a core
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        text, heavy = done.stdout.splitlines()
        seconds.append(float(text))
    assert min(seconds) < 0.05 and heavy == "[]"


def test_the_modules_train_and_run_are_also_functions() -> None:
    import mainrun.run.session
    import mainrun.train as module

    assert isinstance(module, ModuleType) and mainrun.train is module and module.Model
    assert mainrun.run.session is sys.modules["mainrun.run.session"]
    assert list(inspect.signature(mainrun.train).parameters)[:3] == ["preset", "out", "fresh"]
    assert list(inspect.signature(mainrun.run).parameters) == ["name", "out"]


def test_the_names_and_their_types_agree() -> None:
    stub = (ROOT / "mainrun/__init__.pyi").read_text()
    typed = {line.rpartition(" as ")[2] for line in stub.splitlines() if line.startswith("from ")}
    assert typed == {*mainrun.__all__} - {"__version__"} and dir(mainrun) == sorted(mainrun.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it has: .*train"):
        _ = mainrun.trian


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_no_option_of_a_function_is_also_a_config_field(name: str) -> None:
    parameters = inspect.signature(getattr(mainrun, name)).parameters
    assert not {*parameters} - {"preset"} & TrainConfig.model_fields.keys()


# -- training


def test_a_run_has_the_bits_and_the_files_of_the_command_line(tmp_path: Path) -> None:
    fields = FIELDS | {"lr": 1, "official_geometry": "1x8"}
    run = mainrun.train("demo:optimized", out=tmp_path / "python", quiet=True, **fields)
    sets = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    done = command_line("train", "--preset", "demo:optimized", *sets, "--out", tmp_path / "shell")
    assert done.returncode == 0, done.stderr
    other = tmp_path / "shell" / run.id
    files = sorted(path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert weights
    for file in (*weights, Path("config.json"), Path("tokenizer.json")):
        assert (run.path / file).read_bytes() == (other / file).read_bytes(), file
    assert run.summary["weights"] == json.loads((other / "summary.json").read_text())["weights"]


def test_a_run_records_a_command_that_repeats_it(trained: mainrun.Run) -> None:
    command = RunDir(trained.path).env()["command"]
    assert command[:4] == ["mainrun", "train", "--preset", "baseline"] and "dev_frac=0.1" in command
    before = (trained.path / "summary.json").stat().st_mtime_ns
    done = command_line(*command[1:], "--json")
    assert json.loads(done.stdout)["run"] == trained.id, done.stderr
    assert (trained.path / "summary.json").stat().st_mtime_ns == before


def test_a_config_can_be_trained(trained: mainrun.Run) -> None:
    again = mainrun.train(trained.config, out=trained.path.parent, quiet=True)
    assert again == trained and hash(again) == hash(trained)
    assert again == train(trained.path.parent, dev_frac=np.float64(0.1), seed=np.int64(1337))
    changed = mainrun.train(trained.config, out=trained.path.parent, quiet=True, until=1, seed=7)
    assert changed.config.seed == 7 and changed.state == "interrupted"
    assert "seed=7" in RunDir(changed.path).env()["command"]


def test_a_run_can_stop_at_a_step_and_go_on(tmp_path: Path) -> None:
    run = train(tmp_path, until=4, store=False)
    assert run.state == "interrupted" and run.metrics["step"].max() == 4 and "interrupted" in repr(run)
    with pytest.raises(mainrun.RunError, match="is not finished"):
        _ = run.summary
    assert "interrupted" in run._repr_html_()
    assert train(tmp_path, store=False).state == "done" and run.state == "done" and run.score > 0
    assert not (tmp_path / ".store").exists()


def test_an_unknown_keyword_names_the_fields() -> None:
    with pytest.raises(mainrun.ConfigError) as caught:
        mainrun.train("baseline", learning_rate=1, lrr=2)
    text = str(caught.value)
    assert "unknown keyword 'learning_rate'" in text and "options of train: out, fresh" in text
    assert "config fields: seed, device" in text and "weight_decay" in text
    with pytest.raises(mainrun.ConfigError, match=r"'lrr' \(did you mean 'lr'\?\)"):
        mainrun.train("baseline", lrr=2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: mainrun.train("ablation"), mainrun.UsageError, r"has 13 steps; train one .*'ablation:muon'"),
        (lambda: mainrun.train("nothing"), mainrun.ConfigError, "unknown preset"),
        (lambda: mainrun.train("baseline", lr="fast"), mainrun.ConfigError, "lr='fast' is not allowed"),
        (lambda: mainrun.train("baseline", until=-1), mainrun.UsageError, "until=-1; give a step"),
        (lambda: mainrun.train("baseline", corpus="file:none.txt"), mainrun.CorpusError, "none.txt"),
        (lambda: mainrun.train(out="a\0b"), mainrun.UsageError, "got out"),
        (lambda: mainrun.run("nothing"), mainrun.RunError, "no run 'nothing'"),
        (lambda: mainrun.Run("nothing"), mainrun.RunError, "is not a run directory"),
        (lambda: mainrun.runs(__file__), mainrun.UsageError, "which is a file"),
        (lambda: mainrun.compare(), mainrun.UsageError, "at least one run"),
    ],
)
def test_a_wrong_call_raises_the_error_of_the_command_line(call: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_diverged_run_raises_diverged(tmp_path: Path) -> None:
    with pytest.raises(mainrun.Diverged, match="loss"):
        train(tmp_path, lr=1000, clip=0)
    table = mainrun.runs(tmp_path)
    assert list(table["state"]) == ["diverged"] and table["full"].isna().all()


def test_ctrl_c_raises_interrupted_and_the_same_call_resumes(tmp_path: Path) -> None:
    def interrupt() -> None:
        while not list(tmp_path.glob("*/metrics.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(mainrun.Interrupted, match="SIGINT at step"):
        train(tmp_path, epochs=20)
    thread.join()
    (path,) = tmp_path.glob("*/config.json")
    assert mainrun.run(path.parent).state == "interrupted"


def test_a_run_can_be_trained_in_another_thread(tmp_path: Path) -> None:
    """A notebook or a server may not call from the main thread, where alone signals can be caught."""
    trained: list[mainrun.Run] = []
    thread = threading.Thread(target=lambda: trained.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert trained[0].state == "done"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (Path("a/b"), "a/b"),
        ((1, np.int32(2)), [1, 2]),
        ({"a": np.float64(1.0)}, {"a": 1.0}),
        (None, None),
        ("text", "text"),
    ],
)
def test_values_of_other_libraries_become_plain(value: Any, plain: Any) -> None:
    got = plain_value(value)
    assert got == plain and type(got) is type(plain)


# -- a run


def test_the_metrics_are_a_table(trained: mainrun.Run) -> None:
    rows = RunDir(trained.path).metrics()
    table = trained.metrics
    assert len(table) == len(rows) and list(table.columns[:5]) == ["event", "step", "tokens", "split", "loss"]
    steps = table[table["event"] == "step"]
    evals = table[(table["event"] == "eval") & (table["split"] == "val")]
    assert steps["loss"].notna().all() and steps["full"].isna().all()
    assert steps["step"].is_monotonic_increasing and evals["full"].iloc[-1] == trained.score
    last = [row for row in rows if row["event"] == "eval" and row["split"] == "val"][-1]
    assert evals["tokens"].iloc[-1] == steps["tokens"].max() != last["tokens"]
    assert evals["scored_tokens"].iloc[-1] == last["tokens"]
    kinds = {name: str(kind) for name, kind in table.dtypes.items()}
    assert (kinds["step"], kinds["loss"], kinds["reused"]) == ("int64", "float64", "bool")


def test_a_run_is_found_by_path_id_and_prefix(trained: mainrun.Run) -> None:
    out = trained.path.parent
    assert trained == mainrun.run(trained.path) == mainrun.run(trained.id, out)
    assert trained.config.dev_frac == 0.1 and f"full {trained.score:.4f}"[5:] in repr(trained)
    assert trained.sample("A", 2, max_tokens=3) == trained.sample("A", 2, max_tokens=3)


def test_a_run_shows_itself_in_a_notebook(trained: mainrun.Run) -> None:
    page = trained._repr_html_()
    assert f"{trained.score:.4f}" in page and "<svg" in page and "<polyline" in page and trained.id in page


def test_a_card_escapes_its_text() -> None:
    page = html.card("<script>", [("a<b", '"><img onerror=1>')], html.sparkline([1, 2], "<i>"))
    assert "<script" not in page and "<img" not in page and "<i>" not in page


@pytest.mark.parametrize("values", [[], [1.0], [float("nan"), 1.0]])
def test_too_few_points_draw_nothing(values: list[float]) -> None:
    assert html.sparkline(values, "") == ""


def test_a_sparkline_is_small_and_ends_with_the_last_value() -> None:
    drawn = html.sparkline([*range(100_000), 5.0, -7.0], "loss")
    assert len(drawn) < 5000 and drawn.count(",") <= html.MOST_POINTS + 1 and '239.0,39.0"' in drawn
    assert "nan" not in html.sparkline([3.0, 3.0], "constant")


# -- tables


def test_the_runs_of_a_folder_are_a_table(trained: mainrun.Run) -> None:
    table = mainrun.runs(trained.path.parent).set_index("run")
    row = table.loc[trained.id]
    assert row["state"] == "done" and row["full"] == trained.score and row["d_model"] == TINY["d_model"]
    assert row["dev_full"] == trained.summary["scores"]["dev"]["last"]["full"] and row["params"] > 1000
    assert row["guards"] == "pass" or row["guards"].startswith(("flag: ", "fail: "))
    assert set(TrainConfig.model_fields) <= set(table.columns) and table.columns.is_unique


def test_an_empty_folder_gives_an_empty_table(tmp_path: Path) -> None:
    table = mainrun.runs(tmp_path / "none")
    assert len(table) == 0 and {"run", "full", "lr"} <= set(table.columns)


def copies(trained: mainrun.Run, out: Path, count: int) -> None:
    for number in range(count):
        folder = out / f"run-{number:04}"
        folder.mkdir(parents=True)
        for name in ("config.json", "status.json", "summary.json", "metrics.jsonl"):
            (folder / name).write_bytes((trained.path / name).read_bytes())


def test_a_damaged_run_is_named_in_the_table(trained: mainrun.Run, tmp_path: Path) -> None:
    copies(trained, tmp_path, 2)
    (tmp_path / "run-0001/summary.json").write_text("{")
    with pytest.warns(UserWarning, match=r"run-0001/summary.json is damaged"):
        table = mainrun.runs(tmp_path)
    assert list(table["state"]) == ["done", "damaged"]
    assert "damaged" in mainrun.run(tmp_path / "run-0001")._repr_html_()


def test_a_thousand_runs_are_read_in_three_seconds(trained: mainrun.Run, tmp_path: Path) -> None:
    copies(trained, tmp_path, 1000)
    started = time.process_time()  # of this process alone, because other work may take the cores
    table = mainrun.runs(tmp_path)
    assert len(table) == 1000 and time.process_time() - started < 3


def test_runs_are_compared_with_the_first(trained: mainrun.Run) -> None:
    other = train(trained.path.parent, dev_frac=0.1, seed=2)
    table = mainrun.compare(trained, other.path)
    assert list(table.index) == [trained.id, other.id]
    assert table["delta_full"].iloc[1] == pytest.approx(other.score - trained.score)
    assert mainrun.compare(other.id, out=other.path.parent)["full_last"].iloc[0] == other.score
    fewer = train(trained.path.parent, dev_frac=0.1, num_titles=300)
    with pytest.raises(mainrun.RunError, match="different data"):
        mainrun.compare(trained, fewer)


def test_a_summary_of_an_older_version_has_empty_cells(trained: mainrun.Run, tmp_path: Path) -> None:
    copies(trained, tmp_path, 1)
    write_json(tmp_path / "run-0000/summary.json", {"steps": 3})
    (row,) = mainrun.runs(tmp_path).to_dict("records")
    assert row["state"] == "done" and row["steps"] == 3 and row["full"] is None


def test_a_run_whose_process_was_killed_is_not_running(tmp_path: Path) -> None:
    """The state is that of `mainrun ls`."""
    folder = tmp_path / "killed-00000000"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": TrainConfig().model_dump()}))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (folder / "status.json").write_text(json.dumps({"state": "running", "pid": process.pid, "step": 3}))
    (folder / ".lock").write_text(f"{process.pid} on {platform.node()}\n")
    assert mainrun.run(folder).state == "killed"
    assert list(mainrun.runs(tmp_path)["state"]) == ["killed"]
