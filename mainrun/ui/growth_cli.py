"""`mainrun grow`: check a growth schedule before a run, and verify its operations after the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import ConfigError, MainrunError, UsageError
from mainrun.ui.console import Debug, Json, commands, emit, show_table, stoppable, validate_paths
from mainrun.ui.store_cli import StorePlace, open_store

if TYPE_CHECKING:
    from mainrun.plan.simulate import SegmentForecast

Row = dict[str, Any]

ASYMMETRY = (
    "; equal copies get equal gradients and may never diverge, so give the operation "
    'optimizer = { mode = "asymmetric" } or, for widen_model, a noise_snr_db such as 10'
)

app = commands("Check and verify how a model grows during training.")


@app.command("plan")
def plan(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A growth schedule: a JSON, YAML or TOML file, or inline JSON."),
    ],
    preset: Annotated[
        str, typer.Option("--preset", metavar="NAME|FILE", help="The config at the start of the run.")
    ] = "optimized",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a config field. Can be repeated."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--train-tokens",
            min=1,
            max=10**13,
            metavar="N",
            help="Training tokens per epoch. Used to show steps, and to find operations that cannot fire.",
        ),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option("--speed", min=1.0, metavar="FLOP/S", help="With --train-tokens, also show the time."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a growth schedule and show the model after each operation. Nothing is trained.

    If the schedule has faults, all faults are listed and the exit code is 2.
    """
    from mainrun.plan.op_files import from_text
    from mainrun.plan.recipes import load
    from mainrun.plan.simulate import simulate

    if speed and tokens is None:
        raise UsageError("got --speed without --train-tokens; give both to see the time, or neither")
    configs = load(preset, sets or [])
    if len(configs) > 1:
        raise UsageError(
            f"preset {preset!r} has {len(configs)} steps, but a schedule starts from one config; "
            f"write, for example, --preset {configs[0].preset}"
        )
    forecast = simulate(configs[0], from_text(file), tokens, speed)
    if forecast.faults:
        raise ConfigError("\n".join([f"{file} cannot be applied", *forecast.faults]))
    rows = [_row(segment) for segment in forecast.segments]
    if as_json:
        emit({"warnings": forecast.warnings, "segments": rows})
        return
    _show(rows)
    for warning in forecast.warnings:
        print(f"warning: {warning}")


@app.command("verify")
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", callback=validate_paths, help="A run directory.")],
    place: StorePlace = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Repeat the growth operations of a run and all their checks.

    Each operation starts from the state that the run had before the operation. The state is read from the
    store. If the store does not contain the state, the steps up to it are trained again. The exit code is 1
    if a check fails, or if an operation gives a different result than in the run.
    """
    from mainrun.checks.repeat import repeat_ops
    from mainrun.store.rundir import RunDir

    with stoppable():
        store = open_store(place, run.absolute().parent)
        checks = [finding._asdict() for finding in repeat_ops(RunDir(run), store)]
    if as_json:
        emit(checks)
    else:
        lines = [[c["name"], str(c["step"]), c["check"], _verdict(c), c["detail"]] for c in checks]
        show_table(["op", "step", "check", "", "details"], lines)
    failed = [check for check in checks if not check["ok"]]
    if failed:
        advice = ASYMMETRY if any(check["check"] == "symmetry" for check in failed) else ""
        raise MainrunError(f"{len(failed)} of {len(checks)} checks failed; see the table{advice}")
    if not all(check["same"] for check in checks):
        raise MainrunError("the repeated ops gave different results than in the run; see the table")


def _verdict(check: Row) -> str:
    if not check["ok"]:
        return "FAILS"
    return "ok" if check["same"] else "ok, but different from the run"


def _row(segment: SegmentForecast) -> Row:
    """Return the description of a segment for the --json output."""
    cfg = segment.cfg
    size = segment.size
    return {
        "op": segment.op,
        "begins": segment.begins,
        "layers": cfg.n_layer,
        "width": cfg.d_model,
        "heads": cfg.n_head,
        "experts": cfg.experts,
        "params": size.params,
        "active": size.active,
        "flops_per_token": size.flops,
        "optimizer_bytes": size.moments,
        "steps": segment.steps,
        "tokens": segment.tokens,
        "seconds": segment.seconds,
    }


def _show(rows: list[Row]) -> None:
    from mainrun.run.progress import clock, short

    columns: dict[str, Callable[[Row], str]] = {
        "op": lambda row: row["op"] or "start",
        "begins": lambda row: row["begins"],
        "layers": lambda row: str(row["layers"]),
        "width": lambda row: str(row["width"]),
        "heads": lambda row: str(row["heads"]),
        "experts": lambda row: str(row["experts"] or ""),
        "parameters": lambda row: f"{row['params']:,}",
        "active": lambda row: f"{row['active']:,}",
        "FLOPs per token": lambda row: f"{row['flops_per_token']:.3g}",
        "optimizer": lambda row: f"{short(row['optimizer_bytes'])}B",
    }
    if any(row["steps"] is not None for row in rows):
        columns["steps"] = lambda row: "" if row["steps"] is None else f"{row['steps']:,}"
    if any(row["seconds"] is not None for row in rows):
        columns["ETA"] = lambda row: "" if row["seconds"] is None else clock(row["seconds"])
    lines = [[cell(row) for cell in columns.values()] for row in rows]
    show_table(list(columns), lines)
