"""Test the board over HTTP, and how it follows files that change, are half-written or are damaged."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from evidence import edit, failing, make_run, write_log, write_run
from test_web_page import Tags, data_of
from typer.testing import CliRunner

from mainrun import cli
from mainrun.errors import UsageError
from reports.web import board
from reports.web.live import Log, Watch, database_trials


@contextmanager
def serving(folder: Path, host: str = "") -> Iterator[board.Server]:
    with board.open_server(folder, 0, host) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: board.Server, path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    """Return the status, the headers and the content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in (1, 2):
        write_run(tmp_path / "runs", make_run("baseline", seed, 2.0 + seed))
    return tmp_path / "runs"


# -- over HTTP


def test_the_board_answers_its_page_and_its_version(runs: Path) -> None:
    with serving(runs) as server:
        status, headers, text = ask(server)
        assert status == HTTPStatus.OK and headers["Content-Type"] == "text/html; charset=utf-8"
        assert "connect-src 'self'" in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store" and "Set-Cookie" not in headers
        status, _, answer = ask(server, "/version")
        version = json.loads(answer)["version"]
        assert f'data-version="{version}"' in text and len(data_of(text)["runs"]) == 2
        assert ask(server, "/etc/passwd")[0] == HTTPStatus.NOT_FOUND
        assert ask(server, "/../../etc/passwd")[0] == HTTPStatus.NOT_FOUND
        assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"


FOREIGN = (
    "evil.example", "evil.example:PORT", "127.0.0.1", "127.0.0.1.evil.example:PORT", "192.0.2.5:PORT", "",
    "[", "localhost:PORT@evil.example", "localhost:x",
)  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN)
def test_a_foreign_host_is_refused(runs: Path, host: str) -> None:
    with serving(runs) as server:
        for path in ("/", "/version"):
            status, _, text = ask(server, path, Host=host.replace("PORT", str(server.server_address[1])))
            assert status == HTTPStatus.FORBIDDEN and "baseline" not in text


def test_the_names_of_this_machine_are_accepted(runs: Path) -> None:
    with serving(runs) as server:
        for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
            assert ask(server, "/version", Host=f"{name}:{server.server_address[1]}")[0] == HTTPStatus.OK


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_only_get_and_head_are_answered(runs: Path, method: str) -> None:
    with serving(runs) as server:
        status, headers, text = ask(server, "/", method)
        assert status == HTTPStatus.METHOD_NOT_ALLOWED and headers["Allow"] == "GET, HEAD"
        assert "baseline" not in text


def test_head_has_the_headers_of_get_and_no_content(runs: Path) -> None:
    with serving(runs) as server:
        got = ask(server)
        status, headers, text = ask(server, "/", "HEAD")
        assert status == HTTPStatus.OK and text == ""
        assert headers["Content-Length"] == str(len(got[2].encode()))
        with socket.create_connection(server.server_address[:2], timeout=10) as raw:
            host = f"127.0.0.1:{server.server_address[1]}"
            raw.sendall(f"HEAD / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            received = b"".join(iter(lambda: raw.recv(65536), b""))
        assert received.endswith(b"\r\n\r\n") and b"<html" not in received


def test_other_machines_need_the_token(runs: Path) -> None:
    with serving(runs, "0.0.0.0") as server:
        port = server.server_address[1]
        for cookie in ("", "mainrun_board=x", "mainrun_board=\xe9", "mainrun_board"):
            status, _, text = ask(server, "/", Cookie=cookie)
            assert status == HTTPStatus.UNAUTHORIZED and server.token not in text and "baseline" not in text
        assert ask(server, "/version?token=wrong")[0] == HTTPStatus.UNAUTHORIZED
        status, answer, _ = ask(server, f"/?token={server.token}")
        assert status == HTTPStatus.SEE_OTHER and answer["Location"] == "/"
        assert "HttpOnly; SameSite=Strict" in answer["Set-Cookie"]
        cookie = answer["Set-Cookie"].partition(";")[0]
        status, _, text = ask(server, "/", Cookie=cookie, Host=f"192.0.2.5:{port}")
        assert status == HTTPStatus.OK and server.token not in text
        assert ask(server, "/", Cookie=cookie, Host=f"evil.example:{port}")[0] == HTTPStatus.FORBIDDEN
        assert server.url.endswith(f":{port}/?token={server.token}") and len(server.token) >= 32
    with serving(runs, "127.0.0.1") as other:
        assert other.token not in ("", server.token)


@pytest.mark.parametrize(
    ("folder", "port", "host", "message"),
    [
        ("none", 0, "", "does not exist"),
        ("file", 0, "", "is not a folder"),
        ("runs", 0, "a b", "got --host 'a b'"),
        ("runs", 0, "192.0.2.1", "give another --port, or another --host"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(
    runs: Path, folder: str, port: int, host: str, message: str
) -> None:
    (runs.parent / "file").touch()
    with pytest.raises(UsageError, match=message):
        board.open_server(runs.parent / folder, port, host)


def test_a_used_port_is_named(runs: Path) -> None:
    with serving(runs) as server:
        port = server.server_address[1]
        done = CliRunner().invoke(cli.app, ["board", str(runs), "--port", str(port)])
        assert done.exit_code == 2 and f"port {port} cannot be used" in done.stderr


def test_the_command_serves_until_it_is_interrupted(runs: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mainrun", "board", str(runs), "--port", str(port)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        assert process.stderr.readline() == f"{runs} at http://127.0.0.1:{port}/; press Ctrl-C to stop\n"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/version")
        assert connection.getresponse().status == HTTPStatus.OK
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_page_is_made_again_only_after_a_change(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "PAUSE", 0)
    shown = board.Board(runs)
    first = shown.text()
    assert shown.text() is first
    write_run(runs, make_run("optimized", 1, 1.0))
    assert shown.text() != first and b"optimized" in shown.text()


# -- following files


def begin(folder: Path, **status: Any) -> Path:
    """Write a run that goes on: it has no summary, and this process holds its lock."""
    run = write_run(folder, make_run("demo", 1, steps=4))
    (run / "summary.json").unlink()
    state = {"state": "running", "step": 0, "pid": os.getpid(), "steps": 10} | status
    (run / "status.json").write_text(json.dumps(state))
    (run / ".lock").write_text(f"{state['pid']} on {os.uname().nodename}\n")
    return run


def only_run(watch: Watch) -> Any:
    watch.look()
    (run,) = watch.view().runs
    return run


def test_a_running_run_shows_its_progress(tmp_path: Path) -> None:
    path = begin(tmp_path)
    watch = Watch(tmp_path)
    run = only_run(watch)
    assert (run.state, run.step, run.steps, run.full, run.best) == ("running", 4, 10, 2.0, 2.0)
    assert run.seconds == 2.25 and run.eta == pytest.approx(6 * 2.25 / 4)
    before = watch.look()
    assert watch.look() == before
    row = {**make_run().rows[0], "step": 5, "tokens": 640}
    with (path / "metrics.jsonl").open("ab") as f:
        f.write(json.dumps(row).encode() + b'\n{"event": "st')
    assert watch.look() != before
    run = only_run(watch)
    assert run.step == 5 and run.tokens == 640 and len(run.losses) == 5


def test_a_killed_run_is_shown_as_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    begin(tmp_path, pid=process.pid)
    watch = Watch(tmp_path)
    assert only_run(watch).state == "running"
    before = watch.look()
    process.kill()
    process.wait()
    assert watch.look() != before
    run = only_run(watch)
    assert run.state == "killed" and run.is_bad and run.step == 4


def test_a_log_is_read_once_and_again_if_it_was_cut(tmp_path: Path) -> None:
    rows = make_run().rows
    file = tmp_path / "metrics.jsonl"
    write_log(file, rows)
    log = Log(file)
    log.read()
    assert log.rows == rows
    first = log.rows[0]
    with file.open("ab") as f:
        f.write(b"not JSON\n" + json.dumps(rows[0]).encode() + b"\n")
    log.read()
    assert len(log.rows) == len(rows) + 1 and log.rows[0] is first
    half = json.dumps(rows[0]).encode() + b"\n"
    for part in (half[:30], half[30:]):
        with file.open("ab") as f:
            f.write(part)
        log.read()
    assert len(log.rows) == len(rows) + 2
    write_log(file, rows[:2])
    log.read()
    assert log.rows == rows[:2]
    file.unlink()
    log.read()
    assert log.rows == rows[:2]


@pytest.mark.parametrize("name", ["config.json", "status.json", "summary.json", "env.json"])
@pytest.mark.parametrize("content", [b"", b'{"state": "run', b"[1]", b"\xff\x00", b"[" * 5000])
def test_a_damaged_file_harms_only_its_run(runs: Path, name: str, content: bytes) -> None:
    write_run(runs, make_run("bad", 7))
    (bad,) = runs.glob("bad-*")
    watch = Watch(runs)
    watch.look()
    (bad / name).write_bytes(content)
    watch.look()
    view = watch.view()
    states = {run.id: run.state for run in view.runs}
    assert len(states) == 3 and [states[run] for run in states if run != bad.name] == ["done", "done"]
    Tags(board.page.render(view, "1"))
    if name == "summary.json" and content:
        assert states[bad.name] == "damaged" and view.problems


def test_a_failed_run_says_why(runs: Path) -> None:
    write_run(runs, make_run("guarded", 1, guards=failing()))
    path = begin(runs, state="diverged", why="the loss is nan")
    watch = Watch(runs)
    watch.look()
    notes = {run.id: (run.state, run.note) for run in watch.view().runs}
    assert notes[path.name] == ("diverged", "the loss is nan")
    assert ("failed a guard", "failed causality") in notes.values()


def test_runs_that_come_and_go_are_followed(runs: Path) -> None:
    watch = Watch(runs)
    watch.look()
    assert [run.recipe for run in watch.view().runs] == ["baseline", "baseline"]
    for path in list(runs.glob("baseline-*"))[:1]:
        path.rename(runs / ".away")
    watch.look()
    assert len(watch.view().runs) == 1


def test_runs_with_different_data_have_no_best(runs: Path) -> None:
    path, other = sorted(runs.glob("baseline-*"))
    edit(path / "config.json", lambda config: config.update(fingerprints={"val": "a"}))
    edit(other / "config.json", lambda config: config.update(fingerprints={"val": "b"}))
    watch = Watch(runs)
    watch.look()
    assert "current best" not in board.page.render(watch.view(), "1")
    edit(path / "config.json", lambda config: config.update(fingerprints={"val": "b"}))
    watch.look()
    assert "current best" in board.page.render(watch.view(), "1")


# -- studies


def begin_study(folder: Path, pid: int) -> Path:
    """Write the folder of a study that goes on: two finished trials, and a run that is being trained."""
    import optuna

    study = folder / "studies" / "lr"
    study.mkdir(parents=True)
    space = {"lr": {"low": 1e-3, "high": 1.0, "log": True}, "optimizer": {"values": ["sgd", "adamw"]}}
    document = {
        "digest": "d", "command": "mainrun sweep run lr",
        "study": {"name": "lr", "objective": "dev/full", "budget": {"trials": 4}, "space": space},
    }  # fmt: skip
    (study / "study.json").write_text(json.dumps(document))
    (study / ".lock").write_text(str(pid))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database = optuna.create_study(study_name="lr", storage=f"sqlite:///{study}/study.db")
    for number, (value, state) in enumerate(((1.5, "COMPLETE"), (1.2, "PRUNED"))):
        database.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[state],
                value=value,
                params={"lr": 0.1, "optimizer": "adamw", "n_layer": 2},
                distributions={
                    "lr": optuna.distributions.FloatDistribution(1e-3, 1.0, log=True),
                    "optimizer": optuna.distributions.CategoricalDistribution(["sgd", "adamw"]),
                    "n_layer": optuna.distributions.IntDistribution(1, 4),
                },
                user_attrs={"run": f"gone-{number}", "why": "", "ledger": {"tokens": 100, "seconds": 3.0}},
            )
        )
    begin(study / "runs")
    return study


def test_a_running_study_shows_trials_workers_and_the_time_left(tmp_path: Path) -> None:
    study = begin_study(tmp_path, os.getpid())
    watch = Watch(tmp_path)
    watch.look()
    view = watch.view()
    assert view.runs == []
    (shown,) = view.studies
    assert (shown.state, shown.finished, shown.total, shown.eta) == ("running", 2, 4, 6.0)
    assert shown.best is not None and shown.best["trial"] == 0 and shown.best["value"] == 1.5
    assert shown.trials[0]["params"] == {"lr": 0.1, "optimizer": "adamw", "n_layer": 2}
    assert [trial["state"] for trial in shown.trials] == ["done", "pruned", "running"]
    (worker,) = shown.workers
    assert "step 4 of 10" in worker and "lr=" in worker
    text = board.page.render(view, "1")
    assert "2 of 4 trials" in text and "Workers: 1" in text and "mainrun sweep run lr" in text
    assert len(data_of(text)["studies"][0]["trials"]) == 2
    (study / "study.db").write_bytes(b"not a database")
    watch.look()
    assert "Cannot be read now" in watch.view().studies[0].claim


def test_a_study_whose_driver_was_killed_is_shown_as_stopped(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    study = begin_study(tmp_path, process.pid)
    (run,) = (study / "runs").iterdir()
    edit(run / "status.json", lambda status: status.update(pid=process.pid))
    (run / ".lock").write_text(f"{process.pid} on {os.uname().nodename}\n")
    watch = Watch(tmp_path)
    before = watch.look()
    assert watch.view().studies[0].state == "running"
    process.kill()
    process.wait()
    assert watch.look() != before
    (shown,) = watch.view().studies
    assert shown.state == "stopped" and shown.eta is None and shown.workers == []
    assert shown.finished == 2 and shown.trials[2]["state"] == "killed"


def test_a_finished_study_is_read_from_its_export(tmp_path: Path) -> None:
    import reporting

    reporting.export(tmp_path / "lr" / "export", 12)
    (tmp_path / "lr" / "study.json").write_text("{}")
    (tmp_path / "lr" / "export.json").write_text("{}")
    watch = Watch(tmp_path)
    watch.look()
    (shown,) = watch.view().studies
    assert (shown.state, shown.finished) == ("finished", 12)
    assert shown.claim == "trial 6 is better than the base"


def test_the_database_is_not_changed(tmp_path: Path) -> None:
    study = begin_study(tmp_path, os.getpid())
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    assert len(database_trials(study / "study.db")) == 2
    watch = Watch(tmp_path)
    watch.look()
    watch.view()
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_a_look_at_many_runs_is_quick(tmp_path: Path) -> None:
    for seed in range(60):
        write_run(tmp_path, make_run("baseline", seed))
    watch = Watch(tmp_path)
    watch.look()
    start = time.process_time()
    watch.look()
    assert time.process_time() - start < 0.5
