"""Test hashing and canonical JSON, which determine the bytes of stored files, and locks between processes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mainrun.files.hashing import canonical_json, compact_json, sha256_file, sha256_json
from mainrun.files.inputs import NotAFile
from mainrun.files.locks import FileLock, Locked, first_line

VALUE = {"b": [1, 2.5, None, True], "a": "ü"}


def test_canonical_json_has_sorted_keys_and_is_ascii() -> None:
    assert canonical_json(VALUE) == rb'{"a": "\u00fc", "b": [1, 2.5, null, true]}'
    assert sha256_json(VALUE) == hashlib.sha256(canonical_json(VALUE)).hexdigest()


def test_compact_json_has_sorted_keys_and_no_spaces() -> None:
    assert compact_json(VALUE) == '{"a":"ü","b":[1,2.5,null,true]}'.encode()


def test_the_hash_of_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1_000_000)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"x" * 1_000_000).hexdigest()


def test_a_pipe_has_no_hash(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAFile):
        sha256_file(tmp_path / "pipe")


def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / ".lock", "7 on a machine\n0123\n")
    with pytest.raises(Locked, match=r"^7 on a machine$"):
        FileLock(tmp_path / ".lock", "8\n")
    assert lock.current_holder() == lock.holder
    lock.release()
    lock.release()
    other = FileLock(tmp_path / ".lock", "8\n")
    assert lock.current_holder() == "8\n" != lock.holder
    other.release()


def test_a_lock_that_cannot_be_written_is_not_held(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        FileLock(tmp_path / ".lock", "\ud800")
    FileLock(tmp_path / ".lock", "8").release()


@pytest.mark.parametrize(("content", "line"), [("", ""), ("7\n", "7"), (" 7 on a \nb\n", "7 on a")])
def test_the_first_line_names_the_holder(content: str, line: str) -> None:
    assert first_line(content) == line
