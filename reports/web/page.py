"""Build the web page: one file of HTML with its own style, script and data, which loads nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from mainrun.files.inputs import printable
from mainrun.run.progress import clock, short
from mainrun.store.rundir import write_text
from mainrun.ui.compare import scientific
from reports.evidence.studies import Scale
from reports.evidence.tables import fixed, setting
from reports.web import html, tiles
from reports.web.html import Cell, Html, Row, join, tag
from reports.web.views import RunView, StudyView, View, best_run, is_complete, is_failed

COLOURS = 8  # the recipes with a colour of their own; the others are grey
LOST = "No answer from the board. This page shows what was last known."
AXES = (("steps", "steps"), ("tokens", "tokens"), ("time", "time"), ("flops", "FLOPs"))
VALUES = (("full", "full score"), ("loss", "training loss"))
TITLES = {"ablation": "Ablation", "config": "What differs", "failures": "What failed"}  # of the sections
TRIALS_NOTE = (
    "Blue: trials that were trained to the end. Orange: the best value so far, and the best trial. Grey: the "
    "last values of trials that were stopped earlier; high ones lie above the frame."
)
SLICES = 12  # the fields of a study that are drawn


def write(path: Path, view: View) -> int:
    """Write the page to a file, and return its size."""
    content = render(view)
    write_text(path, content)
    return len(content.encode())


def render(view: View, version: str = "", shown: str = "") -> str:
    """Return the page. With a version, it is the page of the board, which refreshes itself.

    shown: what the board says about the state of the page.
    """
    colours = _colours(view)
    keys = _keys(view.runs)
    sections = [section for section in _sections(view, colours, keys) if section is not None]
    links = join([tag("a", title, href=f"#{name}") for name, title, _ in sections])
    body = [tag("section", join([tag("h2", title), part]), id=name) for name, title, part in sections]
    live = tag("p", shown, id="live", role="status", data_lost=LOST) if version else Html()
    head = join([tag("h1", view.title), tag("p", view.subtitle, class_="soft"), live])
    document = join(
        [
            tag("header", join([head, tag("nav", links, aria_label="Sections")])),
            tag("main", join(body) if body else tag("section", tag("p", "There is no run here yet."))),
            tag(
                "footer",
                tag("p", "Scores are in nats per character of val; lower is better. Made by mainrun."),
            ),
            html.json_block(_data(view, colours, keys)),
            Html(f"<script>{html.script()}</script>"),
        ]
    )
    attributes = {"data_version": version, "data_shown": shown} if version else {}
    content = join([Html(_head(view, bool(version))), tag("body", document, **attributes)])
    return f"<!doctype html>\n{tag('html', content, lang='en')}\n"


def _head(view: View, live: bool) -> str:
    return (
        '<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.policy(live)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{tag("title", view.title)}<link rel="icon" href="data:,"><style>{html.style()}</style></head>'
    )


def _sections(view: View, colours: Mapping[str, str], keys: Sequence[str]) -> Iterator[tuple[str, str, Html]]:
    if view.claim is not None and view.runs:
        yield "result", "Result", tiles.result(view, view.claim)
    if view.problems:
        yield "problems", "What could not be read", tiles.bullets(view.problems)
    now = tiles.now(view)
    if now is not None:
        yield "now", "Now", now
    if view.runs:
        if any(run.scores or run.losses for run in view.runs):
            yield "curves", "Curves", _curves(view, colours)
        yield "runs", "Runs", _runs(view, colours, keys)
    for place, study in enumerate(view.studies):
        yield f"study-{place}", f"Study {study.name}", _study(study, place)
    for made in view.tables:
        title = TITLES.get(made.name, made.title)
        below = Html() if title == made.title else tag("p", made.title, class_="soft")
        yield f"table-{made.name}", title, html.evidence_table(made, f"table-{made.name}-rows", below)
    if view.runs:
        yield "configs", "Configs and commands", join(map(_details, view.runs, keys))


# -- runs


def _colours(view: View) -> dict[str, str]:
    """Return the colour of each recipe. The two recipes of the claim come first."""
    names = dict.fromkeys([*filter(None, view.pair), *(run.recipe for run in view.runs)])
    return {name: f"c{place}" if place < COLOURS else "cx" for place, name in enumerate(names)}


def _keys(runs: Sequence[RunView]) -> list[str]:
    """Return a short name for each run, which can be part of a link."""
    keys: list[str] = []
    for run in runs:
        key = "run-" + sha256(run.id.encode(errors="replace")).hexdigest()[:10]
        keys.append(f"{key}-{len(keys)}" if key in keys else key)
    return keys


def _choice(name: str, title: str, choices: Sequence[tuple[str, str]], chosen: str) -> Html:
    labels = []
    for value, words in choices:
        checked = "checked" if value == chosen else None
        button = tag("input", type="radio", name=name, value=value, checked=checked).removesuffix("</input>")
        labels.append(tag("label", join([Html(button), tag("span", words)])))
    return tag("fieldset", join([tag("legend", title), *labels]))


def _curves(view: View, colours: Mapping[str, str]) -> Html:
    tools = [_choice("curves-x", "Against", AXES, "tokens"), _choice("curves-y", "Show", VALUES, "full")]
    label = "Curves of the runs. The table of runs has the last scores as numbers."
    shown = [name for name, colour in colours.items() if colour != "cx"]
    key = [_key(name, colours[name], str(place)) for place, name in enumerate(shown)]
    if len(colours) > len(shown):
        key.append(_key(f"{len(colours) - len(shown)} other recipes", "cx", "x"))
    return join(
        [
            tag("div", join(tools), class_="tools"),
            tag("figure", chart(label), data_chart="curves", id="curves-figure"),
            tag("ul", join(key), class_="key", aria_label="Recipes"),
            tag(
                "p",
                "Press a recipe to hide it. The filter of the table of runs also selects the curves. The "
                "first scores, of models without training, may lie above the frame.",
                class_="note",
            ),
        ]
    )


def chart(label: str) -> Html:
    """Return the empty chart that the script draws, with the box for the values of a point."""
    return join(
        [tag("svg", role="img", aria_label=label, tabindex="0"), tag("div", class_="tip", role="status")]
    )


def _key(name: str, colour: str, group: str) -> Html:
    content = html.clipped(join([tag("i", class_=f"swatch {colour}"), name]), name)
    return tag("li", tag("button", content, type="button", data_group=group, aria_pressed="true"))


RUN_HEADS = (
    "run", "recipe", "seed", "state", "step", "full", "best", "official", "params", "tokens", "FLOPs",
    "time",
)  # fmt: skip
RUN_NUMBERS = (2, *range(4, 12))


def _runs(view: View, colours: Mapping[str, str], keys: Sequence[str]) -> Html:
    rows = []
    best = best_run(view.runs)
    for run, key in zip(view.runs, keys, strict=True):
        style = "bad" if run.is_bad else None
        if run is best:
            style = "best"
        rows.append(Row(list(_run_cells(run, key, colours[run.recipe])), style, key))
    note = "full and official are scores of the last evaluation; best is the lowest full score of the run."
    table = html.table("runs-table", "Runs", RUN_HEADS, rows, RUN_NUMBERS)
    return join([search("runs", "Filter the runs"), table, tag("p", note, class_="note")])


def _run_cells(run: RunView, key: str, colour: str) -> Iterator[Cell]:
    yield Cell(tag("a", run.id, href=f"#{key}"), style="id")
    yield Cell(
        html.clipped(join([tag("i", class_=f"swatch {colour}"), run.recipe]), run.recipe), style="wide"
    )
    seed = run.config.get("seed")
    yield Cell("" if seed is None else seed, seed if isinstance(seed, int) else None)
    yield Cell(join([tiles.state(run.state), f" {run.note}"]) if run.note else tiles.state(run.state))
    yield Cell(_of(run.step, run.steps), run.step)
    for score in (run.full, run.best, run.official):
        yield Cell(fixed(4)(score), score)
    for count in (run.params, run.tokens):
        yield Cell("" if count is None else short(count), count)
    yield Cell(scientific(run.flops), run.flops)
    yield Cell("" if run.seconds is None else clock(run.seconds), run.seconds)


def _of(step: int | None, steps: int | None) -> str:
    if step is None:
        return ""
    return f"{step:,}" if steps in (None, step) else f"{step:,} of {steps:,}"


def search(name: str, words: str) -> Html:
    """Return the field that filters a table."""
    box = Html(
        f'<input type="search" id="{name}-filter" data-table="{name}-table" autocomplete="off" '
        'spellcheck="false">'
    )
    label = tag("label", f"{words} ", for_=f"{name}-filter")
    return tag(
        "div", join([label, box, tag("output", id=f"{name}-table-count", class_="soft")]), class_="tools"
    )


def _details(run: RunView, key: str) -> Html:
    lines = [html.text(line) for line in html.lines_of(run.config)]
    command = shlex.join(["mainrun", *map(str, run.command[1:])]) if run.command else "not recorded"
    facts = ", ".join(filter(None, (run.state, run.note, run.machine)))
    content = [
        tag("summary", run.id),
        tag("p", facts),
        tag("pre", command, class_="command", tabindex="0", aria_label=f"Command of {run.id}"),
        tag("pre", Html("\n".join(lines)), tabindex="0", aria_label=f"Config of {run.id}"),
    ]
    return tag("details", join(content), id=key)


# -- studies


def _study(study: StudyView, place: int) -> Html:
    parts = [tag("p", study.about, class_="soft")] if study.about else []
    if study.claim:
        parts.append(tag("p", study.claim, class_="claim"))
    parts.append(tiles.study_tiles(study))
    if any(trial["value"] is not None for trial in study.trials):
        label = f"The value of each trial of {study.name}, and the best value so far."
        figure = tag("figure", chart(label), data_chart="study", data_study=place)
        parts += [tag("h3", f"{study.objective} by trial"), figure, tag("p", TRIALS_NOTE, class_="note")]
        parts += [tag("h3", "By field"), tag("div", join(_slices(study, place)), class_="grid")]
    if study.importance:
        parts += [tag("h3", "Importance of the fields"), tiles.bars(study.importance)]
    parts += [tag("h3", "Trials"), _trials(study, f"trials-{place}")]
    for made in study.tables:
        parts.append(html.evidence_table(made, f"study-{place}-{made.name}"))
    if study.command:
        parts += [tag("h3", "Command"), tag("pre", study.command, class_="command", tabindex="0")]
    return join(parts)


def _slices(study: StudyView, place: int) -> Iterator[Html]:
    for field in study.fields[:SLICES]:
        label = f"{study.objective} of the trials against {field}"
        yield tag("figure", chart(label), data_chart="study", data_study=place, data_field=field)


def _trials(study: StudyView, name: str) -> Html:
    extra = [name for name in ("tokens", "reason", "run") if any(trial.get(name) for trial in study.trials)]
    heads = ["trial", "state", study.objective, *study.fields, *extra]
    best = study.best
    rows = []
    for trial in study.trials:
        style = "bad" if is_failed(trial) else None
        if trial is best:
            style = "best"
        rows.append(Row(list(_trial_cells(study, trial, extra)), style))
    right = [0, 2, *range(3, 3 + len(study.fields))]
    if "tokens" in extra:
        right.append(heads.index("tokens"))
    table = html.table(f"{name}-table", f"Trials of {study.name}", heads, rows, right)
    return join([search(name, "Filter the trials"), table])


def _trial_cells(study: StudyView, trial: Mapping[str, Any], extra: Sequence[str]) -> Iterator[Cell]:
    number = trial["trial"]
    yield Cell("" if number is None else number, number)
    yield Cell(tiles.state(str(trial["state"])))
    yield Cell(fixed(4)(trial["value"]), trial["value"])
    for field in study.fields:
        value = trial["params"].get(field)
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        yield Cell("" if value is None else setting(value), number)
    for name in extra:
        value = trial.get(name)
        if name == "tokens":
            yield Cell("" if value is None else short(value), value)
        else:
            yield Cell(value or "", style="wide" if value and name == "reason" else None)


# -- the data of the script


def _data(view: View, colours: Mapping[str, str], keys: Sequence[str]) -> dict[str, Any]:
    groups = {name: str(place) for place, name in enumerate(colours)}
    runs = []
    for run, key in zip(view.runs, keys, strict=True):
        colour = colours[run.recipe]
        group = "x" if colour == "cx" else groups[run.recipe]
        runs.append(
            {"id": printable(run.id), "key": key, "group": group, "colour": colour, "full": run.scores}
            | {"loss": run.losses}
        )
    runs.sort(key=lambda run: run["colour"] != "cx")  # grey curves are drawn first, below the others
    return {"runs": runs, "time": _unit_of_time(view.runs), "studies": list(map(_study_data, view.studies))}


def _unit_of_time(runs: Sequence[RunView]) -> tuple[str, int]:
    """Return the unit in which the time of the longest run has few digits, and its seconds."""
    longest = max((run.losses[-1][2] or 0.0 for run in runs if run.losses), default=0.0)
    if longest > 3 * 3600:
        return "hours", 3600
    if longest > 3 * 60:
        return "minutes", 60
    return "seconds", 1


def _study_data(study: StudyView) -> dict[str, Any]:
    fields = []
    for name in study.fields:
        values = [trial["params"][name] for trial in study.trials if name in trial["params"]]
        scale = Scale.of(values)
        fields.append({"name": name, "log": study.is_log(name) or scale.log, "names": scale.names or None})
    trials = []
    for trial in study.trials:
        if trial["trial"] is not None:
            kept = {name: trial[name] for name in ("trial", "state", "value", "params")}
            trials.append(kept | {"complete": is_complete(trial)})
    best = study.best
    return {"trials": trials, "fields": fields, "best": best and best["trial"]}
