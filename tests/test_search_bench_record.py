"""Tests the recorder of tables: its rows equal runs from scratch, also after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from search_tables import TINY_TABLE

from mainrun.errors import Interrupted, UsageError
from mainrun.run.session import train
from mainrun.store.rundir import RunDir
from sweeps.search_bench import record
from sweeps.search_bench.tables import DEFINITIONS, Definition, Table, Values
from sweeps.space import with_values

ROOT = Path(__file__).parents[1]
SMALL = replace(TINY_TABLE, trunk={"lr": [0.01]}, seeds=(1,), fresh_seeds=(11, 12))
# trains slowly enough to be killed
LONGER = replace(SMALL, settings=SMALL.settings | {"epochs": 16}, trunk={"lr": [0.01, 0.03]})


def quiet(text: str) -> None:
    """Print nothing."""


def from_scratch(table: Table, values: Values, horizon: float, seed: int, out: Path) -> list[float]:
    """Train a run without a store, and return its scores at the points of the table."""
    steps = table.points(values) if horizon == 1 else []
    changes = {"seed": seed, "eval_per_epoch": 0, "eval_interval": steps[0] if steps else 0}
    cfg = with_values(table.run_config(values, horizon), changes)
    train(cfg, out)
    rows = [row for row in RunDir(out / cfg.run_id).rows() if row["event"] == "eval"]
    scores = {row["step"]: row["full"] for row in rows if row["split"] == "dev"}
    return [scores[step] for step in steps] if steps else [scores[max(scores)]]


def recorded(table: Table, values: Values, horizon: float, seed: int) -> list[float | None]:
    return table.curve(values, seed) if horizon == 1 else [table.score(values, horizon, seed)]


@pytest.mark.slow
def test_a_recorded_table_equals_runs_from_scratch(tmp_path: Path) -> None:
    table = Table.read(record.record_table(TINY_TABLE, tmp_path / "out", 1, quiet))
    assert table.definition == TINY_TABLE and len(table.finalists) == 4
    for values in table.recipes:
        for horizon in TINY_TABLE.horizons:
            again = from_scratch(table, values, horizon, 2, tmp_path / "runs")
            assert recorded(table, values, horizon, 2) == again
        last = from_scratch(table, values, 1.0, 11, tmp_path / "runs")[-1]
        assert table.score(values, 1.0, 11) == last
    assert os.listdir(tmp_path / "out" / "recording-tiny") == []  # runs, stores and parts are removed


def test_a_finished_recording_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    path = record.record_table(SMALL, tmp_path, 1, notes.append)
    assert notes[0] == "table tiny, search seeds: 0 of 1 units were finished before"
    assert notes[1] == "table tiny, search seeds: 1 of 1 units, 0:00 left"
    assert any(line.startswith("table tiny: 2 recipes") for line in notes)
    monkeypatch.setattr(record, "train_units", None)
    assert record.record_table(SMALL, tmp_path, 1, notes.append) == path
    assert notes[-1] == f"{path} is recorded already"
    with pytest.raises(UsageError, match="is another recording; move it away, or give another --out"):
        record.record_table(replace(SMALL, points=6), tmp_path, 1, quiet)


def test_a_diverged_run_is_a_row_without_a_score(tmp_path: Path) -> None:
    # with this weight decay, each step at the larger rate multiplies the weights by 999
    settings = SMALL.settings | {"weight_decay": 1.0, "clip": 0.0, "epochs": 2}
    definition = replace(SMALL, trunk={"lr": [0.01, 1000.0]}, settings=settings)
    table = Table.read(record.record_table(definition, tmp_path, 1, quiet))
    for values in table.recipes:
        diverged = values["lr"] == 1000
        assert (table.score(values, 1.0, 1) is None) == (table.curve(values, 1)[-1] is None) == diverged
        assert (table.score(values, 0.5, 1) is None) == diverged
    assert {values["lr"] for values in table.finalists} == {0.01}


def test_the_runs_of_a_finished_unit_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = replace(SMALL, seeds=(1, 2))
    lab, _ = record.open_lab(definition, tmp_path)
    first, second = record.search_units(lab.lattice)
    lab.train(first)
    assert lab.part(first).exists() and not lab.work(first).exists()
    lab.work(first).mkdir()  # as if the recorder was killed before it removed the folder
    monkeypatch.setattr(record.Lab, "scores", None)
    lab.train(first)  # trains nothing
    assert not lab.work(first).exists() and not lab.part(second).exists()


def test_a_recording_of_other_code_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, _ = record.open_lab(SMALL, tmp_path)
    assert record.open_lab(SMALL, tmp_path)[0].folder == lab.folder
    monkeypatch.setattr("mainrun.core.machine_class.SOURCE", "other code")
    assert record.open_lab(SMALL, tmp_path)[0].folder != lab.folder


def test_a_table_can_have_titles_of_its_own(tmp_path: Path) -> None:
    from mainrun.data import synthetic

    definition = replace(SMALL, skipped_titles=20, settings=SMALL.settings | {"num_titles": 80})
    lab, header = record.open_lab(definition, tmp_path)
    titles = (tmp_path / "recording-tiny" / "titles.txt").read_text().splitlines()
    assert titles == synthetic.titles(100)[20:]
    assert header["fingerprints"] != record.open_lab(SMALL, tmp_path)[1]["fingerprints"]
    (unit,) = record.search_units(lab.lattice)
    lab.train(unit)


def test_unknown_tables_are_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown table 'C'; the tables are A, B"):
        record.record("C", tmp_path)


# -- kills and Ctrl-C, with two workers

RECORDER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from mainrun.errors import Interrupted
from sweeps.search_bench.record import record_table
from test_search_bench_record import LONGER
if __name__ == "__main__":
    try:
        record_table(LONGER, Path(sys.argv[1]), 2)
    except Interrupted as e:
        print(e)
        sys.exit(e.exit_code)
"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def start(out: Path) -> subprocess.Popen[str]:
    script = out.parent / "recorder.py"
    script.write_text(RECORDER)
    return subprocess.Popen(
        [sys.executable, str(script), str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def states(out: Path) -> list[str]:
    """Return the states of the runs that are not removed yet."""
    paths = out.glob("recording-*/*/work/*/*/status.json")
    return [json.loads(path.read_text())["state"] for path in paths]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers end with their recorder only on Linux")
def test_a_killed_recording_continues_to_the_same_table(tmp_path: Path) -> None:
    expected = Table.read(record.record_table(LONGER, tmp_path / "a", 1, quiet)).rows
    out = tmp_path / "b"

    recorder = start(out)
    wait_for(lambda: states(out).count("running") == 2)
    workers = children(recorder.pid)
    recorder.kill()
    recorder.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))  # none waits forever

    recorder = start(out)  # goes on, and is stopped with Ctrl-C in the terminal, which signals the group
    wait_for(lambda: states(out).count("running") == 2)
    workers = children(recorder.pid)
    os.killpg(recorder.pid, signal.SIGINT)
    printed, _ = recorder.communicate(timeout=60)
    assert recorder.returncode == Interrupted.exit_code
    assert printed == "stopped; everything is saved; run the same command again to go on\n"
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert "interrupted" in states(out)  # no worker trained its unit to the end

    assert Table.read(record.record_table(LONGER, out, 2, quiet)).rows == expected


# -- the tables of the package


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFINITIONS)
def test_random_entries_of_a_recorded_table_are_those_of_runs_from_scratch(name: str, tmp_path: Path) -> None:
    """Other versions or another machine class may give other bits, so the test needs those of the table."""
    try:
        table = Table.read(name)
    except UsageError as e:
        pytest.skip(str(e))
    lab, header = record.open_lab(table.definition, tmp_path)
    for fact in ("machine_class", "versions"):
        if header[fact] != table.header[fact]:
            pytest.skip(f"table {name} was recorded with other {fact}: {json.dumps(table.header[fact])}")
    assert header == table.header
    rng = random.Random(0)
    definition: Definition = table.definition
    table.config = with_values(table.config, {"corpus": lab.corpus})
    for _ in range(20):
        values, seed = rng.choice(table.recipes), rng.choice(definition.seeds)
        horizon = rng.choice(definition.horizons)
        if table.score(values, horizon, seed) is not None:
            again = from_scratch(table, values, horizon, seed, tmp_path / "runs")
            assert recorded(table, values, horizon, seed) == again
