"""Finished runs side by side. `full` ranks them; an official figure is shown with what it covers.

Runs are comparable only when they were scored on the same titles: other data is refused, not footnoted.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.config import MIN_COVERAGE
from mainrun.errors import RunError, UsageError
from mainrun.files.inputs import shown
from mainrun.run.progress import clock, percent, short

if TYPE_CHECKING:
    from rich.console import Console

    from mainrun.store.rundir import RunDir

NEEDED = (
    "run",
    "last",
    "best",
    "steps",
    "tokens",
    "presentations",
    "params",
    "seconds",
    "tokens_per_s",
    "fingerprints",
    "geometry",
    "guards",
)
SAME = ("corpus", "val")  # the fingerprints that comparable runs share


def finished(run: RunDir) -> dict[str, Any]:
    """The summary of a run that is done."""
    run.config()  # says so when this is no run directory at all, or when its config was changed
    summary = run.summary()
    if summary is None:
        state = run.status().get("state", "not started")
        fix = "the `mainrun train` command that started it goes on with it"
        if state == "diverged":
            fix = "it would diverge again: train a config with a lower lr, or a longer warm-up"
        raise RunError(f"run {run.path.name} is not finished ({state}); {fix}")
    missing = [name for name in NEEDED if name not in summary]
    missing += [f"{name} fingerprint" for name in SAME if name not in summary.get("fingerprints", {})]
    if missing:
        raise RunError(f"{run.path}/summary.json is damaged (no {missing[0]!r}); {run.fix}")
    _check_scores(run, summary)
    return summary


def _check_scores(run: RunDir, summary: dict[str, Any]) -> None:
    """A summary says what its rows say, or it was edited."""
    rows = [
        row for row in run.rows() if row.get("event") == "eval" and row["split"] == summary["last"]["split"]
    ]
    true = {"last": rows[-1], "best": min(rows, key=lambda row: row["full"])} if rows else {}
    for name in ("last", "best"):
        for k, given in summary[name].items():
            if name not in true or true[name].get(k) != given:
                logged = shown(true.get(name, {}).get(k), 60)
                says = f"{run.path}/summary.json gives {shown(given, 60)} for {k} of the {name} score, metrics.jsonl {logged}"
                raise RunError(
                    f"{says}; one of them was changed after the run: restore it, or train again with --fresh"
                )


def rows(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of plain figures a run; deltas are against the first."""
    first = summaries[0]
    for other in summaries[1:]:
        _same_data(first, other)
    return [_row(summary, first) for summary in summaries]


def _same_data(first: dict[str, Any], other: dict[str, Any]) -> None:
    def facts(s: dict[str, Any]) -> dict[str, Any]:
        return {f"{k} fingerprint": s["fingerprints"][k][:12] for k in SAME} | {
            "scored split": s["last"]["split"]
        }

    a, b = facts(first), facts(other)
    differ = [f"{k} {a[k]} against {b[k]}" for k in a if a[k] != b[k]]
    if differ:
        raise RunError(
            f"{first['run']} and {other['run']} were scored on different data: {'; '.join(differ)}; "
            "compare runs of the same corpus, num_titles, shuffle and val_frac"
        )


def _row(summary: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    last, guards = summary["last"], summary["guards"]
    # other spans leave other tokens out
    comparable = (
        min(last["coverage"], first["last"]["coverage"]) >= MIN_COVERAGE
        and summary["geometry"] == first["geometry"]
    )
    return {
        "run": summary["run"],
        "full_last": last["full"],
        "full_best": summary["best"]["full"],
        "delta_full": last["full"] - first["last"]["full"],
        "official": last["official"],
        "coverage": last["coverage"],
        "official_flagged": last["coverage"] < MIN_COVERAGE,
        "delta_official": last["official"] - first["last"]["official"] if comparable else None,
        "bits_per_byte": last["bits_per_byte"],
        "steps": summary["steps"],
        "reused": summary.get("ledger", {}).get("reused", 0),
        "tokens": summary["tokens"],
        "presentations_per_token": summary["presentations"]["presentations_per_token"],
        "params": summary["params"],
        "seconds": summary["seconds"],
        "tokens_per_s": summary["tokens_per_s"],
        "guards": {
            status: [g["name"] for g in guards if g["status"] == status]
            for status in ("pass", "flag", "fail")
        },
    }


def verdict(guards: dict[str, list[str]]) -> str:
    """What the guards said, the worst first."""
    said = [f"{status}: {', '.join(guards[status])}" for status in ("fail", "flag") if guards[status]]
    return "; ".join(said) or f"{len(guards['pass'])} pass"


HEAD = (
    "run", "full last", "full best", "delta full", "official", "bits/byte",
    "steps", "tokens", "seen/token", "params", "time", "tok/s", "guards",
)  # fmt: skip


def show(table: list[dict[str, Any]], console: Console) -> None:
    """A row a run where the screen is wide enough, else the same figures turned round: a column a run."""
    from rich import box
    from rich.table import Table

    cells = [_cells(row, first=i == 0) for i, row in enumerate(table)]

    def draw(columns: list[str], lines: list[list[str]]) -> Table:
        drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for i, name in enumerate(columns):
            drawn.add_column(name, justify="right" if i else "left")
        for line in lines:
            drawn.add_row(*line)
        return drawn

    def fits(drawn: Table) -> bool:
        return console.measure(drawn, options=console.options.update(width=10_000)).maximum <= console.width

    wide = draw(list(HEAD), cells)
    if fits(wide):
        console.print(wide)
        cells = []
    while cells:  # as many runs beside each other as the screen takes, then the next ones below
        for n in range(len(cells), 0, -1):
            first, *lines = ([name, *column] for name, *column in zip(HEAD, *cells[:n], strict=True))
            drawn = draw(first, lines)
            if fits(drawn):
                break
        console.print(drawn)
        cells = cells[n:]
    if any(row["official_flagged"] for row in table):
        note = f"(!) covers less than {MIN_COVERAGE:.0%} of val, so this official score is not comparable; `full` covers all of it."
        console.print(note, soft_wrap=True, markup=False)
    for row in table:
        if row["reused"]:
            what = f"{row['reused']:,} of {row['steps']:,} steps were taken from the store; time and tok/s are of the others"
            console.print(f"(*) {row['run']}: {what}", soft_wrap=True, markup=False)
    for row in table:
        if row["guards"]["fail"] or row["guards"]["flag"]:
            console.print(f"{row['run']}: guards: {verdict(row['guards'])}", soft_wrap=True, markup=False)


def picture(table: list[dict[str, Any]], path: Path) -> None:
    """The same table as an SVG."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=150, highlight=False)
    show(table, console)
    # a fixed id: the same table is the same file
    drawn = console.export_svg(title="mainrun compare", unique_id="mainrun")
    try:
        path.write_text(drawn, encoding="utf-8")
    except OSError as e:
        raise UsageError(
            f"cannot write {path}: {e.strerror}; give --svg a file in a writable folder"
        ) from None


def _cells(row: dict[str, Any], *, first: bool) -> list[str]:
    guards = row["guards"]
    return [
        row["run"],
        f"{row['full_last']:.4f}",
        f"{row['full_best']:.4f}",
        "" if first else f"{row['delta_full']:+.4f}",
        f"{row['official']:.4f} ({percent(row['coverage'])}{'!' if row['official_flagged'] else ''})",
        f"{row['bits_per_byte']:.4f}",
        f"{row['steps']:,}{'*' if row['reused'] else ''}",
        short(row["tokens"]),
        f"{row['presentations_per_token']:.4g}",
        short(row["params"]),
        clock(row["seconds"]),
        short(row["tokens_per_s"]) if row["reused"] < row["steps"] else "",
        ", ".join(f"{len(guards[s])} {s}" for s in ("pass", "flag", "fail") if guards[s]),
    ]
