"""The command line: `mainrun train | grow | sweep | report | submit | verify | presets | compare | sample | store | bench | ...`.

stdout carries results (with --json: JSON and nothing else), stderr carries progress and errors. Exit codes:
0 done, 1 crash, 2 usage, 3 diverged, 75 interrupted and resumable, 130 Ctrl-C twice. Whatever is slow to import
(torch, Rich, pydantic) is imported by the command that needs it: `mainrun --help` must feel instant.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun import __version__
from mainrun.bench import cli as bench
from mainrun.errors import Diverged, Interrupted, MainrunError, RunError, UsageError
from mainrun.ui import growth_cli as grow
from mainrun.ui import store_cli as store_commands
from mainrun.ui.console import (
    Debug,
    Group,
    Json,
    Out,
    check_place,
    console,
    emit,
    guard_streams,
    is_leader,
    process_group,
    show_table,
    stoppable,
    validate_paths,
)
from mainrun.ui.store_cli import StorePlace, open_store
from reports import cli as reports
from reports.submission import cli as submission
from sweeps import cli as sweep

if TYPE_CHECKING:
    from mainrun.config import TrainConfig
    from mainrun.store.nodes import Store
    from mainrun.store.rundir import RunDir


app = typer.Typer(
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: no Rich import, and the same text in a pipe
    help="Train a small language model under a fixed budget, to the same bits each time.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The `mainrun` script."""
    guard_streams()
    try:
        app()
    finally:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # all is said; one more Ctrl-C must not tear the libraries' goodbyes


def _version(asked: bool) -> None:
    if asked:
        print(f"mainrun {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


# -- train


@app.command()
def train(
    preset: Annotated[
        str, typer.Option("--preset", metavar="NAME|FILE", help="A preset, a TOML file, or NAME:STEP.")
    ] = "optimized",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one field; may be repeated."),
    ] = None,
    out: Out = Path("runs"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what an earlier start of this run left, and redo it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and what it costs; train nothing.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="With --dry-run: take the time of a few steps, and throw them away."),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Say which steps the store, a run or another step has already; train nothing."
        ),
    ] = False,
    until: Annotated[
        int,
        typer.Option(
            "--until", min=0, metavar="STEP", help="Stop after that step; the same command goes on."
        ),
    ] = 0,
    no_store: Annotated[
        bool, typer.Option("--no-store", help="Train every step, and keep none for other runs.")
    ] = False,
    place: StorePlace = None,
    size: Annotated[
        str, typer.Option("--store-size", metavar="SIZE", help="Evict the least recently used beyond this.")
    ] = "20GB",
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
    debug: Debug = False,
) -> None:
    """Train a preset, or go on with its run.

    A run that is done shows its result. A preset with several steps trains each in turn and ends with their
    comparison. Ctrl-C stops between two steps and keeps everything; the same command goes on from there.
    Steps that another run has trained, to the bit, are taken from the store (DIR/.store, or MAINRUN_STORE).
    """
    from mainrun.plan.recipes import load

    if probe and not dry_run:
        raise UsageError(
            "got --probe without --dry-run, which it refines; add --dry-run, or leave --probe out to train"
        )
    if dry_run and plan:
        raise UsageError(
            "got --dry-run and --plan; give one of them: what a run costs, or what of it is there already"
        )
    if until and (dry_run or plan):
        raise UsageError(
            f"got --until {until} and {'--dry-run' if dry_run else '--plan'}, which trains nothing; leave one of them out"
        )
    if plan and fresh:
        raise UsageError("got --plan and --fresh, which takes nothing from the store; leave one of them out")
    if no_store and place is not None:
        raise UsageError(f"got --no-store and --store {place}; leave one of them out")
    configs = load(preset, sets or [])
    store = None if no_store else open_store(place, out, size)
    if plan:
        with process_group():
            _plan(configs, store, out, as_json)
        return
    if dry_run:
        with process_group():
            _dry_run(configs, probe, store is not None, as_json)
        return
    quiet = quiet or not is_leader()
    diverged = []
    done: dict[str, dict[str, Any]] = {}
    with process_group(), _batch(configs, store) as (order, keep):
        for i, cfg in enumerate(order):
            label = f"[{i + 1}/{len(configs)}] " if len(configs) > 1 else ""
            try:
                done[cfg.preset] = _train_one(
                    cfg, out, fresh, quiet, label, store, keep.get(cfg.run_id, []), until
                )
            except Diverged as e:
                if len(configs) == 1:
                    raise
                diverged.append(f"{cfg.run_id}: {e}")  # the other steps of a ladder are still worth training
    summaries = [done[cfg.preset] for cfg in configs if cfg.preset in done]
    if not is_leader():
        pass
    elif as_json:
        emit(summaries if len(configs) > 1 else summaries[0])
    elif not quiet:
        _show_results(summaries, out)
    if diverged:
        raise Diverged("; ".join(diverged))


@contextmanager
def _batch(
    configs: list[TrainConfig], store: Store | None
) -> Iterator[tuple[list[TrainConfig], dict[str, list[int]]]]:
    """Runs that share steps in the order of their plan, and where each leaves a node for others; those are pinned until all are done."""
    if store is None or len(configs) < 2:
        yield configs, {}
        return
    from mainrun.run import batch

    if not batch.may_share(configs):
        yield configs, {}
        return
    shared = batch.share_steps(configs, store)
    place = {part.name: i for i, part in enumerate(shared.assignments.order)}
    name = f"batch-{shared.keys[0][:16]}-{os.getpid()}" if shared.keys and is_leader() else ""
    try:
        with suppress(OSError):  # the runs will say that the store cannot be written
            if name:
                store.pin(name, shared.keys)
        yield sorted(configs, key=lambda cfg: place[cfg.run_id]), shared.keep
    finally:
        with suppress(OSError):
            if name:
                store.unpin(name)


def _plan(configs: list[TrainConfig], store: Store | None, out: Path, as_json: bool) -> None:
    from mainrun.run import batch

    found = batch.share_steps(configs, store, out).assignments
    if not is_leader():
        return
    rows = [vars(part) | {"steps": part.steps} for part in found.order]
    total = {
        "asked": found.requested,
        "to_train": found.steps,
        "saving": found.requested / found.steps if found.steps else None,
    }
    if as_json:
        emit(total | {"runs": rows})
        return
    head = ["run", "trains", "from step", "to step", "after", "nodes for others at"]
    cells = [
        [r["name"], r["steps"], r["begin"], r["end"], r["after"] or "", ", ".join(map(str, r["forks"]))]
        for r in rows
    ]
    show_table(head, [[str(cell) for cell in line] for line in cells])
    times = f", {total['saving']:.2f} times fewer" if found.steps else ""
    print(f"steps asked: {found.requested:,}; to train: {found.steps:,}{times}; nothing is trained now")


def _train_one(
    cfg: TrainConfig,
    out: Path,
    fresh: bool,
    quiet: bool,
    label: str,
    store: Store | None = None,
    keep: Sequence[int] = (),
    until: int = 0,
) -> dict[str, Any]:
    from mainrun.run.progress import make_progress
    from mainrun.store.rundir import RunDir, check_same_config
    from mainrun.ui import compare

    run = RunDir(out / cfg.run_id)
    if not fresh and (run.path / "summary.json").is_file():
        check_same_config(run, cfg)
        _check_files(run, cfg)
        return compare.finished(run)
    progress = make_progress(quiet)
    if label:
        progress.note(f"{label}{cfg.run_id}")
    crash = run.path / "traceback.txt"
    with stoppable():
        try:
            from mainrun.run.session import train as train_run

            summary = train_run(cfg, out, fresh=fresh, progress=progress, store=store, keep=keep, until=until)
        except Interrupted as e:
            if fresh:  # "the same command" would throw away what it has
                e.args = (f"{e} (without --fresh, which starts over)",)
            raise
        except MainrunError:
            raise
        except Exception as e:
            if run.path.is_dir():  # a crash may come after hours: keep what it said
                crash.write_text(traceback.format_exc(), encoding="utf-8")
                e.add_note(f"{crash} keeps it")
            raise
        finally:
            progress.close()
    with suppress(OSError):  # a folder of that name is none of ours
        crash.unlink(missing_ok=True)
    return summary


def _check_files(run: RunDir, cfg: TrainConfig) -> None:
    """A finished run does not speak for titles that it never saw: its file may have changed. One that is gone contradicts nothing."""
    if cfg.corpus.startswith(("file:", "mix:")):
        from mainrun.data.corpus import load_corpus
        from mainrun.store.rundir import check_same_data

        try:
            now = load_corpus(cfg).fingerprints
        except UsageError:
            return
        check_same_data(run, {"fingerprints": now})


def _dry_run(configs: list[TrainConfig], probe: bool, store: bool, as_json: bool) -> None:
    from mainrun.ui.estimate import estimate

    estimates = [estimate(cfg, probe, store) for cfg in configs]
    if not is_leader():
        return
    if as_json:
        emit(estimates if len(estimates) > 1 else estimates[0])
        return
    from rich.table import Table

    screen = console()
    for found in estimates:
        table = Table(title=f"{found['run']} (nothing is trained)", title_justify="left", show_header=False)
        for row in _estimated(found):
            table.add_row(*row)
        screen.print(table)


def _estimated(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a run costs, then what it resolves to."""
    from mainrun.run.progress import clock, short

    plan = found["plan"]
    yield "parameters", f"{found['params']:,}"
    yield "FLOPs", f"{found['flops']:.3g}"
    yield "memory", f"about {short(found['memory'])}B"
    yield "ETA", f"about {clock(found['eta_seconds'])} {_eta_basis(found)}"
    for key, value in plan.items():
        if key not in ("first_step", "last_step"):
            yield key, f"{value:,}" if type(value) is int else _value(value)
    for key, value in plan["first_step"].items():
        last = plan["last_step"][key]
        yield (
            key,
            _value(value)
            if last == value
            else f"{_value(value)} at the first step, {_value(last)} at the last",
        )
    for key, value in found["machine_class"].items():
        yield key, _value(value)


def _eta_basis(found: dict[str, Any]) -> str:
    if "probe" not in found:
        return "plus evaluations and checkpoints (--probe measures)"
    probe = found["probe"]
    compiles = "; not compiled here, what compiling gains is a rule of thumb" if probe["compiles"] else ""
    return f"(probed: {probe['step_seconds']:.3g} s a step, {probe['evaluation_seconds']:.3g} s an evaluation{compiles})"


def _value(value: Any) -> str:
    """A field as --set takes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value) or '""'


def _show_results(summaries: list[dict[str, Any]], out: Path) -> None:
    from mainrun.ui import compare

    if not summaries:
        return
    screen = console()
    try:
        compare.show(compare.rows(summaries), screen)
    except RunError as e:  # a ladder may change the data on its way: then there is no common table
        for summary in summaries:
            compare.show(compare.rows([summary]), screen)
        print(f"no comparison: {e}", file=sys.stderr)
    for summary in summaries:
        screen.print(f"{out / summary['run']}", markup=False, soft_wrap=True)


# -- the smaller commands


@app.command()
def demo(
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of every run; may be repeated."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", callback=validate_paths, help="The folder of all that it makes."
        ),
    ] = Path("runs/demo"),
    debug: Debug = False,
) -> None:
    """Go the whole way in minutes: train, sweep, report, submit, verify.

    Each step is a command of its own, and shown. Ctrl-C stops it; the same command goes on. Nothing is sent anywhere.
    """
    from mainrun.ui.demo import demo as whole_way

    with stoppable():
        whole_way(out, sets or [], submission.why_not_submittable)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this preset's fields.")] = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="List every field: default, bounds, class, meaning.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the presets, or the fields of one."""
    from mainrun.config import TrainConfig
    from mainrun.plan.recipes import load, preset_names

    if name and fields:
        raise UsageError(
            f"got NAME {name!r} and --fields; give one of them: a preset's own fields, or all fields there are"
        )
    if fields:
        found = [_describe(f) for f in TrainConfig.model_fields]
        head = ["field", "default", "allowed", "class", "what it is"]
        lines = [[f["field"], _value(f["default"]), f["allowed"], f["class"], f["about"]] for f in found]
    elif name:
        found, lines = [], []
        before = defaults = TrainConfig().model_dump(exclude={"preset"})
        for cfg in load(name):
            now = cfg.model_dump(exclude={"preset"})
            step = {k: v for k, v in now.items() if v != before[k]}
            fields_set = {k: v for k, v in now.items() if v != defaults[k]}
            found.append({"preset": cfg.preset, "run": cfg.run_id, "fields": fields_set, "step": step})
            lines += [
                ["" if i else cfg.preset, k, _value(v), _value(before[k])]
                for i, (k, v) in enumerate(step.items())
            ]
            before = now
        head = ["preset", "field", "value", "before" if len(found) > 1 else "default"]
    else:
        found = []
        for preset in preset_names():
            steps = [cfg.preset.partition(":")[2] for cfg in load(preset)]
            found.append(
                {"preset": preset, "about": _about(preset), "steps": [step for step in steps if step]}
            )
        head = ["preset", "about", "steps"]
        lines = [[f["preset"], f["about"], ", ".join(f["steps"])] for f in found]
    if as_json:
        emit(found)
    else:
        show_table(head, lines)


def _about(preset: str) -> str:
    import tomllib

    from mainrun.plan.recipes import PRESETS

    return str(tomllib.loads((PRESETS / f"{preset}.toml").read_text(encoding="utf-8")).get("about", ""))


def _describe(field: str) -> dict[str, Any]:
    from mainrun.config import TrainConfig

    schema = TrainConfig.model_json_schema()["properties"][field]
    (kind,) = (s for s in schema.get("anyOf", [schema]) if s.get("type") != "null")
    if "$ref" in kind:
        allowed = "a table, or its file"
    elif "enum" in kind:
        allowed = " | ".join(kind["enum"])
    else:
        word = {"boolean": "true | false", "string": "text"}.get(kind["type"], kind["type"])
        signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        allowed = ", ".join([word, *(f"{sign} {_value(kind[k])}" for k, sign in signs.items() if k in kind)])
    if "anyOf" in schema:
        allowed += ", or none"
    about, default = schema["description"], schema["default"]
    return {
        "field": field,
        "default": default,
        "allowed": allowed,
        "class": TrainConfig.class_of(field),
        "about": about,
    }


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run ids, unique beginnings of them, or run directories."),
    ],
    out: Out = Path("runs"),
    svg: Annotated[
        Path | None,
        typer.Option(
            "--svg", metavar="FILE", callback=validate_paths, help="Also draw the table as a picture."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put finished runs side by side.

    Differences in `full` are against the first run.
    """
    from mainrun.store import rundir
    from mainrun.ui import compare as comparison

    if svg:
        check_place(svg, "--svg", b"<svg", "SVG")
    rows = comparison.rows([comparison.finished(rundir.find(run, out)) for run in runs])
    if svg:
        comparison.picture(rows, svg)
    if as_json:
        emit(rows)
    else:
        comparison.show(rows, console())


@app.command()
def sample(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run id, the unique beginning of one, or a run directory.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="How each title begins.")],
    n: Annotated[int, typer.Option("-n", min=1, max=10_000, help="How many titles.")] = 1,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=65_536, help="The longest title, in tokens.")
    ] = 40,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=100.0, help="0: always the likeliest token.")
    ] = 0.8,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed gives the same titles.")
    ] = 0,
    out: Out = Path("runs"),
    debug: Debug = False,
) -> None:
    """Let a trained run write titles."""
    from mainrun.store import rundir

    found = rundir.find(run, out)
    found.config()  # refuse what is no run before torch is loaded
    from mainrun.ui.sample import sample as sample_run

    for title in sample_run(
        found.path, prompt, n=n, max_tokens=max_tokens, temperature=temperature, seed=seed
    ):
        print(
            re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", title)
        )  # a title is one line and moves no cursor


@app.command()
def doctor(out: Out = Path("runs"), as_json: Json = False, debug: Debug = False) -> None:
    """Check that this machine is ready.

    Exits with 1 when something must be fixed first.
    """
    from mainrun.ui.doctor import checks

    found = []
    for check in checks(out):
        found.append(check)
        if not as_json:
            fix = f"\n      fix: {check.fix}" if check.fix else ""
            print(f"{check.status:4}  {check.name}: {check.detail}{fix}", flush=True)
    if as_json:
        emit([vars(check) for check in found])
    if any(check.status == "fail" for check in found):
        raise typer.Exit(1)


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="hn|hn-2025", help="The corpus.")],
    debug: Debug = False,
) -> None:
    """Fetch a corpus, to train offline later."""
    from mainrun.data.hub import download as fetch

    print(fetch(name))


app.command()(reports.report)
app.add_typer(store_commands.app, name="store")
app.add_typer(sweep.app, name="sweep")
app.add_typer(bench.app, name="bench")
app.add_typer(grow.app, name="grow")
app.command()(submission.submit)
app.command()(submission.verify)
