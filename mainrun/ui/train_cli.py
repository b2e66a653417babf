"""`mainrun train`: train a preset, or show its plan or its cost without training."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import Diverged, Interrupted, MainrunError, RunError, UsageError
from mainrun.files.inputs import shown
from mainrun.ui.console import (
    Debug,
    Json,
    Out,
    Preset,
    Sets,
    console,
    emit,
    field_value,
    forward_cost_text,
    is_leader,
    memory_words,
    print_table,
    process_group,
    show_table,
    stoppable,
)
from mainrun.ui.store_cli import StorePlace, open_store, parse_size

if TYPE_CHECKING:
    from mainrun.config import TrainConfig
    from mainrun.run.tracking import Tracker
    from mainrun.store.nodes import Store
    from mainrun.store.rundir import RunDir

Summary = dict[str, Any]  # the content of a summary.json

Fresh = Annotated[
    bool, typer.Option("--fresh", help="Discard the earlier results of the run and start over.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the resolved plan and its cost, without training.")
]
Probe = Annotated[
    bool,
    typer.Option(
        "--probe",
        help="With --dry-run, measure the time of a few steps. With --fit, also train a step to prove that "
        "the micro-batch fits.",
    ),
]
Fit = Annotated[
    bool,
    typer.Option("--fit", help="With --dry-run, find the largest micro-batch that fits into memory."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="With --fit, the memory per process. The default is the free memory of the device.",
    ),
]
ShowPlan = Annotated[
    bool, typer.Option("--plan", help="Show which steps are already trained, without training.")
]
Until = Annotated[
    int,
    typer.Option(
        "--until",
        min=0,
        metavar="STEP",
        help="Stop after this step. The value 0 trains to the end of the run.",
    ),
]
Keep = Annotated[
    str,
    typer.Option(
        "--keep", metavar="STEPS", hidden=True, help="Keep the states after these steps in the store: 10,20."
    ),
]
NoStore = Annotated[
    bool, typer.Option("--no-store", help="Train all steps, and share no steps with other runs.")
]
StoreSize = Annotated[
    str,
    typer.Option(
        "--store-size", metavar="SIZE", help="Evict the least recently used states above this store size."
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        help="Send the metrics to tensorboard, wandb[:PROJECT] or trackio[:PROJECT]. Repeat for several.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show only errors.")]


@dataclass(frozen=True)
class TrainOptions:
    """The options of `mainrun train` that apply to every run."""

    out: Path
    fresh: bool
    quiet: bool
    until: int
    store: Store | None
    trackers: list[Tracker]
    keep: list[int]  # the steps whose states are kept in the store, besides those that the runs share


@dataclass(frozen=True)
class EstimateOptions:
    """The options of `mainrun train --dry-run`."""

    probe: bool
    store: bool  # whether the run saves states in a store
    fit: bool
    memory: int  # the value of --memory in bytes, or 0 for the free memory


@dataclass
class Results:
    """The results of all runs that one command trains."""

    # The summary of each finished run. The key is the preset name.
    summaries: dict[str, Summary] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)  # a message for each run that diverged


def train(
    preset: Preset = "optimized",
    sets: Sets = None,
    out: Out = Path("runs"),
    fresh: Fresh = False,
    dry_run: DryRun = False,
    probe: Probe = False,
    fit: Fit = False,
    memory: Memory = None,
    plan: ShowPlan = False,
    until: Until = 0,
    keep: Keep = "",
    no_store: NoStore = False,
    place: StorePlace = None,
    size: StoreSize = "20GB",
    track: Track = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a preset, or resume its run.

    If the run is finished, its result is shown. A preset with several steps trains one run per step and then
    compares the runs. Ctrl-C stops the run after the current training step and saves its state. The same
    command resumes the run. Training steps that another run has already trained are copied from the store.
    The default store is DIR/.store, or MAINRUN_STORE if that variable is set.
    """
    from mainrun.plan.recipes import load
    from mainrun.run.tracking import parse_trackers

    for option, given in (("--probe", probe), ("--fit", fit)):
        if given and not dry_run:
            raise UsageError(f"got {option} without --dry-run; add --dry-run, or remove {option} to train")
    limit = _memory_limit(memory, fit)
    _refuse_conflicts(dry_run=dry_run, plan=plan, until=until, fresh=fresh, no_store=no_store, place=place)
    if track and (dry_run or plan):
        other = "--dry-run" if dry_run else "--plan"
        raise UsageError(f"got --track and {other}, which does not train anything; leave one of them out")
    trackers = parse_trackers(track or [])
    kept = _parse_steps(keep)
    configs = load(preset, sets or [])
    _refuse_store_of_shards(configs, place)
    store = None if no_store else open_store(place, out, size)
    if plan:
        with process_group():
            _show_plan(configs, store, out, as_json)
    elif dry_run:
        with process_group():
            _show_estimates(configs, EstimateOptions(probe, store is not None, fit, limit), as_json)
    else:
        quiet = quiet or not is_leader()
        with process_group():
            results = train_all(configs, TrainOptions(out, fresh, quiet, until, store, trackers, kept))
        _report(configs, results, out, as_json, quiet)


def _parse_steps(text: str) -> list[int]:
    """Return the steps in the value of --keep."""
    if text and not re.fullmatch(r"\d+(,\d+)*", text):
        raise UsageError(f"got --keep {shown(text, 80)}; give steps with commas, like 10,20")
    return [int(step) for step in text.split(",") if step]


def _memory_limit(memory: str | None, fit: bool) -> int:
    """Return the value of --memory in bytes, or 0 if the option was not given."""
    if memory is None:
        return 0
    if not fit:
        raise UsageError(f"got --memory {shown(memory, 80)} without --fit; add --fit, or remove --memory")
    limit = parse_size(memory, "--memory")
    if not limit:
        raise UsageError(f"got --memory {shown(memory, 80)}; give a size above 0, like 16GB")
    if memory.strip().isdecimal():
        fix = f"give a number with the unit KB, MB, GB or TB, like {memory.strip()}GB"
        raise UsageError(f"got --memory {shown(memory, 80)} without a unit; {fix}")
    return limit


def _refuse_conflicts(
    *, dry_run: bool, plan: bool, until: int, fresh: bool, no_store: bool, place: str | None
) -> None:
    """Raise UsageError if options contradict each other."""
    if dry_run and plan:
        raise UsageError(
            "got --dry-run and --plan; give one of them: "
            "--dry-run shows what a run costs, --plan shows which of its steps are already trained"
        )
    if until and (dry_run or plan):
        other = "--dry-run" if dry_run else "--plan"
        raise UsageError(
            f"got --until {until} and {other}, which does not train anything; leave one of them out"
        )
    if plan and fresh:
        raise UsageError("got --plan and --fresh, which does not use the store; leave one of them out")
    if no_store and place is not None:
        raise UsageError(f"got --no-store and --store {place}; leave one of them out")


def _refuse_store_of_shards(configs: list[TrainConfig], place: str | None) -> None:
    """Raise UsageError if --store names a store for a sharded run. The default store is left unused."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if place is None or processes == "1":
        return
    for cfg in configs:
        if cfg.shard:
            raise UsageError(
                f"got --store {place} and shard=true with {processes} processes; a sharded run does not use "
                "a store, so leave --store out, or set shard=false"
            )


# -- training


def train_all(configs: list[TrainConfig], options: TrainOptions) -> Results:
    """Train the runs of a preset. If one of several runs diverges, the other runs are still trained."""
    from mainrun.run.stop import StopSignal

    results = Results()
    StopSignal.last = ""
    with _shared_batch(configs, options.store) as (order, keep):
        for number, cfg in enumerate(order, 1):
            if StopSignal.last:  # a signal arrived too late to stop the previous run
                done = f"stopped by {StopSignal.last} after {number - 1} of {len(order)} runs"
                raise Interrupted(f"{done}; run the same command again to resume")
            label = f"[{number}/{len(configs)}] " if len(configs) > 1 else ""
            try:
                with _name_of_step(cfg, configs):
                    summary = _train_one(cfg, options, label, [*options.keep, *keep.get(cfg.run_id, [])])
            except Diverged as e:
                if len(configs) == 1:
                    raise
                results.diverged.append(f"{cfg.run_id}: {e}")
            else:
                results.summaries[cfg.preset] = summary
    return results


@contextmanager
def _name_of_step(cfg: TrainConfig, configs: list[TrainConfig]) -> Iterator[None]:
    """Add the name of the step to an error that one step of a ladder causes."""
    try:
        yield
    except UsageError as e:
        if len(configs) > 1:
            e.args = (f"{cfg.preset}: {e}",)
        raise


@contextmanager
def _shared_batch(
    configs: list[TrainConfig], store: Store | None
) -> Iterator[tuple[list[TrainConfig], dict[str, list[int]]]]:
    """Yield the runs in the best order, and the steps at which each run must save its state in the store.

    In the best order, the runs share the most steps. The saved states are pinned in the store until all runs
    are done.
    """
    if store is None or len(configs) < 2:
        yield configs, {}
        return
    from mainrun.run import batch

    if not batch.may_share(configs):
        yield configs, {}
        return
    shared = batch.share_steps(configs, store)
    position = {assignment.name: i for i, assignment in enumerate(shared.assignments.order)}
    order = sorted(configs, key=lambda cfg: position[cfg.run_id])
    if not shared.keys or not is_leader():
        yield order, shared.keep
        return
    pin = f"batch-{shared.keys[0][:16]}-{os.getpid()}"
    try:
        with suppress(OSError):  # if the store cannot be written, each run will report the error
            store.pin(pin, shared.keys)
        yield order, shared.keep
    finally:
        with suppress(OSError):
            store.unpin(pin)


def _train_one(cfg: TrainConfig, options: TrainOptions, label: str, keep: list[int]) -> Summary:
    """Train one run and return its summary. A finished run is not trained again."""
    from mainrun.run.progress import make_progress
    from mainrun.run.tracking import Tracking
    from mainrun.store.rundir import RunDir, check_same_config
    from mainrun.ui import compare

    run = RunDir(options.out / cfg.run_id)
    if not options.fresh and (run.path / "summary.json").is_file():
        check_same_config(run, cfg)
        _check_titles(run, cfg)
        _check_start(run, cfg)
        _track_finished(cfg, options)
        _note_missing_scores(run, cfg, options.quiet)
        return compare.load_summary(run)
    progress = make_progress(options.quiet)
    if options.trackers:
        progress = Tracking(progress, options.trackers, run.path, options.fresh)
    if label:
        progress.note(f"{label}{cfg.run_id}")
    with stoppable(), _keeping_traceback(run):
        try:
            from mainrun.run.session import train as train_run

            return train_run(
                cfg,
                options.out,
                fresh=options.fresh,
                progress=progress,
                store=options.store,
                keep=keep,
                until=options.until,
            )
        except Interrupted as e:
            if options.fresh:  # repeating a command with --fresh would delete the run
                raise type(e)(f"{e} (without --fresh, which starts over)") from e
            raise
        finally:
            progress.close()


def _note_missing_scores(run: RunDir, cfg: TrainConfig, quiet: bool) -> None:
    """Say how to get the log-probabilities of a finished run if their file was deleted."""
    from mainrun.store import token_scores

    if cfg.token_scores and token_scores.is_missing(run) and is_leader() and not quiet:
        print(token_scores.how_to_restore(run), file=sys.stderr)


def _track_finished(cfg: TrainConfig, options: TrainOptions) -> None:
    """Send the rows of a finished run that its trackers do not have yet."""
    if not options.trackers or not is_leader():
        return
    from mainrun.run.progress import make_progress
    from mainrun.run.tracking import Tracking
    from mainrun.store.rundir import open_run

    run = open_run(options.out, cfg)
    try:
        tracking = Tracking(make_progress(options.quiet), options.trackers, run.path)
        tracking.send_finished(cfg, run.metrics())
    finally:
        run.release()


@contextmanager
def _keeping_traceback(run: RunDir) -> Iterator[None]:
    """If training crashes, write the traceback to the run directory."""
    path = run.path / "traceback.txt"
    try:
        yield
    except MainrunError:
        raise
    except Exception as e:
        if run.path.is_dir():
            path.write_text(traceback.format_exc(), encoding="utf-8")
            e.add_note(f"the traceback is saved in {path}")
        raise
    with suppress(OSError):  # another program may have created a folder with the same name
        path.unlink(missing_ok=True)


def _check_titles(run: RunDir, cfg: TrainConfig) -> None:
    """Raise RunError if the title files of a finished run have changed. Deleted title files are accepted."""
    if not cfg.corpus.startswith(("file:", "mix:")):
        return
    from mainrun.data.corpus import load_corpus
    from mainrun.store.rundir import check_same_data

    try:
        fingerprints = load_corpus(cfg).fingerprints
    except UsageError:
        return
    check_same_data(run, {"fingerprints": fingerprints})


def _check_start(run: RunDir, cfg: TrainConfig) -> None:
    """Raise RunError if the start of a finished run has changed. A deleted start is accepted."""
    if not cfg.start:
        return
    from mainrun.interop.start import start_digest
    from mainrun.store.rundir import check_same_data

    try:
        digest = start_digest(cfg)
    except UsageError:
        return
    check_same_data(run, {"start": digest})


def _report(configs: list[TrainConfig], results: Results, out: Path, as_json: bool, quiet: bool) -> None:
    """Print the results, and raise an error if a run diverged."""
    summaries = [results.summaries[cfg.preset] for cfg in configs if cfg.preset in results.summaries]
    if as_json and is_leader():
        emit(summaries if len(configs) > 1 else summaries[0])
    elif not quiet:
        _show_results(summaries, out)
    if results.diverged:
        raise Diverged("; ".join(results.diverged))


def _show_results(summaries: list[Summary], out: Path) -> None:
    from mainrun.ui import compare

    if not summaries:
        return
    screen = console()
    try:
        compare.show(compare.rows(summaries), screen)
    except RunError as e:  # the runs of a preset may use different data
        for summary in summaries:
            compare.show(compare.rows([summary]), screen)
        print(f"the runs cannot be compared: {e}", file=sys.stderr)
    for summary in summaries:
        screen.print(f"{out / summary['run']}", markup=False, soft_wrap=True)


# -- --plan


def _show_plan(configs: list[TrainConfig], store: Store | None, out: Path, as_json: bool) -> None:
    from mainrun.run import batch

    assignments = batch.share_steps(configs, store, out).assignments
    if not is_leader():
        return
    requested = assignments.requested
    to_train = assignments.steps
    saving = requested / to_train if to_train else None
    if as_json:
        runs = [vars(each) | {"steps": each.steps} for each in assignments.order]
        emit({"asked": requested, "to_train": to_train, "saving": saving, "runs": runs})
        return
    lines = []
    for each in assignments.order:
        forks = ", ".join(map(str, each.forks))
        lines.append([each.name, str(each.steps), str(each.begin), str(each.end), each.after or "", forks])
    show_table(["run", "steps to train", "from step", "to step", "after run", "keeps nodes at"], lines)
    times = "" if saving is None else f"; ratio: {saving:.2f}"
    print(f"requested steps: {requested:,}; to train: {to_train:,}{times}; --plan trains nothing")


# -- --dry-run


def _estimates(configs: list[TrainConfig], options: EstimateOptions) -> Iterator[dict[str, Any]]:
    for cfg in configs:
        with _name_of_step(cfg, configs):
            yield _estimate(cfg, options)


def _estimate(cfg: TrainConfig, options: EstimateOptions) -> dict[str, Any]:
    from mainrun.train import set_up
    from mainrun.ui.estimate import estimate_setup

    setup = set_up(cfg)
    if not options.fit:
        return estimate_setup(setup, options.probe, options.store)
    from mainrun.ui.fit import fit

    # measure the free memory before --probe allocates a part of it
    result = fit(setup, store=options.store, memory=options.memory, probe=options.probe)
    cost = estimate_setup(setup, options.probe, options.store)
    return cost | {"fit": result}


def _show_estimates(configs: list[TrainConfig], options: EstimateOptions, as_json: bool) -> None:
    estimates = list(_estimates(configs, options))
    if not is_leader():
        return
    if as_json:
        emit(estimates if len(estimates) > 1 else estimates[0])
        return
    from rich.table import Table

    screen = console()
    for cfg, cost in zip(configs, estimates, strict=True):
        table = Table(title=f"{cost['run']} (dry run)", title_justify="left", show_header=False)
        for name, value in [*_fit_rows(cfg, cost), *_estimate_rows(cost)]:
            table.add_row(name, value)
        print_table(table, screen)


def _fit_rows(cfg: TrainConfig, cost: dict[str, Any]) -> list[tuple[str, str]]:
    if "fit" not in cost:
        return []
    from mainrun.ui.fit import fit_rows

    return fit_rows(cfg, cost["fit"], cost["machine_class"]["processes"])


def _estimate_rows(cost: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the rows of a table that shows the estimated cost and the resolved plan of a run."""
    from mainrun.run.progress import clock

    yield "parameters", f"{cost['params']:,}"
    if "members" in cost:
        yield "members", f"{cost['members']} models, which the other numbers include"
    if cost["start"]:
        yield "start", f"{cost['start']['source']} ({cost['start']['digest'][:12]})"
    yield "FLOPs", f"{cost['flops']:.3g}"
    if "routing" in cost:
        yield "layers", cost["routing"]["letters"]
        yield "forward pass", forward_cost_text(cost["routing"])
    yield "memory", _memory_text(cost)
    yield "ETA", f"about {clock(cost['eta_seconds'])} {_eta_basis(cost)}"
    plan = cost["plan"]
    for key, value in plan.items():
        if key not in ("first_step", "last_step"):
            yield key, f"{value:,}" if type(value) is int else field_value(value)
    for key, first in plan["first_step"].items():
        last = plan["last_step"][key]
        if first == last:
            yield key, field_value(first)
        else:
            yield key, f"{field_value(first)} at the first step, {field_value(last)} at the last step"
    for key, value in cost["machine_class"].items():
        yield key, field_value(value)


def _memory_text(cost: dict[str, Any]) -> str:
    """Describe the memory of a run. If the device has too little memory, suggest how to reduce it."""
    from mainrun.plan.cost import SAVE_MEMORY
    from mainrun.run.progress import short

    needed = cost["memory"]
    available = cost["device_memory"]
    text = f"about {memory_words(needed, cost['process_memory'])}"
    if cost["machine_class"]["processes"] > 1:
        text += ", per process"
    if 0 < available < needed:
        text += f", but a process has only {short(available)}B; {SAVE_MEMORY}"
    return text


def _eta_basis(cost: dict[str, Any]) -> str:
    """Describe how the time of a run was estimated."""
    if "probe" not in cost:
        return "plus the time for evaluations and checkpoints, which --probe measures"
    probe = cost["probe"]
    times = f"{probe['step_seconds']:.3g} s per step, {probe['evaluation_seconds']:.3g} s per evaluation"
    if probe["compiles"]:
        times += " without torch.compile, whose speedup is estimated"
    return f"(measured: {times})"
