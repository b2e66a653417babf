"""What goes wrong around a study: databases, disks, Ctrl-C, a budget that changes.

Clear words, the right exit code, and nothing lost.
"""

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
from test_sharing import mounted
from test_sweeps import SET, AtOnce, command, made, searched, told, write
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


def test_titles_that_change_behind_a_study_are_refused(tmp_path: Path) -> None:
    """Its next trials would be of other data than those that are over."""
    titles, how = (
        tmp_path / "titles.txt",
        SET | {"corpus": f"file:{tmp_path / 'titles.txt'}", "vocab_size": 300},
    )
    lines = [f"Title number {i} of many" for i in range(300)]
    titles.write_text("\n".join(lines))
    first = Search(made(set=how), tmp_path, AtOnce(1), quiet, lambda: None).train_tokens
    assert Search(made(set=how), tmp_path, AtOnce(1), quiet, lambda: None).train_tokens == first
    titles.write_text("\n".join([*lines[:-1], "Another one"]))
    with pytest.raises(
        UsageError, match=r"gives other titles now than when .* began; restore it, or .* with --as NAME"
    ):
        Search(made(set=how), tmp_path, AtOnce(1), quiet, lambda: None)


# -- databases


def refused(folder: Path, **changes: Any) -> str:
    with pytest.raises(UsageError) as e:
        StudyDatabase(made(**changes), folder, quiet)
    return str(e.value)


def test_a_database_that_is_locked_is_waited_for_and_then_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    StudyDatabase(made(), tmp_path, quiet)
    other = sqlite3.connect(tmp_path / "study.db", check_same_thread=False)
    other.execute("begin exclusive")
    threading.Timer(2.0, other.rollback).start()
    whole = StudyDatabase(made(), tmp_path, notes.append)
    assert "database is locked" in notes[0] and notes[1] == "the storage answers again" and whole.written == 0
    other.execute("begin exclusive")
    monkeypatch.setattr(database, "LOCK_TIMEOUT", 0.0)
    said = refused(tmp_path)
    assert "study.db was locked by another process" in said and "nothing is lost" in said
    other.rollback()
    search = searched(tmp_path, AtOnce(1))
    assert StudyDatabase(made(), tmp_path, quiet).written == len(search.trials) == 12


def test_a_file_that_is_no_database_of_studies_is_refused_untouched(tmp_path: Path) -> None:
    file, url = tmp_path / "x.db", f"sqlite:///{tmp_path / 'x.db'}"
    file.write_text("no database at all, but a text that is long enough to be looked at" * 20)
    assert "file is not a database" in refused(tmp_path, storage=url)
    file.unlink()
    with sqlite3.connect(file) as other:
        other.execute("create table invoices (id int)")
    before = file.read_bytes()
    assert "is a database of something else (tables invoices); make a new one" in refused(
        tmp_path, storage=url
    )
    assert file.read_bytes() == before
    assert "unable to open database file" in refused(
        tmp_path, storage=f"sqlite:///{tmp_path / 'no' / 'x.db'}"
    )


@pytest.mark.parametrize("kept", range(14))
def test_a_database_whose_creation_was_killed_is_completed(tmp_path: Path, kept: int) -> None:
    """Optuna creates its tables one after the other, each for good, and writes their version last."""
    StudyDatabase(made(), tmp_path, quiet)
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
    assert StudyDatabase(made(), tmp_path, quiet).written == 0
    search = searched(tmp_path, AtOnce(1))
    assert StudyDatabase(made(), tmp_path, quiet).written == len(search.trials)


def test_a_table_that_only_has_a_name_of_optuna_s_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute("create table studies (title text)")
    assert "is a database of something else (tables studies)" in refused(tmp_path)


def test_a_database_of_another_optuna_is_refused(tmp_path: Path) -> None:
    StudyDatabase(made(), tmp_path, quiet)
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute("update alembic_version set version_num = 'v9.9.9'")
    said = refused(tmp_path)
    assert "set up by optuna" in said and said.endswith("make a new database, or give another --storage")


def test_a_database_with_another_study_of_that_name_is_refused(tmp_path: Path) -> None:
    import optuna

    optuna.create_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 'study.db'}").add_trial(
        optuna.trial.create_trial(state=optuna.trial.TrialState.COMPLETE, value=1.0)
    )
    assert "holds another study called 'tiny'; give this one another --as NAME" in refused(tmp_path)


@pytest.mark.parametrize(
    "statement",
    [
        "update trials set state = 'ODD'",
        "update trial_values set value = null",
        "update trial_params set distribution_json = '{'",
        "update trial_user_attributes set value_json = '{'",
        "update trials set datetime_start = 'x'",
        "update study_user_attributes set value_json = '{'",
        "delete from trials",
        "delete from studies",
    ],
)
def test_a_database_with_edited_rows_ends_with_one_message(tmp_path: Path, statement: str) -> None:
    searched(tmp_path, AtOnce(1))
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute(statement)
    with pytest.raises(UsageError, match=r"study\.db .*--as NAME|study\.db cannot be used"):
        searched(tmp_path, AtOnce(1))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "mysql://me\x3asecret@host/x",
            "storage='mysql://me@host/x' is not allowed; write sqlite:///FILE or postgresql://",
        ),
        *(
            (f"sqlite:///{memory}", "is in memory, and would be lost; write sqlite:///FILE")
            for memory in ("", ":memory:", "file::memory:?uri=true")
        ),
        ("postgresql://me:sec/ret@host/x", "a password has @ as %40 and / as %2F in a URL"),
        ("postgresql://me\x3asec@ret@host/x", "a password has @ as %40 and / as %2F in a URL"),
    ],
)
def test_a_storage_that_cannot_be_is_refused_and_its_password_not_shown(url: str, said: str) -> None:
    with pytest.raises(UsageError) as e:
        made(storage=url)
    assert said in str(e.value) and not any(part in str(e.value) for part in ("secret", "sec", "ret@"))


@pytest.mark.parametrize("option", ["", "--storage="])
def test_the_command_that_goes_on_holds_no_password(option: str) -> None:
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
def test_what_is_written_of_a_study_has_no_password(tmp_path: Path, url: str, plain: str) -> None:
    study = made(storage=url)
    with locked_folder(tmp_path, study):
        write_study_json(tmp_path, study, "mainrun sweep tiny")
        assert json.loads((tmp_path / "study.json").read_text())["study"]["storage"] == plain
    assert study.storage == url and "cret" not in repr(study)


# -- disks


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = CliRunner().invoke(app, ["sweep", "demo", "--out", str(tmp_path / "file")])
    assert found.exit_code == 2 and "choose a writable folder with --out" in found.stderr
    place = tmp_path / "ro"
    place.mkdir()
    with (
        mounted(place, "-t", "tmpfs", "-o", "ro", "tmpfs"),
        pytest.raises(RunError, match="Read-only file system; choose"),
    ):
        locked_folder(place / "x", made()).__enter__()


def test_a_full_disk_stops_the_driver_and_loses_nothing(tmp_path: Path) -> None:
    """The database's own disk; afterwards the study goes on."""
    place = tmp_path / "small"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=400k", "tmpfs"):
        StudyDatabase(made(), place, quiet)
        fill(place / "ballast")
        with pytest.raises(
            DiskFull,
            match=r"no space left to write .*study.db.*start the same command again, nothing is lost",
        ):
            searched(place, AtOnce(1))
        with pytest.raises(DiskFull, match="no space left to write"), locked_folder(place / "x", made()):
            write_study_json(place / "x", made(), "mainrun sweep tiny")
        (place / "ballast").unlink()
        assert told(searched(place, AtOnce(1))) == told(searched(tmp_path / "free", AtOnce(1)))
        assert StudyDatabase(made(), place, quiet).written == 12


def fill(file: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        file.write_bytes(b"x" * 1_000_000)


@pytest.mark.slow
def test_a_full_disk_stops_a_worker_and_its_trial_has_not_failed(tmp_path: Path) -> None:
    place, cfg = tmp_path / "small", made().base()
    place.mkdir()
    task = Task("baseline", tuple(set_arguments(made(), cfg)), place / "runs", place / "store", 0)
    with (
        mounted(place, "-t", "tmpfs", "-o", "size=100k", "tmpfs"),
        pytest.raises(DiskFull, match="no space left to write"),
    ):
        Local(1, 1).train(task)


# -- a budget that grows


def test_a_larger_budget_later_changes_no_trial_that_is_over(tmp_path: Path) -> None:
    """A generation with rungs is asked whole, so that what is decided in it never depends on where the budget ended."""
    few = searched(tmp_path / "a", AtOnce(1), budget={"trials": 7})
    more = searched(tmp_path / "a", AtOnce(2), budget={"trials": 13})
    once = searched(tmp_path / "b", AtOnce(1), budget={"trials": 15})
    assert len(few.trials) == 9 and told(few) == told(more)[:9] and told(more) == told(once)
    assert any(t.state == "pruned" for t in few.trials[6:])
    with pytest.raises(UsageError, match="has 15 trials, the budget has 9; it may only grow"):
        searched(tmp_path / "a", AtOnce(1), budget={"trials": 7})
    plain = searched(tmp_path / "c", AtOnce(1), budget={"trials": 7}, rungs=None)
    assert (
        len(plain.trials) == 7
        and told(plain) == told(searched(tmp_path / "c", AtOnce(1), budget={"trials": 11}, rungs=None))[:7]
    )


# -- Ctrl-C, and the ledger


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_ctrl_c_ends_the_workers_and_the_ledger_is_the_sum_of_the_runs(tmp_path: Path) -> None:
    """A study with rungs, values that come twice, a trial that diverges, and a confirmation; stopped in its middle, and gone on with."""
    space = {"lr": {"values": [0.01, 1000.0]}, "optimizer": {"values": ["adamw", "sgd"]}}
    how = {"sampler": {"name": "random", "seed": 1, "generation": 3}, "budget": {"trials": 6}}
    line = command(
        write(
            tmp_path,
            space=space,
            set=SET | {"clip": 0.0},
            evidence={"noise_seeds": 2, "seeds": 2, "best": 1},
            **how,
        ),
        tmp_path / "out",
        2,
    )
    runs = tmp_path / "out" / "tiny" / "runs"
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(list(runs.glob("*/metrics.jsonl"))) < 2 and process.poll() is None:
        time.sleep(0.1)
    workers = [
        int(child)
        for task in Path(f"/proc/{process.pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (
        process.returncode == 75
        and workers
        and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    )
    assert said.splitlines()[-1].startswith(
        "interrupted: stopped; what was trained is saved, nothing is lost: `mainrun sweep"
    )
    assert said.count("Traceback") == 0 and str(tmp_path / "out") in said.splitlines()[-1]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "tiny" / "export.json").read_text())
    trials, ledger = found["trials"], found["ledger"]
    assert {t["state"] for t in trials} >= {"done", "diverged"} and len({t["run"] for t in trials}) < len(
        trials
    )
    parts = [*trials, *found["evidence"]["runs"]]
    assert {part.get("kind", "trial") for part in parts} == {"trial", "noise", "confirmation"}
    for key in Ledger.__dataclass_fields__:
        assert ledger[key] == pytest.approx(sum(part[key] for part in parts))
    each = {
        path.name: run_cost(RunDir(path), RunDir(path).config())
        for path in runs.glob("*")
        if (path / "config.json").is_file()
    }
    assert set(each) == {part["run"] for part in parts}
    whole, again = (
        total(each.values()),
        total(each[t["run"]] for t in trials if t["asked"] and not t["trained"]),
    )
    assert all(
        ledger[key] == pytest.approx(getattr(whole, key)) for key in ("trained", "tokens", "flops", "seconds")
    )
    assert (
        again.asked
        and ledger["asked"]
        == whole.asked + again.asked - again.wasted
        == ledger["trained"] + ledger["reused"]
    )
    lost = sum(t["trained"] for t in trials if t["state"] in ("pruned", "diverged"))
    assert lost <= ledger["wasted"] <= ledger["trained"] and all(
        0 <= part["wasted"] <= part["trained"] for part in parts
    )
    assert f"steps: {ledger['asked']:,} asked" in done.stdout and "of these" in done.stdout
