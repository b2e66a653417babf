"""Tests the files of a store: syncing, links, missing files, and the calls to fsspec."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mainrun.errors import ConfigError
from mainrun.store import files as module
from mainrun.store.files import Entry, Folder, Remote, folder_of, open_files

# -- a folder on disk


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "store")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the size of each file and the name of each folder that is synced, in order."""
    seen: list[Any] = []

    def fsync(fd: int) -> None:
        status = os.fstat(fd)
        seen.append(
            Path(os.readlink(f"/proc/self/fd/{fd}")).name if stat.S_ISDIR(status.st_mode) else status.st_size
        )

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def put(folder: Folder, data: bytes, name: str) -> None:
    with folder.new() as path:
        path.write_bytes(data)
        folder.put(path, name)


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        (lambda folder: folder.write("a/one", b"12345"), [5, "a"]),
        (lambda folder: folder.write("a/one", b"12345", sync=True), [5, "a"]),
        (lambda folder: folder.write("a/one", b"12345", sync=False), []),
        (lambda folder: folder.create("a/one", b"12345"), [5, "a"]),
        (lambda folder: put(folder, b"12345", "a/one"), [5, "a"]),
    ],
    ids=["write", "write with sync", "write without sync", "create", "put"],
)
def test_a_file_and_its_folder_are_synced_unless_the_caller_says_otherwise(
    folder: Folder, synced: list[Any], verb: Callable[[Folder], Any], expected: list[Any]
) -> None:
    verb(folder)
    assert synced == expected
    assert folder.read("a/one") == b"12345" and folder.names("new") == set()


def test_an_existing_file_is_not_synced_again(folder: Folder, synced: list[Any]) -> None:
    folder.write("a/one", b"1")
    del synced[:]
    assert folder.create("a/one", b"234") is False
    assert synced == [3] and folder.read("a/one") == b"1"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_a_file_is_created_on_a_file_system_without_links(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(*_: Any) -> None:
        raise OSError(code, "no link")

    monkeypatch.setattr(os, "link", link)
    assert folder.create("a/one", b"first") is True
    assert folder.create("a/one", b"second") is False
    assert folder.read("a/one") == b"first" and folder.names("new") == set()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_any_other_error_of_a_link_is_raised(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(*_: Any) -> None:
        raise OSError(code, "no link")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="no link") as e:
        folder.create("a/one", b"first")
    assert e.value.errno == code and not folder.exists("a/one") and folder.names("new") == set()


@pytest.mark.parametrize(
    ("mode", "expected"), [(0o755, 0o644), (0o750, 0o640), (0o777, 0o666), (0o700, 0o600)]
)
def test_a_file_that_is_put_gets_the_permissions_of_its_folder(
    folder: Folder, mode: int, expected: int
) -> None:
    put(folder, b"1", "a/b/one")
    (folder.path / "a/b").chmod(mode)
    with folder.new() as path:
        path.write_bytes(b"2")
        path.chmod(0o400)
        folder.put(path, "a/b/one")
        assert not path.exists()
    assert stat.S_IMODE((folder.path / "a/b/one").stat().st_mode) == expected
    assert folder.read("a/b/one") == b"2"


def test_a_temporary_path_is_unique_and_removed_afterwards(folder: Folder) -> None:
    with folder.new() as path, folder.new() as other:
        assert path.parent == folder.path / "new" and path != other
        assert re.fullmatch(rf"{os.getpid()}-[0-9a-f]{{16}}", path.name)
        path.touch()
    assert folder.names("new") == set()
    kept = contextlib.ExitStack()
    kept.enter_context(folder.new()).touch()
    assert len(folder.names("new")) == 1
    with pytest.raises(RuntimeError), kept:
        raise RuntimeError
    assert folder.names("new") == set()


def test_a_listing_follows_links_and_skips_broken_ones(folder: Folder) -> None:
    folder.write("a/file", b"12345")
    os.utime(folder.path / "a/file", (1, 1000.5))
    (folder.path / "a/link").symlink_to("file")
    (folder.path / "a/loop").symlink_to("loop")
    for i in range(20):
        folder.write(f"a/file {i}", b"1")
        (folder.path / f"a/lost {i}").symlink_to("nowhere")
    found = folder.list("a")
    assert found["file"] == found["link"] == Entry(5, 1000.5)
    assert found["loop"].size == len("loop") and found["loop"].modified > 1e9
    assert found.keys() == {"file", "link", "loop", *(f"file {i}" for i in range(20))}
    assert len(folder.names("a")) == 43


def test_a_missing_folder_is_empty(folder: Folder) -> None:
    assert folder.list("a") == {} and folder.names("a") == set() and not folder.exists("a")
    folder.write("a", b"")
    assert folder.exists("a")
    for verb in (folder.list, folder.names):
        with pytest.raises(NotADirectoryError):
            verb("a")


def test_a_folder_is_removed_with_its_content_and_a_link_without_its_target(
    folder: Folder, tmp_path: Path
) -> None:
    folder.write("a/b/one", b"1")
    folder.write("file", b"1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/kept").touch()
    (folder.path / "link").symlink_to(tmp_path / "other")
    for name in ("a", "file", "link", "never was"):
        folder.remove(name)
    assert not folder.exists("a") and not folder.exists("file") and not (folder.path / "link").is_symlink()
    assert (tmp_path / "other/kept").exists()


def test_a_folder_that_another_process_removes_is_not_an_error(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("a/one", b"1")

    def rmdir(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(os, "rmdir", rmdir)
    folder.remove("a")


def test_touch_sets_the_time_to_now_and_local_is_the_file_itself(folder: Folder) -> None:
    folder.write("a/one", b"first\nsecond\n")
    os.utime(folder.path / "a/one", (1, 1))
    folder.touch("a/one")
    assert abs(folder.list("a")["one"].modified - time.time()) < 60
    with folder.local("a/one") as path:
        assert path == folder.path / "a/one"
    assert folder.first_line("a/one") == b"first\n" and str(folder) == str(folder.path)


def test_a_pipe_is_refused_at_once(folder: Folder) -> None:
    folder.write("a", b"")
    os.mkfifo(folder.path / "pipe")
    for verb in (folder.read, folder.first_line):
        with pytest.raises(OSError, match="pipe"):
            verb("pipe")


# -- files at a URL


class Place:
    """A fake file system that records its calls and returns results from a table."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((verb, *args, *([kwargs] if kwargs else [])))
            answer = self.answers.get(verb)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


def remote(root: str = "root", **answers: Any) -> tuple[Remote, Place]:
    files, place = Remote("memory://root"), Place(**answers)
    files.root, files.fs = root, module._OSErrors(place)
    return files, place


MAKES = ("makedirs", "root/a", {"exist_ok": True})
FORGETS = ("invalidate_cache",)


@pytest.mark.parametrize(
    ("verb", "calls"),
    [
        (lambda files: files.read("a/one"), [("cat_file", "root/a/one")]),
        (lambda files: files.write("a/one", b"1"), [MAKES, ("pipe_file", "root/a/one", b"1")]),
        (
            lambda files: files.create("a/one", b"1"),
            [MAKES, ("pipe_file", "root/a/one", b"1", {"mode": "create"})],
        ),
        (lambda files: files.put(Path("x"), "a/one"), [MAKES, ("put_file", "x", "root/a/one")]),
        (lambda files: files.exists("a/one"), [FORGETS, ("exists", "root/a/one")]),
        (lambda files: files.list("a"), [FORGETS, ("ls", "root/a", {"detail": True})]),
        (lambda files: files.names("a"), [FORGETS, ("ls", "root/a", {"detail": True})]),
        (lambda files: files.touch("a/one"), [MAKES, ("pipe_file", "root/a/one.used", b"")]),
        (
            lambda files: files.remove("a/one"),
            [
                FORGETS,
                ("rm", "root/a/one", {"recursive": True}),
                FORGETS,
                ("rm", "root/a/one.used", {"recursive": True}),
            ],
        ),
    ],
    ids=["read", "write", "create", "put", "exists", "list", "names", "touch", "remove"],
)
@pytest.mark.parametrize("root", ["root", "root/"])
def test_each_method_calls_fsspec(
    root: str, verb: Callable[[Remote], Any], calls: list[tuple[Any, ...]]
) -> None:
    files, place = remote(root, ls=[])
    verb(files)
    assert place.calls == calls


def test_a_local_copy_is_downloaded_and_removed(tmp_path: Path) -> None:
    files, place = remote()
    with files.local("a/one") as path:
        assert place.calls == [("get_file", "root/a/one", str(path))]
        assert path.name == "new" and path.parent.name.startswith("mainrun-") and path.parent.is_dir()
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("data", "line"),
    [(b"first\nsecond\n", b"first\n"), (b"first", b"first\n"), (b"", b"\n"), (b"\na", b"\n")],
)
def test_the_first_line_is_cut_from_the_content(data: bytes, line: bytes) -> None:
    assert remote(cat_file=data)[0].first_line("a") == line


@pytest.mark.parametrize(("answer", "created"), [(None, True), (FileExistsError(), False)])
def test_an_object_is_created_unless_it_exists(answer: Any, created: bool) -> None:
    assert remote(pipe_file=answer)[0].create("a", b"1") is created


def test_missing_objects_are_not_errors() -> None:
    files, place = remote(ls=FileNotFoundError(), rm=FileNotFoundError())
    assert files.list("a") == {} and files.names("a") == set()
    files.remove("a")
    assert [call[1] for call in place.calls if call[0] == "rm"] == ["root/a", "root/a.used"]


def row(name: str, modified: float, size: int | None = 5) -> dict[str, Any]:
    return {"name": f"root/a/{name}", "size": size, "mtime": modified}


@pytest.mark.parametrize(
    ("rows", "entries"),
    [
        ([row("one", 10.0)], {"one": Entry(5, 10.0)}),
        ([row("one", 10.0, size=None)], {"one": Entry(0, 10.0)}),
        ([{"name": "one", "mtime": 10.0}], {"one": Entry(0, 10.0)}),
        (
            [row("one", 10.0), row("one.used", 20.0, 0), row("two", 5.0)],
            {"one": Entry(5, 20.0), "two": Entry(5, 5.0)},
        ),
        ([row("one.used", 5.0, 0), row("one", 10.0)], {"one": Entry(5, 10.0)}),
        ([row("lost.used", 5.0)], {}),
    ],
    ids=["one", "no size", "no size at all", "used later", "used before", "a mark alone"],
)
def test_a_file_next_to_an_object_records_its_last_use(
    rows: list[dict[str, Any]], entries: dict[str, Entry]
) -> None:
    files, _ = remote(ls=rows)
    assert files.list("a") == entries and files.names("a") == entries.keys()


MOMENT = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.mark.parametrize("word", ["mtime", "LastModified", "last_modified", "updated", "created"])
@pytest.mark.parametrize(("value", "seconds"), [(5, 5.0), (0.0, 0.0), (MOMENT, MOMENT.timestamp())])
def test_each_file_system_has_its_own_key_for_the_time(word: str, value: Any, seconds: float) -> None:
    assert module._modified({word: value, "ctime": 1.0}) == seconds
    assert module._modified({"mtime": None, word: value}) == seconds


def test_an_object_without_a_time_counts_as_new() -> None:
    assert abs(module._modified({"ctime": 1.0}) - time.time()) < 60
    assert module._modified({"created": 3.0, "mtime": 1.0, "updated": 2.0}) == 1.0


def test_an_error_of_fsspec_becomes_an_os_error() -> None:
    files, _ = remote(cat_file=RuntimeError("the key is wrong"), exists=PermissionError(errno.EACCES, "no"))
    with pytest.raises(OSError, match="RuntimeError: the key is wrong") as e:
        files.read("a")
    assert e.value.errno == errno.EIO
    with pytest.raises(PermissionError) as denied:
        files.exists("a")
    assert denied.value.errno == errno.EACCES


@pytest.mark.parametrize("error", [ImportError("no library"), ValueError("no such scheme")])
def test_a_url_that_cannot_be_opened_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import fsspec

    def fail(url: str) -> None:
        raise error

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(ConfigError, match=rf"store 's3://a' cannot be opened \({error}\)"):
        Remote("s3://a")


# -- folder or URL


@pytest.mark.parametrize(
    ("place", "folder"),
    [
        ("a/b", "a/b"),
        ("/a", "/a"),
        ("file:a", "a"),
        ("file:/a", "/a"),
        ("file://" + "/a", "/a"),
        ("local://a", "a"),
        ("local:a", "a"),
        ("odd:name", "odd:name"),
        ("file", "file"),
        ("local", "local"),
        ("~/a", f"{Path.home()}/a"),
        ("file:~/a", f"{Path.home()}/a"),
        ("s3://a", None),
        ("memory://a/b", None),
        ("file+zip://a", None),
        (Path("a"), "a"),
    ],
)
def test_a_url_is_opened_by_fsspec_unless_it_names_a_folder(place: str | Path, folder: str | None) -> None:
    assert folder_of(place) == (None if folder is None else Path(folder))


def test_a_place_opens_as_a_folder_or_a_remote() -> None:
    assert isinstance(open_files("file:a"), Folder) and str(open_files("file:a")) == "a"
    assert isinstance(open_files("memory://a"), Remote) and str(open_files("memory://a")) == "memory://a"
