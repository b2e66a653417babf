"""`mainrun grow`: a schedule checked whole before a run, and what it did proven after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mainrun.errors import ConfigError, MainrunError, UsageError
from mainrun.ui.console import Debug, Json, commands, emit, show_table, stoppable, validate_paths
from mainrun.ui.store_cli import StorePlace, open_store

app = commands("How a model grows while it trains: plan, verify.")


@app.command("plan")
def plan(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A schedule: a JSON, YAML or TOML file, or JSON itself.")
    ],
    preset: Annotated[
        str, typer.Option("--preset", metavar="NAME|FILE", help="What it begins with.")
    ] = "optimized",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one field; may be repeated."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--train-tokens",
            min=1,
            max=10**13,
            metavar="N",
            help="Of an epoch: shows steps, and warns of triggers out of reach.",
        ),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option("--speed", min=1.0, metavar="FLOP/S", help="With --train-tokens: shows the time."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a schedule op by op, and say what each makes of the model. Nothing is trained.

    Exits with 2 when something is wrong with it; every fault is named.
    """
    from mainrun.plan.op_files import from_text
    from mainrun.plan.recipes import load
    from mainrun.plan.simulate import simulate

    if speed and tokens is None:
        raise UsageError("got --speed without --train-tokens; give both for the time, or neither")
    configs = load(preset, sets or [])
    if len(configs) > 1:
        raise UsageError(
            f"preset {preset!r} has {len(configs)} steps, a schedule begins with one; write --preset {configs[0].preset}, say"
        )
    found = simulate(configs[0], from_text(file), tokens, speed)
    if found.faults:
        raise ConfigError("\n".join([f"{file} cannot be carried out", *found.faults]))
    rows = [_row(segment) for segment in found.segments]
    if as_json:
        emit({"warnings": found.warnings, "segments": rows})
        return
    _show(rows)
    for warning in found.warnings:
        print(f"warning: {warning}")


@app.command("verify")
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", callback=validate_paths, help="A run directory.")],
    place: StorePlace = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Do the ops of a run once more, from the states before them, and check what they promised.

    The way to each op comes from the store beside the run (or --store), and is trained where it is not there. Exits with 1 when a check
    fails, or an op leaves another row than it did in the run.
    """
    from mainrun.checks.repeat import repeat_ops
    from mainrun.store.rundir import RunDir

    with stoppable():
        found = [
            finding._asdict() for finding in repeat_ops(RunDir(run), open_store(place, run.absolute().parent))
        ]
    if as_json:
        emit(found)
    else:
        verdict = {
            (True, True): "ok",
            (True, False): "ok, but not as in the run",
            (False, True): "FAILS",
            (False, False): "FAILS",
        }
        rows = [
            [f["name"], str(f["step"]), f["check"], verdict[f["ok"], f["same"]], f["detail"]] for f in found
        ]
        show_table(["op", "step", "check", "", "what was found"], rows)
    wrong = [f for f in found if not f["ok"]]
    if wrong or not all(f["same"] for f in found):
        why = (
            f"{len(wrong)} of {len(found)} checks fail"
            if wrong
            else "the ops did not do again what the run's journal says"
        )
        raise MainrunError(f"{why}; the table says where")


def _row(segment: Any) -> dict[str, Any]:
    cfg, size = segment.cfg, segment.size
    return {
        "op": segment.op, "begins": segment.begins, "layers": cfg.n_layer, "width": cfg.d_model, "heads": cfg.n_head,
        "experts": cfg.experts, "params": size.params, "active": size.active, "flops_per_token": size.flops,
        "optimizer_bytes": size.moments, "steps": segment.steps, "tokens": segment.tokens, "seconds": segment.seconds,
    }  # fmt: skip


def _show(rows: list[dict[str, Any]]) -> None:
    from mainrun.run.progress import clock, short

    columns: dict[str, Any] = {
        "op": lambda row: row["op"] or "start",
        "begins": lambda row: row["begins"],
        "layers": lambda row: str(row["layers"]),
        "width": lambda row: str(row["width"]),
        "heads": lambda row: str(row["heads"]),
        "experts": lambda row: str(row["experts"] or ""),
        "parameters": lambda row: f"{row['params']:,}",
        "active": lambda row: f"{row['active']:,}",
        "FLOPs a token": lambda row: f"{row['flops_per_token']:.3g}",
        "optimiser": lambda row: f"{short(row['optimizer_bytes'])}B",
        "steps": lambda row: "" if row["steps"] is None else f"{row['steps']:,}",
        "ETA": lambda row: "" if row["seconds"] is None else clock(row["seconds"]),
    }
    columns = {
        head: cell for head, cell in columns.items() if head not in ("steps", "ETA") or any(map(cell, rows))
    }
    show_table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])
