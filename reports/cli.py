"""Implement `mainrun report`, which writes a PDF report about runs and studies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mainrun.errors import Interrupted, UsageError
from mainrun.files import inputs
from mainrun.ui.console import Debug, Json, check_regular_file, emit, stoppable, validate_paths

if TYPE_CHECKING:
    from reports.evidence.load import ReportData, Run


Places = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN|STUDY]...",
        callback=validate_paths,
        help="Runs, exported studies, or folders that contain runs or studies.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="FILE", callback=validate_paths, help="The path of the PDF.")
]
Title = Annotated[str, typer.Option("--title", metavar="TEXT", help="The title of the report.")]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="BASE,OTHER",
        help="The two recipes that page 1 compares, by name. By default, baseline and optimized.",
    ),
]
Figures = Annotated[
    Path | None,
    typer.Option(
        "--figures",
        metavar="DIR",
        callback=validate_paths,
        help="Also write each figure to this folder, as SVG and PNG.",
    ),
]
Tables = Annotated[
    Path | None,
    typer.Option(
        "--tables",
        metavar="DIR",
        callback=validate_paths,
        help="Also write each table to this folder, as CSV.",
    ),
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        callback=validate_paths,
        help="Also write a web page with the same evidence: one file, which needs no network.",
    ),
]
Runs = Annotated[
    Path,
    typer.Option("--runs", metavar="DIR", callback=validate_paths, help="The folder of the run directories."),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        min=0,
        max=100,
        help="The number of titles to generate with each of the two main recipes.",
    ),
]
Log = Annotated[
    Path | None,
    typer.Option(
        "--log",
        metavar="FILE",
        callback=validate_paths,
        help="Your log of experiments. The report quotes the failures in the log.",
    ),
]


def report(
    places: Places = None,
    out: Out = Path("report.pdf"),
    title: Title = "Mainrun report",
    compare: Compare = None,
    figures: Figures = None,
    tables: Tables = None,
    page: Page = None,
    runs: Runs = Path("runs"),
    samples: Samples = 8,
    log: Log = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a PDF of runs and studies.

    Without arguments, the report covers all runs and studies in the folder --runs. Every number in the report
    comes from the inputs. The same inputs always give the same PDF, byte for byte. Runs with different data
    or evaluation spans cannot be in the same report.
    """
    from reports.evidence import load
    from reports.evidence.front_page import count

    if log is not None:
        _check_log(log)
    check_regular_file(out, "--out", b"%PDF", "PDF")
    if page is not None:
        check_regular_file(page, "--html", b"<!doctype html>", "HTML")
    if not title.strip() or not title.isprintable():
        raise UsageError(f"--title {title!r} cannot be printed; give one line of printable text")
    data = load.gather(places or [], runs)
    if compare is not None:
        data = load.choose_pair(data, compare)
    result = write(data, out, title, figures, tables, log, samples)
    if page is not None:
        result["html"] = str(page)
        result["html_bytes"] = write_page(data, page, title)
    if as_json:
        emit(result)
        return
    sources = f"{count(len(data.runs), 'run')} and {count(len(data.studies), 'export')}"
    print(result["claim"])
    print(f"{out}: {result['pages']} pages, {result['bytes']:,} bytes, from {sources}")
    if page is not None:
        print(f"{page}: {result['html_bytes']:,} bytes")


def _check_log(log: Path) -> None:
    if not log.is_file():
        raise UsageError(f"--log {log} is not a file; give your log of experiments, or omit --log")
    try:
        inputs.read_bytes(log)
    except inputs.BadInput as error:
        raise UsageError(f"--log {log} {error}") from None


def write(
    data: ReportData,
    out: Path,
    title: str,
    figures: Path | None = None,
    tables: Path | None = None,
    log: Path | None = None,
    samples: int = 0,
) -> dict[str, object]:
    """Write the PDF of a report, and return the result that `--json` prints.

    `figures` and `tables` are folders. If a folder is given, also write each figure or table to a file there.
    """
    from mainrun.store.rundir import disk_errors
    from reports.evidence import findings, pdf
    from reports.evidence.front_page import figure_height
    from reports.evidence.pages import Report
    from reports.evidence.study_page import figure_rooms

    for folder, option in ((figures, "--figures"), (tables, "--tables")):
        if folder:
            with disk_errors(folder, option):
                folder.mkdir(parents=True, exist_ok=True)
    with _sampling(data, samples) as processes:  # generate titles while the figures are drawn
        rendered = pdf.render_figures(data, figures, figure_height(data, title), figure_rooms(data))
        drawings = {name: pdf.to_drawing(svg) for name, svg in rendered.items()}
        made = Report(data, title, log, list(_read_samples(processes)))
    if tables:
        with disk_errors(tables, "--tables"):
            for table in made.tables.values():
                table.write(tables)
    pages = pdf.write(out, lambda: made.story(drawings), title, made.properties())
    claim = findings.claim(data)
    return {
        "report": str(out),
        "claim": claim.text,
        "kind": claim.kind,
        "findings": findings.findings(data),
        "pages": pages,
        "bytes": out.stat().st_size,
        "runs": len(data.runs),
        "studies": len(data.studies),
    }


def write_page(data: ReportData, path: Path, title: str) -> int:
    """Write the web page of a report, and return its size."""
    from mainrun.store.rundir import disk_errors
    from reports.web import page
    from reports.web.views import view_of

    with disk_errors(path, "--html"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return page.write(path, view_of(data, title))


def board(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="[DIR]", callback=validate_paths, help="The folder of the runs and studies to show."
        ),
    ] = Path("runs"),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port of the web server.")] = 8090,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Serve the board to other machines under this address of this machine, such as 0.0.0.0 for "
            "all. The board then asks for a token, which is printed once.",
        ),
    ] = "",
    debug: Debug = False,
) -> None:
    """Show runs and studies in a browser while they are running.

    The page shows the progress, the time left, the current best and the workers, and refreshes itself. The
    board only reads. Without --host, only this machine can reach it.
    """
    from reports.web.board import open_server

    # Ctrl-C is the usual end of a board, and not an error
    with suppress(Interrupted), stoppable(), open_server(directory, port, host.strip()) as server:
        print(f"{directory} at {server.url}; press Ctrl-C to stop", file=sys.stderr, flush=True)
        server.serve_forever(poll_interval=0.2)


Processes = list[tuple[str, subprocess.Popen[str]]]  # pairs of a run id and a process


@contextmanager
def _sampling(data: ReportData, count: int) -> Iterator[Processes]:
    """Start one process for each of the two main recipes. The process generates titles with a model.

    Models are loaded only in these processes. Recipes whose run has no checkpoints are skipped.
    """
    # Each process uses a single thread, because the number of threads could change the generated titles.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes: Processes = []
    for run in _runs_to_sample(data) if count else ():
        process = subprocess.Popen(
            [sys.executable, "-m", "mainrun", "sample", str(run.path), "--prompt", "", "-n", str(count)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        processes.append((run.id, process))
    try:
        yield processes
    finally:
        for _, process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _runs_to_sample(data: ReportData) -> Iterator[Run]:
    for recipe in (data.baseline, data.optimised):
        if recipe is not None and recipe.valid_runs:
            run = recipe.valid_runs[0]
            if (run.path / "checkpoints").is_dir():
                yield run


def _read_samples(processes: Processes) -> Iterator[tuple[str, list[str]]]:
    """Yield the run id and the generated titles of each process that succeeds."""
    for run_id, process in processes:
        titles, _ = process.communicate()
        if process.returncode == 0:
            yield run_id, titles.split("\n")[:-1]  # a title may contain other line breaks
