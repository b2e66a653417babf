"""Tests the run directory in detail: syncing, reading, what --fresh removes, and finding a run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import DiskFull, RunError
from mainrun.store import rundir
from mainrun.store.rundir import (
    FIX,
    RowLog,
    RunDir,
    check_files,
    check_regular_file,
    check_same_config,
    check_writable,
    disk_errors,
    find,
    open_run,
)

CONFIG = TrainConfig()
FILES = [
    "config.json",
    "env.json",
    "status.json",
    "metrics.jsonl",
    "growth.jsonl",
    "summary.json",
    "tokenizer.json",
    "token_scores.safetensors",
]


def begin(place: Path, config: TrainConfig = CONFIG, **more: Any) -> RunDir:
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(
        json.dumps({"config": config.model_dump(), "digest": config.digest} | more)
    )
    return RunDir(place)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record the name and size of each file that is synced, with a size of 0 for folders."""
    seen: list[tuple[str, int]] = []

    def fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        seen.append((path.name, 0 if path.is_dir() else os.fstat(fd).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


# -- writing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_reported(code: int) -> None:
    with pytest.raises(DiskFull, match=r"no space left to write a/b \(full\)"), disk_errors(Path("a/b")):
        raise OSError(code, "full")


@pytest.mark.parametrize(
    ("error", "words"), [(OSError(errno.EIO, "broken"), "broken"), (OSError("odd"), "odd")]
)
def test_an_unwritable_path_is_reported(error: OSError, words: str) -> None:
    with pytest.raises(RunError, match=f"cannot write a/b: {words}; .*--out"), disk_errors(Path("a/b")):
        raise error
    with pytest.raises(ValueError), disk_errors(Path("a/b")):
        raise ValueError


def test_a_file_is_synced_before_it_replaces_another(tmp_path: Path, synced: list[tuple[str, int]]) -> None:
    (tmp_path / "a.json").write_text("old")
    rundir.write_json(tmp_path / "a.json", {"ü": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "ü": 1\n}\n'
    assert synced == [(".a.json.tmp", 13), (tmp_path.name, 0)] and names(tmp_path) == {"a.json"}


def test_a_file_that_cannot_be_written_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("old")

    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFull, match=r"a\.json"):
        rundir.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and names(tmp_path) == {"a.json"}


def test_a_log_is_appended_to_marked_and_cut_back(tmp_path: Path, synced: list[tuple[str, int]]) -> None:
    asked: list[int] = []
    log = RowLog(tmp_path / "a.jsonl", lambda: asked.append(1))
    assert log.mark() == {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    log.append({"a": 1})
    mark = log.mark()
    assert synced == [("a.jsonl", 0), ("a.jsonl", 9)]
    assert mark == {"bytes": 9, "sha256": hashlib.sha256(b'{"a": 1}\n').hexdigest()}
    log.append({"b": 2})
    assert len(asked) == 2
    assert (
        not log.rewind(mark | {"sha256": "0"})
        and not log.rewind(mark | {"bytes": 99})
        and not log.rewind(mark | {"bytes": 8})
    )
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"a": 1}\n{"b": 2}\n'
    assert log.rewind(mark) and log.mark() == mark and len(asked) == 6
    log.append({"c": 3})
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"a": 1}\n{"c": 3}\n' and log.mark()["bytes"] == 18
    assert log.mark()["sha256"] == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    log.close()
    assert log._file.closed


def test_a_row_that_is_written_in_pieces_is_complete(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "a.jsonl")
    file = log._file

    class Slow:
        def write(self, data: memoryview) -> int:
            return file.write(data[:2])

    log._file = Slow()  # type: ignore[assignment]
    log.append({"a": 1})
    file.close()
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"a": 1}\n'


def test_a_pipe_in_place_of_a_log_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(RunError, match="it is a named pipe; restore it"):
        RowLog(tmp_path / "a.jsonl")
    with pytest.raises(RunError, match="cannot write"):
        RowLog(tmp_path / "none/a.jsonl")


# -- reading

READERS: list[tuple[str, Callable[[RunDir], Any], Any, Any, str]] = [
    ("summary.json", RunDir.summary, {"run": "a"}, None, '{"run": 5}'),
    ("status.json", RunDir.status, {"state": "done", "step": 3}, {}, '{"step": -1}'),
    ("env.json", RunDir.env, {"versions": {"torch": "2"}}, {}, '{"versions": 5}'),
    ("config.json", RunDir.config_file, {"config": {}, "more": 1}, {}, "{}"),
]


@pytest.mark.parametrize(
    ("name", "read", "value", "nothing", "damaged"), READERS, ids=[row[0] for row in READERS]
)
def test_each_file_is_read_or_reported(
    tmp_path: Path, name: str, read: Callable[[RunDir], Any], value: Any, nothing: Any, damaged: str
) -> None:
    run = RunDir(tmp_path, "fetch it again")
    assert read(run) == nothing
    (tmp_path / name).write_text(json.dumps(value))
    assert read(run) == value
    (tmp_path / name).write_text(damaged)
    with pytest.raises(RunError, match=f"{tmp_path}/{name} is damaged: it .*; fetch it again$"):
        read(run)


def test_a_run_directory_has_its_paths(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.checkpoints == tmp_path / "checkpoints" and run.fix == FIX
    assert (
        begin(tmp_path, plan={"train_tokens": 5}).plan() == {"train_tokens": 5}
        and RunDir(tmp_path / "none").plan() == {}
    )
    run.write("status.json", {"state": "done"})
    assert run.status() == {"state": "done"}
    run.release()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "not a run directory"),
        ("[]", "not a run directory"),
        ('{"config": 5}', "not a run directory"),
        ('{"config": {"lr": 1}}', "was changed after the run began; fetch it again"),
        (
            json.dumps({"config": {"lr": "a"}, "digest": rundir.digest_of({"lr": "a"})}),
            "a config that this version accepts: .*lr.*; fetch it again",
        ),
    ],
)
def test_an_invalid_config_is_reported(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=words):
        RunDir(tmp_path, "fetch it again").config()


STEP = '{"event": "step", "step": 1}\n'
EVENT = '{"event": "grow", "op": "a", "name": "b", "step": 1}\n'


def test_rows_are_read_up_to_the_first_damaged_one(tmp_path: Path) -> None:
    run, log = RunDir(tmp_path, "fetch it again"), tmp_path / "metrics.jsonl"
    assert run.metrics() == run.rows() == run.intact_rows() == run.journal() == []
    log.write_text(STEP * 2 + "{}\n" + STEP)
    assert (
        len(run.intact_rows()) == 2 and run.intact_rows()[0] == json.loads(STEP) and len(run.metrics()) == 4
    )
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged: line 3 .*; fetch it again"):
        run.rows()
    log.unlink()
    log.mkdir()
    for read in (run.rows, run.intact_rows, run.metrics):
        with pytest.raises(
            RunError, match=rf"{tmp_path}/metrics.jsonl is damaged: it is a folder; fetch it again"
        ):
            read()


def test_the_journal_has_events(tmp_path: Path) -> None:
    (tmp_path / "growth.jsonl").write_text(EVENT)
    assert RunDir(tmp_path).journal() == [json.loads(EVENT)]
    (tmp_path / "growth.jsonl").write_text(STEP)
    with pytest.raises(RunError, match=r"growth\.jsonl is damaged: line 1 "):
        RunDir(tmp_path).journal()


def test_a_text_must_exist_and_be_json(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fetch it again")
    with pytest.raises(RunError, match=rf"{tmp_path} has no a.json; fetch it again"):
        run.text("a.json")
    (tmp_path / "a.json").write_text('{"ü": 1}', encoding="utf-8")
    assert run.text("a.json") == '{"ü": 1}'
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RunError, match=rf"{tmp_path}/a.json is damaged: it is not JSON.*; fetch it again"):
        run.text("a.json")


# -- the lock


def test_an_open_run_holds_its_lock_until_it_is_released(tmp_path: Path) -> None:
    run = open_run(tmp_path / "deep/runs", CONFIG)
    assert run.path == tmp_path / "deep/runs" / CONFIG.run_id
    first, second, rest = (run.path / ".lock").read_text().split("\n")
    assert (
        re.fullmatch(rf"{os.getpid()} on .+", first) and re.fullmatch("[0-9a-f]{32}", second) and rest == ""
    )
    with pytest.raises(RunError, match=re.escape(f"being written by process {first};")):
        open_run(tmp_path / "deep/runs", CONFIG)
    run.check()
    run.release()
    run.release()
    again = open_run(tmp_path / "deep/runs", CONFIG)
    assert (again.path / ".lock").read_text() != f"{first}\n{second}\n"
    again.release()


@pytest.mark.parametrize(
    "writes", [lambda run: run.write("a.json", {}), lambda run: run.log("a.jsonl").append({}), RunDir.check]
)
def test_a_process_that_lost_the_lock_writes_nothing_more(
    tmp_path: Path, writes: Callable[[RunDir], Any]
) -> None:
    run = open_run(tmp_path, CONFIG)
    (run.path / ".lock").write_text("7 on another machine\n1234\n")
    with pytest.raises(RunError, match="was taken over by process 7 on another machine; "):
        writes(run)
    (run.path / ".lock").unlink()
    with pytest.raises(RunError, match=r"was removed \(No such file or directory\)"):
        writes(run)
    run.release()
    run.check()


def test_an_error_of_the_lock_without_a_number_is_reported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(tmp_path, CONFIG)

    def read_text(*_: Any, **__: Any) -> str:
        raise OSError("odd")

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(RunError, match=r"was removed \(odd\)"):
        run.check()
    run.release()


def test_a_refused_run_is_released(tmp_path: Path) -> None:
    run = begin(tmp_path / CONFIG.run_id, from_dict({"lr": 0.5}))
    with pytest.raises(RunError, match=r"another config: .*lr=0.5 \(requested: "):
        open_run(tmp_path, CONFIG)
    begin(run.path)
    opened = open_run(tmp_path, CONFIG)
    opened.release()


# -- what --fresh removes


@pytest.mark.parametrize("fresh", [False, True])
def test_fresh_removes_what_a_run_writes_and_nothing_else(tmp_path: Path, fresh: bool) -> None:
    run = begin(tmp_path / CONFIG.run_id)
    ours = {*FILES, *(f".{name}.tmp" for name in FILES), "traceback.txt"}
    for name in ours - {"config.json"} | {"notes.txt", ".hidden"}:
        (run.path / name).write_text("")
    (run.path / "checkpoints/step-00000001").mkdir(parents=True)
    (run.path / "plots").mkdir()
    before = names(run.path) | {".lock"}
    opened = open_run(tmp_path, CONFIG, fresh=fresh)
    assert names(run.path) == ({"notes.txt", ".hidden", "plots", ".lock"} if fresh else before)
    opened.release()


def test_fresh_removes_a_link_and_not_its_target(tmp_path: Path) -> None:
    run = begin(tmp_path / "runs" / CONFIG.run_id)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").touch()
    (run.path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    open_run(tmp_path / "runs", CONFIG, fresh=True).release()
    assert names(run.path) == {".lock"} and names(tmp_path / "elsewhere") == {"kept"}


@pytest.mark.parametrize("begun", [{}, {"config": {}}, {"digest": "a"}, None])
def test_fresh_refuses_a_foreign_folder(tmp_path: Path, begun: Any) -> None:
    run = RunDir(tmp_path / CONFIG.run_id)
    run.path.mkdir()
    for name in "dbca":
        (run.path / name).touch()
    (run.path / "config.json").write_text("{" if begun is None else json.dumps(begun))
    with pytest.raises(RunError, match="contains a, b, c but "):
        open_run(tmp_path, CONFIG, fresh=True)
    assert names(run.path) == {*"abcd", "config.json", ".lock"}


def test_fresh_needs_no_config_without_foreign_files(tmp_path: Path) -> None:
    run = RunDir(tmp_path / CONFIG.run_id)
    run.path.mkdir()
    (run.path / "config.json").write_text("{")
    open_run(tmp_path, CONFIG, fresh=True).release()
    assert names(run.path) == {".lock"}


# -- folders and pipes instead of files


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    run = RunDir(tmp_path, "fetch it again")
    (tmp_path / name).mkdir()
    with pytest.raises(RunError, match=f"{tmp_path}/{name} is damaged: it is a folder; fetch it again$"):
        check_files(run)
    check_files(run, fresh=True)


def test_a_file_in_place_of_the_checkpoints_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "fetch it again")
    check_files(run)
    run.checkpoints.mkdir()
    check_files(run)
    run.checkpoints.rmdir()
    for make in (run.checkpoints.touch, lambda: run.checkpoints.symlink_to("nowhere")):
        make()
        with pytest.raises(
            RunError, match=f"{tmp_path}/checkpoints is damaged: it is not a folder; fetch it again$"
        ):
            check_files(run)
        check_files(run, fresh=True)
        run.checkpoints.unlink()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_lock_that_is_not_a_file_is_refused(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(RunError, match=r"\.lock is damaged: it is a folder; remove it"):
        check_files(RunDir(tmp_path), fresh)


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    check_regular_file(tmp_path / "none")
    (tmp_path / "file").touch()
    check_regular_file(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(RunError, match=f"link is damaged: it does not exist; {FIX}$"):
        check_regular_file(tmp_path / "link")


def test_the_folder_for_runs_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "a/b")
    assert names(tmp_path) == set()
    (tmp_path / "file").touch()
    with pytest.raises(
        RunError, match=f"cannot write {tmp_path}/file/b: {tmp_path}/file is not a folder; .*--out"
    ):
        check_writable(tmp_path / "file/b")
    asked: list[Any] = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(
        RunError, match=f"cannot write {tmp_path}/a: no permission to write in {tmp_path}; .*--out"
    ):
        check_writable(tmp_path / "a")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


@pytest.mark.parametrize(
    ("begun", "refused"), [(None, False), ({"titles": "a"}, False), ({"titles": "b"}, True), ({}, True)]
)
def test_a_run_resumes_only_with_the_same_data(
    tmp_path: Path, begun: dict[str, str] | None, refused: bool
) -> None:
    run = RunDir(tmp_path) if begun is None else begin(tmp_path, **begun)
    if not refused:
        rundir.check_same_data(run, {"titles": "a"})
        return
    with pytest.raises(
        RunError, match=f"the corpus of {tmp_path} has changed: its titles differ from config.json; .*--fresh"
    ):
        rundir.check_same_data(run, {"titles": "a"})


def test_a_folder_without_a_config_must_be_empty(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    check_same_config(RunDir(tmp_path), CONFIG)
    for name in "dbca":
        (tmp_path / name).touch()
    with pytest.raises(RunError, match="contains a, b, c but "):
        check_same_config(RunDir(tmp_path), CONFIG)


# -- finding a run


def runs(out: Path, *ids: str) -> None:
    for one in ids:
        begin(out / one)


@pytest.mark.parametrize(
    ("name", "ids", "answer"),
    [
        ("a-1", ["a-1", "a-12"], "a-1"),
        ("a-12", ["a-1", "a-12"], "a-12"),
        ("b", ["a-1", "b-1"], "b-1"),
    ],
)
def test_a_run_is_found_by_its_id_or_a_beginning_of_it(
    tmp_path: Path, name: str, ids: list[str], answer: str
) -> None:
    runs(tmp_path, *ids)
    assert find(name, tmp_path).path == tmp_path / answer
    assert find(tmp_path / answer, tmp_path / "none").path == tmp_path / answer


@pytest.mark.parametrize(
    ("name", "ids", "words"),
    [
        ("a", ["a6", "a5", "a4", "a3", "a2", "a1"], "not unique in .*: a1, a2, a3, a4, a5; "),
        ("zz", ["a1", "a2", "a3", "a4"], "runs in .*: a2, a3, a4$"),
        ("base-9", ["base-1", "base-2", "base-3", "base-4"], "runs in .*: base-., base-., base-.$"),
        ("abcxxx", ["abcyyyyy", "q1"], "runs in .*: abcyyyyy$"),
        ("abcxxx", ["abyyyyyy", "q1"], "runs in .*: abyyyyyy, q1$"),
        ("a", [], "contains no runs yet; `mainrun train` creates one"),
    ],
)
def test_an_unknown_name_is_refused_with_similar_ids(
    tmp_path: Path, name: str, ids: list[str], words: str
) -> None:
    runs(tmp_path, *ids)
    with pytest.raises(RunError, match=words):
        find(name, tmp_path)
