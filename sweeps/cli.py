"""`mainrun sweep`: run a study, look at it, take its winner. No torch and no Optuna until something is searched."""

from __future__ import annotations

import json
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import ConfigError, DiskFull, Interrupted, RunError, UsageError
from mainrun.ui.console import Debug, Group, Json, emit, show_table, stoppable, validate_paths

if TYPE_CHECKING:
    from sweeps.driver import Search
    from sweeps.engine.protocol import Engine
    from sweeps.study import Study


class Sweep(Group):
    """What is no command is a study: `mainrun sweep lr`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


app = typer.Typer(
    cls=Sweep, help="Search settings: a study, ls, show, best, export, dashboard.", rich_markup_mode=None
)


@app.callback(invoke_without_command=True)
def _root(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


Name = Annotated[str, typer.Argument(metavar="STUDY", help="The name of a study that was begun.")]
Studies = Annotated[
    Path, typer.Option("--out", metavar="DIR", callback=validate_paths, help="The folder of the studies.")
]


@app.command("run")
def run(
    place: Annotated[str, typer.Argument(metavar="STUDY|FILE", help="A built-in study, or a TOML file.")],
    out: Studies = Path("runs/studies"),
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, max=10_000, help="At most so many trials at once.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="local|ray",
            help="Workers on this machine, or on a Ray cluster (mainrun[ray]).",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="auto|HOST:PORT", help="Ray: the cluster to join; else one is started here."
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="Optuna's database; SQLite in the study's folder."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of every trial; may be repeated."),
    ] = None,
    named: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Another name: a study of its own.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be searched; train nothing.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a study file.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a study, or go on with it: the same trials, however many workers there are and whatever happens to them.

    Ends with the best trials, what the search cost, and what may be claimed: the best and the base are trained again on fresh seeds.
    """
    from mainrun.plan.recipes import parse_set
    from sweeps import study as studies

    if schema:
        emit(studies.schema())
        return
    change = {"workers": workers, "engine": engine, "address": address, "storage": storage, "name": named}
    study = studies.read(
        place,
        dict(parse_set(text) for text in sets or []),
        **{k: v for k, v in change.items() if v is not None},
    )
    if plan:
        _plan(study, as_json)
        return
    _run(study, out / study.name, as_json)


def _run(study: Study, folder: Path, as_json: bool) -> None:
    from sweeps.folder import finished

    try:
        _search(study, folder, as_json)
    except DiskFull:
        raise
    except Interrupted as e:
        raise Interrupted(
            f"stopped; what was trained is saved, nothing is lost: `{_again()}` goes on from here"
        ) from e
    found = finished(folder)
    if as_json:
        emit(found)
    else:
        _show(found)


def _again() -> str:
    return shlex.join(["mainrun", *map(_shown, sys.argv[1:])])


def _shown(argument: str) -> str:
    """An argument as it may be printed: --storage may hold a password."""
    from sweeps.study import without_password

    option, url = ("--storage=", argument[10:]) if argument.startswith("--storage=") else ("", argument)
    return option + without_password(url)


def _search(study: Study, folder: Path, as_json: bool) -> None:
    from mainrun.core.hardware import cores
    from sweeps.confirm import confirm
    from sweeps.driver import Search
    from sweeps.export import export
    from sweeps.folder import begin, owned

    with ExitStack() as held:
        held.enter_context(stoppable())
        engine = _engine(study)
        held.callback(engine.close)
        held.enter_context(owned(folder, study))
        show = held.enter_context(Show(quiet=as_json))
        search = show.search = Search(study, folder, engine, show.note, show.tick)
        begin(folder, study, _again())
        if study.threads > cores():
            show.note(
                f"threads = {study.threads} in each trial, on {cores()} cores: they wait for each other"
            )
        show.note(f"{study.name}: {search.engine.workers} workers, {search.base.run_id} is trial 0")
        search.run()
        show.shown = 0.0
        show.tick()
        show.note("the search is over; the noise floor and the best on fresh seeds")
        evidence = confirm(search)
        export(search, evidence)


def _engine(study: Study) -> Engine:
    if study.engine == "ray":
        from sweeps.engine.ray import Ray

        return Ray(study.workers, study.threads, study.gpus, study.address)
    from sweeps.engine.local import Local

    return Local(study.workers, study.threads)


class Show:
    """One live table where somebody watches, plain lines in a pipe."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.said, self.began, self.shown = quiet, "", time.monotonic(), 0.0
        self.search: Search | None = None
        self.live: Any = None

    def __enter__(self) -> Show:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def note(self, text: str) -> None:
        if self.quiet:
            return
        if self.live:
            self.live.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def tick(self) -> None:
        if self.quiet or self.search is None or time.monotonic() - self.shown < 0.25:
            return
        self.shown = time.monotonic()
        if self.live:
            self.live.update(self._table())
            return
        text = _line(self.search)
        if text != self.said:
            self.said = text
            print(text, file=sys.stderr, flush=True)

    def _table(self) -> Any:
        from rich.console import Group as Lines
        from rich.table import Table

        from mainrun.run.progress import clock
        from sweeps.ledger import total

        search = self.search
        assert search is not None
        table = Table(box=None, pad_edge=False)
        for head in ("trial", "state", "rung", "score", "values"):
            table.add_column(head, no_wrap=True, overflow="ellipsis")
        running = [t for t in search.trials if t.state in ("running", "held")]
        for trial in [*search.best(3), *running][:12]:
            score = f"{trial.scores[trial.rung]:.4f}" if trial.scores else ""
            at = f"{trial.rung + 1}/{len(trial.stops)}"
            table.add_row(str(trial.number), trial.state, at, score, _values(trial.values))
        spent = total(search.spent(trial) for trial in search.trials)
        left = search.left()
        seconds = time.monotonic() - self.began
        over = sum(trial.over for trial in search.trials)
        words = f"{spent.tokens / max(seconds, 1e-9):,.0f} tokens/s, {clock(seconds)} so far, {left} trials to ask"
        if over:
            words += f", about {clock(seconds / over * (left + len(search.trials) - over))} to go"
        return Lines(table, _line(search), words)


def _values(values: dict[str, Any]) -> str:
    return (
        ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        or "the base"
    )


def _line(search: Search) -> str:
    counts: dict[str, int] = {}
    for trial in search.trials:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    if (more := counts.get("running", 0) - search.engine.workers) > 0:
        counts |= {"running": search.engine.workers, "waiting": more}
    text = ", ".join(
        f"{counts[state]} {state}"
        for state in ("running", "waiting", "held", "done", "pruned", "diverged", "failed")
        if state in counts
    )
    best = search.best()
    return f"{len(search.trials)} trials: {text}" + (
        f"; best {best[0].scores[best[0].rung]:.4f}, trial {best[0].number}" if best else ""
    )


def _plan(study: Study, as_json: bool) -> None:
    base = study.base()
    rows = [[name, _domain(p), _condition(p)] for name, p in study.space.items()]
    if as_json:
        emit({"study": study.model_dump(mode="json"), "base": base.model_dump(mode="json")})
        return
    show_table(["parameter", "values", "when"], rows)
    budget = ", ".join(f"{v:g} {k}" for k, v in study.budget.model_dump().items() if v)
    rungs = (
        f"rungs at {', '.join(map(str, study.rungs.at))} of the steps, {study.rungs.keep:g} go on by their {study.rungs.score} scores"
        if study.rungs
        else "no rungs"
    )
    print(f"{study.name}: {study.about or 'no description'}")
    print(f"base {base.run_id}; {study.sampler.name}; {budget}; {rungs}; nothing is trained now")


def _domain(p: Any) -> str:
    return (
        ", ".join(map(str, p.values))
        if hasattr(p, "values")
        else f"{p.low:g} to {p.high:g}{', log' if p.log else ''}"
    )


def _condition(p: Any) -> str:
    return " and ".join(f"{field} is {' or '.join(map(str, values))}" for field, values in p.when.items())


def _show(found: dict[str, Any]) -> None:
    done = sorted(
        (t for t in found["trials"] if t["state"] == "done"), key=lambda t: (t["value"], t["trial"])
    )
    rows = [[str(t["trial"]), f"{t['value']:.4f}", _values(t["params"])] for t in done[:8]]
    show_table(["trial", found["objective"], "values"], rows)
    ledger = found["ledger"]
    counts = {
        state: sum(t["state"] == state for t in found["trials"])
        for state in ("done", "pruned", "diverged", "failed")
    }
    print(", ".join(f"{n} {state}" for state, n in counts.items() if n))
    parts = f"{ledger['trained']:,} trained + {ledger['reused']:,} reused; {ledger['wasted']:,} wasted of the trained"
    parts += f", {ledger['branch']:,} on branches" if ledger.get("branch") else ""
    print(f"steps: {ledger['asked']:,} asked = {parts}")
    if runs := (found.get("evidence") or {}).get("runs"):
        asked = {
            kind: sum(row["asked"] for row in runs if row["kind"] == kind)
            for kind in ("noise", "confirmation")
        }
        print(
            f"of these {asked['noise']:,} for the noise floor, {asked['confirmation']:,} for the confirmation"
        )
    ended = sum(t["state"] == "done" and len(t["scores"]) > 1 for t in found["trials"])
    for pair, value in (found.get("rung_correlation") or {}).items():
        weak = (
            "; below 0.5: short rungs say little here, train fully (remove [rungs])"
            if value is not None and value < 0.5
            else ""
        )
        raw = (found.get("raw_rung_correlation") or {}).get(pair)
        of = (
            f" on branches, {raw:.2f} raw"
            if raw is not None and found["study"]["rungs"].get("score") == "branch"
            else ""
        )
        much = "none" if value is None else f"{value:.2f}"
        few = "; few to tell by" if ended < 8 else ""
        print(f"rank correlation of rung {pair} with the end: {much}{of}, {ended} trials{few}{weak}")
    evidence = found.get("evidence")
    if evidence:
        noise = evidence["noise"]
        print(
            f"noise: sigma {noise['sigma']:.4f} over {len(noise['values'])} seeds; differences under {noise['floor']:.4f} are no claim"
        )
        for row in evidence["rows"]:
            low, high = row["interval"]
            verdict = "claimed" if row["claim"] else row["why"]
            print(
                f"trial {row['trial']} - base: {row['difference']:+.4f} [{low:+.4f}, {high:+.4f}], p={row['p_holm']:.3g}: {verdict}"
            )
        print(evidence["claim"] + (f"; val {evidence['val']['full']:.4f}" if evidence.get("val") else ""))


@app.command("ls")
def ls(out: Studies = Path("runs/studies"), as_json: Json = False, debug: Debug = False) -> None:
    """List the studies of a folder, and the built-in ones."""
    from sweeps.folder import begun, finished
    from sweeps.study import names

    if out.is_file():
        raise UsageError(f"got --out {out}, which is a file; give the folder of the studies")
    rows = []
    for folder in sorted(file.parent for file in out.glob("*/study.json")):
        row: dict[str, Any] = {
            "study": folder.name,
            "finished": (folder / "export.json").is_file(),
            "trials": None,
            "best": None,
        }
        try:
            begun(folder)
            if row["finished"]:
                trials = finished(folder)["trials"]
                best = min((t["value"] for t in trials if t["state"] == "done"), default=None)
                row |= {"trials": len(trials), "best": best}
        except RunError as e:
            print(e, file=sys.stderr)
        rows.append(row)
    if as_json:
        emit({"studies": rows, "built_in": names()})
        return
    cells = [
        [
            str(r["study"]),
            "finished" if r["finished"] else "begun",
            str(r["trials"] or ""),
            "" if r["best"] is None else f"{r['best']:.4f}",
        ]
        for r in rows
    ]
    show_table(["study", "state", "trials", "best"], cells)
    print(f"built in: {', '.join(names())}")


@app.command("show")
def show(
    name: Name, out: Studies = Path("runs/studies"), as_json: Json = False, debug: Debug = False
) -> None:
    """Show a finished study: its best trials, what it cost, what it may claim."""
    from sweeps.folder import finished

    found = finished(out / name)
    if as_json:
        emit(found)
    else:
        _show(found)


@app.command("best")
def best(
    name: Name,
    save: Annotated[
        str | None,
        typer.Option("--save", metavar="NAME", help="Write it as NAME.toml, for --preset NAME.toml."),
    ] = None,
    out: Studies = Path("runs/studies"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the command that trains the winner; the confirmed one, where one was."""
    from sweeps.folder import finished

    found = finished(out / name)
    done = sorted(
        (t for t in found["trials"] if t["state"] == "done"), key=lambda t: (t["value"], t["trial"])
    )
    if not done:
        raise RunError(f"no trial of {name} was trained to its end; give it a larger budget")
    evidence = found.get("evidence") or {}
    number = evidence.get("winner") if evidence.get("winner") is not None else done[0]["trial"]
    trial = next(t for t in found["trials"] if t["trial"] == number)
    if save is not None:
        if not save.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"got --save {save!r}; write letters, digits, - and _")
        if Path(f"{save}.toml").exists():
            raise UsageError(f"{save}.toml is there already; give another name, or remove it")
        about = f"trial {number} of {name}: {evidence.get('claim', 'not confirmed')}"
        lines = [f"about = {json.dumps(about)}", f"base = {json.dumps(found['preset'])}"]
        for text in trial["sets"]:
            key, _, value = text.partition("=")
            if value == "none":
                raise ConfigError(f"{key}=none cannot stand in a preset; train it with --set {key}=none")
            lines.append(f"{key} = {value if _is_toml(value) else json.dumps(value)}")
        Path(f"{save}.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["mainrun", "train", "--preset", f"{save}.toml" if save else str(found["preset"])]
    command += [] if save else [part for text in trial["sets"] for part in ("--set", text)]
    if as_json:
        emit({"trial": number, "value": trial["value"], "claim": evidence.get("claim"), "command": command})
    else:
        print(
            f"trial {number}, {found['objective']} {trial['value']:.4f}; {evidence.get('claim', 'not confirmed')}",
            file=sys.stderr,
        )
        print(shlex.join(command))


def _is_toml(value: str) -> bool:
    import tomllib

    try:
        tomllib.loads(f"v = {value}")
    except tomllib.TOMLDecodeError:
        return False
    return not value.startswith("{")


@app.command("export")
def export_(
    name: Name,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", callback=validate_paths, help="Where trials.parquet and study.json go."
        ),
    ],
    out: Studies = Path("runs/studies"),
    debug: Debug = False,
) -> None:
    """Write a study for the report and for other tools: trials.parquet and study.json."""
    from sweeps.export import write
    from sweeps.folder import finished

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"got DIR {folder}, which is a file; give a folder, or one that is not there yet")
    if (folder / "study.json").is_file() and not (folder / "trials.parquet").is_file():
        raise UsageError(
            f"got DIR {folder}, whose study.json is not an export and would be overwritten; give another folder"
        )
    write(finished(out / name), folder)
    print(f"{folder / 'trials.parquet'}\n{folder / 'study.json'}")


@app.command("dashboard")
def dashboard(
    name: Name,
    out: Studies = Path("runs/studies"),
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8080,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL", help="Its database, where a password is needed.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Open optuna-dashboard on a study (pip install 'mainrun[dashboard]')."""
    import importlib.util

    from sweeps.folder import known

    folder = out / name
    before = known(folder)
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise UsageError("optuna-dashboard is not installed; pip install 'mainrun[dashboard]'")
    url = storage or before["study"]["storage"]
    if not url and not (folder / "study.db").is_file():
        raise RunError(f"{folder} has no study.db yet; `{before['command']}` goes on with it")
    from optuna.exceptions import StorageInternalError
    from optuna_dashboard import run_server
    from sqlalchemy.exc import SQLAlchemyError

    from sweeps.record import opened, why

    try:
        database = opened(url, folder / "study.db")
    except (StorageInternalError, SQLAlchemyError) as e:
        raise UsageError(
            f"the study's database cannot be opened ({why(e)}); a password stands in PGPASSWORD, or in --storage"
        ) from None
    print(f"{name} at http://127.0.0.1:{port}/dashboard, Ctrl-C ends", file=sys.stderr, flush=True)
    try:
        run_server(database, host="127.0.0.1", port=port)
    except OSError as e:
        raise UsageError(f"port {port} cannot be used ({e.strerror}); give another --port") from None
