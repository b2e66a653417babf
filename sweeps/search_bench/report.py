"""Report the results of a benchmark: tables for people, JSON, Markdown, and the list of openings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from mainrun.errors import UsageError
from mainrun.store.rundir import disk_errors, write_json, write_text
from sweeps.search_bench.metrics import CAP, Quality, Trace, compare, summarize
from sweeps.search_bench.ours import ABLATIONS, OURS
from sweeps.search_bench.searches import (
    SLOW_SECONDS,
    SLOW_SEEDS,
    Traces,
    chosen_methods,
    run_all,
    sampler_hash,
)
from sweeps.search_bench.tables import Table

HELD_OUT = "B"
# The hash of the sampler's files that was committed before the held-out table was recorded.
COMMITTED = Path(__file__).with_name("sampler.sha256")
OPENINGS = Path(__file__).parents[2] / "docs" / "search-openings.md"
OPENINGS_HEAD = """# Openings of the held-out table

Each line is a run of `mainrun bench search` on table B, which the command appends. *Sampler* is the hash
of the sampler's files. All tokens are in whole runs, and a ratio is that of restricted means.

| date | sampler | table | method | result |
|---|---|---|---|---|
"""


# -- the held-out table


def committed_hash() -> str:
    """Return the committed hash of the sampler, or an empty string."""
    return COMMITTED.read_text(encoding="utf-8").strip() if COMMITTED.exists() else ""


def status_of(table: str) -> str:
    """Say whether the sampler was settled before a table was recorded."""
    if table != HELD_OUT:
        return "for development"
    return "held out" if committed_hash() == sampler_hash() else "no longer held out"


def check_recording(table: str) -> None:
    """Raise UsageError if the held-out table would be recorded before the sampler is settled."""
    if status_of(table) == "no longer held out":
        raise UsageError(
            f"table {table} is held out, so the sampler must be settled before it is recorded; write the "
            f"hash {sampler_hash()} of its files to {COMMITTED}, and commit this file"
        )


def check_opening(table: str, openings: Path = OPENINGS) -> None:
    """Raise UsageError if an opening of the held-out table could not be recorded."""
    if table == HELD_OUT and not openings.parent.is_dir():
        raise UsageError(
            f"table {table} is held out, and each opening is written to {openings}, whose folder does not "
            "exist; run the command from a checkout of the repository"
        )


def record_opening(report: Mapping[str, Any], openings: Path = OPENINGS) -> None:
    """Append a line about an opening of the held-out table. A repetition of the same result adds no line."""
    if report["table"] != HELD_OUT:
        return
    ours = report["methods"][0]
    result = f"{ours['mean']:.2f} R, {ours['searches']} searches"
    for row in report["comparisons"]:
        result += f"; {row['rival']}: {_ratio(row)}, {row['verdict']}"
    line = f"| {report['sampler'][:16]} | {report['status']} | {ours['method']} | {result} |"
    with disk_errors(openings, "the folder of"):
        text = openings.read_text(encoding="utf-8") if openings.exists() else OPENINGS_HEAD
        if line not in text:
            openings.write_text(f"{text}| {date.today().isoformat()} {line}\n", encoding="utf-8")


# -- the report


def run(
    place: str,
    rivals: str,
    with_ablations: bool,
    count: int,
    out: Path,
    workers: int,
    note: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
    """Run a benchmark, and return its report and the folder below `out` that contains it.

    place: the name of a table or a file. count: the number of search seeds.
    """
    methods = chosen_methods(rivals, with_ablations)
    table = Table.read(place)
    check_opening(table.definition.name)
    traces = run_all(place, table, methods, count, out, workers, note)
    report = make(table, traces)
    record_opening(report)
    folder = Traces(out, table).folder
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", markdown(report))
    return folder, report


def make(table: Table, traces: Mapping[str, Sequence[Trace]]) -> dict[str, Any]:
    """Return all figures of a benchmark. Our sampler is compared with the rivals and with its ablations."""
    quality = Quality.of(table)
    name = table.definition.name
    summaries = [summarize(method, of_method, quality) for method, of_method in traces.items()]
    families: list[list[dict[str, Any]]] = []
    for is_ablation in (False, True):
        others = {
            n: of_method for n, of_method in traces.items() if n != OURS and (n in ABLATIONS) == is_ablation
        }
        rows = compare(traces[OURS], others, quality.good)
        families.append([asdict(row) | {"verdict": row.verdict} for row in rows])
    return {
        "table": name,
        "status": status_of(name),
        "sampler": sampler_hash(),
        "facts": table.verdict(),
        "methods": [asdict(summary) for summary in summaries],
        "slow": [s.method for s in summaries if s.searches < max(other.searches for other in summaries)],
        "comparisons": families[0],
        "ablations": families[1],
    }


def _quartiles(values: Sequence[float]) -> str:
    low, median, high = (f"> {CAP:.0f}" if value >= CAP else f"{value:.1f}" for value in values)
    return f"{median} [{low}, {high}]"


def _spread(values: Sequence[float]) -> str:
    low, median, high = (f"{value:.2f}" for value in values)
    return f"{median} [{low}, {high}]"


def _ratio(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def tables(report: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return the tables of a report: tokens, regrets and comparisons. Each has a head and rows."""
    tokens = []
    regrets = []
    for row in report["methods"]:
        name = row["method"] + ("*" if row["method"] in report["slow"] else "")
        reached = f"{100 * row['reached']:.0f}%"
        cells = [f"{row['mean']:.2f}", f"{row['area']:.1f}", f"{row['cpu_seconds']:.1f}"]
        tokens.append([name, str(row["searches"]), reached, _quartiles(row["tokens"]), *cells])
        regrets.append([name, *(_spread(values) for values in row["regrets"].values())])
    points = [f"{point:g} R" for point in report["methods"][0]["regrets"]]
    head = ["method", "searches", "good", "tokens [quartiles]", "mean", "area to 24 R", "CPU s"]
    all_tables = [(head, tokens), (["median regret", *points], regrets)]
    for title in ("comparisons", "ablations"):
        rows = [[row["rival"], _ratio(row), row["verdict"]] for row in report[title]]
        if rows:
            all_tables.append(([f"{OURS} against", "ratio [95%]", "tokens"], rows))
    return all_tables


def claims(report: Mapping[str, Any]) -> list[str]:
    """Return the sentences that a benchmark supports, corrected with Holm's method over the rivals."""
    sentences = {"at most a third": "at most a third of the tokens of", "fewer": "fewer tokens than"}
    sentences["more"] = "more tokens than"
    lines = []
    for row in report["comparisons"]:
        if row["verdict"] in sentences:
            lines.append(f"{OURS} needs {sentences[row['verdict']]} {row['rival']}")
    return lines


def notes(report: Mapping[str, Any]) -> list[str]:
    """Return the lines that explain a report."""
    lines = [
        *report["facts"],
        f"Table {report['table']} is {report['status']}; the sampler is {report['sampler'][:16]}.",
        f"All tokens are in whole runs (R). A search that finds no good recipe counts as {CAP:.0f} R.",
        "Regrets are in sigma. Intervals resample the search seeds, and hold for the two training seeds.",
    ]
    if report["slow"]:
        seeds = f"{SLOW_SEEDS} search seeds, because a search takes more than {SLOW_SECONDS:.0f} s"
        lines.append(f"* {seeds}")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """Return a report for the documents."""
    parts = []
    for head, rows in tables(report):
        ruler = "|".join(["---"] * len(head))
        lines = [" | ".join(head), ruler, *(" | ".join(row) for row in rows)]
        parts.append("\n".join(f"| {line} |" if line != ruler else f"|{line}|" for line in lines))
    parts.append("\n".join(f"- {line.removeprefix('* ')}" for line in [*claims(report), *notes(report)]))
    return "\n\n".join(parts) + "\n"
