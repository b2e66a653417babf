"""Tests that database errors, full disks and Ctrl-C give a clear message and lose no results."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import slow_unless
from test_sharing import mounted
from test_sweeps import (
    SET,
    InstantEngine,
    child_processes,
    command,
    facts,
    run_search,
    tiny_study,
    write_study_file,
)
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.errors import DiskFull, RunError, UsageError
from mainrun.store.rundir import RunDir
from sweeps import database
from sweeps.database import StudyDatabase
from sweeps.driver import Search
from sweeps.engine.local import Local
from sweeps.engine.protocol import Task
from sweeps.folder import locked_folder, write_study_json
from sweeps.ledger import Ledger, run_cost, total
from sweeps.study import set_arguments


def quiet(text: str) -> None:
    pass


def test_titles_that_have_changed_are_refused(tmp_path: Path) -> None:
    """With changed titles, new trials would train on other data than the finished trials."""
    titles = tmp_path / "titles.txt"
    study = tiny_study(set=SET | {"corpus": f"file:{titles}", "vocab_size": 300})
    lines = [f"Title number {i} of many" for i in range(300)]
    titles.write_text("\n".join(lines))
    first = Search(study, tmp_path, InstantEngine(1), quiet, lambda: None).train_tokens
    assert Search(study, tmp_path, InstantEngine(1), quiet, lambda: None).train_tokens == first
    titles.write_text("\n".join([*lines[:-1], "Another one"]))
    with pytest.raises(
        UsageError, match=r"the titles of .* have changed since .*; restore the titles, or .* with --as NAME"
    ):
        Search(study, tmp_path, InstantEngine(1), quiet, lambda: None)


# -- databases


def refused(folder: Path, **changes: Any) -> str:
    """Open a database that the study must refuse, and return the error message."""
    with pytest.raises(UsageError) as e:
        StudyDatabase(tiny_study(**changes), folder, quiet)
    return str(e.value)


@pytest.mark.slow
def test_a_locked_database_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    StudyDatabase(tiny_study(), tmp_path, quiet)
    other = sqlite3.connect(tmp_path / "study.db", check_same_thread=False)
    other.execute("begin exclusive")
    threading.Timer(2.0, other.rollback).start()
    opened = StudyDatabase(tiny_study(), tmp_path, notes.append)
    assert (
        "database is locked" in notes[0] and notes[1] == "the storage answers again" and opened.written == 0
    )
    other.execute("begin exclusive")
    monkeypatch.setattr(database, "LOCK_TIMEOUT", 0.0)
    message = refused(tmp_path)
    assert "study.db was locked by another process" in message and "nothing is lost" in message
    other.rollback()
    search = run_search(tmp_path, InstantEngine(1))
    assert StudyDatabase(tiny_study(), tmp_path, quiet).written == len(search.trials) == 12


def test_a_file_that_is_not_a_study_database_is_refused_untouched(tmp_path: Path) -> None:
    file, url = tmp_path / "x.db", f"sqlite:///{tmp_path / 'x.db'}"
    file.write_text("a text that is long enough to look like a database file" * 20)
    assert "file is not a database" in refused(tmp_path, storage=url)
    file.unlink()
    with sqlite3.connect(file) as other:
        other.execute("create table invoices (id int)")
    before = file.read_bytes()
    assert "is the database of another program (with the tables invoices); create a new database" in refused(
        tmp_path, storage=url
    )
    assert file.read_bytes() == before
    assert "unable to open database file" in refused(
        tmp_path, storage=f"sqlite:///{tmp_path / 'no' / 'x.db'}"
    )


@pytest.mark.parametrize("kept", slow_unless([0, 6, 13], range(14)))
def test_a_database_whose_creation_was_killed_is_completed(tmp_path: Path, kept: int) -> None:
    """Optuna creates and commits its tables one by one, and writes the schema version last."""
    StudyDatabase(tiny_study(), tmp_path, quiet)
    with sqlite3.connect(tmp_path / "study.db") as other:
        names = [
            name
            for (name,) in other.execute("select name from sqlite_master where type = 'table' order by rowid")
        ]
        assert len(names) == 13 and names[-1] == "alembic_version"
        for name in names[kept:]:
            other.execute(f"drop table {name}")
        for name in names[:kept]:
            other.execute(f"delete from {name}")
    assert StudyDatabase(tiny_study(), tmp_path, quiet).written == 0
    search = run_search(tmp_path, InstantEngine(1))
    assert StudyDatabase(tiny_study(), tmp_path, quiet).written == len(search.trials)


def test_a_foreign_table_with_a_name_of_optuna_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute("create table studies (title text)")
    assert "is the database of another program (with the tables studies)" in refused(tmp_path)


def test_a_database_of_another_optuna_version_is_refused(tmp_path: Path) -> None:
    StudyDatabase(tiny_study(), tmp_path, quiet)
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute("update alembic_version set version_num = 'v9.9.9'")
    message = refused(tmp_path)
    assert "cannot be used; create a new database, or give another --storage. Optuna reports: " in message
    assert "set up by optuna" in message


def test_a_database_with_another_study_of_that_name_is_refused(tmp_path: Path) -> None:
    import optuna

    optuna.create_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 'study.db'}").add_trial(
        optuna.trial.create_trial(state=optuna.trial.TrialState.COMPLETE, value=1.0)
    )
    assert "contains a different study called 'tiny'; give this study another name with --as NAME" in refused(
        tmp_path
    )


EDITS = [
    "update trials set state = 'ODD'",
    "update trial_values set value = null",
    "update trial_params set distribution_json = '{'",
    "update trial_user_attributes set value_json = '{'",
    "update trials set datetime_start = 'x'",
    "update study_user_attributes set value_json = '{'",
    "delete from trials",
    "delete from studies",
]


@pytest.mark.parametrize("statement", slow_unless(EDITS[::3], EDITS))
def test_a_database_with_edited_rows_gives_one_message(tmp_path: Path, statement: str) -> None:
    run_search(tmp_path, InstantEngine(1))
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute(statement)
    with pytest.raises(UsageError, match=r"study\.db .*--as NAME|study\.db cannot be used"):
        run_search(tmp_path, InstantEngine(1))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "mysql://me\x3asecret@host/x",
            "storage='mysql://me@host/x' is not allowed; write sqlite:///FILE or postgresql://",
        ),
        *(
            (f"sqlite:///{memory}", "is in memory and would be lost; write sqlite:///FILE")
            for memory in ("", ":memory:", "file::memory:?uri=true")
        ),
        ("postgresql://me:sec/ret@host/x", "in the password of a URL, write @ as %40 and / as %2F"),
        ("postgresql://me\x3asec@ret@host/x", "in the password of a URL, write @ as %40 and / as %2F"),
    ],
)
def test_an_invalid_storage_is_refused_without_its_password(url: str, message: str) -> None:
    with pytest.raises(UsageError) as e:
        tiny_study(storage=url)
    assert message in str(e.value)
    assert not any(part in str(e.value) for part in ("secret", "sec", "ret@"))


@pytest.mark.parametrize("option", ["", "--storage="])
def test_the_command_that_resumes_a_study_has_no_password(option: str) -> None:
    from sweeps.cli import _hide_password

    assert _hide_password(option + "postgresql://me\x3as%40cret@host/x") == option + "postgresql://me@host/x"
    assert (
        _hide_password("--set") == "--set"
        and _hide_password("corpus=file:a:b@c.txt") == "corpus=file:a:b@c.txt"
    )


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("postgresql://me\x3as%40cret@host:5432/x", "postgresql://me@host:5432/x"),
        (
            "postgresql+psycopg://me@host/x?password=s&sslmode=require",
            "postgresql+psycopg://me@host/x?sslmode=require",
        ),
        ("postgresql:///x?host=/run&password=s", "postgresql:///x?host=/run"),
        ("postgresql://host:5432/x", "postgresql://host:5432/x"),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
    ],
)
def test_the_files_of_a_study_have_no_password(tmp_path: Path, url: str, plain: str) -> None:
    study = tiny_study(storage=url)
    with locked_folder(tmp_path, study):
        write_study_json(tmp_path, study, "mainrun sweep tiny")
        assert json.loads((tmp_path / "study.json").read_text())["study"]["storage"] == plain
    assert study.storage == url and "cret" not in repr(study)


# -- disks


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["sweep", "demo", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and "choose a writable folder with --out" in result.stderr
    place = tmp_path / "ro"
    place.mkdir()
    with (
        mounted(place, "-t", "tmpfs", "-o", "ro", "tmpfs"),
        pytest.raises(RunError, match="Read-only file system; choose"),
    ):
        locked_folder(place / "x", tiny_study()).__enter__()


def test_a_full_disk_stops_the_driver_and_loses_nothing(tmp_path: Path) -> None:
    """The study stops when the database's disk is full, and resumes once there is free space."""
    place = tmp_path / "small"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=400k", "tmpfs"):
        StudyDatabase(tiny_study(), place, quiet)
        fill(place / "ballast")
        with pytest.raises(
            DiskFull,
            match=r"no space left to write .*study.db.*run the same command again; nothing is lost",
        ):
            run_search(place, InstantEngine(1))
        with (
            pytest.raises(DiskFull, match="no space left to write"),
            locked_folder(place / "x", tiny_study()),
        ):
            write_study_json(place / "x", tiny_study(), "mainrun sweep tiny")
        (place / "ballast").unlink()
        assert facts(run_search(place, InstantEngine(1))) == facts(
            run_search(tmp_path / "free", InstantEngine(1))
        )
        assert StudyDatabase(tiny_study(), place, quiet).written == 12


def fill(file: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        file.write_bytes(b"x" * 1_000_000)


@pytest.mark.slow
def test_a_full_disk_of_a_worker_does_not_fail_the_trial(tmp_path: Path) -> None:
    place, cfg = tmp_path / "small", tiny_study().base()
    place.mkdir()
    task = Task("baseline", tuple(set_arguments(tiny_study(), cfg)), place / "runs", place / "store", 0)
    with (
        mounted(place, "-t", "tmpfs", "-o", "size=100k", "tmpfs"),
        pytest.raises(DiskFull, match="no space left to write"),
    ):
        Local(1, 1).train(task)


# -- a larger budget


def test_a_larger_budget_does_not_change_finished_trials(tmp_path: Path) -> None:
    """A generation with rungs is always completed, so that its promotions do not depend on the budget."""
    few = run_search(tmp_path / "a", InstantEngine(1), budget={"trials": 7})
    more = run_search(tmp_path / "a", InstantEngine(2), budget={"trials": 13})
    once = run_search(tmp_path / "b", InstantEngine(1), budget={"trials": 15})
    assert len(few.trials) == 9 and facts(few) == facts(more)[:9] and facts(more) == facts(once)
    assert any(t.state == "pruned" for t in few.trials[6:])
    with pytest.raises(
        UsageError, match="has 15 trials, but the budget allows only 9; a budget can only grow"
    ):
        run_search(tmp_path / "a", InstantEngine(1), budget={"trials": 7})
    plain = run_search(tmp_path / "c", InstantEngine(1), budget={"trials": 7}, rungs=None)
    longer = run_search(tmp_path / "c", InstantEngine(1), budget={"trials": 11}, rungs=None)
    assert len(plain.trials) == 7 and facts(plain) == facts(longer)[:7]


# -- Ctrl-C and costs


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_ctrl_c_ends_the_workers_and_the_costs_add_up(tmp_path: Path) -> None:
    """The study has rungs, repeated values, a trial that diverges, and a confirmation.

    The test stops the study with Ctrl-C and resumes it.
    """
    space = {"lr": {"values": [0.01, 1000.0]}, "optimizer": {"values": ["adamw", "sgd"]}}
    file = write_study_file(
        tmp_path,
        space=space,
        set=SET | {"clip": 0.0},
        evidence={"noise_seeds": 2, "seeds": 2, "best": 1, "sequential": False},
        sampler={"name": "random", "seed": 1, "generation": 3},
        budget={"trials": 6},
    )
    line = command(file, tmp_path / "out", 2)
    runs = tmp_path / "out" / "tiny" / "runs"
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(list(runs.glob("*/metrics.jsonl"))) < 2 and process.poll() is None:
        time.sleep(0.1)
    workers = child_processes(process.pid)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 75
    assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    last_line = stderr.splitlines()[-1]
    assert last_line.startswith("interrupted: the study was stopped, but nothing is lost; run `mainrun sweep")
    assert str(tmp_path / "out") in last_line and "Traceback" not in stderr
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    export = json.loads((tmp_path / "out" / "tiny" / "export.json").read_text())
    trials, ledger = export["trials"], export["ledger"]
    assert {t["state"] for t in trials} >= {"done", "diverged"} and len({t["run"] for t in trials}) < len(
        trials
    )
    parts = [*trials, *export["evidence"]["runs"]]
    assert {part.get("kind", "trial") for part in parts} == {"trial", "noise", "confirmation"}
    for key in Ledger.__dataclass_fields__:
        assert ledger[key] == pytest.approx(sum(part[key] for part in parts))
    costs = {
        file.parent.name: run_cost(RunDir(file.parent), RunDir(file.parent).config())
        for file in runs.glob("*/config.json")
    }
    assert set(costs) == {part["run"] for part in parts}
    sums = total(costs.values())
    for key in ("trained", "tokens", "flops", "seconds"):
        assert ledger[key] == pytest.approx(getattr(sums, key))
    repeated = total(costs[t["run"]] for t in trials if t["asked"] and not t["trained"])
    assert repeated.asked
    assert ledger["asked"] == sums.asked + repeated.asked - repeated.wasted
    assert ledger["asked"] == ledger["trained"] + ledger["reused"]
    lost = sum(t["trained"] for t in trials if t["state"] in ("pruned", "diverged"))
    assert lost <= ledger["wasted"] <= ledger["trained"] and all(
        0 <= part["wasted"] <= part["trained"] for part in parts
    )
    assert f"steps: {ledger['asked']:,} in all" in done.stdout and "of all steps, " in done.stdout
