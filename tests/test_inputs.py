"""Test which paths and which TOML, JSON and YAML documents are accepted, and the messages about others."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mainrun.errors import DiskFull, UsageError
from mainrun.files import inputs
from mainrun.files.inputs import BadInput


def short(value: Any) -> str:
    """Return a short test id for an example value."""
    return inputs.shown(value, 40).replace("::", ":")


# -- values in messages


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        ("a\nb\x1b[31m\x9b", r"'a\nb\x1b[31m\x9b'"),
        ("\u2028", r"'\u2028'"),
        ("\udcff\ud83d", r"'\udcff\ud83d'"),
        ("ü日本", "'ü日本'"),
        ("x" * 300, "'" + "x" * 132 + " [... 102 characters ...] " + "x" * 65 + "'"),
        (10**5000, "a int that cannot be printed"),
    ],
    ids=short,
)
def test_a_value_in_a_message(value: Any, text: str) -> None:
    assert inputs.shown(value) == text


def test_a_short_text_is_not_cut() -> None:
    assert inputs.shortened("x" * 90, 90) == "x" * 90
    assert inputs.shortened("x" * 91, 90) == "x" * 60 + " [... 1 characters ...] " + "x" * 30
    assert inputs.printable("tab\tand\x7f") == r"tab\tand\x7f"


@pytest.mark.parametrize(
    ("count", "last"),
    [
        (0, []),
        (9, ["8"]),
        (10, ["9"]),
        (11, ["9", "and 1 more faults"]),
        (1010, ["9", "and 1,000 more faults"]),
    ],
)
def test_the_first_ten_and_how_many_more(count: int, last: list[str]) -> None:
    texts = list(inputs.first_ten((str(i) for i in range(count)), "faults"))
    assert texts == [str(i) for i in range(min(count, 10))][: len(texts) - len(last)] + last


# -- paths


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a/b", ""),
        ("x" * 255, ""),
        ("ü" * 127, ""),
        ("x/" * 200 + "x", ""),
        ("x/" * 201 + "x", "the path has 201 folders; at most 200"),
        ("", "is empty"),
        (" ", "is empty"),
        ("a\0b", "NUL"),
        ("x" * 256, "a name has 256 bytes; at most 255"),
        ("ü" * 128, "a name has 256 bytes"),
        ("a/" + "x" * 256 + "/b", "a name has 256 bytes"),
        ("x/" * 2048, "the path has 4,096 bytes; at most 4,095"),
        ("loop", "leads back to itself"),
        ("loop/x", "leads back to itself"),
    ],
    ids=short,
)
def test_an_invalid_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    found = inputs.bad_path(text)
    assert why in found and bool(why) == bool(found)
    if not why:
        inputs.check_path(text, "--out")
        return
    with pytest.raises(UsageError, match=r"^got --out "):
        inputs.check_path(text, "--out")


@pytest.mark.parametrize(
    ("name", "make", "why"),
    [
        ("file", Path.touch, ""),
        ("none", lambda path: None, "does not exist"),
        ("folder", Path.mkdir, "is a folder"),
        ("pipe", os.mkfifo, "is a named pipe"),
        ("link", lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (
            "loop",
            lambda path: path.symlink_to(path),
            "cannot be read: it is a symbolic link that leads back to itself",
        ),
        ("x" * 300, lambda path: None, "cannot be read: a name has 300 bytes"),
        ("file/x", lambda path: path.parent.touch(), "cannot be read: a part of the path is a file"),
    ],
    ids=["a file", "nothing", "a folder", "a pipe", "a device", "a loop", "a long name", "below a file"],
)
def test_a_path_that_is_not_a_file(tmp_path: Path, name: str, make: Callable[[Path], Any], why: str) -> None:
    make(tmp_path / name)
    assert inputs.not_a_file(tmp_path / name).startswith(why)
    assert bool(inputs.not_a_file(tmp_path / name)) == bool(why)
    if why:
        with pytest.raises(BadInput, match=r"^(is|does|cannot)"):
            inputs.read_text(tmp_path / name)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENAMETOOLONG, UsageError, "'a' cannot be used: the name is too long"),
        (errno.ELOOP, UsageError, "leads back to itself"),
        (errno.EACCES, UsageError, "permission denied"),
        (errno.ENOTDIR, UsageError, "a part of the path is a file"),
        (errno.EIO, UsageError, "Input/output error; check the path"),
        (errno.ENOSPC, DiskFull, "no space left to write 'a'"),
        (errno.EDQUOT, DiskFull, "run the same command again"),
        (errno.EFBIG, DiskFull, "File too large"),
    ],
    ids=short,
)
def test_an_os_error_becomes_an_error_of_mainrun(number: int, kind: type[Exception], words: str) -> None:
    found = inputs.refusal(OSError(number, os.strerror(number), "a"))
    assert type(found) is kind and words in str(found)


def test_an_error_with_two_paths_names_both() -> None:
    assert "'a' -> 'b' cannot be used" in str(inputs.refusal(OSError(errno.EXDEV, "no", "a", None, "b")))
    assert str(inputs.refusal(OSError(errno.ENOSPC, "no"))).startswith("no space left to write a file")


# -- files


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"a = 1", "a = 1"), ("ü".encode(), "ü"), (b"\xef\xbb\xbfa = 1", "a = 1"), (b"", "")],
)
def test_a_text_with_or_without_a_byte_order_mark(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "a").write_bytes(data)
    assert inputs.read_text(tmp_path / "a") == text


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"caf\xe9", "is not UTF-8 (unexpected end of data at byte 3); save the file as UTF-8"),
        ("a".encode("utf-16"), "is UTF-16, not UTF-8; save the file as UTF-8"),
        (b"\xfe\xff\0a", "is UTF-16, not UTF-8"),
        (b"ab\0", "is binary: a NUL byte at offset 2"),
    ],
    ids=short,
)
def test_a_file_that_is_not_text(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(BadInput) as e:
        inputs.read_text(tmp_path / "a")
    assert str(e.value).startswith(why)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as f:
        f.truncate(inputs.LARGEST + 1)
    with pytest.raises(BadInput, match="has 16,000,001 bytes; at most 16,000,000"):
        inputs.read_text(tmp_path / "a")
    assert len(inputs.read_bytes(tmp_path / "a", inputs.LARGEST + 1)) == inputs.LARGEST + 1


# -- documents

PARSERS: dict[str, Callable[[str], Any]] = {
    "TOML": inputs.parse_toml,
    "JSON": inputs.parse_json,
    "YAML": inputs.parse_yaml,
}


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("TOML", "a = 1\n[b]\nc = [1, 2.5]", {"a": 1, "b": {"c": [1, 2.5]}}),
        ("TOML", f"a = {'9' * 300}", {"a": 10**300 - 1}),
        ("JSON", '{"a": [1, null]}', {"a": [1, None]}),
        ("JSON", "[" * 100 + "]" * 100, ...),
        ("JSON", '"\\ud83d\\ude00"', "😀"),
        ("YAML", "a: 6e-4\nb: [x, 1]", {"a": 6e-4, "b": ["x", 1]}),
        ("YAML", "a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("YAML", "a: {<<: {b: 1, c: 3}, c: 2}", {"a": {"b": 1, "c": 2}}),
    ],
    ids=short,
)
def test_a_valid_document(kind: str, text: str, value: Any) -> None:
    assert value is ... or PARSERS[kind](text) == value
    PARSERS[kind](text)


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("TOML", "a = " + "[" * 3000, "nested too deep"),
        ("TOML", "a = " + "[" * 100 + "]" * 100, "nested too deep"),
        ("TOML", "a." * 3000 + "b = 1", "nested too deep"),
        ("TOML", "a = " + "1" * 5000, "a number has 5,000 digits; at most 300"),
        ("TOML", "a = 0x" + "f" * 400, "a number has more than 300 digits"),
        ("TOML", 'a = "\\u0000"', "a string contains a NUL character"),
        ("TOML", "a = ", "Invalid value"),
        ("TOML", "a = 07:32:00", "07:32:00 is a date or a time; write it in quotes"),
        ("TOML", "a = [{b = 2026-11-28}]", "2026-11-28 is a date or a time; write it in quotes"),
        ("YAML", "a: 2026-11-28T07:32:00", "2026-11-28 07:32:00 is a date or a time; write it in quotes"),
        ("JSON", "[" * 101 + "]" * 101, "nested too deep: at most 100 levels"),
        ("JSON", "[" * 100_000, "nested too deep"),
        ("JSON", "1" * 5000, "a number has 5,000 digits"),
        ("JSON", '{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
        ("JSON", '["\\ud83d"]', "half of a surrogate pair"),
        ("JSON", '{"\\u0000": 1}', "NUL"),
        ("JSON", "{", "Expecting property name"),
        ("YAML", "[" * 3000, "nested too deep"),
        ("YAML", "a: &a [*a]", "nested too deep"),
        ("YAML", "a: 1\na: 2", "the key 'a' appears twice"),
        ("YAML", "? [1]\n: 2", "a list or a table"),
        ("YAML", "a: 2026-99-99", "month must be in 1..12"),
        ("YAML", "a: 0x" + "f" * 400, "more than 300 digits"),
        ("YAML", "a: !!python/object:os.system {}", "could not determine a constructor"),
        ("YAML", "a: [", "did not find expected|expected the node content"),
        ("YAML", " " * 300_001, "at most 300,000 are allowed in YAML"),
    ],
    ids=short,
)
def test_an_invalid_document(kind: str, text: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        PARSERS[kind](text)


def test_aliases_that_repeat_a_list_a_billion_times() -> None:
    lines = [f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)]
    began = time.monotonic()
    with pytest.raises(BadInput, match="more than 1,000,000 values"):
        inputs.parse_yaml("\n".join(["a: &a [x,x,x,x,x,x,x,x,x]", *lines]))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1.5", 1.5),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"x"', "x"),
        ("{ a = 1 }", {"a": 1}),
        ("nan0", "nan0"),
        ("", ""),
        ("fast", "fast"),
        ("file:x.txt#a", "file:x.txt#a"),
        ("1\nb = 2", "1\nb = 2"),
        ("1 # one", 1),
        ("07:32:00", "07:32:00"),
        ("2026-11-28", "2026-11-28"),
    ],
    ids=short,
)
def test_a_value_of_set(text: str, value: Any) -> None:
    assert inputs.toml_value(text) == value


@pytest.mark.parametrize(
    "text",
    ["[" * 3000, "1" * 5000, "0x" + "f" * 5000, "{" + "a." * 200 + "b = 1}", '"\\u0000"', "a\0"],
    ids=short,
)
def test_a_value_of_set_that_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        inputs.toml_value(text)
