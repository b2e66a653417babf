"""Tests studies on a real PostgreSQL server that runs on a free port, with its data in a temporary folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sweeps import FormulaSearch, InstantEngine, command, facts, tiny_study, write_study_file

from mainrun.errors import UsageError
from sweeps.database import StudyDatabase

PASSWORD = "p4:s%s"  # the URL-encoded password is p4%3As%25s
BIN = max(
    Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=Path("/none")
)


class Server:
    """A PostgreSQL server. PostgreSQL refuses to run as root, so root starts it as another user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user: dict[str, Any] = (
            {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        )
        if self.user:
            shutil.chown(folder, "nobody", "nogroup")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = folder / "secret"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._run(
            "initdb",
            "--username=study",
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C",
        )
        self.start()

    def _run(self, name: str, *arguments: str) -> None:
        line = [str(BIN / name), "-D", str(self.folder / "data"), *arguments]
        done = subprocess.run(
            line,
            cwd=self.folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
            **self.user,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-w", "-t", "100", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-t", "100", "-m", "fast", "stop")

    def url(self, database: str = "postgres", password: str = ":p4%3As%25s") -> str:
        return f"postgresql://study{password}@127.0.0.1:{self.port}/{database}"

    def sql(self, text: str, database: str = "postgres") -> list[Any]:
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as link:
            result = link.execute(text)  # type: ignore[call-overload]
            return result.fetchall() if result.description else []


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not (BIN / "initdb").is_file():
        pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="needs pip install 'mainrun[postgres]'")
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    try:
        server = Server(folder)
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(server: Server) -> str:
    name = f"d{len(server.sql('select 1 from pg_database'))}"
    server.sql(f"create database {name}")
    return name


def run_search(folder: Path, engine: Any, note: Any = lambda text: None, **changes: Any) -> FormulaSearch:
    folder.mkdir(parents=True, exist_ok=True)
    search = FormulaSearch(tiny_study(**changes), folder, engine, note, lambda: None)
    search.run()
    return search


def written(url: str, name: str = "tiny") -> list[Any]:
    """Return the trials in a database."""
    import optuna

    study = optuna.load_study(study_name=name, storage=url.replace("postgresql:", "postgresql+psycopg:"))
    return [
        (t.user_attrs["number"], t.state.name, t.value, t.params, t.intermediate_values) for t in study.trials
    ]


def test_a_study_on_a_server_equals_the_study_in_a_file(
    server: Server, database: str, tmp_path: Path
) -> None:
    """Two studies share a database. A resumed study has each trial only once."""
    url = server.url(database)
    on_server = run_search(tmp_path / "a", InstantEngine(2), storage=url, budget={"trials": 6})
    on_server = run_search(tmp_path / "a", InstantEngine(2), storage=url)
    other = run_search(
        tmp_path / "b",
        InstantEngine(1),
        storage=url,
        name="other",
        sampler={"seed": 1, "startup": 3, "generation": 3},
    )
    in_file = run_search(tmp_path / "c", InstantEngine(1))
    assert facts(on_server) == facts(in_file) != facts(other)
    assert (
        written(url) == written(f"sqlite:///{tmp_path / 'c' / 'study.db'}")
        and len(written(url)) == len(written(url, "other")) == 12
    )
    with pytest.raises(UsageError, match=r"contains a different study called 'other'.*--as NAME"):
        run_search(tmp_path / "d", InstantEngine(1), storage=url, name="other")


def test_an_unreachable_server_is_waited_for(server: Server, database: str, tmp_path: Path) -> None:
    class ServerStops(InstantEngine):
        def train(self, task: Any) -> Any:
            if self.tasks_done == 6:
                server.stop()
            return super().train(task)

    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if "does not answer" in text:
            threading.Timer(0.5, server.start).start()

    search = run_search(tmp_path / "a", ServerStops(1), note, storage=server.url(database))
    assert facts(search) == facts(run_search(tmp_path / "b", InstantEngine(1)))
    assert written(server.url(database)) == written(f"sqlite:///{tmp_path / 'b' / 'study.db'}")
    first, *others = [note for note in notes if "storage" in note]
    assert "does not answer" in first and others == ["the storage answers again"]
    assert "%3A" not in first and PASSWORD not in first


def test_a_lost_answer_duplicates_no_trial(
    server: Server, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server writes the trial, but the connection is lost before the server answers."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import OperationalError

    create_new_trial = RDBStorage.create_new_trial
    cuts = [3, 7]

    def cut(self: Any, study: int, template_trial: Any) -> int:
        trial_id = create_new_trial(self, study, template_trial)
        if template_trial.user_attrs["number"] in cuts:
            cuts.remove(template_trial.user_attrs["number"])
            raise OperationalError("insert", None, Exception("server closed the connection unexpectedly"))
        return trial_id

    monkeypatch.setattr(RDBStorage, "create_new_trial", cut)
    run_search(tmp_path, InstantEngine(1), storage=server.url(database))
    assert not cuts and [row[0] for row in written(server.url(database))] == list(range(12))


def test_a_database_that_cannot_be_opened_is_refused_at_once(server: Server, tmp_path: Path) -> None:
    def refused(url: str) -> str:
        with pytest.raises(UsageError) as e:
            StudyDatabase(tiny_study(storage=url), tmp_path, lambda text: None)
        assert "p4" not in str(e.value) and "another --storage" in str(e.value)
        return str(e.value)

    assert "password authentication failed" in refused(server.url(database, ":p4wrong"))
    assert 'database "nowhere" does not exist' in refused(server.url("nowhere"))
    assert "refused" in refused("postgresql://study:p4@127.0.0.1:1/x")
    server.sql("create database foreign_one")
    server.sql("create table invoices (id int)", "foreign_one")
    assert "is the database of another program (with the tables invoices)" in refused(
        server.url("foreign_one")
    )
    with pytest.raises(
        UsageError,
        match=r"needs pg8000, which is not installed; install it with pip install 'mainrun\[postgres\]'",
    ):
        StudyDatabase(
            tiny_study(storage="postgresql+pg8000://study:p4@127.0.0.1/x"), tmp_path, lambda text: None
        )


@pytest.mark.slow
def test_real_trials_on_a_server_that_is_stopped_and_started(
    server: Server, database: str, tmp_path: Path
) -> None:
    """The URL is given in the study file or with --storage. No file or message contains the password."""
    changes: dict[str, Any] = {
        "budget": {"trials": 3},
        "evidence": {"noise_seeds": 2, "seeds": 2, "best": 1},
        "rungs": {"at": [0.4], "keep": 0.9},
    }
    url, out = server.url(database), tmp_path / "out"
    line = command(write_study_file(tmp_path, **changes, storage=url), out, 2)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows = 0
    while rows == 0 and process.poll() is None:
        time.sleep(0.1)
        rows = _rows(server, database)
    server.stop()
    time.sleep(2)  # meanwhile, trials finish but cannot be written to the database
    server.start()
    output, _ = process.communicate()
    assert process.returncode == 0 and rows < 3, output
    trials = json.loads((out / "tiny" / "export.json").read_text())["trials"]
    assert [row[0] for row in written(url)] == [0, 1, 2]
    assert [t["value"] for t in trials if t["state"] == "done"] == [
        row[2] for row in written(url) if row[1] == "COMPLETE"
    ]
    # The study is resumed with --storage instead of a URL in the study file. No trial may be written twice.
    last = subprocess.run(
        [*command(write_study_file(tmp_path, **changes), out, 2), "--storage", url, "--json"],
        capture_output=True,
        text=True,
    )
    assert last.returncode == 0 and len(written(url)) == 3, last.stderr
    everything = output + last.stdout + last.stderr
    for path in out.rglob("*"):
        everything += path.read_bytes().decode("latin-1") if path.is_file() else ""
    assert "p4%3As%25s" not in everything and PASSWORD not in everything
    assert f"study@127.0.0.1:{server.port}" in everything
    _check_dashboard(out, url)


def _rows(server: Server, database: str) -> int:
    """Return the number of trials in a database."""
    (table,) = server.sql("select to_regclass('trials')", database)[0]
    return int(server.sql("select count(*) from trials", database)[0][0]) if table else 0


def _check_dashboard(out: Path, url: str) -> None:
    """Check that the dashboard shows the study."""
    pytest.importorskip("optuna_dashboard", reason="needs pip install 'mainrun[dashboard]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        sys.executable,
        "-m",
        "mainrun",
        "sweep",
        "dashboard",
        "tiny",
        "--out",
        str(out),
        "--storage",
        url,
        "--port",
        str(port),
    ]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(300):
            time.sleep(0.2)
            try:
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies").read()
                break
            except OSError:
                assert process.poll() is None, process.communicate()[0]
        assert [study["study_name"] for study in json.loads(answer)["study_summaries"]] == ["tiny"]
    finally:
        process.terminate()
        process.communicate()
