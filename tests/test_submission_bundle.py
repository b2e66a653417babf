"""Tests the limits of a bundle: names, sizes, entries and the manifest.

The tests also check that values similar to the refused values are allowed.
"""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_bundle import GOOD, add_manifest, entry, lying_bomb, zipped

from mainrun.errors import MainrunError, UsageError
from reports.submission import bundle
from reports.submission.bundle import (
    MANIFEST,
    BundleError,
    collisions,
    differences,
    escape,
    format_size,
    name_problem,
    pack,
    read,
    read_manifest,
    sha256,
)

# -- names

GOOD_NAMES = [
    "a", "a/b/c.py", "a b.py", "-rf", ".env", "ünï/код.py", "a~b", "a'b", "CON1", "console.py", "com.py",
    "lpt", "com10", "auxiliary", "nulls.txt", "a..b", "..a", "x/..a/b", "prn_", "MANIFEST.json",
    "n" * 200, "ü" * 100, "#$%&()+,;=@[]^`{}!",
]  # fmt: skip
BAD_NAMES = {
    "": "empty", "n" * 201: "longer than 200 bytes", "ü" * 101: "longer than 200 bytes",
    **dict.fromkeys(("a\nb", "a\x7f", "a\u200bb", "\u202ea", "a\udcffb", "a\0b"), "cannot be printed"),
    "e\u0301": "composed", "/a": "absolute", "a//b": "part ''", "a/": "part ''", "./a": "part '.'",
    "a/.": "part '.'", "a/../b": "part '..'",
    "..": "part '..'", " a": "space", "a ": "space", "x/ a/b": "space",
    "a.": "full stop", "x/a./b": "full stop", "a...": "full stop",
    **{f"a{sign}b": f"it contains {sign}" for sign in '\\:*?"<>|'}, "a?b*c": "it contains *",
    **dict.fromkeys(("con", "PRN", "aux.py", "x/nul.tar.gz", "conin$", "CONOUT$"), "the name of a device"),
    **dict.fromkeys(("com0", "com9.txt", "lpt1", "LPT³", "com¹", "lpt²"), "the name of a device"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_an_allowed_name(name: str) -> None:
    assert name_problem(name) == ""


@pytest.mark.parametrize(
    ("name", "problem"), list(BAD_NAMES.items()), ids=[repr(name[:12]) for name in BAD_NAMES]
)
def test_a_refused_name(name: str, problem: str) -> None:
    assert problem in name_problem(name)


@pytest.mark.parametrize("number", range(10))
def test_every_numbered_device(number: int) -> None:
    assert all("device" in name_problem(f"{kind}{number}") for kind in ("com", "LPT"))


@pytest.mark.parametrize(
    ("names", "problems"),
    [
        (["a", "b", "a/b2"[:1] + "c"], []),
        (["a", "A"], ["a and A are the same name"]),
        (["x/ß", "x/SS"], ["x/ß and x/SS are the same name"]),
        (["\ufb01", "fi"], ["\ufb01 and fi are the same name"]),
        (["a", "a"], ["a and a are the same name"]),
        (["a", "a/b"], ["a is both a file and the folder of a/b"]),
        (["a/b/c", "A"], ["A is both a file and the folder of a/b/c"]),
        (["a/b", "ab", "a/bc", "b"], []),
        (["a", "A", "a/b"], ["a and A are the same name", "A is both a file and the folder of a/b"]),
    ],
)
def test_names_that_collide_on_some_system(names: list[str], problems: list[str]) -> None:
    assert collisions(names) == problems


def test_an_escaped_name_cannot_move_the_cursor() -> None:
    assert (
        escape("ü b") == "ü b" and escape("a\x1b[2J\nb") == "a\\x1b[2J\\nb" and escape("\udcff").isprintable()
    )
    assert escape("n" * 300) == "n" * 300 and escape("n" * 301) == "n" * 280 + "..."


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0.0 kB"),
        (1500, "1.5 kB"),
        (999_999, "1000.0 kB"),
        (1e6, "1.0 MB"),
        (50_000_000, "50.0 MB"),
        (1_250_000, "1.2 MB"),
        (1e12, "1000000.0 MB"),
    ],
)
def test_format_size(n: float, text: str) -> None:
    assert format_size(n) == text


def test_the_limits() -> None:
    assert bundle.FORMAT == 1
    assert bundle.MAX_ZIP_BYTES == 50_000_000
    assert bundle.MAX_UNPACKED_BYTES == 200_000_000
    assert bundle.MAX_FILES == 10_000
    assert bundle.MAX_NAME_BYTES == 200
    assert bundle.MAX_CHECKPOINT_BYTES == 20_000_000


# -- packing


def test_the_entries_that_pack_writes() -> None:
    data = pack({"b": b"x" * 100, "a": b"2", "c": b""}, ["b"])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    assert {e.filename: e.external_attr >> 16 for e in entries} == {
        "a": 0o100644,
        "b": 0o100755,
        "c": 0o100644,
    }
    assert [e.filename for e in entries] == ["a", "b", "c"]
    assert {e.date_time for e in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {e.create_system for e in entries} == {3}
    assert {e.compress_type for e in entries} == {zipfile.ZIP_DEFLATED}
    assert entries[1].compress_size < 20


def test_pack_compresses_as_far_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[Any] = []
    monkeypatch.setattr(
        zipfile.ZipFile, "writestr", lambda self, info, data, compresslevel=None: levels.append(compresslevel)
    )
    pack({"a": b"1"})
    assert levels == [9]


# -- reading


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        read(path)
    return str(caught.value)


def test_the_limit_of_the_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped())
    zip_bytes = path.stat().st_size
    monkeypatch.setattr(bundle, "MAX_ZIP_BYTES", zip_bytes)
    read(path)
    monkeypatch.setattr(bundle, "MAX_ZIP_BYTES", zip_bytes - 1)
    expected = (
        f"the zip file has a size of {format_size(zip_bytes)}, "
        f"but a bundle may have at most {format_size(zip_bytes - 1)}"
    )
    assert f"{path} is refused: {expected}" in refusal(path)


def test_the_limit_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped())
    files = add_manifest(GOOD)
    monkeypatch.setattr(bundle, "MAX_FILES", len(files))
    assert read(path) == files
    monkeypatch.setattr(bundle, "MAX_FILES", len(files) - 1)
    assert f"contains {len(files)} files, but a bundle may contain at most {len(files) - 1}" in refusal(path)


def test_the_limit_of_the_unpacked_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped())
    files = add_manifest(GOOD)
    unpacked = sum(map(len, files.values()))
    monkeypatch.setattr(bundle, "MAX_UNPACKED_BYTES", unpacked)
    assert read(path) == files
    monkeypatch.setattr(bundle, "MAX_UNPACKED_BYTES", unpacked - 1)
    assert f"the unpacked files have a size of {format_size(unpacked)}" in refusal(path)


def changed(
    name: str = "code/x", data: bytes = b"x", kind: int = zipfile.ZIP_DEFLATED, **fields: Any
) -> bytes:
    info = entry(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return zipped((info, data), kind=kind)


def with_mode(mode: int) -> Callable[[], bytes]:
    return lambda: changed(external_attr=mode << 16)


ENTRIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain": (changed, ""),
    "stored": (lambda: changed(kind=zipfile.ZIP_STORED), ""),
    "executable": (with_mode(stat.S_IFREG | 0o755), ""),
    "unreadable": (with_mode(stat.S_IFREG), ""),
    "a run's file": (lambda: changed("run/x"), ""),
    "not ASCII": (lambda: changed("code/ü"), ""),
    "writable by the group": (with_mode(stat.S_IFREG | 0o664), "mode 100664"),
    "writable by all": (with_mode(stat.S_IFREG | 0o646), "mode 100646"),
    "setuid": (with_mode(stat.S_IFREG | 0o4644), "mode 104644"),
    "setgid": (with_mode(stat.S_IFREG | 0o2644), "mode 102644"),
    "sticky": (with_mode(stat.S_IFREG | 0o1644), "mode 101644"),
    "a pipe": (with_mode(stat.S_IFIFO | 0o644), "not a plain file"),
    "a socket": (with_mode(stat.S_IFSOCK | 0o644), "not a plain file"),
    "a link": (with_mode(stat.S_IFLNK | 0o644), "is a link"),
    "no file type": (with_mode(0o644), "does not use"),
    "bzip2": (lambda: changed(kind=zipfile.ZIP_BZIP2), "does not use"),
    "a comment": (lambda: changed(comment=b"x"), "does not use"),
    "an extra field": (lambda: changed(extra=b"\x75\x70\x00\x00"), "does not use"),
    "next to the code": (lambda: changed("x"), "does not belong in a bundle"),
    "a second manifest": (lambda: changed("manifest.json"), "does not belong in a bundle"),
    "another folder": (lambda: changed("codes/x"), "does not belong in a bundle"),
    "a file named code": (lambda: changed("code"), "does not belong in a bundle"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry(tmp_path: Path, name: str) -> None:
    make_zip, problem = ENTRIES[name]
    path = tmp_path / "x.zip"
    path.write_bytes(make_zip())
    if problem:
        assert problem in refusal(path)
    else:
        assert read(path).keys() - add_manifest(GOOD).keys()


def test_a_name_that_is_not_ascii_needs_the_utf8_flag(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    name = "code/ü".encode()
    data = bytearray(changed("code/ü"))
    local_flags = data.index(name) - 30 + 6
    directory_flags = data.rindex(name) - 46 + 8
    for offset in (local_flags, directory_flags):
        data[offset + 1] &= ~0x08
    path.write_bytes(data)
    assert "an encoding other than UTF-8" in refusal(path)


@pytest.mark.parametrize("bit", [0x1, 0x2, 0x4, 0x8, 0x10, 0x40, 0x1000])
def test_a_flag_that_pack_never_sets(bit: int) -> None:
    info = entry("code/x")
    info.flag_bits = bit
    with pytest.raises(BundleError, match="encrypted, or is packed"):
        bundle._check_entry(info)
    info.flag_bits = 0x800
    bundle._check_entry(info)


@pytest.mark.parametrize("length", [0, 1, 10])
def test_the_length_of_an_entry(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(changed(data=b"y" * length))
    assert read(path)["code/x"] == b"y" * length


def test_a_file_longer_than_its_stated_size(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(lying_bomb())
    assert "not an intact zip" in refusal(tmp_path / "x.zip")


def test_the_order_of_the_directory_is_free(tmp_path: Path) -> None:
    """The central directory of a zip may list its files in any order."""
    path = tmp_path / "x.zip"
    buffer = io.BytesIO(pack(add_manifest(GOOD)))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.filelist.reverse()
        archive._didModify = True
    path.write_bytes(buffer.getvalue())
    assert read(path) == add_manifest(GOOD)


def hide(archive: zipfile.ZipFile) -> None:
    """Write bytes into a zip file that belong to none of the archived files."""
    archive.fp.write(b"evil")
    archive.start_dir = archive.fp.tell()


def test_bytes_hidden_between_the_files(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry("code/a"), b"1")
        hide(archive)
        archive.writestr(entry("code/b"), b"1")
    assert "code/b overlaps another file, or has hidden bytes before it" in refusal(path)


def test_bytes_hidden_before_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry("code/a"), b"1")
        hide(archive)
    assert "hidden bytes before, inside or after its central directory" in refusal(path)


@pytest.mark.parametrize(
    "error",
    [
        zipfile.BadZipFile,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OverflowError,
        zlib.error,
    ],
)
def test_every_error_of_zipfile_is_a_bundle_error(
    tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error("so")

    path = tmp_path / "x.zip"
    path.write_bytes(zipped())
    monkeypatch.setattr(bundle, "_content", fail)
    assert f"{path} is not an intact zip file (so)" in refusal(path)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path) -> bytes:
        raise OSError(5, os.strerror(5))

    path = tmp_path / "x.zip"
    path.write_bytes(zipped())
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UsageError, match=f"cannot read .*x.zip: {os.strerror(5)}"):
        read(path)


def test_a_path_that_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("none.zip", "no file "), (".", "no file "), ("pipe", "named pipe")):
        with pytest.raises(UsageError) as caught:
            read(tmp_path / name)
        message = str(caught.value)
        assert problem in message and str(tmp_path / name) in message and "mainrun submit" in message


def test_a_name_with_a_zero_byte() -> None:
    info = entry("code/x")
    info.orig_filename = "code/x\0evil"
    with pytest.raises(BundleError, match="zero byte"):
        bundle._check_entry(info)


@pytest.mark.parametrize("name", ["x", "code/../x"])
def test_a_refusal_names_one_fix(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.zip").write_bytes(changed(name))
    message = refusal(tmp_path / "x.zip")
    assert message.endswith("; get a new copy from its author") and message.count(";") == 1


# -- writing


def test_write_into_an_empty_folder(tmp_path: Path) -> None:
    bundle.write({"a/b/c": b"1", "d": b"", "a/e": b"2"}, tmp_path / "new")
    written = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    assert {str(name): path.read_bytes() for name, path in written.items()} == {
        "new/a/b/c": b"1",
        "new/d": b"",
        "new/a/e": b"2",
    }
    with pytest.raises(MainrunError, match="cannot write"):
        bundle.write({"d": b"evil"}, tmp_path / "new")
    assert (tmp_path / "new" / "d").read_bytes() == b""


# -- the manifest


def manifest_error(data: Any) -> str:
    files = {MANIFEST: data if isinstance(data, bytes) else json.dumps(data).encode()}
    with pytest.raises(BundleError) as caught:
        read_manifest(files)
    return str(caught.value)


MINIMAL: dict[str, Any] = {"format": 1, "figures": {}, "files": {"a": {"sha256": "0"}}}


def test_a_manifest() -> None:
    assert read_manifest({MANIFEST: json.dumps(MINIMAL).encode()}) == MINIMAL
    assert read_manifest({MANIFEST: json.dumps(MINIMAL | {"files": {}, "more": 1}).encode()})["more"] == 1
    with pytest.raises(BundleError, match=f"no {MANIFEST}"):
        read_manifest(GOOD)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff", b"[]", b"3", b"null", b"[" * 100_000,
        b'{"format": 1, "format": 1, "files": {}, "figures": {}}',
        b'{"format": 1, "files": {"a": {"sha256": "0", "sha256": "1"}}, "figures": {}}',
        *({k: v for k, v in MINIMAL.items() if k != missing} for missing in MINIMAL),
        MINIMAL | {"figures": []}, MINIMAL | {"figures": None}, MINIMAL | {"files": []},
        MINIMAL | {"files": None}, MINIMAL | {"files": {"a": {}}},
        MINIMAL | {"files": {"a": {"sha256": 3}}}, MINIMAL | {"files": {"a": None}},
        MINIMAL | {"files": {"b": {"sha256": ""}, "a": {"sha256": None}}},
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_read(data: Any) -> None:
    assert f"the {MANIFEST} of the bundle cannot be read" in manifest_error(data)


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_a_manifest_of_another_format(number: Any) -> None:
    message = manifest_error(MINIMAL | {"format": number})
    assert f"format {number}, but this version of mainrun reads format 1" in message


# -- differences


def test_differences_from_the_manifest() -> None:
    files = {"b": b"1", "a": b"2", "c": b"3", MANIFEST: b""}
    listed = {name: {"sha256": sha256(data)} for name, data in files.items() if name != MANIFEST}
    assert differences(files, listed) == []
    assert differences(files | {"y": b"", "x": b""}, listed) == [
        "x is in the bundle, but not in its manifest",
        "y is in the bundle, but not in its manifest",
    ]
    assert differences({"a": b"2"}, listed) == [
        "b is in the manifest, but not in the bundle",
        "c is in the manifest, but not in the bundle",
    ]
    evil = sha256(b"evil")[:12]
    for name in "abc":
        good = sha256(files[name])[:12]
        assert differences(files | {name: b"evil"}, listed) == [
            f"{name} was changed: its sha256 is {evil}, the manifest says {good}"
        ]
    assert differences(files, listed | {"n\n": {"sha256": ""}}) == [
        "n\\n is in the manifest, but not in the bundle"
    ]
    assert len(sha256(b"")) == 64 and sha256(b"").startswith("e3b0c44298fc")
