"""Implement `mainrun submit`, which checks a finished run and bundles the run with its code and report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mainrun.errors import RunError, UsageError
from mainrun.store.rundir import RunDir, check_regular_file, disk_errors, find, fsync_folder, to_json
from reports.submission import bundle
from reports.submission.bundle import CODE, MANIFEST, REPORT, RUN, format_size, sha256
from reports.submission.commit import ROOT, Commit, check_leaks, read_head
from reports.submission.finished_run import (
    FIGURES,
    RESTORE,
    RUN_FILES,
    complete_summary,
    missing_quotes,
    pdf_text,
)
from reports.submission.replay_process import run_replay

OPTIONAL_RUN_FILES = ("growth.jsonl",)

# Maps the name of each guard to a suggestion that is shown if the guard fails.
FIXES = {
    "coverage": "score every token: train again with the scoring.py of the repository",
    "geometry": (
        "keep official_geometry, batch_size and block_size as they were at the start, "
        "and train again with --fresh"
    ),
    "denominator": (
        "restore mainrun/data/token_cache.py, which counts the characters of the titles, "
        "and train again with --fresh"
    ),
    "last_and_best": "the summary and metrics.jsonl disagree: restore them, or train again with --fresh",
    "same_evaluate": (
        "restore the scoring.py that the run began with (git log shows it), or train again with --fresh"
    ),
    "no_learning": (
        "a model must not change while it is scored: remove the state that forward keeps, and train again"
    ),
    "targets_unseen": "the model's forward must not use targets: remove them, and train again",
    "causality": "a position may attend only to itself and earlier positions: fix the mask, and train again",
    "random_start": "start from random weights: train again with an empty start, `--set start=`",
    "lossless_tokens": (
        "decoding must return the title: use tokenizer=bpe or unigram unchanged, and train again"
    ),
    "no_val_tokens": (
        "fit the tokenizer on train alone (tokenizer_fit=train) or with a smaller vocab_size, and train again"
    ),
    "data_known": (
        "restore the titles that the run was trained on, or train on the current titles with --fresh"
    ),
    "task_rules": "submit a run with the epochs, seed, titles and val_frac of the task",
    "presentations": (
        "the ledger must count every forward pass: restore the count in train.py, "
        "and train again with --fresh"
    ),
}


@dataclass
class Submission:
    """A submission that passed all checks. All files of the submission are kept in memory."""

    files: dict[str, bytes]
    data: bytes  # the content of the zip file
    commit: Commit
    manifest: dict[str, Any]
    flags: list[str]  # reasons from guards why the scores cannot be compared with the task's scores
    notes: list[str]


def choose_run(name: str | None, runs: Path) -> RunDir:
    """Find a run by its name. If no name is given, return the only finished run."""
    if name:
        return find(name, runs)
    finished = sorted(path.parent.name for path in runs.glob("*/summary.json"))
    if not finished:
        raise UsageError(
            f"no --run was given, and {runs} has no finished run; train a run, then give --run RUN"
        )
    if len(finished) > 1:
        raise UsageError(
            f"no --run was given, and {runs} has several finished runs ({', '.join(finished[:5])}); "
            "choose one of them with --run RUN"
        )
    return RunDir(runs / finished[0])


def prepare(
    run: RunDir, report: Path, out: Path, note: Callable[[str], None], root: Path = ROOT
) -> Submission:
    """Run all checks, and create the zip file in memory. The fast checks run before the slow checks."""
    summary = complete_summary(run)
    pdf = _read_report(report, summary)
    commit = read_head(root, ignored=(report, out))
    files, notes = _run_files(run)
    files[REPORT] = pdf
    check_leaks(files)  # `read_head` has already checked the files of the commit
    for name, data in commit.files.items():
        files[CODE + name] = data
    note(f"the guards are run by the code of commit {commit.id[:12]}")
    guards = _run_guards(run, commit, summary)
    manifest = _make_manifest(summary, commit, guards, files)
    files[MANIFEST] = to_json(manifest).encode()
    data = bundle.pack(files, (CODE + name for name in commit.executables))
    _check_size(files, data)
    flags = [f"{guard['name']}: {guard['detail']}" for guard in guards if guard["status"] == "flag"]
    return Submission(files, data, commit, manifest, flags, notes)


def _make_manifest(
    summary: dict[str, Any], commit: Commit, guards: list[dict[str, Any]], files: dict[str, bytes]
) -> dict[str, Any]:
    listed = {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in sorted(files.items())}
    return {
        "format": bundle.FORMAT,
        "run": summary["run"],
        "preset": summary["preset"],
        "commit": commit.id,
        "tree": commit.tree,
        "figures": {name: summary[name] for name in FIGURES},
        "fingerprints": summary["fingerprints"],
        "tokenizer": summary["tokenizer"],
        "geometry": summary["geometry"],
        "machine_class": summary["machine_class"],
        "versions": summary["versions"],
        "guards": guards,
        "files": listed,
    }


def write(submission: Submission, out: Path) -> None:
    """Write the zip file to `out`. If an error occurs, an existing file at `out` is not changed."""
    temp = out.with_name(f".{out.name}.tmp")
    with disk_errors(out):
        try:
            temp.write_bytes(submission.data)
            temp.replace(out)
            fsync_folder(out.absolute().parent)
        finally:
            temp.unlink(missing_ok=True)


def _read_report(path: Path, summary: dict[str, Any]) -> bytes:
    """Read the report, and check that the report quotes the run and contains no key."""
    fix = f"create it with mainrun report {summary['run']} --out {path}"
    if not path.is_file():
        raise UsageError(f"there is no report {path}; {fix}")
    report_bytes = path.stat().st_size
    if report_bytes > bundle.MAX_ZIP_BYTES:
        limit = format_size(bundle.MAX_ZIP_BYTES)
        raise UsageError(
            f"the report {path} has a size of {format_size(report_bytes)}, "
            f"but a submission may have at most {limit}; {fix}"
        )
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}); {fix}") from None
    text = pdf_text(data, str(path))
    missing = missing_quotes(text, summary)
    if missing:
        raise UsageError(f"the report {path} does not quote this run: it lacks {', '.join(missing)}; {fix}")
    check_leaks({f"{path.name} (its text)": text.encode("utf-8", "replace")})
    return data


def _run_files(run: RunDir) -> tuple[dict[str, bytes], list[str]]:
    """Return the files of the run that the bundle contains, and notes about the files that are omitted."""
    names = list(RUN_FILES)
    names += [name for name in OPTIONAL_RUN_FILES if (run.path / name).is_file()]
    checkpoint_files, notes = _checkpoint_files(run)
    files = {}
    for name in [*names, *checkpoint_files]:
        path = run.path / name
        if path.is_symlink():
            raise RunError(f"{path} is a link; replace the link with the file")
        check_regular_file(path)
        files[RUN + name] = path.read_bytes()
    return files, notes


def _checkpoint_files(run: RunDir) -> tuple[list[str], list[str]]:
    """Return the file names of the last checkpoint. If the checkpoint is too large, return a note instead."""
    newest = max(run.checkpoints.glob("step-*"), default=None)
    if newest is None:
        return [], []
    paths = [newest / "meta.json", newest / "state.safetensors"]
    for path in paths:
        if not path.exists():
            raise RunError(f"{newest} has no {path.name}; {RESTORE}")
    total = sum(path.stat().st_size for path in paths if path.is_file())
    if total > bundle.MAX_CHECKPOINT_BYTES:
        limit = format_size(bundle.MAX_CHECKPOINT_BYTES)
        return [], [f"the last checkpoint is left out: it is {format_size(total)}, and the limit is {limit}"]
    return [str(path.relative_to(run.path)) for path in paths], []


def _run_guards(run: RunDir, commit: Commit, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Run all guards with the code of the commit. Raise an error if the run was trained by different code."""
    with tempfile.TemporaryDirectory(prefix="mainrun-submit-") as folder:
        code = Path(folder)
        bundle.write(commit.files, code)
        if not (code / "mainrun" / "replay.py").is_file():
            raise UsageError(
                f"commit {commit.id[:12]} has no mainrun/replay.py, which runs the guards; "
                "update the repository"
            )
        result = run_replay(code, "guards", run.path)
    _check_source(result["versions"]["mainrun"], commit, summary)
    _check_guards(result["guards"], summary)
    for name in ("fingerprints", "tokenizer"):
        if result[name] != summary[name]:
            raise UsageError(
                f"the {name} of the corpus changed after run {summary['run']} was trained; "
                "restore the corpus, or train the run again"
            )
    return result["guards"]


def _check_source(source: str, commit: Commit, summary: dict[str, Any]) -> None:
    trained_by = {versions["mainrun"] for versions in summary["all_versions"]}
    if trained_by == {source}:
        return
    named = ", ".join(sorted(other[:12] for other in trained_by))
    raise UsageError(
        f"run {summary['run']} was trained by source {named}, "
        f"but commit {commit.id[:12]} is source {source[:12]}; "
        "check out the commit that trained the run, or train the run again with this commit (--fresh)"
    )


def _check_guards(guards: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    failed = [guard for guard in guards if guard["status"] == "fail"]
    if not failed:
        return
    lines = [f"{len(failed)} of {len(guards)} guards failed on {summary['run']}:"]
    for guard in failed:
        lines.append(f"{guard['name']}: {guard['detail']}\n    fix: {FIXES[guard['name']]}")
    raise UsageError("\n  ".join(lines))


def _check_size(files: dict[str, bytes], data: bytes) -> None:
    unpacked = sum(map(len, files.values()))
    fits = len(data) <= bundle.MAX_ZIP_BYTES and unpacked <= bundle.MAX_UNPACKED_BYTES
    if fits and len(files) <= bundle.MAX_FILES:
        return
    zip_limit = format_size(bundle.MAX_ZIP_BYTES)
    unpacked_limit = format_size(bundle.MAX_UNPACKED_BYTES)
    largest = sorted(files, key=lambda name: -len(files[name]))[:3]
    named = ", ".join(f"{name} ({format_size(len(files[name]))})" for name in largest)
    sizes = f"{format_size(len(data))} ({format_size(unpacked)} unpacked)"
    raise UsageError(
        f"the submission has {len(files):,} files and {sizes}; "
        f"at most {bundle.MAX_FILES:,} files and {zip_limit} ({unpacked_limit} unpacked) are allowed; "
        f"the largest files are {named}"
    )
