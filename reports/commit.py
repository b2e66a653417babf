"""The code of a submission: what git holds at the commit, never what lies in the folder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mainrun.errors import UsageError
from reports import leaks
from reports.bundle import LIMIT, UNPACKED, collisions, name_fault, show, size

FIRST = 5  # of several findings so many are said


@dataclass
class Commit:
    id: str
    tree: str
    files: dict[str, bytes]
    runnable: list[str]
    left_out: dict[str, str]  # name -> what it is


def git(root: Path, *args: str, given: bytes | None = None) -> bytes:
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
        "GIT_OPTIONAL_LOCKS": "0",
        "LC_ALL": "C",
    }
    try:
        done = subprocess.run(
            ["git", "--no-replace-objects", "-C", str(root), *args], input=given, capture_output=True, env=env
        )
    except FileNotFoundError:
        raise UsageError(
            "git is not installed, and a submission holds the code of a commit; install it"
        ) from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UsageError(f"git {args[0]} failed in {root}: {said[-1] if said else done.returncode}")
    return done.stdout


def head(root: Path, but: Iterable[Path] = ()) -> Commit:
    """The commit that the working tree is at, looked through; refused where the tree is not as it says, or a file may not leave."""
    check_tree(root, but)
    listed = git(root, "ls-tree", "-r", "-l", "-z", "--full-tree", "HEAD")
    entries = [_entry(line) for line in listed.split(b"\0") if line]
    left_out = {name: what for _, _, _, name in entries if (what := leaks.left_out(name))}
    # a key in a folder that stays behind does not leave, but whoever commits one should hear of it
    _refuse(f"{show(name)}: {why}" for _, _, _, name in entries if (why := leaks.secret_name(name)))
    kept = [entry for entry in entries if entry[3] not in left_out]
    _refuse(_odd(kept))
    if (total := sum(length for _, _, length, _ in kept)) > UNPACKED:
        largest = sorted(kept, key=lambda entry: -entry[2])[:3]
        named = ", ".join(f"{show(name)} ({size(length)})" for _, _, length, name in largest)
        raise UsageError(
            f"the commit's code has {size(total)}, a submission at most {size(LIMIT)}; take out of it {named}"
        )
    contents = dict(
        zip((name for *_, name in kept), _blobs(root, [sha for _, sha, _, _ in kept]), strict=True)
    )
    left_out |= {name: "an archive" for name, data in contents.items() if leaks.packed(data)}
    files = {name: data for name, data in contents.items() if name not in left_out}
    check_leaks(files)
    runnable = [name for mode, _, _, name in kept if mode == "100755" and name in files]
    return Commit(
        git(root, "rev-parse", "HEAD").decode().strip(),
        git(root, "rev-parse", "HEAD^{tree}").decode().strip(),
        files,
        runnable,
        left_out,
    )


def check_leaks(files: Mapping[str, bytes]) -> None:
    """Nothing that looks like a key leaves, wherever it stands."""
    _refuse(
        f"{show(name)}, {where}: {what}" for name, data in files.items() for where, what in _leaks(name, data)
    )


def _leaks(name: str, data: bytes) -> Iterator[tuple[str, str]]:
    yield from (("in its name", what) for _, what in leaks.secrets_in(os.fsencode(name)))
    yield from ((f"line {line}", what) for line, what in leaks.secrets_in(data))


def check_tree(root: Path, but: Iterable[Path] = ()) -> None:
    """All of it is committed, in a repository of its own."""
    but = {path.resolve() for path in but}
    try:
        top = Path(os.fsdecode(git(root, "rev-parse", "--show-toplevel").rstrip(b"\n")))
    except UsageError as e:
        if "not a git repository" not in str(e):
            raise
        what = f"{root} is in no git repository, and a submission holds the code of a commit"
        raise UsageError(
            f"{what}; get mainrun by git clone (or git init, then `./task checkpoint`)"
        ) from None
    if top.resolve() != root.resolve():
        raise UsageError(
            f"{root} is a folder of the git repository {top}; a submission needs mainrun in a repository of its own (git clone)"
        )
    try:
        git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except UsageError:
        raise UsageError(f"{root} has no commit yet; `./task checkpoint` makes one") from None
    changed, entries = (
        [],
        iter(git(root, "status", "--porcelain", "-z", "--untracked-files=all", "--no-renames").split(b"\0")),
    )
    for entry in entries:
        name = os.fsdecode(entry[3:])
        if entry and not (entry[:2] == b"??" and (root / name).resolve() in but):
            changed.append(name)
    if changed:
        more = f" and {len(changed) - FIRST} more" if len(changed) > FIRST else ""
        named = ", ".join(show(name) for name in changed[:FIRST])
        raise UsageError(
            f"the working tree is not committed: {named}{more}; `./task checkpoint` commits it (or git commit, or git stash)"
        )


def _entry(line: bytes) -> tuple[str, str, int, str]:
    """(mode, object, length, name)"""
    facts, _, name = line.partition(b"\t")
    mode, _, sha, length = facts.split()
    return mode.decode(), sha.decode(), int(length) if length != b"-" else 0, os.fsdecode(name)


def _odd(entries: list[tuple[str, str, int, str]]) -> Iterator[str]:
    for mode, _, _, name in entries:
        if fault := name_fault(f"code/{name}"):
            yield f"{show(name)}: the name cannot be, {fault}"
        if mode == "120000":
            yield f"{show(name)}: a link; commit the file itself in its place"
        elif mode not in ("100644", "100755"):
            yield f"{show(name)}: another repository inside this one; commit its files themselves"
    yield from collisions(name for *_, name in entries)


def _refuse(findings: Iterable[str]) -> None:
    found = list(findings)
    if found:
        more = [f"and {len(found) - FIRST} more"] if len(found) > FIRST else []
        fix = "take it out (git rm, git commit); a key that was committed is known: have it replaced where it was issued"
        raise UsageError("\n  ".join(["this may not leave the machine:", *found[:FIRST], *more]) + f"\n{fix}")


def _blobs(root: Path, shas: list[str]) -> Iterator[bytes]:
    out = git(root, "cat-file", "--batch", given="".join(f"{sha}\n" for sha in shas).encode())
    at = 0
    for sha in shas:
        end = out.index(b"\n", at)
        _, kind, length = out[at:end].split()
        if kind != b"blob":
            raise UsageError(f"git object {sha} is no file; `git fsck` says what is wrong")
        yield out[end + 1 : end + 1 + int(length)]
        at = end + 2 + int(length)
