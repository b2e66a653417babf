"""The command line: `mainrun train | grow | presets | compare | sample | store | doctor | download | bench`.

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
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mainrun import __version__
from mainrun.errors import Diverged, Interrupted, MainrunError, RunError, UsageError, nearest, plain_warnings
from mainrun.growth.cli import app as grow

if TYPE_CHECKING:
    from rich.console import Console

    from mainrun.config import TrainConfig
    from mainrun.store.nodes import Node, Store
    from mainrun.store.rundir import RunDir


class _Group(TyperGroup):
    """Turns every way a command can end into an exit code and at most one message on stderr."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        args = list(sys.argv[1:] if args is None else args)
        plain_warnings()
        try:
            code = super().main(args, "mainrun", standalone_mode=False)  # a KeyboardInterrupt comes back as 130
        except typer.TyperException as e:  # unknown command or option, a missing or misshapen argument
            code = _fail(e, "error", _usage(e), UsageError.exit_code, args)
        except Interrupted as e:
            code = _fail(e, "interrupted", str(e), e.exit_code, args)
        except Diverged as e:
            code = _fail(e, "diverged", str(e), e.exit_code, args)
        except MainrunError as e:
            code = _fail(e, "error", str(e), e.exit_code, args)
        except Exception as e:
            text = f"{type(e).__name__}: {e}".strip().splitlines()[0]
            hints = ", ".join(["--debug shows the traceback", *getattr(e, "__notes__", [])])
            code = _fail(e, "crash", f"{text}; {hints}", MainrunError.exit_code, args)
        sys.exit(code if isinstance(code, int) else 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            allowed = ", ".join(self.commands)
            known = f"`{ctx.command_path} --help` lists them: {allowed}"
            raise UsageError(f"unknown command {args[0]!r}{nearest(args[0], self.commands)}; {known}")
        return super().resolve_command(ctx, args)


def _leads() -> bool:
    """Of the processes that torchrun starts one speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _fail(e: BaseException, kind: str, text: str, code: int, args: Sequence[str]) -> int:
    if "--debug" in args:
        traceback.print_exception(e)
    if not _leads():  # the leader mostly says the same, and torchrun then ends the others while they wait here
        time.sleep(5)
        kind = f"{kind} in process {os.environ['RANK']}"
    print(f"{kind}: {text}", file=sys.stderr, flush=True)
    return code


def _usage(e: typer.TyperException) -> str:
    """Typer's own errors in our form: got, nearest, where the allowed ones are listed."""
    ctx = getattr(e, "ctx", None)
    command = ctx.command_path if ctx else "mainrun COMMAND"
    text = e.format_message().rstrip(".")
    got = getattr(e, "option_name", None)
    known = [name for p in ctx.command.params for name in (*p.opts, *p.secondary_opts)] if ctx else []
    if got and ctx and got not in known:
        text = f"unknown option {got!r}{nearest(got, known)}"
    elif "extra argument" in text and "=" in text:
        text += "; each key=value needs its own --set"
    return f"{text}; `{command} --help` lists what is allowed"


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: no Rich import, and the same text in a pipe
    help="Train a small language model under a fixed budget, to the same bits each time.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The `mainrun` script."""
    try:
        app()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said; one more Ctrl-C must not tear the libraries' goodbyes


def _version(asked: bool) -> None:
    if asked:
        print(f"mainrun {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the run directories.")]
StorePlace = Annotated[str | None, typer.Option("--store", metavar="PLACE", help="The store: a folder, or a URL that fsspec knows.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]  # read by _fail


def _store(place: str | None, out: Path, size: str = "20GB", *, must: bool = False) -> Store:
    """must: there has to be one already."""
    from mainrun.store import nodes
    from mainrun.store.rundir import check_writable

    if place is not None and not place.strip():
        raise UsageError("got --store ''; give a folder, or a URL that fsspec knows")
    place = place or nodes.whereabouts(out)
    place = place if "://" in place else os.path.expanduser(place)
    if out.resolve() in Path(place).resolve().parents and not next(p for p in (out, *out.absolute().parents) if p.exists()).is_dir():
        check_writable(out)  # it is --out that is wrong, not the store
    store = nodes.Store(place, _bytes(size))
    if must and not store.files.exists("store.json"):
        raise UsageError(f"there is no store at {store}; runs make one there, or give another with --store or --out")
    return store


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) *([kmgt]?)b?", text.strip().lower())
    if not found:
        raise UsageError(f"got --store-size {text!r}; write a number of bytes with K, M, G or T behind it, like 20GB")
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2] or " "))


def _emit(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _console() -> Console:
    """For tables on stdout. In a pipe or a file nothing is wrapped to a width that nobody has."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


# -- train


@app.command()
def train(
    preset: Annotated[str, typer.Option("--preset", metavar="NAME|FILE", help="A preset, a TOML file, or NAME:STEP.")] = "optimized",
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field; may be repeated.")] = None,
    out: Out = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier start of this run left, and redo it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and what it costs; train nothing.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="With --dry-run: take the time of a few steps, and throw them away.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say which steps the store or another step has already; train nothing.")] = False,
    no_store: Annotated[bool, typer.Option("--no-store", help="Train every step, and keep none for other runs.")] = False,
    place: StorePlace = None,
    size: Annotated[str, typer.Option("--store-size", metavar="SIZE", help="Evict the least recently used beyond this.")] = "20GB",
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
    debug: Debug = False,
) -> None:
    """Train a preset, or go on with its run.

    A run that is done shows its result. A preset with several steps trains each in turn and ends with their
    comparison. Ctrl-C stops between two steps and keeps everything; the same command goes on from there.
    Steps that another run has trained, to the bit, are taken from the store (DIR/.store, or MAINRUN_STORE).
    """
    from mainrun.config import load

    if probe and not dry_run:
        raise UsageError("got --probe without --dry-run, which it refines; add --dry-run, or leave --probe out to train")
    if dry_run and plan:
        raise UsageError("got --dry-run and --plan; give one of them: what a run costs, or what of it is there already")
    if plan and fresh:
        raise UsageError("got --plan and --fresh, which takes nothing from the store; leave one of them out")
    if no_store and place is not None:
        raise UsageError(f"got --no-store and --store {place}; leave one of them out")
    configs = load(preset, sets or [])
    store = None if no_store else _store(place, out, size)
    if plan:
        with _process_group():
            _plan(configs, store, as_json)
        return
    if dry_run:
        with _process_group():
            _dry_run(configs, probe, store is not None, as_json)
        return
    quiet = quiet or not _leads()
    diverged = []
    done: dict[str, dict[str, Any]] = {}
    with _process_group(), _batch(configs, store) as (order, keep):
        for i, cfg in enumerate(order):
            label = f"[{i + 1}/{len(configs)}] " if len(configs) > 1 else ""
            try:
                done[cfg.preset] = _train_one(cfg, out, fresh, quiet, label, store, keep.get(cfg.run_id, []))
            except Diverged as e:
                if len(configs) == 1:
                    raise
                diverged.append(f"{cfg.run_id}: {e}")  # the other steps of a ladder are still worth training
    summaries = [done[cfg.preset] for cfg in configs if cfg.preset in done]
    if not _leads():
        pass
    elif as_json:
        _emit(summaries if len(configs) > 1 else summaries[0])
    elif not quiet:
        _show_results(summaries, out)
    if diverged:
        raise Diverged("; ".join(diverged))


@contextmanager
def _process_group() -> Iterator[None]:
    """Memory before torch takes any; and the processes that torchrun started part in order."""
    from mainrun.host import tune_allocator

    tune_allocator()
    try:
        yield
    finally:
        if (dist := sys.modules.get("torch.distributed")) and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _batch(configs: list[TrainConfig], store: Store | None) -> Iterator[tuple[list[TrainConfig], dict[str, list[int]]]]:
    """Runs that share steps in the order of their plan, and where each leaves a node for others; those are pinned until all are done."""
    if store is None or len(configs) < 2:
        yield configs, {}
        return
    from mainrun import batch

    if not batch.may_share(configs):
        yield configs, {}
        return
    shared = batch.plan(configs, store)
    place = {part.name: i for i, part in enumerate(shared.parts.parts)}
    name = f"batch-{shared.keys[0][:16]}-{os.getpid()}" if shared.keys and _leads() else ""
    try:
        with suppress(OSError):  # the runs will say that the store cannot be written
            if name:
                store.pin(name, shared.keys)
        yield sorted(configs, key=lambda cfg: place[cfg.run_id]), shared.keep
    finally:
        with suppress(OSError):
            if name:
                store.unpin(name)


def _plan(configs: list[TrainConfig], store: Store | None, as_json: bool) -> None:
    from mainrun import batch

    found = batch.plan(configs, store).parts
    if not _leads():
        return
    rows = [vars(part) | {"steps": part.steps} for part in found.parts]
    total = {"asked": found.asked, "to_train": found.steps, "saving": found.asked / found.steps if found.steps else None}
    if as_json:
        _emit(total | {"runs": rows})
        return
    head = ["run", "trains", "from step", "to step", "after", "nodes for others at"]
    cells = [[r["name"], r["steps"], r["begin"], r["end"], r["after"] or "", ", ".join(map(str, r["forks"]))] for r in rows]
    _show_table(head, [[str(cell) for cell in line] for line in cells])
    times = f", {total['saving']:.2f} times fewer" if found.steps else ""
    print(f"steps asked: {found.asked:,}; to train: {found.steps:,}{times}; nothing is trained now")


def _train_one(
    cfg: TrainConfig, out: Path, fresh: bool, quiet: bool, label: str, store: Store | None = None, keep: Sequence[int] = ()
) -> dict[str, Any]:
    from mainrun import compare
    from mainrun.progress import make_progress
    from mainrun.store.rundir import RunDir, check_same

    run = RunDir(out / cfg.run_id)
    if not fresh and (run.path / "summary.json").is_file():
        check_same(run, cfg)
        _check_files(run, cfg)
        return compare.finished(run)
    progress = make_progress(quiet)
    if label:
        progress.note(f"{label}{cfg.run_id}")
    crash = run.path / "traceback.txt"
    with _stoppable():
        try:
            from mainrun.train import train as train_run

            summary = train_run(cfg, out, fresh=fresh, progress=progress, store=store, keep=keep)
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
    crash.unlink(missing_ok=True)
    return summary


def _check_files(run: RunDir, cfg: TrainConfig) -> None:
    """A finished run does not speak for titles that it never saw: its file may have changed. One that is gone contradicts nothing."""
    if cfg.corpus.startswith(("file:", "mix:")):
        from mainrun.corpus import load_corpus
        from mainrun.store.rundir import check_same_data

        try:
            now = load_corpus(cfg).fingerprints
        except UsageError:
            return
        check_same_data(run, {"fingerprints": now})


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and the first Ctrl-C outside the steps (torch is still loading, say) end like those between two steps.

    While it steps, the training has its own handlers in place of these.
    """
    asked = 0

    def stop(signum: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        # a BaseException: no `except Exception` of a library that is being imported can swallow it
        raise KeyboardInterrupt

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        if asked == 1:
            raise Interrupted("stopped outside the training steps; nothing is lost, start the same command again") from None
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _dry_run(configs: list[TrainConfig], probe: bool, store: bool, as_json: bool) -> None:
    from mainrun.estimate import estimate

    estimates = [estimate(cfg, probe, store) for cfg in configs]
    if not _leads():
        return
    if as_json:
        _emit(estimates if len(estimates) > 1 else estimates[0])
        return
    from rich.table import Table

    console = _console()
    for found in estimates:
        table = Table(title=f"{found['run']} (nothing is trained)", title_justify="left", show_header=False)
        for row in _estimated(found):
            table.add_row(*row)
        console.print(table)


def _estimated(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a run costs, then what it resolves to."""
    from mainrun.progress import clock, short

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
        yield key, _value(value) if last == value else f"{_value(value)} at the first step, {_value(last)} at the last"
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
    from mainrun import compare

    if not summaries:
        return
    console = _console()
    try:
        compare.show(compare.rows(summaries), console)
    except RunError as e:  # a ladder may change the data on its way: then there is no common table
        for summary in summaries:
            compare.show(compare.rows([summary]), console)
        print(f"no comparison: {e}", file=sys.stderr)
    for summary in summaries:
        console.print(f"{out / summary['run']}", markup=False, soft_wrap=True)


# -- the smaller commands


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this preset's fields.")] = None,
    fields: Annotated[bool, typer.Option("--fields", help="List every field: default, bounds, class, meaning.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the presets, or the fields of one."""
    from mainrun.config import TrainConfig, load, preset_names

    if name and fields:
        raise UsageError(f"got NAME {name!r} and --fields; give one of them: a preset's own fields, or all fields there are")
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
            lines += [["" if i else cfg.preset, k, _value(v), _value(before[k])] for i, (k, v) in enumerate(step.items())]
            before = now
        head = ["preset", "field", "value", "before" if len(found) > 1 else "default"]
    else:
        found = []
        for preset in preset_names():
            steps = [cfg.preset.partition(":")[2] for cfg in load(preset)]
            found.append({"preset": preset, "about": _about(preset), "steps": [step for step in steps if step]})
        head = ["preset", "about", "steps"]
        lines = [[f["preset"], f["about"], ", ".join(f["steps"])] for f in found]
    if as_json:
        _emit(found)
    else:
        _show_table(head, lines)


def _about(preset: str) -> str:
    import tomllib

    from mainrun.config import PRESETS

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
    return {"field": field, "default": default, "allowed": allowed, "class": TrainConfig.class_of(field), "about": about}


def _show_table(head: list[str], lines: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    _console().print(table)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run ids, unique beginnings of them, or run directories.")],
    out: Out = Path("runs"),
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Also draw the table as a picture.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put finished runs side by side.

    Differences in `full` are against the first run.
    """
    from mainrun import compare as comparison
    from mainrun.store import rundir

    rows = comparison.rows([comparison.finished(rundir.find(run, out)) for run in runs])
    if svg:
        comparison.picture(rows, svg)
    if as_json:
        _emit(rows)
    else:
        comparison.show(rows, _console())


@app.command()
def sample(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run id, the unique beginning of one, or a run directory.")],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="How each title begins.")],
    n: Annotated[int, typer.Option("-n", min=1, max=10_000, help="How many titles.")] = 1,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, max=65_536, help="The longest title, in tokens.")] = 40,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=100.0, help="0: always the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed gives the same titles.")] = 0,
    out: Out = Path("runs"),
    debug: Debug = False,
) -> None:
    """Let a trained run write titles."""
    from mainrun.store import rundir

    found = rundir.find(run, out)
    found.config()  # refuse what is no run before torch is loaded
    from mainrun.sample import sample as sample_run

    for title in sample_run(found.path, prompt, n=n, max_tokens=max_tokens, temperature=temperature, seed=seed):
        print(re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", title))  # a title is one line and moves no cursor


@app.command()
def doctor(out: Out = Path("runs"), as_json: Json = False, debug: Debug = False) -> None:
    """Check that this machine is ready.

    Exits with 1 when something must be fixed first.
    """
    from mainrun.doctor import checks

    found = []
    for check in checks(out):
        found.append(check)
        if not as_json:
            fix = f"\n      fix: {check.fix}" if check.fix else ""
            print(f"{check.status:4}  {check.name}: {check.detail}{fix}", flush=True)
    if as_json:
        _emit([vars(check) for check in found])
    if any(check.status == "fail" for check in found):
        raise typer.Exit(1)


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="hn|hn-2025", help="The corpus.")],
    debug: Debug = False,
) -> None:
    """Fetch a corpus, to train offline later."""
    from mainrun.corpus import download as fetch

    print(fetch(name))


# -- growth

app.add_typer(grow, name="grow", cls=_Group)


# -- the store

store_app = typer.Typer(cls=_Group, help="The steps that runs share: ls, du, gc, verify, audit, pin, unpin.", rich_markup_mode=None)
app.add_typer(store_app, name="store")


@store_app.callback(invoke_without_command=True)
def _store_root(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


@store_app.command("ls")
def store_ls(out: Out = Path("runs"), place: StorePlace = None, as_json: Json = False, debug: Debug = False) -> None:
    """List the nodes: where runs can begin."""
    store = _store(place, out, must=True)
    nodes, damaged = store.summary()
    states, pinned = store.states(), store.pinned()
    rows = [
        {name: getattr(node, name) for name in ("key", "root", "step", "begins", "run", "size", "seconds", "made")}
        | {
            "state": node.state in states,
            "used": states[node.state].modified if node.state in states else None,
            "pinned": node.key in pinned,
        }
        for node in nodes
    ]
    if as_json:
        _emit({"nodes": rows, "damaged": [{"key": key, "why": why} for key, why in damaged]})
        return
    lines = [[r["key"][:12], r["root"][:12], str(r["step"]), _state(r), str(r["run"]), _ago(r["made"]), _ago(r["used"])] for r in rows]
    _show_table(["node", "root", "step", "state", "by", "made", "used"], lines)
    for key, why in damaged:
        print(f"damaged: {key[:12]}: {why}", file=sys.stderr)


def _state(row: dict[str, Any]) -> str:
    from mainrun.progress import short

    return (f"{short(row['size'])}B" if row["state"] else "evicted") + (", pinned" if row["pinned"] else "")


def _ago(when: float | None) -> str:
    from mainrun.progress import clock

    if when is None:
        return ""
    seconds = time.time() - when
    return f"{clock(seconds)} ago" if seconds >= 0 else "in the future"


@store_app.command("du")
def store_du(out: Out = Path("runs"), place: StorePlace = None, as_json: Json = False, debug: Debug = False) -> None:
    """What the store holds, and the training that it saves."""
    from mainrun.progress import clock, short

    store = _store(place, out, must=True)
    nodes, damaged = store.summary()
    states = store.states()
    needed, ways = [], set()  # what leads to a state
    for node in sorted(nodes, key=lambda node: -node.step):
        if node.state in states or node.key in ways:
            needed.append(node)
            ways.add(node.parent)
    found = {
        "store": str(store), "nodes": len(nodes), "damaged": len(damaged), "states": len(states),
        "bytes": sum(entry.size for entry in states.values()), "roots": len({node.root for node in nodes}),
        "steps": sum(node.step - node.begins for node in needed), "seconds": sum(node.seconds for node in needed),
    }  # fmt: skip
    if as_json:
        _emit(found)
        return
    print(f"{found['store']}: {short(found['bytes'])}B in {found['states']:,} states of {found['nodes']:,} nodes")
    print(f"{found['steps']:,} steps that need not be trained again: {clock(found['seconds'])} of training")


@store_app.command("gc")
def store_gc(
    out: Out = Path("runs"),
    place: StorePlace = None,
    size: Annotated[str, typer.Option("--store-size", metavar="SIZE", help="Evict the least recently used beyond this.")] = "20GB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Clear what is damaged or leads nowhere, and evict beyond the size.

    No run breaks by it; what is gone is trained again when it is wanted.
    """
    store = _store(place, out, size, must=True)
    with _writing(store):
        counts = store.gc()
    if as_json:
        _emit(counts)
    else:
        print(f"cleared: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")


@store_app.command("verify")
def store_verify(out: Out = Path("runs"), place: StorePlace = None, as_json: Json = False, debug: Debug = False) -> None:
    """Read everything, and name what is not as it was written.

    Exits with 1 when there is any.
    """
    store = _store(place, out, must=True)
    found = store.verify()
    if as_json:
        _emit(found)
    else:
        print(*found, *([] if found else [f"{len(store.node_keys()):,} nodes, all as they were written"]), sep="\n")
    if found:
        raise MainrunError(f"{len(found)} findings; runs pass over what is damaged, and `mainrun store gc` clears what is the store's own")


@store_app.command("audit")
def store_audit(
    segments: Annotated[int, typer.Option("--segments", min=1, max=1_000_000, help="How many.")] = 3,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="The same seed takes the same ones; without it, others each time.")
    ] = None,
    out: Out = Path("runs"),
    place: StorePlace = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train random segments again and compare every bit.

    Exits with 1 when one differs.
    """
    store, found = _store(place, out, must=True), list[dict[str, Any]]()
    with _process_group(), _stoppable():
        from mainrun.audit import audit

        for finding in audit(store, segments, seed):
            node = finding.node
            found.append(
                {"key": node.key, "begins": node.begins, "step": node.step, "run": node.run, "status": finding.status, "why": finding.why}
            )
            if not as_json:
                why = f": {finding.why}" if finding.why else ""
                print(f"{finding.status:7}  {node.key[:12]}  steps {node.begins + 1} to {node.step} of {node.run}{why}", flush=True)
    if as_json:
        _emit(found)
    elif not found:
        print("nothing to audit: the store has no node whose beginning is there too")
    if any(finding["status"] == "differs" for finding in found):
        raise MainrunError("a segment trained again is not what the store holds; the lines above say which")


NodeKey = Annotated[str, typer.Argument(metavar="NODE", help="A node, or the unique beginning of one.")]


@store_app.command("pin")
def store_pin(key: NodeKey, out: Out = Path("runs"), place: StorePlace = None, debug: Debug = False) -> None:
    """Keep a node from eviction."""
    store = _store(place, out, must=True)
    node = _node(store, key)
    with _writing(store):
        store.pin(f"node-{node.key}", [node.key])
    print(f"pinned: {node.key[:12]}, step {node.step} of {node.run}")


@store_app.command("unpin")
def store_unpin(key: NodeKey, out: Out = Path("runs"), place: StorePlace = None, debug: Debug = False) -> None:
    """Let a node be evicted again."""
    store = _store(place, out, must=True)
    hits = [name for name in store.files.names("pins") if name.startswith(f"node-{key}")]
    if len(hits) != 1:
        raise UsageError(f"node {key!r} is {'not unique' if hits else 'not pinned'} in the store {store}; `mainrun store ls` shows what is")
    with _writing(store):
        store.unpin(hits[0])
    print(f"not pinned: {hits[0].removeprefix('node-')[:12]}")


def _node(store: Store, beginning: str) -> Node:
    from mainrun.store.nodes import Damaged

    hits = sorted(key for key in store.node_keys() if key.startswith(beginning))
    if len(hits) != 1:
        what = "is not unique" if hits else "is none"
        raise UsageError(f"node {beginning!r} {what} of the store {store}; `mainrun store ls` lists them")
    try:
        return store.node(hits[0], rows=False)
    except Damaged as e:
        raise RunError(f"node {hits[0][:12]} cannot be used: {e}; `mainrun store gc` clears it") from None


@contextmanager
def _writing(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise RunError(f"the store {store} cannot be written ({e.strerror or e}); make it writable, or give another with --store") from None


# -- what a step costs

bench = typer.Typer(cls=_Group, help="Measure steps, and what sharing them saves: step, gpu, lineage.", rich_markup_mode=None)
app.add_typer(bench, name="bench")


@bench.callback(invoke_without_command=True)
def _bench(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field; may be repeated.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, max=1000, help="Measured steps of each; their median counts.")]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@bench.command("step")
def bench_step(
    preset: Annotated[str, typer.Option("--preset", metavar="NAME|FILE", help="A preset, a TOML file, or NAME:STEP.")] = "baseline",
    sets: Sets = None,
    rivals: Annotated[bool, typer.Option("--rivals", help="Also a plain loop, and both with the C library's own allocator.")] = False,
    repeats: Repeats = 5,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a training step and its parts, beside rivals.

    Each rival has a process of its own and they take turns, step by step. The plain loop is always float32 with AdamW.
    """
    from mainrun.bench import step
    from mainrun.config import load

    configs = load(preset, sets or [])
    if len(configs) > 1:
        raise UsageError(f"preset {preset!r} has {len(configs)} steps, bench takes one; write --preset {configs[0].preset}, say")
    found = step.measure(configs[0], rivals=rivals, repeats=repeats, note=_note)
    if as_json:
        _emit(found)
    else:
        _show_table(*step.table(found))
        print(*step.lines(found), sep="\n")


@bench.command("lineage")
def bench_lineage(
    preset: Annotated[str | None, typer.Option("--preset", metavar="NAME|FILE", help="The base, in place of a very small one.")] = None,
    sets: Sets = None,
    studies: Annotated[str, typer.Option("--studies", metavar="1,2,3,4", help="Which.")] = "1,2,3,4",
    trials: Annotated[int, typer.Option("--trials", min=0, max=192, help="Of each study so many, at random; 0: all.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What sharing prefixes saves, and that it changes no bit.

    Four studies are trained with a store and from scratch; it takes a while (half an hour for all of them).
    """
    from mainrun.config import from_dict, load, parse_set

    if not (re.fullmatch(r"[1-4](,[1-4])*", studies)):
        raise UsageError(f"got --studies {studies!r}; write some of 1,2,3,4 with commas between them")
    with _process_group(), _stoppable():
        from mainrun.bench import lineage

        changes = dict(parse_set(text) for text in sets or [])
        bases = load(preset, sets or []) if preset else [from_dict(lineage.SMALL | changes)]
        if len(bases) > 1:
            raise UsageError(f"preset {preset!r} has {len(bases)} steps, bench takes one; write --preset {bases[0].preset}, say")
        (base,) = bases
        found = lineage.measure(base, [int(study) for study in studies.split(",")], trials, _note)
        overheads = lineage.overheads()
    if as_json:
        _emit({"studies": found, "overheads": overheads})
    else:
        _show_table(*lineage.table(found))
        print(*lineage.lines(overheads), sep="\n")
    if any(row["differ"] for row in found):
        raise MainrunError("a run that shared its prefix is not the same as from scratch; the last column says how many")


@bench.command("gpu")
def bench_gpu(sets: Sets = None, repeats: Repeats = 5, as_json: Json = False, debug: Debug = False) -> None:
    """On a GPU: share of the peak, whole runs, repeats.

    For baseline and optimized, in bfloat16: the share of the GPU's peak that a step reaches, the wall time of a whole run, and
    whether a second run gives the same losses and weights to the bit.
    """
    from mainrun.bench import gpu

    found = gpu.measure(sets or [], repeats=repeats, note=_note)
    if as_json:
        _emit(found)
    else:
        _show_table(*gpu.table(found))
        print(*gpu.lines(found), sep="\n")
    if any(row["differences"] for row in found["presets"]):
        raise MainrunError("two runs of one config are not the same; the lines above say where they part")
