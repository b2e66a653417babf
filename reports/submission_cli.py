"""`mainrun submit` and `mainrun verify`: hand a run in, and check one that was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import MainrunError, UsageError
from mainrun.ui.console import Debug, Json, check_place, emit, show_table, validate_paths

if TYPE_CHECKING:
    from reports.submission import Submission
    from reports.verification import Verdict


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def submit(
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Which; not needed where only one is finished.")
    ] = None,
    runs: Annotated[
        Path,
        typer.Option(
            "--runs", metavar="DIR", callback=validate_paths, help="The folder of the run directories."
        ),
    ] = Path("runs"),
    report: Annotated[
        Path,
        typer.Option("--report", metavar="PDF", callback=validate_paths, help="The report that quotes it."),
    ] = Path("report.pdf"),
    out: Annotated[
        Path, typer.Option("--out", metavar="ZIP", callback=validate_paths, help="The bundle.")
    ] = Path("submission.zip"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list it; write and send nothing.")
    ] = False,
    url: Annotated[
        str | None, typer.Option("--upload", metavar="URL", help="Also send it there, by HTTP PUT.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Send it without asking.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, max=3600, help="Seconds without a sign of the server.")
    ] = 60,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bundle a run with its code and report.

    All guards are run; the report must quote the run, and the commit must be what trained it. Nothing that looks like
    a key goes in. Nothing is sent anywhere without --upload.
    """
    from reports import submission
    from reports.upload import check_url

    if yes and url is None:
        raise UsageError("got --yes without --upload, which it answers; add --upload URL, or leave it out")
    target = check_url(url) if url else None
    if target and not yes and not dry_run and not sys.stdin.isatty():
        raise UsageError("got --upload without a terminal to ask on; add --yes to send without asking")
    check_place(out, "--out", b"PK", "zip")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"got --out {out}, whose folder is not there; make it, or give another")
    made = submission.prepare(submission.choose(run, runs), report, out, _note)
    if not dry_run:
        submission.write(made, out)
    _show(made, None if dry_run else out, as_json)
    if url and target and not dry_run:
        _send(made, out, url, yes, timeout)


def unfit() -> str:
    """Why no submission can be made of this code, whatever the run; empty: it can."""
    from reports.commit import check_tree
    from reports.submission import ROOT

    try:
        check_tree(ROOT)
    except UsageError as e:
        return str(e)
    return ""


def _show(made: Submission, out: Path | None, as_json: bool) -> None:
    from reports import bundle

    listed = {name: len(data) for name, data in sorted(made.files.items())}
    facts: dict[str, Any] = {
        "zip": str(out) if out else None,
        "bytes": len(made.data),
        "sha256": bundle.sha256(made.data),
    }
    if as_json:
        emit(
            facts
            | {k: made.manifest[k] for k in ("run", "commit", "figures")}
            | {"files": listed, "flags": made.flags, "left_out": made.commit.left_out}
        )
        return
    show_table(["file", "bytes"], [[name, f"{n:,}"] for name, n in listed.items()])
    for name, what in sorted(made.commit.left_out.items()):
        print(f"left out: {bundle.show(name)} ({what})")
    for line in [*made.notes, *(f"flag: {flag}" for flag in made.flags)]:
        print(line)
    last = made.manifest["figures"]["last"]
    print(
        f"{made.manifest['run']}: full {last['full']:.4f}, official {last['official']:.4f} ({last['coverage']:.1%})"
    )
    where = str(out) if out else "nothing was written; it would have been a zip"
    print(
        f"{where}: {len(listed)} files, {bundle.size(len(made.data))} (at most {bundle.size(bundle.LIMIT)}), sha256 {facts['sha256'][:16]}"
    )


def _send(made: Submission, out: Path, url: str, yes: bool, timeout: float) -> None:
    from reports.bundle import size
    from reports.upload import check_url, shown, upload

    target, run = check_url(url), made.manifest["run"]
    if not yes:
        _note(
            f"{out} ({size(len(made.data))}) goes to {shown(target)}; type the run's id, {run}, to send it:"
        )
        if sys.stdin.readline().strip() != run:
            raise MainrunError(f"not sent, for the id was not typed; {out} is kept")
    said = upload(out, url, _note, timeout=timeout)
    _note(f"sent to {shown(target)}: {said}")


def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="ZIP", callback=validate_paths, help="A bundle that `mainrun submit` made."),
    ],
    steps: Annotated[
        int,
        typer.Option(
            "--steps", min=1, metavar="N", help="How many to train again; the run's number: all of it."
        ),
    ] = 10,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Replay a bundle, and compare its figures.

    This executes the bundle's own code. Exits with 0 when verified, 1 when not, 2 when it is no bundle.
    """
    from reports.verification import verify as verify_bundle

    found = verify_bundle(path, steps, _note)
    if as_json:
        emit(vars(found) | {"verified": found.verified})
    else:
        _show_verdict(found)
    if not found.verified:
        raise typer.Exit(1)


MOST = 20  # differences shown


def _show_verdict(found: Verdict) -> None:
    from reports.bundle import show

    for line in found.done:
        print(f"looked at: {line}")
    if found.steps:
        if found.same_class:
            print("compared: every bit, for this is the machine class of the run")
        else:
            print(
                f"compared: within a relative {found.tolerance:g} (gradient norms ten times that), for this is another machine class"
            )
            for line in found.apart:
                print(f"  {show(line)}")
        trainer = (
            "is the one installed here"
            if not found.other_code
            else f"is not the one installed here: {', '.join(found.other_code[:5])}"
        )
        print(f"the trainer in the bundle {trainer}")
    for line in found.differences[:MOST]:
        print(f"differs: {show(line)}")
    if len(found.differences) > MOST:
        print(f"and {len(found.differences) - MOST} more differences")
    print(f"{'verified' if found.verified else 'NOT verified'}: {found.run}")
