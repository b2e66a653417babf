"""Compare finished runs in a table.

Use the score `full` to rank runs. The score `official` is shown with the share of the validation tokens that
this score covers. Runs that were scored on different titles are refused, because their scores are not
comparable.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from mainrun.config import MIN_COVERAGE
from mainrun.errors import RunError, UsageError
from mainrun.files.inputs import printable, shown
from mainrun.run.progress import clock, percent, short
from mainrun.store import costs
from mainrun.ui.console import print_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
SAME = ("corpus", "val")  # the fingerprints that must be equal in all compared runs
STATUSES = ("pass", "flag", "fail")  # the possible results of a guard

FORWARD_FLOPS = "forward FLOPs"  # this column is shown only if the runs differ in it
MEMBERS = "members"  # this column is shown only if a run has several members
HEAD = (
    "run", "full last", "full best", "delta full", FORWARD_FLOPS, "official", "bits/byte",
    "steps", "tokens", "seen/token", "params", MEMBERS, "time", "tok/s", "guards",
)  # fmt: skip
# The head of the table of costs. A line break divides a long name into two lines.
COST_HEAD = (
    "run", "full", "official", "params", MEMBERS, "seen/\nepoch", "training\nFLOPs", "forward\nFLOPs", "time",
    "machine",
)  # fmt: skip
COST_NOTE = (
    "seen/epoch is how often an epoch shows each token of train, over all passes and members. "
    "forward FLOPs is the cost per token of a forward pass of the scored model."
)


# -- summaries


def load_summary(run: RunDir) -> dict[str, Any]:
    """Return the summary of a run. Raise RunError if the run is unfinished or the summary is damaged."""
    run.config()  # `config` raises an error if the folder is not a run directory
    summary = run.summary()
    if summary is None:
        state = run.status().get("state", "not started")
        fix = "to resume the run, repeat its `mainrun train` command"
        if state == "diverged":
            fix = "it would diverge again, so train a config with a lower lr or a longer warm-up"
        raise RunError(f"run {run.path.name} is not finished ({state}); {fix}")
    missing = [name for name in NEEDED if name not in summary]
    for name in SAME:
        if name not in summary.get("fingerprints", {}):
            missing.append(f"{name} fingerprint")
    if missing:
        raise RunError(f"{run.path}/summary.json is damaged ({missing[0]!r} is missing); {run.fix}")
    _check_scores(run, summary)
    return summary


def _check_scores(run: RunDir, summary: dict[str, Any]) -> None:
    """Raise RunError if the scores in the summary differ from the scores in metrics.jsonl."""
    logged: dict[str, dict[str, Any]] = {"last": {}, "best": {}}
    split = summary["last"]["split"]
    evals = [row for row in run.rows() if row.get("event") == "eval" and row["split"] == split]
    if evals:
        logged["last"] = evals[-1]
        logged["best"] = min(evals, key=lambda row: row["full"])
    for name, row in logged.items():
        for key, value in summary[name].items():
            if key not in row or row[key] != value:
                raise RunError(
                    f"{run.path}/summary.json says {shown(value, 60)} for {key} of the {name} score, "
                    f"but metrics.jsonl says {shown(row.get(key), 60)}; "
                    "one of the files was changed after the run; restore it, or train again with --fresh"
                )


# -- rows


def rows(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one table row per run. Each row compares the run with the first run."""
    first = summaries[0]
    for other in summaries[1:]:
        _check_same_data(first, other)
        check_same_kind_of_start(first, other)
    return [_row(summary, first) for summary in summaries]


def _check_same_data(first: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise RunError if two runs were scored on different titles."""
    data = _data_of(first)
    other_data = _data_of(other)
    differences = []
    for name, value in data.items():
        if other_data[name] != value:
            differences.append(f"{name} {value} against {other_data[name]}")
    if differences:
        raise RunError(
            f"{first['run']} and {other['run']} were scored on different data: {'; '.join(differences)}; "
            "compare runs of the same corpus, num_titles, shuffle and val_frac"
        )


def check_same_kind_of_start(first: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise RunError if only one of two runs started from random weights."""
    sources = [_start_of(summary) for summary in (first, other)]
    if sources.count("random weights") == 1:
        raise RunError(
            f"{first['run']} started from {sources[0]}, but {other['run']} from {sources[1]}; "
            "compare runs from random weights only with each other"
        )


def _start_of(summary: dict[str, Any]) -> str:
    """Return the source of the weights that a run started from."""
    start = summary.get("start")
    return start["source"] if start else "random weights"


def _start_digest_of(summary: dict[str, Any]) -> str | None:
    """Return the hash of the weights that a run started from, or None if they were random."""
    start = summary.get("start")
    return start["digest"] if start else None


def _data_of(summary: dict[str, Any]) -> dict[str, str]:
    """Return the values that identify the titles on which a run was scored."""
    data = {f"{name} fingerprint": summary["fingerprints"][name][:12] for name in SAME}
    data["scored split"] = summary["last"]["split"]
    return data


def _row(summary: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    last = summary["last"]
    # Official scores with different batch geometries cover different tokens.
    same_geometry = summary["geometry"] == first["geometry"]
    lowest_coverage = min(last["coverage"], first["last"]["coverage"])
    delta_official = None
    if same_geometry and lowest_coverage >= MIN_COVERAGE:
        delta_official = last["official"] - first["last"]["official"]
    guards: dict[str, list[str]] = {status: [] for status in STATUSES}
    for guard in summary["guards"]:
        if guard["status"] in guards:
            guards[guard["status"]].append(guard["name"])
    row = {
        "run": summary["run"],
        "start_digest": _start_digest_of(summary),
        "full_last": last["full"],
        "full_best": summary["best"]["full"],
        "delta_full": last["full"] - first["last"]["full"],
        "official": last["official"],
        "coverage": last["coverage"],
        "official_flagged": last["coverage"] < MIN_COVERAGE,
        "delta_official": delta_official,
        "bits_per_byte": last["bits_per_byte"],
        "steps": summary["steps"],
        "reused": summary.get("ledger", {}).get("reused", 0),
        "tokens": summary["tokens"],
        "presentations_per_token": summary["presentations"]["presentations_per_token"],
        "params": summary["params"],
        "members": costs.members(summary),
        "presentations_per_epoch": costs.presentations_per_epoch(summary),
        "flops": summary.get("flops"),
        "forward_flops": costs.forward_flops(summary),
        "seconds": summary["seconds"],
        "machine": costs.machine(summary),
        "tokens_per_s": summary["tokens_per_s"],
        "guards": guards,
    }
    if "member_scores" in summary:
        row["member_scores"] = summary["member_scores"]["val"]
    if "ngram_entries" in summary:
        row["ngram_entries"] = summary["ngram_entries"]
    return row


# -- the table


def show(table: list[dict[str, Any]], console: Console, show_costs: bool = False) -> None:
    """Print the comparison table and its notes. `show_costs` selects the table of costs."""
    notes = _notes(table)
    if show_costs:
        letters = machine_letters(row["machine"] for row in table)
        head = list(COST_HEAD)
        cells = [_cost_cells(row, letters) for row in table]
        machines = [f"machine {letter}: {printable(name)}" for name, letter in letters.items()]
        notes = [*machines, COST_NOTE, *notes]
    else:
        head = list(HEAD)
        cells = [_cells(row, first=i == 0) for i, row in enumerate(table)]
        _remove_constant_columns(head, cells, table)
    show_table(head, cells, console)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)


def machine_letters(machines: Iterable[str]) -> dict[str, str]:
    """Map each machine to a short name: A, B, ..., Z, A2, B2, ..."""
    letters: dict[str, str] = {}
    for machine in machines:
        lap, place = divmod(len(letters), len(ascii_uppercase))
        letters.setdefault(machine, ascii_uppercase[place] + (str(lap + 1) if lap else ""))
    return letters


def _remove_constant_columns(head: list[str], cells: list[list[str]], table: list[dict[str, Any]]) -> None:
    """Remove the columns that say nothing about these runs."""
    constant = []
    if len({line[head.index(FORWARD_FLOPS)] for line in cells}) == 1:
        constant.append(FORWARD_FLOPS)
    if all(row["members"] == 1 for row in table):
        constant.append(MEMBERS)
    for name in constant:
        column = head.index(name)
        for line in (head, *cells):
            del line[column]


def compact(number: float | None) -> str:
    """Format a number of FLOPs with three digits and a suffix, such as 4.59M."""
    if number is None:
        return ""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def scientific(number: float | None) -> str:
    """Format a large number, such as a number of FLOPs, in scientific notation with three digits."""
    if number is None:
        return ""
    return f"{number:.3g}".replace("e+", "e")


def show_table(head: list[str], cells: list[list[str]], console: Console) -> None:
    """Print a table with one row per run, or with one column per run if the screen is narrow."""
    wide = _draw(head, cells)
    if _fits(wide, console):
        print_table(wide, console)
    else:
        _show_transposed(list(map(one_line, head)), cells, console)


def one_line(head: str) -> str:
    """Return the name of a column without its line break."""
    return head.replace("/\n", "/").replace("\n", " ")


def _show_transposed(names: list[str], cells: list[list[str]], console: Console) -> None:
    """Print a table with one column per run, or several tables if the screen is too narrow for all runs."""
    while cells:
        count = len(cells)
        drawn = _draw_transposed(names, cells)
        while count > 1 and not _fits(drawn, console):
            count -= 1
            drawn = _draw_transposed(names, cells[:count])
        print_table(drawn, console)
        cells = cells[count:]


def _draw_transposed(names: list[str], cells: list[list[str]]) -> Table:
    head, *lines = ([name, *values] for name, *values in zip(names, *cells, strict=True))
    return _draw(head, lines)


def _draw(head: list[str], lines: list[list[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(head[0], justify="left")
    for name in head[1:]:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*line)
    return table


def _fits(table: Table, console: Console) -> bool:
    width = console.measure(table, options=console.options.update(width=10_000)).maximum
    return width <= console.width


def _notes(table: list[dict[str, Any]]) -> list[str]:
    """Return the notes that are printed below the table."""
    notes = []
    if any(row["official_flagged"] for row in table):
        notes.append(
            f"(!) This official score covers less than {MIN_COVERAGE:.0%} of val, so it is not comparable. "
            "The score `full` covers all of val."
        )
    if len({row["start_digest"] for row in table}) > 1:
        notes.append(
            "The runs start from different weights, so their difference is not only due to training."
        )
    for row in table:
        if row["members"] > 1:
            notes.append(_ensemble_note(row))
    for row in table:
        if "ngram_entries" in row:
            notes.append(
                f"{row['run']} is scored in a mixture with an n-gram model of {row['ngram_entries']:,} "
                "entries, which the columns do not count"
            )
    for row in table:
        if row["reused"]:
            notes.append(
                f"(*) {row['run']}: {row['reused']:,} of {row['steps']:,} steps were copied from the store; "
                "its speed and time are those of the other steps"
            )
    for row in table:
        if row["guards"]["fail"] or row["guards"]["flag"]:
            notes.append(f"{row['run']}: guards: {_verdict(row['guards'])}")
    return notes


def _ensemble_note(row: dict[str, Any]) -> str:
    note = f"{row['run']} is an ensemble of {row['members']} models; the columns count all of them"
    if "member_scores" not in row:  # the summaries of older versions have no scores of the members
        return note
    scores = ", ".join(f"{score:.4f}" for score in row["member_scores"])
    mixture = " and without the n-gram model" if "ngram_entries" in row else ""
    return f"{note}; the full scores of its models alone{mixture} are {scores}"


def _verdict(guards: dict[str, list[str]]) -> str:
    """Return a string that lists the guards that failed and the guards that flagged the run."""
    parts = []
    for status in ("fail", "flag"):
        if guards[status]:
            parts.append(f"{status}: {', '.join(guards[status])}")
    return "; ".join(parts)


def _cells(row: dict[str, Any], *, first: bool) -> list[str]:
    star = "*" if row["reused"] else ""
    trained = row["reused"] < row["steps"]
    counts = [f"{len(row['guards'][status])} {status}" for status in STATUSES if row["guards"][status]]
    return [
        row["run"],
        f"{row['full_last']:.4f}",
        f"{row['full_best']:.4f}",
        "" if first else f"{row['delta_full']:+.4f}",
        compact(row["forward_flops"]),
        _official(row),
        f"{row['bits_per_byte']:.4f}",
        f"{row['steps']:,}{star}",
        short(row["tokens"]),
        f"{row['presentations_per_token']:.4g}",
        short(row["params"]),
        str(row["members"]),
        clock(row["seconds"]),
        short(row["tokens_per_s"]) if trained else "",
        ", ".join(counts),
    ]


def _cost_cells(row: dict[str, Any], letters: dict[str, str]) -> list[str]:
    star = "*" if row["reused"] else ""
    return [
        row["run"],
        f"{row['full_last']:.4f}",
        _official(row),
        short(row["params"]),
        str(row["members"]),
        str(row["presentations_per_epoch"]),
        scientific(row["flops"]),
        compact(row["forward_flops"]),
        clock(row["seconds"]) + star,
        letters[row["machine"]],
    ]


def _official(row: dict[str, Any]) -> str:
    """Return the official score of a run with the share of the tokens that the score covers."""
    flag = "!" if row["official_flagged"] else ""
    return f"{row['official']:.4f} ({percent(row['coverage'])}{flag})"


def write_svg(draw: Callable[[Console], None], path: Path) -> None:
    """Write the tables that `draw` prints as an SVG image."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=150, highlight=False)
    draw(console)
    # A fixed ID for the SVG elements makes the file reproducible.
    svg = console.export_svg(title="mainrun compare", unique_id="mainrun")
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as e:
        raise UsageError(
            f"cannot write {path}: {e.strerror}; give --svg a file in a writable folder"
        ) from None
