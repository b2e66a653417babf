"""Read the code of a submission from a git commit, not from the working tree."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mainrun.errors import UsageError
from reports.submission import leaks
from reports.submission.bundle import (
    MAX_UNPACKED_BYTES,
    MAX_ZIP_BYTES,
    collisions,
    escape,
    format_size,
    name_problem,
)

ROOT = Path(__file__).parents[2]  # the root folder of the repository that contains this module
MAX_LISTED = 5  # the maximum number of problems that an error message lists

EXECUTABLE = "100755"  # the mode that git gives to executable files
PLAIN_FILES = ("100644", EXECUTABLE)
LINK = "120000"


@dataclass
class Commit:
    """A git commit and the files of the commit that belong in a submission."""

    id: str
    tree: str
    files: dict[str, bytes]
    executables: list[str]
    left_out: dict[str, str]  # maps the name of each omitted file to a description of its kind


class TreeEntry(NamedTuple):
    """One line of the output of `git ls-tree`."""

    mode: str
    object_id: str
    size: int
    name: str


def run_git(root: Path, *args: str, stdin: bytes | None = None) -> bytes:
    """Run git and return its stdout. Ignore replacement objects and the GIT_* environment variables."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_OPTIONAL_LOCKS"] = "0"
    env["LC_ALL"] = "C"
    command = ["git", "--no-replace-objects", "-C", str(root), *args]
    try:
        result = subprocess.run(command, input=stdin, capture_output=True, env=env)
    except FileNotFoundError:
        raise UsageError("a submission needs git, which is not installed; install git") from None
    if result.returncode:
        lines = result.stderr.decode("utf-8", "replace").strip().splitlines() or [str(result.returncode)]
        raise UsageError(f"git {args[0]} failed in {root}: {lines[-1]}")
    return result.stdout


def read_head(root: Path, ignored: Iterable[Path] = ()) -> Commit:
    """Read the files of the commit that is checked out.

    Raise UsageError if a file looks like a secret, or if the working tree has uncommitted changes. The files
    in `ignored` may be untracked.
    """
    check_tree(root, ignored)
    entries = _list_tree(root)
    # Check the names of omitted files too, because secrets do not belong in any git commit.
    _refuse(_secret_names(entries))
    left_out = {}
    kept = []
    for entry in entries:
        kind = leaks.left_out(entry.name)
        if kind:
            left_out[entry.name] = kind
        else:
            kept.append(entry)
    _refuse(_entry_problems(kept))
    _check_size(kept)
    files = {}
    for entry, data in zip(kept, _read_objects(root, kept), strict=True):
        if leaks.is_archive(data):
            left_out[entry.name] = "an archive"
        else:
            files[entry.name] = data
    check_leaks(files)
    return Commit(
        id=run_git(root, "rev-parse", "HEAD").decode().strip(),
        tree=run_git(root, "rev-parse", "HEAD^{tree}").decode().strip(),
        files=files,
        executables=[entry.name for entry in kept if entry.mode == EXECUTABLE and entry.name in files],
        left_out=left_out,
    )


def check_leaks(files: Mapping[str, bytes]) -> None:
    """Raise UsageError if the name or the content of a file looks like a secret."""
    _refuse(_leaks(files))


def check_tree(root: Path, ignored: Iterable[Path] = ()) -> None:
    """Raise UsageError unless `root` is a git repository without uncommitted changes.

    The files in `ignored` may be untracked.
    """
    if root.name in ("site-packages", "dist-packages"):
        raise UsageError(
            "mainrun is installed without its repository, but a submission contains the code of a commit; "
            "get mainrun with git clone, and use `./task submit` there"
        )
    try:
        top = Path(os.fsdecode(run_git(root, "rev-parse", "--show-toplevel").rstrip(b"\n")))
    except UsageError as e:
        if "not a git repository" not in str(e):
            raise
        raise UsageError(
            f"{root} is not in a git repository, but a submission contains the code of a commit; "
            "get mainrun with git clone (or run git init, and then `./task checkpoint`)"
        ) from None
    if top.resolve() != root.resolve():
        raise UsageError(
            f"{root} is only a folder in the git repository {top}; "
            "get mainrun with git clone, because a submission needs a repository with mainrun alone"
        )
    try:
        run_git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except UsageError:
        raise UsageError(
            f"the repository {root} has no commit yet; make one with `./task checkpoint`"
        ) from None
    changed = _uncommitted(root, ignored)
    if changed:
        named = ", ".join(escape(name) for name in changed[:MAX_LISTED])
        if len(changed) > MAX_LISTED:
            named += f" and {len(changed) - MAX_LISTED} more"
        raise UsageError(
            f"the working tree has uncommitted changes: {named}; "
            "commit them with `./task checkpoint` (or use git commit or git stash)"
        )


def _uncommitted(root: Path, ignored: Iterable[Path]) -> list[str]:
    """Return the names of all changed files, and of all untracked files that are not in `ignored`."""
    ignored_paths = {path.resolve() for path in ignored}
    status = run_git(root, "status", "--porcelain", "-z", "--untracked-files=all", "--no-renames")
    names = []
    for line in status.split(b"\0"):
        name = os.fsdecode(line[3:])
        is_ignored = line.startswith(b"??") and (root / name).resolve() in ignored_paths
        if line and not is_ignored:
            names.append(name)
    return names


def _list_tree(root: Path) -> list[TreeEntry]:
    entries = []
    for line in run_git(root, "ls-tree", "-r", "-l", "-z", "--full-tree", "HEAD").split(b"\0"):
        if not line:
            continue
        fields, _, name = line.partition(b"\t")
        mode, _, object_id, size = fields.decode().split()
        if size == "-":  # git shows the size of a submodule as "-"
            size = "0"
        entries.append(TreeEntry(mode, object_id, int(size), os.fsdecode(name)))
    return entries


def _read_objects(root: Path, entries: list[TreeEntry]) -> Iterator[bytes]:
    """Yield the content of each entry, using a single git process for all entries."""
    request = "".join(f"{entry.object_id}\n" for entry in entries)
    output = run_git(root, "cat-file", "--batch", stdin=request.encode())
    position = 0
    for entry in entries:
        header_end = output.index(b"\n", position)
        _, kind, size = output[position:header_end].split()
        if kind != b"blob":
            raise UsageError(f"git object {entry.object_id} is not a file; run `git fsck` to find the damage")
        start = header_end + 1
        end = start + int(size)
        yield output[start:end]
        position = end + 1


def _check_size(entries: list[TreeEntry]) -> None:
    total = sum(entry.size for entry in entries)
    if total <= MAX_UNPACKED_BYTES:
        return
    largest = sorted(entries, key=lambda entry: -entry.size)[:3]
    named = ", ".join(f"{escape(entry.name)} ({format_size(entry.size)})" for entry in largest)
    limits = f"{format_size(MAX_UNPACKED_BYTES)} ({format_size(MAX_ZIP_BYTES)} as a zip file)"
    raise UsageError(
        f"the files of the commit have a size of {format_size(total)}, "
        f"but a submission may have at most {limits}; remove {named}"
    )


def _secret_names(entries: list[TreeEntry]) -> Iterator[str]:
    for entry in entries:
        problem = leaks.secret_name(entry.name)
        if problem:
            yield f"{escape(entry.name)}: {problem}"


def _entry_problems(entries: list[TreeEntry]) -> Iterator[str]:
    """Yield a message for each entry that a bundle must not contain."""
    for entry in entries:
        problem = name_problem(f"code/{entry.name}")
        if problem:
            yield f"{escape(entry.name)}: the name is not allowed, {problem}"
        if entry.mode == LINK:
            yield f"{escape(entry.name)}: a link; commit the file itself in its place"
        elif entry.mode not in PLAIN_FILES:
            yield f"{escape(entry.name)}: another repository inside this one; commit its files themselves"
    yield from collisions(entry.name for entry in entries)


def _leaks(files: Mapping[str, bytes]) -> Iterator[str]:
    for name, data in files.items():
        for _, kind in leaks.secrets_in(os.fsencode(name)):
            yield f"{escape(name)}, in its name: {kind}"
        for line, kind in leaks.secrets_in(data):
            yield f"{escape(name)}, line {line}: {kind}"


def _refuse(problems: Iterable[str]) -> None:
    """Raise a UsageError that lists the problems. Do nothing if there are no problems."""
    lines = list(problems)
    if not lines:
        return
    shown = lines[:MAX_LISTED]
    if len(lines) > MAX_LISTED:
        shown.append(f"and {len(lines) - MAX_LISTED} more")
    fix = "remove it with git rm and git commit; a committed key is no longer secret, so replace it"
    raise UsageError("\n  ".join(["a submission must not contain:", *shown]) + f"\n{fix}")
