"""Check paths and files that users provide, and format values for error messages.

The functions raise `BadInput` if a file or a document cannot be used. The caller adds the file name to the
start of the error message. For example, the message "is a folder; give a file" becomes "preset.toml is a
folder; give a file".
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
from io import BufferedReader
from pathlib import Path
from typing import Any

from mainrun.errors import DiskFull, MainrunError, UsageError

LARGEST = 16_000_000  # the maximum size of a document in bytes
LARGEST_YAML = 300_000  # the maximum number of characters in a YAML document; parsing takes up to 2 s
DEEPEST = 100  # the maximum depth of nested lists and tables
MOST_VALUES = 1_000_000  # the maximum number of values, because YAML aliases can repeat a list many times
MOST_DIGITS = 300  # the maximum number of digits of an integer; Python prints at most 4,300 digits
LONGEST_NAME = 255  # the maximum length of a file name in bytes, on Linux and macOS
LONGEST_PATH = 4095  # the maximum length of a path in bytes, on Linux
MOST_FOLDERS = 200  # the maximum depth of a path, because `Path.mkdir(parents=True)` is recursive


class BadInput(ValueError):
    """Raised if a file or a document cannot be used. The message names the problem and the fix."""


# -- values in messages


def printable(text: str) -> str:
    """Replace control characters, line breaks and lone surrogates in a string with escapes such as \\n."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]",
        lambda match: match[0].encode("unicode_escape").decode(),
        text,
    )


def shortened(text: str, most: int) -> str:
    """Shorten a string to about `most` characters by replacing its middle with a note."""
    if len(text) <= most:
        return text
    mark = f" [... {len(text) - most:,} characters ...] "
    return text[: 2 * most // 3] + mark + text[len(text) - most // 3 :]


def shown(value: Any, most: int = 200) -> str:
    """Return the `repr` of a value for an error message, shortened to `most` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer has too many digits, or lists are nested too deeply
        text = f"a {type(value).__name__} that cannot be printed"
    return shortened(printable(text), most)


def first_ten(texts: Iterable[str], what: str) -> Iterator[str]:
    """Yield the first ten strings, and then a string that counts the remaining strings.

    `what` is a plural noun for the strings, such as "errors".
    """
    rest = iter(texts)
    for _, text in zip(range(10), rest, strict=False):
        yield text
    more = sum(1 for _ in rest)
    if more:
        yield f"and {more:,} more {what}"


# -- paths


def bad_path(text: str) -> str:
    """Return why a path is invalid and how to fix the path, or an empty string if the path is valid."""
    if not text.strip():
        return "the path is empty; give a path"
    if "\0" in text:
        return "the path contains a NUL character; remove this character"
    name = os.fsencode(text)
    longest = max(len(part) for part in name.split(b"/"))
    if longest > LONGEST_NAME:
        return f"a name has {longest:,} bytes; at most {LONGEST_NAME} are allowed; give a shorter name"
    if len(name) > LONGEST_PATH:
        return f"the path has {len(name):,} bytes; at most {LONGEST_PATH:,} are allowed; give a shorter path"
    if name.count(b"/") > MOST_FOLDERS:
        folders = f"{name.count(b'/'):,} folders"
        return f"the path has {folders}; at most {MOST_FOLDERS} are allowed; give a shorter path"
    try:
        os.stat(text)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES):
            return reason_for(e)
    return ""


def check_path(text: str | Path, what: str) -> None:
    """Raise UsageError if a path is invalid. `what` is the option that sets the path, such as --out."""
    why = bad_path(str(text))
    if why:
        raise UsageError(f"got {what} {shown(str(text), 80)}, but {why}")


def expanded(text: str, what: str) -> Path:
    """Replace ~ in a path with the home folder. `what` is the option or variable that sets the path."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(
            f"got {what} {shown(text, 80)}, but ~ names no user of this machine; write the full path"
        ) from None


def not_a_file(path: Path) -> str:
    """Return why a path is not a regular file, such as "is a folder". Return "" for a regular file.

    The function does not open the path, because opening a named pipe blocks until another process opens the
    pipe for writing.
    """
    why = bad_path(str(path))
    if why:
        return f"cannot be read: {why}"
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
    errno.ENAMETOOLONG: f"the name is too long; give a name of at most {LONGEST_NAME} bytes",
    errno.ELOOP: "it is a symbolic link that leads back to itself; remove the link, or give another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; give another path",
    errno.EISDIR: "it is a folder; give a file",
    errno.EEXIST: "a file with this name exists; remove the file, or give another path",
    errno.EACCES: "permission denied; change its permissions, or give another path",
    errno.EPERM: "permission denied; change its permissions, or give another path",
    errno.EROFS: "the file system is read-only; give a path on another file system",
    errno.ENOENT: "it does not exist; check the path",
    errno.ENXIO: "it is a named pipe that no process has open; give a file",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine; close some of them",
    errno.EILSEQ: "the file name is not valid text; rename the file in UTF-8",
}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FREE_SPACE = "free some space and run the same command again to resume"


def reason_for(e: OSError) -> str:
    """Return why a file operation failed, and how to fix the problem."""
    return REASONS.get(e.errno or 0) or f"{e.strerror or e}; check the path, or give another path"


def refusal(e: OSError) -> MainrunError:
    """Convert an OSError to a MainrunError whose message names the path, the reason and the fix."""
    names = []
    for name in (e.filename, e.filename2):
        if isinstance(name, str | bytes | os.PathLike):
            names.append(shown(os.fsdecode(name), 120))
    where = " -> ".join(names) or "a file"
    if e.errno in NO_SPACE:
        return DiskFull(f"no space left to write {where} ({e.strerror}); {FREE_SPACE}")
    return UsageError(f"{where} cannot be used: {reason_for(e)}")


# -- files


class NotAFile(OSError):
    """Raised if a path should be a regular file but is a pipe, a socket or a device."""


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raise `NotAFile` for pipes, sockets and devices, because reading from them may block.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise NotAFile(errno.EINVAL, f"it {not_a_file(path)}", str(path))
    return path.open("rb")


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a file. `largest` is the maximum size in bytes."""
    why = not_a_file(path)
    if why:
        raise BadInput(f"{why}; give a file")
    try:
        size = path.stat().st_size
        if size > largest:
            raise BadInput(f"has {size:,} bytes; at most {largest:,} are allowed; give a smaller file")
        return path.read_bytes()
    except OSError as e:
        raise BadInput(f"cannot be read: {reason_for(e)}") from None


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark."""
    data = read_bytes(path, largest)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise BadInput("is UTF-16, not UTF-8; save the file as UTF-8")
    offset = data.find(b"\0")
    if offset >= 0:
        raise BadInput(f"is binary: a NUL byte at offset {offset:,}; give a text file in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"is not UTF-8 ({e.reason} at byte {e.start:,}); save the file as UTF-8") from None


# -- documents

TOO_DEEP = f"it is nested too deep: at most {DEEPEST} levels are allowed"
TIMES = (datetime.date, datetime.time)  # the types of dates and times, which no setting accepts


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML document."""
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise BadInput(TOO_DEEP) from None
    except ValueError as e:
        raise BadInput(parser_message(e)) from None
    check_data(data)
    return data


def toml_value(text: str) -> Any:
    """Parse a TOML value. Return the text unchanged if it is a date, a time, or not a TOML value."""
    try:
        data = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        data = {"value": text}
    except RecursionError:
        raise BadInput(TOO_DEEP) from None
    except ValueError as e:
        raise BadInput(parser_message(e)) from None
    value = data["value"]
    # If the text has several lines, it may define keys other than `value` and is not a single TOML value.
    if len(data) > 1 or isinstance(value, TIMES):
        value = text
    check_data(value)
    return value


def parse_json(text: str) -> Any:
    """Parse a JSON document. Raise BadInput if a key appears twice in one object."""
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise BadInput(TOO_DEEP) from None
    except ValueError as e:
        raise BadInput(parser_message(e)) from None
    check_data(data)
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        for key, count in counts.items():
            if count > 1:
                raise BadInput(f"the key {shown(key, 80)} appears twice in one object")
    return data


def parse_yaml(text: str) -> Any:
    """Parse a YAML document."""
    import yaml

    if len(text) > LARGEST_YAML:
        raise BadInput(
            f"it has {len(text):,} characters; at most {LARGEST_YAML:,} are allowed in YAML; use JSON instead"
        )
    try:
        data = yaml.load(text, _yaml_loader())
    except RecursionError:
        raise BadInput(TOO_DEEP) from None
    except yaml.YAMLError as e:
        raise BadInput(" ".join(str(e).split())) from None
    except (ValueError, TypeError, AttributeError, OverflowError) as e:
        # PyYAML raises these errors for an invalid date such as 2026-99-99, and for a key that is a list.
        raise BadInput(parser_message(e)) from None
    check_data(data)
    return data


def _yaml_loader() -> Any:
    """Return a YAML loader class that rejects duplicate keys and reads 6e-4 as a number."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":  # the key "<<" copies all keys of another mapping
                    continue
                name = self.construct_object(key, deep=True)
                if name.__hash__ is None:
                    raise BadInput(f"the key {shown(name, 80)} is a list or a table; use a string as the key")
                if name in seen:
                    raise BadInput(f"the key {shown(name, 80)} appears twice in one mapping")
                seen.add(name)
            return super().construct_mapping(node, deep)

    # In YAML 1.1, 6e-4 is a string. In JSON, TOML and YAML 1.2, 6e-4 is a number.
    exponent = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    return Loader


def parser_message(e: Exception) -> str:
    """Return the message of a parser's exception, without hints that are useful only to Python developers."""
    if isinstance(e, RecursionError):
        return TOO_DEEP
    digits = re.search(r"value has (\d+) digits", str(e))
    if digits:
        return f"a number has {int(digits[1]):,} digits; at most {MOST_DIGITS} are allowed"
    return str(e) or type(e).__name__


def check_data(data: Any) -> None:
    """Raise BadInput if data is nested too deeply, is too large, or contains an unusable value."""
    todo = [(data, 1)]
    for _ in range(MOST_VALUES):
        if not todo:
            return
        value, level = todo.pop()
        if isinstance(value, dict | list | tuple | set):
            if level > DEEPEST:
                raise BadInput(TOO_DEEP)
            todo.extend((inner, level + 1) for inner in value)
            if isinstance(value, dict):
                todo.extend((inner, level + 1) for inner in value.values())
        else:
            _check_value(value)
    raise BadInput(f"it contains more than {MOST_VALUES:,} values")


def _check_value(value: Any) -> None:
    if isinstance(value, TIMES):
        raise BadInput(f"{value} is a date or a time; write it in quotes")
    if isinstance(value, int) and value.bit_length() > MOST_DIGITS * 3.33:
        raise BadInput(f"a number has more than {MOST_DIGITS} digits")
    if isinstance(value, str) and "\0" in value:
        raise BadInput("a string contains a NUL character; remove this character")
    if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise BadInput("a string contains half of a surrogate pair; repair or remove this character")
