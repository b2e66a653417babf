"""Where titles come from, how they are ordered and split, and the fingerprints that say which ones a figure is about.

    synthetic                the seeded grammar of synthetic.py; no network
    hn, hn-2025              the hub dataset of the task, at two pinned revisions; downloaded once, checked at each load
    file:PATH[#COLUMN]       .txt (or any other name): one title a line; .csv with a header, .jsonl, .parquet: a column, `title` by default
    mix:PATH.toml            several of these, see `_mix`

Order: the permutation of all titles by the task's seed, or with shuffle=false the source's own order; the first num_titles
are taken. Split: val is the last val_frac of them, dev the last dev_frac of the rest, train what remains.
A title is one line: spaces around it are cut, line breaks inside it become spaces, and a file's blank titles are skipped and counted.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import os
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mainrun.config import TASK, TrainConfig
from mainrun.core.hardware import cache_dir
from mainrun.errors import CorpusError, DiskFull, HubError, nearest
from mainrun.files import inputs

HUB_REPO = "julien040/hacker-news-posts"
HUB_REVISIONS = {  # the first is newer; the task's public figures are about the second
    "hn": "d210f96ddcc592f324c3108dd1d7b7edc03ca788",
    "hn-2025": "9e21b0f3c36bd7ce50b741ce966297a7f73cae38",
}
COLUMN = "title"
OUR_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
)  # not the hub's fault
KINDS = "synthetic, hn, hn-2025, file:PATH[#COLUMN] or mix:PATH.toml"


@dataclass(frozen=True)
class Corpus:
    name: str
    train: list[str]
    dev: list[str]
    val: list[str]
    fingerprints: dict[str, str]  # corpus, train, dev, val: sha256 of the ordered titles
    origin: dict[str, Any]  # JSON: where the titles came from and what was skipped


@dataclass(frozen=True)
class Rows:
    """A source before selection: how many titles there are, and how to get some of them."""

    count: int
    take: Callable[[Sequence[int]], list[str]]
    origin: dict[str, Any]


def load_corpus(cfg: TrainConfig) -> Corpus:
    if cfg.corpus.startswith("mix:"):
        titles, repeats, origin = _mix(inputs.expanded(cfg.corpus[4:], "corpus"), cfg.num_titles, cfg.shuffle)
    else:
        rows = _rows(cfg.corpus, cfg.num_titles)
        titles, origin = _select(rows, cfg.corpus, cfg.num_titles, cfg.shuffle), rows.origin
        repeats = [1] * len(titles)
    # exact: 0.9 of 20,000 is 18,000 whatever the floats say
    known = int(len(titles) * (1 - Fraction(str(cfg.val_frac))))
    n_train = int(known * (1 - Fraction(str(cfg.dev_frac))))
    if n_train < 1:
        raise CorpusError(
            f"num_titles={cfg.num_titles} with val_frac={cfg.val_frac} and dev_frac={cfg.dev_frac} leaves no title to train on; "
            "raise num_titles, or lower val_frac or dev_frac"
        )
    once, dev, val = titles[:n_train], titles[n_train:known], titles[known:]
    # a repeat stands a whole pass away from the first time; dev and val were cut off before, so no repeat can be in them
    train = [
        t
        for turn in range(max(repeats))
        for t, times in zip(once, repeats[:n_train], strict=True)
        if times > turn
    ]
    seen = set(once).union(dev)
    return Corpus(
        name=cfg.corpus,
        train=train,
        dev=dev,
        val=val,
        fingerprints=fingerprints(train, dev, val),
        # reposts are in real data, and the task's val keeps them: a reader of the figure may want to know how many
        origin=origin
        | {
            "titles": len(titles),
            "train_repeats": len(train) - len(once),
            "val_in_train": sum(t in seen for t in val),
        },
    )


def fingerprints(train: list[str], dev: list[str], val: list[str]) -> dict[str, str]:
    splits = {"corpus": [*train, *dev, *val], "train": train, "dev": dev, "val": val}
    return {name: fingerprint(titles) for name, titles in splits.items()}


def fingerprint(titles: Iterable[str]) -> str:
    """sha256 of the ordered titles, each after its length: no two lists of titles are the same bytes."""
    digest = hashlib.sha256()
    for title in titles:
        data = title.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# -- selection


def _select(rows: Rows, name: str, wanted: int, shuffle: bool) -> list[str]:
    if rows.count < max(wanted, 2):
        got = f"corpus={name} has {rows.count:,} title{'s' * (rows.count != 1)}, num_titles={wanted:,} were asked for"
        if rows.count < 2:
            raise CorpusError(f"{got}; a corpus takes two at least: one to train on, one for val")
        raise CorpusError(f"{got}; use --set num_titles={rows.count}, or a larger corpus")
    return rows.take(_order(rows.count, shuffle)[:wanted])


def _order(count: int, shuffle: bool) -> Any:
    return np.random.default_rng(int(TASK["seed"])).permutation(count) if shuffle else np.arange(count)


def _rows(name: str, wanted: int) -> Rows:
    kind, _, rest = name.partition(":")
    if kind == "synthetic":
        from mainrun.data import synthetic

        # the stream has no end, so it has as many titles as are asked for
        return _listed(synthetic.titles(wanted), {"kind": "synthetic", "seed": synthetic.SEED})
    if kind in HUB_REVISIONS:
        return _hub_rows(kind)
    if kind == "file" and rest:
        return _file_rows(rest)
    raise CorpusError(
        f"corpus={name!r} is not known{nearest(name, ['synthetic', *HUB_REVISIONS])}; allowed: {KINDS}"
    )


def _listed(titles: list[str], origin: dict[str, Any]) -> Rows:
    return Rows(len(titles), lambda indices: [titles[i] for i in indices], origin)


def _one_line(text: str) -> str:
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ").strip()


# -- files


def _file_rows(text: str) -> Rows:
    whole = inputs.expanded(text, "corpus")
    path, column = whole, None
    if "#" in text and not whole.exists():  # a # may be part of the name
        front, _, column = text.rpartition("#")
        path = inputs.expanded(front, "corpus")
    data = _bytes(path, "a file with one title a line, or .csv, .jsonl or .parquet")
    readers = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        if path.suffix.lower() == ".json":
            raise CorpusError(f"{path} is one JSON document; write one object a line, and call it .jsonl")
        if column is not None:
            raise CorpusError(
                f"{path} has lines, not columns, but column {column!r} was asked for; leave out #{column}"
            )
        found = _lines(data, path)
    else:
        found = reader(data, path, column or COLUMN)
    titles = [line for line in map(_one_line, found) if line]
    for number, title in enumerate(titles, 1):
        if not title.isascii() and any("\ud800" <= c <= "\udfff" for c in title):
            raise CorpusError(
                f"{path}: title {number} holds half of a surrogate pair and is no text; repair or remove it"
            )
    if not titles:
        blank = f": all {len(found):,} rows are blank" if found else ""
        raise CorpusError(f"{path} has no titles{blank}; give a file with at least two")
    return _listed(
        titles,
        {
            "kind": "file",
            "path": text,
            "sha256": hashlib.sha256(data).hexdigest(),
            "blank": len(found) - len(titles),
        },
    )


def _bytes(path: Path, allowed: str) -> bytes:
    why = inputs.bad_path(str(path))
    if why:
        raise CorpusError(f"{inputs.shortened(str(path), 120)} cannot be read, {why}; give {allowed}")
    if not path.exists():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise CorpusError(f"{path} does not exist{near}; give {allowed}")
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else f"{inputs.not_a_file(path)}, not a regular file"
        raise CorpusError(f"{path} {kind}; give {allowed}")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CorpusError(f"{path} cannot be read: {e.strerror}; check its permissions") from None
    if not data:
        raise CorpusError(f"{path} is empty; give {allowed}")
    return data


def _text(data: bytes, path: Path) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "binary"
        raise CorpusError(
            f"{path} is {kind}: a NUL byte at offset {nul} (line {data.count(10, 0, nul) + 1}); give a text file in UTF-8"
        )
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as e:
        at = e.start + 3 * data.startswith(b"\xef\xbb\xbf")
        raise CorpusError(
            f"{path} is not UTF-8: byte 0x{data[at]:02x} at offset {at} (line {data.count(10, 0, at) + 1}); save it as UTF-8"
        ) from None


def _lines(data: bytes, path: Path) -> list[str]:
    lines = _text(data, path).split("\n")  # not splitlines: a title may hold U+2028 and its like
    return lines if lines[-1] else lines[:-1]


def _column_of(column: str, columns: Sequence[str], path: Path) -> None:
    if column not in columns:
        names = ", ".join(map(repr, columns)) or "none"
        raise CorpusError(
            f"{path} has no column {column!r}{nearest(column, columns)}; its columns: {names}; write file:{path}#COLUMN"
        )


def _csv(data: bytes, path: Path, column: str) -> list[str]:
    reader = csv.reader(io.StringIO(_text(data, path), newline=""), strict=True)
    found: list[str] = []
    try:
        header = next(reader, [])
        _column_of(column, header, path)
        at = header.index(column)
        for row in reader:
            if row and len(row) <= at:
                raise CorpusError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, but {column!r} is field {at + 1}; repair the line"
                )
            found.append(row[at] if row else "")
    except csv.Error as e:
        if "field larger" in str(e):
            most = f"more than {csv.field_size_limit():,} characters"
            raise CorpusError(
                f"{path}, line {reader.line_num}: a field has {most}; shorten it, or close its quotes"
            ) from None
        raise CorpusError(f"{path}, line {reader.line_num}: not valid CSV ({e}); quote the field") from None
    return found


def _jsonl(data: bytes, path: Path, column: str) -> list[str]:
    found = []
    for number, line in enumerate(_lines(data, path), 1):
        try:
            row = json.loads(line) if line.strip() else {column: None}
        except (ValueError, RecursionError) as e:
            raise CorpusError(
                f"{path}, line {number}: not valid JSON ({inputs.plain(e)}); write one object a line"
            ) from None
        if not isinstance(row, dict):
            raise CorpusError(
                f"{path}, line {number}: got a JSON {type(row).__name__}; write one object a line, with the key {column!r}"
            )
        if column not in row:
            raise CorpusError(
                f"{path}, line {number}: no key {column!r}{nearest(column, row)}; write file:{path}#KEY"
            )
        if not isinstance(row[column], str | None):
            raise CorpusError(
                f"{path}, line {number}: {column!r} is {inputs.shown(row[column])}; it must be a string"
            )
        found.append(row[column] or "")
    return found


def _parquet(data: bytes, path: Path, column: str) -> list[str]:
    return [title or "" for title in _parquet_column(io.BytesIO(data), path, column).to_pylist()]


def _parquet_column(source: Any, path: Path, column: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
        _column_of(column, file.schema_arrow.names, path)
        if file.schema_arrow.names.count(column) > 1:
            raise CorpusError(f"{path} has more than one column called {column!r}; rename all but one")
        found = file.read(columns=[column]).column(column)
        if pa.types.is_dictionary(found.type):
            found = found.cast(found.type.value_type)
    except (pa.ArrowException, OSError) as e:
        reason = str(e).splitlines()[0]
        raise CorpusError(
            f"{path} is no readable parquet file ({reason}); write it again, or use .txt, .csv or .jsonl"
        ) from None
    if not (pa.types.is_string(found.type) or pa.types.is_large_string(found.type)):
        raise CorpusError(f"{path}: column {column!r} holds {found.type}; it must hold strings")
    return found


# -- mixes

MOST_SOURCES = 1000


def _mix(path: Path, wanted: int, shuffle: bool) -> tuple[list[str], list[int], dict[str, Any]]:
    """Titles from several sources, and how often each is presented in train.

        [[source]]
        path = "mine.txt"      # a file, relative to this one; or corpus = "synthetic" | "hn" | "hn-2025" | "file:PATH"
        ratio = 3              # its share of num_titles, among the ratios of all sources (default 1)
        weight = 2             # how often each of its titles is presented in an epoch, a whole number (default 1)

    Each source is ordered as it would be alone and gives its first titles; a title that an earlier source gave, or the source
    itself, is passed over, so all are distinct. The sources are interleaved evenly, so train, dev and val each have the ratios.
    A weight repeats titles of train only.
    """
    text = _text(_bytes(path, "a TOML file with [[source]] tables"), path)
    try:
        sources = inputs.parse_toml(text).get("source")
    except inputs.BadInput as e:
        raise CorpusError(f"{path} is not valid TOML: {e}") from None
    if not isinstance(sources, list) or not sources or not all(isinstance(s, dict) for s in sources):
        raise CorpusError(
            f"{path} names no sources; write [[source]] tables with path (or corpus), ratio and weight"
        )
    if len(sources) > MOST_SOURCES:
        raise CorpusError(f"{path} has {len(sources):,} sources; write at most {MOST_SOURCES:,}")
    names, ratios, weights = zip(
        *(_mix_source(path, i, source) for i, source in enumerate(sources, 1)), strict=True
    )
    shares = _shares(ratios, wanted)
    placed: list[tuple[Fraction, int, str]] = []
    seen: set[str] = set()
    origins = []
    for i, (name, share, weight) in enumerate(zip(names, shares, weights, strict=True)):
        if share == 0:
            raise CorpusError(
                f"{path}, source {i + 1} ({name}): its ratio gives it no title of num_titles={wanted}; raise one of them"
            )
        rows = _rows(name, wanted)  # synthetic: enough for all, whatever was seen before
        fresh: list[str] = []
        order = _order(rows.count, shuffle)
        for title in itertools.chain.from_iterable(
            rows.take(order[at : at + wanted]) for at in range(0, rows.count, wanted)
        ):
            if len(fresh) == share:
                break
            if title not in seen:
                seen.add(title)
                fresh.append(title)
        if len(fresh) < share:
            largest = int(Fraction(len(fresh) * sum(ratios)) / ratios[i])
            raise CorpusError(
                f"{path}, source {i + 1} ({name}): {len(fresh):,} titles that no earlier source has, its ratio asks for {share:,}; "
                f"lower its ratio, or use --set num_titles={largest}"
            )
        placed += [(Fraction(2 * place + 1, 2 * share), i, title) for place, title in enumerate(fresh)]
        origins.append(
            rows.origin | {"source": name, "ratio": float(ratios[i]), "weight": weight, "titles": share}
        )
    placed.sort(key=lambda entry: entry[:2])
    return (
        [title for _, _, title in placed],
        [weights[i] for _, i, _ in placed],
        {"kind": "mix", "path": str(path), "sources": origins},
    )


def _mix_source(path: Path, number: int, source: dict[str, Any]) -> tuple[str, Fraction, int]:
    where = f"{path}, source {number}"
    allowed = ("path", "corpus", "ratio", "weight")
    for key in source:
        if key not in allowed:
            raise CorpusError(
                f"{where}: unknown key {inputs.shown(key, 80)}{nearest(key, allowed)}; allowed: {', '.join(allowed)}"
            )
    if ("path" in source) == ("corpus" in source):
        raise CorpusError(
            f"{where}: got {'both' if 'path' in source else 'none'} of path and corpus; write one of them"
        )
    name = source.get("corpus", f"file:{source.get('path')}")
    kind, _, rest = str(name).partition(":")
    if kind == "mix" or not isinstance(name, str):
        raise CorpusError(
            f"{where}: {inputs.shown(name)} cannot be mixed; write synthetic, hn, hn-2025 or file:PATH"
        )
    if kind == "file":
        name = f"file:{path.parent / inputs.expanded(rest, 'path')}"
    ratio, weight = source.get("ratio", 1), source.get("weight", 1)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < float("inf"):
        raise CorpusError(f"{where}: ratio={inputs.shown(ratio)}; it must be a number above 0")
    if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= 1000:
        raise CorpusError(
            f"{where}: weight={inputs.shown(weight)}; it must be a whole number from 1 to 1000: how often an epoch presents a title"
        )
    return name, Fraction(str(ratio)), weight


def _shares(ratios: Sequence[Fraction], wanted: int) -> list[int]:
    """Whole numbers near the ratios that sum to `wanted`: the largest remainders are rounded up."""
    exact = [ratio * wanted / sum(ratios) for ratio in ratios]
    shares = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: wanted - sum(shares)]:
        shares[i] += 1
    return shares


# -- the hub


def _hub_rows(name: str) -> Rows:
    path, record = _fetch(name)
    try:
        found = _parquet_column(str(path), path, COLUMN)
    except (
        CorpusError
    ) as e:  # the bytes are what the hub promises, so it is the pinned file that is not what we think
        raise HubError(f"corpus={name}: {e}") from None

    def take(indices: Sequence[int]) -> list[str]:
        # rows stay as the dataset has them, blank ones too: the task's permutation is over all
        return [_one_line(title or "") for title in found.take(np.asarray(indices)).to_pylist()]

    return Rows(len(found), take, {"kind": "hub", "verified": True} | record)


def download(name: str) -> Path:
    """Fetch a hub corpus into the cache, or find it there, check it, and say where it is."""
    if name not in HUB_REVISIONS:
        raise CorpusError(
            f"corpus={name!r} is not downloaded{nearest(name, HUB_REVISIONS)}; allowed: {', '.join(HUB_REVISIONS)}"
        )
    return _fetch(name)[0]


def hub_reachable(timeout: float = 3.0) -> tuple[bool, str]:
    """Whether the hub answers now, and a line that says so."""
    import urllib.error
    import urllib.request

    try:
        endpoint = _endpoint()
    except HubError as e:
        return False, str(e)
    if _offline():
        return False, f"{endpoint} is not asked: HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(f"{endpoint}/api/datasets/{HUB_REPO}", timeout=timeout):
            return True, f"{endpoint} answers"
    except urllib.error.HTTPError as e:
        return e.code < 500, f"{endpoint} answers with status {e.code}"
    except (OSError, ValueError) as e:  # URLError is an OSError
        return False, f"{endpoint} does not answer: {getattr(e, 'reason', e)}"


def _endpoint() -> str:
    """The hub's URL, without a slash at its end."""
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port that is no number
        usable = False
    if not usable:
        raise HubError(
            f"got HF_ENDPOINT={inputs.shown(url, 80)}, which is not a URL; write it like https://huggingface.co, or unset it"
        )
    return url


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _fetch(name: str) -> tuple[Path, dict[str, Any]]:
    """The checked parquet of a hub corpus, and what is known of it (repo, revision, file, size, sha256)."""
    revision, cache = HUB_REVISIONS[name], cache_dir() / "hub"
    noted = (
        cache / f"{name}.json"
    )  # what the hub said of the file, kept beside it, so that offline use is checked too
    record = _read_record(noted, revision)
    if record:
        path = cache / record["path"]
        problem = _damage(path, record)
        if problem is None:
            return path, {k: v for k, v in record.items() if k != "path"}
        if _offline():
            raise HubError(
                f"corpus={name}: the cached file {path} {problem}, and HF_HUB_OFFLINE is set; unset it, then start again"
            )
    record = _ask_hub(name, revision)
    path = _from_hub(name, revision, record, cache)
    problem = _damage(path, record)
    if problem:
        _forget(path)
        raise HubError(
            f"corpus={name}: the file from {_endpoint()} {problem}; nothing of it was kept: start again, or set HF_ENDPOINT"
        )
    record = record | {"path": path.relative_to(cache).as_posix()}
    try:
        _write_atomically(noted, json.dumps(record, indent=1))
    except OSError as e:
        raise _unwritable(cache, e) from None
    return path, {k: v for k, v in record.items() if k != "path"}


def _ask_hub(name: str, revision: str) -> dict[str, Any]:
    """Which file the dataset is at this revision, and the checksum that the hub has of it."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=_endpoint()).dataset_info(
            HUB_REPO, revision=revision, files_metadata=True, timeout=10
        )
    except Exception as e:  # the library's errors have no common base: requests', the hub's own, JSON's; all end here, none is lost
        raise _explained(name, revision, e) from e
    files = [f for f in info.siblings or [] if f.rfilename.endswith(".parquet")]
    if len(files) != 1:
        listed = ", ".join(f.rfilename for f in files) or "none"
        where = f"{HUB_REPO} at {revision}, by {_endpoint()}"
        raise HubError(
            f"corpus={name}: {where}, should hold one parquet file, it holds: {listed}; check HF_ENDPOINT"
        )
    if files[0].lfs is None:
        raise HubError(
            f"corpus={name}: {_endpoint()} gives no sha256 of {files[0].rfilename}, so it cannot be checked; check HF_ENDPOINT"
        )
    lfs = files[0].lfs
    return {
        "repo": HUB_REPO,
        "revision": revision,
        "file": files[0].rfilename,
        "size": lfs.size,
        "sha256": lfs.sha256,
    }


def _from_hub(name: str, revision: str, record: dict[str, Any], cache: Path) -> Path:
    from huggingface_hub import hf_hub_download

    # a killed download leaves its part behind, under a name that no other download takes up; one that is alive writes all the time
    for part in cache.glob("*/blobs/*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
    where: dict[str, Any] = {
        "repo_type": "dataset",
        "revision": revision,
        "cache_dir": cache,
        "endpoint": _endpoint(),
    }
    try:
        path = Path(hf_hub_download(HUB_REPO, record["file"], **where))
        if _damage(path, record):  # an old copy gone bad: the library does not look inside
            _forget(path)
            path = Path(hf_hub_download(HUB_REPO, record["file"], **where))
    except Exception as e:  # as in _ask_hub
        raise _explained(name, revision, e) from e
    return path


def _explained(name: str, revision: str, e: Exception) -> Exception:
    """What a failed request means, and what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(e, OSError) and e.errno in OUR_DISK:
        return _unwritable(cache_dir(), e)
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    if isinstance(e, OfflineModeIsEnabled) or _offline():
        return HubError(
            f"corpus={name} is not in the cache ({cache_dir()}) and HF_HUB_OFFLINE is set; "
            "unset it and start again with a network, or use --set corpus=synthetic"
        )
    if isinstance(e, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError) and not isinstance(
        e, LocalEntryNotFoundError
    ):
        return HubError(
            f"corpus={name}: {_endpoint()} does not have {HUB_REPO} at {revision} ({reason}); check HF_ENDPOINT"
        )
    if isinstance(e, HfHubHTTPError):
        return HubError(
            f"corpus={name}: {_endpoint()} refused ({reason}); try again later, or set HF_ENDPOINT to a mirror"
        )
    return HubError(
        f"corpus={name} is not in the cache ({cache_dir()}) and could not be fetched from {_endpoint()}: {reason}; "
        "check the network and start again, set HF_ENDPOINT to a mirror, or use --set corpus=synthetic"
    )


def _damage(path: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with a file, next to what the hub says of it."""
    if not path.is_file():
        return "is gone"
    if path.stat().st_size != record["size"]:
        return f"is damaged: {path.stat().st_size:,} bytes, the hub says {record['size']:,}"
    with path.open("rb") as f:
        got = hashlib.file_digest(f, "sha256").hexdigest()
    return (
        None
        if got == record["sha256"]
        else f"is damaged: sha256 {got[:16]}..., the hub says {record['sha256'][:16]}..."
    )


def _forget(path: Path) -> None:
    """Remove a cached file and the blob that it is a link to, so that the next download starts from nothing."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _read_record(noted: Path, revision: str) -> dict[str, Any] | None:
    """What was noted at the download; nothing when there is none, or none of this revision, or it is torn: then the hub is asked again."""
    try:
        record = json.loads(noted.read_bytes())
        texts = [record[key] for key in ("path", "file", "sha256", "repo")]
        whole = (
            record["revision"] == revision
            and all(isinstance(t, str) for t in texts)
            and isinstance(record["size"], int)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # moved, when all went well
            os.unlink(temporary)


def _unwritable(cache: Path, e: OSError) -> Exception:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"no space left for the download in {cache}; free some, or set MAINRUN_CACHE to another disk, and start again"
        )
    return HubError(
        f"the cache {cache} cannot be written ({e.strerror}); set MAINRUN_CACHE to a folder that can"
    )
