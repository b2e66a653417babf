"""Implement the commands `mainrun submit` and `mainrun verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import MainrunError, UsageError
from mainrun.ui import completion
from mainrun.ui.console import Debug, Json, check_regular_file, emit, show_table, validate_paths

if TYPE_CHECKING:
    from reports.submission.prepare import Submission
    from reports.submission.verification import Verdict

MAX_DIFFERENCES = 20  # the maximum number of differences that `mainrun verify` prints
MAX_FILES_SHOWN = 5


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


Run = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="RUN",
        autocompletion=completion.runs,
        help="The run to submit. By default, the only finished run.",
    ),
]


def submit(
    run: Run = None,
    runs: Annotated[
        Path,
        typer.Option(
            "--runs", metavar="DIR", callback=validate_paths, help="The folder of the run directories."
        ),
    ] = Path("runs"),
    report: Annotated[
        Path,
        typer.Option(
            "--report", metavar="PDF", callback=validate_paths, help="The report, which must quote the run."
        ),
    ] = Path("report.pdf"),
    out: Annotated[
        Path,
        typer.Option("--out", metavar="ZIP", callback=validate_paths, help="The path of the new bundle."),
    ] = Path("submission.zip"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run all checks and list the files, but write and send nothing.")
    ] = False,
    url: Annotated[
        str | None, typer.Option("--upload", metavar="URL", help="Upload the bundle to this URL by HTTP PUT.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking.")] = False,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.1, max=3600, help="Seconds to wait for the server to respond."),
    ] = 60,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bundle a run with its code and report.

    All guards are run. The report must quote the run, and the commit must contain the code that trained the
    run. Files that look like secret keys are refused. Nothing is uploaded without --upload.
    """
    from reports.submission import prepare
    from reports.submission.upload import check_url

    if yes and url is None:
        raise UsageError("got --yes without --upload; add --upload URL, or omit --yes")
    if url:
        check_url(url)
    if url and not yes and not dry_run and not sys.stdin.isatty():
        raise UsageError("--upload cannot ask for confirmation without a terminal; add --yes to confirm")
    check_regular_file(out, "--out", b"PK", "zip")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder of --out {out} does not exist; create the folder, or give another path")
    submission = prepare.prepare(prepare.choose_run(run, runs), report, out, _note)
    if dry_run:
        _show_submission(submission, None, as_json)
        return
    prepare.write(submission, out)
    _show_submission(submission, out, as_json)
    if url:
        _upload(submission, out, url, yes, timeout)


def why_not_submittable() -> str:
    """Return the reason why the current code cannot be submitted.

    Return an empty string if the current code can be submitted.
    """
    from reports.submission.commit import ROOT, check_tree

    try:
        check_tree(ROOT)
    except UsageError as e:
        return str(e)
    return ""


def _show_submission(submission: Submission, out: Path | None, as_json: bool) -> None:
    from reports.submission import bundle

    sizes = {name: len(data) for name, data in sorted(submission.files.items())}
    digest = bundle.sha256(submission.data)
    manifest = submission.manifest
    if as_json:
        facts: dict[str, Any] = {
            "zip": str(out) if out else None,
            "bytes": len(submission.data),
            "sha256": digest,
            "run": manifest["run"],
            "commit": manifest["commit"],
            "figures": manifest["figures"],
            "files": sizes,
            "flags": submission.flags,
            "left_out": submission.commit.left_out,
        }
        emit(facts)
        return
    show_table(["file", "bytes"], [[name, f"{size:,}"] for name, size in sizes.items()])
    for name, kind in sorted(submission.commit.left_out.items()):
        print(f"left out: {bundle.escape(name)} ({kind})")
    for note in submission.notes:
        print(note)
    for flag in submission.flags:
        print(f"flag: {flag}")
    last = manifest["figures"]["last"]
    scores = f"full {last['full']:.4f}, official {last['official']:.4f} ({last['coverage']:.1%})"
    print(f"{manifest['run']}: {scores}")
    place = out or "dry run, so nothing was written; the zip would have"
    size = bundle.format_size(len(submission.data))
    limit = bundle.format_size(bundle.MAX_ZIP_BYTES)
    print(f"{place}: {len(sizes)} files, {size} (at most {limit}), sha256 {digest[:16]}")


def _upload(submission: Submission, out: Path, url: str, yes: bool, timeout: float) -> None:
    from reports.submission.bundle import format_size
    from reports.submission.upload import check_url, upload, without_query

    target = without_query(check_url(url))
    run_id = submission.manifest["run"]
    if not yes:
        size = format_size(len(submission.data))
        _note(f"{out} ({size}) will be sent to {target}; type the run's id, {run_id}, to send it:")
        if sys.stdin.readline().strip() != run_id:
            raise MainrunError(f"the bundle was not sent, because the run's id was not typed; {out} is kept")
    status = upload(out, url, _note, timeout=timeout)
    _note(f"sent to {target}: {status}")


def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="ZIP", callback=validate_paths, help="A bundle that `mainrun submit` made."),
    ],
    steps: Annotated[
        int,
        typer.Option(
            "--steps",
            min=1,
            metavar="N",
            help="The number of steps to train again. To repeat the whole run, give its number of steps.",
        ),
    ] = 10,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the first steps of a bundle again, and compare.

    This command executes the code of the bundle. The exit code is 0 if the bundle is verified, 1 if it is not
    verified, and 2 if the file is not a bundle.
    """
    from reports.submission import verification

    verdict = verification.verify(path, steps, _note)
    if as_json:
        _emit_verdict(verdict)
    else:
        _show_verdict(verdict)
    if not verdict.verified:
        raise typer.Exit(1)


def _emit_verdict(verdict: Verdict) -> None:
    facts = {
        "run": verdict.run,
        "differences": verdict.differences,
        "done": verdict.checked,
        "same_class": verdict.same_class,
        "apart": verdict.machine_differences,
        "tolerance": verdict.tolerance,
        "steps": verdict.steps,
        "of": verdict.total_steps,
        "other_code": verdict.changed_code,
        "verified": verdict.verified,
    }
    emit(facts)


def _show_verdict(verdict: Verdict) -> None:
    from reports.submission.bundle import escape

    for line in verdict.checked:
        print(f"checked: {line}")
    if verdict.steps:
        _show_comparison(verdict)
    for line in verdict.differences[:MAX_DIFFERENCES]:
        print(f"differs: {escape(line)}")
    if len(verdict.differences) > MAX_DIFFERENCES:
        print(f"and {len(verdict.differences) - MAX_DIFFERENCES} more differences")
    if verdict.verified:
        print(f"verified: {verdict.run}")
    else:
        print(f"NOT verified: {verdict.run}")


def _show_comparison(verdict: Verdict) -> None:
    """Print the tolerance of the comparison, and whether the bundle contains the installed trainer."""
    from reports.submission.bundle import escape

    if verdict.same_class:
        print("compared: every bit, because this is the machine class of the run")
    else:
        tolerance = f"a relative {verdict.tolerance:g} (gradient norms ten times that)"
        print(f"compared: within {tolerance}, because this is another machine class")
        for line in verdict.machine_differences:
            print(f"  {escape(line)}")
    if verdict.changed_code:
        named = ", ".join(verdict.changed_code[:MAX_FILES_SHOWN])
        print(f"the trainer in the bundle differs from the installed one: {named}")
    else:
        print("the trainer in the bundle is the installed one")
