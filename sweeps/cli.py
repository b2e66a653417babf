"""Define the commands of `mainrun sweep`. A command imports torch or Optuna only when necessary."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import ConfigError, DiskFull, Interrupted, RunError, UsageError
from mainrun.ui import completion
from mainrun.ui.console import Debug, Group, Json, emit, show_table, stoppable, validate_paths

if TYPE_CHECKING:
    from sweeps.engine.protocol import Engine
    from sweeps.space import Parameter
    from sweeps.study import Study


class SweepGroup(Group):
    """A command group that treats an unknown command as the name of a study.

    For example, `mainrun sweep lr` runs the study `lr`.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=SweepGroup,
    help="Search for good hyperparameters with a study.",
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


SHOWN = 8  # the number of the best trials that are shown
DEFAULT_OUT = Path("runs/studies")
Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", callback=validate_paths, help="The folder of the studies.")
]
Name = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", autocompletion=completion.started_studies, help="The name of an existing study."
    ),
]
Place = Annotated[
    str,
    typer.Argument(
        metavar="STUDY|FILE", autocompletion=completion.studies, help="A built-in study, or a TOML file."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=completion.settings,
        help="Set a config field in all trials. Can be repeated.",
    ),
]


# -- run


@app.command("run")
def run(
    place: Place,
    out: Out = DEFAULT_OUT,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, max=10_000, help="Maximum number of concurrent trials."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="local|ray", help="Where workers run. Ray needs mainrun[ray]."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="auto|HOST:PORT",
            help="The Ray cluster to join. By default, a cluster is started on this machine.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="The URL of Optuna's database. By default, a SQLite file in the study's folder is used.",
        ),
    ] = None,
    sets: Sets = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Run the study separately under this name.")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Print the search space without training.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a study file.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a study, or resume it. The number of workers and interruptions do not change the trials.

    After the search, the best trials and the base are trained again with new seeds. The new seeds show
    whether a gain is larger than the noise. The output lists the best trials, the cost of the search and the
    gains that can be claimed.
    """
    from mainrun.plan.recipes import parse_set
    from sweeps.study import json_schema, read_study

    if schema:
        emit(json_schema())
        return
    options = {"workers": workers, "engine": engine, "address": address, "storage": storage, "name": name}
    changes = {key: value for key, value in options.items() if value is not None}
    study = read_study(place, dict(parse_set(text) for text in sets or []), **changes)
    if plan_only:
        _show_plan(study, as_json)
    else:
        _run_and_show(study, out / study.name, as_json)


def _run_and_show(study: Study, folder: Path, as_json: bool) -> None:
    from sweeps.folder import read_export

    run_study(study, folder, _command_line(), quiet=as_json)
    _show_export(read_export(folder), as_json)


def run_study(study: Study, folder: Path, command: str, quiet: bool) -> None:
    """Run a study, or resume it. `command` resumes the study, and is written to study.json."""
    try:
        _search(study, folder, command, quiet)
    except DiskFull:
        raise
    except Interrupted as e:
        raise Interrupted(
            f"the study was stopped, but nothing is lost; run `{command}` to resume the study"
        ) from e


def _search(study: Study, folder: Path, command: str, quiet: bool) -> None:
    from mainrun.core.hardware import cores
    from sweeps.confirm import confirm
    from sweeps.display import Display
    from sweeps.export import write_export
    from sweeps.folder import locked_folder, write_study_json
    from sweeps.lanes import make_search

    with ExitStack() as stack:
        stack.enter_context(stoppable())
        engine = _create_engine(study)
        stack.callback(engine.close)
        stack.enter_context(locked_folder(folder, study))
        display = stack.enter_context(Display(quiet=quiet))
        search = make_search(study, folder, engine, display.note, display.refresh)
        display.watch(search)
        write_study_json(folder, study, command)
        if study.threads > cores():
            display.note(
                f"each trial uses {study.threads} threads, but this machine has only {cores()} cores, "
                "so the threads must wait for each other"
            )
        display.note(f"{study.name}: {engine.workers} workers; trial 0 is {search.base.run_id}")
        search.run()
        display.refresh(force=True)
        display.note("the search is finished; the base and the best trials are now trained with new seeds")
        write_export(search, confirm(search))


def _create_engine(study: Study) -> Engine:
    if study.engine == "ray":
        from sweeps.engine.ray import Ray

        return Ray(study.workers, study.threads, study.gpus, study.address)
    from sweeps.engine.local import Local

    return Local(study.workers, study.threads)


def _command_line() -> str:
    """Return the command that resumes the study.

    The password of the database is removed, because the command is printed and written to study.json.
    """
    return shlex.join(["mainrun", *map(_hide_password, sys.argv[1:])])


def _hide_password(argument: str) -> str:
    from sweeps.study import without_password

    prefix = "--storage="
    if argument.startswith(prefix):
        return prefix + without_password(argument.removeprefix(prefix))
    return without_password(argument)


# -- run --plan


def _show_plan(study: Study, as_json: bool) -> None:
    base = study.base()
    if as_json:
        emit({"study": study.model_dump(mode="json"), "base": base.model_dump(mode="json")})
        return
    rows = [[name, _describe_values(p), _describe_conditions(p)] for name, p in study.space.items()]
    show_table(["parameter", "values", "when"], rows)
    budget = ", ".join(f"{limit:g} {name}" for name, limit in study.budget.limits().items())
    if study.budget.until == "settled":
        budget += " or until the search has settled"
    print(f"{study.name}: {study.about or 'no description'}")
    print(
        f"base {base.run_id}; {study.sampler.name}; {budget}; {_describe_lengths(study)}; nothing was trained"
    )


def _describe_lengths(study: Study) -> str:
    """Describe which trials are shorter than a whole run."""
    if study.sampler.name == "frugal":
        shares = ", ".join(f"{horizon:g}" for horizon in study.sampler.horizons)
        text = f"{study.sampler.lanes} lanes of runs over {shares} of the steps"
        late = study.sampler.late
        return f"{text}, and of late changes after {late:g} of the tokens" if late else text
    if not study.rungs:
        return "no rungs"
    shares = ", ".join(map(str, study.rungs.at))
    return (
        f"rungs at {shares} of the steps, where the best {study.rungs.keep:g} of a generation "
        f"by {study.rungs.score} score are promoted"
    )


def _describe_values(parameter: Parameter) -> str:
    from sweeps.space import Choice

    if isinstance(parameter, Choice):
        return ", ".join(map(str, parameter.values))
    text = f"{parameter.low:g} to {parameter.high:g}"
    return f"{text}, log" if parameter.log else text


def _describe_conditions(parameter: Parameter) -> str:
    conditions = []
    for name, values in parameter.when.items():
        conditions.append(f"{name} is {' or '.join(map(str, values))}")
    return " and ".join(conditions)


# -- ls, show


@app.command("ls")
def ls(out: Out = DEFAULT_OUT, as_json: Json = False, debug: Debug = False) -> None:
    """List the studies in a folder, and the built-in studies."""
    from sweeps.study import built_in_names

    if out.is_file():
        raise UsageError(f"--out {out} is a file; give the folder that contains the studies")
    rows = [_study_row(file.parent) for file in sorted(out.glob("*/study.json"))]
    if as_json:
        emit({"studies": rows, "built_in": built_in_names()})
        return
    cells = []
    for row in rows:
        state = "finished" if row["finished"] else "started"
        best = "" if row["best"] is None else f"{row['best']:.4f}"
        cells.append([row["study"], state, str(row["trials"] or ""), best])
    show_table(["study", "state", "trials", "best"], cells)
    print(f"built in: {', '.join(built_in_names())}")


def _study_row(folder: Path) -> dict[str, Any]:
    """Return the row that `mainrun sweep ls` prints for a study.

    If a file of the study is damaged, print an error on stderr and still return a row.
    """
    from sweeps.folder import read_export, read_study_json

    finished = (folder / "export.json").is_file()
    row: dict[str, Any] = {"study": folder.name, "finished": finished, "trials": None, "best": None}
    try:
        read_study_json(folder)
        if finished:
            export = read_export(folder)
            done = _ranked_trials(export)
            row["trials"] = len(export["trials"])
            row["best"] = done[0]["value"] if done else None
    except RunError as e:
        print(e, file=sys.stderr)
    return row


def _ranked_trials(export: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the completed trials, sorted from the best score to the worst."""
    done = [trial for trial in export["trials"] if trial["state"] == "done"]
    return sorted(done, key=lambda trial: (trial["value"], trial["trial"]))


@app.command("show")
def show(
    name: Name,
    out: Out = DEFAULT_OUT,
    why: Annotated[
        int | None,
        typer.Option("--why", min=0, metavar="TRIAL", help="Show why the sampler frugal chose a trial."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the best trials, the cost and the claims of a finished study."""
    from sweeps.folder import read_export

    export = read_export(out / name)
    if why is None:
        _show_export(export, as_json)
    else:
        _show_why(export, why, as_json)


def _show_why(export: dict[str, Any], number: int, as_json: bool) -> None:
    """Show the options that were open when a trial was chosen, and what each was worth."""
    from mainrun.run.progress import short
    from sweeps.display import describe_values

    trials = {trial["trial"]: trial for trial in export["trials"]}
    if number not in trials:
        raise UsageError(f"got --why {number}; the study has {len(trials)} trials, counted from 0")
    trial = trials[number]
    if "why" not in trial:
        sampler = export["study"].get("sampler", {}).get("name", "tpe")
        raise UsageError(f"got --why {number}; the sampler {sampler} gives no reasons, only frugal does")
    why = trial["why"]
    if as_json:
        emit(why)
        return
    length = f"for {trial['horizon']:g} of the steps"
    if trial.get("late"):
        length = f"as a late change of the base after {trial['late']:g} of the tokens"
    print(f"trial {number}: {describe_values(trial['params'])}, {length}")
    if why["phase"] != "search":
        print("it is part of the first design, which does not depend on scores")
        return
    print(f"expected improvement of its recipe {why['improvement']:.4f}")
    print(f"predicted best score {why['belief']:.4f} ± {why['deviation']:.4f}")
    rows = []
    for option in why["options"]:
        rows.append(
            [
                f"late {option['late']:g}" if option.get("late") else f"{option['horizon']:g}",
                "stand-in" if option["stands_in"] else "recipe",
                short(option["new_tokens"]),
                f"{1e6 * option['value']:.3g}",
                describe_values(option["values"]),
            ]
        )
    show_table(["horizon", "run", "new tokens", "information per 1M tokens", "values"], rows)


def _show_export(export: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(export)
        return
    _show_trials(export)
    _show_costs(export)
    _show_rungs(export)
    _show_horizons(export)
    if export.get("evidence"):
        _show_evidence(export["evidence"], export["trials"])


def _show_trials(export: dict[str, Any]) -> None:
    from sweeps.display import describe_values

    head = ["trial", export["objective"], "values"]
    shown = _trials_to_show(export)
    rows = [
        [str(trial["trial"]), f"{trial['value']:.4f}", describe_values(trial["params"])] for trial in shown
    ]
    flops = [_forward_flops(trial) for trial in shown]
    if len(set(flops)) > 1:
        head.insert(2, "forward FLOPs")
        for row, cell in zip(rows, flops, strict=True):
            row.insert(2, cell)
    show_table(head, rows)
    states = [trial["state"] for trial in export["trials"]]
    counts = []
    for state in ("done", "short", "pruned", "diverged", "failed"):
        if state in states:
            counts.append(f"{states.count(state)} {state}")
    print(", ".join(counts))


def _trials_to_show(export: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the best trials, and each other trial that scores better than all trials that cost less."""
    from mainrun.stats import frontier

    done = _ranked_trials(export)
    costs = [trial.get("forward_flops") or 0.0 for trial in done]
    on_frontier = frontier(costs, [trial["value"] for trial in done])
    return [trial for place, trial in enumerate(done) if place < SHOWN or place in on_frontier]


def _forward_flops(trial: dict[str, Any]) -> str:
    """Return the forward FLOPs per token of a trial's model as text, or "" if they were not recorded."""
    from mainrun.run.progress import short

    flops = trial.get("forward_flops")
    return short(flops) if flops else ""


def _show_costs(export: dict[str, Any]) -> None:
    ledger = export["ledger"]
    text = f"steps: {ledger['asked']:,} in all = {ledger['trained']:,} trained + {ledger['reused']:,} reused"
    text += f"; of the trained steps {ledger['wasted']:,} were wasted"
    if ledger.get("branch"):
        text += f" and {ledger['branch']:,} were for branches"
    print(text)
    runs = (export.get("evidence") or {}).get("runs")
    if runs:
        steps = dict.fromkeys(("noise", "confirmation"), 0)
        for row in runs:
            if row["kind"] in steps:
                steps[row["kind"]] += row["asked"]
        print(
            f"of all steps, {steps['noise']:,} are for the noise floor "
            f"and {steps['confirmation']:,} for the confirmation"
        )


def _show_rungs(export: dict[str, Any]) -> None:
    count = 0
    for trial in export["trials"]:
        if trial["state"] == "done" and len(trial["scores"]) > 1:
            count += 1
    raw_correlations = export.get("raw_rung_correlation") or {}
    for rung, correlation in (export.get("rung_correlation") or {}).items():
        text = f"rank correlation of rung {rung} with the final score: "
        text += "none" if correlation is None else f"{correlation:.2f}"
        raw = raw_correlations.get(rung)
        if raw is not None and export["study"]["rungs"].get("score") == "branch":
            text += f" on branches, {raw:.2f} without branches"
        text += f", over {count} trials"
        if count < 8:
            text += ", which are few"
        if correlation is not None and correlation < 0.5:
            text += "; below 0.5, scores at a rung predict little, so train all trials fully (remove [rungs])"
        print(text)


def _show_horizons(export: dict[str, Any]) -> None:
    """Show the runs of each horizon, and how well short runs rank the recipes of whole runs."""
    for row in (export.get("frugal") or {}).get("horizons", []):
        late = row.get("late")
        name = f"late changes after {late:g}" if late else f"horizon {row['horizon']:g}"
        text = f"{name}: {row['runs']} runs"
        correlation = row["correlation"]
        if correlation is not None:
            text += f", rank correlation with whole runs {correlation:.2f}"
            if correlation < 0.5:
                fix = "late changes predict little, so remove sampler.late"
                if not late:
                    fix = "short runs predict little, so remove this horizon from sampler.horizons"
                text += f"; below 0.5, {fix}"
        print(text)


def _show_evidence(evidence: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    flops = {trial["trial"]: _forward_flops(trial) for trial in trials}
    _show_noise(evidence["noise"], evidence.get("sequential"))
    for row in evidence["rows"]:
        low, high = row["interval"]
        verdict = "claimed" if row["claim"] else row["why"]
        if "pairs" in row:
            verdict += f", after {row['pairs']} pairs: {row['stopped']}"
        cost = flops.get(row["trial"], "")
        if cost and cost != flops.get(0):
            verdict += f" ({cost} forward FLOPs per token, the base {flops.get(0)})"
        print(
            f"trial {row['trial']} - base: {row['difference']:+.4f} [{low:+.4f}, {high:+.4f}], "
            f"p={row['p_holm']:.3g}: {verdict}"
        )
    val = evidence.get("val")
    text: str = evidence["claim"]
    if val:
        text += f"; val {val['full']:.4f}"
    print(text)


# -- best


@app.command("best")
def best(
    name: Name,
    save: Annotated[
        str | None,
        typer.Option("--save", metavar="NAME", help="Save the best trial as the preset file NAME.toml."),
    ] = None,
    out: Out = DEFAULT_OUT,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the command that trains the best confirmed trial.

    If no trial is confirmed, print the command for the trial with the best score.
    """
    from sweeps.folder import read_export

    export = read_export(out / name)
    evidence = export.get("evidence") or {}
    claim = evidence.get("claim", "not confirmed")
    trial = _winner(export, name)
    number = trial["trial"]
    command = ["mainrun", "train", "--preset"]
    if save is not None:
        _save_preset(save, export["preset"], trial["sets"], about=f"trial {number} of {name}: {claim}")
        command.append(f"{save}.toml")
    else:
        command.append(export["preset"])
        for setting in trial["sets"]:
            command += ["--set", setting]
    if as_json:
        emit({"trial": number, "value": trial["value"], "claim": evidence.get("claim"), "command": command})
        return
    print(f"trial {number}, {export['objective']} {trial['value']:.4f}; {claim}", file=sys.stderr)
    print(shlex.join(command))


def _show_noise(noise: dict[str, Any], sequential: dict[str, Any] | None) -> None:
    over = f"{len(noise['values'])} seeds"
    if sequential:
        over = f"{noise['df']} degrees of freedom"
        print(
            f"confirmation: {sequential['pairs']} of at most {sequential['maximum']} pairs; "
            f"the confidence level of {sequential['level']:.0%} holds over all numbers of pairs together"
        )
        if not sequential["pairs"]:
            return  # no trial but the base was completed, so nothing was trained
    print(
        f"noise: sigma {noise['sigma']:.4f} over {over}; differences below {noise['floor']:.4f} may be noise"
    )


def _winner(export: dict[str, Any], name: str) -> dict[str, Any]:
    done = _ranked_trials(export)
    if not done:
        raise RunError(f"no trial of the study {name} was trained to the end; give the study a larger budget")
    winner = (export.get("evidence") or {}).get("winner")
    for trial in export["trials"]:
        if trial["trial"] == winner:
            return dict(trial)
    return done[0]


def _save_preset(name: str, base: str, settings: list[str], about: str) -> None:
    """Write a preset file to the current folder."""
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"--save {name!r} is not allowed; write only letters, digits, - and _")
    file = Path(f"{name}.toml")
    if file.exists():
        raise UsageError(f"the file {file} already exists; give another name, or remove the file")
    lines = [f"about = {json.dumps(about)}", f"base = {json.dumps(base)}"]
    for setting in settings:
        key, _, value = setting.partition("=")
        if value == "none":
            raise ConfigError(
                f"a preset file cannot contain {key}=none; train the trial with --set {key}=none"
            )
        lines.append(f"{key} = {value if _is_toml(value) else json.dumps(value)}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_toml(value: str) -> bool:
    """Return whether a text is a valid TOML value. For example, a JSON object is not valid TOML."""
    try:
        tomllib.loads(f"v = {value}")
    except tomllib.TOMLDecodeError:
        return False
    return not value.startswith("{")


# -- export, dashboard


@app.command("export")
def export_(
    name: Name,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            callback=validate_paths,
            help="The folder to which trials.parquet and study.json are written.",
        ),
    ],
    out: Out = DEFAULT_OUT,
    debug: Debug = False,
) -> None:
    """Write a finished study as trials.parquet and study.json.

    Reports and other tools can read these files.
    """
    from sweeps.export import write_tables
    from sweeps.folder import read_export

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"DIR {folder} is a file; give an existing folder, or the path of a new folder")
    if (folder / "study.json").is_file() and not (folder / "trials.parquet").is_file():
        raise UsageError(
            f"the folder {folder} contains a study.json that is not an export and would be overwritten; "
            "give another folder"
        )
    write_tables(read_export(out / name), folder)
    print(f"{folder / 'trials.parquet'}\n{folder / 'study.json'}")


@app.command("dashboard")
def dashboard(
    name: Name,
    out: Out = DEFAULT_OUT,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port of the web server.")] = 8080,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="The URL of the study's database, if the database needs a password.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Open a study in optuna-dashboard.

    The dashboard is an extra package. Install the dashboard with pip install 'mainrun[dashboard]'.
    """
    from sweeps.folder import require_study

    folder = out / name
    document = require_study(folder)
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise UsageError(
            "optuna-dashboard is not installed; install it with pip install 'mainrun[dashboard]'"
        )
    url = storage or document["study"]["storage"]
    if not url and not (folder / "study.db").is_file():
        raise RunError(f"{folder} has no study.db yet; run `{document['command']}` to resume the study")
    from optuna.exceptions import StorageInternalError
    from optuna_dashboard import run_server
    from sqlalchemy.exc import SQLAlchemyError

    from sweeps.database import open_storage, short_message

    try:
        database = open_storage(url, folder / "study.db")
    except (StorageInternalError, SQLAlchemyError) as e:
        raise UsageError(
            f"the study's database cannot be opened ({short_message(e)}); "
            "give the password in PGPASSWORD or in --storage"
        ) from None
    print(f"{name} at http://127.0.0.1:{port}/dashboard; press Ctrl-C to stop", file=sys.stderr, flush=True)
    try:
        run_server(database, host="127.0.0.1", port=port)
    except OSError as e:
        raise UsageError(f"port {port} cannot be used ({e.strerror}); give another --port") from None
