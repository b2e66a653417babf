"""`mainrun hub export` and `mainrun hub push`: write the model of a run for `transformers` and `peft`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mainrun.ui.console import Debug, Out, RunName, stoppable, validate_paths

Adapter = Annotated[
    bool, typer.Option("--adapter", help="Write only the low-rank terms, as an adapter for peft.")
]


class Dtype(StrEnum):
    """The types of numbers in an exported file."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def export(
    run: RunName,
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", callback=validate_paths, help="The folder to create."),
    ],
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="The type of the weights. Only float32 keeps every bit.")
    ] = Dtype.float32,
    adapter: Adapter = False,
    out: Out = Path("runs"),
    debug: Debug = False,
) -> None:
    """Write the model of a run as a Qwen2 checkpoint, which transformers loads."""
    from mainrun.store import rundir

    run_dir = rundir.find(run, out)
    run_dir.config()  # raise an error for a wrong folder now, before the slow import of torch
    with stoppable():
        from mainrun.interop.export import export_run

        export_run(run_dir, folder, dtype=dtype.value, adapter=adapter)
    print(folder)


def push(
    run: RunName,
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub, which may exist already.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    adapter: Adapter = False,
    out: Out = Path("runs"),
    debug: Debug = False,
) -> None:
    """Export the model of a finished run, and upload it to the Hugging Face hub.

    The library huggingface_hub finds the access token, for example in HF_TOKEN.
    """
    from mainrun.store import rundir

    run_dir = rundir.find(run, out)
    with stoppable():
        from mainrun.interop.push import push_run

        url = push_run(run_dir, repo, private=private, adapter=adapter)
    print(url)
