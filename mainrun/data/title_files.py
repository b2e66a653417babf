"""Read titles from a file: `file:PATH[#COLUMN]`.

In a .csv, .jsonl or .parquet file, the titles are in one column, which is `title` by default. A .csv file
needs a header row. A file of any other type has one title per line. Blank titles are skipped and counted.

Line breaks inside a title become spaces. With `documents`, each text is kept as it is.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mainrun.data.titles import Titles, as_documents, as_titles, check_unicode, from_list
from mainrun.errors import CorpusError, nearest
from mainrun.files import inputs

COLUMN = "title"
BOM = b"\xef\xbb\xbf"


def open_titles(name: str, argument: str, wanted: int) -> Titles:
    """Return the titles of a file. The argument has the form PATH[#COLUMN]."""
    return _open(argument, as_titles)


def open_documents(name: str, argument: str, wanted: int) -> Titles:
    """Return the texts of a file with their line breaks and blanks."""
    return _open(argument, as_documents)


def _open(argument: str, prepare: Callable[[list[str]], list[str]]) -> Titles:
    path, column = _path_and_column(argument)
    data = read_bytes(path, "a file with one title per line, or a .csv, .jsonl or .parquet file")
    raw = _raw_titles(data, path, column)
    titles = prepare(raw)
    check_unicode(titles, path)
    if not titles:
        blank = f": all {len(raw):,} rows are blank" if raw else ""
        raise CorpusError(f"{path} has no titles{blank}; give a file with at least two titles")
    origin = {
        "kind": "file",
        "path": argument,
        "sha256": hashlib.sha256(data).hexdigest(),
        "blank": len(raw) - len(titles),
    }
    return from_list(titles, origin)


def _path_and_column(argument: str) -> tuple[Path, str | None]:
    path = inputs.expanded(argument, "corpus")
    if "#" not in argument or path.exists():  # the name of a file may contain "#"
        return path, None
    front, _, column = argument.rpartition("#")
    return inputs.expanded(front, "corpus"), column


def _raw_titles(data: bytes, path: Path, column: str | None) -> list[str]:
    suffix = path.suffix.lower()
    reader = READERS.get(suffix)
    if reader is not None:
        return reader(data, path, column or COLUMN)
    if suffix == ".json":
        raise CorpusError(f"{path} is a single JSON document; write a .jsonl file with one object per line")
    if column is not None:
        raise CorpusError(
            f"{path} has lines and no columns, but the corpus names column {column!r}; remove #{column}"
        )
    return _lines(data, path)


def read_bytes(path: Path, allowed: str) -> bytes:
    """Read a file that the user names. `allowed` describes the valid files in error messages."""
    why = inputs.bad_path(str(path))
    if why:
        raise CorpusError(f"{inputs.shortened(str(path), 120)} cannot be read: {why}; give {allowed}")
    if not path.exists():
        suggestion = ""
        if path.parent.is_dir():
            suggestion = nearest(path.name, (p.name for p in path.parent.iterdir()))
        raise CorpusError(f"{path} does not exist{suggestion}; give {allowed}")
    if path.is_dir():
        raise CorpusError(f"{path} is a directory; give {allowed}")
    if not path.is_file():
        raise CorpusError(f"{path} {inputs.not_a_file(path)}, not a regular file; give {allowed}")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CorpusError(f"{path} cannot be read: {e.strerror}; check its permissions") from None
    if not data:
        raise CorpusError(f"{path} is empty; give {allowed}")
    return data


def decode(data: bytes, path: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark."""
    nul = data.find(b"\0")
    if nul >= 0:
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "binary"
        line = data.count(b"\n", 0, nul) + 1
        raise CorpusError(
            f"{path} is {kind}: a NUL byte at offset {nul} (line {line}); give a text file in UTF-8"
        )
    try:
        return data.removeprefix(BOM).decode()
    except UnicodeDecodeError as e:
        offset = e.start + len(BOM) * data.startswith(BOM)
        line = data.count(b"\n", 0, offset) + 1
        raise CorpusError(
            f"{path} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset} (line {line}); "
            "save it as UTF-8"
        ) from None


# -- a reader for each file format, which returns the raw titles of a file


def _lines(data: bytes, path: Path) -> list[str]:
    # `splitlines` would also split a title at U+2028 and similar characters.
    lines = decode(data, path).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]  # the end of a line may be CRLF


def _csv(data: bytes, path: Path, column: str) -> list[str]:
    reader = csv.reader(io.StringIO(decode(data, path), newline=""), strict=True)
    titles: list[str] = []
    try:
        header = next(reader, [])
        _check_column(column, header, path)
        index = header.index(column)
        for row in reader:
            if row and len(row) <= index:
                problem = f"{len(row)} fields, but {column!r} is field {index + 1}"
                raise CorpusError(f"{path}, line {reader.line_num}: {problem}; repair the line")
            titles.append(row[index] if row else "")
    except csv.Error as e:
        where = f"{path}, line {reader.line_num}"
        if "field larger" in str(e):
            limit = f"more than {csv.field_size_limit():,} characters"
            raise CorpusError(f"{where}: a field has {limit}; shorten it, or close its quotes") from None
        raise CorpusError(f"{where}: the line is not valid CSV ({e}); quote the field") from None
    return titles


def _jsonl(data: bytes, path: Path, column: str) -> list[str]:
    titles = []
    for number, line in enumerate(_lines(data, path), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line) if line.strip() else {column: None}
        except (ValueError, RecursionError) as e:
            raise CorpusError(
                f"{where}: the line is not valid JSON ({inputs.parser_message(e)}); write one object per line"
            ) from None
        if not isinstance(row, dict):
            raise CorpusError(
                f"{where}: got a JSON {type(row).__name__}; write one object with the key {column!r} per line"
            )
        if column not in row:
            raise CorpusError(
                f"{where}: the object has no key {column!r}{nearest(column, row)}; "
                f"name another key with file:{path}#KEY"
            )
        if not isinstance(row[column], str | None):
            raise CorpusError(f"{where}: {column!r} must be a string, got {inputs.shown(row[column])}")
        titles.append(row[column] or "")
    return titles


def _parquet(data: bytes, path: Path, column: str) -> list[str]:
    return [title or "" for title in parquet_column(io.BytesIO(data), path, column).to_pylist()]


def parquet_column(file: Any, path: Path, column: str, corpus: str = "") -> Any:
    """Return a column of strings in a parquet file as a pyarrow array. Error messages contain `path`.

    corpus: how a user names the file in the config, without the column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        _check_column(column, names, path, corpus)
        if names.count(column) > 1:
            raise CorpusError(f"{path} has more than one column called {column!r}; rename all but one")
        values = table.read(columns=[column]).column(column)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
    except (pa.ArrowException, OSError) as e:
        reason = str(e).splitlines()[0]
        raise CorpusError(
            f"{path} is not a readable parquet file ({reason}); write it again, or use .txt, .csv or .jsonl"
        ) from None
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise CorpusError(f"{path}: column {column!r} contains {values.type}; it must contain strings")
    return values


def _check_column(column: str, columns: Sequence[str], path: Path, corpus: str = "") -> None:
    if column not in columns:
        names = ", ".join(map(repr, columns)) or "none"
        raise CorpusError(
            f"{path} has no column {column!r}{nearest(column, columns)}; its columns are {names}; "
            f"name one of them with {corpus or f'file:{path}'}#COLUMN"
        )


READERS: dict[str, Callable[[bytes, Path, str], list[str]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}
