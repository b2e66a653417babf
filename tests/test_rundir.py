"""Tests the run directory: one writer, one config, atomic JSON files, and finding a run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from mainrun.config import TrainConfig
from mainrun.errors import DiskFull, Interrupted, RunError
from mainrun.files import inputs
from mainrun.store import checkpoint
from mainrun.store.rundir import RowLog, RunDir, disk_errors, find, open_run, write_json, write_text


def made(out: Path, cfg: TrainConfig) -> RunDir:
    run = open_run(out, cfg)
    run.write("config.json", {"config": cfg.model_dump(), "digest": cfg.digest, "plan": {"steps": 3}})
    run.release()
    return run


# -- the lock


HOLD = """
import sys
from pathlib import Path
from mainrun.config import from_dict
from mainrun.store.rundir import open_run
run = open_run(Path(sys.argv[1]), from_dict({}))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_the_lock_of_a_dead_one_is_free(tmp_path: Path) -> None:
    cfg = TrainConfig()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        for fresh in (False, True):
            with pytest.raises(
                RunError, match=rf"{cfg.run_id} is being written by process {holder.pid} on .*; .*--out"
            ):
                open_run(tmp_path, cfg, fresh=fresh)
        other = open_run(tmp_path / "elsewhere", cfg)
        other.release()
        os.kill(holder.pid, signal.SIGSTOP)  # a suspended process keeps its lock
        with pytest.raises(RunError, match="being written"):
            open_run(tmp_path, cfg)
    finally:
        holder.kill()
        holder.wait()
        holder.communicate()
    run = open_run(tmp_path, cfg)
    assert (run.path / ".lock").read_text().startswith(f"{os.getpid()} on ")
    with pytest.raises(RunError, match=f"process {os.getpid()}"):
        open_run(tmp_path, cfg)  # even the same process cannot open a run twice
    run.release()
    run.release()
    open_run(tmp_path, cfg).release()


def test_a_writer_whose_lock_was_lost_is_fenced(tmp_path: Path) -> None:
    """A file server may drop the locks of a machine that loses its connection and reconnects later."""
    cfg = TrainConfig()
    made(tmp_path, cfg)
    old = open_run(tmp_path, cfg)
    log = old.log("metrics.jsonl")
    log.append({"step": 1})
    mark = log.mark()
    checkpoint.save(old.checkpoints, 1, {}, {}, old.check)
    assert old._lock is not None
    fcntl.flock(old._lock._file, fcntl.LOCK_UN)
    new = open_run(tmp_path, cfg)
    again = new.log("metrics.jsonl")
    assert again.rewind(mark)
    again.append({"step": 2})
    checkpoint.save(new.checkpoints, 2, {}, {}, new.check)
    before = {path: path.read_bytes() for path in new.path.rglob("*") if path.is_file()}
    for write in (
        lambda: old.write("status.json", {}),
        lambda: log.append({"step": 3}),
        lambda: log.rewind(mark),
        lambda: checkpoint.save(old.checkpoints, 1, {}, {}, old.check),
    ):
        with pytest.raises(
            RunError, match=f"was taken over by process {os.getpid()} on .*has stopped writing files"
        ):
            write()
    assert {path: path.read_bytes() for path in new.path.rglob("*") if path.is_file()} == before
    old.release()
    new.write("status.json", {})
    (new.path / ".lock").unlink()
    with pytest.raises(RunError, match="was removed"):
        new.write("status.json", {})
    new.release()


def test_a_refused_directory_is_not_left_locked(tmp_path: Path) -> None:
    cfg = TrainConfig()
    stray = tmp_path / cfg.run_id / "notes.txt"
    stray.parent.mkdir()
    stray.write_text("mine")
    with pytest.raises(RunError, match=r"notes\.txt"):
        open_run(tmp_path, cfg)
    stray.unlink()
    open_run(tmp_path, cfg).release()


# -- foreign content


def test_a_run_of_another_config_is_refused_with_the_differences(tmp_path: Path) -> None:
    cfg = TrainConfig()
    other = TrainConfig(lr=0.5, n_layer=2)
    run = RunDir(tmp_path / cfg.run_id)
    run.path.mkdir()
    run.write("config.json", {"config": other.model_dump(), "digest": other.digest, "plan": {}})
    with pytest.raises(RunError) as e:
        open_run(tmp_path, cfg)
    text = str(e.value)
    assert (
        "lr=0.5 (requested: 0.006)" in text
        and "n_layer=2 (requested: 6)" in text
        and "--fresh" in text
        and "n_head" not in text
    )
    assert run.config() == other, "nothing lost"
    fresh = open_run(tmp_path, cfg, fresh=True)
    assert [p.name for p in fresh.path.iterdir()] == [".lock"]
    fresh.release()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "config", ["", "{", '{"architectures": ["GPT2"]}', '{"config": {}}', '{"digest": ""}']
)
def test_foreign_files_are_refused_and_kept(tmp_path: Path, config: str, fresh: bool) -> None:
    cfg = TrainConfig()
    path = tmp_path / cfg.run_id
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")
    if config:
        (path / "config.json").write_text(config)
    with pytest.raises(RunError) as refused:
        open_run(tmp_path, cfg, fresh=fresh)
    if fresh or not config:
        assert (
            str(refused.value) == f"{path} contains thesis.txt but no run of mainrun; "
            "move the folder away, or give another --out"
        )
    assert (path / "thesis.txt").read_text() == "years of work"
    assert not config or (path / "config.json").read_text() == config


def test_fresh_removes_only_what_a_run_writes(tmp_path: Path) -> None:
    """The run directory and its checkpoints may be symbolic links."""
    cfg, elsewhere = TrainConfig(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = made(tmp_path, cfg)
    for name in (
        "config.json",
        "env.json",
        "status.json",
        "metrics.jsonl",
        "growth.jsonl",
        "summary.json",
        "tokenizer.json",
        "token_scores.safetensors",
    ):
        if name != "config.json":
            (run.path / name).write_text("{}")
        (run.path / f".{name}.tmp").write_text("")
    (run.path / "traceback.txt").write_text("")
    (elsewhere / "photo.jpg").write_text("")
    (run.path / "checkpoints").symlink_to(elsewhere)
    (run.path / "notes.md").write_text("mine")
    (run.path / "figures").mkdir()
    run.path.rename(tmp_path / "moved")
    run.path.symlink_to(tmp_path / "moved")
    fresh = open_run(tmp_path, cfg, fresh=True)
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == [".lock", "figures", "notes.md"]
    assert [path.name for path in elsewhere.iterdir()] == ["photo.jpg"]
    fresh.release()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_in_place_of_the_run_directory_is_refused(tmp_path: Path, fresh: bool) -> None:
    path = tmp_path / TrainConfig().run_id
    path.write_text("mine")
    with pytest.raises(RunError, match="not a folder"):
        open_run(tmp_path, TrainConfig(), fresh=fresh)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_lock_that_is_not_a_file_is_refused(tmp_path: Path, fresh: bool) -> None:
    run = made(tmp_path, TrainConfig())
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()
    with pytest.raises(RunError, match=r"is damaged: it is a folder; remove it$"):
        open_run(tmp_path, TrainConfig(), fresh=fresh)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": 3}', '{"config": {"lr": "fast"}}', "\x00\x01"])
def test_a_damaged_config_is_a_run_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json|run directory"):
        RunDir(path).config()


def test_fresh_removes_everything(tmp_path: Path) -> None:
    cfg = TrainConfig()
    run = made(tmp_path, cfg)
    run.write("summary.json", {"run": cfg.run_id})
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    kept = open_run(tmp_path, cfg)
    assert kept.summary() == {"run": cfg.run_id} and kept.checkpoints.is_dir()
    kept.release()
    fresh = open_run(tmp_path, cfg, fresh=True)
    assert fresh.summary() is None and [p.name for p in fresh.path.iterdir()] == [".lock"]
    fresh.release()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_output_is_a_run_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match=r"cannot write .*--out"):
        open_run(tmp_path, TrainConfig())


def test_an_output_below_a_file_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*--out"):
        open_run(tmp_path / "file", TrainConfig())


def test_an_empty_run_directory_has_no_values(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert (
        run.summary() is None
        and run.status() == {}
        and run.env() == {}
        and run.metrics() == []
        and run.plan() == {}
    )
    with pytest.raises(RunError, match="not a run directory"):
        run.config()


def test_config_and_plan_come_back(tmp_path: Path) -> None:
    cfg = TrainConfig(preset="mine", lr=0.25, attn_dropout=None)
    run = made(tmp_path, cfg)
    assert run.config() == cfg and run.plan() == {"steps": 3}


# -- finding a run


def test_find_by_path_id_and_unique_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (made(tmp_path, TrainConfig(preset=p, seed=s)) for p, s in (("one", 1), ("one", 2), ("two", 1)))
    assert find(a.path).path == a.path and find(str(a.path), tmp_path / "nowhere").path == a.path
    assert find(b.path.name, tmp_path).path == b.path
    assert find("two", tmp_path).path == c.path and find(a.path.name[:-1], tmp_path).path == a.path
    monkeypatch.chdir(tmp_path.parent)
    assert find(f"{tmp_path.name}/{c.path.name}").path.resolve() == c.path
    with pytest.raises(RunError) as e:
        find("one", tmp_path)
    assert "not unique" in str(e.value) and a.path.name in str(e.value) and b.path.name in str(e.value)


def test_a_complete_id_wins_over_longer_ones(tmp_path: Path) -> None:
    for name in ("demo-12345678", "demo-12345678-copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert find("demo-12345678", tmp_path).path.name == "demo-12345678"


def test_an_unknown_run_is_refused_with_similar_ids(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run 'x' in .*contains no runs yet"):
        find("x", tmp_path)
    run = made(tmp_path, TrainConfig(preset="baseline"))
    with pytest.raises(RunError, match=run.path.name):
        find("basline-0", tmp_path)
    with pytest.raises(RunError, match=run.path.name):
        find("zzz", tmp_path)
    (tmp_path / "not-a-run").mkdir()
    with pytest.raises(RunError, match="no run 'not-a-run'"):
        find("not-a-run", tmp_path)


# -- metrics


def test_a_row_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    assert RunDir(tmp_path).metrics() == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step" 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        RunDir(tmp_path).metrics()


values = st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@given(
    st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), max_size=8),
    st.integers(0, 8),
    st.binary(max_size=12),
)
@settings(max_examples=examples(60))
def test_rewinding_to_a_mark_keeps_exactly_the_rows_before_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], at: int, torn: bytes
) -> None:
    folder = tmp_path_factory.mktemp("metrics")
    metrics = RowLog(folder / "metrics.jsonl")
    mark = metrics.mark()
    for i, row in enumerate(rows):
        metrics.append(row)
        if i + 1 == at:
            mark = metrics.mark()
    marked = (folder / "metrics.jsonl").read_bytes()[: mark["bytes"]]
    metrics.close()
    with (folder / "metrics.jsonl").open("ab") as f:
        f.write(torn)  # a killed process leaves a partial row
    again = RowLog(folder / "metrics.jsonl")
    assert again.rewind(mark) and (folder / "metrics.jsonl").read_bytes() == marked
    assert again.mark() == mark
    again.append({"after": 1})
    assert again.rewind(again.mark())
    assert RunDir(folder).metrics() == [*(rows[:at] if at <= len(rows) else []), {"after": 1}]
    again.close()


def test_a_mark_of_other_rows_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    metrics = RowLog(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1})
    mark = metrics.mark()
    metrics.append({"step": 2})
    metrics.close()
    for text in ('{"step": 9}\n{"step": 2}\n', '{"step"', ""):
        (tmp_path / "metrics.jsonl").write_text(text)
        again = RowLog(tmp_path / "metrics.jsonl")
        assert not again.rewind(mark)
        again.close()
        assert (tmp_path / "metrics.jsonl").read_text() == text


# -- atomic files


def test_readers_never_see_a_partly_written_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"n": 0})
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            value = json.loads(path.read_text())
            seen.add((value["n"], len(value.get("filler", ""))))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for n in range(1, 60):
            write_json(path, {"filler": "x" * 50_000, "n": n})
    finally:
        stop.set()
        reader.join()
    assert seen <= {(0, 0), *((n, 50_000) for n in range(1, 60))}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_temp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if function == "fsync" else (Path, "replace")), fail)
    with pytest.raises(DiskFull, match=r"summary\.json .*free some space and run the same command again"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [*((code, DiskFull) for code in inputs.NO_SPACE), (errno.EACCES, RunError), (errno.EROFS, RunError)],
)
def test_each_disk_error_has_its_class(tmp_path: Path, code: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=str(tmp_path)), disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert issubclass(DiskFull, Interrupted) and DiskFull.exit_code == 75 and RunError.exit_code == 2
    assert {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} == set(inputs.NO_SPACE)


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"title": "Grüße"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "title": "Grüße"\n}\n'


def test_the_run_directory_needs_no_torch() -> None:
    probe = "import sys, mainrun.store.rundir; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
