"""Download the task's dataset from the Hugging Face hub, and verify the sha256 of the downloaded file.

The downloaded file is stored in the cache folder. A JSON file in the same folder, called the note, contains
the size and the sha256 of the download. The note allows mainrun to verify the download later without a
network connection.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import time
import urllib.parse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.core.hardware import cache_dir
from mainrun.data.title_files import COLUMN, parquet_column
from mainrun.data.titles import Titles, one_line
from mainrun.errors import CorpusError, DiskFull, HubError, nearest
from mainrun.files import inputs
from mainrun.files.hashing import sha256_file

if TYPE_CHECKING:
    import numpy as np

HUB_REPO = "julien040/hacker-news-posts"
HUB_REVISIONS = {  # the task's published scores are based on hn-2025, and hn is a newer revision
    "hn": "d210f96ddcc592f324c3108dd1d7b7edc03ca788",
    "hn-2025": "9e21b0f3c36bd7ce50b741ce966297a7f73cae38",
}
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
    """The metadata of the dataset's parquet file at one revision on the hub."""

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


def open_titles(name: str, argument: str, wanted: int) -> Titles:
    """Return the titles of a hub corpus.

    Blank titles are kept, because the task also keeps blank titles when it shuffles the titles.
    """
    path, file = _fetch(name)
    try:
        column = parquet_column(str(path), path, COLUMN)
    except CorpusError as e:  # the download is intact, so the file on the hub must have a wrong format
        raise HubError(f"corpus={name}: {e}") from None

    def take(positions: np.ndarray) -> list[str]:
        return [one_line(title or "") for title in column.take(positions).to_pylist()]

    return Titles(len(column), take, {"kind": "hub", "verified": True, **asdict(file)})


def download(name: str) -> Path:
    """Return the path of a hub corpus in the cache. If the corpus is not in the cache, download it first."""
    if name not in HUB_REVISIONS:
        raise CorpusError(
            f"corpus={name!r} cannot be downloaded{nearest(name, HUB_REVISIONS)}; "
            f"allowed: {', '.join(HUB_REVISIONS)}"
        )
    path, _ = _fetch(name)
    return path


def hub_reachable(timeout: float = 3.0) -> tuple[bool, str]:
    """Return whether the hub answers a request, and a message that describes the answer."""
    import urllib.error
    import urllib.request

    try:
        endpoint = _endpoint()
    except HubError as e:
        return False, str(e)
    if _offline():
        return False, f"{endpoint} was not contacted: HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(f"{endpoint}/api/datasets/{HUB_REPO}", timeout=timeout):
            return True, f"{endpoint} answers"
    except urllib.error.HTTPError as e:
        return e.code < 500, f"{endpoint} answers with status {e.code}"
    except (OSError, ValueError) as e:  # URLError is a subclass of OSError
        return False, f"{endpoint} does not answer: {getattr(e, 'reason', e)}"


def _endpoint() -> str:
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


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


# -- the download


def _fetch(name: str) -> tuple[Path, HubFile]:
    """Return the verified parquet file of a hub corpus. Download the file if it is missing or damaged."""
    revision = HUB_REVISIONS[name]
    cache = cache_dir() / "hub"
    note = cache / f"{name}.json"
    noted = _read_note(note, revision)
    if noted is not None:
        location, file = noted
        path = cache / location
        damage = file.damage(path)
        if not damage:
            return path, file
        if _offline():
            raise HubError(
                f"corpus={name}: the cached file {path} {damage}, and HF_HUB_OFFLINE is set; "
                "unset HF_HUB_OFFLINE, then start again"
            )
    file = _look_up(name, revision)
    path = _download(name, file, cache)
    damage = file.damage(path)
    if damage:
        _delete(path)
        raise HubError(
            f"corpus={name}: the file from {_endpoint()} {damage}; the file was deleted; "
            "start again, or set HF_ENDPOINT to a mirror"
        )
    try:
        _write_note(note, path.relative_to(cache).as_posix(), file)
    except OSError as e:
        raise _local_error(cache, e) from None
    return path, file


def _look_up(name: str, revision: str) -> HubFile:
    """Get the name, size and checksum of the dataset's parquet file from the hub."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=_endpoint()).dataset_info(
            HUB_REPO, revision=revision, files_metadata=True, timeout=10
        )
    # The hub library, the HTTP client and the JSON parser raise exceptions without a common base class.
    except Exception as e:
        raise _explained(name, revision, e) from e
    files = [f for f in info.siblings or [] if f.rfilename.endswith(".parquet")]
    if len(files) != 1:
        listed = ", ".join(f.rfilename for f in files) or "none"
        raise HubError(
            f"corpus={name}: {HUB_REPO} at {revision} on {_endpoint()} should have one parquet file, "
            f"but has: {listed}; check HF_ENDPOINT"
        )
    (file,) = files
    if file.lfs is None:
        raise HubError(
            f"corpus={name}: {_endpoint()} gives no sha256 for {file.rfilename}, so it cannot be verified; "
            "check HF_ENDPOINT"
        )
    return HubFile(HUB_REPO, revision, file.rfilename, file.lfs.size, file.lfs.sha256)


def _download(name: str, file: HubFile, cache: Path) -> Path:
    from huggingface_hub import hf_hub_download

    _remove_abandoned_parts(cache)
    options: dict[str, Any] = {
        "repo_type": "dataset",
        "revision": file.revision,
        "cache_dir": cache,
        "endpoint": _endpoint(),
    }
    try:
        path = Path(hf_hub_download(HUB_REPO, file.file, **options))
        # huggingface_hub does not verify the content of a file that it finds in its cache.
        if file.damage(path):
            _delete(path)
            path = Path(hf_hub_download(HUB_REPO, file.file, **options))
    except Exception as e:  # the exceptions of huggingface_hub have no common base class
        raise _explained(name, file.revision, e) from e
    return path


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


# -- the note about a download


def _read_note(note: Path, revision: str) -> tuple[str, HubFile] | None:
    """Read the path and the metadata of the download from its note, or return None if the note is invalid."""
    try:
        record = json.loads(note.read_bytes())
        path = record["path"]
        file = HubFile(record["repo"], record["revision"], record["file"], record["size"], record["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    texts = (path, file.repo, file.file, file.sha256)
    valid = all(isinstance(text, str) for text in texts) and isinstance(file.size, int)
    if not valid or file.revision != revision:
        return None
    return path, file


def _write_note(note: Path, path: str, file: HubFile) -> None:
    """Write the note atomically, so that other processes never read an incomplete note."""
    text = json.dumps({**asdict(file), "path": path}, indent=1)
    note.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=note.parent, prefix=note.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, note)
    finally:
        with contextlib.suppress(FileNotFoundError):  # a renamed file cannot be removed
            os.unlink(temporary)


# -- errors


def _explained(name: str, revision: str, e: Exception) -> Exception:
    """Convert the error of a failed request to an error whose message explains the cause and the fix."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(e, OSError) and e.errno in LOCAL_ERRORS:
        return _local_error(cache_dir(), e)
    missing = f"corpus={name} is not in the cache ({cache_dir()})"
    if isinstance(e, OfflineModeIsEnabled) or _offline():
        return HubError(
            f"{missing} and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE and start again with a network, "
            "or use --set corpus=synthetic"
        )
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    not_found = RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError
    if isinstance(e, not_found) and not isinstance(e, LocalEntryNotFoundError):
        return HubError(
            f"corpus={name}: {_endpoint()} does not have {HUB_REPO} at {revision} ({reason}); "
            "check HF_ENDPOINT"
        )
    if isinstance(e, HfHubHTTPError):
        return HubError(
            f"corpus={name}: {_endpoint()} refused the request ({reason}); "
            "try again later, or set HF_ENDPOINT to a mirror"
        )
    return HubError(
        f"{missing} and could not be fetched from {_endpoint()}: {reason}; "
        "check the network and start again, set HF_ENDPOINT to a mirror, or use --set corpus=synthetic"
    )


def _local_error(cache: Path, e: OSError) -> Exception:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"no space left for the download in {cache}; "
            "free some space, or set MAINRUN_CACHE to a folder on another disk, and start again"
        )
    return HubError(
        f"the cache {cache} cannot be written ({e.strerror}); set MAINRUN_CACHE to a writable folder"
    )
