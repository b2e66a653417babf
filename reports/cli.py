"""`mainrun report`: runs and studies in, one PDF out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mainrun.errors import UsageError
from mainrun.files import inputs
from mainrun.ui.console import Debug, Json, check_regular_file, emit, validate_paths

if TYPE_CHECKING:
    from reports.evidence.load import Evidence

LOG = Path(__file__).parents[1] / "docs" / "log"  # a folder with one page per subject


def report(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|STUDY]...",
            callback=validate_paths,
            help="Runs, exported studies, or folders of them.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", callback=validate_paths, help="The PDF.")
    ] = Path("report.pdf"),
    title: Annotated[
        str, typer.Option("--title", metavar="TEXT", help="What stands on top of it.")
    ] = "Mainrun report",
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures", metavar="DIR", callback=validate_paths, help="Also keep each figure, as SVG and PNG."
        ),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(
            "--tables", metavar="DIR", callback=validate_paths, help="Also keep each table, as CSV."
        ),
    ] = None,
    runs: Annotated[
        Path,
        typer.Option(
            "--runs", metavar="DIR", callback=validate_paths, help="The folder of the run directories."
        ),
    ] = Path("runs"),
    samples: Annotated[
        int, typer.Option("--samples", min=0, max=100, help="Titles that each of the two recipes writes.")
    ] = 8,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log", metavar="FILE", callback=validate_paths, help="The log of experiments, for what failed."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a PDF of runs and studies.

    Without arguments it takes everything in the folder of the run directories. Every figure in it is read from the
    inputs, and the same inputs give the same bytes. Runs on other data, or scored in other spans, are refused together.
    """
    from reports.evidence import load
    from reports.evidence.pages import counted

    if log is not None and not log.is_file():
        raise UsageError(f"--log {log} is no file; give the log of experiments, or leave --log out")
    if log is not None:
        try:
            inputs.read_bytes(log)
        except inputs.BadInput as fault:
            raise UsageError(f"--log {log} {fault}") from None
    check_regular_file(out, "--out", b"%PDF", "PDF")
    if not title.strip() or not title.isprintable():
        raise UsageError(f"--title {title!r} cannot be printed; write one line of text")
    e = load.gather(places or [], runs)
    wrote = write(e, out, title, figures, tables, log or (LOG if LOG.is_dir() else None), samples)
    if as_json:
        emit(wrote)
    else:
        print(wrote["claim"])
        sources = f"{counted(len(e.runs), 'run')} and {counted(len(e.studies), 'export')}"
        print(f"{out}: {wrote['pages']} pages, {wrote['bytes']:,} bytes, from {sources}")


def write(
    e: Evidence,
    out: Path,
    title: str,
    figures: Path | None = None,
    tables: Path | None = None,
    log: Path | None = None,
    samples: int = 0,
) -> dict[str, object]:
    from mainrun.store.rundir import disk_errors
    from reports.evidence import findings, pdf
    from reports.evidence.pages import Report

    for folder, option in ((figures, "--figures"), (tables, "--tables")):
        if folder:
            with disk_errors(folder, option):
                folder.mkdir(parents=True, exist_ok=True)
    with _writing(e, samples) as written:  # they write while this draws
        drawn = {name: pdf.drawing(svg) for name, svg in pdf.svgs(e, figures).items()}
        made = Report(e, title, log, tuple(written()))
    if tables:
        with disk_errors(tables, "--tables"):
            for table in made.tables.values():
                table.write(tables)
    pages = pdf.write(out, lambda: made.story(drawn), title, made.told())
    claim = findings.claim(e)
    facts = {"pages": pages, "bytes": out.stat().st_size, "runs": len(e.runs), "studies": len(e.studies)}
    return {
        "report": str(out),
        "claim": claim.text,
        "kind": claim.kind,
        "findings": findings.findings(e),
        **facts,
    }


@contextmanager
def _writing(e: Evidence, n: int) -> Iterator[Callable[[], Iterator[tuple[str, list[str]]]]]:
    """What the two recipes write, each in a process of its own: nothing here knows the model. A run without its weights writes nothing."""
    alone = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # a number of threads changes bits, and two processes would wait for each other's
    pair = [r.good[0] for r in (e.baseline, e.optimised) if n and r is not None and r.good]
    runs = [run for run in pair if (run.path / "checkpoints").is_dir()]
    started = []
    for run in runs:
        command = [sys.executable, "-m", "mainrun", "sample", str(run.path), "--prompt", "", "-n", str(n)]
        started.append(
            (
                run,
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=alone
                ),
            )
        )

    def written() -> Iterator[tuple[str, list[str]]]:
        for run, process in started:
            titles, _ = process.communicate()
            if process.returncode == 0:
                yield run.id, titles.splitlines()

    try:
        yield written
    finally:
        for _, process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
