"""What a bundle may be, at its edges: names, sizes, entries and the manifest, each with the neighbour that is allowed."""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_bundle import GOOD, bundled, entry, lying_bomb, zipped

from mainrun.errors import MainrunError, UsageError
from reports import bundle
from reports.bundle import (
    MANIFEST,
    BundleError,
    collisions,
    differences,
    manifest,
    name_fault,
    pack,
    read,
    sha256,
    show,
    size,
)

# -- names

GOOD_NAMES = [
    "a", "a/b/c.py", "a b.py", "-rf", ".env", "ünï/код.py", "a~b", "a'b", "CON1", "console.py", "com.py", "lpt", "com10", "auxiliary",
    "nulls.txt", "a..b", "..a", "x/..a/b", "prn_", "MANIFEST.json", "n" * 200, "ü" * 100, "#$%&()+,;=@[]^`{}!",
]  # fmt: skip
BAD_NAMES = {
    "": "empty", "n" * 201: "longer than 200 bytes", "ü" * 101: "longer than 200 bytes",
    **dict.fromkeys(("a\nb", "a\x7f", "a\u200bb", "\u202ea", "a\udcffb", "a\0b"), "cannot be printed"),
    "e\u0301": "composed", "/a": "absolute", "a//b": "part ''", "a/": "part ''", "./a": "part '.'", "a/.": "part '.'",
    "a/../b": "part '..'",
    "..": "part '..'", " a": "space", "a ": "space", "x/ a/b": "space", "a.": "full stop", "x/a./b": "full stop", "a...": "full stop",
    **{f"a{sign}b": f"it holds {sign}" for sign in '\\:*?"<>|'}, "a?b*c": "it holds *",
    **dict.fromkeys(("con", "PRN", "aux.py", "x/nul.tar.gz", "conin$", "CONOUT$"), "a device's name"),
    **dict.fromkeys(("com0", "com9.txt", "lpt1", "LPT³", "com¹", "lpt²"), "a device's name"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_that_can_be(name: str) -> None:
    assert name_fault(name) == ""


@pytest.mark.parametrize(
    ("name", "why"), list(BAD_NAMES.items()), ids=[repr(name[:12]) for name in BAD_NAMES]
)
def test_a_name_that_cannot_be(name: str, why: str) -> None:
    assert why in name_fault(name)


@pytest.mark.parametrize("number", range(10))
def test_every_numbered_device(number: int) -> None:
    assert all("device" in name_fault(f"{kind}{number}") for kind in ("com", "LPT"))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b", "a/b2"[:1] + "c"], []),
        (["a", "A"], ["a and A are the same name"]),
        (["x/ß", "x/SS"], ["x/ß and x/SS are the same name"]),
        (["\ufb01", "fi"], ["\ufb01 and fi are the same name"]),
        (["a", "a"], ["a and a are the same name"]),
        (["a", "a/b"], ["a is a file and the folder of a/b"]),
        (["a/b/c", "A"], ["A is a file and the folder of a/b/c"]),
        (["a/b", "ab", "a/bc", "b"], []),
        (["a", "A", "a/b"], ["a and A are the same name", "A is a file and the folder of a/b"]),
    ],
)
def test_names_that_are_one_on_some_system(names: list[str], said: list[str]) -> None:
    assert collisions(names) == said


def test_a_name_is_shown_without_moving_the_cursor() -> None:
    assert show("ü b") == "ü b" and show("a\x1b[2J\nb") == "a\\x1b[2J\\nb" and show("\udcff").isprintable()
    assert show("n" * 300) == "n" * 300 and show("n" * 301) == "n" * 280 + "..."


@pytest.mark.parametrize(
    ("n", "said"),
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
def test_how_a_size_is_written(n: float, said: str) -> None:
    assert size(n) == said


def test_the_limits() -> None:
    assert (bundle.FORMAT, bundle.LIMIT, bundle.UNPACKED, bundle.FILES) == (
        1,
        50_000_000,
        200_000_000,
        10_000,
    )
    assert (bundle.LONGEST, bundle.CHECKPOINT) == (200, 20_000_000)


# -- packing


def test_what_pack_writes_of_a_file() -> None:
    data = pack({"b": b"x" * 100, "a": b"2", "c": b""}, ["b"])
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        found = [
            (i.filename, i.date_time, i.create_system, i.compress_type, i.external_attr >> 16)
            for i in z.infolist()
        ]
        squeezed = z.getinfo("b").compress_size
    common = ((1980, 1, 1, 0, 0, 0), 3, zipfile.ZIP_DEFLATED)
    assert (
        found == [("a", *common, 0o100644), ("b", *common, 0o100755), ("c", *common, 0o100644)]
        and squeezed < 20
    )


def test_pack_squeezes_as_far_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(("more", "refused"), [(0, False), (-1, True)])
def test_the_size_of_a_bundle(
    tmp_path: Path, more: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped())
    monkeypatch.setattr(bundle, "LIMIT", path.stat().st_size + more)
    if refused:
        assert (
            f"{path} is refused: it has {size(path.stat().st_size)}, a bundle at most {size(bundle.LIMIT)}"
            in refusal(path)
        )
    else:
        read(path)


@pytest.mark.parametrize(
    ("limit", "more", "refused"),
    [(name, more, more < 0) for name in ("FILES", "UNPACKED") for more in (0, -1)],
)
def test_what_is_in_a_bundle(
    tmp_path: Path, limit: str, more: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped())
    files = bundled(GOOD)
    sizes = {"FILES": len(files), "UNPACKED": sum(map(len, files.values()))}
    monkeypatch.setattr(bundle, limit, sizes[limit] + more)
    if not refused:
        assert read(path) == files
        return
    said = refusal(path)
    assert (
        str(len(files)) in said
        if limit == "FILES"
        else f"unpacked it would have {size(sizes[limit])}" in said
    )


def changed(
    name: str = "code/x", data: bytes = b"x", kind: int = zipfile.ZIP_DEFLATED, **fields: Any
) -> bytes:
    info = entry(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return zipped((info, data), kind=kind)


def mode(bits: int) -> Callable[[], bytes]:
    return lambda: changed(external_attr=bits << 16)


ENTRIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain": (changed, ""),
    "stored": (lambda: changed(kind=zipfile.ZIP_STORED), ""),
    "runnable": (mode(stat.S_IFREG | 0o755), ""),
    "unreadable": (mode(stat.S_IFREG), ""),
    "a run's file": (lambda: changed("run/x"), ""),
    "letters": (lambda: changed("code/ü"), ""),
    "writable by the group": (mode(stat.S_IFREG | 0o664), "mode 100664"),
    "writable by all": (mode(stat.S_IFREG | 0o646), "mode 100646"),
    "setuid": (mode(stat.S_IFREG | 0o4644), "mode 104644"),
    "setgid": (mode(stat.S_IFREG | 0o2644), "mode 102644"),
    "sticky": (mode(stat.S_IFREG | 0o1644), "mode 101644"),
    "a pipe": (mode(stat.S_IFIFO | 0o644), "no plain file"),
    "a socket": (mode(stat.S_IFSOCK | 0o644), "no plain file"),
    "a link": (mode(stat.S_IFLNK | 0o644), "is a link"),
    "no kind": (mode(0o644), "does not use"),
    "bzip2": (lambda: changed(kind=zipfile.ZIP_BZIP2), "does not use"),
    "a comment": (lambda: changed(comment=b"x"), "does not use"),
    "an extra field": (lambda: changed(extra=b"\x75\x70\x00\x00"), "does not use"),
    "beside": (lambda: changed("x"), "no part of a bundle"),
    "a second manifest": (lambda: changed("manifest.json"), "no part of a bundle"),
    "codes": (lambda: changed("codes/x"), "no part of a bundle"),
    "a folder named code": (lambda: changed("code"), "no part of a bundle"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry(tmp_path: Path, name: str) -> None:
    made, said = ENTRIES[name]
    path = tmp_path / "x.zip"
    path.write_bytes(made())
    if said:
        assert said in refusal(path)
    else:
        assert read(path).keys() - bundled(GOOD).keys()


def test_letters_beyond_ascii_want_their_flag(tmp_path: Path) -> None:
    path, letters = tmp_path / "x.zip", "code/ü".encode()
    data = bytearray(changed("code/ü"))
    for at, back in ((data.index(letters), 30 - 6), (data.rindex(letters), 46 - 8)):
        data[at - back + 1] &= ~0x08
    path.write_bytes(data)
    assert "an encoding other than UTF-8" in refusal(path)


@pytest.mark.parametrize("bit", [0x1, 0x2, 0x4, 0x8, 0x10, 0x40, 0x1000])
def test_a_flag_that_pack_does_not_set(bit: int) -> None:
    info = entry("code/x")
    info.flag_bits = bit
    with pytest.raises(BundleError, match="encrypted, or packed"):
        bundle._check_entry(info)
    info.flag_bits = 0x800
    bundle._check_entry(info)


@pytest.mark.parametrize("size_of_data", [0, 1, 10])
def test_an_entry_of_some_bytes(tmp_path: Path, size_of_data: int) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(changed(data=b"y" * size_of_data))
    assert read(path)["code/x"] == b"y" * size_of_data


def test_a_file_longer_than_it_says(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(lying_bomb())
    assert "no whole zip" in refusal(tmp_path / "x.zip")


def test_the_order_of_the_directory_is_free(tmp_path: Path) -> None:
    """What counts is where the files lie."""
    path = tmp_path / "x.zip"
    made = io.BytesIO(pack(bundled(GOOD)))
    with zipfile.ZipFile(made, "a") as z:
        z.filelist.reverse()
        z._didModify = True
    path.write_bytes(made.getvalue())
    assert read(path) == bundled(GOOD)


@pytest.mark.parametrize("where", ["between the files", "before the directory"])
def test_bytes_that_no_file_has(tmp_path: Path, where: str) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as z:
        z.writestr(entry("code/a"), b"1")
        if where == "between the files":
            z.fp.write(b"evil")
            z.start_dir = z.fp.tell()
        z.writestr(entry("code/b"), b"1")
        if where == "before the directory":
            z.fp.write(b"evil")
            z.start_dir = z.fp.tell()
    path = tmp_path / "x.zip"
    path.write_bytes(made.getvalue())
    said = refusal(path)
    assert (
        "code/b shares bytes"
        if where == "between the files"
        else "hidden between its files and its directory"
    ) in said


@pytest.mark.parametrize(
    "error",
    [
        zipfile.BadZipFile,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OverflowError,
        __import__("zlib").error,
    ],
)
def test_whatever_a_damaged_zip_raises(
    tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error("so")

    path = tmp_path / "x.zip"
    path.write_bytes(zipped())
    monkeypatch.setattr(bundle, "_content", fail)
    assert f"{path} is no whole zip file (so)" in refusal(path)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path) -> bytes:
        raise OSError(5, os.strerror(5))

    path = tmp_path / "x.zip"
    path.write_bytes(zipped())
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UsageError, match=f"cannot read .*x.zip: {os.strerror(5)}"):
        read(path)


def test_no_file_to_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("none.zip", "no file "), (".", "no file "), ("pipe", "named pipe")):
        with pytest.raises(UsageError) as caught:
            read(tmp_path / name)
        assert (
            said in str(caught.value)
            and str(tmp_path / name) in str(caught.value)
            and "mainrun submit" in str(caught.value)
        )


def test_a_name_with_a_zero_byte() -> None:
    info = entry("code/x")
    info.orig_filename = "code/x\0evil"
    with pytest.raises(BundleError, match="zero byte"):
        bundle._check_entry(info)


@pytest.mark.parametrize(("name", "fix"), [("beside", "get it again"), ("upwards", "get it again")])
def test_what_is_refused_says_one_way_out(tmp_path: Path, name: str, fix: str) -> None:
    (tmp_path / "x.zip").write_bytes(changed({"beside": "x", "upwards": "code/../x"}[name]))
    said = refusal(tmp_path / "x.zip")
    assert said.endswith(bundle.AGAIN) and fix in said and said.count(";") == 1


# -- writing


def test_files_are_written_into_an_empty_folder(tmp_path: Path) -> None:
    bundle.write({"a/b/c": b"1", "d": b"", "a/e": b"2"}, tmp_path / "new")
    assert {
        str(p.relative_to(tmp_path / "new")): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()
    } == {
        "a/b/c": b"1",
        "d": b"",
        "a/e": b"2",
    }
    with pytest.raises(MainrunError, match="cannot write"):
        bundle.write({"d": b"evil"}, tmp_path / "new")
    assert (tmp_path / "new" / "d").read_bytes() == b""


# -- the manifest


def said_of(data: Any) -> str:
    files = {MANIFEST: data if isinstance(data, bytes) else json.dumps(data).encode()}
    with pytest.raises(BundleError) as caught:
        manifest(files)
    return str(caught.value)


SHAPE: dict[str, Any] = {"format": 1, "figures": {}, "files": {"a": {"sha256": "0"}}}


def test_a_manifest() -> None:
    assert manifest({MANIFEST: json.dumps(SHAPE).encode()}) == SHAPE
    assert manifest({MANIFEST: json.dumps(SHAPE | {"files": {}, "more": 1}).encode()})["more"] == 1
    with pytest.raises(BundleError, match=f"no {MANIFEST}"):
        manifest(GOOD)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff", b"[]", b"3", b"null", b"[" * 100_000, b'{"format": 1, "format": 1, "files": {}, "figures": {}}',
        b'{"format": 1, "files": {"a": {"sha256": "0", "sha256": "1"}}, "figures": {}}',
        *({k: v for k, v in SHAPE.items() if k != lacking} for lacking in SHAPE),
        SHAPE | {"figures": []}, SHAPE | {"figures": None}, SHAPE | {"files": []}, SHAPE | {"files": None}, SHAPE | {"files": {"a": {}}},
        SHAPE | {"files": {"a": {"sha256": 3}}}, SHAPE | {"files": {"a": None}},
        SHAPE | {"files": {"b": {"sha256": ""}, "a": {"sha256": None}}},
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_read(data: Any) -> None:
    assert f"its {MANIFEST} cannot be read" in said_of(data)


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_a_manifest_of_another_format(number: Any) -> None:
    said = said_of(SHAPE | {"format": number})
    assert f"format {number}, this version reads 1" in said


# -- differences


def test_where_files_are_not_what_is_listed() -> None:
    files = {"b": b"1", "a": b"2", "c": b"3", MANIFEST: b""}
    listed = {name: {"sha256": sha256(data)} for name, data in files.items() if name != MANIFEST}
    assert differences(files, listed) == []
    assert differences(files | {"y": b"", "x": b""}, listed) == [
        f"{name} is in the bundle, not in its manifest" for name in "xy"
    ]
    assert differences({"a": b"2"}, listed) == [
        f"{name} is in the manifest, not in the bundle" for name in "bc"
    ]
    for name in "abc":
        (said,) = differences(files | {name: b"evil"}, listed)
        assert (
            said
            == f"{name} was changed: sha256 {sha256(b'evil')[:12]}, the manifest says {sha256(files[name])[:12]}"
        )
    (said,) = differences(files, listed | {"n\n": {"sha256": ""}})
    assert said == "n\\n is in the manifest, not in the bundle"
    assert len(sha256(b"")) == 64 and sha256(b"").startswith("e3b0c44298fc")
