"""The commands of `mainrun bench`, which measure training speed, shared steps and search methods."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import MainrunError, UsageError
from mainrun.ui.console import (
    Debug,
    Json,
    Preset,
    Sets,
    commands,
    emit,
    process_group,
    show_table,
    stoppable,
    validate_paths,
)

if TYPE_CHECKING:
    from mainrun.config import TrainConfig

app = commands("Measure training speed, shared steps and search methods.")

Repeats = Annotated[
    int, typer.Option("--repeats", min=1, max=1000, help="Number of measurements. The median is reported.")
]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _single_config(preset: str, sets: list[str] | None) -> TrainConfig:
    """Load a preset that consists of a single config."""
    from mainrun.plan.recipes import load

    configs = load(preset, sets or [])
    if len(configs) > 1:
        raise UsageError(
            f"preset {preset!r} has {len(configs)} steps, but bench measures only one; "
            f"choose one, for example --preset {configs[0].preset}"
        )
    return configs[0]


@app.command("step")
def bench_step(
    preset: Preset = "baseline",
    sets: Sets = None,
    rivals: Annotated[
        bool,
        typer.Option("--rivals", help="Also measure a plain training loop and the default memory allocator."),
    ] = False,
    repeats: Repeats = 5,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a training step and its parts.

    With --rivals, each rival implementation runs in its own process, and the rivals take turns. The plain
    training loop always uses float32 and AdamW.
    """
    from mainrun.bench import step

    report = step.measure(_single_config(preset, sets), rivals=rivals, repeats=repeats, note=_note)
    if as_json:
        emit(report)
    else:
        show_table(*step.table(report))
        print(*step.lines(report), sep="\n")


@app.command("lineage")
def bench_lineage(
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME|FILE", help="The base config. The default is a tiny config."),
    ] = None,
    sets: Sets = None,
    studies: Annotated[
        str, typer.Option("--studies", metavar="1,2,3,4", help="The studies to run.")
    ] = "1,2,3,4",
    trials: Annotated[
        int,
        typer.Option("--trials", min=0, max=192, help="Number of random trials per study. 0 runs all."),
    ] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how much training time runs save by sharing steps in a store.

    Four studies are trained with a store, and again from scratch. Both ways must give bit-identical results.
    All four studies together take about half an hour.
    """
    from mainrun.config import from_dict
    from mainrun.plan.recipes import parse_set

    if not re.fullmatch(r"[1-4](,[1-4])*", studies):
        raise UsageError(f"got --studies {studies!r}; give numbers from 1 to 4, separated by commas")
    with process_group(), stoppable():
        from mainrun.bench import lineage

        if preset:
            base = _single_config(preset, sets)
        else:
            base = from_dict(lineage.SMALL | dict(parse_set(text) for text in sets or []))
        rows = lineage.measure(base, [int(study) for study in studies.split(",")], trials, _note)
        overheads = lineage.overheads()
    if as_json:
        emit({"studies": rows, "overheads": overheads})
    else:
        show_table(*lineage.table(rows))
        print(*lineage.lines(overheads), sep="\n")
    if any(row["differ"] for row in rows):
        raise MainrunError(
            "runs that shared steps differ from the same runs trained from scratch; "
            "the last column of the table shows how many runs differ"
        )


@app.command("gpu")
def bench_gpu(sets: Sets = None, repeats: Repeats = 5, as_json: Json = False, debug: Debug = False) -> None:
    """Measure training on a GPU.

    The presets `baseline` and `optimized` are trained in bfloat16. The table shows what fraction of the GPU's
    peak speed a training step reaches, and how long a whole run takes. A second run must give exactly the
    same losses and weights.
    """
    from mainrun.bench import gpu

    report = gpu.measure(sets or [], repeats=repeats, note=_note)
    if as_json:
        emit(report)
    else:
        show_table(*gpu.table(report))
        print(*gpu.lines(report), sep="\n")
    if any(row["differences"] for row in report["presets"]):
        raise MainrunError("two runs of the same config differ; the lines above show the first difference")


@app.command("search")
def bench_search(
    table: Annotated[
        str, typer.Option("--table", metavar="A|B|FILE", help="Run the methods on a recorded table.")
    ] = "",
    record: Annotated[
        str, typer.Option("--record", metavar="A|B", help="Record a table, which takes hours.")
    ] = "",
    rivals: Annotated[
        str, typer.Option("--rivals", metavar="NAME,NAME", help="Also run these rivals, or all of them.")
    ] = "",
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Also run the sampler frugal without each of its parts.")
    ] = False,
    searches: Annotated[
        int,
        typer.Option("--searches", min=2, max=1000, help="Number of search seeds, for each training seed."),
    ] = 100,
    workers: Annotated[
        int, typer.Option("--workers", min=0, max=256, help="Number of processes. 0 uses all cores.")
    ] = 0,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", callback=validate_paths, help="The folder of all results.")
    ] = Path("runs/search-bench"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how many tokens search methods need on a recorded table.

    A table contains the scores of all recipes of a small space, so no search trains anything. Table A is for
    development. Table B is held out: each run on it is listed in docs/search-openings.md. A command that was
    stopped continues where it ended.
    """
    if bool(table) == bool(record):
        raise UsageError("got both --table and --record, or neither; give one of them, such as --table A")
    if record and (rivals or ablations):
        raise UsageError("got --record with --rivals or --ablations, which belong to --table; remove them")
    with stoppable():
        if record:
            print(_record_table(record, out, workers))
            return
        folder, results = _measure_searches(table, rivals, ablations, searches, out, workers)
    if as_json:
        emit(results)
        return
    from sweeps.search_bench import report

    for head, rows in report.tables(results):
        show_table(head, rows)
    print(*report.claims(results), *report.notes(results), sep="\n")
    _note(f"wrote report.json, report.md and report.svg to {folder}")


def _record_table(name: str, out: Path, workers: int) -> Path:
    from sweeps.search_bench import record, report, tables

    tables.definition_of(name)
    report.check_recording(name)
    return record.record(name, out, workers, _note)


def _measure_searches(
    table: str, rivals: str, ablations: bool, searches: int, out: Path, workers: int
) -> tuple[Path, dict[str, Any]]:
    from mainrun.core.hardware import cores
    from mainrun.store.rundir import write_bytes
    from reports.evidence.figures.search_bench import to_svg
    from sweeps.search_bench import report

    folder, results = report.run(table, rivals, ablations, searches, out, workers or cores(), _note)
    write_bytes(folder / "report.svg", to_svg(results))
    return folder, results
