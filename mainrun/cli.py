"""The command-line interface, with commands such as `mainrun train`, `mainrun sweep` and `mainrun report`.

Results go to stdout. With --json, stdout contains only JSON. Progress and errors go to stderr.

The exit codes are:

    0: the command succeeded
    1: the command failed or crashed
    2: the usage is wrong
    3: the training diverged
    75: the command was interrupted and can be resumed
    130: Ctrl-C was pressed twice

Each command imports slow libraries such as torch only when it needs them, so that `mainrun --help` is fast.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mainrun import __version__
from mainrun.bench import cli as bench
from mainrun.interop import cli as hub
from mainrun.interop import eval_cli
from mainrun.ui import completion
from mainrun.ui import growth_cli as grow
from mainrun.ui import store_cli as store
from mainrun.ui.console import (
    Debug,
    Group,
    Json,
    Out,
    RunName,
    RunNames,
    Sets,
    check_regular_file,
    console,
    emit,
    guard_streams,
    stoppable,
    validate_paths,
)
from mainrun.ui.ls_cli import ls
from mainrun.ui.presets_cli import presets
from mainrun.ui.train_cli import train
from reports import cli as reports
from reports.submission import cli as submission
from sweeps import cli as sweep

if TYPE_CHECKING:
    from rich.console import Console

CONTROL = r"[\x00-\x1f\x7f-\x9f]"
CONTROL_IN_DOCUMENT = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # line breaks and tabs are printed as they are

app = typer.Typer(
    cls=Group,
    # Typer's own options would install its scripts. Its part that answers a script is needed only then.
    add_completion=completion.VARIABLE in os.environ,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # show the help without Rich, which is slow to import
    help="Train small language models under a fixed budget, with results that are reproducible to the bit.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line. This function is the entry point of the `mainrun` script."""
    guard_streams()
    try:
        app()
    except SystemExit as e:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            _end_process(e.code if isinstance(e.code, int) else 0)
        raise
    finally:
        # After the command has ended, Ctrl-C must not interrupt the exit handlers of libraries.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_process(code: int) -> None:
    """End a process of torchrun without the shutdown of the interpreter.

    Threads of gloo outlive the process group. During the shutdown, such a thread may abort the process.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"mainrun {__version__}")
        raise typer.Exit


def _install_completion(requested: bool) -> None:
    if requested:
        print(completion.install())
        raise typer.Exit


def _show_completion(shell: str) -> None:
    if shell:
        print(completion.show(shell), end="")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion",
            callback=_install_completion,
            is_eager=True,
            help="Let this shell complete presets, fields, runs and studies.",
        ),
    ] = False,
    show_completion: Annotated[
        str,
        typer.Option(
            "--show-completion",
            metavar="bash|zsh|fish",
            callback=_show_completion,
            is_eager=True,
            help="Print the script that --install-completion installs.",
        ),
    ] = "",
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def demo(
    sets: Sets = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", callback=validate_paths, help="The folder of all results.")
    ] = Path("runs/demo"),
    debug: Debug = False,
) -> None:
    """Run the whole workflow in a few minutes.

    The demo trains models, runs a sweep, writes a report, and creates and verifies a submission. Each step is
    a separate command, which the demo prints. Ctrl-C stops the demo, and the same command resumes it. Nothing
    is sent over the network.
    """
    from mainrun.ui.demo import run_demo

    with stoppable():
        run_demo(out, sets or [], submission.why_not_submittable)


Costs = Annotated[
    bool,
    typer.Option("--costs", help="Show the parameters, FLOPs, time and machine beside each score."),
]
Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--paired",
        metavar="BASE,OTHER[,MARGIN]",
        help="Test whether recipes BASE and OTHER score differently, over the seeds of both. With MARGIN, "
        "test whether OTHER scores lower by more than MARGIN nats per character. Repeat the option to test "
        "several claims together.",
    ),
]


def compare(
    runs: RunNames,
    out: Out = Path("runs"),
    svg: Annotated[
        Path | None,
        typer.Option(
            "--svg", metavar="FILE", callback=validate_paths, help="Also write the table as an SVG image."
        ),
    ] = None,
    show_costs: Costs = False,
    pairs: Pairs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare finished runs in a table.

    The score `full` of each run is compared with the score of the first run. With --paired, also test claims
    about recipes, which are runs that differ only in their seed.
    """
    from mainrun.store import rundir
    from mainrun.ui import compare as comparison

    if svg:
        check_regular_file(svg, "--svg", b"<svg", "SVG")
    run_dirs = [rundir.find(place, out) for place in runs]
    summaries = [comparison.load_summary(run) for run in run_dirs]
    rows = comparison.rows(summaries)
    claims = []
    if pairs:
        from mainrun.ui import paired

        scores = zip(run_dirs, summaries, strict=True)
        claims = paired.judge_claims(
            [paired.RunScore(run.config(), summary) for run, summary in scores], pairs
        )

    def show(screen: Console) -> None:
        comparison.show(rows, screen, show_costs)
        if claims:
            paired.show(claims, screen)

    if svg:
        comparison.write_svg(show, svg)
    if as_json:
        emit({"runs": rows, "paired": claims} if claims else rows)
    else:
        show(console())


def ensemble(
    runs: RunNames,
    split: Annotated[str, typer.Option("--split", metavar="val|dev", help="The scored titles.")] = "val",
    out: Out = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score the mean of the probabilities of several finished runs.

    The runs must have been trained with --set token_scores=true and have the same held-out tokens.
    """
    from mainrun.ui import ensemble as ensembles

    members = ensembles.load(runs, out, split)
    result = ensembles.score(members, split)
    if as_json:
        emit(result)
    else:
        ensembles.show(result, console())


def sample(
    run: RunName,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="The text at the beginning of each title.")
    ],
    n: Annotated[int, typer.Option("-n", min=1, max=10_000, help="The number of titles.")] = 1,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=65_536, help="The maximum length of a title, in tokens.")
    ] = 40,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            min=0.0,
            max=100.0,
            help="The sampling temperature. At 0, the likeliest token is always chosen.",
        ),
    ] = 0.8,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed gives the same titles.")
    ] = 0,
    out: Out = Path("runs"),
    debug: Debug = False,
) -> None:
    """Generate titles with the model of a trained run."""
    from mainrun.store import rundir

    run_dir = rundir.find(run, out)
    cfg = run_dir.config()  # raises an error for a wrong folder now, before the slow import of torch
    from mainrun.ui.sample import sample as generate

    titles = generate(run_dir.path, prompt, n=n, max_tokens=max_tokens, temperature=temperature, seed=seed)
    control = CONTROL_IN_DOCUMENT if cfg.documents else CONTROL
    for number, title in enumerate(titles):
        if cfg.documents and number:
            print("-" * 20)
        # Print a title on one line. Escape control characters, which could change the terminal.
        print(re.sub(control, _escape, title))


def _escape(character: re.Match[str]) -> str:
    return f"\\x{ord(character[0]):02x}"


def doctor(out: Out = Path("runs"), as_json: Json = False, debug: Debug = False) -> None:
    """Check that this machine is ready for training.

    The exit code is 1 if a problem must be fixed before training.
    """
    from mainrun.ui.doctor import diagnose

    diagnoses = []
    for diagnosis in diagnose(out):
        diagnoses.append(diagnosis)
        if not as_json:
            fix = f"\n      fix: {diagnosis.fix}" if diagnosis.fix else ""
            print(f"{diagnosis.status:4}  {diagnosis.name}: {diagnosis.detail}{fix}", flush=True)
    if as_json:
        emit([vars(diagnosis) for diagnosis in diagnoses])
    if any(diagnosis.status == "fail" for diagnosis in diagnoses):
        raise typer.Exit(1)


def download(
    name: Annotated[str, typer.Argument(metavar="hn|hn-2025", help="The corpus to download.")],
    debug: Debug = False,
) -> None:
    """Download a corpus for offline training."""
    from mainrun.data.hub import download as fetch

    print(fetch(name))


TRAIN_EXAMPLES = """Examples:

\b
  mainrun train --preset demo                               the demo recipes, in a minute
  mainrun train --set corpus=file:titles.txt --set seed=1   the optimized recipe on your own titles
  mainrun train --preset mine.toml --dry-run                the steps, the memory and the time; trains nothing
"""

# `mainrun --help` lists the commands in this order.
app.command(epilog=TRAIN_EXAMPLES)(train)
app.command()(demo)
app.command()(presets)
app.command()(ls)
app.command()(compare)
app.command()(ensemble)
app.command()(sample)
app.command("eval")(eval_cli.eval_run)
app.command()(doctor)
app.command()(download)
app.command()(reports.report)
app.command()(reports.board)
app.add_typer(store.app, name="store")
app.add_typer(sweep.app, name="sweep")
app.add_typer(bench.app, name="bench")
app.add_typer(grow.app, name="grow")
app.add_typer(hub.app, name="hub")
app.command()(submission.submit)
app.command()(submission.verify)
