"""Pack and unpack bundles. A bundle is the zip file of a submission.

`pack` always creates the same zip file from the same files. `read` is safe even for a bundle from an
untrusted source.

A bundle contains MANIFEST.json and report.pdf. The folder run/ in the bundle contains files of the run, and
the folder code/ contains files of a git commit.
"""

from __future__ import annotations

import hashlib
import io
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
MAX_ZIP_BYTES = 50_000_000
MAX_UNPACKED_BYTES = 200_000_000
MAX_FILES = 10_000
MAX_NAME_BYTES = 200
MAX_CHECKPOINT_BYTES = 20_000_000  # the maximum size of the checkpoint in a bundle

MANIFEST = "MANIFEST.json"
REPORT = "report.pdf"
RUN = "run/"
CODE = "code/"

FORBIDDEN_CHARACTERS = '"*:<>?\\|'
DOS_NAMES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
UTF8_NAME = 0x800  # the zip flag for a file name in UTF-8; bundles use no other zip flag
LOCAL_HEADER_BYTES = 30
DIRECTORY_ENTRY_BYTES = 46
DIRECTORY_END_BYTES = 22

NOT_OURS = "is packed in a way that `mainrun submit` does not use"
GIVE_A_BUNDLE = "give a bundle that `mainrun submit` made"
GET_A_NEW_COPY = "; get a new copy from its author"


class BundleError(UsageError):
    """Raised if a file is not a bundle, or if a bundle is not safe to unpack."""


def refusal(path: Path, error: BundleError) -> BundleError:
    """Return an error whose message contains the path of the bundle and the message of `error`.

    If the message of `error` does not say how to fix the problem, the new message suggests a fix.
    """
    fix = "" if ";" in str(error) else GET_A_NEW_COPY
    return BundleError(f"{path} is refused: {error}{fix}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def format_size(n: float) -> str:
    """Format a number of bytes as a string in kB or MB."""
    if n >= 1e6:
        return f"{n / 1e6:.1f} MB"
    return f"{n / 1e3:.1f} kB"


# -- file names


def name_problem(name: str) -> str:
    """Return the reason why a bundle must not contain a file with this name.

    Return an empty string if the name is valid on every operating system.
    """
    if not name:
        return "it is empty"
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes"
    if not name.isprintable():
        return "it has a character that cannot be printed, or is not UTF-8"
    if unicodedata.normalize("NFC", name) != name:
        return "it is not in Unicode's composed form (NFC)"
    for character in FORBIDDEN_CHARACTERS:
        if character in name:
            return f"it contains {character}"
    if name.startswith("/"):
        return "it is absolute"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"it has a part {part!r}"
        if part != part.strip() or part.endswith("."):
            return "one of its parts begins or ends with a space, or ends with a full stop"
        if DOS_NAMES.fullmatch(part):
            return f"{part} is the name of a device on some systems"
    return ""


def collisions(names: Iterable[str]) -> list[str]:
    """Describe the file names that collide with each other.

    Two names collide if some operating systems treat the names as equal, or if a file and a folder have the
    same name.
    """
    problems = []
    names_by_key: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold()
        if key in names_by_key:
            problems.append(f"{escape(names_by_key[key])} and {escape(name)} are the same name")
        names_by_key[key] = name
    for key, name in names_by_key.items():
        for parent in map(str, PurePosixPath(key).parents):
            if parent in names_by_key:
                file = escape(names_by_key[parent])
                problems.append(f"{file} is both a file and the folder of {escape(name)}")
                break
    return problems


def escape(name: str) -> str:
    """Escape the unprintable characters in a file name, and shorten a long name."""
    text = ""
    for character in name:
        if character.isprintable():
            text += character
        else:
            text += character.encode("unicode_escape", "surrogateescape").decode("ascii", "replace")
    if len(text) <= 300:
        return text
    return f"{text[:280]}..."


# -- packing bundles


def pack(files: Mapping[str, bytes], executables: Iterable[str] = ()) -> bytes:
    """Create a zip archive of the files.

    The same files always give the same archive, because the names in the archive are sorted and the dates are
    fixed.
    """
    executables = set(executables)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # the code that the zip format uses for Unix
            permissions = 0o755 if name in executables else 0o644
            entry.external_attr = (stat.S_IFREG | permissions) << 16
            archive.writestr(entry, files[name], compresslevel=9)
    return buffer.getvalue()


# -- unpacking bundles


def read(path: Path) -> dict[str, bytes]:
    """Read all files of a bundle into memory.

    The function writes no file to disk, because the bundle must first pass all checks.
    """
    try:
        data = _read_zip(path)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _check_entries(entries, len(data))
            return {entry.filename: _content(archive, entry) for entry in entries}
    except BundleError as e:
        raise refusal(path, e) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OverflowError) as e:
        raise BundleError(f"{path} is not an intact zip file ({e}); get a new copy of the bundle") from None


def _read_zip(path: Path) -> bytes:
    problem = inputs.not_a_file(path)
    if problem in ("does not exist", "is a folder"):
        raise UsageError(f"there is no file {path}; {GIVE_A_BUNDLE}")
    if problem:
        raise UsageError(f"{path} {problem.partition('; ')[0]}; {GIVE_A_BUNDLE}")
    zip_bytes = path.stat().st_size
    if zip_bytes > MAX_ZIP_BYTES:
        raise BundleError(
            f"the zip file has a size of {format_size(zip_bytes)}, "
            f"but a bundle may have at most {format_size(MAX_ZIP_BYTES)}{GET_A_NEW_COPY}"
        )
    try:
        return path.read_bytes()
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from None


def _check_entries(entries: list[zipfile.ZipInfo], zip_bytes: int) -> None:
    if len(entries) > MAX_FILES:
        raise BundleError(
            f"the zip file contains {len(entries):,} files, "
            f"but a bundle may contain at most {MAX_FILES:,}{GET_A_NEW_COPY}"
        )
    for entry in entries:
        _check_entry(entry)
    same_names = collisions(entry.filename for entry in entries)
    if same_names:
        raise BundleError(same_names[0])
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_UNPACKED_BYTES:
        limit = format_size(MAX_UNPACKED_BYTES)
        raise BundleError(
            f"the unpacked files have a size of {format_size(unpacked)}, "
            f"but the files of a bundle may have at most {limit}{GET_A_NEW_COPY}"
        )
    _check_layout(entries, zip_bytes)


def _check_layout(entries: list[zipfile.ZipInfo], zip_bytes: int) -> None:
    """Check that the files and the central directory fill the zip file without gaps or overlaps.

    Without this check, a zip file could contain hidden bytes.
    """
    end = 0
    directory = DIRECTORY_END_BYTES
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset != end:
            name = escape(entry.filename)
            raise BundleError(f"the file {name} overlaps another file, or has hidden bytes before it")
        name_bytes = len(entry.filename.encode())
        end += LOCAL_HEADER_BYTES + name_bytes + entry.compress_size
        directory += DIRECTORY_ENTRY_BYTES + name_bytes
    if end + directory != zip_bytes:
        raise BundleError("the zip file has hidden bytes before, inside or after its central directory")


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    shown = escape(name)
    mode = entry.external_attr >> 16
    if entry.orig_filename != name:
        raise BundleError(f"the name {escape(entry.orig_filename)} contains a zero byte")
    if entry.is_dir():
        raise BundleError(f"{shown} is a folder, but a bundle must contain only files")
    problem = name_problem(name)
    if problem:
        raise BundleError(f"the name {shown!r} is not allowed: {problem}")
    if name not in (MANIFEST, REPORT) and not name.startswith((RUN, CODE)):
        raise BundleError(f"{shown} does not belong in a bundle ({MANIFEST}, {REPORT}, {RUN}, {CODE})")
    if not name.isascii() and not entry.flag_bits & UTF8_NAME:
        raise BundleError(f"the name {shown} is in an encoding other than UTF-8")
    if stat.S_ISLNK(mode):
        raise BundleError(f"{shown} is a link")
    if not stat.S_IFMT(mode):
        raise BundleError(f"{shown} {NOT_OURS}")
    if not stat.S_ISREG(mode) or mode & 0o7022:
        raise BundleError(f"{shown} is not a plain file (mode {mode:o})")
    if entry.flag_bits & ~UTF8_NAME:
        raise BundleError(f"{shown} is encrypted, or {NOT_OURS}")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.extra or entry.comment:
        raise BundleError(f"{shown} {NOT_OURS}")


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as f:
        # Reading one extra byte makes the checksum fail if the file is larger than its entry declares.
        return f.read(entry.file_size + 1)


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files to a new or empty folder. Raise an error if a file already exists."""
    for name, data in files.items():
        path = folder / name
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as f:
                f.write(data)


# -- the manifest


def read_manifest(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Read the manifest of a bundle, and check the format version and the structure of the manifest."""
    if MANIFEST not in files:
        raise BundleError(f"the zip file has no {MANIFEST}; {GIVE_A_BUNDLE}")
    try:
        manifest = inputs.parse_json(files[MANIFEST].decode())
        if manifest["format"] != FORMAT:
            raise BundleError(
                f"the bundle has format {manifest['format']}, but this version of mainrun reads format "
                f"{FORMAT}; use the version of mainrun that made the bundle"
            )
        _check_shape(manifest)
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"the {MANIFEST} of the bundle cannot be read; {GIVE_A_BUNDLE}") from None
    return manifest


def _check_shape(manifest: dict[str, Any]) -> None:
    if not isinstance(manifest["figures"], dict) or not isinstance(manifest["files"], dict):
        raise TypeError("figures and files are objects")
    for entry in manifest["files"].values():
        if not isinstance(entry["sha256"], str):
            raise TypeError("a sha256 is a string")


def differences(files: Mapping[str, bytes], listed: Mapping[str, Any]) -> list[str]:
    """Describe each file that was changed, is missing from the bundle, or is not listed in the manifest."""
    problems = []
    for name in sorted(files.keys() - listed.keys() - {MANIFEST}):
        problems.append(f"{name} is in the bundle, but not in its manifest")
    for name in sorted(listed):
        if name not in files:
            problems.append(f"{escape(name)} is in the manifest, but not in the bundle")
            continue
        expected = listed[name]["sha256"]
        actual = sha256(files[name])
        if actual != expected:
            shown = escape(expected)[:12]
            problems.append(f"{name} was changed: its sha256 is {actual[:12]}, the manifest says {shown}")
    return problems
