"""Malicious zip files are refused before any file in them is written or run."""

from __future__ import annotations

import io
import json
import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.errors import UsageError
from reports.submission import bundle
from reports.submission.bundle import (
    MANIFEST,
    BundleError,
    differences,
    name_problem,
    pack,
    read,
    read_manifest,
    sha256,
)

GOOD = {"code/a.py": b"print(1)\n", "code/b/c.py": b"", "run/config.json": b"{}", "report.pdf": b"%PDF"}


def add_manifest(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    """Return the files with a manifest that lists them."""
    listed = {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in files.items()}
    manifest: dict[str, object] = {
        "format": bundle.FORMAT,
        "run": "x",
        "figures": {},
        "files": listed,
        "guards": [],
    }
    return files | {MANIFEST: json.dumps(manifest | changes).encode()}


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a valid bundle with additional entries."""
    buffer = io.BytesIO(pack(add_manifest(GOOD)))
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, data in entries:
            info = name if isinstance(name, zipfile.ZipInfo) else entry(name)
            archive.writestr(info, data, compress_type=kind)
    return buffer.getvalue()


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.create_system = 3
    return info


def named(name: bytes) -> bytes:
    """Return a zip that contains a file name which the zipfile module would not write."""
    placeholder = "code/" + "q" * (len(name) - 5)
    return zipped((placeholder, b"x")).replace(placeholder.encode(), name)


def duplicate() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return zipped(("code/a.py", b"evil"))


def bomb() -> bytes:
    return zipped(("code/zeros", b"\0" * (bundle.MAX_UNPACKED_BYTES + 1)))


def lying_bomb() -> bytes:
    """Return a zip in which a file of a million bytes claims to have 10 bytes."""
    data = zipped(("code/zeros", b"\0" * 1_000_000))
    return data.replace(struct.pack("<I", 1_000_000), struct.pack("<I", 10))


def too_many_files() -> bytes:
    return zipped(*((f"code/{i}", b"") for i in range(bundle.MAX_FILES + 1)))


def overlapping() -> bytes:
    """Return a zip in which two directory entries share the data of one file, as in some zip bombs."""
    data = bytearray(zipped(("code/one", b"x" * 100), ("code/two", b"x" * 100)))
    first = data.rindex(b"code/one") - 46
    second = data.rindex(b"code/two") - 46
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    return bytes(data)


def hidden_before() -> bytes:
    return b"#!/bin/sh\necho evil\n" + zipped()


def hidden_between() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(entry("code/a.py"), b"1")
        archive.fp.write(b"evil" * 10)  # type: ignore[union-attr]
        archive.start_dir = archive.fp.tell()  # type: ignore[union-attr]
        archive.writestr(entry("code/b.py"), b"1")
    return buffer.getvalue()


def hidden_after() -> bytes:
    return zipped() + b"evil"


def commented() -> bytes:
    buffer = io.BytesIO(zipped())
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"evil"
    return buffer.getvalue()


def encrypted() -> bytes:
    data = bytearray(zipped(("code/locked", b"x")))
    local_flags = data.index(b"code/locked") - 30 + 6
    directory_flags = data.rindex(b"code/locked") - 46 + 8
    for offset in (local_flags, directory_flags):
        data[offset] |= 1
    return bytes(data)


def extra_name() -> bytes:
    info = entry("code/extra")
    info.extra = struct.pack("<HH", 0x7075, 4) + b"evil"  # some programs unpack the file under this name
    return zipped((info, b"x"))


def two_names() -> bytes:
    """Return a zip in which a file has different names in the directory and in its own header."""
    data = zipped(("code/shown", b"x"))
    return data.replace(b"code/shown", b"code/other", 1)


def wrong_checksum() -> bytes:
    data = zipped(("code/sum", b"a sentence, stored"), kind=zipfile.ZIP_STORED)
    return data.replace(b"a sentence", b"b sentence")


def deep_manifest() -> bytes:
    return pack(GOOD | {MANIFEST: b"[" * 100_000})


def with_manifest(data: bytes) -> Callable[[], bytes]:
    return lambda: pack(GOOD | {MANIFEST: data})


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "upwards": (lambda: zipped(("code/../../evil", b"x")), r"a part '\.\.'"),
    "absolute": (lambda: named(b"/etc/evil"), "it is absolute"),
    "backslashes": (lambda: named(b"code/..\\..\\evil"), r"it contains \\"),
    "a drive": (lambda: named(b"C:/evil.exe"), "it contains :"),
    "a stream": (lambda: zipped(("code/a.py:evil", b"x")), "it contains :"),
    "a link": (lambda: zipped((entry("code/link", stat.S_IFLNK | 0o777), b"/etc/passwd")), "is a link"),
    "a device": (lambda: zipped((entry("code/dev", stat.S_IFCHR | 0o644), b"")), "not a plain file"),
    "setuid": (lambda: zipped((entry("code/su", stat.S_IFREG | 0o4755), b"x")), "not a plain file"),
    "a folder": (lambda: zipped((entry("code/x/", stat.S_IFDIR | 0o755), b"")), "code/x/ is a folder"),
    "another tool": (lambda: zipped((entry("code/y", 0o600), b"x")), "code/y is packed in a way that"),
    "a bomb": (bomb, "unpacked files have a size of 200.0 MB"),
    "a lying bomb": (lying_bomb, "refused|not an intact zip"),
    "overlapping files": (overlapping, "overlaps another file"),
    "many files": (too_many_files, "at most 10,000"),
    "the same name twice": (duplicate, "are the same name"),
    "the same name in capitals": (lambda: zipped(("code/A.PY", b"x")), "are the same name"),
    "a file that is a folder": (lambda: zipped(("code/a.py/x", b"x")), "is both a file and the folder of"),
    "a zero byte": (lambda: named(b"code/a\0evil.py"), "zero byte"),
    "not UTF-8": (lambda: named(b"code/\x81.py"), "other than UTF-8"),
    "an escape sequence": (lambda: named(b"code/\x1b[2Jx.py"), "cannot be printed"),
    "right to left": (lambda: zipped(("code/\u202egpj.py", b"x")), "cannot be printed"),
    "the name of a device": (lambda: zipped(("code/nul.py", b"x")), "the name of a device"),
    "a long name": (lambda: zipped(("code/" + "n" * 300, b"x")), "longer than"),
    "next to the code": (lambda: zipped(("sitecustomize.py", b"evil")), "does not belong in a bundle"),
    "encrypted": (encrypted, "is encrypted"),
    "another compression": (lambda: zipped(("code/x", b"x"), kind=zipfile.ZIP_LZMA), "does not use"),
    "an extra name": (extra_name, "does not use"),
    "two names": (two_names, "not an intact zip"),
    "a wrong checksum": (wrong_checksum, "not an intact zip"),
    "bytes before the files": (hidden_before, "not an intact zip|hidden"),
    "bytes between the files": (hidden_between, "hidden|overlaps"),
    "bytes after the directory": (hidden_after, "not an intact zip|hidden"),
    "a comment": (commented, "hidden"),
    "cut short": (lambda: zipped()[:-30], "not an intact zip"),
    "not a zip": (lambda: b"hello", "not an intact zip"),
    "empty": (lambda: b"", "not an intact zip"),
    "too large": (lambda: b"\0" * (bundle.MAX_ZIP_BYTES + 1), "at most 50.0 MB"),
    "no manifest": (lambda: pack(GOOD), "no MANIFEST.json"),
    "a manifest that is not JSON": (with_manifest(b"\xff{"), "cannot be read"),
    "figures as a number": (with_manifest(b'{"format": 1, "files": {}, "figures": 3}'), "cannot be read"),
    "a list of files": (with_manifest(b'{"format": 1, "files": [], "figures": {}}'), "cannot be read"),
    "a deep manifest": (deep_manifest, "cannot be read"),
    "a duplicate key": (
        with_manifest(b'{"format": 1, "format": 1, "files": {}, "figures": {}}'), "cannot be read"
    ),
    "another format": (with_manifest(b'{"format": 99, "files": {}, "figures": {}}'), "format 99"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_zip, message = ATTACKS[name]
    path = tmp_path / "x.zip"
    path.write_bytes(make_zip())
    written: list[object] = []
    monkeypatch.setattr(bundle, "write", lambda *args: written.append(args))
    with pytest.raises(UsageError, match=message):
        read_manifest(read(path))
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert result.exit_code == 2 and result.stdout == "" and written == []
    assert result.stderr.startswith(f"error: {path} is ") and "\x1b" not in result.stderr


def test_a_lying_bomb_takes_no_memory(tmp_path: Path) -> None:
    size = 150_000_000
    data = zipped(("code/zeros", b"\0" * size)).replace(struct.pack("<I", size), struct.pack("<I", 10))
    (tmp_path / "x.zip").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="not an intact zip"):
            read(tmp_path / "x.zip")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_unpacking_returns_the_packed_files(tmp_path: Path) -> None:
    files = add_manifest(GOOD | {"code/ünï.py": b"2"})
    (tmp_path / "x.zip").write_bytes(pack(files, ["code/a.py"]))
    assert read(tmp_path / "x.zip") == files
    assert differences(files, read_manifest(files)["files"]) == []
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.getinfo("code/a.py").external_attr >> 16 == stat.S_IFREG | 0o755


def test_the_same_files_give_the_same_bytes() -> None:
    files = add_manifest(GOOD)
    assert pack(files) == pack(dict(reversed(files.items())))
    assert pack(files) != pack(files | {"code/a.py": b"print(2)\n"})


def test_every_difference_is_listed() -> None:
    files = add_manifest(GOOD)
    listed = read_manifest(files)["files"]
    changed = {**files, "code/a.py": b"evil", "code/new.py": b""}
    del changed["report.pdf"]
    problems = differences(changed, listed)
    assert [problem.split()[0] for problem in problems] == ["code/new.py", "code/a.py", "report.pdf"]
    assert problems[1].startswith("code/a.py was changed: its sha256 is ")


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.zip", tmp_path):
        result = CliRunner().invoke(app, ["verify", str(path)])
        assert result.exit_code == 2
        assert result.stderr == f"error: there is no file {path}; give a bundle that `mainrun submit` made\n"


@settings(max_examples=examples(300))
@given(st.lists(st.text(max_size=12), max_size=4).map("/".join))
def test_an_allowed_name_stays_in_its_folder(name: str) -> None:
    if not name_problem(name):
        path = Path("/in") / name
        assert path.resolve().is_relative_to("/in") and str(path) == f"/in/{name}"


@settings(max_examples=examples(200))
@given(st.data())
def test_a_flipped_byte_is_detected(data: st.DataObject) -> None:
    """If one byte of a bundle changes, reading fails, the manifest differs, or the files are unchanged."""
    files = add_manifest(GOOD)
    zip_bytes = bytearray(pack(files))
    offset = data.draw(st.integers(0, len(zip_bytes) - 1))
    zip_bytes[offset] ^= data.draw(st.integers(1, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "_read_zip", lambda path: bytes(zip_bytes))
        try:
            unpacked = read(Path("x.zip"))
            listed = read_manifest(unpacked)["files"]
        except BundleError:
            return
    assert unpacked == files or differences(unpacked, listed)
