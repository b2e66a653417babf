"""Studies on a real PostgreSQL server: Debian's, started here on a free port in a folder that goes afterwards."""

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
from test_sweeps import AtOnce, Pretended, command, made, told, write

from mainrun.errors import UsageError
from sweeps.database import StudyDatabase

PASSWORD = "p4:s%s"  # as it stands in a URL: p4%3As%25s
BIN = max(
    Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=Path("/none")
)


class Server:
    """initdb and postgres refuse root: there they are another user's."""

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
            found = link.execute(text)  # type: ignore[call-overload]
            return found.fetchall() if found.description else []


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not (BIN / "initdb").is_file():
        pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="needs pip install 'mainrun[postgres]'")
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    try:
        found = Server(folder)
        yield found
        found.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(server: Server) -> str:
    name = f"d{len(server.sql('select 1 from pg_database'))}"
    server.sql(f"create database {name}")
    return name


def searched(folder: Path, engine: Any, note: Any = lambda text: None, **changes: Any) -> Pretended:
    folder.mkdir(parents=True, exist_ok=True)
    found = Pretended(made(**changes), folder, engine, note, lambda: None)
    found.run()
    return found


def kept(url: str, name: str = "tiny") -> list[Any]:
    import optuna

    study = optuna.load_study(study_name=name, storage=url.replace("postgresql:", "postgresql+psycopg:"))
    return [
        (t.user_attrs["number"], t.state.name, t.value, t.params, t.intermediate_values) for t in study.trials
    ]


def test_a_study_on_a_server_is_the_study_on_a_file(server: Server, database: str, tmp_path: Path) -> None:
    """And two studies share a database, one that goes on twice has each trial once."""
    url = server.url(database)
    mine = searched(tmp_path / "a", AtOnce(2), storage=url, budget={"trials": 6})
    mine = searched(tmp_path / "a", AtOnce(2), storage=url)
    other = searched(
        tmp_path / "b",
        AtOnce(1),
        storage=url,
        name="other",
        sampler={"seed": 1, "startup": 3, "generation": 3},
    )
    file = searched(tmp_path / "c", AtOnce(1))
    assert told(mine) == told(file) != told(other)
    assert (
        kept(url) == kept(f"sqlite:///{tmp_path / 'c' / 'study.db'}")
        and len(kept(url)) == len(kept(url, "other")) == 12
    )
    with pytest.raises(UsageError, match=r"holds another study called 'other'.*--as NAME"):
        searched(tmp_path / "d", AtOnce(1), storage=url, name="other")


def test_a_server_that_goes_away_is_waited_for(server: Server, database: str, tmp_path: Path) -> None:
    class Stops(AtOnce):
        def train(self, task: Any) -> Any:
            if self.done == 6:
                server.stop()
            return super().train(task)

    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if "does not answer" in text:
            threading.Timer(0.5, server.start).start()

    search = searched(tmp_path / "a", Stops(1), note, storage=server.url(database))
    assert told(search) == told(searched(tmp_path / "b", AtOnce(1)))
    assert kept(server.url(database)) == kept(f"sqlite:///{tmp_path / 'b' / 'study.db'}")
    away = [note for note in notes if "storage" in note]
    assert "does not answer" in away[0] and away[1:] == ["the storage answers again"]
    assert "%3A" not in away[0] and PASSWORD not in away[0]


def test_an_answer_that_never_came_doubles_nothing(
    server: Server, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has written the trial, and is gone before it says so."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import OperationalError

    real, cuts = RDBStorage.create_new_trial, [3, 7]

    def cut(self: Any, study: int, template_trial: Any) -> int:
        made = real(self, study, template_trial)
        if template_trial.user_attrs["number"] in cuts:
            cuts.remove(template_trial.user_attrs["number"])
            raise OperationalError("insert", None, Exception("server closed the connection unexpectedly"))
        return made

    monkeypatch.setattr(RDBStorage, "create_new_trial", cut)
    searched(tmp_path, AtOnce(1), storage=server.url(database))
    assert not cuts and [row[0] for row in kept(server.url(database))] == list(range(12))


def test_what_cannot_be_opened_is_refused_at_once(server: Server, tmp_path: Path) -> None:
    def refused(url: str) -> str:
        with pytest.raises(UsageError) as e:
            StudyDatabase(made(storage=url), tmp_path, lambda text: None)
        assert "p4" not in str(e.value) and "another --storage" in str(e.value)
        return str(e.value)

    assert "password authentication failed" in refused(server.url(database, ":p4wrong"))
    assert 'database "nowhere" does not exist' in refused(server.url("nowhere"))
    assert "refused" in refused("postgresql://study:p4@127.0.0.1:1/x")
    server.sql("create database foreign_one")
    server.sql("create table invoices (id int)", "foreign_one")
    assert "is a database of something else (tables invoices)" in refused(server.url("foreign_one"))
    with pytest.raises(
        UsageError, match=r"needs pg8000, which is not installed; pip install 'mainrun\[postgres\]'"
    ):
        StudyDatabase(made(storage="postgresql+pg8000://study:p4@127.0.0.1/x"), tmp_path, lambda text: None)


@pytest.mark.slow
def test_real_trials_on_a_server_that_is_stopped_and_started(
    server: Server, database: str, tmp_path: Path
) -> None:
    """By the study file as by --storage; and the password is nowhere in what a study leaves or says."""
    few: dict[str, Any] = {
        "budget": {"trials": 3},
        "evidence": {"noise_seeds": 2, "seeds": 2, "best": 1},
        "rungs": {"at": [0.4], "keep": 0.9},
    }
    url, out = server.url(database), tmp_path / "out"
    line = command(write(tmp_path, **few, storage=url), out, 2)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (rows := _rows(server, database)) and process.poll() is None:
        time.sleep(0.1)
    server.stop()
    time.sleep(2)  # trials end meanwhile, and wait to be written
    server.start()
    said, _ = process.communicate()
    assert process.returncode == 0 and rows < 3, said
    trials = json.loads((out / "tiny" / "export.json").read_text())["trials"]
    assert [row[0] for row in kept(url)] == [0, 1, 2]
    assert [t["value"] for t in trials if t["state"] == "done"] == [
        row[2] for row in kept(url) if row[1] == "COMPLETE"
    ]
    # by --storage: its own file says none, and nothing is written twice
    last = subprocess.run(
        [*command(write(tmp_path, **few), out, 2), "--storage", url, "--json"], capture_output=True, text=True
    )
    assert last.returncode == 0 and len(kept(url)) == 3, last.stderr
    everything = said + last.stdout + last.stderr
    for path in out.rglob("*"):
        everything += path.read_bytes().decode("latin-1") if path.is_file() else ""
    assert (
        "p4%3As%25s" not in everything
        and PASSWORD not in everything
        and f"study@127.0.0.1:{server.port}" in everything
    )
    _looked_at(out, url)


def _rows(server: Server, database: str) -> int:
    there = server.sql("select to_regclass('trials')", database)
    return int(server.sql("select count(*) from trials", database)[0][0]) if there[0][0] else 0


def _looked_at(out: Path, url: str) -> None:
    """The dashboard answers, with the study in it."""
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
