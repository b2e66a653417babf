"""The task's dataset on the Hugging Face hub: the corpora `hn` and `hn-2025`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mainrun.data.hub_files import Dataset, endpoint, offline
from mainrun.data.title_files import COLUMN, parquet_column
from mainrun.data.titles import Titles, one_line
from mainrun.errors import CorpusError, HubError, nearest

if TYPE_CHECKING:
    import numpy as np

HUB_REPO = "julien040/hacker-news-posts"
HUB_REVISIONS = {  # the task's published scores are based on hn-2025, and hn is a newer revision
    "hn": "d210f96ddcc592f324c3108dd1d7b7edc03ca788",
    "hn-2025": "9e21b0f3c36bd7ce50b741ce966297a7f73cae38",
}


def open_titles(name: str, argument: str, wanted: int) -> Titles:
    """Return the titles of a hub corpus.

    Blank titles are kept, because the task also keeps blank titles when it shuffles the titles.
    """
    ((path, file),) = _dataset(name).fetch()
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
    ((path, _),) = _dataset(name).fetch()
    return path


def _dataset(name: str) -> Dataset:
    """Return the dataset's parquet file at the pinned revision of a hub corpus."""
    revision = HUB_REVISIONS[name]

    def the_only_file(files: list[str]) -> list[str]:
        if len(files) != 1:
            listed = ", ".join(files) or "none"
            raise HubError(
                f"corpus={name}: {HUB_REPO} at {revision} on {endpoint()} should have one parquet file, "
                f"but has: {listed}; check HF_ENDPOINT"
            )
        return files

    return Dataset(name, HUB_REPO, revision, name, the_only_file)


def hub_reachable(timeout: float = 3.0) -> tuple[bool, str]:
    """Return whether the hub answers a request, and a message that describes the answer."""
    import urllib.error
    import urllib.request

    try:
        url = endpoint()
    except HubError as e:
        return False, str(e)
    if offline():
        return False, f"{url} was not contacted: HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(f"{url}/api/datasets/{HUB_REPO}", timeout=timeout):
            return True, f"{url} answers"
    except urllib.error.HTTPError as e:
        return e.code < 500, f"{url} answers with status {e.code}"
    except (OSError, ValueError) as e:  # URLError is a subclass of OSError
        return False, f"{url} does not answer: {getattr(e, 'reason', e)}"
