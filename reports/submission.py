"""What is handed in: a run whose figures hold, the code that made it, the report that quotes it. First everything is checked."""

from __future__ import annotations

import io
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mainrun.errors import RunError, UsageError
from mainrun.store.rundir import RunDir, check_place, disk_errors, find, fsync_folder, to_json
from mainrun.ui import compare
from reports import bundle
from reports.bundle import CODE, MANIFEST, REPORT, RUN, sha256, size
from reports.commit import Commit, check_leaks, head
from reports.replaying import replay

ROOT = Path(__file__).parents[1]  # the repository that this code is of
RUN_FILES = ("config.json", "env.json", "status.json", "metrics.jsonl", "summary.json", "tokenizer.json")
OTHER_FILES = ("growth.jsonl",)  # where there is one

FIGURES = ("last", "best", "steps", "params", "weights")
NEEDED = (*FIGURES, "scores", "tokenizer", "machine_class", "versions", "all_versions")

# What to do when a guard fails, by its name
FIXES = {
    "coverage": "score every token: train again with the scoring.py of the repository",
    "geometry": "leave official_geometry, batch_size and block_size as they were at the start, and train again with --fresh",
    "denominator": "restore corpus.py and tokens.py, which count the raw titles, and train again with --fresh",
    "last_and_best": "the summary and metrics.jsonl part: restore them, or train again with --fresh",
    "same_evaluate": "restore scoring.py to what the run began with (git log shows it), or train again with --fresh",
    "no_learning": "a model may not change while it is scored: take what remembers out of its forward, and train again",
    "targets_unseen": "the model's forward may not use targets: take them out, and train again",
    "causality": "a position may look at itself and earlier ones only: mend the mask, and train again",
    "random_start": "start from random weights: take the loading of others out, and train again with --fresh",
    "lossless_tokens": "a title must come back from its tokens: use tokenizer=bpe or unigram as they are, and train again",
    "no_val_tokens": "fit the tokenizer on train alone (tokenizer_fit=train), or with a smaller vocab_size, and train again",
    "data_known": "restore the titles that the run was trained on, or train again with --fresh on those that there are",
    "task_rules": "submit a run of the task as it is given: its epochs, seed, titles and val_frac",
    "presentations": "the ledger must count every forward pass: restore train.py's count, and train again with --fresh",
}


@dataclass
class Submission:
    files: dict[str, bytes]
    data: bytes  # the zip
    commit: Commit
    manifest: dict[str, Any]
    flags: list[str]  # honest, but not the task's own figure
    notes: list[str]


def choose(name: str | None, runs: Path) -> RunDir:
    if name:
        return find(name, runs)
    done = sorted(path.parent.name for path in runs.glob("*/summary.json"))
    if len(done) != 1:
        what = (
            f"several finished runs in {runs} ({', '.join(done[:5])})"
            if done
            else f"no finished run in {runs}"
        )
        raise UsageError(
            f"got no --run, and there {'are' if done else 'is'} {what}; {'name one' if done else 'train one first'}: --run RUN"
        )
    return RunDir(runs / done[0])


def prepare(
    run: RunDir, report: Path, out: Path, note: Callable[[str], None], root: Path = ROOT
) -> Submission:
    """All checks, the quick ones first, and the zip in memory."""
    summary = whole(run)
    quoted = _report(report, summary)
    commit = head(root, but=(report, out))
    files, notes = _run_files(run)
    files |= {CODE + name: data for name, data in commit.files.items()} | {REPORT: quoted}
    check_leaks(
        {name: data for name, data in files.items() if not name.startswith(CODE)}
    )  # the code was looked at by its commit
    note(f"the guards, by the code of commit {commit.id[:12]}")
    found = _guards(run, commit, summary)
    manifest = {
        "format": bundle.FORMAT, "run": summary["run"], "preset": summary["preset"], "commit": commit.id, "tree": commit.tree,
        "figures": {name: summary[name] for name in FIGURES},
        "fingerprints": summary["fingerprints"], "tokenizer": summary["tokenizer"], "geometry": summary["geometry"],
        "machine_class": summary["machine_class"], "versions": summary["versions"], "guards": found,
        "files": {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in sorted(files.items())},
    }  # fmt: skip
    files[MANIFEST] = to_json(manifest).encode()
    data = bundle.pack(files, (CODE + name for name in commit.runnable))
    _check_size(files, data)
    flags = [f"{guard['name']}: {guard['detail']}" for guard in found if guard["status"] == "flag"]
    return Submission(files, data, commit, manifest, flags, notes)


def write(made: Submission, out: Path) -> None:
    """The whole zip or none."""
    temp = out.with_name(f".{out.name}.tmp")
    with disk_errors(out):
        try:
            temp.write_bytes(made.data)
            temp.replace(out)
            fsync_folder(out.absolute().parent)
        finally:
            temp.unlink(missing_ok=True)


def whole(run: RunDir) -> dict[str, Any]:
    """The summary of a run that is done, complete, and at one with its log."""
    summary = compare.finished(run)
    missing = [name for name in RUN_FILES if not (run.path / name).is_file()]
    if missing:
        raise RunError(
            f"{run.path} has no {', '.join(missing)}; restore it, or train the run again with --fresh"
        )
    lacking = [name for name in NEEDED if name not in summary]
    wrong = "" if lacking or summary["run"] == run.config().run_id else f"is of {summary['run']}"
    if not lacking and summary["scores"].get("val") != {name: summary[name] for name in ("last", "best")}:
        wrong = "gives the scores of val in two ways"
    if wrong.startswith("is of") and summary["run"] == run.path.name:
        raise RunError(
            f"{run.path} was trained by other code, which named it so; today's names its config {run.config().run_id}: "
            "check out the commit that trained it, or train it again"
        )
    if lacking or wrong:
        what = wrong or f"has no {lacking[0]!r}"
        raise RunError(f"{run.path}/summary.json {what}; restore it, or train the run again with --fresh")
    ends = {
        row["event"]: row["step"] for row in run.rows() if row["event"] == "step" or row.get("split") == "val"
    }
    if ends != {"step": summary["steps"], "eval": summary["steps"]}:
        raise RunError(
            f"{run.path}/metrics.jsonl does not reach the last step, {summary['steps']}, with its score; restore it, or train again"
        )
    return summary


def pdf_text(data: bytes, name: str) -> str:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it cannot read is an error below
    try:
        return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(data)).pages)
    except Exception as e:  # its errors are many, and a damaged file meets others
        raise UsageError(
            f"{name} is no PDF that can be read ({type(e).__name__}: {e}); make it again: mainrun report"
        ) from None


def _report(path: Path, summary: dict[str, Any]) -> bytes:
    """The report, if it quotes the run by its id and by both of its last figures, to four digits or more."""
    make = f"make it: mainrun report {summary['run']} --out {path}"
    if not path.is_file():
        raise UsageError(f"no report {path}; {make}")
    if path.stat().st_size > bundle.LIMIT:
        raise UsageError(
            f"{path} has {size(path.stat().st_size)}, a submission at most {size(bundle.LIMIT)}; {make}"
        )
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}); {make}") from None
    text = pdf_text(data, str(path))
    missing = quotes(text, summary)
    if missing:
        raise UsageError(f"{path} does not quote this run: it has no {', no '.join(missing)}; {make}")
    check_leaks({f"{path.name} (its text)": text.encode("utf-8", "replace")})
    return data


def quotes(text: str, summary: dict[str, Any]) -> list[str]:
    """What of the run the text lacks."""
    missing = (
        [] if summary["run"] in re.sub(r"\s", "", text) else [f"run {summary['run']}"]
    )  # an id may be broken over two lines
    printed = re.findall(r"\d+\.\d{4,}", text)
    for name in ("official", "full"):
        value = summary["last"][name]
        if not any(number == f"{value:.{len(number.partition('.')[2])}f}" for number in printed):
            missing.append(f"{name} {value:.4f}")
    return missing


def _run_files(run: RunDir) -> tuple[dict[str, bytes], list[str]]:
    names = [*RUN_FILES, *(name for name in OTHER_FILES if (run.path / name).is_file())]
    notes = []
    if newest := max(run.checkpoints.glob("step-*"), default=None):
        inside = [newest / "meta.json", newest / "state.safetensors"]
        for path in inside:
            if not path.exists():
                raise RunError(
                    f"{newest} has no {path.name}; restore it, or train the run again with --fresh"
                )
        if (total := sum(path.stat().st_size for path in inside if path.is_file())) <= bundle.CHECKPOINT:
            names += [str(path.relative_to(run.path)) for path in inside]
        else:
            notes.append(
                f"without the last checkpoint: {size(total)}, at most {size(bundle.CHECKPOINT)} goes in"
            )
    for name in names:
        if (run.path / name).is_symlink():
            raise RunError(f"{run.path / name} is a link; put the file itself in its place")
        check_place(run.path / name)
    return {RUN + name: (run.path / name).read_bytes() for name in names}, notes


def _guards(run: RunDir, commit: Commit, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """All guards, run by the committed code, which must be the code of the run."""
    with tempfile.TemporaryDirectory(prefix="mainrun-submit-") as folder:
        code = Path(folder)
        bundle.write(commit.files, code)
        if not (code / "mainrun" / "replay.py").is_file():
            raise UsageError(
                f"commit {commit.id[:12]} has no mainrun/replay.py, which runs the guards; update the repository"
            )
        found = replay(code, "guards", run.path)
    here = found["versions"]["mainrun"]
    of_run = {entry["mainrun"] for entry in summary["all_versions"]}
    if of_run != {here}:
        theirs = ", ".join(sorted(source[:12] for source in of_run))
        what = f"run {summary['run']} was trained by source {theirs}, commit {commit.id[:12]} is source {here[:12]}"
        raise UsageError(
            f"{what}; check out the commit that trained it, or train it again with this one (--fresh)"
        )
    failed = [guard for guard in found["guards"] if guard["status"] == "fail"]
    if failed:
        lines = [f"{guard['name']}: {guard['detail']}\n    fix: {FIXES[guard['name']]}" for guard in failed]
        raise UsageError(
            "\n  ".join(
                [f"{len(failed)} of {len(found['guards'])} guards failed on {summary['run']}:", *lines]
            )
        )
    if wrong := [name for name in ("fingerprints", "tokenizer") if found[name] != summary[name]]:
        raise UsageError(
            f"the corpus gives other {wrong[0]} now than run {summary['run']} was trained on; restore it, or train again"
        )
    return found["guards"]


def _check_size(files: dict[str, bytes], data: bytes) -> None:
    total = sum(map(len, files.values()))
    if len(data) > bundle.LIMIT or total > bundle.UNPACKED or len(files) > bundle.FILES:
        largest = sorted(files, key=lambda name: -len(files[name]))[:3]
        named = ", ".join(f"{name} ({size(len(files[name]))})" for name in largest)
        what = f"the submission has {len(files):,} files and {size(len(data))} ({size(total)} unpacked)"
        raise UsageError(
            f"{what}; allowed are {bundle.FILES:,} and {size(bundle.LIMIT)} ({size(bundle.UNPACKED)}); the largest: {named}"
        )
