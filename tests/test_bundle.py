"""Archives that attack whoever unpacks them: each is refused before anything of it is written or run."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.errors import UsageError
from reports import bundle
from reports.bundle import MANIFEST, BundleError, differences, manifest, name_fault, pack, read, sha256

GOOD = {"code/a.py": b"print(1)\n", "code/b/c.py": b"", "run/config.json": b"{}", "report.pdf": b"%PDF"}


def bundled(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    listed = {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in files.items()}
    found: dict[str, object] = {
        "format": bundle.FORMAT,
        "run": "x",
        "figures": {},
        "files": listed,
        "guards": [],
    }
    return files | {MANIFEST: json.dumps(found | changes).encode()}


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of these, beside what a bundle has."""
    made = io.BytesIO(pack(bundled(GOOD)))
    with zipfile.ZipFile(made, "a") as z:
        for name, data in entries:
            info = name if isinstance(name, zipfile.ZipInfo) else entry(name)
            z.writestr(info, data, compress_type=kind)
    return made.getvalue()


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system = mode << 16, 3
    return info


def named(name: bytes) -> bytes:
    """A name that zipfile would not write."""
    return zipped(("code/" + "q" * (len(name) - 5), b"x")).replace(b"code/" + b"q" * (len(name) - 5), name)


def twice() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return zipped(("code/a.py", b"evil"))


def bomb() -> bytes:
    return zipped(("code/zeros", b"\0" * (bundle.UNPACKED + 1)))


def lying_bomb() -> bytes:
    """It says 10 bytes and has a million."""
    data = zipped(("code/zeros", b"\0" * 1_000_000))
    return data.replace(struct.pack("<I", 1_000_000), struct.pack("<I", 10))


def overlapping() -> bytes:
    """Two entries of the directory that are one file: the way of bombs that pack better than deflate."""
    data = bytearray(zipped(("code/one", b"x" * 100), ("code/two", b"x" * 100)))
    first, second = data.rindex(b"code/one") - 46, data.rindex(b"code/two") - 46
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    return bytes(data)


def hidden_before() -> bytes:
    return b"#!/bin/sh\necho evil\n" + zipped()


def hidden_between() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as z:
        z.writestr(entry("code/a.py"), b"1")
        z.fp.write(b"evil" * 10)  # type: ignore[union-attr]
        z.start_dir = z.fp.tell()  # type: ignore[union-attr]
        z.writestr(entry("code/b.py"), b"1")
    return made.getvalue()


def hidden_behind() -> bytes:
    return zipped() + b"evil"


def commented() -> bytes:
    made = io.BytesIO(zipped())
    with zipfile.ZipFile(made, "a") as z:
        z.comment = b"evil"
    return made.getvalue()


def encrypted() -> bytes:
    data = bytearray(zipped(("code/locked", b"x")))
    for at in (data.index(b"code/locked") - 30 + 6, data.rindex(b"code/locked") - 46 + 8):
        data[at] |= 1
    return bytes(data)


def extra() -> bytes:
    info = entry("code/extra")
    info.extra = struct.pack("<HH", 0x7075, 4) + b"evil"  # a second name, which some unpackers prefer
    return zipped((info, b"x"))


def two_names() -> bytes:
    """Its directory says one name, the file itself another."""
    data = zipped(("code/shown", b"x"))
    return data.replace(b"code/shown", b"code/other", 1)


def wrong_sum() -> bytes:
    data = zipped(("code/sum", b"a sentence, stored"), kind=zipfile.ZIP_STORED)
    return data.replace(b"a sentence", b"b sentence")


def deep() -> bytes:
    return pack(GOOD | {MANIFEST: b"[" * 100_000})


def of_manifest(data: bytes) -> Callable[[], bytes]:
    return lambda: pack(GOOD | {MANIFEST: data})


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "upwards": (lambda: zipped(("code/../../evil", b"x")), r"a part '\.\.'"),
    "absolute": (lambda: named(b"/etc/evil"), "it is absolute"),
    "backslashes": (lambda: named(b"code/..\\..\\evil"), r"it holds \\"),
    "a drive": (lambda: named(b"C:/evil.exe"), "it holds :"),
    "a stream": (lambda: zipped(("code/a.py:evil", b"x")), "it holds :"),
    "a link": (lambda: zipped((entry("code/link", stat.S_IFLNK | 0o777), b"/etc/passwd")), "is a link"),
    "a device": (lambda: zipped((entry("code/dev", stat.S_IFCHR | 0o644), b"")), "no plain file"),
    "setuid": (lambda: zipped((entry("code/su", stat.S_IFREG | 0o4755), b"x")), "no plain file"),
    "a folder": (lambda: zipped((entry("code/x/", stat.S_IFDIR | 0o755), b"")), "code/x/ is a folder, packed"),
    "another tool's work": (lambda: zipped((entry("code/y", 0o600), b"x")), "code/y is packed in a way that"),
    "a bomb": (bomb, "unpacked it would have 200.0 MB"),
    "a bomb that lies": (lying_bomb, "refused|no whole zip"),
    "overlapping files": (overlapping, "shares bytes with another file"),
    "many files": (lambda: zipped(*((f"code/{i}", b"") for i in range(bundle.FILES + 1))), "at most 10,000"),
    "the same name twice": (twice, "are the same name"),
    "the same name in capitals": (lambda: zipped(("code/A.PY", b"x")), "are the same name"),
    "a file that is a folder": (lambda: zipped(("code/a.py/x", b"x")), "is a file and the folder of"),
    "a zero byte": (lambda: named(b"code/a\0evil.py"), "zero byte"),
    "no UTF-8": (lambda: named(b"code/\x81.py"), "other than UTF-8"),
    "a terminal's command": (lambda: named(b"code/\x1b[2Jx.py"), "cannot be printed"),
    "right to left": (lambda: zipped(("code/\u202egpj.py", b"x")), "cannot be printed"),
    "a device's name": (lambda: zipped(("code/nul.py", b"x")), "a device's name"),
    "a long name": (lambda: zipped(("code/" + "n" * 300, b"x")), "longer than"),
    "beside the code": (lambda: zipped(("sitecustomize.py", b"evil")), "no part of a bundle"),
    "encrypted": (encrypted, "is encrypted"),
    "packed otherwise": (lambda: zipped(("code/x", b"x"), kind=zipfile.ZIP_LZMA), "does not use"),
    "a second name": (extra, "does not use"),
    "two names": (two_names, "no whole zip"),
    "a wrong checksum": (wrong_sum, "no whole zip"),
    "something before": (hidden_before, "no whole zip|hidden"),
    "something between": (hidden_between, "hidden|shares bytes"),
    "something behind": (hidden_behind, "no whole zip|hidden"),
    "a comment": (commented, "hidden"),
    "cut short": (lambda: zipped()[:-30], "no whole zip"),
    "no zip": (lambda: b"hello", "no whole zip"),
    "empty": (lambda: b"", "no whole zip"),
    "too large": (lambda: b"\0" * (bundle.LIMIT + 1), "at most 50.0 MB"),
    "no manifest": (lambda: pack(GOOD), "no MANIFEST.json"),
    "a manifest that is none": (of_manifest(b"\xff{"), "cannot be read"),
    "a manifest of another shape": (of_manifest(b'{"format": 1, "files": [], "figures": 3}'), "cannot be read"),
    "files that are a list": (of_manifest(b'{"format": 1, "files": [], "figures": {}}'), "cannot be read"),
    "a deep manifest": (deep, "cannot be read"),
    "a key twice": (of_manifest(b'{"format": 1, "format": 1, "files": {}, "figures": {}}'), "cannot be read"),
    "another format": (of_manifest(b'{"format": 99, "files": {}, "figures": {}}'), "format 99"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, said = ATTACKS[name]
    path = tmp_path / "x.zip"
    path.write_bytes(made())
    written: list[object] = []
    monkeypatch.setattr(bundle, "write", lambda *args: written.append(args))
    with pytest.raises(UsageError, match=said):
        manifest(read(path))
    done = CliRunner().invoke(app, ["verify", str(path)])
    assert done.exit_code == 2 and done.stdout == "" and written == []
    assert done.stderr.startswith(f"error: {path} is ") and "\x1b" not in done.stderr


def test_a_bomb_that_lies_takes_no_memory(tmp_path: Path) -> None:
    size = 150_000_000
    data = zipped(("code/zeros", b"\0" * size)).replace(struct.pack("<I", size), struct.pack("<I", 10))
    (tmp_path / "x.zip").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="no whole zip"):
            read(tmp_path / "x.zip")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_bundle_is_read_as_it_was_packed(tmp_path: Path) -> None:
    files = bundled(GOOD | {"code/ünï.py": b"2"})
    (tmp_path / "x.zip").write_bytes(pack(files, ["code/a.py"]))
    assert read(tmp_path / "x.zip") == files
    assert differences(files, manifest(files)["files"]) == []
    with zipfile.ZipFile(tmp_path / "x.zip") as z:
        assert z.getinfo("code/a.py").external_attr >> 16 == stat.S_IFREG | 0o755


def test_the_same_files_give_the_same_bytes() -> None:
    files = bundled(GOOD)
    assert pack(files) == pack(dict(reversed(files.items())))
    assert pack(files) != pack(files | {"code/a.py": b"print(2)\n"})


def test_every_difference_is_named() -> None:
    files = bundled(GOOD)
    listed = manifest(files)["files"]
    changed = {**files, "code/a.py": b"evil", "code/new.py": b""}
    del changed["report.pdf"]
    said = differences(changed, listed)
    assert [line.split()[0] for line in said] == ["code/new.py", "code/a.py", "report.pdf"]
    assert said[1].startswith("code/a.py was changed: sha256 ")


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    for path in (tmp_path / "none.zip", tmp_path):
        done = CliRunner().invoke(app, ["verify", str(path)])
        assert (
            done.exit_code == 2
            and done.stderr == f"error: no file {path}; give a bundle that `mainrun submit` made\n"
        )


@settings(max_examples=300)
@given(st.lists(st.text(max_size=12), max_size=4).map("/".join))
def test_a_name_without_fault_stays_in_its_folder(name: str) -> None:
    if not name_fault(name):
        place = Path("/in") / name
        assert place.resolve().is_relative_to("/in") and str(place) == f"/in/{name}"


@settings(max_examples=200)
@given(st.data())
def test_no_flipped_byte_goes_unseen(data: st.DataObject) -> None:
    """Any one byte of a bundle changed: refused, or the files are not those of the manifest, or nothing that is read differs."""
    files = bundled(GOOD)
    whole = bytearray(pack(files))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "_bytes", lambda path: bytes(whole))
        try:
            found = read(Path("x.zip"))
            listed = manifest(found)["files"]
        except BundleError:
            return
    assert found == files or differences(found, listed)
