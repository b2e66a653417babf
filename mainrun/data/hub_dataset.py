"""Read texts from any dataset on the Hugging Face hub: `hub:OWNER/NAME@COMMIT[/GLOB]#COLUMN`.

The texts are in one column of the dataset's parquet files, or of the parquet files whose paths match GLOB. In
a GLOB, `*` also matches `/`. The files are read in order of name. COMMIT is a full commit of 40 digits, so
that the corpus is the same on every machine. Blank texts are skipped and counted.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mainrun.data.hub_files import (
    REPOSITORY_RULE,
    Dataset,
    HubFile,
    dataset_errors,
    dataset_info,
    endpoint,
    is_repository,
)
from mainrun.data.title_files import parquet_column
from mainrun.data.titles import Titles, as_documents, as_titles, from_list
from mainrun.errors import CorpusError, HubError
from mainrun.files import inputs

SYNTAX = "hub:OWNER/NAME@COMMIT[/GLOB]#COLUMN"
CORPUS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<place>[^#]*))?(?:#(?P<column>.+))?")
COMMIT = re.compile(r"(?P<commit>[0-9a-f]{40})(?:/(?P<glob>.+))?")
# a branch or a tag, followed by a glob; the hub has branches such as refs/convert/parquet
BRANCH = re.compile(r"(?P<branch>refs/[^/]+/[^/]+|[^/]*)(?P<glob>/.*)?")


class Place(NamedTuple):
    """The parts of a corpus of the form hub:OWNER/NAME@COMMIT[/GLOB]#COLUMN."""

    corpus: str
    repo: str
    commit: str
    glob: str
    column: str


def open_titles(name: str, argument: str, wanted: int) -> Titles:
    """Return the texts of a dataset, each on one line."""
    return _open(argument, as_titles)


def open_documents(name: str, argument: str, wanted: int) -> Titles:
    """Return the texts of a dataset with their line breaks and blanks."""
    return _open(argument, as_documents)


def _open(argument: str, prepare: Callable[[list[str]], list[str]]) -> Titles:
    place = _place(argument)
    files = _dataset(place).fetch()
    texts: list[str] = []
    rows = 0
    for path, file in files:
        raw = _column(place, path, file)
        rows += len(raw)
        texts += prepare(raw)
    if not texts:
        raise CorpusError(
            f"corpus={place.corpus} has no texts: all {rows:,} rows are blank; use another column"
        )
    origin = {
        "kind": "dataset",
        "verified": True,
        "repo": place.repo,
        "revision": place.commit,
        "column": place.column,
        "files": {file.file: file.sha256 for _, file in files},
        "blank": rows - len(texts),
    }
    return from_list(texts, origin)


def _column(place: Place, path: Path, file: HubFile) -> list[str]:
    corpus = place.corpus.removesuffix(f"#{place.column}")
    try:
        column = parquet_column(str(path), Path(file.file), place.column, corpus)
    except CorpusError as e:
        raise CorpusError(f"corpus={place.corpus}: {e}") from None
    return [text or "" for text in column.to_pylist()]


def _dataset(place: Place) -> Dataset:
    """Return the dataset's parquet files that match the glob of a corpus."""

    def matching(files: list[str]) -> list[str]:
        chosen = sorted(file for file in files if fnmatch.fnmatchcase(file, place.glob))
        if not chosen:
            names = ", ".join(inputs.first_ten(sorted(files), "files")) or "none"
            raise CorpusError(
                f"corpus={place.corpus}: no parquet file of {place.repo} matches {place.glob!r}; "
                f"its parquet files: {names}; write a GLOB that matches one of them"
            )
        return chosen

    identity = hashlib.sha256(f"{place.repo}@{place.commit}/{place.glob}".encode()).hexdigest()
    return Dataset(place.corpus, place.repo, place.commit, f"dataset-{identity[:32]}", matching)


# -- the value of the config field `corpus`


def _place(argument: str) -> Place:
    corpus = f"hub:{argument}"
    match = CORPUS.fullmatch(argument)
    if not match:
        raise CorpusError(f"corpus={inputs.shown(corpus)} is not a dataset on the hub; write {SYNTAX}")
    if not is_repository(match["repo"]):
        raise CorpusError(
            f"corpus={corpus}: {match['repo']} is not the name of a repository; {REPOSITORY_RULE}"
        )
    if not match["column"]:
        raise CorpusError(f"corpus={corpus} names no column; write {SYNTAX}, where COLUMN contains the texts")
    at_commit = COMMIT.fullmatch(match["place"] or "")
    if not at_commit:
        raise _without_commit(corpus, match["repo"], match["place"] or "main", match["column"])
    return Place(corpus, match["repo"], at_commit["commit"], at_commit["glob"] or "*", match["column"])


def _without_commit(corpus: str, repo: str, place: str, column: str) -> Exception:
    """Return an error that states the current commit of a branch or a tag."""
    match = BRANCH.fullmatch(place)
    assert match is not None  # the pattern matches every string
    branch = match["branch"] or "main"
    try:
        commit = _current_commit(corpus, repo, branch)
    except HubError as e:
        return CorpusError(
            f"corpus={corpus} names no full commit of 40 digits; its current commit is not known: {e}"
        )
    fixed = f"hub:{repo}@{commit}{match['glob'] or ''}#{column}"
    return CorpusError(
        f"corpus={corpus} names no full commit of 40 digits, so its texts could change; "
        f"the current commit of {branch} is {commit}; use --set corpus={fixed}"
    )


def _current_commit(corpus: str, repo: str, branch: str) -> str:
    with dataset_errors(corpus, repo, branch):
        commit = dataset_info(repo, branch).sha
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise HubError(f"{endpoint()} did not return a commit for {repo} at {branch}; check HF_ENDPOINT")
    return commit
