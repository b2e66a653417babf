"""The zip of a submission: packed to the same bytes each time, and unpacked with nothing believed.

MANIFEST.json   report.pdf   run/ (a run directory)   code/ (the tree of a commit)
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mainrun.errors import UsageError
from mainrun.files import inputs
from mainrun.store.rundir import disk_errors

FORMAT = 1
LIMIT = 50_000_000  # bytes of the zip
UNPACKED = 200_000_000
FILES = 10_000
LONGEST = 200  # bytes of a name
CHECKPOINT = (
    20_000_000  # a run's last weights go in up to this size, so that its last score can be taken again
)
MANIFEST, REPORT, RUN, CODE = "MANIFEST.json", "report.pdf", "run/", "code/"
DOS_NAMES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
AGAIN = "; get it again from its author"


class BundleError(UsageError):
    """What was given is no bundle, or one that may not be unpacked."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def size(n: float) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


# -- names


def name_fault(name: str) -> str:
    """Why no file of a bundle can have this name; empty: it can. What is fine here is fine on every system."""
    if not name or len(name.encode("utf-8", "replace")) > LONGEST:
        return f"it is longer than {LONGEST} bytes" if name else "it is empty"
    if not name.isprintable():
        return "it holds a character that cannot be printed, or is no UTF-8"
    if unicodedata.normalize("NFC", name) != name:
        return "its letters are written in another way than Unicode's composed one"
    if odd := sorted(set('\\:*?"<>|') & set(name)):
        return f"it holds {odd[0]}"
    if name.startswith("/"):
        return "it is absolute"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"it has a part {part!r}"
        if part != part.strip() or part.endswith("."):
            return "a part of it begins or ends with a space or ends with a full stop"
        if DOS_NAMES.fullmatch(part):
            return f"{part} is a device's name on some systems"
    return ""


def collisions(names: Iterable[str]) -> list[str]:
    """Names that are one file on some system, or a file and a folder at once."""
    seen: dict[str, str] = {}
    found = []
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold()
        if key in seen:
            found.append(f"{show(seen[key])} and {show(name)} are the same name")
        seen[key] = name
    for key, name in seen.items():
        if inside := next((str(p) for p in PurePosixPath(key).parents if str(p) in seen), None):
            found.append(f"{show(seen[inside])} is a file and the folder of {show(name)}")
    return found


def show(name: str) -> str:
    """A name that moves no cursor, cut to what a line holds."""
    plain = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogateescape").decode("ascii", "replace")
        for c in name
    )
    return plain if len(plain) <= 300 else f"{plain[:280]}..."


# -- packing


def pack(files: Mapping[str, bytes], runnable: Iterable[str] = ()) -> bytes:
    """Sorted, one time for all, no trace of this system: the same files give the same bytes."""
    runnable = set(runnable)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as z:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
            info.external_attr = (stat.S_IFREG | (0o755 if name in runnable else 0o644)) << 16
            z.writestr(info, files[name], compresslevel=9)
    return made.getvalue()


# -- unpacking


def read(path: Path) -> dict[str, bytes]:
    """The files of a bundle, in memory: nothing is written before all of it was looked at."""
    try:
        data = _bytes(path)
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            entries = z.infolist()
            _check_entries(entries, len(data))
            return {entry.filename: _content(z, entry) for entry in entries}
    except BundleError as e:
        raise BundleError(f"{path} is refused: {e}{'' if ';' in str(e) else AGAIN}") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OverflowError,
    ) as e:
        raise BundleError(f"{path} is no whole zip file ({e}); get it again") from None


def _bytes(path: Path) -> bytes:
    why = inputs.not_a_file(path)
    if why in ("does not exist", "is a folder"):
        raise UsageError(f"no file {path}; give a bundle that `mainrun submit` made")
    if why:
        raise UsageError(f"{path} {why.partition('; ')[0]}; give a bundle that `mainrun submit` made")
    if path.stat().st_size > LIMIT:
        raise BundleError(f"it has {size(path.stat().st_size)}, a bundle at most {size(LIMIT)}")
    try:
        return path.read_bytes()
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from None


def _check_entries(entries: list[zipfile.ZipInfo], total: int) -> None:
    if len(entries) > FILES:
        raise BundleError(f"it has {len(entries):,} files, a bundle at most {FILES:,}")
    for entry in entries:
        _check_entry(entry)
    if same := collisions(entry.filename for entry in entries):
        raise BundleError(same[0])
    if (unpacked := sum(entry.file_size for entry in entries)) > UNPACKED:
        raise BundleError(f"unpacked it would have {size(unpacked)}, a bundle at most {size(UNPACKED)}")
    end = 0
    for entry in sorted(
        entries, key=lambda entry: entry.header_offset
    ):  # each after the other, from the first byte on
        if entry.header_offset != end:
            raise BundleError(
                f"{show(entry.filename)} shares bytes with another file, or something is hidden before it"
            )
        end += 30 + len(entry.filename.encode()) + entry.compress_size
    directory = sum(46 + len(entry.filename.encode()) for entry in entries) + 22
    if end + directory != total:
        raise BundleError("something is hidden between its files and its directory, in that, or behind it")


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name, mode = entry.filename, entry.external_attr >> 16
    if entry.orig_filename != name:
        raise BundleError(f"the name {show(entry.orig_filename)} holds a zero byte")
    if entry.is_dir():
        raise BundleError(f"{show(name)} is a folder, packed in a way that `mainrun submit` does not use")
    if fault := name_fault(name):
        raise BundleError(f"the name {show(name)!r} cannot be: {fault}")
    if name not in (MANIFEST, REPORT) and not name.startswith((RUN, CODE)):
        raise BundleError(f"{show(name)} is no part of a bundle ({MANIFEST}, {REPORT}, {RUN}, {CODE})")
    if not name.isascii() and not entry.flag_bits & 0x800:
        raise BundleError(f"the name {show(name)} is in an encoding other than UTF-8")
    if stat.S_ISLNK(mode):
        raise BundleError(f"{show(name)} is a link")
    if not stat.S_IFMT(mode):
        raise BundleError(f"{show(name)} is packed in a way that `mainrun submit` does not use")
    if not stat.S_ISREG(mode) or mode & 0o7022:
        raise BundleError(f"{show(name)} is no plain file (mode {mode:o})")
    if entry.flag_bits & ~0x800:
        raise BundleError(f"{show(name)} is encrypted, or packed in a way that `mainrun submit` does not use")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.extra or entry.comment:
        raise BundleError(f"{show(name)} is packed in a way that `mainrun submit` does not use")


def _content(z: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with z.open(entry) as f:
        return f.read(
            entry.file_size + 1
        )  # a bomb is unpacked no further than it says, and then its checksum is wrong


def write(files: Mapping[str, bytes], into: Path) -> None:
    """Into a folder that is new and empty."""
    for name, data in files.items():
        place = into / name
        with disk_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("xb") as f:
                f.write(data)


def manifest(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What a bundle says of itself, as far as its shape goes."""
    if MANIFEST not in files:
        raise BundleError(f"it has no {MANIFEST}; give a bundle that `mainrun submit` made")
    try:
        found = json.loads(files[MANIFEST], object_pairs_hook=_once)
        if found["format"] != FORMAT:
            raise BundleError(
                f"it has format {found['format']}, this version reads {FORMAT}; use the mainrun that made it"
            )
        listed = found["files"]
        if (
            not isinstance(found["figures"], dict)
            or not isinstance(listed, dict)
            or not all(isinstance(listed[name]["sha256"], str) for name in listed)
        ):
            raise TypeError
        return found
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(
            f"its {MANIFEST} cannot be read; give a bundle that `mainrun submit` made"
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def differences(files: Mapping[str, bytes], listed: Mapping[str, Any]) -> list[str]:
    """Where the files are not what the manifest lists."""
    found = [
        f"{name} is in the bundle, not in its manifest"
        for name in sorted(files.keys() - listed.keys() - {MANIFEST})
    ]
    for name in sorted(listed):
        if name not in files:
            found.append(f"{show(name)} is in the manifest, not in the bundle")
        elif (now := sha256(files[name])) != listed[name]["sha256"]:
            found.append(
                f"{name} was changed: sha256 {now[:12]}, the manifest says {show(listed[name]['sha256'])[:12]}"
            )
    return found
