"""Input from outside: values in messages, paths, and files in TOML, JSON and YAML. PyYAML is imported only for YAML.

A file or a text that cannot be used is a `ValueError` (`BadInput`) whose words complete a sentence that begins with its name:
"preset.toml" + " is a folder; give a file".
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mainrun.errors import DiskFull, MainrunError, UsageError

LARGEST = 16_000_000  # bytes of a file that is read as a document
LARGEST_YAML = 300_000  # characters; its parser takes two seconds for that
DEEPEST = 100  # levels of lists and tables
MOST_VALUES = 1_000_000  # YAML's aliases can name one list a billion times
MOST_DIGITS = 300  # of a whole number; Python refuses to print one of 4,301
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux and on macOS
MOST_FOLDERS = 200  # in a path; `Path.mkdir(parents=True)` recurses once per folder


class BadInput(ValueError):
    """Why a file or a text cannot be used, and what to do."""


# -- values in messages


def printable(text: str) -> str:
    """The text on one line. Control characters and lone surrogates become escapes, so that a message cannot move the cursor."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]",
        lambda c: c[0].encode("unicode_escape").decode(),
        text,
    )


def shortened(text: str, most: int) -> str:
    """The beginning and the end of a text that is longer than `most`."""
    if len(text) <= most:
        return text
    mark = f" [... {len(text) - most:,} characters ...] "
    return text[: 2 * most // 3] + mark + text[len(text) - most // 3 :]


def shown(value: Any, most: int = 200) -> str:
    """A value in a message, as Python writes it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of too many digits, lists in lists without end
        text = f"a {type(value).__name__} that cannot be printed"
    return shortened(printable(text), most)


def first_ten(texts: Iterable[str], what: str) -> Iterator[str]:
    """The texts, or ten of them and how many more there are."""
    rest = iter(texts)
    for _, text in zip(range(10), rest, strict=False):
        yield text
    more = sum(1 for _ in rest)
    if more:
        yield f"and {more:,} more {what}"


# -- paths


def bad_path(text: str) -> str:
    """Why the path is invalid and how to fix it, or an empty text."""
    if not text.strip():
        return "which is empty; give a path"
    if "\0" in text:
        return "which holds a NUL character; remove it"
    name = os.fsencode(text)
    longest = max(len(part) for part in name.split(b"/"))
    if longest > LONGEST_NAME:
        return f"a name of {longest:,} bytes; at most {LONGEST_NAME} are allowed, give a shorter one"
    if len(name) > LONGEST_PATH:
        return f"a path of {len(name):,} bytes; at most {LONGEST_PATH:,} are allowed, give a shorter one"
    if name.count(b"/") > MOST_FOLDERS:
        return f"a path with {name.count(b'/'):,} folders; at most {MOST_FOLDERS} are allowed, give a shorter one"
    try:
        os.stat(text)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES):
            return reason_for(e)
    return ""


def check_path(text: str | Path, what: str) -> None:
    """Refuse a path that no file can have. `what` is the option, such as --out."""
    why = bad_path(str(text))
    if why:
        raise UsageError(f"got {what} {shown(str(text), 80)}, {why}")


def expanded(text: str, what: str) -> Path:
    """The path, with the home folder in place of ~. `what` is the option or the variable."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(
            f"got {what} {shown(text, 80)}, whose ~ names no user of this machine; write the path in full"
        ) from None


def not_a_file(path: Path) -> str:
    """Why the path is not a readable file, such as "is a folder", or an empty text. A pipe is never opened."""
    why = bad_path(str(path))
    if why:
        return f"cannot be read: {why.removeprefix('which ')}"
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return "does not exist"
    except OSError as e:
        return f"cannot be read: {reason_for(e)}"
    kinds = {
        stat.S_IFREG: "",
        stat.S_IFDIR: "is a folder",
        stat.S_IFIFO: "is a named pipe",
        stat.S_IFSOCK: "is a socket",
    }
    return kinds.get(kind, "is a device")


REASONS = {
    errno.ENAMETOOLONG: f"the name is too long; each part may have {LONGEST_NAME} bytes, give a shorter one",
    errno.ELOOP: "a symbolic link that leads back to itself; remove it, or give another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; give another path",
    errno.EISDIR: "it is a folder; give a file",
    errno.EEXIST: "the name is already taken; remove that file, or give another path",
    errno.EACCES: "permission denied; change its permissions, or give another path",
    errno.EPERM: "permission denied; change its permissions, or give another path",
    errno.EROFS: "the file system is read-only; give a path on another one",
    errno.ENOENT: "it does not exist; check the path",
    errno.ENXIO: "it is a named pipe that no process has open; give a file",
    errno.EMFILE: "too many open files; raise the limit with `ulimit -n`",
    errno.ENFILE: "too many open files on this machine; close some",
    errno.EILSEQ: "the name is not valid text; rename the file in UTF-8",
}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason_for(e: OSError) -> str:
    return REASONS.get(e.errno or 0) or f"{e.strerror or e}; check it, or give another path"


def refusal(e: OSError) -> MainrunError:
    """Turn an OSError into a MainrunError that names the path, the fault and the fix."""
    names = [
        shown(os.fsdecode(name), 120)
        for name in (e.filename, e.filename2)
        if isinstance(name, str | bytes | os.PathLike)
    ]
    where = " -> ".join(names) or "a file"
    if e.errno in NO_SPACE:
        return DiskFull(
            f"no space left to write {where} ({e.strerror}); free some and start the same command again, it goes on"
        )
    return UsageError(f"{where} cannot be used: {reason_for(e)}")


# -- files


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """A file's bytes. A pipe is never waited for."""
    why = not_a_file(path)
    if why:
        raise BadInput(f"{why}; give a file")
    try:
        size = path.stat().st_size
        data = b"" if size > largest else path.read_bytes()
    except OSError as e:
        raise BadInput(f"cannot be read: {reason_for(e)}") from None
    if size > largest:
        raise BadInput(f"has {size:,} bytes; at most {largest:,} are allowed, so it must be another file")
    return data


def read_text(path: Path, largest: int = LARGEST) -> str:
    """A file's text, in UTF-8, with or without a byte order mark."""
    data = read_bytes(path, largest)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise BadInput("is UTF-16, not UTF-8; save the file as UTF-8")
    at = data.find(b"\0")
    if at >= 0:
        raise BadInput(f"is binary: a NUL byte at offset {at:,}; give a text file in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"is not UTF-8 ({e.reason} at byte {e.start:,}); save the file as UTF-8") from None


# -- documents

DEEP = f"it is nested too deep: at most {DEEPEST} levels are allowed"


TIMES = (datetime.date, datetime.time)  # types of TOML and YAML that no setting uses


def parse_toml(text: str) -> dict[str, Any]:
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise BadInput(DEEP) from None
    except ValueError as e:
        raise BadInput(plain(e)) from None
    check_data(data)
    return data


def toml_value(text: str) -> Any:
    """Parse a TOML value. A text that is not valid TOML is returned as it is."""
    try:
        data = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        data = {"v": text}
    except RecursionError:
        raise BadInput(DEEP) from None
    except ValueError as e:
        raise BadInput(plain(e)) from None
    value = data["v"] if len(data) == 1 else text  # a text of several lines may set more than one key
    if isinstance(value, TIMES):
        value = text
    check_data(value)
    return value


def parse_json(text: str) -> Any:
    """A key that appears twice in one object is refused, because one of the two would be lost."""
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise BadInput(DEEP) from None
    except ValueError as e:
        raise BadInput(plain(e)) from None
    check_data(data)
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadInput(f"the key {shown(twice, 80)} appears twice in one object")
    return data


def parse_yaml(text: str) -> Any:
    import yaml

    if len(text) > LARGEST_YAML:
        raise BadInput(
            f"it has {len(text):,} characters; at most {LARGEST_YAML:,} are allowed in YAML, write JSON"
        )
    try:
        data = yaml.load(text, _yaml_loader())
    except RecursionError:
        raise BadInput(DEEP) from None
    except yaml.YAMLError as e:
        raise BadInput(" ".join(str(e).split())) from None
    except (
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as e:  # a date like 2026-99-99, a list as a key
        raise BadInput(plain(e)) from None
    check_data(data)
    return data


def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":  # "<<" takes over what another mapping has
                    continue
                name = self.construct_object(key, deep=True)
                if name.__hash__ is None:
                    raise BadInput(f"the key {shown(name, 80)} is a list or a table; write a text")
                if name in seen:
                    raise BadInput(f"the key {shown(name, 80)} appears twice in one mapping")
                seen.add(name)
            return super().construct_mapping(node, deep)

    # YAML 1.1 takes 6e-4 for a text; JSON, TOML and YAML 1.2 for a number
    exponent = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    return Loader


def plain(e: Exception) -> str:
    """The message of a parser, without Python's hints for developers."""
    if isinstance(e, RecursionError):
        return DEEP
    digits = re.search(r"value has (\d+) digits", str(e))
    if digits:
        return f"a number has {int(digits[1]):,} digits; at most {MOST_DIGITS} are allowed"
    return str(e) or type(e).__name__


def check_data(data: Any) -> None:
    """Refuse data that the program cannot handle: deep nesting, numbers too long to print, text that cannot be written."""
    todo = [(data, 1)]
    for _ in range(MOST_VALUES):
        if not todo:
            return
        value, level = todo.pop()
        if isinstance(value, dict | list | tuple | set):
            if level > DEEPEST:
                raise BadInput(DEEP)
            todo += [(below, level + 1) for below in value]
            if isinstance(value, dict):
                todo += [(below, level + 1) for below in value.values()]
        else:
            _check_value(value)
    raise BadInput(f"it holds more than {MOST_VALUES:,} values")


def _check_value(value: Any) -> None:
    if isinstance(value, TIMES):
        raise BadInput(f"{value} is a date or a time; write it in quotes")
    if isinstance(value, int) and value.bit_length() > MOST_DIGITS * 3.33:
        raise BadInput(f"a number has more than {MOST_DIGITS} digits")
    if isinstance(value, str) and "\0" in value:
        raise BadInput("a text holds a NUL character; remove it")
    if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise BadInput("a text holds half of a surrogate pair, which is no character; repair or remove it")
