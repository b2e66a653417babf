"""Download parquet files of datasets from the Hugging Face hub, and verify the sha256 of each file.

The files are stored in the cache folder. A JSON file in the same folder, called the note, contains the size
and the sha256 of each file. The note allows mainrun to verify the files later without a network connection.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mainrun.core.hardware import cache_dir
from mainrun.errors import DiskFull, HubError, MainrunError
from mainrun.files import inputs
from mainrun.files.hashing import sha256_file

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
REPOSITORY_RULE = "write OWNER/NAME with at most 96 letters, digits, dots, dashes and underscores"
ABANDONED = 3600  # a partial download counts as abandoned after this many seconds without a write
LOCAL_ERRORS = (  # errors with these codes are problems of the local disk and not of the hub
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
)


@dataclass(frozen=True)
class HubFile:
    """The metadata of a parquet file of a dataset at one revision on the hub."""

    repo: str
    revision: str
    file: str
    size: int
    sha256: str

    def damage(self, path: Path) -> str:
        """Return how a local file differs from the hub's file, or an empty string if the files are equal."""
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != self.size:
            return f"is damaged: it has {size:,} bytes, but the hub says {self.size:,}"
        sha256 = sha256_file(path)
        if sha256 != self.sha256:
            return f"is damaged: its sha256 is {sha256[:16]}..., but the hub says {self.sha256[:16]}..."
        return ""


@dataclass(frozen=True)
class Dataset:
    """The files of a dataset that a corpus needs."""

    corpus: str  # the value of the config field `corpus`, for messages
    repo: str
    revision: str
    note: str  # the name of the note in the cache
    choose: Callable[[list[str]], list[str]]  # returns the needed files, given all parquet files

    def fetch(self) -> list[tuple[Path, HubFile]]:
        """Return the verified files. Download each file that is missing or damaged."""
        cache = cache_dir() / "hub"
        note = cache / f"{self.note}.json"
        noted = self._verified(cache, _read_note(note, self.revision))
        if noted:
            return noted
        fetched = [(self._download(file, cache), file) for file in self._look_up()]
        try:
            _write_note(note, cache, fetched)
        except OSError as e:
            raise _local_error(cache, e) from None
        return fetched

    def _verified(self, cache: Path, noted: list[tuple[str, HubFile]]) -> list[tuple[Path, HubFile]]:
        """Return the files of a note, or an empty list if a file is missing or damaged."""
        files = []
        for location, file in noted:
            path = cache / location
            damage = file.damage(path)
            if not damage:
                files.append((path, file))
                continue
            if offline():
                raise HubError(
                    f"corpus={self.corpus}: the cached file {path} {damage}, and HF_HUB_OFFLINE is set; "
                    "unset HF_HUB_OFFLINE, then start again"
                )
            return []
        return files

    def _look_up(self) -> list[HubFile]:
        """Get the names, sizes and checksums of the needed files from the hub."""
        with self._request_errors():
            info = dataset_info(self.repo, self.revision)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        files = []
        for name in self.choose([name for name in siblings if name.endswith(".parquet")]):
            lfs = siblings[name].lfs
            if lfs is None:
                raise HubError(
                    f"corpus={self.corpus}: {endpoint()} gives no sha256 for {name}, so it cannot be "
                    "verified; check HF_ENDPOINT"
                )
            files.append(HubFile(self.repo, self.revision, name, lfs.size, lfs.sha256))
        return files

    def _download(self, file: HubFile, cache: Path) -> Path:
        """Download a file unless it is in the cache, and verify it."""
        from huggingface_hub import hf_hub_download

        _remove_abandoned_parts(cache)
        options: dict[str, Any] = {
            "repo_type": "dataset",
            "revision": file.revision,
            "cache_dir": cache,
            "endpoint": endpoint(),
        }
        with self._request_errors():
            path = Path(hf_hub_download(self.repo, file.file, **options))
            # huggingface_hub does not verify the content of a file that it finds in its cache.
            if file.damage(path):
                _delete(path)
                path = Path(hf_hub_download(self.repo, file.file, **options))
        damage = file.damage(path)
        if damage:
            _delete(path)
            raise HubError(
                f"corpus={self.corpus}: the file from {endpoint()} {damage}; the file was deleted; "
                "start again, or set HF_ENDPOINT to a mirror"
            )
        return path

    def _request_errors(self) -> contextlib.AbstractContextManager[None]:
        return dataset_errors(self.corpus, self.repo, self.revision)


def dataset_info(repo: str, revision: str) -> Any:
    """Ask the hub for the commit and the files of a dataset at a revision."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint()).dataset_info(repo, revision=revision, files_metadata=True, timeout=10)


def is_repository(name: str) -> bool:
    """Return whether a name can be the name of a repository on the hub."""
    if not REPOSITORY.fullmatch(name) or "--" in name or ".." in name or len(name) > 96:
        return False
    return not name.endswith((".git", ".", "-"))


def endpoint() -> str:
    """Return the hub's URL without a trailing slash."""
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the URL has empty brackets, or a port that is not a number
        usable = False
    if not usable:
        raise HubError(
            f"got HF_ENDPOINT={inputs.shown(url, 80)}, which is not a URL; "
            "set it to a URL such as https://huggingface.co, or unset it"
        )
    return url


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


# -- the files in the cache


def _remove_abandoned_parts(cache: Path) -> None:
    """Remove the partial files of killed downloads, because later downloads do not resume partial files."""
    for part in cache.glob("*/blobs/*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def _delete(path: Path) -> None:
    """Remove a cached link and the file that it points to, so that the next download starts from scratch."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


# -- the note about the files


def _read_note(note: Path, revision: str) -> list[tuple[str, HubFile]]:
    """Return the path and the metadata of each file in a note, or an empty list if the note is invalid."""
    try:
        records = json.loads(note.read_bytes())
        if isinstance(records, dict):  # the note of a single file
            records = [records]
        files = []
        for r in records:
            files.append((r["path"], HubFile(r["repo"], r["revision"], r["file"], r["size"], r["sha256"])))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    for path, file in files:
        texts = (path, file.repo, file.file, file.sha256)
        if not all(isinstance(text, str) for text in texts) or not isinstance(file.size, int):
            return []
        if file.revision != revision:
            return []
    return files


def _write_note(note: Path, cache: Path, files: list[tuple[Path, HubFile]]) -> None:
    """Write the note atomically, so that other processes never read an incomplete note."""
    records: Any = []
    for path, file in files:
        records.append({**asdict(file), "path": path.relative_to(cache).as_posix()})
    if len(records) == 1:
        (records,) = records
    note.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=note.parent, prefix=note.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(json.dumps(records, indent=1))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, note)
    finally:
        with contextlib.suppress(FileNotFoundError):  # a renamed file cannot be removed
            os.unlink(temporary)


# -- errors


@dataclass(frozen=True)
class Request:
    """What was requested from the hub, for the messages of errors."""

    what: str  # the repository and the revision
    instead: str  # what the user can do without this request
    corpus: str = ""  # the value of the config field `corpus`, if the request belongs to a corpus

    @property
    def subject(self) -> str:
        if self.corpus:
            return f"corpus={self.corpus}"
        return self.what

    @property
    def prefix(self) -> str:
        if self.corpus:
            return f"corpus={self.corpus}: "
        return ""


def dataset_errors(corpus: str, repo: str, revision: str) -> contextlib.AbstractContextManager[None]:
    """Convert the errors of requests for a dataset, as `request_errors` does."""
    return request_errors(Request(f"{repo} at {revision}", "use --set corpus=synthetic", corpus))


@contextlib.contextmanager
def request_errors(request: Request) -> Iterator[None]:
    """Convert the errors of huggingface_hub to errors that explain the cause and the fix.

    A server may repeat the access token in its reply, so the messages contain no text of the library.
    `from None` also removes the library's message from the traceback of --debug.
    """
    try:
        yield
    except MainrunError:
        raise
    # The hub library, the HTTP client and the JSON parser raise exceptions without a common base class.
    except Exception as e:
        raise _explained(request, e) from None


def _explained(request: Request, e: Exception) -> MainrunError:
    if isinstance(e, OSError) and e.errno in LOCAL_ERRORS:
        return _local_error(cache_dir(), e)
    missing = f"{request.subject} is not in the cache ({cache_dir()})"
    if offline():
        return HubError(
            f"{missing} and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE and start again with a network, "
            f"or {request.instead}"
        )
    status = _status(e)
    if status:
        return HubError(f"{request.prefix}{endpoint()} {_refusal(status, request.what, e)}")
    reason = type(e).__name__
    codes = [cause.errno for cause in causes(e) if isinstance(cause, OSError) and cause.errno]
    if codes and codes[-1] > 0:
        reason = f"{reason}, {os.strerror(codes[-1])}"
    if isinstance(e, ValueError | LookupError | TypeError | AttributeError) and not codes:
        return HubError(
            f"{request.prefix}{endpoint()} sent a reply about {request.what} that is not the reply of a hub "
            f"({reason}); check HF_ENDPOINT, and start again"
        )
    return HubError(
        f"{missing} and could not be fetched from {endpoint()}: {reason}; "
        f"check the network and start again, set HF_ENDPOINT to a mirror, or {request.instead}"
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and the errors that caused it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _status(e: Exception) -> int:
    """Return the status with which the server refused a request, or 0 if it did not refuse a request."""
    for cause in causes(e):
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int) and status >= 400:
            return status
    return 0


def _refusal(status: int, what: str, e: Exception) -> str:
    """Return what the server did, and how to fix it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(e, GatedRepoError):
        return f"asks for access to {what} (status {status}); get access on its page, and {log_in}"
    if status == 404:
        return (
            f"does not have {what} (status 404); check the name, the revision and HF_ENDPOINT, "
            f"or {log_in} if it is private"
        )
    if isinstance(e, RepositoryNotFoundError):  # the hub answers 401 for a name that it does not have
        return (
            f"does not have {what}, or it is private (status {status}); "
            f"check the name, the revision and HF_ENDPOINT, or {log_in}"
        )
    if status in (401, 403):
        return f"refused the request for {what} (status {status}); {log_in}, with a token that may read it"
    return (
        f"refused the request for {what} (status {status}); try again later, or set HF_ENDPOINT to a mirror"
    )


def _local_error(cache: Path, e: OSError) -> MainrunError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"no space left for the download in {cache}; "
            "free some space, or set MAINRUN_CACHE to a folder on another disk, and start again"
        )
    return HubError(
        f"the cache {cache} cannot be written ({e.strerror}); set MAINRUN_CACHE to a writable folder"
    )
