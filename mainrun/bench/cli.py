"""`mainrun bench`: what a step costs, and what sharing steps saves."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from mainrun.errors import MainrunError, UsageError
from mainrun.ui.console import Debug, Json, commands, emit, process_group, show_table, stoppable

app = commands("Measure steps, and what sharing them saves: step, gpu, lineage.")


Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field; may be repeated.")
]
Repeats = Annotated[
    int, typer.Option("--repeats", min=1, max=1000, help="Measured steps of each; their median counts.")
]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@app.command("step")
def bench_step(
    preset: Annotated[
        str, typer.Option("--preset", metavar="NAME|FILE", help="A preset, a TOML file, or NAME:STEP.")
    ] = "baseline",
    sets: Sets = None,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="Also a plain loop, and both with the C library's own allocator.")
    ] = False,
    repeats: Repeats = 5,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a training step and its parts, beside rivals.

    Each rival has a process of its own and they take turns, step by step. The plain loop is always float32 with AdamW.
    """
    from mainrun.bench import step
    from mainrun.plan.recipes import load

    configs = load(preset, sets or [])
    if len(configs) > 1:
        raise UsageError(
            f"preset {preset!r} has {len(configs)} steps, bench takes one; write --preset {configs[0].preset}, say"
        )
    found = step.measure(configs[0], rivals=rivals, repeats=repeats, note=_note)
    if as_json:
        emit(found)
    else:
        show_table(*step.table(found))
        print(*step.lines(found), sep="\n")


@app.command("lineage")
def bench_lineage(
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME|FILE", help="The base, in place of a very small one."),
    ] = None,
    sets: Sets = None,
    studies: Annotated[str, typer.Option("--studies", metavar="1,2,3,4", help="Which.")] = "1,2,3,4",
    trials: Annotated[
        int, typer.Option("--trials", min=0, max=192, help="Of each study so many, at random; 0: all.")
    ] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What sharing prefixes saves, and that it changes no bit.

    Four studies are trained with a store and from scratch; it takes a while (half an hour for all of them).
    """
    from mainrun.config import from_dict
    from mainrun.plan.recipes import load, parse_set

    if not (re.fullmatch(r"[1-4](,[1-4])*", studies)):
        raise UsageError(f"got --studies {studies!r}; write some of 1,2,3,4 with commas between them")
    with process_group(), stoppable():
        from mainrun.bench import lineage

        changes = dict(parse_set(text) for text in sets or [])
        bases = load(preset, sets or []) if preset else [from_dict(lineage.SMALL | changes)]
        if len(bases) > 1:
            raise UsageError(
                f"preset {preset!r} has {len(bases)} steps, bench takes one; write --preset {bases[0].preset}, say"
            )
        (base,) = bases
        found = lineage.measure(base, [int(study) for study in studies.split(",")], trials, _note)
        overheads = lineage.overheads()
    if as_json:
        emit({"studies": found, "overheads": overheads})
    else:
        show_table(*lineage.table(found))
        print(*lineage.lines(overheads), sep="\n")
    if any(row["differ"] for row in found):
        raise MainrunError(
            "a run that shared its prefix is not the same as from scratch; the last column says how many"
        )


@app.command("gpu")
def bench_gpu(sets: Sets = None, repeats: Repeats = 5, as_json: Json = False, debug: Debug = False) -> None:
    """On a GPU: share of the peak, whole runs, repeats.

    For baseline and optimized, in bfloat16: the share of the GPU's peak that a step reaches, the wall time of a whole run, and
    whether a second run gives the same losses and weights to the bit.
    """
    from mainrun.bench import gpu

    found = gpu.measure(sets or [], repeats=repeats, note=_note)
    if as_json:
        emit(found)
    else:
        show_table(*gpu.table(found))
        print(*gpu.lines(found), sep="\n")
    if any(row["differences"] for row in found["presets"]):
        raise MainrunError("two runs of one config are not the same; the lines above say where they part")
