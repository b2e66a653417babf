"""`mainrun hub`: exchange models with the Hugging Face hub and with `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mainrun.interop.export_cli import export, push
from mainrun.ui.console import Debug, commands, stoppable, validate_paths

app = commands("Exchange models with the Hugging Face hub and with transformers.")


@app.command("import")
def import_checkpoint(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR|OWNER/NAME[@REVISION]", help="The folder of a Qwen2 checkpoint, or a hub repository."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.toml", callback=validate_paths, help="The preset to write.")
    ],
    block_size: Annotated[
        int,
        typer.Option(
            "--block-size",
            min=0,
            max=65_536,
            metavar="N",
            help="The context length. The value 0 means 1024, or the checkpoint's own if that is shorter.",
        ),
    ] = 0,
    pattern: Annotated[
        str, typer.Option("--pattern", metavar="DM", help="Route blocks: the value of block_pattern.")
    ] = "",
    capacity: Annotated[
        float | None,
        typer.Option("--capacity", metavar="C", help="The fraction of tokens that a routed block processes."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite an earlier preset, even if it was edited.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check a Qwen2 checkpoint, and write a preset that starts from its weights.

    The weights are not copied. To train the preset, use `mainrun train --preset FILE.toml --set corpus=...`.
    """
    from mainrun.interop.hub import write_preset

    with stoppable():
        preset = write_preset(
            source, out, block_size=block_size, pattern=pattern, capacity=capacity, force=force
        )
    print(preset)


app.command("export")(export)
app.command("push")(push)
